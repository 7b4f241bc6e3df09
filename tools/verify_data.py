"""Checks a dataset: `python prepare_caseops_data.py verify data/mine [--docs docs_selected.jsonl]`.

Every file against the manifest's hashes; every document against the rules of the format; validation
against its source, where one is given; and every training document against all of validation.
Memory does not grow with the training data: 64 bits for each validation document and a few
megabytes of one shard are held at a time.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from lossless_caps import CapsError, decode
from prepare_caseops_data import (
    BOS_ID,
    DEFAULT_TOKENIZER,
    SPLIT_NAMES,
    DataError,
    add_workers,
    document_hash,
    encode_batch,
    encode_document_with_bytes,
    file_sha256,
    load_tokenizer,
    make_batches,
    map_in_order,
    read_documents,
    read_lines,
    read_manifest,
    read_shard,
    read_stream,
    run_command,
    shard_files,
    whole_number,
)

ESC_ID = 7
# <pad>, </s>, <unk>: CaseOps writes none, the trainer's fused markers take them
IDS_WITHOUT_TEXT = 0, 2, 3


def canonical(tokens: np.ndarray, costs: np.ndarray | None) -> str:
    """Whether (N,) tokens and their costs are the contest's validation documents: yes or no."""
    from train_gpt import is_canonical  # here, because it imports torch

    return "yes" if costs is not None and is_canonical(tokens, costs) else "no"


def count_documents(tokens: np.ndarray) -> int:
    return int((tokens == BOS_ID).sum())


def total(costs: np.ndarray) -> int:
    """The sum of costs, which their own type, uint16, cannot hold."""
    return int(costs.sum(dtype=np.int64))


def check_files(folder: Path) -> Iterator[str]:
    """Problems of the files against the manifest: missing, changed, or not in it."""
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.exists():
            yield f"{name}: in the manifest, but not in the folder"
        elif file_sha256(path) != entry["sha256"]:
            yield f"{name}: not the file of the manifest (another sha256)"
    for path in sorted(folder.glob("fineweb_*")):
        if path.name not in manifest["files"]:
            yield f"{path.name}: in the folder, but not in the manifest"


def check_side_car(tokens: np.ndarray, costs: np.ndarray) -> Iterator[str]:
    """Problems of a side-car, (tokens,): BOS and markers must cost nothing.

    A marker after an odd number of ESC is a literal, which costs its three bytes.
    """
    positions = np.arange(len(tokens))
    last_other = np.maximum.accumulate(np.where(tokens == ESC_ID, -1, positions))
    escapes_before = np.concatenate([[0], (positions - last_other)[:-1]])
    is_marker = (tokens >= 4) & (tokens <= ESC_ID)
    is_literal = escapes_before % 2 == 1
    problems = {
        "BOS is charged": (tokens == BOS_ID) & (costs > 0),
        "a case marker is charged": is_marker & ~is_literal & (costs > 0),
        "an escaped marker is charged less than its 3 bytes": is_marker & is_literal & (costs < 3),
    }
    for problem, wrong in problems.items():
        if wrong.any():
            yield f"side-car: {problem} {wrong.sum():,} times, first at value {wrong.argmax():,}"


def check_counts(
    folder: Path, tokens: np.ndarray, costs: np.ndarray | None, train_documents: int
) -> Iterator[str]:
    """Differences between the manifest's counts and what is there."""
    train_tokens = sum(len(read_shard(path)) for path in shard_files(folder, "train"))
    found = {
        "val": {"documents": count_documents(tokens), "tokens": len(tokens)},
        "train": {"documents": train_documents, "tokens": train_tokens},
    }
    if costs is not None:
        found["val"]["charged_bytes"] = total(costs)
    stated = read_manifest(folder)["splits"]
    for split, counts in found.items():
        for name, count in counts.items():
            if stated[split].get(name) != count:
                yield f"{split}: {count:,} {name}, the manifest says {stated[split].get(name)}"


def check_contents(folder: Path) -> Iterator[str]:
    """Splits that hold no text: there is nothing to score, or nothing to train on.

    Having no training files is fine.
    """
    for split, name in SPLIT_NAMES.items():
        paths = shard_files(folder, split)
        # one shard at a time: each keeps a file open
        values = sum(len(read_shard(path)) for path in paths)
        if not values and (paths or split == "val"):
            yield f"{name} holds no documents"
        elif paths and all((read_shard(path) == BOS_ID).all() for path in paths):
            yield f"{name} holds empty documents only"


def check_ids_without_text(folder: Path) -> Iterator[str]:
    """Shards of CaseOps with ids that stand for no text."""
    for split in SPLIT_NAMES:
        for path in shard_files(folder, split):
            wrong = np.isin(read_shard(path), IDS_WITHOUT_TEXT)
            if wrong.any():
                yield (
                    f"{path.name}: <pad>, </s> or <unk> (ids 0, 2, 3) occur {wrong.sum():,} times,"
                    f" first at value {wrong.argmax():,}"
                )


