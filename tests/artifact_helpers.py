"""Arrays of a tiny model as quantization returns them."""

import numpy as np

import train_gpt

MATRICES = {
    "attn.c_q": (24, 16),
    "attn.c_k": (8, 16),
    "attn.c_v": (8, 16),
    "attn.c_proj": (16, 24),
    "mlp.c_fc": (40, 16),
    "mlp.c_proj": (16, 40),
}
HAS_WIDE_CODES = "tok_emb.weight", "blocks.1.mlp.c_proj.weight"  # as those of a trained model


def row_fields(rng, shape):
    """Fields of a matrix with a step for each row."""
    codes = np.clip(rng.normal(size=shape) * 5, -31, 31).astype(np.int8)
    return {"codes": codes, "scale": rng.random(shape[0]).astype(np.float16)}


def trellis_fields(rng, shape, has_wide_codes):
    """Fields of a matrix with the trellis and steps for rows and columns; two columns are wide."""
    fields = row_fields(rng, shape)
    fields["scale"] = rng.integers(-60, -40, shape[0]).astype(np.int8)
    fields["column_steps"] = rng.integers(-16, 17, shape[1]).astype(np.int8)
    if has_wide_codes:
        fields["fine_codes"] = rng.integers(-8, 9, (shape[0], 2)).astype(np.int8)
        fields["fine_columns"] = np.array([3, shape[1] - 1], np.int16)
        fields["fine_shift"] = np.array([1, train_gpt.MAX_SHIFT], np.int8)
    return fields | {"trellis": np.ones((), np.int8)}


def join_fields(rng, num_layers, fields_of):
    """Arrays "name:field" of all matrices, with fields_of(name, shape), and of small tensors."""
    shapes = {"tok_emb.weight": (50, 16)}
    for i in range(num_layers):
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in MATRICES.items()}
    arrays = {}
    for name, shape in shapes.items():
        for field, array in fields_of(name, shape).items():
            arrays[f"{name}:{field}"] = array
    # codes, but not those of a matrix of a role
    arrays["attn_gate:codes"] = rng.integers(-127, 128, (num_layers, 4, 12)).astype(np.int8)
    arrays["attn_gate:scale"] = rng.random((num_layers, 4)).astype(np.float16)
    arrays["smear_lambda:fp16"] = rng.random(1).astype(np.float16)
    arrays["q_gain:fp16"] = rng.random((num_layers, 4)).astype(np.float16)
    arrays["resid_mix:fp16"] = rng.random((num_layers, 2, 16)).astype(np.float16)
    return arrays


def model_arrays(num_layers=3, seed=0):
    """As quantize_weights returns them by default."""
    rng = np.random.default_rng(seed)
    return join_fields(
        rng, num_layers, lambda name, shape: trellis_fields(rng, shape, name in HAS_WIDE_CODES)
    )


def published_arrays(num_layers=3, seed=0):
    """As published systems have them: steps of rows alone, and the embedding corrected (LQER)."""
    rng = np.random.default_rng(seed)
    arrays = join_fields(rng, num_layers, lambda name, shape: row_fields(rng, shape))
    arrays["tok_emb.weight:lqer_a"] = rng.integers(-2, 2, (50, 4)).astype(np.int8)
    arrays["tok_emb.weight:lqer_a_scale"] = np.array(0.5, np.float16)
    arrays["tok_emb.weight:lqer_b"] = rng.integers(-8, 8, (4, 16)).astype(np.int8)
    arrays["tok_emb.weight:lqer_b_scale"] = rng.random(8).astype(np.float16)
    return arrays
