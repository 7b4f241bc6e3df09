"""The capitals transform against the published vectors, and against a second implementation,
written rule by rule.
"""

import itertools
import json
import random
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lossless_caps
from lossless_caps import ALLCAPS, CAPNEXT, CONTROLS, ESC, TITLE, CapsError, decode, encode

VECTORS = json.loads(
    (Path(__file__).parent / "data" / "caseops_vectors.json").read_text(encoding="utf-8")
)
SMALL, CAPITALS = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ADVERSARIAL = (
    "abzABZ" + CONTROLS + " 1'-_\0\n\ue000\ue005éÉßıİſKσΣdžDžfiA𝐀\u0301\u2019\ud800\udfff\U0010ffff"
)


# ---- the second implementation -------------------------------------------------------------------


def is_letter(char):
    return char in SMALL or char in CAPITALS


def plain_encode(text):
    """The encoder, character by character: see the table of markers in lossless_caps.py."""
    out = []
    position = 0
    while position < len(text):
        char = text[position]
        if char in CONTROLS:
            out += [ESC, char]
            position += 1
        elif not is_letter(char):
            out.append(char)
            position += 1
        else:
            end = position
            while end < len(text) and is_letter(text[end]):
                end += 1
            out.append(plain_encode_word(text[position:end]))
            position = end
    return "".join(out)


def plain_encode_word(word):
    if not any(char in CAPITALS for char in word):
        return word
    if len(word) >= 2 and all(char in CAPITALS for char in word):
        return ALLCAPS + word.lower()
    marks = [
        (TITLE if index == 0 else CAPNEXT) if char in CAPITALS else ""
        for index, char in enumerate(word)
    ]
    return "".join(mark + char.lower() for mark, char in zip(marks, word, strict=True))


def plain_decode(text):
    """The decoder as a list of rules; None where the text must be refused."""
    out, mode = [], None
    escape = capnext = in_word = shouting = False
    for char in text:
        letter = is_letter(char)
        if escape:  # rule 1
            if mode is not None and not letter:
                return None
            out.append(char)
            escape, in_word = False, letter
            if not letter:
                shouting = False
        elif char == ESC:  # rule 2
            escape = True
        elif char == TITLE or char == ALLCAPS:  # rule 3
            if mode is not None or in_word or capnext:
                return None
            mode = char
        elif char == CAPNEXT:  # rule 4
            if capnext:
                return None
            capnext = True
        elif letter and not in_word:  # rule 5
            out.append(char.upper() if mode is not None or capnext else char)
            if mode == ALLCAPS:
                shouting = True
            mode, capnext, in_word = None, False, True
        elif letter:  # rule 6
            if mode is not None:
                return None
            out.append(char.upper() if shouting or capnext else char)
            capnext = False
        else:  # rule 7
            if mode is not None or capnext:
                return None
            out.append(char)
            in_word = shouting = False
    return None if escape or capnext or mode is not None else "".join(out)


def decode_or_none(text):
    try:
        return decode(text)
    except CapsError:
        return None


# ---- vectors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["name"])
def test_published_vectors(vector):
    assert encode(vector["text"]) == vector["encoded"]
    assert decode(vector["encoded"]) == vector["text"]


@pytest.mark.parametrize("vector", VECTORS["decode_must_reject"], ids=lambda vector: vector["repr"])
def test_what_the_published_decoder_rejects_is_rejected_with_its_position(vector):
    with pytest.raises(CapsError, match=r"^position \d+: .*(TITLE|CAPNEXT|ESC)"):
        decode(vector["encoded"])


@pytest.mark.parametrize(
    "vector", VECTORS["decode_accepts_noncanonical"], ids=lambda vector: ascii(vector["encoded"])
)
def test_what_the_published_decoder_reads_leniently_is_read(vector):
    assert decode(vector["encoded"]) == vector["text"]


@pytest.mark.parametrize(
    ("encoded", "position"),
    [("a" + TITLE + "b", 1), ("ab " + TITLE, 4), ("ok " + CAPNEXT * 2 + "a", 4), ("a" + ESC, 2)],
)
def test_an_error_says_where(encoded, position):
    with pytest.raises(CapsError, match=rf"^position {position}: "):
        decode(encoded)


# ---- every character, every short string ---------------------------------------------------------


