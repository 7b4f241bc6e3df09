"""Techniques of published systems, all off by default (docs/PRESETS.md says who uses them).

train_gpt.py calls each at its place, where this file is found beside it (train_gpt.find_guard). The
packed script of a run that uses one has this file in it: tools/pack_code.py puts these definitions
between those of train_gpt.py. So a name stands here for one thing, the same as there, and what a
technique needs of train_gpt.py is an argument.
"""

import math
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import train_gpt
from train_gpt import BOS_ID, FP16_RANGE, ArtifactError, DataError

# ---- data


class ShuffledShards:
    """Shards as of a TokenStream, documents inside each in another order (DOC_SHUFFLE_ENABLED, PR
    1512).

    What a shard's border has cut counts as a document.
    """

    def __init__(self, shards, seed):
        self.shards, self.seed, self.kept = shards, seed, (None, None)

    def __getitem__(self, number):
        kept, tokens = self.kept  # one thread at a time reads training rows
        if kept != number:
            starts = np.flatnonzero(self.shards[number] == BOS_ID)
            documents = np.split(self.shards[number], starts[starts > 0])
            order = np.random.default_rng([self.seed, number]).permutation(len(documents))
            tokens = np.concatenate([documents[i] for i in order])
            self.kept = number, tokens
        return tokens


def piece_byte_tables(tokenizer):
    """SentencePiece model -> (bytes, leading space, boundary) per id, for data without
    side-cars.
    """
    if tokenizer.piece_to_id("\u2581") == tokenizer.unk_id():
        raise DataError(
            "the tokenizer has no piece of its own for the space: its spaces would count three"
            " bytes"
        )
    size = tokenizer.vocab_size()
    count, leading, boundary = np.zeros(size, np.int64), np.zeros(size, bool), np.ones(size, bool)
    for token in range(size):
        if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
            continue
        boundary[token] = False
        piece = tokenizer.id_to_piece(token)
        leading[token] = piece.startswith("\u2581") and not tokenizer.is_byte(token)
        count[token] = 1 if tokenizer.is_byte(token) else len(piece.removeprefix("\u2581").encode())
    return count, leading, boundary


def fuse_markers(hp, space_of, tokens, charges):
    """(n,) int64 ids and their bytes -> (m,) both, with a space and the case marker behind it as
    one
    id (PR 2109).

    SentencePiece merges nothing across a marker. The pair's id is VOCAB_SIZE + marker - 4; shards
    stay as they are. `space_of(hp)` is the id of a lone space.
    """
    pair = np.append((tokens[:-1] == space_of(hp)) & (tokens[1:] >= 4) & (tokens[1:] <= 6), False)
    second = np.roll(pair, 1)
    tokens = np.where(second, tokens + hp.vocab_size - 4, tokens)
    charges = charges + np.where(second, np.roll(charges, 1), 0)
    return tokens[~pair], charges[~pair]


# ---- model


def init_pairs(hp, space_of, table):
    """Rows of an embedding (V, D) for fused pairs: one begins near its marker, and is as long
    (PR 2109); in place.
    """
    pair, V = 0.4 * table[space_of(hp)] + 0.6 * table[4:7], hp.vocab_size
    table[V : V + 3] = F.normalize(pair) * table[4:7].norm(dim=1, keepdim=True)


def add_parameters(model):
    """Gives a GPT the parameters of BIGRAM_VOCAB_SIZE, VALUE_EMBED_LAYERS and VALUE_RESIDUAL."""
    hp, L = model.hp, model.hp.num_layers
    generator = torch.Generator().manual_seed(hp.generator_seed + 1)
    # the table is zero: with a projection of zeros neither would ever learn
    if hp.bigram_vocab_size:
        projection = torch.empty(hp.model_dim, hp.bigram_dim)
        model.bigram_table = nn.Parameter(torch.zeros(hp.bigram_vocab_size, hp.bigram_dim))
        model.bigram_proj = nn.Parameter(nn.init.orthogonal_(projection, generator=generator))
        model.bigram_scale = nn.Parameter(torch.full((1,), 0.05))
    if hp.value_embed_layers:
        table = torch.empty(hp.num_embeddings, hp.value_embed_dim).normal_(
            0.0, 0.01, generator=generator
        )
        projection = torch.empty(hp.num_kv_heads * hp.head_dim, hp.value_embed_dim)
        model.value_table = nn.Parameter(table)
        model.value_proj = nn.Parameter(nn.init.orthogonal_(projection, generator=generator))
        # used in the layers that are named
        model.value_scales = nn.Parameter(torch.full((L, 1), 0.1))
    if hp.value_residual != "off":  # l0 and l1, or a
        model.value_mix = nn.Parameter(
            torch.full((L, 2), 0.5) if hp.value_residual == "mix" else torch.zeros(L, 1)
        )


