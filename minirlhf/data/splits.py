"""The training, held-out and test pairs of a run, and the module with their ground truth.

A ground truth is a module with any of these functions:

    gold(prompt, response, finished) -> float        utility; finished is False if cut by length
    best_response(prompt) -> str
    probes(prompt) -> {defect: response}
    preference_probability(prompt, a, b) -> float

The embedded one is minirlhf.data.helpdesk. Other data has none, and training never needs one.
"""

import hashlib
import importlib.machinery
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from minirlhf.config import DATA, RewardConfig
from minirlhf.data.chat_templates import read_chat_template
from minirlhf.data.preference_files import PreferencePair, read_records
from minirlhf.data.prompts import unique_prompts
from minirlhf.run.errors import UserError
from minirlhf.run.files import read_file
from minirlhf.run.seeding import derive_seed

HELPDESK_FILES = dict(train=str(DATA / "helpdesk-train.jsonl.gz"),
                      heldout=str(DATA / "helpdesk-validation.jsonl"),
                      test=str(DATA / "helpdesk-test.jsonl"))


class Splits(NamedTuple):
    """The pairs of a reward run."""

    train: list[PreferencePair]
    heldout: list[PreferencePair]  # for choosing settings
    test: list[PreferencePair]  # for final numbers; the held-out pairs again without another file
    bad_lines: int  # skipped
    hashes: dict[str, str]  # file -> SHA-256


def load_splits(config: RewardConfig) -> Splits:
    """Read the files of a reward run's settings. Raises UserError for the first problem."""
    files: list[tuple[str, ...]] = [config.data, config.heldout_data, config.test_data]
    if not config.data:
        shipped = HELPDESK_FILES.values()
        files = [named or (default,) for named, default in zip(files, shipped)]
    template = read_chat_template(config.tokenizer)
    records = [read_records(paths, config.skip_bad_lines, template) for paths in files]
    train, heldout, test = (pairs for pairs, _ in records)
    if not heldout:
        train, heldout = split_holdout(train, config.holdout, config.seed)
    bad_lines = sum(bad for _, bad in records)
    return Splits(train, heldout, test or heldout, bad_lines, file_hashes(chain(*files)))


def split_holdout(pairs: list[PreferencePair], fraction: float, seed: int,
                  ) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(train, held out). A fraction of the prompts, rounded, is held out with all their pairs.

    No held-out prompt is trained on. The choice depends on the seed and the prompts' text, not on
    their order in the file. Raises UserError if there are fewer than two prompts.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, is {fraction}")
    prompts = unique_prompts(pairs)
    prompts.sort(key=lambda prompt: derive_seed(seed, "holdout", prompt))
    if len(prompts) < 2:
        raise UserError(f"the data has only {len(prompts)} distinct prompts; "
                        "give at least 2, because some are held out")
    count = min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)
    heldout = set(prompts[:count])
    return ([pair for pair in pairs if pair.prompt not in heldout],
            [pair for pair in pairs if pair.prompt in heldout])


def file_hashes(paths: Iterable[str | Path]) -> dict[str, str]:
    """path -> SHA-256 of the content, so that a resumed run notices changed inputs."""
    return {str(path): hashlib.sha256(read_file(path)).hexdigest() for path in paths}


# ---- the user's modules --------------------------------------------------------------------------


def load_ground_truth(config: RewardConfig) -> ModuleType | None:
    """The module of --task, or None. Raises UserError."""
    name = config.task
    if name == "auto":
        is_helpdesk = all(Path(path).resolve().parent == DATA for path in config.data)
        name = "minirlhf.data.helpdesk" if is_helpdesk else "none"
    return None if name == "none" else import_module(name, "--task")


def import_module(name: str, flag: str) -> ModuleType:
    """A module by its name or its path ending in .py. Raises UserError that names the flag."""
    path = Path(name)
    folder = str(path.parent) if path.suffix == ".py" else ""  # "": where the script was started
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if path.suffix != ".py":
            return importlib.import_module(name)
        module = ModuleType(path.stem)
        module.__file__ = name
        importlib.machinery.SourceFileLoader(path.stem, name).exec_module(module)
        return module
    except (Exception, SystemExit) as error:  # the user's module can raise anything
        raise UserError(f"{flag} {name}: cannot be imported "
                        f"({type(error).__name__}: {error})") from None


def load_function(spec: str, flag: str) -> Callable:
    """The function that "module:function" or "path/to/file.py:function" names. Raises UserError."""
    module, _, name = spec.partition(":")
    function = getattr(import_module(module, flag), name, None) if name else None
    if not callable(function):
        raise UserError(f"{flag} {spec}: no such function; write module:function "
                        "or path/to/file.py:function")
    return function
