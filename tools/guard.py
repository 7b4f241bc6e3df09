"""What watches a run from outside: the guard that train_gpt.py finds here, where it lies in its
repository.

Watchdog: ends every rank when one has died, failed or stalled. Training states: written whole or
not at all, taken up again on any number of ranks. Checks before the clock starts: disk,
permissions, packages, the artifact's size. Signals. The live line on a terminal.
docs/RELIABILITY.md says what is promised, and which test breaks it.
"""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import glob
import hashlib
import importlib.util
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed

import train_gpt  # the running script: train_gpt.find_guard sees to that
from train_gpt import Guard, SettingError

# the files beside this one, whatever else is called tools: see train_gpt.find_guard
from .run_files import PresetError, published_settings, read_preset, read_settings

ROOT = Path(__file__).resolve().parents[1]
KEPT_STATES = 2  # so that there is one to fall back to where the newest is torn
# weights, average, momentum and both moments, fp32
STATE_BYTES_A_WEIGHT, STATE_DIGEST_BYTES = 20, 32
# of the packed script that every run counts
PACKAGES = {"brotli": "brotli", "python-minifier": "python_minifier"}
# 5 MB/s or more; the others take minutes for a whole model
FAST_COMPRESSORS, TRIAL_ROWS = ("entropy",), 8
# an artifact of trained weights has 0.99 of the projected size, one of other statistics may have
# less
GENEROUS = 0.8
GAUSSIAN_BITS = math.log2(math.sqrt(2 * math.pi * math.e))  # entropy of a unit Gaussian, steps of 1


# Settings that a model's weights have a meaning with: another value loads and computes something
# else.
MEANING = """caseops_enabled marker_fusion_enabled vocab_size model_dim num_layers num_heads
    num_kv_heads mlp_mult
    tie_embeddings smear_gate_enabled gate_window loop_start loop_end num_loops skip_gates_enabled
    ln_scale rope_dims
    rope_base xsa_last_n sparse_attn_gate_enabled sparse_attn_gate_scale gated_attn_enabled
    attn_out_gate_enabled
    attn_out_gate_src leaky_relu_slope parallel_start_layer parallel_final_lane logit_softcap
    attn_window
    attn_window_full_layers partial_key_offset value_residual bigram_vocab_size bigram_dim
    value_embed_layers
    value_embed_dim""".split()
# What a script computes with that lacks these settings: those of presets/published.py that give
# weights another meaning.
WITHOUT = {
    "caseops_enabled": True,
    "marker_fusion_enabled": False,
    "attn_window": 0,
    "partial_key_offset": False,
    "value_residual": "off",
    "bigram_vocab_size": 0,
    "value_embed_layers": "",
}
# Settings that say where a run lies and what it does: going on from a file means to change them.
OF_THE_RUN = """run_id runs_dir preset plots prequant_only quant_only ttt_eval_only checkpoint_path
    artifact_path
    resume""".split()

# how train_gpt.py answers them, where it runs without that file
train_gpt.INSTEAD |= dict.fromkeys(published_settings(), "a setting of presets/published.py")


class SafetyError(SettingError):
    """A state that cannot be taken up, or a machine that will not do; the message says what to
    change.
    """


