"""Settings that tiny runs on the CPU share: run_helpers.py and faults.py add their own.

In a file of its own, because faults.py imports train_gpt only where a run begins.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TINY_RUN = {
    "TOKENIZER_PATH": str(ROOT / "tokenizers" / "caseops_8192.model"),
    "VOCAB_SIZE": "8192",
    "DEVICE": "cpu",
    "NUM_LAYERS": "3",
    "MLP_MULT": "2",
    "ROPE_DIMS": "4",
    "LOOP_START": "1",
    "LOOP_END": "1",
    "NUM_LOOPS": "1",
    "PARALLEL_START_LAYER": "2",
    "MICRO_BATCH_TOKENS": "128",
    "TRAIN_SEQ_LEN": "64",
    "MAX_WALLCLOCK_SECONDS": "0",
    "WARMUP_STEPS": "1",
    "EMA_SPAN": "0.5",  # at the default, the average of so few steps is the last weights
    "COMPRESSOR": "brotli",
    "EVAL_SEQ_LEN": "64",
    "TTT_EVAL_SEQ_LEN": "64",
    "TTT_STALE_CONTEXT": "32",
    "TTT_BATCH_SIZE": "2",
    "PHASED_TTT_PREFIX_DOCS": "25000",
    "GLOBAL_TTT_CHUNK_TOKENS": "128",
    "OMP_NUM_THREADS": "1",
}
