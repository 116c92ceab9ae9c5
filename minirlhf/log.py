"""What a run tells: a row of JSON per step, a line on the terminal with the time left, optionally TensorBoard."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import sys
import time
import unicodedata
from pathlib import Path

from minirlhf.parallel import is_main


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


def chained(digest: str, row: dict) -> str:
    """The digest of rows so far, with one more; the wall clock's figures, which no two runs share, stay out."""
    facts = {key: value for key, value in row.items() if not key.startswith(("seconds", "tokens_per_second"))}
    return hashlib.sha256((digest + json.dumps(facts)).encode()).hexdigest()


class Metrics:
    """Rows of one jsonl file. A checkpoint keeps their mark, and a run that resumes there drops what was written after it."""

    def __init__(self, path: Path, mark: list | None, tensorboard: bool):
        """mark: that of the checkpoint gone on from. Without one the file begins anew; one that does not match is set aside."""
        size, self.count, self.digest, (count, digest) = 0, 0, "", mark or (0, "")
        self.file = None
        if not is_main():
            return
        self.file = open(path, "a+b", buffering=0)
        self.file.seek(0)
        with contextlib.suppress(ValueError, AttributeError, RecursionError):  # a damaged row: its digest will not match
            for line in itertools.islice(self.file, count):
                self.count, self.digest, size = self.count + 1, chained(self.digest, json.loads(line)), size + len(line)
        if (self.count, self.digest) != (count, digest):
            aside = path.with_name(path.name + ".damaged")
            print(printable(f"warning: {path}: damaged, and set aside as {aside.name}, with the rows up to the checkpoint"))
            os.replace(path, aside)
            size, self.file = 0, open(path, "a+b", buffering=0)
            self.count, self.digest = 0, ""
        self.file.truncate(size)
        self.writer = summary_writer(path.parent) if tensorboard else None

    def mark(self) -> list:
        """[rows, their digest], for a checkpoint: a row on the disk for every step that the checkpoint holds."""
        if self.file:
            os.fsync(self.file.fileno())
        return [self.count, self.digest]

    def write(self, row: dict) -> None:
        """One write call for one row, so that rows are whole. Raises OSError."""
        if self.file is None:  # one process writes
            return
        row = rounded(row)
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        if self.file.write(line) < len(line):  # the disk took a part, and will take no more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
        self.count, self.digest = self.count + 1, chained(self.digest, row)
        if self.writer is not None:
            for key, value in row.items():
                if isinstance(value, (int, float)) and key != "step":
                    stage = f"{row['stage']}/" if "stage" in row else ""  # each stage counts its steps from 1
                    self.writer.add_scalar(stage + key, value, row["step"])


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
