"""KERNELS: every fast operation against its reference, and the choice between them.

The Triton kernels run on the CPU in Triton's interpreter (TRITON_INTERPRET=1 before Triton is
imported: conftest.py), in fp32 against float64. Tests marked `gpu` run the compiled kernels in
bf16: TRITON_INTERPRET=0 pytest -m gpu.
"""

import math
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import quack_stub
import torch
from conftest import tiny_hp
from torch.fx.experimental.symbolic_shapes import is_concrete_int

import train_gpt
from train_gpt import (
    ATTENTION_BACKENDS,
    attention_fa3,
    attention_fa4,
    attention_sdpa,
    leaky_relu_sq_mlp,
    linear_cross_entropy,
    linear_cross_entropy_ref,
    mlp_ref,
    select_ops,
    softcapped_cross_entropy_ref,
)

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and train_gpt.triton is not None
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


def gpu(test):
    """Marker `gpu`: skipped where there is none, and an error, not a skip, if the kernels would
    be interpreted.
    """
    test = pytest.mark.usefixtures("compiled_kernels")(test)
    return pytest.mark.gpu(
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")(test)
    )


@pytest.fixture
def compiled_kernels():
    if INTERPRETED:
        pytest.fail("the kernels are interpreted: run the GPU tests with TRITON_INTERPRET=0")


