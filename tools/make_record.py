"""Makes records/<track>/<date>_<name>/ from finished runs of several seeds, then proves that the
folder works alone.

usage: python tools/make_record.py RUNS... --name NAME [--author A --github-id G] [--blurb TEXT]
[--non-record]
           [--published BPB [--published-std S --published-n N] | --against OTHER...]

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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools import command_line  # noqa: E402

if __name__ == "__main__":
    command_line.begin("make_record.py")

from tools import plot_run, summarize  # noqa: E402
from tools.pack_code import pack_code  # noqa: E402
from tools.run_files import own_settings, read_runs  # noqa: E402

TRACK, OTHER_TRACK = "track_10min_16mb", "track_non_record_16mb"
# the contest's rules
BYTE_CAP, BUDGET_SECONDS, SEEDS, GPUS, DOCUMENTS = 16_000_000, 600.0, 3, 8, 50_000
# violations, with the contest's limits
CHECKED_HERE = "bytes of code and weights|took .* s of|scored part of"
DATA_TOOLS = ("prepare_caseops_data.py", "lossless_caps.py")
TINY = {  # sizes of the proof; what the record set besides stays as it is
    "DEVICE": "cpu",
    "COMPILE": "0",
    "COMPUTE_DTYPE": "auto",
    "MUON_DTYPE": "auto",
    "ATTENTION_BACKEND": "auto",
    "MODEL_DIM": "32",
    "NUM_LAYERS": "3",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "MLP_MULT": "2",
    "ROPE_DIMS": "4",
    "LOOP_START": "1",
    "LOOP_END": "1",
    "NUM_LOOPS": "1",
    "PARALLEL_START_LAYER": "2",
    "XSA_LAST_N": "2",
    "TRAIN_BATCH_TOKENS": "512",
    "MICRO_BATCH_TOKENS": "256",
    "TRAIN_SEQ_LEN": "64",
    "MAX_ROW_SEGMENTS": "0",
    "MAX_WALLCLOCK_SECONDS": "0",
    "ITERATIONS": "3",
    "WARMUP_STEPS": "1",
    "VAL_LOSS_EVERY": "0",
    "GPTQ_CALIBRATION_BATCHES": "2",
    "EVAL_SEQ_LEN": "64",
    "EVAL_STRIDE": "24",
    "TTT_MAX_DOCS": "0",
    "TTT_EVAL_SEQ_LEN": "64",
    "TTT_STALE_CONTEXT": "32",
    "TTT_CHUNK_SIZE": "32",
    "TTT_BATCH_SIZE": "4",
    "TTT_LANES": "2",
    "TTT_LORA_RANK": "4",
    "PHASED_TTT_PREFIX_DOCS": "25000",
    "GLOBAL_TTT_CHUNK_TOKENS": "256",
}


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
        if run.parts != 1:
            yield (
                f"{run.folder}: {run.parts} runs stand in one log; a record needs runs that did all"
                " in one go"
            )
        if "steps" not in run.result or not run.result["scores"]:
            yield f"{run.folder}: it did not train, or has no score"
        if not all(math.isfinite(score["loss"]) for score in run.result["scores"].values()):
            yield f"{run.folder}: a score is not finite"
        for name in ("artifact.bin", "train_gpt.py"):
            if not (run.folder / name).exists():
                yield f"{run.folder}: {name} is missing"
        mine, other = own_settings(run), own_settings(first)
        for name in sorted(
            name for name in set(mine) | set(other) if mine.get(name) != other.get(name)
        ):
            here, there = run.settings.get(name), first.settings.get(name)
            yield f"{run.folder}: {name} is {here}, {first.folder.name} has {there}"
        if list(run.result["scores"]) != list(first.result["scores"]):
            yield f"{run.folder}: other evaluations than {first.folder.name}"
    if (
        len(
            {
                (run.folder / "train_gpt.py").read_bytes()
                for run in runs
                if (run.folder / "train_gpt.py").exists()
            }
        )
        > 1
    ):
        commits = ", ".join(sorted({str(run.result.get("commit")) for run in runs}))
        yield (
            "the runs' packed scripts differ: they were not made from one source (commits:"
            f" {commits})"
        )
    if len({run.seed for run in runs}) < len(runs):
        yield "a seed stands twice"


def broken_rules(runs):
    """The contest's rules that these runs break, as sentences."""
    if len(runs) < SEEDS:
        yield f"{len(runs)} seed(s); a record needs {SEEDS}"
    counts = {
        (score["tokens"], score["bytes"]) for run in runs for score in run.result["scores"].values()
    }
    if len(counts) > 1:
        yield f"tokens and bytes scored differ between runs or evaluations: {sorted(counts)}"
    found = {}
    for run in runs:
        for sentence in broken_by(run):
            found.setdefault(sentence, []).append(str(run.seed))
    for sentence, seeds in found.items():
        yield f"seed {', '.join(seeds)}: {sentence}"


