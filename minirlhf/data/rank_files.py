"""Rank files in tiktoken's format: byte pairs in the order of merging."""

import base64
from pathlib import Path

from minirlhf.run.errors import UserError
from minirlhf.run.files import read_file

# GPT-2's split into pieces, which merges never cross: contractions, and words, numbers or
# punctuation with the space before them, and runs of spaces (Radford et al. 2019, released code;
# `++` does not backtrack, which is faster).
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
                r"|\s++$|\s+(?!\S)|\s")


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a rank file in order of rank; line r + 1 is 'BASE64 r' for rank r."""
    try:
        content = read_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); "
                        "give a rank file or a name") from error
    tokens: dict[bytes, int] = {}  # a dict keeps the order and finds repetitions
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            base64_token, rank = line.split()
            token = base64.b64decode(base64_token, validate=True)
            is_next = int(rank) == len(tokens) and token not in tokens
        except ValueError:
            is_next = False
        if not is_next:
            raise UserError(f"{path}:{number}: is not a new token as 'BASE64 {len(tokens)}'; "
                            "give a rank file in tiktoken's format, whose ranks have no gaps")
        tokens[token] = len(tokens)
    missing = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if missing:
        raise UserError(f"{path}: has no token for {len(missing)} of the 256 bytes (the first is "
                        f"{missing[0]:#04x}), so some text cannot be encoded; train new ranks")
    return list(tokens)