def randn(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
):
    """Fresh normal numbers of a fixed seed, as a leaf that requires a gradient."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype).requires_grad_()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    # absolute where the gradient vanishes, as that of q and k in a document of one token
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(0.1)).item()


def errors(op, reference, inputs, *rest, seed=9):
    """Relative errors of op's output and of its gradients for `inputs` against the reference in
    float64.
    """
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    got, want = op(*inputs, *rest), reference(*doubles, *rest)
    got, want = (t if isinstance(t, tuple) else (t,) for t in (got, want))
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(t.shape, generator=generator).to(g) for t, g in zip(want, got, strict=True)
    ]
    grads = torch.autograd.grad(got, inputs, weights)
    wanted = torch.autograd.grad(want, doubles, [w.double() for w in weights])
    return [relative_error(g, w) for g, w in zip((*got, *grads), (*want, *wanted), strict=True)]


def ce_float64(logits, targets, softcap):
    """The definition written out in float64, apart from F.cross_entropy and its fp32."""
    z = softcap * torch.tanh(logits.double() / softcap)
    return z.exp().sum(1).log() - z.gather(1, targets[:, None]).squeeze(1)


def attention_by_document(q, k, v, cu_seqlens, max_seqlen):
    """One softmax for each document and head, written out."""
    _, _, H, E = q.shape
    out = torch.zeros_like(q)
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        for h in range(H):
            group = h // (H // k.shape[2])
            scores = q[0, start:end, h] @ k[0, start:end, group].T / math.sqrt(E)
            out[0, start:end, h] = (
                scores.masked_fill(future, -math.inf).softmax(-1) @ v[0, start:end, group]
            )
    return out


def packed_qkv(T, H, K, E=8, seed=0, **kwargs):
    return [randn(1, T, heads, E, seed=seed + i, **kwargs) for i, heads in enumerate((H, K, K))]


# --- softcapped cross-entropy


def test_cross_entropy_reference_matches_float64():
    logits, targets = randn(6, 50, seed=1), torch.tensor([0, 49, 3, 3, 7, 20])
    assert (
        max(
            errors(
                lambda x: softcapped_cross_entropy_ref(x, targets, 4.0),
                lambda x: ce_float64(x, targets, 4.0),
                [logits],
            )
        )
        < 1e-6
    )


def head_inputs(rows, width, vocab, spread, **kwargs):
    """h, weight whose logits deviate by spread; targets, the last token among them."""
    h, weight = randn(rows, width, seed=1, **kwargs), randn(vocab, width, seed=2, **kwargs)
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(rows))
    targets[-1:] = vocab - 1
    return [h, (weight.detach() * (spread / width**0.5)).requires_grad_()], targets.to(h.device)


def linear_ce_float64(h, weight, targets, softcap):
    return ce_float64(h @ weight.T, targets, softcap)


@interpreted
@pytest.mark.parametrize(
    ("rows", "vocab", "softcap", "spread"),
    [
        (5, 1, 30, 1),
        (4, 70, 30, 40),
        (3, 1000, 15, 5),
        (2, 4096, 30, 200),
        (3, 9001, 2.5, 3),
        (2, 20000, 30, 20),
    ],
)
def test_cross_entropy_kernel_matches_float64(rows, vocab, softcap, spread):
    inputs, targets = head_inputs(rows, 6, vocab, spread)
    assert linear_cross_entropy(*inputs, targets, softcap).dtype == torch.float32
    assert max(errors(linear_cross_entropy, linear_ce_float64, inputs, targets, softcap)) < 1e-5


@interpreted
@pytest.mark.parametrize("needed", [(1, 0), (0, 1), (0, 0)])
def test_cross_entropy_computes_only_what_is_needed(needed):
    inputs, targets = head_inputs(4, 6, 33, 5)
    for tensor, need in zip(inputs, needed, strict=True):
        tensor.requires_grad_(bool(need))
    losses = linear_cross_entropy(*inputs, targets, 30.0)
    assert relative_error(losses, linear_cross_entropy_ref(*inputs, targets, 30.0)) < 1e-6
    if any(needed):
        losses.mean().backward()
    assert [tensor.grad is not None for tensor in inputs] == [bool(need) for need in needed]


@interpreted
def test_cross_entropy_takes_strided_inputs_and_an_expanded_gradient():
    (wide, weight), targets = head_inputs(6, 80, 50, 5)
    got, want = (
        torch.autograd.grad(op(wide[:, 7:57], weight[:, :50], targets, 30.0).mean(), wide)[0]
        for op in (linear_cross_entropy, linear_ce_float64)
    )
    assert relative_error(got, want) < 1e-5


@interpreted
def test_cross_entropy_accepts_no_rows():
    h, targets = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert linear_cross_entropy(h, torch.zeros(9, 4), targets, 30.0).shape == (0,)


# --- MLP: Quack's products are stood in for, their epilogues run as they are


def mlp_inputs(M, D, hidden, **kwargs):
    return [
        randn(*shape, seed=i, **kwargs)
        for i, shape in enumerate([(M, D), (hidden, D), (D, hidden)])
    ]


def scaled_mlp_inputs(M, D, hidden, **kwargs):
    scales = 1, D**-0.5, hidden**-0.5
    return [
        (t.detach() * scale).requires_grad_()
        for t, scale in zip(
            mlp_inputs(M, D, hidden, dtype=torch.bfloat16, **kwargs), scales, strict=True
        )
    ]


@pytest.fixture
def quack(monkeypatch):
    """quack's and cutlass's stand-ins on a GPU of capability 9.0, as far as anybody asks."""
    for name, module in quack_stub.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    train_gpt.mlp_gemms.cache_clear()
    yield
    train_gpt.mlp_gemms.cache_clear()


@pytest.mark.parametrize(
    ("M", "D", "hidden", "slope"),
    [(200, 64, 320, 0.3), (33, 40, 56, 0.0), (1, 8, 8, 1.0), (97, 16, 304, 0.2)],
)
def test_mlp_matches_float64(quack, M, D, hidden, slope):
    assert max(errors(leaky_relu_sq_mlp, mlp_ref, scaled_mlp_inputs(M, D, hidden), slope)) < 1e-2
    assert quack_stub.EpiMod.calls == [(M, hidden, D, False), (M, hidden, D, True)]


def test_mlp_keeps_leading_dimensions_and_strides(quack):
    x, w_up, w_down = scaled_mlp_inputs(15, 24, 40)
    flipped, down = x.view(5, 3, 24).transpose(0, 1), w_down.T.contiguous().T
    out = leaky_relu_sq_mlp(flipped, w_up.T.contiguous().T, down, 0.3)
    assert out.shape == (3, 5, 24)
    assert relative_error(out, mlp_ref(flipped.double(), w_up.double(), down.double(), 0.3)) < 1e-2


def test_mlp_takes_a_misaligned_base_and_an_odd_stride(quack):
    x, w_up, w_down = (t.detach() for t in scaled_mlp_inputs(30, 24, 40))
    base = torch.cat([x.flatten()[:1], x.flatten()])
    # the second counts as contiguous
    for rows in (base[1:].view(30, 24), base.as_strided((1, 24), (3, 1))):
        assert (
            relative_error(
                leaky_relu_sq_mlp(rows, w_up, w_down, 0.3), mlp_ref(rows, w_up, w_down, 0.3)
            )
            < 1e-2
        )


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_mlp_computes_only_what_is_needed(quack, needed):
    inputs = scaled_mlp_inputs(40, 16, 48)
    for tensor, need in zip(inputs, needed, strict=True):
        tensor.requires_grad_(bool(need))
    out = leaky_relu_sq_mlp(*inputs, 0.3)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    out.backward(weight.to(out.dtype))
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    mlp_ref(*doubles, 0.3).backward(weight.double())
    for tensor, double, need in zip(inputs, doubles, needed, strict=True):
        assert (tensor.grad is not None) == bool(need)
        assert not need or relative_error(tensor.grad, double.grad) < 1e-2
    assert len(quack_stub.EpiMod.calls) == 1 + bool(needed[0] or needed[1])


def check_activation_with_sign(inputs):
    """The saved activation: its lowest bit is the sign of the first product, its size right to
    a unit, unbiased.
    """
    x, w_up, w_down = (t.detach() for t in inputs)
    act, pre = torch.ops.golf.mlp.default(x, w_up, w_down, 0.3)[1], x.double() @ w_up.double().T
    sure = pre.abs() > 1e-3 * pre.std()  # farther from zero than the product's own rounding
    assert torch.equal((act.view(torch.int16) & 1 == 1)[sure], (pre < 0)[sure])
    assert 0.4 < (pre < 0).double().mean() < 0.6
    want = torch.nn.functional.leaky_relu(pre, 0.3).square()
    error = ((act.double() - want) / want)[pre.abs() > 0.1 * pre.std()]
    assert error.abs().max() < 1.1 * 2**-7 and error.mean().abs() < 0.1 * 2**-7


def test_mlp_activation_holds_the_sign_of_the_first_product(quack):
    check_activation_with_sign(scaled_mlp_inputs(256, 64, 320))


@pytest.mark.parametrize(("rows", "width"), [(5, 6), (0, 16)])
def test_mlp_with_unaligned_width_or_no_rows_takes_the_reference(rows, width):
    # rows of 12 bytes in 16 bits: no TMA; this runs without Quack or a GPU
    inputs = mlp_inputs(rows, width, 8)
    out = leaky_relu_sq_mlp(*inputs, 0.3)
    assert torch.equal(out, mlp_ref(*inputs, 0.3)) and torch.autograd.grad(out.sum(), inputs[1])[
        0
    ].any() == (rows > 0)


def test_mlp_compiles_into_one_graph(quack):
    compiled = torch.compile(leaky_relu_sq_mlp, fullgraph=True, backend="aot_eager")
    for tokens in (9, 14):
        inputs = scaled_mlp_inputs(tokens, 16, 24)
        assert (
            max(
                errors(
                    lambda *inputs: compiled(*inputs, 0.3),
                    lambda *inputs: mlp_ref(*inputs, 0.3),
                    inputs,
                )
            )
            < 1e-2
        )
    assert len(quack_stub.EpiMod.calls) == 4


# --- around attention


def heads_inputs(B, T, H, K, E, half, **kwargs):
    """qkv, gain; cos, sin, K."""
    angle = torch.linspace(0, 40, T * half).view(T, 1, half).to(kwargs.get("device", "cpu"))
    inputs = [randn(B, T, (H + 2 * K) * E, seed=1, **kwargs), randn(H, seed=2, **kwargs)]
    return inputs, (angle.cos(), angle.sin(), K)


def xsa_inputs(B, T, H, K, E, **kwargs):
    return [
        randn(*shape, seed=i, **kwargs)
        for i, shape in enumerate([(B, T, H, E), (B, T, K, E), (B, T, H)])
    ]


HEADS = [
    (1, 70, 8, 4, 8, 2),
    (2, 9, 4, 4, 6, 1),
    (3, 5, 3, 1, 10, 5),
    (1, 1, 2, 1, 64, 8),
    (1, 40, 6, 2, 16, 8),
]


@interpreted
@pytest.mark.parametrize("shape", HEADS)
def test_qkv_heads_kernel_matches_float64(shape):
    inputs, rest = heads_inputs(*shape)
    assert max(errors(train_gpt.qkv_heads, train_gpt.qkv_heads_ref, inputs, *rest)) < 2e-6


@interpreted
def test_qkv_heads_kernel_takes_positions_of_every_row():
    """Test-time training behind stale context: rows of a batch stand at positions of their own."""
    (qkv, gain), (cos, sin, kv_heads) = heads_inputs(*HEADS[1])
    angle = torch.randn(*qkv.shape[:2], *cos.shape[1:])
    rest = angle.cos(), angle.sin(), kv_heads
    assert max(errors(train_gpt.qkv_heads, train_gpt.qkv_heads_ref, (qkv, gain), *rest)) < 2e-6


def test_qkv_heads_reference_by_hand():
    """One head each: q has unit mean square, turned by its position's angle, times the gain; v
    is left alone.
    """
    qkv, angle = (
        torch.tensor([[[3.0, 4.0, 12.0, 0, 5.0, 0, 0, 1.0, 7.0, 8.0, 9.0, 1.0]]]),
        torch.full((1, 1, 1), 0.5),
    )
    q, k, v = train_gpt.qkv_heads_ref(qkv, torch.tensor([2.0]), angle.cos(), angle.sin(), 1)
    scale = 2 / 6.5  # sqrt((9 + 16 + 144) / 4)
    turned = [3 * math.cos(0.5) + 4 * math.sin(0.5), 4 * math.cos(0.5) - 3 * math.sin(0.5), 12, 0]
    assert torch.allclose(q.flatten(), scale * torch.tensor(turned))
    assert torch.allclose(k.square().mean(), torch.tensor(1.0)) and torch.equal(
        v.flatten(), qkv[0, 0, 8:]
    )


@interpreted
@pytest.mark.parametrize("shape", HEADS)
def test_gated_xsa_kernel_matches_float64(shape):
    inputs = xsa_inputs(*shape[:5])
    assert max(errors(train_gpt.gated_xsa, train_gpt.gated_xsa_ref, inputs)) < 2e-6


@interpreted
def test_gated_xsa_of_a_zero_value_only_gates():
    y, v, logits = xsa_inputs(1, 3, 2, 1, 8)
    with torch.no_grad():
        v[0, 1] = 0
    out = train_gpt.gated_xsa(y, v, logits)
    assert torch.allclose(out[0, 1], y[0, 1] * torch.sigmoid(logits[0, 1])[:, None])
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (y, v, logits)))


@interpreted
def test_kernels_around_attention_take_strided_inputs():
    inputs, rest = heads_inputs(2, 6, 4, 2, 8, 2)
    wide = torch.cat([inputs[0], inputs[0]], dim=-1)[..., : inputs[0].shape[-1]]
    for got, want in zip(
        train_gpt.qkv_heads(wide, inputs[1], *rest),
        train_gpt.qkv_heads_ref(wide, inputs[1], *rest),
        strict=True,
    ):
        assert relative_error(got, want) < 1e-6
    y, v, logits = xsa_inputs(2, 6, 4, 2, 8)
    strided = v.expand(3, *v.shape).movedim(0, -1)[..., 1], logits.mT.contiguous().mT
    got, want = train_gpt.gated_xsa(y, *strided), train_gpt.gated_xsa_ref(y, *strided)
    assert relative_error(got, want) < 1e-6


@interpreted
def test_kernels_around_attention_accept_no_rows():
    inputs, rest = heads_inputs(1, 0, 4, 2, 8, 2)
    assert [t.shape for t in train_gpt.qkv_heads(*inputs, *rest)] == [
        (1, 0, 4, 8),
        (1, 0, 2, 8),
        (1, 0, 2, 8),
    ]
    assert train_gpt.gated_xsa(*xsa_inputs(1, 0, 4, 2, 8)).shape == (1, 0, 4, 8)


# --- entry of a slot


def entry_inputs(shape, merges, **kwargs):
    """x, x0, mix, scale, window, and what merges: nothing, a skip with its weight, or with a
    gate too.
    """
    streams = [randn(*shape, seed=i, **kwargs) for i in range(3)]
    vectors = [
        randn(*size, shape[-1], seed=3 + i, **kwargs) for i, size in enumerate([(2,), (), ()])
    ]
    merge = {"nothing": (), "added": (streams[2], vectors[1]), "gated": (streams[2], *vectors[1:])}[
        merges
    ]
    return (
        *streams[:2],
        vectors[0],
        torch.full((1,), 0.6, device=kwargs.get("device", "cpu")),
        5,
        merge,
    )


def entry_errors(shape, merges, wants, dtype=torch.float32, op=None, **kwargs):
    """Relative errors of outputs and of all gradients against the reference in float64."""
    *args, merge = entry_inputs(shape, merges, **kwargs)
    args = [
        *(t.detach().to(dtype) for t in args[:3]),
        *args[3:],
        *wants,
        *(merge and (merge[0].detach().to(dtype),)),
        *merge[1:],
    ]
    found = []
    for function, exact in ((op or train_gpt.slot_input, False), (train_gpt.slot_input_ref, True)):
        inputs = [
            (a.detach().double() if exact else a.detach().clone()) if torch.is_tensor(a) else a
            for a in args
        ]
        leaves = [a.requires_grad_() for i, a in enumerate(inputs) if torch.is_tensor(a) and i != 3]
        outs = [t for t in function(*inputs) if t is not None]
        weights = [
            torch.linspace(-9, 9, t.numel(), device=t.device).cos().view(t.shape).to(t.dtype)
            for t in outs
        ]
        found.append([*outs, *torch.autograd.grad(outs, leaves, weights)])
    return [relative_error(got, want) for got, want in zip(*found, strict=True)]


ENTRIES = [(1, 13, 64), (2, 4, 48), (1, 1, 8), (1, 5, 200)]


@interpreted
@pytest.mark.parametrize("wants", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("merges", ["nothing", "added", "gated"])
@pytest.mark.parametrize("shape", ENTRIES)
def test_entry_kernel_matches_float64(shape, merges, wants):
    assert max(entry_errors(shape, merges, wants)) < 2e-6
    assert max(entry_errors(shape, merges, wants, torch.bfloat16)) < 1e-2


def test_entry_reference_by_hand():
    x, x0, skip = (torch.tensor([[value]]) for value in ([1.0, 2.0], [3.0, 5.0], [7.0, 1.0]))
    mix, weight, gate = (
        torch.tensor([[2.0, 1], [1, -1]]),
        torch.tensor([1.0, 4]),
        torch.tensor([0.0, 100]),
    )
    merge = skip, weight, gate
    h, start, mixed, merged = train_gpt.slot_input_ref(
        x, x0, mix, torch.full((1,), 0.5), 1, True, True, *merge
    )
    assert merged.flatten().tolist() == [4.0, 2.0] and mixed.flatten().tolist() == [11.0, -3.0]
    assert torch.allclose(h.flatten(), torch.tensor([11.0, -3.0]) / 65**0.5 / 2) and torch.equal(
        start, h[..., :1]
    )
    *_, mixed, merged = train_gpt.slot_input_ref(
        x, x0, mix, torch.ones(1), 1, False, True, skip, weight
    )
    assert mixed is None and merged.flatten().tolist() == [8.0, 6.0]


@interpreted
@pytest.mark.parametrize("needed", ["x", "x0 x", "skip x", "mix weight gate"])
def test_entry_computes_gradients_of_some_inputs(needed):
    names = "x", "x0", "mix", "skip", "weight", "gate"
    *args, merge = entry_inputs((2, 5, 24), "gated")
    tensors = [*args[:3], *merge]
    found = []
    for op in (train_gpt.slot_input, train_gpt.slot_input_ref):
        inputs = [
            t.detach().requires_grad_(name in needed.split())
            for name, t in zip(names, tensors, strict=True)
        ]
        outs = op(*inputs[:3], *args[3:], True, True, *inputs[3:])
        found.append(
            torch.autograd.grad(
                sum(t.square().sum() for t in outs), [t for t in inputs if t.requires_grad]
            )
        )
    assert all(relative_error(got, want) < 1e-5 for got, want in zip(*found, strict=True))


@interpreted
def test_entry_compiles_into_one_graph_for_any_number_of_rows():
    *args, merge = entry_inputs((2, 9, 16), "gated")

    def step(x, x0, mix, *merge):
        h, start, mixed, merged = train_gpt.slot_input(x, x0, mix, *args[3:], True, True, *merge)
        return (h * mixed).sum() + (start * merged[..., :5]).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 14):
        inputs = [randn(2, tokens, 16, seed=i) for i in range(2)] + [
            args[2],
            randn(2, tokens, 16, seed=7),
            *merge[1:],
        ]
        got, want = (
            torch.autograd.grad(function(*inputs), inputs) for function in (compiled, step)
        )
        assert all(relative_error(g, w) < 1e-6 for g, w in zip(got, want, strict=True))


@interpreted
def test_entry_accepts_no_rows():
    *args, merge = entry_inputs((1, 0, 16), "gated")
    h, *_ = train_gpt.slot_input(*args, True, False, *merge)
    assert h.shape == (1, 0, 16) and not torch.autograd.grad(h.sum(), merge[1])[0].any()


# --- AdamW of rows


@interpreted
@pytest.mark.parametrize(("rows", "width"), [(3, 7), (1, 1024), (5, 2500), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_kernel_matches_float64_in_some_columns_of_its_rows(rows, width, dtype):
    whole, part = (
        [randn(rows + 1, width + 5, seed=i).detach() for i in range(2)],
        slice(3, 3 + width),
    )
    whole[1] = whole[1].square()
    before = [t.double() for t in whole]
    # reads its columns, which are strided
    table = torch.stack([torch.randperm(rows), torch.arange(rows) + 1], 1)
    # one document ends: its row stays
    table[:, 1] = table[:, 0].where(table[:, 0] > 0, torch.tensor(rows))
    gradient, correction = randn(rows, width, seed=2, dtype=dtype).detach(), torch.rand(rows) + 0.1
    rest = gradient, *table.unbind(1), correction, 1.8, (0.1, 0.5, 0.9)
    train_gpt.adamw_rows(*(t[:, part] for t in whole), *rest)
    train_gpt.adamw_rows_ref(*(t[:, part] for t in before), gradient.double(), *rest[1:])
    for got, want in zip(whole, before, strict=True):
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6)


# --- custom ops under torch.compile


@interpreted
def test_ops_register_schema_fake_and_autograd_correctly(quack):
    head, targets = head_inputs(6, 4, 20, 5)
    ops, check = torch.ops.golf, torch.library.opcheck
    check(ops.linear_cross_entropy.default, (*head, targets, 30.0))
    x, w_up, w_down = scaled_mlp_inputs(10, 8, 16)
    check(ops.mlp.default, (x, w_up, w_down, 0.3))
    act = torch.rand(10, 16).bfloat16()
    check(ops.mlp_backward.default, (x.detach(), w_down.detach(), act, 0.3))
    inputs, rest = heads_inputs(2, 5, 4, 2, 8, 2)
    heads = [t.detach() for t in train_gpt.qkv_heads_ref(*inputs, *rest)]
    check(ops.qkv_heads.default, (*inputs, *rest))
    check(ops.qkv_heads_backward.default, (*heads, *(t.detach() for t in inputs), *rest))
    *args, merge = entry_inputs((2, 5, 24), "gated")
    x, x0, mix, *merge = (t.detach() for t in (*args[:3], *merge))
    grads = [x, x[..., :5].contiguous(), x0, x.new_empty(0)]
    check(ops.slot_input_backward.default, (grads, x, x0, mix, args[3], merge, True, False))
    *args, merge = entry_inputs((2, 5, 24), "gated")
    check(ops.slot_input.default, (*args[:4], list(merge), 5, True, False))
    check(ops.slot_input.default, (*args[:4], [], 5, True, True))
    y, v, gates = (t.detach().requires_grad_() for t in xsa_inputs(2, 5, 4, 2, 8))
    check(ops.gated_xsa.default, (y, v, gates))
    check(
        ops.gated_xsa_backward.default,
        (torch.randn(2, 5, 4, 8), *(t.detach() for t in (y, v, gates))),
    )


@interpreted
@pytest.mark.parametrize("dynamic", [False, True])
def test_ops_compile_into_one_graph(dynamic):
    def step(x, head, targets):
        hidden = x + x.square()
        return linear_cross_entropy(hidden.flatten(0, 1), head, targets, 30.0).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (9, 14):
        inputs = [randn(2, tokens, 16, seed=1), randn(50, 16, seed=5)]
        targets = torch.arange(2 * tokens)
        got, want = compiled(*inputs, targets), step(*inputs, targets)
        assert torch.allclose(got, want)
        for g, w in zip(
            torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True
        ):
            assert relative_error(g, w) < 1e-6


# --- attention

SEGMENTATIONS = {  # cu_seqlens, max_seqlen
    "one document": ([0, 40], 40),
    "window longer than the row": ([0, 11, 40], 64),
    "several": ([0, 7, 8, 20, 33, 40], 13),
    "padded": ([0, 7, 20, 40, 40, 40, 40], 20),
    "full windows": ([0, 10, 20, 30, 40], 10),
    "pieces of a long document": ([0, 3, 19, 35, 36, 40], 16),
    "single tokens": (list(range(41)), 1),
    "window of one more than the longest": ([0, 15, 30, 40, 40], 16),
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_packed_sdpa_matches_a_loop_over_documents(name, heads):
    bounds, max_seqlen = SEGMENTATIONS[name]
    inputs = packed_qkv(40, *heads, dtype=torch.float64)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    assert (
        max(errors(attention_sdpa, attention_by_document, inputs, cu_seqlens, max_seqlen)) < 1e-12
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_sdpa_rows_are_documents_without_cu_seqlens(heads):
    H, K = heads
    inputs = [randn(3, 20, n, 8, seed=i, dtype=torch.float64) for i, n in enumerate((H, K, K))]

    def by_document(q, k, v, cu_seqlens, max_seqlen):
        bounds = torch.arange(4) * 20
        flat = (t.reshape(1, 60, -1, 8) for t in (q, k, v))
        return attention_by_document(*flat, bounds, 20).view(q.shape)

    assert max(errors(attention_sdpa, by_document, inputs, None, 20)) < 1e-12


def test_sdpa_sees_neither_other_documents_nor_the_future():
    q, k, v = (t.detach() for t in packed_qkv(40, 4, 2))
    cu_seqlens = torch.tensor([0, 9, 22, 40, 40], dtype=torch.int32)
    before = attention_sdpa(q, k, v, cu_seqlens, 18)
    k[0, 15], v[0, 15] = 50.0, -50.0  # position 15 of document 9..21
    changed = (attention_sdpa(q, k, v, cu_seqlens, 18) != before).flatten(2).any(-1)[0]
    assert changed[15:22].all() and not changed[:15].any() and not changed[22:].any()


def test_sdpa_compiles_into_one_graph_for_all_segmentations():
    compiled = torch.compile(attention_sdpa, fullgraph=True, backend="aot_eager")
    inputs = packed_qkv(40, 4, 2, dtype=torch.float64)
    for bounds in ([0, 5, 13, 26, 40, 40], [0, 14, 28, 40, 40, 40]):
        args = torch.tensor(bounds, dtype=torch.int32), 14
        assert max(errors(compiled, attention_by_document, inputs, *args)) < 1e-12
    rows = torch.compile(attention_sdpa, fullgraph=True, backend="aot_eager", dynamic=True)
    for B, T in ((2, 12), (3, 17)):
        q, k, v = (randn(B, T, n, 8, seed=n) for n in (4, 2, 2))
        assert torch.allclose(rows(q, k, v, None, T), attention_sdpa(q, k, v, None, T), atol=1e-6)


def dense_varlen(q, k, v, cu_seqlens, window=0, of_keys=None):
    """Stand-in for a varlen library: q (tokens, H, E) -> out (tokens, H, E), lse (H, tokens)."""
    (tokens, H, E), of_keys = q.shape, cu_seqlens if of_keys is None else of_keys
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))
    mine, yours = (
        torch.searchsorted(cu, torch.arange(n).to(cu.dtype), right=True)
        for cu, n in ((cu_seqlens, tokens), (of_keys, len(k)))
    )
    to_end, ends = (
        torch.nn.functional.pad(cu, (0, 1), value=n)
        for cu, n in ((cu_seqlens, tokens), (of_keys, len(k)))
    )
    # the last query is at the last key
    at = (torch.arange(tokens) - to_end[mine] + ends[mine])[:, None]
    key = torch.arange(len(k))
    hidden = (mine[:, None] != yours) | (at < key) | (at > key + (window or len(k)))
    scores = (torch.einsum("qhe,khe->hqk", q, k) / math.sqrt(E)).masked_fill(hidden, -math.inf)
    return torch.einsum("hqk,khe->qhe", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.fixture
def fa3_stub(monkeypatch):
    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=False, window_size=(0, 0)):
        assert causal and max_q == max_k and cu_q.dtype == cu_k.dtype == torch.int32
        return dense_varlen(q, k, v, cu_q, window_size[0], cu_k)[0]

    module = ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)


@pytest.fixture
def fa4_stub(monkeypatch):
    """The two functions of flash-attn-4 4.0.0b36 that we call, with the names and results of
    that version.
    """

    def _flash_attn_fwd(
        q,
        k,
        v,
        *,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        return_lse,
        window_size_left=None,
    ):
        assert (
            causal
            and return_lse
            and max_seqlen_q == max_seqlen_k
            and softmax_scale == q.shape[-1] ** -0.5
        )
        return (
            *dense_varlen(q, k, v, cu_seqlens_q, window_size_left, cu_seqlens_k),
            None,
            None,
            None,
        )

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        *,
        softmax_scale,
        causal,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dq,
        dk,
        dv,
        window_size_left=None,
    ):
        # or FlashAttention-4 adds in fp32 buffers, which takes longer
        assert q.shape[1] == k.shape[1]
        again, lse_again = dense_varlen(q, k, v, cu_seqlens_q, window_size_left, cu_seqlens_k)
        assert torch.allclose(again, out, atol=1e-5) and torch.allclose(lse_again, lse, atol=1e-5)
        # through vjp: inside a custom op plain autograd is switched off
        _, vjp = torch.func.vjp(
            lambda *qkv: dense_varlen(*qkv, cu_seqlens_q, window_size_left, cu_seqlens_k)[0],
            q,
            k,
            v,
        )
        for into, grad in zip((dq, dk, dv), vjp(dout), strict=True):
            into.copy_(grad)
        return dq, dk, dv

    names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]]._flash_attn_fwd = _flash_attn_fwd
    sys.modules[names[-1]]._flash_attn_bwd = _flash_attn_bwd


@pytest.mark.parametrize("backend", [attention_fa3, attention_fa4], ids=["fa3", "fa4"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_flash_backends_pass_packed_documents_and_rows_on(backend, heads, fa3_stub, fa4_stub):
    bounds, max_seqlen = SEGMENTATIONS["padded"]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    assert (
        max(errors(backend, attention_by_document, packed_qkv(40, *heads), cu_seqlens, max_seqlen))
        < 1e-5
    )
    rows = [randn(3, 10, n, 8, seed=i) for i, n in enumerate((heads[0], heads[1], heads[1]))]
    assert max(errors(backend, attention_sdpa, rows, None, 10)) < 1e-5


@pytest.mark.parametrize(
    "backend", [attention_sdpa, attention_fa3, attention_fa4], ids=["sdpa", "fa3", "fa4"]
)
@pytest.mark.parametrize("window", [1, 3, 9, 50])
def test_windows_hide_what_lies_further_back(backend, window, fa3_stub, fa4_stub):
    bounds, max_seqlen = SEGMENTATIONS["padded"]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)

    def dense(q, k, v, cu_seqlens, max_seqlen, window):
        return dense_varlen(q[0], k[0], v[0], cu_seqlens, window)[0][None]

    def dense_rows(q, k, v, cu_seqlens, max_seqlen, window):
        rows = torch.arange(4, dtype=torch.int32) * 10
        return dense_varlen(*(t.flatten(0, 1) for t in (q, k, v)), rows, window)[0].view(q.shape)

    assert max(errors(backend, dense, packed_qkv(40, 4, 2), cu_seqlens, max_seqlen, window)) < 1e-5
    rows = [randn(3, 10, n, 8, seed=i) for i, n in enumerate((4, 2, 2))]
    assert max(errors(backend, dense_rows, rows, None, 10, window)) < 1e-5


BACKENDS = {"torch": train_gpt.attention_torch, "fa3": attention_fa3, "fa4": attention_fa4}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_queries_may_be_fewer_than_keys(backend, compiled, heads, fa3_stub, fa4_stub, monkeypatch):
    """They are at the last positions of their document; what lies behind the last document gets
    no gradient.
    """
    of_q, of_k = [0, 5, 6, 10, 14], [0, 5, 17, 21, 34]  # as many, one, as many, fewer
    monkeypatch.setattr(
        train_gpt,
        "varlen_attn",
        lambda q, k, v, cu_q, cu_k, *_, window_size: dense_varlen(q, k, v, cu_q, 0, cu_k)[0],
    )
    q, k, v = (
        randn(1, n, h, 8, seed=i)
        for i, (n, h) in enumerate(((14, heads[0]), (40, heads[1]), (40, heads[1])))
    )

    def by_document(q, k, v, cu_seqlens, max_seqlen):
        k, v = (t.repeat_interleave(heads[0] // heads[1], 2) for t in (k, v))
        outs = []
        for a, b, c, d in zip(of_q, of_q[1:], of_k, of_k[1:], strict=False):
            seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
            scores = torch.einsum("qhe,khe->hqk", q[0, a:b], k[0, c:d]) / 8**0.5
            outs.append(
                torch.einsum(
                    "hqk,khe->qhe", scores.masked_fill(~seen, -math.inf).softmax(-1), v[0, c:d]
                )
            )
        return torch.cat(outs)[None]

    op = (
        torch.compile(BACKENDS[backend], backend="aot_eager", fullgraph=True)
        if compiled
        else BACKENDS[backend]
    )
    cu_seqlens = torch.tensor([of_q, of_k], dtype=torch.int32)
    assert max(errors(op, by_document, (q, k, v), cu_seqlens, 13)) < 1e-5


@pytest.mark.parametrize("window", [0, 3, 7])
def test_stale_context_is_the_same_with_queries_for_the_own_keys_alone(window, fa4_stub):
    ops = {
        name: SimpleNamespace(names={"attention": name}, attention=backend)
        for name, backend in (("sdpa", attention_sdpa), ("fa4", attention_fa4))
    }
    (B, T, older), cache = (
        (3, 5, (0, 4, 9)),
        torch.randn(2, 30, 2, 8, generator=torch.Generator().manual_seed(1)),
    )
    ends = torch.tensor(older).add(T).cumsum(0)
    cu_seqlens = torch.stack((torch.arange(B + 1) * T, torch.nn.functional.pad(ends, (1, 0)))).int()
    places = torch.randint(30, (B * 14,), generator=torch.Generator().manual_seed(2))
    fresh = (ends[:, None] + torch.arange(-T, 0)).flatten()
    qkv = [randn(B, T, heads, 8, seed=i) for i, heads in enumerate((4, 2, 2))]

    def run(name):
        def attend(*qkv):
            segments = train_gpt.StaleSegments(
                cache.to(qkv[0].dtype), places, fresh, cu_seqlens, 14, []
            )
            return segments.attend(ops[name], *qkv, window)

        return attend

    assert max(errors(run("fa4"), run("sdpa"), qkv)) < 1e-5


def test_torch_backend_asks_for_windows(monkeypatch):
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, -1)):
        return dense_varlen(q, k, v, cu_q, window_size[0] if window_size[0] > 0 else 0)[0]

    monkeypatch.setattr(train_gpt, "varlen_attn", varlen_attn)
    cu_seqlens, qkv = torch.tensor([0, 7, 20, 40], dtype=torch.int32), packed_qkv(40, 4, 2)
    assert max(errors(train_gpt.attention_torch, attention_sdpa, qkv, cu_seqlens, 20, 5)) < 1e-5


def test_fa4_op_compiles_into_one_dynamic_graph(fa4_stub):
    compiled = torch.compile(attention_fa4, fullgraph=True, backend="aot_eager", dynamic=True)
    for B, T in ((2, 12), (3, 17)):
        rows = [randn(B, T, n, 8, seed=i) for i, n in enumerate((4, 2, 2))]
        assert max(errors(compiled, attention_sdpa, rows, None, T)) < 1e-5
    packed = torch.compile(attention_fa4, fullgraph=True, backend="aot_eager")
    for bounds in ([0, 5, 13, 26, 40, 40], [0, 14, 28, 40, 40, 40]):
        args = torch.tensor(bounds, dtype=torch.int32), 14
        assert max(errors(packed, attention_by_document, packed_qkv(40, 4, 2), *args)) < 1e-5


def test_torch_backend_is_causal_and_repeats_heads(monkeypatch):
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size):
        assert window_size == (-1, 0) and q.shape == k.shape == v.shape
        return dense_varlen(q, k, v, cu_q)[0]

    monkeypatch.setattr(train_gpt, "varlen_attn", varlen_attn)
    cu_seqlens = torch.tensor([0, 7, 20, 40, 40], dtype=torch.int32)
    assert (
        max(
            errors(
                train_gpt.attention_torch,
                attention_by_document,
                packed_qkv(40, 4, 2),
                cu_seqlens,
                20,
            )
        )
        < 1e-5
    )


# --- selection


def select(backend="auto", dtype=torch.float32):
    return select_ops(tiny_hp(attention_backend=backend), CPU, dtype)


def compare_trellis(op, device, B, T):
    """_trellis_kernel adds up in the reference's order and without fused multiply-adds."""
    generator = torch.Generator().manual_seed(T)
    values = (6 * torch.randn(B, T, generator=generator)).to(device)
    levels = op(values)
    assert torch.equal(levels, train_gpt.trellis_round_ref(values))


