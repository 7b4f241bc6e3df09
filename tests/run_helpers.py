"""Runs of the script in processes of their own, on tiny data and settings."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import HERE, PATIENCE, write_documents
from tiny_run import TINY_RUN

from tools import guard

ROOT = Path(__file__).resolve().parents[1]

SETTINGS = TINY_RUN | {
    "MODEL_DIM": "32",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "TRAIN_BATCH_TOKENS": "512",
    "ITERATIONS": "4",
    "TRAIN_LOG_EVERY": "2",
    "GPTQ_CALIBRATION_BATCHES": "4",
    "TTT_CHUNK_SIZE": "16",
    "TTT_LANES": "3",
    "TTT_LORA_RANK": "4",
}

LENGTHS = [60, 10, 0, 130, 25, 90, 40, 5, 1, 33]


def start(*command, **settings):
    """A run in a process of its own, with our settings and next to nothing else in its
    environment -> Popen.
    """
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=HERE | SETTINGS | settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    """(exit code, standard output, standard error); the process is ended if it hangs."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def result_of(process):
    """The RESULT dictionary of a run that must have ended well."""
    code, out, err = finish(process)
    assert code == 0, err
    lines = out.splitlines()
    assert (
        lines[-1].startswith("RESULT ") and sum(line.startswith("RESULT ") for line in lines) == 1
    )
    return json.loads(lines[-1].removeprefix("RESULT "))


def torchrun(ranks, script, **settings):
    return start(
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        script,
        **settings,
    )


def make_data(folder):
    write_documents(
        folder, "train", np.random.default_rng(3).integers(3, 150, 40), vocab_size=8192, seed=1
    )
    tokens, target_bytes = write_documents(
        folder, "val", LENGTHS, vocab_size=8192, seed=2, shard_sizes=[150, 500]
    )
    return len(tokens) - 1, int(target_bytes.sum())


class QuietGuard(guard.RunGuard):
    """It catches no signals: this process is not the run's own."""

    def start(self, dist):
        self.dist = dist
