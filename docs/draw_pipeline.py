"""Picture of the pipeline: what each stage does, its seconds, and the BPB after it, from one run.

usage: python docs/draw_pipeline.py RUN [--out FILE]      RUN: a folder with log.txt and result.json
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

from tools import command_line  # noqa: E402
from tools.plot_run import bpb_factor, title  # noqa: E402
from tools.run_files import RunError, read_runs  # noqa: E402

WIDTH, HEIGHT, GAP = 1.75, 1.0, 0.3


class Stage(NamedTuple):
    """One box: its name, the line below it, the score after it ("" if there is none)."""

    name: str
    details: str
    score: str
    color: str


def bpb_after(result, name):
    """BPB of a score with its difference from the score before it; "not run" without it."""
    scores = result["scores"]
    if name not in scores:
        return "not run"
    bpb = scores[name]["bpb"]
    before = {"quantized": "prequant", "ttt": "quantized"}.get(name)
    if before not in scores:
        return f"{bpb:.4f}"
    return f"{bpb:.4f}\n({bpb - scores[before]['bpb']:+.4f})"


def stages_of(run):
    """The stages of a run in order; the first score is that of the first training step."""
    result = run.result
    seconds = result["seconds"]
    untrained = run.steps[0]["train_loss"] * bpb_factor(result)
    quantization = seconds["hessians"] + seconds["quantize"] + seconds["quant_check"]
    size = f"{result['artifact_bytes']:,}\n+ code {result['code_bytes']:,}\nbytes"
    ttt = f"{seconds['eval_ttt']:.0f} s" if "eval_ttt" in seconds else "LoRA per\ndocument"
    return [
        Stage("Text to shards", "CaseOps, 8,192\ntokens; bytes of\neach token", "", "#e8e8e8"),
        Stage(
            "Warm-up", f"compilation,\n{seconds['warm_up']:.1f} s", f"{untrained:.4f}", "#e8e8e8"
        ),
        Stage(
            "Training",
            f"{result['steps']:,} steps,\n{result['training_seconds']:.1f} s",
            bpb_after(result, "prequant"),
            "#cfe2f3",
        ),
        Stage(
            "Quantization",
            f"Hessians, GPTQ,\nand check:\n{quantization:.1f} s",
            bpb_after(result, "quantized"),
            "#d9ead3",
        ),
        Stage("Packing", f"{size}, {seconds['pack']:.1f} s", "no loss", "#fff2cc"),
        Stage("Test-time training", ttt, bpb_after(result, "ttt"), "#f4cccc"),
    ]


def draw(run, path):
    """Writes the picture of one run to a PNG file."""
    stages = stages_of(run)
    length = len(stages) * (WIDTH + GAP) - GAP
    figure, axis = plt.subplots(figsize=(10, 2.3), layout="constrained", dpi=160)
    axis.set_xlim(-0.75, length + 0.1)
    axis.set_ylim(-0.8, HEIGHT + 0.1)
    axis.axis("off")
    centered = {"ha": "center", "va": "center"}
    for place, stage in enumerate(stages):
        left = place * (WIDTH + GAP)
        middle = left + WIDTH / 2
        shape = FancyBboxPatch(
            (left, 0), WIDTH, HEIGHT, boxstyle="round,pad=0.03", facecolor=stage.color
        )
        axis.add_patch(shape)
        axis.text(middle, 0.82, stage.name, fontweight="bold", fontsize=9.5, **centered)
        axis.text(middle, 0.34, stage.details, fontsize=9, **centered)
        axis.text(middle, -0.45, stage.score, fontweight="bold", fontsize=13, **centered)
        if place:
            style = {"arrowstyle": "->", "linewidth": 1.4}
            axis.annotate("", (left - 0.03, 0.5), (left - GAP + 0.03, 0.5), arrowprops=style)
    axis.text(-0.1, -0.45, "BPB\nafter it", fontsize=10, ha="right", va="center")
    figure.suptitle(title([run]), x=0.01, ha="left", fontsize=10)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="folder with log.txt and result.json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: pipeline.png in RUN")
    options = parser.parse_args()
    try:
        [run] = read_runs([options.run])
        draw(run, options.out or run.folder / "pipeline.png")
    except RunError as error:
        sys.exit(f"draw_pipeline.py: {error}")


if __name__ == "__main__":
    command_line.run(main, "draw_pipeline.py")
