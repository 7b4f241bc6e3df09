"""Train, quantize, pack and score a small language model: a complete Parameter Golf submission.

    text -> shards (prepare_caseops_data.py) -> train -> EMA -> GPTQ -> artifact on disk
         -> rebuilt model -> bits per byte (BPB) of the validation documents
         -> the same with score-first test-time training (TTT)

    make demo                                    # CPU or GPU, a few minutes, nothing to download
    DATA_PATH=data/mine python train_gpt.py      # one GPU (or the CPU)
    DATA_PATH=data/mine torchrun --standalone --nproc_per_node=8 train_gpt.py
    python train_gpt.py --help                   # every setting: default, range, meaning

Settings are environment variables; the defaults are the submission. This file needs no other; in
its repository tools/guard.py watches the run and reads PRESET. A run writes its files to
runs/<RUN_ID>/ (README) and ends with the line `RESULT {json}`. QUANT_ONLY=1 continues from its
model.pt, TTT_EVAL_ONLY=1 from its artifact.bin.

presets/published.py NAME runs a published system: its PARTS take the place of classes, functions
and tables of this file. For them some methods here only return a constant or what they are given,
and some arguments are not read.

Shapes: B rows, T tokens, D model_dim, L layers, S slots (one execution of a layer; a looped one has
several), H heads, K key/value heads, E head_dim, F MLP hidden, V vocabulary, R LoRA rank.
"""

import bisect
import contextlib
import copy
import dataclasses
import difflib
import glob
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import struct
import sys
import time
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import brotli
import numpy as np
import sentencepiece
import torch
import torch.distributed as dist_backend
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels can still be defined, but the references are used
    triton = None
    tl = SimpleNamespace(constexpr=int)

GATE_WINDOW = 12  # input dimensions that gates read
BOS_ID = 1  # every document starts with exactly one (docs/DATA.md)
CASE_MARKERS = 4, 5, 6  # ids of the marks for the case of the word behind them (lossless_caps.py)
# Ids of a space and such a marker as one token: <pad>, </s> and <unk>, which no text has, lend them
PAIR_IDS = 0, 2, 3
BYTE_CAP = 16_000_000  # limit of code + weights in the contest's rules, decimal
RESULT_VERSION = 2  # of the RESULT line, see docs/RESULT.md
PACKED = False  # True in the script that tools/pack_code.py writes: that one stands alone


class SettingError(ValueError):
    """A setting or a combination of settings that cannot work; the message says what to change."""


class DataError(ValueError):
    """A dataset or file that cannot be used; the message names it and says what to do."""


class ArtifactError(ValueError):
    """Bytes that are no artifact of this program, or damaged, or arrays that none can hold."""


class ModelError(ValueError):
    """Weights that cannot be quantized, as training went wrong; the message names them."""


# these end a run with their message, any other exception with its traceback
OUR_ERRORS = SettingError, DataError, ArtifactError, ModelError

# ---- HYPERPARAMETERS -----------------------------------------------------------------------------