class RunGuard(Guard):
    """The guard of one run.

    Stage, resume hint and signal are its state; see train_gpt.Guard for the hooks.
    """

    def __init__(self):
        self.dist = None  # until the process group is up
        self.watchdog = None  # with several ranks
        self.lock_file = None
        self.stage = "start"
        self.resume_hint = ""  # how to go on from what is on disk, a sentence with a command
        self.signal = 0  # its number, once one was caught
        self.signals_wait = False  # for the end of a step
        self.line = None  # on a terminal
        nothing = ["loss"], torch.zeros(1)
        # names and norms of this step and of the one before
        self.norms, self.norms_before = nothing, nothing
        self.not_finite = []  # names

    def tell(self, message):
        """Until there is a log, and on all ranks but the first."""
        print(message, file=sys.stderr, flush=True)

    def read_preset(self, name):
        try:
            settings = read_preset(name)
        except PresetError as error:
            raise SettingError(str(error)) from None
        known = {field.name.upper() for field in dataclasses.fields(train_gpt.Hyperparameters)}
        lacks = (settings.keys() & published_settings()) - known
        if lacks or settings.get("COMPRESSOR", "entropy") not in train_gpt.COMPRESSORS:
            raise SettingError(
                f"PRESET={name} has parts that train_gpt.py lacks: run presets/published.py {name}"
            )
        return settings

    def start(self, dist):
        self.dist = dist
        if dist.world_size > 1:
            address = (
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                None,
                False,
                timedelta(seconds=30),
            )
            self.watchdog = Watchdog(self, torch.distributed.TCPStore(*address))
        catch_signals(self)

    def check(self, hp, dist, prepared):
        found = {"compressor": True} if prepared.compressor_works else {}
        return check_machine(hp, dist, prepared.folder, prepared.model, **found)

    def lock(self, folder):
        self.lock_file = lock(folder)

    def open_log(self, log):
        self.tell = log
        self.line = LiveLine() if sys.stdout.isatty() else None

    def notes(self, hp):
        notes = [f"note: {note}" for note in commit_notes()]
        return notes + (preset_notes(hp) if hp.preset else [])

    def submission(self, script, hp):
        return packed_code(script, hp)

    def commit(self):
        return git_commit()

    def enter_stage(self, name):
        self.stage = name
        if self.watchdog:
            self.watchdog.tell()

    def show(self, name, start, share, detail):
        if self.line:
            self.line.show(name, start, share, detail)

    def clear(self):
        if self.line:
            print(self.line.erase, end="")

    def resume(self, trainer):
        return load_state(trainer) if trainer.hp.resume else super().resume(trainer)

    def watch(self, model, loss):
        self.norms_before = self.norms
        self.norms = watched(model, loss)

    def report(self):
        # the step before has ended when this one is marked: looking at its norms waits for nothing
        self.not_finite = not_finite(self.norms_before)
        return self.signal, len(self.not_finite)

    def after_step(self, trainer, step, seconds, losses, reports):
        stop, diverged = reports
        if diverged:
            diverge(trainer, step - 1, self.not_finite)
        if stop or trainer.hp.checkpoint_every and step % trainer.hp.checkpoint_every == 0:
            check_weights(trainer, step)
            save_state(trainer, step, seconds, losses)
        if stop:
            stop_for(self, int(stop))

    def after_last_step(self, trainer, step):
        check_weights(trainer, step)

    def begin_training(self):
        self.signals_wait = True

    def end_training(self, path):
        """The checkpoint stands for the training states, which go; a signal that has waited
        ends the run.
        """
        self.signals_wait = False
        for state in state_files(path.parent) if self.dist.rank == 0 else ():
            state.unlink()
        if self.signal:
            stop_for(self, self.signal)

    def keep_weights(self, hp, folder, path, log):
        self.resume_hint = command(hp, self.dist, folder, path, quant_only=True)
        log(f"checkpoint:{self.resume_hint}")

    def failed(self, error):
        if self.dist:
            tell_failure(self, error)

    def stop(self):
        if self.watchdog:
            self.watchdog.done.set()
        if self.lock_file:
            self.lock_file.close()

    def finish(self, hp, result):
        painter = Path(__file__).with_name("plot_run.py")
        if hp.plots and painter.exists():
            subprocess.run(
                [sys.executable, painter, Path(hp.runs_dir) / result["run"]], stdout=sys.stderr
            )


class LiveLine:
    """The running stage, its bar, seconds left; whatever is printed next, after `erase`, takes
    its place.
    """

    erase = "\r\x1b[K"

    def __init__(self):
        self.shown, self.stage = 0.0, None

    def show(self, name, start, share, detail):
        """Stage and when it began (perf_counter), share done, words; a new stage at once,
        else five times a second.
        """
        now = time.perf_counter()
        if self.stage != (name, start) or now - self.shown > 0.2:
            self.shown, self.stage = now, (name, start)
            left = (now - start) * (1 / share - 1) if share else 0.0
            bar = (
                f"[{'#' * round(30 * share):.<30}] {share:4.0%}  {left:.0f} s left  {detail}"
                if share
                else "..."
            )
            print(
                self.erase + f"{name} {bar}"[: shutil.get_terminal_size().columns - 1],
                end="",
                flush=True,
            )


# ---- the preset, the code and its commit


def preset_notes(hp):
    """Lines for the log: what the run's preset says, and which of it the environment has set
    otherwise.
    """
    given = read_preset(hp.preset)
    texts = {
        field.name.upper(): (field.type, getattr(hp, field.name))
        for field in dataclasses.fields(hp)
    }
    other = [
        f"{name}={value} (preset {given[name]})"
        for name, (kind, value) in texts.items()
        if name in given and value != (given[name] == "1" if kind is bool else kind(given[name]))
    ]
    settings = " ".join(f"{name}={value}" for name, value in given.items())
    return [
        f"preset {hp.preset}: {settings}",
        f"preset {hp.preset}, set otherwise: {', '.join(other) or 'nothing'}",
    ]


def packed_code(script, hp):
    """The packed, self-extracting form of a script (bytes) under these settings, bytes."""
    try:
        from .pack_code import pack_code
    except ImportError as error:
        raise SettingError(
            f"the code cannot be packed and counted: {error}. Run train_gpt.py from its repository,"
            " after pip install -r requirements.txt, or copy a run's packed train_gpt.py"
        ) from None
    return pack_code(script.decode(), {name.upper(): value for name, value in vars(hp).items()})


def git_commit():
    """The checkout's commit, with + where files differ from it; None outside a checkout."""
    return (describe_commit() or [None])[0] or None


