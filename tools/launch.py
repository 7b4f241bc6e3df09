"""Starts the seeds of one set of settings, watches them, stops them, sums them up.

usage: ./run_3seeds.sh [start | status | attach | stop | wait | summary] [SET]

    start    checks everything first, then starts the runs detached and returns
    status   a line for each seed: state, exit code, last line of its log
    attach   the running seeds' windows (tmux; leave with C-b d), or the ends of their logs
    stop     ends what this set still runs, nothing else
    wait     returns when all seeds have ended, then does what summary does
    summary  table with mean and standard deviation, pictures; exit code 1 unless all seeds ended

SET is a set's name or folder; without it RUN_ID, or else the newest set in RUNS_DIR. `start` reads
the environment:

    SEEDS="42 0 1234"    seeds, each once
    GPUS="0 1 2"         one process per GPU, further seeds wait; "cpu cpu" is two on the CPU
    NPROC=8              without GPUS: seeds in turn, each on so many processes (default: all GPUs)
    SCRIPT=...           another script than train_gpt.py, a packed one for example
    PRESET=name          settings from presets/name.env; what the environment sets already wins
    EXTRA_ENV="A=1 B=2"  settings that win over both
    VENV=...             environment whose bin/python runs everything (default: .venv, else python3)
    RUN_ID=...           name of the set (default: seeds-<time>); its runs are
                         <RUNS_DIR>/<RUN_ID>/<RUN_ID>-seed<SEED>/
    USE_TMUX=0           plain background processes; the default where tmux is not installed
    PLOTS=0              no pictures, neither after a run nor in the summary

Every other setting goes to the script as it is. A tmux server of the set's own holds one window for
each process that runs side by side, so that no other session is ever touched. Files of a set:
launch.json; <lane>.pid and, without tmux, <lane>.txt (what the launcher itself had to say). Of a
run, besides the script's own: exit_code (128 + n after signal n), stderr.txt and, without tmux,
stdout.txt.
"""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.run_files import PRESETS, PresetError, script_of, settings_of, with_preset  # noqa: E402

# never handed on
OURS = ("SEEDS", "GPUS", "NPROC", "SCRIPT", "EXTRA_ENV", "VENV", "USE_TMUX", "PLOTS")
DISK_BYTES_A_RUN = 500_000_000  # a checkpoint of 144 MB, an artifact of 16 MB, compilation caches
GPU_IDLE_MIB = 1024  # a driver keeps some memory of an idle GPU
LONGEST_NAME = 200  # bytes of a run's folder; file systems take 255, some with encryption fewer
STOP_SECONDS = 45  # torchrun takes 30 s to give up on its processes
# before the answer of check-script, as the script may print as well
CHECKED = "run_3seeds.sh checked: "
# without which train_gpt.py cannot be imported; it names all others itself
MODULES = ("numpy", "torch")


