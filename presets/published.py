"""What only published systems use, as parts that take the place of train_gpt.py's.

    python presets/published.py pr1512                        # settings of presets/pr1512.env
    torchrun --standalone --nproc_per_node=8 presets/published.py pr1512
    ATTN_WINDOW=256 python presets/published.py               # the defaults, and these settings too

Settings are environment variables, as for train_gpt.py; docs/PRESETS.md says who uses them. PARTS
names what takes the place of what: train_gpt.py looks each of these names up when it needs it. The
packed script of a run that uses a setting of this file holds both files (tools/pack_code.py): there
all names are of one module, so nothing here may have the name of something else in train_gpt.py.
"""

import lzma
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402
from train_gpt import (  # noqa: E402
    BOS_ID,
    FP16_RANGE,
    ArtifactError,
    DataError,
    SettingError,
    env,
)

# ---- settings


@dataclass(frozen=True)
class Hyperparameters(train_gpt.Hyperparameters):
    """The settings of train_gpt.py and those that only published systems use."""

    compressor: str = env(
        "entropy",
        "coder of the artifact; pergroup needs lrzip",
        choices=("entropy", "pergroup", "brotli", "lzma"),
    )
    caseops_enabled: bool = env(
        True,
        "validation bytes come from the side-car; 0: from the tokenizer's byte tables",
    )
    tie_embeddings: bool = env(True, "the embedding is the output projection, too")
    smear_gate_enabled: bool = env(True, "SmearGate: add a share of the previous token's embedding")
    skip_gates_enabled: bool = env(True, "merge skips by a gated lerp; 0: by addition")
    ln_scale: bool = env(True, "divide normalized inputs by sqrt(layer + 1)")
    parallel_final_lane: str = env(
        "mean", "lane that is the output", choices=("mean", "attn", "mlp")
    )
    xsa_last_n: int = env(11, "last layers with XSA: no head's output along its own value", least=0)
    sparse_attn_gate_enabled: bool = env(True, "per-head output gate read from 12 inputs")
    gated_attn_enabled: bool = env(False, "per-head output gate read from all dimensions")
    attn_out_gate_enabled: bool = env(False, "per-head output gate 2 sigmoid(W src[:12])")
    attn_out_gate_src: str = env(
        "block", "input of that gate: block input or raw q", choices=("block", "q")
    )
    attn_window: int = env(
        0,
        "tokens before its own that a token of the early layers sees; 0: all",
        least=0,
    )
    attn_window_full_layers: int = env(3, "last layers that see all nevertheless", least=0)
    partial_key_offset: bool = env(
        False,
        "unrotated dimensions of full layers' keys are the previous token's (1512)",
    )
    value_residual: str = env(
        "off",
        "mix: values l0 v0 + l1 v, v0 layer 0's; gate: v + s(a) v0",
        choices=("off", "mix", "gate"),
    )
    bigram_vocab_size: int = env(0, "rows of the hashed bigram embedding; 0: none", least=0)
    bigram_dim: int = env(112, "width of that table", least=1)
    value_embed_layers: str = env(
        "", "layers whose values get a token's own embedding, comma separated"
    )
    value_embed_dim: int = env(128, "width of that table", least=1)
    extra_eval_loops: int = env(
        0,
        "passes over the looped layers that training did not have; skips stay",
        least=0,
    )
    muon_head_pairs: bool = env(
        False, "q and k are orthogonalised by pairs of heads, not whole (PR 1512)"
    )
    ema_decay: float = env(
        0.0, "decay of the weight average in every step; 0: EMA_SPAN", least=0, most=0.999999
    )
    swa_below_lr: float = env(
        0.0, "below this learning-rate factor: mean of snapshots; 0: EMA", least=0
    )
    swa_every: int = env(50, "steps between snapshots", least=1)
    qat_below_lr: float = env(
        0.0,
        "banks train on their grid below this learning-rate factor; 0: never",
        least=0,
    )
    wd_schedule_enabled: bool = env(False, "weight decay falls, then rises (PR 1512)")
    wd_sched_hold_frac: float = env(
        0.40, "fraction until which decay keeps its value", least=0, most=1
    )
    wd_sched_ramp_frac: float = env(0.85, "fraction at which decay is lowest", least=0, most=1)
    wd_sched_low_factor: float = env(0.50, "lowest decay factor", least=0)
    wd_sched_high_factor: float = env(1.75, "decay factor at the end", least=0)
    gptq_self_calibration: bool = env(False, "these rows are written by the model itself (PR 1512)")
    lqer_enabled: bool = env(False, "low-rank correction of the largest quantization errors")
    lqer_top_k: int = env(3, "matrices that get a correction", least=0)
    lqer_rank: int = env(4, "rank of a correction", least=1)
    lqer_asym_enabled: bool = env(
        True, "correction as int2 and int4 codes; 0: LQER_FACTOR_BITS for both factors"
    )
    lqer_asym_group: int = env(64, "codes that share a scale in the int4 factor", least=1)
    lqer_factor_bits: int = env(4, "bits of the symmetric factors", least=2, most=8)
    sliding_window_enabled: bool = env(False, "also evaluate with overlapping windows")
    eval_stride: int = env(64, "advance of the sliding window", least=1)
    ttt_method: str = env(
        "lora",
        "lora: an adapter a document; sgd: all weights, by chunks",
        choices=("lora", "sgd"),
    )
    ttt_epochs: int = env(
        3, "SGD steps on a chunk of GLOBAL_TTT_CHUNK_TOKENS, at GLOBAL_TTT_LR", least=1
    )
    ttt_short_chunks: str = env(
        "",
        "smaller chunks of short documents: 256:8,2000:24 is 8 up to 256 tokens, then 24",
    )
    ngram_tilt_enabled: bool = env(
        False,
        "the word that followed the last 15 tokens before gets more probability",
    )
    ngram_tilt_orders: str = env(
        "",
        "tokens before such a word, the longest seen wins, as 8,12,16; how much more is learned",
    )

    learns_tilt = property(lambda hp: hp.ngram_tilt_enabled and hp.ngram_tilt_orders != "")

    # whether keys or values of a layer are not its projections alone
    new_values = property(
        lambda hp: (
            hp.partial_key_offset or hp.value_embed_layers != "" or hp.value_residual != "off"
        )
    )

    fuses_markers = property(lambda hp: hp.marker_fusion_enabled and hp.caseops_enabled)

    def chunk_size_of(self, length):
        """Also for arrays [TTT_SHORT_CHUNKS]."""
        pairs = [[*map(int, pair.split(":"))] for pair in self.ttt_short_chunks.split(",") if pair]
        if not pairs:
            return self.ttt_chunk_size
        sizes = np.select(
            [length <= most for most, _ in pairs],
            [short for _, short in pairs],
            self.ttt_chunk_size,
        )
        return np.minimum(sizes, self.ttt_chunk_size)


own_cross_checks = train_gpt.cross_checks


