"""Whole tiny runs on GPUs, without network: two over NCCL with a rank that dies or stalls, and what
two runs share.

python -m pytest -m gpu tests/test_gpu_runs.py    # about five minutes; with one GPU the first tests are skipped
"""

import os

import faults
import pytest
import torch
from conftest import tell
from fault_helpers import check_rank_fault, comparable, loss_lines, output, tidy

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PLAIN = {"DEVICE": "cuda", "COMPILE": "0", "KERNELS": "0", "ATTENTION_BACKEND": "sdpa"}
# kernels and backend by trial
OURS = {"DEVICE": "cuda", "COMPILE": "0", "MODEL_DIM": "256", "ROPE_DIMS": "16"}
HERE = {
    name: os.environ[name]
    for name in ("CUDA_VISIBLE_DEVICES", "TRITON_CACHE_DIR", "PYTHONPATH", "LD_LIBRARY_PATH")
    if name in os.environ
}


@pytest.fixture
def world(tmp_path):
    faults.make_data(tmp_path / "data")
    return tmp_path


@two_gpus
def test_two_gpus_run_the_whole_pipeline(world):
    process = faults.start(world, 2, **HERE | PLAIN)
    assert faults.end(process, 240) == 0, output(world)[-4000:]
    result = comparable(world)
    assert result["world_size"] == 2 and not result["device"].startswith("cpu")
    assert (
        set(result["scores"]) == {"prequant", "quantized", "ttt"} and result["artifact_bytes"] > 0
    )
    tidy(world, process)


@two_gpus
@pytest.mark.parametrize(
    "kind, place",
    [
        ("kill", "train"),
        ("stall", "train"),
        ("freeze", "hessians"),
        ("raise", "quantize"),
        ("hang", "ttt"),
    ],
)
def test_a_rank_of_two_gpus_that_dies_or_stalls_ends_both(world, kind, place):
    tell(
        f"NCCL: {kind} {place} rank 1:"
        f" {check_rank_fault(world, faults, kind, place, 1, **HERE | PLAIN):.1f} s"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("settings", [PLAIN, OURS], ids=["plain", "kernels"])
def test_what_two_deterministic_runs_on_a_gpu_share(world, settings):
    """Tells what differs.

    The losses must be those of one training, whatever the order in which a kernel adds.
    """
    for run in ("one", "two"):
        process = faults.start(world, 1, DETERMINISTIC="1", RUN_ID=run, **HERE | settings)
        assert faults.end(process, 240) == 0, output(world)[-4000:]
    one, two = (comparable(world, run) for run in ("one", "two"))
    files = [(world / "runs" / run / "artifact.bin").read_bytes() for run in ("one", "two")]
    tell(
        f"DETERMINISTIC=1 on {one['device']}, attention {one['attention']}, mlp {one['mlp']}:"
        f" differing fields: {sorted(key for key in one if one[key] != two[key]) or 'none'}, losses"
        f" {loss_lines(world, 'one') == loss_lines(world, 'two')}, artifacts {files[0] == files[1]}"
        " (equal?)"
    )
    assert one["train_loss"] == pytest.approx(two["train_loss"], abs=0.02)
    for name, score in one["scores"].items():
        assert score["bpb"] == pytest.approx(two["scores"][name]["bpb"], rel=0.01)
