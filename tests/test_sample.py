"""Samples of a run: the model's own distribution, the text of the data, and clear refusals."""

import copy
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import ROOT, SETTINGS, QuietGuard, make_data
from run_maker import make_run

import lossless_caps
import train_gpt
from prepare_caseops_data import DEFAULT_TOKENIZER, load_tokenizer
from tools import prepare_plain_data, sample

TEXTS = ["The NASA Launch on eBay", "Été 東京 🗼 ½ iPhone", "", "plain words, 42", "A \ue001 B"]
CASEOPS = sample.Text(load_tokenizer(DEFAULT_TOKENIZER), caseops=True)
WORDS = "The cat sat on a mat and Saw 17 dogs run far away from that old house of Wood".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a tiny run with model.pt and artifact.bin."""
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "data").mkdir()
    make_data(folder / "data")
    settings = {
        "DATA_PATH": str(folder / "data"),
        "RUNS_DIR": str(folder / "runs"),
        "RUN_ID": "tiny",
        "TTT_ENABLED": "0",
    }
    hp = train_gpt.Hyperparameters.from_env(SETTINGS | settings)
    guard = QuietGuard()
    dist = train_gpt.Dist("cpu")
    guard.start(dist)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "write_code", lambda *_: 0)  # packing takes seconds
        train_gpt.run(hp, dist, guard)
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def model(run):
    settings, _ = sample.settings_of_run(run)
    return sample.load_model(sample.hyperparameters(settings, "cpu", None), run, False)


@pytest.fixture
def written(run, capsys):
    """written(*arguments) -> what the command writes about the tiny run."""

    def write(*arguments):
        sample.main([str(run), "--tokens", "12", "--device", "cpu", *map(str, arguments)])
        return capsys.readouterr().out

    return write


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the command


@pytest.mark.parametrize("source", [(), ("--checkpoint",)])
def test_a_seed_decides_the_samples_and_the_folder_stays_as_it_is(run, written, source):
    before = contents(run)
    first = written("--prompt", "The NASA Launch", "--seed", 5, *source)
    assert first.startswith("The NASA Launch") and len(first) > len("The NASA Launch\n")
    assert written("--prompt", "The NASA Launch", "--seed", 5, *source) == first
    assert written("--prompt", "The NASA Launch", "--seed", 6, *source) != first
    assert contents(run) == before


def test_the_artifact_is_sampled_unless_the_checkpoint_is_asked_for(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "model.pt").write_bytes(b"damaged")
    settings, _ = sample.settings_of_run(folder)
    hp = sample.hyperparameters(settings, "cpu", None)
    sample.load_model(hp, folder, checkpoint=False)
    with pytest.raises(train_gpt.DataError, match="model.pt"):
        sample.load_model(hp, folder, checkpoint=True)


def test_more_samples_and_prompts_follow_the_first_ones(written):
    one = written("--prompt", "The cat")
    both = written("--prompt", "The cat", "--count", 2, "--prompt", "A dog")
    parts = both.split("-" * 40 + "\n")
    assert parts[0] == one and [part.split()[0] for part in parts] == ["The", "The", "A", "A"]
    assert parts[1] != parts[0]


def test_temperatures_near_0_and_small_shares_are_greedy(written, model):
    ids = CASEOPS.encode("The cat")
    greedy = list(ids)
    with torch.no_grad():
        for _ in range(12):
            greedy.append(int(sample.next_token_logits(model, greedy).argmax()))
    text = CASEOPS.decode(greedy) + "\n"
    for arguments in (
        ["--temperature", 0],
        ["--temperature", 1e-6],
        ["--top-p", 1e-9],
        ["--top-p", 0],
    ):
        assert written("--prompt", "The cat", *arguments) == text
    assert written("--prompt", "The cat", "--temperature", 5) != text


def test_a_prompt_of_any_characters_is_taken(written):
    assert written("--prompt", "東京 🗼 Été iPhone").startswith("東京 🗼 Été iPhone")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("source", [(), ("--checkpoint",)])
def test_a_gpu_writes_text_with_the_model(run, capsys, source):
    """Its logits are those of the CPU, as far as bfloat16 goes."""
    sample.main([str(run), "--tokens", "12", "--device", "cuda", "--prompt", "The cat", *source])
    text = capsys.readouterr().out
    assert text.startswith("The cat") and len(text) > len("The cat\n")
    settings, _ = sample.settings_of_run(run)
    logits = {}
    for device in ("cpu", "cuda"):
        hp = sample.hyperparameters(settings, device, None)
        loaded = sample.load_model(hp, run, checkpoint=bool(source))
        assert loaded.tok_emb.device.type == device
        with torch.no_grad():
            logits[device] = sample.next_token_logits(loaded, CASEOPS.encode("The cat"))
    error = (logits["cuda"] - logits["cpu"]).square().mean().sqrt()
    assert error < 0.05 * logits["cpu"].std()


# ---- the model's distribution


def test_logits_are_those_that_evaluation_scores(model):
    """Softcap and projection in float32, looped layers on."""
    ids = CASEOPS.encode("The cat sat on the mat, and The Dog")
    tokens = torch.tensor([ids])
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head_weight.mul_(300)  # far into the softcap
        hidden = model.forward_hidden(tokens, max_seqlen=len(ids), looping=True)
        for target in (5, 300, 8000):
            expected = model.token_losses(hidden[0, -1:], torch.tensor([target]))
            losses = -sample.next_token_logits(model, ids).log_softmax(0)
            torch.testing.assert_close(losses[target], expected[0], rtol=1e-4, atol=1e-5)


def test_the_context_is_cut_from_the_left(model):
    length = model.hp.train_seq_len
    ids = [1, *range(300, 300 + 2 * length)]
    with torch.no_grad():
        logits = sample.next_token_logits(model, ids)
        assert torch.equal(logits, sample.next_token_logits(model, ids[-length:]))
        assert not torch.equal(logits, sample.next_token_logits(model, ids[1 - length :]))


def test_the_beginning_of_another_document_ends_a_sample(model):
    choices = iter([300, 301, train_gpt.BOS_ID, 302])
    assert list(sample.sample(model, [1], 9, lambda logits: next(choices))) == [300, 301]


def test_ids_are_picked_as_often_as_their_shares_say():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor([2, 0, 3, 1])]
    generator = torch.Generator().manual_seed(1)
    counts = np.bincount([sample.pick(logits, 1, 0.9, generator) for _ in range(2000)], minlength=4)
    # 0.5 + 0.3 + 0.15 is the first sum of 0.9 or more
    assert counts / 2000 == pytest.approx([0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95], abs=0.04)
    sharp = np.bincount([sample.pick(logits, 0.5, 1, generator) for _ in range(2000)], minlength=4)
    squares = np.array([0.15, 0.5, 0.05, 0.3]) ** 2
    assert sharp / 2000 == pytest.approx(squares / squares.sum(), abs=0.04)


def test_outputs_that_are_not_finite_are_called_so(model, monkeypatch):
    monkeypatch.setattr(
        model, "forward_hidden", lambda *_, **__: torch.full((1, 2, model.hp.model_dim), math.nan)
    )
    with pytest.raises(ValueError, match="not finite"):
        sample.next_token_logits(model, [1, 300])


# ---- text


@pytest.mark.parametrize("text", TEXTS)
def test_capitals_and_bytes_come_out_as_they_went_in(text):
    """Token by token: no part has half a character, and none is taken back."""
    ids = CASEOPS.encode(text)
    assert ids[0] == train_gpt.BOS_ID and CASEOPS.decode(ids) == text.replace("½", "1⁄2")
    parts = list(sample.growing_text(CASEOPS, ids[:1], ids[1:]))
    assert "".join(parts) == CASEOPS.decode(ids) and len(parts) > len(text.split())
    assert not any(sample.REPLACEMENT in part for part in parts)


def test_bytes_that_stay_no_character_are_shown_at_the_end():
    ids = CASEOPS.encode("a 🗼")
    assert "".join(sample.growing_text(CASEOPS, ids[:2], ids[2:-1])).rstrip("\ufffd") == "a "


@given(st.text(st.sampled_from("aZ .\ue001\ue002\ue003\ue004é"), max_size=12))
def test_markers_in_any_order_can_be_read(text):
    lossless_caps.decode(sample.mend_markers(text))
    encoded = lossless_caps.encode(text)
    assert sample.mend_markers(encoded) == encoded


@pytest.mark.parametrize(
    ("marked", "text"),
    [
        ("\ue001 a", " a"),
        ("\ue001\ue002ab", "AB"),
        ("a\ue001b", "ab"),
        ("a\ue003b", "aB"),
        ("\ue002", ""),
        ("a\ue004", "a"),
    ],
)
def test_markers_that_mark_nothing_are_left_out(marked, text):
    assert lossless_caps.decode(sample.mend_markers(marked)) == text


def test_plain_data_keep_their_capitals_as_they_are(tmp_path, published):
    documents = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(1, 90)) for i in range(80)]
    path = tmp_path / "plain.model"
    prepare_plain_data.train_tokenizer(iter(documents), 300, path)
    hp = train_gpt.Hyperparameters(
        caseops_enabled=False,
        marker_fusion_enabled=False,
        vocab_size=300,
        data_path=str(tmp_path),
        device="cpu",
    )
    text = sample.text_of_run(hp, path)
    prompt = " The cat \ue001 Saw 東京  "
    assert not text.caseops and text.decode(text.encode(prompt)) == prompt


def test_fused_markers_are_one_id_and_come_out_as_text():
    hp = train_gpt.Hyperparameters(device="cpu")
    text = sample.text_of_run(hp, DEFAULT_TOKENIZER)
    ids = text.encode("on The NASA Launch")
    assert sum(token in train_gpt.PAIR_IDS for token in ids) == 3
    assert text.decode(ids) == "on The NASA Launch"


def test_a_run_of_the_published_parts_gets_them(published):
    settings = {"ATTN_WINDOW": "256", "QUANT_ONLY": "1"}
    hp = sample.hyperparameters(settings, "cpu", None)
    assert isinstance(hp, published.Hyperparameters) and hp.attn_window == 256


# ---- refusals


def refusal(*arguments):
    """The sentence with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        sample.main([*map(str, arguments), "--device", "cpu"])
    assert "\n" not in ended.value.code and ended.value.code.startswith("sample.py: ")
    return ended.value.code


