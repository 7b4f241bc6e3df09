"""Takes out of train_gpt.py what the settings of a run do not use: the first half of packing (tools/pack_code.py).

Settings become constants, constant branches are decided, and what nothing names any more is dropped, to a fixed point.
What people change when they run a packed script stays a setting: OF_A_RUN and OF_A_PROOF. The packed script refuses
other values of all the others, which it holds as text.

It leans on conventions of train_gpt.py: a setting is read as `hp.name`, `x.hp.name`, `Hyperparameters.name` or, in that
class, `self.name`; what is called hp is nothing else; assignments at module level and properties have no side effects;
PACKED is asked for its truth, but for settings_table.
"""

import ast
import copy
import warnings
from collections import Counter
from pathlib import Path

# settings of one run, not of the method: a packed script has them as the source has them, whatever its run set
OF_A_RUN = "seed run_id runs_dir data_path tokenizer_path ttt_eval_only artifact_path".split()
# what has to change where the script runs on another machine, or as a tiny proof (tools/make_record.py); a 0 stays 0,
# as it switches off what it counts
OF_A_PROOF = """
    device compile compute_dtype muon_dtype attention_backend model_dim num_layers num_heads num_kv_heads mlp_mult
    rope_dims loop_start loop_end num_loops parallel_start_layer xsa_last_n train_batch_tokens micro_batch_tokens
    train_seq_len max_row_segments max_wallclock_seconds iterations warmup_steps val_loss_every gptq_calibration_batches
    eval_seq_len eval_stride ttt_max_docs ttt_eval_seq_len ttt_stale_context ttt_chunk_size ttt_batch_size ttt_lanes
    ttt_lora_rank phased_ttt_prefix_docs global_ttt_chunk_tokens
""".split()
# for work on the source: never in a packed script, whatever the run was that packed it
OFF = {"prequant_only": "0", "quant_only": "0", "checkpoint_path": "", "plots": "0", "checkpoint_every": "0",
       "resume": "0", "preset": ""}
UNSAID = ("plots", "preset")  # of these nothing is told: a packed script has no pictures, and its preset's settings
LEFT_OUT = ("live",)  # methods: the bar on a terminal; what they would be told is not computed
REFUSE = r'''
def unknown_settings(environ, cls):
    for name, text in re.findall(r"(\w+)=(.*)  # ", PACKED):
        given = environ.get(name, text)
        try:
            same = float(given) == float(text)
        except ValueError:
            same = given == text
        if not same and not hasattr(cls, name.lower()):
            yield f"{name}={given}: this script was packed with {text}; its source takes other values"
'''  # stands for the function of this name: the names of other settings are gone
# settings that do nothing while another has this value: then they are not among those that a packed script names
IDLE = {
    "attn_window_full_layers": ("attn_window", 0), "bigram_dim": ("bigram_vocab_size", 0),
    "value_embed_dim": ("value_embed_layers", ""), "swa_every": ("swa_below_lr", 0),
    "ttt_epochs": ("ttt_method", "lora"), "attn_out_gate_src": ("attn_out_gate_enabled", False),
    "wd_sched_hold_frac": ("wd_schedule_enabled", False), "wd_sched_ramp_frac": ("wd_schedule_enabled", False),
    "wd_sched_low_factor": ("wd_schedule_enabled", False), "wd_sched_high_factor": ("wd_schedule_enabled", False),
}
ARGUMENTS = {"attn_window": "attn_window", "on_grid": "qat_below_lr"}  # that are there for one setting alone
COMPANION = Path(__file__).with_name("techniques.py")  # stands in the script, in the place of its import
CODECS = "ENCODERS", "DECODERS"  # tables that are looked up by names which stand in the script

