"""The contest's budgets: what RESULT names as a violation, and the exit code where the byte cap is
broken.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import Lines, tiny_hp
from evaluation_helpers import on_ranks

import train_gpt
from tools import guard

GOOD = {
    "training_seconds": 588.0,
    "hessians": 4.0,
    "quantize": 6.0,
    "quant_check": 2.0,
    "unpack": 20.0,
    "scoring": 580.0,
    "code_bytes": 34_000,
    "artifact_bytes": 15_966_000,
    "partial": False,
    "recompilations": 0,
    "graphs": {},
    "gap": 0.02,
}


def broken(final="ttt", **changes):
    """Violations of a run that keeps every rule exactly, but for the changes."""
    run = GOOD | changes
    hp = tiny_hp(max_wallclock_seconds=600.0, gptq_reserve_seconds=7.0, eval_budget_seconds=600.0)
    seconds = {
        "hessians": run["hessians"],
        "quantize": run["quantize"],
        "quant_check": run["quant_check"],
        "unpack": run["unpack"],
        "eval_prequant": 1e6,
        f"eval_{final}": run["scoring"],
    }
    scores = {
        "prequant": {},
        final: {"partial": run["partial"], "recompilations": run["recompilations"]},
    }
    training = {
        "training_seconds": run["training_seconds"],
        "quant_check": {"gap": run["gap"]},
    }
    log = SimpleNamespace(seconds=seconds, graphs=run["graphs"])
    return train_gpt.violations(hp, log, training, run["code_bytes"], run["artifact_bytes"], scores)


@pytest.mark.parametrize("final", ["quantized", "sliding", "ttt"])
def test_a_run_at_the_limits_breaks_no_rule(final):
    assert broken(final) == []


@pytest.mark.parametrize("key", ["code_bytes", "artifact_bytes"])
def test_one_byte_above_the_cap_is_a_violation(key):
    (sentence,) = broken(**{key: GOOD[key] + 1})
    assert "16000001 bytes" in sentence and "1 above the cap" in sentence
    assert "QUANT_ONLY=1 TARGET_BYTES=16000000" in sentence


def test_result_counts_code_and_weights_once_each(tmp_path, dist):
    stages = SimpleNamespace(
        hp=tiny_hp(data_path=str(tmp_path)),
        dist=dist,
        guard=train_gpt.NO_GUARD,
        log=Lines(),
        folder=tmp_path,
        training={},
        scores={"quantized": {"loss": 1.0}},
        artifact_bytes=15_966_000,
        code_bytes=34_001,
    )
    stages.log.seconds, stages.log.graphs = {"eval_quantized": 1.0}, {"train": 0}
    result = train_gpt.Stages.result(stages, {"run": "any"})
    assert result["total_bytes"] == 16_000_001
    assert (result["artifact_bytes"], result["code_bytes"]) == (15_966_000, 34_001)
    (sentence,) = result["violations"]
    assert sentence.startswith("16000001 bytes of code and weights, 1 above the cap")
    assert json.loads((tmp_path / "result.json").read_text()) == result


@pytest.mark.parametrize("first_clip", [4.0, 40.0])  # far too large a file, far too small a one
def test_target_bytes_ends_just_under_the_target_whatever_the_clips(
    monkeypatch, tmp_path, dist, first_clip
):
    clips = dict.fromkeys(("mlp_clip_sigmas", "attn_clip_sigmas", "embed_clip_sigmas"), first_clip)
    hp = tiny_hp(target_bytes=600_000, compressor="entropy", model_dim=128, **clips)
    ops = train_gpt.select_ops(hp, dist.device, torch.float32)
    model = train_gpt.GPT(hp, ops, torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    identity = {
        n: torch.eye(w.shape[-1])
        for n, w in train_gpt.unbank(model).items()
        if train_gpt.quant_role(n)
    }
    monkeypatch.setattr(train_gpt, "collect_hessians", lambda *_: identity)
    monkeypatch.setattr(train_gpt, "collect_row_gradients", lambda *_: {})
    log, loader = train_gpt.RunLog(tmp_path, dist), SimpleNamespace(held_out_rows=0)
    log.guard = guard.RunGuard()
    train_gpt.build_artifact(model, loader, hp, dist, log, tmp_path / "a", 20_000)
    groups = log.guard.group_bytes["group_bytes"]
    assert 600_000 * 0.995 <= 20_000 + (tmp_path / "a").stat().st_size <= 600_000
    assert {"up", "down", "embedding", "q", "k", "v", "out", "rest"} == set(groups) and min(
        groups.values()
    ) > 0


@pytest.mark.parametrize("first_clip", [3.0, 12.0, 40.0])
def test_one_trial_meets_the_target_where_bytes_follow_the_logarithm_of_the_clips(dist, first_clip):
    """Doubling all clips saves exactly one bit of each of 1,000,000 weights here."""

    def quantize(hp):
        clips = hp.mlp_clip_sigmas * hp.attn_clip_sigmas * hp.embed_clip_sigmas
        size = 1_000_000 / 8 * (8 - math.log2(clips) / 3)
        return train_gpt.Quantized(hp, {}, bytes(round(size)))

    clips = dict.fromkeys(("mlp_clip_sigmas", "attn_clip_sigmas", "embed_clip_sigmas"), first_clip)
    first, log = quantize(tiny_hp(target_bytes=600_000, **clips)), Lines()
    found = fit(first, quantize, 1_000_000, dist, log)
    assert 598_000 <= len(found.file) + 20_000 <= 599_000 and len(log) == 1


def fit(first, quantize, num_weights, dist, log, time_is_left=lambda: True):
    """With 20,000 bytes of code."""
    return train_gpt.fit_target_bytes(first, quantize, time_is_left, num_weights, 20_000, dist, log)


def never(*_):
    raise AssertionError("quantized again")


@pytest.mark.parametrize("size, again", [(279_000, False), (281_000, True)])
def test_a_model_that_fills_less_than_half_of_the_target_stays_as_it_is(size, again, dist):
    """The target is the contest's cap by default, and a small model needs no finer steps for it."""
    first, log = train_gpt.Quantized(tiny_hp(target_bytes=600_000), {}, bytes(size)), Lines()
    if again:
        with pytest.raises(AssertionError, match="quantized again"):
            fit(first, never, 1_000_000, dist, log)
    else:
        assert fit(first, never, 1_000_000, dist, log) is first and not log


