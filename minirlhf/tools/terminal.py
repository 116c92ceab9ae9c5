"""What the programs that talk to a person share: text in columns, keys one by one, a block of lines that redraws itself."""

import contextlib
import os
import select
import signal
import sys
import termios
import unicodedata

from minirlhf.log import printable

ARROWS = {b"\x1b[D": "left", b"\x1bOD": "left", b"\x1b[C": "right", b"\x1bOC": "right"}
SEPARATOR = " │ "


def at_terminal() -> bool:
    """Whether somebody sits there: keys come from a terminal, and what is written is seen on one."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))  # None: closed


def can_redraw() -> bool:
    """Whether what stands on the terminal can be written over."""
    return os.environ.get("TERM", "dumb") != "dumb"


def cells(text: str) -> int:
    """Columns that text takes on a terminal: two for a wide character, none for one that combines.

    >>> cells("abc"), cells("日本"), cells("e\\u0301")
    (3, 4, 1)
    """
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells (a wide character in a column of 1 excepted), broken at blanks, inside a word only
    where that is longer than a line. Control characters come out as escapes, never as commands.

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
            while cells(word) > width and len(word) > 1:
                end = next(n for n in range(len(word), 0, -1) if n == 1 or cells(word[:n]) <= width)
                lines.append(word[:end])
                word = word[end:]
            line = word
        lines.append(line)
    return lines


def side_by_side(left: tuple[str, str], right: tuple[str, str], columns: int) -> list[str]:
    """Two (title, text) next to each other, or one above the other where 60 columns are not there."""
    if columns < 60:
        return [line for title, text in (left, right) for line in (title.upper(), *wrap(text, columns), "")][:-1]
    width = (columns - len(SEPARATOR)) // 2
    halves = [[*wrap(title, width), "─" * width, *wrap(text, width)] for title, text in (left, right)]
    height = max(map(len, halves))
    halves = [half + [""] * (height - len(half)) for half in halves]
    return [(a + " " * (width - cells(a)) + SEPARATOR + b).rstrip() for a, b in zip(*halves)]


def redraw(lines: list[str], drawn: int, rows: int, last: bool) -> int:
    """Write lines over the `drawn` ones above; returns how many stand there now. What does not fit into the screen's rows
    cannot be overwritten later, so before the last time only the end of it is shown."""
    shown = lines if last else lines[-max(1, rows - 2):]
    up = f"\x1b[{drawn}F\x1b[J" if drawn else ""
    sys.stdout.write(up + "".join(f"{line}\n" for line in shown))
    sys.stdout.flush()
    return len(shown)


@contextlib.contextmanager
def raw_keys(fd: int):
    """Keys come one by one and are not echoed, until the block ends, however it ends (SIGKILL apart).

    Ctrl-C still interrupts. Ctrl-Z is a key like others, since a shell would not know to restore the terminal.
    """
    def leave(number: int, frame) -> None:
        raise SystemExit(128 + number)

    before = termios.tcgetattr(fd)
    handlers = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    mode = termios.tcgetattr(fd)
    mode[3] &= ~(termios.ICANON | termios.ECHO)
    mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
    mode[6][termios.VSUSP] = bytes([os.fpathconf(fd, "PC_VDISABLE")])
    try:
        termios.tcsetattr(fd, termios.TCSADRAIN, mode)
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read_key(fd: int) -> str:
    """The next key: a character, "left" or "right" for arrows, "" when the terminal is gone."""
    try:
        key = os.read(fd, 1)
        while key.startswith(b"\x1b") and select.select([fd], [], [], 0.1)[0]:  # an escape sequence comes in one piece
            key += os.read(fd, 1)
            if key not in (b"\x1b[", b"\x1bO") and (key[-1:].isalpha() or key[-1:] == b"~"):
                break
    except OSError:
        return ""
    return ARROWS.get(key, key.decode("latin-1"))
