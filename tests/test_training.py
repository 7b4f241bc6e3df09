"""Loader, training step, warm-up, clock and budget of a run, on one process and on two."""

import math
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from conftest import PATIENCE, Lines, tiny_hp, write_documents
from training_helpers import (
    equal_states,
    everything,
    loader_of,
    quiet,
    rank_of,
    run_on_ranks,
    trainer_of,
)

import train_gpt
from train_gpt import (
    BOS_ID,
    DataError,
    SettingError,
    TokenStream,
    TrainingClock,
)

torch.set_num_threads(1)


# --- loader


def expected_starts(tokens, limit):
    """Segment starts of one row, by walking: a new one at every BOS and after `limit` tokens."""
    starts = []
    for t, token in enumerate(tokens):
        if t == 0 or token == BOS_ID or t - starts[-1] == limit:
            starts.append(t)
    return starts


def test_a_row_begins_with_the_first_document_of_its_span(tmp_path):
    tokens, _ = write_documents(tmp_path, "train", [50, 100, 7, 300, 60, 200], seed=3)
    loader = loader_of(tmp_path, balance_rows=False)
    rows = [row for step in range(2) for row in loader.rank_rows(step)]
    # documents begin at 0, 51, 152, 160, 461: none in span 2
    begins = [0, 51 + 101, 256, 51 + 101 + 8 + 301]
    for row, begin in zip(rows, begins, strict=True):
        assert row.inputs[0].tolist() == tokens[begin : begin + 128].tolist()
        assert row.targets.tolist() == tokens[begin + 1 : begin + 129].tolist()
        assert row.inputs.dtype == row.targets.dtype == torch.int64


def test_data_seed_shuffles_the_spans_of_every_epoch(tiny_data):
    published, one, two = (loader_of(tiny_data, data_seed=seed) for seed in (0, 1, 2))
    epoch = published.stream.size // 128
    orders = [
        [loader.row_offset(index) for index in range(2 * epoch)] for loader in (published, one, two)
    ]
    assert sorted(orders[0]) == orders[0] and len({tuple(order) for order in orders}) == 3
    for order in orders[1:]:
        assert order[:epoch] != order[epoch:]  # another order, from another offset
        for part in (order[:epoch], order[epoch:]):  # every span once
            assert (
                np.diff(sorted(part)).max() < 2 * 128 + 120
                and max(part) - min(part) > 0.9 * published.stream.size
            )
    again = loader_of(tiny_data, data_seed=1)
    assert [again.row_offset(index) for index in range(2 * epoch)] == orders[1]
    assert torch.equal(again.build(7).inputs, one.build(7).inputs)
    assert not torch.equal(two.build(7).inputs, one.build(7).inputs)


def test_a_step_number_restores_the_loader(tiny_data):
    """What a loader gives depends on nothing that it gave before."""
    for seed in (0, 5):
        used, fresh = loader_of(tiny_data, data_seed=seed), loader_of(tiny_data, data_seed=seed)
        for step in range(40, 200, 50):
            list(used.rank_rows(step))
        assert all(
            torch.equal(a, b)
            for rows in zip(used.rank_rows(97), fresh.rank_rows(97), strict=True)
            for a, b in zip(*rows, strict=True)
        )


def test_documents_are_segments_and_long_ones_are_cut(tiny_data, monkeypatch):
    monkeypatch.setattr(train_gpt.Hyperparameters, "row_segments", 20)
    loader, longest = loader_of(tiny_data), 0
    for row in loader.rank_rows(0), loader.rank_rows(1), loader.rank_rows(2):
        for inputs, _, cu_seqlens in row:
            starts = expected_starts(inputs[0].tolist(), 32)
            assert cu_seqlens.tolist() == starts + [128] * (21 - len(starts))
            assert cu_seqlens.dtype == torch.int32
            longest = max(longest, cu_seqlens.diff().max().item())
    assert longest == 32


