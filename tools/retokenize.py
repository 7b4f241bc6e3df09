"""Shards to another tokenizer, by way of the text of their documents.

usage: python prepare_caseops_data.py retokenize data/mine --tokenizer NEW --out data/new

From documents there is nothing special to do: `prepare_caseops_data.py --docs ... --tokenizer NEW`.
Where only shards are left, their documents are put together from their pieces and cut anew.
Documents, their order, BOS and the bytes of each validation document stay the same. What the first
tokenizer's normalization took away does not come back: line breaks and runs of blanks are single
blanks, ligatures and wide forms are plain characters, control characters are gone. So training text
is not quite what it was, and the costs of validation tokens follow the old tokens' where these
were cut elsewhere; only a document's sum is exact.
"""

import argparse
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from prepare_caseops_data import (
    BOS_ID,
    MAX_COST,
    Batch,
    Corpus,
    DataError,
    EncodedBatch,
    Line,
    add_shard_tokens,
    add_workers,
    build_dataset,
    byte_costs,
    document_hash,
    file_sha256,
    load_tokenizer,
    print_counts,
    read_documents,
    read_manifest,
    read_shard,
    read_stream,
    run_command,
    shard_files,
    tokenize_blocks,
    tokenizer_entry,
)

PIECES_AT_ONCE = 1 << 16


@lru_cache(maxsize=1)
def _tokenizers(old: str, new: str) -> tuple:
    """The old tokenizer's pieces as UTF-8 by id, with blanks for U+2581, and the new tokenizer."""
    sp = load_tokenizer(old)
    pieces = [
        sp.id_to_piece(index).replace("\u2581", " ").encode()
        for index in range(sp.get_piece_size())
    ]
    pieces[8:264] = (bytes([byte]) for byte in range(256))
    return pieces, load_tokenizer(new)


def costs_of_bytes(pieces: list[bytes], costs: np.ndarray) -> np.ndarray:
    """Pieces of a text and their costs -> costs (bytes,) with the same sum.

    Each byte of a piece costs one as far as the piece's cost goes, the last byte the rest.
    """
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    costs = costs.astype(np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    position_in_piece = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    spread = (position_in_piece < np.repeat(costs, lengths)).astype(np.int64)
    spread[ends - 1] += np.maximum(0, costs - lengths)
    return spread


def pieces_of(old: list[bytes], ids: np.ndarray) -> Iterator[list[bytes]]:
    """The pieces of ids (tokens,), some thousands at a time."""
    for start in range(0, len(ids), PIECES_AT_ONCE):
        yield [old[token] for token in ids[start : start + PIECES_AT_ONCE].tolist()]


def cumulative_costs(old: list[bytes], ids: np.ndarray, costs: np.ndarray, size: int) -> np.ndarray:
    """Costs of all bytes before each position of a text of `size` bytes, (size + 1,) uint32."""
    sums = np.zeros(size + 1, dtype=np.uint32)
    token = position = 0
    for pieces in pieces_of(old, ids):
        part = costs_of_bytes(pieces, costs[token : token + len(pieces)])
        end = position + len(part)
        sums[position + 1 : end + 1] = sums[position] + np.cumsum(part)
        token += len(pieces)
        position = end
    return sums


def retokenize_document(old: list[bytes], sp, ids: np.ndarray, costs: np.ndarray | None) -> tuple:
    """Old ids (tokens,), BOS first, and their costs -> new ids, new costs or None, bytes.

    Raises DataError if the ids are no text, that is, of another tokenizer.
    """
    text_bytes = b"".join(map(b"".join, pieces_of(old, ids[1:])))
    try:
        text = text_bytes.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not the tokenizer of these shards ({error})") from error
    new_ids = [np.array([BOS_ID], dtype=np.uint16)]
    new_costs = [np.array([0], dtype=np.int32)]
    sums = None
    if costs is not None:
        sums = cumulative_costs(old, ids[1:], costs[1:], len(text_bytes))
    del text_bytes
    size = position = charged = 0
    for block, block_ids, spans in tokenize_blocks(sp, text):
        new_ids.append(block_ids)
        size += int(byte_costs(block).sum())
        if sums is None:
            continue
        bytes_before = np.cumsum([0, *(len(char.encode()) for char in block)])
        sums_at_ends = sums[position + bytes_before[spans[:, 1]]].astype(np.int64)
        new_costs.append(np.diff(sums_at_ends, prepend=charged).astype(np.int32))
        position += bytes_before[-1]
        if len(sums_at_ends):
            charged = int(sums_at_ends[-1])
    new_ids = np.concatenate(new_ids)
    if sums is None:
        return new_ids, None, size
    new_costs = np.concatenate(new_costs)
    total = int(sums[-1])
    if len(new_costs) > 1:
        # the last token takes what the new normalization drops after it
        new_costs[-1] += total - charged
    if total != new_costs.sum(dtype=np.int64) or new_costs.max() > MAX_COST:
        raise DataError(
            "the new tokens cannot take the bytes of the old ones: there are none, or one would get"
            f" more than {MAX_COST:,}; make the shards from the documents"
        )
    return new_ids, new_costs.astype(np.uint16), total


def retokenize_batch(old: str, new: str, batch: Batch) -> EncodedBatch:
    """encode_batch for lines that hold ids, followed by their costs in validation."""
    pieces, sp = _tokenizers(old, new)
    has_costs = batch.split == "val"
    documents = []
    for number, line in enumerate(batch.lines, batch.first_document):
        ids = np.frombuffer(line.content, dtype=np.uint16)
        costs = None
        if has_costs:
            ids, costs = np.split(ids, 2)
        try:
            documents.append(retokenize_document(pieces, sp, ids, costs))
        except (DataError, IndexError) as error:
            raise DataError(f"{batch.split} document {number} ({line.file}): {error}") from error
    ids, costs, sizes = zip(*documents, strict=True)
    lengths = [len(part) for part in ids]
    hashes = [[document_hash(part)] for part in ids]
    return EncodedBatch(
        batch.split,
        batch.checksum,
        np.concatenate(ids),
        np.concatenate(costs) if has_costs else None,
        np.array(lengths),
        np.array(sizes),
        np.zeros(len(ids), dtype=np.int64),
        np.array(hashes, dtype=np.uint64),
    )


def stored_documents(folder: Path, split: str) -> Iterator[Line]:
    """The documents of a split as lines of ids, followed by their costs in validation."""
    costs = np.zeros(0, dtype=np.uint16)
    if split == "val":
        costs = np.concatenate([costs, *read_stream(folder, "val_bytes")])
    position = 0
    for number, (path, ids) in enumerate(read_documents(shard_files(folder, split))):
        content = ids.tobytes()
        if split == "val":
            content += costs[position : position + len(ids)].tobytes()
            position += len(ids)
        yield Line(path.name, number, content)


def check_lengths(folder: Path) -> None:
    """Raises DataError where the side-car is missing or not as long as the validation shards."""
    tokens = sum(len(read_shard(path)) for path in shard_files(folder, "val"))
    costs = sum(len(read_shard(path)) for path in shard_files(folder, "val_bytes"))
    if tokens != costs:
        raise DataError(
            f"{folder}: the side-car (fineweb_val_bytes_*) has {costs:,} values for {tokens:,}"
            " tokens"
        )


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare_caseops_data.py retokenize",
        description="Cut the documents of shards with another tokenizer.",
        epilog=(
            "Line breaks, runs of blanks and what SentencePiece normalizes do not come back from"
            " shards."
        ),
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--old-tokenizer", required=True, metavar="MODEL", help="the one that made the shards"
    )
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="the new one")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the shards go; new or empty"
    )
    add_shard_tokens(parser)
    add_workers(parser)
    options = parser.parse_args(arguments)
    return run_command(partial(retokenize, options), kept_in=options.out)


