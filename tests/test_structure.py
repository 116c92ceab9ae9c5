"""The shape of the source: packages in one direction, short functions, documented names."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from mutants import MUTANTS
from tiny import ROOT

# A unit is a file or folder directly in minirlhf/, or a script. A unit imports only units of
# earlier lines.
LAYERS = """
run kernels
config
data
model
rl
evaluation
plain train_reward train_policy
tools
lab
"""
ORDER = [line.split() for line in LAYERS.split("\n") if line]
UNITS = [unit for layer in ORDER for unit in layer]

PACKAGES = ("run", "kernels", "data", "model", "rl", "evaluation")
SCRIPTS = sorted(ROOT.glob("train_*.py"))
CORE = sorted(
    path
    for path in [
        *SCRIPTS,
        ROOT / "minirlhf" / "config.py",
        *(file for package in PACKAGES for file in (ROOT / "minirlhf" / package).glob("*.py")),
    ]
    if path.name != "__init__.py"
)
PLAIN = ROOT / "minirlhf" / "plain.py"
SOURCES = sorted([*SCRIPTS, *(ROOT / "minirlhf").rglob("*.py")])
ALGORITHM = [*SCRIPTS, *sorted((ROOT / "minirlhf" / "rl").glob("*.py"))]
EACH_CORE_FILE = pytest.mark.parametrize(
    "path", [*CORE, PLAIN], ids=lambda path: str(path.relative_to(ROOT))
)
EACH_ALGORITHM_FILE = pytest.mark.parametrize("path", ALGORITHM, ids=lambda path: path.name)
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def lines_of_code(path: Path) -> int:
    """Without blank lines, comments and docstrings."""
    text = read(path)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node):
                lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def unit_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "minirlhf" else parts[0]


def imported_units(path: Path) -> set[str]:
    """The units that a file imports anywhere, its own included."""
    modules = []
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    parts = [module.split(".") for module in modules]
    return {p[1] if p[0] == "minirlhf" else p[0] for p in parts if len(p) > 1 or p[0] in UNITS} & {
        *UNITS
    }


def edges() -> set[tuple[str, str]]:
    """(importing unit, imported unit)."""
    return {
        (unit_of(path), unit)
        for path in SOURCES
        for unit in imported_units(path)
        if unit_of(path) in UNITS and unit != unit_of(path)
    }


def functions(path: Path) -> list[ast.FunctionDef]:
    """All functions of a file, methods and nested ones included."""
    return [node for node in ast.walk(ast.parse(read(path))) if isinstance(node, ast.FunctionDef)]


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


# ---- units ---------------------------------------------------------------------------------------


def test_the_units_are_the_listed_ones():
    units = {unit_of(path) for path in SOURCES} - {"__init__"}
    assert units == set(UNITS)
    assert len(UNITS) <= 12


def test_there_are_at_most_45_import_edges():
    assert 20 < len(edges()) <= 45


def test_units_import_only_earlier_units():
    layer = {unit: number for number, units in enumerate(ORDER) for unit in units}
    back = [(unit, other) for unit, other in edges() if layer[other] >= layer[unit]]
    assert back == []


def test_no_module_imports_a_module_that_imports_it():
    """A cycle between modules of one package breaks the import in one of the two orders."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    graph = {}
    for name, path in paths.items():
        imports = set()
        for node in ast.parse(read(path)).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                imports |= {other for other in [node.module, *names] if other in paths}
        graph[name] = imports - {name}
    done: set[str] = set()
    while ready := [name for name in graph if name not in done and graph[name] <= done]:
        done.update(ready)
    assert sorted(set(graph) - done) == []


def test_the_readme_lists_all_units_in_this_order():
    text = read(ROOT / "README.md").partition("## Files\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^(?:minirlhf/)?(\w+)(?:\.py|/) +\S", text, re.MULTILINE)
    assert listed == [*UNITS, "data", "tests"]


# ---- size ----------------------------------------------------------------------------------------


def test_lines_are_counted_without_comments_and_docstrings(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        '"""Doc."""\n\n# comment\nx = [1,\n     2]  # two\n\n\n'
        'def f():\n    """Doc\n    of f."""\n    return x\n'
    )
    assert lines_of_code(path) == 4


