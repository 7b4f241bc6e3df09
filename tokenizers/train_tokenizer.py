"""Trains a CaseOps tokenizer, as `caseops_8192.model` is one, on documents.

    python tokenizers/train_tokenizer.py docs_selected.jsonl --train-docs 1000000 --out my.model
    python tokenizers/train_tokenizer.py docs_train.jsonl.xz --val-file docs_val.jsonl.xz --out ...

Files of documents are as for prepare_caseops_data.py. Validation documents are never trained on,
nor are copies of them among the others: pieces are parameters that training chooses. The settings
are those of the published tokenizer (openai/parameter-golf, PR 1729) but for two:
`max_sentence_length` does not skip documents over 4,192 bytes, and `num_threads` is 2, not 16. A
second run writes the same file; the pieces do not depend on the number of threads.
"""

import argparse
import hashlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lossless_caps import CONTROLS, encode  # noqa: E402
from prepare_caseops_data import (  # noqa: E402
    DataError,
    Line,
    add_validation_source,
    file_sha256,
    load_tokenizer,
    path_in_errors,
    read_lines,
    read_text,
    run_command,
    train_sentencepiece,
    whole_number,
)


def text_hash(text: str) -> bytes:
    """Of the words alone: blanks around and between them are no difference to the tokenizer."""
    words = " ".join(text.replace("\0", " ").split())
    return hashlib.blake2b(words.encode(), digest_size=8).digest()


def training_sentences(lines: Iterable[Line], validation: set[bytes]) -> Iterator[str]:
    """One sentence a document: stripped first, then transformed.

    Empty ones and those of `validation` dropped.
    """
    documents = text_bytes = copies = 0
    for line in lines:
        text = read_text(line)
        if text_hash(text) in validation:
            copies += 1
            continue
        if text := text.replace("\0", " ").strip():
            documents += 1
            text_bytes += len(text.encode())
            yield encode(text)
    print(f"{documents:,} documents, {text_bytes:,} bytes", flush=True)
    if copies:
        print(
            f"left out {copies:,} training document{'s that are' if copies > 1 else ' that is'} in"
            " validation too"
        )


def check_layout(path: Path) -> None:
    """Raises DataError where pieces break what the published tokenizer holds to.

    See tokenizers/README.md.
    """
    sp = load_tokenizer(path)  # ids 0 to 263
    pieces = [sp.id_to_piece(index) for index in range(264, sp.get_piece_size())]
    rules = {
        "A-Z": "[A-Z]",
        "a case marker": f"[{CONTROLS}]",
        "a digit beside others": ".[0-9]|[0-9].",
        "a space mark inside": ".\u2581",
    }
    for rule, pattern in rules.items():
        if wrong := [piece for piece in pieces if re.search(pattern, piece)]:
            raise DataError(f"{path}: {len(wrong)} pieces with {rule}, such as {wrong[0]!a}")
    if "\u2581" not in pieces:
        raise DataError(f"{path}: the space mark is no piece of its own")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    size = whole_number(265, 1 << 16)
    parser = argparse.ArgumentParser(description="Train a CaseOps tokenizer.")
    parser.add_argument("docs", nargs="+", metavar="FILE")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="MODEL", help="the file, which must not exist"
    )
    parser.add_argument(
        "--vocab-size", type=size, default=8192, metavar="N", help="default: %(default)s"
    )
    limit = whole_number(1)
    parser.add_argument(
        "--train-docs",
        type=limit,
        metavar="N",
        help="the first N behind those of validation; default: all, 5 GB of memory for each GB",
    )
    add_validation_source(parser, 50_000, "first documents, by default 50,000")
    return run_command(partial(train, parser.parse_args(arguments)))


def train(options: argparse.Namespace) -> int:
    """Trains and checks the tokenizer; only then is there a file of its name.

    Returns the exit status.

    Raises DataError if the file exists or nothing is left to train on.
    """
    if not options.out.parent.is_dir():
        raise DataError(f"{options.out.parent}: no such folder (--out)")
    if options.out.exists():
        raise DataError(f"{options.out} exists: remove it or name another file (--out)")
    lines = itertools.chain.from_iterable(map(read_lines, options.docs))
    held_out = (
        read_lines(options.val_file)
        if options.val_file
        else itertools.islice(lines, options.val_docs)
    )
    validation = {text_hash(read_text(line)) for line in held_out}
    lines = itertools.islice(lines, options.train_docs)
    first = next(lines, None)
    if first is None:
        raise DataError(f"no documents behind the {len(validation):,} of validation (--val-docs)")
    model = train_sentencepiece(
        training_sentences(itertools.chain([first], lines), validation),
        model_type="bpe",
        vocab_size=options.vocab_size,
        character_coverage=0.999,
        byte_fallback=True,
        split_digits=True,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=False,
        user_defined_symbols=list(CONTROLS),
        max_sentence_length=1 << 30,
        num_threads=2,
        minloglevel=1,
    )
    unchecked = options.out.with_name(options.out.name + ".tmp")
    try:
        with path_in_errors(unchecked):
            unchecked.write_bytes(model)
        check_layout(unchecked)
        unchecked.replace(options.out)
    finally:
        unchecked.unlink(missing_ok=True)
    pieces = load_tokenizer(options.out).get_piece_size()
    print(
        "layout: ids 0-263 and the rules of the pieces are those of the published"
        f" tokenizer\n{options.out.name}: {pieces:,} pieces, {options.out.stat().st_size:,} bytes,"
        f" {file_sha256(options.out)}"
    )
    if pieces < options.vocab_size:
        print(
            f"the text gave {pieces:,} of {options.vocab_size:,} pieces: train on more text, or set"
            f" VOCAB_SIZE={pieces} for the runs",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
