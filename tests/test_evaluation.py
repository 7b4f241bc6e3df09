"""Plain and sliding evaluation against slow references, coverage on several ranks, causality, BPB,
byte tables.
"""

import math
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_hp, write_documents, write_shard
from evaluation_helpers import (
    LENGTHS,
    document_spans,
    make_model,
    make_validation,
    on_ranks,
    piece_losses,
    small_hp,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from presets import published
from train_gpt import BOS_ID, DataError, Evaluator, Score, document_windows

torch.set_num_threads(1)

TOKENIZER = Path(__file__).resolve().parents[1] / "tokenizers" / "caseops_8192.model"


# ---- tools


def sliding_windows(borders, context, stride):
    """Those of presets/published.py, of documents between these borders."""
    hp = SimpleNamespace(eval_seq_len=context, eval_stride=stride)
    return published.sliding_windows(hp, SimpleNamespace(starts=borders[:-1], ends=borders[1:]))


def evaluate(evaluator, stride):
    """The score of plain evaluation, or in sliding windows, those of presets/published.py."""
    if stride is None:
        return evaluator.evaluate_bpb()
    evaluator.hp = published.Hyperparameters(**vars(evaluator.hp) | {"eval_stride": stride})
    return published.evaluate_sliding(evaluator)


@pytest.fixture
def counted(monkeypatch, published):
    """[[(target position, loss)]], one list per call of Score.add by an Evaluator."""
    calls, waiting = [], threading.local()
    build, add = train_gpt.WindowPacker.build, Score.add

    def note_build(packer, windows):
        spans = [np.arange(start, end) for start, end, *_ in windows]
        first = np.repeat(windows[:, 2 % windows.shape[1]], [*map(len, spans)])
        waiting.inputs = np.concatenate(spans)
        waiting.scored = waiting.inputs >= first
        return build(packer, windows)

    def note_add(score, losses, scored, target_bytes):
        add(score, losses, scored, target_bytes)
        positions = 1 + waiting.inputs[waiting.scored]
        values = losses[scored].tolist()
        assert len(values) == len(positions)
        calls.append(list(zip(positions.tolist(), values, strict=True)))

    monkeypatch.setattr(train_gpt.WindowPacker, "build", note_build)
    monkeypatch.setattr(Score, "add", note_add)
    return calls


def flat(calls):
    """Calls -> {target position: loss}; every target must be there once."""
    pairs = [pair for call in calls for pair in call]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


# ---- coverage


CASES = [  # context, row, stride (None: plain), settings of the row
    (32, 128, None, None),
    (32, 128, 8, None),
    (32, 16, None, None),
    (32, 16, 5, None),
    (7, 64, None, None),
    (7, 64, 7, None),
    (7, 64, 1, None),
    (500, 512, None, None),
    (500, 16, 100, None),
    (2, 4, None, None),
    (2, 4, 1, None),
    (32, 256, 31, None),
    (32, 512, None, 18),
    (32, 512, 8, 17),
]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("context, row, stride, segments", CASES)
def test_every_token_but_the_first_is_scored_once(
    tmp_path, counted, context, row, stride, segments, world_size, monkeypatch
):
    if segments:
        monkeypatch.setattr(train_gpt.Hyperparameters, "row_segments", segments)
    hp = small_hp(
        data_path=str(tmp_path),
        eval_seq_len=context,
        micro_batch_tokens=row,
        train_batch_tokens=row,
    )
    tokens, target_bytes = write_documents(tmp_path, "val", LENGTHS, shard_sizes=[90, 100, 500])
    validation, model = train_gpt.ValidationSet(hp), make_model(hp)
    scores = on_ranks(
        world_size, lambda dist: evaluate(Evaluator(model, validation, hp, dist), stride)
    )
    assert sorted(position for call in counted for position, _ in call) == list(
        range(1, len(tokens))
    )
    assert all(score == scores[0] for score in scores)
    assert (scores[0]["tokens"], scores[0]["bytes"]) == (len(tokens) - 1, target_bytes.sum())
    assert scores[0]["loss"] == pytest.approx(np.mean(list(flat(counted).values())), rel=1e-6)


@pytest.mark.parametrize("lengths", [[1], [5], [40], [0, 0, 0, 3], [3, 0], [200, 0], [1, 1, 1]])
def test_odd_streams_are_scored_whole(tmp_path, lengths, counted, dist):
    hp = small_hp(data_path=str(tmp_path))
    validation = make_validation(tmp_path, hp, lengths)
    for stride in (None, 8):
        counted.clear()
        score = evaluate(Evaluator(make_model(hp), validation, hp, dist), stride)
        assert sorted(flat(counted)) == list(range(1, len(validation.tokens)))
        assert score["tokens"] == sum(lengths) + len(lengths) - 1


def test_uncounted_tokens_raise(tmp_path, monkeypatch, dist):
    hp = small_hp(data_path=str(tmp_path))
    validation = make_validation(tmp_path, hp)
    rows = train_gpt.WindowPacker.rows
    monkeypatch.setattr(
        train_gpt.WindowPacker, "rows", lambda packer, windows: rows(packer, windows)[:-1]
    )
    with pytest.raises(RuntimeError, match="scored"):
        Evaluator(make_model(hp), validation, hp, dist).evaluate_bpb()


# ---- values


@pytest.mark.parametrize("context, row", [(32, 128), (7, 64), (64, 32), (500, 1024)])
def test_plain_evaluation_equals_every_piece_alone(tmp_path, context, row, dist):
    hp = small_hp(
        data_path=str(tmp_path),
        eval_seq_len=context,
        micro_batch_tokens=row,
        train_batch_tokens=row,
    )
    validation, model = make_validation(tmp_path, hp), make_model(hp)
    total = 0.0
    for start, end in document_spans(validation.tokens):
        for first in range(start, end, context):
            total += (
                piece_losses(model, validation.tokens[first : min(first + context, end) + 1])
                .sum()
                .item()
            )
    score = Evaluator(model, validation, hp, dist).evaluate_bpb()
    assert score["loss"] == pytest.approx(total / (len(validation.tokens) - 1), rel=1e-6)
    assert score["bpb"] == pytest.approx(total / math.log(2) / validation.bytes.sum(), rel=1e-6)


@pytest.mark.parametrize("context, stride", [(32, 8), (16, 5), (12, 1), (10, 9)])
@pytest.mark.usefixtures("published")
def test_sliding_evaluation_equals_every_token_alone(tmp_path, context, stride, dist):
    hp = small_hp(data_path=str(tmp_path), eval_seq_len=context)
    validation, model = make_validation(tmp_path, hp, [40, 3, 0, 33, 32, 1]), make_model(hp)
    total = 0.0
    for start, end in document_spans(validation.tokens):
        # its window starts at the first multiple of the stride that still reaches i
        for i in range(start, end):
            window = start + -(-max(0, i - start + 1 - context) // stride) * stride
            total += piece_losses(model, validation.tokens[window : i + 2])[-1].item()
    score = evaluate(Evaluator(model, validation, hp, dist), stride)
    assert score["loss"] == pytest.approx(total / (len(validation.tokens) - 1), rel=1e-6)


@pytest.mark.usefixtures("published")
def test_stride_of_the_context_is_plain_evaluation(tmp_path, dist):
    hp = small_hp(data_path=str(tmp_path))
    evaluator = Evaluator(make_model(hp), make_validation(tmp_path, hp), hp, dist)
    assert evaluate(evaluator, hp.eval_seq_len) == evaluator.evaluate_bpb()
    assert evaluate(evaluator, 8)["loss"] != evaluator.evaluate_bpb()["loss"]


def test_result_does_not_depend_on_the_row_size(tmp_path, dist):
    losses = []
    for row in (8, 32, 96, 1024):
        hp = small_hp(data_path=str(tmp_path), micro_batch_tokens=row, train_batch_tokens=row)
        losses.append(
            Evaluator(make_model(hp), make_validation(tmp_path, hp), hp, dist).evaluate_bpb()[
                "loss"
            ]
        )
    assert losses == pytest.approx([losses[0]] * 4, rel=2e-7)


@pytest.mark.usefixtures("published")
def test_result_does_not_depend_on_the_number_of_ranks(tmp_path):
    hp = small_hp(data_path=str(tmp_path))
    validation, model = make_validation(tmp_path, hp), make_model(hp)
    for stride in (None, 8):

        def work(dist, stride=stride):
            return evaluate(Evaluator(model, validation, hp, dist), stride)["bpb"]

        values = [bpb for world_size in (1, 2, 3) for bpb in on_ranks(world_size, work)]
        assert values == pytest.approx([values[0]] * 6, rel=1e-12)


# ---- who sees what


@pytest.mark.parametrize("stride", [None, 8])
@pytest.mark.parametrize("document, offset", [(0, 1), (0, 40), (0, 90), (5, 20), (11, 99), (2, 1)])
def test_a_changed_token_changes_no_earlier_loss_and_no_other_document(
    tmp_path, counted, dist, stride, document, offset
):
    hp = small_hp(data_path=str(tmp_path))
    model, validation = make_model(hp), make_validation(tmp_path, hp)
    start, end = document_spans(validation.tokens)[document]
    place = start + offset
    losses = []
    for change in (0, 1):
        validation.tokens[place] += (
            change if validation.tokens[place] < hp.vocab_size - 1 else -change
        )
        counted.clear()
        evaluate(Evaluator(model, validation, hp, dist), stride)
        losses.append(flat(counted))
    differ = {position for position in losses[0] if losses[0][position] != losses[1][position]}
    assert place in differ
    assert differ <= set(range(place, end + 1))
    assert len(differ) > 1 or place == end


@pytest.mark.parametrize("stride", [None, 8])
def test_the_probabilities_of_a_target_add_up_to_one(tmp_path, counted, dist, stride):
    """Over all tokens that may stand there, in three documents at once: no loss knows its target."""
    hp = small_hp(data_path=str(tmp_path), vocab_size=12)
    model, validation = make_model(hp), make_validation(tmp_path, hp, vocab_size=12)
    places = (validation.starts[[0, 5, 11]] + [40, 20, 99]).tolist()
    totals = np.zeros(3)
    for token in range(hp.vocab_size):
        validation.tokens[places] = token
        counted.clear()
        score = evaluate(Evaluator(model, validation, hp, dist), stride)
        losses = flat(counted)
        assert score["loss"] == pytest.approx(np.mean([*losses.values()]), rel=1e-6)
        totals += np.exp([-losses[place] for place in places])
    assert totals == pytest.approx(np.ones(3), abs=1e-5)


# ---- window bookkeeping


DOCUMENTS = st.lists(st.integers(0, 60), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.integers(2, 24), st.data())
def test_each_target_is_in_one_window_with_the_longest_context(lengths, context, data):
    stride = data.draw(st.integers(1, context))
    borders = np.cumsum([3, *lengths])
    starts, ends = borders[:-1], borders[1:]
    windows = sliding_windows(borders, context, stride)
    owner = {}
    for start, end, first in windows.tolist():
        assert start < end <= start + context and start <= first < end
        first_document, last_document = np.searchsorted(borders, [start, end - 1], side="right")
        assert first_document == last_document
        for i in range(first, end):
            assert i not in owner
            owner[i] = start
    assert sorted(owner) == list(range(borders[0], borders[-1]))
    for start, end in zip(starts, ends, strict=True):
        for i in range(start, end):
            assert i - owner[i] + 1 >= min(i - start + 1, context - stride + 1)
            assert i - owner[i] + 1 <= context


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.integers(2, 24))
def test_windows_with_the_contexts_stride_are_disjoint_pieces(lengths, context):
    borders = np.cumsum([0, *lengths])
    windows = document_windows(borders[:-1], borders[1:], context)
    assert (sliding_windows(borders, context, context)[:, :2] == windows).all()
    pieces = [
        (i, min(i + context, end))
        for start, end in zip(borders, borders[1:], strict=False)
        for i in range(start, end, context)
    ]
    assert windows.tolist() == [list(map(int, piece)) for piece in pieces]


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(2, 24), st.integers(1, 100), st.integers(0, 9), st.data())
def test_packed_rows_hold_every_window_in_order_within_bounds(
    lengths, context, row_tokens, spare, data
):
    stride = data.draw(st.integers(1, context))
    borders = np.cumsum([0, *lengths])
    windows = sliding_windows(borders, context, stride)
    row_tokens = max(row_tokens, context)
    stream = type(
        "Stream",
        (),
        {"tokens": np.arange(borders[-1] + 1), "bytes": np.ones(borders[-1] + 1, np.int64)},
    )
    limits = SimpleNamespace(row_segments=10 * spare)
    packer = published.WindowPacker(stream, row_tokens, context, limits, torch.device("cpu"))
    entries = packer.max_segments
    rows = packer.rows(windows)
    assert [i for first, last in rows for i in range(first, last)] == list(range(len(windows)))
    for first, last in rows:
        row = packer.build(windows[first:last])
        filled = int((windows[first:last, 1] - windows[first:last, 0]).sum())
        assert row.inputs.shape == (1, row_tokens) and row.cu_seqlens.shape == (entries + 1,)
        spans = row.cu_seqlens.diff()
        assert row.cu_seqlens[0] == 0 and row.cu_seqlens[-1] == row_tokens
        assert 0 <= spans.min() and spans.max() <= context
        scored = [np.arange(start, stop) for _, stop, start in windows[first:last]]
        assert row.inputs[0, row.scored].tolist() == np.concatenate(scored).tolist()
        plain = packer.build(windows[first:last, :2])
        assert plain.scored.tolist() == [True] * filled + [False] * (row_tokens - filled)
        # tokens are their own positions here
        assert (row.targets - row.inputs[0])[:filled].tolist() == [1] * filled
        assert set(row.window_start[0].nonzero()[:, 0].tolist()) == set(
            row.cu_seqlens.tolist()
        ) & set(range(filled))