class LaunchError(Exception):
    """Something the user must change; `code` 2 for what was typed, 1 for what the machine lacks."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def say(*words, file=None):
    """Prints for somebody who may have gone.

    A window that is closed or a full disk behind it ends nothing.
    """
    file = file or sys.stdout
    try:
        print(*words, file=file, flush=True)
    # the stream keeps what it could not write: nowhere is where it can go, now and at exit
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class Plan(NamedTuple):
    """What `start` is to do, from the environment."""

    folder: Path  # of the set
    seeds: list[int]
    # name -> {"seeds": [...], "env": {...}}; lanes run side by side, a lane's seeds in turn
    lanes: dict[str, dict]
    nproc: int
    script: Path
    environ: dict[str, str]  # of every run, but for what its lane and seed add
    use_tmux: bool


# ---- the environment -> a plan


def make_plan(environ):
    """The environment -> Plan. LaunchError for what cannot be meant."""
    seeds = environ.get("SEEDS", "42 0 1234").split()
    if (
        not seeds
        or not all(seed.isdecimal() for seed in seeds)
        or len(set(map(int, seeds))) < len(seeds)
    ):
        raise LaunchError(
            f"SEEDS='{environ.get('SEEDS')}': must name one seed at least, whole numbers, none"
            " twice"
        )
    seeds = [int(seed) for seed in seeds]
    try:
        extra = shlex.split(environ.get("EXTRA_ENV", ""))
    except ValueError as error:  # a quotation mark without its other half
        raise LaunchError(f"EXTRA_ENV={environ['EXTRA_ENV']}: {error}") from None
    if not all(re.match(r"[A-Za-z_]\w*=", word) for word in extra):
        raise LaunchError(
            f"EXTRA_ENV='{environ['EXTRA_ENV']}': must be NAME=value, separated by blanks"
        )
    try:
        settings = with_preset(environ) | settings_of(extra)
    except PresetError as error:
        raise LaunchError(str(error)) from None
    name = environ.get("RUN_ID") or time.strftime("seeds-%Y%m%d-%H%M%S")
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise LaunchError(f"RUN_ID={name}: letters, digits, '_', then also '.', '+', '-'")
    longest = max((os.fsencode(run_folder(Path(name), seed).name) for seed in seeds), key=len)
    if len(longest) > LONGEST_NAME:
        raise LaunchError(
            f"RUN_ID={name}: too long: {len(longest)} bytes with the seed, {LONGEST_NAME} at most"
        )
    script = Path(environ.get("SCRIPT") or script_of(settings)).absolute()
    nproc, lanes = read_lanes(environ, seeds)
    return Plan(
        Path(settings.get("RUNS_DIR", "runs")).absolute() / name,
        seeds,
        lanes,
        nproc,
        script,
        {key: value for key, value in settings.items() if key not in (*OURS, "RUN_ID", "SEED")}
        | {"PLOTS": "0"},  # the launcher draws
        environ.get("USE_TMUX", "1") != "0" and shutil.which("tmux") is not None,
    )


def read_lanes(environ, seeds):
    """GPUS or NPROC -> (processes of a run, lanes).

    NPROC is 0 where the number of GPUs is to decide.
    """
    nproc, gpus = environ.get("NPROC", ""), environ.get("GPUS", "").split()
    if not gpus:
        if not re.fullmatch(r"([1-9]\d*)?", nproc):
            raise LaunchError(f"NPROC={nproc}: must be a number of processes, 1 or more")
        return int(nproc or 0), {"all": {"seeds": seeds, "env": {}}}
    devices = [gpu for gpu in gpus if gpu != "cpu"]
    if nproc not in ("", "1") or len(set(devices)) < len(devices):
        raise LaunchError(
            "GPUS names one GPU for each process, none twice; NPROC goes without GPUS"
        )
    lanes = {}
    for number, gpu in enumerate(gpus[: len(seeds)]):
        env = (
            {"DEVICE": "cpu"}
            if gpu == "cpu"
            else {"CUDA_VISIBLE_DEVICES": gpu, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        )
        lanes[f"cpu{number}" if gpu == "cpu" else f"gpu{gpu}"] = {
            "seeds": seeds[number :: len(gpus)],
            "env": env,
        }
    return 1, lanes


# ---- checks before anything starts


def check_script(script, count_gpus):
    """Checks the script in a process of its own, with the first run's environment.

    -> {"problems", "notes", "gpus", "disk_bytes"}.

    A train_gpt.py of ours makes the checks itself that it makes before training; for a packed one
    this checkout's does.
    """
    about = {"problems": [], "notes": [], "gpus": 0, "disk_bytes": DISK_BYTES_A_RUN}
    if missing := [name for name in MODULES if importlib.util.find_spec(name) is None]:
        about["problems"].append(f"not installed: {' '.join(missing)} (docs/INSTALL.md)")
        return about
    sys.path.insert(0, str(ROOT))
    if (module := checked_module(script)) is None:
        about["notes"].append(
            f"{script.name} is not a script of this repository: settings and data are not checked"
        )
    else:
        try:
            guard = module.find_guard()
            hp = module.Hyperparameters.from_env(guard=guard)
            prepared = module.check_all(hp, module.Dist(hp.device), guard)
            validation, loader = prepared.validation, prepared.loader
            tokens = "" if hp.ttt_eval_only else f"{loader.stream.size:,} training tokens, "
            about["notes"].append(
                f"data: {tokens}{len(validation.starts):,} validation documents of "
                f"{int(validation.bytes.sum()):,} bytes in {hp.data_path}"
            )
            about["notes"] += [line for line in prepared.machine.splitlines() if line]
            from tools.guard import wanted_bytes  # it imports the script: after that was loaded

            about["disk_bytes"] = wanted_bytes(prepared.model, hp)
        except (*module.OUR_ERRORS, OSError) as error:
            about["problems"] += str(error).splitlines()
    if count_gpus:
        import torch

        about["gpus"] = torch.cuda.device_count()
    return about


def checked_module(script):
    """The script as a module where it makes checks, for a packed one this checkout's.

    None for one of other making.
    """
    source = script.read_bytes()
    if b"def check_all(" in source:
        return import_file(script)
    if script.resolve() == PRESETS / "published.py":
        module = import_file(ROOT / "train_gpt.py")
        from presets import published

        published.install()
        return module
    from tools.pack_code import is_packed  # needs packages that train_gpt.py can do without

    return import_file(ROOT / "train_gpt.py") if is_packed(source) else None


def import_file(path):
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    # dataclasses and the guard look there
    module = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checked_elsewhere(plan, count_gpus):
    """check_script in a process with the environment of the first run.

    LaunchError where it says nothing of use.
    """
    command = [sys.executable, __file__, "check-script", str(plan.script), str(int(count_gpus))]
    lane = next(iter(plan.lanes.values()))
    environ = plan.environ | lane["env"] | run_environ(plan.folder, plan.seeds[0])
    done = subprocess.run(command, env=environ, capture_output=True, text=True, errors="replace")
    answers = [
        line.removeprefix(CHECKED) for line in done.stdout.splitlines() if line.startswith(CHECKED)
    ]
    if done.returncode == 0 and answers:
        return json.loads(answers[-1])
    if done.stderr.strip():
        why = done.stderr.strip().splitlines()[-1]
    elif done.returncode < 0:
        why = f"it was ended by {signal.Signals(-done.returncode).name}"
    else:
        why = f"it ends with exit code {done.returncode} when it is imported"
    raise LaunchError(f"{plan.script.name} cannot be checked: {why}")


def gpus_in_use(plan):
    """Messages for GPUs of the plan that do not exist or that are in use.

    nvidia-smi says which another program uses.
    """
    if shutil.which("nvidia-smi") is None or plan.environ.get("DEVICE") == "cpu":
        return
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    rows = [
        [part.strip() for part in line.split(",")]
        for line in done.stdout.splitlines()
        if line.count(",") == 2
    ]
    used = {
        name: int(mib) for index, uuid, mib in rows for name in (index, uuid) if mib.isdecimal()
    }
    wanted = [
        env["CUDA_VISIBLE_DEVICES"]
        for lane in plan.lanes.values()
        if "CUDA_VISIBLE_DEVICES" in (env := lane["env"])
    ]
    if "all" in plan.lanes:
        visible = plan.environ.get("CUDA_VISIBLE_DEVICES")
        wanted = (visible.split(",") if visible else [row[0] for row in rows])[: plan.nproc or None]
    for gpu in wanted:
        if gpu not in used:
            yield (
                f"GPU {gpu} does not exist: nvidia-smi lists"
                f" {', '.join(row[0] for row in rows) or 'none'}"
            )
        elif used[gpu] > GPU_IDLE_MIB:
            yield (
                f"GPU {gpu} is in use: {used[gpu]:,} MiB are taken (nvidia-smi names the programs)"
            )


def preflight(plan):
    """What can be known before a start -> (number of GPUs, notes).

    LaunchError names all problems at once.
    """
    problems, about = [], {"gpus": 0, "notes": [], "disk_bytes": DISK_BYTES_A_RUN}
    if plan.folder.exists():
        problems.append(f"{plan.folder} exists: choose another RUN_ID")
    if not plan.script.is_file():
        problems.append(f"SCRIPT={plan.script} does not exist")
    else:
        on_all = "all" in plan.lanes and plan.environ.get("DEVICE") != "cpu"
        try:
            about = checked_elsewhere(plan, on_all)
            taken = plan.folder.exists()  # what a run would say of its folder in there helps nobody
            problems += [
                line
                for line in about["problems"]
                if not (taken and line.startswith(str(plan.folder)))
            ]
        except LaunchError as error:
            problems.append(str(error))
    if (
        "all" in plan.lanes
        and about["gpus"]
        and plan.nproc > about["gpus"]
        and plan.environ.get("DEVICE") != "cpu"
    ):
        problems.append(f"NPROC={plan.nproc}, but torch sees {about['gpus']} GPU(s)")
    problems += gpus_in_use(plan)
    place = next(p for p in plan.folder.parents if p.exists())
    free, wanted = shutil.disk_usage(place).free, about["disk_bytes"] * len(plan.seeds)
    # for one run the script has said it
    if free < wanted and not any("GB free" in problem for problem in problems):
        problems.append(
            f"{place} has {free / 1e9:.1f} GB free, {len(plan.seeds)} runs want"
            f" {wanted / 1e9:.1f} GB"
        )
    if problems:
        raise LaunchError(
            "nothing was started:\n" + "\n".join(f"  - {problem}" for problem in problems), code=1
        )
    return about["gpus"], about["notes"]


# ---- start


def write_atomically(path, text):
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def start(environ):
    """Checks, then starts one detached worker for each lane."""
    plan = make_plan(environ)
    gpus, notes = preflight(plan)
    nproc = plan.nproc or (1 if plan.environ.get("DEVICE") == "cpu" else max(1, gpus))
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        if nproc > 1
        else []
    )
    try:
        plan.folder.mkdir(parents=True)  # of two launchers with one name, one ends here
    except FileExistsError:
        raise LaunchError(f"{plan.folder} exists: choose another RUN_ID", code=1) from None
    # a socket's whole path has 107 bytes at most
    name = re.sub(r"[^A-Za-z0-9_-]", "_", plan.folder.name)[:30]
    socket = f"golf-{name}-{os.getpid()}" if plan.use_tmux else None
    launch = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seeds": plan.seeds,
        "lanes": plan.lanes,
    }
    launch |= {"command": [sys.executable, *torchrun, str(plan.script)], "tmux": socket}
    launch["plots"] = environ.get("PLOTS", "1") != "0"
    write_atomically(plan.folder / "launch.json", json.dumps(launch, indent=1))
    try:
        for lane in plan.lanes:
            start_worker(plan, lane, socket)
    except BaseException:  # an interrupt as well
        undo_start(plan.folder, socket)
        raise
    deadline = time.monotonic() + 30
    while not all((plan.folder / f"{lane}.pid").exists() for lane in plan.lanes):
        if time.monotonic() > deadline:
            raise LaunchError(f"a worker did not start: see {plan.folder}", code=1)
        time.sleep(0.05)
    for note in notes:
        say(f"run_3seeds.sh: {note}")
    for lane, about in plan.lanes.items():
        where = f"{nproc} process(es)" if lane == "all" else lane
        say(f"run_3seeds.sh: seed(s) {' '.join(map(str, about['seeds']))} on {where}")
    say(
        f"run_3seeds.sh: started {plan.folder} in {'tmux windows' if socket else 'the background'};"
        " next:"
    )
    for word in ("status", "attach", "wait", "stop"):
        say(f"  {command_line_of(word, plan.folder)}")
    return 0


def undo_start(folder, socket):
    """Ends what a start that failed has begun.

    Its folder goes, so that the name is free, unless a run is in it.
    """
    end_workers(folder)
    end_tmux(socket)
    if not any(path.is_dir() for path in folder.iterdir()):
        shutil.rmtree(folder)


def command_line_of(word, folder):
    """What to type in this folder for a command about a set, quoted for a shell."""
    script = "./run_3seeds.sh" if Path.cwd() == ROOT else str(ROOT / "run_3seeds.sh")
    return shlex.join([script, word, str(folder)])


def start_worker(plan, lane, socket):
    """A lane's worker, detached.

    In a window of the set's own tmux server, or as the leader of a session of its own.
    """
    worker = [sys.executable, os.path.abspath(__file__), "worker", str(plan.folder), lane]
    if socket is None:
        with open(plan.folder / f"{lane}.txt", "w") as output:
            files = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            subprocess.Popen(worker, env=plan.environ, start_new_session=True, **files)
        return
    # a server of its own has this environment, where one that runs already would hand on its old
    # one
    tmux = ["tmux", "-L", socket, "-f", "/dev/null"]
    if lane == next(iter(plan.lanes)):
        tmux += ["new-session", "-d", "-s", "golf", "-x", "160", "-y", "48", "-n", lane, *worker]
        tmux += [";", "set-option", "-g", "remain-on-exit", "on"]
    else:
        tmux += ["new-window", "-d", "-t", "golf", "-n", lane, *worker]
    done = subprocess.run(tmux, env=plan.environ, capture_output=True, text=True, errors="replace")
    if done.returncode:
        why = done.stderr.strip() or f"exit code {done.returncode}"
        raise LaunchError(f"tmux does not start a window: {why}; USE_TMUX=0 does without", code=1)


# ---- the worker: one lane's seeds in turn


def read_launch(folder):
    return json.loads((folder / "launch.json").read_text())


def run_folder(folder, seed):
    return folder / f"{folder.name}-seed{seed}"


def run_environ(folder, seed):
    """What a seed's run adds to the environment of its set."""
    return {"SEED": str(seed), "RUN_ID": run_folder(folder, seed).name, "RUNS_DIR": str(folder)}


