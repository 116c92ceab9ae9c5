"""Train a byte-level BPE tokenizer. `python -m minirlhf.tools.bpe OUT --size 1022 FILE...`

Learns from preference files (all their strings) or plain text; writes tiktoken's rank file.
"""

import base64
import collections
import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from minirlhf.data.json_files import BadRecord, check_text, open_text, read_objects
from minirlhf.data.rank_files import GPT2_PATTERN
from minirlhf.run.command_line import Parser, one_line_errors
from minirlhf.run.errors import UserError
from minirlhf.run.files import check_output, write_atomically
from minirlhf.run.terminal import echo

import regex  # the standard re lacks \p{L}; tiktoken requires this package as well


def merge(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """Merge a word's tokens by tiktoken's rule.

    Join the adjacent pair of lowest rank, the leftmost if equal, until no pair makes a token.

    >>> merge([b"a", b"b", b"a", b"b"], {b"ab": 256})
    [b'ab', b'ab']
    """
    parts = list(parts)
    while len(parts) > 1:
        rank, place = min((ranks.get(a + b, math.inf), i)
                          for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == math.inf:
            break
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    return parts


def train_ranks(texts: Iterable[str], n_ranks: int,
                pattern: str = GPT2_PATTERN) -> dict[bytes, int]:
    """A dict token -> rank: the 256 bytes, then new tokens in the order of learning.

    Each new token joins the most frequent adjacent pair inside words; of equally frequent pairs,
    the first in byte order. Two pairs with the same joined bytes count as one, because tiktoken
    looks up the joined bytes. Returns fewer than n_ranks if no pairs are left.
    """
    if n_ranks < 256:
        raise ValueError(f"n_ranks {n_ranks} is below 256: each byte needs a rank")
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = collections.Counter(word for text in texts for word in regex.findall(pattern, text))
    counts = list(words.values())
    splits = [[bytes([byte]) for byte in word.encode()] for word in words]
    frequency: collections.Counter[bytes] = collections.Counter()
    words_with = collections.defaultdict(set)  # joined pair -> indices of words

    def count(word: int, sign: int) -> None:
        for a, b in zip(splits[word], splits[word][1:]):
            frequency[a + b] += sign * counts[word]
            words_with[a + b].add(word)

    for word in range(len(splits)):
        count(word, 1)
    while len(ranks) < n_ranks and frequency:
        join = min(frequency, key=lambda pair: (-frequency[pair], pair))
        if frequency[join] == 0:
            break
        ranks[join] = len(ranks)
        for word in words_with.pop(join):
            count(word, -1)
            splits[word] = merge(splits[word], ranks)
            count(word, 1)
        words_with.pop(join, None)
    return ranks


def write_ranks(path: str | Path, ranks: dict[bytes, int]) -> None:
    """Write tiktoken's format: one line per token, "BASE64 RANK", in order of rank."""
    ordered = sorted(ranks, key=ranks.__getitem__)
    lines = (base64.b64encode(token) + b" %d\n" % ranks[token] for token in ordered)
    write_atomically(Path(path), b"".join(lines))


def strings_in(value) -> Iterator[str]:
    """All strings of a JSON value, without the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_in(inner)


def read_texts(path: Path) -> Iterator[str]:
    """The strings of a .json or .jsonl file, plain or as .gz; any other file is one text.

    Raises UserError.
    """
    try:
        if path.name.removesuffix(".gz").endswith((".json", ".jsonl")):
            for line, record in read_objects(str(path)):
                if isinstance(record, BadRecord):
                    raise BadRecord(f"line {line}: {record}")
                yield from (check_text(text, "a text") for text in strings_in(record))
        else:
            with open_text(str(path)) as file:
                yield check_text(file.read(), "the text")
    except (OSError, EOFError, zlib.error, BadRecord) as error:
        raise UserError(f"{path}: cannot be read ({error}); "
                        "give preference files or UTF-8 text") from None


def main(arguments: list[str] | None = None) -> None:
    """Write the rank file. A user's error is one line and exit status 2."""
    parser = Parser(description="Train a byte-level BPE tokenizer.")
    parser.add_argument("out", type=Path, help="the rank file to write, for --tokenizer")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE",
                        help="preference files or plain text")
    parser.add_argument("--size", type=int, default=1022,
                        help="number of ranks (default: 1022); size + 2 should be a multiple of "
                             "64, because EOS and PAD are added")
    parser.add_argument("--force", action="store_true", help="replace an existing rank file")
    with one_line_errors():
        options = parser.parse_args(arguments)
        if options.size < 256:
            raise UserError(f"--size {options.size} is below 256: each byte needs a rank")
        check_output(options.out, options.force)
        texts = (text for path in options.files for text in read_texts(path))
        ranks = train_ranks(texts, options.size)
        write_ranks(options.out, ranks)
        note = "; the texts have no more pairs to join" if len(ranks) < options.size else ""
        echo(f"{len(ranks)} ranks in {options.out}{note}")


if __name__ == "__main__":
    main()
