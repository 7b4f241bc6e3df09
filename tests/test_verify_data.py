"""Fast encoding against the plain one.

Interrupted runs; what leaks, damage and wrong data look like to `verify`.
"""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import files_at_most
from data_helpers import TEXTS, build, long_corpus, refused, stream, verified, write_docs

import prepare_caseops_data as prepare
import tools.verify_data as verifier
from lossless_caps import CONTROLS
from prepare_caseops_data import (
    DEFAULT_TOKENIZER,
    DataError,
    Encoder,
    encode_document,
    encode_document_with_bytes,
    load_tokenizer,
    normalize_text,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)
from tools.verify_data import canonical, total

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def sp():
    return load_tokenizer(DEFAULT_TOKENIZER)


@pytest.fixture
def dataset(tmp_path):
    """Six validation and forty training documents in shards of 100 values."""
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    build(tmp_path / "data", "--docs", docs, "--val-docs", 6, "--shard-tokens", 100)
    return tmp_path / "data"


# ---- the fast encoder ----------------------------------------------------------------------------


def test_the_fast_encoder_gives_what_the_plain_one_gives(sp):
    rng, encoder = random.Random(3), Encoder(sp)
    alphabet = (
        "abAB  \n\t\r\v\f.,('1é東🗼½ﬁ…’\u0301\u0308\u0338\x07\xa0\u3000\u2581\u200b\x1c\x85<Z="
        + CONTROLS
    )
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(14))) for _ in range(3_000)] + TEXTS
    for text in texts:
        ids, costs = encode_document_with_bytes(sp, text)
        assert encoder.encode(text).tolist() == ids.tolist(), ascii(text)
        fast_ids, fast_costs = encoder.encode_with_bytes(text)
        assert (fast_ids.tolist(), fast_costs.tolist()) == (ids.tolist(), costs.tolist()), ascii(
            text
        )


