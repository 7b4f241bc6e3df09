"""train_gpt.py alone: copied into an empty folder, and packed, it does what it does in its
repository.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import IN_SOAK
from run_helpers import SETTINGS, finish, make_data, result_of

import train_gpt

pytest.importorskip("brotli")
pytest.importorskip("sentencepiece")
pytest.importorskip("python_minifier")

from tools.pack_code import pack_code  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
HERE = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
# the default techniques: balanced rows, stale context, column steps, the entropy coder; plain sizes
TINY = SETTINGS | {"COMPRESSOR": "entropy", "PLOTS": "0"}


def start(folder, *command, **settings):
    """python -I in this folder, with next to nothing in its environment -> Popen."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-I", "-B", *map(str, command or ["train_gpt.py"])]
    return subprocess.Popen(
        command, cwd=folder, env=HERE | {"OMP_NUM_THREADS": "1"} | settings, text=True, **pipes
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of the checkout, of the copied file and of the packed script.

    Where the two files lie.
    """
    folder = tmp_path_factory.mktemp("world")
    (folder / "data").mkdir()
    make_data(folder / "data")
    for name in ("alone", "packed"):
        (folder / name).mkdir()
    shutil.copyfile(ROOT / "train_gpt.py", folder / "alone" / "train_gpt.py")
    common = TINY | {"DATA_PATH": str(folder / "data"), "RUNS_DIR": str(folder / "runs")}
    checkout = start(ROOT, RUN_ID="checkout", **common)
    alone = start(folder / "alone", RUN_ID="alone", **common)
    found = {"checkout": result_of(checkout)}
    shutil.copyfile(
        folder / "runs" / "checkout" / "train_gpt.py", folder / "packed" / "train_gpt.py"
    )
    # without its settings: they are its defaults now, but for paths
    paths = {name: common[name] for name in ("DATA_PATH", "RUNS_DIR", "TOKENIZER_PATH")}
    found["packed"] = result_of(start(folder / "packed", RUN_ID="packed", **paths))
    found["alone"] = result_of(alone)
    return folder, found


@pytest.fixture(scope="module", params=["alone", "packed"])
def place(world, request):
    """The folder of the copied file, and that of the packed one."""
    return world[0] / request.param


@pytest.fixture(scope="module", params=["alone", pytest.param("packed", marks=IN_SOAK)])
def folder(world, request):
    """The same; the packed one in the soak only."""
    return world[0] / request.param


# ---- a whole run

UNLIKE = {"run", "commit", "seconds", "training_seconds", "tokens_per_second_by_loop_state"}
UNLIKE |= {"code_bytes", "total_bytes"}


@pytest.mark.parametrize("name", ["alone", "packed"])
def test_result_and_artifact_are_those_of_the_checkout(world, name):
    folder, found = world
    wanted, got = dict(found["checkout"]), found[name]
    assert wanted.pop("group_bytes")  # the guard's
    assert wanted.keys() == got.keys() and list(got["scores"]) == ["prequant", "quantized", "ttt"]
    assert [key for key in wanted if key not in UNLIKE and wanted[key] != got[key]] == []
    artifacts = [
        (folder / "runs" / run / "artifact.bin").read_bytes() for run in ("checkout", name)
    ]
    assert artifacts[0] == artifacts[1]
    losses = [
        re.findall(
            r"^step:.* train_loss:(\S+)",
            (folder / "runs" / run / "log.txt").read_text(),
            re.MULTILINE,
        )
        for run in ("checkout", name)
    ]
    assert losses[0] == losses[1] != []


@pytest.mark.parametrize("name", ["alone", "packed"])
def test_the_file_alone_counts_itself_and_says_so(world, name):
    folder, found = world
    script = (folder / name / "train_gpt.py").read_bytes()
    assert (folder / "runs" / name / "train_gpt.py").read_bytes() == script
    assert found[name]["code_bytes"] == len(script)
    assert found[name]["total_bytes"] == found[name]["code_bytes"] + found[name]["artifact_bytes"]
    log = (folder / "runs" / name / "log.txt").read_text()
    (line,) = [line for line in log.splitlines() if "tools/guard.py" in line]
    assert (
        "no training states, no watchdog, no plots" in line
        and "code_bytes are those of this file" in line
    )
    assert "tools/guard.py" not in (folder / "runs" / "checkout" / "log.txt").read_text()


def test_the_packed_script_counts_what_the_checkout_counted(world):
    assert world[1]["packed"]["code_bytes"] == world[1]["checkout"]["code_bytes"]


# ---- --help


def table_of(text):
    """{NAME: (value, what is said of it)} of a table of settings."""
    rows = re.findall(r"^[* ] ([A-Z0-9_]+)=(.*?)  # (.+)$", text, re.MULTILINE)
    return {name: (value, about) for name, value, about in rows}


def test_help_is_complete(place, world):
    code, out, err = finish(start(place, "train_gpt.py", "--help"))
    assert code == 0, err
    wanted, shown = table_of(train_gpt.settings_table()), table_of(out)
    assert {name: about for name, (_, about) in shown.items()} == {
        name: about for name, (_, about) in wanted.items()
    }
    assert len(shown) == len(dataclasses.fields(train_gpt.Hyperparameters))
    if place.name == "packed":  # the settings of its run are its defaults
        of_a_run = {"RUN_ID", "RUNS_DIR", "DATA_PATH", "TOKENIZER_PATH", "PLOTS"}
        log = table_of((world[0] / "runs" / "checkout" / "log.txt").read_text())
        wanted = {name: wanted[name] if name in of_a_run else log[name] for name in wanted}
    assert {name: value for name, (value, _) in shown.items()} == {
        name: value for name, (value, _) in wanted.items()
    }


# ---- refusals

FIELDS = dataclasses.fields(train_gpt.Hyperparameters)
MISSPELT = {"TTT_LORA_RNAK": "3", "GPTQ_X": "1", "SEED": "x", "KERNELS": "yes", "NUM_LAYERS": "2.5"}
LEAST = {
    field.name.upper(): field.metadata["least"]
    for field in FIELDS
    if field.metadata.get("least") is not None
}
OUTSIDE = {name: str(least - 1) for name, least in LEAST.items()}
OUTSIDE |= {"MATRIX_LR": "-5", "DEVICE": "abacus", "ROPE_BASE": "nan"}
CANNOT_WORK = {
    "NUM_HEADS": "7",
    "NUM_KV_HEADS": "3",
    "ROPE_DIMS": "15",
    "LOOP_END": "11",
    "PARALLEL_START_LAYER": "12",
    "TRAIN_BATCH_TOKENS": "786433",
    "MAX_WALLCLOCK_SECONDS": "7",
    "GPTQ_RESERVE_SECONDS": "7",
    "TTT_STALE_CONTEXT": "3061",
    "TTT_LORA_SITES": "q,w",
    "PREQUANT_ONLY": "1",
    "QUANT_ONLY": "1",
    "RUN_ID": "../x",
    "RESUME": "1",
    "CHECKPOINT_PATH": "x",
    "ARTIFACT_PATH": "x",
}


@pytest.mark.parametrize(
    "wrong",
    [pytest.param(MISSPELT, marks=IN_SOAK), OUTSIDE, CANNOT_WORK],
    ids=["misspelt", "outside", "cannot work"],
)
def test_bad_settings_are_refused_with_the_messages_of_the_checkout(place, wrong):
    settings = TINY | wrong
    with pytest.raises(train_gpt.SettingError) as error:
        train_gpt.Hyperparameters.from_env(settings)
    assert len(str(error.value).splitlines()) >= min(5, len(wrong))
    code, out, err = finish(start(place, **settings))
    assert (code, out, err) == (1, "", f"train_gpt.py cannot run: {error.value}\n")


@pytest.mark.parametrize("seconds", [pytest.param("5", marks=IN_SOAK), "7"])
def test_a_wall_clock_at_or_below_the_reserve_is_refused(place, seconds):
    code, out, err = finish(start(place, MAX_WALLCLOCK_SECONDS=seconds))
    assert (code, out) == (
        1,
        "",
    ) and "GPTQ_RESERVE_SECONDS must be less than MAX_WALLCLOCK_SECONDS" in err


def test_a_preset_is_refused_with_the_reason(folder):
    code, out, err = finish(start(folder, PRESET="pr1512"))
    assert (code, out) == (1, "")
    assert err == "train_gpt.py cannot run: PRESET=pr1512 needs train_gpt.py in its repository\n"


def test_settings_of_published_systems_are_refused(folder):
    """The packed script refuses those whose first word is one of ours; it has no list of others."""
    code, out, err = finish(start(folder, BIGRAM_VOCAB_SIZE="99", TTT_METHOD="sgd"))
    assert (code, out) == (1, "")
    is_packed = folder.name == "packed"
    assert ("BIGRAM_VOCAB_SIZE is a setting of other scripts" in err) != is_packed
    assert "TTT_METHOD is not a setting" in err


def test_a_preset_that_needs_parts_is_refused_with_the_command():
    code, out, err = finish(start(ROOT, PRESET="pr1512"))
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "run presets/published.py pr1512" in err


def test_resuming_is_refused_with_the_reason(world):
    settings = TINY | {
        "DATA_PATH": str(world[0] / "data"),
        "RUNS_DIR": str(world[0] / "other"),
        "RUN_ID": "x",
    }
    code, out, err = finish(start(world[0] / "alone", RESUME="1", **settings))
    assert (code, out) == (
        1,
        "",
    ) and "RESUME and CHECKPOINT_EVERY need train_gpt.py in its repository" in err
    assert not (world[0] / "other").exists()


def test_a_finished_training_is_not_overwritten(place, world):
    """A second run with its RUN_ID would lose its model, artifact and result."""
    runs = world[0] / "runs"
    before = {path: path.read_bytes() for path in (runs / place.name).iterdir()}
    settings = TINY | {"DATA_PATH": str(world[0] / "data"), "RUNS_DIR": str(runs)}
    code, out, err = finish(start(place, RUN_ID=place.name, **settings))
    assert (code, out) == (1, "") and f"{runs / place.name} holds a finished training" in err
    assert "choose another RUN_ID, or go on with QUANT_ONLY=1" in err
    assert {path: path.read_bytes() for path in (runs / place.name).iterdir()} == before


def test_a_target_that_the_code_alone_fills_is_refused(folder, world):
    size = (folder / "train_gpt.py").stat().st_size
    paths = {"DATA_PATH": str(world[0] / "data"), "RUNS_DIR": str(world[0] / "other")}
    settings = TINY | paths | {"TARGET_BYTES": str(size)}
    code, out, err = finish(start(folder, **settings))
    assert (code, out) == (1, "")
    assert err == (
        "train_gpt.py cannot run: TARGET_BYTES must be 0, or above the size of train_gpt.py\n"
    )
    assert not (world[0] / "other").exists()


BLOCKED = """
import importlib.abc, runpy, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "brotli":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Block())
sys.argv = ["train_gpt.py"]
runpy.run_path("train_gpt.py", run_name="__main__")
"""


def test_a_missing_package_is_named(world):
    code, out, err = finish(start(world[0] / "alone", "-c", BLOCKED))
    assert (code, out) == (1, "") and err.endswith("No module named 'brotli'\n")


# ---- bugs are not refusals


@pytest.mark.parametrize(
    "function",
    ["def check_all(hp, dist, guard=NO_GUARD):", "def collect_hessians(model, loader, hp, dist):"],
)
def test_a_bug_ends_with_its_traceback(world, tmp_path, function):
    start_of_body = re.search(re.escape(function) + r'\n    """.*?"""\n', SOURCE, re.DOTALL)
    planted = (
        SOURCE[: start_of_body.end()]
        + '    raise ValueError("planted")\n'
        + SOURCE[start_of_body.end() :]
    )
    (tmp_path / "train_gpt.py").write_text(planted)
    settings = TINY | {
        "DATA_PATH": str(world[0] / "data"),
        "RUNS_DIR": str(tmp_path / "runs"),
        "TTT_ENABLED": "0",
    }
    code, out, err = finish(start(tmp_path, **settings))
    assert (
        code == 1
        and "Traceback" in err
        and err.endswith("ValueError: planted\n")
        and "cannot run" not in err
    )
    assert "RESULT {" not in out


def test_a_training_that_diverged_is_no_bug(world, tmp_path):
    paths = {"DATA_PATH": str(world[0] / "data"), "RUNS_DIR": str(tmp_path)}
    too_fast = {"MATRIX_LR": "1e30", "MUON_OUTWARD": "1"}  # the brake would hold the matrices
    code, out, err = finish(start(world[0] / "alone", **TINY | paths | too_fast))
    assert code == 1 and "RESULT {" not in out
    assert re.fullmatch(
        r"train_gpt.py cannot run: tok_emb.*not finite.*lower learning rates\n", err
    )


def test_a_guard_that_cannot_be_imported_ends_the_run(tmp_path):
    shutil.copyfile(ROOT / "train_gpt.py", tmp_path / "train_gpt.py")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "guard.py").write_text("import a_package_that_is_not_there\n")
    code, out, err = finish(start(tmp_path))
    assert (
        (code, out) == (1, "")
        and "Traceback" in err
        and "No module named 'a_package_that_is_not_there'" in err
    )


# ---- other packages under our names


def write_packages_under_our_names(folder):
    """Packages called as the folders of the checkout that hold Python files: none can be imported."""
    for name in {path.parent.name for path in ROOT.glob("*/*.py")}:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise ImportError('the foreign {name}')")


def test_packages_under_our_names_change_nothing(world, tmp_path):
    folder, found = world
    write_packages_under_our_names(tmp_path)
    settings = TINY | {
        "DATA_PATH": str(folder / "data"),
        "RUNS_DIR": str(folder / "runs"),
        "RUN_ID": "collides",
    }
    settings |= {"PYTHONPATH": str(tmp_path), "PRESET": "demo", "PLOTS": "1"}
    demo = {
        line.split("=")[0]
        for line in (ROOT / "presets" / "demo.env").read_text().splitlines()
        if "=" in line
    }
    defaults = {field.name.upper(): field for field in FIELDS}
    for name in demo - settings.keys():  # the preset must be found, and change nothing
        settings[name] = str(
            int(defaults[name].default) if defaults[name].type is bool else defaults[name].default
        )
    command = [sys.executable, "-B", str(ROOT / "train_gpt.py")]
    process = subprocess.Popen(
        command, env=HERE | settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    got, wanted = result_of(process), found["checkout"]
    same = UNLIKE - {"commit", "code_bytes", "total_bytes"}
    assert [key for key in wanted if key not in same and wanted[key] != got[key]] == []
    run = folder / "runs" / "collides"
    assert "preset demo: MODEL_DIM=128" in (run / "log.txt").read_text()
    assert "tools/guard.py" not in (run / "log.txt").read_text() and list(run.glob("*.png"))


def beside_packages_under_our_names(folder, *command):
    """Runs python in the checkout, with such packages first on PYTHONPATH -> what it printed."""
    write_packages_under_our_names(folder)
    environment = HERE | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-B", *command], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_packages_under_our_names_stop_no_test_at_collection(tmp_path):
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    printed = beside_packages_under_our_names(tmp_path, "-m", "pytest", *options, "tests")
    assert "on_the_gpu" in printed and "error" not in printed.splitlines()[-1]


@pytest.mark.parametrize(
    "script",
    [
        "tools/sample.py",
        "tools/launch.py",
        "presets/published.py",
        "benchmarks/bench_scaling.py",
        "benchmarks/bench_recipe.py",
        "data/download.py",
        "tokenizers/train_tokenizer.py",
        "docs/draw_pipeline.py",
    ],
)
def test_packages_under_our_names_stop_no_script(tmp_path, script):
    if script == "benchmarks/bench_recipe.py":
        pytest.importorskip("scipy")
    assert beside_packages_under_our_names(tmp_path, script, "--help")


# ---- the bar


def test_the_default_settings_are_packed_small():
    assert len(pack_code(SOURCE, {})) <= 36_000
