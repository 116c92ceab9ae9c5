"""Preference data: every shape is read, every mistake is reported, every cut is counted."""

import base64
import dataclasses
import gzip
import io
import json
import random
import re
from collections import Counter
from pathlib import Path

from minirlhf.config import RewardConfig
from minirlhf.data import batches, json_files, preference_files
from minirlhf.data.batches import (
    PreferenceGroup,
    collate_preferences,
    describe_counts,
    encode_preferences,
    epoch_batches,
    pad_left,
    pad_right,
)
from minirlhf.data.chat_templates import CHATML
from minirlhf.data.preference_files import (
    PreferencePair,
    read_preferences,
    read_prompts,
    read_records,
)
from minirlhf.data.prompts import Prompts, encode_prompt, encode_prompts, unique_prompts
from minirlhf.data.splits import load_splits, split_holdout
from minirlhf.data.tokenizer import CHUNK, decode, load_tokenizer, pad_id
from minirlhf.run.errors import UserError

import pytest
import torch


def byte_tokenizer(folder):
    """256 bytes and two merges: "th" has id 256, " th" has id 257, EOS 258, PAD 259."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b" th"]
    path = Path(folder) / "bytes.tiktoken"
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    )
    return load_tokenizer(str(path))


@pytest.fixture(scope="module")
def enc(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("ranks"))


# ---- shapes --------------------------------------------------------------------------------------


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TWO_TURNS = [user("Hi"), assistant("Hello"), user("Tea?")]
PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant:"
RECORDS = {
    "strings": {"prompt": PROMPT, "chosen": " Yes, please", "rejected": " No"},
    "messages": {
        "prompt": TWO_TURNS,
        "chosen": [assistant("Yes, please")],
        "rejected": [assistant("No")],
    },
    "messages, prompt inside": {
        "chosen": [*TWO_TURNS, assistant("Yes, please")],
        "rejected": [*TWO_TURNS, assistant("No")],
    },
    "messages, prompt repeated": {
        "prompt": TWO_TURNS,
        "chosen": [*TWO_TURNS, assistant("Yes, please")],
        "rejected": [*TWO_TURNS, assistant("No")],
    },
    "transcripts": {"chosen": PROMPT + " Yes, please", "rejected": PROMPT + " No"},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"},
            {"from": "human", "value": "Tea?"},
        ],
        "chosen": {"from": "gpt", "value": "Yes, please"},
        "rejected": {"from": "gpt", "value": "No"},
    },
    "ranked": {"prompt": PROMPT, "responses": [" No", " Yes, please"], "preferences": [[1, 0]]},
}
QUESTION = "\n\nHuman: Tea?\n\nAssistant:"
INSTRUCTION_RECORDS = {
    "HelpSteer2": {
        "prompt": "Tea?",
        "response_1": "No",
        "response_2": "Yes, please",
        "preference_strength": 1,
    },
    "HelpSteer3": {
        "context": [user("Tea?")],
        "response1": "Yes, please",
        "response2": "No",
        "overall_preference": -1,
    },
    "PKU-SafeRLHF": {
        "prompt": "Tea?",
        "response_0": "No",
        "response_1": "Yes, please",
        "better_response_id": 1,
        "safer_response_id": 0,
    },
    "instruction": {"instruction": "Tea?", "input": "", "chosen": "Yes, please", "rejected": "No"},
    "question": {"system": "", "question": "Tea?", "chosen": "Yes, please", "rejected": "No"},
    "single messages": {
        "messages": [user("Tea?")],
        "chosen": assistant("Yes, please"),
        "rejected": assistant("No"),
    },
    "ranked messages": {
        "prompt": [user("Tea?")],
        "responses": ["No", "Yes, please"],
        "preferences": [[1, 0]],
    },
}
CONTAINERS = ["lines.jsonl", "lines.jsonl.gz", "array.json", "array.json.gz", "indented.json"]


def write(path: Path, records: list, container: str = "lines.jsonl") -> str:
    path = path / container
    if container.startswith("lines"):
        text = "\n".join(json.dumps(record) for record in records) + "\n"
    else:
        text = json.dumps(
            records, indent=2 if container.startswith("indented") else None, ensure_ascii=False
        )
    path.write_bytes(gzip.compress(text.encode()) if container.endswith(".gz") else text.encode())
    return str(path)


def write_raw(path: Path, content: bytes | str, name: str = "raw.jsonl") -> str:
    (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path / name)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("shape", RECORDS)
def test_every_shape_in_every_container_gives_the_same_pair(tmp_path, shape, container):
    path = write(tmp_path, [RECORDS[shape], RECORDS[shape]], container)
    pair = PreferencePair(PROMPT, " Yes, please", " No", None, 1.0)
    assert read_preferences(path) == [pair, pair]
    assert read_prompts(path) == [PROMPT]


@pytest.mark.parametrize("shape", RECORDS)
def test_margin_and_weight_are_read_from_every_shape(tmp_path, shape):
    records = [
        RECORDS[shape] | {"margin": 0.5, "weight": 2},
        RECORDS[shape] | {"margin": None, "weight": None},
    ]
    assert [pair[3:] for pair in read_preferences(write(tmp_path, records))] == [
        (0.5, 2.0),
        (None, 1.0),
    ]


@pytest.mark.parametrize("shape", INSTRUCTION_RECORDS)
def test_formats_of_questions_and_answers_become_messages(tmp_path, shape):
    """Question and answer have no blank between them: as plain texts they would run together."""
    path = write(tmp_path, [INSTRUCTION_RECORDS[shape]])
    assert read_preferences(path) == [(QUESTION, " Yes, please", " No", None, 1.0)]
    assert read_prompts(path) == [QUESTION]
    chat = read_preferences(path, template=CHATML)
    opening = "\0<|im_start|>\0"
    prompt = f"{opening}user\nTea?\0<|im_end|>\0\n{opening}assistant\n"
    assert chat == [(prompt, "Yes, please", "No", None, 1.0)]


def test_strength_is_a_weight_and_a_tie_is_both_orders(tmp_path):
    record = INSTRUCTION_RECORDS["HelpSteer2"]
    records = [record | {"preference_strength": strength} for strength in (-3, 0, 2)]
    assert [pair[1:] for pair in read_preferences(write(tmp_path, records))] == [
        (" No", " Yes, please", None, 3.0),
        (" No", " Yes, please", None, 0.5),
        (" Yes, please", " No", None, 0.5),
        (" Yes, please", " No", None, 2.0),
    ]
    for value in (4, -4, 1.5, True, None, "1"):
        with pytest.raises(UserError, match='"preference_strength" must be -3 to 3'):
            read_preferences(write(tmp_path, [record | {"preference_strength": value}]))
    for value in (2, -1, None):
        safe = INSTRUCTION_RECORDS["PKU-SafeRLHF"] | {"better_response_id": value}
        with pytest.raises(UserError, match='"better_response_id" must be 0 or 1'):
            read_preferences(write(tmp_path, [safe]))


def test_the_turns_of_helpsteers_prompts_become_messages(tmp_path):
    prompt = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nTea?"
    record = INSTRUCTION_RECORDS["HelpSteer2"] | {"prompt": prompt}
    assert read_prompts(write(tmp_path, [record])) == [PROMPT]


def test_system_and_input_become_part_of_the_prompt(tmp_path):
    question = INSTRUCTION_RECORDS["question"] | {"system": "Be kind."}
    instruction = INSTRUCTION_RECORDS["instruction"] | {"input": "Green."}
    prompts = []
    for record in (
        question,
        instruction,
        {"system": "Be kind.", "prompt": "Tea?", "chosen": "a", "rejected": "b"},
        {"system": "Be kind.", "prompt": QUESTION, "chosen": "a", "rejected": "b"},
        {"system": "Be kind.", "prompt": "Tea?"},
        {"system_prompt": "Be kind.", "prompt": [user("Tea?")]},
        {"system_message": "Be kind.", "system": None, "prompt": "Tea?"},
    ):
        prompts += read_prompts(write(tmp_path, [record]))
    system = "\n\nSystem: Be kind."
    assert prompts == [
        system + QUESTION,
        "\n\nHuman: Tea?\nGreen.\n\nAssistant:",
        "Be kind.\n\nTea?",
        system + QUESTION,
        "Be kind.\n\nTea?",
        system + QUESTION,
        "Be kind.\n\nTea?",
    ]


@pytest.mark.parametrize("key", preference_files.UNSUPPORTED)
def test_a_key_that_changes_the_prompt_is_refused_by_its_name(tmp_path, key):
    for record in (
        RECORDS["strings"] | {key: [["a", "b"]]},
        {"prompt": "p", key: "x"},
        {"chosen": [user("p"), assistant("a") | {key: [1]}], "rejected": []},
    ):
        with pytest.raises(UserError, match=f'lines.jsonl:1: "{key}" would change the prompt'):
            (read_prompts if len(record) == 2 and "prompt" in record else read_preferences)(
                write(tmp_path, [record])
            )
    assert read_preferences(write(tmp_path, [RECORDS["strings"] | {key: []}]))


@pytest.mark.parametrize("shape", ["ranking", "pair", "label"])
def test_a_record_with_two_judgments_is_refused(tmp_path, shape):
    """Which one the annotator meant cannot be known."""
    pair = {"chosen": "a", "rejected": "b"}
    ranking = {"responses": ["b", "a"], "preferences": [[0, 1]]}
    label = {"response_1": "b", "response_2": "a", "preference_strength": -1}
    record = {"prompt": "p"} | dict(
        ranking=pair | ranking, pair=pair | label, label=ranking | label
    )[shape]
    for read in (read_preferences, read_prompts):
        with pytest.raises(UserError, match='lines.jsonl:1: "(chosen|preference_strength)" would'):
            read(write(tmp_path, [record]))


def test_a_system_message_in_two_places_is_there_once(tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, user("Tea?")]
    path = write(tmp_path, [{"system": "Be kind.", "prompt": messages}])
    assert read_prompts(path) == ["\n\nSystem: Be kind." + QUESTION]
    system = {"system": "Be kind.", "system_prompt": "Be kind."}
    for text in ("\n\nSystem: Be kind." + QUESTION, "Be kind.\n\nTea?"):
        assert read_prompts(write(tmp_path, [system | {"prompt": text}])) == [text]
    other = write(tmp_path, [{"system": "Be brief.", "prompt": messages}])  # both are kept
    assert read_prompts(other) == ["\n\nSystem: Be brief.\n\nSystem: Be kind." + QUESTION]


def test_a_second_prompt_is_refused_by_its_name_unless_it_repeats_the_first(tmp_path):
    """Which of the two was the annotator's prompt cannot be known."""
    responses = {"chosen": "a", "rejected": "b"}
    for first, second in (
        ("prompt", "input"),
        ("prompt", "context"),
        ("prompt", "instruction"),
        ("question", "context"),
        ("instruction", "context"),
    ):
        record = {first: "Tea?", second: "Green."} | responses
        key = "instruction" if second == "prompt" else second
        with pytest.raises(UserError, match=f'lines.jsonl:1: "{key}" would change the prompt'):
            read_preferences(write(tmp_path, [record]))
        for same in ("Tea?", "", None):
            assert read_preferences(write(tmp_path, [record | {second: same}]))
    with pytest.raises(UserError, match='"input" would change'):  # of two transcripts
        read_preferences(write(tmp_path, [RECORDS["transcripts"] | {"input": "Green."}]))
    chat = {"prompt": "Tea?", "messages": [user("Tea?"), assistant("a")]} | responses
    assert read_preferences(write(tmp_path, [chat]))  # UltraFeedback's


