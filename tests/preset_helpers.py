"""The published systems, in sizes that run in seconds."""

import shutil

from conftest import TINY

from tools.run_files import read_preset

PUBLISHED = [
    "pr1493",
    "pr1512",
    "pr1787",
    "pr1851",
    "pr1855",
    "pr1938",
    "pr1948",
    "pr1987",
    "pr2135",
    "pr960",
]


def tiny(name, data, runs):
    """The environment that makes a preset run in seconds: sizes alone, what makes the system
    stays the preset's.
    """
    preset, sizes = (
        read_preset(name),
        {key.upper(): str(value) for key, value in TINY.items() if key != "compressor"},
    )
    sizes |= {
        "NUM_LAYERS": "3",
        "LOOP_START": "1",
        "LOOP_END": "1",
        "ITERATIONS": "3",
        "BIGRAM_VOCAB_SIZE": "31",
        "ATTN_WINDOW": "8",
        "ATTN_WINDOW_FULL_LAYERS": "1",
        "SWA_EVERY": "1",
        "VALUE_EMBED_LAYERS": "1,2",
        "NUM_LOOPS": str(min(1, int(preset["NUM_LOOPS"]))),
        "EVAL_STRIDE": "24",
        "NUM_KV_HEADS": str(int(preset["NUM_KV_HEADS"]) // 2),
        "PARALLEL_START_LAYER": "3" if preset["PARALLEL_START_LAYER"] == "11" else "2",
    }
    features = (
        "BIGRAM_VOCAB_SIZE",
        "ATTN_WINDOW",
        "ATTN_WINDOW_FULL_LAYERS",
        "SWA_EVERY",
        "VALUE_EMBED_LAYERS",
    )
    environ = {key: value for key, value in sizes.items() if key in preset or key not in features}
    environ |= {
        "PRESET": name,
        "KERNELS": "0",
        "PLOTS": "0",
        "GPTQ_RESERVE_SECONDS": "0",
        "XSA_LAST_N": "2",
    }
    if preset["COMPRESSOR"] == "pergroup" and not shutil.which("lrzip"):
        environ["COMPRESSOR"] = "brotli"
    return environ | {"DATA_PATH": str(data), "RUNS_DIR": str(runs), "RUN_ID": name}
