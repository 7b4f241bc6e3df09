"""Runs that the tools did not expect: damaged, of an older version, of different commits, with
scores of NaN.
"""

import fnmatch
import json
import math
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from run_helpers import ROOT
from run_maker import make_result, make_run

import train_gpt

pytest.importorskip("python_minifier")
pytest.importorskip("scipy")
pytest.importorskip("huggingface_hub")

from tools import make_record, pack_code, plot_run, publish, run_files, summarize  # noqa: E402
from tools.run_files import RunError, read_run, read_runs  # noqa: E402


def with_result(folder, text):
    """A run whose log ends with another RESULT -> its folder."""
    lines = (make_run(folder) / "log.txt").read_text().splitlines()
    (folder / "log.txt").write_text("\n".join([*lines[:-1], f"RESULT {text}"]) + "\n")
    return folder


def test_the_version_is_that_of_the_trainer():
    assert run_files.RESULT_VERSION == train_gpt.RESULT_VERSION


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"seed": 1, "scores": {"ttt"', "RESULT is damaged: "),
        ("[1]", "RESULT is damaged: it is no object"),
        ("", "RESULT is damaged: "),
        (json.dumps(make_result("run", 1, version=1)), "RESULT is of version 1, these tools"),
        (json.dumps(make_result("run", 1, seconds=[1])), "RESULT is damaged: seconds is no object"),
        (
            json.dumps(make_result("run", 1, scores={"ttt": 1.0})),
            "RESULT is damaged: the ttt score has no numbers",
        ),
    ],
)
def test_a_damaged_result_names_the_run(tmp_path, text, words):
    with pytest.raises(RunError, match="log.txt: ") as error:
        read_run(with_result(tmp_path / "run", text))
    assert str(error.value).startswith(f"{tmp_path / 'run' / 'log.txt'}: {words}")


def test_a_key_that_is_missing_anywhere_in_result_or_settings_names_the_run(tmp_path):
    run = read_run(make_run(tmp_path / "run", without=["world_size"]))
    for look in (
        lambda: run.result["world_size"],
        lambda: run.result["scores"]["ttt"]["documents"],
        lambda: run.settings["NEW_SETTING"],
        lambda: run.steps[0]["new_column"],
    ):
        with pytest.raises(
            RunError, match="run/log.txt: .* has no (world_size|documents|NEW_SETTING|new_column)"
        ):
            look()
    assert run.result.get("world_size") is None and "world_size" not in run.result


def test_a_log_of_other_bytes_is_read(tmp_path):
    path = make_run(tmp_path / "run") / "log.txt"
    path.write_bytes(b"\xff\xfe odd bytes of a library\n" + path.read_bytes())
    assert read_run(path.parent).seed == 1


def test_a_set_in_a_folder_with_brackets_is_found(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / "a [1] set*" / f"run-seed{seed}", seed)
    assert [run.seed for run in read_runs([tmp_path / "a [1] set*"])] == [1, 2]


@pytest.mark.parametrize("key", sorted(make_result("run", 1)))
@pytest.mark.parametrize("name", ["summarize.py", "plot_run.py", "make_record.py"])
def test_no_missing_key_ends_in_a_traceback(tmp_path, name, key):
    module = {"summarize.py": summarize, "plot_run.py": plot_run, "make_record.py": make_record}[
        name
    ]
    folder = make_run(tmp_path / "run", without=[key])
    words = (
        ["--name", "x", "--author", "A", "--records", str(tmp_path / "records")]
        if name == "make_record.py"
        else []
    )
    try:
        module.main([str(folder), *words])
    except SystemExit as error:
        assert isinstance(error.code, str) and error.code.startswith(f"{name}: ")


# ---- what is not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_shown_and_neither_compared_nor_drawn(
    tmp_path, capsys, value
):
    scores = make_result("b", 2)["scores"]
    scores["ttt"] = scores["ttt"] | {"loss": value, "bpb": value}
    for seed, changes in ((1, {}), (2, {"scores": scores}), (3, {})):
        make_run(tmp_path / "set" / f"seed{seed}", seed, **changes)
    summarize.main([str(tmp_path / "set")])
    row = next(
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("scores.ttt.bpb")
    )
    assert row == ["scores.ttt.bpb", "1.06100", str(value), "1.06300", str(value), "nan"]
    with pytest.raises(
        SystemExit,
        match=f"summarize.py: seed2: its ttt loss is {value}, which compares with nothing",
    ):
        summarize.main([str(tmp_path / "set"), "--published", "1.1"])
    plot_run.main([str(tmp_path / "set")])
    shown = capsys.readouterr()
    assert "plots: none" in shown.out and f"seed2: scores.ttt.loss is {value}" in shown.err
    with pytest.raises(SystemExit, match="make_record.py: "):
        make_record.main(
            [str(tmp_path / "set"), "--name", "x", "--author", "A", "--records", str(tmp_path)]
        )