def worker(folder, lane):
    """Runs the seeds of a lane one after another and keeps their exit codes.

    A signal stops the lane, a failure not.
    """
    launch = read_launch(folder)
    child, stopped = None, False

    def stop(number, frame):
        nonlocal stopped
        stopped = True
        if child is not None and child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL if number == signal.SIGALRM else signal.SIGTERM)
            signal.alarm(0 if number == signal.SIGALRM else STOP_SECONDS)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, stop)
    write_atomically(folder / f"{lane}.pid", f"{os.getpid()} {process_start(os.getpid())}")
    for seed in launch["lanes"][lane]["seeds"]:
        if stopped:
            break
        run = run_folder(folder, seed)
        run.mkdir()
        environ = os.environ | launch["lanes"][lane]["env"] | run_environ(folder, seed)
        say(f"\n==== seed {seed} -> {run}")
        # in a tmux window the run's own live line shows, and its log.txt keeps the lines
        output = None if sys.stdout.isatty() else open(run / "stdout.txt", "wb")
        files = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.PIPE}
        child = subprocess.Popen(launch["command"], env=environ, process_group=0, **files)
        if stopped:  # between the look above and the start
            stop(signal.SIGTERM, None)
        with open(run / "stderr.txt", "wb") as errors:
            for line in child.stderr:
                for file in (errors, sys.stderr.buffer):
                    # a window that is closed, or a full disk, stops no lane
                    with contextlib.suppress(OSError):
                        file.write(line)
                        file.flush()
        code = child.wait()
        signal.alarm(0)
        if stopped and code:
            code = 143  # torchrun makes 1 of a signal
        elif code < 0:
            code = 128 - code  # as a shell counts a signal
        write_atomically(run / "exit_code", str(code))
        erase = "\r\x1b[K" if output is None else ""  # of a live line that a crash left behind
        say(f"{erase}==== seed {seed} ended with exit code {code}")
        if launch["plots"] and (run / "result.json").exists():
            draw([run])
    return 0


