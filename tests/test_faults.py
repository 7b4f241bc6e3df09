"""Faults that real use has found: each test is the case as a user met it, with the right answer.

Whole runs are processes of their own, so that the tests outlive changes inside the program.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shard
from test_end_to_end import finish, make_data, result_of, start

import train_gpt

pytest.importorskip("brotli")
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("python_minifier")
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A CaseOps dataset of 40 small training documents and 10 of validation, with a side-car and no manifest."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def begin(folder, data_path, **settings):
    """A tiny run whose runs lie in `folder` -> Popen. Settings with the value None are left out of its environment."""
    settings = {"DATA_PATH": str(data_path), "RUNS_DIR": str(folder / "runs"), "PLOTS": "0",
                "SLIDING_WINDOW_ENABLED": "0"} | settings
    left_out = {name: "" for name, value in settings.items() if value is None}
    command = ["-c", WITHOUT.format(names=[*left_out], script=str(SCRIPT))] if left_out else [SCRIPT]
    return start(*command, **{name: str(value) for name, value in settings.items() if value is not None})


WITHOUT = """
import os, runpy, sys
for name in {names}:
    os.environ.pop(name, None)
sys.argv = [{script!r}]
sys.path.insert(0, os.path.dirname({script!r}))
runpy.run_path({script!r}, run_name="__main__")
"""


def refusal(folder, data_path, **settings):
    """What a run says that must be refused before training, in one line for each problem."""
    code, out, err = finish(begin(folder, data_path, **settings))
    assert code == 1, out + err
    assert "Traceback" not in err and "step:" not in out and "RESULT" not in out
    assert err.startswith("train_gpt.py cannot run: ")
    return err


# ---- data without a side-car: the tokenizer counts the bytes


TEXT = """The byte counts of a text come from the pieces that its own tokenizer made of it, and another tokenizer of the
same size counts other bytes without any error. Rivers carry sand and stones from the mountains to the plains, where the
water is slow; in spring the snow melts and the meadows are flooded. A letter takes four days to the coast, but only two
in summer, when the road over the pass is open. Bread is made of flour, water, salt and time."""


def train_model(path, text, size):
    sentences = [text[start:start + 60] for start in range(0, len(text) - 60, 3)]
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=size, model_type="bpe", pad_id=0,
            bos_id=1, eos_id=2, unk_id=3, byte_fallback=True, hard_vocab_limit=False,
            normalization_rule_name="identity", minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Plain shards, their tokenizer own.model, another.model of equal size in the same folder, the text's bytes."""
    folder = tmp_path_factory.mktemp("plain")
    own = train_model(folder / "own.model", TEXT, 320)
    other = train_model(folder / "another.model", TEXT[::-1].upper(), 320)
    assert own.vocab_size() == other.vocab_size()
    words = TEXT.split()
    texts = [" ".join(words[start:start + 24]) for start in range(40)]
    ids = [[train_gpt.BOS_ID, *own.encode(text)] for text in texts]
    write_shard(folder / "fineweb_train_000000.bin", np.concatenate(ids * 3))
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate(ids))
    return folder, own.vocab_size(), sum(len(text.encode()) for text in texts)


def test_a_tokenizer_is_not_guessed_among_several(plain, tmp_path):
    folder, size, _ = plain
    said = refusal(tmp_path, folder, CASEOPS_ENABLED=0, VOCAB_SIZE=size, TOKENIZER_PATH=None)
    assert "own.model" in said and "another.model" in said and "set TOKENIZER_PATH" in said


def test_a_foreign_tokenizer_of_equal_size_counts_no_bytes(plain, tmp_path):
    folder, size, _ = plain
    said = refusal(tmp_path, folder, CASEOPS_ENABLED=0, VOCAB_SIZE=size, TOKENIZER_PATH=folder / "another.model")
    assert "not made by the tokenizer" in said


def test_the_own_tokenizer_counts_the_bytes_of_the_text(plain, tmp_path):
    folder, size, num_bytes = plain
    result = result_of(begin(tmp_path, folder, CASEOPS_ENABLED=0, VOCAB_SIZE=size, TTT_ENABLED=0,
                             TOKENIZER_PATH=folder / "own.model"))
    assert result["scores"]["quantized"]["bytes"] == num_bytes
