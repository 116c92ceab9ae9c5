"""Prompts: distinct ones of a data set, their ids, and which of them an iteration uses."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minirlhf.data.chat_templates import MARKED
from minirlhf.data.preference_files import PreferencePair
from minirlhf.data.tokenizer import CHUNK, Ids
from minirlhf.run.seeding import generator
from minirlhf.run.terminal import echo

import tiktoken
import torch


class Prompts(NamedTuple):
    """The same prompts as texts and as ids."""

    texts: list[str]
    ids: list[Ids]

    def rows(self, chosen: Sequence[int]) -> "Prompts":
        """The prompts with these indices."""
        return Prompts([self.texts[i] for i in chosen], [self.ids[i] for i in chosen])

    def first(self, count: int) -> "Prompts":
        """The first `count` prompts."""
        return Prompts(self.texts[:count], self.ids[:count])


def unique_prompts(pairs: list[PreferencePair]) -> list[str]:
    """The distinct prompts in order of first appearance."""
    return list(dict.fromkeys(pair.prompt for pair in pairs))


def warn_of_shared_prompts(train: Iterable[Ids], heldout: Iterable[Ids],
                           test: Iterable[Ids]) -> None:
    """Print how many prompts of the evaluations are also trained on, as the model sees them.

    Two texts whose last max_prompt_length tokens are equal are one prompt for the model. This is
    not an error: whether a model can learn its training data by heart is a useful test.
    """
    trained = set(train)
    for name, prompts in (("held-out", set(heldout)), ("test", set(test))):
        if shared := len(prompts & trained):
            echo(f"warning: {shared} of {len(prompts)} {name} prompts are also trained on "
                 "(compared after cutting to --max-prompt-length), "
                 f"so {name} results do not show how the model does on new prompts")


def encode_prompts(texts: list[str], encoding: tiktoken.Encoding,
                   max_prompt_length: int) -> Prompts:
    """The prompts with the last max_prompt_length of their ids."""
    return Prompts([without_marks(text) for text in texts],
                   [encode_prompt(encoding, text, max_prompt_length)[0] for text in texts])


def encode_prompt(encoding: tiktoken.Encoding, text: str, max_length: int) -> tuple[Ids, bool]:
    """(ids, was_cut): the last max_length ids, or one EOS if the text is empty."""
    ids: list[int] = []
    for chunk in reversed(chunks(text)):  # the end first: a long beginning is cut
        ids = encode_chunk(encoding, *chunk) + ids
        if len(ids) > max_length:
            break
    return tuple(ids[-max_length:]) or (encoding.eot_token,), len(ids) > max_length


def chunks(text: str) -> list[tuple[str, bool]]:
    """(part, is it a special token of the chat template?) of parts of at most CHUNK characters.

    >>> chunks("\\0<|im_start|>\\0user")
    [('<|im_start|>', True), ('user', False)]
    """
    return [(part[start:start + CHUNK], number % 2 == 1)
            for number, part in enumerate(MARKED.split(text))
            for start in range(0, len(part), CHUNK)]


def encode_chunk(encoding: tiktoken.Encoding, part: str, is_special: bool) -> list[int]:
    """The ids of one part."""
    return [encoding.encode_single_token(part)] if is_special else encoding.encode_ordinary(part)


def without_marks(text: str) -> str:
    """The text as the model sees it, with special tokens as text."""
    return MARKED.sub(r"\1", text)


def prompts_of_step(prompts: Prompts, count: int, copies: int, seed: int, step: int) -> Prompts:
    """The prompts of one iteration (step from 0), a function of the step alone.

    They are the next `count` of an endless sequence of shuffled passes over all prompts; each
    occurs `copies` times in consecutive rows.
    """
    total = len(prompts.texts)
    chosen: list[int] = []
    order: list[int] = []
    for position in range(step * count, (step + 1) * count):
        if not order or position % total == 0:
            shuffle = generator(seed, "prompts", position // total)
            order = torch.randperm(total, generator=shuffle).tolist()
        chosen += [order[position % total]] * copies
    return prompts.rows(chosen)