LITERALS = (ast.Constant, ast.Tuple, ast.List, ast.Compare, ast.BinOp, ast.UnaryOp, ast.Subscript, ast.Slice,
            ast.operator, ast.unaryop, ast.cmpop)  # what `evaluate` may compute
ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def specialise(tree, settings):
    """Syntax tree of train_gpt.py, {NAME: value or text} -> what these settings use of it; another script: all.

    Settings that are not given have their defaults.
    """
    cls, fields = declared(tree)
    if cls is None:
        return tree
    inline_techniques(tree)
    values = fold_settings(tree, cls, fields, settings)
    Substitute(take_companions(tree)).visit(tree)
    DropArguments({name for name, setting in ARGUMENTS.items() if values.get(setting) == 0}).visit(tree)
    LeaveOut().visit(tree)
    for node in walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "unknown_settings":
            node.body = ast.parse(REFUSE).body[0].body
    sizes, chosen = {}, tree.body
    while chosen:  # every step makes something smaller; what the last one did not change waits for a round of all
        everything, fold = len(chosen) == len(tree.body), Fold(values, tree)
        folded = [(fold.visit(node) if node in chosen else node) for node in tree.body]
        tree.body = [part for found in folded for part in (found if isinstance(found, list) else [found]) if part]
        fold_properties(cls, values)
        for node in chosen:
            for function in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(function, ast.FunctionDef):
                    fold_locals(function)
        fold_parameters(tree)
        tidy(tree)
        Drop(tree).visit(tree)
        before, sizes = sizes, {node: len(walk(node)) for node in tree.body}
        chosen = {node for node in sizes if sizes[node] != before.get(node)}
        if not chosen and (not everything or len(sizes) < len(before)):
            chosen = set(tree.body)
    tidy(tree)
    return tree


def walk(node):
    """As ast.walk, in another order, twice as fast, without Load and Store."""
    found = [node]
    for node in found:
        for value in vars(node).values():
            if isinstance(value, ast.AST):
                found.append(value)
            elif isinstance(value, list):
                found += [item for item in value if isinstance(item, ast.AST)]
    return [node for node in found if not isinstance(node, ast.expr_context)]


# ---- settings


def declared(tree):
    """The class of the settings and its fields {name: (type, default)}; None and {} for another script."""
    types = {"int": int, "float": float, "str": str, "bool": bool}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Hyperparameters":
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            return node, {f.target.id: (types[f.annotation.id], ast.literal_eval(f.value.args[0])) for f in fields}
    return None, {}


def text_of(value):
    """A setting's value as the environment has it."""
    return str(int(value) if isinstance(value, bool) else value)


def fold_settings(tree, cls, fields, settings):
    """Takes the folded settings out of their class -> {name: value}; the others get their values as defaults.

    PACKED becomes a table of all that are folded or changed.
    """
    outside = [node for statement in tree.body if statement is not cls for node in walk(statement)]
    by_name = {node.value for node in outside if isinstance(node, ast.Constant)}  # of getattr(hp, name)
    calls = [node for node in outside if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "replace"]
    by_name |= {word.arg for call in calls for word in call.keywords}  # dataclasses.replace(hp, name=...)
    folded, lines, nodes = {}, {}, {node.target.id: node for node in cls.body if isinstance(node, ast.AnnAssign)}
    for name, (kind, default) in fields.items():
        given = default if name in OF_A_RUN else OFF.get(name, settings.get(name.upper(), default))
        value = text_of(given) == "1" if kind is bool else kind(given)
        if name not in OF_A_RUN and name not in by_name and (name not in OF_A_PROOF or value == 0):
            folded[name] = value
        if name not in UNSAID and (name in folded or value != default):
            lines[name] = f"{' *'[value != default]} {name.upper()}={text_of(value)}  # "
        nodes[name].value = ast.parse(repr(value), mode="eval").body  # ranges are checked in a checkout
    cls.body = [node for node in cls.body if not isinstance(node, ast.AnnAssign) or node.target.id not in folded]
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "PACKED":
            idle = [name for name, (other, value) in IDLE.items() if folded.get(other) == value]
            node.value = ast.Constant("\n".join(line for name, line in lines.items() if name not in idle))
    return folded


def inline_techniques(tree):
    """Puts the definitions of COMPANION in the place of its import; the script names them without `techniques.` then.

    ValueError where a name would stand for two things.
    """
    imports = [number for number, node in enumerate(tree.body) if isinstance(node, ast.Try)
               and COMPANION.stem in names_of(node.body[0])]  # fmt: skip
    if not imports:
        return
    statements = ast.parse(COMPANION.read_text(encoding="utf-8")).body[1:]  # behind its docstring
    statements = [node for node in statements if not getattr(node, "module", "").startswith("tools")]
    ours = {name: node for node in tree.body for name in names_of(node)}
    added = {name: node for node in statements for name in names_of(node) if name not in ours}
    local = bindings(node for part in tree.body if hasattr(part, "body") for node in walk(part)[1:])
    for node in statements:
        is_import = isinstance(node, (ast.Import, ast.ImportFrom))
        for name in names_of(node):
            if name in added and not is_import and local[name] or name in ours and not (
                    is_import or ast.dump(ours[name]) == ast.dump(node)):  # fmt: skip
                raise ValueError(f"{COMPANION.name}: {name} is something else in the script")
    tree.body[imports[0] : imports[0]] = list(dict.fromkeys(added.values()))
    Unqualify().visit(tree)


