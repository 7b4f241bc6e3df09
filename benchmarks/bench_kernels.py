"""Every fast operation of train_gpt.py against its reference, at training sizes on one GPU.

    python benchmarks/bench_kernels.py [--tokens 98304] [--hidden 2048] \\
        [--documents 122] [--compiled]

Correctness comes first: fresh random inputs each run, relative Frobenius error of the output and of
every gradient against the reference in fp32 (on fewer tokens); an operation over 1e-2 is marked
WRONG (exit status 1). Then median milliseconds of forward and of forward + backward, the rate, and
two ratios: rate over the ceiling measured in the same run (a bf16 product of 8192^3, a copy of 1
GiB), and reference time over this time. What is not installed, or not for this GPU, is "not here".
--compiled times the references under torch.compile instead of eagerly (slower to start). Without
CUDA it says so and exits 0.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg

DIM, VOCAB, HEADS, HEAD_DIM, SLOPE, SOFTCAP = 512, 8192, 8, 64, 0.3, 30.0
MAX_SEQLEN = 2048
DEVICE = "cuda"


def median_ms(function) -> float:
    """Median milliseconds of a call."""
    return tg.triton.testing.do_bench(function, warmup=20, rep=80, return_mode="median")


def results(op, args) -> tuple:
    """The tensors that an operation returns, without the None of outputs that are not wanted."""
    out = op(*args)
    return tuple(t for t in out if t is not None) if isinstance(out, tuple) else (out,)


def forward_and_backward(op, args):
    """op and its arguments -> two closures, forward alone and forward + backward.

    The first runs without autograd, the second for a fixed gradient.
    """
    leaves = [a for a in args if torch.is_tensor(a) and a.requires_grad]
    with torch.no_grad():
        grads = [torch.randn_like(t) for t in results(op, args)]

    def forward():
        with torch.no_grad():
            return op(*args)

    def both():
        out = results(op, args)
        return out, torch.autograd.grad(out, leaves, grads)

    return forward, both


def relative_errors(op, reference, args) -> list[float]:
    """Errors of op in the dtype of args against the reference in fp32.

    Outputs, then each gradient.
    """
    full = [
        a.detach().float().requires_grad_() if torch.is_tensor(a) and a.requires_grad else a
        for a in args
    ]
    got, want = results(op, args), results(reference, full)
    weights = [torch.randn_like(t) for t in got]
    grads = torch.autograd.grad(
        got, [a for a in args if torch.is_tensor(a) and a.requires_grad], weights
    )
    wanted = torch.autograd.grad(
        want,
        [a for a in full if torch.is_tensor(a) and a.requires_grad],
        [w.float() for w in weights],
    )
    pairs = zip((*got, *grads), (*want, *wanted), strict=True)
    return [((g.float() - w).norm() / w.norm().clamp_min(1e-20)).item() for g, w in pairs]


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Random bf16 leaf of a graph with standard deviation `scale`."""
    return (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * scale).requires_grad_()


def random_documents(tokens: int, documents: int) -> torch.Tensor:
    """(documents + padding + 1,) int32: uneven documents of at most MAX_SEQLEN tokens.

    The end is padded with `tokens`.
    """
    cuts = torch.randint(1, tokens, (documents - 1,)).tolist()
    bounds = [0]
    for cut in sorted({*cuts, tokens}):
        while cut - bounds[-1] > MAX_SEQLEN:
            bounds.append(bounds[-1] + MAX_SEQLEN)
        bounds.append(cut)
    return torch.tensor(bounds + [tokens] * 64, dtype=torch.int32, device=DEVICE)


