"""Metrics of a run: one JSON object per line, and optionally TensorBoard event files."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
from pathlib import Path
from typing import IO

from minirlhf.run.files import refuse_link, regular_only, unused_path
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


class Metrics:
    """Appends rows to one jsonl file.

    A checkpoint stores a mark of the rows written so far. A resumed run drops all rows after it.
    """

    def __init__(self, path: Path, mark: list | None, tensorboard: bool):
        """mark: from the checkpoint that is resumed; None starts an empty file.

        A file that does not match the mark is renamed to *.damaged. Raises UserError for a link.
        """
        self.count = 0
        self.digest = ""
        self.file = None
        if not is_main():
            return
        refuse_link(path)
        self.file = open(path, "a+b", buffering=0, opener=regular_only)
        expected_count, expected_digest = mark or (0, "")
        size = self._read(self.file, expected_count)
        if (self.count, self.digest) != (expected_count, expected_digest):
            aside = unused_path(path.with_name(path.name + ".damaged"))
            echo(f"warning: {path}: damaged; renamed to {aside.name}; the new file "
                 "starts after the checkpoint")
            os.replace(path, aside)
            self.file = open(path, "a+b", buffering=0, opener=regular_only)
            self.count = 0
            self.digest = ""
            size = 0
        self.file.truncate(size)
        self.writer = summary_writer(path.parent) if tensorboard else None

    def _read(self, file: IO[bytes], count: int) -> int:
        """Count and digest the first `count` rows that can be read. Returns their bytes."""
        file.seek(0)
        size = 0
        # a damaged row ends the reading, and the digest will not match
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            for line in itertools.islice(file, count):
                self.digest = extend_digest(self.digest, json.loads(line))
                self.count += 1
                size += len(line)
        return size

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