@pytest.mark.parametrize("template", [preference_files.DIALOGUE, CHATML])
def test_the_opening_of_the_response_is_there_once(tmp_path, template):
    """With and without "Assistant:" at the end of the prompt or in front of the responses."""
    expected = read_preferences(write(tmp_path, [RECORDS["strings"]]), template=template)
    whole = {side: PROMPT + RECORDS["strings"][side] for side in ("chosen", "rejected")}
    for record in (
        RECORDS["strings"] | {"prompt": PROMPT.removesuffix("\n\nAssistant:")},
        RECORDS["strings"] | {"chosen": "\n\nAssistant: Yes, please", "rejected": "Assistant: No"},
        RECORDS["strings"] | {"chosen": "Assistant: Yes, please"},
        RECORDS["strings"] | {"prompt": PROMPT.removesuffix("\n\nAssistant:")} | whole,
        RECORDS["strings"] | {"chosen": whole["chosen"]},
    ):
        path = write(tmp_path, [record])
        assert read_preferences(path, template=template) == expected
        assert read_prompts(path, template=template) == [expected[0].prompt]
    alone = write(tmp_path, [{"prompt": PROMPT.removesuffix("\n\nAssistant:")}])
    assert read_prompts(alone, template=template) == [expected[0].prompt]
    blank = {"prompt": "Q: Tea?\nA: ", "chosen": "A: Yes", "rejected": "No"}
    assert read_preferences(write(tmp_path, [blank]))[0].chosen == " Yes"
    other = {"prompt": "Q: Tea?\nA:", "chosen": "A: Yes", "rejected": " A: No"}
    pairs = read_preferences(write(tmp_path, [other]))
    assert pairs == [("Q: Tea?\nA:", " Yes", " No", None, 1.0)]


def test_a_text_that_starts_with_a_blank_becomes_a_message_with_one_blank(tmp_path):
    record = {"question": "Tea?", "chosen": " Yes", "rejected": "No"}
    assert read_preferences(write(tmp_path, [record])) == [(QUESTION, " Yes", " No", None, 1.0)]


