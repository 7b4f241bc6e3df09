"""Held-out training rows and the check of the quantized model's loss on them: nothing sees the
rows, a run notices.
"""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Lines, tiny_hp, write_documents, write_shard
from evaluation_helpers import make_model, on_ranks, small_hp
from training_helpers import OPS, SMALL, loader_of, quiet, run_on_ranks, trainer_of

import train_gpt
from train_gpt import BOS_ID, GPT, DataError, TokenStream, TrainLoader

torch.set_num_threads(1)


class StageLog(Lines):
    """A log whose stages take no measurable time."""

    def __init__(self):
        super().__init__()
        self.names = []

    def stage(self, name):
        self.names.append(name)
        return train_gpt.contextlib.nullcontext()


def numbered_documents(folder, lengths, shard_sizes=None):
    """Training shards in which every token but BOS is another id, so that a token tells its
    place in the stream.
    """
    ids = iter(range(100, 65_000))
    tokens = np.array(
        [token for length in lengths for token in [BOS_ID, *(next(ids) for _ in range(length))]]
    )
    borders = np.cumsum([0, *(shard_sizes or [len(tokens)])])
    for number, (first, last) in enumerate(zip(borders, borders[1:], strict=False)):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", tokens[first:last])
    return tokens


# --- rows that are held out


ORDERS = {
    "default": {},
    "shuffled_spans": {"data_seed": 5},
    "as_stored": {"balance_rows": False},
    "larger_steps": {"train_batch_tokens": 512},
}


@pytest.mark.parametrize("changes", ORDERS.values(), ids=ORDERS)
def test_neither_training_nor_the_hessians_see_the_rows_that_are_held_out(changes, tmp_path):
    lengths = np.random.default_rng(1).integers(3, 120, 150)
    numbered_documents(tmp_path, lengths, shard_sizes=[3000, 2500, int(lengths.sum()) + 150 - 5500])
    loader = loader_of(tmp_path, vocab_size=65_536, quant_check_rows=3, **changes)
    assert loader.held_out_rows == 3
    held_out = {int(t) for i in range(3) for t in loader.held_out_row(i).inputs.flatten()} - {
        BOS_ID
    }
    assert len(held_out) > 3 * 128 - 30
    steps = 3 * loader.stream.size // loader.hp.train_batch_tokens  # three epochs
    rows = [row for step in range(steps) for row in loader.rank_rows(step)]
    seen = {int(t) for row in rows for t in (*row.inputs.flatten(), *row.targets)}
    assert len(seen) > 0.8 * loader.stream.size  # of the documents that training may see
    assert not held_out & seen
    calibration = {int(t) for index in range(64) for t in loader.row(index).inputs.flatten()}
    assert not held_out & calibration


def test_the_stream_is_cut_before_a_document_and_goes_round_there(tmp_path):
    tokens = numbered_documents(tmp_path, [50, 20, 200, 9, 30, 40], shard_sizes=[100, 200, 55])
    stream = TokenStream(tmp_path, "train")
    size = stream.size
    rest, held_out = stream.hold_out(60)
    border = 51 + 21 + 201 + 10  # the last document that begins 60 tokens or more before the end
    assert rest.size == border and held_out.size == len(tokens) - border
    assert stream.size == size and stream.read(0, size).tolist() == tokens.tolist()
    assert held_out.read(0, held_out.size).tolist() == tokens[border:].tolist()
    assert rest.read(border - 5, 10).tolist() == [*tokens[border - 5 : border], *tokens[:5]]
    last = held_out.size - 1
    assert held_out.read(last, 3).tolist() == [tokens[-1], *tokens[border : border + 2]]


def test_a_stream_of_one_document_cannot_hold_any_out(tmp_path):
    numbered_documents(tmp_path, [9000])
    with pytest.raises(DataError, match="QUANT_CHECK_ROWS=0"):
        loader_of(tmp_path, vocab_size=65_536)
    assert loader_of(tmp_path, vocab_size=65_536, quant_check_rows=0).held_out_rows == 0


def test_small_data_holds_out_a_twentieth_at_most(tmp_path):
    numbered_documents(tmp_path, [49] * 102)  # 5,100 tokens, rows of 128
    assert loader_of(tmp_path, vocab_size=65_536, quant_check_rows=8).held_out_rows == 1
    assert loader_of(tmp_path, vocab_size=65_536, micro_batch_tokens=256).held_out_rows == 0


