"""Specialised packing: what settings do not use is gone, the rest gives the same numbers, other values are refused."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import HERE, PATIENCE
from test_end_to_end import SETTINGS, make_data
from test_presets import PUBLISHED, tiny

import train_gpt

pytest.importorskip("brotli")
pytest.importorskip("python_minifier")

from tools import make_record, pack_code, preflight, run_files, specialise  # noqa: E402

ROOT = Path(train_gpt.__file__).parent
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
TECHNIQUES = specialise.COMPANION.read_text(encoding="utf-8")
DEFAULTS = {field.name: field.default for field in dataclasses.fields(train_gpt.Hyperparameters)}


def special(source, **settings):
    """Source -> the specialised source."""
    return ast.unparse(specialise.specialise(ast.parse(textwrap.dedent(source)), settings))


# ---- on a small script: what folds, what goes, what stays

SCRIPT = """
import dataclasses, os, re, sys, lzma
PACKED = ""
def env(default, help, least=None):
    return dataclasses.field(default=default, metadata={"help": help})
@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    seed: int = env(42, "")
    model_dim: int = env(512, "")
    num_loops: int = env(2, "")
    matrix_bits: int = env(6, "")
    matrix_lr: float = env(0.026, "")
    gate: bool = env(True, "")
    coder: str = env("entropy", "")
    quant_only: bool = env(False, "")
    width = property(lambda hp: 2 if hp.gate else 3)
    def cross_checks(self):
        yield self.model_dim % 2, "odd"
def unknown_settings(environ, cls):
    return []
def settings_table(hp):
    return PACKED + str(hp)
def double(x, shaping=None):
    if shaping:
        return "shaped"
    return 2 * x
class Model:
    def __init__(self, hp):
        self.hp = hp
        self.head = None if hp.gate else "head"
    @property
    def kind(self):
        hp = self.hp
        return "gated" if hp.gate else "plain"
    def unused(self):
        return lzma
    def run(self, log):
        loops = self.hp.num_loops
        shaping = self.hp.matrix_lr if self.hp.coder != "entropy" else None
        log.live(loops)
        return [self.kind, self.head or "tied", double(loops, shaping), {"gated": 1, "plain": 2}[self.kind],
                getattr(self.hp, "matrix_bits"), self.hp.model_dim + self.hp.width * 1, 1 - self.hp.matrix_lr]
class Log:
    def live(self, share):
        print("live")
hp = Hyperparameters(**{f.name: type(f.default)(os.environ[f.name.upper()]) for f in dataclasses.fields(Hyperparameters)
                        if f.name.upper() in os.environ})
