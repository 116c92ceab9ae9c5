"""The BPE trainer: equal to a naive one, consistent with tiktoken, one token per word."""

import base64
import gzip
import json
import random

from minirlhf.data.helpdesk import PHRASES
from minirlhf.data.tokenizer import GPT2_PATTERN, HELPDESK_RANKS, load_tokenizer
from minirlhf.tools.bpe import main, merge, read_texts, train_ranks, write_ranks
from minirlhf.tools.helpdesk_data import SPLITS, prompts_of

import pytest
import regex
import tiktoken

CORPUS = [
    "the cat sat on the mat; the rat ate the fat cat",
    "aaaa aaa aa",
    "banana bandana",
    "été été, 日本 日本",
    "it's 2024",
]


def as_encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("test", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})


def read_ranks(path) -> dict[bytes, int]:
    return {
        base64.b64decode(token): int(rank)
        for token, rank in map(bytes.split, path.read_bytes().splitlines())
    }


def naive_ranks(texts: list[str], n_ranks: int) -> dict[bytes, int]:
    """Encode the whole corpus with tiktoken after every merge, and count all neighboring tokens."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < n_ranks:
        encoding = as_encoding(ranks)
        counts = {}
        for word in (word for text in texts for word in regex.findall(GPT2_PATTERN, text)):
            tokens = [encoding.decode_single_token_bytes(i) for i in encoding.encode_ordinary(word)]
            for a, b in zip(tokens, tokens[1:]):
                counts[a + b] = counts.get(a + b, 0) + 1
        if not counts:
            break
        ranks[min(counts, key=lambda join: (-counts[join], join))] = len(ranks)
    return ranks


def random_corpus(seed: int) -> list[str]:
    """Words of two letters: merges overlap, which incremental counts must handle."""
    rng = random.Random(seed)
    return [" ".join("".join(rng.choices("ab", k=rng.randrange(1, 12))) for _ in range(30))]


@pytest.mark.parametrize("texts", [CORPUS, *map(random_corpus, range(5))])
@pytest.mark.parametrize("n_ranks", [256, 257, 290, 2000])
def test_incremental_counts_equal_full_counts(texts, n_ranks):
    """A count that misses one word of a merge makes a later merge wrong."""
    assert train_ranks(texts, n_ranks, GPT2_PATTERN) == naive_ranks(texts, n_ranks)


@pytest.mark.parametrize("seed", range(5))
def test_merging_by_rank_equals_tiktoken(seed):
    """tiktoken looks up joined bytes. A trainer that looks up pairs would learn other merges."""
    ranks = train_ranks(CORPUS + random_corpus(seed), 330)
    encoding = as_encoding(ranks)
    for word in regex.findall(GPT2_PATTERN, " ".join(CORPUS + random_corpus(seed + 100))):
        merged = merge([bytes([byte]) for byte in word.encode()], ranks)
        assert [ranks[token] for token in merged] == encoding.encode_ordinary(word)


def test_bytes_come_first_and_ties_go_to_the_first_in_byte_order():
    """If the order of a set decided ties, each build would give another vocabulary."""
    ranks = train_ranks(["yx ba yx ba"], 300)
    assert list(ranks.values()) == list(range(len(ranks)))
    assert list(ranks)[:256] == [bytes([byte]) for byte in range(256)]
    # the first three occur twice, the last once; then no pair is left
    assert list(ranks)[256:] == [b" b", b" ba", b"yx", b" yx"]
    assert train_ranks([], 300) == train_ranks(["a b c"], 256)
    with pytest.raises(ValueError, match="255"):
        train_ranks([], 255)


def test_shipped_vocabulary_has_a_token_for_every_word_of_the_task():
    """A word of several tokens would make responses longer."""
    encoding = load_tokenizer("helpdesk")
    prompts = [
        prompt
        for contexts in SPLITS.values()
        for context in contexts
        for prompt in prompts_of(context)
    ]
    responses = [
        f" {phrase}"
        for topics in PHRASES.values()
        for phrases in topics.values()
        for phrase in phrases
    ]
    words = {word for text in prompts + responses for word in regex.findall(GPT2_PATTERN, text)}
    assert len(words) > 150
    assert {word for word in words if len(encoding.encode_ordinary(word)) > 1} == set()


def test_rank_file_has_tiktokens_format(tmp_path):
    ranks = train_ranks(CORPUS, 300)
    write_ranks(tmp_path / "tiny.tiktoken", dict(reversed(ranks.items())))
    assert read_ranks(tmp_path / "tiny.tiktoken") == ranks
    encoding = load_tokenizer(str(tmp_path / "tiny.tiktoken"))
    for text in CORPUS + ["\x00\r\n\t", "Ωmega 👩‍👧", ""]:
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert HELPDESK_RANKS.read_bytes().endswith(b"\n") and b"\r" not in HELPDESK_RANKS.read_bytes()


def test_command_reads_text_and_every_string_of_preference_files(tmp_path, capsys):
    records = [
        {"prompt": "zebra", "responses": [" zebra zebra", " quagga"], "preferences": [[0, 1]]}
    ] * 2
    (tmp_path / "plain.txt").write_text("zebra okapi okapi", encoding="utf-8")
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
    with gzip.open(tmp_path / "records.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, records)) + "\n\n")
    out = tmp_path / "out.tiktoken"
    files = [str(tmp_path / name) for name in ("plain.txt", "records.json", "records.jsonl.gz")]
    main([str(out), *files, "--size", "300"])
    texts = ["zebra okapi okapi"] + ["zebra", " zebra zebra", " quagga"] * 4
    assert read_ranks(out) == train_ranks(texts, 300)
    assert capsys.readouterr().out.startswith(f"{len(train_ranks(texts, 300))} ranks in ")


def test_files_are_read_by_the_rules_of_training(tmp_path):
    """A byte order mark, JSON lines in .json, an array in .jsonl, and .gz by its content."""
    lines = b'\xef\xbb\xbf{"prompt": "zebra"}\r\n\r\n{"prompt": "okapi"}\n'
    contents = {
        "lines.json": lines,
        "array.jsonl": b'[{"prompt": "zebra"}, {"prompt": ["okapi"]}]',
        "packed.jsonl": gzip.compress(lines),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert list(read_texts(tmp_path / name)) == ["zebra", "okapi"]
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfzebra")
    assert list(read_texts(tmp_path / "mark.txt")) == ["zebra"]


BAD_FILES = {
    "surrogate.jsonl": b'{"a": "\\ud800"}',
    "deep.jsonl": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "text.jsonl": b'"text"',
    "missing.txt": None,
    "bad.json": b"{",
    "bad.jsonl.gz": b"no gzip",
    "latin.txt": b"\xe9",
}


@pytest.mark.parametrize("name, content", BAD_FILES.items())
def test_command_stops_with_one_line_and_writes_nothing(tmp_path, capsys, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "out"), str(tmp_path / name)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and name in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "out, flags, message",
    [
        ("folder", [], "folder: is a folder; name a file in it"),
        ("folder", ["--force"], "folder: is a folder; name a file in it"),
        ("absent/ranks", [], "absent/ranks: No such file or directory"),
    ],
)
def test_a_rank_file_that_cannot_be_written_is_named(tmp_path, capsys, out, flags, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(SystemExit):
        main([str(tmp_path / out), str(tmp_path / "a.txt"), *flags])
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "folder"]


def test_more_ranks_than_the_texts_have_pairs_are_reported(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc abc")
    main([str(tmp_path / "out"), str(tmp_path / "a.txt"), "--size", str(10**22)])
    assert capsys.readouterr().out.endswith("out; the texts have no more pairs to join\n")


def test_a_size_below_256_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "out"), str(tmp_path / "a.txt"), "--size", "255"])
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith(
        "error: --size 255 is below 256"
    )
    assert not (tmp_path / "out").exists()