def retokenize(options: argparse.Namespace) -> int:
    """Makes a dataset from shards as the command line says; returns the exit status.

    Raises DataError, OSError.
    """
    folder = options.folder
    source = {"folder": folder.name, "tokenizer_sha256": file_sha256(options.old_tokenizer)}
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    missing = frozenset(split for split in ("val", "train") if not shard_files(folder, split))
    if len(missing) == 2:
        raise DataError(f"{folder}: no shards, neither fineweb_val_*.bin nor fineweb_train_*.bin")
    check_lengths(folder)
    if (folder / "manifest.json").exists():
        source["split_rule"] = check_manifest(options, source["tokenizer_sha256"])
    lines = (stored_documents(folder, split) for split in ("val", "train"))
    corpus = Corpus(*lines, "that of the retokenized shards", lambda: [source], missing)
    settings = {
        "tokenizer": tokenizer_entry(options.tokenizer),
        "shard_tokens": options.shard_tokens,
    }
    encoder = partial(retokenize_batch, options.old_tokenizer, options.tokenizer)
    print_counts(build_dataset(corpus, settings, options.out, encoder, options.workers))
    return 0


def check_manifest(options: argparse.Namespace, tokenizer_sha256: str) -> str:
    """The split rule in the manifest of the shards.

    Raises DataError if it names another tokenizer, or files that are not there.
    """
    folder = options.folder
    manifest = read_manifest(folder)
    if manifest["tokenizer"]["sha256"] != tokenizer_sha256:
        raise DataError(
            f"{options.old_tokenizer}: the manifest of {folder} names another tokenizer"
        )
    absent = sorted(name for name in manifest["files"] if not (folder / name).exists())
    if absent:
        raise DataError(
            f"{folder}: {absent[0]} is missing ({len(absent)} files that the manifest names)"
        )
    return manifest["split_rule"]
