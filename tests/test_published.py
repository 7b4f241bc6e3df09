"""presets/published.py: what the presets need beyond the default, each against a small reference that is written out
independently.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HERE, PATIENCE, tiny_hp
from evaluation_helpers import make_model, make_validation, small_hp
from run_helpers import SETTINGS, make_data
from training_helpers import trainer_of

import train_gpt
from presets import published as parts
from tools import guard
from tools.pack_code import pack_code
from tools.run_files import published_settings
from train_gpt import BOS_ID

PLAIN = small_hp(quant_only=True)  # made before any test puts other settings in place
ROOT = Path(train_gpt.__file__).parent
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("published")
EVERYTHING = {
    "attn_window": 5,
    "attn_window_full_layers": 1,
    "partial_key_offset": True,
    "bigram_vocab_size": 31,
    "bigram_dim": 6,
    "value_embed_layers": "0,2",
    "value_embed_dim": 5,
}


def tokens_of(*lengths, seed=0):
    """Documents of these lengths, BOS included, in one row (1, T) -> tokens, cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.cat((torch.tensor([BOS_ID]), torch.randint(8, 97, (n - 1,), generator=generator)))
        for n in lengths
    ]
    return torch.cat(parts)[None], torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


class Recorder:
    """A tap that keeps what the value projections gave, and an attention that keeps what it was
    given.
    """

    splits_mlp = False

    def __init__(self, model):
        self.raw, self.keys, self.values, self.windows, self.attention = (
            [],
            [],
            [],
            [],
            model.ops.attention,
        )
        self.v_width = model.hp.num_kv_heads * model.hp.head_dim
        model.ops = model.ops._replace(attention=self.attend)

    def at(self, slot, layer):
        return self

    def __call__(self, site, x, y, scale=None):
        if site == "qkv":
            self.raw.append(y[..., -self.v_width :])
        return y

    def attend(self, q, k, v, cu_seqlens, max_seqlen, window=0):
        self.keys.append(k)
        self.values.append(v)
        self.windows.append(window)
        return self.attention(q, k, v, cu_seqlens, max_seqlen, window)


# ---- settings

FIELDS = [
    field
    for field in dataclasses.fields(parts.Hyperparameters)
    if not hasattr(train_gpt.Hyperparameters, field.name) or field.name == "attn_window"
]


def test_its_settings_have_a_meaning_a_type_a_default_of_that_type_and_a_bound():
    assert len(FIELDS) == 44 and {field.name.upper() for field in FIELDS} == published_settings()
    for field in FIELDS:
        assert field.type in (int, float, bool, str) and type(field.default) is field.type
        assert len(field.metadata["help"]) > 3
        assert field.type not in (int, float) or field.metadata.get("least") is not None


