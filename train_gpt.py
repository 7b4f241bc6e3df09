"""Train, quantize, pack and score a small language model: a complete Parameter Golf submission.

    text -> shards (prepare_caseops_data.py) -> train -> EMA -> GPTQ + LQER -> artifact on disk
         -> rebuilt model -> bits per byte (BPB) of the validation documents
         -> the same with score-first test-time training (TTT)

    make demo                                    # CPU or GPU, a few minutes, nothing to download
    DATA_PATH=data/mine python train_gpt.py      # one GPU (or the CPU)
    DATA_PATH=data/mine torchrun --standalone --nproc_per_node=8 train_gpt.py
    python train_gpt.py --help                   # every setting: default, range, meaning

Settings are environment variables; the defaults are the submission, PRESET=name a published one.
This file needs no other; in its repository tools/guard.py watches the run. A run writes its files
to runs/<RUN_ID>/ (README) and ends with the line `RESULT {json}`. QUANT_ONLY=1 continues from its
model.pt, TTT_EVAL_ONLY=1 from its artifact.bin.

Shapes: B rows, T tokens, D model_dim, L layers, S slots (one execution of a layer; a looped one has
several), H heads, K key/value heads, E head_dim, F MLP hidden, V vocabulary, R LoRA rank.
"""

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
import shutil
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
    import sentencepiece
except ImportError:  # find_tokenizer raises a DataError
    sentencepiece = None
try:
    import brotli
except ImportError:  # only COMPRESSOR=lzma works; the others are refused at the start
    brotli = None
try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels can still be defined, but the references are used
    triton = None
    tl = SimpleNamespace(constexpr=int)

BOS_ID = 1  # every document starts with exactly one (README: data)
CONTEST_SECONDS = 600.0  # limit of training, and of evaluation, in the contest's rules
BYTE_CAP = 16_000_000  # limit of code + weights in the contest's rules, decimal
RESULT_VERSION = 2  # of the RESULT line, see docs/RESULT.md
PACKED = False  # tools/pack_code.py sets this in the script that it writes: that one stands alone
# what only published systems use: tools/techniques.py puts itself here, where find_guard finds it
techniques = None


class SettingError(ValueError):
    """A setting or a combination of settings that cannot work; the message says what to change."""


class DataError(ValueError):
    """A dataset or file that cannot be used; the message names it and says what to do."""


class ArtifactError(ValueError):
    """Bytes that are not an artifact of this program, or damaged."""


# these end a run with their message, any other exception with its traceback
OUR_ERRORS = SettingError, DataError, ArtifactError

# ---- HYPERPARAMETERS -----------------------------------------------------------------------------


def env(default, help, *, above=None, least=None, most=None, choices=None, published=False):
    """Declares a setting; its environment variable is the field's name in capitals.

    above: exclusive bound; least, most: inclusive bounds. published: only published systems change
    the default; their code is in tools/techniques.py.
    """
    rules = {"above": above, "least": least, "most": most, "choices": choices}
    rules |= {"help": help, "published": published}
    return dataclasses.field(default=default, metadata=rules)


RESIDUALS = "off", "mix", "gate"  # of values


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run, declared once: name, type, default, meaning, range.

    Raises SettingError on bad values.
    """

    # run
    seed: int = env(42, "seed of the initial weights and of the LoRA matrices", least=0)
    preset: str = env("", "settings of presets/NAME.env; what the environment sets wins")
    run_id: str = env("", "name of the run's folder; empty: time stamp and seed")
    runs_dir: str = env("runs", "folder that holds the runs")
    plots: bool = env(True, "plot the finished run, if tools/plot_run.py exists")
    data_path: str = env(
        "data/datasets/fineweb10B_sp8192_caseops", "folder of fineweb_{train,val,val_bytes}_*.bin"
    )
    tokenizer_path: str = env(
        "", "SentencePiece model; empty: searched near the data and in tokenizers/"
    )
    caseops_enabled: bool = env(
        True,
        "validation bytes come from the side-car; 0: from the tokenizer's byte tables",
        published=True,
    )
    marker_fusion_enabled: bool = env(
        False, "a space and the case marker behind it become one token (PR 2109)", published=True
    )
    data_seed: int = env(0, "shuffles the training rows; 0: order of the stream", least=0)
    balance_rows: bool = env(
        True, "distribute a step's documents so that all rows have equal attention cost"
    )
    doc_shuffle_enabled: bool = env(
        False,
        "training documents in another order inside each shard, by DATA_SEED (1512)",
        published=True,
    )
    device: str = env("auto", "auto: a GPU if there is one", choices=("auto", "cuda", "cpu"))
    compute_dtype: str = env(
        "auto", "auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", "bfloat16", "float32")
    )
    compile: str = env("auto", "torch.compile; auto: on CUDA only", choices=("auto", "0", "1"))
    kernels: bool = env(
        True, "use Triton and Quack kernels that pass a trial; 0: PyTorch references"
    )
    train_cuda_graphs: bool = env(True, "capture and replay training micro-batches as CUDA graphs")
    attention_backend: str = env(
        "auto", "attention over packed rows", choices=("auto", "fa3", "fa4", "torch", "sdpa")
    )
    prequant_only: bool = env(False, "stop after evaluating the fp32 model")
    quant_only: bool = env(
        False, "continue from CHECKPOINT_PATH: Hessians, GPTQ, packing, evaluation"
    )
    ttt_eval_only: bool = env(
        False, "continue from ARTIFACT_PATH: evaluation and test-time training"
    )
    checkpoint_path: str = env("", "fp32 model for QUANT_ONLY; empty: model.pt of the run")
    artifact_path: str = env("", "artifact for TTT_EVAL_ONLY; empty: artifact.bin of the run")
    checkpoint_every: int = env(
        0, "steps between training states (two are kept); 0: only on a signal", least=0
    )
    resume: bool = env(False, "continue from the newest complete training state of RUN_ID")
    deterministic: bool = env(
        False, "same RESULT from run to run: exact on CPU, as far as PyTorch can on GPU"
    )

    # data and batches
    train_batch_tokens: int = env(
        786_432, "tokens per step over all ranks and micro-steps", least=1
    )
    micro_batch_tokens: int = env(
        98_304, "tokens per packed row, the unit of one forward and backward", least=1
    )
    train_seq_len: int = env(2048, "longer documents are split into pieces of this length", least=2)
    max_row_segments: int = env(
        0, "segments per row at most; beyond it the shortest are merged; 0: automatic", least=0
    )

    # model
    vocab_size: int = env(8192, "vocabulary size", least=9, most=65_536)
    model_dim: int = env(512, "model width", least=8)
    num_layers: int = env(11, "physical layers", least=1)
    num_heads: int = env(8, "query heads", least=1)
    num_kv_heads: int = env(4, "key/value heads", least=1)
    mlp_mult: float = env(4.0, "MLP width / model width", above=0)
    tie_embeddings: bool = env(True, "use the embedding as output projection, too")
    tied_embed_init_std: float = env(0.005, "standard deviation of the initial embedding", above=0)
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
    skip_gates_enabled: bool = env(True, "merge U-Net skips by a gated lerp; 0: by addition")
    ln_scale: bool = env(True, "divide normalized inputs by sqrt(layer + 1)")
    rope_dims: int = env(16, "rotary dimensions per head", least=2)
    rope_base: float = env(10_000.0, "rotary base", above=1)
    qk_gain_init: float = env(5.0, "initial gain per query head", above=0)
    xsa_last_n: int = env(
        11, "last layers with XSA: remove a head's output component along its own value", least=0
    )
    sparse_attn_gate_enabled: bool = env(
        True, "per-head output gate read from GATE_WINDOW dimensions"
    )
    sparse_attn_gate_scale: float = env(0.5, "factor inside the sparse gate's sigmoid", above=0)
    gated_attn_enabled: bool = env(False, "per-head output gate read from all dimensions")
    attn_out_gate_enabled: bool = env(False, "per-head output gate 2 sigmoid(W src[:GATE_WINDOW])")
    attn_out_gate_src: str = env(
        "block", "input of that gate: block input or raw q", choices=("block", "q")
    )
    leaky_relu_slope: float = env(0.3, "negative slope before squaring in the MLP", least=0, most=1)
    parallel_start_layer: int = env(
        8, "first layer with two residual lanes; NUM_LAYERS: none", least=0
    )
    parallel_final_lane: str = env(
        "mean", "lane that becomes the output", choices=("mean", "attn", "mlp")
    )
    logit_softcap: float = env(30.0, "logits z become c tanh(z/c)", above=0, most=64)
    attn_window: int = env(
        0,
        "tokens before its own that a token of the early layers sees; 0: all",
        least=0,
        published=True,
    )
    attn_window_full_layers: int = env(3, "last layers that see all nevertheless", least=0)
    partial_key_offset: bool = env(
        False,
        "unrotated dimensions of full layers' keys are the previous token's (1512)",
        published=True,
    )
    value_residual: str = env(
        "off",
        "mix: values l0 v0 + l1 v, v0 layer 0's; gate: v + s(a) v0",
        choices=RESIDUALS,
        published=True,
    )
    bigram_vocab_size: int = env(
        0, "rows of the hashed bigram embedding; 0: none", least=0, published=True
    )
    bigram_dim: int = env(112, "width of that table", least=1)
    value_embed_layers: str = env(
        "", "layers whose values get a token's own embedding, comma separated", published=True
    )
    value_embed_dim: int = env(128, "width of that table", least=1)
    extra_eval_loops: int = env(
        0,
        "passes over the looped layers that training did not have; skips stay",
        least=0,
        published=True,
    )

    # optimizer and schedule
    max_wallclock_seconds: float = env(
        600.0, "budget of training, Hessians and GPTQ; 0: no limit, train ITERATIONS", least=0
    )
    iterations: int = env(20_000, "maximum number of steps", least=1)
    warmup_steps: int = env(3, "discarded steps per graph before the clock starts", least=0)
    warmdown_frac: float = env(
        0.85, "final fraction of training over which the learning rates fall", above=0, most=1
    )
    min_lr: float = env(0.1, "floor of the learning-rate factor", least=0, most=1)
    matrix_lr: float = env(0.026, "Muon learning rate", above=0)
    muon_momentum: float = env(0.97, "Nesterov momentum after its warm-up", least=0, most=1)
    muon_momentum_warmup_start: float = env(0.92, "momentum at step 0", least=0, most=1)
    muon_momentum_warmup_steps: int = env(1500, "steps of the linear momentum warm-up", least=0)
    muon_wd: float = env(0.095, "decoupled weight decay of the matrix banks", least=0)
    muon_row_normalize: bool = env(True, "normalize update rows before orthogonalization")
    muon_backend_steps: int = env(5, "Newton-Schulz steps", least=1, most=5)
    muon_head_pairs: bool = env(
        False, "q and k are orthogonalised by pairs of heads, not whole (PR 1512)", published=True
    )
    muon_gram_enabled: bool = env(
        False, "Newton-Schulz steps on X X^T where X is not square", published=True
    )
    muon_dtype: str = env(
        "auto",
        "dtype of Muon's gradients, momentum and matmuls",
        choices=("auto", "bfloat16", "float32"),
    )
    tied_embed_lr: float = env(0.03, "AdamW learning rate of the embedding", above=0)
    embed_wd: float = env(0.085, "weight decay of the embedding", least=0)
    scalar_lr: float = env(0.02, "AdamW learning rate of scalars and gates", above=0)
    adam_wd: float = env(0.02, "weight decay of scalars and gates", least=0)
    beta1: float = env(0.9, "AdamW beta1", least=0, most=0.9999)
    beta2: float = env(0.99, "AdamW beta2", least=0, most=0.99999)
    grad_clip_norm: float = env(0.3, "maximum global gradient norm; 0: off", least=0)
    ema_decay: float = env(0.9965, "decay of the weight EMA after its ramp", least=0, most=0.999999)
    swa_below_lr: float = env(
        0.0, "below this learning-rate factor: mean of snapshots; 0: EMA", least=0, published=True
    )
    swa_every: int = env(50, "steps between snapshots", least=1)
    qat_below_lr: float = env(
        0.0,
        "banks train on their grid below this learning-rate factor; 0: never",
        least=0,
        published=True,
    )
    wd_schedule_enabled: bool = env(
        False, "weight decay falls, then rises (PR 1512)", published=True
    )
    wd_sched_hold_frac: float = env(
        0.40, "fraction until which decay keeps its value", least=0, most=1
    )
    wd_sched_ramp_frac: float = env(0.85, "fraction at which decay is lowest", least=0, most=1)
    wd_sched_low_factor: float = env(0.50, "lowest decay factor", least=0)
    wd_sched_high_factor: float = env(1.75, "decay factor at the end", least=0)
    train_log_every: int = env(100, "steps between log lines", least=1)
    val_loss_every: int = env(
        0, "steps between evaluations during training (clock stopped); 0: none", least=0
    )

    # quantization and artifact
    gptq_reserve_seconds: float = env(
        7.0, "part of the budget reserved for Hessians and GPTQ", least=0
    )
    gptq_calibration_batches: int = env(
        16, "rows of training tokens for the Hessians, over all ranks", least=1
    )
    gptq_self_calibration: bool = env(
        False, "these rows are written by the model itself (PR 1512)", published=True
    )
    gptq_all_reduce: bool = env(True, "average Hessians over ranks; 0: each rank uses its own")
    gptq_damp: float = env(0.01, "damping, as a fraction of the mean Hessian diagonal", above=0)
    gptq_block_size: int = env(128, "columns per batched error update", least=1)
    matrix_bits: int = env(6, "bits per matrix code", least=2, most=8)
    embed_bits: int = env(8, "bits per embedding code", least=2, most=8)
    mlp_clip_sigmas: float = env(13.0, "clip of MLP rows in standard deviations", above=0)
    attn_clip_sigmas: float = env(14.0, "clip of attention rows in standard deviations", above=0)
    embed_clip_sigmas: float = env(15.0, "clip of embedding rows in standard deviations", above=0)
    hessian_clip_lambda: float = env(
        0.0, "share of a row's Hessian-weighted size in its clip (PR 1512)", least=0, published=True
    )
    gptq_column_steps: bool = env(
        True, "quantization steps 2^(k/8) per row and column; 0: fp16 steps per row"
    )
    gptq_column_octaves: float = env(
        2.0, "maximum log2 ratio of a column's step to its row's", least=0
    )
    quant_check_rows: int = env(
        2, "training rows held out to check the quantized model's loss; 0: no check", least=0
    )
    quant_gap_max: float = env(
        0.02,
        "allowed loss increase there, nats per token; above it simpler quantizations are tried",
        above=0,
    )
    gated_attn_quant_gate: bool = env(True, "attention gates as int8 per row; 0: fp16")
    lqer_enabled: bool = env(True, "low-rank correction of the largest quantization errors")
    lqer_top_k: int = env(3, "matrices that get a correction", least=0)
    lqer_rank: int = env(4, "rank of a correction", least=1)
    lqer_weighted: bool = env(
        False,
        "corrections chosen and factored by Hessian-weighted error and gain per byte",
        published=True,
    )
    lqer_asym_enabled: bool = env(
        True, "correction as int2 and int4 codes; 0: LQER_FACTOR_BITS for both factors"
    )
    lqer_asym_group: int = env(64, "codes that share a scale in the int4 factor", least=1)
    lqer_factor_bits: int = env(4, "bits of the symmetric factors", least=2, most=8)
    target_bytes: int = env(
        0, "scale the clips until code + weights fit just under this; 0: off", least=0
    )
    compressor: str = env(
        "entropy", "artifact coder: entropy, pergroup (needs lrzip), brotli, lzma"
    )

    # evaluation
    eval_seq_len: int = env(2048, "context of plain and sliding evaluation", least=2)
    sliding_window_enabled: bool = env(False, "also evaluate with overlapping windows")
    eval_stride: int = env(64, "advance of the sliding window", least=1)
    eval_budget_seconds: float = env(
        600.0, "limit for unpacking and final evaluation; exceeding it is a violation", above=0
    )

    # test-time training
    ttt_enabled: bool = env(True, "score with test-time training")
    ttt_method: str = env(
        "lora",
        "lora: an adapter a document; sgd: all weights, by chunks",
        choices=("lora", "sgd"),
        published=True,
    )
    ttt_epochs: int = env(
        3, "SGD steps on a chunk of GLOBAL_TTT_CHUNK_TOKENS, at GLOBAL_TTT_LR", least=1
    )
    ttt_max_docs: int = env(
        0, "score only N documents of all lengths (marked partial); 0: all", least=0
    )
    ttt_eval_seq_len: int = env(2048, "context of a chunk, including its own tokens", least=2)
    ttt_stale_context: int = env(
        1792, "oldest context positions whose keys and values are reused, not recomputed", least=0
    )
    ttt_chunk_size: int = env(12, "tokens scored between two LoRA steps", least=1)
    ttt_short_chunks: str = env(
        "",
        "smaller chunks of short documents: 256:8,2000:24 is 8 up to 256 tokens, then 24",
        published=True,
    )
    ttt_batch_size: int = env(64, "documents per group, and per step with full contexts", least=1)
    ttt_lanes: int = env(
        8, "fixed groups of documents; group i runs on rank i mod world size", least=1
    )
    ttt_lora_sites: str = env("q,k,v,o,mlp,head", "sites with LoRA adapters, comma separated")
    ttt_lora_rank: int = env(80, "LoRA rank", least=1)
    ttt_lora_alpha: float = env(144.0, "adapter output is scaled by alpha / rank", above=0)
    ttt_lora_lr: float = env(9e-5, "AdamW learning rate of the adapters", least=0)
    ttt_beta2: float = env(0.99, "AdamW beta2 of the adapters (beta1 is 0)", least=0, most=0.99999)
    ttt_weight_decay: float = env(0.5, "weight decay of the adapters", least=0)
    ttt_warm_start_a: bool = env(True, "a new document starts with its predecessor's A")
    ngram_tilt_enabled: bool = env(
        False,
        "the word that followed the last 15 tokens before gets more probability",
        published=True,
    )
    phased_ttt_num_phases: int = env(
        1, "times the base weights are fine-tuned on scored documents", least=0
    )
    phased_ttt_prefix_docs: int = env(
        2500, "documents scored before the last fine-tuning, per 50,000", least=0
    )
    global_ttt_lr: float = env(1e-3, "SGD learning rate of that fine-tuning, cosine to 0", least=0)
    global_ttt_momentum: float = env(0.9, "its momentum", least=0, most=0.9999)
    global_ttt_grad_clip: float = env(1.0, "its maximum gradient norm", above=0)
    global_ttt_chunk_tokens: int = env(32_768, "tokens per SGD step over all ranks", least=1)

    @classmethod
    def from_env(cls, environ=None, guard=None):
        """Settings from environment variables, on top of those of PRESET, which the guard reads.

        environ: a dictionary in place of os.environ. Raises SettingError with all bad values and
        all unknown names that look like settings.
        """
        environ = os.environ if environ is None else environ
        if environ.get("PRESET"):
            preset = (guard or NO_GUARD).read_preset(environ["PRESET"])
            environ = preset | dict(environ)
        values = {}
        problems = [*unknown_settings(environ, cls)]
        for field in dataclasses.fields(cls):
            text = environ.get(field.name.upper())
            if text is None:
                continue
            try:
                values[field.name] = parse_setting(field, text)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise SettingError("\n".join(problems))
        return cls(**values)

    def __post_init__(self):
        problems = setting_problems(self)
        if problems:
            raise SettingError("\n".join(problems))

    @property
    def num_embeddings(self):
        """Rows of the embedding table: fused pairs have ids above VOCAB_SIZE."""
        if self.marker_fusion_enabled:
            return (self.vocab_size + 10) // 8 * 8
        return self.vocab_size

    @property
    def head_dim(self):
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self):
        return int(self.mlp_mult * self.model_dim)

    @property
    def new_values(self):
        """Whether a published setting changes the keys or values of attention."""
        embedded = self.value_embed_layers != ""
        return self.partial_key_offset or embedded or self.value_residual != "off"

    @property
    def generator_seed(self):
        """SEED, small enough for every generator, also for those seeded with multiples of it."""
        return self.seed % 2**43

    @property
    def lora_sites(self):
        return tuple(site for site in self.ttt_lora_sites.split(",") if site)

    @property
    def micro_steps(self):
        """Micro-steps per step over all ranks."""
        return self.train_batch_tokens // self.micro_batch_tokens

    @property
    def row_segments(self):
        """Maximum number of segments per row.

        The automatic value suffices for any row: of two neighbouring pieces that were not merged,
        one is longer than half of TRAIN_SEQ_LEN.
        """
        if self.max_row_segments:
            return self.max_row_segments
        full_pieces = -(-self.micro_batch_tokens // self.train_seq_len)
        return max(64, self.micro_batch_tokens // 512, 2 * full_pieces + 1)

    @property
    def training_seconds(self):
        """Time limit of the training loop; None: no limit; 0: a single step."""
        if not self.max_wallclock_seconds:
            return None
        return max(0.0, self.max_wallclock_seconds - self.gptq_reserve_seconds)


# setting -> tap site
LORA_SITES = {"q": "q", "k": "k", "v": "v", "o": "attn_out", "mlp": "mlp_out", "head": "lm_head"}


def parse_setting(field, text):
    """Text of an environment variable -> typed value. Raises ValueError that names the variable."""
    name = field.name.upper()
    if field.type is bool:
        if text not in ("0", "1"):
            raise ValueError(f"{name}={text!r}: must be 0 or 1")
        return text == "1"
    try:
        return field.type(text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: must be {field.type.__name__}") from None


# Settings of published scripts that do not exist here -> what replaces them. Other unknown names
# are recognized by their first word.
INSTEAD = {
    "ADAM_EPS": "nothing: it is 1e-8",
    "ALIAS_PREV_SMEAR_SCALE": "nothing",
    "ASYM_LOGIT_RESCALE": "nothing",
    "CKPT_PATH": "CHECKPOINT_PATH",
    "EVAL_ONLY": "TTT_EVAL_ONLY",
    "EVAL_ONLY_PATH": "QUANT_ONLY and CHECKPOINT_PATH",
    "DATASETS_DIR": "DATA_PATH",
    "DOC_SHUFFLE": "DOC_SHUFFLE_ENABLED",
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
# Settings of published scripts that cannot change a result, and names that other programs use, too:
# a note in the log instead of an error.
IDLE = """ARTIFACT_DIR COMPILE_SHAPE_WARMUP DATA_DIR DYNAMO_CACHE_SIZE_LIMIT GPUS_OVERRIDE
    MODEL_PATH OUT_PTZ SEEDS_OVERRIDE SKIP_INITIAL_VAL""".split()
# First words of our settings that other programs' variables have as well (MAX_JOBS, DATA_...)
SHARED_WORDS = """MAX MIN NUM RUN RUNS DATA MODEL COMPUTE ENABLE TRAIN VAL CHECKPOINT TOKENIZER
    ARTIFACT ADAM""".split()


def idle_notes(environ):
    """Notes for the log: settings of published scripts that have no effect here."""
    found = [name for name in IDLE if name in environ]
    return [f"{', '.join(found)}: settings of other scripts, no effect here"] if found else []


def unknown_settings(environ, cls):
    """Yields a message for every undeclared variable that looks like a setting.

    It does if its first word is that of a setting and no shared one, or if it is almost the name of
    a setting.
    """
    names = [field.name.upper() for field in dataclasses.fields(cls)]
    families = {name.split("_")[0] for name in names if "_" in name} - set(SHARED_WORDS)
    for name in sorted(set(environ) - {*names, *IDLE}):
        if name in INSTEAD:
            yield (
                f"{name} is a setting of other scripts; here it is {INSTEAD[name]} (unset it, or"
                " see --help)"
            )
            continue
        in_family = name.split("_")[0] in families
        if in_family or difflib.get_close_matches(name, names, 1, 0.88):
            close = difflib.get_close_matches(name, names, 1, 0.6)
            question = f"; did you mean {close[0]}?" if close else ""
            yield f"{name} is not a setting{question} (unset it, or see --help)"


def setting_problems(hp):
    """Messages for values outside their ranges or, if there are none, for combinations that cannot
    work.
    """
    problems = []
    for field in dataclasses.fields(hp):
        problems += range_problems(field, getattr(hp, field.name))
    if problems:
        return problems
    for check in CROSS_CHECKS:
        problems += check(hp)
    return problems or [*missing_techniques(hp)]


def range_problems(field, value):
    """Yields a message if the value is outside its declared range."""
    rule = field.metadata
    name = f"{field.name.upper()}={value!r}"
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


def model_problems(hp):
    """Yields messages for shapes that do not fit each other."""
    if hp.model_dim % hp.num_heads:
        yield f"MODEL_DIM={hp.model_dim} must divide by NUM_HEADS={hp.num_heads}"
    if hp.num_heads % hp.num_kv_heads:
        yield "NUM_HEADS must divide by NUM_KV_HEADS"
    if hp.rope_dims % 2 or hp.rope_dims > hp.head_dim:
        yield f"ROPE_DIMS must be even, at most {hp.head_dim}"
    if hp.gate_window > hp.model_dim:
        yield "GATE_WINDOW must be at most MODEL_DIM"
    if hp.sparse_attn_gate_enabled + hp.gated_attn_enabled + hp.attn_out_gate_enabled > 1:
        yield (
            "SPARSE_ATTN_GATE_ENABLED, GATED_ATTN_ENABLED, ATTN_OUT_GATE_ENABLED exclude each other"
        )
    if hp.num_loops and not hp.loop_start <= hp.loop_end < hp.num_layers:
        yield "LOOP_START..LOOP_END must lie inside NUM_LAYERS (or set NUM_LOOPS=0)"
    if hp.parallel_start_layer > hp.num_layers:
        yield "PARALLEL_START_LAYER must be at most NUM_LAYERS"


def batch_problems(hp):
    """Yields messages for rows and budgets of training."""
    if hp.train_batch_tokens % hp.micro_batch_tokens:
        yield "TRAIN_BATCH_TOKENS must divide by MICRO_BATCH_TOKENS"
    full_pieces = -(-hp.micro_batch_tokens // hp.train_seq_len)
    if 0 < hp.max_row_segments < full_pieces:
        yield (
            f"MAX_ROW_SEGMENTS={hp.max_row_segments}: a row of MICRO_BATCH_TOKENS has"
            f" {full_pieces} pieces of TRAIN_SEQ_LEN"
        )
    if 0 < hp.max_wallclock_seconds <= hp.gptq_reserve_seconds:
        yield "GPTQ_RESERVE_SECONDS must be less than MAX_WALLCLOCK_SECONDS"
    if hp.deterministic and hp.max_wallclock_seconds:
        yield "DETERMINISTIC=1 needs MAX_WALLCLOCK_SECONDS=0"


def evaluation_problems(hp):
    """Yields messages for evaluation and test-time training."""
    if hp.eval_stride > hp.eval_seq_len:
        yield "EVAL_STRIDE must be at most EVAL_SEQ_LEN"
    if hp.ttt_chunk_size > hp.ttt_eval_seq_len:
        yield "TTT_CHUNK_SIZE must be at most TTT_EVAL_SEQ_LEN"
    longest = hp.ttt_eval_seq_len - hp.ttt_chunk_size
    if hp.ttt_stale_context and not hp.ttt_chunk_size <= hp.ttt_stale_context <= longest:
        yield (
            f"TTT_STALE_CONTEXT={hp.ttt_stale_context} must be 0, or from TTT_CHUNK_SIZE to"
            " TTT_EVAL_SEQ_LEN - TTT_CHUNK_SIZE"
        )
    if not hp.lora_sites or not set(hp.lora_sites) <= set(LORA_SITES):
        yield f"TTT_LORA_SITES={hp.ttt_lora_sites}: must be some of {','.join(LORA_SITES)}"


def mode_problems(hp):
    """Yields messages for what the run does, and for the files that it reads and writes."""
    if hp.prequant_only + hp.quant_only + hp.ttt_eval_only > 1:
        yield "PREQUANT_ONLY, QUANT_ONLY, TTT_EVAL_ONLY exclude each other"
    if hp.resume and (not hp.run_id or hp.quant_only or hp.ttt_eval_only):
        yield "RESUME=1 needs RUN_ID, and neither QUANT_ONLY nor TTT_EVAL_ONLY"
    if hp.checkpoint_path and not hp.quant_only:
        yield "CHECKPOINT_PATH goes with QUANT_ONLY=1"
    if hp.artifact_path and not hp.ttt_eval_only:
        yield "ARTIFACT_PATH goes with TTT_EVAL_ONLY=1"
    if not re.fullmatch(r"(\w[\w.+-]*)?", hp.run_id):
        yield "RUN_ID: letters, digits, '_', then also '.', '+', '-'"


def published_problems(hp):
    """Yields messages for settings that only published systems use."""
    if not re.fullmatch(r"(\d+:[1-9]\d*(,(?=.)|$))*", hp.ttt_short_chunks):
        yield f"TTT_SHORT_CHUNKS={hp.ttt_short_chunks}: must be pairs such as 256:8,2000:24"
    if hp.marker_fusion_enabled and not hp.caseops_enabled:
        yield "MARKER_FUSION_ENABLED=1 needs CASEOPS_ENABLED=1"
    stale = hp.ttt_stale_context and hp.ttt_enabled and hp.ttt_method == "lora"
    if stale and (hp.attn_window or hp.new_values):
        yield (
            "ATTN_WINDOW, PARTIAL_KEY_OFFSET, VALUE_RESIDUAL and VALUE_EMBED_LAYERS need"
            " TTT_STALE_CONTEXT=0"
        )
    layers = hp.value_embed_layers.split(",") if hp.value_embed_layers else []
    if not all(layer.isdecimal() and int(layer) < hp.num_layers for layer in layers):
        yield (
            f"VALUE_EMBED_LAYERS={hp.value_embed_layers}: must be numbers of layers, below"
            " NUM_LAYERS"
        )
    if hp.bigram_vocab_size == 1:
        yield "BIGRAM_VOCAB_SIZE must be 2 at least, or 0"
    if hp.extra_eval_loops and not hp.num_loops:
        yield "EXTRA_EVAL_LOOPS needs NUM_LOOPS"
    if hp.muon_head_pairs and (hp.num_heads % 2 or hp.num_kv_heads % 2):
        yield "MUON_HEAD_PAIRS=1 needs even NUM_HEADS and NUM_KV_HEADS"
    if hp.qat_below_lr and hp.gptq_column_steps:
        yield "QAT_BELOW_LR trains on the grid of rows: set GPTQ_COLUMN_STEPS=0"
    if hp.ttt_method == "sgd" and hp.ttt_max_docs:
        yield "TTT_MAX_DOCS goes with TTT_METHOD=lora"


CROSS_CHECKS = [
    model_problems,
    batch_problems,
    evaluation_problems,
    mode_problems,
    published_problems,
]


def missing_techniques(hp):
    """Messages for settings of published systems, where the file with their code is not beside
    this one.
    """
    for field in dataclasses.fields(hp):
        if (
            techniques is None
            and field.metadata["published"]
            and getattr(hp, field.name) != field.default
        ):
            yield f"{field.name.upper()} needs tools/techniques.py beside this file"


def range_text(field):
    """The declared range of a setting as --help shows it: ` [above 0, most 1]`, or nothing."""
    rule = field.metadata
    parts = [f"{key} {rule[key]}" for key in ("above", "least", "most") if rule[key] is not None]
    if rule["choices"]:
        parts.append("|".join(rule["choices"]))
    return f" [{', '.join(parts)}]" if parts else ""


def settings_table(hp=None):
    """One line per setting: value (of hp, else the default; changed ones are starred), meaning,
    range.
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


