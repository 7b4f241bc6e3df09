"""Checks of a run's dataset: its tokenizer, and what its manifest says.

Used by tools/guard.py before the clock starts; `prepare_caseops_data.py verify` says more.
"""

import hashlib
import time
from pathlib import Path

import numpy as np

import train_gpt
from train_gpt import PAIR_IDS, DataError

SCAN_SECONDS = 5.0  # at most, of training shards before the clock starts
SCAN_TOKENS = 1 << 20  # at a time


def read_manifest(folder):
    """As train_gpt.read_manifest; all fields that are used here have their types, too."""
    manifest = train_gpt.read_manifest(folder)
    try:
        if manifest.get("format") == "caseops_shards":
            total = manifest["leaked_documents"] + len({**manifest["splits"]["val"]})
            for entry in manifest["files"].values():
                total += entry["values"] + len(entry["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder}/manifest.json is damaged ({error!r}): fetch or make the dataset again"
        ) from None
    return manifest


def leaked_documents(hp):
    """{"leaked_documents": number} for RESULT, {} if the dataset's manifest has no such count."""
    manifest = read_manifest(hp.data_path)
    return {name: manifest[name] for name in ("leaked_documents",) if name in manifest}


def text_problems(hp, manifest):
    """Yields messages if the bytes of these tokens are not counted as the data are."""
    uses_side_car = getattr(hp, "caseops_enabled", True)
    transform = manifest.get("text_transform")
    side_car = train_gpt.shard_paths(hp.data_path, "val_bytes")
    if side_car and not uses_side_car:
        yield (
            f"{Path(side_car[0]).name} holds the bytes of its tokens, which CASEOPS_ENABLED=0 would"
            " not read: set it to 1"
        )
    if transform and not uses_side_car:
        yield (
            f"its manifest says {transform}, whose tokens a tokenizer cannot count: set"
            " CASEOPS_ENABLED=1"
        )
    if "text_transform" in manifest and not transform and uses_side_car:
        yield (
            "its manifest says that the text was not transformed: run presets/published.py with"
            " CASEOPS_ENABLED=0"
        )


def check_data_settings(hp):
    """Raises DataError if the settings contradict the manifest: the bytes would be wrong."""
    folder = Path(hp.data_path)
    manifest = read_manifest(folder)
    problems = [*text_problems(hp, manifest)]
    size = manifest.get("tokenizer", {}).get("vocab_size", hp.vocab_size)
    if size != hp.vocab_size:
        problems.append(f"its manifest says VOCAB_SIZE={size}, not {hp.vocab_size}")
    if problems:
        raise DataError(f"{folder}: {'; '.join(problems)}")


def check_manifest(hp, counts):
    """Raises DataError if the dataset is not the one that its manifest describes.

    counts: {name: number} of the validation files. These files are hashed, too; of training files
    only the length is checked, as hashing takes minutes (`prepare_caseops_data.py verify` does it).
    """
    manifest = read_manifest(hp.data_path)
    if manifest.get("format") != "caseops_shards":
        return
    problems = []
    stated = manifest["splits"]["val"]
    for name, count in counts.items():
        if stated.get(name) != count:
            problems.append(f"{count} {name} of validation, not {stated.get(name)}")
    files = manifest["files"]
    paths = {path.name: path for path in Path(hp.data_path).glob("fineweb_*.bin")}
    problems += [f"{name} is missing" for name in files.keys() - paths.keys()]
    for name, path in paths.items():
        same = name in files and train_gpt.shard_size(path) == files[name]["values"]
        if same and "_val_" in name:
            same = hashlib.sha256(Path(path).read_bytes()).hexdigest() == files[name]["sha256"]
        if not same:
            problems.append(f"{name} is another file")
    # a few documents occur twice in the sources; many mean a wrong split
    leaked = manifest["leaked_documents"]
    if leaked > 0.01 * counts["documents"]:
        problems.append(f"{leaked} training documents are validation documents")
    if problems:
        raise DataError(
            f"{hp.data_path} is not what its manifest says: {'; '.join(sorted(problems)[:5])}."
            " Fetch or make it again; prepare_caseops_data.py verify says more"
        )


def unusable_ids(path, hp, deadline):
    """What ids of a shard cannot be trained on, in words, as far as it is scanned until then.

    No words if all can. 0.07 s for a shard of 200 MB that is in memory.
    """
    for start in range(0, train_gpt.shard_size(path), SCAN_TOKENS):
        if time.monotonic() > deadline:
            break
        tokens = train_gpt.load_data_shard(path, start, SCAN_TOKENS)
        if tokens.max() >= hp.vocab_size:
            return f"token {tokens.max()} is outside VOCAB_SIZE={hp.vocab_size}: fetch it again"
        if hp.fuses_markers and np.isin(tokens, PAIR_IDS).any():
            return (
                "tokens 0, 2 or 3 (<pad>, </s>, <unk>) occur, which are those of fused"
                " markers: set MARKER_FUSION_ENABLED=0, or make the data without them"
            )
    return ""


def check_training_ids(hp, dist):
    """Raises DataError for ids that cannot be trained on in this rank's share of the shards.

    Where reading all of it would take too long, the loader finds them in the rows that it builds.
    """
    if hp.ttt_eval_only:
        return
    deadline = time.monotonic() + SCAN_SECONDS
    paths = train_gpt.shard_paths(hp.data_path, "train")
    for path in paths[dist.rank :: dist.world_size]:
        if problem := unusable_ids(path, hp, deadline):
            raise DataError(f"{path}: {problem}")


def check_dataset(hp, validation):
    """Checks tokenizer and manifest against settings and files -> path of the tokenizer.

    validation: a ValidationSet, None if it cannot be used. Raises DataError.
    """
    check_data_settings(hp)
    if validation:
        figures = dict(validation.figures)
        if not getattr(hp, "caseops_enabled", True):
            del figures["charged_bytes"]  # no manifest states them
        check_manifest(hp, figures)
    return train_gpt.find_tokenizer(hp)
