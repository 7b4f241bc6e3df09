"""Makes CaseOps shards, the token files that `train_gpt.py` reads, from documents.

    python prepare_caseops_data.py --demo --out data/demo  # no download, seconds
    python prepare_caseops_data.py --docs docs_selected.jsonl --out data/caseops
        # first 50,000: validation
    python prepare_caseops_data.py --docs train.jsonl.xz --val-file val.jsonl.xz --out data/caseops

Documents are JSON lines, a line an object with a `text` or a bare JSON string, in plain, gzip, xz
or Zstandard files; or rows of a Parquet file, in its column `text`. The last two need pyarrow. Each
document becomes BOS and the tokens of its transformed text (lossless_caps.py). Validation tokens
get a side-car with the number of UTF-8 bytes of the original text that each token stands for, so
that bits per byte are counted on the text and not on the tokens.

Lines are read and cut into batches here, parsed and encoded in worker processes, and written here
in their order, so that the files do not depend on the number of workers. Shard layout:
openai/parameter-golf, PR 1729.
"""

import argparse
import ast
import contextlib
import fcntl
import gzip
import hashlib
import importlib
import importlib.metadata
import io
import itertools
import json
import lzma
import multiprocessing
import os
import random
import re
import signal
import sys
import sysconfig
import threading
import unicodedata
import warnings
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from lossless_caps import CONTROLS, ESC, encode

DEFAULT_TOKENIZER = Path(__file__).resolve().parent / "tokenizers" / "caseops_8192.model"
BOS_ID = 1
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
HEADER_INTS = 256
MAX_COST = np.iinfo(np.uint16).max  # the bytes of text that a side-car can charge to one token
BATCH_BYTES = 1 << 20  # of JSON lines, in one message to a worker
LONGEST_TEXT = 64_000_000  # bytes; a longer one would take more memory than docs/DATA.md promises
LONGEST_LINE = 150_000_000  # bytes; JSON may need more than twice the bytes of its text


class DataError(ValueError):
    """Input that cannot be made into shards; the message says where it is."""


class WorkerLost(DataError):
    """A worker process was killed; nothing is wrong with the data."""


@contextlib.contextmanager
def path_in_errors(path: str | Path) -> Iterator[None]:
    """Puts the path into an OSError that names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def run_command(command: Callable[[], int], kept_in: Path | None = None) -> int:
    """Runs a command and returns its exit status: the command's own, 1, or 130 after Ctrl-C.

    What stops it becomes one line on stderr, without a traceback.

    kept_in: the folder of a dataset in the making, which goes on from there when the command is
    repeated.
    """
    stopped = True  # from outside, and not by the data
    status = 1
    try:
        return command()
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except MemoryError:
        message = "out of memory: try fewer --workers or smaller --shard-tokens"
    except (WorkerLost, OSError) as error:
        message = str(error)
    except DataError as error:
        message, stopped = str(error), False
    print(f"error: {message}", file=sys.stderr)
    if stopped and kept_in is not None and (kept_in / PROGRESS).exists():
        print(
            f"{kept_in} keeps the finished files: repeat the command to go on from there",
            file=sys.stderr,
        )
    return status


# --------------------------------------------------------------------------------------------------
# TOKENIZER
# --------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model at `path`.

    Raises DataError if its first 264 ids are not those of CaseOps.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such tokenizer")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise DataError(f"{path}: not a SentencePiece model ({error})") from error
    layout = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *CONTROLS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    if not len(layout) < sp.get_piece_size() <= 1 << 16:
        raise DataError(f"{path}: {sp.get_piece_size()} pieces, CaseOps takes 265 to 65,536")
    for index, piece in enumerate(layout):
        if sp.id_to_piece(index) != piece:
            raise DataError(
                f"{path}: not a CaseOps tokenizer: id {index} is {sp.id_to_piece(index)!a}, not"
                f" {piece!a}"
            )
    # The same names do not make them markers: a user-defined symbol is never normalized nor merged
    # with its neighbours.
    if sp.encode(CONTROLS * 2) != [4, 5, 6, 7] * 2:
        raise DataError(
            f"{path}: not a CaseOps tokenizer: the case markers are not user-defined symbols"
        )
    return sp


def train_sentencepiece(sentences: Iterable[str], **settings) -> bytes:
    """Trains a SentencePiece model and returns its file's content.

    Raises DataError where SentencePiece cannot; what goes wrong in `sentences` comes out as it is.
    """
    faults = []
    sentences = iter(sentences)
    first = next(sentences, None)
    if first is None:
        raise DataError("there is no text to train a tokenizer on")

    def watched() -> Iterator[str]:
        try:
            yield first
            yield from sentences
        except BaseException as error:  # SentencePiece would make a RuntimeError of it
            faults.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=watched(), model_writer=model, **settings
        )
    except RuntimeError as error:
        if faults:
            raise faults[0] from None
        raise DataError(
            f"no tokenizer of {settings['vocab_size']:,} pieces from this text: {error}"
        ) from error
    return model.getvalue()


# --------------------------------------------------------------------------------------------------
# ENCODING
#
# encode_document and encode_document_with_bytes say what the tokens of a text and their costs are:
# the plain way. Encoder gives the same faster.
# --------------------------------------------------------------------------------------------------


def encode_document(sp: sentencepiece.SentencePieceProcessor, text: str) -> np.ndarray:
    """Text -> ids (tokens,) uint16, BOS first. Raises DataError on a lone surrogate."""
    _utf8_size(text)
    parts = [np.array([BOS_ID], dtype=np.uint16)]
    for block, anchor in _blocks(sp, encode(text)):
        parts.append(np.array(sp.encode(anchor + block)[len(anchor) :], dtype=np.uint16))
    return np.concatenate(parts)


def encode_document_with_bytes(
    sp: sentencepiece.SentencePieceProcessor, text: str
) -> tuple[np.ndarray, np.ndarray]:
    """Text -> ids (tokens,) and costs (tokens,), both uint16, BOS with cost 0 first.

    A token's cost is the UTF-8 size of the original text it came from; markers are free. Only
    leading and trailing characters that the tokenizer drops are charged to nobody. Raises DataError
    on a lone surrogate, and where one token stands for more than 65,535 bytes.
    """
    _utf8_size(text)
    ids_parts = [np.array([BOS_ID], dtype=np.uint16)]
    costs_parts = [np.array([0], dtype=np.uint16)]
    tokens = 1
    for block, ids, spans in tokenize_blocks(sp, encode(text)):
        size_before = np.concatenate([[0], np.cumsum(byte_costs(block))])
        costs = size_before[spans[:, 1]] - size_before[spans[:, 0]]
        if costs.max(initial=0) > MAX_COST:
            raise DataError(
                f"token {tokens + costs.argmax()} stands for {costs.max():,} bytes and the side-car"
                f" holds at most {MAX_COST:,}: the text has a run of blanks or dropped characters"
                " that long; shorten it or leave the document out"
            )
        ids_parts.append(ids)
        costs_parts.append(costs.astype(np.uint16))
        tokens += len(ids)
    return np.concatenate(ids_parts), np.concatenate(costs_parts)


def tokenize_blocks(sp, text: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Transformed text -> its blocks, with ids and source spans.

    Each block has ids (tokens,) uint16 and the source spans (tokens, 2) in it.
    """
    for block, anchor in _blocks(sp, text):
        ids, spans = _tokenize_with_spans(sp, anchor + block)
        skipped = len(anchor)
        spans = np.array(spans[skipped:], dtype=np.int64).reshape(-1, 2) - skipped
        yield block, np.array(ids[skipped:], dtype=np.uint16), spans


