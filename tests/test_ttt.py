"""Test-time training: legality (score first), coverage, ranks, the plan, the adapters' optimizer,
adaptation.
"""

import copy
import dataclasses
import inspect
import itertools
import math
import re
import threading
from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import evaluation_helpers
import numpy as np
import pytest
import torch
from conftest import TINY, Lines, install_parts_for, write_documents
from evaluation_helpers import (
    ACTIVE,
    document_spans,
    make_model,
    on_ranks,
    piece_losses,
    run_ttt,
    small_hp,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from benchmarks.bench_ttt import document_by_document
from presets import published as parts
from train_gpt import (
    BatchedLoRA,
    Dist,
    Evaluator,
    Scheduler,
    StepRow,
    plan_ttt,
    schedule_rank,
    window_positions,
)

torch.set_num_threads(1)
TTT = train_gpt.TestTimeTrainer  # under its own name pytest would take it for a class of tests

# tokens after BOS; two lone BOS, one-token documents, tails
LENGTHS = [40, 17, 1, 8, 0, 33, 7, 0, 25, 1]


def published_hp(**changes):
    """small_hp with the settings of presets/published.py."""
    return parts.Hyperparameters(**(TINY | evaluation_helpers.SMALL | changes))


def make_validation(folder, hp, lengths=LENGTHS):
    return evaluation_helpers.make_validation(folder, hp, lengths, vocab_size=hp.vocab_size)


def make_lora(hp, lanes=(0, 1), update=train_gpt.adamw_rows_ref):
    return BatchedLoRA(make_model(hp), lanes, hp, torch.device("cpu"), update)


def chunk_targets(table):
    """Table of StepRow -> {(row, column) of a loss: its target, a position in the stream}."""
    targets = {}
    for number, row in enumerate(table.tolist()):
        row = StepRow(*row)
        for column in range(row.count):
            targets[number, column] = row.window + row.first + column + 1
    return targets


def window_targets(windows):
    """Windows of one row of plain scoring -> {(column,) of a loss: its target}."""
    targets = [range(start + 1, end + 1) for start, end in windows.tolist()]
    return {(column,): t for column, t in enumerate(itertools.chain(*targets))}


def marked(scored):
    """Mask of Score.add -> [indices of a loss]."""
    return [tuple(place) for place in scored.nonzero().tolist()]


@pytest.fixture
def counted(monkeypatch):
    """[{(document, target position): loss}], one dictionary per call of Score.add, in the order
    of the calls: a step of chunks each, or a row of what the budget leaves.
    """
    calls, waiting = [], threading.local()
    evaluate, chunk_step = TTT.evaluate, TTT.chunk_step
    build, add = train_gpt.WindowPacker.build, train_gpt.Score.add

    def note_evaluate(trainer):
        waiting.starts = trainer.validation.starts
        return evaluate(trainer)

    def note_step(trainer, table, width):
        waiting.targets = chunk_targets(table)
        return chunk_step(trainer, table, width)

    def note_build(packer, windows):
        waiting.targets = window_targets(windows)
        return build(packer, windows)

    def note_add(score, losses, scored, target_bytes):
        add(score, losses, scored, target_bytes)
        assert marked(scored) == [*waiting.targets]
        targets = [*waiting.targets.values()]
        documents = np.searchsorted(waiting.starts, np.array(targets) - 1, "right") - 1
        keys = list(zip(documents.tolist(), targets, strict=True))
        calls.append(dict(zip(keys, losses[scored].tolist(), strict=True)))
        assert len(calls[-1]) == len(targets)

    for owner, name, note in (
        (TTT, "evaluate", note_evaluate),
        (TTT, "chunk_step", note_step),
        (train_gpt.WindowPacker, "build", note_build),
        (train_gpt.Score, "add", note_add),
    ):
        monkeypatch.setattr(owner, name, note)
    return calls


def step_rows(step):
    return [StepRow(*row) for row in step.table.tolist()]


def flat(calls):
    """Calls -> {(document, target position): loss}; every target must be there once."""
    pairs = [pair for call in calls for pair in call.items()]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def chunked_losses(model, validation, hp, document):
    """{(document, target position): nats} of a document scored in chunks, each by a forward of
    its window alone.
    """
    start, end = document_spans(validation.tokens)[document]
    found = {}
    for first in range(start, end, hp.ttt_chunk_size):
        last = min(first + hp.ttt_chunk_size, end)
        window = max(start, last - hp.ttt_eval_seq_len)
        losses = piece_losses(model, validation.tokens[window : last + 1])[first - window :]
        found |= {(document, first + i + 1): loss for i, loss in enumerate(losses.tolist())}
    return found


# ---- coverage


COVERAGE = [
    {},
    {"ttt_batch_size": 1},
    {"ttt_batch_size": 64},
    {"ttt_batch_size": 3, "ttt_lanes": 1},
    {"ttt_lanes": 5},
    {"ttt_chunk_size": 7},
    {"ttt_chunk_size": 1, "ttt_eval_seq_len": 5, "ttt_max_docs": 2, "ttt_batch_size": 2},
    {"ttt_chunk_size": 32},
    {"ttt_chunk_size": 30, "ttt_eval_seq_len": 31},
    {"ttt_eval_seq_len": 500},
    {"ttt_max_docs": 1},
    {"ttt_max_docs": 5},
    {"ttt_max_docs": 500},
    {"phased_ttt_num_phases": 0},
    {"phased_ttt_num_phases": 2},
    {"phased_ttt_prefix_docs": 0},
    {"phased_ttt_num_phases": 3, "phased_ttt_prefix_docs": 50_000, "ttt_max_docs": 7},
    {"phased_ttt_num_phases": 9, "phased_ttt_prefix_docs": 20_000},
    {"phased_ttt_prefix_docs": 1_000_000},
    {"ttt_lora_sites": "q,head"},
    {"ttt_warm_start_a": False},
    {"ttt_short_chunks": "8:2,30:3", "ttt_stale_context": 9},
    {"ttt_stale_context": 24},
    {"ngram_tilt_enabled": True, "ttt_stale_context": 24, "ttt_batch_size": 1},
    {"ngram_tilt_enabled": True, "ngram_tilt_orders": "1,3", "ttt_stale_context": 24},
]


@pytest.mark.parametrize(
    "changes", COVERAGE, ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items())
)
def test_every_token_is_scored_once(tmp_path, counted, changes, monkeypatch):
    install_parts_for(changes, monkeypatch)
    hp = small_hp(data_path=str(tmp_path), **ACTIVE | changes)
    tokens, target_bytes = write_documents(tmp_path, "val", LENGTHS, shard_sizes=[100, 91, 500])
    (score,), _ = run_ttt(hp, train_gpt.ValidationSet(hp))
    spans = document_spans(tokens)
    chosen = sorted({document for document, _ in flat(counted)})
    targets = [
        (document, place)
        for document in chosen
        for place in range(spans[document][0] + 1, spans[document][1] + 1)
    ]
    assert sorted(flat(counted)) == targets
    assert (score["tokens"], score["bytes"]) == (
        len(targets),
        sum(target_bytes[place] for _, place in targets),
    )
    wanted = min(hp.ttt_max_docs or len(LENGTHS), len(LENGTHS))
    assert (score["documents"], score["partial"]) == (wanted, wanted < len(LENGTHS))
    # the last document has no targets where it is a lone BOS
    assert len(chosen) in (wanted, wanted - 1)
    sizes = [LENGTHS[document] for document in chosen]
    assert len(chosen) < 5 or min(sizes) < 7 < 25 < max(sizes)  # of all lengths
    assert score["loss"] == pytest.approx(np.mean(list(flat(counted).values())), rel=1e-6)


@pytest.mark.parametrize("lengths", [[1], [5], [60], [3, 0], [0, 5], [40, 0, 0, 0], [9, 200]])
def test_odd_streams_are_scored_whole(tmp_path, counted, lengths):
    hp = small_hp(data_path=str(tmp_path), phased_ttt_prefix_docs=25_000, **ACTIVE)
    validation = make_validation(tmp_path, hp, lengths)
    (score,), _ = run_ttt(hp, validation)
    assert sorted(position for _, position in flat(counted)) == list(
        range(1, len(validation.tokens))
    )
    assert (score["tokens"], score["bytes"]) == (len(validation.tokens) - 1, validation.bytes.sum())


def test_tokens_and_bytes_agree_with_plain_evaluation(tmp_path, dist):
    hp = small_hp(data_path=str(tmp_path), **ACTIVE)
    validation = make_validation(tmp_path, hp)
    (score,), _ = run_ttt(hp, validation)
    plain = Evaluator(make_model(hp), validation, hp, dist).evaluate_bpb()
    assert (score["tokens"], score["bytes"]) == (plain["tokens"], plain["bytes"])


def test_a_lost_token_raises(tmp_path, monkeypatch):
    hp = small_hp(data_path=str(tmp_path))
    chunk_step = TTT.chunk_step

    def forgetful(trainer, table, width):
        StepRow(*table.T).count.clamp_max_(7)
        return chunk_step(trainer, table, width)

    monkeypatch.setattr(TTT, "chunk_step", forgetful)
    with pytest.raises(RuntimeError, match="scored"):
        run_ttt(hp, make_validation(tmp_path, hp))


# ---- legality: a token may be learnt from only after its loss has been counted


LEGAL = {
    "phased_ttt_num_phases": 2,
    "phased_ttt_prefix_docs": 25_000,
    "ttt_batch_size": 2,
    "ttt_lanes": 2,
    **ACTIVE,
}
# the plan: 5 1 | 3 0 | 4 7 and 2 6 (prefix of 4, two phases)
LEGAL_LENGTHS = [30, 45, 9, 38, 22, 50, 3, 17]


@pytest.mark.parametrize(
    "document, offset, reaches_others",
    [
        (5, 1, True),  # the first token of the first document
        (5, 20, True),
        (5, 50, False),  # the last token is learnt by the base (and only there)
        (1, 13, True),
        (3, 8, True),
        (4, 9, False),
        (6, 1, False),
    ],
)
def test_a_changed_token_changes_no_loss_counted_before_it(
    tmp_path, counted, document, offset, reaches_others
):
    check_changed_token(tmp_path, counted, document, offset, reaches_others)


OPTIONS = {"ngram_tilt_enabled": True, "ttt_stale_context": 17, "ttt_short_chunks": "20:3,30:5"}


@pytest.mark.parametrize(
    "document, offset, reaches_others", [(5, 20, True), (1, 13, True), (4, 9, False)]
)
def test_nor_does_it_with_hints_and_stale_context(
    tmp_path, monkeypatch, counted, document, offset, reaches_others, published
):
    monkeypatch.setattr(parts.NGRAM, "context", 2)
    check_changed_token(tmp_path, counted, document, offset, reaches_others, **OPTIONS)


# boosts that are learned; of few tokens, so that there are many hints
LEARNED = {"ngram_tilt_enabled": True, "ngram_tilt_orders": "1,2,4"}
LEARNED_FEW = LEARNED | {"vocab_size": 14}


