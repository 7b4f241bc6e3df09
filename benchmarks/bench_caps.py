"""Throughput of the capitals transform, beside a plain loop over characters in the same run.

    python benchmarks/bench_caps.py  # on the demo corpus: documentation of the installed packages
    python benchmarks/bench_caps.py docs_val.jsonl.xz    # on documents

Prints MB of UTF-8 text per second of CPU time in one process, the best of several passes.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lossless_caps import ALLCAPS, CAPNEXT, CONTROLS, ESC, TITLE, decode, encode  # noqa: E402
from prepare_caseops_data import demo_documents, demo_roots, parse_text, read_lines  # noqa: E402


def encode_by_character(text: str) -> str:
    """The definition, without any trick."""
    out, word = [], ""
    for char in text + "\0":  # the last character only ends the last word
        if char.isascii() and char.isalpha():
            word += char
            continue
        if len(word) > 1 and word.isupper():
            out.append(ALLCAPS + word.lower())
        else:
            for index, letter in enumerate(word):
                if letter.isupper():
                    out.append(CAPNEXT if index else TITLE)
                out.append(letter.lower())
        word = ""
        if char in CONTROLS:
            out.append(ESC)
        out.append(char)
    return "".join(out[:-1])


def best_seconds(function: Callable[[str], str], texts: list[str], passes: int) -> float:
    """CPU seconds of the fastest pass over all texts."""
    times = []
    for _ in range(passes):
        start = time.process_time()
        for text in texts:
            function(text)
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("docs", nargs="*", metavar="FILE", help="JSON lines; default: demo corpus")
    parser.add_argument("--passes", type=int, default=5, metavar="N")
    options = parser.parse_args()
    if options.docs:
        texts = [parse_text(line) for path in options.docs for line in read_lines(path)]
    else:
        texts = demo_documents(demo_roots(), 3_000_000)
    encoded = [encode(text) for text in texts]
    if (
        encoded != [encode_by_character(text) for text in texts]
        or [decode(text) for text in encoded] != texts
    ):
        sys.exit("error: encode, decode and the plain loop disagree")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {megabytes:.1f} MB")
    plain = megabytes / best_seconds(encode_by_character, texts, 2)
    print(f"plain loop  {plain:6.1f} MB/s")
    for function, inputs in ((encode, texts), (decode, encoded)):
        speed = megabytes / best_seconds(function, inputs, options.passes)
        print(f"{function.__name__:10s}  {speed:6.1f} MB/s  {speed / plain:5.1f} x the plain loop")


if __name__ == "__main__":
    main()