def test_held_out_documents_see_only_themselves(tmp_path):
    numbered_documents(tmp_path, [49] * 400)
    loader = loader_of(tmp_path, vocab_size=65_536)
    row = loader.held_out_row(1)
    starts = row.cu_seqlens.unique().tolist()
    begins = (row.inputs[0] == BOS_ID).nonzero()[:, 0].tolist()
    assert len(begins) > 1 and set(begins) <= set(starts)
    assert torch.equal(row.inputs[0, 1:], row.targets[:-1])


# --- the loss


def trained_model(folder, **changes):
    """A trainer of a small model that has learnt something, so that bad weights cost it a lot."""
    quick = {
        "train_seq_len": 128,
        "iterations": 150,
        "matrix_lr": 0.05,
        "muon_outward": 1.0,
        "warmdown_frac": 0.5,
        "ema_span": 0.033,
    }
    trainer = trainer_of(folder, train_log_every=50, **quick | changes)
    trainer.train(quiet)
    return trainer


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """The trainer of trained_model, its weights, and its data."""
    folder = tmp_path_factory.mktemp("learnt")
    write_documents(folder, "train", np.random.default_rng(7).integers(20, 120, 400), seed=1)
    trainer = trained_model(folder)
    weights = {name: tensor.clone() for name, tensor in train_gpt.unbank(trainer.model).items()}
    return SimpleNamespace(trainer=trainer, weights=weights, folder=folder)


@pytest.fixture
def model(learnt):
    train_gpt.rebank(learnt.trainer.model, learnt.weights)
    return learnt.trainer.model


def plain_loss(model, loader):
    """The loss of the held-out rows, document by document."""
    total = 0.0
    for index in range(loader.held_out_rows):
        row = loader.held_out_row(index)
        borders = row.cu_seqlens.unique().tolist()
        for start, end in zip(borders, borders[1:], strict=False):
            hidden = model.forward_hidden(
                row.inputs[:, start:end], max_seqlen=end - start, looping=True
            )
            total += model.token_losses(hidden[0], row.targets[start:end]).sum().item()
    return total / (loader.held_out_rows * loader.hp.micro_batch_tokens)


def test_held_out_loss_is_the_mean_over_documents_that_stand_alone(model, learnt, dist):
    loader = learnt.trainer.loader
    with torch.no_grad():
        want = plain_loss(model, loader)
    got = train_gpt.held_out_loss(model, loader, learnt.trainer.hp, dist)
    assert loader.held_out_rows == 2 and got == pytest.approx(want, rel=1e-5)
    assert got < 3.0  # it has learnt: ln 97 is 4.6


@pytest.fixture
def random(tmp_path, dist):
    """A model whose every part matters, its settings, and a loader that holds three rows out.

    No document is longer than TRAIN_SEQ_LEN.
    """
    write_documents(tmp_path, "train", np.random.default_rng(7).integers(5, 31, 600), seed=1)
    hp = small_hp(data_path=str(tmp_path), quant_check_rows=3)
    loader = TrainLoader(TokenStream(tmp_path, "train"), hp, dist)
    return SimpleNamespace(model=make_model(hp), loader=loader, hp=hp)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_held_out_rows_whose_documents_stand_alone(random, world_size):
    with torch.no_grad():
        want = plain_loss(random.model, random.loader)
    assert random.loader.held_out_rows == 3
    losses = on_ranks(
        world_size,
        lambda dist: train_gpt.held_out_loss(random.model, random.loader, random.hp, dist),
    )
    assert losses == pytest.approx([want] * world_size, rel=1e-6)


def loss_on_a_rank(dist, folder, rows):
    hp = tiny_hp(data_path=folder, quant_check_rows=rows, **SMALL)
    loader = TrainLoader(TokenStream(folder, "train"), hp, dist)
    return train_gpt.held_out_loss(GPT(hp, OPS, torch.float32), loader, hp, dist)


@pytest.mark.parametrize("rows", [1, 3])
def test_any_number_of_ranks_finds_the_same_loss(rows, learnt, tmp_path):
    alone = loss_on_a_rank(train_gpt.Dist("cpu"), str(learnt.folder), rows)
    for loss in run_on_ranks(loss_on_a_rank, 2, tmp_path, str(learnt.folder), rows):
        assert loss == pytest.approx(alone, rel=1e-6)


