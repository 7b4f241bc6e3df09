"""Documents in, shards of plain SentencePiece tokenizers out.

Data for the presets without CaseOps (docs/PRESETS.md).

    python tools/prepare_plain_data.py docs_train.jsonl.xz --val-file docs_val.jsonl.xz \\
        --out data/plain
    DATA_PATH=data/plain/sp8192 python presets/published.py pr1493

For each --vocab-sizes N the folder DIR/spN gets a BPE tokenizer, trained on the first
--tokenizer-bytes of training text, and shards of it without side-cars. Text is taken as it is, so
the bytes that train_gpt.py counts by pieces are the text's own, but for a space that begins a
document; validation is counted here, too, and refused where that is not so. SentencePiece writes a
space as U+2581 and cannot tell it from that character in a text: training documents get a space in
its place, validation documents are refused. Documents of validation are left out of training,
copies too. Files of documents are as for prepare_caseops_data.py.
"""

import argparse
import itertools
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prepare_caseops_data import (  # noqa: E402
    BOS_ID,
    DataError,
    only_run_in,
    path_in_errors,
    read_lines,
    read_text,
    run_command,
    train_sentencepiece,
    whole_number,
    write_shard,
)

BATCH = 4096  # documents that are encoded at once
SHARD_TOKENS = 100_000_000
SPACE_MARK = "\u2581"  # SentencePiece's sign for a space


def training_texts(paths: Iterable[str], held_out: frozenset[str]) -> Iterator[str]:
    """Texts of all documents that are not empty and not among `held_out`."""
    for line in itertools.chain.from_iterable(map(read_lines, paths)):
        text = read_text(line).replace(SPACE_MARK, " ")
        if text.strip() and text not in held_out:
            yield text


def validation_texts(path: str) -> Iterator[str]:
    """Texts of all documents that are not empty.

    Raises DataError where a text's bytes could not be counted.
    """
    for line in read_lines(path):
        text = read_text(line)
        if SPACE_MARK in text:
            raise DataError(
                f"{path}, line {line.number}: U+2581 at character {text.index(SPACE_MARK)}: a plain"
                " tokenizer takes it for a space, and its bytes could not be counted; leave the"
                " document out, or use CaseOps data"
            )
        if text.strip():
            yield text


def first_lines(texts: Iterable[str], size: int) -> Iterator[str]:
    """Lines of texts until `size` bytes are reached.

    SentencePiece wants sentences, not documents.
    """
    for text in texts:
        if size <= 0:
            return
        size -= len(text.encode())
        yield from (line for line in text.split("\n") if line)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Writes a BPE model of exactly vocab_size pieces that gives every text back as it is."""
    model = train_sentencepiece(
        texts,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.999,
        byte_fallback=True,
        split_digits=True,
        pad_id=0,
        bos_id=BOS_ID,
        eos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=1 << 20,
        num_threads=os.cpu_count() or 1,
        minloglevel=2,
    )
    with path_in_errors(path):
        path.write_bytes(model)


def piece_bytes(tokenizer) -> np.ndarray:
    """Bytes of text (pieces,) that each id stands for."""
    sizes = np.zeros(tokenizer.vocab_size(), dtype=np.int64)
    for token in range(len(sizes)):
        if tokenizer.is_byte(token):
            sizes[token] = 1
        elif not tokenizer.is_control(token) and not tokenizer.is_unknown(token):
            sizes[token] = len(tokenizer.id_to_piece(token).replace(SPACE_MARK, " ").encode())
    return sizes


def check_bytes(tokenizer, texts: Iterable[str]) -> None:
    """Raises DataError unless the pieces of a text are exactly its bytes."""
    sizes = piece_bytes(tokenizer)
    for number, text in enumerate(texts):
        counted, size = int(sizes[tokenizer.encode(text)].sum()), len(text.encode())
        if counted != size:
            raise DataError(
                f"validation document {number}: its pieces stand for {counted:,} bytes, it has"
                f" {size:,}"
            )


def write_split(tokenizer, texts: Iterable[str], folder: Path, split: str) -> int:
    """Encodes documents, BOS before each, into shards of a split -> number of tokens."""
    texts, parts = iter(texts), []
    while batch := list(itertools.islice(texts, BATCH)):
        encoded = tokenizer.encode(batch, num_threads=os.cpu_count() or 1)
        parts.append(np.fromiter((token for ids in encoded for token in (BOS_ID, *ids)), np.uint16))
    if not parts:
        raise DataError(f"no documents for {split}")
    tokens = np.concatenate(parts)
    for number, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
        write_shard(
            folder / f"fineweb_{split}_{number:06d}.bin", tokens[start : start + SHARD_TOKENS]
        )
    return len(tokens)


def vocab_sizes(text: str) -> list[int]:
    """An argparse type: whole numbers with commas between them."""
    sizes = [whole_number(265, 1 << 16)(part) for part in text.split(",")]
    if len(set(sizes)) < len(sizes):
        raise argparse.ArgumentTypeError(f"{text} names a size twice")
    return sizes


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 1 with a message for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "docs",
        nargs="+",
        metavar="FILE",
        help="training documents: JSON lines, plain, .gz, .xz or .zst, or .parquet",
    )
    parser.add_argument("--val-file", required=True, metavar="FILE", help="validation documents")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="gets a folder spN for each vocabulary",
    )
    parser.add_argument(
        "--vocab-sizes",
        type=vocab_sizes,
        default="8192,1024",
        metavar="N,..",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--tokenizer-bytes",
        type=whole_number(1),
        default=20_000_000,
        metavar="N",
        help="default: %(default)s",
    )
    return run_command(partial(prepare, parser.parse_args(arguments)))


def prepare(options: argparse.Namespace) -> int:
    """Makes the datasets as the command line says; returns the exit status."""
    validation = list(validation_texts(options.val_file))
    options.out.mkdir(parents=True, exist_ok=True)
    with only_run_in(options.out):
        make_datasets(options, validation)
    return 0


def make_datasets(options: argparse.Namespace, validation: list[str]) -> None:
    """A tokenizer and its shards for each vocabulary; a folder spN appears when it is whole.

    Raises DataError for a folder that is there already, and for text that cannot be used.
    """
    folders = {size: options.out / f"sp{size}" for size in options.vocab_sizes}
    for folder in folders.values():
        if folder.exists():
            raise DataError(f"{folder} is there already: remove it or change --out")
    held_out = frozenset(validation)
    for size, folder in folders.items():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        model = unfinished / f"plain_{size}.model"
        train_tokenizer(
            first_lines(training_texts(options.docs, held_out), options.tokenizer_bytes),
            size,
            model,
        )
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
        check_bytes(tokenizer, validation)
        train = write_split(tokenizer, training_texts(options.docs, held_out), unfinished, "train")
        val = write_split(tokenizer, validation, unfinished, "val")
        unfinished.rename(folder)
        print(
            f"{folder}: {train:,} training tokens, {val:,} of validation in {len(validation):,}"
            " documents"
        )


if __name__ == "__main__":
    sys.exit(main())
