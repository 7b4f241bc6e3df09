"""Data of plain SentencePiece tokenizers: bytes are exact or refused, and what is wrong is named."""

import json

import numpy as np
import pytest

import train_gpt
from prepare_caseops_data import DEFAULT_TOKENIZER, DataError, load_tokenizer, only_run_in
from tools import prepare_plain_data
from train_gpt import BOS_ID, TokenStream

WORDS = "the cat sat on a mat and Saw 17 dogs run far away from that old house of Wood".split()
TRAIN = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(1, 90)) for i in range(80)]
ODD = [
    "the cat sat",
    "Two  spaces,\ttab\r\nand lines\n\n",
    " a space begins it",
    "   three spaces begin it, two end it  ",
    "\n the newline is no space",
    "\u00a0a space that is none",
    "\u3000wide \ufeff \u200b\u200d zero \u00ad",
    "\0\x01\x07 control \x7f\x85",
    "<s> </s> <unk> <pad> <0x41> are words here",
    "été 東京 🗼 ½ ﬁne \ufffd \ue001A",
    "e\u0301 is two characters",
    "\u2580\u2582 next to the space mark",
]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def make(folder, train, val, *arguments):
    """Exit status of the command; its data are in folder/plain."""
    files = [write(folder / "train.jsonl", train), "--val-file", write(folder / "val.jsonl", val)]
    return prepare_plain_data.main(
        [*files, "--out", str(folder / "plain"), "--vocab-sizes", "300", *arguments]
    )


def test_the_trainer_counts_the_bytes_of_every_odd_text(tmp_path, published):
    """All but a space that begins a document, which goes uncounted: a byte too many would
    flatter.
    """
    assert make(tmp_path, TRAIN, ODD) == 0
    hp = train_gpt.Hyperparameters(
        caseops_enabled=False, vocab_size=300, data_path=str(tmp_path / "plain" / "sp300")
    )
    validation = train_gpt.ValidationSet(hp)
    counted = [validation.targets_of(np.array([number]))[1] for number in range(len(ODD))]
    assert counted == [len(text.encode()) - text.startswith(" ") for text in ODD]
    assert validation.bytes.sum() == sum(counted)


@pytest.mark.parametrize("text", ["\u2581", "a literal \u2581 in the text", "\u2581" * 40])
def test_a_space_mark_in_a_validation_document_is_refused(tmp_path, capsys, text):
    """38 of 44 bytes would be counted."""
    assert make(tmp_path, TRAIN, ["one", text, "three"]) == 1
    message = capsys.readouterr().err
    assert f"val.jsonl, line 2: U+2581 at character {text.index(chr(0x2581))}" in message
    assert not (tmp_path / "plain").exists()


def test_a_space_mark_in_training_is_a_space_and_hides_no_copy(tmp_path):
    val = ["a document of validation"]
    assert make(tmp_path, [*TRAIN, val[0].replace(" ", "\u2581"), "two\u2581words"], val) == 0
    folder = tmp_path / "plain" / "sp300"
    stream = TokenStream(str(folder), "train")
    tokens = stream.read(0, stream.size)
    assert (tokens == BOS_ID).sum() == len(TRAIN) + 1
    model = prepare_plain_data.sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "plain_300.model")
    )
    assert model.decode(tokens[np.flatnonzero(tokens == BOS_ID)[-1] + 1 :].tolist()) == "two words"


def test_pieces_that_do_not_stand_for_the_text_are_noticed():
    """A tokenizer that folds spaces and characters: whatever the reason, no wrong count is
    written.
    """
    tokenizer = load_tokenizer(DEFAULT_TOKENIZER)
    prepare_plain_data.check_bytes(tokenizer, ["plain words"])
    for text in ("two  spaces", "\ufb01ne", "line\n"):
        with pytest.raises(DataError, match="validation document 1: its pieces stand for"):
            prepare_plain_data.check_bytes(tokenizer, ["plain words", text])


@pytest.mark.parametrize("file", ["train", "val"])
def test_a_lone_surrogate_is_refused_with_file_and_line(tmp_path, capsys, file):
    texts = {"train": TRAIN, "val": ["one", "two", "three"]}
    texts[file] = [*texts[file][:2], "a lone \ud83d", *texts[file][2:]]
    assert make(tmp_path, **texts) == 1
    message = capsys.readouterr().err
    assert f"{file}.jsonl, line 3: lone surrogate U+D83D at character 7" in message
    assert not (tmp_path / "plain" / "sp300").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--vocab-sizes=abc",
            "argument --vocab-sizes: abc is not a whole number from 265 to 65,536",
        ),
        ("--vocab-sizes=300,", "argument --vocab-sizes:  is not a whole number"),
        ("--vocab-sizes=300,0", "argument --vocab-sizes: 0 is not a whole number"),
        ("--vocab-sizes=1e3", "argument --vocab-sizes: 1e3 is not a whole number"),
        ("--vocab-sizes=300,300", "argument --vocab-sizes: 300,300 names a size twice"),
        ("--tokenizer-bytes=0", "argument --tokenizer-bytes: 0 is not a whole number of 1 or more"),
        ("--tokenizer-bytes=all", "argument --tokenizer-bytes: all is not a whole number"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused_by_its_name(tmp_path, capsys, option, message):
    with pytest.raises(SystemExit) as ended:
        make(tmp_path, TRAIN, ["one"], option)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_vocabulary_too_large_for_the_text_is_one_message_and_leaves_no_dataset(tmp_path, capsys):
    assert make(tmp_path, TRAIN, ["one"], "--vocab-sizes", "60000") == 1
    assert "error: no tokenizer of 60,000 pieces from this text" in capsys.readouterr().err
    assert make(tmp_path, TRAIN, ["one"]) == 0
    assert make(tmp_path, TRAIN, ["one"]) == 1
    assert "sp300 is there already: remove it or change --out" in capsys.readouterr().err


def test_two_runs_do_not_write_into_one_folder(tmp_path, capsys):
    (tmp_path / "plain").mkdir()
    with only_run_in(tmp_path / "plain"):
        assert make(tmp_path, TRAIN, ["one"]) == 1
    assert "plain is in use by another run" in capsys.readouterr().err
    assert make(tmp_path, TRAIN, ["one"]) == 0


NO_VALIDATION, NO_TRAINING = (TRAIN, ["", " \n"], "val"), ([TRAIN[0]] * 9, [TRAIN[0]], "train")


@pytest.mark.parametrize(("train", "val", "split"), [NO_VALIDATION, NO_TRAINING])
def test_a_split_without_documents_is_an_error(tmp_path, capsys, train, val, split):
    assert make(tmp_path, train, val) == 1
    message = capsys.readouterr().err
    assert {"val": "no documents for val", "train": "there is no text to train a tokenizer on"}[
        split
    ] in message
    assert not (tmp_path / "plain" / "sp300").exists()
