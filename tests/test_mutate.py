"""The mutation tester: which mutants it makes, which tests it chooses, and what it refuses."""

import ast
import subprocess
import sys

import mutate
import pytest
from tiny import ROOT

SOURCE = '''"""A page."""
import torch
from x import y

def f(a: int, b=2.5, *, flag=True) -> int:
    """Text with 1 + 1."""
    if not a < 3:
        raise UserError(f"{a + 1} is too small", 7)
    c = g(a, b, scale=4)[a:]
    c[0] = c.sum(1).detach()
    return -c + h(c, dim=-1)
'''


def changes(source: str) -> list[tuple[str, str, str]]:
    return [(m.operator, m.old, m.new) for m in mutate.mutants_of("file.py", source)]


def test_mutants_of_a_small_file():
    assert sorted(changes(SOURCE)) == sorted(
        [
            ("constant", "2.5", "5.0"),
            ("boolean", "True", "False"),
            ("dropped sign", "not a < 3", "(a < 3)"),
            ("comparison", "a < 3", "(a <= 3)"),
            ("constant", "3", "4"),
            ("dropped statement", 'raise UserError(f"{a + 1} is too small", 7)', "pass"),
            ("swapped arguments", "g(a, b, scale=4)", "(g(b, a, scale=4))"),
            ("dropped keyword", "g(a, b, scale=4)", "(g(a, b))"),
            ("constant", "4", "5"),
            ("slice", "a:", "a + 1:"),
            ("dropped statement", "c[0] = c.sum(1).detach()", "pass"),
            ("constant", "0", "1"),
            ("dropped detach", "c.sum(1).detach()", "c.sum(1)"),
            ("dim", "1", "0"),
            ("arithmetic", "-c + h(c, dim=-1)", "(-c - h(c, dim=-1))"),
            ("dropped sign", "-c", "(c)"),
            ("dropped keyword", "h(c, dim=-1)", "(h(c))"),
            ("constant", "1", "2"),
        ]
    )


def test_every_mutant_parses_and_differs_from_the_source():
    for mutant in mutate.mutants_of("file.py", SOURCE):
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(SOURCE))


def test_the_id_of_a_mutant_does_not_depend_on_other_lines():
    before = {m.id for m in mutate.mutants_of("file.py", SOURCE)}
    after = {m.id for m in mutate.mutants_of("file.py", "x = None\n\n" + SOURCE)}
    assert len(before) == 18
    assert before == after
    twice = mutate.mutants_of("file.py", "def f(a):\n    g(a)\n    g(a)\n")
    assert len({m.id for m in twice}) == len(twice) == 2


def test_the_tests_of_a_mutant_are_those_that_execute_its_lines_quick_files_first():
    (mutant,) = mutate.mutants_of("a.py", "def f(x):\n    return g(\n        -x)\n")
    assert (mutant.line, mutant.last_line) == (2, 3)
    lines = {
        "tests/slow.py::one": {("a.py", 3), ("b.py", 9)},
        "tests/quick.py::two": {("a.py", 2)},
        "tests/quick.py::three": {("a.py", 1)},
        "tests/other.py::four": {("b.py", 2)},
    }
    seconds = dict(zip(lines, (9.0, 1.0, 1.0, 1.0)))
    line_map = mutate.LineMap(lines, seconds)
    assert line_map.tests_of(mutant) == ["tests/quick.py::two", "tests/slow.py::one"]
    at_import = mutant._replace(line=8, last_line=8)
    assert len(line_map.tests_of(at_import)) == 3


def test_survivors_are_listed_with_a_reason():
    rows = mutate.read_survivors()
    for row in rows.values():
        assert row["kind"] in ("equivalent", "speed", "message")
        assert len(row["reason"]) > 10
    everything = {
        mutant.id
        for file in mutate.target_files(ROOT, ["*"])
        for mutant in mutate.mutants_of(file, (ROOT / file).read_text())
    }
    outdated = [row for row in rows.values() if row["id"] not in everything]
    assert not outdated, "these mutants no longer exist; remove them from tests/survivors.jsonl"


@pytest.mark.parametrize(
    "arguments, message",
    [(["--sample", "0"], "must be at least 1"), (["--files", "nothing.py"], "no file to mutate")],
)
def test_wrong_arguments_are_refused(arguments, message):
    command = [sys.executable, "-m", "tests.mutate", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mutant_that_does_not_parse_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(mutate, "changed", lambda node, **fields: "(")
    options = mutate.argparse.Namespace(files=["*advantages.py"], seed=0, sample=1)
    with pytest.raises(SystemExit, match="2"):
        mutate.draw(ROOT, options)
    assert "does not parse" in capsys.readouterr().err
