"""torch.compile: every graph is made once, before the training clock starts, and gives the scores
of
eager mode.

On the CPU the graphs are traced and differentiated but run eagerly (`aot_eager`); with a GPU they
are built in full.
"""

import copy
import dataclasses
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import IN_SOAK, install_parts_for, tiny_hp, write_documents

import train_gpt

# tails, lone BOS, one-token documents
VAL = [200, 90, 33, 1, 8, 0, 64, 7, 31, 32, 17, 100, 1, 5, 0, 71]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def scores_of(model, hp, dist, log):
    """Plain evaluation twice, then test-time training, of a copy of the model -> {name: score}."""
    # operations cannot be copied
    model, scores = copy.deepcopy(model, {id(model.ops): model.ops}), {}
    validation = train_gpt.ValidationSet(hp)
    evaluate = train_gpt.Evaluator(model, validation, hp, dist).evaluate_bpb
    for name in ("prequant", "quantized"):
        train_gpt.score_stage(name, evaluate, log, scores)
    train_gpt.score_stage(
        "ttt", train_gpt.TestTimeTrainer(model, validation, hp, dist, log).evaluate, log, scores
    )
    return scores


OPTIONS = {"ttt_stale_context": 16, "ttt_short_chunks": "40:4", "ngram_tilt_enabled": True}
BOOSTS = {"ngram_tilt_enabled": True, "ngram_tilt_orders": "1,2"}


@pytest.mark.parametrize(
    "device, options",
    [
        ("cpu", {}),
        ("cpu", BOOSTS),
        *(pytest.param("cuda", options, marks=GPU) for options in ({}, OPTIONS, OPTIONS | BOOSTS)),
    ],
)
def test_every_graph_is_compiled_once_and_before_the_clock(tmp_path, device, options, monkeypatch):
    install_parts_for(options, monkeypatch)
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    write_documents(tmp_path, "train", [300, 40, 90, 7, 500, 64, 33] * 3, seed=1)
    write_documents(tmp_path, "val", VAL, seed=2)
    hp = tiny_hp(
        data_path=str(tmp_path),
        device=device,
        compile="1",
        model_dim=128,
        num_heads=2,
        num_kv_heads=1,
        rope_dims=16,
        num_layers=3,
        num_loops=1,
        loop_start=1,
        loop_end=1,
        iterations=6,
        parallel_start_layer=2,
        enable_looping_at=0.5,
        ttt_batch_size=5,
        ttt_lora_sites="k,o,head",
        **options,
    )
    dist = train_gpt.Dist(device)
    log, eager_log = train_gpt.RunLog(tmp_path, dist), train_gpt.RunLog(tmp_path, dist)
    model = train_gpt.build_model(hp, dist)
    loader = train_gpt.TrainLoader(train_gpt.TokenStream(hp.data_path, "train"), hp, dist)
    trainer = train_gpt.Trainer(model, loader, hp, dist, log)
    with log.stage("warm_up"):
        trainer.warm_up()
    with log.stage("train"):
        trainer.train(None)
    scores = scores_of(model, hp, dist, log)
    assert (log.graphs["warm_up"], log.graphs["train"]) == (2, 0)  # looping off and on
    # entries of the first slot, whose stream is the embedding, without a skip and with one; one
    # attention; what follows it before and after the split; the head
    assert log.graphs["eval_prequant"] == 7
    # entries without a skip and with one; layers as above; the head; the adapters' factors
    assert log.graphs["eval_ttt"] == 7
    # or models of more kinds of layers fail
    assert 4 * max(log.graphs.values()) < torch._dynamo.config.recompile_limit
    assert log.graphs["eval_quantized"] == scores["ttt"]["recompilations"] == 0
    eager = scores_of(model, dataclasses.replace(hp, compile="0"), dist, eager_log)
    assert set(eager_log.graphs.values()) == {0}
    for name, score in scores.items():
        assert math.isclose(
            score["bpb"], eager[name]["bpb"], rel_tol=5e-3 if device == "cuda" else 1e-5
        ), name


def gradients(forward, model, rows, looping):
    """Sums over rows, as a training step makes them: into tensors that are there before, one
    row after another.
    """
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for row in rows:
        if model.hp.train_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        forward(*row, looping, model.hp.train_seq_len).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def worst(got, want):
    """The largest relative error of a parameter's gradient, and whose it is."""
    return max(
        (
            (got[n].double() - want[n].double()).norm().item()
            / want[n].double().norm().clamp_min(1e-9).item(),
            n,
        )
        for n in want
    )


