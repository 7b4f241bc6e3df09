"""Shards to another tokenizer, and the training of tokenizers without validation documents."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import load_script
from data_helpers import TEXTS, build, stream, write_docs

import prepare_caseops_data as prepare
from lossless_caps import CONTROLS, decode
from prepare_caseops_data import (
    DEFAULT_TOKENIZER,
    DataError,
    encode_document,
    load_tokenizer,
    main,
    read_manifest,
    write_shard,
)
from tools import retokenize
from tools.retokenize import costs_of_bytes

ROOT = Path(__file__).resolve().parents[1]
train_tokenizer = load_script("tokenizers/train_tokenizer.py")
WORDS = (
    "the Shape of an ARRAY is kept while Rows and columns are Read from left TO right by everyone"
    " who looks".split()
)
SENTENCES = [" ".join(random.Random(seed).choices(WORDS, k=40)) for seed in range(200)]


def train(out, docs, *arguments):
    command = [
        sys.executable,
        "tokenizers/train_tokenizer.py",
        str(docs),
        "--out",
        str(out),
        "--vocab-size",
        "320",
    ]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer of 320 pieces, trained on all sentences but the first ten."""
    folder = tmp_path_factory.mktemp("tokenizer")
    run = train(
        folder / "small.model", write_docs(folder / "docs.jsonl", SENTENCES), "--val-docs", "10"
    )
    assert run.returncode == 0, run.stderr
    assert "190 documents" in run.stdout and "layout" in run.stdout
    assert "train on more text" not in run.stderr
    return folder / "small.model"


def split_documents(folder, name):
    tokens, charges = (
        stream(folder, name)[0],
        (stream(folder, "val_bytes")[0] if name == "val" else None),
    )
    starts = np.flatnonzero(tokens == 1)
    return np.split(tokens, starts[1:]), charges is not None and np.split(charges, starts[1:])


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_bos_and_bytes_are_kept(small, tmp_path, workers):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS + SENTENCES[:20])
    build(tmp_path / "old", "--docs", docs, "--val-docs", 12, "--shard-tokens", 100)
    command = [
        "retokenize",
        str(tmp_path / "old"),
        "--old-tokenizer",
        str(DEFAULT_TOKENIZER),
        "--tokenizer",
    ]
    command += [
        str(small),
        "--out",
        str(tmp_path / "new"),
        "--shard-tokens",
        "90",
        "--workers",
        str(workers),
    ]
    assert main(command) == 0
    old_sp, new_sp = load_tokenizer(DEFAULT_TOKENIZER), load_tokenizer(small)
    for split, texts in (("val", TEXTS[:12]), ("train", (TEXTS + SENTENCES)[12 : len(TEXTS) + 20])):
        (old, old_charges), (new, new_charges) = (
            split_documents(tmp_path / name, split) for name in ("old", "new")
        )
        assert len(old) == len(new) == len(texts)
        for number, text in enumerate(texts):
            assert old_sp.decode(old[number].tolist()) == new_sp.decode(new[number].tolist())
            # nothing was lost: as if made from the documents
            if text == " ".join(text.split()) and text.isascii():
                assert new[number].tolist() == encode_document(new_sp, text).tolist()
                assert decode(new_sp.decode(new[number].tolist())) == text
            if split == "val":
                assert (
                    new_charges[number].sum() == old_charges[number].sum()
                    and new_charges[number][0] == 0
                )
                assert (
                    not new_charges[number][(new[number] >= 4) & (new[number] <= 7)].any()
                    or "\ue001" in text
                )
    assert main(["verify", str(tmp_path / "new"), "--tokenizer", str(small), "--workers", "1"]) == 0
    manifest = read_manifest(tmp_path / "new")
    assert manifest["tokenizer"]["vocab_size"] == 320
    assert manifest["sources"][0]["split_rule"].startswith("the first 12 documents")