def test_a_prompt_that_ends_with_the_assistant_is_refused(tmp_path):
    """Its rendering would contain "Assistant:" twice."""
    ends = [user("Tea?"), assistant("Yes")]
    records = [
        {"prompt": ends},
        {"messages": ends},
        {"prompt": ends, "chosen": [assistant("a")], "rejected": [assistant("b")]},
    ]
    for record in records:
        with pytest.raises(UserError, match="the prompt ends with a message of the assistant"):
            read_prompts(write(tmp_path, [record]))


def test_a_prompt_repeated_in_the_responses_is_removed_from_texts_too(tmp_path):
    record = {"prompt": "Tea?", "chosen": "Tea? Yes", "rejected": "Tea? No"}
    assert read_preferences(write(tmp_path, [record])) == [("Tea?", " Yes", " No", None, 1.0)]
    one = record | {"rejected": "No"}  # only one side, a few words: it may be what was said
    assert read_preferences(write(tmp_path, [one])) == [("Tea?", "Tea? Yes", "No", None, 1.0)]
    long = {"prompt": "Is there any tea?", "chosen": "Is there any tea? Yes", "rejected": " No"}
    assert read_preferences(write(tmp_path, [long]))[0][1:3] == (" Yes", " No")


def test_ranked_record_gives_one_pair_for_each_preference_and_a_tie_both_orders(tmp_path):
    record = {
        "prompt": "P",
        "responses": ["a", "b", "c"],
        "preferences": [[2, 0], [0, 1], [1, 0]],
        "margin": [1, 0, 0],
        "weight": [1, 0.5, 0.5],
    }
    assert read_preferences(write(tmp_path, [record])) == [
        ("P", "c", "a", 1.0, 1.0),
        ("P", "a", "b", 0.0, 0.5),
        ("P", "b", "a", 0.0, 0.5),
    ]


def test_system_messages_and_plain_prompts_are_rendered_too(tmp_path):
    records = [
        {
            "prompt": [{"role": "system", "content": "Be kind."}, user("Hi")],
            "chosen": [assistant("Hello")],
            "rejected": [assistant("What?")],
        },
        {
            "prompt": "Hi",
            "chosen": [user("Hi"), assistant("Hello")],
            "rejected": [user("Hi"), assistant("What?")],
        },
    ]
    prompts = ["\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"]
    assert read_preferences(write(tmp_path, records)) == [
        (prompt, " Hello", " What?", None, 1.0) for prompt in prompts
    ]


def test_transcripts_that_differ_early_keep_all_later_turns(tmp_path):
    """A cut at the last turn of one side would give the two responses different prompts."""
    start = "\n\nHuman: Hi\n\nAssistant:"
    record = {
        "chosen": start + " A\n\nHuman: x\n\nAssistant: B",
        "rejected": start + " C\n\nHuman: x\n\nAssistant: D",
    }
    (pair,) = read_preferences(write(tmp_path, [record]))
    assert pair[:3] == (start, " A\n\nHuman: x\n\nAssistant: B", " C\n\nHuman: x\n\nAssistant: D")


def test_responses_with_the_same_first_words_stay_complete(tmp_path):
    """A prompt that ends at the last shared character would contain words of the responses."""
    start = "\n\nHuman: Hi\n\nAssistant:"
    record = {"chosen": start + " I am well", "rejected": start + " I am not"}
    assert read_preferences(write(tmp_path, [record]))[0][:3] == (start, " I am well", " I am not")


def test_no_character_of_a_text_changes(tmp_path):
    text = "\ufeff é\u0301 \u2028 \r\n\t👩‍👧 <|endoftext|> \\n \x1b[2J\x7f"
    record = {"prompt": text + "p", "chosen": text + "c", "rejected": text}
    for container in CONTAINERS:
        assert read_preferences(write(tmp_path, [record], container))[0][:3] == (
            text + "p",
            text + "c",
            text,
        )


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_accepted(tmp_path):
    line = json.dumps(RECORDS["strings"]).encode()
    path = write_raw(tmp_path, b"\xef\xbb\xbf\r\n" + line + b"\r\n\r\n  \r\n" + line)
    assert len(read_preferences(path)) == 2


