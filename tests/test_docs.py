"""The pages say what is there: files, targets, settings, RESULT's keys, sections."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import install_parts_for
from scipy import stats

import presets.published
import train_gpt
from benchmarks import bench_recipe
from tools import launch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "THIRD_PARTY_NOTICES.md",
    "data/README.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
    "records/README.md",
    "tokenizers/README.md",
]
SETTINGS = {name.upper() for name in presets.published.Hyperparameters.__dataclass_fields__}
# of which the pages say that they are gone, or were tried on a branch
REMOVED = {
    "GATED_ATTN_QUANT_GATE",
    "GPTQ_ALL_REDUCE",
    "MAX_ROW_SEGMENTS",
    "ADAM_WARMDOWN_FRAC",
    "DOC_SHUFFLE_ENABLED",
    "HESSIAN_CLIP_LAMBDA",
    "LQER_WEIGHTED",
    "MLP_GATE_ENABLED",
    "COMPUTE_DTYPE",
    "GATE_WINDOW",
    "GLOBAL_TTT_GRAD_CLIP",
    "GLOBAL_TTT_MOMENTUM",
    "GPTQ_BLOCK_SIZE",
    "MUON_BACKEND_STEPS",
    "MUON_DTYPE",
    "MUON_ROW_NORMALIZE",
    "TIED_EMBED_INIT_STD",
    "MUON_GRAM_ENABLED",
    "MUON_PIN_NORM",
    "DENSE_LAST_WIDTH",
    "EMA_BLEND",
    "LOOP_MIX_ENABLED",
    "MUON_CAUTIOUS_WD",
    "MUON_ROW_FLOOR",
    "MUON_SOAP_EVERY",
    "MUON_WD_END",
    "TTT_BETA1",
    "NESTEROV_BETA",
    "NESTEROV_HORIZON",
    "TRAIN_SEQ_SCHEDULE",
    "TTT_BIAS_LR",
    "TTT_START_AVERAGE",
    "TTT_LR_SITES",
    "TTT_LR_DECAY_CHUNKS",
    "TTT_LOGIT_SCALE_LR",
    "TTT_REPLAY_TOKENS",
    "TTT_WARM_B_MEMORY",
    "TTT_WARM_START_B",
}
OTHER_VARIABLES = {
    "SOAK",
    "TRIALS",
    "OMP_NUM_THREADS",
    "TORCH_INDEX_URL",
    "TORCH",
    "GOLDEN_DIR",
    "HF_ENDPOINT",
    "HF_TOKEN",
    *launch.OURS,
}
# what a run, a dataset or a user makes or fetches, so that a checkout does not hold it
MADE = """log.txt model.pt artifact.bin result.json stderr.txt manifest.json submission.json
    docs_train.jsonl.xz docs_selected.jsonl train.jsonl.xz val.jsonl.xz
    fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model""".split()
KEPT_TYPES = {".py", ".sh", ".md", ".toml", ".txt", ".env", ".json", ".model"}
MADE_UNDER = ("runs/", "data/demo/", "data/mine", "data/datasets/", "data/published/", ".venv")


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def settings_in(preset):
    """Names and values of presets/PRESET, as text; a name that stands twice is an error."""
    lines = [
        line for line in read(f"presets/{preset}").splitlines() if line and not line.startswith("#")
    ]
    values = dict(shlex.split(line)[0].split("=", 1) for line in lines)
    assert len(values) == len(lines)
    return values


def code_in(text):
    """What stands between backticks, in lines or in blocks."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return blocks + re.findall(
        r"`([^`\n]+)`", re.sub(r"^```\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    )


# ---- files, targets, settings


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    words = {word.removeprefix("./") for code in code_in(read(page)) for word in code.split()}
    paths = {
        word
        for word in words
        if re.fullmatch(r"[\w./-]+(\.[a-z]+|/)", word) and not word.startswith(("/", "."))
    }
    kept = {path for path in paths if path not in MADE and not path.startswith(MADE_UNDER)}
    files = {path for path in kept if Path(path).suffix in KEPT_TYPES or path.endswith("/")}
    folders = ROOT, (ROOT / page).parent
    assert {
        path for path in files if not any((folder / path).exists() for folder in folders)
    } == set()


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_that_a_page_names_exist(page):
    targets = set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), re.MULTILINE))
    named = {
        target
        for code in code_in(read(page))
        for target in re.findall(r"\bmake ([a-z][\w-]*)", code)
    }
    assert named <= targets