def sizes_of(size):
    """quantize(hp) for files of size(log2 of the scale of the MLP's clips) bytes."""

    def quantize(hp):
        scale = hp.mlp_clip_sigmas / tiny_hp().mlp_clip_sigmas
        return train_gpt.Quantized(hp, {}, bytes(round(size(math.log2(scale)))))

    return quantize


@pytest.mark.parametrize("slope", [40_000, 250_000, 400_000])  # expected are 125,000 bytes
def test_trials_on_both_sides_of_the_target_are_interpolated(slope, dist):
    """Two trials give a line; without it every trial would miss by the same share, or by more."""
    quantize = sizes_of(lambda factor: 590_000 - slope * factor - 5_000 * factor**2)
    hp, log = tiny_hp(target_bytes=600_000), Lines()
    found = fit(quantize(hp), quantize, 1_000_000, dist, log)
    assert 597_000 <= len(found.file) + 20_000 <= 600_000 and not any("note" in x for x in log)


def test_a_file_that_fits_is_not_filled_up_where_smaller_clips_would_clip_codes(dist):
    first, log = (
        train_gpt.Quantized(
            tiny_hp(target_bytes=600_000, gptq_column_steps=False), {}, bytes(500_000)
        ),
        Lines(),
    )
    assert fit(first, never, 1_000_000, dist, log) is first and not log


def test_a_target_of_0_is_off(monkeypatch, tmp_path, dist):
    monkeypatch.setattr(train_gpt, "collect_hessians", lambda *_: {})
    monkeypatch.setattr(train_gpt, "collect_row_gradients", lambda *_: {})
    monkeypatch.setattr(train_gpt, "quantize_weights", lambda *_: {})
    monkeypatch.setattr(train_gpt, "fit_target_bytes", never)
    hp = tiny_hp(target_bytes=0)
    log, loader = train_gpt.RunLog(tmp_path, dist), SimpleNamespace(held_out_rows=0)
    model = train_gpt.build_model(hp, dist)
    train_gpt.build_artifact(model, loader, hp, dist, log, tmp_path / "a", 20_000)
    assert (tmp_path / "a").exists()


def test_a_target_that_no_trial_meets_is_told(dist):
    quantize = sizes_of(lambda factor: 700_000)
    log = Lines()
    fit(quantize(tiny_hp(target_bytes=600_000)), quantize, 1_000_000, dist, log)
    assert (
        len(log) == 5 and "no trials or seconds are left" in log[-1] and "spare:-120000" in log[-1]
    )


def test_without_seconds_for_another_trial_the_best_so_far_is_kept(dist):
    first = train_gpt.Quantized(tiny_hp(target_bytes=600_000), {}, bytes(590_000))
    log = Lines()
    assert fit(first, never, 1_000_000, dist, log, time_is_left=lambda: False) is first
    assert len(log) == 1 and "no trials or seconds are left" in log[0]


