"""Documents in, CaseOps shards out: the token files that `train_gpt.py` reads, made from JSON lines.

    python prepare_caseops_data.py --demo --out data/demo                              # no download, seconds
    python prepare_caseops_data.py --docs docs_selected.jsonl --out data/caseops       # first 50,000: validation
    python prepare_caseops_data.py --docs train.jsonl.xz --val-file val.jsonl.xz --out data/caseops

A line is an object with a `text`, or a bare JSON string; files may be plain, .gz or .xz. Each document becomes BOS and
the tokens of its transformed text (lossless_caps.py). Validation tokens get a side-car with the number of UTF-8 bytes
of the original text that each token stands for, so that bits per byte are counted on the text and not on the tokens.

Lines are read and cut into batches here, parsed and encoded in worker processes, and written here in their order, so
that the files do not depend on the number of workers. Shard layout: openai/parameter-golf, PR 1729.
"""

import argparse
import ast
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import lzma
import multiprocessing
import os
import random
import re
import sys
import sysconfig
import warnings
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
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
BATCH_BYTES = 1 << 20  # of JSON lines, in one message to a worker


class DataError(ValueError):
    """Input that cannot be made into shards; the message says where it is."""


# ----------------------------------------------------------------------------------------------------------------------
# TOKENIZER
# ----------------------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model at `path`. Raises DataError if its first 264 ids are not those of CaseOps."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such tokenizer")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise DataError(f"{path}: not a SentencePiece model ({error})") from error
    layout = ["<pad>", "<s>", "</s>", "<unk>", *CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256))]
    if not len(layout) < sp.get_piece_size() <= 1 << 16:
        raise DataError(f"{path}: {sp.get_piece_size()} pieces, CaseOps takes 265 to 65,536")
    for index, piece in enumerate(layout):
        if sp.id_to_piece(index) != piece:
            raise DataError(f"{path}: not a CaseOps tokenizer: id {index} is {sp.id_to_piece(index)!a}, not {piece!a}")
    # The same names do not make them markers: a user-defined symbol is never normalized nor merged with its neighbours.
    if sp.encode(CONTROLS * 2) != [4, 5, 6, 7] * 2:
        raise DataError(f"{path}: not a CaseOps tokenizer: the case markers are not user-defined symbols")
    return sp


def encode_document(sp: sentencepiece.SentencePieceProcessor, text: str) -> np.ndarray:
    """Text -> ids (tokens,) uint16, BOS first. Raises DataError on a lone surrogate."""
    _utf8_size(text)
    return np.array([BOS_ID, *sp.encode(encode(text))], dtype=np.uint16)