def draw(paths, python=sys.executable):
    """Draws runs in a process of its own, so that a run does not fail if drawing does."""
    done = subprocess.run(
        [python, str(ROOT / "tools" / "plot_run.py"), *map(str, paths)],
        capture_output=True,
        text=True,
    )
    say(done.stdout if done.returncode == 0 else f"no pictures: {done.stderr.strip()[-300:]}")


# ---- sets that were started


def process_start(pid):
    """When a process started, in ticks since boot; None if it is gone.

    With it a number that is used again is not taken for the same process.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if state == "Z" else fields[18]


def worker_pid(folder, lane):
    """The lane's worker if it is alive, else None."""
    try:
        pid, started = (folder / f"{lane}.pid").read_text().split()
    except OSError:
        return None
    return int(pid) if process_start(pid) == started else None


def find_set(environ, name=None):
    """Name, folder or nothing -> the set's folder. LaunchError if there is none."""
    runs_dir = Path(environ.get("RUNS_DIR", "runs")).absolute()
    name = name or environ.get("RUN_ID")
    if name:
        folder = next(
            (p for p in (runs_dir / name, Path(name).absolute()) if (p / "launch.json").exists()),
            None,
        )
        if folder is None:
            raise LaunchError(
                f"{name} is no set of runs that was started here (RUNS_DIR={runs_dir})"
            )
        return folder
    sets = sorted(runs_dir.glob("*/launch.json"), key=lambda path: path.stat().st_mtime)
    if not sets:
        raise LaunchError(f"no set of runs was started in {runs_dir}")
    return sets[-1].parent


