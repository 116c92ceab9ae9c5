"""From the command line to main(config): a dataclass's fields are the flags, and what a person can mend is one line on stderr."""

import argparse
import ctypes
import dataclasses
import difflib
import hashlib
import json
import math
import sys
import typing
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from minirlhf.log import printable
from minirlhf.parallel import first_to_tell, leave, lost_peer, processes, start, stop


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: printed as one line, exit status 2, no traceback."""


def setting(default, reason: str, low: float | None = None, high: float | None = None, choices: tuple = ()):
    """A dataclass field: its default, the reason or source of that default (shown by --help), and what is allowed."""
    return dataclasses.field(default=default, metadata=dict(reason=reason, low=low, high=high, choices=choices))


def flag(name: str) -> str:
    """
    >>> flag("kl_coef")
    '--kl-coef'
    """
    return "--" + name.replace("_", "-")


def check_ranges(config) -> None:
    """Raise UserError for the first field whose type, range or choice is wrong; called before any work."""
    types = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, wanted, meta, name = getattr(config, field.name), types[field.name], field.metadata, flag(field.name)
        if wanted is float and type(value) is int:
            value = float(value)
        if typing.get_origin(wanted) is tuple:
            if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
                raise UserError(f"{name} takes file names, not {value!r}")
        elif type(value) is not wanted:
            raise UserError(f"{name} takes a value of type {wanted.__name__}, not {value!r}")
        if wanted is float and not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, not {value}")
        if meta["choices"] and value not in meta["choices"]:
            raise UserError(f"{name} {value!r} is not known{nearest(value, meta['choices'])}")
        if meta["low"] is not None and value < meta["low"]:
            raise UserError(f"{name} {value} is below {meta['low']}, the least that makes sense")
        if meta["high"] is not None and value > meta["high"]:
            raise UserError(f"{name} {value} is above {meta['high']}, the most that makes sense")


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a message: what was meant, or what there is to choose from."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else f"; choose from {', '.join(known)}"


class Parser(argparse.ArgumentParser):
    """argparse's own, but for the usage that it would print, all of it, before the one line that matters."""

    def error(self, message: str) -> typing.NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; --help lists every flag")


def given_flags(config_class, arguments: list[str]) -> dict:
    """What the command line names, and only that: settings by field name, and "preset". Raises UserError for unknown flags."""
    parser = Parser(description=config_class.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if hasattr(config_class, "presets"):
        text = f"settings that lie under the flags: {', '.join(config_class.presets)}"
        parser.add_argument("--preset", choices=config_class.presets, metavar="NAME", help=text)
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        wanted, text = types[field.name], f"{field.metadata['reason']} (default: {field.default!r})".replace("%", "%%")
        if wanted is bool:
            parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, help=text)
        elif typing.get_origin(wanted) is tuple:
            parser.add_argument(flag(field.name), nargs="+", metavar="PATH", help=text)
        else:
            parser.add_argument(flag(field.name), type=wanted, metavar=wanted.__name__.upper(), help=text)
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], parser._option_string_actions)}")
    return with_tuples(vars(namespace))


def with_tuples(settings: dict) -> dict:
    """Of lists, which argparse and JSON make, the tuples that they stand for."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def read_config(config_class, path: Path):
    """The configuration that a run folder's config.json holds, checked. Raises UserError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = config_class(**with_tuples(content["settings"]))
        config.check()
        intact = content == sealed(content["settings"], content["facts"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this a run folder?") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a configuration of this program ({error}); start a new run") from None
    if not intact:
        raise UserError(f"{path}: was changed or damaged since the run began; start a new run")
    return config


def sealed(settings: dict, facts: dict) -> dict:
    """What config.json holds, with a checksum: one flipped digit of a learning rate would make it another run."""
    return dict(settings=settings, facts=facts, sha256=digest([settings, facts]))


def digest(content) -> str:
    """SHA-256 of what is written as JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def run_script(main: Callable, config_class, arguments: list[str] | None = None) -> None:
    """Parse flags, call main(config), and turn what a person can mend into one line and exit status 2.

    Under the flags lie the settings of --preset; with --resume, in their place, those in the run folder.
    """
    try:
        start()
        given = given_flags(config_class, sys.argv[1:] if arguments is None else arguments)
        under = config_class.presets[given.pop("preset", "helpdesk")] if hasattr(config_class, "presets") else {}
        if given.get("resume"):
            if not given.get("out"):
                raise UserError("--resume needs --out: the folder of the run to go on with")
            under = dataclasses.asdict(read_config(config_class, Path(given["out"]) / "config.json"))
        config = config_class(**{**under, **given})
        keep_freed_memory()
        main(config)
        stop()
    except UserError as error:
        leave(fail(str(error), 2))
    except (MemoryError, RuntimeError) as error:
        if lost_peer(error):
            leave(fail("another process of this run was lost; its own lines say why, --resume goes on", 1))
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        leave(fail(memory_advice(config), 2))
    except OSError as error:
        leave(fail(f"{error.filename or 'output'}: {error.strerror}; the files written before are intact", 2))


def keep_freed_memory() -> None:
    """Ask glibc to keep freed tensors of up to 32 MiB for the next ones. By itself it hands them back to the system, whose
    fresh pages, zeroed one by one, then cost more than the arithmetic on them (2.5 times the time of `gae`, 512 x 1024)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def memory_advice(config) -> str:
    """Which flag to change, and to what, when a run found no memory."""
    if not hasattr(config, "micro_batch_size"):
        return "out of memory; stop other programs, or use a smaller model"
    most = -(-getattr(config, "minibatch_size", config.batch_size) // processes())  # that fall to one process
    size = min(config.micro_batch_size or most, most)
    if size > 1:
        return f"out of memory; try --micro-batch-size {size // 2}: fewer texts a forward pass, the same gradient"
    return f"out of memory even with one text at a time; try --batch-size {max(1, config.batch_size // 2)} or a smaller model"


def fail(message: str, status: int) -> int:
    """Say what is wrong in one line on stderr, once per run. Returns the exit status that it was given."""
    if first_to_tell():
        print("error:", printable(" ".join(message.split("\n"))), file=sys.stderr)
    return status
