"""Tokenizers of pretrained models: the file's ids, EOS and normalizer, or one line of error."""

import base64
import json

from minirlhf.data.pretrained_tokenizer import LLAMA3_PATTERN, read_pretrained_tokenizer
from minirlhf.data.tokenizer import decode, fingerprint, pad_id, table_rows
from minirlhf.run.errors import UserError

import pytest


def characters() -> list[str]:
    """The printable character of each byte in a vocabulary."""
    names = [""] * 256
    unprintable = [*range(33), *range(127, 161), 173]
    for byte in range(256):
        names[byte] = chr(256 + unprintable.index(byte)) if byte in unprintable else chr(byte)
    return names


BLANK = characters()[32]
MERGES = [("t", "h"), ("th", "e"), (BLANK, "the"), (BLANK, BLANK), ("Ã", "©")]
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SMOLLM2 = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        BYTE_LEVEL | {"use_regex": True},
    ],
}
SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": LLAMA3_PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        BYTE_LEVEL | {"use_regex": False},
    ],
}


def added_token(content: str, index: int, special: bool = True) -> dict:
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": index, "content": content, "special": special} | flags


def tokenizer_json(merges_as_strings: bool = False, pre_tokenizer=SMOLLM2, **model) -> dict:
    """Three special tokens first, then bytes, then merges, as in SmolLM2."""
    tokens = [*ADDED, *characters(), *(left + right for left, right in MERGES)]
    return {
        "added_tokens": [added_token(token, i) for i, token in enumerate(ADDED)],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "decoder": BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [" ".join(pair) if merges_as_strings else list(pair) for pair in MERGES],
        }
        | model,
    }


def write(folder, file: dict | str, eos: object = "<|im_end|>", **others: dict):
    (folder / "tokenizer.json").write_text(file if isinstance(file, str) else json.dumps(file))
    settings = {} if eos is None else {"tokenizer_config": {"eos_token": eos}}
    for name, content in (settings | others).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def byte_ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


@pytest.mark.parametrize("merges_as_strings", [False, True])
def test_ids_are_the_files_and_merges_have_their_order(tmp_path, merges_as_strings):
    encoding = read_pretrained_tokenizer(write(tmp_path, tokenizer_json(merges_as_strings)))
    assert encoding.encode_ordinary("the  the") == [260, *byte_ids(" "), 261]
    assert encoding.encode_ordinary("thé") == [259, 263]
    assert encoding.encode_single_token("<|im_start|>") == 1
    assert encoding.eot_token == 2 and encoding.n_vocab == 264
    assert pad_id(encoding) == 264 and table_rows(encoding) == 320
    assert decode(encoding, [260, 2, 264, 261, 999]) == "the the"


def test_every_digit_is_a_piece_and_blanks_before_it_stay_together(tmp_path):
    """GPT-2's pattern alone would leave the last blank to the digit."""
    encoding = read_pretrained_tokenizer(write(tmp_path, tokenizer_json()))
    assert encoding.encode_ordinary("  12") == [262, *byte_ids("12")]
    assert encoding.encode_ordinary("  the") == [*byte_ids(" "), 261]
    gpt2 = tokenizer_json(pre_tokenizer=BYTE_LEVEL)  # an old file: no "use_regex", no model type
    del gpt2["model"]["type"]
    encoding = read_pretrained_tokenizer(write(tmp_path, gpt2))
    assert encoding.encode_ordinary("  12") == byte_ids("  12")


def test_special_tokens_in_text_stay_text_and_other_added_tokens_are_found(tmp_path):
    file = tokenizer_json()
    file["added_tokens"].append(added_token("<think>", 300, special=False))
    encoding = read_pretrained_tokenizer(write(tmp_path, file))
    for text in ADDED:
        assert encoding.encode_ordinary(text) == byte_ids(text)
    assert encoding.encode_ordinary("a<think>") == [*byte_ids("a"), 300]
    assert encoding.n_vocab == 301 and decode(encoding, [300, 299]) == "<think>"


