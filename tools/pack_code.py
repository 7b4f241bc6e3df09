"""Packs a script into the file that is counted: without what its settings do not use, minified, brotli, in a literal.

usage: [NAME=value...] python tools/pack_code.py train_gpt.py OUT

Packed for the settings of the environment, as a run with them packs it. Kept outside train_gpt.py: a packed script
never packs anything, so none of this costs a counted byte. What settings take out: tools/specialise.py.
"""

import ast
import builtins
import itertools
import os
import sys
from collections import defaultdict
from pathlib import Path

import brotli
import python_minifier

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.run_files import with_preset  # noqa: E402
from tools.specialise import specialise  # noqa: E402

PACKED_START = b"#coding:l1\nimport brotli,io,linecache\nn=0\nfor c in'''"
PACKED_END = b"""''':c=ord(c);n=n*253+c-1-(c>13)-(c>92)
S=brotli.decompress(n.to_bytes(%d)).decode()
linecache.cache[__file__]=len(S),None,[*io.StringIO(S)],__file__;exec(compile(S,__file__,'exec'))
"""


def is_packed(source):
    """Whether these bytes are a packed script."""
    return source.startswith(PACKED_START)


class DropWords(ast.NodeTransformer):
    """What documents or asserts only: the help text of a setting, `env(default, help, ...)`, and `zip(strict=True)`."""

    def visit_Call(self, node):
        self.generic_visit(node)
        name = getattr(node.func, "id", None)
        if name == "env" and len(node.args) == 2:
            node.args[1] = ast.Constant("")
        if name == "zip":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
        return node


def free_parameters(tree):
    """Makes parameters positional-only up to the first that a call names: the minifier then renames them.

    It writes them as plain parameters again. Otherwise it would keep the names, for callers that it cannot see. There
    are none for a function whose name stands nowhere but in calls; one that is handed on may be a library's to call,
    as PyTorch calls `setup_context(ctx=..., inputs=..., output=...)`. Arguments go in order
    to lambdas, to what golf_op is given and to the operations among the candidates of select_ops.
    """
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    in_order = "golf_op", "candidates"
    known = {id(node) for call in calls for node in [call.func] + call.args * (name_of(call.func) in in_order)}
    handed_on = {name_of(node) for node in ast.walk(tree) if name_of(node) and id(node) not in known}
    named = defaultdict(set)
    for call in calls:
        named[name_of(call.func)].update(keyword.arg for keyword in call.keywords)
    owner = {part: cls for cls in ast.walk(tree) if isinstance(cls, ast.ClassDef) for part in cls.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Lambda):
            node.args.posonlyargs, node.args.args = node.args.args, []
        elif isinstance(node, ast.FunctionDef) and not node.args.posonlyargs and node.name not in handed_on:
            name = owner[node].name if node.name == "__init__" else node.name
            if name.startswith("__") or None in named[name]:
                continue
            names = [argument.arg in named[name] for argument in node.args.args]
            free = names.index(True) if True in names else len(names)
            node.args.posonlyargs, node.args.args = node.args.args[:free], node.args.args[free:]


def name_of(node):
    """The name of a variable or an attribute that is read, None for other expressions."""
    return getattr(node, "id", getattr(node, "attr", None)) if isinstance(node, (ast.Name, ast.Attribute)) else None


def names_to_keep(tree):
    """Named arguments of kernels, and globals that must keep their names.

    The minifier's `A=BLOCK` would make a kernel's constexpr a tensor, and a kernel may not read an alias of a builtin.
    Operators and kernels go by their names in profiles; aliases of builtins would cost bytes.
    """
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    kernels = [node for node in functions if any("jit" in ast.unparse(d) for d in node.decorator_list)]
    arguments = {argument.arg for kernel in kernels for argument in kernel.args.args + kernel.args.kwonlyargs}
    used = {node.id for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.Name)}
    named = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    return sorted(arguments), sorted(used.union(named, dir(builtins)))


def string_literal(data):
    """Bytes -> the inside of a '''literal''' of a latin-1 source: a number of digits 0..252, highest first.

    The digits are the 256 characters without NUL, CR and the backslash, which Python reads as something else.
    """
    digits, number = bytearray(), int.from_bytes(data)
    while number:
        number, low = divmod(number, 253**1000)
        for _ in range(1000):
            low, digit = divmod(low, 253)
            digits.append(digit + 1 + (digit > 11) + (digit > 89))
    text = bytes(digits[::-1]).lstrip(b"\1").replace(b"'''", rb"''\'")
    return text[:-1] + rb"\'" if text.endswith(b"'") else text


def clean_shared_nodes(source):
    """CPython shares nodes without fields (Load, Add) between all trees, and the minifier hangs its tree on them.

    Left there, every later copy.deepcopy of any syntax tree in this process would copy our whole script with it:
    FlashAttention-4 copies trees while it compiles, which took minutes instead of seconds.
    """
    for node in ast.walk(ast.parse(source)):
        if not node._fields:
            vars(node).clear()


def pack_code(source, settings):
    """Source of a script, {NAME: value or text} -> bytes of a script that does the same with these settings.

    ValueError if it is not Python. Settings that are not given have their defaults.
    The code is put in linecache under the script's own name before it runs, because Triton reads the source of its
    kernels there. Annotations stay: dataclass fields and custom_op schemas are made of them.
    """
    try:
        tree = specialise(DropWords().visit(ast.parse(source)), settings)
    except SyntaxError as error:
        raise ValueError(f"the script cannot be minified: {error}") from error
    free_parameters(tree)
    named_arguments, kept_globals = names_to_keep(tree)
    text = ast.unparse(tree)
    try:
        small = python_minifier.minify(
            text,
            remove_annotations=False,
            remove_literal_statements=True,
            remove_asserts=True,
            hoist_literals=False,
            preserve_locals=named_arguments,
            rename_globals=True,
            preserve_globals=kept_globals,
            preserve_shebang=False,
        )
    except python_minifier.UnstableMinification as error:
        raise ValueError(f"the script cannot be minified: {error}") from error
    finally:
        clean_shared_nodes(text)
    modes = itertools.product((brotli.MODE_GENERIC, brotli.MODE_TEXT, brotli.MODE_FONT), (0, 16, 17, 18))
    forms = (brotli.compress(small.encode(), mode, quality=11, lgwin=24, lgblock=block) for mode, block in modes)
    data = min(forms, key=len)
    return PACKED_START + string_literal(data) + PACKED_END % len(data)


def main():
    """Command line: packs one script and says how many bytes it counts."""
    if len(sys.argv) != 3:
        sys.exit("usage: python tools/pack_code.py train_gpt.py OUT")
    script, target = map(Path, sys.argv[1:])
    try:
        packed = pack_code(script.read_bytes().decode(), with_preset(os.environ))
        target.write_bytes(packed)
    except (OSError, ValueError) as error:
        sys.exit(f"pack_code.py: {script}: {error}")
    print(f"{target}: {len(packed)} bytes")


if __name__ == "__main__":
    main()