VALUES = {  # of settings whose next number, or another text, is not one
    "VALUE_EMBED_LAYERS": "1,2",
    "TTT_SHORT_CHUNKS": "256:8",
    "NGRAM_TILT_ORDERS": "8,12,16",
    "VALUE_RESIDUAL": "gate",
    "TTT_METHOD": "sgd",
    "BIGRAM_VOCAB_SIZE": "2",
    "LQER_FACTOR_BITS": "5",
    "ATTN_OUT_GATE_SRC": "q",
    "PARALLEL_FINAL_LANE": "attn",
}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name.upper())
def test_the_environment_sets_every_setting(field):
    name = field.name.upper()
    if field.type is bool:
        text = str(int(not field.default))
    elif name in VALUES:
        text = VALUES[name]
    else:
        text = "0.5" if "most" in field.metadata else str(field.default + 1)
    more = {"TTT_STALE_CONTEXT": "0", "GPTQ_COLUMN_STEPS": "0", "SPARSE_ATTN_GATE_ENABLED": "0"}
    hp = train_gpt.Hyperparameters.from_env({name: text} | more)
    assert getattr(hp, field.name) != field.default
    assert f"* {name}={text}  # " in train_gpt.settings_table(hp)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"TTT_SHORT_CHUNKS": "256"}, "TTT_SHORT_CHUNKS"),
        ({"TTT_SHORT_CHUNKS": "256:0"}, "TTT_SHORT_CHUNKS"),
        ({"TTT_SHORT_CHUNKS": "256:8,"}, "TTT_SHORT_CHUNKS"),
        ({"TTT_SHORT_CHUNKS": "a:b"}, "TTT_SHORT_CHUNKS"),
        ({"NGRAM_TILT_ORDERS": "8,"}, "NGRAM_TILT_ORDERS"),
        ({"NGRAM_TILT_ORDERS": "0,8"}, "NGRAM_TILT_ORDERS"),
        ({"NGRAM_TILT_ORDERS": "8 12"}, "NGRAM_TILT_ORDERS"),
        ({"VALUE_EMBED_LAYERS": "9,11"}, "VALUE_EMBED_LAYERS"),
        ({"VALUE_EMBED_LAYERS": "9,"}, "VALUE_EMBED_LAYERS"),
        ({"BIGRAM_VOCAB_SIZE": "1"}, "BIGRAM_VOCAB_SIZE"),
        ({"GATED_ATTN_ENABLED": "1"}, "exclude each other"),
        ({"ATTN_OUT_GATE_ENABLED": "1"}, "exclude each other"),
        ({"EXTRA_EVAL_LOOPS": "1", "NUM_LOOPS": "0"}, "NUM_LOOPS"),
        ({"MUON_HEAD_PAIRS": "1", "NUM_KV_HEADS": "1"}, "MUON_HEAD_PAIRS"),
        ({"QAT_BELOW_LR": "0.1"}, "GPTQ_COLUMN_STEPS"),
        ({"TTT_METHOD": "sgd", "TTT_MAX_DOCS": "9"}, "TTT_MAX_DOCS"),
        ({"PARTIAL_KEY_OFFSET": "1"}, "TTT_STALE_CONTEXT=0"),
        ({"VALUE_RESIDUAL": "mix"}, "TTT_STALE_CONTEXT=0"),
    ],
)
def test_combinations_that_cannot_work_are_refused(changes, message):
    with pytest.raises(train_gpt.SettingError, match=message):
        train_gpt.Hyperparameters.from_env(changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"ATTN_WINDOW": "9"},
        {"VALUE_RESIDUAL": "mix", "TTT_ENABLED": "0"},
        {"VALUE_RESIDUAL": "mix", "TTT_METHOD": "sgd"},
        {"TTT_SHORT_CHUNKS": "256:8,2000:24"},
        {"NGRAM_TILT_ORDERS": "8,12,16"},
    ],
)
def test_combinations_that_work_are_taken(changes):
    train_gpt.Hyperparameters.from_env(changes)


# ---- the script


def test_the_script_runs_a_preset_by_its_name_on_several_ranks(tmp_path):
    """Under torchrun, with settings of the environment on top."""
    (tmp_path / "data").mkdir()
    make_data(tmp_path / "data")
    preset = {name: SETTINGS[name] for name in ("VOCAB_SIZE", "TOKENIZER_PATH", "OMP_NUM_THREADS")}
    environ = SETTINGS | preset | {"CASEOPS_ENABLED": "1", "TTT_STALE_CONTEXT": "0"}
    environ |= {"BIGRAM_VOCAB_SIZE": "31", "ATTN_WINDOW": "8", "ATTN_WINDOW_FULL_LAYERS": "1"}
    environ |= {"VALUE_EMBED_LAYERS": "1", "GPTQ_RESERVE_SECONDS": "0", "ITERATIONS": "3"}
    environ |= {"DATA_PATH": str(tmp_path / "data"), "RUNS_DIR": str(tmp_path), "RUN_ID": "x"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "presets" / "published.py"), "pr1512"],
        env=HERE | environ | {"PLOTS": "0"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "x" / "log.txt").read_text()
    assert "preset pr1512: " in log and "* MUON_HEAD_PAIRS=1  # " in log
    result = json.loads(log.splitlines()[-1].removeprefix("RESULT "))
    assert result["world_size"] == 2 and "sliding" in result["scores"]
    packed = (tmp_path / "x" / "train_gpt.py").stat().st_size
    assert result["code_bytes"] == packed > len(pack_code(SOURCE, {}))