def cross_checks(hp):
    """Messages of train_gpt.py's checks, and of those for the settings here."""
    yield from own_cross_checks(hp)
    if not re.fullmatch(r"(\d+:[1-9]\d*(,(?=.)|$))*", hp.ttt_short_chunks):
        yield f"TTT_SHORT_CHUNKS={hp.ttt_short_chunks}: must be pairs such as 256:8,2000:24"
    if not re.fullmatch(r"([1-9]\d*(,(?=.)|$))*", hp.ngram_tilt_orders):
        yield f"NGRAM_TILT_ORDERS={hp.ngram_tilt_orders}: must be numbers of tokens, as 8,12,16"
    if hp.sparse_attn_gate_enabled + hp.gated_attn_enabled + hp.attn_out_gate_enabled > 1:
        yield (
            "SPARSE_ATTN_GATE_ENABLED, GATED_ATTN_ENABLED, ATTN_OUT_GATE_ENABLED exclude each other"
        )
    stale = hp.ttt_stale_context and hp.ttt_enabled and hp.ttt_method == "lora"
    if stale and hp.new_values:
        yield "PARTIAL_KEY_OFFSET, VALUE_RESIDUAL and VALUE_EMBED_LAYERS need TTT_STALE_CONTEXT=0"
    layers = hp.value_embed_layers.split(",") if hp.value_embed_layers else []
    if not all(layer.isdecimal() and int(layer) < hp.num_layers for layer in layers):
        yield (
            f"VALUE_EMBED_LAYERS={hp.value_embed_layers}: must be numbers of layers, below"
            " NUM_LAYERS"
        )
    slides = hp.sliding_window_enabled or hp.ttt_method == "sgd"
    # EVAL_BUDGET_SECONDS may leave documents to an Evaluator with TTT_EVAL_SEQ_LEN
    if slides and hp.eval_stride > min(hp.eval_seq_len, hp.ttt_eval_seq_len):
        yield "EVAL_STRIDE must be at most EVAL_SEQ_LEN and TTT_EVAL_SEQ_LEN"
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


# ---- data


class ValidationSet(train_gpt.ValidationSet):
    """CASEOPS_ENABLED=0: the tokenizer counts the bytes."""

    def count_bytes(self, hp, stream):
        if hp.caseops_enabled:
            return super().count_bytes(hp, stream)
        tokenizer = train_gpt.load_tokenizer(hp)
        check_byte_counts(hp, tokenizer, self.tokens)
        count, leading, boundary = piece_byte_tables(tokenizer)
        token_bytes = count[self.tokens]
        token_bytes[1:] += leading[self.tokens[1:]] & ~boundary[self.tokens[:-1]]
        return token_bytes


def has_case_markers(tokenizer):
    """Whether pieces 4 to 7 are CaseOps' markers, which stand for no text (lossless_caps.py)."""
    return [tokenizer.id_to_piece(token) for token in range(4, 8)] == [*"\ue001\ue002\ue003\ue004"]


def check_byte_counts(hp, tokenizer, tokens):
    """DataError unless this tokenizer made the tokens (N,) whose bytes it is to count.

    Without a side-car the tokenizer decides the BPB. One of equal size counts without an error, so
    the text of some documents is encoded again: only the shards' own tokenizer gives back their
    tokens.
    """
    if has_case_markers(tokenizer) and ((tokens >= 4) & (tokens < 8)).any():
        raise DataError(
            f"{hp.data_path}: its tokens hold CaseOps' markers: set CASEOPS_ENABLED=1, with the"
            " side-car"
        )
    longest = 512
    documents = 256
    starts = np.flatnonzero(tokens == BOS_ID)[:documents] + 1
    ends = np.append(starts[1:] - 1, len(tokens))[: len(starts)]
    same = total = 0
    for start, end in zip(starts, np.minimum(ends, starts + longest), strict=True):
        ids = tokens[start:end].tolist()
        # a cut changes the tokens before it
        compared = len(ids) if len(ids) < longest else longest - 64
        same += compared * (tokenizer.encode(tokenizer.decode(ids))[:compared] == ids[:compared])
        total += compared
    # some texts do not come back from their own tokenizer: unknown characters, odd spaces
    if 2 * same < total:
        raise DataError(
            f"{hp.data_path}: its tokens were not made by the tokenizer found for them, which gives"
            f" back {same} of {total} when their text is encoded again: set TOKENIZER_PATH to the"
            " shards' own"
        )


def piece_byte_tables(tokenizer):
    """SentencePiece model -> three arrays (V,) over its ids, for data without side-cars.

    Bytes of the text without a leading space; whether there is one; whether the id has no text, so
    that a space behind it is dropped. DataError for a tokenizer without a piece for the space.
    """
    if tokenizer.piece_to_id("\u2581") == tokenizer.unk_id():
        raise DataError(
            "the tokenizer has no piece of its own for the space: its spaces would count three"
            " bytes"
        )
    size = tokenizer.vocab_size()
    count = np.zeros(size, np.int64)
    leading = np.zeros(size, bool)
    boundary = np.ones(size, bool)
    for token in range(size):
        if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
            continue
        boundary[token] = False
        piece = tokenizer.id_to_piece(token)
        leading[token] = piece.startswith("\u2581") and not tokenizer.is_byte(token)
        count[token] = 1 if tokenizer.is_byte(token) else len(piece.removeprefix("\u2581").encode())
    return count, leading, boundary


# ---- model

# Of one layer: its weights, gates perhaps among them, whether it has XSA, and what its attention
# needs for the tokens of this pass, by name (see layer_extras).
LayerWeights = namedtuple(
    "LayerWeights",
    (*train_gpt.LayerWeights._fields, "xsa", "extras"),
    defaults=[None, True, None],
)
EMBEDDING_NAMES = train_gpt.EMBEDDING_NAMES | {
    "lm_head": "lm_head.weight",
    "bigram_table": "bigram.weight",
    "value_table": "value_embed.weight",
}


