"""benchmarks/gpu_queue.py: order, needs, room on a GPU, the end of the time, continuing."""

import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE
from run_helpers import ROOT

from benchmarks import gpu_queue
from prepare_caseops_data import DEFAULT_TOKENIZER, read_manifest
from presets import published
from tools.guard import RunGuard
from tools.run_files import settings_of

PLANS = sorted((ROOT / "benchmarks" / "plans").glob("*.jsonl"))


def write_plan(tmp_path, *jobs):
    path = tmp_path / "plan.jsonl"
    path.write_text("".join(json.dumps(job) + "\n\n" for job in jobs))
    return path


def run(tmp_path, *jobs, gpus=(0, 1), workers=2, seconds=60.0):
    """(exit code, {name: record}) of a plan."""
    state = tmp_path / "state"
    arguments = [str(write_plan(tmp_path, *jobs)), "--state", str(state), "--gpus"]
    arguments += [*map(str, gpus), "--workers", str(workers), "--seconds", str(seconds)]
    code = gpu_queue.main(arguments)
    records = gpu_queue.whole_lines(state / "progress.jsonl")
    return code, {record["name"]: record for _, record in records}


def job(name, command="true", **more):
    return {"name": name, "run": command} | more


def test_jobs_run_after_what_they_need_and_on_the_gpu_that_they_are_given(tmp_path):
    code, records = run(
        tmp_path,
        job("late", "cat {state}/early.log; echo $CUDA_VISIBLE_DEVICES", needs=["early"], gpu=1),
        job("early", "sleep 0.3; echo done", gpu=0),
    )
    assert code == 0 and list(records) == ["early", "late"]
    assert (tmp_path / "state" / "late.log").read_text().split() == ["done", "1"]
    assert records["late"]["gpu"] == 1 and records["early"]["seconds"] >= 0.3


def test_a_failed_job_is_told_and_what_needs_it_is_skipped(tmp_path):
    jobs = [job("bad", "echo why; exit 3"), job("after", needs=["bad"]), job("other")]
    code, records = run(tmp_path, *jobs)
    assert code == 1
    assert {name: record["code"] for name, record in records.items()} == {
        "bad": 3,
        "after": -1,
        "other": 0,
    }
    assert (tmp_path / "state" / "bad.log").read_text() == "why\n"
    # continued, only what has not succeeded runs
    jobs[0] = job("bad", "true")
    jobs[2] = job("other", "exit 1")
    code, records = run(tmp_path, *jobs)
    assert code == 0 and [records[name]["code"] for name in ("bad", "after", "other")] == [0, 0, 0]


@pytest.mark.parametrize("alone, together", [(False, 2), (True, 1)])
def test_a_gpu_has_so_many_jobs_at_a_time_and_one_if_it_is_to_be_alone(tmp_path, alone, together):
    """Each job notes how many run with it."""
    command = (
        "mkdir -p {state}/now; touch {state}/now/$$; sleep 0.5; ls {state}/now | wc -l; sleep 0.5;"
        " rm {state}/now/$$"
    )
    jobs = [job(f"j{i}", command, alone=alone) for i in range(4)]
    run(tmp_path, *jobs, gpus=(0,))
    counts = [int((tmp_path / "state" / f"j{i}.log").read_text()) for i in range(4)]
    assert max(counts) == together


def test_a_job_that_wants_to_be_alone_is_not_kept_waiting_by_those_after_it(tmp_path):
    jobs = [job("first", "sleep 0.6"), job("quiet", "true", alone=True)]
    jobs += [job(f"small{i}", "sleep 0.5") for i in range(6)]
    _, records = run(tmp_path, *jobs, gpus=(0,))
    assert list(records)[:2] == ["first", "quiet"]


def test_the_end_of_the_time_stops_jobs_with_all_that_they_started(tmp_path):
    started = time.time()
    code, records = run(
        tmp_path,
        job("long", "(sleep 3; touch {state}/alive) & wait"),
        job("never", needs=["long"]),
        seconds=1.0,
    )
    assert code == 1 and time.time() - started < 3 and records["long"]["code"] != 0
    assert "never" not in records
    time.sleep(3)
    assert not (tmp_path / "state" / "alive").exists()