def test_every_method_of_tiktoken_has_the_files_ids_or_is_not_available(tmp_path):
    """`encode` once returned the ranks of merging, which are other ids."""
    file = tokenizer_json() | {"normalizer": {"type": "NFC"}}
    file["added_tokens"].append(added_token("<think>", 300, special=False))
    encoding = read_pretrained_tokenizer(write(tmp_path, file))
    text = "the  thé<think> e\u0301"
    ids = [260, 3 + 32, 3 + 32, 259, 263, 300, 3 + 32, 263]
    assert encoding.encode_ordinary(text) == encoding.encode(text) == ids
    assert encoding.encode_batch([text]) == encoding.encode_ordinary_batch([text]) == [ids]
    assert encoding.encode("<|im_end|>a", allowed_special="all") == [2, *byte_ids("a")]
    assert encoding.encode("<|im_end|>", disallowed_special=()) == byte_ids("<|im_end|>")
    with pytest.raises(ValueError, match="special token"):
        encoding.encode("<|im_end|>")
    shown = "the  thé<think> é"
    assert encoding.decode(ids) == shown and encoding.decode_batch([ids]) == [shown]
    assert encoding.decode_bytes(ids) == shown.encode()
    assert encoding.decode_bytes_batch([ids]) == [shown.encode()]
    assert encoding.decode_with_offsets(ids) == (shown, [0, 3, 4, 5, 7, 8, 15, 16])
    assert encoding.decode_tokens_bytes([260, 300]) == [b"the", b"<think>"]
    assert encoding.encode_single_token("the") == 260
    assert encoding.is_special_token(2) and not encoding.is_special_token(260)
    for name in ("encode_to_numpy", "encode_with_unstable"):
        with pytest.raises(TypeError):
            getattr(encoding, name)(text)


def test_text_is_normalized_only_if_the_file_says_so(tmp_path):
    file = tokenizer_json()
    plain = read_pretrained_tokenizer(write(tmp_path, file))
    assert plain.encode_ordinary("e\u0301") == byte_ids("e\u0301")
    file["normalizer"] = {"type": "NFC"}
    normalizing = read_pretrained_tokenizer(write(tmp_path, file))
    assert normalizing.encode_ordinary("e\u0301") == [263]
    assert fingerprint(plain) != fingerprint(normalizing)


def test_the_fingerprint_covers_the_chat_template(tmp_path):
    """With another template the same record would become another prompt."""
    prints = []
    for template in (None, "x", "y", [{"name": "default", "template": "y"}]):
        config = {"eos_token": "<|im_end|>", "chat_template": template}
        write(tmp_path, tokenizer_json(), tokenizer_config=config, eos=None)
        prints.append(fingerprint(read_pretrained_tokenizer(tmp_path)))
    assert prints[2] == prints[3] and len(set(prints)) == 3


def test_a_byte_without_a_token_is_dropped(tmp_path):
    file = tokenizer_json()
    del file["model"]["vocab"][characters()[4]]
    encoding = read_pretrained_tokenizer(write(tmp_path, file))
    assert encoding.encode_ordinary("a\x04b") == byte_ids("ab")


def test_a_token_without_a_merge_is_used_only_if_merges_are_ignored(tmp_path):
    for ignore_merges, ids in [(False, byte_ids("cat")), (True, [400])]:
        file = tokenizer_json(ignore_merges=ignore_merges)
        file["model"]["vocab"]["cat"] = 400
        encoding = read_pretrained_tokenizer(write(tmp_path, file))
        assert encoding.encode_ordinary("cat") == ids and encoding.decode([400]) == "cat"


def test_eos_is_the_tokenizers_else_the_models_first(tmp_path):
    file = tokenizer_json()
    cases = [
        ("<|endoftext|>", {}, 0),
        ({"content": "<|im_start|>"}, {}, 1),
        (None, {"config": {"eos_token_id": 2}}, 2),
        (None, {"generation_config": {"eos_token_id": [1, 2]}, "config": {"eos_token_id": 0}}, 1),
    ]
    prints = set()
    for number, (eos, others, index) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        encoding = read_pretrained_tokenizer(write(folder, file, eos, **others))
        assert encoding.eot_token == index
        prints.add(fingerprint(encoding))
    assert len(prints) == 3
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="tokenizer_config.json: is missing, or its eos_token"):
        read_pretrained_tokenizer(write(tmp_path / "none", file, None))


