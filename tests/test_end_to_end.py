"""The script as a user runs it: whole runs in processes of their own, the packed script, two ranks,
clear refusals.
"""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import write_shard
from run_helpers import ROOT, SETTINGS, QuietGuard, finish, make_data, result_of, start, torchrun

import train_gpt

pytest.importorskip("brotli")
pytest.importorskip("sentencepiece")
pytest.importorskip("python_minifier")
torch.set_num_threads(1)

STAGES = ["prequant", "quantized", "ttt"]
DRIVER = """
import hashlib, os, sys
sys.path.insert(0, {root!r})
import train_gpt

def note(model, moment):
    data = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    with open({folder!r} + "/rank" + os.environ["RANK"], "a") as file:
        print(moment, hashlib.sha256(data).hexdigest(), file=file)

rebuild, evaluate = train_gpt.rebuild_model, train_gpt.TestTimeTrainer.evaluate

def noted_rebuild(model, path, dist):
    rebuild(model, path, dist)
    note(model, "rebuilt")

def noted_evaluate(trainer):
    score = evaluate(trainer)
    note(trainer.model, "adapted")
    return score

train_gpt.rebuild_model, train_gpt.TestTimeTrainer.evaluate = noted_rebuild, noted_evaluate
train_gpt.main()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Every run of this file, made once: RESULT dictionaries by name, the folder, the counts of
    the validation set.
    """
    folder = tmp_path_factory.mktemp("world")
    (folder / "data").mkdir()
    counts = make_data(folder / "data")
    common = {"DATA_PATH": str(folder / "data"), "RUNS_DIR": str(folder / "runs"), "PLOTS": "0"}
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT), folder=str(folder)))
    base = folder / "runs" / "base"

    def together(**processes):
        with ThreadPoolExecutor(len(processes)) as pool:
            return dict(zip(processes, pool.map(result_of, processes.values()), strict=True))

    found = together(
        base=start(ROOT / "train_gpt.py", RUN_ID="base", **common | {"PLOTS": "1"}),
        two=torchrun(2, folder / "driver.py", RUN_ID="two", **common),
    )
    checkpoint, artifact = str(base / "model.pt"), str(base / "artifact.bin")
    packed = start(base / "train_gpt.py", RUN_ID="packed", **common)
    # the other modes share this process and the code packed above
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_gpt,
            "write_code",
            lambda folder, *_: (folder / "train_gpt.py").write_bytes(
                (base / "train_gpt.py").read_bytes()
            ),
        )
        for name, more in {
            "quant": {"QUANT_ONLY": "1", "CHECKPOINT_PATH": checkpoint},
            "prequant": {"PREQUANT_ONLY": "1"},
            "ttt": {"TTT_EVAL_ONLY": "1", "ARTIFACT_PATH": artifact},
        }.items():
            hp = train_gpt.Hyperparameters.from_env(SETTINGS | common | more | {"RUN_ID": name})
            (watching := QuietGuard()).start(dist := train_gpt.Dist("cpu"))
            found[name] = json.loads(json.dumps(train_gpt.run(hp, dist, watching)))
    found["packed"] = result_of(packed)
    return {"results": found, "folder": folder, "counts": counts}


@pytest.fixture(scope="module")
def results(world):
    return world["results"]


@pytest.fixture(scope="module")
def runs(world):
    return world["folder"] / "runs"


# ---- a whole run


def test_a_run_of_a_checkout_ends_with_its_pictures(runs):
    assert {path.stem for path in (runs / "base").glob("*.png")} >= {
        "training",
        "stages",
        "ttt",
        "bytes",
    }
    assert not list((runs / "packed").glob("*.png"))  # the packed script alone draws nothing


KEYS = {
    "version",
    "device",
    "world_size",
    "torch",
    "python",
    "commit",
    "seed",
    "run",
    "attention",
    "mlp",
    "cross_entropy",
    "qkv_heads",
    "gated_xsa",
    "adamw_rows",
    "trellis_round",
    "enter",
    "steps",
    "train_loss",
    "training_seconds",
    "tokens_per_second_by_loop_state",
    "graphs_compiled",
    "group_bytes",
    "scores",
    "artifact_bytes",
    "code_bytes",
    "total_bytes",
    "seconds",
    "violations",
    "quant_check",
}


