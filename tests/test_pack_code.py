"""Packed code: it runs as its source does, its literal keeps every byte, and a script that runs
writes it.
"""

import ast
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import textwrap
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from struct import Struct
from types import SimpleNamespace

import brotli
import numpy as np
import pytest
import sentencepiece
import torch
from conftest import HERE, IN_SOAK, PATIENCE, install_parts_for
from preset_helpers import PUBLISHED, tiny
from run_helpers import SETTINGS, QuietGuard, make_data
from torch._library.custom_ops import CustomOpDef

import train_gpt
from tools import guard, run_files

pytest.importorskip("brotli")
pytest.importorskip("python_minifier")

from tools import pack_code as packer  # noqa: E402
from tools.pack_code import PACKED_END, is_packed, pack_code, string_literal  # noqa: E402

ROOT = Path(train_gpt.__file__).parent
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
SAMPLE = '''
"""A script with what the real one has: a dataclass, a kernel, an operator, slashes \\\\ and quotes."""
from __future__ import annotations
import inspect, sys
from dataclasses import astuple, dataclass, fields
import torch
import triton
import triton.language as tl

@dataclass(frozen=True)
class Settings:
    """Settings."""
    matrix_lr: float = 0.026
    name: str = "café \\\\n"
    steps: int = 3

@triton.jit
def scale_kernel(x_ptr, y_ptr, num_elements, FACTOR: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Times FACTOR."""
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = offsets < num_elements
    values = tl.load(x_ptr + offsets, mask=inside)
    for repeat in tl.static_range(FACTOR):
        values += FACTOR * FACTOR + BLOCK_SIZE - BLOCK_SIZE
    tl.store(y_ptr + offsets, values * FACTOR, mask=inside)

def scale(some_input: torch.Tensor, some_factor: int) -> torch.Tensor:
    result = torch.empty_like(some_input)
    grid = (triton.cdiv(some_input.numel(), 16),)
    scale_kernel[grid](some_input, result, some_input.numel(), FACTOR=some_factor, BLOCK_SIZE=16)
    assert sys.exit("asserts are not stripped") is None
    return result

def main(argument_count=len(sys.argv), *, keyword_only_argument=2):
    settings = Settings(steps=4)
    print(astuple(settings), [(f.name, f.type) for f in fields(settings)], argument_count, keyword_only_argument)
    print(scale(torch.arange(40.0), 3).tolist())
    print(op(torch.ones(3), 2.5), len(torch.ops.sample.op.default._schema.arguments))
    print(__name__, __file__, sys.argv[1:], "constexpr" in inspect.getsource(scale_kernel.fn))

OPERATOR

if __name__ == "__main__":
    main(keyword_only_argument=5)
'''
OPERATOR = """
@torch.library.custom_op("sample::op", mutates_args=())
def op(long_argument: torch.Tensor, other_argument: float) -> torch.Tensor:
    return long_argument * other_argument + long_argument.sum() + long_argument.mean()
@op.register_fake
def _(long_argument, other_argument):
    return torch.empty_like(long_argument)
"""


def run_script(path, *arguments):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, path, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_packed_code_runs_as_its_source_does(tmp_path):
    pytest.importorskip("triton")
    # custom_op reads real annotations, so the sample is the script without the future import that
    # makes them text
    source = SAMPLE.replace("OPERATOR", OPERATOR).replace(
        "from __future__ import annotations\n", ""
    )
    (tmp_path / "plain").mkdir()
    (tmp_path / "packed").mkdir()
    plain, packed = (tmp_path / folder / "script.py" for folder in ("plain", "packed"))
    plain.write_text(source.replace("    assert sys.exit", "    # assert sys.exit"))
    packed.write_bytes(pack_code(source, {}))
    expected = run_script(plain, "one", "two").replace(str(plain), str(packed))
    assert ") 2\n" in expected and "__main__" in expected
    assert run_script(packed, "one", "two") == expected


