"""Every published system as a preset: its settings are taken, win over defaults and lose against
the environment.
"""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import install_parts_for
from preset_helpers import PUBLISHED, tiny

import train_gpt
from tools import guard, run_files
from tools.run_files import read_preset

pytest.importorskip("brotli")
pytest.importorskip("sentencepiece")
pytest.importorskip("python_minifier")

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


class Pieces:
    """A tokenizer of as many pieces as the tiny data have tokens: two bytes each, every third
    begins with a space.
    """

    vocab_size = staticmethod(lambda: 97)
    piece_to_id = staticmethod(lambda piece: 9)
    unk_id = staticmethod(lambda: 2)
    is_unknown = is_unused = is_byte = staticmethod(lambda token: False)
    is_control = staticmethod(lambda token: token < 3)
    id_to_piece = staticmethod(lambda token: "\u2581ab" if token % 3 == 0 else "ab")
    decode = encode = staticmethod(lambda tokens: tokens)  # the data are of its making


@pytest.fixture(scope="module")
def plain_data(tiny_data, tmp_path_factory):
    """tiny_data without its side-car, for systems without CaseOps."""
    folder = tmp_path_factory.mktemp("plain") / "data"
    return shutil.copytree(tiny_data, folder, ignore=shutil.ignore_patterns("fineweb_val_bytes_*"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_preset_runs_every_stage(tiny_data, plain_data, tmp_path, name, monkeypatch):
    # seconds of packing, tested elsewhere
    monkeypatch.setattr(train_gpt, "write_code", lambda *_: 1000)
    monkeypatch.setattr(train_gpt, "find_tokenizer", lambda hp: "none")
    monkeypatch.setattr(train_gpt, "load_tokenizer", lambda hp: Pieces)
    preset = read_preset(name)
    install_parts_for(preset, monkeypatch)
    caseops = preset.get("CASEOPS_ENABLED", "1") == "1"
    environ = tiny(name, tiny_data if caseops else plain_data, tmp_path)
    watching = guard.RunGuard()
    watching.dist = dist = train_gpt.Dist("cpu")
    result = train_gpt.run(train_gpt.Hyperparameters.from_env(environ, watching), dist, watching)
    stages = [
        "prequant",
        "quantized",
        *["sliding"] * (preset.get("SLIDING_WINDOW_ENABLED") == "1"),
        *["ttt"] * (preset["TTT_ENABLED"] == "1"),
    ]
    assert list(result["scores"]) == stages
    counts = {(score["tokens"], score["bytes"]) for score in result["scores"].values()}
    assert len(counts) == 1 and all(
        math.isfinite(score["loss"]) for score in result["scores"].values()
    )
    log = (tmp_path / name / "log.txt").read_text()
    table = dict(re.findall(r"^[* ] ([A-Z][A-Z0-9_]*)=(\S*)  # ", log, re.MULTILINE))
    kept = {key: value for key, value in preset.items() if key not in environ}
    assert len(kept) > 20 and all(same(table[key], value) for key, value in kept.items())
    assert f"preset {name}: " in log and f"MODEL_DIM=32 (preset {preset['MODEL_DIM']})" in log


def same(a, b):
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


def test_the_presets_are_those_of_the_documentation():
    text = (ROOT / "docs" / "PRESETS.md").read_text(encoding="utf-8")
    assert sorted(path.stem for path in (ROOT / "presets").glob("*.env")) == sorted(
        [*PUBLISHED, "demo"]
    )
    assert all(f"`{name}`" in text for name in PUBLISHED)


@pytest.mark.parametrize("name", [*PUBLISHED, "demo"])
def test_settings_of_a_preset_are_settings_and_the_environment_wins(name, monkeypatch):
    preset = read_preset(name)
    install_parts_for(preset, monkeypatch)
    hp = train_gpt.Hyperparameters.from_env({"PRESET": name}, guard.RunGuard())
    for key, value in preset.items():
        found = getattr(hp, key.lower())
        assert same(str(int(found) if isinstance(found, bool) else found), value), key
    environ = {"PRESET": name, "TRAIN_LOG_EVERY": "7", "SEED": "3", "BETA1": "0.8"}
    other = train_gpt.Hyperparameters.from_env(environ, guard.RunGuard())
    assert (other.train_log_every, other.seed, other.beta1) == (7, 3, 0.8)


@pytest.mark.parametrize("name", [*PUBLISHED, "demo"])
def test_a_preset_with_parts_is_refused_by_train_gpt_alone_with_the_command(name):
    script = run_files.script_of(read_preset(name))
    if script.name == "train_gpt.py":
        train_gpt.Hyperparameters.from_env({"PRESET": name}, guard.RunGuard())
        return
    with pytest.raises(train_gpt.SettingError, match=f"run presets/published.py {name}$"):
        train_gpt.Hyperparameters.from_env({"PRESET": name}, guard.RunGuard())


def test_an_unknown_preset_is_refused_with_the_names_there_are():
    with pytest.raises(
        train_gpt.SettingError, match="PRESET=pr1: there is no .*; there are: demo, pr1493"
    ):
        train_gpt.Hyperparameters.from_env({"PRESET": "pr1"}, guard.RunGuard())


@pytest.mark.parametrize("text", ["NOTHING", "SEED='1"])
def test_a_preset_that_cannot_be_read_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr(run_files, "PRESETS", tmp_path)
    (tmp_path / "mine.env").write_text(text)
    with pytest.raises(train_gpt.SettingError, match="PRESET=mine: .*mine.env is damaged: "):
        train_gpt.Hyperparameters.from_env({"PRESET": "mine"}, guard.RunGuard())
