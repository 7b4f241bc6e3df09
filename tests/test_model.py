"""The model: golden numbers, a second forward, written apart from the code, in float64, documents
apart, taps, init.
"""

import functools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN_DIR, install_parts_for, tiny_hp

import train_gpt
from presets import published
from train_gpt import BOS_ID, GPT, LORA_INPUTS, HessianTap, SlotLoRA

torch.set_num_threads(1)
OPS = train_gpt.Ops(
    train_gpt.attention_sdpa,
    train_gpt.mlp_ref,
    train_gpt.linear_cross_entropy_ref,
    names={"attention": "sdpa"},
)
PER_LAYER_SITES = ("q", "k", "v", "attn_out", "mlp_out")
LOOPED_SLOTS = [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]


def random_model(seed=0, dtype=torch.float32, **changes):
    """A tiny GPT none of whose parameters is at its initial value."""
    model = train_gpt.GPT(tiny_hp(**changes), OPS, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / p.shape[-1] ** 0.5 if name.endswith("_bank") else p + 0.3 * noise)
    return model


def random_tokens(*shape, seed=0):
    """Token ids of a random text without BOS."""
    return torch.randint(2, 97, shape, generator=torch.Generator().manual_seed(seed))


def random_documents(lengths, seed=0):
    """One row (1, T) of documents, each starting with BOS; their cu_seqlens, padded by two
    entries.
    """
    borders = np.cumsum([0, *lengths])
    tokens = random_tokens(1, borders[-1], seed=seed)
    tokens[0, borders[:-1]] = BOS_ID
    return tokens, torch.tensor([*borders, borders[-1], borders[-1]], dtype=torch.int32)


def hidden(model, tokens, cu_seqlens=None, looping=True, **keywords):
    keywords.setdefault("max_seqlen", tokens.size(1))
    with torch.no_grad():
        return model.forward_hidden(tokens, cu_seqlens, looping=looping, **keywords)


def logits_of(model, hidden_states):
    cap = model.hp.logit_softcap
    return cap * torch.tanh(hidden_states @ model.head_weight.T / cap)


# --- golden numbers: computed(looping) has the keys of model.npz, so that none can be forgotten


@functools.cache
def golden_arrays():
    with np.load(GOLDEN_DIR / "model.npz") as archive:
        return {key: torch.from_numpy(np.array(archive[key])) for key in archive}


def golden_keys():
    given = ("param/", "input/")
    with np.load(GOLDEN_DIR / "model.npz") as archive:
        return [
            key for key in archive if not key.startswith(given) and not key.endswith(("/A", "/B"))
        ]


