"""run_3seeds.sh: seeds in tmux windows or in the background, their folders, exit codes, and what is
refused.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import faults
import pytest
from conftest import PATIENCE

import train_gpt
from tools import guard, launch
from tools.run_files import read_preset

ROOT = Path(__file__).resolve().parents[1]
HERE = conftest.HERE | {key: os.environ[key] for key in ("TERM",) if key in os.environ}
VENV = Path(sys.executable).parents[1]
WAYS = [
    pytest.param("0", id="background"),
    pytest.param(
        "1", id="tmux", marks=pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
    ),
]
# stands in for train_gpt.py: writes what a run leaves, fails for seed 13, sleeps for seed 99
STUB = """
import json, os, sys, time
from pathlib import Path
seed, folder = int(os.environ["SEED"]), Path(os.environ["RUNS_DIR"], os.environ["RUN_ID"])
if os.environ.get("RANK", "0") != "0":
    sys.exit()
(folder / "seen.json").write_text(json.dumps(dict(os.environ) | {"tty": sys.stdout.isatty()}))
print("printed", flush=True)
if seed == 13:
    raise ValueError("thirteen is not liked")
log = open(folder / "log.txt", "w")
print("settings (* changed):\\n* SEED=1  # seed", file=log, flush=True)
if seed == 99:
    time.sleep(600)
scores = {"ttt": {"bpb": 1 + seed / 100, "loss": 2.0 + seed, "tokens": 10, "bytes": 40}}
result = {"version": 2, "seed": seed, "run": folder.name, "scores": scores, "seconds": {}, "total_bytes": 15_000_000,
          "violations": []}