def names_of(statement):
    """Names that a statement at module level binds: definitions, assignments, imports."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in statement.names]
    if isinstance(statement, ast.Assign):
        return [node.id for node in walk(statement.targets[0]) if isinstance(node, ast.Name)]
    return [statement.name] if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) else []


class Unqualify(ast.NodeTransformer):
    """`techniques.name` -> `name`."""

    def visit_Attribute(self, node):
        self.generic_visit(node)
        return ast.Name(node.attr, node.ctx) if getattr(node.value, "id", None) == "techniques" else node


class LeaveOut(ast.NodeTransformer):
    """Methods of LEFT_OUT become None wherever they are named, and statements that call None go (Drop)."""

    def visit_Attribute(self, node):
        return ast.Constant(None) if node.attr in LEFT_OUT else self.generic_visit(node)


class DropArguments(ast.NodeTransformer):
    """Takes out arguments whose setting is off: parameters, what is handed on for them, parts of lists; else a 0."""

    def __init__(self, names):
        self.names = names

    def kept(self, nodes):
        return [node for node in nodes if getattr(node, "id", getattr(node, "arg", None)) not in self.names]

    def visit_arguments(self, node):
        defaults = [None] * (len(node.args) - len(node.defaults)) + node.defaults
        pairs = [pair for pair in zip(node.args, defaults, strict=True) if pair[0].arg not in self.names]
        node.args, node.defaults = [arg for arg, _ in pairs], [default for _, default in pairs if default]
        pairs = list(zip(node.kwonlyargs, node.kw_defaults, strict=True))
        pairs = [pair for pair in pairs if pair[0].arg not in self.names]
        node.kwonlyargs, node.kw_defaults = [arg for arg, _ in pairs], [default for _, default in pairs]
        return self.generic_visit(node)

    def visit_Call(self, node):
        node.args, node.keywords = self.kept(node.args), self.kept(node.keywords)
        return self.generic_visit(node)

    def visit_List(self, node):
        node.elts = self.kept(node.elts)
        return self.generic_visit(node)

    visit_Tuple = visit_List

    def visit_Assign(self, node):
        return self.generic_visit(node) if self.kept(node.targets) else None

    def visit_Name(self, node):
        return ast.Constant(0) if node.id in self.names else node


def take_companions(tree):
    """Takes out `try: from tools import name`: a packed script lies alone -> {name: what it is where that fails}."""
    tries = [node for node in tree.body if isinstance(node, ast.Try) and isinstance(node.body[0], ast.ImportFrom)]
    taken = [node for node in tries if node.body[0].module == "tools"]
    tree.body = [node for node in tree.body if node not in taken]
    assigned = [part for node in taken for part in node.handlers[0].body]
    return {target.id: part.value for part in assigned for target in part.targets}


def fold_properties(cls, values):
    """`name = property(lambda hp: constant)` of the settings joins their values."""
    for node in [node for node in cls.body if isinstance(node, ast.Assign)]:
        result = getattr(node.value.args[0], "body", None) if isinstance(node.value, ast.Call) else None
        if isinstance(result, ast.Constant):
            values[node.targets[0].id] = result.value
            cls.body.remove(node)


# ---- expressions and branches


def is_pure(node):
    """Whether an expression may go unevaluated."""
    return not any(isinstance(part, (ast.Call, ast.Yield, ast.Await, ast.NamedExpr)) for part in walk(node))


def truth(node):
    """Whether an expression is true: True, False, or None where that is not known."""
    if isinstance(node, ast.Constant):
        return bool(node.value)
    if isinstance(node, ast.Name) and node.id == "PACKED":
        return True
    if isinstance(node, (ast.Tuple, ast.List)):
        return bool(node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        known = truth(node.operand)
        return None if known is None else not known
    if isinstance(node, ast.BoolOp) and is_pure(node):
        decides, parts = isinstance(node.op, ast.Or), [truth(value) for value in node.values]
        return decides if decides in parts else None if None in parts else not decides
    return None


def is_empty_star(node):
    """Whether an argument or a part of a tuple is `*[]` or `*()`."""
    return isinstance(node, ast.Starred) and truth(node.value) is False


def look_up(table, key, otherwise):
    """The value of a dict of constant keys at a constant key, where nothing else in it has to be evaluated."""
    if not (isinstance(table, ast.Dict) and isinstance(key, ast.Constant) and is_pure(table)):
        return otherwise
    keys = [item.value if isinstance(item, ast.Constant) else None for item in table.keys]
    return copy.deepcopy(table.values[keys.index(key.value)]) if None not in keys and key.value in keys else otherwise


def returned_constant(function):
    """The constant that is all that a function returns, if it does nothing else."""
    *before, last = function.body
    documented_only = all(isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in before)
    is_constant = isinstance(last, ast.Return) and isinstance(last.value, ast.Constant)
    return last.value if documented_only and is_constant else None


def literal_tables(tree):
    """{name: dict} of the dicts at module level."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    return {node.targets[0].id: node.value for node in assigned}


