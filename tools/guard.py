"""Watches a run from outside: the guard that train_gpt.py uses where it finds this file beside it.

In this order: training states (written atomically, resumed on any number of ranks), divergence,
signals and failures, the watchdog that ends every rank when one has died, failed or stalled, the
checks of the machine before the clock starts, the preset, commit and packed code of the run, and
the live line on a terminal. docs/RELIABILITY.md says what is promised, and which test breaks it.
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
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed

import train_gpt  # the running script: train_gpt.find_guard sees to that
from train_gpt import Guard, SettingError

# the files beside this one, whatever else is called tools: see train_gpt.find_guard
from .dataset import check_dataset, check_training_ids, leaked_documents
from .other_scripts import environment_notes, instead_of
from .run_files import OF_A_PART, PresetError, published_settings, read_preset, read_settings

ROOT = Path(__file__).resolve().parents[1]


class SafetyError(SettingError):
    """A state that cannot be resumed or a machine that is not fit; the message says what to do."""


class RunGuard(Guard):
    """The guard of one run: its state, and train_gpt.Guard's hooks in the parts of this file."""

    def __init__(self):
        self.dist = None  # until the process group is up
        self.hp = None  # until training begins
        self.stage = "start"
        self.stages = []  # name and start of those that have not ended, the innermost last
        self.resume_hint = ""  # how to continue from what is on disk: a sentence with a command
        # divergence: names and norms of this step and of the step before
        self.norms = Norms(["loss"], torch.zeros(1))
        self.norms_before = self.norms
        self.not_finite = []  # names
        self.losses = []  # this rank's shares of the mean loss of every step
        # for RESULT
        self.resumed = {}
        self.group_bytes = {}
        # signals
        self.signal = 0  # number of the first one that was caught
        self.signals_wait = False  # for the end of a step
        # the others are None until they are needed
        self.watchdog = None  # with several ranks
        self.lock_file = None
        self.line = None  # on a terminal

    def tell(self, message):
        """Prints a message; replaced by the log once it is open, on rank 0."""
        print(message, file=sys.stderr, flush=True)

    def start(self, dist):
        self.dist = dist
        if dist.world_size > 1:
            host = os.environ["MASTER_ADDR"]
            port = int(os.environ["MASTER_PORT"])
            store = torch.distributed.TCPStore(
                host, port, is_master=False, timeout=timedelta(seconds=30)
            )
            self.watchdog = Watchdog(self, store)
        catch_signals(self)

    def enter_stage(self, name, start):
        self.stages.append((name, start))
        self.set_stage(name)
        self.show(0.0)

    def leave_stage(self):
        ended = self.stages.pop()
        # without an outer one the stage that ended stays the current one until the next begins
        name, _ = self.stages[-1] if self.stages else ended
        self.set_stage(name)

    def set_stage(self, name):
        """Notes the current stage, and tells the other ranks."""
        self.stage = name
        if self.watchdog:
            self.watchdog.tell()

    # -- training states

    def resume(self, trainer, evaluate):
        self.hp = trainer.hp
        if not trainer.hp.resume:
            return super().resume(trainer, evaluate)
        step, seconds, self.losses = load_state(trainer)
        self.resumed = {"resumed_at_step": step}
        # the run that wrote the state may have ended before it logged and evaluated this step
        progress = trainer.progress(step, seconds)
        trainer.log_step(step, self.losses[-1], seconds, progress, trainer.looping)
        if trainer.evaluation_is_due(step):
            evaluate()
        return step, seconds, self.losses

    def after_step(self, trainer, step, seconds, losses, reports):
        self.losses = losses
        stop, diverged = reports
        if diverged:
            diverge(trainer, step - 1, self.not_finite)
        every = trainer.hp.checkpoint_every
        if stop or (every and step % every == 0):
            check_weights(trainer, step)
            save_state(trainer, step, seconds, losses)
        if stop:
            stop_for(self, int(stop))

    def after_last_step(self, trainer, step):
        check_weights(trainer, step)

    def keep_weights(self, hp, folder, path, log):
        self.resume_hint = command(hp, self.dist, folder, path, quant_only=True)
        log(f"checkpoint:{self.resume_hint}")

    # -- divergence

    def watch(self, model, loss):
        self.norms_before = self.norms
        self.norms = watched(model, loss)

    def report(self):
        # norms of the previous step: they have arrived by now, so reading them does not block
        self.not_finite = not_finite(self.norms_before)
        return self.signal, len(self.not_finite)

    # -- signals and failures

    def begin_training(self):
        self.signals_wait = True

    def end_training(self, path):
        """The checkpoint replaces the training states; a signal that has waited ends the run.

        losses.npy beside it gets the loss in nats of every step, float32.
        """
        # before a signal can end the run: the states are of no use beside a finished training
        self.resume_hint = command(self.hp, self.dist, path.parent, path, quant_only=True)
        self.signals_wait = False
        losses = self.dist.all_reduce(torch.stack(self.losses)).cpu().numpy()
        if self.dist.rank == 0:
            save_losses(losses, path.with_name("losses.npy"))
            for state in state_files(path.parent):
                state.unlink()
        if self.signal:
            stop_for(self, self.signal)

    def failed(self, error):
        if self.dist:
            tell_failure(self, error)

    def stop(self):
        if self.watchdog:
            self.watchdog.done.set()
        if self.lock_file:
            self.lock_file.close()

    # -- checks of the machine and of the data

    def check(self, hp, dist, prepared):
        problems = []
        machine = ""
        try:
            prepared.tokenizer = check_dataset(hp, prepared.validation)
        except train_gpt.DataError as error:
            problems.append(str(error))
        try:
            check_training_ids(hp, dist)
        except train_gpt.DataError as error:
            problems.append(str(error))
        try:
            machine = check_machine(hp, dist, prepared.folder, prepared.model)
        except SafetyError as error:
            problems.append(str(error))
        raise_all(problems)
        return machine

    def lock(self, folder):
        self.lock_file = lock(folder)

    # -- preset, code and commit

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

    def instead(self, name):
        return instead_of(name)

    def notes(self, hp):
        notes = [*environment_notes(os.environ), *budget_notes(hp), *commit_notes()]
        notes = [f"note: {note}" for note in notes]
        return notes + (preset_notes(hp) if hp.preset else [])

    def complete(self, hp, result):
        result |= leaked_documents(hp) | self.resumed | self.group_bytes
        if leaked := result.get("leaked_documents"):
            result["violations"].append(
                f"{leaked} training documents are validation documents, says the dataset's manifest"
            )

    def quantized(self, arrays):
        self.group_bytes = {"group_bytes": group_bytes(arrays)}

    def submission(self, script, hp):
        return packed_code(script, hp)

    def commit(self):
        return git_commit()

    # -- log, live line and pictures

    def open_log(self, log):
        self.tell = log
        self.line = LiveLine() if sys.stdout.isatty() else None

    def show(self, share, detail=""):
        if self.line and self.stages:
            self.line.show(*self.stages[-1], share, detail)

    def clear(self):
        if self.line:
            print(self.line.erase, end="")

    def finish(self, hp, result):
        painter = Path(__file__).with_name("plot_run.py")
        if hp.plots and painter.exists():
            folder = Path(hp.runs_dir) / result["run"]
            subprocess.run([sys.executable, painter, folder], stdout=sys.stderr)


