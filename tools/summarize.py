"""A table of seeds with mean and standard deviation, and tests against a reference.

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

# of the contest: least improvement, and the probability below which it must be
RULE_NATS = 0.005
RULE_P = 0.01
UNTESTED = ("seed", "version")  # numbers without a mean


def show(number):
    """A number as a person reads it: commas, five places for scores, two for seconds."""
    if isinstance(number, int) or abs(number) >= 1e5:
        return f"{number:,.0f}"
    return f"{number:.5f}" if abs(number) < 10 else f"{number:,.2f}"


class Row(NamedTuple):
    """One field of RESULT over the runs.

    Mean and standard deviation are None unless all runs have a number there; the deviation also
    for a single run.
    """

    name: str
    values: list
    mean: float | None
    std: float | None

    def has_numbers(self):
        return any(map(is_number, self.values)) and self.name not in UNTESTED

    def cells(self):
        """The texts of a line of the table."""
        cells = [self.name]
        for value in self.values:
            if value is None:
                cells.append("-")
            else:
                cells.append(show(value) if is_number(value) else str(value))
        mean = self.values[0] if self.std == 0 else self.mean  # an integer stays one
        cells.append("" if self.mean is None else show(mean))
        if self.std is None:
            cells.append("")
        else:
            cells.append("0" if self.std == 0 else show(self.std))
        return cells


def deviation(values):
    """Sample standard deviation; NaN if a value is not finite, for which statistics.stdev fails."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def tabulate(results):
    """RESULT dictionaries -> Rows in the order of the fields; None where a run lacks a field."""
    flat = [flatten(result) for result in results]
    names = {}  # a dictionary keeps their order
    for fields in flat:
        names |= dict.fromkeys(fields)
    rows = []
    for name in names:
        values = [fields.get(name) for fields in flat]
        mean = std = None
        if all(map(is_number, values)) and name not in UNTESTED:
            mean = statistics.fmean(values)
            std = deviation(values) if len(values) > 1 else None
        rows.append(Row(name, values, mean, std))
    return rows


def aligned(table):
    """Lists of cells -> lines; the first column to the left, the others to the right."""
    columns = zip(*table, strict=True)
    widths = [max(map(len, column)) for column in columns]
    for cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[0] = cells[0].ljust(widths[0])
        yield "  ".join(padded)


def table_lines(results):
    """The table as lines: a column for each seed, then mean and standard deviation.

    Below it the fields that are no numbers, and the violations.
    """
    rows = tabulate(results)
    head = ["", *(f"seed {result['seed']}" for result in results), "mean", "std (n - 1)"]
    lines = list(aligned([head, *(row.cells() for row in rows if row.has_numbers())]))
    for row in rows:
        if not any(map(is_number, row.values)):
            values = dict.fromkeys(map(str, row.values))
            lines.append(f"{row.name}: {', '.join(values)}")
    for result in results:
        for sentence in result["violations"]:
            lines.append(f"violation, seed {result['seed']}: {sentence}")
    return lines


def differences(runs):
    """Lines that name what else than the seed differs: commit, software, hardware, settings."""
    settings = {name for run in runs for name in own_settings(run)}
    seeds_of = {name: {} for name in ("commit", "device", "world_size", "torch")}
    for run in runs:
        for name in seeds_of:
            value = run.result.get(name)
            seeds_of[name].setdefault(value, []).append(str(run.seed))
    for name in sorted(settings):
        seeds_of[name] = {}
        for run in runs:
            value = run.settings.get(name)
            seeds_of[name].setdefault(value, []).append(str(run.seed))
    for name, values in seeds_of.items():
        if len(values) > 1:
            told = [f"{value} (seed {', '.join(seeds)})" for value, seeds in values.items()]
            words = f"{name} differs, so that the mean is of no one method"
            yield f"note: {words}: {'; '.join(told)}"


class Sample(NamedTuple):
    """Losses of one side in nats per token.

    Of a published number only mean, standard deviation and number of seeds are known.
    """

    losses: dict[int, float]  # by seed
    mean: float
    std: float | None = None
    n: int | None = None

    def is_exact(self):
        """Whether it is a published number without a deviation, which is taken as exact."""
        return not self.losses and self.std is None


