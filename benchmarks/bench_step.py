"""Where the time of a training step goes.

One table for the default model with looping off, one with looping on.

    python benchmarks/bench_step.py [--seconds 60] [--states off,on] [--no-table] \\
        [--caches] [--loader] [--out FILE]

The trainer's own step runs on DATA_PATH, or on synthetic shards with documents of realistic
lengths; settings come from the environment as in a run. For each state: seconds until the first
step is done (compilation and capture, with empty caches unless --caches), then tokens per second in
a window of --seconds with the clock of a run, and the peak of reserved memory up to its end. The
losses of the first three steps are told as well: from the same data and seed, trees that differ
there by more than rounding do not train the same, and their rates compare nothing.

Then one step under torch.profiler. Replayed kernels have no operators around them, so that with
TRAIN_CUDA_GRAPHS=1 this step alone is compiled once more, without capture. Its device work is
sorted into phases by the operator that launched it and by its shapes. Columns, of one step:

    ms, and ms a micro-batch; launches; GFLOP of matrix products and attention;
    GB, every operand of a kernel once; floor: the longer of FLOPs at the rate of a large
    product and bytes at that of a copy, both of the same call; ratio

`launch gaps` is the step's time in the window minus the time that the device is busy in the
profiled one; the line behind it says between which phases it was idle under the profiler. Then the
longest kernels, those that no phase claims, losses, memory, tokens/s and model FLOPs utilisation.
--no-table leaves the profiled step out. --loader measures only the loader. On a CPU a small model
is measured, operators stand in for kernels, and what Python and autograd take between them counts
as launch gaps.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg
from tools.guard import RunGuard

SMALL = {
    "vocab_size": 320,
    "model_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 8,
    "mlp_mult": 3.0,
    "num_layers": 4,
    "loop_start": 1,
    "loop_end": 2,
    "num_loops": 1,
    "parallel_start_layer": 3,
    "train_batch_tokens": 1024,
    "micro_batch_tokens": 512,
    "train_seq_len": 128,
}
ITEM_BYTES = {
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "float": 4,
    "int": 4,
    "long int": 8,
    "long": 8,
    "double": 8,
    "bool": 1,
    "unsigned char": 1,
    "signed char": 1,
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
PHASES = (
    "attention forward",
    "attention backward",
    "attention pre/post-processing",
    "MLP kernels",
    "MLP products",
    "projections",
    "head product",
    "cross-entropy",
    "element-wise forward",
    "element-wise backward",
    "gradient accumulation",
    "Newton-Schulz",
    "AdamW",
    "collectives",
    "optimizer, rest",
    "EMA",
    "data",
    "copies and fills",
    "other",
)


@dataclass
class Event:
    """One piece of device work: a kernel or a copy, or on the CPU the own time of an operator."""

    name: str
    start: float  # microseconds
    duration: float
    # what was running on the launching thread, outermost first: (name, shapes, types, start)
    chain: list
    phase: str = ""
    shape: str = ""  # of a matrix product
    source: tuple = ()  # the operator whose work it is
    flops: float = 0.0
    nbytes: float = 0.0


# --- data


def write_synthetic_shards(folder: str, tokens: int, vocab_size: int) -> None:
    """Documents with lengths like web text and Zipf-like tokens, as one training shard.

    The median length is 520 tokens, the mean 1,300.
    """
    rng = np.random.default_rng(0)
    values = np.minimum(8 + rng.zipf(1.3, tokens) % (vocab_size - 8), vocab_size - 1)
    lengths = np.maximum(2, rng.lognormal(math.log(520), 1.35, 1 + tokens // 200)).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    values[starts[starts < tokens]] = tg.BOS_ID
    header = np.zeros(256, dtype="<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, tokens
    Path(folder, "fineweb_train_000000.bin").write_bytes(
        header.tobytes() + values.astype("<u2").tobytes()
    )


def bench_loader(hp, dist, seconds: float) -> float:
    """Tokens per second of the loader alone, rows read ahead by one as in training."""
    loader = tg.TrainLoader(tg.TokenStream(hp.data_path, "train"), hp, dist)
    loader.row(0, 1)
    start, rows = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        rows += 1
        loader.row(rows, rows + 1)
    dist.synchronize()
    return rows * hp.micro_batch_tokens / (time.perf_counter() - start)


# --- ceilings


def seconds_of(function, dist) -> float:
    """Best mean of three short rounds."""
    function()
    dist.synchronize()
    best = math.inf
    for _ in range(3):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 0.05 or count < 3:
            function()
            count += 1
            if count % 10 == 0:
                dist.synchronize()  # or the queue runs ahead of the clock
        dist.synchronize()
        best = min(best, (time.perf_counter() - start) / count)
    return best


def product_rate(dist, dtype, rows: int = 0, inner: int = 0, columns: int = 0) -> tuple[str, float]:
    """Name and TFLOP/s of a product, by default a large one."""
    if not rows:
        rows = inner = columns = 8192 if dist.device.type == "cuda" else 512
    a, b = (
        torch.randn(shape, device=dist.device, dtype=dtype)
        for shape in ((rows, inner), (inner, columns))
    )
    rate = 2e-12 * rows * inner * columns / seconds_of(lambda: a @ b, dist)
    return f"product {rows}x{inner}x{columns} TFLOP/s", rate


def measure_ceilings(hp, dist, dtype) -> dict:
    """{name: TFLOP/s} of a large matmul and of the model's matmuls, and GB/s of a copy."""
    tokens = hp.micro_batch_tokens if dist.device.type == "cuda" else 4096
    shapes = [(), *((tokens, hp.model_dim, n) for n in (hp.model_dim, hp.mlp_dim, hp.vocab_size))]
    ceilings = dict(product_rate(dist, dtype, *shape) for shape in shapes)
    source = torch.empty(
        2**30 if dist.device.type == "cuda" else 2**24, dtype=torch.int8, device=dist.device
    )
    target = torch.empty_like(source)
    ceilings["copy GB/s"] = 2e-9 * source.numel() / seconds_of(lambda: target.copy_(source), dist)
    return ceilings