class Fold(ast.NodeTransformer):
    """Settings -> constants, and what follows from that: operations, look-ups, branches."""

    def __init__(self, values, tree):
        self.values, self.tables, self.of_self, nodes = values, literal_tables(tree), {}, walk(tree)
        attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
        self.stores = Counter(node.attr for node in attributes if not isinstance(node.ctx, ast.Load))
        self.defined = Counter(node.name for node in nodes if isinstance(node, ast.FunctionDef))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and self.defined[node.name] == 1]
        self.results = {node.name: value for node in functions if (value := returned_constant(node))}

    def constants_of(self, cls):
        """{name: constant}: attributes that are only ever set to None, and properties that return a constant."""
        for node in walk(cls):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                name, value = node.targets[0].attr, node.value
                if isinstance(value, ast.Constant) and value.value is None and self.stores[name] == 1:
                    yield name, None
        for node in cls.body:
            is_property = isinstance(node, ast.FunctionDef) and "property" in map(ast.unparse, node.decorator_list)
            if is_property and self.defined[node.name] == 1 and (value := returned_constant(node)):
                yield node.name, value.value

    def visit_ClassDef(self, node):
        self.of_self = self.values if node.name == "Hyperparameters" else dict(self.constants_of(node))
        self.generic_visit(node)
        self.of_self = {}
        return node

    def visit_Attribute(self, node):
        self.generic_visit(node)
        holder = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", None)
        found = self.values if holder in ("hp", "Hyperparameters") else self.of_self if holder == "self" else {}
        is_constant = node.attr in found and isinstance(node.ctx, ast.Load)
        return ast.Constant(found[node.attr]) if is_constant else node

    def evaluate(self, node):
        """The constant that an expression of literals is, where that is no longer than itself."""
        self.generic_visit(node)
        if all(isinstance(part, LITERALS) for part in walk(node)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # `None is None`
                value = eval(ast.unparse(node), {})
            if len(repr(value)) <= len(ast.unparse(node)):
                return ast.parse(repr(value), mode="eval").body
        return node

    def visit_BinOp(self, node):
        """Of `x + ""`, `x * 1`, `x | {}` (nobody writes into such a sum of dicts) and `x | x` what stays is x."""
        neutral = {ast.Add: "''", ast.Mult: "1", ast.BitOr: "{}"}.get(type(node.op))
        if neutral == "{}" and is_pure(node) and ast.dump(node.left) == ast.dump(node.right):
            return self.visit(node.left)
        for idle, other in (node.left, node.right), (node.right, node.left):
            if isinstance(idle, (ast.Constant, ast.Dict)) and ast.unparse(idle) == neutral:
                return self.visit(other)
        return self.evaluate(node)

    def visit_JoinedStr(self, node):
        """Constants become a part of the text."""
        self.generic_visit(node)
        for at, part in enumerate(node.values):
            if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Constant):
                if part.conversion == -1 and part.format_spec is None:
                    node.values[at] = ast.Constant(str(part.value.value))
        return node

    def visit_Compare(self, node):
        """`constant in TABLE` as well."""
        table = self.tables.get(getattr(node.comparators[0], "id", None))
        if table and isinstance(node.ops[0], (ast.In, ast.NotIn)) and isinstance(node.left, ast.Constant):
            node.comparators[0] = ast.Tuple(table.keys, ast.Load())
        return self.evaluate(node)

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        known = truth(node) if isinstance(node.op, ast.Not) else None
        return node if known is None else ast.Constant(known)

    def visit_BoolOp(self, node):
        """Operands behind the one that decides go, and those before it that do not."""
        self.generic_visit(node)
        decides, values = isinstance(node.op, ast.Or), []
        for value in node.values:
            known = truth(value) if is_pure(value) else None
            if known is None or known == decides or value is node.values[-1]:
                values.append(value)
            if known == decides:
                break
        node.values = values
        return node if len(values) > 1 else values[0]

    def visit_Subscript(self, node):
        """{literal}[constant], TABLE[constant] -> the value that stands there."""
        node = self.evaluate(node)
        if not isinstance(node, ast.Subscript) or not isinstance(node.ctx, ast.Load):
            return node
        return look_up(self.tables.get(getattr(node.value, "id", None), node.value), node.slice, node)

    def visit_Tuple(self, node):
        """`*[]` goes."""
        self.generic_visit(node)
        node.elts = [part for part in node.elts if not is_empty_star(part)]
        return node

    def visit_Call(self, node):
        """{literal}.get(constant) -> what stands there; len((literal,)); functions of constants; no `**{}` or `*()`."""
        self.generic_visit(node)
        node.args = [part for part in node.args if not is_empty_star(part)]
        node.keywords = [k for k in node.keywords if k.arg or not isinstance(k.value, ast.Dict) or k.value.keys]
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and len(node.args) == 1:
            return look_up(node.func.value, node.args[0], node)
        name = getattr(node.func, "id", None)
        if name == "len" and isinstance(node.args[0], ast.Tuple):
            return ast.Constant(len(node.args[0].elts))
        return self.results[name] if name in self.results and all(map(is_pure, node.args)) else node

    def visit_For(self, node):
        """A loop over nothing goes."""
        self.generic_visit(node)
        return None if truth(node.iter) is False else node

    def visit_If(self, node):
        """The branch that is taken, if that is known; `test and True`, `test or False` are as good as `test` here."""
        self.generic_visit(node)
        if isinstance(node.test, ast.BoolOp):
            neutral = isinstance(node.test.op, ast.And)
            open_parts = [value for value in node.test.values if truth(value) is not neutral]
            node.test.values = open_parts or [ast.Constant(neutral)]
            node.test = node.test if len(node.test.values) > 1 else node.test.values[0]
        known, last = truth(node.test), node.orelse
        if isinstance(last, list) and len(last) == 1 and isinstance(last[0], ast.If) and is_pure(node.test):
            if ast.dump(last[0].test) == ast.dump(node.test):  # asked already, and not so
                node.orelse = last[0].orelse
        return node if known is None else node.body if known else node.orelse

    visit_IfExp = visit_If