print(*unknown_settings(os.environ, Hyperparameters), *Model(hp).run(Log()), settings_table(hp).splitlines()[-1])
"""


def output(source, **environ):
    done = subprocess.run([sys.executable, "-c", source], env=HERE | environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.removeprefix("live\n").split("Hyperparameters")[0].split()


@pytest.mark.parametrize("settings", [{}, {"GATE": ""}, {"NUM_LOOPS": "0", "CODER": "lzma", "MATRIX_LR": "1e-1"}])
def test_a_specialised_script_does_what_its_source_does(settings):
    values = {name: value if name != "GATE" else "0" for name, value in settings.items()}
    text = special(SCRIPT, **values)
    wanted = output(SCRIPT, **settings)
    assert output(text)[:7] == wanted[:7] and len(wanted) == 7
    assert "live" not in text and "lzma" not in text.replace("=lzma", "") and "unused" not in text
    assert ("'head'" in text, "shaped" in text) == ("GATE" in settings, "CODER" in settings)
    assert ("num_loops" in text) == ("NUM_LOOPS" not in settings)  # its 0 is final
    assert all(name in text for name in ("seed", "model_dim", "matrix_bits")) and "matrix_lr" not in text


def test_other_values_of_folded_settings_are_refused_and_the_same_ones_are_not():
    text = special(SCRIPT, MATRIX_LR="0.05", MODEL_DIM="64", QUANT_ONLY="1")
    assert output(text, MODEL_DIM="64") == output(text) != output(text, MODEL_DIM="32")  # 64 is its default
    for name, same, other in [("MATRIX_LR", ".0500", "0.026"), ("CODER", "entropy", "lzma"), ("QUANT_ONLY", "0", "1")]:
        assert output(text, **{name: same}) == output(text)
        assert " ".join(output(text, **{name: other})).startswith(f"{name}={other}: this script was packed with")
    table = next(node.value.value for node in ast.parse(text).body if ast.unparse(node).startswith("PACKED"))
    assert "* MATRIX_LR=0.05  # " in table and "* MODEL_DIM=64  # " in table and "  CODER=entropy  # " in table
    assert "SEED" not in table and "seed: int = 42" in text  # of a run, not of the method


@pytest.mark.parametrize("source, wanted", [
    ("def f(x):\n    if not hp.gate and x():\n        return 1\n    return 2", "return 2"),
    ("def f(x):\n    if hp.gate and x():\n        return 1\n    return 2", "if x():\n        return 1\n    return 2"),
    ("def f(x):\n    return x() and not hp.gate", "return x() and False"),  # x has to be called
    ("def f(x):\n    y = hp.gate\n    return x if y else -x", "return x"),
    ("def f(x):\n    y = hp.gate\n    for y in x:\n        pass\n    return y", "return y"),  # bound twice
    ("def f(x):\n    return hp.matrix_lr == 0.026 and 3 in (1, 2) or x", "return x"),
    ("def f(x):\n    for _ in () if hp.gate else x:\n        print(1)", "pass"),
    ("def f(x):\n    while hp.gate:\n        break\n        print(1)", "while True:\n        break"),
    ("def f(x):\n    return x('' + x) + ''", "return x(x)"),
    ("def f(x):\n    return x(*() if hp.gate else x) * 1 | {}", "return x()"),
    ("def f(x):\n    return isinstance(x, int | int), x() | x()", "return (isinstance(x, int), x() | x())"),
    ("def f(x):\n    return f'{x} {hp.matrix_lr} {3!r} {4:>2}'", "return f'{x} 0.026 {3!r} {4:>2}'"),
    ("def f(x):\n    y, z = 1, x\n    y, u = 2, 3\n    return x + y + z * u",
     "y, z = (1, x)\n    y = 2\n    return x + y + z * 3"),
    ("def f(x):\n    if x or not hp.gate:\n        x = 1\n    elif x:\n        x = 2\n    else:\n        x = 3\n"
     "    return x",
     "if x:\n        x = 1\n    else:\n        x = 3\n    return x"),
    ("def f(x):\n    if x():\n        x = 1\n    elif x():\n        x = 2\n    return x",
     "if x():\n        x = 1\n    elif x():\n        x = 2\n    return x"),
])
def test_folding(source, wanted):
    text = special(SCRIPT.replace("hp = Hyper", source + "\nprint(f)\nhp = Hyper"))
    found = next(node for node in ast.parse(text).body if getattr(node, "name", "") == "f")
    body = textwrap.dedent(ast.unparse(found).split("\n", 1)[1])
    assert body.endswith(wanted.replace("\n    ", "\n"))


def test_what_classes_are_always_given_or_never_asked_for_goes():
    source = """
class Told:
    def __init__(self, mode, count, unread, *, at=0):
        self.count, self.mode, self.said = count, mode, lambda: print(1)
        self.entered = at

    def __call__(self):
        self.entered += 1
        return self.count * 2 if self.mode == "m" else 3