# ---- BPB


def test_bpb_is_nats_over_ln2_over_bytes(dist):
    score = Score("cpu")
    score.add(
        torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True]), torch.tensor([3, 100, 0])
    )
    score.add(
        torch.tensor([[0.5], [7.0]]), torch.tensor([[True], [False]]), torch.tensor([[2], [50]])
    )
    total = score.total(dist, (3, 5))
    assert total["loss"] == pytest.approx(5.5 / 3) and (total["tokens"], total["bytes"]) == (3, 5)
    assert total["bpb"] == pytest.approx(5.5 / 0.6931471805599453 / 5)
    assert total["bpb"] == pytest.approx(total["loss"] / math.log(2) * 3 / 5)


@pytest.mark.parametrize("expected", [(3, 5), (2, 4), (1, 5), (0, 0)])
def test_score_refuses_other_counts_than_the_side_cars(dist, expected):
    score = Score("cpu")
    score.add(torch.ones(2), torch.ones(2, dtype=torch.bool), torch.tensor([2, 3]))
    with pytest.raises(RuntimeError, match="scored 2 tokens and 5 bytes"):
        score.total(dist, expected)
    assert score.total(dist, (2, 5))["tokens"] == 2


def test_score_ignores_what_is_not_scored_even_infinities(dist):
    score = Score("cpu")
    score.add(
        torch.tensor([1.0, math.inf, math.nan]),
        torch.tensor([True, False, False]),
        torch.tensor([1, 9, 9]),
    )
    assert score.total(dist, (1, 1))["loss"] == 1.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_score_that_is_not_finite_ends_the_run(loss):
    stages = SimpleNamespace(scores={"prequant": {"loss": 3.0}, "ttt": {"loss": loss}})
    with pytest.raises(train_gpt.ModelError, match=f"ttt loss is {loss}: .*TTT_LORA_LR"):
        train_gpt.Stages.result(stages, {})