def models_and_rows(device, dtype, kernels, tokens, **sizes):
    """One model with fast operations and one of references in fp32, the same weights, and rows
    of documents.
    """
    hp = tiny_hp(
        micro_batch_tokens=tokens,
        train_batch_tokens=tokens,
        num_layers=4,
        num_loops=1,
        loop_start=1,
        loop_end=1,
        parallel_start_layer=3,
        device=device,
        compile="1",
        train_cuda_graphs=device == "cuda",
        **sizes,
    )
    ops = train_gpt.select_ops(hp, "cpu", torch.float32)
    slow = train_gpt.GPT(hp, ops, torch.float32).to(device)
    fast = train_gpt.GPT(hp, kernels(ops, hp), dtype).to(device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # no gradient is zero at the start
        for p, q in zip(slow.parameters(), fast.parameters(), strict=True):
            p.add_((torch.randn(p.shape, generator=generator) * 0.05).to(device))
            q.copy_(p)
    rows = []
    for _ in range(4):
        row = torch.randint(8, hp.vocab_size, (tokens + 1,), generator=generator)
        starts = torch.tensor(
            [0, tokens // 5, tokens // 2, tokens - 7, tokens, tokens], dtype=torch.int32
        )
        row[starts[:4].long()] = train_gpt.BOS_ID
        rows.append([t.to(device) for t in (row[None, :-1], row[1:], starts)])
    return hp, fast, slow, rows


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiled_training_with_kernels_has_the_gradients_of_the_references(backend, monkeypatch):
    """Of the whole model: what is right alone may be wrong in a compiled graph, which
    differentiates
    in its own way. The second backend has Inductor's decompositions, to which the entry is open,
    and its choice of what is kept.
    """
    if train_gpt.triton is None:
        pytest.skip("needs Triton")

    def interpreted(ops, hp):
        return ops._replace(
            qkv_heads=train_gpt.qkv_heads,
            gated_xsa=train_gpt.gated_xsa,
            slot_input=train_gpt.slot_input,
            cross_entropy=train_gpt.linear_cross_entropy,
        )

    hp, fast, slow, rows = models_and_rows("cpu", torch.float32, interpreted, 32, train_seq_len=16)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    forward = train_gpt.compiled(fast.forward, hp, train_gpt.Dist("cpu"))
    got, want = (
        gradients(forward, fast, rows[:2], True),
        gradients(slow.forward, slow, rows[:2], True),
    )
    assert worst(got, want)[0] < 2e-5, worst(got, want)
    with torch.profiler.profile() as profiler:
        gradients(forward, fast, rows[:1], True)
    calls, slots = (
        {event.key: event.count for event in profiler.key_averages()},
        len(fast.slots(True)),
    )
    assert calls.get("golf::slot_input", 0) == (slots if backend == "aot_eager" else 0)
    assert calls["golf::slot_input_backward"] == slots


EDITED = """
import torch, train_gpt
@torch.library.custom_op("golf::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, grad: FACTOR * grad)
hp = train_gpt.Hyperparameters(device="cpu", compile="1")
x = torch.ones(3, requires_grad=True)
train_gpt.compiled(lambda x: twice(x).sum(), hp, train_gpt.Dist("cpu"))(x).backward()
print(x.grad[0].item())
"""


@IN_SOAK
def test_edited_gradients_are_not_taken_from_caches_of_the_code_before(tmp_path):
    """PyTorch's caches know a compiled graph by its operations' names: their gradients may have
    been others.
    """
    told = []
    for factor in (2, 5):
        folder = tmp_path / str(factor)
        folder.mkdir()
        (folder / "train_gpt.py").write_text(Path(train_gpt.__file__).read_text() + f"# {factor}\n")
        environ = os.environ | {
            "PYTHONPATH": f"{folder}:{Path(train_gpt.__file__).parent}",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        }
        done = subprocess.run(
            [sys.executable, "-c", EDITED.replace("FACTOR", str(factor))],
            env=environ,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        told.append(float(done.stdout.split()[-1]))
    assert told == [2, 5]


@GPU[0]
@GPU[1]
@pytest.mark.parametrize("looping", [False, True])
def test_captured_micro_batches_have_the_gradients_of_the_references_on_the_gpu(looping):
    def selected(ops, hp):
        return train_gpt.select_ops(hp, "cuda", torch.bfloat16)

    hp, fast, slow, rows = models_and_rows(
        "cuda",
        torch.bfloat16,
        selected,
        6144,
        train_seq_len=2048,
        model_dim=512,
        num_heads=8,
        num_kv_heads=4,
        rope_dims=16,
        vocab_size=1024,
        eval_seq_len=2048,
        ttt_eval_seq_len=2048,
    )
    dist = train_gpt.Dist("cuda")
    torch._dynamo.reset()
    plain, captured = (
        train_gpt.compiled(fast.forward, hp, dist, graphs=graphs) for graphs in (False, True)
    )
    want = gradients(plain, fast, rows, looping)
    for _ in range(3):  # the first time it runs, the second it is captured
        error, name = worst(gradients(captured, fast, rows, looping), want)
        assert error < 0.02, (name, error)
    error, name = worst(want, gradients(slow.forward, slow, rows, looping))
    assert error < 0.15, (name, error)  # 16 bits