# --- the check


def test_the_model_gets_its_weights_back_and_a_gap_that_is_no_number_is_infinite(random, dist):
    check = train_gpt.QuantizationCheck(random.model, random.loader, random.hp, dist, StageLog())
    kept = {name: tensor.clone() for name, tensor in train_gpt.unbank(random.model).items()}
    for factor, gap in ((1.0, 0.0), (0.5, None), (math.nan, math.inf)):
        arrays = {f"{name}:fp16": (factor * w).numpy() for name, w in kept.items()}
        found = check.gap(arrays, random.hp)
        assert found == pytest.approx(gap, abs=1e-6) if gap is not None else found != 0
        for name, tensor in train_gpt.unbank(random.model).items():
            assert torch.equal(tensor, kept[name]), name
    assert [trial["gap"] is None for trial in check.tried] == [False, False, True]


def misleading_hessians(hessians):
    """Hessians in which all columns seem to follow the first at a thousandth: GPTQ moves them
    to make up for it.
    """
    planted = {}
    for name, hessian in hessians.items():
        direction = torch.ones(len(hessian))
        direction[0] = 1000.0
        planted[name] = direction.outer(direction) + 1e-3 * torch.eye(len(hessian))
    return planted


def build(
    learnt, model, dist, tmp_path, monkeypatch, plant=misleading_hessians, seconds=0.0, **changes
):
    """build_artifact of the trained model, its Hessians changed by `plant` -> figures, log
    lines, settings.
    """
    hp = dataclasses.replace(
        learnt.trainer.hp,
        **{
            "matrix_bits": 4,
            "embed_bits": 8,
            "mlp_clip_sigmas": 6.0,
            "attn_clip_sigmas": 6.0,
            "quant_gap_max": 0.08,
        }
        | changes,
    )
    collect = train_gpt.collect_hessians
    monkeypatch.setattr(
        train_gpt, "collect_hessians", lambda *arguments: plant(collect(*arguments))
    )
    log = StageLog()
    path = tmp_path / "artifact.bin"
    figures = train_gpt.build_artifact(
        model, learnt.trainer.loader, hp, dist, log, path, 1000, seconds
    )
    return figures, log, hp


def test_a_quantization_that_is_good_is_kept_and_told(learnt, model, dist, tmp_path, monkeypatch):
    figures, log, _ = build(learnt, model, dist, tmp_path, monkeypatch, plant=dict, matrix_bits=6)
    check = figures["quant_check"]
    assert check["rows"] == 2 and abs(check["gap"]) < 0.02
    assert check["settings"] == "as set" and len(check["tried"]) == 1
    assert any(
        line.startswith("quant_check fp32_loss:") and line.endswith("settings:as set")
        for line in log
    )
    for name, tensor in train_gpt.unbank(model).items():
        # the model holds its fp32 weights again
        assert torch.equal(tensor, learnt.weights[name]), name


def test_the_gap_is_that_of_the_file_on_disk(learnt, model, dist, tmp_path, monkeypatch):
    figures, _, hp = build(
        learnt, model, dist, tmp_path, monkeypatch, plant=dict, quant_gap_max=100.0
    )
    before = train_gpt.held_out_loss(model, learnt.trainer.loader, hp, dist)
    train_gpt.rebuild_model(model, tmp_path / "artifact.bin", dist)
    after = train_gpt.held_out_loss(model, learnt.trainer.loader, hp, dist)
    assert figures["quant_check"]["gap"] == pytest.approx(after - before, abs=1e-6)
    assert figures["quant_check"]["fp32_loss"] == pytest.approx(before, abs=1e-6)


def test_the_file_on_disk_says_what_its_model_was_trained_on(
    learnt, model, dist, tmp_path, monkeypatch
):
    _, _, hp = build(learnt, model, dist, tmp_path, monkeypatch, plant=dict)
    monkeypatch.setattr(model, "hp", dataclasses.replace(hp, marker_fusion_enabled=True))
    with pytest.raises(train_gpt.ArtifactError, match="another MARKER_FUSION_ENABLED"):
        train_gpt.rebuild_model(model, tmp_path / "artifact.bin", dist)


