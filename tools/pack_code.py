"""Packs a script into the file that is counted: minified, brotli, in a string literal that unpacks and runs itself.

usage: python tools/pack_code.py train_gpt.py OUT

Kept outside train_gpt.py: a packed script never packs anything, so none of this costs a counted byte.
"""

import ast
import builtins
import re
import sys
from pathlib import Path

import brotli
import python_minifier

PACKED_START = b"#coding:l1\nimport brotli,io,linecache;S=brotli.decompress('''"  # is_packed of train_gpt.py
PACKED_END = b"""'''.encode('l1')).decode()
linecache.cache[__file__]=len(S),None,[*io.StringIO(S)],__file__;exec(compile(S,__file__,'exec'))
"""


class DropHelp(ast.NodeTransformer):
    """Empties the help text of every setting, `env(default, help, ...)`: documentation, as docstrings are."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "env" and len(node.args) == 2:
            node.args[1] = ast.Constant("")
        return node


def names_to_keep(tree):
    """Argument names of kernels, and globals that must keep their names.

    The minifier's `A=BLOCK` would make a kernel's constexpr a tensor, and a kernel may not read an alias of a builtin.
    Classes, operators and kernels go by their names in messages and profiles; aliases of builtins would cost bytes.
    """
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    kernels = [node for node in functions if any("jit" in ast.unparse(d) for d in node.decorator_list)]
    arguments = {node.arg for kernel in kernels for node in ast.walk(kernel.args) if isinstance(node, ast.arg)}
    used = {node.id for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.Name)}
    named = [node.name for node in tree.body if isinstance(node, ast.ClassDef) or getattr(node, "decorator_list", ())]
    return sorted(arguments), sorted(used.union(named, dir(builtins)))


def string_literal(data):
    """Bytes -> the inside of a '''literal''' of a latin-1 source, escaped only where Python would read another byte."""
    text = data.replace(b"\\", rb"\\").replace(b"\r", rb"\r").replace(b"'''", rb"''\'")
    text = re.sub(rb"\0(?=[0-7])", rb"\\000", text).replace(b"\0", rb"\0")
    return text[:-1] + rb"\'" if text.endswith(b"'") else text


def clean_shared_nodes(source):
    """CPython shares nodes without fields (Load, Add) between all trees, and the minifier hangs its tree on them.

    Left there, every later copy.deepcopy of any syntax tree in this process would copy our whole script with it:
    FlashAttention-4 copies trees while it compiles, which took minutes instead of seconds.
    """
    for node in ast.walk(ast.parse(source)):
        if not node._fields:
            vars(node).clear()


def pack_code(source):
    """Source of a script -> bytes of a script that does the same. ValueError if it is not Python.

    The code is put in linecache under the script's own name before it runs, because Triton reads the source of its
    kernels there. Annotations stay: dataclass fields and custom_op schemas are made of them.
    """
    try:
        tree = DropHelp().visit(ast.parse(source))
        kernel_arguments, kept_globals = names_to_keep(tree)
        small = python_minifier.minify(
            ast.unparse(tree),
            remove_annotations=False,
            remove_literal_statements=True,
            remove_asserts=True,
            hoist_literals=False,
            preserve_locals=kernel_arguments,
            rename_globals=True,
            preserve_globals=kept_globals,
            preserve_shebang=False,
        )
    except (SyntaxError, python_minifier.UnstableMinification) as error:
        raise ValueError(f"the script cannot be minified: {error}") from error
    clean_shared_nodes(source)
    modes = (brotli.MODE_GENERIC, brotli.MODE_TEXT, brotli.MODE_FONT)
    packed = (string_literal(brotli.compress(small.encode(), mode, quality=11, lgwin=24)) for mode in modes)
    return PACKED_START + min(packed, key=len) + PACKED_END


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
