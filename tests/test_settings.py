"""Settings are declared once, checked and listed; the file imports anywhere without side effects."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

import train_gpt
from train_gpt import Hyperparameters, SettingError

ROOT = Path(__file__).resolve().parents[1]
FIELDS = dataclasses.fields(Hyperparameters)
NAMES = [field.name.upper() for field in FIELDS]


# ---- --help


def test_help_names_every_setting_with_its_default():
    shown = dict(
        re.findall(r"^  ([A-Z0-9_]+)=(\S*)  # \S", train_gpt.settings_table(), re.MULTILINE)
    )
    assert list(shown) == NAMES
    for field in FIELDS:
        default = int(field.default) if field.type is bool else field.default
        assert shown[field.name.upper()] == str(default)


def test_help_shows_ranges_and_choices():
    lines = {line.split("=")[0].strip(): line for line in train_gpt.settings_table().splitlines()}
    assert "auto|cuda|cpu" in lines["DEVICE"]
    for field in FIELDS:
        for bound in ("above", "least", "most"):
            if field.metadata.get(bound) is not None:
                limits = lines[field.name.upper()].split("[")[-1]
                assert re.search(rf"\b{re.escape(str(field.metadata[bound]))}\b", limits), (
                    field.name
                )


@pytest.mark.parametrize(
    "arguments, code", [(["--help"], 0), (["-h"], 0), (["--steps", "4"], 2), (["--help", "x"], 2)]
)
def test_the_command_line_knows_help_only(arguments, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *arguments])
    with pytest.raises(SystemExit) as end:
        train_gpt.main()
    assert end.value.code == code
    shown = capsys.readouterr().out
    assert [name for name in NAMES if f"  {name}=" not in shown] == []


# ---- defaults


def test_every_setting_has_a_meaning_a_type_and_a_default_of_that_type():
    for field in FIELDS:
        assert field.type in (int, float, bool, str) and type(field.default) is field.type, (
            field.name
        )
        assert len(field.metadata["help"]) > 3


# which sets others as well: tests/test_presets.py
ALONE = [field for field in FIELDS if field.name != "preset"]


@pytest.mark.parametrize("field", ALONE, ids=lambda field: field.name.upper())
def test_the_environment_sets_every_setting(field):
    if field.type is bool:
        changed = not field.default
    elif "choices" in field.metadata:
        changed = field.metadata["choices"][-1]
    elif field.type is str:
        texts = {
            "ttt_lora_sites": "q,head",
        }
        changed = texts.get(field.name, "elsewhere")
    else:
        changed = {  # values that fit the other settings
            "model_dim": 1024,
            "num_heads": 16,
            "num_kv_heads": 2,
            "loop_start": 4,
            "loop_end": 4,
            "num_layers": 12,
            "rope_dims": 8,
            "ttt_stale_context": 512,
            "iterations": 7,
            "train_batch_tokens": 98_304,
            "micro_batch_tokens": 49_152,
        }.get(field.name, field.default * 0.9 if field.type is float else field.default - 1 or 1)
        if field.metadata.get("least") is not None:
            changed = max(changed, field.metadata["least"])
        changed += changed == field.default
    more = {
        "checkpoint_path": {"QUANT_ONLY": "1"},
        "artifact_path": {"TTT_EVAL_ONLY": "1"},
        "resume": {"RUN_ID": "cut-short"},
        "deterministic": {"MAX_WALLCLOCK_SECONDS": "0"},
    }
    more = more.get(field.name, {})
    text = str(int(changed)) if field.type is bool else str(changed)
    hp = Hyperparameters.from_env({field.name.upper(): text} | more)
    value = getattr(hp, field.name)
    assert value == changed != field.default and type(value) is field.type
    table = train_gpt.settings_table(hp).splitlines()
    assert [line for line in table if line.startswith(f"* {field.name.upper()}={text}  # ")]
    assert len(table) == len(FIELDS) and sum(line[0] == "*" for line in table) == 1 + len(more)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Hyperparameters().seed = 1


def test_derived_sizes():
    hp = Hyperparameters()
    assert (hp.head_dim, hp.mlp_dim, hp.micro_steps, hp.row_segments, hp.training_seconds) == (
        64,
        2048,
        8,
        193,
        593.0,
    )
    assert hp.lora_sites == ("q", "k", "v", "o", "mlp", "head")
    small = Hyperparameters(
        train_batch_tokens=1024, micro_batch_tokens=512, mlp_mult=3.5, max_wallclock_seconds=0
    )
    assert (small.mlp_dim, small.micro_steps, small.row_segments, small.training_seconds) == (
        1792,
        2,
        64,
        math.inf,
    )
    # pieces of half the length fit whatever the documents
    assert Hyperparameters(train_seq_len=1024, full_seq_len_at=0.1).row_segments == 2 * 192 + 1
    assert Hyperparameters(train_seq_len=1024, full_seq_len_at=0).row_segments == 2 * 96 + 1


# ---- unknown variables


@pytest.mark.parametrize(
    "name, meant",
    [
        ("TTT_LORA_RNAK", "TTT_LORA_RANK"),
        ("MATRIX_LRR", "MATRIX_LR"),
        ("PHASED_TTT_ENABLED", ""),
        ("MUON_MOMENTUM_WARMUP", "MUON_MOMENTUM_WARMUP_ST"),
        ("EMBED_BIT", "EMBED_BITS"),
        ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("TRAIN_BATCH_TOKEN", "TRAIN_BATCH_TOKENS"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("MODEL_DIMS", "MODEL_DIM"),
        ("ITERATION", "ITERATIONS"),
        ("COMPRESSORS", "COMPRESSOR"),
        ("GPTQ_DAMPING", "GPTQ_DAMP"),
        ("DATA_PATHS", "DATA_PATH"),
        ("EMA_SPANS", "EMA_SPAN"),
        ("TRAIN_SEQ_LENGTH", "TRAIN_SEQ_LEN"),
        ("WARMDOWN_FRACTION", "WARMDOWN_FRAC"),
        # cut short
        ("MAX_WALLCLOCK", r"MAX_WALLCLOCK_SECONDS\?"),
        ("TRAIN_BATCH", r"TRAIN_BATCH_TOKENS\?"),
        ("NUM_KV", r"NUM_KV_HEADS\?"),
        ("VAL_LOSS", r"VAL_LOSS_EVERY\?"),
    ],
)
def test_a_misspelt_setting_is_refused_with_a_suggestion(name, meant):
    with pytest.raises(SettingError) as error:
        Hyperparameters.from_env({name: "1"})
    assert re.search(rf"\b{name} is not a setting; did you mean {meant}", str(error.value))
    assert "\n" not in str(error.value)


def test_no_setting_is_passed_over_cut_short_behind_a_word():
    names = [field.name.upper() for field in FIELDS if "_" in field.name]
    words = [name.split("_") for name in names]
    cut = {"_".join(each[:count]) for each in words for count in range(2, len(each))}
    for name in cut - {*names}:
        with pytest.raises(
            SettingError, match=f"^{name} is (not a setting; did you mean|a setting of)"
        ):
            Hyperparameters.from_env({name: "1"})


@pytest.mark.parametrize("name", ["TTT_SOMETHING_QUITE_DIFFERENT", "GPTQ_X", "MUON_BETA"])
def test_an_unknown_name_of_our_families_is_refused(name):
    with pytest.raises(SettingError, match=f"{name} is not a setting"):
        Hyperparameters.from_env({name: "1"})


OTHERS = """PATH HOME MAX_JOBS OMP_NUM_THREADS MKL_NUM_THREADS TORCH_INDEX_URL CUDA_VISIBLE_DEVICES
    CUDA_HOME RANK
    WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT
    TORCHELASTIC_RUN_ID
    TORCHELASTIC_MAX_RESTARTS PYTORCH_CUDA_ALLOC_CONF TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR
    TRITON_INTERPRET
    NCCL_DEBUG PYTHONPATH PYTHONHASHSEED
    LANG LC_ALL TERM SHELL USER LOGNAME PWD OLDPWD SHLVL EDITOR VIRTUAL_ENV CONDA_PREFIX HF_HOME
    HF_TOKEN SSH_CONNECTION
    TMPDIR XDG_RUNTIME_DIR DISPLAY COLUMNS LINES KUBERNETES_PORT RUNPOD_POD_ID SLURM_JOB_ID
    SLURM_NTASKS NUM_WORKERS
    NUMEXPR_MAX_THREADS DATA_DIR TRAIN_DIR DEVICE_COUNT MIN_MEM HOSTNAME PYTEST_CURRENT_TEST
    MATCHED_FINEWEB_REPO_ID GOLDEN_DIR CI LD_LIBRARY_PATH RUN_NAME COMPILE_COMMANDS LESSOPEN
    LR STEPS BATCH_SIZE DATA MODEL RUN CHECKPOINT seed device compile resume http_proxy data_dir
    data_path run_id model_dir PARALLEL_SEQ PARALLEL_PID GLOBAL_RANK GLOBAL_BATCH_SIZE TARGET_ARCH
    _""".split()


@pytest.mark.parametrize("name", OTHERS)
def test_variables_of_other_programs_are_left_alone(name):
    assert Hyperparameters.from_env({name: "whatever"}) == Hyperparameters()


def test_all_problems_are_named_at_once():
    """A preset that is not there, an unknown name, no numbers and numbers outside their ranges."""
    wrong = {"SEED": "x", "MATRIX_LRR": "1", "KERNELS": "yes", "NUM_LAYERS": "2.5"}
    wrong |= {"PRESET": "nosuch", "MATRIX_LR": "-5", "MIN_LR": "2"}
    with pytest.raises(SettingError) as error:
        Hyperparameters.from_env(wrong)
    assert {line.split("=")[0].split()[0] for line in str(error.value).splitlines()} == {*wrong}
    assert len(str(error.value).splitlines()) == len(wrong)


# ---- values


@pytest.mark.parametrize(
    "name, text",
    [
        ("SEED", "4.0"),
        ("SEED", ""),
        ("SEED", "1e3"),
        ("MATRIX_LR", "fast"),
        ("MATRIX_LR", ""),
        ("NUM_LAYERS", "eleven"),
        ("KERNELS", "true"),
        ("KERNELS", "2"),
        ("KERNELS", ""),
        ("TTT_ENABLED", "True"),
        ("TTT_ENABLED", "-1"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name, text):
    with pytest.raises(SettingError, match=f"^{name}="):
        Hyperparameters.from_env({name: text})


BOUNDED = [
    (field, kind)
    for field in FIELDS
    for kind in ("above", "least", "most")
    if field.metadata.get(kind) is not None
]


@pytest.mark.parametrize(
    "field, kind", BOUNDED, ids=[f"{field.name}-{kind}" for field, kind in BOUNDED]
)
def test_every_declared_bound_holds(field, kind):
    bound, step = field.metadata[kind], 1 if field.type is int else 1e-6
    outside = {"above": bound, "least": bound - step, "most": bound + step}[kind]
    words = {"above": "above", "least": "at least", "most": "at most"}[kind]
    with pytest.raises(SettingError, match=rf"^{field.name.upper()}=\S+: must be {words} "):
        Hyperparameters.from_env({field.name.upper(): str(field.type(outside))})
    if kind != "above":  # the bound itself is taken
        assert list(train_gpt.range_problems(field, field.type(bound))) == []


@pytest.mark.parametrize(
    "field", [field for field in FIELDS if field.type is float], ids=lambda field: field.name
)
@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_refused(field, text):
    with pytest.raises(SettingError, match=field.name.upper()):
        Hyperparameters.from_env({field.name.upper(): text})


@pytest.mark.parametrize(
    "field", [f for f in FIELDS if "choices" in f.metadata], ids=lambda field: field.name
)
def test_choices_are_the_declared_ones(field):
    for choice in field.metadata["choices"]:
        hp = Hyperparameters.from_env({field.name.upper(): choice})
        assert getattr(hp, field.name) == choice
    with pytest.raises(SettingError, match=f"{field.name.upper()}='Nope': must be one of"):
        Hyperparameters.from_env({field.name.upper(): "Nope"})


def test_every_number_has_a_lower_bound():
    for field in FIELDS:
        if field.type in (int, float):
            assert (
                field.metadata.get("least") is not None or field.metadata.get("above") is not None
            ), field.name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"TRAIN_BATCH_TOKENS": "786433"}, "TRAIN_BATCH_TOKENS"),
        ({"MICRO_BATCH_TOKENS": "100000"}, "MICRO_BATCH_TOKENS"),
        ({"MODEL_DIM": "500"}, "MODEL_DIM"),
        ({"NUM_KV_HEADS": "3"}, "NUM_KV_HEADS"),
        ({"MLP_MULT": "0.003"}, "MLP_MULT must be at least 2 / MODEL_DIM"),
        ({"ROPE_DIMS": "15"}, "ROPE_DIMS"),
        ({"ROPE_DIMS": "66"}, "ROPE_DIMS"),
        ({"LOOP_END": "11"}, "LOOP_END"),
        ({"LOOP_START": "6"}, "LOOP_START"),
        ({"PARALLEL_START_LAYER": "12"}, "PARALLEL_START_LAYER"),
        ({"MAX_WALLCLOCK_SECONDS": "7"}, "GPTQ_RESERVE_SECONDS"),
        ({"EVAL_STRIDE": "2049"}, "EVAL_STRIDE"),
        ({"TTT_CHUNK_SIZE": "3073"}, "TTT_CHUNK_SIZE"),
        ({"TTT_LORA_SITES": "q,w"}, "TTT_LORA_SITES"),
        ({"TTT_STALE_CONTEXT": "11"}, "TTT_STALE_CONTEXT"),
        ({"TTT_STALE_CONTEXT": "3061"}, "TTT_STALE_CONTEXT"),
        ({"PREQUANT_ONLY": "1", "QUANT_ONLY": "1"}, "exclude each other"),
        ({"RUN_ID": "../x"}, "RUN_ID"),
        ({"QUANT_ONLY": "1", "TTT_EVAL_ONLY": "1"}, "exclude each other"),
        ({"RUN_ID": "a b"}, "RUN_ID"),
    ],
)
def test_combinations_that_cannot_work_are_refused(changes, message):
    with pytest.raises(SettingError, match=message):
        Hyperparameters.from_env(changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"NUM_KV_HEADS": "8", "MLP_MULT": "3.5"},
        {"NUM_LOOPS": "0", "LOOP_END": "50"},
        {"MAX_WALLCLOCK_SECONDS": "0"},
        {"PARALLEL_START_LAYER": "11"},
        {"RUN_ID": "a-1.b+c_d"},
        {"TTT_LORA_SITES": "head"},
        {"TTT_LORA_LR": "0"},
        {"TTT_STALE_CONTEXT": "16"},
        {"TTT_STALE_CONTEXT": "3056"},
    ],
)
def test_combinations_that_work_are_taken(changes):
    Hyperparameters.from_env(changes)


@pytest.mark.parametrize("run_id", [".", ".."])
def test_a_run_id_stays_inside_its_folder(run_id):
    with pytest.raises(SettingError, match="RUN_ID"):
        Hyperparameters.from_env({"RUN_ID": run_id})


@pytest.mark.parametrize("sites", ["", ","])
def test_one_lora_site_is_named_at_least(sites):
    with pytest.raises(SettingError, match="TTT_LORA_SITES"):
        Hyperparameters.from_env({"TTT_LORA_SITES": sites})


# ---- importing the file


BLOCKED_IMPORT = """
import importlib.abc, json, os, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "python_minifier", "flash_attn_interface"}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import random, threading, numpy, torch
torch.cuda.is_available = lambda: False
def environment():  # torch itself names its compile cache while it is imported
    return {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
before = environment(), sorted(os.listdir(".")), torch.get_rng_state().tolist(), threading.active_count()
def states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_default_dtype(), torch.get_num_threads()
state = states()
import train_gpt
after = environment(), sorted(os.listdir(".")), torch.get_rng_state().tolist(), threading.active_count()
assert before == after
assert state == states()
assert train_gpt.triton is None
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
hp = train_gpt.Hyperparameters.from_env()
ops = train_gpt.select_ops(hp, torch.device("cpu"), torch.float32)
print(json.dumps(ops.names))
"""


def test_the_file_imports_without_cuda_group_or_optional_packages_and_does_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-B", "-c", BLOCKED_IMPORT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"},
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    kinds = "mlp", "cross_entropy", "qkv_heads", "gated_xsa", "enter", "adamw_rows", "trellis_round"
    assert json.loads(done.stdout) == {"attention": "sdpa"} | dict.fromkeys(kinds, "reference")
    assert list(tmp_path.iterdir()) == []
