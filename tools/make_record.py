"""Makes records/<track>/<date>_<name>/ from finished seeds, and proves that it works alone.

usage: python tools/make_record.py RUNS... --name NAME [--author A --github-id G] [--blurb TEXT]
           [--published BPB [--published-std S --published-n N] | --against OTHER...] [--non-record]

The contest's rules are checked from the files, not from what the runs say: bytes on disk, seconds
against 600 whatever budget was set, seeds, counts, hardware. A broken rule is refused; with
--non-record the folder goes under the track track_non_record_16mb and names every broken rule.
Whatever the folder could not be trusted with is refused either way: runs of different settings or
code, a packed script whose readable source is not found.

The proof: in fresh processes, from inside the folder, its data tools make a tiny dataset of the
record's own text, and its packed script trains, packs and scores a tiny model with the record's
other settings.
"""

import argparse
import datetime
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools import command_line  # noqa: E402

if __name__ == "__main__":
    command_line.begin("make_record.py")

import numpy as np  # noqa: E402

from prepare_caseops_data import load_tokenizer, read_shard  # noqa: E402
from tools import plot_run, summarize  # noqa: E402
from tools.pack_code import pack_code  # noqa: E402
from tools.run_files import OF_A_RUN, own_settings, read_runs, settings_of  # noqa: E402

TRACK = "track_10min_16mb"
OTHER_TRACK = "track_non_record_16mb"
# the contest's rules
BYTE_CAP = 16_000_000
BUDGET_SECONDS = 600.0
SEEDS = 3
GPUS = 8
DOCUMENTS = 50_000
# violations of RESULT that are checked here, with the contest's limits
CHECKED_HERE = "bytes of code and weights|took .* s of|scored part of"
COPIED = """prepare_caseops_data.py lossless_caps.py requirements.txt requirements-gpu.txt LICENSE
    THIRD_PARTY_NOTICES.md""".split()
# sizes of the proof; other settings of the record stay as they are
TINY = settings_of(
    """
    DEVICE=cpu COMPILE=0 ATTENTION_BACKEND=auto
    MODEL_DIM=32 NUM_LAYERS=3 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2 ROPE_DIMS=4
    LOOP_START=1 LOOP_END=1 NUM_LOOPS=1 PARALLEL_START_LAYER=2
    TRAIN_BATCH_TOKENS=512 MICRO_BATCH_TOKENS=256 TRAIN_SEQ_LEN=64
    MAX_WALLCLOCK_SECONDS=0 ITERATIONS=3 WARMUP_STEPS=1 VAL_LOSS_EVERY=0
    GPTQ_CALIBRATION_BATCHES=2 EVAL_SEQ_LEN=64
    TTT_MAX_DOCS=0 TTT_EVAL_SEQ_LEN=64 TTT_STALE_CONTEXT=32 TTT_CHUNK_SIZE=32 TTT_BATCH_SIZE=4
    TTT_LANES=2 TTT_LORA_RANK=4 PHASED_TTT_PREFIX_DOCS=25000 GLOBAL_TTT_CHUNK_TOKENS=256
    """.split()
)


class RecordError(Exception):
    """Why there can be no record; the message says what to change."""


# ---- the rules


def final_score(result):
    """Name and score of a run's last evaluation, the one that counts."""
    return list(result["scores"].items())[-1]


def disagreements(runs):
    """Why these runs are not seeds of one method; no record of any kind is made of such runs."""
    first = runs[0]
    for run in runs:
        for problem in (*incomplete_parts(run), *differences(run, first)):
            yield f"{run.folder}: {problem}"
    scripts = [run.folder / "train_gpt.py" for run in runs]
    if len({path.read_bytes() for path in scripts if path.exists()}) > 1:
        commits = ", ".join(sorted({str(run.result.get("commit")) for run in runs}))
        yield (
            "the runs' packed scripts differ: they were not made from one source (commits:"
            f" {commits})"
        )
    if len({run.seed for run in runs}) < len(runs):
        yield "a seed stands twice"


