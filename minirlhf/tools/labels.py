"""A file of answers that is also a preference file: one JSON line for each, on the disk before the next question is asked.

    {"prompt": ..., "responses": [left, right], "preferences": [[winner, loser]], "answer": "left", "number": 7,
     "reward_model": 0.63, "policy": ..., "source": {"tokenizer": ..., "reward": ...}}

A tie holds both orders with weight 1/2. A skipped pair is kept in "skipped", and its responses are blank, which training
drops and counts. number: which of the policy's pairs it was; reward_model: its probability that left is better.
"""

import errno
import fcntl
import json
import math
import os
from pathlib import Path
from typing import IO, NamedTuple

from minirlhf.checkpoint import write_atomically
from minirlhf.config import UserError

FIRST = b'{"prompt": "'  # every line begins so
PREFERENCES = {"left": [[0, 1]], "right": [[1, 0]], "tie": [[0, 1], [1, 0]], "skip": [[0, 1]]}


class Pair(NamedTuple):
    """Two responses to a prompt, to be compared."""

    number: int
    prompt: str
    responses: list[str]  # left, right
    probability: float  # the reward model's, that left is better


class LabelFile:
    """The answers so far, in memory and on disk; locked while the process lives."""

    def __init__(self, path: Path, source: dict[str, str], policy: str):
        """Raises UserError if the file is somebody else's, or in use. A last line that a crash has torn is cut off."""
        self.path, self.source, self.policy = path, source, policy
        self.lock = lock_beside(path)
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        self.mended = is_torn(lines[-1])
        last = [] if self.mended else lines[-1:]  # whole, if it only lacks its newline
        self.rows = [self.checked(line, number) for number, line in enumerate(lines[:-1] + last, 1) if line.strip()]
        if lines[-1]:
            self.rewrite(self.rows)

    def rewrite(self, rows: list[dict]) -> None:
        write_atomically(self.path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))

    def checked(self, line: bytes, number: int) -> dict:
        """The answer that a line holds. Raises UserError if it is none, or about another policy."""
        place = f"{self.path}:{number}"
        try:
            row = json.loads(line)
            answer, source, pair = row["answer"], row["source"], as_pair(row)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise UserError(f"{place}: not an answer that this program wrote; name another --out") from None
        if answer not in PREFERENCES or not isinstance(pair.number, int) or not isinstance(pair.probability, float):
            raise UserError(f"{place}: not an answer that this program wrote; name another --out")
        for key, what in (("tokenizer", "another tokenizer, so another task"), ("reward", "another reward run")):
            if source.get(key) != self.source[key]:
                raise UserError(f"{place}: this answer is about a policy of {what}; name another --out, or the --run it is about")
        return row

    def next_number(self) -> int:
        return max((row["number"] for row in self.rows), default=-1) + 1

    def add(self, pair: Pair, answer: str) -> None:
        """Append and flush to the disk. Raises OSError."""
        row = dict(prompt=pair.prompt, responses=pair.responses, preferences=PREFERENCES[answer], answer=answer)
        if answer == "tie":
            row["weight"] = 0.5
        if answer == "skip":
            row |= dict(responses=["", ""], skipped=pair.responses)
        row |= dict(number=pair.number, reward_model=pair.probability, policy=self.policy, source=self.source)
        line = json.dumps(row).encode() + b"\n"
        with open(self.path, "ab", buffering=0) as file:
            if file.write(line) < len(line):  # the disk took a part, and will take no more
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(file.fileno())
        self.rows.append(row)

    def undo(self) -> Pair | None:
        """Take back the last answer, on disk first; returns what it was about, or None if there is none."""
        if not self.rows:
            return None
        self.rewrite(self.rows[:-1])
        return as_pair(self.rows.pop())

    def summary(self) -> str:
        """How many are done, and how often the reward model agreed where left or right was better."""
        count = {answer: sum(row["answer"] == answer for row in self.rows) for answer in PREFERENCES}
        decided = [row for row in self.rows if row["answer"] in ("left", "right")]
        ties = f"{count['tie']} tie{'' if count['tie'] == 1 else 's'}"
        text = f"{len(self.rows) - count['skip']} answered ({ties}), {count['skip']} skipped"
        if not decided:
            return text
        leanings = [row["reward_model"] - 0.5 if row["answer"] == "left" else 0.5 - row["reward_model"] for row in decided]
        right = sum(0.5 if lean == 0 else lean > 0 for lean in leanings)
        low, high = wilson(right, len(decided))
        return f"{text}; reward model agreed {right:g}/{len(decided)}: {right / len(decided):.0%} [{low:.0%}, {high:.0%}]"


def is_torn(line: bytes) -> bool:
    """Whether a line that is no JSON is the beginning of one of ours; a disk may have filled up the rest with NUL."""
    try:
        json.loads(line)
        return False
    except (ValueError, RecursionError):
        begun = line.rstrip(b"\0")[:len(FIRST)]
        return bool(line) and FIRST.startswith(begun)


def as_pair(row: dict) -> Pair:
    left, right = row.get("skipped") or row["responses"]
    return Pair(row["number"], row["prompt"], [left, right], row["reward_model"])


def wilson(right: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927). The bootstrap of the other tables would call 3 of 3 certain.

    >>> [round(x, 2) for x in wilson(3, 3)], [round(x, 2) for x in wilson(80, 100)]
    ([0.44, 1.0], [0.71, 0.87])
    """
    share, scale = right / count, 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def lock_beside(path: Path) -> IO:
    """Held until the process ends. On a file of its own: the answers change their inode whenever one is undone."""
    lock = open(path.with_name(f".{path.name}.lock"), "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(f"{path}: another process is labelling there; wait for it, or name another --out") from None
    return lock
