"""The file of answers, which is also a preference file: one JSON object per line.

    {"prompt": ..., "responses": [left, right], "preferences": [[winner, loser]],
     "answer": "left", "number": 7, "reward_model": 0.63, "policy": ...,
     "source": {"tokenizer": ..., "reward": ...}}

Each line is on the disk before the next pair is shown.
A tie has both orders with weight 1/2. The responses of a skipped pair are stored in "skipped";
"responses" is then blank, so that training drops and counts the line.
number: which of the policy's pairs it was. reward_model: the probability, according to the reward
model, that left is better.
"""

import errno
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from minirlhf.run.errors import UserError
from minirlhf.run.files import lock_file, read_file, refuse_link, regular_only, write_atomically

FIRST_BYTES = b'{"prompt": "'  # of every line
PREFERENCES = {"left": [[0, 1]], "right": [[1, 0]], "tie": [[0, 1], [1, 0]], "skip": [[0, 1]]}


class Pair(NamedTuple):
    """Two responses to compare."""

    number: int
    prompt: str
    responses: list[str]  # left, right
    probability: float  # that left is better, according to the reward model


class LabelFile:
    """All answers, in memory and on disk. The file is locked until the process ends."""

    def __init__(self, path: Path, source: dict[str, str], policy: str):
        """Read the answers of an existing file; remove a last line that a crash left incomplete.

        Raises UserError if another process uses the file, or if it contains anything else.
        """
        self.path = path
        self.source = source
        self.policy = policy
        refuse_link(path)
        # a file of its own, because undo replaces the file at path
        self.lock = lock_file(path.with_name(f".{path.name}.lock"),
                              f"{path}: another process is labeling there; wait for it to end, "
                              "or use another --out")
        *lines, last = read_file(path).split(b"\n") if path.exists() else [b""]
        self.repaired = is_incomplete(last)
        if not self.repaired:
            lines.append(last)  # empty, or complete except for its newline
        self.rows = [self.parse(line, number) for number, line in enumerate(lines, start=1)
                     if line.strip()]
        if last:
            self.rewrite(self.rows)

    def rewrite(self, rows: list[dict]) -> None:
        """Replace the whole file. Raises OSError."""
        write_atomically(self.path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))

    def parse(self, line: bytes, number: int) -> dict:
        """The answer of one line. Raises UserError if it is none, or belongs to another policy."""
        place = f"{self.path}:{number}"
        try:
            row = json.loads(line)
            source = row["source"]
            pair = as_pair(row)
            texts = [pair.prompt, *pair.responses]
            valid = (row["answer"] in PREFERENCES and isinstance(source, dict)
                     and all(isinstance(text, str) for text in texts)
                     and type(pair.number) is int and 0 <= pair.number < 2**53
                     and 0.0 <= pair.probability <= 1.0)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            valid = False
        if not valid:
            raise UserError(f"{place}: not an answer that this program wrote; use another --out")
        for key, problem in (("tokenizer", "with another tokenizer"),
                             ("reward", "of another reward run")):
            if source.get(key) != self.source[key]:
                raise UserError(f"{place}: this answer belongs to a policy {problem}; "
                                "use another --out, or the --run that it belongs to")
        return row

    def next_number(self) -> int:
        return max((row["number"] for row in self.rows), default=-1) + 1

    def add(self, pair: Pair, answer: str) -> None:
        """Append one line and flush it to the disk. Raises OSError."""
        row = dict(prompt=pair.prompt, responses=pair.responses, preferences=PREFERENCES[answer],
                   answer=answer)
        if answer == "tie":
            row["weight"] = 0.5
        if answer == "skip":
            row |= dict(responses=["", ""], skipped=pair.responses)
        row |= dict(number=pair.number, reward_model=pair.probability, policy=self.policy,
                    source=self.source)
        line = json.dumps(row).encode() + b"\n"
        with open(self.path, "ab", buffering=0, opener=regular_only) as file:
            if file.write(line) < len(line):  # the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(file.fileno())
        self.rows.append(row)

    def undo(self) -> Pair | None:
        """Remove the last answer, first on disk; returns its pair, or None. Raises OSError."""
        if not self.rows:
            return None
        self.rewrite(self.rows[:-1])
        return as_pair(self.rows.pop())

    def summary(self) -> str:
        """Counts of answers, and how often the reward model agreed with "left" and "right"."""
        count = {answer: sum(row["answer"] == answer for row in self.rows)
                 for answer in PREFERENCES}
        ties = f"{count['tie']} tie{'' if count['tie'] == 1 else 's'}"
        answered = len(self.rows) - count["skip"]
        text = f"{answered} answered ({ties}), {count['skip']} skipped"
        decided = count["left"] + count["right"]
        if not decided:
            return text
        agreed = 0.0
        for row in self.rows:
            if row["answer"] in ("left", "right"):
                margin = row["reward_model"] - 0.5
                if row["answer"] == "right":
                    margin = -margin
                agreed += 0.5 if margin == 0 else margin > 0
        low, high = wilson_interval(agreed, decided)
        return (f"{text}; reward model agreed {agreed:g}/{decided}: "
                f"{agreed / decided:.0%} [{low:.0%}, {high:.0%}]")


def is_incomplete(line: bytes) -> bool:
    """Whether a line is the beginning of an answer, perhaps filled up with NUL by a crash."""
    try:
        json.loads(line)
        return False
    except (ValueError, RecursionError):
        return bool(line) and FIRST_BYTES.startswith(line.rstrip(b"\0")[:len(FIRST_BYTES)])


def as_pair(row: dict) -> Pair:
    """The pair of one line."""
    left, right = row.get("skipped") or row["responses"]
    return Pair(row["number"], row["prompt"], [left, right], row["reward_model"])


def wilson_interval(successes: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson 1927).

    Unlike a bootstrap interval, it has a positive width for 3 of 3.

    >>> [[round(x, 2) for x in wilson_interval(*case)] for case in ((3, 3), (80, 100))]
    [[0.44, 1.0], [0.71, 0.87]]
    """
    share = successes / count
    scale = 1 + z * z / count
    center = (share + z * z / (2 * count)) / scale
    variance = share * (1 - share) / count + z * z / (4 * count * count)
    half_width = z / scale * math.sqrt(variance)
    return max(0.0, center - half_width), min(1.0, center + half_width)