def test_a_queue_goes_on_after_a_kill_in_the_middle_of_a_line(tmp_path):
    run(tmp_path, job("a", "echo once"))
    progress = tmp_path / "state" / "progress.jsonl"
    progress.write_text(progress.read_text() + '{"name": "b", "gp')
    code, records = run(tmp_path, job("a", "exit 1"), job("b"))
    assert code == 0 and list(records) == ["a", "b"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_queue_that_is_ended_takes_its_jobs_with_it(tmp_path, number):
    state = tmp_path / "state"
    command = "touch {state}/begun; (sleep 3; touch {state}/alive) & wait"
    plan = write_plan(tmp_path, job("long", command), job("never", needs=["long"]))
    queue = subprocess.Popen(
        [sys.executable, gpu_queue.__file__, str(plan), "--state", str(state)],
        stdout=subprocess.DEVNULL,
    )
    while not (state / "begun").exists():
        assert queue.poll() is None
        time.sleep(0.05)
    queue.send_signal(number)
    assert queue.wait(PATIENCE) not in (0, 1)
    time.sleep(3.5)
    assert not (state / "alive").exists()
    (record,) = map(json.loads, (state / "progress.jsonl").read_text().splitlines())
    assert record["name"] == "long" and record["code"] != 0


def test_jobs_that_no_gpu_could_take_are_named(tmp_path, capsys):
    code, _ = run(tmp_path, job("a"), job("b", gpu=5), job("c", needs=["b"]))
    assert code == 1 and "not started: b, c" in capsys.readouterr().err


@pytest.mark.parametrize(
    "jobs, words",
    [
        ([job("a"), job("a")], "two jobs are called a"),
        ([job("a", needs=["b"])], "a needs b, not in it"),
        ([{"name": "a"}], "line 1"),
        ([job("a", colour=1)], "line 1"),
        ([job("a/b")], "line 1"),
        ([job("a", 5)], "line 1"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_a_job_runs(tmp_path, capsys, jobs, words):
    arguments = [str(write_plan(tmp_path, *jobs)), "--state", str(tmp_path / "state")]
    assert gpu_queue.main(arguments) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "state").exists()


def test_a_state_folder_is_one_word_for_bash(tmp_path):
    """`rm -rf {state}/runs/NAME` must not remove another folder."""
    (tmp_path / "a").mkdir()
    state = tmp_path / "a $(touch b); c's"
    command = "rm -rf {state}/old; echo {state}"
    plan = write_plan(tmp_path, job("one", command))
    assert gpu_queue.main([str(plan), "--state", str(state)]) == 0
    assert (state / "one.log").read_text() == f"{state}\n" and (tmp_path / "a").exists()


def test_a_job_may_change_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = write_plan(tmp_path, job("one", "cd /; touch {state}/here"))
    assert gpu_queue.main([str(plan), "--state", "state"]) == 0
    assert (tmp_path / "state" / "here").exists()


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_the_plans_of_this_repository_have_settings_that_exist(path):
    jobs = gpu_queue.read_plan(path)
    trainings = "(train_gpt|published|bench_average)\\.py"
    runs = [job for job in jobs if re.search(trainings, job.run)]
    assert runs
    for job in jobs:
        for arm in re.findall(r'"([^"]*)"', job.run):  # of bench_ttt.py
            published.Hyperparameters.from_env(settings_of(arm.split()), RunGuard())
    for job in runs:
        settings = dict(re.findall(r"\b([A-Z_0-9]+)=(\S+)", job.run))
        hp = published.Hyperparameters.from_env(settings, RunGuard())
        assert hp.run_id == job.name and hp.data_seed == 1


def make_plan_data(*arguments):
    """Sources data.sh in bash as its head says, then prints $WIDE_DATA."""
    command = f". benchmarks/plans/data.sh {' '.join(map(str, arguments))} && echo $WIDE_DATA"
    python = Path(sys.executable).parent
    return subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{python}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )


def test_a_plan_does_not_begin_without_its_data(tmp_path):
    done = make_plan_data(tmp_path / "missing", DEFAULT_TOKENIZER, tmp_path / "out")
    assert done.returncode != 0 and "own: see" in done.stdout


def test_the_data_of_the_plan_are_made_once(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, count in {"val": 1310, "train": 3}.items():
        with lzma.open(docs / f"docs_{name}.jsonl.xz", "wt") as file:
            for number in range(count):
                file.write(json.dumps({"text": f"Number {number} of {name}, a text."}) + "\n")
    out = tmp_path / "out"

    def make():
        done = make_plan_data(docs, DEFAULT_TOKENIZER, out, DEFAULT_TOKENIZER)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}/wide\n", "")
        return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/manifest.json")}

    made = make()
    assert made.keys() == {"proxy", "own", "second", "wide"}
    assert read_manifest(out / "second")["splits"]["val"]["documents"] == 500
    assert make() == made
