"""Seeds in a table with mean and sample standard deviation, and tests against other runs or a
published number.

usage: python tools/summarize.py RUNS...    # runs, or sets of runs (folders of runs)
       python tools/summarize.py RUNS... --against OTHER...    # Welch's and the paired t-test
       python tools/summarize.py RUNS... --published 1.0611 [--published-std .0011 --published-n 3]

What is tested is the loss of the last evaluation (--stage: another), in nats per token. The contest
asks for runs that show, at p < 0.01, an improvement of at least 0.005 nats: the null hypothesis is
that the true means differ by 0.005 nats or less, the test is one-sided. Losses per token compare
only where the same text is cut into the same tokens; where the numbers of tokens differ, the other
side's nats per byte are counted over this side's tokens, as for a published BPB.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import command_line  # noqa: E402

if __name__ == "__main__":
    command_line.begin("summarize.py")

import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402

from tools.run_files import flatten, is_number, own_settings, read_runs  # noqa: E402

RULE_NATS, RULE_P = 0.005, 0.01  # of the contest: improvement at least, at a probability below


def show(number):
    """A number as a person reads it: whole ones with commas, scores to five places, seconds to
    two.
    """
    if isinstance(number, int) or abs(number) >= 1e5:
        return f"{number:,.0f}"
    return f"{number:.5f}" if abs(number) < 10 else f"{number:,.2f}"


class Row(NamedTuple):
    """One field of RESULT over the runs; mean and deviation where all have a number there (one
    run: no deviation).
    """

    name: str
    values: list
    mean: float | None
    std: float | None


def deviation(values):
    """Sample standard deviation; NaN where a value is not finite, at which statistics.stdev
    fails.
    """
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def tabulate(results):
    """RESULT dictionaries -> Rows in the order of the fields; a field that a run lacks is None
    there.
    """
    flat = [flatten(result) for result in results]
    rows = []
    for name in dict.fromkeys(name for fields in flat for name in fields):
        values = [fields.get(name) for fields in flat]
        numbers = all(map(is_number, values)) and name not in ("seed", "version")
        spread = deviation(values) if numbers and len(values) > 1 else None
        rows.append(Row(name, values, statistics.fmean(values) if numbers else None, spread))
    return rows


def table_lines(results):
    """The table as lines: a column for each seed, then mean and deviation; below it what is no
    number.
    """
    lines, rows = [], tabulate(results)
    head = ["", *(f"seed {result['seed']}" for result in results), "mean", "std (n - 1)"]
    cells = [
        [
            row.name,
            *(show(v) if is_number(v) else "-" if v is None else str(v) for v in row.values),
            "" if row.mean is None else show(row.values[0] if row.std == 0 else row.mean),
            "" if row.std is None else "0" if row.std == 0 else show(row.std),
        ]
        for row in rows
        if any(map(is_number, row.values)) and row.name not in ("seed", "version")
    ]
    widths = [max(len(line[column]) for line in [head, *cells]) for column in range(len(head))]
    for line in [head, *cells]:
        cells_right = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        lines.append("  ".join([line[0].ljust(widths[0]), *cells_right]))
    words = [row for row in rows if not any(map(is_number, row.values))]
    lines += [f"{row.name}: {', '.join(dict.fromkeys(map(str, row.values)))}" for row in words]
    for result in results:
        lines += [
            f"violation, seed {result['seed']}: {sentence}" for sentence in result["violations"]
        ]
    return lines


def differences(runs):
    """Lines that say in what these runs are no seeds of one method: commit, software, hardware,
    settings.
    """
    sides = [
        {name: run.result.get(name) for name in ("commit", "device", "world_size", "torch")}
        for run in runs
    ]
    names = {name for run in runs for name in own_settings(run)}
    for side, run in zip(sides, runs, strict=True):
        side |= {name: run.settings.get(name) for name in sorted(names)}
    for name in sides[0]:
        seeds = {}
        for side, run in zip(sides, runs, strict=True):
            seeds.setdefault(side[name], []).append(str(run.seed))
        if len(seeds) > 1:
            told = "; ".join(f"{value} (seed {', '.join(group)})" for value, group in seeds.items())
            yield f"note: {name} differs, so that the mean is of no one method: {told}"


class Sample(NamedTuple):
    """Losses of one side in nats per token: every one by seed, or (published) mean, deviation
    and number only.
    """

    losses: dict[int, float]
    mean: float
    std: float | None = None
    n: int | None = None


def last_stage(results):
    """The stage that a submission would be scored by: the last that all runs have.

    ValueError if there is none.
    """
    common = [
        name for name in results[0]["scores"] if all(name in result["scores"] for result in results)
    ]
    if not common:
        raise ValueError("these runs have no evaluation in common")
    return common[-1]


def sample(results, stage, tokens, num_bytes):
    """RESULTs -> Sample over `tokens`.

    ValueError where another text was scored or a seed stands twice.
    """
    losses = {}
    for result in results:
        if stage not in result["scores"]:
            raise ValueError(f"{result['run']} has no {stage} score; --stage names another")
        score = result["scores"][stage]
        if score["bytes"] != num_bytes:
            raise ValueError(
                f"{result['run']} scored {score['bytes']:,} bytes, the first run {num_bytes:,}:"
                " they were not scored on the same text"
            )
        if not math.isfinite(score["loss"]):
            raise ValueError(
                f"{result['run']}: its {stage} loss is {score['loss']}, which compares with nothing"
            )
        if result["seed"] in losses:
            raise ValueError(f"seed {result['seed']} stands twice")
        losses[result["seed"]] = score["loss"] * score["tokens"] / tokens
    return Sample(losses, statistics.fmean(losses.values()))


def welch(ours, theirs, margin):
    """p of "theirs - ours <= margin", variances unequal; None where there are too few runs or
    nothing
    varies.

    A published number alone has no deviation and is taken as exact: one-sample test.
    """
    mine = np.array(list(ours.losses.values()))
    if len(mine) < 2:
        return None
    if theirs.losses:
        other = np.array(list(theirs.losses.values())) - margin
        exact = len(other) < 2 or (mine.std() == 0 and other.std() == 0)
        return (
            None
            if exact
            else float(stats.ttest_ind(mine, other, equal_var=False, alternative="less").pvalue)
        )
    if theirs.std is not None:
        found = stats.ttest_ind_from_stats(
            mine.mean(),
            mine.std(ddof=1),
            len(mine),
            theirs.mean - margin,
            theirs.std,
            theirs.n,
            equal_var=False,
            alternative="less",
        )
        return float(found.pvalue)
    return (
        None
        if mine.std() == 0
        else float(stats.ttest_1samp(mine, theirs.mean - margin, alternative="less").pvalue)
    )


def paired(ours, theirs, margin):
    """p of the same from the differences of common seeds; None for less than two of them."""
    seeds = sorted(set(ours.losses) & set(theirs.losses))
    differences = np.array([ours.losses[seed] - theirs.losses[seed] for seed in seeds])
    if len(seeds) < 2 or differences.std() == 0:
        return None
    return float(stats.ttest_1samp(differences, -margin, alternative="less").pvalue)


def compare_lines(ours, theirs, stage, tokens, num_bytes):
    """-> (lines of the comparison, whether the contest's rule is met).

    Welch's test decides, the paired one informs.
    """
    gain = theirs.mean - ours.mean
    to_bpb = tokens / num_bytes / math.log(2)
    common = sorted(set(ours.losses) & set(theirs.losses))
    p = {
        margin: (welch(ours, theirs, margin), paired(ours, theirs, margin))
        for margin in (0.0, RULE_NATS)
    }
    alone = not theirs.losses and theirs.std is None
    lines = [
        (
            f"{stage} loss in nats per token over {tokens:,} tokens and {num_bytes:,} bytes, lower"
            " is better"
        ),
        f"  these runs  {ours.mean:.5f} (n = {len(ours.losses)})    {ours.mean * to_bpb:.5f} BPB",
        f"  reference   {theirs.mean:.5f} (n = {len(theirs.losses) or theirs.n or 'unknown'})    "
        f"{theirs.mean * to_bpb:.5f} BPB"
        + ("    taken as exact: no deviation was given" if alone else ""),
        f"  improvement {gain:.5f} nats, {gain * to_bpb:.5f} BPB",
        (
            f"  {'one-sided p that the improvement is':37}{'one-sample' if alone else 'Welch':>10} "
            f"   paired ({len(common)} common seeds)"
        ),
    ]
    for margin, words in ((0.0, "nothing or less"), (RULE_NATS, f"{RULE_NATS} nats or less")):
        cells = ["-" if value is None else f"{value:.2g}" for value in p[margin]]
        lines.append(f"    {words:35}{cells[0]:>10}    {cells[1]}")
    decided = p[RULE_NATS][0]
    why = "no test is possible" if decided is None else f"p = {decided:.2g}"
    met = decided is not None and decided < RULE_P
    lines.append(
        f"contest's rule, at least {RULE_NATS} nats better at p < {RULE_P}:"
        f" {'yes' if met else 'no'} ({why})"
    )
    return lines, met


def add_reference(parser):
    """The options that name what to compare with."""
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--against", nargs="+", metavar="OTHER", help="the runs to beat")
    reference.add_argument("--published", type=float, metavar="BPB", help="the mean BPB to beat")
    parser.add_argument("--published-std", type=float, metavar="S", help="its deviation over seeds")
    parser.add_argument(
        "--published-n", type=int, metavar="N", help="its number of seeds, with --published-std"
    )
    parser.add_argument(
        "--stage",
        metavar="NAME",
        help="score that is tested (default: the last that all runs have)",
    )


def compare(results, options):
    """RESULTs and what add_reference parsed -> (lines, whether the contest's rule is met).

    ValueError if impossible.
    """
    std, n = options.published_std, options.published_n
    if (std is None) != (n is None) or (
        std is not None and (options.published is None or std <= 0 or n < 2)
    ):
        raise ValueError(
            "--published-std (above 0) and --published-n (2 or more) go together, and with"
            " --published"
        )
    against = [run.result for run in read_runs(options.against or [])]
    stage = options.stage or last_stage(results + against)
    # sample() names the run that lacks it
    first = results[0]["scores"].get(stage, {"tokens": 1, "bytes": 0})
    counts = first["tokens"], first["bytes"]
    ours, nats = sample(results, stage, *counts), math.log(2) * counts[1] / counts[0]
    theirs = (
        sample(against, stage, *counts)
        if against
        else Sample({}, options.published * nats, std and std * nats, n)
    )
    return compare_lines(ours, theirs, stage, *counts)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="runs, or sets of runs")
    add_reference(parser)
    options = parser.parse_args(arguments)
    try:
        runs = read_runs(options.runs)
        results = [run.result for run in runs]
        print("\n".join([*table_lines(results), *differences(runs)]))
        if options.against or options.published is not None:
            print("\n" + "\n".join(compare(results, options)[0]))
    except ValueError as error:
        sys.exit(f"summarize.py: {error}")


if __name__ == "__main__":
    command_line.run(main, "summarize.py")
