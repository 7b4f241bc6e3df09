"""The contest's rules for a record, at their limits, on runs that are made up: nothing is trained."""

import math

import pytest

from tools import make_record
from tools.run_files import Run

SCORE = {"loss": 2.4, "bpb": 1.06, "tokens": 47_851_520, "bytes": 151_074_499}
RESULT = {
    "world_size": 8,
    "device": "NVIDIA H100 80GB HBM3",
    "commit": "abc1234",
    "steps": 4000,
    "total_bytes": 16_000_000,
    "training_seconds": 588.0,
    "seconds": {
        "hessians": 4.0,
        "quantize": 6.0,
        "quant_check": 2.0,
        "unpack": 20.0,
        "eval_quantized": 1e4,
        "eval_ttt": 580.0,
    },
    "scores": {"quantized": SCORE, "ttt": SCORE},
    "violations": [],
}


@pytest.fixture
def make_runs(tmp_path):
    """make_runs(n, artifact=bytes, last={key of RESULT: value}) -> n runs at every limit; `last` and
    the size of the artifact are those of the last run.
    """

    def make(count=3, artifact=15_966_000, script=34_000, last=None):
        runs = []
        for seed in range(count):
            is_last = seed == count - 1
            folder = tmp_path / f"run{seed}"
            folder.mkdir(exist_ok=True)
            sizes = {
                "artifact.bin": artifact if is_last else 15_966_000,
                "train_gpt.py": script if is_last else 34_000,
            }
            for name, size in sizes.items():
                (folder / name).write_bytes(b"")
                with open(folder / name, "r+b") as file:
                    file.truncate(size)  # without blocks on the disk
            line = "parameters:5 slots:[0] tokenizer:t.model validation documents:50000 tokens:9\n"
            (folder / "log.txt").write_text(line)
            result = RESULT | {"seed": seed} | ((last or {}) if is_last else {})
            runs.append(Run(folder, {}, (), [], [], [], [], result, 1))
        return runs

    return make


def test_runs_at_every_limit_make_a_record(make_runs):
    assert list(make_record.broken_rules(make_runs())) == []
    assert list(make_record.disagreements(make_runs())) == []


@pytest.mark.parametrize("sizes", [{"artifact": 15_966_001}, {"script": 34_001}], ids=str)
def test_one_byte_above_the_cap_makes_no_record(make_runs, sizes):
    runs = make_runs(last={"total_bytes": 16_000_001}, **sizes)
    assert list(make_record.broken_rules(runs)) == [
        "seed 2: 16,000,001 bytes, the cap is 16,000,000"
    ]


def test_the_bytes_on_disk_decide_not_those_of_the_result(make_runs):
    first, second = make_record.broken_rules(make_runs(artifact=15_966_001))
    assert "the files have 16,000,001 bytes, RESULT says 16,000,000" in first
    assert "the cap is" in second


@pytest.mark.parametrize("stage", ["hessians", "quantize", "quant_check", "unpack", "eval_ttt"])
def test_every_stage_under_a_clock_counts_and_so_does_what_is_no_number(make_runs, stage):
    for more, words in ((0.5, "took 600.5 s of 600"), (math.nan, "took nan s of 600")):
        seconds = RESULT["seconds"] | {stage: RESULT["seconds"][stage] + more}
        (sentence,) = make_record.broken_rules(make_runs(last={"seconds": seconds}))
        assert sentence.startswith("seed 2: ") and words in sentence


def test_the_seconds_of_training_count_and_so_does_what_is_no_number(make_runs):
    for seconds, words in ((588.5, "took 600.5 s of 600"), (math.nan, "took nan s of 600")):
        (sentence,) = make_record.broken_rules(make_runs(last={"training_seconds": seconds}))
        assert words in sentence


def test_two_seeds_are_too_few(make_runs):
    assert list(make_record.broken_rules(make_runs(2))) == ["2 seed(s); a record needs 3"]


def test_the_last_score_is_the_one_that_must_be_whole(make_runs):
    scores = {"quantized": SCORE, "ttt": SCORE | {"partial": True}}
    (sentence,) = make_record.broken_rules(make_runs(last={"scores": scores}))
    assert "only part of the validation documents" in sentence
    scores = {"quantized": SCORE, "ttt": SCORE | {"bytes": SCORE["bytes"] - 1}}
    (sentence,) = make_record.broken_rules(make_runs(last={"scores": scores}))
    assert sentence.startswith("tokens and bytes scored differ")


def test_runs_of_two_scripts_are_of_two_methods(make_runs):
    (sentence,) = make_record.disagreements(make_runs(script=33_999))
    assert "the runs' packed scripts differ" in sentence
