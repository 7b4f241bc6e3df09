"""Packs a script into the file that is counted: minified, compressed, unpacking itself.

usage: [NAME=value...] python tools/pack_code.py train_gpt.py OUT

The packed script is the same program: it takes and checks the same settings and prints the same
--help. The settings of the run that packs it, here those of the environment, are its defaults, so
that it repeats the run without any. Where the run uses a setting of presets/published.py, the
definitions of that file are in it.
"""

import ast
import builtins
import math
import os
import re
import string
import sys
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

import brotli
import python_minifier
from python_minifier.rename import renamer

# they belong to one run and one machine: packed scripts have the defaults of the source
OF_A_RUN = """
    seed preset run_id runs_dir plots data_path tokenizer_path prequant_only quant_only
    ttt_eval_only checkpoint_path
    artifact_path checkpoint_every resume
""".split()
PUBLISHED = Path(__file__).resolve().parents[1] / "presets" / "published.py"
# lines of PUBLISHED that find train_gpt.py and import it
NOT_PACKED = "ROOT", "import train_gpt", "from train_gpt"
MODEL = "GPT"  # class whose attributes are parameters, with names in files
NAME_FIELDS = "id", "attr", "arg", "name"  # of syntax nodes
IN_ORDER = "register_fake", "register_autograd"
PACKED_START = b"#coding:l1\nimport brotli,io,linecache\nn=0\nfor c in r'''"
PACKED_END = b"""''':c=ord(c);n=n*254+c-1-(c>13)
S=brotli.decompress(n.to_bytes(%d)[1:]).decode()
F=__file__
linecache.cache[F]=len(S),None,[*io.StringIO(S)],F
exec(compile(S,F,'exec'))
"""


def is_packed(source):
    """Whether these bytes are a packed script, also one of an older packer."""
    return source.startswith(PACKED_START.partition(b"n=0")[0])


# ---- the settings of the run


def declarations(tree):
    """{name of a setting: its statement `name: type = env(default, ...)`}; {} for another
    script than train_gpt.py.
    """
    classes = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "Hyperparameters"
    ]
    parts = [part for node in classes for part in node.body]
    return {part.target.id: part for part in parts if isinstance(part, ast.AnnAssign)}


def changed_settings(tree, settings):
    """{NAME: value or its text} -> {name: value} of those that differ from the defaults in the
    source.
    """
    types = {"int": int, "float": float, "str": str, "bool": lambda text: text == "1"}
    changed = {}
    for name, statement in declarations(tree).items():
        default = ast.literal_eval(statement.value.args[0])
        value = settings.get(name.upper(), default)
        if isinstance(value, str):
            value = types[statement.annotation.id](value)
        if value != default:
            changed[name] = value
    return changed


def set_defaults(tree, changed):
    """Makes changed settings the defaults, but for those that belong to one run."""
    for name, statement in declarations(tree).items():
        if name in changed and name not in OF_A_RUN:
            statement.value.args[0] = ast.parse(repr(changed[name]), mode="eval").body


def local_names(function):
    """Names of a function's parameters and of what it assigns to."""
    found = set()
    for part in ast.walk(function):
        if isinstance(part, ast.arg):
            found.add(part.arg)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            found.add(part.id)
    return found


class WithoutPrefix(ast.NodeTransformer):
    """`train_gpt.name` -> `name`; `names` are these names."""

    def __init__(self):
        self.names = set()

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if getattr(node.value, "id", None) != "train_gpt":
            return node
        self.names.add(node.attr)
        return ast.Name(node.attr, node.ctx)


def needs_published(tree, published, settings):
    """Whether presets/published.py has what these settings ask for: a setting of its own that is
    changed, or a coder that only published systems use.
    """
    changed = changed_settings(published, settings)
    own = changed.keys() - declarations(tree).keys()
    return bool(own) or changed.get("compressor") in ("lzma", "pergroup")


