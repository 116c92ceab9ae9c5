"""The tokenizer of a pretrained language model, from a folder in Hugging Face's layout.

tokenizer.json (byte-level BPE: SmolLM2, Qwen, Llama 3, GPT-2) or tokenizer.model in tiktoken's
format (Llama 3). Ids are the file's, because they index the embedding table of the weights:

    id       0 ... n - 1, in the file's order            n       up to the rows of the table
    what     byte pairs and added tokens, EOS is one     PAD     unused

The text of an added token that the file calls special, such as "<|im_end|>", stays ordinary text.
"""

import json
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf.data.rank_files import GPT2_PATTERN, read_ranks
from minirlhf.run.errors import UserError
from minirlhf.run.files import read_file

import regex  # tiktoken requires this package
import tiktoken

# SmolLM2: every digit is a piece, and GPT-2's pattern splits the text between digits. So blanks
# before a digit are blanks at the end of a text: all of them form one piece.
DIGITS_PATTERN = (r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++"
                  r"|\s++$|\s+(?![^\s\p{N}])|\s")
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = ("begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
                  "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id "
                  "python_tag image").split()
LLAMA3_ADDED = 256
MAX_ID = 2**20  # 8 times the largest vocabulary of the supported models
# Every kind of character. A pattern that matches only some of them would lose text.
PROBE = "aB1 \u00e9\u4e2d\U0001f600_!\t\n\r\n \u2028\u00a0  ab\u0660\u2167\u00b2'S  \n x  "


class Vocabulary(NamedTuple):
    """What a tokenizer file contains."""

    pattern: str  # splits text into pieces, which merges never cross
    ranks: dict[bytes, int]  # ids of bytes and byte pairs; pairs merge in the order of their ids
    ids: dict[bytes, int]  # of all tokens, also of those without a merge
    added: dict[str, int]  # tokens outside BPE
    words: frozenset[str]  # added tokens that are not special: found in text
    is_nfc: bool  # text is normalized first


class PretrainedEncoding(tiktoken.Encoding):
    """tiktoken's merging with the ids, the EOS and the normalizer of a file.

    tiktoken joins the pair of lowest rank first, and the rank is its id.
    """

    encode_to_numpy: Any = None  # not available: tiktoken's own would skip the normalizer
    encode_with_unstable: Any = None

    def __init__(self, name: str, vocabulary: Vocabulary, eos: str, layout: str = "") -> None:
        """layout: what else text is encoded with, for the fingerprint."""
        ids, added = vocabulary.ids, vocabulary.added
        # A byte that the file lacks gets an id from MAX_ID on and is dropped, as in Hugging Face's
        # tokenizers. (There its neighbors can merge, here not. SmolLM2 lacks six control
        # characters.)
        all_bytes = {bytes([byte]): MAX_ID + byte for byte in range(256)}
        super().__init__(name, pat_str=vocabulary.pattern, special_tokens=added,
                         mergeable_ranks=all_bytes | vocabulary.ranks)
        self._bytes = {i: token for token, i in ids.items()}
        self._bytes |= {i: text.encode() for text, i in added.items()}
        self._vocabulary = vocabulary
        self.special_tokens_set = added.keys() - vocabulary.words
        self._eos = added[eos]
        self.max_token_value = max(self._bytes)
        self.layout = f"{vocabulary.is_nfc} {layout}"

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text; never special tokens."""
        return self.encode(text, disallowed_special=())

    def encode(self, text: str, *, allowed_special: Any = frozenset(),
               disallowed_special: Any = "all") -> list[int]:
        """The ids of a text. Its special tokens are treated as by tiktoken: see there."""
        allowed = self.special_tokens_set if allowed_special == "all" else allowed_special
        text = unicodedata.normalize("NFC", text) if self._vocabulary.is_nfc else text
        ids = super().encode(text, allowed_special=self._vocabulary.words | allowed,
                             disallowed_special=disallowed_special)
        return [i for i in ids if i < MAX_ID]

    def decode(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """The text of ids. An id without a token has none."""
        return self.decode_bytes(tokens).decode(errors=errors)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The bytes of ids."""
        return b"".join(map(self.decode_single_token_bytes, tokens))

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of an id, or none if the file has no such id."""
        return self._bytes.get(token, b"")

    @property
    def eot_token(self) -> int:
        """EOS."""
        return self._eos


def read_pretrained_tokenizer(folder: str | Path) -> PretrainedEncoding:
    """The tokenizer of a model's folder. Raises UserError that names the file and the problem."""
    path = Path(folder) / "tokenizer.json"
    if not path.parent.exists():
        raise UserError(f"{folder}: no such folder")
    if (path.parent / "policy.pt").exists():
        raise UserError(f"{folder}: is a policy run of this project; "
                        "load it with minirlhf.tools.trained.load_trained")
    if not path.exists():
        path = path.with_name("tokenizer.model")
    if not path.exists():
        raise UserError(f"{folder}: contains no tokenizer.json and no tokenizer.model; download "
                        "all files of the model")
    try:
        vocabulary = _llama3(path) if path.suffix == ".model" else _parse(read_json(path))
        eos = _eos(path.parent, vocabulary.added)
        encoding = PretrainedEncoding(str(folder), vocabulary, eos, chat_template(path.parent))
    except (AttributeError, LookupError, TypeError, ValueError, regex.error) as error:
        raise UserError(f"{path}: is not a tokenizer that this project can use "
                        f"({str(error) or type(error).__name__}); "
                        "use byte-level BPE, as in SmolLM2, Qwen or Llama 3") from None
    if encoding.decode(encoding.encode_ordinary(PROBE)) != PROBE:
        raise UserError(f"{path}: its split pattern or vocabulary loses text; use another model")
    return encoding