# ---- TRAINING STATES -----------------------------------------------------------------------------

KEPT_STATES = 2  # so that there is one to fall back to if the newest is incomplete
STATE_DIGEST_BYTES = 32
# Settings that give a model's weights their meaning: with another value they load and compute
# something else.
MEANING = """caseops_enabled marker_fusion_enabled vocab_size model_dim num_layers num_heads
    num_kv_heads mlp_mult tie_embeddings smear_gate_enabled loop_start loop_end
    num_loops skip_gates_enabled ln_scale rope_dims rope_base xsa_last_n sparse_attn_gate_enabled
    sparse_attn_gate_scale gated_attn_enabled attn_out_gate_enabled attn_out_gate_src
    leaky_relu_slope parallel_start_layer parallel_final_lane logit_softcap attn_window
    attn_window_full_layers partial_key_offset value_residual bigram_vocab_size bigram_dim
    value_embed_layers value_embed_dim""".split()
# What a script computes with if it lacks these settings: those of presets/published.py, and those
# that older versions lack.
WITHOUT = {
    "caseops_enabled": True,
    "marker_fusion_enabled": False,
    "tie_embeddings": True,
    "smear_gate_enabled": True,
    "skip_gates_enabled": True,
    "ln_scale": True,
    "parallel_final_lane": "mean",
    "xsa_last_n": 11,
    "sparse_attn_gate_enabled": True,
    "gated_attn_enabled": False,
    "attn_out_gate_enabled": False,
    "attn_window": 0,
    "partial_key_offset": False,
    "value_residual": "off",
    "bigram_vocab_size": 0,
    "value_embed_layers": "",
    "full_seq_len_at": 0.0,  # not of MEANING, but told: without it the lengths would change unseen
}


def gather_momentum(dist, muon):
    """Muon's momentum of every bank, complete; each rank holds a shard of it."""
    momentum = []
    for bank, buffer in zip(muon.banks, muon.momentum_buffers, strict=True):
        handle, full = dist.all_gather(buffer)
        handle.wait()
        momentum.append(full[: len(bank)])
    return momentum


def losses_of_ranks(dist, losses):
    """Every rank's shares of the steps' losses, (ranks, steps): their sums depend on the order."""
    handle, shares = dist.all_gather(torch.stack(losses)[None])
    handle.wait()
    return shares


def share_losses(shares, dist):
    """What losses_of_ranks returned on any number of ranks -> (steps,), this rank's shares.

    Of another number rank 0 takes the sums. Older versions kept the sums, (steps,).
    """
    shares = torch.atleast_2d(shares)
    if len(shares) == dist.world_size:
        return shares[dist.rank]
    sums = shares.sum(0)
    return sums if dist.rank == 0 else torch.zeros_like(sums)


def save_losses(losses, path):
    """A full disk is no reason to end a run whose training is complete."""
    data = io.BytesIO()
    np.save(data, losses)
    with contextlib.suppress(OSError):
        train_gpt.write_atomically(path, data.getvalue())


def save_state(trainer, step, seconds, losses, name=None):
    """Writes all that training continues from to the run's folder, as <sha256><torch.save>.

    step (the loader's position too), seconds, losses, weights, average, momentum of all ranks,
    AdamW's moments, state of the random numbers, looping state and where its stretches began. Rank
    0 writes, and keeps the newest two. A full disk is reported and ends nothing.
    """
    dist = trainer.dist
    log = trainer.log
    name = name or f"state-{step:08d}.pt"
    state = {
        "settings": dataclasses.asdict(trainer.hp),
        "step": step,
        "seconds": seconds,
        "losses": losses_of_ranks(dist, losses),
        "weights": trainer.model.state_dict(),
        "average": trainer.ema.average,
        "snapshots": getattr(trainer.ema, "snapshots", 0),  # presets/published.py
        "momentum": gather_momentum(dist, trainer.optimizers.muon),
        "adamw": trainer.optimizers.adamw.state_dict()["state"],
        "rng": torch.get_rng_state(),
        "looping": trainer.looping,
        "tokens_at": trainer.loop_starts,
    }
    if dist.rank != 0:
        return
    try:
        train_gpt.write_atomically(log.folder / name, sealed(state))
    except OSError as error:
        log(f"note: {name} could not be written: {error}")
        return
    for old in state_files(log.folder)[KEPT_STATES:]:
        old.unlink()
    log(f"step:{step} state:{name}")
    if kept := state_files(log.folder):
        hint = command(trainer.hp, dist, log.folder, kept[0], resume=True)
        trainer.guard.resume_hint = hint