def test_several_files_may_have_several_shapes(tmp_path):
    paths = []
    for number, record in enumerate(RECORDS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths.append(write(folder, [record]))
    pairs, n_bad = read_records(paths, skip_bad_lines=False)
    assert len(pairs) == len(RECORDS) and n_bad == 0


def test_prompts_alone(tmp_path):
    path = write(
        tmp_path, [{"prompt": "b"}, {"prompt": "a"}, {"prompt": [user("Hi")]}, {"prompt": "b"}]
    )
    assert read_prompts(path) == ["b", "a", "\n\nHuman: Hi\n\nAssistant:"]
    with pytest.raises(UserError, match='raw.jsonl:2: the key "prompt" is missing') as error:
        read_prompts(write_raw(tmp_path, '{"prompt": "a"}\n{"text": "b"}'))
    assert "--skip-bad-lines" not in str(error.value)  # train_policy.py has no such flag


@pytest.mark.parametrize("container", ["array.json", "indented.json"])
def test_arrays_larger_than_a_chunk_are_read_completely_and_in_order(
    tmp_path, monkeypatch, container
):
    """A record that continues in the next chunk must not be lost, repeated or called bad."""
    records = [
        {"prompt": f"{i} " + "x" * (i * 37 % 500), "chosen": '"]},[{', "rejected": "\\"}
        for i in range(200)
    ]
    path = write(tmp_path, records, container)
    for chunk in (1, 7, 64, 2**16):
        monkeypatch.setattr(json_files, "CHUNK", chunk)
        assert [pair.prompt for pair in read_preferences(path)] == [
            record["prompt"] for record in records
        ]


# ---- mistakes ------------------------------------------------------------------------------------

GOOD = json.dumps(RECORDS["strings"])
BAD_LINES = {
    "not json": (b'{"prompt": "p", "chosen": "c"', r"not strict JSON \(Expecting"),
    "not an object": (b'"text"', "the record is a string, not an object"),
    "a list, which on the first line would be an array": (
        b"[1, 2]",
        "the record is a list, not an object",
    ),
    "missing key": (b'{"prompt": "p", "chosen": "c"}', 'the key "rejected" is missing'),
    "wrong type": (
        b'{"prompt": "p", "chosen": "c", "rejected": 3}',
        '"rejected" is a whole number, but must be a string',
    ),
    "mixed shapes": (
        json.dumps(RECORDS["ranked"]).encode(),
        "contains prompt, responses as texts, the earlier ones prompt, chosen, rejected as texts;",
    ),
    "invalid utf-8": (
        b'{"prompt": "p\xff", "chosen": "c", "rejected": "r"}',
        '"prompt" is not valid UTF-8',
    ),
    "surrogate": (
        b'{"prompt": "p", "chosen": "\\ud800", "rejected": "r"}',
        '"chosen" is not valid UTF-8',
    ),
    "nul": (b'{"prompt": "p", "chosen": "a\\u0000", "rejected": "r"}', '"chosen" contains a NUL'),
    "raw nul": (b'{"prompt": "p\0", "chosen": "a", "rejected": "r"}', "not strict JSON"),
    "deep": (b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "key twice": (
        b'{"prompt": "p", "chosen": "c", "chosen": "d", "rejected": "r"}',
        "one key twice",
    ),
    "digits": (
        b'{"prompt": "p", "chosen": "c", "rejected": "r", "margin": ' + b"9" * 9999 + b"}",
        "not strict JSON .Exceeds",
    ),
    "too long": (
        b'{"prompt": "' + b"x" * 2**24 + b'", "chosen": "c", "rejected": "r"}',
        "longer than 16777216",
    ),
    **{
        f"margin {value}": (GOOD.replace("}", f', "margin": {value}}}').encode(), message)
        for value, message in [
            ("NaN", "not strict JSON .NaN is not a JSON number"),
            ("-Infinity", "-Infinity is not"),
            ("1e999", '"margin" must be'),
            ("1e300", '"margin" must be'),
            ("1" + "0" * 400, '"margin" must be'),
            ("true", '"margin" must be'),
            ('"1"', '"margin" must be'),
            ("[1, 2]", '"margin" must be'),
            ("{}", '"margin" must be'),
        ]
    },
    "weight": (
        GOOD.replace("}", ', "weight": -0.1}').encode(),
        r'"weight" must be 1e-06 to 1e\+06',
    ),
    "weight 0": (GOOD.replace("}", ', "weight": 0}').encode(), r'"weight" must be 1e-06 to 1e\+06'),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_is_reported_or_counted(tmp_path, kind):
    content, message = BAD_LINES[kind]
    path = write_raw(tmp_path, f"{GOOD}\n\n".encode() + content + f"\n{GOOD}\n".encode())
    with pytest.raises(UserError, match="raw.jsonl:3: .*" + message) as caught:
        read_preferences(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    pairs, n_bad = read_records([path], skip_bad_lines=True)
    assert len(pairs) == 2
    assert n_bad == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"preferences": [[0, 2]]}, "two of the 2 responses, counted from 0"),
        ({"preferences": [[-1, 0]]}, "two of the 2 responses"),
        ({"preferences": [[10**30, 0]]}, "two of the 2 responses"),
        ({"preferences": [[1, 1]]}, "two of the 2 responses"),
        ({"preferences": [[0, 1, 1]]}, "two of the 2 responses"),
        ({"preferences": [[True, False]]}, "two of the 2 responses"),
        ({"preferences": [[0.0, 1.0]]}, "two of the 2 responses"),
        ({"preferences": ["01"]}, "two of the 2 responses"),
        ({"preferences": []}, '"preferences" a list of'),
        ({"preferences": None}, '"preferences" a list of'),
        ({"responses": "ab"}, '"responses" must be a list'),
        ({"responses": ["a", None]}, '"responses" is null, but must be'),
        ({"margin": [1.0]}, "one per preference"),
    ],
)
def test_bad_ranking_is_reported(tmp_path, change, message):
    record = {"prompt": "p", "responses": ["a", "b"], "preferences": [[0, 1], [1, 0]]} | change
    with pytest.raises(UserError, match="lines.jsonl:1: .*" + message):
        read_preferences(write(tmp_path, [record]))


@pytest.mark.parametrize(
    "record, message",
    [
        ({"chosen": [assistant("a")], "rejected": "b"}, '"rejected" must be a list of messages'),
        ({"chosen": ["a"], "rejected": ["b"]}, '"chosen" must be a list of messages'),
        (
            {"prompt": 3, "chosen": [assistant("a")], "rejected": [assistant("b")]},
            '"prompt" must be a list of messages',
        ),
        (
            {"prompt": "p", "chosen": [user("a")], "rejected": [assistant("b")]},
            "must continue with a message of the assistant",
        ),
        (
            {"prompt": "p", "chosen": [], "rejected": [assistant("b")]},
            "must continue with a message of the assistant",
        ),
        (
            {"prompt": "p", "chosen": [assistant("a"), user("b")], "rejected": [assistant("b")]},
            "message of the assistant, and end with one",
        ),
        ({"chosen": [user("a")], "rejected": [user("a")]}, "share nothing up to a message of the"),
        (
            {"chosen": [{"role": "critic\n", "content": ""}], "rejected": []},
            r"has the role 'critic\\n'; use one of",
        ),
        ({"chosen": [{"role": ["user"], "content": ""}], "rejected": []}, "has the role"),
        (
            {"chosen": [{"role": "user", "content": [{"text": "a"}]}], "rejected": []},
            "is a list, but must be a string",
        ),
        ({"chosen": [{"role": "user"}], "rejected": []}, "is null, but must be a string"),
        (
            {"conversations": [], "chosen": "a", "rejected": "b"},
            "share nothing up to a message of the assistant",
        ),
        (
            {"conversations": 3, "chosen": assistant("a"), "rejected": assistant("b")},
            '"conversations" must be a list of messages',
        ),
        (
            {"promt\n": "Hi", "chosen": "a", "rejected": "b"},
            r"the key .prompt. is missing, found .'promt\\n', 'chosen', 'rejected'.; "
            "see data/README.md#formats",
        ),
        ({"data": [RECORDS["strings"]]}, "the key .chosen. is missing, found .'data'.; see data"),
        (
            {"chosen": "a\n\nAssistant: b", "rejected": "c\n\nAssistant: b"},
            'share nothing up to an "Assistant:"',
        ),
    ],
)
def test_bad_conversation_is_reported(tmp_path, record, message):
    with pytest.raises(UserError, match="lines.jsonl:1: .*" + message) as caught:
        read_preferences(write(tmp_path, [record]))
    assert "\n" not in str(caught.value)


