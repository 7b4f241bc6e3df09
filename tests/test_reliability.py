"""Faults injected into runs, and what is promised of each (docs/RELIABILITY.md).

SOAK=1, as in `make soak`: all.

`make test` takes a sample, another one in each run; a failure shows which.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import faults
import pytest
import torch
from conftest import HERE, PATIENCE, Lines, install_parts_for, tell, tiny_hp
from fault_helpers import (
    check_rank_fault,
    commands,
    comparable,
    end_in_a_minute,
    loss_lines,
    output,
    tidy,
)
from training_helpers import OPS, SMALL, equal_states, everything, rank_of, run_on_ranks

import presets.published
import train_gpt
from tools import guard
from tools.pack_code import pack_code
from tools.run_files import read_run
from train_gpt import SettingError

pytest.importorskip("brotli")
pytest.importorskip("sentencepiece")
torch.set_num_threads(1)
SOAK = os.environ.get("SOAK") == "1"
SEED = random.randrange(2**32)
soak = pytest.mark.skipif(not SOAK, reason="make soak")


class FolderLog(Lines):
    """Stands in for RunLog, with a folder."""

    def __init__(self, folder):
        super().__init__()
        self.folder = Path(folder)


def trainer_of(data, folder, dist=None, **changes):
    hp, dist = (
        tiny_hp(data_path=str(data), **SMALL | {"iterations": 8} | changes),
        dist or train_gpt.Dist("cpu"),
    )
    loader = train_gpt.TrainLoader(train_gpt.TokenStream(hp.data_path, "train"), hp, dist)
    watching = guard.RunGuard()
    watching.dist = dist
    return train_gpt.Trainer(
        train_gpt.GPT(hp, OPS, torch.float32), loader, hp, dist, FolderLog(folder), watching
    )


class Cut(Exception):
    """The end of a process, as far as these trainers know."""


def train(trainer, cut=None):
    """-> losses of the steps, and figures; with `cut`, training breaks off before that step, as
    by a kill.
    """
    step, losses = trainer.train_step, []

    def watched(number, progress, looping):
        if number == cut:
            raise Cut
        losses.append((number, step(number, progress, looping).item()))
        return torch.tensor(losses[-1][1])

    trainer.train_step = watched
    try:
        return losses, trainer.train(None)
    except Cut:
        return losses, None


# ---- training states


@pytest.mark.parametrize(
    "changes",
    [{}, {"data_seed": 3, "grad_clip_norm": 0.0}, {"full_seq_len_at": 0.4}],
)
def test_training_goes_on_bit_for_bit_from_a_state(tiny_data, tmp_path, changes):
    """Losses, weights, average, momenta and the schedule, whatever the step at which training
    was cut.
    """
    (tmp_path / "whole").mkdir()
    whole = trainer_of(tiny_data, tmp_path / "whole", **changes)
    losses, figures = train(whole)
    cut = random.Random(SEED).randrange(3, 8)
    first = trainer_of(tiny_data, tmp_path, checkpoint_every=2, **changes)
    train(first, cut)
    states = sorted(path.name for path in tmp_path.glob("state-*"))
    last = cut - cut % 2
    assert states == [f"state-{step:08d}.pt" for step in (last - 2, last) if step], f"cut {cut}"
    torch.rand(5)  # the state of the random numbers is restored as well
    again = trainer_of(tiny_data, tmp_path, resume=True, run_id="x", **changes)
    went_on, same = train(again)
    assert went_on == losses[last:] and again.guard.resumed == {"resumed_at_step": last}
    assert same["train_loss"] == figures["train_loss"] and same["steps"] == figures["steps"]
    assert equal_states(everything(again), everything(whole))
    assert same["training_seconds"] > 0 and again.log[0].startswith(f"step:{last} resumed:state-")


def flip_a_bit(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "tear",
    [lambda data: data[: len(data) // 2], lambda data: b"", flip_a_bit, lambda data: data[:20]],
)
def test_a_torn_state_is_passed_over(tiny_data, tmp_path, tear):
    train(trainer_of(tiny_data, tmp_path, checkpoint_every=2), 7)
    older, newest = sorted(tmp_path.glob("state-*"))
    newest.write_bytes(tear(newest.read_bytes()))
    again = trainer_of(tiny_data, tmp_path, resume=True, run_id="x")
    step, seconds, losses = guard.load_state(again)
    assert step == 4 and seconds > 0 and len(losses) == 4
    older.write_bytes(tear(older.read_bytes()))
    with pytest.raises(ValueError, match="no complete training state"):
        guard.load_state(again)


def sealed(value):
    torch.save(value, buffer := io.BytesIO())
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


@pytest.mark.parametrize(
    "forged", [{}, {"weights": {}}, [1, 2], {"step": SimpleNamespace()}, "text", torch.zeros(3)]
)
def test_a_forged_state_is_refused_and_runs_no_code(tiny_data, tmp_path, forged):
    (tmp_path / "state-00000009.pt").write_bytes(sealed(forged))
    with pytest.raises(ValueError, match="does not fit these settings"):
        guard.load_state(trainer_of(tiny_data, tmp_path, resume=True, run_id="x"))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.path))}",)


def test_a_state_with_code_in_it_is_refused(tiny_data, tmp_path):
    mark = tmp_path / "evil"
    (tmp_path / "state-00000009.pt").write_bytes(sealed({"weights": Evil(mark)}))
    with pytest.raises(ValueError, match="does not fit"):
        guard.load_state(trainer_of(tiny_data, tmp_path, resume=True, run_id="x"))
    assert not mark.exists()


def test_a_disk_that_is_full_ends_no_training(tiny_data, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_gpt, "write_atomically", full)
    trainer = trainer_of(tiny_data, tmp_path, checkpoint_every=3)
    assert train(trainer)[1]["steps"] == 8
    assert sum("could not be written" in line for line in trainer.log) == 2


def test_a_log_on_a_full_disk_ends_nothing(tmp_path, dist, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    log = train_gpt.RunLog(tmp_path, dist)
    log.file.close()
    log.file = SimpleNamespace(write=full, flush=full)
    log("a line")
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.parametrize("kind", ["fsync", "replace"])
def test_a_file_is_whole_or_absent_and_nothing_is_left(tmp_path, monkeypatch, kind):
    train_gpt.write_atomically(tmp_path / "file", b"old")

    def broken(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(train_gpt.os, kind, broken)
        train_gpt.write_atomically(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (
        tmp_path / "file"
    ).read_bytes() == b"old"


def two_ranks_in_two_parts(dist, data, folder):
    whole = trainer_of(data, folder, dist)
    losses, figures = train(whole)
    train(trainer_of(data, folder, dist, checkpoint_every=4), 6)
    again = trainer_of(data, folder, dist, resume=True, run_id="x")
    went_on, same = train(again)
    return (
        went_on == losses[4:] and same["train_loss"] == figures["train_loss"],
        equal_states(everything(again), everything(whole)),
        everything(whole),
    )


def test_two_ranks_go_on_bit_for_bit_and_so_can_one(tiny_data, tmp_path):
    first, second = run_on_ranks(two_ranks_in_two_parts, 2, tmp_path, str(tiny_data), str(tmp_path))
    assert first[:2] == second[:2] == (True, True)
    alone = trainer_of(tiny_data, tmp_path, resume=True, run_id="x")
    train(alone)
    for name, tensor in everything(alone).items():
        if not name.startswith("momentum"):  # each rank had its own slices
            torch.testing.assert_close(tensor, first[2][name], rtol=2e-3, atol=2e-4)


def losses_in_two_parts(dist, data, folder):
    settings = {"train_batch_tokens": 3 * tiny_hp().micro_batch_tokens}
    whole = trainer_of(data, folder, dist, **settings)
    train(whole)
    train(trainer_of(data, folder, dist, checkpoint_every=4, **settings), 6)
    again = trainer_of(data, folder, dist, resume=True, run_id="x", **settings)
    train(again)
    return torch.stack(again.guard.losses).equal(torch.stack(whole.guard.losses))


def test_the_losses_of_three_ranks_go_on_bit_for_bit(tiny_data, tmp_path):
    """A third of a sum, added three times, is not always that sum."""
    same = run_on_ranks(losses_in_two_parts, 3, tmp_path, str(tiny_data), str(tmp_path))
    assert same == [True] * 3


@pytest.mark.parametrize("shares", [torch.rand(2, 5), torch.rand(5)])  # today, older versions
def test_the_losses_of_a_state_count_once_on_any_number_of_ranks(shares):
    sums = torch.atleast_2d(shares).sum(0)
    for world in (1, 2, 3):
        parts = [guard.share_losses(shares, rank_of(rank, world)) for rank in range(world)]
        torch.testing.assert_close(sum(parts), sums)


def logged_steps(lines):
    """(step, loss as text) of the lines of training.

    A step that was logged twice once, if it came to the same.
    """
    found = re.findall(r"^step:(\d+) train_loss:(\S+)", "\n".join(lines), re.MULTILINE)
    return sorted({(int(step), loss) for step, loss in found})


def test_a_resume_restores_the_random_numbers(tiny_data, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        train(trainer_of(tiny_data, tmp_path, checkpoint_every=2), 5)
        want = torch.rand(4)  # no step draws
        guard.load_state(trainer_of(tiny_data, tmp_path, resume=True, run_id="x"))
        assert torch.equal(torch.rand(4), want)


def test_the_clock_goes_on_from_the_seconds_of_the_state(tiny_data, tmp_path, monkeypatch):
    again = trainer_of(tiny_data, tmp_path, resume=True, run_id="x")
    state = guard.Resumed(6, 1e6, [torch.zeros(())])
    monkeypatch.setattr(again.guard, "resume", lambda *_: state)
    assert 1e6 < again.train(None)["training_seconds"] < 1e6 + PATIENCE


def test_training_goes_on_with_any_log_interval(tiny_data, tmp_path):
    """Also where the first step after the state is not logged, and past the next step that is."""
    settings = {"iterations": 25, "enable_looping_at": 0.25}  # looping from step 7 on
    (tmp_path / "whole").mkdir()
    whole = trainer_of(tiny_data, tmp_path / "whole", **settings)
    losses, figures = train(whole)
    train(trainer_of(tiny_data, tmp_path, checkpoint_every=10, **settings), 11)
    for interval in (1, 7, 100, 1000):
        again = trainer_of(
            tiny_data, tmp_path, resume=True, run_id="x", train_log_every=interval, **settings
        )
        went_on, same = train(again)
        assert went_on == losses[10:] and equal_states(everything(again), everything(whole))
        # the state's step comes first
        logged = {10, *range(10 // interval * interval + interval, 26, interval), 25}
        assert logged_steps(again.log) == [
            pair for pair in logged_steps(whole.log) if pair[0] in logged
        ]
        details = [detail for _, detail in again.log.shares]
        assert len(details) == 15 and not any("nan" in detail for detail in details)
        assert (
            [step for step, _ in again.loop_starts]
            == [step for step, _ in whole.loop_starts]
            == [0, 7]
        )
        rates = [len(result["tokens_per_second_by_loop_state"]) for result in (same, figures)]
        assert rates == [2, 2]  # of the whole training, not of what was left of it


def test_looping_that_begins_right_after_the_state_is_logged_and_timed(tiny_data, tmp_path):
    settings = {"iterations": 8, "enable_looping_at": 0.5}  # from step 4 on
    train(trainer_of(tiny_data, tmp_path, checkpoint_every=4, **settings), 4)
    again = trainer_of(tiny_data, tmp_path, resume=True, run_id="x", **settings)
    train(again)
    assert [step for step, _ in again.loop_starts] == [0, 4]
    assert sum(line.startswith("step:4 looping:1") for line in again.log) == 1


def test_the_snapshots_of_the_average_are_counted_on(tiny_data, tmp_path, published):
    """SWA_BELOW_LR: a count that began anew would drop all snapshots from before the state."""
    settings = {"swa_below_lr": 0.9, "swa_every": 1, "warmdown_frac": 1.0, "min_lr": 0.0}
    (tmp_path / "whole").mkdir()
    whole = trainer_of(tiny_data, tmp_path / "whole", **settings)
    train(whole)
    train(trainer_of(tiny_data, tmp_path, checkpoint_every=4, **settings), 5)
    again = trainer_of(tiny_data, tmp_path, resume=True, run_id="x", **settings)
    train(again)
    assert again.ema.snapshots == whole.ema.snapshots > 4
    assert equal_states(everything(again), everything(whole))


def test_an_evaluation_that_a_kill_cut_off_is_done_by_the_resume(tiny_data, tmp_path):
    settings = {"checkpoint_every": 4, "val_loss_every": 4}

    def killed():
        raise Cut

    with pytest.raises(Cut):
        trainer_of(tiny_data, tmp_path, **settings).train(killed)
    again, evaluated = trainer_of(tiny_data, tmp_path, resume=True, run_id="x", **settings), []
    again.train(lambda: evaluated.append(logged_steps(again.log)[-1][0]))
    assert evaluated == [4, 8]


def test_a_failure_after_a_resume_is_told_with_the_state(tiny_data, tmp_path):
    train(trainer_of(tiny_data, tmp_path, checkpoint_every=4), 5)
    again = trainer_of(tiny_data, tmp_path, resume=True, run_id="x")
    guard.load_state(again)
    assert again.guard.resume_hint.startswith(
        f"{tmp_path}/state-00000004.pt is complete; RESUME=1 continues from it: "
    )


# ---- numbers that are not finite


def poison(trainer, step, what):
    """A weight, or a single gradient, becomes NaN or inf in a step of training."""
    train_step = trainer.train_step

    def poisoned(number, progress, looping):
        if number == step and what == "weight":
            with torch.no_grad():
                trainer.model.attn_scale[1, 3] = math.nan
        if number == step and what == "gradient":
            trainer.model.mlp_up_bank.register_hook(
                lambda grad: grad.index_fill(0, torch.tensor([0]), math.inf)
            )
        return train_step(number, progress, looping)

    trainer.train_step = poisoned


@pytest.mark.parametrize(
    "what, named", [("weight", "loss"), ("gradient", "gradient of mlp_up_bank")]
)
@pytest.mark.parametrize("step", [0, 4, 6, 7])
def test_what_is_not_finite_ends_training_within_two_steps(tiny_data, tmp_path, what, named, step):
    trainer = trainer_of(tiny_data, tmp_path, checkpoint_every=1)
    poison(trainer, step, what)
    with pytest.raises(
        SettingError, match=f"training diverged: after step {step + 1} not finite: "
    ) as error:
        trainer.train(None)
    assert step == 7 or named in str(error.value) or "bank" in str(error.value)
    states = sorted(path.name for path in tmp_path.iterdir())
    assert states == [
        "diverged.pt",
        *(f"state-{number:08d}.pt" for number in (step - 1, step) if number > 0),
    ]
    again = trainer_of(tiny_data, tmp_path, resume=True, run_id="x")
    if step:  # the states that are kept are good ones
        assert guard.load_state(again)[0] == step and all(
            p.isfinite().all() for p in again.model.parameters()
        )


@pytest.mark.parametrize("step", [2, 6])
def test_divergence_is_named_without_states_too(tiny_data, tmp_path, step):
    trainer = trainer_of(tiny_data, tmp_path)
    poison(trainer, step, "gradient")
    with pytest.raises(
        SettingError, match=f"after step {step + 1} not finite: gradient of mlp_up_bank .rank 0."
    ):
        trainer.train(None)


def test_divergence_in_the_last_step_is_named_without_states_too(tiny_data, tmp_path):
    """No later step reads its norms: its weights are looked at."""
    trainer = trainer_of(tiny_data, tmp_path)
    poison(trainer, 7, "gradient")
    with pytest.raises(SettingError, match="after step 8 not finite: mlp_up_bank .rank 0."):
        trainer.train(None)


# ---- the watchdog's judgement


GONE = guard.Process("another host", 1, "0")
ALIVE = guard.Process(guard.host_id(), os.getpid(), guard.process_state(os.getpid())[1])


def news(cpu_ticks=5, num_collectives=10, stage="train", error=None, process=GONE):
    """What a rank tells the others."""
    return guard.News(1.0, cpu_ticks, num_collectives, stage, error, process)


def judged(told, silent=(0, 0), idle=(False, False), failing=0):
    watchdog = guard.Watchdog.__new__(guard.Watchdog)
    found = guard.Watchdog.judge(watchdog, told, list(silent), list(idle), failing)
    return f"rank {found[0]} {found[1]}" if found else ""


def test_the_watchdog_names_the_dead_the_stalled_and_the_first_to_fail():
    a, b = news(), news(num_collectives=11, stage="pack")
    second = a._replace(error=guard.Failure(2, "lost its peer", 0))
    first = b._replace(error=guard.Failure(1, "no room", 0))
    assert judged([a, b]) == judged([a, b], idle=(False, True), silent=(14, 14)) == ""
    assert judged([a, b], silent=(0, 15)) == "rank 1 died or hangs in stage pack"
    assert (
        judged([a, b], idle=(True, True)) == "rank 0 stalls in stage train, the others wait for it"
    )
    # all wait in one place: the network
    assert judged([a, news()], idle=(True, True)) == ""
    assert judged([second, first], failing=4) == ""
    assert judged([second, first], failing=5) == "rank 1 failed in stage pack: no room"
    assert judged([second, b], silent=(0, 3), failing=4) == "rank 1 died or hangs in stage pack"


def test_every_collective_is_counted(dist, monkeypatch):
    """The watchdog compares the numbers: a rank whose number stands still is behind."""
    names = """all_reduce broadcast all_gather_object reduce_scatter_tensor
        all_gather_into_tensor""".split()
    calls = []
    stub = SimpleNamespace(ReduceOp=SimpleNamespace(MAX=None))
    for name in names:
        setattr(stub, name, lambda *arguments, **options: calls.append(arguments))
    monkeypatch.setattr(train_gpt, "dist_backend", stub)
    dist.world_size = 2
    tensor = torch.zeros(4)
    dist.all_reduce(tensor)
    dist.all_reduce_packed([tensor])
    dist.reduce_scatter(tensor)
    dist.all_gather(tensor)
    dist.max_over_ranks(1.0)
    dist.broadcast(tensor)
    dist.barrier()
    assert dist.num_collectives == len(calls) == 7


def test_a_rank_idles_that_does_next_to_nothing_for_as_long_as_looks_go_back():
    watchdog, looks = guard.Watchdog.__new__(guard.Watchdog), guard.Watchdog.STALLED
    # a moment's work in between: pages come back, threads wake
    ticks = [5000 + look + (60 if look >= 30 else 0) for look in range(looks + 1)]
    past = [[news(cpu_ticks)] for cpu_ticks in ticks]
    assert watchdog.idles(past, 0) and not watchdog.idles(past[1:], 0)
    # works, goes on, a child ended
    for last in (news(5000 + watchdog.IDLE_TICKS), news(5100, 11), news(4000)):
        assert not watchdog.idles([*past[:-1], [last]], 0)


def test_a_rank_that_waits_for_a_slow_disk_is_not_taken_for_stalled(dist, monkeypatch):
    told = {}
    store = SimpleNamespace(
        set=lambda key, text: told.setdefault(key, []).append(json.loads(text)[1])
    )
    watchdog = guard.Watchdog.__new__(guard.Watchdog)
    watchdog.dist, watchdog.store, watchdog.error, watchdog.process, watchdog.disk_ticks = (
        dist,
        store,
        None,
        ALIVE,
        0,
    )
    watchdog.guard = guard.RunGuard()
    for state in ("S", "D", "D"):
        monkeypatch.setattr(guard, "process_state", lambda pid, state=state: (state, "0"))
        watchdog.tell()
    asleep, waiting, later = told["golf/rank0"]
    assert (
        waiting >= asleep + 100 and later >= waiting + 100 > watchdog.IDLE_TICKS / watchdog.STALLED
    )


def test_a_process_that_is_seen_to_live_may_be_silent_for_longer():
    """Where a library keeps Python's lock, no thread of that process can tell anything."""
    a, b = news(), news(num_collectives=11, stage="pack", process=ALIVE)
    assert judged([a, b], silent=(0, 39)) == judged([a, b], silent=(0, 5), failing=3) == ""
    assert judged([a, b], silent=(0, 40)) == "rank 1 died or hangs in stage pack"
    assert (
        guard.lives(*ALIVE)
        and not guard.lives(*ALIVE[:2], "0")
        and not guard.lives("elsewhere", *ALIVE[1:])
    )
    with subprocess.Popen(["sleep", "60"]) as child:
        started = guard.process_state(child.pid)[1]
        process = guard.Process(guard.host_id(), child.pid, started)
        assert guard.lives(*process)
        child.send_signal(signal.SIGSTOP)
        while guard.process_state(child.pid)[0] != "T":
            time.sleep(0.01)
        assert not guard.lives(*process) and guard.lives(*process, states="T")
        child.kill()
        while guard.process_state(child.pid)[0] != "Z":
            time.sleep(0.01)
        assert not guard.lives(*process)