@interpreted
@pytest.mark.parametrize("B, T", [(1, 1), (3, 2), (5, 67), (2, 256)])
def test_the_trellis_kernel_takes_the_levels_of_the_reference(B, T):
    compare_trellis(train_gpt.trellis_round, "cpu", B, T)


@gpu
@pytest.mark.parametrize("B, T", [(1, 1), (22, 512), (352, 256)])
def test_the_trellis_kernel_takes_the_levels_of_the_reference_on_the_gpu(B, T):
    compare_trellis(train_gpt.trellis_round, "cuda", B, T)


def test_auto_on_cpu_takes_the_references():
    ops = select()
    assert (ops.attention, ops.mlp, ops.cross_entropy) == (
        attention_sdpa,
        mlp_ref,
        linear_cross_entropy_ref,
    )
    assert (ops.qkv_heads, ops.gated_xsa) == (train_gpt.qkv_heads_ref, train_gpt.gated_xsa_ref)
    assert (ops.slot_input, ops.adamw_rows) == (train_gpt.slot_input_ref, train_gpt.adamw_rows_ref)
    kinds = "mlp", "cross_entropy", "qkv_heads", "gated_xsa", "enter", "adamw_rows", "trellis_round"
    assert ops.names == {"attention": "sdpa"} | dict.fromkeys(kinds, "reference")


