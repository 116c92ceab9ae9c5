"""Terminal functions of chat and label: text in columns, single keys, a block that is redrawn."""

import contextlib
import os
import select
import signal
import sys
import termios
import unicodedata

from minirlhf.run.signals import install_handler, restore_handlers
from minirlhf.run.terminal import printable

ARROWS = {b"\x1b[D": "left", b"\x1bOD": "left", b"\x1b[C": "right", b"\x1bOC": "right"}
SEPARATOR = " │ "
MIN_COLUMNS = 60  # a narrower terminal shows two texts one above the other


def is_interactive() -> bool:
    """Whether both input and output are a terminal. A closed stream is None."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def can_redraw() -> bool:
    """Whether the terminal can overwrite earlier lines."""
    return os.environ.get("TERM", "dumb") != "dumb"


# ---- text ----------------------------------------------------------------------------------------


def cells(text: str) -> int:
    """Width of text on a terminal: 2 for a wide character, 0 for a combining one.

    >>> cells("abc"), cells("日本"), cells("e\\u0301")
    (3, 4, 1)
    """
    width = 0
    for char in text:
        if not unicodedata.combining(char):
            width += 2 if unicodedata.east_asian_width(char) in "WF" else 1
    return width


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at blanks, or inside words longer than a line.

    In a column of width 1 a wide character still takes 2 cells. Control characters are escaped.

    >>> wrap("one two\\x1b three", 9), wrap("unbreakable", 4)
    (['one', 'two\\\\x1b', 'three'], ['unbr', 'eaka', 'ble'])
    """
    lines = []
    for paragraph in printable(text).split("\n"):
        line = ""
        for word in paragraph.split(" "):
            joined = f"{line} {word}" if line else word
            if cells(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            *full, line = split_word(word, width)
            lines += full
        lines.append(line)
    return lines


def split_word(word: str, width: int) -> list[str]:
    """Parts of a word: as many characters as fit in `width` cells, but at least one."""
    parts = []
    start = used = 0
    for end, char in enumerate(word):
        used += cells(char)
        if used > width and end > start:
            parts.append(word[start:end])
            start = end
            used = cells(char)
    return [*parts, word[start:]]


def side_by_side(left: tuple[str, str], right: tuple[str, str], columns: int) -> list[str]:
    """Lines that show two (title, text) next to each other, or one above the other."""
    if columns < MIN_COLUMNS:
        lines = []
        for title, text in (left, right):
            lines += [title.upper(), *wrap(text, columns), ""]
        return lines[:-1]
    width = (columns - len(SEPARATOR)) // 2
    halves = [[*wrap(title, width), "─" * width, *wrap(text, width)]
              for title, text in (left, right)]
    height = max(map(len, halves))
    halves = [half + [""] * (height - len(half)) for half in halves]
    return [(a + " " * (width - cells(a)) + SEPARATOR + b).rstrip() for a, b in zip(*halves)]


def redraw(lines: list[str], drawn: int, screen_rows: int, last: bool) -> int:
    """Overwrite the previous `drawn` lines with these; returns the number of lines written.

    A terminal cannot overwrite lines that have scrolled off the screen. Only the last call writes
    all lines; the others write the last ones that fit.
    """
    shown = lines if last else lines[-max(1, screen_rows - 2):]
    up = f"\x1b[{drawn}F\x1b[J" if drawn else ""
    sys.stdout.write(up + "".join(f"{line}\n" for line in shown))
    sys.stdout.flush()
    return len(shown)


# ---- keys ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def raw_keys(fd: int):
    """Read keys one by one, without echo, until the block ends; SIGKILL cannot be handled.

    Ctrl-C still interrupts. Ctrl-Z is an ordinary key: a stopped program would leave the shell
    without echo.
    """
    def leave(number: int, frame) -> None:
        raise SystemExit(128 + number)

    before = termios.tcgetattr(fd)
    earlier = install_handler((signal.SIGTERM, signal.SIGHUP), leave)
    mode = termios.tcgetattr(fd)
    mode[3] &= ~(termios.ICANON | termios.ECHO)
    mode[6][termios.VMIN] = 1
    mode[6][termios.VTIME] = 0
    mode[6][termios.VSUSP] = bytes([os.fpathconf(fd, "PC_VDISABLE")])
    try:
        termios.tcsetattr(fd, termios.TCSADRAIN, mode)
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be closed
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
        restore_handlers(earlier)


def read_key(fd: int) -> str:
    """The next key: a character, "left" or "right" for arrows, "" if the terminal is closed."""
    try:
        key = os.read(fd, 1)
        # an escape sequence arrives without pauses
        while key.startswith(b"\x1b") and select.select([fd], [], [], 0.1)[0]:
            key += os.read(fd, 1)
            is_prefix = key in (b"\x1b[", b"\x1bO")
            if not is_prefix and (key[-1:].isalpha() or key[-1:] == b"~"):
                break
    except OSError:
        return ""
    return ARROWS.get(key, key.decode("latin-1"))
