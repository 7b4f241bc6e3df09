"""Tokens and bytes of a document by the rules of the format, without the code under test and
without
SentencePiece.

Slow and plain: characters, one at a time. Of a tokenizer it needs the pieces, their scores and
their kinds. Python's own NFKC stands in for the normalizer's table, so texts with characters on
which the two differ are not for it.
"""

import struct
import unicodedata

MARKERS = "\ue001\ue002\ue003\ue004"
ESC = MARKERS[3]
DELETED = {chr(code) for code in (*range(0x01, 0x09), 0x0B, *range(0x0E, 0x20), 0x7F, 0x8F, 0x9F)}
SPACES = {
    chr(code)
    for code in (
        *range(0x2000, 0x200D),
        0x09,
        0x0A,
        0x0C,
        0x0D,
        0x20,
        0xA0,
        0x1680,
        0x200E,
        0x200F,
        0x2028,
        0x2029,
        0x202F,
        0x205F,
        0x2581,
        0x3000,
        0xFEFF,
        0xFFFD,
    )
}
SPACE_MARK = "\u2581"


def is_letter(char):
    return "a" <= char <= "z" or "A" <= char <= "Z"


def transform(text):
    """Text -> list of (character, bytes of the original that it stands for, whether it is a
    marker that marks).
    """
    out = []
    position = 0
    while position < len(text):
        char = text[position]
        if char in MARKERS:
            out.append((ESC, 0, True))
            out.append((char, 3, True))
        elif not is_letter(char):
            out.append((char, len(char.encode()), False))
        if not is_letter(char):
            position += 1
            continue
        end = position
        while end < len(text) and is_letter(text[end]):
            end += 1
        word = text[position:end]
        all_capitals = len(word) > 1 and word.isupper()
        if all_capitals:
            out.append((MARKERS[1], 0, True))
        for index, letter in enumerate(word):
            if letter.isupper() and not all_capitals:
                out.append((MARKERS[2] if index else MARKERS[0], 0, True))
            out.append((letter.lower(), 1, False))
        position = end
    return out


def nfkc(text):
    return unicodedata.normalize("NFKC", text)


def clusters(characters):
    """Characters that are normalized together: one, and the combining ones behind it that
    change with it.
    """
    cluster = []
    for char, size, is_marker in characters:
        before = "".join(part[0] for part in cluster)
        if cluster and not (
            unicodedata.combining(char) and nfkc(before + char) != nfkc(before) + nfkc(char)
        ):
            yield cluster
            cluster = []
        cluster.append((char, size, is_marker))
    if cluster:
        yield cluster


def normalize(characters):
    """What the tokenizer sees: list of [character, bytes, is_marker].

    A marker is never changed or merged.
    """
    out = []
    for cluster in clusters(characters):
        size = sum(part[1] for part in cluster)
        char = cluster[0][0]
        if cluster[0][2]:
            out.append([char, size, True])
            continue
        if char in SPACES:
            produced = " "
        elif char in DELETED:
            produced = ""
        else:
            produced = nfkc("".join(part[0] for part in cluster))
        is_second_space = produced == " " and (not out or out[-1][0] == " ")
        if not produced or is_second_space:
            if out:
                out[-1][1] += size
            continue
        out += [[char, 0, False] for char in produced]
        out[-1][1] = size  # the last one stands for all of it
    if out and out[-1][0] == " ":
        out.pop()
    return [[SPACE_MARK if char == " " else char, size, is_marker] for char, size, is_marker in out]


def merge(characters, scores):
    """Byte pair encoding: the neighbours with the best piece become one, the first where
    several are as good.
    """
    parts = [list(part) for part in characters]
    while True:
        best = None
        for index in range(len(parts) - 1):
            if parts[index][2] or parts[index + 1][2]:
                continue
            score = scores.get(parts[index][0] + parts[index + 1][0])
            if score is not None and (best is None or score > best[0]):
                best = score, index
        if best is None:
            return parts
        index = best[1]
        left, right = parts[index : index + 2]
        parts[index : index + 2] = [[left[0] + right[0], left[1] + right[1], False]]


def tokens_and_bytes(sp, text):
    """Ids and bytes of a document, BOS first."""
    normal = [index for index in range(264, sp.get_piece_size())]
    ids_of = {sp.id_to_piece(index): index for index in normal}
    scores = {piece: sp.get_score(index) for piece, index in ids_of.items()}
    ids, sizes = [1], [0]
    for piece, size, is_marker in merge(normalize(transform(text)), scores):
        if is_marker:
            ids.append(4 + MARKERS.index(piece))
            sizes.append(size)
        elif piece in ids_of:
            ids.append(ids_of[piece])
            sizes.append(size)
        else:
            encoded = piece.encode()
            ids += [8 + byte for byte in encoded]
            sizes += [0] * (len(encoded) - 1) + [size]
    return ids, sizes


def shard(values):
    """The bytes of a shard file."""
    header = struct.pack("<256i", 20240520, 1, len(values), *[0] * 253)
    return header + struct.pack(f"<{len(values)}H", *values)
