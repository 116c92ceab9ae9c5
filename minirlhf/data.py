"""Pairs in, padded batches out: split by prompt, encode, drop and count, batch. (records.py reads the files.)"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import tiktoken
import torch
from torch import Tensor

from minirlhf.flags import UserError
from minirlhf.records import PreferencePair as PreferencePair
from minirlhf.records import read_preferences as read_preferences  # with "as": this page offers it too
from minirlhf.seeding import derive_seed, generator

CHUNK = 2**16  # characters encoded at a time
MAX_GROUP = 16  # responses; a file with one prompt throughout must not become one batch
SORTED_WINDOW = 16  # batches: see epoch_batches
Ids = tuple[int, ...]


class PreferenceGroup(NamedTuple):
    """A prompt and its distinct responses as ids, and which was preferred to which."""

    prompt: Ids
    responses: tuple[Ids, ...]  # with EOS at the end unless cut
    pairs: tuple[tuple[int, int, float, float], ...]  # (winner, loser, margin or 0, weight); indices into responses


class PreferenceBatch(NamedTuple):
    """N right-padded sequences (prompt + response) and M pairs of their rows."""

    ids: Tensor  # [N, T] int64
    attention_mask: Tensor  # [N, T] bool
    chosen: Tensor  # [M] int64, row index
    rejected: Tensor  # [M] int64, row index
    margin: Tensor  # [M] float32
    weight: Tensor  # [M] float32


# ---- prompts: distinct, and held out ---------------------------------------------------------------------------


def unique_prompts(pairs: list[PreferencePair]) -> list[str]:
    """The distinct prompts in order of first appearance."""
    return list(dict.fromkeys(pair.prompt for pair in pairs))


def split_holdout(pairs: list[PreferencePair], fraction: float, seed: int) -> tuple[list[PreferencePair], list[PreferencePair]]:
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


def encode_preferences(pairs: list[PreferencePair], enc: tiktoken.Encoding, max_prompt_length: int,
                       max_response_length: int) -> tuple[list[PreferenceGroup], dict[str, int]]:
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
    answered = [pair for pair in pairs if pair.chosen.strip() and pair.rejected.strip()]
    groups: list[PreferenceGroup] = []
    prompts_cut = 0
    for prompt, run in groupby(answered, key=lambda pair: pair.prompt):
        neighbours = list(run)
        texts = {text for pair in neighbours for text in (pair.chosen, pair.rejected)}
        encoded = {text: _encode_response(enc, text, max_response_length) for text in texts}
        kept = [pair for pair in neighbours if encoded[pair.chosen] != encoded[pair.rejected]]
        if kept:
            prompt_ids, was_cut = _encode_prompt(enc, prompt, max_prompt_length)
            prompts_cut += was_cut
            groups += _groups(prompt_ids, encoded, kept)
    n_kept = sum(len(group.pairs) for group in groups)
    counts = dict(read=len(pairs), kept=n_kept, empty=len(pairs) - len(answered), identical=len(answered) - n_kept,
                  prompts_cut=prompts_cut,
                  responses_cut=sum(ids[-1] != enc.eot_token for group in groups for ids in group.responses))
    if not groups:
        raise UserError(f"no usable pair: {describe_counts(counts)}; check the data, or raise the maximum lengths")
    return groups, counts


def _groups(prompt: Ids, encoded: dict[str, Ids], pairs: list[PreferencePair]) -> Iterator[PreferenceGroup]:
    """The pairs of one prompt, in one group unless it has more than MAX_GROUP distinct responses."""
    rows: dict[Ids, int] = {}
    indices: list[tuple[int, int, float, float]] = []
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
    return ("kept {kept} of {read} pairs (dropped: {empty} with a blank response, {identical} identical after cutting); "
            "cut {prompts_cut} prompts and {responses_cut} responses").format(**counts)


def encode_prompts(prompts: list[str], enc: tiktoken.Encoding, max_prompt_length: int) -> tuple[list[list[int]], int]:
    """The ids of each prompt, cut as in `encode_preferences`, and how many were cut."""
    encoded = [_encode_prompt(enc, prompt, max_prompt_length) for prompt in prompts]
    return [list(ids) for ids, _ in encoded], sum(was_cut for _, was_cut in encoded)


def _encode_prompt(enc: tiktoken.Encoding, text: str, max_length: int) -> tuple[Ids, bool]:
    """The last `max_length` ids of `text`, or a single EOS if it has none; and whether it had more."""
    ids: list[int] = []
    for start in reversed(range(0, len(text), CHUNK)):  # in chunks: see _encode_response
        ids = enc.encode_ordinary(text[start:start + CHUNK]) + ids
        if len(ids) > max_length:
            break
    return tuple(ids[-max_length:]) or (enc.eot_token,), len(ids) > max_length


def _encode_response(enc: tiktoken.Encoding, text: str, max_length: int) -> Ids:
    """The ids of `text` and EOS; the first `max_length` of its ids if they are more.

    In chunks, because nobody should wait for the ids of megabytes that are cut away, and because tiktoken's regular
    expressions overflow their stack on a million blanks in a row. Text within one chunk gets tiktoken's own ids.
    """
    ids: list[int] = []
    for start in range(0, len(text), CHUNK):
        ids += enc.encode_ordinary(text[start:start + CHUNK])
        if len(ids) >= max_length:
            return tuple(ids[:max_length])
    return *ids, enc.eot_token


# ---- batches: from groups to tensors ---------------------------------------------------------------------------


def collate_preferences(groups: list[PreferenceGroup], pad: int, device: torch.device | str = "cpu") -> PreferenceBatch:
    """One row for each response of each group, prompt and response joined; pairs point at rows."""
    sequences: list[Ids] = []
    pairs: list[tuple[int, int, float, float]] = []
    for group in groups:
        first = len(sequences)
        pairs += [(first + winner, first + loser, margin, weight) for winner, loser, margin, weight in group.pairs]
        sequences += [group.prompt + response for response in group.responses]
    chosen, rejected, margin, weight = map(torch.tensor, zip(*pairs))
    tensors = *pad_right(sequences, pad), chosen, rejected, margin.float(), weight.float()
    return PreferenceBatch(*(tensor.to(device) for tensor in tensors))


def pad_right(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """ids [N, T] int64 with `pad` behind the shorter sequences, and the mask [N, T] bool of real tokens.

    >>> pad_right([[1, 2], [3]], pad=9)[0].tolist(), pad_left([[1, 2], [3]], pad=9)[0].tolist()
    ([[1, 2], [3, 9]], [[1, 2], [9, 3]])
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(mask.shape, pad)
    ids[mask] = torch.tensor([token for sequence in sequences for token in sequence])
    return ids, mask


def pad_left(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
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