def incomplete_parts(run):
    """What a run lacks to be part of a record."""
    scores = run.result["scores"]
    if run.parts != 1:
        yield f"{run.parts} runs stand in one log; a record needs runs that did all in one go"
    if "steps" not in run.result or not scores:
        yield "it did not train, or has no score"
    if not all(math.isfinite(score["loss"]) for score in scores.values()):
        yield "a score is not finite"
    for name in ("artifact.bin", "train_gpt.py"):
        if not (run.folder / name).exists():
            yield f"{name} is missing"


def differences(run, first):
    """Settings and evaluations in which a run differs from the first one."""
    mine = own_settings(run)
    other = own_settings(first)
    for name in sorted(set(mine) | set(other)):
        if mine.get(name) != other.get(name):
            here = run.settings.get(name)
            there = first.settings.get(name)
            yield f"{name} is {here}, {first.folder.name} has {there}"
    if list(run.result["scores"]) != list(first.result["scores"]):
        yield f"other evaluations than {first.folder.name}"


def by_seed(runs, find):
    """{sentence: seeds of the runs for which find(run) gives it} as sentences."""
    seeds_of = {}
    for run in runs:
        for sentence in find(run):
            seeds_of.setdefault(sentence, []).append(str(run.seed))
    return [f"seed {', '.join(seeds)}: {sentence}" for sentence, seeds in seeds_of.items()]


def broken_rules(runs):
    """The contest's rules that these runs break, as sentences."""
    if len(runs) < SEEDS:
        yield f"{len(runs)} seed(s); a record needs {SEEDS}"
    counts = set()
    for run in runs:
        counts |= {(score["tokens"], score["bytes"]) for score in run.result["scores"].values()}
    if len(counts) > 1:
        yield f"tokens and bytes scored differ between runs or evaluations: {sorted(counts)}"
    yield from by_seed(runs, broken_by)


def broken_by(run):
    """The rules that one run breaks."""
    result = run.result
    total = sum((run.folder / file).stat().st_size for file in ("artifact.bin", "train_gpt.py"))
    if total != result["total_bytes"]:
        yield f"the files have {total:,} bytes, RESULT says {result['total_bytes']:,}"
    if total > BYTE_CAP:
        yield f"{total:,} bytes, the cap is {BYTE_CAP:,}"
    yield from exceeded_budgets(result)
    if result["world_size"] != GPUS or "H100" not in result["device"]:
        yield f"ran on {result['world_size']} x {result['device']}, not on {GPUS} x H100"
    if final_score(result)[1].get("partial"):
        yield "only part of the validation documents were scored"
    documents = validation_documents(run)
    if documents != DOCUMENTS:
        yield f"{documents:,} validation documents, the contest's FineWeb split has {DOCUMENTS:,}"
    if result["commit"] is None or result["commit"].endswith("+"):
        yield f"commit {result['commit']}: the source was not a clean checkout"
    code = run.folder / "exit_code"
    if code.exists() and code.read_text().strip() != "0":
        yield f"exit code {code.read_text().strip()}"


def exceeded_budgets(result):
    """The budgets of seconds that a run exceeded; one with NaN seconds exceeded it."""
    seconds = result["seconds"]
    name, _ = final_score(result)
    trained = result["training_seconds"]
    trained += sum(seconds.get(stage, 0) for stage in ("hessians", "quant_check", "quantize"))
    if not trained <= BUDGET_SECONDS:
        yield f"training, Hessians and GPTQ took {trained:.1f} s of {BUDGET_SECONDS:.0f}"
    scored = seconds.get("unpack", 0) + seconds[f"eval_{name}"]
    if not scored <= BUDGET_SECONDS:
        yield f"unpacking and the final evaluation took {scored:.1f} s of {BUDGET_SECONDS:.0f}"


def remarks(runs):
    """What the runs found themselves and no rule of the contest forbids, as sentences.

    These are their violations without what broken_by checks itself: much is lost by quantization,
    training documents are in the validation text, graphs were compiled under the clock.
    """

    def found(run):
        return [text for text in run.result["violations"] if not re.search(CHECKED_HERE, text)]

    return by_seed(runs, found)


def quant_gap(run):
    """Loss in nats per token that quantization adds; None if that was not checked."""
    return (run.result.get("quant_check") or {}).get("gap")