def add_published(tree, published):
    """Puts the definitions of presets/published.py behind those of the script, before its last
    statement, which runs it.

    There `train_gpt.name` becomes `name`; a class or a function of the same name as one of the
    script takes its place, as PARTS says. ValueError where a name would stand for two things.
    """
    statements = []
    parts = set()
    # without the docstring, and without the table of parts and what follows, which installs them
    for node in published.body[1:]:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PARTS":
            parts = {key.value for key in node.value.keys}
            break
        if not any(name in ast.unparse(node) for name in NOT_PACKED):
            statements.append(node)
    if twice := (defined_names(statements) & defined_names(tree.body)) ^ parts:
        raise ValueError(f"{PUBLISHED.name}: PARTS must name what takes a place: {sorted(twice)}")
    functions = [
        part
        for node in statements
        for part in ast.walk(node)
        if isinstance(part, (ast.FunctionDef, ast.Lambda))
    ]
    nested = set().union(*map(local_names, functions))
    prefix = WithoutPrefix()
    statements = [prefix.visit(node) for node in statements]
    if hidden := prefix.names & nested:
        raise ValueError(f"{PUBLISHED.name}: names of train_gpt.py hidden: {sorted(hidden)}")
    tree.body[-1:-1] = statements


def defined_names(statements):
    """Names of functions, classes and variables at module level, but for imports."""
    found = set()
    for node in statements:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {part.id for part in ast.walk(node.targets[0]) if isinstance(part, ast.Name)}
    return found


def mark_as_packed(tree):
    """Sets PACKED, and drops what follows `if PACKED: return ...` in a function."""
    for node in tree.body:
        if ast.unparse(node) == "PACKED = False":
            node.value = ast.Constant(True)
        elif isinstance(node, ast.FunctionDef):
            for number, part in enumerate(node.body):
                if isinstance(part, ast.If) and ast.unparse(part.test) == "PACKED":
                    node.body[number:] = part.body


class WithoutHooks(ast.NodeTransformer):
    """Drops statements that call a hook: a method of the class Guard that is a docstring alone.

    A packed script has no other guard: 143 bytes. Methods that nothing asks for then go as well.
    """

    def __init__(self, tree):
        guards = [node for node in tree.body if getattr(node, "name", None) == "Guard"]
        methods = [part for node in guards for part in node.body[1:]]  # behind the docstring
        self.hooks = {part.name for part in methods if isinstance(part.body[-1], ast.Expr)}
        self.visit(tree)
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        asked = {node.attr for node in attributes if name_of(node.value) == "guard"}
        for node in guards:
            node.body = [part for part in methods if part.name in asked] or [ast.Pass()]

    def visit_Expr(self, node):
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            if name_of(call.func.value) == "guard" and call.func.attr in self.hooks:
                return ast.Pass()
        return node


# ---- minifying


def fields_of(cls):
    """The statements `name: type` or `name: type = value` of a class."""
    return [part for part in cls.body if isinstance(part, ast.AnnAssign)]


def is_tuple(cls):
    """Whether a class is a NamedTuple: a dataclass may be asked for the names of its fields."""
    return any(name_of(base) == "NamedTuple" for base in cls.bases)


class DropWords(ast.NodeTransformer):
    """What asserts or documents only: docstrings, `zip(..., strict=True)`, the cause in `raise
    error from cause`, and the types of a NamedTuple's fields.
    """

    def visit_Expr(self, node):
        self.generic_visit(node)
        if isinstance(node.value, ast.Constant):
            node.value.value = 0  # the minifier drops it
        return node

    def visit_ClassDef(self, node):
        self.generic_visit(node)
        for field in fields_of(node) if is_tuple(node) else []:
            field.annotation = ast.Name("int", ast.Load())
        return node

    def visit_Raise(self, node):
        self.generic_visit(node)
        node.cause = None
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if getattr(node.func, "id", None) == "zip":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
        return node


def give_in_order(tree):
    """Makes keywords positional where they stand at their place, in calls of the script's functions
    and classes of fields; not where a variable may have the name.
    """
    variables = local_names(tree)
    parameters = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            parameters[node.name] = [argument.arg for argument in node.args.args]
        elif isinstance(node, ast.ClassDef):
            parameters[node.name] = [field.target.id for field in fields_of(node)]
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            continue
        names = parameters.get(call.func.id, []) if call.func.id not in variables else []
        while call.keywords and call.keywords[0].arg in names[len(call.args) :][:1]:
            call.args.append(call.keywords.pop(0).value)