def describe_commit():
    """Standard output and error of git on this checkout; None without git."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*"]
    if not shutil.which("git"):
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip(), done.stderr.strip()


def commit_notes():
    """Notes for the log where git does not say the commit of this checkout: no record can be
    made of such a run.
    """
    commit, error = describe_commit() or ("", "git is not installed")
    if commit or not (ROOT / ".git").exists():
        return []
    if "dubious ownership" in error:  # as in a container, where the folder belongs to another user
        return [
            f"commit unknown, {ROOT} belongs to another user: git config --global --add"
            f" safe.directory {ROOT}"
        ]
    return [
        "commit unknown, no record can be made of this run:"
        f" {error.splitlines()[0] if error else 'no commit yet'}"
    ]


# ---- the watchdog


class Watchdog(threading.Thread):
    """Ends this process where another rank has died, failed or stalled, with a line that names rank
    and stage.

    Each second every rank tells the process group's store: the time, its CPU time, how many
    collectives it entered, its stage, its error, its process. Dead: no news in DEAD looks, or in
    STALLED where its process is seen to live on this host: a library may keep Python's lock.
    Stalled: no collective and next to no work for the CPU in STALLED looks, while others are
    further on. Looks are counted, not seconds: where all ranks are held up alike, by a compiler
    that keeps Python's lock or a machine that sleeps, nobody is missed.
    """

    DEAD, DEAD_AFTER_FAILURE, STALLED = 15, 3, 40
    STOPPING = 20  # seconds in which a step ends and a state is written
    # of 10 ms: this thread and idle libraries take less, a moment's work among them
    IDLE_TICKS = 4 * STALLED

    def __init__(self, guard, store):
        super().__init__(daemon=True)
        self.guard, self.dist, self.store = guard, guard.dist, store
        self.error, self.done = None, threading.Event()
        self.process, self.disk_ticks = (host_id(), os.getpid(), process_state(os.getpid())[1]), 0
        self.tell()  # before anything can go wrong: the others wait for a first sign of life
        self.holder = json.loads(store.get("golf/rank0"))  # what rank 0 told last
        self.start()

    def tell(self):
        """Publishes this rank's news; a run does so as well where a stage begins."""
        # who waits for a slow disk works: it may save
        self.disk_ticks += 100 * (process_state(os.getpid())[0] == "D")
        cpu, entered = cpu_ticks() + self.disk_ticks, self.dist.num_collectives
        news = time.time(), cpu, entered, self.guard.stage, self.error, self.process
        self.store.set(f"golf/rank{self.dist.rank}", json.dumps(news))

    def fail(self, message):
        """Called by a rank that failed: the thread ends the process as soon as it is known
        who failed first.
        """
        with contextlib.suppress(RuntimeError):  # the store is gone: the thread finds that as well
            self.error = self.error or (
                self.store.add("golf/failures", 1),
                message,
                self.guard.signal,
            )
        self.join(self.DEAD)

    def run(self):
        keys = [f"golf/rank{rank}" for rank in range(self.dist.world_size)]
        silent, failing, found, past = (
            [0] * len(keys),
            0,
            None,
            collections.deque(maxlen=self.STALLED + 1),
        )
        while not found and not self.done.wait(1.0):
            answered = threading.Event()
            threading.Thread(target=self.await_store, args=[answered], daemon=True).start()
            try:
                self.tell()
                told = [json.loads(text) for text in self.store.multi_get(keys)]
            except RuntimeError as error:
                self.end_without_store(f"{error!r:.80}")
            answered.set()
            for rank, (new, old) in enumerate(zip(told, past[-1] if past else told, strict=True)):
                silent[rank] = silent[rank] + 1 if new[0] == old[0] else 0
            past.append(told)
            failing, self.holder = failing + any(new[4] for new in told), told[0]
            found = self.judge(
                told, silent, [self.idles(past, rank) for rank in range(len(keys))], failing
            )
        if found:
            (rank, words), (*_, error, process) = found, told[found[0]]
            hung = process if silent[rank] >= self.DEAD_AFTER_FAILURE else None
            self.end(f"rank {rank} {words}", hung, error[2] if error else 0)

    def await_store(self, answered):
        """A store whose process is frozen answers nothing, and its client waits for ever: this ends
        the process.

        Waits are counted like looks: where Python's lock was kept for long, the answer may be there
        and gets its turn.
        """
        if not any(answered.wait(1.0) for _ in range(2 * self.DEAD)):
            self.end_without_store("it does not answer")

    def end_without_store(self, why):
        """Who holds the store has died or hangs: torchrun, or rank 0."""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if agent and self.guard.signal and self.guard.signals_wait:
            # torchrun went when it had told us to stop: we do, with a state (see
            # after_step)
            time.sleep(self.STOPPING)
        holder, stage = "torchrun" if agent else "rank 0", self.holder[3]
        verdict = (
            f"{holder} died or hangs, last heard of in stage {stage}; it holds the store: {why}"
        )
        self.end(verdict, None if agent else self.holder[5])

    def end(self, verdict, hung=None, number=0):
        """Ends this process with a verdict, by the signal that ended the other if it is
        one, and who hangs here.
        """
        if self.done.is_set():
            return
        if self.dist.rank == 0:
            time.sleep(2.5)  # it may hold the store, in which the others are to find the same
        self.guard.tell(
            f"{verdict}. Rank {self.dist.rank} ends in stage {self.guard.stage}."
            f" {self.guard.resume_hint}"
        )
        # frozen, it would stay; torchrun takes 30 s to end it
        if hung and lives(*hung, states="RSDTt"):
            os.kill(hung[1], signal.SIGKILL)
        number = self.guard.signal or number
        leave(128 + number if number else 1)

    def idles(self, past, rank):
        """Did a rank enter no collective and use next to no CPU, programs that ended
        included, in STALLED looks?
        """
        (_, used, entered, *_), (_, uses, enters, *_) = past[0][rank], past[-1][rank]
        return len(past) > self.STALLED and enters == entered and 0 <= uses - used < self.IDLE_TICKS

    def judge(self, told, silent, idle, failing):
        """What the ranks told, looks without news, who idles, looks since a failure -> (rank,
        words),
        or None.

        A rank that lost its peer fails as well, so the dead one is looked for first, then who
        failed first.
        """
        furthest = max(new[2] for new in told)
        for rank, (_, _, entered, stage, _, process) in enumerate(told):
            if silent[rank] >= (self.DEAD_AFTER_FAILURE if failing else self.DEAD):
                if silent[rank] >= self.STALLED or not lives(*process):
                    return rank, f"died or hangs in stage {stage}"
            elif idle[rank] and entered < furthest:
                return rank, f"stalls in stage {stage}, the others wait for it"
        if failing > self.DEAD_AFTER_FAILURE + 1:
            (_, why, _), rank, stage = min(
                (new[4], rank, new[3]) for rank, new in enumerate(told) if new[4]
            )
            return rank, f"failed in stage {stage}: {why}"
        return None