def test_score_adds_in_float64(dist):
    score = Score("cpu")
    score.add(torch.tensor([2.0**25]), torch.tensor([True]), torch.tensor([1]))
    for _ in range(4):
        score.add(torch.ones(1), torch.tensor([True]), torch.tensor([0]))
    score.add(torch.tensor([2.0**25, 1.0]), torch.tensor([True, True]), torch.tensor([0, 0]))
    assert score.total(dist, (7, 1))["loss"] * 7 == pytest.approx(2**26 + 5, rel=1e-15)


def test_totals_of_part_of_the_documents(tmp_path):
    hp = small_hp(data_path=str(tmp_path))
    tokens, target_bytes = write_documents(tmp_path, "val", LENGTHS)
    validation, spans = train_gpt.ValidationSet(hp), document_spans(tokens)
    for count in range(len(spans) + 1):
        last = spans[count - 1][1] if count else 0
        assert validation.targets_of(np.arange(count)) == (last, target_bytes[1 : last + 1].sum())


# ---- byte tables of plain SentencePiece (CASEOPS_ENABLED=0)


TEXTS = [
    "the quick brown fox, 1984: a  tale\nof two cities",
    "naïve café costs 5 € – “really” … ½ cup",
    "x",
    "日本語 and Ωmega",
    "  padded  text  ",
    "emoji 🙂 \U0001f468\u200d\U0001f469 ok",
    "tabs\tand\x07bells",
]