def causal_pairs(cu_seqlens: torch.Tensor) -> int:
    """Pairs (query, key) of all documents."""
    lengths = cu_seqlens.diff().long()
    return int((lengths * (lengths + 1) // 2).sum())


class Report:
    """Prints one line an operation; remembers whether any was wrong."""

    def __init__(self, compiled: bool):
        self.compiled, self.wrong = compiled, False
        a, b = normal(8192, 8192).detach(), normal(8192, 8192).detach()
        self.tflops = 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9
        source = torch.empty(2**30, dtype=torch.int8, device=DEVICE)
        target = torch.empty_like(source)
        self.gbytes = 2 * 2**30 / median_ms(lambda: target.copy_(source)) / 1e6
        print(
            f"ceilings: bf16 product 8192^3 {self.tflops:.0f} TFLOP/s, copy {self.gbytes:.0f} GB/s"
            " read + written"
        )
        print(
            f"{'operation':34} {'ms':>8} {'rate':>14} {'of ceiling':>10} {'reference ms':>12}"
            f" {'faster':>7}"
        )

    def errors(self, name: str, op, reference, args) -> None:
        """Checks op; prints the errors of the output and of the gradients."""
        errors = relative_errors(op, reference, args)
        good = all(e < 1e-2 for e in errors)
        self.wrong |= not good
        print(
            f"{name:34} {'ok   ' if good else 'WRONG'} relative errors "
            + " ".join(f"{e:.1e}" for e in errors)
        )

    def times(
        self, name: str, op, args, work: tuple[float, float], unit: str, reference_ms=None
    ) -> list[float]:
        """Times op, forward and forward + backward; prints a line for each -> the two times in ms.

        work: FLOP or bytes of the two, as `unit` (TFLOP/s or GB/s) says; reference_ms: their times
        with the reference.
        """
        times = [median_ms(function) for function in forward_and_backward(op, args)]
        ceiling, scale = (self.tflops, 1e9) if unit == "TFLOP/s" else (self.gbytes, 1e6)
        for i, part in enumerate(("fwd", "fwd+bwd")):
            ms = times[i]
            rate = work[i] / ms / scale
            against = ""
            if reference_ms:
                against = f"{reference_ms[i]:12.3f} {reference_ms[i] / ms:6.2f}x"
            label = f"{name} {part}"
            print(f"{label:34} {ms:8.3f} {rate:7.0f} {unit:7} {rate / ceiling:9.0%} {against}")
        return times

    def compare(self, name: str, op, reference, args, work, unit: str) -> None:
        """Times the reference, compiled with --compiled, and op; see times."""
        reference = torch.compile(reference) if self.compiled else reference
        reference_ms = self.times(f"{name} reference", reference, args, work, unit)
        self.times(name, op, args, work, unit, reference_ms)


def bench_cross_entropy(report: Report, tokens: int) -> None:
    def inputs(rows):
        h, weight = normal(rows, DIM), normal(VOCAB, DIM, scale=8 * DIM**-0.5)
        return h, weight, torch.randint(VOCAB, (rows,), device=DEVICE), SOFTCAP

    ops = tg.linear_cross_entropy, tg.linear_cross_entropy_ref
    report.errors("head + cross-entropy", *ops, inputs(min(tokens, 8192)))
    product = 2.0 * tokens * VOCAB * DIM
    report.compare("head + cross-entropy", *ops, inputs(tokens), (product, 3 * product), "TFLOP/s")
    logits = normal(tokens, VOCAB, scale=8).detach()
    targets = torch.randint(VOCAB, (tokens,), device=DEVICE)
    ms = median_ms(lambda: tg._launch_ce(logits, targets, SOFTCAP))
    rate = 4.0 * tokens * VOCAB / ms / 1e6  # read and written once
    print(f"{'cross-entropy kernel':34} {ms:8.3f} {rate:7.0f} GB/s    {rate / report.gbytes:9.0%}")


def bench_around_attention(report: Report, tokens: int) -> None:
    angle, kv_heads = torch.rand(tokens, 1, 8, device=DEVICE), HEADS // 2
    table = angle.cos(), angle.sin()

    def before(rows):
        gain = normal(HEADS)
        return (
            normal(1, rows, (HEADS + 2 * kv_heads) * HEAD_DIM),
            gain,
            *(t[:rows] for t in table),
            kv_heads,
        )

    def behind(rows):
        return (*(normal(1, rows, n, HEAD_DIM) for n in (HEADS, kv_heads)), normal(1, rows, HEADS))

    q_bytes = 2.0 * tokens * HEADS * HEAD_DIM  # of q; k and v: half of it each
    for name, ops, inputs, work in (
        (
            "q/k norm, rotary, gain",
            (tg.qkv_heads, tg.qkv_heads_ref),
            before,
            (4 * q_bytes, 9.5 * q_bytes),
        ),
        ("XSA and gate", (tg.gated_xsa, tg.gated_xsa_ref), behind, (2.5 * q_bytes, 6.5 * q_bytes)),
    ):
        report.errors(name, *ops, inputs(min(tokens, 8192)))
        report.compare(name, *ops, inputs(tokens), work, "GB/s")


def bench_slot_input(report: Report, tokens: int) -> None:
    """slot_input as a layer of the encoder, one of the decoder and one with two lanes call it."""
    scale = torch.full((1,), 0.5, device=DEVICE)
    stream = 2.0 * tokens * DIM  # bytes of a residual stream

    def inputs(rows, returned, merges):
        x, x0, skip = (normal(1, rows, DIM) for _ in range(3))
        weight, gate = (normal(DIM).detach().float().requires_grad_() for _ in range(2))
        merge = (skip, weight, gate) if merges else ()
        return x, x0, normal(2, DIM), scale, 12, *returned, *merge

    compiled = tg.compiled(tg.slot_input, tg.Hyperparameters(compile="1"), tg.Dist(DEVICE))
    reference = tg.slot_input_ref
    # returned: whether the mixed and the merged stream are; work: streams read and written
    for name, returned, merges, work in (
        ("slot input of the encoder", (True, True), False, (4, 11)),
        ("slot input with a skip", (True, False), True, (5, 13)),
        ("slot input with lanes", (False, True), True, (5, 13)),
    ):
        report.errors(name, tg.slot_input, reference, inputs(min(tokens, 8192), returned, merges))
        args = inputs(tokens, returned, merges)
        report.compare(name, compiled, reference, args, [n * stream for n in work], "GB/s")
        bench_slot_input_kernel(report, name, args, stream)


def bench_slot_input_kernel(report: Report, name: str, args, stream: float) -> None:
    """The gradients' kernel alone: every stream once."""
    args = [a.detach() if torch.is_tensor(a) else a for a in args]
    x = args[0]
    window, *wanted = args[4:7]
    merge = args[7:]
    d_h = torch.randn_like(x)
    d_start = d_h[..., :window].contiguous()
    d_rest = [torch.randn_like(x) if want else x.new_empty(0) for want in wanted]
    grads = [d_h, d_start, *d_rest]
    ms = median_ms(lambda: tg._slot_input_backward(grads, *args[:4], merge, *wanted))
    rate = (5 + sum(wanted) + 2 * bool(merge)) * stream / ms / 1e6
    print(f"{name + ' kernel':34} {ms:8.3f} {rate:7.0f} GB/s    {rate / report.gbytes:9.0%}")


def bench_mlp(report: Report, tokens: int, hidden: int) -> None:
    def inputs(rows):
        return (
            normal(rows, DIM),
            normal(hidden, DIM, scale=DIM**-0.5),
            normal(DIM, hidden, scale=hidden**-0.5),
            SLOPE,
        )

    ops, product = (tg.leaky_relu_sq_mlp, tg.mlp_ref), 2.0 * tokens * DIM * hidden
    try:
        report.errors("MLP quack", *ops, inputs(min(tokens, 16384)))
    except Exception as error:  # it may be missing, or this GPU not one for it
        print(f"MLP quack: not here ({type(error).__name__}: {str(error)[:150]})")
        return
    args = inputs(tokens)
    report.compare("MLP quack", *ops, args, (2 * product, 6 * product), "TFLOP/s")
    x, w_up, w_down = (a.detach() for a in args[:3])
    cublas = median_ms(lambda: x @ w_up.T)  # one product of the same shape, without the activation
    act = tg._launch_mlp(x, w_up, None, SLOPE)
    for name, operands in (("forward", (w_up, None)), ("backward", (w_down, act))):
        ms = median_ms(lambda operands=operands: tg._launch_mlp(x, *operands, SLOPE))
        rate = product / ms / 1e9
        print(
            f"{'MLP quack kernel ' + name:34} {ms:8.3f} {rate:7.0f} TFLOP/s"
            f" {rate / report.tflops:9.0%} {cublas:12.3f} {cublas / ms:6.2f}x (cuBLAS, product"
            " alone)"
        )


def bench_attention(report: Report, tokens: int, documents: int) -> None:
    cu_seqlens, device = random_documents(tokens, documents), torch.device(DEVICE)
    short = random_documents(16384, 24)
    flops = 4.0 * causal_pairs(cu_seqlens) * HEADS * HEAD_DIM
    work = flops, 3.5 * flops  # five products backward against two forward
    for kv_heads in (4, 8):

        def inputs(length, cu, kv_heads=kv_heads):
            return (
                *(normal(1, length, n, HEAD_DIM) for n in (HEADS, kv_heads, kv_heads)),
                cu,
                MAX_SEQLEN,
            )

        args = inputs(tokens, cu_seqlens)
        reference_ms = report.times(
            f"attention KV={kv_heads} sdpa", tg.attention_sdpa, args, work, "TFLOP/s"
        )
        for name, backend in tg.ATTENTION_BACKENDS.items():
            if name == "sdpa":
                continue
            try:
                hp = tg.Hyperparameters(
                    attention_backend=name,
                    kernels=False,
                    model_dim=HEADS * HEAD_DIM,
                    num_heads=HEADS,
                    num_kv_heads=kv_heads,
                )
                tg.select_ops(hp, device, torch.bfloat16)
            except ValueError as error:
                print(f"attention KV={kv_heads} {name}: not here ({str(error)[:150]})")
                continue
            report.errors(
                f"attention KV={kv_heads} {name}", backend, tg.attention_sdpa, inputs(16384, short)
            )
            report.times(
                f"attention KV={kv_heads} {name}", backend, args, work, "TFLOP/s", reference_ms
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=98304)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=122)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() or tg.triton is None:
        print("bench_kernels: needs a CUDA device and Triton; nothing was measured")
        return 0
    started = time.perf_counter()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton"
        f" {tg.triton.__version__}, {options.tokens} tokens x {DIM}, F {options.hidden}, V {VOCAB},"
        f" {options.documents} documents"
    )
    report = Report(options.compiled)
    bench_cross_entropy(report, options.tokens)
    bench_mlp(report, options.tokens, options.hidden)
    bench_around_attention(report, options.tokens)
    bench_slot_input(report, options.tokens)
    bench_attention(report, options.tokens, options.documents)
    print(
        f"{time.perf_counter() - started:.0f} s in all"
        + (", something is WRONG" if report.wrong else "")
    )
    return int(report.wrong)


if __name__ == "__main__":
    sys.exit(main())
