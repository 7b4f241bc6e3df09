"""Packed code: it runs as its source does, its literal keeps every byte, and a script that runs writes it."""

import ast
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import PATIENCE

import train_gpt

pytest.importorskip("brotli")
pytest.importorskip("python_minifier")

from tools.pack_code import PACKED_END, is_packed, pack_code, string_literal  # noqa: E402

ROOT = Path(train_gpt.__file__).parent
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
    print(__name__, __file__, sys.argv[1:], "def scale_kernel" in inspect.getsource(scale_kernel.fn))

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
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_packed_code_runs_as_its_source_does(tmp_path):
    pytest.importorskip("triton")
    # custom_op reads real annotations, so the sample is the script without the future import that makes them text
    source = SAMPLE.replace("OPERATOR", OPERATOR).replace("from __future__ import annotations\n", "")
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
    assert not is_packed(SAMPLE.encode()) and not is_packed(b"")
    assert not is_packed(Path(train_gpt.__file__).read_bytes())


def of_digits(*digits):
    """Bytes whose literal has these digits of base 253."""
    number = 0
    for digit in digits:
        number = number * 253 + digit
    return number.to_bytes((number.bit_length() + 7) // 8)


QUOTE = ord("'") - 2
RANDOM = random.Random(7).randbytes(10_000)


@pytest.mark.parametrize("data", [
    b"", b"'", b"\0\0", b"\0\0\1", RANDOM, RANDOM[::-1], b"\xff" * 500, of_digits(*range(1, 253)),
    of_digits(*[QUOTE] * 7), of_digits(9, 9, 12, 9, QUOTE, QUOTE), of_digits(252, 90, 89),
])
def test_literal_keeps_every_byte_even_where_a_copy_changes_line_ends(tmp_path, data):
    script = tmp_path / "literal.py"
    decode = PACKED_END.split(b"\n")[0] + b"\nDATA=n.to_bytes(%d)\n" % len(data)
    for copied in (b"\n", b"\r\n"):  # as git's autocrlf writes a file
        text = b"#coding:l1\nn=0\nfor c in'''" + string_literal(data) + decode
        assert b"\0" not in text and b"\r" not in text
        script.write_bytes(text.replace(b"\n", copied))
        names = {}
        exec(compile(script.read_bytes(), script, "exec"), names)
        assert names["DATA"] == data
    assert len(string_literal(RANDOM)) < 1.003 * len(RANDOM)


def test_packed_module_can_be_imported_and_shows_its_lines(tmp_path):
    source = (
        "class Sample:\n    value = '\\x0c\\u2028'\n    def fail(argument):\n"
        "        raise KeyError('here') if argument else None\n"
    )
    (tmp_path / "sample_module.py").write_bytes(pack_code(source, {}))
    (tmp_path / "use.py").write_text(
        "import traceback, sample_module\n"
        "Sample = next(value for value in vars(sample_module).values() if hasattr(value, 'fail'))\n"  # renamed
        "print(repr(Sample.value), sample_module.__name__)\n"
        "try:\n    Sample.fail(1)\nexcept KeyError:\n    print(traceback.format_exc())\n"
    )
    output = run_script(tmp_path / "use.py")
    assert output.startswith("'\\x0c\\u2028' sample_module") and "raise KeyError('here')if " in output


def test_docstrings_cost_no_code_bytes():
    body = "def f(argument):\n    {}return argument + 1\nprint(f(1))\n"
    documented = pack_code(body.format('"""A long explanation of everything."""\n    '), {})
    assert documented == pack_code(body.format(""), {})


def test_help_of_settings_costs_no_code_bytes():
    body = "def env(default, help, *, least=None):\n    return default, help\nprint(env(1, {}, least=0))\n"
    assert pack_code(body.format("'a long explanation of one setting'"), {}) == pack_code(body.format("''"), {})


def test_source_that_is_not_python_is_an_error():
    with pytest.raises(ValueError, match="minified"):
        pack_code("def f(:\n", {})


@pytest.mark.parametrize("module", ["python_minifier", "brotli", "tools.pack_code"])
def test_missing_packer_is_an_error_that_says_what_to_do(monkeypatch, tmp_path, dist, module):
    monkeypatch.delitem(sys.modules, "tools.pack_code")
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    with pytest.raises(train_gpt.SettingError, match=rf"{module}.*pip install .*packed train_gpt.py"):
        train_gpt.write_code(tmp_path, train_gpt.Hyperparameters(), dist)
    assert not list(tmp_path.iterdir())


def test_written_code_is_the_packed_script_and_packed_again_itself(monkeypatch, tmp_path, dist):
    size = train_gpt.write_code(tmp_path, train_gpt.Hyperparameters(), dist)
    written = tmp_path / "train_gpt.py"
    assert written.stat().st_size == size and is_packed(written.read_bytes())
    (tmp_path / "again").mkdir()
    monkeypatch.setattr(train_gpt, "__file__", str(written))
    monkeypatch.setattr(train_gpt, "PACKED", "what the packer writes there")
    monkeypatch.setitem(sys.modules, "tools.pack_code", None)
    assert train_gpt.write_code(tmp_path / "again", train_gpt.Hyperparameters(), dist) == size
    assert (tmp_path / "again" / "train_gpt.py").read_bytes() == written.read_bytes()


def test_command_line_writes_the_packed_script(tmp_path):
    script, tool = tmp_path / "script.py", ROOT / "tools" / "pack_code.py"
    script.write_text("print('packed', __file__)\n")
    assert run_script(tool, script, tmp_path / "out.py").strip().endswith(" bytes")
    assert run_script(tmp_path / "out.py") == f"packed {tmp_path / 'out.py'}\n"
    for arguments in [[], [tmp_path / "absent.py", tmp_path / "out.py"], [tool, tmp_path / "absent" / "out.py"]]:
        done = subprocess.run([sys.executable, tool, *arguments], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 1 and "pack_code.py" in done.stderr and "Traceback" not in done.stderr


def test_packing_leaves_nothing_on_the_syntax_nodes_that_python_shares():
    pack_code("def f(x):\n    y = [-a + 1 for a in x if not a or a < 2]\n    del x[0]\n    return y\n", {})
    tree = ast.parse("del a[0]\nb = c and d or not e\nf = g + h * -i < j\nk += ~l in m")
    assert {name for node in ast.walk(tree) if not node._fields for name in vars(node)} == set()
