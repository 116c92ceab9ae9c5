"""Errors that the user can fix, and the words of their messages."""

import difflib
import math
import sysconfig
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

# where code that is not the user's is, as the beginning of a path
LIBRARIES = (Path(__file__).parents[1], *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
NOT_THE_USERS = (*(f"{folder}/" for folder in LIBRARIES), "<")

# JSON types in words
KINDS = {type(None): "null", bool: "true or false", int: "a whole number", float: "a number",
         str: "a string", list: "a list", dict: "an object"}


class UserError(Exception):
    """A mistake that the user can fix: printed as one line, exit status 2, no traceback."""


class Exit(SystemExit):
    """This program ends the process. A SystemExit of a user's function is an error instead."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the main memory or a GPU's is full."""
    texts = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def raise_if_out_of_memory(error: BaseException) -> None:
    """Raise the error again if memory ran out: the file that was being read is not its cause."""
    if is_out_of_memory(error):
        raise error


def call_users_function(name: str, function: Callable, *arguments) -> Any:
    """What the function returns. Raises UserError if it raises anything, also by sys.exit(0).

    name: of the function, for the error.
    """
    try:
        return function(*arguments)
    except (Exit, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise_if_out_of_memory(error)
        raise UserError(f"{name} raised {type(error).__name__}: {error}{place_of(error)}") from None


def place_of(error: BaseException) -> str:
    """" (file.py:12)": the last line of the user's code that ran before the error; or "".

    If none ran because the module was not found: how to name it.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if not frame.filename.startswith(NOT_THE_USERS)]
    if isinstance(error, ModuleNotFoundError) and not frames:
        return "; start in the folder of the module, or write path/to/file.py for its name"
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def suggest(name: str, known: Collection[str]) -> str:
    """The end of an error message: the closest known name, or the list of all names.

    >>> suggest("pop", ["ppo", "rloo"]), suggest("x", ["ppo", "rloo"])
    ('; did you mean ppo?', '; choose from ppo, rloo')
    >>> suggest("kl", ["gold", "greedy_kl", "sampled_kl"])
    '; did you mean greedy_kl or sampled_kl?'
    """
    match = [each for each in known if name in each.split("_")]
    match = match or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(match)}?" if match else f"; choose from {', '.join(known)}"


def check_finite(value: float, what: str) -> None:
    """Raise UserError if a number is NaN or infinite, before it reaches the weights."""
    if not math.isfinite(value):
        raise UserError(f"the {what} is {value}")
