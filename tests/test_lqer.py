"""LQER of presets/published.py: factors of the largest errors, their fields, and rebuilding."""

import numpy as np
import pytest
import torch
from quantization_helpers import array_of, on_ranks, quantize_alone, read_golden, small_model
from quantization_helpers import settings as plain_settings

import train_gpt
from presets import published as parts

pytestmark = pytest.mark.usefixtures("published")
LQER_KEYS = {
    "lqer_a": "A_codes",
    "lqer_a_scale": "A_scale",
    "lqer_b": "B_codes",
    "lqer_b_scale": "B_scale",
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(20)


def settings(**changes):
    defaults = dict(lqer_enabled=True, lqer_top_k=3, lqer_rank=4, lqer_asym_enabled=True)
    defaults |= dict(lqer_asym_group=64, lqer_factor_bits=4)
    return plain_settings(**(defaults | changes))


def unpack(fields):
    return parts.unpack_factors(
        {key: np.asarray(value, np.float32) for key, value in fields.items()}
    )


# --- golden numbers


@pytest.fixture(scope="module")
def golden():
    return read_golden()


def test_lqer_product_equals_golden(golden):
    a, b = parts.lqer_factors(golden["lqer/error"], 4)
    torch.testing.assert_close(a @ b, golden["lqer/A"] @ golden["lqer/B"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["asym", "sym4"])
def test_lqer_packing_equals_golden(golden, form):
    a, b = golden["lqer/A"], golden["lqer/B"]
    packed = parts.pack_factors(a, b, settings(lqer_asym_enabled=form == "asym"))
    for ours, theirs in LQER_KEYS.items():
        expected = golden[f"lqer/{form}/{theirs}"]
        assert packed[ours].dtype == expected.dtype and torch.equal(packed[ours], expected), ours


# --- factors


def test_lqer_lowers_the_error_in_both_packings():
    error = torch.randn(64, 2) @ torch.randn(2, 128) + 0.1 * torch.randn(64, 128)
    a, b = parts.lqer_factors(error, 4)
    for is_asymmetric in (True, False):
        packed = parts.pack_factors(a, b, settings(lqer_asym_enabled=is_asymmetric))
        unpacked = unpack(packed)
        a_back, b_back = (torch.from_numpy(factor) for factor in unpacked)
        assert a_back.shape == a.shape and b_back.shape == b.shape
        assert (error - a_back @ b_back).norm() < 0.8 * error.norm()


def test_unpacked_factors_are_within_half_a_step():
    a, b = torch.randn(20, 4), torch.randn(4, 48)
    packed = parts.pack_factors(a, b, settings(lqer_asym_enabled=False, lqer_factor_bits=6))
    a_back, b_back = unpack(packed)
    assert (
        (torch.from_numpy(a_back) - a).abs() <= 0.505 * packed["lqer_a_scale"].float()[:, None]
    ).all()
    assert (
        (torch.from_numpy(b_back) - b).abs() <= 0.505 * packed["lqer_b_scale"].float()[:, None]
    ).all()


def test_asymmetric_groups_cross_the_rows_of_b():
    b = torch.randn(4, 48)
    packed = parts.pack_factors(torch.randn(5, 4), b, settings())
    assert packed["lqer_b_scale"].shape == (3,)
    expected = (b.reshape(3, 64).abs().amax(dim=1) / 7.5).half()
    assert torch.equal(packed["lqer_b_scale"], expected)


def test_lqer_corrects_the_largest_errors_only_and_lowers_them():
    weights, hessians = small_model()
    plain = quantize_alone(weights, hessians, settings(lqer_enabled=False))
    arrays = quantize_alone(weights, hessians, settings(lqer_top_k=3, matrix_bits=4))
    before = quantize_alone(weights, hessians, settings(lqer_enabled=False, matrix_bits=4))
    rebuilt, uncorrected = (
        train_gpt.dequantize_weights(arrays),
        train_gpt.dequantize_weights(before),
    )
    errors = {name: (weights[name] - uncorrected[name]).norm().item() for name in hessians}
    largest = set(sorted(errors, key=errors.get)[-3:])
    assert {key.split(":")[0] for key in arrays if ":lqer" in key} == largest
    assert not any(":lqer" in key for key in plain)
    for name in hessians:
        if name in largest:
            assert (weights[name] - rebuilt[name]).norm() < errors[name]
        else:
            assert torch.equal(rebuilt[name], uncorrected[name])


def test_lqer_is_symmetric_where_the_group_does_not_divide():
    weights, hessians = small_model()
    arrays = quantize_alone(weights, hessians, settings(lqer_asym_group=96))
    # 4 x 32 or 64 values of B
    assert all(arrays[key].ndim == 1 for key in arrays if key.endswith("lqer_a_scale"))
    arrays = quantize_alone(weights, hessians, settings(lqer_asym_group=64))
    assert all(arrays[key].ndim == 0 for key in arrays if key.endswith("lqer_a_scale"))


def test_any_number_of_ranks_corrects_the_same_matrices():
    """All ranks hold the same bits, in the order of the weights."""
    weights, hessians = small_model()
    hp = settings(matrix_bits=4)
    alone = quantize_alone(weights, hessians, hp)
    found = on_ranks(3, lambda dist: train_gpt.quantize_weights(weights, hessians, hp, dist))
    for arrays in found:
        assert list(arrays) == list(alone)
        assert all(np.array_equal(array, found[0][key]) for key, array in arrays.items())
    names = [key.rpartition(":")[0] for key in alone]
    places = [list(weights).index(name) for name in names]
    assert places == sorted(places)
    assert [key.rpartition(":")[2] for key in alone if ":lqer" in key] == 3 * list(LQER_KEYS)


# --- rebuilding


def test_dequantize_adds_the_correction_rank_by_rank():
    weights, hessians = small_model()
    arrays = quantize_alone(weights, hessians, settings(lqer_top_k=1))
    name = next(key for key in arrays if key.endswith(":lqer_a")).removesuffix(":lqer_a")
    a, b = unpack(
        {
            key.split(":")[1]: array
            for key, array in arrays.items()
            if key.startswith(f"{name}:lqer")
        }
    )
    expected = (
        arrays[f"{name}:codes"].astype(np.float64)
        * arrays[f"{name}:scale"].astype(np.float64)[:, None]
    )
    expected += a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(
        train_gpt.dequantize_weights(arrays)[name].numpy(), expected, atol=1e-6
    )


HOSTILE = {
    "correction of fp16": {
        "fp16": array_of((4, 3), np.float16),
        "lqer_a": array_of((4, 2)),
        "lqer_a_scale": array_of(()),
        "lqer_b": array_of((2, 3)),
        "lqer_b_scale": array_of(1),
    },
    "correction of a row": {
        "codes": array_of(4),
        "scale": array_of(()),
        "lqer_a": array_of((4, 2)),
        "lqer_a_scale": array_of(()),
        "lqer_b": array_of(2),
        "lqer_b_scale": array_of(1),
    },
    "half a correction": {
        "codes": array_of((4, 3)),
        "scale": array_of(4),
        "lqer_a": array_of((4, 2)),
    },
    "flat correction": {
        "codes": array_of((4, 3)),
        "scale": array_of(4),
        "lqer_a": array_of(4),
        "lqer_a_scale": array_of(()),
        "lqer_b": array_of((2, 3)),
        "lqer_b_scale": array_of(1),
    },
    "terabytes by a scale of two dimensions": {
        "codes": array_of((4, 2**18)),
        "scale": array_of(4),
        "lqer_a": array_of((4, 4)),
        "lqer_a_scale": array_of(()),
        "lqer_b": array_of((4, 2**18)),
        "lqer_b_scale": array_of((2**10, 2**10)),
    },
    "short correction": {
        "codes": array_of((4, 3)),
        "scale": array_of(4),
        "lqer_a": array_of((4, 2)),
        "lqer_a_scale": array_of(4),
        "lqer_b": array_of((1, 3)),
        "lqer_b_scale": array_of(1),
    },
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_corrections_that_do_not_fit_are_refused_by_name(fields):
    arrays = {f"blocks.0.mlp.c_fc.weight:{field}": array for field, array in fields.items()}
    with pytest.raises(ValueError, match="blocks.0.mlp.c_fc.weight: no weight can be made"):
        train_gpt.dequantize_weights(arrays)
