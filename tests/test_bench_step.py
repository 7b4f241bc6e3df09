"""benchmarks/bench_step.py: a small model on the CPU from end to end, and the sorting of a GPU's
trace.
"""

import json
import math
from types import SimpleNamespace

import pytest

from benchmarks import bench_step
from train_gpt import Hyperparameters


def bench_on_cpu(monkeypatch, out, *options):
    """The figures that bench_step writes to `out`, of a tenth of a second."""
    command = ["bench", "--device", "cpu", "--seconds", "0.1", "--caches", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*command, *options])
    bench_step.main()
    return json.loads(out.read_text())


def test_a_profiled_step_has_the_work_of_every_phase(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("DATA_PATH", raising=False)
    result = bench_on_cpu(monkeypatch, tmp_path / "step.json", "--states", "on")
    state = result["states"]["on"]
    expected = {
        "attention forward",
        "attention backward",
        "projections",
        "MLP products",
        "head product",
        "cross-entropy",
        "element-wise forward",
        "element-wise backward",
        "gradient accumulation",
        "Newton-Schulz",
        "AdamW",
        "optimizer, rest",
        "EMA",
    }
    assert expected <= set(state["phases"])
    # products of one step, by hand: 6 slots x 2 micro-batches of 512 tokens, forward and twice that
    # backward
    hp = Hyperparameters(**bench_step.SMALL)
    tokens, D, kv, F = 1024, 64, 32, 192
    gates = 6 * tokens * 6 * bench_step.tg.GATE_WINDOW * hp.num_heads
    smear = 6 * tokens * bench_step.tg.GATE_WINDOW
    projections = 6 * tokens * 6 * (2 * D * D + 2 * D * kv)
    assert state["phases"]["projections"]["gflop"] == pytest.approx(
        (projections + gates + smear) / 1e9, rel=0.02
    )
    assert state["phases"]["MLP products"]["gflop"] == pytest.approx(
        6 * tokens * 6 * 2 * D * F / 1e9
    )
    assert state["phases"]["head product"]["gflop"] == pytest.approx(6 * tokens * D * 320 / 1e9)
    assert result["loader_tokens_per_second"] > 0 and state["tokens_per_second"] > 0
    assert state["busy_ms"] == pytest.approx(sum(row["ms"] for row in state["phases"].values()))
    assert "loader over training" in capsys.readouterr().out


def test_without_a_table_nothing_is_profiled(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_step, "profile_step", None)  # not called
    result = bench_on_cpu(monkeypatch, tmp_path / "step.json", "--states", "off", "--no-table")
    state = result["states"]["off"]
    assert {"tokens_per_second", "compile_seconds", "peak_reserved_gb"} <= set(
        state
    ) and "phases" not in state
    printed = capsys.readouterr().out
    first, *others = state["first_losses"]
    assert (
        first == pytest.approx(math.log(320), rel=0.01)
        and len(others) == 2
        and not {first} & {*others}
    )
    assert (
        "losses of the first steps " + " ".join(f"{loss:.4f}" for loss in state["first_losses"])
        in printed
    )
    assert "GB reserved" in printed and "launch gaps" not in printed


@pytest.mark.parametrize(
    "device, capture, calls",
    [
        ("cuda", True, [("step", 5, "plain"), ("profiled", 6, "plain")]),
        ("cuda", False, [("profiled", 5, "captured")]),
        ("cpu", True, [("profiled", 5, "captured")]),
    ],
)
def test_the_profiled_step_alone_is_not_captured(monkeypatch, device, capture, calls):
    made, hp = [], Hyperparameters(train_cuda_graphs=capture)
    trainer = SimpleNamespace(
        forward="captured",
        model=SimpleNamespace(forward=None),
        hp=hp,
        dist=SimpleNamespace(device=SimpleNamespace(type=device)),
    )
    trainer.train_step = lambda step, *_: made.append(("step", step, trainer.forward))
    monkeypatch.setattr(
        bench_step, "profile_step", lambda t, step, _: made.append(("profiled", step, t.forward))
    )
    monkeypatch.setattr(bench_step.tg, "compiled", lambda function, hp, dist: "plain")
    bench_step.profile_uncaptured(trainer, 5, True)
    assert made == calls and trainer.forward == "captured"


def operator(name, ts, dur, shapes=(), tid=1):
    lists = [bool(s) and isinstance(s[0], (tuple, list)) for s in shapes]
    args = {
        "Input Dims": [list(s) for s in shapes],
        "Input type": ["TensorList" if several else "c10::BFloat16" for several in lists],
    }
    category = "user_annotation" if name.startswith("phase:") else "cpu_op"
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": ts,
        "dur": dur,
        "tid": tid,
        "args": args,
    }