print(Told("m", len("ab"), "x")(), Told("m", 3, hp.seed)())
"""
    text = special(SCRIPT.replace("hp = Hyper", source.replace("hp.seed", "7") + "\nhp = Hyper"))
    found = next(node for node in ast.parse(text).body if getattr(node, "name", "") == "Told")
    body = ast.unparse(found)
    assert "entered" not in body and "said" not in body and "unread" not in body and "mode" in body
    assert "def __init__(self, count, *, at=0)" in body and "Told(len('ab'))" in text and "Told(3)" in text
    assert output(text)[:2] == ["4", "6"]


# ---- renaming parameters


def packed_text(packed):
    """What a packed script unpacks to."""
    names = {}
    exec(compile(packed.split(b"linecache.cache[")[0], "packed", "exec"), names)
    return names["S"]


def test_parameters_are_renamed_only_where_every_caller_is_seen():
    source = """
    import library
    def called(first_parameter, second_parameter):
        return first_parameter + first_parameter + second_parameter + second_parameter
    def by_name(first_parameter, named_parameter):
        return first_parameter + first_parameter + named_parameter + named_parameter
    def callback(context_parameter, inputs_parameter):
        context_parameter.x = inputs_parameter
        context_parameter.y = inputs_parameter
    def starred(starred_parameter):
        return starred_parameter + starred_parameter + starred_parameter
    class Thing:
        def __init__(self, built_parameter):
            self.x = built_parameter + built_parameter
        def __call__(self, hidden_parameter):
            return hidden_parameter + hidden_parameter
    library.register(callback, context=callback)
    print(called(1, 2), by_name(1, named_parameter=2), starred(**{"starred_parameter": 1}), Thing(3).x, Thing(3)(4))
    """
    text = packed_text(pack_code.pack_code(textwrap.dedent(source), {}))
    kept = {name for name in re.findall(r"\w+_parameter", text)}
    assert kept == {"named_parameter", "context_parameter", "inputs_parameter", "starred_parameter", "hidden_parameter"}


# ---- train_gpt.py


def test_what_the_proof_of_a_record_changes_stays_a_setting():
    assert {name.lower() for name in make_record.TINY} == set(specialise.OF_A_PROOF)
    assert run_files.OF_A_RUN - {"PLOTS"} == {name.upper() for name in specialise.OF_A_RUN} - {
        "TTT_EVAL_ONLY", "ARTIFACT_PATH"}
    assert {*specialise.OF_A_PROOF, *specialise.OF_A_RUN, *specialise.OFF} <= set(DEFAULTS)


def test_settings_that_a_run_replaces_stay_settings():
    """dataclasses.replace(hp, name=...) fails for a field that is gone, and does nothing where its reads are folded."""
    calls = re.findall(r"dataclasses\.replace\((?:plain|hp|self\.hp), (.*)\)", SOURCE)
    replaced = {name for words in calls for name in re.findall(r"(\w+)=", words)}
    assert "gptq_column_steps" in replaced
    text = special(SOURCE)
    assert {name for name in replaced & set(DEFAULTS) if f"\n    {name}: " not in text} == set()
    assert "hp.gptq_column_steps" in text


# words of the source that stand nowhere but in the code of one feature -> settings that switch it on
MARKERS = {
    "LZMADecompressor": {"COMPRESSOR": "lzma"}, "'lrzip": {"COMPRESSOR": "pergroup"},
    "pdist": {"COMPRESSOR": "pergroup"}, "(self.skip_gates,)": {}, "is_unused": {"CASEOPS_ENABLED": "0"},
    "np.interp": {"WD_SCHEDULE_ENABLED": "1"}, "ttt_warm_up": {}, "ttt_global_adaptation": {},
    "eigvalsh": {"LQER_WEIGHTED": "1"}, "permutation(": {"DATA_SEED": "7"}, "np.roll": {"MARKER_FUSION_ENABLED": "1"},
    "clips times": {"TARGET_BYTES": "9"}, "'sliding'": {"SLIDING_WINDOW_ENABLED": "1"},
    "36313": {"BIGRAM_VOCAB_SIZE": "31"}, "offset_keys": {"PARTIAL_KEY_OFFSET": "1"},
    "value_table": {"VALUE_EMBED_LAYERS": "1"}, "value_mix": {"VALUE_RESIDUAL": "gate"},
    "gram_newton_schulz": {"MUON_GRAM_ENABLED": "1"}, "by_pairs": {"MUON_HEAD_PAIRS": "1"},
    "snapshots": {"SWA_BELOW_LR": "0.9"}, "fake_quantize": {"QAT_BELOW_LR": "0.5", "GPTQ_COLUMN_STEPS": "0"},
    "importance": {"HESSIAN_CLIP_LAMBDA": "0.2"}, "multinomial": {"GPTQ_SELF_CALIBRATION": "1"},
    "extra_passes": {"EXTRA_EVAL_LOOPS": "1"}, "eval_passes": {"EXTRA_EVAL_LOOPS": "1"},
    "attn_window": None, "on_grid": {"QAT_BELOW_LR": "0.5"}, "extras": {"VALUE_RESIDUAL": "gate"},
    "ShuffledShards": {"DOC_SHUFFLE_ENABLED": "1"},
    "evaluate_sgd": None,  # there is no test-time training in the other script
    "attention_stale": {}, "StaleContext": {}, " techniques.": None,
    "ngram_hints": None, "np.select": None,
    "safety.": None, "TCPStore": None, "preflight.": None, "plot_run": None, "LiveLine": None,
}


def test_a_switch_that_is_off_leaves_nothing_behind():
    opposite = {"TTT_ENABLED": "0", "SKIP_GATES_ENABLED": "0"}
    for settings in MARKERS.values():
        opposite |= settings or {}
    opposite["COMPRESSOR"] = "pergroup"
    default, other = special(SOURCE), special(SOURCE, **opposite)
    for marker, settings in MARKERS.items():
        assert marker in (SOURCE + TECHNIQUES).replace('"', "'"), marker
        assert (marker in default) == (settings == {}), marker
        in_other = bool(settings) and settings.get("COMPRESSOR") != "lzma"
        assert (marker in other) == in_other, marker
    assert len(default) < 0.91 * len(ast.unparse(ast.parse(SOURCE)))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The packed script of the default settings, in a file."""
    path = tmp_path_factory.mktemp("packed") / "packed_script.py"
    path.write_bytes(pack_code.pack_code(SOURCE, {}))
    return path