@pytest.mark.parametrize("options", [{}, OPTIONS | LEARNED], ids=["", "options"])
@pytest.mark.parametrize(
    "document, offset, reaches_others", [(5, 20, True), (1, 13, True), (4, 9, False)]
)
def test_nor_does_it_with_learned_boosts(
    tmp_path, counted, document, offset, reaches_others, options, published
):
    options = options | LEARNED_FEW
    check_changed_token(tmp_path, counted, document, offset, reaches_others, **options)


def check_changed_token(tmp_path, counted, document, offset, reaches_others, **options):
    hp = small_hp(data_path=str(tmp_path), **LEGAL | options)
    validation = make_validation(tmp_path, hp, LEGAL_LENGTHS)
    place = int(validation.starts[document]) + offset
    runs = []
    for change in (0, 1):
        validation.tokens[place] += (
            change if validation.tokens[place] < hp.vocab_size - 1 else -change
        )
        counted.clear()
        run_ttt(hp, validation)
        runs.append(list(counted))
    # the order does not depend on contents
    assert [list(call) for call in runs[0]] == [list(call) for call in runs[1]]
    moment = next(i for i, call in enumerate(runs[0]) if (document, place) in call)
    for number, (before, after) in enumerate(zip(*runs, strict=True)):
        differ = {key for key in before if before[key] != after[key]}
        if number < moment:
            assert not differ, "a token had an effect before it was counted"
        elif number == moment:
            assert (document, place) in differ
            before_it = [key for key in differ if key[0] != document or key[1] < place]
            assert not before_it, "a token had an effect before it was counted"
    if reaches_others:
        later = [
            key
            for before, after in zip(*(run[moment + 1 :] for run in runs), strict=True)
            for key in before
            if before[key] != after[key]
        ]
        assert later, "nothing ever learnt from this token: the test would notice nothing"


class Recorder:
    """The total order of a run, as it happens: when each target was counted and when weights first
    learnt from it.

    Targets are positions in the stream, of chunks and of what the budget leaves. `learnt` are
    [(place in the order, targets)], of LoRA steps and of SGD steps.
    """

    def __init__(self, monkeypatch):
        self.clock, self.counted, self.learnt = 0, {}, []
        chunk_step, add, step = TTT.chunk_step, train_gpt.Score.add, BatchedLoRA.step
        build, sgd_step = train_gpt.WindowPacker.build, torch.optim.SGD.step
        learn_boosts = parts.LearnedBoosts.learn
        built = []  # since the last SGD step

        def note_step(trainer, table, width):
            self.table, self.waiting = table, chunk_targets(table)
            chunk_step(trainer, table, width)

        def note_build(packer, windows):
            self.waiting = window_targets(windows)
            built.extend(self.waiting.values())
            return build(packer, windows)

        def note_add(score, losses, scored, target_bytes):
            add(score, losses, scored, target_bytes)
            self.clock += 1
            assert marked(scored) == [*self.waiting]
            for target in self.waiting.values():
                assert target not in self.counted, "counted twice"
                self.counted[target] = self.clock

        def note_learning(lora, gradient, source, target, number):
            step(lora, gradient, source, target, number)
            is_learnt = self.table[:, StepRow._fields.index("target")] != lora.scratch_row
            self.learn([*chunk_targets(self.table[is_learnt]).values()])

        def note_boosts(boosts, noted, lessons, counts):
            learn_boosts(boosts, noted, lessons, counts)
            self.learn([*chunk_targets(self.table).values()])

        def note_sgd_step(optimizer, *args, **kwargs):
            self.learn(list(built))
            built.clear()
            return sgd_step(optimizer, *args, **kwargs)

        for owner, name, note in (
            (TTT, "chunk_step", note_step),
            (train_gpt.Score, "add", note_add),
            (BatchedLoRA, "step", note_learning),
            (parts.LearnedBoosts, "learn", note_boosts),
            (train_gpt.WindowPacker, "build", note_build),
            (torch.optim.SGD, "step", note_sgd_step),
        ):
            monkeypatch.setattr(owner, name, note)

    def learn(self, targets):
        self.clock += 1
        self.learnt.append((self.clock, targets))

    def violations(self):
        """Targets that something learnt from before they were counted."""
        return {
            target
            for moment, targets in self.learnt
            for target in targets
            if self.counted.get(target, math.inf) >= moment
        }


def without_a_trace(chunk_step, trainer, table, width):
    """A step that neither counts nor changes adapters; what else it learns or keeps stays."""
    lora, score = trainer.lora, trainer.score
    states = [x.clone() for x in (lora.values, lora.squares)]
    trainer.score = SimpleNamespace(add=lambda *_: None)
    chunk_step(trainer, table, width)
    trainer.score, lora.values, lora.squares = score, *states


def learn_boosts_then_count(chunk_step):
    """The rule broken: boosts learn from every chunk before it is scored, and nothing else does."""

    def illegal(trainer, table, width):
        without_a_trace(chunk_step, trainer, table, width)
        chunk_step(trainer, table, width)

    return illegal


def learn_boosts_between(learned_and_counted):
    """The rule broken: boosts learn after the losses are known, but before they are counted."""

    def illegal(trainer, losses):
        pair = learned_and_counted(trainer, losses)
        trainer.boosts.learn(trainer.noted, trainer.lessons, torch.full((len(pair[0]),), 1))
        return pair

    return illegal


def share_boosts_at_once(chunk_step):
    """The rule broken: what is learned from a chunk reaches all queues before the phase ends."""

    def illegal(trainer, table, width):
        chunk_step(trainer, table, width)
        trainer.boosts.share(Dist("cpu"))

    return illegal


def followers_of_the_future(followers):
    """The rule broken: hints are what stood behind the same tokens later in the document."""

    def illegal(keys, tokens, moments, share):
        if len(moments.unique()) < len(moments):  # of phases, not of places in a document
            return followers(keys, tokens, moments, share)
        return followers(keys.flip(0), tokens.flip(0), moments, share).flip(0)

    return illegal


def learn_then_count(chunk_step):
    """The rule broken: every chunk is learnt first, and counted when it is gone through once
    more.
    """

    def illegal(trainer, table, width):
        score, trainer.score = trainer.score, SimpleNamespace(add=lambda *_: None)
        chunk_step(trainer, table, width)
        trainer.score = score
        chunk_step(trainer, table, width)

    return illegal


def adapt_then_score(run_steps):
    """The rule broken: the base is fine-tuned on the first documents before they are counted."""

    def illegal(trainer, steps):
        if trainer.progress.cost_done == 0:
            trainer.global_adapt(trainer.documents[:2])
        return run_steps(trainer, steps)

    return illegal


def learn_then_score(run_steps):
    """The rule broken: documents inherit what adapters learnt in a first pass over the same
    documents, of which nothing was counted.
    """

    def illegal(trainer, steps):
        score, trainer.score = trainer.score, SimpleNamespace(add=lambda *_: None)
        run_steps(trainer, steps)
        trainer.score = score
        return run_steps(trainer, steps)

    return illegal


def adapt_on_what_is_left(adapt_base):
    """The rule broken: the base learns from a phase whose documents the budget has left over."""

    def illegal(trainer, phase, tokens, steps_left):
        adapt_base(trainer, phase, tokens, [])

    return illegal


def cache_the_next_chunks(chunk_step):
    """The rule broken: before a chunk is scored, the cache holds keys and values of the next one
    of its document. Nothing else stays of this look ahead.
    """

    def illegal(trainer, table, width):
        ahead = table.clone()
        row = StepRow(*ahead.T)
        goes_on = row.target != trainer.lora.scratch_row
        last = len(trainer.packer.tokens) - 2 - row.first - row.count
        row.window.copy_(torch.where(goes_on, row.window + row.count, row.window).minimum(last))
        without_a_trace(chunk_step, trainer, ahead, width)
        chunk_step(trainer, table, width)

    return illegal


def read_caches_of_others(begin):
    """The rule broken: a document attends to keys and values of another one."""

    def illegal(stale, rows, windows, width):
        return begin(stale, rows.roll(1), windows, width)

    return illegal


@pytest.mark.parametrize("lengths", [LEGAL_LENGTHS, LENGTHS])
def test_nothing_is_learnt_before_it_is_counted(tmp_path, monkeypatch, lengths):
    hp = small_hp(data_path=str(tmp_path), **LEGAL)
    validation, recorder = make_validation(tmp_path, hp, lengths), Recorder(monkeypatch)
    (score,), _ = run_ttt(hp, validation)
    assert sorted(recorder.counted) == list(range(1, len(validation.tokens)))
    assert (
        validation.bytes[sorted(recorder.counted)].sum() == validation.bytes.sum() == score["bytes"]
    )
    assert not recorder.violations()
    once = [target for _, targets in recorder.learnt for target in targets]
    # by adapters, and again by the base
    assert len(once) > len(set(once)) > 0.5 * len(recorder.counted)


def test_nor_are_boosts(tmp_path, monkeypatch, published):
    hp = small_hp(data_path=str(tmp_path), **LEGAL | LEARNED_FEW)
    validation, recorder = make_validation(tmp_path, hp, LEGAL_LENGTHS), Recorder(monkeypatch)
    run_ttt(hp, validation)
    assert sorted(recorder.counted) == list(range(1, len(validation.tokens)))
    assert not recorder.violations()
    # by boosts also from the last chunk of a document
    assert {target for _, targets in recorder.learnt for target in targets} == {*recorder.counted}


def test_the_recorder_finds_boosts_that_learn_too_early(tmp_path, monkeypatch, published):
    hp = small_hp(data_path=str(tmp_path), **LEGAL | LEARNED_FEW)
    validation, recorder = make_validation(tmp_path, hp, LEGAL_LENGTHS), Recorder(monkeypatch)
    illegal = learn_boosts_between(parts.TestTimeTrainer.learned_and_counted)
    monkeypatch.setattr(parts.TestTimeTrainer, "learned_and_counted", illegal)
    run_ttt(hp, validation)
    assert {*recorder.counted} == recorder.violations()


# documents one by one: 13 and 9 steps in the phases that the base learns from, 4 in the last
ONE_BY_ONE = {"ttt_batch_size": 1, "ttt_lanes": 1}


def end_the_budget(monkeypatch, look):
    """Of all looks at the clock this one alone finds it short. There is one before every 8 steps,
    and one before the base learns, unless steps are left: then none follows.
    """
    looks = itertools.count()
    monkeypatch.setattr(train_gpt.Progress, "is_short_for", lambda *_: next(looks) == look)


