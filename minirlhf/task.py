"""What a run learns from: preference files, and, where somebody knows it, the truth behind them.

A task is a module with any of: gold(prompt, response, finished) -> float; best_response(prompt) -> str;
probes(prompt) -> {defect: response}; preference_probability(prompt, a, b) -> float. The embedded one is minirlhf.helpdesk.
A run on other data has none of them, and nothing in training asks for them.
"""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from minirlhf.config import DATA, RewardConfig, UserError
from minirlhf.data import split_holdout
from minirlhf.records import PreferencePair, read_records

HELPDESK = dict(train=str(DATA / "helpdesk-train.jsonl.gz"), heldout=str(DATA / "helpdesk-validation.jsonl"),
                test=str(DATA / "helpdesk-test.jsonl"))


class Splits(NamedTuple):
    """What a reward run reads, in three parts; which files, and what was wrong with them."""

    train: list[PreferencePair]
    heldout: list[PreferencePair]  # choices are made on these
    test: list[PreferencePair]  # reports are made on these; the held-out pairs again when there is no other file
    bad_lines: int
    hashes: dict[str, str]  # file -> sha256


def load_splits(config: RewardConfig) -> Splits:
    """Read the files that a reward run's settings name. Raises UserError for the first problem."""
    files: list[tuple[str, ...]] = [config.data, config.heldout_data, config.test_data]
    if not config.data:
        files = [named or (shipped,) for named, shipped in zip(files, HELPDESK.values())]
    found = [read_records(paths, config.skip_bad_lines) for paths in files]
    train, heldout, test = (pairs for pairs, _ in found)
    if not heldout:
        train, heldout = split_holdout(train, config.holdout, config.seed)
    return Splits(train, heldout, test or heldout, sum(bad for _, bad in found), file_hashes(chain(*files)))


def file_hashes(paths: Iterable[str | Path]) -> dict[str, str]:
    """path -> sha256 of its content, by which a resumed run knows that it reads what it read before."""
    return {str(path): hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


def load_task(config: RewardConfig) -> ModuleType | None:
    """The module that knows the truth of the data, or None."""
    name = config.task
    if name == "auto":
        name = "minirlhf.helpdesk" if all(Path(path).resolve().parent == DATA for path in config.data) else "none"
    return None if name == "none" else import_module(name, "--task")


def import_module(name: str, flag: str) -> ModuleType:
    """A module by its name, the user's own included. Raises UserError that names the flag."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module of the user's own, in the folder the script was started from
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises while it is imported is the user's to mend
        raise UserError(f"{flag} {name}: cannot be imported ({type(error).__name__}: {error})") from None


def load_function(spec: str, flag: str) -> Callable:
    """The function that "module:function" names. Raises UserError."""
    module, _, name = spec.partition(":")
    function = getattr(import_module(module, flag), name, None) if name else None
    if not callable(function):
        raise UserError(f"{flag} {spec}: no such function; write it as module:function")
    return function