def test_document_of_exactly_the_limit_is_one_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt.Hyperparameters, "row_segments", 9)
    write_documents(tmp_path, "train", [31, 32, 63, 64])  # 32, 33, 64 and 65 tokens with BOS
    loader = loader_of(
        tmp_path,
        micro_batch_tokens=194,
        train_batch_tokens=194,
        balance_rows=False,
    )
    assert loader.build(0).cu_seqlens.tolist() == [0, 32, 64, 65, 97, 129, 161, 193, 194, 194]


@pytest.mark.parametrize("data_seed", [0, 3])
@pytest.mark.parametrize("world_size", [2, 4, 16])  # 16: two hosts of eight
def test_rows_are_the_same_for_any_world_size(world_size, data_seed, tiny_data):
    settings = {
        "micro_batch_tokens": 64,
        "train_batch_tokens": 64 * max(4, world_size),
        "data_seed": data_seed,
    }
    alone = loader_of(tiny_data, **settings)
    ranks = [
        loader_of(tiny_data, rank_of(rank, world_size), **settings) for rank in range(world_size)
    ]
    for step in range(3):
        want = list(alone.rank_rows(step))
        got = [row for loader in ranks for row in loader.rank_rows(step)]
        assert len(want) == len(got) == max(4, world_size)
        for one, other in zip(want, got, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def parts_of(rows):
    """Rows of a step -> its documents as pairs of inputs and targets, the pieces that a row's
    end has cut joined.
    """
    inputs, targets = (torch.cat([row[i].flatten() for row in rows]).tolist() for i in (0, 1))
    starts = [t for t, token in enumerate(inputs) if t == 0 or token == BOS_ID]
    return [
        (inputs[a:b], targets[a:b]) for a, b in zip(starts, [*starts[1:], len(inputs)], strict=True)
    ]


def attention_work(row):
    """Causal pairs of a row."""
    lengths = row.cu_seqlens.diff().double()
    return (lengths * (lengths + 1) / 2).sum().item()


@pytest.mark.parametrize("rows", [2, 8])
def test_balanced_rows_hold_the_documents_of_their_step_and_equal_work(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt.Hyperparameters, "row_segments", 256)
    lengths = np.random.default_rng(rows).lognormal(3, 1, 3000).astype(int).clip(1, 200)
    write_documents(tmp_path, "train", lengths)
    settings = {
        "micro_batch_tokens": 2048,
        "train_batch_tokens": 2048 * rows,
        "train_seq_len": 64,
    }
    dealt, plain = (loader_of(tmp_path, balance_rows=on, **settings) for on in (True, False))
    worst, before = [], []
    for step in range(4):
        got, want = list(dealt.rank_rows(step)), list(plain.rank_rows(step))
        # every token with its own target, once
        assert sorted(parts_of(got)) == sorted(parts_of(want))
        assert [row.inputs.shape for row in got] == [(1, 2048)] * rows
        # so many documents are cut, once each
        assert sum(row.inputs[0, 0].item() != BOS_ID for row in got) < rows
        for found, most in (got, worst), (want, before):
            work = [attention_work(row) for row in found]
            most.append(max(work) / np.mean(work))
    assert max(worst) < 1.01 < 1.02 < np.mean(before)


def test_documents_longer_than_their_row_are_not_dealt(tmp_path):
    # rows of 128: the second begins amid a document
    tokens, _ = write_documents(tmp_path, "train", [300, 40, 90])
    dealt, plain = (
        loader_of(tmp_path, balance_rows=on, micro_batch_tokens=64) for on in (True, False)
    )
    for step in range(3):
        for row, want in zip(dealt.rank_rows(step), plain.rank_rows(step), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(row, want, strict=True))


def test_a_step_of_balanced_rows_has_the_loss_and_the_gradients_of_its_documents(tmp_path):
    """Where no row's end cuts one, the sums over a step are those of its documents, in whatever
    row they are.
    """
    write_documents(tmp_path, "train", [31, 63, 15, 15, 127, 63, 31, 31, 15, 15, 31, 31, 7, 7, 15])
    found = []
    for on in (True, False):
        trainer = trainer_of(
            tmp_path,
            balance_rows=on,
            micro_batch_tokens=128,
            train_batch_tokens=256,
            train_seq_len=128,
        )
        rows = list(trainer.loader.rank_rows(0))
        found.append((*summed_gradients(trainer), rows))
    (*_, got), (*_, want) = found
    assert all(row.inputs[0, 0] == BOS_ID for row in got) and not torch.equal(
        got[0].inputs, want[0].inputs
    )
    torch.testing.assert_close(found[0][:-1], found[1][:-1], rtol=1e-4, atol=1e-6)


def test_world_size_that_does_not_divide_is_refused(tiny_data):
    with pytest.raises(SettingError, match="MICRO_BATCH_TOKENS"):
        loader_of(tiny_data, rank_of(0, 3))


def test_stream_goes_round_at_its_end(tmp_path):
    tokens, _ = write_documents(tmp_path, "train", [60, 70, 66])
    endless = np.tile(tokens, 5)
    loader = loader_of(tmp_path, balance_rows=False)
    for step in range(3):
        for number, row in enumerate(loader.rank_rows(step)):
            first = (2 * step + number) * 128
            first += np.flatnonzero(endless[first : first + 128] == BOS_ID)[0]
            assert row.inputs[0].tolist() == endless[first : first + 128].tolist()
            assert row.targets.tolist() == endless[first + 1 : first + 129].tolist()
    # the second row, which begins with the third document, already goes round
    assert len(tokens) == 199
    assert 199 - 132 in loader.build(1).cu_seqlens


@pytest.mark.parametrize("sizes", [[150, 246, 3], [1, 398], [128, 128, 143], [57, 1, 1, 340]])
def test_shards_cut_anywhere_give_the_same_rows(sizes, tmp_path):
    folders = [tmp_path / "one", tmp_path / "many"]
    for folder, cuts in zip(folders, (None, sizes), strict=True):
        folder.mkdir()
        tokens, _ = write_documents(
            folder, "train", [90, 33, 1, 8, 0, 64, 100, 95], shard_sizes=cuts
        )
    assert len(tokens) == sum(sizes) and len(list(folders[1].iterdir())) == len(sizes)
    one, many = (loader_of(folder) for folder in folders)
    for index in range(7):
        assert all(
            torch.equal(a, b) for a, b in zip(one.build(index), many.build(index), strict=True)
        )


def test_beyond_the_limit_the_shortest_neighbours_share_a_segment(tmp_path, monkeypatch):
    # one token more each, 128 in all
    write_documents(tmp_path, "train", [29, 9, 19, 4, 3, 19, 14, 23] * 2)
    starts = [0, 30, 40, 60, 65, 69, 89, 104, 128]
    for most, gone in ((8, []), (7, [65]), (6, [65, 60])):
        want = [start for start in starts if start not in gone]
        monkeypatch.setattr(train_gpt.Hyperparameters, "row_segments", most)
        loader = loader_of(tmp_path, balance_rows=False)
        assert loader.build(0).cu_seqlens.tolist() == want
    # the next would be longer than 32
    monkeypatch.setattr(train_gpt.Hyperparameters, "row_segments", 5)
    loader = loader_of(tmp_path, balance_rows=False)
    assert loader.build(0).cu_seqlens.tolist() == [0, 32, 64, 96, 128, 128]


def test_token_outside_the_vocabulary_is_refused(tmp_path):
    write_documents(tmp_path, "train", [60, 200])
    largest = TokenStream(tmp_path, "train").read(0, 129).max().item()
    loader_of(tmp_path, vocab_size=largest + 1).build(0)
    with pytest.raises(DataError, match=f"{largest} is outside VOCAB_SIZE={largest}"):
        list(loader_of(tmp_path, vocab_size=largest).rank_rows(0))


def test_reading_ahead_changes_no_row_even_after_going_back(tiny_data):
    ahead, fresh = loader_of(tiny_data), loader_of(tiny_data)
    for step in (0, 1, 2, 0, 1, 5, 4):
        for number, row in enumerate(ahead.rank_rows(step)):
            want = fresh.build(2 * step + number)
            assert all(torch.equal(a, b) for a, b in zip(row, want, strict=True))


def test_the_next_row_is_built_before_it_is_asked_for(tiny_data, monkeypatch):
    loader, built = loader_of(tiny_data), []
    build, arrived = loader.build, threading.Event()

    def recorded(index):
        built.append(index)
        if index == 2:
            arrived.set()
        return build(index)

    monkeypatch.setattr(loader, "build", recorded)
    list(loader.rank_rows(0))
    assert arrived.wait(PATIENCE) and built == [0, 1, 2]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"balance_rows": False}])