def host_id():
    """What processes that see each other under the same numbers have in common; "" where there
    is no /proc.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink(
            "/proc/self/ns/pid"
        )
    except OSError:
        return ""


def process_state(pid):
    """-> letter of its state, when it started; "" and "" for a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def lives(host, pid, started, states="RSD"):
    """Is this very process on this host, and neither ended nor frozen?"""
    state, since = process_state(pid) if host == host_id() else ("", "")
    return bool(state) and since == started and state in states


def children():
    """Numbers of the programs that this process has started and that run, as text."""
    found = ""
    for path in glob.glob("/proc/self/task/*/children"):
        with contextlib.suppress(OSError):  # a thread may end meanwhile
            found += Path(path).read_text() + " "
    return found.split()


def cpu_ticks():
    """CPU time of this process and of the programs that it waits for, in the kernel's ticks."""
    total = 0
    for pid in ("self", *children()):
        with contextlib.suppress(OSError):
            total += sum(
                map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
            )
    return total


def leave(code):
    """Ends this process at once, whatever its threads wait for, and the programs that it has
    started.
    """
    for pid in children():
        with contextlib.suppress(OSError):
            os.kill(int(pid), signal.SIGTERM)
    time.sleep(0.2)  # in which the threads that waited for them remove their temporary files
    sys.stdout.flush()
    os._exit(code)


# ---- the end of a run that is not its end


def catch_signals(guard):
    """The first SIGTERM, SIGINT or SIGHUP ends the run by stop_for, training after its step; a
    second
    one at once.

    SIGHUP is what a lost connection or a closed window sends, often twice: it is never taken for
    the second signal. Where it was ignored when the process started (nohup), it stays ignored.
    """
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)

    def caught(number, frame):
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        guard.signal = number
        if not guard.signals_wait:
            stop_for(guard, number)

    for each in signals:
        signal.signal(each, caught)


def stop_for(guard, number):
    """Ends this process: one line from rank 0, exit code 128 + number."""
    reason = f"stopped by {signal.Signals(number).name}"
    # torchrun sends SIGTERM as well, where another rank has died
    if guard.watchdog and not guard.signals_wait:
        guard.watchdog.fail(reason)
    if guard.dist.rank == 0:
        guard.tell(f"{reason} in stage {guard.stage}. {guard.resume_hint}")
    leave(128 + number)


def tell_failure(guard, error):
    """Tells where a run failed and what is safe; a refusal needs no traceback.

    With several ranks this ends the process, once it is known who was first.
    """
    expected = isinstance(error, train_gpt.OUR_ERRORS)
    reason = str(error) if expected else f"{type(error).__name__}: {error}"
    # what is refused at the start all ranks refuse
    if guard.watchdog and not (expected and guard.stage == "start"):
        if not expected:
            traceback.print_exception(error)
        guard.watchdog.fail(reason)
    if guard.stage != "start":
        guard.tell(f"failed in stage {guard.stage}: {reason}. {guard.resume_hint}")


# ---- divergence