def test_result_has_the_documented_keys(results):
    result = results["base"]
    assert set(result) == KEYS
    assert (result["version"], result["world_size"], result["seed"], result["run"]) == (
        2,
        1,
        42,
        "base",
    )
    assert list(result["scores"]) == STAGES and result["steps"] == 4 and result["violations"] == []
    document = ROOT / "docs" / "RESULT.md"
    if document.exists():
        text = document.read_text(encoding="utf-8")
        assert [key for key in KEYS if f"`{key}`" not in text and f'"{key}"' not in text] == []


def test_every_stage_counts_the_whole_validation_set(results, world):
    for result in results.values():
        for score in result["scores"].values():
            assert (score["tokens"], score["bytes"]) == world["counts"]
            assert score["bpb"] == pytest.approx(
                score["loss"] / np.log(2) * score["tokens"] / score["bytes"]
            )
    assert (
        results["base"]["scores"]["ttt"]["documents"],
        results["base"]["scores"]["ttt"]["partial"],
    ) == (10, False)


def test_training_learns_and_quantization_keeps_what_was_learnt(results):
    scores = results["base"]["scores"]
    assert scores["prequant"]["loss"] < np.log(8192) - 0.01
    assert 0 < abs(scores["quantized"]["loss"] - scores["prequant"]["loss"]) < 0.05
    assert 0 < abs(scores["ttt"]["loss"] - scores["quantized"]["loss"]) < 0.1


def test_counted_bytes_are_the_files_on_disk(results, runs):
    for name in ("base", "two", "packed", "quant"):
        result = results[name]
        assert result["artifact_bytes"] == (runs / name / "artifact.bin").stat().st_size > 0
        assert result["code_bytes"] == (runs / name / "train_gpt.py").stat().st_size > 0
        assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"]


def test_losses_of_every_step_are_kept(results, runs):
    """Two ranks keep their mean; the packed script has no guard, which writes them."""
    for name in ("base", "two"):
        losses = np.load(runs / name / "losses.npy")
        assert len(losses) == results[name]["steps"]
        assert losses[-20:].mean() == pytest.approx(results[name]["train_loss"], rel=1e-6)
    assert not (runs / "packed" / "losses.npy").exists()


def test_result_json_equals_the_result_line(results, runs):
    for name, result in results.items():
        assert json.loads((runs / name / "result.json").read_text()) == result


def test_the_log_holds_settings_stages_and_result(results, runs):
    log = (runs / "base" / "log.txt").read_text()
    assert "* MODEL_DIM=32" in log and "  SEED=42" in log
    assert log.splitlines()[-1] == "RESULT " + json.dumps(results["base"])
    for stage in (
        "warm_up",
        "train",
        "hessians",
        "quantize",
        "pack",
        "eval_prequant",
        "unpack",
        "eval_quantized",
        "eval_ttt",
    ):
        assert f"stage:{stage} seconds:" in log and stage in results["base"]["seconds"]
    assert (
        re.search(r"^step:4 train_loss:\d", log, re.MULTILINE)
        and "looping:1" in log
        and "looping:0" in log
    )


def test_no_temporary_files_are_left(results, runs):
    for name in results:
        files = {path.name for path in (runs / name).iterdir() if path.suffix != ".png"}
        known = {"log.txt", "model.pt", "losses.npy", "artifact.bin", "train_gpt.py", "result.json"}
        assert files <= known, name


# ---- the packed script


def test_the_packed_script_gives_the_same_scores_and_bytes(results, runs):
    base, packed = results["base"], results["packed"]
    assert packed["scores"] == base["scores"]
    assert (packed["artifact_bytes"], packed["code_bytes"]) == (
        base["artifact_bytes"],
        base["code_bytes"],
    )
    assert (runs / "packed" / "artifact.bin").read_bytes() == (
        runs / "base" / "artifact.bin"
    ).read_bytes()
    assert (runs / "packed" / "train_gpt.py").read_bytes() == (
        runs / "base" / "train_gpt.py"
    ).read_bytes()
    assert packed["code_bytes"] < (ROOT / "train_gpt.py").stat().st_size / 3


# ---- two ranks


def test_two_ranks_give_the_scores_of_one(results):
    base, two = results["base"], results["two"]
    assert two["world_size"] == 2
    assert two["train_loss"] == pytest.approx(base["train_loss"], abs=2e-4)
    for stage in STAGES:
        assert two["scores"][stage]["loss"] == pytest.approx(
            base["scores"][stage]["loss"], rel=5e-4
        ), stage
    assert two["artifact_bytes"] == pytest.approx(base["artifact_bytes"], rel=0.01)


