"""train_gpt.py with a fault in it, as a process: `python tests/faults.py`, told by FAULT="kind
place
rank [step]".

Kinds: kill (SIGKILL), exit, raise, stall (sleeps for ever), freeze (SIGSTOP), hold and hang (keeps
Python's lock, for 20 s or for ever), term and int (the signal, to itself), nan (a loss that is not
finite), full (no room on the disk). Places are functions that a run calls, see PLACES. The time of
the fault is written to the file of that name in the folder FAULT_NOTES. Without FAULT the run is as
it is, but that the code is not packed, which takes seconds and is tested elsewhere.
"""

import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from tiny_run import TINY_RUN  # noqa: E402

from tools.run_files import script_of  # noqa: E402

SETTINGS = TINY_RUN | {
    "MODEL_DIM": "16",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "1",
    "TRAIN_BATCH_TOKENS": "256",
    "ITERATIONS": "8",
    "TRAIN_LOG_EVERY": "1",
    "GPTQ_CALIBRATION_BATCHES": "2",
    "PLOTS": "0",
    "ENABLE_LOOPING_AT": "0.5",
    "TTT_LORA_SITES": "q,head",
    "TTT_CHUNK_SIZE": "32",
    "TTT_LANES": "2",
    "TTT_LORA_RANK": "2",
}
PLACES = {  # name -> object of train_gpt, its function, a stage's line of which the log may speak
    "start": (None, "build_model"),
    "warm_up": ("Trainer", "warm_up"),
    "train": ("Trainer", "train_step"),
    "save": (None, "save_checkpoint"),
    "hessians": (None, "collect_hessians"),
    "quantize": (None, "quantize_weights"),
    "pack": (None, "pack_weights"),
    "unpack": (None, "unpack_weights"),
    "eval": ("Evaluator", "evaluate_bpb"),
    "ttt": ("TestTimeTrainer", "chunk_step"),
    "adapt": ("TestTimeTrainer", "global_adapt"),
}
# after these
REHEARSED = {
    "train": ("Trainer", "warm_up"),
    "pack": (None, "check_all"),
    "unpack": (None, "check_all"),
}
ON_RANK_0_ONLY = ("save", "pack", "unpack")


def note(place):
    if "FAULT_NOTES" in os.environ:
        Path(os.environ["FAULT_NOTES"], "fault").write_text(f"{time.time()} {place}")


def happen(kind):
    if kind in ("kill", "freeze", "term", "int"):
        numbers = {
            "kill": signal.SIGKILL,
            "freeze": signal.SIGSTOP,
            "term": signal.SIGTERM,
            "int": signal.SIGINT,
        }
        os.kill(os.getpid(), numbers[kind])
    elif kind == "exit":
        os._exit(7)
    elif kind == "stall":
        time.sleep(3600)
    elif kind in ("hold", "hang"):
        ctypes.PyDLL(None).sleep(20 if kind == "hold" else 3600)  # a call by PyDLL keeps the lock
    elif kind == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    elif kind == "raise":
        raise RuntimeError("injected")


def inject(train_gpt, kind, place, rank, step=2):
    """Puts the fault into the module: at the place's first call, in training at the step, on
    one rank.
    """
    owner, name = found(train_gpt, PLACES[place])
    function, left = getattr(owner, name), [1]

    def faulty(*arguments, **named):
        due = place != "train" or (
            arguments[1] == step and threading.current_thread() is threading.main_thread()
        )
        armed = place not in REHEARSED or os.environ.get("ARMED")  # the warm-up trains as well
        if left and due and armed and os.environ.get("RANK", "0") == str(rank):
            left.clear()
            if rank == 0 and kind in ("kill", "exit", "freeze") and "WORLD_SIZE" in os.environ:
                # the store dies with it: the others must have read what it told
                # of this stage
                wait_until_heard()
            note(place)
            if kind == "nan":
                import torch

                with torch.no_grad():
                    arguments[0].model.mlp_up_bank[1, 0, 0] = float("nan")
            happen(kind)
        return function(*arguments, **named)

    setattr(owner, name, faulty)
    if place in REHEARSED:
        arm_after(*found(train_gpt, REHEARSED[place]))