def test_a_planted_bad_hessian_is_noticed_and_repaired(learnt, model, dist, tmp_path, monkeypatch):
    figures, log, hp = build(learnt, model, dist, tmp_path, monkeypatch)
    check = figures["quant_check"]
    gaps = [trial["gap"] for trial in check["tried"]]
    assert gaps[0] > hp.quant_gap_max and len(gaps) == 3
    assert (
        check["gap"] == min(gaps) < hp.quant_gap_max
        and check["settings"] == "GPTQ_DAMP=1 GPTQ_COLUMN_STEPS=0"
    )
    assert not violations_of(figures, hp)
    assert any("more than QUANT_GAP_MAX" in line for line in log)
    train_gpt.rebuild_model(model, tmp_path / "artifact.bin", dist)  # the best of them is on disk
    loss = train_gpt.held_out_loss(model, learnt.trainer.loader, hp, dist)
    assert loss - check["fp32_loss"] == pytest.approx(check["gap"], abs=1e-5)


def violations_of(figures, hp):
    log = SimpleNamespace(seconds={"eval_quantized": 1.0}, graphs={})
    return train_gpt.violations(hp, log, figures, 1000, 1000, {"quantized": {}})


def test_a_gap_beyond_the_last_resort_is_a_violation(learnt, model, dist, tmp_path, monkeypatch):
    figures, _, hp = build(learnt, model, dist, tmp_path, monkeypatch, quant_gap_max=1e-9)
    assert len(figures["quant_check"]["tried"]) == 3
    (violation,) = violations_of(figures, hp)
    assert violation.startswith("quantization adds ") and "held-out" in violation
    assert not violations_of(figures, dataclasses.replace(hp, quant_gap_max=1e3))


def test_a_loss_that_is_not_finite_is_the_worst_gap(learnt, model, dist, tmp_path, monkeypatch):
    quantize, calls = train_gpt.quantize_weights, []

    def broken_at_first(weights, hessians, hp, *others):
        arrays = quantize(weights, hessians, hp, *others)
        calls.append(hp)
        return (
            arrays
            if len(calls) > 1
            else {
                name: np.full_like(array, np.nan) if name == "resid_mix:fp16" else array
                for name, array in arrays.items()
            }
        )

    monkeypatch.setattr(train_gpt, "quantize_weights", broken_at_first)
    figures, _, hp = build(learnt, model, dist, tmp_path, monkeypatch, plant=dict, matrix_bits=6)
    check = figures["quant_check"]
    assert (
        check["tried"][0]["gap"] is None
        and math.isfinite(check["gap"])
        and len(check["tried"]) == 2
    )
    assert not violations_of(figures, hp)
    json.dumps(check, allow_nan=False)


def test_no_other_quantization_is_begun_without_seconds_left(
    learnt, model, dist, tmp_path, monkeypatch
):
    for seconds, tries in ((40.0, 3), (100.0, 1)):
        figures, log, _ = build(
            learnt,
            model,
            dist,
            tmp_path,
            monkeypatch,
            seconds=seconds,
            quant_gap_max=1e-9,
            max_wallclock_seconds=100.0,
            gptq_reserve_seconds=60.0,
        )
        if tries == 1:
            assert len(figures["quant_check"]["tried"]) == 1
            assert any("no seconds are left" in line for line in log)
        else:
            assert len(figures["quant_check"]["tried"]) > 1


def check_of_gaps(gaps, dist, monkeypatch):
    """A QuantizationCheck whose quantizations have these gaps in turn."""
    left = iter(gaps)

    def gap(check, arrays, hp):
        check.tried.append({"gap": next(left)})
        return check.tried[-1]["gap"]

    monkeypatch.setattr(train_gpt.QuantizationCheck, "gap", gap)
    monkeypatch.setattr(train_gpt, "held_out_loss", lambda *_: 1.0)
    hp = tiny_hp(quant_gap_max=0.01)
    model = GPT(hp, OPS, torch.float32)
    return train_gpt.QuantizationCheck(model, None, hp, dist, StageLog())


