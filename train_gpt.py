"""Train, quantize, pack and score a small language model: a whole Parameter Golf submission.

    text -> shards (prepare_caseops_data.py) -> train -> EMA -> GPTQ + LQER -> artifact on disk
         -> rebuilt model -> bits per byte (BPB) of the validation documents
         -> the same with score-first test-time training (TTT)

    make demo                                    # CPU or GPU, a few minutes, nothing to download
    DATA_PATH=data/mine python train_gpt.py      # one GPU (or the CPU)
    DATA_PATH=data/mine torchrun --standalone --nproc_per_node=8 train_gpt.py
    python train_gpt.py --help                   # every setting: default, range, meaning

Settings are environment variables; the defaults are the submission, PRESET=name is a published one.
presets/published.py runs published systems that need parts of their own.
The file stands alone; in its repository find_guard takes tools/guard.py, which watches the run. A
run lives in runs/<RUN_ID>/ (README) and ends with `RESULT {json}`. QUANT_ONLY=1 goes on from its
model.pt, TTT_EVAL_ONLY=1 from its artifact.bin.

Shapes: B rows, T tokens, D model_dim, L layers, S slots (one execution of a layer; a looped one has
several), H heads, K key/value heads, E head_dim, F MLP hidden, V vocabulary, R LoRA rank.
"""

import bisect
import contextlib
import copy
import dataclasses
import difflib
import errno
import glob
import hashlib
import heapq
import importlib.util
import inspect
import io
import json
import lzma
import math
import os
import re
import struct
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist_backend
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10: selection passes over this backend
    varlen_attn = None
try:
    import brotli
except ImportError:  # only the lzma compressor works then, and nothing else is begun
    brotli = None
try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels stay definable, the references are used
    triton, tl = None, SimpleNamespace(constexpr=int)

BOS_ID = 1  # every document starts with exactly one (README: data)
CONTEST_SECONDS = 600.0  # of training, and of evaluation, the contest's rules
BYTE_CAP = 16_000_000  # decimal bytes of code + weights, the contest's rule
RESULT_VERSION = 2  # of the RESULT line, see docs/RESULT.md
# a script that tools/pack_code.py wrote is its own submission and has nothing beside it
PACKED = False


class SettingError(ValueError):
    """A setting, or a combination of settings, that cannot work; the message says what to
    change.
    """


class DataError(ValueError):
    """A dataset or a file that cannot be used as it is; the message names it and says what to
    do.
    """


class ArtifactError(ValueError):
    """Bytes that are no artifact of this program, or a damaged one."""


# what a run refuses; any other exception ends with its traceback
OUR_ERRORS = SettingError, DataError, ArtifactError

# ---- HYPERPARAMETERS -----------------------------------------------------------------------------


def env(default, help, *, above=None, least=None, most=None, choices=None):
    """One setting; its environment name is the field's in capitals. `above` is exclusive, `least`,
    `most` inclusive.
    """
    rules = {"above": above, "least": least, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata=rules | {"help": help})


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run, declared once: name, type, default, meaning, range.

    Raises SettingError on bad values.
    """

    # run
    seed: int = env(42, "seed of the initial weights and of the LoRA matrices", least=0)
    preset: str = env("", "settings of presets/NAME.env; what the environment sets wins")
    run_id: str = env("", "name of the run's folder; empty: a time stamp with the seed")
    runs_dir: str = env("runs", "folder that holds the runs")
    plots: bool = env(
        True, "pictures of the run at its end, where tools/plot_run.py lies beside this file"
    )
    data_path: str = env(
        "data/datasets/fineweb10B_sp8192_caseops", "folder of fineweb_{train,val,val_bytes}_*.bin"
    )
    tokenizer_path: str = env(
        "", "SentencePiece model; empty: beside the data or in tokenizers/, by manifest hash"
    )
    data_seed: int = env(0, "order of the training rows; 0: as published", least=0)
    balance_rows: bool = env(
        True, "a step's documents are dealt to its rows so that attention has equal work in each"
    )
    device: str = env(
        "auto", "where to run; auto: a GPU if there is one", choices=("auto", "cuda", "cpu")
    )
    compute_dtype: str = env(
        "auto", "auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", "bfloat16", "float32")
    )
    compile: str = env("auto", "torch.compile; auto: on CUDA only", choices=("auto", "0", "1"))
    kernels: bool = env(
        True, "Triton's and Quack's kernels where a trial call works; 0: PyTorch references"
    )
    train_cuda_graphs: bool = env(True, "on CUDA training micro-batches are captured and replayed")
    attention_backend: str = env(
        "auto", "packed attention", choices=("auto", "fa3", "fa4", "torch", "sdpa")
    )
    prequant_only: bool = env(False, "stop after the evaluation of the fp32 model")
    quant_only: bool = env(False, "go on from CHECKPOINT_PATH: Hessians, GPTQ, packing, evaluation")
    ttt_eval_only: bool = env(False, "go on from ARTIFACT_PATH: evaluation and test-time training")
    checkpoint_path: str = env(
        "", "fp32 model that QUANT_ONLY reads; empty: model.pt of the run's folder"
    )
    artifact_path: str = env(
        "", "packed model that TTT_EVAL_ONLY reads; empty: artifact.bin of the run's folder"
    )
    checkpoint_every: int = env(
        0, "steps between training states, of which two are kept; 0: on a signal only", least=0
    )
    resume: bool = env(False, "go on from the newest whole training state of RUN_ID")
    deterministic: bool = env(
        False, "the same RESULT from run to run: CPU all bits, GPU as far as PyTorch can"
    )

    # data and batches
    train_batch_tokens: int = env(
        786_432, "tokens of a step over all ranks and micro-steps", least=1
    )
    micro_batch_tokens: int = env(
        98_304, "tokens of a packed row, the unit of one forward and backward", least=1
    )
    train_seq_len: int = env(2048, "longer documents are cut in pieces of this length", least=2)
    max_row_segments: int = env(
        0, "pieces of a row; above it the shortest see each other; 0: automatic", least=0
    )

    # model
    vocab_size: int = env(8192, "tokens of the vocabulary", least=9, most=65_536)
    model_dim: int = env(512, "width", least=8)
    num_layers: int = env(11, "physical layers", least=1)
    num_heads: int = env(8, "query heads", least=1)
    num_kv_heads: int = env(4, "key/value heads", least=1)
    mlp_mult: float = env(4.0, "MLP width over model width", above=0)
    tie_embeddings: bool = env(True, "the embedding is the output projection too")
    tied_embed_init_std: float = env(0.005, "deviation of the initial embedding", above=0)
    smear_gate_enabled: bool = env(
        True, "SmearGate: add a gated share of the previous token's embedding"
    )
    gate_window: int = env(12, "input dimensions that the gates read", least=1)
    loop_start: int = env(3, "first looped layer", least=0)
    loop_end: int = env(5, "last looped layer", least=0)
    num_loops: int = env(2, "extra passes over the looped layers; 0: no depth recurrence", least=0)
    enable_looping_at: float = env(
        0.35, "training fraction at which looping starts", least=0, most=1
    )
    skip_gates_enabled: bool = env(True, "U-Net skips merge through a gated lerp; 0: by addition")
    ln_scale: bool = env(True, "normalised inputs are divided by sqrt(layer + 1)")
    rope_dims: int = env(16, "rotary dimensions of each head", least=2)
    rope_base: float = env(10_000.0, "rotary base", above=1)
    qk_gain_init: float = env(5.0, "initial gain of each query head", above=0)
    xsa_last_n: int = env(
        11, "last layers with XSA: a head's output loses its part along its own value", least=0
    )
    sparse_attn_gate_enabled: bool = env(
        True, "per-head output gate read from GATE_WINDOW dimensions"
    )
    sparse_attn_gate_scale: float = env(0.5, "factor inside the sparse gate's sigmoid", above=0)
    gated_attn_enabled: bool = env(False, "per-head output gate read from all dimensions")
    attn_out_gate_enabled: bool = env(False, "per-head output gate 2 sigmoid(W src[:GATE_WINDOW])")
    attn_out_gate_src: str = env(
        "block", "source of that gate: block input or raw q", choices=("block", "q")
    )
    leaky_relu_slope: float = env(0.3, "negative slope before squaring in the MLP", least=0, most=1)
    parallel_start_layer: int = env(
        8, "first layer with two residual lanes; NUM_LAYERS: none", least=0
    )
    parallel_final_lane: str = env(
        "mean", "which lane leaves the stack", choices=("mean", "attn", "mlp")
    )
    logit_softcap: float = env(30.0, "logits z become c tanh(z/c)", above=0, most=64)

    # optimizer and schedule
    max_wallclock_seconds: float = env(
        600.0, "budget of training, Hessians and GPTQ; 0: ITERATIONS decide", least=0
    )
    iterations: int = env(20_000, "steps at most", least=1)
    warmup_steps: int = env(3, "throw-away steps per graph before the clock starts", least=0)
    warmdown_frac: float = env(
        0.85, "last fraction of training in which the learning rates fall", above=0, most=1
    )
    min_lr: float = env(0.1, "floor of the learning-rate factor", least=0, most=1)
    matrix_lr: float = env(0.026, "Muon learning rate", above=0)
    muon_momentum: float = env(0.97, "Nesterov momentum after its warm-up", least=0, most=1)
    muon_momentum_warmup_start: float = env(0.92, "momentum at step 0", least=0, most=1)
    muon_momentum_warmup_steps: int = env(1500, "steps of the linear momentum warm-up", least=0)
    muon_wd: float = env(0.095, "decoupled decay of the banks", least=0)
    muon_row_normalize: bool = env(
        True, "rows of the update get unit norm before orthogonalisation"
    )
    muon_backend_steps: int = env(5, "Newton-Schulz steps", least=1, most=5)
    muon_dtype: str = env(
        "auto", "Muon's gradients, momentum, products", choices=("auto", "bfloat16", "float32")
    )
    tied_embed_lr: float = env(0.03, "AdamW learning rate of the embedding", above=0)
    embed_wd: float = env(0.085, "decay of the embedding", least=0)
    scalar_lr: float = env(0.02, "AdamW learning rate of scalars and gates", above=0)
    adam_wd: float = env(0.02, "decay of scalars and gates", least=0)
    beta1: float = env(0.9, "AdamW beta1", least=0, most=0.9999)
    beta2: float = env(0.99, "AdamW beta2", least=0, most=0.99999)
    grad_clip_norm: float = env(0.3, "global gradient norm at most; 0: off", least=0)
    ema_decay: float = env(
        0.9965, "decay of the weight average, after its ramp", least=0, most=0.999999
    )
    train_log_every: int = env(100, "steps between log lines", least=1)
    val_loss_every: int = env(
        0, "steps between evaluations inside training, off the clock; 0: none", least=0
    )

    # quantization and artifact
    gptq_reserve_seconds: float = env(7.0, "part of the budget kept for Hessians and GPTQ", least=0)
    gptq_calibration_batches: int = env(
        16, "rows of training tokens for the Hessians, over all ranks", least=1
    )
    gptq_all_reduce: bool = env(True, "Hessians are averaged over ranks; 0: each rank's own")
    gptq_damp: float = env(0.01, "share of the mean Hessian diagonal added to it", above=0)
    gptq_block_size: int = env(128, "columns between two batched error updates", least=1)
    matrix_bits: int = env(6, "bits of a matrix code", least=2, most=8)
    embed_bits: int = env(8, "bits of an embedding code", least=2, most=8)
    mlp_clip_sigmas: float = env(13.0, "clip of MLP rows in deviations", above=0)
    attn_clip_sigmas: float = env(14.0, "clip of attention rows in deviations", above=0)
    embed_clip_sigmas: float = env(15.0, "clip of embedding rows in deviations", above=0)
    gptq_column_steps: bool = env(
        True, "steps 2^(k/8) per row and per column instead of fp16 per row"
    )
    gptq_column_octaves: float = env(
        2.0, "most octaves between a column's step and its row's", least=0
    )
    quant_check_rows: int = env(
        2, "training rows held out to check the quantized model's loss; 0: no check", least=0
    )
    quant_gap_max: float = env(
        0.02, "nats a token that quantization may add there; else plainer ones", above=0
    )
    gated_attn_quant_gate: bool = env(True, "attention gates as int8 per row; 0: fp16")
    lqer_enabled: bool = env(True, "low-rank correction of the largest quantization errors")
    lqer_top_k: int = env(3, "matrices that get a correction", least=0)
    lqer_rank: int = env(4, "rank of a correction", least=1)
    lqer_asym_enabled: bool = env(
        True, "correction as int2 and int4 codes; 0: LQER_FACTOR_BITS for both factors"
    )
    lqer_asym_group: int = env(64, "codes that share a scale in the int4 factor", least=1)
    lqer_factor_bits: int = env(4, "bits of the symmetric factors", least=2, most=8)
    target_bytes: int = env(
        0, "scale the clips until code and weights end just under this; 0: off", least=0
    )
    compressor: str = env("entropy", "coder of the artifact: entropy, brotli, lzma")

    # evaluation
    eval_seq_len: int = env(2048, "context of plain and sliding evaluation", least=2)
    sliding_window_enabled: bool = env(False, "also evaluate with overlapping windows")
    eval_stride: int = env(64, "advance of the sliding window", least=1)
    eval_budget_seconds: float = env(
        600.0, "seconds of unpacking and final evaluation, or a violation", above=0
    )

    # test-time training
    ttt_enabled: bool = env(True, "score with test-time training")
    ttt_max_docs: int = env(
        0, "score only N validation documents, of all lengths, marked partial; 0: all", least=0
    )
    ttt_eval_seq_len: int = env(2048, "context of a chunk, its own tokens included", least=2)
    ttt_stale_context: int = env(
        1792, "oldest positions of it with keys and values kept from older adapters", least=0
    )
    ttt_chunk_size: int = env(12, "tokens scored between two LoRA steps", least=1)
    ttt_batch_size: int = env(
        64, "places of a lane, and documents of a step with whole contexts", least=1
    )
    ttt_lanes: int = env(8, "fixed groups of places; lane i runs on rank i mod world size", least=1)
    ttt_lora_sites: str = env("q,k,v,o,mlp,head", "where adapters sit, comma separated")
    ttt_lora_rank: int = env(80, "rank of an adapter", least=1)
    ttt_lora_alpha: float = env(144.0, "adapter output is multiplied by alpha / rank", above=0)
    ttt_lora_lr: float = env(9e-5, "AdamW learning rate of the adapters", least=0)
    ttt_beta2: float = env(0.99, "AdamW beta2 of the adapters (beta1 is 0)", least=0, most=0.99999)
    ttt_weight_decay: float = env(0.5, "decay of the adapters", least=0)
    ttt_warm_start_a: bool = env(True, "a new document keeps A of the one before it in its place")
    phased_ttt_num_phases: int = env(
        1, "times the base weights are fine-tuned on scored documents", least=0
    )
    phased_ttt_prefix_docs: int = env(
        2500, "documents scored before the last of them, of 50,000 (scaled)", least=0
    )
    global_ttt_lr: float = env(1e-3, "SGD learning rate of that fine-tuning, cosine to 0", least=0)
    global_ttt_momentum: float = env(0.9, "its momentum", least=0, most=0.9999)
    global_ttt_grad_clip: float = env(1.0, "its global gradient norm at most", above=0)
    global_ttt_chunk_tokens: int = env(32_768, "tokens of one SGD step over all ranks", least=1)

    @classmethod
    def from_env(cls, environ=None, guard=None):
        """The environment over the settings of its PRESET, which the guard reads; a dictionary may
        stand for it. Raises SettingError for bad values and for unknown names that look like ours.
        """
        environ = os.environ if environ is None else environ
        if environ.get("PRESET"):
            environ = (guard or NO_GUARD).read_preset(environ["PRESET"]) | dict(environ)
        values, problems = {}, [*unknown_settings(environ, cls)]
        for field in dataclasses.fields(cls):
            if (text := environ.get(field.name.upper())) is not None:
                try:
                    values[field.name] = parse_setting(field, text)
                except ValueError as error:
                    problems.append(str(error))
        if problems:
            raise SettingError("\n".join(problems))
        return cls(**values)

    def __post_init__(self):
        if problems := setting_problems(self):
            raise SettingError("\n".join(problems))

    attn_window = 0  # tokens before its own that a token sees, 0: all; attention is tried with it
    num_embeddings = property(lambda hp: hp.vocab_size)  # rows of the embedding
    head_dim = property(lambda hp: hp.model_dim // hp.num_heads)
    kv_dim = property(lambda hp: hp.num_kv_heads * hp.head_dim)
    # SEED in the range of all generators, of seeds that are made of it as well; below 2^43 it is
    # SEED itself
    generator_seed = property(lambda hp: hp.seed % 2**43)
    mlp_dim = property(lambda hp: int(hp.mlp_mult * hp.model_dim))
    lora_sites = property(lambda hp: tuple(site for site in hp.ttt_lora_sites.split(",") if site))
    # of a step, over all ranks
    micro_steps = property(lambda hp: hp.train_batch_tokens // hp.micro_batch_tokens)
    # without a limit: enough for any row, as of two neighbouring pieces that are not joined one is
    # over half the length
    row_segments = property(
        lambda hp: (
            hp.max_row_segments
            or max(
                64,
                hp.micro_batch_tokens // 512,
                2 * -(-hp.micro_batch_tokens // hp.train_seq_len) + 1,
            )
        )
    )

    @property
    def training_seconds(self):
        """Seconds of the training loop; None: no limit, ITERATIONS decide.

        0 is no time at all: a step is taken.
        """
        budget = self.max_wallclock_seconds
        return max(0.0, budget - self.gptq_reserve_seconds) if budget else None

    def chunk_size_of(self, length):
        """Targets of a document, or of an array of them -> tokens scored between two LoRA steps."""
        return self.ttt_chunk_size


# setting -> tap site
LORA_SITES = {"q": "q", "k": "k", "v": "v", "o": "attn_out", "mlp": "mlp_out", "head": "lm_head"}


def parse_setting(field, text):
    """The typed value of one variable's text. Raises ValueError that names the variable."""
    if field.type is bool and text not in ("0", "1"):
        raise ValueError(f"{field.name.upper()}={text!r}: must be 0 or 1")
    try:
        return text == "1" if field.type is bool else field.type(text)
    except ValueError:
        raise ValueError(f"{field.name.upper()}={text!r}: must be {field.type.__name__}") from None


# Names of published training scripts that do nothing here -> what does. Other unknown names are
# found by their family.
INSTEAD = {
    "ADAM_EPS": "nothing: it is 1e-8",
    "ALIAS_PREV_SMEAR_SCALE": "nothing",
    "ASYM_LOGIT_RESCALE": "nothing",
    "CKPT_PATH": "CHECKPOINT_PATH",
    "EVAL_ONLY": "TTT_EVAL_ONLY",
    "EVAL_ONLY_PATH": "QUANT_ONLY and CHECKPOINT_PATH",
    "DATASETS_DIR": "DATA_PATH",
    "DOC_SHUFFLE": "nothing",
    "E2E_TTT_ENABLED": "TTT_METHOD=sgd",
    "FULL_GPTQ_DAMP": "GPTQ_DAMP",
    "FUSED_CE_ENABLED": "KERNELS",
    "FUSED_MLP_ENABLED": "KERNELS",
    "HEAD_LR": "TIED_EMBED_LR",
    "HEAD_PAIR_NS": "MUON_HEAD_PAIRS",
    "IHA_ENABLED": "nothing",
    "IHA_MIX_V": "nothing",
    "LATE_QAT_THRESHOLD": "QAT_BELOW_LR",
    "LOAD_MODEL_PATH": "QUANT_ONLY and CHECKPOINT_PATH",
    "MTP_ENABLED": "nothing",
    "MTP_LOSS_WEIGHT": "nothing",
    "MTP_NUM_HEADS": "nothing",
    "MTP_STEPS": "nothing",
    "MTP_WEIGHT": "nothing",
    "NEGATIVE_SLOPE": "LEAKY_RELU_SLOPE",
    "PAIRED_HEAD_MUON_ENABLED": "MUON_HEAD_PAIRS",
    "PRUNE_PCT": "TARGET_BYTES",
    "QUANTIZED_MODEL_PATH": "TTT_EVAL_ONLY and ARTIFACT_PATH",
    "QUANTIZE_ONLY": "QUANT_ONLY",
    "RECUR_ALPHA": "nothing",
    "SKIP_POST_TRAIN_EVAL": "PREQUANT_ONLY",
    "SPINQUANT_ENABLED": "nothing",
    "TARGET_MB": "TARGET_BYTES",
    "TOKEN_BOOST": "NGRAM_TILT_ENABLED",
    "TOKEN_ORDER": "NGRAM_TILT_ENABLED",
    "TOKEN_THRESHOLD": "NGRAM_TILT_ENABLED",
    "TRAIN_SEQ_SCHEDULE": "TRAIN_SEQ_LEN",
    "VAL_BATCH_SIZE": "MICRO_BATCH_TOKENS",
    "VAL_BATCH_TOKENS": "MICRO_BATCH_TOKENS",
    "VAL_DOC_FRACTION": "TTT_MAX_DOCS",
    "VE_DIM": "VALUE_EMBED_DIM",
    "VE_ENABLED": "VALUE_EMBED_LAYERS",
    "VE_LAYERS": "VALUE_EMBED_LAYERS",
}
# Names that change no result, or that other programs use as well: a note of the log, no refusal.
IDLE = """ARTIFACT_DIR COMPILE_SHAPE_WARMUP DATA_DIR DYNAMO_CACHE_SIZE_LIMIT GPUS_OVERRIDE
    MODEL_PATH OUT_PTZ
    SEEDS_OVERRIDE SKIP_INITIAL_VAL""".split()


def idle_notes(environ):
    """Notes for the log: which settings of published scripts do nothing here."""
    found = [name for name in IDLE if name in environ]
    return [f"{', '.join(found)}: of published scripts, without a meaning here"] if found else []


def unknown_settings(environ, cls):
    """Messages for undeclared variables that look like ours: a family name of ours, or nearly one
    of
    our names. First words that other programs use as well (MAX_JOBS, DATA_..., RUN_...) do not make
    a family by themselves.
    """
    ours = [field.name.upper() for field in dataclasses.fields(cls)]
    shared_words = (
        "MAX MIN NUM RUN RUNS DATA MODEL COMPUTE ENABLE TRAIN VAL CHECKPOINT TOKENIZER ARTIFACT"
        " ADAM".split()
    )
    families = {name.split("_")[0] for name in ours if "_" in name} - set(shared_words)
    for name in sorted(set(environ) - {*ours, *IDLE}):
        if name in INSTEAD:
            yield (
                f"{name} is a setting of other scripts; here it is {INSTEAD[name]} (unset it, or"
                " see --help)"
            )
            continue
        close = difflib.get_close_matches(name, ours, 1, 0.6)
        if name.split("_")[0] in families or difflib.get_close_matches(name, ours, 1, 0.88):
            yield (
                f"{name} is not a setting{f'; did you mean {close[0]}?' if close else ''} (unset"
                " it, or see --help)"
            )


def setting_problems(hp):
    """Messages for values outside their ranges or, where there are none, for combinations that
    cannot work.
    """
    outside = [
        p
        for field in dataclasses.fields(hp)
        for p in range_problems(field, getattr(hp, field.name))
    ]
    return outside or [message for broken, message in cross_checks(hp) if broken]


def range_problems(field, value):
    """Messages for a value outside its declared range."""
    rule, name = field.metadata, f"{field.name.upper()}={value!r}"
    if rule["choices"] and value not in rule["choices"]:
        yield f"{name}: must be one of {', '.join(rule['choices'])}"
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name}: must be finite"
    elif rule["above"] is not None and not value > rule["above"]:
        yield f"{name}: must be above {rule['above']}"
    elif rule["least"] is not None and value < rule["least"]:
        yield f"{name}: must be at least {rule['least']}"
    elif rule["most"] is not None and value > rule["most"]:
        yield f"{name}: must be at most {rule['most']}"


