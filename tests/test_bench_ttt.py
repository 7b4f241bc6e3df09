"""benchmarks/bench_ttt.py: the planner of the evaluation budget, and the file of measured steps."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, write_shard

import train_gpt as tg
from benchmarks import bench_ttt
from prepare_caseops_data import DEFAULT_TOKENIZER

SHARED_LENGTHS = Path(__file__).resolve().parents[2] / "shared" / "fineweb_val_lengths.json"
SMALL = {
    "PHASED_TTT_PREFIX_DOCS": 10_000,
    "TTT_EVAL_SEQ_LEN": 256,
    "TTT_STALE_CONTEXT": 128,
    "TTT_CHUNK_SIZE": 16,
    "TTT_BATCH_SIZE": 16,
}
POINTS = [[0, 100], [100, 1000], [119, 9000]]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Arguments of `plan` for 120 documents and small windows."""
    for name, value in SMALL.items():
        monkeypatch.setenv(name, str(value))
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps({"documents": 120, "tokens": 100_000, "points": POINTS}))
    return ["plan", "--ranks", "2", "--lengths", str(path)]


def small_plan(ranks=2, **changes):
    """Lengths, Hyperparameters and PhasePlans of these documents."""
    settings = {name: str(value) for name, value in (SMALL | changes).items()}
    hp = tg.Hyperparameters.from_env(settings)
    lengths = bench_ttt.lengths_of_points({"documents": 120, "tokens": 100_000, "points": POINTS})
    return lengths, hp, bench_ttt.plan_all(lengths, [hp], ranks)[0]


def summary(told):
    """Rows under the last heading -> lists of words."""
    lines = told.splitlines()
    heading = max(number for number, line in enumerate(lines) if "what" in line.split())
    return [line.split() for line in lines[heading + 1 : -1]]


def write_steps(path, hp, factor=1.0, **changes):
    """A file as `steps --out` writes it, at `factor` times the fitted costs."""
    steps = []
    for rows in (2, 4, 16):
        for width in (16, 32, 64, 128, 192, 256):
            seconds = factor * tg.step_seconds(rows, width, tg.recomputed_context(hp))
            steps.append({"rows": rows, "width": width, "ms": 1e3 * seconds})
    settings = {name: getattr(hp, name) for name in bench_ttt.OF_A_STEP}
    path.write_text(json.dumps({"device": "a GPU", "settings": settings | changes, "steps": steps}))
    return str(path)


def test_the_embedded_lengths_are_those_of_the_contest():
    ranks, tokens = np.array(bench_ttt.CONTEST["points"], float).T
    plain = np.exp(np.interp(np.arange(50_000), ranks, np.log(tokens)))
    assert len(ranks) <= 40 and abs(plain.sum() / 47_853_344 - 1) < 0.01
    lengths = bench_ttt.lengths_of_points(bench_ttt.CONTEST).stored
    assert len(lengths) == 50_000 and abs(lengths.sum() - 47_853_344) < 1000


@pytest.mark.skipif(not SHARED_LENGTHS.is_file(), reason=f"missing: {SHARED_LENGTHS}")
def test_the_embedded_lengths_are_near_the_published_ones():
    published = bench_ttt.lengths_of_points(json.loads(SHARED_LENGTHS.read_text())).stored
    ours = bench_ttt.lengths_of_points(bench_ttt.CONTEST).stored
    assert np.abs(ours - published).sum() < 0.005 * published.sum()
    hp = tg.Hyperparameters()
    cost = tg.window_positions(ours, hp).sum() / tg.window_positions(published, hp).sum()
    assert abs(cost - 1) < 0.002