@pytest.mark.parametrize("name, said", [("--help", "MUON_HEAD_PAIRS=0"), ("nosuch", "there are:")])
def test_the_script_has_its_own_help_and_refuses_an_unknown_preset(name, said):
    script = str(ROOT / "presets" / "published.py")
    done = subprocess.run(
        [sys.executable, script, name], env=HERE, capture_output=True, text=True, timeout=PATIENCE
    )
    assert said in done.stdout + done.stderr and done.returncode == (name == "nosuch")


def test_a_model_with_parts_is_not_read_without_them(tmp_path, ops):
    hp = small_hp(attn_window=5, attn_window_full_layers=1)
    model = train_gpt.GPT(hp, ops, torch.float32)
    train_gpt.save_checkpoint(tmp_path / "model.pt", model, hp)
    (problem,), _ = guard.compare_settings(tmp_path / "model.pt", PLAIN)
    assert "ATTN_WINDOW=0 (5 there)" in problem
    train_gpt.save_checkpoint(tmp_path / "model.pt", model, small_hp())
    assert guard.compare_settings(tmp_path / "model.pt", PLAIN)[0] == []


# ---- model


@pytest.mark.parametrize("residual", ["off", "mix", "gate"])
@pytest.mark.parametrize("looping", [False, True])
def test_packed_rows_fresh_windows_and_single_documents_are_one_function(residual, looping):
    """Training, calibration and evaluation pack documents, test-time training does not: all
    features, all the same.
    """
    model = make_model(small_hp(value_residual=residual, **EVERYTHING))
    tokens, cu_seqlens = tokens_of(9, 14, 1, 6)
    with torch.no_grad():
        packed = model.forward_hidden(tokens, cu_seqlens, max_seqlen=14, looping=looping)
        for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False):
            alone = model.forward_hidden(tokens[:, start:end], max_seqlen=14, looping=looping)
            torch.testing.assert_close(packed[:, start:end], alone, atol=2e-5, rtol=1e-4)
        window = tokens[:, 12:20]  # inside the second document
        fresh = torch.zeros(1, 16, dtype=torch.bool)
        fresh[0, [0, 8]] = True
        twice = model.forward_hidden(
            torch.cat((window, window), 1),
            torch.tensor([0, 8, 16]),
            max_seqlen=8,
            looping=looping,
            window_start=fresh,
        )
        alone = model.forward_hidden(window, max_seqlen=8, looping=looping)
        torch.testing.assert_close(
            twice.view(2, 8, -1), alone.expand(2, -1, -1), atol=2e-5, rtol=1e-4
        )


def test_a_later_token_changes_nothing_before_it_and_no_other_document():
    model = make_model(small_hp(value_residual="mix", **EVERYTHING))
    tokens, cu_seqlens = tokens_of(9, 14, 7)
    changed = tokens.clone()
    changed[0, 15] += 1
    with torch.no_grad():
        before, after = (
            model.forward_hidden(t, cu_seqlens, max_seqlen=14, looping=True)
            for t in (tokens, changed)
        )
    differs = (before != after).any(-1)[0]
    assert differs[15:23].all() and not differs[:15].any() and not differs[23:].any()


