"""What the user sees during a run: safe text, and one progress line with the time left."""

import datetime
import errno
import os
import re
import shlex
import shutil
import sys
import time
import unicodedata
from collections.abc import Sequence
from typing import TextIO

LONGEST = 10**12  # seconds; datetime.timedelta overflows beyond 8.6e13


def printable(text: str) -> str:
    """Text from data or a model, with control and bidirectional characters escaped.

    >>> printable("red\\x1b[31m\\nline")
    'red\\\\x1b[31m\\nline'
    """
    def is_safe(char: str) -> bool:
        return char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")

    def escape(char: str) -> str:
        return char.encode("unicode_escape", "surrogatepass").decode()

    return "".join(char if is_safe(char) else escape(char) for char in text)


def shell_command(words: Sequence[str]) -> str:
    """One line that bash and zsh split into these words. It survives `echo` in any encoding.

    A path that begins like a flag gets "./" before it.

    >>> print(shell_command(["--out", "my run", "red\\x1b[31m"]))
    --out 'my run' $'red\\x1b[31m'
    """
    return " ".join(shell_word(re.sub(r"^-(?!-[a-z][a-z0-9-]*\Z)", "./-", word)) for word in words)


def shell_word(word: str) -> str:
    """The word in quotes if it needs them; as bytes in $'...' if it cannot be printed."""
    quoted = shlex.quote(word)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if word.isprintable() and quoted.encode(encoding, "ignore").decode(encoding) == quoted:
        return quoted
    plain = set(range(32, 127)) - set(b"\\'")
    return "$'" + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}"
                          for byte in os.fsencode(word)) + "'"


def echo(text: str = "", stream: TextIO | None = None, start: str = "", end: str = "\n") -> None:
    """Print any text: what could control the terminal, or cannot be encoded, is escaped.

    start, end: printed as they are. If the terminal was closed, the output is discarded, because
    a run continues until its next checkpoint.
    """
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    safe = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(start + safe, end=end, file=stream, flush=True)
    except OSError as error:
        if error.errno != errno.EIO or stream is None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def prepare_output() -> None:
    """Make printing safe for this process: a closed stream (>&-) discards its text.

    Characters that a stream cannot encode are escaped, also those that other code prints.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class Progress:
    """One line that overwrites itself on a terminal.

    Elsewhere a plain line every few steps, and at least one a minute.
    """

    def __init__(self, label: str, total: int, done: int = 0, plain_lines: int = 10):
        """plain_lines: about how many lines to print where the output is not a terminal."""
        self.label = label
        self.total = total
        self.first = done
        self.every = max(1, total // plain_lines)
        self.is_terminal = sys.stdout is not None and sys.stdout.isatty()
        self.start_clock()

    def start_clock(self) -> None:
        """Measure the time per step from now on."""
        self.start = self.printed = time.monotonic()

    def show(self, done: int, text: str) -> None:
        """Print how many steps are done, this text, and the time left."""
        now = time.monotonic()
        seconds_per_step = (now - self.start) / max(1, done - self.first)
        seconds = min(round(seconds_per_step * (self.total - done)), LONGEST)
        left = datetime.timedelta(seconds=seconds)
        line = f"{self.label} {done}/{self.total}  {text}  {left} left"
        if self.is_terminal:
            width = shutil.get_terminal_size().columns - 1  # 80 columns if the terminal says 0
            end = "\n" if done == self.total else ""
            echo(line[:width].ljust(width), start="\r", end=end)
        elif done % self.every == 0 or done == self.total or now - self.printed >= 60:
            self.printed = now
            echo(line)
