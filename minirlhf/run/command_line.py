"""The command line: a dataclass's fields are the flags, and a user's error is one line."""

import argparse
import contextlib
import dataclasses
import difflib
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from minirlhf.run.errors import KINDS, UserError, is_out_of_memory
from minirlhf.run.folder import MODULES, read_config, trusted_module, with_tuples
from minirlhf.run.parallel import (
    claim_error_report,
    exit_process,
    finish_processes,
    init_processes,
    is_lost_peer,
)
from minirlhf.run.terminal import echo, prepare_output

MAX_MESSAGE = 2000  # characters; an error may quote a value of any size
# Without a bound of its own, a setting must fit int64, or have a finite square in float32.
LARGEST = {int: 2**63 - 1, float: 1e6}
OUT_OF_MEMORY = ("out of memory; try --micro-batch-size 1 (least memory, the same gradient), then "
                 "larger values; or a smaller --batch-size, or a smaller model")


def setting(default, reason: str, low: float | None = None, high: float | None = None,
            choices: tuple = ()):
    """A dataclass field: its default, the reason for it (shown by --help), and what is allowed."""
    limit = LARGEST.get(type(default))
    high = limit if high is None else high
    low = -limit if limit and low is None else low
    metadata = dict(reason=reason, low=low, high=high, choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """
    >>> flag("kl_coef")
    '--kl-coef'
    """
    return "--" + name.replace("_", "-")


def check_ranges(config) -> None:
    """Raise UserError for the first field whose type, range or choice is wrong."""
    types = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name = flag(field.name)
        value = getattr(config, field.name)
        low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
        if not has_type(value, types[field.name]):
            expected = KINDS.get(types[field.name], "file names")
            raise UserError(f"{name} takes {expected}, not {value!r}")
        if choices and value not in choices:
            raise UserError(f"{name} {value!r} is not known; choose from {', '.join(choices)} "
                            f"({field.metadata['reason']})")
        if low is not None and not low <= value <= high:  # also for nan
            raise UserError(f"{name} must be from {low} to {high}, not {value}")


def has_type(value, expected) -> bool:
    """Whether a value has the type of its field. A float may be written as a whole number."""
    if typing.get_origin(expected) is tuple:
        return isinstance(value, (tuple, list)) and all(isinstance(x, str) and x for x in value)
    return type(value) is expected or (expected is float and type(value) is int)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that does not print its whole usage before the error."""

    def error(self, message: str) -> typing.NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; --help lists all flags")


def make_parser(config_class) -> Parser:
    """A parser with one flag for each field of the configuration, and --preset."""
    parser = Parser(description=config_class.__doc__, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    if hasattr(config_class, "presets"):
        text = f"settings that the flags override: {', '.join(config_class.presets)}"
        parser.add_argument("--preset", choices=config_class.presets, metavar="NAME", help=text)
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = types[field.name]
        text = f"{field.metadata['reason']} (default: {field.default!r})".replace("%", "%%")
        options: dict = dict(type=kind, metavar=kind.__name__.upper())
        if kind is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is tuple:
            options = dict(action="extend", nargs="+", metavar="PATH")
        parser.add_argument(flag(field.name), help=text, **options)
    return parser


def parse_flags(config_class, arguments: list[str]) -> dict:
    """Only the settings that the command line names, and "preset". Raises UserError."""
    parser = make_parser(config_class)
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        match = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions)
        advice = f"did you mean {match[0]}?" if match else "--help lists all flags"
        raise UserError(f"unknown argument {unknown[0]}; {advice}")
    return with_tuples(vars(namespace))


def configure(config_class, arguments: list[str]):
    """The configuration of a command line.

    Flags override the preset; with --resume they override the settings of the run folder instead.
    Raises UserError.
    """
    given = parse_flags(config_class, arguments)
    preset = given.pop("preset", "")
    settings = getattr(config_class, "presets", {}).get(preset or "helpdesk", {})
    if given.get("resume"):
        if preset or not given.get("out"):
            raise UserError("--resume needs --out, the folder of the run to resume, and no "
                            "--preset: its settings are those in the folder")
        path = Path(given["out"]) / "config.json"
        settings = dataclasses.asdict(read_config(config_class, path))
        for name in settings.keys() & MODULES:
            trusted_module(settings[name], given.get(name, ""), flag(name), path)
    return config_class(**{**settings, **given})


def run_script(main: Callable, config_class, arguments: list[str] | None = None,
               interrupted: str = "stopped") -> None:
    """Parse the flags and call main(config). An error of the user becomes one line.

    interrupted: the line after Ctrl-C, unless main handles it.
    """
    with one_line_errors(interrupted):
        try:
            init_processes()
            main(configure(config_class, sys.argv[1:] if arguments is None else arguments))
            finish_processes()
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise UserError(OUT_OF_MEMORY) from None
            if not is_lost_peer(error):
                raise
            fail("another process of this run ended; its own output says why; "
                 "resume with --resume", 1)


@contextlib.contextmanager
def one_line_errors(interrupted: str = "stopped") -> Iterator[None]:
    """A UserError, an OSError or Ctrl-C in the block becomes one line, and the process exits."""
    prepare_output()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see minirlhf/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except UserError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(f"{error.filename or 'output'}: {error.strerror or error}; "
             "files written earlier are complete", 2)
    except KeyboardInterrupt:
        fail(interrupted, 130)


def fail(message: str, status: int) -> typing.NoReturn:
    """Print the error as one line on stderr, once per run, and exit with this status."""
    if claim_error_report():
        echo("error: " + " ".join(message.split("\n"))[:MAX_MESSAGE], stream=sys.stderr)
    exit_process(status)