def test_early_layers_have_windows_and_the_last_ones_have_none():
    model = make_model(small_hp(attn_window=5, attn_window_full_layers=1))
    recorder = Recorder(model)
    model.forward_hidden(tokens_of(20)[0], max_seqlen=20, looping=True, tap=recorder)
    assert recorder.windows == [5, 5, 5, 0]  # layer 1 is looped


@pytest.mark.parametrize("rope_dims, kept", [(4, 4), (8, 4), (2, 2)])
def test_offset_keys_are_the_previous_tokens_but_for_rotary_dimensions_and_first_tokens(
    rope_dims, kept
):
    plain, shifted = (
        make_model(small_hp(rope_dims=rope_dims, partial_key_offset=on)) for on in (False, True)
    )
    tokens, cu_seqlens = tokens_of(4, 6, 1, 3)
    recorders = Recorder(plain), Recorder(shifted)
    for model, recorder in zip((plain, shifted), recorders, strict=True):
        model.forward_hidden(tokens, cu_seqlens, max_seqlen=6, looping=False, tap=recorder)
    # of layer 0, whose input is the same
    k, found = recorders[0].keys[0][0], recorders[1].keys[0][0]
    for t in range(tokens.size(1)):
        source = t if t in cu_seqlens else t - 1
        assert torch.equal(found[t, :, :kept], k[t, :, :kept]) and torch.equal(
            found[t, :, kept:], k[source, :, kept:]
        )


@pytest.mark.parametrize("residual", ["mix", "gate"])
def test_values_are_their_own_their_embeddings_and_layer_0s(residual):
    model = make_model(
        small_hp(value_residual=residual, value_embed_layers="0,2", value_embed_dim=5)
    )
    recorder, (tokens, _) = Recorder(model), tokens_of(11)
    model.forward_hidden(tokens, max_seqlen=11, looping=True, tap=recorder)
    heads = recorder.values[0].shape[2:]
    first = None
    for slot, layer in enumerate(model.slots(True)):
        v = recorder.raw[slot].clone()
        if layer in (0, 2):
            v += model.value_scales[layer] * (model.value_table[tokens] @ model.value_proj.T)
        v = v.unflatten(-1, heads)
        if slot == 0:
            first = v
        elif residual == "mix":
            v = model.value_mix[layer, 0] * first + model.value_mix[layer, 1] * v
        else:
            v = v + first / (1 + torch.exp(-model.value_mix[layer, 0]))
        torch.testing.assert_close(recorder.values[slot], v, atol=1e-5, rtol=1e-4)


def test_value_residual_begins_at_a_half_and_embeddings_at_zero_of_the_bigram():
    hp = small_hp(value_residual="mix", **EVERYTHING)
    model = train_gpt.GPT(hp, make_model(hp).ops, torch.float32)
    assert torch.equal(model.value_mix, torch.full((3, 2), 0.5)) and not model.bigram_table.any()
    assert model.bigram_scale.item() == pytest.approx(0.05) and model.bigram_proj.abs().min() > 0
    gate = train_gpt.GPT(small_hp(value_residual="gate"), model.ops, torch.float32)
    assert not gate.value_mix.any()  # sigmoid: a half as well


def test_bigram_buckets_are_the_hash_of_two_tokens_and_one_of_their_own_at_first_ones():
    model = make_model(small_hp(bigram_vocab_size=31, bigram_dim=6, smear_gate_enabled=False))
    tokens, _ = tokens_of(5, 7)
    fresh = torch.zeros_like(tokens, dtype=torch.bool)
    fresh[0, 8] = True
    found = model.embed(tokens, fresh)[0] - model.tok_emb[tokens[0]]
    for t, token in enumerate(tokens[0].tolist()):
        first = t in (0, 5, 8)
        bucket = 30 if first else (36313 * token ^ 27191 * tokens[0, t - 1].item()) % 30
        want = model.bigram_scale * (model.bigram_proj @ model.bigram_table[bucket])
        torch.testing.assert_close(found[t], want, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not os.environ.get("SOAK"), reason="half a minute each; make soak runs them")
