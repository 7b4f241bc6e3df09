"""From runs to a submission: real runs through the launcher, their table, tests, pictures, record,
and the hub.
"""

import fcntl
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import HERE, IN_SOAK, PATIENCE
from hub_server import Hub
from run_helpers import SETTINGS, make_data

pytest.importorskip("brotli")
pytest.importorskip("sentencepiece")
pytest.importorskip("python_minifier")
stats = pytest.importorskip("scipy.stats")

from tools import make_record, summarize  # noqa: E402
from tools.run_files import read_run, read_runs  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ["bytes.png", "stages.png", "training.png", "ttt.png"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(what `wait` printed, the set's folder): two seeds of a tiny model, side by side on the CPU,
    with pictures.

    Made once for all workers of pytest-xdist, which share the parent of their folders.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "launched"
    with open(shared / "launched.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "printed").exists():
            (folder / "data").mkdir(parents=True)
            (folder / "printed").write_text(launch_two_seeds(folder))
    return (folder / "printed").read_text(), folder / "runs" / "set"


def launch_two_seeds(folder):
    """Through run_3seeds.sh, into folder/runs/set -> what `wait` printed."""
    make_data(folder / "data")
    environ = (
        HERE
        | SETTINGS
        | {
            "DATA_PATH": str(folder / "data"),
            "RUNS_DIR": str(folder / "runs"),
            "USE_TMUX": "0",
            "VENV": str(Path(sys.executable).parents[1]),
            "VAL_LOSS_EVERY": "2",
        }
    )
    script, options = (
        ROOT / "run_3seeds.sh",
        {
            "cwd": folder,
            "capture_output": True,
            "text": True,
            "timeout": PATIENCE,
        },
    )
    started = subprocess.run(
        [script], env=environ | {"SEEDS": "7 3", "GPUS": "cpu cpu", "RUN_ID": "set"}, **options
    )
    assert started.returncode == 0, started.stderr
    ended = subprocess.run([script, "wait"], env=environ, **options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def runs(finished):
    return read_runs([finished[1]])


# ---- table


def test_launched_runs_are_summed_up_with_the_figures_of_their_results(finished):
    printed, folder = finished
    results = [
        json.loads((folder / f"set-seed{seed}" / "result.json").read_text()) for seed in (7, 3)
    ]
    rows = {
        line.split()[0]: line.split()[1:]
        for line in printed.splitlines()
        if line.startswith(("scores", "total"))
    }
    for stage in results[0]["scores"]:
        bpb = [result["scores"][stage]["bpb"] for result in results]
        shown = [float(text) for text in rows[f"scores.{stage}.bpb"]]
        assert shown == pytest.approx([*bpb, np.mean(bpb), np.std(bpb, ddof=1)], abs=1e-5)
    assert rows["total_bytes"][:2] == [f"{result['total_bytes']:,}" for result in results]


def test_every_field_of_result_stands_in_the_table(runs):
    text = "\n".join(summarize.table_lines([run.result for run in runs]))
    for name in summarize.flatten(runs[0].result):
        assert name in ("seed", "version") or re.search(
            rf"^{re.escape(name)}[: ]", text, re.MULTILINE
        ), name


# ---- the contest's rule; critical values of t are from printed tables: one-sided 0.01


def results_of(losses, tokens=1000, num_bytes=3000):
    """RESULTs of seeds 0, 1, ... with these losses."""
    score = {"tokens": tokens, "bytes": num_bytes}
    return [
        {"run": f"run{seed}", "seed": seed, "scores": {"ttt": score | {"loss": loss, "bpb": 1.0}}}
        for seed, loss in enumerate(losses)
    ]


def answer(results, **reference):
    """(lines, whether the rule is met) of a comparison; `against` takes RESULTs."""
    against = reference.pop("against", None)
    options = SimpleNamespace(
        **{
            "against": against and ["them"],
            "published": None,
            "published_std": None,
            "published_n": None,
            "stage": None,
        }
        | reference
    )
    with pytest.MonkeyPatch.context() as patch:
        runs = [SimpleNamespace(result=result) for result in against or []]
        patch.setattr(summarize, "read_runs", lambda paths: runs)
        return summarize.compare(results, options)


@pytest.mark.parametrize("factor, met", [(1.01, True), (0.99, False)])
def test_welch_decides_at_the_tabulated_critical_value(factor, met):
    spread = np.array([-0.001, 0.0, 0.001])
    gain = 0.005 + factor * 3.7469 * 0.001 * math.sqrt(2 / 3)  # t of 4 degrees of freedom
    lines, found = answer(results_of(2.3 + spread), against=results_of(2.3 + gain + spread))
    assert found is met and lines[-1].startswith(
        f"contest's rule, at least 0.005 nats better at p < 0.01: {'yes' if met else 'no'}"
    )
    bpb = (2.3 + gain) / math.log(2) * 1000 / 3000
    std = 0.001 / math.log(2) * 1000 / 3000
    assert (
        answer(results_of(2.3 + spread), published=bpb, published_std=std, published_n=3)[1] is met
    )


@pytest.mark.parametrize("factor, met", [(1.01, True), (0.99, False)])
def test_a_published_mean_alone_is_a_one_sample_test(factor, met):
    gain = 0.005 + factor * 6.9646 * 0.001 / math.sqrt(3)  # t of 2 degrees of freedom
    bpb = (2.3 + gain) / math.log(2) * 1000 / 3000
    assert answer(results_of([2.299, 2.3, 2.301]), published=bpb)[1] is met


@pytest.mark.parametrize("factor, below", [(1.01, True), (0.99, False)])
def test_the_paired_test_uses_common_seeds_only(factor, below):
    mine, differences = [2.3, 2.5, 2.1], np.array([-0.001, 0.0, 0.001])
    theirs = np.array(mine) + 0.005 + factor * 6.9646 * 0.001 / math.sqrt(3) + differences
    for sides in ((mine, [*theirs, 9.0]), ([*mine, 9.0], theirs)):
        samples = [summarize.sample(results_of(losses), "ttt", 1000, 3000) for losses in sides]
        assert (summarize.paired(*samples, 0.005) < 0.01) is below
        assert summarize.welch(*samples, 0.005) > 0.01


def test_an_improvement_below_the_rule_is_no_however_sure():
    losses = [2.3, 2.30001, 2.29999]
    lines, met = answer(results_of(losses), against=results_of(np.add(losses, 0.0049)))
    assert not met and ": no (p = " in lines[-1]
    assert float(re.search(r"nothing or less\s+(\S+)", "\n".join(lines))[1]) < 1e-6


def test_other_tokens_compare_by_bytes_and_another_text_is_refused():
    ours = summarize.sample(results_of([2.0], tokens=500), "ttt", 1000, 3000)
    assert ours.mean == 1.0
    with pytest.raises(ValueError, match="not scored on the same text"):
        summarize.sample(results_of([2.0], num_bytes=2999), "ttt", 1000, 3000)


def test_one_run_alone_shows_nothing():
    lines, met = answer(results_of([2.0]), against=results_of([3.0, 3.1]))
    assert not met and "no test is possible" in lines[-1]


@pytest.mark.parametrize(
    "reference",
    [
        {"published": 1.0, "published_std": 0.1},
        {"published": 1.0, "published_n": 3},
        {"published": 1.0, "published_std": 0.1, "published_n": 1},
        {"against": [], "published_std": 0.1, "published_n": 3},
    ],
)
def test_half_a_reference_is_refused(reference):
    with pytest.raises(ValueError, match="go together"):
        answer(results_of([2.0, 2.1]), **reference)


# ---- pictures


def test_pictures_are_drawn_after_each_run_and_over_the_seeds(finished):
    for folder in (finished[1], *finished[1].glob("set-seed*")):
        assert sorted(path.name for path in folder.glob("*.png")) == PICTURES
        for path in folder.glob("*.png"):
            width, height = (
                int.from_bytes(path.read_bytes()[at : at + 4], "big") for at in (16, 20)
            )
            assert width > 900 and height > 300


def test_what_the_pictures_show_is_what_the_log_and_the_file_say(runs):
    from tools import plot_run

    run = runs[0]
    assert [row["step"] for row in run.steps] == [1, 2, 3, 4] and len(run.evaluations) == 2
    assert run.switches[0]["looping"] == 1
    budget = {heading: dict(stages) for heading, _, stages in plot_run.budgets(run)}
    seconds = run.result["seconds"]
    assert set(budget["evaluation budget"]) == {"unpack", "eval_ttt"}
    assert sum(map(sum, (part.values() for part in budget.values()))) == pytest.approx(
        sum(seconds.values()) - seconds["train"] + run.result["training_seconds"]
    )
    raw, stored = plot_run.bytes_by_group(run.folder / "artifact.bin")
    assert sum(stored.values()) == run.result["artifact_bytes"] and raw["embedding"] == 8192 * 32
    told = (run.folder / "log.txt").read_text().count("\nttt_batch ")
    assert sum("running_bpb" in row for row in run.ttt) == told >= 3 and {"adapted": 5.0} in run.ttt


def test_a_run_that_has_not_ended_is_refused(runs, tmp_path):
    text = (runs[0].folder / "log.txt").read_text()
    (tmp_path / "log.txt").write_text(text[: text.index("RESULT")])
    with pytest.raises(ValueError, match="has not ended"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="neither a run nor a set"):
        read_runs([tmp_path / "nothing"])


# ---- records


def legal(run, **changes):
    """The run as if it had kept every rule, but for the changes to its RESULT."""
    return run._replace(
        result=run.result
        | {"world_size": 8, "device": "NVIDIA H100 80GB HBM3", "commit": "abc1234"}
        | changes
    )


@pytest.fixture
def kept(monkeypatch, runs):
    """Three runs that break no rule."""
    monkeypatch.setattr(make_record, "validation_documents", lambda run: 50_000)
    runs = [*(legal(run) for run in runs), legal(runs[0], seed=1)]
    assert list(make_record.broken_rules(runs)) == []
    return runs


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"world_size": 4}, "ran on 4 x"),
        ({"device": "NVIDIA A100"}, "not on 8 x H100"),
        ({"commit": "abc+"}, "clean"),
        ({"commit": None}, "clean"),
        ({"total_bytes": 5}, "RESULT says 5"),
        ({"training_seconds": 600.5}, "training, Hessians and GPTQ took 60"),
        ({"training_seconds": math.nan}, "took nan"),
    ],
)
def test_each_rule_of_a_run_is_checked(kept, changes, words):
    (sentence,) = make_record.broken_rules(
        [*kept[:2], kept[2]._replace(result=kept[2].result | changes)]
    )
    assert sentence.startswith("seed 1: ") and words in sentence


