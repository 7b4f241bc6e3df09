"""Trains `caseops_8192.model`, a CaseOps tokenizer, on documents (JSON lines, plain, .gz or .xz).

    python tokenizers/train_tokenizer.py docs_train.jsonl.xz

The settings are those of the published tokenizer (openai/parameter-golf, PR 1729) but for two: `max_sentence_length`
does not skip documents over 4,192 bytes, and `num_threads` is 2, not 16. A second run writes the same file; the pieces
do not depend on the number of threads.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lossless_caps import CONTROLS, encode  # noqa: E402
from prepare_caseops_data import file_sha256, load_tokenizer, parse_text, read_lines  # noqa: E402


def training_sentences(docs: list[str]) -> Iterator[str]:
    """One sentence a document: stripped first, then transformed; empty ones dropped."""
    documents = text_bytes = 0
    for path in docs:
        for line in read_lines(path):
            text = parse_text(line).replace("\0", " ").strip()
            if text:
                documents += 1
                text_bytes += len(text.encode())
                yield encode(text)
    print(f"{documents:,} documents, {text_bytes:,} bytes", flush=True)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Train a CaseOps tokenizer.")
    parser.add_argument("docs", nargs="+", metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("caseops_8192.model"), metavar="MODEL")
    parser.add_argument("--vocab-size", type=int, default=8192, metavar="N")
    options = parser.parse_args()

    with options.out.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_sentences(options.docs),
            model_writer=model,
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
    pieces = load_tokenizer(options.out).get_piece_size()
    print(f"{options.out.name}: {pieces:,} pieces, {options.out.stat().st_size:,} bytes, {file_sha256(options.out)}")


if __name__ == "__main__":
    main()
