"""The proxy: does a change of the recipe help? Short paired runs on one GPU, with equal seconds.

    python benchmarks/bench_recipe.py data data/mine/proxy --train train.jsonl.xz \\
        --val val.jsonl.xz
    python benchmarks/bench_recipe.py run fusion --kind screen --data data/mine/proxy \\
        --seeds 1 2 3 --arm base "" --arm stored "MARKER_FUSION_ENABLED=0" \\
        --arm before@../before ""
    python benchmarks/bench_recipe.py table fusion
    python benchmarks/bench_recipe.py effects factorial --noise 0.0016
    python benchmarks/bench_recipe.py noise noise

An arm is a name with settings of train_gpt.py or of presets/published.py, which runs then;
NAME@DIR takes the script of another checkout. The first arm of `run` is the reference. Every
finished run becomes one line of the campaign file, docs/campaigns/NAME.jsonl (or the path that is
given instead of a name), and a later call with the same plan runs only what is missing there.

`effects` is for designed experiments: arms such as soap+wide+short name the factors that they turn
on, and every run tells about every factor. Seeds are fitted as blocks; --blocks none leaves them
out, where a small design is spread over seeds. --noise gives the known deviation of a run, which a
design with as many factors as runs less one needs.

Runs count as a pair if they have the same seed and ran in one go: on one machine, with pauses of at
most ten minutes. A half pair whose other half never came in its go is run again. docs/PROXY.md
explains the kinds of runs and when the results may be believed.
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
CAMPAIGNS = ROOT / "docs" / "campaigns"
sys.path.insert(0, str(ROOT))

from prepare_caseops_data import read_lines, whole_number  # noqa: E402
from tools.run_files import script_of, settings_of, with_preset  # noqa: E402

LINE_VERSION = 1  # of the records in a campaign file
STAGES = "prequant", "quantized", "sliding", "ttt"

# Settings of every run: one micro-batch a step, so that a short run has thousands of steps.
STANDARD = {"TRAIN_BATCH_TOKENS": "98304", "MICRO_BATCH_TOKENS": "98304", "PLOTS": "0"}
# Nothing is quantized in a screen; one second stays as a margin, so that no run oversteps its
# budget by a slow step.
SCREEN = {"MAX_WALLCLOCK_SECONDS": "120", "GPTQ_RESERVE_SECONDS": "1", "PREQUANT_ONLY": "1"}
KINDS = {
    "screen": SCREEN,
    "final": {"MAX_WALLCLOCK_SECONDS": "200"},
    "long": {"MAX_WALLCLOCK_SECONDS": "600"},
    "noise": SCREEN,
}
EXPERIMENTS = [kind for kind in KINDS if kind != "noise"]  # these compare arms
# What a run takes beyond MAX_WALLCLOCK_SECONDS with cold caches; used until a run of the arm has
# been timed.
OVERHEAD_SECONDS = {"screen": 120, "final": 240, "long": 260, "noise": 120}

# An arm that changes one of these is not compared at equal seconds, on equal data or with equal
# seeds.
PROTECTED = (
    "MAX_WALLCLOCK_SECONDS",
    "SEED",
    "DATA_PATH",
    "TRAIN_BATCH_TOKENS",
    "PREQUANT_ONLY",
    "QUANT_ONLY",
    "TTT_EVAL_ONLY",
    "TTT_MAX_DOCS",
    "ITERATIONS",
    "DETERMINISTIC",
)
# never settings of an arm, whatever --allow says
FORBIDDEN = "RUN_ID", "RUNS_DIR", "RESUME", "CHECKPOINT_PATH", "ARTIFACT_PATH"
NOT_PART_OF_A_RECIPE = ("SEED", "DATA_PATH", "TOKENIZER_PATH", "PLOTS", *FORBIDDEN)

MIN_GAIN_BPB = 0.0005
MIN_PAIRS = 3
SIGNIFICANCE = 0.05  # one-sided; Student's t with two degrees of freedom must be beyond 2.92
MAX_PAUSE_SECONDS = 600  # between two runs of one go
MAX_FAILURES = 2  # of one arm and seed; after these it is left alone
LOG_LINES = 15  # of a failed run, kept in the campaign file

# Runs inside an arm's checkout: its own Hyperparameters judge the settings; the files that this
# imports are its code.
CHECK = """
import dataclasses, hashlib, json, os, sys
from pathlib import Path
root = Path.cwd().resolve()
sys.path.insert(0, str(root))
import train_gpt
settings = json.loads(sys.argv[1])
if sys.argv[2] != "train_gpt.py":
    from presets import published
    published.install()
fields = dataclasses.fields(train_gpt.Hyperparameters)
names = [field.name.upper() for field in fields]
environ = {name: value for name, value in os.environ.items() if name not in names}
find_guard = getattr(train_gpt, "find_guard", None)  # an older checkout has none
# with the guard come the files beside the script: they are code of the arm too
beside = {"guard": find_guard()} if find_guard else {}
try:
    hp = train_gpt.Hyperparameters.from_env(environ | settings, **beside)
except ValueError as error:
    sys.exit(str(error))
values = {field.name.upper(): getattr(hp, field.name) for field in fields}
defaults = {field.name.upper(): field.default for field in fields}
changed = {name: value for name, value in values.items() if value != defaults[name]}
code = hashlib.sha256()
for path in sorted({Path(module.__file__).resolve() for module in sys.modules.values()
                    if getattr(module, "__file__", None)}):
    # torch has modules that name no file
    inside = path.is_file() and path.is_relative_to(root) and path.relative_to(root).parts
    if inside and not any(part.startswith(".") or part == "site-packages" for part in inside):
        code.update(path.read_bytes())
print(json.dumps({"names": names, "changed": changed, "code": code.hexdigest()[:12],
                  "seconds": values.get("MAX_WALLCLOCK_SECONDS", 0)}))
"""


class Arm(NamedTuple):
    """One side of a comparison."""

    name: str
    settings: dict[str, str]  # as given for this arm
    tree: Path  # the checkout whose script runs


class Recipe(NamedTuple):
    """What an arm's checkout makes of its settings."""

    environ: dict[str, str]  # for the run, without SEED, RUN_ID and RUNS_DIR
    changed: dict  # the settings that differ from the checkout's defaults
    code: str  # hash of the files that train_gpt.py imports, and of itself
    seconds: float  # MAX_WALLCLOCK_SECONDS
    script: str = "train_gpt.py"  # of the checkout, or presets/published.py


# ---- the campaign file