# SentencePiece needs over 200 bytes for each character that it is given at once. So a long text is
# given in blocks, cut where neither a rule of the normalizer nor a piece reaches across: then the
# tokens are those of the whole text.
BLOCK_CHARS = 1 << 18
LONGEST_BLOCK_CHARS = 1 << 20  # where a text has no place to cut for that long, it is refused
# stands before a block that begins with a blank, which would else be taken for a leading one
ANCHOR = "a"


def _blocks(sp, text: str) -> Iterator[tuple[str, str]]:
    """Blocks that make up a transformed text, each with the anchor to put before it.

    An anchor is "", or one character and token.

    Raises DataError where there is no place to cut.
    """
    if len(text) <= BLOCK_CHARS:
        yield text, ""
        return
    pairs = _pairs_in_pieces(sp)
    start = 0
    while start < len(text):
        end = _end_of_block(sp, pairs, text, start)
        block = text[start:end]
        yield block, ANCHOR if start and block[0] in _BLANKS else ""
        start = end


def _end_of_block(sp, pairs: frozenset[str], text: str, start: int) -> int:
    wanted = start + BLOCK_CHARS
    if len(text) <= wanted:
        return len(text)
    last = min(len(text) - 1, start + LONGEST_BLOCK_CHARS)
    for end in itertools.chain(range(wanted, start, -1), range(wanted + 1, last + 1)):
        if _can_cut(sp, pairs, text[end - 1], text[end]):
            return end
    if len(text) <= start + LONGEST_BLOCK_CHARS:
        return len(text)
    raise DataError(
        f"{LONGEST_BLOCK_CHARS:,} characters from {text[start : start + 20]!a} on without a place"
        " to cut: they cannot be tokenized in little memory; leave the document out"
    )


def _can_cut(sp, pairs: frozenset[str], before: str, after: str) -> bool:
    """Whether a text can be tokenized in two parts between these characters."""
    if not _stands_alone(before):
        return False
    if after in _BLANKS:
        return before + "\u2581" not in pairs and sp.normalize(before) == before
    return (
        _stands_alone(after)
        and before + after not in pairs
        and sp.normalize(before + after) == before + after
    )


def _stands_alone(char: str) -> bool:
    """ASCII signs, markers but ESC, and letters other than Hangul jamo, which join into syllables.

    ESC and its literal belong together; all others may be dropped, or change the character before
    them.
    """
    if char.isascii():
        return char.isprintable() and char != " "
    if char in CONTROLS:
        return char != ESC
    return unicodedata.category(char) in ("Lo", "Ll") and not "\u1100" <= char <= "\u11ff"


@lru_cache(maxsize=4)
def _pairs_in_pieces(sp) -> frozenset[str]:
    """All pairs of neighbours in the tokenizer's pieces.

    Raises DataError if the tokenizer does not suit blocks.
    """
    pairs = set()
    for index in range(sp.get_piece_size()):
        if not (sp.is_byte(index) or sp.is_control(index) or sp.is_unknown(index)):
            pairs.update(map("".join, itertools.pairwise(sp.id_to_piece(index))))
    if ANCHOR + "\u2581" in pairs:
        raise DataError(
            f"this tokenizer cannot take a text of more than {BLOCK_CHARS:,} characters: "
            "it has pieces that reach over spaces"
        )
    return frozenset(pairs)


# Text is cut where no rule of the normalizer and no piece reaches across: at blanks, and between
# runs of letters, single digits and runs of punctuation, unless a character follows that may change
# its neighbour, such as a combining mark: all up to the next blank is then one unit. A hundred
# thousand units make up nearly all of a text.
_BLANKS = " \t\n\r\f"
_MARKS = "!-/:-@\\[-`{-~‘’“”–—…"
_JOINING = f"(?![^{_BLANKS}A-Za-z0-9{_MARKS}])"
_UNIT = re.compile(f"[{_BLANKS}]*(?:(?:[A-Za-z]++|[0-9]|[{_MARKS}]++){_JOINING}|[^{_BLANKS}]+)")


class Encoder:
    """encode_document and encode_document_with_bytes several times faster: the fast way.

    A unit of text (see _UNIT) is tokenized when it first occurs, and looked up from then on.
    Training documents are looked up word by word, and what a new word is made of, unit by unit.

    kept: how many entries each of the three tables may hold.
    """

    def __init__(self, sp: sentencepiece.SentencePieceProcessor, kept: int = 150_000):
        self.sp = sp
        self.bos, self.no_cost = (array("H", [value]).tobytes() for value in (BOS_ID, 0))
        pieces = [sp.id_to_piece(index) for index in range(sp.get_piece_size())]
        # right for pieces of ASCII and U+2581 only, and asked for no others
        self.piece_bytes = np.array([len(piece) for piece in pieces], dtype=np.uint16)
        self.piece_bytes[4:264] = [0] * len(CONTROLS) + [1] * 256
        self.words: dict[bytes, bytes] = _Kept(self._word_ids, kept)  # behind a blank
        self.units: dict[str, bytes] = _Kept(self._unit_ids, kept)
        self.units_with_costs: dict[str, tuple[bytes, bytes] | None] = _Kept(
            self._unit_ids_and_costs, kept
        )

    def encode(self, text: str) -> np.ndarray:
        """As encode_document."""
        if len(text) > BLOCK_CHARS:
            return encode_document(self.sp, text)  # in little memory
        _utf8_size(text)
        first, *words = text.encode().split() or [b""]
        first = self.sp.encode(encode(first.decode()))
        # a word that the tokenizer drops; a blank that is none for the tokenizer
        if not first or "\v" in text:
            return encode_document(self.sp, text)
        ids = array("H", [BOS_ID, *first]).tobytes() + b"".join(map(self.words.__getitem__, words))
        return np.frombuffer(ids, dtype=np.uint16)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """As encode_document_with_bytes."""
        if len(text) > BLOCK_CHARS:
            return encode_document_with_bytes(self.sp, text)
        # in a run of blanks that nothing follows it takes quadratic time
        units = _UNIT.findall(text.rstrip(_BLANKS))
        if units:
            units[0] = units[0].lstrip(_BLANKS)
        found = [self.units_with_costs[unit] for unit in units] if _utf8_size(text) else []
        if None in found:
            return encode_document_with_bytes(self.sp, text)
        ids, costs = zip((self.bos, self.no_cost), *found, strict=True)
        return (
            np.frombuffer(b"".join(ids), dtype=np.uint16),
            np.frombuffer(b"".join(costs), dtype=np.uint16),
        )

    def _word_ids(self, word: bytes) -> bytes:
        return b"".join(map(self.units.__getitem__, _UNIT.findall(" " + word.decode())))

    def _unit_ids(self, unit: str) -> bytes:
        marked = unit if unit.isascii() and unit.islower() else encode(unit)
        ids = self.sp.encode(marked) if unit[0] != " " else self.sp.encode("a" + marked)[1:]
        return array("H", ids).tobytes()

    def _unit_ids_and_costs(self, unit: str) -> tuple[bytes, bytes] | None:
        """None where a part of the unit is dropped or charged to its neighbours."""
        word = unit.lstrip(_BLANKS)
        blanks = len(unit) - len(word)
        if word.isascii() and word.isprintable():
            ids = np.frombuffer(self.units[" " * bool(blanks) + word], dtype=np.uint16)
            costs = self.piece_bytes[ids]
            if blanks > 1:  # a run of blanks is one to the tokenizer
                if int(costs[0]) + blanks - 1 > MAX_COST:
                    return None
                costs[0] += blanks - 1
        else:
            try:
                ids, costs = encode_document_with_bytes(self.sp, "a" * bool(blanks) + unit)
            except DataError:
                return None
            ids, costs = ids[1 + bool(blanks) :], costs[1 + bool(blanks) :]
        return (
            (ids.tobytes(), costs.tobytes())
            if costs.sum(dtype=np.int64) == len(unit.encode())
            else None
        )


