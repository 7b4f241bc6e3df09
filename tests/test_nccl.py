"""Two GPUs over NCCL, under torchrun: the whole pipeline, and what is promised where a rank dies or stalls.

python -m pytest -m gpu -s tests/test_nccl.py    # about three minutes, no network; skipped with fewer than two GPUs
"""

import os

import faults
import pytest
import torch
from conftest import tell
from test_reliability import check_rank_fault, comparable, output, tidy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
GPU = {"DEVICE": "cuda", "COMPILE": "0", "KERNELS": "0", "ATTENTION_BACKEND": "sdpa", "MODEL_DIM": "64"}
GPU |= {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH") if name in os.environ}


@pytest.fixture
def world(tmp_path):
    faults.make_data(tmp_path / "data")
    return tmp_path


def test_two_gpus_run_the_whole_pipeline(world):
    process = faults.start(world, 2, **GPU)
    assert faults.end(process, 240) == 0, output(world)[-4000:]
    result = comparable(world)
    assert result["world_size"] == 2 and not result["device"].startswith("cpu")
    assert set(result["scores"]) == {"prequant", "quantized", "ttt"} and result["artifact_bytes"] > 0
    tidy(world, process)


@pytest.mark.parametrize("kind, place", [
    ("kill", "train"), ("stall", "train"), ("freeze", "hessians"), ("raise", "quantize"), ("hang", "ttt"),
])
def test_a_rank_of_two_gpus_that_dies_or_stalls_ends_both(world, kind, place):
    tell(f"NCCL: {kind} {place} rank 1: {check_rank_fault(world, faults, kind, place, 1, **GPU):.1f} s")