def lacks_previous(tokens, fresh):
    """(B, T) ids -> (B, T) bool: BOS, and where `fresh` is set, or a row starts: there is no
    previous token.
    """
    starts = (tokens == BOS_ID) | (torch.arange(tokens.size(1), device=tokens.device) == 0)
    return starts if fresh is None else starts | fresh


def bigram_embedding(model, tokens, fresh):
    """(B, T) ids -> (B, T, D): embedding of the hashed pair of a token and the one before (PRs
    960, 1512).
    """
    last, previous = model.hp.bigram_vocab_size - 1, F.pad(tokens[:, :-1], (1, 0))
    bucket = ((36313 * tokens) ^ (27191 * previous)) % last
    rows = F.embedding(torch.where(lacks_previous(tokens, fresh), last, bucket), model.bigram_table)
    return model.bigram_scale.to(model.dtype) * F.linear(
        rows.to(model.dtype), model.bigram_proj.to(model.dtype)
    )


def layer_extras(model, tokens, fresh):
    """(B, T) ids -> for every layer what keys_and_values and its attention need, by name.

    window: tokens that it sees before its own, 0: all; begins (B, T), where keys are offset;
    embedded (B, T, K, E) and scale (1,), where values have them; mix (2,) of layer 0's values and
    of its own; first: one dict for all layers, into which layer 0 puts its values.
    """
    hp, L, first = model.hp, model.hp.num_layers, {}
    found = [
        {"window": hp.attn_window * (layer < L - hp.attn_window_full_layers)} for layer in range(L)
    ]
    if hp.partial_key_offset:
        offset = {"begins": lacks_previous(tokens, fresh)}
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


def keys_and_values(k, v, extras, hp):
    """k, v (B, T, K, E) of a layer -> both as PARTIAL_KEY_OFFSET, VALUE_EMBED_LAYERS and
    VALUE_RESIDUAL make them.
    """
    if hp.partial_key_offset and "begins" in extras:
        k = offset_keys(k, extras["begins"], hp.rope_dims)
    if hp.value_embed_layers and "embedded" in extras:
        v = v + extras["scale"] * extras["embedded"]
    if hp.value_residual != "off" and "values" in extras["first"]:
        v = extras["mix"][0] * extras["first"]["values"] + extras["mix"][1] * v
    elif hp.value_residual != "off":  # this is layer 0, in its first pass
        extras["first"]["values"] = v
    return k, v


