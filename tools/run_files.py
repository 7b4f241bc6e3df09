"""Reads back what a run leaves in its folder: settings, lines of log.txt, RESULT; presets.

A set of runs is a folder of run folders, as run_3seeds.sh makes it. Used by the other tools;
standard library only.
"""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

PRESETS = Path(__file__).resolve().parents[1] / "presets"
RESULT_VERSION = 2  # that of train_gpt.py, see docs/RESULT.md
# Settings that belong to one run and not to its method:
FOLDER = {"RUN_ID", "RUNS_DIR", "PLOTS"}
DATA = {"DATA_PATH", "TOKENIZER_PATH"}
MODE = {
    "PRESET",
    "PREQUANT_ONLY",
    "QUANT_ONLY",
    "TTT_EVAL_ONLY",
    "CHECKPOINT_PATH",
    "ARTIFACT_PATH",
    "RESUME",
}
OF_A_SEED = FOLDER | DATA | {"SEED"}  # these may differ between the seeds of one method
OF_A_PART = FOLDER | MODE  # between the parts of one run, which continues from a file
OF_A_RUN = OF_A_SEED | MODE | {"CHECKPOINT_EVERY"}  # all of them
OF_A_SCORE = "loss", "bpb", "tokens", "bytes"
SETTINGS_LINE = "settings (* changed):"  # the first line that a run writes into its log


class PresetError(ValueError):
    """A preset that is not there or cannot be read; the message says what to change."""


class RunError(ValueError):
    """A run whose files do not say what is asked of them.

    The message names the run and what it lacks.
    """


class Record(dict):
    """A dictionary that was read from a run's files.

    A missing key is a RunError that names the run.
    """

    def __init__(self, items, where):
        super().__init__(items)
        self.where = where

    def __missing__(self, key):
        raise RunError(
            f"{self.where} has no {key}: its run did not make it (QUANT_ONLY=1 and TTT_EVAL_ONLY=1"
            " train nothing), or another version wrote the file"
        )


class Run(NamedTuple):
    """One run: where it lies, its settings, the rows of its log, its RESULT."""

    folder: Path
    settings: dict[str, str]  # every setting in capitals, as text
    changed: tuple[str, ...]  # names of the settings that differ from the defaults
    # training lines: step, train_loss, train_seconds, progress, lr_factor, looping,
    # tokens_per_s
    steps: list[dict]
    switches: list[dict]  # where looping was switched: step, looping, train_seconds
    evaluations: list[dict]  # evaluations inside training: step, train_seconds, val_loss, val_bpb
    # batches of test-time training: running_tokens, running_bpb, seconds; {"adapted":
    # documents}
    ttt: list[dict]
    result: dict
    # how often something ran in this folder; QUANT_ONLY=1 and RESUME=1 go on in the same log
    parts: int

    @property
    def seed(self):
        return self.result["seed"]


def settings_of(words):
    """["A=1", "B=2"] -> {"A": "1", "B": "2"}. ValueError for a word without `=`."""
    return dict(word.split("=", 1) for word in words)


def read_preset(name):
    """presets/<name>.env -> {NAME: value}.

    PresetError, with the names that exist, for an unknown or a damaged one.
    """
    path = PRESETS / f"{name}.env"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.env")))
        raise PresetError(f"PRESET={name}: there is no {path}; there are: {known}")
    try:
        return settings_of(shlex.split(path.read_text(encoding="utf-8"), comments=True))
    except ValueError as error:
        raise PresetError(f"PRESET={name}: {path} is damaged: {error}") from None


def published_settings():
    """Names of the settings that presets/published.py adds to those of train_gpt.py."""
    text = (PRESETS / "published.py").read_text(encoding="utf-8")
    return {name.upper() for name in re.findall(r"^    (\w+): \w+ = env\(", text, re.M)} - {
        "COMPRESSOR"  # takes two values more
    }


def script_of(settings):
    """{NAME: text} -> path of the script that knows these settings: train_gpt.py, or
    presets/published.py.
    """
    if settings.keys() & published_settings() or settings.get("COMPRESSOR") in ("lzma", "pergroup"):
        return PRESETS / "published.py"
    return PRESETS.parent / "train_gpt.py"


def with_preset(environ):
    """The environment over the settings of its PRESET, {NAME: value}.

    PresetError as read_preset.
    """
    return (read_preset(environ["PRESET"]) if environ.get("PRESET") else {}) | dict(environ)


def key_values(line):
    """`a:1 b:2.5 c:word` -> {"a": 1.0, "b": 2.5}; what is no number is left out."""
    number = r"-?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|nan|inf)"
    return {key: float(value) for key, value in re.findall(rf"(\w+):({number})(?=\s|$)", line)}


def read_settings(lines):
    """The table at the head of a log -> ({NAME: value}, names of the changed ones)."""
    found = [
        match for line in lines if (match := re.match(r"([* ]) ([A-Z][A-Z0-9_]*)=(.*?)  # ", line))
    ]
    return {m[2]: m[3] for m in found}, tuple(m[2] for m in found if m[1] == "*")