def sealed(state):
    """A state as bytes <sha256><torch.save>.

    In one buffer: copies of a gigabyte would hold Python's lock for seconds.
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
    """Name and content of the newest complete training state.

    Incomplete ones are passed over. Raises SafetyError if none is complete.
    """
    for path in state_files(folder):
        data = path.read_bytes()
        digest = data[:STATE_DIGEST_BYTES]
        content = data[STATE_DIGEST_BYTES:]
        if content and hashlib.sha256(content).digest() == digest:
            return path.name, content
    raise SafetyError(
        f"{folder} holds no complete training state (state-*.pt), which RESUME=1 needs"
    )


class Resumed(NamedTuple):
    """Where a resumed training goes on."""

    step: int
    seconds: float
    losses: list


def load_state(trainer):
    """Resumes from the newest complete state in the run's folder on rank 0 -> Resumed.

    Only tensors and numbers are read, never code (torch.load with weights_only). Raises
    SafetyError where there is no such state, or it does not fit the settings.
    """
    dist, folder = trainer.dist, trainer.log.folder
    name, data = newest_state(folder) if dist.rank == 0 else ("", b"")
    size = int(dist.max_over_ranks(len(data))[0])
    box = torch.frombuffer(bytearray(data or size), dtype=torch.uint8)
    dist.broadcast(box)
    try:
        state = torch.load(io.BytesIO(box.numpy()), map_location="cpu", weights_only=True)
        resumed = restore(trainer, state)
    except Exception as error:  # whatever a forged file makes torch raise
        raise SafetyError(f"{name} does not fit these settings: {error!r:.300}") from None
    if dist.rank == 0:  # until the next state is written, a failure points to this one
        hint = command(trainer.hp, dist, folder, folder / name, resume=True)
        trainer.guard.resume_hint = hint
    trainer.log(f"step:{resumed.step} resumed:{name} train_seconds:{resumed.seconds:.2f}")
    return resumed


def restore(trainer, state):
    """Puts a training state into the trainer -> Resumed. Raises whatever a bad state causes."""
    dist = trainer.dist
    ema = trainer.ema
    muon = trainer.optimizers.muon
    adamw = trainer.optimizers.adamw
    trainer.model.load_state_dict(state["weights"])
    for buffer, full in zip(muon.momentum_buffers, state["momentum"], strict=True):
        shards = muon.padded(full).chunk(dist.world_size)
        buffer.copy_(shards[dist.rank])
    for average, saved in zip(ema.average, state["average"], strict=True):
        average.copy_(saved)
    ema.snapshots = int(state["snapshots"])
    adamw.load_state_dict(adamw.state_dict() | {"state": state["adamw"]})
    torch.set_rng_state(state["rng"])
    losses = list(share_losses(state["losses"], dist).to(dist.device))
    float(losses[-1])  # raises unless there is a loss, and it is a number
    trainer.looping = bool(state["looping"])
    trainer.loop_starts = [(int(begun), float(used)) for begun, used in state["tokens_at"]]
    return Resumed(int(state["step"]), float(state["seconds"]), losses)


def settings_of_file(path, hp):
    """Settings {field: value} that a file to continue from was made with; {} if nothing says it.

    A checkpoint or a training state holds them. An artifact does not, because its bytes count (it
    says whether markers were fused, see train_gpt.rebuild_model): then they are read from the
    model.pt beside it, or else from the log beside it.
    """
    if hp.resume:
        content = path.read_bytes()[STATE_DIGEST_BYTES:]
        state = torch.load(io.BytesIO(content), weights_only=True)
        return state.get("settings", {})
    checkpoint = path if hp.quant_only else path.with_name("model.pt")
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return saved.get("settings", {})
    log = path.with_name("log.txt")
    if not log.is_file():
        return {}
    texts, _ = read_settings(log.read_text(encoding="utf-8").splitlines())  # the last table wins
    types = {name: type(value) for name, value in WITHOUT.items()}
    types |= {field.name: field.type for field in dataclasses.fields(hp)}
    settings = {}
    for name, kind in types.items():
        text = texts.get(name.upper())
        if text is not None:
            settings[name] = bool(int(text)) if kind is bool else kind(text)
    return settings


def compare_settings(path, hp):
    """Compares the settings of a file to continue from -> list of problems, phrase for the log.

    Settings that give the weights another meaning are a problem, because the file would load and
    score something else in silence. Other differences are noted. A damaged file is no problem here:
    the error comes where the weights are read.
    """
    try:
        settings = settings_of_file(path, hp)
        ours = WITHOUT | vars(hp)
        theirs = WITHOUT | settings
        other = {name: value for name, value in theirs.items() if ours.get(name, value) != value}
    except Exception:  # whatever a damaged file makes torch raise
        return [], ""
    if not settings:
        note = f"nothing says which settings {path} was made with; they must be the same"
        return [], f"\nnote: {note} (MARKER_FUSION_ENABLED was 0 by default before 2026-11-29)"

    def describe(names):
        words = [f"{name.upper()}={ours[name]} ({other[name]} there)" for name in names]
        return ", ".join(words)

    changed = [name for name in other if name in MEANING]
    if changed:
        return [
            f"{path} holds a model of other settings: {describe(changed)}: set them as they are"
            " there"
        ], ""
    noted = [name for name in other if name.upper() not in OF_A_PART]
    note = f"\nnote: settings other than those of {path}: {describe(noted)}"
    return [], note if noted else ""


def command(hp, dist, folder, whole, **mode):
    """How to continue from a complete file of a run's folder: a sentence with a shell command.

    mode: the setting that continues from such a file, as resume=True.
    """
    (mode_name,) = (name.upper() for name in mode)
    changes = {"run_id": folder.name, "resume": False, "prequant_only": False} | mode
    hp = dataclasses.replace(hp, **changes)
    words = [f"{whole} is complete; {mode_name}=1 continues from it:"]
    for field in dataclasses.fields(hp):
        value = getattr(hp, field.name)
        if value != field.default:
            text = str(int(value) if field.type is bool else value)
            words.append(f"{field.name.upper()}={shlex.quote(text)}")
    if dist.world_size > 1:
        words.append(f"torchrun --standalone --nproc_per_node={dist.world_size}")
    else:
        words.append("python")
    return " ".join([*words, shlex.quote(sys.argv[0])])


# ---- DIVERGENCE ----------------------------------------------------------------------------------


class Norms(NamedTuple):
    """What is watched in one step: names, and their norms on the way to the CPU."""

    names: list
    values: torch.Tensor


def watched(model, loss):
    """Loss and gradients of a step -> Norms."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = torch.stack([loss, *torch._foreach_norm([*grads.values()])])
    names = ["loss", *(f"gradient of {name}" for name in grads)]
    return Norms(names, norms.to("cpu", non_blocking=True))


