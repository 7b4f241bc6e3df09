"""benchmarks/bench_presets.py: which run gets which GPU, data and settings.

The table; data without CaseOps.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import PATIENCE

import train_gpt
from benchmarks import bench_presets
from tools import prepare_plain_data
from tools.run_files import read_preset
from train_gpt import BOS_ID, TokenStream

WORDS = "the cat sat on a mat and Saw 17 dogs run far away from that old house of Wood\n\u00e9t\u00e9".split(
    " "
)
TEXTS = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(1, 90)) for i in range(80)]
FAKE = """
import json, os, pathlib, sys, time
name, folder = os.environ["PRESET"], pathlib.Path(os.environ["RUNS_DIR"], os.environ["RUN_ID"])
if name == "pr1938":
    sys.exit("out of\\nmemory")
folder.mkdir(parents=True)
time.sleep(0.5)
keys = "CUDA_VISIBLE_DEVICES DATA_PATH MAX_WALLCLOCK_SECONDS TTT_MAX_DOCS SEED".split()
scores = {stage: {"bpb": 1.25} for stage in ("prequant", "quantized", "ttt")}
(folder / "result.json").write_text(json.dumps({
    "scores": scores, "steps": 7, "tokens_per_second_by_loop_state": [1000, 900], "artifact_bytes": 15000000,
    "code_bytes": 26000, "seconds": {"train": 113.2}, "violations": ["too slow"], "device": "none",
    "commit": {key: os.environ.get(key) for key in keys}}))
sys.exit(3)
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with sp300, the data of a tokenizer of 300 pieces.

    Of 84 documents two are of validation.
    """
    folder = tmp_path_factory.mktemp("plain")
    for name, texts in (
        ("train", [*TEXTS, TEXTS[3], TEXTS[5]]),
        ("val", [TEXTS[3], "Two  spaces,\ttab"]),
    ):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    prepare_plain_data.main(
        [
            str(folder / "train.jsonl"),
            "--val-file",
            str(folder / "val.jsonl"),
            "--out",
            str(folder),
            "--vocab-sizes",
            "300",
        ]
    )
    return folder


def test_plain_data_count_the_bytes_of_their_text_and_keep_validation_out_of_training(
    plain, published
):
    hp = train_gpt.Hyperparameters(
        caseops_enabled=False, vocab_size=300, data_path=str(plain / "sp300")
    )
    validation, train = train_gpt.ValidationSet(hp), TokenStream(hp.data_path, "train")
    assert validation.bytes.sum() == sum(
        len(text.encode()) for text in (TEXTS[3], "Two  spaces,\ttab")
    )
    documents = (train.read(0, train.size) == BOS_ID).sum()
    assert documents == sum(text != TEXTS[3] for text in [*TEXTS, TEXTS[3], TEXTS[5]])


def bench(tmp_path, *arguments):
    (tmp_path / "fake.py").write_text(FAKE)
    out = tmp_path / "presets.json"
    code = 0
    try:
        bench_presets.main(
            [
                *arguments,
                "--script",
                str(tmp_path / "fake.py"),
                "--runs",
                str(tmp_path / "runs"),
                "--out",
                str(out),
            ]
        )
    except SystemExit as ended:
        code = ended.code
    return code, json.loads(out.read_text())


def test_runs_share_the_gpus_and_get_their_own_data_and_settings(tmp_path, capsys):
    (tmp_path / "plain" / "sp1024").mkdir(parents=True)
    names = ["pr1855", "pr960", "pr1493", "pr1938"]
    code, rows = bench(
        tmp_path,
        *names,
        "--gpus",
        "4,6",
        "--caseops",
        str(tmp_path),
        "--plain",
        str(tmp_path / "plain"),
        "--ttt-docs",
        "30",
        "--set",
        "SEED=5",
    )
    assert code == 1 and [row["preset"] for row in rows] == names
    assert rows[3]["fault"] == "exit code 1: out of | memory"
    told = [row["commit"] for row in rows[:3]]
    assert {about["CUDA_VISIBLE_DEVICES"] for about in told} == {"4", "6"}
    assert {(about["MAX_WALLCLOCK_SECONDS"], about["SEED"]) for about in told} == {("120", "5")}
    assert [about["DATA_PATH"] for about in told] == [
        str(tmp_path),
        str(tmp_path / "plain" / "sp1024"),
        str(tmp_path / "plain"),
    ]
    assert [about["TTT_MAX_DOCS"] for about in told] == ["30", None, None]
    text = capsys.readouterr().out
    assert (
        "| `pr960` | 7 | 1,000, 900 | 1.2500 | 1.2500 | - | 1.2500 | 15,000,000 | 26,000 | train"
        " 113 |" in text
    )
    assert "pr960: too slow" in text
    stamp = (tmp_path / "runs" / "pr960" / "result.json").stat().st_mtime_ns
    code, rows = bench(tmp_path, "pr960", "pr1855", "pr1787")
    assert code == 1 and rows[2]["fault"] == "needs --caseops" and rows[0]["steps"] == 7
    # not run again
    assert (tmp_path / "runs" / "pr960" / "result.json").stat().st_mtime_ns == stamp


SMALL = {
    "NUM_LAYERS": 3,
    "MODEL_DIM": 32,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "ROPE_DIMS": 4,
    "PARALLEL_START_LAYER": 3,
    "XSA_LAST_N": 2,
    "VALUE_EMBED_LAYERS": "1,2",
    "TRAIN_BATCH_TOKENS": 512,
    "MICRO_BATCH_TOKENS": 256,
    "TRAIN_SEQ_LEN": 32,
    "EVAL_SEQ_LEN": 32,
    "EVAL_STRIDE": 24,
    "VOCAB_SIZE": 300,
    "BIGRAM_VOCAB_SIZE": 31,
    "GLOBAL_TTT_CHUNK_TOKENS": 64,
    "WARMUP_STEPS": 1,
    "GPTQ_CALIBRATION_BATCHES": 2,
    "GPTQ_RESERVE_SECONDS": 1,
    "DEVICE": "cpu",
    "OMP_NUM_THREADS": 1,
}


@pytest.mark.skipif(not os.environ.get("SOAK"), reason="two minutes; make soak runs it")
def test_presets_without_caseops_run_from_documents_to_the_table(plain, tmp_path):
    pytest.importorskip("python_minifier")
    script = [
        sys.executable,
        "benchmarks/bench_presets.py",
        "pr960",
        "pr1512",
        "--plain",
        str(plain),
        "--seconds",
        "4",
        "--gpus",
        "0,1",
        "--runs",
        str(tmp_path),
        "--out",
        str(tmp_path / "out.json"),
        "--set",
        *(f"{name}={value}" for name, value in SMALL.items()),
    ]
    done = subprocess.run(
        script, cwd=bench_presets.ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = json.loads((tmp_path / "out.json").read_text())
    assert (
        list(first["bpb"]) == ["prequant", "quantized", "sliding", "ttt"]
        and list(second["bpb"])[-1] == "sliding"
    )
    assert first["steps"] > 5 and read_preset("pr960")["TTT_METHOD"] == "sgd"
