"""Pictures of one run from its log: loss against time with looping and learning rate marked, and seconds of each stage.

usage: python tools/plot_run.py runs/<RUN_ID>     -> training.png and stages.png in that folder
"""

import json
import math
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def read_log(path):
    """Log -> (rows of training steps as dictionaries of numbers, RESULT dictionary). Raises ValueError without one."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    steps = [{key: float(value) for key, value in re.findall(r"(\w+):([-\d.e+]+)", line)}
             for line in lines if line.startswith("step:") and "train_loss:" in line]
    results = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    if not results:
        raise ValueError(f"{path}: no RESULT line; the run did not end")
    return steps, json.loads(results[-1])


def plot_training(steps, result, path):
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    seconds = [row["train_seconds"] for row in steps]
    axis.plot(seconds, [row["train_loss"] for row in steps], marker=".", label="training loss (nats per token)")
    for number, (name, score) in enumerate(result["scores"].items()):
        label = f"validation, {name}: {score['bpb']:.4f} BPB"
        axis.axhline(score["loss"], linestyle=":", linewidth=1.5, color=f"C{number + 2}", label=label)
    looped = [row["train_seconds"] for row in steps if row["looping"]]
    if looped:
        axis.axvspan(looped[0], seconds[-1], alpha=0.15, color="lightgray", label="looping on")
    rate = axis.twinx()
    rate.plot(seconds, [row["lr_factor"] for row in steps], color="tab:orange", linewidth=1)
    rate.set_ylabel("learning-rate factor", color="tab:orange")
    rate.set_ylim(0, 1.05)
    axis.set_xlabel("seconds of training")
    axis.set_ylabel("nats per token")
    axis.set_title(f"{result['run']}: {result['steps']} steps on {result['device']}, {result['total_bytes']:,} bytes")
    axis.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def plot_stages(result, path):
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    names = list(result["seconds"])
    bars = axis.barh(names, [result["seconds"][name] for name in names])
    axis.bar_label(bars, fmt="%.1f s", padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("seconds")
    axis.set_title(f"{result['run']}: stages")
    figure.savefig(path, dpi=120)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    steps, result = read_log(folder / "log.txt")
    if steps:
        plot_training(steps, result, folder / "training.png")
    plot_stages(result, folder / "stages.png")
    if steps and result["scores"]:
        score = next(iter(result["scores"].values()))
        untrained = steps[0]["train_loss"] / math.log(2) * score["tokens"] / score["bytes"]
        print(f" untrained: {untrained:.4f} BPB (first training step, at the validation set's bytes per token)")
    for name, score in result["scores"].items():
        print(f"{name:>10}: {score['bpb']:.4f} BPB ({score['tokens']:,} tokens, {score['bytes']:,} bytes)")
    print(f"  artifact: {result['artifact_bytes']:,} bytes + code {result['code_bytes']:,} = {result['total_bytes']:,}")
    print(f"     plots: {folder}/training.png, {folder}/stages.png")


if __name__ == "__main__":
    main()