def not_finite(norms):
    """Names of what is not finite. Ask when the step has ended: then reading does not block."""
    named = zip(norms.names, norms.values.tolist(), strict=True)
    return [name for name, norm in named if not math.isfinite(norm)]


def check_weights(trainer, step):
    """Ends training on every rank if a weight is not finite. Waits for the device."""
    named = trainer.model.named_parameters()
    if bad := [name for name, p in named if not p.isfinite().all()]:
        diverge(trainer, step, bad)


def diverge(trainer, step, names):
    """Ends training on every rank, naming what is not finite after this step.

    diverged.pt keeps the state for inspection.
    """
    names_of_ranks = trainer.dist.all_gather_object(names)
    found = []
    for rank, names in enumerate(names_of_ranks):
        if names:
            found.append(f"{', '.join(names[:3])} (rank {rank})")
    save_state(trainer, step, 0.0, [torch.zeros(())], "diverged.pt")
    raise SafetyError(
        f"training diverged: after step {step} not finite: {'; '.join(found)}; lower learning rates"
    )


# ---- SIGNALS AND FAILURES ------------------------------------------------------------------------


def catch_signals(guard):
    """The first SIGTERM, SIGINT or SIGHUP ends the run by stop_for, a second one at once.

    During training the first one waits for the end of the step. A lost connection or a closed
    window sends SIGHUP, often twice, so it is never taken for the second signal. If it was ignored
    when the process started (nohup), it stays ignored.
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
    """Ends this process after a signal: one line from rank 0, exit code 128 + number."""
    reason = f"stopped by {signal.Signals(number).name}"
    # torchrun sends SIGTERM also when another rank has died
    if guard.watchdog and not guard.signals_wait:
        guard.watchdog.fail(reason)
    if guard.dist.rank == 0:
        guard.tell(f"{reason} in stage {guard.stage}. {guard.resume_hint}")
    leave(128 + number)


def tell_failure(guard, error):
    """Reports where a run failed and what it can continue from; a refusal needs no traceback.

    With several ranks this ends the process, once it is known which rank failed first.
    """
    expected = isinstance(error, train_gpt.OUR_ERRORS)
    reason = str(error) if expected else f"{type(error).__name__}: {error}"
    refused_by_all = expected and guard.stage == "start"
    if guard.watchdog and not refused_by_all:
        if not expected:
            traceback.print_exception(error)
        guard.watchdog.fail(reason)
    if guard.stage != "start":
        guard.tell(f"failed in stage {guard.stage}: {reason}. {guard.resume_hint}")


# ---- WATCHDOG ------------------------------------------------------------------------------------


class Process(NamedTuple):
    """One process of one host, whatever other process gets its number later."""

    host: str
    pid: int
    started: str


class Failure(NamedTuple):
    """Why a rank failed; order: 1 for the first rank that did."""

    order: int
    message: str
    signal: int


class News(NamedTuple):
    """What a rank publishes each second."""

    time: float
    cpu_ticks: int  # of the rank and its programs, see cpu_ticks
    num_collectives: int  # that it has entered
    stage: str
    error: Failure | None
    process: Process

    @classmethod
    def read(cls, text):
        """From JSON, which keeps tuples as lists."""
        *numbers, error, process = json.loads(text)
        return cls(*numbers, error and Failure(*error), Process(*process))


class Watchdog(threading.Thread):
    """Ends this process with a line that names rank and stage if another one dies, fails or stalls.

    Each second every rank publishes its News in the process group's store. A rank is dead after
    DEAD looks without news, or after STALLED looks if its process is seen to live on this host,
    because a library may hold Python's lock. A rank stalls if it enters no collective and uses
    next to no CPU in STALLED looks, while others have entered more. Looks are counted instead of
    seconds, so that no rank is missed where all are held up alike, by a compiler that holds
    Python's lock or by a machine that sleeps.
    """

    DEAD = 15
    DEAD_AFTER_FAILURE = 3
    STALLED = 40
    STOPPING = 20  # seconds in which a step ends and a state is written
    # of 10 ms each: this thread and idle libraries use less, including a short burst of work
    IDLE_TICKS = 4 * STALLED

    def __init__(self, guard, store):
        super().__init__(daemon=True)
        self.guard = guard
        self.dist = guard.dist
        self.store = store
        self.error = None  # this rank's Failure
        self.done = threading.Event()
        pid = os.getpid()
        self.process = Process(host_id(), pid, process_state(pid)[1])
        self.disk_ticks = 0  # time in which this rank waited for a disk
        self.tell()  # before anything can go wrong: the others wait for a first sign of life
        self.holder = News.read(store.get("golf/rank0"))  # rank 0's last news
        self.start()

    def tell(self):
        """Publishes this rank's news; called each second and at the start of every stage."""
        waits_for_disk = process_state(os.getpid())[0] == "D"
        self.disk_ticks += 100 * waits_for_disk  # counts as work: it may be saving
        news = News(
            time=time.time(),
            cpu_ticks=cpu_ticks() + self.disk_ticks,
            num_collectives=self.dist.num_collectives,
            stage=self.guard.stage,
            error=self.error,
            process=self.process,
        )
        self.store.set(f"golf/rank{self.dist.rank}", json.dumps(news))

    def fail(self, message):
        """Called by a rank that failed: ends the process once it is known who failed first."""
        with contextlib.suppress(RuntimeError):  # the store is gone: the thread finds that as well
            if self.error is None:
                order = self.store.add("golf/failures", 1)
                self.error = Failure(order, message, self.guard.signal)
        self.join(self.DEAD)

    def run(self):
        keys = [f"golf/rank{rank}" for rank in range(self.dist.world_size)]
        past = collections.deque(maxlen=self.STALLED + 1)  # each a list of all ranks' News
        silent = [0] * len(keys)  # looks without news of each rank
        failing = 0  # looks since the first failure
        found = None
        while not found and not self.done.wait(1.0):
            told = self.look(keys)
            before = past[-1] if past else told
            for rank, news in enumerate(told):
                silent[rank] = silent[rank] + 1 if news.time == before[rank].time else 0
            past.append(told)
            failing += any(news.error for news in told)
            self.holder = told[0]
            idle = [self.idles(past, rank) for rank in range(len(keys))]
            found = self.judge(told, silent, idle, failing)
        if found:
            rank, words = found
            error, process = told[rank].error, told[rank].process
            hung = process if silent[rank] >= self.DEAD_AFTER_FAILURE else None
            self.end(f"rank {rank} {words}", hung, error.signal if error else 0)

    def look(self, keys):
        """Publishes this rank's news and reads the News of all ranks."""
        answered = threading.Event()
        threading.Thread(target=self.await_store, args=[answered], daemon=True).start()
        try:
            self.tell()
            told = [News.read(text) for text in self.store.multi_get(keys)]
        except RuntimeError as error:
            self.end_without_store(f"{error!r:.80}")
        answered.set()
        return told

    def await_store(self, answered):
        """Ends this process if the store does not answer.

        A store whose process is frozen answers nothing, and its client would wait for ever. Waits
        are counted like looks: where Python's lock was held for long, the answer may have arrived
        and gets its turn.
        """
        if not any(answered.wait(1.0) for _ in range(2 * self.DEAD)):
            self.end_without_store("it does not answer")

    def end_without_store(self, why):
        """Ends this process because the store's holder, torchrun or rank 0, has died or hangs."""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if agent and self.guard.signal and self.guard.signals_wait:
            # torchrun ended after it had passed the signal on: the run ends by itself, with a
            # training state (see after_step)
            time.sleep(self.STOPPING)
        holder = "torchrun" if agent else "rank 0"
        verdict = (
            f"{holder} died or hangs, last heard of in stage {self.holder.stage};"
            f" it holds the store: {why}"
        )
        self.end(verdict, None if agent else self.holder.process)

    def end(self, verdict, hung=None, number=0):
        """Ends this process with a verdict, and the process `hung` if it lives on this host.

        number: signal that ended the other rank, 0 for none; this one ends by the same.
        """
        if self.done.is_set():
            return
        if self.dist.rank == 0:
            time.sleep(2.5)  # it may hold the store, in which the others are to find the same
        self.guard.tell(
            f"{verdict}. Rank {self.dist.rank} ends in stage {self.guard.stage}."
            f" {self.guard.resume_hint}"
        )
        # a frozen process would stay; torchrun takes 30 s to end it
        if hung and lives(*hung, states="RSDTt"):
            os.kill(hung.pid, signal.SIGKILL)
        number = self.guard.signal or number
        leave(128 + number if number else 1)

    def idles(self, past, rank):
        """Has a rank entered no collective and used next to no CPU in STALLED looks?

        The CPU time includes programs that the rank started; it falls when one ends.
        """
        if len(past) <= self.STALLED:
            return False
        first, last = past[0][rank], past[-1][rank]
        used = last.cpu_ticks - first.cpu_ticks
        return last.num_collectives == first.num_collectives and 0 <= used < self.IDLE_TICKS

    def judge(self, told, silent, idle, failing):
        """Which rank ends the run, and why -> (rank, words), or None.

        told: News of the ranks; silent: looks without news of each; idle: whether each idles;
        failing: looks since the first failure. A rank that lost its peer fails as well, so dead
        ranks are looked for first, then the one that failed first.
        """
        furthest = max(news.num_collectives for news in told)
        limit = self.DEAD_AFTER_FAILURE if failing else self.DEAD
        for rank, news in enumerate(told):
            if silent[rank] >= limit:
                if silent[rank] >= self.STALLED or not lives(*news.process):
                    return rank, f"died or hangs in stage {news.stage}"
            elif idle[rank] and news.num_collectives < furthest:
                return rank, f"stalls in stage {news.stage}, the others wait for it"
        if failing > self.DEAD_AFTER_FAILURE + 1:
            failed = [rank for rank, news in enumerate(told) if news.error]
            first = min(failed, key=lambda rank: told[rank].error.order)
            return first, f"failed in stage {told[first].stage}: {told[first].error.message}"
        return None