def check_samples(sp, tokens: np.ndarray, costs: np.ndarray, count: int) -> Iterator[str]:
    """Decodes documents spread over validation and encodes them again.

    Most must give the same tokens and bytes. Not all: SentencePiece's normalization keeps neither
    blanks nor ligatures as they were.
    """
    starts = np.flatnonzero(tokens == BOS_ID)
    if not len(starts) or not count:
        return
    ends = np.append(starts[1:], len(tokens))
    sampled = np.unique(np.linspace(0, len(starts) - 1, count).astype(int))
    same_tokens = same_bytes = 0
    for start, end in zip(starts[sampled], ends[sampled], strict=True):
        try:
            text = decode(sp.decode(tokens[start:end].tolist()))
            ids, new_costs = encode_document_with_bytes(sp, text)
        except (CapsError, IndexError):
            continue
        if np.array_equal(ids, tokens[start:end]):
            same_tokens += 1
            same_bytes += np.mean(new_costs == costs[start:end]) > 0.9
    print(
        f"of {len(sampled)} decoded documents {same_tokens} encode to their tokens, {same_bytes} to"
        " their bytes too"
    )
    if min(same_tokens, same_bytes) < 0.8 * len(sampled):
        yield (
            "decoded validation documents do not encode to what they were: another tokenizer, a"
            " broken side-car, or text that does not survive normalization: --docs compares with"
            " the source"
        )


def check_source(
    lines: Iterator, tokenizer: str, tokens: np.ndarray, costs: np.ndarray | None, workers: int
) -> Iterator[str]:
    """The first difference between validation and the documents of its source."""
    position = 0
    document = 0
    documents = count_documents(tokens)
    encoder = partial(encode_batch, tokenizer, False, 150_000)
    batches = make_batches("val", itertools.islice(lines, documents), 0, 0)
    for batch in map_in_order(encoder, batches, workers):
        end = position + len(batch.ids)
        wrong = tokens[position:end] != batch.ids if end <= len(tokens) else np.ones(1, bool)
        if costs is not None and not wrong.any():
            wrong = costs[position:end] != batch.costs
        if wrong.any():
            ends = np.cumsum(batch.lengths)
            number = document + int(np.searchsorted(ends, wrong.argmax(), side="right"))
            yield f"validation document {number:,} is not the one of the source"
            return
        position = end
        document += len(batch.lengths)
    if document != documents:
        yield f"{documents:,} validation documents, the source has {document:,}"
    print(f"compared {document:,} validation documents with the source")


def find_leaks(folder: Path) -> tuple[int, list[str]]:
    """Number of training documents, and which of them are validation documents, as sentences."""
    known = {}  # hash of a validation document: its number
    for number, (_, ids) in enumerate(read_documents(shard_files(folder, "val"))):
        if len(ids) > 1:  # an empty document has nothing to leak
            known.setdefault(document_hash(ids), number)
    leaks = []
    count = 0
    current = None  # the shard, and its first document
    first = 0
    for path, ids in read_documents(shard_files(folder, "train")):
        if path != current:
            current = path
            first = count
        if len(ids) > 1 and (number := known.get(document_hash(ids))) is not None:
            leaks.append(
                f"{path.name}, document {count - first:,} of it ({count:,} of training): "
                f"validation document {number:,}"
            )
        count += 1
    return count, leaks


def verify(
    folder: Path,
    tokenizer: str,
    source: Iterator | None = None,
    samples: int = 200,
    workers: int = 1,
) -> list:
    """All problems of a dataset, as sentences.

    Raises DataError where a file cannot be read at all.
    """
    problems = []
    has_manifest = (folder / "manifest.json").exists()
    if has_manifest:
        problems += check_files(folder)
    else:
        print("no manifest.json: neither hashes nor counts are stated, none are checked")
    val = read_stream(folder, "val")
    side_car = read_stream(folder, "val_bytes")
    if not val:
        raise DataError(f"{folder}: no fineweb_val_*.bin")
    problems += check_contents(folder)
    tokens = np.concatenate(val)
    costs = None
    if not side_car:
        print("no side-car: a dataset of plain SentencePiece; bytes are not checked")
    elif [len(part) for part in side_car] != [len(part) for part in val]:
        problems.append("side-car: other lengths than the validation shards")
    else:
        costs = np.concatenate(side_car)
        problems += check_side_car(tokens, costs)
        problems += check_ids_without_text(folder)
    if source is not None:
        problems += check_source(source, tokenizer, tokens, costs, workers)
    elif costs is not None:  # no proof as a source is, see check_samples
        problems += check_samples(load_tokenizer(tokenizer), tokens, costs, samples)
    start = time.perf_counter()
    documents, leaks = find_leaks(folder)
    seconds = time.perf_counter() - start
    print(
        f"{documents:,} training documents searched for validation documents in {seconds:.1f} s,"
        f" {len(leaks)} found"
    )
    problems += [f"leak: {leak}" for leak in leaks]
    if has_manifest:
        problems += check_counts(folder, tokens, costs, documents)
    of_bytes = f", {total(costs):,} bytes" if costs is not None else ""
    print(
        f"validation: {count_documents(tokens):,} documents, {len(tokens):,} values{of_bytes}; "
        f"canonical: {canonical(tokens, costs)}"
    )
    return problems


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status: 0 if the dataset is in order, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="prepare_caseops_data.py verify", description="Check a dataset."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--docs", nargs="+", metavar="FILE", help="source; its first documents must be validation"
    )
    parser.add_argument(
        "--tokenizer", default=str(DEFAULT_TOKENIZER), metavar="MODEL", help="default: %(default)s"
    )
    count = whole_number(0)
    parser.add_argument(
        "--samples",
        type=count,
        default=200,
        metavar="N",
        help="documents to decode without --docs; %(default)s",
    )
    add_workers(parser)
    options = parser.parse_args(arguments)
    return run_command(partial(report, options))


def report(options: argparse.Namespace) -> int:
    """Verifies as the command line says and prints the problems; returns the exit status."""
    source = options.docs and itertools.chain.from_iterable(map(read_lines, options.docs))
    problems = verify(options.folder, options.tokenizer, source, options.samples, options.workers)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print("verified" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0