def log_word(run, name):
    """`name:value` from the log's line about the model and the data.

    RecordError where there is none.
    """
    lines = (run.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    line = next((line for line in lines if line.startswith("parameters:")), "")
    found = re.search(rf"\b{name}:(.*?)(?= \w+:| validation |$)", line)
    if found is None:
        raise RecordError(
            f"{run.folder}/log.txt does not say {name}: made by another version; run it again"
        )
    return found[1]


def validation_documents(run):
    return int(log_word(run, "documents"))


# ---- what goes into the folder


def readable_source(packed, commit, settings):
    """The source that packs to this script with these settings: this checkout's or the commit's."""
    candidates = [(ROOT / "train_gpt.py").read_bytes()]
    if commit and shutil.which("git"):
        show = ["git", "-C", ROOT, "show", f"{commit.rstrip('+')}:train_gpt.py"]
        candidates.append(subprocess.run(show, capture_output=True).stdout)
    for source in candidates:
        if source and pack_code(source.decode(), settings) == packed:
            return source
    raise RecordError(
        "the readable source of the packed script is neither this checkout's train_gpt.py nor that"
        f" of commit {commit}: check out the source that the runs were made from"
    )


def copy_files(runs, folder):
    """Everything but README and submission.json -> paths of the pictures."""
    first = runs[0]
    packed = (first.folder / "train_gpt.py").read_bytes()
    (folder / "source").mkdir()
    source = readable_source(packed, first.result["commit"], first.settings)
    (folder / "source" / "train_gpt.py").write_bytes(source)
    (folder / "train_gpt.py").write_bytes(packed)
    for run in runs:
        shutil.copyfile(run.folder / "log.txt", folder / f"train_seed{run.seed}.log")
    for name in COPIED:
        shutil.copyfile(ROOT / name, folder / name)
    tokenizer = Path(log_word(first, "tokenizer"))
    if not tokenizer.exists():
        raise RecordError(f"the runs' tokenizer {tokenizer} is not there any more")
    (folder / "tokenizers").mkdir()
    shutil.copyfile(tokenizer, folder / "tokenizers" / tokenizer.name)
    if manifest_of(first).exists():
        shutil.copyfile(manifest_of(first), folder / "data_manifest.json")
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in own_settings(first).items()]
    (folder / "settings.env").write_text("".join(lines))
    return plot_run.draw(runs, folder)


def manifest_of(run):
    """Path of the manifest of the data that a run was made with."""
    return Path(run.settings["DATA_PATH"]) / "manifest.json"


