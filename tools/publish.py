"""Uploads a run to a Hugging Face repository of yours, or fetches one back to go on from it.

usage: HF_TOKEN=... python tools/publish.py upload runs/<RUN_ID> --repo you/golf-runs [--public]
       [HF_TOKEN=...] python tools/publish.py fetch <RUN_ID> --repo you/golf-runs [--runs-dir runs]

upload puts model.pt, artifact.bin, train_gpt.py, log.txt, result.json and the pictures into the
folder <RUN_ID> of a model repository, which is made where it is missing: private, unless --public.
fetch writes runs/<RUN_ID>/ and prints the commands that go on from it (QUANT_ONLY=1,
TTT_EVAL_ONLY=1) with the settings of that run. The token is read from HF_TOKEN and from nowhere
else, and is never printed; a public repository is fetched without one.
"""

import argparse
import glob
import os
import shlex
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import command_line  # noqa: E402

if __name__ == "__main__":
    command_line.begin("publish.py")

from huggingface_hub import HfApi  # noqa: E402

from tools import hub  # noqa: E402
from tools.run_files import read_run  # noqa: E402

FILES = ("model.pt", "artifact.bin", "train_gpt.py", "log.txt", "result.json")
OF_A_PLACE = {  # settings that fit the machine of the run, and not the one that fetches it
    "RUN_ID",
    "RUNS_DIR",
    "DATA_PATH",
    "TOKENIZER_PATH",
    "DEVICE",
    "CHECKPOINT_PATH",
    "ARTIFACT_PATH",
}


class PublishError(Exception):
    """What the user must change."""


def upload(api, folder, repo, private):
    """One run's files in one commit -> its address."""
    read_run(folder)  # ValueError where the run has not ended well
    name = folder.resolve().name
    files = [file for file in FILES if (folder / file).exists()] + [
        path.name for path in sorted(folder.glob("*.png"))
    ]
    patterns = [glob.escape(file) for file in files]
    api.create_repo(repo, private=private, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        path_in_repo=name,
        allow_patterns=patterns,
        commit_message=f"Run {name}",
    )
    print(f"uploaded to {repo}/{name}: {', '.join(files)}")
    return done.commit_url


def fetch(api, name, repo, runs_dir):
    """A run's files of the repository -> its folder here; sizes are compared with its RESULT."""
    folder = runs_dir / name
    if folder.exists():
        raise PublishError(
            f"{folder} exists: it would be mixed with what is fetched; move it away, or --runs-dir"
        )
    there = [
        path
        for path in api.list_repo_files(repo)
        if path.startswith(f"{name}/") and path.count("/") == 1
    ]
    if f"{name}/log.txt" not in there:
        raise PublishError(f"{repo} holds no run {name}")
    runs_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=runs_dir) as scratch:
        for path in there:
            api.hf_hub_download(repo, path, local_dir=scratch)
        wanted = read_run(Path(scratch, name)).result["artifact_bytes"]
        artifact = Path(scratch, name, "artifact.bin")
        if artifact.exists() and artifact.stat().st_size != wanted:
            raise PublishError(
                f"{repo}: artifact.bin has {artifact.stat().st_size} bytes, its RESULT says"
                f" {wanted}"
            )
        Path(scratch, name).rename(folder)
    print(f"fetched {folder}: {', '.join(Path(path).name for path in there)}")
    return read_run(folder)


def commands(run):
    """Command lines that go on from a fetched run, with what it set otherwise than by default."""
    settings = {name: run.settings[name] for name in run.changed if name not in OF_A_PLACE}
    given = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    ways = {
        "model.pt": ("QUANT_ONLY", "CHECKPOINT_PATH"),
        "artifact.bin": ("TTT_EVAL_ONLY", "ARTIFACT_PATH"),
    }
    for file, (mode, path) in ways.items():
        if (run.folder / file).exists():
            source = shlex.quote(str(run.folder / file))
            words = [
                f"{mode}=1",
                f"{path}={source}",
                *given,
                "DATA_PATH=...",
                "python train_gpt.py",
            ]
            yield " ".join(words)


def fail(message, token):
    """Ends the program with a message in which the token does not show."""
    sys.exit(f"publish.py: {message.replace(token, '***') if token else message}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    up = actions.add_parser("upload", help="a run's folder to the hub")
    up.add_argument("run", type=Path, metavar="RUN")
    up.add_argument("--public", action="store_true", help="a repository that is made is public")
    down = actions.add_parser("fetch", help="a run from the hub")
    down.add_argument("run", metavar="RUN_ID")
    down.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="FOLDER")
    for action in (up, down):
        action.add_argument("--repo", required=True, metavar="USER/NAME")
    options = parser.parse_args(arguments)
    token = os.environ.get("HF_TOKEN")
    # False: not the token that a login may have left on this machine
    api = HfApi(token=token or False)
    try:
        if options.action == "upload":
            if not token:
                raise PublishError(
                    "HF_TOKEN is not set: make a token with write access in the hub's settings"
                )
            print(upload(api, options.run, options.repo, not options.public))
        else:
            for command in commands(fetch(api, options.run, options.repo, options.runs_dir)):
                print(command)
    except hub.ERRORS as error:
        fail(hub.explain(error), token)
    except (PublishError, ValueError, OSError) as error:
        fail(str(error), token)


if __name__ == "__main__":
    command_line.run(main, "publish.py")