class Dist:
    """The process group. All of torch.distributed is used here.

    With one process every method returns at once. Tensors travel over NCCL on CUDA and over gloo on
    the CPU; objects and clocks always travel over gloo, so that they never wait for the GPU.
    """

    def __init__(self, device="auto", deterministic=False):
        self.num_collectives = 0
        self.notes = []  # for the log
        place = self.place_in_group()
        self.rank = place.rank
        self.world_size = place.world_size
        self.notes += idle_notes(os.environ)
        if device == "cuda" and not torch.cuda.is_available():
            raise SettingError(
                "DEVICE=cuda, but torch sees none: use DEVICE=cpu, or a CUDA build of torch"
            )
        if deterministic:  # operations without a deterministic form warn
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.device = torch.device("cpu")
        if torch.cuda.is_available() and device != "cpu":
            self.device = self.cuda_device(place.local_rank)
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            # newer versions want newer names of functions, which PyTorch 2.11 does not have
            warnings.filterwarnings("ignore", message="`torch.distributed")
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist_backend.init_process_group(backend)

    @staticmethod
    def cuda_device(local_rank):
        """This rank's GPU. Raises SettingError if the host has fewer."""
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise SettingError(f"LOCAL_RANK={local_rank}, but this host has {count} GPUs")
        return torch.device("cuda", local_rank)

    def place_in_group(self):
        """Place of this process as torchrun's environment says, or that of a single process.

        Raises SettingError if the variables contradict each other: a RANK left over from another
        run would train without log and files.
        """
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
        given = {name: os.environ[name] for name in names if name in os.environ}
        # some clusters always set MASTER_ADDR and MASTER_PORT: alone they mean nothing
        if not {*names[:3]} & {*given}:
            self.note_other_launchers()
            return Place(0, 1, 0)

        advice = "unset all of these for a run of one process, or start it with torchrun"
        listed = " ".join(f"{name}={value}" for name, value in given.items())

        def check_present(needed):
            missing = [name for name in needed if name not in given]
            if missing:
                raise SettingError(
                    f"the environment has {listed}, but not {', '.join(missing)}: {advice}"
                )

        check_present(names[:3])
        try:
            place = Place(*(int(given[name]) for name in names[:3]))
        except ValueError:
            raise SettingError(f"{listed}: these must be whole numbers: {advice}") from None
        if not 0 <= place.local_rank <= place.rank < place.world_size:
            raise SettingError(
                f"{listed}: LOCAL_RANK is at most RANK, which is below WORLD_SIZE: {advice}"
            )
        if place.world_size > 1:
            check_present(names[3:])
            if not given["MASTER_PORT"].isdecimal():
                raise SettingError(f"{listed}: MASTER_PORT must be a number: {advice}")
        return place

    def note_other_launchers(self):
        """Notes that a cluster's launcher started several processes, but not through torchrun."""
        for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            value = os.environ.get(name, "1")
            if value != "1":
                self.notes.append(
                    f"{name}={value}, but RANK is not set: this is a run of one process"
                )

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
        if self.world_size > 1 and tensors:
            flat = self.all_reduce(torch.cat([t.reshape(-1) for t in tensors]))
            sums = flat.split([t.numel() for t in tensors])
            for tensor, total in zip(tensors, sums, strict=True):
                tensor.copy_(total.view_as(tensor))

    def reduce_scatter(self, full):
        """(n world, ...) on every rank -> handle, (n, ...): this rank's slice of the sum, ready
        after handle.wait().
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
        if self.world_size > 1:
            dist_backend.destroy_process_group()


class Place(NamedTuple):
    """Where a process stands in its group."""

    rank: int
    world_size: int
    local_rank: int  # on its host: the number of its GPU


class Guard:
    """Hooks for what may watch a run from outside: tools/guard.py, which find_guard looks for.

    Without it these take its place: they do nothing, or refuse what needs the real guard.
    """

    def read_preset(self, name):
        """Called by Hyperparameters.from_env when PRESET is set -> {NAME: value}.

        Raises SettingError.
        """
        raise SettingError(f"PRESET={name} needs tools/guard.py and presets/ beside this file")

    def start(self, dist):
        """Called when the process group is up."""

    def check(self, hp, dist, prepared):
        """Called as the last check, before anything is written -> words for the log.

        prepared: Prepared, with None where an earlier check failed. Raises SettingError.
        """
        if hp.resume or hp.checkpoint_every:
            raise SettingError("RESUME and CHECKPOINT_EVERY need tools/guard.py beside this file")
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
            "note: no tools/guard.py beside this file: no training states, no watchdog, no checks"
            " of the machine; code_bytes are those of this file"
        ]

    def submission(self, script, hp):
        """Called with the bytes of this file -> bytes of the file that counts as the code."""
        return script

    def commit(self):
        """Called for RESULT -> commit of the checkout, None if unknown."""

    def enter_stage(self, name):
        """Called when a stage begins, and again when it goes on after one inside it."""

    def show(self, name, start, share, detail):
        """Called many times during a stage, with its start (perf_counter) and the share done."""

    def clear(self):
        """Called before a line is printed."""

    def resume(self, trainer):
        """Called when training begins -> steps, seconds and losses that are already done."""
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
    path = Path(__file__).with_name("tools") / "guard.py"
    if PACKED or not path.exists():
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


class LossyStream:
    """Standard output or error that drops what it cannot write.

    A lost terminal (closed pipe, full disk, broken connection) changes neither the run nor its exit
    code; the log file has every line.
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
        self.running = None  # name and start of the current stage
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

    def live(self, share, detail=""):
        """Shows the share of the current stage that is done."""
        if self.running:
            self.guard.show(*self.running, share, detail)

    @contextlib.contextmanager
    def stage(self, name):
        """Context manager that times a stage of the run, including its device work."""
        self.dist.synchronize()
        start = time.perf_counter()
        graphs_before = compiled_graphs()
        outer = self.running
        self.running = name, start
        self.guard.enter_stage(name)
        self.live(0.0)
        yield
        self.dist.synchronize()
        self.running = outer
        # until the next stage begins, this one is still the current one
        self.guard.enter_stage(outer[0] if outer else name)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)
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

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024


def load_data_shard(path):
    """File -> (n,) uint16, memory-mapped.

    Raises DataError on a wrong magic, version or size (format: README, data).
    """
    header = np.fromfile(path, "<i4", 3).tolist()
    expected = [SHARD_MAGIC, SHARD_VERSION, (os.path.getsize(path) - SHARD_HEADER_BYTES) / 2]
    if header != expected:
        raise DataError(
            f"{path}: magic, version and tokens {header} are not {expected}: no shard, or torn;"
            " fetch it again"
        )
    try:
        return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EINVAL):
            raise
        # this file system cannot map files
        return np.fromfile(path, "<u2", offset=SHARD_HEADER_BYTES)


class MappedShards:
    """Shards as a sequence of arrays. Few are mapped at a time, as each map keeps a file open."""

    def __init__(self, paths):
        self.paths = paths
        self.load = lru_cache(64)(load_data_shard)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        return self.load(self.paths[number])


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
        self.shards = MappedShards(self.paths)
        self.offsets = np.concatenate([[0], np.cumsum([len(shard) for shard in self.shards])])
        # the stream is this part of the shards
        self.first = 0
        self.size = int(self.offsets[-1])
        if self.size == 0 or self.read(0, 1)[0] != BOS_ID:
            raise DataError(
                f"{self.paths[0]}: the stream must start with BOS (id {BOS_ID}); rebuild the data"
            )

    def read(self, start, count):
        """(count,) uint16 from position `start`; after the last token comes the first."""
        parts = []
        start %= self.size
        while count > 0:
            position = self.first + start
            shard = int(np.searchsorted(self.offsets, position, side="right")) - 1
            begin = position - self.offsets[shard]
            part = self.shards[shard][begin : begin + min(count, self.size - start)]
            parts.append(part)
            count -= len(part)
            start = (start + len(part)) % self.size
        return np.concatenate(parts)

    def hold_out(self, count):
        """Cuts the last documents, at least `count` tokens, off the stream -> a stream of these."""
        border = self.size - count
        window = 1 << 16
        begins = np.zeros(0, np.int64)
        while border > 0 and not len(begins):
            first = max(0, border - window)
            begins = first + np.flatnonzero(self.read(first, border - first) == BOS_ID)
            border = first
        if not len(begins) or begins[-1] == 0:
            raise DataError(
                f"{self.paths[0]}: no document begins before the last {count} tokens: set"
                " QUANT_CHECK_ROWS=0"
            )
        cut = int(begins[-1])
        held_out = copy.copy(self)
        held_out.first = self.first + cut
        held_out.size = self.size - cut
        self.size = cut
        return held_out


def read_manifest(folder):
    """manifest.json of a dataset; {} if there is none.

    Raises DataError unless every field that is used later has its type.
    """
    try:
        manifest = json.loads(Path(folder, "manifest.json").read_text())
        hash(manifest.get("tokenizer", {}).get("sha256"))
        if manifest.get("format") == "caseops_shards":
            total = manifest["leaked_documents"] + len({**manifest["splits"]["val"]})
            for entry in manifest["files"].values():
                total += entry["values"] + len(entry["sha256"])
        return manifest
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{folder}/manifest.json is damaged ({error!r}): fetch or make the dataset again"
        ) from None


def leaked_documents(hp):
    """{"leaked_documents": number} for RESULT, {} if the dataset's manifest has no such count."""
    manifest = read_manifest(hp.data_path)
    return {name: manifest[name] for name in ("leaked_documents",) if name in manifest}


def check_data_settings(hp):
    """Raises DataError if the settings contradict the side-car or the manifest: the bytes would be
    wrong.
    """
    folder = Path(hp.data_path)
    manifest = read_manifest(folder)
    problems = []
    side_cars = sorted(folder.glob("fineweb_val_bytes_*.bin"))
    if side_cars and not hp.caseops_enabled:
        problems.append(
            f"{side_cars[0].name} holds the bytes of its tokens, which CASEOPS_ENABLED=0 would not"
            " read: set it to 1"
        )
    transform = manifest.get("text_transform")
    if transform and not hp.caseops_enabled:
        problems.append(
            f"its manifest says {transform}, whose tokens a tokenizer cannot count: set"
            " CASEOPS_ENABLED=1"
        )
    if "text_transform" in manifest and not transform and hp.caseops_enabled:
        problems.append(
            "its manifest says that the text was not transformed: set CASEOPS_ENABLED=0"
        )
    size = manifest.get("tokenizer", {}).get("vocab_size", hp.vocab_size)
    if size != hp.vocab_size:
        problems.append(f"its manifest says VOCAB_SIZE={size}, not {hp.vocab_size}")
    if problems:
        raise DataError(f"{folder}: {'; '.join(problems)}")


def check_manifest(hp, counts):
    """Raises DataError if the dataset is not the one that its manifest describes.

    counts: {name: number} of the validation files. These files are hashed, too; of training files
    only the length is checked, as hashing takes minutes (`prepare_caseops_data.py verify` does it).
    """
    manifest = read_manifest(hp.data_path)
    if manifest.get("format") != "caseops_shards":
        return
    problems = []
    stated = manifest["splits"]["val"]
    for name, count in counts.items():
        if stated.get(name) != count:
            problems.append(f"{count} {name} of validation, not {stated.get(name)}")
    files = manifest["files"]
    paths = {path.name: path for path in Path(hp.data_path).glob("fineweb_*.bin")}
    problems += [f"{name} is missing" for name in files.keys() - paths.keys()]
    for name, path in paths.items():
        same = name in files and len(load_data_shard(path)) == files[name]["values"]
        if same and "_val_" in name:
            same = hashlib.sha256(Path(path).read_bytes()).hexdigest() == files[name]["sha256"]
        if not same:
            problems.append(f"{name} is another file")
    # a few documents occur twice in the sources; many mean a wrong split
    leaked = manifest["leaked_documents"]
    if leaked > 0.01 * counts["documents"]:
        problems.append(f"{leaked} training documents are validation documents")
    if problems:
        raise DataError(
            f"{hp.data_path} is not what its manifest says: {'; '.join(sorted(problems)[:5])}."
            " Fetch or make it again; prepare_caseops_data.py verify says more"
        )


# FineWeb's validation set in CaseOps: documents, tokens, targets in full windows of 2,048 tokens,
# bytes of these targets
CANONICAL = 50_000, 47_853_344, 47_851_520, 151_074_499


def is_canonical(tokens, charges):
    """Whether (N,) tokens, with their bytes, are the contest's validation documents in CaseOps."""
    documents = int((tokens == BOS_ID).sum())
    targets = CANONICAL[2]
    size = int(charges[1 : targets + 1].sum(dtype=np.int64))
    return (documents, len(tokens), targets, size) == CANONICAL


class Row(NamedTuple):
    """One packed row on the device."""

    inputs: Tensor  # (1, T) int64
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (N + 1,) int32: where each document or piece starts, padded by repeating T


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
    the row is cut into pieces of `longest` instead, which must be at most `most`.
    """
    count = len(starts)
    if count <= most:
        return starts
    borders = [*starts.tolist(), total]
    following = [*range(1, count + 1)]
    previous = [*range(-1, count)]
    merged = [False] * count  # with the piece before

    def pair(first):
        """Sort key of a piece and the one that follows: common length, start, piece."""
        end = borders[following[following[first]]]
        return end - borders[first], borders[first], first

    # a heap, as searching all pairs for each merge takes seconds for rows of short documents
    pairs = [pair(first) for first in range(count - 1)]
    heapq.heapify(pairs)
    left = count
    while left > most and pairs and pairs[0][0] <= longest:
        length, _, first = heapq.heappop(pairs)
        second = following[first]
        if merged[first] or second == count or pair(first)[0] != length:
            continue  # this entry is outdated: one of the two has grown or is gone
        after = following[second]
        merged[second] = True
        left -= 1
        following[first] = after
        previous[after] = first
        if after < count:
            heapq.heappush(pairs, pair(first))
        if previous[first] >= 0:
            heapq.heappush(pairs, pair(previous[first]))
    if left > most:
        return np.arange(0, total, longest)
    return starts[~np.array(merged)]


def pad_cu_seqlens(starts, total, entries):
    """Segment starts -> (entries + 1,) int32, padded with `total`: one graph serves every row."""
    if len(starts) > entries:
        raise DataError(
            f"a row holds {len(starts)} documents and pieces, more than {entries}: raise"
            " MAX_ROW_SEGMENTS"
        )
    padding = np.full(entries + 1 - len(starts), total)
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


@lru_cache
def space_id(hp):
    """The id of a lone space."""
    return load_tokenizer(hp).piece_to_id("\u2581")


class TrainLoader:
    """Packed training rows by number.

    Row i holds T tokens, from the first document that begins in span i of the stream. A step of n
    micro-steps takes rows [step n, (step + 1) n), of which rank r takes the r-th share: any world
    size trains on the same rows. BALANCE_ROWS redistributes a step's documents over its rows, as
    ranks wait for the one with the most attention. A span is as long as a row before fusion.
    DATA_SEED shuffles the spans in each epoch. The loader has no state except what it has read
    ahead, so the number of a step restores it exactly.
    """

    def __init__(self, stream, hp, dist):
        self.stream = stream
        self.hp = hp
        self.dist = dist
        if hp.doc_shuffle_enabled:
            stream.shards = techniques.ShuffledShards(stream.shards, hp.data_seed)
        micro_steps = hp.train_batch_tokens / hp.micro_batch_tokens
        if micro_steps % dist.world_size:
            raise SettingError(
                f"{micro_steps:g} micro-batches a step (TRAIN_BATCH_TOKENS/MICRO_BATCH_TOKENS) do"
                f" not divide by {dist.world_size} ranks: change MICRO_BATCH_TOKENS"
            )
        self.per_rank = hp.micro_steps // dist.world_size
        self.span = hp.micro_batch_tokens
        if hp.marker_fusion_enabled:
            sample = stream.read(0, min(stream.size, 1 << 22)).astype(np.int64)
            fused = techniques.fuse_markers(hp, space_id, sample, sample)[0]
            self.span = self.span * len(sample) // len(fused)
        # at most a twentieth of the data
        self.held_out_rows = min(hp.quant_check_rows, stream.size // (20 * self.span))
        if self.held_out_rows:
            count = (self.held_out_rows - 1) * self.span + self.tokens_to_read
            self.held_out = stream.hold_out(count)
        self.thread = ThreadPoolExecutor(1)
        self.ahead = {}  # row number -> future of a row that is read ahead
        self.cached_rows = lru_cache(1)(self.rows_of_step)

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
        """Tokens of the stream that fill a row and its last target, even if all are fused."""
        return (self.hp.micro_batch_tokens + 1) * (1 + self.hp.marker_fusion_enabled)

    def read_rows(self, stream, starts):
        """(2, n, T): inputs and targets of the rows that begin at n positions of a stream."""
        hp = self.hp
        rows = np.stack([stream.read(start, self.tokens_to_read) for start in starts])
        if rows.max() >= hp.vocab_size:
            raise DataError(f"training token {rows.max()} is outside VOCAB_SIZE={hp.vocab_size}")
        if hp.marker_fusion_enabled:
            rows = np.int64(rows)
            fused = [techniques.fuse_markers(hp, space_id, row, row)[0] for row in rows]
            rows = np.stack([row[: hp.micro_batch_tokens + 1] for row in fused])
        return np.stack([rows[:, :-1], rows[:, 1:]])

    def rows_of_step(self, step):
        """(2, n, T): inputs and targets of the n rows of a step over all ranks."""
        first = step * self.hp.micro_steps
        starts = [self.row_offset(first + number) for number in range(self.hp.micro_steps)]
        tokens = self.read_rows(self.stream, starts)
        return balance_documents(tokens, self.hp.train_seq_len) if self.hp.balance_rows else tokens

    def build(self, index):
        """Row `index` as CPU tensors, pinned for CUDA."""
        step, number = divmod(index, self.hp.micro_steps)
        return self.pack(self.cached_rows(step)[:, number])

    def held_out_row(self, index):
        """Row `index` of those that neither training nor the Hessians see, on the device."""
        row = self.pack(self.read_rows(self.held_out, [index * self.span])[:, 0])
        return Row(*(t.to(self.dist.device) for t in row))

    def pack(self, tokens):
        """(2, T): inputs and targets of a row -> Row of CPU tensors, pinned for CUDA."""
        hp = self.hp
        length = hp.micro_batch_tokens
        inputs, targets = tokens.astype(np.int64)
        starts = np.union1d(0, np.flatnonzero(inputs == BOS_ID))
        ends = np.append(starts[1:], length)
        pieces = cut_pieces(starts, ends, hp.train_seq_len)
        pieces = join_shortest(pieces, length, hp.train_seq_len, hp.row_segments)
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
        return Row(*(t.to(self.dist.device, non_blocking=True) for t in row))

    def step(self, step):
        """Yields this rank's rows of a step."""
        first = step * self.hp.micro_steps + self.dist.rank * self.per_rank
        last = first + self.per_rank - 1
        for index in range(first, last):
            yield self.row(index, index + 1)
        yield self.row(last, first + self.hp.micro_steps)


class ValidationSet:
    """The validation stream.

    tokens: (N,); bytes: (N,), charged to each token; starts, ends: input spans [start, end) of the
    documents; summary: words for the log. The targets of a document are its tokens after BOS and
    the BOS that follows it, so every token but the first is the target of exactly one document.
    Raises DataError if anything is wrong with the files.
    """

    def __init__(self, hp, tokenizer=None):
        stream = TokenStream(hp.data_path, "val")
        check_data_settings(hp)
        self.tokens = stream.read(0, stream.size).astype(np.int64)
        largest = self.tokens.max()
        if largest >= hp.vocab_size:
            raise DataError(f"validation token {largest} is outside VOCAB_SIZE={hp.vocab_size}")
        if hp.caseops_enabled:
            self.bytes = self.side_car(hp.data_path, stream)
        else:
            tokenizer = tokenizer or load_tokenizer(hp)
            check_byte_counts(hp, tokenizer, self.tokens)
            count, leading, boundary = techniques.piece_byte_tables(tokenizer)
            self.bytes = count[self.tokens]
            self.bytes[1:] += leading[self.tokens[1:]] & ~boundary[self.tokens[:-1]]
        if len(self.tokens) < 2:
            raise DataError(f"{stream.paths[0]}: a validation stream needs two tokens at least")
        self.summary = self.check(hp)
        if hp.marker_fusion_enabled:
            self.tokens, self.bytes = techniques.fuse_markers(hp, space_id, self.tokens, self.bytes)
        if not self.bytes[1:].any():
            raise DataError(
                f"{stream.paths[0]}: the validation documents hold no byte of text: no BPB can be"
                " counted"
            )
        self.starts = np.flatnonzero(self.tokens == BOS_ID)
        # no BOS follows the last document
        self.ends = np.append(self.starts[1:], len(self.tokens) - 1)

    def check(self, hp):
        """Compares the stored stream with the manifest -> words for the log. Raises DataError."""
        documents = int((self.tokens == BOS_ID).sum())
        size = int(self.bytes.sum())
        counts = {"documents": documents, "tokens": len(self.tokens)}
        if hp.caseops_enabled:
            counts["charged_bytes"] = size
        check_manifest(hp, counts)
        canonical = "yes" if is_canonical(self.tokens, self.bytes) else "no"
        return f"documents:{documents} values:{len(self.bytes)} bytes:{size} canonical:{canonical}"

    def side_car(self, folder, stream):
        """(N,) int64 bytes of each token.

        Raises DataError if the side-car is missing, has another length, or charges a BOS.
        """
        paths = shard_paths(folder, "val_bytes")
        if not paths:
            raise DataError(f"no fineweb_val_bytes_*.bin in {folder}: BPB needs the side-car")
        parts = [load_data_shard(path) for path in paths]
        lengths = [len(part) for part in parts]
        expected = [len(shard) for shard in stream.shards]
        if lengths != expected:
            raise DataError(
                f"{paths[0]}: side-car lengths {lengths} differ from the shards' {expected}: they"
                " are not of one export"
            )
        charges = np.concatenate(parts).astype(np.int64)
        if charges[self.tokens == BOS_ID].any():
            raise DataError(
                f"{paths[0]}: a BOS is charged bytes; the side-car does not belong to these tokens"
            )
        return charges

    def targets_of(self, documents):
        """Array of document numbers -> number of their targets, bytes of these."""
        sums = np.concatenate([[0], np.cumsum(self.bytes)])
        starts = self.starts[documents]
        ends = self.ends[documents]
        num_bytes = sums[ends + 1] - sums[starts + 1]
        return int((ends - starts).sum()), int(num_bytes.sum())


def models_near(folder, nearest):
    """SentencePiece models in and around a dataset's folder, in order of distance.

    nearest: only those of the closest place that has any. Raises DataError if that place has
    several different ones, as nothing says which of them made the shards.
    """
    parents = folder.parent, folder.parent.parent, Path(__file__).parent
    places = [folder, *(parent / "tokenizers" for parent in parents)]
    groups = [sorted(place.glob("*.model")) for place in places]
    if not nearest:
        return sum(groups, [])
    closest = next((group for group in groups if group), [])
    if len({path.read_bytes() for path in closest}) > 1:
        names = ", ".join(str(path) for path in closest)
        raise DataError(
            f"{folder}: no manifest names its tokenizer, there are several ({names}): set"
            " TOKENIZER_PATH"
        )
    return closest


def has_case_markers(tokenizer):
    """Whether pieces 4 to 7 are CaseOps' markers, which stand for no text (lossless_caps.py)."""
    return [tokenizer.id_to_piece(token) for token in range(4, 8)] == [*"\ue001\ue002\ue003\ue004"]


