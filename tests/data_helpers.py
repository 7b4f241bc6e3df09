"""Documents for the data tools, and runs of the tools in this process."""

import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lossless_caps import CONTROLS
from prepare_caseops_data import main, read_shard

PUBLISHED_NAME = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"

ROOT = Path(__file__).resolve().parents[1]

SHARED = Path(__file__).resolve().parents[2] / "shared" / "tokenizers"

PUBLISHED = Path(os.environ.get("PUBLISHED_TOKENIZER", SHARED / PUBLISHED_NAME))

needs_published = pytest.mark.skipif(
    not PUBLISHED.is_file(),
    reason=(
        f"missing: the published tokenizer {PUBLISHED_NAME} (366,510 bytes), which is not in this"
        f" repository; it was looked for at {PUBLISHED}. data/download.py fetches it with the"
        " published data; PUBLISHED_TOKENIZER names a copy"
    ),
)

# SentencePiece's settings for a CaseOps tokenizer that trains in milliseconds
TINY_TOKENIZER = dict(
    model_type="bpe",
    vocab_size=290,
    byte_fallback=True,
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    minloglevel=2,
    add_dummy_prefix=False,
    hard_vocab_limit=False,
    user_defined_symbols=list(CONTROLS),
)

TEXTS = [
    "The NASA Launch was seen by 1,200 people.",
    "  Padded, and\n\nin two paragraphs.  ",
    "",
    "   ",
    "Été 東京 🗼 iPhone ½ ﬁne",
    "literal \ue001 and \ue004\ue002 markers",
    *(f"Document number {number} of MANY, written by Nobody." for number in range(40)),
]


def write_docs(path, documents):
    """Objects and bare strings take turns; every third line is followed by a blank one."""
    lines = []
    for number, document in enumerate(documents):
        lines.append(json.dumps({"text": document, "id": number} if number % 2 else document))
        lines += [" "] * (number % 3 == 0)
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(content))
    return str(path)


def build(out, *arguments):
    """Runs the tool in this process; the folder's files by name."""
    status = main(
        [
            *map(str, arguments),
            "--out",
            str(out),
            *([] if "--workers" in arguments else ["--workers", "1"]),
        ]
    )
    assert status == 0
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def refused(capsys, *arguments):
    """Runs the tool, which must fail; its message."""
    assert main([*map(str, arguments), "--workers", "1"]) == 1
    return capsys.readouterr().err


def stream(folder, name):
    """All shards of a stream, joined."""
    paths = sorted(folder.glob(f"fineweb_{name}_[0-9]*.bin"))
    return np.concatenate([read_shard(path) for path in paths]), [
        len(read_shard(path)) for path in paths
    ]


def verified(capsys, folder, *arguments):
    """Exit status and all that verify prints."""
    capsys.readouterr()
    status = main(["verify", str(folder), "--workers", "1", *map(str, arguments)])
    return status, "".join(capsys.readouterr())


MEASURE = """
import resource, sys
from prepare_caseops_data import main
low = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(sys.argv[1:]) == 0
high = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print("grown by", (high - low) << 10)
"""


def grown_by(*arguments):
    """Bytes by which the largest process of a command grew over what its imports take."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout.split()[-1])


def long_corpus(path, documents=3_000):
    rng = random.Random(1)
    words = [f"word{number}" for number in range(400)]
    return write_docs(
        path, [" ".join(rng.choices(words, k=60)) + f" Number {n}" for n in range(documents)]
    )
