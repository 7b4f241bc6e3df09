"""benchmarks/bench_average.py: each average of one training is that of a run with its span."""

import re

import pytest
import torch
from run_helpers import ROOT, finish, make_data, start


def test_each_average_is_that_of_a_run_with_this_span(tmp_path):
    make_data(tmp_path)
    runs = tmp_path / "runs"
    settings = {"DATA_PATH": str(tmp_path), "RUNS_DIR": str(runs), "PREQUANT_ONLY": "1"}
    # 0.3, because the ramp of the decay makes longer spans equal in so few steps
    several = start(
        ROOT / "benchmarks/bench_average.py", "0.1", "0.3", RUN_ID="several", **settings
    )
    other = start(ROOT / "train_gpt.py", RUN_ID="other", EMA_SPAN="0.3", **settings)
    usual = start(ROOT / "train_gpt.py", RUN_ID="usual", **settings)
    outputs = {}
    for name, process in {"several": several, "other": other, "usual": usual}.items():
        code, outputs[name], error = finish(process)
        assert code == 0, error

    def weights(run, file="model.pt"):
        return torch.load(runs / run / file, weights_only=True)["weights"]

    for run, file in {"other": "model_0.3.pt", "usual": "model.pt"}.items():
        one = weights(run)
        same = weights("several", file)
        assert all(torch.equal(one[name], same[name]) for name in one)
    of_other = re.findall(r"^prequant (val_loss.*)", outputs["other"], re.M)
    assert re.findall(r"^span_0.3 (val_loss.*)", outputs["several"], re.M) == of_other
    of_usual = re.findall(r"^prequant (val_loss.*)", outputs["usual"], re.M)
    assert re.findall(r"^prequant (val_loss.*)", outputs["several"], re.M) == of_usual
    assert of_usual != of_other
    how_to_go_on = re.search(r"QUANT_ONLY=1 continues from it: (.*)", outputs["several"])[1]
    assert how_to_go_on.endswith(f"python {ROOT / 'train_gpt.py'}")
    kept = torch.load(runs / "several" / "model_0.1.pt", weights_only=True)
    assert kept["settings"]["ema_span"] == 0.1


@pytest.mark.parametrize("span", ["0", "1.5", "-0.1", "nan", "x"])
def test_a_span_that_is_no_share_is_refused_before_the_run(tmp_path, span):
    runs = tmp_path / "runs"
    command = ROOT / "benchmarks/bench_average.py", "--", span
    code, _, error = finish(start(*command, RUNS_DIR=str(runs), RUN_ID="bad"))
    assert code == 2 and f"invalid share value: '{span}'" in error
    assert not runs.exists()


def test_it_refuses_to_resume():
    code, _, error = finish(start(ROOT / "benchmarks/bench_average.py", "0.1", RESUME="1"))
    assert code == 2 and "RESUME does not go with several averages" in error