def test_missing_file_directory_and_files_without_records(tmp_path):
    with pytest.raises(UserError, match="absent.jsonl: cannot be read .No such file"):
        read_preferences(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        read_preferences(str(tmp_path))
    for content in ("", "\n \n", "\ufeff"):
        with pytest.raises(UserError, match="raw.jsonl: contains no usable record; see"):
            read_preferences(write_raw(tmp_path, content))
    with pytest.raises(UserError, match="contains no usable record .2 bad ones"):
        read_preferences(write_raw(tmp_path, "a\nb\n"), skip_bad_lines=True)


def test_incomplete_gz_keeps_what_was_read_and_counts_the_rest_as_one(tmp_path):
    """Without --skip-bad-lines, half of a download must not be used as if it were complete."""
    rng = random.Random(0)
    records = [
        {"prompt": f"{rng.random()}", "chosen": f"{rng.random()}", "rejected": "r"}
        for _ in range(2000)
    ]
    complete = Path(write(tmp_path, records, "lines.jsonl.gz")).read_bytes()
    for content in (
        complete[: len(complete) // 2],
        complete[:-4],
        complete[:5000] + b"\0\0\0\0" + complete[5004:],
    ):
        path = write_raw(tmp_path, content, "incomplete.jsonl.gz")
        with pytest.raises(UserError, match=r"incomplete.jsonl.gz:\d+: "):
            read_preferences(path)
        pairs, n_bad = read_records([path], skip_bad_lines=True)
        assert n_bad >= 1 and 0 < len(pairs) <= 2000
        assert [pair.prompt for pair in pairs[:50]] == [record["prompt"] for record in records[:50]]


def test_the_content_and_not_the_name_says_whether_a_file_is_compressed(tmp_path):
    pairs = read_preferences(write_raw(tmp_path, GOOD))
    assert read_preferences(write_raw(tmp_path, GOOD, "plain.jsonl.gz")) == pairs
    assert (
        read_preferences(write_raw(tmp_path, gzip.compress(GOOD.encode()), "compressed.jsonl"))
        == pairs
    )


def test_a_limited_number_of_blank_lines_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_BLANK_LINES", 3)
    record = b'{"prompt": "a", "chosen": "x", "rejected": "y"}\n'
    path = tmp_path / "pairs.jsonl"
    path.write_bytes((b"\n" * 3 + record) * 2)
    assert len(read_preferences(str(path))) == 2
    path.write_bytes(b"\n" * 4 + record)
    with pytest.raises(UserError, match="more than 3 blank lines"):
        read_preferences(str(path))


@pytest.mark.parametrize("start, unit", [(b"", b"\n"), (b"", b" "), (b"", b"a"), (b"[", b"\n")])
def test_a_decompression_bomb_is_one_line_after_a_second(start, unit, tmp_path):
    """A quarter of a megabyte of compressed blank lines kept the reader busy for minutes."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(start)
        for _ in range(24):
            file.write(unit * 2**20)
    characters = 0

    class Counting(io.TextIOWrapper):
        def read(self, size):
            nonlocal characters
            characters += size
            return super().read(size)

        def readline(self, size):
            nonlocal characters
            line = super().readline(size)
            characters += len(line)
            return line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "TextIOWrapper", Counting)
        with pytest.raises(UserError, match="1000000 blank lines|longer than 16777216 characters"):
            read_preferences(path)
    assert characters < 18 * 2**20


@pytest.mark.parametrize(
    "content, words",
    [
        (b"PAR1\x15\x04", "a parquet file; convert it to JSON lines"),
        (b"\x28\xb5\x2f\xfd\x04", "compressed; decompress it with: zstd -d"),
        (b"\xfd7zXZ\0\0", "xz -d"),
        (b"BZh91AY&SY\0", "bzip2 -d"),
        (GOOD.encode("utf-16"), "UTF-16 or UTF-32 text; convert it to UTF-8"),
        (GOOD.encode("utf-32"), "UTF-16 or UTF-32 text; convert it to UTF-8"),
        (GOOD.encode("utf-16-le"), "UTF-32 text without a byte order mark; convert it"),
        (GOOD.encode("utf-16-be"), "UTF-32 text without a byte order mark; convert it"),
        (GOOD.encode("utf-32-be"), "UTF-32 text without a byte order mark; convert it"),
        (b"PK\3\4\x14\0\0\0", "a zip archive; unpack it with: unzip"),
        (gzip.compress(b"PK\3\4\x14\0\0\0", mtime=0), "a zip archive; unpack it with: unzip"),
        (gzip.compress(gzip.compress(GOOD.encode())), "compressed twice; decompress it with"),
        (b"\n<!DOCTYPE html>\n<html>", "HTML or XML, perhaps an error page; download the file"),
        (b"prompt,chosen,rejected\na,b,c\n", ":1: the record is not strict JSON"),
        (b'{\n  "prompt": "p",\n', "(char 2)); write one record per line"),
        (gzip.compress(b"\n" * 1_000_002, 1), ":1: after this line the file is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_a_format_that_is_not_read_is_named_with_what_to_do(content, words, tmp_path):
    """ "Not strict JSON" would not help a beginner who downloaded a data set in another format."""
    with pytest.raises(UserError, match=re.escape(words)) as error:
        read_preferences(write_raw(tmp_path, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.csv", "A.TSV.gz"])
def test_a_table_is_recognized_by_its_name(name):
    with pytest.raises(UserError, match=f"{name}: this is a table; convert it to JSON lines"):
        read_preferences(name, skip_bad_lines=True)


@pytest.mark.parametrize(
    "text, line, n_kept",
    [
        ("[\n{good},\n{bad},\n{good}]", 3, 2),
        ("[{good}\n{good}]", 1, 0),
        ("[\n\n{good},\n]", 4, 1),
        ("[{good},{good}\n{good}]", 1, 1),
        ("[{good},\n{good}", 2, 2),
        ("\n\n[{good},\n3, {good}]", 4, 2),
        ("[{good},,{good}]", 1, 1),
        ("[{good}] [", 1, 1),
        ("[]", 1, 0),
        ("[", 1, 0),
        ("[{indented}\n,\n{bad}]", 7, 1),
    ],
)
def test_error_in_an_array_names_the_line_of_the_record(tmp_path, text, line, n_kept):
    """An incomplete array whose last record is complete must not count as a complete file."""
    text = text.replace("{bad}", '{"prompt": "p"}').replace(
        "{indented}", json.dumps(RECORDS["strings"], indent=1)
    )
    path = write_raw(tmp_path, text.replace("{good}", GOOD), "raw.json")
    with pytest.raises(UserError, match=f"raw.json:{line}: "):
        read_preferences(path)
    if n_kept:
        pairs, n_bad = read_records([path], skip_bad_lines=True)
        assert (len(pairs), n_bad) == (n_kept, 1)


def test_skipping_stops_in_a_file_of_another_kind(tmp_path, monkeypatch):
    """Without a limit, another program's log of millions of lines would be read to its end."""
    monkeypatch.setattr(preference_files, "MAX_BAD_RECORDS", 10)
    path = write_raw(tmp_path, f"{GOOD}\n" * 9 + "{}\n" * 100)
    with pytest.raises(
        UserError, match='raw.jsonl:20: more records are bad than usable, the last because'
    ):
        read_records([path], skip_bad_lines=True)
    path = write_raw(tmp_path, f"{GOOD}\n" * 30 + "{}\n" * 30)
    assert read_records([path], skip_bad_lines=True)[1] == 30


def test_a_bad_first_line_does_not_decide_the_shape(tmp_path):
    pairs, n_bad = read_records(
        [write_raw(tmp_path, '{"text": "a"}\n' + f"{GOOD}\n" * 3)], skip_bad_lines=True
    )
    assert len(pairs) == 3 and n_bad == 1


# ---- prompts -------------------------------------------------------------------------------------


def pairs_of(prompts):
    return [PreferencePair(prompt, "c", "r") for prompt in prompts]


def test_no_prompt_is_both_trained_on_and_held_out():
    """A split by pairs would train on some pairs of a held-out prompt."""
    pairs = pairs_of([f"prompt {i % 50}" for i in range(200)])
    train, heldout = split_holdout(pairs, 0.1, seed=1)
    assert not set(unique_prompts(train)) & set(unique_prompts(heldout))
    assert len(unique_prompts(heldout)) == 5 and len(heldout) == 20 and len(train) == 180
    assert sorted(train + heldout) == sorted(pairs)
    shuffled = random.Random(0).sample(pairs, len(pairs))
    assert set(split_holdout(shuffled, 0.1, seed=1)[1]) == set(heldout)
    assert set(split_holdout(pairs, 0.1, seed=2)[1]) != set(heldout)
    for seed in range(20):
        train, heldout = split_holdout(pairs, 0.5, seed)
        assert not set(unique_prompts(train)) & set(unique_prompts(heldout))


def test_neither_side_of_a_split_is_empty():
    for fraction in (1e-9, 0.5, 1 - 1e-9):
        train, heldout = split_holdout(pairs_of("aabc"), fraction, seed=0)
        assert train and heldout
    with pytest.raises(UserError, match="only 2 distinct prompts; give at least 3"):
        split_holdout(pairs_of("aab"), 0.5, seed=0)


def test_each_split_is_read_from_the_files_named_for_it(tmp_path):
    """Held-out pairs, used for choices, must not replace the test pairs, used for reports."""

    def named(name):
        records = [RECORDS["strings"] | {"prompt": f"{name} {i}"} for i in range(4)]
        return write_raw(tmp_path, "\n".join(map(json.dumps, records)), name)

    def prompts(*parts):
        return [set(unique_prompts(part)) for part in parts]

    files = {name: named(name) for name in ("train", "more", "heldout", "test")}
    train, heldout, test = (
        {f"{name} {i}" for i in range(4)} for name in ("train", "heldout", "test")
    )
    config = RewardConfig(
        data=(files["train"], files["more"]),
        heldout_data=(files["heldout"],),
        test_data=(files["test"],),
    )
    splits = load_splits(config)
    both = train | {f"more {i}" for i in range(4)}
    assert prompts(splits.train, splits.heldout, splits.test) == [both, heldout, test]
    names = ["data 1", "data 2", "heldout_data 1", "test_data 1"]
    assert [fact[66:] for fact in splits.facts.values()] == list(files.values())
    assert list(splits.facts) == names
    assert len({fact[:64] for fact in splits.facts.values()}) == 4
    without_test = load_splits(dataclasses.replace(config, test_data=()))
    assert prompts(without_test.heldout, without_test.test) == [heldout, heldout]
    splits = load_splits(
        RewardConfig(data=(files["train"],), test_data=(files["test"],), holdout=0.25)
    )
    assert prompts(splits.train + splits.heldout, splits.test) == [train, test]
    assert len(splits.heldout) == 1


# ---- encoding ------------------------------------------------------------------------------------


def test_prompt_and_response_are_encoded_separately_and_end_with_eos(enc):
    """Encoded together, " th" would be one token of both, which the policy can never sample."""
    groups, counts = encode_preferences([PreferencePair("a ", "the", "x<|endoftext|>")], enc, 8, 20)
    responses = (256, ord("e"), enc.eot_token), (*b"x<|endoftext|>", enc.eot_token)
    assert groups == [PreferenceGroup(tuple(b"a "), responses, ((0, 1, 0.0, 1.0),))]
    expected = dict(read=1, kept=1, empty=0, identical=0, prompts=1, prompts_cut=0, responses_cut=0)
    assert counts == expected | dict(eos_text=1, no_blank=0)
    assert "; 1 pairs contain the name of EOS" in describe_counts(counts)


def test_a_warning_says_that_most_prompts_are_cut(enc):
    """A limit that is far too small would lose most of the data without a word."""
    pairs = [
        PreferencePair(prompt, " a", " b") for prompt in ("long prompt?", "longer one?", "Hi?")
    ]
    assert "most prompts are cut" in describe_counts(encode_preferences(pairs, enc, 8, 8)[1])
    pairs[2:] = [PreferencePair("Hi?", f" {n}", " b") for n in range(4)]  # prompts count, not pairs
    assert "most prompts are cut" in describe_counts(encode_preferences(pairs, enc, 8, 8)[1])
    pairs += [PreferencePair("Ho?", " a", " b")]
    assert "most prompts are cut" not in describe_counts(encode_preferences(pairs, enc, 8, 8)[1])


def test_responses_that_follow_the_prompt_without_a_blank_are_counted(enc):
    """Without a separator the model would be trained on "...(ticket 3)?Happy to help"."""
    glued = [PreferencePair("Hi?", "a", "b"), PreferencePair("Hi?", " a", "b")]
    apart = [("Hi?", " a", "\nb"), ("Hi? ", "a", "b"), ("Hi:\n", "a", "b"), ("", "a", "b")]
    pairs = [*glued, *(PreferencePair(*texts) for texts in apart)]
    counts = encode_preferences(pairs, enc, 8, 8)[1]
    assert "warning: 2 pairs lack a blank between prompt and response" in describe_counts(counts)
    counts = encode_preferences(pairs[2:], enc, 8, 8)[1]
    assert counts["no_blank"] == 0 and "warning" not in describe_counts(counts)


@pytest.mark.parametrize("record", [*RECORDS.values(), *INSTRUCTION_RECORDS.values()])
def test_messages_and_transcripts_have_a_blank_after_the_prompt(record, tmp_path, enc):
    pairs = read_preferences(write(tmp_path, [record]))
    assert encode_preferences(pairs, enc, 1000, 1000)[1]["no_blank"] == 0


def test_over_long_prompts_lose_the_beginning_and_responses_the_end(enc):
    groups, counts = encode_preferences([PreferencePair("0123456789", "abcd", "xyz")], enc, 3, 4)
    assert groups[0].prompt == tuple(b"789")
    # EOS counts as a token, so "abcd" is one token too long
    assert groups[0].responses == (tuple(b"abcd"), (*b"xyz", enc.eot_token))
    assert (counts["prompts_cut"], counts["responses_cut"]) == (1, 1)


def test_each_distinct_response_is_encoded_once_and_pairs_keep_their_order(enc):
    first = PreferencePair("p", "a", "b", 2.0)
    tie = [PreferencePair("p", "b", "c", None, 0.5), PreferencePair("p", "c", "b", None, 0.5)]
    pairs = [first, *tie, PreferencePair("q", "a", "b"), first]
    groups, _ = encode_preferences(pairs, enc, 4, 4)
    assert [len(group.responses) for group in groups] == [3, 2, 2]
    assert groups[0].pairs == ((0, 1, 2.0, 1.0), (1, 2, 0.0, 0.5), (2, 1, 0.0, 0.5))


def test_pairs_identical_after_cutting_are_dropped_and_counted(enc):
    """Such a pair adds ln 2 to the loss and nothing to the gradient. HH-RLHF has 7% of them."""
    pairs = [
        PreferencePair("p", "abcX", "abcY"),
        PreferencePair("p", "same", "same"),
        PreferencePair("p", "a", "b"),
        PreferencePair("p", "", "a"),
        PreferencePair("p", "a", " \n"),
    ]
    groups, counts = encode_preferences(pairs, enc, 4, 3)
    assert [len(group.pairs) for group in groups] == [1] and len(groups[0].responses) == 2
    expected = dict(read=5, kept=1, empty=2, identical=2, prompts=1, prompts_cut=0, responses_cut=0)
    assert counts == expected | dict(eos_text=0, no_blank=3)
    assert "kept 1 of 5" in describe_counts(counts) and "\n" not in describe_counts(counts)
    with pytest.raises(UserError, match="no usable pair: kept 0 of 2 pairs"):
        encode_preferences(pairs[:2], enc, 4, 3)


def test_a_cut_prompt_counts_once_wherever_its_pairs_are(enc):
    pairs = [PreferencePair(prompt, "a", "b") for prompt in ("01234", "56789", "01234")]
    assert encode_preferences(pairs, enc, 3, 3)[1]["prompts_cut"] == 2
    assert encode_preferences(pairs, enc, 5, 3)[1]["prompts_cut"] == 0


def test_cutting_never_removes_the_whole_response(enc):
    """If prompt and response were cut as one sequence, a long prompt would leave no response."""
    pair = PreferencePair("p" * 100_000, "a" * 100_000, "b" * 100_000)
    for max_prompt_length, max_response_length in [(1, 1), (1, 5), (7, 1)]:
        (group,), _ = encode_preferences([pair], enc, max_prompt_length, max_response_length)
        assert len(group.prompt) == max_prompt_length
        assert group.responses == ((97,) * max_response_length, (98,) * max_response_length)


def test_empty_prompt_becomes_one_eos(enc):
    (group,), _ = encode_preferences([PreferencePair("", "a", "b")], enc, 4, 4)
    assert group.prompt == (enc.eot_token,)
    texts = ["", "abcdef", "ab"]
    expected = [(enc.eot_token,), tuple(b"def"), tuple(b"ab")]
    assert encode_prompts(texts, enc, 3) == Prompts(texts, expected)
    assert [encode_prompt(enc, text, 3)[1] for text in texts] == [False, True, False]


def test_one_prompt_with_many_responses_makes_many_groups(enc):
    """A file whose prompts are all empty must not become one group that exceeds the memory."""
    pairs = [PreferencePair("", f"good {i}", f"bad {i}") for i in range(100)]
    groups, counts = encode_preferences(pairs, enc, 4, 20)
    assert counts["kept"] == sum(len(group.pairs) for group in groups) == 100
    assert max(len(group.responses) for group in groups) == batches.MAX_GROUP


def test_a_prompt_is_cut_even_if_its_last_part_has_the_maximum_length(enc, monkeypatch):
    monkeypatch.setattr("minirlhf.data.prompts.CHUNK", 3)
    assert encode_prompt(enc, "abcdef", 3) == (tuple(b"def"), True)
    assert encode_prompt(enc, "abcdef", 6) == (tuple(b"abcdef"), False)


def test_text_of_megabytes_is_cut_before_all_of_it_is_encoded(enc):
    """tiktoken fails on two million blanks, and takes seconds for a word of ten million letters."""
    for character in " a\n":
        pair = PreferencePair(
            character * 2_000_000 + "p", "y" + character * 10_000_000, "n" + character * 10_000_000
        )
        (group,), counts = encode_preferences([pair], enc, 5, 5)
        assert group.prompt[-1] == ord("p") and counts["responses_cut"] == 2


def test_any_text_round_trips_through_the_ids_of_a_response(enc):
    rng = random.Random(0)
    for length in (1, 10, CHUNK - 1, CHUNK, CHUNK + 1):
        code_points = [
            rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)])
            for _ in range(length)
        ]
        text = "x" + "".join(map(chr, code_points))
        (group,), _ = encode_preferences([PreferencePair(text, text, "r")], enc, 10**6, 10**6)
        assert decode(enc, group.prompt) == decode(enc, group.responses[0]) == text