def broken_by(run):
    """The rules that one run breaks."""
    result, seconds = run.result, run.result["seconds"]
    name, score = final_score(result)
    total = sum((run.folder / file).stat().st_size for file in ("artifact.bin", "train_gpt.py"))
    if total != result["total_bytes"]:
        yield f"the files have {total:,} bytes, RESULT says {result['total_bytes']:,}"
    if total > BYTE_CAP:
        yield f"{total:,} bytes, the cap is {BYTE_CAP:,}"
    after = sum(seconds.get(stage, 0) for stage in ("hessians", "quant_check", "quantize"))
    trained = result["training_seconds"] + after
    if not trained <= BUDGET_SECONDS:  # NaN keeps no budget
        yield f"training, Hessians and GPTQ took {trained:.1f} s of {BUDGET_SECONDS:.0f}"
    scored = seconds.get("unpack", 0) + seconds[f"eval_{name}"]
    if not scored <= BUDGET_SECONDS:
        yield f"unpacking and the final evaluation took {scored:.1f} s of {BUDGET_SECONDS:.0f}"
    if result["world_size"] != GPUS or "H100" not in result["device"]:
        yield f"ran on {result['world_size']} x {result['device']}, not on {GPUS} x H100"
    if score.get("partial"):
        yield "only part of the validation documents were scored"
    documents = validation_documents(run)
    if documents != DOCUMENTS:
        yield f"{documents:,} validation documents, the contest's FineWeb split has {DOCUMENTS:,}"
    if result["commit"] is None or result["commit"].endswith("+"):
        yield f"commit {result['commit']}: the source was not a clean checkout"
    code = run.folder / "exit_code"
    if code.exists() and code.read_text().strip() != "0":
        yield f"exit code {code.read_text().strip()}"


def remarks(runs):
    """What the runs themselves found that no rule of the contest forbids, as sentences: it is
    written
    down.

    These are their violations, but for those that broken_by looks for itself: much is lost by
    quantization, training documents are in the validation text, graphs were compiled under the
    clock.
    """
    found = {}
    for run in runs:
        for sentence in run.result["violations"]:
            if not re.search(CHECKED_HERE, sentence):
                found.setdefault(sentence, []).append(str(run.seed))
    return [f"seed {', '.join(seeds)}: {sentence}" for sentence, seeds in found.items()]


