"""The shape of the source: small enough to read, in one direction, and told in docstrings."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from mutants import MUTANTS
from tiny import ROOT

# What is to be read: all but the task's truth, the Triton versions, experiments and tools.
CORE = sorted(path for path in [*ROOT.glob("train_*.py"), *ROOT.glob("minirlhf/*.py"), *ROOT.glob("minirlhf/kernels/*.py")]
              if path.name not in ("__init__.py", "helpdesk.py") and not path.name.endswith("_triton.py"))
# What one training step and its data pass through: all of that but settings, saved files and judging.
STEP = [path for path in CORE if path.stem not in ("flags", "config", "checkpoint", "gpt2", "start", "evaluate", "compare")]
# The order of reading: a module imports only what stands before it.
ORDER = """seeding parallel log flags config device tokenizer json_files records data task packing model kernels.logprob
kernels.returns kernels generate losses advantages rollout ladder optim evaluate checkpoint gpt2 start environment compare
run train_reward train_policy""".split()
EACH_FILE = pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(path: Path) -> int:
    """Without blank lines, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    lines = {line for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in SILENT
             for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def imported(path: Path) -> list[str]:
    """The modules of this project that a file imports, wherever it does."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" if node.module == "minirlhf" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name.removeprefix("minirlhf.") for name in names if name.startswith("minirlhf")]


def functions(path: Path) -> list[tuple[str, ast.AST, int]]:
    """(name, function or class, its lines) of a file, methods and nested ones too."""
    return [(node.name, node, node.end_lineno - node.lineno + 1) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def test_the_core_can_be_read_in_an_evening():
    """What a step passes through, with its comments and docstrings; and, by its code alone, all but GPT-2's file formats."""
    assert len(STEP) > 20 and sum(bool(line.strip()) for path in STEP for line in path.read_text("utf-8").splitlines()) <= 2500
    assert sum(lines_of_code(path) for path in CORE if path.name != "gpt2.py") <= 2500


def test_lines_are_counted_as_said(tmp_path):
    path = tmp_path / "a.py"
    path.write_text('"""Doc."""\n\n# comment\nx = [1,\n     2]  # two\n\n\ndef f():\n    """Doc\n    of f."""\n    return x\n')
    assert lines_of_code(path) == 4


@EACH_FILE
def test_files_and_functions_fit(path):
    """A file in 250 lines, a function on a screen; the scripts' main is the algorithm itself, and may have one and a half."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 250
    limit = 80 if path.parent == ROOT else 50
    assert [(name, lines) for name, node, lines in functions(path) if isinstance(node, ast.FunctionDef) and lines > limit] == []


def test_imports_point_one_way():
    """In the order in which the files are to be read; experiments and tools stand outside."""
    for path in CORE:
        own = path.stem if path.parent.name != "kernels" else f"kernels.{path.stem}"
        before = ORDER[:ORDER.index(own)]
        late = [name for name in imported(path) if name not in before and not name.endswith("_triton")]
        assert late == [], f"{own} imports {late}"


def test_the_readme_names_the_files_in_this_order():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Reading order\n")[2].partition("A file imports")[0]
    assert re.findall(r"`(\w+)/?`", text) == [name for name in ORDER if "." not in name and not name.startswith("train_")]


@EACH_FILE
def test_what_others_use_is_told_in_a_docstring(path):
    """Unless a line or two say it all."""
    outer = ast.parse(path.read_text(encoding="utf-8")).body
    methods = [node for whole in outer if isinstance(whole, ast.ClassDef) and whole.name[0] != "_" for node in whole.body]
    told = [node for node in outer + methods if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    long = [node for node in told if not node.name.startswith("_") and len(node.body) > 3]
    assert [node.name for node in long if not ast.get_docstring(node)] == []


def test_the_policy_loop_is_short_and_its_stages_are_numbered():
    text = (ROOT / "train_policy.py").read_text(encoding="utf-8")
    (main,) = [node for name, node, _ in functions(ROOT / "train_policy.py") if name == "main"]
    (loop,) = [node for node in ast.walk(main) if isinstance(node, ast.For)]
    assert loop.end_lineno - loop.lineno + 1 < 60
    body = "\n".join(text.splitlines()[loop.lineno - 1:loop.end_lineno])
    assert [body.count(f"# {number}. ") for number in range(1, 7)] == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_each_mutant_finds_its_text_and_its_test(mutant):
    """A line that was reworded leaves a fault that nobody tries any more."""
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    file, _, name = mutant.test.partition("::")
    path = ROOT / "tests" / f"test_{file}.py"
    assert f"test_{name.partition('[')[0]}" in [function for function, _, _ in functions(path)]