def golden_model(arrays):
    model = GPT(tiny_hp(), OPS, torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(arrays["param/" + name])
    return model


def lora_tap(adapters, scale):
    """{site: (A (S, B, R, in), B (S, B, out, R))} -> a tap of SlotLoRA, as BatchedLoRA.tap
    makes it of flat rows.
    """
    widths = {site: b.size(-2) for site, (_, b) in adapters.items()}
    # without adapters: tiny_hp's
    widths |= {"q": 32, "k": 16, "v": 16} if len(adapters) == 1 else {}

    def slot_lora(slot, inputs, b):
        reads = [tuple(site for site in sites if site in b) for sites in inputs]
        a = [
            (sites, torch.cat([adapters[site][0][slot] for site in sites], -2).mT)
            for sites in reads
            if sites
        ]
        return SlotLoRA(a, {site: scale * adapters[site][1][slot].mT for site in b}, widths)

    def at(slot, layer):
        return slot_lora(slot, LORA_INPUTS, [site for site in PER_LAYER_SITES if site in adapters])

    return SimpleNamespace(
        at=at, head=slot_lora(0, [("lm_head",)], [site for site in adapters if site == "lm_head"])
    )


def golden_adapters(arrays, state):
    """{site: (A, B)} as lora_tap has them: the head's get a dimension for their one slot."""
    pairs = {}
    for site in (*PER_LAYER_SITES, "lm_head"):
        pair = [arrays[f"{state}/lora/{site}/{name}"].clone() for name in "AB"]
        pairs[site] = tuple((w if site != "lm_head" else w[None]).requires_grad_() for w in pair)
    return pairs


@functools.cache
def computed(state):
    """Our numbers under the keys of the golden file; `state` is "off" or "on"."""
    arrays, looping = golden_arrays(), state == "on"
    model, rows = golden_model(arrays), arrays["input/rows"]
    cu_seqlens, targets = arrays["input/cu_seqlens"], arrays["input/targets"]
    ours = {
        "logits_rows": logits_of(model, hidden(model, rows, looping=looping)),
        "logits_packed": logits_of(model, hidden(model, rows[:1], cu_seqlens, looping)),
    }
    loss = model(rows[:1], targets[0], cu_seqlens, looping, 40).mean()
    loss.backward()
    ours["loss_packed"] = loss.detach()
    ours |= {f"grad_packed/{name}": p.grad.clone() for name, p in model.named_parameters()}
    adapters = golden_adapters(arrays, state)
    tap = lora_tap(adapters, 144 / 4)
    h = model.forward_hidden(rows, max_seqlen=40, looping=looping, tap=tap)
    token_losses = model.token_losses(h, targets, tap.head)
    token_losses.sum().backward()
    ours["lora/token_losses"] = token_losses.detach()
    for site, pair in adapters.items():
        for name, w in zip("AB", pair, strict=True):
            ours[f"lora/{site}/grad_{name}"] = w.grad[0] if site == "lm_head" else w.grad
    if looping:
        tap = HessianTap()
        tap.add(("lm_head", 0), hidden(model, rows, looping=True, tap=tap))
        found = tap.hessians()
        for key, matrix in {
            "attn_in": "attn.c_v",
            "attn_proj_in": "attn.c_proj",
            "mlp_up_in": "mlp.c_fc",
            "mlp_down_in": "mlp.c_proj",
        }.items():
            ours[f"hessian/{key}"] = torch.stack(
                [found[f"blocks.{layer}.{matrix}.weight"] for layer in range(11)]
            )
        ours["hessian/final_norm_out"] = found["tok_emb.weight"]
    return {f"{state}/{key}": value for key, value in ours.items()}


def test_every_golden_number_is_compared():
    assert set(golden_keys()) == set(computed("off")) | set(computed("on"))
    assert len(golden_keys()) == 69


def golden_bound(key):
    """What fp32 promises on any CPU.

    The last bits of sums move most arrays by 1e-6 at most, two kinds by 1e-5: the gradients of
    adapters, whose scale of 36 multiplies roundings in every slot, and that of smear_lambda, one
    number that is the small sum of large ones.
    """
    return 1e-4 if re.search(r"lora/.*/grad_[AB]$|smear_lambda$", key) else 1e-5


@pytest.mark.parametrize("key", golden_keys())
def test_agrees_with_golden_number(key, rel):
    want, got = golden_arrays()[key], computed(key.split("/")[0])[key]
    assert got.shape == want.shape
    if want.norm() == 0:
        assert got.norm() == 0
    assert rel(got, want) < golden_bound(key)


def test_q_k_and_v_share_one_hessian():
    tap = HessianTap()
    hidden(random_model(), random_tokens(1, 9), tap=tap)
    found = tap.hessians()
    for layer in range(11):
        of_q, of_k, of_v = (found[f"blocks.{layer}.attn.c_{name}.weight"] for name in "qkv")
        assert torch.equal(of_q, of_k) and torch.equal(of_q, of_v)


# --- a second forward in float64, one row, one head and one position at a time


def reference_attention(h, x_in, layer, p, hp):
    """(T, D) -> (T, D): heads by hand, with rotation, XSA and whichever gate is on."""
    T, E, L, groups = len(h), hp.head_dim, hp.num_layers, hp.num_heads // hp.num_kv_heads
    q_raw, k, v = (
        h @ p["qo_bank"][layer].T,
        h @ p["kv_bank"][layer].T,
        h @ p["kv_bank"][L + layer].T,
    )
    half, heads = hp.rope_dims // 2, []

    def rotated(x):
        x = x / (x.square().mean(-1, keepdim=True) + 1.19e-7).sqrt()
        out = x.clone()
        for t in range(T):
            for i in range(half):
                angle = t * hp.rope_base ** (-2 * i / hp.rope_dims)
                out[t, i] = x[t, i] * math.cos(angle) + x[t, i + half] * math.sin(angle)
                out[t, i + half] = -x[t, i] * math.sin(angle) + x[t, i + half] * math.cos(angle)
        return out

    for head in range(hp.num_heads):
        of_head, of_group = (
            slice(head * E, (head + 1) * E),
            slice(head // groups * E, (head // groups + 1) * E),
        )
        scores = (
            p["q_gain"][layer, head]
            * rotated(q_raw[:, of_head])
            @ rotated(k[:, of_group]).T
            / math.sqrt(E)
        )
        future = torch.ones(T, T).triu(1).bool()
        y = scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, of_group]
        if layer >= L - getattr(hp, "xsa_last_n", L):
            unit = v[:, of_group] / v[:, of_group].norm(dim=-1, keepdim=True)
            y = y - (y * unit).sum(-1, keepdim=True) * unit
        window = train_gpt.GATE_WINDOW
        if getattr(hp, "sparse_attn_gate_enabled", True):
            y = (
                y
                * torch.sigmoid(
                    hp.sparse_attn_gate_scale * h[:, :window] @ p["attn_gate"][layer, head]
                )[:, None]
            )
        if getattr(hp, "gated_attn_enabled", False):
            y = y * torch.sigmoid(h @ p["attn_gate"][layer, head])[:, None]
        if getattr(hp, "attn_out_gate_enabled", False):
            source = x_in if hp.attn_out_gate_src == "block" else q_raw
            y = y * 2 * torch.sigmoid(source[:, :window] @ p["attn_gate"][layer, head])[:, None]
        heads.append(y)
    return torch.cat(heads, -1) @ p["qo_bank"][L + layer].T


def reference_embedding(tokens, p, hp):
    """(T,) ids -> (T, D): normalised x0 with SmearGate on raw embeddings."""
    raw = p["tok_emb"][tokens]
    e = raw.clone()
    for t in range(1, len(tokens)):
        if getattr(hp, "smear_gate_enabled", True) and tokens[t] != BOS_ID:
            gate = torch.sigmoid(p["smear_weight"][0] @ raw[t, : train_gpt.GATE_WINDOW])
            e[t] = raw[t] + p["smear_lambda"] * gate * raw[t - 1]
    return e / (e.square().mean(-1, keepdim=True) + 1.19e-7).sqrt()


def reference_logits(model, tokens, looping):
    """(T,) ids of one row -> (T, V) softcapped logits in float64."""
    hp, p = model.hp, {name: w.detach().double() for name, w in model.named_parameters()}
    slots = list(range(hp.num_layers))
    if looping:
        looped = slots[hp.loop_start : hp.loop_end + 1]
        slots = slots[: hp.loop_start] + (1 + hp.num_loops) * looped + slots[hp.loop_end + 1 :]

    def normed(x, layer):
        return (
            x
            / (x.square().mean(-1, keepdim=True) + 1.19e-7).sqrt()
            / (math.sqrt(layer + 1) if getattr(hp, "ln_scale", True) else 1)
        )

    def mlp(x, layer):
        u = normed(x, layer) @ p["mlp_up_bank"][layer].T
        act = torch.where(u > 0, u, hp.leaky_relu_slope * u) ** 2
        return p["mlp_scale"][layer] * (act @ p["mlp_down_bank"][layer].T)

    def attention(x, layer):
        x_in = p["resid_mix"][layer, 0] * x + p["resid_mix"][layer, 1] * x0
        return x_in, p["attn_scale"][layer] * reference_attention(
            normed(x_in, layer), x_in, layer, p, hp
        )

    x0 = reference_embedding(tokens, p, hp)
    lane0, lane1, kept = x0, None, []
    for slot, layer in enumerate(slots):
        if layer >= hp.parallel_start_layer and lane1 is None:
            lane1 = lane0
        if slot >= len(slots) // 2 and kept:
            pair = slot - len(slots) // 2
            skip = p["skip_weights"][pair] * kept.pop()
            share = (
                torch.sigmoid(p["skip_gates"][pair])
                if getattr(hp, "skip_gates_enabled", True)
                else None
            )
            lane0 = lane0 + skip if share is None else (1 - share) * skip + share * lane0
        x_in, attn = attention(lane0, layer)
        if lane1 is None:
            lane0 = x_in + attn
            lane0 = lane0 + mlp(lane0, layer)
        else:
            both, post, resid = (
                (attn, mlp(lane1, layer)),
                p["parallel_post"][layer],
                p["parallel_resid"][layer],
            )
            lane0, lane1 = (
                resid[j] * lane + post[0, j] * both[0] + post[1, j] * both[1]
                for j, lane in enumerate((lane0, lane1))
            )
        if slot < len(slots) // 2:
            kept.append(lane0)
    if lane1 is not None:
        lane0 = {"mean": (lane0 + lane1) / 2, "attn": lane0, "mlp": lane1}[
            getattr(hp, "parallel_final_lane", "mean")
        ]
    head = p["tok_emb"] if getattr(hp, "tie_embeddings", True) else p["lm_head"]
    return hp.logit_softcap * torch.tanh(normed(lane0, 0) @ head.T / hp.logit_softcap)


NO_GATE = {"sparse_attn_gate_enabled": False}
VARIANTS = {
    "looping_off": {},
    "dense_gate": NO_GATE | {"gated_attn_enabled": True},
    "output_gate_block": NO_GATE | {"attn_out_gate_enabled": True},
    "output_gate_q": NO_GATE | {"attn_out_gate_enabled": True, "attn_out_gate_src": "q"},
    "no_gate": NO_GATE,
    "gate_scale_2": {"sparse_attn_gate_scale": 2.0},
    "skips_by_addition": {"skip_gates_enabled": False},
    "untied_head": {"tie_embeddings": False},
    "final_lane_attn": {"parallel_final_lane": "attn"},
    "final_lane_mlp": {"parallel_final_lane": "mlp"},
    "lanes_from_0": {"parallel_start_layer": 0},
    "lanes_from_6": {"parallel_start_layer": 6},
    "one_lane": {"parallel_start_layer": 11},
    "no_xsa": {"xsa_last_n": 0},
    "xsa_last_3": {"xsa_last_n": 3},
    "no_ln_scale": {"ln_scale": False},
    "no_smear": {"smear_gate_enabled": False},
    "rope_all_dims": {"rope_dims": 8},
    "rope_base_100": {"rope_base": 100.0},
    "mha": {"num_kv_heads": 4},
    "one_kv_head": {"num_kv_heads": 1},
    "slope_half": {"leaky_relu_slope": 0.5},
    "softcap_3": {"logit_softcap": 3.0},
    "one_extra_loop": {"num_loops": 1},
    "loops_1_to_2": {"loop_start": 1, "loop_end": 2},
    "four_layers": {
        "num_layers": 4,
        "loop_start": 1,
        "loop_end": 2,
        "parallel_start_layer": 3,
    },
}


@functools.cache
def default_logits():
    return logits_of(random_model(), hidden(random_model(), variant_tokens()[None]))[0].detach()


def variant_tokens():
    tokens = random_tokens(14)
    tokens[[0, 6]] = BOS_ID
    return tokens


def test_default_model_equals_the_reference_forward(rel):
    assert (
        rel(default_logits(), reference_logits(random_model(), variant_tokens(), looping=True))
        < 1e-5
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_setting_equals_the_reference_forward_and_matters(variant, rel, monkeypatch):
    install_parts_for(VARIANTS[variant], monkeypatch)
    model, looping = random_model(**VARIANTS[variant]), variant != "looping_off"
    got = logits_of(model, hidden(model, variant_tokens()[None], looping=looping))[0].detach()
    assert rel(got, reference_logits(model, variant_tokens(), looping)) < 1e-5
    assert rel(got, default_logits()) > 1e-3


@pytest.mark.parametrize("looping", [False, True])
def test_training_loss_equals_evaluation_loss_in_fp32(looping, rel):
    model = random_model()
    tokens, cu_seqlens = random_documents([9, 4, 12])
    targets = random_tokens(25, seed=1)
    got = model.token_losses(hidden(model, tokens, cu_seqlens, looping), targets[None])[0]
    assert rel(model(tokens, targets, cu_seqlens, looping, 25), got) < 1e-6


# --- sizes, order of layers, skips


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 8, "mlp_mult": 3.5}], ids=["gqa", "mha"])
def test_submission_has_35945671_parameters(changes, monkeypatch):
    monkeypatch.setattr(GPT, "init_weights", lambda *_: None)
    with torch.device("meta"):
        model = GPT(train_gpt.Hyperparameters(**changes), OPS, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 35_945_671
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_loops_give_17_slots_and_none_11():
    model = GPT(tiny_hp(), OPS, torch.float32)
    assert model.slots(looping=True) == LOOPED_SLOTS and len(LOOPED_SLOTS) == 17
    assert model.slots(looping=False) == list(range(11))
    assert GPT(tiny_hp(num_loops=0), OPS, torch.float32).slots(looping=True) == list(range(11))


@pytest.mark.parametrize("looping, num_slots", [(False, 11), (True, 17)])
def test_slot_plan_gives_every_decoder_the_newest_skip_and_splits_the_lanes_once(
    looping, num_slots
):
    model, stored, pairs = random_model(parallel_start_layer=8), [], []
    plans = model.slot_plan(looping)
    for plan in plans:
        assert not (plan.stores_stream and plan.stores_merged)
        if plan.stores_stream or plan.stores_merged:  # the output of the slot before
            stored.append(plan.slot - 1)
        if plan.skip_index is not None:
            pairs.append((plan.skip_index, stored.pop(), plan.slot))
        has_lanes = plan.layer >= 8
        assert plan.return_mix != has_lanes
        assert plan.return_merged == (has_lanes or plan.stores_merged)
    half = num_slots // 2
    assert pairs == [(i, half - 1 - i, half + i) for i in range(half)] and not stored
    assert [plan.slot for plan in plans] == list(range(num_slots))
    assert [plan.layer for plan in plans if plan.splits_lanes] == [8]


@pytest.mark.parametrize("looping, used", [(False, 5), (True, 8)])
def test_skip_pairs_used(looping, used):
    """8 pairs exist; without loops the first five merge, and the last decoder pass never has a
    skip.
    """
    model = random_model()
    tokens, cu_seqlens = random_documents([20])
    model(tokens, random_tokens(20, seed=1), cu_seqlens, looping, 20).mean().backward()
    for p in (model.skip_weights, model.skip_gates):
        assert p.shape == (8, 32)
        assert (p.grad.norm(dim=1) > 0).tolist() == [True] * used + [False] * (8 - used)


# --- SmearGate


def smear_model(**changes):
    model = random_model(**changes)
    with torch.no_grad():
        model.smear_lambda.fill_(0.7)
    return model


def test_smear_gate_is_masked_at_bos_at_the_row_start_and_at_fresh():
    model, tokens = smear_model(), random_tokens(2, 12)
    tokens[0, 5] = tokens[1, 9] = BOS_ID
    fresh = torch.zeros(2, 12, dtype=torch.bool)
    fresh[0, 8] = fresh[1, 3] = True
    with torch.no_grad():
        raw = model.tok_emb[tokens]
        gate = torch.sigmoid(raw[..., :12] @ model.smear_weight[0])
        full = raw + 0.7 * gate[..., None] * raw.roll(1, dims=1)
        blocked = fresh | (tokens == BOS_ID)
        blocked[:, 0] = True
        torch.testing.assert_close(
            model.embed(tokens, fresh), torch.where(blocked[..., None], raw, full)
        )
        assert blocked.sum() == 6
        unmarked = model.embed(tokens, None)
    torch.testing.assert_close(unmarked[fresh], full[fresh])


def test_smear_gate_crosses_pieces_of_one_document_but_not_fresh_ones():
    """The only thing that a piece sees of the piece before it is the last token, through
    SmearGate.
    """
    model, tokens = smear_model(), random_tokens(1, 20)
    tokens[0, 0] = BOS_ID
    changed, pieces = tokens.clone(), torch.tensor([0, 10, 20], dtype=torch.int32)
    changed[0, 9] += 1
    fresh = torch.zeros(1, 20, dtype=torch.bool)
    fresh[0, 10] = True
    before, after = (
        hidden(model, tokens, pieces, max_seqlen=10),
        hidden(model, changed, pieces, max_seqlen=10),
    )
    assert not torch.equal(before[:, 10], after[:, 10])
    before, after = (
        hidden(model, t, pieces, max_seqlen=10, window_start=fresh) for t in (tokens, changed)
    )
    assert torch.equal(before[:, 10:], after[:, 10:])
    changed = tokens.clone()
    changed[0, 8] += 1
    assert torch.equal(
        hidden(model, tokens, pieces, max_seqlen=10)[:, 10:],
        hidden(model, changed, pieces, max_seqlen=10)[:, 10:],
    )


# --- documents apart, no look into the future


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize("changed", range(5))
def test_no_document_sees_another(changed, looping):
    lengths, model = [7, 1, 12, 3, 9], smear_model()
    tokens, cu_seqlens = random_documents(lengths)
    first, last = cu_seqlens[changed].item(), cu_seqlens[changed + 1].item()
    other = tokens.clone()
    # its BOS too: nothing of the document stays
    other[:, first:last] = 2 + (other[:, first:last] + 40) % 95
    if changed:
        # or else SmearGate would rightly take this for one document with the one before
        other[:, first] = BOS_ID
    other[:, first + 1 : last] += 1
    other.clamp_(max=96)
    before, after = (hidden(model, t, cu_seqlens, looping, max_seqlen=12) for t in (tokens, other))
    outside = torch.ones(32, dtype=torch.bool)
    outside[first:last] = False
    assert torch.equal(before[:, outside], after[:, outside])
    assert last - first == 1 or not torch.equal(before[:, first:last], after[:, first:last])


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("position", [1, 7, 8, 19, 23])
def test_a_later_token_changes_no_earlier_output(position, packed):
    model = smear_model()
    tokens, cu_seqlens = random_documents([8, 16])
    changed = tokens.clone()
    changed[0, position] = BOS_ID if tokens[0, position] != BOS_ID else 50
    before, after = (hidden(model, t, cu_seqlens if packed else None) for t in (tokens, changed))
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize("looping", [False, True])
def test_packed_documents_equal_rows_of_their_own(looping, rel):
    lengths, model = [5, 1, 11, 2, 13], smear_model()
    tokens, cu_seqlens = random_documents(lengths)
    packed = hidden(model, tokens, cu_seqlens, looping, max_seqlen=13)
    for part, document in zip(
        packed.split(lengths, dim=1), tokens.split(lengths, dim=1), strict=True
    ):
        assert rel(part, hidden(model, document, looping=looping)) < 1e-5


def test_rows_of_a_batch_are_apart():
    model, tokens = smear_model(), random_tokens(3, 10)
    changed = tokens.clone()
    changed[1] = random_tokens(10, seed=1)
    before, after = hidden(model, tokens), hidden(model, changed)
    assert torch.equal(before[::2], after[::2]) and not torch.equal(before[1], after[1])


# --- taps


def random_adapters(model, rows, zero_b=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    adapters, D, kv_dim = {}, model.hp.model_dim, model.hp.num_kv_heads * model.hp.head_dim
    widths = {
        "q": D,
        "k": kv_dim,
        "v": kv_dim,
        "attn_out": D,
        "mlp_out": D,
        "lm_head": model.hp.vocab_size,
    }
    for site, out in widths.items():
        slots = 1 if site == "lm_head" else len(model.slots(looping=True))
        a = torch.randn(slots, rows, 4, D, generator=generator)
        adapters[site] = a, torch.randn(slots, rows, out, 4, generator=generator) * (not zero_b)
    return adapters


def test_zero_lora_equals_the_plain_forward_bit_for_bit():
    model, tokens = random_model(), random_tokens(3, 10)
    adapters = random_adapters(model, rows=3, zero_b=True)
    assert set(adapters) == {*PER_LAYER_SITES, "lm_head"}
    tap, plain = lora_tap(adapters, 36.0), hidden(model, tokens)
    assert torch.equal(hidden(model, tokens, tap=tap), plain)
    assert torch.equal(
        model.token_losses(plain, tokens, tap.head), model.token_losses(plain, tokens)
    )


@pytest.mark.parametrize("site", [*PER_LAYER_SITES, "lm_head"])
def test_adapters_of_one_row_leave_the_others_alone(site):
    model, tokens = random_model(), random_tokens(3, 10)
    a, b = random_adapters(model, rows=3)[site]
    b[:, [0, 2]] = 0
    tap = lora_tap({site: (a, b)}, 1.0)
    plain = model.token_losses(hidden(model, tokens), tokens)
    tapped = model.token_losses(hidden(model, tokens, tap=tap), tokens, tap.head)
    assert torch.equal(plain[::2], tapped[::2]) and not torch.equal(plain[1], tapped[1])


def test_every_slot_has_an_adapter_of_its_own():
    model, tokens = random_model(), random_tokens(1, 10)
    a, b = random_adapters(model, rows=1)["mlp_out"]
    assert len(a) == 17
    outputs = []
    for slot in range(17):
        only = torch.zeros_like(b)
        only[slot] = b[slot]
        outputs.append(hidden(model, tokens, tap=lora_tap({"mlp_out": (a, only)}, 1.0)))
    assert all(not torch.equal(outputs[i], outputs[j]) for i in range(17) for j in range(i))


class RecordingTap:
    """Keeps every site's input."""

    def __init__(self):
        self.inputs = {}

    def at(self, slot, layer):
        def record(site, x, y, scale=None):
            self.inputs[site, slot] = x
            return y

        record.splits_mlp = True
        return record


def test_looped_hessian_counts_every_pass(rel):
    model, (tokens, cu_seqlens) = random_model(), random_documents([9, 14])
    tap, record = HessianTap(), RecordingTap()
    watched, recorded, plain = (
        hidden(model, tokens, cu_seqlens, tap=t) for t in (tap, record, None)
    )
    assert rel(watched, plain) < 1e-6 and rel(recorded, plain) < 1e-6
    found = tap.hessians()
    assert len(found) == 11 * 6
    for layer in range(11):
        passes = [slot for slot, run in enumerate(LOOPED_SLOTS) if run == layer]
        assert len(passes) == (3 if 3 <= layer <= 5 else 1)
        for site, matrix in {
            "qkv": "attn.c_q",
            "attn_proj": "attn.c_proj",
            "mlp_up": "mlp.c_fc",
            "mlp_down": "mlp.c_proj",
        }.items():
            inputs = [record.inputs[site, slot][0] for slot in passes]  # (T, in) of each pass
            want = sum(x.double().T @ x.double() for x in inputs)
            assert rel(found[f"blocks.{layer}.{matrix}.weight"], want) < 1e-5
            assert len(passes) == 1 or not torch.equal(inputs[0], inputs[1])


# --- initial values


def orthogonality(matrix):
    gram = matrix @ matrix.T if matrix.size(0) <= matrix.size(1) else matrix.T @ matrix
    return (gram - torch.eye(len(gram))).abs().max().item()


def test_input_matrices_start_orthogonal_and_output_projections_zero():
    model = GPT(tiny_hp(), OPS, torch.float32)
    for bank in (model.qo_bank[:11], model.kv_bank, model.mlp_up_bank):
        assert max(orthogonality(matrix) for matrix in bank.detach()) < 1e-5
    assert not torch.equal(model.qo_bank[0], model.qo_bank[1])
    assert not model.qo_bank[11:].any() and not model.mlp_down_bank.any()


def test_scalars_and_gates_start_as_specified():
    model = GPT(tiny_hp(qk_gain_init=4.5), OPS, torch.float32)
    values = {
        "q_gain": 4.5,
        "attn_gate": 0,
        "attn_scale": 1,
        "mlp_scale": 1,
        "skip_weights": 1,
        "skip_gates": 0,
        "parallel_post": 1,
        "parallel_resid": 1.1,
        "smear_weight": 0,
        "smear_lambda": 0,
    }
    for name, value in values.items():
        torch.testing.assert_close(
            getattr(model, name).data, torch.full_like(getattr(model, name), value)
        )
    assert (model.resid_mix[:, 0] == 1).all() and (model.resid_mix[:, 1] == 0).all()
    assert train_gpt.Hyperparameters().qk_gain_init == 5.0


def test_embeddings_and_dense_gate_start_normal_with_the_stated_deviation(monkeypatch):
    install_parts_for({"gated_attn_enabled": True}, monkeypatch)
    hp = tiny_hp(
        vocab_size=4000,
        tie_embeddings=False,
        gated_attn_enabled=True,
        **NO_GATE,
    )
    model = published.GPT(hp, OPS, torch.float32)
    for tensor, std in ((model.tok_emb, 0.005), (model.lm_head, 0.005), (model.attn_gate, 0.01)):
        spread = 5 / math.sqrt(tensor.numel())  # five standard errors
        assert tensor.std().item() == pytest.approx(std, rel=spread)
        assert abs(tensor.mean().item()) < spread * std
    assert not torch.equal(model.tok_emb, model.lm_head)


def test_init_depends_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = GPT(tiny_hp(seed=5), OPS, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (
        GPT(tiny_hp(seed=5), OPS, torch.float32),
        GPT(tiny_hp(seed=6), OPS, torch.float32),
    )
    for name, p in first.named_parameters():
        assert torch.equal(p, again.get_parameter(name))
        drawn = name in ("tok_emb", "qo_bank", "kv_bank", "mlp_up_bank")
        assert torch.equal(p, other.get_parameter(name)) == (not drawn)


def test_first_loss_is_that_of_a_uniform_guess():
    model = GPT(tiny_hp(), OPS, torch.float32)
    loss = model.token_losses(
        hidden(model, random_tokens(1, 30)), random_tokens(1, 30, seed=1)
    ).mean()
    assert loss.item() == pytest.approx(math.log(97), abs=0.05)


# --- saved weights


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}], ids=["tied", "untied"])
def test_unbank_then_rebank_is_exact(changes, monkeypatch):
    install_parts_for(changes, monkeypatch)
    model, other = random_model(seed=1, **changes), random_model(seed=2, **changes)
    train_gpt.rebank(
        other, {name: tensor.clone() for name, tensor in train_gpt.unbank(model).items()}
    )
    for name, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(name))