@pytest.fixture(scope="module")
def tokenizer():
    return pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(TOKENIZER))


def byte_charged(tables, ids):
    """Bytes of each target of BOS, ids, BOS, one after the other as README (bits per byte)
    words it.
    """
    count, leading, boundary = tables
    stream = [BOS_ID, *ids, BOS_ID]
    pairs = zip(stream, stream[1:], strict=False)
    return [int(count[y]) + (1 if leading[y] and not boundary[x] else 0) for x, y in pairs]


@pytest.mark.parametrize("text", TEXTS)
def test_table_bytes_of_a_text_sum_to_its_normalised_size(tokenizer, text):
    normalised = tokenizer.decode(tokenizer.encode(text))
    assert normalised == tokenizer.normalize(text).replace("\u2581", " ")
    tables = published.piece_byte_tables(tokenizer)
    assert sum(byte_charged(tables, tokenizer.encode(text))) == len(normalised.encode())


def test_a_leading_space_counts_once_and_not_after_a_boundary(tokenizer):
    tables = published.piece_byte_tables(tokenizer)
    the, space, a = (tokenizer.piece_to_id(piece) for piece in ("\u2581the", "\u2581", "a"))
    assert byte_charged(tables, [a, the]) == [1, 4, 0]
    assert byte_charged(tables, [the, the]) == [3, 4, 0]
    assert byte_charged(tables, [space, a, space]) == [0, 1, 1, 0]
    assert byte_charged(tables, [tokenizer.unk_id(), the]) == [0, 3, 0]


