"""From text to ids and back: byte-level BPE from a rank file, with one special token.

Every tokenizer is a `tiktoken.Encoding` of the same layout. n is its number of ordinary tokens:

    id       0 ... n - 1     n       n + 1     up to a multiple of 64
    what     byte pairs      EOS     PAD       unused rows of the embedding table

EOS is an action of the policy, so it belongs to the softmax: `encoding.n_vocab` = n + 1 classes.
PAD only fills batches and is not a class. If both had the same id, masking PAD would mask EOS as
well, and a policy that never gets a gradient for stopping never learns to stop.
"""

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path

from minirlhf.config import DATA
from minirlhf.run.errors import UserError, suggest
from minirlhf.run.files import read_file

import tiktoken

Ids = tuple[int, ...]
HELPDESK_RANKS = DATA / "helpdesk.tiktoken"
EOS_TEXT = "<|endoftext|>"
CHUNK = 2**16  # characters to encode at a time: see batches.py
MAX_RANK_FILE_BYTES = 64 * 2**20  # the largest public rank file has less than 4 MB
# GPT-2's split into pieces, which merges never cross: contractions, and words, numbers or
# punctuation with the space before them, and runs of spaces (Radford et al. 2019, released code;
# `++` does not backtrack, which is faster).
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
                r"|\s++$|\s+(?!\S)|\s")


def load_tokenizer(name: str = "helpdesk") -> tiktoken.Encoding:
    """The tokenizer `name`: "helpdesk" (shipped), a .tiktoken file, or an encoding of tiktoken.

    A rank file is used with GPT2_PATTERN. tiktoken downloads its encodings once, to
    TIKTOKEN_CACHE_DIR; of their special tokens only EOS is kept, and gaps between ranks are
    closed, so that ids are 0 ... n - 1.
    Raises UserError for an unknown name, a failed download or a malformed rank file.
    """
    path = HELPDESK_RANKS if name == "helpdesk" else Path(name)
    if path.suffix == ".tiktoken":
        pattern = GPT2_PATTERN
        tokens = read_ranks(path)
    else:
        original = _published(name)
        pattern = original._pat_str
        ranks = original._mergeable_ranks
        tokens = sorted(ranks, key=ranks.__getitem__)
    return tiktoken.Encoding(name, pat_str=pattern, special_tokens={EOS_TEXT: len(tokens)},
                             mergeable_ranks={token: rank for rank, token in enumerate(tokens)})


def _published(name: str) -> tiktoken.Encoding:
    """An encoding of tiktoken, as published."""
    known = ["helpdesk", *tiktoken.list_encoding_names()]
    if name not in known:
        raise UserError(f"tokenizer {name!r} is neither a .tiktoken file nor known"
                        f"{suggest(name, known)}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network (OSError), or a damaged download
        raise UserError(f"tokenizer {name!r} is not cached and cannot be downloaded "
                        f"({type(error).__name__}); connect to the network once, set "
                        "TIKTOKEN_CACHE_DIR to a folder that contains it, or use "
                        "--tokenizer helpdesk") from error


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a rank file in order of rank; line r + 1 is 'BASE64 r' for rank r."""
    try:
        content = read_file(path, MAX_RANK_FILE_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); "
                        "give a rank file or a name") from error
    tokens: dict[bytes, int] = {}  # a dict keeps the order and finds repetitions
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            base64_token, rank = line.split()
            token = base64.b64decode(base64_token, validate=True)
            stated = int(rank)
        except ValueError as error:
            raise UserError(f"{path}:{number}: is not 'BASE64 RANK'; "
                            "give a rank file in tiktoken's format") from error
        if stated != len(tokens) or token in tokens:
            problem = f"should have rank {len(tokens)}"
            if token in tokens:
                problem = "repeats an earlier token"
            raise UserError(f"{path}:{number}: {problem}; "
                            "ranks count from 0 without gaps, one token each")
        tokens[token] = stated
    missing = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if missing:
        raise UserError(f"{path}: has no token for {len(missing)} of the 256 bytes (the first is "
                        f"{missing[0]:#04x}), so some text cannot be encoded; train new ranks")
    return list(tokens)


def pad_id(encoding: tiktoken.Encoding) -> int:
    """The id of PAD: the first that is not a class of the softmax."""
    return encoding.n_vocab


def table_rows(encoding: tiktoken.Encoding) -> int:
    """Rows of the embedding table: ordinary tokens, EOS, PAD, rounded up to a multiple of 64."""
    return -(-(encoding.n_vocab + 1) // 64) * 64


def fingerprint(encoding: tiktoken.Encoding) -> str:
    """SHA-256 of pattern and tokens: equal only if two encodings give all text the same ids."""
    digest = hashlib.sha256((encoding._pat_str + getattr(encoding, "layout", "")).encode())
    for i in range(encoding.n_vocab):
        if i != encoding.eot_token:
            token = encoding.decode_single_token_bytes(i)
            digest.update(len(token).to_bytes(4, "big") + token)
    return digest.hexdigest()


def decode(encoding: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """The text of ids without EOS and PAD; invalid UTF-8 (half a character) becomes U+FFFD."""
    special = (encoding.eot_token, pad_id(encoding))
    return encoding.decode([i for i in ids if i not in special], errors="replace")
