"""Preference files in, checked pairs out.

A file holds records, one per line (JSON lines) or in one JSON array, plain or as .gz, all of one shape:

    strings      {"prompt": "...", "chosen": "...", "rejected": "..."}
    messages     {"prompt": [{"role": "user", "content": "..."}], "chosen": [...], "rejected": [...]}
    transcripts  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "..."}       (HH-RLHF)
    ShareGPT     {"conversations": [{"from": "human", "value": "..."}], "chosen": {...}, "rejected": {...}}
    ranked       {"prompt": "...", "responses": ["...", "..."], "preferences": [[winner, loser], ...]}

`margin` and `weight` are optional; in a ranked record each may be a list with one number per preference. A tie is
two preferences, one per order, of weight 1/2. Other keys are ignored.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

from minirlhf.flags import UserError
from minirlhf.json_files import BadRecord, read_objects

HUMAN, ASSISTANT, SYSTEM = "\n\nHuman:", "\n\nAssistant:", "\n\nSystem:"
SPEAKERS = {"user": HUMAN, "human": HUMAN, "assistant": ASSISTANT, "gpt": ASSISTANT, "system": SYSTEM}
MAX_BAD_RECORDS = 10_000  # in a file with fewer usable ones: it is not the file that one thinks, and not worth the wait
SMALLEST_WEIGHT = 1e-6  # a batch of pairs that all weigh nothing would divide by nothing; leave such pairs out
LARGEST_NUMBER = 1e6  # margins and weights beyond it are mistakes, and 1e39 would be inf in float32


class PreferencePair(NamedTuple):
    """A person preferred `chosen` to `rejected`, by `margin` (in units of the score; None: not said)."""

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None
    weight: float = 1.0


# ---- files ------------------------------------------------------------------------------------------------------------


def read_preferences(path: str, skip_bad_lines: bool = False) -> list[PreferencePair]:
    """All pairs of one file. Raises UserError "path:line: what is wrong; what to do"."""
    return read_records([path], skip_bad_lines)[0]


def read_records(paths: Sequence[str], skip_bad_lines: bool = False) -> tuple[list[PreferencePair], int]:
    """All pairs of several files, each of its own shape, and the number of bad records skipped.

    With `skip_bad_lines` a bad record is counted and passed over; what follows a place where a file breaks off counts
    as one. A file without a single usable record is always an error, and so is one of more than MAX_BAD_RECORDS bad
    records and fewer usable ones.
    """
    found = [_read(path, skip_bad_lines, _pairs) for path in paths]
    return [pair for pairs, _ in found for pair in pairs], sum(n_bad for _, n_bad in found)


def read_prompts(path: str, skip_bad_lines: bool = False) -> list[str]:
    """The distinct prompts, in order, of a preference file or of a file of {"prompt": ...} records."""
    return list(dict.fromkeys(_read(path, skip_bad_lines, _prompts)[0]))


def _read(path: str, skip_bad_lines: bool, convert: Callable[[dict], tuple[str, list]]) -> tuple[list, int]:
    """What `convert` makes of all records, in one list, and the number of bad ones skipped; it tells each one's shape, too."""
    items: list = []
    n_bad, first_shape = 0, None
    for line, record in read_objects(path):
        try:
            if isinstance(record, BadRecord):
                raise record
            shape, converted = convert(record)
            if first_shape not in (None, shape):
                raise BadRecord(f"the record holds {shape}, the earlier ones {first_shape}; split the file")
            first_shape = shape
            items += converted
        except BadRecord as problem:
            n_bad += 1
            if not skip_bad_lines:
                hint = "" if convert is _prompts else " (or pass --skip-bad-lines)"  # there is no such flag beside --prompts
                raise UserError(f"{path}:{line}: {problem}{hint}") from None
            if n_bad > max(MAX_BAD_RECORDS, len(items)):
                raise UserError(f"{path}:{line}: more records are bad than usable, the last because {problem}") from None
    if not items:
        raise UserError(f"{path}: holds no usable record ({n_bad} bad ones skipped); minirlhf/records.py lists the shapes")
    return items, n_bad


# ---- records: from JSON objects to pairs -----------------------------------------------------------------------------


def _pairs(record: dict) -> tuple[str, list[PreferencePair]]:
    shape, prompt, responses, preferences = _comparison(record)
    count = len(preferences)
    margins: Sequence[float | None] = _numbers(record, "margin", -LARGEST_NUMBER, count) or [None] * count
    weights = _numbers(record, "weight", SMALLEST_WEIGHT, count) or [1.0] * count
    return shape, [PreferencePair(prompt, responses[winner], responses[loser], margin, weight)
                   for (winner, loser), margin, weight in zip(preferences, margins, weights)]


def _prompts(record: dict) -> tuple[str, list[str]]:
    if record.keys() & {"chosen", "rejected", "responses", "preferences", "conversations"}:
        shape, prompt, *_ = _comparison(record)
        return shape, [prompt]
    asked = _key(record, "prompt")
    prompt = _render(_messages(asked, "prompt")) + ASSISTANT if isinstance(asked, list) else _text(asked, "prompt")
    return "prompts alone", [prompt]