# ---- batches -------------------------------------------------------------------------------------


def test_collated_sequences_are_prompt_and_response_and_pairs_are_their_indices(enc):
    pairs = [
        PreferencePair("pp", "a", "bbb", 0.25),
        PreferencePair("pp", "bbb", "c"),
        PreferencePair("q", "d", "e", None, 0.5),
    ]
    groups, _ = encode_preferences(pairs, enc, 4, 4)
    batch = collate_preferences(groups, pad_id(enc))
    eos = enc.eot_token
    pad = pad_id(enc)
    p, q, a, b, c, d, e = b"pqabcde"
    assert batch.ids.tolist() == [
        [p, p, a, eos, pad, pad],
        [p, p, b, b, b, eos],
        [p, p, c, eos, pad, pad],
        [q, d, eos, pad, pad, pad],
        [q, e, eos, pad, pad, pad],
    ]
    assert torch.equal(batch.attention_mask, batch.ids != pad)
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 1, 3], [1, 2, 4])
    assert (batch.margin.tolist(), batch.weight.tolist()) == ([0.25, 0.0, 0.0], [1.0, 1.0, 0.5])
    index, number = torch.int64, torch.float32
    assert [tensor.dtype for tensor in batch] == [index, torch.bool, index, index, number, number]


def test_the_last_real_token_of_a_sequence_is_its_eos(enc):
    """The reward model's score is computed there. If PAD were EOS, the position would be wrong."""
    groups, _ = encode_preferences(
        [PreferencePair("p" * n, "a" * n, "b" * (6 - n)) for n in range(1, 6)], enc, 9, 9
    )
    batch = collate_preferences(groups, pad_id(enc))
    last = batch.attention_mask.sum(1) - 1
    assert batch.ids.gather(1, last[:, None]).flatten().tolist() == [enc.eot_token] * 10
    assert (batch.ids == enc.eot_token).sum() == 10


