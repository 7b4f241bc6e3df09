"""Documents in, shards of plain SentencePiece tokenizers out: data for the presets without CaseOps (docs/PRESETS.md).

    python tools/prepare_plain_data.py docs_train.jsonl.xz --val-file docs_val.jsonl.xz --out data/plain
    PRESET=pr1493 DATA_PATH=data/plain/sp8192 python train_gpt.py

For each --vocab-sizes N the folder DIR/spN gets a BPE tokenizer, trained on the first --tokenizer-bytes of training
text, and shards of it without side-cars. Text is taken as it is, so the bytes that train_gpt.py counts by pieces are
the text's own, but for a space that begins a document. Documents of validation are left out of training, copies too.
Lines are as for prepare_caseops_data.py.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prepare_caseops_data import BOS_ID, DataError, parse_text, read_lines, write_shard  # noqa: E402

BATCH = 4096  # documents that are encoded at once
SHARD_TOKENS = 100_000_000


def texts_of(paths: Iterable[str], without: frozenset[str] = frozenset()) -> Iterator[str]:
    """Texts of all documents that are not empty and not among `without`."""
    for line in itertools.chain.from_iterable(map(read_lines, paths)):
        text = parse_text(line)
        if text.strip() and text not in without:
            yield text


def first_bytes(texts: Iterable[str], size: int) -> Iterator[str]:
    """Lines of texts until `size` bytes are reached: SentencePiece wants sentences, not documents."""
    for text in texts:
        if size <= 0:
            return
        size -= len(text.encode())
        yield from (line for line in text.split("\n") if line)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Writes a BPE model of exactly vocab_size pieces that gives every text back as it is."""
    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
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
        write_shard(folder / f"fineweb_{split}_{number:06d}.bin", tokens[start : start + SHARD_TOKENS])
    return len(tokens)


def main(arguments: list[str] | None = None) -> None:
    """Command line. Exit code 1 with a message for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("docs", nargs="+", metavar="FILE", help="training documents: JSON lines, plain, .gz or .xz")
    parser.add_argument("--val-file", required=True, metavar="FILE", help="validation documents")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets a folder spN for each vocabulary")
    parser.add_argument("--vocab-sizes", default="8192,1024", metavar="N,..", help="default: %(default)s")
    parser.add_argument("--tokenizer-bytes", type=int, default=20_000_000, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        validation = list(texts_of([options.val_file]))
        held_out = frozenset(validation)
        for size in map(int, options.vocab_sizes.split(",")):
            folder = options.out / f"sp{size}"
            folder.mkdir(parents=True)
            sample = first_bytes(texts_of(options.docs, held_out), options.tokenizer_bytes)
            train_tokenizer(sample, size, folder / f"plain_{size}.model")
            tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"plain_{size}.model"))
            train = write_split(tokenizer, texts_of(options.docs, held_out), folder, "train")
            val = write_split(tokenizer, validation, folder, "val")
            print(f"{folder}: {train:,} training tokens, {val:,} of validation in {len(validation):,} documents")
    except (DataError, OSError, RuntimeError) as error:
        sys.exit(f"prepare_plain_data.py: {error}")


if __name__ == "__main__":
    main()