# ---- names that are constants


class Substitute(ast.NodeTransformer):
    """Names -> constants, or expressions without parts; assignments to these names go."""

    def __init__(self, constants):
        self.constants = constants

    def visit_Name(self, node):
        value = self.constants.get(node.id, node)
        return copy.copy(value) if isinstance(value, ast.AST) else ast.Constant(value)

    def visit_Assign(self, node):
        if isinstance(node.targets[0], ast.Name) and node.targets[0].id in self.constants:
            return None
        return self.generic_visit(node)


def bindings(nodes):
    """How often each name is bound in a function of these nodes, those inside it included."""
    bound = Counter()
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound[node.id] += 1
        elif isinstance(node, ast.arg):
            bound[node.arg] += 1
        elif isinstance(node, (ast.FunctionDef, ast.ExceptHandler, ast.alias)):
            bound[getattr(node, "asname", None) or node.name] += 1
        elif isinstance(node, ast.Nonlocal):
            bound.update(node.names * 2)
    return bound


def fold_locals(function):
    """`x = constant`, x bound nowhere else in the function, becomes that constant; what nothing reads goes."""
    nodes, constants = walk(function), {}
    bound = bindings(nodes)
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            out = unzip(node, lambda target, value: not (
                isinstance(value, ast.Constant) and bound[getattr(target, "id", None)] == 1))
            constants |= {target.id: value.value for target, value in out}
        if isinstance(node, ast.Assign) and bound[name := getattr(node.targets[0], "id", None)] == 1:
            if isinstance(node.value, ast.Constant):
                constants[name] = node.value.value
            elif name not in read and is_pure(node.value):
                constants[name] = None
    if constants:
        Substitute(constants).visit(function)