def test_a_rank_that_works_alone_is_not_taken_for_stalled():
    """Packing keeps rank 0 for a minute: threads, and programs such as lrzip, count as work."""
    wanted = 5 * guard.Watchdog.IDLE_TICKS / guard.Watchdog.STALLED
    before, own = guard.cpu_ticks(), time.process_time()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    limit = time.time() + PATIENCE
    try:
        used = 0
        while used < 2 * wanted:
            assert time.time() < limit
            time.sleep(0.05)
            used = sum(int(ticks) for ticks in guard.stat_fields(child.pid)[11:13])
        # without what this loop takes
        assert guard.cpu_ticks() - before - 100 * (time.process_time() - own) > wanted
    finally:
        child.kill()
        child.wait()


# ---- before the clock starts


def machine(tmp_path, folder="runs/run", **changes):
    hp = tiny_hp(**changes)
    found = {
        "folder": tmp_path / folder,
        "model": train_gpt.GPT(hp, OPS, torch.float32),
    }
    return guard.check_machine(hp, train_gpt.Dist("cpu"), **found)


def test_a_machine_that_will_do_is_described(tmp_path):
    before = torch.get_rng_state()
    words = (
        r"projected_artifact_bytes:\d+ trial_packing share:[\d.]+ pack_seconds:[\d.]+"
        r" unpack_seconds:[\d.]+"
    )
    assert re.fullmatch(words, machine(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)  # the run's random numbers are not touched


def test_all_problems_are_in_one_report(tmp_path, monkeypatch):
    monkeypatch.setattr(guard.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    monkeypatch.setattr(guard.os, "access", lambda path, mode: False)
    monkeypatch.setattr(guard.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(train_gpt, "BYTE_CAP", 1000)
    monkeypatch.setattr(train_gpt, "unpack_weights", lambda blob: {})
    with pytest.raises(ValueError) as error:
        machine(
            tmp_path, resume=True, run_id="run", max_wallclock_seconds=9.0, gptq_reserve_seconds=0.0
        )
    words = [
        "not installed: brotli python-minifier",
        "cannot be written to",
        "GB free",
        "no complete training state",
        "GPTQ_RESERVE_SECONDS=0",
        "COMPRESSOR=brotli gave back other",
        "the artifact will have about",
    ]
    assert [
        word
        for word, line in zip(words, str(error.value).splitlines(), strict=True)
        if word not in line
    ] == []


# ---- what will be packed: random weights before the clock


FORMS = [
    {"gptq_column_steps": False},
    {"tie_embeddings": False},
    {"gptq_trellis": True},
    {"gptq_trellis": False},
    {"sparse_attn_gate_enabled": False, "gated_attn_enabled": True},
]


@pytest.mark.parametrize("changes", FORMS)
def test_the_trial_packs_what_a_run_packs(changes, dist, monkeypatch):
    """Names, types and shapes are those of quantize_weights, but that only matrices of a fast
    coder are whole.
    """
    install_parts_for(changes, monkeypatch)
    hp = tiny_hp(compressor="entropy", **changes)
    model = train_gpt.GPT(hp, OPS, torch.float32)
    weights = {name: torch.randn_like(tensor) for name, tensor in train_gpt.unbank(model).items()}
    identity = {
        name: torch.eye(w.shape[1]) for name, w in weights.items() if train_gpt.quant_role(name)
    }
    real = train_gpt.quantize_weights(weights, identity, hp, dist)
    trial, share = guard.trial_arrays(model, hp)
    assert trial.keys() == real.keys() and 0 < share < 1
    assert all(
        trial[name].dtype == real[name].dtype and trial[name].ndim == real[name].ndim
        for name in trial
    )
    whole = {
        real[n].shape for n in trial if n.endswith(":codes") and trial[n].shape == real[n].shape
    }
    assert whole >= {real[n].shape for n in real if n.endswith("weight:codes")}


@pytest.mark.parametrize(
    "name",
    [
        "brotli",
        "lzma",
        "entropy",
        pytest.param("pergroup", marks=[] if shutil.which("lrzip") else pytest.mark.skip),
    ],
)
def test_a_compressor_that_fails_on_the_real_shapes_is_refused(tmp_path, monkeypatch, name):
    install_parts_for({"COMPRESSOR": name}, monkeypatch)
    assert "trial_packing" in machine(tmp_path, compressor=name)
    unpack = train_gpt.unpack_weights

    def other_bytes(blob):
        arrays = unpack(blob)
        next(a for key, a in reversed(arrays.items()) if key.endswith(":codes"))[-1, -1] ^= 1
        return arrays

    monkeypatch.setattr(train_gpt, "unpack_weights", other_bytes)
    with pytest.raises(
        ValueError, match=f"COMPRESSOR={name} gave back other values than it got: .*:codes"
    ):
        machine(tmp_path, compressor=name)
    monkeypatch.setattr(train_gpt, "pack_weights", lambda *_: bytes(10**15))
    with pytest.raises(
        ValueError, match=f"COMPRESSOR={name} failed on random weights: MemoryError"
    ):
        machine(tmp_path, compressor=name)
    assert machine(tmp_path, compressor=name, prequant_only=True) == ""  # nothing will be packed


def test_an_artifact_that_cannot_fit_is_refused_and_one_that_may_not_is_noted(
    tmp_path, monkeypatch
):
    hp = tiny_hp()
    size = guard.projected_bytes(train_gpt.GPT(hp, OPS, torch.float32), hp)

    def says(cap, target_bytes):
        monkeypatch.setattr(train_gpt, "BYTE_CAP", round(cap * size))
        return machine(tmp_path, target_bytes=target_bytes)

    for target_bytes in (0, 16_000_000):
        assert "note" not in says(1.0, target_bytes)
    assert "note: the artifact may not fit" in says(0.9, 0)
    refusal = f"will have about {size:,} bytes, the cap is {round(0.7 * size):,}: take fewer"
    with pytest.raises(ValueError, match=refusal):
        says(0.7, 0)
    # clips twice as wide save one bit of about four a code
    assert "TARGET_BYTES will widen the clips" in says(0.7, 16_000_000)
    with pytest.raises(ValueError, match="take fewer weights"):
        says(0.5, 16_000_000)


def test_a_target_that_the_code_alone_fills_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "packed_code", lambda script, hp: bytes(5_000))
    with pytest.raises(ValueError, match="TARGET_BYTES=5000: .* above the code's 5000 bytes"):
        machine(tmp_path, target_bytes=5_000)
    assert machine(tmp_path, target_bytes=5_001)
    assert machine(tmp_path, target_bytes=5_000, prequant_only=True) == ""


def test_a_target_far_below_the_projected_size_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "packed_code", lambda script, hp: b"")
    model = train_gpt.GPT(tiny_hp(), OPS, torch.float32)
    size = guard.projected_bytes(model, tiny_hp())
    wide = size - sum(p.numel() for p in model.parameters()) / 8
    words = f"TARGET_BYTES={round(0.7 * wide)} clips become more than twice as wide"
    assert words in machine(tmp_path, target_bytes=round(0.7 * wide))
    assert "note" not in machine(tmp_path, target_bytes=round(wide))


def test_weights_that_no_artifact_can_hold_are_refused_before_training(monkeypatch, dist):
    """A byte each, and what else an artifact holds, must not exceed MAX_RAW_BYTES."""
    hp = tiny_hp()
    size = sum(p.numel() for p in train_gpt.build_model(hp, dist).parameters())
    monkeypatch.setattr(train_gpt, "BYTE_CAP", size / 8)
    train_gpt.Prepared(hp, dist, train_gpt.NO_GUARD).check_model()
    monkeypatch.setattr(train_gpt, "BYTE_CAP", size / 8 - 1)
    with pytest.raises(SettingError, match=f"{size} weights: an artifact holds at most"):
        train_gpt.Prepared(hp, dist, train_gpt.NO_GUARD).check_model()
    hp = tiny_hp(prequant_only=True)
    train_gpt.Prepared(hp, dist, train_gpt.NO_GUARD).check_model()


def test_the_largest_model_that_is_accepted_can_be_packed():
    """Of the default shapes with more layers: the shapes decide what is not a code of a weight."""
    hp = train_gpt.Hyperparameters(num_layers=40, num_loops=0, parallel_start_layer=40)
    with torch.device("meta"):
        weights = train_gpt.unbank(train_gpt.GPT(hp, OPS, torch.float32))
    raw = sum(w.numel() if train_gpt.quant_role(n) else 2 * w.numel() for n, w in weights.items())
    raw += sum(sum(w.shape) for n, w in weights.items() if train_gpt.quant_role(n))
    size = sum(w.numel() for w in weights.values())
    assert raw / size * 8 * train_gpt.BYTE_CAP < train_gpt.MAX_RAW_BYTES


def test_the_submission_is_projected_to_fit():
    hp = train_gpt.Hyperparameters()
    with torch.device("meta"):
        model = train_gpt.GPT(hp, OPS, torch.float32)
    assert 15_750_000 < guard.projected_bytes(model, hp) < train_gpt.BYTE_CAP
    hp = dataclasses.replace(
        hp, embed_bits=7, mlp_clip_sigmas=11.5, attn_clip_sigmas=13.0, embed_clip_sigmas=14.0
    )
    # trained: 15,793,158 (docs/h100)
    assert 15_900_000 < guard.projected_bytes(model, hp) < train_gpt.BYTE_CAP


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"max_wallclock_seconds": 9.0, "gptq_reserve_seconds": 0.0},
            "GPTQ_RESERVE_SECONDS=0 leaves",
        ),
        (
            {"eval_budget_seconds": 1e-6, "compressor": "entropy"},
            "EVAL_BUDGET_SECONDS=1e-06: unpacking takes about",
        ),
    ],
)
def test_a_budget_that_cannot_hold_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        machine(tmp_path, **changes)
    assert machine(tmp_path, prequant_only=True, **changes) == ""