def env(default, help, **rules):
    """Declares a setting; its environment variable is the field's name in capitals.

    rules: above (exclusive bound), least and most (inclusive bounds), choices.
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run, declared once: name, type, default, meaning, range.

    Raises SettingError on bad values.
    """

    # run
    seed: int = env(42, "seed of initial weights and LoRA matrices", least=0)
    preset: str = env("", "settings of presets/NAME.env; the environment wins")
    run_id: str = env("", "empty: time stamp and seed")
    runs_dir: str = env("runs", "folder of the runs")
    plots: bool = env(True, "plot the finished run (tools/plot_run.py)")
    data_path: str = env(
        "data/datasets/fineweb10B_sp8192_caseops", "folder of fineweb_{train,val,val_bytes}_*.bin"
    )
    tokenizer_path: str = env("", "SentencePiece model; empty: searched")
    marker_fusion_enabled: bool = env(True, "space and case marker as one token (PR 2109)")
    data_seed: int = env(0, "shuffles the rows; 0: order of the stream", least=0)
    balance_rows: bool = env(True, "equal attention cost of a step's rows")
    device: str = env("auto", "auto: a GPU if there is one", choices=("auto", "cuda", "cpu"))
    compile: str = env("auto", "torch.compile; auto: on CUDA only", choices=("auto", "0", "1"))
    kernels: bool = env(True, "Triton and Quack; 0: references")
    train_cuda_graphs: bool = env(True, "training micro-batches as CUDA graphs")
    attention_backend: str = env(
        "auto", "attention of packed rows", choices=("auto", "fa3", "fa4", "torch", "sdpa")
    )
    prequant_only: bool = env(False, "stop after evaluating the fp32 model")
    quant_only: bool = env(False, "continue from CHECKPOINT_PATH")
    ttt_eval_only: bool = env(False, "continue from ARTIFACT_PATH")
    checkpoint_path: str = env("", "fp32 model for QUANT_ONLY; empty: model.pt of the run")
    artifact_path: str = env("", "artifact for TTT_EVAL_ONLY; empty: artifact.bin of the run")
    checkpoint_every: int = env(0, "steps between states; 0: only on a signal", least=0)
    resume: bool = env(False, "continue from the newest training state of RUN_ID")
    deterministic: bool = env(False, "same RESULT in every run, as far as PyTorch can")

    # data and batches
    train_batch_tokens: int = env(786_432, "tokens per step of all ranks", least=1)
    micro_batch_tokens: int = env(98_304, "tokens per row and micro-batch", least=1)
    train_seq_len: int = env(2048, "longest piece of a document in training", least=2)
    full_seq_len_at: float = env(
        0.4, "training fraction at which TRAIN_SEQ_LEN starts; half before", least=0, most=1
    )

    # model
    vocab_size: int = env(8192, "vocabulary size", least=9, most=65_536)
    model_dim: int = env(512, "model width", least=12)
    num_layers: int = env(11, "physical layers", least=1)
    num_heads: int = env(8, "query heads", least=1)
    num_kv_heads: int = env(4, "key/value heads", least=1)
    mlp_mult: float = env(4.0, "MLP width / model width", above=0, most=1024)
    loop_start: int = env(3, "first looped layer", least=0)
    loop_end: int = env(5, "last looped layer", least=0)
    num_loops: int = env(2, "extra passes over the looped layers", least=0)
    enable_looping_at: float = env(
        0.35, "training fraction at which looping starts", least=0, most=1
    )
    rope_dims: int = env(16, "rotary dimensions per head", least=2)
    rope_base: float = env(10_000.0, "rotary base", above=1)
    qk_gain_init: float = env(5.0, "initial gain per query head", above=0)
    sparse_attn_gate_scale: float = env(0.5, "factor inside the head gates' sigmoid", above=0)
    leaky_relu_slope: float = env(0.3, "negative slope before squaring in the MLP", least=0, most=1)
    parallel_start_layer: int = env(8, "first layer with two lanes; NUM_LAYERS: none", least=0)
    logit_softcap: float = env(30.0, "logits z become c tanh(z/c)", above=0, most=64)

    # optimizer and schedule
    max_wallclock_seconds: float = env(
        600.0, "budget of training and quantization; 0: ITERATIONS", least=0
    )
    iterations: int = env(20_000, "maximum number of steps", least=1)
    warmup_steps: int = env(3, "steps per graph before the clock starts", least=0)
    warmdown_frac: float = env(0.85, "final fraction in which learning rates fall", above=0, most=1)
    min_lr: float = env(0.1, "floor of the learning-rate factor", least=0, most=1)
    matrix_lr: float = env(0.026, "Muon learning rate", above=0)
    muon_momentum: float = env(0.97, "Nesterov momentum after the warm-up", least=0, most=1)
    muon_momentum_warmup_start: float = env(0.92, "momentum at step 0", least=0, most=1)
    muon_momentum_warmup_steps: int = env(1500, "steps of the momentum warm-up", least=0)
    muon_wd: float = env(0.095, "decoupled weight decay of the matrix banks", least=0)
    muon_outward: float = env(
        0.5, "factor of what makes a matrix grow in a step; 1: off", least=0, most=1
    )
    tied_embed_lr: float = env(0.03, "AdamW learning rate of the embedding", above=0)
    embed_wd: float = env(0.085, "weight decay of the embedding", least=0)
    scalar_lr: float = env(0.02, "AdamW learning rate of scalars and gates", above=0)
    adam_wd: float = env(0.02, "weight decay of scalars and gates", least=0)
    beta1: float = env(0.9, "AdamW beta1", least=0, most=0.9999)
    beta2: float = env(0.99, "AdamW beta2", least=0, most=0.99999)
    grad_clip_norm: float = env(0.3, "maximum global gradient norm; 0: off", least=0)
    ema_span: float = env(0.045, "share of training in the weight EMA", above=0, most=1)
    train_log_every: int = env(100, "steps between log lines", least=1)
    val_loss_every: int = env(0, "steps between evaluations; 0: none", least=0)

    # quantization and artifact
    gptq_reserve_seconds: float = env(7.0, "of the budget, for Hessians and GPTQ", least=0)
    gptq_calibration_batches: int = env(16, "rows for the Hessians", least=1)
    gptq_damp: float = env(0.01, "damping, of the mean Hessian diagonal", above=0)
    matrix_bits: int = env(6, "bits per matrix code", least=2, most=8)
    embed_bits: int = env(8, "bits per embedding code", least=2, most=8)
    mlp_clip_sigmas: float = env(12.9, "clip of MLP rows, in deviations", above=0)
    attn_clip_sigmas: float = env(13.9, "clip of attention rows, in deviations", above=0)
    embed_clip_sigmas: float = env(14.9, "clip of embedding rows, in deviations", above=0)
    gptq_column_steps: bool = env(True, "steps per row and column; 0: per row")
    gptq_column_octaves: float = env(2.0, "limit of |log2| of a column's step", least=0)
    gptq_trellis: bool = env(True, "trellis-coded quantization")
    gptq_row_power: float = env(0.5, "finer steps for rows that matter; 0: off", least=0, most=1)
    gptq_row_octaves: float = env(2.0, "limit of |log2| of that change", least=0)
    quant_check_rows: int = env(2, "training rows that check the quantization", least=0)
    quant_gap_max: float = env(
        0.02,
        "allowed increase of their loss, nats per token; above: plainer ways",
        above=0,
    )
    target_bytes: int = env(
        16_000_000,
        "scale clips until code + weights just fit; 0: off",
        least=0,
    )
    compressor: str = env("entropy", "artifact coder", choices=("entropy", "brotli"))

    # evaluation
    eval_seq_len: int = env(2048, "context of plain evaluation", least=2)
    eval_budget_seconds: float = env(600.0, "limit for unpacking and final evaluation", above=0)

    # test-time training
    ttt_enabled: bool = env(True, "score with test-time training")
    ttt_max_docs: int = env(0, "documents, of all lengths; 0: all", least=0)
    ttt_eval_seq_len: int = env(3072, "context of a chunk and its tokens", least=2)
    ttt_stale_context: int = env(2816, "oldest positions, which are not recomputed", least=0)
    ttt_chunk_size: int = env(16, "tokens scored between two LoRA steps", least=1)
    ttt_batch_size: int = env(64, "documents per group, and per step", least=1)
    ttt_lanes: int = env(8, "groups of documents, dealt to ranks", least=1)
    ttt_lora_sites: str = env("q,k,v,o,mlp,head", "sites with LoRA, comma separated")
    ttt_lora_rank: int = env(80, "LoRA rank", least=1)
    ttt_lora_alpha: float = env(144.0, "adapters are scaled by alpha / rank", above=0)
    ttt_lora_lr: float = env(3.5e-5, "AdamW learning rate of the adapters' B", least=0)
    ttt_lora_a_lr_ratio: float = env(2.0, "rate of A / rate of B", least=0)
    ttt_beta2: float = env(0.99, "adapters' AdamW beta2 (beta1 is 0)", least=0, most=0.99999)
    ttt_weight_decay: float = env(0.5, "adapters' weight decay", least=0)
    ttt_warm_start_a: bool = env(True, "documents start with their predecessor's A")
    phased_ttt_num_phases: int = env(1, "times that SGD tunes base weights", least=0)
    phased_ttt_prefix_docs: int = env(2500, "documents before the last time, of 50,000", least=0)
    global_ttt_lr: float = env(1e-3, "SGD learning rate, cosine to 0", least=0)
    global_ttt_chunk_tokens: int = env(32_768, "tokens per SGD step", least=1)

    @classmethod
    def from_env(cls, environ=None, guard=None):
        """Settings from environment variables, on top of those of PRESET, which the guard reads.

        environ: a dictionary in place of os.environ. Raises SettingError with all of these: a
        preset that cannot be used, unknown names that look like settings, bad values. Combinations
        are looked at when there is none of them.
        """
        environ = os.environ if environ is None else environ
        guard = guard or NO_GUARD
        values = {}
        problems = []
        if environ.get("PRESET"):
            try:
                environ = guard.read_preset(environ["PRESET"]) | dict(environ)
            except SettingError as error:
                problems.append(str(error))
        problems += unknown_settings(environ, cls, guard)
        for field in dataclasses.fields(cls):
            text = environ.get(field.name.upper())
            if text is None:
                continue
            try:
                values[field.name] = parse_setting(field, text)
                problems += range_problems(field, values[field.name])
            except SettingError as error:
                problems.append(str(error))
        if problems:
            raise SettingError("\n".join(problems))
        return cls(**values)

    def __post_init__(self):
        """Raises SettingError for values outside their ranges; else for impossible combinations."""
        problems = []
        for field in dataclasses.fields(self):
            problems += range_problems(field, getattr(self, field.name))
        problems = problems or [*cross_checks(self)]
        if problems:
            raise SettingError("\n".join(problems))

    # number of earlier keys that a query sees, 0: all; a setting in presets/published.py alone
    attn_window = 0

    @property
    def fuses_markers(self):
        """Whether a space and the case marker behind it are one token for the model."""
        return self.marker_fusion_enabled

    @property
    def skips_training(self):
        """Whether the run starts from the files of a finished training."""
        return self.quant_only or self.ttt_eval_only

    @property
    def head_dim(self):
        """Width of a query, key or value head."""
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self):
        """Width of the keys, and of the values, of all heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self):
        """Width of the MLP's hidden layer, rounded down."""
        return int(self.mlp_mult * self.model_dim)

    @property
    def generator_seed(self):
        """SEED, small enough for every generator, also for those seeded with multiples of it."""
        return self.seed % 2**43

    @property
    def lora_sites(self):
        """Names of TTT_LORA_SITES as a tuple."""
        return tuple(site for site in self.ttt_lora_sites.split(",") if site)

    @property
    def micro_steps(self):
        """Micro-steps per step over all ranks."""
        return self.train_batch_tokens // self.micro_batch_tokens

    @property
    def row_segments(self):
        """Maximum number of segments per row; beyond it the shortest are merged.

        It suffices for any row: of two neighbouring pieces that were not merged, one is longer than
        half of the length at which documents are cut, which is least when training begins. Where
        pieces are long there is still room for 64, and for one of every 512 tokens.
        """
        full_pieces = -(-self.micro_batch_tokens // seq_len_at(0.0, self))
        return max(64, self.micro_batch_tokens // 512, 2 * full_pieces + 1)

    @property
    def training_seconds(self):
        """Time limit of the training loop; inf: no limit."""
        if not self.max_wallclock_seconds:
            return math.inf
        return self.max_wallclock_seconds - self.gptq_reserve_seconds

    def chunk_size_of(self, length):
        """Tokens scored between two LoRA steps in a document of `length` targets.

        An array of lengths is taken, too: in presets/published.py chunks differ.
        """
        return self.ttt_chunk_size


# setting -> tap site
LORA_SITES = {"q": "q", "k": "k", "v": "v", "o": "attn_out", "mlp": "mlp_out", "head": "lm_head"}


def parse_setting(field, text):
    """Text of an environment variable -> typed value. SettingError that names the variable."""
    name = field.name.upper()
    if field.type is bool:
        if text not in ("0", "1"):
            raise SettingError(f"{name}={text!r}: must be 0 or 1")
        return text == "1"
    try:
        return field.type(text)
    except ValueError:
        raise SettingError(f"{name}={text!r}: must be {field.type.__name__}") from None


# First words of our settings that other programs' variables have as well (MAX_JOBS, DATA_...)
SHARED_WORDS = """MAX MIN NUM RUN DATA MODEL ENABLE TRAIN VAL CHECKPOINT ARTIFACT PARALLEL GLOBAL
    TARGET""".split()


def foreign_words(name, guard):
    """What to say of a setting of published scripts; nothing of other variables.

    A run of this file alone must not ignore them either; tools/other_scripts.py says what replaces
    them. A packed script has the settings of its run, and not this list.
    """
    if PACKED:
        return ""
    # how those begin whose first word is none of ours
    beginnings = """ADAM_EPS ALIAS_ ASYM_ BIGRAM_ CASEOPS_ CKPT_ COMPUTE_DTYPE DATASETS_
        DOC_SHUFFLE E2E_ EXTRA_EVAL FULL_GPTQ FUSED_ GATE_ GATED_ GLOBAL_TTT HEAD_LR HEAD_PAIR
        HESSIAN_ IHA_ LATE_QAT LN_SCALE LOAD_MODEL LQER_ MAX_ROW_ MTP_ NEGATIVE_ NGRAM_ PAIRED_
        PARALLEL_FINAL PARTIAL_KEY PRUNE_ QAT_ QUANTIZE RECUR_ SKIP_GATES SKIP_POST SLIDING_ SMEAR_
        SPINQUANT_ SWA_ TARGET_MB TIE_ TOKEN_BOOST TOKEN_ORDER TOKEN_THRESHOLD TRAIN_SEQ_SCHED
        VALUE_ VAL_BATCH VAL_DOC VE_ WD_ XSA_"""
    instead = guard.instead(name)
    if not instead and not name.startswith((*beginnings.split(),)):
        return ""
    return f"a setting of other scripts{instead or ' (unset it, or see --help)'}"


def unknown_settings(environ, cls, guard):
    """Yields a message for every undeclared variable that looks like a setting.

    It does if other scripts have it, if its first word is that of a setting and no shared one, if
    it is almost the name of a setting, or one cut short behind a word.
    """
    names = [field.name.upper() for field in dataclasses.fields(cls)]
    families = {name.split("_")[0] for name in names if "_" in name} - set(SHARED_WORDS)
    for name in sorted(set(environ) - {*names}):
        close = difflib.get_close_matches(name, names, 1, 0.6)
        is_close = difflib.get_close_matches(name, close, 1, 0.88)
        # a single word, such as CHECKPOINT, may be another program's
        is_cut = "_" in name and close and close[0].startswith(name)
        if words := foreign_words(name, guard):
            yield f"{name} is {words}"
        elif is_close or is_cut or name.split("_")[0] in families:
            question = f"; did you mean {close[0]}?" if close else ""
            yield f"{name} is not a setting{question} (unset it, or see --help)"


def range_problems(field, value):
    """Yields a message if the value is outside its declared range."""
    rule = field.metadata
    name = f"{field.name.upper()}={value!r}"
    if "choices" in rule and value not in rule["choices"]:
        yield f"{name}: must be one of {', '.join(rule['choices'])}"
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name}: must be finite"
    elif "above" in rule and not value > rule["above"]:
        yield f"{name}: must be above {rule['above']}"
    elif "least" in rule and value < rule["least"]:
        yield f"{name}: must be at least {rule['least']}"
    elif "most" in rule and value > rule["most"]:
        yield f"{name}: must be at most {rule['most']}"


def cross_checks(hp):
    """Yields messages for combinations of settings that cannot work."""
    # shapes
    if hp.model_dim % hp.num_heads:
        yield "MODEL_DIM must divide by NUM_HEADS"
    if hp.num_heads % hp.num_kv_heads:
        yield "NUM_HEADS must divide by NUM_KV_HEADS"
    if hp.mlp_dim < 2:
        yield "MLP_MULT must be at least 2 / MODEL_DIM"
    if hp.rope_dims % 2 or hp.rope_dims > hp.head_dim:
        yield f"ROPE_DIMS must be even, at most {hp.head_dim}"
    if hp.num_loops and not hp.loop_start <= hp.loop_end < hp.num_layers:
        yield "LOOP_START..LOOP_END must lie inside NUM_LAYERS (or set NUM_LOOPS=0)"
    if hp.parallel_start_layer > hp.num_layers:
        yield "PARALLEL_START_LAYER must be at most NUM_LAYERS"

    # rows and budgets of training
    if hp.train_batch_tokens % hp.micro_batch_tokens:
        yield "TRAIN_BATCH_TOKENS must divide by MICRO_BATCH_TOKENS"
    if 0 < hp.max_wallclock_seconds <= hp.gptq_reserve_seconds:
        yield "GPTQ_RESERVE_SECONDS must be less than MAX_WALLCLOCK_SECONDS"
    if hp.deterministic and hp.max_wallclock_seconds:
        yield "DETERMINISTIC=1 needs MAX_WALLCLOCK_SECONDS=0"

    # evaluation
    if hp.ttt_chunk_size > hp.ttt_eval_seq_len:
        yield "TTT_CHUNK_SIZE must be at most TTT_EVAL_SEQ_LEN"
    longest = hp.ttt_eval_seq_len - hp.ttt_chunk_size
    if hp.ttt_stale_context and not hp.ttt_chunk_size <= hp.ttt_stale_context <= longest:
        yield (
            "TTT_STALE_CONTEXT must be 0, or from TTT_CHUNK_SIZE to"
            " TTT_EVAL_SEQ_LEN - TTT_CHUNK_SIZE"
        )
    if not hp.lora_sites or not set(hp.lora_sites) <= set(LORA_SITES):
        yield f"TTT_LORA_SITES={hp.ttt_lora_sites}: must be some of {','.join(LORA_SITES)}"

    # what the run does, files that it reads and writes
    if hp.prequant_only + hp.quant_only + hp.ttt_eval_only > 1:
        yield "PREQUANT_ONLY, QUANT_ONLY, TTT_EVAL_ONLY exclude each other"
    if hp.resume and (not hp.run_id or hp.skips_training):
        yield "RESUME=1 needs RUN_ID, and neither QUANT_ONLY nor TTT_EVAL_ONLY"
    if hp.checkpoint_path and not hp.quant_only:
        yield "CHECKPOINT_PATH goes with QUANT_ONLY=1"
    if hp.artifact_path and not hp.ttt_eval_only:
        yield "ARTIFACT_PATH goes with TTT_EVAL_ONLY=1"
    if not re.fullmatch(r"(\w[\w.+-]*)?", hp.run_id):
        yield "RUN_ID: letters, digits, '_', then also '.', '+', '-'"


def range_text(field):
    """The declared range of a setting as --help shows it: ` [above 0, most 1]`, or nothing."""
    rule = field.metadata
    bounds = [f"{key} {rule[key]}" for key in ("above", "least", "most") if key in rule]
    if "choices" in rule:
        bounds.append("|".join(rule["choices"]))
    return f" [{', '.join(bounds)}]" if bounds else ""


def settings_table(hp=None):
    """One line per setting: value, meaning, range.

    The value is that of hp, else the default; changed ones are starred.
    """
    lines = []
    for field in dataclasses.fields(Hyperparameters):
        value = getattr(hp, field.name, field.default)
        star = "*" if value != field.default else " "
        shown = int(value) if field.type is bool else value
        text = field.metadata["help"] + range_text(field)
        lines.append(f"{star} {field.name.upper()}={shown}  # {text}")
    return "\n".join(lines)


# ---- RUNTIME -------------------------------------------------------------------------------------


# --- processes


class Dist:
    """The process group. All of torch.distributed is used here.

    With one process every method returns at once. Tensors travel over NCCL on CUDA and over gloo on
    the CPU; objects and clocks always travel over gloo, so that they never wait for the GPU.
    """

    def __init__(self, device="auto", deterministic=False):
        self.num_collectives = 0
        self.rank, self.world_size, local_rank = self.place_in_group()
        if device == "cuda" and not torch.cuda.is_available():
            raise SettingError("DEVICE=cuda, but torch sees none: use DEVICE=cpu")
        if deterministic:  # operations without a deterministic form warn
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.device = torch.device("cpu")
        if torch.cuda.is_available() and device != "cpu":
            count = torch.cuda.device_count()
            if local_rank >= count:
                raise SettingError(f"LOCAL_RANK={local_rank}, but this host has {count} GPUs")
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            # newer versions want newer names of functions, which PyTorch 2.11 does not have
            warnings.filterwarnings("ignore", message="`torch.distributed")
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist_backend.init_process_group(backend)

    def place_in_group(self):
        """Rank, world size and local rank, which is the number of the GPU on its host.

        They are what torchrun's environment says, or those of a single process.

        Raises SettingError if the variables contradict each other: a RANK left over from another
        run would train without log and files.
        """
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
        given = {name: os.environ[name] for name in names if name in os.environ}
        # some clusters always set MASTER_ADDR and MASTER_PORT: alone they mean nothing
        if not {*names[:3]} & {*given}:
            return 0, 1, 0

        listed = " ".join(f"{name}={value}" for name, value in given.items())
        problem = SettingError(
            f"the environment has {listed}: unset these, or use torchrun, which sets"
            f" {', '.join(names)}"
        )
        try:
            rank, world_size, local_rank = (int(given[name]) for name in names[:3])
            if world_size > 1:
                given["MASTER_ADDR"], int(given["MASTER_PORT"])
        except (KeyError, ValueError):
            raise problem from None
        if not 0 <= local_rank <= rank < world_size:
            raise problem
        return rank, world_size, local_rank

    def collective(self, name, *args, **options):
        """Calls torch.distributed's function of this name.

        Every rank makes the same calls, so their number tells a guard which rank is behind.
        """
        self.num_collectives += 1
        return getattr(dist_backend, name)(*args, **options)

    def all_reduce(self, tensor):
        """Sums a tensor over all ranks in place and returns it."""
        if self.world_size > 1:
            self.collective("all_reduce", tensor)
        return tensor

    def all_reduce_packed(self, tensors):
        """Sums many small tensors over all ranks in place, in one flat collective."""
        if self.world_size > 1:
            flat = self.all_reduce(torch.cat([t.reshape(-1) for t in tensors]))
            sums = flat.split([t.numel() for t in tensors])
            for tensor, total in zip(tensors, sums, strict=True):
                tensor.copy_(total.view_as(tensor))

    def reduce_scatter(self, full):
        """(n world, ...) on every rank -> handle, (n, ...): this rank's slice of the sum.

        It is ready after handle.wait().
        """
        if self.world_size == 1:
            return SimpleNamespace(wait=lambda: None), full
        shard = full.new_empty(full.shape[0] // self.world_size, *full.shape[1:])
        handle = self.collective("reduce_scatter_tensor", shard, full, async_op=True)
        return handle, shard

    def all_gather(self, shard):
        """(n, ...) of every rank -> handle, (n world, ...), ready after handle.wait()."""
        if self.world_size == 1:
            return SimpleNamespace(wait=lambda: None), shard
        full = shard.new_empty(shard.shape[0] * self.world_size, *shard.shape[1:])
        handle = self.collective("all_gather_into_tensor", full, shard.contiguous(), async_op=True)
        return handle, full

    def all_gather_object(self, value):
        """Every rank's value, as a list in rank order; small values only."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            self.collective("all_gather_object", values, value)
        return values

    def max_over_ranks(self, *numbers):
        """Each number's maximum over all ranks, as a list of floats; on the CPU's network."""
        maxima = torch.tensor(numbers, dtype=torch.float64)
        if self.world_size > 1:
            self.collective("all_reduce", maxima, dist_backend.ReduceOp.MAX)
        return maxima.tolist()

    def broadcast(self, tensor):
        """Copies rank 0's tensor to every rank, in place."""
        if self.world_size > 1:
            self.collective("broadcast", tensor, 0)

    def barrier(self):
        """Waits for all ranks, on the CPU's network."""
        self.all_gather_object(None)

    def synchronize(self):
        """Waits for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self):
        """Leaves the process group."""
        if self.world_size > 1:
            dist_backend.destroy_process_group()


def fail_together(dist, functions, error_class=SettingError, prefix=""):
    """Calls every function, then raises one error with all problems of all ranks.

    If one rank alone failed, the others would wait for it in the next collective. prefix: of every
    problem.
    """
    problems = []
    for function in functions:
        try:
            function()
        except (*OUR_ERRORS, OSError) as error:
            problems.append(f"{prefix}{error}")
    everywhere = sum(dist.all_gather_object(problems), [])
    if everywhere:
        raise error_class("\n".join(dict.fromkeys(everywhere)))


def load_on_rank_0(model, dist, load, error_class=SettingError, prefix=""):
    """Calls load(), which fills the model, on rank 0; then all ranks get the same bits.

    For the other arguments see fail_together.
    """
    fail_together(dist, [load] if dist.rank == 0 else [], error_class, prefix)
    for parameter in model.parameters():
        dist.broadcast(parameter.detach())


# --- the guard


class Guard:
    """Hooks for what may watch a run from outside: tools/guard.py, which find_guard looks for.

    Without it these take its place: they do nothing, or refuse what needs the real guard.
    """

    def read_preset(self, name):
        """Called by Hyperparameters.from_env when PRESET is set -> {NAME: value}.

        Raises SettingError.
        """
        raise SettingError(f"PRESET={name} needs train_gpt.py in its repository")

    def instead(self, name):
        """Called for a variable that is no setting -> words on what replaces it.

        No words if it is not known as a setting of other scripts.
        """
        return ""

    def start(self, dist):
        """Called when the process group is up."""

    def check(self, hp, dist, prepared):
        """Called as the last check, before anything is written -> words for the log.

        prepared: Prepared, with None where an earlier check failed. Raises SettingError.
        """
        if hp.resume or hp.checkpoint_every:
            raise SettingError("RESUME and CHECKPOINT_EVERY need train_gpt.py in its repository")
        if 0 < hp.target_bytes <= os.path.getsize(__file__):
            raise SettingError("TARGET_BYTES must be 0, or above the size of train_gpt.py")
        return ""

    def lock(self, folder):
        """Called on rank 0 when the run's folder exists.

        Raises SettingError if another run uses it.
        """

    def open_log(self, log):
        """Called on rank 0 when the log is open."""

    def notes(self, hp):
        """Called for the head of the log -> lines."""
        return [
            "note: without tools/guard.py no training states, no watchdog, no plots, no checks of"
            " machine and dataset; code_bytes are those of this file"
        ]

    def submission(self, script, hp):
        """Called with the bytes of this file -> bytes of the file that counts as the code."""
        return script

    def complete(self, hp, result):
        """Called with RESULT before it is written, for more keys and more violations."""

    def commit(self):
        """Called for RESULT -> commit of the checkout, None if unknown."""

    def enter_stage(self, name, start):
        """Called when a stage begins, perhaps inside another one, with perf_counter's time."""

    def leave_stage(self):
        """Called when the stage that began last has ended."""

    def show(self, share, detail=""):
        """Called many times during a stage, with the share of it that is done and words on it."""

    def clear(self):
        """Called before a line is printed."""

    def resume(self, trainer, evaluate):
        """Called when training begins -> steps, seconds and losses that are already done.

        evaluate() scores the weights, as after a step.
        """
        return 0, 0.0, []

    def watch(self, model, loss):
        """Called in each step after backward, before the weights are updated."""

    def report(self):
        """Called at the end of each step -> numbers, whose maxima over ranks after_step gets."""
        return ()

    def after_step(self, trainer, step, seconds, losses, reports):
        """Called when a step has ended."""

    def after_last_step(self, trainer, step):
        """Called when training has ended, before the weights are averaged."""

    def begin_training(self):
        """Called before the first step: from here on signals wait for the end of a step."""

    def end_training(self, path):
        """Called when model.pt, at this path, is written."""

    def quantized(self, arrays):
        """Called with the arrays of the artifact, by name, when it is written."""

    def keep_weights(self, hp, folder, path, log):
        """Called when a failed run can be continued from the weights at this path."""

    def failed(self, error):
        """Called when an exception ends the run."""

    def stop(self):
        """Called when the run has succeeded on all ranks."""

    def finish(self, hp, result):
        """Called last, on rank 0, when all files are written."""


NO_GUARD = Guard()


def find_guard():
    """The guard of tools/guard.py beside this file, else NO_GUARD.

    Nothing else here looks for files of the repository. It is imported by its path, as another
    package may be called tools; errors of the import are not caught.
    """
    if PACKED:
        return NO_GUARD
    path = Path(__file__).with_name("tools") / "guard.py"
    if not path.exists():
        return NO_GUARD
    sys.modules["train_gpt"] = sys.modules[__name__]  # the guard imports it
    # as a package, so that `from . import x` in it means the file beside it
    spec = importlib.util.spec_from_file_location(
        "golf_guard", path, submodule_search_locations=[str(path.parent)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.RunGuard()


# --- output and files


class LossyStream:
    """Standard output or error that drops what it cannot write.

    A lost terminal (closed pipe, full disk, broken connection) changes neither the run nor its exit
    code, nor does one that lacks a character of a path; the log file has every line.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        """Writes the text if it can -> its length in any case."""
        with contextlib.suppress(OSError, UnicodeError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        """Flushes the stream; after a failure it writes to nowhere."""
        try:
            self.stream.flush()
        except OSError:
            # the stream still buffers the text, and would fail again at exit: send it to nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def survive_lost_terminals():
    """Makes standard output and error LossyStreams; opens those that were closed at start."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # else the next file opened would get this number, and with it the messages of C
            # libraries; open takes the lowest free number, which is this one
            os.open(os.devnull, os.O_RDWR)
    # a stream of another kind belongs to the program that imported this module
    if sys.stdout is sys.__stdout__:
        sys.stdout = LossyStream(sys.stdout or open(os.devnull, "w"))
    if sys.stderr is sys.__stderr__:
        sys.stderr = LossyStream(sys.stderr or open(os.devnull, "w"))


class RunLog:
    """Prints lines on rank 0 and appends them to <folder>/log.txt.

    seconds, graphs: {stage: duration}, {stage: newly compiled graphs}, as RESULT has them.
    """

    def __init__(self, folder, dist, guard=NO_GUARD):
        self.dist = dist
        self.guard = guard
        self.folder = Path(folder)
        self.seconds = {}
        self.graphs = {}
        self.file = None
        if dist.rank == 0:
            self.file = open(self.folder / "log.txt", "a", encoding="utf-8")
            guard.open_log(self)

    def __call__(self, message):
        if self.file:
            self.guard.clear()
            print(message, flush=True)
            with contextlib.suppress(OSError):  # a full disk does not end a training
                print(message, file=self.file, flush=True)

    @contextlib.contextmanager
    def stage(self, name):
        """Context manager that times a stage of the run, including its device work."""
        self.dist.synchronize()
        start = time.perf_counter()
        graphs_before = compiled_graphs()
        self.guard.enter_stage(name, start)
        yield
        self.dist.synchronize()
        self.guard.leave_stage()
        seconds = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 3)
        self.graphs[name] = self.graphs.get(name, 0) + compiled_graphs() - graphs_before
        self(f"stage:{name} seconds:{self.seconds[name]:.2f} graphs_compiled:{self.graphs[name]}")


def compiled_graphs():
    """Number of graphs that torch.compile has made in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def balance(items, cost, bins):
    """Puts each item, in order, into the bin with the least cost so far -> list of bins."""
    shares = [[] for _ in range(bins)]
    loads = [0] * bins
    for item in items:
        lightest = loads.index(min(loads))
        shares[lightest].append(item)
        loads[lightest] += cost(item)
    return shares


def write_atomically(path, data):
    """Writes bytes to a file that is either complete or absent: temporary name, sync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it still exists if the disk is full
    folder = os.open(path.parent, os.O_RDONLY)
    # makes the new name survive a crash, where the file system supports it
    with contextlib.suppress(OSError):
        os.fsync(folder)
    os.close(folder)


# ---- DATA ----------------------------------------------------------------------------------------
# --- shards
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024


def shard_size(path):
    """Number of tokens in a shard.

    Raises DataError on a wrong magic, version or size (format: docs/DATA.md).
    """
    header = np.fromfile(path, "<i4", 3).tolist()
    expected = [SHARD_MAGIC, SHARD_VERSION, (os.path.getsize(path) - SHARD_HEADER_BYTES) / 2]
    if header != expected:
        raise DataError(
            f"{path}: magic, version and tokens {header} are not {expected}: no shard, or torn;"
            " fetch it again"
        )
    return header[2]


def load_data_shard(path, start=0, count=-1):
    """(count,) uint16 of a shard from token `start` on; -1: to its end."""
    return np.fromfile(path, "<u2", count, offset=SHARD_HEADER_BYTES + 2 * start)


def shard_paths(folder, split):
    """Files of split "train", "val" or "val_bytes", in order."""
    folder = glob.escape(str(folder))  # a name with brackets is no pattern
    digits = "[0-9]" * 6  # they keep "val" from matching val_bytes
    return sorted(glob.glob(os.path.join(folder, f"fineweb_{split}_{digits}.bin")))


class TokenStream:
    """All shards of a split as one endless stream. Documents and rows may cross shard borders."""

    def __init__(self, folder, split):
        self.paths = shard_paths(folder, split)
        if not self.paths:
            raise DataError(
                f"no fineweb_{split}_*.bin in {folder}: set DATA_PATH, or make the data (README)"
            )
        self.sizes = [shard_size(path) for path in self.paths]
        self.offsets = np.cumsum([0, *self.sizes])
        # the stream is this part of the shards
        self.first = 0
        self.size = int(self.offsets[-1])
        if self.size == 0 or self.read(0, 1)[0] != BOS_ID:
            raise DataError(
                f"{self.paths[0]}: the stream must start with BOS (id {BOS_ID}); rebuild the data"
            )

    def read(self, start, count):
        """(count,) uint16 from position `start`; after the last token comes the first."""
        tokens = np.empty(count, np.uint16)
        start %= self.size
        filled = 0
        while filled < count:
            position = self.first + start
            shard = int(np.searchsorted(self.offsets, position, side="right")) - 1
            left = self.offsets[shard + 1] - position
            length = int(min(count - filled, self.size - start, left))
            begin = int(position - self.offsets[shard])
            part = load_data_shard(self.paths[shard], begin, length)
            tokens[filled : filled + length] = part
            filled += length
            start = (start + length) % self.size
        return tokens

    def hold_out(self, count):
        """Two streams: all but the last documents, and these, at least `count` tokens.

        Raises DataError if no document begins before them.
        """
        border = self.size - count
        first = max(0, border - 2**24)  # no document is longer
        begins = first + np.flatnonzero(self.read(first, border - first) == BOS_ID)
        if not begins.any():
            raise DataError(
                f"{self.paths[0]}: no document begins before the last {count} tokens: set"
                " QUANT_CHECK_ROWS=0"
            )
        cut = int(begins[-1])
        rest = copy.copy(self)
        held_out = copy.copy(self)
        rest.size = held_out.first = cut
        held_out.size -= cut
        return rest, held_out


def check_vocabulary(tokens, stream, hp):
    """Raises DataError for tokens of a stream that are not in the vocabulary."""
    largest = tokens.max()
    if largest >= hp.vocab_size:
        raise DataError(f"{stream.paths[0]}: token {largest} is outside VOCAB_SIZE={hp.vocab_size}")


# --- the tokenizer


def read_manifest(folder):
    """manifest.json of a dataset; {} if there is none.

    Raises DataError unless what find_tokenizer reads has its type.
    """
    try:
        manifest = json.loads(Path(folder, "manifest.json").read_text())
        manifest.get("tokenizer", {}).get("sha256")
        return manifest
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{folder}/manifest.json is damaged ({error!r}): fetch or make the dataset again"
        ) from None


def models_near(folder, nearest):
    """SentencePiece models in and around a dataset's folder, in order of distance.

    nearest: only those of the closest folder that has any. Raises DataError if that folder has
    several different ones, as nothing says which of them made the shards, and if there are none.
    """
    parents = folder.parent, folder.parent.parent, Path(__file__).parent
    searched = [folder, *(parent / "tokenizers" for parent in parents)]
    groups = [sorted(path.glob("*.model")) for path in searched]
    groups = [group for group in groups if group]
    if nearest:
        groups = groups[:1]
    found = sum(groups, [])
    several = nearest and len({path.read_bytes() for path in found}) > 1
    if several or not found:
        listed = ", ".join(map(str, found or searched))
        problem = "several tokenizers and no manifest" if several else "no tokenizer (*.model)"
        raise DataError(f"{folder}: {problem} in {listed}: set TOKENIZER_PATH")
    return found


def find_tokenizer(hp):
    """Path of the data's SentencePiece model.

    Raises DataError if none fits the settings and the manifest.
    """
    folder = Path(hp.data_path)
    wanted = read_manifest(folder).get("tokenizer", {}).get("sha256")
    if hp.tokenizer_path:
        candidates = [Path(hp.tokenizer_path)]
    else:
        candidates = models_near(folder, nearest=wanted is None)
    for path in candidates:
        if not path.exists():
            raise DataError(f"TOKENIZER_PATH={path} does not exist")
        if wanted in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
            check_tokenizer(hp, path)
            return path
    raise DataError(
        f"{folder}: its manifest wants a tokenizer with sha256 {wanted}, which none of"
        f" {', '.join(map(str, candidates))} has: set TOKENIZER_PATH"
    )


def check_tokenizer(hp, path):
    """Raises DataError if the file is no SentencePiece model or does not fit the settings."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
        size = tokenizer.vocab_size()
        tokenizer.id_to_piece([*range(size)])  # raises if a damaged piece is not text
    except (RuntimeError, UnicodeDecodeError):
        raise DataError(f"{path} is no SentencePiece model") from None
    if size != hp.vocab_size:
        raise DataError(f"{path} has {size} pieces, VOCAB_SIZE is {hp.vocab_size}")


def load_tokenizer(hp):
    """The data's SentencePiece model."""
    path = find_tokenizer(hp)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


# --- fused case markers


@lru_cache
def space_id(hp):
    """The id of a lone space. DataError where the tokenizer has no case markers beside it."""
    tokenizer = load_tokenizer(hp)
    markers = [tokenizer.id_to_piece(token) for token in CASE_MARKERS]
    if markers != ["\ue001", "\ue002", "\ue003"]:
        raise DataError(
            f"{find_tokenizer(hp)}: pieces 4 to 6 are not CaseOps' markers: set"
            " MARKER_FUSION_ENABLED=0"
        )
    return tokenizer.piece_to_id("\u2581")


def fuse_markers(tokens, token_bytes, space):
    """(n,) ids and the bytes of each -> (m,) both, a space and the case marker behind it as one id.

    SentencePiece merges nothing across a marker (PR 2109). Shards stay as they are. Raises
    DataError for ids of pairs, which would be taken for fused markers.
    """
    if np.isin(tokens, PAIR_IDS).any():
        raise DataError(
            f"DATA_PATH: the data have tokens {PAIR_IDS}, which are those of fused markers: set"
            " MARKER_FUSION_ENABLED=0"
        )
    begins_pair = (tokens[:-1] == space) & np.isin(tokens[1:], CASE_MARKERS)
    begins_pair = np.append(begins_pair, False)
    ends_pair = np.roll(begins_pair, 1)
    fused = tokens.copy()
    fused[ends_pair] = np.take(PAIR_IDS, tokens[ends_pair] - CASE_MARKERS[0])
    token_bytes = token_bytes + np.where(ends_pair, np.roll(token_bytes, 1), 0)
    return fused[~begins_pair], token_bytes[~begins_pair]


# --- rows of training


class Row(NamedTuple):
    """One packed row on the device."""

    inputs: Tensor  # (1, T) int64
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (N + 1,) int32: where each document or piece starts, padded by repeating T

    def to(self, device):
        """The row on a device; a copy from pinned memory does not wait."""
        return Row(*(t.to(device, non_blocking=True) for t in self))


def cut_pieces(starts, ends, length):
    """Starts and ends of segments -> starts of their pieces, none longer than `length`."""
    counts = -(-(ends - starts) // length)
    first_pieces = np.cumsum(counts) - counts
    # number of each piece within its segment
    numbers = np.arange(counts.sum()) - np.repeat(first_pieces, counts)
    return np.repeat(starts, counts) + length * numbers


def join_shortest(starts, total, longest, most):
    """Merges the shortest neighbouring pieces of a row until at most `most` are left.

    starts: (n,), of the pieces of a row of `total` tokens -> starts of what is left. No merged
    piece is longer than `longest`; of equal pairs the first is merged. If that does not suffice,
    the row is cut into pieces of `longest` instead, which must be at most `most`. Every merge looks
    at all pairs: 0.1 s for a row of 2,000 documents.
    """
    borders = np.append(starts, total)
    while len(borders) - 1 > most:
        lengths = borders[2:] - borders[:-2]  # of each piece and the one that follows
        first = lengths.argmin()
        if lengths[first] > longest:
            return np.arange(0, total, longest)
        borders = np.delete(borders, first + 1)
    return borders[:-1]


def pad_cu_seqlens(starts, total, max_segments):
    """Segment starts -> (max_segments + 1,) int32, padded with `total`.

    So one graph serves every row.
    """
    padding = np.full(max_segments + 1 - len(starts), total)
    return np.concatenate([starts, padding]).astype(np.int32)


def balance_documents(tokens, longest):
    """Redistributes documents over the rows of a step so that attention costs the same in each.

    tokens: (2, rows, T) inputs and targets -> the same documents, in the same shape: the longest
    first, each in the cheapest row that has room. Pieces of `longest` attend only to themselves.
    """
    if (tokens[0, :, 0] != BOS_ID).any():
        return tokens  # a document longer than its row stays where it is
    num_rows = tokens.shape[1]
    rows = [[] for _ in range(num_rows)]
    cost = np.zeros(num_rows)
    room = np.full(num_rows, tokens.shape[2])
    flat = tokens.reshape(2, -1)
    documents = np.split(flat, np.flatnonzero(flat[0] == BOS_ID)[1:], 1)
    for document in sorted(documents, key=lambda document: -document.shape[1]):
        length = document.shape[1]
        # if it fits nowhere: the row with most room
        row = np.where(room < length, 1e15 - room, cost).argmin()
        rows[row].append(document)
        pieces, rest = divmod(length, longest)
        cost[row] += pieces * longest**2 + rest**2
        room[row] -= length
    # where a document did not fit, the end of its row goes on in the next
    return np.concatenate(sum(rows, []), 1).reshape(tokens.shape)


class TrainLoader:
    """Packed training rows by number.

    Row i holds T tokens, from the first document that begins in span i of the stream. A step of n
    micro-steps takes rows [step n, (step + 1) n), of which rank r takes the r-th share: any world
    size trains on the same rows. BALANCE_ROWS redistributes a step's documents over its rows, as
    ranks wait for the one with the most attention.
    A span is as long as a row, before its markers are fused. DATA_SEED shuffles the spans in each
    epoch. The loader has no state except what it has read ahead, so the number of a step restores
    it exactly. Documents are cut in pieces of TRAIN_SEQ_LEN; see in_pieces.
    """

    def __init__(self, stream, hp, dist):
        self.stream = stream
        self.hp = hp
        self.dist = dist
        if hp.micro_steps % dist.world_size:
            raise SettingError(
                f"{hp.micro_steps} micro-batches a step do not divide by"
                f" {dist.world_size} ranks: change MICRO_BATCH_TOKENS"
            )
        self.per_rank = hp.micro_steps // dist.world_size
        self.span = self.span_length()
        # at most a twentieth of the data
        self.held_out_rows = min(hp.quant_check_rows, stream.size // (20 * self.span))
        if self.held_out_rows:
            count = (self.held_out_rows - 1) * self.span + self.tokens_to_read
            self.stream, self.held_out = stream.hold_out(count)
        self.seq_len = hp.train_seq_len
        self.thread = ThreadPoolExecutor(1)
        self.ahead = {}  # row number -> future of a row that is read ahead
        self.cached_rows = lru_cache(1)(self.rows_of_step)

    def in_pieces(self, length):
        """A loader of the same documents in pieces of at most `length` tokens.

        It shares no rows with this one: those read ahead are cut, and balanced, at another length.
        """
        loader = copy.copy(self)
        loader.seq_len = length
        loader.ahead = {}
        loader.cached_rows = lru_cache(1)(loader.rows_of_step)
        return loader

    def span_length(self):
        """Tokens of the stream from the start of a span to the next."""
        length = self.hp.micro_batch_tokens
        if not self.hp.fuses_markers:
            return length
        sample = self.stream.read(0, min(self.stream.size, 1 << 22))
        return length * len(sample) // len(self.fused(sample))

    def row_offset(self, index):
        """Where row `index` begins in the stream: at the first BOS of its span, if there is one."""
        start = index * self.span
        if self.hp.data_seed:
            spans = max(1, self.stream.size // self.span)
            epoch = index // spans
            rng = np.random.default_rng([self.hp.data_seed, epoch])
            shift = rng.integers(self.span)
            start = int(shift + rng.permutation(spans)[index % spans] * self.span)
        return start + int((self.stream.read(start, self.span) == BOS_ID).argmax())

    @property
    def tokens_to_read(self):
        """Tokens of the stream that fill a row and its last target: all may be pairs."""
        return (self.hp.micro_batch_tokens + 1) * (1 + self.hp.fuses_markers)

    def fused(self, tokens):
        """Tokens of the stream as the model sees them."""
        if not self.hp.fuses_markers:
            return tokens
        return fuse_markers(tokens, np.zeros_like(tokens), space_id(self.hp))[0]

    def read_row(self, stream, start):
        """(T + 1,) tokens of the row that begins at this position of a stream."""
        tokens = stream.read(start, self.tokens_to_read)
        check_vocabulary(tokens, stream, self.hp)
        return self.fused(tokens)[: self.hp.micro_batch_tokens + 1]

    def read_rows(self, stream, starts):
        """(2, n, T): inputs and targets of the rows that begin at n positions of a stream."""
        rows = np.stack([self.read_row(stream, start) for start in starts])
        return np.stack([rows[:, :-1], rows[:, 1:]])

    def rows_of_step(self, step):
        """(2, n, T): inputs and targets of the n rows of a step over all ranks."""
        first = step * self.hp.micro_steps
        starts = [self.row_offset(first + number) for number in range(self.hp.micro_steps)]
        tokens = self.read_rows(self.stream, starts)
        return balance_documents(tokens, self.seq_len) if self.hp.balance_rows else tokens

    def build(self, index):
        """Row `index` as CPU tensors, pinned for CUDA."""
        step, number = divmod(index, self.hp.micro_steps)
        return self.pack(self.cached_rows(step)[:, number])

    def held_out_row(self, index):
        """Row `index` of those that neither training nor the Hessians see, on the device."""
        tokens = self.read_rows(self.held_out, [index * self.span])
        return self.pack(tokens[:, 0]).to(self.dist.device)

    def pack(self, tokens):
        """(2, T): inputs and targets of a row -> Row of CPU tensors, pinned for CUDA."""
        hp = self.hp
        length = hp.micro_batch_tokens
        inputs, targets = tokens.astype(np.int64)
        starts = np.union1d(0, np.flatnonzero(inputs == BOS_ID))
        ends = np.append(starts[1:], length)
        pieces = cut_pieces(starts, ends, self.seq_len)
        pieces = join_shortest(pieces, length, self.seq_len, hp.row_segments)
        cu_seqlens = pad_cu_seqlens(pieces, length, hp.row_segments)
        row = Row(*map(torch.from_numpy, (inputs[None], targets, cu_seqlens)))
        if self.dist.device.type == "cuda":
            row = Row(*(t.pin_memory() for t in row))
        return row

    def row(self, index, following=None):
        """Row `index` on the device; meanwhile row `following` is read ahead."""
        future = self.ahead.pop(index, None) or self.thread.submit(self.build, index)
        row = future.result()
        self.ahead = {}
        if following is not None:
            self.ahead[following] = self.thread.submit(self.build, following)
        return row.to(self.dist.device)

    def rank_rows(self, step):
        """Yields this rank's rows of a step, on the device."""
        first = step * self.hp.micro_steps + self.dist.rank * self.per_rank
        last = first + self.per_rank - 1
        for index in range(first, last):
            yield self.row(index, index + 1)
        yield self.row(last, first + self.hp.micro_steps)


# --- the validation set
# FineWeb's validation set in CaseOps: documents, tokens, targets in full windows of 2,048 tokens,
# bytes of these targets
CANONICAL = 50_000, 47_853_344, 47_851_520, 151_074_499


def is_canonical(tokens, token_bytes):
    """Whether (N,) tokens, with their bytes, are the contest's validation documents in CaseOps."""
    documents = int((tokens == BOS_ID).sum())
    targets = CANONICAL[2]
    size = int(token_bytes[1 : targets + 1].sum(dtype=np.int64))
    return (documents, len(tokens), targets, size) == CANONICAL


class ValidationSet:
    """The validation stream.

    tokens: (N,); bytes: (N,), charged to each token; starts, ends: input spans [start, end) of the
    documents; summary: words for the log; figures: what a manifest states. The targets of a
    document are its tokens after BOS and the BOS that follows it, so every token but the first is
    the target of exactly one document.
    Raises DataError if anything is wrong with the files.
    """

    def __init__(self, hp):
        stream = TokenStream(hp.data_path, "val")
        self.tokens = stream.read(0, stream.size).astype(np.int64)
        check_vocabulary(self.tokens, stream, hp)
        self.bytes = self.count_bytes(hp, stream)
        self.describe()
        if hp.fuses_markers:
            # all text and all bytes stay
            self.tokens, self.bytes = fuse_markers(self.tokens, self.bytes, space_id(hp))
        # no BOS follows the last document
        self.starts = np.flatnonzero(self.tokens == BOS_ID)
        self.ends = np.append(self.starts[1:], len(self.tokens) - 1)

    def describe(self):
        """Sets figures, which a manifest states of the stored stream, and summary."""
        self.figures = {
            "documents": int((self.tokens == BOS_ID).sum()),
            "tokens": len(self.tokens),
            "charged_bytes": int(self.bytes.sum()),
        }
        canonical = "yes" if is_canonical(self.tokens, self.bytes) else "no"
        self.summary = (
            f"documents:{self.figures['documents']} values:{len(self.bytes)}"
            f" bytes:{self.figures['charged_bytes']} canonical:{canonical}"
        )

    def count_bytes(self, hp, stream):
        """(N,) int64 bytes charged to each token of the stream.

        Raises DataError if the side-car is missing, has another length, or charges a BOS.
        """
        paths = shard_paths(hp.data_path, "val_bytes")
        if not paths:
            raise DataError(f"no fineweb_val_bytes_*.bin in {hp.data_path}: BPB needs the side-car")
        lengths = [shard_size(path) for path in paths]
        if lengths != stream.sizes:
            raise DataError(
                f"{paths[0]}: side-car lengths {lengths} differ from the shards' {stream.sizes}"
            )
        token_bytes = np.concatenate([load_data_shard(path) for path in paths]).astype(np.int64)
        if token_bytes[self.tokens == BOS_ID].any():
            raise DataError(f"{paths[0]}: a BOS is charged bytes: another data's side-car")
        return token_bytes

    def targets_of(self, documents):
        """Array of document numbers -> number of their targets, bytes of these."""
        sums = np.concatenate([[0], np.cumsum(self.bytes)])
        starts = self.starts[documents]
        ends = self.ends[documents]
        num_bytes = sums[ends + 1] - sums[starts + 1]
        return int((ends - starts).sum()), int(num_bytes.sum())


# ---- KERNELS -------------------------------------------------------------------------------------
# Each operation is written twice, with the same signature: the reference (`*_ref`,
# `attention_sdpa`) defines it on any device, in any dtype, and is differentiated by autograd; the
# fast version is a custom op, which torch.compile treats as one node. `*_trial_inputs` makes the
# arguments, on torch's default device, with which select_ops tries the fast version against the
# reference.
#
# Kernels read no Python global and contain no True/False/None, because a minifier may move those
# to module level, where Triton refuses them. Only annotations that are read at run time are
# written (tl.constexpr, the schemas of custom ops), because the minifier keeps them all.


def jit(kernel):
    """triton.jit; without Triton the kernels are defined but never launched."""
    return kernel if triton is None else triton.jit(kernel)


def operator(function):
    """The function as golf::<its name>, an operator that torch.compile treats as one node."""
    name = function.__name__.lstrip("_")
    return torch.library.custom_op(f"golf::{name}", function, mutates_args=())


@jit
def load_f32(pointers, mask):
    """tl.load as float32, 0 where masked; tl.store casts back by itself."""
    return tl.load(pointers, mask, 0.0).to(tl.float32)


def trial_tensors(dtype, *shapes):
    """Normal numbers in these shapes that require gradients, for the trials of select_ops.

    They are on the default device. The random state of the run stays as it is.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    numbers = [torch.randn(shape, generator=generator) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in numbers]


# --- lm_head with softcapped cross-entropy
# z = softcap * tanh(h @ weight.T / softcap), loss = logsumexp(z) - z[target]. Forward overwrites
# the logits with their gradients; backward only scales two matmuls by the incoming gradient.


def softcapped_cross_entropy_ref(logits, targets, softcap):
    """Losses (N,) in nats, fp32, of logits (N, V) and targets (N,) int64 in [0, V)."""
    capped = softcap * torch.tanh(logits.float() / softcap)
    return F.cross_entropy(capped, targets, reduction="none")


def linear_cross_entropy_ref(h, weight, targets, softcap):
    """Losses (N,) in nats, fp32, of h (N, D), weight (V, D) and targets (N,) int64 in [0, V).

    The logits have the dtype of h.
    """
    return softcapped_cross_entropy_ref(F.linear(h, weight), targets, softcap)


def cross_entropy_trial_inputs(hp, dtype):
    """Arguments of linear_cross_entropy: h (200, 64), weight (1000, 64), targets (200,)."""
    h, weight = trial_tensors(dtype, (200, 64), (1000, 64))
    targets = torch.arange(0, 1000, 5)
    return h, weight, targets, 30.0


@jit
def softcap_tanh(logits, CAP: tl.constexpr):
    """tanh(logits / CAP), written with the sigmoid, which Triton has on every device."""
    return 2 * tl.sigmoid(logits * (2 / CAP)) - 1


@jit
def _ce_kernel(logits, targets, losses, V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: its loss, and the gradient of that loss in place of its logits.

    The softcap bounds exp(z), so no running maximum is needed.
    """
    row = tl.program_id(0).to(tl.int64)  # 64 bits: rows x vocabulary may exceed 2^31
    columns = tl.arange(0, BLOCK)
    inside = columns < V
    target = tl.load(targets + row)
    logits += row * V

    # loss = log(sum of exp(z)) - z[target]
    z_target = CAP * softcap_tanh(tl.load(logits + target).to(tl.float32), CAP)
    tanh = softcap_tanh(load_f32(logits + columns, inside), CAP)
    exps = tl.where(inside, tl.exp(CAP * tanh), 0.0)
    total = tl.sum(exps, 0)
    tl.store(losses + row, tl.log(total) - z_target)

    # gradient for logits: (softmax(z) - one_hot(target)) * dz/dlogits, where the last is 1 - tanh^2
    softmax = exps * (1 / total)
    d_z = softmax - tl.where(columns == target, 1.0, 0.0)
    tl.store(logits + columns, d_z * (1 - tanh * tanh), inside)


def _launch_ce(logits, targets, softcap):
    """Losses (N,) of targets (N,); logits (N, V) become their gradients."""
    N, V = logits.shape
    losses = logits.new_empty(N, dtype=torch.float32)
    if N == 0:
        return losses
    block = triton.next_power_of_2(V)
    num_warps = min(32, max(1, block // 512))  # 16 logits per thread at V = 8,192
    _ce_kernel[N,](
        logits,
        targets.contiguous(),
        losses,
        V=V,
        CAP=softcap,
        BLOCK=block,
        num_warps=num_warps,
    )
    return losses


@operator
def _linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """Losses (N,), and the gradient (N, V) of each row's loss with respect to its logits."""
    logits = h @ weight.T
    losses = _launch_ce(logits, targets, softcap)
    return losses, logits


@_linear_cross_entropy.register_fake
def _linear_cross_entropy_fake(h, weight, targets, softcap):
    # not len(h), which would tie a compiled graph to this number of tokens
    tokens = h.shape[0]
    return h.new_empty(tokens, dtype=torch.float32), h.new_empty(tokens, len(weight))


def _linear_cross_entropy_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # or autograd fills zeros for the second output
    ctx.save_for_backward(*inputs[:2], output[1])  # h, weight, gradients of the logits


def _linear_cross_entropy_gradients(ctx, grad, _):
    """Gradients of h and weight, from grad (N,) of the losses."""
    h, weight, grad_logits = ctx.saved_tensors
    grad_h = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_h = ((grad_logits @ weight) * grad[:, None]).to(h.dtype)
    if ctx.needs_input_grad[1]:
        scaled_h = (h * grad[:, None]).to(h.dtype)
        grad_weight = grad_logits.T @ scaled_h
    return grad_h, grad_weight, None, None


_linear_cross_entropy.register_autograd(
    _linear_cross_entropy_gradients, setup_context=_linear_cross_entropy_setup
)


def linear_cross_entropy(h, weight, targets, softcap):
    """As linear_cross_entropy_ref; the (N, V) logits are written once and overwritten once."""
    return _linear_cross_entropy(h, weight, targets, softcap)[0]


# --- squared leaky ReLU MLP: leaky_relu(x @ w_up.T, slope)^2 @ w_down.T
# Quack's GEMMs (quack-kernels) fuse the activation or, in backward, its derivative; the other
# matmuls are cuBLAS. Only the activation is saved: its square root is the magnitude of the
# pre-activation, up to the slope, and its lowest bit is the sign.


def mlp_ref(x, w_up, w_down, slope):
    """(..., D) of x (..., D), w_up (F, D), w_down (D, F)."""
    hidden = F.leaky_relu(F.linear(x, w_up), slope)
    return F.linear(hidden.square(), w_down)


def mlp_trial_inputs(hp, dtype):
    """Arguments of mlp_ref: x (200, 64), w_up (320, 64), w_down (64, 320)."""
    x, w_up, w_down = trial_tensors(dtype, (200, 64), (320, 64), (64, 320))
    return x, w_up / 64**0.5, w_down / 320**0.5, 0.3


@lru_cache
def mlp_gemms(slope, dtype):
    """Quack's GEMMs act(a @ b.T) and, for backward, (a @ b) * act'; slope from 0 to 1.

    Compiled when first called, 10 s for all ranks of a host, then cached on disk. ValueError:
    another GPU or dtype.
    """
    if torch.cuda.get_device_capability()[0] != 9 or dtype != torch.bfloat16:
        raise ValueError("needs sm_90 and bfloat16")
    import cutlass
    from quack.epilogue import EpiMod

    # Quack passes operands by name: acc, the sum in fp32, and c. Bit 16 of an fp32 number is the
    # lowest bit of its bf16 form.
    def forward(acc):
        negative = (acc.bitcast(cutlass.Int32) >> 15) & 65536  # bit 16 = sign of acc
        leaky = cutlass.cute.arch.fmax(acc, acc * slope)
        act = (leaky * leaky).bitcast(cutlass.Int32)
        # to the nearest of the bf16 numbers whose lowest bit is that sign
        rounded = ((act + 65536 - negative) & -131072) | negative
        return {"D": rounded.bitcast(cutlass.Float32)}

    def backward(acc, c):  # c: act; act' = 2 sqrt(act), times -slope where the sign is set
        positive = c.bitcast(cutlass.Int32) & 65536 == 0
        factor = cutlass.select_(positive, 2.0, -2.0 * slope)
        root = cutlass.cute.math.sqrt(c, fastmath=True)
        return {"D": acc * (root * cutlass.Float32(factor))}

    return EpiMod(forward), EpiMod(backward)


def _for_tma(t):
    """t (M, N), or a copy, with rows and a base that TMA can address."""
    # even a single row, which is contiguous whatever its stride, gets the stride N
    t = t.detach().contiguous().flatten().view(t.shape)
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _launch_mlp(a, b, act, slope):
    """act (M, N) of a (M, K), b (N, K) and None; in backward (M, N) of a, b (K, N) and act."""
    backward = act is not None
    out = a.new_empty(a.shape[0], b.shape[1 if backward else 0])
    tensors = [_for_tma(a), _for_tma(b), out]
    if backward:
        tensors.append(_for_tma(act))
    mlp_gemms(slope, a.dtype)[1 if backward else 0].gemm(
        *tensors,
        epi_args={},
        tile_M=192,
        tile_N=128,
        cluster_M=1,
        cluster_N=2,
        pingpong=True,
        b_kn=backward,
    )
    return out


@operator
def _mlp_backward(grad: Tensor, w_down: Tensor, act: Tensor, slope: float) -> Tensor:
    """Gradient (M, F) of the pre-activation, from grad (M, D) of the output."""
    return _launch_mlp(grad, w_down, act, slope)


_mlp_backward.register_fake(lambda grad, w_down, act, slope: torch.empty_like(act))


@operator
def _mlp(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Output (M, D), and the activation (M, F) that backward needs, of x (M, D)."""
    act = _launch_mlp(x, w_up, None, slope)
    return act @ w_down.T, act


@_mlp.register_fake
def _mlp_fake(x, w_up, w_down, slope):
    tokens = x.shape[0]
    return x.new_empty(tokens, len(w_down)), x.new_empty(tokens, len(w_up))


def _mlp_setup(ctx, inputs, output):
    *tensors, ctx.slope = inputs
    ctx.set_materialize_grads(False)  # or autograd fills zeros for the activation
    ctx.save_for_backward(*tensors, output[1])


def _mlp_gradients(ctx, grad, _):
    x, w_up = ctx.saved_tensors[:2]
    w_down, act = ctx.saved_tensors[2:]
    needs_x, needs_up, needs_down = ctx.needs_input_grad[:3]
    grad_x = grad_up = grad_down = None
    if needs_down:
        grad_down = grad.T @ act
    if needs_x or needs_up:
        grad_pre = _mlp_backward(grad, w_down, act, ctx.slope)
    if needs_up:
        grad_up = grad_pre.T @ x
    if needs_x:
        grad_x = grad_pre @ w_up
    return grad_x, grad_up, grad_down, None


_mlp.register_autograd(_mlp_gradients, setup_context=_mlp_setup)


def leaky_relu_sq_mlp(x, w_up, w_down, slope):
    """As mlp_ref, of tensors of one dtype. Shapes that TMA cannot address take the reference."""
    width, hidden = w_down.shape
    if width % 8 or hidden % 8 or x.numel() == 0:  # TMA needs rows of n * 16 bytes
        return mlp_ref(x, w_up, w_down, slope)
    out = _mlp(x.reshape(-1, width), w_up, w_down, slope)[0]
    return out.view(x.shape)


# --- around attention
# Before it: per-head RMS norm and partial RoPE for q and k, gain for q. After it: XSA subtracts
# from every head's output its part along the token's own value, and a gate scales the rest. The
# kernels work on tiles of rows; a row is one head of one token.


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


def qkv_heads_trial_inputs(hp, dtype):
    """Arguments of qkv_heads_ref: one row of 256 tokens with the heads of hp."""
    width = hp.model_dim + 2 * hp.kv_dim
    qkv, gain = trial_tensors(dtype, (1, 256, width), (hp.num_heads,))
    frequencies = torch.tensor([1.0, 0.03])
    angles = torch.arange(256)[:, None, None] * frequencies
    return qkv, gain, angles.cos(), angles.sin(), hp.num_kv_heads


def gated_xsa_ref(y, v, logits):
    """XSA (arXiv:2603.09078) scaled by sigmoid(logits).

    y (B, T, H, E), v (B, T, K, E), logits (B, T, H) -> (B, T, H, E).
    """
    return subtract_own_value(y, v) * torch.sigmoid(logits)[..., None]


def gated_xsa_trial_inputs(hp, dtype):
    """Arguments of gated_xsa_ref: one row of 256 tokens with the heads of hp."""
    y, v, _ = attention_trial_inputs(hp, dtype)[:3]
    logits = trial_tensors(dtype, (1, 256, hp.num_heads))[0]
    return y, v, logits


def subtract_own_value(y, v):
    """y (B, T, H, E), v (B, T, K, E) -> y without its part along the token's own value."""
    v_hat = F.normalize(v, dim=-1)[:, :, :, None]  # (B, T, K, 1, E)
    grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, K, H/K, E)
    along = (grouped * v_hat).sum(-1, keepdim=True)
    return (grouped - along * v_hat).flatten(2, 3)


def _launch_rows(kernel, tensors, rows, E, warps, *sizes, **constants):
    """Launches kernel(*tensors, rows, *sizes, **constants) over rows of E numbers.

    Each program takes 1,024 numbers.
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
    H = heads[0].shape[2]
    E = heads[0].shape[3]
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
    tokens = qkv.shape[:2]
    H = gain.numel()
    E = qkv.shape[2] // (H + 2 * kv_heads)
    q = qkv.new_empty(*tokens, H, E)
    k = qkv.new_empty(*tokens, kv_heads, E)
    return q, k, torch.empty_like(k)


@operator
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


@operator
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
    ctx.save_for_backward(*inputs[:4])
    ctx.kv_heads = inputs[4]


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
    E: tl.constexpr,
    GROUP: tl.constexpr,
    BACKWARD: tl.constexpr,
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
            d = load_f32(grad + at, inside)
            dlogit = gate * (1 - gate) * tl.sum(d * z, 1)
            tl.store(dlogits + head, dlogit, in_rows)
            d *= gate[:, None]
            d_along = tl.sum(d * v_hat, 1)[:, None]
            d_hat -= along * d + d_along * x
            tl.store(out + at, d - d_along * v_hat, inside)
        else:
            tl.store(out + at, z * gate[:, None], inside)
    if BACKWARD:  # through the normalisation of v
        d_along = tl.sum(d_hat * v_hat, 1)[:, None]
        tl.store(dv + row[:, None] * E + e, inverse * (d_hat - d_along * v_hat), inside)


def _launch_gated_xsa(y, v, logits, outputs, grad=None):
    """Fills outputs: (out,), or given the gradient of out those of y, v and logits."""
    E = v.shape[-1]
    if grad is None:  # forward does not use the arguments that y stands for
        tensors = (y, v, logits, y, *outputs, y, y)
    else:
        tensors = (y, v, logits, grad, *outputs)
    _launch_rows(
        _gated_xsa_kernel,
        tensors,
        v.numel() // E,
        E,
        4,
        GROUP=y.shape[-2] // v.shape[-2],
        BACKWARD=grad is not None,
    )


@operator
def gated_xsa(y: Tensor, v: Tensor, logits: Tensor) -> Tensor:
    """As gated_xsa_ref, in one kernel each for forward and backward."""
    out = y.new_empty(y.shape)
    _launch_gated_xsa(y, v, logits, (out,))
    return out


gated_xsa.register_fake(lambda y, v, logits: y.new_empty(y.shape))


def _empty_xsa_grads(grad, y, v, logits):
    return y.new_empty(y.shape), v.new_empty(v.shape), logits.new_empty(logits.shape)


@operator
def _gated_xsa_backward(
    grad: Tensor, y: Tensor, v: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _empty_xsa_grads(grad, y, v, logits)
    _launch_gated_xsa(y, v, logits, grads, grad)
    return grads


_gated_xsa_backward.register_fake(_empty_xsa_grads)


def _gated_xsa_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gated_xsa_gradients(ctx, grad):
    return _gated_xsa_backward(grad, *ctx.saved_tensors)


gated_xsa.register_autograd(_gated_xsa_gradients, setup_context=_gated_xsa_setup)


# --- input of a slot
# The residual stream merges with a skip, mixes with x0 and is normed. Inductor fuses forward well.
# In backward it fuses the reductions over tokens of several slots into kernels that spill
# registers; this is one kernel per slot.


class SlotInput(NamedTuple):
    """What a slot computes before its attention."""

    h: Tensor  # (B, T, D), the scaled norm of the mix
    gate_input: Tensor  # (B, T, window), first columns of h
    mixed: Tensor | None  # (B, T, D), the mix
    merged: Tensor | None  # (B, T, D), x merged with the skip, or x


def merge_mix_norm(x, x0, mix, scale, window, *merge):
    """x and x0 (B, T, D), mix (2, D), scale (1,) -> SlotInput with all four tensors.

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


def slot_input_trial_inputs(hp, dtype):
    """Arguments of slot_input_ref: streams (200, 64), a skip with weight and gate."""
    x, x0, skip, mix = trial_tensors(dtype, *[(200, 64)] * 3, (2, 64))
    weight, gate = trial_tensors(torch.float32, (64,), (64,))
    scale = torch.ones(1)
    return x, x0, mix, scale, 9, True, True, skip, weight, gate


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


@operator
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
    merge = inputs[4]
    ctx.wanted = inputs[6:]  # return_mix, return_merged
    merged = output[3] if merge else inputs[0]
    x0_mix_scale = inputs[1:4]
    ctx.save_for_backward(merged, *x0_mix_scale, *merge)


def _slot_input_gradients(ctx, *grads):
    inputs = ctx.saved_tensors[:4]  # merged, x0, mix, scale
    merge = list(ctx.saved_tensors[4:])
    outputs = _slot_input_backward(list(grads), *inputs, merge, *ctx.wanted)
    d_x, d_x0, d_skip = outputs[:3]
    sums = outputs[3].sum(0)  # of both rows of mix, of the weight and of the gate
    d_mix = sums[:2].to(inputs[2].dtype)
    d_merge = [d_skip, sums[2], sums[3]][: len(merge)]
    if not ctx.needs_input_grad[1]:
        d_x0 = None
    return d_x, d_x0, d_mix, None, d_merge, None, None, None


_slot_input.register_autograd(_slot_input_gradients, setup_context=_slot_input_setup)


def decompose_slot_input():
    """Has Inductor trace slot_input's forward, which it fuses with its neighbours.

    Inductor decomposes below autograd, so the gradients stay those of _slot_input_gradients.
    """
    from torch._inductor.decomposition import decompositions

    decompositions[_slot_input._opoverload] = _slot_input_traced


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
    d_gate_input,
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
    RETURN_MIX: tl.constexpr,
    RETURN_MERGED: tl.constexpr,
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
    share = 1.0  # of x in what it merges into
    rest = 1.0  # of the weighted skip
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
        g = load_f32(d_h + at, valid)  # gradient of h
        g += load_f32(d_gate_input + row * WINDOW + column, valid & (column < WINDOW))
        d = load_f32_if(d_mixed + at, valid, RETURN_MIX)  # of mixed, later of merged
        d_returned = load_f32_if(d_merged + at, valid, RETURN_MERGED)
        skipped = load_f32_if(skip + at, valid, MERGE)
        d += _norm_backward(mix_x * x + mix_0 * e, g * factor, D)
        sum_x += d * x
        sum_0 += d * e
        tl.store(d_x0 + at, d * mix_0, valid)
        d = d * mix_x + d_returned
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
    """Empty tensors for _slot_input_kernel's gradients.

    They are those of x, x0 and the skip, and sums (programs, 4, D) over each program's rows: the
    gradients of mix (2 of the 4), of the weight and of the gate.
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


@operator
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
        RETURN_MIX=return_mix,
        RETURN_MERGED=return_merged,
        MERGE=len(merge) > 0,
        GATED=len(merge) > 2,
        D=D,
        BLOCK=block,
        num_warps=block // 256 or 1,
    )
    return outputs


_slot_input_backward.register_fake(_empty_slot_input_grads)


# --- AdamW of the rows of a table, in place, without a first moment
# Row source[i] of values and squares (N, n), updated with row i of the gradient, is written to row
# target[i]. Several rows may have the same source.


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


def adamw_rows_trial_inputs(hp, dtype):
    """Arguments of adamw_rows_ref: 4 rows of 64; one is updated in place, one moves."""
    values, gradient = (t.detach() for t in trial_tensors(torch.float32, (4, 64), (2, 64)))
    squares = values.square()
    source = torch.tensor([2, 0])
    target = torch.tensor([2, 3])
    correction = torch.tensor([0.1, 0.75])
    rates = (0.1, 0.5, 0.9)
    return values, squares, gradient.to(dtype), source, target, correction, 2.0, rates


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
    lr, decay, beta2 = rates
    width = gradient.shape[1]
    if width == 0:
        return values, squares
    blocks = triton.cdiv(width, 1024)
    _adamw_kernel[(blocks, gradient.shape[0])](
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


# --- attention over packed documents
# Causal within a document, scale 1/sqrt(E); query head h reads key/value head h // (H / K). Every
# backend takes q (B, T, H, E), k and v (B, T, K, E), cu_seqlens, max_seqlen, which no document
# exceeds, and window, the number of earlier keys that a query sees (0: all); it returns
# (B, T, H, E). cu_seqlens is (N + 1,) int32 with B = 1, or None where every row is one document. It
# may end with repetitions of T, which are empty documents. All but attention_sdpa take cu_seqlens
# (2, N + 1) too, of queries and of keys; then a document's queries are its last positions.


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
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, is_causal=True)
    return out.transpose(1, 2)


def attention_trial_inputs(hp, dtype):
    """Arguments of an attention backend: 256 tokens in four documents, heads of hp."""
    heads = hp.num_heads, hp.num_kv_heads, hp.num_kv_heads
    q, k, v = trial_tensors(dtype, *((1, 256, n, hp.head_dim) for n in heads))
    # the last documents are empty, as where a row has fewer than its limit
    cu_seqlens = torch.tensor([0, 37, 38, 166, 256, 256, 256], dtype=torch.int32)
    return q, k, v, cu_seqlens, 128, 9 if hp.attn_window else 0


def _packed_sdpa(q, k, v, cu_seqlens, max_seqlen, window):
    """q, k and v (1, T, H, E) -> (1, T, H, E).

    In blocks of W = max_seqlen queries, each of which sees the keys of its block and of the one
    before: the mask has T x 2W elements instead of T x T.
    """
    T, H, E = q.shape[1:]
    W = min(max_seqlen, T)
    blocks = (T + W - 1) // W
    positions = torch.arange(blocks * W, dtype=cu_seqlens.dtype, device=q.device)
    # documents count from 1; 0 is before the row
    document = torch.searchsorted(cu_seqlens, positions, right=True).view(blocks, W)
    offset = torch.arange(2 * W, device=q.device)
    same_document = document[:, :, None] == _with_previous_block(document)[:, None]
    mask = same_document & (offset <= offset[:W, None] + W)
    if window:
        mask &= offset >= offset[:W, None] + W - window
    q = _in_blocks(q, blocks, W).transpose(1, 2)
    k = _with_previous_block(_in_blocks(k, blocks, W)).transpose(1, 2)
    v = _with_previous_block(_in_blocks(v, blocks, W)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])  # (blocks, H, W, E)
    return out.transpose(1, 2).reshape(1, blocks * W, H, E)[:, :T]


def _in_blocks(t, blocks, W):
    """(1, T, H, E) -> (blocks, W, H, E).

    Padding comes after the last document. It is a document of its own that attends to itself: a
    query without any key would give NaN.
    """
    padding = (0, 0, 0, 0, 0, blocks * W - t.size(1))
    return F.pad(t[0], padding).unflatten(0, (blocks, W))


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
    """Attention over documents end to end, on (tokens, heads, E) -> a backend.

    Without cu_seqlens every row of the batch is one document.
    """

    def attention(q, k, v, cu_seqlens, max_seqlen, window=0):
        if cu_seqlens is None:
            cu_seqlens = _cu_seqlens_of_rows(q)
        flat = (t.flatten(0, 1) for t in (q, k, v))
        return varlen(*flat, cu_seqlens, max_seqlen, window).view(q.shape)

    return attention


@_over_rows
def attention_torch(q, k, v, cu_seqlens, max_seqlen, window):
    """torch's varlen_attn (CUDA, 16 bits), which has no grouped heads in torch 2.11."""
    k, v = _repeat_kv(q, k, v)
    cu_seqlens = _cu_seqlens_of_q_and_k(cu_seqlens)
    window_size = (window or -1, 0)
    return varlen_attn(q, k, v, *cu_seqlens, max_seqlen, max_seqlen, window_size=window_size)


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
    return _attention_fa4(q, k, v, cu_seqlens, max_seqlen, window)[0]


def _fa4_options(q, cu_seqlens, max_seqlen, window):
    """Arguments of FlashAttention-4 that forward and backward share."""
    both = _cu_seqlens_of_q_and_k(cu_seqlens)
    options = {
        "cu_seqlens_q": both[0],
        "cu_seqlens_k": both[1],
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": max_seqlen,
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": True,
    }
    if window:
        options["window_size_left"] = window
    return options


@operator
def _attention_fa4(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int
) -> tuple[Tensor, Tensor]:
    """-> the output (tokens, H, E), and the logsumexp (H, tokens) that backward needs."""
    from flash_attn.cute.interface import _flash_attn_fwd

    options = _fa4_options(q, cu_seqlens, max_seqlen, window)
    results = _flash_attn_fwd(q, k, v, return_lse=True, **options)
    return results[0], results[1]


@_attention_fa4.register_fake
def _fa4_fake(q, k, v, cu_seqlens, max_seqlen, window):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _empty_fa4_grads(grad, qkv, *others):
    q = qkv[0]
    group = q.shape[1] // qkv[1].shape[1]
    shared = [t.new_empty(group, *t.shape) for t in qkv[1:]]
    return q.new_empty(q.shape), *shared


@operator
def _fa4_backward(
    grad: Tensor,
    qkv: list[Tensor],
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (tokens, H, E), and of k and v (H / K, tokens, K, E).

    Those of k and v are not yet summed over the query heads that share a key head.
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
    # nobody differentiates lse: without this, autograd fills zeros for its gradient
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.limits = inputs[4:]  # max_seqlen, window


def _fa4_gradients(ctx, grad, grad_lse):
    qkv = list(ctx.saved_tensors[:3])
    others = ctx.saved_tensors[3:]  # cu_seqlens, out, lse
    dq, dk, dv = _fa4_backward(grad, qkv, *others, *ctx.limits)
    if len(dk) == 1:
        return dq, dk[0], dv[0], None, None, None
    return dq, dk.sum(0), dv.sum(0), None, None, None


_attention_fa4.register_autograd(_fa4_gradients, setup_context=_fa4_setup)


# --- trellis-coded quantization
# A value is rounded to a level, a whole number, but not freely: in a state with an even number only
# even levels may be taken, with an odd number only odd ones. So half of the level, rounded down, is
# enough for its code, and costs the bits of a quantizer with a step of two levels. A code leads to
# the next state, and all levels of a sequence are chosen together, so that the error is that of a
# finer step. (Marcellin and Fischer 1990; eight states as in dependent quantization of the NNC
# standard.)
#     level = 2 code + state % 2;  next state = (state >> 1) ^ 5 (state % 2) ^ 2 (code % 2)
# A state is reached from two states that are both even (states 0 to 3) or both odd (4 to 7): from
# one of them by an even code, from the other one by an odd code.
TRELLIS_SEGMENT = 256  # values of a sequence at most: then the next one begins, in state 0


def trellis_round_ref(values):
    """Levels (B, T) int32 with the least sum of squared errors from each sequence of values (B, T).

    The Viterbi algorithm; values are in units of a level.
    """
    B, T = values.shape
    state = torch.arange(8, device=values.device)
    odd = state >> 2  # of the states before it
    even_code_from = 2 * (state ^ (5 * odd)) + odd
    before = torch.stack([even_code_from, even_code_from ^ 4], dim=1)  # (8, 2): by code % 2
    remainder = torch.stack([odd, odd + 2], dim=1)  # (8, 2): level % 4

    shift = torch.arange(4, device=values.device)
    levels = 4 * torch.floor((values[..., None] - shift) / 4 + 0.5) + shift  # (B, T, 4)
    error = values[..., None] - levels
    costs = (error * error)[..., remainder.flatten()].unbind(1)  # for each t (B, 16)

    total = torch.full((B, 8), 1e30, device=values.device)
    total[:, 0] = 0.0
    ways = []  # for each t (B, 8): code % 2 on the best way to each state
    for cost in costs:
        sums = total.index_select(1, before.flatten()) + cost
        total, way = sums.view(B, 8, 2).min(dim=2)
        ways.append(way)
    ways = torch.stack(ways)

    # back from the best last state, one lookup a value
    at = total.argmin(dim=1, keepdim=True)
    path = [at]
    for sources in reversed(before[state, ways].unbind(0)):
        at = sources.gather(1, at)
        path.append(at)
    after = torch.cat(path[-2::-1], dim=1)  # (B, T): the state that each value leads to
    way = ways.transpose(0, 1).gather(2, after[..., None])[..., 0]
    return levels.gather(2, remainder[after, way][..., None])[..., 0].int()


def trellis_round_trial_inputs(hp, dtype):
    """Multiples of 1/64: their sums are exact, so that the levels must be equal."""
    values = trial_tensors(torch.float32, (3, 200))[0]
    return ((256 * values.detach()).round() / 64,)


@jit
def _nearest_level(value, remainder):
    """The level next to the value with this remainder modulo 4."""
    return 4 * tl.floor((value - remainder) / 4 + 0.5) + remainder


@jit
def _trellis_kernel(values, history, levels, T):
    """One program per sequence; arithmetic as in trellis_round_ref."""
    first = tl.program_id(0) * T
    state = tl.arange(0, 8)
    odd = state >> 2
    even_code_from = 2 * (state ^ (5 * odd)) + odd
    remainder = odd.to(tl.float32)

    total = tl.where(state == 0, 0.0, 1e30)
    for t in range(T):
        value = tl.load(values + first + t)
        even_error = value - _nearest_level(value, remainder)
        odd_error = value - _nearest_level(value, remainder + 2)
        by_even_code = tl.gather(total, even_code_from, 0) + even_error * even_error
        by_odd_code = tl.gather(total, even_code_from ^ 4, 0) + odd_error * odd_error
        way = (by_odd_code < by_even_code).to(tl.int32)
        total = tl.minimum(by_odd_code, by_even_code)
        tl.store(history + first + t, tl.sum(way << state, 0))  # a bit for each state
    tl.debug_barrier()  # other threads read the history

    at = tl.argmin(total, 0)
    for step in range(T):
        t = T - 1 - step
        way = (tl.load(history + first + t) >> at) & 1
        odd_before = at >> 2
        level = _nearest_level(tl.load(values + first + t), (odd_before + 2 * way).to(tl.float32))
        tl.store(levels + first + t, level.to(tl.int32))
        at = (2 * (at ^ (5 * odd_before)) + odd_before) ^ (4 * way)


def trellis_round(values):
    """As trellis_round_ref, to the bit: without fused multiply-adds the sums are equal."""
    B, T = values.shape
    levels = torch.empty(B, T, dtype=torch.int32, device=values.device)
    history = torch.empty_like(levels)
    _trellis_kernel[B,](
        values.contiguous(), history, levels, T, num_warps=1, enable_fp_fusion=False
    )
    return levels


# --- selection
ATTENTION_BACKENDS = {  # the fastest first
    "fa3": attention_fa3,
    "fa4": attention_fa4,
    "torch": attention_torch,
    "sdpa": attention_sdpa,
}


class Ops(NamedTuple):
    """The operations that the model calls, as select_ops chose them."""

    attention: Callable  # q, k, v, cu_seqlens, max_seqlen, window
    mlp: Callable  # x, w_up, w_down, slope
    cross_entropy: Callable  # h, weight, targets, softcap
    names: dict  # operation -> name of the chosen candidate
    notes: tuple = ()  # why faster candidates were refused
    qkv_heads: Callable = qkv_heads_ref  # qkv, gain, cos, sin, kv_heads
    gated_xsa: Callable = gated_xsa_ref  # y, v, logits
    # x, x0, mix, scale, window, return_mix, return_merged, *(skip, weight, gate)
    slot_input: Callable = slot_input_ref
    # values, squares, gradient, source, target, correction, scale, rates
    adamw_rows: Callable = adamw_rows_ref
    trellis_round: Callable = trellis_round_ref  # values


class Operation(NamedTuple):
    """What select_ops has to choose from for one operation."""

    candidates: dict  # name -> function, the fastest first
    reference: Callable
    trial_inputs: Callable  # (hp, dtype) -> arguments


def attention_candidates(hp, device):
    """The backends that ATTENTION_BACKEND allows on this device."""
    if hp.attention_backend != "auto":
        return {hp.attention_backend: ATTENTION_BACKENDS[hp.attention_backend]}
    if device.type != "cuda":
        return {"sdpa": attention_sdpa}
    candidates = dict(ATTENTION_BACKENDS)
    if torch.cuda.get_device_capability(device)[0] != 9:  # FlashAttention-3 is for Hopper alone
        del candidates["fa3"]
    return candidates


def use_kernels(hp, device):
    """Whether KERNELS=1 is set and can be followed."""
    return hp.kernels and device.type == "cuda" and triton is not None


def operations(hp, device):
    """{name in RESULT: Operation} of those that hp needs; slot_input has its first name, enter."""
    with_kernels = use_kernels(hp, device)

    def with_reference(library, kernel, reference, trial_inputs):
        candidates = {library: kernel} if with_kernels else {}
        candidates["reference"] = reference
        return Operation(candidates, reference, trial_inputs)

    needed = {
        "attention": Operation(
            attention_candidates(hp, device), attention_sdpa, attention_trial_inputs
        ),
        "mlp": with_reference("quack", leaky_relu_sq_mlp, mlp_ref, mlp_trial_inputs),
        "cross_entropy": with_reference(
            "triton", linear_cross_entropy, linear_cross_entropy_ref, cross_entropy_trial_inputs
        ),
        "qkv_heads": with_reference("triton", qkv_heads, qkv_heads_ref, qkv_heads_trial_inputs),
        "gated_xsa": with_reference("triton", gated_xsa, gated_xsa_ref, gated_xsa_trial_inputs),
        "enter": with_reference("triton", slot_input, slot_input_ref, slot_input_trial_inputs),
        "adamw_rows": with_reference("triton", adamw_rows, adamw_rows_ref, adamw_rows_trial_inputs),
    }
    if hp.gptq_column_steps and hp.gptq_trellis:
        needed["trellis_round"] = with_reference(
            "triton", trellis_round, trellis_round_ref, trellis_round_trial_inputs
        )
    return needed


def _forward_backward(op, args):
    """Outputs of op and, under one fixed loss, gradients of the args that require them."""
    args = list(args)
    leaves = []
    for i, arg in enumerate(args):
        if torch.is_tensor(arg):
            args[i] = arg.detach().clone().requires_grad_(arg.requires_grad)
            if arg.requires_grad:
                leaves.append(args[i])
    with torch.enable_grad():
        outs = op(*args)
    if not isinstance(outs, tuple):
        outs = (outs,)
    results = [out.detach() for out in outs]
    if leaves:
        grads = []
        for out in outs:
            weights = torch.linspace(-1, 1, out.numel(), device=out.device).cos()
            grads.append(weights.view(out.shape).to(out.dtype))
        results += torch.autograd.grad(outs, leaves, grads)
    return results


def _disagreement(op, reference, args):
    """How outputs and gradients of op differ from the reference's; empty if they agree."""
    pairs = zip(_forward_backward(op, args), _forward_backward(reference, args), strict=True)
    errors = []
    for got, want in pairs:
        error = (got - want).float().norm() / want.float().norm()
        errors.append(error.item())
    # bf16 rounding on both sides stays below it, a wrong mask does not; False for NaN
    if all(error <= 0.03 for error in errors):
        return ""
    listed = " ".join(f"{error:.1e}" for error in errors)
    return f"disagrees with the reference, relative errors {listed}"


def _first_that_works(kind, operation, args, notes):
    """Name of the first candidate that agrees with the reference, or None; refusals go to notes."""
    for name, op in operation.candidates.items():
        if op is operation.reference:
            return name
        try:
            fault = _disagreement(op, operation.reference, args)
        except Exception as error:  # a library may raise anything: missing, old, wrong device
            fault = f"{error!r:.200}"
        if not fault:
            return name
        notes.append(f"{kind} {name}: {fault}")
    return None


def select_ops(hp, device, dtype):
    """Ops for hp: of each operation the fastest candidate that agrees with its reference.

    They are tried on `device` in `dtype`. SettingError: ATTENTION_BACKEND does not work here.
    """
    device = torch.device(device)
    notes = []
    if hp.kernels and device.type == "cuda" and triton is None:
        notes.append("kernels: Triton is not installed")
    chosen = {}
    names = {}
    for kind, operation in operations(hp, device).items():
        with device:
            args = operation.trial_inputs(hp, dtype)
        name = _first_that_works(kind, operation, args, notes)
        if name is None:  # attention alone has candidates without the reference
            raise SettingError(
                f"ATTENTION_BACKEND={hp.attention_backend} does not work here: {'; '.join(notes)}"
            )
        names[kind] = name
        chosen[kind] = operation.candidates[name]
    chosen["slot_input"] = chosen.pop("enter")
    return Ops(**chosen, names=names, notes=tuple(notes))


# ---- MODEL ---------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """One kind of weight matrix, of which every layer has one."""

    role: str  # its name in GPT.matrices, and its group in the artifact
    bank: str  # parameter of GPT: all layers' matrices of one kind, then those of the next
    module: str  # part of its saved name
    rows: str  # the setting that is its number of rows
    columns: str
    site: str  # of a tap: the matmul whose input it reads
    clip_sigmas: str  # setting

    @property
    def saved_name(self):
        """In model.pt and in the artifact, with {} for the layer's number."""
        return f"blocks.{{}}.{self.module}.weight"


# in the order of the artifact
MATRICES = (
    Matrix("q", "qo_bank", "attn.c_q", "model_dim", "model_dim", "qkv", "attn_clip_sigmas"),
    Matrix("k", "kv_bank", "attn.c_k", "kv_dim", "model_dim", "qkv", "attn_clip_sigmas"),
    Matrix("v", "kv_bank", "attn.c_v", "kv_dim", "model_dim", "qkv", "attn_clip_sigmas"),
    Matrix(
        "out", "qo_bank", "attn.c_proj", "model_dim", "model_dim", "attn_proj", "attn_clip_sigmas"
    ),
    Matrix("up", "mlp_up_bank", "mlp.c_fc", "mlp_dim", "model_dim", "mlp_up", "mlp_clip_sigmas"),
    Matrix(
        "down", "mlp_down_bank", "mlp.c_proj", "model_dim", "mlp_dim", "mlp_down", "mlp_clip_sigmas"
    ),
)
# Muon trains the banks; quantization and saved files see single matrices (see unbank).
BANKS = defaultdict(list)
for kind in MATRICES:
    BANKS[kind.bank].append(kind)
# Embedding tables: parameter of GPT -> saved name
EMBEDDING_NAMES = {"tok_emb": "tok_emb.weight"}


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
        """q (B, T, H, E), k and v (B, T, K, E) -> (B, T, H, E).

        attn_window: how many tokens before its own a query sees; 0: all.
        """
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
    """The parts of a slot as GPT has them, each compiled by itself.

    Attention, most of what a slot compiles, is the same on both sides of the split into lanes.
    """

    slot_input: Callable
    attention: Callable
    after_attention: Callable


class LayerWeights(NamedTuple):
    """Weights of one layer, in the compute dtype: views of the banks and small parameters."""

    qkv: Tensor  # (D + 2 K E, D): q, k and v stacked, for one matmul
    out: Tensor  # (D, D), times attn_scale
    up: Tensor  # (F, D)
    down: Tensor  # (D, F), times mlp_scale
    q_gain: Tensor  # (H,)
    attn_scale: Tensor  # (D,)
    mlp_scale: Tensor  # (D,)
    mix: Tensor  # (2, D): factors of stream and embedding
    post: Tensor  # (2, 2): factors of (attention, MLP) for each target lane
    resid: Tensor  # (2,): factor of each lane
    depth_scale: Tensor  # (1,) float32, scales both norms
    gate: Tensor  # (H, GPT.gate_inputs)


class GPT(nn.Module):
    """The recurrent GPT: one forward pass for training, evaluation, GPTQ and TTT.

    A tap observes or changes activations. tap.at(slot, layer) returns a callable that is called as
    (site, x, y) -> y with the input and the output of each site of that slot: the matmuls qkv,
    attn_proj, mlp_up and mlp_down, and the sublayers attn_out and mlp_out, which pass as a fourth
    argument the (D,) scale that y already contains. token_losses calls its tap at lm_head. Where
    `splits_mlp` is set the MLP runs unfused, so that its hidden layer can be observed. Without a
    tap nothing is traced.
    """

    gate_inputs = GATE_WINDOW  # of the attention gate
    gate_reads_mix = False  # whether the attention gate of every slot reads SlotInput.mixed

    def __init__(self, hp, ops, dtype):
        super().__init__()
        self.hp = hp
        self.ops = ops
        self.dtype = dtype
        self.make_parameters()
        # Four equal numbers a layer: kernels want aligned rows
        scales = [[(layer + 1) ** -0.5] * 4 for layer in range(hp.num_layers)]
        self.register_buffer("depth_scale", torch.tensor(scales), persistent=False)
        # The longest rows are training rows and those of global test-time training
        longest_ttt_row = hp.global_ttt_chunk_tokens + max(hp.eval_seq_len, hp.ttt_eval_seq_len)
        positions = torch.arange(max(hp.micro_batch_tokens, longest_ttt_row))
        cos, sin = rotary_tables(positions, hp)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights(torch.Generator().manual_seed(hp.generator_seed))

    def make_parameters(self):
        """Makes the parameters; their order is that of checkpoints and training states."""
        hp = self.hp
        L = hp.num_layers
        D = hp.model_dim
        self.tok_emb = nn.Parameter(torch.empty(hp.vocab_size, D))
        for name, kinds in BANKS.items():
            rows = getattr(hp, kinds[0].rows)
            columns = getattr(hp, kinds[0].columns)
            setattr(self, name, nn.Parameter(torch.empty(len(kinds) * L, rows, columns)))
        self.q_gain = nn.Parameter(torch.full((L, hp.num_heads), hp.qk_gain_init))
        self.attn_gate = nn.Parameter(torch.zeros(L, hp.num_heads, self.gate_inputs))
        self.attn_scale = nn.Parameter(torch.ones(L, D))
        self.mlp_scale = nn.Parameter(torch.ones(L, D))
        mix = torch.stack([torch.ones(L, D), torch.zeros(L, D)], dim=1)
        self.resid_mix = nn.Parameter(mix)  # (L, 2, D)
        plans = self.slot_plan(looping=True)
        num_skips = sum(plan.skip_index is not None for plan in plans)
        self.skip_weights = nn.Parameter(torch.ones(num_skips, D))
        self.skip_gates = nn.Parameter(torch.zeros(num_skips, D))
        # (layer, attention / MLP, target lane)
        self.parallel_post = nn.Parameter(torch.ones(L, 2, 2))
        self.parallel_resid = nn.Parameter(torch.full((L, 2), 1.1))  # (layer, lane)
        self.smear_weight = nn.Parameter(torch.zeros(1, GATE_WINDOW))
        self.smear_lambda = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def init_weights(self, generator):
        """Random embeddings and inner matrices; output projections start at zero.

        Embeddings: N(0, 0.005). q, k, v and MLP up: orthogonal.
        """
        self.tok_emb.normal_(0.0, 0.005, generator=generator)
        matrices = self.matrices(self.banks())
        for role in ("q", "k", "v", "up"):
            for matrix in matrices[role]:
                nn.init.orthogonal_(matrix, generator=generator)
        matrices["out"].zero_()
        matrices["down"].zero_()

    @property
    def head_weight(self):
        """(V, D): the output projection, tied to the embedding."""
        return self.tok_emb

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
                    return_mix=not has_lanes or self.gate_reads_mix,
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
            stacks = bank.split(self.hp.num_layers) if len(kinds) > 1 else [bank]
            for kind, stack in zip(kinds, stacks, strict=True):
                found[kind.role] = stack
        return found

    def layer_weights(self, tokens, window_start):
        """A LayerWeights for every layer; here they do not depend on the tokens (B, T).

        Tensors are unbound once, so that the gradient of a bank is one stack, not a sum of padded
        slices. The scales of sublayer outputs are multiplied into the matrices, so that scaling
        costs no extra pass over activations, forward or backward.
        """
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
            "gate": self.attn_gate,
        }
        columns = {}
        for name, tensor in stacked.items():
            if tensor is not None:  # published systems without gates have no attn_gate
                columns[name] = tensor.to(self.dtype).unbind(0)
        weights = []
        for layer in range(self.hp.num_layers):
            fields = {name: column[layer] for name, column in columns.items()}
            weights.append(LayerWeights(depth_scale=self.depth_scale[layer, :1], **fields))
        return weights

    def slot_input(self, x, x0, w, return_mix, return_merged, *skip):
        """Streams x and x0 (B, T, D) -> SlotInput; a skip comes with its weight and its gate."""
        return self.ops.slot_input(
            x, x0, w.mix, w.depth_scale, GATE_WINDOW, return_mix, return_merged, *skip
        )

    def attention(self, slot_input, w, rope, segments, tap):
        """SlotInput -> (B, T, D), the scaled output of the attention sublayer."""
        hp = self.hp
        h = slot_input.h
        cos, sin = rope
        qkv = linear(h, w.qkv, tap, "qkv")
        q, k, v = self.ops.qkv_heads(qkv, w.q_gain, cos, sin, hp.num_kv_heads)
        k, v = self.keys_and_values(k, v, w)
        y = self.attend(q, k, v, segments, w)
        y = self.gate_heads(y, v, slot_input, qkv, w)
        out = linear(y.reshape(h.shape), w.out, tap, "attn_proj")
        return out if tap is None else tap("attn_out", h, out, w.attn_scale)

    def keys_and_values(self, k, v, w):
        """Keys and values (B, T, K, E) of a layer -> those that its attention reads."""
        return k, v

    def attend(self, q, k, v, segments, w):
        """q (B, T, H, E), k and v (B, T, K, E) -> (B, T, H, E)."""
        return segments.attend(self.ops, q, k, v)

    def gate_heads(self, y, v, slot_input, qkv, w):
        """The heads' outputs (B, T, H, E) -> the same with XSA and gates, v (B, T, K, E)."""
        logits = self.hp.sparse_attn_gate_scale * F.linear(slot_input.gate_input, w.gate)
        return self.ops.gated_xsa(y, v, logits)

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

    def after_attention(self, slot_input, attn, mlp_lane, w, tap):
        """The rest of a layer, behind its attention -> x, mlp_lane.

        Given are SlotInput, the attention's output (B, T, D) and the MLP lane, None before the
        split.

        Before the split attention and MLP run one after the other on one stream; after it they run
        in parallel, each on its own lane, and both write to both lanes.
        """
        if mlp_lane is None:
            x = slot_input.mixed + attn
            return x + self.mlp(x, w, tap), None
        mlp = self.mlp(mlp_lane, w, tap)
        x = w.resid[0] * slot_input.merged + w.post[0, 0] * attn + w.post[1, 0] * mlp
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
        previous = F.pad(e[:, :-1], (0, 0, 1, 0))
        gate_input = e[..., :GATE_WINDOW]
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
        is longer than max_seqlen. Without it every row is one document. compiled_parts, a
        CompiledParts, take the place of the methods of their names; slot_input then returns every
        output, which keeps the number of graphs small.
        """
        parts = compiled_parts or self
        return_all = compiled_parts is not None
        segments = Segments(cu_seqlens, max_seqlen)
        length = tokens.size(1)
        rope = (self.cos[:length], self.sin[:length])
        weights = self.layer_weights(tokens, window_start)
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
            slot_input = parts.slot_input(x, x0, w, return_mix, return_merged, *skip)
            if plan.stores_merged:
                skips.append(slot_input.merged.view_as(x))
            slot_tap = tap and tap.at(plan.slot, plan.layer)
            attn = parts.attention(slot_input, w, rope, segments, slot_tap)
            x, mlp_lane = parts.after_attention(slot_input, attn, mlp_lane, w, slot_tap)
        return norm(self.join_lanes(x, mlp_lane))

    def skip_parameters(self, index):
        """The (D,) weight and the (D,) gate of a skip."""
        return self.skip_weights[index], self.skip_gates[index]

    def join_lanes(self, x, mlp_lane):
        """The two lanes, (B, T, D) each or None for the second -> the stream (B, T, D)."""
        return x if mlp_lane is None else (x + mlp_lane) / 2

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


HEAD_CHUNK = 8192  # positions whose float32 logits exist at a time


def losses_in_chunks(token_losses, hidden, targets):
    """Final norm's outputs (T, D) and targets (T,) -> (T,) nats, HEAD_CHUNK positions at a time."""
    chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    return torch.cat([token_losses(*chunk) for chunk in chunks])


def unbank(model, tensors=None):
    """GPT -> {saved name: fp32 view}, with the banks taken apart into matrices.

    tensors: {parameter name: tensor} to take apart in place of the weights, such as gradients.
    """
    state = {}
    for name, tensor in (tensors or model.state_dict()).items():
        if name not in BANKS:
            state[EMBEDDING_NAMES.get(name, name)] = tensor
            continue
        stacks = tensor.split(model.hp.num_layers)
        for kind, matrices in zip(BANKS[name], stacks, strict=True):
            for layer, matrix in enumerate(matrices):
                state[kind.saved_name.format(layer)] = matrix
    return state


def rebank(model, state, source="the saved model"):
    """Loads {saved name: tensor} into a GPT.

    Raises DataError, which names the source, if names or shapes differ from the model's.
    """
    views = unbank(model)
    wanted = {name: tensor.shape for name, tensor in views.items()}
    given = {name: tensor.shape for name, tensor in state.items()}
    if differ := sorted({name for name, _ in wanted.items() ^ given.items()}):
        raise DataError(
            f"{source} does not fit these settings: {len(differ)} tensors differ,"
            f" {differ[:5]} among them"
        )
    with torch.no_grad():
        for name, tensor in views.items():
            tensor.copy_(state[name])


# ---- OPTIMIZER -----------------------------------------------------------------------------------

# Polar Express (arXiv:2505.16932): (a, b, c) of each Newton-Schulz step
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(x):
    """(N, R, C) -> (N, R, C), each matrix orthogonalised by five Newton-Schulz steps.

    X <- aX + (bA + cA^2)X with A = X X^T, starting from X / |X|_F. Tall matrices are transposed, so
    that A is the smaller of the two products.
    """
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def muon_update(grad, momentum_buffer, momentum, orthogonalise):
    """(N, R, C) gradients -> (N, R, C) orthogonalised Nesterov updates, in the gradients' dtype.

    Rows get norm 1 before (MUON_ROW_NORMALIZE of published systems). Updates the momentum buffer in
    place.
    """
    momentum_buffer.mul_(momentum).add_(grad)
    update = grad.add(momentum_buffer, alpha=momentum)
    return orthogonalise(update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7))


def reset_gradients(parameters):
    """Gives every parameter a new gradient of zeros, for backward to add to."""
    for p in parameters:
        p.grad = torch.zeros_like(p)


def step_matrices(bank, update, lr, decay, outward):
    """bank <- (1 - decay) bank - lr update, in place; bank and update are (N, R, C).

    With outward below 1 the part of a step along the matrix is multiplied by it where the matrix
    would grow, and the norm changes by that part alone: sideways steps turn the matrix (the radial
    brake of modded-nanogpt's optimizer benchmark, entry 29). A matrix of zeros takes the direction
    of its first step.
    """
    if outward < 1:
        dims = {"dim": (-2, -1), "keepdim": True}
        norm = bank.norm(**dims).clamp_min(1e-8)
        along = (update * bank).sum(**dims) / norm  # below 0 where the matrix grows
        braked = torch.where(along < 0, outward * along, along)
        update = update + (braked - along) / norm * bank
        norm = (1 - decay) * norm - lr * braked
    bank.mul_(1 - decay).add_(update, alpha=-lr)
    if outward < 1:
        bank.mul_(norm.clamp_min(1e-8) / bank.norm(**dims).clamp_min(1e-8))


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
        """The function of updates (N, R, C) for the bank with this momentum buffer."""
        return polar_express

    @torch.no_grad()
    def step(self, lr, momentum, weight_decay, clip):
        """p <- p (1 - lr wd) - lr sqrt(max(1, rows / cols)) O, with O from muon_update.

        step_matrices does it, with the radial brake. The gradients are multiplied by `clip`, a 0-d
        tensor or None.
        """
        gathers = []
        for buffer, shard in zip(self.momentum_buffers, self.shards(), strict=True):
            if clip is not None:
                shard = shard * clip.to(shard.dtype)
            update = muon_update(shard, buffer, momentum, self.orthogonaliser(buffer))
            gathers.append(self.dist.all_gather(update))
        for bank, (handle, update) in zip(self.banks, gathers, strict=True):
            handle.wait()
            scale = max(1.0, bank.size(-2) / bank.size(-1)) ** 0.5
            update = update[: bank.size(0)]
            step_matrices(bank, update, lr * scale, lr * weight_decay, self.hp.muon_outward)
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
        self.muon = Muon([rest.pop(name) for name in BANKS], hp, dist, model.dtype)
        embeddings = [rest.pop(name) for name in EMBEDDING_NAMES if name in rest]
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

    It reaches back EMA_SPAN of training, so that runs of every length average alike: 286 steps in
    6,350, as the published decay of 0.9965 does (PR 1855), and 95 in 2,110.
    """

    def __init__(self, model, hp):
        self.hp = hp
        self.parameters = list(model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]

    def decay(self, step, progress):
        """At most (1 + step) / (10 + step), so that the first weights are soon forgotten."""
        return min(self.full_decay(step, progress), (1 + step) / (10 + step))

    def full_decay(self, step, progress):
        """1 - 1 / (steps that EMA_SPAN takes, at the rate so far)."""
        steps = self.hp.ema_span * step / progress if progress else math.inf
        return 1 - 1 / max(steps, 1.0)

    @torch.no_grad()
    def update(self, step, progress):
        """The weights after step `step` (from 0), begun at `progress`, join the average."""
        decay = self.decay(step, progress)
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def copy_to_model(self):
        """Overwrites the model's weights with their average."""
        torch._foreach_copy_(self.parameters, self.average)


# ---- SCHEDULE ------------------------------------------------------------------------------------
# Pure functions of the training fraction in [0, 1] or of the step, so that every rank computes the
# same values.


def lr_multiplier(progress, hp):
    """1 until 1 - WARMDOWN_FRAC, then linear to 0, never below MIN_LR."""
    return max(hp.min_lr, min(1.0, (1.0 - progress) / hp.warmdown_frac))


def decay_multiplier(progress, hp):
    """Factor of the weight decay, which is constant here but not in presets/published.py."""
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


def seq_len_at(progress, hp):
    """The longest piece of a document at this training fraction.

    Shorter pieces first: steps with less attention, and early on little is learned from afar.
    """
    return hp.train_seq_len if progress >= hp.full_seq_len_at else max(2, hp.train_seq_len // 2)


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
        return self.dist.max_over_ranks(seconds * (self.dist.rank == 0), *numbers)

    def seconds(self):
        """Training time so far on rank 0; every rank must call it."""
        return self.clock_and_max()[0]

    @contextlib.contextmanager
    def paused(self):
        """Leaves the time inside the with-block out of the training time."""
        self.dist.synchronize()
        since = time.perf_counter()
        yield
        self.dist.synchronize()
        self.start += time.perf_counter() - since


def compile_wanted(hp, dist):
    """Whether COMPILE asks for torch.compile on this device."""
    return dist.device.type == "cuda" if hp.compile == "auto" else hp.compile == "1"


@lru_cache
def prepare_compiler():
    """Sets up torch.compile for this process."""
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
    if dynamic is None:  # tiles that win at one size may lose at the others, and the clock runs
        options["triton.autotune_pointwise"] = False
    return torch.compile(function, fullgraph=True, dynamic=dynamic, options=options)


def compile_parts(model, hp, dist, dynamic=False):
    """CompiledParts of a model, as `compiled` makes them."""
    parts = model.slot_input, model.attention, model.after_attention
    return CompiledParts(*(compiled(part, hp, dist, dynamic) for part in parts))


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
        self.ema = EMA(model, hp)
        self.forward = compiled(model.forward, hp, dist, graphs=hp.train_cuda_graphs)
        # Position in training; training states hold these two, so that a run can be resumed
        self.looping = loop_is_on(0.0, hp)  # in the last step
        self.loop_starts = [(0, 0.0)]  # (step, seconds) at the start of each looping state
        # As last logged: the live line must not wait for the GPU
        self.last_loss = math.nan

    def train_step(self, step, progress, looping):
        """One optimizer step -> 0-d tensor, this rank's share of the mean loss in nats."""
        hp = self.hp
        total = torch.zeros((), device=self.dist.device)
        for inputs, targets, cu_seqlens in self.loader.rank_rows(step):
            if compile_wanted(hp, self.dist):
                # The outputs of the last replay are not needed any more
                torch.compiler.cudagraph_mark_step_begin()
            # TRAIN_SEQ_LEN also while pieces are shorter: one graph serves all lengths.
            # No name for the losses: the memory of a captured micro-batch would outlive backward
            loss = (
                self.forward(inputs, targets, cu_seqlens, looping, hp.train_seq_len).mean()
                / hp.micro_steps
            )
            loss.backward()
            total += loss.detach()
        self.guard.watch(self.model, total)
        self.optimizers.step(progress, step)
        self.update_average(step, progress)
        return total

    def update_average(self, step, progress):
        """The weights of a step join the average."""
        self.ema.update(step, progress)

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
        self.ema = EMA(self.model, self.hp)

    def train(self, evaluate):
        """Trains until the time budget or ITERATIONS end -> figures for RESULT.

        Afterwards the model holds the average. `evaluate()` scores the current weights; it is
        called every VAL_LOSS_EVERY steps with the clock stopped.
        """
        hp = self.hp
        log = self.log
        budget = hp.training_seconds
        step, seconds, losses = self.guard.resume(self, evaluate)
        step_seconds = seconds / max(step, 1)
        clock = TrainingClock(self.dist, seconds)
        while step < hp.iterations:
            # The last step must not overrun, even if it takes twice as long as the one before
            if step and seconds + 2 * step_seconds > budget:
                break
            progress = self.progress(step, seconds)
            looping = loop_is_on(progress, hp)
            if looping != self.looping:
                log(f"step:{step} looping:{int(looping)} train_seconds:{seconds:.2f}")
                self.loop_starts.append((step, seconds))
                self.looping = looping
            seq_len = seq_len_at(progress, hp)
            if seq_len != self.loader.seq_len:  # the Hessians' loader keeps TRAIN_SEQ_LEN
                log(f"step:{step} train_seq_len:{seq_len} train_seconds:{seconds:.2f}")
                self.loader = self.loader.in_pieces(seq_len)
            losses.append(self.train_step(step, progress, looping))
            step += 1
            clock.mark_step()
            now, *reports = clock.clock_and_max(*self.guard.report())
            step_seconds = now - seconds
            seconds = now
            self.guard.after_step(self, step, seconds, losses, reports)
            if step <= 5 or step % hp.train_log_every == 0:
                self.log_step(step, losses[-1], seconds, progress, looping)
            log.guard.show(
                progress,
                f"step:{step} train_loss:{self.last_loss:.4f}"
                f" tokens_per_s:{step * hp.train_batch_tokens / seconds:.0f}",
            )
            if self.evaluation_is_due(step):
                with clock.paused():
                    evaluate()
        self.guard.after_last_step(self, step)
        seconds = clock.seconds()
        if seconds > budget:
            log(f"note: training took {seconds:.2f} s of {budget:.2f}")
        self.log_step(step, losses[-1], seconds, self.progress(step, seconds), self.looping)
        self.ema.copy_to_model()
        return self.summary(step, seconds, losses)

    def progress(self, step, seconds):
        """The training fraction in [0, 1]: of the time budget or, without one, of ITERATIONS."""
        hp = self.hp
        share = step / hp.iterations
        if hp.max_wallclock_seconds:
            share = seconds / hp.training_seconds
        return min(1.0, share)

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
        ends = [*self.loop_starts[1:], (steps, seconds)]
        rates = []
        for start, end in zip(self.loop_starts, ends, strict=True):
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
# Limits of scales: fp16 would round a smaller one to 0, by which an all-zero row would be divided.
FP16_RANGE = 2.0**-24, 65504.0
DAMPING_RETRIES = 4
GPTQ_BLOCK = 128  # columns whose error reaches later columns in one matmul
GRADIENT_ROWS = 4  # calibration rows for row gradients, see row_step_factors
# Step sizes are stored as int8 codes k for 2^(k/8). The step of a weight is its row's times its
# column's: a sum of two codes, -256 to 255. Negative k index EXP2_EIGHTHS from its end, so that
# EXP2_EIGHTHS[k] is 2^(k/8) for them, too.
EXP2_EIGHTHS = np.float32([2.0 ** (k / 8) for k in [*range(256), *range(-256, 0)]])
MAX_SHIFT = 7  # bits of a fine code, see split_wide_codes
MAX_WIDE_CODE = 127 << MAX_SHIFT


class QuantRole(NamedTuple):
    """How a matrix is quantized: its group in the artifact and the names of its settings."""

    group: str
    bits: str
    clip_sigmas: str


EMBEDDING_ROLE = QuantRole("embedding", "embed_bits", "embed_clip_sigmas")
# by the name of the saved weight, in the order of the artifact's groups
QUANT_TABLE = {"tok_emb.weight": EMBEDDING_ROLE}
for kind in MATRICES:
    QUANT_TABLE[kind.saved_name] = QuantRole(kind.role, "matrix_bits", kind.clip_sigmas)


def quant_role(name):
    """QuantRole of a saved weight; None for tensors that stay fp16 and for attention gates."""
    return QUANT_TABLE.get(re.sub(r"^blocks\.[0-9]+\.", "blocks.{}.", name))


# --- GPTQ


def inverse_cholesky_upper(h):
    """Upper triangular U (..., C, C) with H^-1 = U^T U; NaN where H is not positive definite."""
    # H = P P^T with P upper triangular gives U = P^-1: half the work of inverting H and factoring
    # the inverse.
    lower, info = torch.linalg.cholesky_ex(h.flip(-2, -1))
    # a mask instead of an `if`, which would wait for the device
    lower = lower.masked_fill((info != 0)[..., None, None], math.nan)
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device).expand_as(h)
    return torch.linalg.solve_triangular(lower.flip(-2, -1), eye, upper=True)


def damped_inverse_factor(h, damping, names):
    """inverse_cholesky_upper of h (N, C, C) + damping (N,) times I; overwrites both arguments.

    The damping of matrices without a factor grows tenfold, up to DAMPING_RETRIES times. ModelError
    with their names if that does not help.
    """
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    undamped = diagonal.clone()
    for retry in range(DAMPING_RETRIES + 1):
        diagonal.copy_(undamped + damping[:, None])
        upper = inverse_cholesky_upper(h)
        failed = ~upper.isfinite().flatten(1).all(dim=1)
        failed_names = [name for name, bad in zip(names, failed.tolist(), strict=True) if bad]
        if not failed_names:
            return upper
        failed_names = ", ".join(failed_names)
        warnings.warn(
            f"GPTQ: damping raised tenfold, retry {retry + 1}: {failed_names}", stacklevel=2
        )
        damping[failed] *= 10
    raise ModelError(f"GPTQ: no Cholesky factor for {failed_names}: raise GPTQ_DAMP")


def to_log2_eighths(x):
    """Positive step sizes -> int8 codes k with the nearest 2^(k/8).

    GPTQ works with the rounded step sizes, so that rounding them adds no error.
    """
    return (8 * x.float().log2()).round_().clamp_(-127, 127).to(torch.int8)


def from_log2_eighths(codes):
    """Codes of to_log2_eighths, or sums of them -> step sizes in float32, for GPTQ.

    The weights are rebuilt with table_steps, as the last bit of exp2 may differ between machines.
    """
    return (codes / 8).exp2()


def column_step_grid(upper, row_scale, octaves):
    """Steps of rows (N, R) and columns (N, C), the step of a weight is their product.

    They are codes of to_log2_eighths. upper: factors U (N, C, C) of the inverse Hessians;
    row_scale: SDClip's scales (N, R).

    diag U is the inverse of a column's conditional deviation, the part of its input that the
    columns after it do not predict. With steps proportional to diag U every column adds the same
    weighted error, which is optimal for an entropy coder. `octaves` limits the range, because other
    text may use a column more than the calibration rows did.
    """
    log2_steps = upper.diagonal(dim1=1, dim2=2).log2()
    log2_steps = log2_steps - log2_steps.mean(dim=1, keepdim=True)
    column_steps = to_log2_eighths(log2_steps.clamp(-octaves, octaves).exp2())
    column_steps.clamp_(max=127 - 8 * MAX_SHIFT)  # split_wide_codes may add 8 * MAX_SHIFT
    return to_log2_eighths(row_scale), column_steps


def row_step_factors(w, row_gradients, hp):
    """Matrices w (N, R, C), mean squared gradients of rows (N, R) -> factors of row steps (N, R).

    SDClip's steps are proportional to a row's deviation. Steps proportional to the inverse root of
    the mean squared gradient are optimal (reverse water-filling). GPTQ_ROW_POWER is how far to go
    from the former, 0, to the latter, 1. The median row of a matrix keeps its step, so that a few
    outliers do not move the others. All rows do if a gradient is not a number.
    """
    log2_costs = (w.std(dim=2) * row_gradients.sqrt()).clamp(min=1e-30).log2()
    log2_costs = log2_costs - log2_costs.quantile(0.5, dim=1, keepdim=True)
    octaves = hp.gptq_row_octaves
    return (-hp.gptq_row_power * log2_costs).clamp(-octaves, octaves).exp2().nan_to_num(1.0)


def order_columns(w, hessian, damp, names):
    """Puts columns in the order in which GPTQ quantizes them: by descending diagonal of H.

    w (N, R, C) and hessian (N, C, C), neither is changed; damp: share of the mean of diag H that is
    added to it. Returns weights (N, C, R), transposed so that a column is contiguous, factors of
    the damped inverse Hessians (N, C, C), and the original index of each column (N, C).
    """
    h = hessian.float().clone()
    diagonal = h.diagonal(dim1=1, dim2=2)
    damping = damp * diagonal.mean(dim=1)
    dead = diagonal == 0  # inputs that are 0 for all calibration tokens: their weights become 0
    diagonal.masked_fill_(dead, 1.0)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    h = h.gather(1, order[:, :, None].expand_as(h))
    h = h.gather(2, order[:, None, :].expand_as(h))
    upper = damped_inverse_factor(h, damping, names)
    weights = w.float().mT.masked_fill(dead[:, :, None], 0.0)
    weights = weights.gather(1, order[:, :, None].expand_as(weights))
    return weights, upper, order


def trellis_levels(codes):
    """Codes (..., R, C), whole numbers -> their levels in the trellis of each column, float32.

    In NumPy's integers: exact on every machine.
    """
    codes = np.nan_to_num(codes).clip(-(2**20), 2**20)  # those of a damaged artifact, too
    rows = codes.shape[-2]
    levels = np.empty(codes.shape, np.float32)
    for first in range(0, min(rows, TRELLIS_SEGMENT)):  # this row of all segments at once
        segment_rows = codes[..., first::TRELLIS_SEGMENT, :].astype(np.int32)
        if first == 0:
            state = np.zeros_like(segment_rows)
        state = state[..., : segment_rows.shape[-2], :]  # the last segment may be shorter
        is_odd = state & 1
        levels[..., first::TRELLIS_SEGMENT, :] = 2 * segment_rows + is_odd
        state = (state >> 1) ^ (5 * is_odd) ^ (2 * (segment_rows & 1))
    return levels


def nearest_codes(column, step, max_code):
    """Scalar quantization of a column of all rows: each weight gets the code next to it.

    column and step (N, R) -> codes and what they stand for, both float32 (N, R).
    """
    codes = (column / step).round_().clamp_(-max_code, max_code)
    return codes, codes * step


def trellis_codes(column, step, max_code, trellis_round):
    """Trellis-coded quantization: the trellis runs along the rows of a column.

    column and step (N, R) -> levels, of which codes are half, and what they stand for, as above.
    """
    N, R = column.shape
    length = min(R, TRELLIS_SEGMENT)
    level_size = step / 2
    max_level = 2 * max_code - 2  # the chosen level is at most two away from the value
    values = (column / level_size).clamp_(-max_level, max_level)
    sequences = F.pad(values, (0, -R % length)).view(-1, length)
    levels = trellis_round(sequences).view(N, -1)[:, :R].float()
    return levels, levels * level_size


def quantize_columns(weights, upper, quantize_column):
    """The loop of GPTQ: quantizes column by column, later columns make up for the error so far.

    weights (N, C, R), overwritten, and upper (N, C, C) -> codes or levels (N, C, R) in float32.
    quantize_column: as nearest_codes, of a column alone. Later columns of a block are updated at
    once, all others at its end with one matmul. Nothing here waits for the device.
    """
    num_columns = weights.shape[1]
    codes = torch.empty_like(weights)
    for start in range(0, num_columns, GPTQ_BLOCK):
        stop = min(start + GPTQ_BLOCK, num_columns)
        errors = torch.empty_like(weights[:, start:stop])
        for j in range(start, stop):
            codes[:, j], rounded = quantize_column(weights[:, j])
            error = (weights[:, j] - rounded) / upper[:, j, j, None]
            errors[:, j - start] = error
            later = slice(j + 1, stop)
            weights[:, later].addcmul_(upper[:, j, later, None], error[:, None, :], value=-1.0)
        weights[:, stop:].baddbmm_(upper[:, start:stop, stop:].mT, errors, alpha=-1.0)
    return codes


class QuantizedMatrices(NamedTuple):
    """What gptq_quantize returns; no column_steps if all columns of a row share the row's step."""

    codes: Tensor  # (N, R, C): int8, int16 with column steps
    scale: Tensor  # (N, R): fp16 step sizes, with column steps int8 codes of to_log2_eighths
    column_steps: Tensor | None  # (N, C): int8 codes of to_log2_eighths


def gptq_quantize(w, hessian, bits, clip_sigmas, damp, names, octaves=None, trellis_round=None):
    """GPTQ (arXiv:2210.17323) of w (N, R, C) with Hessians (N, C, C) -> QuantizedMatrices.

    SDClip sets the step sizes of rows: clip_sigmas, a number or (N, R), standard deviations of the
    original row reach the largest code. With octaves (see column_step_grid) columns have steps of
    their own, and nothing is clipped, because codes may be wide (split_wide_codes); then
    trellis_round, an operation of Ops, may choose the codes. ModelError with the names of matrices
    whose Hessian is infinite or cannot be made positive definite.
    """
    infinite = [name for name, h in zip(names, hessian, strict=True) if h.isinf().any()]
    if infinite:  # the codes would be noise
        raise ModelError(f"GPTQ: the Hessian of {', '.join(infinite)} has infinite entries")
    max_code = 2 ** (bits - 1) - 1
    scale = (clip_sigmas * w.float().std(dim=2) / max_code).clamp(*FP16_RANGE).half()
    step = scale.float()
    column_steps = None
    weights, upper, order = order_columns(w, hessian, damp, names)
    if octaves is not None:
        scale, column_steps = column_step_grid(upper, scale, octaves)
        # dividing by the column steps leaves a step that all columns of a row share
        column_scale = from_log2_eighths(column_steps)
        weights = weights / column_scale[:, :, None]
        upper = upper / column_scale[:, None, :]
        step = from_log2_eighths(scale)
        max_code = MAX_WIDE_CODE
        column_steps = torch.empty_like(column_steps).scatter_(1, order, column_steps)

    def quantize_column(column):
        if trellis_round is None:
            return nearest_codes(column, step, max_code)
        return trellis_codes(column, step, max_code, trellis_round)

    codes = quantize_columns(weights, upper, quantize_column)
    codes = torch.empty_like(codes).scatter_(1, order[:, :, None].expand_as(codes), codes)
    codes = codes.mT.to(torch.int8 if octaves is None else torch.int16).contiguous()
    if trellis_round is not None:
        codes >>= 1
    return QuantizedMatrices(codes, scale, column_steps)


def split_wide_codes(codes, column_steps):
    """Codes int16 (R, C), column steps int8 (C,) -> artifact fields in which all codes are int8.

    The last norm's output has a few columns of 10 to 30 times the others' deviation. The steps of
    these columns of the embedding are so small that int8 would clip codes below four deviations
    of the weights (it cost 0.07 to 0.09 BPB, docs/LOG.md). Their codes are split: code = 2^shift
    coarse + fine, with the column's step 2^shift times as large in "column_steps", and the fields
    "fine_codes" (R, k), "fine_columns" (k,), "fine_shift" (k,).
    """
    is_wide = codes.abs().amax(dim=0) > 127
    columns = is_wide.nonzero()[:, 0]
    if not len(columns):
        return {"codes": codes.to(torch.int8), "column_steps": column_steps}
    wide = codes[:, columns]
    largest = wide.abs().amax(dim=0).float()
    needed_shift = (largest / 127).log2().ceil()
    ordinary_shift = (-column_steps[columns] / 8).round()  # the step becomes that of the row
    shift = torch.maximum(needed_shift, ordinary_shift).clamp(1, MAX_SHIFT).int()
    coarse = (wide / 2.0**shift).round().clamp(-127, 127).int()
    fine = wide.int() - (coarse << shift)
    coarse_codes = codes.clone()
    coarse_codes[:, columns] = coarse.to(codes.dtype)
    coarse_steps = column_steps.int()
    coarse_steps[columns] += 8 * shift
    return {
        "codes": coarse_codes.to(torch.int8),
        "column_steps": coarse_steps.to(torch.int8),
        "fine_codes": fine.to(torch.int8),
        "fine_columns": columns.to(torch.int16),
        "fine_shift": shift.to(torch.int8),
    }


def quantize_rows(x, low, high, max_level):
    """x (..., C) -> codes int8 (..., C) in [low, high], scale fp16 (...).

    The largest |x| of a row is max_level times its scale.
    """
    scale = (x.float().abs().amax(dim=-1) / max_level).clamp(*FP16_RANGE).half()
    codes = (x.float() / scale.float()[..., None]).round_().clamp_(low, high)
    return codes.to(torch.int8), scale


# --- all weights of a model


def share_matrices(matrices, world_size):
    """{name: (R, C)} -> names of each rank, loads balanced; the same on every rank."""
    cost = {name: w.shape[0] * w.shape[1] ** 2 for name, w in matrices.items()}
    by_cost = sorted(cost, key=lambda name: (-cost[name], name))
    return balance(by_cost, cost.get, world_size)


def quantize_matrices(names, weights, hessians, hp, trellis_round, row_gradients):
    """GPTQ of the named matrices -> {name: its fields}.

    Matrices with the same shape and settings are quantized as one batch.
    """
    batches = defaultdict(list)
    for name in names:
        role = quant_role(name)
        key = weights[name].shape, getattr(hp, role.bits), getattr(hp, role.clip_sigmas)
        batches[key].append(name)
    octaves = hp.gptq_column_octaves if hp.gptq_column_steps else None
    if octaves is None or not hp.gptq_trellis:
        trellis_round = None
    fields = {}
    for (_, bits, clip_sigmas), batch in batches.items():
        w = torch.stack([weights[name].float() for name in batch])
        h = torch.stack([hessians[name].float() for name in batch])
        damp = hp.gptq_damp
        # without column steps codes are clipped, and a finer step would clip more of them
        if row_gradients and octaves is not None:
            gradients = torch.stack([row_gradients[name] for name in batch])
            clip_sigmas = clip_sigmas * row_step_factors(w, gradients, hp)
        quantized = gptq_quantize(w, h, bits, clip_sigmas, damp, batch, octaves, trellis_round)
        for i, name in enumerate(batch):
            fields[name] = {"codes": quantized.codes[i], "scale": quantized.scale[i]}
            if octaves is not None:
                fields[name] |= split_wide_codes(quantized.codes[i], quantized.column_steps[i])
            if trellis_round is not None:
                fields[name]["trellis"] = torch.ones((), dtype=torch.int8)
    return fields


def quantize_small(name, w):
    """Fields, in its own shape, of a tensor without a role: int8 rows of attention gates, fp16."""
    if name.endswith("attn_gate"):
        codes, scale = quantize_rows(w, -127, 127, 127)
        return {"codes": codes, "scale": scale}
    return {"fp16": w.half()}


def check_quantizable(weights):
    """ModelError for weights that fp16 cannot store; the same on every rank."""
    for name, w in weights.items():
        if not w.half().isfinite().all():
            raise ModelError(
                f"{name} holds numbers that are not finite or beyond fp16: lower learning rates"
            )


def merge_dicts(dicts):
    """One dict with the items of all."""
    merged = {}
    for items in dicts:
        merged |= items
    return merged


@torch.no_grad()
def quantize_weights(
    weights, hessians, hp, dist, trellis_round=trellis_round_ref, row_gradients=None
):
    """Saved weights and Hessians (C, C), by name -> numpy arrays "name:field", on every rank.

    Fields: those of fields_fit. trellis_round is the model's operation for the trellis. With the
    row_gradients of collect_row_gradients rows have steps by importance. Each matrix is quantized
    by one rank, small tensors by rank 0. ModelError with the names of the tensors at fault, raised
    on all ranks.
    """
    check_quantizable(weights)
    matrices = {name: w for name, w in weights.items() if quant_role(name)}
    mine = share_matrices(matrices, dist.world_size)[dist.rank]
    fields = {}

    def quantize():
        fields.update(quantize_matrices(mine, weights, hessians, hp, trellis_round, row_gradients))

    fail_together(dist, [quantize], ModelError)
    if dist.rank == 0:
        for name in weights.keys() - matrices.keys():
            fields[name] = quantize_small(name, weights[name])
    arrays = {}
    for name, tensors in fields.items():
        arrays[name] = {field: tensor.cpu().numpy() for field, tensor in tensors.items()}
    arrays = merge_dicts(dist.all_gather_object(arrays))
    return {f"{name}:{field}": array for name in weights for field, array in arrays[name].items()}


# --- rebuilding the weights


def fields_fit(shapes):
    """Whether a weight can be made of fields of these shapes: an artifact may hold any."""
    if "fp16" in shapes:
        return len(shapes) == 1
    codes = shapes.get("codes", ())
    if len(codes) > 0 and shapes == {"codes": codes, "scale": codes[:-1]}:
        return True
    fine = shapes.get("fine_columns", (0,))
    wanted = {
        "codes": codes,
        "scale": codes[:1],
        "column_steps": codes[1:],
        "fine_codes": codes[:1] + fine,
        "fine_columns": fine,
        "fine_shift": fine,
        "trellis": (),
    }
    needed = {"scale", "column_steps"}
    if "fine_codes" in shapes:
        needed |= {"fine_columns", "fine_shift"}
    is_complete = needed <= shapes.keys() and len(codes) == 2 and len(fine) == 1
    return is_complete and shapes.items() <= wanted.items()


def table_steps(codes):
    """Sums of step codes, any float32 numbers -> step sizes, the same bits on every machine."""
    codes = np.nan_to_num(codes).clip(-256, 255)
    return EXP2_EIGHTHS[codes.astype(int)]


def join_wide_codes(name, fields):
    """The inverse of split_wide_codes: fields -> codes (R, C) and column steps (C,), float32."""
    codes = fields["codes"]
    column_steps = fields["column_steps"]
    if "fine_codes" not in fields:
        return codes, column_steps
    columns = fields["fine_columns"]
    shift = fields["fine_shift"]
    is_column = (np.diff(columns, prepend=-1) > 0) & (columns < codes.shape[1])
    if not (is_column & (shift >= 0) & (shift <= MAX_SHIFT)).all():  # nor if one is no number
        raise ArtifactError(f"{name}: fine codes do not fit the matrix {codes.shape}")
    columns = columns.astype(int)
    shift = shift.astype(int)
    codes = codes.copy()
    codes[:, columns] = codes[:, columns] * 2**shift + fields["fine_codes"]
    column_steps = column_steps.copy()
    column_steps[columns] -= 8 * shift
    return codes, column_steps


def dequantize_fields(name, fields):
    """Fields of a weight in float32 -> the weight in float32. ArtifactError if they do not fit."""
    shapes = {field: array.shape for field, array in fields.items()}
    if not fields_fit(shapes):
        raise ArtifactError(
            f"{name}: no weight can be made of the fields {shapes}; presets/published.py reads LQER"
        )
    if "fp16" in fields:
        return fields["fp16"]
    codes = fields["codes"]
    scale = fields["scale"][..., None]
    if "column_steps" in fields:
        codes, column_steps = join_wide_codes(name, fields)
        if "trellis" in fields:
            codes = trellis_levels(codes) / 2
        return codes * table_steps(scale + column_steps)
    return codes * scale


def dequantize_weights(arrays):
    """Arrays of quantize_weights -> saved weights by name, float32 on the CPU.

    The same bits on every machine: only elementwise float32 operations in a fixed order, as a
    matmul would leave the order of its sums to the BLAS. ArtifactError for arrays that do not fit.
    """
    fields = defaultdict(dict)
    for key, array in arrays.items():
        name, _, field = key.rpartition(":")
        fields[name][field] = array.astype(np.float32)
    weights = {}
    for name, tensors in fields.items():
        weights[name] = torch.from_numpy(dequantize_fields(name, tensors))
    return weights


# --- calibration and the check of the result


class HessianTap:
    """Adds up x^T x over tokens for the input x of every matrix, in float32.

    Passes of a looped layer add to the same sum.
    """

    splits_mlp = True

    def __init__(self, sums=None, layer=None):
        self.sums = {} if sums is None else sums
        self.layer = layer

    def at(self, slot, layer):
        """The tap of one slot; slots of a layer share their sums."""
        return HessianTap(self.sums, layer)

    def __call__(self, site, x, y, scale=None):
        if any(kind.site == site for kind in MATRICES):
            self.add((site, self.layer), x)
        return y

    def add(self, key, x):
        """Adds x^T x of inputs x (..., in) to the float32 sum of this key."""
        x = x.flatten(0, -2)
        if x.is_cuda and x.dtype == torch.bfloat16:  # tensor cores, which sum in float32
            gram = torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            gram = x.float().T @ x.float()
        self.sums[key] = self.sums[key] + gram if key in self.sums else gram

    def hessians(self):
        """{saved weight name: sum (in, in)}."""
        by_name = {}
        for (site, layer), gram in self.sums.items():
            names = [kind.saved_name.format(layer) for kind in MATRICES if kind.site == site]
            by_name |= dict.fromkeys(names or ["tok_emb.weight"], gram)
        return by_name


@torch.no_grad()
def collect_hessians(model, loader, hp, dist):
    """{saved weight name: Hessian (in, in) in float32}, means over rows of training data.

    GPTQ_CALIBRATION_BATCHES packed rows, the same for any world size, are shared out over ranks;
    the sums are all-reduced.
    """
    tap = HessianTap()
    mine = range(dist.rank, hp.gptq_calibration_batches, dist.world_size)
    for index in mine or [0]:  # a rank without a row of its own takes part in the sums with zeros
        following = index + dist.world_size
        row = loader.row(index, following if following in mine else None)
        hidden = model.forward_hidden(
            row.inputs, row.cu_seqlens, max_seqlen=hp.train_seq_len, looping=True, tap=tap
        )
        tap.add(("lm_head", 0), hidden)
    for gram in tap.sums.values():
        gram /= hp.gptq_calibration_batches
        dist.all_reduce(gram if mine else gram.zero_())
    return tap.hessians()


def collect_row_gradients(model, loader, hp, dist):
    """{saved weight name: (R,) mean squared gradient of each row, in float32}.

    Means over the columns, and over the first GRADIENT_ROWS calibration rows, which are shared out
    over ranks. The code is not compiled, like that of the Hessians.
    """
    parameters = {}
    for name, parameter in model.named_parameters():
        if name in BANKS or name in EMBEDDING_NAMES:
            parameters[name] = parameter
    squares = {name: torch.zeros_like(p[..., 0]) for name, p in parameters.items()}
    num_rows = min(GRADIENT_ROWS, hp.gptq_calibration_batches)
    for index in range(dist.rank, num_rows, dist.world_size):
        row = loader.row(index)
        losses = model(
            row.inputs, row.targets, row.cu_seqlens, looping=True, max_seqlen=hp.train_seq_len
        )
        gradients = torch.autograd.grad(losses.mean(), parameters.values())
        for total, gradient in zip(squares.values(), gradients, strict=True):
            total += gradient.square().mean(dim=-1) / num_rows
    for total in squares.values():
        dist.all_reduce(total)
    return unbank(model, squares)


@torch.no_grad()
def held_out_loss(model, loader, hp, dist):
    """Mean loss in nats per token on the held-out training rows, the same on every rank.

    None without held-out rows. The code is not compiled, like that of the Hessians: there is no
    graph for it, and compiling would take longer than the reserve.
    """
    if not loader.held_out_rows:
        return None
    total = torch.zeros((), device=dist.device, dtype=torch.float64)
    for index in range(dist.rank, loader.held_out_rows, dist.world_size):
        row = loader.held_out_row(index)
        hidden = model.forward_hidden(
            row.inputs, row.cu_seqlens, max_seqlen=hp.train_seq_len, looping=True
        )
        losses = losses_in_chunks(model.token_losses, hidden[0], row.targets)
        total += losses.sum(dtype=torch.float64)
    return dist.all_reduce(total).item() / (loader.held_out_rows * hp.micro_batch_tokens)


def plainer_quantizations(hp):
    """Settings to try in turn if quantization as set ruins the model.

    First one step for all columns of a row. Then also a damping as large as the mean of the
    Hessian's diagonal, which leaves little more than rounding to the nearest code.
    """
    row_steps = dataclasses.replace(hp, gptq_column_steps=False)
    damped = dataclasses.replace(row_steps, gptq_damp=max(1.0, hp.gptq_damp))
    return [plainer for plainer in (row_steps, damped) if plainer != hp]


class QuantizationCheck:
    """Compares the losses of the quantized and the fp32 model on the held-out training rows.

    The calibration error cannot reveal a bad quantization, because it is measured on the rows that
    the Hessians were made from.
    """

    def __init__(self, model, loader, hp, dist, log):
        self.model = model
        self.loader = loader
        self.hp = hp
        self.dist = dist
        self.log = log
        self.weights = {name: tensor.detach().clone() for name, tensor in unbank(model).items()}
        self.tried = []  # for RESULT: settings and gap of each quantization
        self.kept = None  # the item of `tried` that is written
        with log.stage("quant_check"):
            self.fp32_loss = held_out_loss(model, loader, hp, dist)

    def gap(self, arrays, hp):
        """Loss in nats per token that the arrays add, inf if it is not finite; notes it in `tried`.

        The model gets its fp32 weights back.
        """
        with self.log.stage("quant_check"):
            rebank(self.model, dequantize_weights(arrays))
            loss = held_out_loss(self.model, self.loader, self.hp, self.dist)
            rebank(self.model, self.weights)
        gap = loss - self.fp32_loss
        is_finite = math.isfinite(gap)
        changed = []
        for name, value in dataclasses.asdict(hp).items():
            if value != getattr(self.hp, name):
                changed.append(f"{name.upper()}={value:g}")
        settings = " ".join(changed) or "as set"
        self.tried.append({"settings": settings, "gap": round(gap, 6) if is_finite else None})
        self.log(f"quant_check fp32_loss:{self.fp32_loss:.6f} gap:{gap:.6f} settings:{settings}")
        return gap if is_finite else math.inf

    def choose(self, quantize, time_is_left):
        """Quantizes as set, then in plainer ways until the gap is at most QUANT_GAP_MAX.

        quantize(hp) -> arrays. Stops early if not time_is_left().
        Returns the settings and arrays with the smallest gap.
        """
        if self.fp32_loss is None:
            return self.hp, quantize(self.hp)
        gaps = []
        found = []
        for hp in (self.hp, *plainer_quantizations(self.hp)):
            arrays = quantize(hp)
            gap = self.gap(arrays, hp)
            gaps.append(gap)
            found.append((hp, arrays))
            if gap <= self.hp.quant_gap_max:
                break
            self.log(
                f"note: quantization adds {gap:.4f} nats a token, more than"
                f" QUANT_GAP_MAX={self.hp.quant_gap_max}"
            )
            if not time_is_left():
                self.log("note: no seconds are left for a plainer quantization")
                break
        best = gaps.index(min(gaps))
        self.kept = self.tried[best]
        return found[best]

    def summary(self):
        """For RESULT: the loss of the fp32 model, the quantization that was kept, and all tried."""
        if self.fp32_loss is None:
            return None
        return {
            "rows": self.loader.held_out_rows,
            "fp32_loss": round(self.fp32_loss, 6),
            **self.kept,
            "tried": self.tried,
        }


# ---- ARTIFACT ------------------------------------------------------------------------------------
# The file: magic, number of the compressor, stored and raw size of the header, digest of these and
# of the stored header; the header, JSON [[[name, dtype, shape], ...], [[size, digest of the stored
# bytes, digest of the raw bytes], ...]]; the sections, one after another. The list of arrays says
# what the sections hold (plan_sections). Thanks to the two digests neither a damaged file nor a
# decoder of another version can give wrong weights. The two highest bits of the compressor's number
# say what tokens the model was trained on: 0 not said, 1 as stored, 2 markers fused.
MAGIC = b"GLF2"  # GLF1 had another coder
PREFIX = struct.Struct("<4sBII")
DIGEST_BYTES = 8
MAX_HEADER_BYTES = 2**20
# Of all arrays. Nearly all are codes of a byte: at a bit a code, fewer fill a file up to the cap.
# A hostile file can be far smaller, and rebuilding takes about ten times as much memory.
MAX_RAW_BYTES = 2**27
MAX_DIMENSIONS = 8
# a list: hostile dtypes need not be hashable
ARRAY_DTYPES = (
    "bool float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
)
CODEC_THREADS = min(8, os.cpu_count() or 1)  # at most 8: lrzip takes up to a gigabyte in each


def digest(data):
    """Start of SHA-256: finds damage, does not authenticate."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


# --- entropy: the codec of int8 codes, rANS (range asymmetric numeral systems, arXiv:1311.2540).
# In each context every symbol owns an interval of [0, 2^16) whose length is its frequency. The
# coder is an integer, its state. Encoding a symbol with interval [start, start + f) turns state x
# into
#     x // f * 2^16 + x % f + start,
# which adds log2(2^16 / f) bits, the symbol's information. Decoding inverts this: the low 16 bits
# of the state lie in the symbol's interval. States stay in [2^31, 2^63): before a state would grow
# beyond, encoding moves its low 32 bits to the stream as a word; when a state falls below, decoding
# takes a word back. The symbol that is encoded last is decoded first, so the encoder collects all
# intervals and encodes them backwards. RANS_STATES independent states take turns, so that one numpy
# call codes that many symbols. All arithmetic is on integers, so it is the same on every machine.
# One model, code_matrix, drives both directions: it asks the encoder or decoder for symbols.
RANS_STATES = 512  # each costs 6 bytes of stream
SYMBOLS = np.arange(-128, 128)
ESCAPE = -128  # announces a symbol that is too rare for its context
# Variances of codes, the contexts. cumprod is exact on every machine, powers are not.
VARIANCES = 0.04 * np.cumprod(np.full(75, 1.15))
ESCAPED_CONTEXT = len(VARIANCES)  # of symbols after an ESCAPE, all equally frequent at first
ROW_CONTEXT = ESCAPED_CONTEXT + 1  # of the variances of rows
# A square is divided by the variance of its row in units of 2^-24: integers have exact sums.
ONE_RATIO = 2**24
ROW_WEIGHTS = np.rint(ONE_RATIO / VARIANCES).astype(np.int64)
MAX_SQUARE = 20  # in units of the context's variance; codes with a larger square are escaped


class Intervals(NamedTuple):
    """Intervals [start, start + frequency) of [0, 2^16), one for each entry of flat arrays."""

    starts: np.ndarray
    frequencies: np.ndarray

    def take(self, index):
        """The intervals at these positions."""
        return Intervals(self.starts.take(index), self.frequencies.take(index))


def interval_table(counts):
    """Counts (contexts, 256) -> Intervals, at index 256 * context + symbol + 128.

    The frequencies of a context add up to 2^16; symbols with a positive count get at least 1.
    """
    total = counts.sum(1, keepdims=True)
    frequencies = np.maximum((counts * 2**16 + total // 2) // total, counts > 0)
    largest = np.arange(len(counts)), frequencies.argmax(1)
    frequencies[largest] += 2**16 - frequencies.sum(1)
    starts = frequencies.cumsum(1) - frequencies
    return Intervals(starts.ravel(), frequencies.ravel())


class SymbolEncoder:
    """Collects the intervals of symbols, from which finish() makes the stream."""

    def __init__(self):
        self.chunks = []

    def use(self, counts):
        """From now on symbols are coded with these counts (contexts, 256)."""
        self.table = interval_table(counts)

    def code(self, contexts, symbols):
        """Contexts (n,) and symbols (n,) -> the symbols."""
        intervals = self.table.take(contexts * 256 + symbols + 128)
        self.chunks.append(
            Intervals(intervals.starts.astype(np.uint16), intervals.frequencies.astype(np.uint16))
        )
        return symbols

    def finish(self):
        """The stream: the final states, then the words in the order in which they are decoded."""
        states = np.full(RANS_STATES, 2**31)
        words = []
        for chunk in reversed(self.chunks):
            for begin in reversed(range(0, len(chunk.starts), RANS_STATES)):
                turn = slice(begin, begin + RANS_STATES)
                f = chunk.frequencies[turn].astype(np.int64)
                x = states[: len(f)]
                full = (x >> 47 >= f).nonzero()[0]
                words.append(x[full].astype("<u4"))
                x[full] >>= 32
                x += x // f * (2**16 - f) + chunk.starts[turn]
        return b"".join([states.astype("<i8"), *reversed(words)])


class SymbolDecoder:
    """The inverse of SymbolEncoder, with the same methods: symbols come out of the stream.

    Raises ArtifactError where the stream ends too early; entropy_decompress sees to its length.
    """

    def __init__(self, stream):
        size = 8 * RANS_STATES
        end = len(stream) // 4 * 4
        self.states = np.frombuffer(stream[:size].ljust(size, b"\0"), "<i8").astype(np.int64)
        self.words = np.frombuffer(stream[size:end], "<u4").astype(np.int64)
        self.words_used = 0

    def use(self, counts):
        """From now on symbols are coded with these counts (contexts, 256)."""
        self.table = interval_table(counts)
        # for each context and point of [0, 2^16), the index of the interval that it lies in
        self.index_at = np.arange(counts.size, dtype=np.int16).repeat(self.table.frequencies)

    def code(self, contexts, _):
        """Contexts (n,) -> symbols (n,)."""
        index = np.empty(contexts.size, np.int64)
        for begin in range(0, contexts.size, RANS_STATES):
            turn = slice(begin, begin + RANS_STATES)
            x = self.states[: contexts.size - begin]
            points = x & 65535
            index[turn] = found = self.index_at.take((contexts[turn] << 16) + points)
            intervals = self.table.take(found)
            x >>= 16
            x *= intervals.frequencies
            x += points - intervals.starts
            low = (x < 2**31).nonzero()[0]
            used = self.words_used + len(low)
            if used > len(self.words):
                raise ArtifactError("artifact: entropy data is cut off")
            x[low] = x[low] << 32 | self.words[self.words_used : used]
            self.words_used = used
        return (index & 255) - 128


def initial_counts():
    """Counts int64 (contexts, 256) before any code, 64 for each symbol that is taken as seen.

    Nearly Gaussian, without symbols beyond 4.5 deviations, which are escaped. Differences of rows
    are small more often than not: without that, rows of the first matrix would cost a byte each.
    """
    squares = SYMBOLS**2
    tails = 1 + squares / (29 * VARIANCES[:, None])
    for _ in range(4):  # to the 16th power, exactly
        tails *= tails
    is_frequent = squares <= MAX_SQUARE * VARIANCES[:, None]
    counts = np.where(is_frequent, 1 + 32_000 / tails, 0)
    counts[:, ESCAPE + 128] = 3
    return np.vstack([counts, np.ones(256), 1 + 1000 / (1 + squares)]).astype(np.int64)


def column_predictor(gram, rows):
    """gram (C, C), the sum of x x^T over rows x -> P (C, C): x_j is about P[j, :j] x[:j].

    In multiples of 2^-12, so that sums of products with codes are exact. Elimination by elementwise
    operations in a fixed order, as the last bits of LAPACK differ between machines.
    """
    size = len(gram)
    ridge = 1 + 800 / rows * np.trace(gram) / size  # keeps pivots positive, even if all codes are 0
    identity = np.eye(size)
    work = np.hstack([gram + ridge * identity, identity]).astype(np.float32)
    for j in range(size):
        part = work[j + 1 :, j : size + j + 1]
        part -= part[:, :1] / work[j, j] * work[j, j : size + j + 1]
    eliminated = work[:, size:].astype(np.float64)
    return np.rint(-4096 * np.tril(eliminated, -1)) / 4096


class MatrixModel:
    """Codes one matrix; the context of a code is the variance of its row times its column's ratio.

    Rows differ by their steps (GPTQ_ROW_POWER), columns by what trellis and GPTQ made of them. The
    variance of a row goes ahead of its codes, in a context of its own; the ratio of a column to the
    rows is that of the rows so far.
    """

    def __init__(self, coder, counts, columns):
        self.coder = coder
        self.counts = counts  # shared by all matrices, so that a matrix starts with learnt counts
        # context of the variance of a row: the mean of the last block, at first for 7 to 8
        self.usual = 37
        self.sum_ratios = np.full(columns, 16 * ONE_RATIO)
        self.rows_seen = 16

    def code_rows(self, block):
        """Codes the variances of rows -> contexts of rows (R, 1) and of their codes (R, C).

        Variances come from mean magnitudes, as a few large codes would raise a mean square.
        """
        variances = math.pi / 2 * abs(block.astype(float)).mean(1) ** 2
        differences = np.searchsorted(VARIANCES, variances) - self.usual
        coded = self.code(np.full(len(block), ROW_CONTEXT), differences)
        row_contexts = (self.usual + coded[:, None]).clip(0, len(VARIANCES) - 1)
        self.usual = round(row_contexts.mean())
        ratios = self.sum_ratios / self.rows_seen / ONE_RATIO
        # of columns, to be added to the contexts of rows: 0 for a ratio of 1, -30 at least
        shifts = np.searchsorted(VARIANCES / VARIANCES[30], ratios) - 30
        return row_contexts, (row_contexts + shifts).clip(0, len(VARIANCES) - 1)

    def add(self, residual, row_contexts):
        """Adds residuals (R, C), which both sides know by now, to the columns' ratios."""
        self.sum_ratios += (residual * residual * ROW_WEIGHTS[row_contexts]).sum(0)
        self.rows_seen += len(residual)

    def code(self, contexts, symbols):
        """Codes symbols (n,), which make those to come cheaper -> the symbols."""
        coded = self.coder.code(contexts, symbols)
        np.add.at(self.counts.ravel(), contexts * 256 + coded + 128, 64)
        return coded

    def code_block(self, block, contexts):
        """Codes integers in these contexts (an array of their shape), modulo 256.

        Returns them as int64; when decoding, those that come out of the stream.
        """
        contexts = contexts.ravel()
        symbols = block.astype(np.int8).astype(np.int64).ravel()
        is_frequent = symbols**2 <= MAX_SQUARE * VARIANCES[contexts]
        coded = self.code(contexts, np.where(is_frequent, symbols, ESCAPE))
        escaped = coded == ESCAPE
        coded[escaped] = self.coder.code(np.full(escaped.sum(), ESCAPED_CONTEXT), symbols[escaped])
        return coded.reshape(block.shape)

    def code_plain_block(self, block):
        """Codes the block (R, C) itself, which is its own residual."""
        row_contexts, contexts = self.code_rows(block)
        block[:] = residual = self.code_block(block, contexts)
        self.add(residual, row_contexts)

    def code_predicted_block(self, before, block):
        """Codes each column of the block minus its linear prediction from the columns before it.

        The predictor is fitted to the rows `before`. Returns whether it pays: whether the residuals
        have a smaller sum of squares than the codes.
        """
        before = before.astype(np.float64)
        predictor = column_predictor(before.T @ before, len(before))
        # half the weight for the rows so far, whose predictions were worse
        self.sum_ratios //= 2
        self.rows_seen //= 2
        row_contexts, contexts = self.code_rows(block)
        values = np.empty(block.shape, np.float64, "F")  # a column is contiguous
        residual = np.empty(block.shape, np.int64, "F")
        for j in range(block.shape[1]):
            group = j - j % 16
            if j == group:  # one matmul for 16 columns
                means = values[:, :j] @ predictor[j : j + 16, :j].T
            mean = means[:, j - group] + values[:, group:j] @ predictor[j, group:j]
            mean = np.rint(mean).astype(np.int64)
            residual[:, j] = coded = self.code_block(block[:, j] - mean, contexts[:, j])
            block[:, j] = coded + mean
            values[:, j] = block[:, j]
        self.add(residual, row_contexts)
        return (residual * residual).sum() < (values * values).sum()


def code_matrix(coder, counts, codes):
    """Sends codes (R, C) int8 through a coder, which reads (SymbolEncoder) or fills them.

    Blocks of rows are coded in turn, each with the columns' ratios in the rows before it. In a
    matrix with far more rows than columns (the embedding), columns are predicted from those before
    them as long as that pays.
    """
    rows, columns = codes.shape
    model = MatrixModel(coder, counts, columns)
    use_prediction = rows >= 8 * columns
    start = 0
    while start < rows and columns:
        if use_prediction and start >= 128:
            block = codes[start : start + start // 2]
            use_prediction = model.code_predicted_block(codes[:start], block)
        else:
            size = min(8 + start // 4, 2**20 // columns)
            block = codes[start : start + max(1, size)]
            model.code_plain_block(block)
        start += len(block)


def code_matrices(coder, raw, shapes):
    """Sends bytes of int8 matrices, each stored transposed, through a coder -> bytes as coded."""
    codes = np.array(np.frombuffer(raw, np.int8))
    counts = initial_counts()
    start = 0
    for shape in shapes:
        end = start + math.prod(shape)
        coder.use(counts)
        code_matrix(coder, counts, codes[start:end].reshape(shape).T)
        start = end
    return codes.tobytes()


def entropy_compress(raw, shapes):
    """Bytes of int8 matrices of these shapes, each transposed -> their stream."""
    encoder = SymbolEncoder()
    code_matrices(encoder, raw, shapes)
    return encoder.finish()


def entropy_decompress(data, raw_size, shapes):
    """The inverse of entropy_compress; no bytes if the stream is not exactly used up."""
    decoder = SymbolDecoder(data)
    raw = code_matrices(decoder, bytes(raw_size), shapes)
    return raw if 8 * RANS_STATES + 4 * decoder.words_used == len(data) else b""


# --- codecs and compressors


def brotli_compress(raw, shapes=()):
    """bytes -> bytes; the shapes are for other codecs."""
    return brotli.compress(raw, quality=11, lgwin=24)


def brotli_decompress(data, raw_size, shapes=()):
    """Stops soon after raw_size bytes: a few bytes of brotli can claim to expand to gigabytes.

    brotli has no portable limit of its output, but small pieces of input give little at a time.
    """
    decoder = brotli.Decompressor()
    raw = bytearray()
    with contextlib.suppress(brotli.error):
        for start in range(0, len(data), 64):
            raw += decoder.process(data[start : start + 64])
            if len(raw) > raw_size:
                break
        if decoder.is_finished():
            return bytes(raw)
    return b""


ENCODERS = {  # (raw bytes, shapes of their arrays) -> stream
    "brotli": brotli_compress,
    "entropy": entropy_compress,
}
DECODERS = {  # (stream, raw size, shapes) -> raw bytes; another number of bytes means a bad stream
    "brotli": brotli_decompress,
    "entropy": entropy_decompress,
}


class Compressor(NamedTuple):
    """A value of COMPRESSOR."""

    number: int  # in the file
    codec: str  # of the header, and of all sections but codes
    codes_codec: str | None = None  # of matrices of int8 codes; None: they have no own section


COMPRESSORS = {  # presets/published.py adds numbers 1 and 2
    "brotli": Compressor(0, "brotli"),
    "entropy": Compressor(3, "brotli", "entropy"),
}


def expand(codec, stored, raw_size, shapes=()):
    """Stored bytes -> exactly raw_size bytes, or ArtifactError."""
    raw = DECODERS[codec](stored, raw_size, shapes) if raw_size else b""
    if len(raw) != raw_size:
        raise ArtifactError(
            f"artifact: {codec} data does not expand to the size that the header says"
        )
    return raw


# --- the file


class ArraySpec(NamedTuple):
    """Name, dtype and shape of an array as it is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self):
        """Size of the array without compression."""
        return self.item_size * math.prod(self.shape)

    @property
    def item_size(self):
        """Bytes of one element."""
        return np.dtype(self.dtype).itemsize

    @property
    def stored_dtype(self):
        """The numpy dtype in the file, little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")


def is_valid_spec(spec):
    """Whether an artifact can hold such an array; the fields may be any values of JSON."""
    if type(spec.name) is not str or spec.dtype not in ARRAY_DTYPES:
        return False
    if len(spec.shape) > MAX_DIMENSIONS:
        return False
    if not all(type(n) is int and n >= 0 for n in spec.shape):
        return False
    # max: the other lengths of an empty array are limited, too
    return math.prod(max(n, 1) for n in spec.shape) <= MAX_RAW_BYTES


def check_specs(specs):
    """ArtifactError for ArraySpecs of arrays that no artifact holds: a header may be hostile."""
    for spec in specs:
        if not is_valid_spec(spec):
            raise ArtifactError(f"{spec.name}: an artifact cannot hold {spec.dtype} {spec.shape}")
    if len({spec.name for spec in specs}) < len(specs) or total_bytes(specs) > MAX_RAW_BYTES:
        raise ArtifactError(
            f"two arrays have one name, or all take more than {MAX_RAW_BYTES} bytes"
        )


def total_bytes(specs):
    """Bytes of all arrays, not compressed."""
    return sum(spec.num_bytes for spec in specs)


class Section(NamedTuple):
    """A part of the file that is compressed by itself."""

    kind: str  # codes, which are transposed, or rest
    codec: str
    specs: list[ArraySpec]  # of its arrays, as they are stored


def codes_group(spec):
    """Group of the matrix whose codes this array holds; None if it is to be stored as it is."""
    name, _, field = spec.name.rpartition(":")
    role = quant_role(name)
    is_codes = role and field == "codes" and spec.dtype == "int8"
    is_matrix = is_codes and len(spec.shape) == 2 and max(spec.shape) <= 2**16
    return role.group if is_matrix else None


def group_codes(specs):
    """{group: specs of its codes, transposed}, specs of other arrays."""
    groups = {role.group: [] for role in QUANT_TABLE.values()}
    others = []
    for spec in specs:
        group = codes_group(spec)
        if group is None:
            others.append(spec)
        else:
            groups[group].append(spec._replace(shape=spec.shape[::-1]))
    return groups, others


def plan_sections(specs, compressor):
    """ArraySpecs -> Sections; packing and unpacking both follow this plan."""
    codec = COMPRESSORS[compressor].codec
    codes_codec = COMPRESSORS[compressor].codes_codec
    if codes_codec is None:
        return [Section("rest", codec, specs)]
    groups, others = group_codes(specs)
    codes = [spec for group in groups.values() for spec in group]
    return [Section("codes", codes_codec, codes), Section("rest", codec, others)]


def section_sources(arrays, plan):
    """Arrays by name -> {kind of section: {name: array as it is stored there}}."""
    return {"rest": arrays, "codes": {name: array.T for name, array in arrays.items()}}


def join_sections(sources):
    """The inverse of section_sources; there, an array is only in the section that holds it."""
    return sources["rest"] | {name: codes.T for name, codes in sources["codes"].items()}


def by_item_size(specs):
    """Specs -> [(item size, specs of that size)]: the layout inside a section."""
    return [(size, [spec for spec in specs if spec.item_size == size]) for size in (1, 2, 4, 8)]


def join_arrays(arrays, specs):
    """Arrays by name -> bytes, little endian.

    Within each item size all lowest bytes come first, then all second ones and so on (byte
    shuffle), as bytes of the same significance compress better together.
    """
    planes = []
    for size, group in by_item_size(specs):
        stored = [arrays[s.name].astype(s.stored_dtype, copy=False).tobytes() for s in group]
        items = np.frombuffer(b"".join(stored), np.uint8).reshape(-1, size)
        planes.append(items.T.tobytes())
    return b"".join(planes)


def split_arrays(raw, specs):
    """The inverse of join_arrays; the arrays are read-only and little endian."""
    arrays = {}
    source = io.BytesIO(raw)
    for size, group in by_item_size(specs):
        planes = np.frombuffer(source.read(total_bytes(group)), np.uint8).reshape(size, -1)
        items = io.BytesIO(planes.T.tobytes())
        for spec in group:
            flat = np.frombuffer(items.read(spec.num_bytes), spec.stored_dtype)
            arrays[spec.name] = flat.reshape(spec.shape)
    return arrays


class SectionRecord(NamedTuple):
    """What the header says about the bytes of a section; the digests are hexadecimal."""

    size: int
    stored_digest: str
    raw_digest: str


def pack_weights(arrays, compressor, trained_on=0):
    """Numpy arrays by name -> artifact bytes. ArtifactError for arrays that cannot be packed.

    trained_on: 1 + hp.fuses_markers, which says what tokens the model knows; 0 leaves it unsaid.
    """
    specs = [ArraySpec(name, array.dtype.name, array.shape) for name, array in arrays.items()]
    check_specs(specs)
    plan = plan_sections(specs, compressor)
    sources = section_sources(arrays, plan)

    def encode(section):
        raw = join_arrays(sources[section.kind], section.specs)
        shapes = [spec.shape for spec in section.specs]
        stored = ENCODERS[section.codec](raw, shapes) if raw else b""
        return stored, SectionRecord(len(stored), digest(stored).hex(), digest(raw).hex())

    with ThreadPoolExecutor(CODEC_THREADS) as pool:
        encoded = list(pool.map(encode, plan))
    records = [record for _, record in encoded]
    header = json.dumps([specs, records], separators=(",", ":")).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise ArtifactError(
            f"the names and shapes of {len(arrays)} arrays do not fit an artifact's header"
        )
    number = COMPRESSORS[compressor].number + 64 * trained_on
    stored = ENCODERS[COMPRESSORS[compressor].codec](header)
    prefix = PREFIX.pack(MAGIC, number, len(stored), len(header))
    return b"".join([prefix, digest(prefix + stored), stored, *(data for data, _ in encoded)])


class Header(NamedTuple):
    """What an artifact says about itself, all sizes checked."""

    specs: list[ArraySpec]
    plan: list[Section]
    records: list[SectionRecord]
    start: int  # of the first section
    trained_on: int  # see pack_weights


def read_header(blob):
    """Artifact bytes -> Header. ArtifactError if they are damaged or hostile."""
    start = PREFIX.size + DIGEST_BYTES
    prefix = blob[: PREFIX.size].ljust(PREFIX.size, b"\0")
    magic, number, *sizes = PREFIX.unpack(prefix)
    stored_size, raw_size = sizes  # of the header
    trained_on = number // 64
    number %= 64
    stored = blob[start : start + stored_size]
    is_intact = magic == MAGIC and digest(prefix + stored) == blob[PREFIX.size : start]
    names = {compressor.number: name for name, compressor in COMPRESSORS.items()}
    if not is_intact or number not in names or raw_size > MAX_HEADER_BYTES:
        raise ArtifactError(
            "artifact: not a file of this version, or its header is damaged or cut off"
        )
    compressor = names[number]
    raw = expand(COMPRESSORS[compressor].codec, stored, raw_size)
    try:
        arrays, sections = json.loads(raw)
        specs = [ArraySpec(name, dtype, tuple(shape)) for name, dtype, shape in arrays]
        records = [SectionRecord(*section) for section in sections]
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"artifact: the header is wrong: {error}") from error
    check_specs(specs)
    plan = plan_sections(specs, compressor)
    start += stored_size
    is_sized = all(type(record.size) is int and record.size >= 0 for record in records)
    is_sized = is_sized and start + sum(record.size for record in records) == len(blob)
    if not is_sized or len(records) != len(plan):
        raise ArtifactError(
            "artifact: its sections are not those of its arrays, or not as long as the file"
        )
    return Header(specs, plan, records, start, trained_on)


def unpack_section(stored, section, record):
    """Stored bytes -> {name: array as stored}. ArtifactError if a digest differs."""
    is_intact = digest(stored).hex() == record.stored_digest
    if is_intact:
        shapes = [spec.shape for spec in section.specs]
        raw = expand(section.codec, stored, total_bytes(section.specs), shapes)
        is_intact = digest(raw).hex() == record.raw_digest
    if not is_intact:
        raise ArtifactError(f"artifact: a section of {section.codec} data is damaged")
    return split_arrays(raw, section.specs)


def unpack_weights(blob):
    """Artifact bytes -> the packed arrays, bit for bit and in their order.

    ArtifactError if pack_weights did not write these bytes.
    """
    header = read_header(blob)
    ends = np.cumsum([header.start] + [record.size for record in header.records]).tolist()

    def decode(section, record, end):
        return unpack_section(blob[end - record.size : end], section, record)

    sources = defaultdict(dict)
    with ThreadPoolExecutor(CODEC_THREADS) as pool:
        decoded = pool.map(decode, header.plan, header.records, ends[1:])
        for section, arrays in zip(header.plan, decoded, strict=True):
            sources[section.kind] |= arrays
    unpacked = join_sections(sources)
    return {
        spec.name: np.array(unpacked[spec.name], spec.dtype, order="C") for spec in header.specs
    }


# ---- EVALUATION ----------------------------------------------------------------------------------


def bits_per_byte(nats, num_bytes):
    """Total nats of a text of num_bytes bytes -> bits per byte."""
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


def document_windows(starts, ends, length):
    """Input spans of documents, cut into windows of at most this length -> (n, 2) starts, ends."""
    start = cut_pieces(starts, ends, length)
    end = np.repeat(ends, -(-(ends - starts) // length))
    return np.stack([start, np.minimum(start + length, end)], axis=1)


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

    def __init__(self, validation, row_tokens, max_window, hp, device):
        self.row_tokens = max(row_tokens, max_window)
        self.max_window = max_window
        # windows of full length in a row, or segments of its padding
        full_windows = -(-self.row_tokens // max_window)
        self.max_segments = max(hp.row_segments, 2 * full_windows + 8)
        self.device = device
        self.end = len(validation.tokens) - 1
        self.tokens = torch.from_numpy(validation.tokens).to(device)
        self.bytes = torch.from_numpy(validation.bytes).to(device)

    def rows(self, windows):
        """(n, 2) windows -> list of (first, last) window numbers of each row."""
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
        start, end = windows[:, :2].T
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
        scored[:filled] = True
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
        """Array -> tensor on the device."""
        return torch.from_numpy(array).to(self.device)


class Evaluator:
    """BPB of a model.

    Windows are packed into rows, rows are shared out over the ranks, every target is scored once.
    """

    def __init__(self, model, validation, hp, dist):
        self.model = model
        self.validation = validation
        self.hp = hp
        self.dist = dist
        row_tokens = hp.micro_batch_tokens
        self.packer = WindowPacker(validation, row_tokens, hp.eval_seq_len, hp, dist.device)
        self.token_losses = compiled(model.token_losses, hp, dist)
        self.compiled_parts = compile_parts(model, hp, dist)

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
        return losses_in_chunks(self.token_losses, hidden[0], row.targets)

    @torch.no_grad()
    def add_losses(self, windows, score, first_row=0, every=1):
        """Adds the losses of windows to a score, for one row in `every` from first_row on."""
        for first, last in self.packer.rows(windows)[first_row::every]:
            row = self.packer.build(windows[first:last])
            score.add(self.row_losses(row), row.scored, row.target_bytes)

    def evaluate_bpb(self):
        """Scores all validation documents -> {loss, bpb, tokens, bytes}."""
        stream = self.validation
        windows = document_windows(stream.starts, stream.ends, self.hp.eval_seq_len)
        score = Score(self.dist.device)
        self.add_losses(windows, score, self.dist.rank, self.dist.world_size)
        return score.total(self.dist, stream.targets_of(np.arange(len(stream.starts))))


# ---- TEST-TIME TRAINING --------------------------------------------------------------------------
# Score first: the loss of a chunk is added to the score before anything trains on the chunk.
#
# The plan is fixed before the first step and depends on lengths alone: documents, longest first, go
# to phases, lanes and queues. A queue is a sequence of documents on one rank; a document inherits
# the adapters' A from the one before it in its queue, and nothing else. Base weights change between
# phases only, on documents already scored. Chunks of many queues run together in steps of few
# static shapes: which queues share a step changes rounding and nothing else.


# --- plan and schedule


def documents_to_score(validation, hp):
    """Numbers of the documents to score: all, or TTT_MAX_DOCS of evenly spread lengths.

    Raises DataError where they hold no byte, as there is no BPB then.
    """
    lengths = validation.ends - validation.starts
    order = np.argsort(lengths, kind="stable")
    count = len(order)
    wanted = min(hp.ttt_max_docs or count, count)
    quantiles = (2 * np.arange(wanted) + 1) * count // (2 * wanted)
    documents = np.sort(order[quantiles])
    if not validation.targets_of(documents)[1]:
        raise DataError(f"TTT_MAX_DOCS={hp.ttt_max_docs}: these validation documents hold no byte")
    return documents


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
    # the setting is meant for the contest's 50,000 documents
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


def padding_row(scratch):
    """A StepRow that scores nothing and learns nothing."""
    return StepRow(scratch, scratch, 0, 0, 0, 1)


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
        # Up to 18 shapes, each a graph to capture: windows from a 16th of the context to all of it,
        # for all rows of a lane, a fourth or a 16th of them
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
        """Chunks of a queue that are in no step yet."""
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
        shapes = [shape for shape in self.costs if self.ready[shape[0]]]
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
        table = [padding_row(self.scratch_row)] * (rows - len(taken))
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


# --- adapters

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
        """All matrices (B, in, out) of the slot: first A, then B."""
        return [*(matrix for _, matrix in self.a), *self.b.values()]

    def __call__(self, site, x, y, scale=None):
        sites = FUSED_SITES.get(site, (site,))
        adapted = [name for name in sites if name in self.b]
        if not adapted:
            return y
        for readers, a in self.a:
            if readers[0] in adapted:
                pieces = torch.bmm(x, a).chunk(len(readers), -1)
                self.x_a.update(zip(readers, pieces, strict=True))
        outputs = []
        for name in sites:
            if name in self.b:
                b = self.b[name]
                if scale is not None:
                    # not the activations: dL/dy is then the gradient of every matmul
                    b = b * scale
                outputs.append(torch.bmm(self.x_a.pop(name), b))
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
        self.rank = R
        self.num_slots = num_slots
        self.widths = {"q": D, "k": hp.kv_dim, "v": hp.kv_dim, "attn_out": D, "mlp_out": D}
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
        self.sizes = (D * head_rank, a_size, b_size, head_rank * hp.vocab_size)
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
            of_slot = pieces[slot * len(shapes) : (slot + 1) * len(shapes)]
            slots.append([t.unflatten(1, shape) for t, shape in zip(of_slot, shapes, strict=True)])
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
        """scaled_parts -> tap for GPT: a SlotLoRA for each slot, and `head`, in float32."""
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
        return SimpleNamespace(at=lambda slot, layer: slots[slot], head=head)

    @torch.no_grad()
    def step(self, gradients, source, target, number):
        """One AdamW step from state rows `source` (B,) into rows `target` (B,).

        gradients: of scaled_parts; number (B,): which step of its document this is, from 1.
        """
        hp = self.hp
        correction = 1 - hp.ttt_beta2 ** number.double()
        correction = correction.to(self.values.dtype)
        b_lr = hp.ttt_lora_lr
        a_lr = b_lr * hp.ttt_lora_a_lr_ratio
        lrs = (a_lr, a_lr, b_lr, b_lr)
        of_parts = zip(gradients, self.layout.slices(), self.scales, lrs, strict=True)
        for gradient, columns, scale, lr in of_parts:
            values = self.values[:, columns]
            squares = self.squares[:, columns]
            rates = (lr, hp.ttt_weight_decay, hp.ttt_beta2)
            self.update(values, squares, gradient, source, target, correction, scale, rates)


# --- stale context


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
        """q (B, T, H, E), new k and v (B, T, K, E) -> (B, T, H, E), causal."""
        # detached, or backward would add zeros for them
        self.new_kv.extend((k.detach(), v.detach()))
        older_k, older_v = self.cache
        all_k = older_k[self.key_rows].index_copy(0, self.new_key_rows, k.flatten(0, 1))[None]
        all_v = older_v[self.key_rows].index_copy(0, self.new_key_rows, v.flatten(0, 1))[None]

        def attention(queries, cu_seqlens):
            return ops.attention(queries, all_k, all_v, cu_seqlens, self.max_seqlen, attn_window)

        row_q = q.flatten(0, 1)[None]
        if ops.names["attention"] != "sdpa":
            return attention(row_q, self.cu_seqlens).view(q.shape)
        # The reference takes a query for every key: the others are zero, their outputs unused
        all_q = row_q.new_zeros(1, all_k.size(1), *row_q.shape[2:])
        all_q = all_q.index_copy(1, self.new_key_rows, row_q)
        return attention(all_q, self.cu_seqlens[1])[:, self.new_key_rows].view(q.shape)


class StaleContext:
    """Keys and values from before the windows, from the last step that had them in its windows.

    Adapters have learned since, so they are stale. Computing TTT_STALE_CONTEXT positions less in
    every step pays for smaller chunks and a longer context. Each state row has a ring of `length`
    keys in the cache; position p of its document is at p modulo `length`.
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

    def next_slot(self):
        """Rotary tables and StaleSegments of the next slot; every slot calls it once, in order."""
        slot = len(self.new_kv)
        self.new_kv.append([])
        segments = self.segments._replace(cache=self.cache[slot], new_kv=self.new_kv[slot])
        return self.rope, segments

    def end(self, rows):
        """Ends a step: caches the first chunk of its windows in state rows (B,).

        Those positions may lie before the next windows, later ones do not.
        """
        chunk = self.hp.ttt_chunk_size
        places = self.positions[:, :chunk] % self.length
        cache_rows = rows[:, None] * self.length + places
        first_chunks = []
        for keys_values in self.new_kv:
            first_chunks.append(torch.stack([t[:, :chunk] for t in keys_values]))
        self.cache[:, :, cache_rows] = torch.stack(first_chunks)
        self.new_kv = []


# --- fine-tuning of the base weights


def global_optimizer(model):
    """The optimizer of all weights in test-time training; sgd_step sets its learning rate."""
    return torch.optim.SGD(model.parameters(), momentum=0.9)


def sgd_step(model, packer, windows, optimizer, rate, dist):
    """One SGD step of all ranks on the mean loss of windows (n, 2), at learning rate `rate`.

    The norm of the gradient is at most 1.
    """
    num_tokens = int((windows[:, 1] - windows[:, 0]).sum())
    rank_windows = windows[dist.rank :: dist.world_size]
    reset_gradients(model.parameters())
    for first, last in packer.rows(rank_windows):
        row = packer.build(rank_windows[first:last])
        losses = model(
            row.inputs,
            row.targets,
            row.cu_seqlens,
            looping=True,
            max_seqlen=packer.max_window,
            window_start=row.window_start,
        )
        loss = torch.where(row.scored, losses, 0.0).sum() / num_tokens
        loss.backward()
    dist.all_reduce_packed([p.grad for p in model.parameters()])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


# --- the loop


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
        self.log.guard.show(share, line)
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
        self.packer = WindowPacker(validation, row_tokens, hp.ttt_eval_seq_len, hp, dist.device)
        lanes = range(dist.rank, hp.ttt_lanes, dist.world_size)
        self.lora = BatchedLoRA(model, lanes, hp, dist.device, model.ops.adamw_rows)
        self.stale = None
        if hp.ttt_stale_context:
            num_rows = self.lora.scratch_row
            self.stale = StaleContext(model, validation.starts, num_rows, dist.device)
        # One graph each for any number of rows and width of windows. Layer by layer, because
        # tracing all slots at once with unknown shapes takes minutes.
        self.compiled_parts = compile_parts(model, hp, dist, dynamic=None)
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
            compiled_parts=CompiledParts(
                self.dynamic_slot_input, self.dynamic_attention, self.dynamic_after_attention
            ),
        )
        index = positions[..., None].expand(-1, -1, hidden.size(2))
        scored = hidden.gather(1, index)
        self.mark_dynamic([0], scored, targets, *tap.head.matrices())
        return self.token_losses(scored, targets, tap.head)

    def dynamic_slot_input(self, x, x0, w, return_mix, return_merged, *skip):
        """GPT.slot_input, compiled for any batch and width."""
        if self.stale:
            x, x0 = self.stale.drop_lookback(x, x0)
        # the first layer shares the graph of the others
        x = x if x.requires_grad else x.detach().requires_grad_()
        self.mark_dynamic([0, 1], x, x0, *skip[:1])
        return self.compiled_parts.slot_input(x, x0, w, return_mix, return_merged, *skip)

    def dynamic_attention(self, slot_input, w, rope, segments, tap):
        """GPT.attention, compiled likewise; keys before the window come from StaleContext."""
        if self.stale:
            rope, segments = self.stale.next_slot()
            self.mark_dynamic([0, 1], *rope)
            self.mark_dynamic([0], segments.key_rows, segments.new_key_rows)
            self.mark_dynamic([1], segments.cu_seqlens)
        self.mark_dynamic([0, 1], *slot_input)
        self.mark_dynamic([0], *rope, *tap.matrices())
        return self.compiled_parts.attention(slot_input, w, rope, segments, tap)

    def dynamic_after_attention(self, slot_input, attn, mlp_lane, w, tap):
        """GPT.after_attention, compiled for any batch and width."""
        if self.stale:
            [mlp_lane] = self.stale.drop_lookback(mlp_lane)
        self.mark_dynamic([0, 1], attn, mlp_lane)
        return self.compiled_parts.after_attention(slot_input, attn, mlp_lane, w, tap)

    def mark_dynamic(self, dimensions, *tensors):
        """Tells torch.compile which dimensions vary; None among the tensors is skipped."""
        if not self.warming_up:  # later tensors need no marks, and marking takes time
            return
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, dimensions)

    def padding_table(self, rows):
        """(B, 6) table whose rows score nothing and learn nothing."""
        padding = padding_row(self.lora.scratch_row)
        return torch.tensor([padding] * rows, device=self.dist.device)

    def warm_up(self):
        """Compiles the graphs of all steps at the largest shape, for which kernels are tuned."""
        rows = max(2, self.hp.ttt_batch_size)
        # torch.compile assumes that sizes equal during the warm-up are always equal
        if self.stale and rows == recomputed_context(self.hp):
            rows += 1
        self.warming_up = True
        # with unknown sizes, filling the cache costs more than it saves
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
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
        if self.stale:
            width = self.stale.begin(row.source, row.window, width)
        # Positions after the last input repeat it, unseen by what is scored. SmearGate needs the
        # token before a window that continues a document.
        lookback = 1 if self.stale else 0
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
        if self.stale:
            self.stale.end(row.target)

    def capture(self, steps):
        """Records chunk_step as a CUDA graph for each shape of these steps.

        Where that fails, steps are launched as they are.
        """
        if self.dist.device.type != "cuda" or not self.hp.kernels:
            return
        started = time.perf_counter()
        shapes = {(len(step.table), step.width) for step in steps}
        # the graphs share one memory pool, which the largest shape opens
        shapes = sorted(shapes, key=math.prod, reverse=True)
        tables = {shape: self.padding_table(shape[0]) for shape in shapes}
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
        windows = document_windows(stream.ends - left, stream.ends, context)
        hp = dataclasses.replace(self.hp, eval_seq_len=context, compile="0")
        Evaluator(self.model, stream, hp, self.dist).add_losses(windows, self.score)
        return int(left.sum())

    def global_adapt(self, documents):
        """Fine-tunes the base weights on scored documents: one epoch of sgd_step, cosine to 0."""
        hp = self.hp
        stream = self.validation
        context = hp.ttt_eval_seq_len
        self.model.requires_grad_(True)
        optimizer = global_optimizer(self.model)
        windows = document_windows(stream.starts[documents], stream.ends[documents], context)
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
        # as measured on an H200: 3 us a token of this rank, forward and backward, and 0.1 s a step
        cost = 3e-6 * tokens / self.dist.world_size + 0.1 * num_steps
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


# ---- MAIN ----------------------------------------------------------------------------------------


def write_code(folder, hp, dist, guard=NO_GUARD):
    """Writes the script that counts as the code: this file, or what the guard packs of it.

    Returns its size in bytes.
    """
    script = guard.submission(Path(__file__).read_bytes(), hp)
    if dist.rank == 0:
        write_atomically(folder / "train_gpt.py", script)
    return len(script)


def build_model(hp, dist):
    """A new GPT on the device, with the fastest operations that work there."""
    dtype = torch.bfloat16 if dist.device.type == "cuda" else torch.float32
    # FlashAttention-4 warns at every compilation
    warnings.filterwarnings("ignore", message="Argument aux_data")
    ops = select_ops(hp, dist.device, dtype)
    return GPT(hp, ops, dtype).to(dist.device)


class Prepared:
    """What a run needs: each check makes a part of it, which stays None where the check fails."""

    def __init__(self, hp, dist, guard):
        self.hp = hp
        self.dist = dist
        self.guard = guard
        self.validation = None
        self.loader = None  # of training rows; TTT_EVAL_ONLY needs none
        self.folder = None
        self.model = None
        self.tokenizer = None  # path, if there is a guard, which finds it
        self.machine = ""  # the guard's words for the log

    def check_validation(self):
        """Reads the validation set. Raises DataError."""
        self.validation = ValidationSet(self.hp)
        documents_to_score(self.validation, self.hp)

    def check_training_data(self):
        """Makes the loader of training rows, if the run needs it. Raises DataError."""
        if not self.hp.ttt_eval_only:
            stream = TokenStream(self.hp.data_path, "train")
            self.loader = TrainLoader(stream, self.hp, self.dist)

    def check_folder(self):
        """Names the run's folder, the same on every rank; it may not exist yet.

        Raises SettingError rather than lose a finished training.
        """
        hp = self.hp
        started = self.dist.max_over_ranks(time.time())[0]
        stamp = time.strftime("%Y%m%d_%H%M%S", time.localtime(started))
        self.folder = Path(hp.runs_dir) / (hp.run_id or f"{stamp}_seed{hp.seed}")
        if (self.folder / "model.pt").exists() and not hp.skips_training:
            raise SettingError(
                f"{self.folder} holds a finished training: choose another RUN_ID, or go on with"
                " QUANT_ONLY=1"
            )

    def check_model(self):
        """Makes the model.

        Raises SettingError if an attention backend does not work, or no artifact can hold so many
        weights.
        """
        self.model = build_model(self.hp, self.dist)
        size = sum(p.numel() for p in self.model.parameters())
        # of a byte each; the rest up to MAX_RAW_BYTES is for what else an artifact holds
        if size > 8 * BYTE_CAP and not self.hp.prequant_only:
            raise SettingError(f"{size} weights: an artifact holds at most {8 * BYTE_CAP}")

    def check_by_guard(self):
        """Lets the guard check machine and data. Raises SettingError."""
        self.machine = self.guard.check(self.hp, self.dist, self)


def check_all(hp, dist, guard=NO_GUARD):
    """Finds all problems before anything is trained or written -> Prepared. Raises SettingError."""
    prepared = Prepared(hp, dist, guard)
    checks = [
        prepared.check_validation,
        prepared.check_training_data,
        prepared.check_folder,
        prepared.check_model,
        prepared.check_by_guard,
    ]
    fail_together(dist, checks)
    return prepared


def save_checkpoint(path, model, hp):
    """Writes the averaged fp32 weights and the settings that they were trained with."""
    weights = {name: tensor.cpu() for name, tensor in unbank(model).items()}
    buffer = io.BytesIO()
    torch.save({"weights": weights, "settings": dataclasses.asdict(hp)}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path, model):
    """Loads model.pt into the model. Raises DataError if it is missing or does not fit."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the check sums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: tensor.float() for name, tensor in checkpoint["weights"].items()}
    except Exception as error:  # a damaged file makes torch raise errors of many classes
        raise DataError(f"checkpoint {path}: {error!r:.300}") from None
    if damaged:
        raise DataError(f"checkpoint {path}: {damaged} is damaged")
    rebank(model, weights, f"checkpoint {path}")


class Quantized(NamedTuple):
    """A quantization of the model, before it is written."""

    hp: Hyperparameters
    arrays: dict[str, np.ndarray]
    file: bytes  # on rank 0, empty on the others


TARGET_TRIALS = 5  # of clips; bytes are nearly linear in their logarithm


class ClipTrial(NamedTuple):
    """A quantization with scaled clips."""

    factor: float  # log2 of the clips' scale
    spare: float  # bytes below TARGET_BYTES, negative above it
    quantized: Quantized


def next_clip_factor(trials, spare, num_weights):
    """The factor from which this many spare bytes are expected, after at least one ClipTrial."""
    fitting = [trial for trial in trials if trial.spare >= 0]
    too_large = [trial for trial in trials if trial.spare < 0]
    one, other = trials[0], trials[-1]
    if fitting and too_large:
        one = max(too_large, key=lambda trial: trial.spare)
        other = min(fitting, key=lambda trial: trial.spare)
    bytes_saved = num_weights / 8  # by clips twice as large: one bit per code
    if one is not other:
        measured = (other.spare - one.spare) / (other.factor - one.factor)
        bytes_saved = min(max(measured, bytes_saved / 4), 4 * bytes_saved)
    return other.factor + (spare - other.spare) / bytes_saved


def fit_target_bytes(first, quantize, time_is_left, num_weights, code_bytes, dist, log):
    """Scales all clips and quantizes again until code + file end within 0.5% below TARGET_BYTES.

    first: Quantized with the clips as set; quantize(hp) -> Quantized; time_is_left() says whether
    the budget has the seconds for it. A file that fits stays as it is if it fills less than half of
    the target, for which it was not made, and if smaller clips would clip codes, that is, without
    column steps. Returns the largest Quantized below the target, else the smallest.
    """
    clips = {role.clip_sigmas for role in QUANT_TABLE.values()}
    target = first.hp.target_bytes
    latest = first
    factor = 0.0
    trials = []
    while True:
        spare = target - code_bytes - len(latest.file) if dist.rank == 0 else -math.inf
        spare = dist.max_over_ranks(spare)[0]
        trials.append(ClipTrial(factor, spare, latest))
        best = min(trials, key=lambda trial: (trial.spare < 0, abs(trial.spare)))
        is_near = 0 <= spare <= target / 200
        is_left_alone = spare > target / 2 or (spare >= 0 and not latest.hp.gptq_column_steps)
        if is_near or is_left_alone:
            return best.quantized
        if len(trials) == TARGET_TRIALS or not time_is_left():
            log(f"note: no trials or seconds are left for TARGET_BYTES, spare:{best.spare:.0f}")
            return best.quantized
        # aims at the middle of the allowed range
        factor = next_clip_factor(trials, target / 400, num_weights)
        log(f"target_bytes:{target} spare:{spare:.0f} clips times {2**factor:.4f}")
        scaled = {name: getattr(first.hp, name) * 2**factor for name in clips}
        latest = quantize(dataclasses.replace(first.hp, **scaled))


# stages that MAX_WALLCLOCK_SECONDS includes, in addition to training
AFTER_TRAINING = "hessians", "quantize", "quant_check"


def seconds_after_training(log):
    """Seconds of the AFTER_TRAINING stages so far."""
    return sum(log.seconds.get(stage, 0.0) for stage in AFTER_TRAINING)


def build_artifact(model, loader, hp, dist, log, path, code_bytes, training_seconds=0.0):
    """Hessians, then GPTQ on all ranks, then one file, written by rank 0.

    training_seconds: already used of MAX_WALLCLOCK_SECONDS; 0 if nothing was trained. Returns
    figures for RESULT.
    """
    with log.stage("hessians"):
        hessians = collect_hessians(model, loader, hp, dist)
        row_gradients = None
        if hp.gptq_row_power and hp.gptq_column_steps:
            row_gradients = collect_row_gradients(model, loader, hp, dist)
    check = QuantizationCheck(model, loader, hp, dist, log)
    quantize_seconds = []  # of each call of quantize

    def quantize(hp):
        started = time.perf_counter()
        with log.stage("quantize"):
            arrays = quantize_weights(
                check.weights, hessians, hp, dist, model.ops.trellis_round, row_gradients
            )
        quantize_seconds.append(time.perf_counter() - started)
        return arrays

    def time_is_left():
        """Whether the budget has the seconds of one more quantization and its check.

        The same on every rank, or one would wait in a collective.
        """
        if not training_seconds or not hp.max_wallclock_seconds:
            return True
        needed = quantize_seconds[-1] + log.seconds.get("quant_check", 0.0)
        used = training_seconds + seconds_after_training(log)
        return dist.max_over_ranks(used + needed)[0] < hp.max_wallclock_seconds

    def pack(hp, arrays):
        with log.stage("pack"):
            file = b""
            if dist.rank == 0:
                file = pack_weights(arrays, hp.compressor, 1 + hp.fuses_markers)
        return Quantized(hp, arrays, file)

    chosen = pack(*check.choose(quantize, time_is_left))
    if hp.target_bytes:
        first = chosen
        num_weights = sum(w.numel() for w in check.weights.values())
        chosen = fit_target_bytes(
            first,
            lambda hp: pack(hp, quantize(hp)),
            time_is_left,
            num_weights,
            code_bytes,
            dist,
            log,
        )
        if chosen is not first and check.fp32_loss is not None:
            # RESULT has the gap of the file that is written
            check.gap(chosen.arrays, chosen.hp)
            check.kept = check.tried[-1]
    if dist.rank == 0:
        write_atomically(path, chosen.file)
    dist.barrier()
    log.guard.quantized(chosen.arrays)
    return {"quant_check": check.summary()}


def rebuild_model(model, path, dist):
    """Loads the artifact into the model. Rank 0 decodes it; all ranks get the same bits.

    Raises ArtifactError.
    """

    def load():
        blob = Path(path).read_bytes()
        header = read_header(blob)
        sizes = {name: weight.numel() for name, weight in unbank(model).items()}
        # before they are unpacked: no field of a weight is larger than the weight
        for name, _, shape in header.specs:
            if math.prod(shape) > sizes.get(name.rpartition(":")[0], 0):
                raise ArtifactError(f"{name} {shape} does not fit these settings")
        arrays = unpack_weights(blob)
        if header.trained_on not in (0, 1 + model.hp.fuses_markers):
            raise ArtifactError("trained with another MARKER_FUSION_ENABLED: use that")
        rebank(model, dequantize_weights(arrays))

    load_on_rank_0(model, dist, load, ArtifactError, f"artifact {path}: ")


def score_stage(name, evaluate, log, scores):
    """Runs evaluate() -> {loss, bpb, tokens, bytes} as stage eval_<name>; logs and keeps it."""
    with log.stage(f"eval_{name}"):
        score = evaluate()
    scores[name] = score
    counts = f"tokens:{score['tokens']} bytes:{score['bytes']}"
    log(f"{name} val_loss:{score['loss']:.6f} val_bpb:{score['bpb']:.6f} {counts}")


def violations(hp, log, training, code_bytes, artifact_bytes, scores):
    """Sentences about the contest's rules that this run breaks, as far as they are checked here."""
    broken = []
    total = code_bytes + artifact_bytes
    if total > BYTE_CAP:
        broken.append(
            f"{total} bytes of code and weights, {total - BYTE_CAP} above the cap of {BYTE_CAP};"
            f" QUANT_ONLY=1 TARGET_BYTES={BYTE_CAP} continues from the checkpoint"
        )
    used = training.get("training_seconds", 0) + seconds_after_training(log)
    if hp.max_wallclock_seconds and used > hp.max_wallclock_seconds:
        broken.append(
            f"training, Hessians and GPTQ took {used:.1f} s of {hp.max_wallclock_seconds:.1f}"
        )
    check = training.get("quant_check")
    if check and (check["gap"] is None or check["gap"] > hp.quant_gap_max):
        broken.append(
            f"quantization adds {check['gap']} nats per token on held-out rows, more than"
            f" {hp.quant_gap_max}"
        )
    final = [*scores][-1]
    used = log.seconds.get("unpack", 0) + log.seconds[f"eval_{final}"]
    if used > hp.eval_budget_seconds:
        broken.append(
            f"unpacking and the final evaluation took {used:.1f} s of {hp.eval_budget_seconds:.1f}"
        )
    late_graphs = log.graphs.get("train", 0) - log.graphs.get("eval_training", 0)
    if late_graphs:
        broken.append(f"{late_graphs} graphs were compiled while the training clock ran")
    ttt = scores.get("ttt", {})
    if ttt.get("recompilations"):
        broken.append(
            f"{ttt['recompilations']} graphs were compiled in test-time training after its warm-up"
        )
    if ttt.get("partial"):
        broken.append("test-time training scored part of the validation documents (TTT_MAX_DOCS)")
    return broken


class Stages:
    """The stages of a run, and what they pass to each other."""

    def __init__(self, hp, dist, guard, prepared):
        self.hp = hp
        self.dist = dist
        self.guard = guard
        self.prepared = prepared
        self.folder = prepared.folder
        self.model = prepared.model
        self.evaluator = Evaluator(prepared.model, prepared.validation, hp, dist)
        self.checkpoint = hp.checkpoint_path or self.folder / "model.pt"
        self.artifact = Path(hp.artifact_path or self.folder / "artifact.bin")
        self.training = {}  # figures for RESULT
        self.scores = {}
        self.artifact_bytes = 0
        self.code_bytes = 0
        self.log = None

    def open_folder(self):
        """Makes and locks the run's folder, opens the log, writes the code."""

        def make():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.guard.lock(self.folder)

        fail_together(self.dist, [make] if self.dist.rank == 0 else [])
        self.log = RunLog(self.folder, self.dist, self.guard)
        self.code_bytes = write_code(self.folder, self.hp, self.dist, self.guard)

    def info(self):
        """What was run, and where: keys of RESULT."""
        device = f"cpu x{torch.get_num_threads()}"
        if self.dist.device.type == "cuda":
            device = torch.cuda.get_device_name()
        return {
            "run": self.folder.name,
            "seed": self.hp.seed,
            "commit": self.guard.commit(),
            "device": device,
            "world_size": self.dist.world_size,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            **self.model.ops.names,
        }

    def log_head(self, run_info):
        """Logs settings, machine, notes and sizes."""
        model = self.model
        validation = self.prepared.validation
        words = " ".join(f"{key}:{value}" for key, value in run_info.items())
        self.log(f"settings (* changed):\n{settings_table(self.hp)}\n{words}")
        notes = [f"note: {note}" for note in model.ops.notes]
        self.log("\n".join(notes + self.guard.notes(self.hp)))
        num_parameters = sum(p.numel() for p in model.parameters())
        self.log(
            f"parameters:{num_parameters} slots:{model.slots(True)}"
            f" tokenizer:{self.prepared.tokenizer} validation {validation.summary}"
            f" tokens:{len(validation.tokens)} code_bytes:{self.code_bytes}"
            f" {self.prepared.machine}"
        )

    def load_weights(self):
        """QUANT_ONLY: the weights of an earlier run."""
        model = self.model
        load_on_rank_0(model, self.dist, lambda: load_checkpoint(self.checkpoint, model))

    def train(self):
        """Stages warm_up and train, then model.pt."""
        loader = self.prepared.loader
        trainer = Trainer(self.model, loader, self.hp, self.dist, self.log, self.guard)
        self.log(
            f"train_shards:{len(loader.stream.paths)} train_tokens:{loader.stream.size}"
            f" rows_a_step:{loader.per_rank} span:{loader.span}"
            f" held_out_rows:{loader.held_out_rows}"
        )
        with self.log.stage("warm_up"):
            trainer.warm_up()
        self.guard.begin_training()

        def evaluate():
            score_stage("training", self.evaluator.evaluate_bpb, self.log, {})

        with self.log.stage("train"):
            self.training = trainer.train(evaluate)
        if self.dist.rank == 0:
            save_checkpoint(self.checkpoint, self.model, self.hp)
        self.guard.end_training(self.checkpoint)
        del trainer
        if compile_wanted(self.hp, self.dist):
            torch.compiler.reset()  # frees the memory of the captured micro-batches

    def quantize(self):
        """Stages hessians, quantize, quant_check and pack: writes the artifact."""
        self.training |= build_artifact(
            self.model,
            self.prepared.loader,
            self.hp,
            self.dist,
            self.log,
            self.artifact,
            self.code_bytes,
            self.training.get("training_seconds", 0.0),
        )

    def unpack(self):
        """Loads the artifact: from here on the model is the submission's."""
        with self.log.stage("unpack"):
            rebuild_model(self.model, self.artifact, self.dist)
        size = self.artifact.stat().st_size if self.dist.rank == 0 else 0
        self.artifact_bytes = int(self.dist.max_over_ranks(size)[0])
        self.log(
            f"artifact_bytes:{self.artifact_bytes} code_bytes:{self.code_bytes}"
            f" total_bytes:{self.artifact_bytes + self.code_bytes}"
        )

    def score(self, name):
        """Plain evaluation of the whole validation set."""
        score_stage(name, self.evaluator.evaluate_bpb, self.log, self.scores)

    def test_time_train(self):
        """Scores with test-time training, the final score."""
        score_stage("ttt", self.evaluate_adapted, self.log, self.scores)

    def evaluate_adapted(self):
        """Test-time training on the validation set -> {loss, bpb, ...}."""
        validation = self.prepared.validation
        trainer = TestTimeTrainer(self.model, validation, self.hp, self.dist, self.log)
        return trainer.evaluate()

    def result(self, run_info):
        """Writes result.json and logs the RESULT line -> its dictionary.

        Raises ModelError if a score is not finite.
        """
        for name, score in self.scores.items():
            if not math.isfinite(score["loss"]):
                raise ModelError(
                    f"{name} loss is {score['loss']}: lower learning rates; of TTT, TTT_LORA_LR"
                )
        log = self.log
        sizes = self.code_bytes, self.artifact_bytes
        result = {
            "version": RESULT_VERSION,
            **run_info,
            **self.training,
            "scores": self.scores,
            "artifact_bytes": self.artifact_bytes,
            "code_bytes": self.code_bytes,
            "total_bytes": sum(sizes),
            "seconds": log.seconds,
            "graphs_compiled": {stage: count for stage, count in log.graphs.items() if count},
            "violations": violations(self.hp, log, self.training, *sizes, self.scores),
        }
        self.guard.complete(self.hp, result)
        if self.dist.device.type == "cuda":
            result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        if self.dist.rank == 0:
            write_atomically(self.folder / "result.json", json.dumps(result, indent=1).encode())
        log("RESULT " + json.dumps(result))
        return result


def run(hp, dist, guard=NO_GUARD):
    """A complete run, stage by stage. Returns the RESULT dictionary."""
    stages = Stages(hp, dist, guard, check_all(hp, dist, guard))
    stages.open_folder()
    run_info = stages.info()
    stages.log_head(run_info)
    if hp.quant_only:
        stages.load_weights()
    elif not hp.ttt_eval_only:
        stages.train()
    stages.model.leave_training()
    if not hp.ttt_eval_only:
        guard.keep_weights(hp, stages.folder, stages.checkpoint, stages.log)
        if not hp.prequant_only:
            stages.quantize()
        stages.score("prequant")
    if not hp.prequant_only:
        stages.unpack()
        stages.score("quantized")
        if hp.ttt_enabled:
            stages.test_time_train()
    return stages.result(run_info)


def main():
    """Command line: --help, or a run with the settings of the environment.

    Exit codes: 1 for an error, 2 for arguments, 3 for more bytes than the cap.
    """
    survive_lost_terminals()
    if len(sys.argv) > 1:
        print("No arguments; settings are environment variables, here with their defaults:")
        print(settings_table())
        sys.exit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
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