@pytest.mark.parametrize("residual", ["mix", "gate"])
def test_all_of_it_compiles_into_whole_graphs_that_give_the_same(residual):
    """Training compiles the whole forward pass, evaluation and test-time training a layer, for
    all layers the same.
    """
    model = make_model(small_hp(value_residual=residual, **EVERYTHING))
    tokens, cu_seqlens = tokens_of(9, 14, 10)
    arguments = tokens[:, :-1], tokens[0, 1:], cu_seqlens.clamp(max=32), True, 14
    torch._dynamo.reset()
    options = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
    functions = model.forward, model.attention, model.after_attention
    compiled = [torch.compile(function, **options) for function in functions]
    gradients = []
    for forward in (model.forward, compiled[0]):
        model.zero_grad()
        forward(*arguments).mean().backward()
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    assert {"bigram_table", "bigram_scale", "value_table", "value_proj", "value_mix"} <= set(
        gradients[0]
    )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        plain = model.forward_hidden(tokens, cu_seqlens, max_seqlen=14, looping=True)
        by_layers = model.forward_hidden(
            tokens,
            cu_seqlens,
            max_seqlen=14,
            looping=True,
            compiled_parts=train_gpt.CompiledParts(model.slot_input, *compiled[1:]),
        )
    torch.testing.assert_close(by_layers, plain, atol=1e-5, rtol=1e-4)


def test_rotary_angles_do_not_depend_on_any_length():
    hps = [
        tiny_hp(micro_batch_tokens=n, train_batch_tokens=n, eval_seq_len=m)
        for n, m in ((128, 32), (4096, 4096))
    ]
    tables = [(model.cos, model.sin) for model in map(make_model, hps)]
    for short, long in zip(*tables, strict=True):
        assert torch.equal(short, long[: len(short)])
    angle = 100 * 10_000.0 ** (-2 / 4)
    assert tables[1][0][100, 0, 1].item() == pytest.approx(np.cos(angle), abs=1e-6)


@pytest.mark.parametrize("extra", [1, 2])
def test_extra_loops_leave_every_skip_between_the_layers_of_training(extra):
    hp = tiny_hp(num_layers=11, num_loops=2, loop_start=3, loop_end=5, extra_eval_loops=extra)

    def skips(model):
        merged, runs = [], []

        def after_attention(slot_input, attn, mlp_lane, *rest):
            runs.append(len(runs))
            # the stream says which slot it comes from
            return torch.full_like(slot_input.merged, len(runs) - 1.0), mlp_lane

        def slot_input(x, x0, w, return_mix, return_merged, *merge):
            if merge:
                merged.append((int(merge[1][0]), len(runs), int(merge[0][0, 0, 0])))
            return train_gpt.SlotInput(None, None, None, x)

        # a weight says which pair it is of
        model.skip_weights.data[:] = torch.arange(len(model.skip_weights))[:, None]
        parts = SimpleNamespace(
            slot_input=slot_input,
            attention=lambda *inputs: None,
            after_attention=after_attention,
        )
        model.forward_hidden(
            torch.ones(1, 3, dtype=torch.long), max_seqlen=3, looping=True, compiled_parts=parts
        )
        slots = model.slots(True)
        return slots, [(pair, to, slots[to], source, slots[source]) for pair, to, source in merged]

    model = make_model(hp)
    trained, pairs = skips(model)
    model.leave_training()
    slots, found = skips(model)
    assert slots == [0, 1, 2, *[3, 4, 5] * (3 + extra), 6, 7, 8, 9, 10] and len(trained) == 17
    late = [
        (pair, to + 3 * extra if to >= 12 else to, layer, source, of)
        for pair, to, layer, source, of in pairs
    ]
    assert found == late and len(pairs) == 8
    assert model.slots(False) == list(range(11))


# ---- optimizer