class _Kept(dict):
    """A dictionary that makes missing values, and keeps the first `kept` that have short keys.

    So a stream of rare words does not drive out the common ones; 150,000 take 30 MB.
    """

    def __init__(self, make, kept: int):
        super().__init__()
        self.make, self.kept = make, kept

    def __missing__(self, key):
        made = self.make(key)
        if len(self) < self.kept and len(key) <= 32:
            self[key] = made
        return made


def _utf8_size(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise DataError(
            f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from error


def _tokenize_with_spans(sp, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if hasattr(sp, "encode_as_offset_mapping"):  # sentencepiece 0.2.2 and later
        mapping = sp.encode_as_offset_mapping(text)
        return mapping["ids"], mapping["offsets"]
    pieces = sp.encode_as_immutable_proto(text).pieces  # what 0.2.0 and 0.2.1 have
    return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]


def byte_costs(transformed: str) -> np.ndarray:
    """UTF-8 bytes (characters,) that each character of an encoded text had in the original.

    Markers had none.
    """
    points = np.frombuffer(transformed.encode("utf-32-le"), dtype=np.uint32)
    costs = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    costs[(points >= ord(CONTROLS[0])) & (points <= ord(CONTROLS[-1]))] = 0
    for literal in re.finditer(f"{ESC}[{CONTROLS}]", transformed):
        costs[literal.end() - 1] = 3
    return costs


# --------------------------------------------------------------------------------------------------
# SHARDS
# --------------------------------------------------------------------------------------------------


def write_shard(path: str | Path, values: np.ndarray) -> dict:
    """Values (n,) that fit uint16 -> one shard file; returns its manifest entry.

    The name appears when it is whole.
    """
    values = np.asarray(values)
    if values.size and not 0 <= values.min() <= values.max() <= np.iinfo(np.uint16).max:
        raise DataError(f"{path}: values outside 0..65535")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(values)
    return {
        "values": len(values),
        "sha256": write_whole(path, header, values.astype("<u2", copy=False)),
    }


def read_shard(path: str | Path) -> np.ndarray:
    """A shard file -> values (n,) uint16, mapped.

    Raises DataError if the header or the size is wrong.
    """
    with path_in_errors(path):
        size, header_bytes = os.path.getsize(path), 4 * HEADER_INTS
        header = (
            np.fromfile(path, dtype="<i4", count=HEADER_INTS) if size >= header_bytes else [0, 0, 0]
        )
        if (header[0], header[1]) != (SHARD_MAGIC, SHARD_VERSION):
            raise DataError(f"{path}: not a shard")
        if size != header_bytes + 2 * int(header[2]):
            raise DataError(
                f"{path}: {size:,} bytes do not hold the {header[2]:,} values of its header"
            )
        if not header[2]:
            return np.empty(0, dtype=np.uint16)
        return np.memmap(path, dtype="<u2", mode="r", offset=header_bytes)


def read_stream(folder: str | Path, stream: str) -> list[np.ndarray]:
    """The shards of "val" or "val_bytes" in order, (values,) uint16 each, read into memory.

    Maps would keep as many files open as there are shards, and `ulimit -n` is 1024 on many
    machines.
    """
    return [np.array(read_shard(path)) for path in shard_files(folder, stream)]


def write_whole(path: str | Path, *parts: bytes | np.ndarray) -> str:
    """Writes under a temporary name, then renames: a file that has its name is complete.

    Returns its sha256.

    Where the disk is full, the OSError names the file, and the part that was written is removed.
    """
    temporary, digest = Path(f"{path}.tmp"), hashlib.sha256()
    try:
        with path_in_errors(path), temporary.open("wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    return digest.hexdigest()


class ShardWriter:
    """Cuts a stream of values into `fineweb_<stream>_<number>.bin`.

    All but the last hold exactly `shard_tokens`.
    """

    def __init__(self, folder: Path, stream: str, shard_tokens: int):
        self.folder, self.stream = folder, stream
        self.buffer = np.empty(shard_tokens, dtype=np.uint16)
        self.filled = 0
        self.entries: dict[str, dict] = {}  # file name -> manifest entry

    def add(self, values: np.ndarray) -> None:
        """Values (n,) uint16."""
        while len(values):
            taken = values[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(taken)] = taken
            self.filled += len(taken)
            values = values[len(taken) :]
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        """Writes what is there, if anything."""
        if self.filled:
            name = f"fineweb_{self.stream}_{len(self.entries):06d}.bin"
            self.entries[name] = write_shard(self.folder / name, self.buffer[: self.filled])
            print(f"{name}: {self.filled:,} values", flush=True)
            self.filled = 0


# --------------------------------------------------------------------------------------------------
# DOCUMENTS
# --------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A document as it stands in its file, and where that is."""

    file: str
    number: int  # of the line, or of the row of a Parquet file, from 1
    content: bytes  # JSON; in tools/retokenize.py ids


class Batch(NamedTuple):
    """Consecutive documents of one split, on their way to a worker."""

    split: str  # "val" or "train"
    lines: list[Line]
    first_document: int  # number of the first one within its split, from 0
    checksum: int  # of all lines up to the end of this batch


class EncodedBatch(NamedTuple):
    """What comes back for a Batch, for each of its documents."""

    split: str
    checksum: int
    ids: np.ndarray  # (tokens,) uint16, all documents joined
    costs: np.ndarray | None  # (tokens,) uint16, of validation only
    lengths: np.ndarray  # (documents,) tokens
    text_bytes: np.ndarray  # (documents,) of the text that was tokenized
    removed_bytes: np.ndarray  # (documents,) taken out by normalize_text
    # (documents, 2) uint64, document_hash of the text as it came and as it is stored
    hashes: np.ndarray


GZIP_MAGIC = b"\x1f\x8b"
XZ_MAGIC = b"\xfd7zXZ\x00"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
PARQUET_MAGIC = b"PAR1"
PACKED_SUFFIXES = ".gz", ".xz", ".zst", ".parquet"
OTHER_FORMATS = {  # first bytes -> what starts with them
    PARQUET_MAGIC: "Parquet inside of another archive",
    b"ARROW1": "Arrow",
    b"\xff\xff\xff\xff": "Arrow",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
    ZSTD_MAGIC: "zstd inside of another archive",
    b"\x04\x22\x4d\x18": "lz4",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"\x5d\x00\x00": "lzma",
    GZIP_MAGIC: "gzip inside of another archive",
    XZ_MAGIC: "xz inside of another archive",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xef\xbb\xbf": "UTF-8 with a byte order mark",
    b"<": "HTML or XML",
    b"[": "a JSON array",
}


class Source(io.RawIOBase):
    """A file that is read once, from start to end, and hashed on the way: a pipe will do.

    `-` is the standard input.
    """

    def __init__(self, path: str):
        self.name, self.digest = "standard input" if path == "-" else path, hashlib.sha256()
        if path == "-" and sys.stdin is None:
            raise DataError("standard input is closed: name a file, or pipe one in")
        self.file = sys.stdin.buffer if path == "-" else open(path, "rb")
        self.buffered = io.BufferedReader(self, 1 << 20)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        with path_in_errors(self.name):
            count = self.file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count

    def lines(self) -> Iterator[Line]:
        """The lines that are not blank, of plain text, gzip, xz or Zstandard; Parquet's rows.

        The first bytes tell which, not the name.

        Raises DataError, with the name of the file, if it is damaged or holds something else than
        documents, or if the package that reads it is missing.
        """
        try:
            yield from self._lines()
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            # the system's errors have a number, those of gzip and pyarrow have none
            if getattr(error, "errno", None) is not None:
                raise
            raise DataError(
                f"{self.name}: damaged or cut short ({error}): fetch or pack it again"
            ) from error

    def _lines(self) -> Iterator[Line]:
        text = self.buffered
        suffix = Path(self.name).suffix.lower()
        head = text.peek(1)
        if head.startswith(PARQUET_MAGIC):
            yield from parquet_rows(self.name)
            return
        if head.startswith(GZIP_MAGIC):
            text = gzip.GzipFile(fileobj=self.buffered)
        elif head.startswith(XZ_MAGIC):
            text = io.BufferedReader(XzReader(self.buffered), 1 << 20)
        elif head.startswith(ZSTD_MAGIC) or ZSTD_SKIPPABLE.match(head):
            text = io.BufferedReader(unpacked_zstd(self.name, self.buffered), 1 << 20)
        elif suffix in PACKED_SUFFIXES and not head:
            raise DataError(f"{self.name}: empty, although its name says {suffix}: fetch it again")
        _refuse_other_formats(self.name, text.peek(1))
        is_first = True
        lines = iter(partial(text.readline, LONGEST_LINE + 1), b"")
        for number, content in enumerate(lines, 1):
            if len(content) > LONGEST_LINE:
                raise DataError(
                    f"{self.name}, line {number}: longer than {LONGEST_LINE:,} bytes; is this JSON"
                    " lines?"
                )
            if content.isspace():
                continue
            line = Line(self.name, number, content)
            # whatever else is no JSON lines is refused here, before anything is
            # counted
            if is_first:
                parse_text(line)
                is_first = False
            yield line

    def sha256(self) -> str:
        """Of the whole file; reads what is left of it."""
        while self.read(1 << 20):
            pass
        return self.digest.hexdigest()


def _refuse_other_formats(name: str, head: bytes) -> None:
    """Raises DataError if the first bytes are not those of UTF-8 text, and names the format."""
    start = head.lstrip(b" \t\r\n")
    found = next((kind for magic, kind in OTHER_FORMATS.items() if head.startswith(magic)), None)
    if found is None and start[:1] in (b"<", b"["):
        found = OTHER_FORMATS[start[:1]]
    if found is None and ZSTD_SKIPPABLE.match(head):
        found = OTHER_FORMATS[ZSTD_MAGIC]
    if found is None and head[257:262] == b"ustar":
        found = "tar"
    if found is None and b"\0" in start[:4]:
        found = "UTF-16, UTF-32 or binary"
    if found is not None:
        raise DataError(
            f"{name}: this is {found}; documents must be JSON lines in UTF-8, one a line, "
            "plain or packed with gzip, xz or zstd, or Parquet: convert it first"
        )


class XzReader(io.RawIOBase):
    """The unpacked bytes of all streams of an .xz file, read like `xz -dc` does.

    Python's own reader ends without a word at padding between streams, at what is no stream, and at
    a stream whose first bytes are damaged.
    """

    def __init__(self, file: io.BufferedReader):
        self.file = file
        self.stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        self.packed = b""  # read, but not yet given to the stream
        self.at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        unpacked = b""
        while not unpacked and not self.at_end:
            if self.stream.eof:
                self._start_next_stream()
            elif self.stream.needs_input and not self.packed:
                self.packed = self.file.read1(1 << 16)
                if not self.packed:
                    raise EOFError("the file ends inside an xz stream")
            else:
                unpacked = self.stream.decompress(self.packed, len(buffer))
                self.packed = b""
        buffer[: len(unpacked)] = unpacked
        return len(unpacked)

    def _start_next_stream(self) -> None:
        """Skips the padding behind a stream: zero bytes, in fours.

        What follows must be a stream, or the end.
        """
        padding = 0
        block = self.stream.unused_data or self.file.read1(1 << 16)
        while block and not block.strip(b"\0"):
            padding += len(block)
            block = self.file.read1(1 << 16)
        self.packed = block.lstrip(b"\0")
        padding += len(block) - len(self.packed)
        if padding % 4:
            raise lzma.LZMAError(
                f"{padding} zero bytes behind an xz stream; padding comes in fours"
            )
        self.at_end = not self.packed
        self.stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)


def _import_pyarrow(module: str, name: str, kind: str):
    """A module of pyarrow, for a file of that kind. Raises DataError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{name}: this is {kind}, which is read with pyarrow ({error}): pip install pyarrow"
        ) from error


def unpacked_zstd(name: str, file: io.BufferedReader) -> io.RawIOBase:
    """The unpacked bytes of all frames of a .zst file; OSError where one is damaged or cut."""
    pyarrow = _import_pyarrow("pyarrow", name, "zstd")
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


ROWS_AT_ONCE = 16  # few, because each may be a long document


def parquet_rows(name: str) -> Iterator[Line]:
    """The column `text` of a Parquet file, a few rows at a time.

    Raises DataError where there is no such column, or the file is damaged or a pipe: what a Parquet
    file holds is written at its end.
    """
    if not Path(name).is_file():
        raise DataError(f"{name}: this is Parquet, which cannot be read from a pipe: name the file")
    pyarrow = _import_pyarrow("pyarrow", name, "Parquet")
    parquet = _import_pyarrow("pyarrow.parquet", name, "Parquet")
    number = 0
    try:
        # pages are read as they are needed, or else a row group would have to fit into memory
        with parquet.ParquetFile(name, pre_buffer=False, buffer_size=1 << 20) as file:
            _check_columns(name, file.schema_arrow)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=["text"], use_threads=False):
                for text in batch.column(0):
                    number += 1
                    content = json.dumps(text.as_py(), ensure_ascii=False).encode()
                    yield Line(name, number, content)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name}: damaged, behind row {number:,} ({error})") from error


def _check_columns(name: str, schema) -> None:
    """Raises DataError unless the schema of a Parquet file has the column `text`, of strings."""
    kinds = {field.name: str(field.type) for field in schema}
    if kinds.get("text") not in ("string", "large_string"):
        shown = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        raise DataError(f"{name}: no column 'text' of strings; its columns are: {shown}")


def read_lines(path: str | Path) -> Iterator[Line]:
    """The lines of a file that are not blank, as Source.lines."""
    return Source(str(path)).lines()


def parse_text(line: Line) -> str:
    """The text of a document. Raises DataError, with file and line, if there is none."""
    where = f"{line.file}, line {line.number}"
    try:
        document = json.loads(line.content.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if isinstance(document, dict) and "text" not in document:
        raise DataError(f"{where}: the object has no 'text'")
    text = document["text"] if isinstance(document, dict) else document
    if not isinstance(text, str):
        raise DataError(f"{where}: the text is {type(text).__name__}, not a string")
    return text


def read_text(line: Line) -> str:
    """As parse_text, and raises DataError on a lone surrogate, too: text that UTF-8 cannot hold."""
    text = parse_text(line)
    try:
        _utf8_size(text)
    except DataError as error:
        raise DataError(f"{line.file}, line {line.number}: {error}") from error
    return text


def make_batches(split: str, lines: Iterable[Line], done: int, checksum: int) -> Iterator[Batch]:
    """Lines -> batches of about BATCH_BYTES, without the first `done` lines.

    The checksum of the lines that are left out must be the one given.

    Raises DataError if it is not: the input is not the one that an interrupted run has read.
    """
    batch, size, first, total, lines = [], 0, done, 0, iter(lines)
    for line in itertools.islice(lines, done):
        total = zlib.crc32(line.content, total)
    if total != checksum:
        raise DataError(
            f"these are not the {done:,} {split} documents that the interrupted run has read"
        )
    for line in lines:
        total = zlib.crc32(line.content, total)
        batch.append(line)
        size += len(line.content)
        if size >= BATCH_BYTES:
            yield Batch(split, batch, first, total)
            batch, size, first = [], 0, first + len(batch)
    if batch:
        yield Batch(split, batch, first, total)


_URL = re.compile(r"(?:https?://|www\.)[^\s<>\"]{40,}")
_BLOB = re.compile(r"[!-~]{100,}")
_RULER = re.compile(r"([^\sA-Za-z0-9])\1{9,}")
_BLANK = re.compile("[ \n]")
_DEBRIS = re.compile("[\0-\x08\x0b\x0e-\x1f\x7f\ufffd]+")


def normalize_text(text: str) -> str:
    """A training text without what no model can learn from.

    That is addresses longer than 40 characters behind `www.` or `https://`, runs of 100 ASCII
    characters without a blank (encoded files), a sign repeated ten times or more (three stay),
    control characters and U+FFFD. Validation is never normalized.
    """
    blocks = []
    start = 0
    # a substitution keeps some hundred bytes for each match; none matches a blank
    while start < len(text):
        end = _BLANK.search(text, start + BLOCK_CHARS)
        end = end.start() if end else len(text)
        blocks.append(
            _DEBRIS.sub("", _RULER.sub(r"\1\1\1", _BLOB.sub("", _URL.sub("", text[start:end]))))
        )
        start = end
    return "".join(blocks)


@lru_cache(maxsize=1)
def _encoder_of_process(tokenizer: str, kept: int) -> Encoder:
    """The one Encoder of a process, which keeps its tables from batch to batch."""
    return Encoder(load_tokenizer(tokenizer), kept)


def document_hash(ids: np.ndarray) -> int:
    """64 bits of a document's ids (tokens,) uint16.

    Two of 15 million documents and 50,000 others collide by chance once in 20 million datasets.
    """
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def _compare_with_the_plain_way(sp, text: str, ids: np.ndarray, costs: list[np.ndarray]) -> None:
    """Raises DataError if Encoder gave a text other ids (tokens,), or other costs, than it has.

    costs: of validation its costs (tokens,) as the only item, of training none.
    """
    plain_ids, plain_costs = (
        encode_document_with_bytes(sp, text) if costs else (encode_document(sp, text), None)
    )
    if not np.array_equal(ids, plain_ids) or (costs and not np.array_equal(costs[0], plain_costs)):
        raise DataError(
            "this tokenizer cannot be taken word by word: its pieces or rules reach over their"
            " borders"
        )


def encode_batch(tokenizer: str, normalize_train: bool, kept: int, batch: Batch) -> EncodedBatch:
    """Parses and encodes a batch, with the tokenizer at that path.

    Raises DataError naming document, file and line.

    The first document is encoded without the shortcuts of Encoder as well, and must come out the
    same.
    """
    encoder = _encoder_of_process(tokenizer, kept)
    ids, costs, sizes, removed, hashes = [], [], [], [], []
    for document, line in enumerate(batch.lines, batch.first_document):
        text = parse_text(line)
        try:
            if _utf8_size(text) > LONGEST_TEXT:
                raise DataError(
                    f"a text of more than {LONGEST_TEXT:,} bytes; split it or leave it out"
                )
            if batch.split == "val":
                document_ids, document_costs = encoder.encode_with_bytes(text)
                costs.append(document_costs)
            else:
                document_ids = encoder.encode(text)
            if not ids and len(text) <= BLOCK_CHARS:  # longer ones have no shortcuts
                _compare_with_the_plain_way(encoder.sp, text, document_ids, costs)
            hash_as_it_came = document_hash(document_ids)
            cleaned = normalize_text(text) if normalize_train and batch.split == "train" else text
            if cleaned != text:
                document_ids = encoder.encode(cleaned)
            hashes.append(
                (
                    hash_as_it_came,
                    document_hash(document_ids) if cleaned != text else hash_as_it_came,
                )
            )
        except DataError as error:
            raise DataError(
                f"{batch.split} document {document} ({line.file}, line {line.number}): {error}"
            ) from error
        ids.append(document_ids)
        sizes.append(_utf8_size(cleaned))
        removed.append(_utf8_size(text) - sizes[-1])
    return EncodedBatch(
        batch.split,
        batch.checksum,
        np.concatenate(ids),
        np.concatenate(costs) if costs else None,
        np.array([len(part) for part in ids]),
        np.array(sizes),
        np.array(removed),
        np.array(hashes, dtype=np.uint64),
    )


def map_in_order(function, batches: Iterable[Batch], workers: int) -> Iterator:
    """`map` over processes that keeps the order and reads only a few batches ahead.

    In this process for one worker; for several, only in the main thread, which alone gets signals.

    Raises WorkerLost if a worker is killed.
    """
    if workers == 1:
        yield from map(function, batches)
        return
    bytes_ahead = 4 * workers * BATCH_BYTES  # a document of many megabytes goes alone
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_the_parent)
    try:
        pending, sizes = deque(), deque()
        for batch in batches:
            size = sum(len(line.content) for line in batch.lines)
            while len(pending) > 2 * workers or (pending and size + sum(sizes) > bytes_ahead):
                sizes.popleft()
                yield pending.popleft().result()
            pending.append(_submit(pool, function, batch))
            sizes.append(size)
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerLost(
            "a worker process was killed, perhaps for want of memory: try fewer --workers"
        ) from error
    finally:
        # A second Ctrl-C would break this off, and the process would then wait for workers that
        # nobody ends.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, handler)


def _end_with_the_parent() -> None:
    """For workers: one whose parent was killed would wait for its next batch forever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _submit(pool: ProcessPoolExecutor, function, batch: Batch) -> Future:
    """Ctrl-C reaches all processes of a terminal.

    Workers, which may start here, leave it to this one.
    """
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


# --------------------------------------------------------------------------------------------------
# DATASET
# --------------------------------------------------------------------------------------------------


# what an interrupted run needs to go on; gone when the manifest is written
PROGRESS = "progress.bin"


class Corpus(NamedTuple):
    """Where documents come from, and which of them are for validation."""

    val: Iterable[Line]
    train: Iterable[Line]
    rule: str  # of the split, in words
    sources: Callable[[], list[dict]]  # for the manifest, once all has been read
    may_be_empty: frozenset[str] = frozenset()  # splits that were asked to hold nothing


def corpus_from_files(
    docs: list[str], val_file: str | None, val_docs: int, train_docs: int | None
) -> Corpus:
    """The corpus of `--docs`.

    Its first `val_docs` documents are validation, unless there is a `val_file`.
    """
    if [*docs, val_file].count("-") > 1:
        raise DataError("-: standard input can be read once only")
    files = [(Source(path), "docs") for path in docs]
    documents = itertools.chain.from_iterable([source.lines() for source, _ in files])
    if val_file is not None:
        if any(_same_file(val_file, path) for path in docs):
            raise DataError(f"{val_file}: the same file is given for training and for validation")
        files.insert(0, (Source(val_file), "val"))
        val = files[0][0].lines()
        rule = (
            f"all documents of {Path(val_file).name} are validation, documents of the others are"
            " train"
        )
    else:
        val = _first_of(documents, val_docs)
        rule = f"the first {val_docs:,} documents are validation, those after them are train"
    if train_docs is not None:
        rule += f", at most {train_docs:,}"

    def sources() -> list[dict]:
        return [
            {"file": Path(file.name).name, "role": role, "sha256": file.sha256()}
            for file, role in files
        ]

    asked_for = {"val": val_docs if val_file is None else None, "train": train_docs}
    may_be_empty = frozenset(split for split, count in asked_for.items() if count == 0)
    return Corpus(val, itertools.islice(documents, train_docs), rule, sources, may_be_empty)


def _same_file(one: str, other: str) -> bool:
    if not (Path(one).is_file() and Path(other).is_file()) or os.path.getsize(
        one
    ) != os.path.getsize(other):
        return False
    return file_sha256(one) == file_sha256(other)


def _first_of(documents: Iterator[Line], count: int) -> Iterator[Line]:
    missing = count
    for document in itertools.islice(documents, count):
        yield document
        missing -= 1
    if missing:
        raise DataError(
            f"{count - missing:,} documents are fewer than the {count:,} for validation"
            " (--val-docs)"
        )


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file of any size."""
    with path_in_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_used_folder(folder: Path) -> None:
    """Raises DataError if there are shards of a run that ended.

    Two runs in one folder would be read as one dataset.
    """
    used = sorted(
        path.name for pattern in ("fineweb_*", "manifest.json*") for path in folder.glob(pattern)
    )
    if used and ((folder / "manifest.json").exists() or not (folder / PROGRESS).exists()):
        raise DataError(
            f"{folder} already holds {used[0]} ({len(used)} files in all): remove them or change"
            " --out"
        )


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder until this one ends, however it ends.

    Raises DataError if another run is in it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(
            f"{folder} is in use by another run: wait for it, or name another folder"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


class Dataset:
    """A dataset in the making: counts, finished files and values.

    Values wait for the next file of each stream.

    `save` puts all of that on the disk when files have been finished; a run that finds it goes on
    from there.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = folder, settings
        self.splits = {"val": dict.fromkeys(("documents", "tokens", "bytes", "charged_bytes"), 0)}
        self.splits["train"] = dict.fromkeys(
            ("documents", "tokens", "bytes", "left_out", "removed_bytes"), 0
        )
        self.read_so_far = {"val": [0, 0], "train": [0, 0]}  # documents, checksum of their lines
        self.writers = {
            stream: ShardWriter(folder, stream, settings["shard_tokens"])
            for stream in ("val", "val_bytes", "train")
        }
        if (folder / PROGRESS).exists():
            self._load()
        for path in folder.glob("fineweb_*"):  # begun after the state was saved
            if path.name not in self.entries:
                path.unlink()
        self.save()

    def add(self, batch: EncodedBatch, is_validation: np.ndarray) -> None:
        """Appends a batch.

        Training documents that are validation documents (documents,) are left out and counted.
        """
        if batch.split == "train" and is_validation.any():
            batch = _without(batch, is_validation)
        counts, finished = self.splits[batch.split], len(self.entries)
        counts["documents"] += len(batch.lengths)
        counts["tokens"] += len(batch.ids)
        counts["bytes"] += int(batch.text_bytes.sum())
        if batch.split == "val":
            counts["charged_bytes"] += int(batch.costs.sum(dtype=np.int64))
            self.writers["val_bytes"].add(batch.costs)
        else:
            counts["left_out"] += int(is_validation.sum())
            counts["removed_bytes"] += int(batch.removed_bytes.sum())
        self.writers[batch.split].add(batch.ids)
        documents, _ = self.read_so_far[batch.split]
        self.read_so_far[batch.split] = [documents + len(is_validation), batch.checksum]
        if len(self.entries) > finished:
            self.save()

    def finish_split(self, split: str) -> None:
        """Writes the last, short file of the split's streams."""
        for stream, writer in self.writers.items():
            if stream.startswith(split):
                writer.flush()
                writer.buffer = np.empty(0, dtype=np.uint16)
        self.save()

    @property
    def entries(self) -> dict[str, dict]:
        """File name -> manifest entry."""
        return {
            name: entry
            for writer in self.writers.values()
            for name, entry in writer.entries.items()
        }

    def save(self) -> None:
        waiting = {
            stream: writer.buffer[: writer.filled] for stream, writer in self.writers.items()
        }
        state = {"settings": self.settings, "splits": self.splits, "read": self.read_so_far}
        state["entries"] = {stream: writer.entries for stream, writer in self.writers.items()}
        state["waiting"] = {stream: len(values) for stream, values in waiting.items()}
        write_whole(self.folder / PROGRESS, json.dumps(state).encode() + b"\n", *waiting.values())

    def _load(self) -> None:
        head, _, values = (self.folder / PROGRESS).read_bytes().partition(b"\n")
        try:
            state = json.loads(head)
        except ValueError as error:
            raise DataError(
                f"{self.folder / PROGRESS}: damaged; remove the folder's files and begin anew"
            ) from error
        if not sum(read for read, _ in state["read"].values()):
            return
        if state["settings"] != self.settings:
            other = [
                key for key in self.settings if self.settings[key] != state["settings"].get(key)
            ]
            raise DataError(
                f"{self.folder} holds an interrupted run with another {', '.join(other)}: "
                "repeat its command to go on, or remove its files"
            )
        for name, entry in itertools.chain.from_iterable(
            files.items() for files in state["entries"].values()
        ):
            path = self.folder / name
            if not path.exists() or len(read_shard(path)) != entry["values"]:
                raise DataError(
                    f"{path}: missing or changed since the interrupted run wrote it; remove the"
                    " folder's files and begin anew"
                )
        self.splits, self.read_so_far, start = state["splits"], state["read"], 0
        for stream, writer in self.writers.items():
            writer.entries = state["entries"][stream]
            end = start + 2 * state["waiting"][stream]
            writer.add(np.frombuffer(values[start:end], dtype=np.uint16))
            start = end
        val, train = (documents for documents, _ in self.read_so_far.values())
        print(f"going on behind {val:,} + {train:,} documents", flush=True)


def _without(batch: EncodedBatch, left_out: np.ndarray) -> EncodedBatch:
    """A training batch without the documents where `left_out` (documents,) is set."""
    kept = ~left_out
    return batch._replace(
        ids=batch.ids[np.repeat(kept, batch.lengths)],
        lengths=batch.lengths[kept],
        text_bytes=batch.text_bytes[kept],
        removed_bytes=batch.removed_bytes[kept],
    )


def shard_files(folder: str | Path, stream: str) -> list[Path]:
    """The files of "train", "val" or "val_bytes", in order."""
    return sorted(Path(folder).glob(f"fineweb_{stream}_[0-9][0-9][0-9][0-9][0-9][0-9].bin"))


def read_documents(paths: list[Path]) -> Iterator[tuple[Path, np.ndarray]]:
    """The documents of a stream, ids (tokens,) uint16, BOS first.

    Each comes with the file in which it begins.

    Reads a few megabytes at a time. Raises DataError where a file is damaged or the stream does not
    begin with BOS.
    """
    begun_in, parts = None, []
    for path in paths:
        values = read_shard(path)
        for start in range(0, len(values), 1 << 22):
            chunk = np.array(values[start : start + (1 << 22)])
            head, *rest = np.split(chunk, np.flatnonzero(chunk == BOS_ID))
            parts.append(head)
            if begun_in is None and len(head):
                raise DataError(f"{path}: the stream does not begin with BOS")
            for document in rest:
                if begun_in is not None:
                    yield begun_in, parts[0] if len(parts) == 1 else np.concatenate(parts)
                begun_in, parts = path, [document]
    if begun_in is not None:
        yield begun_in, np.concatenate(parts)


def validation_hashes(folder: Path) -> np.ndarray:
    """Sorted hashes (documents,) uint64 of the validation documents that hold anything."""
    hashes = [
        document_hash(ids) for _, ids in read_documents(shard_files(folder, "val")) if len(ids) > 1
    ]
    return np.unique(np.array(hashes, dtype=np.uint64))


SPLIT_NAMES = {"val": "validation", "train": "training"}


def refuse_empty_split(split: str, counts: dict) -> None:
    """Raises DataError where there is nothing to train on, or nothing to score."""
    name = SPLIT_NAMES[split]
    if counts.get("left_out") and not counts["documents"]:
        raise DataError(
            f"all {counts['left_out']:,} {name} documents are validation documents: nothing is left"
        )
    if not counts["documents"]:
        raise DataError(
            f"there are no {name} documents" + " behind those of validation" * (split == "train")
        )
    if counts["tokens"] == counts["documents"]:  # BOS and no more
        raise DataError(f"all {counts['documents']:,} {name} documents are empty")


def count_leaks(folder: Path, known: np.ndarray) -> int:
    """Training documents of the finished shards whose hash is in `known`.

    What was written, not what was meant.
    """
    known = set(known.tolist())
    return sum(
        document_hash(ids) in known for _, ids in read_documents(shard_files(folder, "train"))
    )


def build_dataset(
    corpus: Corpus,
    settings: dict,
    out: Path,
    encoder: Callable[[Batch], EncodedBatch],
    workers: int,
):
    """Writes all shards of a corpus and their manifest, which is also returned.

    `encoder` runs in the workers. An interrupted run in `out` goes on. Raises DataError where the
    folder is in use or was, or a document or a split cannot be used, OSError for a full disk.
    """
    out.mkdir(parents=True, exist_ok=True)
    with only_run_in(out):
        refuse_used_folder(out)
        settings = {"split_rule": corpus.rule, **settings}
        dataset = Dataset(out, settings)
        known = _write_splits(corpus, dataset, encoder, workers)
        manifest = {
            "format": "caseops_shards",
            "version": 1,
            "text_transform": "lossless_caps_caseops_v1",
            **settings,
            "leaked_documents": count_leaks(out, known),
            "sources": corpus.sources(),
            "splits": dataset.splits,
            "files": dataset.entries,
        }
        write_manifest(out, manifest)
        (out / PROGRESS).unlink()
    return manifest


def _write_splits(
    corpus: Corpus,
    dataset: Dataset,
    encoder: Callable[[Batch], EncodedBatch],
    workers: int,
) -> np.ndarray:
    """Writes both splits, validation first -> hashes (documents,) of the validation documents."""
    known = np.zeros(0, dtype=np.uint64)
    for split, lines in (("val", corpus.val), ("train", corpus.train)):
        batches = make_batches(split, lines, *dataset.read_so_far[split])
        for batch in map_in_order(encoder, batches, workers):
            dataset.add(batch, np.isin(batch.hashes, known).any(axis=1))
        if split not in corpus.may_be_empty:
            refuse_empty_split(split, dataset.splits[split])
        dataset.finish_split(split)
        known = validation_hashes(dataset.folder)
    return known


def write_manifest(folder: Path, manifest: dict) -> None:
    """Writes manifest.json, sealed with its own hash."""
    write_whole(folder / "manifest.json", _render(manifest | {"seal": _seal(manifest)}))


def read_manifest(folder: Path) -> dict:
    """manifest.json of a dataset.

    Raises DataError if it is missing, or if a single byte is not as it was written.
    """
    path = folder / "manifest.json"
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        seal = manifest.pop("seal")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: missing, damaged, or not made by this repository ({error!r})"
        ) from error
    if seal != _seal(manifest) or content != _render(manifest | {"seal": seal}):
        raise DataError(f"{path}: changed after it was written")
    return manifest


def _render(manifest: dict) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _seal(manifest: dict) -> str:
    return hashlib.sha256(_render(manifest)).hexdigest()


def tokenizer_entry(tokenizer: str) -> dict:
    """For the manifest."""
    vocab_size = load_tokenizer(tokenizer).get_piece_size()
    return {
        "file": Path(tokenizer).name,
        "sha256": file_sha256(tokenizer),
        "vocab_size": vocab_size,
    }


# --------------------------------------------------------------------------------------------------
# DEMO
# --------------------------------------------------------------------------------------------------

DEMO_DOCUMENT_CHARS = 400, 20_000
DEMO_VAL_CHARS = 1_000, 2_200  # about 500 tokens
DEMO_SKIPPED_FOLDERS = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "pip",
    "_vendor",
}