def found(train_gpt, place):
    """-> what holds the function, and its name."""
    return getattr(train_gpt, place[0]) if place[0] else train_gpt, place[1]


def arm_after(owner, name):
    function = getattr(owner, name)

    def arming(*arguments):
        result = function(*arguments)
        os.environ["ARMED"] = "1"
        return result

    setattr(owner, name, arming)


WATCHDOGS = []  # this process's, once it has looked around


def note_what_is_heard():
    """Each rank's watchdog writes the stage that it last heard of rank 0 to
    <FAULT_NOTES>/heard<rank>.
    """
    import train_gpt

    find_guard = train_gpt.find_guard

    def find_noting_guard():
        guard = find_guard()
        watchdog = sys.modules[type(guard).__module__].Watchdog
        watchdog.judge = note_before(watchdog.judge)
        return guard

    train_gpt.find_guard = find_noting_guard


def note_before(judge):
    """Watchdog.judge that first writes down what it is told."""

    def noting(watchdog, told, *others):
        WATCHDOGS[:] = [watchdog]
        Path(os.environ["FAULT_NOTES"], f"heard{watchdog.dist.rank}").write_text(told[0].stage)
        return judge(watchdog, told, *others)

    return noting


def wait_until_heard():
    """Returns when rank 1's watchdog has heard of the stage in which this rank, 0, is.

    However slow the machine.
    """
    heard = Path(os.environ["FAULT_NOTES"], "heard1")
    while not (WATCHDOGS and heard.exists() and heard.read_text() == WATCHDOGS[0].guard.stage):
        time.sleep(0.05)


def write_code(folder, hp, dist, guard):
    if dist.rank == 0:
        (folder / "train_gpt.py").write_bytes(b"code")
    return 4


def main():
    import train_gpt

    if script_of(os.environ).name == "published.py":
        from presets import published

        published.install()
    train_gpt.torch.set_num_threads(1)
    train_gpt.write_code = write_code
    if "FAULT_NOTES" in os.environ:
        note_what_is_heard()
    if "FAULT" in os.environ:
        kind, place, rank, *step = os.environ["FAULT"].split()
        inject(train_gpt, kind, place, int(rank), *map(int, step))
    train_gpt.main()


# ---- for the tests


def environment(folder, fault=None, **more):
    """What a run gets: our settings, and next to nothing of this process."""
    from conftest import HERE

    environ = (
        HERE
        | SETTINGS
        | {
            "RUNS_DIR": str(folder / "runs"),
            "DATA_PATH": str(folder / "data"),
            "RUN_ID": "run",
        }
    )
    return environ | {"FAULT_NOTES": str(folder)} | ({"FAULT": fault} if fault else {}) | more


