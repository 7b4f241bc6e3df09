"""Fixtures shared by all tests: a tiny configuration, a tiny dataset, one process without a process
group.
"""

import contextlib
import functools
import importlib.util
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# as a shell starts what it sends to the background
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # programs that a test interrupts inherit what is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    # kernels run on the CPU; must be set before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import presets.published  # noqa: E402
import train_gpt  # noqa: E402
from tools.run_files import script_of  # noqa: E402

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "data" / "golden"))
# Seconds that tests wait for what must end by itself: a subprocess, another rank, a thread. The
# longest takes a minute on a quiet machine; a loaded one may need many times that, and only a hang
# should fail.
PATIENCE = float(os.environ.get("PATIENCE", 1800))
# What a subprocess gets of this environment: none of our settings, but what picks the arithmetic of
# a CPU, or else its numbers could not be compared with this process's.
HERE = {
    key: os.environ[key]
    for key in (
        "PATH",
        "HOME",
        "LD_LIBRARY_PATH",
        "ATEN_CPU_CAPABILITY",
        "ONEDNN_MAX_CPU_ISA",
        "MKL_CBWR",
        "OPENBLAS_CORETYPE",
    )
    if key in os.environ
}
# Tests that take long and seldom find what others do not: `make soak` runs them.
IN_SOAK = pytest.mark.skipif(not os.environ.get("SOAK"), reason="takes long; make soak runs it")
TINY = {
    "vocab_size": 97,
    "marker_fusion_enabled": 0,  # the documents of most tests have no tokenizer
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 2.0,
    "rope_dims": 4,
    "train_batch_tokens": 256,
    "micro_batch_tokens": 128,
    "train_seq_len": 32,
    "eval_seq_len": 32,
    "max_wallclock_seconds": 0.0,
    "iterations": 4,
    "warmup_steps": 1,
    "gptq_calibration_batches": 4,
    "compressor": "brotli",
    "ttt_eval_seq_len": 32,
    "ttt_stale_context": 0,
    "ttt_chunk_size": 8,
    "ttt_batch_size": 4,
    "ttt_lanes": 2,
    "ttt_lora_rank": 4,
    "phased_ttt_prefix_docs": 20_000,
    "global_ttt_chunk_tokens": 128,
    "train_log_every": 1,
    "device": "cpu",
}


def tiny_hp(**changes):
    """Hyperparameters of a model that trains in milliseconds; keyword arguments override."""
    return train_gpt.Hyperparameters(**(TINY | changes))


@functools.cache
def load_script(path):
    """A script of this repository as a module, by its path from the root.

    For folders that carry the name of a common package and are none themselves, so that what needs
    that package finds it: tokenizers, data.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tell(line):
    """A figure for the log of `make soak`: of pytest's workers, this stream alone gets there."""
    print(line, file=sys.stderr, flush=True)


class Lines(list):
    """Stands in for RunLog and its guard: keeps the lines, and what the live line was told as
    (share, detail).

    No stage has run.
    """

    def __init__(self):
        self.shares, self.seconds = [], {}
        self.guard = self

    def __call__(self, line):
        self.append(line)

    def quantized(self, arrays):
        self.arrays = arrays

    def show(self, share, detail=""):
        self.shares.append((share, detail))


def write_shard(path, values):
    """A shard file as docs/DATA.md describes it, written independently of the code under
    test.
    """
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(values)
    path.write_bytes(header.tobytes() + np.asarray(values, dtype="<u2").tobytes())


@contextlib.contextmanager
def files_at_most(more):
    """Inside, this process may open this many files more than it holds, as under `ulimit -n`."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # a number below the limit is free where an earlier file was closed
    highest = max(map(int, os.listdir("/proc/self/fd")))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    while taken[-1] <= highest:
        taken.append(os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + more + 1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in taken:
            os.close(number)


def write_documents(folder, split, lengths, vocab_size=97, seed=0, shard_sizes=None):
    """Documents of the given lengths (tokens after BOS) as shards, side-cars for "val".

    -> tokens, bytes of the stream.

    Tokens follow a noisy cycle, so that there is something to learn. `shard_sizes` cuts the stream
    anywhere.
    """
    rng = np.random.default_rng(seed)
    tokens = []
    for length in lengths:
        walk = 8 + (rng.integers(80) + np.cumsum(rng.choice([1, 1, 1, 2], length))) % (
            vocab_size - 8
        )
        tokens += [train_gpt.BOS_ID, *walk.tolist()]
    tokens = np.array(tokens)
    charges = np.where(tokens == train_gpt.BOS_ID, 0, rng.integers(0, 6, len(tokens)))
    borders = np.cumsum([0, *(shard_sizes or [len(tokens)])])
    for number, (first, last) in enumerate(zip(borders, borders[1:], strict=False)):
        write_shard(folder / f"fineweb_{split}_{number:06d}.bin", tokens[first:last])
        if split == "val":
            write_shard(folder / f"fineweb_val_bytes_{number:06d}.bin", charges[first:last])
    return tokens, charges


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Folder with about 8,000 training tokens and 12 validation documents, tails and one-token
    documents among them.
    """
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(7)
    write_documents(folder, "train", rng.integers(3, 120, 130), seed=1)
    write_documents(
        folder, "val", [90, 33, 1, 8, 0, 64, 7, 31, 32, 17, 100, 1], seed=2, shard_sizes=[150, 246]
    )
    return folder


def install_published(monkeypatch):
    """Puts the parts of presets/published.py in the place of train_gpt.py's until the test ends."""
    for name, part in presets.published.PARTS.items():
        monkeypatch.setattr(train_gpt, name, part)


def install_parts_for(settings, monkeypatch):
    """install_published where {name: value} are not settings of train_gpt.py alone."""
    settings = {name.upper(): value for name, value in settings.items()}
    if script_of(settings).name == "published.py":
        install_published(monkeypatch)


@pytest.fixture
def published(monkeypatch):
    """presets/published.py, installed."""
    install_published(monkeypatch)
    return presets.published


@pytest.fixture
def dist():
    """One process on the CPU."""
    return train_gpt.Dist("cpu")


@pytest.fixture
def ops():
    """The PyTorch references of every operation."""
    return train_gpt.select_ops(tiny_hp(), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def golden():
    """golden("model") -> {key: tensor} of GOLDEN_DIR/model.npz."""

    def load(name):
        with np.load(GOLDEN_DIR / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays}

    return load


@pytest.fixture
def rel():
    """Relative Frobenius error of two tensors."""
    return lambda got, want: (
        (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    ).item()
