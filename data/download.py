"""Fetches published token shards, or their documents, from the Hugging Face hub.

    python data/download.py                                   # CaseOps, 80 training shards, 16 GB
    python data/download.py --train-shards 10                 # the first ten, and all of validation
    python data/download.py --variant sp1024                  # plain SentencePiece
    python data/download.py --docs                            # the text itself, 48 GB

Run it again to go on where it broke off, or to have more shards. Every file is checked: size,
header, the hub's sha256 and the publisher's counts. `manifest.json` then states what is there, and
how many training documents are validation documents too; train_gpt.py holds the dataset to it.
The documents are for a tokenizer of your own; prepare_caseops_data.py makes shards of them.
HF_ENDPOINT names another hub, HF_TOKEN a token.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prepare_caseops_data import (  # noqa: E402
    BOS_ID,
    DataError,
    file_sha256,
    only_run_in,
    path_in_errors,
    read_manifest,
    read_shard,
    read_stream,
    shard_files,
    whole_number,
    write_manifest,
)
from tools import hub as hub_errors  # noqa: E402
from tools.verify_data import canonical, check_contents, find_leaks  # noqa: E402

# HTTPError of the client's library: httpx, or httpx2 since version 2
NetworkError = HfHubHTTPError.__bases__[0]
HERE = Path(__file__).resolve().parent
PREFIX = "datasets/"  # of every path in these repositories
DOCS = "docs_selected.jsonl", "docs_selected.source_manifest.json"
CASEOPS = "romeerp/parameter-golf-caseops-v1", "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"


def source_of(variant: str) -> tuple[str, str, str]:
    """Repository, name of the dataset there, and name of its folder here."""
    if variant == "caseops":
        return *CASEOPS, "fineweb10B_sp8192_caseops"  # where train_gpt.py looks
    repo = "kevclark/parameter-golf" if variant == "sp8192" else "willdepueoai/parameter-golf"
    return repo, f"fineweb10B_{variant}", f"fineweb10B_{variant}"


class Hub:
    """One revision of one dataset repository."""

    def __init__(self, repo: str):
        self.repo, self.endpoint = repo, os.environ.get("HF_ENDPOINT") or None
        self.api = HfApi(endpoint=self.endpoint)
        self.revision = self.api.dataset_info(repo).sha

    def look_up(self, paths: list[str]) -> dict:
        """Path -> what the hub says of the file (size, lfs.sha256).

        Raises DataError where one is missing.
        """
        found = {}
        for start in range(0, len(paths), 100):
            answer = self.api.get_paths_info(
                self.repo, paths[start : start + 100], repo_type="dataset", revision=self.revision
            )
            found |= {entry.path: entry for entry in answer}
        if missing := [path for path in paths if path not in found]:
            raise DataError(f"{self.repo} has no {missing[0]} ({len(missing)} files are missing)")
        return found

    def fetch(self, info, target: Path) -> None:
        """Downloads a file, going on behind what an earlier attempt left.

        Raises DataError if it is not the hub's.
        """
        part = target.with_name(f"{target.name}.part")
        have = part.stat().st_size if part.exists() else 0
        if have > info.size:
            part.unlink()
            have = 0
        url = hf_hub_url(
            self.repo,
            info.path,
            repo_type="dataset",
            revision=self.revision,
            endpoint=self.endpoint,
        )
        with path_in_errors(part), part.open("ab") as file:
            http_get(
                url, file, resume_size=have, headers=build_hf_headers(), expected_size=info.size
            )
        if info.lfs is not None and file_sha256(part) != info.lfs.sha256:
            part.unlink()
            raise DataError(
                f"{target.name}: not the hub's file (another sha256); thrown away, run the command"
                " again"
            )
        part.replace(target)


class Chosen(NamedTuple):
    """What the publisher says of one dataset, and the files of it that are wanted."""

    entry: dict
    tokenizer: dict
    files: dict  # path on the hub: file name here


def choose(manifest: dict, dataset: str, train_shards: int | None) -> Chosen:
    """The publisher's entries of a dataset and its tokenizer, and the files to have."""
    datasets = {entry["name"]: entry for entry in manifest["datasets"]}
    if dataset not in datasets:
        raise DataError(f"no {dataset} in the repository, only {list(datasets)}")
    entry = datasets[dataset]
    tokenizers = [
        spec for spec in manifest["tokenizers"] if spec["name"] == entry["tokenizer_name"]
    ]
    tokenizer = tokenizers[0]
    stats = entry["stats"]
    if train_shards is None:
        train_shards = stats["files_train"]
    if train_shards > stats["files_train"]:
        raise DataError(f"--train-shards {train_shards}: the repository has {stats['files_train']}")
    streams = {"val": stats["files_val"], "train": train_shards}
    if "val_bytes_glob" in entry:
        streams["val_bytes"] = stats["files_val"]
    model = tokenizer["model_path"]
    files = {PREFIX + model: Path(model).name}
    for stream, count in streams.items():
        for number in range(count):
            name = f"fineweb_{stream}_{number:06d}.bin"
            files[f"{PREFIX}{entry['path']}/{name}"] = name
    return Chosen(entry, tokenizer, files)