def cross_checks(hp):
    """Pairs (is it broken, what to change) for combinations of settings."""
    yield (
        hp.model_dim % hp.num_heads,
        f"MODEL_DIM={hp.model_dim} must divide by NUM_HEADS={hp.num_heads}",
    )
    yield hp.num_heads % hp.num_kv_heads, "NUM_HEADS must divide by NUM_KV_HEADS"
    yield (
        hp.rope_dims % 2 or hp.rope_dims > hp.head_dim,
        f"ROPE_DIMS must be even, at most {hp.head_dim}",
    )
    yield hp.gate_window > hp.model_dim, "GATE_WINDOW must be at most MODEL_DIM"
    gates = hp.sparse_attn_gate_enabled + hp.gated_attn_enabled + hp.attn_out_gate_enabled
    yield (
        gates > 1,
        "SPARSE_ATTN_GATE_ENABLED, GATED_ATTN_ENABLED, ATTN_OUT_GATE_ENABLED exclude each other",
    )
    looped = hp.loop_start <= hp.loop_end < hp.num_layers
    yield (
        hp.num_loops and not looped,
        "LOOP_START..LOOP_END must lie inside NUM_LAYERS (or set NUM_LOOPS=0)",
    )
    yield hp.parallel_start_layer > hp.num_layers, "PARALLEL_START_LAYER must be at most NUM_LAYERS"
    yield (
        hp.train_batch_tokens % hp.micro_batch_tokens,
        "TRAIN_BATCH_TOKENS must divide by MICRO_BATCH_TOKENS",
    )
    pieces = -(-hp.micro_batch_tokens // hp.train_seq_len)
    yield (
        0 < hp.max_row_segments < pieces,
        (
            f"MAX_ROW_SEGMENTS={hp.max_row_segments}: a row of MICRO_BATCH_TOKENS has {pieces}"
            " pieces of TRAIN_SEQ_LEN"
        ),
    )
    out_of_time = 0 < hp.max_wallclock_seconds <= hp.gptq_reserve_seconds
    yield out_of_time, "GPTQ_RESERVE_SECONDS must be less than MAX_WALLCLOCK_SECONDS"
    yield hp.eval_stride > hp.eval_seq_len, "EVAL_STRIDE must be at most EVAL_SEQ_LEN"
    yield hp.ttt_chunk_size > hp.ttt_eval_seq_len, "TTT_CHUNK_SIZE must be at most TTT_EVAL_SEQ_LEN"
    fits = hp.ttt_chunk_size <= hp.ttt_stale_context <= hp.ttt_eval_seq_len - hp.ttt_chunk_size
    what = "must be 0, or from TTT_CHUNK_SIZE to TTT_EVAL_SEQ_LEN less that"
    yield hp.ttt_stale_context and not fits, f"TTT_STALE_CONTEXT={hp.ttt_stale_context} {what}"
    known = hp.lora_sites and set(hp.lora_sites) <= set(LORA_SITES)
    yield not known, f"TTT_LORA_SITES={hp.ttt_lora_sites}: must be some of {','.join(LORA_SITES)}"
    modes = hp.prequant_only + hp.quant_only + hp.ttt_eval_only
    yield modes > 1, "PREQUANT_ONLY, QUANT_ONLY, TTT_EVAL_ONLY exclude each other"
    goes_on = hp.run_id and not (hp.quant_only or hp.ttt_eval_only)
    yield (
        hp.resume and not goes_on,
        "RESUME=1 needs RUN_ID, and neither QUANT_ONLY nor TTT_EVAL_ONLY",
    )
    yield (
        hp.deterministic and hp.max_wallclock_seconds,
        "DETERMINISTIC=1 needs MAX_WALLCLOCK_SECONDS=0",
    )
    yield hp.checkpoint_path and not hp.quant_only, "CHECKPOINT_PATH goes with QUANT_ONLY=1"
    yield hp.artifact_path and not hp.ttt_eval_only, "ARTIFACT_PATH goes with TTT_EVAL_ONLY=1"
    yield (
        not re.fullmatch(r"(\w[\w.+-]*)?", hp.run_id),
        "RUN_ID: letters, digits, '_', then also '.', '+', '-'",
    )


def limits(field):
    """The declared range of a setting, for the table: ` [above 0, most 1]`, or nothing."""
    rule = field.metadata
    bounds = [f"{key} {rule[key]}" for key in ("above", "least", "most") if rule[key] is not None]
    text = ", ".join([*bounds, "|".join(rule["choices"] or ())]).strip(", ")
    return text and f" [{text}]"


def settings_table(hp=None):
    """Every setting, one a line: value (hp's, or the default; a changed one is starred),
    meaning, range.
    """
    lines = []
    for field in dataclasses.fields(Hyperparameters):
        value = getattr(hp, field.name, field.default)
        star, value = (
            "*" if value != field.default else " ",
            (int(value) if field.type is bool else value),
        )
        lines.append(
            f"{star} {field.name.upper()}={value}  # {field.metadata['help']}{limits(field)}"
        )
    return "\n".join(lines)


# ---- RUNTIME -------------------------------------------------------------------------------------


class Dist:
    """The process group, and the only place that names torch.distributed. One process: every method
    returns at once. Tensors travel over NCCL on CUDA and over gloo on the CPU; objects and the
    clock travel over gloo, so that they never wait for the GPU's queue.
    """

    def __init__(self, device="auto", deterministic=False):
        self.num_collectives = 0
        self.notes = []  # for the log
        self.rank, self.world_size, local_rank = self.place_in_group()
        self.notes += idle_notes(os.environ)
        if device == "cuda" and not torch.cuda.is_available():
            raise SettingError(
                "DEVICE=cuda, but torch sees none: use DEVICE=cpu, or a CUDA build of torch"
            )
        if deterministic:  # an operation without such a form warns, with its name
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.device = torch.device("cpu")
        if torch.cuda.is_available() and device != "cpu":
            if local_rank >= torch.cuda.device_count():
                raise SettingError(
                    f"LOCAL_RANK={local_rank}, but this host has {torch.cuda.device_count()} GPUs"
                )
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist_backend.init_process_group(backend)

    def place_in_group(self):
        """The environment of torchrun, or of none -> rank, world size, local rank. SettingError
        where
        it contradicts itself: a rank left over from another run would train without a log, a folder
        or an end.
        """
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
        given = {name: os.environ[name] for name in names if name in os.environ}
        problem = "unset all of these for a run of one process, or start it with torchrun"
        told = " ".join(f"{name}={value}" for name, value in given.items())
        # MASTER_ADDR and MASTER_PORT alone do no harm: some clusters always set them
        if not {*names[:3]} & {*given}:
            for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
                if os.environ.get(name, "1") != "1":
                    self.notes.append(
                        f"{name}={os.environ[name]}, but RANK is not set: this is a run of one"
                        " process"
                    )
            return 0, 1, 0
        if missing := [name for name in names[:3] if name not in given]:
            raise SettingError(
                f"the environment has {told}, but not {', '.join(missing)}: {problem}"
            )
        try:
            rank, world_size, local_rank = (int(given[name]) for name in names[:3])
        except ValueError:
            raise SettingError(f"{told}: these must be whole numbers: {problem}") from None
        if not 0 <= local_rank <= rank < world_size:
            raise SettingError(
                f"{told}: LOCAL_RANK is at most RANK, which is below WORLD_SIZE: {problem}"
            )
        if world_size > 1 and (missing := [name for name in names[3:] if name not in given]):
            raise SettingError(
                f"the environment has {told}, but not {', '.join(missing)}: {problem}"
            )
        if world_size > 1 and not given["MASTER_PORT"].isdecimal():
            raise SettingError(f"{told}: MASTER_PORT must be a number: {problem}")
        return rank, world_size, local_rank

    def collective(self, name, *args, **options):
        """Calls torch.distributed's function of this name. Every rank makes the same calls: their
        number tells a guard which rank is behind.
        """
        self.num_collectives += 1
        return getattr(dist_backend, name)(*args, **options)

    def all_reduce(self, tensor):
        """Sums a tensor over all ranks, in place, and returns it."""
        if self.world_size > 1:
            self.collective("all_reduce", tensor)
        return tensor

    def all_reduce_packed(self, tensors):
        """Sums many small tensors over all ranks in one flat collective, in place."""
        if self.world_size > 1 and tensors:
            flat = self.all_reduce(torch.cat([t.reshape(-1) for t in tensors]))
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def reduce_scatter(self, full):
        """(n world, ...) on every rank -> handle, (n, ...): this rank's slice of the sum,
        ready after handle.wait().
        """
        if self.world_size == 1:
            return SimpleNamespace(wait=lambda: None), full
        shard = full.new_empty(full.shape[0] // self.world_size, *full.shape[1:])
        return self.collective("reduce_scatter_tensor", shard, full, async_op=True), shard

    def all_gather(self, shard):
        """(n, ...) of every rank -> handle, (n world, ...), ready after handle.wait()."""
        if self.world_size == 1:
            return SimpleNamespace(wait=lambda: None), shard
        full = shard.new_empty(shard.shape[0] * self.world_size, *shard.shape[1:])
        return (
            self.collective("all_gather_into_tensor", full, shard.contiguous(), async_op=True),
            full,
        )

    def all_gather_object(self, value):
        """Every rank's value, as a list in rank order; small values only."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            self.collective("all_gather_object", values, value)
        return values

    def agree(self, *numbers):
        """The largest of every rank's numbers, place by place, over the CPU's network."""
        box = torch.tensor(numbers, dtype=torch.float64)
        if self.world_size > 1:
            self.collective("all_reduce", box, dist_backend.ReduceOp.MAX)
        return box.tolist()

    def broadcast(self, tensor):
        """Rank 0's tensor on every rank, in place."""
        if self.world_size > 1:
            self.collective("broadcast", tensor, 0)

    def barrier(self):
        """Waits until every rank is here, over the CPU's network."""
        self.all_gather_object(None)

    def synchronize(self):
        """Waits for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self):
        if self.world_size > 1:
            dist_backend.destroy_process_group()


class Guard:
    """What may watch a run from outside. A run calls these hooks at their places; here each does
    nothing, or the least that is honest. find_guard takes the one of tools/guard.py where it lies
    beside this file.
    """

    def read_preset(self, name):
        """The settings of a preset, {NAME: value}. Raises SettingError."""
        raise SettingError(f"PRESET={name} needs tools/guard.py and presets/ beside this file")

    def start(self, dist):
        """The process group is up."""

    def check(self, hp, dist, found):
        """Before anything is written; `found`: what other checks made -> words for the log.

        Raises SettingError.
        """
        if hp.resume or hp.checkpoint_every:
            raise SettingError("RESUME and CHECKPOINT_EVERY need tools/guard.py beside this file")
        return ""

    def lock(self, folder):
        """The run's folder is made (rank 0). Raises SettingError if another run is using it."""

    def open_log(self, log):
        """The log of rank 0 is open."""

    def notes(self, hp):
        """Lines for the log's head."""
        return [
            "note: no tools/guard.py beside this file: no training states, no watchdog, no checks"
            " of the machine; code_bytes are those of this file"
        ]

    def submission(self, script, hp):
        """Bytes of this script -> bytes of the file that is counted."""
        return script

    def commit(self):
        """The commit of the checkout, for RESULT."""

    def enter_stage(self, name):
        """A stage of the run begins, or goes on."""

    def show(self, name, start, share, detail):
        """The running stage, when it began (perf_counter), the share that is done."""

    def clear(self):
        """A line of the log comes."""

    def resume(self, trainer):
        """Training begins -> steps, seconds, losses that are already done."""
        return 0, 0.0, []

    def watch(self, model, loss):
        """A step's gradients are there, the weights not yet updated."""

    def report(self):
        """-> numbers of this rank, of which every rank gets the largest at the end of a step."""
        return ()

    def after_step(self, trainer, step, seconds, losses, reports):
        """A step ended, with the reports of all ranks."""

    def after_last_step(self, trainer, step):
        """Training ended, its weights not yet averaged."""

    def begin_training(self):
        """A signal has to wait for the end of a step now."""

    def end_training(self, path):
        """The weights are in this file."""

    def keep_weights(self, hp, folder, path, log):
        """A run that fails from here on can go on from this file."""

    def failed(self, error):
        """The run ends with this exception."""

    def stop(self):
        """The run ended well; all ranks are here."""

    def finish(self, hp, result):
        """Rank 0 has written all files."""


NO_GUARD = Guard()


def find_guard():
    """The guard of tools/guard.py beside this file, else NO_GUARD: the one place that looks for
    another file of the repository. By path, so that no other package called tools is taken for it.
    What importing it raises is not caught.
    """
    path = Path(__file__).with_name("tools") / "guard.py"
    if PACKED or not path.exists():
        return NO_GUARD
    sys.modules["train_gpt"] = sys.modules[__name__]  # which it imports
    # as a package of its own, in which `from . import x` means the file beside it
    spec = importlib.util.spec_from_file_location(
        "golf_guard", path, submodule_search_locations=[str(path.parent)]
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RunGuard()


class LossyStream:
    """Standard output or error of a run. The log file is the truth: what a lost terminal (a closed
    pipe, a full disk behind it, a connection that broke) does not take is dropped, and neither the
    run nor its exit code suffers.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        # the stream keeps what it could not write: nowhere is where it can go, now and at
        # exit
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def survive_lost_terminals():
    """Makes standard output and error LossyStreams, and opens those that were closed when the
    process started.
    """
    for number in range(3):
        try:
            os.fstat(number)
        # or the next file opened would get this number, and the messages of C libraries
        # with it
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    # else somebody who imports this module has put a stream of his own there
    if sys.stdout is sys.__stdout__:
        sys.stdout = LossyStream(sys.stdout or open(os.devnull, "w"))
    if sys.stderr is sys.__stderr__:
        sys.stderr = LossyStream(sys.stderr or open(os.devnull, "w"))


class RunLog:
    """Prints on rank 0, and to <folder>/log.txt; `seconds` and `graphs` (newly compiled) are
    kept for every stage.
    """

    def __init__(self, folder, dist, guard=NO_GUARD):
        self.dist, self.guard, self.folder, self.seconds, self.graphs = (
            dist,
            guard,
            Path(folder),
            {},
            {},
        )
        self.file = open(self.folder / "log.txt", "a", encoding="utf-8") if dist.rank == 0 else None
        self.running = None
        if self.file:
            guard.open_log(self)

    def __call__(self, message):
        if self.file:
            self.guard.clear()
            print(message, flush=True)
            with contextlib.suppress(OSError):  # a full disk does not end a training
                print(message, file=self.file, flush=True)

    def live(self, share, detail=""):
        """How far the running stage is."""
        if self.running:
            self.guard.show(*self.running, share, detail)

    @contextlib.contextmanager
    def stage(self, name):
        """Times a stage of the run, device work included."""
        self.dist.synchronize()
        start, graphs = time.perf_counter(), compiled_graphs()
        around, self.running = self.running, (name, start)
        self.guard.enter_stage(name)
        self.live(0.0)
        yield
        self.dist.synchronize()
        self.running = around
        self.guard.enter_stage(around[0] if around else name)  # what follows a stage counts to it
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)
        self.graphs[name] = self.graphs.get(name, 0) + compiled_graphs() - graphs
        self(f"stage:{name} seconds:{self.seconds[name]:.2f} graphs_compiled:{self.graphs[name]}")


def compiled_graphs():
    """Number of graphs that torch.compile has made in this process."""
    return (
        torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if "torch._dynamo" in sys.modules
        else 0
    )


def balance(items, cost, bins):
    """Items in order, each into the bin with the least cost so far (ties: the first) -> list of
    bins.
    """
    shares, load = [[] for _ in range(bins)], [0] * bins
    for item in items:
        lightest = load.index(min(load))
        shares[lightest].append(item)
        load[lightest] += cost(item)
    return shares


def write_atomically(path, data):
    """Bytes to a file that is either whole or absent: temporary name, sync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # where the disk is full
    folder = os.open(path.parent, os.O_RDONLY)
    # the new name too is to outlive a crash, where the file system can do that
    with contextlib.suppress(OSError):
        os.fsync(folder)
    os.close(folder)


# ---- DATA ----------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def load_data_shard(path):
    """File -> (n,) uint16, memory-mapped.

    Raises DataError on a wrong magic, version or size (README: data).
    """
    header = np.fromfile(path, "<i4", 3).tolist()
    if header != (
        due := [SHARD_MAGIC, SHARD_VERSION, (os.path.getsize(path) - SHARD_HEADER_BYTES) / 2]
    ):
        raise DataError(
            f"{path}: magic, version and tokens {header} are not {due}: no shard, or torn; fetch it"
            " again"
        )
    try:
        return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EINVAL):
            raise
        # a file system that maps no files
        return np.fromfile(path, "<u2", offset=SHARD_HEADER_BYTES)


class MappedShards:
    """The shards at these paths, as a sequence.

    Few are mapped at a time: each map keeps a file open.
    """

    def __init__(self, paths):
        self.paths = paths
        self.load = lru_cache(64)(load_data_shard)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        return self.load(self.paths[number])


def shard_paths(folder, split):
    """The files of split "train", "val" or "val_bytes", in order.

    The six digits keep side-cars out of "val".
    """
    folder = glob.escape(str(folder))  # a name with brackets is no pattern
    return sorted(
        glob.glob(os.path.join(folder, f"fineweb_{split}_[0-9][0-9][0-9][0-9][0-9][0-9].bin"))
    )


class TokenStream:
    """All shards of a split as one endless stream: document and row borders may lie anywhere,
    nothing is dropped.
    """

    def __init__(self, folder, split):
        self.paths = shard_paths(folder, split)
        if not self.paths:
            raise DataError(
                f"no fineweb_{split}_*.bin in {folder}: set DATA_PATH, or make the data (README)"
            )
        self.shards = MappedShards(self.paths)
        self.offsets = np.concatenate([[0], np.cumsum([len(shard) for shard in self.shards])])
        self.first, self.size = 0, int(self.offsets[-1])  # the stream is this part of the shards
        if self.size == 0 or self.read(0, 1)[0] != BOS_ID:
            raise DataError(
                f"{self.paths[0]}: the stream must start with BOS (id {BOS_ID}); rebuild the data"
            )

    def read(self, start, count):
        """(count,) uint16 from position `start` on; the stream goes round at its end."""
        parts, start = [], start % self.size
        while count > 0:
            position = self.first + start
            shard = int(np.searchsorted(self.offsets, position, side="right")) - 1
            part = self.shards[shard][position - self.offsets[shard] :][
                : min(count, self.size - start)
            ]
            parts.append(part)
            count, start = count - len(part), (start + len(part)) % self.size
        return np.concatenate(parts)

    def hold_out(self, count):
        """Cuts off the last documents of the stream, `count` tokens or more -> a stream of
        these.
        """
        border, window = self.size - count, 1 << 16
        begins = np.zeros(0, np.int64)
        while border > 0 and not len(begins):
            first = max(0, border - window)
            begins = first + np.flatnonzero(self.read(first, border - first) == BOS_ID)
            border = first
        if not len(begins) or begins[-1] == 0:
            raise DataError(
                f"{self.paths[0]}: no document begins before the last {count} tokens: set "
                "QUANT_CHECK_ROWS=0"
            )
        rest = copy.copy(self)
        rest.first = self.first + int(begins[-1])
        rest.size = self.size - int(begins[-1])
        self.size = int(begins[-1])
        return rest


def read_manifest(folder):
    """manifest.json of a dataset, {} where there is none.

    DataError unless all that is read of it has its type.
    """
    try:
        manifest = json.loads(Path(folder, "manifest.json").read_text())
        hash(manifest.get("tokenizer", {}).get("sha256"))
        if manifest.get("format") == "caseops_shards":
            values = [
                about["values"] + len(about["sha256"]) for about in manifest["files"].values()
            ]
            sum(values, manifest["leaked_documents"] + len({**manifest["splits"]["val"]}))
        return manifest
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{folder}/manifest.json is damaged ({error!r}): fetch or make the dataset again"
        ) from None


def leaked_documents(hp):
    """{"leaked_documents": number} for RESULT, where the dataset's manifest has counted them."""
    manifest = read_manifest(hp.data_path)
    return {name: manifest[name] for name in ("leaked_documents",) if name in manifest}


def text_problems(hp, manifest):
    """Messages where the bytes of these tokens cannot be those of the side-car."""
    if not manifest.get("text_transform", True):
        yield (
            "its manifest says that the text was not transformed: run presets/published.py with"
            " CASEOPS_ENABLED=0"
        )


def check_data_settings(hp):
    """DataError where the settings contradict the side-car or the manifest: the bytes would be
    wrong.
    """
    folder = Path(hp.data_path)
    manifest = read_manifest(folder)
    wrong = [*text_problems(hp, manifest)]
    size = manifest.get("tokenizer", {}).get("vocab_size", hp.vocab_size)
    if size != hp.vocab_size:
        wrong.append(f"its manifest says VOCAB_SIZE={size}, not {hp.vocab_size}")
    if wrong:
        raise DataError(f"{folder}: {'; '.join(wrong)}")


def check_manifest(hp, found):
    """DataError where the dataset is not what its manifest says, so that no BPB of other data is
    reported. `found` counts what the validation files hold. These are hashed; of training files
    only the lengths are checked, because hashing them takes minutes (`prepare_caseops_data.py
    verify` does).
    """
    manifest = read_manifest(hp.data_path)
    if manifest.get("format") != "caseops_shards":
        return
    stated, files = manifest["splits"]["val"], manifest["files"]
    wrong = [
        f"{count} {name} of validation, not {stated.get(name)}"
        for name, count in found.items()
        if stated.get(name) != count
    ]
    paths = {path.name: path for path in Path(hp.data_path).glob("fineweb_*.bin")}
    wrong += [f"{name} is missing" for name in files.keys() - paths.keys()]
    for name, path in paths.items():
        same = name in files and len(load_data_shard(path)) == files[name]["values"]
        if same and "_val_" in name:
            same = hashlib.sha256(Path(path).read_bytes()).hexdigest() == files[name]["sha256"]
        if not same:
            wrong.append(f"{name} is another file")
    # a wrong split; sources hold a few documents twice
    if manifest["leaked_documents"] > 0.01 * found["documents"]:
        wrong.append(f"{manifest['leaked_documents']} training documents are validation documents")
    if wrong:
        raise DataError(
            f"{hp.data_path} is not what its manifest says: {'; '.join(sorted(wrong)[:5])}. Fetch"
            " or make it again; prepare_caseops_data.py verify says more"
        )


# FineWeb's documents and values; targets that whole windows of 2,048 tokens hold, and the bytes of
# these
CANONICAL = 50_000, 47_853_344, 47_851_520, 151_074_499


def is_canonical(tokens, charges):
    """Whether (N,) tokens are the contest's validation documents as CaseOps stores them, by
    counts and by bytes.
    """
    documents, values, targets, size = CANONICAL
    counts = (int((tokens == BOS_ID).sum()), len(tokens)) == (documents, values)
    return counts and int(charges[1 : targets + 1].sum(dtype=np.int64)) == size


class Row(NamedTuple):
    """One packed row on the device."""

    inputs: Tensor  # (1, T) int64
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (N + 1,) int32: where each document or piece starts, padded by repeating T


def cut_pieces(starts, ends, length):
    """Starts and ends of segments -> starts of their pieces, none longer than `length`."""
    pieces = -(-(ends - starts) // length)
    first = np.cumsum(pieces) - pieces
    return np.repeat(starts, pieces) + length * (np.arange(pieces.sum()) - np.repeat(first, pieces))


def join_shortest(starts, total, longest, most):
    """Starts of pieces of a row -> at most `most`: the shortest neighbours become one, none longer
    than `longest`. Of equal ones the first. Where that does not do, the row is cut in equal pieces:
    `most` of these must be enough.
    """
    count = len(starts)
    if count <= most:
        return starts
    borders = [*starts.tolist(), total]
    following, before, joined = [*range(1, count + 1)], [*range(-1, count)], [False] * count
    # length of both, where, the first
    pairs = [(borders[i + 2] - borders[i], borders[i], i) for i in range(count - 1)]
    # a search through all of them for each join takes seconds for rows of short documents
    heapq.heapify(pairs)
    while count > most and pairs and pairs[0][0] <= longest:
        length, _, first = heapq.heappop(pairs)
        second = following[first]
        if (
            joined[first]
            or second == len(starts)
            or borders[following[second]] - borders[first] != length
        ):
            continue  # one of them has grown, or is gone, since this was noted
        joined[second], count = True, count - 1
        following[first] = after = following[second]
        before[after] = first
        if after < len(starts):
            heapq.heappush(
                pairs, (borders[following[after]] - borders[first], borders[first], first)
            )
        if before[first] >= 0:
            previous = before[first]
            heapq.heappush(pairs, (borders[after] - borders[previous], borders[previous], previous))
    return starts[~np.array(joined)] if count <= most else np.arange(0, total, longest)


def pad_cu_seqlens(starts, total, entries):
    """Segment starts -> (entries + 1,) int32, padded with `total`, so that one graph serves
    every row.
    """
    if len(starts) > entries:
        raise DataError(
            f"a row holds {len(starts)} documents and pieces, more than {entries}: raise"
            " MAX_ROW_SEGMENTS"
        )
    return np.concatenate([starts, np.full(entries + 1 - len(starts), total)]).astype(np.int32)


def deal_documents(tokens, longest):
    """Inputs and targets (2, rows, T) -> the same documents, dealt so that attention has as much
    work
    in every row: the longest first, to the row with the least work that has room. Pieces of
    `longest` attend only to themselves.
    """
    if (tokens[0, :, 0] != BOS_ID).any():
        return tokens  # a document longer than its row stays where it is
    rows, total = tokens.shape[1:]
    flat, dealt, work, room = (
        tokens.reshape(2, -1),
        [[] for _ in range(rows)],
        np.zeros(rows),
        np.full(rows, total),
    )
    documents = np.split(flat, np.flatnonzero(flat[0] == BOS_ID)[1:], 1)
    for document in sorted(documents, key=lambda document: -document.shape[1]):
        whole, rest = divmod(length := document.shape[1], longest)
        # without room anywhere: the emptiest
        row = np.where(room < length, 1e15 - room, work).argmin()
        dealt[row].append(document)
        work[row] += whole * longest**2 + rest**2
        room[row] -= length
    return np.concatenate(sum(dealt, []), 1).reshape(tokens.shape)


class TrainLoader:
    """Packed training rows by number: T tokens from the first document on that begins in the
    stream's
    i-th span. A step of n micro-steps takes rows [step n, (step + 1) n), rank r its r-th share: the
    same rows for any world size. BALANCE_ROWS deals the documents of a step out to its rows anew:
    ranks wait for the one with the most attention. Spans are as long as rows;
    DATA_SEED shuffles them, anew in each epoch. The loader has no state but read-ahead: the number
    of a step restores it exactly.
    """

    def __init__(self, stream, hp, dist):
        self.stream, self.hp, self.dist = stream, hp, dist
        if (steps := hp.train_batch_tokens / hp.micro_batch_tokens) % dist.world_size:
            raise SettingError(
                f"{steps:g} micro-batches a step (TRAIN_BATCH_TOKENS/MICRO_BATCH_TOKENS) do not "
                f"divide by {dist.world_size} ranks: change MICRO_BATCH_TOKENS"
            )
        self.per_rank = hp.micro_steps // dist.world_size
        self.span = self.span_length()
        # a twentieth at most
        self.held_out_rows = min(hp.quant_check_rows, stream.size // (20 * self.span))
        if self.held_out_rows:
            self.held_out = stream.hold_out(
                (self.held_out_rows - 1) * self.span + self.tokens_to_read
            )
        self.thread = ThreadPoolExecutor(1)
        self.ahead, self.dealt = {}, lru_cache(1)(self.deal)  # rows read ahead; the last step dealt

    def span_length(self):
        """Tokens of the stream from one row's span to the next."""
        return self.hp.micro_batch_tokens

    def start(self, index):
        """Where row `index` begins in the stream: at a BOS, if there is one in its span."""
        start, spans = index * self.span, max(1, self.stream.size // self.span)
        if self.hp.data_seed:
            rng = np.random.default_rng([self.hp.data_seed, index // spans])  # of the epoch
            start = int(rng.integers(self.span) + rng.permutation(spans)[index % spans] * self.span)
        return start + int((self.stream.read(start, self.span) == BOS_ID).argmax())

    @property
    def tokens_to_read(self):
        """Tokens of the stream that fill a row and its last target."""
        return self.hp.micro_batch_tokens + 1

    def read_row(self, stream, start):
        """(T + 1,) tokens of the row that begins at this position of a stream."""
        tokens = stream.read(start, self.tokens_to_read)
        if tokens.max() >= self.hp.vocab_size:
            raise DataError(
                f"training token {tokens.max()} is outside VOCAB_SIZE={self.hp.vocab_size}"
            )
        return tokens

    def read_rows(self, stream, starts):
        """(2, n, T): inputs and targets of the rows that begin at n positions of a stream."""
        rows = np.stack([self.read_row(stream, start) for start in starts])
        return np.stack([rows[:, :-1], rows[:, 1:]])

    def deal(self, step):
        """(2, n, T): inputs and targets of the n rows of a step over all ranks."""
        hp = self.hp
        starts = map(self.start, range(step * hp.micro_steps, (step + 1) * hp.micro_steps))
        tokens = self.read_rows(self.stream, starts)
        return deal_documents(tokens, hp.train_seq_len) if hp.balance_rows else tokens

    def build(self, index):
        """Row `index` as CPU tensors, pinned for CUDA."""
        step, number = divmod(index, self.hp.micro_steps)
        return self.pack(self.dealt(step)[:, number])

    def held_out_row(self, index):
        """Row `index` of those that neither training nor the Hessians see, on the device."""
        row = self.pack(self.read_rows(self.held_out, [index * self.span])[:, 0])
        return Row(*(t.to(self.dist.device) for t in row))

    def pack(self, tokens):
        """(2, T): inputs and targets of a row -> Row of CPU tensors, pinned for CUDA."""
        length, hp = self.hp.micro_batch_tokens, self.hp
        inputs, targets = tokens.astype(np.int64)
        starts = np.union1d(0, np.flatnonzero(inputs == BOS_ID))
        pieces = cut_pieces(starts, np.append(starts[1:], length), hp.train_seq_len)
        # rarely more than attention has
        pieces = join_shortest(pieces, length, hp.train_seq_len, hp.row_segments)
        cu_seqlens = pad_cu_seqlens(pieces, length, hp.row_segments)
        row = Row(*map(torch.from_numpy, (inputs[None], targets, cu_seqlens)))
        return Row(*(t.pin_memory() for t in row)) if self.dist.device.type == "cuda" else row

    def row(self, index, following=None):
        """Row `index` on the device; `following` is read ahead meanwhile."""
        future = self.ahead.pop(index, None) or self.thread.submit(self.build, index)
        row = future.result()
        self.ahead = (
            {following: self.thread.submit(self.build, following)} if following is not None else {}
        )
        return Row(*(t.to(self.dist.device, non_blocking=True) for t in row))

    def step(self, step):
        """Yields this rank's rows of a step."""
        first = step * self.hp.micro_steps + self.dist.rank * self.per_rank
        for index in range(first, first + self.per_rank):
            last = index == first + self.per_rank - 1
            yield self.row(index, first + self.hp.micro_steps if last else index + 1)


class ValidationSet:
    """The validation stream: tokens (N,), bytes charged to each token (N,), the documents' input
    spans
    [start, end). A document's targets are its tokens after BOS and the BOS that follows it, so
    every token but the first is a target of exactly one document. `summary` is for the log. Raises
    DataError before anything is trained.
    """

    def __init__(self, hp):
        stream = TokenStream(hp.data_path, "val")
        check_data_settings(hp)
        self.tokens = stream.read(0, stream.size).astype(np.int64)
        if self.tokens.max() >= hp.vocab_size:
            raise DataError(
                f"validation token {self.tokens.max()} is outside VOCAB_SIZE={hp.vocab_size}"
            )
        self.bytes = self.count_bytes(hp, stream)
        if len(self.tokens) < 2:
            raise DataError(f"{stream.paths[0]}: a validation stream needs two tokens at least")
        self.summary = self.check(hp)
        if not self.bytes[1:].any():
            raise DataError(
                f"{stream.paths[0]}: the validation documents hold no byte of text: no BPB can be"
                " counted"
            )
        self.find_documents()

    def find_documents(self):
        """Sets the documents' starts and ends, (n,) each."""
        self.starts = np.flatnonzero(self.tokens == BOS_ID)
        # the last document has no BOS to predict
        self.ends = np.append(self.starts[1:], len(self.tokens) - 1)

    def figures(self):
        """What a manifest states of the stream as it is stored."""
        documents, size = int((self.tokens == BOS_ID).sum()), int(self.bytes.sum())
        return {"documents": documents, "tokens": len(self.tokens), "charged_bytes": size}

    def count_bytes(self, hp, stream):
        """(N,) int64 bytes charged to each token of the stream."""
        return self.side_car(hp.data_path, stream)

    def check(self, hp):
        """Stream as stored -> a phrase for the log.

        DataError where the manifest has another one.
        """
        found = self.figures()
        check_manifest(hp, found)
        canonical = "yes" if is_canonical(self.tokens, self.bytes) else "no"
        size = int(self.bytes.sum())
        return (
            f"documents:{found['documents']} values:{len(self.bytes)} bytes:{size}"
            f" canonical:{canonical}"
        )

    def side_car(self, folder, stream):
        """(N,) int64 bytes of each token.

        Raises DataError where it is missing, of another length, or charges a BOS.
        """
        paths = shard_paths(folder, "val_bytes")
        parts = [load_data_shard(path) for path in paths]
        if not paths:
            raise DataError(f"no fineweb_val_bytes_*.bin in {folder}: BPB needs the side-car")
        if [len(part) for part in parts] != [len(shard) for shard in stream.shards]:
            raise DataError(
                f"{paths[0]}: side-car lengths {[len(p) for p in parts]} differ from the shards' "
                f"{[len(s) for s in stream.shards]}: they are not of one export"
            )
        charges = np.concatenate(parts).astype(np.int64)
        if charges[self.tokens == BOS_ID].any():
            raise DataError(
                f"{paths[0]}: a BOS is charged bytes; the side-car does not belong to these tokens"
            )
        return charges

    def targets_of(self, documents):
        """Number of targets and their bytes for an array of document numbers."""
        sums = np.concatenate([[0], np.cumsum(self.bytes)])
        starts, ends = self.starts[documents], self.ends[documents]
        return int((ends - starts).sum()), int((sums[ends + 1] - sums[starts + 1]).sum())


def models_near(folder, nearest):
    """SentencePiece models in and around a dataset's folder, in order of distance; `nearest`: of
    one
    place only.

    DataError where that place holds several different ones: nothing says which of them made the
    shards.
    """
    places = (
        folder,
        *(
            path / "tokenizers"
            for path in (folder.parent, folder.parent.parent, Path(__file__).parent)
        ),
    )
    groups = [sorted(place.glob("*.model")) for place in places]
    if not nearest:
        return sum(groups, [])
    found = next((group for group in groups if group), [])
    if len({path.read_bytes() for path in found}) > 1:
        names = ", ".join(str(path) for path in found)
        raise DataError(
            f"{folder}: no manifest names its tokenizer, there are several ({names}): set"
            " TOKENIZER_PATH"
        )
    return found


def find_tokenizer(hp):
    """Path of the data's SentencePiece model.

    DataError if none fits the settings and the manifest.
    """
    try:
        import sentencepiece
    except ImportError:
        raise DataError(
            "the sentencepiece package is missing: pip install -r requirements.txt"
        ) from None
    folder = Path(hp.data_path)
    wanted = read_manifest(folder).get("tokenizer", {}).get("sha256")
    if hp.tokenizer_path:
        found = [Path(hp.tokenizer_path)]
    else:
        found = models_near(folder, nearest=wanted is None)
    for path in found:
        if not path.exists():
            raise DataError(f"TOKENIZER_PATH={path} does not exist")
        if wanted in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
            try:
                tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
                # a damaged piece may be no text
                tokenizer.id_to_piece([*range(tokenizer.vocab_size())])
            except (RuntimeError, UnicodeDecodeError):
                raise DataError(f"{path} is no SentencePiece model") from None
            if tokenizer.vocab_size() != hp.vocab_size:
                raise DataError(
                    f"{path} has {tokenizer.vocab_size()} pieces, VOCAB_SIZE is {hp.vocab_size}"
                )
            return path
    raise DataError(
        f"no tokenizer for {folder} (the manifest wants sha256 {wanted}; looked at "
        f"{[str(p) for p in found]}): set TOKENIZER_PATH"
    )


def load_tokenizer(hp):
    """The data's SentencePiece model."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(find_tokenizer(hp)))


# ---- KERNELS -------------------------------------------------------------------------------------
# Each operation stands twice with one signature: the reference (`*_ref`, `attention_sdpa`: any
# device, any dtype, autograd for free) and the fast version, a custom op that torch.compile takes
# as one node. `select_ops` chooses. Inside kernels no Python global and no True/False/None: a
# minifier may move those to module level, where Triton refuses them. Annotations stand where they
# are read at run time (tl.constexpr, op schemas): the minifier keeps them.

# without Triton kernels are defined, never launched
jit = (lambda kernel: kernel) if triton is None else triton.jit


@jit
def load_f32(pointers, mask):  # 0 where masked; tl.store casts back by itself
    return tl.load(pointers, mask, 0.0).to(tl.float32)


def golf_op(fake, gradients=None, keep=lambda needed, *tensors: tensors, results=1):
    """Decorator: function of tensors and, last, one number -> custom op; fake(*inputs), or the
    function itself, gives its results without data. With gradients(needed, *grads, *kept, number)
    -> those of the leading inputs, it is differentiable and returns the first of its results, or
    all where `results` says that they are several and all differentiable; keep(needed, *tensors,
    *results) -> kept, default everything; needed[i]: input i requires one.
    """

    def setup(ctx, inputs, output):
        *tensors, ctx.number = inputs
        # or autograd fills zeros for the results that nobody differentiates
        ctx.set_materialize_grads(results > 1)
        ctx.save_for_backward(*keep(ctx.needs_input_grad, *tensors, *output))

    def backward(ctx, *grads):
        needed = ctx.needs_input_grad
        grads = (
            ()
            if grads[0] is None
            else gradients(needed, *grads[:results], *ctx.saved_tensors, ctx.number)
        )
        return *grads, *[None] * (len(needed) - len(grads))

    def register(function):
        op = torch.library.custom_op(
            "golf::" + function.__name__.strip("_"), function, mutates_args=()
        )
        op.register_fake(fake or function)
        if gradients is None:
            return op
        op.register_autograd(backward, setup_context=setup)
        return op if results > 1 else lambda *inputs: op(*inputs)[0]

    return register


# --- head with softcapped cross-entropy: z = softcap * tanh(h @ weight.T / softcap), loss =
# logsumexp(z) - z[target] One pass over the logits puts the gradients of the losses in their place;
# backward, the loss's own scale the products.


def softcapped_cross_entropy_ref(logits, targets, softcap):
    """logits (N, V), targets (N,) int64 in [0, V) -> losses (N,) in fp32, nats.

    The definition of the operation.
    """
    return F.cross_entropy(
        softcap * torch.tanh(logits.float() / softcap), targets, reduction="none"
    )


def linear_cross_entropy_ref(h, weight, targets, softcap):
    """h (N, D), weight (V, D), targets (N,) int64 in [0, V) -> losses (N,) in fp32, nats;
    logits in the dtype of h.
    """
    return softcapped_cross_entropy_ref(F.linear(h, weight), targets, softcap)


@jit
def _ce_kernel(logits, targets, losses, V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Losses, and the gradient of each row's loss in place of its logits.

    The cap bounds exp(z): no peak is sought.
    """
    # 64 bits: rows x vocabulary may exceed 2^31
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, target = columns < V, tl.load(targets + row)
    logits += row * V
    z_target = CAP * (2 * tl.sigmoid(tl.load(logits + target).to(tl.float32) * (2 / CAP)) - 1)
    tanh = 2 * tl.sigmoid(load_f32(logits + columns, inside) * (2 / CAP)) - 1
    exps = tl.where(inside, tl.exp(CAP * tanh), 0.0)
    total = tl.sum(exps, 0)
    tl.store(losses + row, tl.log(total) - z_target)
    d = (exps * (1 / total) - tl.where(columns == target, 1.0, 0.0)) * (1 - tanh * tanh)
    tl.store(logits + columns, d, inside)


def _launch_ce(logits, targets, softcap):
    """logits (N, V), overwritten, targets (N,) -> losses (N,); a program a row, 16 logits a
    thread at V = 8,192.
    """
    N, V = logits.shape
    losses = logits.new_empty(N, dtype=torch.float32)
    block = triton.next_power_of_2(V)
    if N > 0:
        _ce_kernel[N,](
            logits,
            targets.contiguous(),
            losses,
            V=V,
            CAP=softcap,
            BLOCK=block,
            num_warps=min(32, block // 512 or 1),
        )
    return losses


def _ce_gradients(needed, grad, h, weight, unit, softcap):
    grad_h = ((unit @ weight) * grad[:, None]).to(h.dtype) if needed[0] else None
    return grad_h, unit.T @ (h * grad[:, None]).to(h.dtype) if needed[1] else None


@golf_op(
    lambda h, weight, *_: (
        h.new_empty(h.shape[0], dtype=torch.float32),
        h.new_empty(h.shape[0], weight.shape[0]),
    ),
    _ce_gradients,
    lambda needed, h, weight, targets, losses, unit: (h, weight, unit),
)
def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """h (N, D), weight (V, D), targets (N,) int64 in [0, V) -> losses (N,) in fp32, nats;
    logits in the dtype of h.
    """
    logits = h @ weight.T
    return _launch_ce(logits, targets, softcap), logits


# --- squared leaky ReLU MLP: leaky_relu(x @ w_up.T, slope)^2 @ w_down.T. Quack's products
# (quack-kernels) end with the activation or, backward, its derivative; others are cuBLAS. For the
# derivative the activation alone is kept: its root is the size of the first product, its lowest bit
# stores the sign.


def mlp_ref(x, w_up, w_down, slope):
    """x (..., D), w_up (F, D), w_down (D, F) -> (..., D). The definition of the operation."""
    return F.linear(F.leaky_relu(F.linear(x, w_up), slope).square(), w_down)


@lru_cache
def mlp_products(slope, dtype):
    """0 <= slope <= 1 -> forward: act of a @ b.T; backward: (a @ b) act'. Operands of an epilogue
    go
    by name: acc, c. Compiled when first called, 10 s for all ranks of a host, then cached on disk.
    ValueError: another GPU or dtype.
    """
    if torch.cuda.get_device_capability()[0] != 9 or dtype != torch.bfloat16:
        raise ValueError("needs sm_90 and bfloat16")
    import cutlass
    from quack.epilogue import EpiMod

    def forward(acc):  # to the nearest number of 16 bits whose lowest tells the side
        left = acc.bitcast(cutlass.Int32) >> 15 & 65536
        leaky = cutlass.cute.arch.fmax(acc, acc * slope)
        return {
            "D": (
                ((leaky * leaky).bitcast(cutlass.Int32) + 65536 - left & -131072 | left).bitcast(
                    cutlass.Float32
                )
            )
        }

    def backward(acc, c):  # c: act; the derivative is 2 sqrt(act), times -slope on the left
        side = cutlass.select_(c.bitcast(cutlass.Int32) & 65536 == 0, 2.0, -2.0 * slope)
        return {"D": acc * (cutlass.cute.math.sqrt(c, fastmath=True) * cutlass.Float32(side))}

    return EpiMod(forward), EpiMod(backward)


def _launch_mlp(a, b, act, slope):
    """a (M, K), b (N, K), None -> act (M, N); a (M, K), b (K, N), act (M, N) -> (M, N):
    backward.
    """
    backward = act is not None
    tensors = [a, b, a.new_empty(a.shape[0], b.shape[backward]), *((act,) if backward else ())]
    # rows and a base that TMA can address; one row is contiguous whatever its stride
    for i, t in enumerate(tensors):
        t = t.detach().contiguous().flatten().view(t.shape)
        tensors[i] = t if t.data_ptr() % 16 == 0 else t.clone()
    mlp_products(slope, a.dtype)[backward].gemm(
        *tensors,
        epi_args={},
        tile_M=192,
        tile_N=128,
        cluster_M=1,
        cluster_N=2,
        pingpong=True,
        b_kn=backward,
    )
    return tensors[2]


@golf_op(lambda grad, w_down, act, _: torch.empty_like(act))
def _mlp_backward(grad: Tensor, w_down: Tensor, act: Tensor, slope: float) -> Tensor:
    return _launch_mlp(grad, w_down, act, slope)


def _mlp_gradients(needed, grad, x, w_up, w_down, act, slope):
    grad_down = grad.T @ act if needed[2] else None
    grad_pre = _mlp_backward(grad, w_down, act, slope) if needed[0] or needed[1] else None
    grad_up = grad_pre.T @ x if needed[1] else None
    return grad_pre @ w_up if needed[0] else None, grad_up, grad_down


@golf_op(
    lambda x, w_up, w_down, _: tuple(x.new_empty(x.shape[0], w.shape[0]) for w in (w_down, w_up)),
    _mlp_gradients,
    lambda needed, x, w_up, w_down, out, act: (x, w_up, w_down, act),
)
def _mlp(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    act = _launch_mlp(x, w_up, None, slope)
    return act @ w_down.T, act


def leaky_relu_sq_mlp(x, w_up, w_down, slope):
    """x (..., D), w_up (F, D), w_down (D, F), of one dtype -> (..., D).

    What TMA cannot address takes the reference.
    """
    width, hidden = w_down.shape
    if width % 8 or hidden % 8 or x.numel() == 0:  # rows of n * 16 bytes
        return mlp_ref(x, w_up, w_down, slope)
    return _mlp(x.reshape(-1, width), w_up, w_down, abs(slope)).view(x.shape)


# --- around attention. Before it: per-head RMS norm and partial RoPE for q and k, gain for q. After
# it: XSA subtracts from every head's output its part along the token's own value, and a gate scales
# the rest. The kernels work on tiles of rows; a row is one head of one token.


def norm(x):
    """(..., D) -> (..., D): RMS norm without a weight, eps of F.rms_norm for float32."""
    return F.rms_norm(x, (x.size(-1),), eps=1.19e-7)


def apply_rotary_emb(x, cos, sin):
    """x (B, T, H, E) -> the same shape, with partial RoPE (arXiv:2104.09864).

    cos and sin are ([B,] T, 1, rope_dims / 2). Dims i and i + rope_dims / 2 of the first rope_dims
    rotate together; the others stay.
    """
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    half = cos.size(-1)
    x1 = x[..., :half]
    x2 = x[..., half : 2 * half]
    rest = x[..., 2 * half :]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)


def qkv_heads_ref(qkv, gain, cos, sin, kv_heads):
    """qkv (B, T, (H + 2 K) E), gain (H,), K -> q (B, T, H, E), k and v (B, T, K, E).

    q and k are normed and rotated by cos and sin ([B,] T, 1, rope_dims / 2); q is scaled by gain.
    """
    heads = (gain.numel(), kv_heads, kv_heads)
    joint = qkv.unflatten(-1, (sum(heads), -1))
    q, k, v = joint.split(heads, dim=-2)
    q = apply_rotary_emb(norm(q), cos, sin) * gain[:, None]
    k = apply_rotary_emb(norm(k), cos, sin)
    return q, k, v


def gated_xsa_ref(y, v, logits, factor):
    """y (B, T, H, E), v (B, T, K, E), logits (B, T, H) -> (B, T, H, E), XSA (arXiv:2603.09078)
    scaled by factor * sigmoid(logits).
    """
    gate = factor * torch.sigmoid(logits)
    return subtract_own_value(y, v) * gate[..., None]


def subtract_own_value(y, v):
    """y (B, T, H, E), v (B, T, K, E) -> y without its part along the token's own value."""
    v_hat = F.normalize(v, dim=-1)[:, :, :, None]  # (B, T, K, 1, E)
    grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, K, H/K, E)
    along = (grouped * v_hat).sum(-1, keepdim=True)
    return (grouped - along * v_hat).flatten(2, 3)


def _launch_rows(kernel, tensors, rows, E, warps, *sizes, **constants):
    """Launches kernel(*tensors, rows, *sizes, **constants) over rows of E numbers, 1,024 numbers
    for each program.
    """
    if rows == 0:
        return
    block_e = triton.next_power_of_2(E)
    block = max(1, 1024 // block_e)
    programs = triton.cdiv(rows, block)
    contiguous = [t.contiguous() for t in tensors]
    kernel[(programs,)](
        *contiguous,
        rows,
        *sizes,
        **constants,
        E=E,
        BLOCK_E=block_e,
        BLOCK=block,
        num_warps=warps,
    )


@jit
def _qkv_heads_kernel(
    qkv,
    gain,
    cos,
    sin,
    q,
    k,
    v,
    d_qkv,
    dots,
    rows,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    BACKWARD: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forward: writes q, k and v. Backward: q, k and v hold their gradients; writes d_qkv, and to
    dots (B, T, H) what every query head adds to the gradient of its gain.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (row < rows)[:, None] & (e < E)
    # a token's rows: H query heads, K key heads, K value heads
    token = row // (H + 2 * K)
    head = row % (H + 2 * K)
    is_q = head < H
    is_v = (head >= H + K)[:, None]
    # where a row begins in qkv, and in q, k or v
    joint = row[:, None] * E
    key_row = k + (token * K + head - H) * E
    value_row = v + (token * K + head - H - K) * E
    split = tl.where(head < H + K, key_row, value_row)
    split = tl.where(is_q, q + (token * H + head) * E, split)[:, None]
    # partial RoPE rotates the first 2 HALF dims, each with its partner; sin has opposite signs in
    # the two halves
    rotates = inside & (e < 2 * HALF)
    partner = tl.where(e < HALF, e + HALF, e - HALF)
    angle = (token % T)[:, None] * HALF + e % HALF
    c = tl.load(cos + angle, mask=rotates, other=1.0)
    s = load_f32(sin + angle, rotates) * tl.where(e < HALF, 1.0, -1.0)
    # RMS norm, and the gain, which k and v do not have
    x = load_f32(qkv + joint + e, inside)
    scale = tl.rsqrt(tl.sum(x * x, 1) / E + 1.19e-7)[:, None]
    head_gain = tl.load(gain + head, mask=is_q, other=1.0).to(tl.float32)
    gained = scale * head_gain[:, None]
    if BACKWARD:
        d = load_f32(split + e, inside)
        rotated = d * c - s * load_f32(split + partner, rotates)  # transposed rotation
        dot = tl.sum(x * scale * rotated, 1)
        d_x = gained * (rotated - x * scale * (dot / E)[:, None])
        tl.store(d_qkv + joint + e, tl.where(is_v, d, d_x), inside)
        tl.store(dots + token * H + head, dot, is_q & (row < rows))
    else:
        rotated = x * c + s * load_f32(qkv + joint + partner, rotates)
        tl.store(split + e, tl.where(is_v, x, rotated * gained), inside)


def _launch_qkv_heads(qkv, gain, cos, sin, heads, grads=None):
    """Fills heads (q, k, v); given grads (d_qkv, dots), fills these from the gradients in heads."""
    H, E = heads[0].shape[2:]
    outputs = (qkv, qkv) if grads is None else grads  # forward does not write these arguments
    _launch_rows(
        _qkv_heads_kernel,
        (qkv, gain, cos, sin, *heads, *outputs),
        qkv.numel() // E,
        E,
        1,
        cos[..., 0].numel(),
        H=H,
        K=heads[1].shape[2],
        HALF=cos.shape[-1],
        BACKWARD=grads is not None,
    )


def _empty_heads(qkv, gain, cos, sin, kv_heads):
    """The arguments of qkv_heads -> empty q (B, T, H, E), k and v (B, T, K, E)."""
    B, T, width = qkv.shape
    H = gain.numel()
    E = width // (H + 2 * kv_heads)
    q = qkv.new_empty(B, T, H, E)
    k = qkv.new_empty(B, T, kv_heads, E)
    return q, k, torch.empty_like(k)


@torch.library.custom_op("golf::qkv_heads", mutates_args=())
def qkv_heads(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As qkv_heads_ref, in one kernel each for forward and backward."""
    heads = _empty_heads(qkv, gain, cos, sin, kv_heads)
    _launch_qkv_heads(qkv, gain, cos, sin, heads)
    return heads


qkv_heads.register_fake(_empty_heads)


def _empty_qkv_grads(dq, dk, dv, qkv, *others):
    """-> empty gradient of qkv, and the terms (B, T, H) of the gradient of gain."""
    d_qkv = qkv.new_empty(qkv.shape)
    dots = dq.new_empty(dq.shape[:3], dtype=torch.float32)
    return d_qkv, dots


@torch.library.custom_op("golf::qkv_heads_backward", mutates_args=())
def _qkv_heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_heads: int,
) -> tuple[Tensor, Tensor]:
    grads = _empty_qkv_grads(dq, dk, dv, qkv)
    _launch_qkv_heads(qkv, gain, cos, sin, (dq, dk, dv), grads)
    return grads


_qkv_heads_backward.register_fake(_empty_qkv_grads)


def _qkv_heads_setup(ctx, inputs, output):
    *tensors, ctx.kv_heads = inputs
    ctx.save_for_backward(*tensors)


def _qkv_heads_gradients(ctx, dq, dk, dv):
    d_qkv, dots = _qkv_heads_backward(dq, dk, dv, *ctx.saved_tensors, ctx.kv_heads)
    d_gain = None
    if ctx.needs_input_grad[1]:
        d_gain = dots.sum((0, 1)).to(d_qkv.dtype)
    return d_qkv, d_gain, None, None, None


qkv_heads.register_autograd(_qkv_heads_gradients, setup_context=_qkv_heads_setup)


@jit
def _gated_xsa_kernel(
    y,
    v,
    logits,
    grad,
    out,
    dv,
    dlogits,
    rows,
    FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
    BACKWARD: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forward: writes out. Backward: reads grad, that of the output; out is the gradient of y.

    A row is a key/value head, with the GROUP query heads that share it.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, BLOCK_E)[None, :]
    in_rows = row < rows
    inside = in_rows[:, None] & (e < E)
    v_hat = load_f32(v + row[:, None] * E + e, inside)
    length = tl.sqrt(tl.sum(v_hat * v_hat, 1))
    inverse = 1 / tl.maximum(length, 1e-12)[:, None]
    v_hat *= inverse
    d_hat = tl.zeros((BLOCK, BLOCK_E), dtype=tl.float32)
    for i in tl.static_range(GROUP):
        head = row * GROUP + i
        at = head[:, None] * E + e
        x = load_f32(y + at, inside)
        gate = tl.sigmoid(load_f32(logits + head, in_rows))
        along = tl.sum(x * v_hat, 1)[:, None]
        z = x - along * v_hat
        if BACKWARD:
            d = FACTOR * load_f32(grad + at, inside)
            dlogit = gate * (1 - gate) * tl.sum(d * z, 1)
            tl.store(dlogits + head, dlogit, in_rows)
            d *= gate[:, None]
            d_along = tl.sum(d * v_hat, 1)[:, None]
            d_hat -= along * d + d_along * x
            tl.store(out + at, d - d_along * v_hat, inside)
        else:
            tl.store(out + at, z * (FACTOR * gate[:, None]), inside)
    if BACKWARD:  # through the normalisation of v
        d_along = tl.sum(d_hat * v_hat, 1)[:, None]
        tl.store(dv + row[:, None] * E + e, inverse * (d_hat - d_along * v_hat), inside)


def _launch_gated_xsa(inputs, outputs, factor, grad=None):
    """Fills outputs: (out,), or given the gradient of out those of inputs (y, v, logits)."""
    y, v, _ = inputs
    E = v.shape[-1]
    if grad is None:  # forward does not use the arguments that y stands for
        tensors = (*inputs, y, *outputs, y, y)
    else:
        tensors = (*inputs, grad, *outputs)
    _launch_rows(
        _gated_xsa_kernel,
        tensors,
        v.numel() // E,
        E,
        4,
        FACTOR=factor,
        GROUP=y.shape[-2] // v.shape[-2],
        BACKWARD=grad is not None,
    )


@torch.library.custom_op("golf::gated_xsa", mutates_args=())
def gated_xsa(y: Tensor, v: Tensor, logits: Tensor, factor: float) -> Tensor:
    """As gated_xsa_ref, in one kernel each for forward and backward."""
    out = y.new_empty(y.shape)
    _launch_gated_xsa((y, v, logits), (out,), factor)
    return out


@gated_xsa.register_fake
def _gated_xsa_fake(y, v, logits, factor):
    return y.new_empty(y.shape)


def _empty_xsa_grads(grad, y, v, logits, factor):
    return y.new_empty(y.shape), v.new_empty(v.shape), logits.new_empty(logits.shape)


@torch.library.custom_op("golf::gated_xsa_backward", mutates_args=())
def _gated_xsa_backward(
    grad: Tensor, y: Tensor, v: Tensor, logits: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _empty_xsa_grads(grad, y, v, logits, factor)
    _launch_gated_xsa((y, v, logits), grads, factor, grad)
    return grads


_gated_xsa_backward.register_fake(_empty_xsa_grads)


def _gated_xsa_setup(ctx, inputs, output):
    *tensors, ctx.factor = inputs
    ctx.save_for_backward(*tensors)


def _gated_xsa_gradients(ctx, grad):
    grads = _gated_xsa_backward(grad, *ctx.saved_tensors, ctx.factor)
    return *grads, None


gated_xsa.register_autograd(_gated_xsa_gradients, setup_context=_gated_xsa_setup)


# --- input of a slot: the residual stream merges with a skip, mixes with x0 and is normed. Inductor
# fuses forward well. In backward it fuses the reductions over tokens of several slots into kernels
# that spill registers; this is one kernel per slot.


class SlotInput(NamedTuple):
    h: Tensor  # (B, T, D), the scaled norm of the mix
    gate_input: Tensor  # (B, T, window), first columns of h
    mixed: Tensor | None  # (B, T, D), the mix
    merged: Tensor | None  # (B, T, D), x merged with the skip, or x


def merge_mix_norm(x, x0, mix, scale, window, *merge):
    """x and x0 (B, T, D), mix (2, D), scale (1,) -> SlotInput, all of it.

    `merge` is empty, or a skip (B, T, D) with its weight (D,), or these and a gate (D,).
    """
    if merge:
        skip, weight, *gate = merge
        weighted = weight.to(x.dtype) * skip
        if gate:
            share = torch.sigmoid(gate[0].to(x.dtype))
            x = torch.lerp(weighted, x, share)
        else:
            x = x + weighted
    mixed = mix[0] * x + mix[1] * x0
    h = (norm(mixed) * scale).to(x.dtype)
    return SlotInput(h, h[..., :window], mixed, x)


def _only_wanted(outputs, return_mix, return_merged):
    """SlotInput -> the same with None for mixed and merged where they are not wanted."""
    mixed = outputs.mixed if return_mix else None
    merged = outputs.merged if return_merged else None
    return SlotInput(outputs.h, outputs.gate_input, mixed, merged)


def slot_input_ref(x, x0, mix, scale, window, return_mix, return_merged, *merge):
    """As merge_mix_norm; mixed and merged are None where they are not wanted."""
    outputs = merge_mix_norm(x, x0, mix, scale, window, *merge)
    return _only_wanted(outputs, return_mix, return_merged)


def slot_input(x, x0, mix, scale, window, return_mix, return_merged, *merge):
    """As slot_input_ref, with one kernel for the gradients."""
    results = _slot_input(x, x0, mix, scale, list(merge), window, return_mix, return_merged)
    return _only_wanted(SlotInput(*results), return_mix, return_merged)


def _slot_input_traced(x, x0, mix, scale, merge, window, return_mix, return_merged):
    """What the compiler traces in place of the op: results of merge_mix_norm.

    The op has four results, so one that is not wanted is an empty tensor. Backward needs what x and
    a skip merged into: that is always returned.
    """
    outputs = merge_mix_norm(x, x0, mix, scale, window, *merge)
    mixed = outputs.mixed if return_mix else x.new_empty(0)
    merged = outputs.merged if return_merged or len(merge) > 0 else x.new_empty(0)
    return outputs.h, outputs.gate_input, mixed, merged


def _slot_input_copied(*inputs):
    """As _slot_input_traced; an op returns neither inputs nor views, hence the copies."""
    outputs = SlotInput(*_slot_input_traced(*inputs))
    return outputs.h, outputs.gate_input.clone(), outputs.mixed, outputs.merged.clone()


@torch.library.custom_op("golf::slot_input", mutates_args=())
def _slot_input(
    x: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    merge: list[Tensor],
    window: int,
    return_mix: bool,
    return_merged: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _slot_input_copied(x, x0, mix, scale, merge, window, return_mix, return_merged)


_slot_input.register_fake(_slot_input_copied)


def _slot_input_setup(ctx, inputs, output):
    x, *others = inputs[:4]  # x0, mix, scale
    merge = inputs[4]
    ctx.return_mix, ctx.return_merged = inputs[6:]
    merged = output[3] if merge else x
    ctx.save_for_backward(merged, *others, *merge)


def _slot_input_gradients(ctx, *grads):
    inputs = ctx.saved_tensors[:4]  # merged, x0, mix, scale
    merge = list(ctx.saved_tensors[4:])
    *streams, sums = _slot_input_backward(
        list(grads), *inputs, merge, ctx.return_mix, ctx.return_merged
    )
    d_x, d_x0, d_skip = streams
    d_mix, d_weight, d_gate = sums.sum(0).split((2, 1, 1))
    d_mix = d_mix.to(inputs[2].dtype)
    d_merge = [d_skip, d_weight[0], d_gate[0]][: len(merge)]
    if not ctx.needs_input_grad[1]:
        d_x0 = None
    return d_x, d_x0, d_mix, None, d_merge, None, None, None


_slot_input.register_autograd(_slot_input_gradients, setup_context=_slot_input_setup)


def decompose_slot_input():
    """Has Inductor trace slot_input's forward, which it fuses with its neighbours.

    Inductor decomposes below autograd, so the gradients stay those of _slot_input_gradients.
    """
    from torch._inductor.decomposition import decompositions

    decompositions[torch.ops.golf.slot_input.default] = _slot_input_traced


@jit
def load_f32_if(pointers, mask, WANTED: tl.constexpr):
    """Zeros where not WANTED."""
    values = tl.zeros(mask.shape, dtype=tl.float32)
    if WANTED:
        values = load_f32(pointers, mask)
    return values


@jit
def _norm_backward(z, d_norm, D: tl.constexpr):
    """Rows z and the gradients of their norms -> the gradients of z."""
    inverse = tl.rsqrt(tl.sum(z * z, 1) / D + 1.19e-7)[:, None]
    z_norm = z * inverse
    along = (tl.sum(d_norm * z_norm, 1) / D)[:, None]
    return inverse * (d_norm - z_norm * along)


@jit
def _slot_input_kernel(
    d_h,
    d_start,
    d_mixed,
    d_merged,
    merged,
    x0,
    mix,
    scale,
    skip,
    weight,
    gate,
    d_x,
    d_x0,
    d_skip,
    sums,
    rows,
    WINDOW: tl.constexpr,
    MIXED: tl.constexpr,
    KEPT: tl.constexpr,
    MERGE: tl.constexpr,
    GATED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes d_x, d_x0, d_skip, and this program's part of the sums of _empty_slot_input_grads."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < D
    factor = tl.load(scale)
    mix_x = load_f32(mix + column, inside)
    mix_0 = load_f32(mix + D + column, inside)
    skip_weight = load_f32_if(weight + column, inside, MERGE)
    share, rest = 1.0, 1.0  # of x, and of the weighted skip, in what they merge into
    if GATED:
        share = tl.sigmoid(load_f32(gate + column, inside))
        rest = 1 - share
    zero = tl.zeros((2, BLOCK), dtype=tl.float32)
    sum_x, sum_0 = zero, zero
    sum_w, sum_g = zero, zero
    # two rows at a time, while the next ones are loaded
    for first in tl.range(2 * program, rows, 2 * tl.num_programs(0), num_stages=3):
        row = first + tl.arange(0, 2)[:, None]
        valid = inside & (row < rows)
        at = row.to(tl.int64) * D + column
        x = load_f32(merged + at, valid)
        e = load_f32(x0 + at, valid)
        start_at = row * WINDOW + column
        g = load_f32(d_h + at, valid)
        g += load_f32(d_start + start_at, valid & (column < WINDOW))
        d = load_f32_if(d_mixed + at, valid, MIXED)
        kept = load_f32_if(d_merged + at, valid, KEPT)
        skipped = load_f32_if(skip + at, valid, MERGE)
        d += _norm_backward(mix_x * x + mix_0 * e, g * factor, D)
        sum_x += d * x
        sum_0 += d * e
        tl.store(d_x0 + at, d * mix_0, valid)
        d = d * mix_x + kept
        if MERGE:
            d_weighted = d * rest
            sum_w += d_weighted * skipped
            sum_g += d_weighted * (x - skip_weight * skipped)
            tl.store(d_skip + at, d_weighted * skip_weight, valid)
        tl.store(d_x + at, d * share, valid)
    sums += program * 4 * D + column
    tl.store(sums, tl.sum(sum_x, 0)[None, :], inside)
    tl.store(sums + D, tl.sum(sum_0, 0)[None, :], inside)
    tl.store(sums + 2 * D, tl.sum(sum_w, 0)[None, :], inside)
    tl.store(sums + 3 * D, tl.sum(sum_g, 0)[None, :], inside)


def _empty_slot_input_grads(grads, merged, x0, mix, scale, merge, *wanted):
    """-> empty gradients of x, x0 and the skip, and sums (programs, 4, D) over each program's rows:
    the gradients of mix (2 of the 4), of the weight and of the gate.
    """
    programs = 3
    if x0.is_cuda:
        properties = torch.cuda.get_device_properties(x0.device)
        programs = 2 * properties.multi_processor_count
    d_x = x0.new_empty(merged.shape)
    d_x0 = x0.new_empty(x0.shape)
    d_skip = x0.new_empty(merge[0].shape if merge else (0,))
    sums = x0.new_empty(programs, 4, x0.shape[-1], dtype=torch.float32)
    return d_x, d_x0, d_skip, sums


@torch.library.custom_op("golf::slot_input_backward", mutates_args=())
def _slot_input_backward(
    grads: list[Tensor],
    merged: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    merge: list[Tensor],
    return_mix: bool,
    return_merged: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grads: those of the four results of _slot_input."""
    outputs = _empty_slot_input_grads(grads, merged, x0, mix, scale, merge)
    grads = list(grads)
    # the kernel does not read the arguments that merged stands for
    if not return_mix:
        grads[2] = merged
    if not return_merged:
        grads[3] = merged
    missing = [merged] * (3 - len(merge))
    inputs = [*grads, merged, x0, mix, scale, *merge, *missing]
    contiguous = [t.contiguous() for t in inputs]
    D = x0.shape[-1]
    block = triton.next_power_of_2(D)
    programs = len(outputs[3])
    _slot_input_kernel[(programs,)](
        *contiguous,
        *outputs,
        merged.numel() // D,
        WINDOW=grads[1].shape[-1],
        MIXED=return_mix,
        KEPT=return_merged,
        MERGE=len(merge) > 0,
        GATED=len(merge) > 2,
        D=D,
        BLOCK=block,
        num_warps=block // 256 or 1,
    )
    return outputs


_slot_input_backward.register_fake(_empty_slot_input_grads)


# --- AdamW without first moment, in place, of the rows of a table: row source[i] of values and
# squares (N, n) is updated and written to row target[i], for which many may share a source.


def adamw_rows_ref(values, squares, gradient, source, target, correction, scale, rates):
    """values and squares (N, n), gradient (B, n), source and target (B,) -> values, squares.

    The gradient is multiplied by `scale`; correction (B,) is 1 - beta2^step, the bias correction of
    squares; rates are (lr, weight decay, beta2).
    """
    lr, decay, beta2 = rates
    gradient = scale * gradient.to(values.dtype)
    mean = torch.lerp(gradient * gradient, squares[source], beta2)
    denominator = (mean / correction[:, None]).sqrt() + 1e-10
    decayed = values[source] * (1 - lr * decay)
    values[target] = decayed - lr * gradient / denominator
    squares[target] = mean
    return values, squares


@jit
def _adamw_kernel(
    values,
    squares,
    gradient,
    source,
    target,
    correction,
    stride,
    width,
    SCALE: tl.constexpr,
    LR: tl.constexpr,
    DECAY: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    old = tl.load(source + row).to(tl.int64) * stride + column
    new = tl.load(target + row).to(tl.int64) * stride + column
    g = SCALE * load_f32(gradient + row.to(tl.int64) * width + column, inside)
    mean = BETA2 * load_f32(squares + old, inside) + (1 - BETA2) * g * g
    denominator = tl.sqrt(mean / tl.load(correction + row)) + 1e-10
    step = LR * g / denominator
    decayed = (1 - LR * DECAY) * load_f32(values + old, inside)
    tl.store(values + new, decayed - step, inside)
    tl.store(squares + new, mean, inside)


def adamw_rows(values, squares, gradient, source, target, correction, scale, rates):
    """As adamw_rows_ref, in one kernel; rows of values and squares may be wider than n."""
    rows, width = gradient.shape
    lr, decay, beta2 = rates
    if width == 0:
        return values, squares
    blocks = triton.cdiv(width, 1024)
    _adamw_kernel[(blocks, rows)](
        values,
        squares,
        gradient.contiguous(),
        source.contiguous(),
        target.contiguous(),
        correction.contiguous(),
        values.stride(0),
        width,
        SCALE=scale,
        LR=lr,
        DECAY=decay,
        BETA2=beta2,
        BLOCK=1024,
    )
    return values, squares


# --- attention over packed documents: causal within a document, scale 1/sqrt(E); query head h reads
# key/value head h // (H / K). Every backend takes q (B, T, H, E), k and v (B, T, K, E), cu_seqlens
# (N + 1,) int32 with B = 1, or None where every row is one document, max_seqlen, which no document
# exceeds, and window, the number of earlier keys that a query sees (0: all). It returns
# (B, T, H, E). cu_seqlens may end with repetitions of T, which are empty documents. All but
# attention_sdpa take cu_seqlens (2, N + 1) too, of queries and of keys; then a document's queries
# are its last positions.
_VARLEN_PARAMETERS = tuple(inspect.signature(varlen_attn).parameters) if varlen_attn else ()


def _repeat_kv(q, k, v):
    """q (..., H, E), k and v (..., K, E) -> k and v (..., H, E): no grouped heads."""
    repeats = q.shape[-2] // k.shape[-2]
    if repeats == 1:
        return k, v
    return k.repeat_interleave(repeats, -2), v.repeat_interleave(repeats, -2)


def _cu_seqlens_of_rows(q):
    """q (B, T, H, E) -> cu_seqlens (B + 1,) of its rows end to end."""
    return torch.arange(q.size(0) + 1, dtype=torch.int32, device=q.device) * q.size(1)


def attention_sdpa(q, k, v, cu_seqlens, max_seqlen, window=0):
    """The reference: any device and dtype, and no host synchronisation."""
    k, v = _repeat_kv(q, k, v)
    if cu_seqlens is not None:
        return _packed_sdpa(q, k, v, cu_seqlens, max_seqlen, window)
    if window:
        flat = (t.flatten(0, 1)[None] for t in (q, k, v))
        out = _packed_sdpa(*flat, _cu_seqlens_of_rows(q), q.size(1), window)
        return out.view(q.shape)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)


def _packed_sdpa(q, k, v, cu_seqlens, max_seqlen, window):
    """q, k and v (1, T, H, E) -> (1, T, H, E).

    In blocks of W = max_seqlen queries, each of which sees the keys of its block and of the one
    before: the mask has T x 2W elements instead of T x T.
    """
    T, H, E = q.shape[1:]
    W = min(max_seqlen, T)
    blocks = (T + W - 1) // W
    # Padding comes after the last document. It is a document of its own that attends to itself: a
    # row without any key would give NaN.
    padding = (0, 0, 0, 0, 0, blocks * W - T)
    q, k, v = (F.pad(t[0], padding).view(blocks, W, H, E) for t in (q, k, v))
    positions = torch.arange(blocks * W, dtype=cu_seqlens.dtype, device=q.device)
    # documents count from 1; 0 is before the row
    document = torch.searchsorted(cu_seqlens, positions, right=True).view(blocks, W)
    offset = torch.arange(2 * W, device=q.device)
    same_document = document[:, :, None] == _with_previous_block(document)[:, None]
    mask = same_document & (offset <= offset[:W, None] + W)
    if window:
        mask &= offset >= offset[:W, None] + W - window
    q = q.transpose(1, 2)
    k = _with_previous_block(k).transpose(1, 2)
    v = _with_previous_block(v).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])  # (blocks, H, W, E)
    return out.transpose(1, 2).reshape(1, blocks * W, H, E)[:, :T]


def _with_previous_block(t):
    """(blocks, W, ...) -> (blocks, 2W, ...): every block behind the one before it, or zeros."""
    previous = torch.cat((torch.zeros_like(t[:1]), t[:-1]))
    return torch.cat((previous, t), dim=1)


def _cu_seqlens_of_q_and_k(cu_seqlens):
    """cu_seqlens (N + 1,) or (2, N + 1) -> that of the queries and that of the keys."""
    if cu_seqlens.dim() == 2:
        return cu_seqlens[0], cu_seqlens[1]
    return cu_seqlens, cu_seqlens


def _over_rows(varlen):
    """Decorator: attention over documents end to end, (tokens, H, E) -> (tokens, H, E), becomes a
    backend that also takes rows.
    """

    def attention(q, k, v, cu_seqlens, max_seqlen, window=0):
        if cu_seqlens is None:
            cu_seqlens = _cu_seqlens_of_rows(q)
        flat = (t.flatten(0, 1) for t in (q, k, v))
        return varlen(*flat, cu_seqlens, max_seqlen, window).view(q.shape)

    return attention


@_over_rows
def attention_torch(q, k, v, cu_seqlens, max_seqlen, window):
    """torch's varlen_attn (torch >= 2.10, CUDA, 16 bits)."""
    options = {}
    if window or "is_causal" not in _VARLEN_PARAMETERS:  # torch 2.10 has is_causal and no windows
        options["window_size"] = (window or -1, 0)
    else:
        options["is_causal"] = True
    if "enable_gqa" in _VARLEN_PARAMETERS:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = _repeat_kv(q, k, v)
    cu_seqlens = _cu_seqlens_of_q_and_k(cu_seqlens)
    return varlen_attn(q, k, v, *cu_seqlens, max_seqlen, max_seqlen, **options)


@_over_rows
def attention_fa3(q, k, v, cu_seqlens, max_seqlen, window):
    """FlashAttention-3 (Hopper; arXiv:2407.08608)."""
    from flash_attn_interface import flash_attn_varlen_func

    options = {"causal": True}
    if window:
        options["window_size"] = (window, 0)
    cu_seqlens = _cu_seqlens_of_q_and_k(cu_seqlens)
    out = flash_attn_varlen_func(q, k, v, *cu_seqlens, max_seqlen, max_seqlen, **options)
    return out[0] if isinstance(out, tuple) else out  # some versions return (out, lse)


@_over_rows
def attention_fa4(q, k, v, cu_seqlens, max_seqlen, window):
    """FlashAttention-4 (flash-attn-4; CUDA, 16 bits)."""
    out, _ = _fa4(q, k, v, cu_seqlens, max_seqlen, window)
    return out


def _fa4_options(q, cu_seqlens, max_seqlen, window):
    """Arguments of FlashAttention-4 that forward and backward share."""
    of_q, of_k = _cu_seqlens_of_q_and_k(cu_seqlens)
    options = {
        "cu_seqlens_q": of_q,
        "cu_seqlens_k": of_k,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": max_seqlen,
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": True,
    }
    if window:
        options["window_size_left"] = window
    return options


@torch.library.custom_op("golf::attention_fa4", mutates_args=())
def _fa4(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int
) -> tuple[Tensor, Tensor]:
    """-> the output (tokens, H, E), and the logarithms (H, tokens) of the softmax's sums."""
    from flash_attn.cute.interface import _flash_attn_fwd

    options = _fa4_options(q, cu_seqlens, max_seqlen, window)
    out, lse, *_ = _flash_attn_fwd(q, k, v, return_lse=True, **options)
    return out, lse


@_fa4.register_fake
def _fa4_fake(q, k, v, cu_seqlens, max_seqlen, window):
    tokens, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(H, tokens, dtype=torch.float32)


def _empty_fa4_grads(grad, qkv, *others):
    q, k, v = qkv
    group = q.shape[1] // k.shape[1]
    dk = k.new_empty(group, *k.shape)
    dv = v.new_empty(group, *v.shape)
    return q.new_empty(q.shape), dk, dv


@torch.library.custom_op("golf::fa4_backward", mutates_args=())
def _fa4_backward(
    grad: Tensor,
    qkv: list[Tensor],
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of q (tokens, H, E), and of k and v (H / K, tokens, K, E), not yet summed over
    the query heads that share a key head.

    FlashAttention-4 would sum them in fp32 buffers, zeroed before and cast after. One pass for each
    of a key head's query heads, with gradients of its own, costs less (docs/LOG.md).
    """
    from flash_attn.cute.interface import _flash_attn_bwd

    q, k, v = qkv
    grads = _empty_fa4_grads(grad, qkv)
    dq, dk, dv = grads
    grad = grad.contiguous()
    options = _fa4_options(q, cu_seqlens, max_seqlen, window)
    group = len(dk)
    for i in range(group):
        heads = slice(i, None, group)
        _flash_attn_bwd(
            q[:, heads],
            k,
            v,
            out[:, heads],
            grad[:, heads],
            lse[heads].contiguous(),
            dq=dq[:, heads],
            dk=dk[i],
            dv=dv[i],
            **options,
        )
    return grads


_fa4_backward.register_fake(_empty_fa4_grads)


def _fa4_setup(ctx, inputs, output):
    *tensors, ctx.max_seqlen, ctx.window = inputs
    # nobody differentiates lse: without this, autograd fills zeros for its gradient
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _fa4_gradients(ctx, grad, grad_lse):
    if grad is None:
        return (None,) * 6
    qkv = list(ctx.saved_tensors[:3])
    others = ctx.saved_tensors[3:]  # cu_seqlens, out, lse
    dq, dk, dv = _fa4_backward(grad, qkv, *others, ctx.max_seqlen, ctx.window)
    if len(dk) == 1:
        return dq, dk[0], dv[0], None, None, None
    return dq, dk.sum(0), dv.sum(0), None, None, None


_fa4.register_autograd(_fa4_gradients, setup_context=_fa4_setup)


# --- selection, the fastest first
ATTENTION_BACKENDS = {
    "fa3": attention_fa3,
    "fa4": attention_fa4,
    "torch": attention_torch,
    "sdpa": attention_sdpa,
}


@dataclass(frozen=True)
class Ops:  # what the model calls, the name of each choice, and why an alternative was refused
    attention: Callable  # q, k, v, cu_seqlens, max_seqlen, attn_window
    mlp: Callable  # x, w_up, w_down, slope
    cross_entropy: Callable  # h, weight, targets, softcap
    names: dict
    notes: tuple = ()
    qkv_heads: Callable = qkv_heads_ref  # qkv, gain, cos, sin, kv_heads
    gated_xsa: Callable = gated_xsa_ref  # y, v, logits, factor
    # x, x0, mix, scale, window, return_mix, return_merged, *(skip, weight, gate)
    slot_input: Callable = slot_input_ref
    # values, squares, gradient, source, target, correction, scale, rates
    adamw_rows: Callable = adamw_rows_ref


def _forward_backward(op, args):
    """op and its arguments -> its outputs and its gradients for arguments that require one,
    under one fixed loss.
    """
    args = [
        a.detach().clone().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a
        for a in args
    ]
    with torch.enable_grad():
        outs = op(*args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [
        torch.linspace(-1, 1, t.numel(), device=t.device).cos().view(t.shape).to(t.dtype)
        for t in outs
    ]
    leaves = [a for a in args if torch.is_tensor(a) and a.requires_grad]
    return [
        *(t.detach() for t in outs),
        *(torch.autograd.grad(outs, leaves, grads) if leaves else ()),
    ]


def _first_that_works(kind, candidates, reference, args, notes, tolerance=0.03):
    """Candidates by name, trial arguments -> name of the first that agrees with reference, or
    None; adds to notes.
    """
    for name, op in candidates.items():
        if op is reference:
            return name
        try:
            pairs = zip(
                _forward_backward(op, args), _forward_backward(reference, args), strict=True
            )
            errors = [
                ((got - want).float().norm() / want.float().norm()).item() for got, want in pairs
            ]
            # relative Frobenius errors: bf16 rounding on both sides stays below the tolerance, a
            # wrong mask does not
            if all(error <= tolerance for error in errors):  # False for NaN
                return name
            fault = "disagrees with the reference, relative errors " + " ".join(
                f"{error:.1e}" for error in errors
            )
        # a library may raise anything (missing, wrong version, wrong device): not here
        except Exception as error:
            fault = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        notes.append(f"{kind} {name}: {fault}")
    return None


def select_ops(
    kernels, attention_backend, device, dtype, head_dim, num_heads, num_kv_heads, attn_window=0
):
    """Settings KERNELS and ATTENTION_BACKEND, shapes -> Ops, each fast version tried on `device`
    against its reference. The random state of the run stays as it is. SettingError: a named backend
    is unknown or does not work here.
    """
    if attention_backend not in ("auto", *ATTENTION_BACKENDS):
        raise SettingError(
            f"ATTENTION_BACKEND={attention_backend}: expected auto, {', '.join(ATTENTION_BACKENDS)}"
        )
    cuda = torch.device(device).type == "cuda"
    attention = ATTENTION_BACKENDS if cuda else {"sdpa": attention_sdpa}
    if attention_backend != "auto":
        attention = {attention_backend: ATTENTION_BACKENDS[attention_backend]}
    # FlashAttention-3 is for Hopper alone
    elif cuda and torch.cuda.get_device_capability(device)[0] != 9:
        attention = {name: op for name, op in attention.items() if name != "fa3"}
    notes = ["kernels: Triton is not installed"] if kernels and cuda and triton is None else []
    generator = torch.Generator(device).manual_seed(0)
    targets = torch.randint(1000, (200,), generator=generator, device=device)
    cu_seqlens = torch.tensor([0, 37, 38, 166, 256, 256, 256], dtype=torch.int32, device=device)
    shapes = [(1, 256, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    shapes += (200, 64), (320, 64), (64, 320), (1000, 64), (1, 256, num_heads)
    q, k, v, x, w_up, w_down, head, gates = (
        torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
        for shape in shapes
    )
    angles = torch.arange(256, device=device)[:, None, None] * torch.tensor(
        [1.0, 0.03], device=device
    )
    raw = torch.cat([t.detach().flatten(2) for t in (q, k, v)], dim=2).requires_grad_()

    def candidates(kernel, reference, library="triton"):
        return ({library: kernel} if kernels and cuda and triton else {}) | {
            "reference": reference
        }, reference

    trials = {  # operation -> candidates, reference, arguments
        "attention": (
            attention,
            attention_sdpa,
            (q, k, v, cu_seqlens, 128, 9 if attn_window else 0),
        ),
        "mlp": (*candidates(leaky_relu_sq_mlp, mlp_ref, "quack"), (x, w_up / 8, w_down / 18, 0.3)),
        "cross_entropy": (
            *candidates(linear_cross_entropy, linear_cross_entropy_ref),
            (x, head, targets, 30.0),
        ),
        "qkv_heads": (
            *candidates(qkv_heads, qkv_heads_ref),
            (raw, gates[0, 0], angles.cos(), angles.sin(), num_kv_heads),
        ),
        "gated_xsa": (*candidates(gated_xsa, gated_xsa_ref), (q, v, gates, 2.0)),
        "enter": (
            *candidates(slot_input, slot_input_ref),
            (
                x,
                w_up[:200],
                head[:2],
                angles[1, :, 0],
                9,
                True,
                True,
                head[200:400],
                *w_down.float()[:, :2].T,
            ),
        ),
        "adamw_rows": (
            *candidates(adamw_rows, adamw_rows_ref),
            (
                head.detach().float(),
                head.detach().float().square(),
                x.detach()[:2],
                targets[:2],
                targets[2:4],
                gates[0, :2, 0].detach().float().square(),
                2.0,
                (0.1, 0.5, 0.9),
            ),
        ),
    }
    names = {kind: _first_that_works(kind, *trial, notes) for kind, trial in trials.items()}
    if names["attention"] is None:
        raise SettingError(
            f"ATTENTION_BACKEND={attention_backend} does not work here: {'; '.join(notes)}"
        )
    chosen = {kind: trials[kind][0][name] for kind, name in names.items()}
    chosen["slot_input"] = chosen.pop("enter")  # its name in RESULT
    return Ops(**chosen, names=names, notes=tuple(notes))


# ---- MODEL ---------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """One kind of weight matrix, of which every layer has one."""

    role: str  # its name in GPT.matrices
    saved_name: str  # in model.pt and in the artifact, with the layer's number
    rows: str  # the setting that is its number of rows
    columns: str


# Parameter of GPT -> the kinds of matrices in it: all layers' matrices of one kind, then those of
# the next. Muon trains the banks; quantization and saved files see single matrices (see unbank).
BANKS = {
    "qo_bank": (
        Matrix("q", "blocks.{}.attn.c_q.weight", "model_dim", "model_dim"),
        Matrix("out", "blocks.{}.attn.c_proj.weight", "model_dim", "model_dim"),
    ),
    "kv_bank": (
        Matrix("k", "blocks.{}.attn.c_k.weight", "kv_dim", "model_dim"),
        Matrix("v", "blocks.{}.attn.c_v.weight", "kv_dim", "model_dim"),
    ),
    "mlp_up_bank": (Matrix("up", "blocks.{}.mlp.c_fc.weight", "mlp_dim", "model_dim"),),
    "mlp_down_bank": (Matrix("down", "blocks.{}.mlp.c_proj.weight", "model_dim", "mlp_dim"),),
}
# Embedding tables: parameter of GPT -> saved name
HEAD_NAMES = {
    "tok_emb": "tok_emb.weight",
    "lm_head": "lm_head.weight",
}


def rotary_tables(positions, hp):
    """cos and sin of positions (..., T) -> (..., T, 1, rope_dims / 2) float32 each.

    The angles are float64. The tables are made outside of compiled graphs, because there Inductor
    would compute them again for every head, in float64 on the GPU.
    """
    exponents = torch.arange(0, hp.rope_dims, 2, device=positions.device).double() / hp.rope_dims
    frequencies = hp.rope_base**-exponents
    angles = positions[..., None, None] * frequencies
    return angles.cos().float(), angles.sin().float()


class Segments(NamedTuple):
    """Which tokens of a batch form one document: attention stays inside documents."""

    cu_seqlens: Tensor | None  # (N + 1,) int32, borders in the only row; None: a row is a document
    max_seqlen: int  # no document is longer

    def attend(self, ops, q, k, v, attn_window=0):
        """q (B, T, H, E), k and v (B, T, K, E) -> (B, T, H, E)."""
        return ops.attention(q, k, v, self.cu_seqlens, self.max_seqlen, attn_window)


class SlotPlan(NamedTuple):
    """What forward_hidden does in one slot, that is, in one execution of a layer."""

    slot: int
    layer: int
    splits_lanes: bool  # the MLP lane starts here, as a copy of the stream
    stores_stream: bool  # the incoming stream is stored as a skip, before any merge
    stores_merged: bool  # the same, but taken from SlotInput.merged
    skip_index: int | None  # row of skip_weights for the skip that is merged; None: no skip
    return_mix: bool  # the layer reads SlotInput.mixed
    return_merged: bool  # the layer or a skip reads SlotInput.merged


class CompiledParts(NamedTuple):
    """A slot_input and a block as GPT has them, each compiled by itself."""

    slot_input: Callable
    block: Callable


class LayerWeights(NamedTuple):
    """Weights of one layer, in the compute dtype: views of the banks and small parameters."""

    qkv: Tensor  # (D + 2 K E, D): q, k and v stacked, for one matmul
    out: Tensor  # (D, D), times attn_scale
    up: Tensor  # (F, D)
    down: Tensor  # (D, F), times mlp_scale
    q_gain: Tensor  # (H,)
    gate: Tensor | None  # (H, window) or (H, D)
    attn_scale: Tensor  # (D,)
    mlp_scale: Tensor  # (D,)
    mix: Tensor  # (2, D): factors of stream and embedding
    post: Tensor  # (2, 2): factors of (attention, MLP) for each target lane
    resid: Tensor  # (2,): factor of each lane
    depth_scale: Tensor  # (1,) float32, scales both norms
    xsa: bool


class GPT(nn.Module):
    """The 11-layer recurrent GPT: one forward pass for training, evaluation, GPTQ and TTT.

    A tap observes or changes activations. tap.at(slot, layer) returns a callable that is called as
    (site, x, y) -> y with the input and the output of each site of that slot: the matmuls qkv,
    attn_proj, mlp_up and mlp_down, and the sublayers attn_out and mlp_out, which also pass the (D,)
    scale that y already contains. token_losses calls its tap at lm_head. Where `splits_mlp` is set
    the MLP runs unfused, so that its hidden layer can be observed. Without a tap nothing is traced.
    """

    def __init__(self, hp, ops, dtype):
        super().__init__()
        self.hp = hp
        self.ops = ops
        self.dtype = dtype
        self.make_parameters()
        # Four equal numbers a layer: kernels want aligned rows
        scales = [[(layer + 1) ** -0.5] * 4 for layer in range(hp.num_layers)]
        if not hp.ln_scale:
            scales = [[1.0] * 4] * hp.num_layers
        self.register_buffer("depth_scale", torch.tensor(scales), persistent=False)
        # The longest rows are training rows and those of global test-time training
        longest_ttt_row = hp.global_ttt_chunk_tokens + max(hp.eval_seq_len, hp.ttt_eval_seq_len)
        positions = torch.arange(max(hp.micro_batch_tokens, longest_ttt_row))
        cos, sin = rotary_tables(positions, hp)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def make_parameters(self):
        """Makes the parameters; their order is that of checkpoints and training states."""
        hp = self.hp
        L = hp.num_layers
        D = hp.model_dim
        self.tok_emb = nn.Parameter(torch.empty(hp.num_embeddings, D))
        self.lm_head = None
        if not hp.tie_embeddings:
            self.lm_head = nn.Parameter(torch.empty(hp.num_embeddings, D))
        for name, kinds in BANKS.items():
            rows = getattr(hp, kinds[0].rows)
            columns = getattr(hp, kinds[0].columns)
            setattr(self, name, nn.Parameter(torch.empty(len(kinds) * L, rows, columns)))
        self.q_gain = nn.Parameter(torch.full((L, hp.num_heads), hp.qk_gain_init))
        self.attn_gate = None
        if self.gate_kind:
            width = D if self.gate_kind == "dense" else hp.gate_window
            self.attn_gate = nn.Parameter(torch.zeros(L, hp.num_heads, width))
        self.attn_scale = nn.Parameter(torch.ones(L, D))
        self.mlp_scale = nn.Parameter(torch.ones(L, D))
        mix = torch.stack([torch.ones(L, D), torch.zeros(L, D)], dim=1)
        self.resid_mix = nn.Parameter(mix)  # (L, 2, D)
        plans = self.slot_plan(looping=True)
        num_skips = sum(plan.skip_index is not None for plan in plans)
        self.skip_weights = nn.Parameter(torch.ones(num_skips, D))
        self.skip_gates = None
        if hp.skip_gates_enabled:
            self.skip_gates = nn.Parameter(torch.zeros(num_skips, D))
        # (layer, attention / MLP, target lane)
        self.parallel_post = nn.Parameter(torch.ones(L, 2, 2))
        self.parallel_resid = nn.Parameter(torch.full((L, 2), 1.1))  # (layer, lane)
        self.smear_weight = None
        self.smear_lambda = None
        if hp.smear_gate_enabled:
            self.smear_weight = nn.Parameter(torch.zeros(1, hp.gate_window))
            self.smear_lambda = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def init_weights(self):
        """Random embeddings and inner matrices; output projections start at zero.

        Embeddings: N(0, TIED_EMBED_INIT_STD). q, k, v and MLP up: orthogonal. Dense attention gate:
        N(0, 0.01).
        """
        generator = torch.Generator().manual_seed(self.hp.generator_seed)
        for table in (self.tok_emb, self.lm_head):
            if table is not None:
                table.normal_(0.0, self.hp.tied_embed_init_std, generator=generator)
        matrices = self.matrices(self.banks())
        for role in ("q", "k", "v", "up"):
            for matrix in matrices[role]:
                nn.init.orthogonal_(matrix, generator=generator)
        matrices["out"].zero_()
        matrices["down"].zero_()
        if self.gate_kind == "dense":
            self.attn_gate.normal_(0.0, 0.01, generator=generator)

    @property
    def gate_kind(self):
        """The attention gate that is on: "sparse", "dense", "output", or None."""
        hp = self.hp
        if hp.sparse_attn_gate_enabled:
            return "sparse"
        if hp.gated_attn_enabled:
            return "dense"
        return "output" if hp.attn_out_gate_enabled else None

    @property
    def head_weight(self):
        """(V, D): the output projection."""
        return self.tok_emb if self.lm_head is None else self.lm_head

    def slots(self, looping):
        """The layers in execution order: with looping, looped layers appear several times."""
        hp = self.hp
        layers = list(range(hp.num_layers))
        if not (looping and hp.num_loops):
            return layers
        first = hp.loop_start
        end = hp.loop_end + 1
        passes = hp.num_loops + 1
        return layers[:first] + layers[first:end] * passes + layers[end:]

    def leave_training(self):
        """Called after training, before calibration and evaluation."""

    def slot_order(self, slots):
        """Layers in execution order -> their (slot, layer) pairs, number of encoder slots."""
        return enumerate(slots), len(slots) // 2

    def slot_plan(self, looping):
        """A SlotPlan for every slot, from the settings alone.

        As in a U-Net, each slot of the first half (encoder) stores its output, and each slot of the
        second half (decoder) merges the newest stored one. An encoder's output is stored by the
        slot after it. There SlotInput.merged is the stream itself, and reading that one lets a
        single kernel sum all its gradients. The first decoder stores before it merges, so its pair
        is the stream with itself. The stream splits before a skip is merged, so that skips go to
        the attention lane only.
        """
        order, num_encoders = self.slot_order(self.slots(looping))
        plans = []
        previous_slot = -1
        num_stored = 0
        has_lanes = False
        for slot, layer in order:
            splits_lanes = layer >= self.hp.parallel_start_layer and not has_lanes
            has_lanes = has_lanes or splits_lanes
            decoder_index = slot - num_encoders
            is_decoder = decoder_index >= 0
            stores = 0 <= previous_slot < num_encoders
            stores_merged = stores and not is_decoder
            num_stored += stores
            merges = is_decoder and num_stored > 0
            num_stored -= merges
            plans.append(
                SlotPlan(
                    slot=slot,
                    layer=layer,
                    splits_lanes=splits_lanes,
                    stores_stream=stores and is_decoder,
                    stores_merged=stores_merged,
                    skip_index=decoder_index if merges else None,
                    return_mix=not has_lanes or self.gate_kind == "output",
                    return_merged=has_lanes or stores_merged,
                )
            )
            previous_slot = slot
        return plans

    def banks(self):
        """The banks that a forward pass computes with, in the order of BANKS."""
        return self.qo_bank, self.kv_bank, self.mlp_up_bank, self.mlp_down_bank

    def matrices(self, banks):
        """Banks -> {role: (L, rows, columns)}, views of the matrices of all layers."""
        found = {}
        for kinds, bank in zip(BANKS.values(), banks, strict=True):
            # A bank of one kind is not split, because the backward of that would copy its gradient
            parts = bank.split(self.hp.num_layers) if len(kinds) > 1 else [bank]
            for kind, part in zip(kinds, parts, strict=True):
                found[kind.role] = part
        return found

    def weights_for(self, tokens, window_start):
        """A LayerWeights for every layer; here they do not depend on the tokens (B, T)."""
        return self.layer_weights()

    def layer_weights(self):
        """A LayerWeights for every layer.

        Tensors are unbound once, so that the gradient of a bank is one stack, not a sum of padded
        slices. The scales of sublayer outputs are multiplied into the matrices, so that scaling
        costs no extra pass over activations, forward or backward.
        """
        hp = self.hp
        matrices = self.matrices(self.banks())
        qkv = torch.cat([matrices[role].to(self.dtype) for role in ("q", "k", "v")], dim=1)
        stacked = {
            "qkv": qkv,
            "out": matrices["out"] * self.attn_scale[..., None],
            "up": matrices["up"],
            "down": matrices["down"] * self.mlp_scale[..., None],
            "q_gain": self.q_gain,
            "attn_scale": self.attn_scale,
            "mlp_scale": self.mlp_scale,
            "mix": self.resid_mix,
            "post": self.parallel_post,
            "resid": self.parallel_resid,
        }
        columns = {name: tensor.to(self.dtype).unbind(0) for name, tensor in stacked.items()}
        columns["gate"] = [None] * hp.num_layers
        if self.attn_gate is not None:
            columns["gate"] = self.attn_gate.to(self.dtype).unbind(0)
        weights = []
        for layer in range(hp.num_layers):
            fields = {name: column[layer] for name, column in columns.items()}
            scale = self.depth_scale[layer, :1]
            xsa = layer >= hp.num_layers - hp.xsa_last_n
            weights.append(LayerWeights(depth_scale=scale, xsa=xsa, **fields))
        return weights

    def slot_input(self, x, x0, w, return_mix, return_merged, *skip):
        """Streams x and x0 (B, T, D) -> SlotInput; a skip comes with its weight and its gate."""
        window = self.hp.gate_window
        return self.ops.slot_input(
            x, x0, w.mix, w.depth_scale, window, return_mix, return_merged, *skip
        )

    def attention(self, entry, w, rope, segments, tap):
        """SlotInput -> (B, T, D), the scaled output of the attention sublayer."""
        hp = self.hp
        h = entry.h
        cos, sin = rope
        qkv = linear(h, w.qkv, tap, "qkv")
        q, k, v = self.ops.qkv_heads(qkv, w.q_gain, cos, sin, hp.num_kv_heads)
        k, v = self.keys_and_values(k, v, w)
        y = self.attend(q, k, v, segments, w)
        if self.gate_kind:
            logits, factor = self.head_gates(entry, qkv, w.gate)
            if w.xsa:
                y = self.ops.gated_xsa(y, v, logits, factor)
            else:
                y = y * (factor * torch.sigmoid(logits))[..., None]
        elif w.xsa:
            y = subtract_own_value(y, v)
        out = linear(y.reshape(h.shape), w.out, tap, "attn_proj")
        return out if tap is None else tap("attn_out", h, out, w.attn_scale)

    def keys_and_values(self, k, v, w):
        """Keys and values (B, T, K, E) of a layer -> those that its attention reads."""
        return k, v

    def attend(self, q, k, v, segments, w):
        """q (B, T, H, E), k and v (B, T, K, E) -> (B, T, H, E)."""
        return segments.attend(self.ops, q, k, v)

    def head_gates(self, entry, qkv, gate):
        """Gate logits (B, T, H) of the heads' outputs, and the factor of their sigmoids."""
        hp = self.hp
        if self.gate_kind == "sparse":
            return hp.sparse_attn_gate_scale * F.linear(entry.gate_input, gate), 1.0
        if self.gate_kind == "dense":
            return F.linear(entry.h, gate), 1.0
        source = qkv if hp.attn_out_gate_src == "q" else entry.mixed
        return F.linear(source[..., : hp.gate_window], gate), 2.0

    def mlp(self, x, w, tap):
        """(B, T, D) -> (B, T, D): W_down leaky_relu(W_up h)^2 with h = norm(x) depth_scale."""
        slope = self.hp.leaky_relu_slope
        h = (norm(x) * w.depth_scale).to(x.dtype)
        if tap is not None and tap.splits_mlp:
            hidden = F.leaky_relu(linear(h, w.up, tap, "mlp_up"), slope).square()
            out = linear(hidden, w.down, tap, "mlp_down")
        else:
            out = self.ops.mlp(h, w.up, w.down, slope)
        return out if tap is None else tap("mlp_out", h, out, w.mlp_scale)

    def block(self, entry, mlp_lane, w, rope, segments, tap):
        """One layer: SlotInput and the MLP lane, None before the split -> x, mlp_lane.

        Before the split attention and MLP run one after the other on one stream; after it they run
        in parallel, each on its own lane, and both write to both lanes.
        """
        attn = self.attention(entry, w, rope, segments, tap)
        if mlp_lane is None:
            x = entry.mixed + attn
            return x + self.mlp(x, w, tap), None
        mlp = self.mlp(mlp_lane, w, tap)
        x = w.resid[0] * entry.merged + w.post[0, 0] * attn + w.post[1, 0] * mlp
        mlp_lane = w.resid[1] * mlp_lane + w.post[0, 1] * attn + w.post[1, 1] * mlp
        return x, mlp_lane

    def token_embedding(self, tokens, window_start):
        """(B, T) ids -> (B, T, D), the embedding before SmearGate."""
        return F.embedding(tokens, self.tok_emb).to(self.dtype)

    def embed(self, tokens, window_start):
        """(B, T) ids -> (B, T, D) raw embedding, to which SmearGate adds the previous token's.

        Nothing is added at BOS, at t = 0 and where `window_start` (B, T) is set.
        """
        e = self.token_embedding(tokens, window_start)
        if not self.hp.smear_gate_enabled:
            return e
        previous = F.pad(e[:, :-1], (0, 0, 1, 0))
        gate_input = e[..., : self.hp.gate_window]
        gate = torch.sigmoid(F.linear(gate_input, self.smear_weight.to(e.dtype)))  # (B, T, 1)
        smear = self.smear_lambda.to(e.dtype) * gate * previous
        blocked = tokens == BOS_ID
        if window_start is not None:
            blocked = blocked | window_start
        return e + smear.masked_fill(blocked[..., None], 0)

    def forward_hidden(
        self,
        tokens,
        cu_seqlens=None,
        *,
        max_seqlen,
        looping,
        window_start=None,
        tap=None,
        compiled_parts=None,
    ):
        """(B, T) ids -> (B, T, D), the output of the final norm.

        With cu_seqlens, B is 1 and the documents between these borders do not see each other; none
        is longer than max_seqlen. Without it every row is one document. compiled_parts,
        a CompiledParts, take the place of slot_input and block; slot_input then returns every
        output, which keeps the number of graphs small.
        """
        parts = compiled_parts or self
        return_all = compiled_parts is not None
        segments = Segments(cu_seqlens, max_seqlen)
        length = tokens.size(1)
        rope = (self.cos[:length], self.sin[:length])
        weights = self.weights_for(tokens, window_start)
        x = x0 = norm(self.embed(tokens, window_start))
        mlp_lane = None
        skips = []
        for plan in self.slot_plan(looping):
            w = weights[plan.layer]
            if plan.splits_lanes:
                mlp_lane = x
            if plan.stores_stream:
                skips.append(x.view_as(x))
            skip = ()
            if plan.skip_index is not None:
                skip = (skips.pop(), *self.skip_parameters(plan.skip_index))
            return_mix = return_all or plan.return_mix
            return_merged = return_all or plan.return_merged
            entry = parts.slot_input(x, x0, w, return_mix, return_merged, *skip)
            if plan.stores_merged:
                skips.append(entry.merged.view_as(x))
            slot_tap = tap and tap.at(plan.slot, plan.layer)
            x, mlp_lane = parts.block(entry, mlp_lane, w, rope, segments, slot_tap)
        return norm(self.join_lanes(x, mlp_lane))

    def skip_parameters(self, index):
        """The (D,) weight of a skip and, if there are skip gates, its (D,) gate."""
        if self.skip_gates is None:
            return (self.skip_weights[index],)
        return self.skip_weights[index], self.skip_gates[index]

    def join_lanes(self, x, mlp_lane):
        """The two lanes, (B, T, D) each or None for the second -> the stream (B, T, D)."""
        if mlp_lane is None or self.hp.parallel_final_lane == "attn":
            return x
        if self.hp.parallel_final_lane == "mlp":
            return mlp_lane
        return (x + mlp_lane) / 2

    def forward(self, inputs, targets, cu_seqlens, looping, max_seqlen, window_start=None):
        """(1, T) ids, (T,) targets -> (T,) cross-entropy in nats, differentiable.

        The logits are in the compute dtype. The other arguments are those of forward_hidden.
        """
        hidden = self.forward_hidden(
            inputs,
            cu_seqlens,
            max_seqlen=max_seqlen,
            looping=looping,
            window_start=window_start,
        )
        weight = self.head_weight.to(self.dtype)
        return self.ops.cross_entropy(hidden.flatten(0, 1), weight, targets, self.hp.logit_softcap)

    def token_losses(self, hidden, targets, tap=None):
        """Final norm's outputs (..., D) and targets (...) -> (...) nats.

        Projection, softcap and loss are float32.
        """
        hidden = hidden.float()
        logits = linear(hidden, self.head_weight, tap, "lm_head")
        flat = logits.flatten(0, -2)
        losses = softcapped_cross_entropy_ref(flat, targets.flatten(), self.hp.logit_softcap)
        return losses.view(targets.shape)


def linear(x, w, tap, site):
    """x (..., in), w (out, in) -> (..., out): a matmul that a tap can observe or add to."""
    y = F.linear(x, w)
    return y if tap is None else tap(site, x, y)


def unbank(model):
    """GPT -> {saved name: fp32 view}, with the banks taken apart into matrices."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name not in BANKS:
            state[HEAD_NAMES.get(name, name)] = tensor
            continue
        parts = tensor.split(model.hp.num_layers)
        for kind, matrices in zip(BANKS[name], parts, strict=True):
            for layer, matrix in enumerate(matrices):
                state[kind.saved_name.format(layer)] = matrix
    return state


def rebank(model, state):
    """Loads {saved name: tensor} into a GPT.

    Raises ValueError if names or shapes differ from the model's.
    """
    views = unbank(model)
    wanted = {name: tensor.shape for name, tensor in views.items()}
    given = {name: tensor.shape for name, tensor in state.items()}
    if wanted != given:
        names = wanted.keys() | given.keys()
        differ = sorted(name for name in names if wanted.get(name) != given.get(name))
        raise ValueError(
            f"the saved model does not fit these settings: {len(differ)} tensors differ,"
            f" {differ[:5]} among them; use the settings it was trained with"
        )
    with torch.no_grad():
        for name, tensor in views.items():
            tensor.copy_(state[name])


# ---- OPTIMIZER -----------------------------------------------------------------------------------

# Polar Express (arXiv:2505.16932): one (a, b, c) per Newton-Schulz step
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(x, steps):
    """(N, R, C) -> (N, R, C), each matrix orthogonalised by at most five Newton-Schulz steps.

    X <- aX + (bA + cA^2)X with A = X X^T, starting from X / |X|_F. Tall matrices are transposed, so
    that A is the smaller of the two products.
    """
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def muon_update(grad, momentum_buffer, momentum, steps, row_normalize, orthogonalise=polar_express):
    """(N, R, C) gradients -> (N, R, C) orthogonalised Nesterov updates, in the gradients' dtype.

    Updates the momentum buffer in place.
    """
    momentum_buffer.mul_(momentum).add_(grad)
    update = grad.add(momentum_buffer, alpha=momentum)
    if row_normalize:
        update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    return orthogonalise(update, steps)


def reset_gradients(parameters):
    """Gives every parameter a new gradient of zeros, for backward to add to."""
    for p in parameters:
        p.grad = torch.zeros_like(p)


class Muon:
    """Muon on the banks, sharded over ranks along the banks' first dimension.

    That dimension is padded to a multiple of the world size. launch() starts the reduce-scatter of
    every bank's gradient. step() orthogonalises this rank's slices bank by bank and gathers the
    results, so that one bank is communicated while the next is computed. A single rank runs the
    same lines.
    """

    def __init__(self, banks, hp, dist, dtype):
        self.banks = banks
        self.hp = hp
        self.dist = dist
        self.dtype = dtype
        self.momentum_buffers = []
        for bank in banks:
            shard = self.padded(bank).chunk(dist.world_size)[0]
            self.momentum_buffers.append(torch.zeros_like(shard))
        self.in_flight = []  # (handle, shard) of each bank's reduction

    def padded(self, bank):
        """A copy of the bank in Muon's dtype, padded with zeros to a multiple of the world size."""
        num_padding = -bank.size(0) % self.dist.world_size
        return F.pad(bank.detach().to(self.dtype), (0, 0, 0, 0, 0, num_padding))

    def launch(self):
        """Starts the reduction of every bank's gradient."""
        self.in_flight = [self.dist.reduce_scatter(self.padded(bank.grad)) for bank in self.banks]

    def shards(self):
        """This rank's slices of the summed gradients, once they have arrived."""
        for handle, _ in self.in_flight:
            handle.wait()
        return [shard for _, shard in self.in_flight]

    def orthogonaliser(self, buffer):
        """The function (updates (N, R, C), steps) for the bank with this momentum buffer."""
        return polar_express

    @torch.no_grad()
    def step(self, lr, momentum, weight_decay, clip):
        """p <- p (1 - lr wd) - lr sqrt(max(1, rows / cols)) O, with O from muon_update.

        The gradients are multiplied by `clip`, a 0-d tensor or None.
        """
        hp = self.hp
        gathers = []
        for buffer, shard in zip(self.momentum_buffers, self.shards(), strict=True):
            if clip is not None:
                shard = shard * clip.to(shard.dtype)
            update = muon_update(
                shard,
                buffer,
                momentum,
                hp.muon_backend_steps,
                hp.muon_row_normalize,
                self.orthogonaliser(buffer),
            )
            gathers.append(self.dist.all_gather(update))
        for bank, (handle, update) in zip(self.banks, gathers, strict=True):
            handle.wait()
            scale = max(1.0, bank.size(-2) / bank.size(-1)) ** 0.5
            bank.mul_(1 - lr * weight_decay)
            bank.add_(update[: bank.size(0)], alpha=-lr * scale)
        self.in_flight = []


class Optimizers:
    """Muon for the banks; AdamW for embeddings (TIED_EMBED_LR) and for the rest (SCALAR_LR).

    Every parameter is in exactly one group. step() is the complete update: reduction over ranks,
    one global clip factor, schedules, both optimizers.
    """

    def __init__(self, model, hp, dist):
        self.hp = hp
        self.dist = dist
        rest = dict(model.named_parameters())
        dtype = model.dtype if hp.muon_dtype == "auto" else getattr(torch, hp.muon_dtype)
        self.muon = Muon([rest.pop(name) for name in BANKS], hp, dist, dtype)
        embeddings = [rest.pop(name) for name in HEAD_NAMES if name in rest]
        scalars = list(rest.values())
        self.replicated = [*embeddings, *scalars]  # updated by every rank
        groups = [
            {"params": embeddings, "base_lr": hp.tied_embed_lr, "base_wd": hp.embed_wd},
            {"params": scalars, "base_lr": hp.scalar_lr, "base_wd": hp.adam_wd},
        ]
        betas = (hp.beta1, hp.beta2)
        fused = dist.device.type == "cuda"
        self.adamw = torch.optim.AdamW(groups, betas=betas, eps=1e-8, fused=fused)
        # These stay for the whole run: gradients that a captured backward returns are overwritten
        # by its next replay, so they must be added to tensors of our own.
        reset_gradients(model.parameters())

    def clip_factor(self):
        """GRAD_CLIP_NORM over the global norm of the reduced gradients, at most 1: a 0-d tensor.

        It is the same on every rank. None without clipping.
        """
        if not self.hp.grad_clip_norm:
            return None
        shard_squares = sum(shard.float().square().sum() for shard in self.muon.shards())
        squares = self.dist.all_reduce(shard_squares)
        squares = squares + sum(p.grad.square().sum() for p in self.replicated)
        return (self.hp.grad_clip_norm / (squares.sqrt() + 1e-6)).clamp_max(1.0)

    @torch.no_grad()
    def step(self, progress, step):
        """One update at training fraction `progress`; leaves all gradients zero.

        On entry the gradients are sums over this rank's micro-steps.
        """
        hp = self.hp
        multiplier = lr_multiplier(progress, hp)
        decay = decay_multiplier(progress, hp)
        replicated_grads = [p.grad for p in self.replicated]
        self.muon.launch()
        self.dist.all_reduce_packed(replicated_grads)
        clip = self.clip_factor()
        if clip is not None:
            torch._foreach_mul_(replicated_grads, clip)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * multiplier
            group["weight_decay"] = group["base_wd"] * decay
        self.adamw.step()
        momentum = muon_momentum(step, hp)
        self.muon.step(hp.matrix_lr * multiplier, momentum, hp.muon_wd * decay, clip)
        torch._foreach_zero_([*replicated_grads, *(bank.grad for bank in self.muon.banks)])


class EMA:
    """Exponential moving average of all weights, in fp32.

    The decay at step n is min(EMA_DECAY, (1 + n) / (10 + n)).
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.parameters = list(model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def copy_to_model(self):
        torch._foreach_copy_(self.parameters, self.average)


# ---- SCHEDULE ------------------------------------------------------------------------------------
# Pure functions of the training fraction in [0, 1] or of the step, so that every rank computes the
# same values.


def lr_multiplier(progress, hp):
    """1 until 1 - WARMDOWN_FRAC, then linear to 0, never below MIN_LR."""
    return max(hp.min_lr, min(1.0, (1.0 - progress) / hp.warmdown_frac))


def decay_multiplier(progress, hp):
    """Factor of the weight decay, which is constant here."""
    return 1.0


def muon_momentum(step, hp):
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM over the warm-up steps."""
    fraction = 1.0
    if hp.muon_momentum_warmup_steps:
        fraction = min(1.0, step / hp.muon_momentum_warmup_steps)
    return (1 - fraction) * hp.muon_momentum_warmup_start + fraction * hp.muon_momentum


def loop_is_on(progress, hp):
    """Whether the looped layers run several times at this training fraction."""
    return hp.num_loops > 0 and progress >= hp.enable_looping_at


# ---- TRAINING ------------------------------------------------------------------------------------


class TrainingClock:
    """Training seconds of rank 0, shared so that all ranks follow the same schedules and end.

    The host runs at most one step ahead of the device: marking a step waits for the one before,
    which leaves the device no gap. paused() keeps evaluations during training off the clock.
    """

    def __init__(self, dist, used=0.0):
        """Starts the clock at `used` seconds: those of the run that this one resumes."""
        self.dist = dist
        self.queue = []  # CUDA events at the end of steps
        dist.barrier()
        dist.synchronize()
        self.start = time.perf_counter() - used

    def mark_step(self):
        """To be called after the work of a step is launched."""
        if self.dist.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self.queue.append(event)
        if len(self.queue) > 1:
            self.queue.pop(0).synchronize()

    def clock_and_max(self, *numbers):
        """[seconds of rank 0, *the maximum over ranks of each number], in one collective."""
        seconds = time.perf_counter() - self.start
        return self.dist.agree(seconds * (self.dist.rank == 0), *numbers)

    def seconds(self):
        return self.clock_and_max()[0]

    @contextlib.contextmanager
    def paused(self):
        self.dist.synchronize()
        since = time.perf_counter()
        yield
        self.dist.synchronize()
        self.start += time.perf_counter() - since


def compile_wanted(hp, dist):
    return dist.device.type == "cuda" if hp.compile == "auto" else hp.compile == "1"


@lru_cache
def prepare_compiler():
    # A function needs many graphs: kinds of layers, kinds of slot inputs, with taps or without
    torch._dynamo.config.recompile_limit = 256
    # Without this the compile cache may reuse gradients of an older version of this file
    torch.compiler.config.cache_key_tag = digest(Path(__file__).read_bytes()).hex()
    decompose_slot_input()


def compiled(function, hp, dist, dynamic=False, graphs=False):
    """torch.compile of the function if the settings ask for it, else the function itself.

    dynamic=None: dimensions may be marked as dynamic. graphs: on CUDA forward and backward are
    captured and replayed, so that a call overwrites what earlier calls returned.
    """
    if not compile_wanted(hp, dist):
        return function
    prepare_compiler()
    # Padded matmuls would tie a graph to the range of sizes that it was traced with
    options = {"shape_padding": False, "triton.cudagraphs": graphs}
    return torch.compile(function, fullgraph=True, dynamic=dynamic, options=options)


class Trainer:
    """Model, optimizers, weight average and loader of a run, and the training loop."""

    def __init__(self, model, loader, hp, dist, log, guard=NO_GUARD):
        self.model = model
        self.loader = loader
        self.hp = hp
        self.dist = dist
        self.log = log
        self.guard = guard
        self.optimizers = Optimizers(model, hp, dist)
        self.ema = EMA(model, hp.ema_decay)
        self.forward = compiled(model.forward, hp, dist, graphs=hp.train_cuda_graphs)
        # Position in training; training states hold these two, so that a run can be resumed
        self.looping = loop_is_on(0.0, hp)  # in the last step
        self.tokens_at = [(0, 0.0)]  # (step, seconds) at the start of each looping state
        # As last logged: the live line must not wait for the GPU
        self.last_loss = math.nan

    def train_step(self, step, progress, looping):
        """One optimizer step -> 0-d tensor, this rank's share of the mean loss in nats."""
        hp = self.hp
        total = torch.zeros((), device=self.dist.device)
        for row in self.loader.step(step):
            if compile_wanted(hp, self.dist):
                # The outputs of the last replay are not needed any more
                torch.compiler.cudagraph_mark_step_begin()
            losses = self.forward(*row, looping, hp.train_seq_len)
            loss = losses.mean() / hp.micro_steps
            loss.backward()
            total += loss.detach()
        self.guard.watch(self.model, total)
        self.optimizers.step(progress, step)
        self.update_average(step, progress)
        return total

    def update_average(self, step, progress):
        """The weights of a step join the average."""
        self.ema.update(step)

    def warm_up_step(self, step, looping):
        """Throw-away steps on every graph with or without looping."""
        self.train_step(step, 0.0, looping)

    def warm_up(self):
        """Compiles every graph by throw-away steps, then restores the run bit for bit.

        Restored are weights, optimizers, weight average and random state.
        """
        weights = [p.detach().clone() for p in self.model.parameters()]
        rng = torch.get_rng_state()
        for looping in sorted({loop_is_on(0.0, self.hp), loop_is_on(1.0, self.hp)}):
            for step in range(self.hp.warmup_steps):
                self.warm_up_step(step, looping)
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), weights)
        torch.set_rng_state(rng)
        self.optimizers = Optimizers(self.model, self.hp, self.dist)
        self.ema = EMA(self.model, self.hp.ema_decay)

    def train(self, evaluate):
        """Trains until the time budget or ITERATIONS end -> figures for RESULT.

        Afterwards the model holds the average. `evaluate()` scores the current weights; it is
        called every VAL_LOSS_EVERY steps with the clock stopped.
        """
        hp = self.hp
        log = self.log
        budget = hp.training_seconds
        first, seconds, losses = self.guard.resume(self)
        if hp.resume:
            # The run that wrote the state may have ended before it logged and evaluated this step
            self.log_step(first, losses[-1], seconds, self.progress(first, seconds), self.looping)
            if self.evaluation_is_due(first):
                evaluate()
        step = first
        step_seconds = seconds / max(first, 1)
        clock = TrainingClock(self.dist, seconds)
        while step < hp.iterations:
            # The last step must not overrun, even if it takes twice as long as the one before
            if budget is not None and step and seconds + 2 * step_seconds > budget:
                break
            progress = self.progress(step, seconds)
            looping = loop_is_on(progress, hp)
            if looping != self.looping:
                log(f"step:{step} looping:{int(looping)} train_seconds:{seconds:.2f}")
                self.tokens_at.append((step, seconds))
                self.looping = looping
            losses.append(self.train_step(step, progress, looping))
            step += 1
            clock.mark_step()
            now, *reports = clock.clock_and_max(*self.guard.report())
            step_seconds = now - seconds
            seconds = now
            self.guard.after_step(self, step, seconds, losses, reports)
            if step <= 5 or step % hp.train_log_every == 0:
                self.log_step(step, losses[-1], seconds, progress, looping)
            rate = step * hp.train_batch_tokens / seconds
            message = f"step:{step} train_loss:{self.last_loss:.4f} tokens_per_s:{rate:.0f}"
            log.live(progress, message)
            if self.evaluation_is_due(step):
                with clock.paused():
                    evaluate()
        self.guard.after_last_step(self, step)
        seconds = clock.seconds()
        if budget is not None and seconds > budget:
            log(
                f"note: training took {seconds:.2f} s of {budget:.2f}; a step is too long for this"
                " budget"
            )
        self.log_step(step, losses[-1], seconds, self.progress(step, seconds), self.looping)
        self.ema.copy_to_model()
        resumed = {"resumed_at_step": first} if hp.resume else {}
        return self.summary(step, seconds, losses) | resumed

    def progress(self, step, seconds):
        """The training fraction in [0, 1]: of the time budget or, without one, of ITERATIONS."""
        budget = self.hp.training_seconds
        if budget is None:
            return min(1.0, step / self.hp.iterations)
        return min(1.0, seconds / budget) if budget else 1.0

    def evaluation_is_due(self, step):
        """Whether VAL_LOSS_EVERY asks for a score of the weights after this many steps."""
        return self.hp.val_loss_every > 0 and step % self.hp.val_loss_every == 0

    def log_step(self, step, loss, seconds, progress, looping):
        """Logs a step; `loss` is this rank's share. Waits for the device."""
        self.last_loss = self.dist.all_reduce(loss.clone()).item()
        rate = step * self.hp.train_batch_tokens / max(seconds, 1e-9)
        self.log(
            f"step:{step} train_loss:{self.last_loss:.4f} train_seconds:{seconds:.2f}"
            f" progress:{progress:.4f} lr_factor:{lr_multiplier(progress, self.hp):.4f}"
            f" looping:{int(looping)} tokens_per_s:{rate:.0f}"
        )

    def summary(self, steps, seconds, losses):
        """Figures for RESULT: steps, final loss, seconds, tokens/s of each looping state."""
        ends = [*self.tokens_at[1:], (steps, seconds)]
        rates = []
        for start, end in zip(self.tokens_at, ends, strict=True):
            tokens = (end[0] - start[0]) * self.hp.train_batch_tokens
            rates.append(round(tokens / max(end[1] - start[1], 1e-9)))
        last_losses = self.dist.all_reduce(torch.stack(losses[-20:])).tolist()
        return {
            "steps": steps,
            "train_loss": sum(last_losses) / len(last_losses),
            "training_seconds": round(seconds, 3),
            "tokens_per_second_by_loop_state": rates,
        }


# ---- QUANTIZATION --------------------------------------------------------------------------------
# of scales: 1e-10 would be 0 in fp16, and an all-zero row be divided by it
FP16_RANGE = 2.0**-24, 65504.0
DAMPING_RETRIES = 4
# by code, see to_log2_eighths
STEPS = np.float32([2.0 ** (k / 8) for k in [*range(256), *range(-256, 0)]])
MAX_SHIFT = 7  # bits of a fine code
WIDE_CODE = 127 << MAX_SHIFT
LQER_FIELDS = ("lqer_a", "lqer_a_scale", "lqer_b", "lqer_b_scale")
# saved-weight name -> role, settings of its bits and clip; in the order of the artifact's groups
QUANT_TABLE = {
    "tok_emb.weight": ("embedding", "embed_bits", "embed_clip_sigmas"),
    "lm_head.weight": ("embedding", "embed_bits", "embed_clip_sigmas"),  # TIE_EMBEDDINGS=0
    "blocks.{}.attn.c_q.weight": ("q", "matrix_bits", "attn_clip_sigmas"),
    "blocks.{}.attn.c_k.weight": ("k", "matrix_bits", "attn_clip_sigmas"),
    "blocks.{}.attn.c_v.weight": ("v", "matrix_bits", "attn_clip_sigmas"),
    "blocks.{}.attn.c_proj.weight": ("out", "matrix_bits", "attn_clip_sigmas"),
    "blocks.{}.mlp.c_fc.weight": ("up", "matrix_bits", "mlp_clip_sigmas"),
    "blocks.{}.mlp.c_proj.weight": ("down", "matrix_bits", "mlp_clip_sigmas"),
}


def quant_role(name):
    """Saved-weight name -> its row of QUANT_TABLE, None for a tensor that stays fp16 (or is an
    attention gate).
    """
    return QUANT_TABLE.get(re.sub(r"^blocks\.[0-9]+\.", "blocks.{}.", name))


def inverse_cholesky_upper(h):
    """(..., C, C) -> U (..., C, C), upper triangular, H^-1 = U^T U; NaN where H is not positive
    definite.
    """
    # H = P P^T, P upper triangular, U = P^-1: half the work of inverting H and factoring the
    # inverse
    lower, info = torch.linalg.cholesky_ex(h.flip(-2, -1))
    # no synchronisation with the host
    lower = lower.masked_fill((info != 0)[..., None, None], math.nan)
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device).expand_as(h)
    return torch.linalg.solve_triangular(lower.flip(-2, -1), eye, upper=True)


def damped_inverse_factor(h, damping, names):
    """h (N, C, C), damping (N,), both overwritten -> U of (h + damping I)^-1; damping grows
    where there is none.
    """
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    undamped = diagonal.clone()
    for retry in range(DAMPING_RETRIES + 1):
        diagonal.copy_(undamped + damping[:, None])
        upper = inverse_cholesky_upper(h)
        failed = ~upper.isfinite().flatten(1).all(dim=1)
        failed_names = ", ".join(
            name for name, bad in zip(names, failed.tolist(), strict=True) if bad
        )
        if not failed_names:
            return upper
        warnings.warn(
            f"GPTQ: damping raised tenfold, retry {retry + 1}: {failed_names}", stacklevel=2
        )
        damping[failed] *= 10
    raise ValueError(f"GPTQ: no Cholesky factor after {DAMPING_RETRIES} retries for {failed_names}")


def to_log2_eighths(x):
    """Steps x > 0 -> int8 codes k, nearest 2^(k/8): GPTQ works with the rounded step, so the
    grid costs no error.
    """
    return (8 * x.float().log2()).round_().clamp_(-127, 127).to(torch.int8)


def column_step_codes(upper, octaves):
    """Factor U (N, C, C) of the inverse Hessians -> codes int8 (N, C) of the columns' steps
    relative
    to their rows'.

    diag U is the inverse of a column's conditional deviation: the part of its input that the
    columns after it do not predict. With steps proportional to it every column costs the same
    weighted error, which is optimal for an entropy coder. `octaves` limits the range, because other
    text may use a column more than the calibration rows did.
    """
    log_steps = upper.diagonal(dim1=1, dim2=2).log2()
    log_steps = log_steps - log_steps.mean(dim=1, keepdim=True)
    codes = to_log2_eighths(log_steps.clamp(-octaves, octaves).exp2())
    return codes.clamp_(max=127 - 8 * MAX_SHIFT)  # room for split_wide_codes


def gptq_quantize(w, hessian, bits, clip_sigmas, damp, block_size, names, column_octaves=None):
    """w (N, R, C), hessian (N, C, C), N names -> codes int8 (N, R, C), scale fp16 (N, R). GPTQ
    (arXiv:2210.17323), columns in descending order of diag H, and SDClip scales: clip_sigmas
    standard deviations of the original row reach the largest code. The working copy is (N, C, R),
    so that a column is contiguous, and nothing in the column loop waits for the device. Raises
    ValueError with names if a Hessian cannot be made definite.

    With column_octaves, see column_step_codes -> codes int16, row steps int8 (N, R), column steps
    int8 (N, C), both as to_log2_eighths: SDClip then sets the steps, but clips nothing.
    """
    if infinite := [name for name, h in zip(names, hessian, strict=True) if h.isinf().any()]:
        # codes would be noise
        raise ValueError(f"GPTQ: the Hessian of {', '.join(infinite)} has infinite entries")
    num_columns, q_max = w.shape[2], 2 ** (bits - 1) - 1
    scale = (clip_sigmas * w.float().std(dim=2) / q_max).clamp(*FP16_RANGE).half()  # (N, R)
    step = scale.float()
    h = hessian.float().clone()
    diagonal = h.diagonal(dim1=1, dim2=2)
    damping = damp * diagonal.mean(dim=1)
    dead = diagonal == 0  # (N, C)
    diagonal.masked_fill_(dead, 1.0)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None, :].expand_as(h))
    upper = damped_inverse_factor(h, damping, names)
    work = w.float().mT.masked_fill(dead[:, :, None], 0.0)
    row_order = order[:, :, None].expand_as(work)
    work = work.gather(1, row_order)  # (N, C, R)
    codes = torch.empty_like(work)
    if column_octaves is not None:
        q_max = WIDE_CODE
        scale = to_log2_eighths(scale)
        step = (scale / 8).exp2()
        column_codes = column_step_codes(upper, column_octaves)
        column_scale = (column_codes / 8).exp2()
        work = work / column_scale[:, :, None]
        upper = upper / column_scale[:, None, :]
        column_codes = torch.empty_like(column_codes).scatter_(1, order, column_codes)
    for start in range(0, num_columns, block_size):
        stop = min(start + block_size, num_columns)
        errors = torch.empty_like(work[:, start:stop])
        for j in range(start, stop):
            codes[:, j] = (work[:, j] / step).round_().clamp_(-q_max, q_max)
            errors[:, j - start] = error = (work[:, j] - codes[:, j] * step) / upper[:, j, j, None]
            work[:, j + 1 : stop].addcmul_(
                upper[:, j, j + 1 : stop, None], error[:, None, :], value=-1.0
            )
        work[:, stop:].baddbmm_(upper[:, start:stop, stop:].mT, errors, alpha=-1.0)
    codes = torch.empty_like(codes).scatter_(1, row_order, codes)
    codes = codes.mT.to(torch.int8 if column_octaves is None else torch.int16).contiguous()
    return (codes, scale) if column_octaves is None else (codes, scale, column_codes)


def split_wide_codes(codes, column_steps):
    """Codes int16 (R, C), column steps int8 (C,) -> fields with int8 codes: code = 2^shift coarse +
    fine.

    The last norm's output has a few columns of 10 to 30 times the others' deviation. The steps of
    these columns of the embedding are so small that int8 would cut codes off below four deviations
    of the weights (it cost 0.07 to 0.09 BPB, docs/LOG.md). For them what lies below an ordinary
    step is stored apart: fine codes (R, k), columns, shifts (k,).
    """
    wide = (codes.abs().amax(dim=0) > 127).nonzero()[:, 0]
    if not len(wide):
        return {"codes": codes.to(torch.int8), "column_steps": column_steps}
    largest = codes[:, wide].abs().amax(dim=0).float()
    shift = (
        torch.maximum((largest / 127).log2().ceil(), (-column_steps[wide] / 8).round())
        .clamp(1, MAX_SHIFT)
        .int()
    )
    coarse = (codes[:, wide] / 2.0**shift).round().clamp(-127, 127).int()
    narrow, steps = codes.clone(), column_steps.int()
    narrow[:, wide] = coarse.to(codes.dtype)
    steps[wide] += 8 * shift
    fine = codes[:, wide].int() - (coarse << shift)
    return {
        "codes": narrow.to(torch.int8),
        "column_steps": steps.to(torch.int8),
        "fine_codes": fine.to(torch.int8),
        "fine_columns": wide.to(torch.int16),
        "fine_shift": shift.to(torch.int8),
    }


def quantize_rows(x, low, high, steps):
    """x (..., C) -> codes int8 (..., C) in [low, high], scale fp16 (...): largest |x| of the
    row over `steps`.
    """
    scale = (x.float().abs().amax(dim=-1) / steps).clamp(*FP16_RANGE).half()
    return (x.float() / scale.float()[..., None]).round_().clamp_(low, high).to(torch.int8), scale


def lqer_factors(error, rank):
    """error (R, C) -> A (R, rank), B (rank, C), the best A B in the Frobenius norm (LQER,
    arXiv:2402.02446).
    """
    u, s, vh = torch.linalg.svd(error.float(), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def pack_factors(a, b, hp):
    """a (R, r), b (r, C) -> LQER_FIELDS: codes int8, scales fp16, () and (groups,) if
    asymmetric, or (R,), (r,).
    """
    if hp.lqer_asym_enabled and b.numel() % hp.lqer_asym_group == 0:
        a_codes, a_scale = quantize_rows(a.flatten(), -2, 1, 1.5)
        # groups may cross rows of b
        b_codes, b_scale = quantize_rows(b.reshape(-1, hp.lqer_asym_group), -8, 7, 7.5)
    else:
        q_max = 2 ** (hp.lqer_factor_bits - 1) - 1
        (a_codes, a_scale), (b_codes, b_scale) = (
            quantize_rows(x, -q_max, q_max, q_max) for x in (a, b)
        )
    return dict(
        zip(LQER_FIELDS, (a_codes.view_as(a), a_scale, b_codes.view_as(b), b_scale), strict=True)
    )


def unpack_factors(fields):
    """LQER_FIELDS of a matrix in fp32 -> A (R, r), B (r, C); a 0-d scale of A tells the
    asymmetric packing.
    """
    a, a_scale, b, b_scale = (fields[key] for key in LQER_FIELDS)
    if a_scale.ndim == 0:
        return a * a_scale, (b.reshape(b_scale.size, -1) * b_scale[:, None]).reshape(b.shape)
    return a * a_scale[:, None], b * b_scale[:, None]


def share_matrices(matrices, world_size):
    """{name: (R, C)} -> names per rank, dearest first onto the least loaded rank; the same on
    every rank.
    """
    cost = {name: w.shape[0] * w.shape[1] ** 2 for name, w in matrices.items()}
    return balance(sorted(cost, key=lambda name: (-cost[name], name)), cost.get, world_size)


def quantize_matrices(names, weights, hessians, hp):
    """Names -> {name: fields codes, scale}, {name: E = W - codes scale (R, C)}; matrices of one
    shape share a batch.
    """
    batches, packed, errors = defaultdict(list), {}, {}
    for name in names:
        _, bits, clip = quant_role(name)
        batches[weights[name].shape, getattr(hp, bits), getattr(hp, clip)].append(name)
    for (_, bits, clip_sigmas), batch in batches.items():
        w, h = (
            torch.stack([source[name].float() for name in batch]) for source in (weights, hessians)
        )
        column_octaves = hp.gptq_column_octaves if hp.gptq_column_steps else None
        found = gptq_quantize(
            w, h, bits, clip_sigmas, hp.gptq_damp, hp.gptq_block_size, batch, column_octaves
        )
        for name, weight, codes, scale, *columns in zip(batch, w, *found, strict=True):
            packed[name] = {"codes": codes, "scale": scale}
            step = scale.float()[:, None]
            if hp.gptq_column_steps:
                packed[name] |= split_wide_codes(codes, columns[0])
                step = ((step + columns[0]) / 8).exp2()
            errors[name] = weight - codes * step
    return packed, errors


def quantize_small(name, w, hp):
    """A tensor without a role -> its fields, in its own shape: int8 rows (attention gates) or
    fp16.
    """
    if name.endswith("attn_gate") and hp.gated_attn_quant_gate:
        return dict(zip(("codes", "scale"), quantize_rows(w, -127, 127, 127), strict=True))
    return {"fp16": w.half()}


MAX_FP16_ELEMENTS = 65_536  # a tensor with more elements must have a role in QUANT_TABLE


def check_quantizable(weights, hessians):
    """ValueError for what quantize_weights cannot keep, on every rank alike."""
    for name, w in weights.items():
        if not w.half().isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite or beyond fp16")
        if quant_role(name) is None and w.numel() > MAX_FP16_ELEMENTS:
            raise ValueError(
                f"{name} has {w.numel()} elements and no role in QUANT_TABLE: too large for fp16"
            )
        if quant_role(name) and (
            name not in hessians or hessians[name].shape != (w.shape[1], w.shape[1])
        ):
            raise ValueError(f"{name} {tuple(w.shape)} needs a Hessian of its columns")


@torch.no_grad()
def quantize_weights(weights, hessians, hp, dist):
    """Saved weights by name, Hessians (C, C) by the same names -> numpy arrays "name:field", the
    same
    on every rank. Fields: codes, scale, column_steps; LQER_FIELDS; fp16. Every matrix is the work
    of one rank, small tensors are rank 0's, and LQER takes the largest gains over all ranks. Raises
    ValueError, on all ranks, naming the tensors at fault.
    """
    check_quantizable(weights, hessians)
    matrices = {name: w for name, w in weights.items() if quant_role(name)}
    try:
        mine = share_matrices(matrices, dist.world_size)[dist.rank]
        packed, errors = quantize_matrices(mine, weights, hessians, hp)
        # the largest get a correction
        outcome = {name: error.norm().item() for name, error in errors.items()}
    except ValueError as error:  # told to the other ranks, which would wait for this one's part
        outcome = str(error)
    outcomes = dist.all_gather_object(outcome)
    if failures := [outcome for outcome in outcomes if isinstance(outcome, str)]:
        raise ValueError("; ".join(failures))
    if dist.rank == 0:
        packed |= {
            name: quantize_small(name, w, hp) for name, w in weights.items() if name not in matrices
        }
    if hp.lqer_enabled:
        gains = {name: gain for part in outcomes for name, gain in part.items()}
        chosen = sorted(gains, key=lambda name: (-gains[name], name))[: hp.lqer_top_k]
        for name in set(chosen) & set(errors):
            packed[name] |= pack_factors(*lqer_factors(errors[name], hp.lqer_rank), hp)
    packed = {
        name: {field: x.cpu().numpy() for field, x in fields.items()}
        for name, fields in packed.items()
    }
    packed = {
        name: fields for part in dist.all_gather_object(packed) for name, fields in part.items()
    }
    # the caller's order
    return {f"{name}:{field}": array for name in weights for field, array in packed[name].items()}


def check_fields(name, fields):
    """ValueError for fields of which no weight can be made: an artifact may hold any names and
    shapes.
    """
    shape = {field: array.shape for field, array in fields.items()}
    codes, scale = shape.get("codes", ()), shape.get("scale")
    fits = (
        shape.keys() == {"fp16"} or len(codes) > 0 and scale == codes[:-1] and "fp16" not in shape
    )
    if shape.keys() - {"fp16", "codes", "scale"}:
        fits = fits and len(codes) == 2 and shape.get("column_steps", codes[1:]) == codes[1:]
    if "fine_codes" in shape:
        fits = fits and "column_steps" in shape
    if fits and shape.keys() & set(LQER_FIELDS):
        a, a_scale, b, b_scale = (shape.get(field) for field in LQER_FIELDS)
        fits = a and b and (a[0], *b[1:]) == codes and a[1:] == b[:1]
        fits = fits and (a_scale == () and b_scale or (a_scale, b_scale) == (a[:1], b[:1]))
    if not fits:
        raise ValueError(f"{name}: no weight can be made of the fields {shape}")


def add_fine_codes(w, name, fields, steps):
    """Adds what split_wide_codes split off to weights w (R, C), in place; steps (R, C): codes
    of their steps.
    """
    columns, shift = (
        fields.get(key, np.zeros(0)).astype(int) for key in ("fine_columns", "fine_shift")
    )
    fits = (
        columns.ndim == 1
        and columns.shape == shift.shape
        and fields["fine_codes"].shape == (len(w), columns.size)
    )
    if (
        not fits
        or (np.diff(columns) <= 0).any()
        or columns.size
        and not 0 <= columns[0] <= columns[-1] < w.shape[1]
    ):
        raise ValueError(
            f"{name}: fine codes {fields['fine_codes'].shape} do not fit the matrix {w.shape}"
        )
    fine_steps = (steps[:, columns] - 8 * shift).clip(-256, 255)
    w[:, columns] += fields["fine_codes"] * STEPS[fine_steps.astype(int)]


def dequantize_weights(arrays):
    """Arrays of quantize_weights -> saved weights by name, fp32 on the CPU, the same bits on every
    machine. Only elementwise fp32 operations in a fixed order: a matrix product would leave the
    order of its sums to the BLAS.
    """
    entries, weights = defaultdict(dict), {}
    for key, array in arrays.items():
        name, _, field = key.rpartition(":")
        entries[name][field] = array.astype(np.float32)
    for name, fields in entries.items():
        check_fields(name, fields)
        w = fields["fp16"] if "fp16" in fields else fields["codes"] * fields["scale"][..., None]
        if "column_steps" in fields:
            steps = fields["scale"][:, None] + fields["column_steps"]
            w = fields["codes"] * STEPS[steps.clip(-256, 255).astype(int)]
            if "fine_codes" in fields:
                add_fine_codes(w, name, fields, steps)
        if "lqer_a" in fields:
            a, b = unpack_factors(fields)
            for r in range(a.shape[1]):
                w += a[:, r, None] * b[r]
        weights[name] = torch.from_numpy(w)
    return weights


class HessianTap:
    """Adds up x^T x over tokens for the input of every matrix, in float32; passes of a looped
    layer add to one sum.
    """

    splits_mlp = True
    WATCHED = {
        "qkv": ("attn.c_q", "attn.c_k", "attn.c_v"),
        "attn_proj": ("attn.c_proj",),
        "mlp_up": ("mlp.c_fc",),
        "mlp_down": ("mlp.c_proj",),
    }

    def __init__(self, sums=None, layer=None):
        self.sums, self.layer = {} if sums is None else sums, layer

    def at(self, slot, layer):
        return HessianTap(self.sums, layer)

    def __call__(self, site, x, y, size=1.0):
        if site in self.WATCHED:
            self.add((site, self.layer), x)
        return y

    def add(self, key, x):
        x = x.flatten(0, -2)
        # sums in float32, as in the other branch
        tensor_cores = x.is_cuda and x.dtype == torch.bfloat16
        gram = (
            torch.mm(x.T, x, out_dtype=torch.float32) if tensor_cores else x.float().T @ x.float()
        )
        self.sums[key] = self.sums[key] + gram if key in self.sums else gram

    def hessians(self, head_name):
        """{saved weight name: (in, in) sum}."""
        by_name = {}
        for (site, layer), gram in self.sums.items():
            names = [f"blocks.{layer}.{matrix}.weight" for matrix in self.WATCHED.get(site, ())]
            by_name |= dict.fromkeys(names or [head_name], gram)
        return by_name


def calibration_row(model, loader, index, following):
    """Row `index` that Hessians are collected on; `following` is read ahead."""
    return loader.row(index, following)


def table_hessians(model):
    """{saved name: identity} of tables that are read one row at a time: every column counts the
    same.
    """
    return {"tok_emb.weight": torch.eye(model.hp.model_dim, device=model.tok_emb.device)}


@torch.no_grad()
def collect_hessians(model, loader, hp, dist):
    """Hessians of every matrix from GPTQ_CALIBRATION_BATCHES packed training rows, the same rows
    for
    any world size. -> {saved weight name: (in, in) float32, mean over rows}; rows are shared out
    over ranks, sums all-reduced.
    """
    tap = HessianTap()
    mine = range(dist.rank, hp.gptq_calibration_batches, dist.world_size)
    for index in mine or [0]:  # a rank without a row of its own takes part in the sums with zeros
        following = index + dist.world_size
        row = calibration_row(model, loader, index, following if following in mine else None)
        hidden = model.forward_hidden(
            row.inputs, row.cu_seqlens, max_seqlen=hp.train_seq_len, looping=True, tap=tap
        )
        tap.add(("lm_head", 0), hidden)
    for gram in tap.sums.values():
        gram /= hp.gptq_calibration_batches if hp.gptq_all_reduce else max(1, len(mine))
        if hp.gptq_all_reduce:
            dist.all_reduce(gram if mine else gram.zero_())
    head = "tok_emb.weight" if hp.tie_embeddings else "lm_head.weight"
    return table_hessians(model) | tap.hessians(head)


def held_out_loss(model, loader, hp, dist):
    """Mean loss, nats a token, on the training rows that were held out, shared out over ranks; None
    without any.

    On uncompiled code, like the Hessians: there is no graph for this in a few seconds of the
    reserve.
    """
    if not loader.held_out_rows:
        return None
    total = torch.zeros((), device=dist.device, dtype=torch.float64)
    with torch.no_grad():
        for index in range(dist.rank, loader.held_out_rows, dist.world_size):
            row = loader.held_out_row(index)
            hidden = model.forward_hidden(
                row.inputs, row.cu_seqlens, max_seqlen=hp.train_seq_len, looping=True
            )
            for h, t in zip(
                hidden[0].split(HEAD_CHUNK), row.targets.split(HEAD_CHUNK), strict=True
            ):
                total += model.token_losses(h, t).sum(dtype=torch.float64)
    return dist.all_reduce(total).item() / (loader.held_out_rows * hp.micro_batch_tokens)


def plainer_quantizations(hp):
    """Settings to try in turn where quantization ruins a model: the same step for all columns of a
    row, then with a damping as large as the mean of the Hessian's diagonal, which leaves little but
    rounding to the nearest.
    """
    plain = dataclasses.replace(hp, gptq_column_steps=False)
    ways = [plain, dataclasses.replace(plain, gptq_damp=max(1.0, hp.gptq_damp))]
    return [way for way in ways if way != hp]


class QuantizationCheck:
    """Compares the loss of the quantized with that of the fp32 model on the training rows that were
    held out.

    The calibration error cannot tell a bad quantization: it is measured on the rows that the
    Hessians were made from.
    """

    def __init__(self, model, loader, hp, dist, log):
        self.model, self.loader, self.hp, self.dist, self.log = model, loader, hp, dist, log
        self.weights = {name: tensor.detach().clone() for name, tensor in unbank(model).items()}
        self.tried = []  # for RESULT: settings and gap of each quantization
        self.kept = None  # the one of them that is written
        with log.stage("quant_check"):
            self.fp32_loss = held_out_loss(model, loader, hp, dist)

    def gap(self, arrays, hp):
        """Arrays of quantize_weights -> nats a token that they add to the loss; the model
        keeps its fp32 weights.
        """
        with self.log.stage("quant_check"):
            rebank(self.model, dequantize_weights(arrays))
            loss = held_out_loss(self.model, self.loader, self.hp, self.dist)
            rebank(self.model, self.weights)
        gap = loss - self.fp32_loss
        settings = dataclasses.asdict(hp).items()
        changed = [
            f"{name.upper()}={value:g}"
            for name, value in settings
            if value != getattr(self.hp, name)
        ]
        settings = " ".join(changed) or "as set"
        self.tried.append(
            {"settings": settings, "gap": round(gap, 6) if math.isfinite(gap) else None}
        )
        self.log(f"quant_check fp32_loss:{self.fp32_loss:.6f} gap:{gap:.6f} settings:{settings}")
        return gap if math.isfinite(gap) else math.inf

    def choose(self, quantize, seconds_left):
        """Quantizes as set and, while the gap is above QUANT_GAP_MAX, in plainer ways -> settings,
        arrays of the best.

        quantize(hp) -> arrays. No other way is begun when seconds_left() are fewer than the last
        one took.
        """
        if self.fp32_loss is None:
            return self.hp, quantize(self.hp)
        best_gap, best = math.inf, None
        for hp in (self.hp, *plainer_quantizations(self.hp)):
            started = time.perf_counter()
            arrays = quantize(hp)
            gap = self.gap(arrays, hp)
            if best is None or gap < best_gap:
                best_gap, best = gap, (hp, arrays)
                self.kept = self.tried[-1]
            if best_gap <= self.hp.quant_gap_max:
                break
            self.log(
                f"note: quantization adds {gap:.4f} nats a token, more than"
                f" QUANT_GAP_MAX={self.hp.quant_gap_max}"
            )
            # clocks of ranks differ: all must agree, or one would wait for the others in a
            # collective
            if self.dist.agree(time.perf_counter() - started)[0] > seconds_left():
                self.log("note: no seconds are left for a plainer quantization")
                break
        return best

    def summary(self):
        """For RESULT: rows, loss of the fp32 model, the gap that was kept and its settings,
        and all that was tried.
        """
        if self.fp32_loss is None:
            return None
        rows, loss = self.loader.held_out_rows, round(self.fp32_loss, 6)
        return {"rows": rows, "fp32_loss": loss, **self.kept, "tried": self.tried}


# ---- ARTIFACT ------------------------------------------------------------------------------------
# File: magic, number of the compressor, stored and raw size of the header, digest of these and of
# the stored header; the header, JSON [[[name, dtype, shape], ...], [[size, digest as stored, digest
# expanded], ...]]; the sections back to back. What a section holds follows from the arrays
# (plan_sections). The two digests let neither a damaged file nor a decoder of another version give
# wrong weights.
MAGIC, PREFIX, DIGEST_BYTES = b"GLF1", struct.Struct("<4sBII"), 8
MAX_HEADER_BYTES = 2**20
# a thread per group, and ZPAQ takes up to a gigabyte for each
CODEC_THREADS = min(8, os.cpu_count() or 1)


def digest(data):
    """Start of SHA-256: finds damage, does not authenticate."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def brotli_decompress(data, raw_size, shapes=()):
    """Fed in small pieces, as a stream of a few bytes can claim gigabytes and brotli has no
    portable output limit.
    """
    decoder, raw = brotli.Decompressor(), bytearray()
    for start in range(0, len(data), 64):
        raw += decoder.process(data[start : start + 64])
        if len(raw) > raw_size:
            break
    return bytes(raw) if decoder.is_finished() else b""


def lzma_decompress(data, raw_size):
    """Stream -> raw_size bytes and at most one more, none for one that is cut off or goes on
    (COMPRESSOR=lzma).
    """
    decoder = lzma.LZMADecompressor(memlimit=2**28)
    raw = decoder.decompress(data, max_length=raw_size + 1)
    return raw if decoder.eof and not decoder.unused_data else b""


# --- entropy: rANS (arXiv:1311.2540) in whole numbers, the same on every machine. LANES coders take
# turns, so that one numpy call serves all. One model, code_matrix, drives both directions: it asks
# for symbols in contexts and learns.
LANES, SYMBOLS, ESCAPE = 512, np.arange(-128, 128), -128  # no code is -128; a lane costs 6 bytes
# of codes, the contexts; cumprod is exact everywhere, powers are not
VARIANCES = 0.04 * np.cumprod(np.full(60, 1.15))


class SymbolEncoder:
    def __init__(self):
        self.slots = []

    def use(self, counts):
        """Counts (contexts, 256) -> whole frequencies: 2^16 in each context, at least 1
        where a count is positive.
        """
        total = counts.sum(1, keepdims=True)
        frequencies = np.maximum((counts * 2**16 + total // 2) // total, counts > 0)
        frequencies[np.arange(len(counts)), frequencies.argmax(1)] += 2**16 - frequencies.sum(1)
        self.starts, self.frequencies = (
            (frequencies.cumsum(1) - frequencies).ravel(),
            frequencies.ravel(),
        )

    def __call__(self, contexts, symbols):
        index = contexts * 256 + symbols + 128
        self.slots.append(
            (self.starts[index].astype(np.uint16), self.frequencies[index].astype(np.uint16))
        )
        return symbols

    def finish(self):
        """-> bytes; what is coded last is decoded first."""
        state, words = np.full(LANES, 2**31), []
        for starts, frequencies in reversed(self.slots):
            for at in reversed(range(0, len(starts), LANES)):
                f = frequencies[at : at + LANES].astype(np.int64)
                lanes = state[: len(f)]
                full = (lanes >> 47 >= f).nonzero()[0]
                words.append(lanes[full].astype("<u4"))
                lanes[full] >>= 32
                lanes += lanes // f * (2**16 - f) + starts[at : at + LANES]
        return b"".join([state.astype("<i8"), *words[::-1]])


class SymbolDecoder(SymbolEncoder):
    def __init__(self, data):
        self.state = np.frombuffer(data[: 8 * LANES], "<i8").astype(np.int64)
        self.words, self.at = np.frombuffer(data[8 * LANES :], "<u4").astype(np.int64), 0

    def use(self, counts):
        super().use(counts)
        self.symbols = np.arange(counts.size, dtype=np.int16).repeat(self.frequencies)

    def __call__(self, contexts, _):
        index, first_slots = np.empty(contexts.size, np.int64), contexts << 16
        for at in range(0, contexts.size, LANES):
            lanes = self.state[: contexts.size - at]
            slots = lanes & 65535
            index[at : at + LANES] = i = self.symbols.take(first_slots[at : at + LANES] + slots)
            lanes >>= 16
            lanes *= self.frequencies.take(i)
            lanes += slots - self.starts.take(i)
            low = (lanes < 2**31).nonzero()[0]
            lanes[low] = lanes[low] << 32 | self.words[self.at : self.at + len(low)]
            self.at += len(low)
        return (index & 255) - 128


def initial_counts():
    """-> int64 (contexts, 256), 64 a symbol, as if some were seen: nearly Gaussian, ESCAPE
    beyond 4.5 deviations.
    """
    tails = 1 + SYMBOLS**2 / (29 * VARIANCES[:, None])
    for _ in range(4):
        tails *= tails
    counts = np.where(SYMBOLS**2 <= 20 * VARIANCES[:, None], 1 + 32_000 / tails, 0)
    counts[:, 0] = 3
    # the last context: what an ESCAPE stands for
    return np.vstack([counts, np.ones(256)]).astype(np.int64)


def column_predictor(gram, rows):
    """gram (C, C), sum of x x^T over rows x -> P (C, C): x_j is about P[j, :j] x[:j]. Multiples of
    2^-12: exact sums. Elimination by elementwise operations in a fixed order, as LAPACK's last bits
    differ between machines.
    """
    size = len(gram)
    ridge = 1 + 800 / rows * np.trace(gram) / size  # no pivot is 0, also where all codes are
    work = np.hstack([gram + ridge * np.eye(size), np.eye(size)]).astype(np.float32)
    for j in range(size):
        part = work[j + 1 :, j : size + j + 1]
        part -= part[:, :1] / work[j, j] * work[j, j : size + j + 1]
    return np.rint(-4096 * np.tril(work[:, size:].astype(np.float64), -1)) / 4096


def code_matrix(coder, counts, codes):
    """Codes (R, C) int8 through a coder that reads or fills them; a code's context: its column's
    variance so far. Where there are far more rows than columns (the embedding), what is coded is
    the rest of a linear prediction of each column from those before it, learnt from the rows
    before, as long as that pays.
    """
    rows, columns = codes.shape
    energy, seen, row, learns = np.full(columns, 7.5 * 16), 16, 0, rows >= 8 * columns > 0

    def code(block, levels):
        # modulo 256
        contexts, known = (
            np.tile(levels, len(block)),
            block.astype(np.int8).astype(np.int64).ravel(),
        )
        symbols = coder(contexts, np.where(known**2 <= 20 * VARIANCES[contexts], known, ESCAPE))
        np.add.at(counts.ravel(), contexts * 256 + symbols + 128, 64)
        hidden = (symbols == ESCAPE).nonzero()[0]
        symbols[hidden] = coder(np.full(len(hidden), len(VARIANCES)), known[hidden])
        return symbols.reshape(block.shape)

    while row < rows:
        predicts = learns and row >= 128
        block = codes[
            row : row
            + max(1, row // 2 if predicts else min(8 + row // 4, 2**20 // max(1, columns)))
        ]
        if not predicts:
            block[:] = rest = code(block, np.searchsorted(VARIANCES[:-1], energy / seen))
        else:
            before, (values, rest) = (
                codes[:row].astype(np.float64),
                np.empty((2, columns, len(block))).mT,
            )
            predictor = column_predictor(before.T @ before, row)
            energy, seen = energy // 2, seen // 2  # of a worse prediction
            levels = np.searchsorted(VARIANCES[:-1], energy / seen)
            for j in range(columns):
                if j % 16 == 0:
                    means = values[:, :j] @ predictor[j : j + 16, :j].T
                mean = np.rint(
                    means[:, j % 16] + values[:, j - j % 16 : j] @ predictor[j, j - j % 16 : j]
                )[:, None]
                rest[:, j : j + 1] = code(block[:, j : j + 1] - mean, levels[j : j + 1])
                block[:, j] = (rest[:, j] + mean[:, 0]).astype(np.int64)
                values[:, j] = block[:, j]
            learns = (rest * rest).sum() < (values * values).sum()
        energy += (rest * rest).sum(0)
        row, seen = row + len(block), seen + len(block)


def code_matrices(coder, raw, shapes):
    """Bytes of int8 matrices, each stored transposed, through a coder; -> the bytes that came
    out of it.
    """
    codes, counts, start = np.array(np.frombuffer(raw, np.int8)), initial_counts(), 0
    for shape in shapes:
        size = math.prod(shape)
        coder.use(counts)
        code_matrix(coder, counts, codes[start : start + size].reshape(shape).T)
        start += size
    return codes.tobytes()


def entropy_compress(raw, shapes):
    coder = SymbolEncoder()
    code_matrices(coder, raw, shapes)
    return coder.finish()


def entropy_decompress(data, raw_size, shapes):
    coder = SymbolDecoder(data)
    raw = code_matrices(coder, bytes(raw_size), shapes)
    return raw if coder.at == len(coder.words) else b""


ENCODERS = {  # raw bytes, shapes of their arrays -> a stream
    "brotli": lambda raw, shapes=(): brotli.compress(raw, quality=11, lgwin=24),
    "lzma": lambda raw, shapes=(): lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
    "entropy": entropy_compress,
}
DECODERS = {  # the inverse; anything but raw_size bytes: no stream
    "brotli": brotli_decompress,
    "entropy": entropy_decompress,
    "lzma": lambda data, raw_size, shapes=(): lzma_decompress(data, raw_size),
}
COMPRESSORS = {
    "brotli": (0, "brotli"),
    "lzma": (1, "lzma"),
    # number in the file (2: presets/published.py), codecs; header in the first
    "entropy": (3, "brotli", "entropy"),
}


def expand(codec, stored, raw_size, shapes=()):
    """Stored bytes -> exactly raw_size bytes.

    Raises ArtifactError if that is not what comes out.
    """
    try:
        raw = DECODERS[codec](stored, raw_size, shapes) if raw_size else b""
    except Exception as error:  # each library has its own classes of errors
        raise ArtifactError(f"artifact: {codec} data does not expand: {error}") from error
    if len(raw) != raw_size:
        raise ArtifactError(
            f"artifact: {codec} data does not expand to the size that the header says"
        )
    return raw


def check_compressor(name):
    """SettingError, with what to install, for an unknown compressor or missing tools."""
    if name not in COMPRESSORS:
        raise SettingError(f"COMPRESSOR={name} is unknown: choose one of {', '.join(COMPRESSORS)}")
    if "brotli" in COMPRESSORS[name] and brotli is None:
        raise SettingError(
            "the brotli module is missing: pip install brotli, or set COMPRESSOR=lzma"
        )


def try_compressor(name):
    """check_compressor and a round trip of each of its codecs: a program that is there may
    still lack a library.
    """
    check_compressor(name)
    sample, shapes = b"1234" * 8, [(4, 8)]
    for codec in COMPRESSORS[name][1:]:
        try:
            fault = (
                expand(codec, ENCODERS[codec](sample, shapes), len(sample), shapes) != sample
                and "other bytes"
            )
        except (ArtifactError, OSError) as error:
            fault = error
        if fault:
            raise SettingError(f"COMPRESSOR={name} does not work here, {codec}: {fault}")


MAX_RAW_BYTES, MAX_DIMENSIONS = 2**30, 8  # of an artifact's arrays
ARRAY_DTYPES = (
    "bool float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
)


def check_specs(specs):
    """ValueError for names, dtypes and sizes of arrays (ArraySpec) that no artifact holds: a
    header may be hostile.
    """
    for name, dtype, shape in specs:
        sized = (
            all(type(n) is int and n >= 0 for n in shape)
            and math.prod(max(n, 1) for n in shape) <= MAX_RAW_BYTES
        )
        if (
            type(name) is not str
            or dtype not in ARRAY_DTYPES
            or len(shape) > MAX_DIMENSIONS
            or not sized
        ):
            raise ValueError(f"{name}: an artifact cannot hold {dtype} {shape}")
    if (
        len({spec.name for spec in specs}) != len(specs)
        or sum(spec.num_bytes for spec in specs) > MAX_RAW_BYTES
    ):
        raise ValueError(f"an array stands twice, or all take more than {MAX_RAW_BYTES} bytes")


class ArraySpec(NamedTuple):
    """Name, dtype and shape of an array as it is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self):
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


def roles_of(specs):
    """{name: role of the matrix} of the specs that are matrices of int8 codes."""
    roles = {}
    for spec in specs:
        name, _, field = spec.name.rpartition(":")
        is_matrix = (
            field == "codes"
            and spec.dtype == "int8"
            and len(spec.shape) == 2
            and max(spec.shape) <= 2**16
        )
        if is_matrix and quant_role(name):
            roles[spec.name] = quant_role(name)[0]
    return roles


def codes_by_role(specs, roles):
    """One list for each role: specs of its codes, layers in order, transposed."""
    groups = []
    for role in dict.fromkeys(role for role, _, _ in QUANT_TABLE.values()):
        groups.append(
            [
                spec._replace(shape=spec.shape[::-1])
                for spec in specs
                if roles.get(spec.name) == role
            ]
        )
        # blocks.2 before blocks.10
        groups[-1].sort(key=lambda spec: int("0" + re.sub(r"\D", "", spec.name)))
    return groups


def plan_sections(specs, compressor):
    """Specs of the arrays -> (kind, codec, specs as stored) per section; packing and unpacking both
    follow this plan. entropy: the "codes" of all roles as one section, the "rest".
    """
    if len(COMPRESSORS[compressor]) == 2:
        return [("rest", compressor, specs)]
    roles = roles_of(specs)
    codes = sum(codes_by_role(specs, roles), [])
    return [
        ("codes", "entropy", codes),
        ("rest", "brotli", [spec for spec in specs if spec.name not in roles]),
    ]


def section_sources(arrays, plan):
    """{kind of section: {name: array as it is stored there}} of the arrays that are packed."""
    return {"rest": arrays, "codes": {name: array.T for name, array in arrays.items()}}


def join_sections(found):
    """{kind of section: {name: array as stored}} -> {name: array}, the inverse."""
    return found["rest"] | {name: codes.T for name, codes in found["codes"].items()}


def by_item_size(specs):
    """Specs -> (item size, specs of that size), smallest first: the layout inside a section."""
    return [
        (size, [spec for spec in specs if np.dtype(spec.dtype).itemsize == size])
        for size in (1, 2, 4, 8)
    ]


def join_arrays(arrays, specs):
    """Arrays -> bytes, little endian; per item size all lowest bytes stand first, then all next
    ones (byte shuffle).
    """
    planes = []
    for size, group in by_item_size(specs):
        raw = b"".join(
            arrays[s.name].astype(np.dtype(s.dtype).newbyteorder("<"), copy=False).tobytes()
            for s in group
        )
        planes.append(np.frombuffer(raw, np.uint8).reshape(-1, size).T.tobytes())
    return b"".join(planes)


def split_arrays(raw, specs):
    """The inverse of join_arrays; the arrays are read-only and little endian."""
    arrays, raw = {}, io.BytesIO(raw)
    for size, group in by_item_size(specs):
        planes = np.frombuffer(raw.read(sum(spec.num_bytes for spec in group)), np.uint8).reshape(
            size, -1
        )
        data = io.BytesIO(planes.T.tobytes())
        for spec in group:
            flat = np.frombuffer(data.read(spec.num_bytes), np.dtype(spec.dtype).newbyteorder("<"))
            arrays[spec.name] = flat.reshape(spec.shape)
    return arrays


def pack_weights(arrays, compressor, tell=lambda share: None):
    """Named numpy arrays -> artifact bytes; `tell(share done)` as it goes on.

    ValueError for what cannot be packed.
    """
    specs = [ArraySpec(name, array.dtype.name, array.shape) for name, array in arrays.items()]
    check_compressor(compressor)
    check_specs(specs)
    # and the bytes of the sections that are done
    plan, packed = plan_sections(specs, compressor), []
    sources = section_sources(arrays, plan)

    def encode(kind, codec, members):
        raw = join_arrays(sources[kind], members)
        stored = ENCODERS[codec](raw, [spec.shape for spec in members]) if raw else b""
        packed.append(len(raw))
        tell(
            sum(packed) / max(1, sum(spec.num_bytes for _, _, members in plan for spec in members))
        )
        return stored, [len(stored), digest(stored).hex(), digest(raw).hex()]

    with ThreadPoolExecutor(CODEC_THREADS) as pool:
        sections = list(pool.map(encode, *zip(*plan, strict=True)))
    raw = json.dumps([specs, [about for _, about in sections]], separators=(",", ":")).encode()
    if len(raw) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the names and shapes of {len(arrays)} arrays do not fit an artifact's header"
        )
    stored = ENCODERS[COMPRESSORS[compressor][1]](raw)
    prefix = PREFIX.pack(MAGIC, COMPRESSORS[compressor][0], len(stored), len(raw))
    return b"".join([prefix, digest(prefix + stored), stored, *(data for data, _ in sections)])


def read_header(blob):
    """Artifact -> specs, plan_sections of them, [size, digests] per section, start of the
    first; all sizes checked.
    """
    start = PREFIX.size + DIGEST_BYTES
    magic, number, stored_size, raw_size = PREFIX.unpack(
        blob[: PREFIX.size].ljust(PREFIX.size, b"\0")
    )
    stored = blob[start : start + stored_size]
    intact = magic == MAGIC and digest(blob[: PREFIX.size] + stored) == blob[PREFIX.size : start]
    compressor = {n: c for c, (n, *_) in COMPRESSORS.items()}.get(number)
    if (
        not intact
        or not compressor
        or number != COMPRESSORS[compressor][0]
        or raw_size > MAX_HEADER_BYTES
    ):
        raise ArtifactError(
            "artifact: not a file of this program, or its header is damaged or cut off"
        )
    check_compressor(compressor)
    try:
        arrays, sections = json.loads(expand(COMPRESSORS[compressor][1], stored, raw_size))
        specs = [ArraySpec(name, dtype, tuple(shape)) for name, dtype, shape in arrays]
        check_specs(specs)
        sizes = [size for size, _, _ in sections]
        whole = all(type(n) is int and n >= 0 for n in sizes) and start + stored_size + sum(
            sizes
        ) == len(blob)
        plan = plan_sections(specs, compressor)
        if not whole or len(sections) != len(plan):
            raise ValueError("its sections are not those of its arrays, or not as long as the file")
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"artifact: the header is wrong: {error}") from error
    return specs, plan, sections, start + stored_size


def unpack_weights(blob):
    """Artifact bytes -> the packed arrays, bit for bit, in order.

    ArtifactError if pack_weights did not write them.
    """
    specs, plan, sections, start = read_header(blob)
    ends = np.cumsum([start] + [size for size, _, _ in sections]).tolist()

    def decode(planned, section, end):
        (kind, codec, members), (size, stored_digest, raw_digest) = planned, section
        stored, raw_size = blob[end - size : end], sum(spec.num_bytes for spec in members)
        if digest(stored).hex() == stored_digest:
            raw = expand(codec, stored, raw_size, [spec.shape for spec in members])
        if digest(stored).hex() != stored_digest or digest(raw).hex() != raw_digest:
            raise ArtifactError(f"artifact: a section of {codec} data is damaged")
        return kind, split_arrays(raw, members)

    found = defaultdict(dict)
    with ThreadPoolExecutor(CODEC_THREADS) as pool:
        for kind, arrays in pool.map(decode, plan, sections, ends[1:]):
            found[kind] |= arrays
    unpacked = join_sections(found)
    return {name: np.array(unpacked[name], dtype, order="C") for name, dtype, _ in specs}


# ---- EVALUATION ----------------------------------------------------------------------------------
HEAD_CHUNK = 8192  # positions whose float32 logits exist at a time


def bits_per_byte(nats, num_bytes):
    return nats / math.log(2) / num_bytes


class Score:
    """Sums of nats, tokens and bytes over scored targets, kept on the device in float64."""

    def __init__(self, device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, losses, scored, target_bytes):
        """Adds the targets that `scored` (bool) marks: nats and bytes, all of one shape."""
        nats = torch.where(scored, losses, 0.0).double().sum()
        num_bytes = torch.where(scored, target_bytes, 0).sum()
        self.sums += torch.stack([nats, scored.sum(), num_bytes])

    def total(self, dist, expected):
        """Sums over ranks -> {loss, bpb, tokens, bytes}.

        Raises RuntimeError unless (tokens, bytes) are as expected.
        """
        nats, tokens, num_bytes = dist.all_reduce(self.sums.clone()).tolist()
        tokens = int(tokens)
        num_bytes = int(num_bytes)
        if (tokens, num_bytes) != tuple(expected):
            raise RuntimeError(
                f"scored {tokens} tokens and {num_bytes} bytes, the documents have {expected}"
            )
        bpb = bits_per_byte(nats, num_bytes)
        return {"loss": nats / tokens, "bpb": bpb, "tokens": tokens, "bytes": num_bytes}


def document_windows(starts, ends, length, stride):
    """Input spans of documents -> (n, 3) int64 windows: start, end, first scored input.

    Windows advance by the stride. The first window of a document scores all its inputs, each later
    one those that no earlier window scored, at most `stride`: every target is scored once, with the
    longest context. stride = length gives disjoint windows.
    """
    targets = ends - starts
    num_windows = np.maximum(1, 1 - (length - targets) // stride)
    num_windows = np.where(targets > 0, num_windows, 0)
    document = np.repeat(np.arange(len(starts)), num_windows)
    first_window = np.cumsum(num_windows) - num_windows
    number = np.arange(num_windows.sum()) - np.repeat(first_window, num_windows)
    start = starts[document] + number * stride
    end = np.minimum(start + length, ends[document])
    first_scored = np.where(number == 0, start, start + length - stride)
    return np.stack([start, end, first_scored], axis=1)


class ScoredRow(NamedTuple):
    """Windows packed in one row, padded to a fixed length; windows never attend to each other."""

    inputs: Tensor  # (1, T) int64
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (N + 1,) int32
    window_start: Tensor  # (1, T) bool: first input of a window, which has no previous token
    scored: Tensor  # (T,) bool
    target_bytes: Tensor  # (T,) int64


class WindowPacker:
    """Packs windows of the validation stream, in order, into rows of one shape on the device."""

    def __init__(self, validation, row_tokens, max_window, max_segments, device):
        self.row_tokens = max(row_tokens, max_window)
        self.max_window = max_window
        self.max_segments = max_segments
        self.device = device
        self.end = len(validation.tokens) - 1
        self.tokens = torch.from_numpy(validation.tokens).to(device)
        self.bytes = torch.from_numpy(validation.bytes).to(device)

    def rows(self, windows):
        """(n, 3) windows -> list of (first, last) window numbers of each row."""
        rows = []
        first = 0
        filled = 0
        # padding is cut into segments of at most max_window, too
        max_windows = self.max_segments - -(-self.row_tokens // self.max_window)
        lengths = windows[:, 1] - windows[:, 0]
        for number, length in enumerate(lengths.tolist()):
            is_full = filled + length > self.row_tokens or number - first >= max_windows
            if number > first and is_full:
                rows.append((first, number))
                first = number
                filled = 0
            filled += length
        if len(windows):
            rows.append((first, len(windows)))
        return rows

    def build(self, windows):
        """Packs the windows of one row -> ScoredRow."""
        start, end, first_scored = windows.T
        lengths = end - start
        borders = np.concatenate([[0], np.cumsum(lengths)])
        offsets = borders[:-1]
        filled = int(borders[-1])
        padding = np.arange(filled, self.row_tokens, self.max_window)
        segments = np.concatenate([offsets, padding])
        cu_seqlens = pad_cu_seqlens(segments, self.row_tokens, self.max_segments)
        # padding reads the stream's last token and is not scored
        source = np.full(self.row_tokens, self.end)
        source[:filled] = np.repeat(start - offsets, lengths) + np.arange(filled)
        scored = np.zeros(self.row_tokens, bool)
        scored[:filled] = source[:filled] >= np.repeat(first_scored, lengths)
        window_start = np.zeros(self.row_tokens, bool)
        window_start[offsets] = True
        source = self.upload(source)
        target = (source + 1).clamp_max(self.end)
        return ScoredRow(
            self.tokens[source][None],
            self.tokens[target],
            self.upload(cu_seqlens),
            self.upload(window_start)[None],
            self.upload(scored),
            self.bytes[target],
        )

    def upload(self, array):
        return torch.from_numpy(array).to(self.device)


class Evaluator:
    """Plain and sliding-window BPB of a model.

    Windows are packed into rows, rows are shared out over the ranks, every target is scored once.
    """

    def __init__(self, model, validation, hp, dist):
        self.model = model
        self.validation = validation
        self.hp = hp
        self.dist = dist
        # windows of full length in a row, or segments of its padding
        full_windows = -(-hp.micro_batch_tokens // hp.eval_seq_len)
        max_segments = max(hp.row_segments, 2 * full_windows + 8)
        self.packer = WindowPacker(
            validation, hp.micro_batch_tokens, hp.eval_seq_len, max_segments, dist.device
        )
        self.token_losses = compiled(model.token_losses, hp, dist)
        self.compiled_parts = CompiledParts(
            compiled(model.slot_input, hp, dist), compiled(model.block, hp, dist)
        )

    def row_losses(self, row):
        """ScoredRow -> (T,) nats, with float32 logits."""
        hidden = self.model.forward_hidden(
            row.inputs,
            row.cu_seqlens,
            max_seqlen=self.hp.eval_seq_len,
            looping=True,
            window_start=row.window_start,
            compiled_parts=self.compiled_parts,
        )
        losses = []
        pairs = zip(hidden[0].split(HEAD_CHUNK), row.targets.split(HEAD_CHUNK), strict=True)
        for hidden_chunk, targets in pairs:
            losses.append(self.token_losses(hidden_chunk, targets))
        return torch.cat(losses)

    @torch.no_grad()
    def add_losses(self, windows, score, first_row=0, every=1):
        """Adds the losses of windows to a score, for one row in `every` from first_row on."""
        for first, last in self.packer.rows(windows)[first_row::every]:
            row = self.packer.build(windows[first:last])
            score.add(self.row_losses(row), row.scored, row.target_bytes)

    def evaluate_bpb(self, stride=None):
        """Scores all validation documents -> {loss, bpb, tokens, bytes}.

        Without a stride in disjoint windows, with one in sliding windows.
        """
        stream = self.validation
        length = self.hp.eval_seq_len
        windows = document_windows(stream.starts, stream.ends, length, stride or length)
        score = Score(self.dist.device)
        self.add_losses(windows, score, self.dist.rank, self.dist.world_size)
        documents = np.arange(len(stream.starts))
        return score.total(self.dist, stream.targets_of(documents))


# ---- TEST-TIME TRAINING --------------------------------------------------------------------------
# Score first: the loss of a chunk is added to the score before anything trains on the chunk.
#
# The plan is fixed before the first step and depends on lengths alone: documents, longest first, go
# to phases, lanes and queues. A queue is a sequence of documents on one rank; a document inherits
# the adapters' A from the one before it in its queue, and nothing else. Base weights change between
# phases only, on documents already scored. Chunks of many queues run together in steps of few
# static shapes: which queues share a step changes rounding and nothing else.


def recomputed_context(hp):
    """Positions computed at the end of a window: all, or those after the stale context."""
    return hp.ttt_eval_seq_len - hp.ttt_stale_context


class Phase(NamedTuple):
    """Documents scored with the same base weights, which they fine-tune afterwards if `adapt`."""

    lanes: list  # for each lane its queues, for each queue the numbers of its documents
    documents: np.ndarray
    adapt: bool


def plan_ttt(lengths, hp):
    """(n,) targets of each document -> list of Phase, the same for every world size."""
    order = np.argsort(-lengths, kind="stable")
    costs = window_positions(lengths, hp).tolist()
    num_adapting = hp.phased_ttt_num_phases
    scaled_prefix = round(hp.phased_ttt_prefix_docs * len(order) / 50_000)
    prefix = min(len(order), scaled_prefix)
    borders = [prefix * (i + 1) // num_adapting for i in range(num_adapting)]
    borders.append(len(order))
    phases = []
    first = 0
    for number, last in enumerate(borders):
        if last > first:
            documents = order[first:last]
            num_queues = hp.ttt_lanes * hp.ttt_batch_size
            queues = balance(documents.tolist(), costs.__getitem__, num_queues)
            lanes = [queues[lane :: hp.ttt_lanes] for lane in range(hp.ttt_lanes)]
            phases.append(Phase(lanes, documents, adapt=number < num_adapting))
        first = last
    return phases


def window_positions(lengths, hp):
    """(n,) targets -> (n,) window positions computed to score these documents: their cost."""
    size = hp.chunk_size_of(lengths)
    context = recomputed_context(hp)
    num_chunks = -(-lengths // size)
    # windows grow by a chunk each until they reach the context
    num_growing = np.minimum(num_chunks, context // size)
    growing = size * num_growing * (num_growing + 1) // 2
    return growing + (num_chunks - num_growing) * context


class StepRow(NamedTuple):
    """A chunk of one document in a step: ints on the host, on the device columns (B,)."""

    source: int  # state row that the step reads
    target: int  # state row it writes; scratch after the last chunk, from which nothing is learned
    window: int  # first input of the window, a position in the stream
    first: int  # first input of the chunk, a position in the window
    count: int  # targets of the chunk, 0 in a row of padding
    number: int  # of the chunk in its document, from 1: AdamW's step


class Step(NamedTuple):
    """Chunks of several documents, scored and learned from together."""

    table: np.ndarray  # (B, 6) int64, one StepRow in each row
    begins: np.ndarray  # (n, 2) state row and queue of documents that begin with this step
    ends: np.ndarray  # (n, 2) the same for documents that end with it
    width: int  # of the windows, stale context included
    cost: float = 0.0  # step_seconds


def step_seconds(rows, width, recomputed=math.inf):
    """Fitted cost model: seconds of one step of the default model on an H100.

    Of each window the last `recomputed` positions are computed, the older ones only attended to.
    """
    if width > recomputed:
        # copying a cached position, and every recomputed position attending to it
        per_cached = 8e-9 + 3.2e-10 * recomputed
        cached = rows * (width - recomputed) * per_cached
        return step_seconds(rows, recomputed) + 1.5e-3 + cached
    # matmuls of a position, and its attention
    per_position = 1.08e-6 + 5.5e-11 * width
    # adapters of a row and their AdamW, and its positions
    per_row = 7e-5 + width * per_position
    return 3e-3 + rows * per_row  # launches


class Chunk(NamedTuple):
    """A chunk of a document before the scheduler has given it a state row; see StepRow."""

    width: int  # of its window, stale context included
    is_last: bool
    window: int
    first: int
    count: int
    number: int


def document_chunks(start, length, hp):
    """First input of a document in the stream, its number of targets -> list of Chunk."""
    size = int(hp.chunk_size_of(length))
    context = hp.ttt_eval_seq_len
    recomputed = recomputed_context(hp)
    chunks = []
    for number, first in enumerate(range(0, length, size), 1):
        end = min(first + size, length)
        window = max(0, end - recomputed)
        width = min(end, context)
        is_last = end == length
        chunks.append(Chunk(width, is_last, start + window, first - window, end - first, number))
    return chunks


def num_state_rows(num_lanes, hp):
    """State rows of a rank: two full steps' worth, so that steps of one width can fill up."""
    return hp.ttt_batch_size * min(2, num_lanes)


class Scheduler:
    """Packs the chunks of a rank's queues into steps of few static shapes; needs lengths only.

    queues: lists of document numbers; starts, lengths (n,): first inputs and targets of all
    documents. A queue holds one of num_rows state rows from its first chunk to its last, and its
    chunks keep their order. Greedy: each step has the shape with the least cost per useful row, and
    takes the queues with the most chunks left, so that no long queue remains alone at the end.
    """

    def __init__(self, queues, starts, lengths, num_rows, hp):
        context = hp.ttt_eval_seq_len
        shares = (1, 2, 4, 8, 12, 16)
        self.widths = sorted({max(hp.ttt_chunk_size, -(-context * n // 16)) for n in shares})
        self.row_counts = sorted({max(2, hp.ttt_batch_size // n) for n in (16, 4, 1)})
        self.costs = {}  # (index of the width, rows) -> step_seconds
        for index, width in enumerate(self.widths):
            for rows in self.row_counts:
                self.costs[index, rows] = step_seconds(rows, width, recomputed_context(hp))
        self.scratch_row = num_rows
        self.free_rows = list(range(num_rows))
        self.chunks_left = []  # of each queue, the next one last
        for documents in queues:
            chunks = []
            for document in documents:
                chunks += document_chunks(int(starts[document]), int(lengths[document]), hp)
            self.chunks_left.append(chunks[::-1])
        waiting = [queue for queue, chunks in enumerate(self.chunks_left) if chunks]
        self.waiting = sorted(waiting, key=self.num_chunks_left)
        self.ready = [[] for _ in self.widths]  # for each width its (state row, queue)

    def num_chunks_left(self, queue):
        return len(self.chunks_left[queue])

    def steps(self):
        """Empties the queues -> list of Step."""
        steps = []
        while self.waiting or any(self.ready):
            while self.waiting and self.free_rows:
                self.make_ready(self.free_rows.pop(), self.waiting.pop())
            steps.append(self.emit(*self.next_shape()))
        return steps

    def make_ready(self, row, queue):
        """Files a queue under the width that its next chunk needs."""
        needed = self.chunks_left[queue][-1].width
        self.ready[bisect.bisect_left(self.widths, needed)].append((row, queue))

    def next_shape(self):
        """The shape with the least cost per useful row -> (index of its width, rows)."""
        shapes = []
        for index, ready in enumerate(self.ready):
            if ready:
                shapes += [(index, rows) for rows in self.row_counts]
        return min(shapes, key=self.cost_per_useful_row)

    def cost_per_useful_row(self, shape):
        """Cost of a step of this shape in full steps of its width, per row that is not padding."""
        index, rows = shape
        full_step = self.costs[index, self.row_counts[-1]]
        return self.costs[shape] / full_step / min(len(self.ready[index]), rows)

    def emit(self, index, rows):
        """Takes the next chunks of the ready queues with most chunks left -> Step of this shape."""
        longest_first = sorted(self.ready[index], key=lambda pair: -self.num_chunks_left(pair[1]))
        taken = longest_first[:rows]
        self.ready[index] = longest_first[rows:]
        padding = StepRow(self.scratch_row, self.scratch_row, 0, 0, 0, 1)
        table = [padding] * (rows - len(taken))
        begins = []
        ends = []
        for row, queue in taken:
            chunk = self.chunks_left[queue].pop()
            target = self.scratch_row if chunk.is_last else row
            table.append(StepRow(row, target, chunk.window, chunk.first, chunk.count, chunk.number))
            if chunk.number == 1:
                begins.append((row, queue))
            if chunk.is_last:
                ends.append((row, queue))
            if self.chunks_left[queue]:
                self.make_ready(row, queue)
            else:
                self.free_rows.append(row)
        begins = np.array(begins, np.int64).reshape(-1, 2)
        ends = np.array(ends, np.int64).reshape(-1, 2)
        return Step(np.array(table), begins, ends, self.widths[index], self.costs[index, rows])


def schedule_rank(phases, starts, lengths, rank, world_size, hp):
    """Steps of one rank for each phase of plan_ttt, from (n,) first inputs and targets alone."""
    lanes = range(rank, hp.ttt_lanes, world_size)
    schedules = []
    for phase in phases:
        queues = []
        for lane in lanes:
            queues += phase.lanes[lane]
        scheduler = Scheduler(queues, starts, lengths, num_state_rows(len(lanes), hp), hp)
        schedules.append(scheduler.steps())
    return schedules


LORA_INPUTS = (("q", "k", "v", "attn_out"), ("mlp_out",))  # sites that read the same tensor
FUSED_SITES = {"qkv": ("q", "k", "v")}  # matmuls of the model that serve several sites at once


class SlotLoRA:
    """Adds (x A) B at the sites of one slot, with a pair (A, B) for each row of the batch.

    a: [(sites that read the same x, (B, in, sites R))]: one matmul at the first of these sites
    serves all of them. b: {site: (B, R, out)}, alpha / rank included. widths: {site: out}.
    """

    splits_mlp = False

    def __init__(self, a, b, widths):
        self.a = a
        self.b = b
        self.widths = widths
        self.x_a = {}  # x A of sites that the forward has not reached yet

    def matrices(self):
        return [*(matrix for _, matrix in self.a), *self.b.values()]

    def __call__(self, site, x, y, size=1.0):
        sites = FUSED_SITES.get(site, (site,))
        adapted = [name for name in sites if name in self.b]
        if not adapted:
            return y
        for readers, a in self.a:
            if readers[0] in adapted:
                pieces = (x @ a).chunk(len(readers), -1)
                self.x_a.update(zip(readers, pieces, strict=True))
        outputs = []
        for name in sites:
            if name in self.b:
                # B is scaled, not the activations: dL/dy is then the gradient of every matmul
                outputs.append(self.x_a.pop(name) @ (self.b[name] * size))
            else:
                outputs.append(x.new_zeros(*x.shape[:-1], self.widths[name]))
        return y + torch.cat(outputs, -1)


class LoRALayout:
    """Where the adapters' matrices lie in a flat row; all are (in, out), as their gradients come.

    A row has four parts: A of lm_head, A of every slot, B of every slot, B of lm_head. The first
    two are what a document can inherit.
    """

    def __init__(self, hp, num_slots):
        D = hp.model_dim
        R = hp.ttt_lora_rank
        kv_dim = hp.num_kv_heads * hp.head_dim
        self.rank = R
        self.num_slots = num_slots
        self.widths = {"q": D, "k": kv_dim, "v": kv_dim, "attn_out": D, "mlp_out": D}
        chosen = [site for name, site in LORA_SITES.items() if name in hp.lora_sites]
        self.sites = [site for site in chosen if site != "lm_head"]
        self.readers = []  # sites of a slot that share a matmul with A
        for sites in LORA_INPUTS:
            present = tuple(site for site in sites if site in self.sites)
            if present:
                self.readers.append(present)
        self.a_shapes = [(D, len(sites) * R) for sites in self.readers]
        self.b_shapes = [(R, self.widths[site]) for site in self.sites]
        self.has_head = "lm_head" in chosen
        head_rank = R if self.has_head else 0
        a_size = num_slots * sum(map(math.prod, self.a_shapes))
        b_size = num_slots * sum(map(math.prod, self.b_shapes))
        self.sizes = (D * head_rank, a_size, b_size, head_rank * hp.num_embeddings)
        self.a_total = D * head_rank + a_size

    def slices(self):
        """Columns of the four parts in a row."""
        ends = np.cumsum(self.sizes).tolist()
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def matrices(self, part, shapes):
        """(B, n), a part with matrices of these shapes for every slot -> for each slot its list.

        One split makes all the views, so that backward writes the gradient of the part once.
        """
        pieces = part.split([*map(math.prod, shapes)] * self.num_slots, 1)
        slots = []
        for slot in range(self.num_slots):
            own = pieces[slot * len(shapes) : (slot + 1) * len(shapes)]
            slots.append([t.unflatten(1, shape) for t, shape in zip(own, shapes, strict=True)])
        return slots


class BatchedLoRA:
    """Adapters of a rank's documents and their AdamW (beta1 = 0), in flat float32 rows.

    values and squares (rows + 1, n): one state row for each document in flight and a scratch row,
    the last; LoRALayout says what a row holds. warm_a: A of every queue between its documents.
    """

    def __init__(self, model, lanes, hp, device, update):
        self.hp = hp
        self.update = update
        self.layout = LoRALayout(hp, len(model.slots(looping=True)))
        scale = hp.ttt_lora_alpha / hp.ttt_lora_rank
        self.scales = (1.0, 1.0, scale, scale)
        self.dtypes = (torch.float32, model.dtype, model.dtype, torch.float32)
        self.scratch_row = num_state_rows(len(lanes), hp)
        bound = hp.model_dim**-0.5
        warm_a = torch.empty(len(lanes), hp.ttt_batch_size, self.layout.a_total, device=device)
        for lane, of_lane in zip(lanes, warm_a, strict=True):
            # by lane, so that queues start alike whatever the number of ranks
            generator = torch.Generator(device).manual_seed(hp.generator_seed * 1_000_003 + lane)
            of_lane.uniform_(-bound, bound, generator=generator)
        self.warm_a = warm_a.flatten(0, 1)
        shape = (self.scratch_row + 1, sum(self.layout.sizes))
        self.values = torch.zeros(shape, device=device)
        self.squares = torch.zeros(shape, device=device)

    def begin(self, rows, queues):
        """New documents in these rows: A from their queue, B zero, no squares."""
        b_total = self.values.size(1) - self.layout.a_total
        self.values[rows] = F.pad(self.warm_a[queues], (0, b_total))
        self.squares[rows] = 0.0

    def end(self, rows, queues):
        """Leaves A of finished documents to the next document of their queue."""
        if self.hp.ttt_warm_start_a:
            self.warm_a[queues] = self.values[rows, : self.layout.a_total]

    def scaled_parts(self, values, rows):
        """Parts of these rows as the model takes them: slots cast, B times alpha / rank."""
        scaled = []
        parts = values[rows].split(self.layout.sizes, 1)
        for part, scale, dtype in zip(parts, self.scales, self.dtypes, strict=True):
            scaled.append((part * scale).to(dtype))
        return scaled

    def tap(self, parts):
        """scaled_parts -> tap for GPT: a SlotLoRA for each slot, float32 for the head."""
        layout = self.layout
        head_a, slots_a, slots_b, head_b = parts
        slots = []
        of_slots = zip(
            layout.matrices(slots_a, layout.a_shapes),
            layout.matrices(slots_b, layout.b_shapes),
            strict=True,
        )
        for a, b in of_slots:
            readers_a = list(zip(layout.readers, a, strict=True))
            sites_b = dict(zip(layout.sites, b, strict=True))
            slots.append(SlotLoRA(readers_a, sites_b, layout.widths))
        head = SlotLoRA([], {}, {})
        if layout.has_head:
            a = head_a.unflatten(1, (-1, layout.rank))
            b = head_b.unflatten(1, (layout.rank, -1))
            head = SlotLoRA([(("lm_head",), a)], {"lm_head": b}, {})
        return SimpleNamespace(slots=slots, at=lambda slot, layer: slots[slot], head=head)

    @torch.no_grad()
    def step(self, gradients, source, target, number):
        """One AdamW step from state rows `source` (B,) into rows `target` (B,).

        gradients: of scaled_parts; number (B,): which step of its document this is, from 1.
        """
        hp = self.hp
        rates = (hp.ttt_lora_lr, hp.ttt_weight_decay, hp.ttt_beta2)
        correction = 1 - hp.ttt_beta2 ** number.double()
        correction = correction.to(self.values.dtype)
        of_parts = zip(gradients, self.layout.slices(), self.scales, strict=True)
        for gradient, columns, scale in of_parts:
            values = self.values[:, columns]
            squares = self.squares[:, columns]
            self.update(values, squares, gradient, source, target, correction, scale, rates)


def sgd_step(model, packer, windows, optimizer, rate, dist):
    """One SGD step of all ranks on the mean loss of windows (n, 3), at learning rate `rate`."""
    num_tokens = int((windows[:, 1] - windows[:, 0]).sum())
    own_windows = windows[dist.rank :: dist.world_size]
    reset_gradients(model.parameters())
    for first, last in packer.rows(own_windows):
        row = packer.build(own_windows[first:last])
        losses = model(
            row.inputs, row.targets, row.cu_seqlens, True, packer.max_window, row.window_start
        )
        loss = torch.where(row.scored, losses, 0.0).sum() / num_tokens
        loss.backward()
    dist.all_reduce_packed([p.grad for p in model.parameters()])
    torch.nn.utils.clip_grad_norm_(model.parameters(), model.hp.global_ttt_grad_clip)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


class StaleSegments(NamedTuple):
    """Segments of rows whose older keys and values come from a cache (see StaleContext).

    For each row the N keys hold its older ones, then its new ones.
    """

    cache: Tensor  # (2, M, K, E): older keys and values of one slot
    key_rows: Tensor  # (N,): where the keys are in the cache; new ones are overwritten
    new_key_rows: Tensor  # (B T,): which of the N are new, that is, the rows' own
    cu_seqlens: Tensor  # (2, B + 1) int32: borders of queries and of keys
    max_seqlen: int  # no row has more keys
    new_kv: list  # attend leaves the new keys and values here

    def attend(self, ops, q, k, v, attn_window=0):
        """q (B, T, H, E), new k and v (B, T, K, E) -> (B, T, H, E), causal; without windows."""
        self.new_kv.extend((k, v))
        older_k, older_v = self.cache
        all_k = older_k[self.key_rows].index_copy(0, self.new_key_rows, k.flatten(0, 1))[None]
        all_v = older_v[self.key_rows].index_copy(0, self.new_key_rows, v.flatten(0, 1))[None]
        row_q = q.flatten(0, 1)[None]
        if ops.names["attention"] != "sdpa":
            y = ops.attention(row_q, all_k, all_v, self.cu_seqlens, self.max_seqlen)
            return y.view(q.shape)
        # The reference takes a query for every key: the others are zero, their outputs unused
        all_q = row_q.new_zeros(1, all_k.size(1), *row_q.shape[2:])
        all_q = all_q.index_copy(1, self.new_key_rows, row_q)
        y = ops.attention(all_q, all_k, all_v, self.cu_seqlens[1], self.max_seqlen)
        return y[:, self.new_key_rows].view(q.shape)


class StaleContext:
    """Keys and values from before the windows, from the last step that had them in its windows.

    Adapters have learned since, so they are stale [TTT_STALE_CONTEXT]. Each state row has `length`
    places in the cache; position p of its document is at p modulo `length`.
    """

    def __init__(self, model, starts, num_rows, device):
        hp = model.hp
        self.hp = hp
        self.length = hp.ttt_stale_context + hp.ttt_chunk_size
        num_slots = len(model.slots(looping=True))
        shape = (num_slots, 2, (num_rows + 1) * self.length, hp.num_kv_heads, hp.head_dim)
        self.cache = model.cos.new_zeros(shape, dtype=model.dtype)
        self.starts = torch.from_numpy(starts).to(device)
        # of the running step
        self.width = 0
        self.positions = None  # (B, width) in the documents
        self.rope = None
        self.segments = None  # without cache and new_kv, which are of a slot
        self.new_kv = []  # [keys, values] of each slot so far

    def begin(self, rows, windows, width):
        """Begins a step of state rows (B,) with windows (B,) in the stream -> computed positions.

        Sets the index tensors that all slots of the step share.
        """
        device = rows.device
        chunk = self.hp.ttt_chunk_size
        self.width = min(width, recomputed_context(self.hp))
        max_cached = max(width - self.width, chunk)
        document = torch.searchsorted(self.starts, windows, right=True) - 1
        before = windows - self.starts[document]
        self.positions = before[:, None] + torch.arange(self.width, device=device)
        # keys of a row of the batch: cached ones, then those of its window; rows follow each other
        cached = before.clamp_max(max_cached)
        ends = (cached + self.width).cumsum(0)
        key = torch.arange(len(rows) * (max_cached + self.width), device=device)
        # nothing reads the keys after the last end
        key_row = torch.searchsorted(ends, key, right=True).clamp_max(len(rows) - 1)
        key_position = (before + self.width - ends)[key_row] + key
        key_rows = rows[key_row] * self.length + key_position % self.length
        new_keys = torch.arange(-self.width, 0, device=device)
        new_key_rows = (ends[:, None] + new_keys).flatten()
        queries = torch.arange(len(rows) + 1, device=device) * self.width
        cu_seqlens = torch.stack((queries, F.pad(ends, (1, 0)))).int()
        context = self.hp.ttt_eval_seq_len
        self.segments = StaleSegments(None, key_rows, new_key_rows, cu_seqlens, context, None)
        self.rope = rotary_tables(self.positions, self.hp)
        self.new_kv = []
        return self.width

    def drop_lookback(self, *streams):
        """Streams (B, T or 1 + T, D), or None -> the same without the token before the window."""
        return [x if x is None else x[:, -self.width :].contiguous() for x in streams]

    def of_slot(self, *streams):
        """Streams as drop_lookback takes them -> without that token, and the next slot's rotary
        tables and StaleSegments.
        """
        slot = len(self.new_kv)
        self.new_kv.append([])
        segments = self.segments._replace(cache=self.cache[slot], new_kv=self.new_kv[slot])
        return *self.drop_lookback(*streams), self.rope, segments

    def end(self, rows):
        """Ends a step: caches the first chunk of its windows in state rows (B,).

        Those positions may lie before the next windows, later ones do not.
        """
        chunk = self.hp.ttt_chunk_size
        cache_rows = rows[:, None] * self.length + self.positions[:, :chunk] % self.length
        first_chunks = []
        for keys_values in self.new_kv:
            first_chunks.append(torch.stack([t[:, :chunk].detach() for t in keys_values]))
        self.cache[:, :, cache_rows] = torch.stack(first_chunks)
        self.new_kv = []


def documents_to_score(validation, hp):
    """Numbers of the documents to score: all, or TTT_MAX_DOCS of evenly spread lengths.

    Raises DataError where they hold no byte.
    """
    lengths = validation.ends - validation.starts
    order = np.argsort(lengths, kind="stable")
    count = len(order)
    wanted = min(hp.ttt_max_docs or count, count)
    quantiles = (2 * np.arange(wanted) + 1) * count // (2 * wanted)
    documents = np.sort(order[quantiles])
    if hp.ttt_enabled and not validation.targets_of(documents)[1]:
        raise DataError(
            f"TTT_MAX_DOCS={hp.ttt_max_docs}: the documents that are left hold no byte: take more"
        )
    return documents


class Progress:
    """Budget, clock and progress lines of one rank's test-time training.

    Costs are in step_seconds, of another GPU perhaps: the pace of this run converts them.
    """

    def __init__(self, score, hp, log):
        self.started = time.perf_counter()
        self.score = score
        self.log = log
        # 2% stay in reserve
        self.budget = hp.eval_budget_seconds * 0.98 - log.seconds.get("unpack", 0.0)
        self.budget_left = self.budget
        self.cost_total = 1.0
        self.cost_done = 0.0
        self.tokens_total = 0
        self.tokens_done = 0
        self.documents_done = 0
        self.steps_started = self.started
        self.seconds_used = 0.0  # by steps so far
        self.next_report = 0.0  # share of the cost
        self.phase = ""

    def plan(self, steps):
        """Takes the totals of all steps to come."""
        self.cost_total = sum(step.cost for step in steps) or 1.0
        self.tokens_total = sum(int(StepRow(*step.table.T).count.sum()) for step in steps)

    def begin_steps(self):
        """Starts the clock of the steps where it stopped; other work in between is left out."""
        self.steps_started = time.perf_counter() - self.seconds_used

    def add(self, step):
        """Counts a step that has been launched."""
        self.cost_done += step.cost
        self.documents_done += len(step.ends)

    def seconds(self):
        """Since the start of test-time training."""
        return time.perf_counter() - self.started

    def report(self):
        """Waits for the device; updates the live line, and the log after every 5% of the work."""
        nats, tokens, num_bytes = self.score.sums.tolist()
        now = time.perf_counter()
        seconds = now - self.started
        self.tokens_done = tokens
        self.seconds_used = max(now - self.steps_started, 1e-9)
        self.budget_left = self.budget - seconds
        share = round(self.cost_done / self.cost_total, 6)
        bpb = bits_per_byte(nats, max(num_bytes, 1))
        rate = tokens / self.seconds_used
        line = (
            f"{self.phase} documents:{self.documents_done} running_tokens:{tokens:.0f}"
            f" running_bpb:{bpb:.5f} tokens_per_s:{rate:.0f} budget_left:{self.budget_left:.0f}"
        )
        self.log.live(share, line)
        if share >= self.next_report or share == 1.0:
            self.next_report = share + 0.05
            self.log(f"ttt_batch {line} seconds:{seconds:.1f}")

    def is_short_for(self, cost):
        """Can the budget of the last report not pay `cost` more and plain scoring of the rest?

        The rest costs a token's share of a full step: a plain forward takes less than that.
        """
        if not self.cost_done:
            return False
        tokens_left = self.tokens_total - self.tokens_done
        rest = tokens_left * step_seconds(64, 2048) / 64 / 2048
        pace = self.seconds_used / self.cost_done
        return self.budget_left < pace * (cost + rest)


class TestTimeTrainer:
    """Scores documents chunk by chunk, with one LoRA step after each scored chunk.

    Between phases the base weights are fine-tuned on documents already scored.
    """

    def __init__(self, model, validation, hp, dist, log):
        self.model = model
        self.validation = validation
        self.hp = hp
        self.dist = dist
        self.log = log
        self.score = Score(dist.device)
        # first of all: the adapters' tables and the upload of the stream count to the budget
        self.progress = Progress(self.score, hp, log)
        self.documents = documents_to_score(validation, hp)
        row_tokens = -(-hp.global_ttt_chunk_tokens // dist.world_size) + hp.ttt_eval_seq_len
        max_segments = max(hp.row_segments, 4 * row_tokens // hp.ttt_eval_seq_len + 8)
        self.packer = WindowPacker(
            validation, row_tokens, hp.ttt_eval_seq_len, max_segments, dist.device
        )
        lanes = range(dist.rank, hp.ttt_lanes, dist.world_size)
        self.lora = BatchedLoRA(model, lanes, hp, dist.device, model.ops.adamw_rows)
        if hp.ttt_stale_context:
            num_rows = self.lora.scratch_row
            self.stale = StaleContext(model, validation.starts, num_rows, dist.device)
        # One graph each for any number of rows and width of windows. Layer by layer, because
        # tracing all slots at once with unknown shapes takes minutes.
        self.compiled_parts = CompiledParts(
            compiled(model.slot_input, hp, dist, dynamic=None),
            compiled(model.block, hp, dist, dynamic=None),
        )
        self.token_losses = compiled(self.head_function(), hp, dist, dynamic=None)
        self.scaled_parts = compiled(self.lora.scaled_parts, hp, dist, dynamic=None)
        self.warming_up = False
        self.graphs = {}  # (rows, width) -> CUDA graph of chunk_step, table that it reads

    # What published systems replace.

    def head_function(self):
        """Function of hidden states (B, C, D), targets_at and a tap -> (B, C) nats."""
        return self.model.token_losses

    def targets_at(self, positions):
        """Targets for the head at these positions (B, C) of the stream."""
        return self.packer.tokens[positions]

    def learned_and_counted(self, losses):
        """What the head returned -> (B, C) losses to learn from, (B, C) losses to score."""
        return losses, losses

    def plan_made(self, starts, lengths, phases):
        """Called before the first chunk is scored, with the documents and the plan."""

    def skip_fine_tuning(self):
        """Called where no time is left to fine-tune the base weights after a phase."""
        self.log("note: no time to fine-tune the base weights")

    def chunk_losses(self, windows, targets, positions, tap):
        """Losses of chunks with these adapters, with float32 logits -> (B, C) nats.

        windows (B, W) ids; targets (B, C) ids; positions (B, C) of their inputs in the windows.
        """
        hidden = self.model.forward_hidden(
            windows,
            max_seqlen=self.hp.ttt_eval_seq_len,
            looping=True,
            tap=tap,
            compiled_parts=CompiledParts(self.dynamic_slot_input, self.dynamic_block),
        )
        scored = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.size(2)))
        self.mark_dynamic([0], scored, targets, *tap.head.matrices())
        return self.token_losses(scored, targets, tap.head)

    def dynamic_slot_input(self, x, x0, w, return_mix, return_merged, *skip):
        if self.hp.ttt_stale_context:
            x, x0 = self.stale.drop_lookback(x, x0)
        # the first layer shares the graph of the others
        x = x if x.requires_grad else x.detach().requires_grad_()
        self.mark_dynamic([0, 1], x, x0, *skip[:1])
        return self.compiled_parts.slot_input(x, x0, w, return_mix, return_merged, *skip)

    def dynamic_block(self, entry, mlp_lane, w, rope, segments, tap):
        if self.hp.ttt_stale_context:
            mlp_lane, rope, segments = self.stale.of_slot(mlp_lane)
            self.mark_dynamic([0, 1], *rope)
            self.mark_dynamic([0], segments.key_rows, segments.new_key_rows)
            self.mark_dynamic([1], segments.cu_seqlens)
        self.mark_dynamic([0, 1], *entry, mlp_lane)
        self.mark_dynamic([0], *rope, *tap.matrices())
        return self.compiled_parts.block(entry, mlp_lane, w, rope, segments, tap)

    def mark_dynamic(self, dimensions, *tensors):
        if not self.warming_up:  # later tensors need no marks, and marking takes time
            return
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, dimensions)

    def padding_table(self, rows):
        """(B, 6) table whose rows score nothing and learn nothing."""
        scratch = self.lora.scratch_row
        padding = StepRow(scratch, scratch, 0, 0, 0, 1)
        return torch.tensor([padding] * rows, device=self.dist.device)

    def warm_up(self):
        """Compiles the graphs of all steps at the largest shape, for which kernels are tuned."""
        rows = max(2, self.hp.ttt_batch_size)
        # torch.compile assumes that sizes equal during the warm-up are always equal
        if self.hp.ttt_stale_context and rows == recomputed_context(self.hp):
            rows += 1
        self.warming_up = True
        self.chunk_step(self.padding_table(rows), self.hp.ttt_eval_seq_len)
        self.warming_up = False

    def chunk_step(self, table, width):
        """Scores the chunks of a table (B, 6) of StepRow, then learns from them.

        Depends on the host for shapes only and never waits for the device, so that it can be
        captured as a CUDA graph.
        """
        hp = self.hp
        tokens = self.packer.tokens
        # contiguous columns, which the kernels want
        row = StepRow(*table.T.contiguous())
        if hp.ttt_stale_context:
            width = self.stale.begin(row.source, row.window, width)
        # Positions after the last input repeat it, unseen by what is scored. SmearGate needs the
        # token before a window that continues a document.
        lookback = 1 if hp.ttt_stale_context else 0
        columns = torch.arange(-lookback, width, device=table.device)
        offset = torch.arange(hp.ttt_chunk_size, device=table.device)
        last = (row.first + row.count - 1).clamp_min(0)[:, None]
        window = row.window[:, None]
        inputs = window + torch.minimum(columns, last)
        positions = torch.minimum(row.first[:, None] + offset, last)
        targets = window + positions + 1
        scored = offset < row.count[:, None]
        self.mark_dynamic([0], row.source)
        parts = self.scaled_parts(self.lora.values, row.source)
        for part in parts:
            part.requires_grad_()
        tap = self.lora.tap(parts)
        losses = self.chunk_losses(tokens[inputs], self.targets_at(targets), positions, tap)
        losses, counted = self.learned_and_counted(losses)
        self.score.add(counted.detach(), scored, self.packer.bytes[targets])
        # scored: from here on the adapters may learn
        means = torch.where(scored, losses, 0.0).sum(1) / row.count.clamp_min(1)
        loss = torch.where(row.target != self.lora.scratch_row, means, 0.0).sum()
        gradients = torch.autograd.grad(loss, parts, materialize_grads=True)
        self.lora.step(gradients, row.source, row.target, row.number)
        if hp.ttt_stale_context:
            self.stale.end(row.target)

    def capture(self, steps):
        """Records chunk_step as a CUDA graph for each shape of these steps.

        Where that fails, steps are launched as they are.
        """
        if self.dist.device.type != "cuda" or not self.hp.kernels:
            return
        started = time.perf_counter()
        shapes = {(len(step.table), step.width) for step in steps}
        tables = {}  # the graphs share one memory pool, which the largest shape opens
        for shape in sorted(shapes, key=math.prod, reverse=True):
            tables[shape] = self.padding_table(shape[0])
        torch.cuda.empty_cache()
        try:
            self.record_graphs(tables)
        except RuntimeError as error:
            self.graphs.clear()
            self.log(f"note: test-time training runs without CUDA graphs: {error}")
        self.log(
            f"ttt_graphs captured:{len(self.graphs)} of:{len(shapes)}"
            f" seconds:{time.perf_counter() - started:.1f}"
        )

    def record_graphs(self, tables):
        """{(rows, width): table that the graph of this shape will read} -> self.graphs."""
        pool = torch.cuda.graph_pool_handle()
        # torch asks for a run of every shape on a side stream before the capture
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for shape, table in tables.items():
                self.chunk_step(table, shape[1])
        torch.cuda.current_stream().wait_stream(side)
        for shape, table in tables.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.chunk_step(table, shape[1])
            self.graphs[shape] = (graph, table)

    def upload(self, arrays):
        """Arrays -> their tensors on the device, in one copy."""
        joined = torch.from_numpy(np.concatenate(arrays)).to(self.dist.device)
        return joined.split([*map(len, arrays)])

    def run_steps(self, steps):
        """Scores and learns in the order of the steps until the budget ends -> steps left."""
        self.capture(steps)
        self.progress.begin_steps()
        if not steps:
            return []
        tables = self.upload([step.table for step in steps])
        begins = self.upload([step.begins for step in steps])
        ends = self.upload([step.ends for step in steps])
        for number, step in enumerate(steps):
            if number % 8 == 0:
                self.progress.report()
                cost = sum(step.cost for step in steps[number : number + 8])
                if self.progress.is_short_for(cost):
                    return steps[number:]
            self.lora.begin(*begins[number].unbind(1))
            self.launch(tables[number], step.width)
            self.lora.end(*ends[number].unbind(1))
            self.progress.add(step)
        return []

    def launch(self, table, width):
        """chunk_step, replayed where its shape was captured."""
        shape = (len(table), width)
        if shape not in self.graphs:
            self.chunk_step(table, width)
            return
        graph, graph_table = self.graphs[shape]
        graph_table.copy_(table)
        graph.replay()

    @torch.no_grad()
    def score_unadapted(self, steps):
        """Scores the targets of steps that the budget did not allow by plain forward passes.

        Returns their number.
        """
        stream = self.validation
        rows = StepRow(*np.concatenate([step.table for step in steps]).T)
        document = np.searchsorted(stream.starts, rows.window, "right") - 1
        # what is left of a document is its end
        left = np.bincount(document, rows.count, len(stream.starts)).astype(int)
        context = self.hp.ttt_eval_seq_len
        windows = document_windows(stream.ends - left, stream.ends, context, context)
        hp = dataclasses.replace(self.hp, eval_seq_len=context, compile="0")
        Evaluator(self.model, stream, hp, self.dist).add_losses(windows, self.score)
        return int(left.sum())

    def global_adapt(self, documents):
        """Fine-tunes the base weights on scored documents: one epoch of sgd_step, cosine to 0."""
        hp = self.hp
        stream = self.validation
        context = hp.ttt_eval_seq_len
        self.model.requires_grad_(True)
        optimizer = torch.optim.SGD(
            self.model.parameters(), lr=hp.global_ttt_lr, momentum=hp.global_ttt_momentum
        )
        windows = document_windows(
            stream.starts[documents], stream.ends[documents], context, context
        )
        lengths = windows[:, 1] - windows[:, 0]
        chunk_of = (np.cumsum(lengths) - lengths) // hp.global_ttt_chunk_tokens
        chunks = np.unique(chunk_of)
        for number, chunk in enumerate(chunks):
            cosine = 0.5 * (1 + math.cos(math.pi * number / max(1, len(chunks) - 1)))
            rate = hp.global_ttt_lr * cosine
            of_chunk = windows[chunk_of == chunk]
            sgd_step(self.model, self.packer, of_chunk, optimizer, rate, self.dist)
        self.model.requires_grad_(False).zero_grad(set_to_none=True)
        self.log(f"ttt_global_adaptation documents:{len(documents)} chunks:{len(chunks)}")

    def adapt_base(self, phase, tokens, steps_left):
        """Fine-tunes on a phase of `tokens` targets, if every rank has the time for it."""
        num_steps = tokens / self.hp.global_ttt_chunk_tokens
        # this rank's share of forward and backward, and the SGD steps themselves
        cost = 3e-6 * tokens / self.dist.world_size + 0.3 * num_steps
        is_short = bool(steps_left) or self.progress.is_short_for(cost)
        if not any(self.dist.all_gather_object(is_short)):
            self.global_adapt(self.documents[phase.documents])
        else:
            self.skip_fine_tuning()

    def evaluate(self):
        """Scores the documents in the order of the plan -> the score's fields in RESULT."""
        hp = self.hp
        stream = self.validation
        dist = self.dist
        progress = self.progress
        self.model.requires_grad_(False)

        starts = stream.starts[self.documents]
        lengths = stream.ends[self.documents] - starts
        phases = plan_ttt(lengths, hp)
        schedules = schedule_rank(phases, starts, lengths, dist.rank, dist.world_size, hp)
        all_steps = sum(schedules, [])
        progress.plan(all_steps)
        self.plan_made(starts, lengths, phases)

        if compile_wanted(hp, dist):
            self.warm_up()
        num_graphs = compiled_graphs()
        self.log(f"ttt_warm_up seconds:{progress.seconds():.1f} steps:{len(all_steps)}")

        steps_left = []
        for number, (phase, steps) in enumerate(zip(phases, schedules, strict=True)):
            progress.phase = f"phase:{number + 1}/{len(phases)}"
            if steps_left:
                steps_left += steps
            else:
                steps_left = self.run_steps(steps)
            self.graphs.clear()  # the fine-tuning needs their memory
            progress.report()
            if phase.adapt:
                self.adapt_base(phase, int(lengths[phase.documents].sum()), steps_left)

        unadapted = self.score_unadapted(steps_left) if steps_left else 0
        self.model.requires_grad_(True)
        total = self.score.total(dist, stream.targets_of(self.documents))
        unadapted = sum(dist.all_gather_object(unadapted))
        if unadapted:
            self.log(
                f"note: EVAL_BUDGET_SECONDS was too short: {unadapted} tokens were scored without"
                " adaptation"
            )
        return total | {
            "documents": len(self.documents),
            "partial": len(self.documents) < len(stream.starts),
            "recompilations": compiled_graphs() - num_graphs,
            "unadapted_tokens": unadapted,
        }


def evaluate_adapted(evaluator, log):
    """The score of test-time training on what an Evaluator scores -> {loss, bpb, tokens, bytes,
    ...}.
    """
    e = evaluator
    return TestTimeTrainer(e.model, e.validation, e.hp, e.dist, log).evaluate()


# ---- MAIN ----------------------------------------------------------------------------------------


def run_folder(hp, dist):
    """The run's own folder, not made yet."""
    started = dist.agree(time.time())[0]
    run_id = (
        hp.run_id or time.strftime("%Y%m%d_%H%M%S", time.localtime(started)) + f"_seed{hp.seed}"
    )
    return Path(hp.runs_dir) / run_id


def write_code(folder, hp, dist, guard=NO_GUARD):
    """Writes the script that is counted, this file or what the guard packs of it; returns its
    bytes.
    """
    script = guard.submission(Path(__file__).read_bytes(), hp)
    if dist.rank == 0:
        write_atomically(folder / "train_gpt.py", script)
    return len(script)


def all_at_once(dist, **checks):
    """Calls check(found) -> found[its name], for each.

    Raises one SettingError with all problems of all ranks.
    """
    found, problems = {}, []
    for name, check in checks.items():
        try:
            found[name] = check(found)
        except (*OUR_ERRORS, OSError) as error:
            problems.append(str(error))
    if problems := [
        *dict.fromkeys(problem for each in dist.all_gather_object(problems) for problem in each)
    ]:
        raise SettingError("\n".join(problems))
    return found


def build_model(hp, dist):
    """A new GPT on the device, with the fastest operations that work there."""
    dtype = {"auto": torch.bfloat16 if dist.device.type == "cuda" else torch.float32}.get(
        hp.compute_dtype, getattr(torch, hp.compute_dtype, None)
    )
    ops = select_ops(
        hp.kernels,
        hp.attention_backend,
        dist.device,
        dtype,
        hp.head_dim,
        hp.num_heads,
        hp.num_kv_heads,
        attn_window=hp.attn_window,
    )
    return GPT(hp, ops, dtype).to(dist.device)


def save_checkpoint(path, model, hp):
    """The averaged fp32 weights and the settings they were trained with."""
    weights = {name: tensor.cpu() for name, tensor in unbank(model).items()}
    torch.save({"weights": weights, "settings": dataclasses.asdict(hp)}, buffer := io.BytesIO())
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path, model):
    """Loads model.pt into the model. DataError with the path if it is missing or does not fit."""
    try:
        rebank(model, torch.load(path, map_location="cpu", weights_only=True)["weights"])
    except Exception as error:  # a damaged file makes torch raise errors of many classes
        raise DataError(f"checkpoint {path}: {error!r:.300}") from None


def group_bytes(arrays):
    """Arrays of quantize_weights -> {role: bytes}, largest first: the order-0 entropy of codes;
    "rest": all others.
    """
    sizes = defaultdict(float)
    for key, array in arrays.items():
        name, _, field = key.rpartition(":")
        if quant_role(name) and field == "codes":
            share = np.unique(array, return_counts=True)[1] / array.size
            sizes[quant_role(name)[0]] -= share @ np.log2(share) * array.size / 8
        else:
            sizes["rest"] += array.nbytes
    return {role: round(sizes[role]) for role in sorted(sizes, key=sizes.get, reverse=True)}


TARGET_TRIALS = 5  # of clips; bytes are nearly linear in their logarithm


def fit_target_bytes(attempt, num_weights, code_bytes, hp, dist, log):
    """TARGET_BYTES: scales all clips and tries again, until code and file end within 0.05% below
    it.

    attempt(hp) -> file (rank 0's), arrays. Returns these and hp of the nearest below the target,
    else of the shortest.
    """
    clips = {clip for _, _, clip in QUANT_TABLE.values()}
    trials = []
    for _ in range(TARGET_TRIALS):
        blob, arrays = attempt(hp)
        spare = dist.agree(
            hp.target_bytes - code_bytes - len(blob) if dist.rank == 0 else -math.inf
        )[0]
        trials.append(((spare < 0, abs(spare)), blob, arrays, hp))
        if 0 <= spare <= hp.target_bytes / 2000:
            break
        # half the step: a bit more for each code
        wider = 2 ** ((hp.target_bytes / 4000 - spare) * 8 / num_weights)
        log(f"target_bytes:{hp.target_bytes} spare:{spare:.0f} clips times {wider:.4f}")
        hp = dataclasses.replace(hp, **{name: getattr(hp, name) * wider for name in clips})
    return min(trials, key=lambda trial: trial[0])[1:]


# stages that MAX_WALLCLOCK_SECONDS pays for, too
AFTER_TRAINING = "hessians", "quantize", "quant_check"


def build_artifact(model, loader, hp, dist, log, path, code_bytes, training_seconds=0.0):
    """Hessians -> GPTQ and LQER on all ranks -> one file, written by rank 0.

    Returns figures for RESULT.
    """

    def seconds_left():
        """Of MAX_WALLCLOCK_SECONDS, the same on every rank; without end where there is no
        training clock.
        """
        if not training_seconds or not hp.max_wallclock_seconds:
            return math.inf
        used = training_seconds + sum(log.seconds.get(stage, 0.0) for stage in AFTER_TRAINING)
        return hp.max_wallclock_seconds - dist.agree(used)[0]

    def quantize(hp):
        with log.stage("quantize"):
            return quantize_weights(check.weights, hessians, hp, dist)

    def pack(arrays, hp):
        with log.stage("pack"):
            return pack_weights(arrays, hp.compressor, log.live) if dist.rank == 0 else b""

    with log.stage("hessians"):
        hessians = collect_hessians(model, loader, hp, dist)
    check = QuantizationCheck(model, loader, hp, dist, log)
    hp, arrays = check.choose(quantize, seconds_left)
    blob = pack(arrays, hp)
    if hp.target_bytes:

        def attempt(scaled):
            found = arrays if scaled is hp else quantize(scaled)
            return blob if scaled is hp else pack(found, scaled), found

        num_weights = sum(w.numel() for w in check.weights.values())
        first = arrays
        blob, arrays, hp = fit_target_bytes(attempt, num_weights, code_bytes, hp, dist, log)
        if arrays is not first and check.fp32_loss is not None:  # other clips, another gap
            check.gap(arrays, hp)
            check.kept = check.tried[-1]
    if dist.rank == 0:
        write_atomically(path, blob)
    dist.barrier()
    return {"quant_check": check.summary(), "group_bytes": group_bytes(arrays)}


def score_stage(name, evaluate, log, scores):
    """Runs evaluate() -> {loss, bpb, tokens, bytes} as stage eval_<name>; logs the score, keeps
    it in `scores`.
    """
    with log.stage(f"eval_{name}"):
        score = scores[name] = evaluate()
    counts = f"tokens:{score['tokens']} bytes:{score['bytes']}"
    log(f"{name} val_loss:{score['loss']:.6f} val_bpb:{score['bpb']:.6f} {counts}")


def rebuild_model(model, path, dist):
    """Loads the artifact on disk into the model: decoded once, on rank 0, the same bits on
    every rank.
    """
    fault = None
    if dist.rank == 0:
        try:
            rebank(model, dequantize_weights(unpack_weights(Path(path).read_bytes())))
        except (OSError, ValueError) as error:
            fault = str(error)
    if fault := dist.all_gather_object(fault)[0]:
        raise ArtifactError(f"artifact {path}: {fault}")
    for parameter in model.parameters():
        dist.broadcast(parameter.detach())


def violations(hp, log, training, code_bytes, artifact_bytes, scores):
    """The contest's rules that this run breaks, as sentences; an empty list means none of those
    checked here.
    """
    broken, seconds, graphs, ttt = [], log.seconds, log.graphs, scores.get("ttt", {})
    if (over := code_bytes + artifact_bytes - BYTE_CAP) > 0:
        largest = ", ".join(
            f"{role} {size}" for role, size in [*training.get("group_bytes", {}).items()][:3]
        )
        broken.append(
            f"{code_bytes + artifact_bytes} bytes of code and weights, {over} above the cap of"
            f" {BYTE_CAP} (largest: {largest}); QUANT_ONLY=1 TARGET_BYTES={BYTE_CAP} goes on from"
            " the checkpoint"
        )
    used = training.get("training_seconds", 0) + sum(
        seconds.get(stage, 0) for stage in AFTER_TRAINING
    )
    if hp.max_wallclock_seconds and used > hp.max_wallclock_seconds:
        broken.append(
            f"training, Hessians and GPTQ took {used:.1f} s of {hp.max_wallclock_seconds:.1f}"
        )
    check = training.get("quant_check")
    if check and (check["gap"] is None or check["gap"] > hp.quant_gap_max):
        broken.append(
            f"quantization adds {check['gap']} nats a token on held-out rows, more than"
            f" {hp.quant_gap_max}"
        )
    if (
        used := seconds.get("unpack", 0) + seconds[f"eval_{list(scores)[-1]}"]
    ) > hp.eval_budget_seconds:
        broken.append(
            f"unpacking and the final evaluation took {used:.1f} s of {hp.eval_budget_seconds:.1f}"
        )
    if again := graphs.get("train", 0) - graphs.get("eval_training", 0):
        broken.append(f"{again} graphs were compiled while the training clock ran")
    if again := ttt.get("recompilations"):
        broken.append(f"{again} graphs were compiled in test-time training after its warm-up")
    if ttt.get("partial"):
        broken.append("test-time training scored part of the validation documents (TTT_MAX_DOCS)")
    if leaked := training.get("leaked_documents"):
        broken.append(
            f"{leaked} training documents are validation documents, says the dataset's manifest"
        )
    return broken


def run_notes(hp, dist, model):
    """Notes for the head of the log: what is not as a submission or a record needs it, and is
    no error.
    """
    notes = [*dist.notes, *model.ops.notes]
    budgets = {
        "MAX_WALLCLOCK_SECONDS": hp.max_wallclock_seconds,
        "EVAL_BUDGET_SECONDS": hp.eval_budget_seconds,
    }
    for name, value in budgets.items():  # violations checks the budgets as they are set
        if not 0 < value <= CONTEST_SECONDS:
            more = "more" if value else "no limit"
            notes.append(
                f"{name}={value:g} is {more}, the contest allows {CONTEST_SECONDS:g} s: "
                "violations are those of the budgets as set"
            )
    notes.append("the budget starts after the warm-up")
    return notes


def train_and_save(trainer, evaluator, path):
    """Stages warm_up and train, then model.pt.

    Returns figures for RESULT. A signal waits for the end of a step.
    """
    dist, log, loader, guard = trainer.dist, trainer.log, trainer.loader, trainer.guard
    log(
        f"train_shards:{len(loader.stream.paths)} train_tokens:{loader.stream.size}"
        f" rows_a_step:{loader.per_rank} held_out_rows:{loader.held_out_rows}"
    )
    with log.stage("warm_up"):
        trainer.warm_up()
    guard.begin_training()
    with log.stage("train"):
        training = trainer.train(lambda: score_stage("training", evaluator.evaluate_bpb, log, {}))
    if dist.rank == 0:
        save_checkpoint(path, trainer.model, trainer.hp)
    guard.end_training(path)
    return training


def check_all(hp, dist, guard=NO_GUARD):
    """Everything that can be wrong is found before training, and told at once -> what the
    checks have made, by name.
    """
    return all_at_once(
        dist,
        tokenizer=lambda found: find_tokenizer(hp),
        compressor=lambda found: try_compressor(hp.compressor),
        validation=lambda found: ValidationSet(hp),
        documents=lambda found: (
            "validation" in found and documents_to_score(found["validation"], hp)
        ),
        loader=lambda found: (
            hp.ttt_eval_only or TrainLoader(TokenStream(hp.data_path, "train"), hp, dist)
        ),
        folder=lambda found: run_folder(hp, dist),
        model=lambda found: build_model(hp, dist),
        machine=lambda found: guard.check(hp, dist, found),
    )


def run(hp, dist, guard=NO_GUARD):
    """The whole run, one call per stage. Returns the RESULT dictionary."""
    found = check_all(hp, dist, guard)
    validation, loader, folder, model = (
        found[name] for name in ("validation", "loader", "folder", "model")
    )
    checkpoint, artifact = (
        hp.checkpoint_path or folder / "model.pt",
        Path(hp.artifact_path or folder / "artifact.bin"),
    )
    found |= all_at_once(
        dist,
        made=lambda found: dist.rank or folder.mkdir(parents=True, exist_ok=True),
        lock=lambda found: dist.rank or guard.lock(folder),
    )
    log = RunLog(folder, dist, guard)
    code_bytes = write_code(folder, hp, dist, guard)
    device = (
        torch.cuda.get_device_name()
        if dist.device.type == "cuda"
        else f"cpu x{torch.get_num_threads()}"
    )
    about = {
        "run": folder.name,
        "seed": hp.seed,
        "commit": guard.commit(),
        "device": device,
        "world_size": dist.world_size,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        **model.ops.names,
    }
    log(
        f"settings (* changed):\n{settings_table(hp)}\n"
        + " ".join(f"{key}:{value}" for key, value in about.items())
    )
    log("\n".join([*(f"note: {note}" for note in run_notes(hp, dist, model)), *guard.notes(hp)]))
    log(
        f"parameters:{sum(p.numel() for p in model.parameters())} slots:{model.slots(True)}"
        f" tokenizer:{found['tokenizer']} validation {validation.summary}"
        f" tokens:{len(validation.tokens)} code_bytes:{code_bytes} {found['machine'] or ''}"
    )

    # ---- train (or go on from a file)
    evaluator, training, scores, artifact_bytes = Evaluator(model, validation, hp, dist), {}, {}, 0
    if hp.quant_only:
        all_at_once(dist, weights=lambda found: dist.rank or load_checkpoint(checkpoint, model))
        for parameter in model.parameters():
            dist.broadcast(parameter.detach())
    elif not hp.ttt_eval_only:
        trainer = Trainer(model, loader, hp, dist, log, guard)
        training = train_and_save(trainer, evaluator, checkpoint)
        del trainer
        if compile_wanted(hp, dist):
            torch.compiler.reset()  # the captured micro-batches go, and with them their memory
    model.leave_training()
    if not hp.ttt_eval_only:  # what was trained is safe: quantize and pack it, then evaluate it
        guard.keep_weights(hp, folder, checkpoint, log)
        if not hp.prequant_only:
            training |= build_artifact(
                model,
                loader,
                hp,
                dist,
                log,
                artifact,
                code_bytes,
                training.get("training_seconds", 0.0),
            )
        score_stage("prequant", evaluator.evaluate_bpb, log, scores)

    # ---- evaluate the file on disk
    if not hp.prequant_only:
        with log.stage("unpack"):
            rebuild_model(model, artifact, dist)
        artifact_bytes = int(dist.agree(artifact.stat().st_size if dist.rank == 0 else 0)[0])
        log(
            f"artifact_bytes:{artifact_bytes} code_bytes:{code_bytes}"
            f" total_bytes:{artifact_bytes + code_bytes}"
        )
        score_stage("quantized", evaluator.evaluate_bpb, log, scores)
        if hp.sliding_window_enabled:
            score_stage("sliding", lambda: evaluator.evaluate_bpb(hp.eval_stride), log, scores)
        if hp.ttt_enabled:
            score_stage("ttt", lambda: evaluate_adapted(evaluator, log), log, scores)

    training |= leaked_documents(hp)
    result = {
        "version": RESULT_VERSION,
        **about,
        **training,
        "scores": scores,
        "artifact_bytes": artifact_bytes,
        "code_bytes": code_bytes,
        "total_bytes": artifact_bytes + code_bytes,
        "seconds": log.seconds,
        "graphs_compiled": {stage: count for stage, count in log.graphs.items() if count},
        "violations": violations(hp, log, training, code_bytes, artifact_bytes, scores),
    }
    if dist.device.type == "cuda":
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    if dist.rank == 0:
        write_atomically(folder / "result.json", json.dumps(result, indent=1).encode())
    log("RESULT " + json.dumps(result))
    return result


def main():
    """Command line: --help, or a run as the environment says.

    Exit code 1: an error; 3: the byte cap is broken.
    """
    survive_lost_terminals()
    if len(sys.argv) > 1:
        print(
            "No arguments; settings are environment variables, here with their defaults:\n"
            + settings_table()
        )
        sys.exit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
    # FlashAttention-4 says so at every compilation
    warnings.filterwarnings("ignore", message="Argument aux_data")
    # newer names, which PyTorch 2.11 does not have
    warnings.filterwarnings("ignore", message="`torch.distributed")
    guard = find_guard()
    try:
        hp = Hyperparameters.from_env(guard=guard)
        dist = Dist(hp.device, hp.deterministic)
        guard.start(dist)
        result = run(hp, dist, guard)
    except Exception as error:
        guard.failed(error)
        if not isinstance(error, OUR_ERRORS):
            raise
        sys.exit(f"train_gpt.py cannot run: {error}")
    dist.barrier()
    guard.stop()
    dist.close()
    if dist.rank == 0:
        guard.finish(hp, result)
    if result["total_bytes"] > BYTE_CAP:
        sys.exit(3)


if __name__ == "__main__":
    main()
