"""Preference files in, padded batches out: read and check, split by prompt, encode, drop and count, batch.

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
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, takewhile
from typing import NamedTuple, TextIO

import tiktoken
import torch
from torch import Tensor

from minirlhf.config import UserError
from minirlhf.seeding import derive_seed, generator

HUMAN, ASSISTANT, SYSTEM = "\n\nHuman:", "\n\nAssistant:", "\n\nSystem:"
SPEAKERS = {"user": HUMAN, "human": HUMAN, "assistant": ASSISTANT, "gpt": ASSISTANT, "system": SYSTEM}
MAX_RECORD = 16 * 2**20  # characters; bounds the memory that one hostile line can take, 1000 times a long dialogue
CHUNK = 2**16  # characters read, or encoded, at a time
LARGEST_NUMBER = 1e6  # margins and weights beyond it are mistakes, and 1e39 would be inf in float32
MAX_GROUP = 16  # responses; a file with one prompt throughout must not become one batch
SORTED_WINDOW = 16  # batches
BLANKS = re.compile(r"\s*")


class PreferencePair(NamedTuple):
    """A person preferred `chosen` to `rejected`, by `margin` (in units of the score; None: not said)."""

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None
    weight: float = 1.0


class PreferenceGroup(NamedTuple):
    """A prompt and its distinct responses as ids, and which was preferred to which."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]  # with EOS at the end unless cut
    pairs: tuple[tuple[int, int, float, float], ...]  # (winner, loser, margin or 0, weight); indices into responses


class PreferenceBatch(NamedTuple):
    """N right-padded sequences (prompt + response) and M pairs of their rows."""

    ids: Tensor  # [N, T] int64
    attention_mask: Tensor  # [N, T] bool
    chosen: Tensor  # [M] int64, row index
    rejected: Tensor  # [M] int64, row index
    margin: Tensor  # [M] float32
    weight: Tensor  # [M] float32


class BadRecord(Exception):
    """One record of a file, or what is left of the file, cannot be used."""


# ---- files: from bytes to records ------------------------------------------------------------------------------


def read_preferences(path: str, skip_bad_lines: bool = False) -> list[PreferencePair]:
    """All pairs of one file. Raises UserError "path:line: what is wrong; what to do"."""
    return read_records([path], skip_bad_lines)[0]


def read_records(paths: list[str], skip_bad_lines: bool = False) -> tuple[list[PreferencePair], int]:
    """All pairs of several files, each of its own shape, and the number of bad records skipped.

    With `skip_bad_lines` a bad record is counted and passed over; what follows a place where a file breaks off (a
    torn .gz, an array with a syntax error) counts as one. A file without a single usable record is always an error.
    """
    return _read(paths, skip_bad_lines, _pairs)


def read_prompts(path: str, skip_bad_lines: bool = False) -> list[str]:
    """The distinct prompts, in order, of a preference file or of a file of {"prompt": ...} records."""
    return list(dict.fromkeys(_read([path], skip_bad_lines, _prompts)[0]))


def _read(paths: list[str], skip_bad_lines: bool, convert: Callable[[dict], list]) -> tuple[list, int]:
    items, n_bad = [], 0
    for path in paths:
        found, problems = _read_file(path, skip_bad_lines, convert)
        if not found:
            reason = f"all {len(problems)} are bad, the first: {problems[0]}" if problems else "the file is empty"
            raise UserError(f"{path}: holds no usable record ({reason}); give JSON lines with prompt, chosen, rejected")
        items += found
        n_bad += len(problems)
    return items, n_bad


def _read_file(path: str, skip_bad_lines: bool, convert: Callable[[dict], list]) -> tuple[list, list[str]]:
    """What `convert` makes of each record, in one list, and what was wrong with the records skipped."""
    items, problems = [], []
    line, first_shape = 0, None

    def reject(problem: object) -> None:
        if not skip_bad_lines:
            raise UserError(f"{path}:{line}: {problem} (or pass --skip-bad-lines)")
        problems.append(str(problem))

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
    return items, problems


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
                    raise EOFError("the array does not end")
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
        record = json.loads(source, object_pairs_hook=_object, parse_constant=_refuse_constant)
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
    weights = _numbers(record, "weight", 1.0, 0.0, len(preferences))
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
        if not all(0 <= index < len(responses) for index in pair):
            raise BadRecord(f'"preferences" points outside the {len(responses)} responses; count them from 0')
        if pair[0] == pair[1]:
            raise BadRecord(f'"preferences" prefers response {pair[0]} to itself; drop that pair')
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
    """Prompt and responses in the template; without a prompt, it is what chosen and rejected share."""
    shown = _messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, "prompt")
    sides = [_messages(chosen, "chosen"), _messages(rejected, "rejected")]
    if not shown:
        return _split_transcripts(*map(_render, sides))
    # some files repeat the prompt in front of each response
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
        raise BadRecord(f'the key "{key}" is missing; add it, or see minirlhf/data.py for the shapes of a record')
    return record[key]


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f'"{key}" holds a JSON {type(value).__name__} where text is due; mend the record')
    try:
        value.encode()
    except UnicodeEncodeError:  # a byte that was no UTF-8, or an escape like \\ud800
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