def test_seconds_are_the_costs_that_schedule_rank_adds_up():
    lengths, hp, plan = small_plan()
    lengths = lengths.seen(hp)
    starts = np.cumsum(lengths) - lengths
    phases = tg.plan_ttt(lengths, hp)
    device = bench_ttt.DEVICES["h100"]
    budget = bench_ttt.budget_of(plan, hp, bench_ttt.model_cost(hp), device, 2)
    by_rank = [tg.schedule_rank(phases, starts, lengths, rank, 2, hp) for rank in (0, 1)]
    assert len(budget.phases) == 2
    for number, (slowest, mean, _, _) in enumerate(budget.phases):
        seconds = [sum(step.cost for step in steps[number]) for steps in by_rank]
        assert [slowest, mean] == pytest.approx([max(seconds), sum(seconds) / 2])


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_partition_the_documents(ranks):
    lengths, hp, plan = small_plan(ranks)
    assert sum(phase.documents for phase in plan) == len(lengths.stored)
    for phase in plan:
        assert len(phase.ranks) == ranks
        assert sum(rank.targets for rank in phase.ranks) == phase.targets
    assert sum(phase.targets for phase in plan) == lengths.seen(hp).sum()


def test_fused_markers_shorten_every_document():
    lengths, hp, fused = small_plan()
    share = 724_326 / 792_456
    seen = bench_ttt.scored_lengths(lengths, hp)
    assert seen == pytest.approx(share * lengths.stored, abs=0.5)
    as_stored = small_plan(MARKER_FUSION_ENABLED=0)[2]
    assert sum(phase.targets for phase in as_stored) == lengths.stored.sum()
    assert sum(phase.targets for phase in fused) == seen.sum()


def test_a_plan_says_that_fused_markers_shorten_it(small, capsys):
    told = "fused markers leave 0.914 of the stored tokens, as in the proxy's validation text"
    assert bench_ttt.main(small) == 0
    assert told in capsys.readouterr().out
    assert bench_ttt.main([*small, "MARKER_FUSION_ENABLED=0"]) == 0
    assert told not in capsys.readouterr().out


