"""torch.compile: every graph is made once, before the training clock starts, and gives the scores of eager mode.

On the CPU the graphs are traced and differentiated but run eagerly (`aot_eager`); with a GPU they are built in full.
"""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from conftest import tiny_hp, write_documents

import train_gpt

VAL = [200, 90, 33, 1, 8, 0, 64, 7, 31, 32, 17, 100, 1, 5, 0, 71]  # tails, lone BOS, one-token documents
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def scores_of(model, hp, dist, log):
    """Plain evaluation twice, then test-time training, of a copy of the model -> {name: score}."""
    model, scores = copy.deepcopy(model), {}
    validation = train_gpt.ValidationSet(hp, None)
    evaluate = train_gpt.Evaluator(model, validation, hp, dist).evaluate_bpb
    for name in ("prequant", "quantized"):
        train_gpt.score_stage(name, evaluate, log, scores)
    train_gpt.score_stage("ttt", train_gpt.TestTimeTrainer(model, validation, hp, dist, log).evaluate, log, scores)
    return scores


OPTIONS = {"ttt_stale_context": 16, "ttt_short_chunks": "40:4", "ngram_tilt_enabled": True}


@pytest.mark.parametrize("device, options", [
    ("cpu", {}), pytest.param("cuda", {}, marks=GPU), pytest.param("cuda", OPTIONS, marks=GPU)])  # fmt: skip
def test_every_graph_is_compiled_once_and_before_the_clock(tmp_path, device, options, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    write_documents(tmp_path, "train", [300, 40, 90, 7, 500, 64, 33] * 3, seed=1)
    write_documents(tmp_path, "val", VAL, seed=2)
    hp = tiny_hp(data_path=str(tmp_path), device=device, compile="1", model_dim=128, num_heads=2, num_kv_heads=1,
                 rope_dims=16, num_layers=3, num_loops=1, loop_start=1, loop_end=1, iterations=6,
                 parallel_start_layer=2, xsa_last_n=3, enable_looping_at=0.5, ttt_batch_size=5,
                 ttt_lora_sites="k,o,head", **options)  # fmt: skip
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
    # entries of the first slot, of one whose stream is a skip, with a skip, after the split; layers before and after
    # the split; the head
    assert log.graphs["eval_prequant"] == 7
    assert log.graphs["eval_ttt"] == 8  # and the adapters' factors
    assert log.graphs["eval_quantized"] == scores["ttt"]["recompilations"] == 0
    eager = scores_of(model, dataclasses.replace(hp, compile="0"), dist, eager_log)
    assert set(eager_log.graphs.values()) == {0}
    for name, score in scores.items():
        assert math.isclose(score["bpb"], eager[name]["bpb"], rel_tol=5e-3 if device == "cuda" else 1e-5), name