@pytest.mark.parametrize("look, adaptations", [(0, 0), (1, 0), (3, 1), (4, 1), (6, 2)])
def test_what_the_budget_leaves_is_counted_once_and_never_learnt(
    tmp_path, monkeypatch, look, adaptations
):
    hp, log = small_hp(data_path=str(tmp_path), **LEGAL | ONE_BY_ONE), Lines()
    validation, recorder = make_validation(tmp_path, hp, LEGAL_LENGTHS), Recorder(monkeypatch)
    end_the_budget(monkeypatch, look)
    (score,), _ = run_ttt(hp, validation, log=log)
    assert sorted(recorder.counted) == list(range(1, len(validation.tokens)))
    assert not recorder.violations()
    assert (score["unadapted_tokens"] == score["tokens"]) == (look == 0)
    assert score["unadapted_tokens"] > 0
    assert sum(line.startswith("ttt_global_adaptation") for line in log) == adaptations


@pytest.mark.parametrize("look", [0, 1, 4])
def test_the_recorder_finds_a_base_that_learns_from_what_is_left(tmp_path, monkeypatch, look):
    hp = small_hp(data_path=str(tmp_path), **LEGAL | ONE_BY_ONE)
    validation, recorder = make_validation(tmp_path, hp, LEGAL_LENGTHS), Recorder(monkeypatch)
    end_the_budget(monkeypatch, look)
    monkeypatch.setattr(TTT, "adapt_base", adapt_on_what_is_left(TTT.adapt_base))
    (score,), _ = run_ttt(hp, validation)
    assert len(recorder.counted) == score["tokens"]
    assert 0 < len(recorder.violations()) <= score["unadapted_tokens"]


def slow_hints(validation, hp):
    """{target: (hint, targets that it was found at)}, token by token in the order of the plan."""
    tokens, context, found, before = (
        validation.tokens.tolist(),
        parts.NGRAM.context,
        {},
        defaultdict(list),
    )
    for phase in plan_ttt(validation.ends - validation.starts, hp):
        of_phase = []
        for document in phase.documents:
            own = defaultdict(list)
            for target in range(
                validation.starts[document] + context, validation.ends[document] + 1
            ):
                key = tuple(tokens[target - context : target])
                for cases in (before[key], own[key]):
                    ((hint, most),) = Counter(tokens[case] for case in cases).most_common(1) or [
                        (None, -1)
                    ]
                    if most >= 0.8 * len(cases):
                        found[target] = hint, list(cases)
                own[key].append(target)
                of_phase.append((key, target))
        for key, target in of_phase:
            before[key].append(target)
    return found


def test_hints_come_from_what_was_counted_before(tmp_path, monkeypatch, published):
    monkeypatch.setattr(parts.NGRAM, "context", 2)
    hp = small_hp(data_path=str(tmp_path), **LEGAL | OPTIONS)
    validation, recorder = make_validation(tmp_path, hp, LEGAL_LENGTHS), Recorder(monkeypatch)
    run_ttt(hp, validation)
    hints, others = slow_hints(validation, hp), 0
    assert len(hints) > 20 and not recorder.violations()
    for target, (_, cases) in hints.items():
        own, *of_cases = np.searchsorted(
            validation.starts, [target - 1, *[case - 1 for case in cases]], "right"
        )
        for case, document in zip(cases, of_cases, strict=True):
            same = document == own and case < target  # of the same chunk at the latest
            assert recorder.counted[case] < recorder.counted[target] + same
            others += document != own
    assert others > 5


ILLEGAL = pytest.mark.parametrize(
    "name, illegal",
    [
        ("chunk_step", learn_then_count),
        ("run_steps", adapt_then_score),
        ("run_steps", learn_then_score),
    ],
)


@ILLEGAL
def test_the_recorder_finds_what_breaks_the_rule(tmp_path, monkeypatch, name, illegal):
    hp = small_hp(data_path=str(tmp_path), **LEGAL)
    validation, recorder = make_validation(tmp_path, hp, LEGAL_LENGTHS), Recorder(monkeypatch)
    monkeypatch.setattr(TTT, name, illegal(getattr(TTT, name)))
    run_ttt(hp, validation)
    assert len(recorder.counted) == len(validation.tokens) - 1 and recorder.violations()


@ILLEGAL
def test_a_changed_token_finds_what_breaks_the_rule(tmp_path, monkeypatch, counted, name, illegal):
    monkeypatch.setattr(TTT, name, illegal(getattr(TTT, name)))
    with pytest.raises(AssertionError, match="before it was counted"):
        check_changed_token(tmp_path, counted, 0, 20, False)


# what a document inherits from the one before it, and nothing else
INHERITED = {"phased_ttt_num_phases": 0, "ttt_warm_start_a": True}


def test_a_changed_token_finds_an_a_that_learnt_from_what_was_not_counted(
    tmp_path, monkeypatch, counted
):
    monkeypatch.setattr(TTT, "run_steps", learn_then_score(TTT.run_steps))
    with pytest.raises(AssertionError, match="before it was counted"):
        check_changed_token(tmp_path, counted, 0, 20, False, **INHERITED)
    # it is A: where none is inherited, the first pass leaves nothing
    check_changed_token(tmp_path, counted, 0, 20, False, **INHERITED | {"ttt_warm_start_a": False})


# of each window the chunk alone is computed anew
STALE = {"ttt_stale_context": 24}


def test_a_changed_token_finds_future_keys_in_the_cache(tmp_path, monkeypatch, counted):
    check_changed_token(tmp_path, counted, 5, 34, True, **STALE)
    monkeypatch.setattr(TTT, "chunk_step", cache_the_next_chunks(TTT.chunk_step))
    with pytest.raises(AssertionError, match="before it was counted"):
        check_changed_token(tmp_path, counted, 5, 34, True, **STALE)


def test_a_changed_token_finds_hints_in_the_order_of_the_stream(
    tmp_path, monkeypatch, counted, published
):
    ngram_hints = parts.ngram_hints

    def illegal(tokens, starts, lengths, phases):
        return ngram_hints(
            tokens, starts, lengths, [SimpleNamespace(documents=np.array([d])) for d in range(8)]
        )

    monkeypatch.setattr(parts.NGRAM, "context", 2)
    monkeypatch.setattr(parts, "ngram_hints", illegal)
    with pytest.raises(AssertionError, match="before it was counted"):
        check_changed_token(tmp_path, counted, 0, 20, False, ngram_tilt_enabled=True)


def of_one_phase_each(hints_of_order):
    """The rule broken: hints also come from other documents of the same phase."""

    def illegal(tokens, starts, lengths, phases, *rest):
        phases = [SimpleNamespace(documents=np.array([d])) for d in range(len(starts))]
        return hints_of_order(tokens, starts, lengths, phases, *rest)

    return illegal


@pytest.mark.parametrize(
    "owner, name, illegal, document, offset",
    [
        (parts.TestTimeTrainer, "chunk_step", learn_boosts_then_count, 5, 20),
        (parts, "followers", followers_of_the_future, 5, 20),
        (parts, "hints_of_order", of_one_phase_each, 0, 20),
    ],
)
def test_a_changed_token_finds_boosts_and_hints_that_break_the_rule(
    tmp_path, monkeypatch, counted, owner, name, illegal, document, offset, published
):
    check_changed_token(tmp_path, counted, document, offset, False, **LEARNED_FEW)
    monkeypatch.setattr(owner, name, illegal(getattr(owner, name)))
    with pytest.raises(AssertionError, match="before it was counted"):
        check_changed_token(tmp_path, counted, document, offset, False, **LEARNED_FEW)


def check_lanes(tmp_path, counted, **options):
    """A token of the first phase reaches all documents of the next, and no other lane before."""
    hp = small_hp(data_path=str(tmp_path), **LEGAL | {"phased_ttt_num_phases": 1} | options)
    validation = make_validation(tmp_path, hp, LEGAL_LENGTHS)
    phases = plan_ttt(validation.ends - validation.starts, hp)
    assert [sorted(phase.documents.tolist()) for phase in phases] == [[0, 1, 3, 5], [2, 4, 6, 7]]
    document = int(phases[0].lanes[0][0][0])
    # later chunks attend to it, in the cache where there is one
    place = int(validation.starts[document]) + 10
    runs = []
    for change in (0, 1):
        validation.tokens[place] += (
            change if validation.tokens[place] < hp.vocab_size - 1 else -change
        )
        counted.clear()
        run_ttt(hp, validation)
        runs.append(flat(counted))
    other_lanes = {int(d) for lane in phases[0].lanes[1:] for batch in lane for d in batch}
    differ = {key for key in runs[0] if runs[0][key] != runs[1][key]}
    assert other_lanes
    assert not {key for key in differ if key[0] in other_lanes}, "a token reached another lane"
    assert {key[0] for key in differ} >= set(phases[1].documents.tolist())


@pytest.mark.parametrize("options", [{}, STALE], ids=["", "stale"])
def test_a_prefix_token_reaches_the_next_phase_and_no_other_lane_before(tmp_path, counted, options):
    check_lanes(tmp_path, counted, **options)


def test_learned_boosts_reach_no_other_lane_before(tmp_path, monkeypatch, counted, published):
    check_lanes(tmp_path, counted, **LEARNED_FEW)
    illegal = share_boosts_at_once(parts.TestTimeTrainer.chunk_step)
    monkeypatch.setattr(parts.TestTimeTrainer, "chunk_step", illegal)
    with pytest.raises(AssertionError, match="reached another lane"):
        check_lanes(tmp_path, counted, **LEARNED_FEW)


def test_keys_of_another_document_in_the_cache_are_found(tmp_path, monkeypatch, counted):
    stale = train_gpt.StaleContext
    monkeypatch.setattr(stale, "begin", read_caches_of_others(stale.begin))
    with pytest.raises(AssertionError, match="reached another lane"):
        check_lanes(tmp_path, counted, **STALE)


def test_first_losses_are_the_untrained_models(tmp_path, counted):
    hp = small_hp(data_path=str(tmp_path), **ACTIVE | {"phased_ttt_num_phases": 0})
    validation, model = make_validation(tmp_path, hp), make_model(hp)
    run_ttt(hp, validation)
    losses = flat(counted)
    for document, (start, _) in enumerate(document_spans(validation.tokens)):
        plain = chunked_losses(model, validation, hp, document)
        first = [key for key in plain if key[1] <= start + hp.ttt_chunk_size]
        assert [losses[key] for key in first] == pytest.approx(
            [plain[key] for key in first], rel=1e-4, abs=1e-5
        )
        rest = [key for key in plain if key not in first]
        assert not rest or max(abs(losses[key] - plain[key]) for key in rest) > 1e-3


# ---- legality: what is counted is -ln of a probability, which does not know the target


FEW = 12  # tokens of the vocabulary: a run for each of them
# the plan: 0 and 2, from which the base learns | in one queue 1 and 4, in another 3 and 5
FEW_LENGTHS = [13, 11, 12, 10, 9, 9]
FEW_TOKENS = {
    "vocab_size": FEW,
    "phased_ttt_prefix_docs": 16_000,
    "ttt_batch_size": 2,
    "ttt_lanes": 1,
    "ttt_chunk_size": 4,
    "ttt_eval_seq_len": 16,
    **ACTIVE,
}


