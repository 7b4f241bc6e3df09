"""benchmarks/bench_recipe.py: pairs, goes, what is missing after a kill, refusals, verdicts,
tables; one real pair.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import IN_SOAK, PATIENCE, TINY, write_documents

import prepare_caseops_data
from benchmarks import bench_recipe

# Stands in for train_gpt.py: BPB is 1.2 + SEED / 100 - GAIN, and nothing is trained.
STUB = """
import dataclasses, json, os, pathlib, sys, time

@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    seed: int = 42
    data_path: str = ""
    run_id: str = ""
    runs_dir: str = ""
    plots: int = 1
    train_batch_tokens: int = 10
    micro_batch_tokens: int = 10
    max_wallclock_seconds: float = 600.0
    gptq_reserve_seconds: float = 7.0
    prequant_only: int = 0
    gain: float = 0.0
    speed: float = 1.0
    sleep: float = 0.0
    broken: int = 0
    exit_code: int = 0

    @classmethod
    def from_env(cls, environ):
        fields = {f.name.upper(): f for f in dataclasses.fields(cls)}
        if unknown := [name for name in environ if name.startswith("GAIN") and name not in fields]:
            raise ValueError(f"{unknown[0]} is not a setting")
        return cls(**{f.name: f.type(environ[name]) for name, f in fields.items() if name in environ})