# ---- prompts: distinct, and held out ---------------------------------------------------------------------------


def unique_prompts(pairs: list[PreferencePair]) -> list[str]:
    """The distinct prompts in order of first appearance."""
    return list(dict.fromkeys(pair.prompt for pair in pairs))


def split_holdout(
    pairs: list[PreferencePair], fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(train, held out): `fraction` of the prompts, rounded, is held out with all its pairs; neither side is empty.

    By prompt, so that no held-out figure is about a prompt that was trained on. Which prompts depends on the seed and
    their text alone, not on their order in the file. Raises UserError if there are fewer than two prompts.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie strictly between 0 and 1, is {fraction}")
    prompts = sorted(unique_prompts(pairs), key=lambda prompt: derive_seed(seed, "holdout", prompt))
    if len(prompts) < 2:
        raise UserError(f"the data has {len(prompts)} distinct prompts, too few to hold some out; give at least 2")
    heldout = set(prompts[:min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)])
    return [p for p in pairs if p.prompt not in heldout], [p for p in pairs if p.prompt in heldout]


# ---- ids: from text to groups ----------------------------------------------------------------------------------


def encode_preferences(
    pairs: list[PreferencePair], enc: tiktoken.Encoding, max_prompt_length: int, max_response_length: int
) -> tuple[list[PreferenceGroup], dict[str, int]]:
    """Groups of the pairs that follow each other with the same prompt, each distinct response encoded once; counts.

    Prompt and response are encoded separately, so that a response has the same ids here and when the policy samples
    it. A prompt longer than `max_prompt_length` ids loses its beginning; a response longer than
    `max_response_length` ids, EOS included, loses its end and gets no EOS. An empty prompt becomes a single EOS: the
    model needs one position from which to predict the first token, and that is how GPT-2 marks the start of a text.
    Pairs with a blank response, or identical after cutting, are dropped. Raises UserError if no pair is left.

    counts: read, kept, empty, identical (pairs; a blank one counts as empty), prompts_cut (groups), responses_cut
    (distinct responses in the kept pairs).
    """
    if min(max_prompt_length, max_response_length) < 1:
        raise ValueError(f"lengths must be at least 1, are {max_prompt_length} and {max_response_length}")
    groups, counts = [], dict.fromkeys(("read", "kept", "empty", "identical", "prompts_cut", "responses_cut"), 0)
    for prompt, run in groupby(pairs, key=lambda pair: pair.prompt):
        run = list(run)
        answered = [pair for pair in run if pair.chosen.strip() and pair.rejected.strip()]
        texts = {text for pair in answered for text in (pair.chosen, pair.rejected)}
        encoded = {text: _encode_response(enc, text, max_response_length) for text in texts}
        kept = [pair for pair in answered if encoded[pair.chosen] != encoded[pair.rejected]]
        counts["read"] += len(run)
        counts["empty"] += len(run) - len(answered)
        counts["identical"] += len(answered) - len(kept)
        counts["kept"] += len(kept)
        if kept:
            prompt_ids, was_cut = _encode_prompt(enc, prompt, max_prompt_length)
            counts["prompts_cut"] += was_cut
            groups += _groups(prompt_ids, encoded, kept)
    counts["responses_cut"] = sum(ids[-1] != enc.eot_token for group in groups for ids in group.responses)
    if not groups:
        raise UserError(f"no usable pair: {describe_counts(counts)}; check the data, or raise the maximum lengths")
    return groups, counts


def _groups(
    prompt: tuple[int, ...], encoded: dict[str, tuple[int, ...]], pairs: list[PreferencePair]
) -> Iterator[PreferenceGroup]:
    """The pairs of one prompt in groups of at most MAX_GROUP distinct responses: most often, in one."""
    rows, indices = {}, []
    for pair in pairs:
        both = encoded[pair.chosen], encoded[pair.rejected]
        if len(rows.keys() | set(both)) > MAX_GROUP:
            yield PreferenceGroup(prompt, tuple(rows), tuple(indices))
            rows, indices = {}, []
        winner, loser = [rows.setdefault(ids, len(rows)) for ids in both]
        indices.append((winner, loser, pair.margin or 0.0, pair.weight))
    yield PreferenceGroup(prompt, tuple(rows), tuple(indices))


