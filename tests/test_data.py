"""The loader on real tokens: fused markers carry the same text and bytes; the manifest is held to."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_hp
from data_helpers import TEXTS, build, write_docs

import train_gpt
from lossless_caps import decode
from prepare_caseops_data import (
    DEFAULT_TOKENIZER,
    load_tokenizer,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)
from tools import dataset, guard
from tools.dataset import check_dataset, check_training_ids
from train_gpt import (
    BOS_ID,
    PAIR_IDS,
    DataError,
    TokenStream,
    fuse_markers,
    space_id,
)

PROSE = [
    f"In {1900 + n} The City of NEW York and iPhone users met Mr. McDonald {n} times. They LEFT."
    for n in range(60)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Validation: literal markers, ligatures, empty documents and some of PROSE.

    The rest of it is training.
    """
    folder = tmp_path_factory.mktemp("fused")
    docs = write_docs(folder / "docs.jsonl", TEXTS[:7] + PROSE)
    build(folder / "data", "--docs", docs, "--val-docs", 20, "--shard-tokens", 200)
    return folder / "data"


def hp_of(folder, **changes):
    return tiny_hp(data_path=str(folder), vocab_size=8192, **changes)


def unfused(tokens, space):
    """The tokens as they are stored: ids 0, 2 and 3 are a space and marker 4, 5 or 6."""
    markers = {0: 4, 2: 5, 3: 6}
    parts = [[space, markers[t]] if t in markers else [t] for t in tokens.tolist()]
    return [token for part in parts for token in part]


def test_fused_and_stored_validation_carry_the_same_text_and_bytes(folder):
    plain, fused = (
        train_gpt.ValidationSet(hp_of(folder, marker_fusion_enabled=on)) for on in (False, True)
    )
    space, sp = space_id(hp_of(folder)), load_tokenizer(DEFAULT_TOKENIZER)
    assert unfused(fused.tokens, space) == plain.tokens.tolist()
    assert fused.summary == plain.summary and f"values:{len(plain.tokens)} " in plain.summary
    assert len(fused.tokens) < 0.95 * len(plain.tokens)
    # CAPNEXT stands inside words, behind no space
    assert set(fused.tokens[np.isin(fused.tokens, PAIR_IDS)]) == {0, 2}
    assert len(fused.starts) == len(plain.starts) == 20
    for document in range(20):
        assert (
            fused.targets_of(np.array([document]))[1] == plain.targets_of(np.array([document]))[1]
        )
        texts = [
            decode(sp.decode(tokens))
            for tokens in (
                unfused(fused.tokens[fused.starts[document] : fused.ends[document]], space),
                plain.tokens[plain.starts[document] : plain.ends[document]].tolist(),
            )
        ]
        assert texts[0] == texts[1]
    assert texts[0].startswith("In 1912 The City of NEW York and iPhone")
    alias = np.isin(fused.tokens, PAIR_IDS)
    assert (fused.bytes[alias] == 1).all() and fused.bytes.sum() == plain.bytes.sum()


def test_a_pair_takes_its_bytes_along_and_other_neighbours_stay(folder):
    space = space_id(hp_of(folder))
    tokens = np.array([1, space, 4, 300, space, space, 5, 7, 4, 6, space, 7, space])
    charges = np.array([0, 2, 0, 3, 1, 1, 0, 0, 3, 0, 1, 0, 9])
    fused, bytes_ = fuse_markers(tokens, charges, space)
    assert fused.tolist() == [1, 0, 300, space, 2, 7, 4, 6, space, 7, space]
    assert bytes_.tolist() == [0, 2, 3, 1, 1, 0, 3, 0, 1, 0, 9]


def test_fused_rows_are_full_and_follow_the_stream(folder, dist):
    hp = hp_of(
        folder,
        marker_fusion_enabled=True,
        micro_batch_tokens=64,
        train_batch_tokens=64,
        balance_rows=False,
    )
    stream = TokenStream(folder, "train")
    loader, space = train_gpt.TrainLoader(stream, hp, dist), space_id(hp)
    assert 64 < loader.span < 80
    for index in range(40):  # more than an epoch
        row = loader.build(index)
        assert row.inputs.shape == (1, 64) and row.inputs[0, 0] == BOS_ID
        assert torch.equal(row.inputs[0, 1:], row.targets[:-1])
        stored = unfused(row.inputs[0], space)
        assert stored == loader.stream.read(loader.row_offset(index), len(stored)).tolist()


def test_a_validation_text_with_ids_of_pairs_is_refused(folder, tmp_path):
    """A text whose own tokens have these ids would be scored as another text."""
    shutil.copytree(folder, tmp_path / "data")
    path = next((tmp_path / "data").glob("fineweb_val_0*.bin"))
    tokens = read_shard(path)
    write_shard(path, [*tokens[:-1], 3])
    (tmp_path / "data" / "manifest.json").unlink()
    hp = hp_of(tmp_path / "data", tokenizer_path=str(DEFAULT_TOKENIZER))
    train_gpt.ValidationSet(hp)
    with pytest.raises(DataError, match="MARKER_FUSION_ENABLED=0"):
        train_gpt.ValidationSet(dataclasses.replace(hp, marker_fusion_enabled=True))