def last_stage(results):
    """The stage that a submission would be scored by: the last that all runs have.

    Raises ValueError if there is none.
    """
    names = results[0]["scores"]
    common = [name for name in names if all(name in result["scores"] for result in results)]
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
    """p of "theirs - ours <= margin" with unequal variances; None if no test is possible.

    That is with too few runs, or where nothing varies. A published number without a deviation is
    taken as exact: one-sample test.
    """
    mine = np.array(list(ours.losses.values()))
    if len(mine) < 2:
        return None
    if theirs.losses:
        other = np.array(list(theirs.losses.values())) - margin
        if len(other) < 2 or (mine.std() == 0 and other.std() == 0):
            return None
        test = stats.ttest_ind(mine, other, equal_var=False, alternative="less")
    elif theirs.std is not None:
        test = stats.ttest_ind_from_stats(
            mine.mean(),
            mine.std(ddof=1),
            len(mine),
            theirs.mean - margin,
            theirs.std,
            theirs.n,
            equal_var=False,
            alternative="less",
        )
    elif mine.std() == 0:
        return None
    else:
        test = stats.ttest_1samp(mine, theirs.mean - margin, alternative="less")
    return float(test.pvalue)


def paired(ours, theirs, margin):
    """p of the same from the differences of common seeds; None for less than two of them."""
    seeds = sorted(set(ours.losses) & set(theirs.losses))
    differences = np.array([ours.losses[seed] - theirs.losses[seed] for seed in seeds])
    if len(seeds) < 2 or differences.std() == 0:
        return None
    return float(stats.ttest_1samp(differences, -margin, alternative="less").pvalue)


def show_p(value):
    return "-" if value is None else f"{value:.2g}"


def compare_lines(ours, theirs, stage, tokens, num_bytes):
    """-> (lines of the comparison, whether the contest's rule is met).

    Welch's test decides, the paired one informs.
    """
    gain = theirs.mean - ours.mean
    to_bpb = tokens / num_bytes / math.log(2)
    common = set(ours.losses) & set(theirs.losses)
    reference = f"{theirs.mean:.5f} (n = {len(theirs.losses) or theirs.n or 'unknown'})"
    exact = "    taken as exact: no deviation was given" if theirs.is_exact() else ""
    test = "one-sample" if theirs.is_exact() else "Welch"
    lines = [
        f"{stage} loss in nats per token over {tokens:,} tokens and {num_bytes:,} bytes, lower is"
        " better"
    ]
    lines.append(
        f"  these runs  {ours.mean:.5f} (n = {len(ours.losses)})    {ours.mean * to_bpb:.5f} BPB"
    )
    lines.append(f"  reference   {reference}    {theirs.mean * to_bpb:.5f} BPB{exact}")
    lines.append(f"  improvement {gain:.5f} nats, {gain * to_bpb:.5f} BPB")
    lines.append(
        f"  {'one-sided p that the improvement is':37}{test:>10}"
        f"    paired ({len(common)} common seeds)"
    )
    for margin, words in ((0.0, "nothing or less"), (RULE_NATS, f"{RULE_NATS} nats or less")):
        p = show_p(welch(ours, theirs, margin))
        lines.append(f"    {words:35}{p:>10}    {show_p(paired(ours, theirs, margin))}")
    decided = welch(ours, theirs, RULE_NATS)
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


def check_options(options):
    """Raises ValueError for a published deviation that is incomplete or cannot be."""
    std = options.published_std
    n = options.published_n
    if std is None and n is None:
        return
    complete = None not in (std, n, options.published)
    if not complete or std <= 0 or n < 2:
        raise ValueError(
            "--published-std (above 0) and --published-n (2 or more) go together, and with"
            " --published"
        )


def compare(results, options):
    """RESULTs and what add_reference parsed -> (lines, whether the contest's rule is met).

    Raises ValueError if they cannot be compared.
    """
    check_options(options)
    against = [run.result for run in read_runs(options.against or [])]
    stage = options.stage or last_stage(results + against)
    # sample() names the run that lacks the stage
    first = results[0]["scores"].get(stage, {"tokens": 1, "bytes": 0})
    tokens = first["tokens"]
    num_bytes = first["bytes"]
    ours = sample(results, stage, tokens, num_bytes)
    if against:
        theirs = sample(against, stage, tokens, num_bytes)
    else:
        nats = math.log(2) * num_bytes / tokens
        std = options.published_std and options.published_std * nats
        theirs = Sample({}, options.published * nats, std, options.published_n)
    return compare_lines(ours, theirs, stage, tokens, num_bytes)


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
