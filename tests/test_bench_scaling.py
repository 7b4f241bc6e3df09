"""benchmarks/bench_scaling.py: two rank counts of a small model over gloo; covered communication."""

import json
import sys
from types import SimpleNamespace

import pytest
from conftest import IN_SOAK

from benchmarks import bench_scaling
from benchmarks.bench_step import Event


@IN_SOAK
def test_one_and_two_ranks_give_the_same_losses(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("DATA_PATH", raising=False)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "bench",
            "--device",
            "cpu",
            "--ranks",
            "1,2",
            "--seconds",
            "0.1",
            "--losses",
            "4",
            "--out",
            str(tmp_path / "scaling.json"),
        ],
    )
    bench_scaling.main()
    one, two = json.loads((tmp_path / "scaling.json").read_text())
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert len(one["losses"]) == 4 and one["losses"] == pytest.approx(two["losses"], abs=1e-4)
    assert one["states"]["on"]["communication"] == {}
    names = set(two["states"]["on"]["communication"])
    assert {"all", "allreduce", "reducescatter", "allgather"} <= names
    assert all(
        0 < part["least_ms"] <= part["exposed_ms"]
        for part in two["states"]["on"]["communication"].values()
    )
    printed = capsys.readouterr().out
    assert "4 steps, 2 ranks against 1" in printed and printed.count("reducescatter ") == 2


def test_the_small_model_has_a_row_for_each_rank():
    for ranks, rows in (("1,2", 2), ("1,2,4,8", 8), ("1", 2)):
        hp = bench_scaling.settings(SimpleNamespace(device="cpu", ranks=ranks))
        assert hp.micro_steps == rows


def test_communication_under_another_kernel_is_not_exposed():
    events = [
        Event("gemm", 0.0, 1000.0, [], "projections"),
        Event("ncclDevKernel_ReduceScatter_Sum_bf16", 500.0, 1500.0, [], "collectives"),
        Event("gemm", 1800.0, 500.0, [], "Newton-Schulz"),
        Event("ncclDevKernel_AllGather_RING", 2300.0, 100.0, [], "collectives"),
    ]
    table = bench_scaling.communication(events, covered=True)
    assert table["reducescatter"] == {"launches": 1, "ms": 1.5, "exposed_ms": pytest.approx(0.8)}
    assert table["allgather"]["exposed_ms"] == pytest.approx(0.1)
    assert table["all"]["exposed_ms"] == pytest.approx(0.9)
    assert bench_scaling.communication(events, covered=False)["all"]["exposed_ms"] == 1.6


def test_least_is_of_the_rank_that_waits_least_in_each_step():
    def step(ms, exposed):
        return {"all": {"launches": 2, "ms": ms, "exposed_ms": exposed}}

    # another rank waits in each step
    ranks = [[step(9.0, 8.0), step(1.0, 0.5)], [step(2.0, 1.0), step(5.0, 4.0)]]
    table = bench_scaling.mean_and_least(ranks)
    assert table == {"all": {"launches": 2, "ms": 5.0, "exposed_ms": 4.25, "least_ms": 0.75}}