def spread(values):
    """Sample standard deviation, 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def submission(runs, options, reasons):
    """The contents of submission.json."""
    first = runs[0].result
    name, _ = final_score(first)
    losses = [run.result["scores"][name]["loss"] for run in runs]
    bpb = [run.result["scores"][name]["bpb"] for run in runs]
    contents = {
        "author": options.author,
        "github_id": options.github_id,
        "name": options.name,
        "blurb": options.blurb,
        "date": options.date,
        "track": OTHER_TRACK if reasons else TRACK,
        "record": not reasons,
        "val_loss": round(statistics.fmean(losses), 8),
        "val_bpb": round(statistics.fmean(bpb), 8),
        "val_loss_std": round(spread(losses), 8),
        "val_bpb_std": round(spread(bpb), 8),
        "scored_by": name,
        "seeds": [run.seed for run in runs],
    }
    contents["seed_results"] = {str(run.seed): seed_result(run, name) for run in runs}
    contents["bytes_total"] = max(run.result["total_bytes"] for run in runs)
    contents["bytes_code"] = first["code_bytes"]
    contents["wallclock_seconds"] = max(run.result["training_seconds"] for run in runs)
    contents["hardware"] = f"{first['world_size']} x {first['device']}"
    contents["torch"] = first["torch"]
    contents["commit"] = first["commit"]
    contents["broken_rules"] = reasons
    contents["remarks"] = remarks(runs)
    return contents


def seed_result(run, name):
    """The entry of one seed in submission.json, scored by the evaluation of this name."""
    result = run.result
    score = result["scores"][name]
    return {
        "val_loss": score["loss"],
        "val_bpb": score["bpb"],
        "steps": result["steps"],
        "training_seconds": result["training_seconds"],
        "eval_seconds": result["seconds"][f"eval_{name}"],
        "quant_gap": quant_gap(run),
        "artifact_bytes": result["artifact_bytes"],
        "bytes_total": result["total_bytes"],
    }


# ---- the record's README


def data_sentences(s):
    if s.get("CASEOPS_ENABLED", "1") == "1":
        yield "CaseOps shards; validation bytes from the side-car"
    else:
        yield "plain SentencePiece shards; bytes from the tokenizer's pieces"


def model_sentences(s):
    heads = "{NUM_HEADS} query and {NUM_KV_HEADS} key/value heads"
    yield "{NUM_LAYERS} layers, width {MODEL_DIM}, " + heads
    yield "MLP {MLP_MULT} times as wide, leaky ReLU squared, slope {LEAKY_RELU_SLOPE}"
    yield "vocabulary of {VOCAB_SIZE}, logits capped at {LOGIT_SOFTCAP}"
    if s["NUM_LOOPS"] != "0":
        yield "layers {LOOP_START}-{LOOP_END} {NUM_LOOPS} more times from {ENABLE_LOOPING_AT} on"
    if int(s["PARALLEL_START_LAYER"]) < int(s["NUM_LAYERS"]):
        yield "two residual lanes from layer {PARALLEL_START_LAYER} on"
    if "XSA_LAST_N" not in s:
        yield "XSA"
    elif s["XSA_LAST_N"] != "0":  # a setting of presets/published.py alone
        yield "XSA on the last {XSA_LAST_N} layers"
    gates = {
        "SPARSE_ATTN_GATE_ENABLED": "sparse attention gate",
        "GATED_ATTN_ENABLED": "dense attention gate",
        "ATTN_OUT_GATE_ENABLED": "attention output gate",
        "SMEAR_GATE_ENABLED": "SmearGate",
    }
    # settings of presets/published.py alone
    s = {"SPARSE_ATTN_GATE_ENABLED": "1", "SMEAR_GATE_ENABLED": "1"} | s
    enabled = [words for name, words in gates.items() if s.get(name) == "1"]
    if enabled:
        yield ", ".join(enabled)


def training_sentences(s):
    yield "Muon on matrices: learning rate {MATRIX_LR}, momentum {MUON_MOMENTUM}, decay {MUON_WD}"
    yield "AdamW on the rest: embedding {TIED_EMBED_LR}, scalars and gates {SCALAR_LR}"
    rows = "{TRAIN_BATCH_TOKENS} tokens a step, documents cut at {TRAIN_SEQ_LEN} tokens"
    if float(s.get("FULL_SEQ_LEN_AT", 0)):
        rows += ", at half as many before {FULL_SEQ_LEN_AT} of training"
    yield rows
    yield "learning rate falls over the last {WARMDOWN_FRAC} of the time to {MIN_LR} of itself"
    if float(s.get("EMA_DECAY", 0)):  # presets/published.py
        yield "weights averaged with decay {EMA_DECAY}"
    else:
        yield "weights averaged over the last {EMA_SPAN} of training"


def quantization_sentences(s):
    yield "GPTQ: {MATRIX_BITS} bits, embedding {EMBED_BITS}"
    yield "calibrated on {GPTQ_CALIBRATION_BATCHES} rows of training tokens, in the budget"
    if s.get("LQER_ENABLED") == "1":  # presets/published.py
        yield "rank {LQER_RANK} for the {LQER_TOP_K} largest errors (LQER)"
    yield "file coded with `{COMPRESSOR}`; the script minified and compressed"


def evaluation_sentences(s):
    yield "context {EVAL_SEQ_LEN}; every validation token but the first is scored once"
    if s["TTT_ENABLED"] == "1":
        yield "a LoRA of rank {TTT_LORA_RANK} for each document, on {TTT_LORA_SITES}"
        yield "chunks of {TTT_CHUNK_SIZE} tokens, each scored before anything learns from it"
        yield "base weights tuned {PHASED_TTT_NUM_PHASES} time(s) on documents already scored"


METHOD = {
    "Data": data_sentences,
    "Model": model_sentences,
    "Training": training_sentences,
    "Quantization": quantization_sentences,
    "Evaluation": evaluation_sentences,
}


def method(settings):
    """Settings {NAME: value} -> the method in sections, as lines of Markdown.

    Parts that are switched off are left out.
    """
    lines = []
    for title, sentences in METHOD.items():
        lines += [f"### {title}", ""]
        lines += [f"- {words.format(**settings)}" for words in sentences(settings)]
        lines.append("")
    return lines


class Column(NamedTuple):
    """One column of the results table: its heading, the format of its cells, a value a run."""

    heading: str
    form: str
    values: list


def results_columns(runs):
    """The columns of the results table, after the seed."""
    results = [run.result for run in runs]
    columns = []

    def add(heading, form, find):
        columns.append(Column(heading, form, [find(result) for result in results]))

    for stage in results[0]["scores"]:
        add(f"{stage} BPB", "{:.5f}", lambda result, stage=stage: result["scores"][stage]["bpb"])
    last, _ = final_score(results[0])
    add(f"{last} loss", "{:.5f}", lambda result: result["scores"][last]["loss"])
    add("steps", "{:,.0f}", lambda result: result["steps"])
    add("training s", "{:.1f}", lambda result: result["training_seconds"])
    add("eval s", "{:.1f}", lambda result: result["seconds"][f"eval_{last}"])
    add("bytes", "{:,.0f}", lambda result: result["total_bytes"])
    gaps = [quant_gap(run) for run in runs]
    if None not in gaps:
        columns.append(Column("quantization gap, nats", "{:.5f}", gaps))
    return columns


def results_table(runs):
    """Markdown table: a row for each seed, then mean and standard deviation."""
    columns = results_columns(runs)

    def row(name, pick):
        cells = [column.form.format(pick(column.values)) for column in columns]
        return table_row([name, *cells])

    lines = [table_row(["seed", *(column.heading for column in columns)])]
    lines.append("|---" * (1 + len(columns)) + "|")
    for number, run in enumerate(runs):
        lines.append(row(str(run.seed), itemgetter(number)))
    lines.append(row("**mean**", statistics.fmean))
    lines.append(row("std (n - 1)", spread))
    return lines


def table_row(cells):
    return f"| {' | '.join(cells)} |"


def readme(runs, options, about, pictures, comparison):
    """The record's README.md."""
    first = runs[0]
    lines = [f"# {options.name}", "", headline(runs, about), ""]
    if options.blurb:
        lines += [options.blurb, ""]
    if about["broken_rules"]:
        lines += ["**Not a record.** Rules of the contest that these runs break:", ""]
        lines += [*(f"- {reason}" for reason in about["broken_rules"]), ""]
    if about["remarks"]:
        lines += ["What the runs found themselves:", ""]
        lines += [*(f"- {remark}" for remark in about["remarks"]), ""]
    lines += ["## Results", "", *results_table(runs), ""]
    if comparison:
        lines += [*code_block(comparison), ""]
    for path in pictures:
        lines += [f"![{path.stem}]({path.name})", ""]
    lines += ["## Settings that differ from the defaults of the source", ""]
    changed = [f"{name}={value}" for name, value in own_settings(first).items()]
    lines += code_block(changed) if changed else ["None."]
    lines += ["", "## Method", "", *method(first.settings)]
    lines += ["## Reproduction", "", *code_block(reproduction(runs)), ""]
    lines += ["## Files", "", *file_list(runs), ""]
    return "\n".join(lines)


