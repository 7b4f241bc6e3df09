"""Files and settings that nobody wrote: every reader gives a value or one of our errors.

`make test` tries a sample, the same in every run; `make soak` tries 100,000 inputs, others each
time. Artifacts that are wrong under digests that are right have a file of their own,
test_artifact_fuzz.py.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_helpers import model_arrays
from conftest import tell, tiny_hp, write_documents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_helpers import OPS, SMALL

import train_gpt
from presets import published
from tools import dataset, guard

SOAK = os.environ.get("SOAK") == "1"
OURS = train_gpt.SettingError, train_gpt.DataError, train_gpt.ArtifactError, guard.SafetyError
TRIED = Counter()
torch.set_num_threads(1)


def tries(sample, soak):
    """How many inputs a test takes, in `make test` and in `make soak`."""
    return settings(
        max_examples=soak if SOAK else sample,
        deadline=None,
        database=None,
        derandomize=not SOAK,
        suppress_health_check=list(HealthCheck),
    )


# a file is damaged: bytes change, an end is cut off or sewn on, or a stretch moves
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6)
DAMAGE = st.tuples(CHANGES, st.floats(0, 1), st.binary(max_size=12), st.booleans())


def damaged(data, damage):
    changes, share, more, cut = damage
    data = bytearray(data)
    for place, mask in changes:
        data[int(place * len(data))] ^= mask
    at = int(share * len(data))
    return bytes(data[:at] + more if cut else data[:at] + more + data[at:])


def only_ours(read, *arguments):
    """Whatever comes out is a value, or an error of ours with a message."""
    TRIED["reads"] += 1
    try:
        read(*arguments)
    except OURS as error:
        TRIED["refused"] += 1
        assert str(error)


@pytest.fixture(autouse=True)
def counted(request):
    TRIED.clear()
    yield
    tell(f"readers, {request.node.name}: {TRIED['reads']} reads, {TRIED['refused']} refused")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def trainer(place):
    """A trainer of a tiny model, its model.pt, and a training state."""
    write_documents(place, "train", [40] * 30)
    hp = tiny_hp(data_path=str(place), resume=True, run_id="x", **SMALL)

    class Log(list):
        folder = place

        def __call__(self, line):
            pass

    loader = train_gpt.TrainLoader(
        train_gpt.TokenStream(hp.data_path, "train"), hp, dist := train_gpt.Dist("cpu")
    )
    found = train_gpt.Trainer(train_gpt.GPT(hp, OPS, torch.float32), loader, hp, dist, Log())
    found.train_step(0, 0.0, False)
    train_gpt.save_checkpoint(place / "model.pt", found.model, hp)
    guard.save_state(found, 1, 0.5, [torch.tensor(1.0)])
    return found


# ---- files


ARTIFACT = train_gpt.pack_weights(model_arrays(), "entropy")


@given(DAMAGE)
@tries(300, 15_000)
def test_a_damaged_artifact_is_read_or_refused(damage):
    only_ours(train_gpt.unpack_weights, damaged(ARTIFACT, damage))


@given(st.binary(max_size=60))
@tries(200, 5_000)
def test_any_bytes_as_an_artifact_are_refused(data):
    only_ours(train_gpt.unpack_weights, train_gpt.MAGIC + data)


def test_a_damaged_checkpoint_is_loaded_or_refused(place, trainer):
    data, path = (place / "model.pt").read_bytes(), place / "damaged.pt"

    @given(DAMAGE)
    @tries(100, 8_000)
    def read(damage):
        path.write_bytes(damaged(data, damage))
        only_ours(train_gpt.load_checkpoint, path, trainer.model)

    read()


def test_a_checkpoint_whose_weights_have_a_wrong_bit_is_refused(place, trainer):
    """torch.load would take it: the file is whole, but for the check sum of one of its entries."""
    data = bytearray((place / "model.pt").read_bytes())
    weights = trainer.model.tok_emb.detach().numpy().tobytes()
    data[data.index(weights) + 3] ^= 128
    path = place / "bit.pt"
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(train_gpt.DataError, match="checkpoint .*bit.pt: .*data/\\d+ is damaged"):
        train_gpt.load_checkpoint(path, trainer.model)


def test_a_checkpoint_of_an_older_version_with_more_in_it_is_loaded(place, trainer):
    """Versions of a few days kept row gradients in it, and had settings that are gone."""
    saved = torch.load(place / "model.pt", weights_only=True)
    saved["row_gradients"] = {"tok_emb.weight": torch.ones(3)}
    saved["settings"]["gptq_all_reduce"] = 0.5
    torch.save(saved, place / "older.pt")
    model = train_gpt.GPT(trainer.hp, OPS, torch.float32)
    train_gpt.load_checkpoint(place / "older.pt", model)
    assert torch.equal(model.tok_emb, trainer.model.tok_emb)
    hp = dataclasses.replace(trainer.hp, quant_only=True, resume=False)
    assert guard.compare_settings(place / "older.pt", hp)[0] == []


def test_a_damaged_state_with_a_right_digest_is_loaded_or_refused(place, trainer):
    path, sealed = (
        place / "state-00000002.pt",
        next(place.glob("state-00000001.pt")).read_bytes()[32:],
    )

    @given(DAMAGE)
    @tries(100, 8_000)
    def read(damage):
        data = damaged(sealed, damage)
        path.write_bytes(hashlib.sha256(data).digest() + data)
        only_ours(guard.load_state, trainer)

    read()


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.builds(lambda n: torch.zeros(n), st.integers(0, 3)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
PARTS = [
    "step",
    "seconds",
    "losses",
    "weights",
    "average",
    "momentum",
    "adamw",
    "rng",
    "looping",
    "tokens_at",
]


def test_a_state_of_other_content_is_loaded_or_refused(place, trainer):
    path, sealed = (
        place / "state-00000002.pt",
        next(place.glob("state-00000001.pt")).read_bytes()[32:],
    )
    state = torch.load(io.BytesIO(sealed), weights_only=True)

    @given(st.sampled_from(PARTS), TREES)
    @tries(100, 8_000)
    def read(part, tree):
        torch.save(state | {part: tree}, buffer := io.BytesIO())
        path.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
        only_ours(guard.load_state, trainer)

    read()


def test_a_damaged_shard_is_read_or_refused(place):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 40
    data, path = header.tobytes() + np.arange(40, dtype="<u2").tobytes(), place / "shard.bin"

    @given(
        DAMAGE, st.lists(st.tuples(st.integers(0, 3), st.integers(-(2**31), 2**31 - 1)), max_size=2)
    )
    @tries(400, 25_000)
    def read(damage, words):
        changed = np.frombuffer(data, "<i4", 256).copy()
        for position, value in words:
            changed[position] = value
        path.write_bytes(damaged(changed.tobytes() + data[1024:], damage))
        only_ours(train_gpt.shard_size, path)

    read()


LEAVES = st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def test_a_manifest_of_any_shape_is_read_or_refused(place, tmp_path):
    write_documents(tmp_path, "train", [40] * 5)
    write_documents(tmp_path, "val", [20] * 3)
    files = {
        path.name: {
            "values": len(train_gpt.load_data_shard(path)),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in tmp_path.glob("*.bin")
    }
    whole = {
        "format": "caseops_shards",
        "files": files,
        "splits": {"val": {"documents": 3, "tokens": 63}},
        "leaked_documents": 0,
        "tokenizer": {"sha256": "0" * 64},
    }
    hp, path = (
        tiny_hp(data_path=str(tmp_path), tokenizer_path=str(Path(__file__).parents[1] / "LICENSE")),
        tmp_path / "manifest.json",
    )

    def paths_into(tree, at=()):
        yield at
        for key in tree if isinstance(tree, dict) else ():
            yield from paths_into(tree[key], (*at, key))

    def read():
        only_ours(dataset.check_manifest, hp, {"documents": 3, "tokens": 63})
        only_ours(train_gpt.find_tokenizer, hp)

    @given(st.sampled_from(list(paths_into(whole))), JSON, st.booleans())
    @tries(200, 12_000)
    def of_another_shape(at, value, gone):
        tree = json.loads(json.dumps(whole))
        node = tree
        for key in at[:-1]:
            node = node[key]
        if not at:
            tree = value
        elif gone:
            del node[at[-1]]
        else:
            node[at[-1]] = value
        path.write_text(json.dumps(tree))
        read()

    @given(DAMAGE)
    @tries(100, 6_000)
    def damaged_ones(damage):
        path.write_bytes(damaged(json.dumps(whole).encode(), damage))
        read()

    of_another_shape()
    damaged_ones()
    path.write_text("[" * 100_000)
    read()


def test_a_damaged_tokenizer_is_loaded_or_refused(place):
    pytest.importorskip("sentencepiece")
    data = (Path(__file__).parents[1] / "tokenizers" / "caseops_8192.model").read_bytes()
    path = place / "damaged.model"
    hp = tiny_hp(data_path=str(place), tokenizer_path=str(path), vocab_size=8192)

    def read():
        published.piece_byte_tables(train_gpt.load_tokenizer(hp))

    @given(DAMAGE)
    @tries(20, 1_000)
    def damaged_ones(damage):
        path.write_bytes(damaged(data, damage))
        only_ours(read)

    @given(st.binary(max_size=200))
    @tries(50, 4_000)
    def of_any_bytes(content):
        path.write_bytes(content)
        only_ours(read)

    damaged_ones()
    of_any_bytes()
    # loads, and has a piece that is no text
    path.write_bytes(data.replace("\u2581the".encode(), b"\xe2(\x81the", 1))
    with pytest.raises(train_gpt.DataError, match="is no SentencePiece model"):
        read()


# ---- settings


NAMES = [name.upper() for name in train_gpt.Hyperparameters.__dataclass_fields__]
TEXTS = (
    st.text(max_size=12)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["", "0", "1", "-1", "auto", "../x"])
)


@given(
    st.dictionaries(
        st.sampled_from(NAMES) | st.text("ABCDEFGT_", min_size=1, max_size=16), TEXTS, max_size=4
    )
)
@tries(200, 9_000)
def test_any_environment_is_taken_or_refused(environ):
    only_ours(train_gpt.Hyperparameters.from_env, environ)