@pytest.mark.parametrize("columns, trellis", [(True, True), (True, False), (False, True)])
def test_the_trellis_is_tried_where_its_settings_are_on(monkeypatch, columns, trellis):
    tried = []
    trial_inputs = train_gpt.trellis_round_trial_inputs

    def note_trial(*arguments):
        tried.append(True)
        return trial_inputs(*arguments)

    monkeypatch.setattr(train_gpt, "trellis_round_trial_inputs", note_trial)
    hp = tiny_hp(gptq_column_steps=columns, gptq_trellis=trellis)
    ops = select_ops(hp, CPU, torch.float32)
    assert ops.trellis_round is train_gpt.trellis_round_ref
    assert bool(tried) == (columns and trellis) == ("trellis_round" in ops.names)


def test_selection_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    select()
    assert torch.equal(before, torch.get_rng_state())


def test_fa3_is_selected_by_name_where_it_can_be_imported(fa3_stub):
    assert select("fa3").attention is attention_fa3


@pytest.mark.parametrize("backend", ["fa3", "fa4", "torch"])
def test_named_backend_that_does_not_work_is_an_error_with_its_reason(backend, monkeypatch):
    for module in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    with pytest.raises(
        ValueError, match=rf"={backend} does not work here: attention {backend}: \w+Error\(.\w"
    ):
        select(backend)