def test_what_is_missing_is_named(run, tmp_path):
    assert "no such run" in refusal(tmp_path / "nothing")
    (tmp_path / "log.txt").write_text("hello\n")
    assert "the run did not begin" in refusal(tmp_path)
    shutil.copy(run / "log.txt", tmp_path)
    assert "has no artifact.bin" in refusal(tmp_path)
    assert "has no model.pt" in refusal(tmp_path, "--checkpoint")


def test_another_tokenizer_is_refused(run, tmp_path):
    path = tmp_path / "plain.model"
    prepare_plain_data.train_tokenizer(iter([" ".join(WORDS)] * 300), 290, path)
    assert "has 290 pieces, VOCAB_SIZE is 8192" in refusal(run, "--tokenizer", path)
    missing = refusal(run, "--tokenizer", tmp_path / "none.model")
    assert "none.model does not exist: name the run's tokenizer with --tokenizer" in missing
    hp = train_gpt.Hyperparameters(data_path=str(tmp_path / "gone"), device="cpu")
    with pytest.raises(train_gpt.DataError, match="was other.model, found was .*--tokenizer"):
        sample.text_of_run(hp, Path("other.model"))


def test_a_run_of_another_version_is_refused(tmp_path):
    folder = make_run(tmp_path / "old", settings={"NUM_LAYERZ": "3", "MATRIX_LRR": "1"})
    assert "the run changed MATRIX_LRR, NUM_LAYERZ, which this version lacks" in refusal(folder)
    folder = make_run(tmp_path / "older", settings={"TRAIN_SEQ_LEN": "1"})
    assert "check out the one that made it: TRAIN_SEQ_LEN=1" in refusal(folder)


