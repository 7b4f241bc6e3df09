"""Packs a script into the two lines that are counted: minified, brotli, base85, and a line that unpacks and runs it.

usage: python tools/pack_code.py train_gpt.py OUT

Kept outside train_gpt.py: a packed script never packs anything, so none of this costs a counted byte.
"""

import ast
import base64
import sys
from pathlib import Path

import brotli
import python_minifier

PACKED_START = "import base64,brotli,linecache;S=brotli.decompress(base64.b85decode('"  # is_packed of train_gpt.py
PACKED_END = (
    "')).decode()\n"
    "linecache.cache[__file__]=len(S),None,[L+'\\n'for L in S.split('\\n')],__file__;"
    "exec(compile(S,__file__,'exec'),globals())\n"
)


def kernel_arguments(source):
    """Argument names of functions under a `jit` decorator: the minifier's `A=BLOCK` would make a constexpr a tensor."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            names |= {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
    return sorted(names)


def clean_shared_nodes(source):
    """CPython shares nodes without fields (Load, Add) between all trees, and the minifier hangs its tree on them.

    Left there, every later copy.deepcopy of any syntax tree in this process would copy our whole script with it:
    FlashAttention-4 copies trees while it compiles, which took minutes instead of seconds.
    """
    for node in ast.walk(ast.parse(source)):
        if not node._fields:
            vars(node).clear()


def pack_code(source):
    """Source of a script -> bytes of a script of two lines that does the same. ValueError if it is not Python.

    The code is put in linecache under the script's own name before it runs, because Triton reads the source of its
    kernels there. Annotations stay: dataclass fields and custom_op schemas are made of them.
    """
    try:
        small = python_minifier.minify(
            source,
            remove_annotations=False,
            remove_literal_statements=True,
            remove_asserts=True,
            hoist_literals=False,
            preserve_locals=kernel_arguments(source),
            preserve_shebang=False,
        )
    except (SyntaxError, python_minifier.UnstableMinification) as error:
        raise ValueError(f"the script cannot be minified: {error}") from error
    clean_shared_nodes(source)
    packed = base64.b85encode(brotli.compress(small.encode(), quality=11, lgwin=24)).decode()
    return (PACKED_START + packed + PACKED_END).encode()


def main():
    """Command line: packs one script and says how many bytes it counts."""
    if len(sys.argv) != 3:
        sys.exit("usage: python tools/pack_code.py train_gpt.py OUT")
    script, target = map(Path, sys.argv[1:])
    try:
        packed = pack_code(script.read_bytes().decode())
        target.write_bytes(packed)
    except (OSError, ValueError) as error:
        sys.exit(f"pack_code.py: {script}: {error}")
    print(f"{target}: {len(packed)} bytes")


if __name__ == "__main__":
    main()
