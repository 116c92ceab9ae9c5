"""Record which test executes which line, in pytest and in the processes it starts.

tests/mutate.py copies this file to a folder in PYTHONPATH as sitecustomize.py, so that Python
imports it at its start. In pytest it is also a plugin. The lines of a fixture that several tests
share count for each of them.
"""

import atexit
import json
import os
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

OUT = os.environ.get("LINE_TRACER_OUT")
ROOT = os.environ.get("LINE_TRACER_ROOT", "") + "/"
lines: dict[str, set] = defaultdict(set)
seconds: dict[str, float] = {}
fixtures: dict[str, list[str]] = {}
owner = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]


def trace_calls(frame, event, argument, root=ROOT):  # at exit, globals may be None
    file = frame.f_code.co_filename
    if not file.startswith(root) or file.startswith(root + "tests/"):
        return None
    name = file[len(root) :]

    def trace_lines(frame, event, argument):
        if event == "line":
            lines[owner].add((name, frame.f_lineno))
        return trace_lines

    lines[owner].add((name, frame.f_lineno))
    return trace_lines


def save() -> None:
    content = dict(lines={key: sorted(seen) for key, seen in lines.items() if key})
    content |= dict(seconds=seconds, fixtures=fixtures)
    path = Path(OUT) / f"{os.getpid()}-{time.time_ns()}.json"
    path.write_text(json.dumps(content))


def pytest_runtest_logstart(nodeid, location):
    global owner
    owner = nodeid


def pytest_runtest_setup(item):
    fixtures[item.nodeid] = list(item.fixturenames)


def pytest_fixture_setup(fixturedef, request):
    """Wraps the set-up of a shared fixture: its lines belong to the fixture."""
    global owner
    outer = owner
    if fixturedef.scope != "function":
        owner = f"fixture {fixturedef.argname}"
    outcome = yield
    owner = outer
    return outcome


def pytest_runtest_logreport(report):
    seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration


if OUT:
    try:
        import pytest

        pytest_fixture_setup = pytest.hookimpl(wrapper=True)(pytest_fixture_setup)
    except ImportError:
        pass
    atexit.register(save)
    sys.settrace(trace_calls)
    threading.settrace(trace_calls)
