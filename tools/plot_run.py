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
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 110,
}
COLORS = plt.get_cmap("tab10").colors
RED = "#cc3311"
# under text that lines may cross
PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")


def in_colors(items):
    """-> (color, item) for each; after the last color the first comes again."""
    return zip(itertools.cycle(COLORS), items, strict=False)


def title(runs):
    """Head line of every picture: which runs, on what."""
    first = runs[0].result
    device = (
        f"{first['world_size']} x {first['device']}" if first["world_size"] > 1 else first["device"]
    )
    name = (
        first["run"]
        if len(runs) == 1
        else f"{runs[0].folder.resolve().parent.name}, {len(runs)} seeds"
    )
    return f"{name} · {device} · torch {first['torch']} · commit {first['commit']}"


def bpb_factor(result):
    """Nats per token -> BPB, for the validation text of this run."""
    score = next(iter(result["scores"].values()))
    return score["tokens"] / score["bytes"] / math.log(2)


# ---- loss and BPB against time and steps


def plot_training(runs, path):
    """Loss against seconds (below) and steps (above), in nats (left) and BPB (right); schedule;
    scores by stage.
    """
    figure = plt.figure(figsize=(12, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[3, 1.15], height_ratios=[4, 1])
    loss, scores = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[:, 1])
    schedule = figure.add_subplot(grid[1, 0], sharex=loss)
    draw_losses(loss, runs)
    draw_schedule(schedule, runs)
    draw_scores(scores, runs)
    mark_looping((loss, schedule), runs)
    figure.suptitle(title(runs), x=0.01, ha="left", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def draw_losses(axis, runs):
    factor, longest = (
        bpb_factor(runs[0].result),
        max(runs, key=lambda run: run.steps[-1]["train_seconds"]),
    )
    early, lowest = [], []
    for color, run in in_colors(runs):
        seconds, losses = (
            [row[key] for row in run.steps] for key in ("train_seconds", "train_loss")
        )
        final = f", {run.result['steps']:,} steps, {run.result['training_seconds']:,.0f} s"
        axis.plot(
            seconds,
            losses,
            color=color,
            linewidth=1.2,
            alpha=0.9,
            label=f"training, seed {run.seed}{final}",
        )
        if run.evaluations:
            axis.plot(
                [row["train_seconds"] for row in run.evaluations],
                [row["val_loss"] for row in run.evaluations],
                "o",
                color=color,
                markersize=5,
                markeredgecolor="black",
                label="validation" if run is runs[0] else None,
            )
        early.append(
            next((row["train_loss"] for row in run.steps if row["progress"] > 0.03), losses[0])
        )
        lowest += [*losses, *(row["val_loss"] for row in run.evaluations)]
    # the first steps fall from ln(vocabulary) and would flatten the rest
    bottom, top = np.nanmin(lowest), max(early)
    axis.set_ylim(bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))
    axis.set_ylabel("nats per token")
    axis.tick_params(labelbottom=False)
    axis.legend(loc="upper right", fontsize=9, ncols=1 if len(runs) < 4 else 2)
    bpb = axis.secondary_yaxis(
        "right", functions=(lambda nats: nats * factor, lambda bpb: bpb / factor)
    )
    bpb.set_ylabel("BPB, at the validation text's bytes per token")
    times = np.array([0.0, *(row["train_seconds"] for row in longest.steps)])
    steps = np.array([0.0, *(row["step"] for row in longest.steps)])
    rate = steps[-1] / times[-1]  # beyond the data, so that both functions stay invertible
    times, steps = (
        np.append(times, 2 * times[-1] + 1),
        np.append(steps, steps[-1] + rate * (times[-1] + 1)),
    )
    functions = (
        lambda seconds: np.interp(seconds, times, steps),
        lambda step: np.interp(step, steps, times),
    )
    above = axis.secondary_xaxis("top", functions=functions)
    above.xaxis.set_major_locator(MaxNLocator(integer=True))
    above.set_xlabel("optimizer steps" + (f" (seed {longest.seed})" if len(runs) > 1 else ""))


