"""Row steps by importance: mean squared row gradients of the last steps, and what GPTQ makes of them."""

import io

import pytest
import torch
from conftest import Lines
from evaluation_helpers import on_ranks
from training_helpers import quiet
from training_helpers import trainer_of as any_trainer_of

import train_gpt
from tools import guard
from train_gpt import RowGradients, row_factors


def trainer_of(folder, **settings):
    """A trainer that gathers row gradients."""
    return any_trainer_of(folder, gptq_row_power=1.0, **settings)


def test_means_are_those_of_the_gradients_of_the_last_steps(tiny_data, monkeypatch):
    seen = []
    add = RowGradients.add

    def note_add(rows):
        seen.append({name: p.grad.clone() for name, p in rows.matrices.items()})
        add(rows)

    monkeypatch.setattr(RowGradients, "add", note_add)
    trainer = trainer_of(tiny_data, iterations=40, warmup_steps=0)
    trainer.train(quiet)
    assert len(seen) == 2  # the last twentieth of 40 steps
    found = trainer.model.row_gradients
    assert found.keys() == {n for n in train_gpt.unbank(trainer.model) if train_gpt.quant_role(n)}
    squares = torch.stack([grads["tok_emb"].square() for grads in seen])
    assert torch.allclose(found["tok_emb.weight"], squares.mean(dim=(0, 2)))
    num_layers = trainer.hp.num_layers
    squares = torch.stack([grads["qo_bank"][num_layers + 1].square() for grads in seen])
    assert torch.allclose(found["blocks.1.attn.c_proj.weight"], squares.mean(dim=(0, 2)))
    assert all(len(means) and means.min() >= 0 for means in found.values())


def test_a_training_without_their_setting_gathers_and_keeps_none(tiny_data, tmp_path):
    trainer = any_trainer_of(tiny_data, iterations=40, warmup_steps=0)
    trainer.train(quiet)
    assert trainer.row_gradients.num_steps == 0
    train_gpt.save_checkpoint(tmp_path / "model.pt", trainer.model, trainer.hp)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["row_gradients"] == {}


def test_warm_up_leaves_no_gradients_behind(tiny_data):
    trainer = trainer_of(tiny_data, iterations=4)
    trainer.warm_up()
    assert trainer.row_gradients.num_steps == 0
    assert trainer.row_gradients.means(trainer.dist) == {}


def test_ranks_share_the_mean_of_their_squares(tiny_data):
    def work(dist):
        rows = RowGradients(trainer_of(tiny_data, dist=train_gpt.Dist("cpu")).model)
        for matrix in rows.matrices.values():
            matrix.grad = torch.full_like(matrix, 1.0 + 2 * dist.rank)
        rows.add()
        return rows.means(dist)

    for found in on_ranks(2, work):
        for means in found.values():
            assert torch.equal(means, torch.full_like(means, (1 + 9) / 2))


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    deviations = torch.rand(2, 50, generator=generator) + 0.5
    w = torch.randn(2, 50, 400, generator=generator) * deviations[..., None]
    gradients = 10.0 ** torch.empty(2, 50).uniform_(-4, 0, generator=generator)
    return w, gradients


def test_factors_have_a_geometric_mean_of_one():
    factors = row_factors(*problem(), power=0.7, octaves=99)
    assert torch.allclose(factors.log2().mean(dim=1), torch.zeros(2), atol=1e-5)


def test_without_power_all_factors_are_one():
    factors = row_factors(*problem(), power=0.0, octaves=99)
    assert torch.allclose(factors, torch.ones(2, 50))


def test_with_full_power_errors_cost_the_same_in_every_row():
    w, gradients = problem()
    steps = w.std(dim=2) * row_factors(w, gradients, power=1.0, octaves=99)
    costs = steps.square() * gradients
    assert torch.allclose(costs, costs[:, :1].expand_as(costs), rtol=1e-3)


def test_octaves_limit_the_factors():
    factors = row_factors(*problem(), power=1.0, octaves=0.5)
    assert factors.max() == pytest.approx(2**0.5) and factors.min() == pytest.approx(2**-0.5)


def test_a_row_without_any_gradient_has_a_finite_step():
    w, gradients = problem()
    gradients[0, 3] = 0
    factors = row_factors(w, gradients, power=1.0, octaves=4.0)
    assert factors.isfinite().all() and factors[0, 3] == 16


def test_a_power_of_almost_nothing_changes_no_step():
    """Such a training gathers row gradients and writes the artifact of one without."""
    w, gradients = problem()
    assert torch.equal(row_factors(w, gradients, power=1e-9, octaves=99), torch.ones(2, 50))


def test_gptq_gives_costly_rows_finer_steps():
    w, gradients = problem()
    name = "blocks.0.mlp.c_fc.weight"
    weights = {name: w[0]}
    hessians = {name: torch.eye(w.shape[2])}
    hp = train_gpt.Hyperparameters(
        device="cpu", gptq_row_power=1.0, gptq_row_octaves=9.0, lqer_enabled=False
    )
    found = {}
    for rows in (None, {name: gradients[0]}):
        arrays = train_gpt.quantize_weights(
            weights, hessians, hp, train_gpt.Dist("cpu"), row_gradients=rows
        )
        error = train_gpt.dequantize_weights(arrays)[name] - w[0]
        found[rows is not None] = (error.square().mean(dim=1) * gradients[0]).sum()
    assert found[True] < 0.5 * found[False]


def test_a_checkpoint_keeps_them_and_an_old_one_has_none(tiny_data, tmp_path):
    trainer = trainer_of(tiny_data, iterations=20, warmup_steps=0)
    trainer.train(quiet)
    model = trainer.model
    kept = model.row_gradients
    train_gpt.save_checkpoint(tmp_path / "model.pt", model, trainer.hp)
    model.row_gradients = {}
    train_gpt.load_checkpoint(tmp_path / "model.pt", model)
    assert kept and all(torch.equal(kept[name], model.row_gradients[name]) for name in kept)

    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    del saved["row_gradients"]["tok_emb.weight"]
    torch.save(saved, tmp_path / "other.pt")
    with pytest.raises(train_gpt.DataError, match="row gradients do not fit"):
        train_gpt.load_checkpoint(tmp_path / "other.pt", model)
    del saved["row_gradients"]
    torch.save(saved, tmp_path / "old.pt")
    train_gpt.load_checkpoint(tmp_path / "old.pt", model)
    assert model.row_gradients == {}


def test_a_training_state_keeps_them(tiny_data, tmp_path):
    trainer = trainer_of(tiny_data, iterations=20, warmup_steps=0)
    trainer.log = Lines()
    trainer.log.folder = tmp_path
    trainer.train(quiet)
    rows = trainer.row_gradients
    assert rows.num_steps == 1
    guard.save_state(trainer, 20, 1.0, [torch.ones(())])
    _, content = guard.newest_state(tmp_path)
    state = torch.load(io.BytesIO(content), weights_only=True)
    other = trainer_of(tiny_data, iterations=20, warmup_steps=0)
    guard.restore(other, state)
    assert other.row_gradients.num_steps == 1
    pairs = zip(other.row_gradients.sums, rows.sums, strict=True)
    assert all(torch.equal(one, another) for one, another in pairs)
