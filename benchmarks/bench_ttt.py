"""Test-time training, one chunk step at a time, on one GPU: how long a step takes and what it computes.

    python benchmarks/bench_ttt.py [--documents 64,16,2] [--widths 48,528,1056,2048] [--repeats 5]

The default model with random weights and documents of random tokens: times do not depend on what is learned. Prints
the seconds of the stage's warm-up (all compilation), then for every number of documents and width of window the
milliseconds of a step (windows forward, head, backward to the adapters, their AdamW step) and window positions per
second, with the ratio to the published rate of one H100 (240,000 positions/s). Without CUDA it says so and exits 0.
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg

PUBLISHED_POSITIONS_PER_S = 240_000  # PR 1855 on 8 H100: 12,400 tokens/s a GPU, 18 to 21 positions a token


def synthetic_validation(documents: int, length: int, vocab_size: int) -> SimpleNamespace:
    """What TestTimeTrainer reads of a ValidationSet: `documents` documents of `length` targets each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(8, vocab_size, documents * (length + 1) + 1)
    starts = np.arange(documents) * (length + 1)
    tokens[starts] = tg.BOS_ID
    return SimpleNamespace(tokens=tokens, bytes=np.full(len(tokens), 3), starts=starts, ends=starts + length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", default="64,16,2")
    parser.add_argument("--widths", default="48,528,1056,2048")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to time")
        return
    hp = tg.Hyperparameters.from_env()
    dist = tg.Dist("cuda")
    model = tg.build_model(hp, dist).requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    validation = synthetic_validation(64, hp.ttt_eval_seq_len + hp.ttt_chunk_size, hp.vocab_size)
    trainer = tg.TestTimeTrainer(model, validation, hp, dist, print)
    start = time.perf_counter()
    trainer.warm_up()
    torch.cuda.synchronize()
    print(f"device:{torch.cuda.get_device_name()} attention:{model.ops.names['attention']} "
          f"warm_up_seconds:{time.perf_counter() - start:.1f} graphs:{tg.compiled_graphs()}")
    graphs = tg.compiled_graphs()
    print(f"{'documents':>10}{'width':>8}{'forward ms':>12}{'step ms':>10}{'positions/s':>13}{'ratio':>8}")
    for documents in map(int, args.documents.split(",")):
        kept = tg.BatchedLoRA.initial_a(trainer.shapes, 0, hp, dist.device)
        rows = np.arange(documents)
        lora = tg.BatchedLoRA(trainer.shapes, kept, rows, hp, dist.device)
        for width in map(int, args.widths.split(",")):
            batch = trainer.chunk_batch(rows, width // hp.ttt_chunk_size - 1)[:3]

            def forward(batch=batch, lora=lora):
                return trainer.chunk_losses(*batch, lora.adapters())

            def step(forward=forward, lora=lora):
                lora.step(torch.autograd.grad(forward().mean(1).sum(), lora.parameters()))

            times = []
            for function in (forward, step):
                function()
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(args.repeats):
                    function()
                torch.cuda.synchronize()
                times.append((time.perf_counter() - start) / args.repeats)
            rate = documents * batch[0].size(1) / times[1]
            print(f"{documents:>10}{batch[0].size(1):>8}{times[0] * 1e3:>12.1f}{times[1] * 1e3:>10.1f}{rate:>13,.0f}"
                  f"{rate / PUBLISHED_POSITIONS_PER_S:>8.2f}", flush=True)  # fmt: skip
    print(f"graphs compiled after the warm-up: {tg.compiled_graphs() - graphs}; "
          f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
