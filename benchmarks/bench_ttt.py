"""Test-time training: seconds of a step, cost and score of complete runs, the evaluation budget.

    python benchmarks/bench_ttt.py steps [--rows 64,16,4] [--widths 128,512,2048] [--repeats 5] \\
        [--out FILE]
    python benchmarks/bench_ttt.py runs --artifact runs/NAME/artifact.bin \\
        [--reference] [--bf16-head] [--published] ["TTT_LORA_RANK=48 ..." ...]
    python benchmarks/bench_ttt.py plan [--ranks 8] [--device h100|h200] [--limit 600] \\
        [--lengths FILE | --data DIR] [--steps-json FILE] ["TTT_CHUNK_SIZE=16 ..." ...]

`steps`: the default model with random weights; times do not depend on what is learned. Prints the
seconds of the stage's warm-up (all compilation), then for every number of rows and width of window:
milliseconds of a step (forward of the windows, lm_head, backward to the adapters, their AdamW)
launched directly and as a CUDA graph, the schedule's cost model, and window positions per second of
the graph, with the ratio to the published rate of one H100 (240,000 positions/s). With
TTT_STALE_CONTEXT a width is that of the complete context; positions are the recomputed ones.
--out writes rows, widths and milliseconds as JSON for `plan`.

`runs`: every quoted argument is one run of test-time training on the model of an artifact, with
these settings on top of the environment ("" for none; TTT_MAX_DOCS picks documents of all lengths).
Prints for each: BPB, seconds in total, of compilation, of capturing, of steps, scored tokens and
window positions per second of stepping. --reference adds the straightforward scorer, document by
document without compilation (and without NGRAM_TILT_ENABLED), and the difference of its BPB.
--bf16-head computes logits in bfloat16 in both, as published systems do. With --published the runs
are those of presets/published.py, whose settings arguments may have then.

Without CUDA these two say so and exit 0 (`--cpu` runs anyway).

`plan`: lays out the evaluation of the contest's 50,000 validation documents on --ranks GPUs,
without model or device, and adds up seconds: steps by the cost model of train_gpt.py or measured
(--steps-json), fine-tuning of the base weights, fixed costs. Every quoted argument is one plan, as
in `runs`. Other documents come from --lengths, a JSON file {"documents", "tokens", "points"} with
points [rank, tokens] of the sorted lengths, or from --data, a folder of shards. Lengths are in
stored tokens; with MARKER_FUSION_ENABLED those of --data are counted once more with fused markers,
others are scaled by the share of the proxy's validation text. Exits with 1 when a plan leaves less
than 40 s of the limit. docs/EVALUATION.md says how far to believe it.
"""

import argparse
import collections
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg
from presets import published
from tools.guard import RunGuard
from tools.run_files import settings_of

# PR 1855 on 8 H100: 12,400 tokens/s a GPU, 18 to 21 positions a token
PUBLISHED_POSITIONS_PER_S = 240_000


class Lines(list):
    """Stands in for RunLog: keeps the lines, and prints them to stderr."""

    def __init__(self):
        self.seconds = {}
        self.guard = tg.NO_GUARD

    def __call__(self, line):
        self.append(line)
        print(line, file=sys.stderr, flush=True)


