"""Data preparation where something is missing, empty, wrong on the command line, or ended from
outside.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, load_script
from data_helpers import TEXTS, build, long_corpus, refused, verified, write_docs

import prepare_caseops_data as prepare
from prepare_caseops_data import DEFAULT_TOKENIZER, main, read_manifest, write_shard
from tools import prepare_plain_data

ROOT = Path(__file__).resolve().parents[1]
train_tokenizer = load_script("tokenizers/train_tokenizer.py")
EMPTY = ["", "  ", "\n\n"]


# ---- nothing there -------------------------------------------------------------------------------


def retokenized(folder, out, *arguments):
    """Exit status of the command."""
    tokenizers = ["--old-tokenizer", str(DEFAULT_TOKENIZER), "--tokenizer", str(DEFAULT_TOKENIZER)]
    return main(
        ["retokenize", str(folder), *tokenizers, "--out", str(out), "--workers", "1", *arguments]
    )


def test_retokenizing_a_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    assert retokenized(tmp_path / "NOSUCH", tmp_path / "out") == 1
    assert "NOSUCH: no such folder" in capsys.readouterr().err
    (tmp_path / "bare").mkdir()
    assert retokenized(tmp_path / "bare", tmp_path / "out") == 1
    assert "bare: no shards" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_retokenizing_a_dataset_with_a_missing_shard_is_an_error(tmp_path, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    build(tmp_path / "data", "--docs", docs, "--val-docs", 6, "--shard-tokens", 100)
    for path in (tmp_path / "data").glob("fineweb_train_*"):
        path.unlink()
    assert retokenized(tmp_path / "data", tmp_path / "out") == 1
    assert "fineweb_train_000000.bin is missing" in capsys.readouterr().err


def test_retokenizing_without_the_side_car_is_an_error(tmp_path, capsys):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([1, 300, 301]))
    assert retokenized(tmp_path, tmp_path / "out") == 1
    assert "has 0 values for 3 tokens" in capsys.readouterr().err


def test_verifying_a_folder_that_is_not_there_is_an_error(tmp_path, capsys):
    status, output = verified(capsys, tmp_path / "NOSUCH")
    assert status == 1 and "NOSUCH" in output


@pytest.mark.parametrize(
    ("texts", "arguments", "message"),
    [
        (
            TEXTS[:6],
            ["--val-docs", 6],
            "there are no training documents behind those of validation",
        ),
        ([*TEXTS[:6], *EMPTY], ["--val-docs", 6], "all 3 training documents are empty"),
        ([*EMPTY, *TEXTS], ["--val-docs", 3], "all 3 validation documents are empty"),
        (
            [TEXTS[0], TEXTS[0], TEXTS[0]],
            ["--val-docs", 1],
            "all 2 training documents are validation documents",
        ),
        ([], ["--val-docs", 0], "there are no training documents"),
    ],
)
def test_a_split_without_text_is_an_error(tmp_path, capsys, texts, arguments, message):
    docs = write_docs(tmp_path / "docs.jsonl", texts)
    assert message in refused(capsys, "--docs", docs, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_empty_validation_file_is_an_error(tmp_path, capsys):
    docs, val = write_docs(tmp_path / "docs.jsonl", TEXTS), write_docs(tmp_path / "val.jsonl", [])
    message = refused(capsys, "--docs", docs, "--val-file", val, "--out", tmp_path / "out")
    assert "there are no validation documents" in message


def test_a_split_may_be_empty_where_that_was_asked_for(tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    build(tmp_path / "val", "--docs", docs, "--val-docs", 6, "--train-docs", 0)
    build(tmp_path / "train", "--docs", docs, "--val-docs", 0)
    assert retokenized(tmp_path / "val", tmp_path / "new") == 0
    assert read_manifest(tmp_path / "new")["splits"]["val"]["documents"] == 6


def test_verify_finds_splits_that_hold_empty_documents_only(tmp_path, capsys):
    for split, charges in (("val", True), ("train", False)):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", np.ones(50, np.int64))
        if charges:
            write_shard(tmp_path / f"fineweb_{split}_bytes_000000.bin", np.zeros(50, np.int64))
    status, output = verified(capsys, tmp_path)
    assert status == 1
    assert (
        "validation holds empty documents only" in output
        and "training holds empty documents only" in output
    )
    for name in ("val", "val_bytes"):
        write_shard(tmp_path / f"fineweb_{name}_000000.bin", np.zeros(0, np.int64))
    status, output = verified(capsys, tmp_path)
    assert status == 1 and "validation holds no documents" in output


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        (command, option, value)
        for command, option, values in [
            ("prepare", "--workers", ["0", "-1", "two", "1e3", "99999"]),
            ("prepare", "--shard-tokens", ["0", "-5", "1e14", "100000000000000", "2147483648"]),
            ("prepare", "--val-docs", ["-1", "all", "1.5"]),
            ("prepare", "--train-docs", ["-1", "all"]),
            ("prepare", "--demo-bytes", ["-1"]),
            ("verify", "--workers", ["0", "-1", "two"]),
            ("verify", "--samples", ["-1", "some"]),
            ("retokenize", "--workers", ["0", "two"]),
            ("retokenize", "--shard-tokens", ["0", "-5", "1e14", "100000000000000"]),
        ]
        for value in values
    ],
)
def test_an_argument_that_makes_no_sense_is_refused_by_its_name(
    tmp_path, capsys, command, option, value
):
    common = {
        "prepare": ["--docs", "nowhere.jsonl", "--out", str(tmp_path / "out")],
        "verify": ["verify", str(tmp_path)],
        "retokenize": [
            "retokenize",
            str(tmp_path),
            "--old-tokenizer",
            "a",
            "--tokenizer",
            "b",
            "--out",
            "c",
        ],
    }[command]
    with pytest.raises(SystemExit) as ended:
        main([*common, f"{option}={value}"])
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"argument {option}: {value} is not a whole number" in message


# ---- ended from outside --------------------------------------------------------------------------


def start(docs, out, workers="2", **options):
    command = [
        sys.executable,
        "prepare_caseops_data.py",
        "--docs",
        docs,
        "--out",
        str(out),
        "--val-docs",
        "40",
    ]
    command += ["--shard-tokens", "20000", "--workers", workers]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes, **options)


def dataset_of(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def long_docs(tmp_path_factory):
    """A file of documents, and the files of its dataset."""
    folder = tmp_path_factory.mktemp("long")
    docs = long_corpus(folder / "docs.jsonl", 20_000)
    return docs, build(folder / "whole", "--docs", docs, "--val-docs", 40, "--shard-tokens", 20_000)


@pytest.mark.parametrize("moment", ["split: ", "fineweb_train_000001.bin: "])
def test_control_c_ends_in_one_line_and_the_command_goes_on_when_repeated(
    long_docs, tmp_path, moment
):
    """At the first moment the workers start, at the second they work.

    On a terminal all of them get the signal.
    """
    docs, expected = long_docs
    run = start(docs, tmp_path / "out")
    for line in run.stdout:
        if line.startswith(moment):
            break
    while not (tmp_path / "out" / prepare.PROGRESS).exists():
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130
    assert errors.splitlines() == [
        "error: interrupted",
        f"{tmp_path / 'out'} keeps the finished files: repeat the command to go on from there",
    ]
    repeated = start(docs, tmp_path / "out")
    output, errors = repeated.communicate(timeout=PATIENCE)
    assert repeated.returncode == 0, errors
    assert ("going on behind" in output) == moment.startswith("fineweb")
    assert dataset_of(tmp_path / "out") == expected


def test_a_second_control_c_does_not_leave_the_run_waiting_for_its_workers(long_docs, tmp_path):
    docs, _ = long_docs
    run = start(docs, tmp_path / "out")
    for line in run.stdout:
        if line.startswith("fineweb_train_000001.bin: "):
            break
    os.killpg(run.pid, signal.SIGINT)
    time.sleep(0.02)  # as long as a nervous finger takes, and less than the workers' last batch
    os.killpg(run.pid, signal.SIGINT)
    try:
        _, errors = run.communicate(timeout=PATIENCE)
    finally:
        run.kill()
    assert run.returncode == 130
    assert errors.startswith("error: interrupted\n") and "Traceback" not in errors


def test_two_runs_do_not_write_into_one_folder(long_docs, tmp_path, capsys):
    docs, expected = long_docs
    out = tmp_path / "out"
    run = start(docs, out)
    while not (out / prepare.PROGRESS).exists():
        time.sleep(0.01)
    other = write_docs(tmp_path / "other.jsonl", TEXTS)
    message = refused(capsys, "--docs", other, "--val-docs", 6, "--out", out)
    assert message.startswith(f"error: {out} is in use by another run: ")
    _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, errors
    assert dataset_of(out) == expected


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_worker(pid):
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_killed_worker_ends_in_one_line_and_the_command_goes_on_when_repeated(
    long_docs, tmp_path
):
    docs, expected = long_docs
    run = start(docs, tmp_path / "out")
    for line in run.stdout:
        if line.startswith("fineweb_train_000001.bin: "):
            break
    os.kill(next(pid for pid in children(run.pid) if is_worker(pid)), signal.SIGKILL)
    _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 1
    assert errors.splitlines() == [
        "error: a worker process was killed, perhaps for want of memory: try fewer --workers",
        f"{tmp_path / 'out'} keeps the finished files: repeat the command to go on from there",
    ]
    assert start(docs, tmp_path / "out").wait(timeout=PATIENCE) == 0
    assert dataset_of(tmp_path / "out") == expected


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_run_that_is_killed(long_docs, tmp_path, end):
    docs, _ = long_docs
    run = start(docs, tmp_path / "out")
    for line in run.stdout:
        if line.startswith("fineweb_train_000001.bin: "):
            break
    workers = [pid for pid in children(run.pid) if is_worker(pid)]
    assert workers
    run.send_signal(end)
    run.communicate(timeout=PATIENCE)  # until the last process has closed its pipes
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists() and is_worker(pid)]


def test_a_full_disk_is_named_and_the_command_goes_on_when_repeated(long_docs, tmp_path):
    """No file may grow over a size: it takes the shards, and the state of the run only until
    training is in it.
    """
    docs, expected = long_docs
    limit = (
        max(len(content) for name, content in expected.items() if name != "manifest.json") - 1000
    )

    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run = start(docs, tmp_path / "out", workers="1", preexec_fn=no_room)
    _, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 1
    error, hint = errors.splitlines()
    assert error.startswith("error: [Errno 27] ") and f"{tmp_path / 'out'}/" in error
    assert "repeat the command" in hint
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert start(docs, tmp_path / "out").wait(timeout=PATIENCE) == 0
    assert dataset_of(tmp_path / "out") == expected


def test_a_run_does_not_go_on_over_files_that_are_gone_or_a_damaged_state(
    long_docs, tmp_path, capsys
):
    docs, _ = long_docs
    out = tmp_path / "out"
    run = start(docs, out)
    for line in run.stdout:
        if line.startswith("fineweb_train_000001.bin: "):
            break
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    command = ["--docs", docs, "--val-docs", 40, "--shard-tokens", 20_000, "--out", out]
    # in the state that was saved before training documents were read
    first = out / "fineweb_val_000000.bin"
    first.unlink()
    assert f"{first}: missing or changed" in refused(capsys, *command)
    write_shard(first, np.array([1, 300]))
    assert f"{first}: missing or changed" in refused(capsys, *command)
    (out / prepare.PROGRESS).write_bytes(b"no state")
    assert f"{out / prepare.PROGRESS}: damaged" in refused(capsys, *command)


def test_a_file_that_cannot_be_read_to_its_end_is_named(tmp_path, capsys, monkeypatch):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)

    class BadDisk:
        def readinto(self, buffer):
            raise OSError(5, "Input/output error")

    make_source = prepare.Source.__init__

    def on_bad_disk(source, path):
        make_source(source, path)
        source.file = BadDisk()

    monkeypatch.setattr(prepare.Source, "__init__", on_bad_disk)
    message = refused(capsys, "--docs", docs, "--val-docs", 3, "--out", tmp_path / "out")
    assert "Input/output error" in message and "docs.jsonl" in message


def test_too_little_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def no_memory(*arguments):
        raise MemoryError

    monkeypatch.setattr(prepare, "build_dataset", no_memory)
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    assert "out of memory" in refused(
        capsys, "--docs", docs, "--val-docs", 3, "--out", tmp_path / "out"
    )


def test_control_c_is_one_line_in_every_command(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.verify_data.verify", interrupted)
    monkeypatch.setattr("tools.retokenize.check_lengths", interrupted)
    monkeypatch.setattr(prepare_plain_data, "validation_texts", interrupted)
    monkeypatch.setattr(train_tokenizer, "read_lines", interrupted)
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([1, 300]))
    for command in (
        lambda: main(["verify", str(tmp_path)]),
        lambda: retokenized(tmp_path, tmp_path / "out"),
        lambda: prepare_plain_data.main(["a", "--val-file", "b", "--out", str(tmp_path / "plain")]),
        lambda: train_tokenizer.main(["a", "--val-file", "b", "--out", str(tmp_path / "a.model")]),
    ):
        assert command() == 130
        assert capsys.readouterr().err == "error: interrupted\n"
