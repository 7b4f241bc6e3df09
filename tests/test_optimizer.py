"""Muon, AdamW, clipping, the average and the schedules, each against golden numbers or a plain
reference of its own.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, tiny_hp
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import run_on_ranks

import presets.published
import train_gpt
from presets.published import decay_multiplier as weight_decay_multiplier
from train_gpt import Muon, Optimizers, lr_multiplier, muon_momentum, polar_express

torch.set_num_threads(1)
OPS = train_gpt.Ops(
    train_gpt.attention_sdpa,
    train_gpt.mlp_ref,
    train_gpt.linear_cross_entropy_ref,
    names={"attention": "sdpa"},
)
# banks of 3: padded on two ranks
ODD = {"num_layers": 3, "loop_start": 1, "loop_end": 1, "parallel_start_layer": 2}
steadily = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def published_hp(**changes):
    """tiny_hp with the settings of presets/published.py."""
    return presets.published.Hyperparameters(**(TINY | changes))


def random_model(seed=0, **changes):
    """A tiny GPT with a random gradient on every parameter."""
    model = train_gpt.GPT(tiny_hp(**ODD | changes), OPS, torch.float32)
    set_gradients(model, seed)
    return model


def gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(p.shape, generator=generator) for p in model.parameters()]


def set_gradients(model, seed, scale=1.0):
    for p, grad in zip(model.parameters(), gradients(model, seed, scale), strict=True):
        p.grad = grad


# --- Newton-Schulz


# The golden numbers of Muon were made in bf16, each step by about 27 roundings of at most 2^-9 that
# the small singular values amplify. Two bounds on relative errors follow:
# - in float64 our result is the same on any machine to ten digits, and so is its distance from a golden number, the
#   golden number's own error: 0.039 for polar_express, 0.045 to 0.049 for a step of Muon.
# - in bf16 the last bits of a sum differ from CPU to CPU, and a rounding that tips makes another result: by 0 on the
#   one that made the numbers, 0.004 on one without AVX-512, at most 0.022 with a random last bit in each fp32 sum and
#   0.030 with 64 times as much. Two results that share no rounding are sqrt(2) * 0.049 = 0.07 apart.
GOLDEN_ERROR = 0.05
# 15 times bf16's epsilon: sees that the 16-bit path is the same method, float64 sees the details
BF16_ERROR = 0.06


@pytest.mark.parametrize(
    "dtype, bound",
    [(torch.float64, GOLDEN_ERROR), (torch.bfloat16, BF16_ERROR)],
    ids=["fp64", "bf16"],
)
def test_polar_express_agrees_with_golden_number(dtype, bound, golden, rel):
    arrays = golden("optimizer")
    assert rel(polar_express(arrays["polar/in"].bfloat16().to(dtype)), arrays["polar/out"]) < bound


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64)], ids=["wide", "tall", "square"])
def test_polar_express_equals_a_plain_reference_in_float64(shape, rel):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert rel(polar_express(x), torch.stack([plain_polar(matrix, 5) for matrix in x])) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [(3, 48, 80), (3, 80, 48), (2, 32, 256), (2, 256, 32), (2, 64, 64)],
    ids=["wide", "tall", "very_wide", "very_tall", "square"],
)
def test_polar_express_brings_singular_values_into_its_band(shape, dtype):
    """0.84..1.15 for what was at least 0.002 of the Frobenius norm; no singular value leaves
    the band upwards.
    """
    for seed in range(4):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 1)
        out = polar_express(x.to(dtype))
        assert out.shape == x.shape and out.dtype == dtype
        start, end = torch.linalg.svdvals(x), torch.linalg.svdvals(out.float())
        assert end.max() < 1.15
        visible = (start > 0.002 * x.norm(dim=(-2, -1))[:, None]).sum(-1)
        assert all(values[:count].min() > 0.84 for values, count in zip(end, visible, strict=True))


@pytest.mark.parametrize("smallest", [0.1, 0.01])
def test_polar_express_keeps_singular_vectors(smallest):
    left, right = (
        torch.linalg.qr(torch.randn(40, 24, generator=torch.Generator().manual_seed(s)))[0]
        for s in (0, 1)
    )
    x = left * torch.logspace(0, torch.tensor(smallest).log10().item(), 24) @ right.T
    inner = left.T @ polar_express(x[None])[0] @ right
    off_diagonal = inner - inner.diag().diag()
    assert off_diagonal.abs().max() < 1e-4
    assert 0.84 < inner.diag().min() and inner.diag().max() < 1.15


def test_polar_express_is_its_own_transpose():
    x = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(polar_express(x.mT), polar_express(x).mT, atol=0, rtol=0)


def test_padding_stays_zero():
    x = torch.zeros(2, 8, 16)
    assert not polar_express(x).any()
    assert not train_gpt.muon_update(x, torch.zeros_like(x), 0.95, polar_express).any()


# --- Muon


@pytest.mark.parametrize(
    "dtype, bound",
    [(torch.float64, GOLDEN_ERROR), (torch.bfloat16, BF16_ERROR)],
    ids=["fp64", "bf16"],
)
@pytest.mark.parametrize("bank", [0, 1])
@pytest.mark.parametrize("step", range(4))
def test_muon_agrees_with_golden_number(step, bank, dtype, bound, golden, dist, rel):
    """Each step's change of a bank; in float64 this sees a wrong momentum or decay, a tighter
    test is below.
    """
    arrays, exact = golden("optimizer"), dtype == torch.float64
    banks = [
        arrays[f"bank{i}/start"].to(dtype if exact else torch.float32, copy=True) for i in range(2)
    ]
    muon = Muon(banks, train_gpt.Hyperparameters(muon_outward=1.0), dist, dtype)  # as published
    for number in range(step + 1):
        for i, p in enumerate(banks):
            p.grad = arrays[f"step{number}/grad{i}"].to(p.dtype)
        before = banks[bank].clone()
        muon.launch()
        muon.step(0.026, 0.95, 0.095, None)
    golden_before = arrays[f"step{step - 1}/bank{bank}" if step else f"bank{bank}/start"]
    assert (
        rel(
            banks[bank] - before, arrays[f"step{step}/bank{bank}"].double() - golden_before.double()
        )
        < bound
    )


def plain_polar(x, steps):
    """One matrix in float64, step by step."""
    if x.size(0) > x.size(1):
        return plain_polar(x.T, steps).T
    x = x / (x.square().sum().sqrt() + 1e-7)
    for a, b, c in [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ][:steps]:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def plain_muon(weights, gradients_by_step, rates):
    """One matrix through several steps in float64; `rates` are (lr, momentum, decay) of each
    step.
    """
    p, m = weights.double(), 0
    for grad, (lr, mu, decay) in zip(gradients_by_step, rates, strict=True):
        m = mu * m + grad.double()
        u = grad.double() + mu * m
        u = u / u.square().sum(1, keepdim=True).sqrt().clamp_min(1e-7)
        rows, columns = p.shape
        p = p - lr * decay * p
        p = p - lr * max(1, rows / columns) ** 0.5 * plain_polar(u, 5)
    return p


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize(
    "shape", [(2, 24, 40), (3, 64, 16), (2, 20, 20)], ids=["wide", "tall", "square"]
)
def test_muon_equals_a_plain_reference(shape, dtype, bound, dist, rel):
    generator = torch.Generator().manual_seed(3)
    rates = [(0.03, 0.9, 0.1), (0.02, 0.95, 0.5), (0.05, 0.8, 0.0), (0.01, 0.95, 0.2)]
    bank = torch.randn(shape, generator=generator).to(dtype)
    # unequal rows, or row normalisation could not be seen
    scales = torch.logspace(-2, 2, shape[1])[:, None]
    grads = [(torch.randn(shape, generator=generator) * scales).to(dtype) for _ in rates]
    want = torch.stack([plain_muon(w, [g[i] for g in grads], rates) for i, w in enumerate(bank)])
    hp = tiny_hp(muon_outward=1.0)
    muon, start = Muon([bank], hp, dist, dtype), bank.clone()
    for grad, (lr, momentum, decay) in zip(grads, rates, strict=True):
        bank.grad = grad
        muon.launch()
        muon.step(lr, momentum, decay, None)
    assert rel(bank - start, want - start) < bound


def test_a_step_turns_a_matrix_and_half_of_its_growth_is_kept():
    generator = torch.Generator().manual_seed(1)
    update, noise = torch.randn(2, 2, 8, 16, generator=generator)
    # the first matrix grows, as updates are subtracted
    bank = 0.3 * torch.tensor([-1.0, 1.0])[:, None, None] * update + noise
    after = bank.clone()
    train_gpt.step_matrices(after, update, 0.1, 0.05, 0.5)
    for number, factor in ((0, 0.5), (1, 1.0)):
        unit = bank[number] / bank[number].norm()
        along = (update[number] * unit).sum()
        assert along < -1 if number == 0 else along > 1
        norm = 0.95 * bank[number].norm() - 0.1 * factor * along
        torch.testing.assert_close(after[number].norm(), norm)
        free = 0.95 * bank[number] - 0.1 * (update[number] + (factor - 1) * along * unit)
        torch.testing.assert_close(after[number] / norm, free / free.norm())


def test_without_the_brake_a_step_is_decay_and_update():
    bank, update = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(0))
    after = bank.clone()
    train_gpt.step_matrices(after, update, 0.1, 0.05, 1.0)
    torch.testing.assert_close(after, 0.95 * bank - 0.1 * update)


def test_matrices_of_zeros_learn_behind_the_brake():
    bank = torch.zeros(2, 8, 16)
    update = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        train_gpt.step_matrices(bank, update, 0.1, 0.01, 0.5)
    assert (bank.norm(dim=(1, 2)) > 0.1 * update.norm(dim=(1, 2))).all()
    torch.testing.assert_close(bank / bank.norm(), -update / update.norm())


def test_muon_leaves_the_gradient_and_ignores_its_scale(dist):
    """Orthogonalisation takes the scale away: only momentum's mixture of steps can see it."""
    grad = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for scale in (1.0, 100.0):
        bank = torch.ones(2, 8, 16)
        bank.grad = grad * scale
        muon = Muon([bank], tiny_hp(), dist, torch.float32)
        muon.launch()
        muon.step(0.1, 0.9, 0.0, None)
        assert torch.equal(bank.grad, grad * scale)
        results.append(bank)
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], torch.ones(2, 8, 16))