def draw_schedule(axis, runs):
    for color, run in in_colors(runs):
        axis.plot(
            [row["train_seconds"] for row in run.steps],
            [row["lr_factor"] for row in run.steps],
            color=color,
        )
    axis.set_ylim(0, 1.08)
    axis.set_yticks([0, 0.5, 1])
    axis.set_ylabel("learning-rate\nfactor")
    axis.set_xlabel("seconds of training")


def mark_looping(axes, runs):
    """A line for each run where looping begins, and a shade over the part of training that has
    it in all runs.
    """
    onsets = [
        next((row["train_seconds"] for row in run.switches if row["looping"]), None) for run in runs
    ]
    end = 1.02 * max(run.steps[-1]["train_seconds"] for run in runs)
    for axis in axes:
        for color, onset in in_colors(onsets):
            if onset is not None:
                axis.axvline(onset, color=color, linestyle="--", linewidth=1)
        if all(onset is not None for onset in onsets):
            axis.axvspan(max(onsets), end, color="gray", alpha=0.1, zorder=0)
        axis.set_xlim(0, end)
    known = [onset for onset in onsets if onset is not None]
    if known:
        axes[0].text(
            max(known), 0.02, " looping on →", transform=axes[0].get_xaxis_transform(), fontsize=9
        )


def draw_scores(axis, runs):
    """BPB after each stage, a line for each seed, the mean written at each stage."""
    names = [
        name
        for name in runs[0].result["scores"]
        if all(name in run.result["scores"] for run in runs)
    ]
    bpb = np.array([[run.result["scores"][name]["bpb"] for name in names] for run in runs])
    for color, values in in_colors(bpb):
        axis.plot(values, "o-", color=color, linewidth=1, markersize=6)
    for place, name in enumerate(names):
        partial = " *" if any(run.result["scores"][name].get("partial") for run in runs) else ""
        mean = bpb[:, place].mean()
        words = (
            f"{mean:.4f}" if len(runs) == 1 else f"{mean:.4f}\n± {bpb[:, place].std(ddof=1):.4f}"
        )
        top = (place, bpb[:, place].max())
        style = {"ha": "center", "fontsize": 9.5, "fontweight": "bold", "bbox": PLATE}
        axis.annotate(words + partial, top, xytext=(0, 9), textcoords="offset points", **style)
    axis.set_xticks(range(len(names)), names, fontsize=9)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.margins(y=0.2)
    marked = any(score.get("partial") for run in runs for score in run.result["scores"].values())
    heading = "BPB after each stage" if len(runs) == 1 else "BPB (mean ± std)"
    axis.set_title(heading + ("\n* part of the text" if marked else ""))


# ---- seconds of each stage against the budgets


def budgets(run):
    """-> [(heading, limit or None, [(stage, seconds)])]: both budgets as docs/RESULT.md defines
    them, and the rest.
    """
    seconds, result = run.result["seconds"], run.result
    final = f"eval_{list(result['scores'])[-1]}"
    trained = [("training", result["training_seconds"])] if "training_seconds" in result else []
    train = trained + [
        (name, seconds[name]) for name in ("hessians", "quant_check", "quantize") if name in seconds
    ]
    score = [(name, seconds[name]) for name in ("unpack", final) if name in seconds]
    counted = {"train", *(name for name, _ in train + score)}
    rest = [(name, value) for name, value in seconds.items() if name not in counted]
    limits = [
        float(run.settings.get(name, 0)) or None
        for name in ("MAX_WALLCLOCK_SECONDS", "EVAL_BUDGET_SECONDS")
    ]
    return [
        ("training budget", limits[0], train),
        ("evaluation budget", limits[1], score),
        ("in no budget", None, rest),
    ]