def test_long_documents_are_retokenized_in_blocks_as_if_whole(small, tmp_path, monkeypatch):
    rng = random.Random(4)
    odd = [
        "\u6771\u4eac",
        "\u00bd",
        "e\u0301t",
        "  ",
        "\ue001",
        "Me",
        "\x07",
        "\u3000",
        "12",
        "\U0001f5fc",
        "\n",
    ]
    texts = [
        "".join(rng.choice([*odd, " the Shape", " of", " ARRAY"]) for _ in range(60))
        for _ in range(40)
    ]
    docs = write_docs(tmp_path / "docs.jsonl", texts)
    build(tmp_path / "old", "--docs", docs, "--val-docs", 30)

    def retokenized(name):
        command = [
            "retokenize",
            str(tmp_path / "old"),
            "--old-tokenizer",
            str(DEFAULT_TOKENIZER),
            "--tokenizer",
        ]
        assert main([*command, str(small), "--out", str(tmp_path / name), "--workers", "1"]) == 0
        return {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}

    whole = retokenized("whole")
    monkeypatch.setattr(prepare, "BLOCK_CHARS", 9)
    monkeypatch.setattr(retokenize, "PIECES_AT_ONCE", 5)
    assert retokenized("blocks") == whole


def test_charges_are_laid_on_bytes_with_the_same_sum():
    pieces = [b"the", b"\xc3", b"\xa9", b" ", b"fi"]
    charges = np.array([3, 0, 2, 3, 1])
    assert costs_of_bytes(pieces, charges).tolist() == [1, 1, 1, 0, 2, 3, 1, 0]


def test_another_old_tokenizer_is_refused(small, tmp_path, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    build(tmp_path / "old", "--docs", docs, "--val-docs", 6)
    command = [
        "retokenize",
        str(tmp_path / "old"),
        "--old-tokenizer",
        str(small),
        "--tokenizer",
        str(small),
        "--out",
    ]
    assert main([*command, str(tmp_path / "new"), "--workers", "1"]) == 1
    assert "names another tokenizer" in capsys.readouterr().err
    (tmp_path / "old" / "manifest.json").unlink()
    assert main([*command, str(tmp_path / "new"), "--workers", "1"]) == 1
    assert "val document 0" in capsys.readouterr().err
    write_shard(tmp_path / "old" / "fineweb_val_bytes_000000.bin", [0, 1])
    command[3] = str(DEFAULT_TOKENIZER)
    assert main([*command, str(tmp_path / "other"), "--workers", "1"]) == 1


# ---- training a tokenizer ------------------------------------------------------------------------


def test_a_trained_tokenizer_has_the_layout(small):
    sp = load_tokenizer(small)
    assert 264 < sp.get_piece_size() <= 320 and sp.piece_to_id("\u2581") > 264


def test_a_layout_that_is_not_the_published_ones_is_refused(tmp_path):
    model = tmp_path / "digits.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["year 1999 and 1998 or 1997 " * 20] * 9),
            model_writer=file,
            model_type="bpe",
            vocab_size=300,
            byte_fallback=True,
            hard_vocab_limit=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            add_dummy_prefix=False,
            user_defined_symbols=list(CONTROLS),
            minloglevel=2,
        )
    with pytest.raises(DataError, match="a digit beside others"):
        train_tokenizer.check_layout(model)


def test_validation_documents_are_not_trained_on(tmp_path):
    secret = "xylophone zugzwang " * 30
    docs = write_docs(tmp_path / "docs.jsonl", [secret, *SENTENCES[:50], secret])
    run = train(tmp_path / "a.model", docs, "--val-docs", "1")
    assert (
        run.returncode == 0
        and "50 documents" in run.stdout
        and "1 training document that is" in run.stdout
    )
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    assert not any("xy" in sp.id_to_piece(index) for index in range(264, sp.get_piece_size()))
    val = write_docs(tmp_path / "val.jsonl", [secret])
    again = train(tmp_path / "b.model", docs, "--val-file", val)
    assert again.returncode == 0 and "50 documents" in again.stdout
    assert (tmp_path / "b.model").read_bytes() == (tmp_path / "a.model").read_bytes()