def test_a_total_is_its_parts():
    _, hp, plan = small_plan()
    device = bench_ttt.DEVICES["h100"]
    budget = bench_ttt.budget_of(plan, hp, bench_ttt.model_cost(hp), device, 2)
    prefix = plan[0]
    assert prefix.adapt and not plan[1].adapt
    num_steps = -(-prefix.targets // hp.global_ttt_chunk_tokens)
    tuning = device.first_sgd_step + 0.1 * num_steps + 3e-6 * prefix.targets / 2
    assert [phase[3] for phase in budget.phases] == pytest.approx([tuning, 0])
    chunks = sum(max(rank.targets for rank in phase.ranks) for phase in plan) / hp.ttt_chunk_size
    assert budget.fixed["schedule"] == pytest.approx(bench_ttt.SCHEDULE_CHUNK * chunks) != 0
    graphs = [max(len(rank.steps) for rank in phase.ranks) for phase in plan]
    fixed = device.start + device.unpack + device.compile + budget.fixed["schedule"]
    stepping = sum(phase[0] for phase in budget.phases)
    assert budget.total() == pytest.approx(fixed + stepping + tuning + sum(graphs) * device.graph)


def test_a_plan_prints_what_its_budget_holds():
    """Its lines, by hand: steps of the slowest ranks, what is spared, positions with padding."""
    lengths, hp, _ = small_plan()
    counter = bench_ttt.collections.Counter
    ranks = [
        bench_ttt.RankPlan(300, counter({(4, 64): 5, (16, 256): 1})),
        bench_ttt.RankPlan(100, counter({(4, 32): 2})),
    ]
    plan = [bench_ttt.PhasePlan(12, 400, ranks, True), bench_ttt.PhasePlan(3, 100, ranks, False)]
    budget = bench_ttt.Budget([(20.0, 15.0, 1.0, 6.0), (10.0, 9.0, 2.0, 0.0)], {"start": 100.0})
    first, second = bench_ttt.phase_table(plan, budget)[1:]
    assert first.split() == ["1", "12", "400", "6", "20.0", "15.0", "0.750", "1.0", "6.0"]
    assert second.split() == ["2", "3", "100", "6", "10.0", "9.0", "0.900", "2.0", "0.0"]
    words = bench_ttt.summary_row(lengths, plan, hp, budget, 200.0, "an arm").split()
    assert words[:6] == ["30.0", "6.0", "103.0", "139.0", "61.0", "fits"]
    recomputed = tg.recomputed_context(hp)
    assert recomputed == 128
    computed = 2 * (5 * 4 * 64 + 16 * 128 + 2 * 4 * 32)  # both phases
    positions = tg.window_positions(lengths.seen(hp), hp).sum() / 500
    assert words[6:] == [f"{positions:.2f}", f"{computed / 500:.2f}", "an", "arm"]
    device = bench_ttt.DEVICES["h100"]
    by_cost = bench_ttt.budget_of(plan, hp, lambda rows, width: rows / 8, device, 2)
    # 5 x 4 / 8 + 16 / 8 s on one rank, 2 x 4 / 8 on the other, which captures one shape less
    assert [phase[:3] for phase in by_cost.phases] == [(4.5, 2.75, 2 * device.graph)] * 2
    over = bench_ttt.summary_row(lengths, plan, hp, budget, 178.0, "").split()
    assert over[4:6] == ["39.0", "NO"]


def test_seconds_of_a_plan_are_those_of_its_device(small, capsys):
    assert bench_ttt.main(small) == 0
    told = capsys.readouterr().out
    (h100,) = summary(told)
    counted = float(h100[3]) - bench_ttt.DEVICES["h100"].start
    assert f"EVAL_BUDGET_SECONDS counts {counted:.1f} s, all but the start" in told
    assert bench_ttt.main([*small, "--device", "h200"]) == 0
    (h200,) = summary(capsys.readouterr().out)
    factor = bench_ttt.DEVICES["h200"].step_factor
    assert float(h200[0]) == pytest.approx(factor * float(h100[0]), abs=0.1) != float(h100[0])


def test_several_plans_keep_their_own_steps(small, capsys):
    """Each line is that of its plan alone."""
    arms = ["", "TTT_CHUNK_SIZE=64", "TTT_MAX_DOCS=30"]
    assert bench_ttt.main([*small, *arms]) == 0
    together = summary(capsys.readouterr().out)
    for arm, row in zip(arms, together, strict=True):
        assert bench_ttt.main([*small, arm]) == 0
        assert summary(capsys.readouterr().out) == [row]


def test_a_longer_context_costs_more(small, capsys):
    arms = ["", "TTT_EVAL_SEQ_LEN=512 TTT_STALE_CONTEXT=0", "TTT_STALE_CONTEXT=0"]
    assert bench_ttt.main([*small, *arms]) == 0
    defaults, longer, whole = (float(row[0]) for row in summary(capsys.readouterr().out))
    assert longer > whole > 0 and longer > defaults


def test_a_plan_that_does_not_fit_ends_with_1(small, capsys):
    assert bench_ttt.main(small) == 0
    total = float(summary(capsys.readouterr().out)[0][3])
    assert bench_ttt.main([*small, "--limit", str(total + 41)]) == 0
    assert bench_ttt.main([*small, "--limit", str(total + 39)]) == 1
    assert "NO" in capsys.readouterr().out
    # one of several is enough
    limit = str(total + 41)
    assert bench_ttt.main([*small, "--limit", limit, "TTT_CHUNK_SIZE=4", ""]) == 1


def test_measured_steps_replace_the_cost_model(small, tmp_path, capsys):
    hp = small_plan()[1]
    path = write_steps(tmp_path / "steps.json", hp, 3.0)
    assert bench_ttt.main([*small, "--ranks", "1"]) == 0
    (modelled,) = summary(capsys.readouterr().out)
    assert bench_ttt.main([*small, "--ranks", "1", "--steps-json", path]) == 0
    (measured,) = summary(capsys.readouterr().out)
    assert float(measured[0]) == pytest.approx(3 * float(modelled[0]), rel=0.05)
    assert measured[-3:] == modelled[-3:]  # the same steps


def test_measured_steps_are_interpolated(tmp_path):
    hp = small_plan()[1]
    path = tmp_path / "steps.json"
    path = write_steps(path, hp)
    cost = bench_ttt.measured_cost(path, hp)
    assert cost(4, 64) == pytest.approx(tg.step_seconds(4, 64))
    assert cost(10, 64) == pytest.approx((cost(4, 64) + cost(16, 64)) / 2)
    assert cost(4, 160) == pytest.approx((cost(4, 128) + cost(4, 192)) / 2)
    with pytest.raises(ValueError, match="64 rows not measured"):
        cost(64, 64)
    with pytest.raises(ValueError, match="width 512 not measured"):
        cost(4, 512)


def test_steps_of_other_settings_are_refused(small, tmp_path, capsys):
    hp = small_plan()[1]
    path = write_steps(tmp_path / "steps.json", hp, ttt_lora_rank=8)
    assert bench_ttt.main([*small, "--steps-json", path]) == 2
    assert "TTT_LORA_RANK=8, not 80" in capsys.readouterr().err


def test_adapters_of_a_lower_rank_cost_less_by_their_rows():
    usual = tg.Hyperparameters()
    half = tg.Hyperparameters(ttt_lora_rank=40)
    saved = bench_ttt.model_cost(usual)(64, 128) - bench_ttt.model_cost(half)(64, 128)
    assert saved == pytest.approx(64 * 7e-5 / 2)
    assert bench_ttt.model_cost(usual)(64, 128) == tg.step_seconds(64, 128, 256)


def test_settings_outside_the_cost_model_are_named(small, capsys):
    assert bench_ttt.main([*small, "NUM_LOOPS=1"]) == 0
    assert "note: NUM_LOOPS=1 is not in the cost model" in capsys.readouterr().out


def test_ttt_max_docs_plans_documents_of_all_lengths(small, capsys):
    assert bench_ttt.main([*small, "TTT_MAX_DOCS=12 PHASED_TTT_PREFIX_DOCS=0"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("    1"))
    assert row.split()[1] == "12"


def test_documents_come_from_shards(tmp_path, monkeypatch, small, capsys):
    tokens = np.full(1000, 50, np.uint16)
    tokens[[0, 300, 301, 700]] = tg.BOS_ID
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    hp = tg.Hyperparameters(marker_fusion_enabled=False)
    assert bench_ttt.lengths_of_shards(str(tmp_path), hp).stored.tolist() == [300, 1, 399, 300]
    as_stored = "MARKER_FUSION_ENABLED=0"
    assert bench_ttt.main([*small[:3], "--data", str(tmp_path), as_stored]) == 0
    assert "4 documents, 1,000 stored tokens" in capsys.readouterr().out
    assert bench_ttt.main([*small[:3], "--data", str(tmp_path / "none")]) == 2


def test_fused_markers_are_counted_where_the_data_are_known(tmp_path, small, capsys):
    space = tg.space_id(tg.Hyperparameters(tokenizer_path=str(DEFAULT_TOKENIZER)))
    tokens = np.full(1000, 300, np.uint16)
    tokens[[0, 600]] = tg.BOS_ID
    tokens[100:400] = [space, 4, 300] * 100  # all of them in the first document
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    hp = tg.Hyperparameters(tokenizer_path=str(DEFAULT_TOKENIZER))
    lengths = bench_ttt.lengths_of_shards(str(tmp_path), hp)
    assert lengths.stored.tolist() == [600, 400] and lengths.fused.tolist() == [500, 400]
    told = f"fused markers leave 0.900 of the stored tokens, counted in {tmp_path}"
    settings = ["MARKER_FUSION_ENABLED=0", f"TOKENIZER_PATH={DEFAULT_TOKENIZER}"]
    assert bench_ttt.main([*small[:3], "--data", str(tmp_path), *settings]) == 0
    assert capsys.readouterr().out.count(told) == 1


def test_steps_writes_what_plan_reads(tmp_path, monkeypatch, capsys):
    settings = {name: value for name, value in TINY.items() if not name.startswith("ttt_")}
    settings |= {"ttt_eval_seq_len": 32, "ttt_stale_context": 16, "ttt_chunk_size": 8}
    settings |= {"ttt_batch_size": 4, "ttt_lora_rank": 2, "compile": "0"}
    for name, value in settings.items():
        value = int(value) if isinstance(value, bool) else value
        monkeypatch.setenv(name.upper(), str(value))
    out = tmp_path / "steps.json"
    command = ["--cpu", "steps", "--rows", "2,4", "--widths", "32,8", "--repeats", "1"]
    state = torch.random.get_rng_state()
    assert bench_ttt.main([*command, "--out", str(out)]) == 0
    torch.random.set_rng_state(state)
    told = capsys.readouterr().out.splitlines()
    record = json.loads(out.read_text())
    shapes = [(step["rows"], step["width"]) for step in record["steps"]]
    assert shapes == [(2, 32), (2, 8), (4, 32), (4, 8)]
    hp = tg.Hyperparameters.from_env()
    first = record["steps"][0]
    printed = next(line.split() for line in told if line.split()[:2] == ["2", "32"])
    assert printed[2] == f"{first['ms']:.1f}" != "0.0"
    # of a width of 32 the last 16 positions are computed
    rate = 2 * 16 / first["ms"] * 1e3
    assert float(printed[5].replace(",", "")) == pytest.approx(rate, abs=1)
    assert printed[6] == f"{rate / bench_ttt.PUBLISHED_POSITIONS_PER_S:.2f}"
    assert bench_ttt.measured_cost(out, hp)(2, 32) == first["ms"] / 1e3


class Clock:
    """Stands in for the module time: it moves by what a function says that it takes."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_seconds_of_a_call_leave_out_the_first_one(monkeypatch):
    """It compiles."""
    clock = Clock()
    monkeypatch.setattr(bench_ttt, "time", clock)
    taken = iter([100.0, 2.0, 3.0, 4.0])

    def run():
        clock.now += next(taken)

    device = SimpleNamespace(synchronize=lambda: None)
    assert bench_ttt.seconds_of(run, device, 3) == 3.0


def test_a_run_is_told_with_all_its_seconds(monkeypatch):
    """Those of making the trainer and compiling too; steps are scored tokens by their rate."""
    clock = Clock()
    monkeypatch.setattr(bench_ttt, "time", clock)

    class Trainer:
        documents = np.array([0, 2])

        def __init__(self, model, validation, hp, dist, log):
            self.log = log
            clock.now += 10

        def evaluate(self):
            clock.now += 100
            for line in ("ttt_warm_up seconds:30.0 steps:9", "ttt_graphs captured:2 seconds:4.0"):
                self.log(line)
            for rate in (10, 50):
                self.log(f"ttt phase:1 tokens_per_s:{rate} budget_left:1")
            return {"bpb": 1.25, "tokens": 1000, "partial": True, "unadapted_tokens": 7}

    monkeypatch.setattr(tg, "TestTimeTrainer", Trainer)
    hp = small_plan()[1]
    starts = np.array([0, 700, 800])
    validation = SimpleNamespace(starts=starts, ends=starts + [600, 90, 400])
    device = SimpleNamespace(synchronize=lambda: None)
    score, line = bench_ttt.bench_run(None, validation, hp, device, "an arm")
    assert score["bpb"] == 1.25
    positions = tg.window_positions(np.array([600, 400]), hp).sum() / 1000 * 50
    figures = ["1.25000", "110.0", "30.0", "4.0", "20.0", "50", f"{positions:,.0f}"]
    assert line.split() == [*figures, "an", "arm", "partial", "UNADAPTED", "7"]


def test_the_reference_counts_the_bytes_of_the_targets(monkeypatch):
    losses = {(0, 1): 2.0, (0, 3): 1.0}
    monkeypatch.setattr(bench_ttt, "document_by_document", lambda *arguments: losses)
    validation = SimpleNamespace(bytes=np.array([50, 1, 70, 2]))
    bpb, _ = bench_ttt.reference_score(None, validation, None, None)
    assert bpb == tg.bits_per_byte(3.0, 3)


@pytest.fixture
def artifact(tmp_path, monkeypatch, tiny_data, ops):
    """The artifact of a tiny model, and the environment of `runs` on it."""
    settings = TINY | {"data_path": tiny_data, "compile": 0}
    for name, value in settings.items():
        monkeypatch.setenv(name.upper(), str(int(value) if isinstance(value, bool) else value))
    hp = tg.Hyperparameters.from_env()
    generator = torch.Generator().manual_seed(5)
    model = tg.GPT(hp, ops, torch.float32)
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    weights = tg.unbank(model)
    hessians = {name: torch.eye(w.shape[-1]) for name, w in weights.items()}
    arrays = tg.quantize_weights(weights, hessians, hp, tg.Dist("cpu"))
    path = tmp_path / "artifact.bin"
    path.write_bytes(tg.pack_weights(arrays, "brotli"))
    return path


def test_every_run_starts_from_the_artifact_with_its_own_settings(artifact, monkeypatch, capsys):
    """Runs fine-tune the base weights: the next one, and the reference, must not see that."""
    seen = []

    def reference_score(model, validation, hp, dist):
        weights = tg.unbank(model)
        seen.append((model.hp.ttt_lora_lr, hp.ttt_lora_lr, weights["tok_emb.weight"].clone()))
        return 2.0, 1.0

    monkeypatch.setattr(bench_ttt, "reference_score", reference_score)
    rates = "TTT_LORA_LR=0.01 GLOBAL_TTT_LR=0.1"
    arms = [rates, "TTT_LORA_LR=0.05 GLOBAL_TTT_LR=0.1", rates]
    command = ["--cpu", "runs", "--artifact", str(artifact), "--reference"]
    state = torch.random.get_rng_state()
    assert bench_ttt.main([*command, *arms]) == 0
    torch.random.set_rng_state(state)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    first, other, again = rows[::2]
    assert first[0] == again[0] != other[0]
    assert [row[7] for row in rows[::2]] == [arm.split()[0] for arm in arms]
    for row, reference in zip(rows[::2], rows[1::2], strict=True):
        assert reference[:2] == ["2.00000", "1.0"]
        assert float(reference[-1]) == pytest.approx(float(row[0]) - 2, abs=1e-5)
    assert [both for *both, _ in seen] == [[0.01, 0.01], [0.05, 0.05], [0.01, 0.01]]
    loaded = tg.dequantize_weights(tg.unpack_weights(artifact.read_bytes()))["tok_emb.weight"]
    assert all(torch.equal(weights, loaded) for *_, weights in seen)
    command.remove("--reference")  # which loads the weights, too
    assert bench_ttt.main([*command, rates, rates]) == 0
    torch.random.set_rng_state(state)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == [first[0]] * 2


def test_runs_of_published_systems_know_their_settings(artifact, published, capsys):
    command = ["--cpu", "runs", "--published", "--artifact", str(artifact)]
    state = torch.random.get_rng_state()
    assert bench_ttt.main([*command, "", "NGRAM_TILT_ENABLED=1 NGRAM_TILT_ORDERS=1,2,4"]) == 0
    torch.random.set_rng_state(state)
    out, log = capsys.readouterr()
    off, on = (line.split() for line in out.splitlines()[1:])
    fired, nats = re.search(r"ttt_ngram fired:(\d+) nats:(\S+)", log).groups()
    assert int(fired) > 0 and float(nats) != 0
    assert off[0] != on[0] and on[7:9] == ["NGRAM_TILT_ENABLED=1", "NGRAM_TILT_ORDERS=1,2,4"]