def test_packed_code_is_recognised():
    packed = pack_code(textwrap.dedent(SAMPLE), {})
    assert is_packed(packed)
    assert is_packed(b"#coding:l1\nimport brotli,io,linecache\nn=0\nfor c in'''an older one")
    assert not is_packed(SAMPLE.encode()) and not is_packed(b"")
    assert not is_packed(Path(train_gpt.__file__).read_bytes())


def of_digits(*digits):
    """Bytes whose literal would end in these digits of base 254 if their first byte were 1."""
    for more in range(1, 254**2):
        number = more
        for digit in digits:
            number = number * 254 + digit
        first, *data = number.to_bytes((number.bit_length() + 7) // 8)
        if first == 1:
            return bytes(data)
    raise AssertionError(digits)


QUOTE = ord("'") - 2
BACKSLASH = ord("\\") - 2
RANDOM = random.Random(7).randbytes(10_000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"'",
        b"\0\0",
        b"\0\0\1",
        RANDOM,
        RANDOM[::-1],
        b"\xff" * 500,
        of_digits(*range(1, 254)),
        of_digits(*[QUOTE] * 7),
        of_digits(9, 9, 12, 9, QUOTE, QUOTE),
        of_digits(253, 90, 89),
        of_digits(9, *[BACKSLASH] * 3),
        of_digits(9, 9, *[BACKSLASH] * 8, QUOTE, 9, 9),
        of_digits(9, 9, BACKSLASH, QUOTE, QUOTE),
    ],
)
def test_literal_keeps_every_byte_even_where_a_copy_changes_line_ends(tmp_path, data):
    script = tmp_path / "literal.py"
    decode = PACKED_END.split(b"\n")[0] + b"\nDATA=n.to_bytes(%d)[1:]\n" % (1 + len(data))
    for copied in (b"\n", b"\r\n"):  # as git's autocrlf writes a file
        text = b"#coding:l1\nn=0\nfor c in r'''" + string_literal(data) + decode
        assert b"\0" not in text and b"\r" not in text
        script.write_bytes(text.replace(b"\n", copied))
        names = {}
        exec(compile(script.read_bytes(), script, "exec"), names)
        assert names["DATA"] == data
    assert len(string_literal(RANDOM)) < 1.002 * len(RANDOM)


def test_packed_module_can_be_imported_and_shows_its_lines(tmp_path):
    source = (
        "class Sample:\n    value = '\\x0c\\u2028'\n    def fail(argument):\n"
        "        raise KeyError('here') if argument else None\n"
    )
    (tmp_path / "sample_module.py").write_bytes(pack_code(source, {}))
    (tmp_path / "use.py").write_text(
        "import traceback, sample_module\n"
        # renamed
        "Sample = next(value for value in vars(sample_module).values() if hasattr(value, 'fail'))\n"
        "print(repr(Sample.value), sample_module.__name__)\n"
        "try:\n    Sample.fail(1)\nexcept KeyError:\n    print(traceback.format_exc())\n"
    )
    output = run_script(tmp_path / "use.py")
    assert (
        output.startswith("'\\x0c\\u2028' sample_module") and "raise KeyError('here')if " in output
    )


def test_docstrings_cost_no_code_bytes():
    body = "def f(argument):\n    {}return argument + 1\nprint(f(1))\n"
    documented = pack_code(body.format('"""A long explanation of everything."""\n    '), {})
    assert documented == pack_code(body.format(""), {})


def test_source_that_is_not_python_is_an_error():
    with pytest.raises(ValueError, match="minified"):
        pack_code("def f(:\n", {})