def read_states(folder):
    """Set -> [(seed, lane, state)] in the order of SEEDS.

    States: done, running, waiting, failed, stopped, lost (its worker died), not started.
    """
    launch = read_launch(folder)
    states = {}
    for lane, about in launch["lanes"].items():
        alive = worker_pid(folder, lane) is not None  # asked first: it may end while we look
        for seed in about["seeds"]:
            states[seed] = (seed, lane, state_of(run_folder(folder, seed), alive))
    return [states[seed] for seed in launch["seeds"]]


def state_of(run, alive):
    """The state of a run in a word, with its exit code if it failed or was stopped.

    alive: whether the worker of its lane is.
    """
    try:
        code = int((run / "exit_code").read_text())
    except OSError:  # it has not ended
        if alive:
            return "running" if run.exists() else "waiting"
        return "lost" if run.exists() else "not started"
    words = {128 + number: f"failed: {128 + number}, {number.name}" for number in signal.Signals}
    words |= {0: "done", 3: "failed: 3, the byte cap is broken", 143: "stopped: 143"}
    return words.get(code, f"failed: {code}")


def last_words(run, state):
    """A run's score, or the last line of its errors if it failed, else of its log."""
    if state == "done" and (run / "result.json").exists():
        try:
            result = json.loads((run / "result.json").read_text(encoding="utf-8"))
            scores = " ".join(
                f"{name} {score['bpb']:.5f}" for name, score in result["scores"].items()
            )
            return (
                f"BPB {scores}, {result['total_bytes']:,} bytes, {len(result['violations'])}"
                " violation(s)"
            )
        except (ValueError, LookupError, TypeError, AttributeError):  # torn, or of an older version
            return "result.json is damaged; the log has what was printed"
    for name in (
        ("stderr.txt", "log.txt") if state.startswith("failed") else ("log.txt", "stderr.txt")
    ):
        path = run / name
        if path.exists() and path.stat().st_size:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - 20_000))
                lines = file.read().decode(errors="replace").strip().splitlines()
            said = [
                line
                for line in lines
                if re.match(r"[A-Za-z_][\w.]*(Error|Interrupt)|train_gpt.py cannot", line)
            ]
            if lines:
                return (said or lines)[-1][:110]
    return ""