def test_a_run_names_every_problem_of_every_check(tmp_path, monkeypatch, dist):
    faults.make_data(tmp_path / "data")
    (tmp_path / "data" / "fineweb_train_000000.bin").unlink()
    (tmp_path / "data" / "fineweb_val_bytes_000000.bin").unlink()
    environ = faults.SETTINGS | {
        "DATA_PATH": str(tmp_path / "data"),
        "RUNS_DIR": str(tmp_path),
        "RUN_ID": "taken",
    }
    environ |= {"TOKENIZER_PATH": "/nowhere.model", "ATTENTION_BACKEND": "fa3"}
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "model.pt").write_bytes(b"")
    with pytest.raises(SettingError) as error:
        train_gpt.run(train_gpt.Hyperparameters.from_env(environ), dist, guard.RunGuard())
    lines = str(error.value).splitlines()
    words = [
        "val_bytes",
        "no fineweb_train",
        "finished training",
        "fa3",
        "/nowhere.model",
    ]
    assert (
        len(lines) == 5
        and [word for word, line in zip(words, lines, strict=True) if word not in line] == []
    )


@pytest.mark.parametrize(
    "changes", [{}, {"matrix_bits": 5, "embed_bits": 8, "mlp_clip_sigmas": 9.0}]
)
def test_the_projected_size_is_that_of_gaussian_weights(changes, dist, monkeypatch):
    hp = tiny_hp(
        model_dim=128,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=1024,
        compressor="entropy",
        **changes,
    )
    model = train_gpt.GPT(hp, OPS, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    weights = {name: tensor.detach() for name, tensor in train_gpt.unbank(model).items()}
    identity = {
        name: torch.eye(w.shape[1]) for name, w in weights.items() if train_gpt.quant_role(name)
    }
    size = len(
        train_gpt.pack_weights(train_gpt.quantize_weights(weights, identity, hp, dist), "entropy")
    )
    assert guard.projected_bytes(model, hp) == pytest.approx(size, rel=0.03)


# ---- folders


def test_two_runs_never_share_a_folder(tmp_path):
    (tmp_path / ".model.pt.77.tmp").write_bytes(b"half of a file, by a run that was killed")
    held = guard.lock(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(ValueError, match="in use by another run: choose another RUN_ID"):
        guard.lock(tmp_path)
    held.close()
    guard.lock(tmp_path).close()


def test_a_folder_of_a_run_that_did_not_end_is_not_used_again(tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "log.txt").write_text("stopped by SIGTERM in stage start. ")
    assert machine(tmp_path)  # nothing is lost: it was stopped while the code was packed
    (tmp_path / "runs" / "run" / "train_gpt.py").write_text("the code")
    with pytest.raises(ValueError, match="holds a run that did not end: choose another RUN_ID$"):
        machine(tmp_path)  # there is no state to resume from
    train_gpt.write_atomically(tmp_path / "runs" / "run" / "state-00000001.pt", sealed({}))
    with pytest.raises(ValueError, match="choose another RUN_ID, or go on with RESUME=1$"):
        machine(tmp_path)
    assert machine(tmp_path, resume=True, run_id="run")
    with pytest.raises(ValueError, match="model.pt does not exist"):
        machine(tmp_path, quant_only=True)


# ---- whole runs in processes of their own


@pytest.fixture(scope="module")
def forker():
    found = faults.Forker()
    yield found
    found.close()


@pytest.fixture
def world(tmp_path):
    faults.make_data(tmp_path / "data")
    return tmp_path


def go_on_in_a_fork(folder, command, forker):
    """Runs a command that a message gave: its settings and its number of ranks, but in a fork
    -> exit code.
    """
    words = shlex.split(command)
    given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_0-9]+=", word))
    ranks = next(
        (int(word.split("=")[1]) for word in words if word.startswith("--nproc_per_node=")), 1
    )
    assert words[-1] == str(Path(faults.__file__).resolve())
    environ = {
        name: value
        for name, value in faults.environment(folder).items()
        if name not in faults.SETTINGS
    }
    pid = forker.ask(
        environ=environ | {"OMP_NUM_THREADS": "1"} | given, out=str(folder / "out"), ranks=ranks
    )
    return faults.end(faults.Fork(forker, pid))


def go_on(folder, command):
    """Runs a command that a message gave, as it stands, in a shell -> exit code."""
    environ = HERE | {
        "PATH": f"{Path(sys.executable).parent}:{HERE['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    with open(folder / "out", "ab") as out:
        return subprocess.run(
            ["sh", "-c", command], env=environ, stdout=out, stderr=out, timeout=PATIENCE
        ).returncode


@pytest.fixture(scope="module")
def base(tmp_path_factory, forker):
    """An uninterrupted run on one rank, DETERMINISTIC=1."""
    folder = tmp_path_factory.mktemp("base")
    faults.make_data(folder / "data")
    assert faults.end(forker.start(folder, DETERMINISTIC="1")) == 0, output(folder)
    return folder


def test_killed_at_a_random_step_then_out_of_disk_a_run_ends_with_the_same_bits(
    base, world, forker
):
    """kill -9 and RESUME=1, a full disk while packing and the command that the message gave: as
    if nothing had been.
    """
    step = random.Random(SEED).randrange(1, 8)
    process = forker.start(
        world, fault=f"kill train 0 {step}", CHECKPOINT_EVERY="1", DETERMINISTIC="1"
    )
    assert faults.end(process) == -signal.SIGKILL
    tidy_after(world, process, "kill")
    process = forker.start(world, fault="full pack 0", RESUME="1", DETERMINISTIC="1")
    assert faults.end(process) == 1
    assert f"step:{step} resumed:state-{step:08d}.pt" in output(world)
    assert "failed in stage pack: OSError: [Errno 28] No space left on device. " in output(world)
    assert go_on_in_a_fork(world, commands(output(world), "QUANT_ONLY")[-1], forker) == 0, output(
        world
    )[-3000:]
    assert comparable(world)["scores"] == comparable(base)["scores"]
    assert loss_lines(world) == loss_lines(base)
    assert (world / "runs/run/artifact.bin").read_bytes() == (
        base / "runs/run/artifact.bin"
    ).read_bytes()
    weights = [
        torch.load(f / "runs/run/model.pt", weights_only=True)["weights"] for f in (world, base)
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    tidy(world, process)
    assert not list((world / "runs/run").glob("state-*"))


def until(condition, folder):
    """Waits for a condition of a run; its output is shown where it does not come true."""
    limit = time.time() + PATIENCE
    while not condition():
        assert time.time() < limit, output(folder)[-3000:]
        time.sleep(0.05)


def wait_for(folder, words):
    until(lambda: words in (output(folder) if (folder / "out").exists() else ""), folder)


def catches(process, number):
    """Has the process a handler for this signal? (Linux: a mask in /proc.)"""
    (mask,) = re.findall(
        r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE
    )
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    "name, ranks",
    [
        ("SIGTERM", 1),
        pytest.param("SIGINT", 2, marks=soak),
        pytest.param("SIGINT", 1, marks=soak),
        pytest.param("SIGTERM", 2, marks=soak),
        pytest.param("SIGHUP", 1, marks=soak),
        pytest.param("SIGHUP", 2, marks=soak),
    ],
)
def test_a_signal_saves_a_state_and_the_message_goes_on(world, forker, name, ranks):
    process = (faults if ranks > 1 else forker).start(world, ranks, None, ITERATIONS="100000")
    wait_for(world, "step:12 ")
    os.kill(process.pid, number := getattr(signal, name))
    code = faults.end(process)
    # torchrun makes 1 of whatever its processes end with
    assert code == (128 + number if ranks == 1 else 1)
    (line,) = [line for line in output(world).splitlines() if line.startswith("stopped by")]
    assert (
        line.startswith(f"stopped by {name} in stage train. ")
        and line in (world / "runs/run/log.txt").read_text()
    )
    assert "Traceback" not in output(world) or ranks == 2
    tidy(world, process)
    (state,) = (world / "runs" / "run").glob("state-*.pt")
    (command,) = commands(line, "RESUME")
    saved = int(state.stem.removeprefix("state-"))
    command = command.replace("ITERATIONS=100000", f"ITERATIONS={saved + 2}")
    assert go_on(world, command) == 0, output(world)[-3000:]
    assert f"step:{saved} resumed:" in output(world) and f"step:{saved + 2} " in output(world)


@pytest.mark.parametrize("interval", [0, 2])
def test_a_signal_while_the_model_is_saved_points_to_the_model(world, forker, interval):
    """Not to a training state, which is deleted when there is model.pt."""
    process = forker.start(world, 1, "term save 0", CHECKPOINT_EVERY=str(interval))
    assert faults.end(process) == 128 + signal.SIGTERM
    (line,) = [line for line in output(world).splitlines() if line.startswith("stopped by")]
    (command,) = commands(line, "QUANT_ONLY")
    assert go_on(world, command) == 0, output(world)[-3000:]
    assert (world / "runs" / "run" / "result.json").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, forker):
    """uninterrupted(iterations, ranks) -> folder of a run that met no fault, DETERMINISTIC=1.

    Made once.
    """
    made = {}

    def find(iterations, ranks):
        if (iterations, ranks) not in made:
            folder = tmp_path_factory.mktemp("uninterrupted")
            faults.make_data(folder / "data")
            process = forker.start(folder, ranks, ITERATIONS=str(iterations), DETERMINISTIC="1")
            assert faults.end(process, 600) == 0, output(folder)[-3000:]
            made[iterations, ranks] = folder
        return made[iterations, ranks]

    return find


RESUMES = [
    (step, interval, ranks, kind)
    for step in (10, 100, 1000)
    for interval in (1, 7, 100, 1000)
    for ranks in (1, 2)
    for kind in ("term", "kill", *["int"] * (step == 10))
]


SAMPLE = [
    (10, 100, 1, "term"),
    random.Random(SEED).choice([case for case in RESUMES if case[0] < 1000]),
]


@pytest.mark.parametrize(
    "step, interval, ranks, kind",
    RESUMES if SOAK else [SAMPLE[0], pytest.param(*SAMPLE[1], id="sample")],
)
def test_a_resume_ends_with_the_bits_of_an_uninterrupted_run(
    uninterrupted, world, forker, step, interval, ranks, kind
):
    """From a state after `step` steps, written for a signal or before a kill, whatever the log
    interval.
    """
    tell(f"{kind} at step {step} of {ranks} rank(s), TRAIN_LOG_EVERY={interval}")
    iterations = step + 12
    settings = {
        "ITERATIONS": str(iterations),
        "TRAIN_LOG_EVERY": str(interval),
        "DETERMINISTIC": "1",
    }
    if kind == "kill":
        at, settings["CHECKPOINT_EVERY"] = step + 1, str(step)
    else:
        at = step - 1  # the step that the signal comes in is finished
    rank = random.Random(f"{SEED}{step}{interval}").randrange(ranks)
    # with torchrun, or with nobody who would help
    starter = faults if SOAK and ranks == 2 else forker
    process = starter.start(world, ranks, f"{kind} train {rank} {at}", **settings)
    code = faults.end(process, 600)
    wanted = {"kill": -signal.SIGKILL, "term": 143, "int": 130}[kind]
    assert code == wanted if ranks == 1 else code not in (0, None), output(world)[-3000:]
    assert [path.name for path in (world / "runs/run").glob("state-*")] == [f"state-{step:08d}.pt"]
    tidy_after(world, process, kind)
    process = starter.start(world, ranks, RESUME="1", **settings)
    assert faults.end(process, 600) == 0, output(world)[-3000:]
    tidy(world, process)
    whole = uninterrupted(iterations, ranks)
    assert f"step:{step} resumed:state-{step:08d}.pt" in output(world) and "RESULT {" in output(
        world
    )
    assert comparable(world) == comparable(whole)
    results = [
        json.loads((folder / "runs/run/result.json").read_text()) for folder in (world, whole)
    ]
    assert [len(result["tokens_per_second_by_loop_state"]) for result in results] == [2, 2]
    steps = [read_run(folder / "runs/run").steps for folder in (world, whole)]
    found, known = ({row["step"]: row["train_loss"] for row in rows} for rows in steps)
    logged = {*range(1, 6), *range(interval, iterations, interval), step, iterations}
    assert found == {number: known[number] for number in logged}
    assert (world / "runs/run/artifact.bin").read_bytes() == (
        whole / "runs/run/artifact.bin"
    ).read_bytes()
    weights = [
        torch.load(f / "runs/run/model.pt", weights_only=True)["weights"] for f in (world, whole)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=soak)])