@pytest.fixture
def with_pad(folder, tmp_path):
    """The data with <pad> as the last token of the last training shard."""
    shutil.copytree(folder, tmp_path / "data")
    path = sorted((tmp_path / "data").glob("fineweb_train_0*.bin"))[-1]
    write_shard(path, [*read_shard(path)[:-1], 0])
    return path


def test_a_training_shard_with_ids_of_pairs_is_refused_before_the_start(with_pad, dist):
    hp = hp_of(with_pad.parent, marker_fusion_enabled=True)
    with pytest.raises(DataError, match=rf"{with_pad}: tokens 0, 2 or 3 .*MARKER_FUSION_ENABLED=0"):
        check_training_ids(hp, dist)
    check_training_ids(dataclasses.replace(hp, marker_fusion_enabled=False), dist)
    write_shard(with_pad, [*read_shard(with_pad)[:-1], BOS_ID])
    check_training_ids(hp, dist)


@pytest.mark.parametrize("fused", [False, True])
def test_a_training_shard_with_ids_outside_the_vocabulary_is_refused_before_the_start(
    with_pad, dist, fused
):
    hp = hp_of(with_pad.parent, marker_fusion_enabled=fused)
    write_shard(with_pad, [*read_shard(with_pad)[:-1], 8192])
    with pytest.raises(DataError, match=rf"{with_pad}: token 8192 is outside VOCAB_SIZE=8192"):
        check_training_ids(hp, dist)


def test_ranks_share_the_scan_of_training_shards(with_pad):
    number = len(list(with_pad.parent.glob("fineweb_train_0*.bin"))) - 1
    hp = hp_of(with_pad.parent, marker_fusion_enabled=True)
    found = []
    for rank in range(2):
        try:
            check_training_ids(hp, SimpleNamespace(rank=rank, world_size=2))
        except DataError:
            found.append(rank)
    assert number > 2 and found == [number % 2]


def test_the_guard_tells_of_ids_of_pairs_with_all_other_problems(with_pad, dist, monkeypatch):
    monkeypatch.setattr(guard, "check_machine", lambda *given: "")
    hp = hp_of(with_pad.parent, marker_fusion_enabled=True)
    hp = dataclasses.replace(hp, vocab_size=8193)
    with pytest.raises(train_gpt.SettingError) as refused:
        guard.RunGuard().check(hp, dist, SimpleNamespace(validation=None, folder=None, model=None))
    assert "manifest says VOCAB_SIZE=8192" in str(refused.value)
    assert "tokens 0, 2 or 3" in str(refused.value)


def test_rows_with_ids_of_pairs_are_refused_where_no_scan_came_so_far(with_pad, dist, monkeypatch):
    hp = hp_of(
        with_pad.parent,
        marker_fusion_enabled=True,
        micro_batch_tokens=64,
        train_batch_tokens=64,
        quant_check_rows=0,  # else the last documents are held out
    )
    monkeypatch.setattr(dataset, "SCAN_SECONDS", -1)
    check_training_ids(hp, dist)
    stream = TokenStream(with_pad.parent, "train")
    with pytest.raises(DataError, match="which are those of fused markers"):
        train_gpt.TrainLoader(stream, hp, dist)  # measures what fusing leaves
    plain = dataclasses.replace(hp, marker_fusion_enabled=False)
    loader = train_gpt.TrainLoader(stream, plain, dist)
    loader.hp = hp
    with pytest.raises(DataError, match="which are those of fused markers"):
        for index in range(stream.size // loader.span):
            loader.row(index)


def test_a_fused_model_trains_and_adapts(folder, ops, dist, tmp_path):
    hp = hp_of(
        folder,
        marker_fusion_enabled=True,
        iterations=2,
        micro_batch_tokens=64,
        train_batch_tokens=64,
        ttt_batch_size=8,
        phased_ttt_num_phases=0,
    )
    model = train_gpt.GPT(hp, ops, torch.float32)
    log, validation = train_gpt.RunLog(tmp_path, dist), train_gpt.ValidationSet(hp)
    train_gpt.Trainer(
        model, train_gpt.TrainLoader(TokenStream(hp.data_path, "train"), hp, dist), hp, dist, log
    ).train(None)
    plain = train_gpt.Evaluator(model, validation, hp, dist).evaluate_bpb()
    adapted = train_gpt.TestTimeTrainer(model, validation, hp, dist, log).evaluate()
    assert plain["tokens"] == adapted["tokens"] == len(validation.tokens) - 1
    assert plain["bytes"] == adapted["bytes"] == validation.bytes.sum()


def test_plain_text_has_no_markers_to_fuse(published):
    assert tiny_hp(marker_fusion_enabled=True).fuses_markers
    assert not tiny_hp(marker_fusion_enabled=True, caseops_enabled=False).fuses_markers


# ---- the manifest


@pytest.fixture
def copy(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def restate(change):
    """Changes the manifest, sealing it again."""

    def damage(folder):
        manifest = read_manifest(folder)
        change(manifest)
        write_manifest(folder, manifest)

    return damage


def one_byte_more(folder):
    values = np.fromfile(folder / "fineweb_val_bytes_000000.bin", dtype="<u2")[512:]
    values[3] += 1
    write_shard(folder / "fineweb_val_bytes_000000.bin", values)


def another_token(folder):
    values = np.fromfile(folder / "fineweb_val_000000.bin", dtype="<u2")[512:]
    values[3] = 300 + (values[3] == 300)
    write_shard(folder / "fineweb_val_000000.bin", values)


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            restate(lambda m: m["splits"]["val"].update(documents=50_000)),
            "20 documents of validation, not 50000",
        ),
        (
            restate(lambda m: m["splits"]["val"].update(tokens=47_853_344)),
            "tokens of validation, not 47853344",
        ),
        (
            restate(lambda m: m.update(leaked_documents=1)),
            "1 training documents are validation documents",
        ),
        (
            lambda folder: (folder / "fineweb_train_000001.bin").unlink(),
            "fineweb_train_000001.bin is missing",
        ),
        (
            lambda folder: write_shard(folder / "fineweb_train_000001.bin", [1, 2]),
            "train_000001.bin is another file",
        ),
        (
            lambda folder: write_shard(folder / "fineweb_train_000050.bin", [1, 2]),
            "train_000050.bin is another file",
        ),
        (one_byte_more, "charged_bytes of validation"),
        (another_token, "fineweb_val_000000.bin is another file"),
    ],
)
def test_data_that_are_not_what_the_manifest_says_are_refused(copy, damage, words):
    hp = hp_of(copy)
    validation = train_gpt.ValidationSet(hp)
    assert "canonical:no" in validation.summary
    assert check_dataset(hp, validation).suffix == ".model"
    damage(copy)
    with pytest.raises(DataError, match=words):
        check_dataset(hp, train_gpt.ValidationSet(hp))