@pytest.mark.parametrize("module", ["python_minifier", "brotli", "tools.pack_code"])
def test_missing_packer_is_an_error_that_says_what_to_do(monkeypatch, tmp_path, dist, module):
    monkeypatch.delitem(sys.modules, "tools.pack_code")
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    with pytest.raises(
        train_gpt.SettingError, match=rf"{module}.*pip install .*packed train_gpt.py"
    ):
        train_gpt.write_code(tmp_path, train_gpt.Hyperparameters(), dist, guard.RunGuard())
    assert not list(tmp_path.iterdir())


def test_written_code_is_the_packed_script_and_packed_again_itself(monkeypatch, tmp_path, dist):
    size = train_gpt.write_code(tmp_path, train_gpt.Hyperparameters(), dist, guard.RunGuard())
    written = tmp_path / "train_gpt.py"
    assert written.stat().st_size == size and is_packed(written.read_bytes())
    (tmp_path / "again").mkdir()
    monkeypatch.setattr(train_gpt, "__file__", str(written))
    assert train_gpt.find_guard() is train_gpt.NO_GUARD
    assert train_gpt.write_code(tmp_path / "again", train_gpt.Hyperparameters(), dist) == size
    assert (tmp_path / "again" / "train_gpt.py").read_bytes() == written.read_bytes()


def test_a_packed_script_takes_no_guard_even_beside_one(monkeypatch):
    monkeypatch.setattr(train_gpt, "PACKED", True)
    assert train_gpt.find_guard() is train_gpt.NO_GUARD


def test_command_line_writes_the_packed_script(tmp_path):
    script, tool = tmp_path / "script.py", ROOT / "tools" / "pack_code.py"
    script.write_text("print('packed', __file__)\n")
    assert run_script(tool, script, tmp_path / "out.py").strip().endswith(" bytes")
    assert run_script(tmp_path / "out.py") == f"packed {tmp_path / 'out.py'}\n"
    for arguments in [
        [],
        [tmp_path / "absent.py", tmp_path / "out.py"],
        [tool, tmp_path / "absent" / "out.py"],
    ]:
        done = subprocess.run(
            [sys.executable, tool, *arguments], capture_output=True, text=True, timeout=PATIENCE
        )
        assert (
            done.returncode == 1
            and "pack_code.py" in done.stderr
            and "Traceback" not in done.stderr
        )


def test_packing_leaves_nothing_on_the_syntax_nodes_that_python_shares():
    pack_code(
        "def f(x):\n    y = [-a + 1 for a in x if not a or a < 2]\n    del x[0]\n    return y\n", {}
    )
    tree = ast.parse("del a[0]\nb = c and d or not e\nf = g + h * -i < j\nk += ~l in m")
    assert {name for node in ast.walk(tree) if not node._fields for name in vars(node)} == set()


# ---- train_gpt.py


def packed_text(packed):
    """What a packed script unpacks to."""
    names = {}
    exec(compile(packed.split(b"F=__file__")[0], "packed", "exec"), names)
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
        def method(self, hidden_parameter, named_parameter):
            return hidden_parameter + hidden_parameter + named_parameter + named_parameter
    library.register(callback, context=callback)
    library.call(Thing(3).method)
    print(called(1, 2), by_name(*[1], named_parameter=2), starred(**{"starred_parameter": 1}), Thing(3).x, Thing(3)(4))
    """
    text = packed_text(pack_code(textwrap.dedent(source), {}))
    kept = {name for name in re.findall(r"\w+_parameter", text)}
    assert kept == {"named_parameter", "context_parameter", "inputs_parameter", "starred_parameter"}


def test_local_names_follow_the_order_in_which_they_appear():
    """However often each is used: functions that do the same then are the same text."""
    source = """
    def rare_first(number, text):
        return [text, text, text, number]
    def rare_last(text, number):
        return [text, text, text, number]
    print(rare_first(1, "a"), rare_last("a", 1))
    """
    text = packed_text(pack_code(textwrap.dedent(source), {}))
    assert re.search(r"\(A,B\):return\[B,B,B,A\]", text), text
    assert re.search(r"\(A,B\):return\[A,A,A,B\]", text), text


def test_attributes_are_renamed_only_where_their_class_alone_asks_for_them():
    source = """
    import library
    class Thing:
        fieldattribute = 1
        def __init__(self, privateattribute):
            self.privateattribute = privateattribute
            self.privatemethodattribute()
            self.readattribute = self.namedattribute = self.wordedattribute = 1
            self.A = self.fieldattribute
        def privatemethodattribute(self):
            self.readattribute += self.privateattribute
        def publicattribute(self):
            return self.inheritedattribute
    class Derived(Thing):
        def inheritedattribute(self):
            return self.derivedattribute
    print(Thing(2).publicattribute, library.thing.readattribute, library.make(namedattribute=1))
    print(getattr(Thing(3), "one wordedattribute"), Thing.A)
    """
    text = packed_text(pack_code(textwrap.dedent(source), {}))
    kept = set(re.findall(r"\w+attribute", text))
    names = ["field", "public", "read", "named", "worded", "inherited", "derived"]
    assert kept == {f"{name}attribute" for name in names}
    assert "self.private" not in text and len(set(re.findall(r"\.([A-Z])\b", text))) == 3


OWN_WORDS = """
import library
from dataclasses import dataclass
from typing import NamedTuple
class Pair(NamedTuple):
    left_word: str
    right_word: list[int] = ()
