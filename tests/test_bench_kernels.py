"""benchmarks/bench_kernels.py without a clock, by Triton's interpreter: inputs fit the operations,
errors are seen.
"""

import pytest
import torch

import train_gpt
from benchmarks import bench_kernels


@pytest.fixture
def report(monkeypatch):
    if train_gpt.triton is None or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(bench_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(bench_kernels, "VOCAB", 96)
    monkeypatch.setattr(bench_kernels, "median_ms", lambda function: (function(), 1.0)[1])
    monkeypatch.setattr(train_gpt, "compiled", lambda function, *_: function)
    report = object.__new__(bench_kernels.Report)
    vars(report).update(compiled=False, wrong=False, tflops=1.0, gbytes=1.0)
    return report


def test_operations_are_compared_with_their_references(report, capsys):
    bench_kernels.bench_cross_entropy(report, 24)
    bench_kernels.bench_around_attention(report, 24)
    bench_kernels.bench_slot_input(report, 24)
    told = capsys.readouterr().out
    assert told.count(" ok ") == 6 and "WRONG" not in told and not report.wrong
    for name in (
        "head + cross-entropy fwd+bwd",
        "cross-entropy kernel",
        "XSA and gate fwd",
        "slot input with lanes kernel",
    ):
        assert f"\n{name} " in told


def test_a_wrong_operation_is_told(report, capsys):
    right = train_gpt.linear_cross_entropy_ref
    args = bench_kernels.normal(8, 16), bench_kernels.normal(96, 16), torch.arange(8), 30.0
    report.errors("head", lambda *inputs: 1.05 * right(*inputs), right, args)
    assert report.wrong and "WRONG" in capsys.readouterr().out