# --- the trace


def device_events(trace: dict, cuda: bool) -> list[Event]:
    """Chrome trace of torch.profiler -> device work.

    Each event has the operators that enclose its launch.
    """
    threads, launches, work = defaultdict(list), {}, []
    for event in trace["traceEvents"]:
        category, args = event.get("cat"), event.get("args", {})
        if category in ("cpu_op", "user_annotation"):
            threads[event["tid"]].append(event)
        elif category in ("cuda_runtime", "cuda_driver"):
            launches[args.get("correlation")] = event
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            work.append(event)
    found, points = [], defaultdict(list)
    for event in work:
        launch = launches.get(event["args"].get("correlation"))
        found.append(Event(event["name"], event["ts"], event["dur"], []))
        if launch is not None:
            points[launch["tid"]].append((launch["ts"], found[-1]))
    for thread, operators in threads.items():
        operators.sort(key=lambda e: (e["ts"], -e["dur"]))
        if cuda:
            attach_chains(operators, sorted(points[thread], key=lambda p: p[0]))
        else:
            found += own_times(operators)
    return found


def frame(operator) -> tuple:
    """An operator of the trace as a part of Event.chain: (name, shapes, types, start)."""
    args = operator.get("args", {})
    return operator["name"], args.get("Input Dims", []), args.get("Input type", []), operator["ts"]


def attach_chains(operators: list, points: list) -> None:
    """Sorted operators of a thread, sorted (time, Event) of its launches.

    Sets Event.chain to the open operators.
    """
    stack, position = [], 0
    for ts, event in points:
        while position < len(operators) and operators[position]["ts"] <= ts:
            stack.append(operators[position])
            position += 1
            stack = [o for o in stack if o["ts"] + o["dur"] >= stack[-1]["ts"]]
        stack = [o for o in stack if o["ts"] + o["dur"] >= ts]
        event.chain = [frame(o) for o in stack]


def own_times(operators: list) -> list[Event]:
    """Sorted operators of a thread -> one Event each.

    Each has the time outside the operators it encloses.
    """
    events, stack = [], []
    for operator in operators:
        stack = [
            pair
            for pair in stack
            if pair[0]["ts"] + pair[0]["dur"] >= operator["ts"] + operator["dur"]
        ]
        chain = [frame(o) for o, _ in stack] + [frame(operator)]
        event = Event(operator["name"], operator["ts"], operator["dur"], chain)
        if stack:
            stack[-1][1].duration -= operator["dur"]
        stack.append((operator, event))
        events.append(event)
    return [e for e in events if e.name.startswith(("aten::", "golf::", "c10d::"))]


