"""What a run with a fault in it leaves, and how it must end."""

import json
import re
import time

import faults


def output(folder):
    return (folder / "out").read_text(errors="replace")


def seconds_since_the_fault(folder):
    return time.time() - float((folder / "fault").read_text().split()[0])


UNLIKE = {
    "training_seconds",
    "tokens_per_second_by_loop_state",
    "seconds",
    "commit",
    "resumed_at_step",
    "run",
}


def comparable(folder, run="run"):
    """RESULT without times, dates and paths."""
    result = json.loads((folder / "runs" / run / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in UNLIKE}


def tidy(folder, process):
    """No process of the run is left, and no file but those that a run makes."""
    assert faults.members(process.pid) == []
    files = {path.name for path in (folder / "runs").glob("*/*")} | {
        path.name for path in (folder / "runs").glob("*/.*")
    }
    known = {"log.txt", "model.pt", "losses.npy", "artifact.bin", "train_gpt.py", "result.json"}
    known.add("diverged.pt")
    assert {name for name in files if not re.fullmatch(r"state-\d{8}\.pt", name)} <= known


def commands(text, mode):
    """The commands that messages gave to go on with."""
    return re.findall(rf"{mode}=1 continues from it: (.*)$", text, re.MULTILINE)


def loss_lines(folder, run="run"):
    """(step, its loss as logged), a step that was done again once if it came to the same."""
    log = (folder / "runs" / run / "log.txt").read_text()
    return sorted(set(re.findall(r"^step:(\d+) train_loss:(\S+)", log, re.MULTILINE)))


def end_in_a_minute(folder, process):
    """-> exit code, seconds from the fault to the end: at most 60, times what the machine is
    slowed down by others.
    """
    with faults.Slowness() as slowness:
        code = faults.end(process)
    seconds = seconds_since_the_fault(folder)
    assert seconds < 60 * slowness.factor(), (
        f"{seconds:.0f} s, {slowness.factor():.1f}: {output(folder)[-3000:]}"
    )
    return code, seconds


def check_rank_fault(folder, starter, kind, place, rank, **settings):
    """The promise of a rank's fault -> seconds from the fault to the end of all."""
    process = starter.start(folder, 2, f"{kind} {place} {rank}", **settings)
    code, seconds = end_in_a_minute(folder, process)
    text = output(folder)
    assert code not in (0, None), f"exit code {code}: {text[-3000:]}"
    verdicts = [
        line
        for line in text.splitlines()
        if re.match(r"(rank \d+|torchrun) (died|stalls|failed)", line)
    ]
    words = {
        "kill": "died",
        "exit": "died",
        "freeze": "died",
        "hang": "died",
        "stall": "stalls",
    }.get(kind, "failed")
    assert verdicts and all(line.startswith(f"rank {rank} {words}") for line in verdicts), text[
        -3000:
    ]
    stage = {"save": "train", "eval": "eval_prequant", "adapt": "eval_ttt", "ttt": "eval_ttt"}.get(
        place, place
    )
    assert f"in stage {stage}" in verdicts[0], verdicts[0]
    if place not in ("start", "warm_up", "train", "save"):  # from the weights that are safe
        assert commands(text, "QUANT_ONLY") and (folder / "runs/run/model.pt").exists()
    tidy(folder, process)
    return seconds
