"""From preference files to checked pairs.

A file contains records, one per line (JSON lines) or in one JSON array, plain or as .gz. All
records of a file have the same shape:

    strings      {"prompt": "...", "chosen": "...", "rejected": "..."}
    messages     {"prompt": [{"role": "user", "content": "..."}],
                  "chosen": [...], "rejected": [...]}
    transcripts  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "..."}    (HH-RLHF)
    ShareGPT     {"conversations": [{"from": "human", "value": "..."}],
                  "chosen": {...}, "rejected": {...}}
    ranked       {"prompt": "...", "responses": ["...", "..."],
                  "preferences": [[winner, loser], ...]}

`margin` and `weight` are optional; in a ranked record each may be a list with one number per
preference. A tie is two preferences, one in each order, of weight 1/2. Other keys are ignored.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

from minirlhf.data.json_files import BadRecord, read_objects
from minirlhf.run.errors import KINDS, UserError

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
SYSTEM = "\n\nSystem:"
SPEAKERS = {"user": HUMAN, "human": HUMAN, "assistant": ASSISTANT, "gpt": ASSISTANT,
            "system": SYSTEM}
MAX_BAD_RECORDS = 10_000  # more than this and than the usable ones: probably the wrong file
SMALLEST_WEIGHT = 1e-6  # a batch of weight 0 would divide by 0
LARGEST_NUMBER = 1e6  # larger margins and weights are mistakes, and 1e39 is infinite in float32


class PreferencePair(NamedTuple):
    """The annotator preferred `chosen` to `rejected`.

    margin: by how much, in units of the score; None if not stated.
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None
    weight: float = 1.0


# ---- files ---------------------------------------------------------------------------------------


def read_preferences(path: str, skip_bad_lines: bool = False) -> list[PreferencePair]:
    """All pairs of one file. Raises UserError "path:line: what is wrong; what to do"."""
    return read_records([path], skip_bad_lines)[0]


def read_records(paths: Sequence[str],
                 skip_bad_lines: bool = False) -> tuple[list[PreferencePair], int]:
    """(all pairs of several files, number of bad records skipped).

    Files may have different shapes. With `skip_bad_lines` bad records are counted and skipped;
    the rest of a file after damage counts as one record. A file without a usable record is always
    an error, and so is one with more than MAX_BAD_RECORDS bad records and fewer usable ones.
    """
    files = [_read(path, skip_bad_lines, _pairs) for path in paths]
    return [pair for pairs, _ in files for pair in pairs], sum(bad for _, bad in files)


def read_prompts(path: str, skip_bad_lines: bool = False) -> list[str]:
    """The distinct prompts, in order, of a preference file or a file of {"prompt": ...} records."""
    return list(dict.fromkeys(_read(path, skip_bad_lines, _prompts)[0]))


def _read(path: str, skip_bad_lines: bool,
          convert: Callable[[dict], tuple[str, list]]) -> tuple[list, int]:
    """(items of all records, number of bad records skipped).

    convert: from a record to (its shape, its items).
    """
    items: list = []
    bad = 0
    first_shape = None
    for line, record in read_objects(path):
        try:
            if isinstance(record, BadRecord):
                raise record
            shape, converted = convert(record)
            if first_shape not in (None, shape):
                raise BadRecord(f"the record contains {shape}, the earlier ones {first_shape}; "
                                "split the file")
            first_shape = shape
            items += converted
        except BadRecord as problem:
            bad += 1
            if not skip_bad_lines:
                # there is no such flag for --prompts
                hint = "" if convert is _prompts else " (or pass --skip-bad-lines)"
                raise UserError(f"{path}:{line}: {problem}{hint}") from None
            if bad > max(MAX_BAD_RECORDS, len(items)):
                raise UserError(f"{path}:{line}: more records are bad than usable, "
                                f"the last because {problem}") from None
    if not items:
        raise UserError(f"{path}: contains no usable record ({bad} bad ones skipped); "
                        "minirlhf/data/preference_files.py lists the shapes")
    return items, bad


# ---- records: from JSON objects to pairs ---------------------------------------------------------


def _pairs(record: dict) -> tuple[str, list[PreferencePair]]:
    shape, prompt, responses, preferences = _comparison(record)
    count = len(preferences)
    margins: Sequence[float | None] = _numbers(record, "margin", -LARGEST_NUMBER, count)
    margins = margins or [None] * count
    weights = _numbers(record, "weight", SMALLEST_WEIGHT, count) or [1.0] * count
    return shape, [PreferencePair(prompt, responses[winner], responses[loser], margin, weight)
                   for (winner, loser), margin, weight in zip(preferences, margins, weights)]


def _prompts(record: dict) -> tuple[str, list[str]]:
    if record.keys() & {"chosen", "rejected", "responses", "preferences", "conversations"}:
        shape, prompt, *_ = _comparison(record)
        return shape, [prompt]
    value = _key(record, "prompt")
    if isinstance(value, list):
        return "prompts alone", [_render(_messages(value, "prompt")) + ASSISTANT]
    return "prompts alone", [_text(value, "prompt")]