(folder / "result.json").write_text(json.dumps(result))
print("RESULT " + json.dumps(result), file=log)
"""


@pytest.fixture
def run(tmp_path):
    """run(words, NAME=value, ...) -> the finished run_3seeds.sh.

    Sets that still run are stopped at the end.
    """
    (tmp_path / "stub.py").write_text(STUB)
    environ = HERE | {
        "VENV": str(VENV),
        "SCRIPT": str(tmp_path / "stub.py"),
        "RUNS_DIR": str(tmp_path / "runs"),
        "DEVICE": "cpu",
        "USE_TMUX": "0",
        "PLOTS": "0",
    }

    def call(*words, **variables):
        return subprocess.run(
            [ROOT / "run_3seeds.sh", *words],
            env=environ | variables,
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=PATIENCE,
        )

    yield call
    for path in tmp_path.glob("runs/*/launch.json"):
        call("stop", str(path.parent))


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def codes(folder):
    return {path.parent.name: path.read_text() for path in folder.glob("*/exit_code")}


# ---- seeds side by side, one after another, under torchrun


@pytest.mark.parametrize("tmux", WAYS)
def test_seeds_have_folders_and_exit_codes_and_a_failure_is_told(run, tmp_path, tmux):
    started = run(SEEDS="1 13 2", GPUS="cpu cpu", RUN_ID="mine", USE_TMUX=tmux)
    assert started.returncode == 0, started.stderr
    assert "seed(s) 1 2 on cpu0" in started.stdout and "seed(s) 13 on cpu1" in started.stdout
    ended = run("wait")
    assert ended.returncode == 1 and "not done: seed 13 (failed: 1)" in ended.stderr
    assert "ValueError: thirteen is not liked" in ended.stdout
    folder = tmp_path / "runs" / "mine"
    assert codes(folder) == {"mine-seed1": "0", "mine-seed13": "1", "mine-seed2": "0"}
    seen = {
        seed: json.loads((folder / f"mine-seed{seed}" / "seen.json").read_text())
        for seed in (1, 13, 2)
    }
    for seed, environ in seen.items():
        assert (environ["SEED"], environ["RUN_ID"], environ["RUNS_DIR"]) == (
            str(seed),
            f"mine-seed{seed}",
            str(folder),
        )
        # the launcher draws
        assert set(launch.OURS) & set(environ) == {"PLOTS"} and environ["PLOTS"] == "0"
        assert environ["tty"] == (tmux == "1")
        assert (folder / f"mine-seed{seed}" / "stdout.txt").exists() == (tmux == "0")
    table = [
        line.split() for line in ended.stdout.splitlines() if line.startswith("scores.ttt.bpb")
    ]
    assert table == [["scores.ttt.bpb", "1.01000", "1.02000", "1.01500", "0.00707"]]
    assert "thirteen is not liked" in (folder / "mine-seed13" / "stderr.txt").read_text()


def test_a_lost_window_stops_no_lane_and_no_command(tmp_path):
    """/dev/full is a window that takes nothing; seed 13 fails, which is told on standard error."""
    (tmp_path / "stub.py").write_text(STUB)
    about = {"lanes": {"all": {"seeds": [13, 1], "env": {}}}, "plots": False, "tmux": None}
    about["command"] = [sys.executable, str(tmp_path / "stub.py")]
    (tmp_path / "launch.json").write_text(json.dumps(about))
    tool = [sys.executable, str(ROOT / "tools" / "launch.py")]
    with open("/dev/full", "wb") as full:
        subprocess.run(
            [*tool, "worker", str(tmp_path), "all"],
            env=HERE,
            stdout=full,
            stderr=full,
            timeout=PATIENCE,
        )
        assert sorted(codes(tmp_path).values()) == ["0", "1"]
        assert (
            subprocess.run([*tool, "--help"], env=HERE, stdout=full, timeout=PATIENCE).returncode
            == 0
        )


def test_seeds_in_turn_under_torchrun_and_summary_ends_with_0(run, tmp_path):
    assert run(SEEDS="5", NPROC="2", RUN_ID="two").returncode == 0
    ended = run("wait")
    assert ended.returncode == 0, ended.stderr
    seen = json.loads((tmp_path / "runs/two/two-seed5/seen.json").read_text())
    assert seen["WORLD_SIZE"] == "2" and seen["SEED"] == "5"


def test_three_seeds_by_itself_and_names_that_the_trainer_takes():
    plan = launch.make_plan({})
    assert plan.seeds == [42, 0, 1234] and plan.lanes == {
        "all": {"seeds": [42, 0, 1234], "env": {}}
    }
    for seed in plan.seeds:
        train_gpt.Hyperparameters(run_id=launch.run_folder(plan.folder, seed).name)


def test_each_gpu_is_one_process_and_more_seeds_wait():
    plan = launch.make_plan({"SEEDS": "1 2 3", "GPUS": "4 6"})
    assert plan.nproc == 1
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # that of nvidia-smi
    assert plan.lanes == {
        "gpu4": {"seeds": [1, 3], "env": {"CUDA_VISIBLE_DEVICES": "4"} | order},
        "gpu6": {"seeds": [2], "env": {"CUDA_VISIBLE_DEVICES": "6"} | order},
    }


def test_extra_env_wins_over_the_environment_and_that_over_the_preset():
    environ = {
        "PRESET": "demo",
        "MODEL_DIM": "64",
        "MLP_MULT": "2",
        "EXTRA_ENV": "MLP_MULT=4 NAME='a b'",
    }
    plan = launch.make_plan(environ)
    assert read_preset("demo")["MODEL_DIM"] != "64"
    chosen = {name: plan.environ[name] for name in ("MODEL_DIM", "MLP_MULT", "NAME")}
    assert chosen == {"MODEL_DIM": "64", "MLP_MULT": "4", "NAME": "a b"}
    assert plan.environ["NUM_HEADS"] == read_preset("demo")["NUM_HEADS"]


# ---- watching and stopping


@pytest.mark.parametrize("tmux", WAYS)
def test_stop_ends_its_own_set_and_nothing_else(run, tmp_path, tmux):
    for name in ("one", "other"):
        assert run(SEEDS="99 1", NPROC="1", RUN_ID=name, USE_TMUX=tmux).returncode == 0
    folders = {name: tmp_path / "runs" / name for name in ("one", "other")}
    until(lambda: all((f / f"{n}-seed99" / "log.txt").exists() for n, f in folders.items()))
    assert "running" in run("status", "one").stdout
    assert run("summary", "one").returncode == 1  # not ended
    stopped = run("stop", "one")
    assert (
        stopped.returncode == 0
        and "stopped: 143" in stopped.stdout
        and "not started" in stopped.stdout
    )
    assert codes(folders["one"]) == {"one-seed99": "143"}
    assert launch.worker_pid(folders["one"], "all") is None
    assert launch.worker_pid(folders["other"], "all") is not None
    assert [state for _, _, state in launch.read_states(folders["other"])] == ["running", "waiting"]
    if tmux == "1":
        sockets = [json.loads((f / "launch.json").read_text())["tmux"] for f in folders.values()]
        alive = [
            subprocess.run(["tmux", "-L", s, "has-session"], capture_output=True).returncode == 0
            for s in sockets
        ]
        assert alive == [False, True]


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_a_long_name_has_a_tmux_server(run, tmp_path):
    name = 150 * "x"
    done = run(SEEDS="1", GPUS="cpu", RUN_ID=name, USE_TMUX="1")
    assert done.returncode == 0, done.stderr
    assert run("wait", name).returncode == 0


@pytest.mark.parametrize("fails", ["new-session", "new-window"])
def test_a_tmux_that_does_not_start_leaves_nothing_behind(run, tmp_path, fails):
    """The stand-in for tmux starts nothing, and fails at the first window or at the second."""
    (tmp_path / "bin").mkdir()
    script = f"#!/bin/sh\ncase \"$*\" in *{fails}*) echo 'no sockets' >&2; exit 1;; esac\n"
    (tmp_path / "bin" / "tmux").write_text(script)
    (tmp_path / "bin" / "tmux").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{HERE['PATH']}"
    done = run(SEEDS="1 2", GPUS="cpu cpu", RUN_ID="mine", USE_TMUX="1", PATH=path)
    assert done.returncode == 1
    assert (
        done.stderr
        == "run_3seeds.sh: tmux does not start a window: no sockets; USE_TMUX=0 does without\n"
    )
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", '{"scores": {"ttt"', "[]", '{"scores": {}}', '{"scores": {"a": {"bpb": null}}}']
)
def test_a_damaged_result_does_not_hide_the_other_seeds(tmp_path, capsys, text):
    launch.write_atomically(
        tmp_path / "launch.json",
        json.dumps(
            {
                "lanes": {"all": {"seeds": [1, 2], "env": {}}},
                "seeds": [1, 2],
                "tmux": None,
                "plots": False,
            }
        ),
    )
    for seed in (1, 2):
        run = launch.run_folder(tmp_path, seed)
        run.mkdir()
        (run / "exit_code").write_text("0")
        scores = {"scores": {"ttt": {"bpb": 1.25}}, "total_bytes": 5, "violations": []}
        (run / "result.json").write_text(text if seed == 1 else json.dumps(scores))
    assert launch.main(["status", str(tmp_path)], {}) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert (
        first.endswith("result.json is damaged; the log has what was printed")
        and "ttt 1.25000" in second
    )


def test_an_interrupt_of_wait_is_one_line_and_the_runs_go_on(run, tmp_path):
    assert run(SEEDS="99", GPUS="cpu", RUN_ID="mine").returncode == 0
    environ = HERE | {"VENV": str(VENV), "RUNS_DIR": str(tmp_path / "runs")}
    with subprocess.Popen(
        [ROOT / "run_3seeds.sh", "wait"], env=environ, stderr=subprocess.PIPE, text=True
    ) as waiting:
        until(lambda: b"launch.py" in Path(f"/proc/{waiting.pid}/cmdline").read_bytes())
        time.sleep(2)
        waiting.send_signal(signal.SIGINT)
        assert (
            waiting.communicate(timeout=60)[1]
            == "run_3seeds.sh: interrupted; what was started goes on\n"
        )
    assert waiting.returncode == 130
    assert launch.worker_pid(tmp_path / "runs" / "mine", "cpu0") is not None


def test_a_python_that_is_too_old_is_named(run, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    done = run("status", VENV=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"run_3seeds.sh: {tmp_path}/bin/python is no Python of version 3.11 or later"
    )


def test_attach_follows_the_logs_where_there_is_no_tmux(run, tmp_path):
    assert run(SEEDS="99", GPUS="cpu", RUN_ID="mine").returncode == 0
    until(lambda: (tmp_path / "runs/mine/mine-seed99/log.txt").exists())
    environ = HERE | {"VENV": str(VENV), "RUNS_DIR": str(tmp_path / "runs")}
    with subprocess.Popen(
        [ROOT / "run_3seeds.sh", "attach"], env=environ, stdout=subprocess.PIPE, text=True
    ) as shown:
        assert any("SEED=1" in shown.stdout.readline() for _ in range(10))
        shown.kill()
    run("stop")
    nothing = run("attach")
    assert nothing.returncode == 1 and "nothing of" in nothing.stderr


def test_a_worker_that_was_killed_is_lost_and_a_number_used_again_is_not_mistaken(run, tmp_path):
    assert run(SEEDS="99", GPUS="cpu", RUN_ID="mine").returncode == 0
    folder = tmp_path / "runs" / "mine"
    until(lambda: (folder / "mine-seed99" / "log.txt").exists())
    worker = launch.worker_pid(folder, "cpu0")
    child = int(Path(f"/proc/{worker}/task/{worker}/children").read_text())
    os.kill(worker, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    until(lambda: launch.worker_pid(folder, "cpu0") is None)
    assert [state for *_, state in launch.read_states(folder)] == ["lost"]
    assert run("summary").returncode == 1
    (folder / "cpu0.pid").write_text(f"{os.getpid()} 1")
    assert launch.worker_pid(folder, "cpu0") is None


def test_commands_without_a_set_or_with_a_wrong_name_are_refused(run):
    for words in (("status",), ("summary", "nothing"), ("begin",), ("stop", "a", "b")):
        done = run(*words)
        assert done.returncode == 2 and done.stderr.startswith("run_3seeds.sh: "), words


# ---- what is refused before anything starts


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"SEEDS": "1 1"}, "none twice"),
        ({"SEEDS": "1 01"}, "none twice"),
        ({"SEEDS": " "}, "one seed at least"),
        ({"SEEDS": "a"}, "whole numbers"),
        ({"NPROC": "0"}, "1 or more"),
        ({"NPROC": "two"}, "1 or more"),
        ({"GPUS": "0 0"}, "none twice"),
        ({"GPUS": "0", "NPROC": "8"}, "goes without GPUS"),
        ({"EXTRA_ENV": "fast"}, "NAME=value"),
        ({"EXTRA_ENV": 'A="x'}, 'EXTRA_ENV=A="x: No closing quotation'),
        ({"EXTRA_ENV": "A=x\\"}, "No escaped character"),
        ({"RUN_ID": 300 * "x"}, "too long"),
        ({"RUN_ID": 100 * "\u00e9"}, "209 bytes with the seed"),
        ({"SEEDS": 300 * "1"}, "too long"),
        ({"PRESET": "nothing"}, "there are: "),
        ({"RUN_ID": "../x"}, "RUN_ID"),
    ],
)
def test_what_cannot_be_meant_is_refused(variables, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch.main(["start"], variables) == 2
    assert words in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_folder_is_told_in_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(RUNS_DIR=str(tmp_path / "file"), GPUS="cpu", RUN_ID="mine")
    assert (
        done.returncode == 1
        and done.stderr.startswith("run_3seeds.sh: ")
        and done.stderr.count("\n") == 1
    )
    assert str(tmp_path / "file") in done.stderr


@pytest.mark.parametrize(
    "body, words",
    [
        ("import sys\nsys.exit(3)", "it ends with exit code 3 when it is imported"),
        ("import sys\nsys.exit(0)", "it ends with exit code 0 when it is imported"),
        ("import os\nos.kill(os.getpid(), 9)", "it was ended by SIGKILL"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import os\nos.write(2, b'bad \\xff byte')\nos._exit(1)", "bad \ufffd byte"),
    ],
)
def test_a_script_that_ends_when_it_is_checked_is_a_problem_with_a_name(run, tmp_path, body, words):
    (tmp_path / "odd.py").write_text(f"{body}\ndef check_all(hp, dist): pass\n")
    done = run(SCRIPT=str(tmp_path / "odd.py"), GPUS="cpu")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"  - odd.py cannot be checked: {words}"
    assert not (tmp_path / "runs").exists()


def test_what_a_script_prints_is_not_taken_for_the_answer(tmp_path):
    body = "import atexit\nprint('{}')\natexit.register(print, '{}')\n"
    (tmp_path / "loud.py").write_text(
        f"{body}class DataError(ValueError): pass\n"
        "OUR_ERRORS = (DataError,)\n"
        "def check_all(hp, dist, guard): raise DataError('no data')\n"
        "def find_guard(): pass\n"
        "class Hyperparameters:\n    device = None\n"
        "    from_env = classmethod(lambda c, guard: c)\n"
        "class Dist:\n    def __init__(self, device): pass\n"
    )
    plan = launch.make_plan(HERE | {"SCRIPT": str(tmp_path / "loud.py"), "GPUS": "cpu"})
    assert launch.checked_elsewhere(plan, False)["problems"] == ["no data"]


# ---- names with blanks, quotes and brackets; links


def test_names_with_blanks_quotes_and_brackets_work_and_printed_commands_can_be_pasted(
    run, tmp_path
):
    folder = tmp_path / "my 'odd' [1] folder"
    folder.mkdir()
    (folder / "a stub.py").write_text(STUB)
    started = run(
        SEEDS="1", GPUS="cpu", RUN_ID="mine", SCRIPT=str(folder / "a stub.py"), RUNS_DIR=str(folder)
    )
    assert started.returncode == 0, started.stderr
    commands = {
        line.split()[1]: line
        for line in started.stdout.splitlines()
        if "run_3seeds.sh" in line.split()[0] and line.startswith("  ")
    }
    environ = HERE | {"VENV": str(VENV)}
    done = subprocess.run(
        commands["wait"],
        shell=True,
        env=environ,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=90,
    )
    assert done.returncode == 0 and "seed 1: done" in done.stdout, done.stderr
    # the newest set of such a folder is found
    assert run("status", RUNS_DIR=str(folder)).returncode == 0
    subprocess.run(
        commands["stop"], shell=True, env=environ, cwd=tmp_path, timeout=90, capture_output=True
    )


def test_it_is_found_through_a_symbolic_link(tmp_path):
    (tmp_path / "seeds").symlink_to(ROOT / "run_3seeds.sh")
    done = subprocess.run(
        [tmp_path / "seeds", "--help"],
        env=HERE | {"VENV": str(VENV)},
        cwd=tmp_path,
        timeout=90,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("Starts the seeds")


def test_a_venv_without_python_is_refused(run, tmp_path):
    done = run(VENV=str(tmp_path))
    assert done.returncode == 2 and "has no bin/python" in done.stderr


def test_every_problem_is_named_before_the_start(run, tmp_path):
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    wrong = {"RUN_ID": "taken", "DATA_PATH": "/nowhere"}
    done = run(**faults.SETTINGS | wrong, SCRIPT=str(ROOT / "train_gpt.py"), GPUS="cpu")
    assert done.returncode == 1 and "nothing was started" in done.stderr
    words = [
        "choose another RUN_ID",
        "no fineweb_val_*.bin in /nowhere",
        "no fineweb_train",
    ]
    assert [word for word in words if word not in done.stderr] == []
    assert os.listdir(tmp_path / "runs" / "taken") == []


def test_a_name_that_is_taken_is_told_once(tmp_path):
    faults.make_data(tmp_path / "data")
    folder = tmp_path / "runs" / "set" / "set-seed42"
    folder.mkdir(parents=True)
    (folder / "model.pt").write_bytes(b"")  # of a finished training, of which a run would tell
    with pytest.raises(launch.LaunchError) as error:
        preflight_of(tmp_path)
    assert str(error.value).splitlines()[1:] == [
        f"  - {tmp_path / 'runs' / 'set'} exists: choose another RUN_ID"
    ]


def preflight_of(tmp_path, **variables):
    plan = launch.make_plan(
        HERE
        | faults.SETTINGS
        | {
            "DATA_PATH": str(tmp_path / "data"),
            "RUNS_DIR": str(tmp_path / "runs"),
            "GPUS": "cpu",
            "RUN_ID": "set",
        }
        | variables
    )
    return launch.preflight(plan)


def test_the_launcher_tells_what_a_run_would_tell(tmp_path):
    """The problems are those of train_gpt.py's own report, line by line."""
    faults.make_data(tmp_path / "data")
    (tmp_path / "data" / "fineweb_train_000000.bin").unlink()
    wrong = {"ATTENTION_BACKEND": "fa3", "MAX_WALLCLOCK_SECONDS": "9", "GPTQ_RESERVE_SECONDS": "0"}
    environ = (
        faults.SETTINGS
        | wrong
        | {
            "DATA_PATH": str(tmp_path / "data"),
            "RUNS_DIR": str(tmp_path / "runs"),
        }
    )
    with pytest.raises(train_gpt.SettingError) as told:
        train_gpt.run(
            train_gpt.Hyperparameters.from_env(environ), train_gpt.Dist("cpu"), guard.RunGuard()
        )
    with pytest.raises(launch.LaunchError) as error:
        preflight_of(tmp_path, **wrong)
    assert [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]] == str(
        told.value
    ).splitlines()
    assert len(str(told.value).splitlines()) == 2 and not (tmp_path / "runs").exists()