def read_json(path: Path) -> dict:
    """A JSON object, or {} if there is no such file. Raises UserError."""
    try:
        value = json.loads(read_file(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object; download it again")
    return value


def chat_template(folder: Path) -> str:
    """The source of a model's chat template, or "". Raises UserError."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_file(path).decode(errors="replace")
    source = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):  # several, with names
        source = next((each["template"] for each in source if each["name"] == "default"), "")
    return str(source or "")


def _eos(folder: Path, added: dict[str, int]) -> str:
    """The token that ends a response: of the tokenizer's settings, else the model's first one."""
    token = read_json(folder / "tokenizer_config.json").get("eos_token")
    if isinstance(token, dict):
        token = token["content"]
    for name in ("generation_config.json", "config.json"):
        if token is None:
            stated = read_json(folder / name).get("eos_token_id")
            first = stated[0] if isinstance(stated, list) else stated
            token = next((text for text, i in added.items() if i == first), None)
    if token not in added:
        raise UserError(f"{folder / 'tokenizer_config.json'}: is missing, or its eos_token "
                        f"({token!r}) is not an added token; download all files of the model")
    return token


# ---- tokenizer.json ------------------------------------------------------------------------------


def _parse(file: dict) -> Vocabulary:
    """Raises ValueError for a property that tiktoken cannot reproduce, and KeyError and so on."""
    model = file["model"]
    kind = model.get("type", "BPE")  # GPT-2's old file does not state it
    unusual = [f"model type {kind}"] if kind != "BPE" else []
    unusual += [f"{key} {model[key]}" for key in ("dropout", "unk_token", "byte_fallback",
                                                   "continuing_subword_prefix",
                                                   "end_of_word_suffix") if model.get(key)]
    normalizer = (file.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        unusual.append(f"normalizer {normalizer}")
    for token in file["added_tokens"]:
        unusual += [f"{key} of added token {token['content']}"
                    for key in ("single_word", "lstrip", "rstrip") if token[key]]
    if unusual:
        raise ValueError(f"unsupported: {unusual[0]}")
    added = {token["content"]: token["id"] for token in file["added_tokens"]}
    words = frozenset(token["content"] for token in file["added_tokens"] if not token["special"])
    byte_of = _bytes_of_characters()
    ids = {bytes(map(byte_of.__getitem__, token)): i
           for token, i in model["vocab"].items() if token not in added}
    all_ids = [*ids.values(), *added.values()]
    if any(type(i) is not int or not 0 <= i < MAX_ID for i in all_ids):
        raise ValueError(f"an id is not a number below {MAX_ID}")
    if len(set(all_ids)) < len(all_ids):
        raise ValueError("two tokens have the same id")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    tokens = [bytes(map(byte_of.__getitem__, left + right)) for left, right in pairs]
    if not set(tokens) <= ids.keys():
        raise ValueError("a merge gives a token that is not in the vocabulary")
    single = [token for token in ids if len(token) == 1]
    if model.get("ignore_merges"):  # then a piece that is a token stays one, with a merge or not
        tokens += sorted(set(ids).difference(single, tokens), key=ids.__getitem__)
    order = [ids[token] for token, _ in groupby(tokens)]
    if order != sorted(set(order)):
        raise ValueError("its merges do not have the order of their ids")
    ranks = {token: ids[token] for token in [*single, *tokens]}
    return Vocabulary(_pattern(file["pre_tokenizer"]), ranks, ids, added, words,
                      normalizer == "NFC")


def _pattern(pre_tokenizer: dict) -> str:
    """One pattern with the effect of the pre-tokenizer's steps. Raises ValueError."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    types = [step["type"] for step in steps]
    last = steps[-1]
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        first = steps[0]
        splits = last.get("use_regex", True)
        if types == ["ByteLevel"] and splits:
            return GPT2_PATTERN
        if types == ["Digits", "ByteLevel"] and first["individual_digits"] and splits:
            return DIGITS_PATTERN
        is_isolated = first.get("behavior") == "Isolated" and not first.get("invert")
        if types == ["Split", "ByteLevel"] and is_isolated and not splits:
            pattern = first["pattern"]["Regex"]
            if not regex.match(pattern, ""):  # tiktoken would crash on an empty piece
                return pattern
    raise ValueError(f"unsupported: pre-tokenizer {json.dumps(pre_tokenizer)[:200]}")


def _bytes_of_characters() -> dict[str, int]:
    """The byte of each character of the vocabulary: printable Latin-1, and the rest from U+0100.

    (Radford et al. 2019, released code.)
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return ({chr(byte): byte for byte in printable}
            | {chr(256 + i): byte for i, byte in enumerate(others)})


# ---- tokenizer.model -----------------------------------------------------------------------------


def _llama3(path: Path) -> Vocabulary:
    """Llama 3's tokenizer.model: ranks in tiktoken's format, then 256 special tokens."""
    tokens = read_ranks(path)
    names = [*LLAMA3_SPECIAL, *(f"reserved_special_token_{i}" for i in range(2, LLAMA3_ADDED))]
    added = {f"<|{name}|>": len(tokens) + i for i, name in enumerate(names[:LLAMA3_ADDED])}
    ids = {token: i for i, token in enumerate(tokens)}
    return Vocabulary(LLAMA3_PATTERN, ids, ids, added, frozenset(), False)