@pytest.mark.parametrize("rank, world", [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_q_and_k_are_orthogonalised_by_pairs_of_heads_and_nothing_else(rank, world):
    hp = small_hp(muon_head_pairs=True)
    names = dict(make_model(hp).named_parameters())
    banks = [names[name].double() for name in train_gpt.BANKS]
    muon = train_gpt.Muon(banks, hp, SimpleNamespace(rank=rank, world_size=world), torch.float64)
    for number, (bank, buffer) in enumerate(zip(banks, muon.momentum_buffers, strict=True)):
        shard = muon.padded(bank).chunk(world)[rank]
        orthogonalise = muon.orthogonaliser(buffer)
        found = train_gpt.muon_update(shard, buffer, 0.0, orthogonalise)
        shard = shard / shard.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        for i, (matrix, got) in enumerate(zip(shard, found, strict=True)):
            in_pairs = number < 2 and rank * len(shard) + i < 3
            parts = matrix.split(16) if in_pairs else (matrix,)  # two heads of 8 rows
            want = torch.cat([train_gpt.polar_express(part[None])[0] for part in parts])
            torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-8)


def test_tight_swa_is_the_plain_mean_of_its_snapshots(tiny_data):
    trainer = trainer_of(
        tiny_data, iterations=10, swa_below_lr=0.6, swa_every=2, min_lr=0.0, warmdown_frac=1.0
    )
    seen, step = [], trainer.optimizers.step

    def noted(progress, number):
        step(progress, number)
        if 1 - progress < 0.6 and number % 2 == 0:
            seen.append(trainer.model.tok_emb.detach().clone())

    trainer.optimizers.step = noted
    trainer.train(None)
    assert len(seen) == 2  # steps 6 and 8
    torch.testing.assert_close(trainer.model.tok_emb, torch.stack(seen).mean(0))


def on_its_grid(w, bits, sigmas):
    """The nearest point of each row's grid, in float64."""
    top = 2 ** (bits - 1) - 1
    step = (sigmas * w.double().std(-1, keepdim=True) / top).half().double()
    return (w.double() / step).round().clamp(-top, top) * step


def test_late_qat_computes_with_weights_on_the_grid_and_passes_gradients_straight_through():
    hp = small_hp(qat_below_lr=0.5, gptq_column_steps=False, matrix_bits=4)
    model, rounded = make_model(hp), make_model(hp)
    with torch.no_grad():
        for name in train_gpt.BANKS:
            bank = getattr(rounded, name)
            sigmas = hp.mlp_clip_sigmas if "mlp" in name else hp.attn_clip_sigmas
            bank.copy_(on_its_grid(bank, 4, sigmas))
    (tokens, cu_seqlens), losses = tokens_of(9, 14, 9), {}
    arguments = tokens[:, :-1], tokens[0, 1:], cu_seqlens.clamp(max=31), True, 14
    for label, m, on_grid in (
        ("qat", model, True),
        ("rounded", rounded, False),
        ("plain", model, False),
    ):
        m.zero_grad()
        m.on_grid = on_grid
        losses[label] = m(*arguments)
        losses[label].mean().backward()
        if label != "plain":
            losses[label + " grads"] = [getattr(m, name).grad.clone() for name in train_gpt.BANKS]
    torch.testing.assert_close(losses["qat"], losses["rounded"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(losses["qat"], losses["plain"], atol=1e-2)
    for a, b in zip(losses["qat grads"], losses["rounded grads"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_late_qat_runs_a_second_graph_that_the_warm_up_has_made(tiny_data):
    trainer = trainer_of(
        tiny_data,
        iterations=10,
        qat_below_lr=0.35,
        gptq_column_steps=False,
        min_lr=0.0,
        loop_end=1,
        warmdown_frac=1.0,
        num_layers=2,
        loop_start=1,
        parallel_start_layer=1,
    )
    graphs, flags = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(trainer.model.forward, fullgraph=True, backend=backend)

    def noted(*arguments, **named):
        flags.append(trainer.model.on_grid)
        return compiled(*arguments, **named)

    trainer.forward = noted
    trainer.warm_up()
    made = len(graphs)
    # looping off and on, each with and without the grid
    assert made == 4 and set(flags) == {False, True}
    flags.clear()
    trainer.train(None)
    steps = flags[:: len(flags) // 10]
    assert steps == [False] * 7 + [True] * 3 and len(graphs) == made


# ---- quantization


def test_self_calibration_samples_documents_of_the_model_and_touches_no_data(dist, monkeypatch):
    hp = small_hp(
        gptq_self_calibration=True,
        gptq_calibration_batches=2,
        train_seq_len=16,
        micro_batch_tokens=64,
    )
    model, draws, multinomial = make_model(hp), [], torch.multinomial

    def noted(p, *rest, **named):
        draws.append(p)
        return multinomial(p, *rest, **named)

    monkeypatch.setattr(torch, "multinomial", noted)
    hessians = train_gpt.collect_hessians(model, None, hp, dist)
    assert len(draws) == 2 * 15
    assert train_gpt.collect_row_gradients(model, None, hp, dist) is None
    first = parts.written_row(model, 0).inputs
    assert torch.equal(first, parts.written_row(model, 0).inputs) and first.shape == (4, 16)
    assert (first[:, 0] == BOS_ID).all() and not (first[:, 1:] == BOS_ID).any()
    with torch.no_grad():  # probabilities of the last token of the first row of documents
        hidden = model.forward_hidden(first[:, :15], max_seqlen=16, looping=True)[:, -1]
        z = 30 * torch.tanh(hidden @ model.tok_emb.T / 30) / 0.8
    z[:, BOS_ID] = -torch.inf
    torch.testing.assert_close(draws[14], z.softmax(1), atol=1e-5, rtol=1e-3)
    rows = torch.cat([parts.written_row(model, i).inputs for i in range(2)])
    final = model.forward_hidden(rows, max_seqlen=16, looping=True).flatten(0, 1).detach()
    torch.testing.assert_close(
        hessians["tok_emb.weight"], final.T @ final / 2, atol=1e-3, rtol=1e-4
    )


def test_tables_of_bigrams_and_values_are_quantized_and_come_back(dist):
    hp = small_hp(value_residual="gate", **EVERYTHING)
    model = make_model(hp)
    weights = {name: w.detach() for name, w in train_gpt.unbank(model).items()}
    eye = {name: torch.eye(w.shape[1]) for name, w in weights.items() if train_gpt.quant_role(name)}
    assert {"bigram.weight", "value_embed.weight"} <= set(eye)
    arrays = train_gpt.quantize_weights(weights, eye, hp, dist)
    again = make_model(hp, seed=5)
    train_gpt.rebank(again, train_gpt.dequantize_weights(arrays))
    for name, p in model.named_parameters():
        error = (again.get_parameter(name) - p).norm() / p.norm()
        assert error < (0.2 if "bank" in name or "table" in name or "emb" in name else 0.02), name


# ---- test-time training by SGD


SGD = {
    "ttt_method": "sgd",
    "ttt_epochs": 2,
    "global_ttt_chunk_tokens": 48,
    "global_ttt_lr": 0.05,
    "eval_seq_len": 16,
    "eval_stride": 5,
}


def sgd_reference(model, validation, hp):
    """Window by window and document by document, with plain autograd -> losses by target, in
    the stream's order.
    """
    starts, ends, losses = validation.starts, validation.ends, {}
    tokens = torch.from_numpy(validation.tokens)
    optimizer, windows = (
        torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9),
        [],
    )
    for start, end in zip(starts, ends, strict=True):
        first, at = start, start
        while first < end:
            stop = min(at + hp.eval_seq_len, end)
            windows.append((at, stop, first))
            first, at = stop, at + hp.eval_stride
    chunks = sorted({first // hp.global_ttt_chunk_tokens for _, _, first in windows})

    def loss(a, b):
        hidden = model.forward_hidden(tokens[None, a:b], max_seqlen=hp.eval_seq_len, looping=True)
        return model.token_losses(hidden[0], tokens[a + 1 : b + 1])

    for number, chunk in enumerate(chunks):
        mine = [w for w in windows if w[2] // hp.global_ttt_chunk_tokens == chunk]
        with torch.no_grad():
            for a, b, first in mine:
                losses |= dict(zip(range(first, b), loss(a, b)[first - a :].tolist(), strict=True))
        spans = []
        for _, b, first in mine:
            if spans and spans[-1][1] == first:
                spans[-1][1] = b
            else:
                spans.append([first, b])
        total = sum(b - a for a, b in spans)
        for _ in range(hp.ttt_epochs) if number < len(chunks) - 1 else ():
            optimizer.zero_grad()
            for a, b in spans:
                for at in range(a, b, hp.eval_seq_len):
                    (loss(at, min(at + hp.eval_seq_len, b)).sum() / total).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            cosine = 0.5 * (1 + np.cos(np.pi * number / (len(chunks) - 1)))
            optimizer.param_groups[0]["lr"] = hp.global_ttt_lr * cosine
            optimizer.step()
    return losses


def recorded_sgd(folder, hp, change=None):
    """Losses by target in the order of scoring, the model afterwards, RESULT's score."""
    validation = make_validation(folder, hp)
    if change is not None:
        validation.tokens[change] = 8 + (validation.tokens[change] + 1) % 80
    evaluator = train_gpt.Evaluator(make_model(hp), validation, hp, train_gpt.Dist("cpu"))
    found, row_losses, build = {}, evaluator.row_losses, evaluator.packer.build
    sources = []

    def noted_build(windows):
        sources.append(windows)
        return build(windows)

    def noted_losses(row):
        losses = row_losses(row)
        at = np.concatenate([np.arange(a, b) for a, b, _ in sources[-1]])
        for position, scored, value in zip(at, row.scored.tolist(), losses.tolist(), strict=False):
            if scored:
                assert position not in found
                found[int(position)] = value
        return losses

    evaluator.packer.build, evaluator.row_losses = noted_build, noted_losses
    return found, evaluator, parts.evaluate_sgd(evaluator)


def test_sgd_test_time_training_equals_the_reference(tmp_path):
    hp = small_hp(data_path=str(tmp_path), **SGD)
    found, evaluator, score = recorded_sgd(tmp_path, hp)
    want = sgd_reference(make_model(hp), evaluator.validation, hp)
    assert (
        sorted(found) == sorted(want)
        and score["tokens"] == len(want) == len(evaluator.validation.tokens) - 1
    )
    np.testing.assert_allclose(
        [found[i] for i in sorted(found)], [want[i] for i in sorted(want)], rtol=2e-3, atol=2e-3
    )
    plain = evaluator.validation
    evaluator = train_gpt.Evaluator(make_model(hp), plain, hp, train_gpt.Dist("cpu"))
    unadapted = parts.evaluate_sliding(evaluator)
    assert score["loss"] < unadapted["loss"] and score["bytes"] == unadapted["bytes"]


def test_sgd_test_time_training_learns_from_nothing_before_it_is_scored(tmp_path):
    hp, place = small_hp(data_path=str(tmp_path), **SGD), 200
    before, after = (recorded_sgd(tmp_path, hp, change)[0] for change in (None, place))
    order = list(before)
    assert order == list(after)
    changed = [i for i in order if before[i] != after[i]]
    # its own prediction is the first to change
    assert min(changed) == place - 1 and len(changed) > 100
    assert all(before[i] == after[i] for i in order[: order.index(place - 1)])