@dataclass
class Settings:
    saved_word: int
class GPT:
    def __init__(self):
        self.parameter_word = 1
class Thing:
    def __init__(self):
        self.kept_word = self.asked_word = self.given_word = self.quoted_word = 1
        self.deep_word = self.__special_word__ = self.singleword = 2
    def method_word(self, kept_word):
        return Pair(left_word=kept_word, right_word=self.kept_word)._replace(left_word=3)
print(Thing().singleword, GPT().parameter_word)
print(Thing().method_word(kept_word=1), library.asked_word, library.make(given_word=1), "a quoted_word",
      library.one.deep_word)
def plain_word(one, *, two):
    return one, two
print(plain_word(one=1, two=2), plain_word(*[1], two=2), Pair(right_word=1, left_word=2))
"""


def test_words_of_our_classes_are_shortened_wherever_they_stand_but_for_those_known_outside():
    text = packed_text(pack_code(OWN_WORDS, {}))
    kept = set(re.findall(r"\w+word\w*", text))
    names = {"saved_word", "parameter_word", "asked_word", "given_word", "quoted_word", "deep_word"}
    assert kept == names | {"__special_word__", "singleword"}


def test_keywords_at_their_place_are_given_in_order_and_types_of_tuples_dropped():
    text = packed_text(pack_code(OWN_WORDS, {}))
    assert "list" not in text and "saved_word:int" in text
    assert "(1,two=2)" in text  # an argument by keyword alone stays one
    assert re.search(r"return \w+\(\w+,\w+\.\w+\)\._replace\(", text)  # Pair of two


def test_words_that_libraries_know_are_kept():
    """Attributes of objects that the script gets from libraries, as far as their classes say."""
    classes = [torch.Tensor, np.ndarray, torch.nn.Module, torch.optim.AdamW, torch.optim.SGD, Path]
    classes += [torch.Generator, torch.cuda.Event, torch.cuda.CUDAGraph, torch.cuda.Stream]
    classes += [str, bytes, bytearray, dict, list, set, tuple, float, BytesIO, ThreadPoolExecutor]
    classes += [brotli.Decompressor, sentencepiece.SentencePieceProcessor, np.random.Generator]
    classes += [torch.device, torch.dtype, np.dtype, np.memmap, Struct, SimpleNamespace, Future]
    in_libraries = {name for cls in classes for name in dir(cls)}
    for text in (SOURCE, f"{SOURCE}\n{packer.PUBLISHED.read_text()}"):
        tree = ast.parse(text)
        own = packer.own_names(tree) - packer.names_known_outside(tree)
        assert {
            name for name in own & in_libraries if "_" in name[1:] and name[:2] != "__"
        } == set()


SMALL = """
PACKED = False
class Hyperparameters:
    seed: int = env(42, "help of the seed")
    matrix_lr: float = env(0.026, "help of the rate", above=0)
    gate: bool = env(True, "help of the gate")
    compressor: str = env("entropy", "help of the coder")