def check_sums(tmp_path, counted, **options):
    """At one target of the last document of each queue: over all tokens that may stand there, the
    probabilities that were counted add up to one.

    Nothing is assumed of how a loss comes about: a scale or bias that is learnt with the adapters
    is in it. The base and the adapters have learnt before these targets, and adapters learn from
    them.
    """
    hp = small_hp(data_path=str(tmp_path), **FEW_TOKENS | options)
    validation = make_validation(tmp_path, hp, FEW_LENGTHS)
    queues = sum(plan_ttt(validation.ends - validation.starts, hp)[-1].lanes, [])
    assert queues == [[1, 4], [3, 5]]
    # the end of the second of three chunks
    places = [(document, int(validation.starts[document]) + 8) for document in (4, 5)]
    totals, plain = Counter(), {}
    for token in range(FEW):
        for _, place in places:
            validation.tokens[place] = token
        counted.clear()
        (score,), _ = run_ttt(hp, validation)
        losses = flat(counted)
        assert score["loss"] == pytest.approx(np.mean([*losses.values()]), rel=1e-6)
        totals.update({key: math.exp(-losses[key]) for key in places})
    for document, _ in places:
        plain |= chunked_losses(make_model(hp), validation, hp, document)
    assert min(abs(losses[key] - plain[key]) for key in places) > 1e-3  # of what was learnt
    assert [*totals.values()] == pytest.approx([1.0, 1.0], abs=1e-5), "no probabilities"
    return validation, score


class Replayed(NamedTuple):
    """Stands for the CUDA graph of a step: reads the table that it was captured with."""

    trainer: TTT
    table: torch.Tensor
    width: int

    def replay(self):
        self.trainer.chunk_step(self.table, self.width)


def capture_on_cpu(trainer, steps):
    """TestTimeTrainer.capture with such graphs."""
    for rows, width in {(len(step.table), step.width) for step in steps}:
        table = trainer.padding_table(rows)
        trainer.graphs[rows, width] = (Replayed(trainer, table, width), table)


def leave_the_last_phase(progress, cost):
    """Progress.is_short_for: the budget ends with the first phase."""
    return progress.phase == "phase:2/2"


def test_the_probabilities_of_a_step_add_up_to_one(tmp_path, counted):
    _, score = check_sums(tmp_path, counted)
    assert score["unadapted_tokens"] == 0


def test_so_do_those_of_captured_steps_with_stale_context(tmp_path, monkeypatch, counted):
    monkeypatch.setattr(TTT, "capture", capture_on_cpu)
    _, score = check_sums(tmp_path, counted, ttt_stale_context=12)
    assert score["unadapted_tokens"] == 0


def test_so_do_those_of_what_the_budget_leaves(tmp_path, monkeypatch, counted):
    monkeypatch.setattr(train_gpt.Progress, "is_short_for", leave_the_last_phase)
    validation, score = check_sums(tmp_path, counted)
    last_phase = [1, 3, 4, 5]
    lengths = validation.ends - validation.starts
    assert score["unadapted_tokens"] == lengths[last_phase].sum()


def test_so_do_those_of_targets_with_a_hint(tmp_path, monkeypatch, counted, published):
    monkeypatch.setattr(parts.NGRAM, "context", 1)
    hp = small_hp(**FEW_TOKENS)
    validation, _ = check_sums(tmp_path, counted, ngram_tilt_enabled=True)
    assert validation.starts[4] + 8 in slow_hints(validation, hp)


def test_so_do_those_with_learned_boosts(tmp_path, monkeypatch, counted, published):
    hp = small_hp(**FEW_TOKENS | LEARNED)
    learn, moved, places = parts.LearnedBoosts.learn, [], defaultdict(set)

    def note(boosts, *args):
        moved.append(boosts.own.abs().sum().item() + (boosts.common[:, -1] != 0).sum().item())
        learn(boosts, *args)
        # a CUDA graph reads and writes where they were when it was captured
        places[boosts].add((boosts.own.data_ptr(), boosts.common.data_ptr()))

    monkeypatch.setattr(parts.LearnedBoosts, "learn", note)
    monkeypatch.setattr(TTT, "capture", capture_on_cpu)
    validation, _ = check_sums(tmp_path, counted, **LEARNED)
    hints = slow_tilt_hints(validation, hp)
    assert {int(validation.starts[document]) + 8 for document in (4, 5)} & {*hints}
    assert moved[-1] > 1.0 and {*map(len, places.values())} == {1}


def count_half(learned_and_counted):
    """No probabilities: half of each loss is counted."""

    def illegal(trainer, losses):
        return losses, 0.5 * losses

    return illegal


def take_the_better_scale(head_function):
    """No probabilities: the scale of the logits is picked for each target by its loss."""

    def illegal(trainer):
        token_losses = head_function(trainer)

        def better(hidden, targets, tap):
            scaled = [token_losses(size * hidden, targets, tap) for size in (1.0, 1.5)]
            return torch.minimum(*scaled)

        return better

    return illegal


def show_the_targets(chunk_losses):
    """No probabilities of the future: the inputs are the targets."""

    def illegal(trainer, windows, targets, positions, tap):
        shown = windows.scatter(1, positions, targets)
        return chunk_losses(trainer, shown, targets, positions, tap)

    return illegal


@pytest.mark.parametrize(
    "name, illegal",
    [
        ("learned_and_counted", count_half),
        ("head_function", take_the_better_scale),
        ("chunk_losses", show_the_targets),
        ("chunk_step", learn_then_count),
        ("run_steps", learn_then_score),
    ],
)
def test_the_sum_finds_losses_that_know_their_target(tmp_path, monkeypatch, counted, name, illegal):
    monkeypatch.setattr(TTT, name, illegal(getattr(TTT, name)))
    with pytest.raises(AssertionError, match="no probabilities"):
        check_sums(tmp_path, counted)


# ---- hints


# sizes of documents, letters, phases, seed
STREAMS = (
    st.lists(st.integers(0, 60), min_size=1, max_size=9),
    st.integers(2, 4),
    st.integers(0, 3),
    st.integers(0, 99),
)


def random_stream(sizes, letters, seed):
    """Documents of so many random tokens behind their BOS -> what a ValidationSet knows of them."""
    starts = np.cumsum([0, *(size + 1 for size in sizes)])
    tokens = np.random.default_rng(seed).integers(8, 8 + letters, starts[-1] + 1)
    tokens[starts] = train_gpt.BOS_ID
    return SimpleNamespace(tokens=tokens, starts=starts[:-1], ends=starts[1:])


@settings(max_examples=40, deadline=None)
@given(*STREAMS)
def test_hints_are_what_mostly_followed_before(sizes, letters, phases, seed):
    hp = small_hp(phased_ttt_num_phases=phases, phased_ttt_prefix_docs=30_000)
    stream = random_stream(sizes, letters, seed)
    tokens, lengths = torch.from_numpy(stream.tokens), stream.ends - stream.starts
    for context in (1, 3, 15):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts.NGRAM, "context", context)
            wanted = slow_hints(stream, hp)
            phases = plan_ttt(lengths, hp)
            found = parts.ngram_hints(tokens, stream.starts, lengths, phases)
        assert {place: hint for place, hint in enumerate(found.tolist()) if hint >= 0} == {
            place: hint for place, (hint, _) in wanted.items()
        }


def slow_followers(cases):
    """(token, its number) that most of these cases have, of equals the one that got there last."""
    counts, best = Counter(), None
    for token in cases:
        counts[token] += 1
        if best is None or counts[token] >= counts[best]:
            best = token
    return best


def slow_tilt_hints(validation, hp):
    """{target: (hint, index of its order, cases, where the last one is)}, token by token."""
    tokens, orders, found = validation.tokens.tolist(), parts.tilt_orders(hp), {}
    before = defaultdict(list)
    for phase in plan_ttt(validation.ends - validation.starts, hp):
        of_phase = []
        for document in phase.documents:
            own = defaultdict(list)
            start, end = validation.starts[document], validation.ends[document]
            for target in range(start + 1, end + 1):
                keys = [tuple(tokens[target - n : target]) for n in orders if target - n >= start]
                for number, key in reversed([*enumerate(keys)]):
                    if key in own:
                        cases = own[key]
                        where = int(target - cases[-1] > hp.ttt_eval_seq_len)
                    elif key in before:
                        cases, where = before[key], 2
                    else:
                        continue
                    best = slow_followers([tokens[case] for case in cases])
                    found[target] = best, number, len(cases), where
                    break
                for key in keys:
                    own[key].append(target)
                    of_phase.append((key, target))
        for key, target in of_phase:
            before[key].append(target)
    return found


@settings(max_examples=40, deadline=None)
@given(
    *STREAMS,
    st.sampled_from(["1", "2,5", "9,1,3", "4,4,15"]),
)
def test_of_several_orders_the_longest_has_the_hint(sizes, letters, phases, seed, orders):
    hp = published_hp(
        phased_ttt_num_phases=phases,
        phased_ttt_prefix_docs=30_000,
        ngram_tilt_orders=orders,
        ttt_eval_seq_len=9,
    )
    stream = random_stream(sizes, letters, seed)
    tokens, lengths = torch.from_numpy(stream.tokens), stream.ends - stream.starts
    wanted = slow_tilt_hints(stream, hp)
    plan = plan_ttt(lengths, hp)
    found = parts.tilt_hints(tokens, stream.starts, lengths, plan, hp)
    assert {place: tuple(pair) for place, pair in enumerate(found.tolist()) if pair[0] >= 0} == {
        place: (hint, 12 * number + 3 * min(3, math.ceil(math.log2(cases))) + where)
        for place, (hint, number, cases, where) in wanted.items()
    }
    queues = parts.queue_of_targets(tokens, stream.starts, plan).tolist()
    for phase in plan:
        for number, documents in enumerate(itertools.chain(*phase.lanes)):
            for document in documents:
                start, end = stream.starts[document], stream.ends[document]
                assert {*queues[start + 1 : end + 1]} <= {number}


def learned_boosts(hp, seed=0):
    """LearnedBoosts that have learned something, queue by queue and in phases before."""
    generator = torch.Generator().manual_seed(seed)
    boosts = parts.LearnedBoosts(hp, torch.device("cpu"))
    for sums in (boosts.common[None], boosts.own):
        x = torch.randn(len(sums), 9, parts.NUM_FEATURES, generator=generator).double()
        sums[..., :-1] += x.mT @ x
        sums[..., -1] += 3 * torch.randn(sums.shape[:-1], generator=generator)
    return boosts


def test_solutions_of_small_systems():
    boosts = learned_boosts(published_hp(**LEARNED))
    systems = (boosts.common + boosts.own).numpy()
    wanted = np.linalg.solve(systems[..., :-1], systems[..., -1:])[..., 0]
    assert np.allclose(parts.solve_systems(torch.from_numpy(systems)), wanted, atol=1e-9)