class GPT(train_gpt.GPT):
    """An untied output projection, bigram and value embeddings, value residual, offset keys,
    windows of attention, other gates and lanes, fake quantization, more passes over the looped
    layers after training.
    """

    eval_passes = 1  # over the looped layers, beyond NUM_LOOPS: 1 + EXTRA_EVAL_LOOPS after training
    on_grid = False  # QAT_BELOW_LR: the banks are as quantization will have them

    def __init__(self, hp, ops, dtype):
        super().__init__(hp, ops, dtype)
        if not hp.ln_scale:
            self.depth_scale.fill_(1.0)
        L = hp.num_layers
        generator = torch.Generator().manual_seed(hp.generator_seed + 1)
        # the table is zero: with a projection of zeros neither would ever learn
        if hp.bigram_vocab_size:
            projection = torch.empty(hp.model_dim, hp.bigram_dim)
            self.bigram_table = nn.Parameter(torch.zeros(hp.bigram_vocab_size, hp.bigram_dim))
            self.bigram_proj = nn.Parameter(nn.init.orthogonal_(projection, generator=generator))
            self.bigram_scale = nn.Parameter(torch.full((1,), 0.05))
        if hp.value_embed_layers:
            table = torch.empty(hp.vocab_size, hp.value_embed_dim)
            table.normal_(0.0, 0.01, generator=generator)
            projection = torch.empty(hp.num_kv_heads * hp.head_dim, hp.value_embed_dim)
            self.value_table = nn.Parameter(table)
            self.value_proj = nn.Parameter(nn.init.orthogonal_(projection, generator=generator))
            # used in the layers that are named
            self.value_scales = nn.Parameter(torch.full((L, 1), 0.1))
        if hp.value_residual == "mix":  # l0 and l1
            self.value_mix = nn.Parameter(torch.full((L, 2), 0.5))
        elif hp.value_residual == "gate":  # a
            self.value_mix = nn.Parameter(torch.zeros(L, 1))

    def make_parameters(self):
        if not self.hp.tie_embeddings:
            self.register_parameter("tok_emb", None)  # the first one, as ever
            self.lm_head = nn.Parameter(torch.empty(self.hp.vocab_size, self.hp.model_dim))
        super().make_parameters()
        if not self.has_gates:
            self.attn_gate = None
        if not self.hp.skip_gates_enabled:
            self.skip_gates = None
        if not self.hp.smear_gate_enabled:
            self.smear_weight = self.smear_lambda = None

    def skip_parameters(self, index):
        if self.hp.skip_gates_enabled:
            return super().skip_parameters(index)
        return (self.skip_weights[index],)

    def embed(self, tokens, window_start):
        if self.hp.smear_gate_enabled:
            return super().embed(tokens, window_start)
        return self.token_embedding(tokens, window_start)

    def join_lanes(self, x, mlp_lane):
        if mlp_lane is None or self.hp.parallel_final_lane == "mean":
            return super().join_lanes(x, mlp_lane)
        return x if self.hp.parallel_final_lane == "attn" else mlp_lane

    @torch.no_grad()
    def init_weights(self, generator):
        """Dense attention gate: N(0, 0.01). lm_head: as the embedding."""
        super().init_weights(generator)
        if self.hp.gated_attn_enabled:
            self.attn_gate.normal_(0.0, 0.01, generator=generator)
        if not self.hp.tie_embeddings:
            self.lm_head.normal_(0.0, 0.005, generator=generator)

    @property
    def head_weight(self):
        return self.tok_emb if self.hp.tie_embeddings else self.lm_head

    @property
    def has_gates(self):
        hp = self.hp
        return hp.sparse_attn_gate_enabled or hp.gated_attn_enabled or hp.attn_out_gate_enabled

    @property
    def gate_inputs(self):
        return self.hp.model_dim if self.hp.gated_attn_enabled else super().gate_inputs

    @property
    def gate_reads_mix(self):
        return self.hp.attn_out_gate_enabled

    def gate_heads(self, y, v, slot_input, qkv, w):
        """XSA_LAST_N; GATED_ATTN_ENABLED, ATTN_OUT_GATE_ENABLED, or no gates."""
        if not self.has_gates:
            return train_gpt.subtract_own_value(y, v) if w.xsa else y
        logits = self.head_gates(slot_input, qkv, w.gate)
        return self.ops.gated_xsa(y, v, logits) if w.xsa else y * torch.sigmoid(logits)[..., None]

    def head_gates(self, slot_input, qkv, gate):
        """Logits (B, T, H) of the gates, sigmoids."""
        hp = self.hp
        if hp.gated_attn_enabled:
            return F.linear(slot_input.h, gate)
        if hp.sparse_attn_gate_enabled:
            return hp.sparse_attn_gate_scale * F.linear(slot_input.gate_input, gate)
        source = qkv if hp.attn_out_gate_src == "q" else slot_input.mixed
        return F.linear(source[..., : train_gpt.GATE_WINDOW], gate)

    def leave_training(self):
        self.eval_passes = 1 + self.hp.extra_eval_loops

    def slots(self, looping):
        slots = super().slots(looping)
        hp = self.hp
        more = len(slots) > hp.num_layers and self.eval_passes > 1
        looped = [*range(hp.loop_start, hp.loop_end + 1)] * (self.eval_passes - 1) if more else []
        return slots[: hp.loop_start] + looped + slots[hp.loop_start :]

    def slot_order(self, slots):
        """Skips go by the numbers that slots have in training, so they stay between its layers.

        The passes that training did not have come last of the loop and have negative numbers: they
        neither keep nor take a skip, and their adapters are the last ones.
        """
        hp = self.hp
        added = 0
        numbers = list(range(len(slots)))
        if len(slots) > hp.num_layers:
            looped = hp.loop_end + 1 - hp.loop_start
            added = looped * (self.eval_passes - 1)
            begin = hp.loop_start + looped * (hp.num_loops + 1)
            numbers[begin:] = [*range(-added, 0), *numbers[begin : len(slots) - added]]
        return zip(numbers, slots, strict=True), (len(slots) - added) // 2

    def banks(self):
        if not self.on_grid:
            return super().banks()
        hp = self.hp
        bits = hp.matrix_bits
        return (
            fake_quantize(self.qo_bank, bits, hp.attn_clip_sigmas),
            fake_quantize(self.kv_bank, bits, hp.attn_clip_sigmas),
            fake_quantize(self.mlp_up_bank, bits, hp.mlp_clip_sigmas),
            fake_quantize(self.mlp_down_bank, bits, hp.mlp_clip_sigmas),
        )

    def layer_weights(self, tokens, window_start):
        weights = super().layer_weights(tokens, window_start)
        first_xsa = self.hp.num_layers - self.hp.xsa_last_n
        weights = [w._replace(xsa=layer >= first_xsa) for layer, w in enumerate(weights)]
        if not (self.hp.attn_window or self.hp.new_values):
            return weights
        extras = layer_extras(self, tokens, window_start)
        return [w._replace(extras=e) for w, e in zip(weights, extras, strict=True)]

    def token_embedding(self, tokens, window_start):
        e = super().token_embedding(tokens, window_start)
        return e + bigram_embedding(self, tokens, window_start) if self.hp.bigram_vocab_size else e

    def keys_and_values(self, k, v, w):
        """PARTIAL_KEY_OFFSET, VALUE_EMBED_LAYERS, VALUE_RESIDUAL.

        ATTN_OUT_GATE_ENABLED: a gate of 2 sigmoid(z) is one of sigmoid(z) on doubled values.
        """
        hp = self.hp
        extras = w.extras
        if hp.partial_key_offset and "begins" in extras:
            k = offset_keys(k, extras["begins"], hp.rope_dims)
        if hp.value_embed_layers and "embedded" in extras:
            v = v + extras["scale"] * extras["embedded"]
        if hp.value_residual != "off" and "values" in extras["first"]:
            v = extras["mix"][0] * extras["first"]["values"] + extras["mix"][1] * v
        elif hp.value_residual != "off":  # this is layer 0, in its first pass
            extras["first"]["values"] = v
        return k, 2 * v if hp.attn_out_gate_enabled else v

    def attend(self, q, k, v, segments, w):
        if not self.hp.attn_window:
            return super().attend(q, k, v, segments, w)
        return segments.attend(self.ops, q, k, v, w.extras["window"])


def lacks_previous(tokens, window_start):
    """(B, T) ids -> (B, T) bool: where there is no previous token.

    That is at BOS, at the start of a row and where `window_start` (B, T) is set.
    """
    starts = (tokens == BOS_ID) | (torch.arange(tokens.size(1), device=tokens.device) == 0)
    return starts if window_start is None else starts | window_start


def bigram_embedding(model, tokens, window_start):
    """(B, T) ids -> (B, T, D): embedding of the hashed pair of a token and the one before.

    The last row of the table is for tokens without a previous one. PRs 960, 1512.
    """
    last = model.hp.bigram_vocab_size - 1
    previous = F.pad(tokens[:, :-1], (1, 0))
    bucket = ((36313 * tokens) ^ (27191 * previous)) % last
    bucket = torch.where(lacks_previous(tokens, window_start), last, bucket)
    rows = F.embedding(bucket, model.bigram_table).to(model.dtype)
    return model.bigram_scale.to(model.dtype) * F.linear(rows, model.bigram_proj.to(model.dtype))


def layer_extras(model, tokens, window_start):
    """(B, T) ids -> for every layer what keys_and_values and its attention need, by name.

    window: tokens that it sees before its own, 0: all; begins (B, T), where keys are offset;
    embedded (B, T, K, E) and scale (1,), where values have them; mix (2,) of layer 0's values and
    of its own; first: one dict for all layers, into which layer 0 puts its values.
    """
    hp = model.hp
    L = model.hp.num_layers
    first = {}
    found = [
        {"window": hp.attn_window * (layer < L - hp.attn_window_full_layers)} for layer in range(L)
    ]
    if hp.partial_key_offset:
        offset = {"begins": lacks_previous(tokens, window_start)}
        found = [extras if extras["window"] else extras | offset for extras in found]
    if hp.value_embed_layers:
        rows = F.linear(
            F.embedding(tokens, model.value_table).to(model.dtype), model.value_proj.to(model.dtype)
        )
        for layer in map(int, hp.value_embed_layers.split(",")):
            found[layer]["embedded"] = rows.unflatten(2, (-1, hp.head_dim))
            found[layer]["scale"] = model.value_scales[layer].to(model.dtype)
    if hp.value_residual != "off":
        mix = (
            model.value_mix
            if hp.value_residual == "mix"
            else F.pad(model.value_mix.sigmoid(), (0, 1), value=1.0)
        )
        pairs = mix.to(model.dtype).unbind(0)
        found = [
            extras | {"first": first, "mix": pair}
            for extras, pair in zip(found, pairs, strict=True)
        ]
    return found