@pytest.mark.parametrize(
    "gaps, kept, tries",
    [
        ((0.5, 0.2, 0.3), 1, 3),  # the best, not the last
        ((0.2, 0.2, 0.2), 0, 3),  # the least changed of equal ones
        ((0.5, 0.01, 0.0), 1, 2),  # QUANT_GAP_MAX itself will do
    ],
)
def test_the_best_quantization_is_kept_not_the_last(gaps, kept, tries, dist, monkeypatch):
    check = check_of_gaps(gaps, dist, monkeypatch)
    made = []

    def quantize(hp):
        made.append(hp)
        return {"made": len(made)}

    hp, arrays = check.choose(quantize, lambda: True)
    assert len(made) == tries and arrays == {"made": kept + 1}
    assert hp is made[kept] and check.kept is check.tried[kept]


@pytest.mark.parametrize("slowest, tries", [(0.0, 3), (1000.0, 1)])  # seconds of another rank
def test_the_slowest_rank_decides_whether_seconds_are_left(
    slowest, tries, dist, tmp_path, monkeypatch
):
    """Or one rank would wait in a collective of an attempt that another does not make."""
    check = check_of_gaps((0.5, 0.4, 0.3), dist, monkeypatch)
    for name in ("collect_hessians", "collect_row_gradients", "quantize_weights"):
        monkeypatch.setattr(train_gpt, name, lambda *_: {})
    monkeypatch.setattr(dist, "max_over_ranks", lambda used: [max(used, slowest)])
    hp = dataclasses.replace(check.hp, max_wallclock_seconds=900.0)
    loader = SimpleNamespace(held_out_rows=2)
    figures = train_gpt.build_artifact(
        check.model, loader, hp, dist, StageLog(), tmp_path / "a", 1000, 1.0
    )
    assert len(figures["quant_check"]["tried"]) == tries


def test_plainer_quantizations_are_never_longer(learnt, model, dist, tmp_path, monkeypatch):
    build(learnt, model, dist, tmp_path, monkeypatch, plant=dict)
    first = (tmp_path / "artifact.bin").stat().st_size
    plainer = train_gpt.plainer_quantizations(learnt.trainer.hp)
    assert [(hp.gptq_column_steps, hp.gptq_damp) for hp in plainer] == [(False, 0.01), (False, 1.0)]
    for hp in plainer:
        build(
            learnt,
            model,
            dist,
            tmp_path,
            monkeypatch,
            plant=dict,
            gptq_column_steps=False,
            gptq_damp=hp.gptq_damp,
        )
        assert (tmp_path / "artifact.bin").stat().st_size < 1.01 * first


def test_target_bytes_keeps_the_quantization_that_was_chosen(
    learnt, model, dist, tmp_path, monkeypatch
):
    figures, _, _ = build(learnt, model, dist, tmp_path, monkeypatch, target_bytes=14_000)
    assert abs((tmp_path / "artifact.bin").stat().st_size + 1000 - 14_000) < 100
    arrays = train_gpt.unpack_weights((tmp_path / "artifact.bin").read_bytes())
    check = figures["quant_check"]
    assert check["tried"][2]["settings"] == "GPTQ_DAMP=1 GPTQ_COLUMN_STEPS=0"
    assert (
        check["settings"] == check["tried"][3]["settings"]
        and "GPTQ_COLUMN_STEPS=0" in check["settings"]
    )
    # the gap is that of the file, whose clips are others
    assert "MLP_CLIP_SIGMAS=" in check["settings"]
    before = train_gpt.held_out_loss(model, learnt.trainer.loader, learnt.trainer.hp, dist)
    train_gpt.rebuild_model(model, tmp_path / "artifact.bin", dist)
    after = train_gpt.held_out_loss(model, learnt.trainer.loader, learnt.trainer.hp, dist)
    assert check["gap"] == pytest.approx(after - before, abs=1e-5)
    assert not any(name.endswith(":column_steps") for name in arrays)


def test_without_held_out_rows_there_is_no_check(learnt, model, dist, tmp_path, monkeypatch):
    hp = dataclasses.replace(learnt.trainer.hp, quant_check_rows=0)
    loader = TrainLoader(TokenStream(learnt.folder, "train"), hp, dist)
    log = StageLog()
    figures = train_gpt.build_artifact(
        model, loader, hp, dist, log, tmp_path / "artifact.bin", 1000
    )
    assert figures["quant_check"] is None and not violations_of(figures, hp)