def test_a_loader_of_shorter_pieces_has_the_rows_of_that_length(world_size, changes, tmp_path):
    """Those of a run with this TRAIN_SEQ_LEN, whatever was read ahead at another length."""
    lengths = np.random.default_rng(1).integers(3, 100, 150)  # balanced otherwise at each length
    write_documents(tmp_path, "train", lengths)
    changes = {"train_batch_tokens": 512} | changes
    for rank in range(world_size):
        dist = rank_of(rank, world_size)
        loader = loader_of(tmp_path, dist, **changes)
        for step, length in enumerate((32, 8, 8, 16, 32)):
            if length != loader.seq_len:
                loader = loader.in_pieces(length)
            rows = list(loader.rank_rows(step))
            whole = {"train_seq_len": length, "full_seq_len_at": 0.0}
            fresh = loader_of(tmp_path, dist, **whole, **changes)
            for row, want in zip(rows, fresh.rank_rows(step), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(row, want, strict=True))
                assert row.cu_seqlens.diff().max() == length


def test_the_length_changes_no_document_of_a_step(tiny_data):
    whole = loader_of(tiny_data)
    cut = whole.in_pieces(8)
    for step in range(5):
        assert sorted(parts_of(list(cut.rank_rows(step)))) == sorted(
            parts_of(list(whole.rank_rows(step)))
        )