def test_padding_on_either_side_keeps_the_sequences():
    sequences = [(5,), (1, 2, 3), (), (7, 7)]
    for pad, tokens in (
        (pad_left, lambda row, n: row[3 - n :]),
        (pad_right, lambda row, n: row[:n]),
    ):
        ids, mask = pad(sequences, 9)
        assert ids.shape == mask.shape == (4, 3)
        assert mask.sum(1).tolist() == [1, 3, 0, 2]
        assert [tuple(tokens(row, len(s))) for row, s in zip(ids.tolist(), sequences)] == sequences
        assert torch.equal(mask, ids != 9)


@pytest.mark.parametrize(
    "count, batch_size", [(0, 4), (1, 4), (4, 4), (5, 4), (1000, 7), (300, 1), (64 * 16, 64)]
)
def test_every_index_occurs_once_per_epoch_and_only_the_last_batch_is_smaller(count, batch_size):
    lengths = [i * 7919 % 101 for i in range(count)]
    batches = epoch_batches(lengths, batch_size, seed=0, epoch=3)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert all(len(batch) == batch_size for batch in batches[:-1]) and all(batches)
    assert batches == epoch_batches(lengths, batch_size, seed=0, epoch=3)


def test_the_order_of_the_data_is_that_of_the_published_results():
    """With another order, a run that was stopped would not resume after an update."""
    lengths = [1 + 7 * i % 11 for i in range(68)]
    first = [[49, 38, 5, 27], [51, 18, 48, 15], [4, 37, 26, 59]]
    assert epoch_batches(lengths, 4, seed=0, epoch=1)[:3] == first