def unzip(node, stays):
    """Of `x, y = a, b` goes what does not stay(target, value), but for the last pair -> the pairs that are out."""
    names, values = getattr(node.targets[0], "elts", ()), node.value.elts
    if len(names) != len(values) or len(node.targets) > 1 or any(isinstance(n, ast.Starred) for n in (*names, *values)):
        return []
    pairs = list(zip(names, values, strict=True))
    kept = [pair for pair in pairs if stays(*pair)] or pairs[-1:]
    if len(kept) == 1 < len(pairs):
        node.targets, node.value = [kept[0][0]], kept[0][1]
    elif len(kept) < len(pairs):
        names[:], values[:] = zip(*kept, strict=True)
    return [pair for pair in pairs if pair not in kept]


def argument_of(call, index, name):
    """The expression that a call gives for a parameter, None where it leaves it to the default."""
    if index < len(call.args):
        return call.args[index]
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def fold_parameters(tree):
    """A parameter of a function or a class that every call gives the same constant becomes that constant; one that is
    not read goes.
    """
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.decorator_list}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.decorator_list:
            functions |= dict((node.name, part) for part in node.body if getattr(part, "name", "") == "__init__")
    calls, uses = {name: [] for name in functions}, Counter()
    for node in walk(tree):
        if isinstance(node, ast.Name):
            uses[node.id] += 1
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in functions:
            calls[node.func.id].append(node)
    for name, function in functions.items():
        stars = [a for call in calls[name] for a in call.args if isinstance(a, ast.Starred)]
        stars += [keyword for call in calls[name] for keyword in call.keywords if keyword.arg is None]
        if calls[name] and len(calls[name]) == uses[name] and not stars and not function.args.vararg:
            fold_parameters_of(function, calls[name])


def fold_parameters_of(function, calls):
    """The same for one function and all its calls, which have no stars; of an __init__ they do not name self."""
    spec, bound, own = function.args, bindings(walk(function)), function.name == "__init__"
    for index in reversed(range(own, len(spec.args))):
        name, at = spec.args[index].arg, index - len(spec.args) + len(spec.defaults)  # at: of its default, if any
        values = [argument_of(call, index - own, name) or (spec.defaults[at] if at >= 0 else None) for call in calls]
        same = {ast.dump(value) if isinstance(value, ast.Constant) else None for value in values}
        idle = None not in values and all(map(is_pure, values)) and not any(
            getattr(part, "id", None) == name for part in walk(function))  # fmt: skip
        if len(same) == 1 and None not in same and bound[name] == 1:
            Substitute({name: values[0].value}).visit(function)
        elif not idle:
            continue
        del spec.args[index]
        if at >= 0:
            del spec.defaults[at]
        for call in calls:
            del call.args[index - own : index - own + 1]
            call.keywords = [keyword for keyword in call.keywords if keyword.arg != name]


# ---- what nothing names


def tidy(tree):
    """Nothing stands behind a return, and no body is empty."""
    for node in walk(tree):
        for name in ("body", "orelse"):
            if isinstance(block := getattr(node, name, None), list):
                ends = [isinstance(part, ENDS) for part in block]
                del block[ends.index(True) + 1 if True in ends else len(block) :]
                if not block and name == "body":
                    block.append(ast.Pass())


def is_idle(function):
    """Whether nothing but a docstring is left in a function."""
    does = [part for part in function.body if not isinstance(part, ast.Pass)]
    return all(isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in does)