def test_saved_names_hold_one_matrix_each():
    model = random_model()
    state, L = train_gpt.unbank(model), 11
    assert state["tok_emb.weight"].equal(model.tok_emb.data)
    for layer in range(L):
        for name, matrix in {
            "attn.c_q": model.qo_bank[layer],
            "attn.c_proj": model.qo_bank[L + layer],
            "attn.c_k": model.kv_bank[layer],
            "attn.c_v": model.kv_bank[L + layer],
            "mlp.c_fc": model.mlp_up_bank[layer],
            "mlp.c_proj": model.mlp_down_bank[layer],
        }.items():
            assert state[f"blocks.{layer}.{name}.weight"].equal(matrix.data)
    assert sum(tensor.numel() for tensor in state.values()) == sum(
        p.numel() for p in model.parameters()
    )


def missing(state):
    del state["blocks.4.attn.c_k.weight"]


def surplus(state):
    state["blocks.4.attn.c_extra.weight"] = torch.zeros(2)


def misshapen(state):
    state["blocks.4.attn.c_k.weight"] = state["blocks.4.attn.c_k.weight"].T


@pytest.mark.parametrize(
    "damage, culprit", [(missing, "c_k"), (surplus, "c_extra"), (misshapen, "c_k")]
)
def test_rebank_refuses_another_models_weights(damage, culprit):
    model = random_model()
    state = dict(train_gpt.unbank(random_model(seed=3)))
    damage(state)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"blocks.4.attn.{culprit}.weight"):
        train_gpt.rebank(model, state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- head, precision


@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_softcap_bounds_the_loss_of_wild_logits(cap):
    model, tokens = random_model(logit_softcap=cap), random_tokens(1, 40)
    with torch.no_grad():
        model.tok_emb.mul_(100)
    h, targets = hidden(model, tokens), random_tokens(1, 40, seed=1)
    raw = F.cross_entropy((h @ model.tok_emb.T).flatten(0, 1), targets.flatten(), reduction="none")
    bound = 2 * cap + math.log(97)
    assert raw.max() > 2 * bound
    cu_seqlens = torch.tensor([0, 40], dtype=torch.int32)
    for losses in (model.token_losses(h, targets), model(tokens, targets[0], cu_seqlens, True, 40)):
        assert losses.max() <= bound * (1 + 1e-6)
        assert losses.max() > cap  # bounded, not silenced


def test_bf16_model_runs_on_the_cpu_close_to_fp32():
    """fp32 master weights, bf16 arithmetic; the evaluation's head stays fp32."""
    exact, rough = random_model(), random_model(dtype=torch.bfloat16)
    tokens, cu_seqlens = random_documents([17, 23])
    targets = random_tokens(40, seed=1)
    losses = [m(tokens, targets, cu_seqlens, True, 40) for m in (exact, rough)]
    assert hidden(rough, tokens).dtype == torch.bfloat16
    assert rough.token_losses(hidden(rough, tokens), targets[None]).dtype == torch.float32
    error = (losses[1] - losses[0]).abs().mean().item()
    assert 1e-4 < error < 0.1
    for loss in losses:
        loss.mean().backward()
    for name, p in rough.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        assert (
            F.cosine_similarity(p.grad.flatten(), exact.get_parameter(name).grad.flatten(), dim=0)
            > 0.95
        ), name
