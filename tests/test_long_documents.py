"""Long documents: taken in blocks, in little memory, and token for token as if taken whole."""

import json
import random

import pytest
from data_helpers import PUBLISHED, TINY_TOKENIZER, grown_by, needs_published, refused, write_docs

import lossless_caps
import prepare_caseops_data as prepare
from lossless_caps import CONTROLS
from prepare_caseops_data import (
    DEFAULT_TOKENIZER,
    DataError,
    Encoder,
    encode_document,
    encode_document_with_bytes,
    load_tokenizer,
    normalize_text,
)

CHARACTERS = (
    "abAB  \n\t\r\v\f.,('1"
    "\u00e9\u6771\u4eac\u304b\u304c\u3099\u1100\u1161\uac00\u11a8\U0001f5fc\u00bd\ufb01\u2026\u2019"
    "\u0301\u0308\u0338\x07\xa0\u3000\u2581\u200b\x1c\x85<Z=\u0434\u0111\u0131\u03b1" + CONTROLS
)
WORDS = "the of and Prairie NASA iPhone don't \u6771\u4eac 42 3.14 -- e\u0301te\u0301".split()


def odd_texts(count):
    rng = random.Random(5)
    for number in range(count):
        if number % 2:
            yield "".join(rng.choices(CHARACTERS, k=rng.randrange(120)))
        else:
            yield "".join(
                rng.choice(WORDS) + rng.choice(["", " ", " ", "\n", "  "])
                for _ in range(rng.randrange(30))
            )


def take_small_blocks(monkeypatch, size):
    monkeypatch.setattr(prepare, "BLOCK_CHARS", size)
    monkeypatch.setattr(prepare, "LONGEST_BLOCK_CHARS", 500)
    monkeypatch.setattr(lossless_caps, "_BLOCK", size)


@pytest.mark.parametrize(
    ("path", "size"),
    [
        (DEFAULT_TOKENIZER, 1),
        (DEFAULT_TOKENIZER, 3),
        (DEFAULT_TOKENIZER, 20),
        pytest.param(PUBLISHED, 3, marks=needs_published),
    ],
)
def test_blocks_give_the_tokens_and_bytes_of_the_whole(monkeypatch, path, size):
    sp = load_tokenizer(path)
    texts = list(odd_texts(200))
    whole = [encode_document_with_bytes(sp, text) for text in texts]
    transformed = [lossless_caps.encode(text) for text in texts]
    take_small_blocks(monkeypatch, size)
    blocks = 0
    for text, (ids, costs), encoded in zip(texts, whole, transformed, strict=True):
        assert lossless_caps.encode(text) == encoded
        parts = [block for block, _ in prepare._blocks(sp, encoded)]
        assert "".join(parts) == encoded
        blocks += len(parts)
        got_ids, got_costs = encode_document_with_bytes(sp, text)
        assert got_ids.tolist() == ids.tolist() == encode_document(sp, text).tolist(), ascii(text)
        assert got_costs.tolist() == costs.tolist(), ascii(text)
        encoder = Encoder(sp)
        assert encoder.encode(text).tolist() == ids.tolist()
        assert encoder.encode_with_bytes(text)[1].tolist() == costs.tolist()
    assert blocks > 2 * len(texts)


def test_normalizing_by_blocks_gives_what_the_whole_gives(monkeypatch):
    rng = random.Random(6)
    parts = [
        "www.x.org/" + "a" * 50,
        "https://y.org/" + "b1" * 30,
        "=" * 12,
        "Zq+/" * 40,
        "\x07",
        "word",
        *" \n\t",
    ]
    texts = ["".join(rng.choices(parts, k=rng.randrange(30))) for _ in range(300)]
    whole = [normalize_text(text) for text in texts]
    monkeypatch.setattr(prepare, "BLOCK_CHARS", 7)
    assert [normalize_text(text) for text in texts] == whole


def test_a_text_without_a_place_to_cut_is_refused_with_its_document(tmp_path, capsys, monkeypatch):
    take_small_blocks(monkeypatch, 50)
    docs = write_docs(tmp_path / "docs.jsonl", ["one", "two " * 200, "ab" * 400, "four"])
    for val_docs, document in ((1, "train document 1"), (3, "val document 2")):
        message = refused(
            capsys, "--docs", docs, "--val-docs", val_docs, "--out", tmp_path / f"out{val_docs}"
        )
        assert document in message and "line 4" in message
        assert (
            "500 characters from 'ababababababababab" in message
            and "without a place to cut" in message
        )


def test_a_tokenizer_that_does_not_suit_blocks_is_refused(tmp_path, monkeypatch):
    settings = TINY_TOKENIZER | {"split_by_whitespace": False}
    model = tmp_path / "phrases.model"
    model.write_bytes(prepare.train_sentencepiece(["a cat a cat a cat and a dog"] * 20, **settings))
    sp = load_tokenizer(model)
    take_small_blocks(monkeypatch, 20)
    with pytest.raises(DataError, match="pieces that reach over spaces"):
        encode_document(sp, "the cat sat on the mat and so on")


# ---- memory --------------------------------------------------------------------------------------


def prose(rng, size):
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(1, 10))) for _ in range(3000)]
    return " ".join(rng.choice(words) for _ in range(size // 6))


def ideographs(rng, size):
    return "".join(map(chr, rng.choices(range(0x4E00, 0x9000), k=size // 3)))


@pytest.mark.parametrize(("make", "size"), [(prose, 4_000_000), (ideographs, 2_000_000)])
def test_memory_grows_by_little_for_a_long_document(tmp_path, make, size):
    """2 GB for 50 MB leaves 40 bytes a byte, and a block of 100 MB or so whatever the size.

    It was over 200 a byte.
    """
    documents = [make(random.Random(1), size), "a short document"]
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in documents))
    grown = grown_by("--docs", docs, "--val-docs", 1, "--out", tmp_path / "out", "--workers", 1)
    assert grown < 40 * size + 150_000_000


def test_a_text_that_would_take_more_memory_is_refused_with_its_document(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(prepare, "LONGEST_TEXT", 100)
    docs = write_docs(tmp_path / "docs.jsonl", ["one", "\u6771" * 33 + "a", "\u6771" * 33 + "ab"])
    message = refused(capsys, "--docs", docs, "--val-docs", 1, "--out", tmp_path / "out")
    assert "train document 1 (" in message and "line 4): a text of more than 100 bytes" in message


def test_documents_ahead_are_few_where_they_are_long(monkeypatch):
    """A worker's queue is bounded in bytes, not only in batches."""
    monkeypatch.setattr(prepare, "BATCH_BYTES", 100)
    ahead = []

    class Pool:
        def __init__(self, workers, mp_context, initializer):
            pass

        def submit(self, function, batch):
            ahead.append(batch)
            return prepare.Future()

        def shutdown(self, cancel_futures):
            pass

    monkeypatch.setattr(prepare, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(prepare.Future, "result", lambda future: ahead.pop(0))
    lines = [
        prepare.Line("docs", number, b"x" * size)
        for number, size in enumerate([90, 90, 5000, 5000, 90, 90] * 5)
    ]
    most = 0
    for _ in prepare.map_in_order(len, prepare.make_batches("train", lines, 0, 0), 2):
        most = max(most, sum(len(line.content) for batch in ahead for line in batch.lines))
    assert not ahead and most <= 5000 + 2 * 90
