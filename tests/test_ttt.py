"""Test-time training: legality (score first), coverage, ranks, the plan, the adapters' optimizer, adaptation."""

import copy
import inspect
import math
import threading

import numpy as np
import pytest
import test_evaluation
import torch
from conftest import Lines, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import document_spans, make_model, on_ranks, piece_losses, small_hp

import train_gpt
from train_gpt import BatchedLoRA, Dist, Evaluator, ValidationSet, plan_ttt, window_positions

torch.set_num_threads(1)
TTT = train_gpt.TestTimeTrainer  # under its own name pytest would take it for a class of tests

LENGTHS = [40, 17, 1, 8, 0, 33, 7, 0, 25, 1]  # tokens after BOS; two lone BOS, one-token documents, tails
ACTIVE = {"ttt_lora_lr": 0.02, "global_ttt_lr": 0.05, "global_ttt_chunk_tokens": 64}  # rates that matter


def make_validation(folder, hp, lengths=LENGTHS):
    return test_evaluation.make_validation(folder, hp, lengths)


def run_ttt(hp, validation, world_size=1, log=None):
    """Test-time training from make_model's weights on every rank -> [score of each rank], [model of each rank]."""
    models = [make_model(hp) for _ in range(world_size)]

    def work(dist):
        return TTT(models[dist.rank], validation, hp, dist, Lines() if log is None else log).evaluate()

    return on_ranks(world_size, work), models


@pytest.fixture
def counted(monkeypatch):
    """[{(document, target position): loss}], one dictionary per call of Score.add, in the order of the calls."""
    calls, waiting = [], threading.local()
    chunk_batch, add = TTT.chunk_batch, train_gpt.Score.add

    def note_chunk(trainer, rows, chunk):
        waiting.rows, waiting.chunk, waiting.trainer = rows.copy(), chunk, trainer
        return chunk_batch(trainer, rows, chunk)

    def note_add(score, losses, scored, charges):
        add(score, losses, scored, charges)
        call, starts = {}, waiting.trainer.validation.starts
        for row, document in enumerate(waiting.rows.tolist()):
            for column in scored[row].nonzero()[:, 0].tolist():
                key = document, int(starts[document]) + waiting.chunk * waiting.trainer.hp.ttt_chunk_size + column + 1
                assert key not in call
                call[key] = losses[row, column].item()
        calls.append(call)

    monkeypatch.setattr(TTT, "chunk_batch", note_chunk)
    monkeypatch.setattr(train_gpt.Score, "add", note_add)
    return calls


def flat(calls):
    """Calls -> {(document, target position): loss}; every target must be there once."""
    pairs = [pair for call in calls for pair in call.items()]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def chunked_losses(model, validation, hp, document):
    """{(document, target position): nats} of a document scored in chunks, each by a forward of its window alone."""
    start, end = document_spans(validation.tokens)[document]
    found = {}
    for first in range(start, end, hp.ttt_chunk_size):
        last = min(first + hp.ttt_chunk_size, end)
        window = max(start, last - hp.ttt_eval_seq_len)
        losses = piece_losses(model, validation.tokens[window:last + 1])[first - window:]
        found |= {(document, first + i + 1): loss for i, loss in enumerate(losses.tolist())}
    return found


# ---- coverage


COVERAGE = [
    {}, {"ttt_batch_size": 1}, {"ttt_batch_size": 64}, {"ttt_batch_size": 3, "ttt_lanes": 1}, {"ttt_lanes": 5},
    {"ttt_chunk_size": 7}, {"ttt_chunk_size": 1, "ttt_eval_seq_len": 5, "ttt_max_docs": 2, "ttt_batch_size": 2},
    {"ttt_chunk_size": 32},
    {"ttt_chunk_size": 30, "ttt_eval_seq_len": 31}, {"ttt_eval_seq_len": 500}, {"ttt_max_docs": 1}, {"ttt_max_docs": 5},
    {"ttt_max_docs": 500}, {"phased_ttt_num_phases": 0}, {"phased_ttt_num_phases": 2}, {"phased_ttt_prefix_docs": 0},
    {"phased_ttt_num_phases": 3, "phased_ttt_prefix_docs": 50_000, "ttt_max_docs": 7},
    {"phased_ttt_num_phases": 9, "phased_ttt_prefix_docs": 20_000}, {"phased_ttt_prefix_docs": 1_000_000},
    {"ttt_lora_sites": "q,head"}, {"ttt_warm_start_a": False},
]