def test_unknown_backend_is_an_error_that_lists_the_known():
    known = ", ".join(["auto", *ATTENTION_BACKENDS])
    with pytest.raises(train_gpt.SettingError, match=f"must be one of {known}$"):
        select("flash")


def one_document(q, k, v, cu_seqlens, max_seqlen):
    return attention_sdpa(q, k, v, None, q.shape[1])


def no_backward(*args):
    return attention_sdpa(*args).detach()


def first_that_works(kind, candidates, reference, args, notes):
    operation = train_gpt.Operation(candidates, reference, trial_inputs=None)
    return train_gpt._first_that_works(kind, operation, args, notes)


@pytest.mark.parametrize(
    ("candidate", "reason"), [(one_document, "disagrees"), (no_backward, "RuntimeError")]
)
def test_wrong_attention_backend_is_passed_over(candidate, reason):
    args, notes = (*packed_qkv(40, 4, 2), torch.tensor([0, 20, 40], dtype=torch.int32), 20), []
    candidates = {"fa3": candidate, "sdpa": attention_sdpa}
    assert first_that_works("attention", candidates, attention_sdpa, args, notes) == "sdpa"
    assert len(notes) == 1 and f"attention fa3: {reason}" in notes[0]


def raising(*_):
    raise RuntimeError("out of resource: shared memory\nsecond line")