def quant_gap(run):
    """What quantization adds to the loss of held-out training rows, nats per token; None where
    it was not checked.
    """
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
    """Packed script -> the source that packs to it with the runs' settings: this checkout's, or
    their commit's.
    """
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
    """Everything but README and submission.json."""
    packed = (runs[0].folder / "train_gpt.py").read_bytes()
    (folder / "source").mkdir()
    source = readable_source(packed, runs[0].result["commit"], runs[0].settings)
    (folder / "source" / "train_gpt.py").write_bytes(source)
    (folder / "train_gpt.py").write_bytes(packed)
    for run in runs:
        shutil.copyfile(run.folder / "log.txt", folder / f"train_seed{run.seed}.log")
    for name in (
        *DATA_TOOLS,
        "requirements.txt",
        "requirements-gpu.txt",
        "LICENSE",
        "THIRD_PARTY_NOTICES.md",
    ):
        shutil.copyfile(ROOT / name, folder / name)
    tokenizer = Path(log_word(runs[0], "tokenizer"))
    if not tokenizer.exists():
        raise RecordError(f"the runs' tokenizer {tokenizer} is not there any more")
    (folder / "tokenizers").mkdir()
    shutil.copyfile(tokenizer, folder / "tokenizers" / tokenizer.name)
    manifest = Path(runs[0].settings["DATA_PATH"]) / "manifest.json"
    if manifest.exists():
        shutil.copyfile(manifest, folder / "data_manifest.json")
    settings = own_settings(runs[0]).items()
    (folder / "settings.env").write_text(
        "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings)
    )
    return plot_run.draw(runs, folder)


