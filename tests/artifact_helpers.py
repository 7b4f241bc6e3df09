"""Arrays of a tiny model as quantization returns them."""

import numpy as np


def model_arrays(num_layers=3, seed=0):
    """Arrays as quantize_weights returns them, of a tiny model; the gate's codes are no matrix
    of a role.
    """
    rng = np.random.default_rng(seed)
    shapes = {
        "attn.c_q": (24, 16),
        "attn.c_k": (8, 16),
        "attn.c_v": (8, 16),
        "attn.c_proj": (16, 24),
    }
    shapes |= {"mlp.c_fc": (40, 16), "mlp.c_proj": (16, 40)}
    names = {"tok_emb.weight": (50, 16)}
    names |= {
        f"blocks.{i}.{name}.weight": shape
        for i in reversed(range(num_layers))
        for name, shape in shapes.items()
    }
    arrays = {}
    for name, shape in names.items():
        arrays[f"{name}:codes"] = np.clip(rng.normal(size=shape) * 5, -31, 31).astype(np.int8)
        arrays[f"{name}:scale"] = rng.random(shape[0]).astype(np.float16)
    arrays["tok_emb.weight:lqer_a"] = rng.integers(-2, 2, (50, 4)).astype(np.int8)
    arrays["tok_emb.weight:lqer_a_scale"] = np.array(0.5, np.float16)
    arrays["attn_gate:codes"] = rng.integers(-127, 128, (num_layers, 4, 12)).astype(np.int8)
    return arrays | {"resid_mix:fp16": rng.random((num_layers, 2, 16)).astype(np.float16)}
