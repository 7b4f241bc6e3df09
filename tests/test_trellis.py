"""Trellis-coded quantization: the encoder finds the best path, the decoder follows every path."""

import itertools

import numpy as np
import pytest
import torch
from quantization_helpers import rebuilt_by_gptq

import train_gpt

SEGMENT = train_gpt.TRELLIS_SEGMENT


def follow(codes):
    """Levels of one sequence of codes, written from the definition alone."""
    state = 0
    levels = []
    for code in codes:
        parity = state % 2
        levels.append(2 * code + parity)
        state = (state // 2) ^ (5 * parity) ^ (2 * (code % 2))
    return levels


def decode(codes):
    """One sequence of codes -> its levels, by the decoder of the artifact."""
    return train_gpt.trellis_levels(np.array(codes)[:, None])[:, 0].tolist()


def entropy(codes):
    """Order-0 entropy in bits per code."""
    counts = np.unique(codes.numpy(), return_counts=True)[1]
    shares = counts / counts.sum()
    return -(shares @ np.log2(shares))


def test_the_encoder_finds_what_brute_force_finds():
    generator = torch.Generator().manual_seed(1)
    values = 3 * torch.randn(20, 5, generator=generator)
    found = train_gpt.trellis_round_ref(values)
    paths = np.array([follow(codes) for codes in itertools.product(range(-6, 7), repeat=5)])
    for sequence, levels in zip(values.numpy(), found.numpy(), strict=True):
        best = ((paths - sequence) ** 2).sum(axis=1).min()
        assert ((levels - sequence) ** 2).sum() == pytest.approx(best, rel=1e-5)
        assert follow(levels >> 1) == levels.tolist()


def test_the_decoder_follows_every_state_and_code():
    seen = set()
    for codes in itertools.product((-128, -1, 0, 1, 127), repeat=5):
        assert decode(codes) == follow(codes)
        state = 0
        for code in codes:
            seen.add((state, code))
            state = (state >> 1) ^ (5 * (state & 1)) ^ (2 * (code & 1))
    assert {state for state, _ in seen} == set(range(8))
    assert len(seen) == 8 * 5


@pytest.mark.parametrize("rows", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 7])
def test_every_segment_begins_in_state_0(rows):
    codes = torch.randint(-127, 128, (rows,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = []
    for first in range(0, rows, SEGMENT):
        expected += follow(codes[first : first + SEGMENT])
    assert decode(codes) == expected


@pytest.mark.parametrize("rows", [5, SEGMENT, SEGMENT + 30])
@pytest.mark.parametrize("scale", [0.1, 3.0, 1e6])
def test_what_gptq_takes_the_levels_for_is_what_is_decoded(rows, scale):
    generator = torch.Generator().manual_seed(3)
    step = 0.5 + torch.rand(2, rows, generator=generator)
    column = scale * torch.randn(2, rows, generator=generator)
    levels, rounded = train_gpt.trellis_codes(column, step, 127, train_gpt.trellis_round_ref)
    codes = levels.int() >> 1
    assert codes.abs().max() <= 127
    decoded = train_gpt.trellis_levels(codes.mT.numpy())
    assert np.array_equal(decoded.T, levels.numpy())
    assert torch.equal(rounded, levels * (step / 2))


def test_it_saves_more_than_an_eighth_of_a_bit_over_scalar_codes():
    w = torch.randn(64, 4 * SEGMENT, generator=torch.Generator().manual_seed(4))
    step = torch.full((64, 4 * SEGMENT), 0.4)

    def bits_at_error_1(codes, rounded):
        return entropy(codes) + 0.5 * np.log2((w - rounded).square().mean().item())

    scalar = train_gpt.nearest_codes(w, step, 31)
    levels, rounded = train_gpt.trellis_codes(w, step, 31, train_gpt.trellis_round_ref)
    assert bits_at_error_1(*scalar) - bits_at_error_1(levels.int() >> 1, rounded) > 0.16


def uneven_problem(rows=96, columns=24):
    """Weights (1, R, C) and a Hessian (1, C, C) whose columns differ and correlate."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(1, rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(4000, columns, generator=generator) @ mixing
    inputs = inputs * torch.linspace(-1, 1, columns).exp()
    return w, (inputs.T @ inputs / len(inputs))[None]


def test_gptq_with_the_trellis_has_a_smaller_weighted_error_at_equal_entropy():
    w, hessian = uneven_problem(rows=1024)

    def bits_at_error_1(trellis_round):
        found = train_gpt.gptq_quantize(w, hessian, 6, 13.0, 0.01, ["w"], 2.0, trellis_round)
        error = (w - rebuilt_by_gptq(found, trellis_round is not None))[0]
        weighted = (error @ hessian[0] * error).mean().item()
        return entropy(found.codes) + 0.5 * np.log2(weighted)

    assert bits_at_error_1(None) - bits_at_error_1(train_gpt.trellis_round_ref) > 0.12


def quantize_embedding(**changes):
    w, hessian = uneven_problem(rows=300)
    hp = train_gpt.Hyperparameters(device="cpu", gptq_trellis=True, **changes)
    weights = {"tok_emb.weight": w[0]}
    arrays = train_gpt.quantize_weights(
        weights, {"tok_emb.weight": hessian[0]}, hp, train_gpt.Dist("cpu")
    )
    return w[0], arrays


@pytest.mark.parametrize("compressor", ["entropy", "brotli"])
def test_the_artifact_gives_back_the_weights_of_the_trellis(compressor):
    pytest.importorskip("brotli")
    w, arrays = quantize_embedding()
    packed = train_gpt.pack_weights(arrays, compressor)
    unpacked = train_gpt.unpack_weights(packed)
    assert unpacked["tok_emb.weight:trellis"] == 1
    rebuilt = train_gpt.dequantize_weights(unpacked)["tok_emb.weight"]
    assert (rebuilt - w).norm() / w.norm() < 0.065
    del arrays["tok_emb.weight:trellis"]  # codes taken for scalar ones are far off
    without = train_gpt.dequantize_weights(arrays)["tok_emb.weight"]
    assert (without - w).norm() > 1.2 * (rebuilt - w).norm()


def test_wide_codes_pass_through_the_trellis():
    w, hessian = uneven_problem(rows=300)
    w[0, :, 3] *= 6  # beyond int8 with the small step that the column gets for its large inputs
    hessian[0, 3, :] *= 60
    hessian[0, :, 3] *= 60
    hp = train_gpt.Hyperparameters(device="cpu", gptq_trellis=True)
    weights = {"tok_emb.weight": w[0]}
    arrays = train_gpt.quantize_weights(
        weights, {"tok_emb.weight": hessian[0]}, hp, train_gpt.Dist("cpu")
    )
    assert "tok_emb.weight:fine_codes" in arrays
    rebuilt = train_gpt.dequantize_weights(arrays)["tok_emb.weight"]
    error = (rebuilt - w[0]).square().mean(dim=0)
    assert error[3] / w[0, :, 3].square().mean() < 1e-4


def test_without_column_steps_there_is_no_trellis():
    _, arrays = quantize_embedding(gptq_column_steps=False)
    assert "tok_emb.weight:trellis" not in arrays


@pytest.mark.parametrize(
    "fields",
    [
        {"trellis": np.ones(3, np.float32)},
        {"trellis": np.ones((), np.float32), "column_steps": None},
    ],
)
def test_a_trellis_that_does_not_fit_is_refused(fields):
    good = {
        "codes": np.zeros((4, 3), np.float32),
        "scale": np.zeros(4, np.float32),
        "column_steps": np.zeros(3, np.float32),
    }
    given = {name: array for name, array in (good | fields).items() if array is not None}
    with pytest.raises(ValueError, match="no weight can be made"):
        train_gpt.dequantize_fields("w", given)


@pytest.mark.filterwarnings("error")
def test_any_codes_decode_without_an_error():
    codes = np.array([[np.inf, -np.inf], [np.nan, 3e38], [0.5, -7.25]], np.float32)
    assert np.isfinite(train_gpt.trellis_levels(codes)).all()