def test_llama3_model_file(tmp_path):
    """Its special tokens have the ids after the ranks."""
    tokens = [*(bytes([i]) for i in range(256)), b"th", b"the", b" the"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    config = {"eos_token": "<|eot_id|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    encoding = read_pretrained_tokenizer(tmp_path)
    assert encoding.encode_ordinary("the the") == [257, 258]
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    names.append("reserved_special_token_2")
    special = [encoding.encode_single_token(f"<|{name}|>") for name in names]
    assert special == [259, 260, 265, 266, 268, 271] and encoding.n_vocab == 259 + 256
    assert encoding.encode_ordinary("<|eot_id|>") == list(b"<|eot_id|>")


def broken(path: str, value: object) -> dict:
    """A file with another value at a path like "model.type"."""
    file = tokenizer_json()
    *outer, key = path.split(".")
    inner = file
    for name in outer:
        inner = inner[int(name) if name.isdigit() else name]
    inner[key] = value
    return file


def split_by(pattern: str) -> dict:
    split, byte_level = SPLIT["pretokenizers"]
    steps = [split | {"pattern": {"Regex": pattern}}, byte_level]
    return tokenizer_json(pre_tokenizer=SPLIT | {"pretokenizers": steps})


@pytest.mark.parametrize(
    "file, message",
    [
        (broken("model.type", "Unigram"), "unsupported: model type Unigram"),
        (broken("model.byte_fallback", True), "unsupported: byte_fallback True"),
        (broken("model.dropout", 0.1), "unsupported: dropout 0.1"),
        (broken("model.end_of_word_suffix", "</w>"), "unsupported: end_of_word_suffix </w>"),
        (broken("normalizer", {"type": "Lowercase"}), "unsupported: normalizer Lowercase"),
        (broken("pre_tokenizer", {"type": "Metaspace"}), 'pre-tokenizer {"type": "Metaspace"}'),
        (broken("pre_tokenizer", None), "NoneType"),
        (broken("added_tokens.1.lstrip", True), "unsupported: lstrip of added token <|im_start|>"),
        (broken("added_tokens.1.id", 2), "two tokens have the same id"),
        (broken("added_tokens.1.id", "2"), "an id is not a number"),
        (broken("added_tokens.1.id", 10**9), "an id is not a number below 1048576"),
        (broken("model.vocab.▁the", 700), "▁"),
        (broken("model.merges", ["t h", "t zz"]), "a merge gives a token that is not in the"),
        (broken("model.merges", ["t h", "th e", "t h"]), "merges do not have the order of"),
        (broken("model.vocab.the", 700), "merges do not have the order of their ids"),
        (broken("model.merges", ["t h e"]), "too many values"),
        (broken("model", 3), "int"),
        (broken("pre_tokenizer", {"pretokenizers": []}), "list index out of range"),
        (split_by(""), 'unsupported: pre-tokenizer {"type": "Sequence"'),
        (split_by("("), "is not a tokenizer that this project can use"),
        ({}, "model"),
        ("[]", "is not a JSON object"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_unusable_file_gets_one_line(tmp_path, file, message):
    with pytest.raises(UserError) as caught:
        read_pretrained_tokenizer(write(tmp_path, file))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_pattern_that_skips_characters_is_refused(tmp_path):
    """tiktoken drops text that the pattern does not match."""
    with pytest.raises(UserError, match="loses text"):
        read_pretrained_tokenizer(write(tmp_path, split_by(r"\p{L}+|\s+")))


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="contains no tokenizer.json and no tokenizer.model"):
        read_pretrained_tokenizer(tmp_path)
    with pytest.raises(UserError, match="none: no such folder"):
        read_pretrained_tokenizer(tmp_path / "none")
    (tmp_path / "policy.pt").touch()
    with pytest.raises(UserError, match="policy run of this project; load it with minirlhf.tools"):
        read_pretrained_tokenizer(tmp_path)