def twice_the_gradient(*inputs):
    """The reference's output to the bit."""
    out = mlp_ref(*inputs)
    return out + (out - out.detach())


@pytest.mark.parametrize(
    ("kernel", "note"),
    [
        (raising, "mlp triton: RuntimeError('out of resource: shared memory"),
        (twice_the_gradient, "mlp triton: disagrees with the reference"),
        (lambda x, u, d, slope: mlp_ref(x, u, d, 0.0), "mlp triton: disagrees with the reference"),
        (
            lambda x, u, d, slope: mlp_ref(x, u, d, slope) * math.nan,
            "mlp triton: disagrees with the reference",
        ),
    ],
)
def test_reference_is_used_when_a_kernels_trial_fails(kernel, note):
    args, notes = (*mlp_inputs(10, 8, 12), 0.3), []
    candidates = {"triton": kernel, "reference": mlp_ref}
    assert first_that_works("mlp", candidates, mlp_ref, args, notes) == "reference"
    assert len(notes) == 1 and notes[0].startswith(note) and "\n" not in notes[0]


def test_kernel_that_agrees_is_used():
    args, notes = (*mlp_inputs(10, 8, 12), 0.3), []
    candidates = {"triton": lambda *inputs: mlp_ref(*inputs) * 1.001, "reference": mlp_ref}
    assert first_that_works("mlp", candidates, mlp_ref, args, notes) == "triton" and not notes


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_triton_kernel_passes_its_trial(monkeypatch, dtype):
    monkeypatch.setattr(train_gpt, "use_kernels", lambda hp, device: True)
    ops = select("sdpa", dtype)
    others = {kind for kind, name in ops.names.items() if name != "triton"}
    assert others == {"attention", "mlp"}, ops.notes