def test_a_second_signal_ends_a_step_that_does_not_end(world, forker, name):
    process = forker.start(world, fault="stall train 0 3")
    until((world / "fault").exists, world)
    number = getattr(signal, name)
    os.kill(process.pid, number)
    until(lambda: not catches(process, number), world)  # the first has been heard
    time.sleep(1.0)
    assert process.poll() is None  # a step may take its time
    os.kill(process.pid, number)
    assert faults.end(process) == -number
    tidy(world, process)


def test_a_run_saves_a_state_when_its_window_is_closed(world):
    """The run leads the session of a terminal, as in a window.

    Where that closes, SIGHUP comes and writes fail.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execve(
            sys.executable,
            [sys.executable, faults.__file__],
            faults.environment(world, ITERATIONS="100000"),
        )
    seen = b""
    while b"step:12 " not in seen:
        assert (more := os.read(terminal, 10_000)), seen
        seen += more
    os.close(terminal)
    limit = time.time() + 60
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        assert time.time() < limit or os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 129
    log = (world / "runs/run/log.txt").read_text()
    last = log.splitlines()[-1]
    (state,) = (world / "runs" / "run").glob("state-*.pt")
    assert last.startswith(
        f"stopped by SIGHUP in stage train. {state} is complete; RESUME=1 continues from it: "
    )
    tidy(world, SimpleNamespace(pid=pid))


def test_a_hangup_that_one_rank_gets_stops_both(world, forker):
    process = forker.start(world, 2, ITERATIONS="100000")
    wait_for(world, "step:12 ")
    os.kill(ranks_of(process)[-1], signal.SIGHUP)
    assert faults.end(process, 60) == 129, output(world)[-3000:]
    assert "ranks ended with [129, 129]" in output(
        world
    ) and "stopped by SIGHUP in stage train" in output(world)
    assert len(list((world / "runs/run").glob("state-*.pt"))) == 1 and commands(
        output(world), "RESUME"
    )
    tidy(world, process)


def test_a_hangup_is_never_the_second_signal(world, forker):
    """A lost connection sends several.

    Here they come in a step that does not end, which another signal then ends.
    """
    process = forker.start(world, fault="stall train 0 3")
    wait_for(world, "step:3 ")
    time.sleep(0.5)
    for _ in range(3):
        os.kill(process.pid, signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    assert faults.end(process, 10) == -signal.SIGTERM
    tidy(world, process)


def test_a_hangup_that_is_ignored_at_the_start_stays_ignored():
    """As nohup starts a run."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        guard.catch_signals(guard.RunGuard())
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        for number, handler in zip(
            (signal.SIGTERM, signal.SIGINT, signal.SIGHUP), before, strict=True
        ):
            signal.signal(number, handler)