@pytest.mark.parametrize("name", ["unpack", "eval_ttt", "hessians", "quantize", "quant_check"])
def test_the_600_seconds_hold_whatever_budget_was_set(kept, name):
    late = kept[2].result | {"seconds": kept[2].result["seconds"] | {name: 600.0}}
    (sentence,) = make_record.broken_rules([*kept[:2], kept[2]._replace(result=late)])
    assert "of 600" in sentence


def test_seeds_counts_and_partial_scores_are_checked(kept, monkeypatch):
    assert list(make_record.broken_rules(kept[:2])) == ["2 seed(s); a record needs 3"]
    score = kept[2].result["scores"]["ttt"]
    other = kept[2].result | {
        "scores": kept[2].result["scores"] | {"ttt": score | {"tokens": 1, "partial": True}}
    }
    sentences = list(make_record.broken_rules([*kept[:2], kept[2]._replace(result=other)]))
    assert (
        len(sentences) == 2 and "tokens and bytes" in sentences[0] and "only part" in sentences[1]
    )
    monkeypatch.setattr(make_record, "BYTE_CAP", 1000)
    assert all("the cap is 1,000" in sentence for sentence in make_record.broken_rules(kept))
    monkeypatch.setattr(make_record, "validation_documents", lambda run: 10)
    assert any("10 validation documents" in sentence for sentence in make_record.broken_rules(kept))