@pytest.mark.parametrize("changes", COVERAGE, ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()))
def test_every_token_is_scored_once(tmp_path, counted, changes):
    hp = small_hp(data_path=str(tmp_path), **ACTIVE | changes)
    tokens, charges = write_documents(tmp_path, "val", LENGTHS, shard_sizes=[100, 91, 500])
    (score,), _ = run_ttt(hp, ValidationSet(hp, None))
    spans = document_spans(tokens)[:hp.ttt_max_docs or None]
    last = spans[-1][1]
    assert sorted(position for _, position in flat(counted)) == list(range(1, last + 1))
    assert all(spans[document][0] < position <= spans[document][1] for document, position in flat(counted))
    assert (score["tokens"], score["bytes"]) == (last, charges[:last + 1].sum())
    assert (score["documents"], score["partial"]) == (len(spans), len(spans) < len(LENGTHS))
    assert score["loss"] == pytest.approx(np.mean(list(flat(counted).values())), rel=1e-6)


@pytest.mark.parametrize("lengths", [[1], [5], [60], [3, 0], [0, 5], [40, 0, 0, 0], [9, 200]])
def test_odd_streams_are_scored_whole(tmp_path, counted, lengths):
    hp = small_hp(data_path=str(tmp_path), phased_ttt_prefix_docs=25_000, **ACTIVE)
    validation = make_validation(tmp_path, hp, lengths)
    (score,), _ = run_ttt(hp, validation)
    assert sorted(position for _, position in flat(counted)) == list(range(1, len(validation.tokens)))
    assert (score["tokens"], score["bytes"]) == (len(validation.tokens) - 1, validation.bytes.sum())


def test_tokens_and_bytes_agree_with_plain_and_sliding_evaluation(tmp_path, dist):
    hp = small_hp(data_path=str(tmp_path), **ACTIVE)
    validation = make_validation(tmp_path, hp)
    (score,), _ = run_ttt(hp, validation)
    evaluator = Evaluator(make_model(hp), validation, hp, dist)
    for plain in (evaluator.evaluate_bpb(), evaluator.evaluate_bpb(hp.eval_stride)):
        assert (score["tokens"], score["bytes"]) == (plain["tokens"], plain["bytes"])


def test_a_lost_token_raises(tmp_path, monkeypatch):
    hp = small_hp(data_path=str(tmp_path))
    chunk_batch = TTT.chunk_batch

    def forgetful(trainer, rows, chunk):
        *others, scored, charges = chunk_batch(trainer, rows, chunk)
        return *others, scored & (torch.arange(scored.size(1)) < 7), charges

    monkeypatch.setattr(TTT, "chunk_batch", forgetful)
    with pytest.raises(RuntimeError, match="scored"):
        run_ttt(hp, make_validation(tmp_path, hp))


# ---- legality: a token may be learnt from only after its loss has been counted