def test_plain_has_at_most_300_lines_of_code():
    assert lines_of_code(PLAIN) <= 300


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_have_at_most_50_lines(path):
    """The exception is main in the two scripts, because it contains the training loop."""
    long = [node.name for node in functions(path) if length(node) > 50]
    assert [name for name in long if not (name == "main" and path in SCRIPTS)] == []


@EACH_ALGORITHM_FILE
def test_functions_of_the_algorithm_take_at_most_six_parameters(path):
    for node in functions(path):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [argument.arg for argument in arguments if argument.arg != "self"]
        assert len(names) <= 6, f"{node.name} takes {names}"
        assert node.args.kwarg is None, f"{node.name} takes **{node.args.kwarg}"


@EACH_ALGORITHM_FILE
def test_fields_are_read_by_name_not_by_position(path):
    """`samples[3:]` or `*rollout[:4]` hides which fields are meant."""
    for node in ast.walk(ast.parse(read(path))):
        is_slice = isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice)
        if is_slice and isinstance(node.value, ast.Name):
            assert node.value.id not in ("samples", "rollout", "task"), node.lineno


# ---- the training loop ---------------------------------------------------------------------------


def policy_loop() -> tuple[ast.For, str]:
    """The loop of train_policy.main, and its source."""
    path = ROOT / "train_policy.py"
    (main,) = [node for node in functions(path) if node.name == "main"]
    (loop,) = [node for node in ast.walk(main) if isinstance(node, ast.For)]
    return loop, "\n".join(read(path).splitlines()[loop.lineno - 1 : loop.end_lineno])


def test_the_policy_loop_has_at_most_40_lines_and_five_numbered_stages():
    _, source = policy_loop()
    lines = [line for line in source.splitlines() if line.strip()]
    code = [line for line in lines if not line.strip().startswith("#")]
    assert len(code) <= 40
    stages = [source.count(f"# {number}. ") for number in range(1, 7)]
    assert stages == [1, 1, 1, 1, 1, 0]


def test_the_reward_script_shows_two_loops():
    path = ROOT / "train_reward.py"
    loops = {
        node.name: [loop for loop in ast.walk(node) if "run.steps()" in ast.unparse(loop)]
        for node in functions(path)
    }
    assert [name for name in loops if loops[name]] == ["finetune", "learn_preferences"]


# ---- threads -------------------------------------------------------------------------------------


def test_threads_that_wait_do_not_spin_for_long():
    """Spinning threads take the cores from each other if another program runs.

    The setting has an effect only before torch is imported.
    """
    code = "import {}, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    for environment, expected in (({}, "1000"), (dict(GOMP_SPINCOUNT="7"), "7")):
        inherited = {key: os.environ[key] for key in os.environ if key != "GOMP_SPINCOUNT"}
        done = subprocess.run(
            [sys.executable, "-c", code.format("minirlhf")],
            env=inherited | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [expected, "False"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_import_the_project_before_torch(path):
    imports = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.parse(read(path)).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = [name.partition(".")[0] for name in imports]
    assert names.index("minirlhf") < names.index("torch")


# ---- plain.py ------------------------------------------------------------------------------------


def test_plain_imports_only_the_embedded_task():
    """It is the oracle of the real code, so it must not share code with it."""
    modules = [
        node.module
        for node in ast.walk(ast.parse(read(PLAIN)))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minirlhf")
    ]
    assert modules == ["minirlhf.data"]
    assert "from minirlhf.data import helpdesk\n" in read(PLAIN)


# ---- docstrings and mutants ----------------------------------------------------------------------


@EACH_CORE_FILE
def test_public_functions_have_a_docstring(path):
    """Unless they have three statements or fewer."""
    module = ast.parse(read(path))
    assert ast.get_docstring(module)
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    methods = [node for each in classes if not each.name.startswith("_") for node in each.body]
    for node in [*module.body, *methods]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert len(node.body) <= 3 or ast.get_docstring(node), node.name


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_each_mutant_finds_its_text_and_its_test(mutant):
    """A line that was reworded would leave a bug that is no longer tried."""
    assert read(ROOT / mutant.file).count(mutant.old) == 1
    file, _, name = mutant.test.partition("::")
    path = ROOT / "tests" / f"test_{file}.py"
    names = [node.name for node in functions(path)]
    assert f"test_{name.partition('[')[0]}" in names