def test_runs_of_another_method_are_refused(runs, tmp_path):
    first, second = runs
    assert list(make_record.disagreements(runs)) == []
    changed = second._replace(
        settings=second.settings | {"MATRIX_LR": "0.5"}, changed=(*second.changed, "MATRIX_LR")
    )
    assert "MATRIX_LR is 0.5" in next(make_record.disagreements([first, changed]))
    assert "a seed stands twice" in list(make_record.disagreements([first, first]))
    assert "2 runs stand in one log" in next(
        make_record.disagreements([first, second._replace(parts=2)])
    )
    shutil.copytree(second.folder, tmp_path / "copy")
    (tmp_path / "copy" / "train_gpt.py").write_bytes(b"pass")
    other = second._replace(folder=tmp_path / "copy")
    assert "packed scripts differ" in next(make_record.disagreements([first, other]))
    (tmp_path / "copy" / "artifact.bin").unlink()
    assert "artifact.bin is missing" in next(make_record.disagreements([first, other]))


def test_what_the_runs_found_themselves_is_kept_apart_from_broken_rules(kept):
    gap, leak = (
        "quantization adds 0.5 nats per token on held-out rows",
        "3 training documents are validation documents",
    )
    known = [
        "16000001 bytes of code and weights, 1 above",
        "unpacking and the final evaluation took 601.0 s of 600.0",
        "test-time training scored part of the validation documents (TTT_MAX_DOCS)",
    ]
    for run, violations in zip(kept, ([gap, *known], [gap, leak], []), strict=True):
        run.result["violations"] = violations
    seeds = [run.seed for run in kept]
    assert make_record.remarks(kept) == [
        f"seed {seeds[0]}, {seeds[1]}: {gap}",
        f"seed {seeds[1]}: {leak}",
    ]
    assert list(make_record.broken_rules(kept)) == []


