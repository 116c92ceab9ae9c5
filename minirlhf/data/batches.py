"""From preference pairs to padded batches: encode, drop and count, batch, pad."""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from minirlhf.data.chat_templates import MARKED
from minirlhf.data.preference_files import PreferencePair
from minirlhf.data.prompts import chunks, encode_chunk, encode_prompt
from minirlhf.data.tokenizer import Ids
from minirlhf.run.errors import UserError
from minirlhf.run.seeding import generator

import tiktoken
import torch
from torch import Tensor

MAX_GROUP = 16  # responses; a file with a single prompt must not become one batch
SORTED_WINDOW = 16  # batches: see epoch_batches


class PreferenceGroup(NamedTuple):
    """A prompt with its distinct responses as ids, and which one was preferred to which."""

    prompt: Ids
    responses: tuple[Ids, ...]  # end with EOS unless cut
    # (winner, loser, margin or 0, weight); winner and loser are indices into responses
    pairs: tuple[tuple[int, int, float, float], ...]


class PreferenceBatch(NamedTuple):
    """N right-padded sequences (prompt + response) and M pairs of them."""

    ids: Tensor  # [N, T] int64
    attention_mask: Tensor  # [N, T] bool
    chosen: Tensor  # [M] int64, index of a sequence
    rejected: Tensor  # [M] int64, index of a sequence
    margin: Tensor  # [M] float32
    weight: Tensor  # [M] float32


# ---- from text to ids ----------------------------------------------------------------------------


def encode_preferences(pairs: list[PreferencePair], encoding: tiktoken.Encoding,
                       max_prompt_length: int, max_response_length: int,
                       ) -> tuple[list[PreferenceGroup], dict[str, int]]:
    """(groups, counts). Consecutive pairs with the same prompt form a group (see MAX_GROUP).

    Prompt and response are encoded separately, so a response has the same ids here and when the
    policy samples it. Lengths are in tokens: a longer prompt loses its beginning; a longer
    response (EOS included) loses its end and gets no EOS. An empty prompt becomes one EOS, because
    the model needs a position from which to predict the first token; GPT-2 starts texts this way.
    Pairs with a blank response, or with identical responses after cutting, are dropped.

    counts: read, kept, empty, identical, eos_text, no_blank (pairs; a blank response counts as
    empty), prompts and prompts_cut (distinct ones), responses_cut (distinct ones of a group).
    eos_text: EOS is written out in the text, as if a text of the training data had been split
    wrongly. no_blank: neither a blank nor a line break is between the prompt and a response.
    Raises UserError if no pair is left.
    """
    answered = [pair for pair in pairs if pair.chosen.strip() and pair.rejected.strip()]
    groups: list[PreferenceGroup] = []
    prompts_cut = set()
    for prompt, same_prompt in groupby(answered, key=lambda pair: pair.prompt):
        neighbors = list(same_prompt)
        texts = {text for pair in neighbors for text in (pair.chosen, pair.rejected)}
        encoded = {text: _encode_response(encoding, text, max_response_length) for text in texts}
        kept = [pair for pair in neighbors if encoded[pair.chosen] != encoded[pair.rejected]]
        if kept:
            prompt_ids, was_cut = encode_prompt(encoding, prompt, max_prompt_length)
            prompts_cut |= {prompt} if was_cut else set()
            groups += _groups(prompt_ids, encoded, kept)
    kept_pairs = sum(len(group.pairs) for group in groups)
    eos = encoding.eot_token
    eos_text = encoding.decode_single_token_bytes(eos).decode()
    with_eos_text = sum(any(eos_text in MARKED.sub("", text) for text in pair[:3])
                        for pair in pairs)
    no_blank = sum(bool(pair.prompt[-1:].strip() and (pair.chosen[0] + pair.rejected[0]).strip())
                   for pair in answered)
    responses_cut = sum(ids[-1] != eos for group in groups for ids in group.responses)
    counts = dict(read=len(pairs), kept=kept_pairs, empty=len(pairs) - len(answered),
                  identical=len(answered) - kept_pairs,
                  prompts=len({pair.prompt for pair in answered}), prompts_cut=len(prompts_cut),
                  responses_cut=responses_cut, eos_text=with_eos_text, no_blank=no_blank)
    if not groups:
        raise UserError(f"no usable pair: {describe_counts(counts)}; "
                        "check the data, or raise the maximum lengths")
    return groups, counts


def _groups(prompt: Ids, encoded: dict[str, Ids],
            pairs: list[PreferencePair]) -> Iterator[PreferenceGroup]:
    """The pairs of one prompt: one group, or several if it has more than MAX_GROUP responses."""
    index: dict[Ids, int] = {}
    indexed: list[tuple[int, int, float, float]] = []
    for pair in pairs:
        both = encoded[pair.chosen], encoded[pair.rejected]
        if len(index.keys() | set(both)) > MAX_GROUP:
            yield PreferenceGroup(prompt, tuple(index), tuple(indexed))
            index = {}
            indexed = []
        winner, loser = [index.setdefault(ids, len(index)) for ids in both]
        indexed.append((winner, loser, pair.margin or 0.0, pair.weight))
    yield PreferenceGroup(prompt, tuple(index), tuple(indexed))