def host_id():
    """A text that is equal for processes that see each other's numbers; "" without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def stat_fields(pid):
    """The fields of /proc/<pid>/stat after the program's name. Raises OSError if it is gone."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def process_state(pid):
    """Letter of a process's state, and when it started; "" and "" if it is gone."""
    try:
        fields = stat_fields(pid)
    except OSError:
        return "", ""
    return fields[0], fields[19]


def lives(host, pid, started, states="RSD"):
    """Is this very process on this host, and neither ended nor frozen?"""
    if host != host_id():
        return False
    state, since = process_state(pid)
    return bool(state) and since == started and state in states


def children():
    """Numbers, as text, of the programs that this process has started and that run."""
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
            user, system = stat_fields(pid)[11:13]
            total += int(user) + int(system)
    return total


def leave(code):
    """Ends this process at once, whatever its threads wait for, and the programs it started."""
    for pid in children():
        with contextlib.suppress(OSError):
            os.kill(int(pid), signal.SIGTERM)
    time.sleep(0.2)  # in which the threads that waited for them remove their temporary files
    sys.stdout.flush()
    os._exit(code)


# ---- CHECKS OF THE MACHINE, BEFORE THE CLOCK STARTS ----------------------------------------------

# of the packed script that every run counts
PACKAGES = {"brotli": "brotli", "python-minifier": "python_minifier"}
FAST_COMPRESSORS = ("entropy",)  # 5 MB/s or more; the others take minutes for a complete model
TRIAL_ROWS = 8
# an artifact of trained weights has 0.99 of the projected size, one of other statistics may have
# less
GENEROUS = 0.8
GAUSSIAN_BITS = math.log2(math.sqrt(2 * math.pi * math.e))  # entropy of a unit Gaussian, steps of 1
STATE_BYTES_A_WEIGHT = 20  # weights, average, momentum and both moments, fp32