def tensor_bytes(shapes: list, types: list) -> list[float]:
    """Bytes of each tensor argument, lists of tensors summed."""
    sizes = []
    for shape, kind in zip(shapes, types, strict=False):
        if kind == "TensorList":
            sizes.append(4.0 * sum(math.prod(s) for s in shape))
        elif kind in ITEM_BYTES and shape:
            sizes.append(float(ITEM_BYTES[kind]) * math.prod(shape))
    return sizes


def work_of(operator: tuple, event: Event, hp) -> tuple[float, float]:
    """FLOPs of a matrix product, bytes of an operator's operands (each once).

    Attention is counted elsewhere.
    """
    name, shapes, types, _ = operator
    short, sizes, flops = name.split("::")[-1], tensor_bytes(shapes, types), 0.0
    if short in PRODUCTS:
        matrices = [s for s in shapes if len(s) >= 2]
        a, b = (
            matrices[1:3] if short in ("addmm", "baddbmm") and len(matrices) > 2 else matrices[:2]
        )
        flops = 2.0 * math.prod(a) * b[-1]
        item = sizes[0] / max(1, math.prod(shapes[0]))
        return flops, item * (math.prod(a) + math.prod(b) + math.prod(a[:-1]) * b[-1])
    if name == "golf::mlp":  # x, w_up, w_down -> act
        return (
            2.0 * shapes[0][0] * math.prod(shapes[1]),
            sum(sizes[:2]) + sizes[0] * hp.mlp_dim / hp.model_dim,
        )
    if name == "golf::mlp_backward":  # grad, w_down, act -> grad_pre
        return 2.0 * shapes[0][0] * math.prod(shapes[1]), sum(sizes) + sizes[2]
    # gradients, merged, x0, mix, scale, [skip, ...]; -> those of merged, x0, skip
    if name == "golf::slot_input_backward":
        streams = [*shapes[0], *2 * shapes[1:3], *2 * shapes[5][:1]]
        return 0.0, float(ITEM_BYTES[types[1]]) * sum(map(math.prod, streams))
    if name == "golf::linear_cross_entropy":  # h, weight: logits, read and overwritten
        return 0.0, 2 * sizes[0] * hp.vocab_size / hp.model_dim
    if name == "golf::gated_xsa_backward":  # gradient, y, v, logits; -> those of the last three
        return 0.0, sum(sizes) + sum(sizes[1:4])
    if name == "golf::qkv_heads_backward":  # dq, dk, dv, qkv, ...; -> gradient of qkv
        return 0.0, sum(sizes) + sizes[3]
    if name.startswith("golf::"):  # results as large as the first input
        return 0.0, sum(sizes) + sizes[0]
    if name.startswith("aten::") and not name.endswith("_") and "Memcpy" not in event.name:
        return 0.0, sum(sizes) + max(sizes, default=0.0)
    return 0.0, sum(sizes)


def product_phase(shapes: list, hp) -> str:
    """Phase of a matrix product outside the optimizer, by its dimensions."""
    dims = {size for shape in shapes if len(shape) >= 2 for size in shape}
    if hp.vocab_size in dims:
        return "head product"
    return "MLP products" if hp.mlp_dim in dims else "projections"