def test_the_trial_of_adamw_sees_a_missing_update():
    args = train_gpt.adamw_rows_trial_inputs(tiny_hp(), torch.float32)
    candidates = {"idle": lambda values, squares, *_: (values, squares)}
    assert first_that_works("adamw", candidates, train_gpt.adamw_rows_ref, args, []) is None


def select_mlp(monkeypatch, dtype=torch.bfloat16):
    """The operations that select_ops takes where kernels are wanted on the CPU, and its notes
    on the MLP; no other kernel works.
    """
    monkeypatch.setattr(train_gpt, "use_kernels", lambda hp, device: True)
    for name in ("linear_cross_entropy", "qkv_heads", "gated_xsa", "slot_input", "adamw_rows"):
        monkeypatch.setattr(train_gpt, name, raising)
    ops = select("sdpa", dtype)
    assert ops.names["cross_entropy"] == "reference"
    return ops, [note for note in ops.notes if note.startswith("mlp ")]


def test_quack_is_taken_where_it_works(quack, monkeypatch):
    ops, notes = select_mlp(monkeypatch)
    assert ops.names["mlp"] == "quack" and not notes
    # edges of tiles both ways
    assert quack_stub.EpiMod.calls == [(200, 320, 64, False), (200, 320, 64, True)]
    inputs = scaled_mlp_inputs(50, 16, 24)
    assert max(errors(ops.mlp, mlp_ref, inputs, 0.3)) < 1e-2
    assert quack_stub.EpiMod.calls[2:] == [(50, 24, 16, False), (50, 24, 16, True)]


def fingerprint(function):
    raise TypeError(
        "epilogue fn depends on <ContextVar name='x'>, which has no fail-closed semantic key."
        " Supported:"
    )


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        ("missing", "mlp quack: ModuleNotFoundError('import of cutlass halted"),
        ("capability", "mlp quack: ValueError('needs sm_90 and bfloat16')"),
        ("dtype", "mlp quack: ValueError('needs sm_90 and bfloat16')"),
        ("fingerprint", 'mlp quack: TypeError("epilogue fn depends on <ContextVar'),
        ("wrong", "mlp quack: disagrees with the reference, relative errors "),
    ],
)
def test_quack_is_refused_with_a_note(quack, monkeypatch, fault, note):
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "cutlass", None)
    elif fault == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (10, 0))
    elif fault == "fingerprint":
        monkeypatch.setattr(sys.modules["quack.epilogue"], "EpiMod", fingerprint)
    elif fault == "wrong":
        monkeypatch.setattr(
            sys.modules["cutlass"], "select_", lambda condition, right, left: torch.tensor(right)
        )
    ops, notes = select_mlp(monkeypatch, torch.float32 if fault == "dtype" else torch.bfloat16)
    assert ops.names["mlp"] == "reference" and len(notes) == 1 and notes[0].startswith(note)