def _comparison(record: dict) -> tuple[str, str, list[str], list[list[int]]]:
    """Shape, prompt, responses, and [winner, loser] indices of a record of any shape."""
    if "responses" in record or "preferences" in record:
        prompt = _text(_key(record, "prompt"), "prompt")
        return "ranked responses", prompt, *_ranking(record)
    chosen = _key(record, "chosen")
    rejected = _key(record, "rejected")
    if "conversations" in record:
        shape = "ShareGPT conversations"
        parts = _split_messages(record["conversations"], [chosen], [rejected])
    elif isinstance(chosen, list):
        shape = "message lists"
        parts = _split_messages(record.get("prompt", []), chosen, rejected)
    elif "prompt" in record:
        shape = "prompt, chosen, rejected"
        responses = [_text(chosen, "chosen"), _text(rejected, "rejected")]
        parts = _text(record["prompt"], "prompt"), responses
    else:
        shape = "transcripts"
        parts = _split_transcripts(_text(chosen, "chosen"), _text(rejected, "rejected"))
    return shape, *parts, [[0, 1]]


def _ranking(record: dict) -> tuple[list[str], list[list[int]]]:
    responses = _key(record, "responses")
    preferences = _key(record, "preferences")
    if not isinstance(responses, list) or not isinstance(preferences, list) or not preferences:
        raise BadRecord('"responses" must be a list, "preferences" a list of [winner, loser]; '
                        "fix the record")
    for pair in preferences:
        is_two = isinstance(pair, list) and len(pair) == 2 and pair[0] != pair[1]
        if not is_two or any(type(i) is not int or not 0 <= i < len(responses) for i in pair):
            raise BadRecord('each item of "preferences" must be [winner, loser], two of the '
                            f"{len(responses)} responses, counted from 0; fix the record")
    return [_text(response, "responses") for response in responses], preferences


def _split_transcripts(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """(prompt, responses). The prompt is the longest shared beginning up to "\\n\\nAssistant:".

    If two transcripts differ before their last answers, the responses have several turns. If they
    differ before the first answer, there is no common prompt, and the record is bad.

    >>> _split_transcripts("\\n\\nHuman: Hi\\n\\nAssistant: Hello.",
    ...                    "\\n\\nHuman: Hi\\n\\nAssistant: What?")
    ('\\n\\nHuman: Hi\\n\\nAssistant:', [' Hello.', ' What?'])
    """
    sides = chosen.split(ASSISTANT), rejected.split(ASSISTANT)
    turns = zip(sides[0][:-1], sides[1][:-1])  # each followed by "\n\nAssistant:"
    shared = sum(1 for _ in takewhile(lambda turn: turn[0] == turn[1], turns))
    if shared == 0:
        raise BadRecord('chosen and rejected share nothing up to an "Assistant:"; '
                        "add a prompt or drop the pair")
    prompt = ASSISTANT.join([*sides[0][:shared], ""])
    return prompt, [ASSISTANT.join(side[shared:]) for side in sides]


def _split_messages(prompt: object, chosen: object, rejected: object) -> tuple[str, list[str]]:
    """(prompt, responses) as transcripts.

    If there is no prompt, it is the beginning that both responses share. A string as prompt is one
    user message. Some files repeat the prompt in each response.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns = _messages(prompt, "prompt")
    sides = [_messages(chosen, "chosen"), _messages(rejected, "rejected")]
    if not turns:
        return _split_transcripts(*map(_render, sides))
    answers = [side[len(turns):] if side[:len(turns)] == turns else side for side in sides]
    if any(not answer or answer[0][0] != ASSISTANT for answer in answers):
        raise BadRecord("after the prompt, chosen and rejected must continue with a message of "
                        "the assistant; fix the record")
    responses = [_render(answer).removeprefix(ASSISTANT) for answer in answers]
    return _render(turns) + ASSISTANT, responses


def _messages(messages: object, key: str) -> list[tuple[str, str]]:
    """(speaker, text) of each {"role", "content"} or {"from", "value"}."""
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise BadRecord(f'"{key}" must be a list of messages, '
                        '[{"role": "user", "content": "..."}]; fix the record')
    turns = []
    for message in messages:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in SPEAKERS:
            raise BadRecord(f'a message in "{key}" has the role {str(role)[:20]!r}; '
                            f'use one of {", ".join(SPEAKERS)}')
        text = _text(message.get("content", message.get("value")), key)
        turns.append((SPEAKERS[role], text))
    return turns


def _render(turns: list[tuple[str, str]]) -> str:
    return "".join(f"{speaker} {text}" for speaker, text in turns)


def _key(record: dict, key: str) -> object:
    if key not in record:
        raise BadRecord(f'the key "{key}" is missing; add it, or see '
                        "minirlhf/data/preference_files.py for the shapes of a record")
    return record[key]


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f'"{key}" is {KINDS[type(value)]}, but must be a string; '
                        "fix the record")
    try:
        value.encode()
    except UnicodeEncodeError:  # an invalid byte, or an escape like \ud800
        raise BadRecord(f'"{key}" is not valid UTF-8; '
                        "convert the file, or fix the record") from None
    if "\0" in value:
        raise BadRecord(f'"{key}" contains a NUL character; remove it')
    return value


def _numbers(record: dict, key: str, lowest: float, count: int) -> list[float]:
    """`count` numbers from `record[key]`, a list or one number for all; [] if it is missing."""
    value = record.get(key)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value] * count
    are_valid = all(type(v) in (int, float) and lowest <= v <= LARGEST_NUMBER for v in values)
    if len(values) != count or not are_valid:
        raise BadRecord(f'"{key}" must be {lowest:g} to {LARGEST_NUMBER:g}, '
                        "one number or one per preference; fix the record")
    return [float(v) for v in values]