def demo_roots() -> list[Path]:
    """Where the running interpreter keeps its standard library and its packages."""
    paths = sysconfig.get_paths()
    return [
        Path(root)
        for root in dict.fromkeys(paths[name] for name in ("stdlib", "purelib", "platlib"))
    ]


def demo_corpus(roots: list[Path], size: int, val_docs: int) -> Corpus:
    """The documentation of installed Python packages: real prose that is already here.

    Same packages, same corpus.

    Validation is `val_docs` short documents, picked by hash. `size` is in characters.
    """
    documents = demo_documents(roots, size)
    shortest, longest = DEMO_VAL_CHARS
    candidates = [text for text in documents if shortest <= len(text) <= longest]
    val = sorted(candidates, key=_text_hash)[:val_docs]
    if len(val) < val_docs:
        raise DataError(
            f"only {len(val)} documents have {shortest:,} to {longest:,} characters; --val-docs"
            f" {val_docs}"
        )
    train = [text for text in documents if text not in val]
    rule = f"{val_docs} short documents, picked by hash, are validation, the others are train"
    sources = [
        {
            "file": "documentation of the installed packages",
            "role": "docs",
            "sha256": _text_hash(*documents),
        }
    ]
    return Corpus(_as_lines("demo val", val), _as_lines("demo train", train), rule, lambda: sources)