def test_the_learned_tilt_sums_to_one_and_its_lessons_are_newton_steps(tmp_path, published):
    hp = small_hp(data_path=str(tmp_path), **LEARNED)
    trainer = train_gpt.TestTimeTrainer(
        make_model(hp), make_validation(tmp_path, hp), hp, Dist("cpu"), Lines()
    )
    boosts = trainer.boosts = learned_boosts(hp)
    losses_of = parts.with_learned_tilt(trainer.model.token_losses, boosts)
    generator, V = torch.Generator().manual_seed(1), hp.vocab_size
    rows = 0.1 * torch.randn(4, trainer.lora.values.size(1), generator=generator)
    head = trainer.lora.tap(trainer.lora.scaled_parts(rows, slice(None))).head
    hidden = 0.3 * torch.randn(4, 1, hp.model_dim, generator=generator).expand(-1, V, -1)
    hints = torch.tensor([-1, 0, 50, V - 1])
    kinds = torch.tensor([0, 5, 12 + 7, 24 + 9])
    queues = torch.tensor([0, 3, 1, 2])
    notes = [torch.arange(V).expand(4, V)]
    notes += [column[:, None].expand(4, V) for column in (hints, kinds, queues)]
    noted = torch.stack(notes, -1)
    with torch.no_grad():
        plain, counted, lessons = losses_of(hidden, noted, head)
    assert torch.equal(plain, trainer.model.token_losses(hidden, notes[0], head))
    assert torch.equal(plain[0], counted[0]) and not lessons[0].any()
    ones = torch.ones(4, dtype=torch.float64)
    assert torch.allclose((-counted).double().exp().sum(1), ones, atol=1e-5)
    own = boosts.own.clone()
    for row in (1, 2, 3):
        sums = (boosts.common + own[queues[row]]).numpy()
        w = np.linalg.solve(sums[:, :-1], sums[:, -1])
        p = math.exp(-plain[row, hints[row]])
        kind, x = int(kinds[row]), np.zeros(6)
        x[kind % 3] = 1.0
        x[3:] = np.clip(math.log(p / (1 - p)), -8, 8) / 4, kind % 12 // 3 / 3, kind // 12 / 2
        odds = math.exp(x @ w) * p / (1 - p)
        assert math.exp(-counted[row, hints[row]]) == pytest.approx(odds / (1 + odds), rel=1e-4)
        for target in (int(hints[row]), 7):
            r = odds / (1 + odds) - (target == int(hints[row]))
            wanted = np.c_[r * r * np.outer(x, x), r * r * x * (x @ w) - r * x]
            found = lessons[row, target, 1:].reshape(6, 7)
            assert np.allclose(found, wanted, rtol=1e-4, atol=1e-5)
            gain = (plain - counted)[row, target].item()
            assert lessons[row, target, 0].item() == pytest.approx(gain, abs=1e-5)
    # of each row the first targets are learned from
    counts = torch.tensor([V, 3, 0, 5])
    boosts.learn(noted, lessons, counts)
    grown = (boosts.own - own).flatten(1)
    for row, count in enumerate(counts.tolist()):
        assert torch.allclose(grown[queues[row]], lessons[row, :count, 1:].sum(0))
    assert boosts.fired[..., 0].sum() == 8 and boosts.fired[2, 2, 0] == 5


def test_the_tilted_distribution_sums_to_one(tmp_path, published):
    """For every hint; a hint's odds are e^boost times what they were, and without one nothing
    changes.
    """
    hp = small_hp(data_path=str(tmp_path), ngram_tilt_enabled=True)
    trainer = train_gpt.TestTimeTrainer(
        make_model(hp), make_validation(tmp_path, hp), hp, Dist("cpu"), Lines()
    )
    generator, V = torch.Generator().manual_seed(1), hp.vocab_size
    rows = torch.randn(4, trainer.lora.values.size(1), generator=generator)
    head = trainer.lora.tap(trainer.lora.scaled_parts(rows, slice(None))).head
    hidden = torch.randn(4, 1, hp.model_dim, generator=generator).expand(-1, V, -1)
    hints = torch.tensor([-1, 0, 50, V - 1])
    targets = torch.stack((torch.arange(V).expand(4, V), hints[:, None].expand(4, V)), -1)
    plain, tilted = trainer.token_losses(hidden, targets, head)
    assert torch.equal(plain, trainer.model.token_losses(hidden, targets[..., 0], head))
    assert torch.allclose(
        (-tilted).double().exp().sum(1), torch.ones(4, dtype=torch.float64), atol=1e-5
    )
    gains = (plain - tilted) - (plain - tilted).amin(1, keepdim=True)  # of logits
    wanted = parts.NGRAM.boost * torch.nn.functional.one_hot(hints % V, V) * (hints >= 0)[:, None]
    assert torch.allclose(gains, wanted, atol=1e-4)
    assert torch.equal(plain[0], tilted[0])


def test_hints_change_the_score_of_their_tokens_and_nothing_else(tmp_path, counted, published):
    scores, losses = {}, {}
    for tilt in (False, True):
        hp = small_hp(
            data_path=str(tmp_path),
            ngram_tilt_enabled=tilt,
            phased_ttt_prefix_docs=25_000,
            **ACTIVE,
        )
        tokens, log = repetitive(tmp_path), Lines()
        validation = train_gpt.ValidationSet(hp)
        validation.tokens[:] = tokens
        counted.clear()
        (scores[tilt],), _ = run_ttt(hp, validation, log=log)
        losses[tilt] = flat(counted)
    hints = slow_hints(validation, hp)
    assert f"ttt_ngram hints:{len(hints)} " in "\n".join(log) and len(hints) > 100
    differ = {key for key in losses[True] if losses[True][key] != losses[False][key]}
    assert differ <= {key for key in losses[True] if key[1] in hints}
    assert len(differ) > 0.9 * len(hints)  # where the hint is as good as certain, nothing changes
    assert scores[True]["loss"] < scores[False]["loss"] - 0.2


def losses_with_and_without(folder, counted, tokens, orders, **options):
    """Losses of every target without hints and with learned boosts, and the log of the latter."""
    losses = []
    for tilt in ({}, LEARNED | {"ngram_tilt_orders": orders}):
        hp, log = small_hp(data_path=str(folder), **ACTIVE | options | tilt), Lines()
        validation = train_gpt.ValidationSet(hp)
        validation.tokens[:] = tokens
        counted.clear()
        run_ttt(hp, validation, log=log)
        losses.append(flat(counted))
    return *losses, "\n".join(log)


FIRED = (
    r"ttt_ngram fired:(\d+) nats:(\S+) nats_a_firing:(\S+) standard_error:(\S+) by order (.*) sh"
)


def test_learned_boosts_gain_on_repetitive_text_what_the_log_says(tmp_path, counted, published):
    tokens = repetitive(tmp_path)
    plain, tilt, log = losses_with_and_without(
        tmp_path, counted, tokens, "2,4,8", phased_ttt_prefix_docs=25_000
    )
    validation = train_gpt.ValidationSet(small_hp(data_path=str(tmp_path)))
    validation.tokens[:] = tokens
    hp = published_hp(phased_ttt_prefix_docs=25_000, ngram_tilt_orders="2,4,8")
    hints = slow_tilt_hints(validation, hp)
    gains = {key: plain[key] - tilt[key] for key in plain}
    # nothing is learned before the first chunks
    assert {key[1] for key in gains if gains[key]} <= {*hints} and len(hints) > 100
    fired, nats, a_firing, error, by_order = re.search(FIRED, log).groups()
    assert int(fired) == len(hints)
    assert float(nats) == pytest.approx(sum(gains.values()), abs=0.06)
    assert float(a_firing) == pytest.approx(sum(gains.values()) / len(hints), abs=2e-5)
    # queues are the samples
    residuals = Counter()
    for phase in plan_ttt(validation.ends - validation.starts, hp):
        for queue, documents in enumerate(itertools.chain(*phase.lanes)):
            for key in gains:
                if key[0] in documents and key[1] in hints:
                    residuals[queue] += gains[key] - float(a_firing)
    squares = sum(value**2 for value in residuals.values())
    spread = squares * len(residuals) / (len(residuals) - 1)
    assert float(error) == pytest.approx(math.sqrt(spread) / len(hints), abs=1e-5)
    assert sum(int(part.split(":")[1]) for part in by_order.split()) == len(hints)
    assert f"8:{sum(number == 2 for _, number, *_ in hints.values())}" in by_order
    assert float(nats) > 0.5 * len(hints) and float(a_firing) > 2 * float(error) > 0


def test_learned_boosts_cost_next_to_nothing_on_random_text(tmp_path, counted, published):
    """There are hints, but none of them knows anything."""
    tokens, _ = write_documents(tmp_path, "val", [200, 150, 100, 60, 60, 30, 30, 30])
    random = np.random.default_rng(0).integers(8, 97, len(tokens))
    tokens = np.where(tokens == train_gpt.BOS_ID, tokens, random)
    plain, tilt, log = losses_with_and_without(tmp_path, counted, tokens, "1,2")
    fired = int(re.search(FIRED, log)[1])
    assert fired > 200
    assert sum(tilt.values()) - sum(plain.values()) < 0.005 * fired


# ---- the budget


class Clock:
    """Stands for the module `time`, one for each rank's thread: a step takes `step` seconds, a
    plain row `row`.
    """

    def __init__(self, monkeypatch, step=1.0, row=0.5, adaptation=3.0, slow=None):
        self.seconds, self.slow, self.ranks = defaultdict(float), slow, {}
        for owner, name, cost in (
            (TTT, "chunk_step", step),
            (Evaluator, "row_losses", row),
            (TTT, "global_adapt", adaptation),
        ):
            monkeypatch.setattr(owner, name, self.takes(cost, getattr(owner, name)))
        monkeypatch.setattr(train_gpt, "time", self)

    def takes(self, cost, function):
        def slowly(owner, *args):
            factor = 10 if owner.dist.rank == self.slow else 1
            self.seconds[threading.get_ident()] += cost * factor
            return function(owner, *args)

        return slowly

    def perf_counter(self):
        return self.seconds[threading.get_ident()]


LONGER = [190, 33, 1, 8, 0, 64, 7, 131, 120, 17, 100, 1]


@pytest.mark.parametrize("budget", [1.0, 20.0, 50.0])
def test_what_the_budget_leaves_is_scored_without_adaptation(
    tmp_path, monkeypatch, counted, budget
):
    hp = small_hp(data_path=str(tmp_path), eval_budget_seconds=budget, ttt_batch_size=2, **ACTIVE)
    validation, log, model = make_validation(tmp_path, hp, LONGER), Lines(), make_model(hp)
    clock = Clock(monkeypatch)
    plain, row_losses = [], Evaluator.row_losses

    def note_row(evaluator, row):
        plain.append((row, row_losses(evaluator, row)))
        return plain[-1][1]

    monkeypatch.setattr(Evaluator, "row_losses", note_row)
    (score,), _ = run_ttt(hp, validation, log=log)
    assert (score["tokens"], score["bytes"]) == (len(validation.tokens) - 1, validation.bytes.sum())
    assert 0 < score["unadapted_tokens"] == sum(int(row.scored.sum()) for row, _ in plain)
    assert sorted(place for _, place in flat(counted)) == list(range(1, len(validation.tokens)))
    assert any(
        f"{score['unadapted_tokens']} tokens were scored without adaptation" in line for line in log
    )
    # the first look at the clock comes after 8 steps
    assert clock.perf_counter() <= max(budget, 11)
    adapted = any(line.startswith("ttt_global_adaptation") for line in log)
    assert adapted <= (budget == 50)
    if not adapted:  # what is scored plainly is scored by the base as it was given
        for row, losses in plain:
            hidden = model.forward_hidden(
                row.inputs,
                row.cu_seqlens,
                max_seqlen=32,
                looping=True,
                window_start=row.window_start,
            )
            assert torch.allclose(losses, model.token_losses(hidden[0], row.targets), atol=1e-4)


