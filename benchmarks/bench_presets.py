"""Published systems side by side: every preset to its end, one process a GPU, as a table.

    python benchmarks/bench_presets.py --caseops data/mine --plain data/plain \\
        --gpus 0,1,2,3 --seconds 120
    python benchmarks/bench_presets.py pr1855 pr2135 --caseops data/mine \\
        --set TTT_LANES=1 --ttt-docs 300

--caseops is the data of presets with CaseOps; --plain has a folder spN for each vocabulary of the
others, as tools/prepare_plain_data.py makes it, or is such a folder itself. --seconds is
MAX_WALLCLOCK_SECONDS: training, Hessians and GPTQ; compilation, packing and evaluation come on top.
--ttt-docs scores so many documents where test-time training is by documents. --set goes to every
run and wins over the presets. A run lives in RUNS/<preset>; one that has a result.json is not run
again. The table goes to the terminal as Markdown, after every run as far as it has come, and to
--out as JSON. Exit code 1 if a run failed.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.run_files import (  # noqa: E402
    PRESETS,
    read_preset,
    script_of,
    settings_of,
    with_preset,
)

SCORES = "prequant", "quantized", "sliding", "ttt"
HEAD = ("preset", "steps", "tokens/s", *SCORES, "weights", "code", "stages, s")


def data_of(preset: dict, args) -> dict:
    """DATA_PATH and, if one is given, TOKENIZER_PATH for a preset.

    ValueError where its data were not named.
    """
    if preset.get("CASEOPS_ENABLED", "1") == "1":
        if not args.caseops:
            raise ValueError("needs --caseops")
        return {"DATA_PATH": args.caseops}
    if not args.plain:
        raise ValueError("needs --plain")
    inside = Path(args.plain, f"sp{preset['VOCAB_SIZE']}")
    found = {"DATA_PATH": str(inside if inside.is_dir() else args.plain)}
    return found | ({"TOKENIZER_PATH": args.tokenizer} if args.tokenizer else {})


def environment(name: str, gpu: str, args) -> dict:
    """What train_gpt.py is started with."""
    preset = read_preset(name) | settings_of(args.set)
    ours = {
        "PRESET": name,
        "RUN_ID": name,
        "RUNS_DIR": args.runs,
        "PLOTS": "0",
        "CUDA_VISIBLE_DEVICES": gpu,
    }
    ours |= {"MAX_WALLCLOCK_SECONDS": str(args.seconds)} | data_of(preset, args)
    if args.ttt_docs and preset.get("TTT_METHOD", "lora") == "lora":
        ours["TTT_MAX_DOCS"] = str(args.ttt_docs)
    return os.environ | ours | settings_of(args.set)


def run_script(script: str, environ: dict, folder: Path, tree: Path = ROOT) -> str:
    """One run of train_gpt.py in `tree`.

    -> what went wrong, or nothing where it leaves a result in its folder.
    """
    done = subprocess.run(
        [sys.executable, script], env=environ, cwd=tree, capture_output=True, text=True
    )
    # exit code 3 says that the byte cap is broken: a result all the same
    if (folder / "result.json").exists():
        return ""
    return f"exit code {done.returncode}: " + " | ".join(done.stderr.strip().splitlines()[-3:])


def run(name: str, gpu: str, args) -> str:
    """Runs a preset to its end, unless it has been; -> what went wrong, or nothing."""
    folder = Path(args.runs, name)
    if (folder / "result.json").exists():
        return ""
    try:
        environ = environment(name, gpu, args)
    except ValueError as error:
        return str(error)
    script = args.script or str(script_of(with_preset(environ)))
    return run_script(script, environ, folder)


def row_of(name: str, fault: str, args) -> dict:
    """A preset's figures for the table and the JSON file."""
    if fault:
        return {"preset": name, "fault": fault}
    result = json.loads(Path(args.runs, name, "result.json").read_text())
    row = {
        "preset": name,
        "bpb": {stage: score["bpb"] for stage, score in result["scores"].items()},
    }
    keys = (
        "steps",
        "training_seconds",
        "tokens_per_second_by_loop_state",
        "artifact_bytes",
        "code_bytes",
        "seconds",
        "violations",
        "device",
        "attention",
        "commit",
        "peak_memory_bytes",
    )
    return row | {key: result[key] for key in keys if key in result}


def markdown(rows: list[dict]) -> str:
    """The table; a dash: a stage that a preset does not have."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in rows:
        name = f"`{row['preset']}`"
        if "fault" in row:
            cells = [name, f"failed: {row['fault']}", *[""] * (len(HEAD) - 2)]
            lines.append(f"| {' | '.join(cells)} |")
            continue
        rates = ", ".join(f"{rate:,}" for rate in row["tokens_per_second_by_loop_state"])
        scores = [f"{row['bpb'][stage]:.4f}" if stage in row["bpb"] else "-" for stage in SCORES]
        stages = " ".join(f"{stage} {seconds:.0f}" for stage, seconds in row["seconds"].items())
        sizes = [f"{row[key]:,}" for key in ("artifact_bytes", "code_bytes")]
        cells = [name, str(row["steps"]), rates, *scores, *sizes, stages]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted(path.stem for path in PRESETS.glob("pr*.env"))
    parser.add_argument(
        "names", nargs="*", default=known, metavar="PRESET", help=f"default: {' '.join(known)}"
    )
    parser.add_argument(
        "--gpus", default="0", help="numbers of GPUs, comma separated: as many runs at a time"
    )
    parser.add_argument(
        "--seconds", type=float, default=120, help="MAX_WALLCLOCK_SECONDS; default: %(default)s"
    )
    parser.add_argument("--caseops", metavar="DIR", help="data with CaseOps")
    parser.add_argument(
        "--plain", metavar="DIR", help="data without, or a folder that holds sp1024/ and sp8192/"
    )
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="of --plain; default: the one beside the data"
    )
    parser.add_argument(
        "--ttt-docs", type=int, default=0, metavar="N", help="TTT_MAX_DOCS where it is LoRA; 0: all"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=value", help="settings of every run"
    )
    parser.add_argument(
        "--runs", default="runs/presets", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--out", default="presets.json", metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--script", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.runs = str(Path(args.runs).resolve())
    for key in ("caseops", "plain", "tokenizer"):
        setattr(args, key, getattr(args, key) and str(Path(getattr(args, key)).resolve()))
    gpus, rows, lock = queue.Queue(), {}, threading.Lock()
    for gpu in args.gpus.split(","):
        gpus.put(gpu)

    def one(name):
        gpu = gpus.get()
        fault = run(name, gpu, args)
        gpus.put(gpu)
        with lock:
            rows[name] = row_of(name, fault, args)
            done = [rows[each] for each in args.names if each in rows]
            Path(args.out).write_text(json.dumps(done, indent=1))
            print(markdown(done) + "\n", flush=True)

    with ThreadPoolExecutor(gpus.qsize()) as pool:
        list(pool.map(one, args.names))
    for row in rows.values():
        for sentence in row.get("violations", ()):
            print(f"{row['preset']}: {sentence}")
    if any("fault" in row for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