def spread(values):
    """Sample standard deviation, 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def submission(runs, options, reasons):
    """The contents of submission.json."""
    name = final_score(runs[0].result)[0]
    scores = [run.result["scores"][name] for run in runs]
    losses, bpb = ([score[key] for score in scores] for key in ("loss", "bpb"))
    results = [run.result for run in runs]
    return {
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
        "seed_results": {
            str(run.seed): {
                "val_loss": score["loss"],
                "val_bpb": score["bpb"],
                "steps": run.result["steps"],
                "training_seconds": run.result["training_seconds"],
                "eval_seconds": run.result["seconds"][f"eval_{name}"],
                "quant_gap": quant_gap(run),
                "artifact_bytes": run.result["artifact_bytes"],
                "bytes_total": run.result["total_bytes"],
            }
            for run, score in zip(runs, scores, strict=True)
        },
        "bytes_total": max(result["total_bytes"] for result in results),
        "bytes_code": results[0]["code_bytes"],
        "wallclock_seconds": max(result["training_seconds"] for result in results),
        "hardware": f"{results[0]['world_size']} x {results[0]['device']}",
        "torch": results[0]["torch"],
        "commit": results[0]["commit"],
        "broken_rules": reasons,
        "remarks": remarks(runs),
    }


def method(s):
    """Settings {NAME: value} -> the method in sections, as lines of Markdown; what is switched
    off is left out.
    """
    loops, lanes, ttt = (
        s["NUM_LOOPS"] != "0",
        int(s["PARALLEL_START_LAYER"]) < int(s["NUM_LAYERS"]),
        s["TTT_ENABLED"],
    )
    gates = {
        "SPARSE_ATTN_GATE_ENABLED": "sparse attention gate",
        "GATED_ATTN_ENABLED": "dense attention gate",
        "ATTN_OUT_GATE_ENABLED": "attention output gate",
        "SMEAR_GATE_ENABLED": "SmearGate",
    }
    gates = ", ".join(words for name, words in gates.items() if s[name] == "1")
    sentences = [  # section, whether it applies, what it says
        ("Data", s["CASEOPS_ENABLED"] == "1", "CaseOps shards; validation bytes from the side-car"),
        (
            "Data",
            s["CASEOPS_ENABLED"] == "0",
            "plain SentencePiece shards; bytes from the tokenizer's pieces",
        ),
        (
            "Model",
            True,
            (
                "{NUM_LAYERS} layers, width {MODEL_DIM}, {NUM_HEADS} query and {NUM_KV_HEADS}"
                " key/value heads"
            ),
        ),
        (
            "Model",
            True,
            "MLP {MLP_MULT} times as wide, leaky ReLU squared, slope {LEAKY_RELU_SLOPE}",
        ),
        ("Model", True, "vocabulary of {VOCAB_SIZE}, logits capped at {LOGIT_SOFTCAP}"),
        (
            "Model",
            loops,
            "layers {LOOP_START}-{LOOP_END} {NUM_LOOPS} more times from {ENABLE_LOOPING_AT} on",
        ),
        ("Model", lanes, "two residual lanes from layer {PARALLEL_START_LAYER} on"),
        ("Model", s["XSA_LAST_N"] != "0", "XSA on the last {XSA_LAST_N} layers"),
        ("Model", gates, gates),
        (
            "Training",
            True,
            (
                "Muon on matrices: learning rate {MATRIX_LR}, momentum {MUON_MOMENTUM}, decay"
                " {MUON_WD}"
            ),
        ),
        (
            "Training",
            True,
            "AdamW on the rest: embedding {TIED_EMBED_LR}, scalars and gates {SCALAR_LR}",
        ),
        (
            "Training",
            True,
            "{TRAIN_BATCH_TOKENS} tokens a step, documents cut at {TRAIN_SEQ_LEN} tokens",
        ),
        (
            "Training",
            True,
            "learning rate falls over the last {WARMDOWN_FRAC} of the time to {MIN_LR} of itself",
        ),
        ("Training", True, "weights averaged with decay {EMA_DECAY}"),
        ("Quantization", True, "GPTQ: {MATRIX_BITS} bits, embedding {EMBED_BITS}"),
        (
            "Quantization",
            True,
            "calibrated on {GPTQ_CALIBRATION_BATCHES} rows of training tokens, in the budget",
        ),
        (
            "Quantization",
            s["LQER_ENABLED"] == "1",
            "rank {LQER_RANK} for the {LQER_TOP_K} largest errors (LQER)",
        ),
        (
            "Quantization",
            True,
            "file coded with `{COMPRESSOR}`; the script minified and compressed",
        ),
        (
            "Evaluation",
            True,
            "context {EVAL_SEQ_LEN}; every validation token but the first is scored once",
        ),
        (
            "Evaluation",
            ttt == "1",
            "a LoRA of rank {TTT_LORA_RANK} for each document, on {TTT_LORA_SITES}",
        ),
        (
            "Evaluation",
            ttt == "1",
            "chunks of {TTT_CHUNK_SIZE} tokens, each scored before anything learns from it",
        ),
        (
            "Evaluation",
            ttt == "1",
            "base weights tuned {PHASED_TTT_NUM_PHASES} time(s) on documents already scored",
        ),
    ]
    lines = []
    for section in dict.fromkeys(section for section, _, _ in sentences):
        said = [
            words.format(**s) for name, applies, words in sentences if name == section and applies
        ]
        lines += [f"### {section}", "", *(f"- {words}" for words in said), ""]
    return lines


def results_table(runs):
    """Markdown table: a row for each seed, then mean and deviation."""
    stages = list(runs[0].result["scores"])
    last = stages[-1]
    head = [
        "seed",
        *(f"{stage} BPB" for stage in stages),
        f"{last} loss",
        "steps",
        "training s",
        "eval s",
        "bytes",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows = [
        [
            *(run.result["scores"][stage]["bpb"] for stage in stages),
            run.result["scores"][last]["loss"],
            run.result["steps"],
            run.result["training_seconds"],
            run.result["seconds"][f"eval_{last}"],
            run.result["total_bytes"],
        ]
        for run in runs
    ]
    formats = ["{:.5f}"] * (len(stages) + 1) + ["{:,.0f}", "{:.1f}", "{:.1f}", "{:,.0f}"]
    if all(quant_gap(run) is not None for run in runs):
        for run, row in zip(runs, rows, strict=True):
            row.append(quant_gap(run))
        lines = [lines[0] + " quantization gap, nats |", lines[1] + "---|"]
        formats.append("{:.5f}")
    named = [(str(run.seed), row) for run, row in zip(runs, rows, strict=True)]
    columns = list(zip(*rows, strict=True))
    named += [
        ("**mean**", [statistics.fmean(c) for c in columns]),
        ("std (n - 1)", [spread(c) for c in columns]),
    ]
    for name, row in named:
        lines.append(
            f"| {name} | "
            + " | ".join(f.format(value) for f, value in zip(formats, row, strict=True))
            + " |"
        )
    return lines


def readme(runs, options, about, pictures, comparison):
    """The record's README.md."""
    first, result, settings = runs[0], runs[0].result, own_settings(runs[0])
    processes, torch = result["world_size"], result["torch"]
    launch = "python" if processes == 1 else f"torchrun --standalone --nproc_per_node={processes}"
    tokenizer = shlex.quote(str(Path("tokenizers", Path(log_word(first, "tokenizer")).name)))
    lines = [
        f"# {options.name}",
        "",
        (
            f"{about['scored_by']}: **{about['val_bpb']:.5f} BPB** (std {about['val_bpb_std']:.5f},"
            f" {len(runs)} seed(s)), {about['bytes_total']:,} bytes at most, {about['hardware']},"
            f" torch {torch}, commit `{result['commit']}`."
        ),
        "",
    ]
    lines += [options.blurb, ""] if options.blurb else []
    if about["broken_rules"]:
        lines += [
            "**Not a record.** Rules of the contest that these runs break:",
            "",
            *(f"- {reason}" for reason in about["broken_rules"]),
            "",
        ]
    if about["remarks"]:
        lines += [
            "What the runs found themselves:",
            "",
            *(f"- {remark}" for remark in about["remarks"]),
            "",
        ]
    lines += ["## Results", "", *results_table(runs), ""]
    lines += ["```", *comparison, "```", ""] if comparison else []
    lines += [line for path in pictures for line in (f"![{path.stem}]({path.name})", "")]
    changed = (
        ["```", *(f"{name}={value}" for name, value in settings.items()), "```"]
        if settings
        else ["None."]
    )
    commands = [
        (
            f"pip install torch=={torch.split('+')[0]} -r requirements.txt   # the build that fits"
            " the machine"
        ),
        (
            f"# documents in the order of the challenge; {validation_documents(first):,} of them"
            " were scored"
        ),
        (
            "python prepare_caseops_data.py --docs docs_selected.jsonl --out data --tokenizer"
            f" {tokenizer}"
        ),
    ]
    commands += ["set -a; . ./settings.env; set +a"] if settings else []
    commands += [f"SEED={run.seed} DATA_PATH=data {launch} train_gpt.py" for run in runs]
    lines += [
        "## Settings that differ from the defaults of the source",
        "",
        *changed,
        "",
        "## Method",
        "",
        *method(first.settings),
        "## Reproduction",
        "",
        "```",
        *commands,
        "```",
        "",
        "## Files",
        "",
        "- `settings.env`: the settings that differ from the defaults, for a shell",
        "- `train_gpt.py`: the packed script, whose bytes are counted, of `source/train_gpt.py`",
        *(f"- `train_seed{run.seed}.log`: the whole log of seed {run.seed}" for run in runs),
        "- `prepare_caseops_data.py`, `lossless_caps.py`, `tokenizers/`: from documents to shards",
        *(
            ["- `data_manifest.json`: counts and hashes of the shards that were used"]
            if (Path(first.settings["DATA_PATH"]) / "manifest.json").exists()
            else []
        ),
        "- `submission.json`: the figures above for machines",
        "",
    ]
    return "\n".join(lines)