def check_machine(hp, dist, folder=None, model=None):
    """Checks this machine against the settings -> phrases for the log.

    Packages are checked on every rank; on rank 0 also the run's folder, and with a model a round
    trip of random weights through the compressor, the budgets and the size of the artifact to come.
    Raises SafetyError with all problems.
    """
    problems = []
    phrases = []
    missing = [
        name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        problems.append(f"not installed: {' '.join(missing)} (docs/INSTALL.md)")
    if train_gpt.compile_wanted(hp, dist) and (missing := missing_compiler(dist.device.type)):
        problems.append(f"torch.compile needs {missing}: apt-get install g++, or set COMPILE=0")
    if model is not None and not dist.rank:  # problems of the model were reported already
        if folder is not None:
            more, phrase = check_folder(folder, model, hp)
            problems += more
            phrases.append(phrase)
        more, of_budgets = check_budgets(model, hp)
        problems += more
        phrases = of_budgets + phrases
    raise_all(problems)
    return " ".join(phrases).rstrip()


def raise_all(problems):
    if problems:
        raise SafetyError("\n".join(problems))


def missing_compiler(device):
    """What torch.compile lacks on a "cpu" or "cuda" device; None if its compiler is there.

    On the CPU its kernels are C++, on a GPU Triton builds a launcher in C for each of them.
    """
    variable, names = ("CC", ("gcc", "clang", "cc")) if device == "cuda" else ("CXX", ("g++",))
    if os.environ.get(variable):
        names = (os.environ[variable],)
    if any(map(shutil.which, names)):
        return None
    return f"a compiler, and there is no {' or '.join(names)}"


# -- the run's folder


def check_folder(folder, model, hp):
    """Room and permission for the run's folder, and the file that a run continues from.

    -> list of problems, phrase for the log.
    """
    problems = []
    phrase = ""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        problems.append(f"{place} cannot be written to: set RUNS_DIR, or change its permissions")
    if hp.skips_training:
        name = hp.artifact_path or folder / "artifact.bin"
        if hp.quant_only:
            name = hp.checkpoint_path or folder / "model.pt"
        if Path(name).is_file():
            more, phrase = compare_settings(Path(name), hp)
            problems += more
        else:
            problems.append(
                f"{name} does not exist: set the RUN_ID of a finished run, or the file's own path"
            )
    ended = hp.skips_training or hp.resume or (folder / "model.pt").exists()
    # a run writes the script first: without it, it was stopped before it had anything to lose
    if (folder / "train_gpt.py").exists() and not ended:
        # a run that ended before its first state cannot be resumed
        way = ", or go on with RESUME=1" if state_files(folder) else ""
        problems.append(f"{folder} holds a run that did not end: choose another RUN_ID{way}")
    wanted = wanted_bytes(model, hp)
    free = shutil.disk_usage(place).free
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


def wanted_bytes(model, hp):
    """How much a run may write to its folder: model.pt, states, artifact, code and log."""
    states = KEPT_STATES + 1 if hp.checkpoint_every else 1
    if hp.skips_training:
        states = 0
    num_weights = sum(p.numel() for p in model.parameters())
    return num_weights * (4 + STATE_BYTES_A_WEIGHT * states) + 50_000_000


def lock(folder):
    """Locks a run's folder until this process ends -> the file that must stay open.

    Raises SafetyError if another run has it.
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


# -- budgets, the compressor, the artifact's size


def check_budgets(model, hp):
    """Budgets that cannot hold, an artifact that cannot fit, a compressor that fails.

    -> list of problems, list of phrases for the log.
    """
    problems = []
    phrases = []
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
        if seconds > 2 * hp.eval_budget_seconds:  # twice: the machine may have been busy
            problems.append(
                f"EVAL_BUDGET_SECONDS={hp.eval_budget_seconds}: unpacking takes about {seconds:.0f}"
                " s here"
            )
    except SafetyError as error:
        problems.append(str(error))
    problems += target_problems(hp)
    size = projected_bytes(model, hp)
    cap = train_gpt.BYTE_CAP
    phrases.insert(0, f"projected_artifact_bytes:{size}")
    about = f"the artifact will have about {size:,} bytes, the cap is {cap:,}"
    smallest = size
    if hp.target_bytes:  # clips twice as wide are one bit less a code, and as far as anyone goes
        smallest -= sum(weight.numel() for weight in model.parameters()) / 8
    if GENEROUS * smallest > cap:
        problems.append(
            f"{about}: take fewer weights or wider clips (..._CLIP_SIGMAS), or TARGET_BYTES, which"
            " makes them up to twice as wide"
        )
    elif size > cap and hp.target_bytes:
        phrases.append(f"\nnote: {about}: TARGET_BYTES will widen the clips, which costs BPB")
    elif size > cap:
        phrases.append(f"\nnote: the artifact may not fit: {about}")
    if 0 < hp.target_bytes < GENEROUS * smallest:
        phrases.append(
            f"\nnote: {about}: for TARGET_BYTES={hp.target_bytes} clips become more than twice as"
            " wide, which costs much BPB, and may not do"
        )
    return problems, phrases


def target_problems(hp):
    """Yields a message for a TARGET_BYTES that the code alone fills."""
    script = Path(train_gpt.__file__)
    if 0 < hp.target_bytes < script.stat().st_size:  # else it needs no packing, which takes seconds
        size = len(packed_code(script.read_bytes(), hp))
        if hp.target_bytes <= size:
            yield f"TARGET_BYTES={hp.target_bytes}: must be 0, or above the code's {size} bytes"


def projected_bytes(model, hp):
    """Size of the artifact from shapes and settings alone.

    Matrices are taken for Gaussian rows coded at their entropy, small tensors for fp16.
    """
    bits = 0.0
    for name, weight in model.named_parameters():
        kind = "mlp" if name.startswith("mlp") else "attn"
        code_bits = hp.matrix_bits
        if name in ("tok_emb", "lm_head"):
            kind = "embed"
            code_bits = hp.embed_bits
        if kind != "embed" and not name.endswith("_bank"):
            bits += 16 * weight.numel()
            continue
        largest_code = 2 ** (code_bits - 1) - 1
        step = getattr(hp, f"{kind}_clip_sigmas") / largest_code  # in standard deviations
        bits += max(0.0, GAUSSIAN_BITS - math.log2(step)) * weight.numel()
        bits += 16 * weight.numel() / weight.shape[-1]  # scales of rows
    return round(bits / 8)


def trial_arrays(model, hp):
    """Random weights in the form that quantize_weights gives -> arrays, share of all elements.

    Names, fields and small tensors are the run's, but for the few and small fields of LQER
    (presets/published.py). Of the matrices of one shape the first is complete if the coder is fast;
    all others have few rows.
    """
    generator = torch.Generator().manual_seed(1)
    weights = train_gpt.unbank(model)
    arrays = {}
    seen = set()
    for name, weight in weights.items():
        role = train_gpt.quant_role(name)
        shape = tuple(weight.shape)
        if role is None:
            fields = train_gpt.quantize_small(name, torch.randn(shape, generator=generator))
        else:
            first = shape not in seen
            complete = first and hp.compressor in FAST_COMPRESSORS
            rows = shape[0] if complete else min(TRIAL_ROWS, shape[0])
            fields = trial_codes(role, rows, shape[1], hp, generator)
            seen.add(shape)
        arrays |= {f"{name}:{field}": value.numpy() for field, value in fields.items()}
    elements = sum(array.size for array in arrays.values())
    return arrays, elements / sum(weight.numel() for weight in weights.values())


def trial_codes(role, rows, columns, hp, generator):
    """Codes, scales and column steps of a random matrix (rows, columns)."""
    largest_code = 2 ** (getattr(hp, role.bits) - 1) - 1
    deviation = largest_code / getattr(hp, role.clip_sigmas)
    codes = torch.randn(rows, columns, generator=generator) * deviation
    codes = codes.round_().clamp_(-127, 127)
    scale = torch.rand(rows, generator=generator)
    fields = {"codes": codes.to(torch.int8), "scale": scale.half()}
    if hp.gptq_column_steps:
        fields["scale"] = train_gpt.to_log2_eighths(scale)
        fields["column_steps"] = train_gpt.to_log2_eighths(torch.ones(columns))
        if hp.gptq_trellis:
            fields["trellis"] = torch.ones((), dtype=torch.int8)
    return fields


def try_packing(model, hp):
    """Packs, unpacks and dequantizes random weights.

    -> phrase for the log, least seconds that unpacking takes. Raises SafetyError if that fails or
    gives other values.
    """
    arrays, share = trial_arrays(model, hp)
    try:
        start = time.perf_counter()
        blob = train_gpt.pack_weights(arrays, hp.compressor)
        packed = time.perf_counter()
        found = train_gpt.unpack_weights(blob)
        unpacked = time.perf_counter()
        train_gpt.dequantize_weights(found)
    except Exception as error:  # whatever a library that does not work raises
        raise SafetyError(
            f"COMPRESSOR={hp.compressor} failed on random weights: {error!r:.300}"
        ) from None
    wrong = sorted(arrays.keys() ^ found.keys())
    if not wrong:
        wrong = [name for name in arrays if not equal_arrays(arrays[name], found[name])]
    if wrong:
        raise SafetyError(
            f"COMPRESSOR={hp.compressor} gave back other values than it got: {', '.join(wrong[:3])}"
        )
    seconds = unpacked - packed
    phrase = (
        f"trial_packing share:{share:.3f} pack_seconds:{packed - start:.2f}"
        f" unpack_seconds:{seconds:.2f}"
    )
    return phrase, seconds / share if hp.compressor in FAST_COMPRESSORS else seconds


def entropy_bytes(codes):
    """Order-0 entropy of one array of codes, its histogram for free."""
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    return -codes.size * float(shares @ np.log2(shares)) / 8


def group_bytes(arrays):
    """Arrays of quantize_weights -> {role: bytes}, largest first.

    Bytes of codes are their order-0 entropy; "rest" is everything else.
    """
    sizes = collections.defaultdict(float)
    for key, array in arrays.items():
        name, _, field = key.rpartition(":")
        role = train_gpt.quant_role(name)
        if role and field == "codes":
            sizes[role.group] += entropy_bytes(array)
        else:
            sizes["rest"] += array.nbytes
    return {role: round(sizes[role]) for role in sorted(sizes, key=sizes.get, reverse=True)}


def equal_arrays(a, b):
    return a.dtype == b.dtype and np.array_equal(a, b)


# ---- PRESET, CODE AND COMMIT ---------------------------------------------------------------------

CONTEST_SECONDS = 600.0  # limit of training, and of evaluation, in the contest's rules


def budget_notes(hp):
    """Notes for the log: budgets that are not the contest's."""
    budgets = {
        "MAX_WALLCLOCK_SECONDS": hp.max_wallclock_seconds,
        "EVAL_BUDGET_SECONDS": hp.eval_budget_seconds,
    }
    for name, value in budgets.items():
        if not 0 < value <= CONTEST_SECONDS:
            kind = "more" if value else "no limit"
            yield (
                f"{name}={value:g} is {kind}, the contest allows {CONTEST_SECONDS:g} s: "
                "violations are those of the budgets as set"
            )
    yield "the budget starts after the warm-up"


def preset_notes(hp):
    """Lines for the log: the preset's settings, and what the environment sets otherwise."""
    given = read_preset(hp.preset)
    other = []
    for field in dataclasses.fields(hp):
        name, value = field.name.upper(), getattr(hp, field.name)
        if name not in given:
            continue
        text = given[name]
        if value != (text == "1" if field.type is bool else field.type(text)):
            other.append(f"{name}={value} (preset {text})")
    settings = " ".join(f"{name}={value}" for name, value in given.items())
    return [
        f"preset {hp.preset}: {settings}",
        f"preset {hp.preset}, set otherwise: {', '.join(other) or 'nothing'}",
    ]


def packed_code(script, hp):
    """A script's bytes -> its packed, self-extracting form with these settings, bytes."""
    try:
        from .pack_code import pack_code
    except ImportError as error:
        raise SettingError(
            f"the code cannot be packed and counted: {error}. Run train_gpt.py from its repository,"
            " after pip install -r requirements.txt, or copy a run's packed train_gpt.py"
        ) from None
    return pack_code(script.decode(), {name.upper(): value for name, value in vars(hp).items()})


def git_commit():
    """The checkout's commit, with + if files differ from it; None outside a checkout."""
    commit, _ = describe_commit() or ("", "")
    return commit or None


def describe_commit():
    """Standard output and error of git on this checkout; None without git."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*"]
    if not shutil.which("git"):
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip(), done.stderr.strip()


def commit_notes():
    """Notes for the log if git does not know the commit: such a run can make no record."""
    commit, error = describe_commit() or ("", "git is not installed")
    if commit or not (ROOT / ".git").exists():
        return []
    if "dubious ownership" in error:  # as in a container, where the folder belongs to another user
        return [
            f"commit unknown, {ROOT} belongs to another user: git config --global --add"
            f" safe.directory {ROOT}"
        ]
    reason = error.splitlines()[0] if error else "no commit yet"
    return [f"commit unknown, no record can be made of this run: {reason}"]


# ---- LIVE LINE -----------------------------------------------------------------------------------


class LiveLine:
    """The running stage, its bar and the seconds left; print `erase` before anything else."""

    erase = "\r\x1b[K"

    def __init__(self):
        self.shown = 0.0
        self.stage = None

    def show(self, name, start, share, detail):
        """Shows a new stage at once, else five times a second.

        start: when the stage began (perf_counter); share: how much of it is done; detail: words.
        """
        now = time.perf_counter()
        if self.stage == (name, start) and now - self.shown <= 0.2:
            return
        self.shown = now
        self.stage = (name, start)
        bar = "..."
        if share:
            left = (now - start) * (1 / share - 1)
            bar = f"[{'#' * round(30 * share):.<30}] {share:4.0%}  {left:.0f} s left  {detail}"
        width = shutil.get_terminal_size().columns - 1
        print(self.erase + f"{name} {bar}"[:width], end="", flush=True)
