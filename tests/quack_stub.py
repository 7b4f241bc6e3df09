"""The part of quack 0.6.5 and of cutlass that train_gpt.py calls, on the CPU: the epilogue runs on
whole tensors.
"""

import inspect
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch


class Number:
    """cutlass.Int32 and Float32: a cast when called, a type to bitcast to."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, value):
        return value.to(self.dtype)


class Element(torch.Tensor):
    """All elements at once of what an epilogue sees one of: fp32, and 32 bits when bitcast."""

    def bitcast(self, number):
        return self.view(number.dtype)


class EpiMod:
    """quack.epilogue.EpiMod of a function of acc and perhaps c; refuses the operands that the
    GPU's would.
    """

    calls = []  # (rows, N, K, whether the epilogue reads c)

    def __init__(self, function):
        self.function, self.names = function, list(inspect.signature(function).parameters)
        assert self.names[0] == "acc" and set(self.names) <= {"acc", "c"}, self.names

    def gemm(
        self,
        A,
        B,
        D,
        C=None,
        *,
        epi_args,
        tile_M,
        tile_N,
        cluster_M,
        cluster_N,
        pingpong,
        b_kn=False,
    ):  # noqa: N803
        assert (tile_M, tile_N, cluster_M, cluster_N, pingpong, epi_args) == (
            192,
            128,
            1,
            2,
            True,
            {},
        )
        assert (C is not None) == ("c" in self.names)
        for tensor in (A, B, D) + (C,) * (C is not None):
            assert tensor.dtype == torch.bfloat16 and not tensor.requires_grad
            assert (
                tensor.stride() == (tensor.shape[1], 1)
                and tensor.data_ptr() % 16 == 0 == tensor.shape[1] % 8
            )
        acc = A.float() @ (B if b_kn else B.T).float()
        assert acc.shape == D.shape and (C is None or C.shape == D.shape)
        operands = {"acc": acc, "c": C if C is None else C.float()}
        value = self.function(**{name: operands[name].as_subclass(Element) for name in self.names})[
            "D"
        ]
        D.copy_(value.as_subclass(torch.Tensor))
        self.calls.append((*D.shape, A.shape[1], C is not None))


def modules():
    """{name: module} for sys.modules."""
    cutlass, quack, epilogue = (ModuleType(name) for name in ("cutlass", "quack", "quack.epilogue"))
    cutlass.Int32, cutlass.Float32 = Number(torch.int32), Number(torch.float32)
    cutlass.select_ = torch.where
    cutlass.cute = SimpleNamespace(
        arch=SimpleNamespace(fmax=torch.maximum),
        math=SimpleNamespace(sqrt=lambda x, fastmath: x.sqrt()),
    )
    cutlass.__spec__ = ModuleSpec("cutlass", None)  # Inductor asks whether there is one
    epilogue.EpiMod = EpiMod
    EpiMod.calls.clear()
    return {"cutlass": cutlass, "quack": quack, "quack.epilogue": epilogue}


def install(capability=(9, 0)):
    """For a process of its own: the stub, on what says that it is a GPU of this capability."""
    sys.modules.update(modules())
    torch.cuda.get_device_capability = lambda *device: capability