# ---- the proof


def call(command, folder, **environ):
    """A fresh process in the folder with next to nothing in its environment -> its output.

    RecordError if it fails.
    """
    kept = {
        key: os.environ[key]
        for key in ("PATH", "HOME", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
        if key in os.environ
    }
    done = subprocess.run(
        [sys.executable, "-B", *map(str, command)],
        cwd=folder,
        env=kept | environ,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RecordError(
            f"the proof failed: {command[0]} ended with {done.returncode}:"
            f" {done.stderr.strip()[-1500:]}"
        )
    return done.stdout


def prove(folder, settings):
    """Runs the folder's own data tools and packed script on a tiny dataset.

    RecordError unless all is as it must be.
    """
    tokenizer = next((folder / "tokenizers").iterdir()).relative_to(folder)
    with tempfile.TemporaryDirectory(prefix="record-") as scratch:
        text = (folder / "source" / "train_gpt.py").read_text(encoding="utf-8")
        documents = Path(scratch, "docs.jsonl")
        documents.write_text(
            "".join(
                json.dumps({"text": part.strip()}) + "\n"
                for part in text.split("\n\n")
                if part.strip()
            ),
            encoding="utf-8",
        )
        data = Path(scratch, "data")
        call(
            [
                "prepare_caseops_data.py",
                "--docs",
                documents,
                "--out",
                data,
                "--tokenizer",
                tokenizer,
                "--val-docs",
                "8",
                "--workers",
                "1",
            ],
            folder,
        )
        paths = {"DATA_PATH": str(data), "RUNS_DIR": scratch, "RUN_ID": "proof"}
        # what a record has switched off by a 0 stays off
        tiny = {name: "0" if settings.get(name) == "0" else value for name, value in TINY.items()}
        output = call(["train_gpt.py"], folder, **settings | tiny | paths)
        result = json.loads(output.splitlines()[-1].removeprefix("RESULT "))
        counts = json.loads((data / "manifest.json").read_text())["splits"]["val"]
    wanted = {
        "code_bytes": (folder / "train_gpt.py").stat().st_size,
        "scored": {(counts["tokens"] - 1, counts["charged_bytes"])},
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


# ---- the whole


def parse_arguments(arguments):
    def git_name():
        if shutil.which("git") is None:
            return ""
        done = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True)
        return done.stdout.strip()

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="runs, or sets of runs")
    parser.add_argument("--name", required=True, help="name of the record, also of its folder")
    parser.add_argument("--author", default=git_name(), help="default: git's user.name")
    parser.add_argument("--github-id", default="", metavar="G")
    parser.add_argument(
        "--blurb", default="", metavar="TEXT", help="a sentence or two: what is new"
    )
    parser.add_argument("--date", default=datetime.date.today().isoformat(), metavar="YYYY-MM-DD")
    parser.add_argument("--records", type=Path, default=ROOT / "records", metavar="FOLDER")
    parser.add_argument(
        "--non-record", action="store_true", help="make it although rules are broken, and say so"
    )
    summarize.add_reference(parser)
    return parser.parse_args(arguments)


def make_record(options):
    """Checks, builds beside its place, proves, renames -> the record's folder."""
    if not options.author.strip():
        raise RecordError("--author is empty, and git knows no user.name: name one")
    runs = read_runs(options.runs)
    if problems := list(disagreements(runs)):
        raise RecordError("\n".join(problems))
    reasons, comparison = list(broken_rules(runs)), []
    if options.against or options.published is not None:
        comparison, better = summarize.compare([run.result for run in runs], options)
        reasons += (
            [] if better else ["not shown to be better than the reference by the contest's rule"]
        )
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
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as building:
        built = Path(building, folder.name)
        built.mkdir()
        pictures = copy_files(runs, built)
        about = submission(runs, options, reasons)
        (built / "submission.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (built / "README.md").write_text(
            readme(runs, options, about, pictures, comparison), encoding="utf-8"
        )
        proof = prove(built, own_settings(runs[0]))
        built.rename(folder)
    print(
        f"{folder}: {'record' if not reasons else 'non-record'}, {about['val_bpb']:.5f} BPB over"
        f" {len(runs)} seed(s)"
    )
    for reason in reasons:
        print(f"  broken: {reason}")
    for remark in about["remarks"]:
        print(f"  found by the runs: {remark}")
    print(
        f"proved: the packed script ({proof['code_bytes']:,} bytes) ran from inside the folder: "
        + ", ".join(f"{name} {score['bpb']:.4f} BPB" for name, score in proof["scores"].items())
    )
    return folder


def main(arguments=None):
    try:
        make_record(parse_arguments(arguments))
    except (RecordError, ValueError, OSError) as error:
        sys.exit(f"make_record.py: {error}")


if __name__ == "__main__":
    command_line.run(main, "make_record.py")