LEGAL = {"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 25_000, "ttt_batch_size": 2, "ttt_lanes": 2, **ACTIVE}
LEGAL_LENGTHS = [30, 45, 9, 38, 22, 50, 3, 17]  # the plan: 5 1 | 3 0 | 4 7 and 2 6 (prefix of 4, two phases)


@pytest.mark.parametrize("document, offset, reaches_others", [
    (5, 1, True),  # the first token of the first document
    (5, 20, True), (5, 50, False),  # the last token is learnt by the base (and only there)
    (1, 13, True), (3, 8, True), (4, 9, False), (6, 1, False),
])
def test_a_changed_token_changes_no_loss_counted_before_it(tmp_path, counted, document, offset, reaches_others):
    hp = small_hp(data_path=str(tmp_path), **LEGAL)
    validation = make_validation(tmp_path, hp, LEGAL_LENGTHS)
    place = int(validation.starts[document]) + offset
    runs = []
    for change in (0, 1):
        validation.tokens[place] += change if validation.tokens[place] < hp.vocab_size - 1 else -change
        counted.clear()
        run_ttt(hp, validation)
        runs.append(list(counted))
    assert [list(call) for call in runs[0]] == [list(call) for call in runs[1]]  # the order does not depend on contents
    moment = next(i for i, call in enumerate(runs[0]) if (document, place) in call)
    for number, (before, after) in enumerate(zip(*runs, strict=True)):
        differ = {key for key in before if before[key] != after[key]}
        if number < moment:
            assert not differ
        elif number == moment:
            assert (document, place) in differ
            assert all(key[0] == document and key[1] >= place for key in differ)
    if reaches_others:
        later = [key for before, after in zip(*(run[moment + 1:] for run in runs), strict=True)
                 for key in before if before[key] != after[key]]
        assert later, "nothing ever learnt from this token: the test would notice nothing"


def test_a_prefix_token_reaches_the_next_phase_and_no_other_lane_before(tmp_path, counted):
    hp = small_hp(data_path=str(tmp_path), **LEGAL | {"phased_ttt_num_phases": 1})
    validation = make_validation(tmp_path, hp, LEGAL_LENGTHS)
    phases = plan_ttt(validation.ends - validation.starts, hp)
    assert [sorted(phase.documents.tolist()) for phase in phases] == [[0, 1, 3, 5], [2, 4, 6, 7]]
    document = int(phases[0].lanes[0][0][0])
    place = int(validation.ends[document]) - 2
    runs = []
    for change in (0, 1):
        validation.tokens[place] += change if validation.tokens[place] < hp.vocab_size - 1 else -change
        counted.clear()
        run_ttt(hp, validation)
        runs.append(flat(counted))
    other_lanes = {int(d) for lane in phases[0].lanes[1:] for batch in lane for d in batch}
    differ = {key for key in runs[0] if runs[0][key] != runs[1][key]}
    assert other_lanes and not {key for key in differ if key[0] in other_lanes}
    assert {key[0] for key in differ} >= set(phases[1].documents.tolist())


def test_first_losses_are_the_untrained_models(tmp_path, counted):
    hp = small_hp(data_path=str(tmp_path), **ACTIVE | {"phased_ttt_num_phases": 0})
    validation, model = make_validation(tmp_path, hp), make_model(hp)
    run_ttt(hp, validation)
    losses = flat(counted)
    for document, (start, _) in enumerate(document_spans(validation.tokens)):
        plain = chunked_losses(model, validation, hp, document)
        first = [key for key in plain if key[1] <= start + hp.ttt_chunk_size]
        assert [losses[key] for key in first] == pytest.approx([plain[key] for key in first], rel=1e-4, abs=1e-5)
        rest = [key for key in plain if key not in first]
        assert not rest or max(abs(losses[key] - plain[key]) for key in rest) > 1e-3


# ---- values


@pytest.mark.parametrize("changes", [{}, {"ttt_eval_seq_len": 20, "ttt_batch_size": 3}, {"ttt_chunk_size": 32},
                                     {"ttt_chunk_size": 7, "ttt_eval_seq_len": 100, "ttt_batch_size": 64}])
def test_without_learning_it_is_plain_scoring_of_windows(tmp_path, counted, changes):
    hp = small_hp(data_path=str(tmp_path), ttt_lora_lr=0.0, global_ttt_lr=0.0, **changes)
    validation, model = make_validation(tmp_path, hp), make_model(hp)
    (score,), _ = run_ttt(hp, validation)
    plain = {}
    for document in range(len(LENGTHS)):
        plain |= chunked_losses(model, validation, hp, document)
    losses = flat(counted)
    assert losses.keys() == plain.keys()
    assert max(abs(losses[key] - plain[key]) for key in plain) < 1e-4
    assert score["loss"] == pytest.approx(sum(plain.values()) / len(plain), rel=1e-6)


def test_one_lora_step_is_the_gradient_step_on_the_chunk_alone(tmp_path, counted):
    """Second chunk of the only document, by hand: AdamW's first step on A, B with explicit products."""
    hp = small_hp(data_path=str(tmp_path), ttt_lora_lr=0.05, ttt_lora_sites="head",
                  phased_ttt_num_phases=0, ttt_lanes=1)
    validation, model = make_validation(tmp_path, hp, [15]), make_model(hp)
    run_ttt(hp, validation)
    kept = BatchedLoRA.initial_a({"lm_head": (1, hp.model_dim, hp.vocab_size)}, 0, hp, torch.device("cpu"))
    a = torch.nn.Parameter(kept["lm_head"][0, 0].clone())
    b = torch.nn.Parameter(torch.zeros(hp.vocab_size, hp.ttt_lora_rank))
    tokens = torch.from_numpy(validation.tokens)
    scale = hp.ttt_lora_alpha / hp.ttt_lora_rank

    def losses():
        hidden = model.forward_hidden(tokens[None, :-1], max_seqlen=15, looping=True)[0].detach()
        logits = hidden @ model.tok_emb.detach().T + scale * (hidden @ a.T @ b.T)
        logits = hp.logit_softcap * torch.tanh(logits / hp.logit_softcap)
        return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")

    optimizer = torch.optim.AdamW([a, b], hp.ttt_lora_lr, (0.0, hp.ttt_beta2), 1e-10, hp.ttt_weight_decay)
    first = losses()
    first[:8].mean().backward()
    optimizer.step()
    wanted = [*first[:8].tolist(), *losses()[8:].tolist()]
    assert list(flat(counted).values()) == pytest.approx(wanted, rel=1e-4)
    assert wanted[8:] != pytest.approx(first[8:].tolist(), rel=1e-3)


def repetitive(tmp_path, documents=4, length=50):
    """Every document repeats one and the same walk of 10 tokens."""
    tokens, charges = write_documents(tmp_path, "val", [length] * documents)
    for start, _ in document_spans(tokens):
        tokens[start + 1:start + 1 + length] = 10 + np.arange(length) % 10 * 7
    return tokens


def test_learning_improves_the_loss_on_repetitive_text(tmp_path):
    losses = {}
    for name, changes in {"none": (0.0, 0.0), "lora": (0.01, 0.0), "global": (0.0, 0.05), "both": (0.01, 0.05)}.items():
        hp = small_hp(data_path=str(tmp_path), ttt_lora_lr=changes[0], global_ttt_lr=changes[1],
                      global_ttt_chunk_tokens=64, phased_ttt_prefix_docs=25_000, ttt_batch_size=2, ttt_chunk_size=10)
        tokens = repetitive(tmp_path)
        validation = ValidationSet(hp, None)
        validation.tokens[:] = tokens
        losses[name] = run_ttt(hp, validation)[0][0]["loss"]
    assert losses["lora"] < losses["none"] - 0.1
    assert losses["global"] < losses["none"] - 0.05
    assert losses["both"] < losses["lora"]


def test_two_runs_give_the_same_number(tmp_path):
    hp = small_hp(data_path=str(tmp_path), **ACTIVE)
    validation = make_validation(tmp_path, hp)
    (first,), (model,) = run_ttt(hp, validation)
    (again,), (same,) = run_ttt(hp, validation)
    assert first == again
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))
    other = small_hp(data_path=str(tmp_path), seed=43, **ACTIVE)  # another A: the comparison can tell runs apart
    assert run_ttt(other, validation)[0][0]["loss"] != first["loss"]