def describe_counts(counts: dict[str, int]) -> str:
    """The counts of encode_preferences in one line.

    >>> describe_counts({"read": 9, "kept": 6, "empty": 1, "identical": 2,
    ...                  "prompts": 6, "prompts_cut": 3, "responses_cut": 4, "eos_text": 0,
    ...                  "no_blank": 0})
    'kept 6 of 9 pairs (dropped: 1 blank, 2 identical after cutting); cut 3 prompts, 4 responses'
    """
    text = ("kept {kept} of {read} pairs (dropped: {empty} blank, {identical} identical after "
            "cutting); cut {prompts_cut} prompts, {responses_cut} responses")
    if counts["eos_text"]:
        text += "; {eos_text} pairs contain the name of EOS, which is read as ordinary text"
    if 2 * counts["prompts_cut"] > counts["prompts"]:
        text += "; warning: most prompts are cut; raise --max-prompt-length"
    if counts["no_blank"]:
        text += "; warning: {no_blank} pairs lack a blank between prompt and response; add it"
    return text.format(**counts)


def _encode_response(encoding: tiktoken.Encoding, text: str, max_length: int) -> Ids:
    """The ids of the text and EOS, or the first max_length ids if they are more.

    Text is encoded in chunks: megabytes that are cut anyway should not be encoded, and tiktoken's
    regular expression overflows its stack on a million spaces. Within a chunk the ids are
    tiktoken's own; at a chunk boundary they may differ from those of the whole text.
    """
    ids: list[int] = []
    for chunk in chunks(text):
        ids += encode_chunk(encoding, *chunk)
        if len(ids) >= max_length:
            return tuple(ids[:max_length])
    return *ids, encoding.eot_token


# ---- from groups to tensors ----------------------------------------------------------------------


def collate_preferences(groups: list[PreferenceGroup], pad: int,
                        device: torch.device | str = "cpu") -> PreferenceBatch:
    """One sequence (prompt + response) for each response of each group.

    chosen and rejected are indices of sequences.
    """
    sequences: list[Ids] = []
    pairs: list[tuple[int, int, float, float]] = []
    for group in groups:
        first = len(sequences)
        pairs += [(first + winner, first + loser, margin, weight)
                  for winner, loser, margin, weight in group.pairs]
        sequences += [group.prompt + response for response in group.responses]
    chosen, rejected, margin, weight = map(torch.tensor, zip(*pairs))
    ids, mask = pad_right(sequences, pad)
    tensors = ids, mask, chosen, rejected, margin.float(), weight.float()
    return PreferenceBatch(*(tensor.to(device) for tensor in tensors))


def pad_right(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids [N, T] int64, mask [N, T] bool): shorter sequences are filled up with `pad`.

    >>> pad_right([[1, 2], [3]], pad=9)[0].tolist(), pad_left([[1, 2], [3]], pad=9)[0].tolist()
    ([[1, 2], [3, 9]], [[1, 2], [9, 3]])
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(mask.shape, pad)
    ids[mask] = torch.tensor([token for sequence in sequences for token in sequence])
    return ids, mask


def pad_left(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """pad_right with the padding before the tokens: all sequences end in the last column."""
    ids, mask = pad_right([sequence[::-1] for sequence in sequences], pad)
    return ids.flip(1), mask.flip(1)


def epoch_batches(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices of one epoch in batches, a function of seed and epoch. The last may be smaller.

    Items of similar length should share a batch, but fully sorted items would form the same
    batches in every epoch. So the items are shuffled, sorted by length within windows of 16
    batches, and then the order of the batches is shuffled.
    """
    random = generator(seed, "order", epoch)
    order = torch.randperm(len(lengths), generator=random).tolist()
    full = len(order) - len(order) % batch_size
    batches = []
    for start in range(0, full, SORTED_WINDOW * batch_size):
        window = order[start:min(start + SORTED_WINDOW * batch_size, full)]
        window = sorted(window, key=lengths.__getitem__)
        batches += [window[i:i + batch_size] for i in range(0, len(window), batch_size)]
    batches = [batches[i] for i in torch.randperm(len(batches), generator=random)]
    return batches + [order[full:]] if order[full:] else batches


def batch_schedule(lengths: list[int], batch_size: int, seed: int) -> Callable[[int], list[int]]:
    """A function from a step to the indices of its batch.

    It has no state, so a resumed run needs only the number of the step.
    """
    per_epoch = -(-len(lengths) // batch_size)
    batches_of = functools.lru_cache(maxsize=1)(
        lambda epoch: epoch_batches(lengths, batch_size, seed, epoch))
    return lambda step: batches_of(step // per_epoch)[step % per_epoch]
