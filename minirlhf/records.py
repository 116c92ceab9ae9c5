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

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import NamedTuple, TextIO

from minirlhf.config import UserError

HUMAN, ASSISTANT, SYSTEM = "\n\nHuman:", "\n\nAssistant:", "\n\nSystem:"
SPEAKERS = {"user": HUMAN, "human": HUMAN, "assistant": ASSISTANT, "gpt": ASSISTANT, "system": SYSTEM}
MAX_RECORD = 16 * 2**20  # characters; bounds the memory that one hostile line can take, 1000 times a long dialogue
MAX_BAD_RECORDS = 10_000  # in a file with fewer usable ones: it is not the file that one thinks, and not worth the wait
CHUNK = 2**16  # characters read at a time
SMALLEST_WEIGHT = 1e-6  # a batch of pairs that all weigh nothing would divide by nothing; leave such pairs out
LARGEST_NUMBER = 1e6  # margins and weights beyond it are mistakes, and 1e39 would be inf in float32
BLANKS = re.compile(r"\s*")


class PreferencePair(NamedTuple):
    """A person preferred `chosen` to `rejected`, by `margin` (in units of the score; None: not said)."""

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None
    weight: float = 1.0


class BadRecord(Exception):
    """One record of a file, or what is left of the file, cannot be used."""


# ---- files: from bytes to records ------------------------------------------------------------------------------


def read_preferences(path: str, skip_bad_lines: bool = False) -> list[PreferencePair]:
    """All pairs of one file. Raises UserError "path:line: what is wrong; what to do"."""
    return read_records([path], skip_bad_lines)[0]


def read_records(paths: list[str], skip_bad_lines: bool = False) -> tuple[list[PreferencePair], int]:
    """All pairs of several files, each of its own shape, and the number of bad records skipped.

    With `skip_bad_lines` a bad record is counted and passed over; what follows a place where a file breaks off (a
    torn .gz, an array with a syntax error) counts as one. A file without a single usable record is always an error,
    and so is one of more than MAX_BAD_RECORDS bad records and fewer usable ones.
    """
    return _read(paths, skip_bad_lines, _pairs)


def read_prompts(path: str, skip_bad_lines: bool = False) -> list[str]:
    """The distinct prompts, in order, of a preference file or of a file of {"prompt": ...} records."""
    return list(dict.fromkeys(_read([path], skip_bad_lines, _prompts)[0]))


def _read(paths: list[str], skip_bad_lines: bool, convert: Callable[[dict], list]) -> tuple[list, int]:
    found = [_read_file(path, skip_bad_lines, convert) for path in paths]
    return [item for items, _ in found for item in items], sum(n_bad for _, n_bad in found)