def headline(runs, about):
    """The line below the title of the README: score, bytes and hardware."""
    return (
        f"{about['scored_by']}: **{about['val_bpb']:.5f} BPB** (std {about['val_bpb_std']:.5f},"
        f" {len(runs)} seed(s)), {about['bytes_total']:,} bytes at most, {about['hardware']},"
        f" torch {about['torch']}, commit `{about['commit']}`."
    )


def code_block(lines):
    return ["```", *lines, "```"]


def reproduction(runs):
    """The commands that make the record again."""
    first = runs[0]
    processes = first.result["world_size"]
    torch = first.result["torch"].split("+")[0]
    tokenizer = Path("tokenizers", Path(log_word(first, "tokenizer")).name)
    yield f"pip install torch=={torch} -r requirements.txt   # the build that fits the machine"
    yield (
        f"# documents in the order of the challenge; {validation_documents(first):,} of them were"
        " scored"
    )
    yield (
        "python prepare_caseops_data.py --docs docs_selected.jsonl --out data --tokenizer"
        f" {shlex.quote(str(tokenizer))}"
    )
    if own_settings(first):
        yield "set -a; . ./settings.env; set +a"
    launch = "python" if processes == 1 else f"torchrun --standalone --nproc_per_node={processes}"
    for run in runs:
        yield f"SEED={run.seed} DATA_PATH=data {launch} train_gpt.py"