def test_the_packed_script_of_the_defaults_is_small(packed):
    assert packed.stat().st_size <= 28_150


def test_a_lost_terminal_does_not_end_a_packed_script(packed):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, packed, "--help"], stdout=full, stderr=full, timeout=120)
    assert done.returncode == 0


def test_operators_of_the_packed_script_are_differentiable(packed):
    """Kernels in the interpreter: PyTorch calls into them by the names of parameters that it documents."""
    driver = """
        import torch, torch.nn.functional as F, packed_script as packed
        torch.manual_seed(0)
        h, head = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
        targets = torch.arange(5)
        y, v, gates = (torch.randn(1, 7, *shape, requires_grad=True) for shape in ((4, 8), (2, 8), (4,)))
        along = F.normalize(v, dim=-1).repeat_interleave(2, 2)
        xsa = (y - (y * along).sum(-1, keepdim=True) * along) * gates.sigmoid()[..., None]
        pairs = [(packed.linear_cross_entropy(h, head, targets, 30.0), (h, head),
                  F.cross_entropy(30 * torch.tanh(h @ head.T / 30), targets, reduction="none")),
                 (packed.gated_xsa(y, v, gates, 1.0), (y, v, gates), xsa)]
        for got, inputs, want in pairs:
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            for a, b in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (got, want))):
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
        print("equal")
        """
    pytest.importorskip("triton")
    environ = HERE | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(packed.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(driver)], env=environ, capture_output=True, text=True,
                          timeout=PATIENCE)
    assert done.stdout == "equal\n", done.stderr


def test_the_packed_script_keeps_the_names_that_quack_calls_operands_by(packed):
    driver = """
        import quack_stub, torch, packed_script as packed
        quack_stub.install()
        x, up, down = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((6, 16), (32, 16), (16, 32)))
        outs = [packed._mlp(x, up, down, 0.3),
                torch.nn.functional.leaky_relu(x @ up.T, 0.3).square() @ down.T]
        for got, want in zip(*([out, *torch.autograd.grad(out.sum(), (x, up, down))] for out in outs)):
            assert ((got - want).float().norm() / want.float().norm()).item() < 0.02
        print(quack_stub.EpiMod.calls)
        """
    paths = os.pathsep.join([str(packed.parent), str(Path(__file__).parent)])
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(driver)], capture_output=True, text=True,
                          timeout=PATIENCE, env=HERE | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.stdout == "[(6, 32, 16, False), (6, 32, 16, True)]\n", done.stderr


OTHERWISE = {  # as many other branches as one run can take
    "COMPRESSOR": "lzma", "SLIDING_WINDOW_ENABLED": "1", "NUM_LOOPS": "0", "PARALLEL_START_LAYER": "3",
    "XSA_LAST_N": "0", "TIE_EMBEDDINGS": "0", "SKIP_GATES_ENABLED": "0", "SMEAR_GATE_ENABLED": "0",
    "SPARSE_ATTN_GATE_ENABLED": "0", "ATTN_OUT_GATE_ENABLED": "1", "ATTN_OUT_GATE_SRC": "q", "LN_SCALE": "0",
    "WD_SCHEDULE_ENABLED": "1", "DATA_SEED": "3",
    "MARKER_FUSION_ENABLED": "1", "GRAD_CLIP_NORM": "0", "MUON_MOMENTUM_WARMUP_STEPS": "0", "MUON_ROW_NORMALIZE": "0",
    "GPTQ_COLUMN_STEPS": "0", "LQER_WEIGHTED": "1", "LQER_ASYM_ENABLED": "0", "GATED_ATTN_QUANT_GATE": "0",
    "ATTN_WINDOW": "9", "PARTIAL_KEY_OFFSET": "1", "VALUE_RESIDUAL": "gate", "BIGRAM_VOCAB_SIZE": "31",
    "VALUE_EMBED_LAYERS": "1", "MUON_HEAD_PAIRS": "1", "MUON_GRAM_ENABLED": "1", "SWA_BELOW_LR": "0.9",
    "SWA_EVERY": "1", "QAT_BELOW_LR": "0.5", "HESSIAN_CLIP_LAMBDA": "0.2", "GPTQ_SELF_CALIBRATION": "1",
    "DOC_SHUFFLE_ENABLED": "1",
    "PHASED_TTT_NUM_PHASES": "0", "TTT_WARM_START_A": "0", "TTT_LORA_SITES": "q,head", "VAL_LOSS_EVERY": "2",
    "TTT_STALE_CONTEXT": "0", "TTT_SHORT_CHUNKS": "30:8", "NGRAM_TILT_ENABLED": "1",
}
DEMO = dict(line.split("=") for line in (ROOT / "presets/demo.env").read_text().splitlines() if re.match(r"\w+=", line))
DEMO |= {"EXTRA_EVAL_LOOPS": "1"}
DEMO = {name: value for name, value in DEMO.items() if name.lower() not in specialise.OF_A_PROOF}