def classify(event: Event, hp) -> None:
    """Sets phase, FLOPs and bytes of an event from the operators around its launch."""
    names = " ".join(frame[0] for frame in event.chain)
    shaped = [
        f for f in event.chain if f[1] and not f[0].startswith(("autograd::", "Compiled", "phase:"))
    ]
    operator = shaped[-1] if shaped else None
    if operator:
        event.source = operator[0], operator[3]
        event.flops, event.nbytes = work_of(operator, event, hp)
    part = re.search(r"phase:(\w+)", names)
    product = operator is not None and operator[0].split("::")[-1] in PRODUCTS
    if product:
        event.shape = " @ ".join("x".join(map(str, s)) for s in operator[1] if len(s) >= 2)
    backward = "autograd::engine" in names or "Backward" in names or "_backward" in names
    if "nccl" in event.name.lower() or "c10d::" in names:
        event.phase = "collectives"
    elif part and part[1] != "optimizer":
        event.phase = {"ema": "EMA", "data": "data"}[part[1]]
    elif part:
        adam = "adam" in (names + event.name).lower()
        event.phase = "AdamW" if adam else "optimizer, rest"
        if product or "golf::" in names:
            event.phase = "Newton-Schulz"
    elif re.search(
        r"attention_(fa|torch)|fa4_backward|flash|scaled_dot_product|varlen_attn",
        names + event.name,
    ):
        event.phase = attention_phase(event, names, backward)
    elif "golf::linear_cross_entropy" in names:
        event.phase = "head product" if product else "cross-entropy"
    elif "golf::mlp" in names:
        event.phase = "MLP products" if product else "MLP kernels"
    elif product:
        event.phase = product_phase(operator[1], hp)
    elif re.search("log_softmax|nll_loss|cross_entropy|logsumexp", names):
        event.phase = "cross-entropy"
    elif "AccumulateGrad" in names:
        event.phase = "gradient accumulation"
    # these are called after all that they do, casts too
    elif not event.name.startswith("triton_") and re.search(
        "memcpy|memset|copy|fill|zero|detach|empty|contiguous", event.name.lower()
    ):
        event.phase = "copies and fills"
    elif (
        re.match("triton_|golf::|aten::", event.name)
        or "golf::" in names
        or "elementwise" in event.name
    ):
        event.phase = "element-wise backward" if backward else "element-wise forward"
    else:
        event.phase = "other"


def attention_phase(event: Event, names: str, backward: bool) -> str:
    """Phase of a kernel that an attention operator launched: its own work, or what surrounds it."""
    own_work = re.search("flash|fmha|kernel_cutlass|scaled_dot_product|attention", event.name)
    if not own_work or re.search("preprocess|postprocess|convert|combine", event.name.lower()):
        return "attention pre/post-processing"
    return "attention backward" if backward or "bwd" in event.name.lower() else "attention forward"


def count_once(events: list[Event]) -> None:
    """The work of an operator that launched several kernels stays with the longest of them."""
    longest = {event.source: event for event in sorted(events, key=lambda e: e.duration)}
    for event in events:
        if event.source and longest[event.source] is not event:
            event.flops = event.nbytes = 0.0


def add_attention_work(events: list[Event], pairs: float, passes: int, hp, item: int) -> None:
    """Spreads the FLOPs and bytes of attention over its events by their time.

    They are of the causal pairs of the step, per pass.
    """
    heads, kv_heads = hp.num_heads * hp.head_dim, hp.num_kv_heads * hp.head_dim
    once = 4.0 * pairs * heads * passes
    tokens = float(hp.train_batch_tokens) * passes
    around = "attention pre/post-processing"
    for phase, words, flops, width in (
        ("attention forward", "", once, item * (2 * heads + 2 * kv_heads)),
        ("attention backward", "", 2.5 * once, item * (4 * heads + 4 * kv_heads)),
        # out, its gradient; fp32 sums of dq are zeroed
        (around, "preprocess|dot_do_o", 0.0, (2 * item + 4) * heads),
        (around, "postprocess|convert", 0.0, (4 + item) * heads),  # these sums, dq
    ):
        chosen = [e for e in events if e.phase == phase and re.search(words, e.name.lower())]
        total = sum(e.duration for e in chosen) or 1.0
        for event in chosen:
            event.flops, event.nbytes = (
                work * event.duration / total for work in (flops, tokens * width)
            )


# --- one state


def annotated(name: str, function):
    """The function, whose work `classify` finds under "phase:name" in a profile."""

    def call(*args, **kwargs):
        with torch.profiler.record_function("phase:" + name):
            return function(*args, **kwargs)

    return call


def causal_pairs(trainer, step: int) -> float:
    """Pairs (query, key) of all rows of a step."""
    lengths = [row.cu_seqlens.diff().double() for row in trainer.loader.rank_rows(step)]
    return sum((n * (n + 1) / 2).sum().item() for n in lengths)


def profile_step(trainer, step: int, looping: bool) -> list[Event]:
    """Trains one step under torch.profiler -> its device work, sorted into phases."""
    cuda = trainer.dist.device.type == "cuda"
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        *[torch.profiler.ProfilerActivity.CUDA] * cuda,
    ]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        trainer.train_step(step, 0.0, looping)
        trainer.dist.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = device_events(json.loads(path.read_text()), cuda)
    for event in events:
        classify(event, trainer.hp)
    count_once(events)
    slots = len(trainer.model.slots(looping))
    item = 2 if trainer.model.dtype == torch.bfloat16 else 4
    add_attention_work(events, causal_pairs(trainer, step), slots, trainer.hp, item)
    return events