def test_only_the_first_documents_are_trained_on_if_so_wanted(tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", SENTENCES[:60])
    run = train(tmp_path / "part.model", docs, "--val-docs", "2", "--train-docs", "40")
    assert run.returncode == 0 and "40 documents" in run.stdout
    alone = write_docs(tmp_path / "alone.jsonl", SENTENCES[2:42])
    assert train(tmp_path / "alone.model", alone, "--val-docs", "0").returncode == 0
    assert (tmp_path / "part.model").read_bytes() == (tmp_path / "alone.model").read_bytes()


def test_no_documents_behind_validation_are_an_error(tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", SENTENCES[:3])
    run = train(tmp_path / "a.model", docs)
    assert (
        run.returncode == 1 and "--val-docs" in run.stderr and not (tmp_path / "a.model").exists()
    )
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("wrong", [b'"a lone \\ud83d"', b'{"title": "no text"}', b'{"text": "cut'])
@pytest.mark.parametrize("in_validation", [False, True])
def test_a_document_that_cannot_be_read_is_named_and_no_model_is_left(
    tmp_path, wrong, in_validation
):
    """It was a traceback, and a file of 0 bytes was left."""
    model, docs = tmp_path / "a.model", tmp_path / "docs.jsonl"
    lines = [b'"a sentence of some words"'] * 20
    lines[3 if in_validation else 12] = wrong
    docs.write_bytes(b"\n".join(lines))
    run = train(model, docs, "--val-docs", "5")
    number = 4 if in_validation else 13
    assert run.returncode == 1 and f"docs.jsonl, line {number}: " in run.stderr
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == [docs]


def test_a_vocabulary_that_cannot_be_trained_is_one_message_and_no_model_is_left(tmp_path):
    model = tmp_path / "a.model"
    docs = write_docs(tmp_path / "docs.jsonl", ["".join(map(chr, range(0x4E00, 0x4F00)))] * 20)
    run = train(model, docs, "--val-docs", "0", "--vocab-size", "265")
    assert run.returncode == 1 and "error: no tokenizer of 265 pieces from this text" in run.stderr
    assert "Traceback" not in run.stderr and not model.exists()


def test_a_model_that_is_there_is_never_overwritten(tmp_path):
    """The command of tokenizers/README.md wrote over the tokenizer of the repository."""
    model = tmp_path / "a.model"
    model.write_bytes(b"what was there")
    run = train(model, write_docs(tmp_path / "docs.jsonl", SENTENCES), "--val-docs", "0")
    assert run.returncode == 1 and "a.model exists: remove it" in run.stderr
    assert model.read_bytes() == b"what was there"


def test_fewer_pieces_than_asked_for_are_told(tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", SENTENCES)
    run = train(tmp_path / "a.model", docs, "--val-docs", "0", "--vocab-size", "8192")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    pieces = sp.get_piece_size()
    assert run.returncode == 0 and 320 < pieces < 8192
    assert run.stderr.endswith(
        f"the text gave {pieces} of 8,192 pieces: train on more text, or set VOCAB_SIZE={pieces}"
        " for the runs\n"
    )
    assert "pieces: train on more" not in train(tmp_path / "b.model", docs).stderr


@pytest.mark.parametrize("copy", ["{}\n", "  {}", "{}\0", "\t{} \n"])
def test_a_copy_with_other_blanks_around_it_is_not_trained_on(tmp_path, copy):
    """What is trained on is stripped, so it is a validation document to the letter."""
    secret = "xylophone zugzwang " * 30
    docs = write_docs(tmp_path / "docs.jsonl", [secret, *SENTENCES[:50], copy.format(secret)])
    run = train(tmp_path / "a.model", docs, "--val-docs", "1")
    assert (
        run.returncode == 0
        and "50 documents" in run.stdout
        and "1 training document that is" in run.stdout
    )


@pytest.mark.parametrize(
    "option", ["--vocab-size=abc", "--vocab-size=264", "--vocab-size=1e4", "--val-docs=-1"]
)
def test_arguments_that_make_no_sense_are_refused_by_name(tmp_path, option):
    run = train(tmp_path / "a.model", "nowhere.jsonl", option)
    name, value = option.split("=")
    assert run.returncode == 2 and f"argument {name}: {value} is not a whole number" in run.stderr


def test_a_folder_that_is_not_there_is_said_before_training(tmp_path):
    run = train(tmp_path / "nowhere" / "a.model", "docs.jsonl")
    assert run.returncode == 1 and "nowhere: no such folder (--out)" in run.stderr