def test_one_loss_that_is_not_finite_is_named(tmp_path, capsys):
    plot_run.main([str(make_run(tmp_path / "run", losses=(4.0, math.nan)))])
    assert "run: train_loss is nan" in capsys.readouterr().err


# ---- pictures


def test_a_damaged_artifact_keeps_away_its_own_picture_only(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    (folder / "artifact.bin").write_bytes(b"GLF2 and no more")
    plot_run.main([str(folder)])
    assert sorted(path.name for path in folder.glob("*.png")) == ["stages.png", "training.png"]
    assert (
        f"plot_run.py: no bytes.png: {folder / 'artifact.bin'} cannot be read: "
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("folder, words", [("none", "no log.txt"), ("run", "has no warm_up")])
def test_the_picture_of_the_pipeline_says_in_one_line_what_it_lacks(tmp_path, folder, words):
    make_run(tmp_path / "run")
    command = [sys.executable, "docs/draw_pipeline.py", str(tmp_path / folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and words in ended.stderr
    assert ended.stderr.startswith("draw_pipeline.py: ") and ended.stderr.count("\n") == 1


def test_every_seed_of_many_is_drawn(tmp_path, monkeypatch):
    for seed in range(12):
        make_run(tmp_path / "set" / f"seed{seed}", seed)
    figures = []
    monkeypatch.setattr(plot_run.plt, "close", figures.append)
    plot_run.plot_training(read_runs([tmp_path / "set"]), tmp_path / "training.png")
    schedule = figures[0].axes[2]
    assert len(schedule.lines) == 12


def test_losses_of_every_step_are_a_thin_line_and_their_moving_mean(tmp_path, monkeypatch):
    run = read_run(make_run(tmp_path / "run"))
    steps = run.result["steps"]
    np.save(run.folder / "losses.npy", np.linspace(5, 3, steps + 7))  # a resumed run may have more
    figures = []
    monkeypatch.setattr(plot_run.plt, "close", figures.append)
    plot_run.plot_training([run], tmp_path / "training.png")
    every, mean = figures[0].axes[0].lines[:2]
    assert len(every.get_xdata()) == steps and every.get_linewidth() < mean.get_linewidth()
    assert every.get_xdata()[-1] == mean.get_xdata()[-1] == run.steps[-1]["train_seconds"]
    width = steps - len(mean.get_xdata()) + 1
    assert mean.get_ydata()[0] == pytest.approx(every.get_ydata()[:width].mean())
    assert mean.get_ydata()[-1] == pytest.approx(every.get_ydata()[-width:].mean())


def test_the_legend_names_the_line_of_steps_and_their_mean(tmp_path, monkeypatch):
    runs = [read_run(make_run(tmp_path / f"seed{seed}", seed)) for seed in (1, 2)]
    for run in runs:
        np.save(run.folder / "losses.npy", np.linspace(5, 3, run.result["steps"]))
    figures = []
    monkeypatch.setattr(plot_run.plt, "close", figures.append)
    plot_run.plot_training(runs, tmp_path / "training.png")
    legend = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert legend == [
        "training, each step",
        "mean of 40 steps, seed 1, 4,000 steps, 590 s",
        "mean of 40 steps, seed 2, 4,000 steps, 590 s",
    ]


def ttt_lines(*rows):
    """Lines of a log about batches of test-time training: (tokens, BPB so far)."""
    return [
        f"ttt_batch phase:1/1 documents:0 running_tokens:{tokens} running_bpb:{bpb}"
        for tokens, bpb in rows
    ]


def test_batches_before_the_first_score_do_not_stretch_the_axis_of_test_time_training(
    tmp_path, monkeypatch
):
    folder = make_run(tmp_path / "run")
    log = folder / "log.txt"
    text = log.read_text()
    rows = ttt_lines((0, 0.0), (400, 1.03), (900, 1.05), (1000, 1.06))
    log.write_text(text.replace("RESULT", "\n".join([*rows, "RESULT"])))
    figures = []
    monkeypatch.setattr(plot_run.plt, "close", figures.append)
    plot_run.plot_ttt([read_run(folder)], tmp_path / "ttt.png")
    [axis] = figures[0].axes
    assert list(axis.lines[0].get_ydata()) == [1.03, 1.05, 1.06]
    assert 1.02 < axis.get_ylim()[0] < 1.03
    log.write_text(text.replace("RESULT", "\n".join([rows[0], "RESULT"])))
    assert "ttt.png" not in plot_run.pictures_of([read_run(folder)])


def test_bytes_are_drawn_against_the_cap(tmp_path, monkeypatch):
    """A line at the cap; where groups share a section, the entropy of the codes stands for each."""
    groups = {"embedding": 70, "up": 25, "rest": 5}
    run = read_run(make_run(tmp_path / "run", group_bytes=groups))
    figures = []
    monkeypatch.setattr(plot_run.plt, "close", figures.append)
    tables = {"embedding": 100, "up": 40, "scales of rows": 4}, {"all tensors": 98, "header": 2}
    monkeypatch.setattr(plot_run, "bytes_by_group", lambda path: tables)
    plot_run.plot_bytes([run], tmp_path / "bytes.png")
    whole, groups = figures[0].axes
    assert list(whole.lines[0].get_xdata()) == [16_000_000, 16_000_000]
    assert whole.patches[0].get_width() == run.result["total_bytes"]
    words = [text.get_text().strip() for text in groups.texts]
    assert words[3:] == ["about 70  of 100", "about 25  of 40", "stored together  of 4"]


def test_the_quantization_check_counts_to_the_training_budget(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    (_, _, stages), *_ = plot_run.budgets(run)
    assert dict(stages) == {"training": 590.0, "hessians": 3.0, "quantize": 2.0, "quant_check": 0.5}


# ---- the table


def test_runs_that_are_no_seeds_of_one_method_are_told(tmp_path, capsys):
    make_run(tmp_path / "set" / "a", 1)
    make_run(
        tmp_path / "set" / "b",
        2,
        commit="fff0000",
        settings={"MATRIX_LR": "0.03", "DATA_PATH": "elsewhere"},
    )
    summarize.main([str(tmp_path / "set")])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    same = "differs, so that the mean is of no one method"
    assert notes == [
        f"note: commit {same}: abc1234 (seed 1); fff0000 (seed 2)",
        f"note: MATRIX_LR {same}: 0.02 (seed 1); 0.03 (seed 2)",
    ]


def test_the_gap_of_each_seed_stands_in_the_table(tmp_path, capsys):
    make_run(tmp_path / "set" / "a", 1, leaked_documents=3)
    make_run(
        tmp_path / "set" / "b", 2, leaked_documents=3, violations=["quantization adds 0.5 nats"]
    )
    summarize.main([str(tmp_path / "set")])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["quant_check.gap"][:2] == ["0.00410", "0.00420"] and rows["leaked_documents"][
        :2
    ] == ["3", "3"]
    assert rows["quant_check.tried"][:2] == ["1", "1"]
    assert "violation, seed 2: quantization adds 0.5 nats" in lines


# ---- what publish.py prints and uploads


def test_commands_that_go_on_from_a_run_can_be_pasted(tmp_path):
    folder = make_run(
        tmp_path / "my 'odd' [1] runs" / "run", settings={"PRESET": "a b", "MATRIX_LR": "0.03"}
    )
    (folder / "model.pt").write_bytes(b"")
    (command,) = publish.commands(read_run(folder))
    assert shlex.split(command) == [
        "QUANT_ONLY=1",
        f"CHECKPOINT_PATH={folder / 'model.pt'}",
        "PRESET=a b",
        "MATRIX_LR=0.03",
        "DATA_PATH=...",
        "python",
        "train_gpt.py",
    ]


def test_pictures_whose_names_have_brackets_are_uploaded(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "loss [1].png").write_bytes(b"")
    sent = []
    api = SimpleNamespace(
        create_repo=lambda *words, **options: None,
        upload_folder=lambda **options: (
            sent.append(options["allow_patterns"]) or SimpleNamespace(commit_url="")
        ),
    )
    publish.upload(api, folder, "me/golf", True)
    names = ["log.txt", "result.json", "loss [1].png"]
    assert [
        name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in sent[0])
    ] == []


def test_the_packer_and_the_tools_agree_on_what_belongs_to_one_run():
    settings = {name.upper() for name in train_gpt.Hyperparameters.__dataclass_fields__}
    assert {name.upper() for name in pack_code.OF_A_RUN} == run_files.OF_A_RUN
    assert run_files.OF_A_RUN <= settings