def is_whole(path: Path, info, known: dict) -> bool:
    """Whether a file is the hub's, by its size and sha256, which a manifest may state."""
    if not path.exists() or path.stat().st_size != info.size:
        return False
    stated = known.get(path.name, {}).get("sha256")
    return info.lfs is None or info.lfs.sha256 == (stated or file_sha256(path))


def not_whole(folder: Path, infos: dict, known: dict) -> dict:
    """Those of the files {name: what the hub says of it} that the folder does not have whole."""
    wanted = {}
    for name, info in infos.items():
        if not is_whole(folder / name, info, known):
            wanted[name] = info
    return wanted


def download(variant: str, folder: Path, repo: str | None, train_shards: int | None) -> dict:
    """Fetches what is missing, checks everything, writes the manifest and returns it."""
    default_repo, dataset, _ = source_of(variant)
    hub = Hub(repo or default_repo)
    folder.mkdir(parents=True, exist_ok=True)
    with only_run_in(folder):
        chosen = choose_published(hub, folder, dataset, train_shards)
        infos = {chosen.files[path]: info for path, info in hub.look_up(list(chosen.files)).items()}
        fetch_missing(hub, folder, infos)
        print("counting, and searching the training documents for validation documents", flush=True)
        manifest = describe(folder, hub, chosen.entry, chosen.tokenizer, infos)
        for problem in check_contents(folder):
            raise DataError(f"{folder}: {problem}")
        stats = chosen.entry["stats"]
        check_stats(manifest["splits"], stats, manifest["train_shards"] == stats["files_train"])
        write_manifest(folder, manifest)
    return manifest


def choose_published(hub: Hub, folder: Path, dataset: str, train_shards: int | None) -> Chosen:
    """Fetches the publisher's manifest and chooses from it."""
    published = folder / "published_manifest.json"
    path = f"{PREFIX}manifest.json"
    hub.fetch(hub.look_up([path])[path], published)
    try:
        return choose(json.loads(published.read_bytes()), dataset, train_shards)
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise DataError(f"{published}: not the index of such a repository ({error!r})") from error


def fetch_missing(hub: Hub, folder: Path, infos: dict) -> None:
    """Fetches the files {name: what the hub says of it} that the folder does not have."""
    manifest = folder / "manifest.json"
    known = read_manifest(folder)["files"] if manifest.exists() else {}
    wanted = not_whole(folder, infos, known)
    others = sorted(path.name for path in folder.glob("fineweb_*.bin") if path.name not in infos)
    if others:
        raise DataError(
            f"{folder} has {others[0]}, which is not asked for ({len(others)} such files)"
        )
    manifest.unlink(missing_ok=True)  # not true while files change
    fetch_all(hub, folder, infos, wanted)


def fetch_all(hub: Hub, folder: Path, infos: dict, wanted: dict) -> None:
    """Fetches the wanted ones of the files {name: what the hub says of it}, if there is room."""
    size = sum(info.size for info in wanted.values())
    free = shutil.disk_usage(folder).free
    print(f"{len(infos)} files, {len(wanted)} of them to fetch: {size / 1e9:.2f} GB", flush=True)
    if size > free - (1 << 30):
        raise DataError(
            f"{folder}: {size / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free, one of which must"
            " stay so"
        )
    for number, (name, info) in enumerate(wanted.items(), 1):
        print(f"{number}/{len(wanted)} {name}", flush=True)
        hub.fetch(info, folder / name)


def download_documents(folder: Path, repo: str | None) -> str:
    """Fetches the documents that the published shards were made of -> what their publisher states.

    One JSON object a line, validation first. The file beside them must state the same sha256.
    """
    hub = Hub(repo or source_of("sp1024")[0])
    folder.mkdir(parents=True, exist_ok=True)
    found = hub.look_up([PREFIX + name for name in DOCS])
    infos = {name: found[PREFIX + name] for name in DOCS}
    with only_run_in(folder):
        fetch_all(hub, folder, infos, not_whole(folder, infos, known={}))
    lfs = infos[DOCS[0]].lfs
    stated = folder / DOCS[1]
    try:
        facts = json.loads(stated.read_bytes())
        documents, validation = int(facts["num_docs"]), int(facts["docs_val"])
        same = facts["docs_sha256"] == (lfs.sha256 if lfs else file_sha256(folder / DOCS[0]))
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{stated}: not what such a file holds ({error!r})") from error
    if not same:
        raise DataError(f"{DOCS[0]}: not the file that {DOCS[1]} describes (another sha256)")
    return f"{documents:,} documents, the first {validation:,} for validation; {folder / DOCS[0]}"