def check_byte_counts(hp, tokenizer, tokens):
    """Raises DataError unless this tokenizer, which will count the bytes of tokens (N,), made them.

    Without a side-car the tokenizer decides the BPB, and another one of the same size would raise
    no error. So the text of some documents is encoded again: only the right tokenizer gives back
    their tokens.
    """
    if has_case_markers(tokenizer) and ((tokens >= 4) & (tokens < 8)).any():
        raise DataError(
            f"{hp.data_path}: its tokens hold CaseOps' markers: set CASEOPS_ENABLED=1, with the"
            " side-car"
        )
    max_documents = 256
    max_tokens = 512
    starts = np.flatnonzero(tokens == BOS_ID)[:max_documents] + 1
    ends = np.append(starts[1:] - 1, len(tokens))[: len(starts)]
    same = 0
    total = 0
    for start, end in zip(starts, np.minimum(ends, starts + max_tokens), strict=True):
        ids = tokens[start:end].tolist()
        # cutting a document changes the tokens before the cut
        compared = len(ids) if len(ids) < max_tokens else max_tokens - 64
        encoded = tokenizer.encode(tokenizer.decode(ids))
        same += compared * (encoded[:compared] == ids[:compared])
        total += compared
    # even the right one does not restore every text: unknown characters, odd spaces
    if 2 * same < total:
        raise DataError(
            f"{hp.data_path}: its tokens were not made by the tokenizer found for them, which gives"
            f" back {same} of {total} when their text is encoded again: set TOKENIZER_PATH to the"
            " shards' own"
        )


def find_tokenizer(hp):
    """Path of the data's SentencePiece model.

    Raises DataError if none fits the settings and the manifest.
    """
    if sentencepiece is None:
        raise DataError("the sentencepiece package is missing: pip install -r requirements.txt")
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
        f"no tokenizer for {folder} (the manifest wants sha256 {wanted}; looked at"
        f" {[str(path) for path in candidates]}): set TOKENIZER_PATH"
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
    if hp.marker_fusion_enabled and not has_case_markers(tokenizer):
        raise DataError(
            f"{path}: pieces 4 to 7 are not CaseOps' markers: set MARKER_FUSION_ENABLED=0"
        )


def load_tokenizer(hp):
    """The data's SentencePiece model."""
    return sentencepiece.SentencePieceProcessor(model_file=str(find_tokenizer(hp)))


# ---- KERNELS -------------------------------------------------------------------------------------
# Each operation is written twice, with the same signature: the reference (`*_ref`,
# `attention_sdpa`) defines it on any device, in any dtype, and is differentiated by autograd; the
# fast version is a custom op, which torch.compile treats as one node. `*_trial_inputs` makes the
# arguments with which select_ops tries the fast version against the reference.
#
# Kernels read no Python global and contain no True/False/None, because a minifier may move those
# to module level, where Triton refuses them. Only annotations that are read at run time are
# written (tl.constexpr, the schemas of custom ops), because the minifier keeps them all.


def jit(kernel):
    """triton.jit; without Triton the kernels are defined but never launched."""
    return kernel if triton is None else triton.jit(kernel)


@jit
def load_f32(pointers, mask):
    """tl.load as float32, 0 where masked; tl.store casts back by itself."""
    return tl.load(pointers, mask, 0.0).to(tl.float32)


def trial_tensors(device, dtype, *shapes):
    """Tensors of normal numbers that require gradients, for the trials of select_ops.

    They are the same at every call, and the random state of the run stays as it is.
    """
    generator = torch.Generator(device).manual_seed(0)
    tensors = []
    for shape in shapes:
        numbers = torch.randn(shape, generator=generator, device=device)
        tensors.append(numbers.to(dtype).requires_grad_())
    return tensors


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


def cross_entropy_trial_inputs(hp, device, dtype):
    h, weight = trial_tensors(device, dtype, (200, 64), (1000, 64))
    targets = torch.arange(0, 1000, 5, device=device)
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


