"""Do two ways of training train the same? Their losses against the spread of two seeds.

Steps, data and seeds are fixed.

    python benchmarks/bench_same.py "TRAIN_CUDA_GRAPHS=1" "KERNELS=0 ATTENTION_BACKEND=torch" \\
        "TREE=../before"

Each argument is a variant: settings of train_gpt.py, "" for none; TREE=DIR takes the one of another
checkout. The runs follow one another, every variant with every seed of --seeds: --steps steps of
98,304 tokens in four micro-batches, then the evaluation before quantization. --set goes to every
run and wins over that; DATA_PATH as in a run. A run lives in RUNS/<variant>-<seed>; one that has
ended is not run again.

For each variant but the first, seed by seed: the mean difference of a step's training loss from the
first variant's and that of the validation loss, beside the same two between the first variant's
seeds. Exit code 1 if a run failed or a variant differs by more than the seeds do; differences of
rounding are far smaller.
"""

import argparse
import itertools
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bench_presets import run_script  # noqa: E402
from tools.run_files import Run, read_run, settings_of  # noqa: E402

FIXED = {
    "MAX_WALLCLOCK_SECONDS": "0",
    "TRAIN_BATCH_TOKENS": "98304",
    "MICRO_BATCH_TOKENS": "24576",
    "TRAIN_LOG_EVERY": "1",
    "PREQUANT_ONLY": "1",
    "PLOTS": "0",
}


def train(variant: str, seed: str, args) -> Run | str:
    """A run to its end, unless it has been; -> the run, or what went wrong."""
    settings = settings_of(variant.split())
    tree = Path(settings.pop("TREE", ROOT)).resolve()
    name = re.sub(r"[^\w.-]+", "_", variant or "default") + "-" + seed
    folder = Path(args.runs, name)
    ours = FIXED | settings_of(args.set) | settings
    ours |= {"SEED": seed, "ITERATIONS": str(args.steps), "RUN_ID": name, "RUNS_DIR": args.runs}
    script = args.script or str(tree / "train_gpt.py")
    fault = ""
    if not (folder / "result.json").exists():
        fault = run_script(script, os.environ | ours, folder, tree)
    return fault or read_run(folder)


def difference(one: Run, other: Run) -> tuple[float, float]:
    """Mean absolute differences of training losses and of validation losses, in nats.

    Training losses are compared step by step.
    """
    pairs = list(zip(one.steps, other.steps, strict=True))
    assert all(a["step"] == b["step"] for a, b in pairs), "the logs are of different steps"
    training = sum(abs(a["train_loss"] - b["train_loss"]) for a, b in pairs) / len(pairs)
    validation = [run.result["scores"]["prequant"]["loss"] for run in (one, other)]
    return training, abs(validation[0] - validation[1])


def report(runs: dict, variants: list[str], seeds: list[str]) -> bool:
    """Prints losses and differences -> whether all differences are small.

    No variant may differ by more than the first one's seeds.
    """
    for (variant, seed), run in runs.items():
        losses = " ".join(f"{row['train_loss']:.4f}" for row in run.steps[:5])
        print(
            f"{variant or 'default'}, seed {seed}: first losses {losses}, last"
            f" {run.steps[-1]['train_loss']:.4f}, validation"
            f" {run.result['scores']['prequant']['loss']:.4f} nats"
        )
    first, *others = variants
    of_first = [runs[first, seed] for seed in seeds]
    apart = [difference(one, other) for one, other in itertools.combinations(of_first, 2)]
    spread = [max(column) for column in zip(*apart, strict=True)]
    print(
        f"between seeds of {first or 'default'}: training {spread[0]:.5f}, validation"
        f" {spread[1]:.5f} nats"
    )
    same = True
    for variant, seed in itertools.product(others, seeds):
        training, validation = difference(runs[first, seed], runs[variant, seed])
        within = training <= spread[0] and validation <= spread[1]
        same &= within
        print(
            f"{variant or 'default'} against {first or 'default'}, seed {seed}: training"
            f" {training:.5f}, validation {validation:.5f} nats: {'within' if within else 'BEYOND'}"
            " the spread of seeds"
        )
    return same


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "variants", nargs="+", metavar="SETTINGS", help='"NAME=value NAME=value TREE=DIR", or ""'
    )
    parser.add_argument("--seeds", default="42,43", help="at least two; default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=value", help="settings of every run"
    )
    parser.add_argument("--runs", default="runs/same", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--script", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.runs, seeds, runs = str(Path(args.runs).resolve()), args.seeds.split(","), {}
    if len(seeds) < 2:
        parser.error("--seeds wants two or more")
    for variant, seed in itertools.product(args.variants, seeds):
        run = train(variant, seed, args)
        if isinstance(run, str):
            sys.exit(f"{variant or 'default'}, seed {seed}: {run}")
        runs[variant, seed] = run
        print(f"{variant or 'default'}, seed {seed}: {len(run.steps)} steps", flush=True)
    if not report(runs, args.variants, seeds):
        sys.exit(1)


if __name__ == "__main__":
    main()