def profile_uncaptured(trainer, step: int, looping: bool) -> list[Event]:
    """profile_step of kernels that operators launch.

    The captured micro-batches stay for the steps that follow.
    """
    captured = trainer.forward
    hp, dist = trainer.hp, trainer.dist
    if hp.train_cuda_graphs and dist.device.type == "cuda" and tg.compile_wanted(hp, dist):
        trainer.forward = tg.compiled(trainer.model.forward, hp, dist)
        trainer.train_step(step, 0.0, looping)  # compiles
        step += 1
    events = profile_step(trainer, step, looping)
    trainer.forward = captured
    return events


def tokens_per_second(trainer, looping: bool, seconds: float, step: int) -> tuple[float, int]:
    """Rate of a window of steps with the clock of a run, and the number of the next step."""
    clock, first = tg.TrainingClock(trainer.dist), step
    while step - first < 2 or clock.seconds() < seconds:
        trainer.train_step(step, 0.0, looping)
        step += 1
        clock.mark_step()
    trainer.dist.synchronize()
    return (step - first) * trainer.hp.train_batch_tokens / clock.seconds(), step


def busy_ms(events: list[Event]) -> float:
    """Milliseconds in which at least one event was running."""
    if not events:
        return 0.0
    first, last = min(e.start for e in events), max(e.start + e.duration for e in events)
    return (last - first) / 1e3 - sum(row["ms"] for row in idle(events).values())


def idle(events: list[Event]) -> dict:
    """{(phase before, phase after): ms, gaps} of the time in which nothing was running.

    Longest first.
    """
    table, last = defaultdict(lambda: {"ms": 0.0, "gaps": 0}), None
    for event in sorted(events, key=lambda e: e.start):
        if last and event.start > last.start + last.duration:
            row = table[last.phase, event.phase]
            row["ms"] += (event.start - last.start - last.duration) / 1e3
            row["gaps"] += 1
        if last is None or event.start + event.duration > last.start + last.duration:
            last = event
    return dict(sorted(table.items(), key=lambda item: -item[1]["ms"]))


def floor_ms(event: Event, ceilings: dict) -> float:
    """The least time of an event by its FLOPs and bytes, whatever its shape.

    Matmuls over the model's width are slower with cuBLAS, but not with every kernel.
    """
    large = next(iter(ceilings.values()))
    return max(event.flops / large / 1e9, event.nbytes / ceilings["copy GB/s"] / 1e6)


def summarize(events: list[Event], ceilings: dict, by) -> dict:
    """{key: ms, launches, gflop, gbyte, floor_ms} of the events with by(event) == key.

    Longest first.
    """
    table = defaultdict(lambda: dict.fromkeys(("ms", "launches", "gflop", "gbyte", "floor_ms"), 0))
    for event in events:
        row = table[by(event)]
        row["ms"] += event.duration / 1e3
        row["launches"] += 1
        row["gflop"] += event.flops / 1e9
        row["gbyte"] += event.nbytes / 1e9
        row["floor_ms"] += floor_ms(event, ceilings)
    return dict(sorted(table.items(), key=lambda item: -item[1]["ms"]))


def model_flops(model, looping: bool, pairs: float) -> float:
    """FLOPs of a step that the model asks for.

    6 a weight in play and token, 3.5 forward passes of causal attention.
    """
    hp, slots = model.hp, len(model.slots(looping))
    layer = (
        2 * hp.model_dim**2
        + 2 * hp.model_dim * hp.num_kv_heads * hp.head_dim
        + 2 * hp.model_dim * hp.mlp_dim
    )
    weights = slots * layer + hp.vocab_size * hp.model_dim
    return (
        6.0 * weights * hp.train_batch_tokens
        + 3.5 * 4.0 * pairs * hp.num_heads * hp.head_dim * slots
    )