def test_the_gap_of_each_seed_stands_in_the_records_table(kept):
    gaps = [run.result["quant_check"]["gap"] for run in kept]
    head, _, *rows = make_record.results_table(kept)
    assert head.endswith("| quantization gap, nats |")
    assert [row.split("|")[-2].strip() for row in rows[:3]] == [f"{gap:.5f}" for gap in gaps]
    kept[1].result["quant_check"] = None
    assert "quantization gap" not in make_record.results_table(kept)[0]


def test_a_score_that_is_not_finite_makes_no_record_of_any_kind(kept):
    scores = kept[2].result["scores"]
    other = kept[2].result | {"scores": scores | {"ttt": scores["ttt"] | {"loss": math.nan}}}
    assert f"{kept[2].folder}: a score is not finite" in make_record.disagreements(
        [*kept[:2], kept[2]._replace(result=other)]
    )


@pytest.mark.parametrize("text", ["", "parameters:5 slots:[0]"])
def test_a_log_without_the_line_about_the_data_is_refused(runs, tmp_path, text):
    (tmp_path / "log.txt").write_text(text)
    for name in ("documents", "tokenizer"):
        with pytest.raises(make_record.RecordError, match=f"does not say {name}"):
            make_record.log_word(runs[0]._replace(folder=tmp_path), name)


