"""Lossless capitals: `lossless_caps_caseops_v1`, the text transform of the CaseOps data.

A tokenizer that sees `the`, `The` and `THE` spends three pieces on one word. Here capitals become
lower-case letters behind a marker, so that the words share pieces and the case is a token of its
own (openai/parameter-golf, PR 1729):

    The NASA Launch on eBay   ->   <T>the <A>nasa <T>launch on e<C>bay

    U+E001 <T> TITLE     the next letter is a capital and starts a word
    U+E002 <A> ALLCAPS   every letter of the next word is a capital (two letters or more)
    U+E003 <C> CAPNEXT   the next letter is a capital inside a word
    U+E004 <E> ESC       the next character is a literal (a control character found in the text)

A letter is A-Z or a-z, a word is a maximal run of letters. Everything else, accented letters
included, passes through unchanged and ends a word. `decode(encode(s)) == s` for every `str`.
"""

import re
from functools import lru_cache

TITLE, ALLCAPS, CAPNEXT, ESC = CONTROLS = "\ue001\ue002\ue003\ue004"

_remember = lru_cache(maxsize=1 << 14)  # a few thousand matches make up nearly all of a text


class CapsError(ValueError):
    """Text that `encode` cannot have made and `decode` cannot read."""


# Capitals inside a word are marked first. Those left start their word, and the character after the
# run of capitals tells ALLCAPS from mixed case, so that `Th` is all there is to look up for `The`.
# The patterns start with [A-Z], which lets the regex engine jump from capital to capital; that is
# why the look-behind stands after the letter it asks about.
_CONTROL = re.compile(f"[{CONTROLS}]")
_INSIDE = re.compile("[A-Z](?<=[a-z][A-Z])[A-Z]*")
_START = re.compile("[A-Z]+[a-z]?")


@_remember
def _mark_inside(capitals: str) -> str:
    """Capitals inside a word, each behind its own marker."""
    return "".join(CAPNEXT + letter for letter in capitals.lower())


@_remember
def _mark_start(capitals: str) -> str:
    """Capitals that start a word, with the small letter after them where there is one."""
    lower = capitals.lower()
    if len(capitals) > 1 and capitals.isupper():
        return ALLCAPS + lower
    if capitals[-1].isupper():
        return TITLE + lower
    return TITLE + lower[0] + _mark_inside(capitals[1:-1]) + lower[-1]


_BLOCK = 1 << 18  # characters; the substitutions keep some hundred bytes for each match
_NO_LETTER = re.compile("[^A-Za-z]")


def encode(text: str) -> str:
    """Any text in, text without A-Z out."""
    if len(text) <= _BLOCK:
        return _encode_block(text)
    blocks = []
    start = 0
    while start < len(text):  # no rule reaches across the end of a word
        end = _NO_LETTER.search(text, start + _BLOCK)
        end = end.start() if end else len(text)
        blocks.append(_encode_block(text[start:end]))
        start = end
    return "".join(blocks)


def _encode_block(text: str) -> str:
    """encode for a text that ends where a word may end; literals are escaped first."""
    if any(control in text for control in CONTROLS):
        text = _CONTROL.sub(rf"{ESC}\g<0>", text)
    text = _INSIDE.sub(lambda match: _mark_inside(match[0]), text)
    return _START.sub(lambda match: _mark_start(match[0]), text)


# What the encoder writes, and no more: a control character that fits none of these is matched
# alone, and the text is left to the state machine. ALLCAPS must not run into a CAPNEXT, because
# letters after that would be capitals too.
_MARKED = re.compile(
    f"{TITLE}(?<![A-Za-z]{TITLE})[A-Za-z]"
    f"|{ALLCAPS}(?<![A-Za-z]{ALLCAPS})[A-Za-z]+(?![A-Za-z{CAPNEXT}])"
    f"|{CAPNEXT}[A-Za-z]"
    f"|{ESC}[{CONTROLS}]"
    f"|[{CONTROLS}]"
)


class _Unusual(Exception):
    """The text is not the plain output of `encode`."""


@_remember
def _unmark(marked: str) -> str:
    """What _MARKED found -> the text it stands for. Raises _Unusual for a marker alone."""
    if len(marked) == 1:
        raise _Unusual
    return marked[1:].upper()


def decode(text: str) -> str:
    """The text that was encoded.

    Raises CapsError, with position and reason, where a marker has nothing to mark.

    Some texts that `encode` never makes can be read too: A-Z as they are, ALLCAPS before one letter
    and the like.
    """
    try:
        return _MARKED.sub(lambda match: _unmark(match[0]), text)
    except _Unusual:
        return _decode_exactly(text)


def _refuse_if(broken: bool | str, position: int, reason: str) -> None:
    if broken:
        raise CapsError(f"position {position}: {reason}")


def _decode_exactly(text: str) -> str:
    """The decoder as a state machine, one character at a time; it alone says what is an error."""
    out = []
    mode = ""  # TITLE or ALLCAPS, until its word starts
    # what CAPNEXT and ESC announce; inside of a word; inside of a word of capitals (ALLCAPS)
    capnext = escaped = in_word = shouting = False
    for position, char in enumerate(text):
        is_letter = char.isascii() and char.isalpha()
        if escaped:
            _refuse_if(
                mode and not is_letter, position, "TITLE or ALLCAPS before an escaped character"
            )
            escaped = False
            in_word = is_letter
            shouting = shouting and is_letter
        elif char == ESC:
            escaped = True
            continue
        elif char in (TITLE, ALLCAPS):
            _refuse_if(mode, position, "TITLE or ALLCAPS twice")
            _refuse_if(capnext, position, "TITLE or ALLCAPS after CAPNEXT")
            _refuse_if(in_word, position, "TITLE or ALLCAPS inside a word")
            mode = char
            continue
        elif char == CAPNEXT:
            _refuse_if(capnext, position, "CAPNEXT twice")
            capnext = True
            continue
        elif is_letter:
            _refuse_if(mode and in_word, position, "TITLE or ALLCAPS does not start the word")
            shouting = shouting or mode == ALLCAPS
            if mode or capnext or shouting:
                char = char.upper()
            mode, capnext, in_word = "", False, True
        else:
            _refuse_if(mode, position, "TITLE or ALLCAPS without a letter")
            _refuse_if(capnext, position, "CAPNEXT without a letter")
            in_word = shouting = False
        out.append(char)

    end = len(text)
    _refuse_if(escaped, end, "the text ends after ESC")
    _refuse_if(mode, end, "the text ends after TITLE or ALLCAPS")
    _refuse_if(capnext, end, "the text ends after CAPNEXT")
    return "".join(out)
