"""Pictures of one run, or of several seeds overlaid: training.png, stages.png, ttt.png, bytes.png.

usage: python tools/plot_run.py RUNS... [--out FOLDER]      runs, or sets of runs (folders of runs)

They go into the run's folder, or into the folder that holds the runs. run_3seeds.sh and `make demo`
draw after a run.
"""

import argparse
import itertools
import math
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import command_line  # noqa: E402

if __name__ == "__main__":
    command_line.begin("plot_run.py")

os.environ["MPLBACKEND"] = "Agg"  # a notebook's own backend need not exist in this environment

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402

matplotlib.use("Agg")  # where it was imported before with another one
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

from tools.run_files import RunError, flatten, is_number, read_runs  # noqa: E402

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 140,
}
WIDTH = 10  # inches: at 800 pixels a point is a good pixel high
SMALL = 10  # points
COLORS = plt.get_cmap("tab10").colors
STAGE_COLORS = plt.get_cmap("tab20").colors
RED = "#cc3311"
BLUE = "#4477aa"
LIGHT_BLUE = "#a3bddb"
GRAY = "#dddddd"
# under text that lines may cross
PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
MEANS = 100  # the moving mean of the losses spans one of so many parts of a long run
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
MILLIONS = FuncFormatter(lambda value, _: f"{value / 1e6:g} M")


def in_colors(items):
    """-> (color, item) for each; after the last color the first comes again."""
    return zip(itertools.cycle(COLORS), items, strict=False)


def title(runs):
    """Head line of every picture: which runs, on what."""
    first = runs[0].result
    device = first["device"]
    if first["world_size"] > 1:
        device = f"{first['world_size']} x {device}"
    name = f"run {first['run']}"
    if len(runs) > 1:
        name = f"{runs[0].folder.resolve().parent.name}, {len(runs)} seeds"
    return f"{name} · {device} · torch {first['torch']} · commit {first['commit']}"