def bench_state(trainer, looping: bool, seconds: float, ceilings: dict, table: bool) -> dict:
    """Figures of the step as it is trained; with `table` also those of a profiled one."""
    dist, hp = trainer.dist, trainer.hp
    cuda = dist.device.type == "cuda"
    times, losses = [], []
    if cuda:
        torch.cuda.empty_cache()  # what a profiled step or the ceilings left
        torch.cuda.reset_peak_memory_stats()
    for step in range(3):
        start = time.perf_counter()
        losses.append(trainer.train_step(step, 0.0, looping))
        dist.synchronize()
        times.append(time.perf_counter() - start)
    rate, step = tokens_per_second(trainer, looping, seconds, 3)
    # reserved: memory of a captured graph counts as allocated only while it is captured
    peak = torch.cuda.max_memory_reserved() / 1e9 if cuda else 0.0
    # a long window warms the device, and its clocks fall
    product = product_rate(dist, trainer.model.dtype)[1]
    step_ms = 1e3 * hp.train_batch_tokens / rate / dist.world_size
    flops = model_flops(trainer.model, looping, causal_pairs(trainer, step))
    result = {
        "first_losses": torch.stack(losses).tolist(),
        "tokens_per_second": rate,
        "step_ms": step_ms,
        "first_step_seconds": times[0],
        "compile_seconds": times[0] - times[-1],
        "peak_reserved_gb": peak,
        "large_product_after": product,
        "model_tflops_per_second": flops / step_ms / 1e9,
        "utilisation": flops / step_ms / 1e9 / next(iter(ceilings.values())),
    }
    if not table:
        return result
    events = profile_uncaptured(trainer, step, looping)
    busy = busy_ms(events) if cuda else sum(e.duration for e in events) / 1e3
    names = summarize(events, ceilings, lambda e: (f"{e.shape} {e.name}".strip(), e.phase))
    return result | {
        "busy_ms": busy,
        "launch_gaps_ms": step_ms - busy,
        "phases": summarize(events, ceilings, lambda e: e.phase),
        "idle": [{"between": pair, **row} for pair, row in idle(events).items()],
        "kernels": [{"name": name, "phase": phase, **row} for (name, phase), row in names.items()],
    }


def print_state(name: str, result: dict, micro_steps: int) -> None:
    """Figures of bench_state; micro_steps: micro-batches of a rank in a step."""
    print(
        f"\nlooping {name}: {result['step_ms']:.1f} ms a step, compile"
        f" {result['compile_seconds']:.1f} s"
    )
    if "phases" in result:
        print_table(result, micro_steps)
    print("losses of the first steps " + " ".join(f"{loss:.4f}" for loss in result["first_losses"]))
    print(
        f"peak memory {result['peak_reserved_gb']:.1f} GB reserved;"
        f" {result['tokens_per_second']:,.0f} tokens/s; model FLOPs"
        f" {result['model_tflops_per_second']:.3g} TFLOP/s, {result['utilisation']:.1%} of the"
        f" large product (right after the window: {result['large_product_after']:.3g})",
        flush=True,
    )


def print_table(result: dict, micro_steps: int) -> None:
    """What bench_state found in the profiled step."""
    print(
        f"{'phase':32}{'ms':>9}{'a micro':>9}{'launches':>9}"
        f"{'GFLOP':>10}{'GB':>9}{'floor ms':>10}{'ratio':>7}"
    )
    rows = [(phase, result["phases"][phase]) for phase in PHASES if phase in result["phases"]]
    keys = "ms", "launches", "gflop", "gbyte", "floor_ms"
    rows.append(("device work", {key: sum(row[key] for _, row in rows) for key in keys}))
    for phase, row in rows:
        ratio = f"{row['ms'] / row['floor_ms']:7.2f}" if row["floor_ms"] else ""
        print(
            f"{phase:32}{row['ms']:9.2f}{row['ms'] / micro_steps:9.3f}{row['launches']:9d}"
            f"{row['gflop']:10.0f}{row['gbyte']:9.2f}{row['floor_ms']:10.2f}{ratio}"
        )
    gaps = result["launch_gaps_ms"]
    print(
        f"{'launch gaps':32}{gaps:9.2f}{gaps / micro_steps:9.3f}   (device busy"
        f" {result['busy_ms']:.2f} ms)"
    )
    idle = [
        f"{row['ms']:.2f} ms in {row['gaps']}, {' - '.join(row['between'])}"
        for row in result["idle"][:8]
    ]
    print("idle under the profiler, between: " + "; ".join(idle))
    print("longest kernels (ms, launches, GB/s, TFLOP/s, phase, name):")
    for row in result["kernels"][:30]:
        print(
            f"{row['ms']:9.2f}{row['launches']:6d}{row['gbyte'] / row['ms'] * 1e3:7.0f}"
            f"{row['gflop'] / row['ms']:6.0f}  {row['phase']:24} {row['name'][:110]}"
        )
    unknown = [
        f"{row['ms']:.2f} {row['name'][:80]}"
        for row in result["kernels"]
        if row["phase"] == "other"
    ]
    print("in no phase (ms, name): " + ("; ".join(unknown[:12]) or "none"))