def start(folder, ranks=1, fault=None, launcher=(), **settings):
    """A run as a user starts it, a session of its own -> Popen; its output goes to <folder>/out."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    command = [*launcher, sys.executable, *torchrun, str(Path(__file__).resolve())]
    with open(folder / "out", "ab") as out:
        environ = environment(folder, fault, **settings)
        # no process inherits a handler: the run begins with the default, also where the tests run
        # under nohup
        before = signal.signal(signal.SIGHUP, lambda number, frame: None)
        try:
            return subprocess.Popen(
                command, env=environ, stdout=out, stderr=out, start_new_session=True
            )
        finally:
            signal.signal(signal.SIGHUP, before)


class Forker:
    """Starts runs as forks of a process that has imported everything: what takes seconds is done
    once.

    Several ranks have no torchrun then: nobody ends the others where one has died, so that they
    must do it themselves.
    """

    def __init__(self):
        command = [sys.executable, str(Path(__file__).resolve()), "serve"]
        from conftest import HERE

        environ = HERE | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen(command, env=environ, text=True, **pipes)

    def ask(self, **request):
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, folder, ranks=1, fault=None, **settings):
        environ = environment(folder, fault, **settings)
        return Fork(self, self.ask(environ=environ, out=str(folder / "out"), ranks=ranks))

    def close(self):
        self.server.stdin.close()
        self.server.wait()


class Fork:
    """What the tests use of Popen."""

    def __init__(self, forker, pid):
        self.forker, self.pid, self.returncode = forker, pid, None

    def poll(self):
        if self.returncode is None:
            self.returncode = self.forker.ask(pid=self.pid)
        return self.returncode

    def wait(self, timeout=1e9):
        limit = time.time() + timeout
        while self.poll() is None:
            if time.time() > limit:
                raise subprocess.TimeoutExpired("run", timeout)
            time.sleep(0.02)
        return self.returncode


def serve():
    """The process that Forker forks: a request a line, {environ, out, ranks} -> pid, {pid} ->
    its exit code or null.
    """
    import sentencepiece  # noqa: F401
    import torch._dynamo
    import torch.distributed

    import train_gpt  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request, code = json.loads(line), None
        if "pid" in request:
            done, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
        elif not (answer := os.fork()):
            code = in_the_fork(**request)
        if code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(json.dumps(answer), flush=True)


def wait_for_ranks(pids):
    """-> the first exit code that is not 0; prints all.

    Ends nobody: also a rank that is frozen the others must end.
    """
    codes = []
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.02)
    print(f"ranks ended with {codes}", flush=True)
    return next((abs(code) for code in codes if code), 0)


def in_the_fork(environ, out, ranks):
    """A run in this process, or its ranks in children of it -> exit code, the first that is not
    0.
    """
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    output = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = [str(Path(__file__).resolve())]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        pids = []
        for rank in range(ranks):
            if not (pid := os.fork()):
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                break
            pids.append(pid)
        else:
            return wait_for_ranks(pids)
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(process, seconds=None):
    """Exit code of a run that ends by itself.

    One that does not within PATIENCE is killed, and None.
    """
    from conftest import PATIENCE

    try:
        return process.wait(timeout=seconds or PATIENCE)
    except subprocess.TimeoutExpired:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        return None


class Slowness(threading.Thread):
    """Measures, for as long as a `with` block runs, how much slower this machine is than one with a
    core to spare.

    A promise in seconds is one for a machine that is not overloaded. `factor()` is the mean ratio
    of the time that a busy loop takes to the CPU time that it gets: 1 where nobody else wants the
    core, 4 where four share it.
    """

    BUSY = 0.1  # seconds of CPU time: longer than the scheduler favours a thread that has slept

    def __init__(self):
        super().__init__(daemon=True)
        self.ratios, self.done = [], threading.Event()

    def run(self):
        while not self.done.wait(2.0):
            wall, cpu = time.perf_counter(), time.thread_time()
            while time.thread_time() < cpu + self.BUSY:
                pass
            self.ratios.append((time.perf_counter() - wall) / (time.thread_time() - cpu))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()

    def factor(self):
        return max(1.0, sum(self.ratios) / max(1, len(self.ratios)))


def members(session):
    """Processes that belong to a run: its session's, and those of torchrun's workers, which
    have their own.
    """
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":
            table[int(path.parent.name)] = int(fields[1]), int(fields[3])
    found = {pid for pid, (_, own) in table.items() if own == session}
    while (
        more := {pid for pid, (parent, own) in table.items() if parent in found or own in found}
        - found
    ):
        found |= more
    return sorted(found)


def make_data(folder, seed=1):
    from conftest import write_documents

    folder.mkdir(parents=True, exist_ok=True)
    write_documents(
        folder, "train", np.random.default_rng(3).integers(3, 150, 40), vocab_size=8192, seed=seed
    )
    write_documents(folder, "val", [60, 10, 0, 90, 25, 40], vocab_size=8192, seed=2)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