def streams_of(extras):
    """The tensors of one layer's extras that are as large as its batch, (B, T, ...)."""
    parts = [extras.get("begins"), extras.get("embedded"), extras.get("first", {}).get("values")]
    return [part for part in parts if part is not None]


def offset_keys(k, begins, turning):
    """Keys (B, T, K, E) -> the same with unrotated dimensions from the token before (PR 1512).

    These are all but the first `turning`, or the second half where all are rotated. A token where
    `begins` (B, T) is set, the first one of a document or a window, keeps its own.
    """
    E = k.size(-1)
    turned, own = k.split((turning, E - turning) if turning < E else (E // 2, E - E // 2), dim=-1)
    # a copy: shifted in place, rows would overwrite each other
    previous = F.pad(own[:, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat((turned, torch.where(begins[..., None, None], own, previous)), dim=-1)


def fake_quantize(w, bits, clip_sigmas):
    """w (..., C) -> w on the grid that gptq_quantize has for its row.

    Gradients pass as if nothing had been rounded (straight through).
    """
    q_max = 2 ** (bits - 1) - 1
    step = clip_sigmas * w.detach().std(dim=-1, keepdim=True) / q_max
    step = step.clamp(*FP16_RANGE).half().float()
    return w + ((w / step).round().clamp(-q_max, q_max) * step - w).detach()


# ---- optimizer and schedule


class Muon(train_gpt.Muon):
    """MUON_HEAD_PAIRS (PR 1512): q and k are orthogonalised in blocks of two heads.

    They stand first in the first two banks, of which a rank has its share.
    """

    def orthogonaliser(self, buffer):
        hp = self.hp
        orthogonalise = super().orthogonaliser(buffer)

        def by_pairs(updates):
            paired = min(max(hp.num_layers - self.dist.rank * len(updates), 0), len(updates))
            blocks = updates[:paired].unflatten(1, (-1, 2 * hp.head_dim))
            pairs = orthogonalise(blocks.flatten(0, 1)).view_as(blocks).flatten(1, 2)
            return torch.cat((pairs, orthogonalise(updates[paired:])))

        has_heads = any(buffer is each for each in self.momentum_buffers[:2])
        return by_pairs if hp.muon_head_pairs and has_heads else orthogonalise


def decay_multiplier(progress, hp):
    """Factor of weight decay at this share of training (WD_SCHEDULE_ENABLED, PR 1512).

    1 until HOLD, linear to LOW at RAMP, linear to HIGH at the end.
    """
    if not hp.wd_schedule_enabled:
        return 1.0
    ramp = min(max(hp.wd_sched_ramp_frac, hp.wd_sched_hold_frac + 1e-6), 1.0)
    factors = (1.0, hp.wd_sched_low_factor, hp.wd_sched_high_factor)
    return float(np.interp(progress, (hp.wd_sched_hold_frac, ramp, 1.0), factors))


class EMA(train_gpt.EMA):
    """With one decay for all steps (EMA_DECAY) and the mean of late snapshots ("tight SWA", PR
    960).
    """

    snapshots = 0  # how many the average is the mean of

    def full_decay(self, step, progress):
        return self.hp.ema_decay or super().full_decay(step, progress)

    @torch.no_grad()
    def add_snapshot(self):
        """From the first call on the average is the plain mean of the snapshots, in fp32."""
        self.snapshots += 1
        torch._foreach_lerp_(self.average, self.parameters, 1 / self.snapshots)


class Trainer(train_gpt.Trainer):
    """SWA_BELOW_LR and QAT_BELOW_LR: late in training, by the learning-rate factor."""

    def train_step(self, step, progress, looping):
        # another value is another graph
        self.model.on_grid = train_gpt.lr_multiplier(progress, self.hp) < self.hp.qat_below_lr
        try:
            return super().train_step(step, progress, looping)
        finally:
            self.model.on_grid = False

    def warm_up_step(self, step, looping):
        super().warm_up_step(step, looping)
        if self.hp.qat_below_lr:  # the graph on the grid
            self.train_step(step, 1.0, looping)

    def update_average(self, step, progress):
        if train_gpt.lr_multiplier(progress, self.hp) >= self.hp.swa_below_lr:
            super().update_average(step, progress)
        elif step % self.hp.swa_every == 0:
            self.ema.add_snapshot()


# ---- quantization and artifact

QUANT_TABLE = train_gpt.QUANT_TABLE | {
    "lm_head.weight": train_gpt.EMBEDDING_ROLE,
    "bigram.weight": train_gpt.EMBEDDING_ROLE,
    "value_embed.weight": train_gpt.EMBEDDING_ROLE,
}


def written_row(model, number):
    """A training row of documents that the model writes itself at temperature 0.8.

    GPTQ_SELF_CALIBRATION (PR 1512): no data is read. `inputs` (B, T) has a document of
    TRAIN_SEQ_LEN tokens in each row, so there are no `cu_seqlens`.
    """
    hp = model.hp
    device = model.tok_emb.device
    generator = torch.Generator(device).manual_seed(hp.generator_seed * 1_000_003 + number)
    length = min(hp.train_seq_len, hp.micro_batch_tokens)
    tokens = torch.full((hp.micro_batch_tokens // length, length), BOS_ID, device=device)
    for t in range(1, length):
        hidden = model.forward_hidden(tokens[:, :t], max_seqlen=length, looping=True)[:, -1].float()
        logits = hp.logit_softcap * torch.tanh(
            F.linear(hidden, model.head_weight) / hp.logit_softcap
        )
        logits[:, BOS_ID] = -math.inf  # one document a row
        shares = (logits[:, : hp.vocab_size] / 0.8).softmax(1)
        tokens[:, t] = torch.multinomial(shares, 1, generator=generator)[:, 0]
    return SimpleNamespace(inputs=tokens, cu_seqlens=None)


def table_hessians(model):
    """{saved name: identity} of the tables read one row at a time: all columns count the same."""
    hp = model.hp
    widths = {"tok_emb.weight": hp.model_dim}
    if hp.bigram_vocab_size:
        widths["bigram.weight"] = hp.bigram_dim
    if hp.value_embed_layers:
        widths["value_embed.weight"] = hp.value_embed_dim
    return {name: torch.eye(width, device=model.tok_emb.device) for name, width in widths.items()}


LQER_FIELDS = "lqer_a", "lqer_a_scale", "lqer_b", "lqer_b_scale"
own_collect_hessians = train_gpt.collect_hessians
own_collect_row_gradients = train_gpt.collect_row_gradients
own_quantize_weights = train_gpt.quantize_weights
own_dequantize_fields = train_gpt.dequantize_fields


def collect_row_gradients(model, loader, hp, dist):
    """GPTQ_SELF_CALIBRATION: none, so that no data is read and rows have SDClip's steps."""
    if hp.gptq_self_calibration:
        return None
    return own_collect_row_gradients(model, loader, hp, dist)


def collect_hessians(model, loader, hp, dist):
    """Those of the tables, too; GPTQ_SELF_CALIBRATION: from rows that the model writes.

    TIE_EMBEDDINGS=0: the table that makes the logits is not the one that is read row by row.
    """
    if hp.gptq_self_calibration:
        loader = SimpleNamespace(row=lambda index, following: written_row(model, index))
    hessians = own_collect_hessians(model, loader, hp, dist)
    if hp.tie_embeddings:
        return table_hessians(model) | hessians
    return hessians | {"lm_head.weight": hessians["tok_emb.weight"]} | table_hessians(model)


def lqer_factors(error, rank):
    """error (R, C) -> A (R, rank), B (rank, C) with the least Frobenius norm of error - A B.

    LQER, arXiv:2402.02446.
    """
    u, s, vh = torch.linalg.svd(error.float(), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def pack_factors(a, b, hp):
    """LQER factors a (R, r), b (r, C) -> LQER_FIELDS: int8 codes and fp16 scales.

    With LQER_ASYM_ENABLED a has 2 bits and one scale, b 4 bits and a scale for every
    LQER_ASYM_GROUP elements; else, or if the groups do not divide b, both have LQER_FACTOR_BITS and
    a scale for every row.
    """
    if hp.lqer_asym_enabled and b.numel() % hp.lqer_asym_group == 0:
        a_codes, a_scale = train_gpt.quantize_rows(a.flatten(), -2, 1, 1.5)
        groups = b.reshape(-1, hp.lqer_asym_group)  # a group may cross rows
        b_codes, b_scale = train_gpt.quantize_rows(groups, -8, 7, 7.5)
    else:
        max_code = 2 ** (hp.lqer_factor_bits - 1) - 1
        a_codes, a_scale = train_gpt.quantize_rows(a, -max_code, max_code, max_code)
        b_codes, b_scale = train_gpt.quantize_rows(b, -max_code, max_code, max_code)
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


def factors_fit(shapes):
    """Whether a matrix can be corrected by fields of these shapes: an artifact may hold any."""
    codes = shapes.get("codes", ())
    a, b = shapes.get("lqer_a"), shapes.get("lqer_b")
    if len(codes) != 2 or not a or not b or (a[0], *b[1:]) != codes or a[1:] != b[:1]:
        return False
    a_scale, b_scale = shapes.get("lqer_a_scale"), shapes.get("lqer_b_scale")
    if a_scale == () and b_scale is not None and len(b_scale) == 1:  # LQER_ASYM_ENABLED
        return b_scale[0] > 0 and math.prod(b) % b_scale[0] == 0
    return (a_scale, b_scale) == (a[:1], b[:1])


def largest_errors(weights, arrays, hp, dist):
    """{name: error W - dequantized W (R, C)} of those LQER_TOP_K matrices that are this rank's."""
    matrices = {name: w for name, w in weights.items() if train_gpt.quant_role(name)}
    mine = train_gpt.share_matrices(matrices, dist.world_size)[dist.rank]
    of_mine = {key: array for key, array in arrays.items() if key.rpartition(":")[0] in mine}
    errors = {}
    for name, rebuilt in train_gpt.dequantize_weights(of_mine).items():
        errors[name] = weights[name].float() - rebuilt.to(weights[name].device)
    norms = {name: error.norm().item() for name, error in errors.items()}
    norms = train_gpt.merge_dicts(dist.all_gather_object(norms))
    chosen = sorted(norms, key=lambda name: (-norms[name], name))[: hp.lqer_top_k]
    return {name: errors[name] for name in mine if name in chosen}


@torch.no_grad()
def quantize_weights(
    weights, hessians, hp, dist, trellis_round=train_gpt.trellis_round_ref, row_gradients=None
):
    """LQER_ENABLED: the matrices with the largest errors over all ranks have LQER_FIELDS, too."""
    arrays = own_quantize_weights(weights, hessians, hp, dist, trellis_round, row_gradients)
    if not hp.lqer_enabled:
        return arrays
    corrections = {}
    for name, error in largest_errors(weights, arrays, hp, dist).items():
        a, b = lqer_factors(error, hp.lqer_rank)
        for field, tensor in pack_factors(a, b, hp).items():
            corrections[f"{name}:{field}"] = tensor.cpu().numpy()
    arrays |= train_gpt.merge_dicts(dist.all_gather_object(corrections))
    place = {name: number for number, name in enumerate(weights)}  # of a weight in the artifact
    return dict(sorted(arrays.items(), key=lambda item: place[item[0].rpartition(":")[0]]))


def dequantize_fields(name, fields):
    """Adds the correction A B where there are LQER_FIELDS; ArtifactError if they do not fit."""
    others = {field: array for field, array in fields.items() if field not in LQER_FIELDS}
    w = own_dequantize_fields(name, others)
    if len(others) == len(fields):
        return w
    shapes = {field: array.shape for field, array in fields.items()}
    if not factors_fit(shapes):
        raise ArtifactError(f"{name}: no weight can be made of the fields {shapes}")
    a, b = unpack_factors(fields)
    for r in range(a.shape[1]):
        w += a[:, r, None] * b[r]
    return w


def greedy_row_order(codes):
    """codes int8 (R, C) -> order (R,) uint16 in which COMPRESSOR=pergroup (PR 1855) has the rows.

    From row 0 on to the nearest row left by L1 distance, ties to the lowest index.
    """
    # whole numbers, exact in fp32 up to 65,793 columns; the pair (i, j), i < j, stands at offset[i]
    # + j
    distances = torch.pdist(torch.from_numpy(codes).float(), p=1).numpy()
    index = np.arange(len(codes))
    offset = index * len(codes) - index * (index + 1) // 2 - index - 1
    order = np.zeros(len(codes), np.uint16)
    taken = np.zeros(len(codes), np.float32)
    for step in range(1, len(codes)):
        last = order[step - 1]
        taken[last] = np.inf  # no row is nearest to itself, whatever stands at (last, last)
        pairs = offset[np.minimum(index, last)] + np.maximum(index, last)
        order[step] = (distances[pairs] + taken).argmin()
    return order


def run_lrzip(flags, data):
    """Bytes through the external lrzip. ArtifactError if it fails or takes over 900 seconds.

    It gets files and -o, as what it does with standard streams differs by version.
    """
    with tempfile.TemporaryDirectory(prefix="lrzip-") as folder:
        source = Path(folder, "in.lrz" if "-d" in flags else "in")
        target = Path(folder, "out")
        source.write_bytes(data)
        command = [*"lrzip -q -f -o".split(), target, *flags, source]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, cwd=folder, timeout=900
            )
        except subprocess.TimeoutExpired as error:
            raise ArtifactError(f"lrzip: {error}") from error
        if done.returncode != 0 or not target.exists():
            raise ArtifactError(f"lrzip ended with {done.returncode}: {done.stderr[-300:]!r}")
        return target.read_bytes()


def lrzip_compress(raw, shapes=()):
    return run_lrzip(["-z", "-L", "9"], raw)


def lrzip_decompress(data, raw_size, shapes=()):
    """The bytes of `data`; none if lrzip 0.6's header claims another size than raw_size.

    That is checked before lrzip writes anything to the disk.
    """
    starts_well = data[:6] == b"LRZI\x00\x06"
    if starts_well and struct.unpack_from("<Q", data.ljust(14, b"\0"), 6)[0] != raw_size:
        return b""
    return run_lrzip(["-d"], data)


def lzma_compress(raw, shapes=()):
    return lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)


def lzma_decompress(data, raw_size, shapes=()):
    """At most raw_size + 1 bytes; none if the stream is cut off or something follows it."""
    decoder = lzma.LZMADecompressor(memlimit=2**28)
    try:
        raw = decoder.decompress(data, max_length=raw_size + 1)
    except lzma.LZMAError as error:
        raise ArtifactError(f"artifact: lzma data does not expand: {error}") from error
    return raw if decoder.eof and not decoder.unused_data else b""


ENCODERS = train_gpt.ENCODERS | {"lrzip": lrzip_compress, "lzma": lzma_compress}
DECODERS = train_gpt.DECODERS | {"lrzip": lrzip_decompress, "lzma": lzma_decompress}
COMPRESSORS = train_gpt.COMPRESSORS | {
    "lzma": train_gpt.Compressor(1, "lzma"),
    "pergroup": train_gpt.Compressor(2, "brotli", "lrzip"),
}
own_check_all = train_gpt.check_all
own_plan_sections = train_gpt.plan_sections
own_section_sources = train_gpt.section_sources
own_join_sections = train_gpt.join_sections


def check_lrzip():
    """SettingError if lrzip is missing or does not give back what it got."""
    if shutil.which("lrzip") is None:
        raise SettingError(
            "the lrzip program is missing: apt-get install lrzip, or set COMPRESSOR=entropy"
        )
    sample = b"1234" * 8
    try:
        is_same = lrzip_decompress(lrzip_compress(sample), len(sample)) == sample
        fault = None if is_same else "other bytes"
    except (ArtifactError, OSError) as error:
        fault = error
    if fault:
        raise SettingError(f"COMPRESSOR=pergroup does not work here: {fault}")


def check_all(hp, dist, guard=train_gpt.NO_GUARD):
    """Checks lrzip, too, where COMPRESSOR needs it."""
    if hp.compressor == "pergroup":
        check_lrzip()
    return own_check_all(hp, dist, guard)


def plan_sections(specs, compressor):
    """pergroup (PR 1855): the "codes" of each role; "orders" of re-ordered rows; the "rest"."""
    if compressor != "pergroup":
        return own_plan_sections(specs, compressor)
    groups, others = train_gpt.group_codes(specs)
    plan = [train_gpt.Section("codes", "lrzip", group) for group in groups.values() if group]
    ordered = {spec.name for role in ("embedding", "q", "up") for spec in groups[role]}
    orders = []
    for spec in specs:
        if spec.name in ordered and spec.shape[0]:
            orders.append(train_gpt.ArraySpec(spec.name, "uint16", spec.shape[:1]))
    plan.append(train_gpt.Section("orders", "brotli", orders))
    plan.append(train_gpt.Section("rest", "brotli", others))
    return plan


def section_sources(arrays, plan):
    """Adds the "orders" of a plan: their "codes" get their rows in that order."""
    sources = own_section_sources(arrays, plan)
    names = []
    for section in plan:
        if section.kind == "orders":
            names += [spec.name for spec in section.specs]
    with ThreadPoolExecutor(train_gpt.CODEC_THREADS) as pool:
        orders = pool.map(greedy_row_order, [arrays[name] for name in names])
        sources["orders"] = dict(zip(names, orders, strict=True))
    sources["codes"] |= {name: arrays[name][order].T for name, order in sources["orders"].items()}
    return sources


def join_sections(sources):
    """Puts the rows of re-ordered arrays back. ArtifactError where an order is no permutation."""
    arrays = own_join_sections(sources)
    for name, order in sources.get("orders", {}).items():
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            raise ArtifactError(f"artifact: the row order of {name} is no permutation")
        arrays[name] = arrays[name][np.argsort(order)]
    return arrays


# ---- evaluation


def sliding_windows(hp, stream):
    """Windows of all documents -> (n, 3) int64: start, end, first scored input.

    They advance by EVAL_STRIDE. The first window of a document scores all its inputs, each later
    one those that no earlier window scored, at most EVAL_STRIDE: every target is scored once, with
    the longest context.
    """
    length = hp.eval_seq_len
    stride = hp.eval_stride
    targets = stream.ends - stream.starts
    num_windows = np.maximum(1, 1 - (length - targets) // stride)
    num_windows = np.where(targets > 0, num_windows, 0)
    document = np.repeat(np.arange(len(targets)), num_windows)
    first_window = np.cumsum(num_windows) - num_windows
    number = np.arange(num_windows.sum()) - np.repeat(first_window, num_windows)
    start = stream.starts[document] + number * stride
    end = np.minimum(start + length, stream.ends[document])
    first_scored = np.where(number == 0, start, start + length - stride)
    return np.stack([start, end, first_scored], axis=1)


class WindowPacker(train_gpt.WindowPacker):
    """Also packs sliding_windows, of which the inputs before the first scored one are context."""

    def build(self, windows):
        row = super().build(windows)
        if windows.shape[1] == 2:
            return row
        start, end, first_scored = windows.T
        lengths = end - start
        offsets = np.cumsum(lengths) - lengths
        position = np.arange(lengths.sum()) - np.repeat(offsets, lengths)  # in its window
        scored = np.zeros(self.row_tokens, bool)
        scored[: len(position)] = position >= np.repeat(first_scored - start, lengths)
        return row._replace(scored=self.upload(scored))


class Stages(train_gpt.Stages):
    """SLIDING_WINDOW_ENABLED: scores the artifact's model with overlapping windows, too.

    TTT_METHOD=sgd: test-time training of all weights.
    """

    def evaluate_adapted(self):
        if self.hp.ttt_method == "sgd":
            return evaluate_sgd(self.evaluator)
        return super().evaluate_adapted()

    def score(self, name):
        super().score(name)
        if name == "quantized" and self.hp.sliding_window_enabled:
            train_gpt.score_stage(
                "sliding", lambda: evaluate_sliding(self.evaluator), self.log, self.scores
            )


def evaluate_sliding(evaluator):
    """As Evaluator.evaluate_bpb, in sliding_windows."""
    stream = evaluator.validation
    dist = evaluator.dist
    score = train_gpt.Score(dist.device)
    windows = sliding_windows(evaluator.hp, stream)
    evaluator.add_losses(windows, score, dist.rank, dist.world_size)
    return score.total(dist, stream.targets_of(np.arange(len(stream.starts))))


# ---- test-time training


def evaluate_sgd(evaluator):
    """Sliding windows; all weights take SGD steps on a chunk that is scored (TTT_METHOD=sgd).

    PR 1493. Returns what Evaluator.evaluate_bpb returns. A window belongs to the chunk in which its
    scored part begins; of a chunk only what was scored is learned from, TTT_EPOCHS times; nothing
    after the last one.
    """
    hp = evaluator.hp
    stream = evaluator.validation
    dist = evaluator.dist
    model = evaluator.model
    row_tokens = -(-hp.global_ttt_chunk_tokens // dist.world_size) + hp.eval_seq_len
    packer = WindowPacker(stream, row_tokens, hp.eval_seq_len, hp, dist.device)
    score = train_gpt.Score(dist.device)
    windows = sliding_windows(hp, stream)
    chunk_of = windows[:, 2] // hp.global_ttt_chunk_tokens
    chunks = [windows[chunk_of == number] for number in np.unique(chunk_of)]
    optimizer = train_gpt.global_optimizer(model)
    for number, chunk in enumerate(chunks):
        evaluator.add_losses(chunk, score, dist.rank, dist.world_size)
        if number + 1 < len(chunks):
            joined = chunk[1:, 2] == chunk[:-1, 1]  # windows that go on where the one before ended
            starts = chunk[np.append(True, ~joined), 2]
            ends = chunk[np.append(~joined, True), 1]
            pieces = train_gpt.document_windows(starts, ends, hp.eval_seq_len)
            rate = hp.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * number / (len(chunks) - 1)))
            for _ in range(hp.ttt_epochs):
                train_gpt.sgd_step(model, packer, pieces, optimizer, rate, dist)
    model.zero_grad(set_to_none=True)
    return score.total(dist, stream.targets_of(np.arange(len(stream.starts))))


class TestTimeTrainer(train_gpt.TestTimeTrainer):
    """NGRAM_TILT_ENABLED: `hinted` (n, 2) has each token of the stream and its hint, -1 for none.
    NGRAM_TILT_ORDERS: (n, 4), also the kind of the hint, and the queue that the target is of.
    """

    def __init__(self, model, validation, hp, dist, log):
        self.boosts = LearnedBoosts(hp, dist.device) if hp.learns_tilt else None
        super().__init__(model, validation, hp, dist, log)
        if hp.ngram_tilt_enabled:
            self.hinted = F.pad(self.packer.tokens[:, None], (0, 1), value=-1)
        if hp.learns_tilt:
            self.hinted = F.pad(self.hinted, (0, 2))

    def head_function(self):
        losses = super().head_function()
        if self.hp.learns_tilt:
            return with_learned_tilt(losses, self.boosts)
        return with_tilt(losses) if self.hp.ngram_tilt_enabled else losses

    def targets_at(self, positions):
        if self.hp.ngram_tilt_enabled:
            self.noted = self.hinted[positions]
            return self.noted
        return super().targets_at(positions)

    def learned_and_counted(self, losses):
        if self.hp.learns_tilt:
            *losses, self.lessons = losses
        return losses if self.hp.ngram_tilt_enabled else super().learned_and_counted(losses)

    def chunk_step(self, table, width):
        super().chunk_step(table, width)
        # the chunks are counted: from here on the boosts may learn, too
        if self.hp.learns_tilt:
            self.boosts.learn(self.noted, self.lessons, train_gpt.StepRow(*table.T).count)

    def plan_made(self, starts, lengths, phases):
        if not self.hp.ngram_tilt_enabled:
            return
        tokens, before = self.packer.tokens, self.progress.seconds()
        if self.hp.learns_tilt:
            self.hinted[:, 1:3] = tilt_hints(tokens, starts, lengths, phases, self.hp)
            self.hinted[:, 3] = queue_of_targets(tokens, starts, phases)
        else:
            self.hinted[:, 1] = ngram_hints(tokens, starts, lengths, phases)
        number = int((self.hinted[:, 1] >= 0).sum())  # on a GPU this waits for the hints
        self.log(f"ttt_ngram hints:{number} seconds:{self.progress.seconds() - before:.1f}")

    def global_adapt(self, documents):
        super().global_adapt(documents)
        if self.hp.learns_tilt:
            self.boosts.share(self.dist)  # every rank has counted all documents of the phase

    def skip_fine_tuning(self):
        super().skip_fine_tuning()
        if self.hp.ngram_tilt_enabled:
            self.hinted[:, 1] = -1  # documents of this phase may be left to the end

    def evaluate(self):
        result = super().evaluate()
        if self.hp.learns_tilt:
            self.log(self.boosts.report(self.dist))
        return result

    def dynamic_attention(self, slot_input, w, rope, segments, tap):
        if self.hp.new_values:
            self.mark_dynamic([0, 1], *streams_of(w.extras))
        return super().dynamic_attention(slot_input, w, rope, segments, tap)


# Tokens before a hint, its least share of the cases so far, what its logit gains; keys are
# polynomials in `base`.
NGRAM = SimpleNamespace(context=15, share=0.8, boost=2.625, base=6364136223846793005)


def tilted(losses, of_hints, boost, is_right):
    """Nats of targets and of hints, what the logits of hints gain, whether the target is the hint
    -> nats under p(a) e^(boost [a = hint]) / (1 + p(hint) (e^boost - 1)).
    """
    return losses + torch.log1p((-of_hints).exp() * boost.expm1()) - boost * is_right


def with_tilt(token_losses):
    """GPT.token_losses -> the same for targets (B, C, 2) with a hint beside each, -1: none -> nats,
    and those that count, which are `tilted`. Compiled, the head is computed once.
    """

    def losses_and_tilted(scored, targets, tap):
        targets, hints = targets.unbind(-1)
        losses, of_hints = (token_losses(scored, t, tap) for t in (targets, hints.clamp_min(0)))
        return losses, tilted(losses, of_hints, NGRAM.boost * (hints >= 0), hints == targets)

    return losses_and_tilted


def followers(keys, tokens, moments, share):
    """Keys (n,), the token behind each, moments that never decrease -> (n, 3) the token that mostly
    stood behind the same key at earlier moments, -1 where none did in this share of all cases (of
    equals the one that got there last); the number of cases; how many places ago the last one was.
    """
    index = torch.arange(len(keys), device=keys.device)

    def run_starts(column):  # of runs of equal elements
        return (
            torch.where(F.pad(column[1:] != column[:-1], (1, 0), value=True), index, 0)
            .cummax(0)
            .values
        )

    pairs, order = (keys * NGRAM.base + tokens).sort(stable=True)
    # cases of the same pair
    earlier = torch.empty_like(index).scatter_(0, order, index - run_starts(pairs))
    keys, order = keys.sort(stable=True)
    first = run_starts(keys)
    now = run_starts(keys * NGRAM.base + moments[order]) - 1
    most, best = (first * len(keys) + earlier[order]).cummax(0)  # of each key, up to here
    most = most[now] - first * len(keys) + 1
    cases = now - first + 1
    fires = (cases > 0) & (most >= share * cases.double())
    hints = torch.where(fires, tokens[order[best[now]]], -1)
    found = torch.stack((hints, cases, order - order[now]), 1)
    return torch.empty_like(found).index_copy_(0, order, found)


def hints_of_order(tokens, starts, lengths, phases, size, share):
    """(n,) stream, (m,) first inputs of documents and their targets, plan -> (n, 3) hint at each
    target, -1: none; the number of cases; the distance of the last one, 0 for another document's.

    Token n-gram tilt (PR 2018): what mostly followed these `size` tokens in the document so far,
    else in earlier phases. That was counted before on any number of ranks; one order of documents,
    phase by phase, explains adapters and hints.
    """
    order = [
        (number, document)
        for number, phase in enumerate(phases)
        for document in phase.documents.tolist()
    ]
    phase, document = torch.tensor(order, device=tokens.device).T
    starts, lengths = (torch.from_numpy(a).to(tokens.device)[document] for a in (starts, lengths))
    counts = (lengths - size + 1).clamp_min(0)  # targets behind a whole context
    shift = starts + size + counts - counts.cumsum(0)
    document, phase, shift = (
        column.repeat_interleave(counts) for column in (document, phase, shift)
    )
    moment = torch.arange(len(shift), device=tokens.device)
    at = shift + moment
    context = 0
    for back in range(size, 0, -1):
        context = context * NGRAM.base + tokens[at - back]
    near = followers(context * NGRAM.base + document, tokens[at], moment, share)
    far = followers(context, tokens[at], phase, share)
    far[:, 2] = 0
    found = tokens.new_tensor([-1, 0, 0]).repeat(len(tokens), 1)
    return found.index_copy_(0, at, torch.where(near[:, :1] < 0, far, near))


def ngram_hints(tokens, starts, lengths, phases):
    """The hints of hints_of_order, as published: (n,)."""
    return hints_of_order(tokens, starts, lengths, phases, NGRAM.context, NGRAM.share)[:, 0]


# A hint's kind is KINDS times its order's index, and 3 min(3, ceil(log2(cases))), and where its
# last case is: 0 in the window, 1 before it, 2 in another document.
KINDS = 12
NUM_FEATURES = 6
PRECISION = 4.0  # of a weight before anything is learned: its standard deviation is 1/2


def tilt_hints(tokens, starts, lengths, phases, hp):
    """As hints_of_order -> (n, 2) hint at each target, -1: none; its kind. Of NGRAM_TILT_ORDERS the
    longest that was seen before has the hint.
    """
    found = tokens.new_tensor([-1, 0]).repeat(len(tokens), 1)
    few = tokens.new_tensor([1, 2, 4])
    for number, size in enumerate(tilt_orders(hp)):
        hints, cases, back = hints_of_order(tokens, starts, lengths, phases, size, 0.0).unbind(1)
        where = torch.where(back == 0, 2, (back > hp.ttt_eval_seq_len).long())
        kinds = KINDS * number + 3 * torch.bucketize(cases.contiguous(), few) + where
        found = torch.where(hints[:, None] < 0, found, torch.stack((hints, kinds), 1))
    return found


def tilt_orders(hp):
    """NGRAM_TILT_ORDERS in ascending order."""
    return sorted(set(map(int, hp.ngram_tilt_orders.split(","))))


def queue_of_targets(tokens, starts, phases):
    """(n,) stream, (m,) ascending first inputs of documents, plan -> (n,) the number of the queue
    that scores each target, the same for any number of ranks.
    """
    queues = np.zeros(len(starts), np.int64)
    for phase in phases:
        for number, documents in enumerate(sum(phase.lanes, [])):
            queues[documents] = number
    starts, queues = (torch.from_numpy(a).to(tokens.device) for a in (starts, queues))
    place = torch.arange(len(tokens), device=tokens.device)
    return queues[(torch.searchsorted(starts, place) - 1).clamp_min(0)]


def solve_systems(systems):
    """(B, k, k + 1) positive definite matrices, each with a right side -> (B, k) solutions.

    Gauss-Jordan without pivots, as torch.linalg may not be captured in a CUDA graph.
    """
    for i, unit in enumerate(torch.eye(systems.size(1), device=systems.device)):
        row = systems[:, i] / systems[:, i, i, None]
        systems = systems - (systems[:, :, i] - unit)[..., None] * row[:, None]
    return systems[..., -1]


class LearnedBoosts:
    """Boosts of hints: w x, of features x of a hint and weights w that are learned online.

    Logistic regression of whether the hint is right, by online Newton steps (Hazan, Agarwal and
    Kale, 2007): with r = p'(hint) - [hint = target] of a counted target, p' the tilted probability,
    A grows by r^2 x x^T, v by r^2 x (x w) - r x, and w is A^-1 v. These are sums, kept in fp64 as
    (A | v): `common` (k, k + 1) over all documents of the phases before, `own` (queues, k, k + 1)
    over what a queue has scored in this phase. Who shares a step, and with whom, depends on the
    number of ranks; the order of the chunks of a queue does not.
    `fired` (queues, orders, 2): targets with a hint, and the nats gained there.
    """

    def __init__(self, hp, device):
        num_queues = hp.ttt_lanes * hp.ttt_batch_size
        shape = (NUM_FEATURES, NUM_FEATURES + 1)
        self.orders = tilt_orders(hp)
        self.common = PRECISION * torch.eye(*shape, dtype=torch.float64, device=device)
        self.own = self.common.new_zeros(num_queues, *shape)
        self.fired = self.common.new_zeros(num_queues, len(self.orders), 2)

    def features(self, of_hints, kinds):
        """Nats of hints and their kinds (B, C) -> (B, C, k): where the last case is, one of three;
        log-odds of p(hint), number of cases, order. All are about 1 at most.
        """
        nats = of_hints.double().clamp_min(1e-6)
        log_odds = (-nats - (-(-nats).expm1()).log()).clamp(-8, 8)
        cases = kinds % KINDS // 3
        order = kinds // KINDS / max(1, len(self.orders) - 1)
        columns = [kinds % 3 == place for place in range(3)] + [log_odds / 4, cases / 3, order]
        return torch.stack([column.double() for column in columns], -1)

    def __call__(self, of_hints, hints, kinds, queues):
        """(B, C) nats of hints, hints, kinds; (B,) queues -> (B, C) boosts, features (B, C, k)."""
        x = self.features(of_hints, kinds) * (hints >= 0)[..., None]
        w = solve_systems(self.common + self.own[queues])
        return (x * w[:, None]).sum(-1), x

    def learn(self, noted, lessons, counts):
        """Adds lessons (B, C, 1 + k (k + 1)) of the first counts (B,) targets of each row; noted
        (B, C, 4) are the targets as the head had them. No rows but padding share a queue.
        """
        hints, kinds, queues = noted[..., 1:].unbind(-1)
        offset = torch.arange(hints.size(1), device=hints.device)
        fires = (offset < counts[:, None]) & (hints >= 0)
        lessons = torch.where(fires[..., None], lessons, 0.0)
        sums = lessons[..., 1:].sum(1).unflatten(1, self.common.shape)
        self.own.index_add_(0, queues[:, 0], sums)
        cell = (queues * len(self.orders) + kinds // KINDS).flatten()
        gained = torch.stack((fires.double(), lessons[..., 0]), -1)
        self.fired.flatten(0, 1).index_add_(0, cell, gained.flatten(0, 1))

    def share(self, dist):
        """After a phase: all queues of all ranks go on with what any of them has learned."""
        self.common += dist.all_reduce(self.own.sum(0))
        self.own.zero_()

    def report(self, dist):
        """Log line: hints of counted targets, nats gained by one and standard error (queues are
        the independent samples), order:hints:nats, and the weights that all queues share.
        """
        fired = dist.all_reduce(self.fired.clone()).cpu().numpy()
        number, gain = fired.sum(1).T
        total = max(1, number.sum())
        mean = gain.sum() / total
        samples = max(1, np.count_nonzero(number))
        spread = np.square(gain - mean * number).sum() * samples / max(1, samples - 1)
        by_order = []
        for order, (fires, nats) in zip(self.orders, fired.sum(0), strict=True):
            by_order.append(f"{order}:{fires:.0f}:{nats:+.1f}")
        weights = solve_systems(self.common[None])[0].tolist()
        return (
            f"ttt_ngram fired:{number.sum():.0f} nats:{gain.sum():+.1f} nats_a_firing:{mean:+.5f}"
            f" standard_error:{math.sqrt(spread) / total:.5f} by order {' '.join(by_order)}"
            f" shared weights {' '.join(f'{w:+.3f}' for w in weights)}"
        )


def with_learned_tilt(token_losses, boosts):
    """As with_tilt, for targets (B, C, 4): target, hint, kind, queue -> nats, those that count,
    lessons (B, C, 1 + k (k + 1)) of each hint: nats gained, and what LearnedBoosts adds up.
    """

    def losses_tilted_and_lessons(scored, targets, tap):
        targets, hints, kinds, queues = targets.unbind(-1)
        losses, of_hints = (token_losses(scored, t, tap) for t in (targets, hints.clamp_min(0)))
        plain, of_hints = losses.detach(), of_hints.detach()
        boost, x = boosts(of_hints, hints, kinds, queues[:, 0])
        is_right = hints == targets
        counted = tilted(plain, of_hints, boost, is_right)
        residual = (-tilted(of_hints, of_hints, boost, 1.0)).exp() - is_right.double()
        curvature = residual[..., None].square() * x
        grown = curvature[..., None] * x[..., None, :]
        side = curvature * boost[..., None] - residual[..., None] * x
        sums = torch.cat((grown, side[..., None]), -1).flatten(2)
        return losses, counted.float(), torch.cat(((plain - counted)[..., None], sums), -1)

    return losses_tilted_and_lessons


# ---- the parts, and running them

PARTS = {
    "Hyperparameters": Hyperparameters,
    "cross_checks": cross_checks,
    "ValidationSet": ValidationSet,
    "LayerWeights": LayerWeights,
    "EMBEDDING_NAMES": EMBEDDING_NAMES,
    "GPT": GPT,
    "Muon": Muon,
    "decay_multiplier": decay_multiplier,
    "EMA": EMA,
    "Trainer": Trainer,
    "QUANT_TABLE": QUANT_TABLE,
    "collect_hessians": collect_hessians,
    "collect_row_gradients": collect_row_gradients,
    "quantize_weights": quantize_weights,
    "dequantize_fields": dequantize_fields,
    "ENCODERS": ENCODERS,
    "DECODERS": DECODERS,
    "COMPRESSORS": COMPRESSORS,
    "check_all": check_all,
    "plan_sections": plan_sections,
    "section_sources": section_sources,
    "join_sections": join_sections,
    "WindowPacker": WindowPacker,
    "Stages": Stages,
    "TestTimeTrainer": TestTimeTrainer,
}


def install():
    """Puts the parts in the place of train_gpt.py's."""
    for name, part in PARTS.items():
        setattr(train_gpt, name, part)


def main():
    """Command line: the name of a preset, or none; then a run of train_gpt.py with these parts."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        os.environ["PRESET"] = sys.argv.pop(1)
    if not (ROOT / "tools" / "guard.py").exists():
        sys.exit("published.py cannot run: it needs its repository, tools/guard.py among it")
    install()
    train_gpt.main()


if __name__ == "__main__":
    main()
