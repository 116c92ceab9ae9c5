"""Identities of estimators, exact over all responses of a small world, in float64.

"On-policy": the responses come from the policy that is differentiated.
"""

import math

from minirlhf.lab import small_world
from minirlhf.lab.small_world import (
    batch_gradients,
    gradient,
    list_batches,
    make_world,
    move,
    probabilities,
    random_logits,
    random_scores,
    response_kl,
    state_kl,
    token_logprobs,
)

import pytest
import torch
from torch import Tensor

EXACT = 1e-9  # relative error

WORLD = make_world()
REF = random_logits(WORLD, 0, "reference")
PI = move(WORLD, REF, seed=0, kl=0.5)
OLD = move(WORLD, PI, seed=1, kl=0.05)
SCORES = random_scores(WORLD, 0)
ONE = torch.arange(len(SCORES))[:, None]  # batches of one response


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


# ---- the world -----------------------------------------------------------------------------------


def test_the_world_lists_every_response_once():
    rows = zip(WORLD.response_ids.tolist(), WORLD.mask.sum(1).tolist())
    responses = [tuple(ids[:length]) for ids, length in rows]
    assert len(set(responses)) == len(responses) == 1 + 3 + 9 + 27 + 81
    assert [3] in [list(response) for response in responses]  # EOS alone
    assert all(3 not in response[:-1] for response in responses)
    assert all(response[-1] == 3 or len(response) == 4 for response in responses)
    assert float(probabilities(WORLD, PI).sum()) == pytest.approx(1, rel=EXACT)


def test_a_state_is_the_response_so_far():
    prefixes: dict[int, set] = {}
    for ids, states, length in zip(WORLD.response_ids, WORLD.states, WORLD.mask.sum(1)):
        for t in range(int(length)):
            prefixes.setdefault(int(states[t]), set()).add(tuple(ids[:t].tolist()))
    assert len(prefixes) == WORLD.state_count == 40
    assert all(len(each) == 1 for each in prefixes.values())


def test_a_requested_kl_is_reached():
    assert float(response_kl(WORLD, PI, REF)) == pytest.approx(0.5, abs=1e-12)
    assert float(response_kl(WORLD, OLD, PI)) == pytest.approx(0.05, abs=1e-12)
    assert float(state_kl(WORLD, PI, REF)) == pytest.approx(0.5, abs=1e-12)  # the chain rule


def test_exact_gradients_agree_with_finite_differences():
    def function(logits: Tensor) -> Tensor:
        return response_kl(WORLD, logits, REF)

    exact = gradient(function, PI)
    for index in (0, 5, 77, 159):
        step = torch.zeros_like(PI)
        step.view(-1)[index] = 1e-5
        slope = (function(PI + step) - function(PI - step)) / 2e-5
        assert float(slope) == pytest.approx(float(exact[index]), rel=1e-6, abs=1e-9)


def test_batches_are_listed_with_their_number_of_orders():
    rows, orders = list_batches(5, 3)
    assert len(rows) == math.comb(7, 3) and float(orders.sum()) == 5**3


def test_gradients_of_batches_are_those_of_autograd():
    """A loss that is not linear in the log-probs, and groups of two."""
    rows = torch.tensor([[3, 90], [7, 7]])
    gradients = batch_gradients(WORLD, PI, rows, lambda x: (x.view(2, -1).sum(1) ** 2).sum())
    for row, actual in zip(rows, gradients):
        expected = gradient(lambda x, row=row: token_logprobs(WORLD, x)[row].sum() ** 2, PI)
        assert error(actual, expected) < EXACT
    assert small_world.make_rollout(WORLD, PI, REF, SCORES, rows.flatten()).mask.shape == (4, 4)