@torch.library.custom_op("golf::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """Losses (N,), and the gradient (N, V) of each row's loss with respect to its logits."""
    logits = h @ weight.T
    losses = _launch_ce(logits, targets, softcap)
    return losses, logits


@_linear_cross_entropy.register_fake
def _linear_cross_entropy_fake(h, weight, targets, softcap):
    rows = h.shape[0]
    return h.new_empty(rows, dtype=torch.float32), h.new_empty(rows, weight.shape[0])


def _linear_cross_entropy_setup(ctx, inputs, output):
    h, weight, *_ = inputs
    ctx.set_materialize_grads(False)  # or autograd fills zeros for the second output
    ctx.save_for_backward(h, weight, output[1])


def _linear_cross_entropy_gradients(ctx, grad, _):
    """Gradients of h and weight, from grad (N,) of the losses."""
    if grad is None:
        return None, None, None, None
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


def mlp_trial_inputs(hp, device, dtype):
    x, w_up, w_down = trial_tensors(device, dtype, (200, 64), (320, 64), (64, 320))
    return x, w_up / 8, w_down / 18, 0.3


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


@torch.library.custom_op("golf::mlp_backward", mutates_args=())
def _mlp_backward(grad: Tensor, w_down: Tensor, act: Tensor, slope: float) -> Tensor:
    """Gradient (M, F) of the pre-activation, from grad (M, D) of the output."""
    return _launch_mlp(grad, w_down, act, slope)


@_mlp_backward.register_fake
def _mlp_backward_fake(grad, w_down, act, slope):
    return torch.empty_like(act)


@torch.library.custom_op("golf::mlp", mutates_args=())
def _mlp(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Output (M, D), and the activation (M, F) that backward needs, of x (M, D)."""
    act = _launch_mlp(x, w_up, None, slope)
    return act @ w_down.T, act


@_mlp.register_fake
def _mlp_fake(x, w_up, w_down, slope):
    rows = x.shape[0]
    return x.new_empty(rows, w_down.shape[0]), x.new_empty(rows, w_up.shape[0])


def _mlp_setup(ctx, inputs, output):
    *tensors, ctx.slope = inputs
    ctx.set_materialize_grads(False)  # or autograd fills zeros for the activation
    ctx.save_for_backward(*tensors, output[1])


def _mlp_gradients(ctx, grad, _):
    if grad is None:
        return None, None, None, None
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
    # the square does not see the sign of the slope
    out = _mlp(x.reshape(-1, width), w_up, w_down, abs(slope))[0]
    return out.view(x.shape)


# --- around attention: before it, q and k get a norm for each head, partial rotary positions and q
# its gain; behind it, XSA takes its own value's part out of each head's output, and a gate scales
# it. Rows of the tiles are heads.


def norm(x):
    """(..., D) -> (..., D): RMS norm without a weight, eps of F.rms_norm for float32."""
    return F.rms_norm(x, (x.size(-1),), eps=1.19e-7)


def apply_rotary_emb(x, cos, sin):
    """(B, T, H, E) -> the same: rotates dims i and i + rope_dims/2 of the first rope_dims
    (partial RoPE).
    """
    cos, sin, half = cos.to(x.dtype), sin.to(x.dtype), cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)


def qkv_heads_ref(qkv, gain, cos, sin, kv_heads):
    """qkv (B, T, (H + 2 K) E), gain (H,), cos, sin ([B,] T, 1, rope_dims / 2) -> q (B, T, H,
    E), k, v (B, T, K, E).
    """
    heads = gain.numel(), kv_heads, kv_heads
    q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(heads, dim=-2)
    return (
        apply_rotary_emb(norm(q), cos, sin) * gain[:, None],
        apply_rotary_emb(norm(k), cos, sin),
        v,
    )


def qkv_heads_trial_inputs(hp, device, dtype):
    heads = hp.num_heads + 2 * hp.num_kv_heads
    qkv, gain = trial_tensors(device, dtype, (1, 256, heads * hp.head_dim), (hp.num_heads,))
    frequencies = torch.tensor([1.0, 0.03], device=device)
    angles = torch.arange(256, device=device)[:, None, None] * frequencies
    return qkv, gain, angles.cos(), angles.sin(), hp.num_kv_heads


def gated_xsa_ref(y, v, logits, factor):
    """y (B, T, H, E), v (B, T, K, E), logits (B, T, H) -> XSA (arXiv:2603.09078) times factor
    sigmoid(logits).
    """
    return subtract_own_value(y, v) * (factor * torch.sigmoid(logits))[..., None]


def gated_xsa_trial_inputs(hp, device, dtype):
    queries = (1, 256, hp.num_heads, hp.head_dim)
    values = (1, 256, hp.num_kv_heads, hp.head_dim)
    y, v, logits = trial_tensors(device, dtype, queries, values, queries[:3])
    return y, v, logits, 2.0


def subtract_own_value(y, v):
    """(B, T, H, E), (B, T, K, E) -> (B, T, H, E), heads' outputs without the part along their
    own value.
    """
    v_hat = F.normalize(v, dim=-1)[:, :, :, None]  # (B, T, K, 1, E)
    grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, K, H/K, E)
    return (grouped - (grouped * v_hat).sum(-1, keepdim=True) * v_hat).flatten(2, 3)


def _launch_rows(kernel, tensors, rows, E, warps, *sizes, **constants):
    """kernel on rows of E numbers, 1,024 numbers a program; its arguments: tensors, rows,
    sizes, constants.
    """
    block_e = triton.next_power_of_2(E)
    block = max(1, 1024 // block_e)
    if rows > 0:
        kernel[(triton.cdiv(rows, block),)](
            *(t.contiguous() for t in tensors),
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
    out,
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
    """forward: qkv -> q, k, v.

    backward: q, k, v hold their gradients; out is that of qkv, dots sum to that of gain.
    """
    row, e = (
        tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK),
        tl.arange(0, BLOCK_E)[None, :],
    )
    token, head = row // (H + 2 * K), row % (H + 2 * K)
    is_q, is_v, inside = head < H, (head >= H + K)[:, None], (row < rows)[:, None] & (e < E)
    # what turns, and with
    turning, partner = inside & (e < 2 * HALF), tl.where(e < HALF, e + HALF, e - HALF)
    split = tl.where(
        head < H + K, k + (token * K + head - H) * E, v + (token * K + head - H - K) * E
    )
    split = tl.where(is_q, q + (token * H + head) * E, split)[:, None]
    joint = row[:, None] * E
    angle = (token % T)[:, None] * HALF + e % HALF
    c = tl.load(cos + angle, mask=turning, other=1.0)
    s = load_f32(sin + angle, turning) * tl.where(e < HALF, 1.0, -1.0)
    x = load_f32(qkv + joint + e, inside)
    scale = tl.rsqrt(tl.sum(x * x, 1) / E + 1.19e-7)[:, None]
    gained = scale * tl.load(gain + head, mask=is_q, other=1.0).to(tl.float32)[:, None]
    if BACKWARD:
        g = load_f32(split + e, inside)
        turned = g * c - s * load_f32(split + partner, turning)  # transposed rotation
        dot = tl.sum(x * scale * turned, 1)
        d = tl.where(is_v, g, gained * (turned - x * scale * (dot / E)[:, None]))
        tl.store(out + joint + e, d, inside)
        tl.store(dots + token * H + head, dot, is_q & (row < rows))
    else:
        turned = x * c + s * load_f32(qkv + joint + partner, turning)
        tl.store(split + e, tl.where(is_v, x, turned * gained), inside)


def _launch_qkv_heads(inputs, heads, grads=()):
    """inputs qkv, gain, cos, sin; heads q, k, v: fills these or, backward, grads: that of qkv,
    and of gain per row.
    """
    (qkv, _, cos, _), (H, E) = inputs, heads[0].shape[2:]
    _launch_rows(
        _qkv_heads_kernel,
        (*inputs, *heads, *(grads or (qkv, qkv))),
        qkv.numel() // E,
        E,
        1,
        cos[..., 0].numel(),
        H=H,
        K=heads[1].shape[2],
        HALF=cos.shape[-1],
        BACKWARD=bool(grads),
    )


def _new_heads(qkv, gain, cos, sin, kv_heads):
    """Empty q, k, v."""
    H = gain.numel()
    E = qkv.shape[-1] // (H + 2 * kv_heads)
    return tuple(qkv.new_empty(*qkv.shape[:2], heads, E) for heads in (H, kv_heads, kv_heads))


@golf_op(
    lambda dq, dk, dv, qkv, *_: (
        qkv.new_empty(qkv.shape),
        dq.new_empty(dq.shape[:3], dtype=torch.float32),
    )
)
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
    grad, dots = qkv.new_empty(qkv.shape), dq.new_empty(dq.shape[:3], dtype=torch.float32)
    _launch_qkv_heads((qkv, gain, cos, sin), (dq, dk, dv), (grad, dots))
    return grad, dots


def _qkv_heads_gradients(needed, *grads_and_saved):
    grad, dots = _qkv_heads_backward(*grads_and_saved)
    return grad, dots.sum((0, 1)).to(grad.dtype) if needed[1] else None


@golf_op(_new_heads, _qkv_heads_gradients, lambda needed, *tensors: tensors[:4], results=3)
def qkv_heads(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, T, (H + 2 K) E), gain (H,), cos and sin (T, 1, rope_dims / 2) -> q (B, T, H, E),
    k, v (B, T, K, E).
    """
    heads = _new_heads(qkv, gain, cos, sin, kv_heads)
    _launch_qkv_heads((qkv, gain, cos, sin), heads)
    return heads


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
    """A row is a key/value head, with the GROUP query heads that share it.

    backward: out is the gradient of y.
    """
    row, e = (
        tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK),
        tl.arange(0, BLOCK_E)[None, :],
    )
    inside = (row < rows)[:, None] & (e < E)
    v_hat = load_f32(v + row[:, None] * E + e, inside)
    inverse = 1 / tl.maximum(tl.sqrt(tl.sum(v_hat * v_hat, 1)), 1e-12)[:, None]
    v_hat *= inverse
    d_hat = tl.zeros((BLOCK, BLOCK_E), dtype=tl.float32)
    for i in tl.static_range(GROUP):
        head = row * GROUP + i
        at = head[:, None] * E + e
        x = load_f32(y + at, inside)
        gate = tl.sigmoid(load_f32(logits + head, row < rows))
        along = tl.sum(x * v_hat, 1)[:, None]
        z = x - along * v_hat
        if BACKWARD:
            g = FACTOR * load_f32(grad + at, inside)
            slope = gate * (1 - gate) * tl.sum(g * z, 1)
            tl.store(dlogits + head, slope, row < rows)
            g *= gate[:, None]
            g_along = tl.sum(g * v_hat, 1)[:, None]
            d_hat -= along * g + g_along * x
            z = g - g_along * v_hat
        else:
            z *= FACTOR * gate[:, None]
        tl.store(out + at, z, inside)
    if BACKWARD:
        d = inverse * (d_hat - tl.sum(d_hat * v_hat, 1)[:, None] * v_hat)
        tl.store(dv + row[:, None] * E + e, d, inside)


def _launch_gated_xsa(inputs, outs, factor, grad=None):
    """inputs y, v, logits: fills outs with the output alone or, given its gradient, with those
    of the inputs.
    """
    y, v, _ = inputs
    tensors = (*inputs, y, *outs, y, y) if grad is None else (*inputs, grad, *outs)
    _launch_rows(
        _gated_xsa_kernel,
        tensors,
        v.numel() // v.shape[-1],
        v.shape[-1],
        4,
        FACTOR=factor,
        GROUP=y.shape[-2] // v.shape[-2],
        BACKWARD=grad is not None,
    )


@golf_op(lambda grad, *inputs: tuple(t.new_empty(t.shape) for t in inputs[:3]))
def _gated_xsa_backward(
    grad: Tensor, y: Tensor, v: Tensor, logits: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(t.new_empty(t.shape) for t in (y, v, logits))
    _launch_gated_xsa((y, v, logits), grads, factor, grad)
    return grads


@golf_op(
    lambda y, *_: (y.new_empty(y.shape), y.new_empty(0)),
    lambda needed, *saved: _gated_xsa_backward(*saved),
    lambda needed, *tensors: tensors[:3],
)
def gated_xsa(y: Tensor, v: Tensor, logits: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """y (B, T, H, E), v (B, T, K, E), logits (B, T, H) -> XSA (arXiv:2603.09078) times factor
    sigmoid(logits).
    """
    out = y.new_empty(y.shape)
    _launch_gated_xsa((y, v, logits), (out,), factor)
    return out, y.new_empty(0)


# --- entry of a slot: the stream merges with a skip, mixes with x0, and is normed. The compiler
# fuses the forward pass well; backward it joins the sums over tokens of several slots in kernels
# that spill registers: here one kernel a slot.


def enter_ref(x, x0, mix, scale, window, wants, *merge):
    """x, x0 (B, T, D), mix (2, D), scale (1,), perhaps skip (B, T, D), weight (D,), perhaps gate
    (D,)
    -> scaled norm of the mix, its first `window` columns, the mix, and what x merged into; of these
    two None if not in wants.
    """
    if merge:
        skip, weight, *gate = merge
        scaled = weight.to(x.dtype) * skip
        x = torch.lerp(scaled, x, torch.sigmoid(gate[0].to(x.dtype))) if gate else x + scaled
    x_in = mix[0] * x + mix[1] * x0
    h = (norm(x_in) * scale).to(x.dtype)
    return h, h[..., :window], x_in if wants[0] else None, x if wants[1] else None


def enter_trial_inputs(hp, device, dtype):
    stream = (200, 64)
    x, x0, skip, mix = trial_tensors(device, dtype, stream, stream, stream, (2, 64))
    weight, gate = trial_tensors(device, torch.float32, (64,), (64,))
    scale = torch.ones(1, device=device)
    return x, x0, mix, scale, 9, (True, True), skip, weight, gate


@jit
def _enter_kernel(
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
    """Gradients of x, x0, skip, and in `sums` a program's share of those of mix (both), weight
    and gate.
    """
    program, column = tl.program_id(0), tl.arange(0, BLOCK)[None, :]
    inside, factor = column < D, tl.load(scale)
    mix_x, mix_0 = load_f32(mix + column, inside), load_f32(mix + D + column, inside)
    # of the skip, of x and of the scaled skip in what they merge into
    w, share, rest = mix_x, 1.0, 1.0
    if MERGE:
        w = load_f32(weight + column, inside)
    if GATED:
        share = tl.sigmoid(load_f32(gate + column, inside))
        rest = 1 - share
    zero = tl.zeros((2, BLOCK), dtype=tl.float32)
    sum_x, sum_0, sum_w, sum_g = zero, zero, zero, zero
    # two rows, the next on their way
    for first in tl.range(2 * program, rows, 2 * tl.num_programs(0), num_stages=3):
        row = first + tl.arange(0, 2)[:, None]
        valid = inside & (row < rows)
        at, d, kept = row.to(tl.int64) * D + column, zero, zero
        x, e = load_f32(merged + at, valid), load_f32(x0 + at, valid)
        g = load_f32(d_h + at, valid) + load_f32(
            d_start + row * WINDOW + column, valid & (column < WINDOW)
        )
        if MIXED:
            d = load_f32(d_mixed + at, valid)
        if KEPT:
            kept = load_f32(d_merged + at, valid)
        if MERGE:
            other = load_f32(skip + at, valid)
        z = mix_x * x + mix_0 * e
        inverse = tl.rsqrt(tl.sum(z * z, 1) / D + 1.19e-7)[:, None]
        z, g = z * inverse, g * factor
        d += inverse * (g - z * (tl.sum(g * z, 1) / D)[:, None])
        sum_x += d * x
        sum_0 += d * e
        tl.store(d_x0 + at, d * mix_0, valid)
        d = d * mix_x + kept
        if MERGE:
            d_scaled = d * rest
            sum_w += d_scaled * other
            sum_g += d_scaled * (x - w * other)
            tl.store(d_skip + at, d_scaled * w, valid)
        tl.store(d_x + at, d * share, valid)
    sums += program * 4 * D + column
    tl.store(sums, tl.sum(sum_x, 0)[None, :], inside)
    tl.store(sums + D, tl.sum(sum_0, 0)[None, :], inside)
    tl.store(sums + 2 * D, tl.sum(sum_w, 0)[None, :], inside)
    tl.store(sums + 3 * D, tl.sum(sum_g, 0)[None, :], inside)


def _new_enter_grads(grads, merged, x0, mix, scale, merge, wants):
    """Empty gradients of x, x0, skip, and sums (programs, 4, D): 2 programs on a multiprocessor."""
    programs = (
        2 * torch.cuda.get_device_properties(x0.device).multi_processor_count if x0.is_cuda else 3
    )
    shapes = merged.shape, x0.shape, merge[0].shape if merge else (0,)
    return *map(x0.new_empty, shapes), x0.new_empty(programs, 4, x0.shape[-1], dtype=torch.float32)


@golf_op(_new_enter_grads)
def _enter_backward(
    grads: list[Tensor],
    merged: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    merge: list[Tensor],
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outs, D = _new_enter_grads(grads, merged, x0, mix, scale, merge, wants), x0.shape[-1]
    grads = [*grads[:2], grads[2] if wants[0] else merged, grads[-1] if wants[1] else merged]
    inputs = *grads, merged, x0, mix, scale, *merge, *[merged] * (3 - len(merge))
    block = triton.next_power_of_2(D)
    _enter_kernel[(len(outs[3]),)](
        *(t.contiguous() for t in inputs),
        *outs,
        merged.numel() // D,
        WINDOW=grads[1].shape[-1],
        MIXED=wants[0],
        KEPT=wants[1],
        MERGE=len(merge) > 0,
        GATED=len(merge) > 2,
        D=D,
        BLOCK=block,
        num_warps=block // 256 or 1,
    )
    return outs


def _open_enter(x, x0, mix, scale, merge, numbers):
    """enter_ref with [window, *wants] as numbers, empty where not wanted; the compiler traces
    it in place of _enter.
    """
    window, *wants = numbers
    h, start, *others = enter_ref(x, x0, mix, scale, window, (wants[0], wants[1] or merge), *merge)
    return h, start, *(x.new_empty(0) if t is None else t for t in others)


def _enter_gradients(needed, *args):
    grads, (merged, x0, mix, scale, *merge), (_, *wants) = args[:4], args[4:-1], args[-1]
    d_x, d_x0, d_skip, sums = _enter_backward(
        [*grads], merged, x0, mix, scale, merge, [want > 0 for want in wants]
    )
    d_mix, d_weight, d_gate = sums.sum(0).split((2, 1, 1))
    return (
        d_x,
        d_x0 if needed[1] else None,
        d_mix.to(mix.dtype),
        None,
        [d_skip, d_weight[0], d_gate[0]][: len(merge)],
    )


@golf_op(
    None,
    _enter_gradients,
    lambda needed, x, x0, mix, scale, merge, *results: (
        results[3] if merge else x,
        x0,
        mix,
        scale,
        *merge,
    ),
    results=4,
)
def _enter(
    x: Tensor, x0: Tensor, mix: Tensor, scale: Tensor, merge: list[Tensor], numbers: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, start, mixed, merged = _open_enter(x, x0, mix, scale, merge, numbers)
    return h, start.clone(), mixed, merged.clone()  # an operation returns neither inputs nor views


def enter(x, x0, mix, scale, window, wants, *merge):
    """As enter_ref, with one kernel for the gradients."""
    h, start, mixed, merged = _enter(x, x0, mix, scale, [*merge], [window, *map(int, wants)])
    return h, start, mixed if wants[0] else None, merged if wants[1] else None


# --- AdamW without first moment, in place: rows `source` (B,) of values and squares (N, n) into
# rows `target` (B,), one of which many may share, with gradient (B, n) times `scale`, correction
# (B,) of the bias, and rates lr, decay, beta2.


def adamw_rows_ref(values, squares, gradient, source, target, correction, scale, rates):
    (lr, decay, beta2), gradient = rates, scale * gradient.to(values.dtype)
    mean = torch.lerp(gradient * gradient, squares[source], beta2)
    denominator = (mean / correction[:, None]).sqrt() + 1e-10
    values[target] = values[source] * (1 - lr * decay) - lr * gradient / denominator
    squares[target] = mean
    return values, squares


def adamw_rows_trial_inputs(hp, device, dtype):
    values, roots = trial_tensors(device, torch.float32, (1000, 64), (1000, 64))
    (gradient,) = trial_tensors(device, dtype, (2, 64))
    source = torch.tensor([990, 3], device=device)
    target = torch.tensor([990, 500], device=device)
    correction = torch.tensor([0.1, 0.75], device=device)
    squares = roots.detach().square()
    rows = source, target, correction
    return values.detach(), squares, gradient.detach(), *rows, 2.0, (0.1, 0.5, 0.9)


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
    row, column = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    old = tl.load(source + row).to(tl.int64) * stride + column
    new = tl.load(target + row).to(tl.int64) * stride + column
    g = SCALE * load_f32(gradient + row.to(tl.int64) * width + column, inside)
    mean = BETA2 * load_f32(squares + old, inside) + (1 - BETA2) * g * g
    step = LR * g / (tl.sqrt(mean / tl.load(correction + row)) + 1e-10)
    tl.store(values + new, (1 - LR * DECAY) * load_f32(values + old, inside) - step, inside)
    tl.store(squares + new, mean, inside)


def adamw_rows(values, squares, gradient, source, target, correction, scale, rates):
    (rows, width), (lr, decay, beta2) = gradient.shape, rates
    if width:
        _adamw_kernel[(triton.cdiv(width, 1024), rows)](
            values,
            squares,
            *(t.contiguous() for t in (gradient, source, target, correction)),
            values.stride(0),
            width,
            SCALE=scale,
            LR=lr,
            DECAY=decay,
            BETA2=beta2,
            BLOCK=1024,
        )
    return values, squares


# --- attention over packed documents: causal within documents, scale 1/sqrt(E), query head h on KV
# head h // (H / K) Every backend: q (B, T, H, E), k and v (B, T, K, E), cu_seqlens (N + 1,) int32
# with B = 1, or None: each row is one document; -> (B, T, H, E). cu_seqlens may end in repetitions
# of T (empty documents). No document exceeds max_seqlen. attn_window: so many keys before a query's
# own are seen; 0: all.
_VARLEN_PARAMETERS = tuple(inspect.signature(varlen_attn).parameters) if varlen_attn else ()


def _repeat_kv(q, *kv):
    """q (..., H, E), k and v (..., K, E) -> k and v (..., H, E) for backends without grouped
    heads.
    """
    repeats = q.shape[-2] // kv[0].shape[-2]
    return kv if repeats == 1 else [t.repeat_interleave(repeats, -2) for t in kv]


def attention_sdpa(q, k, v, cu_seqlens, max_seqlen, attn_window=0):
    """(B, T, H, E), (B, T, K, E) twice -> (B, T, H, E): the reference; any device and dtype, no
    host
    synchronisation. In blocks of W = max_seqlen queries, each sees keys of its block and the one
    before: a mask of T x 2W, not T x T.
    """
    k, v = _repeat_kv(q, k, v)
    if cu_seqlens is None and attn_window:
        rows = torch.arange(q.size(0) + 1, dtype=torch.int32, device=q.device) * q.size(1)
        return attention_sdpa(
            *(t.flatten(0, 1)[None] for t in (q, k, v)), rows, q.size(1), attn_window
        ).view(q.shape)
    if cu_seqlens is None:
        return F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
        ).transpose(1, 2)
    _, T, H, E = q.shape
    W = min(max_seqlen, T)
    blocks = (T + W - 1) // W
    # Padding lies past the last document: it forms one of its own and attends to itself, so that no
    # row is all masked.
    q, k, v = (
        F.pad(t[0], (0, 0, 0, 0, 0, blocks * W - T)).view(blocks, W, H, E) for t in (q, k, v)
    )
    positions = torch.arange(blocks * W, dtype=cu_seqlens.dtype, device=q.device)
    # from 1; 0 is before the row
    document = torch.searchsorted(cu_seqlens, positions, right=True).view(blocks, W)

    def with_previous(t):  # (blocks, W, ...) -> (blocks, 2W, ...)
        return torch.cat((torch.cat((torch.zeros_like(t[:1]), t[:-1])), t), dim=1)

    offset = torch.arange(2 * W, device=q.device)
    mask = (document[:, :, None] == with_previous(document)[:, None]) & (
        offset <= offset[:W, None] + W
    )
    if attn_window:
        mask &= offset >= offset[:W, None] + W - attn_window
    q, k, v = (t.transpose(1, 2) for t in (q, with_previous(k), with_previous(v)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])  # out (blocks, H, W, E)
    return out.transpose(1, 2).reshape(1, blocks * W, H, E)[:, :T]


def attention_trial_inputs(hp, device, dtype):
    queries = (1, 256, hp.num_heads, hp.head_dim)
    keys = (1, 256, hp.num_kv_heads, hp.head_dim)
    q, k, v = trial_tensors(device, dtype, queries, keys, keys)
    # the last documents are empty, as where a row has fewer than its limit
    cu_seqlens = torch.tensor([0, 37, 38, 166, 256, 256, 256], dtype=torch.int32, device=device)
    return q, k, v, cu_seqlens, 128, 9 if hp.attn_window else 0


def _both(cu_seqlens):
    """cu_seqlens (N + 1,) twice, or (2, N + 1) of queries and of keys: a document's queries are
    at its last keys.
    """
    return cu_seqlens if cu_seqlens.dim() == 2 else (cu_seqlens, cu_seqlens)


def _on_packed_row(varlen):
    """Decorator: attention over one row of documents, (tokens, H, E) -> (tokens, H, E), becomes
    a backend as above.
    """

    def attention(q, k, v, cu_seqlens, max_seqlen, attn_window=0):
        if cu_seqlens is None:
            cu_seqlens = torch.arange(q.size(0) + 1, dtype=torch.int32, device=q.device) * q.size(1)
        # a list: custom operations take one argument behind the tensors
        limits = [max_seqlen, attn_window]
        return varlen(*(t.flatten(0, 1) for t in (q, k, v)), cu_seqlens, limits).view(q.shape)

    return attention


@_on_packed_row
def attention_torch(q, k, v, cu_seqlens, limits):
    """(tokens, H, E), (tokens, K, E) twice -> (tokens, H, E) by torch's varlen_attn (torch >=
    2.10, CUDA, 16 bits).
    """
    max_seqlen, attn_window = limits
    options = (
        {"is_causal": True}
        if "is_causal" in _VARLEN_PARAMETERS and not attn_window
        else {"window_size": (attn_window or -1, 0)}
    )  # 2.10, which has no windows, or later
    if "enable_gqa" in _VARLEN_PARAMETERS:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = _repeat_kv(q, k, v)
    return varlen_attn(q, k, v, *_both(cu_seqlens), max_seqlen, max_seqlen, **options)


@_on_packed_row
def attention_fa3(q, k, v, cu_seqlens, limits):
    """(tokens, H, E), (tokens, K, E) twice -> (tokens, H, E) by FlashAttention-3 (Hopper;
    arXiv:2407.08608).
    """
    from flash_attn_interface import flash_attn_varlen_func

    max_seqlen, attn_window = limits
    window = {"window_size": (attn_window, 0)} if attn_window else {}
    out = flash_attn_varlen_func(
        q, k, v, *_both(cu_seqlens), max_seqlen, max_seqlen, causal=True, **window
    )
    return out[0] if isinstance(out, tuple) else out  # some versions return (out, lse)


@golf_op(
    lambda grad, q, k, v, *_: (
        q.new_empty(q.shape),
        *(t.new_empty(q.shape[1] // k.shape[1], *t.shape) for t in (k, v)),
    )
)
def _fa4_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    limits: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    # Query heads that share dk and dv would add them up in fp32 buffers, zeroed before and cast
    # after. A pass for each of a key head's query heads, with gradients of its own, costs less
    # (docs/LOG.md).
    group, (max_seqlen, attn_window), (of_q, of_k) = (
        q.shape[1] // k.shape[1],
        limits,
        _both(cu_seqlens),
    )
    window = {"window_size_left": attn_window} if attn_window else {}
    dq, dk, dv = q.new_empty(q.shape), *(t.new_empty(group, *t.shape) for t in (k, v))
    grad = grad.contiguous()
    for i in range(group):
        q_i, out_i, grad_i, dq_i = (t[:, i::group] for t in (q, out, grad, dq))
        _flash_attn_bwd(
            q_i,
            k,
            v,
            out_i,
            grad_i,
            lse[i::group].contiguous(),
            softmax_scale=q.shape[-1] ** -0.5,
            causal=True,
            dq=dq_i,
            dk=dk[i],
            dv=dv[i],
            cu_seqlens_q=of_q,
            cu_seqlens_k=of_k,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            **window,
        )
    return dq, dk, dv


def _fa4_gradients(needed, *saved):
    dq, *shared = _fa4_backward(*saved)
    return dq, *(parts.sum(0) if len(parts) > 1 else parts[0] for parts in shared)


@_on_packed_row
@golf_op(
    lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)),
    _fa4_gradients,
)
def attention_fa4(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, limits: list[int]
) -> tuple[Tensor, Tensor]:
    """(tokens, H, E), (tokens, K, E) twice -> (tokens, H, E) by FlashAttention-4 (flash-attn-4;
    CUDA, 16 bits).
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    (max_seqlen, attn_window), (of_q, of_k) = limits, _both(cu_seqlens)
    window = {"window_size_left": attn_window} if attn_window else {}
    out, lse, *_ = _flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=of_q,
        cu_seqlens_k=of_k,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=q.shape[-1] ** -0.5,
        causal=True,
        return_lse=True,
        **window,
    )
    return out, lse  # (tokens, H, E), (H, tokens)


# --- selection
ATTENTION_BACKENDS = {  # the fastest first
    "fa3": attention_fa3,
    "fa4": attention_fa4,
    "torch": attention_torch,
    "sdpa": attention_sdpa,
}


@dataclass(frozen=True)
class Ops:
    """The operations that the model calls, as select_ops chose them."""

    attention: Callable  # q, k, v, cu_seqlens, max_seqlen, attn_window
    mlp: Callable  # x, w_up, w_down, slope
    cross_entropy: Callable  # h, weight, targets, softcap
    names: dict  # operation -> name of the chosen candidate
    notes: tuple = ()  # why faster candidates were refused
    qkv_heads: Callable = qkv_heads_ref  # qkv, gain, cos, sin, kv_heads
    gated_xsa: Callable = gated_xsa_ref  # y, v, logits, factor
    enter: Callable = enter_ref  # x, x0, mix, scale, window, wants, *(skip, weight, gate)
    # values, squares, gradient, source, target, correction, scale, rates
    adamw_rows: Callable = adamw_rows_ref


class Operation(NamedTuple):
    """What select_ops has to choose from for one operation."""

    candidates: dict  # name -> function, the fastest first
    reference: Callable
    trial_inputs: Callable  # (hp, device, dtype) -> arguments
    # relative Frobenius error: bf16 rounding on both sides stays below it, a wrong mask does not
    tolerance: float = 0.03


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
    """{field of Ops: Operation}"""
    with_kernels = use_kernels(hp, device)

    def with_reference(library, kernel, reference, trial_inputs):
        candidates = {library: kernel} if with_kernels else {}
        candidates["reference"] = reference
        return Operation(candidates, reference, trial_inputs)

    return {
        "attention": Operation(
            attention_candidates(hp, device), attention_sdpa, attention_trial_inputs
        ),
        "mlp": with_reference("quack", leaky_relu_sq_mlp, mlp_ref, mlp_trial_inputs),
        "cross_entropy": with_reference(
            "triton", linear_cross_entropy, linear_cross_entropy_ref, cross_entropy_trial_inputs
        ),
        "qkv_heads": with_reference("triton", qkv_heads, qkv_heads_ref, qkv_heads_trial_inputs),
        "gated_xsa": with_reference("triton", gated_xsa, gated_xsa_ref, gated_xsa_trial_inputs),
        "enter": with_reference("triton", enter, enter_ref, enter_trial_inputs),
        "adamw_rows": with_reference("triton", adamw_rows, adamw_rows_ref, adamw_rows_trial_inputs),
    }


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


def _disagreement(op, reference, args, tolerance):
    """How outputs and gradients of op differ from the reference's; empty if they agree."""
    pairs = zip(_forward_backward(op, args), _forward_backward(reference, args), strict=True)
    errors = []
    for got, want in pairs:
        error = (got - want).float().norm() / want.float().norm()
        errors.append(error.item())
    if all(error <= tolerance for error in errors):  # False for NaN
        return ""
    listed = " ".join(f"{error:.1e}" for error in errors)
    return f"disagrees with the reference, relative errors {listed}"


def _first_that_works(kind, candidates, reference, args, notes, tolerance=0.03):
    """Name of the first candidate that agrees with the reference, or None; refusals go to notes."""
    for name, op in candidates.items():
        if op is reference:
            return name
        try:
            fault = _disagreement(op, reference, args, tolerance)
        except Exception as error:  # a library may raise anything: missing, old, wrong device
            lines = str(error).strip().splitlines() or [""]
            fault = f"{type(error).__name__}: {lines[0][:200]}"
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
        name = _first_that_works(
            kind,
            operation.candidates,
            operation.reference,
            operation.trial_inputs(hp, device, dtype),
            notes,
            operation.tolerance,
        )
        if name is None:  # attention alone has candidates without the reference
            raise SettingError(
                f"ATTENTION_BACKEND={hp.attention_backend} does not work here: {'; '.join(notes)}"
            )
        names[kind] = name
        chosen[kind] = operation.candidates[name]
    return Ops(**chosen, names=names, notes=tuple(notes))


# ---- MODEL ---------------------------------------------------------------------------------------


def rotary_tables(positions, hp):
    """cos and sin of positions (..., T) -> (..., T, 1, rope_dims / 2) float32 each, from float64
    angles. Made once: traced into a graph, the compiler computes them anew for every head, in
    float64 on the GPU.
    """
    step = torch.arange(0, hp.rope_dims, 2, device=positions.device).double() / hp.rope_dims
    angle = positions[..., None, None] * hp.rope_base**-step
    return angle.cos().float(), angle.sin().float()


class LayerWeights(NamedTuple):
    """What one layer computes with: views of the banks and of the small parameters, in the
    compute dtype.
    """

    qkv: Tensor  # (D + 2 K E, D): q, k and v below each other, one product
    out: Tensor  # (D, D), times attn_scale
    up: Tensor  # (F, D)
    down: Tensor  # (D, F), times mlp_scale
    q_gain: Tensor  # (H,)
    gate: Tensor | None  # (H, window) or (H, D)
    attn_scale: Tensor  # (D,)
    mlp_scale: Tensor  # (D,)
    mix: Tensor  # (2, D): stream, embedding
    post: Tensor  # (2, 2): attention / MLP, target lane
    resid: Tensor  # (2,): lane
    depth_scale: Tensor  # (1,) float32, of both norms
    xsa: bool
    extras: dict | None = None  # what a few layers' settings ask for: techniques.layer_extras


class GPT(nn.Module):
    """The 11-layer recurrent GPT: one forward pass for training, evaluation, calibration and TTT. A
    tap, where given, is asked for tap.at(slot, layer), which is called at each site of that slot as
    (site, x, y) -> y with its input and output. Sites: qkv, attn_proj, mlp_up, mlp_down (matrix
    products), attn_out, mlp_out (whole sublayers; also told the (D,) scale that y has already been
    multiplied by); token_losses calls its own at lm_head. Without a tap nothing is traced.
    `splits_mlp` asks for the unfused MLP, whose hidden layer can be seen.
    """

    def __init__(self, hp, ops, dtype):
        super().__init__()
        self.hp, self.ops, self.dtype = hp, ops, dtype
        # over the looped layers, beyond NUM_LOOPS, once training is over: 1 +
        # EXTRA_EVAL_LOOPS
        self.eval_passes = None
        D, L, H, kv_dim = hp.model_dim, hp.num_layers, hp.num_heads, hp.num_kv_heads * hp.head_dim
        slots = self.slots(looping=True)
        num_skips = min(len(slots) // 2, len(slots) - len(slots) // 2)
        self.tok_emb = nn.Parameter(torch.empty(hp.num_embeddings, D))
        self.lm_head = (
            None if hp.tie_embeddings else nn.Parameter(torch.empty(hp.num_embeddings, D))
        )
        # q of every layer, then output projections
        self.qo_bank = nn.Parameter(torch.empty(2 * L, D, D))
        self.kv_bank = nn.Parameter(torch.empty(2 * L, kv_dim, D))  # k of every layer, then v
        self.mlp_up_bank = nn.Parameter(torch.empty(L, hp.mlp_dim, D))
        self.mlp_down_bank = nn.Parameter(torch.empty(L, D, hp.mlp_dim))
        self.q_gain = nn.Parameter(torch.full((L, H), hp.qk_gain_init))
        gate_width = {"sparse": hp.gate_window, "output": hp.gate_window, "dense": D}.get(
            self.gate_kind
        )
        self.attn_gate = nn.Parameter(torch.zeros(L, H, gate_width)) if gate_width else None
        self.attn_scale = nn.Parameter(torch.ones(L, D))
        self.mlp_scale = nn.Parameter(torch.ones(L, D))
        # (L, 2, D)
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(L, D), torch.zeros(L, D)], dim=1))
        self.skip_weights = nn.Parameter(torch.ones(num_skips, D))
        self.skip_gates = nn.Parameter(torch.zeros(num_skips, D)) if hp.skip_gates_enabled else None
        # (layer, attention / MLP, target lane)
        self.parallel_post = nn.Parameter(torch.ones(L, 2, 2))
        self.parallel_resid = nn.Parameter(torch.full((L, 2), 1.1))  # (layer, lane)
        self.smear_weight = (
            nn.Parameter(torch.zeros(1, hp.gate_window)) if hp.smear_gate_enabled else None
        )
        self.smear_lambda = nn.Parameter(torch.zeros(1)) if hp.smear_gate_enabled else None
        # rows aligned for kernels
        scales = [[(layer + 1) ** -0.5 if hp.ln_scale else 1.0] * 4 for layer in range(L)]
        # no weight: never saved
        self.register_buffer("depth_scale", torch.tensor(scales), persistent=False)
        # of a row that is learnt from
        longest = hp.global_ttt_chunk_tokens + max(hp.eval_seq_len, hp.ttt_eval_seq_len)
        longest = max(hp.micro_batch_tokens, longest)
        for name, table in zip(
            ("cos", "sin"), rotary_tables(torch.arange(longest), hp), strict=True
        ):
            self.register_buffer(name, table, persistent=False)
        self.init_weights()
        if hp.bigram_vocab_size or hp.new_values:
            techniques.add_parameters(self)

    @torch.no_grad()
    def init_weights(self):
        """Embedding N(0, std); q, k, v, MLP up orthogonal; both output projections zero;
        dense gate N(0, 0.01).
        """
        generator = torch.Generator().manual_seed(self.hp.generator_seed)
        for table in (self.tok_emb, self.lm_head):
            if table is not None:
                table.normal_(0.0, self.hp.tied_embed_init_std, generator=generator)
                if self.hp.marker_fusion_enabled:
                    techniques.init_pairs(self.hp, space_id, table)
        L = self.hp.num_layers
        for bank in (self.qo_bank[:L], self.kv_bank[:L], self.kv_bank[L:], self.mlp_up_bank):
            for matrix in bank:
                nn.init.orthogonal_(matrix, generator=generator)
        self.qo_bank[L:].zero_()
        self.mlp_down_bank.zero_()
        if self.gate_kind == "dense":
            self.attn_gate.normal_(0.0, 0.01, generator=generator)

    @property
    def gate_kind(self):
        """Which of the three attention gates is on: "sparse", "dense", "output", or None."""
        hp = self.hp
        if hp.sparse_attn_gate_enabled:
            return "sparse"
        return "dense" if hp.gated_attn_enabled else "output" if hp.attn_out_gate_enabled else None

    @property
    def head_weight(self):
        """(V, D): the output projection."""
        return self.tok_emb if self.lm_head is None else self.lm_head

    def slots(self, looping):
        """The layers in the order in which they run; looped layers stand several times."""
        hp, layers = self.hp, list(range(self.hp.num_layers))
        if not (looping and hp.num_loops):
            return layers
        first, last = hp.loop_start, hp.loop_end + 1
        return (
            layers[:first]
            + layers[first:last] * (hp.num_loops + (self.eval_passes or 1))
            + layers[last:]
        )

    def layer_weights(self, on_grid=False):
        """LayerWeights of every layer. Unbinding once makes a bank's gradient one stack, not a sum
        of
        padded slices. The scales of the sublayers' outputs are multiplied into the matrices before:
        no output, and no gradient of one, is written once more for them.
        """
        hp, L = self.hp, self.hp.num_layers
        qo, kv, up, down = self.qo_bank, self.kv_bank, self.mlp_up_bank, self.mlp_down_bank
        if on_grid:  # QAT_BELOW_LR: as quantization will have them
            qo, kv = (
                techniques.fake_quantize(bank, hp.matrix_bits, hp.attn_clip_sigmas)
                for bank in (qo, kv)
            )
            up, down = (
                techniques.fake_quantize(bank, hp.matrix_bits, hp.mlp_clip_sigmas)
                for bank in (up, down)
            )
        (q, out), (k, v) = qo.split(L), kv.split(L)
        out, down = out * self.attn_scale[..., None], down * self.mlp_scale[..., None]
        qkv = torch.cat([p.to(self.dtype) for p in (q, k, v)], dim=1).unbind(0)
        out, up, down, q_gain, attn_scale, mlp_scale, mix, post, resid = (
            p.to(self.dtype).unbind(0)
            for p in (
                out,
                up,
                down,
                self.q_gain,
                self.attn_scale,
                self.mlp_scale,
                self.resid_mix,
                self.parallel_post,
                self.parallel_resid,
            )
        )
        gates = [None] * L if self.attn_gate is None else self.attn_gate.to(self.dtype).unbind(0)
        return [
            LayerWeights(
                qkv[i],
                out[i],
                up[i],
                down[i],
                q_gain[i],
                gates[i],
                attn_scale[i],
                mlp_scale[i],
                mix[i],
                post[i],
                resid[i],
                self.depth_scale[i, :1],
                i >= L - hp.xsa_last_n,
            )
            for i in range(L)
        ]

    def attention(self, h, start, x_in, w, rope, packing, tap):
        """Normed input h (B, T, D), its first columns -> (B, T, D).

        `packing` is (cu_seqlens or None, max_seqlen).
        """
        hp, (B, T, D) = self.hp, h.shape
        qkv = linear(h, w.qkv, tap, "qkv")
        q, k, v = self.ops.qkv_heads(qkv, w.q_gain, *rope, hp.num_kv_heads)
        if hp.new_values:  # PARTIAL_KEY_OFFSET, VALUE_EMBED_LAYERS, VALUE_RESIDUAL
            k, v = techniques.keys_and_values(k, v, w.extras, hp)
        if hp.ttt_enabled and hp.ttt_stale_context and packing[2:]:
            y = attention_stale(self.ops, q, k, v, packing)
        else:
            y = self.ops.attention(q, k, v, *packing, w.extras["window"] if hp.attn_window else 0)
        if w.xsa and self.gate_kind:
            y = self.ops.gated_xsa(y, v, *self.head_gates(h, start, x_in, qkv, w.gate))
        elif w.xsa:
            y = subtract_own_value(y, v)
        elif self.gate_kind:
            logits, factor = self.head_gates(h, start, x_in, qkv, w.gate)
            y = y * (factor * torch.sigmoid(logits))[..., None]
        out = linear(y.reshape(B, T, D), w.out, tap, "attn_proj")
        return out if tap is None else tap("attn_out", h, out, w.attn_scale)

    def head_gates(self, h, start, x_in, qkv, gate):
        """Logits (B, T, H) and the factor of their sigmoids, of whichever gate of the
        heads' outputs is on.
        """
        hp = self.hp
        if self.gate_kind == "sparse":
            return hp.sparse_attn_gate_scale * F.linear(start, gate), 1.0
        if self.gate_kind == "dense":
            return F.linear(h, gate), 1.0
        source = qkv if hp.attn_out_gate_src == "q" else x_in
        return F.linear(source[..., : hp.gate_window], gate), 2.0

    def mlp(self, h, w, tap):
        """(B, T, D) normalised input -> (B, T, D): W_down leaky_relu(W_up h)^2."""
        slope = self.hp.leaky_relu_slope
        if tap is not None and tap.splits_mlp:
            hidden = F.leaky_relu(linear(h, w.up, tap, "mlp_up"), slope).square()
            out = linear(hidden, w.down, tap, "mlp_down")
        else:
            out = self.ops.mlp(h, w.up, w.down, slope)
        return out if tap is None else tap("mlp_out", h, out, w.mlp_scale)

    def enter(self, x, x0, w, wants, *skip):
        """What a block takes: normed mix of stream x and x0, the first columns of that; if
        wanted, mix and stream.
        """
        return self.ops.enter(x, x0, w.mix, w.depth_scale, self.hp.gate_window, wants, *skip)

    def block(self, entry, mlp_lane, w, rope, packing, tap):
        """One layer: results of `enter`, and the MLP's own lane where the stream has split,
        else None -> x, lane.
        """

        def scaled_norm(x):
            return (norm(x) * w.depth_scale).to(x.dtype)

        h, start, x_in, x = entry
        attn = self.attention(h, start, x_in, w, rope, packing, tap)
        if mlp_lane is None:
            x = x_in + attn
            return x + self.mlp(scaled_norm(x), w, tap), None
        mlp = self.mlp(scaled_norm(mlp_lane), w, tap)
        return (
            w.resid[0] * x + w.post[0, 0] * attn + w.post[1, 0] * mlp,
            w.resid[1] * mlp_lane + w.post[0, 1] * attn + w.post[1, 1] * mlp,
        )

    def embed(self, tokens, fresh):
        """(B, T) ids -> (B, T, D) raw embedding with SmearGate; none at BOS, t = 0, and
        where `fresh` (B, T) is set.
        """
        e = F.embedding(tokens, self.tok_emb).to(self.dtype)
        if self.hp.bigram_vocab_size:
            e = e + techniques.bigram_embedding(self, tokens, fresh)
        if not self.hp.smear_gate_enabled:
            return e
        previous = F.pad(e[:, :-1], (0, 0, 1, 0))
        # (B, T, 1)
        gate = torch.sigmoid(F.linear(e[..., : self.hp.gate_window], self.smear_weight.to(e.dtype)))
        blocked = tokens == BOS_ID if fresh is None else (tokens == BOS_ID) | fresh
        return e + (self.smear_lambda.to(e.dtype) * gate * previous).masked_fill(
            blocked[..., None], 0
        )

    def forward_hidden(
        self,
        tokens,
        cu_seqlens=None,
        *,
        max_seqlen,
        looping,
        fresh=None,
        tap=None,
        parts=None,
        on_grid=False,
    ):
        """(B, T) ids -> (B, T, D), the final norm's output. With cu_seqlens B is 1 and documents
        are
        apart, none longer than max_seqlen; without, a row is one document. `parts` has its own
        enter and block, where these alone were compiled; entries then give all results: few graphs.
        """
        hp, slots, weights, parts = (
            self.hp,
            self.slots(looping),
            self.layer_weights(on_grid),
            parts or self,
        )
        packing, rope = (
            (cu_seqlens, max_seqlen),
            (
                self.cos[: tokens.size(1)],
                self.sin[: tokens.size(1)],
            ),
        )
        if hp.attn_window or hp.new_values:
            extras = techniques.layer_extras(self, tokens, fresh)
            weights = [w._replace(extras=e) for w, e in zip(weights, extras, strict=True)]
        x = x0 = norm(self.embed(tokens, fresh))
        mlp_lane, encoder, skips, before, order = None, len(slots) // 2, [], -1, None
        merging = self.skip_weights, *((self.skip_gates,) if hp.skip_gates_enabled else ())
        # passes that training did not have count below 0: skips stay where they were
        if hp.extra_eval_loops:
            order, encoder = techniques.extra_passes(self, slots)
        for slot, layer in order or enumerate(slots):
            if layer >= hp.parallel_start_layer and mlp_lane is None:
                # the stream splits before this slot's skip, which goes to the
                # attention lane only
                mlp_lane = x
            # what the slot before gave; of the skip popped here
            pushes, pair = 0 <= before < encoder, slot - encoder
            if pushes and pair >= 0:
                skips.append(x.view_as(x))  # the first pair is of the stream with itself
            skip = (skips.pop(), *(p[pair] for p in merging)) if pair >= 0 and skips else ()
            lanes, own = mlp_lane is not None, pushes and pair < 0
            wants = (
                (not lanes or self.gate_kind == "output", lanes or own)
                if parts is self
                else (True, True)
            )
            entry = parts.enter(x, x0, weights[layer], wants, *skip)
            if own:
                # x itself, but so all its gradients meet in the entry's kernel
                skips.append(entry[3].view_as(x))
            x, mlp_lane = parts.block(
                entry, mlp_lane, weights[layer], rope, packing, tap and tap.at(slot, layer)
            )
            before = slot
        if mlp_lane is not None:
            x = {"mean": (x + mlp_lane) / 2, "attn": x, "mlp": mlp_lane}[hp.parallel_final_lane]
        return norm(x)

    def forward(self, inputs, targets, cu_seqlens, looping, max_seqlen, fresh=None, on_grid=False):
        """(1, T) ids, (T,) targets -> (T,) cross-entropy in nats, logits in the compute
        dtype: for gradients.
        """
        h = self.forward_hidden(
            inputs, cu_seqlens, max_seqlen=max_seqlen, looping=looping, fresh=fresh, on_grid=on_grid
        )
        return self.ops.cross_entropy(
            h.flatten(0, 1), self.head_weight.to(self.dtype), targets, self.hp.logit_softcap
        )

    def token_losses(self, hidden, targets, tap=None):
        """(..., D) outputs of the final norm, (...) targets -> (...) nats, with head,
        softcap and loss in float32.
        """
        hidden = hidden.float()
        logits = linear(hidden, self.head_weight, tap, "lm_head")
        losses = softcapped_cross_entropy_ref(
            logits.flatten(0, -2), targets.flatten(), self.hp.logit_softcap
        )
        return losses.view(targets.shape)


def linear(x, w, tap, site):
    """x (..., in), w (out, in) -> (..., out): the one matrix product of the model that a tap
    can watch or add to.
    """
    y = F.linear(x, w)
    return y if tap is None else tap(site, x, y)


def unbank(model):
    """GPT -> {saved name: fp32 view}: quantization and packing see matrices under names of
    their own, not banks.
    """
    L, state = model.hp.num_layers, {}
    for name, tensor in model.state_dict().items():
        if names := BANK_NAMES.get(name):
            state |= {names[i // L].format(i % L): matrix for i, matrix in enumerate(tensor)}
        else:
            state[HEAD_NAMES.get(name, name)] = tensor
    return state


def rebank(model, state):
    """Loads {saved name: tensor} into a GPT.

    Raises ValueError where names or shapes differ from the model's.
    """
    wanted = {name: tensor.shape for name, tensor in unbank(model).items()}
    given = {name: tensor.shape for name, tensor in state.items()}
    if wanted != given:
        differ = sorted(
            name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)
        )
        raise ValueError(
            f"the saved model does not fit these settings: {len(differ)} tensors differ,"
            f" {differ[:5]} among them; use the settings it was trained with"
        )
    with torch.no_grad():
        for name, tensor in unbank(model).items():
            tensor.copy_(state[name])


BANK_NAMES = {
    "qo_bank": ("blocks.{}.attn.c_q.weight", "blocks.{}.attn.c_proj.weight"),
    "kv_bank": ("blocks.{}.attn.c_k.weight", "blocks.{}.attn.c_v.weight"),
    "mlp_up_bank": ("blocks.{}.mlp.c_fc.weight",),
    "mlp_down_bank": ("blocks.{}.mlp.c_proj.weight",),
}
HEAD_NAMES = {
    "tok_emb": "tok_emb.weight",
    "lm_head": "lm_head.weight",
    "bigram_table": "bigram.weight",
    "value_table": "value_embed.weight",
}

# ---- OPTIMIZER -----------------------------------------------------------------------------------

# Polar Express (arXiv:2505.16932): one (a, b, c) per Newton-Schulz step
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

BANKS = tuple(BANK_NAMES)  # Muon's parameters
# AdamW with TIED_EMBED_LR; every other parameter: AdamW with SCALAR_LR
EMBEDDINGS = tuple(HEAD_NAMES)


def polar_express(x, steps):
    """(N, R, C) -> (N, R, C) orthogonalised: X <- aX + (bA + cA^2)X with A = XX^T, on X/|X|_F;
    tall ones transposed.
    """
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def muon_update(grad, momentum_buffer, momentum, steps, row_normalize, orthogonalise=None):
    """(N, R, C) gradients -> (N, R, C) orthogonalised Nesterov updates, in the gradients'
    dtype; updates the buffer.
    """
    momentum_buffer.mul_(momentum).add_(grad)
    update = grad.add(momentum_buffer, alpha=momentum)
    if row_normalize:
        update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    return (orthogonalise or polar_express)(update, steps)


class Muon:
    """Muon on the banks, sharded over ranks along the banks' first dimension (padded to the world
    size). launch() starts the reduce-scatter of every bank's gradient; step() orthogonalises this
    rank's slices bank by bank and gathers the result, so that one bank travels while the next is
    computed. One rank runs the same lines.
    """

    def __init__(self, banks, hp, dist, dtype):
        self.banks, self.hp, self.dist, self.dtype = banks, hp, dist, dtype
        self.momentum_buffers = [
            torch.zeros_like(self.padded(bank).chunk(dist.world_size)[0]) for bank in banks
        ]
        self.in_flight = []

    def padded(self, bank):
        """A bank-shaped tensor in Muon's dtype, its first dimension zero-padded to a
        multiple of the world size.
        """
        return F.pad(
            bank.detach().to(self.dtype), (0, 0, 0, 0, 0, -bank.size(0) % self.dist.world_size)
        )

    def launch(self):
        """Starts the reduction of every bank's gradient."""
        self.in_flight = [self.dist.reduce_scatter(self.padded(bank.grad)) for bank in self.banks]

    def shards(self):
        """This rank's slices of the summed gradients."""
        for handle, _ in self.in_flight:
            handle.wait()
        return [shard for _, shard in self.in_flight]

    @torch.no_grad()
    def step(self, lr, momentum, weight_decay, clip):
        """p <- p (1 - lr wd) - lr sqrt(max(1, rows/cols)) O; `clip` (a 0-d tensor or None)
        multiplies the gradients.
        """
        gathers = []
        for buffer, shard in zip(self.momentum_buffers, self.shards(), strict=True):
            shard = shard if clip is None else shard * clip.to(shard.dtype)
            other = (
                techniques.orthogonaliser(self, buffer, polar_express, POLAR_EXPRESS)
                if (self.hp.muon_head_pairs or self.hp.muon_gram_enabled)
                else None
            )
            update = muon_update(
                shard,
                buffer,
                momentum,
                self.hp.muon_backend_steps,
                self.hp.muon_row_normalize,
                other,
            )
            gathers.append(self.dist.all_gather(update))
        for bank, (handle, update) in zip(self.banks, gathers, strict=True):
            handle.wait()
            scale = max(1.0, bank.size(-2) / bank.size(-1)) ** 0.5
            bank.mul_(1 - lr * weight_decay).add_(update[: bank.size(0)], alpha=-lr * scale)
        self.in_flight = []


class Optimizers:
    """Muon for the banks, AdamW for the embedding and for scalars and gates; every parameter in
    exactly one group. step() is the whole update: reduction over ranks, one global clip factor,
    schedules, both optimizers.
    """

    def __init__(self, model, hp, dist):
        self.hp, self.dist = hp, dist
        parameters = dict(model.named_parameters())
        dtype = model.dtype if hp.muon_dtype == "auto" else getattr(torch, hp.muon_dtype)
        self.muon = Muon([parameters.pop(name) for name in BANKS], hp, dist, dtype)
        embeddings = [parameters.pop(name) for name in EMBEDDINGS if name in parameters]
        self.replicated = [*embeddings, *parameters.values()]
        groups = [
            {"params": embeddings, "base_lr": hp.tied_embed_lr, "base_wd": hp.embed_wd},
            {"params": list(parameters.values()), "base_lr": hp.scalar_lr, "base_wd": hp.adam_wd},
        ]
        self.adamw = torch.optim.AdamW(
            groups, betas=(hp.beta1, hp.beta2), eps=1e-8, fused=dist.device.type == "cuda"
        )
        for p in model.parameters():
            # kept, and added to: what a captured backward returns is overwritten
            p.grad = torch.zeros_like(p)

    def clip_factor(self):
        """0-d tensor: GRAD_CLIP_NORM over the norm of the reduced gradient, at most 1; the
        same on every rank.
        """
        if not self.hp.grad_clip_norm:
            return None
        squares = self.dist.all_reduce(
            sum(shard.float().square().sum() for shard in self.muon.shards())
        )
        squares = squares + sum(p.grad.square().sum() for p in self.replicated)
        return (self.hp.grad_clip_norm / (squares.sqrt() + 1e-6)).clamp_max(1.0)

    @torch.no_grad()
    def step(self, progress, step):
        """One update at training fraction `progress`; gradients are sums over this rank's
        micro-steps, zero after.
        """
        hp, lr = self.hp, lr_multiplier(progress, self.hp)
        decay = techniques.weight_decay_multiplier(progress, hp) if hp.wd_schedule_enabled else 1.0
        self.muon.launch()
        self.dist.all_reduce_packed([p.grad for p in self.replicated])
        clip = self.clip_factor()
        if clip is not None:
            torch._foreach_mul_([p.grad for p in self.replicated], clip)
        for group in self.adamw.param_groups:
            group["lr"], group["weight_decay"] = group["base_lr"] * lr, group["base_wd"] * decay
        self.adamw.step()
        self.muon.step(hp.matrix_lr * lr, muon_momentum(step, hp), hp.muon_wd * decay, clip)
        torch._foreach_zero_([p.grad for p in (*self.replicated, *self.muon.banks)])


class EMA:
    """Exponential average of all weights in fp32, decay min(EMA_DECAY, (1 + n) / (10 + n)) at
    step n.
    """

    def __init__(self, model, decay):
        self.decay, self.parameters = decay, list(model.parameters())
        self.snapshots = 0  # of SWA_BELOW_LR: how many the average is the mean of
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def copy_to_model(self):
        torch._foreach_copy_(self.parameters, self.average)


# ---- SCHEDULE ------------------------------------------------------------------------------------
# Pure functions of the training fraction in [0, 1] (or of the step): every rank and every test
# computes the same.


def lr_multiplier(progress, hp):
    """1 until 1 - WARMDOWN_FRAC, then linear to 0, never below MIN_LR."""
    return max(hp.min_lr, min(1.0, (1.0 - progress) / hp.warmdown_frac))


def muon_momentum(step, hp):
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM over the warm-up steps."""
    share = min(1.0, step / hp.muon_momentum_warmup_steps) if hp.muon_momentum_warmup_steps else 1.0
    return (1 - share) * hp.muon_momentum_warmup_start + share * hp.muon_momentum


def loop_is_on(progress, hp):
    """Whether the looped layers run several times at this training fraction."""
    return hp.num_loops > 0 and progress >= hp.enable_looping_at


# ---- TRAINING ------------------------------------------------------------------------------------


class TrainingClock:
    """Seconds of training on rank 0, told to every rank, so that schedules and the end are the same
    everywhere. The host runs at most one step ahead of the device: marking a step waits for the one
    before, which costs no bubble. paused() keeps evaluations inside training off the clock; `used`
    were used before.
    """

    def __init__(self, dist, used=0.0):
        self.dist, self.queue = dist, []
        dist.barrier()
        dist.synchronize()
        self.start = time.perf_counter() - used

    def mark_step(self):
        """Call after a step's work is launched."""
        if self.dist.device.type == "cuda":
            self.queue.append(torch.cuda.Event())
            self.queue[-1].record()
            if len(self.queue) > 1:
                self.queue.pop(0).synchronize()

    def look(self, *numbers):
        """[seconds on rank 0, *the largest of every rank's numbers]: what a step has to
        tell travels at once.
        """
        return self.dist.max_over_ranks(
            (time.perf_counter() - self.start) * (self.dist.rank == 0), *numbers
        )

    def seconds(self):
        return self.look()[0]

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
    from torch._inductor.decomposition import decompositions

    # graphs of a function: kinds of layers, of entries, with taps or not
    torch._dynamo.config.recompile_limit = 256
    # or old gradients come from caches
    torch.compiler.config.cache_key_tag = digest(Path(__file__).read_bytes()).hex()
    # below autograd: the gradients stay those of _enter
    decompositions[torch.ops.golf.enter.default] = _open_enter


def compiled(function, hp, dist, dynamic=False, graphs=False):
    """torch.compile where the settings ask for it, else the function itself; dynamic=None:
    dimensions
    may be marked; graphs: on CUDA it is captured, its backward too, and replayed, so that what it
    returned before is overwritten.
    """
    if not compile_wanted(hp, dist):
        return function
    prepare_compiler()
    # padding of matrix products would bind a graph to the range of sizes that it was traced at
    return torch.compile(
        function,
        fullgraph=True,
        dynamic=dynamic,
        options={"shape_padding": False, "triton.cudagraphs": graphs},
    )


class Trainer:
    """Model, optimizers, average and loader of a run, and the one training step."""

    def __init__(self, model, loader, hp, dist, log, guard=NO_GUARD):
        self.model, self.loader, self.hp, self.dist, self.log, self.guard = (
            model,
            loader,
            hp,
            dist,
            log,
            guard,
        )
        self.optimizers = Optimizers(model, hp, dist)
        self.ema = EMA(model, hp.ema_decay)
        self.forward = compiled(model.forward, hp, dist, graphs=hp.train_cuda_graphs)
        # Where training is. A training state holds these: training may begin anywhere.
        self.looping = loop_is_on(0.0, hp)  # in the last step
        # step and seconds where each stretch of one looping state began
        self.tokens_at = [(0, 0.0)]
        # as last logged, for the live line, which must not wait for the GPU
        self.last_loss = math.nan

    def train_step(self, step, progress, looping):
        """Rows of a step -> 0-d tensor, this rank's share of the mean loss in nats; weights
        and average are updated.
        """
        total = torch.zeros((), device=self.dist.device)
        # another value is another graph
        on_grid = lr_multiplier(progress, self.hp) < self.hp.qat_below_lr
        for row in self.loader.step(step):
            if compile_wanted(self.hp, self.dist):
                # nothing of the row before is read any more
                torch.compiler.cudagraph_mark_step_begin()
            loss = (
                self.forward(*row, looping, self.hp.train_seq_len, on_grid=on_grid).mean()
                / self.hp.micro_steps
            )
            loss.backward()
            total += loss.detach()
        self.guard.watch(self.model, total)
        self.optimizers.step(progress, step)
        if not self.hp.swa_below_lr or lr_multiplier(progress, self.hp) >= self.hp.swa_below_lr:
            self.ema.update(step)
        elif step % self.hp.swa_every == 0:
            techniques.add_snapshot(self.ema)
        return total

    def warm_up(self):
        """Compiles every graph on throw-away steps, then restores weights, optimizers,
        average and RNG bit for bit.
        """
        weights = [p.detach().clone() for p in self.model.parameters()]
        rng = torch.get_rng_state()
        for looping in sorted({loop_is_on(0.0, self.hp), loop_is_on(1.0, self.hp)}):
            for step in range(self.hp.warmup_steps):
                self.train_step(step, 0.0, looping)
                if self.hp.qat_below_lr:  # the graph on the grid
                    self.train_step(step, 1.0, looping)
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), weights)
        torch.set_rng_state(rng)
        self.optimizers = Optimizers(self.model, self.hp, self.dist)
        self.ema = EMA(self.model, self.hp.ema_decay)

    def train(self, evaluate):
        """Trains until the budget or ITERATIONS end; the model then holds the average. Returns
        figures
        for RESULT. `evaluate()` scores the current weights; it is called every VAL_LOSS_EVERY steps
        with the clock stopped.
        """
        hp, log, budget = self.hp, self.log, self.hp.training_seconds
        first, seconds, losses = self.guard.resume(self)
        # the run that wrote the state may have ended before this step's line and
        # evaluation
        if hp.resume:
            self.log_step(first, losses[-1], seconds, self.progress(first, seconds), self.looping)
            if self.evaluation_is_due(first):
                evaluate()
        clock, step, step_seconds = (
            TrainingClock(self.dist, seconds),
            first,
            seconds / max(first, 1),
        )
        while step < hp.iterations and not (
            budget is not None and step and seconds + 2 * step_seconds > budget
        ):
            progress = self.progress(step, seconds)
            looping = loop_is_on(progress, hp)
            if looping != self.looping:
                log(f"step:{step} looping:{int(looping)} train_seconds:{seconds:.2f}")
                self.tokens_at.append((step, seconds))
                self.looping = looping
            losses.append(self.train_step(step, progress, looping))
            step += 1
            clock.mark_step()
            now, *reports = clock.look(*self.guard.report())
            step_seconds, seconds = now - seconds, now
            self.guard.after_step(self, step, seconds, losses, reports)
            if step <= 5 or step % hp.train_log_every == 0:
                self.log_step(step, losses[-1], seconds, progress, looping)
            rate = step * hp.train_batch_tokens / seconds
            log.live(
                progress, f"step:{step} train_loss:{self.last_loss:.4f} tokens_per_s:{rate:.0f}"
            )
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
        return self.summary(step, seconds, losses) | (
            {"resumed_at_step": first} if hp.resume else {}
        )

    def progress(self, step, seconds):
        """The training fraction, in [0, 1]: of the budget, or of ITERATIONS where there is none."""
        budget = self.hp.training_seconds
        if budget is None:
            return min(1.0, step / self.hp.iterations)
        return min(1.0, seconds / budget) if budget else 1.0

    def evaluation_is_due(self, step):
        """Whether VAL_LOSS_EVERY asks for a score of the weights after this many steps."""
        return self.hp.val_loss_every > 0 and step % self.hp.val_loss_every == 0

    def log_step(self, step, loss, seconds, progress, looping):
        self.last_loss = loss = self.dist.all_reduce(loss.clone()).item()
        rate = step * self.hp.train_batch_tokens / max(seconds, 1e-9)
        self.log(
            f"step:{step} train_loss:{loss:.4f} train_seconds:{seconds:.2f} progress:{progress:.4f}"
            f" lr_factor:{lr_multiplier(progress, self.hp):.4f} looping:{int(looping)}"
            f" tokens_per_s:{rate:.0f}"
        )

    def summary(self, steps, seconds, losses):
        """Steps, final loss, seconds, and tokens/s of each looping state, as RESULT has them."""
        stretches = zip(self.tokens_at, [*self.tokens_at[1:], (steps, seconds)], strict=True)
        rates = [
            round((b[0] - a[0]) * self.hp.train_batch_tokens / max(b[1] - a[1], 1e-9))
            for a, b in stretches
        ]
        losses = self.dist.all_reduce(torch.stack(losses[-20:])).tolist()
        return {
            "steps": steps,
            "train_loss": sum(losses) / len(losses),
            "training_seconds": round(seconds, 3),
            "tokens_per_second_by_loop_state": rates,
        }


# ---- QUANTIZATION --------------------------------------------------------------------------------
# Limits of scales: fp16 would round a smaller one to 0, by which an all-zero row would be divided.
FP16_RANGE = 2.0**-24, 65504.0
DAMPING_RETRIES = 4
# Step sizes are stored as int8 codes k for 2^(k/8). The step of a weight is its row's times its
# column's: a sum of two codes, -256 to 255. Negative k index EXP2_EIGHTHS from its end, so that
# EXP2_EIGHTHS[k] is 2^(k/8) for them, too.
EXP2_EIGHTHS = np.float32([2.0 ** (k / 8) for k in [*range(256), *range(-256, 0)]])
MAX_SHIFT = 7  # bits of a fine code, see split_wide_codes
MAX_WIDE_CODE = 127 << MAX_SHIFT
LQER_FIELDS = ("lqer_a", "lqer_a_scale", "lqer_b", "lqer_b_scale")
MAX_FP16_ELEMENTS = 65_536  # a tensor with more elements must have a role in QUANT_TABLE


class QuantRole(NamedTuple):
    """How a matrix is quantized: its group in the artifact and the names of its settings."""

    group: str
    bits: str
    clip_sigmas: str


EMBEDDING_ROLE = QuantRole("embedding", "embed_bits", "embed_clip_sigmas")
# by the name of the saved weight, in the order of the artifact's groups
QUANT_TABLE = {
    "tok_emb.weight": EMBEDDING_ROLE,
    "lm_head.weight": EMBEDDING_ROLE,  # TIE_EMBEDDINGS=0
    "bigram.weight": EMBEDDING_ROLE,
    "value_embed.weight": EMBEDDING_ROLE,
    "blocks.{}.attn.c_q.weight": QuantRole("q", "matrix_bits", "attn_clip_sigmas"),
    "blocks.{}.attn.c_k.weight": QuantRole("k", "matrix_bits", "attn_clip_sigmas"),
    "blocks.{}.attn.c_v.weight": QuantRole("v", "matrix_bits", "attn_clip_sigmas"),
    "blocks.{}.attn.c_proj.weight": QuantRole("out", "matrix_bits", "attn_clip_sigmas"),
    "blocks.{}.mlp.c_fc.weight": QuantRole("up", "matrix_bits", "mlp_clip_sigmas"),
    "blocks.{}.mlp.c_proj.weight": QuantRole("down", "matrix_bits", "mlp_clip_sigmas"),
}


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

    The damping of matrices without a factor grows tenfold, up to DAMPING_RETRIES times. ValueError
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
    raise ValueError(f"GPTQ: no Cholesky factor after {DAMPING_RETRIES} retries for {failed_names}")


def to_log2_eighths(x):
    """Positive step sizes -> int8 codes k with the nearest 2^(k/8).

    GPTQ works with the rounded step sizes, so that rounding them adds no error.
    """
    return (8 * x.float().log2()).round_().clamp_(-127, 127).to(torch.int8)


def from_log2_eighths(codes):
    """Codes of to_log2_eighths, or sums of them -> step sizes in float32."""
    return (codes / 8).exp2()


class StepGrid(NamedTuple):
    """Step sizes as codes of to_log2_eighths: a weight's is that of its row times its column's."""

    row_steps: Tensor  # int8 (N, R)
    column_steps: Tensor  # int8 (N, C)


def column_step_grid(upper, row_scale, octaves):
    """StepGrid from factors U (N, C, C) of inverse Hessians and SDClip scales of rows (N, R).

    diag U is the inverse of a column's conditional deviation, the part of its input that the
    columns after it do not predict. With steps proportional to diag U every column adds the same
    weighted error, which is optimal for an entropy coder. `octaves` limits the range, because other
    text may use a column more than the calibration rows did.
    """
    log2_steps = upper.diagonal(dim1=1, dim2=2).log2()
    log2_steps = log2_steps - log2_steps.mean(dim=1, keepdim=True)
    column_steps = to_log2_eighths(log2_steps.clamp(-octaves, octaves).exp2())
    column_steps.clamp_(max=127 - 8 * MAX_SHIFT)  # split_wide_codes may add 8 * MAX_SHIFT
    return StepGrid(to_log2_eighths(row_scale), column_steps)


class OrderedColumns(NamedTuple):
    """Matrices with their columns in the order in which GPTQ quantizes them."""

    weights: Tensor  # (N, C, R): transposed, so that a column is contiguous
    upper: Tensor  # (N, C, C): factors of the damped inverse Hessians
    order: Tensor  # (N, C): original index of each column


def order_columns(w, hessian, damp, names):
    """w (N, R, C) and hessian (N, C, C), both kept -> OrderedColumns, by descending diag H.

    damp: share of the mean of diag H that is added to it.
    """
    h = hessian.float().clone()
    diagonal = h.diagonal(dim1=1, dim2=2)
    damping = damp * diagonal.mean(dim=1)
    dead = diagonal == 0  # inputs that are 0 for all calibration tokens: their weights become 0
    diagonal.masked_fill_(dead, 1.0)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    h = h.gather(1, order[:, :, None].expand_as(h)).gather(2, order[:, None, :].expand_as(h))
    upper = damped_inverse_factor(h, damping, names)
    weights = w.float().mT.masked_fill(dead[:, :, None], 0.0)
    weights = weights.gather(1, order[:, :, None].expand_as(weights))
    return OrderedColumns(weights, upper, order)


def quantize_column(column, step, max_code):
    """One column of all rows (N, R) and their step sizes (N, R) -> codes (N, R) in float32."""
    return (column / step).round_().clamp_(-max_code, max_code)


def quantize_columns(weights, upper, step, max_code, block_size):
    """The loop of GPTQ: quantizes column by column, later columns make up for the error so far.

    weights (N, C, R), overwritten, upper (N, C, C), step (N, R) -> codes (N, C, R) in float32.
    Later columns of a block are updated at once, all others at its end with one matmul. Nothing
    here waits for the device.
    """
    num_columns = weights.shape[1]
    codes = torch.empty_like(weights)
    for start in range(0, num_columns, block_size):
        stop = min(start + block_size, num_columns)
        errors = torch.empty_like(weights[:, start:stop])
        for j in range(start, stop):
            codes[:, j] = quantize_column(weights[:, j], step, max_code)
            error = (weights[:, j] - codes[:, j] * step) / upper[:, j, j, None]
            errors[:, j - start] = error
            later = slice(j + 1, stop)
            weights[:, later].addcmul_(upper[:, j, later, None], error[:, None, :], value=-1.0)
        weights[:, stop:].baddbmm_(upper[:, start:stop, stop:].mT, errors, alpha=-1.0)
    return codes


class QuantizedMatrices(NamedTuple):
    """What gptq_quantize returns; no column_steps if all columns of a row share the row's step."""

    codes: Tensor  # (N, R, C): int8, int16 with column steps
    scale: Tensor  # (N, R): fp16 step sizes, with column steps int8 codes of to_log2_eighths
    column_steps: Tensor | None = None  # (N, C): int8 codes of to_log2_eighths

    def step_sizes(self):
        """The step size of every weight in float32, shape (N, R, 1) or (N, R, C)."""
        rows = self.scale.float()[..., None]
        if self.column_steps is None:
            return rows
        return from_log2_eighths(rows + self.column_steps[:, None])


def gptq_quantize(w, hessian, bits, clip_sigmas, damp, block_size, names, column_octaves=None):
    """GPTQ (arXiv:2210.17323) of w (N, R, C) with Hessians (N, C, C) -> QuantizedMatrices.

    SDClip sets the step sizes of rows: clip_sigmas standard deviations of the original row reach
    the largest code. With column_octaves columns have steps, too (column_step_grid), and nothing is
    clipped, because codes may be wide (split_wide_codes). ValueError with the names of matrices
    whose Hessian is infinite or cannot be made positive definite.
    """
    infinite = [name for name, h in zip(names, hessian, strict=True) if h.isinf().any()]
    if infinite:  # the codes would be noise
        raise ValueError(f"GPTQ: the Hessian of {', '.join(infinite)} has infinite entries")
    max_code = 2 ** (bits - 1) - 1
    scale = (clip_sigmas * w.float().std(dim=2) / max_code).clamp(*FP16_RANGE).half()
    weights, upper, order = order_columns(w, hessian, damp, names)
    if column_octaves is None:
        column_steps = None
        codes = quantize_columns(weights, upper, scale.float(), max_code, block_size)
    else:
        scale, column_steps = column_step_grid(upper, scale, column_octaves)
        # dividing by the column steps leaves a step that all columns of a row share
        column_scale = from_log2_eighths(column_steps)
        weights = weights / column_scale[:, :, None]
        upper = upper / column_scale[:, None, :]
        codes = quantize_columns(
            weights, upper, from_log2_eighths(scale), MAX_WIDE_CODE, block_size
        )
        column_steps = torch.empty_like(column_steps).scatter_(1, order, column_steps)
    codes = torch.empty_like(codes).scatter_(1, order[:, :, None].expand_as(codes), codes)
    dtype = torch.int8 if column_steps is None else torch.int16
    return QuantizedMatrices(codes.mT.to(dtype).contiguous(), scale, column_steps)


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


# --- LQER


def quantize_rows(x, low, high, max_level):
    """x (..., C) -> codes int8 (..., C) in [low, high], scale fp16 (...).

    The largest |x| of a row is max_level times its scale.
    """
    scale = (x.float().abs().amax(dim=-1) / max_level).clamp(*FP16_RANGE).half()
    codes = (x.float() / scale.float()[..., None]).round_().clamp_(low, high)
    return codes.to(torch.int8), scale


def lqer_factors(error, rank, root=None):
    """error (R, C) -> A (R, rank), B (rank, C), the best A B in the Frobenius norm (LQER,
    arXiv:2402.02446). With root (C, C), H = root root^T: the best for the error of the outputs,
    |(error - A B) root|.
    """
    u, s, vh = torch.linalg.svd(
        error.float() if root is None else error.float() @ root, full_matrices=False
    )
    b = (
        vh[:rank]
        if root is None
        else torch.linalg.solve_triangular(root, vh[:rank], upper=False, left=False)
    )
    return u[:, :rank] * s[:rank], b


def pack_factors(a, b, hp):
    """LQER factors a (R, r), b (r, C) -> LQER_FIELDS: int8 codes and fp16 scales.

    With LQER_ASYM_ENABLED a has 2 bits and one scale, b 4 bits and a scale for every
    LQER_ASYM_GROUP elements; else, or if the groups do not divide b, both have LQER_FACTOR_BITS and
    a scale for every row.
    """
    if hp.lqer_asym_enabled and b.numel() % hp.lqer_asym_group == 0:
        a_codes, a_scale = quantize_rows(a.flatten(), -2, 1, 1.5)
        groups = b.reshape(-1, hp.lqer_asym_group)  # a group may cross rows
        b_codes, b_scale = quantize_rows(groups, -8, 7, 7.5)
    else:
        max_code = 2 ** (hp.lqer_factor_bits - 1) - 1
        a_codes, a_scale = quantize_rows(a, -max_code, max_code, max_code)
        b_codes, b_scale = quantize_rows(b, -max_code, max_code, max_code)
    values = a_codes.view_as(a), a_scale, b_codes.view_as(b), b_scale
    return dict(zip(LQER_FIELDS, values, strict=True))


def unpack_factors(fields):
    """LQER_FIELDS of a matrix in fp32 -> A (R, r), B (r, C)."""
    a = fields["lqer_a"]
    a_scale = fields["lqer_a_scale"]
    b = fields["lqer_b"]
    b_scale = fields["lqer_b_scale"]
    if a_scale.ndim == 0:  # LQER_ASYM_ENABLED
        groups = b.reshape(b_scale.size, -1) * b_scale[:, None]
        return a * a_scale, groups.reshape(b.shape)
    return a * a_scale[:, None], b * b_scale[:, None]


# --- all weights of a model


def share_matrices(matrices, world_size):
    """{name: (R, C)} -> names of each rank, loads balanced; the same on every rank."""
    cost = {name: w.shape[0] * w.shape[1] ** 2 for name, w in matrices.items()}
    by_cost = sorted(cost, key=lambda name: (-cost[name], name))
    return balance(by_cost, cost.get, world_size)


def quantize_matrices(names, weights, hessians, hp):
    """GPTQ of the named matrices -> {name: its fields}, {name: error W - dequantized W (R, C)}.

    Matrices with the same shape and settings are quantized as one batch.
    """
    batches = defaultdict(list)
    for name in names:
        role = quant_role(name)
        key = weights[name].shape, getattr(hp, role.bits), getattr(hp, role.clip_sigmas)
        batches[key].append(name)
    column_octaves = hp.gptq_column_octaves if hp.gptq_column_steps else None
    fields = {}
    errors = {}
    for (_, bits, clip_sigmas), batch in batches.items():
        w = torch.stack([weights[name].float() for name in batch])
        h = torch.stack([hessians[name].float() for name in batch])
        if hp.hessian_clip_lambda and quant_role(batch[0]) != EMBEDDING_ROLE:
            clip_sigmas = techniques.hessian_aware_sigmas(w, h, clip_sigmas, hp.hessian_clip_lambda)
        quantized = gptq_quantize(
            w, h, bits, clip_sigmas, hp.gptq_damp, hp.gptq_block_size, batch, column_octaves
        )
        error = w - quantized.codes * quantized.step_sizes()
        for i, name in enumerate(batch):
            fields[name] = {"codes": quantized.codes[i], "scale": quantized.scale[i]}
            if quantized.column_steps is not None:
                fields[name] |= split_wide_codes(quantized.codes[i], quantized.column_steps[i])
            errors[name] = error[i]
    return fields, errors


def quantize_small(name, w, hp):
    """Fields, in its own shape, of a tensor without a role: int8 rows of attention gates, fp16."""
    if name.endswith("attn_gate") and hp.gated_attn_quant_gate:
        codes, scale = quantize_rows(w, -127, 127, 127)
        return {"codes": codes, "scale": scale}
    return {"fp16": w.half()}


def check_quantizable(weights, hessians):
    """ValueError for weights that quantize_weights cannot store; the same on every rank."""
    for name, w in weights.items():
        if not w.half().isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite or beyond fp16")
        if quant_role(name) is None:
            if w.numel() > MAX_FP16_ELEMENTS:
                raise ValueError(
                    f"{name} has {w.numel()} elements and no role in QUANT_TABLE: too large for"
                    " fp16"
                )
        elif name not in hessians or hessians[name].shape != (w.shape[1], w.shape[1]):
            raise ValueError(f"{name} {tuple(w.shape)} needs a Hessian of its columns")


def merge_dicts(dicts):
    """One dict with the items of all."""
    merged = {}
    for items in dicts:
        merged |= items
    return merged


@torch.no_grad()
def quantize_weights(weights, hessians, hp, dist):
    """Saved weights and Hessians (C, C), by name -> numpy arrays "name:field", on every rank.

    Fields: codes, scale, column_steps, fine_*; LQER_FIELDS; fp16. Each matrix is quantized by one
    rank, small tensors by rank 0, and LQER corrects the matrices with the largest errors over all
    ranks. ValueError with the names of the tensors at fault, raised on all ranks.
    """
    check_quantizable(weights, hessians)
    matrices = {name: w for name, w in weights.items() if quant_role(name)}
    try:
        mine = share_matrices(matrices, dist.world_size)[dist.rank]
        fields, errors = quantize_matrices(mine, weights, hessians, hp)
        outcome = {name: error.norm().item() for name, error in errors.items()}
        if hp.lqer_weighted:
            outcome = {
                name: techniques.weighted_gain(error, hessians[name], hp)
                for name, error in errors.items()
            }
    except ValueError as error:  # goes to the other ranks, which would wait for this one's part
        outcome = str(error)
    outcomes = dist.all_gather_object(outcome)
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if failures:
        raise ValueError("; ".join(failures))
    if dist.rank == 0:
        for name in weights.keys() - matrices.keys():
            fields[name] = quantize_small(name, weights[name], hp)
    if hp.lqer_enabled:
        gains = merge_dicts(outcomes)
        by_gain = sorted(gains, key=lambda name: (-gains[name], name))
        for name in set(by_gain[: hp.lqer_top_k]) & set(errors):
            root = (
                techniques.hessian_root(hessians[name], hp.gptq_damp) if hp.lqer_weighted else None
            )
            fields[name] |= pack_factors(*lqer_factors(errors[name], hp.lqer_rank, root), hp)
    arrays = {}
    for name, tensors in fields.items():
        arrays[name] = {field: tensor.cpu().numpy() for field, tensor in tensors.items()}
    arrays = merge_dicts(dist.all_gather_object(arrays))
    return {f"{name}:{field}": array for name in weights for field, array in arrays[name].items()}


# --- rebuilding the weights


def fields_fit(shapes):
    """Whether a weight can be made of fields of these shapes: an artifact may hold any."""
    if shapes.keys() == {"fp16"}:
        return True
    codes = shapes.get("codes", ())
    if "fp16" in shapes or not codes or shapes.get("scale") != codes[:-1]:
        return False
    if shapes.keys() == {"codes", "scale"}:
        return True
    if len(codes) != 2 or shapes.get("column_steps", codes[1:]) != codes[1:]:
        return False
    if "fine_codes" in shapes and "column_steps" not in shapes:
        return False  # add_fine_codes checks their shapes
    if not shapes.keys() & set(LQER_FIELDS):
        return True
    a, b = shapes.get("lqer_a"), shapes.get("lqer_b")
    if not a or not b or (a[0], *b[1:]) != codes or a[1:] != b[:1]:
        return False
    scales = shapes.get("lqer_a_scale"), shapes.get("lqer_b_scale")
    is_asymmetric = scales[0] == () and scales[1] is not None and len(scales[1]) == 1
    return is_asymmetric or scales == (a[:1], b[:1])


def table_steps(codes):
    """Sums of step codes, any float32 numbers -> step sizes, the same bits on every machine."""
    codes = np.nan_to_num(codes).clip(-256, 255)
    return EXP2_EIGHTHS[codes.astype(int)]


def add_fine_codes(w, name, fields, step_codes):
    """Adds the fine codes of split_wide_codes to weights w (R, C), in place.

    step_codes (R, C): what the steps of the coarse codes are in the table.
    """
    absent = np.zeros(0)
    columns = fields.get("fine_columns", absent).astype(int)
    shift = fields.get("fine_shift", absent).astype(int)
    fine_codes = fields["fine_codes"]
    fits = columns.ndim == 1 and shift.shape == columns.shape
    fits = fits and fine_codes.shape == (len(w), len(columns))
    if fits and len(columns):
        is_ascending = (np.diff(columns) > 0).all()
        fits = is_ascending and columns[0] >= 0 and columns[-1] < w.shape[1]
    if not fits:
        raise ValueError(f"{name}: fine codes {fine_codes.shape} do not fit the matrix {w.shape}")
    w[:, columns] += fine_codes * table_steps(step_codes[:, columns] - 8 * shift)


def dequantize_fields(name, fields):
    """Fields of a weight in float32 -> the weight in float32. ValueError if they do not fit."""
    shapes = {field: array.shape for field, array in fields.items()}
    if not fields_fit(shapes):
        raise ValueError(f"{name}: no weight can be made of the fields {shapes}")
    if "fp16" in fields:
        return fields["fp16"]
    codes = fields["codes"]
    scale = fields["scale"][..., None]
    if "column_steps" in fields:
        step_codes = scale + fields["column_steps"]
        w = codes * table_steps(step_codes)
    else:
        w = codes * scale
    if "fine_codes" in fields:
        add_fine_codes(w, name, fields, step_codes)
    if "lqer_a" in fields:
        a, b = unpack_factors(fields)
        for r in range(a.shape[1]):
            w += a[:, r, None] * b[r]
    return w


def dequantize_weights(arrays):
    """Arrays of quantize_weights -> saved weights by name, float32 on the CPU.

    The same bits on every machine: only elementwise float32 operations in a fixed order, as a
    matmul would leave the order of its sums to the BLAS. ValueError for arrays that do not fit.
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
    WATCHED = {
        "qkv": ("attn.c_q", "attn.c_k", "attn.c_v"),
        "attn_proj": ("attn.c_proj",),
        "mlp_up": ("mlp.c_fc",),
        "mlp_down": ("mlp.c_proj",),
    }

    def __init__(self, sums=None, layer=None):
        self.sums = {} if sums is None else sums
        self.layer = layer

    def at(self, slot, layer):
        return HessianTap(self.sums, layer)

    def __call__(self, site, x, y, size=1.0):
        if site in self.WATCHED:
            self.add((site, self.layer), x)
        return y

    def add(self, key, x):
        x = x.flatten(0, -2)
        if x.is_cuda and x.dtype == torch.bfloat16:  # tensor cores, which sum in float32
            gram = torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            gram = x.float().T @ x.float()
        self.sums[key] = self.sums[key] + gram if key in self.sums else gram

    def hessians(self, head_name):
        """{saved weight name: sum (in, in)}; head_name: the weight that makes the logits."""
        by_name = {}
        for (site, layer), gram in self.sums.items():
            names = [f"blocks.{layer}.{matrix}.weight" for matrix in self.WATCHED.get(site, ())]
            by_name |= dict.fromkeys(names or [head_name], gram)
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
        row = (
            techniques.written_row(model, index)
            if hp.gptq_self_calibration
            else loader.row(
                index, index + dist.world_size if index + dist.world_size in mine else None
            )
        )
        hidden = model.forward_hidden(
            row.inputs, row.cu_seqlens, max_seqlen=hp.train_seq_len, looping=True, tap=tap
        )
        tap.add(("lm_head", 0), hidden)
    for gram in tap.sums.values():
        if hp.gptq_all_reduce:
            gram /= hp.gptq_calibration_batches
            dist.all_reduce(gram if mine else gram.zero_())
        else:
            gram /= max(1, len(mine))
    hessians = tap.hessians("tok_emb.weight" if hp.tie_embeddings else "lm_head.weight")
    if hp.bigram_vocab_size or hp.value_embed_layers:
        hessians |= techniques.table_hessians(model)
    # an untied embedding is read one row at a time: every column counts the same
    return {"tok_emb.weight": torch.eye(hp.model_dim, device=dist.device)} | hessians


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
        chunks = zip(hidden[0].split(HEAD_CHUNK), row.targets.split(HEAD_CHUNK), strict=True)
        for h, targets in chunks:
            total += model.token_losses(h, targets).sum(dtype=torch.float64)
    return dist.all_reduce(total).item() / (loader.held_out_rows * hp.micro_batch_tokens)


def plainer_quantizations(hp):
    """Settings to try in turn if quantization as set ruins the model.

    First one step for all columns of a row. Then also a damping as large as the mean of the
    Hessian's diagonal, which leaves little more than rounding to the nearest code.
    """
    row_steps = dataclasses.replace(hp, gptq_column_steps=False)
    damped = dataclasses.replace(row_steps, gptq_damp=max(1.0, hp.gptq_damp))
    return [plainer for plainer in (row_steps, damped) if plainer != hp]


class CheckedQuantization(NamedTuple):
    """Arrays of quantize_weights, the settings they were made with, and their gap."""

    hp: Hyperparameters
    arrays: dict
    gap: (
        float  # nats per token that quantization adds to the held-out loss, inf if it is not finite
    )


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

    def choose(self, quantize, seconds_left):
        """Quantizes as set, then in plainer ways until the gap is at most QUANT_GAP_MAX.

        quantize(hp) -> arrays. Stops early if seconds_left() is less than the last attempt took.
        Returns the settings and arrays with the smallest gap.
        """
        if self.fp32_loss is None:
            return self.hp, quantize(self.hp)
        best = None
        for hp in (self.hp, *plainer_quantizations(self.hp)):
            started = time.perf_counter()
            arrays = quantize(hp)
            gap = self.gap(arrays, hp)
            if best is None or gap < best.gap:
                best = CheckedQuantization(hp, arrays, gap)
                self.kept = self.tried[-1]
            if best.gap <= self.hp.quant_gap_max:
                break
            self.log(
                f"note: quantization adds {gap:.4f} nats a token, more than"
                f" QUANT_GAP_MAX={self.hp.quant_gap_max}"
            )
            # Clocks differ: all ranks must decide the same, or one would wait in a collective.
            (seconds_used,) = self.dist.max_over_ranks(time.perf_counter() - started)
            if seconds_used > seconds_left():
                self.log("note: no seconds are left for a plainer quantization")
                break
        return best.hp, best.arrays

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
# decoder of another version can give wrong weights.
MAGIC = b"GLF1"
PREFIX = struct.Struct("<4sBII")
DIGEST_BYTES = 8
MAX_HEADER_BYTES = 2**20
MAX_RAW_BYTES = 2**30  # of all arrays
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
# intervals and encodes them backwards. RANS_LANES independent states take turns, so that one numpy
# call codes that many symbols. All arithmetic is on integers, so it is the same on every machine.
# One model, code_matrix, drives both directions: it asks the encoder or decoder for symbols.
RANS_LANES = 512  # a lane costs 6 bytes of stream
SYMBOLS = np.arange(-128, 128)
ESCAPE = -128  # announces a symbol that is too rare for its context
# Variances of codes, the contexts. cumprod is exact on every machine, powers are not.
VARIANCES = 0.04 * np.cumprod(np.full(60, 1.15))
ESCAPED_CONTEXT = len(VARIANCES)  # of symbols after an ESCAPE, all equally frequent at first
MAX_SQUARE = 20  # in units of the context's variance; codes with a larger square are escaped


class Intervals(NamedTuple):
    """Intervals [start, start + frequency) of [0, 2^16), one for each entry of flat arrays."""

    starts: np.ndarray
    frequencies: np.ndarray

    def take(self, index):
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
        states = np.full(RANS_LANES, 2**31)
        words = []
        for chunk in reversed(self.chunks):
            for begin in reversed(range(0, len(chunk.starts), RANS_LANES)):
                turn = slice(begin, begin + RANS_LANES)
                f = chunk.frequencies[turn].astype(np.int64)
                x = states[: len(f)]
                full = (x >> 47 >= f).nonzero()[0]
                words.append(x[full].astype("<u4"))
                x[full] >>= 32
                x += x // f * (2**16 - f) + chunk.starts[turn]
        return b"".join([states.astype("<i8"), *reversed(words)])


class SymbolDecoder:
    """The inverse of SymbolEncoder, with the same methods: symbols come out of the stream."""

    def __init__(self, stream):
        size = 8 * RANS_LANES
        self.states = np.frombuffer(stream[:size], "<i8").astype(np.int64)
        self.words = np.frombuffer(stream[size:], "<u4").astype(np.int64)
        self.words_used = 0

    def use(self, counts):
        """From now on symbols are coded with these counts (contexts, 256)."""
        self.table = interval_table(counts)
        # for each context and point of [0, 2^16), the index of the interval that it lies in
        self.index_at = np.arange(counts.size, dtype=np.int16).repeat(self.table.frequencies)

    def code(self, contexts, _):
        """Contexts (n,) -> symbols (n,)."""
        index = np.empty(contexts.size, np.int64)
        for begin in range(0, contexts.size, RANS_LANES):
            turn = slice(begin, begin + RANS_LANES)
            x = self.states[: contexts.size - begin]
            points = x & 65535
            index[turn] = found = self.index_at.take((contexts[turn] << 16) + points)
            intervals = self.table.take(found)
            x >>= 16
            x *= intervals.frequencies
            x += points - intervals.starts
            low = (x < 2**31).nonzero()[0]
            used = self.words_used + len(low)
            x[low] = x[low] << 32 | self.words[self.words_used : used]
            self.words_used = used
        return (index & 255) - 128

    def is_finished(self):
        """Whether all words were used."""
        return self.words_used == len(self.words)


def initial_counts():
    """Counts int64 (contexts, 256) before any code, 64 for each symbol that is taken as seen.

    Nearly Gaussian, without symbols beyond 4.5 deviations, which are escaped.
    """
    squares = SYMBOLS**2
    tails = 1 + squares / (29 * VARIANCES[:, None])
    for _ in range(4):  # to the 16th power, exactly
        tails *= tails
    counts = np.where(squares <= MAX_SQUARE * VARIANCES[:, None], 1 + 32_000 / tails, 0)
    counts[:, ESCAPE + 128] = 3
    return np.vstack([counts, np.ones(256)]).astype(np.int64)


def column_predictor(gram, rows):
    """gram (C, C), the sum of x x^T over rows x -> P (C, C): x_j is about P[j, :j] x[:j].

    In multiples of 2^-12, so that sums of products with codes are exact. Elimination by elementwise
    operations in a fixed order, as the last bits of LAPACK differ between machines.
    """
    size = len(gram)
    ridge = 1 + 800 / rows * np.trace(gram) / size  # keeps pivots positive, even if all codes are 0
    work = np.hstack([gram + ridge * np.eye(size), np.eye(size)]).astype(np.float32)
    for j in range(size):
        part = work[j + 1 :, j : size + j + 1]
        part -= part[:, :1] / work[j, j] * work[j, j : size + j + 1]
    eliminated = work[:, size:].astype(np.float64)
    return np.rint(-4096 * np.tril(eliminated, -1)) / 4096


class ColumnModel:
    """Codes one matrix; the context of a code is the variance of its column in the rows so far."""

    def __init__(self, coder, counts, columns):
        self.coder = coder
        self.counts = counts  # shared by all matrices, so that a matrix starts with learnt counts
        self.sum_squares = np.full(columns, 7.5 * 16)
        self.rows_seen = 16

    def contexts(self):
        """The context of each column."""
        return np.searchsorted(VARIANCES[:-1], self.sum_squares / self.rows_seen)

    def add(self, residual):
        """Adds residuals (rows, columns), which both sides know by now, to the variances."""
        self.sum_squares += (residual * residual).sum(0)
        self.rows_seen += len(residual)

    def code_block(self, block, contexts):
        """Codes integers (rows, columns) in the contexts of their columns, modulo 256.

        Returns them as int64; when decoding, those that come out of the stream.
        """
        contexts = np.tile(contexts, len(block))
        symbols = block.astype(np.int8).astype(np.int64).ravel()
        is_frequent = symbols**2 <= MAX_SQUARE * VARIANCES[contexts]
        coded = self.coder.code(contexts, np.where(is_frequent, symbols, ESCAPE))
        np.add.at(self.counts.ravel(), contexts * 256 + coded + 128, 64)
        escaped = (coded == ESCAPE).nonzero()[0]
        coded[escaped] = self.coder.code(np.full(len(escaped), ESCAPED_CONTEXT), symbols[escaped])
        return coded.reshape(block.shape)

    def code_plain_block(self, block):
        """Codes the block (rows, columns) itself, which is its own residual."""
        block[:] = residual = self.code_block(block, self.contexts())
        self.add(residual)

    def code_predicted_block(self, before, block):
        """Codes each column of the block minus its linear prediction from the columns before it.

        The predictor is fitted to the rows `before`. Returns whether it pays: whether the residuals
        have a smaller sum of squares than the codes.
        """
        before = before.astype(np.float64)
        predictor = column_predictor(before.T @ before, len(before))
        # half the weight for the rows so far, whose predictions were worse
        self.sum_squares //= 2
        self.rows_seen //= 2
        contexts = self.contexts()
        rows, columns = block.shape
        values = np.empty((columns, rows)).T  # a column is contiguous
        residual = np.empty((columns, rows)).T
        for j in range(columns):
            group = j - j % 16
            if j == group:  # one matmul for 16 columns
                means = values[:, :j] @ predictor[j : j + 16, :j].T
            mean = means[:, j - group] + values[:, group:j] @ predictor[j, group:j]
            mean = np.rint(mean).astype(np.int64)
            coded = self.code_block((block[:, j] - mean)[:, None], contexts[j : j + 1])
            residual[:, j] = coded[:, 0]
            block[:, j] = coded[:, 0] + mean
            values[:, j] = block[:, j]
        self.add(residual)
        return (residual * residual).sum() < (values * values).sum()


def code_matrix(coder, counts, codes):
    """Sends codes (R, C) int8 through a coder, which reads (SymbolEncoder) or fills them.

    Blocks of rows are coded in turn, each with variances of the rows before it. In a matrix with
    far more rows than columns (the embedding), columns are predicted from those before them as long
    as that pays.
    """
    rows, columns = codes.shape
    model = ColumnModel(coder, counts, columns)
    use_prediction = rows >= 8 * columns > 0
    start = 0
    while start < rows:
        if use_prediction and start >= 128:
            block = codes[start : start + start // 2]
            use_prediction = model.code_predicted_block(codes[:start], block)
        else:
            size = min(8 + start // 4, 2**20 // max(1, columns))
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
    """The inverse of entropy_compress; no bytes if words of the stream are left over."""
    decoder = SymbolDecoder(data)
    raw = code_matrices(decoder, bytes(raw_size), shapes)
    return raw if decoder.is_finished() else b""


# --- codecs and compressors


def brotli_compress(raw, shapes=()):
    return brotli.compress(raw, quality=11, lgwin=24)


def brotli_decompress(data, raw_size, shapes=()):
    """Stops soon after raw_size bytes: a few bytes of brotli can claim to expand to gigabytes.

    brotli has no portable limit of its output, but small pieces of input give little at a time.
    """
    decoder = brotli.Decompressor()
    raw = bytearray()
    for start in range(0, len(data), 64):
        raw += decoder.process(data[start : start + 64])
        if len(raw) > raw_size:
            break
    return bytes(raw) if decoder.is_finished() else b""


def lzma_compress(raw, shapes=()):
    return lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)


def lzma_decompress(data, raw_size, shapes=()):
    """At most raw_size + 1 bytes; none if the stream is cut off or something follows it."""
    decoder = lzma.LZMADecompressor(memlimit=2**28)
    raw = decoder.decompress(data, max_length=raw_size + 1)
    return raw if decoder.eof and not decoder.unused_data else b""


ENCODERS = {  # (raw bytes, shapes of their arrays) -> stream
    "brotli": brotli_compress,
    "lzma": lzma_compress,
    "lrzip": lambda raw, shapes=(): techniques.run_lrzip(["-z", "-L", "9"], raw),
    "entropy": entropy_compress,
}
DECODERS = {  # (stream, raw size, shapes) -> raw bytes; another number of bytes means a bad stream
    "brotli": brotli_decompress,
    "lzma": lzma_decompress,
    "lrzip": lambda data, raw_size, shapes=(): techniques.lrzip_decompress(data, raw_size),
    "entropy": entropy_decompress,
}


class Compressor(NamedTuple):
    """A value of COMPRESSOR."""

    number: int  # in the file
    codec: str  # of the header, and of all sections but codes
    codes_codec: str | None = None  # of matrices of int8 codes; None: they have no own section

    def codecs(self):
        """Names of all its codecs."""
        return [self.codec] if self.codes_codec is None else [self.codec, self.codes_codec]


COMPRESSORS = {
    "brotli": Compressor(0, "brotli"),
    "lzma": Compressor(1, "lzma"),
    "pergroup": Compressor(2, "brotli", "lrzip"),
    "entropy": Compressor(3, "brotli", "entropy"),
}


def expand(codec, stored, raw_size, shapes=()):
    """Stored bytes -> exactly raw_size bytes, or ArtifactError."""
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
    """SettingError, which says what to install, for an unknown compressor or missing tools."""
    if name not in COMPRESSORS:
        raise SettingError(f"COMPRESSOR={name} is unknown: choose one of {', '.join(COMPRESSORS)}")
    codecs = COMPRESSORS[name].codecs()
    if "brotli" in codecs and brotli is None:
        raise SettingError(
            "the brotli module is missing: pip install brotli, or set COMPRESSOR=lzma"
        )
    if "lrzip" in codecs and shutil.which("lrzip") is None:
        raise SettingError(
            "the lrzip program is missing: apt-get install lrzip, or COMPRESSOR=brotli (needs none)"
        )
    if "lrzip" in codecs and techniques is None:
        raise SettingError(f"COMPRESSOR={name} needs tools/techniques.py beside this file")


def try_compressor(name):
    """check_compressor, and a round trip with each codec: an installed program may still fail."""
    check_compressor(name)
    sample = b"1234" * 8
    shapes = [(4, 8)]
    for codec in COMPRESSORS[name].codecs():
        try:
            stored = ENCODERS[codec](sample, shapes)
            is_same = expand(codec, stored, len(sample), shapes) == sample
            fault = None if is_same else "other bytes"
        except (ArtifactError, OSError) as error:
            fault = error
        if fault:
            raise SettingError(f"COMPRESSOR={name} does not work here, {codec}: {fault}")


# --- the file


class ArraySpec(NamedTuple):
    """Name, dtype and shape of an array as it is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self):
        return self.item_size * math.prod(self.shape)

    @property
    def item_size(self):
        return np.dtype(self.dtype).itemsize

    @property
    def stored_dtype(self):
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
    """ValueError for ArraySpecs of arrays that no artifact holds: a header may be hostile."""
    for spec in specs:
        if not is_valid_spec(spec):
            raise ValueError(f"{spec.name}: an artifact cannot hold {spec.dtype} {spec.shape}")
    is_unique = len({spec.name for spec in specs}) == len(specs)
    if not is_unique or total_bytes(specs) > MAX_RAW_BYTES:
        raise ValueError(f"two arrays have one name, or all take more than {MAX_RAW_BYTES} bytes")


def total_bytes(specs):
    """Bytes of all arrays, not compressed."""
    return sum(spec.num_bytes for spec in specs)


class Section(NamedTuple):
    """A part of the file that is compressed by itself."""

    kind: str  # codes (transposed), orders (of rows, pergroup), rest
    codec: str
    specs: list[ArraySpec]  # of its arrays, as they are stored


def codes_group(spec):
    """Group of the matrix whose codes this array holds; None if it is to be stored as it is."""
    name, _, field = spec.name.rpartition(":")
    role = quant_role(name)
    is_codes = role and field == "codes" and spec.dtype == "int8"
    is_matrix = is_codes and len(spec.shape) == 2 and max(spec.shape) <= 2**16
    return role.group if is_matrix else None


def layer_number(spec):
    return int("0" + re.sub(r"\D", "", spec.name))


def plan_sections(specs, compressor):
    """ArraySpecs -> Sections; packing and unpacking both follow this plan.

    entropy: all "codes" in one section, by group and layer, then the "rest". pergroup (PR 1855):
    a section of "codes" for each group, "orders" of re-ordered rows, and the "rest".
    """
    codec = COMPRESSORS[compressor].codec
    codes_codec = COMPRESSORS[compressor].codes_codec
    if codes_codec is None:
        return [Section("rest", codec, specs)]
    groups = {role.group: [] for role in QUANT_TABLE.values()}
    rest = []
    for spec in specs:
        group = codes_group(spec)
        if group is None:
            rest.append(spec)
        else:
            groups[group].append(spec._replace(shape=spec.shape[::-1]))
    for group in groups.values():
        group.sort(key=layer_number)
    rest = Section("rest", codec, rest)
    if compressor == "entropy":
        members = [spec for group in groups.values() for spec in group]
        return [Section("codes", codes_codec, members), rest]
    orders = [
        ArraySpec(spec.name, "uint16", spec.shape[:1])
        for spec in specs
        if codes_group(spec) in ("embedding", "q", "up") and spec.shape[0]
    ]
    codes = [Section("codes", codes_codec, group) for group in groups.values() if group]
    return [*codes, Section("orders", codec, orders), rest]


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


def pack_weights(arrays, compressor, on_progress=lambda share: None):
    """Numpy arrays by name -> artifact bytes. ValueError for arrays that cannot be packed.

    on_progress(share) is called after each section with the share of raw bytes that are packed.
    """
    specs = [ArraySpec(name, array.dtype.name, array.shape) for name, array in arrays.items()]
    check_compressor(compressor)
    check_specs(specs)
    plan = plan_sections(specs, compressor)
    sources = {"rest": arrays, "codes": {name: array.T for name, array in arrays.items()}}
    sizes_done = []

    def encode(section):
        raw = join_arrays(sources[section.kind], section.specs)
        shapes = [spec.shape for spec in section.specs]
        stored = ENCODERS[section.codec](raw, shapes) if raw else b""
        sizes_done.append(len(raw))
        on_progress(sum(sizes_done) / max(1, sum(total_bytes(s.specs) for s in plan)))
        return stored, SectionRecord(len(stored), digest(stored).hex(), digest(raw).hex())

    with ThreadPoolExecutor(CODEC_THREADS) as pool:
        if compressor == "pergroup":
            techniques.order_rows(arrays, sources, plan[-2].specs, pool)
        encoded = list(pool.map(encode, plan))
    records = [record for _, record in encoded]
    header = json.dumps([specs, records], separators=(",", ":")).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the names and shapes of {len(arrays)} arrays do not fit an artifact's header"
        )
    number = COMPRESSORS[compressor].number
    stored = ENCODERS[COMPRESSORS[compressor].codec](header)
    prefix = PREFIX.pack(MAGIC, number, len(stored), len(header))
    return b"".join([prefix, digest(prefix + stored), stored, *(data for data, _ in encoded)])


