"""The form of the source: every bar is checked, and every check is shown to find a violation.

The measures come from the syntax tree, so that neither wrapped lines nor docstrings change them.
"""

import ast
import io
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tools/*.py"))
PRESETS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("presets/*.py"))
DATA_TOOLS = [
    "data/download.py",
    "lossless_caps.py",
    "prepare_caseops_data.py",
    "tokenizers/train_tokenizer.py",
]
TESTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/*.py"))
FILES = ["train_gpt.py", *TOOLS, *PRESETS, *DATA_TOOLS]
REPEATED_LINES = 6  # a run of so many equal lines is a repeat
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def nodes(tree, kind):
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


# ---- density and length


class Form(NamedTuple):
    """Measures of one file; BARS has the largest value of each."""

    expressions_a_statement: float
    expressions_a_line: float  # of lines that are not blank, comment or docstring
    tuple_assignments: float  # per 100 statements
    wide_assignments: int  # assignments to more than three targets
    longest_function: int
    longest_line: int


BARS = Form(
    expressions_a_statement=7.0,
    expressions_a_line=6.0,
    tuple_assignments=4.0,
    wide_assignments=2,
    longest_function=70,
    longest_line=100,
)
STILL_ABOVE = {}


def size(node):
    """Lines of a function or class, decorators included."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return node.end_lineno - first + 1


def docstring_lines(tree):
    lines = set()
    for node in nodes(tree, FUNCTION | ast.ClassDef | ast.Module):
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def code_lines(source, tree):
    """[(number, text)] of the lines that hold code, without blanks at the ends and comments."""
    text = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            text[line - 1] = text[line - 1][:column]
    documentation = docstring_lines(tree)
    found = []
    for number, line in enumerate(text, 1):
        if line.strip() and number not in documentation:
            found.append((number, line.strip()))
    return found


def measure(source):
    tree = ast.parse(source)
    expressions = len(nodes(tree, ast.expr))
    statements = max(1, len(nodes(tree, ast.stmt)))
    targets = [target for node in nodes(tree, ast.Assign) for target in node.targets]
    widths = [len(target.elts) for target in targets if isinstance(target, ast.Tuple)]
    return Form(
        expressions_a_statement=expressions / statements,
        expressions_a_line=expressions / max(1, len(code_lines(source, tree))),
        tuple_assignments=100 * len(widths) / statements,
        wide_assignments=sum(width > 3 for width in widths),
        longest_function=max(map(size, nodes(tree, FUNCTION)), default=0),
        longest_line=max(map(len, source.split("\n"))),
    )


def above_the_bars(source, allowed=None):
    """Sentences about the measures of a file that are above the bars, or above what is allowed."""
    limits = BARS._asdict() | (allowed or {})
    problems = []
    for name, value in measure(source)._asdict().items():
        if value > limits[name] + 0.005:  # the figures of STILL_ABOVE are rounded
            problems.append(f"{name}: {value:.2f}, at most {limits[name]}")
    return problems


@pytest.mark.parametrize("name", FILES)
def test_files_keep_the_bars(name):
    assert above_the_bars(read(name), STILL_ABOVE.get(name)) == []


LONG_FUNCTION = "def f():\n" + "    f()\n" * 70


@pytest.mark.parametrize(
    "measure_name, good, bad",
    [
        ("expressions_a_statement", "x = 1 + 2 + 3\n", "x = 1 + 2 + 3 + 4\n"),
        ("expressions_a_line", "x = f(1, 2, 3)\n", "x = 1; y = 2; z = 3; u = 4\n"),
        ("tuple_assignments", "x = 1\n" * 24 + "a, b = 1, 2\n", "a, b = 1, 2\n" * 2),
        ("wide_assignments", "a, b, c = x\n" * 3, "a, b, c, d = x\n" * 3),
        ("longest_function", LONG_FUNCTION[:-8], LONG_FUNCTION),
        ("longest_line", f"x = '{'x' * 94}'\n", f"x = '{'x' * 95}'\n"),
    ],
)
def test_a_measure_above_its_bar_is_found(measure_name, good, bad):
    def found(source):
        return [line for line in above_the_bars(source) if line.startswith(measure_name)]

    assert found(good) == []
    assert len(found(bad)) == 1


def test_wrapping_comments_and_docstrings_do_not_make_a_file_less_dense():
    body = "    return g(1, 2, [3, 4], k=5)\n"
    bare = measure("def f():\n" + body)
    commented = measure("def f():\n    # words\n\n" + body)
    assert commented.expressions_a_line == bare.expressions_a_line
    documented = measure('def f():\n    """Words.\n\n    More.\n    """\n' + body)
    lines = len(("def f():", body))
    assert documented.expressions_a_line * lines == bare.expressions_a_line * lines + 1
    wrapped = measure("def f():\n" + body.replace(", ", ",\n"))
    assert wrapped.expressions_a_statement == bare.expressions_a_statement


# ---- repeats


def repeated_runs(sources):
    """{name: source} -> [(place, place)] of runs of at least REPEATED_LINES equal code lines.

    Import statements are left out: sorted imports of the same modules are no repeat.
    """
    first_places, repeats = {}, []
    for name, source in sources.items():
        tree = ast.parse(source)
        imports = set()
        for node in nodes(tree, ast.Import | ast.ImportFrom):
            imports.update(range(node.lineno, node.end_lineno + 1))
        lines = [(n, text) for n, text in code_lines(source, tree) if n not in imports]
        follows = False  # the repeat before it already includes this window
        for start in range(len(lines) - REPEATED_LINES + 1):
            window = lines[start : start + REPEATED_LINES]
            key = tuple(text for _, text in window)
            place = f"{name}:{window[0][0]}"
            original = first_places.setdefault(key, place)
            if original != place and not follows:
                repeats.append((original, place))
            follows = original != place
    return repeats


def test_no_run_of_lines_is_repeated():
    repeats = repeated_runs({name: read(name) for name in FILES})
    known = {name for name, figures in STILL_ABOVE.items() if "repeats" in figures}
    new = [pair for pair in repeats if not known & {place.split(":")[0] for place in pair}]
    assert new == []
    for name in known:
        of_this_file = [pair for pair in repeats if any(p.startswith(name + ":") for p in pair)]
        assert len(of_this_file) <= STILL_ABOVE[name]["repeats"], of_this_file


@pytest.mark.parametrize("second", ["a.py", "b.py"])
def test_a_repeated_run_is_found_within_a_file_and_between_files(second):
    run = "".join(f"x{number} = {number}\n" for number in range(REPEATED_LINES))
    changed = run.replace("\n", "  # words\n\n").replace("x0", "if y:\n    x0")
    sources = {"a.py": run}
    sources[second] = sources.get(second, "") + "y = 1\n" + changed
    assert len(repeated_runs(sources)) == 1
    sources[second] = sources[second].replace("x3 = 3  #", "x3 = 4  #")
    assert repeated_runs(sources) == []


# ---- train_gpt.py stands alone


def repository_modules():
    """Names under which the files and folders of the repository could be imported."""
    files = {path.stem for path in ROOT.glob("*.py")}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    return files | folders


def imports_of_the_repository(tree):
    """Imports of the repository's own modules and packages, at any depth and in any form."""
    found = []
    for node in nodes(tree, ast.Import | ast.ImportFrom | ast.Call):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [ast.unparse(node.args[0]).strip("'\"")]
        relative = getattr(node, "level", 0) > 0
        if relative or {name.split(".")[0] for name in names} & repository_modules():
            found.append(ast.unparse(node))
    return found


LOADERS = set(
    "spec_from_file_location exec_module exec SourceFileLoader runpy run_path run_module".split()
)


def file_loaders(tree):
    """Places outside find_guard that run another file."""
    found = []
    for node in nodes(tree, ast.Attribute | ast.Name | ast.alias | ast.ImportFrom):
        # each kind of node has its name in another field
        names = {getattr(node, field, None) for field in ("attr", "id", "name", "module")}
        if names & LOADERS and not is_inside(node, tree, "find_guard"):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import runpy as r",
        "from runpy import run_module as go",
        "runpy.run_path('tools/guard.py')",
        "from importlib.util import spec_from_file_location as find",
        "f = exec",
    ],
)
def test_a_loader_of_files_is_found_under_any_name(line):
    assert file_loaders(ast.parse(line))


def test_train_gpt_imports_nothing_of_the_repository():
    assert imports_of_the_repository(ast.parse(read("train_gpt.py"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "from . import guard",
        "from .tools import guard",
        "import tools.guard",
        "from tools import guard",
        "import presets.published as published",
        "import json, data.download",
        "def f():\n    try:\n        import lossless_caps\n    except ImportError:\n        pass",
        "from tokenizers import train_tokenizer",
        "import importlib\nimportlib.import_module('prepare_caseops_data')",
        "__import__('tests.conftest')",
    ],
)
def test_an_import_of_the_repository_is_found(line):
    assert len(imports_of_the_repository(ast.parse(line))) == 1
    assert imports_of_the_repository(ast.parse("import json\nfrom torch import nn")) == []


# ---- tests


def imported_test_modules(tree):
    """Imports of other test modules: what two of them need belongs in a helper module."""
    found = []
    for node in nodes(tree, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(part.startswith("test_") for name in names for part in name.split(".")):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("name", TESTS)
def test_tests_import_no_test_module(name):
    assert imported_test_modules(ast.parse(read(name))) == []


@pytest.mark.parametrize(
    "line", ["import test_model", "from test_model import x", "from tests.test_model import x"]
)
def test_an_import_of_a_test_module_is_found(line):
    assert imported_test_modules(ast.parse(line)) == [line]
    assert imported_test_modules(ast.parse("from model_helpers import x")) == []


# ---- what train_gpt.py may use, and where


def is_kernel(function):
    """Whether a function is a Triton kernel."""
    names = [node.id for node in function.decorator_list if isinstance(node, ast.Name)]
    return "jit" in names


def kernels(tree):
    return [function for function in nodes(tree, ast.FunctionDef) if is_kernel(function)]


def find(tree, dotted_name):
    """The function or class of a dotted name, None where there is none."""
    node = tree
    for part in dotted_name.split("."):
        candidates = [child for child in node.body if getattr(child, "name", None) == part]
        if not candidates:
            return None
        node = candidates[0]
    return node


def is_inside(node, tree, *names):
    """Whether a node is inside one of the functions and classes of these dotted names."""
    for place in filter(None, (find(tree, name) for name in names)):
        if place.lineno <= node.lineno <= place.end_lineno:
            return True
    return False


def long_signatures(tree):
    """Functions with more than eight parameters, self not counted; kernels may have more."""
    found = []
    for function in nodes(tree, FUNCTION):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        names = [argument.arg for argument in arguments if argument.arg != "self"]
        if len(names) > 8 and not is_kernel(function):
            found.append(function.name)
    return found


def global_names(tree):
    return [ast.unparse(node) for node in nodes(tree, ast.Global | ast.Nonlocal)]


def docstring_readers(tree):
    """Places that read docstrings, which the packed script does not have."""
    return [node.lineno for node in nodes(tree, ast.Attribute) if node.attr == "__doc__"] + [
        node.lineno for node in nodes(tree, ast.Name) if node.id == "__doc__"
    ]


def asserts(tree):
    """Asserts outside kernels: packing removes them, so no result may depend on one."""
    found = []
    for node in nodes(tree, ast.Assert):
        if not any(k.lineno <= node.lineno <= k.end_lineno for k in kernels(tree)):
            found.append(node.lineno)
    return found


def environment_readers(tree):
    """Places outside Hyperparameters.from_env and Dist that use the environment."""
    words = {"environ", "environb", "getenv", "putenv"}
    uses = [node for node in nodes(tree, ast.Attribute) if node.attr in words]
    uses += [
        node for node in nodes(tree, ast.Name) if node.id in words - {"environ"}
    ]  # a parameter
    return [
        node.lineno
        for node in uses
        if not is_inside(node, tree, "Hyperparameters.from_env", "Dist")
    ]


def torch_distributed_users(tree):
    """Places outside Dist that use torch.distributed, under its own or any imported name."""
    found = []
    aliases = set()
    for node in nodes(tree, ast.Import | ast.ImportFrom):
        if "distributed" in ast.unparse(node):
            aliases |= {alias.asname or alias.name for alias in node.names}
    for node in nodes(tree, ast.Name | ast.Attribute):
        name = ast.unparse(node)
        if name in aliases | {"torch.distributed"} and not is_inside(node, tree, "Dist"):
            found.append(node.lineno)
    return found


FORBIDDEN = {
    file_loaders: "def find_guard():\n    s.exec_module(m)\n\ndef f():\n    s.exec_module(m)",
    long_signatures: "def f(a, b, c, d, e, f, g, h, *, i):\n    pass",
    global_names: "def f():\n    global x\n    x = 1",
    docstring_readers: "def f():\n    return f.__doc__",
    asserts: "def f(x):\n    assert x\n    return x",
    environment_readers: "class Dist:\n    pass\n\ndef f():\n    return os.environ['A']",
    torch_distributed_users: (
        "import torch.distributed as d\n\nclass Dist:\n    x = d.x\n\ndef f():\n    return d.y"
    ),
}


@pytest.mark.parametrize("check", FORBIDDEN, ids=lambda check: check.__name__)
def test_train_gpt_has_none_of_what_is_forbidden(check):
    assert check(ast.parse(read("train_gpt.py"))) == []


@pytest.mark.parametrize("check", FORBIDDEN, ids=lambda check: check.__name__)
def test_what_is_forbidden_is_found(check):
    assert len(check(ast.parse(FORBIDDEN[check]))) == 1
    assert check(ast.parse("class Dist:\n    x = 1\n\n\ndef f(x):\n    return x")) == []


# ---- settings


def unread_settings(tree, *others):
    """Settings that neither this tree nor another one reads as an attribute or by name."""
    settings = find(tree, "Hyperparameters")
    declared = [node.target.id for node in settings.body if isinstance(node, ast.AnnAssign)]
    read_names = set()
    for each in (tree, *others):
        for node in nodes(each, ast.Attribute):
            owner = ast.unparse(node.value).split(".")[-1]
            if isinstance(node.ctx, ast.Load) and owner in ("hp", "self"):
                read_names.add(node.attr)
    for node in nodes(tree, ast.Constant):  # as in getattr(hp, role.bits)
        if not is_inside(node, tree, "Hyperparameters"):
            read_names.add(node.value)
    return [name for name in declared if name not in read_names]


def test_every_declared_setting_is_read():
    others = [ast.parse(read(name)) for name in (*TOOLS, *PRESETS)]
    assert unread_settings(ast.parse(read("train_gpt.py")), *others) == []


def test_a_setting_that_nothing_reads_is_found():
    source = "class Hyperparameters:\n    a: int = env(1)\n    b: int = env(2)\n\nhp.a\nhp.b = 1\n"
    assert unread_settings(ast.parse(source)) == ["b"]


# ---- kernels


def called_from(tree):
    """{module-level function: names it mentions}; a registered backward counts as its op's own."""
    graph = {}
    for node in tree.body:
        name = None
        if isinstance(node, ast.FunctionDef):
            name = node.name
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            owner = getattr(node.value.func, "value", None)  # op.register_autograd(backward)
            name = getattr(owner, "id", None)
        if name:
            mentioned = {each.id for each in nodes(node, ast.Name)}
            graph.setdefault(name, set()).update(mentioned)
    return graph


def reachable(name, graph):
    seen, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += graph.get(current, ())
    return seen


def kernels_without_reference_or_test(tree, tests):
    """Triton kernels of no operation that has a reference (NAME_ref) and a test.

    The operation of mlp_ref is any function whose name ends in mlp.
    """
    graph = called_from(tree)
    references = [name.removesuffix("_ref") for name in graph if name.endswith("_ref")]
    operations = {"attention_fa4"}  # its reference is attention_sdpa
    operations |= {name for name in graph if name.endswith(tuple(references))}
    tested = set()
    for function in nodes(tests, ast.FunctionDef):
        if function.name.startswith("test_"):
            tested |= {node.id for node in nodes(function, ast.Name)}
            tested |= {node.attr for node in nodes(function, ast.Attribute)}
    problems = []
    for kernel in kernels(tree):
        owners = {name for name in operations if kernel.name in reachable(name, graph)}
        if not owners:
            problems.append(f"{kernel.name} belongs to no operation with a reference")
        elif not owners & tested and kernel.name not in tested:
            problems.append(f"{kernel.name} has no test")
    return problems


def test_every_kernel_has_a_reference_and_a_test():
    tree = ast.parse(read("train_gpt.py"))
    assert kernels(tree)
    tests = ast.parse(read("tests/test_kernels.py"))
    assert kernels_without_reference_or_test(tree, tests) == []


KERNEL = """
@jit
def _mlp_kernel(x):
    pass

def mlp(x):
    return _mlp_kernel(x)

def mlp_ref(x):
    return x
"""
KERNEL_TEST = "def test_mlp():\n    mlp(1)\n"


@pytest.mark.parametrize(
    "source, tests, problem",
    [
        (KERNEL, KERNEL_TEST, None),
        (KERNEL.replace("mlp_ref", "other"), KERNEL_TEST, "belongs to no operation"),
        (KERNEL, "def test_other():\n    other(1)\n", "has no test"),
    ],
)
def test_a_kernel_without_reference_or_test_is_found(source, tests, problem):
    found = kernels_without_reference_or_test(ast.parse(source), ast.parse(tests))
    assert len(found) == (problem is not None)
    assert all(problem in sentence for sentence in found)


# ---- sections


SECTIONS = [
    "HYPERPARAMETERS",
    "RUNTIME",
    "DATA",
    "KERNELS",
    "MODEL",
    "OPTIMIZER",
    "SCHEDULE",
    "TRAINING",
    "QUANTIZATION",
    "ARTIFACT",
    "EVALUATION",
    "TEST-TIME TRAINING",
    "MAIN",
]


def sections(source):
    return re.findall(r"^# ---- ([A-Z -]+?) -{40,}$", source, re.MULTILINE)


def test_sections_are_in_order():
    assert sections(read("train_gpt.py")) == SECTIONS
