"""The score of a response: from the reward model, or from a user-defined function."""

import reprlib
from collections.abc import Callable
from typing import NamedTuple

from minirlhf.model import Transformer
from minirlhf.model.transformer import sequence_scores
from minirlhf.rl.sampling import Samples, all_ids
from minirlhf.run.errors import UserError, call_users_function
from minirlhf.run.parallel import broadcast, by_rows, is_main

import torch
from torch import Tensor


class Reward(NamedTuple):
    """What gives scores: a reward model, or function(prompts, responses) -> one number each.

    A run of dpo can do without: then source is None, and evaluations have no scores.
    """

    name: str
    source: Transformer | Callable | None
    missing_eos_penalty: float  # subtracted if a response was cut by length


def score(reward: Reward, samples: Samples) -> Tensor:
    """[B] the score of each response, during training.

    Each process computes its share of a reward model's scores. A user-defined function is called
    once, in the main process, with all responses.
    """
    if isinstance(reward.source, Transformer):
        return by_rows(score_responses)(reward, samples)
    scores = broadcast(score_responses(reward, samples).cpu() if is_main() else None)
    return scores.to(samples.response_ids.device)


@torch.no_grad()
def score_responses(reward: Reward, samples: Samples) -> Tensor:
    """[B] the score of each response, float32, computed in this process. Raises UserError."""
    if isinstance(reward.source, Transformer):
        with reward.source.autocast():
            scores = sequence_scores(reward.source, *all_ids(samples))
    else:
        scores = call_function(reward, samples).to(samples.response_ids.device)
    is_unfinished = 1.0 - torch.tensor(samples.finished, dtype=torch.float32, device=scores.device)
    return scores - reward.missing_eos_penalty * is_unfinished


def call_function(reward: Reward, samples: Samples) -> Tensor:
    """[B] what the user's function returns, checked. Raises UserError."""
    assert reward.source is not None
    name = f"the reward function {reward.name}"
    result = call_users_function(name, reward.source, list(samples.prompts),
                                 list(samples.responses))
    expected = (len(samples.prompts),)
    try:
        scores = torch.as_tensor(result, dtype=torch.float32)
    except Exception:  # conversion runs the user's code too
        raise UserError(f"{name} returned {reprlib.repr(result)}; "
                        "it must return one number for each response") from None
    if scores.shape != expected:
        raise UserError(f"{name} returned shape {tuple(scores.shape)}; it must be {expected}")
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).nonzero()[0])  # the first one
        raise UserError(f"{name} returned {scores[bad]} for response {bad}: "
                        f"{samples.responses[bad][:60]!r}")
    return scores