def describe_counts(counts: dict[str, int]) -> str:
    """What `encode_preferences` kept, dropped and cut, in one line.

    >>> describe_counts({"read": 9, "kept": 6, "empty": 1, "identical": 2, "prompts_cut": 3, "responses_cut": 4})
    'kept 6 of 9 pairs (dropped: 1 with a blank response, 2 identical after cutting); cut 3 prompts and 4 responses'
    """
    return (
        "kept {kept} of {read} pairs (dropped: {empty} with a blank response, {identical} identical after cutting); "
        "cut {prompts_cut} prompts and {responses_cut} responses"
    ).format(**counts)


def encode_prompts(
    prompts: list[str], enc: tiktoken.Encoding, max_prompt_length: int
) -> tuple[list[list[int]], int]:
    """The ids of each prompt, cut as in `encode_preferences`, and how many were cut."""
    encoded = [_encode_prompt(enc, prompt, max_prompt_length) for prompt in prompts]
    return [list(ids) for ids, _ in encoded], sum(was_cut for _, was_cut in encoded)


def _encode_prompt(enc: tiktoken.Encoding, text: str, max_length: int) -> tuple[tuple[int, ...], bool]:
    """The last `max_length` ids of `text`, or a single EOS if it has none; and whether it had more."""
    ids = []
    for start in reversed(range(0, len(text), CHUNK)):  # in chunks: see _encode_response
        ids = enc.encode_ordinary(text[start:start + CHUNK]) + ids
        if len(ids) > max_length:
            break
    return tuple(ids[-max_length:]) or (enc.eot_token,), len(ids) > max_length


def _encode_response(enc: tiktoken.Encoding, text: str, max_length: int) -> tuple[int, ...]:
    """The ids of `text` and EOS; the first `max_length` of its ids if they are more.

    In chunks, because nobody should wait for the ids of megabytes that are cut away, and because tiktoken's regular
    expressions overflow their stack on a million blanks in a row. Text within one chunk gets tiktoken's own ids.
    """
    ids = []
    for start in range(0, len(text), CHUNK):
        ids += enc.encode_ordinary(text[start:start + CHUNK])
        if len(ids) >= max_length:
            return tuple(ids[:max_length])
    return *ids, enc.eot_token


# ---- batches: from groups to tensors ---------------------------------------------------------------------------


def collate_preferences(groups: list[PreferenceGroup], pad: int) -> PreferenceBatch:
    """One row for each response of each group, prompt and response joined; pairs point at rows."""
    sequences, pairs = [], []
    for group in groups:
        first = len(sequences)
        pairs += [(first + winner, first + loser, margin, weight) for winner, loser, margin, weight in group.pairs]
        sequences += [group.prompt + response for response in group.responses]
    ids, attention_mask = pad_right(sequences, pad)
    chosen, rejected, margin, weight = zip(*pairs)
    return PreferenceBatch(
        ids, attention_mask, torch.tensor(chosen), torch.tensor(rejected),
        torch.tensor(margin, dtype=torch.float32), torch.tensor(weight, dtype=torch.float32),
    )


def pad_right(sequences: list[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids [N, T] int64 with `pad` behind the shorter sequences, and the mask [N, T] bool of real tokens.

    >>> pad_right([[1, 2], [3]], pad=9)[0].tolist(), pad_left([[1, 2], [3]], pad=9)[0].tolist()
    ([[1, 2], [3, 9]], [[1, 2], [9, 3]])
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = torch.arange(lengths.max()) < lengths[:, None]
    ids = torch.full(mask.shape, pad)
    ids[mask] = torch.tensor([token for sequence in sequences for token in sequence])
    return ids, mask


def pad_left(sequences: list[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """As `pad_right`, with the padding in front: all sequences end in the last column."""
    ids, mask = pad_right([sequence[::-1] for sequence in sequences], pad)
    return ids.flip(1), mask.flip(1)


def epoch_batches(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices of one epoch in batches: each index once, the last batch perhaps smaller; a function of the seed.

    Padding costs as much as text, so items of similar length should share a batch; but sorted through and through,
    every epoch would make the same batches. So the items are shuffled, sorted by length within windows of 16 batches
    only, and the batches are shuffled again, lest lengths rise through each window. What is left over is the last.
    """
    random = generator(seed, "order", epoch)
    order = torch.randperm(len(lengths), generator=random).tolist()
    n_full = len(order) - len(order) % batch_size
    batches = []
    for start in range(0, n_full, SORTED_WINDOW * batch_size):
        window = sorted(order[start:min(start + SORTED_WINDOW * batch_size, n_full)], key=lengths.__getitem__)
        batches += [window[i:i + batch_size] for i in range(0, len(window), batch_size)]
    batches = [batches[i] for i in torch.randperm(len(batches), generator=random)]
    return batches + [order[n_full:]] if order[n_full:] else batches