def test_every_code_point_between_capitals():
    ordinary = [
        char
        for char in map(chr, range(sys.maxunicode + 1))
        if not is_letter(char) and char not in CONTROLS
    ]
    assert len(ordinary) == 1_114_112 - 52 - 4
    text = "".join(f"A{char}B " for char in ordinary)
    encoded = encode(text)
    assert encoded == "".join(f"{TITLE}a{char}{TITLE}b " for char in ordinary)
    assert decode(encoded) == text
    for char in SMALL + CAPITALS + CONTROLS:
        assert encode(f"A{char}B") == plain_encode(f"A{char}B")
        assert decode(encode(f"A{char}B")) == f"A{char}B"


def test_every_code_point_alone_passes_or_is_marked():
    changed = [char for char in map(chr, range(sys.maxunicode + 1)) if encode(char) != char]
    assert changed == [*CAPITALS, *CONTROLS]


def test_every_short_string_decodes_as_the_rules_say():
    accepted = 0
    for length in range(7):
        for chars in itertools.product("aB " + CONTROLS, repeat=length):
            text = "".join(chars)
            expected = plain_decode(text)
            accepted += expected is not None
            assert decode_or_none(text) == expected, ascii(text)
    assert 1_000 < accepted < 136_000  # of 137,257: neither all nor none


def test_every_short_string_encodes_as_the_rules_say():
    for length in range(7):
        for chars in itertools.product("abAB1" + ESC, repeat=length):
            text = "".join(chars)
            assert encode(text) == plain_encode(text), ascii(text)


# ---- random strings ------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from(ADVERSARIAL)) | st.text(st.characters(exclude_categories=())))
def test_encode_agrees_with_the_rules_and_returns(text):
    encoded = encode(text)
    assert encoded == plain_encode(text)
    assert decode(encoded) == text
    assert not set(encoded) & set(CAPITALS)


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from(ADVERSARIAL)))
def test_decode_agrees_with_the_rules_on_any_text(text):
    assert decode_or_none(text) == plain_decode(text)


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("abAB1 É" + CONTROLS)), st.data())
def test_decode_agrees_with_the_rules_on_damaged_encodings(text, data):
    encoded = encode(text)
    cut = data.draw(st.integers(0, len(encoded)))
    damaged = (
        encoded[:cut] + data.draw(st.sampled_from(["", *CONTROLS, "a", " "])) + encoded[cut + 1 :]
    )
    assert decode_or_none(damaged) == plain_decode(damaged)


def test_long_random_texts_agree_with_the_rules():
    rng = random.Random(3)
    for length in (10_000, 100_000):
        text = "".join(rng.choices(ADVERSARIAL, k=length))
        assert encode(text) == plain_encode(text)
        assert decode(encode(text)) == text


# ---- the shortcuts of the implementation ---------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["name"])
def test_the_encoders_output_is_decoded_on_the_fast_path(vector, monkeypatch):
    monkeypatch.setattr(lossless_caps, "_decode_exactly", None)
    assert decode(vector["encoded"]) == vector["text"]


def cpu_seconds(length, rounds=5):
    """CPU time that encoding and decoding words of this length takes: the least of some rounds.

    Every round has other letters, so that nothing is remembered.
    """
    seconds = []
    for letter in "ABCDEFGH"[:rounds]:
        text = letter * length + " " + f"x{letter}" * (length // 2) + " " + letter.lower() * length
        start = time.process_time()
        assert decode(encode(text)) == text
        seconds.append(time.process_time() - start)
    return min(seconds)


def grows_linearly(seconds_of):
    """Whether 32 times the length takes about 32 times as long, and not 32^2 = 1024 times.

    seconds_of(length) -> seconds. The limit, 256 times, is 8 times from either.
    """
    return seconds_of(640_000) < 256 * seconds_of(20_000)


def test_long_words_take_linear_time():
    assert grows_linearly(cpu_seconds)


def test_quadratic_time_would_be_noticed():
    def seconds_of(length):
        return 1e-12 * length**2 + 1e-9 * length

    assert not grows_linearly(seconds_of)


def test_pieces_encode_like_the_whole_where_a_word_ends():
    left, right = "The NASA eBay", " Launch ON iPhones"
    assert encode(left) + encode(right) == encode(left + right)
