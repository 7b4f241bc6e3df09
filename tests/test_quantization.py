"""Quantisation: GPTQ, scales, the table of roles, sharing over ranks, and rebuilding the weights."""

import re
import time
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import write_documents
from evaluation_helpers import make_model, small_hp
from quantization_helpers import (
    array_of,
    correlated_hessian,
    on_ranks,
    quantize_alone,
    read_golden,
    rebuilt_by_gptq,
    settings,
    small_model,
)

import train_gpt

GPTQ_CASES = {"int6_k12.85": (6, 12.85), "int7_k14.0": (7, 14.0), "int4_k3.0": (4, 3.0)}


@pytest.fixture(scope="module")
def golden():
    return read_golden()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(20)


def same_arrays(a, b):
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes()
        for k in a
    )


def gptq(w, hessian, bits, clip_sigmas, damp, block, names=None, octaves=None):
    """The tensors of gptq_quantize for a batch, or for one matrix; no column steps without octaves."""
    if w.ndim == 2:
        found = gptq(w[None], hessian[None], bits, clip_sigmas, damp, block, names, octaves)
        return [part[0] for part in found]
    names = names or [f"matrix {i}" for i in range(len(w))]
    with mock.patch.object(train_gpt, "GPTQ_BLOCK", block):
        found = train_gpt.gptq_quantize(w, hessian, bits, clip_sigmas, damp, names, octaves)
    return [part for part in found if part is not None]


def seen_by_gptq(names, weights, hessians, hp):
    """The weights that GPTQ with column steps took its codes for, one matrix at a time."""
    for name in names:
        role = train_gpt.quant_role(name)
        bits, clip_sigmas = getattr(hp, role.bits), getattr(hp, role.clip_sigmas)
        w, hessian = weights[name][None], hessians[name][None]
        octaves = hp.gptq_column_octaves
        found = train_gpt.gptq_quantize(
            w, hessian, bits, clip_sigmas, hp.gptq_damp, [name], octaves
        )
        yield rebuilt_by_gptq(found)[0]


def weighted_error(w, codes, scale, hessian):
    error = w - codes * scale.float()[:, None]
    return ((error @ hessian) * error).sum().item()