def save(figure, runs, path):
    """Writes the picture under the runs' title."""
    figure.suptitle(title(runs), x=0.01, ha="left", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def column(rows, name):
    return [row[name] for row in rows]


def bpb_factor(result):
    """Nats per token -> BPB, for the validation text of this run."""
    score = next(iter(result["scores"].values()))
    return score["tokens"] / score["bytes"] / math.log(2)


# ---- loss and BPB against time and steps


def plot_training(runs, path):
    """Loss against seconds (below) and steps (above), the schedule, and scores by stage.

    The loss is in nats (left) and BPB (right).
    """
    figure = plt.figure(figsize=(WIDTH, 6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[3, 1], height_ratios=[4, 1])
    loss = figure.add_subplot(grid[0, 0])
    scores = figure.add_subplot(grid[:, 1])
    schedule = figure.add_subplot(grid[1, 0], sharex=loss)
    draw_losses(loss, runs)
    draw_schedule(schedule, runs)
    draw_scores(scores, runs)
    mark_looping((loss, schedule), runs)
    save(figure, runs, path)


def draw_losses(axis, runs):
    """Training and validation losses of all runs, with the axes above and to the right."""
    early, every = [], []
    for color, run in in_colors(runs):
        losses = column(run.steps, "train_loss")
        draw_run_losses(axis, run, losses, color, is_first=run is runs[0])
        after_start = [row["train_loss"] for row in run.steps if row["progress"] > 0.03]
        early.append(after_start[0] if after_start else losses[0])
        every += losses + column(run.evaluations, "val_loss")
    # the first steps fall from ln(vocabulary) and would flatten the rest
    bottom, top = np.nanmin(every), max(early)
    margin = 0.05 * (top - bottom)
    axis.set_ylim(bottom - margin, top + margin)
    axis.set_ylabel("nats per token")
    axis.tick_params(labelbottom=False)
    axis.legend(loc="upper right", fontsize=SMALL, ncols=1 if len(runs) < 4 else 2)
    add_bpb_axis(axis, bpb_factor(runs[0].result))
    add_step_axis(axis, runs)


def losses_of_steps(run):
    """Losses of the last N steps of a training, all of them as a rule; none without losses.npy."""
    path = run.folder / "losses.npy"
    return np.load(path)[-run.result["steps"] :] if path.exists() else np.empty(0)


def draw_run_losses(axis, run, losses, color, is_first):
    """The losses of one run; only the first puts what all runs have into the legend."""
    steps = run.result["steps"]
    seconds = run.result["training_seconds"]
    times = column(run.steps, "train_seconds")
    every_loss = losses_of_steps(run)
    words = "training"
    if len(every_loss):
        number = np.arange(steps - len(every_loss), steps) + 1
        every_time = np.interp(number, [0, *column(run.steps, "step")], [0.0, *times])
        name = "training, each step" if is_first else None
        axis.plot(every_time, every_loss, color=color, linewidth=0.6, alpha=0.45, label=name)
        width = max(1, steps // MEANS, min(10, steps // 10))
        # each the mean of `width` losses, drawn at the last of them
        losses = np.convolve(every_loss, np.full(width, 1 / width), "valid")
        times = every_time[width - 1 :]
        words = f"mean of {width} steps"
    axis.plot(
        times,
        losses,
        color=color,
        linewidth=1.2,
        alpha=0.9,
        label=f"{words}, seed {run.seed}, {steps:,} steps, {seconds:,.0f} s",
    )
    if run.evaluations:
        axis.plot(
            column(run.evaluations, "train_seconds"),
            column(run.evaluations, "val_loss"),
            "o",
            color=color,
            markersize=5,
            markeredgecolor="black",
            label="validation" if is_first else None,
        )


def add_bpb_axis(axis, factor):
    """BPB on the right, for losses in nats."""

    def to_bpb(nats):
        return nats * factor

    def to_nats(bpb):
        return bpb / factor

    right = axis.secondary_yaxis("right", functions=(to_bpb, to_nats))
    right.set_ylabel("BPB at validation's bytes per token")


def add_step_axis(axis, runs):
    """Optimizer steps above, those of the longest run."""
    longest = max(runs, key=lambda run: run.steps[-1]["train_seconds"])
    times = [0.0, *column(longest.steps, "train_seconds")]
    steps = [0.0, *column(longest.steps, "step")]
    rate = steps[-1] / times[-1]
    # a point beyond the data, so that both functions are invertible there
    steps.append(steps[-1] + rate * (times[-1] + 1))
    times.append(2 * times[-1] + 1)

    def to_steps(seconds):
        return np.interp(seconds, times, steps)

    def to_seconds(step):
        return np.interp(step, steps, times)

    above = axis.secondary_xaxis("top", functions=(to_steps, to_seconds))
    above.xaxis.set_major_locator(MaxNLocator(integer=True))
    above.set_xlabel("optimizer steps" + (f" (seed {longest.seed})" if len(runs) > 1 else ""))


def draw_schedule(axis, runs):
    for color, run in in_colors(runs):
        seconds = column(run.steps, "train_seconds")
        axis.plot(seconds, column(run.steps, "lr_factor"), color=color)
    axis.set_ylim(0, 1.08)
    axis.set_yticks([0, 0.5, 1])
    axis.set_ylabel("learning-rate\nfactor")
    axis.set_xlabel("seconds of training")


def looping_onset(run):
    """Seconds of training at which looping begins; None if it never does."""
    onsets = [row["train_seconds"] for row in run.switches if row["looping"]]
    return onsets[0] if onsets else None


def mark_looping(axes, runs):
    """A line for each run where looping begins, and a shade where all runs loop."""
    onsets = [looping_onset(run) for run in runs]
    known = [onset for onset in onsets if onset is not None]
    end = 1.02 * max(run.steps[-1]["train_seconds"] for run in runs)
    for axis in axes:
        for color, onset in in_colors(onsets):
            if onset is not None:
                axis.axvline(onset, color=color, linestyle="--", linewidth=1)
        if len(known) == len(runs):
            axis.axvspan(max(known), end, color="gray", alpha=0.1, zorder=0)
        axis.set_xlim(0, end)
    if known:
        top = axes[0]
        place = top.get_xaxis_transform()
        top.text(max(known), 0.02, " looping on →", transform=place, fontsize=SMALL)


def draw_scores(axis, runs):
    """BPB after each stage, a line for each seed, the mean written at each stage."""
    scores = [run.result["scores"] for run in runs]
    names = [name for name in scores[0] if all(name in each for each in scores)]
    bpb = np.array([[each[name]["bpb"] for name in names] for each in scores])
    for color, values in in_colors(bpb):
        axis.plot(values, "o-", color=color, linewidth=1, markersize=6)
    style = {"ha": "center", "fontsize": SMALL, "fontweight": "bold", "bbox": PLATE}
    for place, name in enumerate(names):
        values = bpb[:, place]
        words = f"{values.mean():.4f}"
        if len(runs) > 1:
            words += f"\n± {values.std(ddof=1):.4f}"
        if any(each[name].get("partial") for each in scores):
            words += " *"
        top = (place, values.max())
        axis.annotate(words, top, xytext=(0, 9), textcoords="offset points", **style)
    axis.set_xticks(range(len(names)), names, fontsize=SMALL, rotation=20)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.margins(y=0.2)
    heading = "BPB after each stage" if len(runs) == 1 else "BPB (mean ± std)"
    if any(score.get("partial") for each in scores for score in each.values()):
        heading += "\n* part of the text"
    axis.set_title(heading)


# ---- seconds of each stage against the budgets


class Budget(NamedTuple):
    """A budget of seconds and the stages that count for it; limit None: there is none."""

    heading: str
    limit: float | None
    stages: list  # of (name, seconds)


def budgets(run):
    """Both budgets as docs/RESULT.md defines them, and the rest -> list of Budgets."""
    result = run.result
    seconds = result["seconds"]
    final = f"eval_{list(result['scores'])[-1]}"

    def of(*names):
        return [(name, seconds[name]) for name in names if name in seconds]

    train = of("hessians", "quant_check", "quantize")
    if "training_seconds" in result:
        train.insert(0, ("training", result["training_seconds"]))
    score = of("unpack", final)
    counted = {"train", *(name for name, _ in train + score)}
    rest = of(*(name for name in seconds if name not in counted))
    train_limit = float(run.settings.get("MAX_WALLCLOCK_SECONDS", 0)) or None
    score_limit = float(run.settings.get("EVAL_BUDGET_SECONDS", 0)) or None
    return [
        Budget("training budget", train_limit, train),
        Budget("evaluation budget", score_limit, score),
        Budget("in no budget", None, rest),
    ]


def plot_stages(runs, path):
    """One bar for each budget and seed, its stages one after another, the limit as a line."""
    tables = [budgets(run) for run in runs]
    every = [budget for table in tables for budget in table]
    lengths = [budget.limit or 0 for budget in every]
    lengths += [sum(value for _, value in budget.stages) for budget in every]
    widest = 1.3 * max(lengths)
    names = dict.fromkeys(name for budget in every for name, _ in budget.stages)
    colors = dict(zip(names, STAGE_COLORS[::2] + STAGE_COLORS[1::2], strict=False))
    figure, axis = plt.subplots(figsize=(WIDTH, 0.5 * len(every) + 2.2), layout="constrained")
    place = 0.0
    ticks, labels = [], []
    for same_budget in zip(*tables, strict=True):
        first = place
        for run, budget in zip(runs, same_budget, strict=True):
            draw_stages(axis, place, budget, widest, colors)
            ticks.append(place)
            labels.append(budget.heading + (f", seed {run.seed}" if len(runs) > 1 else ""))
            place += 1
            if budget.limit:
                limits = [budget.limit, budget.limit]
                axis.plot(limits, [first - 0.5, place - 0.5], color=RED, linewidth=2)
        place += 0.4
    seconds = runs[0].result["seconds"] | {"training": runs[0].result.get("training_seconds")}
    for name, color in colors.items():
        # many parts are too narrow for their number
        words = name if len(runs) > 1 else f"{name} {seconds[name]:,.1f}"
        axis.barh(0, 0, color=color, label=words)
    figure.legend(loc="outside lower center", ncols=5, fontsize=SMALL)
    axis.set_yticks(ticks, labels)
    axis.set_xlim(0, widest)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("seconds; a red line is a budget")
    save(figure, runs, path)


def draw_stages(axis, place, budget, widest, colors):
    """One bar: seconds inside the parts that are wide enough, the sum behind it.

    The sum is red above the limit.
    """
    left = 0.0
    style = {"ha": "center", "va": "center", "fontsize": SMALL}
    for name, value in budget.stages:
        axis.barh(place, value, left=left, height=0.8, color=colors[name], edgecolor="white")
        if value > 0.05 * widest:
            axis.text(left + value / 2, place, f"{value:,.1f}", **style)
        left += value
    if not budget.stages:
        return
    words = f"  {left:,.1f} s"
    behind = left
    color = "black"
    if limit := budget.limit:
        words = f"  {left:,.1f} of {limit:,.0f} s"
        if left > 0.7 * limit:
            behind = max(left, limit)  # not across the red line
        if left > limit:
            words += "  OVER"
            color = RED
    axis.text(behind, place, words, va="center", fontweight="bold", color=color)


# ---- running BPB of test-time training


def scored_batches(run):
    """Rows of batches of test-time training, without those before the first score."""
    return [row for row in run.ttt if row.get("running_tokens")]


def plot_ttt(runs, path):
    """Running BPB over the tokens that rank 0 has scored.

    Fine-tuning of the base weights and the scores of the complete text are marked.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
    every = []
    for color, run in in_colors(runs):
        batches = scored_batches(run)
        tokens = column(batches, "running_tokens")
        running = column(batches, "running_bpb")
        style = ".-" if len(tokens) < 100 else "-"
        axis.plot(tokens, running, style, color=color, label=f"running, seed {run.seed}")
        every += running
        mark_fine_tuning(axis, run, color, tokens[-1], with_words=run is runs[0])
    every += mark_scores(axis, runs)
    spread = max(every) - min(every)
    axis.set_ylim(min(every) - 0.08 * spread - 1e-4, max(every) + 0.15 * spread + 1e-4)
    axis.xaxis.set_major_formatter(THOUSANDS)
    axis.set_xlim(left=0)
    share = " (rank 0's share)" if runs[0].result["world_size"] > 1 else ""
    axis.set_xlabel(f"validation tokens scored so far{share}; longest documents first")
    axis.set_ylabel("running BPB")
    figure.legend(loc="outside lower center", ncols=4, fontsize=SMALL)
    save(figure, runs, path)


def mark_fine_tuning(axis, run, color, num_tokens, with_words):
    """A line wherever the base weights were fine-tuned."""
    for before, row in itertools.pairwise(run.ttt):
        if "adapted" not in row or "running_tokens" not in before:
            continue
        place = before["running_tokens"]
        axis.axvline(place, color=color, linestyle="--", linewidth=1)
        if with_words:
            side = "right" if place > 0.6 * num_tokens else "left"
            words = f" base weights fine-tuned on {row['adapted']:,.0f} documents "
            style = {"transform": axis.get_xaxis_transform(), "va": "top", "fontsize": SMALL}
            axis.text(place, 0.98, words, ha=side, **style)


def mark_scores(axis, runs):
    """Lines at the scores without and with test-time training -> their BPB, means over seeds."""
    ends = {}
    for word, name in (("without", "quantized"), ("with", "ttt")):
        ends[word] = np.mean([run.result["scores"][name]["bpb"] for run in runs])
    mean = ", mean" if len(runs) > 1 else ""
    for word, value in ends.items():
        axis.axhline(value, color="black", linestyle=":" if word == "without" else "-", linewidth=1)
        upper = value == max(ends.values())
        axis.annotate(
            f"{value:.4f} {word} test-time training, whole text{mean}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-6, 3 if upper else -3),
            textcoords="offset points",
            ha="right",
            va="bottom" if upper else "top",
            fontsize=SMALL,
            bbox=PLATE,
        )
    return ends.values()


# ---- bytes by tensor group


def group_of(spec):
    """The group of one array of an artifact."""
    import train_gpt

    tensor, _, field = spec.name.rpartition(":")
    role = train_gpt.quant_role(tensor)
    if field.startswith("lqer"):
        return "LQER"
    if role is None:
        return "small tensors"
    return role.group if field == "codes" else "scales of rows"


def bytes_by_group(path):
    """Artifact -> ({group: bytes before compression}, {group: bytes in the file}).

    Only its header is read. Groups that the compressor stores together are one entry in the second.
    """
    import train_gpt

    try:
        header = train_gpt.read_header(Path(path).read_bytes())
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    raw = defaultdict(int)
    stored = defaultdict(int)
    for (kind, _, members), (size, _, _) in zip(header.plan, header.records, strict=True):
        names = set()
        for spec in members:
            name = "row orders" if kind == "orders" else group_of(spec)
            names.add(name)
            raw[name] += spec.num_bytes
        if len(names) == 1:
            together = names.pop()
        elif len(header.records) == 1:
            together = "all tensors"
        else:
            together = "all codes" if kind == "codes" else "all other tensors"
        stored[together] += size
    stored["header"] += header.start
    return dict(raw), dict(stored)


def mean_bytes(tables):
    """[{group: bytes}] -> {group: mean of the bytes}; a missing group has none."""
    names = {}  # a dictionary keeps their order
    for table in tables:
        names |= table
    return {name: np.mean([table.get(name, 0) for table in tables]) for name in names}


def plot_bytes(runs, path):
    """All bytes against the cap; below, bars by tensor group, stored and before compression.

    Means over seeds. For groups that are stored together, the entropy of their codes stands in.
    """
    tables = [bytes_by_group(run.folder / "artifact.bin") for run in runs]
    raw = mean_bytes([table for table, _ in tables])
    stored = mean_bytes([table for _, table in tables])
    stored["code"] = np.mean([run.result["code_bytes"] for run in runs])
    entropy = mean_bytes([run.result.get("group_bytes", {}) for run in runs])
    names = sorted(stored, key=stored.get, reverse=True)
    names += sorted(set(raw) - set(stored), key=raw.get, reverse=True)
    figure, (whole, axis) = plt.subplots(
        2,
        figsize=(WIDTH, 0.38 * len(names) + 2.8),
        layout="constrained",
        height_ratios=[1.4, len(names) + 1],
    )
    draw_total(whole, runs)
    for place, name in enumerate(names):
        draw_group(axis, place, stored.get(name), raw.get(name), entropy.get(name))
    axis.barh(0, 0, color=BLUE, label="in the file")
    if any(name in entropy and name not in stored for name in names):
        axis.barh(0, 0, color=LIGHT_BLUE, label="entropy of the codes (stored together)")
    axis.barh(0, 0, color=GRAY, label="before compression")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.3)
    axis.legend(loc="lower right", fontsize=SMALL)
    axis.set_xlabel("bytes" + (", mean over seeds" if len(runs) > 1 else ""))
    for each in (whole, axis):
        each.grid(axis="y", visible=False)
        each.xaxis.set_major_formatter(MILLIONS)
    save(figure, runs, path)


def draw_total(axis, runs):
    """The bar of all bytes, those of the largest run, and a line at the cap."""
    import train_gpt

    total = max(run.result["total_bytes"] for run in runs)
    axis.barh(0, total, height=0.75, color=BLUE)
    axis.axvline(train_gpt.BYTE_CAP, color=RED, linewidth=2)
    axis.text(train_gpt.BYTE_CAP, 0, f"  cap {train_gpt.BYTE_CAP:,}", va="center", color=RED)
    axis.set_yticks([0], ["artifact + code"])
    axis.set_xlim(0, 1.25 * max(total, train_gpt.BYTE_CAP))
    axis.set_title(total_bytes(runs))


def draw_group(axis, place, stored, raw, entropy):
    """The bars of one group; stored is None if it is stored together with others."""
    if raw is not None:
        axis.barh(place, raw, height=0.75, color=GRAY)
    if stored is not None:
        axis.barh(place, stored, height=0.75, color=BLUE)
        words = f"  {stored:,.0f}"
    elif entropy is not None:
        axis.barh(place, entropy, height=0.75, color=LIGHT_BLUE)
        words = f"  about {entropy:,.0f}"
    else:
        words = "  stored together"
    if raw is not None:
        words += f"  of {raw:,.0f}"
    longest = max(stored or 0, raw or 0)
    axis.text(longest, place, words, va="center", fontsize=SMALL)


def total_bytes(runs):
    """The heading: bytes in all, and how much of the cap is left."""
    import train_gpt

    totals = [run.result["total_bytes"] for run in runs]
    left = train_gpt.BYTE_CAP - max(totals)
    room = f"{left:,} left of {train_gpt.BYTE_CAP:,}" if left >= 0 else f"{-left:,} ABOVE THE CAP"
    span = " to ".join(f"{total:,}" for total in sorted({min(totals), max(totals)}))
    return f"{span} bytes in all, compressor {runs[0].settings['COMPRESSOR']}: {room}"


def pictures_of(runs):
    """{file name: function that draws it} of the pictures that these runs have the data for."""
    pictures = {}
    scored = all(run.result["scores"] for run in runs)
    if scored and all(run.steps for run in runs):
        pictures["training.png"] = plot_training
    if scored:
        pictures["stages.png"] = plot_stages
    if all(scored_batches(run) for run in runs):
        pictures["ttt.png"] = plot_ttt
    if all((run.folder / "artifact.bin").exists() for run in runs):
        pictures["bytes.png"] = plot_bytes
    return pictures


def draw(runs, out):
    """Draws every picture that is possible -> paths of the pictures; says what prevents one."""
    drawn = []
    with plt.rc_context(STYLE):
        for name, plot in pictures_of(runs).items():
            try:
                check_finite(runs)
                plot(runs, out / name)
                drawn.append(out / name)
            except RunError as error:  # the other pictures may have all that they need
                command_line.tell(f"plot_run.py: no {name}: {error}")
                plt.close("all")
    return drawn


def check_finite(runs):
    """RunError where a number that pictures show is NaN or infinite: axes have no place for it."""
    for run in runs:
        found = [(name, value) for name, value in flatten(run.result).items() if is_number(value)]
        found += [(name, value) for row in run.steps + run.ttt for name, value in row.items()]
        for name, value in found:
            if not math.isfinite(value):
                raise RunError(f"{run.folder}: {name} is {value}")


def print_scores(run):
    """Scores and sizes of one run, and what the untrained model would score."""
    result = run.result
    if run.steps and result["scores"]:
        untrained = run.steps[0]["train_loss"] * bpb_factor(result)
        print(
            f" untrained: {untrained:.4f} BPB (first training step, at the validation set's bytes"
            " per token)"
        )
    for name, score in result["scores"].items():
        print(
            f"{name:>10}: {score['bpb']:.4f} BPB ({score['tokens']:,} tokens, {score['bytes']:,}"
            " bytes)"
        )
    print(
        f"  artifact: {result['artifact_bytes']:,} bytes + code {result['code_bytes']:,} ="
        f" {result['total_bytes']:,}"
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="runs, or sets of runs")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the pictures go")
    options = parser.parse_args(arguments)
    try:
        runs = read_runs(options.runs)
        out = options.out or (runs[0].folder if len(runs) == 1 else runs[0].folder.parent)
        out.mkdir(parents=True, exist_ok=True)
        drawn = draw(runs, out)
        if len(runs) == 1:
            print_scores(runs[0])
    except RunError as error:
        sys.exit(f"plot_run.py: {error}")
    print(f"     plots: {', '.join(map(str, drawn)) or 'none'}")


if __name__ == "__main__":
    command_line.run(main, "plot_run.py")
