"""torch.compile: every graph is made once, before the training clock starts, and gives the scores of eager mode.

On the CPU the graphs are traced and differentiated but run eagerly (`aot_eager`); with a GPU they are built in full.
"""

import functools
import math

import pytest
import torch
from conftest import tiny_hp, write_documents

import train_gpt

VAL = [200, 90, 33, 1, 8, 0, 64, 7, 31, 32, 17, 100, 1, 5, 0, 71]  # tails, lone BOS, one-token documents
GPU = pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")])  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write_documents(tmp_path, "train", [300, 40, 90, 7, 500, 64, 33] * 3, seed=1)
    write_documents(tmp_path, "val", VAL, seed=2)
    return tmp_path


def pipeline(folder, device, compile_setting):
    """Warm-up, training, evaluation twice, test-time training -> (graphs of each stage, scores)."""
    torch._dynamo.reset()
    hp = tiny_hp(data_path=str(folder), device=device, compile=compile_setting, model_dim=128, num_heads=2,
                 num_kv_heads=1, rope_dims=16, num_layers=3, num_loops=1, loop_start=1, loop_end=1, iterations=6,
                 parallel_start_layer=2, xsa_last_n=3, enable_looping_at=0.5, ttt_batch_size=5,
                 ttt_lora_sites="k,head")  # fmt: skip
    dist = train_gpt.Dist(device)
    log = train_gpt.RunLog(folder, dist)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ops = train_gpt.select_ops(True, "auto" if device == "cuda" else "sdpa", dist.device, dtype, 64, 2, 1)
    model = train_gpt.GPT(hp, ops, dtype).to(dist.device)
    validation = train_gpt.ValidationSet(hp, None)
    trainer = train_gpt.Trainer(model, hp, dist, log)
    evaluate = train_gpt.Evaluator(model, validation, hp, dist).evaluate_bpb
    scores = {}
    with log.stage("warm_up"):
        trainer.warm_up()
    with log.stage("train"):
        trainer.train(None)
    for name in ("prequant", "quantized"):
        train_gpt.score_stage(name, evaluate, log, scores)
    train_gpt.score_stage("ttt", train_gpt.TestTimeTrainer(model, validation, hp, dist, log).evaluate, log, scores)
    return log.graphs, scores


@pytest.fixture
def traced(monkeypatch):
    """On the CPU torch.compile traces and differentiates only: building with a C++ compiler takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_every_graph_is_compiled_once_and_before_the_clock(folder, device, request):
    if device == "cpu":
        request.getfixturevalue("traced")
    graphs, scores = pipeline(folder, device, "1")
    assert graphs["warm_up"] == 2 and graphs["train"] == 0  # looping off and on
    # the first layer, whose stream is the embedding; layers before and after the split; the head
    assert graphs["eval_prequant"] == graphs["eval_ttt"] == 4
    assert graphs["eval_quantized"] == scores["ttt"]["recompilations"] == 0
    eager_graphs, eager_scores = pipeline(folder, device, "0")
    assert set(eager_graphs.values()) == {0}
    for name, score in scores.items():
        assert math.isclose(score["bpb"], eager_scores[name]["bpb"], rel_tol=5e-3 if device == "cuda" else 1e-5), name