def offset_keys(k, begins, turning):
    """(B, T, K, E) keys -> dimensions that do not turn (or the second half) from the token before
    (PR
    1512).

    A token where `begins` (B, T) is set, the first one of a document or a window, keeps its own.
    """
    E = k.size(-1)
    turned, own = k.split((turning, E - turning) if turning < E else (E // 2, E - E // 2), dim=-1)
    # a copy: shifted in place, rows would overwrite each other
    previous = F.pad(own[:, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat((turned, torch.where(begins[..., None, None], own, previous)), dim=-1)


def fake_quantize(w, bits, clip_sigmas):
    """w (..., C) -> w on its row's grid as gptq_quantize has it, gradients as if it were w
    (straight through).
    """
    q_max = 2 ** (bits - 1) - 1
    step = (
        (clip_sigmas * w.detach().std(dim=-1, keepdim=True) / q_max)
        .clamp(*FP16_RANGE)
        .half()
        .float()
    )
    return w + ((w / step).round().clamp(-q_max, q_max) * step - w).detach()


def extra_passes(model, slots):
    """Slots with EXTRA_EVAL_LOOPS -> their numbers in training with their layers, and how many of
    these are encoders.

    Skips go by these numbers, so they stay between the layers of training. The passes that training
    did not have come last of the loop and have negative numbers: they neither keep nor take a skip,
    and their adapters are the last ones.
    """
    hp, added, numbers = model.hp, 0, list(range(len(slots)))
    if len(slots) > hp.num_layers:
        looped = hp.loop_end + 1 - hp.loop_start
        added, begin = (
            looped * ((model.eval_passes or 1) - 1),
            hp.loop_start + looped * (hp.num_loops + 1),
        )
        numbers[begin:] = [*range(-added, 0), *numbers[begin : len(slots) - added]]
    return zip(numbers, slots, strict=True), (len(slots) - added) // 2


# ---- optimizer and schedule


def gram_newton_schulz(x, coefficients):
    """polar_express with products of the short side only (idea: Dao-AILab, gram-newton-schulz): Q,
    then Q X is it.

    Q and R = X X^T are polynomials of one matrix, so they commute; made anew after two steps,
    against rounding.
    """
    if x.size(-2) > x.size(-1):
        return gram_newton_schulz(x.mT, coefficients).mT
    x, q = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7), None
    for i, (a, b, c) in enumerate(coefficients):
        if i in (0, 2):
            x, q = x if q is None else q @ x, None
            gram = x @ x.mT
        z = b * gram + c * (gram @ gram)
        q = (
            z + a * torch.eye(z.size(-1), dtype=x.dtype, device=x.device)
            if q is None
            else a * q + q @ z
        )
        half = a * gram + gram @ z
        gram = a * half + z @ half
    return q @ x


def orthogonaliser(muon, buffer, polar_express, coefficients):
    """-> function (updates (N, R, C), steps) that Muon orthogonalises the bank of this momentum
    buffer
    with.

    MUON_GRAM_ENABLED: by gram_newton_schulz, square matrices as ever. MUON_HEAD_PAIRS (PR 1512): q
    and k, which stand first in the first two banks, in blocks of two heads, those of this rank's
    share.
    """
    hp = muon.hp

    def whole(updates, steps):
        square = updates.size(-2) == updates.size(-1)
        gram = hp.muon_gram_enabled and not square
        return (
            gram_newton_schulz(updates, coefficients[:steps])
            if gram
            else polar_express(updates, steps)
        )

    def by_pairs(updates, steps):
        paired = min(max(hp.num_layers - muon.dist.rank * len(updates), 0), len(updates))
        blocks = updates[:paired].unflatten(1, (-1, 2 * hp.head_dim))
        blocks = whole(blocks.flatten(0, 1), steps).view_as(blocks).flatten(1, 2)
        return torch.cat((blocks, whole(updates[paired:], steps)))

    has_heads = any(buffer is each for each in muon.momentum_buffers[:2])
    return by_pairs if hp.muon_head_pairs and has_heads else whole


def weight_decay_multiplier(progress, hp):
    """1 until HOLD, linear to LOW at RAMP, linear to HIGH at the end (WD_SCHEDULE_ENABLED, PR
    1512).
    """
    ramp = min(max(hp.wd_sched_ramp_frac, hp.wd_sched_hold_frac + 1e-6), 1.0)
    factors = (1.0, hp.wd_sched_low_factor, hp.wd_sched_high_factor)
    return float(np.interp(progress, (hp.wd_sched_hold_frac, ramp, 1.0), factors))


@torch.no_grad()
def add_snapshot(ema):
    """From the first call on the average is the plain mean of the snapshots ("tight SWA", PR
    960), in fp32.
    """
    ema.snapshots += 1
    torch._foreach_lerp_(ema.average, ema.parameters, 1 / ema.snapshots)


# ---- quantization and artifact


def hessian_aware_sigmas(w, hessian, clip_sigmas, share):
    """w (N, R, C), hessian (N, C, C) -> clips (N, R), with a share of each row's
    Hessian-weighted size (PR 1512).
    """
    importance = (w.abs() * hessian.diagonal(dim1=1, dim2=2)[:, None]).mean(2)
    return clip_sigmas * (1 + share * (importance / importance.mean(1, keepdim=True) - 1))


def written_row(model, number):
    """Documents of TRAIN_SEQ_LEN that the model writes itself at temperature 0.8, as a training
    row's
    `inputs` (B, T).

    GPTQ_SELF_CALIBRATION (PR 1512): no data is read. A row is one document, so there are no
    `cu_seqlens`.
    """
    hp, device = model.hp, model.tok_emb.device
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


def hessian_root(hessian, damp):
    """H (C, C) -> lower triangular L, H + damping = L L^T."""
    diagonal = hessian.diagonal()
    return torch.linalg.cholesky(hessian + torch.diag(damp * diagonal.mean() + (diagonal == 0)))


def weighted_gain(error, hessian, hp):
    """Error (R, C) of a matrix -> the Hessian-weighted error that a correction takes off, per
    byte (LQER_WEIGHTED).
    """
    weighted = error @ hessian_root(hessian, hp.gptq_damp)
    rows, columns = error.shape
    gram = weighted @ weighted.T if rows < columns else weighted.T @ weighted
    return torch.linalg.eigvalsh(gram)[-hp.lqer_rank :].sum().item() / (2 * rows + 4 * columns)


def table_hessians(model):
    """{saved name: identity} of the tables that are read one row at a time: every column counts
    the same.
    """
    hp, device, found = model.hp, model.tok_emb.device, {}
    if hp.bigram_vocab_size:
        found["bigram.weight"] = torch.eye(hp.bigram_dim, device=device)
    if hp.value_embed_layers:
        found["value_embed.weight"] = torch.eye(hp.value_embed_dim, device=device)
    return found


def greedy_row_order(codes):
    """codes int8 (R, C) -> order (R,) uint16: from row 0 on to the nearest row left in L1, ties to
    the
    lowest index.

    What COMPRESSOR=pergroup (PR 1855) sorts rows by.
    """
    # whole numbers, exact in fp32 up to 65,793 columns; the pair (i, j), i < j, stands at offset[i]
    # + j
    distances = torch.pdist(torch.from_numpy(codes).float(), p=1).numpy()
    index = np.arange(len(codes))
    offset = index * len(codes) - index * (index + 1) // 2 - index - 1
    order, taken = np.zeros(len(codes), np.uint16), np.zeros(len(codes), np.float32)
    for step in range(1, len(codes)):
        last = order[step - 1]
        taken[last] = np.inf  # no row is nearest to itself, whatever stands at (last, last)
        order[step] = (
            distances[offset[np.minimum(index, last)] + np.maximum(index, last)] + taken
        ).argmin()
    return order


def order_rows(arrays, sources, specs, pool):
    """Adds "orders", a greedy_row_order for each of specs, to what is packed; "codes" get their
    rows in that order.
    """
    names = [spec.name for spec in specs]
    orders = pool.map(greedy_row_order, [arrays[name] for name in names])
    sources["orders"] = dict(zip(names, orders, strict=True))
    sources["codes"] |= {name: arrays[name][order].T for name, order in sources["orders"].items()}


def restore_rows(arrays, orders):
    """Puts the rows of re-ordered arrays back. ArtifactError where an order is no permutation."""
    for name, order in orders.items():
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            raise ArtifactError(f"artifact: the row order of {name} is no permutation")
        arrays[name] = arrays[name][np.argsort(order)]


def run_lrzip(flags, data):
    """Bytes through the external lrzip: files and -o, as what it does with standard streams
    differs by version.
    """
    with tempfile.TemporaryDirectory(prefix="lrzip-") as folder:
        source, target = Path(folder, "in.lrz" if "-d" in flags else "in"), Path(folder, "out")
        source.write_bytes(data)
        command = [*"lrzip -q -f -o".split(), target, *flags, source]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, cwd=folder, timeout=900
        )
        if done.returncode != 0 or not target.exists():
            raise ArtifactError(f"lrzip ended with {done.returncode}: {done.stderr[-300:]!r}")
        return target.read_bytes()


def lrzip_decompress(data, raw_size):
    """The size that lrzip 0.6's own header claims is held to ours before anything is written to
    disk.
    """
    if (
        data[:6] == b"LRZI\x00\x06"
        and struct.unpack_from("<Q", data.ljust(14, b"\0"), 6)[0] != raw_size
    ):
        return b""
    return run_lrzip(["-d"], data)


# ---- test-time training


def evaluate_sgd(evaluator, windows_of, packer_of, learn, score_of):
    """Sliding windows; on a chunk of the stream that is scored all weights take SGD steps
    (TTT_METHOD=sgd, PR 1493).

    An Evaluator, document_windows, WindowPacker, sgd_step, Score -> as Evaluator.evaluate_bpb. A
    window belongs to the chunk in which its scored part begins; of a chunk only what was scored is
    learned from, TTT_EPOCHS times; nothing after the last one.
    """
    hp, stream, dist, model = evaluator.hp, evaluator.validation, evaluator.dist, evaluator.model
    row_tokens = -(-hp.global_ttt_chunk_tokens // dist.world_size) + hp.eval_seq_len
    entries = max(hp.row_segments, 4 * row_tokens // hp.eval_seq_len + 8)
    packer = packer_of(stream, row_tokens, hp.eval_seq_len, entries, dist.device)
    score, windows = (
        score_of(dist.device),
        windows_of(stream.starts, stream.ends, hp.eval_seq_len, hp.eval_stride),
    )
    chunk_of = windows[:, 2] // hp.global_ttt_chunk_tokens
    chunks = [windows[chunk_of == number] for number in np.unique(chunk_of)]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=hp.global_ttt_lr, momentum=hp.global_ttt_momentum
    )
    for number, chunk in enumerate(chunks):
        evaluator.add_losses(chunk, score, dist.rank, dist.world_size)
        if number + 1 < len(chunks):
            joined = chunk[1:, 2] == chunk[:-1, 1]  # windows that go on where the one before ended
            starts, ends = chunk[np.append(True, ~joined), 2], chunk[np.append(~joined, True), 1]
            pieces = windows_of(starts, ends, hp.eval_seq_len, hp.eval_seq_len)
            rate = hp.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * number / (len(chunks) - 1)))
            for _ in range(hp.ttt_epochs):
                learn(model, packer, pieces, optimizer, rate, dist)
    model.zero_grad(set_to_none=True)
    return score.total(dist, stream.targets_of(np.arange(len(stream.starts))))


# ---- test-time training with adapters


# Tokens before a hint, its least share of the cases so far, what its logit gains; keys are
# polynomials in `base`.
NGRAM = SimpleNamespace(context=15, share=0.8, boost=2.625, base=6364136223846793005)


def chunk_size(length, hp):
    """Targets of a document -> of its chunks [TTT_SHORT_CHUNKS]; also for arrays."""
    pairs = [[*map(int, pair.split(":"))] for pair in hp.ttt_short_chunks.split(",")]
    sizes = np.select(
        [length <= most for most, _ in pairs], [short for _, short in pairs], hp.ttt_chunk_size
    )
    return np.minimum(sizes, hp.ttt_chunk_size)


def with_tilt(token_losses):
    """GPT.token_losses -> the same for targets (B, C, 2) with a hint beside each, -1: none -> nats,
    and those that count: under p(a) e^(boost [a = hint]) / (1 + p(hint) (e^boost - 1)). Compiled,
    the head is computed once.
    """

    def losses_and_tilted(scored, targets, tap):
        targets, hints = targets.unbind(-1)
        losses, of_hints = (token_losses(scored, t, tap) for t in (targets, hints.clamp_min(0)))
        boost = NGRAM.boost * (hints >= 0)
        return losses, losses + torch.log1p((-of_hints).exp() * boost.expm1()) - boost * (
            hints == targets
        )

    return losses_and_tilted


def followers(keys, tokens, moments):
    """Keys (n,), the token behind each, moments that never decrease -> (n,) the token that mostly
    stood behind the same key at earlier moments, -1 where none did in NGRAM.share of all cases.
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
    first, now = run_starts(keys), run_starts(keys * NGRAM.base + moments[order]) - 1
    most, best = (first * len(keys) + earlier[order]).cummax(0)  # of each key, up to here
    most, cases = most[now] - first * len(keys) + 1, now - first + 1
    fires = (cases > 0) & (most >= NGRAM.share * cases.double())
    return torch.empty_like(index).scatter_(
        0, order, torch.where(fires, tokens[order[best[now]]], -1)
    )


def ngram_hints(tokens, starts, lengths, phases):
    """(n,) stream, (m,) first inputs of documents and their targets, plan -> (n,) hint at each
    target,
    -1: none. Token n-gram tilt (PR 2018): what mostly followed these tokens in the document so far,
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
    counts = (lengths - NGRAM.context + 1).clamp_min(0)  # targets behind a whole context
    shift = starts + NGRAM.context + counts - counts.cumsum(0)
    document, phase, shift = (
        column.repeat_interleave(counts) for column in (document, phase, shift)
    )
    moment = torch.arange(len(shift), device=tokens.device)
    at, context = shift + moment, 0
    for back in range(NGRAM.context, 0, -1):
        context = context * NGRAM.base + tokens[at - back]
    near = followers(context * NGRAM.base + document, tokens[at], moment)
    far = followers(context, tokens[at], phase)
    return torch.full_like(tokens, -1).scatter_(0, at, torch.where(near < 0, far, near))


train_gpt.techniques = train_gpt.techniques or sys.modules[__name__]