class PrefixFields(NamedTuple):
    """What PREFIX packs."""

    magic: bytes
    number: int  # of the compressor
    stored_size: int  # of the header
    raw_size: int


class Header(NamedTuple):
    """What an artifact says about itself, all sizes checked."""

    specs: list[ArraySpec]
    plan: list[Section]
    records: list[SectionRecord]
    start: int  # of the first section


def read_header(blob):
    """Artifact bytes -> Header. ArtifactError if they are damaged or hostile."""
    start = PREFIX.size + DIGEST_BYTES
    prefix = blob[: PREFIX.size].ljust(PREFIX.size, b"\0")
    fields = PrefixFields(*PREFIX.unpack(prefix))
    stored = blob[start : start + fields.stored_size]
    is_intact = fields.magic == MAGIC and digest(prefix + stored) == blob[PREFIX.size : start]
    names = {compressor.number: name for name, compressor in COMPRESSORS.items()}
    if not is_intact or fields.number not in names or fields.raw_size > MAX_HEADER_BYTES:
        raise ArtifactError(
            "artifact: not a file of this program, or its header is damaged or cut off"
        )
    compressor = names[fields.number]
    check_compressor(compressor)
    try:
        raw = expand(COMPRESSORS[compressor].codec, stored, fields.raw_size)
        arrays, sections = json.loads(raw)
        specs = [ArraySpec(name, dtype, tuple(shape)) for name, dtype, shape in arrays]
        records = [SectionRecord(*section) for section in sections]
        check_specs(specs)
        plan = plan_sections(specs, compressor)
        start += fields.stored_size
        is_sized = all(type(record.size) is int and record.size >= 0 for record in records)
        is_sized = is_sized and start + sum(record.size for record in records) == len(blob)
        if not is_sized or len(records) != len(plan):
            raise ValueError("its sections are not those of its arrays, or not as long as the file")
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"artifact: the header is wrong: {error}") from error
    return Header(specs, plan, records, start)


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

    arrays = {"rest": {}, "codes": {}, "orders": {}}
    with ThreadPoolExecutor(CODEC_THREADS) as pool:
        decoded = pool.map(decode, header.plan, header.records, ends[1:])
        for section, unpacked in zip(header.plan, decoded, strict=True):
            arrays[section.kind] |= unpacked
    unpacked = arrays["rest"] | {name: codes.T for name, codes in arrays["codes"].items()}
    if arrays["orders"]:
        techniques.restore_rows(unpacked, arrays["orders"])
    return {
        spec.name: np.array(unpacked[spec.name], spec.dtype, order="C") for spec in header.specs
    }