def run_both(folder, monkeypatch, settings, run):
    """Packed script and source with the same settings and the same results -> how to call the script, its RESULT."""
    script = folder / "packed.py"
    script.write_bytes(pack_code.pack_code(SOURCE, run_files.with_preset(settings)))

    def call(**more):
        done = subprocess.run([sys.executable, script], env=HERE | run | more | {"OMP_NUM_THREADS": "1"}, text=True,
                              capture_output=True, timeout=PATIENCE)
        return done.stdout, done.stderr

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(call, RUN_ID="packed")
        monkeypatch.setattr(train_gpt, "write_code", lambda *_: script.stat().st_size)
        hp = train_gpt.Hyperparameters.from_env(settings | run | {"RUN_ID": "source"})
        wanted = json.loads(json.dumps(train_gpt.run(hp, train_gpt.Dist("cpu"))))
        out, err = other.result()
    assert out, err
    got = json.loads(out.splitlines()[-1].removeprefix("RESULT "))
    keys = ("steps", "train_loss", "scores", "artifact_bytes", "code_bytes", "violations")
    assert [got[key] for key in keys] == [wanted[key] for key in keys]
    assert (folder / "packed" / "artifact.bin").read_bytes() == (folder / "source" / "artifact.bin").read_bytes()
    return call, got


IN_SOAK = pytest.mark.skipif(not os.environ.get("SOAK"), reason="half a minute each; make soak runs them")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[IN_SOAK] if n != "pr1493" else []) for n in PUBLISHED])
def test_a_packed_preset_gives_the_numbers_of_its_source(tiny_data, tmp_path, monkeypatch, name):
    tokenizer = SETTINGS["TOKENIZER_PATH"]  # its first pieces do for tokens below 97
    run = {"DATA_PATH": str(tiny_data), "RUNS_DIR": str(tmp_path), "TOKENIZER_PATH": tokenizer}
    monkeypatch.setattr(preflight, "find_tokenizer", lambda hp: tokenizer)
    settings = {key: value for key, value in tiny(name, tiny_data, tmp_path).items() if key != "RUN_ID"}
    _, got = run_both(tmp_path, monkeypatch, settings, run)
    assert ("ttt" in got["scores"]) == (name != "pr1512") and got["steps"] == 3


@pytest.mark.parametrize("changes", [OTHERWISE, DEMO], ids=["otherwise", "demo"])
def test_a_packed_script_gives_the_numbers_of_its_source(tmp_path, monkeypatch, changes):
    """It runs without the settings that it was packed with, except those that it may be given."""
    (tmp_path / "data").mkdir()
    make_data(tmp_path / "data")
    run = {"DATA_PATH": str(tmp_path / "data"), "RUNS_DIR": str(tmp_path), "TOKENIZER_PATH": SETTINGS["TOKENIZER_PATH"]}
    tiny = {name: value for name, value in SETTINGS.items() if name.lower() in DEFAULTS and name not in run}
    call, got = run_both(tmp_path, monkeypatch, tiny | changes, run)
    if changes is DEMO:
        again = json.loads(call(RUN_ID="packed", TTT_EVAL_ONLY="1")[0].splitlines()[-1].removeprefix("RESULT "))
        assert again["scores"] == {name: score for name, score in got["scores"].items() if name != "prequant"}
        error = call(RUN_ID="no", COMPRESSOR="lzma", MUON_WD="0.0950", EMA_DECAY="0.5")[1]
        assert error == (
            "train_gpt.py cannot run: EMA_DECAY=0.5: this script was packed with 0.9; its source takes other values\n"
            "COMPRESSOR=lzma: this script was packed with brotli; its source takes other values\n")