def read_rows(lines):
    """Lines of one part of a log -> its rows by kind.

    (training steps, switches of looping, evaluations, test-time training).
    """
    steps, switches, evaluations, ttt = [], [], [], []
    for line in lines:
        row = key_values(line)
        if "train_loss" in row and "step" in row:
            if not steps or steps[-1]["step"] != row["step"]:  # the last step may be logged twice
                steps.append(row)
        elif "step" in row and "looping" in row:
            switches.append(row)
        elif line.startswith("training val_loss:") and steps:
            evaluations.append(
                {name: steps[-1].get(name, 0.0) for name in ("step", "train_seconds")} | row
            )
        elif line.startswith("ttt_batch "):
            ttt.append(row)
        elif line.startswith("ttt_global_adaptation ") and "documents" in row:
            ttt.append({"adapted": row["documents"]})
    return steps, switches, evaluations, ttt


def training_of(parts):
    """Lines of a run's parts -> the rows of the last part that trained.

    (steps, switches, evaluations).

    Where that part went on from a training state (RESUME=1), the rows that led to the state come
    before its own.
    """
    trained = [], [], []
    for part in parts:
        rows = read_rows(part)[:3]
        resumed = next(
            (key_values(line)["step"] for line in part if re.match(r"step:\d+ resumed:", line)),
            None,
        )
        if resumed is not None:  # a resumed part begins with the rows of the state's own step
            before = ([row for row in kind if row["step"] < resumed] for kind in trained)
            trained = tuple(old + new for old, new in zip(before, rows, strict=True))
        elif rows[0]:
            trained = rows
    return trained


def read_result(text, path):
    """What stands behind RESULT in a log -> Record.

    RunError for damage, or for a version that reads otherwise.

    A key that is missing is an error only where a tool asks for it.
    """
    where = f"{path}: RESULT"
    try:
        result = json.loads(text, object_hook=lambda items: Record(items, where))
    except ValueError as error:
        raise RunError(f"{where} is damaged: {error}") from None
    if not isinstance(result, Record):
        raise RunError(f"{where} is damaged: it is no object")
    if result.get("version", RESULT_VERSION) != RESULT_VERSION:
        raise RunError(
            f"{where} is of version {result['version']}, these tools read version {RESULT_VERSION}:"
            f" check out commit {result.get('commit')}, which made it"
        )
    for name in ("scores", "seconds"):
        if not isinstance(result.get(name, {}), dict):
            raise RunError(f"{where} is damaged: {name} is no object")
    for stage, score in result.get("scores", {}).items():
        if not isinstance(score, dict) or not all(
            is_number(score[name]) for name in OF_A_SCORE if name in score
        ):
            raise RunError(f"{where} is damaged: the {stage} score has no numbers")
    return result


def is_number(value):
    """NaN and infinities are numbers, too: a run may have them."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_run(folder):
    """Folder -> Run.

    Raises RunError where the run has not ended (no RESULT line) or the log is not one of ours.
    """
    path = Path(folder) / "log.txt"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    heads = [number for number, line in enumerate(lines) if line == SETTINGS_LINE]
    results = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    if not heads or not results or lines[-1] != "RESULT " + results[-1]:
        raise RunError(f"{path}: no RESULT line at its end: the run has not ended, or not well")
    parts = [lines[a:b] for a, b in zip(heads, [*heads[1:], len(lines)], strict=True)]
    ttt = next((rows for part in reversed(parts) if (rows := read_rows(part)[3])), [])
    settings, changed = read_settings(parts[-1])
    settings = Record(settings, f"{path}: the table of settings")
    *trained, ttt = (
        [Record(row, f"{path}: a line") for row in rows] for rows in (*training_of(parts), ttt)
    )
    return Run(
        Path(folder), settings, changed, *trained, ttt, read_result(results[-1], path), len(parts)
    )


def own_settings(run):
    """What a run set otherwise than by default, but for what belongs to the run: {NAME: value}."""
    return {name: run.settings[name] for name in run.changed if name not in OF_A_SEED}


def flatten(value, name=""):
    """RESULT -> {"scores.ttt.bpb": number or text}.

    Lists of numbers by position, other lists by their length.
    """
    if isinstance(value, dict):
        return {
            k: v
            for key, part in value.items()
            for k, v in flatten(part, f"{name}.{key}".lstrip(".")).items()
        }
    if isinstance(value, list) and value and all(map(is_number, value)):
        return {f"{name}.{number}": part for number, part in enumerate(value)}
    return {name: len(value) if isinstance(value, list) else value}


def by_number(folder):
    """Sorts seed5 before seed42."""
    return [
        (int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", folder.name)
    ]


def run_folders(paths):
    """Runs or sets of runs -> folders of runs, those of a set by name and number.

    RunError if one is neither.
    """
    folders = []
    for path in map(Path, paths):
        inside = sorted((log.parent for log in path.glob("*/log.txt")), key=by_number)
        inside = [path] if (path / "log.txt").exists() else inside
        if not inside:
            raise RunError(f"{path} is neither a run nor a set of runs: no log.txt there")
        folders += inside
    return folders


def read_runs(paths):
    """Runs or sets -> Runs. Raises RunError for a run that has not ended."""
    return [read_run(folder) for folder in run_folders(paths)]