def test_tables_tell_kinds_of_pieces_apart(tokenizer):
    count, leading, boundary = published.piece_byte_tables(tokenizer)
    assert (len(count), len(leading), len(boundary)) == (8192,) * 3
    for token in range(8192):
        if tokenizer.is_control(token) or tokenizer.is_unknown(token):
            assert (count[token], boundary[token]) == (0, True)
        elif tokenizer.is_byte(token):
            assert (count[token], leading[token], boundary[token]) == (1, False, False)
        else:
            piece = tokenizer.id_to_piece(token)
            spaced = piece.startswith("\u2581")
            assert (leading[token], boundary[token]) == (spaced, False)
            assert count[token] == len(piece.encode()) - 3 * spaced


def test_validation_bytes_come_from_the_tables_without_caseops(
    tmp_path, tokenizer, published, monkeypatch
):
    monkeypatch.setattr(train_gpt, "load_tokenizer", lambda hp: tokenizer)
    ids = [token for text in TEXTS for token in (BOS_ID, *tokenizer.encode(text))]
    write_shard(tmp_path / "fineweb_val_000000.bin", ids)
    validation = train_gpt.ValidationSet(
        tiny_hp(data_path=str(tmp_path), vocab_size=8192, caseops_enabled=False)
    )
    assert validation.bytes.sum() == sum(
        len(tokenizer.decode(tokenizer.encode(text)).encode()) for text in TEXTS
    )
    tables = published.piece_byte_tables(tokenizer)
    assert validation.bytes[1:].tolist() == byte_charged(tables, ids[1:])[:-1]
    assert validation.targets_of(np.arange(len(TEXTS))) == (len(ids) - 1, validation.bytes.sum())


def test_validation_charges_no_space_behind_a_boundary(tmp_path, tokenizer, published, monkeypatch):
    monkeypatch.setattr(train_gpt, "load_tokenizer", lambda hp: tokenizer)
    # this tokenizer begins no text with a space
    monkeypatch.setattr(published, "check_byte_counts", lambda *_: None)
    the, unknown = tokenizer.piece_to_id("\u2581the"), tokenizer.unk_id()
    write_shard(tmp_path / "fineweb_val_000000.bin", [BOS_ID, the, the, unknown, the, BOS_ID, the])
    validation = train_gpt.ValidationSet(
        tiny_hp(data_path=str(tmp_path), vocab_size=8192, caseops_enabled=False)
    )
    assert validation.bytes.tolist() == [0, 3, 4, 0, 3, 0, 3]


def test_tables_refuse_a_tokenizer_without_a_space_piece():
    class NoSpace:
        def piece_to_id(self, piece):
            return {"a": 5}.get(piece, self.unk_id())

        def unk_id(self):
            return 3

        def vocab_size(self):
            return 6

    with pytest.raises(DataError, match="space"):
        published.piece_byte_tables(NoSpace())
