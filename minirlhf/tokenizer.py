"""Text to ids and back: byte-level BPE from a rank file, with one special token.

Every tokenizer is a `tiktoken.Encoding` of the same layout, n being its number of ordinary tokens:

    id       0 ... n - 1     n       n + 1     up to a multiple of 64
    what     byte pairs      EOS     PAD       unused rows of the embedding table

EOS is an action that the policy takes, so it is in the softmax: `enc.n_vocab` = n + 1 classes. PAD only fills up
rectangles and is no class. Were the two the same id, masking the padding would mask the EOS as well, and a policy
that never sees a gradient for stopping never learns to stop.
"""

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path

import tiktoken

from minirlhf.config import DATA
from minirlhf.flags import UserError, nearest

HELPDESK_RANKS = DATA / "helpdesk.tiktoken"
EOS_TEXT = "<|endoftext|>"
MAX_RANK_FILE_BYTES = 64 * 2**20  # the largest public rank file is under 4 MB
# GPT-2's split into pieces, which no merge crosses: contractions, words, numbers and punctuation with the blank
# before them, and runs of blanks (Radford et al. 2019, released code; `++` never backtracks, so it is the faster form).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def load_tokenizer(name: str = "helpdesk") -> tiktoken.Encoding:
    """The tokenizer called `name`: "helpdesk" (shipped), a path to a .tiktoken file, or an encoding of tiktoken's.

    A rank file is split with GPT2_PATTERN. An encoding of tiktoken's is downloaded once, into TIKTOKEN_CACHE_DIR; of
    its special tokens only EOS is kept, and holes between its ranks are closed, so that ids are 0 ... n - 1.
    Raises UserError for a name that nobody knows, a download that fails and a malformed rank file.
    """
    path = HELPDESK_RANKS if name == "helpdesk" else Path(name)
    if path.suffix == ".tiktoken":
        pattern, tokens = GPT2_PATTERN, _read_ranks(path)
    else:
        original = _published(name)
        pattern, tokens = original._pat_str, sorted(original._mergeable_ranks, key=original._mergeable_ranks.__getitem__)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOS_TEXT: len(tokens)})


def _published(name: str) -> tiktoken.Encoding:
    """An encoding of tiktoken's, as it is published."""
    known = ["helpdesk", *tiktoken.list_encoding_names()]
    if name not in known:
        raise UserError(f"tokenizer {name!r} is neither a .tiktoken file nor known{nearest(name, known)}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network (requests' errors are OSErrors), or a damaged download
        raise UserError(f"tokenizer {name!r} is not cached and cannot be downloaded ({type(error).__name__}); connect to the "
                        "network once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer helpdesk") from error


def _read_ranks(path: Path) -> list[bytes]:
    """The tokens of a rank file in order of rank; line r + 1 of the file is 'BASE64 r' for the token of rank r."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RANK_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a rank file or a name") from error
    if len(content) > MAX_RANK_FILE_BYTES:
        raise UserError(f"{path}: is larger than {MAX_RANK_FILE_BYTES} bytes; give a rank file of tiktoken's format")
    tokens: dict[bytes, int] = {}  # a dict keeps the order and finds repeats
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            base64_token, rank = line.split()
            token, stated = base64.b64decode(base64_token, validate=True), int(rank)
        except ValueError as error:
            raise UserError(f"{path}:{number}: is not 'BASE64 RANK'; give a rank file of tiktoken's format") from error
        if stated != len(tokens) or token in tokens:
            problem = "repeats an earlier token" if token in tokens else f"should hold rank {len(tokens)}"
            raise UserError(f"{path}:{number}: {problem}; ranks run from 0 without holes, one token each")
        tokens[token] = stated
    missing = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if missing:
        raise UserError(f"{path}: has no token for {len(missing)} of the 256 bytes (the first is {missing[0]:#04x}); "
                        "without them some text cannot be encoded, so train the ranks anew")
    return list(tokens)


def pad_id(enc: tiktoken.Encoding) -> int:
    """The id that fills up rectangles: the first that is no class of the softmax."""
    return enc.n_vocab


def table_rows(enc: tiktoken.Encoding) -> int:
    """Rows of the embedding table: ordinary tokens, EOS and PAD, rounded up to a multiple of 64 for the GPU's sake."""
    return -(-(enc.n_vocab + 1) // 64) * 64


def fingerprint(enc: tiktoken.Encoding) -> str:
    """SHA-256 of pattern and tokens: equal for two encodings, whatever their names, only if all text gets equal ids."""
    digest = hashlib.sha256(enc._pat_str.encode())
    for rank in range(enc.eot_token):
        token = enc.decode_single_token_bytes(rank)
        digest.update(len(token).to_bytes(4, "big") + token)
    return digest.hexdigest()


def decode(enc: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """The text of `ids` without EOS and PAD; bytes that are no UTF-8 (a character cut in half) become U+FFFD."""
    return enc.decode([i for i in ids if i not in (enc.eot_token, pad_id(enc))], errors="replace")