def status(folder):
    """Prints a line for each seed -> the states, as read_states."""
    states = read_states(folder)
    say(f"{folder}")
    for seed, lane, state in states:
        say(f"  seed {seed:<6} {lane:<6} {state:<20} {last_words(run_folder(folder, seed), state)}")
    return states


def attach(folder):
    """Shows what runs, in place of this process."""
    socket = read_launch(folder)["tmux"]
    if (
        socket
        and subprocess.run(["tmux", "-L", socket, "has-session"], capture_output=True).returncode
        == 0
    ):
        # it is another server's
        environ = {key: value for key, value in os.environ.items() if key != "TMUX"}
        os.execvpe("tmux", ["tmux", "-L", socket, "attach"], environ)
    logs = [
        run_folder(folder, seed) / name
        for seed, _, state in read_states(folder)
        if state == "running"
        for name in ("log.txt", "stderr.txt")
    ]
    if not logs:
        raise LaunchError(f"nothing of {folder} is running", code=1)
    os.execvp("tail", ["tail", "-n", "20", "-F", *map(str, logs)])


def stop(folder):
    """Ends this set's workers, which end their runs; then its own tmux server."""
    end_workers(folder)
    end_tmux(read_launch(folder)["tmux"])
    status(folder)
    return 0


def end_workers(folder):
    """Ends a set's workers and waits for them. LaunchError where one stays."""
    lanes = read_launch(folder)["lanes"]
    for lane in lanes:
        if (pid := worker_pid(folder, lane)) is not None:
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS + 15
    while any(worker_pid(folder, lane) for lane in lanes):
        if time.monotonic() > deadline:
            raise LaunchError(f"{folder}: a worker does not end; see its .pid file", code=1)
        time.sleep(0.1)