def demo_documents(roots: list[Path], size: int) -> list[str]:
    """Documents of about `size` characters in all: package descriptions, and docstrings by module.

    No paragraph stands in two of them, so that validation is not seen in training.
    """
    documents, seen = [], set()
    for text in itertools.chain(_package_descriptions(roots), _module_docstrings(roots)):
        if size <= 0:
            break
        paragraphs = {
            _normalize(part): part for part in re.split(r"\n\s*\n", text) if _is_prose(part)
        }
        document = "\n\n".join(paragraphs[key] for key in paragraphs if key not in seen)
        document = document[: DEMO_DOCUMENT_CHARS[1]].strip()
        if len(document) >= DEMO_DOCUMENT_CHARS[0]:
            documents.append(document)
            seen.update(paragraphs)
            size -= len(document)
    random.Random(1337).shuffle(documents)
    return documents


def _package_descriptions(roots: list[Path]) -> Iterator[str]:
    found = importlib.metadata.distributions(path=[str(root) for root in roots])
    metadata = sorted(
        (package.metadata for package in found), key=lambda fields: str(fields["Name"]).lower()
    )
    yield from (str(fields["Description"] or fields.get_payload()) for fields in metadata)


def _module_docstrings(roots: list[Path]) -> Iterator[str]:
    """One text a module, from its source.

    In order of hashed names, so that whatever fits is a fair sample.
    """
    modules = [
        (path.relative_to(root).as_posix(), path) for root in roots for path in _python_files(root)
    ]
    for _, path in sorted(modules, key=lambda module: (_text_hash(module[0]), module)):
        try:
            source = path.read_bytes()
            quoted = sum(map(len, re.findall(rb'"""(.*?)"""', source, re.DOTALL)))
            if quoted < max(DEMO_DOCUMENT_CHARS[0], len(source) // 4):
                # parsing takes far longer than this look, so parse what is mostly
                # documentation
                continue
            # of invalid escapes in other people's strings
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        yield "\n\n".join(_docstrings(tree))


def _docstrings(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Of a module or class, its classes and its functions, in the order of the source."""
    yield ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(child) or ""


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in DEMO_SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _is_prose(paragraph: str) -> bool:
    """Mostly words, unlike tables, examples and lists of parameters."""
    others = len(re.sub(r"[A-Za-z\s]+", "", paragraph))
    return others <= 0.1 * len(paragraph) and len(paragraph.split()) >= 8


def _normalize(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _text_hash(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _as_lines(name: str, texts: list[str]) -> list[Line]:
    return [Line(name, number, json.dumps(text).encode()) for number, text in enumerate(texts, 1)]


# --------------------------------------------------------------------------------------------------
# MAIN
# --------------------------------------------------------------------------------------------------


MAX_SHARD_TOKENS = 2**31 - 1  # the header's int32


def whole_number(lowest: int, highest: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from `lowest` to `highest`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not lowest <= number <= highest:
            limits = (
                f"from {lowest:,} to {highest:,}"
                if highest < 2**63 - 1
                else f"of {lowest:,} or more"
            )
            raise argparse.ArgumentTypeError(f"{text} is not a whole number {limits}")
        return number

    return parse


def add_validation_source(
    parser: argparse.ArgumentParser, default: int | None, val_docs_help: str
) -> None:
    """Adds --val-docs and --val-file, of which at most one may be given."""
    group = parser.add_mutually_exclusive_group()
    count = whole_number(0)
    group.add_argument("--val-docs", type=count, default=default, metavar="N", help=val_docs_help)
    group.add_argument(
        "--val-file", metavar="FILE", help="validation documents, if they have a file of their own"
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Gives a command the argument --workers."""
    number, cores = whole_number(1, 4096), os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=number, default=cores, metavar="N", help="default: %(default)s"
    )


def add_shard_tokens(parser: argparse.ArgumentParser) -> None:
    """Gives a command the argument --shard-tokens."""
    size = whole_number(1, MAX_SHARD_TOKENS)
    parser.add_argument(
        "--shard-tokens", type=size, default=100_000_000, metavar="N", help="default: %(default)s"
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    count = whole_number(0)
    parser = argparse.ArgumentParser(
        description="Make CaseOps shards from documents.",
        epilog="Two more commands: verify DIR, retokenize DIR; see their --help.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--docs",
        nargs="+",
        metavar="FILE",
        help="JSON lines, plain, .gz, .xz or .zst, .parquet, or - (stdin), in order",
    )
    source.add_argument(
        "--demo", action="store_true", help="documentation of the installed Python packages"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the shards go; new or empty"
    )
    parser.add_argument(
        "--tokenizer", default=str(DEFAULT_TOKENIZER), metavar="MODEL", help="default: %(default)s"
    )
    add_validation_source(parser, None, "first documents (default: 50,000; demo: 10)")
    parser.add_argument(
        "--train-docs", type=count, metavar="N", help="at most this many training documents"
    )
    add_shard_tokens(parser)
    add_workers(parser)
    parser.add_argument(
        "--normalize-train", action="store_true", help="long URLs and debris out of training text"
    )
    parser.add_argument(
        "--demo-bytes", type=count, default=4_000_000, metavar="N", help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    if options.demo and (options.val_file is not None or options.train_docs is not None):
        parser.error("--val-file and --train-docs go with --docs")
    return options


def print_counts(manifest: dict) -> None:
    """A line for each split of a finished dataset: documents, tokens, bytes."""
    for split, counts in manifest["splits"].items():
        print(f"{split}: " + ", ".join(f"{number:,} {name}" for name, number in counts.items()))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["verify"], ["retokenize"]):
        tool = importlib.import_module(
            {"verify": "tools.verify_data", "retokenize": "tools.retokenize"}[arguments[0]]
        )
        return tool.main(arguments[1:])
    options = parse_arguments(arguments)
    return run_command(partial(prepare, options), kept_in=options.out)


def prepare(options: argparse.Namespace) -> int:
    """Makes a dataset from documents as the command line says; returns the exit status."""
    val_docs = options.val_docs if options.val_docs is not None else 10 if options.demo else 50_000
    refuse_used_folder(options.out)  # before minutes of reading, too
    if options.demo:
        corpus = demo_corpus(demo_roots(), options.demo_bytes, val_docs)
    else:
        corpus = corpus_from_files(options.docs, options.val_file, val_docs, options.train_docs)
    print(f"split: {corpus.rule}", flush=True)
    settings = {
        "tokenizer": tokenizer_entry(options.tokenizer),
        "shard_tokens": options.shard_tokens,
    }
    settings["normalize_train"] = options.normalize_train
    # words: all processes together stay under 2 GB
    kept = min(300_000, 2_000_000 // options.workers)
    encoder = partial(encode_batch, options.tokenizer, options.normalize_train, kept)
    print_counts(build_dataset(corpus, settings, options.out, encoder, options.workers))
    return 0


if __name__ == "__main__":
    # main of the module that tools and workers import: this one, __main__, has classes of its own
    sys.exit(importlib.import_module("prepare_caseops_data").main())