@pytest.mark.parametrize(
    "page", [*PAGES, *(f"presets/{path.name}" for path in ROOT.glob("presets/*.env"))]
)
def test_settings_that_a_page_names_are_declared(page):
    text = read(page)
    named = set(re.findall(r"(?<![\w<])([A-Z][A-Z0-9_]+)=", text))
    named |= {code for code in code_in(text) if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", code)}
    history = "docs/LOG.md", "docs/PRESETS.md", "docs/DEFAULTS.md", "CHANGELOG.md"
    gone = REMOVED if page in history else set()
    assert named <= SETTINGS | OTHER_VARIABLES | gone


@pytest.mark.parametrize("preset", sorted(path.name for path in ROOT.glob("presets/*.env")))
def test_presets_are_settings_that_work(preset, monkeypatch):
    values = settings_in(preset)
    install_parts_for(values, monkeypatch)
    train_gpt.Hyperparameters.from_env(values)


# ---- links


def anchors_of(page):
    """Anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def broken_links(page):
    """Links of a page to files or headings that are not in the repository.

    Links may name their target, `[text](target)`, or a line `[key]: target` by `[text][key]`.
    """
    text = page.read_text(encoding="utf-8")
    targets = dict(re.findall(r"^\[(?!\^)(.+)\]: (\S+)$", text, re.MULTILINE))
    keys = re.findall(r"\]\[(\w+)\]", text)
    broken = [f"[{key}]" for key in keys if key not in targets]
    links = re.findall(r"\]\(([^)\s]+)\)", text) + list(targets.values())
    for link in links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files_and_headings(page):
    assert broken_links(ROOT / page) == []


def test_a_link_to_a_missing_file_or_heading_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A: heading, `x`\n[1](page.md#a-heading-x) [2](page.md#b) [3](gone.md) [4](#c)\n"
        "[5][here] [6][lost] [7][nowhere]\n\n[here]: #a-heading-x\n[lost]: #d\n"
    )
    assert broken_links(page) == ["[nowhere]", "page.md#b", "gone.md", "#c", "#d"]


# ---- pyproject.toml against the requirements


def requirements(page):
    """The requirements of one file, without comments and options."""
    return {line for line in read(page).splitlines() if line and not line.startswith(("#", "-"))}


def test_extras_are_the_requirements_files():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    torch, *others = project["dependencies"]
    assert torch.startswith("torch") and set(others) == requirements("requirements.txt")
    assert set(extras["gpu"]) == requirements("requirements-gpu.txt")
    assert set(extras["dev"]) == requirements("requirements-dev.txt")


def test_make_lint_passes_over_the_packed_script_of_a_record(tmp_path):
    (tmp_path / "pyproject.toml").write_text(read("pyproject.toml"))
    folder = tmp_path / "records" / "track_10min_16mb" / "2026-01-01_name"
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_bytes(b"# coding: latin-1\nx = '\xe9\xff'\n")
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    linted = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


# ---- docs/DEFAULTS.md against the code, the presets and the campaigns


def section_of_defaults(heading):
    """The text under a heading of docs/DEFAULTS.md."""
    return re.split(rf"\n##+ {heading}\n", read("docs/DEFAULTS.md"))[1].split("\n##")[0]


def rows_of_defaults(heading):
    """Cells of all rows of the tables under a heading, titles included."""
    lines = re.findall(r"^\|(.+)\|$", section_of_defaults(heading), re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def documented_settings():
    """(setting, default, origin) of each row of the first tables, as text."""
    rows = rows_of_defaults("Settings and their evidence")
    return [(row[0].strip("`"), *row[1:3]) for row in rows if row[0].startswith("`")]


def fields_by_setting():
    return {field.name.upper(): field for field in dataclasses.fields(train_gpt.Hyperparameters)}


def test_every_setting_has_its_evidence_or_changes_no_score():
    documented = [name for name, *_ in documented_settings()]
    others = re.findall(r"`([A-Z0-9_]+)`", section_of_defaults("Settings that change no score"))
    declared = [*fields_by_setting()]
    assert sorted(documented + others) == sorted(declared)
    assert documented == [name for name in declared if name in documented]  # the order of --help


def test_documented_defaults_are_those_of_the_code():
    fields = fields_by_setting()
    wrong = [
        (name, default)
        for name, default, _ in documented_settings()
        if name not in fields
        or train_gpt.parse_setting(fields[name], default) != fields[name].default
    ]
    assert wrong == []


def test_presets_named_as_origin_have_the_default():
    fields = fields_by_setting()
    values = {path.stem: settings_in(path.name) for path in ROOT.glob("presets/pr*.env")}
    for name, _, origin in documented_settings():
        assert name in fields
        equal = {
            preset
            for preset, its in values.items()
            if name in its
            and train_gpt.parse_setting(fields[name], its[name]) == fields[name].default
        }
        named = set(re.findall(r"`(\w+)`", origin))
        assert named <= equal, name
        assert ("pr1855" in named) == ("pr1855" in equal), name


@pytest.mark.parametrize(
    "campaign, blocks, noise, freedom",
    [
        ("factorial", "seed", None, None),
        ("factorial2", "none", 0.0016, 4),
        ("eight", "seed", 0.0016, 4),
    ],
)
def test_screened_ideas_have_the_figures_of_their_campaign(campaign, blocks, noise, freedom):
    rows = rows_of_defaults("Ideas for the recipe that were screened")
    runs = bench_recipe.read_campaign(ROOT / f"docs/campaigns/{campaign}.jsonl")
    measured, _ = bench_recipe.effect_rows(runs, "prequant", blocks, noise)
    assert measured
    for factor, _, count, difference, error, ratio, p, _ in measured:
        if freedom:
            p = f"{stats.t(freedom).sf(float(ratio)):.2g}"
        rounded = f"{float(difference):+.4f} ± {float(error):.4f}"
        assert [factor, count, rounded, ratio, p] in [[row[0], *row[2:6]] for row in rows]


@pytest.mark.parametrize(
    "campaign, arm", [("fused", "fused+brake"), ("context", "ctx"), ("schedule", "ctx")]
)
def test_finals_have_the_figures_of_their_campaign(campaign, arm):
    rows = rows_of_defaults("Ideas for the recipe that were screened")
    runs = bench_recipe.read_campaign(ROOT / f"docs/campaigns/{campaign}.jsonl")
    measured = bench_recipe.table_rows(runs, arm, "base")
    assert len(measured) == 3
    for _, stage, _, _, difference, error, t, p, *_ in measured:
        name = {"ttt": "TTT"}.get(stage, stage)
        rounded = f"{float(difference):+.4f} ± {float(error):.4f}"
        assert [name, rounded, t, p] in [row[3:7] for row in rows]


# ---- docs/RESULT.md against the code


def keys_of(node):
    """Constant keys of every dictionary written inside a node."""
    dictionaries = [n for n in ast.walk(node) if isinstance(n, ast.Dict)]
    return {key.value for d in dictionaries for key in d.keys if isinstance(key, ast.Constant)}


def assigned(tree, name):
    """Keys of the dictionary `name`: from its display and from assignments to its items."""
    keys = set()
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else []:
            if isinstance(target, ast.Name) and target.id == name:
                keys |= keys_of(node.value)
            elif isinstance(target, ast.Subscript) and getattr(target.value, "id", None) == name:
                keys.add(target.slice.value)
    return keys


def called_with(source, name):
    """Constant first arguments of the calls of a function or method `name`."""
    calls = [
        node
        for function in source.values()
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
    ]
    return {
        call.args[0].value
        for call in calls
        if isinstance(call.args[0] if call.args else None, ast.Constant)
        and name in (getattr(call.func, "attr", ""), getattr(call.func, "id", ""))
    }


def scored(source):
    """Names of all scores; `sliding` is of presets/published.py."""
    return called_with(source, "score_stage") | called_with(source, "score") | {"sliding"}


@pytest.fixture(scope="module")
def source():
    """Functions and methods of train_gpt.py: {name or Class.name: node}."""
    tree = ast.parse(read("train_gpt.py"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            functions |= {
                f"{node.name}.{f.name}": f for f in node.body if isinstance(f, ast.FunctionDef)
            }
    return functions


def described(heading, table=0):
    """First column of a table under a heading of docs/RESULT.md, the names between backticks."""
    section = read("docs/RESULT.md").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    tables = [part for part in section.split("\n\n") if part.lstrip().startswith("|")]
    return set(re.findall(r"^\| `(\w+)` \|", tables[table], re.MULTILINE))


def test_every_key_of_result_is_described(source):
    produced = (
        keys_of(source["Stages.info"])
        | assigned(source["Stages.result"], "result")
        | keys_of(source["Trainer.summary"])
    )
    operations = source["operations"]
    produced |= keys_of(operations) | assigned(operations, "needed")  # **ops.names
    assert {"version", "violations", "steps", "attention", "peak_memory_bytes"} <= produced
    # Stages and Trainer.train put these into what Trainer.summary made
    assert described("Keys") == produced | {
        "group_bytes",
        "leaked_documents",
        "quant_check",
        "resumed_at_step",
    }


def test_every_score_and_its_fields_are_described(source):
    # evaluations inside training are logged only
    names = scored(source) - {"training"}
    assert described("Scores", 0) == names and len(names) == 4
    fields = keys_of(source["Score.total"]) | keys_of(source["TestTimeTrainer.evaluate"].body[-1])
    assert described("Scores", 1) == fields


def test_every_stage_is_described(source):
    stages = called_with(source, "stage") | {f"eval_{name}" for name in scored(source)}
    assert described("Seconds") == stages and len(stages) == 12