# --- groups, AdamW


def test_every_parameter_is_in_exactly_one_group(dist, published):
    for changes in ({}, {"tie_embeddings": False}):
        model = random_model(**changes)
        optimizers = Optimizers(model, model.hp, dist)
        members = [
            *optimizers.muon.banks,
            *(p for group in optimizers.adamw.param_groups for p in group["params"]),
        ]
        assert sorted(map(id, members)) == sorted(map(id, model.parameters()))
        assert set(map(id, optimizers.replicated)) == set(map(id, members)) - set(
            map(id, optimizers.muon.banks)
        )
        assert all(
            p.dim() == 3 and "bank" in name
            for name, p in model.named_parameters()
            if any(p is bank for bank in optimizers.muon.banks)
        )


def test_adamw_groups_have_their_learning_rates_and_decays(dist, published):
    model = random_model(tie_embeddings=False, warmdown_frac=0.5, wd_schedule_enabled=True)
    hp = model.hp
    optimizers = Optimizers(model, hp, dist)
    optimizers.step(0.85, 0)
    rates = {id(p): group for group in optimizers.adamw.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if not name.endswith("_bank"):
            embedding = name in ("tok_emb", "lm_head")
            assert rates[id(p)]["lr"] == pytest.approx((0.03 if embedding else 0.02) * 0.3)
            assert rates[id(p)]["weight_decay"] == pytest.approx(
                (0.085 if embedding else 0.02) * 0.5
            )
            assert rates[id(p)]["betas"] == (0.9, 0.99) and rates[id(p)]["eps"] == 1e-8
    assert {id(p) for p in optimizers.muon.banks}.isdisjoint(rates)


def test_step_equals_plain_adamw_with_schedules_and_clears_gradients(dist, rel, published):
    model = random_model(
        warmdown_frac=0.5, wd_schedule_enabled=True, grad_clip_norm=0.0, embed_wd=2.0, adam_wd=3.0
    )
    hp, optimizers = model.hp, Optimizers(model, model.hp, dist)
    progresses = [0.1, 0.5, 0.7, 0.95]
    for name, lr, wd in (("tok_emb", hp.tied_embed_lr, 2.0), ("skip_gates", hp.scalar_lr, 3.0)):
        model = random_model(
            **{
                k: getattr(hp, k)
                for k in (
                    "warmdown_frac",
                    "wd_schedule_enabled",
                    "grad_clip_norm",
                    "embed_wd",
                    "adam_wd",
                )
            }
        )
        optimizers = Optimizers(model, hp, dist)
        p = model.get_parameter(name)
        want, first, second = p.detach().double().clone(), 0.0, 0.0
        for step, progress in enumerate(progresses):
            set_gradients(model, seed=step)
            grad = p.grad.double()
            optimizers.step(progress, step)
            assert not any(q.grad.any() for q in model.parameters())
            rate, decay = (
                lr * lr_multiplier(progress, hp),
                wd * weight_decay_multiplier(progress, hp),
            )
            first, second = 0.9 * first + 0.1 * grad, 0.99 * second + 0.01 * grad.square()
            root = (second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
            want = want - rate * decay * want - rate * first / (1 - 0.9 ** (step + 1)) / root
        assert rel(p, want) < 1e-5


def test_muon_inside_step_follows_its_schedules(dist, rel, published):
    model = random_model(
        warmdown_frac=0.5,
        wd_schedule_enabled=True,
        grad_clip_norm=0.0,
        muon_momentum_warmup_steps=2,
        muon_wd=3.0,
        muon_outward=1.0,
    )
    hp, optimizers, bank = model.hp, Optimizers(model, model.hp, dist), model.mlp_up_bank
    start, grads, rates = bank.detach().clone(), [], []
    for step, progress in enumerate([0.1, 0.6, 0.9, 1.0]):
        set_gradients(model, seed=step)
        grads.append(bank.grad.clone())
        rates.append(
            (
                0.026 * [1, 0.8, 0.2, 0.1][step],
                [0.92, 0.945, 0.97, 0.97][step],
                3.0 * weight_decay_multiplier(progress, hp),
            )
        )
        optimizers.step(progress, step)
    want = torch.stack(
        [plain_muon(start[i], [g[i] for g in grads], rates) for i in range(len(start))]
    )
    assert rel(bank - start, want - start) < 1e-4


def test_parameters_without_gradient_decay_only(dist):
    """With looping off some skip pairs get no gradient: that must neither crash nor skip their
    decay.
    """
    model = random_model()
    model.skip_weights.grad = None
    before = model.skip_weights.detach().clone()
    Optimizers(model, model.hp, dist).step(0.0, 0)
    torch.testing.assert_close(model.skip_weights.data, before * (1 - 0.02 * 0.02))


# --- clipping


def global_norm(grads):
    return sum(grad.double().square().sum() for grad in grads).sqrt().item()


def test_clip_factor_is_one_global_factor_over_banks_and_the_rest(dist):
    model = random_model()
    optimizers = Optimizers(model, model.hp, dist)
    set_gradients(model, seed=0)
    bank, scalar = model.mlp_down_bank.grad.clone(), model.q_gain.grad.clone()
    norm = global_norm([p.grad for p in model.parameters()])
    banks_alone = global_norm([p.grad for p in optimizers.muon.banks])
    assert banks_alone < 0.98 * norm  # both parts count
    optimizers.step(0.0, 0)
    torch.testing.assert_close(optimizers.muon.momentum_buffers[-1], bank * 0.3 / norm)
    torch.testing.assert_close(
        optimizers.adamw.state[model.q_gain]["exp_avg"], 0.1 * scalar * 0.3 / norm
    )


@pytest.mark.parametrize(
    "limit, scale", [(0.3, 1e-4), (0.0, 1.0)], ids=["below_the_limit", "switched_off"]
)
def test_gradients_are_not_clipped(limit, scale, dist):
    model = random_model(grad_clip_norm=limit)
    optimizers = Optimizers(model, model.hp, dist)
    set_gradients(model, 0, scale)
    bank, scalar = model.mlp_down_bank.grad.clone(), model.q_gain.grad.clone()
    assert limit == 0 or 0 < global_norm([p.grad for p in model.parameters()]) < limit
    optimizers.step(0.0, 0)
    assert torch.equal(optimizers.muon.momentum_buffers[-1], bank)
    torch.testing.assert_close(optimizers.adamw.state[model.q_gain]["exp_avg"], 0.1 * scalar)


# --- two ranks


def three_steps(dist, shares):
    """Three optimizer steps; this rank's gradients are the sum of its share of `shares` random
    ones.
    """
    model = train_gpt.GPT(tiny_hp(**ODD), OPS, torch.float32)
    optimizers, factors = Optimizers(model, model.hp, dist), []
    clip_factor = optimizers.clip_factor
    optimizers.clip_factor = lambda: factors.append(clip_factor()) or factors[-1]
    for step in range(3):
        mine = [
            gradients(model, 10 * step + share)
            for share in range(dist.rank, shares, dist.world_size)
        ]
        for p, *parts in zip(model.parameters(), *mine, strict=True):
            p.grad = sum(parts)
        optimizers.step(0.3 * step, step)
    return SimpleNamespace(
        weights={name: p.detach() for name, p in model.named_parameters()},
        factors=factors,
        buffers=optimizers.muon.momentum_buffers,
        adamw=optimizers.adamw.state_dict()["state"],
    )


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    return run_on_ranks(three_steps, 2, tmp_path_factory.mktemp("ranks"), 2)


@pytest.fixture(scope="module")
def on_one_rank():
    return three_steps(train_gpt.Dist("cpu"), 2)


def test_two_ranks_hold_the_same_weights_bit_for_bit(on_two_ranks):
    first, second = on_two_ranks
    assert all(torch.equal(p, second.weights[name]) for name, p in first.weights.items())


def test_two_ranks_equal_one_rank(on_two_ranks, on_one_rank, rel):
    start = dict(train_gpt.GPT(tiny_hp(**ODD), OPS, torch.float32).named_parameters())
    for name, p in on_one_rank.weights.items():
        assert rel(on_two_ranks[0].weights[name] - start[name].data, p - start[name].data) < 1e-4, (
            name
        )


def test_ranks_share_the_momentum_of_odd_banks(on_two_ranks, on_one_rank):
    """A bank of 3 becomes 2 + 2 with one row of zeros: each rank holds its slices only."""
    for number, whole in enumerate(on_one_rank.buffers):
        joined = torch.cat([rank.buffers[number] for rank in on_two_ranks])
        torch.testing.assert_close(joined[: len(whole)], whole)
        assert not joined[len(whole) :].any()
    assert [len(b) for b in on_one_rank.buffers] == [6, 6, 3, 3]
    assert [len(b) for b in on_two_ranks[1].buffers] == [3, 3, 2, 2]


def test_clip_factor_comes_from_the_reduced_gradient_on_every_rank(on_two_ranks, on_one_rank):
    model = train_gpt.GPT(tiny_hp(**ODD), OPS, torch.float32)
    for step in range(3):
        total = [
            a + b
            for a, b in zip(
                gradients(model, 10 * step), gradients(model, 10 * step + 1), strict=True
            )
        ]
        want = 0.3 / (global_norm(total) + 1e-6)
        assert on_one_rank.factors[step].item() == pytest.approx(want, rel=1e-5)
        assert on_two_ranks[0].factors[step].item() == pytest.approx(want, rel=1e-5)
        assert torch.equal(on_two_ranks[0].factors[step], on_two_ranks[1].factors[step])


# --- EMA


@pytest.mark.parametrize("steps, at_the_end", [(6350, 1 - 1 / 285.75), (2000, 1 - 1 / 90)])
def test_the_average_reaches_back_the_same_share_of_every_run(steps, at_the_end):
    """A run of 6,350 steps ends as the published decay does, a shorter one reaches back less."""
    ema = train_gpt.EMA(random_model(), tiny_hp(ema_span=0.045))
    decays = [ema.decay(step, step / steps) for step in range(steps)]
    assert decays[-1] == pytest.approx(at_the_end)
    assert decays[0] == 0.1 and decays[20] == 21 / 30  # the start weighs no more than its steps
    assert decays == sorted(decays)


def test_the_average_expects_the_steps_that_the_clock_lets_it_expect():
    """With seconds for a budget nobody knows the number of steps; progress tells it."""
    ema = train_gpt.EMA(random_model(), tiny_hp(ema_span=0.01))
    assert ema.decay(500, 0.25) == pytest.approx(1 - 1 / 20)  # of 2,000 steps
    assert ema.decay(1000, 0.25) == pytest.approx(1 - 1 / 40)
    assert ema.decay(3, 0.9) == 0.0  # a run of three steps ends with its last weights


def test_ema_equals_a_plain_loop(rel):
    model = random_model()
    ema = train_gpt.EMA(model, tiny_hp(ema_span=0.2))
    want = [p.detach().double().clone() for p in model.parameters()]
    for step in range(60):
        for p, change in zip(model.parameters(), gradients(model, seed=step), strict=True):
            p.data += change
        decay = min(1 - 1 / 12, (1 + step) / (10 + step))
        want = [
            decay * w + (1 - decay) * p.detach().double()
            for w, p in zip(want, model.parameters(), strict=True)
        ]
        ema.update(step, step / 60)
    for average, w in zip(ema.average, want, strict=True):
        assert average.dtype == torch.float32 and rel(average, w) < 1e-5


@pytest.mark.parametrize("first_step", [0, 2540])
def test_published_systems_have_one_decay_for_all_steps(first_step):
    """The ramp (1 + n) / (10 + n) reaches 0.9965 near step 2,561."""
    ema = presets.published.EMA(random_model(), published_hp(ema_decay=0.9965))
    for step in range(first_step, first_step + 40):
        assert ema.decay(step, 0.5) == min(0.9965, (1 + step) / (10 + step))


def test_ema_leaves_the_weights_until_it_is_copied():
    model = random_model()
    ema = train_gpt.EMA(model, tiny_hp(ema_span=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data += 1
    ema.update(100, 5.0)  # a span of two steps
    assert all(torch.equal(p, b + 1) for p, b in zip(model.parameters(), before, strict=True))
    ema.copy_to_model()
    for p, b in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.data, b + 0.5)


# --- schedules

fractions = st.floats(0, 1)
positive = st.floats(0.01, 1)


@pytest.mark.parametrize(
    "progress, want",
    [
        (0, 1),
        (0.1, 1),
        (0.15, 1),
        (0.575, 0.5),
        (0.9, 0.1 / 0.85),
        (0.915, 0.1),
        (0.95, 0.1),
        (1, 0.1),
    ],
)
def test_lr_multiplier_corners(progress, want):
    assert lr_multiplier(progress, train_gpt.Hyperparameters()) == pytest.approx(want)


@steadily
@given(fractions, fractions, positive, fractions)
def test_lr_multiplier_falls_within_its_bounds_without_jumps(a, b, warmdown, floor):
    hp = tiny_hp(warmdown_frac=warmdown, min_lr=floor)
    low, high = sorted((a, b))
    assert floor <= lr_multiplier(high, hp) <= lr_multiplier(low, hp) <= 1
    assert lr_multiplier(low, hp) - lr_multiplier(high, hp) <= (high - low) / warmdown + 1e-9
    assert lr_multiplier(0, hp) == 1 and lr_multiplier(1, hp) == floor


@pytest.mark.parametrize(
    "step, want",
    [
        (0, 0.92),
        (1, 0.92 + 0.05 / 1500),
        (750, 0.945),
        (1499, 0.97 - 0.05 / 1500),
        (1500, 0.97),
        (20_000, 0.97),
    ],
)
def test_muon_momentum_corners(step, want):
    assert muon_momentum(step, train_gpt.Hyperparameters()) == pytest.approx(want, abs=1e-9)


@steadily
@given(st.integers(0, 5000), st.integers(0, 3000), fractions, fractions)
def test_muon_momentum_stays_between_its_ends(step, warmup, start, end):
    hp = tiny_hp(
        muon_momentum_warmup_steps=warmup, muon_momentum_warmup_start=start, muon_momentum=end
    )
    assert min(start, end) - 1e-12 <= muon_momentum(step, hp) <= max(start, end) + 1e-12
    assert step < warmup or muon_momentum(step, hp) == end


@pytest.mark.parametrize(
    "progress, want",
    [(0, 1), (0.39, 1), (0.4, 1), (0.625, 0.75), (0.85, 0.5), (0.925, 1.125), (1, 1.75)],
)
def test_weight_decay_multiplier_corners(progress, want, published):
    hp = train_gpt.Hyperparameters(wd_schedule_enabled=True)
    assert weight_decay_multiplier(progress, hp) == pytest.approx(want)


@steadily
@given(fractions, fractions, fractions, st.floats(0, 3), st.floats(0, 3))
def test_weight_decay_multiplier_stays_between_its_ends(progress, hold, ramp, low, high):
    hp = published_hp(
        wd_schedule_enabled=True,
        wd_sched_hold_frac=hold,
        wd_sched_ramp_frac=ramp,
        wd_sched_low_factor=low,
        wd_sched_high_factor=high,
    )
    values = (1.0, low, high)
    assert min(values) - 1e-9 <= weight_decay_multiplier(progress, hp) <= max(values) + 1e-9
    assert progress >= hold or weight_decay_multiplier(progress, hp) == 1


@settings(steadily, max_examples=15)
@given(st.floats(0, 0.4), st.floats(0.5, 0.9), st.floats(0.1, 1))
def test_schedules_have_no_jumps(hold, ramp, warmdown):
    hp = published_hp(
        wd_schedule_enabled=True,
        wd_sched_hold_frac=hold,
        wd_sched_ramp_frac=ramp,
        warmdown_frac=warmdown,
    )
    for schedule in (weight_decay_multiplier, lr_multiplier):
        values = [schedule(n / 2000, hp) for n in range(2001)]
        jumps = [abs(b - a) for a, b in itertools.pairwise(values)]
        # the steepest rise goes from 0.5 to 1.75 within a tenth of the run
        assert max(jumps) < 13 / 2000


@pytest.mark.parametrize(
    "progress, on", [(0, False), (0.3499, False), (0.35, True), (0.5, True), (1, True)]
)
def test_looping_starts_at_its_fraction_and_stays(progress, on):
    assert train_gpt.loop_is_on(progress, train_gpt.Hyperparameters()) == on
    assert not train_gpt.loop_is_on(progress, train_gpt.Hyperparameters(num_loops=0))
    assert train_gpt.loop_is_on(progress, train_gpt.Hyperparameters(enable_looping_at=0.0))


def test_pieces_are_half_as_long_before_their_fraction():
    fractions = (0, 0.2499, 0.25, 1)
    for full, half in ((1500, 750), (3, 2), (2, 2)):
        hp = train_gpt.Hyperparameters(full_seq_len_at=0.25, train_seq_len=full)
        assert [train_gpt.seq_len_at(at, hp) for at in fractions] == [half, half, full, full]
    never = train_gpt.Hyperparameters(full_seq_len_at=0)
    assert train_gpt.seq_len_at(0.0, never) == 2048