def test_the_answer_does_not_depend_on_the_number_of_ranks(tmp_path, counted):
    """Bit for bit up to the first adaptation, whose sums have another order; from there on within rounding."""
    hp = small_hp(data_path=str(tmp_path), ttt_lanes=4, ttt_batch_size=2, phased_ttt_num_phases=2,
                  **ACTIVE | {"ttt_lora_lr": 1e-3})
    validation = make_validation(tmp_path, hp)
    (alone,), (model,) = run_ttt(hp, validation)
    losses = flat(counted)
    first_phase = set(plan_ttt(validation.ends - validation.starts, hp)[0].documents.tolist())
    assert 0 < len(first_phase) < len(LENGTHS) / 2
    for world_size in (2, 3):
        counted.clear()
        scores, models = run_ttt(hp, validation, world_size)
        assert all(score == scores[0] for score in scores)
        assert (scores[0]["tokens"], scores[0]["bytes"]) == (alone["tokens"], alone["bytes"])
        assert scores[0]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        found = flat(counted)
        assert found.keys() == losses.keys()
        assert all(found[key] == losses[key] for key in losses if key[0] in first_phase)
        assert max(abs(found[key] - losses[key]) for key in losses) < 1e-2
        for name, p in model.named_parameters():
            states = [dict(other.named_parameters())[name] for other in models]
            assert all(torch.equal(state, states[0]) for state in states)  # ranks stay equal bit for bit
            assert torch.allclose(states[0], p, atol=1e-4)


def test_lane_i_runs_on_rank_i_mod_world_size_in_the_plans_order(tmp_path, monkeypatch):
    hp = small_hp(data_path=str(tmp_path), ttt_lanes=5, ttt_batch_size=1, phased_ttt_num_phases=2, global_ttt_lr=0.0)
    validation, scored = make_validation(tmp_path, hp), {}

    def note(trainer, documents, kept):
        scored.setdefault(trainer.dist.rank, []).append(documents.tolist())

    monkeypatch.setattr(TTT, "score_batch", note)
    monkeypatch.setattr(train_gpt.Score, "total", lambda score, dist, expected: {})
    phases = plan_ttt(validation.ends - validation.starts, hp)
    for world_size in (1, 2, 3):
        scored.clear()
        run_ttt(hp, validation, world_size)
        for rank in range(world_size):
            assert scored[rank] == [batch.tolist() for phase in phases for lane in range(rank, 5, world_size)
                                    for batch in phase.lanes[lane]]