def describe(folder: Path, hub: Hub, entry: dict, tokenizer: dict, infos: dict) -> dict:
    """The manifest of what is in the folder, every shard read once."""
    files = {}
    splits = {}
    for stream in ("val", "val_bytes", "train"):
        documents = tokens = charged = 0
        for path in shard_files(folder, stream):
            values = read_shard(path)
            lfs = infos[path.name].lfs
            digest = lfs.sha256 if lfs else file_sha256(path)
            files[path.name] = {"values": len(values), "sha256": digest}
            documents += int((values == BOS_ID).sum())
            tokens += len(values)
            charged += int(values.sum(dtype=np.int64))
        if stream != "val_bytes":
            splits[stream] = {"documents": documents, "tokens": tokens}
        elif shard_files(folder, stream):
            splits["val"]["charged_bytes"] = charged
    model = folder / Path(tokenizer["model_path"]).name
    return {
        "format": "caseops_shards",
        "version": 1,
        "text_transform": entry.get("text_transform"),
        "tokenizer": {
            "file": model.name,
            "sha256": file_sha256(model),
            "vocab_size": tokenizer["vocab_size"],
        },
        "split_rule": "as published",
        "train_shards": len(shard_files(folder, "train")),
        "leaked_documents": len(find_leaks(folder)[1]),
        "sources": [{"repo": hub.repo, "revision": hub.revision, "dataset": entry["name"]}],
        "splits": splits,
        "files": files,
    }


def check_stats(splits: dict, stats: dict, whole: bool) -> None:
    """Raises DataError if counts are not the publisher's; training counts if it is all here."""
    for split in ("val", "train") if whole else ("val",):
        for kind, count in (("docs", "documents"), ("tokens", "tokens")):
            stated = stats.get(f"{kind}_{split}")
            if stated not in (None, splits[split][count]):
                raise DataError(
                    f"{split}: {splits[split][count]:,} {count}, the publisher states {stated:,}"
                )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fetch published token shards, or their text.")
    add = parser.add_argument
    variants = "caseops, or sp1024, sp8192, ... (plain)"
    add("--variant", default="caseops", metavar="NAME", help=variants)
    count = whole_number(0)
    shards = "the first N; default: all that are published"
    add("--train-shards", type=count, metavar="N", help=shards)
    place = "default: data/datasets/ and the dataset's name; of documents data/"
    add("--local-dir", type=Path, metavar="DIR", help=place)
    add("--repo", metavar="OWNER/NAME", help="another repository with the same layout")
    add("--docs", action="store_true", help="the documents instead of shards, to data/")
    options = parser.parse_args(arguments)
    if options.docs and (options.variant != "caseops" or options.train_shards is not None):
        parser.error("--docs fetches no shards: leave out --variant and --train-shards")
    return options


AGAIN = "Run the command again: it goes on where it stopped."


def fail(message: str, status: int = 1) -> int:
    """Prints an error and returns the exit status that goes with it."""
    print(f"error: {message}", file=sys.stderr)
    return status


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse_arguments(arguments)
    folder = options.local_dir or HERE / "datasets" / source_of(options.variant)[2]
    try:
        if options.docs:
            print(download_documents(options.local_dir or HERE, options.repo))
            return 0
        manifest = download(options.variant, folder, options.repo, options.train_shards)
    except KeyboardInterrupt:
        return fail(f"interrupted\n{AGAIN}", 130)
    except GatedRepoError as error:
        return fail(f"the repository asks for permission on its web page ({error})")
    except RepositoryNotFoundError as error:
        return fail(f"no such repository, or not for you: HF_TOKEN, or `hf auth login` ({error})")
    except (ImportError, hub_errors.InvalidURL) as error:
        return fail(hub_errors.explain(error))
    except (DataError, OSError, HfHubHTTPError, NetworkError, HFValidationError) as error:
        return fail(f"{error}\n{AGAIN}")
    for split, counts in manifest["splits"].items():
        print(f"{split}: " + ", ".join(f"{number:,} {name}" for name, number in counts.items()))
    val = np.concatenate(read_stream(folder, "val"))
    costs = read_stream(folder, "val_bytes")
    print(
        f"{manifest['leaked_documents']} training documents are validation documents too;"
        f" canonical: {canonical(val, np.concatenate(costs) if costs else None)}; {folder}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