def test_a_bos_that_is_charged_is_refused(copy):
    tokens, charges = (
        np.fromfile(copy / f"fineweb_{name}_000000.bin", dtype="<u2")[512:]
        for name in ("val", "val_bytes")
    )
    second = np.flatnonzero(tokens == BOS_ID)[1]
    charges[second] = 3
    write_shard(copy / "fineweb_val_bytes_000000.bin", charges)
    with pytest.raises(DataError, match="a BOS is charged"):
        train_gpt.ValidationSet(hp_of(copy))


def test_a_missing_tokenizer_is_told_with_where_it_was_searched(copy, monkeypatch):
    monkeypatch.setattr(train_gpt, "__file__", str(copy / "alone" / "train_gpt.py"))
    places = [copy, *(parent / "tokenizers" for parent in (*copy.parents[:2], copy / "alone"))]
    message = f"{copy}: no tokenizer (*.model) in {', '.join(map(str, places))}: set TOKENIZER_PATH"
    for path in copy.glob("*.model"):
        path.unlink()
    for manifest in (True, False):
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            train_gpt.find_tokenizer(hp_of(copy))
        if manifest:
            (copy / "manifest.json").unlink()


def test_tokenizers_that_the_manifest_does_not_mean_are_named(copy):
    restate(lambda m: m["tokenizer"].update(sha256="5e1f"))(copy)
    with pytest.raises(DataError, match=r"wants a tokenizer with sha256 5e1f, which none of /.*"):
        train_gpt.find_tokenizer(hp_of(copy))


def test_a_damaged_manifest_is_one_message(copy):
    (copy / "manifest.json").write_bytes((copy / "manifest.json").read_bytes()[:-9])
    with pytest.raises(DataError, match="manifest.json is damaged"):
        check_dataset(hp_of(copy), None)


def test_data_with_a_manifest_of_others_or_none_are_read(copy):
    (copy / "manifest.json").write_text(json.dumps({"version": "10B", "datasets": []}))
    assert len(train_gpt.ValidationSet(hp_of(copy)).starts) == 20
    (copy / "manifest.json").unlink()
    assert len(train_gpt.ValidationSet(hp_of(copy)).starts) == 20


def test_canonical_is_told_by_documents_values_and_bytes(folder, monkeypatch, published):
    assert train_gpt.CANONICAL == (50_000, 47_853_344, 47_851_520, 151_074_499)
    charges = train_gpt.ValidationSet(hp_of(folder)).bytes
    values = len(charges)
    counts = [20, values, values - 9, int(charges[1 : values - 8].sum())]
    for wrong in range(4):
        monkeypatch.setattr(train_gpt, "CANONICAL", tuple(counts))
        found = [
            train_gpt.ValidationSet(hp_of(folder, marker_fusion_enabled=on)).summary
            for on in (False, True)
        ]
        assert all("canonical:yes" in summary for summary in found)
        changed = [count - 5 * (number == wrong) for number, count in enumerate(counts)]
        monkeypatch.setattr(train_gpt, "CANONICAL", tuple(changed))
        assert "canonical:no" in train_gpt.ValidationSet(hp_of(folder)).summary