def test_both_ranks_rebuild_and_adapt_the_same_bits(world, results):
    notes = [(world["folder"] / f"rank{rank}").read_text().splitlines() for rank in range(2)]
    assert notes[0] == notes[1]
    assert [line.split()[0] for line in notes[0]] == ["rebuilt", "adapted"]
    assert notes[0][0].split()[1] != notes[0][1].split()[1]  # adaptation did change the weights


# ---- going on from a file


def test_quant_only_goes_on_from_the_checkpoint(results, runs):
    base, quant = results["base"], results["quant"]
    assert quant["scores"] == base["scores"] and "steps" not in quant
    assert (runs / "quant" / "artifact.bin").read_bytes() == (
        runs / "base" / "artifact.bin"
    ).read_bytes()
    assert not (runs / "quant" / "model.pt").exists()


def test_ttt_eval_only_goes_on_from_the_artifact(results, runs):
    base, ttt = results["base"], results["ttt"]
    assert ttt["scores"] == {stage: base["scores"][stage] for stage in STAGES[1:]}
    assert ttt["artifact_bytes"] == base["artifact_bytes"] and "train" not in ttt["seconds"]


def test_prequant_only_stops_after_the_fp32_model(results, runs):
    base, prequant = results["base"], results["prequant"]
    assert prequant["scores"] == {"prequant": base["scores"]["prequant"]}
    assert prequant["artifact_bytes"] == 0 and not (runs / "prequant" / "artifact.bin").exists()
    assert (runs / "prequant" / "model.pt").exists()


# ---- refusals: one clear line, exit code 1, nothing trained


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """refuse(damage, NAME=value, ...) -> the error line of a run on data that `damage(folder)`
    has spoilt.
    """
    data = tmp_path / "data"
    data.mkdir()
    make_data(data)

    def attempt(damage=lambda folder: None, **settings):
        damage(data)
        runs = {"DATA_PATH": str(data), "RUNS_DIR": str(tmp_path / "runs")}
        for name, value in (SETTINGS | runs | settings).items():
            monkeypatch.setenv(name, value)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
        # seconds of packing, tested above
        monkeypatch.setattr(train_gpt, "write_code", lambda *_: 1000)
        monkeypatch.setattr(train_gpt, "find_guard", QuietGuard)
        with pytest.raises(SystemExit) as end:
            train_gpt.main()
        message = end.value.code  # a text: Python prints it to standard error and exits with 1
        assert isinstance(message, str) and message.startswith("train_gpt.py cannot run: ")
        assert all(len(line) < 500 for line in message.splitlines())  # one for each problem
        assert not re.search("^step:", capsys.readouterr().out, re.MULTILINE)
        assert not list(tmp_path.glob("runs/*/model.pt")) and not list(
            tmp_path.glob("runs/*/result.json")
        )
        return message

    return attempt


def header(position, value, name="fineweb_val_000000.bin"):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[4 * position : 4 * position + 4] = int(value).to_bytes(4, "little")
        (folder / name).write_bytes(data)

    return damage


def remove(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-2])


def side_car_of_another_length(folder):
    path = folder / "fineweb_val_bytes_000000.bin"
    write_shard(path, train_gpt.load_data_shard(path)[:-1].copy())


def without_first_bos(folder):
    for name in ("fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"):
        write_shard(folder / name, train_gpt.load_data_shard(folder / name)[1:].copy())


def foreign_token(folder):
    tokens = train_gpt.load_data_shard(folder / "fineweb_train_000000.bin").copy()
    tokens[5] = 9000
    write_shard(folder / "fineweb_train_000000.bin", tokens)