def test_the_rest_is_scored_where_the_stride_exceeds_the_context(tmp_path, monkeypatch):
    """EVAL_STRIDE belongs to EVAL_SEQ_LEN; the context here is TTT_EVAL_SEQ_LEN."""
    hp = small_hp(data_path=str(tmp_path), eval_budget_seconds=1.0, eval_seq_len=64, **ACTIVE)
    assert hp.eval_seq_len > hp.ttt_eval_seq_len
    validation = make_validation(tmp_path, hp)
    Clock(monkeypatch)
    (score,), _ = run_ttt(hp, validation)
    assert score["tokens"] == len(validation.tokens) - 1 and score["unadapted_tokens"] > 0


def test_a_budget_that_will_do_changes_nothing(tmp_path, monkeypatch):
    hp = small_hp(data_path=str(tmp_path), **ACTIVE)
    validation = make_validation(tmp_path, hp)
    (wanted,), _ = run_ttt(hp, validation)
    Clock(monkeypatch)
    (score,), _ = run_ttt(hp, validation)
    assert score == wanted and score["unadapted_tokens"] == 0


def test_unpacking_is_part_of_the_budget(tmp_path, monkeypatch):
    hp = small_hp(data_path=str(tmp_path), eval_budget_seconds=200.0, **ACTIVE)
    validation, log = make_validation(tmp_path, hp), Lines()
    Clock(monkeypatch)
    assert run_ttt(hp, validation)[0][0]["unadapted_tokens"] == 0
    log.seconds["unpack"] = 190.0
    assert run_ttt(hp, validation, log=log)[0][0]["unadapted_tokens"] > 0


def test_time_is_kept_for_plain_scoring_of_the_rest():
    """Steps took twice their cost, and a full step's worth of tokens is left behind the next."""
    progress = train_gpt.Progress(train_gpt.Score("cpu"), small_hp(), Lines())
    assert not progress.is_short_for(1e9)  # nothing is known of the pace yet
    progress.cost_done = 5.0
    progress.seconds_used = 10.0
    progress.tokens_total = 64 * 2048 + 1000
    progress.tokens_done = 1000
    rest = train_gpt.step_seconds(64, 2048)
    progress.budget_left = 2 * (3.0 + rest) + 0.01
    assert not progress.is_short_for(3.0)
    progress.budget_left -= 0.02
    assert progress.is_short_for(3.0)


def test_a_rank_that_is_late_keeps_no_other_waiting(tmp_path, monkeypatch):
    """It scores its share plainly; the base is fine-tuned by all ranks or by none."""
    hp = small_hp(data_path=str(tmp_path), eval_budget_seconds=60.0, **ACTIVE)
    validation, log = make_validation(tmp_path, hp), Lines()
    Clock(monkeypatch, slow=1)
    scores, models = run_ttt(hp, validation, world_size=2, log=log)
    assert scores[0] == scores[1] and scores[0]["tokens"] == len(validation.tokens) - 1
    assert 0 < scores[0]["unadapted_tokens"] < scores[0]["tokens"]
    assert "note: no time to fine-tune the base weights" in log
    assert not any(line.startswith("ttt_global_adaptation") for line in log)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("orders", ["", "1,2"])
def test_without_adaptation_there_are_no_hints_from_what_is_left(
    tmp_path, monkeypatch, published, orders
):
    hp = small_hp(
        data_path=str(tmp_path),
        eval_budget_seconds=60.0,
        ngram_tilt_enabled=True,
        ngram_tilt_orders=orders,
        **ACTIVE,
    )
    validation, hinted, run_steps = make_validation(tmp_path, hp), [], TTT.run_steps

    def note(trainer, steps):
        hinted.append((trainer.progress.phase, int((trainer.hinted[:, 1] >= 0).sum())))
        return run_steps(trainer, steps)

    Clock(monkeypatch, slow=1)
    monkeypatch.setattr(parts.NGRAM, "context", 2)
    monkeypatch.setattr(TTT, "run_steps", note)
    monkeypatch.setattr(parts.LearnedBoosts, "share", None)  # nor is anything shared
    run_ttt(hp, validation, world_size=2)
    assert {phase: number > 0 for phase, number in hinted} == {
        "phase:1/2": True,
        "phase:2/2": False,
    }


def test_progress_lines_say_how_far_it_is(tmp_path):
    hp = small_hp(data_path=str(tmp_path), **ACTIVE)
    validation, log = make_validation(tmp_path, hp), Lines()
    (score,), _ = run_ttt(hp, validation, log=log)
    lines = [line for line in log if line.startswith("ttt_batch ")]
    pattern = (
        r"ttt_batch phase:(\d)/2 documents:(\d+) running_tokens:(\d+) running_bpb:([\d.]+)"
        r" tokens_per_s:\d+ "
        r"budget_left:5\d\d seconds:[\d.]+"
    )
    rows = [re.fullmatch(pattern, line).groups() for line in lines]
    assert len(rows) > 2 and rows == sorted(rows, key=lambda row: [*map(int, row[:3])])
    assert rows[-1] == ("2", "10", str(score["tokens"]), f"{score['bpb']:.5f}")
    assert all(detail.startswith("phase:") and "budget_left:" in detail for _, detail in log.shares)


# ---- values


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ttt_eval_seq_len": 20, "ttt_batch_size": 3},
        {"ttt_chunk_size": 32},
        {"ttt_eval_seq_len": 100, "ttt_stale_context": 90},
        {"ttt_chunk_size": 7, "ttt_eval_seq_len": 100, "ttt_batch_size": 64},
    ],
)
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


def test_windows_of_attention_reach_into_the_stale_context(tmp_path, counted, published):
    """While nothing is learned, stale keys and values are those that would be computed anew."""
    windows = {"attn_window": 5, "attn_window_full_layers": 1}

    def losses(**changes):
        rates = {"ttt_lora_lr": 0.0, "global_ttt_lr": 0.0}
        hp = small_hp(data_path=str(tmp_path), ttt_eval_seq_len=100, **rates | changes)
        counted.clear()
        run_ttt(hp, make_validation(tmp_path, hp))
        return [loss for _, loss in sorted(flat(counted).items())]

    anew = losses(**windows)
    assert losses(**windows, ttt_stale_context=90) == pytest.approx(anew, abs=1e-5)
    assert losses(ttt_stale_context=90) != pytest.approx(anew, abs=1e-2)


def test_one_lora_step_is_the_gradient_step_on_the_chunk_alone(tmp_path, counted):
    """Second chunk of the only document, by hand: AdamW's first step on A, B with explicit
    products.
    """
    hp = small_hp(
        data_path=str(tmp_path),
        ttt_lora_lr=0.05,
        ttt_lora_sites="head",
        phased_ttt_num_phases=0,
        ttt_lanes=1,
    )
    validation, model = make_validation(tmp_path, hp, [15]), make_model(hp)
    run_ttt(hp, validation)
    lora = make_lora(hp, lanes=[0])
    a = torch.nn.Parameter(lora.warm_a[0].view(hp.model_dim, hp.ttt_lora_rank).T.clone())
    b = torch.nn.Parameter(torch.zeros(hp.vocab_size, hp.ttt_lora_rank))
    tokens = torch.from_numpy(validation.tokens)
    scale = hp.ttt_lora_alpha / hp.ttt_lora_rank

    def losses():
        hidden = model.forward_hidden(tokens[None, :-1], max_seqlen=15, looping=True)[0].detach()
        logits = hidden @ model.tok_emb.detach().T + scale * (hidden @ a.T @ b.T)
        logits = hp.logit_softcap * torch.tanh(logits / hp.logit_softcap)
        return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")

    a_lr = hp.ttt_lora_lr * hp.ttt_lora_a_lr_ratio
    optimizer = torch.optim.AdamW(
        [{"params": [a], "lr": a_lr}, {"params": [b]}],
        hp.ttt_lora_lr,
        (0.0, hp.ttt_beta2),
        1e-10,
        hp.ttt_weight_decay,
    )
    first = losses()
    first[:8].mean().backward()
    optimizer.step()
    wanted = [*first[:8].tolist(), *losses()[8:].tolist()]
    assert list(flat(counted).values()) == pytest.approx(wanted, rel=1e-4)
    assert wanted[8:] != pytest.approx(first[8:].tolist(), rel=1e-3)


def repetitive(tmp_path, documents=4, length=50):
    """Every document repeats one and the same walk of 10 tokens."""
    tokens, target_bytes = write_documents(tmp_path, "val", [length] * documents)
    for start, _ in document_spans(tokens):
        tokens[start + 1 : start + 1 + length] = 10 + np.arange(length) % 10 * 7
    return tokens


def test_learning_improves_the_loss_on_repetitive_text(tmp_path):
    losses, rates = (
        {},
        {
            "none": (0.0, 0.0),
            "lora": (0.005, 0.0),
            "global": (0.0, 0.05),
            "both": (0.005, 0.05),
        },
    )
    for name, changes in rates.items():
        hp = small_hp(
            data_path=str(tmp_path),
            ttt_lora_lr=changes[0],
            ttt_lora_a_lr_ratio=1.0,
            global_ttt_lr=changes[1],
            global_ttt_chunk_tokens=64,
            phased_ttt_prefix_docs=25_000,
            ttt_batch_size=2,
            ttt_chunk_size=10,
        )
        tokens = repetitive(tmp_path)
        validation = train_gpt.ValidationSet(hp)
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
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True)
    )
    # another A: the comparison can tell runs apart
    other = small_hp(data_path=str(tmp_path), seed=43, **ACTIVE)
    assert run_ttt(other, validation)[0][0]["loss"] != first["loss"]


@pytest.mark.parametrize(
    "options", [{}, OPTIONS, LEARNED_FEW], ids=["", "options", "learned boosts"]
)
def test_the_answer_does_not_depend_on_the_number_of_ranks(tmp_path, monkeypatch, counted, options):
    """Who shares a step with whom depends on it, and the order of the sums of the adaptation:
    rounding, no more.
    """
    install_parts_for(options, monkeypatch)
    hp = small_hp(
        data_path=str(tmp_path),
        ttt_lanes=4,
        ttt_batch_size=2,
        phased_ttt_num_phases=2,
        **ACTIVE | {"ttt_lora_lr": 1e-3} | options,
    )
    monkeypatch.setattr(parts.NGRAM, "context", 2)
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
        assert max(abs(found[key] - losses[key]) for key in losses if key[0] in first_phase) < 1e-4
        assert max(abs(found[key] - losses[key]) for key in losses) < 1e-2
        for name, p in model.named_parameters():
            states = [dict(other.named_parameters())[name] for other in models]
            # ranks stay equal bit for bit
            assert all(torch.equal(state, states[0]) for state in states)
            assert torch.allclose(states[0], p, atol=1e-4)