def mean(x):
    return sum(x)
def train(x):
    return mean(x)
train(1)
"""


def test_settings_of_a_run_become_defaults_but_for_those_that_belong_to_one_run():
    settings = {
        "SEED": "7",
        "MATRIX_LR": ".05",
        "GATE": "0",
        "COMPRESSOR": "brotli",
        "PATH": "/bin",
    }
    text = packed_text(pack_code(SMALL, settings))
    assert re.search(r"seed:int=\w+\(42,", text) and re.search(r"matrix_lr:float=\w+\(\.05,", text)
    assert re.search(r"gate:bool=\w+\(False,", text) and re.search(
        r"compressor:str=\w+\('brotli',", text
    )
    assert text.count("help of") == 4
    values = {"SEED": 1, "MATRIX_LR": 0.05, "GATE": False, "COMPRESSOR": "brotli"}
    assert pack_code(SMALL, settings) == pack_code(SMALL, values)
    assert (
        pack_code(SMALL, {})
        == pack_code(SMALL, {"MATRIX_LR": "0.026"})
        != pack_code(SMALL, settings)
    )


def test_a_packed_script_knows_that_it_is_packed():
    """It looks for no guard beside it: PACKED may have another name there, and is true."""
    text = packed_text(pack_code(SMALL + "print('packed:', PACKED)\n", {}))
    name = re.search(r"print\('packed:',(\w+)\)", text)[1]
    assert re.search(rf"^{name}=(True|1|not 0)\b", text, re.M), text


def test_what_only_the_unpacked_script_does_is_not_packed():
    source = SMALL + (
        "def find(x):\n    if PACKED:\n        return 'alone'\n    return 'not alone' + x\n"
        "print(find(''))\n"
    )
    text = packed_text(pack_code(source, {}))
    assert "'alone'" in text and "not alone" not in text


HOOKS = """
class Guard:
    "Hooks."
    def begin(self, what):
        "Called first."
    def commit(self):
        "Called for its value."
    def number(self):
        "Called for its value and has one."
        return 7
    def only_unpacked(self):
        "Nobody calls it."
        return 8
class Other:
    def begin(self, what):
        print("begins:", what)
guard = Guard()
guard.begin(1)
Other().begin(2)
print("values:", guard.commit(), guard.number())
"""


def test_calls_of_hooks_that_do_nothing_are_not_packed(tmp_path):
    packed = pack_code(HOOKS, {})
    (tmp_path / "packed.py").write_bytes(packed)
    text = packed_text(packed)
    assert "begins: 2\nvalues: None 7" in run_script(tmp_path / "packed.py")
    assert "begins: 1" not in text and len(re.findall(r"\.begin\(", text)) == 1
    assert "7" in text and not re.search(r"\b8\b", text)


def test_constants_of_kernels_have_short_names_that_nothing_else_has():
    trees = [ast.parse(text) for text in (SOURCE, packer.PUBLISHED.read_text())]
    kernels = [node for tree in trees for node in ast.walk(tree) if packer.is_kernel(node)]
    arguments = [argument for kernel in kernels for argument in kernel.args.args]
    constants = {a.arg for a in arguments if a.annotation and len(a.arg) > 1}
    in_kernels = {id(node) for kernel in kernels for node in ast.walk(kernel)}
    everywhere = [node for tree in trees for node in ast.walk(tree) if id(node) not in in_kernels]
    names = {node.id for node in everywhere if isinstance(node, ast.Name)}
    names |= {node.attr for node in everywhere if isinstance(node, ast.Attribute)}
    assert "BLOCK" in constants and not constants & names
    text = packed_text(pack_code(SOURCE, {}))
    assert not re.search(rf"\b({'|'.join(constants)})\b(?!')", text)
    assert len(re.findall(r":tl\.constexpr", text)) == sum(bool(a.annotation) for a in arguments)


def test_the_shortest_of_several_compressions_is_taken():
    script = SOURCE[:20_000].encode()
    found = packer.compress(script)
    assert brotli.decompress(found).lstrip() == script.lstrip()
    assert len(found) <= len(brotli.compress(script))


PARTS = """
"Parts."
import math
import train_gpt
from train_gpt import env
class Hyperparameters(train_gpt.Hyperparameters):
    compressor: str = env("entropy", "help of more coders")
    swa: float = env(0.0, "help of snapshots")
