"""The default training step on 1, 2, 4 and 8 ranks of one host, the same tokens a step in all.

    python benchmarks/bench_scaling.py [--ranks 1,2,4,8] [--seconds 20] [--losses 60] \\
        [--out FILE.json]

For each number of ranks this starts itself under torchrun: --losses steps from the same start,
looping on for the second half, whose losses must agree between rank counts within the noise of the
number format; then, for looping off and on, a window of --seconds with the clock of a run and three
steps under torch.profiler. Columns: milliseconds a step, tokens/s, efficiency (rate over ranks
times the first row's rate a rank), and of a profiled step milliseconds of communication on rank 0's
device, how many of them no other kernel covers, and how many these are on the rank that waits
least: a collective begins when the slowest rank arrives, the others wait in it. Then each
collective: launches, milliseconds, uncovered, uncovered where least. DATA_PATH and settings as in a
run; without DATA_PATH, synthetic shards. --device cpu measures a small model over gloo, where
nothing is covered.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg
from benchmarks.bench_step import (
    SMALL,
    Event,
    annotated,
    busy_ms,
    profile_step,
    tokens_per_second,
    write_synthetic_shards,
)
from tools.guard import RunGuard


def collective_name(event: Event) -> str:
    """Which collective an event of that phase belongs to."""
    words = event.name + " ".join(frame[0] for frame in event.chain)
    found = re.search("all_?reduce|reduce_?scatter|all_?gather|broadcast", words, re.IGNORECASE)
    return found[0].lower().replace("_", "") if found else "other"


def communication(events: list[Event], covered: bool) -> dict:
    """{collective: launches, ms, exposed_ms} and the total "all", of the events of one step.

    exposed_ms: milliseconds that no other kernel covers; all of them without `covered`.
    """
    compute = [e for e in events if e.phase != "collectives"]
    table = {}
    groups = defaultdict(list)
    for event in events:
        if event.phase == "collectives":
            groups[collective_name(event)].append(event)
            groups["all"].append(event)
    busy = busy_ms(compute)
    for name, group in groups.items():
        ms = sum(e.duration for e in group) / 1e3
        exposed = busy_ms(group + compute) - busy if covered else ms
        table[name] = {"launches": len(group), "ms": ms, "exposed_ms": exposed}
    return table


def mean_and_least(ranks: list[list[dict]]) -> dict:
    """communication() of [rank][step] -> means of rank 0 over the steps, and least_ms.

    least_ms: exposed_ms of the rank where it is least in a step, mean over the steps.
    """
    table = {}
    for name, first in ranks[0][0].items():
        of_steps = [[rank[step][name] for rank in ranks] for step in range(len(ranks[0]))]
        means = {
            key: sum(step[0][key] for step in of_steps) / len(of_steps)
            for key in ("ms", "exposed_ms")
        }
        least = sum(min(rank["exposed_ms"] for rank in step) for step in of_steps) / len(of_steps)
        table[name] = {"launches": first["launches"], **means, "least_ms": least}
    return table


def fixed_steps(trainer, steps: int) -> list[float]:
    """Mean training loss of each of the first `steps` steps, looping on for the second half."""
    losses = [trainer.train_step(i, i / steps, 2 * i >= steps) for i in range(steps)]
    return trainer.dist.all_reduce(torch.stack(losses)).tolist() if losses else []


def settings(args) -> tg.Hyperparameters:
    """Those of a run; on a CPU a small model, with a row a rank for the largest of --ranks."""
    hp = replace(tg.Hyperparameters.from_env(guard=RunGuard()), device=args.device)
    if args.device != "cpu" and torch.cuda.is_available():
        return hp
    most = max(2, *map(int, args.ranks.split(",")))
    return replace(hp, **SMALL | {"train_batch_tokens": most * SMALL["micro_batch_tokens"]})


def worker(args) -> None:
    """One rank of one row of the table; rank 0 writes --out."""
    dist = tg.Dist(args.device)
    cuda = dist.device.type == "cuda"
    hp = settings(args)
    loader = tg.TrainLoader(tg.TokenStream(hp.data_path, "train"), hp, dist)
    trainer = tg.Trainer(tg.build_model(hp, dist), loader, hp, dist, print, RunGuard())
    trainer.optimizers.step = annotated("optimizer", trainer.optimizers.step)
    losses = fixed_steps(trainer, args.losses)
    result = {
        "ranks": dist.world_size,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "losses": losses,
        "states": {},
    }
    for state, looping in (("off", False), ("on", True)):
        step = args.losses
        for _ in range(3):
            trainer.train_step(step, 0.0, looping)
            step += 1
        dist.synchronize()
        rate, step = tokens_per_second(trainer, looping, args.seconds, step)
        profiled = [communication(profile_step(trainer, step + i, looping), cuda) for i in range(3)]
        result["states"][state] = {
            "tokens_per_second": rate,
            "step_ms": 1e3 * hp.train_batch_tokens / rate,
            "communication": mean_and_least(dist.all_gather_object(profiled)),
            "peak_gb": torch.cuda.max_memory_reserved() / 1e9 if cuda else 0.0,
        }
    if dist.rank == 0:
        Path(args.out).write_text(json.dumps(result))
    dist.close()


def print_row(row: dict, first: dict) -> None:
    """One line for each state of looping."""
    for state, figures in row["states"].items():
        a_rank_of_first = first["states"][state]["tokens_per_second"] / first["ranks"]
        efficiency = figures["tokens_per_second"] / row["ranks"] / a_rank_of_first
        parts = {"all": {"ms": 0.0, "exposed_ms": 0.0, "least_ms": 0.0}} | figures["communication"]
        total = parts.pop("all")
        collectives = ", ".join(
            f"{name} {p['launches']} x {p['ms']:.1f} {p['exposed_ms']:.1f} {p['least_ms']:.1f}"
            for name, p in parts.items()
        )
        print(
            f"{row['ranks']:5d} {state:>7} {figures['step_ms']:9.1f}"
            f" {figures['tokens_per_second']:12,.0f} {efficiency:10.3f} {total['ms']:9.1f}"
            f" {total['exposed_ms']:9.1f} {total['least_ms']:7.1f}  {collectives}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument(
        "--ranks", default="1,2,4,8", help="numbers of ranks; the first is the reference"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="window of each rate")
    parser.add_argument(
        "--losses", type=int, default=60, help="steps whose losses are compared; 0: none"
    )
    parser.add_argument("--out", default="scaling.json", help="file for the figures as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    rows = []
    print(
        "ranks looping   ms/step     tokens/s efficiency   comm ms   exposed   least  "
        "collectives (launches, ms, exposed, least)"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = dict(os.environ)
        if "DATA_PATH" not in environment:
            environment |= {"DATA_PATH": folder, "MARKER_FUSION_ENABLED": "0"}  # no text
            hp = settings(args)
            write_synthetic_shards(folder, 90 * hp.train_batch_tokens, hp.vocab_size)
        for ranks in map(int, args.ranks.split(",")):
            row = Path(folder, "row.json")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={ranks}", __file__, "--worker", f"--out={row}"]
            command += [f"--device={args.device}", f"--ranks={args.ranks}"]
            command += [f"--seconds={args.seconds}", f"--losses={args.losses}"]
            subprocess.run(command, env=environment, check=True)
            rows.append(json.loads(row.read_text()))
            print_row(rows[-1], rows[0])
            Path(args.out).write_text(json.dumps(rows, indent=1))
    if args.losses and len(rows) > 1:
        for row in rows[1:]:
            gaps = [abs(a - b) for a, b in zip(row["losses"], rows[0]["losses"], strict=True)]
            print(
                f"losses of {args.losses} steps, {row['ranks']} ranks against {rows[0]['ranks']}:"
                f" at most {max(gaps):.2g} nats apart, {gaps[-1]:.2g} at the last"
                f" ({row['losses'][-1]:.4f})"
            )
            assert math.isfinite(max(gaps)), "training diverged"


if __name__ == "__main__":
    main()
