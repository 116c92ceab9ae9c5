"""Metrics of a run: one JSON object per line, and optionally TensorBoard event files."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import time
from pathlib import Path
from typing import IO

from minirlhf.run.files import refuse_link, regular_only
from minirlhf.run.parallel import is_main
from minirlhf.run.terminal import echo

# prefixes of keys that differ between equal runs
WALL_CLOCK = ("seconds", "tokens_per_second", "finished")


def rounded(row: dict) -> dict:
    """Round floats to 7 significant digits; replace infinity and NaN, which JSON lacks, by null.

    >>> rounded({"loss": 0.123456789, "error": float("inf"), "step": 3})
    {'loss': 0.1234568, 'error': None, 'step': 3}
    """
    def short(value: float) -> float | None:
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return {key: short(value) if isinstance(value, float) else value for key, value in row.items()}


def extend_digest(digest: str, row: dict) -> str:
    """The digest of all rows so far after one more row. Wall-clock values are left out."""
    stable = {key: value for key, value in row.items() if not key.startswith(WALL_CLOCK)}
    return hashlib.sha256((digest + json.dumps(stable)).encode()).hexdigest()


def size_of_rows(content: bytes, count: int, digest: str) -> int | None:
    """The bytes of the first `count` rows, or None if this is not their digest."""
    lines = io.BytesIO(content).readlines()[:count]
    actual = ""
    with contextlib.suppress(ValueError, AttributeError, RecursionError):  # a damaged row
        for line in lines:
            actual = extend_digest(actual, json.loads(line))
    return len(b"".join(lines)) if actual == digest else None


class Metrics:
    """Appends rows to one jsonl file.

    A checkpoint stores a mark of the rows written so far. A resumed run drops all rows after it.
    """

    def __init__(self, path: Path, mark: tuple[int, str] | None, tensorboard: bool):
        """mark: from the checkpoint that is resumed; None starts an empty file.

        A file that does not match the mark is renamed to *.damaged. Raises UserError for a link.
        """
        self.count, self.digest = mark or (0, "")
        self.file: IO | None = None
        if not is_main():
            return
        refuse_link(path)
        self.file = open(path, "a+b", buffering=0, opener=regular_only)
        self.file.seek(0)
        size = size_of_rows(self.file.read(), self.count, self.digest)
        if size is None:
            aside = path.with_name(f"{path.name}.{time.time_ns()}.damaged")
            echo(f"warning: {path}: damaged; renamed to {aside.name}; the new file "
                 "starts after the checkpoint")
            os.replace(path, aside)
            self.file = open(path, "ab", buffering=0, opener=regular_only)
            self.count, self.digest = 0, ""
        self.file.truncate(size or 0)
        self.writer = summary_writer(path.parent) if tensorboard else None

    def mark(self) -> list:
        """[rows, their digest], for a checkpoint. The rows are on the disk when this returns."""
        if self.file:
            os.fsync(self.file.fileno())
        return [self.count, self.digest]

    def write(self, row: dict) -> None:
        """Append one row with one system call. Raises OSError, for example if the disk is full."""
        if self.file is None:  # only the main process writes
            return
        row = rounded(row)
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        if self.file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
        self.digest = extend_digest(self.digest, row)
        self.count += 1
        if self.writer is not None:
            prefix = f"{row['stage']}/" if "stage" in row else ""  # each stage starts at step 1
            for key, value in row.items():
                if isinstance(value, (int, float)) and key != "step":
                    self.writer.add_scalar(prefix + key, value, row["step"])


def summary_writer(folder: Path):
    """A TensorBoard writer, or None and a hint if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        echo("--tensorboard: not installed; run `pip install tensorboard` to get event files "
             "(metrics are written to the jsonl file in any case)")
        return None
    return SummaryWriter(str(folder / "tensorboard"))
