"""Faults that real use has found: each test is the case as a user met it, with the right answer.

Whole runs are processes of their own, so that the tests outlive changes inside the program.
"""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    HERE,
    IN_SOAK,
    Lines,
    files_at_most,
    install_published,
    tiny_hp,
    write_documents,
    write_shard,
)
from evaluation_helpers import make_model, make_validation, on_ranks, small_hp
from run_helpers import SETTINGS, finish, make_data, result_of, start, torchrun

import presets.published
import train_gpt
from tools import guard, other_scripts
from tools.run_files import published_settings, script_of

pytest.importorskip("brotli")
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("python_minifier")
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A CaseOps dataset of 40 small training documents and 10 of validation, with a side-car
    and no manifest.
    """
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def environ_of(folder, data_path, settings):
    """{NAME: text} of a tiny run whose runs lie in `folder`.

    Settings with the value None are left out.
    """
    paths = {
        "DATA_PATH": data_path,
        "RUNS_DIR": folder / "runs",
        "PLOTS": "0",
        "KERNELS": "0",
    }
    return {
        name: str(value)
        for name, value in (SETTINGS | paths | settings).items()
        if value is not None
    }


def begin(folder, data_path, **settings):
    """A tiny run in a process of its own -> Popen."""
    environ = environ_of(folder, data_path, settings)
    return start(script_of(environ), **environ)


def main(folder, data_path, **settings):
    """train_gpt.main() in this process -> (what it exits with, None where it ends well; what it
    printed).
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    code, out = None, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        for name in set(os.environ) - {
            "PATH",
            "HOME",
            "LD_LIBRARY_PATH",
            "TRITON_INTERPRET",
            "OMP_NUM_THREADS",
        }:
            patch.delenv(name)
        for name, value in environ_of(folder, data_path, settings).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["train_gpt.py"])
        # seconds of packing, tested elsewhere
        patch.setattr(train_gpt, "write_code", lambda *_: 1000)
        try:
            train_gpt.main()
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, out.getvalue()


def refusal(folder, data_path, **settings):
    """What a run says that must be refused before training, in one line for each problem."""
    said, out = main(folder, data_path, **settings)
    assert isinstance(said, str) and said.startswith("train_gpt.py cannot run: "), out
    assert not re.search("^(step:|RESULT )", out, re.MULTILINE)
    return said


# ---- data without a side-car: the tokenizer counts the bytes


TEXT = """The byte counts of a text come from the pieces that its own tokenizer made of it, and another tokenizer of the
same size counts other bytes without any error. Rivers carry sand and stones from the mountains to the plains, where the
water is slow; in spring the snow melts and the meadows are flooded. A letter takes four days to the coast, but only two
in summer, when the road over the pass is open. Bread is made of flour, water, salt and time."""