def test_boosts_of_a_lane_would_depend_on_the_number_of_ranks(
    tmp_path, monkeypatch, counted, published
):
    """Why they are of a queue: sharing within a rank at once changes the answer."""
    illegal = share_boosts_at_once(parts.TestTimeTrainer.chunk_step)
    monkeypatch.setattr(parts.TestTimeTrainer, "chunk_step", illegal)
    with pytest.raises(AssertionError):
        test_the_answer_does_not_depend_on_the_number_of_ranks(
            tmp_path, monkeypatch, counted, LEARNED_FEW
        )


def test_lane_i_runs_on_rank_i_mod_world_size_in_the_plans_order(tmp_path, monkeypatch):
    hp = small_hp(
        data_path=str(tmp_path),
        ttt_lanes=5,
        ttt_batch_size=1,
        phased_ttt_num_phases=2,
        global_ttt_lr=0.0,
    )
    validation, scored = make_validation(tmp_path, hp), {}

    def note(trainer, steps):
        documents = {
            int(np.searchsorted(validation.starts, row.window, "right")) - 1
            for step in steps
            for row in step_rows(step)
            if row.count
        }
        scored.setdefault(trainer.dist.rank, []).append(documents)
        return []

    monkeypatch.setattr(TTT, "run_steps", note)
    monkeypatch.setattr(train_gpt.Score, "total", lambda score, dist, expected: {})
    lengths = validation.ends - validation.starts
    phases = plan_ttt(lengths, hp)
    assert max(len(queue) for phase in phases for lane in phase.lanes for queue in lane) > 1
    for world_size in (1, 2, 3, 6):
        scored.clear()
        run_ttt(hp, validation, world_size)
        for rank in range(world_size):
            assert scored[rank] == [
                {
                    d
                    for lane in range(rank, 5, world_size)
                    for queue in phase.lanes[lane]
                    for d in queue
                    if lengths[d]
                }
                for phase in phases
            ]


# ---- against a scorer that knows no batches, no padding and no schedule


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ttt_batch_size": 1, "ttt_lanes": 1},
        {"ttt_batch_size": 2, "ttt_lanes": 1, "ttt_warm_start_a": False},
        {"ttt_batch_size": 13, "ttt_chunk_size": 7, "ttt_eval_seq_len": 20},
        {"ttt_lora_sites": "k,v,mlp"},
        {
            "ttt_lora_sites": "o,head",
            "phased_ttt_num_phases": 0,
            "ttt_lanes": 1,
            "ttt_batch_size": 3,
        },
        {"ttt_stale_context": 24, "ttt_short_chunks": "8:3,17:5"},
        {
            "ttt_stale_context": 8,
            "ttt_chunk_size": 7,
            "ttt_eval_seq_len": 20,
            "ttt_batch_size": 2,
            "ttt_lanes": 1,
        },
        {"ttt_stale_context": 24, "attn_window": 5, "attn_window_full_layers": 1},
    ],
)
def test_losses_are_those_of_documents_scored_one_by_one(tmp_path, counted, changes, monkeypatch):
    """Small rates: an update divided by its own size turns rounding of a gradient near 0 into a
    step of full size.
    """
    install_parts_for(changes, monkeypatch)
    hp = small_hp(
        data_path=str(tmp_path),
        **ACTIVE | {"ttt_lora_lr": 2e-3, "phased_ttt_num_phases": 2} | changes,
    )
    validation = make_validation(tmp_path, hp, [40, 17, 1, 8, 0, 33, 7, 0, 25, 66, 12, 30, 21, 9])
    plain = document_by_document(
        make_model(hp), validation, dataclasses.replace(hp, ttt_lora_lr=0.0), Dist("cpu")
    )
    wanted = document_by_document(make_model(hp), validation, hp, Dist("cpu"))
    for world_size in (1, 2):
        counted.clear()
        run_ttt(hp, validation, world_size)
        found = flat(counted)
        assert found.keys() == wanted.keys()
        errors = np.array([abs(found[key] - wanted[key]) for key in wanted])
        effects = np.array([abs(plain[key] - wanted[key]) for key in wanted])
        assert errors.max() < 0.02 * effects.max() and errors.mean() < 0.01 * effects.mean()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 130), max_size=4), min_size=1, max_size=9),
    st.integers(1, 5),
    st.sampled_from([(8, 32), (7, 30), (1, 3), (5, 64)]),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
)
def test_the_schedule_runs_every_chunk_once_each_queue_in_order(
    queues, batch, sizes, num_rows, short, stale
):
    hp = published_hp(
        ttt_batch_size=batch,
        ttt_chunk_size=sizes[0],
        ttt_eval_seq_len=sizes[1],
        ttt_stale_context=sizes[0] + 1 if stale else 0,
        ttt_short_chunks="20:2,60:5" if short else "",
    )
    lengths = np.array([length for queue in queues for length in queue])
    starts = np.cumsum(lengths) - lengths
    numbers = iter(range(len(lengths)))
    queues = [[next(numbers) for _ in queue] for queue in queues]
    scratch = num_rows
    padding = StepRow(scratch, scratch, 0, 0, 0, 1)
    found, queue_of_row, shapes = {}, {}, set()
    for step in Scheduler(queues, starts, lengths, num_rows, hp).steps():
        shapes.add((len(step.table), step.width))
        for row, queue in step.begins.tolist():
            assert row not in queue_of_row and queue not in queue_of_row.values()
            assert 0 <= row < num_rows
            queue_of_row[row] = queue
            found.setdefault(queue, []).append([])
        ends = dict(step.ends.tolist())
        rows = step_rows(step)
        live = [row for row in rows if row.count]
        # rows never meet in a step
        assert 0 < len(live) and len({row.source for row in live}) == len(live)
        assert all(row == padding for row in rows if not row.count)
        for row in live:
            assert row.target == (scratch if row.source in ends else row.source)
            assert row.first + row.count <= step.width
            document = found[queue_of_row[row.source]][-1]
            document.append((row.window, row.first, row.count))
            assert row.number == len(document)
        for row, queue in ends.items():
            assert queue_of_row.pop(row) == queue
    assert not queue_of_row and len(shapes) <= 18
    context = sizes[1] - hp.ttt_stale_context
    for queue, documents in enumerate(queues):
        wanted = []
        for document in documents:
            start, length, chunks = int(starts[document]), int(lengths[document]), []
            chunk = min(sizes[0], 2 if length <= 20 else 5) if short and length <= 60 else sizes[0]
            for first in range(0, length, chunk):
                end = min(first + chunk, length)
                begin = max(0, end - context)
                chunks.append((start + begin, first - begin, end - first))
            wanted += [chunks] * bool(chunks)
        assert found.get(queue, []) == wanted


def test_the_steps_of_every_rank_are_planned_from_lengths_alone():
    """No model, no device: 500 documents on 3 ranks, each of them in the steps of one rank."""
    lengths = np.random.default_rng(0).lognormal(5, 1, 500).astype(int)
    starts = np.cumsum(lengths + 1) - lengths - 1
    hp = small_hp(ttt_lanes=5, ttt_batch_size=4, phased_ttt_prefix_docs=20_000)
    phases = plan_ttt(lengths, hp)
    scored = np.zeros(starts[-1] + lengths[-1], int)
    for rank in range(3):
        schedules = schedule_rank(phases, starts, lengths, rank, 3, hp)
        for phase, steps in zip(phases, schedules, strict=True):
            for row in (row for step in steps for row in step_rows(step)):
                chunk = row.window + row.first + np.arange(row.count)
                scored[chunk] += 1
                document = np.searchsorted(starts, row.window, "right") - 1
                assert not row.count or document in phase.documents
    wanted = np.concatenate(
        [start + np.arange(n) for start, n in zip(starts, lengths, strict=True)]
    )
    assert (np.flatnonzero(scored) == wanted).all() and scored.max() == 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"ttt_eval_seq_len": 2048, "ttt_stale_context": 0, "ttt_chunk_size": 48}],
    ids=["defaults", "recomputed"],
)
def test_documents_of_a_phase_step_together(changes):
    """On lengths like those of web text few steps are small and little is padding."""
    lengths = np.random.default_rng(0).lognormal(6.4, 1.0, 1500).astype(int) + 1
    hp = train_gpt.Hyperparameters(**changes)
    recomputed = hp.ttt_eval_seq_len - hp.ttt_stale_context
    phase = plan_ttt(lengths, hp)[-1]
    queues = [documents for lane in phase.lanes for documents in lane]
    steps = Scheduler(queues, np.cumsum(lengths) - lengths, lengths, 128, hp).steps()
    padded = sum(len(step.table) * min(step.width, recomputed) for step in steps)
    assert padded < 1.35 * window_positions(lengths[phase.documents], hp).sum()
    assert np.mean([(StepRow(*step.table.T).count > 0).sum() for step in steps]) > 20
    ideal = padded * train_gpt.step_seconds(64, 2048, recomputed) / (64 * recomputed)
    assert sum(step.cost for step in steps) < 1.35 * ideal


# ---- what documents inherit


@pytest.mark.parametrize("warm", [True, False])
def test_a_stays_in_its_queue_and_b_starts_at_zero(tmp_path, monkeypatch, warm):
    """A shadow of every queue's A: a document starts from what the one before it in its queue
    left, and from B = 0.
    """
    hp = small_hp(
        data_path=str(tmp_path),
        ttt_lanes=2,
        ttt_batch_size=2,
        ttt_warm_start_a=warm,
        ttt_lora_lr=0.02,
    )
    validation, events = make_validation(tmp_path, hp), []
    begin, end = BatchedLoRA.begin, BatchedLoRA.end

    def note(kind, lora, rows, queues):
        for row, queue in zip(rows.tolist(), queues.tolist(), strict=True):
            events.append((kind, queue, lora.values[row].clone(), lora.squares[row].clone()))

    def note_begin(lora, rows, queues):
        begin(lora, rows, queues)
        note("begin", lora, rows, queues)

    def note_end(lora, rows, queues):
        note("end", lora, rows, queues)
        end(lora, rows, queues)

    monkeypatch.setattr(BatchedLoRA, "begin", note_begin)
    monkeypatch.setattr(BatchedLoRA, "end", note_end)
    run_ttt(hp, validation)
    shadow = [a.clone() for a in make_lora(hp).warm_a]
    size = len(shadow[0])
    began = [queue for kind, queue, *_ in events if kind == "begin"]
    assert (
        len(began)
        == np.count_nonzero(validation.ends - validation.starts)
        > len(set(began))
        == len(shadow)
        == 4
    )
    for kind, queue, value, square in events:
        if kind == "begin":
            assert torch.equal(value[:size], shadow[queue])
            assert not value[size:].any() and not square.any()
        elif warm:
            assert not torch.equal(value[:size], shadow[queue]) or not value[size:].any()
            shadow[queue] = value[:size]