@soak
def test_a_hangup_is_ignored_under_nohup(world):
    process = faults.start(world, launcher=["nohup"], ITERATIONS="60")
    wait_for(world, "step:12 ")
    os.kill(process.pid, signal.SIGHUP)
    assert faults.end(process) == 0, output(world)[-3000:]
    assert "RESULT {" in output(world) and "stopped by" not in output(world)
    tidy(world, process)


@pytest.mark.parametrize("number, waits", [(signal.SIGHUP, True), (0, False)])
def test_a_stop_is_finished_where_torchrun_is_gone_before(dist, monkeypatch, number, waits):
    """torchrun ends at a second SIGHUP, its store with it, while the ranks finish their step
    and save a state.
    """
    watchdog, done = guard.Watchdog.__new__(guard.Watchdog), []
    watchdog.dist, watchdog.holder = dist, news(stage="train")
    watchdog.end = lambda verdict, hung: done.append(verdict)
    watchdog.guard = SimpleNamespace(signal=number, signals_wait=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(guard.time, "sleep", done.append)
    watchdog.end_without_store("gone")
    assert done[:-1] == [watchdog.STOPPING] * waits
    assert (
        done[-1] == "torchrun died or hangs, last heard of in stage train; it holds the store: gone"
    )


@soak
@pytest.mark.parametrize("place", ["warm_up", "hessians", "pack", "eval", "ttt"])
def test_a_signal_outside_training_ends_at_once(world, forker, place):
    process = forker.start(world, fault=f"int {place} 0")
    assert faults.end(process) == 130
    (line,) = [line for line in output(world).splitlines() if line.startswith("stopped by")]
    assert ("QUANT_ONLY=1 continues" in line) == (place != "warm_up")
    tidy(world, process)


def ranks_of(process):
    return [pid for pid in faults.members(process.pid) if pid != process.pid]


@soak
@pytest.mark.parametrize("stage", ["train", "eval"])
def test_a_signal_ends_all_ranks_with_its_code(world, forker, stage):
    """In training one rank's is enough.

    Elsewhere a rank that waits in a library hears of it from the watchdog.
    """
    fault, words = (None, "step:12 ") if stage == "train" else ("stall eval 1", "stage:pack ")
    process = forker.start(world, 2, fault, **{"ITERATIONS": "100000"} if stage == "train" else {})
    wait_for(world, words)
    if stage == "eval":
        until((world / "fault").exists, world)
    time.sleep(2.0)
    for pid in ranks_of(process)[-1 if stage == "train" else 0 :]:
        os.kill(pid, signal.SIGTERM)
    assert faults.end(process) == 143, output(world)[-3000:]
    assert "ranks ended with [143, 143]" in output(world), output(world)[-3000:]
    assert "stopped by SIGTERM" in output(world)
    assert commands(output(world), "RESUME" if stage == "train" else "QUANT_ONLY")
    tidy(world, process)


@soak
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_not_finite_on_one_rank_ends_all_within_two_steps(world, forker, rank):
    process = forker.start(world, 2, f"nan train {rank} 4", CHECKPOINT_EVERY="1")
    assert end_in_a_minute(world, process)[0] == 1
    (told,) = set(
        re.findall(r"training diverged: after step (\d+) not finite: .*?; lower", output(world))
    )
    assert (
        5 <= int(told) <= 6
        and f"(rank {rank})" in output(world)
        and "ranks ended with [1, 1]" in output(world)
    )
    assert (world / "runs/run/diverged.pt").exists() and not (world / "runs/run/model.pt").exists()
    tidy(world, process)


LOST = {  # shell: how the terminal of the run "$@" is lost
    "pipe": '"$@" | grep -m1 step:; exit ${PIPESTATUS[0]}',
    "full": 'exec "$@" > /dev/full 2>&1',
    "both in a pipe": '"$@" 2>&1 | grep -m1 step:; exit ${PIPESTATUS[0]}',
    "closed": 'exec "$@" <&- >&- 2>&-',
    "no standard error": 'exec "$@" 2>&-',
}


@pytest.mark.parametrize(
    "way, ranks",
    (
        [(way, ranks) for way in LOST for ranks in (1, 2)]
        if SOAK
        else [("pipe", 1), ("full", 1), ("both in a pipe", 2)]
    ),
)
def test_a_lost_terminal_ends_no_run(world, way, ranks):
    """The run goes on to its RESULT, in result.json and in log.txt, which has every line."""
    launcher = ["bash", "-c", LOST[way], "bash"]
    process = faults.start(world, ranks, launcher=launcher, CHECKPOINT_EVERY="4", ITERATIONS="12")
    assert faults.end(process) == 0, output(world)[-3000:]
    run = world / "runs" / "run"
    rows = read_run(run)  # refuses a log that does not end with RESULT
    assert [row["step"] for row in rows.steps] == list(range(1, 13))
    assert (
        rows.result == json.loads((run / "result.json").read_text())
        and "ttt" in rows.result["scores"]
    )
    assert "Error" not in output(world)
    tidy(world, process)


def test_of_two_runs_at_once_under_one_name_one_is_refused(world, forker):
    first, second = (forker.start(world, DETERMINISTIC="1") for _ in range(2))
    assert sorted([faults.end(first), faults.end(second)]) == [0, 1], output(world)
    assert re.search("in use by another run|holds a run that did not end", output(world))
    assert output(world).count("RESULT {") == 1 and comparable(world)["artifact_bytes"] > 0
    tidy(world, first)


def test_the_command_of_a_message_is_safe_for_a_shell(dist, tmp_path):
    """Settings are text that a user may have got from elsewhere: none is a command."""
    hostile = f"a b'; touch {tmp_path}/evil; $(touch {tmp_path}/evil) `touch {tmp_path}/evil` \n #"
    hp = tiny_hp(data_path=hostile, runs_dir=hostile, attention_backend="sdpa")
    _, line = guard.command(hp, dist, Path(hostile) / "run", "it", quant_only=True).split(
        "continues from it: ", 1
    )
    line = line.replace(
        shlex.quote(sys.argv[0]), "-c 'import os; print(os.environ[\"DATA_PATH\"])'"
    )
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", line], env=environ, capture_output=True, text=True)
    assert done.stdout == hostile + "\n" and not list(tmp_path.iterdir()), done.stderr


RANK_FAULTS = [
    (kind, place)
    for kind in ("kill", "raise", "exit", "freeze", "stall")
    for place in faults.PLACES
]
QUICK = [fault for fault in RANK_FAULTS if fault[0] in ("kill", "raise", "exit")]


@pytest.mark.parametrize("place", faults.PLACES)
def test_a_fault_happens_at_every_place(place, monkeypatch, tmp_path):
    """A place that a rewrite has renamed would fail only where the sample of `make test` comes
    by.
    """
    owner, name = faults.found(train_gpt, faults.PLACES[place])
    assert callable(getattr(owner, name))
    monkeypatch.setattr(owner, name, lambda *_: "went on")
    if place in faults.REHEARSED:
        before, rehearsal = faults.found(train_gpt, faults.REHEARSED[place])
        assert callable(getattr(before, rehearsal))  # a module of that name is not
        monkeypatch.setattr(before, rehearsal, lambda *_: getattr(owner, name)(None, 5))
    monkeypatch.setenv("ARMED", "")
    monkeypatch.setenv("FAULT_NOTES", str(tmp_path))
    faults.inject(train_gpt, "raise", place, 0, 5)
    if place in faults.REHEARSED:
        assert getattr(before, rehearsal)() == "went on"  # what only rehearses it is spared
    if place == "train":
        assert getattr(owner, name)(None, 4) == "went on"  # at its step only
    with pytest.raises(RuntimeError, match="injected"):
        getattr(owner, name)(None, 5)


def rank_for(place):
    return 0 if place in faults.ON_RANK_0_ONLY else random.Random(f"{SEED}{place}").randrange(2)


@pytest.mark.parametrize(
    "fault", RANK_FAULTS if SOAK else [None], ids=lambda fault: "-".join(fault or ("sample",))
)
def test_a_rank_that_dies_raises_or_stalls_ends_all(world, forker, fault):
    """Without torchrun, which would help."""
    kind, place = fault or random.Random(SEED).choice(QUICK)
    rank = rank_for(place)
    tell(f"{kind} {place} rank {rank}: {check_rank_fault(world, forker, kind, place, rank):.1f} s")


@soak
@pytest.mark.parametrize(
    "kind, place",
    [
        ("kill", "train"),
        ("raise", "pack"),
        ("exit", "ttt"),
        ("freeze", "hessians"),
        ("stall", "eval"),
        ("kill", "start"),
        ("hang", "train"),
    ],
)
def test_a_rank_fault_under_torchrun_ends_all(world, kind, place):
    rank = rank_for(place)
    tell(
        f"torchrun: {kind} {place} rank {rank}:"
        f" {check_rank_fault(world, faults, kind, place, rank):.1f} s"
    )


@soak
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_keeps_pythons_lock_for_long_is_not_taken_for_dead(world, forker, rank):
    process = forker.start(world, 2, f"hold train {rank}")
    code, seconds = end_in_a_minute(world, process)
    assert code == 0 and 20 < seconds, output(world)[-3000:]
    tidy(world, process)


def longest_gap(work):
    """The longest time in seconds that a thread which ticks every 0.1 s was kept waiting while
    work() ran.
    """
    ticks, done = [time.perf_counter()], threading.Event()

    def tick():
        while not done.wait(0.1):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        work()
    finally:  # a thread that goes on keeps pytest from its end
        done.set()
        thread.join()
    return max(
        later - earlier
        for earlier, later in zip(ticks, [*ticks[1:], time.perf_counter()], strict=True)
    )


def compile_a_step(data):
    """A training step of a small model by torch.compile in full."""
    cuda = torch.cuda.is_available()
    small = SMALL | {"num_layers": 3, "loop_start": 1, "loop_end": 1, "parallel_start_layer": 2}
    hp = tiny_hp(
        **small | {"data_path": str(data), "compile": "1", "device": "cuda" if cuda else "cpu"}
    )
    loader = train_gpt.TrainLoader(
        train_gpt.TokenStream(data, "train"), hp, dist := train_gpt.Dist(hp.device)
    )
    trainer = train_gpt.Trainer(train_gpt.build_model(hp, dist), loader, hp, dist, Lines())
    torch._dynamo.reset()
    trainer.train_step(0, 0.0, True)


@soak
def test_no_work_of_a_run_keeps_the_watchdog_waiting(tiny_data, tmp_path):
    """What a rank does for long, at the submission's size: its thread must be heard of in much
    less than DEAD looks.
    """
    hp = train_gpt.Hyperparameters()
    arrays, _ = guard.trial_arrays(train_gpt.GPT(hp, OPS, torch.float32), hp)
    codes = arrays["tok_emb.weight:codes"].tobytes()
    source = Path(train_gpt.__file__).read_text()
    state = {
        f"bank {n}": torch.zeros(9_000_000) for n in range(4 * guard.STATE_BYTES_A_WEIGHT // 4)
    }
    jobs = {
        "entropy": lambda: train_gpt.unpack_weights(train_gpt.pack_weights(arrays, "entropy")),
        "packing the code": lambda: pack_code(source, {}),
        "a training state": lambda: train_gpt.write_atomically(
            tmp_path / "state", guard.sealed(state)
        ),
        "compiling": lambda: compile_a_step(tiny_data),
    }
    for codec in ("brotli", "lzma", *["lrzip"] * bool(shutil.which("lrzip"))):
        encode, decode = presets.published.ENCODERS[codec], presets.published.DECODERS[codec]
        jobs[codec] = lambda encode=encode, decode=decode: decode(encode(codes), len(codes))
    for name, work in jobs.items():
        start = time.perf_counter()
        gap = longest_gap(work)
        tell(f"heartbeat, {name}: {time.perf_counter() - start:.0f} s, longest gap {gap:.2f} s")
        assert gap < guard.Watchdog.DEAD / 3


@soak
def test_workers_end_when_torchrun_is_killed(world):
    process = faults.start(world, 2, ITERATIONS="100000")
    wait_for(world, "step:12 ")
    heard = world / "heard1"  # the workers have looked around in this stage
    until(lambda: heard.exists() and heard.read_text() == "train", world)
    workers = [pid for pid in faults.members(process.pid) if pid != process.pid]
    assert len(workers) == 2
    process.kill()
    process.wait()
    limit = time.time() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < limit:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert "torchrun died or hangs, last heard of in stage train" in output(world)


def in_a_mount(folder, options):
    """Command prefix: a file system of its own over <folder>/runs, in name spaces of their own.

    None if not allowed.
    """
    script = f'mount -t tmpfs -o {options} none {folder}/runs && exec "$@"'
    prefix = ["unshare", "-rm", "sh", "-c", script, "sh"]
    allowed = (
        shutil.which("unshare")
        and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    )
    return prefix if allowed else None


@soak
@pytest.mark.parametrize(
    "options, words", [("ro", "cannot be written to"), ("size=9m", "GB free, this run may write")]
)
def test_a_disk_that_will_not_do_is_refused_before_training(world, options, words):
    (world / "runs").mkdir()
    if (prefix := in_a_mount(world, options)) is None:
        pytest.skip("no name spaces here")
    assert faults.end(faults.start(world, launcher=prefix)) == 1
    assert words in output(world) and "step:" not in output(world)


@soak
def test_two_hosts_run_the_whole_pipeline(base, world):
    """Two agents of torchrun, each with a folder of its own, in network name spaces of their
    own where allowed.
    """
    (world / "far").mkdir()
    shutil.copytree(world / "data", world / "far" / "data")
    script = Path(__file__).with_name("two_hosts.sh")
    done = (
        subprocess.run(["unshare", "-rn", "true"], capture_output=True)
        if shutil.which("unshare")
        else None
    )
    prefix = ["unshare", "-rnm"] if done and done.returncode == 0 and shutil.which("ip") else []
    environ = (
        HERE | faults.SETTINGS | {"RUN_ID": "run", "PYTHON": sys.executable, "DETERMINISTIC": "1"}
    )
    command = [
        *prefix,
        "sh",
        str(script),
        str(world),
        str(world / "far"),
        "netns" if prefix else "localhost",
    ]
    with open(world / "out", "ab") as out:
        done = subprocess.run(command, env=environ, stdout=out, stderr=out, timeout=PATIENCE)
    assert done.returncode == 0, output(world)[-4000:]
    found, alone = comparable(world), comparable(base)
    tell(f"two hosts: {command[-1]}")
    assert found["world_size"] == 2 and not (world / "far" / "runs").exists()
    assert found["train_loss"] == pytest.approx(alone["train_loss"], abs=2e-3)
    assert found["scores"]["ttt"]["tokens"] == alone["scores"]["ttt"]["tokens"]


@soak
def test_two_deterministic_runs_are_equal(base, world):
    assert faults.end(faults.start(world, DETERMINISTIC="1")) == 0
    assert comparable(world) == comparable(base)
    assert (world / "runs/run/artifact.bin").read_bytes() == (
        base / "runs/run/artifact.bin"
    ).read_bytes()


# ---- the soak: runs in a row, each with a fault by chance


@soak
def test_fifty_runs_with_a_fault_each(base, tmp_path, forker):
    """Nothing promised is lost, no process and no file is left, whatever the fault.

    Each run is brought to its end.

    States are written at every step: at most the step that was cut is done again, and the end is
    bit for bit that of the run that met no fault, on one rank; on two, its counts.
    """
    chance, worst, tally = random.Random(SEED), 0.0, {}
    tell(f"\nfifty runs, seed {SEED}")
    for number in range(int(os.environ.get("SOAK_RUNS", 50))):
        folder = tmp_path / str(number)
        faults.make_data(folder / "data")
        ranks, place = chance.choice([1, 1, 2]), chance.choice(list(faults.PLACES))
        kind = chance.choice(
            ["kill", "raise", "exit", "term", "full"] + ["stall", "freeze", "hang"] * (ranks > 1)
        )
        rank = 0 if place in faults.ON_RANK_0_ONLY else chance.randrange(ranks)
        fault = f"{kind} {place} {rank} {chance.randrange(1, 8)}"
        process = forker.start(folder, ranks, fault, CHECKPOINT_EVERY="1", DETERMINISTIC="1")
        code, seconds = end_in_a_minute(folder, process)
        assert code not in (0, None), (fault, ranks, code, seconds, output(folder)[-3000:])
        tidy_after(folder, process, fault)
        worst, tally[kind] = max(worst, seconds), tally.get(kind, 0) + 1
        mode = bring_to_an_end(folder, forker, ranks, fault)
        ended, wanted, run = comparable(folder), comparable(base), folder / "runs" / "run"
        if ranks == 1:
            assert ended["scores"] == wanted["scores"], (fault, mode)
            assert (run / "artifact.bin").read_bytes() == (
                base / "runs/run/artifact.bin"
            ).read_bytes(), (fault, mode)
        assert ended["scores"]["ttt"]["tokens"] == wanted["scores"]["ttt"]["tokens"]
        tidy_after(folder, process, fault)
        tell(f"{number + 1}: {fault} of {ranks}: {seconds:.1f} s, gone on by {mode}")
        shutil.rmtree(folder)
    tell(f"faults {tally}, at most {worst:.1f} s from fault to end")


def bring_to_an_end(folder, forker, ranks, fault):
    """Goes on from what a fault left, by the message's command where there was time for one ->
    how.
    """
    run = folder / "runs" / "run"
    mode = (
        "QUANT_ONLY"
        if (run / "model.pt").exists()
        else "RESUME"
        if any(run.glob("state-*.pt"))
        else None
    )
    kind, place, _, step = fault.split()
    if mode == "RESUME" and place == "train":
        last = max(int(path.stem.removeprefix("state-")) for path in run.glob("state-*.pt"))
        assert last >= int(step), (fault, last)
    if mode is None:
        assert place in ("start", "warm_up"), fault  # nothing had been promised yet
        shutil.rmtree(folder / "runs", ignore_errors=True)
    if mode and (told := commands(output(folder), mode)):
        code = go_on_in_a_fork(folder, told[-1], forker)
    else:  # killed before a word could be said
        more = {mode: "1"} if mode else {}
        code = faults.end(forker.start(folder, ranks, DETERMINISTIC="1", **more))
    assert code == 0, (fault, ranks, mode, output(folder)[-3000:])
    return mode


def tidy_after(folder, process, fault):
    """As tidy, but for what a kill leaves until the next run of that folder: its temporary file."""
    if fault.startswith(("kill", "exit", "freeze", "stall", "hang")):
        for path in (folder / "runs").glob("*/.*.tmp"):
            path.unlink()
    tidy(folder, process)
