"""Documents in Parquet and Zstandard files: the same shards as from the same JSON lines, and no
damage passes. pyarrow reads both.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import load_script
from data_helpers import TEXTS, build, grown_by, refused

from prepare_caseops_data import DataError, parse_text, read_lines, read_manifest
from tools import prepare_plain_data

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).resolve().parents[1]
train_tokenizer = load_script("tokenizers/train_tokenizer.py")
MANY = [f"{text} number {number}" for number in range(7) for text in TEXTS]
WORDS = "the cat sat on a mat and saw 17 dogs run far away from that old house of wood".split()
PLAIN = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(1, 90)) for i in range(80)]


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstd(content):
    """One frame, with a checksum of its content where the `zstd` command is there to make one."""
    if shutil.which("zstd"):
        return subprocess.run(
            ["zstd", "-qc"], input=content, capture_output=True, check=True
        ).stdout
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def write_table(path, row_group_size=5, **columns):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def write_as(kind, path, texts):
    """Documents as a file of that kind -> its path."""
    path = path.with_suffix(kind)
    if kind == ".parquet":
        return write_table(path, id=list(range(len(texts))), text=texts)
    content = json_lines(texts)
    path.write_bytes(zstd(content) if kind == ".zst" else content)
    return path


def texts_in(path):
    return [parse_text(line) for line in read_lines(path)]


# ---- the same as JSON lines


@pytest.mark.parametrize("kind", [".parquet", ".zst"])
@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_those_of_the_same_json_lines(tmp_path, kind, workers):
    files = {}
    for suffix in (".jsonl", kind):
        docs = write_as(suffix, tmp_path / "docs", MANY)
        arguments = "--docs", docs, "--val-docs", 9, "--workers", workers
        files[suffix] = build(tmp_path / f"out{suffix}", *arguments)
        entry = read_manifest(tmp_path / f"out{suffix}")["sources"][0]
        assert entry["file"] == docs.name
        sha256 = subprocess.run(["sha256sum", docs], capture_output=True, text=True, check=True)
        assert entry["sha256"] == sha256.stdout.split()[0]
        del files[suffix]["manifest.json"]  # it names the source
    assert len(files[kind]) == 3 and files[kind] == files[".jsonl"]


@pytest.mark.parametrize("kind", [".parquet", ".zst"])
def test_validation_may_be_a_file_of_its_own(tmp_path, kind):
    val = write_as(kind, tmp_path / "val", TEXTS)
    train = write_as(kind, tmp_path / "train", MANY)
    build(tmp_path / "out", "--docs", train, "--val-file", val)
    splits = read_manifest(tmp_path / "out")["splits"]
    assert splits["val"]["documents"] == len(TEXTS)
    assert splits["train"]["documents"] + splits["train"]["left_out"] == len(MANY)


@pytest.mark.parametrize("kind", [".parquet", ".zst"])
def test_the_tools_that_share_the_reader_take_these_files(tmp_path, kind):
    made = {}
    for suffix in (".jsonl", kind):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        docs = str(write_as(suffix, folder / "docs", PLAIN))
        val = str(write_as(suffix, folder / "val", PLAIN[:3]))
        plain = ["--val-file", val, "--out", str(folder / "plain"), "--vocab-sizes", "300"]
        assert prepare_plain_data.main([docs, *plain]) == 0
        model = ["--val-docs", "3", "--out", str(folder / "m.model"), "--vocab-size", "300"]
        assert train_tokenizer.main([docs, *model]) == 0
        paths = [folder / "m.model", *sorted((folder / "plain" / "sp300").iterdir())]
        made[suffix] = [path.read_bytes() for path in paths]
    assert len(made[kind]) == 4 and made[kind] == made[".jsonl"]


def test_the_first_bytes_tell_what_a_file_is(tmp_path):
    for kind in (".parquet", ".zst"):
        path = write_as(kind, tmp_path / "docs", TEXTS)
        assert texts_in(path.rename(tmp_path / "docs.jsonl")) == TEXTS


def test_many_kinds_of_files_make_one_corpus(tmp_path):
    kinds = ".parquet", ".jsonl", ".zst"
    parts = [write_as(kind, tmp_path / f"part{kind}", MANY[:12]) for kind in kinds]
    build(tmp_path / "out", "--docs", *parts, "--val-docs", 3)
    splits = read_manifest(tmp_path / "out")["splits"]
    assert splits["train"]["documents"] + splits["train"]["left_out"] == 33


# ---- Zstandard


def test_all_frames_of_a_zstd_file_are_read(tmp_path):
    path = tmp_path / "docs.jsonl.zst"
    skippable = b"\x5a\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"ignored"
    first = zstd(json_lines(TEXTS))
    second = zstd(json_lines(MANY))
    for content in (first + second, skippable + first + skippable + second):
        path.write_bytes(content)
        assert texts_in(path) == TEXTS + MANY


def test_no_damage_of_a_zstd_file_passes_as_its_end(tmp_path):
    path = tmp_path / "docs.jsonl.zst"
    frame = zstd(json_lines(TEXTS))
    damaged = {
        "cut before its end": frame[:-1],
        "cut in the middle": frame[: len(frame) // 2],
        "cut in its header": frame[:6],
        "a second frame cut": frame + frame[:-1],
        "a second frame cut in its magic": frame + frame[:3],
        "letters behind": frame + b"what is this",
        "a wrong byte": frame[:20] + bytes([frame[20] ^ 64]) + frame[21:],
    }
    for kind, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            texts_in(path)
        assert "docs.jsonl.zst" in str(error.value), kind


def test_zstd_comes_through_a_pipe_too(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    content = zstd(json_lines(MANY))
    writer = threading.Thread(target=lambda: path.write_bytes(content))
    writer.start()
    assert texts_in(path) == MANY
    writer.join()


def test_a_full_disk_or_a_lost_file_is_no_damage(tmp_path, monkeypatch):
    """What the system says about a file keeps its words."""
    path = write_as(".zst", tmp_path / "docs", MANY)

    def broken(source, buffer):
        raise OSError(5, "Input/output error", source.name)

    lines = read_lines(path)
    monkeypatch.setattr("prepare_caseops_data.Source.readinto", broken)
    with pytest.raises(OSError, match="Input/output error") as error:
        list(lines)
    assert not isinstance(error.value, DataError)


# ---- Parquet


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": ["a", "b"], "id": [1, 2]}, r"its columns are: content \(string\), id \(int64"),
        ({"text": [1, 2]}, r"no column 'text' of strings; its columns are: text \(int64\)"),
        ({"text": ["a", None]}, "docs.parquet, line 2: the text is NoneType, not a string"),
    ],
)
def test_a_table_without_texts_is_refused(tmp_path, capsys, columns, message):
    docs = write_table(tmp_path / "docs.parquet", **columns)
    error = refused(capsys, "--docs", docs, "--val-docs", 1, "--out", tmp_path / "out")
    assert re.search(message, error)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_both_types_of_strings_are_read(tmp_path, kind):
    assert texts_in(write_table(tmp_path / "a.parquet", text=pyarrow.array(TEXTS, kind))) == TEXTS


def test_no_damage_of_a_parquet_file_passes_as_its_end(tmp_path):
    path = write_table(tmp_path / "docs.parquet", text=MANY)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"PAR1", b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="docs.parquet: damaged"):
            texts_in(path)


def test_text_that_is_no_utf8_is_refused(tmp_path):
    column = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    with pytest.raises(DataError, match="docs.parquet: damaged, behind row 2"):
        texts_in(write_table(tmp_path / "docs.parquet", text=column))


# ---- memory


@pytest.mark.parametrize("kind", [".parquet", ".zst"])
def test_a_long_document_takes_no_more_memory_than_in_json_lines(tmp_path, kind):
    """The bar is that of JSON lines: 40 bytes a byte, and a block of 100 MB or so."""
    size = 4_000_000
    words = random.Random(1).choices(MANY[0].split() + WORDS, k=size // 5)
    long = " ".join(words)[:size]
    docs = write_as(kind, tmp_path / "docs", [long, "a short document", *MANY])
    grown = grown_by("--docs", docs, "--val-docs", 1, "--out", tmp_path / "out", "--workers", 1)
    assert grown < 40 * size + 150_000_000


READ = """
import re, sys
from pathlib import Path
import pyarrow.parquet
from prepare_caseops_data import read_lines

def peak():  # of this program alone, unlike ru_maxrss, which begins with its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

low = peak()
print(sum(1 for line in read_lines(sys.argv[1])), peak() - low)
"""


def test_a_large_row_group_is_read_piece_by_piece(tmp_path):
    """A page is 20 MB here; its 100 MB at once would take 180 to 310 MB."""
    rng = random.Random(1)
    texts = [rng.randbytes(10_000).hex() for _ in range(5_000)]
    docs = write_table(tmp_path / "docs.parquet", row_group_size=len(texts), text=texts)
    command = [sys.executable, "-c", READ, docs]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    count, grown = map(int, run.stdout.split())
    assert count == len(texts)
    assert grown < 130_000_000
