"""Tokenizers and chat templates, compared with tokenizers, transformers and TRL.

A test is skipped if its library is missing. Folders of real models are compared if the variable
MINIRLHF_TOKENIZERS names them, separated by colons; MINIRLHF_STRINGS is the number of strings.
"""

import os
import random
import unicodedata
from importlib.util import find_spec
from pathlib import Path

from minirlhf.data.chat_templates import read_chat_template
from minirlhf.data.pretrained_tokenizer import read_json, read_pretrained_tokenizer
from minirlhf.data.prompts import encode_prompt, without_marks

import pytest
from test_pretrained_tokenizer import SMOLLM2, SPLIT, tokenizer_json, write

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the libraries are imported
FOLDERS = [name for name in os.environ.get("MINIRLHF_TOKENIZERS", "").split(os.pathsep) if name]
COUNT = int(os.environ.get("MINIRLHF_STRINGS", "2000"))
RANGES = [
    (0, 0x80),
    (0x80, 0x800),
    (0x800, 0xD800),
    (0xE000, 0x10000),
    (0x10000, 0x30000),
    (0x1F300, 0x1FAFF),
    (0x4E00, 0x9FFF),
    (9, 14),
    (32, 33),
    (48, 58),
    (0x300, 0x370),
]
WORDS = [
    *["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|eot_id|>", "hello", " world", "don't"],
    *[
        "DON'T",
        "'s",
        "I'LL",
        "我们",
        "学习",
        "😀👩‍👧",
        "123",
        "3.14",
        "  ",
        "\n\n",
        "e\u0301",
        "\r\n",
    ],
    *["½", "²", "٣", "Ⅷ", " <", "ſ", "'ſ", "a", "1", "!", "the", " the"],
]
BLANKS = " \t\n\r\x0b\x0c\xa0\u2003\u2028\u3000\x85"
CODE = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("t*.py"))


def random_string(rng: random.Random, kind: int) -> str:
    """Random characters, code, words with special tokens, blanks, numbers, or combining marks."""
    length = rng.randrange(40)
    start = rng.randrange(len(CODE) - 300)
    if kind == 0:
        return "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(length))
    if kind == 1:
        return CODE[start : start + 7 * length]
    if kind == 2:
        marks = ["", "", "\u0301", "\u0323"]
        return "".join(c + rng.choice(marks) for c in CODE[start : start + length])
    alphabet = [WORDS, [*BLANKS, *WORDS], "0123456789 .,-a\n"][kind - 3]
    return "".join(rng.choice(alphabet) for _ in range(length))


def random_strings(count: int) -> list[str]:
    rng = random.Random(0)
    return [random_string(rng, number % 6) for number in range(count)]


def check_equal_ids(folder: Path) -> None:
    """Special tokens are read as text by both.

    Without the characters that the file lacks, and without strings whose NFC differs, because
    Python has a newer version of Unicode.
    """
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    ours = read_pretrained_tokenizer(folder)
    lacking = {chr(byte) for byte in range(128) if not ours.encode_ordinary(chr(byte))}
    drop = str.maketrans(dict.fromkeys(map(ord, lacking)))
    strings = [text.translate(drop) for text in random_strings(COUNT)]
    if theirs.normalizer:
        nfc = theirs.normalizer.normalize_str
        strings = [text for text in strings if nfc(text) == unicodedata.normalize("NFC", text)]
        assert len(strings) > 0.99 * COUNT
    encoded = theirs.encode_batch(strings, add_special_tokens=False)
    for text, expected in zip(strings, encoded):
        assert ours.encode_ordinary(text) == expected.ids, repr(text)
        assert ours.decode(expected.ids) in (text, unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("normalizer", [None, "NFC"])
@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("pre_tokenizer", [SMOLLM2, SMOLLM2["pretokenizers"][1], SPLIT])
def test_a_small_tokenizer_gives_equal_ids(tmp_path, pre_tokenizer, ignore_merges, normalizer):
    file = tokenizer_json(pre_tokenizer=pre_tokenizer, ignore_merges=ignore_merges)
    file["normalizer"] = normalizer and {"type": normalizer}
    file["model"]["vocab"]["hello"] = 300
    check_equal_ids(write(tmp_path, file))


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_tokenizer_of_a_folder_gives_equal_ids(folder):
    check_equal_ids(Path(folder))


CONVERSATIONS = [
    [("user", " Hi \n")],
    [("system", " Be kind. "), ("user", "Hi")],
    [("user", "Hi"), ("assistant", " Hello\n"), ("user", "Tea?")],
    [("system", "S"), ("user", "a"), ("assistant", "<think>\nx\n</think>\n\nb"), ("user", "c")],
]
ANSWER = "Yes, please "
# the date would be today's, and Qwen3 would write a chain of thought
OPTIONS = dict(date_string="26 Jul 2024", enable_thinking=False)


def as_messages(turns: list) -> list[dict]:
    return [dict(role=role, content=text) for role, text in turns]


@pytest.mark.parametrize("name", ["llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3"])
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_templates_equal_the_models_own(tmp_path, name, turns):
    """TRL contains them as files."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    spec = find_spec("trl")
    if not spec:
        pytest.skip("TRL is not installed")
    source = Path(spec.origin).parent / "chat_templates" / f"{name}.jinja"
    source = source.read_text(encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    template = read_chat_template(str(tmp_path))

    def theirs(turns, **options):
        conversations = [as_messages(turns)]
        options |= OPTIONS | dict(bos_token="<|begin_of_text|>", chat_template=source)
        return utils.render_jinja_template(conversations, **options)[0][0]

    prompt = template.prompt(turns)
    assert without_marks(prompt) == theirs(turns, add_generation_prompt=True)
    answer = [("assistant", ANSWER)]
    complete = prompt + template.response(answer) + template.closing
    assert without_marks(complete) == theirs(turns + answer)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_the_ids_of_a_prompt_equal_those_of_transformers(folder, turns):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json", bos_token="<|begin_of_text|>"
    )
    tokenizer.chat_template = read_json(Path(folder) / "tokenizer_config.json")["chat_template"]
    expected = tokenizer.apply_chat_template(
        as_messages(turns), add_generation_prompt=True, return_dict=False, **OPTIONS
    )
    prompt = read_chat_template(folder).prompt(turns)
    ids, was_cut = encode_prompt(read_pretrained_tokenizer(folder), prompt, 10_000)
    assert list(ids) == expected and not was_cut