if __name__ == "__main__":
    hp = Hyperparameters.from_env(os.environ)
    time.sleep(hp.sleep)
    if hp.broken == hp.seed:
        print("step:1 train_loss:9.0")
        sys.exit("out of\\nmemory")
    folder = pathlib.Path(hp.runs_dir, hp.run_id)
    folder.mkdir(parents=True)
    bpb = 1.2 + hp.seed / 100 - hp.gain
    stages = {"prequant": bpb} if hp.prequant_only else {"prequant": bpb, "quantized": bpb + 0.005, "ttt": bpb - 0.01}
    (folder / "log.txt").write_text("train_shards:1 train_tokens:9830400 rows_a_step:1 span:147456\\n")
    (folder / "result.json").write_text(json.dumps({
        "version": 2, "commit": None, "device": "stub", "torch": "0", "python": "3", "steps": int(1000 * hp.speed),
        "training_seconds": 100.0, "artifact_bytes": 0 if hp.prequant_only else 15_000_000, "code_bytes": 20_000,
        "total_bytes": 15_020_000, "seconds": {"train": 130.0}, "violations": [],
        "scores": {stage: {"bpb": value, "bytes": 1000, "tokens": 300} for stage, value in stages.items()}}))
    sys.exit(hp.exit_code)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with checkouts of the stub (base, other) and data.

    Every test is a machine of its own.
    """
    for name in ("base", "other", "data", "tmp"):
        (tmp_path / name).mkdir()
    for name in ("base", "other"):
        (tmp_path / name / "train_gpt.py").write_text(STUB)
    write_documents(tmp_path / "data", "train", [50, 60], seed=1)
    write_documents(tmp_path / "data", "val", [20], seed=2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return tmp_path


def words(place, *arms, kind="screen", seeds="1 2 3", options=()):
    """The command line of `run`.

    An arm is a pair of a name, in the checkout `base`, and settings.
    """
    line = ["run", str(place / "c.jsonl"), "--kind", kind, "--data", str(place / "data")]
    line += ["--runs", str(place / "runs"), "--seeds", *seeds.split(), *options]
    for name, settings in arms:
        line += ["--arm", name if "@" in name else f"{name}@{place / 'base'}", settings]
    return line


def run(place, *arms, **rest):
    """-> (exit code or message, records of the campaign)."""
    with pytest.raises(SystemExit) as ended:
        bench_recipe.main(words(place, *arms, **rest))
    return ended.value.code, bench_recipe.read_campaign(place / "c.jsonl")


def new_machine(place):
    for path in (place / "tmp").iterdir():
        path.unlink()


def table(place, *options):
    bench_recipe.main(["table", str(place / "c.jsonl"), *options])


BASE, BETTER = ("base", ""), ("better", "GAIN=0.002")


# ---- runs and pairs


def test_arms_alternate_and_every_run_is_one_line(place):
    code, records = run(place, BASE, BETTER)
    assert code == 0
    assert [(r["arm"], r["seed"]) for r in records] == [
        ("base", 1),
        ("better", 1),
        ("better", 2),
        ("base", 2),
        ("base", 3),
        ("better", 3),
    ]
    first = records[0]
    assert (
        first["status"] == "ok"
        and first["steps"] == 1000
        and first["scores"]["prequant"]["bpb"] == 1.21
    )
    assert (
        first["tokens_per_second"] == 983_040
        and first["epochs"] == 15.0  # spans are 1.5 times as long as rows
        and first["train_tokens"] == 9_830_400
    )
    assert (
        first["changed"]["MAX_WALLCLOCK_SECONDS"] == 120 and first["changed"]["PREQUANT_ONLY"] == 1
    )
    assert "GAIN" not in first["changed"] and records[1]["changed"]["GAIN"] == 0.002
    assert first["data"]["train_tokens"] == 112 and len({r["go"] for r in records}) == 1
    assert [r["position"] for r in records] == [0, 1, 2, 3, 4, 5]
    assert run(place, BASE, BETTER) == (0, records)  # nothing is missing


def test_settings_of_the_environment_do_not_reach_a_run(place, monkeypatch):
    monkeypatch.setenv("GAIN", "0.7")
    _, records = run(place, BASE, seeds="1")
    assert records[0]["scores"]["prequant"]["bpb"] == 1.21


def test_a_final_has_all_stages_and_set_goes_to_every_arm(place):
    _, records = run(place, BASE, BETTER, kind="final", seeds="1", options=["--set", "SPEED=2"])
    assert [list(r["scores"]) for r in records] == [["prequant", "quantized", "ttt"]] * 2
    assert [r["steps"] for r in records] == [2000, 2000] and records[0]["changed"][
        "MAX_WALLCLOCK_SECONDS"
    ] == 200


def test_another_checkout_is_an_arm(place):
    (place / "other" / "train_gpt.py").write_text(STUB.replace("1.2 +", "1.1 +"))
    _, records = run(place, BASE, (f"old@{place / 'other'}", ""), seeds="1")
    assert records[1]["scores"]["prequant"]["bpb"] == pytest.approx(1.11)
    assert records[0]["code"] != records[1]["code"]


def test_the_code_is_known_by_what_it_imports(place):
    recipe = bench_recipe.check_arm(bench_recipe.Arm("base", {}, place / "base"), {})
    (place / "base" / "notes.py").write_text("")
    assert bench_recipe.check_arm(bench_recipe.Arm("base", {}, place / "base"), {}) == recipe
    (place / "base" / "train_gpt.py").write_text("import notes\n" + STUB)
    imported = bench_recipe.check_arm(bench_recipe.Arm("base", {}, place / "base"), {}).code
    (place / "base" / "notes.py").write_text("x = 1\n")
    assert (
        bench_recipe.check_arm(bench_recipe.Arm("base", {}, place / "base"), {}).code
        != imported
        != recipe.code
    )


def test_a_half_pair_of_another_machine_is_run_again(place):
    _, records = run(place, BASE, BETTER, seeds="1 2")
    lines = (place / "c.jsonl").read_text().splitlines(keepends=True)
    (place / "c.jsonl").write_text("".join(lines[:3]))  # base 1, better 1, better 2
    _, same = run(place, BASE, BETTER, seeds="1 2")
    # the same go: only its other half is missing
    assert [(r["arm"], r["seed"]) for r in same[3:]] == [("base", 2)]
    (place / "c.jsonl").write_text("".join(lines[:3]))
    new_machine(place)
    _, records = run(place, BASE, BETTER, seeds="1 2")
    assert [(r["arm"], r["seed"]) for r in records[3:]] == [("better", 2), ("base", 2)]
    assert len({r["go"] for r in records}) == 2
    pairs = bench_recipe.pairs_of(records, "better", "base")
    assert {seed: (a["go"], b["go"]) for seed, (a, b) in pairs.items()} == {
        1: (records[0]["go"],) * 2,
        2: (records[3]["go"],) * 2,
    }


def test_a_pause_ends_a_go(place, monkeypatch):
    first = bench_recipe.current_go()
    assert bench_recipe.current_go() == first
    (path,) = (place / "tmp").iterdir()
    os.utime(path, (time.time() - bench_recipe.MAX_PAUSE_SECONDS - 5,) * 2)
    assert bench_recipe.current_go() != first


def test_an_arm_that_joins_later_gets_its_partners_in_its_own_go(place):
    run(place, BASE, BETTER, seeds="1")
    new_machine(place)
    _, records = run(place, BASE, BETTER, ("third", "GAIN=0.1"), seeds="1")
    assert [r["arm"] for r in records] == ["base", "better", "base", "third"]


def test_a_killed_call_loses_only_the_run_in_flight(place):
    line = words(place, BASE, ("slow", "SLEEP=60"), seeds="1 2")
    script = [sys.executable, str(bench_recipe.ROOT / "benchmarks" / "bench_recipe.py"), *line]
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not bench_recipe.read_campaign(place / "c.jsonl") and time.time() < deadline:
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text() and time.time() < deadline:
        time.sleep(0.1)
    child = int(children.read_text().split()[0])
    process.send_signal(signal.SIGTERM)
    assert "call again to go on" in process.communicate(timeout=PATIENCE)[1]
    assert not Path(f"/proc/{child}").exists()  # the run has ended with the call
    assert [r["arm"] for r in bench_recipe.read_campaign(place / "c.jsonl")] == ["base"]
    with (place / "c.jsonl").open("a") as file:
        file.write('{"version": 1, "kind": "scr')  # as if a line had been cut off, too
    code, records = run(place, BASE, ("quick", "GAIN=0.1"), seeds="1")
    assert code == 0 and [(r["arm"], r["seed"]) for r in records] == [("base", 1), ("quick", 1)]


def test_a_failed_run_is_recorded_and_the_campaign_goes_on(place, capsys):
    arms = BASE, ("bad", "BROKEN=1")
    code, records = run(place, *arms, seeds="1 2")
    assert code == 1
    assert [(r["arm"], r["seed"], r["status"]) for r in records] == [
        ("base", 1, "ok"),
        ("bad", 1, "failed"),
        ("bad", 2, "ok"),
        ("base", 2, "ok"),
    ]
    assert records[1]["exit_code"] == 1 and records[1]["log"] == [
        "step:1 train_loss:9.0",
        "out of",
        "memory",
    ]
    code, records = run(place, *arms, seeds="1 2")  # once more, and then it is left alone
    assert code == 1 and [(r["arm"], r["seed"]) for r in records[4:]] == [("bad", 1)]
    assert run(place, *arms, seeds="1 2") == (0, records)
    capsys.readouterr()
    table(place)
    told = capsys.readouterr().out
    assert (
        f"failed: bad, seed 1, go {records[1]['go']}: step:1 train_loss:9.0 | out of | memory\n"
        in told
    )
    assert "not counted, without a partner in its go: base, seed 1" in told


def test_a_run_over_the_byte_cap_is_a_result(place):
    """Exit code 3 says that, and so does RESULT; 1 is a failure, whatever was written before it."""
    code, records = run(place, BASE, ("over", "EXIT_CODE=3"), ("bad", "EXIT_CODE=1"), seeds="1")
    assert code == 1
    assert [r["status"] for r in records] == ["ok", "ok", "failed"]


def test_a_run_is_timed_from_its_start_to_its_end(place):
    _, records = run(place, ("base", "SLEEP=0.5"), seeds="1")
    assert 0.5 <= records[0]["wall_seconds"] < 60


def test_a_run_is_expected_to_take_what_the_last_one_of_its_go_took():
    timed = (("g", 300), ("g", 100), ("h", 50))
    records = [
        {"kind": "screen", "status": "ok", "arm": "a", "go": go, "wall_seconds": seconds}
        for go, seconds in timed
    ]
    recipe = bench_recipe.Recipe({}, {}, "code", 120.0)
    expected = [
        bench_recipe.expected_seconds(records, "screen", "a", go, recipe)
        for go in ("g", "h", "new")
    ]
    assert expected == [100, 50, 120 + bench_recipe.OVERHEAD_SECONDS["screen"]]


def test_failures_of_one_seed_do_not_end_another():
    failed = {"kind": "screen", "arm": "bad", "seed": 2, "go": "g", "status": "failed"}
    missing = [
        bench_recipe.missing_pairs([failed] * 2, "screen", seed, ["base", "bad"], "g")
        for seed in (1, 2)
    ]
    assert missing == [["base", "bad"], []]


def test_a_pair_is_the_first_of_its_go():
    runs = [
        {"seed": 1, "go": "g", "arm": arm, "number": number}
        for number, arm in enumerate(("base", "arm", "base", "arm"))
    ]
    ((run_of_arm, partner),) = bench_recipe.pairs_of(runs, "arm", "base").values()
    assert (run_of_arm["number"], partner["number"]) == (1, 0)


def test_data_with_another_validation_text_are_other_data(place):
    before = bench_recipe.data_identity(place / "data")
    write_documents(place / "data", "val", [21], seed=2)
    after = bench_recipe.data_identity(place / "data")
    assert before["files"] != after["files"]
    assert before["train_tokens"] == after["train_tokens"] == 112


def test_a_reference_that_fails_spares_its_partners(place):
    _, records = run(place, ("base", "BROKEN=1"), BETTER, seeds="1")
    assert [r["arm"] for r in records] == ["base"]


def test_no_pair_begins_that_would_not_end_before_the_limit(place, capsys):
    code, records = run(place, BASE, BETTER, options=["--limit-seconds", "400"])
    assert code == 0 and records == []  # 2 x (120 + 120) s with cold caches
    assert "base and better would take about 480 s" in capsys.readouterr().out
    _, records = run(place, BASE, BETTER, options=["--limit-seconds", "500"])
    assert len(records) == 6  # the stub is quick, which is known after the first pair


def test_split_judges_single_runs_by_the_limit(place):
    arms = ("base", "SLEEP=1.5"), BETTER
    assert run(place, *arms, options=["--limit-seconds", "241"])[1] == []
    _, records = run(place, *arms, options=["--limit-seconds", "241", "--split"])
    assert [r["arm"] for r in records] == ["base"]  # after it, 240 s more would be too many
    _, records = run(place, *arms, seeds="1", options=["--limit-seconds", "241", "--split"])
    assert [r["arm"] for r in records] == ["base", "better"] and records[0]["go"] == records[1][
        "go"
    ]


def test_noise_repeats_a_seed(place):
    _, records = run(place, BASE, kind="noise", seeds="1 1 1 2 3")
    assert [r["seed"] for r in records] == [1, 1, 1, 2, 3]
    new_machine(place)
    _, more = run(place, BASE, kind="noise", seeds="1 1 1 1 2 3")
    assert [r["seed"] for r in more[5:]] == [1]


# ---- refusals


@pytest.mark.parametrize(
    "name", ["MAX_WALLCLOCK_SECONDS", "SEED", "DATA_PATH", "TRAIN_BATCH_TOKENS", "PREQUANT_ONLY"]
)
def test_an_arm_that_breaks_the_comparison_is_refused(place, name):
    code, records = run(place, BASE, ("odd", f"{name}=5"))
    assert f"arm odd sets {name}" in code and f"--allow {name}" in code and records == []


def test_allow_lets_it_pass(place):
    code, records = run(
        place,
        BASE,
        ("odd", "TRAIN_BATCH_TOKENS=5"),
        seeds="1",
        options=["--allow", "TRAIN_BATCH_TOKENS"],
    )
    assert (
        code == 0
        and records[1]["changed"]["TRAIN_BATCH_TOKENS"] == 5
        and records[1]["tokens_per_second"] == 50
    )


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        ([BASE, ("odd", "GAIN_RATE=1")], "arm odd: GAIN_RATE is not a setting"),
        ([BASE, ("odd", "GAIN=much")], "arm odd: could not convert string to float"),
        ([BASE, ("odd", "RUN_ID=x")], "arm odd sets RUN_ID: this script sets these itself"),
        ([BASE, ("odd", "GAIN")], "arm odd: 'GAIN' must be words such as NAME=value"),
        ([BASE, BASE], "arms need different names"),
        ([BASE, ("a/b", "")], "arm 'a/b': a name has"),
        ([BASE, ("odd@/nowhere", "")], "there is no train_gpt.py in /nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(place, arms, sentence):
    code, records = run(place, *arms)
    assert sentence in code and records == []


def test_words_of_set_are_checked(place):
    code, _ = run(place, BASE, options=["--set", "GAIN=1", "SPEED"])
    assert "--set: 'GAIN=1 SPEED' must be words such as NAME=value" in code


def test_seeds_and_data_are_checked(place):
    assert "a seed stands twice" in run(place, BASE, BETTER, seeds="1 1")[0]
    for path in (place / "data").glob("fineweb_train*"):
        path.unlink()
    assert "are not both there" in run(place, BASE, BETTER)[0]


def test_an_arm_keeps_its_recipe_in_a_campaign(place):
    _, records = run(place, BASE, BETTER, seeds="1")
    code, after = run(place, BASE, ("better", "GAIN=0.003"), seeds="2")
    assert "arm better has runs in this campaign with other changed" in code and after == records
    (place / "base" / "train_gpt.py").write_text(STUB + "\n# changed\n")
    code, after = run(place, BASE, BETTER, seeds="2")
    assert "arm base has runs in this campaign with other code" in code and after == records
    (place / "base" / "train_gpt.py").write_text(STUB)
    write_documents(place / "data", "train", [50, 61], seed=1)
    assert "with other data" in run(place, BASE, BETTER, seeds="2")[0]


def test_a_second_call_on_the_same_file_is_refused(place):
    with bench_recipe.locked(place / "c.jsonl"):
        assert "is in use by another call" in run(place, BASE, BETTER)[0]


def test_a_file_of_another_version_is_refused(place):
    (place / "c.jsonl").write_text('{"version": 99}\n')
    with pytest.raises(SystemExit, match="version 99, this script reads 1"):
        table(place)


DAMAGES = {
    "a field is missing": lambda record: record.pop("seed"),
    "a field is of another kind": lambda record: record.update(arm=5),
    "the kind is unknown": lambda record: record.update(kind="odd"),
    "no score": lambda record: record.update(scores={"prequant": {}}),
    "no number": lambda record: record.update(scores={"prequant": {"bpb": math.nan, "bytes": 7}}),
    "a number of steps that is none": lambda record: record.update(steps="many"),
    "a size that is none": lambda record: record.update(total_bytes=None),
    "a device without a name": lambda record: record.update(device=None),
    "a failure without its log": lambda record: record.update(status="failed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["table", "effects", "noise"])
def test_a_line_that_cannot_be_counted_is_named(place, damage, command):
    write_runs(place, "screen", {"base": [1.2, 1.3], "arm": [1.2, 1.3]})
    lines = (place / "c.jsonl").read_text().splitlines()
    record = json.loads(lines[2])
    DAMAGES[damage](record)
    lines[2] = json.dumps(record)
    (place / "c.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match=r"c\.jsonl, line 3: \w+ is missing or wrong; remove"):
        bench_recipe.main([command, str(place / "c.jsonl")])


@pytest.mark.parametrize("line", [b'{"version": 1, "kin', b'{"version": 1, "arm": "\xff"}', b"5"])
def test_a_line_that_is_no_record_is_passed_over_and_told(place, capsys, line):
    write_runs(place, "screen", {"base": [1.2], "arm": [1.1]})
    with (place / "c.jsonl").open("ab") as file:
        file.write(line)
    table(place)
    told = capsys.readouterr()
    assert "| arm | prequant | 1 |" in told.out and "c.jsonl, line 3: damaged" in told.err


# ---- statistics


def pairs(*values, **more):
    """(BPB of the arm, of the reference) of each seed -> pairs as pairs_of makes them."""
    sides = [
        [
            {"arm": name, "scores": {"prequant": {"bpb": bpb, "bytes": 1000}}, **more}
            for name, bpb in zip(("arm", "base"), value, strict=True)
        ]
        for value in values
    ]
    return dict(enumerate(map(tuple, sides)))


def test_the_verdict_equals_numbers_by_hand():
    # differences -0.001, -0.002, -0.003: mean -0.002, deviation 0.001, error 0.001 / sqrt(3), t = 2
    # sqrt(3).
    found = bench_recipe.compare(pairs((1.099, 1.1), (1.198, 1.2), (1.297, 1.3)), "prequant")
    assert (
        found.n == 3
        and found.mean == pytest.approx(1.198)
        and found.difference == pytest.approx(-0.002)
    )
    assert found.error == pytest.approx(0.001 / math.sqrt(3)) and found.t == pytest.approx(
        2 * math.sqrt(3)
    )
    # Student's t with 2 degrees of freedom: P(T > t) = 1/2 - t / (2 sqrt(2 + t^2)); t^2 = 12.
    assert found.p == pytest.approx(0.5 - math.sqrt(12) / (2 * math.sqrt(14)))
    assert found.verdict == "accept"


def three(mean, t):
    """Three differences with this mean gain and this t."""
    deviation = mean * math.sqrt(3) / t
    return pairs(*[(1 - mean + shift * deviation, 1.0) for shift in (-1, 0, 1)])


@pytest.mark.parametrize(
    ("mean", "t", "verdict"),
    [
        (0.002, 2.93, "accept"),
        (0.002, 2.91, "undecided"),  # the bound is 2.920
        # a sure gain, but 0.0005 is not excluded either
        (0.0006, 50, "accept"),
        (0.0004, 5, "undecided"),
        (0.0004, 50, "reject"),
        (-0.002, -5, "reject"),
        (-0.002, -0.5, "undecided"),
    ],
)
def test_accept_needs_both_a_sure_gain_and_a_large_one(mean, t, verdict):
    found = bench_recipe.compare(three(mean, t), "prequant")
    assert found.t == pytest.approx(t) and found.verdict == verdict


def test_too_few_pairs_are_undecided_and_equal_ones_rejected():
    single = bench_recipe.compare(pairs((1.0, 1.5)), "prequant")
    assert single.verdict == "undecided" and math.isnan(single.error) and math.isnan(single.p)
    assert bench_recipe.compare(pairs((1.0, 1.5), (1.0, 1.51)), "prequant").verdict == "undecided"
    exact = bench_recipe.compare(pairs(*[(1.0, 1.5)] * 3), "prequant")
    assert (exact.t, exact.p, exact.verdict) == (math.inf, 0.0, "accept")
    same = bench_recipe.compare(pairs(*[(1.5, 1.5)] * 3), "prequant")
    assert (same.p, same.verdict) == (1.0, "reject")


def test_different_text_is_not_compared():
    both = pairs((1.0, 1.1))
    both[0][1]["scores"]["prequant"]["bytes"] = 999
    with pytest.raises(
        ValueError, match="arm was scored on 1,000 bytes of text in prequant, base on 999"
    ):
        bench_recipe.compare(both, "prequant")


def test_deviations_are_pooled_over_repeats():
    # (1, 3) and (2, 4, 6): squares 2 and 8, degrees of freedom 1 and 2.
    assert bench_recipe.pooled_deviation([[1.0, 3.0], [2.0, 4.0, 6.0], [9.0]]) == (
        pytest.approx(math.sqrt(10 / 3)),
        3,
    )
    assert math.isnan(bench_recipe.pooled_deviation([[1.0], [2.0]])[0])


def test_the_interval_of_a_deviation_has_the_quantiles_of_chi_squared():
    # 4 degrees of freedom: 9.48773 at 0.95, 0.710723 at 0.05
    low, high = math.sqrt(4 / 9.48773), math.sqrt(4 / 0.710723)
    assert bench_recipe.interval(1.0, 4) == f"{low:.5f} to {high:.5f}"
    assert bench_recipe.interval(math.nan, 0) == "-"


# ---- tables


def write_runs(place, kind, values, arms=("base", "arm"), first_seed=1):
    """Records {arm: BPB of the first seed, the next, ...}, all in one go."""
    for arm in arms:
        for seed, bpb in enumerate(values[arm], first_seed):
            bench_recipe.append_record(
                place / "c.jsonl",
                {
                    "version": 1,
                    "kind": kind,
                    "arm": arm,
                    "seed": seed,
                    "go": "g",
                    "status": "ok",
                    "settings": {},
                    "commit": "abc",
                    "code": "123",
                    "steps": 1000,
                    "tokens_per_second": 900,
                    "epochs": 3.5,
                    "total_bytes": 100,
                    "violations": [],
                    "scores": {"prequant": {"bpb": bpb, "bytes": 7}},
                },
            )


def test_a_planted_difference_is_found_and_noise_is_not_accepted(place, capsys):
    noise = [0.0003, -0.0002, -0.0001]
    base = [1.15, 1.16, 1.17]
    write_runs(
        place,
        "screen",
        {
            "base": base,
            "arm": [b - 0.002 + n for b, n in zip(base, noise, strict=True)],
            "same": [b + n for b, n in zip(base, noise, strict=True)],
        },
        ("base", "arm", "same"),
    )
    table(place)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert (
        rows[1]
        == "| arm | prequant | 3 | 1.15800 | -0.00200 | 0.00015 | 13.09 | 0.0029 | 1.000 | 1.000 |"
        " +0 | 3.50 | accept |"
    )
    assert (
        rows[2].startswith("| same | prequant | 3 | 1.16000 | +0.00000 |")
        and "accept" not in rows[2]
    )


def test_the_table_of_a_final_shows_every_arm(place, capsys):
    run(place, ("old", ""), ("fast", "GAIN=0.003 SPEED=1.1"), kind="final", seeds="1 2 3")
    capsys.readouterr()
    table(place)
    told = capsys.readouterr().out
    rows = [line.split(" | ") for line in told.splitlines() if line.startswith("| fast")]
    assert [row[1] for row in rows] == ["prequant", "quantized", "ttt"]
    assert [row[-1] for row in rows] == ["- |", "- |", "accept |"]
    assert [row[4] for row in rows] == ["-0.00300"] * 3 and rows[0][8:10] == ["1.100", "1.100"]
    assert "final against old, on stub" in told and "fast: GAIN=0.003 SPEED=1.1; commit" in told
    assert (
        "accept: n at least 3, p < 0.05 (with n = 3 t beyond 2.92) and a gain of at least"
        " 0.0005 BPB" in told
    )
    table(place, "--against", "fast")
    assert "| old | ttt | 3 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--against nobody: final has the arms old, fast"):
        table(place, "--against", "nobody")


def test_an_arm_that_breaks_a_rule_is_not_accepted(place, capsys):
    write_runs(place, "final", {"base": [1.0, 1.1, 1.2], "arm": [0.9, 1.01, 1.1]})
    records = bench_recipe.read_campaign(place / "c.jsonl")
    records[-1]["violations"] = ["too many bytes"]
    (place / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    table(place)
    told = capsys.readouterr().out
    assert (
        "| undecided (breaks rules, see below) |" in told
        and "arm breaks a rule in 1 runs: too many bytes" in told
    )


def test_a_rule_that_both_runs_of_a_pair_break_is_no_fault_of_the_arm(place, capsys):
    write_runs(place, "final", {"base": [1.0, 1.1, 1.2], "arm": [0.9, 1.01, 1.1]})
    change_runs(place, lambda record: record.update(violations=["too slow"]))
    table(place)
    assert "| accept |" in capsys.readouterr().out


def change_runs(place, change):
    """Rewrites the campaign, with change(record) applied to each of its records."""
    records = bench_recipe.read_campaign(place / "c.jsonl")
    for record in records:
        change(record)
    (place / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def cells_of(place, capsys):
    """{(arm, stage): cells of its row}, and all that `table` printed."""
    capsys.readouterr()
    table(place)
    told = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("| ")]
    return {(row[0], row[1]): row for row in rows}, told


def test_the_last_stage_has_the_verdict_and_bytes_are_those_of_the_arm(place, capsys):
    """A gain before quantization that is a loss after it."""
    write_runs(place, "final", {"base": [1.0, 1.1, 1.2], "arm": [0.99, 1.09, 1.19]})

    def add_stage(record):
        loss = {"base": 0.0, "arm": 0.02}[record["arm"]]
        bpb = record["scores"]["prequant"]["bpb"] + loss + 0.0001 * record["seed"]
        record["scores"]["quantized"] = {"bpb": bpb, "bytes": 7}
        record["total_bytes"] = {"base": 1000, "arm": 3500}[record["arm"]]

    change_runs(place, add_stage)
    cells, _ = cells_of(place, capsys)
    assert cells["arm", "prequant"][4] == "-0.01000" and cells["arm", "prequant"][-1] == "-"
    assert cells["arm", "quantized"][4] == "+0.01000"
    assert cells["arm", "quantized"][-1] == "reject"
    assert cells["arm", "quantized"][10] == "+2,500"


def test_a_stage_that_a_run_lacks_is_not_compared(place, capsys):
    write_runs(place, "final", {"base": [1.0, 1.1, 1.2], "arm": [0.99, 1.09, 1.19]})

    def add_stage(record):
        if (record["arm"], record["seed"]) != ("base", 2):
            record["scores"]["ttt"] = {"bpb": 0.5, "bytes": 7}

    change_runs(place, add_stage)
    cells, _ = cells_of(place, capsys)
    assert cells.keys() == {("arm", "stage"), ("arm", "prequant")}  # the head, and one row


@pytest.mark.parametrize("command", ["table", "effects"])
def test_runs_without_a_stage_in_common_are_refused(place, capsys, command):
    write_runs(place, "final", {arm: [1.2, 1.3] for arm in ("base", "a+b")}, ("base", "a+b"))

    def move_score(record):
        if record["arm"] == "base":
            record["scores"] = {"ttt": record["scores"].pop("prequant")}

    change_runs(place, move_score)
    with pytest.raises(SystemExit, match="nothing to compare|no stage in which all runs have"):
        bench_recipe.main([command, str(place / "c.jsonl")])


@pytest.mark.parametrize("arms", [("base",), ("base", "arm")])
def test_a_campaign_without_a_pair_is_shown_and_refused(place, capsys, arms):
    for seed, arm in enumerate(arms):
        write_runs(place, "screen", {arm: [1.2]}, (arm,), first_seed=seed)
    with pytest.raises(SystemExit, match=r"c\.jsonl: nothing to compare"):
        table(place)
    assert f"without a partner in its go: {arms[-1]}, seed" in capsys.readouterr().out


def test_effects_of_combined_arms_are_separated(place, capsys):
    """Two factors with known effects; one of eight runs deviates."""
    gains = {"a": 0.004, "b": -0.001}
    arms = "base", "a", "b", "a+b"
    values = {}
    for name in arms:
        gain = sum(gains[factor] for factor in bench_recipe.factors_of(name))
        values[name] = [1.2 - gain, 1.3 - gain + (0.0008 if name == "base" else 0)]
    write_runs(place, "screen", values, arms)
    runs = bench_recipe.read_campaign(place / "c.jsonl")
    found = bench_recipe.estimate_effects(runs, [r["scores"]["prequant"]["bpb"] for r in runs])
    # the deviating run has a quarter of the weight in the mean without a factor
    assert found.differences == pytest.approx({"a": -0.0042, "b": 0.0008})
    # in a balanced design of 4 unknowns half of the square of one of 8 runs is left
    assert found.freedom == 4
    assert found.deviation == pytest.approx(0.0008 * math.sqrt(1 / 2 / 4))
    assert found.spreads["a"] == pytest.approx(math.sqrt(4 / 8))
    # the deviating run is one of four of seed 2, and these are off by 0.1 otherwise
    assert found.offsets == pytest.approx([-0.0501, 0.0501])
    bench_recipe.main(["effects", str(place / "c.jsonl")])
    # the error is 0.0002, t 21; Student's t with 4 degrees of freedom: P(T > t) =
    # 1/2 - 3/8 x (1 - x^2 / 12) with x = t / sqrt(1 + t^2 / 4)
    x = 21 / math.sqrt(1 + 21**2 / 4)
    p = 1 / 2 - 3 / 8 * x * (1 - x**2 / 12)
    row = f"| a | prequant | 4 of 8 | -0.00420 | 0.00020 | 21.00 | {p:.2g} | 1.000 |"
    assert row in capsys.readouterr().out


def test_an_effect_on_steps_is_with_over_without(place, capsys):
    values = {"base": [1.2, 1.3], "a": [1.2, 1.3], "b": [1.2, 1.3], "a+b": [1.2, 1.31]}
    write_runs(place, "screen", values, tuple(values))

    def slow_down(record):
        record["steps"] = 1000 if "a" in record["arm"].split("+") else 1250

    change_runs(place, slow_down)
    rows, _ = effects_table(place, capsys)
    assert [row[-1] for row in rows] == ["steps", "0.800", "1.000"]


# Plackett and Burman's design of 12 runs: the shifts of one row, and a run with everything off.
PB_ROW = [1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0]
PB_GAINS = {letter: 0.001 * (number - 4) for number, letter in enumerate("abcdefghijk")}


def plackett_burman(place, seed_of=lambda number: 1):
    """A campaign of 12 runs of 11 factors whose gains are PB_GAINS; all off is 1.2 BPB."""
    rows = [PB_ROW[shift:] + PB_ROW[:shift] for shift in range(11)]
    for number, row in enumerate([*rows, [0] * 11]):
        factors = [letter for letter, on in zip(PB_GAINS, row, strict=True) if on]
        bpb = 1.2 - sum(PB_GAINS[letter] for letter in factors)
        name = "+".join(factors) or "base"
        write_runs(place, "screen", {name: [bpb]}, (name,), first_seed=seed_of(number))


def effects_table(place, capsys, *options):
    """-> (rows of the table as lists of cells, everything that was printed)."""
    bench_recipe.main(["effects", str(place / "c.jsonl"), *options])
    told = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("| ")]
    return rows, told


def test_a_saturated_design_takes_a_known_deviation(place, capsys):
    plackett_burman(place)
    rows, told = effects_table(place, capsys, "--noise", "0.0016")
    assert rows[0][3:] == ["difference", "known error", "z", "p of z", "steps"]
    found = {row[0]: float(row[3]) for row in rows[1:]}
    assert found == pytest.approx({name: -gain for name, gain in PB_GAINS.items()})
    # six runs with and six without: 0.0016 sqrt(1/6 + 1/6); z of 0.006: 6.495
    assert {row[4] for row in rows[1:]} == {"0.00092"}
    assert {row[0]: row[5:7] for row in rows}["k"] == ["6.50", "4.1e-11"]
    assert "0 degrees of freedom; known error: a run deviates by 0.0016 BPB (--noise)" in told
    assert "nan" not in told


def test_a_saturated_design_without_a_known_deviation_is_refused(place):
    plackett_burman(place)
    with pytest.raises(SystemExit, match="12 runs for 12 unknowns leave no degrees of freedom"):
        bench_recipe.main(["effects", str(place / "c.jsonl")])


def test_a_design_spread_over_seeds_is_read_without_blocks(place, capsys):
    plackett_burman(place, seed_of=lambda number: number // 4)
    line = ["effects", str(place / "c.jsonl"), "--noise", "0.0016"]
    with pytest.raises(SystemExit, match="cannot separate 3 seeds and the factors .*blocks none"):
        bench_recipe.main(line)
    rows, told = effects_table(place, capsys, "--noise", "0.0016", "--blocks", "none")
    assert len(rows) == 12 and rows[1][:4] == ["a", "prequant", "6 of 12", "+0.00400"]
    assert "Seeds are left out (--blocks none)" in told


def test_errors_of_residuals_and_of_a_known_deviation_stand_side_by_side(place, capsys):
    values = {"base": [1.2, 1.3], "a": [1.19, 1.292], "b": [1.2, 1.3], "a+b": [1.19, 1.29]}
    write_runs(place, "screen", values, tuple(values))
    rows, told = effects_table(place, capsys, "--noise", "0.002")
    assert rows[0][4:10] == ["standard error", "t", "p", "known error", "z", "p of z"]
    assert rows[1][7] == "0.00141"  # 0.002 sqrt(1/4 + 1/4)
    assert rows[1][4] != rows[1][7] and "4 degrees of freedom" in told
    assert (
        "prequant: seeds 1, 2 (with the machine that each ran on) are off the mean by -0.05025,"
        " +0.05025\n" in told
    )
    rows, told = effects_table(place, capsys)
    assert rows[0][4:] == ["standard error", "t", "p", "steps"] and "these are few" in told


def test_every_stage_has_its_own_offsets_of_seeds(place, capsys):
    arms = "base", "a", "b", "a+b"
    write_runs(place, "final", {arm: [1.2, 1.3] for arm in arms}, arms)

    def add_stage(record):
        record["scores"]["ttt"] = {"bpb": 1.1 + 0.02 * record["seed"], "bytes": 7}

    change_runs(place, add_stage)
    _, told = effects_table(place, capsys, "--noise", "0.001")
    offsets = [line for line in told.splitlines() if "off the mean by" in line]
    assert [line.split(":")[0] for line in offsets] == ["prequant", "ttt"]
    assert offsets[0].endswith(" -0.05000, +0.05000") and offsets[1].endswith(" -0.01000, +0.01000")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": [1.2, 1.3], "a+b": [1.2, 1.3]}, "a and b: always on together"),
        ({"base": [1.2], "a": [1.2], "b": [1.2]}, "no arm turns on two factors; see `table`"),
        ({"a+b": [1.2, 1.3], "a": [1.2, 1.3]}, "a: on in every run"),
        ({"base": [1.2], "a+b": [1.2], "b+c": [1.2]}, "3 runs cannot separate the factors a, b, c"),
    ],
)
def test_campaigns_that_are_no_experiments_are_refused(place, values, message):
    write_runs(place, "screen", values, tuple(values))
    with pytest.raises(SystemExit, match=message) as refused:
        bench_recipe.main(["effects", str(place / "c.jsonl"), "--noise", "0.001"])
    assert "`effects` needs a designed experiment" in str(refused.value)


def test_effects_of_repeats_alone_are_refused(place):
    write_runs(place, "noise", {"base": [1.2, 1.3]}, ("base",))
    with pytest.raises(SystemExit, match="no finished runs of an experiment"):
        bench_recipe.main(["effects", str(place / "c.jsonl")])


def test_pairs_beside_an_experiment_do_not_hide_it(place, capsys):
    plackett_burman(place)
    write_runs(place, "final", {"base": [1.2], "a": [1.1]}, ("base", "a"))
    rows, told = effects_table(place, capsys, "--noise", "0.0016")
    assert len(rows) == 12 and "final: no arm turns on two factors" in told


def test_noise_is_told_for_repeats_and_for_seeds(place, capsys):
    for seed, bpb in ((1, 1.001), (1, 1.003), (2, 1.011), (3, 1.021)):
        write_runs(place, "noise", {"base": [bpb]}, ("base",))
        records = bench_recipe.read_campaign(place / "c.jsonl")
        records[-1]["seed"] = seed
        (place / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    bench_recipe.main(["noise", str(place / "c.jsonl")])
    told = capsys.readouterr().out
    # Repeats: sqrt(2) x 0.001 with one degree of freedom. First runs of seeds: 1.001, 1.011, 1.021.
    assert "| noise | base | prequant | 1.00900 | repeats of a seed | 1 | 0.00141 |" in told
    assert "| noise | base | prequant | 1.00900 | seeds | 2 | 0.01000 |" in told
    assert "| 0.00816 | 0.02384 |" in told  # 0.01 sqrt(2/3), and 2.92 times that
    assert "noise base: 4 runs in 1 goes, steps 1,000 to 1,000" in told
    with pytest.raises(SystemExit, match="runs of --kind noise only"):
        table(place)
    with pytest.raises(SystemExit, match=r"no runs there; name a campaign .*fused, noise"):
        bench_recipe.main(["table", str(place / "nothing.jsonl")])


def test_failed_runs_alone_have_no_noise(place):
    write_runs(place, "noise", {"base": [1.2]}, ("base",))
    change_runs(place, lambda record: record.update(status="failed", log=["out of memory"]))
    with pytest.raises(SystemExit, match=r"c\.jsonl: no finished run"):
        bench_recipe.main(["noise", str(place / "c.jsonl")])


# ---- data, and real runs


def test_the_standard_data_take_the_first_validation_documents(tmp_path):
    for name, count in (("train", 30), ("val", 20)):
        texts = [
            json.dumps({"text": f"Document {number} of {name}."}) + "\n" for number in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(texts))
    line = [
        "data",
        str(tmp_path / "out"),
        "--train",
        str(tmp_path / "train.jsonl"),
        "--val",
        str(tmp_path / "val.jsonl"),
        "--val-docs",
        "5",
        "--tokenizer",
        str(prepare_caseops_data.DEFAULT_TOKENIZER),
    ]
    bench_recipe.main(line)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (
        manifest["splits"]["val"]["documents"] == 5
        and manifest["splits"]["train"]["documents"] == 30
    )
    assert (tmp_path / "out" / "caseops_8192.model").exists()
    bench_recipe.main(line)  # they are there already


@IN_SOAK
def test_a_real_pair_runs_to_its_verdict(tiny_data, place, capsys):
    settings = {name.upper(): value for name, value in TINY.items() if name != "vocab_size"}
    settings |= {"ITERATIONS": 3, "GPTQ_RESERVE_SECONDS": 0, "OMP_NUM_THREADS": 1}
    line = words(
        place,
        ("base@" + str(bench_recipe.ROOT), ""),
        ("slow@" + str(bench_recipe.ROOT), "MATRIX_LR=0.001"),
        seeds="1",
        options=["--set", *(f"{name}={value}" for name, value in settings.items())],
    )
    line[line.index(str(place / "data"))] = str(tiny_data)
    with pytest.raises(SystemExit) as ended:
        bench_recipe.main(line)
    records = bench_recipe.read_campaign(place / "c.jsonl")
    assert ended.value.code == 0, records
    assert [(r["arm"], r["steps"], list(r["scores"])) for r in records] == [
        ("base", 3, ["prequant"]),
        ("slow", 3, ["prequant"]),
    ]
    assert (
        records[0]["scores"] != records[1]["scores"] and records[1]["changed"]["MATRIX_LR"] == 0.001
    )
    assert records[0]["code"] == records[1]["code"] and records[0]["epochs"] == pytest.approx(
        3 * 256 / records[0]["train_tokens"], abs=1e-3
    )
    table(place)
    assert "| slow | prequant | 1 |" in capsys.readouterr().out
