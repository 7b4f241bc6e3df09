"""Writes the folder of a finished run without running one: a log with settings and RESULT, and
result.json.
"""

import json

SETTINGS = {
    "SEED": "1",
    "MATRIX_LR": "0.02",
    "MAX_WALLCLOCK_SECONDS": "600.0",
    "EVAL_BUDGET_SECONDS": "600.0",
    "COMPRESSOR": "entropy",
    "DATA_PATH": "data",
}


def make_result(name, seed, **changes):
    """RESULT of a run of eight H100 that breaks no rule; `changes` replace keys."""
    score = {"loss": 2.3 + seed / 1000, "bpb": 1.06 + seed / 1000, "tokens": 1000, "bytes": 3000}
    result = {
        "version": 2,
        "run": name,
        "seed": seed,
        "commit": "abc1234",
        "device": "NVIDIA H100 80GB HBM3",
        "world_size": 8,
        "torch": "2.11.0",
        "python": "3.12.1",
        "attention": "fa4",
        "steps": 4000,
        "train_loss": 2.1,
        "training_seconds": 590.0,
        "quant_check": {
            "rows": 2,
            "fp32_loss": 2.2,
            "settings": "as set",
            "gap": 0.004 + seed / 10_000,
            "tried": [{"settings": "as set", "gap": 0.004 + seed / 10_000}],
        },
        "scores": {"prequant": score, "quantized": dict(score), "ttt": dict(score)},
        "artifact_bytes": 15_900_000,
        "code_bytes": 30_000,
        "total_bytes": 15_930_000,
        "seconds": {
            "train": 590.0,
            "hessians": 3.0,
            "quantize": 2.0,
            "quant_check": 0.5,
            "unpack": 4.0,
            "eval_prequant": 1.0,
            "eval_quantized": 1.0,
            "eval_ttt": 300.0,
        },
        "violations": [],
    }
    return result | changes


def make_run(folder, seed=1, settings=None, losses=(4.0, 3.0), without=(), **changes):
    """A folder as a run leaves it, but for artifact.bin and model.pt -> the folder.

    `without` names keys of RESULT.
    """
    folder.mkdir(parents=True)
    result = make_result(folder.name, seed, **changes)
    result = {key: value for key, value in result.items() if key not in without}
    lines = ["settings (* changed):"]
    lines += [
        f"  {name}={value}  # text"
        for name, value in SETTINGS.items()
        if name not in (settings or {})
    ]
    lines += [f"* {name}={value}  # text" for name, value in (settings or {}).items()]
    lines += [
        "parameters:1000 slots:[0, 1] tokenizer:tokenizers/x.model validation documents:50000"
        " tokens:1001"
    ]
    for number, loss in enumerate(losses, 1):
        lines.append(
            f"step:{number} train_loss:{loss} train_seconds:{number}"
            f" progress:{number / len(losses)} lr_factor:1.0 looping:0 tokens_per_s:1000"
        )
    lines += ["RESULT " + json.dumps(result)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    return folder