def test_defaults_that_are_constants_by_now_are_left_out(run, tmp_path, capsys):
    """A changed one is refused."""
    folder = tmp_path / "old"
    shutil.copytree(run, folder)
    log = folder / "log.txt"
    text = log.read_text()
    table = "settings (* changed):\n"
    log.write_text(text.replace(table, f"{table}  BREADTH=5  # \n  GATE_WINDOW=12  # inputs\n"))
    sample.main([str(folder), "--tokens", "3", "--device", "cpu", "--prompt", "The cat"])
    out, err = capsys.readouterr()
    assert out.startswith("The cat")
    assert err.endswith("settings that are gone, left out: BREADTH, GATE_WINDOW\n")
    log.write_text(text.replace(table, f"{table}* BREADTH=13  # inputs\n"))
    assert "the run changed BREADTH" in refusal(folder)


def test_a_prompt_that_is_no_text_is_refused(run):
    assert "lone surrogate" in refusal(run, "--prompt", "a\udcff")


@pytest.mark.parametrize(
    "argument", [["--temperature", "-1"], ["--top-p", "nan"], ["--tokens", "0"], ["--count", "x"]]
)
def test_numbers_out_of_range_are_refused(argument, capsys):
    with pytest.raises(SystemExit) as ended:
        sample.parse_arguments(["run", *argument])
    assert ended.value.code == 2 and f"{argument[1]} is not a number" in capsys.readouterr().err


def test_the_demo_ends_with_samples_of_its_run():
    recipe = (ROOT / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0]
    lines = recipe.splitlines()
    assert "train_gpt.py" in lines[1] and "tools/sample.py" in lines[2]
    assert recipe.count("--prompt ") == 3