def watched(model, loss):
    """Loss and gradients -> names, their norms on the way to the CPU."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = torch.stack([loss, *torch._foreach_norm([*grads.values()])]).to(
        "cpu", non_blocking=True
    )
    return ["loss", *(f"gradient of {name}" for name in grads)], norms


def not_finite(watched):
    """Names of what is not finite; to be asked when the step that was watched has ended, as
    then a look is free.
    """
    return [
        name
        for name, norm in zip(watched[0], watched[1].tolist(), strict=True)
        if not math.isfinite(norm)
    ]


def check_weights(trainer, step):
    """Waits for the device.

    Training ends here, on every rank alike, where a weight is not finite.
    """
    if bad := [name for name, p in trainer.model.named_parameters() if not p.isfinite().all()]:
        diverge(trainer, step, bad)


def diverge(trainer, step, names):
    """Ends training on every rank with what is not finite after this step; diverged.pt keeps it
    for a look.
    """
    told = trainer.dist.all_gather_object(names)
    found = [f"{', '.join(names[:3])} (rank {rank})" for rank, names in enumerate(told) if names]
    save_state(trainer, step, 0.0, [torch.zeros(())], "diverged.pt")
    raise SafetyError(
        f"training diverged: after step {step} not finite: {'; '.join(found)}; lower learning rates"
    )


# ---- training states


def save_state(trainer, step, seconds, losses, name=None):
    """Writes all that training goes on from: <sha256><torch.save> in the run's folder, on rank 0's
    disk; two are kept.

    step (the loader's position too), seconds, last losses, weights, average, momentum of all ranks,
    AdamW's moments, state of the random numbers, looping state and where its stretches began. A
    disk that is full is told of and ends nothing.
    """
    dist, log, muon, momentum = trainer.dist, trainer.log, trainer.optimizers.muon, []
    for bank, buffer in zip(muon.banks, muon.momentum_buffers, strict=True):
        handle, full = dist.all_gather(buffer)
        handle.wait()
        momentum.append(full[: len(bank)])
    name = name or f"state-{step:08d}.pt"
    state = {
        "settings": dataclasses.asdict(trainer.hp),
        "step": step,
        "seconds": seconds,
        "losses": dist.all_reduce(torch.stack(losses[-20:])),
        "weights": trainer.model.state_dict(),
        "average": trainer.ema.average,
        "snapshots": getattr(trainer.ema, "snapshots", 0),  # presets/published.py
        "momentum": momentum,
        "adamw": trainer.optimizers.adamw.state_dict()["state"],
        "rng": torch.get_rng_state(),
        "looping": trainer.looping,
        "tokens_at": trainer.tokens_at,
    }
    if dist.rank == 0:
        try:
            train_gpt.write_atomically(log.folder / name, sealed(state))
        except OSError as error:
            log(f"note: {name} could not be written: {error}")
            return
        for old in state_files(log.folder)[KEPT_STATES:]:
            old.unlink()
        log(f"step:{step} state:{name}")
    if dist.rank == 0 and (kept := state_files(log.folder)):
        trainer.guard.resume_hint = command(trainer.hp, dist, log.folder, kept[0], resume=True)


def sealed(state):
    """-> bytes <sha256><torch.save>, in one buffer: copies of a gigabyte would keep Python's
    lock for seconds.
    """
    buffer = io.BytesIO(bytes(STATE_DIGEST_BYTES))
    buffer.seek(STATE_DIGEST_BYTES)
    torch.save(state, buffer)
    view = buffer.getbuffer()
    view[:STATE_DIGEST_BYTES] = hashlib.sha256(view[STATE_DIGEST_BYTES:]).digest()
    return view


def state_files(folder):
    """The training states of a run's folder, newest first."""
    return sorted(Path(folder).glob("state-*.pt"), reverse=True)


def newest_state(folder):
    """-> name and content of the newest whole training state; torn ones are passed over.

    SafetyError if none is.
    """
    for path in state_files(folder):
        data = path.read_bytes()
        sealed, content = data[:STATE_DIGEST_BYTES], data[STATE_DIGEST_BYTES:]
        if content and hashlib.sha256(content).digest() == sealed:
            return path.name, content
    raise SafetyError(f"{folder} holds no whole training state (state-*.pt), which RESUME=1 needs")


def load_state(trainer):
    """Takes up the newest whole state of the run's folder on rank 0 -> step, seconds, losses, or
    SafetyError.

    Only tensors and numbers are read, never code (torch.load with weights_only).
    """
    dist, muon, adamw = trainer.dist, trainer.optimizers.muon, trainer.optimizers.adamw
    name, data = newest_state(trainer.log.folder) if dist.rank == 0 else ("", b"")
    size = int(dist.max_over_ranks(len(data))[0])
    box = torch.frombuffer(bytearray(data or size), dtype=torch.uint8)
    dist.broadcast(box)
    try:
        state = torch.load(io.BytesIO(box.numpy()), map_location="cpu", weights_only=True)
        trainer.model.load_state_dict(state["weights"])
        for buffer, full in zip(muon.momentum_buffers, state["momentum"], strict=True):
            buffer.copy_(muon.padded(full).chunk(dist.world_size)[dist.rank])
        for average, saved in zip(trainer.ema.average, state["average"], strict=True):
            average.copy_(saved)
        trainer.ema.snapshots = int(state["snapshots"])
        adamw.load_state_dict(adamw.state_dict() | {"state": state["adamw"]})
        torch.set_rng_state(state["rng"])
        # which the ranks add up again
        losses = list((state["losses"] / dist.world_size).to(dist.device))
        float(losses[-1])  # one loss at least, each of them a number
        trainer.looping = bool(state["looping"])
        trainer.tokens_at = [(int(begun), float(used)) for begun, used in state["tokens_at"]]
        step, seconds = int(state["step"]), float(state["seconds"])
    except Exception as error:  # whatever a forged file makes torch raise
        raise SafetyError(f"{name} does not fit these settings: {error!r:.300}") from None
    if dist.rank == 0:  # what a failure before the next state is told with
        folder = trainer.log.folder
        trainer.guard.resume_hint = command(trainer.hp, dist, folder, folder / name, resume=True)
    trainer.log(f"step:{step} resumed:{name} train_seconds:{seconds:.2f}")
    return step, seconds, losses


def settings_of_file(path, hp):
    """Settings {field: value} that a file to go on from was made with, {} where nothing says it.

    A checkpoint or a training state holds them. Of an artifact they are those of the model.pt
    beside it, or else of the log beside it: its own bytes count, so it has none.
    """
    if hp.resume:
        return torch.load(
            io.BytesIO(path.read_bytes()[STATE_DIGEST_BYTES:]), weights_only=True
        ).get("settings", {})
    checkpoint = path if hp.quant_only else path.with_name("model.pt")
    if checkpoint.is_file():
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get(
            "settings", {}
        )
    if path.with_name("log.txt").is_file():
        lines = path.with_name("log.txt").read_text(encoding="utf-8").splitlines()
        texts = read_settings(lines)[0]  # of the last table, which the others stand before
        kinds = {
            field.name: field.type
            for field in dataclasses.fields(hp)
            if field.name.upper() in texts
        }
        kinds |= {name: type(value) for name, value in WITHOUT.items() if name.upper() in texts}
        texts = {name: texts[name.upper()] for name in kinds}
        return {
            name: kind(int(texts[name])) if kind is bool else kind(texts[name])
            for name, kind in kinds.items()
        }
    return {}


def compare_settings(path, hp):
    """A file to go on from against the settings -> list of problems, phrase for the log. A damaged
    file: no problem.

    What gives the weights another meaning is a problem: they would load, and score something else
    in silence. What else differs is told.
    """
    try:
        settings = settings_of_file(path, hp)
        ours = WITHOUT | vars(hp)
        other = {
            name: value
            for name, value in ((WITHOUT | settings) if settings else {}).items()
            if ours.get(name, value) != value
        }
    # whatever a damaged file makes torch raise: the error is told where the weights are read
    except Exception:
        return [], ""
    if not settings:
        return (
            [],
            f"\nnote: nothing says which settings {path} was made with; they must be the same",
        )
    told = [
        f"{name.upper()}={ours[name]} ({value} there)"
        for name, value in other.items()
        if name in MEANING
    ]
    if told:
        return [
            f"{path} holds a model of other settings: {', '.join(told)}: set them as they are there"
        ], ""
    rest = [name for name in other if name not in OF_THE_RUN]
    told = ", ".join(f"{name.upper()}={getattr(hp, name)} ({other[name]} there)" for name in rest)
    return [], f"\nnote: settings other than those of {path}: {told}" if told else ""


def command(hp, dist, folder, whole, **mode):
    """What goes on from a whole file of a run's folder: a sentence with the line for a shell,
    of the run's settings.
    """
    (name,) = (key.upper() for key in mode)
    hp = dataclasses.replace(
        hp, **{"run_id": folder.name, "resume": False, "prequant_only": False} | mode
    )
    values = {
        field.name.upper(): (getattr(hp, field.name), field) for field in dataclasses.fields(hp)
    }
    words = [
        f"{name}={shlex.quote(str(int(value) if field.type is bool else value))}"
        for name, (value, field) in values.items()
        if value != field.default
    ]
    start = (
        f"torchrun --standalone --nproc_per_node={dist.world_size}"
        if dist.world_size > 1
        else "python"
    )
    return " ".join(
        [f"{whole} is whole; {name}=1 goes on from it:", *words, start, shlex.quote(sys.argv[0])]
    )


# ---- before the clock starts


def projected_bytes(model, hp):
    """Size of the artifact from shapes and settings alone: Gaussian rows at their entropy,
    small tensors as fp16.
    """
    bits = 0.0
    for name, weight in model.named_parameters():
        kind = (
            "embed"
            if name in ("tok_emb", "lm_head")
            else "mlp"
            if name.startswith("mlp")
            else "attn"
        )
        if kind == "embed" or name.endswith("_bank"):
            step = getattr(hp, f"{kind}_clip_sigmas")  # in deviations, of the largest code
            step /= 2 ** ((hp.embed_bits if kind == "embed" else hp.matrix_bits) - 1) - 1
            bits += (
                max(0.0, GAUSSIAN_BITS - math.log2(step)) * weight.numel()
                + 16 * weight.numel() / weight.shape[-1]
            )
        else:
            bits += 16 * weight.numel()
    return round(bits / 8)


def trial_arrays(model, hp):
    """Random weights as quantize_weights would hand them on -> arrays, share of the real ones'
    elements.

    Names, fields and small tensors are those of the run. Of matrices of one shape the first is
    whole where the coder is fast, all others have few rows.
    """
    weights, generator, arrays, seen = (
        train_gpt.unbank(model),
        torch.Generator().manual_seed(1),
        {},
        set(),
    )
    for name, weight in weights.items():
        role, shape, fields = train_gpt.quant_role(name), tuple(weight.shape), {}
        if role is None:
            fields = train_gpt.quantize_small(name, torch.randn(shape, generator=generator), hp)
        else:
            rows = (
                shape[0]
                if hp.compressor in FAST_COMPRESSORS and shape not in seen
                else min(TRIAL_ROWS, shape[0])
            )
            deviation = (2 ** (getattr(hp, role.bits) - 1) - 1) / getattr(hp, role.clip_sigmas)
            codes = (
                (torch.randn(rows, shape[1], generator=generator) * deviation)
                .round_()
                .clamp_(-127, 127)
            )
            scale = torch.rand(rows, generator=generator)
            fields = {"codes": codes.to(torch.int8), "scale": scale.half()}
            if hp.gptq_column_steps:
                fields["scale"] = train_gpt.to_log2_eighths(scale)
                fields["column_steps"] = train_gpt.to_log2_eighths(torch.ones(shape[1]))
            if hp.lqer_enabled and len(seen) < hp.lqer_top_k and shape not in seen:
                sizes = (rows, hp.lqer_rank), (hp.lqer_rank, shape[1])
                a, b = (torch.randn(size, generator=generator) for size in sizes)
                fields |= train_gpt.pack_factors(a, b, hp)
            seen.add(shape)
        arrays |= {f"{name}:{field}": value.numpy() for field, value in fields.items()}
    return arrays, sum(a.size for a in arrays.values()) / sum(
        weight.numel() for weight in weights.values()
    )


def try_packing(model, hp):
    """Packs, unpacks and dequantizes random weights -> a phrase for the log, seconds that unpacking
    takes at least.

    SafetyError where that fails, or other bytes come out.
    """
    arrays, share = trial_arrays(model, hp)
    try:
        times = [time.perf_counter()]
        blob = train_gpt.pack_weights(arrays, hp.compressor)
        times.append(time.perf_counter())
        found = train_gpt.unpack_weights(blob)
        times.append(time.perf_counter())
        train_gpt.dequantize_weights(found)
    except Exception as error:  # whatever a library that does not do raises
        raise SafetyError(
            f"COMPRESSOR={hp.compressor} failed on random weights: {error!r:.300}"
        ) from None
    wrong = sorted(arrays.keys() ^ found.keys())
    wrong = wrong or [
        n for n, a in arrays.items() if found[n].dtype != a.dtype or not np.array_equal(found[n], a)
    ]
    if wrong:
        raise SafetyError(
            f"COMPRESSOR={hp.compressor} gave back other values than it got: {', '.join(wrong[:3])}"
        )
    pack, unpack = np.diff(times)
    phrase = f"trial_packing share:{share:.3f} pack_seconds:{pack:.2f} unpack_seconds:{unpack:.2f}"
    return phrase, unpack / share if hp.compressor in FAST_COMPRESSORS else unpack


def check_budgets(model, hp):
    """Budgets that cannot hold, an artifact that cannot fit, a compressor that fails ->
    problems, words for the log.
    """
    problems, phrases = [], []
    if hp.prequant_only or hp.ttt_eval_only:
        return problems, phrases
    if hp.max_wallclock_seconds and not hp.gptq_reserve_seconds and not hp.quant_only:
        problems.append(
            "GPTQ_RESERVE_SECONDS=0 leaves Hessians and GPTQ no time of MAX_WALLCLOCK_SECONDS:"
            " set it"
        )
    try:
        phrase, seconds = try_packing(model, hp)
        phrases.append(phrase)
        if seconds > 2 * hp.eval_budget_seconds:  # not for a moment in which the machine was busy
            problems.append(
                f"EVAL_BUDGET_SECONDS={hp.eval_budget_seconds}: unpacking takes about {seconds:.0f}"
                " s here"
            )
    except SafetyError as error:
        problems.append(str(error))
    size, cap = projected_bytes(model, hp), train_gpt.BYTE_CAP
    phrases.insert(0, f"projected_artifact_bytes:{size}")
    advice = (
        "take fewer weights or wider clips (..._CLIP_SIGMAS), or TARGET_BYTES, which widens them"
        " until it fits"
    )
    if not hp.target_bytes and GENEROUS * size > cap:
        problems.append(
            f"the artifact will have about {size:,} bytes, the cap is {cap:,}: {advice}"
        )
    elif not hp.target_bytes and size > cap:
        phrases.append(
            f"\nnote: the artifact may not fit, about {size:,} bytes, the cap is {cap:,}: {advice}"
        )
    return problems, phrases


def wanted_bytes(model, hp):
    """What a run may write to its folder at most: model.pt, training states, artifact, code,
    log.
    """
    states = (
        0 if hp.quant_only or hp.ttt_eval_only else KEPT_STATES + 1 if hp.checkpoint_every else 1
    )
    return (
        sum(p.numel() for p in model.parameters()) * (4 + STATE_BYTES_A_WEIGHT * states)
        + 50_000_000
    )


def check_folder(folder, model, hp):
    """Room and permission for the run's folder, the file that a run goes on from -> problems,
    phrase for the log.
    """
    problems, phrase, goes_on = [], "", hp.quant_only or hp.ttt_eval_only
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        problems.append(f"{place} cannot be written to: set RUNS_DIR, or change its permissions")
    source = {hp.quant_only: hp.checkpoint_path or folder / "model.pt"}
    source = {hp.ttt_eval_only: hp.artifact_path or folder / "artifact.bin"} | source
    if goes_on and not Path(source[True]).is_file():
        problems.append(
            f"{source[True]} does not exist: set the RUN_ID of a finished run, or the file's own"
            " path"
        )
    elif goes_on:
        more, phrase = compare_settings(Path(source[True]), hp)
        problems += more
    if (folder / "log.txt").exists() and not (
        goes_on or hp.resume or (folder / "model.pt").exists()
    ):
        problems.append(
            f"{folder} holds a run that did not end: choose another RUN_ID, or go on with RESUME=1"
        )
    wanted, free = wanted_bytes(model, hp), shutil.disk_usage(place).free
    if free < wanted:
        problems.append(
            f"{place} has {free / 1e9:.2f} GB free, this run may write {wanted / 1e9:.2f} GB: make"
            " room"
        )
    if hp.resume:
        try:
            more, phrase = compare_settings(folder / newest_state(folder)[0], hp)
            problems += more
        except (SafetyError, OSError) as error:
            problems.append(str(error))
    return problems, phrase


def missing_compiler(device):
    """What torch.compile lacks on a "cpu" or "cuda" device, None where its compiler is there.

    On the CPU its kernels are C++, on a GPU Triton builds a launcher in C for each of them.
    """
    variable, names = ("CC", ("gcc", "clang", "cc")) if device == "cuda" else ("CXX", ("g++",))
    names = (os.environ[variable],) if os.environ.get(variable) else names
    return (
        None
        if any(map(shutil.which, names))
        else f"a compiler, and there is no {' or '.join(names)}"
    )


def check_machine(hp, dist, folder=None, model=None, **found):
    """What the settings ask of this machine -> phrases for the log. SafetyError with all that is
    missing.

    `found` is what the run's other checks have made. Packages on every rank; on rank 0 the run's
    folder, a round trip of random weights through the compressor, budgets, the size of the artifact
    to come.
    """
    problems, phrases = [], []
    if missing := [
        name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None
    ]:
        problems.append(f"not installed: {' '.join(missing)} (README: installation)")
    if missing := train_gpt.compile_wanted(hp, dist) and missing_compiler(dist.device.type):
        problems.append(f"torch.compile needs {missing}: apt-get install g++, or set COMPILE=0")
    finished = folder and not dist.rank and (folder / "model.pt").exists()
    if finished and not (hp.quant_only or hp.ttt_eval_only):
        problems.append(
            f"{folder} holds a finished training: choose another RUN_ID, or go on with QUANT_ONLY=1"
        )
    if model is not None and not dist.rank:  # what is wrong with the model has been told already
        if folder is not None:
            more, phrase = check_folder(folder, model, hp)
            problems += more
            phrases.append(phrase)
        if "compressor" in found:
            more, told = check_budgets(model, hp)
            problems += more
            phrases = told + phrases
    raise_all(problems)
    return " ".join(phrases).rstrip()


def lock(folder):
    """Locks a run's folder until this process ends, however it does -> the file that must stay
    open, or SafetyError.
    """
    file = open(folder / "log.txt", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SafetyError(f"{folder} is in use by another run: choose another RUN_ID") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print(
            f"note: {folder}: this file system has no locks, keep other runs out of it",
            file=sys.stderr,
        )
    for left in folder.glob(".*.tmp"):  # by a process that was killed while it wrote
        left.unlink()
    return file


def raise_all(problems):
    if problems:
        raise SafetyError("\n".join(problems))