def test_nothing_of_quack_is_imported_on_the_cpu(monkeypatch):
    for name in ("quack", "quack.epilogue", "cutlass"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    select()
    assert not {"quack", "cutlass"} & sys.modules.keys()


# --- on the GPU, bf16


def select_on_the_gpu(backend="auto", num_heads=8, num_kv_heads=4):
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    hp = tiny_hp(device="cuda", attention_backend=backend, model_dim=64 * num_heads, **heads)
    return select_ops(hp, torch.device("cuda"), torch.bfloat16)


def quack_on_the_gpu():
    ops = select_on_the_gpu("sdpa")
    if ops.names["mlp"] != "quack":
        pytest.skip(next(note for note in ops.notes if note.startswith("mlp quack")))


@gpu
@pytest.mark.parametrize(
    ("M", "D", "hidden"), [(4096, 512, 2048), (1000, 512, 1792), (777, 264, 1032), (1, 64, 72)]
)
def test_mlp_matches_float64_on_the_gpu(M, D, hidden):
    quack_on_the_gpu()
    assert (
        max(errors(leaky_relu_sq_mlp, mlp_ref, scaled_mlp_inputs(M, D, hidden, device="cuda"), 0.3))
        < 1e-2
    )


@gpu
def test_mlp_activation_holds_the_sign_of_the_first_product_on_the_gpu():
    quack_on_the_gpu()
    check_activation_with_sign(mlp_inputs(512, 512, 2048, dtype=torch.bfloat16, device="cuda"))


@gpu
@pytest.mark.parametrize(
    ("M", "D", "hidden"), [(4096, 512, 2048), (1000, 512, 1792), (777, 264, 1032), (1, 64, 72)]
)
def test_mlp_on_the_gpu_has_the_bits_of_its_stand_in(M, D, hidden, request):
    """Where the products are exact, whatever the order of their sums: few bits in each operand."""
    quack_on_the_gpu()
    generator = torch.Generator().manual_seed(M)
    x, grad, w_up, w_down = (
        (torch.randint(-8, 9, shape, generator=generator) / 8).bfloat16()
        for shape in ((M, D), (M, D), (hidden, D), (D, hidden))
    )
    act = torch.ops.golf.mlp.default(*(t.cuda() for t in (x, w_up, w_down)), 0.3)[1]
    got = act, torch.ops.golf.mlp_backward.default(grad.cuda(), w_down.cuda(), act, 0.3)
    request.getfixturevalue("quack")
    want = torch.ops.golf.mlp.default(x, w_up, w_down, 0.3)[1]
    want = want, torch.ops.golf.mlp_backward.default(grad, w_down, want, 0.3)
    assert torch.equal(got[0].cpu().view(torch.int16), want[0].view(torch.int16))
    assert relative_error(got[1].cpu(), want[1]) < 1e-3  # its root is a fast one


@gpu
@pytest.mark.parametrize(("rows", "vocab"), [(2048, 8192), (300, 1000), (100, 50257)])
def test_cross_entropy_kernel_matches_float64_on_the_gpu(rows, vocab):
    inputs, targets = head_inputs(rows, 64, vocab, 10, dtype=torch.bfloat16, device="cuda")
    assert max(errors(linear_cross_entropy, linear_ce_float64, inputs, targets, 30.0)) < 1e-2


@gpu
def test_kernels_around_attention_match_float64_on_the_gpu():
    kwargs = {"dtype": torch.bfloat16, "device": "cuda"}
    inputs, rest = heads_inputs(2, 777, 8, 4, 64, 8, **kwargs)
    assert max(errors(train_gpt.qkv_heads, train_gpt.qkv_heads_ref, inputs, *rest)) < 1e-2
    assert (
        max(
            errors(
                train_gpt.gated_xsa,
                train_gpt.gated_xsa_ref,
                xsa_inputs(2, 777, 8, 4, 64, **kwargs),
            )
        )
        < 1e-2
    )


@gpu
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("merges", ["nothing", "added", "gated"])
def test_entry_matches_float64_on_the_gpu(merges, opened):
    """As an operation, and opened by the compiler."""
    hp = train_gpt.Hyperparameters(device="cuda", compile="1" if opened else "0")
    op = train_gpt.compiled(train_gpt.slot_input, hp, train_gpt.Dist("cuda"))
    for wants in ((True, False), (False, True), (True, True)):
        assert (
            max(entry_errors((1, 3001, 512), merges, wants, torch.bfloat16, op, device="cuda"))
            < 1e-2
        )


@gpu
@pytest.mark.parametrize("heads", [(8, 8), (8, 4)])
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_attention_backend_matches_float64_on_the_gpu(backend, heads):
    try:
        ops = select_on_the_gpu(backend, *heads)
    except ValueError as error:
        pytest.skip(str(error))
    inputs = packed_qkv(3000, *heads, E=64, dtype=torch.bfloat16, device="cuda")
    cu_seqlens = torch.tensor(
        [0, 700, 701, 1213, 2000, 3000, 3000, 3000], dtype=torch.int32, device="cuda"
    )
    assert max(errors(ops.attention, attention_sdpa, inputs, cu_seqlens, 1000)) < 1e-2
    rows = [
        randn(3, 500, n, 64, seed=i, dtype=torch.bfloat16, device="cuda")
        for i, n in enumerate((heads[0], heads[1], heads[1]))
    ]
    assert max(errors(ops.attention, attention_sdpa, rows, None, 500)) < 1e-2


@gpu
def test_auto_takes_the_kernels_and_compiles_into_one_graph_on_the_gpu():
    ops = select_on_the_gpu()
    assert all(
        name in ("triton", "quack") for kind, name in ops.names.items() if kind != "attention"
    ), ops.notes
    assert ops.names["attention"] != "sdpa", ops.notes

    def step(q, k, v, w_up, w_down, head, targets, cu_seqlens):
        h = ops.attention(q, k, v, cu_seqlens, 512).flatten(0, 1).flatten(1)
        return ops.cross_entropy(h + ops.mlp(h, w_up, w_down, 0.3), head, targets, 30.0)

    kwargs = {"dtype": torch.bfloat16, "device": "cuda"}
    inputs = packed_qkv(1024, 8, 4, E=64, **kwargs)
    weights = [
        (randn(*shape, seed=1).detach() / 23).to(**kwargs).requires_grad_()
        for shape in ((2048, 512), (512, 2048), (8192, 512))
    ]
    targets = torch.arange(1024, device="cuda")
    cu_seqlens = torch.tensor([0, 100, 612, 1024, 1024], dtype=torch.int32, device="cuda")
    args = (*inputs, *weights, targets, cu_seqlens)
    got, want = torch.compile(step, fullgraph=True)(*args), step(*args)
    assert relative_error(got, want) < 1e-2
    leaves = [*inputs, *weights]
    for g, w in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True
    ):
        assert relative_error(g, w) < 1e-2


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.filterwarnings("ignore")  # sizes of 1, which a trace always takes as they are
@pytest.mark.parametrize(
    "operation, trial_inputs, tokens_at",
    [
        (linear_cross_entropy, train_gpt.cross_entropy_trial_inputs, 0),
        (leaky_relu_sq_mlp, train_gpt.mlp_trial_inputs, 0),
        (train_gpt.qkv_heads, train_gpt.qkv_heads_trial_inputs, 1),
        (train_gpt.gated_xsa, train_gpt.gated_xsa_trial_inputs, 1),
        (train_gpt.slot_input, train_gpt.slot_input_trial_inputs, 0),
        (attention_fa4, train_gpt.attention_trial_inputs, 1),
    ],
)
def test_one_graph_serves_any_number_of_tokens(operation, trial_inputs, tokens_at):
    """What an operation says about its result's shape must not fix the number of tokens.

    Test-time training, whose steps have many sizes, would otherwise compile under its clock.
    """
    args = trial_inputs(tiny_hp(), torch.float32)
    any_size = torch.export.Dim.AUTO
    sizes = [dict.fromkeys(range(a.dim()), any_size) if torch.is_tensor(a) else None for a in args]
    traced = torch.export.export(
        Call(operation), args, dynamic_shapes=(tuple(sizes),), strict=False
    )
    first = next(node for node in traced.graph.nodes if node.op == "placeholder")
    assert not is_concrete_int(first.meta["val"].shape[tokens_at])
