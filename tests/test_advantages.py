"""Advantages: values by hand, independence of padding, and general properties."""

import math

from minirlhf.config import PolicyConfig
from minirlhf.rl.advantages import (
    centered,
    full_return,
    gae,
    group_normalized,
    leave_one_out,
    preference_weights,
    reward_to_go,
    reward_to_go_minus_value,
    whiten,
)
from minirlhf.rl.algorithms import ALGORITHMS, estimate_advantages, explained_variance
from minirlhf.rl.rollout import Rollout

import pytest
import torch
from tiny import make_samples
from torch import Tensor

REWARDS = torch.tensor([[1.0, -2.0, 4.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
VALUES = torch.tensor([[0.5, 1.0, -1.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, False, False]])


def assert_close(actual: Tensor, expected: list[list[float]]) -> None:
    assert actual.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]


def make_rollout(
    rewards: Tensor = REWARDS,
    values: Tensor = VALUES,
    mask: Tensor = MASK,
    scores: Tensor | None = None,
) -> Rollout:
    """A rollout of which only rewards, values, scores and mask matter."""
    ids = torch.zeros(mask.shape, dtype=torch.long)
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    samples = make_samples(ids, mask, ids, mask)
    scores = rewards.sum(1) if scores is None else scores
    return Rollout(samples, zeros, zeros, values, scores, rewards, kl_coef=0.0)


def settings(algorithm: str, **changes) -> PolicyConfig:
    defaults = dict(group_size=2, gamma=0.5, lam=0.2)
    return PolicyConfig(algorithm=algorithm, **(defaults | changes))


def estimate(algorithm: str, rollout: Rollout, **changes) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of an algorithm."""
    config = settings(algorithm, **changes)
    rollout = estimate_advantages(ALGORITHMS[algorithm], rollout, config)
    return rollout.advantages, rollout.returns


SCORES = torch.tensor([1.0, 3.0], dtype=torch.float64)
FUNCTIONS = {  # each advantage as a function of rewards, values and mask
    "full_return": lambda r, v, m: full_return(r, m, 0.5),
    "reward_to_go": lambda r, v, m: reward_to_go(r, m, 0.5),
    "reward_to_go_minus_value": lambda r, v, m: reward_to_go_minus_value(r, v, m, 0.5),
    "gae": lambda r, v, m: gae(r, v, m, 0.5, 0.2),
    "leave_one_out": lambda r, v, m: leave_one_out(r, m, 2),
    "group_normalized": lambda r, v, m: group_normalized(SCORES, m, 2),
    "whiten": lambda r, v, m: whiten(r, m),
}
STD_OF_SCORES = 2**0.5 + 1e-4
BY_HAND = {
    "full_return": [[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]],  # 1 - 2/2 + 4/4
    "reward_to_go": [[1.0, 0.0, 4.0], [3.0, 0.0, 0.0]],
    "reward_to_go_minus_value": [[0.5, -1.0, 5.0], [1.0, 0.0, 0.0]],
    # deltas 1 + 0.5 - 0.5, -2 - 0.5 - 1, 4 + 1; gamma lam = 0.1
    "gae": [[0.7, -3.0, 5.0], [1.0, 0.0, 0.0]],
    "leave_one_out": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],  # both sums are 3
    "group_normalized": [[-1 / STD_OF_SCORES] * 3, [1 / STD_OF_SCORES, 0.0, 0.0]],
    "whiten": [[(x - 1.5) / 5.25**0.5 for x in (1.0, -2.0, 4.0)], [1.5 / 5.25**0.5, 0.0, 0.0]],
}


# ---- values by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_advantages_by_hand(name):
    """Catches a discount, index or sign that is off by one."""
    advantages = FUNCTIONS[name](REWARDS, VALUES, MASK)
    assert advantages.tolist() == [pytest.approx(row, abs=1e-7) for row in BY_HAND[name]]


def test_leave_one_out_by_hand():
    """The baseline uses the other responses of the same group, and no others."""
    rewards = torch.tensor([[1.0, 1.0], [5.0, 9.0], [6.0, 0.0], [1.0, 2.0], [1.0, 0.0], [1.0, 0.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1], [1, 0], [1, 0]]).bool()
    groups_of_3 = [[-3.5, -3.5], [1.0, 0.0], [2.5, 0.0], [2.0, 2.0], [-1.0, 0.0], [-1.0, 0.0]]
    assert_close(leave_one_out(rewards, mask, 3), groups_of_3)
    groups_of_2 = [[-3.0, -3.0], [3.0, 0.0], [3.0, 0.0], [-3.0, -3.0], [0.0, 0.0], [0.0, 0.0]]
    assert_close(leave_one_out(rewards, mask, 2), groups_of_2)


def test_group_normalized_by_hand():
    """Mean and standard deviation are those of one group, that is, of one prompt."""
    scores = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 40.0], dtype=torch.float64)
    advantages = group_normalized(scores, torch.ones(6, 1, dtype=torch.bool), 3)
    std = 300**0.5 + 1e-4  # of 10, 10, 40 around 20, divided by 3 - 1
    expected = [-1 / 1.0001, 0.0, 1 / 1.0001, -10 / std, -10 / std, 20 / std]
    assert_close(advantages, [[x] for x in expected])


def test_equal_scores_in_a_group_give_zero_advantage():
    """A standard deviation of 0 must not give NaN."""
    mask = torch.ones(4, 2, dtype=torch.bool)
    assert torch.equal(group_normalized(torch.full((4,), 3.0), mask, 4), torch.zeros(4, 2))


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [3.7, -0.1, 12345.6, 1e-7, 1e30, 1e-30])
def test_equal_values_of_any_size_give_exact_zeros(value, dtype):
    """Rounding in the mean gave advantages of -9.8 for equal scores of 12345.6.

    A policy then drifts although all its responses are equally good.
    """
    mask = torch.ones(64, 37, dtype=torch.bool)
    mask[::3, 20:] = False
    value = min(value, torch.finfo(dtype).max)
    same = torch.full((64, 37), value, dtype=dtype)
    assert (whiten(same, mask) == 0).all()
    assert (group_normalized(same[:, 0], mask, 4) == 0).all()
    assert (centered(same[:, 0]) == 0).all()
    at_the_start = torch.zeros(64, 37, dtype=dtype)
    at_the_start[:, 0] = value
    assert (leave_one_out(at_the_start, mask, 4) == 0).all()
    assert explained_variance(torch.randn(64, 37, dtype=dtype), same, mask) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e4, 1e30])
def test_different_values_of_any_size_keep_their_differences(size, dtype):
    """In float32 the square of 1e30 is infinite, and that of 1e-30 is 0.

    Only group_normalized has a fixed number in the denominator.
    """
    scores = torch.tensor([1.0, 2.0, 3.0, 2.0], dtype=torch.float64) * size
    scores = scores.to(dtype)
    if not (scores.isfinite().all() and scores.min() >= torch.finfo(dtype).tiny):
        return  # beyond float16
    mask = torch.ones(4, 1, dtype=torch.bool)
    expected = [-1.0, 0.0, 1.0, 0.0]
    error = 0.05 if dtype.itemsize == 2 else 1e-6
    advantages = group_normalized(scores, mask, 4)
    assert advantages.dtype == dtype
    deviation = size * 1.5**-0.5 + 1e-4
    of_group = [x * size / deviation for x in expected]
    assert advantages[:, 0].tolist() == pytest.approx(of_group, abs=error)
    whitened = whiten(scores[:, None], mask)[:, 0]
    assert whitened.tolist() == pytest.approx([x * 2**0.5 for x in expected], abs=error)
    returns = scores[:, None].float()
    half = explained_variance(returns / 2, returns, mask)  # G - V = G / 2
    assert half == pytest.approx(0.75, abs=error)


def test_discount_counts_from_the_current_step():
    """Rewards are -1 at step 1 and 100 at step 8.

    Catches a missing discount and one that counts from the end.
    """
    gamma = 0.9
    rewards = torch.zeros(1, 10, dtype=torch.float64)
    rewards[0, 1] = -1.0
    rewards[0, 8] = 100.0
    mask = torch.ones(1, 10, dtype=torch.bool)
    from_start = gamma * -1 + gamma**8 * 100
    returns = reward_to_go(rewards, mask, gamma)[0].tolist()
    assert returns[0] == pytest.approx(from_start, rel=1e-12)
    later = [gamma ** (8 - t) * 100 if t <= 8 else 0.0 for t in range(2, 10)]
    assert returns[2:] == pytest.approx(later, rel=1e-12)
    full = full_return(rewards, mask, gamma)
    assert full[0, 5].item() == pytest.approx(from_start, rel=1e-12)


# ---- generalized advantage estimation ------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.5, 0.0])
def test_gae_is_zero_if_rewards_are_fixed_and_values_are_true(gamma, lam):
    """Catches V at the wrong position, which gives advantages where there are none."""
    per_step = [2.0, -1.0, 0.0, 5.0, 3.0]
    length = len(per_step)
    true_values = [
        sum(gamma ** (k - t) * per_step[k] for k in range(t, length)) for t in range(length)
    ]
    rewards = torch.tensor([per_step], dtype=torch.float64).expand(3, -1)
    values = torch.tensor([true_values], dtype=torch.float64).expand(3, -1)
    mask = torch.ones(3, length, dtype=torch.bool)
    assert gae(rewards, values, mask, gamma, lam).abs().max() < 1e-12


def test_gae_at_lam_one_and_zero():
    """lam = 1 is reward-to-go minus V; lam = 0 is the one-step error."""
    expected = reward_to_go_minus_value(REWARDS, VALUES, MASK, 0.9)
    assert torch.allclose(gae(REWARDS, VALUES, MASK, 0.9, 1.0), expected)
    one_step = [[1 + 0.9 * 1.0 - 0.5, -2 + 0.9 * -1.0 - 1.0, 4 - -1.0], [3 - 2.0, 0.0, 0.0]]
    assert_close(gae(REWARDS, VALUES, MASK, 0.9, 0.0), one_step)


def test_a_response_cut_by_length_is_terminal():
    """V after the cut is not used, because no token after the cut is sampled or scored."""
    rewards = torch.tensor([[0.0, 2.0, 7.0]])
    values = torch.tensor([[1.0, 1.0, 9.0]])
    mask = torch.tensor([[True, True, False]])
    assert_close(gae(rewards, values, mask, 1.0, 0.0), [[0.0, 1.0, 0.0]])
    assert_close(gae(rewards, values, mask, 1.0, 1.0), [[1.0, 1.0, 0.0]])


# ---- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [float("nan"), 1e6, float("inf")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_padding_affects_no_advantage(name, padding):
    """Values after the last token have no effect, not even NaN."""
    dirty = [torch.where(MASK, tensor, padding) for tensor in (REWARDS, VALUES)]
    assert torch.equal(FUNCTIONS[name](*dirty, MASK), FUNCTIONS[name](REWARDS, VALUES, MASK))


def test_preference_weights_by_hand():
    """d is 3 - 1 = 2 and then -1 - 1 = -2, for the better response minus the worse; then a tie."""
    log_ratios = torch.tensor([[1, 2], [1, 9], [0.5, 0.5], [-1, 9], [1, 1], [2, 2]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    scores = torch.tensor([0.3, -0.5, 1.0, 4.0, 2.0, 2.0])
    weights = preference_weights(scores, log_ratios, mask, 0.5)
    first = 0.5 / (1 + math.exp(1.0))
    second = 0.5 / (1 + math.exp(-1.0))
    expected = torch.tensor([first, -first, -second, second, 0.0, 0.0])[:, None] * mask
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("padding", [float("nan"), 1e6, float("inf")])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_padding_affects_no_algorithm(algorithm, padding):
    """Also checks the returns, which add V: V after the last token can be any number."""
    dirty = make_rollout(
        torch.where(MASK, REWARDS, padding),
        torch.where(MASK, VALUES, padding),
        scores=REWARDS.sum(1),
    )
    for actual, expected in zip(estimate(algorithm, dirty), estimate(algorithm, make_rollout())):
        assert torch.equal(actual, expected)
        assert torch.equal(actual, torch.where(MASK, actual, 0.0))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_more_padding_changes_no_advantage(name):
    """Catches statistics over columns, which depend on the longest response of the batch."""
    wider = [torch.nn.functional.pad(tensor, (0, 3)) for tensor in (REWARDS, VALUES, MASK)]
    actual = FUNCTIONS[name](*wider)
    expected = FUNCTIONS[name](REWARDS, VALUES, MASK)
    assert torch.allclose(actual[:, :3], expected, rtol=1e-12)
    assert not actual[:, 3:].any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_advantage_changes_its_arguments(name):
    """A change in place would affect the next epoch and the log."""
    given = [torch.where(MASK, REWARDS, 7.0), torch.where(MASK, VALUES, 7.0), MASK.clone()]
    copies = [tensor.clone() for tensor in given]
    FUNCTIONS[name](*given)
    assert all(map(torch.equal, given, copies))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_response_of_one_token_works(algorithm):
    """Catches a squeeze too many and a standard deviation of one number."""
    copies = 2 if ALGORITHMS[algorithm].grouped else 1
    one_token = [tensor[1:, :1].repeat(copies, 1) for tensor in (REWARDS, VALUES, MASK)]
    advantages, returns = estimate(algorithm, make_rollout(*one_token))
    assert advantages.shape == returns.shape == (copies, 1)
    assert advantages.isfinite().all() and returns.isfinite().all()


# ---- whitening -----------------------------------------------------------------------------------


def test_whitening_uses_all_real_tokens_of_the_batch():
    """Catches padding in the statistics, and statistics of each row alone.

    The latter would remove the difference between good and bad responses.
    """
    whitened = whiten(REWARDS, MASK)
    assert whitened[MASK].mean().abs() < 1e-12
    assert whitened[MASK].std(correction=0) == pytest.approx(1.0, abs=1e-7)
    second_is_better = torch.where(torch.arange(2)[:, None] == 1, 2 * REWARDS, REWARDS)
    changed = whiten(second_is_better, MASK)
    assert changed[1, 0] > whitened[1, 0] + 0.1
    assert changed[0, 0] < whitened[0, 0]


def test_whitening_equal_advantages_gives_zero():
    """A standard deviation of 0 must not give NaN: all responses may have the same score."""
    same = torch.where(MASK, 3.0, 0.0)
    assert torch.equal(whiten(same, MASK), torch.zeros(2, 3))
    assert torch.equal(whiten(same[:1, :1], MASK[:1, :1]), torch.zeros(1, 1))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_whitening_follows_the_setting_and_never_changes_returns(algorithm):
    """ "auto" whitens for gae and ppo only. Whitened returns would be wrong targets for V."""
    estimates = {
        choice: estimate(algorithm, make_rollout(), whiten=choice)
        for choice in ("on", "off", "auto")
    }
    advantages = {choice: pair[0] for choice, pair in estimates.items()}
    assert torch.equal(advantages["on"], whiten(advantages["off"], MASK))
    same_as_auto = "on" if algorithm in ("gae", "ppo") else "off"
    assert torch.equal(advantages["auto"], advantages[same_as_auto])
    if ALGORITHMS[algorithm].learns_value:
        expected = torch.where(MASK, advantages["off"] + VALUES, 0.0)
    else:
        expected = reward_to_go(REWARDS, MASK, settings(algorithm).gamma)
    for _, returns in estimates.values():
        assert torch.equal(returns, expected)


@pytest.mark.parametrize(
    "algorithm, name",
    [
        ("reinforce", "full_return"),
        ("reward-to-go", "reward_to_go"),
        ("baseline", "reward_to_go_minus_value"),
        ("gae", "gae"),
        ("ppo", "gae"),
        ("rloo", "leave_one_out"),
        ("grpo", "group_normalized"),
    ],
)
def test_each_algorithm_uses_its_own_advantage(algorithm, name):
    """Catches lam in place of gamma, and the function of another algorithm."""
    advantages, _ = estimate(algorithm, make_rollout(scores=SCORES), whiten="off")
    assert_close(advantages, BY_HAND[name])


class OnMps(torch.Tensor):
    """A tensor that claims to be on Apple's GPU, where float64 does not exist."""

    device = torch.device("mps")

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


def test_statistics_need_no_float64_where_it_does_not_exist():
    x = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(
        centered(x.as_subclass(OnMps)).as_subclass(torch.Tensor), torch.tensor([-2.0, -1.0, 3.0])
    )
    assert centered(x).dtype == torch.float64


def test_scores_that_differ_by_rounding_have_next_to_no_weight():
    """Equal responses in batches of different shapes; full weight would be noise."""
    scores = 1.3 + torch.tensor([0.0, 1e-7, 0.0, 2e-7])
    advantages = group_normalized(scores, torch.ones(4, 1, dtype=torch.bool), 4)
    assert 0 < advantages.abs().max() < 0.01