def free_parameters(tree):
    """Makes parameters positional-only up to the first that a call names: the minifier then renames
    them.

    It writes them as plain parameters again. Otherwise it would keep the names, for callers that it
    cannot see. There are none for a function whose name stands nowhere but in calls; one that is
    handed on may be a library's to call, as PyTorch calls `setup_context(ctx=..., inputs=...,
    output=...)`, though it calls the first argument of IN_ORDER with arguments in order. So it
    keeps its names if it is defined inside of another one or is an argument where the script calls
    what it does not define. All others that are handed on keep the names that any call of the
    script gives. Arguments go in order to lambdas.
    """
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    # what is called, or asked for an attribute, is not handed on by that
    known = {id(call.func) for call in calls}
    known |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    handed_on = {
        name_of(node) for node in ast.walk(tree) if name_of(node) and id(node) not in known
    }
    named = defaultdict(set)
    for call in calls:
        named[name_of(call.func)].update(keyword.arg for keyword in call.keywords)
    in_any_call = {keyword.arg for call in calls for keyword in call.keywords}
    defined = {
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    given_away = set()
    for call in calls:
        if name_of(call.func) not in defined:
            given_away |= {name_of(keyword.value) for keyword in call.keywords}
            if name_of(call.func) not in IN_ORDER:
                given_away |= {name_of(argument) for argument in call.args}
    at_top = {node for node in tree.body if getattr(node, "name", None) not in given_away}
    owner = {
        part: cls for cls in ast.walk(tree) if isinstance(cls, ast.ClassDef) for part in cls.body
    }
    for node in ast.walk(tree):
        if is_kernel(node):  # tensors and sizes are given in order, constants by name
            free = sum(argument.annotation is None for argument in node.args.args)
            node.args.posonlyargs = node.args.args[:free]
            node.args.args = node.args.args[free:]
        elif isinstance(node, ast.Lambda):
            node.args.posonlyargs = node.args.args
            node.args.args = []
        elif isinstance(node, ast.FunctionDef) and not node.args.posonlyargs:
            name = owner[node].name if node.name == "__init__" else node.name
            is_handed_on = node.name in handed_on or name.startswith("__")
            if is_handed_on and node not in owner and node not in at_top or None in named[name]:
                continue
            given = in_any_call if is_handed_on else named[name]
            names = [argument.arg in given for argument in node.args.args]
            free = names.index(True) if True in names else len(names)
            node.args.posonlyargs = node.args.args[:free]
            node.args.args = node.args.args[free:]


def shorten_own_words(tree):
    """Gives names of several words that our classes made up for attributes, methods and fields of
    tuples short names, wherever they stand.

    Libraries do not know them: left out are what an imported module is asked for, keywords of calls
    of what the script does not define, and words in strings. So are the fields of dataclasses and
    the parameters of models, whose names are in files. No class may take a name that an object of a
    library has (tests/test_pack_code.py).
    """
    known = names_known_outside(tree)
    own = {name for name in own_names(tree) - known if "_" in name[1:] and name[:2] != "__"}
    uses = Counter(getattr(node, field, "") for node in ast.walk(tree) for field in NAME_FIELDS)
    rename(tree, sorted(own, key=lambda name: (-uses[name], name)), known)


def shorten_constants(tree):
    """Gives the constants of kernels, which Triton takes by name, short names wherever they stand.

    No other variable has such a name (tests/test_pack_code.py).
    """
    kernels = [node for node in ast.walk(tree) if is_kernel(node)]
    arguments = [argument for kernel in kernels for argument in kernel.args.args]
    constants = dict.fromkeys(a.arg for a in arguments if a.annotation and len(a.arg) > 1)
    rename(tree, constants, set())


def rename(tree, words, taken):
    """Gives words, in their order, the shortest names that are neither taken nor used."""
    used = {getattr(node, field, "") for node in ast.walk(tree) for field in NAME_FIELDS}
    free = [name for name in short_names() if name not in used | taken]
    short = dict(zip(words, free, strict=False))
    for node in ast.walk(tree):
        for field in NAME_FIELDS:
            word = getattr(node, field, None)
            if word in short:
                setattr(node, field, short[word])


def own_names(tree):
    """Names of attributes that the script's classes set, of their methods, of fields of tuples."""
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            own.update(part.name for part in node.body if isinstance(part, ast.FunctionDef))
            own.update(field.target.id for field in fields_of(node) if is_tuple(node))
            own |= attributes_set(node)
    return own


def attributes_set(node):
    """Names of attributes that something is assigned to in a part of the script."""
    attributes = [part for part in ast.walk(node) if isinstance(part, ast.Attribute)]
    return {part.attr for part in attributes if isinstance(part.ctx, ast.Store)}


def names_known_outside(tree):
    """Names that libraries, strings and files may know, see shorten_own_words."""
    known = set()
    defined = {"_replace"}
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        if isinstance(node, ast.alias):
            imported.add(node.asname or node.name)
        if isinstance(node, ast.ClassDef) and not is_tuple(node):
            known.update(field.target.id for field in fields_of(node))
        if isinstance(node, ast.ClassDef) and node.name == MODEL:
            known |= attributes_set(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and root_of(node) in imported:
            known.add(node.attr)
        elif isinstance(node, ast.Call) and name_of(node.func) not in defined:
            known.update(keyword.arg for keyword in node.keywords)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            known.update(re.findall(r"\w+", node.value))
    return known | imported


def short_names():
    """A to Z, then pairs of letters."""
    letters = string.ascii_uppercase
    yield from letters
    yield from map("".join, product(letters, repeat=2))


def shorten_attributes(tree):
    """Gives attributes and methods that stand behind `self` alone, in classes without a base, the
    names A, B, C in the order in which they appear.

    Nobody but their class can ask for them: its objects are of no library's class, and the name
    stands nowhere else, as another attribute, a field, a keyword or a word in a string. Variables
    may have it, too.
    """
    all_classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    classes = [node for node in all_classes if not node.bases]
    methods = {part for cls in classes for part in cls.body if isinstance(part, ast.FunctionDef)}
    fields = {part for cls in all_classes for part in cls.body if part not in methods}
    in_fields = {part for field in fields for part in ast.walk(field)}
    behind_self = {}
    for cls in classes:
        attributes = [part for part in ast.walk(cls) if isinstance(part, ast.Attribute)]
        behind_self[cls] = [part for part in attributes if getattr(part.value, "id", "") == "self"]
    private = methods.union(*behind_self.values())
    others = set()
    for node in ast.walk(tree):
        is_variable = isinstance(node, (ast.Name, ast.arg)) and node not in in_fields
        if node not in private and not is_variable:
            texts = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
            others.update(*map(str.split, texts))
    names = [name for name in short_names() if name not in others]
    for cls, attributes in behind_self.items():
        short = {}
        for part in attributes:
            if part.attr not in others and not part.attr.startswith("__"):
                part.attr = short.setdefault(part.attr, names[len(short)])
        for part in methods.intersection(cls.body):
            part.name = short.get(part.name, part.name)


def name_of(node):
    """The name of a variable or an attribute that is read, None for other expressions."""
    return (
        getattr(node, "id", getattr(node, "attr", None))
        if isinstance(node, (ast.Name, ast.Attribute))
        else None
    )


def root_of(node):
    """What stands before the first dot of `a.b.c`, if it is a name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return name_of(node)


def decorators(function):
    """The names of a function's decorators."""
    return {name_of(getattr(node, "func", node)) for node in function.decorator_list}


def is_kernel(node):
    """Whether a statement is a Triton kernel, or a function that kernels call."""
    return isinstance(node, ast.FunctionDef) and "jit" in decorators(node)


def names_to_keep(tree):
    """Named arguments of kernels, and globals that must keep their names; to be asked behind
    free_parameters.

    The minifier's `A=BLOCK` would make a kernel's constexpr a tensor, and a kernel may not read an
    alias of a builtin. Aliases of builtins would cost bytes.
    """
    kernels = [node for node in ast.walk(tree) if is_kernel(node)]
    arguments = {
        argument.arg for kernel in kernels for argument in kernel.args.args + kernel.args.kwonlyargs
    }
    used = {
        node.id for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.Name)
    }
    names = {kernel.name for kernel in kernels}
    return sorted(arguments), sorted(used.union(dir(builtins)) - names)


def string_literal(data):
    """Bytes -> the inside of a raw r'''literal''' of a latin-1 source: a number of digits 0..253,
    highest first, whose bytes are the data behind one more byte.

    The digits are the 256 characters without NUL and CR, which Python reads as something else. The
    first byte is the smallest with which the literal ends where it should.
    """
    for first in range(1, 256):
        text = bytes(digits_of(int.from_bytes(bytes([first]) + data)))
        if b"'''" not in text and not text.endswith((b"'", b"\\")):
            return text
    raise ValueError("no raw string holds these bytes")


def digits_of(number):
    """A number -> its digits to the base of 254 as character codes, highest first."""
    digits = bytearray()
    while number:
        number, low = divmod(number, 254**1000)
        for _ in range(1000):
            low, digit = divmod(low, 254)
            digits.append(digit + 1 + (digit > 11))
    return digits[::-1].lstrip(b"\1")


def in_order(module):
    """The variables of a module in the order in which the minifier shall choose their short names:
    local ones as they appear, so that every function begins with A, B, C; then globals, the most
    used first.

    The minifier would go by the number of uses alone. Each function then has its own order of
    letters, which brotli cannot foresee: 620 bytes more.
    """

    def urgency(found):
        namespace, variable = found
        if isinstance(namespace, ast.Module):
            return variable.new_mention_count()
        return math.inf

    return sorted(renamer.all_bindings(module), key=urgency, reverse=True)


def compress(script):
    """The shortest of what brotli makes of a script in its modes, with blocks of two sizes."""
    modes = brotli.MODE_GENERIC, brotli.MODE_TEXT, brotli.MODE_FONT
    ways = product(modes, (0, 16))  # 0: brotli chooses the size; 16: 64 KB
    return min((brotli.compress(script, mode=mode, lgblock=size) for mode, size in ways), key=len)


def clean_shared_nodes(source):
    """CPython shares nodes without fields (Load, Add) between all trees, and the minifier hangs its
    tree on them.

    Left there, every later copy.deepcopy of any syntax tree in this process would copy our whole
    script with it: FlashAttention-4 copies trees while it compiles, which took minutes instead of
    seconds.
    """
    for node in ast.walk(ast.parse(source)):
        if not node._fields:
            vars(node).clear()


def pack_code(source, settings):
    """Source of a script, {NAME: value or text} -> bytes of a packed script with these defaults.

    It does the same. ValueError if it is not Python. The code is put in linecache under the
    script's own name before it runs, because Triton reads the source of its kernels there.
    Annotations stay: dataclass fields and custom_op schemas are made of them.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"the script cannot be minified: {error}") from error
    published = ast.parse(PUBLISHED.read_text(encoding="utf-8"))
    if declarations(tree) and needs_published(tree, published, settings):
        add_published(tree, published)
    set_defaults(tree, changed_settings(tree, settings))
    mark_as_packed(tree)
    WithoutHooks(tree)
    DropWords().visit(tree)
    give_in_order(tree)
    free_parameters(tree)
    shorten_own_words(tree)
    shorten_constants(tree)
    named_arguments, kept_globals = names_to_keep(tree)
    shorten_attributes(tree)
    text = ast.unparse(tree)
    renamer.sorted_bindings = in_order
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
    data = compress(small.encode())
    return PACKED_START + string_literal(data) + PACKED_END % (1 + len(data))


def main():
    """Command line: packs one script and says how many bytes it counts."""
    from run_files import with_preset  # beside this file

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
