"""A byte-level BPE trainer that writes tiktoken's rank files.

`python -m minirlhf.tools.bpe OUT --size 1022 FILE...` learns from preference files (all strings) or plain text.
"""

import argparse
import base64
import collections
import gzip
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import regex  # the standard re lacks \p{L}; tiktoken itself requires this package, so it is always there

from minirlhf.flags import UserError, fail
from minirlhf.tokenizer import GPT2_PATTERN


def merge(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """Join the two neighbours of lowest rank, leftmost first, until no two neighbours make a token: tiktoken's rule.

    >>> merge([b"a", b"b", b"a", b"b"], {b"ab": 256})
    [b'ab', b'ab']
    """
    parts = list(parts)
    while len(parts) > 1:
        rank, place = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == math.inf:
            break
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    return parts


def train_ranks(texts: Iterable[str], n_ranks: int, pattern: str = GPT2_PATTERN) -> dict[bytes, int]:
    """Token bytes -> rank: the 256 bytes, then, one at a time, the most frequent join of two neighbours inside a word.

    Ties go to the join that is first in byte order. Fewer than n_ranks come back where the words run out of pairs.
    A join is known by its bytes and not by its two halves, since tiktoken too looks up only the joined bytes.
    """
    if n_ranks < 256:
        raise ValueError(f"n_ranks {n_ranks} is below 256: every byte needs a rank")
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = collections.Counter(word for text in texts for word in regex.findall(pattern, text))
    counts = list(words.values())
    splits = [[bytes([byte]) for byte in word.encode()] for word in words]
    frequency, where = collections.Counter(), collections.defaultdict(set)

    def count(word: int, sign: int) -> None:
        for a, b in zip(splits[word], splits[word][1:]):
            frequency[a + b] += sign * counts[word]
            where[a + b].add(word)

    for word in range(len(splits)):
        count(word, 1)
    while len(ranks) < n_ranks and frequency:
        join = min(frequency, key=lambda pair: (-frequency[pair], pair))
        if frequency[join] == 0:
            break
        ranks[join] = len(ranks)
        for word in where.pop(join):
            count(word, -1)
            splits[word] = merge(splits[word], ranks)
            count(word, 1)
        where.pop(join, None)
    return ranks


def write_ranks(path: str | Path, ranks: dict[bytes, int]) -> None:
    """tiktoken's own format: one line per token, base64 of its bytes, a blank, its rank."""
    ordered = sorted(ranks, key=ranks.__getitem__)
    Path(path).write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % ranks[token] for token in ordered))


def strings_in(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_in(inner)


def read_texts(path: Path) -> Iterator[str]:
    """The strings of a .json or .jsonl file (or of either, gzipped); the whole of any other file as one text."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        name = path.name.removesuffix(".gz")
        if name.endswith(".json"):
            yield from strings_in(json.loads(text))
        elif name.endswith(".jsonl"):
            for line in filter(str.strip, text.split("\n")):
                yield from strings_in(json.loads(line))
        else:
            yield text
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give preference files or UTF-8 text") from None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Learn a tiktoken rank file.")
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--size", type=int, default=1022, help="ranks; with EOS and PAD best a multiple of 64")
    options = parser.parse_args(arguments)
    try:
        if options.size < 256:
            raise UserError(f"--size {options.size} is below 256: every byte needs a rank")
        ranks = train_ranks((text for path in options.files for text in read_texts(path)), options.size)
        write_ranks(options.out, ranks)
    except UserError as error:
        sys.exit(fail(str(error), 2))
    except OSError as error:
        sys.exit(fail(f"{options.out}: {error.strerror}", 2))
    print(f"{len(ranks)} ranks in {options.out}")


if __name__ == "__main__":
    main()