@pytest.mark.parametrize("blank", [" ", "\n", "\x07", "\u3000"])
@pytest.mark.parametrize("charge", [65_535, 65_536, 65_537, 70_001, 200_001])
def test_a_charge_is_exact_up_to_what_a_side_car_holds_and_then_refused(sp, blank, charge):
    """A token is charged the run of blanks before it, or the dropped characters behind it."""
    # which follows the "1" to its token; blanks before a digit have one of their own
    own = blank == "\x07"
    text = "1" + blank * ((charge - own) // len(blank.encode())) + "2"
    largest = len(text.encode()) - 2 + own
    for encode_with_bytes in (
        lambda text: encode_document_with_bytes(sp, text),
        Encoder(sp).encode_with_bytes,
    ):
        if largest <= 65_535:
            costs = encode_with_bytes(text)[1]
            assert costs.sum(dtype=np.int64) == len(text.encode()) and costs.max() == largest
        else:
            with pytest.raises(DataError, match=f"stands for {largest:,} bytes"):
                encode_with_bytes(text)


def test_a_document_with_a_run_of_blanks_that_cannot_be_charged_is_named(tmp_path, capsys):
    docs = write_docs(
        tmp_path / "docs.jsonl", ["one", "two", "some" + " " * 70_000 + "more", "four"]
    )
    message = refused(capsys, "--docs", docs, "--val-docs", 3, "--out", tmp_path / "out")
    assert (
        "val document 2 (" in message
        and "docs.jsonl, line 4" in message
        and "stands for 70,004 bytes" in message
    )
    build(tmp_path / "train", "--docs", docs, "--val-docs", 2)  # training text is not charged


def test_blanks_at_the_end_of_a_document_take_linear_time(sp):
    """20,000 took 26 seconds, 40,000 took 96."""
    start = time.perf_counter()
    text = "a" + " \n" * 100_000
    assert Encoder(sp).encode_with_bytes(text)[1].tolist() == [0, 1]
    assert Encoder(sp).encode_with_bytes(" " * 100_000)[1].tolist() == [0]
    assert time.perf_counter() - start < 20


def uncharged(encoder, text):
    ids, costs = encode_document_with_bytes(encoder.sp, text)
    return ids, np.where(costs > 1, 0, costs)


@pytest.mark.parametrize(
    "way, wrong",
    [
        ("encode", lambda encoder, text: encode_document(encoder.sp, text)[::-1]),
        ("encode_with_bytes", uncharged),
    ],
)
def test_a_wrong_shortcut_is_noticed(tmp_path, capsys, monkeypatch, way, wrong):
    monkeypatch.setattr(Encoder, way, wrong)
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    assert "word by word" in refused(
        capsys, "--docs", docs, "--val-docs", 6, "--out", tmp_path / "out"
    )


# ---- interrupted runs, pipes ---------------------------------------------------------------------


def test_a_killed_run_goes_on_and_ends_with_the_same_files(tmp_path, capsys):
    docs = long_corpus(tmp_path / "docs.jsonl")
    settings = ["--docs", docs, "--val-docs", "40", "--shard-tokens", "20000"]
    expected = build(tmp_path / "whole", *settings)
    out = tmp_path / "killed"
    code = "import prepare_caseops_data as p, sys; p.BATCH_BYTES = 9000; p.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *settings, "--out", str(out), "--workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (out / "fineweb_train_000003.bin").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists()
    assert build(out, *settings) == expected
    going_on = capsys.readouterr().out
    assert (
        "going on behind 40 + " in going_on
        and "fineweb_train_000002.bin" not in going_on.split("going on")[1]
    )


@pytest.mark.parametrize("change", ["input", "settings"])
def test_an_interrupted_run_does_not_go_on_with_something_else(
    tmp_path, capsys, monkeypatch, change
):
    monkeypatch.setattr(prepare, "BATCH_BYTES", 300)
    docs = write_docs(tmp_path / "docs.jsonl", [*TEXTS, None])
    settings = ["--docs", docs, "--val-docs", 6, "--out", tmp_path / "out", "--shard-tokens"]
    assert "NoneType" in refused(capsys, *settings, 50)
    if change == "input":
        write_docs(tmp_path / "docs.jsonl", ["another", *TEXTS])
        assert "val documents that the interrupted run has read" in refused(capsys, *settings, 50)
    else:
        assert "another shard_tokens" in refused(capsys, *settings, 60)


def test_documents_come_through_a_pipe(tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    expected = build(tmp_path / "file", "--docs", docs, "--val-docs", 6)
    command = [
        sys.executable,
        "prepare_caseops_data.py",
        "--docs",
        "-",
        "--val-docs",
        "6",
        "--workers",
        "2",
    ]
    with open(docs, "rb") as pipe:
        subprocess.run(
            [*command, "--out", tmp_path / "pipe"],
            stdin=pipe,
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
    got = {path.name: path.read_bytes() for path in (tmp_path / "pipe").iterdir()}
    expected["manifest.json"], got["manifest.json"] = (
        {
            **read_manifest(tmp_path / name),
            "sources": read_manifest(tmp_path / name)["sources"][0]["sha256"],
        }
        for name in ("file", "pipe")
    )
    assert got == expected


# ---- training text -------------------------------------------------------------------------------


def test_validation_documents_are_left_out_of_training(tmp_path, sp):
    docs = write_docs(tmp_path / "docs.jsonl", [*TEXTS, TEXTS[0], "", TEXTS[4]])
    build(tmp_path / "out", "--docs", docs, "--val-docs", 6)
    train, _ = stream(tmp_path / "out", "train")
    # an empty document gives nothing away
    wanted = [encode_document(sp, text) for text in [*TEXTS[6:], ""]]
    assert train.tolist() == np.concatenate(wanted).tolist()
    counts = read_manifest(tmp_path / "out")["splits"]["train"]
    assert (counts["left_out"], counts["documents"]) == (2, 41)


def test_normalizing_takes_debris_out_of_training_only(tmp_path, sp):
    text = (
        f"See https://example.org/{'a1' * 30} and {'Zg8+' * 40} here\x07 ===== {'=' * 30}"
        " https://short.org end"
    )
    cleaned = "See  and  here ===== === https://short.org end"
    assert normalize_text(text) == cleaned
    assert all(normalize_text(plain) == plain for plain in TEXTS)
    docs = write_docs(tmp_path / "docs.jsonl", [text + "!", text])
    build(tmp_path / "out", "--docs", docs, "--val-docs", 1, "--normalize-train")
    assert stream(tmp_path / "out", "val")[0].tolist() == encode_document(sp, text + "!").tolist()
    assert stream(tmp_path / "out", "train")[0].tolist() == encode_document(sp, cleaned).tolist()
    manifest = read_manifest(tmp_path / "out")
    assert manifest["normalize_train"] and manifest["splits"]["train"]["removed_bytes"] == len(
        text
    ) - len(cleaned)


def test_a_validation_document_is_found_in_training_text_that_is_normalized(tmp_path):
    text = f"See https://example.org/{'a1' * 30} here"
    docs = write_docs(tmp_path / "docs.jsonl", [text, "other words", text])
    build(tmp_path / "out", "--docs", docs, "--val-docs", 1, "--normalize-train")
    assert read_manifest(tmp_path / "out")["splits"]["train"]["left_out"] == 1


LONG_ADDRESS = f"https://example.org/{'a1' * 30}"


@pytest.mark.parametrize(
    "noise", [f" {LONG_ADDRESS}", "\0", f"\n\n{LONG_ADDRESS} \x01\x02", " " + "Zg8+" * 40]
)
def test_what_normalizing_turns_into_a_validation_document_is_left_out(tmp_path, capsys, noise):
    text = "Every word of this document is for validation."
    docs = write_docs(
        tmp_path / "docs.jsonl", [text, "Other words.", text + noise, f"{noise} {text}", text]
    )
    build(tmp_path / "out", "--docs", docs, "--val-docs", 1, "--normalize-train")
    manifest = read_manifest(tmp_path / "out")
    assert (
        manifest["splits"]["train"]["documents"] == 1
        and manifest["splits"]["train"]["left_out"] == 3
    )
    assert manifest["leaked_documents"] == 0
    assert verified(capsys, tmp_path / "out")[0] == 0


def test_the_manifest_counts_the_leaks_that_are_in_the_shards(tmp_path, monkeypatch):
    """Not what should be there: here documents are no longer left out."""
    monkeypatch.setattr(prepare.np, "isin", lambda hashes, known: np.zeros(hashes.shape, bool))
    docs = write_docs(tmp_path / "docs.jsonl", [*TEXTS, TEXTS[0], "", TEXTS[4]])
    build(tmp_path / "out", "--docs", docs, "--val-docs", 6)
    assert read_manifest(tmp_path / "out")["leaked_documents"] == 2


# ---- verify --------------------------------------------------------------------------------------


def test_a_dataset_in_order_is_verified_against_its_source(dataset, capsys):
    status, output = verified(capsys, dataset, "--docs", dataset.parent / "docs.jsonl")
    assert status == 0 and "40 training documents searched" in output and "canonical: no" in output
    assert "compared 6 validation documents" in output


def test_more_shards_than_a_process_may_open_are_verified(tmp_path, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    build(tmp_path / "data", "--docs", docs, "--val-docs", 6, "--shard-tokens", 3)
    for split in ("train", "val"):
        assert len(list((tmp_path / "data").glob(f"fineweb_{split}_0*"))) > 20
    with files_at_most(10):
        assert verified(capsys, tmp_path / "data")[0] == 0


def test_a_corrupted_byte_in_any_file_is_found(dataset, capsys):
    rng = random.Random(0)
    paths = sorted(dataset.iterdir())
    assert len(paths) > 8 and "manifest.json" in {path.name for path in paths}
    for path in paths:
        content = path.read_bytes()
        for position in [0, len(content) - 1, *rng.sample(range(len(content)), 3)]:
            damaged = bytearray(content)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            status, output = verified(capsys, dataset, "--samples", 1)
            assert status == 1 and path.name in output, (path.name, position)
        path.write_bytes(content)
    assert verified(capsys, dataset)[0] == 0


def test_a_missing_and_a_foreign_file_are_found(dataset, capsys):
    (dataset / "fineweb_train_000001.bin").rename(dataset / "fineweb_train_000099.bin")
    output = verified(capsys, dataset)[1]
    assert "000001.bin: in the manifest" in output and "000099.bin: in the folder" in output


def test_a_planted_leak_is_found_and_named(dataset, capsys):
    """Also without a manifest, where the leaked document lies across two shards."""
    (dataset / "manifest.json").unlink()
    val, train = stream(dataset, "val")[0], stream(dataset, "train")[0]
    starts = np.flatnonzero(val == 1)
    leak = val[starts[4] : starts[5]]
    borders = np.flatnonzero(train == 1)
    place = borders[borders < 300][-1]  # of the last document that begins in shards 0 to 2
    assert place + len(leak) > 300
    train = np.concatenate([train[:place], leak, train[place:]])
    for number, start in enumerate(range(0, len(train), 100)):
        write_shard(dataset / f"fineweb_train_{number:06d}.bin", train[start : start + 100])
    status, output = verified(capsys, dataset)
    in_shard = int((train[200:place] == 1).sum())
    number = int((train[:place] == 1).sum())
    assert status == 1 and output.count("leak:") == 1
    assert (
        f"000002.bin, document {in_shard} of it ({number} of training): validation document 4\n"
        in output
    )


def write_split(folder, split, documents):
    """Documents, lists of ids without BOS, as one shard."""
    ids = [token for document in documents for token in [1, *document]]
    write_shard(folder / f"fineweb_{split}_000000.bin", np.array(ids, np.uint16))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_leak_of_any_validation_document_is_found(tmp_path, number):
    val = [[300, 301], [302], [303, 304, 305]]
    write_split(tmp_path, "val", val)
    write_split(tmp_path, "train", [[400], val[number], [401, 402]])
    count, leaks = verifier.find_leaks(tmp_path)
    assert count == 3 and len(leaks) == 1
    assert leaks[0].endswith(f"document 1 of it (1 of training): validation document {number}")


def test_what_is_no_whole_validation_document_is_no_leak(tmp_path):
    """Neither an empty one, nor its beginning, its end, or one that holds it."""
    write_split(tmp_path, "val", [[300, 301, 302], [], [303]])
    write_split(tmp_path, "train", [[], [300, 301], [301, 302], [300, 301, 302, 303], []])
    assert verifier.find_leaks(tmp_path) == (5, [])


@pytest.mark.parametrize(
    ("position_of", "charge", "message"),
    [
        (1, 1, "BOS is charged"),
        (4, 2, "a case marker is charged"),
        ("literal", 2, "escaped marker is charged less"),
    ],
)
def test_a_side_car_that_breaks_a_rule_is_found(dataset, capsys, position_of, charge, message):
    (dataset / "manifest.json").unlink()
    tokens, costs = stream(dataset, "val")[0], stream(dataset, "val_bytes")[0].copy()
    position = (
        np.flatnonzero(tokens == 7)[0] + 1
        if position_of == "literal"
        else np.flatnonzero(tokens == position_of)[0]
    )
    costs[position] = charge
    for number, start in enumerate(range(0, len(costs), 100)):
        write_shard(dataset / f"fineweb_val_bytes_{number:06d}.bin", costs[start : start + 100])
    status, output = verified(capsys, dataset, "--samples", 1)
    assert status == 1 and message in output


def test_another_source_and_another_tokenizer_are_found(dataset, capsys, tmp_path):
    other = write_docs(tmp_path / "other.jsonl", [*TEXTS[:5], "Something else", *TEXTS[6:]])
    status, output = verified(capsys, dataset, "--docs", other)
    assert status == 1 and "validation document 5 is not the one of the source" in output
    short = write_docs(tmp_path / "short.jsonl", TEXTS[:4])
    assert (
        "6 validation documents, the source has 4" in verified(capsys, dataset, "--docs", short)[1]
    )


def test_documents_that_do_not_survive_normalization_are_those_of_their_source(tmp_path, capsys):
    """Decoded, they encode to other tokens: verify called them broken beside their own source."""
    texts = ["\ufdfa \u338f \ufb01 \u2167 \u0130 " * number for number in range(1, 11)]
    docs = write_docs(tmp_path / "docs.jsonl", texts)
    build(tmp_path / "data", "--docs", docs, "--val-docs", 9)
    status, output = verified(capsys, tmp_path / "data", "--docs", docs)
    assert (status, output.splitlines()[-1]) == (0, "verified")


def test_shuffled_tokens_do_not_pass_as_documents(dataset, capsys):
    (dataset / "manifest.json").unlink()
    for path in sorted(dataset.glob("fineweb_val_0*")):
        values = np.array(read_shard(path))
        values[values > 264] = 264 + (values[values > 264] * 7) % 7_000
        write_shard(path, values)
    assert "do not encode to what they were" in verified(capsys, dataset)[1]


@pytest.mark.parametrize("token", [0, 2, 3])
def test_ids_that_are_no_text_are_found(dataset, capsys, token):
    path = dataset / "fineweb_train_000001.bin"
    values = read_shard(path).copy()
    values[[40, 70]] = token
    write_shard(path, values)
    status, told = verified(capsys, dataset)
    assert status == 1
    assert f"{path.name}: <pad>, </s> or <unk> (ids 0, 2, 3) occur 2 times, first at" in told


def test_counts_that_a_manifest_states_wrongly_are_found(dataset, capsys):
    manifest = read_manifest(dataset)
    manifest["splits"]["val"]["documents"] += 1
    write_manifest(dataset, manifest)
    assert "val: 6 documents, the manifest says 7" in verified(capsys, dataset)[1]


def test_a_manifest_that_was_edited_is_refused(dataset, capsys):
    path = dataset / "manifest.json"
    path.write_text(path.read_text().replace('"leaked_documents": 0', '"leaked_documents": 1'))
    assert "changed after it was written" in verified(capsys, dataset)[1]


def test_many_bytes_are_added_without_overflow():
    assert total(np.full(3, 40_000, dtype=np.uint16)) == 120_000


def test_canonical_counts_are_recognised():
    tokens = np.full(47_853_344, 300, dtype=np.uint16)
    tokens[np.linspace(0, len(tokens) - 3_000, 50_000).astype(int)] = 1
    costs = np.full(len(tokens), 3, dtype=np.uint16)
    costs[tokens == 1] = 0
    missing = 151_074_499 - int(costs[1:47_851_521].sum(dtype=np.int64))
    costs[1 : 1 + missing] += 1
    assert canonical(tokens, costs) == "yes"
    assert canonical(tokens, None) == "no"
    costs[5] += 1
    assert canonical(tokens, costs) == "no"
    assert canonical(tokens[:-1], costs[:-1]) == "no"