def measure(hp, dist, args) -> dict:
    """Everything that was asked for, printed as it comes -> the figures."""
    name = torch.cuda.get_device_name() if dist.device.type == "cuda" else "cpu"
    print(
        f"{name}, torch {torch.__version__}, {hp.micro_steps} micro-batches of"
        f" {hp.micro_batch_tokens} tokens, {dist.world_size} ranks"
    )
    result = {"device": name, "torch": torch.__version__, "states": {}}
    result["loader_tokens_per_second"] = bench_loader(hp, dist, min(args.seconds, 5.0))
    print(f"loader alone {result['loader_tokens_per_second']:,.0f} tokens/s")
    if args.loader:
        return result
    start = time.perf_counter()
    model = tg.build_model(hp, dist)
    result["model_seconds"] = time.perf_counter() - start
    print(f"model and trial calls of its operations {result['model_seconds']:.1f} s")
    result["operations"], result["notes"] = model.ops.names, model.ops.notes
    print(
        "operations " + " ".join(f"{k}:{v}" for k, v in model.ops.names.items()),
        *model.ops.notes,
        sep="\n  ",
    )
    result["ceilings"] = measure_ceilings(hp, dist, model.dtype)
    print(
        "ceilings: " + ", ".join(f"{name} {rate:.3g}" for name, rate in result["ceilings"].items()),
        flush=True,
    )
    loader = tg.TrainLoader(tg.TokenStream(hp.data_path, "train"), hp, dist)
    # it watches the gradients, as in a run
    trainer = tg.Trainer(model, loader, hp, dist, print, RunGuard())
    trainer.loader.row = annotated("data", trainer.loader.row)
    trainer.optimizers.step = annotated("optimizer", trainer.optimizers.step)
    trainer.ema.update = annotated("ema", trainer.ema.update)
    for state in args.states.split(","):
        result["states"][state] = bench_state(
            trainer, state == "on", args.seconds, result["ceilings"], not args.no_table
        )
        if dist.rank == 0:
            print_state(state, result["states"][state], hp.micro_steps // dist.world_size)
    states = result["states"].values()
    fastest = max(state["tokens_per_second"] for state in states) / dist.world_size
    ratio = result["loader_tokens_per_second"] / fastest
    seconds = sum(state["compile_seconds"] for state in states)
    print(f"\nloader over training: {ratio:.1f}x; compile of all graphs {seconds:.1f} s")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="window of each rate; 60 for reported figures"
    )
    parser.add_argument("--states", default="off,on", help="looping off, on, or both")
    parser.add_argument(
        "--no-table", action="store_true", help="no profiled step: rates, compile seconds, memory"
    )
    parser.add_argument(
        "--caches", action="store_true", help="use the compile caches of this machine"
    )
    parser.add_argument("--loader", action="store_true", help="measure only the loader")
    parser.add_argument("--out", help="file for the figures as JSON")
    args = parser.parse_args()
    # compile workers may still write
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if not args.caches:
            os.environ |= {
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
                "TRITON_CACHE_DIR": f"{folder}/triton",
            }
        dist = tg.Dist(args.device)
        cuda = dist.device.type == "cuda"
        hp = replace(
            tg.Hyperparameters.from_env(guard=RunGuard()),
            device=args.device,
            **({} if cuda else SMALL),
        )
        if "DATA_PATH" not in os.environ:
            # its tokens are no text: no tokenizer says which are markers
            hp = replace(hp, data_path=folder, marker_fusion_enabled=False)
            write_synthetic_shards(
                folder, max(2**21, 40 * hp.train_batch_tokens) if cuda else 2**16, hp.vocab_size
            )
        result = measure(hp, dist, args)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))
    dist.close()


if __name__ == "__main__":
    main()
