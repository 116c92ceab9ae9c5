"""Systematic mutation testing: how many small faults in the source does no test notice?

    python -m tests.mutate --sample 500 [--seed N] [--jobs N] [--minutes N] [--files GLOB ...]

Every place where one of the operators below applies is a mutant. A seeded sample of them is tried.
Each goes into a copy of the source, and the tests that execute its lines run until one fails, the
quick ones first, for at most --seconds. Which test executes which line is measured first, by one
run of the default tests under sys.settrace.

Results are appended to --out, one JSON line each, so that a stopped run can be continued. The
executed lines are kept next to it, and are used again if no file has changed. Survivors
are compared with tests/survivors.jsonl, where each has a kind (equivalent, speed, message) and a
reason. The exit status is 1 if a survivor is not listed there (with --at-least: if fewer mutants
are killed), 2 if nothing could be measured.
"""

import argparse
import ast
import contextlib
import copy
import fnmatch
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
SURVIVORS = ROOT / "tests" / "survivors.jsonl"
TARGETS = (
    "minirlhf/rl/*.py",
    "minirlhf/model/*.py",
    "minirlhf/kernels/*.py",
    "minirlhf/data/*.py",
    "minirlhf/evaluation/*.py",
    "minirlhf/run/optimizer.py",
    "minirlhf/run/parallel.py",
    "train_reward.py",
    "train_policy.py",
)
# Triton's kernels run in an optional step, not in the default tests.
EXCLUDED = ("*_triton.py", "*/__init__.py")
ALGORITHM = ("minirlhf/rl/*.py", "minirlhf/kernels/*.py")


class Mutant(NamedTuple):
    id: str  # does not change when other lines move
    file: str
    function: str
    line: int  # first and last line of the statement
    last_line: int
    operator: str
    old: str
    new: str
    source: str  # the whole file with the fault


# ---- the operators -------------------------------------------------------------------------------

ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
COMMUTATIVE = {"max", "min", "maximum", "minimum", "isinstance", "print", "equal", "logical_and"}
WITH_DIM = {
    "all", "amax", "any", "argmax", "cat", "chunk", "cumsum", "flip", "gather", "log_softmax",
    "logsumexp", "max", "mean", "size", "softmax", "split", "squeeze", "stack", "std", "sum",
    "unsqueeze", "var",
}  # fmt: skip


def stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def name_of(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def changed(node: ast.AST, **fields) -> str:
    """The source of a copy of the node with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    text = ast.unparse(ast.fix_missing_locations(new))
    return f"({text})" if isinstance(node, ast.expr) and not isinstance(node, ast.Slice) else text


def replaced(values: list, index: int, value) -> list:
    return [*values[:index], value, *values[index + 1 :]]


def constant_mutants(node: ast.Constant, parent: ast.AST) -> Iterator[tuple[str, str]]:
    value = node.value
    if isinstance(value, bool):
        yield "boolean", str(not value)
    elif isinstance(value, int):
        if isinstance(parent, ast.Call) and name_of(parent) in WITH_DIM and value in (0, 1):
            yield "dim", str(1 - value)
        else:
            yield "constant", str(value + 1)
    elif isinstance(value, float):
        yield "constant", str(2 * value if value else 1.0)


def call_mutants(node: ast.Call) -> Iterator[tuple[str, str]]:
    name = name_of(node)
    plain = not any(isinstance(argument, ast.Starred) for argument in node.args)
    if len(node.args) >= 2 and plain and name not in COMMUTATIVE:
        first, second, *rest = node.args
        if ast.dump(first) != ast.dump(second):
            yield "swapped arguments", changed(node, args=[second, first, *rest])
    for index, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            kept = node.keywords[:index] + node.keywords[index + 1 :]
            yield "dropped keyword", changed(node, keywords=kept)
        if keyword.arg == "dim" and isinstance(keyword.value, ast.Constant):
            other = ast.keyword("dim", ast.Constant(0 if keyword.value.value else 1))
            yield "dim", changed(node, keywords=replaced(node.keywords, index, other))
    if name == "detach":
        yield "dropped detach", ast.unparse(node.func.value)
    if name == "no_grad":
        yield "dropped no_grad", "torch.enable_grad()"


def slice_mutants(node: ast.Slice) -> Iterator[tuple[str, str]]:
    one = ast.Constant(1)
    if node.lower is not None:
        later = ast.BinOp(node.lower, ast.Add(), one)
        yield "slice", changed(node, lower=later)
    if node.upper is not None:
        earlier = ast.BinOp(node.upper, ast.Sub(), one)
        yield "slice", changed(node, upper=earlier)


def expression_mutants(node: ast.AST, parent: ast.AST) -> Iterator[tuple[str, str]]:
    """(operator, new source) of an expression."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield "arithmetic", changed(node, op=ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        if not isinstance(node.operand, ast.Constant):
            yield "dropped sign", f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "boolean", changed(node, op=other)
    elif isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            new = COMPARISONS[type(op)]()
            yield "comparison", changed(node, ops=replaced(node.ops, index, new))
    elif isinstance(node, ast.Constant):
        yield from constant_mutants(node, parent)
    elif isinstance(node, ast.Call):
        yield from call_mutants(node)
    elif isinstance(node, ast.Slice):
        yield from slice_mutants(node)
    is_condition = isinstance(parent, ast.If | ast.While | ast.IfExp) and node is parent.test
    is_negated_above = isinstance(node, ast.Compare) or isinstance(
        getattr(node, "op", None), ast.Not
    )
    if is_condition and not is_negated_above:
        yield "negated condition", f"(not ({ast.unparse(node)}))"


def statement_mutants(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """(operator, new source) of a statement."""
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    is_store = isinstance(node, ast.AugAssign) or (
        isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    )
    if is_call or is_store or isinstance(node, ast.Raise | ast.Continue | ast.Break):
        yield "dropped statement", "pass"


# ---- all mutants of a file -----------------------------------------------------------------------


def is_ignored(node: ast.AST) -> bool:
    """Message wording, output, documentation and types: nothing that a result depends on."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return True
    expression = node.value if isinstance(node, ast.Expr) else node
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        return True
    return isinstance(expression, ast.Call) and name_of(expression) in ("print", "UserError")


def children(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below, without annotations."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child


def places(node: ast.AST, statement, function: str) -> Iterator[tuple]:
    """(node, parent, statement, function) of every node that may be mutated, in source order."""
    for child in children(node):
        if is_ignored(child):
            continue
        inside = child if isinstance(child, ast.stmt) else statement
        name = function
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            name = f"{function}.{child.name}".lstrip(".")
        yield child, node, inside, name
        yield from places(child, inside, name)


def line_span(statement: ast.stmt) -> tuple[int, int]:
    """The lines of a statement, or of the header of a compound one, with its decorators."""
    body = getattr(statement, "body", None)
    last = statement.end_lineno
    if isinstance(body, list):
        last = max(statement.lineno, body[0].lineno - 1)
    decorators = [node.lineno for node in getattr(statement, "decorator_list", [])]
    return min([statement.lineno, *decorators]), last


def mutants_of(file: str, text: str) -> list[Mutant]:
    data = text.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    repeated: Counter = Counter()
    result = []
    for node, parent, statement, function in places(ast.parse(text), None, ""):
        if not hasattr(node, "lineno"):
            continue
        found = statement_mutants(node) if isinstance(node, ast.stmt) else ()
        for operator, new in [*found, *expression_mutants(node, parent)]:
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            old = data[begin:end].decode()
            key = (file, function, ast.unparse(statement), operator, old, new)
            repeated[key] += 1
            digest = hashlib.sha256(repr((key, repeated[key])).encode()).hexdigest()[:12]
            source = (data[:begin] + new.encode() + data[end:]).decode()
            result.append(
                Mutant(digest, file, function, *line_span(statement), operator, old, new, source)
            )
    return result


def target_files(root: Path, patterns: list[str]) -> list[str]:
    paths = sorted(path for pattern in TARGETS for path in root.glob(pattern))
    names = [path.relative_to(root).as_posix() for path in paths]
    names = [name for name in names if not any(fnmatch.fnmatch(name, p) for p in EXCLUDED)]
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]


def draw(root: Path, options: argparse.Namespace) -> list[Mutant]:
    """The sample, in random order, so that a part of it is a smaller sample."""
    everything = []
    for file in target_files(root, options.files):
        for mutant in mutants_of(file, (root / file).read_text()):
            try:
                compile(mutant.source, file, "exec")
            except SyntaxError as error:
                stop(
                    f"{file}:{mutant.line}: the mutant {mutant.new!r} does not parse "
                    f"({error.msg}); correct tests/mutate.py"
                )
            everything.append(mutant)
    if not everything:
        stop(f"--files {' '.join(options.files)}: no file to mutate")
    print(f"{len(everything)} possible mutants in {len(set(m.file for m in everything))} files")
    everything.sort(key=lambda mutant: mutant.id)
    return random.Random(options.seed).sample(everything, min(options.sample, len(everything)))


# ---- which test executes which line --------------------------------------------------------------


class LineMap(NamedTuple):
    lines: dict[str, set[tuple[str, int]]]  # of each test
    seconds: dict[str, float]

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that execute a line of the mutant: of its own test file, then of quick files.

        Lines outside of functions run at import: every test that uses the file counts.
        """
        span = range(mutant.line, mutant.last_line + 1)
        needed = {(mutant.file, line) for line in span}
        covering = [test for test, lines in self.lines.items() if lines & needed]
        if not covering:
            covering = [
                test
                for test, lines in self.lines.items()
                if any(file == mutant.file for file, _ in lines)
            ]
        cost: Counter = Counter()
        for test in covering:
            cost[test.split("::")[0]] += self.seconds[test]
        own_file = f"tests/test_{Path(mutant.file).stem}.py"

        def order(test: str) -> tuple:
            file = test.split("::")[0]
            return file != own_file, cost[file], self.seconds[test]

        return sorted(covering, key=order)

    def first_tests(self, mutant: Mutant, limit: float) -> tuple[list[str], float]:
        """(the first of tests_of that take about `limit` seconds in all, their seconds)."""
        tests = []
        seconds = 0.0
        for test in self.tests_of(mutant):
            tests.append(test)
            seconds += self.seconds[test]
            if seconds > limit:
                break
        return tests, seconds


def known_lines(tree: Path, options: argparse.Namespace) -> LineMap:
    """Of an earlier run on the same files, or measured now."""
    digest = hashlib.sha256()
    for path in sorted(tree.rglob("*.py")):
        digest.update(path.relative_to(tree).as_posix().encode() + path.read_bytes())
    traced = options.out.with_suffix(".lines")
    mark = traced / "digest"
    if not mark.exists() or mark.read_text() != digest.hexdigest():
        shutil.rmtree(traced, ignore_errors=True)
        traced.mkdir()
        measure_lines(tree, traced.resolve(), options.jobs)
        mark.write_text(digest.hexdigest())
    return read_lines(traced)


def measure_lines(tree: Path, traced: Path, jobs: int) -> None:
    """Run the default tests under a tracer, the test files spread over `jobs` processes.

    traced: the folder in which the tracer writes a file for each process.
    """
    print("measuring which test executes which line", flush=True)
    files = sorted((tree / "tests").glob("test_*.py"), key=lambda path: -path.stat().st_size)
    files = [path for path in files if not path.name.endswith("_triton.py")]
    names = [path.relative_to(tree).as_posix() for path in files]
    startup = traced / "startup"
    startup.mkdir()
    shutil.copy(tree / "tests" / "line_tracer.py", startup / "sitecustomize.py")
    environment = clean_environment() | {
        "LINE_TRACER_OUT": str(traced),
        "LINE_TRACER_ROOT": str(tree),
        "PYTHONPATH": str(startup),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider"]
    command += ["-p", "sitecustomize"]
    shares = [[*names[job::jobs], *(["minirlhf"] if job == 0 else [])] for job in range(jobs)]
    running = [
        subprocess.Popen(
            [*command, *share], cwd=tree, env=environment, text=True, stdout=subprocess.PIPE
        )
        for share in shares
        if share
    ]
    for process in running:
        output, _ = process.communicate()
        if process.returncode:
            failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
            shown = "; ".join(failed) or output[-300:].strip()
            stop(f"{len(failed)} tests fail without any mutant; fix them first: {shown}")


def clean_environment() -> dict[str, str]:
    """One thread, and no bytecode: files change within a second, unnoticed by its time stamps."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def read_lines(traced: Path) -> LineMap:
    """Join the files that the tracer wrote in each process."""
    lines: dict[str, set] = defaultdict(set)
    seconds: dict[str, float] = {}
    fixtures: dict[str, list[str]] = {}
    for path in traced.glob("*.json"):
        content = json.loads(path.read_text())
        seconds |= content["seconds"]
        fixtures |= content["fixtures"]
        for owner, seen in content["lines"].items():
            lines[owner] |= {(file, line) for file, line in seen}
    joined = {}
    for test in seconds:
        shared = [lines[f"fixture {name}"] for name in fixtures.get(test, [])]
        joined[test] = lines[test].union(*shared)
    return LineMap(joined, seconds)


# ---- trying mutants ------------------------------------------------------------------------------


def run_tests(tree: Path, tests: list[str], limit: float) -> str:
    """Empty if all pass, else the first test that fails, or "timeout".

    A forked child has torch and pytest in memory, which saves seconds per mutant.
    """
    report = tree / ".mutate-report"
    report.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            run_pytest_in_child(tree, tests, report)
        os._exit(1)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) == 0:
                return ""
            return report.read_text() if report.exists() else "the tests cannot start"
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def run_pytest_in_child(tree: Path, tests: list[str], report: Path) -> None:
    import pytest

    os.setsid()
    os.chdir(tree)
    os.environ.update(clean_environment())
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree)] + [path for path in sys.path if Path(path or ".") != ROOT]
    sink = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(sink, number)

    class FirstFailure:
        def pytest_runtest_logreport(self, report):
            if report.failed:
                write(report.nodeid)

        def pytest_collectreport(self, report):
            if report.failed:
                write(f"import of {report.nodeid}")

    def write(name: str) -> None:
        if not report.exists():
            report.write_text(name)

    arguments = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
    os._exit(int(pytest.main(arguments, plugins=[FirstFailure()])))


def try_mutant(job: tuple[Mutant, list[str], float, str]) -> dict:
    """The result of one mutant, in this worker's own copy of the tree."""
    mutant, tests, seconds, source = job
    tree = Path(source).with_name(f"worker-{os.getpid()}")
    if not (tree / mutant.file).exists():  # the first time, or a fault has deleted files
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(source, tree)
    original = (tree / mutant.file).read_text()
    start = time.monotonic()
    outcome = ""
    if tests:
        try:
            (tree / mutant.file).write_text(mutant.source)
            outcome = run_tests(tree, tests, 5 * seconds + 60)
        finally:
            if tree.exists():
                (tree / mutant.file).write_text(original)
    shown = mutant._asdict()
    del shown["source"]
    took = round(time.monotonic() - start, 1)
    return shown | {"killed_by": outcome, "tests": len(tests), "seconds": took}


def try_all(mutants: list[Mutant], source: Path, options) -> list[dict]:
    """Results of the sample; those that --out already has are not computed again."""
    known = {}
    if options.out.exists():
        known = {row["id"]: row for row in map(json.loads, options.out.read_text().splitlines())}
    results = [known[mutant.id] for mutant in mutants if mutant.id in known]
    todo = [mutant for mutant in mutants if mutant.id not in known]
    print(f"{len(results)} of {len(mutants)} mutants were tried before", flush=True)
    if not todo:
        return results
    start = time.monotonic()
    line_map = known_lines(source, options)
    jobs = []
    for mutant in todo:
        tests, seconds = line_map.first_tests(mutant, options.seconds)
        jobs.append((mutant, tests, seconds, str(source)))
    import torch  # noqa: F401 (the workers inherit it)

    with (
        multiprocessing.get_context("fork").Pool(options.jobs) as pool,
        options.out.open("a") as out,
    ):
        for row in pool.imap_unordered(try_mutant, jobs):
            results.append(row)
            print(json.dumps(row), file=out, flush=True)
            outcome = f"killed by {row['killed_by']}" if row["killed_by"] else "SURVIVES"
            print(f"{len(results)}/{len(mutants)} {row['file']}:{row['line']} {row['operator']}: "
                  f"{one_line(row['old'])} -> {one_line(row['new'])}: {outcome} "
                  f"({row['seconds']} s)", flush=True)  # fmt: skip
            if options.minutes and time.monotonic() - start > 60 * options.minutes:
                print(f"stopped after {options.minutes:g} minutes")
                pool.terminate()
                break
    return results


def one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 70 else text[:67] + "..."


# ---- the report ----------------------------------------------------------------------------------


def report(results: list[dict], survivors: dict[str, dict]) -> bool:
    """Print shares of killed mutants; True if every survivor is listed with a reason."""
    rows = [("all files", results)]
    algorithm = [row for row in results if any(fnmatch.fnmatch(row["file"], p) for p in ALGORITHM)]
    rows.append(("algorithm and kernels", algorithm))
    for file in sorted({row["file"] for row in results}):
        rows.append((file, [row for row in results if row["file"] == file]))
    print(f"\n{'':32} mutants  killed  share  without equivalent and speed only")
    for name, part in rows:
        killed = sum(bool(row["killed_by"]) for row in part)
        harmless = sum(
            not row["killed_by"]
            and survivors.get(row["id"], {}).get("kind") in ("equivalent", "speed")
            for row in part
        )
        if part:
            counted = max(len(part) - harmless, 1)
            print(f"{name:32} {len(part):7} {killed:7} {killed / len(part):6.1%} "
                  f"{killed / counted:6.1%}")  # fmt: skip
    unlisted = [row for row in results if not row["killed_by"] and row["id"] not in survivors]
    for row in sorted(unlisted, key=lambda row: (row["file"], row["line"])):
        print(f"not listed: {row['id']} {row['file']}:{row['line']} ({row['function']}) "
              f"{row['operator']}: {one_line(row['old'])} -> {one_line(row['new'])}, "
              f"{row['tests']} tests")  # fmt: skip
    return not unlisted


def read_survivors() -> dict[str, dict]:
    """The known survivors by id. kind: equivalent (no test can notice), speed, or message."""
    return {row["id"]: row for row in map(json.loads, SURVIVORS.read_text().splitlines())}


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=positive, default=500, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="processes")
    parser.add_argument("--seconds", type=float, default=60, help="of tests for each mutant")
    parser.add_argument("--minutes", type=float, default=0, help="stop after this time (0: never)")
    parser.add_argument("--at-least", type=float, default=0, help="percent of killed mutants")
    parser.add_argument("--files", nargs="+", default=["*"], metavar="GLOB", help="only these")
    parser.add_argument("--out", type=Path, default=Path("mutate.jsonl"), help="results so far")
    options = parser.parse_args()
    survivors = read_survivors()
    mutants = draw(ROOT, options)
    # not a TemporaryDirectory: a process that a test has forked would delete it when it ends
    folder = Path(tempfile.mkdtemp())
    owner = os.getpid()
    try:
        source = folder / "source"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs"))
        results = try_all(mutants, source, options)
    finally:
        if os.getpid() == owner:
            shutil.rmtree(folder)
    all_listed = report(results, survivors)
    if options.at_least:
        killed = sum(bool(row["killed_by"]) for row in results)
        return 0 if killed >= options.at_least / 100 * len(results) > 0 else 1
    return 0 if all_listed else 1


if __name__ == "__main__":
    sys.exit(main())