def test_what_will_do_is_described_and_room_is_wanted_for_all_runs(tmp_path, monkeypatch):
    faults.make_data(tmp_path / "data")
    monkeypatch.setattr(
        launch.shutil, "disk_usage", lambda place: SimpleNamespace(free=140_000_000)
    )
    _, (data, machine) = preflight_of(tmp_path, SEEDS="1 2")
    assert "training tokens, 6 validation documents" in data and "trial_packing" in machine
    with pytest.raises(launch.LaunchError, match="0.1 GB free, 3 runs want 0.2 GB"):
        preflight_of(tmp_path)


@pytest.mark.parametrize(
    "gpus, visible, messages",
    [
        ("0", None, []),
        ("1", None, ["GPU 1 is in use: 70,000 MiB"]),
        ("0 7", None, ["GPU 7 does not exist"]),
        ("GPU-b", None, ["GPU GPU-b is in use"]),
        ("", None, ["GPU 1 is in use"]),
        ("", "0", []),
    ],
)
def test_a_gpu_that_is_in_use_or_missing_is_found(tmp_path, monkeypatch, gpus, visible, messages):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho '0, GPU-a, 3'\necho '1, GPU-b, 70000'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environ = {"GPUS": gpus} | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    found = list(launch.gpus_in_use(launch.make_plan(environ)))
    assert len(found) == len(messages) and all(
        want in got for want, got in zip(messages, found, strict=True)
    )


def test_a_full_disk_is_found(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(
        launch.shutil, "disk_usage", lambda place: SimpleNamespace(free=1_400_000_000)
    )
    environ = HERE | {
        "SCRIPT": str(tmp_path / "stub.py"),
        "RUNS_DIR": str(tmp_path / "runs"),
        "GPUS": "cpu",
    }
    launch.preflight(launch.make_plan(environ | {"SEEDS": "1 2"}))
    with pytest.raises(launch.LaunchError, match="1.4 GB free, 3 runs want 1.5 GB"):
        launch.preflight(launch.make_plan(environ))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "MODULES", ("numpy", "no_such_module"))
    assert launch.check_script(tmp_path, False)["problems"] == [
        "not installed: no_such_module (docs/INSTALL.md)"
    ]