class Drop(ast.NodeTransformer):
    """Takes out what nothing names: functions, classes, methods, globals, imports, entries in the tables of codecs."""

    def __init__(self, tree):
        self.names, self.attributes, self.strings = Counter(), Counter(), Counter()
        for node in walk(tree):
            if isinstance(node, ast.Name):
                self.names[node.id] += 1
            elif isinstance(node, ast.Attribute):
                self.attributes[node.attr] += 1
            elif isinstance(node, ast.Constant):
                self.strings[node.value] += 1
        plain = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.bases]
        ours = {part.attr for node in plain for part in walk(node)
                if isinstance(part, ast.Attribute) and getattr(part.value, "id", None) == "self"}  # fmt: skip
        read = {node.attr for node in walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
        self.unread = ours - read - self.strings.keys()
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        self.idle = {function.name for function in functions if is_idle(function)}

    def unused(self, node, name):
        """Whether a name stands nowhere outside of what it is the name of."""
        inside = sum(getattr(part, "id", None) == name for part in walk(node))
        return name != "_" and self.names[name] == inside

    def visit_Module(self, node):
        codecs = [table for name, table in literal_tables(node).items() if name in CODECS]
        keys = Counter(key.value for table in codecs for key in table.keys)
        for table in codecs:
            pairs = zip(table.keys, table.values, strict=True)
            kept = [pair for pair in pairs if self.strings[pair[0].value] > keys[pair[0].value]]
            table.keys, table.values = map(list, zip(*kept, strict=True))
        self.drop_names(literal_tables(node))
        plain = [part for part in node.body if isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name)]
        unused = [part for part in plain if self.unused(part, part.targets[0].id)]
        node.body = [part for part in node.body if part not in unused]
        return self.generic_visit(node)

    def is_idle_field(self, cls, field):
        """Whether a field has a default and nothing reads or gives it; settings stay."""
        name = field.target.id
        named = self.attributes[name] or self.strings[name]  # Ops(**{"name": ...})
        return field.value is not None and not named and cls.name != "Hyperparameters"

    def is_unread(self, target, value):
        """Whether `x.name = value` may go: nothing reads the attribute, and objects of our classes alone have it, or it
        is None.
        """
        if not isinstance(target, ast.Attribute):
            return False
        is_none = getattr(target.value, "id", None) == "self" and ast.unparse(value) == "None"
        is_ours = target.attr in self.unread and (is_pure(value) or isinstance(value, ast.Lambda))
        return is_ours or is_none and self.attributes[target.attr] == 1

    def visit_Assign(self, node):
        """What sets such attributes goes."""
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            unzip(node, lambda target, value: not self.is_unread(target, value))
        return None if self.is_unread(node.targets[0], node.value) else self.generic_visit(node)

    def visit_AugAssign(self, node):
        return None if self.is_unread(node.target, node.value) else self.generic_visit(node)

    def drop_names(self, tables):
        """Saved names of parameters that no model of these settings has, and their roles."""
        head, roles = tables.get("HEAD_NAMES"), tables.get("QUANT_TABLE")
        for key, value in list(zip(head.keys, head.values, strict=True)) if head and roles else ():
            if not self.attributes[key.value]:
                head.keys.remove(key)
                head.values.remove(value)
                at = [role.value for role in roles.keys].index(value.value)
                del roles.keys[at], roles.values[at]

    def visit_Import(self, node):
        node.names = [a for a in node.names if self.names[(a.asname or a.name).split(".")[0]]]
        return node if node.names else None

    visit_ImportFrom = visit_Import

    def visit_FunctionDef(self, node):
        return None if self.unused(node, node.name) else self.generic_visit(node)

    def visit_ClassDef(self, node):
        """Methods with two underscores are Python's to call, and forward is PyTorch's; fields may have a default."""
        if self.unused(node, node.name):
            return None
        kept = []
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and self.is_idle_field(node, part):
                continue
            if not isinstance(part, ast.FunctionDef):
                kept.append(self.visit(part))
            elif self.attributes[part.name] or part.name[:2] == "__" or part.name == "forward":
                kept.append(self.generic_visit(part))
        node.body = [part for part in kept if part]
        return node

    def visit_Expr(self, node):
        """Calls of what does nothing any more."""
        inner = node.value
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Constant):
            return None
        if isinstance(inner, ast.Call) and all(map(is_pure, inner.args)) and not inner.keywords:
            if getattr(inner.func, "id", getattr(inner.func, "attr", None)) in self.idle:
                return None
        return self.generic_visit(node)