# --- one step


def test_losses_of_a_micro_batch_are_gone_before_backward_and_the_next(tiny_data, monkeypatch):
    """A captured micro-batch returns memory of its graph, which a reference keeps in use."""
    trainer = trainer_of(tiny_data)
    returned, alive = [], []
    forward, backward = trainer.forward, torch.Tensor.backward

    def look():
        alive.extend(losses() is not None for losses in returned)

    def noted_forward(*row):
        look()
        losses = forward(*row)
        returned.append(weakref.ref(losses))
        return losses

    def noted_backward(loss):
        look()
        backward(loss)

    monkeypatch.setattr(trainer, "forward", noted_forward)
    monkeypatch.setattr(torch.Tensor, "backward", noted_backward)
    trainer.train_step(0, 0.0, True)
    assert len(returned) == trainer.hp.micro_steps > 1 and not any(alive)


def summed_gradients(trainer, step=0):
    """Gradients that a step hands to the optimizers, and its loss."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trainer.optimizers,
            "step",
            lambda progress, number: found.update(
                {
                    name: p.grad.clone()
                    for name, p in trainer.model.named_parameters()
                    if p.grad is not None
                }
            ),
        )
        loss = trainer.train_step(step, 0.0, True)
    return loss, found


@pytest.fixture(scope="module")
def aligned_data(tmp_path_factory):
    """Documents of exactly 32 tokens, so that rows of 64, 128 and 256 tokens cut none of them."""
    folder = tmp_path_factory.mktemp("aligned")
    write_documents(folder, "train", [31] * 60, seed=4)
    return folder


def roughened(trainer):
    """The trainer, its parameters moved off their initial values so that every gradient counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return trainer