# ---- EVALUATION ----------------------------------------------------------------------------------
HEAD_CHUNK = 8192  # positions whose float32 logits exist at a time


def bits_per_byte(nats, charges):
    return nats / math.log(2) / charges


class Score:
    """Sums of a scoring: nats, tokens and bytes, kept on the device in float64."""

    def __init__(self, device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, losses, scored, charges):
        """(...) nats, bool, bytes: counts the scored positions."""
        losses = torch.where(scored, losses, 0.0).double().sum()
        self.sums += torch.stack([losses, scored.sum(), torch.where(scored, charges, 0).sum()])

    def total(self, dist, expected):
        """Sums over ranks -> {loss, bpb, tokens, bytes}.

        Raises RuntimeError unless (tokens, bytes) are as expected.
        """
        nats, tokens, charges = dist.all_reduce(self.sums.clone()).tolist()
        if (int(tokens), int(charges)) != tuple(expected):
            raise RuntimeError(
                f"scored {int(tokens)} tokens and {int(charges)} bytes, the documents have"
                f" {expected}"
            )
        bpb = bits_per_byte(nats, charges)
        return {"loss": nats / tokens, "bpb": bpb, "tokens": int(tokens), "bytes": int(charges)}


def document_windows(starts, ends, length, stride):
    """Input spans of documents -> (n, 3) int64 windows: start, end, first input that is scored.
    Windows advance by the stride; the first scores all its inputs, the others the last `stride`
    that no window before them scored: every target is scored once, with the longest context. stride
    = length gives disjoint pieces.
    """
    targets = ends - starts
    count = np.where(targets > 0, np.maximum(1, 1 - (length - targets) // stride), 0)
    document = np.repeat(np.arange(len(starts)), count)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    start = starts[document] + number * stride
    first = np.where(number == 0, start, start + length - stride)
    return np.stack([start, np.minimum(start + length, ends[document]), first], axis=1)


class ScoredRow(NamedTuple):
    """Windows packed in one row, padded to a fixed length; windows never attend to each other."""

    inputs: Tensor  # (1, T) int64
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (N + 1,) int32
    fresh: Tensor  # (1, T) bool: a window starts here, there is no previous token
    scored: Tensor  # (T,) bool
    charges: Tensor  # (T,) int64 bytes of the target


class WindowPacker:
    """Packs windows of the validation stream, in order, into rows of one shape; the stream
    lives on the device.
    """

    def __init__(self, validation, row_tokens, max_window, entries, device):
        self.row_tokens, self.max_window, self.entries = (
            max(row_tokens, max_window),
            max_window,
            entries,
        )
        self.device, self.end = device, len(validation.tokens) - 1
        self.tokens = torch.from_numpy(validation.tokens).to(device)
        self.bytes = torch.from_numpy(validation.bytes).to(device)

    def rows(self, windows):
        """(n, 3) windows -> list of (first, last) window numbers of each row."""
        rows, first, filled = [], 0, 0
        # the padding is cut in pieces, too
        most = self.entries - -(-self.row_tokens // self.max_window)
        for number, length in enumerate((windows[:, 1] - windows[:, 0]).tolist()):
            if number > first and (filled + length > self.row_tokens or number - first >= most):
                rows.append((first, number))
                first, filled = number, 0
            filled += length
        return [*rows, (first, len(windows))] if len(windows) else []

    def build(self, windows):
        """Windows of one row -> ScoredRow."""
        start, end, first = windows.T
        lengths = end - start
        borders = np.concatenate([[0], np.cumsum(lengths)])
        filled = int(borders[-1])
        padding = np.arange(filled, self.row_tokens, self.max_window)
        cu_seqlens = pad_cu_seqlens(
            np.concatenate([borders[:-1], padding]), self.row_tokens, self.entries
        )
        # padding reads the stream's last token and is not scored
        source = np.full(self.row_tokens, self.end)
        source[:filled] = np.repeat(start - borders[:-1], lengths) + np.arange(filled)
        scored = np.zeros(self.row_tokens, bool)
        scored[:filled] = source[:filled] >= np.repeat(first, lengths)
        fresh = np.zeros(self.row_tokens, bool)
        fresh[borders[:-1]] = True
        source, scored, fresh, cu = (
            torch.from_numpy(a).to(self.device) for a in (source, scored, fresh, cu_seqlens)
        )
        target = (source + 1).clamp_max(self.end)
        return ScoredRow(
            self.tokens[source][None],
            self.tokens[target],
            cu,
            fresh[None],
            scored,
            self.bytes[target],
        )


class Evaluator:
    """Plain and sliding-window BPB of a model: packed rows shared out over ranks, every target
    scored exactly once.
    """

    def __init__(self, model, validation, hp, dist):
        self.model, self.validation, self.hp, self.dist = model, validation, hp, dist
        # of a row that is full of whole ones, or of padding
        windows = -(-hp.micro_batch_tokens // hp.eval_seq_len)
        entries = max(hp.row_segments, 2 * windows + 8)
        self.packer = WindowPacker(
            validation, hp.micro_batch_tokens, hp.eval_seq_len, entries, dist.device
        )
        self.parts = SimpleNamespace(
            **{
                name: compiled(getattr(model, name), hp, dist)
                for name in ("enter", "block", "token_losses")
            }
        )

    def row_losses(self, row):
        """ScoredRow -> (T,) nats, float32 head."""
        hidden = self.model.forward_hidden(
            row.inputs,
            row.cu_seqlens,
            max_seqlen=self.hp.eval_seq_len,
            looping=True,
            fresh=row.fresh,
            parts=self.parts,
        )
        pairs = zip(hidden[0].split(HEAD_CHUNK), row.targets.split(HEAD_CHUNK), strict=True)
        return torch.cat([self.parts.token_losses(h, t) for h, t in pairs])

    @torch.no_grad()
    def count(self, windows, score, first_row=0, every=1):
        """Adds the losses of windows to a score: of every row they fill, or of one row in
        `every`.
        """
        for first, last in self.packer.rows(windows)[first_row::every]:
            row = self.packer.build(windows[first:last])
            score.add(self.row_losses(row), row.scored, row.charges)

    def evaluate_bpb(self, stride=None):
        """Scores the whole validation set -> {loss, bpb, tokens, bytes}; with a stride:
        sliding windows.
        """
        stream, length = self.validation, self.hp.eval_seq_len
        windows = document_windows(stream.starts, stream.ends, length, stride or length)
        score = Score(self.dist.device)
        self.count(windows, score, self.dist.rank, self.dist.world_size)
        return score.total(self.dist, stream.targets_of(np.arange(len(stream.starts))))


# ---- TEST-TIME TRAINING --------------------------------------------------------------------------
# Score first: a chunk's loss is added to the score before anything trains on the chunk. What is
# handed on is fixed before the loop: documents, longest first -> phases -> lanes -> places. A place
# is a sequence of documents on a rank; only LoRA's A is handed on, inside a place; base weights
# change between phases, from documents already scored. Places are scored side by side, in steps of
# few static shapes; who shares a step with whom changes rounding, nothing else.


class Phase(NamedTuple):
    """Documents that are scored with the same base weights; afterwards they fine-tune it if
    `adapt` is set.
    """

    lanes: list  # for each lane its places, for each place the numbers of its documents
    documents: np.ndarray
    adapt: bool


def plan_ttt(lengths, hp):
    """(n,) targets of each document -> list of Phase, the same for every world size."""
    order, costs = np.argsort(-lengths, kind="stable"), window_positions(lengths, hp).tolist()
    prefix, number = (
        min(len(order), round(hp.phased_ttt_prefix_docs * len(order) / 50_000)),
        hp.phased_ttt_num_phases,
    )
    borders, phases = [prefix * (i + 1) // number for i in range(number)], []
    for number, (first, last) in enumerate(zip([0, *borders], [*borders, len(order)], strict=True)):
        places = balance(
            order[first:last].tolist(), costs.__getitem__, hp.ttt_lanes * hp.ttt_batch_size
        )
        lanes = [places[lane :: hp.ttt_lanes] for lane in range(hp.ttt_lanes)]
        if last > first:
            phases.append(Phase(lanes, order[first:last], adapt=number < len(borders)))
    return phases


def window_positions(lengths, hp):
    """(n,) targets -> (n,) window positions that scoring these documents computes: the cost of
    a document.
    """
    chunk = techniques.chunk_size(lengths, hp) if hp.ttt_short_chunks else hp.ttt_chunk_size
    context = (
        hp.ttt_eval_seq_len - hp.ttt_stale_context if hp.ttt_stale_context else hp.ttt_eval_seq_len
    )
    chunks = -(-lengths // chunk)
    growing = np.minimum(chunks, context // chunk)
    return chunk * growing * (growing + 1) // 2 + (chunks - growing) * context


class Step(NamedTuple):
    """Chunks of several documents, scored and learned from together."""

    table: np.ndarray  # (B, 6) int64, see TestTimeTrainer.chunk_step
    begins: np.ndarray  # (n, 2) state row, place: documents that begin with this step
    ends: np.ndarray  # (n, 2) documents that end with it
    width: int  # of the windows, stale context included
    cost: float = 0.0  # seconds, of step_cost


def step_cost(rows, width, fresh=0):
    """Seconds of a step of the default model on an H100: launches, adapters, positions (`fresh`
    at most), attention.
    """
    if fresh and width > fresh:
        return step_cost(rows, fresh) + 1.5e-3 + rows * (width - fresh) * (8e-9 + 3.2e-10 * fresh)
    return 3e-3 + rows * (7e-5 + width * (1.08e-6 + 5.5e-11 * width))


def schedule_ttt(places, starts, lengths, flight, hp):
    """Documents of each place, (n,) inputs' starts and targets of all -> list of Step, on `flight`
    state rows at most. The next step is of the width whose rows cost least more than in a full
    step, with the places in it that have most chunks left, so that none is left alone at the end.
    """
    context, batch = hp.ttt_eval_seq_len, hp.ttt_batch_size
    fresh = hp.ttt_stale_context and context - hp.ttt_stale_context
    widths = sorted(
        {max(hp.ttt_chunk_size, -(-context * share // 16)) for share in (1, 2, 4, 8, 12, 16)}
    )
    row_counts = sorted({max(2, batch // share) for share in (16, 4, 1)})
    starts, lengths = starts.tolist(), lengths.tolist()

    def chunks(document):  # context, whether it is the last, what follows the rows in the table
        length = lengths[document]
        size = int(techniques.chunk_size(length, hp)) if hp.ttt_short_chunks else hp.ttt_chunk_size
        for number, first in enumerate(range(0, length, size), 1):
            end = min(first + size, length)
            window = max(0, end - (fresh or context))
            yield (
                min(end, context),
                end == length,
                starts[document] + window,
                first - window,
                end - first,
                number,
            )

    left = [
        [chunk for document in documents for chunk in chunks(document)][::-1]
        for documents in places
    ]
    waiting = sorted(
        (place for place, chunks in enumerate(left) if chunks), key=lambda place: len(left[place])
    )
    steps, free, ready = [], list(range(flight)), [[] for _ in widths]

    def enqueue(row, place):
        ready[sum(width < left[place][-1][0] for width in widths)].append((row, place))

    def waste(choice):
        i, rows = choice
        part = step_cost(rows, widths[i], fresh) / step_cost(row_counts[-1], widths[i], fresh)
        return part / min(len(ready[i]), rows)

    while waiting or any(ready):
        while waiting and free:
            enqueue(free.pop(), waiting.pop())
        number, rows = min(
            ((i, rows) for i, queue in enumerate(ready) if queue for rows in row_counts), key=waste
        )
        queue, width = sorted(ready[number], key=lambda pair: -len(left[pair[1]])), widths[number]
        taken, ready[number] = queue[:rows], queue[rows:]
        table, begins, ends = [(flight, flight, 0, 0, 0, 1)] * (rows - len(taken)), [], []
        for row, place in taken:
            _, last, *columns = left[place].pop()
            table.append((row, flight if last else row, *columns))
            begins += [(row, place)] * (columns[-1] == 1)
            ends += [(row, place)] * last
            enqueue(row, place) if left[place] else free.append(row)
        begins, ends = (np.array(pairs, np.int64).reshape(-1, 2) for pairs in (begins, ends))
        steps.append(Step(np.array(table), begins, ends, width, step_cost(rows, width, fresh)))
    return steps


LORA_INPUTS = (("q", "k", "v", "attn_out"), ("mlp_out",))  # sites that read the same tensor


class SlotLoRA:
    """Adds (x A) B at the sites of one slot, one pair (A, B) for each row of the batch. a: [(sites
    that read the same x, (B, in, sites R))]: one product serves them all, from the first of them
    on; b: {site: (B, R, out)}, alpha / rank included; out is what `widths` says.
    """

    splits_mlp = False

    def __init__(self, a, b, widths):
        self.a, self.b, self.widths, self.low = a, b, widths, {}

    def matrices(self):
        return [*(matrix for _, matrix in self.a), *self.b.values()]

    def __call__(self, site, x, y, size=1.0):
        sites = [*site] if site == "qkv" else [site]
        present = [name for name in sites if name in self.b]
        if not present:
            return y
        for reading, a in self.a:
            if reading[0] in present:
                self.low.update(zip(reading, (x @ a).chunk(len(reading), -1), strict=True))
        # small matrices are scaled, not streams: the gradient of y then is that of each product as
        # it stands
        added = [
            (
                self.low.pop(name) @ (self.b[name] * size)
                if name in self.b
                else x.new_zeros(*x.shape[:-1], self.widths[name])
            )
            for name in sites
        ]
        return y + torch.cat(added, -1)


class BatchedLoRA:
    """The adapters of a rank's documents, and their AdamW (beta1 = 0), in flat float32 rows. A row
    is
    a document in flight, the last one scratch: A of the head, A of every slot, B of every slot, B
    of the head; matrices are (in, out), as their gradients come. `kept` holds A of every place
    between its documents.
    """

    def __init__(self, model, lanes, hp, device, update):
        D, R, kv_dim, places = (
            hp.model_dim,
            hp.ttt_lora_rank,
            hp.num_kv_heads * hp.head_dim,
            hp.ttt_batch_size,
        )
        self.hp, self.dtype, self.slots, self.update = (
            hp,
            model.dtype,
            len(model.slots(looping=True)),
            update,
        )
        self.flight = min(2 * places, places * len(lanes))
        self.widths = {
            "q": D,
            "k": kv_dim,
            "v": kv_dim,
            "attn_out": D,
            "mlp_out": D,
            "lm_head": hp.num_embeddings,
        }
        self.sites = [
            site for name, site in LORA_SITES.items() if name in hp.lora_sites and site != "lm_head"
        ]
        reads = (tuple(site for site in sites if site in self.sites) for sites in LORA_INPUTS)
        self.reads = [sites for sites in reads if sites]
        self.shapes = (
            [(D, len(sites) * R) for sites in self.reads],
            [(R, self.widths[site]) for site in self.sites],
        )
        a, b = (self.slots * sum(map(math.prod, shapes)) for shapes in self.shapes)
        head = R if "head" in hp.lora_sites else 0
        self.parts, scale = (D * head, a, b, head * hp.num_embeddings), hp.ttt_lora_alpha / R
        self.scales = 1.0, 1.0, scale, scale
        self.kept = torch.empty(len(lanes), places, D * head + a, device=device)
        for lane, kept in zip(lanes, self.kept, strict=True):  # the same on any rank
            generator = torch.Generator(device).manual_seed(hp.generator_seed * 1_000_003 + lane)
            kept.uniform_(-(D**-0.5), D**-0.5, generator=generator)
        self.kept = self.kept.flatten(0, 1)
        self.values, self.squares = (
            torch.zeros(self.flight + 1, sum(self.parts), device=device) for _ in range(2)
        )

    def begin(self, rows, places):
        """New documents in these rows: A as their place has kept it, B zero, no squares."""
        self.values[rows] = F.pad(self.kept[places], (0, self.values.size(1) - self.kept.size(1)))
        self.squares[rows] = 0.0

    def end(self, rows, places):
        """Leaves A of finished documents to the next document in their place."""
        if self.hp.ttt_warm_start_a:
            self.kept[places] = self.values[rows, : self.kept.size(1)]

    def factors(self, values, rows):
        """Flat rows of these numbers -> their parts as the model takes them: the slots'
        cast, B times alpha / rank.
        """
        parts = zip(values[rows].split(self.parts, 1), self.scales, strict=True)
        return [
            (part * scale).to(self.dtype if 0 < i < 3 else part.dtype)
            for i, (part, scale) in enumerate(parts)
        ]

    def tap(self, factors):
        """Factors of rows -> what GPT asks for them: a SlotLoRA of each slot, and the
        head's in float32.
        """
        R, pieces = self.hp.ttt_lora_rank, []
        for part, shapes in zip(factors[1:3], self.shapes, strict=True):
            shapes = shapes * self.slots
            pieces += [
                t.unflatten(1, s)
                for t, s in zip(part.split([*map(math.prod, shapes)], 1), shapes, strict=True)
            ]
        matrices = iter(pieces)
        a = [[(sites, next(matrices)) for sites in self.reads] for _ in range(self.slots)]
        slots = [
            SlotLoRA(of_slot, {site: next(matrices) for site in self.sites}, self.widths)
            for of_slot in a
        ]
        of_head, site = (
            (
                factors[0].unflatten(1, (-1, R)),
                factors[3].unflatten(1, (R, -1)),
            ),
            "lm_head",
        )
        head = (
            SlotLoRA([((site,), of_head[0])], {site: of_head[1]}, {})
            if self.parts[0]
            else SlotLoRA([], {}, {})
        )
        return SimpleNamespace(slots=slots, at=lambda slot, layer: slots[slot], head=head)

    @torch.no_grad()
    def step(self, gradients, source, target, number):
        """One AdamW step of state rows `source` (B,), their `number`-th (B,), into rows
        `target` (B,).
        """
        rates, first = (self.hp.ttt_lora_lr, self.hp.ttt_weight_decay, self.hp.ttt_beta2), 0
        correction = (1 - rates[2] ** number.double()).to(self.values.dtype)
        for gradient, scale in zip(gradients, self.scales, strict=True):
            part = slice(first, first := first + gradient.size(1))
            self.update(
                self.values[:, part],
                self.squares[:, part],
                gradient,
                source,
                target,
                correction,
                scale,
                rates,
            )


def sgd_step(model, packer, windows, optimizer, rate, dist):
    """One SGD step at learning rate `rate` of all ranks on the mean loss of windows (n, 3); one
    flat all-reduce.
    """
    mine, tokens = windows[dist.rank :: dist.world_size], int((windows[:, 1] - windows[:, 0]).sum())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for first, last in packer.rows(mine):
        row = packer.build(mine[first:last])
        losses = model(row.inputs, row.targets, row.cu_seqlens, True, packer.max_window, row.fresh)
        (torch.where(row.scored, losses, 0.0).sum() / tokens).backward()
    dist.all_reduce_packed([p.grad for p in model.parameters()])
    torch.nn.utils.clip_grad_norm_(model.parameters(), model.hp.global_ttt_grad_clip)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


def attention_stale(ops, q, k, v, packing):
    """(B, T, H, E), (B, T, K, E) twice -> (B, T, H, E), causal, of rows behind their older keys and
    values. packing: of StaleContext.of_slot. Row after row stand the older ones, which are at
    `places` (N,) of a cache (2, M, K, E), and the row's own, which are at `fresh` (B T,) of the N;
    cu_seqlens (2, B + 1) counts both. The own ones are left in `new`.
    """
    cache, places, fresh, cu_seqlens, max_seqlen, new = packing
    new += k, v
    k, v = (
        c[places].index_copy(0, fresh, t.flatten(0, 1))[None]
        for c, t in zip(cache, (k, v), strict=True)
    )
    own = q.flatten(0, 1)[None]
    if ops.names["attention"] != "sdpa":
        return ops.attention(own, k, v, cu_seqlens, max_seqlen).view(q.shape)
    # the reference takes a query for every key; nobody asks what the others find
    every = own.new_zeros(1, k.size(1), *own.shape[2:]).index_copy(1, fresh, own)
    return ops.attention(every, k, v, cu_seqlens[1], max_seqlen)[:, fresh].view(q.shape)


class StaleContext:
    """Keys and values from before the windows, as the last step with these positions in its windows
    left them [TTT_STALE_CONTEXT]: adapters have learnt since. A row is a document in flight,
    position p at p mod its length.
    """

    def __init__(self, model, starts, flight, device):
        hp = model.hp
        self.hp, self.length = hp, hp.ttt_stale_context + hp.ttt_chunk_size
        shape = (
            len(model.slots(looping=True)),
            2,
            (flight + 1) * self.length,
            hp.num_kv_heads,
            hp.head_dim,
        )
        self.cache, self.starts = (
            model.cos.new_zeros(shape, dtype=model.dtype),
            torch.from_numpy(starts).to(device),
        )

    def begin(self, rows, windows, width):
        """A step begins, with windows (B,) from these places of the stream -> how many
        positions it computes.
        """
        self.width = min(width, self.hp.ttt_eval_seq_len - self.hp.ttt_stale_context)
        cached = max(width - self.width, self.hp.ttt_chunk_size)
        before = windows - self.starts[torch.searchsorted(self.starts, windows, right=True) - 1]
        self.positions = before[:, None] + torch.arange(self.width, device=rows.device)
        older = before.clamp_max(cached)
        ends = (older + self.width).cumsum(0)
        place = torch.arange(len(rows) * (cached + self.width), device=rows.device)
        # behind the last end nobody looks
        row = torch.searchsorted(ends, place, right=True).clamp_max(len(rows) - 1)
        position = (before + self.width - ends)[row] + place
        self.places = rows[row] * self.length + position % self.length
        self.fresh = (ends[:, None] + torch.arange(-self.width, 0, device=rows.device)).flatten()
        queries = torch.arange(len(rows) + 1, device=rows.device) * self.width
        self.cu_seqlens = torch.stack((queries, F.pad(ends, (1, 0)))).int()
        self.rope, self.new = rotary_tables(self.positions, self.hp), []
        return self.width

    def own(self, *streams):
        """Streams (B, T or 1 + T, D), or None -> without the token before."""
        return [x if x is None else x[:, -self.width :].contiguous() for x in streams]

    def of_slot(self, *streams):
        """Streams as `own` takes them -> without the token before, tables and packing of
        the next slot.
        """
        self.new.append([])
        of_slot, longest = self.cache[len(self.new) - 1], self.hp.ttt_eval_seq_len
        packing = of_slot, self.places, self.fresh, self.cu_seqlens, longest, self.new[-1]
        return *self.own(*streams), self.rope, packing

    def end(self, rows):
        """A step ends: the first chunk of its windows, which may lie before the next ones,
        is kept in rows (B,).
        """
        chunk = self.hp.ttt_chunk_size
        places = rows[:, None] * self.length + self.positions[:, :chunk] % self.length
        new = [torch.stack([t[:, :chunk].detach() for t in of_slot]) for of_slot in self.new]
        self.cache[:, :, places], self.new = torch.stack(new), []


def documents_to_score(validation, hp):
    """Numbers of the documents that test-time training scores: all, or TTT_MAX_DOCS of all lengths.
    Raises DataError where these hold no byte.
    """
    order, count = (
        np.argsort(validation.ends - validation.starts, kind="stable"),
        len(validation.starts),
    )
    wanted = min(hp.ttt_max_docs or count, count)
    documents = np.sort(order[(2 * np.arange(wanted) + 1) * count // (2 * wanted)])
    if hp.ttt_enabled and not validation.targets_of(documents)[1]:
        raise DataError(
            f"TTT_MAX_DOCS={hp.ttt_max_docs}: the documents that are left hold no byte: take more"
        )
    return documents


class TestTimeTrainer:
    """Scores documents chunk by chunk, one LoRA step per scored chunk, base fine-tuning between
    phases.
    """

    def __init__(self, model, validation, hp, dist, log):
        # tables of adapters and the upload of the stream are of the budget too
        self.started = time.perf_counter()
        self.model, self.validation, self.hp, self.dist, self.log = model, validation, hp, dist, log
        self.documents = documents_to_score(validation, hp)
        row_tokens = -(-hp.global_ttt_chunk_tokens // dist.world_size) + hp.ttt_eval_seq_len
        entries = max(hp.row_segments, 4 * row_tokens // hp.ttt_eval_seq_len + 8)
        self.packer = WindowPacker(
            validation, row_tokens, hp.ttt_eval_seq_len, entries, dist.device
        )
        self.lanes = range(dist.rank, hp.ttt_lanes, dist.world_size)
        self.lora = BatchedLoRA(model, self.lanes, hp, dist.device, model.ops.adamw_rows)
        self.enter, self.block, self.factors, self.head = (
            compiled(f, hp, dist, dynamic=None)
            for f in (
                model.enter,
                model.block,
                self.lora.factors,
                (
                    techniques.with_tilt(model.token_losses)
                    if hp.ngram_tilt_enabled
                    else model.token_losses
                ),
            )
        )
        if hp.ttt_stale_context:
            self.stale = StaleContext(model, validation.starts, self.lora.flight, dist.device)
        self.score, self.warming_up, self.graphs = Score(dist.device), False, {}
        if hp.ngram_tilt_enabled:  # the stream with the hint at each place
            self.hinted = F.pad(self.packer.tokens[:, None], (0, 1), value=-1)

    def chunk_losses(self, windows, targets, positions, tap):
        """Windows (B, W), targets and their positions in the windows (B, C), adapters ->
        (B, C) nats, float32 head.
        """
        parts = SimpleNamespace(enter=self.dynamic_enter, block=self.dynamic_block)
        hidden = self.model.forward_hidden(
            windows, max_seqlen=self.hp.ttt_eval_seq_len, looping=True, tap=tap, parts=parts
        )
        scored = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.size(2)))
        self.mark_dynamic([0], scored, targets, *tap.head.matrices())
        return self.head(scored, targets, tap.head)

    # Compiled: GPT.enter, block and token_losses, BatchedLoRA.factors: one graph each for any
    # number of rows and width of windows; layer by layer, because tracing all slots at once with
    # unknown shapes takes minutes.

    def dynamic_enter(self, x, x0, w, wants, *skip):
        if self.hp.ttt_stale_context:
            x, x0 = self.stale.own(x, x0)
        # the first layer shares the graph of the others
        x = x if x.requires_grad else x.detach().requires_grad_()
        self.mark_dynamic([0, 1], x, x0, *skip[:1])
        return self.enter(x, x0, w, wants, *skip)

    def dynamic_block(self, entry, mlp_lane, w, rope, packing, tap):
        if self.hp.ttt_stale_context:
            mlp_lane, rope, packing = self.stale.of_slot(mlp_lane)
            self.mark_dynamic([0, 1], *rope)
            self.mark_dynamic([0], *packing[1:3])
            self.mark_dynamic([1], packing[3])
        self.mark_dynamic([0, 1], *entry, mlp_lane)
        self.mark_dynamic([0], *rope, *tap.matrices())
        if self.hp.new_values:
            self.mark_dynamic([0, 1], *techniques.streams_of(w.extras))
        return self.block(entry, mlp_lane, w, rope, packing, tap)

    def mark_dynamic(self, dimensions, *tensors):
        for tensor in tensors:
            # later tensors need no marks, and marking takes time
            if self.warming_up and tensor is not None:
                torch._dynamo.mark_dynamic(tensor, dimensions)

    def no_chunks(self, rows):
        """(B, 6) table whose rows count nothing and learn nothing."""
        return torch.tensor([[self.lora.flight] * 2 + [0, 0, 0, 1]] * rows, device=self.dist.device)

    def warm_up(self):
        """Compiles the graphs of all steps on the largest shape: kernels are chosen for
        where the time goes.
        """
        self.warming_up, rows = True, max(2, self.hp.ttt_batch_size)
        if self.hp.ttt_stale_context:  # sizes that are equal here are taken to be equal always
            rows += rows == self.hp.ttt_eval_seq_len - self.hp.ttt_stale_context
        self.chunk_step(self.no_chunks(rows), self.hp.ttt_eval_seq_len)
        self.warming_up = False

    def chunk_step(self, table, width):
        """Counts the chunks of a table, then learns from them. The host knows the shapes only and
        waits for nothing. Columns of the table (B, 6): state row, row to write to (scratch: the
        chunk is a document's last, there is no step), place of the window in the stream, of the
        chunk in the window, targets, which step of the document it is. A row without targets is
        padding.
        """
        # each column, for the kernel
        source, target, window, first, count, number = table.T.contiguous()
        device, tokens = table.device, self.packer.tokens
        if self.hp.ttt_stale_context:
            width = self.stale.begin(source, window, width)
        offset, last = (
            torch.arange(self.hp.ttt_chunk_size, device=device),
            (first + count - 1).clamp_min(0)[:, None],
        )
        # short windows repeat their last input behind it, unseen; behind stale context SmearGate
        # reads the token before
        columns = torch.arange(-1 if self.hp.ttt_stale_context else 0, width, device=device)
        inputs = window[:, None] + torch.minimum(columns, last)
        positions = torch.minimum(first[:, None] + offset, last)
        targets, scored = window[:, None] + positions + 1, offset < count[:, None]
        self.mark_dynamic([0], source)
        factors = [part.requires_grad_() for part in self.factors(self.lora.values, source)]
        losses = self.chunk_losses(
            tokens[inputs],
            (self.hinted if self.hp.ngram_tilt_enabled else tokens)[targets],
            positions,
            self.lora.tap(factors),
        )
        if self.hp.ngram_tilt_enabled:
            losses, tilted = losses
        self.score.add(
            (tilted if self.hp.ngram_tilt_enabled else losses).detach(),
            scored,
            self.packer.bytes[targets],
        )
        means = torch.where(scored, losses, 0.0).sum(1) / count.clamp_min(1)
        loss = torch.where(target < self.lora.flight, means, 0.0).sum()
        self.lora.step(
            torch.autograd.grad(loss, factors, materialize_grads=True), source, target, number
        )
        if self.hp.ttt_stale_context:
            self.stale.end(target)

    def capture(self, steps):
        """Records chunk_step as a CUDA graph for each shape of these steps; where that fails, they
        run
        as they are. Every shape runs once before, on a side stream, as torch asks for. They share
        one pool, the largest first.
        """
        if self.dist.device.type != "cuda" or not self.hp.kernels:
            return
        shapes = {(len(step.table), step.width) for step in steps}
        tables = {
            shape: self.no_chunks(shape[0]) for shape in sorted(shapes, key=math.prod, reverse=True)
        }
        pool, side, started = (
            torch.cuda.graph_pool_handle(),
            torch.cuda.Stream(),
            time.perf_counter(),
        )
        torch.cuda.empty_cache()
        try:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for shape, table in tables.items():
                    self.chunk_step(table, shape[1])
            torch.cuda.current_stream().wait_stream(side)
            for shape, table in tables.items():
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    self.chunk_step(table, shape[1])
                self.graphs[shape] = graph, table
        except RuntimeError as error:
            self.graphs.clear()
            self.log(f"note: test-time training runs without CUDA graphs: {error}")
        self.log(
            f"ttt_graphs captured:{len(self.graphs)} of:{len(shapes)}"
            f" seconds:{time.perf_counter() - started:.1f}"
        )

    def run_steps(self, steps):
        """Counts and learns in the steps' order until the budget ends -> steps left.

        Tables are copied all at once.
        """
        self.capture(steps)
        self.stepping = time.perf_counter() - self.spent
        uploads = [
            torch.from_numpy(np.concatenate(parts)).to(self.dist.device).split([*map(len, parts)])
            for parts in zip(*(step[:3] for step in steps), strict=True)
        ]
        for number, (step, table, begins, ends) in enumerate(zip(steps, *uploads, strict=True)):
            if number % 8 == 0 and self.late(sum(step.cost for step in steps[number : number + 8])):
                return steps[number:]
            self.lora.begin(*begins.unbind(1))
            graph, buffer = self.graphs.get((len(table), step.width), (None, None))
            if graph:
                buffer.copy_(table)
                graph.replay()
            else:
                self.chunk_step(table, step.width)
            self.lora.end(*ends.unbind(1))
            self.done, self.ended = self.done + step.cost, self.ended + len(ends)
        return []

    def late(self, cost):
        """Waits for the device, tells how far it is -> is the budget too short for `cost` more and
        the
        rest unadapted? Costs are seconds of step_cost, taken at the pace of this run so far. The
        rest costs a step's share a token, which is more than a plain forward takes; a fiftieth of
        the budget stays in reserve.
        """
        nats, tokens, charges = self.score.sums.tolist()
        now = time.perf_counter()
        left = (
            self.hp.eval_budget_seconds * 0.98
            - self.log.seconds.get("unpack", 0.0)
            - (now - self.started)
        )
        seconds, share = max(now - self.stepping, 1e-9), round(self.done / self.cost, 6)
        self.spent, bpb = seconds, bits_per_byte(nats, max(charges, 1))
        words = (
            f"{self.phase} documents:{self.ended} running_tokens:{tokens:.0f} running_bpb:{bpb:.5f}"
            f" tokens_per_s:{tokens / seconds:.0f} budget_left:{left:.0f}"
        )
        self.log.live(share, words)
        if share >= self.told or share == 1.0:
            self.told = share + 0.05
            self.log(f"ttt_batch {words} seconds:{now - self.started:.1f}")
        rest = (self.tokens - tokens) * step_cost(64, 2048) / 64 / 2048
        return self.done > 0 and left < seconds / self.done * (cost + rest)

    @torch.no_grad()
    def score_unadapted(self, steps):
        """Scores the targets of these steps by plain forward passes, when the budget ends
        -> their number.
        """
        stream, table = self.validation, np.concatenate([step.table for step in steps])
        document = np.searchsorted(stream.starts, table[:, 2], "right") - 1
        left = np.bincount(document, table[:, 4], len(stream.starts)).astype(int)
        hp = dataclasses.replace(self.hp, eval_seq_len=self.hp.ttt_eval_seq_len, compile="0")
        windows = document_windows(
            stream.ends - left, stream.ends, hp.eval_seq_len, hp.eval_seq_len
        )
        Evaluator(self.model, stream, hp, self.dist).count(windows, self.score)
        return int(left.sum())

    def global_adapt(self, documents):
        """Fine-tunes the base weights on documents already scored: one epoch of sgd_step."""
        hp, stream, parameters = (
            self.hp,
            self.validation,
            self.model.requires_grad_(True).parameters(),
        )
        optimizer = torch.optim.SGD(
            parameters, lr=hp.global_ttt_lr, momentum=hp.global_ttt_momentum
        )
        windows = document_windows(
            stream.starts[documents], stream.ends[documents], *[hp.ttt_eval_seq_len] * 2
        )
        lengths = windows[:, 1] - windows[:, 0]
        chunk_of = (np.cumsum(lengths) - lengths) // hp.global_ttt_chunk_tokens
        chunks = [windows[chunk_of == number] for number in np.unique(chunk_of)]
        for number, chunk in enumerate(chunks):
            cosine = 0.5 * (1 + math.cos(math.pi * number / max(1, len(chunks) - 1)))
            sgd_step(
                self.model, self.packer, chunk, optimizer, hp.global_ttt_lr * cosine, self.dist
            )
        self.model.requires_grad_(False).zero_grad(set_to_none=True)
        self.log(f"ttt_global_adaptation documents:{len(documents)} chunks:{len(chunks)}")

    def evaluate(self):
        """Runs the plan -> {loss, bpb, tokens, bytes, documents, partial, recompilations,
        unadapted_tokens}.
        """
        hp, stream, dist = self.hp, self.validation, self.dist
        self.model.requires_grad_(False)
        starts, lengths = (
            stream.starts[self.documents],
            (stream.ends - stream.starts)[self.documents],
        )
        phases = plan_ttt(lengths, hp)
        schedules = [
            schedule_ttt(
                [documents for lane in self.lanes for documents in phase.lanes[lane]],
                starts,
                lengths,
                self.lora.flight,
                hp,
            )
            for phase in phases
        ]
        self.cost = sum(step.cost for step in sum(schedules, [])) or 1.0
        self.tokens = sum(step.table[:, 4].sum() for step in sum(schedules, []))
        self.done, self.ended, self.told, self.spent, self.stepping, rest = (
            0.0,
            0,
            0.0,
            0.0,
            self.started,
            [],
        )
        if hp.ngram_tilt_enabled:
            self.hinted[:, 1] = hints = techniques.ngram_hints(
                self.packer.tokens, starts, lengths, phases
            )
            self.log(
                f"ttt_ngram hints:{(hints >= 0).sum()}"
                f" seconds:{time.perf_counter() - self.started:.1f}"
            )
        if compile_wanted(hp, dist):
            self.warm_up()
        graphs = compiled_graphs()
        self.log(
            f"ttt_warm_up seconds:{time.perf_counter() - self.started:.1f}"
            f" steps:{sum(map(len, schedules))}"
        )
        for number, (phase, steps) in enumerate(zip(phases, schedules, strict=True)):
            self.phase = f"phase:{number + 1}/{len(phases)}"
            rest += steps if rest else self.run_steps(steps)
            self.graphs.clear()  # their memory is for the fine-tuning
            tokens = lengths[phase.documents].sum()
            late = self.late(
                3e-6 * tokens / dist.world_size + 0.3 * tokens / hp.global_ttt_chunk_tokens
            )
            if phase.adapt and any(dist.all_gather_object(late or bool(rest))):
                self.log("note: no time to fine-tune the base weights")
                if hp.ngram_tilt_enabled:
                    self.hinted[:, 1] = -1  # documents of this phase may be left to the end
            elif phase.adapt:
                self.global_adapt(self.documents[phase.documents])
        unadapted = self.score_unadapted(rest) if rest else 0
        self.model.requires_grad_(True)
        total = self.score.total(dist, stream.targets_of(self.documents))
        if unadapted := sum(dist.all_gather_object(unadapted)):
            self.log(
                f"note: EVAL_BUDGET_SECONDS did not do: {unadapted} tokens were scored without"
                " adaptation"
            )
        return total | {
            "documents": len(self.documents),
            "partial": len(self.documents) < len(stream.starts),
            "recompilations": compiled_graphs() - graphs,
            "unadapted_tokens": unadapted,
        }


# ---- MAIN ----------------------------------------------------------------------------------------


def run_folder(hp, dist):
    """The run's own folder, which may not exist yet."""
    started = dist.max_over_ranks(time.time())[0]
    stamp = time.strftime("%Y%m%d_%H%M%S", time.localtime(started))
    return Path(hp.runs_dir) / (hp.run_id or f"{stamp}_seed{hp.seed}")


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
    if hp.compute_dtype == "auto":
        dtype = torch.bfloat16 if dist.device.type == "cuda" else torch.float32
    else:
        dtype = getattr(torch, hp.compute_dtype)
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
        self.tokenizer = None  # path
        self.validation = None
        self.loader = None  # of training rows; TTT_EVAL_ONLY needs none
        self.folder = None
        self.model = None
        self.compressor_works = False
        self.machine = ""  # the guard's words for the log

    def check_tokenizer(self):
        self.tokenizer = find_tokenizer(self.hp)

    def check_compressor(self):
        try_compressor(self.hp.compressor)
        self.compressor_works = True

    def check_validation(self):
        validation = ValidationSet(self.hp)
        self.validation = validation
        documents_to_score(validation, self.hp)

    def check_training_data(self):
        if not self.hp.ttt_eval_only:
            stream = TokenStream(self.hp.data_path, "train")
            self.loader = TrainLoader(stream, self.hp, self.dist)

    def check_folder(self):
        self.folder = run_folder(self.hp, self.dist)

    def check_model(self):
        self.model = build_model(self.hp, self.dist)

    def check_machine(self):
        self.machine = self.guard.check(self.hp, self.dist, self) or ""


def run_checks(dist, checks):
    """Calls every check, then raises one SettingError with all problems of all ranks."""
    problems = []
    for check in checks:
        try:
            check()
        except (*OUR_ERRORS, OSError) as error:
            problems.append(str(error))
    everywhere = sum(dist.all_gather_object(problems), [])
    if everywhere:
        raise SettingError("\n".join(dict.fromkeys(everywhere)))


def check_all(hp, dist, guard=NO_GUARD):
    """Finds all problems before anything is trained or written -> Prepared. Raises SettingError."""
    prepared = Prepared(hp, dist, guard)
    checks = [
        prepared.check_tokenizer,
        prepared.check_compressor,
        prepared.check_validation,
        prepared.check_training_data,
        prepared.check_folder,
        prepared.check_model,
        prepared.check_machine,
    ]
    run_checks(dist, checks)
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
        rebank(model, torch.load(path, map_location="cpu", weights_only=True)["weights"])
    except Exception as error:  # a damaged file makes torch raise errors of many classes
        raise DataError(f"checkpoint {path}: {error!r:.300}") from None


def group_bytes(arrays):
    """Arrays of quantize_weights -> {role: bytes}, largest first.

    Bytes of codes are their order-0 entropy; "rest" is everything else.
    """
    sizes = defaultdict(float)
    for key, array in arrays.items():
        name, _, field = key.rpartition(":")
        role = quant_role(name)
        if role and field == "codes":
            shares = np.unique(array, return_counts=True)[1] / array.size
            sizes[role.group] -= shares @ np.log2(shares) * array.size / 8
        else:
            sizes["rest"] += array.nbytes
    return {role: round(sizes[role]) for role in sorted(sizes, key=sizes.get, reverse=True)}


class Quantized(NamedTuple):
    """A quantization of the model, before it is written."""

    hp: Hyperparameters
    arrays: dict[str, np.ndarray]
    file: bytes  # on rank 0, empty on the others


TARGET_TRIALS = 5  # of clips; bytes are nearly linear in their logarithm


def fit_target_bytes(first, quantize, num_weights, code_bytes, dist, log):
    """Scales all clips and quantizes again until code + file end within 0.05% below TARGET_BYTES.

    first: Quantized with the clips as set; quantize(hp) -> Quantized. Returns the largest one below
    the target, else the smallest.
    """
    clips = {role.clip_sigmas for role in QUANT_TABLE.values()}
    target = first.hp.target_bytes
    latest = first
    trials = []
    while True:
        spare = target - code_bytes - len(latest.file) if dist.rank == 0 else -math.inf
        spare = dist.max_over_ranks(spare)[0]
        trials.append((spare < 0, abs(spare), len(trials), latest))
        if 0 <= spare <= target / 2000 or len(trials) == TARGET_TRIALS:
            return min(trials)[-1]
        # aims at the middle of the allowed range: doubling the clips saves one bit per code
        scale = 2 ** ((target / 4000 - spare) * 8 / num_weights)
        log(f"target_bytes:{target} spare:{spare:.0f} clips times {scale:.4f}")
        scaled = {name: getattr(latest.hp, name) * scale for name in clips}
        latest = quantize(dataclasses.replace(latest.hp, **scaled))


# stages that MAX_WALLCLOCK_SECONDS includes, in addition to training
AFTER_TRAINING = "hessians", "quantize", "quant_check"


def seconds_after_training(log):
    return sum(log.seconds.get(stage, 0.0) for stage in AFTER_TRAINING)


def build_artifact(model, loader, hp, dist, log, path, code_bytes, training_seconds=0.0):
    """Hessians, then GPTQ and LQER on all ranks, then one file, written by rank 0.

    training_seconds: already used of MAX_WALLCLOCK_SECONDS; 0 if nothing was trained. Returns
    figures for RESULT.
    """

    def seconds_left():
        """The rest of the budget, the same on every rank."""
        if not training_seconds or not hp.max_wallclock_seconds:
            return math.inf
        used = training_seconds + seconds_after_training(log)
        return hp.max_wallclock_seconds - dist.max_over_ranks(used)[0]

    def quantize(hp):
        with log.stage("quantize"):
            return quantize_weights(check.weights, hessians, hp, dist)

    def pack(hp, arrays):
        with log.stage("pack"):
            file = pack_weights(arrays, hp.compressor, log.live) if dist.rank == 0 else b""
        return Quantized(hp, arrays, file)

    with log.stage("hessians"):
        hessians = collect_hessians(model, loader, hp, dist)
    check = QuantizationCheck(model, loader, hp, dist, log)
    chosen = pack(*check.choose(quantize, seconds_left))
    if hp.target_bytes:
        first = chosen
        num_weights = sum(w.numel() for w in check.weights.values())
        chosen = fit_target_bytes(
            first, lambda hp: pack(hp, quantize(hp)), num_weights, code_bytes, dist, log
        )
        if chosen is not first and check.fp32_loss is not None:
            # RESULT has the gap of the file that is written
            check.gap(chosen.arrays, chosen.hp)
            check.kept = check.tried[-1]
    if dist.rank == 0:
        write_atomically(path, chosen.file)
    dist.barrier()
    return {"quant_check": check.summary(), "group_bytes": group_bytes(chosen.arrays)}


def rebuild_model(model, path, dist):
    """Loads the artifact into the model. Rank 0 decodes it; all ranks get the same bits.

    Raises ArtifactError.
    """
    problem = None
    if dist.rank == 0:
        try:
            rebank(model, dequantize_weights(unpack_weights(Path(path).read_bytes())))
        except (OSError, ValueError) as error:
            problem = str(error)
    problem = dist.all_gather_object(problem)[0]
    if problem:
        raise ArtifactError(f"artifact {path}: {problem}")
    for parameter in model.parameters():
        dist.broadcast(parameter.detach())


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
        groups = [*training.get("group_bytes", {}).items()]
        largest = ", ".join(f"{role} {size}" for role, size in groups[:3])
        broken.append(
            f"{total} bytes of code and weights, {total - BYTE_CAP} above the cap of {BYTE_CAP}"
            f" (largest: {largest}); QUANT_ONLY=1 TARGET_BYTES={BYTE_CAP} continues from the"
            " checkpoint"
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
    leaked = training.get("leaked_documents")
    if leaked:
        broken.append(
            f"{leaked} training documents are validation documents, says the dataset's manifest"
        )
    return broken


def run_notes(hp, dist, model):
    """Notes for the head of the log: what differs from a submission but is no error."""
    notes = [*dist.notes, *model.ops.notes]
    budgets = {
        "MAX_WALLCLOCK_SECONDS": hp.max_wallclock_seconds,
        "EVAL_BUDGET_SECONDS": hp.eval_budget_seconds,
    }
    for name, value in budgets.items():
        if not 0 < value <= CONTEST_SECONDS:
            kind = "more" if value else "no limit"
            notes.append(
                f"{name}={value:g} is {kind}, the contest allows {CONTEST_SECONDS:g} s: "
                "violations are those of the budgets as set"
            )
    notes.append("the budget starts after the warm-up")
    return notes


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
            if self.dist.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)

        def lock():
            if self.dist.rank == 0:
                self.guard.lock(self.folder)

        run_checks(self.dist, [make, lock])
        self.log = RunLog(self.folder, self.dist, self.guard)
        self.code_bytes = write_code(self.folder, self.hp, self.dist, self.guard)

    def info(self):
        """What was run, and where: keys of RESULT."""
        device = f"cpu x{torch.get_num_threads()}"
        if self.dist.device.type == "cuda":
            device = torch.cuda.get_device_name()
        run_info = {
            "run": self.folder.name,
            "seed": self.hp.seed,
            "commit": self.guard.commit(),
            "device": device,
            "world_size": self.dist.world_size,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            **self.model.ops.names,
        }
        return run_info

    def log_head(self, run_info):
        """Logs settings, machine, notes and sizes."""
        model = self.model
        validation = self.prepared.validation
        words = " ".join(f"{key}:{value}" for key, value in run_info.items())
        self.log(f"settings (* changed):\n{settings_table(self.hp)}\n{words}")
        notes = [f"note: {note}" for note in run_notes(self.hp, self.dist, model)]
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

        def load():
            if self.dist.rank == 0:
                load_checkpoint(self.checkpoint, self.model)

        run_checks(self.dist, [load])
        for parameter in self.model.parameters():
            self.dist.broadcast(parameter.detach())

    def train(self):
        """Stages warm_up and train, then model.pt."""
        loader = self.prepared.loader
        trainer = Trainer(self.model, loader, self.hp, self.dist, self.log, self.guard)
        self.log(
            f"train_shards:{len(loader.stream.paths)} train_tokens:{loader.stream.size}"
            f" rows_a_step:{loader.per_rank} held_out_rows:{loader.held_out_rows}"
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

    def score(self, name, *stride):
        """Plain evaluation of the whole validation set, or with overlapping windows."""
        score_stage(name, lambda: self.evaluator.evaluate_bpb(*stride), self.log, self.scores)

    def test_time_train(self):
        """Scores with test-time training, the final score."""

        def evaluate():
            if self.hp.ttt_method == "sgd":
                helpers = document_windows, WindowPacker, sgd_step, Score
                return techniques.evaluate_sgd(self.evaluator, *helpers)
            validation = self.prepared.validation
            return TestTimeTrainer(self.model, validation, self.hp, self.dist, self.log).evaluate()

        score_stage("ttt", evaluate, self.log, self.scores)

    def result(self, run_info):
        """Writes result.json and logs the RESULT line -> its dictionary."""
        log = self.log
        training = self.training | leaked_documents(self.hp)
        sizes = self.code_bytes, self.artifact_bytes
        result = {
            "version": RESULT_VERSION,
            **run_info,
            **training,
            "scores": self.scores,
            "artifact_bytes": self.artifact_bytes,
            "code_bytes": self.code_bytes,
            "total_bytes": self.artifact_bytes + self.code_bytes,
            "seconds": log.seconds,
            "graphs_compiled": {stage: count for stage, count in log.graphs.items() if count},
            "violations": violations(self.hp, log, training, *sizes, self.scores),
        }
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
    if hp.extra_eval_loops:
        stages.model.eval_passes = 1 + hp.extra_eval_loops
    if not hp.ttt_eval_only:
        guard.keep_weights(hp, stages.folder, stages.checkpoint, stages.log)
        if not hp.prequant_only:
            stages.quantize()
        stages.score("prequant")
    if not hp.prequant_only:
        stages.unpack()
        stages.score("quantized")
        if hp.sliding_window_enabled:
            stages.score("sliding", hp.eval_stride)
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