@pytest.mark.parametrize(
    "damage, words",
    [
        (remove("fineweb_train_*"), "no fineweb_train_"),
        (remove("fineweb_val_0*"), "no fineweb_val_"),
        (header(0, 20240521), "magic"),
        (header(1, 2), "[20240520, 2, "),
        (header(2, 149), "are not [20240520, 1, "),
        (cut("fineweb_val_000000.bin"), "or torn"),
        (cut("fineweb_val_bytes_000001.bin"), "or torn"),
        (header(0, 7, "fineweb_train_000000.bin"), "magic"),
        (header(0, 7, "fineweb_val_bytes_000001.bin"), "magic"),
        (lambda folder: (folder / "fineweb_val_000000.bin").write_bytes(b""), "magic"),
        (side_car_of_another_length, "side-car lengths"),
        (remove("fineweb_val_bytes_*"), "val_bytes"),
        (remove("fineweb_val_bytes_000001*"), "side-car lengths"),
        (without_first_bos, "must start with BOS"),
        (foreign_token, "fineweb_train_000000.bin: token 9000"),
    ],
    ids=[
        "no train",
        "no val",
        "magic",
        "version",
        "size",
        "cut",
        "cut side-car",
        "train magic",
        "side-car magic",
        "empty file",
        "side-car length",
        "no side-car",
        "half a side-car",
        "no BOS first",
        "foreign token",
    ],
)
def test_unusable_data_is_refused_before_training(refuse, damage, words):
    assert words in refuse(damage)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"VOCAB_SIZE": "4096"}, "8192 pieces, VOCAB_SIZE is 4096"),
        ({"TOKENIZER_PATH": "/nowhere.model"}, "/nowhere"),
        ({"TOKENIZER_PATH": str(ROOT / "train_gpt.py")}, "train_gpt.py"),
        ({"COMPRESSOR": "zip"}, "zip"),
        ({"TRAIN_BATCH_TOKENS": "500"}, "TRAIN_BATCH_TOKENS"),
        ({"MATRIX_LRR": "0.1"}, "did you mean MATRIX_LR?"),
        ({"TTT_LORA_RNAK": "8"}, "did you mean TTT_LORA_RANK?"),
        ({"ATTENTION_BACKEND": "fa3"}, "ATTENTION_BACKEND"),
        ({"DATA_PATH": "/nowhere"}, "/nowhere"),
        ({"QUANT_ONLY": "1", "CHECKPOINT_PATH": "/nowhere.pt"}, "/nowhere.pt"),
        ({"TTT_EVAL_ONLY": "1", "ARTIFACT_PATH": "/nowhere.bin"}, "/nowhere.bin"),
        ({"QUANT_ONLY": "1", "CHECKPOINT_PATH": str(ROOT / "train_gpt.py")}, "train_gpt.py"),
        ({"TTT_EVAL_ONLY": "1", "ARTIFACT_PATH": str(ROOT / "train_gpt.py")}, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_unusable_settings_are_refused_before_training(refuse, settings, words):
    assert words in refuse(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none(refuse):
    assert "DEVICE=cuda" in refuse(DEVICE="cuda")


def test_a_missing_lrzip_is_told_before_training(refuse, tmp_path, published):
    message = refuse(COMPRESSOR="pergroup", PATH=str(tmp_path))
    assert "lrzip" in message and "COMPRESSOR" in message


def test_a_finished_run_is_not_overwritten(refuse, runs):
    before = {path.name: path.read_bytes() for path in (runs / "base").iterdir()}
    assert "RUN_ID" in refuse(RUN_ID="base", RUNS_DIR=str(runs))
    assert {path.name: path.read_bytes() for path in (runs / "base").iterdir()} == before


@pytest.mark.parametrize(
    "mode, path", [("QUANT_ONLY", "CHECKPOINT_PATH"), ("TTT_EVAL_ONLY", "ARTIFACT_PATH")]
)
def test_a_file_of_other_settings_is_refused(refuse, runs, mode, path):
    file = runs / "base" / {"QUANT_ONLY": "model.pt", "TTT_EVAL_ONLY": "artifact.bin"}[mode]
    assert "settings" in refuse(**{mode: "1", path: str(file), "MLP_MULT": "3"})


def test_a_process_ends_with_1_and_a_line_for_each_problem(world):
    common = {
        "DATA_PATH": str(world["folder"] / "nothing"),
        "RUNS_DIR": str(world["folder"] / "refused"),
    }
    code, out, err = finish(start(ROOT / "train_gpt.py", **common))
    assert code == 1 and out == ""
    one, other = err.strip().splitlines()  # a line for each problem
    assert "no fineweb_val_" in one and "no fineweb_train_" in other
    assert not (world["folder"] / "refused").exists()


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused(world):
    process = torchrun(
        2,
        ROOT / "train_gpt.py",
        DATA_PATH=str(world["folder"] / "data"),
        TRAIN_BATCH_TOKENS="384",
        RUNS_DIR=str(world["folder"] / "refused_ranks"),
    )
    code, out, err = finish(process)
    assert code == 1 and "step:" not in out and "RESULT" not in out
    assert "3 micro-batches a step" in err and "do not divide by 2 ranks" in err
    assert "Traceback" not in err.split("torch/distributed")[0]