def test_finished_documents_leave_the_batch_without_changing_the_others(tmp_path, counted, monkeypatch):
    initial_a = BatchedLoRA.initial_a

    def same_in_every_place(shapes, lane, hp, device):
        kept = initial_a(shapes, 0, small_hp(ttt_batch_size=1), device)
        return {site: a.expand(-1, hp.ttt_batch_size, -1, -1).clone() for site, a in kept.items()}

    monkeypatch.setattr(BatchedLoRA, "initial_a", staticmethod(same_in_every_place))
    runs = {}
    for batch in (1, 4, 13):
        counted.clear()
        hp = small_hp(data_path=str(tmp_path), ttt_batch_size=batch, ttt_warm_start_a=False, phased_ttt_num_phases=0,
                      ttt_lora_lr=0.005)
        run_ttt(hp, make_validation(tmp_path, hp))
        runs[batch] = flat(counted)
    for batch in (4, 13):
        assert runs[batch].keys() == runs[1].keys()
        assert max(abs(runs[batch][key] - runs[1][key]) for key in runs[1]) < 2e-3


def test_the_batch_shrinks_to_two_rows_at_least(tmp_path, monkeypatch):
    hp = small_hp(data_path=str(tmp_path), ttt_batch_size=8, ttt_lanes=1, phased_ttt_num_phases=0)
    sizes = []
    losses = TTT.chunk_losses
    monkeypatch.setattr(TTT, "chunk_losses",
                        lambda trainer, windows, *rest: sizes.append(len(windows)) or losses(trainer, windows, *rest))
    validation = make_validation(tmp_path, hp, [40, 8, 17, 3, 70])  # targets 41, 9, 18, 4, 70: chunks 6, 2, 3, 1, 9
    run_ttt(hp, validation)
    assert sizes == [5, 4, 3, 2, 2, 2, 2, 2, 2]


# ---- what is handed on


@pytest.mark.parametrize("warm", [True, False])
def test_a_stays_in_its_lane_and_b_starts_at_zero(tmp_path, monkeypatch, warm):
    """A shadow of every lane's A: a batch starts from what its own lane left, place by place, and from B = 0."""
    hp = small_hp(data_path=str(tmp_path), ttt_lanes=2, ttt_batch_size=2, ttt_warm_start_a=warm, ttt_lora_lr=0.02)
    validation, batches = make_validation(tmp_path, hp), []
    score_batch, chunk_losses = TTT.score_batch, TTT.chunk_losses
    select, init, lengths = BatchedLoRA.select, BatchedLoRA.__init__, validation.ends - validation.starts

    def note_batch(trainer, documents, kept):
        batches.append({"kept": id(kept), "final": {}, "documents": documents, "chunk": 0})
        score_batch(trainer, documents, kept)

    def note_losses(trainer, windows, targets, positions, adapters):
        batch = batches[-1]
        for row, place in enumerate(batch["places"]):
            if place < len(batch["ends"]) and batch["ends"][place] == batch["chunk"]:  # A as it scores the last chunk
                batch["final"][place] = {site: a[:, row].detach().clone() for site, (a, _) in adapters.items()}
        batch["chunk"] += 1
        return chunk_losses(trainer, windows, targets, positions, adapters)

    def note_init(lora, shapes, kept, places, hp, device):
        init(lora, shapes, kept, places, hp, device)
        batch = batches[-1]
        assert batch["kept"] == id(kept)
        assert all(not b.any() and b.shape[1] == len(places) for b in lora.b.values())
        assert lora.steps == 0 and not any(square.any() for square in lora.squares)
        batch |= {"places": list(range(len(places))), "start": {site: a.detach().clone() for site, a in lora.a.items()}}
        batch["ends"] = [(size - 1) // hp.ttt_chunk_size for size in lengths[batch["documents"]].tolist() if size]

    def note_select(lora, rows):
        batches[-1]["places"] = [batches[-1]["places"][row] for row in rows.tolist()]
        select(lora, rows)

    monkeypatch.setattr(TTT, "score_batch", note_batch)
    monkeypatch.setattr(TTT, "chunk_losses", note_losses)
    monkeypatch.setattr(BatchedLoRA, "__init__", note_init)
    monkeypatch.setattr(BatchedLoRA, "select", note_select)
    (_,), (model,) = run_ttt(hp, validation)
    lane_of = {tuple(batch.tolist()): lane for phase in plan_ttt(lengths, hp)
               for lane in range(hp.ttt_lanes) for batch in phase.lanes[lane]}
    shadow = {lane: BatchedLoRA.initial_a(train_gpt.lora_shapes(model), lane, hp, torch.device("cpu"))
              for lane in range(hp.ttt_lanes)}
    assert len(batches) > hp.ttt_lanes
    assert not torch.equal(shadow[0]["q"], shadow[1]["q"])
    for batch in batches:
        mine = shadow[lane_of[tuple(batch["documents"].tolist())]]
        count = len(batch["ends"])
        for site, start in batch["start"].items():
            assert torch.equal(start[:, :count], mine[site][:, :count])
        if warm:
            for place in range(count):
                for site, a in batch["final"][place].items():
                    mine[site][:, place] = a


@pytest.mark.parametrize("seed, lane", [(0, 0), (3, 7)])
def test_initial_a_is_uniform_within_one_over_root_in(seed, lane):
    hp = small_hp(seed=seed, ttt_batch_size=8, ttt_lora_rank=16)
    shapes = train_gpt.lora_shapes(make_model(hp))
    kept = BatchedLoRA.initial_a(shapes, lane, hp, torch.device("cpu"))
    assert kept.keys() == set(train_gpt.LORA_SITES.values())
    for site, a in kept.items():
        slots, width_in, _ = shapes[site]
        assert a.shape == (slots, 8, 16, width_in)
        bound = width_in ** -0.5
        assert 0.99 * bound < a.abs().max() <= bound
        assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.05) and abs(a.mean()) < 0.05 * bound
    again = BatchedLoRA.initial_a(shapes, lane, hp, torch.device("cpu"))
    other = BatchedLoRA.initial_a(shapes, lane + 1, hp, torch.device("cpu"))
    assert all(torch.equal(kept[site], again[site]) and not torch.equal(kept[site], other[site]) for site in kept)


