"""Test-time training on one GPU: seconds of a step, and cost and gain of complete runs.

    python benchmarks/bench_ttt.py steps [--rows 64,16,4] [--widths 128,512,2048] [--repeats 5]
    python benchmarks/bench_ttt.py runs --artifact runs/NAME/artifact.bin \\
        [--reference] [--bf16-head] ["TTT_LORA_RANK=48 ..." ...]

`steps`: the default model with random weights; times do not depend on what is learned. Prints the
seconds of the stage's warm-up (all compilation), then for every number of rows and width of window:
milliseconds of a step (forward of the windows, lm_head, backward to the adapters, their AdamW)
launched directly and as a CUDA graph, the schedule's cost model, and window positions per second of
the graph, with the ratio to the published rate of one H100 (240,000 positions/s). With
TTT_STALE_CONTEXT a width is that of the complete context; positions are the recomputed ones.

`runs`: every quoted argument is one run of test-time training on the model of an artifact, with
these settings on top of the environment ("" for none; TTT_MAX_DOCS picks documents of all lengths).
Prints for each: BPB, seconds in total, of compilation, of capturing, of steps, scored tokens and
window positions per second of stepping. --reference adds the straightforward scorer, document by
document without compilation (and without NGRAM_TILT_ENABLED), and the difference of its BPB.
--bf16-head computes logits in bfloat16 in both, as published systems do.

Without CUDA it says so and exits 0 (`--cpu` runs anyway).
"""

import argparse
import copy
import dataclasses
import math
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg
from tools.guard import RunGuard
from tools.run_files import settings_of

# PR 1855 on 8 H100: 12,400 tokens/s a GPU, 18 to 21 positions a token
PUBLISHED_POSITIONS_PER_S = 240_000


class Lines(list):
    """Stands in for RunLog: prints, and keeps the lines."""

    def __init__(self):
        self.seconds = {}

    def __call__(self, line):
        self.append(line)
        print(line, file=sys.stderr, flush=True)

    def live(self, share, detail=""):
        pass


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

    def attention(q, k, v, cu_seqlens, max_seqlen, window=0):
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
        heads = []
        for t in (q, *seen):
            heads.append(t.repeat_interleave(q.size(2) // t.size(2), 2).transpose(1, 2))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*heads, attn_mask=mask.tril(before - first)).transpose(1, 2)

    row.ops = dataclasses.replace(model.ops, attention=attention)
    return row


def score_document(model, lora, tokens, start, end, row):
    """Scores inputs start to end with the adapters of `row` (1, n), which learn -> list of nats."""
    hp = lora.hp
    leaf = torch.nn.Parameter(row)
    optimizer = torch.optim.AdamW(
        [leaf], hp.ttt_lora_lr, (0.0, hp.ttt_beta2), 1e-10, hp.ttt_weight_decay
    )
    shape = (lora.layout.num_slots, 2, 1, end - start, hp.num_kv_heads, hp.head_dim)
    kept = torch.zeros(shape, dtype=model.dtype, device=tokens.device)
    size = int(hp.chunk_size_of(end - start))
    nats = []
    for first in range(start, end, size):
        last = min(first + size, end)
        window = max(start, last - hp.ttt_eval_seq_len + hp.ttt_stale_context)
        tap = lora.tap(lora.scaled_parts(leaf, slice(None)))
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
    """Seconds of one call, in the mean, after a first one."""
    run()
    dist.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    dist.synchronize()
    return (time.perf_counter() - start) / repeats


def bench_shape(trainer, rows, width, repeats):
    """Times steps of one shape, launched and captured -> a line of the table."""
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
    return (
        f"{rows:>6}{width:>8}{launched * 1e3:>14.1f}{replayed * 1e3:>10.1f}"
        f"{model_seconds * 1e3:>10.1f}{rate:>13,.0f}{rate / PUBLISHED_POSITIONS_PER_S:>8.2f}"
    )


def bench_steps(args):
    """Milliseconds of steps of every shape, launched and captured."""
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
    for rows, width in shapes:
        print(bench_shape(trainer, rows, width, args.repeats), flush=True)
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
    """Computes the logits in bfloat16 from here on."""
    token_losses = tg.GPT.token_losses

    def rough(model, hidden, *rest):
        with torch.autocast(hidden.device.type, torch.bfloat16):
            return token_losses(model, hidden, *rest)

    tg.GPT.token_losses = rough


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
    """A line of figures for every run."""
    if args.bf16_head:
        use_bf16_head()
    dist = tg.Dist("cpu" if args.cpu else "auto")
    base = tg.Hyperparameters.from_env(guard=RunGuard())
    validation = tg.ValidationSet(base)
    model = tg.build_model(base, dist)
    weights = tg.dequantize_weights(tg.unpack_weights(Path(args.artifact).read_bytes()))
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true")
    modes = parser.add_subparsers(dest="mode", required=True)
    steps, runs = modes.add_parser("steps"), modes.add_parser("runs")
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    steps.add_argument("--rows", type=numbers, default=[64, 16, 4])
    steps.add_argument("--widths", type=numbers, default=[2048, 1536, 1024, 512, 256, 128])
    steps.add_argument("--repeats", type=int, default=5)
    runs.add_argument("--artifact", required=True)
    runs.add_argument("--reference", action="store_true")
    runs.add_argument("--bf16-head", action="store_true")
    runs.add_argument("settings", nargs="*")
    args = parser.parse_args()
    if not (args.cpu or torch.cuda.is_available()):
        print("no CUDA device: nothing to time")
        return
    bench_steps(args) if args.mode == "steps" else bench_runs(args)


if __name__ == "__main__":
    main()