def test_a_record_has_an_author_and_git_is_not_needed_to_name_one(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no git there
    words = [str(finished[1]), "--name", "x", "--records", str(tmp_path)]
    with pytest.raises(SystemExit, match="--author is empty"):
        make_record.main(words)
    with pytest.raises(SystemExit, match="a record needs 3"):
        make_record.main([*words, "--author", "A"])


@pytest.fixture(scope="module")
def record(finished, tmp_path_factory):
    """A record folder of the launched runs, made as non-record and proved."""
    folder = tmp_path_factory.mktemp("records")
    options = make_record.parse_arguments(
        [
            str(finished[1]),
            "--name",
            "Tiny: two seeds!",
            "--records",
            str(folder),
            "--author",
            "A. Person",
            "--date",
            "2026-01-31",
            "--non-record",
        ]
    )
    return make_record.make_record(options)


def test_rules_refuse_a_record_unless_it_is_marked(finished, tmp_path):
    with pytest.raises(SystemExit) as refused:
        make_record.main(
            [str(finished[1]), "--name", "x", "--author", "A", "--records", str(tmp_path)]
        )
    assert "a record needs 3" in refused.value.code and "not on 8 x H100" in refused.value.code
    assert list(tmp_path.iterdir()) == []


def test_the_record_holds_everything_and_says_that_it_is_none(record, runs):
    assert (
        record.parent.name == "track_non_record_16mb" and record.name == "2026-01-31_Tiny_two_seeds"
    )
    assert [path.name for path in record.parent.iterdir()] == [record.name]
    names = {path.relative_to(record).as_posix() for path in record.rglob("*") if path.is_file()}
    wanted = {
        "README.md",
        "submission.json",
        "settings.env",
        "train_gpt.py",
        "source/train_gpt.py",
        "train_seed7.log",
        "train_seed3.log",
        "requirements.txt",
        "prepare_caseops_data.py",
        "lossless_caps.py",
        "tokenizers/caseops_8192.model",
        *PICTURES,
    }
    assert wanted <= names
    assert (record / "train_gpt.py").read_bytes() == (runs[0].folder / "train_gpt.py").read_bytes()
    assert (record / "source" / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    about = json.loads((record / "submission.json").read_text())
    scores = [run.result["scores"]["ttt"] for run in runs]
    assert about["val_bpb"] == pytest.approx(np.mean([score["bpb"] for score in scores]), abs=1e-8)
    assert about["val_loss_std"] == pytest.approx(
        np.std([score["loss"] for score in scores], ddof=1), abs=1e-8
    )
    assert (about["author"], about["record"], about["seeds"]) == ("A. Person", False, [3, 7])
    assert about["bytes_total"] == max(run.result["total_bytes"] for run in runs)
    text = (record / "README.md").read_text()
    assert (
        "**Not a record.**" in text and "MODEL_DIM=32" in text and f"{scores[0]['bpb']:.5f}" in text
    )
    assert all(
        f"`{name}`" in text for name in names if name.endswith((".py", ".log", ".json", ".env"))
    )
    assert all(f"### {section}" in text for section in ("Data", "Model", "Training", "Evaluation"))


@pytest.mark.parametrize(
    ("at", "words"), [("0.4", "{TRAIN_SEQ_LEN} tokens, at half as many"), ("0.0", "_LEN} tokens")]
)
def test_a_record_tells_in_one_sentence_where_documents_are_cut(at, words):
    sentences = list(make_record.training_sentences({"FULL_SEQ_LEN_AT": at}))
    (rows,) = [sentence for sentence in sentences if "documents cut at" in sentence]
    assert words in rows and ("half" in rows) == (at != "0.0")
    assert not any("half as many" in sentence for sentence in sentences if sentence != rows)


@pytest.fixture
def provable(tmp_path):
    """A folder with all that the proof needs but the packed script."""
    for name in ("prepare_caseops_data.py", "lossless_caps.py", "tokenizers/caseops_8192.model"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "source").mkdir()
    shutil.copyfile(ROOT / "train_gpt.py", tmp_path / "source" / "train_gpt.py")
    return tmp_path


def test_the_proof_finds_a_script_that_does_not_run(provable):
    (provable / "train_gpt.py").write_text("raise SystemExit('broken on purpose')")
    with pytest.raises(make_record.RecordError, match="broken on purpose"):
        make_record.prove(provable, {})


def test_the_proof_of_runs_with_training_states_asks_the_packed_script_for_none(provable):
    (provable / "train_gpt.py").write_text(
        "import os\n"
        "names = 'CHECKPOINT_EVERY', 'RESUME', 'ROPE_BASE'\n"
        "raise SystemExit(f'has {[name for name in names if name in os.environ]}')"
    )
    settings = {"CHECKPOINT_EVERY": "200", "RESUME": "1", "ROPE_BASE": "9000"}
    with pytest.raises(make_record.RecordError, match=r"has \['ROPE_BASE'\]"):
        make_record.prove(provable, settings)


def test_a_packed_script_without_its_source_is_refused(monkeypatch):
    tried = []
    monkeypatch.setattr(
        make_record, "pack_code", lambda source, settings: tried.append(source) or b"another"
    )
    with pytest.raises(make_record.RecordError, match="check out the source"):
        make_record.readable_source(b"something else", "HEAD+", {})
    # this one and the commit's
    assert len(tried) == 2 and all("Train, quantize, pack" in source for source in tried)


# ---- the hub

TOKEN = "hf_aVerySecretToken"


@pytest.fixture
def publish():
    """publish(words, token) -> the finished tools/publish.py, talking to a hub on localhost.

    `.hub` is that hub.
    """
    hub = Hub(TOKEN)
    environ = HERE | {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def call(*words, token=None):
        command = [sys.executable, str(ROOT / "tools" / "publish.py"), *map(str, words)]
        done = subprocess.run(
            command,
            env=environ | ({"HF_TOKEN": token} if token else {}),
            text=True,
            capture_output=True,
            timeout=PATIENCE,
        )
        assert TOKEN not in done.stdout + done.stderr
        return done

    call.hub, call.environ = hub, environ
    yield call
    hub.shutdown()


def test_a_run_goes_to_the_hub_and_comes_back(publish, runs, tmp_path):
    folder = runs[0].folder
    sent = publish("upload", folder, "--repo", "me/golf", token=TOKEN)
    assert sent.returncode == 0, sent.stderr
    there = publish.hub.files["me/golf"]
    assert publish.hub.private == {"me/golf"}
    assert {
        f"{folder.name}/{name}" for name in ("model.pt", "artifact.bin", "log.txt", "result.json")
    } <= set(there)
    assert not any(name.endswith(("exit_code", "stderr.txt")) for name in there)
    got = publish("fetch", folder.name, "--repo", "me/golf", "--runs-dir", tmp_path, token=TOKEN)
    assert got.returncode == 0, got.stderr
    for name, data in there.items():
        assert (tmp_path / name).read_bytes() == data == (folder.parent / name).read_bytes()
    assert f"QUANT_ONLY=1 CHECKPOINT_PATH={tmp_path}/{folder.name}/model.pt" in got.stdout
    assert f"TTT_EVAL_ONLY=1 ARTIFACT_PATH={tmp_path}/{folder.name}/artifact.bin" in got.stdout
    assert "MODEL_DIM=32" in got.stdout and [path.name for path in tmp_path.iterdir()] == [
        folder.name
    ]
    again = publish("fetch", folder.name, "--repo", "me/golf", "--runs-dir", tmp_path, token=TOKEN)
    assert again.returncode == 1 and "exists" in again.stderr


def test_without_the_right_token_nothing_is_uploaded(publish, runs):
    missing = publish("upload", runs[0].folder, "--repo", "me/golf")
    assert (
        missing.returncode == 1
        and "HF_TOKEN is not set" in missing.stderr
        and publish.hub.requests == []
    )
    wrong = publish("upload", runs[0].folder, "--repo", "me/golf", token="hf_wrong")
    assert wrong.returncode == 1 and "401" in wrong.stderr and "hf_wrong" not in wrong.stderr
    assert publish.hub.files == {}


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"ALL_PROXY": "socks5://me:secret@localhost:1"}, "ALL_PROXY names a SOCKS proxy"),
        (
            {"https_proxy": "SOCKS5H://localhost:1", "http_proxy": "socks5://localhost:1"},
            "https_proxy names a SOCKS proxy",
        ),
        pytest.param(
            {"HTTP_PROXY": "http://localhost:1"}, "through the proxy of HTTP_PROXY: ", marks=IN_SOAK
        ),
        ({"HTTP_PROXY": "http://localhost:x"}, "through the proxy of HTTP_PROXY: Invalid port"),
        ({"HF_ENDPOINT": "localhost"}, "localhost cannot be reached: "),
    ],
)
def test_a_hub_that_cannot_be_reached_is_told_in_one_line(publish, tmp_path, variables, words):
    if "SOCKS" in words and importlib.util.find_spec("socksio"):
        pytest.skip("socksio is installed")
    publish.environ.update(variables)
    if "HF_ENDPOINT" not in variables:
        publish.environ["HF_ENDPOINT"] = "http://hub.invalid"  # proxies are not asked for localhost
    got = publish("fetch", "a", "--repo", "me/golf", "--runs-dir", tmp_path, token=TOKEN)
    assert got.returncode == 1 and words in got.stderr, got.stderr
    *retries, told = got.stderr.splitlines()  # the library tells of each time that it tries again
    assert (
        told.startswith("publish.py: ")
        and "Traceback" not in got.stderr
        and "secret" not in got.stderr
    )
    assert ("pip install socksio, or unset" in got.stderr) == ("SOCKS" in words)


def test_a_damaged_file_from_the_hub_is_refused(publish, runs, tmp_path):
    name = runs[0].folder.name
    publish.hub.files["me/golf"] = {
        f"{name}/{file}": (runs[0].folder / file).read_bytes()
        for file in ("log.txt", "artifact.bin")
    }
    publish.hub.files["me/golf"][f"{name}/artifact.bin"] += b"x"
    got = publish("fetch", name, "--repo", "me/golf", "--runs-dir", tmp_path)
    assert (
        got.returncode == 1 and "its RESULT says" in got.stderr and list(tmp_path.iterdir()) == []
    )