def train_model(path, text, size):
    sentences = [text[start : start + 60] for start in range(0, len(text) - 60, 3)]
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            minloglevel=2,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Plain shards, their tokenizer own.model, another.model of equal size in the same folder,
    the text's bytes.
    """
    folder = tmp_path_factory.mktemp("plain")
    own = train_model(folder / "own.model", TEXT, 320)
    other = train_model(folder / "another.model", TEXT[::-1].upper(), 320)
    assert own.vocab_size() == other.vocab_size()
    words = TEXT.split()
    texts = [" ".join(words[start : start + 24]) for start in range(40)]
    ids = [[train_gpt.BOS_ID, *own.encode(text)] for text in texts]
    write_shard(folder / "fineweb_train_000000.bin", np.concatenate(ids * 3))
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate(ids))
    return folder, own.vocab_size(), sum(len(text.encode()) for text in texts)


def test_a_tokenizer_is_not_guessed_among_several(plain, tmp_path, published):
    folder, size, _ = plain
    said = refusal(tmp_path, folder, CASEOPS_ENABLED=0, VOCAB_SIZE=size, TOKENIZER_PATH=None)
    assert "own.model" in said and "another.model" in said and "set TOKENIZER_PATH" in said


def test_a_foreign_tokenizer_of_equal_size_counts_no_bytes(plain, tmp_path, published):
    folder, size, _ = plain
    said = refusal(
        tmp_path,
        folder,
        CASEOPS_ENABLED=0,
        VOCAB_SIZE=size,
        TOKENIZER_PATH=folder / "another.model",
    )
    assert "not made by the tokenizer" in said


def test_the_own_tokenizer_counts_the_bytes_of_the_text(plain, tmp_path):
    folder, size, num_bytes = plain
    result = result_of(
        begin(
            tmp_path,
            folder,
            CASEOPS_ENABLED=0,
            VOCAB_SIZE=size,
            TTT_ENABLED=0,
            TOKENIZER_PATH=folder / "own.model",
        )
    )
    assert result["scores"]["quantized"]["bytes"] == num_bytes


# ---- settings against the side-car and the manifest


@pytest.fixture(scope="module")
def caseops(tmp_path_factory):
    """A CaseOps dataset of 40 training documents and 8 of validation with side-car and manifest."""
    folder = tmp_path_factory.mktemp("caseops")
    words = TEXT.split() + ["NASA", "Alps", "Bread"]
    texts = [" ".join(words[start : start + 30]) + f" {start}" for start in range(48)]
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    subprocess.run(
        [
            sys.executable,
            ROOT / "prepare_caseops_data.py",
            "--docs",
            folder / "docs.jsonl",
            "--val-docs",
            "8",
            "--workers",
            "1",
            "--out",
            folder / "data",
        ],
        check=True,
        capture_output=True,
    )
    return folder / "data", sum(len(text.encode()) for text in texts[:8])


def copied(source, folder, *patterns):
    """The files of a dataset, linked into a new folder, but for those of these patterns."""
    folder.mkdir()
    left_out = {path for pattern in patterns for path in source.glob(pattern)}
    for path in set(source.iterdir()) - left_out:
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(
    "left_out, words",
    [
        ([], "fineweb_val_bytes_000000.bin"),
        (["fineweb_val_bytes_*"], "lossless_caps_caseops_v1"),
        (["manifest.json"], "fineweb_val_bytes_000000.bin"),
        (["fineweb_val_bytes_*", "manifest.json"], "CaseOps' markers"),
    ],
    ids=["both", "manifest", "side-car", "neither"],
)
def test_a_tokenizer_does_not_count_the_bytes_of_caseops_shards(
    caseops, tmp_path, left_out, words, published
):
    said = refusal(tmp_path, copied(caseops[0], tmp_path / "data", *left_out), CASEOPS_ENABLED=0)
    assert words in said and "CASEOPS_ENABLED" in said


def test_the_side_car_counts_the_bytes_of_the_text(caseops, tmp_path):
    result = result_of(begin(tmp_path, caseops[0], TTT_ENABLED=0))
    assert result["scores"]["quantized"]["bytes"] == caseops[1]


def test_settings_that_contradict_the_manifest_are_refused(caseops, plain, tmp_path, monkeypatch):
    folder = copied(caseops[0], tmp_path / "data", "manifest.json")
    manifest = json.loads((caseops[0] / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"text_transform": None}))
    assert "run presets/published.py with CASEOPS_ENABLED=0" in refusal(tmp_path, folder)
    assert "VOCAB_SIZE=8192" in refusal(tmp_path, caseops[0], VOCAB_SIZE=4096)
    install_published(monkeypatch)
    assert "with CASEOPS_ENABLED=0" in refusal(tmp_path, folder)
    said = refusal(
        tmp_path,
        plain[0],
        TOKENIZER_PATH=plain[0] / "own.model",
        VOCAB_SIZE=plain[1],
        MARKER_FUSION_ENABLED=1,
    )
    assert "MARKER_FUSION_ENABLED=0" in said


# ---- the environment of a launcher


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"RANK": "1"}, "has RANK=1:"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2:"),
        ({"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "RANK=1 WORLD_SIZE=1"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT",
        ),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "has RANK=x "),
    ],
    ids=["a rank alone", "a size alone", "a rank too large", "no address", "no number"],
)
def test_ranks_that_contradict_each_other_are_refused(data, tmp_path, environ, words):
    said = refusal(tmp_path, data, **environ)
    assert words in said and "torchrun" in said
    assert not (tmp_path / "runs").exists()


def test_tasks_of_slurm_that_know_nothing_of_each_other_are_told(data, tmp_path):
    code, out, err = finish(begin(tmp_path, data, SLURM_NTASKS=2, PREQUANT_ONLY=1))
    assert (
        code == 0
        and "note: SLURM_NTASKS=2, but RANK is not set: this is a run of one process" in out
    )


# ---- going on from a file with other settings


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Folder whose runs/first is a whole run, and runs/stopped one that left a training state."""
    folder = tmp_path_factory.mktemp("trained")
    code, out = main(folder, data, RUN_ID="first", TTT_ENABLED=0)
    assert code is None
    stop = begin(folder, data, RUN_ID="stopped", ITERATIONS=100_000, CHECKPOINT_EVERY=1)
    for line in stop.stdout:
        if line.startswith("step:3 "):
            break
    stop.send_signal(signal.SIGTERM)
    assert finish(stop)[0] == 128 + signal.SIGTERM and list(
        (folder / "runs" / "stopped").glob("state-*.pt")
    )
    return folder