def test_the_budget_decides_whether_there_is_another_trial(monkeypatch, tmp_path, dist):
    """Training took 590 s of 600; each quantization takes 4 s: two fit, a third does not."""
    now = [0.0]
    sizes = iter([700_000, 590_000, 600_000])
    monkeypatch.setattr(train_gpt, "collect_hessians", lambda *_: {})
    monkeypatch.setattr(train_gpt, "collect_row_gradients", lambda *_: {})
    monkeypatch.setattr(train_gpt, "pack_weights", lambda *_: bytes(next(sizes)))
    hp = tiny_hp(target_bytes=600_000, max_wallclock_seconds=600.0)
    model = train_gpt.build_model(hp, dist)
    log, loader = train_gpt.RunLog(tmp_path, dist), SimpleNamespace(held_out_rows=0)

    def quantize_weights(*_):
        now[0] += 4.0
        return {}

    monkeypatch.setattr(train_gpt, "quantize_weights", quantize_weights)
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: now[0])
    train_gpt.build_artifact(
        model, loader, hp, dist, log, tmp_path / "a", 20_000, training_seconds=590.0
    )
    assert (tmp_path / "a").stat().st_size == 590_000


def test_of_all_trials_the_one_that_is_nearest_below_the_target_is_kept(
    monkeypatch, tmp_path, dist
):
    sizes = iter([700_000, 570_000, 580_010, 579_000, 580_001])
    monkeypatch.setattr(train_gpt, "collect_hessians", lambda *_: {})
    monkeypatch.setattr(train_gpt, "collect_row_gradients", lambda *_: {})
    monkeypatch.setattr(train_gpt, "quantize_weights", lambda *_: {})
    monkeypatch.setattr(train_gpt, "pack_weights", lambda *_: bytes(next(sizes)))
    hp = tiny_hp(target_bytes=600_000)
    model = train_gpt.build_model(hp, dist)
    log, loader = train_gpt.RunLog(tmp_path, dist), SimpleNamespace(held_out_rows=0)
    train_gpt.build_artifact(model, loader, hp, dist, log, tmp_path / "a", 20_000)
    assert (tmp_path / "a").stat().st_size == 579_000


@pytest.mark.parametrize("key", ["training_seconds", "hessians", "quantize", "quant_check"])
def test_training_hessians_and_gptq_share_one_budget(key):
    (sentence,) = broken(**{key: GOOD[key] + 0.5})
    assert "600.5 s of 600.0" in sentence


@pytest.mark.parametrize("final", ["quantized", "sliding", "ttt"])
@pytest.mark.parametrize("key", ["unpack", "scoring"])
def test_unpacking_and_the_final_evaluation_share_one_budget(key, final):
    (sentence,) = broken(final, **{key: GOOD[key] + 0.5})
    assert "600.5 s of 600.0" in sentence


@pytest.mark.parametrize("gap", [None, 5.0])
def test_a_gap_that_is_too_large_or_not_finite_is_a_violation(gap):
    (sentence,) = broken(gap=gap)
    assert sentence.startswith(f"quantization adds {gap} nats")


def test_a_problem_of_one_rank_is_raised_on_all():
    """Or the others would go on, and wait for this one."""

    def check(dist):
        def fails():
            if dist.rank == 1:
                raise train_gpt.DataError("rank 1 lacks a shard")

        try:
            train_gpt.fail_together(dist, [lambda: None, fails])
        except train_gpt.SettingError as error:
            return str(error)

    assert on_ranks(3, check) == ["rank 1 lacks a shard"] * 3


def test_a_partial_score_is_marked():
    (sentence,) = broken(partial=True)
    assert "part of the validation documents" in sentence


@pytest.mark.parametrize("total, code", [(16_000_000, None), (16_000_001, 3)])
def test_exit_code_tells_a_broken_byte_cap(monkeypatch, total, code):
    monkeypatch.setattr("sys.argv", ["train_gpt.py"])
    # this process is not the run's own
    monkeypatch.setattr(train_gpt, "find_guard", lambda: train_gpt.NO_GUARD)
    monkeypatch.setattr(
        train_gpt, "run", lambda hp, dist, guard: {"total_bytes": total, "run": "any"}
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("PLOTS", "0")
    if code is None:
        train_gpt.main()
    else:
        with pytest.raises(SystemExit) as ended:
            train_gpt.main()
        assert ended.value.code == code


WARM = {"warm_up": 2, "eval_prequant": 3, "eval_ttt": 4}


@pytest.mark.parametrize(
    "graphs", [WARM, WARM | {"train": 1, "eval_training": 1, "eval_prequant": 0}]
)
def test_graphs_of_a_warm_up_are_no_violation(graphs):
    assert broken(graphs=graphs) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"graphs": {"train": 1}}, "1 graphs were compiled while the training clock ran"),
        (
            {"graphs": {"train": 3, "eval_training": 1}},
            "2 graphs were compiled while the training clock ran",
        ),
        ({"recompilations": 2}, "2 graphs were compiled in test-time training after its warm-up"),
    ],
)
def test_compiling_under_a_clock_is_a_violation(change, sentence):
    assert broken(**change) == [sentence]
