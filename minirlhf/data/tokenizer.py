"""From text to ids and back: byte-level BPE from a rank file, with one special token.

Every tokenizer is a `tiktoken.Encoding` of the same layout. n is its number of ordinary tokens:

    id       0 ... n - 1     n       n + 1     up to a multiple of 64
    what     byte pairs      EOS     PAD       unused rows of the embedding table

EOS is an action of the policy, so it belongs to the softmax: `encoding.n_vocab` = n + 1 classes.
PAD only fills batches and is not a class. If both had the same id, masking PAD would mask EOS as
well, and a policy that never gets a gradient for stopping never learns to stop.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from minirlhf.config import DATA
from minirlhf.data.pretrained_tokenizer import read_pretrained_tokenizer
from minirlhf.data.rank_files import GPT2_PATTERN, read_ranks
from minirlhf.run.errors import UserError, suggest

import tiktoken

Ids = tuple[int, ...]
HELPDESK_RANKS = DATA / "helpdesk.tiktoken"
EOS_TEXT = "<|endoftext|>"
CHUNK = 2**16  # characters to encode at a time: see batches.py


def load_tokenizer(name: str = "helpdesk") -> tiktoken.Encoding:
    """The tokenizer `name`.

    It is "helpdesk" (shipped), a .tiktoken file, the folder of a pretrained model, or an encoding
    of tiktoken.
    A rank file is used with GPT2_PATTERN. tiktoken downloads its encodings once, to
    TIKTOKEN_CACHE_DIR; of their special tokens only EOS is kept, and gaps between ranks are
    closed, so that ids are 0 ... n - 1.
    Raises UserError for an unknown name, a failed download or a malformed rank file.
    """
    path = HELPDESK_RANKS if name == "helpdesk" else Path(name)
    if path.is_dir() and path.suffix != ".tiktoken" and name not in tiktoken.list_encoding_names():
        return read_pretrained_tokenizer(path)
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


def pad_id(encoding: tiktoken.Encoding) -> int:
    """The id of PAD: the first that is not a class of the softmax."""
    return encoding.n_vocab


def table_rows(encoding: tiktoken.Encoding) -> int:
    """Rows of the embedding table: ordinary tokens, EOS, PAD, rounded up to a multiple of 64."""
    return -(-(encoding.n_vocab + 1) // 64) * 64


def fingerprint(encoding: tiktoken.Encoding) -> str:
    """SHA-256 of pattern and tokens: equal only if two encodings give all text the same ids."""
    layout = encoding._pat_str + getattr(encoding, "layout", "")
    digest = hashlib.sha256(layout.encode(errors="surrogatepass"))
    for i in range(encoding.n_vocab):
        if i != encoding.eot_token:
            token = encoding.decode_single_token_bytes(i)
            digest.update(len(token).to_bytes(4, "big") + token)
    return digest.hexdigest()


def decode(encoding: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """The text of ids without EOS and PAD; invalid UTF-8 (half a character) becomes U+FFFD."""
    special = (encoding.eot_token, pad_id(encoding))
    return encoding.decode([i for i in ids if i not in special], errors="replace")