def assert_equal_up_to_ties(codes, scale, want_codes, want_scale, w, hessian):
    """Codes of one matrix: the same row for row, but that one row in sixteen may have met a tie,
    and
    as good in sum.

    A number half-way between two codes goes to either by the last bit of a sum, which depends on
    the CPU and the shape of a batch. GPTQ then spreads another error over the columns that follow,
    but never over other rows. So is a scale half-way between two numbers of 16 bits.
    """
    torch.testing.assert_close(scale, want_scale, atol=0, rtol=2**-10)
    others = (codes != want_codes).any(dim=1) | (scale != want_scale)
    assert others.sum() <= max(1, len(codes) // 16), f"{others.sum()} of {len(codes)} rows differ"
    error, want = (
        weighted_error(w, c, s, hessian) for c, s in ((codes, scale), (want_codes, want_scale))
    )
    assert not others.any() or error == pytest.approx(want, rel=0.05)


# --- golden numbers


@pytest.mark.parametrize("case", GPTQ_CASES)
def test_gptq_equals_golden_codes_and_scales(golden, case):
    bits, clip_sigmas = GPTQ_CASES[case]
    codes, scale = gptq(golden["gptq/W"], golden["gptq/H"], bits, clip_sigmas, 0.01, 32)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float16
    want = golden[f"gptq/{case}/codes"], golden[f"gptq/{case}/scale"]
    assert_equal_up_to_ties(codes, scale, *want, golden["gptq/W"], golden["gptq/H"])


def test_gptq_in_blocks_of_another_size_finds_golden_codes(golden):
    for block_size in (1, 7, 96, 128):
        codes, scale = gptq(golden["gptq/W"], golden["gptq/H"], 6, 12.85, 0.01, block_size)
        want = golden["gptq/int6_k12.85/codes"], golden["gptq/int6_k12.85/scale"]
        assert_equal_up_to_ties(codes, scale, *want, golden["gptq/W"], golden["gptq/H"])


def test_gate_rows_equal_golden(golden):
    fields = train_gpt.quantize_small("attn_gate", golden["gate/W"])
    assert torch.equal(fields["codes"], golden["gate/codes"]) and torch.equal(
        fields["scale"], golden["gate/scale"]
    )


# --- GPTQ


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits,clip_sigmas", [(6, 12.85), (4, 3.0)])
def test_gptq_beats_rounding_in_hessian_weighted_error(seed, bits, clip_sigmas):
    w, hessian = torch.randn(40, 72) * torch.rand(40, 1), correlated_hessian(72, seed=seed)
    codes, scale = gptq(w, hessian, bits, clip_sigmas, 0.01, 16)
    q_max = 2 ** (bits - 1) - 1
    rounded = (w / scale.float()[:, None]).round().clamp(-q_max, q_max)
    ratio = weighted_error(w, codes, scale, hessian) / weighted_error(w, rounded, scale, hessian)
    assert ratio < 0.8


def test_gptq_with_diagonal_hessian_is_rounding():
    w = torch.randn(8, 24)
    codes, scale = gptq(w, torch.diag(torch.rand(24) + 0.5), 6, 12.85, 0.01, 8)
    assert torch.equal(codes.float(), (w / scale.float()[:, None]).round().clamp(-31, 31))


@pytest.mark.parametrize("columns", [1, 2, 33, 128])
def test_reversed_cholesky_equals_inverse_then_cholesky(columns):
    h = correlated_hessian(columns).double() + 0.1 * torch.eye(columns, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    upper = train_gpt.inverse_cholesky_upper(h)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(
        upper.mT @ upper @ h, torch.eye(columns, dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_inverse_cholesky_marks_only_the_indefinite_matrix():
    h = torch.stack([torch.eye(4), -torch.eye(4)])
    upper = train_gpt.inverse_cholesky_upper(h)
    assert torch.equal(upper[0], torch.eye(4)) and not upper[1].isfinite().all()


def test_dead_columns_get_code_zero_and_change_no_other_column():
    w, hessian = torch.randn(12, 30), correlated_hessian(30)
    dead, alive = [3, 17], [i for i in range(30) if i not in (3, 17)]
    hessian[dead], hessian[:, dead] = 0, 0
    codes, scale = gptq(w, hessian, 6, 12.85, 0.01, 8)
    assert (codes[:, dead] == 0).all() and (codes[:, alive] != 0).any()
    want = (12.85 * w.std(dim=1) / 31).half()
    # of the original row, dead columns included
    torch.testing.assert_close(scale, want, atol=0, rtol=2**-10)
    moved = w.clone()
    moved[:, dead] = moved[:, dead[::-1]]  # the rows keep their standard deviation up to rounding
    again = gptq(moved, hessian, 6, 12.85, 0.01, 8)
    assert_equal_up_to_ties(codes, scale, *again, w, hessian)


def test_hessian_of_zeros_is_no_error():
    codes, scale = gptq(torch.randn(4, 8), torch.zeros(8, 8), 6, 12.85, 0.01, 4)
    assert (codes == 0).all() and scale.isfinite().all()


def test_zero_and_tiny_rows_have_finite_scales_and_no_nan():
    w = torch.randn(4, 16)
    w[1], w[2] = 0, w[2] * 1e-12
    codes, scale = gptq(w, correlated_hessian(16), 6, 12.85, 0.01, 8)
    assert (scale > 0).all() and scale.isfinite().all()
    assert (codes[1:3] == 0).all() and (codes[0] != 0).any()
    gate_codes, gate_scale = train_gpt.quantize_rows(w, -127, 127, 127)
    assert (
        (gate_scale > 0).all() and (gate_codes[1] == 0).all() and gate_codes[0].abs().max() == 127
    )


def test_huge_rows_do_not_overflow_the_scale():
    _, scale = gptq(torch.randn(2, 8) * 1e7, torch.eye(8), 6, 12.85, 0.01, 8)
    assert scale.isfinite().all()


def test_damping_is_retried_on_an_indefinite_hessian_and_reported():
    w, hessian = torch.randn(2, 8, 16), torch.stack([correlated_hessian(16), torch.eye(16)])
    # smallest eigenvalue -0.05: damping 0.01 fails, 0.1 does
    hessian[1, 0, 1] = hessian[1, 1, 0] = 1.05
    with pytest.warns(UserWarning, match="retry 1: bad$"):
        codes, scale = gptq(w, hessian, 6, 12.85, 0.01, 8, names=["good", "bad"])
    for i, damp in enumerate((0.01, 0.1)):
        alone = gptq(w[i], hessian[i], 6, 12.85, damp, 8)
        assert_equal_up_to_ties(codes[i], scale[i], *alone, w[i], hessian[i])


@pytest.mark.filterwarnings("ignore:GPTQ")
@pytest.mark.parametrize("hessian", [-torch.eye(16), torch.full((16, 16), float("nan"))])
def test_hopeless_hessian_is_an_error_with_the_name_of_the_matrix(hessian):
    with pytest.raises(ValueError, match="some.weight"):
        gptq(torch.randn(8, 16), hessian, 6, 12.85, 0.01, 8, names=["some.weight"])


def test_batched_gptq_equals_one_by_one():
    w, hessian = (
        torch.randn(5, 24, 40),
        torch.stack([correlated_hessian(40, seed=i) for i in range(5)]),
    )
    codes, scale = gptq(w, hessian, 5, 6.0, 0.01, 16)
    for i in range(5):
        alone = gptq(w[i], hessian[i], 5, 6.0, 0.01, 16)
        assert_equal_up_to_ties(codes[i], scale[i], *alone, w[i], hessian[i])


def test_gptq_leaves_its_inputs_alone():
    w, hessian = torch.randn(8, 16), correlated_hessian(16)
    hessian[2], hessian[:, 2] = 0, 0
    kept = w.clone(), hessian.clone()
    gptq(w, hessian, 6, 12.85, 0.01, 8)
    assert torch.equal(w, kept[0]) and torch.equal(hessian, kept[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gptq_on_the_device_agrees_with_the_cpu():
    w, hessian = (
        torch.randn(3, 64, 128),
        torch.stack([correlated_hessian(128, seed=i) for i in range(3)]),
    )
    codes, scale = gptq(w, hessian, 6, 12.85, 0.01, 32)
    on_device, device_scale = gptq(w.cuda(), hessian.cuda(), 6, 12.85, 0.01, 32)
    assert (on_device.cpu() != codes).float().mean() < 5e-3
    assert (device_scale.cpu() != scale).float().mean() < 0.02


# --- steps per row and column, rate-aware rounding


def test_column_steps_lower_the_weighted_error_at_equal_bits():
    w, hessian = torch.randn(256, 64), correlated_hessian(64)
    codes, scale = gptq(w, hessian, 6, 11.5, 0.01, 32)
    plain_bits = codes.float().var(dim=0).add(1 / 12).log2().mean().item() / 2
    codes, rows, columns = gptq(w, hessian, 6, 11.5, 0.01, 32, octaves=2.0)
    error = w - codes * ((rows.float()[:, None] + columns) / 8).exp2()
    # of a Gaussian with each column's deviation
    bits = codes.float().var(dim=0).add(1 / 12).log2().mean().item() / 2
    plain_error = weighted_error(w, *gptq(w, hessian, 6, 11.5, 0.01, 32), hessian)
    assert (
        abs(bits - plain_bits) < 0.02
        and ((error @ hessian) * error).sum().item() < 0.9 * plain_error
    )


def test_a_shaped_code_costs_no_clipping_and_dead_columns_stay_finite():
    w, hessian = torch.randn(16, 32), correlated_hessian(32)
    hessian[3], hessian[:, 3] = 0, 0
    w[5] = 0
    codes, rows, columns = gptq(w, hessian, 6, 0.5, 0.01, 32, octaves=2.0)
    assert (
        codes.abs().max() > 31
        and codes.dtype == torch.int16
        and rows.dtype == columns.dtype == torch.int8
    )
    assert (codes[5] == 0).all() and (codes[:, 3] == 0).all()


def uneven_inputs(columns, seed):
    """Hessians of calibration and of validation inputs.

    Conditional variances span 2^12, as in the last norm's output.

    Three columns carry most of the energy. A twentieth of the validation inputs uses all columns
    alike.
    """
    generator = torch.Generator().manual_seed(seed)
    variances = 2.0 ** (2 * torch.rand(columns, generator=generator))
    variances[:3] = torch.tensor([2.0**12, 2.0**10, 2.0**9])
    variances[3] = 1.0
    mix = torch.eye(columns) + 0.02 * torch.randn(columns, columns, generator=generator).tril(-1)
    mix[3:, :3] = 0.0  # or the other columns would tell what these hold
    calibration = (mix * variances) @ mix.T
    other = calibration.diagonal().mean() * torch.eye(columns)
    return calibration, 0.95 * calibration + 0.05 * other


def validation_error_at_equal_bits(octaves, seed):
    """Weighted error of an embedding of 8 bits on validation inputs, its bits a code taken off
    at 6 dB a bit.
    """
    w = torch.randn(512, 256, generator=torch.Generator().manual_seed(seed))
    calibration, validation = uneven_inputs(256, seed)
    codes, rows, *columns = gptq(w, calibration, 8, 15.0, 0.01, 64, octaves=octaves)
    step = (
        rows.float()[:, None]
        if octaves is None
        else ((rows.float()[:, None] + columns[0]) / 8).exp2()
    )
    error = w - codes * step
    bits = codes.float().var(dim=0).add(1 / 12).log2().mean().item() / 2
    return ((error @ validation) * error).sum().item() * 4**bits


@pytest.mark.parametrize("seed", range(3))
def test_column_steps_hold_on_inputs_that_differ_from_the_calibration(seed, monkeypatch):
    """int8 codes with steps in full proportion to the deviation, the rule before, lose to equal
    steps; ours win.
    """
    plain = validation_error_at_equal_bits(None, seed)
    ours = validation_error_at_equal_bits(2.0, seed)
    monkeypatch.setattr(train_gpt, "MAX_WIDE_CODE", 127)
    before = validation_error_at_equal_bits(100.0, seed)
    assert before > 1.5 * plain and ours < 0.8 * plain


@pytest.mark.parametrize("octaves", [2.0, 7.0, 100.0])
def test_wide_codes_are_stored_in_two_parts_that_give_the_same_weights(octaves):
    weights = {"tok_emb.weight": torch.randn(8192, 64)}
    hessians = {"tok_emb.weight": uneven_inputs(64, seed=0)[0]}
    hp = settings(
        gptq_column_steps=True,
        gptq_column_octaves=octaves,
        gptq_damp=1e-6,
        embed_bits=8,
        embed_clip_sigmas=15.0,
    )
    arrays = quantize_alone(weights, hessians, hp)
    fine = {key.rpartition(":")[2]: array for key, array in arrays.items()}
    assert fine["codes"].dtype == fine["fine_codes"].dtype == np.int8 and set(
        fine["fine_columns"]
    ) <= {0, 1, 2}
    assert np.abs(fine["fine_codes"].astype(int)).max() <= 2 ** fine["fine_shift"].max() // 2
    assert fine["codes"][:, fine["fine_columns"]].std() < 4 * fine["codes"][:, 5].std()
    assert fine["fine_shift"].min() >= 1
    rebuilt = train_gpt.dequantize_weights(
        train_gpt.unpack_weights(train_gpt.pack_weights(arrays, "entropy"))
    )
    (seen,) = seen_by_gptq(["tok_emb.weight"], weights, hessians, hp)
    assert torch.allclose(seen, rebuilt["tok_emb.weight"], atol=1e-6)
    error = weights["tok_emb.weight"] - seen
    assert error[:, 0].std() < 0.1  # no code is cut off


def test_rebuilding_refuses_fine_codes_that_do_not_fit():
    arrays = {
        "codes": np.zeros((4, 3), np.int8),
        "scale": np.full(4, -127, np.int8),
        "column_steps": np.full(3, -127, np.int8),
        "fine_codes": np.ones((4, 1), np.int8),
        "fine_columns": np.array([2], np.int16),
        "fine_shift": np.array([7], np.int8),
    }

    def rebuild(**changes):
        named = {f"tok_emb.weight:{field}": array for field, array in (arrays | changes).items()}
        return train_gpt.dequantize_weights(named)["tok_emb.weight"]

    # a step below the table's smallest is the smallest
    assert rebuild()[:, 2].tolist() == [2.0**-32] * 4
    for changes in (
        {"fine_columns": np.array([3], np.int16)},
        {"fine_columns": np.array([-1], np.int16)},
        {"fine_codes": np.ones((5, 1), np.int8)},
        {"fine_shift": np.array([7, 7], np.int8)},
        {"fine_columns": None},
        {"fine_columns": np.array([[2]], np.int16)},
        {
            "fine_columns": np.array([2, 2], np.int16),
            "fine_shift": np.array([7, 7], np.int8),
            "fine_codes": np.ones((4, 2), np.int8),
        },
    ):
        broken = {name: array for name, array in (arrays | changes).items() if array is not None}
        with pytest.raises(ValueError, match="tok_emb.weight: (fine codes|no weight)"):
            train_gpt.dequantize_weights(
                {f"tok_emb.weight:{field}": array for field, array in broken.items()}
            )


def test_shaped_weights_are_rebuilt_as_gptq_saw_them():
    weights, hessians = small_model()
    hp = settings(gptq_column_steps=True)
    arrays = quantize_alone(weights, hessians, hp)
    rebuilt = train_gpt.dequantize_weights(
        train_gpt.unpack_weights(train_gpt.pack_weights(arrays, "entropy"))
    )
    for name, seen in zip(hessians, seen_by_gptq(hessians, weights, hessians, hp), strict=True):
        assert arrays[f"{name}:scale"].dtype == arrays[f"{name}:column_steps"].dtype == np.int8
        assert torch.allclose(seen, rebuilt[name], rtol=1e-5, atol=1e-7)


def test_steps_are_the_same_on_every_machine():
    for number in range(-254, 255):  # a power that is an ulp off must not round to another float32
        power = 2.0 ** (number / 8)
        assert (
            np.float32(power * (1 - 1e-14))
            == np.float32(power * (1 + 1e-14))
            == train_gpt.EXP2_EIGHTHS[number]
        )


def test_column_steps_of_a_matrix_do_not_depend_on_its_batch():
    """Each is centred by its own mean: another matrix has inputs a thousand times as large."""
    upper = torch.rand(2, 8, 8).triu() + torch.eye(8)
    upper[1] /= 1000
    rows = torch.full((2, 4), 0.5)
    _, together = train_gpt.column_step_grid(upper, rows, 2.0)
    for number in range(2):
        _, alone = train_gpt.column_step_grid(upper[number][None], rows[:1], 2.0)
        assert torch.equal(together[number], alone[0])
        assert abs(alone.float().mean()) < 8


def test_column_steps_of_opposite_deviations_are_within_the_octaves():
    upper = torch.diag_embed(2.0 ** torch.tensor([[-5.0, -1.0, 0.0, 1.0, 5.0]]))
    rows, columns = train_gpt.column_step_grid(upper, torch.tensor([[0.25]]), 2.0)
    assert rows.tolist() == [[-16]] and columns.tolist() == [[-16, -8, 0, 8, 16]]


def test_a_code_of_128_is_wide():
    codes = torch.tensor([[127, 128, -128], [-127, 0, 5]], dtype=torch.int16)
    fields = train_gpt.split_wide_codes(codes, torch.zeros(3, dtype=torch.int8))
    assert fields["fine_columns"].tolist() == [1, 2]
    fields = {name: field.numpy().astype(np.float32) for name, field in fields.items()}
    joined, steps = train_gpt.join_wide_codes("any.weight", fields)
    assert joined.tolist() == codes.tolist() and not steps.any()


# --- steps of rows by importance


def random_gradients(weights, names, octaves=2.0):
    """{name: mean squared gradients of rows}, their roots spread by so many octaves (deviation)."""
    return {name: 4.0 ** (octaves * torch.randn(len(weights[name])) - 6) for name in names}


def shifted_by(row_gradients, **changes):
    """Weights of the tiny model by SDClip's steps, then by those with a power -> row codes of both.

    {name: (codes before, codes after)}, whole numbers of eighths of octaves.
    """
    weights, hessians = small_model()
    hp = settings(gptq_column_steps=True)
    before = quantize_alone(weights, hessians, hp)
    hp = settings(gptq_column_steps=True, **changes)
    after = quantize_alone(weights, hessians, hp, row_gradients(weights, hessians))
    return {
        name: tuple(arrays[f"{name}:scale"].astype(int) for arrays in (before, after))
        for name in hessians
    }


@pytest.mark.parametrize(
    "changes", [{"gptq_row_power": 0.0}, {"gptq_row_power": 0.5, "gptq_column_steps": False}]
)
def test_without_a_power_or_column_steps_gradients_change_nothing(changes):
    """Steps of rows alone clip codes: finer ones would lose the large weights."""
    weights, hessians = small_model()
    gradients = random_gradients(weights, hessians)
    columns = {"gptq_column_steps": True}
    before = quantize_alone(
        weights, hessians, settings(**columns | changes | {"gptq_row_power": 0.0})
    )
    after = quantize_alone(weights, hessians, settings(**columns | changes), gradients)
    assert same_arrays(before, after)
    moved = quantize_alone(weights, hessians, settings(**columns, gptq_row_power=0.5), gradients)
    assert not same_arrays(before, moved)


def test_the_whole_power_has_steps_in_proportion_to_the_inverse_root_of_gradients():
    """Whatever the deviation of a row: those of the embedding span 2^8 here."""
    eighths = {}

    def gradients(weights, names):
        weights["tok_emb.weight"] *= 2.0 ** torch.linspace(-4, 4, 97)[:, None]
        found = {}
        for name in names:
            eighths[name] = torch.randint(-24, 25, (len(weights[name]),))
            found[name] = 4.0 ** (eighths[name] / 8 - 7)
        return found

    weights, hessians = small_model()
    hp = settings(gptq_column_steps=True, gptq_row_power=1.0, gptq_row_octaves=100.0)
    arrays = quantize_alone(weights, hessians, hp, gradients(weights, hessians))
    for name, wanted in eighths.items():
        sums = arrays[f"{name}:scale"] + wanted.numpy()
        assert (sums == sums[0]).all(), name


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_a_power_moves_steps_by_its_share_and_leaves_the_median_row(power):
    found = {}

    def gradients(weights, names):
        found.update(
            {name: (weights[name], g) for name, g in random_gradients(weights, names).items()}
        )
        return {name: g for name, (_, g) in found.items()}

    codes = shifted_by(gradients, gptq_row_power=power, gptq_row_octaves=100.0)
    for name, (before, after) in codes.items():
        w, gradient = found[name]
        costs = (w.std(dim=1) * gradient.sqrt()).log2()
        wanted = -8 * power * (costs - costs.quantile(0.5)).numpy()
        assert np.abs(after - before - wanted).max() < 1.05, name  # both codes are rounded
        assert abs(np.median(after - before)) <= 1


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_steps_of_rows_move_by_no_more_than_the_octaves(power):
    def gradients(weights, names):
        found = {name: torch.full((len(weights[name]),), 1e-8) for name in names}
        for g in found.values():
            g[0], g[1] = 1e-25, 1e20
        return found

    for before, after in shifted_by(gradients, gptq_row_power=power, gptq_row_octaves=1.5).values():
        assert (after - before)[:2].tolist() == [12, -12]
        assert np.abs(after - before)[2:].max() < 12


def test_rows_without_a_gradient_or_a_weight_stay_finite_and_are_decoded():
    weights, hessians = small_model()
    gradients = random_gradients(weights, hessians)
    name = "blocks.0.mlp.c_fc.weight"
    gradients[name][:5] = 0
    weights[name][3:8] = 0
    gradients["blocks.1.mlp.c_fc.weight"].zero_()
    hp = settings(gptq_column_steps=True, gptq_row_power=1.0, gptq_row_octaves=0.5)
    rebuilt = train_gpt.dequantize_weights(quantize_alone(weights, hessians, hp, gradients))
    for other, w in weights.items():
        assert rebuilt[other].isfinite().all()
        assert (rebuilt[other] - w).norm() <= 0.4 * w.norm(), other
    assert not rebuilt[name][3:8].any() and rebuilt[name][:3].any()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_steps_by_importance_lower_the_loss_that_quantization_adds_at_equal_bits(power):
    """Of a quadratic loss with curvature G_r H for row r, and with G_r not far from equal."""
    w, hessian = torch.randn(1, 512, 64) * 2.0 ** torch.randn(512, 1), correlated_hessian(64)
    gradients = 4.0 ** torch.randn(1, 512)
    errors = []
    for factors in (
        1.0,
        train_gpt.row_step_factors(
            w, gradients, settings(gptq_row_power=power, gptq_row_octaves=100.0)
        ),
    ):
        found = train_gpt.gptq_quantize(w, hessian[None], 6, 11.5 * factors, 0.01, ["w"], 2.0)
        error = w - rebuilt_by_gptq(found)
        bits = found.codes.float().var(dim=2).add(1 / 12).log2().mean().item() / 2
        cost = gradients * ((error @ hessian) * error).sum(dim=2)
        errors.append(cost.sum().item() * 4**bits)
    assert errors[1] < (0.7 if power == 0.5 else 0.5) * errors[0]


# --- calibration


def calibrated(folder, dist, **changes):
    """Hessians from two rows of documents -> them, and the mean of x x^T of what the head reads."""
    write_documents(folder, "train", [20, 28, 9, 31, 14, 25, 30, 17, 11] * 8, seed=5)
    hp = small_hp(data_path=str(folder), gptq_calibration_batches=2, **changes)
    model = make_model(hp)
    loader = train_gpt.TrainLoader(train_gpt.TokenStream(hp.data_path, "train"), hp, dist)
    found = train_gpt.collect_hessians(model, loader, hp, dist)
    total = torch.zeros(hp.model_dim, hp.model_dim)
    with torch.no_grad():
        for row in (loader.row(0), loader.row(1)):
            (x,) = model.forward_hidden(
                row.inputs, row.cu_seqlens, max_seqlen=hp.train_seq_len, looping=True
            )
            total += x.T @ x
    return found, total / 2


def test_a_tied_embedding_is_calibrated_by_what_the_head_reads(tmp_path, dist):
    found, want = calibrated(tmp_path, dist)
    torch.testing.assert_close(found["tok_emb.weight"], want, rtol=1e-4, atol=1e-3)
    assert "lm_head.weight" not in found


def test_an_untied_embedding_is_a_table_and_the_head_is_calibrated(tmp_path, dist, published):
    found, want = calibrated(tmp_path, dist, tie_embeddings=False)
    torch.testing.assert_close(found["lm_head.weight"], want, rtol=1e-4, atol=1e-3)
    assert torch.equal(found["tok_emb.weight"], torch.eye(32))


def row_gradients_on(folder, world_size, **changes):
    """collect_row_gradients on every rank -> model, loader, settings, results by rank.

    Ranks are threads here, and each has a model of its own: PyTorch 2.13 holds a lock of a
    parameter while it waits for the GIL, so threads that differentiate one model can hang.
    """
    folder.mkdir(exist_ok=True)
    write_documents(folder, "train", [20, 28, 9, 31, 14, 25, 30, 17, 11] * 40, seed=5)
    hp = small_hp(data_path=str(folder), train_batch_tokens=3840, **changes)
    models = [make_model(hp) for _ in range(world_size)]
    stream = train_gpt.TokenStream(hp.data_path, "train")

    def collect(dist):
        loader = train_gpt.TrainLoader(stream, hp, dist)
        return train_gpt.collect_row_gradients(models[dist.rank], loader, hp, dist)

    loader = train_gpt.TrainLoader(stream, hp, train_gpt.Dist("cpu"))
    return models[0], loader, hp, on_ranks(world_size, collect)


@pytest.mark.parametrize("batches, rows", [(3, 3), (7, 4)])
def test_row_gradients_are_those_of_a_backward_pass(batches, rows, tmp_path):
    model, loader, hp, (found,) = row_gradients_on(tmp_path, 1, gptq_calibration_batches=batches)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    wanted = dict.fromkeys(train_gpt.unbank(model), 0)
    for index in range(rows):
        row = loader.row(index)
        model.zero_grad()
        losses = model(row.inputs, row.targets, row.cu_seqlens, looping=True, max_seqlen=32)
        losses.mean().backward()
        state = {name: p.grad for name, p in model.named_parameters()}
        for name, gradient in train_gpt.unbank(model, state).items():
            wanted[name] += gradient.square().mean(dim=-1) / rows
    names = [name for name in wanted if train_gpt.quant_role(name)]
    assert list(found) == names and len(names) == 1 + 6 * hp.num_layers
    for name, w in train_gpt.unbank(model).items():
        if name in found:
            assert found[name].shape == w.shape[:1] and found[name].min() > 0
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=0)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_row_gradients_are_those_of_one_rank_for_any_world_size(world_size, tmp_path):
    """Also with more ranks than rows: each takes part in every sum."""
    *_, (alone,) = row_gradients_on(tmp_path / "one", 1)
    *_, found = row_gradients_on(tmp_path / "more", world_size)
    for gradients in found:
        assert gradients.keys() == alone.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, found[0][name])
            torch.testing.assert_close(gradient, alone[name], rtol=1e-5, atol=0)


def test_every_table_of_a_published_model_has_row_gradients(tmp_path, published):
    """And its quantization takes them."""
    tables = dict(tie_embeddings=False, bigram_vocab_size=20, value_embed_layers="0,2")
    model, _, hp, (found,) = row_gradients_on(
        tmp_path, 1, ttt_enabled=False, gptq_row_power=1.0, **tables
    )
    weights = train_gpt.unbank(model)
    names = [name for name in weights if train_gpt.quant_role(name)]
    assert sorted(found) == sorted(names) and {"lm_head.weight", "bigram.weight"} <= set(names)
    assert all(gradient.any() for gradient in found.values())
    eye = {name: torch.eye(weights[name].shape[1]) for name in names}
    powers = {}
    for power in (0.0, 1.0):
        changed = published.Hyperparameters(**(vars(hp) | {"gptq_row_power": power}))
        powers[power] = quantize_alone(weights, eye, changed, found)
    for name in names:
        key = f"{name}:scale"
        assert (powers[0.0][key] != powers[1.0][key]).any(), name


@pytest.mark.parametrize(
    ("value", "rows"),
    [(float("nan"), slice(3, 4)), (float("nan"), slice(None)), (float("inf"), slice(None))],
)
def test_gradients_that_are_no_numbers_leave_a_matrix_at_its_steps(value, rows):
    """One NaN would make all steps of its matrix NaN, and its codes noise."""

    def gradients(weights, names):
        found = random_gradients(weights, names)
        found["tok_emb.weight"][rows] = value
        return found

    codes = shifted_by(gradients, gptq_row_power=0.5)
    for name, (before, after) in codes.items():
        assert (before == after).all() == (name == "tok_emb.weight"), name


def built(folder, dist, monkeypatch, **changes):
    """An artifact with row gradients that take 0.2 s -> seconds by stage, calls, file, model."""
    folder.mkdir()
    write_documents(folder, "train", [20, 28, 9, 31, 14, 25, 30, 17, 11] * 8, seed=5)
    hp = small_hp(data_path=str(folder), quant_check_rows=0, target_bytes=0, **changes)
    model = make_model(hp)
    loader = train_gpt.TrainLoader(train_gpt.TokenStream(hp.data_path, "train"), hp, dist)
    collect, calls = train_gpt.collect_row_gradients, []

    def slowly(*arguments):
        time.sleep(0.2)
        calls.append(collect(*arguments))
        return calls[-1]

    monkeypatch.setattr(train_gpt, "collect_row_gradients", slowly)
    log = train_gpt.RunLog(folder, dist)
    train_gpt.build_artifact(model, loader, hp, dist, log, folder / "artifact.bin", 0)
    monkeypatch.setattr(train_gpt, "collect_row_gradients", collect)
    return log.seconds, calls, folder / "artifact.bin", model


def test_an_artifact_with_steps_by_importance_is_the_models_own_file(tmp_path, dist, monkeypatch):
    """Gradients count as Hessians do, and are only made where they are wanted."""
    _, calls, plain, _ = built(tmp_path / "off", dist, monkeypatch, gptq_row_power=0.0)
    assert not calls
    changes = {"gptq_row_power": 0.5, "gptq_column_steps": False}
    assert not built(tmp_path / "rows", dist, monkeypatch, **changes)[1]
    seconds, (gradients,), path, model = built(
        tmp_path / "on", dist, monkeypatch, gptq_row_power=0.5
    )
    assert seconds["hessians"] >= 0.2 and path.read_bytes() != plain.read_bytes()
    arrays = train_gpt.unpack_weights(path.read_bytes())
    hp = settings(**{name: getattr(model.hp, name) for name in vars(settings())})
    loader = train_gpt.TrainLoader(
        train_gpt.TokenStream(model.hp.data_path, "train"), model.hp, dist
    )
    hessians = train_gpt.collect_hessians(model, loader, model.hp, dist)
    wanted = quantize_alone(train_gpt.unbank(model), hessians, hp, gradients)
    assert arrays.keys() == wanted.keys()
    assert all(np.array_equal(arrays[name], wanted[name]) for name in wanted)
    again = make_model(model.hp, seed=9)
    train_gpt.rebuild_model(again, path, dist)
    for name, w in train_gpt.unbank(model).items():
        assert (train_gpt.unbank(again)[name] - w).norm() < 0.25 * w.norm(), name


# --- the whole model


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_number_of_ranks_gives_the_arrays_of_one(world_size):
    """All ranks hold the same bits.

    Those of one rank may differ by a tie, for its batches have other shapes.
    """
    weights, hessians = small_model()
    alone = quantize_alone(weights, hessians, settings())
    found = on_ranks(
        world_size, lambda dist: train_gpt.quantize_weights(weights, hessians, settings(), dist)
    )
    assert all(same_arrays(arrays, found[0]) for arrays in found)
    assert {key: (a.dtype, a.shape) for key, a in found[0].items()} == {
        k: (a.dtype, a.shape) for k, a in alone.items()
    }
    assert list(found[0]) == list(alone)
    rebuilt, want = (train_gpt.dequantize_weights(arrays) for arrays in (found[0], alone))
    for name, w in weights.items():  # one tied row of sixteen: a third of the error of quantization
        assert (rebuilt[name] - want[name]).norm() <= 0.5 * (want[name] - w).norm(), name


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_every_matrix_is_one_ranks_work_and_loads_are_even(world_size):
    weights, hessians = small_model(11)
    shares = train_gpt.share_matrices({name: weights[name] for name in hessians}, world_size)
    assert sorted(name for share in shares for name in share) == sorted(hessians)
    load = [
        sum(weights[name].shape[0] * weights[name].shape[1] ** 2 for name in share)
        for share in shares
    ]
    assert max(load) <= 1.35 * sum(load) / world_size


@pytest.mark.filterwarnings("ignore:GPTQ")
def test_failure_of_one_rank_is_raised_on_all():
    weights, hessians = small_model()
    hessians["blocks.1.mlp.c_fc.weight"] = -torch.eye(32)
    for error in on_ranks(
        3, lambda dist: train_gpt.quantize_weights(weights, hessians, settings(), dist)
    ):
        assert isinstance(error, ValueError) and "blocks.1.mlp.c_fc.weight" in str(error)


def test_each_role_uses_its_own_bits_and_clip():
    weights, hessians = small_model()
    hp = settings(matrix_bits=5, embed_bits=8, mlp_clip_sigmas=2.0, attn_clip_sigmas=3.0)
    arrays = quantize_alone(weights, hessians, hp)
    for name in hessians:
        is_embedding = name == "tok_emb.weight"
        clip_sigmas = hp.embed_clip_sigmas if is_embedding else 2.0 if ".mlp." in name else 3.0
        q_max = 127 if is_embedding else 15
        expected = (clip_sigmas * weights[name].std(dim=1) / q_max).half()
        assert np.array_equal(arrays[f"{name}:scale"], expected.numpy()), name
        assert np.abs(arrays[f"{name}:codes"]).max() <= q_max


def test_small_tensors_keep_shape_and_gates_are_int8():
    weights, hessians = small_model()
    arrays = quantize_alone(weights, hessians, settings())
    assert arrays["attn_gate:codes"].shape == (3, 4, 12) and arrays["attn_gate:scale"].shape == (
        3,
        4,
    )
    assert arrays["smear_lambda:fp16"].shape == () and arrays["resid_mix:fp16"].dtype == np.float16


def test_rebuilt_weights_are_close_and_complete():
    weights, hessians = small_model()
    rebuilt = train_gpt.dequantize_weights(quantize_alone(weights, hessians, settings()))
    assert list(rebuilt) == list(weights)
    for name, w in weights.items():
        assert rebuilt[name].shape == w.shape and rebuilt[name].dtype == torch.float32
        assert (rebuilt[name] - w).norm() <= (0.25 if name in hessians else 0.01) * w.norm(), name


def test_a_model_takes_its_weights_from_the_file(tmp_path, dist):
    hp = small_hp()
    weights = train_gpt.unbank(make_model(hp))
    hessians = {name: torch.eye(w.shape[-1]) for name, w in weights.items()}
    arrays = train_gpt.quantize_weights(weights, hessians, hp, dist)
    (tmp_path / "artifact.bin").write_bytes(train_gpt.pack_weights(arrays, "entropy"))
    model = make_model(hp, seed=9)
    train_gpt.rebuild_model(model, tmp_path / "artifact.bin", dist)
    found, want = train_gpt.unbank(model), train_gpt.dequantize_weights(arrays)
    for name, w in weights.items():
        assert torch.equal(found[name], want[name]), name
        assert (found[name] - w).norm() < 0.25 * w.norm(), name


@pytest.mark.parametrize("fused", [False, True])
def test_an_artifact_of_a_model_of_other_tokens_is_refused(fused, tmp_path, dist):
    hp = small_hp(marker_fusion_enabled=fused)
    model = make_model(hp)
    weights = train_gpt.unbank(model)
    hessians = {name: torch.eye(w.shape[-1]) for name, w in weights.items()}
    arrays = train_gpt.quantize_weights(weights, hessians, hp, dist)
    path = tmp_path / "artifact.bin"
    path.write_bytes(train_gpt.pack_weights(arrays, "entropy", trained_on=1 + fused))
    train_gpt.rebuild_model(model, path, dist)
    other = make_model(small_hp(marker_fusion_enabled=not fused))
    message = f"artifact {path}: trained with another MARKER_FUSION_ENABLED: use that"
    with pytest.raises(train_gpt.ArtifactError, match=f"^{re.escape(message)}$"):
        train_gpt.rebuild_model(other, path, dist)
    # older artifacts do not say it
    path.write_bytes(train_gpt.pack_weights(arrays, "entropy"))
    train_gpt.rebuild_model(other, path, dist)


def planted(*arguments, **options):
    raise ValueError("planted")


def assert_ends_with_the_bug(function, *arguments):
    """The planted error itself comes out: not another one with its words, which would hide where."""
    with pytest.raises(ValueError, match="^planted$") as error:
        function(*arguments)
    assert error.type is ValueError and error.traceback[-1].name == "planted"


@pytest.mark.parametrize(
    "broken",
    ["plan_sections", "join_sections", "code_matrix", "join_wide_codes", "fields_fit", "rebank"],
)
def test_a_bug_in_reading_an_artifact_is_no_damaged_file(broken, tmp_path, dist, monkeypatch):
    model = make_model(small_hp())
    weights = train_gpt.unbank(model)
    hessians = {name: torch.eye(w.shape[-1]) for name, w in weights.items()}
    arrays = train_gpt.quantize_weights(weights, hessians, small_hp(), dist)
    path = tmp_path / "artifact.bin"
    path.write_bytes(train_gpt.pack_weights(arrays, "entropy"))
    monkeypatch.setattr(train_gpt, broken, planted)
    assert_ends_with_the_bug(train_gpt.rebuild_model, model, path, dist)


def test_a_bug_in_loading_a_checkpoint_is_no_damaged_file(tmp_path, monkeypatch):
    model = make_model(small_hp())
    train_gpt.save_checkpoint(tmp_path / "model.pt", model, small_hp())
    monkeypatch.setattr(train_gpt, "rebank", planted)
    assert_ends_with_the_bug(train_gpt.load_checkpoint, tmp_path / "model.pt", model)


def test_a_bug_in_quantizing_is_not_the_weights_fault(monkeypatch):
    monkeypatch.setattr(train_gpt, "order_columns", planted)
    assert_ends_with_the_bug(quantize_alone, *small_model(), settings())


def test_a_bug_in_reading_a_setting_is_no_bad_value(monkeypatch):
    monkeypatch.setattr(train_gpt, "parse_setting", planted)
    assert_ends_with_the_bug(train_gpt.Hyperparameters.from_env, {"SEED": "1"})


def test_a_checkpoint_of_another_model_is_named_with_what_differs(tmp_path):
    train_gpt.save_checkpoint(tmp_path / "model.pt", make_model(small_hp()), small_hp())
    other = make_model(small_hp(num_layers=4))
    words = f"^checkpoint {re.escape(str(tmp_path))}/model.pt does not fit these settings"
    with pytest.raises(train_gpt.DataError, match=words):
        train_gpt.load_checkpoint(tmp_path / "model.pt", other)


def test_dequantize_is_deterministic_whatever_threads_and_order():
    weights, hessians = small_model()
    arrays = quantize_alone(weights, hessians, settings())
    first = train_gpt.dequantize_weights(arrays)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        second = train_gpt.dequantize_weights(
            {key: arrays[key].copy(order="F") for key in reversed(arrays)}
        )
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)) for name in first
    )


def test_a_tensor_without_a_role_is_stored_as_fp16():
    weights, hessians = small_model()
    weights["extra"] = torch.zeros(256, 256)
    assert "extra:fp16" in quantize_alone(weights, hessians, settings())


def test_untied_head_is_quantised_as_the_embedding_is(published):
    weights, hessians = small_model()
    weights["lm_head.weight"], hessians["lm_head.weight"] = (
        weights["tok_emb.weight"].clone(),
        hessians["tok_emb.weight"],
    )
    arrays = quantize_alone(weights, hessians, settings(embed_bits=8, lqer_enabled=False))
    differ = arrays["lm_head.weight:codes"] != arrays["tok_emb.weight:codes"]
    assert differ.any(axis=1).sum() <= 3  # of 97 rows, by a tie


@pytest.mark.parametrize("name", ["resid_mix", "attn_gate", "blocks.0.mlp.c_fc.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_number_that_fp16_cannot_hold_is_an_error(name, value):
    weights, hessians = small_model()
    weights[name].view(-1)[3] = value
    with pytest.raises(train_gpt.ModelError, match=f"{name}.*lower learning rates"):
        quantize_alone(weights, hessians, settings())


HOSTILE = {
    "no scale": {"codes": array_of((4, 3))},
    "both kinds": {
        "fp16": array_of((4, 3), np.float16),
        "codes": array_of((4, 3)),
        "scale": array_of(4),
    },
    "column steps of fp16": {"fp16": array_of((4, 3), np.float16), "column_steps": array_of(3)},
    "codes without a dimension": {"codes": array_of(()), "scale": array_of(())},
    "scale without a dimension": {
        "codes": array_of((4, 3)),
        "scale": array_of(()),
        "column_steps": array_of(3),
    },
    "terabytes by broadcasting": {"codes": array_of((1, 2**22)), "scale": array_of(2**22)},
    "short column steps": {
        "codes": array_of((4, 3)),
        "scale": array_of(4),
        "column_steps": array_of(2),
    },
    "fine codes without column steps": {
        "codes": array_of((4, 3)),
        "scale": array_of(4),
        "fine_codes": array_of((4, 1)),
    },
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_fields_of_which_no_weight_can_be_made_are_refused_by_name(fields):
    arrays = {f"blocks.0.mlp.c_fc.weight:{field}": array for field, array in fields.items()}
    with pytest.raises(ValueError, match="blocks.0.mlp.c_fc.weight: no weight can be made"):
        train_gpt.dequantize_weights(arrays)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_step_codes_that_are_not_finite_are_harmless(value):
    fields = {
        "codes": array_of((4, 3)),
        "scale": np.full(4, value, np.float16),
        "column_steps": array_of(3),
    }
    arrays = {f"tok_emb.weight:{field}": array for field, array in fields.items()}
    assert train_gpt.dequantize_weights(arrays)["tok_emb.weight"].isfinite().all()


def test_codes_alone_are_an_error():
    with pytest.raises(ValueError, match="thing"):
        train_gpt.dequantize_weights({"thing:codes": np.zeros((2, 2), np.int8)})


@pytest.mark.parametrize(
    "others", [("fp16",), ("codes", "scale"), ("codes", "scale", "column_steps", "trellis")]
)
def test_fields_that_are_not_known_are_refused_not_left_out(others):
    """An artifact with corrections (LQER) would score worse in silence."""
    fields = {"codes": (4, 3), "scale": (4,), "fp16": (4, 3), "column_steps": (3,), "trellis": ()}
    arrays = {f"tok_emb.weight:{field}": array_of(fields[field]) for field in others}
    arrays |= {f"tok_emb.weight:{field}": array_of((4, 3)) for field in ("lqer_b", "lqer_a")}
    words = "tok_emb.weight: no weight can be made of .*lqer_b.*presets/published.py reads LQER"
    with pytest.raises(ValueError, match=words):
        train_gpt.dequantize_weights(arrays)