@pytest.mark.parametrize("micro", [64, 128])
def test_accumulation_equals_one_large_micro_batch(micro, aligned_data, rel):
    whole, cut = (
        roughened(trainer_of(aligned_data, micro_batch_tokens=tokens)) for tokens in (256, micro)
    )
    assert cut.hp.micro_steps == 256 // micro and whole.hp.micro_steps == 1
    for step in range(2):
        (loss, want), (accumulated, got) = (summed_gradients(t, step) for t in (whole, cut))
        assert accumulated.item() == pytest.approx(loss.item(), rel=1e-5)
        assert want.keys() == got.keys()
        assert all(rel(got[name], want[name]) < 1e-4 for name in want)
        for trainer in (whole, cut):
            trainer.model.zero_grad()


def test_accumulated_losses_stay_equal_over_steps(aligned_data):
    losses = []
    for micro in (64, 256):
        trainer = trainer_of(aligned_data, micro_batch_tokens=micro)
        losses.append([trainer.train_step(step, 0.0, True).item() for step in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][3] < losses[0][0]


def test_training_learns_more_than_token_frequencies(tmp_path):
    tokens, _ = write_documents(tmp_path, "train", [63] * 200, seed=5)
    shares = np.bincount(tokens) / len(tokens)
    unigram_entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    trainer = trainer_of(
        tmp_path, iterations=30, train_batch_tokens=512, micro_batch_tokens=512, train_seq_len=64
    )
    losses = [trainer.train_step(step, step / 30, step >= 11).item() for step in range(30)]
    assert losses[0] == pytest.approx(math.log(97), abs=0.1)
    assert np.mean(losses[-5:]) < 0.5 * unigram_entropy


def test_training_ends_with_the_average_of_the_weights(tiny_data):
    trainer, weights = trainer_of(tiny_data, ema_span=0.9), {}
    update = trainer.ema.update

    def keep_weights(step, progress):
        update(step, progress)
        weights.update((name, p.detach().clone()) for name, p in trainer.model.named_parameters())

    trainer.ema.update = keep_weights
    figures = trainer.train(quiet)
    assert figures["steps"] == 4
    for average, (name, p) in zip(
        trainer.ema.average, trainer.model.named_parameters(), strict=True
    ):
        assert torch.equal(p, average)
        assert name.startswith("skip") or not torch.equal(p, weights[name])


def test_looping_begins_at_its_fraction_of_the_iterations(tiny_data, monkeypatch):
    log, calls = Lines(), []
    trainer = trainer_of(tiny_data, log=log, iterations=10, enable_looping_at=0.35)
    step = trainer.train_step
    monkeypatch.setattr(
        trainer, "train_step", lambda *arguments: calls.append(arguments) or step(*arguments)
    )
    figures = trainer.train(quiet)
    assert calls == [(n, n / 10, n >= 4) for n in range(10)]
    assert any("step:4 looping:1" in line for line in log)
    assert len(figures["tokens_per_second_by_loop_state"]) == 2


def test_the_change_of_lengths_compiles_nothing_under_the_clock(tiny_data):
    """Only values of cu_seqlens change, so that the warm-up has made all graphs."""
    log, graphs, lengths = Lines(), [], []
    trainer = trainer_of(tiny_data, log=log, iterations=10, full_seq_len_at=0.25, warmup_steps=2)

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(trainer.model.forward, fullgraph=True, dynamic=False, backend=count)

    def watched(inputs, targets, cu_seqlens, looping, max_seqlen):
        lengths.append(cu_seqlens.diff().max().item())
        return compiled(inputs, targets, cu_seqlens, looping, max_seqlen)

    trainer.forward = watched
    trainer.warm_up()
    assert len(graphs) == 2  # without and with looping
    lengths.clear()
    trainer.train(quiet)
    assert len(graphs) == 2
    assert lengths == [16] * 2 * 3 + [32] * 2 * 7  # two rows a step
    changes = [line.rpartition(" ")[0] for line in log if "train_seq_len" in line]
    assert changes == ["step:0 train_seq_len:16", "step:3 train_seq_len:32"]


def test_calibration_and_held_out_rows_have_the_last_length(tiny_data):
    """Also those of a run that ends early: they stand for what the model meets in evaluation."""
    trainer = trainer_of(tiny_data, full_seq_len_at=1.0, quant_check_rows=1)
    loader = trainer.loader  # the run's, which quantization reads as well
    trainer.train(quiet)
    assert trainer.loader.seq_len == 16
    rows = [loader.held_out_row(0), loader.row(0, None)]
    assert [row.cu_seqlens.diff().max() for row in rows] == [32, 32]


def test_the_average_is_that_of_the_weights_after_each_step(tiny_data):
    trainer = trainer_of(tiny_data)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_step(0, 0.0, False)
    share = 0.9  # of the weights after step 0
    for average, before, p in zip(
        trainer.ema.average, start, trainer.model.parameters(), strict=True
    ):
        torch.testing.assert_close(average, before.lerp(p.detach(), share))
    assert not torch.equal(trainer.model.tok_emb, start[0])


def test_the_logged_loss_is_that_of_all_ranks_and_no_share_changes(tiny_data, dist, monkeypatch):
    trainer = trainer_of(tiny_data, dist)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))  # two equal ranks
    share = torch.tensor(1.5)
    trainer.log_step(3, share, 1.0, 0.5, False)
    assert trainer.last_loss == 3.0 and share == 1.5


