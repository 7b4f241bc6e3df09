"""Test-time training on one GPU: how long a step takes, and what whole runs with other settings
cost
and gain.

    python benchmarks/bench_ttt.py steps [--rows 64,16,4] [--widths 128,512,2048] [--repeats 5]
    python benchmarks/bench_ttt.py runs --artifact runs/NAME/artifact.bin \\
        [--reference] [--bf16-head]
                                        ["TTT_LORA_RANK=48 ..." ...]

`steps`: the default model with random weights; times do not depend on what is learned. The seconds
of the stage's warm-up (all compilation), then for every number of rows and width of window the
milliseconds of a step (windows forward, head, backward to the adapters, their AdamW) as it is
launched and as a CUDA graph, what the schedule takes it to cost, and window positions per second of
the graph with the ratio to the published rate of one H100 (240,000 positions/s). With
TTT_STALE_CONTEXT a width is the whole context, and positions are those that are computed.

`runs`: every quoted argument is one run of test-time training on the model of an artifact, with
these settings over those of the environment ("" for none; TTT_MAX_DOCS takes documents of all
lengths). One row each: BPB, seconds in all, of compilation, of capturing, of steps, scored tokens
and window positions per second of stepping. --reference adds the straightforward scorer, document
by document without compilation (and without NGRAM_TILT_ENABLED), and the difference of its BPB.
--bf16-head multiplies with the head in bfloat16, as the field does, in both.

Without CUDA it says so and exits 0 (`--cpu` runs anyway).
"""

import argparse
import copy
import dataclasses
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