own_mean = train_gpt.mean
def mean(x):
    return own_mean(x) + math.fsum(x)
PARTS = {"Hyperparameters": Hyperparameters, "mean": mean}
def main():
    "not packed"
"""


@pytest.mark.parametrize(
    "settings", [{"SWA": "0.5"}, {"COMPRESSOR": "pergroup"}, {"COMPRESSOR": "lzma"}]
)
def test_published_parts_are_packed_where_a_setting_needs_them(tmp_path, monkeypatch, settings):
    (tmp_path / "published.py").write_text(PARTS)
    monkeypatch.setattr(packer, "PUBLISHED", tmp_path / "published.py")
    for plain in ({"MATRIX_LR": "1"}, {"SWA": "0.0"}, {"COMPRESSOR": "brotli"}):
        assert "fsum" not in packed_text(pack_code(SMALL, plain))
    text = packed_text(pack_code(SMALL, settings))
    assert "fsum" in text and "train_gpt" not in text and "PARTS" not in text
    if "SWA" in settings:
        assert re.search(r"swa:float=\w+\(\.5,", text)


@pytest.mark.parametrize(
    "clash, name",
    [
        ("def train(x):\n    return x", "train"),  # takes a place that PARTS does not name
        ("def f(mean):\n    return train_gpt.mean(mean)", "mean"),  # would be the argument
        ("def f():\n    mean = train_gpt.mean(1)", "mean"),
    ],
)
def test_a_name_that_would_stand_for_two_things_is_refused(tmp_path, monkeypatch, clash, name):
    monkeypatch.setattr(packer, "PUBLISHED", tmp_path / "published.py")
    (tmp_path / "published.py").write_text(PARTS.replace("PARTS =", f"{clash}\nPARTS ="))
    with pytest.raises(ValueError, match=f"'{name}'"):
        pack_code(SMALL, {"SWA": "0.5"})


def test_settings_that_belong_to_one_run_are_settings():
    assert set(packer.OF_A_RUN) <= {
        field.name for field in dataclasses.fields(train_gpt.Hyperparameters)
    }


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The packed script of the default settings, in a file."""
    path = tmp_path_factory.mktemp("packed") / "packed_script.py"
    path.write_bytes(pack_code(SOURCE, {}))
    return path


def test_a_lost_terminal_does_not_end_a_packed_script(packed):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, packed, "--help"], stdout=full, stderr=full, timeout=PATIENCE
        )
    assert done.returncode == 0


def operator_of(name):
    """Code for an operator of the packed script: its name is another, its place is the same."""
    defined = [value for value in vars(train_gpt).values() if isinstance(value, CustomOpDef)]
    names = [operator._opoverload._schema.name.removeprefix("golf::") for operator in defined]
    number = names.index(name)
    kind = "torch._library.custom_ops.CustomOpDef"
    return f"[op for op in vars(packed).values() if isinstance(op, {kind})][{number}]"


def with_operators(driver):
    """GOLF.name in a driver becomes an operator of the packed script."""
    return re.sub(r"GOLF\.(\w+)", lambda found: operator_of(found[1]), textwrap.dedent(driver))