def file_list(runs):
    """The files of the record's folder, each with what it is."""
    yield "- `settings.env`: the settings that differ from the defaults, for a shell"
    yield "- `train_gpt.py`: the packed script, whose bytes are counted, of `source/train_gpt.py`"
    for run in runs:
        yield f"- `train_seed{run.seed}.log`: the whole log of seed {run.seed}"
    yield "- `prepare_caseops_data.py`, `lossless_caps.py`, `tokenizers/`: from documents to shards"
    if manifest_of(runs[0]).exists():
        yield "- `data_manifest.json`: counts and hashes of the shards that were used"
    yield "- `submission.json`: the figures above for machines"


# ---- the proof


def call(command, folder, **environ):
    """A fresh process in the folder with next to nothing in its environment -> its output.

    Raises RecordError if it fails.
    """
    for key in ("PATH", "HOME", "LD_LIBRARY_PATH", "OMP_NUM_THREADS"):
        if key in os.environ:
            environ.setdefault(key, os.environ[key])
    done = subprocess.run(
        [sys.executable, "-B", *map(str, command)],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RecordError(
            f"the proof failed: {command[0]} ended with {done.returncode}:"
            f" {done.stderr.strip()[-1500:]}"
        )
    return done.stdout


def make_tiny_dataset(folder, scratch):
    """The record's data tools make a dataset from the record's source -> its folder."""
    tokenizer = next((folder / "tokenizers").iterdir()).relative_to(folder)
    text = (folder / "source" / "train_gpt.py").read_text(encoding="utf-8")
    parts = [part.strip() for part in text.split("\n\n")]
    documents = Path(scratch, "docs.jsonl")
    lines = [json.dumps({"text": part}) + "\n" for part in parts if part]
    documents.write_text("".join(lines), encoding="utf-8")
    data = Path(scratch, "data")
    command = ["prepare_caseops_data.py", "--docs", documents, "--out", data]
    command += ["--tokenizer", tokenizer, "--val-docs", "8", "--workers", "1"]
    call(command, folder)
    return data


def tokens_to_score(folder, data, settings):
    """How many tokens of a dataset's validation the record's script must score.

    All that its manifest states but the first; a space and the case marker behind it are one token,
    unless the settings have switched that off.
    """
    stated = json.loads((data / "manifest.json").read_text())["splits"]["val"]["tokens"]
    if "0" in (settings.get("MARKER_FUSION_ENABLED"), settings.get("CASEOPS_ENABLED")):
        return stated - 1
    tokenizer = load_tokenizer(next((folder / "tokenizers").iterdir()))
    tokens = np.concatenate([read_shard(path) for path in sorted(data.glob("fineweb_val_0*.bin"))])
    after_space = tokens[1:][tokens[:-1] == tokenizer.piece_to_id("\u2581")]
    return stated - 1 - int(((after_space >= 4) & (after_space <= 6)).sum())


def prove(folder, settings):
    """Runs the folder's own data tools and packed script on a tiny dataset -> RESULT.

    Raises RecordError unless bytes, counts and losses are as they must be.
    """
    with tempfile.TemporaryDirectory(prefix="record-") as scratch:
        data = make_tiny_dataset(folder, scratch)
        # without those of one run: the packed script has no guard for states and resuming
        environ = {name: value for name, value in settings.items() if name not in OF_A_RUN}
        for name, value in TINY.items():
            if environ.get(name) != "0":  # what a record has switched off by a 0 stays off
                environ[name] = value
        environ |= {"DATA_PATH": str(data), "RUNS_DIR": scratch, "RUN_ID": "proof"}
        output = call(["train_gpt.py"], folder, **environ)
        result = json.loads(output.splitlines()[-1].removeprefix("RESULT "))
        counts = json.loads((data / "manifest.json").read_text())["splits"]["val"]
        num_tokens = tokens_to_score(folder, data, settings)
    wanted = {
        "code_bytes": (folder / "train_gpt.py").stat().st_size,
        "scored": {(num_tokens, counts["charged_bytes"])},
        "finite": True,
    }
    scores = result["scores"].values()
    found = {
        "code_bytes": result["code_bytes"],
        "scored": {(score["tokens"], score["bytes"]) for score in scores},
        "finite": all(math.isfinite(score["loss"]) for score in scores),
    }
    if found != wanted:
        raise RecordError(f"the proof failed: the packed script gave {found}, not {wanted}")
    return result


# ---- the record


def git_name():
    """git's user.name, "" where there is none."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True)
    return done.stdout.strip()


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="runs, or sets of runs")
    add("--name", required=True, help="name of the record, also of its folder")
    add("--author", default=git_name(), help="default: git's user.name")
    add("--github-id", default="", metavar="G")
    add("--blurb", default="", metavar="TEXT", help="a sentence or two: what is new")
    add("--date", default=datetime.date.today().isoformat(), metavar="YYYY-MM-DD")
    add("--records", type=Path, default=ROOT / "records", metavar="FOLDER")
    add("--non-record", action="store_true", help="make it although rules are broken, and say so")
    summarize.add_reference(parser)
    return parser.parse_args(arguments)


def make_record(options):
    """Checks the runs, builds the folder beside its place, proves it, renames it -> the folder."""
    if not options.author.strip():
        raise RecordError("--author is empty, and git knows no user.name: name one")
    runs = read_runs(options.runs)
    if problems := list(disagreements(runs)):
        raise RecordError("\n".join(problems))
    reasons = list(broken_rules(runs))
    comparison = []
    if options.against or options.published is not None:
        comparison, better = summarize.compare([run.result for run in runs], options)
        if not better:
            reasons.append("not shown to be better than the reference by the contest's rule")
    if reasons and not options.non_record:
        raise RecordError(
            "no record, these rules are broken (--non-record makes the folder and says so):\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
        )
    slug = re.sub(r"[^A-Za-z0-9]+", "_", options.name).strip("_")
    folder = options.records / (OTHER_TRACK if reasons else TRACK) / f"{options.date}_{slug}"
    if folder.exists():
        raise RecordError(f"{folder} exists: choose another --name, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    about = submission(runs, options, reasons)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as building:
        built = Path(building, folder.name)
        built.mkdir()
        pictures = copy_files(runs, built)
        (built / "submission.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        text = readme(runs, options, about, pictures, comparison)
        (built / "README.md").write_text(text, encoding="utf-8")
        proof = prove(built, own_settings(runs[0]))
        built.rename(folder)
    print_record(folder, about, proof)
    return folder


def print_record(folder, about, proof):
    kind = "record" if about["record"] else "non-record"
    print(f"{folder}: {kind}, {about['val_bpb']:.5f} BPB over {len(about['seeds'])} seed(s)")
    for reason in about["broken_rules"]:
        print(f"  broken: {reason}")
    for remark in about["remarks"]:
        print(f"  found by the runs: {remark}")
    scores = [f"{name} {score['bpb']:.4f} BPB" for name, score in proof["scores"].items()]
    print(
        f"proved: the packed script ({proof['code_bytes']:,} bytes) ran from inside the folder: "
        + ", ".join(scores)
    )


def main(arguments=None):
    try:
        make_record(parse_arguments(arguments))
    except (RecordError, ValueError, OSError) as error:
        sys.exit(f"make_record.py: {error}")


if __name__ == "__main__":
    command_line.run(main, "make_record.py")