def end_tmux(socket):
    """Ends the tmux server of a set, None where it has none."""
    if not socket or not shutil.which("tmux"):
        return
    subprocess.run(["tmux", "-L", socket, "kill-server"], capture_output=True)
    # tmux leaves the name behind
    sockets = Path(os.environ.get("TMUX_TMPDIR", "/tmp"), f"tmux-{os.getuid()}")
    (sockets / socket).unlink(missing_ok=True)


def wait(folder):
    """Returns when no seed runs or waits; says which ended."""
    told = {}
    while True:
        states = read_states(folder)
        for seed, _, state in states:
            if state not in ("running", "waiting") and seed not in told:
                told[seed] = state
                say(f"run_3seeds.sh: seed {seed}: {state}")
        if len(told) == len(states):
            break
        time.sleep(0.5)
    deadline = time.monotonic() + 60
    while any(worker_pid(folder, lane) for lane in read_launch(folder)["lanes"]):
        if time.monotonic() > deadline:  # the last pictures are being drawn
            break
        time.sleep(0.1)
    return summary(folder)


def summary(folder):
    """States, table, pictures. Exit code 1 unless every seed is done."""
    states = status(folder)
    ended = [
        run_folder(folder, seed)
        for seed, _, _ in states
        if (run_folder(folder, seed) / "result.json").exists()
    ]
    if ended:
        say()
        launch = read_launch(folder)
        python = launch["command"][0]  # the runs' own: it has what the tools need
        subprocess.run([python, str(ROOT / "tools" / "summarize.py"), *map(str, ended)])
        if launch["plots"]:
            draw(ended, python)
    unfinished = [f"seed {seed} ({state})" for seed, _, state in states if state != "done"]
    if unfinished:
        say(f"run_3seeds.sh: not done: {', '.join(unfinished)}", file=sys.stderr)
    return 1 if unfinished else 0


def main(arguments, environ):
    command, *rest = arguments or ["start"]
    if command == "worker":
        return worker(Path(rest[0]), rest[1])
    if command == "check-script":
        print(CHECKED + json.dumps(check_script(Path(rest[0]), rest[1] == "1")), flush=True)
        return 0
    if command in ("--help", "-h", "help"):
        say(__doc__)
        return 0
    commands = {"status": status, "attach": attach, "stop": stop, "wait": wait, "summary": summary}
    try:
        if command == "start" and not rest:
            return start(environ)
        if command not in commands or len(rest) > 1:
            raise LaunchError(
                f"{' '.join(arguments)}: must be start, {', '.join(commands)}, then a set (--help)"
            )
        found = commands[command](find_set(environ, *rest))
        return found if isinstance(found, int) else 0
    except LaunchError as error:
        say(f"run_3seeds.sh: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        goes_on = "; what was started goes on" if command == "wait" else ""
        say(f"run_3seeds.sh: interrupted{goes_on}", file=sys.stderr)
        return 130
    # a folder without permission, a name that is too long, a disk that is full
    except OSError as error:
        say(f"run_3seeds.sh: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))
