"""The live line: a bar on a terminal that later lines replace, the same log file whether there is a
terminal or not.
"""

import inspect
import io
import os
import pty
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import PATIENCE, Lines, tiny_hp
from evaluation_helpers import ACTIVE, make_validation, run_ttt
from training_helpers import quiet, trainer_of

import train_gpt
from tools import guard


def screen_of(text):
    """What a terminal shows after this text: carriage return, erase to the end of the line, new
    line.
    """
    lines, column = [""], 0
    for part in re.findall(r"\r|\n|\x1b\[K|[^\r\n\x1b]+", text):
        if part == "\n":
            lines.append("")
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif part != "\r":
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
        column = 0 if part in "\r\n" else column + len(part) * (part[0] != "\x1b")
    return lines


# start, live at 0, 0.25 after 10 s, 0.5 too soon, the inner stage, 0.75 after 30 s, end
MOMENTS = [100.0, 100.0, 110.0, 110.1, 112.0, 112.0, 114.0, 115.0, 130.0, 140.0]


def run_stages(folder, stream, rank=0):
    """Two stages with a live line and a line of the log in each, at MOMENTS -> the log file."""
    dist, clock, watching = (
        SimpleNamespace(rank=rank, synchronize=lambda: None),
        iter(MOMENTS),
        guard.RunGuard(),
    )
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((100, 24)))
        log = train_gpt.RunLog(folder, dist, watching)
        # where nothing is shown, the live line does not look at the clock more than once
        if not watching.line:
            watching.show = lambda share, detail="": next(clock)
        patch.setattr(train_gpt.time, "perf_counter", lambda: next(clock))
        log("settings")
        with log.stage("train"):
            watching.show(0.25, "step:1 " + "x" * 300)
            watching.show(0.5, "too soon after the last one")
            log("step:1")
            with log.stage("eval_training"):
                watching.show(0.5, "inside")
            watching.show(0.75, "outside again")
    stream.flush()
    return (folder / "log.txt").read_text() if rank == 0 else None


@pytest.fixture
def terminal():
    """(a stream that is a terminal, read() -> all that came out on it)."""
    ours, theirs = pty.openpty()

    def read():
        print("END", file=stream, flush=True)
        text = ""
        while not text.endswith("END\r\n"):  # what was written may arrive in pieces
            text += os.read(ours, 100_000).decode()
        return text.removesuffix("END\r\n").replace("\r\n", "\n")

    with os.fdopen(theirs, "w") as stream:
        yield stream, read
    os.close(ours)


def test_a_terminal_shows_the_bar_and_ends_with_the_lines_of_the_log(terminal, tmp_path):
    stream, read = terminal
    kept, shown = run_stages(tmp_path / "run", stream), read()
    assert screen_of(shown) == kept.split("\n")
    bars = re.findall(r"\r\x1b\[K(\w+ (?:\[[#.]{30}\]|\.\.\.)[^\r\n]*)", shown)
    assert [re.sub(r"[.#]{30}", "", bar)[:41] for bar in bars] == [
        "train ...",
        "train []  25%  30 s left  step:1 " + "x" * 8,
        "eval_training ...",
        "eval_training []  50%  2 s left  inside",
        "train []  75%  10 s left  outside again",
    ]
    assert bars[1].count("#") == 8 and max(map(len, bars)) == 99


def test_a_pipe_gets_plain_lines_and_the_log_is_the_same(terminal, tmp_path):
    on_terminal = run_stages(tmp_path / "terminal", terminal[0])
    with open(tmp_path / "piped", "w") as stream:
        piped = run_stages(tmp_path / "pipe", stream)
    assert (tmp_path / "piped").read_text() == piped == on_terminal
    assert "stage:eval_training seconds:3.00" in piped and "\x1b" not in piped and "\r" not in piped


def test_other_ranks_show_nothing(terminal, tmp_path):
    stream, read = terminal
    run_stages(tmp_path / "run", stream, rank=1)
    assert read() == ""


def test_a_lost_terminal_takes_nothing_and_the_log_has_every_line(tmp_path):
    """The live line as well: the other end of the terminal is closed while a stage runs."""
    ours, theirs = pty.openpty()
    dist, watching = SimpleNamespace(rank=0, synchronize=lambda: None), guard.RunGuard()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(theirs, "w") as stream:
        patch.setattr(sys, "stdout", train_gpt.LossyStream(stream))
        log = train_gpt.RunLog(tmp_path, dist, watching)
        assert watching.line
        with log.stage("train"):
            log("before")
            os.close(ours)
            watching.show(0.5, "nobody sees this")
            log("after")
        print("no newline and no flush", end="")
    assert re.fullmatch(
        r"before\nafter\nstage:train seconds:.*\n", (tmp_path / "log.txt").read_text()
    )


def test_a_terminal_without_a_character_of_a_path_drops_that_line(tmp_path):
    """As a terminal of Latin-1, or PYTHONIOENCODING=ascii, has no letter of another alphabet."""
    shown = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        stream = io.TextIOWrapper(shown, "latin-1", write_through=True)
        patch.setattr(sys, "stdout", train_gpt.LossyStream(stream))
        log = train_gpt.RunLog(tmp_path, SimpleNamespace(rank=0))
        log("DATA_PATH=/da\u0142")
        log("step:1")
    assert shown.getvalue().split() == [b"step:1"]
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert text == "DATA_PATH=/da\u0142\nstep:1\n"


@pytest.mark.parametrize("redirection", ["> /dev/full 2>&1", ">&- 2>&- <&-", "| true"])
def test_a_lost_terminal_changes_no_exit_code(redirection, tmp_path):
    """No file gets the number of a closed stream, and nothing is left to fail when the
    interpreter ends.
    """
    parts = map(inspect.getsource, (train_gpt.LossyStream, train_gpt.survive_lost_terminals))
    code = (
        "import contextlib, os, sys, time\n"
        + "".join(parts)
        + """
survive_lost_terminals()
time.sleep(0.2)
for stream in (sys.stdout, sys.stderr):
    print("x" * 100_000, file=stream)
    print("a line", file=stream, flush=True)
    print("not flushed", file=stream, end="")
assert os.open(os.devnull, os.O_RDONLY) > 2
sys.exit(7)
"""
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    command = f'"$0" "$1" {redirection}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", command, sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 7 and "Error" not in done.stderr


def test_training_and_test_time_training_tell_how_far_they_are(tiny_data, tmp_path):
    log = Lines()
    trainer_of(tiny_data, log=log, iterations=4).train(quiet)
    assert [share for share, _ in log.shares] == [0.0, 0.25, 0.5, 0.75]
    assert all(
        re.fullmatch(r"step:\d+ train_loss:\d+\.\d{4} tokens_per_s:\d+", detail)
        for _, detail in log.shares
    )
    log, hp = Lines(), tiny_hp(data_path=str(tmp_path), ttt_lanes=2, ttt_batch_size=2, **ACTIVE)
    run_ttt(hp, make_validation(tmp_path, hp), log=log)
    shares = [share for share, _ in log.shares]
    assert (
        shares == sorted(shares) and len(set(shares)) > 3 and (shares[0], shares[-1]) == (0.0, 1.0)
    )