def continued(model, tokens, start, window, kept):
    """The model for a row of a document that goes on at `window`: `kept` is, for every slot, [keys,
    values] of all the document's positions (1, T, K, E), of which the last TTT_STALE_CONTEXT before
    the window are read, and where those of the row are left.
    """
    row, before, slots = copy.copy(model), window - start, iter(kept)
    if before:
        row.embed = lambda inputs, fresh: model.embed(
            tokens[None, window - 1 : window + inputs.size(1)], fresh
        )[:, 1:]

    def attention(q, k, v, cu_seqlens, max_seqlen, attn_window=0):
        turn = model.cos[before : before + 1], model.sin[before : before + 1]
        q, k = tg.apply_rotary_emb(q, *turn), tg.apply_rotary_emb(k, *turn)
        slot, first, row_end = (
            next(slots),
            max(0, before - model.hp.ttt_stale_context),
            before + k.size(1),
        )
        seen = [
            torch.cat((old[:, first:before], new), 1) for old, new in zip(slot, (k, v), strict=True)
        ]
        for old, new in zip(slot, (k, v), strict=True):
            old[:, before:row_end] = new.detach()
        mask = torch.ones(q.size(1), row_end - first, dtype=torch.bool, device=q.device).tril(
            before - first
        )
        q, *seen = (
            t.repeat_interleave(q.size(2) // t.size(2), 2).transpose(1, 2) for t in (q, *seen)
        )
        return torch.nn.functional.scaled_dot_product_attention(q, *seen, attn_mask=mask).transpose(
            1, 2
        )

    row.ops = dataclasses.replace(model.ops, attention=attention)
    return row


def document_by_document(model, validation, hp, dist):
    """The definition of the answer -> {(document, target position): nats}: one document after the
    other, windows of their own length, no compilation, no padding, torch's AdamW; between phases
    TestTimeTrainer.global_adapt.
    """
    tokens, found = torch.from_numpy(validation.tokens).to(dist.device), {}
    trainer = tg.TestTimeTrainer(model, validation, hp, dist, Lines())
    lora = tg.BatchedLoRA(model, range(hp.ttt_lanes), hp, dist.device, tg.adamw_rows_ref)
    model.requires_grad_(False)
    chosen = trainer.documents
    short_chunks = getattr(hp, "ttt_short_chunks", "")  # of presets/published.py
    pairs = [[*map(int, p.split(":"))] for p in short_chunks.split(",") if p]
    for phase in tg.plan_ttt((validation.ends - validation.starts)[chosen], hp):
        for place, documents in enumerate(
            [documents for lane in phase.lanes for documents in lane]
        ):
            for document in chosen[documents].tolist():
                leaf = torch.nn.Parameter(lora.values.new_zeros(1, lora.values.size(1)))
                leaf.data[0, : lora.kept.size(1)] = lora.kept[place]
                optimizer = torch.optim.AdamW(
                    [leaf], hp.ttt_lora_lr, (0.0, hp.ttt_beta2), 1e-10, hp.ttt_weight_decay
                )
                start, end = int(validation.starts[document]), int(validation.ends[document])
                fitting = [size for most, size in pairs if end - start <= most]
                size = min([hp.ttt_chunk_size, *fitting[:1]])
                kept = torch.zeros(
                    lora.slots,
                    2,
                    1,
                    end - start,
                    hp.num_kv_heads,
                    hp.head_dim,
                    dtype=model.dtype,
                    device=dist.device,
                )
                for first in range(start, end, size):
                    last = min(first + size, end)
                    window = max(start, last - hp.ttt_eval_seq_len + hp.ttt_stale_context)
                    tap = lora.tap(lora.factors(leaf, slice(None)))
                    row = (
                        continued(model, tokens, start, window, kept)
                        if hp.ttt_stale_context
                        else model
                    )
                    hidden = row.forward_hidden(
                        tokens[None, window:last],
                        max_seqlen=hp.ttt_eval_seq_len,
                        looping=True,
                        tap=tap,
                    )
                    targets = tokens[None, first + 1 : last + 1]
                    losses = model.token_losses(hidden[:, first - window :], targets, tap.head)
                    found |= {
                        (document, first + i + 1): loss for i, loss in enumerate(losses[0].tolist())
                    }
                    if last < end:
                        optimizer.zero_grad()
                        losses.mean().backward()
                        optimizer.step()
                if hp.ttt_warm_start_a and start < end:
                    lora.kept[place] = leaf.detach()[0, : lora.kept.size(1)]
        if phase.adapt:
            trainer.global_adapt(chosen[phase.documents])
    model.requires_grad_(True)
    return found


def bench_steps(args):
    """Milliseconds of steps of every shape, launched and captured."""
    hp, dist = tg.Hyperparameters.from_env(guard=RunGuard()), tg.Dist("cpu" if args.cpu else "auto")
    model = tg.build_model(hp, dist).requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    length = hp.ttt_eval_seq_len + hp.ttt_chunk_size
    tokens = np.random.default_rng(0).integers(8, hp.vocab_size, 64 * (length + 1) + 1)
    starts = np.arange(64) * (length + 1)
    tokens[starts] = tg.BOS_ID
    charges = np.full(len(tokens), 3)
    validation = SimpleNamespace(tokens=tokens, bytes=charges, starts=starts, ends=starts + length)
    validation.targets_of = lambda documents: (length * len(documents), 3 * length * len(documents))
    trainer = tg.TestTimeTrainer(model, validation, hp, dist, Lines())
    start = time.perf_counter()
    if tg.compile_wanted(hp, dist):
        trainer.warm_up()
    dist.synchronize()
    print(
        f"device:{torch.cuda.get_device_name() if not args.cpu else 'cpu'}"
        f" attention:{model.ops.names['attention']}"
        f" warm_up_seconds:{time.perf_counter() - start:.1f} graphs:{tg.compiled_graphs()}"
    )
    graphs, shapes = (
        tg.compiled_graphs(),
        [(rows, width) for rows in args.rows for width in args.widths],
    )
    empty = np.zeros((0, 2), np.int64)
    trainer.capture([tg.Step(np.zeros((rows, 6)), empty, empty, width) for rows, width in shapes])
    print(
        f"{'rows':>6}{'width':>8}{'launched ms':>14}{'graph ms':>10}{'model ms':>10}"
        f"{'positions/s':>13}{'ratio':>8}"
    )
    fresh = hp.ttt_eval_seq_len - hp.ttt_stale_context
    for rows, width in shapes:
        numbers = torch.arange(rows, device=dist.device) % trainer.lora.flight
        window, chunk = min(width, fresh), min(hp.ttt_chunk_size, width)
        begin = torch.from_numpy(starts[np.arange(rows) % 64] + width - window).to(dist.device)
        same = [torch.full_like(numbers, value) for value in (window - chunk, chunk, 1)]
        table = torch.stack([numbers, numbers, begin, *same], 1)
        graph, buffer = trainer.graphs.get((rows, width), (None, None))
        if graph:
            buffer.copy_(table)
        times = []
        for run in (
            lambda table=table, width=width: trainer.chunk_step(table, width),
            graph and graph.replay,
        ):
            if run:
                run()
                dist.synchronize()
                start = time.perf_counter()
                for _ in range(args.repeats):
                    run()
                dist.synchronize()
            times.append((time.perf_counter() - start) / args.repeats if run else float("nan"))
        rate = rows * window / (times[1] if graph else times[0])
        print(
            f"{rows:>6}{width:>8}{times[0] * 1e3:>14.1f}{times[1] * 1e3:>10.1f}"
            f"{tg.step_cost(rows, width, fresh) * 1e3:>10.1f}{rate:>13,.0f}"
            f"{rate / PUBLISHED_POSITIONS_PER_S:>8.2f}",
            flush=True,
        )
    memory = "" if args.cpu else f"; peak {torch.cuda.max_memory_reserved() / 1e9:.1f} GB reserved"
    print(f"graphs compiled after the warm-up: {tg.compiled_graphs() - graphs}{memory}")


def reference_score(model, validation, hp, dist):
    """(bpb, seconds) of document_by_document."""
    start = time.perf_counter()
    losses = document_by_document(model, validation, hp, dist)
    charges = sum(int(validation.bytes[place]) for _, place in losses)
    return tg.bits_per_byte(sum(losses.values()), charges), time.perf_counter() - start


def bench_runs(args):
    """A row of figures for every run."""
    if args.bf16_head:
        token_losses = tg.GPT.token_losses

        def rough(model, hidden, *rest):
            with torch.autocast(hidden.device.type, torch.bfloat16):
                return token_losses(model, hidden, *rest)

        tg.GPT.token_losses = rough
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
        hp = model.hp = tg.Hyperparameters.from_env(
            os.environ | settings_of(text.split()), RunGuard()
        )
        tg.rebank(model, weights)
        start, log = time.perf_counter(), Lines()
        trainer = tg.TestTimeTrainer(model, validation, hp, dist, log)
        score = trainer.evaluate()
        dist.synchronize()
        seconds, said = time.perf_counter() - start, "\n".join(log)
        compiling = sum(map(float, re.findall(r"ttt_warm_up seconds:([\d.]+)", said)))
        capturing = sum(map(float, re.findall(r"ttt_graphs .*seconds:([\d.]+)", said)))
        rate = float(re.findall(r"tokens_per_s:(\d+)", said)[-1])
        lengths = (validation.ends - validation.starts)[trainer.documents]
        positions = tg.window_positions(lengths, hp).sum() / score["tokens"] * rate
        note = f" UNADAPTED {score['unadapted_tokens']}" if score["unadapted_tokens"] else ""
        print(
            f"{score['bpb']:>9.5f}{seconds:>8.1f}{compiling:>9.1f}{capturing:>9.1f}"
            f"{score['tokens'] / max(rate, 1):>9.1f}{rate:>10,.0f}{positions:>13,.0f}"
            f"  {text or 'defaults'}{' partial' if score['partial'] else ''}{note}",
            flush=True,
        )
        del trainer
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