def launch(kernel, ts, number, tid=1, category="cuda_driver"):
    """A launch on the host and its kernel on the device, much later."""
    args = {"correlation": number}
    return [
        {"cat": category, "name": "cuLaunchKernelEx", "ts": ts, "dur": 1, "tid": tid, "args": args},
        {
            "cat": "kernel",
            "name": kernel,
            "ts": 1000 + 10 * number,
            "dur": 5,
            "tid": 7,
            "args": args,
        },
    ]


def test_kernels_go_to_the_phase_of_the_operator_that_launched_them():
    M, D, F, V = 98304, 512, 2048, 8192
    up, down, row = (F, D), (D, F), (M, D)
    plan = [  # kernel, operators that enclose its launch, phase
        (
            "kernel_cutlass_flash_attncuteflash_fwdFlashAttentionForwardSm90",
            [("golf::attention_fa4", [row])],
            "attention forward",
        ),
        (
            "kernel_cutlass_flash_bwd_preprocessFlashAttentionBackwardPreprocess",
            [("golf::fa4_backward", [row])],
            "attention pre/post-processing",
        ),
        (
            "void at::native::FillFunctor",
            [("golf::fa4_backward", [row]), ("aten::zeros", [])],
            "attention pre/post-processing",
        ),
        (
            "kernel_cutlass_flash_bwd_sm90FlashAttentionBackwardSm90",
            [("golf::fa4_backward", [row])],
            "attention backward",
        ),
        (
            "kernel_cutlass_kernel_quackepiloguefrontendGemmMod_forward",
            [("golf::mlp", [row, up, down, ()])],
            "MLP kernels",
        ),
        (
            "kernel_cutlass_kernel_quackepiloguefrontendGemmMod_backward",
            [
                ("autograd::engine::evaluate_function: CompiledFunctionBackward", []),
                ("golf::mlp_backward", [row, down, (M, F), ()]),
            ],
            "MLP kernels",
        ),
        (
            "nvjet_tst_256x128",
            [("golf::mlp", [row, up, down]), ("aten::mm", [(M, F), (F, D)])],
            "MLP products",
        ),
        (
            "nvjet_tst_128x128",
            [("CompiledFunctionBackward", []), ("aten::mm", [(F, M), (M, D)])],
            "MLP products",
        ),
        ("nvjet_tst_128x256", [("aten::mm", [row, (D, D)])], "projections"),
        ("nvjet_tst_128x64", [("aten::mm", [row, (D, V)])], "head product"),
        ("_ce_kernel", [("golf::linear_cross_entropy", [row, (V, D)])], "cross-entropy"),
        (
            "triton_red_fused_rms_norm_0",
            [("triton_red_fused_rms_norm_0", [row, row])],
            "element-wise forward",
        ),
        (
            "triton_per_fused__to_copy_masked_fill_mul_2",
            [("triton_per_fused__to_copy_masked_fill_mul_2", [row, row])],
            "element-wise forward",
        ),
        (
            "triton_poi_fused_mul_1",
            [
                ("autograd::engine::evaluate_function: CompiledFunctionBackward", []),
                ("triton_poi_fused_mul_1", [row, row]),
            ],
            "element-wise backward",
        ),
        (
            "_slot_input_kernel",
            [
                ("autograd::engine::evaluate_function: CompiledFunctionBackward", []),
                (
                    "golf::slot_input_backward",
                    [(row, (M, 12), row), row, row, (2, D), (1,), (row, (D,)), ()],
                ),
            ],
            "element-wise backward",
        ),
        (
            "vectorized_elementwise_kernel",
            [
                ("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", []),
                ("aten::add_", [up, up]),
            ],
            "gradient accumulation",
        ),
        (
            "nvjet_tst_64x64",
            [("phase:optimizer", []), ("aten::bmm", [(11, D, F), (11, F, D)])],
            "Newton-Schulz",
        ),
        ("FusedAdamMathFunctor", [("phase:optimizer", []), ("aten::_fused_adamw_", [])], "AdamW"),
        ("ncclDevKernel_ReduceScatter", [("phase:optimizer", [])], "collectives"),
        ("multi_tensor_apply_kernel", [("phase:ema", []), ("aten::_foreach_lerp_", [])], "EMA"),
        ("some_new_kernel", [], "other"),
    ]
    trace, ts = [], 0
    for number, (kernel, operators, _) in enumerate(plan):
        for depth, (name, shapes) in enumerate(operators):
            trace.append(operator(name, ts + depth, 90 - 2 * depth, shapes, tid=1 + number % 2))
        trace += launch(kernel, ts + 50, number, tid=1 + number % 2)
        ts += 100
    hp = Hyperparameters()
    events = bench_step.device_events({"traceEvents": trace[::-1]}, cuda=True)
    for event in events:
        bench_step.classify(event, hp)
    found = {e.name: e for e in events}
    assert {name: found[name].phase for name, *_ in plan} == {
        name: phase for name, _, phase in plan
    }
    assert found["nvjet_tst_128x256"].flops == 2 * M * D * D
    assert found["nvjet_tst_128x256"].nbytes == 2 * (2 * M * D + D * D)
    quack = [event for name, event in found.items() if "quack" in name]
    assert [event.flops for event in quack] == [2 * M * D * F] * 2
    assert sorted(event.nbytes for event in quack) == [
        2 * (M * D + D * F + n * M * F) for n in (1, 2)
    ]
    # 5 streams and the start in, 3 streams out
    assert found["_slot_input_kernel"].nbytes == 2 * (8 * M * D + 12 * M)
    assert found["triton_poi_fused_mul_1"].nbytes == 2 * 2 * M * D
    assert bench_step.busy_ms(events) == pytest.approx(5e-3 * len(plan))