def test_every_slot_and_site_has_an_adapter_of_its_own():
    hp = small_hp()
    model = make_model(hp)
    shapes = train_gpt.lora_shapes(model)
    slots = len(model.slots(looping=True))
    assert slots == 4
    assert {site: shape[0] for site, shape in shapes.items()} == {
        "q": slots, "k": slots, "v": slots, "attn_out": slots, "mlp_out": slots, "lm_head": 1}
    tokens = torch.randint(8, hp.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    base = model.token_losses(model.forward_hidden(tokens, max_seqlen=12, looping=True), tokens)
    for site, (count, width_in, width_out) in shapes.items():
        for slot in range(count):
            a, b = torch.ones(count, 2, hp.ttt_lora_rank, width_in), torch.zeros(count, 2, width_out, hp.ttt_lora_rank)
            b[slot, 1] = torch.linspace(-0.1, 0.1, width_out)[:, None]  # the second document's only
            tap = train_gpt.LoRATap({site: (a, b)}, 1.0)
            h = model.forward_hidden(tokens, max_seqlen=12, looping=True, tap=tap)
            losses = model.token_losses(h, tokens, tap.at_head())
            assert torch.allclose(losses[0], base[0], atol=1e-5)
            assert not torch.allclose(losses[1], base[1], atol=1e-4), (site, slot)


# ---- the optimizer of the adapters


@pytest.mark.parametrize("lr, beta2, decay", [(1e-4, 0.99, 0.5), (0.03, 0.9, 0.0), (0.01, 0.0, 2.0)])
def test_the_lora_step_is_adamw_without_first_moment(lr, beta2, decay):
    hp = small_hp(ttt_lora_lr=lr, ttt_beta2=beta2, ttt_weight_decay=decay, ttt_batch_size=5)
    shapes = {"q": (3, 8, 6), "lm_head": (1, 8, 11)}
    kept = BatchedLoRA.initial_a(shapes, 0, hp, torch.device("cpu"))
    lora = BatchedLoRA(shapes, kept, np.array([0, 1, 4]), hp, torch.device("cpu"))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in lora.parameters()]
    optimizer = torch.optim.AdamW(twins, lr=lr, betas=(0.0, beta2), eps=1e-10, weight_decay=decay)
    generator = torch.Generator().manual_seed(5)
    for step in range(6):
        gradients = [torch.randn(p.shape, generator=generator) * 10.0 ** -step for p in lora.parameters()]
        gradients[0][:, 1] = 0  # a document without a gradient
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient.clone()
        lora.step(tuple(gradients))
        optimizer.step()
        for p, twin in zip(lora.parameters(), twins, strict=True):
            assert torch.allclose(p, twin, rtol=1e-5, atol=1e-8)
    lora.select(torch.tensor([0, 2]))  # what stays goes on as before
    gradients = [torch.randn(p.shape, generator=generator) for p in lora.parameters()]
    for twin, gradient in zip(twins, gradients, strict=True):
        twin.grad = torch.zeros_like(twin)
        twin.grad[:, [0, 2]] = gradient
    lora.step(tuple(gradients))
    optimizer.step()
    for p, twin in zip(lora.parameters(), twins, strict=True):
        assert p.requires_grad and torch.allclose(p, twin[:, [0, 2]], rtol=1e-5, atol=1e-8)