def encode_document_with_bytes(sp: sentencepiece.SentencePieceProcessor, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Text -> ids (tokens,) and bytes (tokens,), both uint16, BOS with 0 bytes first.

    A token is charged the UTF-8 size of the original text it came from; markers are free. Only leading and trailing
    characters that the tokenizer drops are charged to nobody. Raises DataError on a lone surrogate, and where one
    token stands for more than 65,535 bytes.
    """
    _utf8_size(text)
    transformed = encode(text)
    ids, spans = _tokenize_with_spans(sp, transformed)
    spans = np.array([(0, 0), *spans], dtype=np.int64)  # (tokens, 2), in characters of the transformed text
    size_before = np.concatenate([[0], np.cumsum(_byte_costs(transformed))])
    costs = size_before[spans[:, 1]] - size_before[spans[:, 0]]
    if costs.max() > np.iinfo(np.uint16).max:
        raise DataError(f"token {costs.argmax()} stands for {costs.max():,} bytes; the side-car holds at most 65,535")
    return np.array([BOS_ID, *ids], dtype=np.uint16), costs.astype(np.uint16)


def _utf8_size(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise DataError(f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}") from error


def _tokenize_with_spans(sp, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if hasattr(sp, "encode_as_offset_mapping"):  # sentencepiece 0.2.2 and later
        mapping = sp.encode_as_offset_mapping(text)
        return mapping["ids"], mapping["offsets"]
    pieces = sp.encode_as_immutable_proto(text).pieces  # what 0.2.0 and 0.2.1 have
    return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]


def _byte_costs(transformed: str) -> np.ndarray:
    """UTF-8 bytes (characters,) that each character of an encoded text had in the original: markers had none."""
    points = np.frombuffer(transformed.encode("utf-32-le"), dtype=np.uint32)
    costs = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    costs[(points >= ord(CONTROLS[0])) & (points <= ord(CONTROLS[-1]))] = 0
    for literal in re.finditer(f"{ESC}[{CONTROLS}]", transformed):
        costs[literal.end() - 1] = 3
    return costs


# ----------------------------------------------------------------------------------------------------------------------
# SHARDS
# ----------------------------------------------------------------------------------------------------------------------


def write_shard(path: str | Path, values: np.ndarray) -> dict:
    """Values (n,) that fit uint16 -> one shard file; returns its manifest entry. The name appears when it is whole."""
    values = np.asarray(values)
    if values.size and not 0 <= values.min() <= values.max() <= np.iinfo(np.uint16).max:
        raise DataError(f"{path}: values outside 0..65535")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(values)
    return {"values": len(values), "sha256": write_whole(path, header, values.astype("<u2", copy=False))}


def read_shard(path: str | Path) -> np.ndarray:
    """A shard file -> values (n,) uint16. Raises DataError if the header or the size is wrong."""
    content = Path(path).read_bytes()
    header_bytes = 4 * HEADER_INTS
    header = np.frombuffer(content[:header_bytes], dtype="<i4") if len(content) >= header_bytes else [0, 0, 0]
    if (header[0], header[1]) != (SHARD_MAGIC, SHARD_VERSION):
        raise DataError(f"{path}: not a shard")
    if len(content) != header_bytes + 2 * header[2]:
        raise DataError(f"{path}: {len(content):,} bytes do not hold the {header[2]:,} values of its header")
    return np.frombuffer(content, dtype="<u2", offset=header_bytes).astype(np.uint16)


def write_whole(path: str | Path, *parts: bytes | np.ndarray) -> str:
    """Writes under a temporary name, then renames: a file that has its name is complete. Returns its sha256."""
    temporary, digest = Path(f"{path}.tmp"), hashlib.sha256()
    with temporary.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
    temporary.replace(path)
    return digest.hexdigest()


class ShardWriter:
    """Cuts a stream of values into `fineweb_<stream>_<number>.bin`; all but the last hold exactly `shard_tokens`."""

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


# ----------------------------------------------------------------------------------------------------------------------
# DOCUMENTS
# ----------------------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A document as it stands in its file, and where that is."""

    file: str
    number: int  # of the line, from 1
    content: bytes


class Batch(NamedTuple):
    """Consecutive documents of one split, on their way to a worker."""

    split: str  # "val" or "train"
    lines: list[Line]
    first_document: int  # number of the first one within its split, from 0


class EncodedBatch(NamedTuple):
    """What comes back for a Batch."""

    split: str
    documents: int
    text_bytes: int
    ids: np.ndarray  # (tokens,) uint16
    costs: np.ndarray | None  # (tokens,) uint16, of validation only


def read_lines(path: str | Path) -> Iterator[Line]:
    """The lines of a plain, .gz or .xz file that are not blank. Raises DataError if it cannot be unpacked."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    try:
        with opener(path, "rb") as file:
            for number, content in enumerate(file, 1):
                if content.strip():
                    yield Line(str(path), number, content)
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: damaged ({error})") from error


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


def make_batches(split: str, lines: Iterable[Line]) -> Iterator[Batch]:
    """Lines -> batches of about BATCH_BYTES."""
    batch, size, first = [], 0, 0
    for line in lines:
        batch.append(line)
        size += len(line.content)
        if size >= BATCH_BYTES:
            yield Batch(split, batch, first)
            batch, size, first = [], 0, first + len(batch)
    if batch:
        yield Batch(split, batch, first)


_tokenizer_of_process = lru_cache(maxsize=1)(load_tokenizer)


def encode_batch(tokenizer: str, batch: Batch) -> EncodedBatch:
    """Parses and encodes a batch, with the tokenizer at that path. Raises DataError naming document, file and line."""
    sp = _tokenizer_of_process(tokenizer)
    ids, costs, text_bytes = [], [], 0
    for document, line in enumerate(batch.lines, batch.first_document):
        text = parse_text(line)
        try:
            if batch.split == "val":
                document_ids, document_costs = encode_document_with_bytes(sp, text)
                costs.append(document_costs)
            else:
                document_ids = encode_document(sp, text)
        except DataError as error:
            raise DataError(f"{batch.split} document {document} ({line.file}, line {line.number}): {error}") from error
        ids.append(document_ids)
        text_bytes += _utf8_size(text)
    joined_costs = np.concatenate(costs) if costs else None
    return EncodedBatch(batch.split, len(batch.lines), text_bytes, np.concatenate(ids), joined_costs)


def map_in_order(function, items: Iterable, workers: int) -> Iterator:
    """`map` over processes that keeps the order and reads only a few items ahead; in this process for one worker."""
    if workers == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# DATASET
# ----------------------------------------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """Where documents come from, and which of them are for validation."""

    val: Iterable[Line]
    train: Iterable[Line]
    rule: str  # of the split, in words
    sources: list[dict]  # for the manifest


def corpus_from_files(docs: list[str], val_file: str | None, val_docs: int, train_docs: int | None) -> Corpus:
    """The corpus of `--docs`: its first `val_docs` documents are validation, unless there is a `val_file`."""
    sources = [_source_entry(path, "docs") for path in docs]
    documents = itertools.chain.from_iterable(map(read_lines, docs))
    if val_file is not None:
        sources.insert(0, _source_entry(val_file, "val"))
        if sources[0]["sha256"] in {source["sha256"] for source in sources[1:]}:
            raise DataError(f"{val_file}: the same file is given for training and for validation")
        val = read_lines(val_file)
        rule = f"all documents of {Path(val_file).name} are validation, documents of the others are train"
    else:
        val = _first_of(documents, val_docs)
        rule = f"the first {val_docs:,} documents are validation, those after them are train"
    if train_docs is not None:
        rule += f", at most {train_docs:,}"
    return Corpus(val, itertools.islice(documents, train_docs), rule, sources)


def _first_of(documents: Iterator[Line], count: int) -> Iterator[Line]:
    missing = count
    for document in itertools.islice(documents, count):
        yield document
        missing -= 1
    if missing:
        raise DataError(f"{count - missing:,} documents are fewer than the {count:,} for validation (--val-docs)")


def _source_entry(path: str, role: str) -> dict:
    return {"file": Path(path).name, "role": role, "sha256": file_sha256(path)}


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file of any size."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_used_folder(folder: Path) -> None:
    """Raises DataError if shards or a manifest are there: two runs in one folder would be read as one dataset."""
    used = sorted(path.name for pattern in ("fineweb_*", "manifest.json*") for path in folder.glob(pattern))
    if used:
        raise DataError(f"{folder} already holds {used[0]} ({len(used)} files in all): remove them or change --out")


def build_dataset(corpus: Corpus, out: Path, tokenizer: str, shard_tokens: int, workers: int) -> dict:
    """Writes all shards of a corpus and their manifest, which is also returned."""
    vocab_size = load_tokenizer(tokenizer).get_piece_size()
    refuse_used_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    batches = itertools.chain(make_batches("val", corpus.val), make_batches("train", corpus.train))
    encoded = map_in_order(partial(encode_batch, tokenizer), batches, workers)
    splits, files = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("val", "train")}, {}
    for split, group in itertools.groupby(encoded, key=lambda batch: batch.split):
        splits[split], entries = _write_split(group, split, out, shard_tokens)
        files |= entries
    manifest = {
        "format": "caseops_shards",
        "version": 1,
        "text_transform": "lossless_caps_caseops_v1",
        "tokenizer": {"file": Path(tokenizer).name, "sha256": file_sha256(tokenizer), "vocab_size": vocab_size},
        "split_rule": corpus.rule,
        "sources": corpus.sources,
        "shard_tokens": shard_tokens,
        "splits": splits,
        "files": files,
    }
    write_whole(out / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def _write_split(batches: Iterable[EncodedBatch], split: str, out: Path, shard_tokens: int) -> tuple[dict, dict]:
    """Writes the files of one split; returns its counts and the entries of its files."""
    counts = {"documents": 0, "tokens": 0, "bytes": 0}
    tokens = ShardWriter(out, split, shard_tokens)
    sidecar = ShardWriter(out, f"{split}_bytes", shard_tokens)
    for batch in batches:
        counts["documents"] += batch.documents
        counts["tokens"] += len(batch.ids)
        counts["bytes"] += batch.text_bytes
        tokens.add(batch.ids)
        if batch.costs is not None:
            counts["charged_bytes"] = counts.get("charged_bytes", 0) + int(batch.costs.sum(dtype=np.int64))
            sidecar.add(batch.costs)
    tokens.flush()
    sidecar.flush()
    return counts, tokens.entries | sidecar.entries


# ----------------------------------------------------------------------------------------------------------------------
# DEMO
# ----------------------------------------------------------------------------------------------------------------------

DEMO_DOCUMENT_CHARS = 400, 20_000
DEMO_VAL_CHARS = 1_000, 2_200  # about 500 tokens
DEMO_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "pip", "_vendor"}


def demo_roots() -> list[Path]:
    """Where the running interpreter keeps its standard library and its packages."""
    paths = sysconfig.get_paths()
    return [Path(root) for root in dict.fromkeys(paths[name] for name in ("stdlib", "purelib", "platlib"))]


def demo_corpus(roots: list[Path], size: int, val_docs: int) -> Corpus:
    """The documentation of installed Python packages: real prose that is already here. Same packages, same corpus.

    Validation is `val_docs` short documents, picked by hash. `size` is in characters.
    """
    documents = demo_documents(roots, size)
    shortest, longest = DEMO_VAL_CHARS
    candidates = [text for text in documents if shortest <= len(text) <= longest]
    val = sorted(candidates, key=_text_hash)[:val_docs]
    if len(val) < val_docs:
        raise DataError(f"only {len(val)} documents have {shortest:,} to {longest:,} characters; --val-docs {val_docs}")
    train = [text for text in documents if text not in val]
    rule = f"{val_docs} short documents, picked by hash, are validation, the others are train"
    sources = [{"file": "documentation of the installed packages", "role": "docs", "sha256": _text_hash(*documents)}]
    return Corpus(_as_lines("demo val", val), _as_lines("demo train", train), rule, sources)


def demo_documents(roots: list[Path], size: int) -> list[str]:
    """Documents of about `size` characters in all: package descriptions, and docstrings by module.

    No paragraph stands in two of them, so that validation is not seen in training.
    """
    documents, seen = [], set()
    for text in itertools.chain(_package_descriptions(roots), _module_docstrings(roots)):
        if size <= 0:
            break
        paragraphs = {_normalize(part): part for part in re.split(r"\n\s*\n", text) if _is_prose(part)}
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
    metadata = sorted((package.metadata for package in found), key=lambda fields: str(fields["Name"]).lower())
    yield from (str(fields["Description"] or fields.get_payload()) for fields in metadata)


def _module_docstrings(roots: list[Path]) -> Iterator[str]:
    """One text a module, from its source. In order of hashed names, so that whatever fits is a fair sample."""
    modules = [(path.relative_to(root).as_posix(), path) for root in roots for path in _python_files(root)]
    for _, path in sorted(modules, key=lambda module: (_text_hash(module[0]), module)):
        try:
            source = path.read_bytes()
            quoted = sum(map(len, re.findall(rb'"""(.*?)"""', source, re.DOTALL)))
            if quoted < max(DEMO_DOCUMENT_CHARS[0], len(source) // 4):
                continue  # parsing takes far longer than this look, so parse what is mostly documentation
            with warnings.catch_warnings(action="ignore"):  # of invalid escapes in other people's strings
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


# ----------------------------------------------------------------------------------------------------------------------
# MAIN
# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""

    def count(text: str) -> int:
        if int(text) < 0:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(description="Make CaseOps shards from documents.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--docs", nargs="+", metavar="FILE", help="JSON lines, plain, .gz or .xz; read in this order")
    source.add_argument("--demo", action="store_true", help="documentation of the installed Python packages")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the shards go; new or empty")
    parser.add_argument("--tokenizer", default=str(DEFAULT_TOKENIZER), metavar="MODEL", help="default: %(default)s")
    val = parser.add_mutually_exclusive_group()
    val.add_argument("--val-docs", type=count, metavar="N", help="first documents (default: 50,000; demo: 10)")
    val.add_argument("--val-file", metavar="FILE", help="validation documents, where they have a file of their own")
    parser.add_argument("--train-docs", type=count, metavar="N", help="at most this many training documents")
    parser.add_argument("--shard-tokens", type=count, default=100_000_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--workers", type=count, default=os.cpu_count() or 1, metavar="N", help="default: %(default)s")
    parser.add_argument("--demo-bytes", type=count, default=4_000_000, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.demo and (options.val_file is not None or options.train_docs is not None):
        parser.error("--val-file and --train-docs go with --docs")
    if not options.shard_tokens or not options.workers:
        parser.error("--shard-tokens and --workers must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse_arguments(arguments)
    val_docs = options.val_docs if options.val_docs is not None else 10 if options.demo else 50_000
    try:
        refuse_used_folder(options.out)  # before minutes of reading, too
        if options.demo:
            corpus = demo_corpus(demo_roots(), options.demo_bytes, val_docs)
        else:
            corpus = corpus_from_files(options.docs, options.val_file, val_docs, options.train_docs)
        print(f"split: {corpus.rule}", flush=True)
        manifest = build_dataset(corpus, options.out, options.tokenizer, options.shard_tokens, options.workers)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, counts in manifest["splits"].items():
        print(f"{split}: " + ", ".join(f"{number:,} {name}" for name, number in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
