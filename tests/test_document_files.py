"""Files of documents: packed ones are read to their end or refused.

What holds no JSON lines is called by its name.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from data_helpers import TEXTS, refused

import prepare_caseops_data as prepare
from prepare_caseops_data import DataError, parse_text, read_lines

ROOT = Path(__file__).resolve().parents[1]
PARTS = [[f"document {number} of part {part}" for number in range(10)] for part in range(3)]
ALL = [text for part in PARTS for text in part]


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts_in(path):
    return [parse_text(line) for line in read_lines(path)]


# ---- several streams, and what lies between and behind them --------------------------------------


@pytest.mark.parametrize("padding", [0, 4, 8, 1 << 17])
@pytest.mark.parametrize("padded_end", [False, True])
def test_all_streams_of_an_xz_file_are_read(tmp_path, padding, padded_end):
    path = tmp_path / "docs.jsonl.xz"
    streams = [lzma.compress(json_lines(part)) for part in PARTS]
    path.write_bytes((b"\0" * padding).join(streams) + b"\0" * padding * padded_end)
    assert texts_in(path) == ALL
    if shutil.which("xz"):  # the judge of what such a file holds
        unpacked = subprocess.run(["xz", "-dc", path], capture_output=True, check=True).stdout
        assert unpacked == json_lines(ALL)


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_all_members_of_a_gzip_file_are_read(tmp_path, padding):
    path = tmp_path / "docs.jsonl.gz"
    members = [gzip.compress(json_lines(part)) for part in PARTS]
    path.write_bytes((b"\0" * padding).join(members) + b"\0" * padding)
    assert texts_in(path) == ALL


def damaged_streams(compress):
    first, second = compress(json_lines(PARTS[0])), compress(json_lines(PARTS[1]))
    yield "letters behind", first + b"what is this"
    yield "one byte behind", first + b"x"
    yield "bytes behind padding", first + b"\0" * 4 + b"what"
    yield "a second stream cut in its header", first + second[:5]
    yield "a second stream cut in the middle", first + second[: len(second) // 2]
    yield "a second stream cut before its end", first + second[:-1]
    yield "a second stream that begins wrong", first + second[:2] + b"\xff" + second[3:]
    yield (
        "a second stream with a wrong byte",
        first + second[:40] + bytes([second[40] ^ 64]) + second[41:],
    )
    yield "a first stream cut", first[:-1]
    yield "a first stream cut in its header", first[:8]
    yield "text first", b"x" + first


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_no_damage_of_a_packed_file_passes_as_its_end(tmp_path, suffix, compress):
    for kind, content in damaged_streams(compress):
        path = tmp_path / f"docs.jsonl{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            texts_in(path)
        assert path.name in str(error.value), kind


@pytest.mark.parametrize("padding", [1, 2, 3, 5])
def test_padding_that_xz_does_not_allow_is_refused(tmp_path, padding):
    path = tmp_path / "docs.jsonl.xz"
    stream = lzma.compress(json_lines(PARTS[0]))
    for content in (stream + b"\0" * padding, stream + b"\0" * padding + stream):
        path.write_bytes(content)
        with pytest.raises(DataError, match="docs.jsonl.xz: damaged .*zero bytes"):
            texts_in(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst", ".parquet"])
def test_an_empty_packed_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"docs.jsonl{suffix}"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"docs.jsonl{suffix}: empty"):
        texts_in(path)


# ---- the first bytes tell what a file is, not its name -------------------------------------------


@pytest.mark.parametrize(
    "name", ["docs.JSONL.GZ", "docs.jsonl.Xz", "docs.jsonl", "docs.gz", "docs.xz"]
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_any_name_will_do(tmp_path, name, compress):
    path = tmp_path / name
    path.write_bytes(compress(json_lines(ALL)))
    assert texts_in(path) == ALL


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_a_pipe_that_gives_a_few_bytes_at_a_time_is_read(tmp_path, compress):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    content = compress(json_lines(ALL))

    def write():
        with open(path, "wb", buffering=0) as pipe:
            for position in range(0, len(content), 3):
                pipe.write(content[position : position + 3])

    writer = threading.Thread(target=write)
    writer.start()
    assert texts_in(path) == ALL
    writer.join()


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("docs.jsonl", content)
    return file.getvalue()


LINES = json_lines(ALL)
# read with pyarrow, which may be missing (test_arrow_files.py needs it)
PARQUET = b"PAR1" + bytes(100) + b"PAR1"
ZSTD = b"\x28\xb5\x2f\xfd" + bytes(100)
PZSTD = b"\x50\x2a\x4d\x18" + bytes(100)
OTHERS = {
    "bzip2": bz2.compress(LINES),
    "zip": zipped(LINES),
    "lzma": lzma.compress(LINES, lzma.FORMAT_ALONE),
    "tar": b"docs.jsonl".ljust(257, b"\0") + b"ustar" + bytes(300),
    "a JSON array": b"\n [\n" + b",\n".join(LINES.splitlines()) + b"]",
    "HTML or XML": b"<!DOCTYPE html>\n<html>not found</html>\n",
    "UTF-8 with a byte order mark": b"\xef\xbb\xbf" + LINES,
    "UTF-16": LINES.decode().encode("utf-16"),
    "UTF-16, UTF-32 or binary": LINES.decode().encode("utf-16-be"),
    "UTF-32": LINES.decode().encode("utf-32"),
}


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz", "docs.jsonl.xz"])
@pytest.mark.parametrize("kind", OTHERS)
def test_another_format_is_called_by_its_name(tmp_path, capsys, kind, name):
    path = tmp_path / name
    path.write_bytes(OTHERS[kind])
    message = refused(capsys, "--docs", path, "--val-docs", 3, "--out", tmp_path / "out")
    assert f"{name}: this is {kind}" in message and "JSON lines" in message


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("Parquet inside of another archive", PARQUET),
        ("zstd inside of another archive", ZSTD),
        ("zstd inside of another archive", PZSTD),
        ("a JSON array", OTHERS["a JSON array"]),
        ("HTML or XML", OTHERS["HTML or XML"]),
    ],
)
def test_another_format_inside_of_a_packed_file_is_called_by_its_name(
    tmp_path, compress, kind, content
):
    path = tmp_path / "docs.jsonl.packed"
    path.write_bytes(compress(content))
    with pytest.raises(DataError, match=f"docs.jsonl.packed: this is {kind}"):
        texts_in(path)


def test_a_file_packed_twice_is_refused(tmp_path):
    path = tmp_path / "docs.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.compress(LINES)))
    with pytest.raises(DataError, match="this is gzip inside of another archive"):
        texts_in(path)


NO_DOCUMENTS = [b"just text\n" * 9, b"\x07\x80\x99" * 20, b'{"a": 1}\n' * 9, b"text,id\nhello,1\n"]


@pytest.mark.parametrize("content", NO_DOCUMENTS)
def test_a_first_line_that_is_no_document_is_named_before_documents_are_counted(
    tmp_path, capsys, content
):
    """It was "1 documents are fewer than the 50 for validation"."""
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b"\n" + content)
    message = refused(capsys, "--docs", path, "--val-docs", 50, "--out", tmp_path / "out")
    assert "docs.jsonl, line 2: " in message and "fewer" not in message


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LONGEST_LINE", 1000)
    path = tmp_path / "docs.jsonl"
    path.write_bytes(json_lines(["short", "x" * 2000]))
    with pytest.raises(DataError, match="docs.jsonl, line 2: longer than 1,000 bytes"):
        texts_in(path)
    path.write_bytes(json_lines(["short", "x" * (999 - len(json_lines([""])))]) + json_lines(TEXTS))
    assert len(texts_in(path)) == 2 + len(TEXTS)


def test_what_comes_through_a_pipe_is_called_standard_input(tmp_path):
    command = [
        sys.executable,
        "prepare_caseops_data.py",
        "--docs",
        "-",
        "--val-docs",
        "2",
        "--out",
        tmp_path / "out",
    ]
    run = subprocess.run(command, input=OTHERS["tar"], cwd=ROOT, capture_output=True)
    assert run.returncode == 1 and run.stderr.startswith(b"error: standard input: this is tar")
    run = subprocess.run(command, input=PARQUET, cwd=ROOT, capture_output=True)
    message = b"error: standard input: this is Parquet, which cannot be read from a pipe"
    assert run.returncode == 1 and run.stderr.startswith(message)


def test_standard_input_is_refused_where_it_is_closed_or_named_twice(tmp_path, capsys, monkeypatch):
    """The second `-` read nothing, without a word."""
    docs = ["--docs", "-", "--out", tmp_path / "out"]
    for also in (["--val-file", "-"], ["--docs", "-", "-"]):
        assert refused(capsys, *docs, *also) == "error: -: standard input can be read once only\n"
    monkeypatch.setattr(sys, "stdin", None)  # by `<&-`
    assert refused(capsys, *docs).startswith("error: standard input is closed: ")


@pytest.mark.parametrize(("kind", "content"), [("Parquet", PARQUET), ("zstd", ZSTD)])
def test_where_pyarrow_is_missing_the_message_says_what_to_install(
    tmp_path, capsys, monkeypatch, kind, content
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "docs"
    path.write_bytes(content)
    message = refused(capsys, "--docs", path, "--val-docs", 3, "--out", tmp_path / "out")
    assert f"docs: this is {kind}, " in message and message.endswith("pip install pyarrow\n")


def test_other_files_are_read_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "docs.jsonl.gz"
    path.write_bytes(gzip.compress(LINES))
    assert texts_in(path) == ALL