def test_tokens_per_second_count_every_token_of_a_step(tiny_data):
    trainer = trainer_of(tiny_data)
    trainer.loop_starts = [(0, 0.0), (4, 2.0)]
    figures = trainer.summary(10, 4.0, [torch.tensor(1.0)])
    assert figures["tokens_per_second_by_loop_state"] == [4 * 256 / 2, 6 * 256 / 2]


# --- warm-up


def test_warm_up_trains_in_both_loop_states_and_restores_every_bit(tiny_data, monkeypatch):
    trainer, seen, loops = trainer_of(tiny_data, warmup_steps=3), [], []
    before, rng = everything(trainer), torch.get_rng_state()
    step = trainer.train_step

    def watched(number, progress, looping):
        torch.rand(3)  # a step that draws must leave no trace either
        step(number, progress, looping)
        seen.append(everything(trainer))
        loops.append(looping)

    monkeypatch.setattr(trainer, "train_step", watched)
    trainer.warm_up()
    assert loops == [False] * 3 + [True] * 3
    for state in seen:
        for name in ("tok_emb", "mlp_down_bank", "ema0", "momentum0", "momentum3"):
            assert not torch.equal(state[name], before[name]), name
        assert any(key.startswith("adamw") for key in state)
    assert equal_states(everything(trainer), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(p.grad.any() for p in trainer.model.parameters())


def test_training_after_a_warm_up_equals_training_without(tiny_data):
    """Rows, weights, average, momentum, all as if no warm-up had been."""
    results = []
    for warmup_steps in (0, 3):
        trainer = trainer_of(tiny_data, warmup_steps=warmup_steps, iterations=5)
        trainer.warm_up()
        losses = [trainer.train_step(step, step / 5, step > 1).item() for step in range(5)]
        results.append((losses, everything(trainer)))
    assert results[0][0] == results[1][0]
    assert equal_states(results[0][1], results[1][1])


def test_warm_up_without_loops_or_with_loops_from_the_start_takes_one_state(tiny_data, monkeypatch):
    for changes, want in (({"num_loops": 0}, [False]), ({"enable_looping_at": 0.0}, [True])):
        trainer, loops = trainer_of(tiny_data, warmup_steps=1, **changes), []
        monkeypatch.setattr(
            trainer,
            "train_step",
            lambda step, progress, looping, loops=loops: loops.append(looping),
        )
        trainer.warm_up()
        assert loops == want


# --- clock and budget


class FakeTime:
    """Stands for the time module inside train_gpt; moves only when told."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.fixture
def fake_time(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr(train_gpt, "time", clock)
    return clock


def test_paused_time_does_not_count(fake_time, dist):
    clock = TrainingClock(dist)
    fake_time.now += 3
    with clock.paused():
        fake_time.now += 100
    fake_time.now += 2
    assert clock.seconds() == pytest.approx(5)
    with clock.paused():
        pass
    assert clock.seconds() == pytest.approx(5)


def slow_steps(trainer, fake_time, seconds, monkeypatch):
    """Replaces the training step by one that takes `seconds`(step) -> list of (progress,
    looping).
    """
    calls = []

    def step(number, progress, looping):
        fake_time.now += seconds(number)
        calls.append((progress, looping))
        return torch.tensor(1.0)

    monkeypatch.setattr(trainer, "train_step", step)
    return calls


@pytest.mark.parametrize(
    "seconds",
    [lambda n: 1.0, lambda n: 0.3, lambda n: 1.0 if n < 6 else 2.0],
    ids=["even", "short", "slower_with_loops"],
)
def test_training_keeps_its_budget_less_the_reserve(seconds, tiny_data, fake_time, monkeypatch):
    trainer = trainer_of(
        tiny_data, max_wallclock_seconds=20.0, gptq_reserve_seconds=5.0, iterations=10_000
    )
    calls = slow_steps(trainer, fake_time, seconds, monkeypatch)
    figures = trainer.train(quiet)
    assert 15 - 2.5 * seconds(len(calls)) <= figures["training_seconds"] <= 15
    assert figures["steps"] == len(calls)
    elapsed = np.cumsum([0, *(seconds(n) for n in range(len(calls) - 1))])
    assert [progress for progress, _ in calls] == pytest.approx(list(elapsed / 15))
    assert [looping for _, looping in calls] == [progress >= 0.35 for progress, _ in calls]


def test_iterations_end_a_run_before_its_budget(tiny_data, fake_time, monkeypatch):
    trainer = trainer_of(
        tiny_data, max_wallclock_seconds=20.0, gptq_reserve_seconds=5.0, iterations=7
    )
    calls = slow_steps(trainer, fake_time, lambda n: 0.01, monkeypatch)
    assert trainer.train(quiet)["steps"] == len(calls) == 7


def test_a_step_longer_than_the_budget_is_noted(tiny_data, fake_time, monkeypatch):
    log = Lines()
    trainer = trainer_of(tiny_data, log=log, max_wallclock_seconds=20.0, gptq_reserve_seconds=5.0)
    slow_steps(trainer, fake_time, lambda n: 16.0, monkeypatch)
    assert trainer.train(quiet)["steps"] == 1
    assert any("training took 16.00 s of 15.00" in line for line in log)


def test_evaluations_inside_training_are_off_the_clock(tiny_data, fake_time, monkeypatch):
    trainer = trainer_of(
        tiny_data,
        max_wallclock_seconds=20.0,
        gptq_reserve_seconds=5.0,
        iterations=10_000,
        val_loss_every=4,
    )
    calls = slow_steps(trainer, fake_time, lambda n: 1.0, monkeypatch)
    evaluations = []

    def evaluate():
        fake_time.now += 60
        evaluations.append(len(calls))
        return "scored"

    figures = trainer.train(evaluate)
    assert evaluations == [4, 8, 12]
    assert 12 <= figures["steps"] <= 15 and figures["training_seconds"] == pytest.approx(
        figures["steps"]
    )


class Follower(train_gpt.Dist):
    """A rank other than 0: whatever its own clock says, it is told rank 0's numbers."""

    def __init__(self, told):
        super().__init__("cpu")
        self.told = iter(told)

    def barrier(self):
        pass

    def max_over_ranks(self, *numbers):
        return [next(self.told), *numbers[1:]]


def test_schedule_and_end_follow_the_clock_of_rank_0(tiny_data, fake_time, monkeypatch):
    told = [2.0, 4.0, 6.0, 8.0, 12.0, 14.5, 14.5]
    trainer = trainer_of(
        tiny_data,
        Follower(told),
        max_wallclock_seconds=20.0,
        gptq_reserve_seconds=5.0,
        iterations=99,
    )
    calls = slow_steps(trainer, fake_time, lambda n: 0.001, monkeypatch)
    figures = trainer.train(quiet)
    assert [progress for progress, _ in calls] == pytest.approx([0, 2 / 15, 4 / 15, 6 / 15, 8 / 15])
    assert figures["training_seconds"] == 14.5  # at 12 s a step took 4 s: another might not fit


@pytest.mark.parametrize("rank, seconds", [(0, 7.0), (1, 0.0)])
def test_no_rank_but_0_hands_in_its_clock(rank, seconds, dist, fake_time, monkeypatch):
    dist.rank = rank
    clock = TrainingClock(dist)
    monkeypatch.setattr(dist, "max_over_ranks", lambda *numbers: numbers)
    fake_time.now += 7
    assert clock.clock_and_max(3) == (seconds, 3)


def test_short_run_ends_in_time(tiny_data):
    trainer = trainer_of(
        tiny_data, max_wallclock_seconds=1.5, gptq_reserve_seconds=0.2, iterations=1_000_000
    )
    step, starts = trainer.train_step, []
    trainer.train_step = lambda *arguments: starts.append(time.perf_counter()) or step(*arguments)
    figures = trainer.train(quiet)
    # However slow the steps are: no step starts late, but for the one that was begun when its clock
    # was looked at; and training goes on until two more steps like the last would be too long.
    assert len(starts) == figures["steps"] >= 1 and ([starts[0], *starts][-2] - starts[0]) < 1.3
    assert figures["training_seconds"] > 1.3 / 3


# --- two ranks


def train_on(dist, folder):
    """Losses over all ranks and the final average of five steps."""
    trainer = trainer_of(folder, dist, iterations=5)
    losses = [
        dist.all_reduce(trainer.train_step(step, step / 5, step > 1)).item() for step in range(5)
    ]
    return losses, trainer.ema.average


def test_two_ranks_train_like_one(tiny_data, tmp_path):
    (losses, average), (again, other) = run_on_ranks(train_on, 2, tmp_path, str(tiny_data))
    assert losses == again and all(torch.equal(a, b) for a, b in zip(average, other, strict=True))
    alone, _ = train_on(train_gpt.Dist("cpu"), str(tiny_data))
    assert losses == pytest.approx(alone, rel=1e-4)


class RecordingDist:
    """Rank `rank` of `world_size` on the CPU; keeps what it would add to each sum over ranks."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size, self.device, self.sums = (
            rank,
            world_size,
            torch.device("cpu"),
            [],
        )

    def all_reduce(self, tensor):
        self.sums.append(tensor.clone())
        return tensor


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_hessians_are_those_of_one_rank_for_any_world_size(tiny_data, ops, world_size):
    """Also with more ranks than calibration rows: each rank takes part in every sum."""
    hp = tiny_hp(data_path=str(tiny_data), gptq_calibration_batches=3, train_batch_tokens=3840)
    model = train_gpt.GPT(hp, ops, torch.float32)
    stream = train_gpt.TokenStream(hp.data_path, "train")

    def parts(rank, ranks):
        dist = RecordingDist(rank, ranks)
        train_gpt.collect_hessians(model, train_gpt.TrainLoader(stream, hp, dist), hp, dist)
        return dist.sums

    whole = parts(0, 1)
    shared = [
        sum(tensors)
        for tensors in zip(*(parts(rank, world_size) for rank in range(world_size)), strict=True)
    ]
    assert len(shared) == len(whole) == 4 * hp.num_layers + 1
    for got, want in zip(shared, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
