"""The training, held-out and test pairs of a run, and the module with their ground truth.

A ground truth is a module with any of these functions, called with positional arguments:

    gold(prompt, response, finished) -> float        utility; finished is False if cut by length
    best_response(prompt) -> str
    probes(prompt) -> {defect: response}
    preference_probability(prompt, a, b) -> float

The embedded one is minirlhf.data.helpdesk. Other data has none, and training never needs one.
"""

import contextlib
import functools
import hashlib
import importlib.machinery
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from minirlhf.config import DATA, RewardConfig
from minirlhf.data import helpdesk
from minirlhf.data.chat_templates import read_chat_template
from minirlhf.data.preference_files import PreferencePair, read_records
from minirlhf.data.prompts import unique_prompts
from minirlhf.run.checkpoint import read_seal
from minirlhf.run.errors import UserError, call_users_function
from minirlhf.run.files import read_file
from minirlhf.run.seeding import derive_seed

HELPDESK_FILES = dict(data=(str(DATA / "helpdesk-train.jsonl.gz"),),
                      heldout_data=(str(DATA / "helpdesk-validation.jsonl"),),
                      test_data=(str(DATA / "helpdesk-test.jsonl"),))


class Splits(NamedTuple):
    """The pairs of a reward run."""

    train: list[PreferencePair]
    heldout: list[PreferencePair]  # for choosing settings
    test: list[PreferencePair]  # for final numbers; the held-out pairs again without another file
    bad_lines: int  # skipped
    facts: dict[str, str]  # the files, for the run folder


def load_splits(config: RewardConfig) -> Splits:
    """Read the files of a reward run's settings. Raises UserError for the first problem."""
    shipped = {} if config.data else HELPDESK_FILES
    files = {name: tuple(map(in_this_checkout, getattr(config, name) or shipped.get(name, ())))
             for name in HELPDESK_FILES}
    template = read_chat_template(config.tokenizer)
    records = [read_records(paths, config.skip_bad_lines, template) for paths in files.values()]
    train, heldout, test = (pairs for pairs, _ in records)
    if not heldout:
        train, heldout = split_holdout(train, config.holdout, config.seed)
    bad_lines = sum(bad for _, bad in records)
    return Splits(train, heldout, test or heldout, bad_lines, file_facts(files))


def in_this_checkout(path: str) -> str:
    """The path, or that of the shipped file if the checkout that it names has moved."""
    shipped = DATA / Path(path).name
    is_moved = Path(path).parent.name == DATA.name and not Path(path).exists()
    return str(shipped) if is_moved and shipped.exists() else path


def split_holdout(pairs: list[PreferencePair], fraction: float, seed: int,
                  ) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(train, held out). A fraction of the prompts, rounded, is held out with all their pairs.

    No held-out prompt is trained on. The choice depends on the seed and the prompts' text, not on
    their order in the file. Raises UserError if there are fewer than three prompts.
    """
    prompts = unique_prompts(pairs)
    prompts.sort(key=lambda prompt: derive_seed(seed, "holdout", prompt))
    if len(prompts) < 3:
        raise UserError(f"the data has only {len(prompts)} distinct prompts; "
                        "give at least 3, because some are held out")
    count = min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)
    heldout = set(prompts[:count])
    return ([pair for pair in pairs if pair.prompt not in heldout],
            [pair for pair in pairs if pair.prompt in heldout])


def file_hash(path: str | Path) -> str:
    """SHA-256 of the content."""
    return hashlib.sha256(read_file(path)).hexdigest()


def file_facts(files: Mapping[str, Sequence[str | Path]]) -> dict[str, str]:
    """"SETTING NUMBER" -> "SHA-256  PATH", so that a later program notices changed inputs."""
    return {f"{name} {number}": f"{read_seal(Path(path)) or file_hash(path)}  {path}"
            for name, paths in files.items() for number, path in enumerate(paths, start=1)}


# ---- the user's modules --------------------------------------------------------------------------


# function of a ground truth -> (what it must return, whether a value is that)
RESULTS: dict[str, tuple[str, Callable]] = {
    "gold": ("a finite number", math.isfinite),
    "best_response": ("a string", lambda text: isinstance(text, str)),
    "probes": ("a dictionary of strings",
               lambda texts: all(isinstance(text, str) for text in chain(*texts.items()))),
    "preference_probability": ("a number from 0 to 1", lambda number: bool(0 <= number <= 1))}


def load_ground_truth(name: str, splits: Splits | None = None) -> ModuleType | None:
    """The module of --task, with its functions checked by `ask`, or None. Raises UserError.

    auto: the help desk's if it can parse every prompt of the splits.
    Each function is called with the first pair of the splits, so most errors show before training.
    """
    if name == "auto" and splits:
        prompts = {pair.prompt for pair in chain(splits.train, splits.heldout, splits.test)}
        if all(None not in helpdesk.parse_prompt(prompt) for prompt in prompts):
            name = helpdesk.__name__
    if name in ("none", "auto"):
        return None
    module = import_module(name, "--task")
    checked = ModuleType(module.__name__)
    for function in filter(module.__dict__.get, RESULTS):
        setattr(checked, function, functools.partial(ask, module, function))
        if splits:
            prompt, chosen, rejected, *_ = splits.train[0]
            rest = dict(gold=(chosen, True), preference_probability=(chosen, rejected))
            getattr(checked, function)(prompt, *rest.get(function, ()))
    return checked


def ask(module: ModuleType, function: str, prompt: str, *rest) -> Any:
    """What a function of the user's module returns. Raises UserError if it fails."""
    name = f"{function}() of --task {module.__name__}"
    result = call_users_function(name, getattr(module, function), prompt, *rest)
    description, is_valid = RESULTS[function]
    with contextlib.suppress(Exception):  # is_valid raises if the type is wrong
        if is_valid(result):
            return result
    raise UserError(f"{name} returned {result!r:.80} for {prompt[:60]!r}; "
                    f"it must return {description}")


def import_module(name: str, flag: str) -> ModuleType:
    """A module by its name or its path ending in .py. Raises UserError that names the flag."""
    path = Path(name)
    folder = str(path.parent) if path.suffix == ".py" else ""  # "": where the script was started
    if folder not in sys.path:
        sys.path.insert(0, folder)
    load = load_file if folder else importlib.import_module
    return call_users_function(f"{flag} {name}: its import", load, name)


def load_file(name: str) -> ModuleType:
    """The module in a file. It is in sys.modules, where dataclasses and pickle look for it."""
    path = str(Path(name).absolute())
    stem = Path(name).stem
    while stem in sys.modules and getattr(sys.modules[stem], "__file__", "") != path:
        stem += "_"  # the user's json.py must not replace Python's
    module = ModuleType(stem)
    module.__file__ = path
    sys.modules[stem] = module
    try:
        importlib.machinery.SourceFileLoader(stem, path).exec_module(module)
    except BaseException:
        del sys.modules[stem]  # as an import statement does
        raise
    return module


def load_function(spec: str, flag: str) -> Callable:
    """The function that "module:function" or "path/to/file.py:function" names. Raises UserError."""
    module, _, name = spec.partition(":")
    function = getattr(import_module(module, flag), name, None) if name else None
    if not callable(function):
        raise UserError(f"{flag} {spec}: no such function; write module:function "
                        "or path/to/file.py:function")
    return function