def test_operators_of_the_packed_script_are_differentiable(packed):
    """Kernels in the interpreter: PyTorch calls into them by the names of parameters that it
    documents.
    """
    driver = """
        import torch, torch.nn.functional as F, packed_script as packed
        torch.manual_seed(0)
        h, head = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
        targets = torch.arange(5)
        y, v, gates = (torch.randn(1, 7, *shape, requires_grad=True) for shape in ((4, 8), (2, 8), (4,)))
        along = F.normalize(v, dim=-1).repeat_interleave(2, 2)
        xsa = (y - (y * along).sum(-1, keepdim=True) * along) * gates.sigmoid()[..., None]
        qkv, gain = torch.randn(1, 7, 64, requires_grad=True), torch.ones(4)
        cos, sin = torch.ones(7, 1, 2), torch.zeros(7, 1, 2)
        q = F.rms_norm(qkv.unflatten(-1, (8, 8))[:, :, :4], (8,), eps=1.19e-7)
        pairs = [(GOLF.linear_cross_entropy(h, head, targets, 30.0)[0], (h, head),
                  F.cross_entropy(30 * torch.tanh(h @ head.T / 30), targets, reduction="none")),
                 (GOLF.gated_xsa(y, v, gates), (y, v, gates), xsa),
                 (GOLF.qkv_heads(qkv, gain, cos, sin, 2)[0], (qkv,), q)]
        for got, inputs, want in pairs:
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            for a, b in zip(*(torch.autograd.grad(out.pow(3).sum(), inputs) for out in (got, want))):
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
        print("equal")
        """
    pytest.importorskip("triton")
    environ = HERE | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(packed.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", with_operators(driver)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout == "equal\n", done.stderr


def test_the_packed_script_keeps_the_names_that_quack_calls_operands_by(packed):
    driver = """
        import quack_stub, torch, packed_script as packed
        quack_stub.install()
        x, up, down = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((6, 16), (32, 16), (16, 32)))
        outs = [GOLF.mlp(x, up, down, 0.3)[0],
                torch.nn.functional.leaky_relu(x @ up.T, 0.3).square() @ down.T]
        for got, want in zip(*([out, *torch.autograd.grad(out.sum(), (x, up, down))] for out in outs)):
            assert ((got - want).float().norm() / want.float().norm()).item() < 0.02
        print(quack_stub.EpiMod.calls)
        """
    paths = os.pathsep.join([str(packed.parent), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", with_operators(driver)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=HERE | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.stdout == "[(6, 32, 16, False), (6, 32, 16, True)]\n", done.stderr


OTHERWISE = {  # as many other branches as one run can take
    "COMPRESSOR": "lzma",
    "SLIDING_WINDOW_ENABLED": "1",
    "NUM_LOOPS": "0",
    "PARALLEL_START_LAYER": "3",
    "XSA_LAST_N": "0",
    "TIE_EMBEDDINGS": "0",
    "SKIP_GATES_ENABLED": "0",
    "SMEAR_GATE_ENABLED": "0",
    "SPARSE_ATTN_GATE_ENABLED": "0",
    "ATTN_OUT_GATE_ENABLED": "1",
    "ATTN_OUT_GATE_SRC": "q",
    "LN_SCALE": "0",
    "WD_SCHEDULE_ENABLED": "1",
    "DATA_SEED": "3",
    "MARKER_FUSION_ENABLED": "0",
    "MUON_OUTWARD": "1",
    "GRAD_CLIP_NORM": "0",
    "MUON_MOMENTUM_WARMUP_STEPS": "0",
    "GPTQ_COLUMN_STEPS": "0",
    "LQER_ENABLED": "1",
    "LQER_ASYM_ENABLED": "0",
    "ATTN_WINDOW": "9",
    "PARTIAL_KEY_OFFSET": "1",
    "VALUE_RESIDUAL": "gate",
    "BIGRAM_VOCAB_SIZE": "31",
    "VALUE_EMBED_LAYERS": "1",
    "MUON_HEAD_PAIRS": "1",
    "SWA_BELOW_LR": "0.9",
    "SWA_EVERY": "1",
    "QAT_BELOW_LR": "0.5",
    "GPTQ_SELF_CALIBRATION": "1",
    "PHASED_TTT_NUM_PHASES": "0",
    "TTT_WARM_START_A": "0",
    "TTT_LORA_SITES": "q,head",
    "VAL_LOSS_EVERY": "2",
    "TTT_STALE_CONTEXT": "0",
    "TTT_SHORT_CHUNKS": "30:8",
    "NGRAM_TILT_ENABLED": "1",
    "NGRAM_TILT_ORDERS": "2,4",
}
UNLIKE = {"run", "seconds", "training_seconds", "tokens_per_second_by_loop_state", "commit"}


def run_both(folder, monkeypatch, settings, run):
    """Packed script without and source with these settings: the same RESULT and artifact."""
    script = folder / "packed.py"
    settings = run_files.with_preset(settings)
    install_parts_for(settings, monkeypatch)
    script.write_bytes(pack_code(SOURCE, settings))

    def call():
        environ = HERE | run | {"OMP_NUM_THREADS": "1", "RUN_ID": "packed"}
        return subprocess.run(
            [sys.executable, "-I", script],
            env=environ,
            text=True,
            capture_output=True,
            timeout=PATIENCE,
        )

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(call)
        monkeypatch.setattr(train_gpt, "write_code", lambda *_: script.stat().st_size)
        watching = QuietGuard()
        watching.start(dist := train_gpt.Dist("cpu"))
        hp = train_gpt.Hyperparameters.from_env(settings | run | {"RUN_ID": "source"}, watching)
        wanted = json.loads(json.dumps(train_gpt.run(hp, dist, watching)))
        done = other.result()
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert (
        got.keys() == wanted.keys() - {"group_bytes"}  # which the guard alone counts
        and [key for key in got if key not in UNLIKE and got[key] != wanted[key]] == []
    )
    assert (folder / "packed" / "artifact.bin").read_bytes() == (
        folder / "source" / "artifact.bin"
    ).read_bytes()
    return got


@pytest.fixture
def of_the_run(tmp_path):
    """Settings of one run: its data and where it writes."""
    (tmp_path / "data").mkdir()
    make_data(tmp_path / "data")
    paths = {"DATA_PATH": str(tmp_path / "data"), "RUNS_DIR": str(tmp_path)}
    return paths | {"TOKENIZER_PATH": SETTINGS["TOKENIZER_PATH"]}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[IN_SOAK] if n != "pr1493" else []) for n in PUBLISHED]
)
def test_a_packed_preset_gives_the_numbers_of_its_source(of_the_run, tmp_path, monkeypatch, name):
    # as its data are
    settings = tiny(name, tmp_path, tmp_path) | {"VOCAB_SIZE": "8192", "CASEOPS_ENABLED": "1"}
    settings = {key: value for key, value in settings.items() if key not in (*of_the_run, "RUN_ID")}
    got = run_both(tmp_path, monkeypatch, settings, of_the_run)
    assert ("ttt" in got["scores"]) == (name != "pr1512") and got["steps"] == 3


def test_a_packed_script_gives_the_numbers_of_its_source(
    of_the_run, tmp_path, monkeypatch, published
):
    names = {field.name.upper() for field in dataclasses.fields(train_gpt.Hyperparameters)}
    settings = {
        name: value for name, value in SETTINGS.items() if name in names and name not in of_the_run
    }
    got = run_both(tmp_path, monkeypatch, settings | OTHERWISE, of_the_run)
    assert "ttt" in got["scores"] and "sliding" in got["scores"]