@pytest.mark.parametrize("seed, lane", [(0, 0), (3, 7)])
def test_initial_a_is_uniform_within_one_over_root_in(seed, lane):
    hp = small_hp(seed=seed, ttt_batch_size=8, ttt_lora_rank=16)
    one, again, pair, other = (
        make_lora(hp, lanes).warm_a for lanes in ([lane], [lane], [lane - 1, lane], [lane + 1])
    )
    bound = hp.model_dim**-0.5
    assert one.shape == (8, (1 + 4 * 5) * 16 * hp.model_dim)
    assert 0.99 * bound < one.abs().max() <= bound
    assert (
        one.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        and abs(one.mean()) < 0.05 * bound
    )
    assert torch.equal(one, again) and torch.equal(one, pair[8:]) and not torch.equal(one, other)


def test_every_slot_and_site_has_an_adapter_of_its_own():
    """One pair (A, B) of one slot and site, of the second row only, changes that row only."""
    hp = small_hp()
    model, lora = make_model(hp), make_lora(hp)
    slots = len(model.slots(looping=True))
    assert slots == lora.layout.num_slots == 4
    tokens = torch.randint(8, hp.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    base = model.token_losses(model.forward_hidden(tokens, max_seqlen=12, looping=True), tokens)
    leaf, seen = torch.zeros(2, lora.values.size(1)), set()
    leaf[:, : lora.warm_a.size(1)] = 1.0
    widths = {"q": 32, "k": 16, "v": 16, "attn_out": 32, "mlp_out": 32}
    for slot, (site, width) in [
        *itertools.product(range(slots), widths.items()),
        (None, ("lm_head", hp.vocab_size)),
    ]:
        tap = lora.tap(lora.scaled_parts(leaf.clone(), slice(None)))
        matrix = (tap.head if slot is None else tap.at(slot, None)).b[site]
        assert matrix.shape == (2, hp.ttt_lora_rank, width) and not matrix.any()
        matrix[1] = torch.linspace(-0.1, 0.1, width)
        h = model.forward_hidden(tokens, max_seqlen=12, looping=True, tap=tap)
        losses = model.token_losses(h, tokens, tap.head)
        assert torch.allclose(losses[0], base[0], atol=1e-5)
        assert not torch.allclose(losses[1], base[1], atol=1e-4), (site, slot)
        seen.add(losses[1].sum().item())
    assert len(seen) == slots * 5 + 1


# ---- the optimizer of the adapters


@pytest.mark.parametrize("update", [train_gpt.adamw_rows_ref, train_gpt.adamw_rows])
@pytest.mark.parametrize(
    "lr, beta2, decay", [(1e-4, 0.99, 0.5), (0.03, 0.9, 0.0), (0.01, 0.0, 2.0)]
)
def test_the_lora_step_is_adamw_without_first_moment_on_rows_of_any_age(update, lr, beta2, decay):
    """In columns 2 to 9 of wider states, of which the others stay as they are."""
    generator = torch.Generator().manual_seed(5)
    all_values, all_squares = torch.randn(6, 12, generator=generator), torch.zeros(6, 12)
    values, squares, before = all_values[:, 2:9], all_squares[:, 2:9], all_values.clone()
    twins = [torch.nn.Parameter(value.clone()) for value in values[:5]]
    optimizers = [
        torch.optim.AdamW([twin], lr=lr, betas=(0.0, beta2), eps=1e-10, weight_decay=decay)
        for twin in twins
    ]
    ages = [0] * 5
    for step, rows in enumerate([[0, 1, 2], [2, 0], [4, 3, 2, 1], [2], [0, 1, 2, 3, 4]]):
        gradients = torch.randn(len(rows) + 1, 7, generator=generator) * 10.0**-step
        gradients[0, :3] = 0
        for row, gradient in zip(rows, gradients[:-1], strict=True):
            ages[row] += 1
            twins[row].grad = gradient.clone()
            optimizers[row].step()
        number = torch.tensor([ages[row] for row in rows] + [9])
        # the last: to scratch, no step
        table = torch.tensor([[*rows, rows[0]], [*rows, 5]]).T.contiguous()
        source, target = table.unbind(1)  # columns of a table, as chunk_step has them
        correction = (1 - beta2 ** number.double()).float()
        update(values, squares, gradients / 3, source, target, correction, 3.0, (lr, decay, beta2))
        for value, twin in zip(values[:5], twins, strict=True):
            assert torch.allclose(value, twin, rtol=1e-5, atol=1e-8)
    assert torch.equal(all_values[:, [0, 1, 9, 10, 11]], before[:, [0, 1, 9, 10, 11]])


# ---- global adaptation


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("clip, chunk_tokens", [(0.05, 64), (100.0, 64), (1.0, 10_000), (1.0, 1)])
def test_global_adaptation_is_a_plain_sgd_loop(
    tmp_path, monkeypatch, clip, chunk_tokens, world_size
):
    clip_grad_norm = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, most: clip_grad_norm(p, most * clip)
    )
    hp = small_hp(
        data_path=str(tmp_path),
        global_ttt_lr=0.02,
        global_ttt_chunk_tokens=chunk_tokens,
    )
    validation = make_validation(tmp_path, hp, [90, 33, 1, 8, 64, 7, 31])
    documents = np.array([4, 1, 6, 3])
    models = [make_model(hp) for _ in range(world_size)]
    on_ranks(
        world_size,
        lambda dist: TTT(models[dist.rank], validation, hp, dist, Lines()).global_adapt(documents),
    )

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
            piece = torch.from_numpy(validation.tokens[first : last + 1])
            hidden = model.forward_hidden(piece[None, :-1], max_seqlen=len(piece), looping=True)
            (model.token_losses(hidden[0], piece[1:]).sum() / tokens).backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in model.named_parameters()
        }
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

    def note(trainer, steps):
        order.append(
            sorted(
                {
                    int(np.searchsorted(trainer.validation.starts, row.window, "right")) - 1
                    for step in steps
                    for row in step_rows(step)
                    if row.count
                }
            )
        )
        return []

    monkeypatch.setattr(TTT, "run_steps", note)
    monkeypatch.setattr(
        TTT,
        "global_adapt",
        lambda trainer, documents: order.append(("adapt", sorted(documents.tolist()))),
    )
    monkeypatch.setattr(train_gpt.Score, "total", lambda score, dist, expected: {})
    for phases, adaptations in ((0, 0), (1, 1), (2, 2), (3, 3)):
        order.clear()
        hp = small_hp(
            data_path=str(tmp_path),
            phased_ttt_num_phases=phases,
            phased_ttt_prefix_docs=25_000,
            ttt_batch_size=2,
        )
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
def test_the_plan_holds_every_document_once_longest_first_in_balanced_lanes(
    sizes, batch_size, lanes, phases, prefix
):
    hp = small_hp(
        ttt_batch_size=batch_size,
        ttt_lanes=lanes,
        phased_ttt_num_phases=phases,
        phased_ttt_prefix_docs=prefix,
    )
    lengths = np.array(sizes)
    plan = plan_ttt(lengths, hp)
    everything = np.concatenate([phase.documents for phase in plan])
    assert sorted(everything.tolist()) == list(range(len(sizes)))
    assert (np.diff(lengths[everything]) <= 0).all()
    scaled = min(len(sizes), round(prefix * len(sizes) / 50_000)) if phases else 0
    borders = sorted({scaled * i // max(phases, 1) for i in range(phases + 1)} | {0, len(sizes)})
    assert [len(phase.documents) for phase in plan] == np.diff(borders).tolist()
    assert [phase.adapt for phase in plan] == [border <= scaled for border in borders[1:]]
    costs = window_positions(lengths, hp)
    for phase in plan:
        assert len(phase.lanes) == lanes and {len(queues) for queues in phase.lanes} == {batch_size}
        queues = [documents for lane in phase.lanes for documents in lane]
        assert sorted(d for documents in queues for d in documents) == sorted(
            phase.documents.tolist()
        )
        assert all((np.diff(lengths[documents]) <= 0).all() for documents in queues if documents)
        loads = [int(costs[documents].sum()) if documents else 0 for documents in queues]
        # none could give its last document to another
        assert max(loads) - min(loads) <= costs[phase.documents].max()
        longest = {d for d in phase.documents[:lanes].tolist() if lengths[d]}
        assert len(longest) == sum(
            any(longest & set(documents) for documents in queues) for queues in phase.lanes
        )


@pytest.mark.parametrize(
    "count, phases, borders",
    [
        (50_000, 1, [2500]),
        (1500, 1, [75]),
        (1500, 3, [25, 50, 75]),
        (1500, 2, [37, 75]),
        (50_000, 3, [833, 1666, 2500]),
    ],
)
def test_phase_borders_are_floors_of_the_scaled_prefix(count, phases, borders):
    hp = small_hp(
        phased_ttt_prefix_docs=2500, phased_ttt_num_phases=phases, ttt_batch_size=64, ttt_lanes=8
    )
    plan = plan_ttt(np.random.default_rng(0).integers(1, 4000, count), hp)
    assert np.cumsum([len(phase.documents) for phase in plan]).tolist() == [*borders, count]
    assert [phase.adapt for phase in plan] == [True] * phases + [False]


def test_the_plan_knows_nothing_of_ranks_and_contents():
    assert list(inspect.signature(plan_ttt).parameters) == ["lengths", "hp"]
    lengths = np.random.default_rng(1).integers(0, 300, 200)
    plans = [plan_ttt(lengths.copy(), small_hp()) for _ in range(2)]
    for one, two in zip(*plans, strict=True):
        assert one.lanes == two.lanes


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 40), st.integers(0, 200), st.booleans())
@example(sizes=[9, 10, 100, 101], chunk=40, more=0, stale=False)  # at the limits, seldom met
def test_window_positions_counts_the_windows(sizes, chunk, more, stale):
    hp = published_hp(
        ttt_chunk_size=chunk,
        ttt_eval_seq_len=max(2, chunk + more),
        ttt_short_chunks="9:2,100:30",
        ttt_stale_context=more if stale and more >= chunk else 0,
    )
    counts = []
    for size in sizes:
        step = min(chunk, 2 if size <= 9 else 30 if size <= 100 else chunk)
        window = hp.ttt_eval_seq_len - hp.ttt_stale_context
        counts.append(sum(min(last + step, window) for last in range(0, size, step)))
    assert window_positions(np.array(sizes), hp).tolist() == counts


def test_the_model_can_train_again_afterwards(tmp_path):
    hp = small_hp(data_path=str(tmp_path), **ACTIVE)
    _, (model,) = run_ttt(hp, make_validation(tmp_path, hp))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert Dist("cpu").world_size == 1
