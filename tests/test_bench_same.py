"""benchmarks/bench_same.py: runs of variants and seeds, what counts as the same, and two real runs
of a tiny model.
"""

import os
import subprocess
import sys

import pytest
from conftest import IN_SOAK, write_documents

from benchmarks import bench_same

FAKE = """
import json, os, pathlib, sys
if "BROKEN" in os.environ:
    sys.exit("no\\nmemory")
folder = pathlib.Path(os.environ["RUNS_DIR"], os.environ["RUN_ID"])
folder.mkdir(parents=True)
loss = 3 + 0.1 * int(os.environ["SEED"]) + float(os.environ.get("SHIFT", 0)) + ("other" in os.getcwd())
result = json.dumps({"seed": int(os.environ["SEED"]), "scores": {"prequant": {"loss": loss}}})
steps = [f"step:{i} train_loss:{loss + i:.4f}" for i in range(int(os.environ["ITERATIONS"]))]
lines = ["settings (* changed):", *steps]
(folder / "log.txt").write_text("\\n".join([*lines, "RESULT " + result]) + "\\n")
(folder / "result.json").write_text(result)
"""


def bench(tmp_path, *arguments):
    (tmp_path / "fake.py").write_text(FAKE)
    bench_same.main(
        [
            *arguments,
            "--script",
            str(tmp_path / "fake.py"),
            "--runs",
            str(tmp_path / "runs"),
            "--seeds",
            "1,2",
            "--steps",
            "4",
        ]
    )


def test_variants_are_compared_with_the_spread_of_seeds(tmp_path, capsys):
    bench(tmp_path, "", "SHIFT=0.05")
    told = capsys.readouterr().out
    assert (
        "default, seed 1: first losses 3.1000 4.1000 5.1000 6.1000, last 6.1000, validation 3.1000"
        " nats" in told
    )
    assert "between seeds of default: training 0.10000, validation 0.10000 nats" in told
    assert (
        "SHIFT=0.05 against default, seed 2: training 0.05000, validation 0.05000 nats: within"
        in told
    )
    with pytest.raises(SystemExit) as ended:
        bench(tmp_path, "", "SHIFT=-0.2")
    assert ended.value.code == 1 and "validation 0.20000 nats: BEYOND" in capsys.readouterr().out


def test_a_variant_may_be_another_checkout(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit):
        bench(tmp_path, "SHIFT=0.5", f"TREE={tmp_path / 'other'} SHIFT=0.5")
    assert "seed 1: training 1.00000, validation 1.00000 nats: BEYOND" in capsys.readouterr().out


def test_a_run_that_fails_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"BROKEN=1, seed 1: exit code 1: no \| memory"):
        bench(tmp_path, "", "BROKEN=1")
    with pytest.raises(SystemExit) as ended:
        bench_same.main(["", "--seeds", "1"])
    assert ended.value.code == 2


@IN_SOAK
def test_logs_of_real_runs_are_read(tmp_path):
    write_documents(tmp_path, "train", [29, 40, 90, 7, 200, 64, 33] * 6, seed=1)
    write_documents(tmp_path, "val", [50, 20], seed=2)
    small = [
        "MODEL_DIM=32",
        "NUM_HEADS=2",
        "NUM_KV_HEADS=1",
        "ROPE_DIMS=8",
        "MLP_MULT=2",
        "NUM_LAYERS=3",
        "LOOP_START=1",
        "LOOP_END=1",
        "NUM_LOOPS=1",
        "PARALLEL_START_LAYER=2",
        "TRAIN_SEQ_LEN=64",
        "EVAL_SEQ_LEN=64",
        "TTT_EVAL_SEQ_LEN=64",
        "TTT_STALE_CONTEXT=0",
        "TRAIN_BATCH_TOKENS=256",
        "MICRO_BATCH_TOKENS=256",
        "GPTQ_RESERVE_SECONDS=0",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/bench_same.py",
            "",
            "--steps",
            "3",
            "--runs",
            str(tmp_path / "runs"),
            "--set",
            *small,
        ],
        cwd=bench_same.ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"DATA_PATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stdout.count("3 steps\n") == 2
        and "between seeds of default: training 0.0" in done.stdout
    )