def past_window(model, tokens, start, window, kept):
    """The model for a window that continues a document, on the keys and values of what came before.

    kept: for every slot [keys, values] (1, T, K, E) of all positions of the document. Attention
    reads the last TTT_STALE_CONTEXT of them before the window and writes those of the window.
    """
    row = copy.copy(model)
    before = window - start
    stale = model.hp.ttt_stale_context
    slots = iter(kept)

    def embed(inputs, window_start):
        lookback = tokens[None, window - 1 : window + inputs.size(1)]
        return model.embed(lookback, window_start)[:, 1:]

    if before:
        row.embed = embed

    def attention(q, k, v, cu_seqlens, max_seqlen, attn_window=0):
        cos = model.cos[before : before + 1]
        sin = model.sin[before : before + 1]
        q = tg.apply_rotary_emb(q, cos, sin)
        k = tg.apply_rotary_emb(k, cos, sin)
        first = max(0, before - stale)
        end = before + k.size(1)
        seen = []
        for old, new in zip(next(slots), (k, v), strict=True):
            seen.append(torch.cat((old[:, first:before], new), 1))
            old[:, before:end] = new.detach()
        mask = torch.ones(q.size(1), end - first, dtype=torch.bool, device=q.device)
        mask = mask.tril(before - first)
        if attn_window:
            mask = mask.triu(before - first - attn_window)
        heads = []
        for t in (q, *seen):
            heads.append(t.repeat_interleave(q.size(2) // t.size(2), 2).transpose(1, 2))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*heads, attn_mask=mask).transpose(1, 2)

    row.ops = model.ops._replace(attention=attention)
    return row


def score_document(model, lora, tokens, start, end, row):
    """Scores inputs start to end with the adapters of `row` (1, n), which learn -> list of nats."""
    hp = lora.hp
    leaves = [torch.nn.Parameter(half) for half in row.tensor_split([lora.layout.a_total], 1)]
    b_lr = hp.ttt_lora_lr
    a_lr = b_lr * hp.ttt_lora_a_lr_ratio
    groups = [{"params": [leaf], "lr": lr} for leaf, lr in zip(leaves, (a_lr, b_lr), strict=True)]
    optimizer = torch.optim.AdamW(groups, b_lr, (0.0, hp.ttt_beta2), 1e-10, hp.ttt_weight_decay)
    shape = (lora.layout.num_slots, 2, 1, end - start, hp.num_kv_heads, hp.head_dim)
    kept = torch.zeros(shape, dtype=model.dtype, device=tokens.device)
    size = int(hp.chunk_size_of(end - start))
    nats = []
    for first in range(start, end, size):
        last = min(first + size, end)
        window = max(start, last - hp.ttt_eval_seq_len + hp.ttt_stale_context)
        tap = lora.tap(lora.scaled_parts(torch.cat(leaves, 1), slice(None)))
        of_window = model
        if hp.ttt_stale_context:
            of_window = past_window(model, tokens, start, window, kept)
        hidden = of_window.forward_hidden(
            tokens[None, window:last], max_seqlen=hp.ttt_eval_seq_len, looping=True, tap=tap
        )
        targets = tokens[None, first + 1 : last + 1]
        losses = model.token_losses(hidden[:, first - window :], targets, tap.head)
        nats += losses[0].tolist()
        if last < end:
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
    return nats


def document_by_document(model, validation, hp, dist):
    """The definition of the answer -> {(document, target position): nats}.

    One document after the other, windows of their own length, no compilation, no padding, torch's
    AdamW; between phases TestTimeTrainer.global_adapt.
    """
    tokens = torch.from_numpy(validation.tokens).to(dist.device)
    trainer = tg.TestTimeTrainer(model, validation, hp, dist, Lines())
    lora = tg.BatchedLoRA(model, range(hp.ttt_lanes), hp, dist.device, tg.adamw_rows_ref)
    a_total = lora.layout.a_total
    model.requires_grad_(False)
    chosen = trainer.documents
    lengths = validation.ends - validation.starts
    found = {}
    for phase in tg.plan_ttt(lengths[chosen], hp):
        queues = [documents for lane in phase.lanes for documents in lane]
        for queue, documents in enumerate(queues):
            for document in chosen[documents].tolist():
                start = int(validation.starts[document])
                end = int(validation.ends[document])
                row = lora.values.new_zeros(1, lora.values.size(1))
                row[0, :a_total] = lora.warm_a[queue]
                nats = score_document(model, lora, tokens, start, end, row)
                for target, loss in enumerate(nats, start + 1):
                    found[document, target] = loss
                if hp.ttt_warm_start_a and start < end:
                    lora.warm_a[queue] = row[0, :a_total]
        if phase.adapt:
            trainer.global_adapt(chosen[phase.documents])
    model.requires_grad_(True)
    return found


def random_validation(hp, documents=64):
    """Random documents that are a chunk longer than the context, like ValidationSet."""
    length = hp.ttt_eval_seq_len + hp.ttt_chunk_size
    num_tokens = documents * (length + 1) + 1
    tokens = np.random.default_rng(0).integers(8, hp.vocab_size, num_tokens)
    starts = np.arange(documents) * (length + 1)
    tokens[starts] = tg.BOS_ID
    target_bytes = np.full(len(tokens), 3)
    return SimpleNamespace(
        tokens=tokens,
        bytes=target_bytes,
        starts=starts,
        ends=starts + length,
        targets_of=lambda numbers: (length * len(numbers), 3 * length * len(numbers)),
    )


def seconds_of(run, dist, repeats):
    """Mean seconds of a call over `repeats` of them, after a first one that does not count."""
    run()
    dist.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    dist.synchronize()
    return (time.perf_counter() - start) / repeats


def bench_shape(trainer, rows, width, repeats):
    """Times steps of one shape -> a line of the table, milliseconds of a step.

    These are of the CUDA graph where there is one, or else of the launched step.
    """
    hp = trainer.hp
    device = trainer.dist.device
    starts = trainer.validation.starts
    recomputed = tg.recomputed_context(hp)
    window = min(width, recomputed)
    chunk = min(hp.ttt_chunk_size, width)
    state_rows = torch.arange(rows, device=device) % trainer.lora.scratch_row
    # documents in turn, in the middle of each
    document = np.arange(rows) % len(starts)
    begin = torch.from_numpy(starts[document] + width - window).to(device)
    step_rows = tg.StepRow(
        source=state_rows,
        target=state_rows,
        window=begin,
        first=torch.full_like(begin, window - chunk),
        count=torch.full_like(begin, chunk),
        number=torch.ones_like(begin),
    )
    table = torch.stack(step_rows, 1)
    launched = seconds_of(lambda: trainer.chunk_step(table, width), trainer.dist, repeats)
    replayed = float("nan")
    if (rows, width) in trainer.graphs:
        graph, graph_table = trainer.graphs[rows, width]
        graph_table.copy_(table)
        replayed = seconds_of(graph.replay, trainer.dist, repeats)
    best = launched if math.isnan(replayed) else replayed
    rate = rows * window / best
    model_seconds = tg.step_seconds(rows, width, recomputed)
    line = (
        f"{rows:>6}{width:>8}{launched * 1e3:>14.1f}{replayed * 1e3:>10.1f}"
        f"{model_seconds * 1e3:>10.1f}{rate:>13,.0f}{rate / PUBLISHED_POSITIONS_PER_S:>8.2f}"
    )
    return line, best * 1e3


def bench_steps(args):
    """`steps`: prints milliseconds of steps of every shape, launched and captured."""
    hp = tg.Hyperparameters.from_env(guard=RunGuard())
    dist = tg.Dist("cpu" if args.cpu else "auto")
    model = tg.build_model(hp, dist).requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    trainer = tg.TestTimeTrainer(model, random_validation(hp), hp, dist, Lines())
    start = time.perf_counter()
    if tg.compile_wanted(hp, dist):
        trainer.warm_up()
    dist.synchronize()
    device = "cpu" if args.cpu else torch.cuda.get_device_name()
    print(
        f"device:{device} attention:{model.ops.names['attention']}"
        f" warm_up_seconds:{time.perf_counter() - start:.1f} graphs:{tg.compiled_graphs()}"
    )
    num_graphs = tg.compiled_graphs()
    shapes = [(rows, width) for rows in args.rows for width in args.widths]
    empty = np.zeros((0, 2), np.int64)
    trainer.capture([tg.Step(np.zeros((rows, 6)), empty, empty, width) for rows, width in shapes])
    print(
        f"{'rows':>6}{'width':>8}{'launched ms':>14}{'graph ms':>10}{'model ms':>10}"
        f"{'positions/s':>13}{'ratio':>8}"
    )
    measured = []
    for rows, width in shapes:
        line, ms = bench_shape(trainer, rows, width, args.repeats)
        print(line, flush=True)
        measured.append({"rows": rows, "width": width, "ms": ms})
    if args.out:
        settings = {name: getattr(hp, name) for name in OF_A_STEP}
        record = {"device": device, "settings": settings, "steps": measured}
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    memory = ""
    if not args.cpu:
        memory = f"; at most {torch.cuda.max_memory_reserved() / 1e9:.1f} GB reserved"
    print(f"graphs compiled after the warm-up: {tg.compiled_graphs() - num_graphs}{memory}")


def reference_score(model, validation, hp, dist):
    """(bpb, seconds) of document_by_document."""
    start = time.perf_counter()
    losses = document_by_document(model, validation, hp, dist)
    target_bytes = sum(int(validation.bytes[target]) for _, target in losses)
    bpb = tg.bits_per_byte(sum(losses.values()), target_bytes)
    return bpb, time.perf_counter() - start


def use_bf16_head():
    """Computes the logits in bfloat16 from here on, in every model."""
    token_losses = tg.GPT.token_losses

    def bf16_token_losses(model, hidden, *rest):
        with torch.autocast(hidden.device.type, torch.bfloat16):
            return token_losses(model, hidden, *rest)

    tg.GPT.token_losses = bf16_token_losses


def bench_run(model, validation, hp, dist, words):
    """Runs test-time training once -> its score, a line of the table."""
    start = time.perf_counter()
    log = Lines()
    trainer = tg.TestTimeTrainer(model, validation, hp, dist, log)
    score = trainer.evaluate()
    dist.synchronize()
    seconds = time.perf_counter() - start
    text = "\n".join(log)
    compiling = sum(map(float, re.findall(r"ttt_warm_up seconds:([\d.]+)", text)))
    capturing = sum(map(float, re.findall(r"ttt_graphs .*seconds:([\d.]+)", text)))
    rate = float(re.findall(r"tokens_per_s:(\d+)", text)[-1])
    lengths = validation.ends - validation.starts
    positions = tg.window_positions(lengths[trainer.documents], hp).sum()
    position_rate = positions / score["tokens"] * rate
    stepping = score["tokens"] / max(rate, 1)
    if score["partial"]:
        words += " partial"
    if score["unadapted_tokens"]:
        words += f" UNADAPTED {score['unadapted_tokens']}"
    line = (
        f"{score['bpb']:>9.5f}{seconds:>8.1f}{compiling:>9.1f}{capturing:>9.1f}{stepping:>9.1f}"
        f"{rate:>10,.0f}{position_rate:>13,.0f}  {words}"
    )
    return score, line


def bench_runs(args):
    """`runs`: prints a line of figures for every run."""
    if args.published:
        published.install()
    if args.bf16_head:
        use_bf16_head()
    dist = tg.Dist("cpu" if args.cpu else "auto")
    base = tg.Hyperparameters.from_env(guard=RunGuard())
    validation = tg.ValidationSet(base)
    model = tg.build_model(base, dist)
    tg.rebuild_model(model, args.artifact, dist)
    weights = {name: tensor.clone() for name, tensor in tg.unbank(model).items()}
    print(
        f"{'bpb':>9}{'all s':>8}{'compile':>9}{'capture':>9}{'steps s':>9}"
        f"{'tokens/s':>10}{'positions/s':>13}"
        "  what"
    )
    for text in args.settings or [""]:
        settings = os.environ | settings_of(text.split())
        hp = tg.Hyperparameters.from_env(settings, RunGuard())
        model.hp = hp
        tg.rebank(model, weights)
        score, line = bench_run(model, validation, hp, dist, text or "defaults")
        print(line, flush=True)
        if args.reference:
            tg.rebank(model, weights)
            bpb, seconds = reference_score(model, validation, hp, dist)
            print(
                f"{bpb:>9.5f}{seconds:>8.1f}{'':>50}document by document, difference"
                f" {score['bpb'] - bpb:+.6f}",
                flush=True,
            )


# ---- the evaluation budget

MARGIN = 40.0  # seconds of the limit that a plan must leave
# The contest's validation documents: points [rank, tokens] of their lengths in ascending order, BOS
# included, between which the logarithm of the length is linear.
CONTEST = {
    "documents": 50_000,
    "tokens": 47_853_344,
    "points": [
        *([0, 27], [63, 82], [319, 98], [831, 113], [1407, 125], [2559, 143], [3839, 163]),
        *([5183, 182], [7935, 221], [12607, 292], [13632, 308], [15935, 352], [17599, 384]),
        *([20607, 454], [22464, 496], [23231, 518], [27071, 625], [27776, 644], [32384, 809]),
        *([36544, 1011], [39168, 1183], [41536, 1389], [43456, 1608], [44288, 1735]),
        *([45247, 1911], [46272, 2189], [47104, 2534], [47488, 2745], [47935, 3070]),
        *([48320, 3445], [48640, 3892], [48959, 4482], [49343, 5714], [49535, 6830]),
        *([49728, 9187], [49792, 10378], [49855, 12998], [49920, 17152], [49984, 30152]),
        [49999, 96516],
    ],
}
# What MARKER_FUSION_ENABLED leaves of stored tokens: 724,326 of the 792,456 of the 500 validation
# documents of proxy runs (2026-11-29). FineWeb's own share was not measured.
FUSED_SHARE = 724_326 / 792_456
# settings that change the seconds of a step of one shape
OF_A_STEP = ("ttt_eval_seq_len", "ttt_stale_context", "ttt_lora_rank", "ttt_lora_sites")
# settings of which the cost model knows nothing
OF_THE_MODEL = (
    *("model_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_mult", "vocab_size"),
    *("num_loops", "loop_start", "loop_end", "kernels", "attention_backend"),
)


class Device(NamedTuple):
    """Seconds of the stages on one kind of GPU."""

    step_factor: float  # of step_seconds, which was fitted on an H100
    start: float  # imports, reading data and artifact
    unpack: float
    compile: float  # warm-up of test-time training, empty caches
    graph: float  # capturing one shape of steps
    first_sgd_step: float  # what the first one takes beyond the others


# docs/LOG.md, 2026-11-22 and 23; single runs, most of them on one GPU and 1,500 documents.
DEVICES = {
    "h100": Device(
        step_factor=1.0,
        # "smaller chunks behind stale context": process 198 s, evaluation 154.4, unpacking 4.2
        start=39.4,
        unpack=4.2,  # docs/h100/result.json
        compile=41.2,  # the same entry, cold; 30.0 with partly warm caches
        graph=0.2,  # the same entry: 6.6 and 7.3 s for both phases
        first_sgd_step=2.7,  # the first run of a process takes so much more than later ones
    ),
    "h200": Device(
        # Only this was measured alone on an H200: 150 documents, 17.6 and 18.3 s of steps ("smaller
        # chunks behind stale context") where the model of an H100 says 21.1. Its other runs say 0.6
        # (500 documents) and 1.1 (four GPUs, older kernels): prefer --steps-json.
        step_factor=0.85,
        start=39.4,  # not measured on an H200
        unpack=4.6,  # docs/campaigns/context.jsonl: 3.8 to 5.4
        compile=20.0,  # docs/h200/finals4/log.txt: 19.9 after a training, cold; 3.7 with caches
        graph=0.22,  # the same runs: 7 in 1.7 to 1.9 s, 17 in 3.2 to 3.9
        first_sgd_step=2.7,  # likewise
    ),
}
# Fine-tuning of the base weights as TestTimeTrainer.adapt_base expects it: nine steps of 32,768
# tokens took 0.9 to 1.2 s on one H200 (docs/EVALUATION.md), 0.1 s of them for tokens in each.
SGD_STEP = 0.1
SGD_TOKEN = 3e-6  # of a rank's own tokens
# The scheduler, for each chunk of a rank: 4.1 CPU seconds for 501,507 chunks of 50,000 documents on
# a Xeon at 2.5 GHz, plan_ttt included; 9 to 12 s of wall clock beside other work.
SCHEDULE_CHUNK = 8e-6


class RankPlan(NamedTuple):
    """What a rank does in one phase."""

    targets: int
    steps: collections.Counter  # (rows, width) -> how many

    def seconds(self, cost):
        """cost: function of rows and width -> seconds."""
        return sum(count * cost(*shape) for shape, count in self.steps.items())

    def positions(self, recomputed):
        """Window positions computed, those of padding included."""
        total = 0
        for (rows, width), count in self.steps.items():
            total += count * rows * min(width, recomputed)
        return total


class PhasePlan(NamedTuple):
    """One phase on all ranks."""

    documents: int
    targets: int
    ranks: list  # of RankPlan
    adapt: bool


class Budget(NamedTuple):
    """Seconds of one plan."""

    phases: list  # of (steps on the slowest rank, steps in the mean, capturing, fine-tuning)
    fixed: dict  # stage -> seconds

    def total(self):
        total = sum(self.fixed.values())
        for slowest, _, capturing, tuning in self.phases:
            total += slowest + capturing + tuning
        return total


class Lengths(NamedTuple):
    """Tokens of each document, BOS included: two arrays (n,) int64."""

    stored: np.ndarray
    fused: np.ndarray  # with MARKER_FUSION_ENABLED=1

    def seen(self, hp):
        """(n,) tokens that the model sees."""
        return self.fused if hp.fuses_markers else self.stored


def lengths_of_points(table):
    """{documents, tokens, points}, as CONTEST -> Lengths of so many documents, `tokens` in sum.

    Nothing is known of their markers: FUSED_SHARE is that of other text.
    """
    ranks, tokens = np.array(table["points"], float).T
    lengths = np.exp(np.interp(np.arange(table["documents"]), ranks, np.log(tokens)))
    stored = np.rint(lengths * (table["tokens"] / lengths.sum())).astype(np.int64)
    return Lengths(stored, np.rint(stored * FUSED_SHARE).astype(np.int64))


def lengths_of_shards(folder, hp):
    """Folder of validation shards -> Lengths of its documents; markers are fused if hp says so.

    Raises DataError where the data or their tokenizer cannot be used.
    """
    stream = tg.TokenStream(folder, "val")
    tokens = stream.read(0, stream.size)
    stored = document_lengths(tokens)
    if not hp.fuses_markers:
        return Lengths(stored, stored)
    space = tg.space_id(dataclasses.replace(hp, data_path=folder))
    fused, _ = tg.fuse_markers(tokens, np.zeros_like(tokens), space)
    return Lengths(stored, document_lengths(fused))


def document_lengths(tokens):
    """(N,) tokens of a stream -> (n,) int64 tokens of each document."""
    starts = np.flatnonzero(tokens == tg.BOS_ID)
    return np.diff(np.append(starts, len(tokens)))


def plan_rank(job):
    """(lengths, hp, rank, world size) -> for each phase its RankPlan."""
    lengths, hp, rank, world_size = job
    starts = np.cumsum(lengths) - lengths
    phases = tg.plan_ttt(lengths, hp)
    plans = []
    for steps in tg.schedule_rank(phases, starts, lengths, rank, world_size, hp):
        shapes = collections.Counter((len(step.table), step.width) for step in steps)
        targets = sum(int(tg.StepRow(*step.table.T).count.sum()) for step in steps)
        plans.append(RankPlan(targets, shapes))
    return plans


def scored_lengths(lengths, hp):
    """Lengths -> (m,) tokens that the model sees of each of TTT_MAX_DOCS documents."""
    lengths = lengths.seen(hp)
    starts = np.cumsum(lengths) - lengths
    documents = SimpleNamespace(
        starts=starts, ends=starts + lengths, targets_of=lambda numbers: (1, 1)
    )
    return lengths[tg.documents_to_score(documents, hp)]


def plan_all(lengths, settings, ranks):
    """Lengths, list of Hyperparameters -> for each a list of PhasePlan."""
    scored = [scored_lengths(lengths, hp) for hp in settings]
    jobs = []
    for chosen, hp in zip(scored, settings, strict=True):
        jobs += [(chosen, hp, rank, ranks) for rank in range(ranks)]
    # Forked workers need not import torch again. They end by themselves: a multiprocessing.Pool
    # sends SIGTERM, for which workers of a process with the guard's handlers have other plans.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(os.cpu_count(), len(jobs)), fork) as pool:
        of_ranks = list(pool.map(plan_rank, jobs))
    plans = []
    for number, (chosen, hp) in enumerate(zip(scored, settings, strict=True)):
        by_phase = zip(*of_ranks[number * ranks : (number + 1) * ranks], strict=True)
        plan = []
        for phase, rank_plans in zip(tg.plan_ttt(chosen, hp), by_phase, strict=True):
            targets = int(chosen[phase.documents].sum())
            plan.append(PhasePlan(len(phase.documents), targets, rank_plans, phase.adapt))
        plans.append(plan)
    return plans


def model_cost(hp, factor=1.0):
    """The fitted cost of a step: function of rows and width -> seconds.

    Adapters of another rank or at other sites change what a row costs in proportion to their
    weights: a guess, which leaves their matmuls out.
    """
    per_row = tg.step_seconds(1, 0) - tg.step_seconds(0, 0)
    more_weights = num_adapter_weights(hp) / num_adapter_weights(tg.Hyperparameters()) - 1
    recomputed = tg.recomputed_context(hp)

    def cost(rows, width):
        adapters = rows * per_row * more_weights
        return factor * (tg.step_seconds(rows, width, recomputed) + adapters)

    return cost


def num_adapter_weights(hp):
    """Weights of the adapters of one document."""
    num_slots = len(tg.GPT.slots(SimpleNamespace(hp=hp), looping=True))
    return sum(tg.LoRALayout(hp, num_slots).sizes)


def measured_cost(path, hp):
    """The cost of a step as `steps --out` wrote it: function of rows and width -> seconds.

    Linear between the measured rows and widths. Raises ValueError for a file that was measured with
    other settings or lacks a shape.
    """
    record = json.loads(Path(path).read_text())
    for name in OF_A_STEP:
        measured = record["settings"][name]
        if measured != getattr(hp, name):
            raise ValueError(
                f"{path} was measured with {name.upper()}={measured}, not {getattr(hp, name)}:"
                " run `bench_ttt.py steps --out` with the settings of the plan"
            )
    by_width = collections.defaultdict(dict)
    for step in record["steps"]:
        by_width[step["width"]][step["rows"]] = step["ms"] / 1e3

    def cost(rows, width):
        columns = []
        for of_rows in by_width.values():
            columns.append(interpolated(of_rows, rows, f"{path}: {{}} rows"))
        return interpolated(dict(zip(by_width, columns, strict=True)), width, f"{path}: width {{}}")

    return cost


def interpolated(points, at, name):
    """{x: y}, x -> y, linear between the points. Raises ValueError outside them."""
    known = sorted(points)
    if not known[0] <= at <= known[-1]:
        raise ValueError(f"{name.format(at)} not measured: only {known}; add it to `steps`")
    return float(np.interp(at, known, [points[x] for x in known]))


def budget_of(plan, hp, cost, device, ranks):
    """Adds up the seconds of a list of PhasePlan -> Budget.

    cost: function of rows and width -> seconds of a step.
    """
    phases = []
    num_chunks = 0
    for phase in plan:
        seconds = [rank.seconds(cost) for rank in phase.ranks]
        capturing = device.graph * max(len(rank.steps) for rank in phase.ranks)
        tuning = 0.0
        if phase.adapt:
            num_steps = -(-phase.targets // hp.global_ttt_chunk_tokens)
            per_rank = SGD_TOKEN * phase.targets / ranks
            tuning = device.first_sgd_step + SGD_STEP * num_steps + per_rank
        phases.append((max(seconds), sum(seconds) / ranks, capturing, tuning))
        num_chunks += max(rank.targets for rank in phase.ranks) / hp.ttt_chunk_size
    fixed = {
        "start": device.start,
        "unpack": device.unpack,
        "schedule": SCHEDULE_CHUNK * num_chunks,
        "compile": device.compile,
    }
    return Budget(phases, fixed)


def phase_table(plan, budget):
    """A list of PhasePlan and its Budget -> lines."""
    lines = [
        f"{'phase':>5}{'documents':>11}{'targets':>13}{'steps':>8}{'slowest s':>11}{'mean s':>9}"
        f"{'balance':>9}{'capture s':>11}{'fine-tuning s':>15}"
    ]
    for number, (phase, seconds) in enumerate(zip(plan, budget.phases, strict=True), 1):
        slowest, mean, capturing, tuning = seconds
        steps = max(rank.steps.total() for rank in phase.ranks)
        lines.append(
            f"{number:>5}{phase.documents:>11,}{phase.targets:>13,}{steps:>8,}{slowest:>11.1f}"
            f"{mean:>9.1f}{mean / max(slowest, 1e-9):>9.3f}{capturing:>11.1f}{tuning:>15.1f}"
        )
    return lines


def summary_row(lengths, plan, hp, budget, limit, words):
    """The line of a plan in the last table: seconds by stage, and positions of a scored token."""
    steps, tuning = (sum(phase[column] for phase in budget.phases) for column in (0, 3))
    other = budget.total() - steps - tuning
    targets = sum(phase.targets for phase in plan)
    positions = tg.window_positions(scored_lengths(lengths, hp), hp).sum() / targets
    computed = 0
    for phase in plan:
        computed += sum(rank.positions(tg.recomputed_context(hp)) for rank in phase.ranks)
    spare = limit - budget.total()
    fits = "fits" if spare >= MARGIN else "NO"
    return (
        f"{steps:>8.1f}{tuning:>15.1f}{other:>9.1f}{budget.total():>9.1f}{spare:>9.1f}{fits:>6}"
        f"{positions:>11.2f}{computed / targets:>9.2f}  {words}"
    )


def unknown_costs(hp):
    """Names of changed settings that no cost here depends on as it should."""
    usual = tg.Hyperparameters()
    return [name for name in OF_THE_MODEL if getattr(hp, name) != getattr(usual, name)]


def planned_lengths(args, settings):
    """Lengths of the documents that the command line names.

    settings: list of Hyperparameters of all plans.
    """
    if args.data:
        fusing = [hp for hp in settings if hp.fuses_markers]
        return lengths_of_shards(args.data, (fusing or settings)[0])
    table = json.loads(Path(args.lengths).read_text()) if args.lengths else CONTEST
    return lengths_of_points(table)


def fused_text(lengths, folder):
    """What fusing does to the lengths, and how that is known."""
    share = lengths.fused.sum() / lengths.stored.sum()
    origin = f"counted in {folder}" if folder else "as in the proxy's validation text"
    return f"fused markers leave {share:.3f} of the stored tokens, {origin}"


def bench_plan(args):
    """`plan`: prints the tables of all plans -> exit status, 1 when one of them does not fit."""
    device = DEVICES[args.device]
    texts = args.settings or [""]
    settings = []
    costs = []
    for text in texts:
        hp = tg.Hyperparameters.from_env(os.environ | settings_of(text.split()), RunGuard())
        settings.append(hp)
        measured = args.steps_json and measured_cost(args.steps_json, hp)
        costs.append(measured or model_cost(hp, device.step_factor))
    lengths = planned_lengths(args, settings)
    source = args.steps_json or f"the cost model of an H100 x {device.step_factor:g}"
    print(
        f"{len(lengths.stored):,} documents, {lengths.stored.sum():,} stored tokens, {args.ranks} x"
        f" {args.device}; steps by {source}"
    )
    rows = []
    fits = True
    plans = plan_all(lengths, settings, args.ranks)
    for text, hp, cost, plan in zip(texts, settings, costs, plans, strict=True):
        budget = budget_of(plan, hp, cost, device, args.ranks)
        fits = fits and args.limit - budget.total() >= MARGIN
        fixed = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in budget.fixed.items())
        counted = budget.total() - budget.fixed["start"]
        fixed += f"; EVAL_BUDGET_SECONDS counts {counted:.1f} s, all but the start"
        print(f"\n{text or 'defaults'}", *phase_table(plan, budget), fixed, sep="\n")
        if hp.fuses_markers:
            print(fused_text(lengths, args.data))
        for name in unknown_costs(hp):
            print(f"note: {name.upper()}={getattr(hp, name)} is not in the cost model")
        rows.append(summary_row(lengths, plan, hp, budget, args.limit, text or "defaults"))
    print(
        f"\n{'steps s':>8}{'fine-tuning s':>15}{'other s':>9}{'total s':>9}{'spare s':>9}{'':>6}"
        f"{'positions':>11}{'padded':>9}  what"
    )
    print(*rows, sep="\n")
    print(f"limit {args.limit:g} s, to spare at least {MARGIN:g} s; positions: of a scored token")
    return 0 if fits else 1


def numbers(text):
    """ "64,16" -> [64, 16]. ValueError for another text."""
    return [int(number) for number in text.split(",")]


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="steps and runs without CUDA")
    modes = parser.add_subparsers(dest="mode", required=True)
    steps, runs, plan = (modes.add_parser(name) for name in ("steps", "runs", "plan"))
    steps.add_argument("--rows", type=numbers, default=[64, 16, 4])
    steps.add_argument("--widths", type=numbers, default=[2048, 1536, 1024, 512, 256, 128])
    steps.add_argument("--repeats", type=int, default=5)
    steps.add_argument("--out", help="JSON file of rows, widths and milliseconds, for `plan`")
    runs.add_argument("--artifact", required=True)
    runs.add_argument("--reference", action="store_true")
    runs.add_argument("--bf16-head", action="store_true")
    runs.add_argument("--published", action="store_true")
    runs.add_argument("settings", nargs="*")
    plan.add_argument("--ranks", type=int, default=8)
    plan.add_argument("--device", choices=DEVICES, default="h100")
    plan.add_argument("--limit", type=float, default=600.0, help="seconds")
    documents = plan.add_mutually_exclusive_group()
    documents.add_argument("--lengths", help="JSON file of sorted lengths")
    documents.add_argument("--data", help="folder of validation shards")
    plan.add_argument("--steps-json", help="what `steps --out` wrote on the device")
    plan.add_argument("settings", nargs="*")
    args = parser.parse_args(argv)
    if args.mode == "plan" and not 1 <= args.ranks:
        plan.error("--ranks must be at least 1")
    return args


def main(argv=None):
    args = parse(argv)
    if args.mode == "plan":
        try:
            return bench_plan(args)
        except (OSError, KeyError, ValueError) as error:
            print(f"bench_ttt.py plan: {error}", file=sys.stderr)
            return 2
    if not (args.cpu or torch.cuda.is_available()):
        print("no CUDA device: nothing to time")
        return 0
    modes = {"steps": bench_steps, "runs": bench_runs}
    modes[args.mode](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