def campaign_path(name: str) -> Path:
    """A name -> docs/campaigns/NAME.jsonl; a path that ends in .jsonl stays."""
    if name.endswith(".jsonl"):
        return Path(name)
    return CAMPAIGNS / f"{name}.jsonl"


def whole_lines(path: Path) -> list[tuple[int, dict]]:
    """Numbers and records of all whole lines of a file of records; none if it is missing.

    A line that is no JSON object, as one that a kill cut off, is passed over.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append((number, record))
        else:
            told = f"{path}, line {number}: damaged, passed over; the line can be removed"
            print(told, file=sys.stderr)
    return records


def are_scores(scores) -> bool:
    """Whether these are {stage: {bpb, bytes, ...}} with numbers."""
    return isinstance(scores, dict) and all(
        isinstance(score, dict)
        and isinstance(score.get("bpb"), float)
        and math.isfinite(score["bpb"])
        and isinstance(score.get("bytes"), int)
        for score in scores.values()
    )


def wrong_field(record: dict) -> str | None:
    """The first field that a record lacks, or that has no value of its kind; None if all hold."""
    failed = record.get("status") == "failed"
    holds = {
        "kind": record.get("kind") in list(KINDS),
        "arm": isinstance(record.get("arm"), str),
        "seed": isinstance(record.get("seed"), int),
        "go": isinstance(record.get("go"), str),
        "status": record.get("status") in ("ok", "failed"),
        "settings": isinstance(record.get("settings"), dict),
        "commit": "commit" in record,
        "code": "code" in record,
        "log": not failed or isinstance(record.get("log"), list),
        "scores": failed or are_scores(record.get("scores")),
        "steps": isinstance(record.get("steps", 0), int),
        "total_bytes": isinstance(record.get("total_bytes", 0), int),
        "device": isinstance(record.get("device", ""), str),
    }
    return next((name for name, right in holds.items() if not right), None)


def read_campaign(path: Path) -> list[dict]:
    """Records of a campaign file, as whole_lines.

    ValueError for those of another version and for those that cannot be counted.
    """
    records = []
    for number, record in whole_lines(path):
        where = f"{path}, line {number}"
        if (version := record.get("version")) != LINE_VERSION:
            raise ValueError(f"{where}: version {version}, this script reads {LINE_VERSION}")
        if field := wrong_field(record):
            raise ValueError(
                f"{where}: {field} is missing or wrong; remove the line, and `run` repeats its run"
            )
        records.append(record)
    return records


def read_records(campaign: str) -> list[dict]:
    """Records of the campaign that a command line names. ValueError if there are none."""
    path = campaign_path(campaign)
    records = read_campaign(path)
    if not records:
        names = ", ".join(sorted(file.stem for file in CAMPAIGNS.glob("*.jsonl")))
        raise ValueError(
            f"{path}: no runs there; name a campaign of docs/campaigns ({names}) or a path that"
            " ends in .jsonl"
        )
    return records


def append_record(path: Path, record: dict) -> None:
    """One more line, on disk when this returns. A last line without its end gets one first."""
    cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut_off else "") + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(path: Path):
    """Holds the campaign file against a second call on this machine.

    ValueError if another one has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is in use by another call: wait for its end") from None
        yield


def succeeded(records: list[dict], kind: str) -> list[dict]:
    """The runs of a kind that have a result, in the order in which they ended."""
    return [record for record in records if record["kind"] == kind and record["status"] == "ok"]


def pairs_of(runs: list[dict], arm: str, against: str) -> dict[int, tuple[dict, dict]]:
    """Runs of one kind -> {seed: (run of the arm, run of the reference)}.

    A pair is the first that ran in one go.
    """
    first = {}
    for run in runs:
        first.setdefault((run["seed"], run["go"], run["arm"]), run)
    pairs = {}
    for (seed, go, name), run in first.items():
        partner = first.get((seed, go, against))
        if name == arm and partner:
            pairs.setdefault(seed, (run, partner))
    return pairs


# ---- arms


def parse_arm(words: list[str]) -> Arm:
    """["NAME" or "NAME@DIR", "SETTING=value ..."] -> Arm.

    ValueError for a name or a word that cannot be one.
    """
    name, _, tree = words[0].partition("@")
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"arm {name!r}: a name has letters, digits, '_', then also '.', '+', '-'")
    folder = Path(tree or ROOT).resolve()
    if not (folder / "train_gpt.py").exists():
        raise ValueError(f"arm {name}: there is no train_gpt.py in {folder}")
    return Arm(name, named_settings(words[1].split(), f"arm {name}"), folder)


def named_settings(words: list[str], where: str) -> dict[str, str]:
    """As settings_of; ValueError with the place for words that are no NAME=value."""
    try:
        return settings_of(words)
    except ValueError:
        raise ValueError(f"{where}: {' '.join(words)!r} must be words such as NAME=value") from None


def refuse_unequal(arms: list[Arm], kind: str, allowed: list[str]) -> None:
    """ValueError for an arm whose settings break the comparison, unless they are `allowed`."""
    protected = {*PROTECTED, *KINDS[kind]} - set(allowed)
    for arm in arms:
        if taken := sorted(set(arm.settings) & set(FORBIDDEN)):
            raise ValueError(
                f"arm {arm.name} sets {', '.join(taken)}: this script sets these itself"
            )
        if unequal := sorted(set(arm.settings) & protected):
            raise ValueError(
                f"arm {arm.name} sets {', '.join(unequal)}: then the arms are not compared at equal"
                f" seconds and data; --allow {' '.join(unequal)} if that is what you want"
            )


def check_arm(arm: Arm, shared: dict[str, str]) -> Recipe:
    """Asks the arm's checkout about the settings.

    ValueError, with its message, where it refuses them.

    Settings come from `shared` and the arm alone: what the environment says about settings is
    dropped.
    """
    settings = shared | arm.settings
    script = script_in(arm.tree, settings)
    command = [sys.executable, "-c", CHECK, json.dumps(settings), script]
    done = subprocess.run(command, cwd=arm.tree, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"arm {arm.name}: " + "\n".join(done.stderr.strip().splitlines()[-5:]))
    found = json.loads(done.stdout.splitlines()[-1])
    environ = {name: value for name, value in os.environ.items() if name not in found["names"]}
    changed = {
        name: value for name, value in found["changed"].items() if name not in NOT_PART_OF_A_RECIPE
    }
    return Recipe(environ | settings, changed, found["code"], found["seconds"], script)