def test_work_of_an_operator_is_counted_once():
    shapes = [(4, 6), (6, 8)]
    trace = [
        operator("aten::mm", 0, 50, shapes),
        operator("aten::mm", 60, 20, shapes),
        *launch("product", 10, 1),
        *launch("sum_of_splits", 20, 2),
        *launch("product", 70, 3),
    ]
    trace[5]["dur"] = 2  # the second kernel of the first product
    events = bench_step.device_events({"traceEvents": trace}, cuda=True)
    for event in events:
        bench_step.classify(event, Hyperparameters())
    bench_step.count_once(events)
    assert [(e.name, e.flops) for e in sorted(events, key=lambda e: e.start)] == [
        ("product", 2 * 4 * 6 * 8),
        ("sum_of_splits", 0),
        ("product", 2 * 4 * 6 * 8),
    ]


def test_attention_is_charged_its_streams_and_matmuls():
    names = (
        "BackwardPreprocess",
        "sm90_bwd",
        "BackwardPostprocess",
        "BackwardPostprocess",
        "elementwise",
    )
    events = [
        bench_step.Event(name, 0, 10, [], "attention pre/post-processing", nbytes=7.0)
        for name in names
    ]
    events[1].phase = "attention backward"
    hp = Hyperparameters()
    bench_step.add_attention_work(events, 1000.0, 11, hp, 2)
    stream = hp.train_batch_tokens * 11 * hp.num_heads * hp.head_dim  # numbers
    assert [e.nbytes for e in events] == [8 * stream, 12 * stream, 3 * stream, 3 * stream, 7.0]
    assert [e.flops for e in events] == [0, 10 * 1000.0 * 512 * 11, 0, 0, 0]


def test_busy_time_counts_overlapping_kernels_once():
    spans = [(0, 10), (5, 10), (6, 2), (20, 5)]
    assert bench_step.busy_ms([bench_step.Event("k", a, d, []) for a, d in spans]) == pytest.approx(
        20e-3
    )


def test_idle_time_is_told_by_the_phases_around_it():
    spans = [
        (0, 10, "a"),
        (5, 20, "b"),
        (12, 3, "a"),
        (27, 3, "a"),
        (30, 1, "b"),
        (33, 1, "a"),
        (40, 1, "b"),
    ]
    events = [bench_step.Event("k", start, duration, [], phase) for start, duration, phase in spans]
    idle = bench_step.idle(events[::-1])
    assert idle == {
        ("a", "b"): {"ms": pytest.approx(6e-3), "gaps": 1},
        ("b", "a"): {"ms": pytest.approx(4e-3), "gaps": 2},
    }
    assert list(idle) == [("a", "b"), ("b", "a")]
    assert bench_step.busy_ms(events) + sum(row["ms"] for row in idle.values()) == pytest.approx(
        41e-3
    )
