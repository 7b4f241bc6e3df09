"""benchmarks/trials.py: each trial changes what it says, and none changes nothing."""

import subprocess
import sys

import pytest
import torch
from run_helpers import ROOT, make_data, result_of, start

import train_gpt
from benchmarks import trials


def test_a_run_without_trials_is_train_gpts(tmp_path):
    make_data(tmp_path)
    settings = {"DATA_PATH": str(tmp_path), "RUNS_DIR": str(tmp_path), "PREQUANT_ONLY": "1"}
    scores, violations = {}, {}
    for names in ("", "wdend,cautious"):
        run = start(
            ROOT / "benchmarks/trials.py", TRIALS=names, RUN_ID=f"t{len(names)}", **settings
        )
        result = result_of(run)
        scores[names], violations[names] = result["scores"], result["violations"]
    usual = start(ROOT / "train_gpt.py", RUN_ID="usual", **settings)
    assert scores[""] == result_of(usual)["scores"] != scores["wdend,cautious"]
    said = ["TRIALS=wdend,cautious are not in the packed script"]
    assert violations == {"": [], "wdend,cautious": said}


def test_unknown_trials_are_refused():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/trials.py"],
        env={"TRIALS": "wdend,worse"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("TRIALS: no worse; there are wdend, cautious\n")


def test_trials_must_be_named_so_that_no_continued_run_loses_them():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/trials.py"], env={}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.endswith("TRIALS must be set; there are wdend, cautious\n")


def test_decay_falls_to_zero(monkeypatch):
    monkeypatch.setattr(train_gpt, "decay_multiplier", train_gpt.decay_multiplier)
    trials.wdend()
    assert [train_gpt.decay_multiplier(p, None) for p in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]


@pytest.mark.parametrize("outward", [1.0, 0.5])
def test_cautious_decay_spares_weights_that_the_step_lets_grow(monkeypatch, outward):
    monkeypatch.setattr(train_gpt, "step_matrices", train_gpt.step_matrices)
    plain = train_gpt.step_matrices
    trials.cautious()
    torch.manual_seed(0)
    bank = torch.randn(2, 5, 7)
    update = torch.randn(2, 5, 7)
    wanted = bank.clone()
    plain(wanted, update, 0.01, 0.0, outward)
    wanted = torch.where(update * bank > 0, wanted * 0.9, wanted)
    train_gpt.step_matrices(bank, update, 0.01, 0.1, outward)
    assert torch.allclose(bank, wanted)