def script_in(tree: Path, settings: dict[str, str]) -> str:
    """Which script of a checkout runs with these settings; older ones have one alone."""
    script = str(script_of(with_preset(settings)).relative_to(ROOT))
    return script if (tree / script).exists() else "train_gpt.py"


def refuse_another_recipe(
    records: list[dict], kind: str, arm: Arm, recipe: Recipe, data: dict
) -> None:
    """ValueError where the campaign has runs of this arm with other settings, code or data."""
    for record in records:
        if (record["kind"], record["arm"]) != (kind, arm.name):
            continue
        for what, now in (("changed", recipe.changed), ("code", recipe.code), ("data", data)):
            if record[what] != now:
                raise ValueError(
                    f"arm {arm.name} has runs in this campaign with other {what}: {record[what]},"
                    f" now {now}; choose another name for the arm, or another campaign"
                )


def data_identity(folder: Path) -> dict:
    """What tells datasets apart.

    Tokens, and a hash of the shards' own hashes (of their sizes without a manifest).
    """
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("fineweb_*.bin"))}
    train = [size for name, size in sizes.items() if name.startswith("fineweb_train_")]
    if not train or not any(name.startswith("fineweb_val_") for name in sizes):
        raise ValueError(
            f"--data {folder}: fineweb_train_*.bin and fineweb_val_*.bin are not both there; see"
            " `data`"
        )
    files = sizes
    if (folder / "manifest.json").exists():
        files = json.loads((folder / "manifest.json").read_text())["files"]
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    # 1,024 bytes of head, uint16
    return {"train_tokens": sum((size - 1024) // 2 for size in train), "files": digest}


def commit_of(tree: Path) -> str | None:
    """Abbreviated commit of a checkout, with + where tracked files differ from it.

    None where git cannot say.
    """
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


# ---- runs


def current_go() -> str:
    """The name of the go that runs now, from a file of this machine.

    A new one on a new machine or more than ten minutes after the last call of this function.
    """
    path = Path(tempfile.gettempdir(), f"bench_recipe_go.{os.getuid()}")
    recent = path.exists() and time.time() - path.stat().st_mtime < MAX_PAUSE_SECONDS
    go = path.read_text() if recent else uuid.uuid4().hex[:8]
    path.write_text(go)
    return go


def last_lines(path: Path) -> list[str]:
    """The end of a log, without what would make the campaign file long."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line[:300] for line in lines if line.strip()][-LOG_LINES:]


def call_script(tree: Path, script: str, environ: dict[str, str], output: Path) -> int:
    """A script of a checkout, its output into a file -> exit code.

    Whatever ends this ends the run, too.
    """
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, script], cwd=tree, env=environ, stdout=file, stderr=file
        )
        try:
            return process.wait()
        finally:
            process.kill()  # nothing happens to one that has ended
            process.wait()


def run_once(arm: Arm, recipe: Recipe, seed: int, runs: Path) -> dict:
    """One run to its end -> its part of a record.

    Status, and figures of RESULT or the last lines of the log.
    """
    runs.mkdir(parents=True, exist_ok=True)
    name = f"{arm.name}-{seed}-{uuid.uuid4().hex[:6]}"
    ours = {"SEED": str(seed), "RUN_ID": name, "RUNS_DIR": str(runs)}
    environ = recipe.environ | ours | arm.settings  # an arm may have a SEED (--allow SEED)
    output = runs / f"{name}.txt"
    start = time.monotonic()
    code = call_script(arm.tree, recipe.script, environ, output)
    wall = {"wall_seconds": round(time.monotonic() - start, 1)}
    result = runs / name / "result.json"
    # 3: the byte cap is broken, which RESULT says as well
    if code not in (0, 3) or not result.exists():
        return {"status": "failed", **wall, "exit_code": code, "log": last_lines(output)}
    log = runs / name / "log.txt"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return {"status": "ok", **wall, **figures_of(json.loads(result.read_text()), text, recipe)}


def figures_of(result: dict, log: str, recipe: Recipe) -> dict:
    """What a record keeps of RESULT, with tokens/s over the complete training, and epochs."""
    keys = (
        "commit",
        "device",
        "world_size",
        "torch",
        "python",
        "attention",
        "mlp",
        "steps",
        "train_loss",
        "training_seconds",
        "tokens_per_second_by_loop_state",
        "artifact_bytes",
        "code_bytes",
        "total_bytes",
        "seconds",
        "violations",
        "peak_memory_bytes",
    )
    figures = {"result_version": result.get("version")}
    figures |= {key: result[key] for key in keys if key in result}
    kept = "bpb", "bytes", "tokens", "partial"
    figures["scores"] = {
        stage: {key: score[key] for key in kept if key in score}
        for stage, score in result["scores"].items()
    }
    if result.get("steps") and result.get("training_seconds"):
        tokens = result["steps"] * int(recipe.environ["TRAIN_BATCH_TOKENS"])
        figures["tokens_per_second"] = round(tokens / result["training_seconds"])
        figures |= epochs_of(tokens, int(recipe.environ["MICRO_BATCH_TOKENS"]), log)
    return figures


def epochs_of(tokens: int, row: int, log: str) -> dict:
    """{train_tokens, epochs} of a run that trained on `tokens` tokens in rows of `row`.

    Empty where the log does not say how large the training data are.
    """
    found = re.search(r"\btrain_tokens:(\d+)", log)
    if not found:
        return {}
    # a row whose markers are fused takes more of the stored tokens, its span, than it has
    span = re.search(r"\bspan:(\d+)", log)
    stored = tokens * int(span[1]) / row if span else tokens
    return {"train_tokens": int(found[1]), "epochs": round(stored / int(found[1]), 3)}


# ---- what is missing


def given_up(records: list[dict], kind: str) -> set[tuple[int, str]]:
    """(seed, arm) of the runs of a kind that failed so often that they are left alone."""
    failed = Counter(
        (r["seed"], r["arm"]) for r in records if (r["kind"], r["status"]) == (kind, "failed")
    )
    return {run for run, count in failed.items() if count >= MAX_FAILURES}


def missing_pairs(
    records: list[dict], kind: str, seed: int, names: list[str], go: str
) -> list[str]:
    """Arms that must run in this go so that every arm has a pair for the seed.

    The first name is the reference.
    """
    runs = [run for run in succeeded(records, kind) if run["seed"] == seed]
    hopeless = {name for of_seed, name in given_up(records, kind) if of_seed == seed}
    reference, *others = names
    if reference in hopeless:
        return []
    if not others:  # one arm alone has no pairs
        return [] if runs else [reference]
    unpaired = [
        name for name in others if name not in hopeless and not pairs_of(runs, name, reference)
    ]
    here = {run["arm"] for run in runs if run["go"] == go}
    wanted = [reference, *unpaired] if unpaired else []
    return [name for name in wanted if name not in here]


def missing_repeats(
    records: list[dict], kind: str, seeds: list[int], names: list[str]
) -> list[tuple[int, str]]:
    """(seed, arm) of each run that a plan of repeats still lacks.

    Every arm runs as often as a seed is named.
    """
    done = Counter((run["seed"], run["arm"]) for run in succeeded(records, kind))
    hopeless = given_up(records, kind)
    missing = []
    planned = Counter()
    for run in itertools.product(seeds, names):
        planned[run] += 1
        if planned[run] > done[run] and run not in hopeless:
            missing.append(run)
    return missing


def groups_missing(records: list[dict], args, go: str) -> list[list[tuple[int, str]]]:
    """Groups of (seed, arm) that belong together, in the order in which they run.

    Every second seed takes its arms in reverse, so that a drift of the machine does not favour one
    of them.
    """
    names = [arm.name for arm in args.arms]
    if args.kind == "noise":
        return [[each] for each in missing_repeats(records, args.kind, args.seeds, names)]
    groups = []
    for number, seed in enumerate(args.seeds):
        missing = missing_pairs(records, args.kind, seed, names, go)
        if number % 2:
            missing.reverse()
        if missing:
            groups.append([(seed, name) for name in missing])
    return groups


def expected_seconds(records: list[dict], kind: str, name: str, go: str, recipe: Recipe) -> float:
    """How long a run will take.

    As the arm's last one in this go, or, before there is one, with cold caches.
    """
    timed = [
        run["wall_seconds"]
        for run in succeeded(records, kind)
        if (run["arm"], run["go"]) == (name, go)
    ]
    return timed[-1] if timed else recipe.seconds + OVERHEAD_SECONDS[kind]


class Campaign:
    """One call of `run`: runs what is missing, one run after another, and writes down every end."""

    def __init__(self, args, recipes: dict[str, Recipe], data: dict):
        self.args = args
        self.path = campaign_path(args.campaign)
        self.recipes = recipes
        self.data = data
        self.arms = {arm.name: arm for arm in args.arms}
        self.go = current_go()
        self.started = time.monotonic()
        self.position = 0  # of a run among those of this call

    def fits(self, names: list[str], records: list[dict]) -> bool:
        """Whether runs of these arms would end before --limit-seconds."""
        if not self.args.limit_seconds:
            return True
        needed = sum(
            expected_seconds(records, self.args.kind, n, self.go, self.recipes[n]) for n in names
        )
        used = time.monotonic() - self.started
        if used + needed <= self.args.limit_seconds:
            return True
        print(
            f"stopped: {' and '.join(names)} would take about {needed:.0f} s, {used:.0f} s of "
            f"{self.args.limit_seconds:.0f} s are used; call again to go on"
        )
        return False

    def run(self) -> int:
        """Runs what is missing, until --limit-seconds -> the number of runs that failed."""
        failed = 0
        plan = groups_missing(read_campaign(self.path), self.args, self.go)
        count = sum(map(len, plan))
        print(f"{self.path}: {count} runs are missing; this is go {self.go}", flush=True)
        for group in plan:
            records = read_campaign(self.path)
            if not self.args.split and not self.fits([name for _, name in group], records):
                break
            for seed, name in group:
                if self.args.split and not self.fits([name], read_campaign(self.path)):
                    return failed
                record = self.run_one(seed, name)
                failed += record["status"] == "failed"
                if record["status"] == "failed" and name == self.args.arms[0].name:
                    break  # without the reference the other arms of this seed have no partner
        return failed

    def run_one(self, seed: int, name: str) -> dict:
        """One run; -> its record, which is then in the campaign file."""
        arm, recipe = self.arms[name], self.recipes[name]
        record = {
            "version": LINE_VERSION,
            "kind": self.args.kind,
            "arm": name,
            "seed": seed,
            "go": self.go,
            "position": self.position,
            "code": recipe.code,
            "data": self.data,
            "settings": arm.settings,
            "changed": recipe.changed,
        }
        record |= run_once(arm, recipe, seed, Path(self.args.runs).resolve())
        record["commit"] = record.get("commit") or commit_of(arm.tree) or self.args.commit
        record["ended"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        append_record(self.path, record)
        self.position += 1
        current_go()  # the pause begins now
        print(describe(record), flush=True)
        return record


def describe(record: dict) -> str:
    """A record in one line for the terminal."""
    head = (
        f"{record['kind']} {record['arm']}, seed {record['seed']}, {record['wall_seconds']:.0f} s: "
    )
    if record["status"] == "failed":
        return head + f"FAILED, exit code {record['exit_code']}: " + " | ".join(record["log"][-3:])
    scores = [f"{stage} {score['bpb']:.5f}" for stage, score in record["scores"].items()]
    return head + f"{record.get('steps', 0):,} steps, {', '.join(scores)} BPB"


def run_campaign(args) -> int:
    """`run`; -> exit code.

    ValueError before the first run for a plan that cannot be compared or cannot work.
    """
    args.arms = [parse_arm(words) for words in args.arm]
    names = [arm.name for arm in args.arms]
    if len(set(names)) < len(names):
        raise ValueError(f"arms need different names, these are {', '.join(names)}")
    refuse_unequal(args.arms, args.kind, args.allow)
    if args.kind != "noise" and len(set(args.seeds)) < len(args.seeds):
        raise ValueError("a seed stands twice in --seeds; only --kind noise repeats runs")
    folder = Path(args.data).resolve()
    data = data_identity(folder)
    shared = STANDARD | KINDS[args.kind] | {"DATA_PATH": str(folder)}
    shared |= named_settings(args.set, "--set")
    recipes = {arm.name: check_arm(arm, shared) for arm in args.arms}
    path = campaign_path(args.campaign)
    with locked(path):
        records = read_campaign(path)
        for arm in args.arms:
            refuse_another_recipe(records, args.kind, arm, recipes[arm.name], data)
        return 1 if Campaign(args, recipes, data).run() else 0


# ---- table


class Comparison(NamedTuple):
    """An arm against the reference in one stage.

    Differences are arm minus reference, so negative is better.
    """

    n: int  # pairs
    mean: float  # of the arm, in BPB
    difference: float
    error: float  # standard error of the difference; nan for a single pair
    t: float  # of the gain: positive where the arm is better
    p: float  # one-sided: such a gain, or a greater one, if there were none
    verdict: str


def verdict_of(n: int, gain: float, p_none: float, p_enough: float) -> str:
    """accept, reject or undecided.

    Args:
        n: pairs
        gain: mean improvement in BPB, positive where the arm is better
        p_none: one-sided p of such a gain if the true gain were 0
        p_enough: one-sided p of so small a gain if the true gain were MIN_GAIN_BPB
    """
    if n < MIN_PAIRS:
        return "undecided"
    if gain >= MIN_GAIN_BPB and p_none < SIGNIFICANCE:
        return "accept"
    return "reject" if p_enough < SIGNIFICANCE else "undecided"


def t_of(gain: float, error: float) -> float:
    """gain / error; without an error plus infinity for a gain, minus infinity for none."""
    if error == 0:
        return math.inf if gain > 0 else -math.inf
    return gain / error


def compare(pairs: dict[int, tuple[dict, dict]], stage: str) -> Comparison:
    """Paired comparison of one stage.

    ValueError where the two sides of a pair were scored on different text.
    """
    for seed, (run, partner) in pairs.items():
        sizes = run["scores"][stage].get("bytes"), partner["scores"][stage].get("bytes")
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"seed {seed}: {run['arm']} was scored on {sizes[0]:,} bytes of text in {stage}, "
                f"{partner['arm']} on {sizes[1]:,}: these cannot be compared"
            )
    bpb = [[run["scores"][stage]["bpb"] for run in pair] for pair in pairs.values()]
    differences = [arm - reference for arm, reference in bpb]
    n = len(bpb)
    gain = -statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    t = t_of(gain, error)
    p_none = stats.t.sf(t, n - 1)
    p_enough = stats.t.cdf(t_of(gain - MIN_GAIN_BPB, error), n - 1)
    mean = statistics.fmean(arm for arm, _ in bpb)
    return Comparison(n, mean, -gain, error, t, p_none, verdict_of(n, gain, p_none, p_enough))


def ratio(pairs: dict[int, tuple[dict, dict]], key: str) -> float:
    """Mean of a figure over the arm's runs, as a ratio to that of the reference.

    nan where a run lacks it.
    """
    sides = [[pair[side].get(key) for pair in pairs.values()] for side in (0, 1)]
    if any(value is None for side in sides for value in side):
        return math.nan
    return statistics.fmean(sides[0]) / statistics.fmean(sides[1])


def breaks_more_rules(pairs: dict[int, tuple[dict, dict]]) -> bool:
    """Whether a run of the arm has more violations than its partner."""
    counts = [[len(run.get("violations", ())) for run in pair] for pair in pairs.values()]
    return any(arm > reference for arm, reference in counts)


HEAD = (
    "arm",
    "stage",
    "n",
    "mean BPB",
    "difference",
    "standard error",
    "t",
    "p",
    "steps",
    "tokens/s",
    "bytes",
    "epochs",
    "verdict",
)


def common_stages(runs: list[dict]) -> list[str]:
    """Stages in which every one of these runs has a score; none without runs."""
    return [stage for stage in STAGES if runs and all(stage in run["scores"] for run in runs)]


def table_rows(runs: list[dict], arm: str, against: str) -> list[list[str]]:
    """Cells of an arm, one row for each stage that all its pairs have; one without a stage if
    there is none.

    The last stage bears the verdict.
    """
    pairs = pairs_of(runs, arm, against)
    stages = common_stages([run for pair in pairs.values() for run in pair])
    if not stages:
        return [[arm, "-", str(len(pairs)), *["-"] * (len(HEAD) - 4), "undecided"]]
    epochs = [run["epochs"] for run, _ in pairs.values() if "epochs" in run]
    more_bytes = statistics.fmean(
        run.get("total_bytes", 0) - partner.get("total_bytes", 0) for run, partner in pairs.values()
    )
    of_all_stages = [f"{ratio(pairs, key):.3f}" for key in ("steps", "tokens_per_second")]
    of_all_stages += [f"{more_bytes:+,.0f}", f"{statistics.fmean(epochs):.2f}" if epochs else "-"]
    rows = []
    for stage in stages:
        found = compare(pairs, stage)
        cells = [arm, stage, str(found.n), f"{found.mean:.5f}", f"{found.difference:+.5f}"]
        cells += [f"{found.error:.5f}", f"{found.t:.2f}", f"{found.p:.2g}"]
        rows.append([*cells, *of_all_stages, "-"])
    rows[-1][-1] = found.verdict
    if found.verdict == "accept" and breaks_more_rules(pairs):
        rows[-1][-1] = "undecided (breaks rules, see below)"
    return rows


def left_out(records: list[dict], runs: list[dict], against: str) -> list[str]:
    """What the table of one kind does not count, and which rules its runs break."""
    lines = []
    for record in records:
        if record["status"] == "failed":
            why = " | ".join(record["log"][-3:])
            lines.append(
                f"failed: {record['arm']}, seed {record['seed']}, go {record['go']}: {why}"
            )
    counted = set()
    for arm in {run["arm"] for run in runs} - {against}:
        counted |= {id(run) for pair in pairs_of(runs, arm, against).values() for run in pair}
    for run in runs:
        if id(run) not in counted:
            lines.append(
                f"not counted, without a partner in its go: {run['arm']}, seed {run['seed']}, go"
                f" {run['go']}"
            )
    broken = Counter(
        (run["arm"], sentence) for run in runs for sentence in run.get("violations", ())
    )
    lines += [
        f"{arm} breaks a rule in {count} runs: {sentence}"
        for (arm, sentence), count in broken.items()
    ]
    return lines


def print_markdown(head: Sequence[str], rows: list[list[str]]) -> None:
    """A Markdown table, and a blank line."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    print(lines[0], "|---" * len(head) + "|", *lines[1:], "", sep="\n")


def legend(against: str) -> str:
    """What the columns and the verdicts of the table mean."""
    bound = stats.t.isf(SIGNIFICANCE, MIN_PAIRS - 1)
    return (
        f"Differences are arm minus {against}, over pairs of one seed in one go: negative is"
        " better. t and the one-sided p are of the hypothesis that there is no gain. steps,"
        f" tokens/s: arm over {against}; bytes: of code and weights, arm minus {against}; epochs:"
        f" of the training data, of the arm.\naccept: n at least {MIN_PAIRS}, p < {SIGNIFICANCE}"
        f" (with n = {MIN_PAIRS} t beyond {bound:.2f}) and a gain of at least {MIN_GAIN_BPB} BPB."
        f" reject: a gain of {MIN_GAIN_BPB} BPB is excluded at p < {SIGNIFICANCE}. undecided:"
        " neither."
    )


def print_table(args) -> None:
    """`table`: for each kind of run, every arm against the reference.

    ValueError, after what there is to see, if no arm has anything that can be compared.
    """
    records = read_records(args.campaign)
    compared = False
    if all(record["kind"] == "noise" for record in records):
        raise ValueError("this campaign has runs of --kind noise only; see `noise`")
    for kind in EXPERIMENTS:
        of_kind = [record for record in records if record["kind"] == kind]
        if not of_kind:
            continue
        names = list(dict.fromkeys(record["arm"] for record in of_kind))
        against = args.against or reference_of(of_kind)
        if against not in names:
            raise ValueError(f"--against {against}: {kind} has the arms {', '.join(names)}")
        runs = succeeded(of_kind, kind)
        rows = [row for arm in names if arm != against for row in table_rows(runs, arm, against)]
        compared |= any(row[1] != "-" for row in rows)
        devices = sorted({run["device"] for run in runs if "device" in run})
        print(f"{kind} against {against}, on {', '.join(devices)}\n")
        print_markdown(HEAD, rows)
        for name in names:
            print(f"{name}: {settings_text(of_kind, name)}")
        for line in left_out(of_kind, runs, against):
            print(line)
        print(f"\n{legend(against)}\n")
    if not compared:
        raise ValueError(
            f"{campaign_path(args.campaign)}: nothing to compare: an arm and the reference need"
            " finished runs of one seed in one go, with a stage in common; `run` makes what is"
            " missing, `noise` shows single arms"
        )


def reference_of(records: list[dict]) -> str:
    """The arm called base, or else the first one of the campaign."""
    names = [record["arm"] for record in records]
    return "base" if "base" in names else names[0]


def settings_text(records: list[dict], name: str) -> str:
    """Settings, commit and code of an arm in words."""
    record = next(record for record in records if record["arm"] == name)
    settings = " ".join(f"{key}={value}" for key, value in record["settings"].items())
    return (
        f"{settings or 'no settings of its own'}; commit {record['commit']}, code {record['code']}"
    )


# ---- effects


class Effects(NamedTuple):
    """What each factor of a designed experiment does in one stage, in BPB; negative is better."""

    differences: dict[str, float]  # factor -> difference that it makes, other factors equal
    spreads: dict[str, float]  # standard error of each for runs that deviate by 1
    deviation: float  # of a run from what the design explains; nan without degrees of freedom
    freedom: int  # degrees of freedom of that deviation
    offsets: list[float]  # of each block from the mean of all; a single 0 without blocks


NEEDS = (
    "`effects` needs a designed experiment: arms that turn on several factors each, as"
    " soap+wide+short does, every factor off in some runs, no two always on together, and at least"
    " one run more than factors (docs/PROXY.md, many ideas at once)"
)
FEW_FREEDOM = 6  # below it the deviation of the residuals is off by a third and more


def factors_of(arm: str) -> list[str]:
    """The factors that an arm turns on: "soap+short" -> soap and short; base has none."""
    return [] if arm == "base" else arm.split("+")


def factors_in(runs: list[dict]) -> list[str]:
    """All factors that arms of these runs turn on."""
    return list(dict.fromkeys(factor for run in runs for factor in factors_of(run["arm"])))


def design_matrix(runs: list[dict], blocks: str) -> np.ndarray:
    """(runs, blocks + factors) of 0 and 1: which seed a run has, and what its arm turns on.

    blocks: "seed" for one column a seed, "none" for a single column of ones.
    """
    factors = factors_in(runs)
    seeds = sorted({run["seed"] for run in runs})
    rows = []
    for run in runs:
        block = [run["seed"] == seed for seed in seeds] if blocks == "seed" else [True]
        rows.append(block + [factor in factors_of(run["arm"]) for factor in factors])
    return np.array(rows, dtype=float)


def is_separable(design: np.ndarray) -> bool:
    return np.linalg.matrix_rank(design) == design.shape[1]


def inseparable_factors(runs: list[dict]) -> list[str]:
    """What is wrong with single factors, in words; nothing where only sums of them coincide."""
    patterns = {}
    for factor in factors_in(runs):
        pattern = tuple(factor in factors_of(run["arm"]) for run in runs)
        patterns.setdefault(pattern, []).append(factor)
    problems = []
    for pattern, factors in patterns.items():
        if all(pattern):
            problems.append(f"{' and '.join(factors)}: on in every run")
        elif len(factors) > 1:
            problems.append(f"{' and '.join(factors)}: always on together")
    return problems


def design_problem(runs: list[dict], blocks: str, noise: float | None) -> str:
    """Why these runs tell no effects of factors, and what to do; "" if they do."""
    if not common_stages(runs):
        return "there is no stage in which all runs have a score; `table` compares single arms"
    if all(len(factors_of(run["arm"])) < 2 for run in runs):
        return f"no arm turns on two factors; see `table` for arms that are compared. {NEEDS}"
    design = design_matrix(runs, blocks)
    names = ", ".join(factors_in(runs))
    if not is_separable(design):
        if problems := inseparable_factors(runs):
            return f"{'; '.join(problems)}. {NEEDS}"
        if is_separable(design_matrix(runs, "none")):
            num_seeds = len({run["seed"] for run in runs})
            return (
                f"{len(runs)} runs cannot separate {num_seeds} seeds and the factors {names}:"
                " --blocks none counts what seeds do as noise (docs/PROXY.md says when that is"
                " safe)"
            )
        return f"{len(runs)} runs cannot separate the factors {names}: run more arms. {NEEDS}"
    if len(runs) == design.shape[1] and noise is None:
        return (
            f"{len(runs)} runs for {design.shape[1]} unknowns leave no degrees of freedom for an"
            " error: give the known standard deviation of one run in BPB, as --noise 0.0016"
            " (`noise` measures it: docs/LOG.md, the noise of the proxy)"
        )
    return ""


def estimate_effects(runs: list[dict], values: list[float], blocks: str = "seed") -> Effects:
    """Least squares of one value a run on blocks and on the factors that its arm turns on.

    The design must be separable.
    """
    factors = factors_in(runs)
    design = design_matrix(runs, blocks)
    solution = np.linalg.lstsq(design, np.array(values), rcond=None)[0]
    residuals = np.array(values) - design @ solution
    freedom = len(runs) - design.shape[1]
    deviation = math.sqrt(residuals @ residuals / freedom) if freedom else math.nan
    spreads = np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    found = slice(-len(factors), None)
    levels = solution[: -len(factors)]
    return Effects(
        dict(zip(factors, solution[found].tolist(), strict=True)),
        dict(zip(factors, spreads[found].tolist(), strict=True)),
        deviation,
        freedom,
        (levels - levels.mean()).tolist(),
    )


def effects_head(freedom: int, noise: float | None) -> list[str]:
    """Titles of the columns: errors from the residuals, from a known deviation, or both."""
    head = ["factor", "stage", "runs with", "difference"]
    if freedom:
        head += ["standard error", "t", "p"]
    if noise is not None:
        head += ["known error", "z", "p of z"]
    return [*head, "steps"]


def gain_cells(difference: float, error: float, distribution) -> list[str]:
    """Cells of a standard error, of the gain over it, and of the one-sided p."""
    t = t_of(-difference, error)
    return [f"{error:.5f}", f"{t:.2f}", f"{distribution.sf(t):.2g}"]


def effect_rows(
    runs: list[dict], stage: str, blocks: str, noise: float | None
) -> tuple[list[list[str]], Effects]:
    """Cells of each factor in one stage, and the estimate that they show."""
    bpb = [run["scores"][stage]["bpb"] for run in runs]
    found = estimate_effects(runs, bpb, blocks)
    log_steps = [math.log(run.get("steps") or math.nan) for run in runs]
    steps = estimate_effects(runs, log_steps, blocks).differences
    rows = []
    for factor, difference in found.differences.items():
        count = sum(factor in factors_of(run["arm"]) for run in runs)
        cells = [factor, stage, f"{count} of {len(runs)}", f"{difference:+.5f}"]
        spread = found.spreads[factor]
        if found.freedom:
            cells += gain_cells(difference, found.deviation * spread, stats.t(found.freedom))
        if noise is not None:
            cells += gain_cells(difference, noise * spread, stats.norm)
        rows.append([*cells, f"{math.exp(steps[factor]):.3f}"])
    return rows, found


def interval(deviation: float, freedom: int) -> str:
    """The 90% confidence interval of a standard deviation of normal values."""
    if not freedom:
        return "-"
    bounds = [deviation * math.sqrt(freedom / stats.chi2.ppf(q, freedom)) for q in (0.95, 0.05)]
    return f"{bounds[0]:.5f} to {bounds[1]:.5f}"


def deviation_text(found: Effects, stage: str, blocks: str, noise: float | None) -> str:
    """Where the errors of one stage come from."""
    known = f"known error: a run deviates by {noise} BPB (--noise)"
    if not found.freedom:
        return f"{stage}: as many unknowns as runs, 0 degrees of freedom; {known}"
    explained = "factors explain"
    if blocks == "seed":
        explained = "factors and its seed explain"
    text = (
        f"{stage}: a run deviates by {found.deviation:.5f} BPB from what its {explained},"
        f" {found.freedom} degrees of freedom, 90% interval"
        f" {interval(found.deviation, found.freedom)}"
    )
    if noise is not None:
        return f"{text}; {known}"
    if found.freedom < FEW_FREEDOM:
        return f"{text}; these are few: --noise takes a known deviation of a run"
    return text


def print_kind_effects(runs: list[dict], kind: str, blocks: str, noise: float | None) -> None:
    """The table of one kind of run, whose design is separable."""
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    rows, lines = [], []
    for stage in common_stages(runs):
        cells, found = effect_rows(runs, stage, blocks, noise)
        rows += cells
        lines.append(deviation_text(found, stage, blocks, noise))
        if blocks == "seed":
            offsets = ", ".join(f"{offset:+.5f}" for offset in found.offsets)
            lines.append(
                f"{stage}: seeds {seeds} (with the machine that each ran on) are off the mean by"
                f" {offsets}"
            )
    print(f"{kind}, {len(runs)} runs\n")
    print_markdown(effects_head(found.freedom, noise), rows)
    print("\n".join(lines))
    if blocks == "none":
        print("Seeds are left out (--blocks none): what they do counts as noise.")


def print_effects(args) -> None:
    """`effects`: for each kind of run, what each factor does in every stage."""
    path = campaign_path(args.campaign)
    records = read_records(args.campaign)
    refused, shown = [], 0
    for kind in EXPERIMENTS:
        runs = succeeded(records, kind)
        if not runs:
            continue
        if problem := design_problem(runs, args.blocks, args.noise):
            refused.append(f"{path}, {kind}: {problem}")
            continue
        print_kind_effects(runs, kind, args.blocks, args.noise)
        failed = [r for r in records if (r["kind"], r["status"]) == (kind, "failed")]
        print("\n".join(f"failed: {r['arm']}, seed {r['seed']}" for r in failed))
        shown += 1
    if not shown:
        nothing = f"{path}: no finished runs of an experiment (see `noise` for repeats). {NEEDS}"
        raise ValueError("\n".join(refused) or nothing)
    print(
        "The difference is what turning the factor on does to BPB, all others equal: negative is"
        " better. It is a sum of its own effect and of interactions that the arms do not separate."
        " t (z with a known deviation) and the one-sided p are of the hypothesis that there is no"
        " gain; steps: with over without."
    )
    for problem in refused:
        print(f"left out: {problem}")


# ---- noise


def pooled_deviation(groups: list[list[float]]) -> tuple[float, int]:
    """Standard deviation inside groups, and its degrees of freedom.

    nan and 0 where no group has two values.
    """
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return math.nan, 0
    squares = sum(
        (len(group) - 1) * statistics.variance(group) for group in groups if len(group) > 1
    )
    return math.sqrt(squares / freedom), freedom


def noise_rows(runs: list[dict], kind: str, arm: str) -> list[list[str]]:
    """Cells of an arm: for each stage its deviations over repeats of a seed and over seeds."""
    rows = []
    for stage in STAGES:
        by_seed: dict[int, list[float]] = {}
        scored = [run for run in runs if stage in run["scores"]]
        for run in scored:
            by_seed.setdefault(run["seed"], []).append(run["scores"][stage]["bpb"])
        if not scored:
            continue
        repeats = pooled_deviation(list(by_seed.values()))
        seeds = pooled_deviation([[values[0] for values in by_seed.values()]])
        mean = statistics.fmean(run["scores"][stage]["bpb"] for run in scored)
        for what, (deviation, freedom) in (("repeats of a seed", repeats), ("seeds", seeds)):
            error = deviation * math.sqrt(2 / MIN_PAIRS)
            least = error * stats.t.isf(SIGNIFICANCE, MIN_PAIRS - 1)
            cells = [kind, arm, stage, f"{mean:.5f}", what, str(freedom), f"{deviation:.5f}"]
            cells += [interval(deviation, freedom), f"{error:.5f}"]
            rows.append([*cells, f"{max(least, MIN_GAIN_BPB):.5f}"])
    return rows


NOISE_HEAD = (
    "kind",
    "arm",
    "stage",
    "mean BPB",
    "over",
    "degrees of freedom",
    "deviation",
    "90% interval",
    f"error of {MIN_PAIRS} pairs",
    "least gain accepted",
)


def print_noise(args) -> None:
    """`noise`: how far runs of one arm are apart."""
    records = read_records(args.campaign)
    rows, lines = [], []
    for kind in KINDS:
        runs = succeeded(records, kind)
        for arm in dict.fromkeys(run["arm"] for run in runs):
            mine = [run for run in runs if run["arm"] == arm]
            rows += noise_rows(mine, kind, arm)
            goes = Counter(run["go"] for run in mine)
            steps = [run["steps"] for run in mine if "steps" in run]
            extent = f", steps {min(steps):,} to {max(steps):,}" if steps else ""
            lines.append(f"{kind} {arm}: {len(mine)} runs in {len(goes)} goes{extent}")
    if not rows:
        raise ValueError(
            f"{campaign_path(args.campaign)}: no finished run with a score; `run --kind noise` with"
            " seeds such as 1 1 1 2 3 makes some"
        )
    print_markdown(NOISE_HEAD, rows)
    print("\n".join(lines))
    print(
        f"\nerror of {MIN_PAIRS} pairs: standard error of a mean difference if both arms scatter"
        " like this and independently. least gain accepted: what such a campaign must measure at"
        " least to be accepted. Seeds scatter by their own part and by that of repeats; pairing"
        " takes out what a seed does to both arms alike."
    )


# ---- data


def prepare_data(args) -> None:
    """`data`: shards of all training documents and the first --val-docs validation documents."""
    out = Path(args.folder)
    if (out / "manifest.json").exists():
        print(f"{out} is there already")
        return
    lines = itertools.islice(read_lines(args.val), args.val_docs)
    with tempfile.TemporaryDirectory() as scratch:
        validation = Path(scratch, "val.jsonl")
        validation.write_bytes(b"\n".join(line.content.rstrip() for line in lines))
        command = [sys.executable, str(ROOT / "prepare_caseops_data.py"), "--docs", *args.train]
        command += ["--val-file", str(validation), "--out", str(out)]
        done = subprocess.run(command + (["--tokenizer", args.tokenizer] if args.tokenizer else []))
    if done.returncode:
        sys.exit(done.returncode)
    if args.tokenizer:
        shutil.copy(args.tokenizer, out)  # a run looks for it beside the data


# ---- command line


def positive(text: str) -> float:
    """A number above 0. ValueError for another text."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is missing of a plan")
    run.add_argument("campaign", metavar="CAMPAIGN", help="a name, or a path that ends in .jsonl")
    run.add_argument("--kind", choices=list(KINDS), required=True)
    run.add_argument(
        "--arm", nargs=2, action="append", required=True, metavar=("NAME[@DIR]", "SETTINGS")
    )
    run.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        required=True,
        metavar="N",
        help="--kind noise may name one twice",
    )
    run.add_argument("--data", required=True, metavar="DIR", help="shards, as `data` makes them")
    run.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=value", help="settings of every arm"
    )
    run.add_argument(
        "--allow",
        nargs="+",
        default=[],
        metavar="NAME",
        help="settings that an arm may change after all",
    )
    run.add_argument(
        "--limit-seconds",
        type=float,
        default=0,
        metavar="S",
        help="begin no seed whose runs would not end so long after the start; 0: no limit",
    )
    run.add_argument(
        "--split",
        action="store_true",
        help="judge single runs by that limit: the next call on this machine completes the seed",
    )
    run.add_argument(
        "--runs", default=str(ROOT / "runs" / "recipe"), metavar="DIR", help="folder of the runs"
    )
    run.add_argument(
        "--commit", metavar="TEXT", help="commit of the code, where there is no git checkout"
    )
    table = commands.add_parser("table", help="paired differences and verdicts")
    table.add_argument("campaign", metavar="CAMPAIGN")
    table.add_argument(
        "--against", metavar="ARM", help="the reference; default: base, or else the first arm"
    )
    effects = commands.add_parser("effects", help="what each factor of combined arms does")
    effects.add_argument("campaign", metavar="CAMPAIGN")
    effects.add_argument(
        "--noise",
        type=positive,
        metavar="SD",
        help="known standard deviation of one run in BPB; a design without degrees of freedom"
        " needs it",
    )
    effects.add_argument(
        "--blocks",
        choices=["seed", "none"],
        default="seed",
        help="none: fit a single mean instead of one a seed; default: %(default)s",
    )
    noise = commands.add_parser("noise", help="deviations over repeats of a seed and over seeds")
    noise.add_argument("campaign", metavar="CAMPAIGN")
    data = commands.add_parser("data", help="make the standard data")
    data.add_argument("folder", metavar="DIR")
    data.add_argument(
        "--train",
        nargs="+",
        required=True,
        metavar="FILE",
        help="documents, in any format that prepare_caseops_data.py reads",
    )
    data.add_argument("--val", required=True, metavar="FILE", help="validation documents, likewise")
    data.add_argument(
        "--val-docs",
        type=whole_number(1),
        default=500,
        metavar="N",
        help="the first N; default: %(default)s",
    )
    data.add_argument("--tokenizer", metavar="MODEL", help="default: the one in tokenizers/")
    return parser.parse_args(arguments)


def stop(number, frame):
    """A signal ends this call as Ctrl-C does, so that the run in flight ends with it."""
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        if args.command == "run":
            signal.signal(signal.SIGTERM, stop)
            sys.exit(run_campaign(args))
        commands = {
            "table": print_table,
            "effects": print_effects,
            "noise": print_noise,
            "data": prepare_data,
        }
        commands[args.command](args)
    except (OSError, ValueError) as error:
        sys.exit(f"bench_recipe.py: {error}")
    except KeyboardInterrupt:
        sys.exit("bench_recipe.py: stopped; call again to go on")


if __name__ == "__main__":
    main()