def plot_stages(runs, path):
    """One bar for each budget and seed, its stages one after another, the limit as a line."""
    tables = [budgets(run) for run in runs]
    limits = [limit or 0 for table in tables for _, limit, _ in table]
    widest = 1.3 * max(
        limits + [sum(value for _, value in stages) for table in tables for *_, stages in table]
    )
    figure, axis = plt.subplots(
        figsize=(12, 0.5 * len(runs) * len(tables[0]) + 2.2), layout="constrained"
    )
    names = dict.fromkeys(name for table in tables for *_, stages in table for name, _ in stages)
    colors = dict(
        zip(
            names,
            plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2],
            strict=False,
        )
    )
    place, ticks = 0.0, []
    for budget in zip(*tables, strict=True):
        first = place
        for run, (heading, limit, stages) in zip(runs, budget, strict=True):
            draw_stages(axis, place, stages, limit, widest, colors)
            ticks.append((place, heading + (f", seed {run.seed}" if len(runs) > 1 else "")))
            place += 1
            if limit:
                axis.plot([limit, limit], [first - 0.5, place - 0.5], color=RED, linewidth=2)
        place += 0.4
    for name, color in colors.items():
        axis.barh(0, 0, color=color, label=name)
    figure.legend(loc="outside lower center", ncols=6, fontsize=9)
    axis.set_yticks(*zip(*ticks, strict=True))
    axis.set_xlim(0, widest)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("seconds; a red line is a budget")
    figure.suptitle(title(runs), x=0.01, ha="left", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def draw_stages(axis, place, stages, limit, widest, colors):
    """One bar: seconds inside the parts that are wide enough, the sum behind it, in red above
    the limit.
    """
    left = 0.0
    for name, value in stages:
        axis.barh(place, value, left=left, height=0.8, color=colors[name], edgecolor="white")
        if value > 0.05 * widest:
            axis.text(
                left + value / 2, place, f"{value:,.1f}", ha="center", va="center", fontsize=9
            )
        left += value
    if not stages:
        return
    over = limit and left > limit
    words = f"  {left:,.1f}" + (
        f" of {limit:,.0f} s" + ("  OVER" if over else "") if limit else " s"
    )
    # not across the red line
    behind = max(left, limit or 0) if left > 0.7 * (limit or np.inf) else left
    axis.text(behind, place, words, va="center", fontweight="bold", color=RED if over else "black")


# ---- running BPB of test-time training


def plot_ttt(runs, path):
    """Running BPB over the tokens that rank 0 has scored; fine-tuning of the base weights and
    end scores marked.
    """
    figure, axis = plt.subplots(figsize=(12, 4.6), layout="constrained")
    every = []
    for color, run in in_colors(runs):
        batches = [row for row in run.ttt if "running_bpb" in row]
        tokens, running = (
            [row[key] for row in batches] for key in ("running_tokens", "running_bpb")
        )
        axis.plot(
            tokens,
            running,
            ".-" if len(tokens) < 100 else "-",
            color=color,
            label=f"running, seed {run.seed}",
        )
        every += running
        for before, row in zip(run.ttt, run.ttt[1:], strict=False):
            if "adapted" in row and "running_tokens" in before:
                axis.axvline(before["running_tokens"], color=color, linestyle="--", linewidth=1)
                if run is runs[0]:
                    late = before["running_tokens"] > 0.6 * tokens[-1]
                    words = f" base weights fine-tuned on {row['adapted']:,.0f} documents "
                    axis.text(
                        before["running_tokens"],
                        0.98,
                        words,
                        transform=axis.get_xaxis_transform(),
                        va="top",
                        ha="right" if late else "left",
                        fontsize=9,
                    )
    ends = {"without": "quantized", "with": "ttt"}
    ends = {
        word: np.mean([run.result["scores"][name]["bpb"] for run in runs])
        for word, name in ends.items()
    }
    for word, value in ends.items():
        axis.axhline(value, color="black", linestyle=":" if word == "without" else "-", linewidth=1)
        upper = value == max(ends.values())
        axis.annotate(
            f"{value:.4f} {word} test-time training, whole text"
            + (", mean" if len(runs) > 1 else ""),
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-6, 3 if upper else -3),
            textcoords="offset points",
            ha="right",
            va="bottom" if upper else "top",
            fontsize=9,
            bbox=PLATE,
        )
    every += ends.values()
    spread = max(every) - min(every)
    axis.set_ylim(min(every) - 0.08 * spread - 1e-4, max(every) + 0.15 * spread + 1e-4)
    axis.xaxis.set_major_formatter(THOUSANDS)
    axis.set_xlim(left=0)
    share = " (rank 0's share)" if runs[0].result["world_size"] > 1 else ""
    axis.set_xlabel(f"validation tokens scored so far{share}; longest documents first")
    axis.set_ylabel("running BPB")
    axis.legend(loc="upper right", fontsize=9)
    figure.suptitle(title(runs), x=0.01, ha="left", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


# ---- bytes by tensor group


def bytes_by_group(path):
    """Artifact -> ({group: bytes before compression}, {group: bytes in the file}), from its header
    alone.

    Groups that the compressor does not keep apart stand together in the second one.
    """
    import train_gpt

    try:
        _, plan, sections, start = train_gpt.read_header(Path(path).read_bytes())
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None

    def group(spec):
        role = train_gpt.quant_role(spec.name.rpartition(":")[0])
        field = spec.name.rpartition(":")[2]
        if field.startswith("lqer"):
            return "LQER"
        return (
            role.group
            if role and field == "codes"
            else "scales of rows"
            if role
            else "small tensors"
        )

    raw, stored = defaultdict(int), defaultdict(int)
    for (kind, _, members), (size, _, _) in zip(plan, sections, strict=True):
        names = {group(spec) if kind != "orders" else "row orders" for spec in members}
        together = "all codes" if kind == "codes" else "scales, LQER and small tensors"
        together = together if len(sections) > 1 else "all tensors"
        stored[names.pop() if len(names) == 1 else together] += size
        for spec in members:
            raw["row orders" if kind == "orders" else group(spec)] += spec.num_bytes
    stored["header"] += start
    return dict(raw), dict(stored)


def plot_bytes(runs, path):
    """Bars by tensor group: stored and before compression; code; how much of the cap is used.

    Means over seeds.
    """
    import train_gpt

    tables = [bytes_by_group(run.folder / "artifact.bin") for run in runs]
    code = np.mean([run.result["code_bytes"] for run in runs])
    raw, stored = (
        {
            name: np.mean([table.get(name, 0) for table in side])
            for name in dict.fromkeys(sum(map(list, side), []))
        }
        for side in zip(*tables, strict=True)
    )
    stored["code"] = code
    names = sorted(stored, key=lambda name: -stored[name]) + sorted(
        set(raw) - set(stored), key=lambda name: -raw[name]
    )
    figure, axis = plt.subplots(figsize=(12, 0.42 * len(names) + 1.9), layout="constrained")
    for place, name in enumerate(names):
        if name in raw:
            axis.barh(place, raw[name], height=0.75, color="#dddddd")
        axis.barh(place, stored.get(name, 0), height=0.75, color="#4477aa")
        words = (
            f"  {stored[name]:,.0f}"
            if name in stored
            else f"  ({raw[name]:,.0f}, stored together with others)"
        )
        words += f"  of {raw[name]:,.0f}" if name in stored and name in raw else ""
        axis.text(max(stored.get(name, 0), raw.get(name, 0)), place, words, va="center", fontsize=9)
    axis.barh(0, 0, color="#4477aa", label="in the file")
    axis.barh(0, 0, color="#dddddd", label="before compression")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.25)
    axis.xaxis.set_major_formatter(THOUSANDS)
    axis.legend(loc="lower right", fontsize=9)
    totals = [run.result["total_bytes"] for run in runs]
    left = train_gpt.BYTE_CAP - max(totals)
    axis.set_xlabel("bytes" + (", mean over seeds" if len(runs) > 1 else ""))
    room = f"{left:,} left of {train_gpt.BYTE_CAP:,}" if left >= 0 else f"{-left:,} ABOVE THE CAP"
    span = " to ".join(f"{total:,}" for total in sorted({min(totals), max(totals)}))
    axis.set_title(f"{span} bytes in all, compressor {runs[0].settings['COMPRESSOR']}: {room}")
    figure.suptitle(title(runs), x=0.01, ha="left", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def draw(runs, out):
    """Every picture that these runs have the data for -> paths of the pictures; a line tells
    what keeps one away.
    """
    pictures = {
        "training.png": (plot_training, all(run.steps and run.result["scores"] for run in runs)),
        "stages.png": (plot_stages, all(run.result["scores"] for run in runs)),
        "ttt.png": (plot_ttt, all(any("running_bpb" in row for row in run.ttt) for run in runs)),
        "bytes.png": (plot_bytes, all((run.folder / "artifact.bin").exists() for run in runs)),
    }
    drawn = []
    with plt.rc_context(STYLE):
        for name, (plot, possible) in pictures.items():
            if not possible:
                continue
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
