"""What a run tells: a row of JSON per step, a line on the terminal with the time left, optionally TensorBoard."""

import errno
import json
import math
import os
import sys
import time
import unicodedata
from pathlib import Path


def printable(text: str) -> str:
    """Text from data or a model, safe for a terminal: control and bidirectional characters are shown as escapes.

    >>> printable("red\\x1b[31m\\nline")
    'red\\\\x1b[31m\\nline'
    """
    def safe(char: str) -> bool:
        return char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(c if safe(c) else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def rounded(row: dict) -> dict:
    """Floats to 7 significant digits; those that are not finite (the standard error of one prompt) to null, JSON's nothing.

    >>> rounded({"loss": 0.123456789, "error": float("inf"), "step": 3})
    {'loss': 0.1234568, 'error': None, 'step': 3}
    """
    def short(value: float) -> float | None:
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return {key: short(value) if isinstance(value, float) else value for key, value in row.items()}


class Metrics:
    """Rows of one jsonl file. A resumed run first drops what a crash left behind: torn rows, and rows after its checkpoint."""

    def __init__(self, path: Path, keep, tensorboard: bool):
        """keep(row) -> bool: which rows of an existing file belong to the state the run goes on from."""
        kept = []
        if path.exists():
            for line in path.read_bytes().split(b"\n"):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):  # torn by a crash, or the emptiness after the last newline
                    continue
                if isinstance(row, dict) and keep(row):
                    kept.append(line + b"\n")
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)
        self.file = open(path, "ab", buffering=0)
        self.writer = summary_writer(path.parent) if tensorboard else None

    def write(self, row: dict) -> None:
        """One write call for one row, so that rows are whole. Raises OSError."""
        row = rounded(row)
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        if self.file.write(line) < len(line):  # the disk took a part, and will take no more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
        if self.writer is not None:
            for key, value in row.items():
                if isinstance(value, (int, float)) and key != "step":
                    self.writer.add_scalar(key, value, row["step"])


def summary_writer(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("--tensorboard: not installed; `pip install tensorboard` to have event files (metrics go to the jsonl file anyway)")
        return None
    return SummaryWriter(str(folder / "tensorboard"))


class Progress:
    """One line that rewrites itself on a terminal; elsewhere a plain line now and then."""

    def __init__(self, label: str, total: int, done: int = 0, plain_lines: int = 10):
        self.label, self.total, self.first = label, total, done
        self.every = max(1, total // plain_lines)
        self.start, self.tty = time.monotonic(), sys.stdout.isatty()

    def show(self, done: int, text: str) -> None:
        left = (time.monotonic() - self.start) / max(1, done - self.first) * (self.total - done)
        line = f"{self.label} {done}/{self.total}  {text}  {duration(left)} left"
        if self.tty:
            width = os.get_terminal_size().columns
            print("\r" + line[: width - 1].ljust(width - 1), end="\n" if done == self.total else "", flush=True)
        elif done % self.every == 0 or done == self.total:
            print(line, flush=True)


def duration(seconds: float) -> str:
    """
    >>> duration(5.2), duration(95), duration(3725)
    ('5 s', '1 min 35 s', '1 h 02 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