def _read_file(path: str, skip_bad_lines: bool, convert: Callable[[dict], list]) -> tuple[list, int]:
    """What `convert` makes of each record, in one list, and the number of bad records skipped."""
    items, n_bad, line, first_shape = [], 0, 0, None

    def reject(problem: object) -> None:
        nonlocal n_bad
        if not skip_bad_lines:
            raise UserError(f"{path}:{line}: {problem} (or pass --skip-bad-lines)")
        n_bad += 1
        if n_bad > max(MAX_BAD_RECORDS, len(items)):
            raise UserError(f"{path}:{line}: more records are bad than usable, the last because {problem}")

    open_text = gzip.open if str(path).endswith(".gz") else open
    try:
        # surrogateescape: a byte that is no UTF-8 spoils the record it stands in and no other
        with open_text(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            for line, source in _sources(file):
                try:
                    record = _parse(source)
                    shape = _shape(record)
                    if first_shape not in (None, shape):
                        raise BadRecord(f"the record holds {shape}, the earlier ones {first_shape}; split the file")
                    items += convert(record)
                    first_shape = shape
                except BadRecord as problem:
                    reject(problem)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reject(f"after this line the file is damaged or cut short ({error}); fetch it again")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if not items:
        raise UserError(f"{path}: holds no usable record ({n_bad} bad ones skipped); minirlhf/records.py lists the shapes")
    return items, n_bad


def _sources(file: TextIO) -> Iterator[tuple[int, str]]:
    """(line number, JSON text) of each record. Never holds more than one record and the chunk being read."""
    line, source = 1, file.readline(MAX_RECORD + 1)
    while source and not source.strip():
        line, source = line + 1, file.readline(MAX_RECORD + 1)
    if source.lstrip().startswith("["):
        yield from _array_items(file, line, source.lstrip())
        return
    while source:
        if source.strip():
            yield line, source
        while source and not source.endswith("\n"):  # the rest of an over-long line
            source = file.readline(CHUNK)
        line, source = line + 1, file.readline(MAX_RECORD + 1)


def _array_items(file: TextIO, line: int, text: str) -> Iterator[tuple[int, str]]:
    """(line number, JSON text) of each item of the array that begins with `text`; then `file` holds the rest.

    Text that does not parse may only lack its end, so it is doubled until it does, or is as long as a record may be,
    or the file ends. What still does not parse is handed on as the last item, for `_parse` to say what is wrong.
    """
    find_end = json.JSONDecoder().raw_decode
    start = 1
    while True:
        position, start = start, BLANKS.match(text, start).end()
        line += text.count("\n", position, start)
        try:
            end = find_end(text, start)[1]
            after = BLANKS.match(text, end).end()
            separator = text[after]  # IndexError: not read yet
        except (ValueError, IndexError, RecursionError) as error:
            n_more = min(max(CHUNK, len(text) - start), MAX_RECORD + 1 - (len(text) - start))
            more = file.read(n_more) if n_more > 0 else ""
            if not more:
                yield line, text[start:]
                if isinstance(error, IndexError):
                    raise EOFError("the array does not end") from None
                return
            text, start = text[start:] + more, 0
            continue
        if separator not in ",]":
            yield line, text[start:after + 1]
            return
        yield line, text[start:end]
        line += text.count("\n", start, after)
        start = after + 1
        if separator == "]":
            break
    rest = text[start:] + file.read(CHUNK)
    if rest.strip():
        yield line, rest


def _parse(source: str) -> dict:
    """One JSON object, read strictly: no repeated keys, no NaN."""
    if len(source) > MAX_RECORD:
        raise BadRecord(f"the record is longer than {MAX_RECORD} characters; split or drop it")
    try:
        record = STRICT_JSON.decode(source)
    except RecursionError:
        raise BadRecord("the record is nested too deeply; flatten it") from None
    except ValueError as error:  # bad syntax, or an integer of thousands of digits
        reason = str(error).replace("line 1 ", "")  # within the record; its line in the file is named already
        raise BadRecord(f"the record is not JSON ({reason}); mend it (a compressed file must be named .gz)") from None
    if not isinstance(record, dict):
        raise BadRecord(f"the record is a JSON {type(record).__name__}, not an object; write {{\"prompt\": ...}}")
    return record


def _object(items: list[tuple[str, object]]) -> dict:
    record = dict(items)
    if len(record) < len(items):
        raise BadRecord("an object holds one key twice; remove one")
    return record


def _refuse_constant(name: str) -> None:
    raise BadRecord(f"{name} is no JSON number; leave the key out")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


# ---- records: from JSON objects to pairs -----------------------------------------------------------------------


def _shape(record: dict) -> str:
    if "responses" in record or "preferences" in record:
        return "ranked responses"
    if "conversations" in record:
        return "ShareGPT conversations"
    if "chosen" not in record and "rejected" not in record:
        return "prompts alone"
    if isinstance(record.get("chosen"), list):
        return "message lists"
    return "prompt, chosen, rejected" if "prompt" in record else "transcripts"


def _pairs(record: dict) -> list[PreferencePair]:
    prompt, responses, preferences = _comparison(record)
    margins = _numbers(record, "margin", None, -LARGEST_NUMBER, len(preferences))
    weights = _numbers(record, "weight", 1.0, SMALLEST_WEIGHT, len(preferences))
    return [
        PreferencePair(prompt, responses[winner], responses[loser], margin, weight)
        for (winner, loser), margin, weight in zip(preferences, margins, weights)
    ]


def _prompts(record: dict) -> list[str]:
    if _shape(record) != "prompts alone":
        return [_comparison(record)[0]]
    prompt = _key(record, "prompt")
    return [_render(_messages(prompt, "prompt")) + ASSISTANT if isinstance(prompt, list) else _text(prompt, "prompt")]


def _comparison(record: dict) -> tuple[str, list[str], list[list[int]]]:
    """Prompt, responses, and [winner, loser] indices of a record of any shape."""
    shape = _shape(record)
    if shape == "ranked responses":
        return _text(_key(record, "prompt"), "prompt"), *_ranking(record)
    chosen, rejected = _key(record, "chosen"), _key(record, "rejected")
    if shape == "ShareGPT conversations":
        prompt, responses = _split_messages(_key(record, "conversations"), [chosen], [rejected])
    elif shape == "message lists":
        prompt, responses = _split_messages(record.get("prompt", []), chosen, rejected)
    elif shape == "transcripts":
        prompt, responses = _split_transcripts(_text(chosen, "chosen"), _text(rejected, "rejected"))
    else:
        prompt = _text(_key(record, "prompt"), "prompt")
        responses = [_text(chosen, "chosen"), _text(rejected, "rejected")]
    return prompt, responses, [[0, 1]]


def _ranking(record: dict) -> tuple[list[str], list[list[int]]]:
    responses, preferences = _key(record, "responses"), _key(record, "preferences")
    if not isinstance(responses, list) or not isinstance(preferences, list) or not preferences:
        raise BadRecord('"responses" must be a list, "preferences" a list of [winner, loser]; mend the record')
    for pair in preferences:
        if not isinstance(pair, list) or len(pair) != 2 or any(type(index) is not int for index in pair):
            raise BadRecord('each of "preferences" must be two integers, [winner, loser]; mend the record')
        if not all(0 <= index < len(responses) for index in pair) or pair[0] == pair[1]:
            raise BadRecord(f'"preferences" must name two of the {len(responses)} responses, from 0; mend the record')
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


def _numbers(record: dict, key: str, default: float | None, lowest: float, count: int) -> list[float | None]:
    """`count` numbers from `record[key]`: a list of them, one for all, or the default."""
    value = record.get(key)
    if value is None:
        return [default] * count
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count or any(type(v) not in (int, float) or not lowest <= v <= LARGEST_NUMBER for v in values):
        raise BadRecord(f'"{key}" must be {lowest:g} to {LARGEST_NUMBER:g}, one number or one per preference; mend it')
    return [float(v) for v in values]