OTHER_MODEL = {
    "LOGIT_SOFTCAP": "15.0",
    "ROPE_BASE": "500.0",
    "LEAKY_RELU_SLOPE": "0.5",
    "NUM_LOOPS": "0",
}
MODES = {
    "QUANT_ONLY": ("CHECKPOINT_PATH", "first/model.pt"),
    "TTT_EVAL_ONLY": ("ARTIFACT_PATH", "first/artifact.bin"),
    "RESUME": ("RUN_ID", "stopped"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_file_is_not_read_as_another_model(data, trained, mode):
    name, file = MODES[mode]
    value = file if mode == "RESUME" else trained / "runs" / file
    said = refusal(trained, data, **{mode: 1, name: value}, **OTHER_MODEL)
    assert "holds a model of other settings" in said
    assert all(f"{name}={value} (" in said for name, value in OTHER_MODEL.items())


def test_every_setting_of_the_model_is_compared_or_may_change():
    names = [field.name for field in dataclasses.fields(train_gpt.Hyperparameters)]
    of_the_model = set(names[names.index("vocab_size") : names.index("max_wallclock_seconds")])
    may_change = {"qk_gain_init", "enable_looping_at"}
    assert of_the_model - set(guard.MEANING) == may_change
    parts = {field.name: field for field in dataclasses.fields(presets.published.Hyperparameters)}
    theirs = [name for name in guard.MEANING if name not in names]
    without = {name: parts[name].default for name in theirs if name in guard.WITHOUT}
    # runs from before these settings did without
    without |= {"marker_fusion_enabled": False, "full_seq_len_at": 0.0}
    assert without == guard.WITHOUT
    # of these the ones that matter are compared where the setting that they belong to is on
    belong = {"attn_out_gate_src", "attn_window_full_layers", "bigram_dim", "value_embed_dim"}
    assert set(theirs) - set(guard.WITHOUT) == belong


def test_an_artifact_without_its_checkpoint_is_compared_with_its_log(data, trained, tmp_path):
    for name in ("artifact.bin", "log.txt"):
        (tmp_path / name).write_bytes((trained / "runs" / "first" / name).read_bytes())
    said = refusal(
        tmp_path, data, TTT_EVAL_ONLY=1, ARTIFACT_PATH=tmp_path / "artifact.bin", LOGIT_SOFTCAP=15
    )
    assert "LOGIT_SOFTCAP=15.0 (30.0 there)" in said
    (tmp_path / "log.txt").unlink()
    code, out = main(
        tmp_path, data, TTT_EVAL_ONLY=1, ARTIFACT_PATH=tmp_path / "artifact.bin", TTT_ENABLED=0
    )
    assert code is None and "note: nothing says which settings" in out


def test_a_state_from_before_the_change_of_lengths_is_told_of_it(tmp_path):
    """Resumed by a newer version, documents would be cut shorter from one step to the next."""
    hp = train_gpt.Hyperparameters(quant_only=True)
    settings = dataclasses.asdict(hp)
    del settings["full_seq_len_at"]
    torch.save({"settings": settings}, path := tmp_path / "model.pt")
    problems, note = guard.compare_settings(path, hp)
    assert problems == [] and note.endswith(f"{path}: FULL_SEQ_LEN_AT=0.4 (0.0 there)")
    hp = dataclasses.replace(hp, full_seq_len_at=0.0)
    assert guard.compare_settings(path, hp) == ([], "")


def test_what_may_differ_from_a_checkpoint_is_told(data, trained, tmp_path):
    checkpoint = trained / "runs" / "first" / "model.pt"
    code, out = main(
        tmp_path,
        data,
        QUANT_ONLY=1,
        CHECKPOINT_PATH=checkpoint,
        MATRIX_BITS=5,
        TTT_ENABLED=0,
        SEED=7,
    )
    assert code is None
    (note,) = [
        line for line in out.splitlines() if line.startswith("note: settings other than those of")
    ]
    assert note.endswith(f"{checkpoint}: SEED=7 (42 there), MATRIX_BITS=5 (6 there)")
    code, out = main(
        tmp_path, data, QUANT_ONLY=1, CHECKPOINT_PATH=checkpoint, TTT_ENABLED=0, RUN_ID="same"
    )
    assert code is None and "settings other than" not in out


# ---- shapes that a later stage needs


def test_a_short_context_in_a_long_row_is_evaluated(data, tmp_path):
    code, out = main(
        tmp_path,
        data,
        EVAL_SEQ_LEN=16,
        TTT_ENABLED=0,
        MICRO_BATCH_TOKENS=2048,
        TRAIN_BATCH_TOKENS=4096,
        ITERATIONS=1,
    )
    assert code is None and "\nquantized val_loss:" in out and "tokens:403 bytes:981" in out


@pytest.mark.parametrize("context", [512, 100])
def test_every_row_fits_whatever_its_documents(context, tmp_path, dist):
    """Rows of the default size: documents of one length just over half the context cannot be
    joined at all.
    """
    write_documents(tmp_path, "train", [context // 2] * (2 * 98_304 // context + 20))
    hp = train_gpt.Hyperparameters(
        data_path=str(tmp_path),
        train_seq_len=context,
        train_batch_tokens=98_304,
        max_wallclock_seconds=0,
    )
    loader = train_gpt.TrainLoader(train_gpt.TokenStream(hp.data_path, "train"), hp, dist)
    (row,) = loader.rank_rows(0)
    lengths = row.cu_seqlens.diff()
    assert row.cu_seqlens[-1] == 98_304 and lengths.max() <= context
    # no document sees another
    assert set(lengths.tolist()) <= {0, context // 2 + 1, 98_304 % (context // 2 + 1)}


def test_rows_of_short_documents_take_no_seconds(tmp_path, dist):
    write_documents(tmp_path, "train", [30] * 6_000)
    hp = train_gpt.Hyperparameters(
        data_path=str(tmp_path), train_batch_tokens=98_304, balance_rows=False
    )
    loader = train_gpt.TrainLoader(train_gpt.TokenStream(hp.data_path, "train"), hp, dist)
    started = time.process_time()
    row = loader.build(0)
    # 0.2 s
    assert time.process_time() - started < 1.0
    assert len(row.cu_seqlens) == hp.row_segments + 1 and row.cu_seqlens[-2] < 98_304


def test_joining_gives_what_the_plain_search_gives():
    rng = np.random.default_rng(9)
    for _ in range(300):
        lengths = rng.integers(1, rng.integers(2, 40), rng.integers(1, 60))
        starts, total, longest = (
            np.cumsum(lengths) - lengths,
            int(lengths.sum()),
            int(rng.integers(40, 90)),
        )
        most, want = int(rng.integers(1, 60)), starts
        while (
            len(want) > most and (joined := np.append(want[2:], total) - want[:-1]).min() <= longest
        ):
            want = np.delete(want, 1 + joined.argmin())
        if len(want) > most:
            want = np.arange(0, total, longest)
        assert train_gpt.join_shortest(starts, total, longest, most).tolist() == want.tolist()


# ---- validation without text


def with_validation(data, folder, lengths):
    """The dataset with other validation documents, of these lengths."""
    folder = copied(data, folder, "fineweb_val_*")
    write_documents(folder, "val", lengths, vocab_size=8192, seed=4)
    return folder


def test_validation_that_holds_no_text_is_refused(data, tmp_path):
    assert "hold no byte" in refusal(
        tmp_path, with_validation(data, tmp_path / "data", [0, 0, 0, 0])
    )


def test_a_choice_of_documents_that_holds_no_text_is_refused(data, tmp_path):
    folder = with_validation(data, tmp_path / "data", [0, 0, 0, 0, 30])
    assert "TTT_MAX_DOCS=1" in refusal(tmp_path, folder, TTT_MAX_DOCS=1)
    code, out = main(tmp_path, folder, TTT_MAX_DOCS=5, ITERATIONS=1)
    assert code is None and "tokens:34 " in out.split("\nttt val_loss")[1].splitlines()[0]


# ---- budgets


def test_no_budget_is_no_limit():
    seconds = train_gpt.Hyperparameters.training_seconds.fget
    limits = [(0, math.inf), (8, 1.0), (600, 593.0)]
    for budget, want in limits:
        assert (
            seconds(SimpleNamespace(max_wallclock_seconds=budget, gptq_reserve_seconds=7)) == want
        )


# ---- seeds


@pytest.mark.parametrize("seed", [pytest.param(1_795_000_000_123_456_789, marks=IN_SOAK), 2**64])
def test_a_run_takes_any_seed(data, tmp_path, seed, published):
    code, out = main(
        tmp_path,
        data,
        SEED=seed,
        DATA_SEED=seed,
        ITERATIONS=1,
        GPTQ_SELF_CALIBRATION=1,
        BIGRAM_VOCAB_SIZE=50,
    )
    assert code is None and "\nttt val_loss:" in out
    assert json.loads(out.splitlines()[-1].removeprefix("RESULT "))["seed"] == seed


def test_seeds_of_usual_size_give_what_they_gave(dist, ops):
    for seed in (0, 42, 2**31 - 1):
        model = train_gpt.GPT(tiny_hp(seed=seed), ops, torch.float32)
        want = torch.empty_like(model.tok_emb)
        want.normal_(0.0, 0.005, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(model.tok_emb, want)
        lora = train_gpt.BatchedLoRA(
            model, range(1, 2), tiny_hp(seed=seed), dist.device, model.ops.adamw_rows
        )
        want = torch.empty_like(lora.warm_a)
        want.uniform_(
            -(32**-0.5), 32**-0.5, generator=torch.Generator().manual_seed(seed * 1_000_003 + 1)
        )
        assert torch.equal(lora.warm_a, want)


# ---- clocks


def test_making_the_test_time_trainer_is_of_its_stage_and_its_budget(data, tmp_path, monkeypatch):
    make = train_gpt.BatchedLoRA.__init__

    def slow(*arguments):
        time.sleep(3.0)
        make(*arguments)

    monkeypatch.setattr(train_gpt.BatchedLoRA, "__init__", slow)
    code, out = main(tmp_path, data, ITERATIONS=1)
    assert code is None
    assert json.loads(out.splitlines()[-1].removeprefix("RESULT "))["seconds"]["eval_ttt"] > 3.0
    first = next(line for line in out.splitlines() if line.startswith("ttt_batch "))
    assert (
        float(first.split("seconds:")[1]) >= 3.0
        and int(first.split("budget_left:")[1].split()[0]) <= 585
    )


# ---- paths


@pytest.mark.parametrize("name", ["data [v2] 100%", pytest.param("[abc]", marks=IN_SOAK)])
def test_folders_may_have_any_name(caseops, tmp_path, name):
    (tmp_path / name).mkdir()
    folder = copied(caseops[0], tmp_path / name / "data")
    code, out = main(tmp_path / name, folder, PREQUANT_ONLY=1, ITERATIONS=1, RUN_ID="one")
    assert code is None and (tmp_path / name / "runs" / "one" / "result.json").exists()
    done = subprocess.run(
        [sys.executable, ROOT / "prepare_caseops_data.py", "verify", folder, "--workers", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert main(tmp_path / name, folder, QUANT_ONLY=1, RUN_ID="one", TTT_ENABLED=0)[0] is None


def test_no_tool_searches_a_path_of_the_user_as_a_pattern():
    """glob.glob takes brackets in a folder's name for a pattern; Path.glob does not."""
    paths = [
        path for name in (".", "tools", "data", "benchmarks") for path in (ROOT / name).glob("*.py")
    ]
    found = [
        line
        for path in paths
        for line in path.read_text(encoding="utf-8").splitlines()
        if "glob.glob(" in line
    ]
    assert found and all("(folder, f" in line or '"/proc/' in line for line in found), found


# ---- settings of published commands


PUBLISHED = {
    "QUANTIZE_ONLY": "QUANT_ONLY",
    "TRAIN_SEQ_SCHEDULE": "FULL_SEQ_LEN_AT",
    "NEGATIVE_SLOPE": "LEAKY_RELU_SLOPE",
    "VAL_DOC_FRACTION": "TTT_MAX_DOCS",
    "LOAD_MODEL_PATH": "CHECKPOINT_PATH",
    "MTP_NUM_HEADS": "nothing",
    "EVAL_ONLY": "TTT_EVAL_ONLY",
    "VE_LAYERS": "VALUE_EMBED_LAYERS",
}


@pytest.mark.parametrize("name, instead", PUBLISHED.items())
def test_a_name_of_published_commands_is_refused_with_what_to_use(name, instead):
    with pytest.raises(
        train_gpt.SettingError,
        match=rf"^{name} is a setting of other scripts; here it is .*{instead}",
    ):
        train_gpt.Hyperparameters.from_env({name: "1"}, guard.RunGuard())


@pytest.mark.parametrize("name", sorted(published_settings()))
def test_a_setting_of_the_published_parts_is_refused_with_the_script_that_takes_it(name):
    with pytest.raises(train_gpt.SettingError, match=r"run presets/published\.py, which takes it"):
        train_gpt.Hyperparameters.from_env({name: "1"}, guard.RunGuard())


def test_who_wants_plain_data_is_not_told_to_unset_the_setting_for_it():
    with pytest.raises(train_gpt.SettingError) as refused:
        train_gpt.Hyperparameters.from_env({"CASEOPS_ENABLED": "0"}, guard.RunGuard())
    assert str(refused.value) == (
        "CASEOPS_ENABLED is a setting of other scripts; for plain data (0) run"
        " presets/published.py, which takes it, in place of train_gpt.py; for CaseOps data (1)"
        " unset it"
    )


@pytest.mark.parametrize("name", [*other_scripts.INSTEAD, *sorted(published_settings())])
def test_a_setting_of_other_scripts_is_refused_without_a_guard_too(name):
    with pytest.raises(train_gpt.SettingError, match=f"^{name} is (a setting of other|not a set)"):
        train_gpt.Hyperparameters.from_env({name: "1"})


def test_what_to_use_instead_is_a_setting_of_ours():
    fields = dataclasses.fields(presets.published.Hyperparameters)
    ours = {field.name.upper() for field in fields}
    names = [
        re.sub("=.*", "", word)
        for text in other_scripts.INSTEAD.values()
        for word in text.split(" and ")
    ]
    assert {name for name in names if not name.startswith("nothing")} <= ours
    assert not (set(other_scripts.INSTEAD) | set(other_scripts.IDLE)) & ours


SHARDS = [15, *[31] * 169, 16]  # of 170 documents with 30 tokens


def test_more_shards_than_a_process_may_open(tmp_path):
    """No file stays open: `ulimit -n` is 1024 on many machines."""
    tokens, _ = write_documents(tmp_path, "train", [30] * 170, shard_sizes=SHARDS)
    with files_at_most(70):
        stream = train_gpt.TokenStream(tmp_path, "train")
        assert [
            int(stream.read(position, 1)[0]) for position in range(stream.size)
        ] == tokens.tolist()
        # what a row or the search for held-out documents reads at once
        assert stream.read(0, stream.size).tolist() == tokens.tolist()


def test_more_validation_shards_than_a_process_may_open(tmp_path):
    tokens, charges = write_documents(tmp_path, "val", [30] * 170, shard_sizes=SHARDS)
    with files_at_most(70):
        validation = train_gpt.ValidationSet(tiny_hp(data_path=str(tmp_path)))
    assert validation.tokens.tolist() == tokens.tolist()
    assert validation.bytes.sum() == charges.sum()


def test_a_shard_that_is_cut_off_during_a_run_gives_no_tokens(tmp_path):
    write_documents(tmp_path, "train", [30] * 5)
    stream = train_gpt.TokenStream(tmp_path, "train")
    (path,) = tmp_path.glob("*.bin")
    path.write_bytes(path.read_bytes()[:-2])
    assert len(stream.read(0, stream.size - 1)) == stream.size - 1
    with pytest.raises(ValueError, match="could not broadcast"):
        stream.read(0, stream.size)


def test_a_file_system_without_syncs_of_folders_does(tmp_path, monkeypatch):
    sync = os.fsync

    def sync_files(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(number)

    monkeypatch.setattr(os, "fsync", sync_files)
    train_gpt.write_atomically(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_file_system_without_locks_is_told_and_does(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(guard.fcntl, "flock", no_locks)
    guard.lock(tmp_path).close()
    assert f"note: {tmp_path}: this file system has no locks" in capsys.readouterr().err


def test_names_without_a_meaning_here_are_told(data, tmp_path):
    code, out = main(
        tmp_path, data, PREQUANT_ONLY=1, ITERATIONS=1, DATA_DIR="data", SKIP_INITIAL_VAL=1
    )
    assert (
        code is None
        and "note: DATA_DIR, SKIP_INITIAL_VAL: settings of other scripts, no effect here" in out
    )


def test_a_budget_above_the_contests_is_told(data, tmp_path):
    settings = {"PREQUANT_ONLY": 1, "ITERATIONS": 1}
    code, out = main(
        tmp_path, data, MAX_WALLCLOCK_SECONDS=1200, EVAL_BUDGET_SECONDS=900, **settings
    )
    notes = [line for line in out.splitlines() if "the contest allows 600 s" in line]
    assert code is None and [line.split(" is ")[0] for line in notes] == [
        "note: MAX_WALLCLOCK_SECONDS=1200",
        "note: EVAL_BUDGET_SECONDS=900",
    ]
    code, out = main(tmp_path, data, MAX_WALLCLOCK_SECONDS=600, RUN_ID="legal", **settings)
    assert code is None and "the contest allows" not in out


def test_leaked_documents_reach_the_result_and_its_violations(caseops, tmp_path):
    """Below a hundredth of the documents, above which such data is refused."""
    folder = copied(caseops[0], tmp_path / "data", "manifest.json")
    manifest = json.loads((caseops[0] / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"leaked_documents": 3}))
    settings = {"PREQUANT_ONLY": 1, "ITERATIONS": 1}
    train_gpt.find_guard()
    with pytest.MonkeyPatch.context() as patch:  # eight documents have no hundredth
        patch.setattr(sys.modules["golf_guard.dataset"], "check_manifest", lambda *_: None)
        code, out = main(tmp_path, folder, **settings)
    result = json.loads(out.splitlines()[-1].removeprefix("RESULT "))
    assert code is None and result["leaked_documents"] == 3
    assert result["violations"] == [
        "3 training documents are validation documents, says the dataset's manifest"
    ]
    code, out = main(tmp_path, caseops[0], RUN_ID="none", **settings)
    result = json.loads(out.splitlines()[-1].removeprefix("RESULT "))
    assert (result["leaked_documents"], result["violations"]) == (0, [])


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
def test_a_checkout_of_another_user_is_told_with_what_helps(data, tmp_path):
    code, out = main(
        tmp_path,
        data,
        PREQUANT_ONLY=1,
        ITERATIONS=1,
        GIT_TEST_ASSUME_DIFFERENT_OWNER=1,
        HOME=tmp_path,
    )
    assert (
        code is None and json.loads(out.splitlines()[-1].removeprefix("RESULT "))["commit"] is None
    )
    assert f"belongs to another user: git config --global --add safe.directory {ROOT}" in out


def test_compilation_without_a_compiler_is_refused(data, tmp_path):
    said = refusal(tmp_path, data, COMPILE=1, PATH=tmp_path)
    assert "torch.compile needs a compiler" in said and "COMPILE=0" in said


# ---- quantization


@pytest.mark.parametrize("place", [(2, 2), (1, 3)], ids=["on the diagonal", "beside it"])
def test_an_infinite_entry_of_a_hessian_is_refused_by_name(place):
    rng = torch.Generator().manual_seed(3)
    w, x = torch.randn(2, 6, 8, generator=rng), torch.randn(2, 40, 8, generator=rng)
    hessians = x.mT @ x
    hessians[1][place] = hessians[1][place[::-1]] = torch.inf
    with pytest.raises(ValueError, match="Hessian of second has infinite"):
        train_gpt.gptq_quantize(w, hessians, 6, 12.0, 0.01, ["first", "second"])


def test_dead_columns_count_in_the_mean_that_damps(monkeypatch):
    """Damping is a share of the mean over all columns, those that no input reaches among them
    with 0.
    """
    x = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(3))
    x[..., 4:] = 0.0
    hessian, seen, factor = x.mT @ x, [], train_gpt.damped_inverse_factor

    def watched(h, damping, names):
        seen.append(damping.clone())
        return factor(h, damping, names)

    monkeypatch.setattr(train_gpt, "damped_inverse_factor", watched)
    train_gpt.gptq_quantize(torch.randn(1, 6, 8), hessian, 6, 12.0, 0.01, ["half dead"])
    assert seen[0].item() == pytest.approx(0.01 * hessian[0].trace().item() / 8)


def test_calibration_sees_documents_apart_and_every_pass_of_a_loop(tmp_path, dist):
    """Packed rows give the Hessians of their documents one by one, head included, with all
    passes of the loop.
    """
    write_documents(tmp_path, "train", [20, 28, 9, 31, 14, 25, 30, 17, 11] * 8, seed=5)
    hp = small_hp(data_path=str(tmp_path), gptq_calibration_batches=3, balance_rows=False)
    model = make_model(hp)
    loader = train_gpt.TrainLoader(train_gpt.TokenStream(hp.data_path, "train"), hp, dist)
    with torch.no_grad():
        found = train_gpt.collect_hessians(model, loader, hp, dist)
        tap, documents = train_gpt.HessianTap(), 0
        for index in range(3):
            row = loader.row(index)
            borders = row.cu_seqlens.unique().tolist()
            for start, end in zip(borders, borders[1:], strict=False):
                inputs = row.inputs[:, start:end]
                hidden = model.forward_hidden(
                    inputs, max_seqlen=hp.train_seq_len, looping=True, tap=tap
                )
                tap.add(("lm_head", 0), hidden)
                documents += 1
    assert documents > 12
    want = {name: gram / 3 for name, gram in tap.hessians().items()}
    assert found.keys() == want.keys() and "tok_emb.weight" in want
    for name, gram in want.items():
        torch.testing.assert_close(
            found[name], gram, rtol=1e-4, atol=1e-4 * gram.diagonal().max().item()
        )


# ---- optimizer


def test_tables_that_are_read_row_by_row_learn_at_the_embeddings_rate(dist, published):
    hp = small_hp(bigram_vocab_size=20, value_embed_layers="0,2", tie_embeddings=False)
    model = make_model(hp)
    groups = train_gpt.Optimizers(model, hp, dist).adamw.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: (group["base_lr"], group["base_wd"])
        for group in groups
        for p in group["params"]
    }
    tables = {name for name, rate in rates.items() if rate == (hp.tied_embed_lr, hp.embed_wd)}
    assert tables == {"tok_emb", "lm_head", "bigram_table", "value_table"}
    assert {rate for name, rate in rates.items() if name not in tables} == {
        (hp.scalar_lr, hp.adam_wd)
    }


# ---- files that mean harm


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(data, trained, tmp_path):
    file = torch.load(trained / "runs" / "first" / "model.pt", weights_only=True)
    torch.save(file | {"harm": Harm(tmp_path / "done")}, tmp_path / "model.pt")
    said = refusal(tmp_path, data, QUANT_ONLY=1, CHECKPOINT_PATH=tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in said and not (tmp_path / "done").exists()


def test_a_bomb_of_brotli_takes_little_memory():
    """A few hundred bytes that expand to half a gigabyte, of which a thousand bytes are asked
    for.
    """
    bomb = train_gpt.brotli.compress(bytes(2**29), quality=5)
    assert len(bomb) < 10_000
    tracemalloc.start()
    try:
        with pytest.raises(train_gpt.ArtifactError, match="does not expand"):
            train_gpt.expand("brotli", bomb, 1000)
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


def forge(arrays, section, raw_digest):
    """A brotli artifact of one section around any list of arrays, all other digests right."""
    record = [len(section), train_gpt.digest(section).hex(), raw_digest.hex()]
    header = json.dumps([arrays, [record]]).encode()
    stored = train_gpt.brotli.compress(header)
    number = train_gpt.COMPRESSORS["brotli"].number
    prefix = train_gpt.PREFIX.pack(train_gpt.MAGIC, number, len(stored), len(header))
    return prefix + train_gpt.digest(prefix + stored) + stored + section


def test_a_header_that_claims_more_than_the_cap_in_all_is_refused():
    half = train_gpt.MAX_RAW_BYTES // 2
    arrays = [[f"w{number}", "int8", [half]] for number in range(3)]  # each alone is allowed
    with pytest.raises(train_gpt.ArtifactError, match=f"more than {train_gpt.MAX_RAW_BYTES} bytes"):
        train_gpt.unpack_weights(forge(arrays, b"bomb", bytes(8)))


def test_the_cap_on_raw_bytes_leaves_room_for_codes_of_a_bit_each():
    assert 8 * train_gpt.BYTE_CAP <= train_gpt.MAX_RAW_BYTES <= 1.1 * 8 * train_gpt.BYTE_CAP


REBUILD = """
import resource, sys
import train_gpt
from evaluation_helpers import make_model, small_hp
model = make_model(small_hp())
low = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    train_gpt.rebuild_model(model, sys.argv[1], train_gpt.Dist("cpu"))
except train_gpt.ArtifactError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - low) << 10)
"""


@pytest.mark.parametrize("name", ["blocks.0.mlp.c_fc.weight", "no.weight"])
def test_an_array_larger_than_its_weight_is_refused_before_it_takes_memory(name, tmp_path):
    """A few hundred bytes that expand to 64 MiB, which take over a gigabyte to be rebuilt."""
    rows, columns = 2**16, 2**10
    zeros = bytes(rows * columns + rows + columns)
    arrays = [
        [f"{name}:codes", "int8", [rows, columns]],
        [f"{name}:scale", "int8", [rows]],
        [f"{name}:column_steps", "int8", [columns]],
    ]
    section = train_gpt.brotli.compress(zeros, quality=5)
    blob = forge(arrays, section, train_gpt.digest(zeros))
    assert len(blob) < 1000
    (tmp_path / "artifact.bin").write_bytes(blob)
    command = [sys.executable, "-c", REBUILD, str(tmp_path / "artifact.bin")]
    environ = HERE | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    said, grown = done.stdout.splitlines()
    shape = f"({rows}, {columns})"
    assert said.endswith(f"artifact.bin: {name}:codes {shape} does not fit these settings")
    assert int(grown) < 2**26


# ---- ranks


def test_base_weights_are_fine_tuned_on_all_ranks_or_on_none(tmp_path, monkeypatch):
    """One rank of two is short of time after the first phase."""
    hp = small_hp(data_path=str(tmp_path), phased_ttt_prefix_docs=25_000)
    validation = make_validation(tmp_path, hp)
    models, adapted, scoring = [make_model(hp) for _ in range(2)], [], [False, False]
    run_steps = train_gpt.TestTimeTrainer.run_steps

    def noted_steps(trainer, steps):
        scoring[trainer.dist.rank] = True
        rest = run_steps(trainer, steps)
        scoring[trainer.dist.rank] = False
        return rest

    logs = [Lines(), Lines()]

    def is_short_for(progress, cost):
        return progress.log is logs[1] and not scoring[1]

    monkeypatch.setattr(train_gpt.TestTimeTrainer, "run_steps", noted_steps)
    monkeypatch.setattr(train_gpt.Progress, "is_short_for", is_short_for)
    monkeypatch.setattr(
        train_gpt.TestTimeTrainer,
        "global_adapt",
        lambda trainer, _: adapted.append(trainer.dist.rank),
    )
    on_ranks(
        2,
        lambda dist: train_gpt.TestTimeTrainer(
            models[dist.rank], validation, hp, dist, logs[dist.rank]
        ).evaluate(),
    )
    assert adapted == [] and all(
        "note: no time to fine-tune the base weights" in log for log in logs
    )


def test_quant_only_gives_every_rank_the_weights_of_the_checkpoint(data, trained, tmp_path):
    checkpoint = trained / "runs" / "first" / "model.pt"
    one = json.loads((trained / "runs" / "first" / "result.json").read_text())
    more = {"QUANT_ONLY": 1, "CHECKPOINT_PATH": checkpoint, "TTT_ENABLED": 0, "SEED": 7}
    two = result_of(torchrun(2, ROOT / "train_gpt.py", **environ_of(tmp_path, data, more)))
    assert two["scores"]["prequant"]["loss"] == pytest.approx(
        one["scores"]["prequant"]["loss"], rel=1e-6
    )
