"""The tokenizer: any text round-trips, EOS and PAD differ, bad rank files are refused."""

import base64
import random

from minirlhf.data.tokenizer import (
    EOS_TEXT,
    GPT2_PATTERN,
    HELPDESK_RANKS,
    decode,
    fingerprint,
    load_tokenizer,
    pad_id,
    table_rows,
)
from minirlhf.run.errors import UserError

import pytest
import tiktoken

BYTES = [bytes([i]) for i in range(256)]
MERGES = [b"th", b"the", b" the", b"er", b"\n\n", b"\xc3\xa9"]


def rank_lines(tokens: list[bytes]) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


def tiny_rank_file(folder) -> str:
    """All bytes in reverse order, and a few merges."""
    path = folder / "tiny.tiktoken"
    path.write_bytes(b"\n".join(rank_lines(BYTES[::-1] + MERGES)) + b"\n")
    return str(path)


@pytest.fixture(params=["helpdesk", "tiny"])
def enc(request, tmp_path):
    return load_tokenizer("helpdesk" if request.param == "helpdesk" else tiny_rank_file(tmp_path))


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Strings of any characters that UTF-8 can encode, with many blanks and control characters."""
    rng = random.Random(seed)
    ranges = [
        (0, 0x80),
        (0x80, 0x800),
        (0x800, 0xD800),
        (0xE000, 0x10000),
        (0x10000, 0x110000),
        (9, 14),
        (32, 33),
    ]
    return [
        "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))
        for _ in range(count)
    ]


def test_any_text_round_trips_and_gives_ordinary_ids_only(enc):
    """Fails if a byte has no token, or if "<|endoftext|>" in a text becomes EOS."""
    tricky = [
        "",
        "\n\n\n",
        "a" * 999,
        "é",
        "e\u0301",
        "\ufeff",
        "\x00\x1b[2J",
        EOS_TEXT,
        "日本語 👩‍👧",
        "don't",
    ]
    for text in tricky + random_texts(500):
        ids = enc.encode_ordinary(text)
        assert decode(enc, ids) == text
        assert all(0 <= i < enc.eot_token for i in ids)


def test_eos_is_a_class_and_pad_is_not(enc):
    """If PAD equaled EOS, masking PAD would mask EOS, and the policy would never learn to stop."""
    ordinary = len(enc.token_byte_values())
    assert enc.eot_token == ordinary
    assert enc.special_tokens_set == {EOS_TEXT}
    assert enc.n_vocab == ordinary + 1
    assert pad_id(enc) == ordinary + 1
    assert table_rows(enc) % 64 == 0 and pad_id(enc) < table_rows(enc) <= pad_id(enc) + 64


def test_pad_has_a_row_if_the_number_of_classes_is_a_multiple_of_64(tmp_path):
    """320 classes are a multiple of 64, but a table of 320 rows has no row for PAD."""
    path = tmp_path / "full.tiktoken"
    path.write_bytes(b"\n".join(rank_lines(BYTES + [b"a%d" % i for i in range(63)])))
    enc = load_tokenizer(str(path))
    assert enc.n_vocab == pad_id(enc) == 320 and table_rows(enc) == 384


def test_decode_drops_eos_and_pad_and_replaces_incomplete_characters(enc):
    ids = enc.encode_ordinary("hello")
    assert decode(enc, [*ids, enc.eot_token, pad_id(enc), pad_id(enc)]) == "hello"
    assert decode(enc, [enc.encode_single_token(b"\xf0")]) == "\ufffd"


def test_the_shipped_ranks_are_the_default():
    enc = load_tokenizer()
    assert enc.name == "helpdesk" and fingerprint(enc) == fingerprint(
        load_tokenizer(str(HELPDESK_RANKS))
    )
    text = "My red kettle arrived broken. Can I get a refund?"
    assert len(enc.encode_ordinary(text)) < len(text) / 2


def test_fingerprints_of_different_tokenizers_differ(tmp_path):
    """A checkpoint would load with other ranks of the same number, and generate nonsense."""
    tiny = load_tokenizer(tiny_rank_file(tmp_path))
    other = tmp_path / "other.tiktoken"
    other.write_bytes(b"\n".join(rank_lines(BYTES + MERGES)))
    assert tiny.n_vocab == load_tokenizer(str(other)).n_vocab
    encodings = [tiny, load_tokenizer(str(other)), load_tokenizer()]
    assert len({fingerprint(encoding) for encoding in encodings}) == 3
    ranks = tiny._mergeable_ranks
    eos = {EOS_TEXT: tiny.eot_token}
    renamed = tiktoken.Encoding(
        "renamed", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=eos
    )
    resplit = tiktoken.Encoding(
        "tiny", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=eos
    )
    assert fingerprint(renamed) == fingerprint(tiny) != fingerprint(resplit)


def test_gaps_and_other_special_tokens_of_a_published_encoding_are_removed(monkeypatch):
    """p50k_base has a gap at its EOS, so a table of len(ranks) rows would be too small."""
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 300, b"the": 301}
    with_gaps = tiktoken.Encoding(
        "p50k_base",
        pat_str=r"\S+|\s+",
        mergeable_ranks=ranks,
        special_tokens={EOS_TEXT: 256, "<|fim|>": 400},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: with_gaps)
    enc = load_tokenizer("p50k_base")
    assert enc.encode_ordinary("the") == [257] and enc.encode_ordinary("th") == [256]
    assert enc.eot_token == 258 and enc.n_vocab == 259 and enc.special_tokens_set == {EOS_TEXT}
    assert decode(enc, enc.encode_ordinary("<|fim|>")) == "<|fim|>"


def test_error_for_an_unknown_name_suggests_the_closest():
    with pytest.raises(
        UserError, match=r"'gtp2' is neither a .tiktoken file nor known; did you mean gpt2\?"
    ):
        load_tokenizer("gtp2")
    with pytest.raises(
        UserError, match=r"'helpdsk' is neither a .tiktoken file nor known; did you mean helpdesk\?"
    ):
        load_tokenizer("helpdsk")


@pytest.mark.parametrize(
    "error", [ConnectionError("unreachable\nhost"), ValueError("Hash mismatch")]
)
def test_failed_download_is_one_line(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError, match="cannot be downloaded.*TIKTOKEN_CACHE_DIR") as caught:
        load_tokenizer("gpt2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "no token for 256 of the 256 bytes"),
        ([b"\x00\xff\xfe"], ":1: is not a new token as 'BASE64 0'"),
        ([*rank_lines(BYTES), b""], ":257: is not"),
        ([*rank_lines(BYTES), b"dGg= 256 extra"], ":257: is not"),
        ([*rank_lines(BYTES), b"dGg= two"], ":257: is not"),
        ([*rank_lines(BYTES), b"dGg= " + b"9" * 5000], ":257: is not"),
        ([*rank_lines(BYTES), b"d_g= 256"], ":257: is not"),
        ([*rank_lines(BYTES), b"==== 256"], ":257: is not"),
        ([*rank_lines(BYTES), b"dGg= 257"], ":257: is not a new token as 'BASE64 256'"),
        ([*rank_lines(BYTES), b"dGg= -1"], ":257: is not a new token as 'BASE64 256'"),
        ([*rank_lines(BYTES), b"YQ== 256"], ":257: is not a new token"),
        (
            rank_lines(BYTES[:97] + BYTES[98:] + [b"th"]),
            "no token for 1 of the 256 bytes .the first is 0x61",
        ),
    ],
)
def test_malformed_rank_file_names_the_line(tmp_path, lines, message):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(b"\n".join(lines) + b"\n" if lines else b"")
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_rank_file_and_directory_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_tokenizer(str(tmp_path / "absent.tiktoken"))
    (tmp_path / "folder.tiktoken").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(str(tmp_path / "folder.tiktoken"))


def test_mutated_rank_files_load_or_are_refused(tmp_path):
    """No rank file may cause a traceback, or tiktoken's crash on a byte without a token."""
    good = open(tiny_rank_file(tmp_path), "rb").read()
    path = tmp_path / "mutant.tiktoken"
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        content = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(content))
            content[start : start + rng.randrange(12)] = rng.randbytes(rng.randrange(4))
        path.write_bytes(content)
        try:
            enc = load_tokenizer(str(path))
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            refused += 1
        else:
            assert decode(enc, enc.encode_ordinary("thé \x00")) == "thé \x00"
    assert refused > 150
