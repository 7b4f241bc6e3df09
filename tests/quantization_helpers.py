"""Settings, weights and Hessians of a tiny model, and its quantization on ranks that are threads."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from conftest import PATIENCE

import train_gpt

GOLDEN = (
    Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "data" / "golden"))
    / "quantization.npz"
)


def read_golden():
    """The golden numbers, as tensors by name."""
    with np.load(GOLDEN) as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


class FakeDist:
    """One of several ranks that live in threads; the gather meets at a barrier."""

    device = torch.device("cpu")

    def __init__(self, rank, world_size, slots, barrier):
        self.rank, self.world_size, self.slots, self.barrier = rank, world_size, slots, barrier

    def all_gather_object(self, obj):
        self.slots[self.rank] = obj
        self.barrier.wait(PATIENCE)
        gathered = list(self.slots)
        self.barrier.wait(PATIENCE)
        return gathered

    def all_reduce(self, tensor):
        return tensor.copy_(sum(self.all_gather_object(tensor.clone())))


def on_ranks(world_size, call):
    """call(dist) on every rank -> results or exceptions by rank."""
    slots, barrier, results = (
        [None] * world_size,
        threading.Barrier(world_size),
        [None] * world_size,
    )

    def work(rank):
        try:
            results[rank] = call(FakeDist(rank, world_size, slots, barrier))
        except ValueError as error:
            results[rank] = error
        except BaseException:
            barrier.abort()  # or the others would wait for this rank
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def settings(**changes):
    defaults = dict(
        matrix_bits=6,
        embed_bits=7,
        mlp_clip_sigmas=11.5,
        attn_clip_sigmas=13.0,
        embed_clip_sigmas=14.0,
    )
    defaults |= dict(gptq_damp=0.01)
    defaults |= dict(gptq_column_steps=False, gptq_column_octaves=2.0, gptq_trellis=False)
    defaults |= dict(gptq_row_power=0.0, gptq_row_octaves=2.0)
    return SimpleNamespace(**(defaults | changes))


def correlated_hessian(columns, tokens=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens or 4 * columns, columns, generator=generator) @ (
        mix + 0.1 * torch.eye(columns)
    )
    hessian = x.T @ x / len(x)
    return (hessian + hessian.T) / 2  # a product by parts need not be symmetric to the last bit


def small_model(num_layers=3):
    """Weights of a tiny model with every kind of saved tensor, and Hessians for its matrices."""
    shapes = {
        "attn.c_q": (32, 32),
        "attn.c_k": (16, 32),
        "attn.c_v": (16, 32),
        "attn.c_proj": (32, 32),
    }
    shapes |= {"mlp.c_fc": (64, 32), "mlp.c_proj": (32, 64)}
    weights = {"tok_emb.weight": torch.randn(97, 32)}
    for layer in range(num_layers):
        weights |= {
            f"blocks.{layer}.{name}.weight": 0.1 * torch.randn(shape)
            for name, shape in shapes.items()
        }
    hessians = {
        name: correlated_hessian(w.shape[1], seed=i) for i, (name, w) in enumerate(weights.items())
    }
    weights |= {
        "attn_gate": torch.randn(num_layers, 4, 12),
        "resid_mix": torch.randn(num_layers, 2, 32),
    }
    return weights | {"smear_lambda": torch.tensor(0.25)}, hessians


def rebuilt_by_gptq(found, trellis=False):
    """QuantizedMatrices -> the weights (N, R, C) that GPTQ took its codes for."""
    steps = found.scale.float()[..., None]
    if found.column_steps is not None:
        steps = ((steps + found.column_steps[:, None]) / 8).exp2()
    codes = found.codes
    if trellis:
        codes = torch.from_numpy(train_gpt.trellis_levels(codes.numpy())) / 2
    return codes * steps


def quantize_alone(weights, hessians, hp, row_gradients=None):
    def quantize(dist):
        return train_gpt.quantize_weights(weights, hessians, hp, dist, row_gradients=row_gradients)

    result = on_ranks(1, quantize)[0]
    if isinstance(result, ValueError):
        raise result
    return result


def array_of(shape, dtype=np.int8):
    return np.ones(shape, dtype)
