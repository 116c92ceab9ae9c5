"""From preference files to checked pairs.

A file contains records, one per line (JSON lines) or in one JSON array, plain or as .gz. All
records of a file have the same shape. data/README.md lists the shapes with their sources:

    prompt       "prompt", "instruction" with "input", "question", "context", "conversations" or
                 "messages"; without one, the beginning that both responses share
    responses    "chosen" and "rejected"
                 "responses" and "preferences", a list of [winner, loser]
                 "response_1", "response_2" and "preference_strength"    (HelpSteer2)
                 "response1", "response2" and "overall_preference"    (HelpSteer3)
                 "response_0", "response_1" and "better_response_id"    (PKU-SafeRLHF)

A prompt or response is a text, a message {"role": "user", "content": "..."} or {"from", "value"},
or a list of messages. Texts under "prompt" and "chosen" are used as they are if the model has no
chat template. All others are messages: the template puts them together.

`margin` and `weight` are optional; in a ranked record each may be a list with one number per
preference. A tie is two preferences, one in each order, of weight 1/2. `system` (SYSTEM_KEYS) is a
system message before the prompt. Keys that would change the conversation and are not supported
(UNSUPPORTED, or a second prompt or judgment) make a record bad; other keys are ignored.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

from minirlhf.data.chat_templates import DIALOGUE, MARKED, ChatTemplate, Turn
from minirlhf.data.json_files import BadRecord, check_text, read_objects
from minirlhf.run.errors import UserError

ASSISTANT = DIALOGUE.opened("assistant")
SPEAKERS = dict(user="user", human="user", assistant="assistant", gpt="assistant", system="system")
PROMPT_KEYS = ("prompt", "instruction", "question", "context", "conversations", "messages")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
# The key of the label -> the keys of the two responses. A label of HelpSteer is -3 to 3: negative
# if the first response is better. PKU-SafeRLHF's is the index of the better one.
LABELS = {"preference_strength": ("response_1", "response_2"),
          "overall_preference": ("response1", "response2"),
          "better_response_id": ("response_0", "response_1")}
TEXT_KEYS = ("chosen", "rejected", "responses")  # of responses that can be plain texts
SPEAKER = re.compile(r"\n\n(System|Human|Assistant):")
LAST_NAME = re.compile(r"\n(\w+:)\s*$")  # who speaks next, which some responses repeat
HELPSTEER_TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")  # in a prompt of several turns
# Keys of a record or a message without which it would mean something else.
UNSUPPORTED = ("history", "tools", "tool_calls", "functions", "function_call", "documents",
               "image", "images", "video", "videos", "audio", "audios", "reasoning_content",
               "thinking", "chat_template_kwargs")
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


def read_preferences(path: str, skip_bad_lines: bool = False,
                     template: ChatTemplate = DIALOGUE) -> list[PreferencePair]:
    """All pairs of one file. Raises UserError "path:line: what is wrong; what to do"."""
    return read_records([path], skip_bad_lines, template)[0]


def read_records(paths: Sequence[str], skip_bad_lines: bool,
                 template: ChatTemplate = DIALOGUE) -> tuple[list[PreferencePair], int]:
    """(all pairs of several files, number of bad records skipped).

    Files may have different shapes. With `skip_bad_lines` bad records are counted and skipped;
    the rest of a file after damage counts as one record. A file without a usable record is always
    an error, and so is one with more than MAX_BAD_RECORDS bad records and fewer usable ones.
    """
    files = [_read(path, skip_bad_lines, _pairs, template) for path in paths]
    return [pair for pairs, _ in files for pair in pairs], sum(bad for _, bad in files)


def read_prompts(path: str, skip_bad_lines: bool = False,
                 template: ChatTemplate = DIALOGUE) -> list[str]:
    """The distinct prompts, in order, of a preference file or a file of {"prompt": ...} records."""
    return list(dict.fromkeys(_read(path, skip_bad_lines, _prompts, template)[0]))


def render_prompt(text: str, template: ChatTemplate) -> str:
    """The prompt for a text that a user wrote. Raises UserError."""
    try:
        return _as_texts(text.replace("\0", ""), [], "", template)[0]
    except BadRecord as problem:
        raise UserError(str(problem)) from None


def _read(path: str, skip_bad_lines: bool,
          convert: Callable[[dict, ChatTemplate], tuple[str, list]],
          template: ChatTemplate) -> tuple[list, int]:
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
            shape, converted = convert(record, template)
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
        skipped = f" ({bad} bad ones skipped)" if bad else ""
        raise UserError(f"{path}: contains no usable record{skipped}; see data/README.md#formats")
    return items, bad


# ---- records: from JSON objects to pairs ---------------------------------------------------------


def _pairs(record: dict, template: ChatTemplate) -> tuple[str, list[PreferencePair]]:
    answers, preferences, default_weights = _labels(record)
    count = len(preferences)
    margins: Sequence[float | None] = _numbers(record, "margin", -LARGEST_NUMBER, count)
    margins = margins or [None] * count
    weights = _numbers(record, "weight", SMALLEST_WEIGHT, count) or default_weights
    shape, prompt, responses = _texts(record, answers, template)
    return shape, [PreferencePair(prompt, responses[winner], responses[loser], margin, weight)
                   for (winner, loser), margin, weight in zip(preferences, margins, weights)]


def _prompts(record: dict, template: ChatTemplate) -> tuple[str, list[str]]:
    has_answers = record.keys() & {"chosen", "rejected", "responses", "preferences", *LABELS}
    answers = _labels(record)[0] if has_answers else []
    shape, prompt, _ = _texts(record, answers, template)
    return shape if answers else "prompts alone", [prompt]


def _labels(record: dict) -> tuple[list[tuple[str, object]], list[list[int]], list[float]]:
    """(key and value of each response, [winner, loser] indices of them, weights)."""
    if "responses" in record or "preferences" in record:
        responses, preferences = _ranking(record)
        return [("responses", each) for each in responses], preferences, [1.0] * len(preferences)
    label = next((key for key in LABELS if key in record), "")
    answers = [(key, _key(record, key)) for key in LABELS.get(label, ("chosen", "rejected"))]
    if not label:
        return answers, [[0, 1]], [1.0]
    value = record[label]
    is_index = label == "better_response_id"
    if type(value) is not int or value not in (range(2) if is_index else range(-3, 4)):
        raise BadRecord(f'"{label}" must be {"0 or 1" if is_index else "-3 to 3"}; fix the record')
    if value == 0 and not is_index:  # a tie
        return answers, [[0, 1], [1, 0]], [0.5, 0.5]
    first_wins = value == 0 if is_index else value < 0
    return answers, [[0, 1] if first_wins else [1, 0]], [1.0 if is_index else float(abs(value))]


def _ranking(record: dict) -> tuple[list, list[list[int]]]:
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
    return responses, preferences


# ---- prompts and responses: texts as they are, or messages in a template -------------------------


def _texts(record: dict, answers: list[tuple[str, object]],
           template: ChatTemplate) -> tuple[str, str, list[str]]:
    """(shape, prompt, responses) of a record. answers: key and value of each response."""
    keys = list(dict.fromkeys(key for key, _ in answers))
    prompt_key = next((key for key in PROMPT_KEYS if key in record), "")
    if not prompt_key and keys != ["chosen", "rejected"]:
        _key(record, "prompt")
    shape = ", ".join([prompt_key or "no prompt", *keys])
    prompt = record.get(prompt_key, "")
    # "messages" and "conversations" are no second prompt: some files repeat the conversation there.
    read = {prompt_key, "input"} if prompt_key == "instruction" else {prompt_key}
    second = [key for key in (*PROMPT_KEYS[:4], "input")
              if key not in read and record.get(key) != prompt]
    unread = [key for key in (*TEXT_KEYS, *LABELS)  # such as a pair next to a ranking
              if key not in keys and LABELS.get(key) != tuple(keys)]
    _refuse(record, [*UNSUPPORTED, *second, *unread])
    systems = [check_text(record[key], key) for key in SYSTEM_KEYS if record.get(key)]
    system = "\n".join(dict.fromkeys(systems))
    has_messages = any(isinstance(value, (list, dict)) for _, value in [("", prompt), *answers])
    if has_messages or prompt_key not in ("", "prompt") or not set(keys).issubset(TEXT_KEYS):
        if prompt_key == "instruction" and record.get("input"):
            prompt = f"{check_text(prompt, prompt_key)}\n{check_text(record['input'], 'input')}"
        turns = _turns(prompt, prompt_key, "user") if prompt_key else []
        role = "" if any(isinstance(value, (list, dict)) for _, value in answers) else "assistant"
        sides = [_turns(value, key, role) for key, value in answers]
        return f"{shape} as messages", *_as_messages(turns, sides, system, template)
    responses = [check_text(value, key) for key, value in answers]
    prefix = template.prefix()
    if MARKED.match(prefix) and str(prompt).startswith(prefix):  # by minirlhf.tools.label
        check_text(MARKED.sub("", str(prompt)), "prompt")
        return f"{shape} as texts", str(prompt), responses
    prompt = check_text(prompt, "prompt")
    if not prompt_key:
        if ASSISTANT not in responses[0]:  # not a transcript
            _key(record, "prompt")
        prompt, responses = _split_transcripts(*responses)
    elif len(prompt.split()) > 3 or all(response.startswith(prompt) for response in responses):
        # One response may begin with the words of a short prompt, but hardly with a long one.
        responses = [response.removeprefix(prompt) for response in responses]
    return f"{shape} as texts", *_as_texts(prompt, responses, system, template)


def _as_texts(prompt: str, responses: list[str], system: str,
              template: ChatTemplate) -> tuple[str, list[str]]:
    """(prompt, responses), unchanged without a chat template, or as a message or a dialogue."""
    is_dialogue = prompt.startswith("\n\n") and SPEAKER.match(prompt)
    if is_dialogue and SPEAKER.findall(prompt)[-1] != "Assistant":
        prompt += ASSISTANT
    if name := LAST_NAME.search(prompt):
        responses = [re.sub(rf"^\s*{name[1]}", "", response) for response in responses]
    if template.opening and template is not DIALOGUE:
        if prompt.startswith(MARKED.sub(r"\1", template.prefix())):
            raise BadRecord("the prompt already contains the chat template; give the message alone")
        if not is_dialogue:
            sides = [[("assistant", response.removeprefix(" "))] for response in responses]
            return _as_messages([("user", prompt)], sides, system, template)
        turns = _dialogue(prompt)
        if turns[-1] == ("assistant", ""):
            turns.pop()
        return _as_messages(turns, [_dialogue(ASSISTANT + each) for each in responses], system,
                            template)
    if system:
        first = DIALOGUE.message("system", system) if is_dialogue else f"{system}\n\n"
        prompt = first + prompt.removeprefix(first)  # some files have it in both places
    return template.start + prompt, responses


def _as_messages(turns: list[Turn], sides: list[list[Turn]], system: str,
                 template: ChatTemplate) -> tuple[str, list[str]]:
    """(prompt, responses) in the template.

    Without a prompt, it is the beginning that all sides share, up to an answer. Some files repeat
    the prompt in each response.
    """
    if not template.opening:
        raise BadRecord("messages need a chat template, and this base model has none; write texts "
                        "as prompt, chosen and rejected, or use an instruct model")
    shared = len(turns)
    if not turns:
        columns = zip(*sides)
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        while shared and not all(_is_answer(side[shared:]) for side in sides):
            shared -= 1
        if shared == 0:
            raise BadRecord('no prompt: chosen and rejected share nothing up to a message of the '
                            "assistant; add a prompt or drop the record")
        turns = sides[0][:shared]
    answers = [side[shared:] if side[:shared] == turns else side for side in sides]
    if turns[-1][0] == "assistant":
        raise BadRecord("the prompt ends with a message of the assistant; "
                        "remove it, or move it into the responses")
    if not all(map(_is_answer, answers)):
        raise BadRecord("after the prompt, chosen and rejected must continue with a message of "
                        "the assistant, and end with one; fix the record")
    if system and turns[0] != ("system", system):  # some files have it in both places
        turns = [("system", system), *turns]
    return template.prompt(turns), [template.response(answer) for answer in answers]


def _is_answer(turns: list[Turn]) -> bool:
    return bool(turns) and turns[0][0] == turns[-1][0] == "assistant"


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


def _dialogue(text: str) -> list[Turn]:
    """The turns of a transcript."""
    return [(role, said.strip()) for role, said in _named_turns(SPEAKER.split(text)[1:])]


def _named_turns(parts: list[str]) -> list[Turn]:
    """Turns from alternating names of speakers and texts."""
    return [(SPEAKERS[name.lower()], said) for name, said in zip(parts[::2], parts[1::2])]


def _turns(messages: object, key: str, role: str) -> list[Turn]:
    """The turns of a text (if it may be one: it has a role), of one message, or of a list."""
    if role and isinstance(messages, str):
        first, *parts = HELPSTEER_TURN.split(check_text(messages, key))
        return [(role, first.removeprefix(" ")), *_named_turns(parts)]
    messages = [messages] if isinstance(messages, dict) else messages
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise BadRecord(f'"{key}" must be a list of messages, '
                        '[{"role": "user", "content": "..."}]; fix the record')
    turns = []
    for message in messages:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in SPEAKERS:
            raise BadRecord(f'a message in "{key}" has the role {str(role)[:20]!r}; '
                            f'use one of {", ".join(SPEAKERS)}')
        _refuse(message, UNSUPPORTED)
        text = check_text(message.get("content", message.get("value")), key)
        turns.append((SPEAKERS[role], text))
    return turns


def _refuse(record: dict, keys: Iterable[str]) -> None:
    for key in keys:
        if record.get(key):
            raise BadRecord(f'"{key}" would change the prompt or response, but is not read; '
                            "write it into the text, or remove the key")


def _key(record: dict, key: str) -> object:
    if key not in record:
        raise BadRecord(f'the key "{key}" is missing, found {list(record)!r:.200}; '
                        "see data/README.md#formats")
    return record[key]


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