# ---- global adaptation


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("clip, chunk_tokens", [(0.05, 64), (100.0, 64), (1.0, 10_000), (1.0, 1)])
def test_global_adaptation_is_a_plain_sgd_loop(tmp_path, clip, chunk_tokens, world_size):
    hp = small_hp(data_path=str(tmp_path), global_ttt_lr=0.02, global_ttt_grad_clip=clip,
                  global_ttt_chunk_tokens=chunk_tokens)
    validation = make_validation(tmp_path, hp, [90, 33, 1, 8, 64, 7, 31])
    documents = np.array([4, 1, 6, 3])
    models = [make_model(hp) for _ in range(world_size)]
    on_ranks(world_size, lambda dist: TTT(
        models[dist.rank], validation, hp, dist, Lines()).global_adapt(documents))

    model = make_model(hp)
    start_values = copy.deepcopy(dict(model.named_parameters()))
    spans, chunks, seen = document_spans(validation.tokens), {}, 0
    for document in documents.tolist():
        start, end = spans[document]
        for first in range(start, end, hp.ttt_eval_seq_len):
            last = min(first + hp.ttt_eval_seq_len, end)
            chunks.setdefault(seen // chunk_tokens, []).append((first, last))
            seen += last - first
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for number, pieces in enumerate(chunks.values()):
        tokens = sum(last - first for first, last in pieces)
        model.zero_grad()
        for first, last in pieces:
            piece = torch.from_numpy(validation.tokens[first:last + 1])
            hidden = model.forward_hidden(piece[None, :-1], max_seqlen=len(piece), looping=True)
            (model.token_losses(hidden[0], piece[1:]).sum() / tokens).backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        rate = 0.02 * 0.5 * (1 + math.cos(math.pi * number / max(1, len(chunks) - 1)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                velocity[name] = 0.9 * velocity[name] + gradients[name] * min(1.0, clip / norm)
                p -= rate * velocity[name]
    moved = sum((p - start_values[name]).abs().max().item() for name, p in model.named_parameters())
    assert moved > 5e-4 and len(chunks) == {64: 3, 10_000: 1, 1: 7}[chunk_tokens]
    for found in models:
        for name, p in found.named_parameters():
            change = (p - start_values[name]).double()
            wanted = (model.get_parameter(name) - start_values[name]).double()
            assert (change - wanted).norm() <= 2e-3 * wanted.norm() + 1e-7, name
            assert p.grad is None


def test_global_adaptation_runs_once_per_phase_on_what_was_scored_since(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(TTT, "score_batch",
                        lambda trainer, documents, kept: order.append(documents.tolist()))
    monkeypatch.setattr(TTT, "global_adapt",
                        lambda trainer, documents: order.append(("adapt", sorted(documents.tolist()))))
    monkeypatch.setattr(train_gpt.Score, "total", lambda score, dist, expected: {})
    for phases, adaptations in ((0, 0), (1, 1), (2, 2), (3, 3)):
        order.clear()
        hp = small_hp(data_path=str(tmp_path), phased_ttt_num_phases=phases, phased_ttt_prefix_docs=25_000,
                      ttt_batch_size=2)
        run_ttt(hp, make_validation(tmp_path, hp))
        since, found, trained = [], 0, []
        for event in order:
            if event[0] == "adapt":
                assert event[1] == sorted(since)
                trained, since, found = trained + since, [], found + 1
            else:
                since += event
        assert found == adaptations and since
        assert len(trained) == len(set(trained)) == (round(len(LENGTHS) / 2) if phases else 0)


# ---- the plan


SIZES = st.lists(st.integers(0, 400), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 6), st.integers(0, 4), st.integers(0, 70_000))
def test_the_plan_holds_every_document_once_longest_first_in_balanced_lanes(sizes, batch_size, lanes, phases, prefix):
    hp = small_hp(ttt_batch_size=batch_size, ttt_lanes=lanes, phased_ttt_num_phases=phases,
                  phased_ttt_prefix_docs=prefix)
    lengths = np.array(sizes)
    plan = plan_ttt(lengths, hp)
    everything = np.concatenate([phase.documents for phase in plan])
    assert sorted(everything.tolist()) == list(range(len(sizes)))
    assert (np.diff(lengths[everything]) <= 0).all()
    scaled = min(len(sizes), round(prefix * len(sizes) / 50_000)) if phases else 0
    borders = sorted({scaled * i // max(phases, 1) for i in range(phases + 1)} | {0, len(sizes)})
    assert [len(phase.documents) for phase in plan] == np.diff(borders).tolist()
    assert [phase.adapt for phase in plan] == [border <= scaled for border in borders[1:]]
    for phase in plan:
        assert len(phase.lanes) == lanes
        batches = [batch for lane in phase.lanes for batch in lane]
        assert sorted(np.concatenate(batches).tolist()) == sorted(phase.documents.tolist())
        assert sorted(map(len, batches), reverse=True)[:-1] == [batch_size] * (len(batches) - 1)
        assert all(len(batch) <= batch_size for batch in batches)
        costs = [[window_positions(lengths[batch], hp).sum() for batch in lane] for lane in phase.lanes]
        dearest = max(cost for lane in costs for cost in lane)
        assert max(map(sum, costs)) - min(map(sum, costs)) <= dearest  # no lane could give its last batch to another


@pytest.mark.parametrize("count, phases, borders", [
    (50_000, 1, [2500]), (1500, 1, [75]), (1500, 3, [25, 50, 75]), (1500, 2, [37, 75]), (50_000, 3, [833, 1666, 2500])])
def test_phase_borders_are_floors_of_the_scaled_prefix(count, phases, borders):
    hp = small_hp(phased_ttt_prefix_docs=2500, phased_ttt_num_phases=phases, ttt_batch_size=64, ttt_lanes=8)
    plan = plan_ttt(np.random.default_rng(0).integers(1, 4000, count), hp)
    assert np.cumsum([len(phase.documents) for phase in plan]).tolist() == [*borders, count]
    assert [phase.adapt for phase in plan] == [True] * phases + [False]


def test_the_plan_knows_nothing_of_ranks_and_contents():
    assert list(inspect.signature(plan_ttt).parameters) == ["lengths", "hp"]
    lengths = np.random.default_rng(1).integers(0, 300, 200)
    plans = [plan_ttt(lengths.copy(), small_hp()) for _ in range(2)]
    for one, two in zip(*plans, strict=True):
        assert [[batch.tolist() for batch in lane] for lane in one.lanes] == [
            [batch.tolist() for batch in lane] for lane in two.lanes]


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 40), st.integers(0, 200))
def test_window_positions_counts_the_windows(sizes, chunk, more):
    hp = small_hp(ttt_chunk_size=chunk, ttt_eval_seq_len=max(2, chunk + more))
    counts = [sum(min(last + chunk, hp.ttt_eval_seq_len) for last in range(0, size, chunk)) for size in sizes]
    assert window_positions(np.array(sizes), hp).tolist() == counts


def test_window_positions_are_what_a_document_computes(tmp_path, monkeypatch):
    hp = small_hp(data_path=str(tmp_path), ttt_batch_size=1, phased_ttt_num_phases=0)
    widths, losses = [], TTT.chunk_losses
    monkeypatch.setattr(TTT, "chunk_losses", lambda trainer, windows, *rest: widths.append(
        windows.size(1)) or losses(trainer, windows, *rest))
    for targets in (8, 16, 32, 40, 80):
        widths.clear()
        run_ttt(hp, make_validation(tmp_path, hp, [targets]))
        assert sum(widths) == window_positions(np.array([targets]), hp)[0]


def test_the_model_can_train_again_afterwards(tmp_path):
    hp = small_hp(data_path=str(tmp_path), **ACTIVE)
    _, (model,) = run_ttt(hp, make_validation(tmp_path, hp))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert Dist("cpu").world_size == 1