def test_order_depends_only_on_seed_and_epoch():
    """An order from the global generator would change when a run is resumed."""
    lengths = [i * 7919 % 101 for i in range(200)]
    orders = {
        str(epoch_batches(lengths, 8, seed, epoch)) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9
    before = torch.get_rng_state()
    epoch_batches(lengths, 8, 0, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_batches_need_little_padding_and_are_not_sorted():
    rng = random.Random(0)
    lengths = [rng.randrange(1, 200) for _ in range(4096)]
    batches = epoch_batches(lengths, 16, seed=0, epoch=0)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)  # 1.9 without sorting
    means = torch.tensor([sum(lengths[i] for i in batch) / len(batch) for batch in batches])
    rising = (means[1:] > means[:-1]).float().mean()
    assert 0.4 < rising < 0.6  # in sorted order 15 of 16 would rise


# ---- fuzz ----------------------------------------------------------------------------------------

HOSTILE_VALUES = [
    None,
    True,
    0,
    -1,
    10**400,
    1e300,
    float("nan"),
    float("-inf"),
    "",
    " ",
    "\0",
    "\ud800",
    "\udfff\ud800",
    "\u202e\x1b[2J",
    "\n\nAssistant:" * 3000,
    [],
    {},
    [[]],
    [{}],
    [[0, 1]] * 9,
    {"role": "user"},
    {"role": [[]]},
]


def mutated_record(rng: random.Random, record: dict) -> str:
    """JSON text of the record with one value replaced, removed, renamed or repeated."""
    record = json.loads(json.dumps(record))
    target = record
    while True:
        keys = list(target) if isinstance(target, dict) else range(len(target))
        key = rng.choice(list(keys))
        if not isinstance(target[key], (dict, list)) or not target[key] or rng.random() < 0.4:
            break
        target = target[key]
    action = rng.randrange(4)
    if action == 0:
        del target[key]
    elif action == 1 and isinstance(target, dict):
        target[rng.choice(["chosen", "prompt", "responses", "conversations", "from", "x"])] = (
            target.pop(key)
        )
    else:
        target[key] = rng.choice(HOSTILE_VALUES)
    text = json.dumps(record, ensure_ascii=rng.random() < 0.5)
    return "{" + f'"{key}": 1, ' + text[1:] if action == 3 and rng.random() < 0.2 else text


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """The content with bytes overwritten, deleted, repeated or replaced by difficult input."""
    content = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(start + rng.randrange(1, 2 ** rng.randrange(1, 9)), len(content))
        content[start:end] = rng.choice(
            [
                b"",
                rng.randbytes(end - start),
                rng.randbytes(rng.randrange(9)),
                bytes(content[start:end]) * 2,
                b"\0",
                b"\xff",
                b"\xed\xa0\x80",
                b"\xef\xbb\xbf",
                b"\\ud800",
                b"NaN",
                b"[" * 3000,
                b'{"a":' * 3000,
                b"9" * 5000,
                b"\n",
                b",",
                b"]",
                b'"',
            ]
        )
    return bytes(content[: rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content)


def mutated_file(rng: random.Random) -> tuple[str, bytes]:
    """Name and content of a preference file with one mutation."""
    container = rng.choice(CONTAINERS)
    record = rng.choice(list(RECORDS.values()))
    records = [
        json.dumps(record | {"margin": 1.5, "weight": [0.5]}) for _ in range(rng.randrange(1, 6))
    ]
    index = rng.randrange(len(records))
    kind = rng.choice(["record", "record", "bytes", "bytes", "compressed", "mix", "huge"])
    if kind == "record":
        records[index] = mutated_record(rng, record)
    if kind == "mix":
        records[index] = json.dumps(rng.choice(list(RECORDS.values())))
    if kind == "huge" and rng.random() < 0.1:  # slow to make, so few
        filler = rng.choice(["x", " ", "é", "\\n", "[]", "[" * 9, '{"a":1},'])
        n = rng.choice([10**6, 10**7, 2 * 10**7]) // len(filler)
        around = rng.choice(['{"prompt": "%s", "chosen": "a", "rejected": "b"}', "%s", '{"a": [%s'])
        records[index] = around % (filler * n)
    text = "\n".join(records) if container.startswith("lines") else "[" + ",\n".join(records) + "]"
    content = text.encode(errors="surrogatepass")
    if kind == "bytes":
        content = mutated_bytes(rng, content)
    if container.endswith(".gz"):
        content = gzip.compress(content, 1)
    return container, mutated_bytes(rng, content) if kind == "compressed" else content


def outcome_of_file(path: Path, enc) -> Counter:
    """Read a file, with and without skipping: it loads, or is refused with one printable line.

    Returns the number of each outcome.
    """
    outcomes = Counter()
    for skip_bad_lines in (False, True):
        try:
            pairs, n_bad = read_records([str(path)], skip_bad_lines)
            assert pairs and (skip_bad_lines or n_bad == 0)
            groups, counts = encode_preferences(pairs, enc, 64, 64)
            batch = collate_preferences(groups, pad_id(enc))
            assert batch.margin.isfinite().all() and batch.weight.isfinite().all()
            assert counts["kept"] == len(batch.chosen)
            outcomes["skipped" if n_bad else "loaded"] += 1
        except UserError as error:
            message = str(error)
            assert message.isprintable() and len(message) < 500, message
            assert message.startswith((f"{path}:", "no usable pair")), message
            outcomes["refused"] += 1
        try:
            assert read_prompts(str(path), skip_bad_lines)
        except UserError:
            pass
    return outcomes


def test_mutated_files_load_or_are_refused_in_one_line(tmp_path):
    """No file may cause a traceback, an endless loop, or numbers that are not finite."""
    enc = byte_tokenizer(tmp_path)
    outcomes = Counter()
    for number in range(300):
        name, content = mutated_file(random.Random(f"0 {number}"))
        (tmp_path / name).write_bytes(content)
        outcomes += outcome_of_file(tmp_path / name, enc)
    assert sum(outcomes.values()) == 600
    assert min(outcomes[kind] for kind in ("loaded", "skipped", "refused")) > 50