def _comparison(record: dict) -> tuple[str, str, list[str], list[list[int]]]:
    """Shape, prompt, responses, and [winner, loser] indices of a record of any shape."""
    if "responses" in record or "preferences" in record:
        return "ranked responses", _text(_key(record, "prompt"), "prompt"), *_ranking(record)
    chosen, rejected = _key(record, "chosen"), _key(record, "rejected")
    if "conversations" in record:
        shape, parts = "ShareGPT conversations", _split_messages(record["conversations"], [chosen], [rejected])
    elif isinstance(chosen, list):
        shape, parts = "message lists", _split_messages(record.get("prompt", []), chosen, rejected)
    elif "prompt" in record:
        responses = [_text(chosen, "chosen"), _text(rejected, "rejected")]
        shape, parts = "prompt, chosen, rejected", (_text(record["prompt"], "prompt"), responses)
    else:
        shape, parts = "transcripts", _split_transcripts(_text(chosen, "chosen"), _text(rejected, "rejected"))
    return shape, *parts, [[0, 1]]


def _ranking(record: dict) -> tuple[list[str], list[list[int]]]:
    responses, preferences = _key(record, "responses"), _key(record, "preferences")
    if not isinstance(responses, list) or not isinstance(preferences, list) or not preferences:
        raise BadRecord('"responses" must be a list, "preferences" a list of [winner, loser]; mend the record')
    for pair in preferences:
        two = isinstance(pair, list) and len(pair) == 2 and pair[0] != pair[1]
        if not two or any(type(index) is not int or not 0 <= index < len(responses) for index in pair):
            raise BadRecord(f'each of "preferences" must be [winner, loser], two of the {len(responses)} responses, counted from '
                            "0; mend the record")
    return [_text(response, "responses") for response in responses], preferences


def _split_transcripts(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """The prompt is the longest beginning that both share and that ends with "\\n\\nAssistant:"; the rest, responses.

    Where two transcripts part before their last answers, the responses are all that follows: several turns each.
    Where they part before the first answer there is no common prompt to compare them under, and the record is bad.

    >>> _split_transcripts("\\n\\nHuman: Hi\\n\\nAssistant: Hello.", "\\n\\nHuman: Hi\\n\\nAssistant: What?")
    ('\\n\\nHuman: Hi\\n\\nAssistant:', [' Hello.', ' What?'])
    """
    sides = chosen.split(ASSISTANT), rejected.split(ASSISTANT)
    turns = zip(sides[0][:-1], sides[1][:-1])  # each followed by "\n\nAssistant:"
    shared = sum(1 for _ in takewhile(lambda turn: turn[0] == turn[1], turns))
    if shared == 0:
        raise BadRecord('chosen and rejected share nothing up to an "Assistant:"; add a prompt or drop the pair')
    return ASSISTANT.join([*sides[0][:shared], ""]), [ASSISTANT.join(side[shared:]) for side in sides]


def _split_messages(prompt: object, chosen: object, rejected: object) -> tuple[str, list[str]]:
    """Prompt and responses in the template; without a prompt, it is what chosen and rejected share.

    A prompt that is a string stands for one message by the user; some files repeat the prompt before each response.
    """
    shown = _messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, "prompt")
    sides = [_messages(chosen, "chosen"), _messages(rejected, "rejected")]
    if not shown:
        return _split_transcripts(*map(_render, sides))
    answers = [side[len(shown):] if side[:len(shown)] == shown else side for side in sides]
    if any(not answer or answer[0][0] != ASSISTANT for answer in answers):
        raise BadRecord("after the prompt, chosen and rejected must go on with an assistant's message; mend the record")
    return _render(shown) + ASSISTANT, [_render(answer).removeprefix(ASSISTANT) for answer in answers]


def _messages(messages: object, key: str) -> list[tuple[str, str]]:
    """(speaker, text) of each {"role", "content"} or {"from", "value"}."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord(f'"{key}" must hold messages, [{{"role": "user", "content": "..."}}]; mend the record')
    turns = []
    for message in messages:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in SPEAKERS:
            raise BadRecord(f'a message in "{key}" has the role {str(role)[:20]!r}; use one of {", ".join(SPEAKERS)}')
        turns.append((SPEAKERS[role], _text(message.get("content", message.get("value")), key)))
    return turns


def _render(turns: list[tuple[str, str]]) -> str:
    return "".join(f"{speaker} {text}" for speaker, text in turns)


def _key(record: dict, key: str) -> object:
    if key not in record:
        raise BadRecord(f'the key "{key}" is missing; add it, or see minirlhf/records.py for the shapes of a record')
    return record[key]


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f'"{key}" holds a JSON {type(value).__name__} where text is due; mend the record')
    try:
        value.encode()
    except UnicodeEncodeError:  # a byte that was no UTF-8, or an escape like \ud800
        raise BadRecord(f'"{key}" is not valid UTF-8; convert the file, or mend the record') from None
    if "\0" in value:
        raise BadRecord(f'"{key}" holds a NUL character; remove it')
    return value


def _numbers(record: dict, key: str, lowest: float, count: int) -> list[float]:
    """`count` numbers from `record[key]`, a list of them or one for all; none if it says nothing."""
    value = record.get(key)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count or any(type(v) not in (int, float) or not lowest <= v <= LARGEST_NUMBER for v in values):
        raise BadRecord(f'"{key}" must be {lowest:g} to {LARGEST_NUMBER:g}, one number or one per preference; mend it')
    return [float(v) for v in values]
