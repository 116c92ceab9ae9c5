"""Advantages: hand-computed numbers, what padding may not do, and what must hold whatever the numbers are."""

import pytest
import torch
from torch import Tensor

from minirlhf.advantages import full_return, gae, group_normalised, leave_one_out, reward_to_go, reward_to_go_minus_value, whiten
from minirlhf.config import PolicyConfig
from minirlhf.ladder import LADDER, advantages_and_returns
from minirlhf.rollout import Rollout

REWARDS = torch.tensor([[1.0, -2.0, 4.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
VALUES = torch.tensor([[0.5, 1.0, -1.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, False, False]])


def close(found: Tensor, wanted: list[list[float]]) -> None:
    assert found.tolist() == [pytest.approx(row, abs=1e-12) for row in wanted]


def rollout(rewards: Tensor = REWARDS, values: Tensor = VALUES, mask: Tensor = MASK,
            scores: Tensor | None = None) -> Rollout:
    """A rollout of which the rungs read rewards, values, scores and mask."""
    ids = torch.zeros(mask.shape, dtype=torch.long)
    blank = torch.zeros(mask.shape, dtype=torch.float64)
    return Rollout(ids, mask, ids, mask, blank, blank, values, rewards.sum(1) if scores is None else scores, rewards)


def settings(algorithm: str, **changes) -> PolicyConfig:
    return PolicyConfig(**(dict(algorithm=algorithm, group_size=2, gamma=0.5, lam=0.2) | changes))


FUNCTIONS = {  # every advantage as a function of rewards, values and mask
    "full_return": lambda r, v, m: full_return(r, m, 0.5),
    "reward_to_go": lambda r, v, m: reward_to_go(r, m, 0.5),
    "reward_to_go_minus_value": lambda r, v, m: reward_to_go_minus_value(r, v, m, 0.5),
    "gae": lambda r, v, m: gae(r, v, m, 0.5, 0.2),
    "leave_one_out": lambda r, v, m: leave_one_out(r, m, 2),
    "group_normalised": lambda r, v, m: group_normalised(torch.tensor([1.0, 3.0], dtype=torch.float64), m, 2),
    "whiten": lambda r, v, m: whiten(r, m),
}
BY_HAND = {
    "full_return": [[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]],  # 1 - 2/2 + 4/4
    "reward_to_go": [[1.0, 0.0, 4.0], [3.0, 0.0, 0.0]],
    "reward_to_go_minus_value": [[0.5, -1.0, 5.0], [1.0, 0.0, 0.0]],
    "gae": [[0.7, -3.0, 5.0], [1.0, 0.0, 0.0]],  # deltas 1 + 0.5 - 0.5, -2 - 0.5 - 1, 4 + 1; gamma lam = 0.1
    "leave_one_out": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],  # both total 3
    "group_normalised": [[-1 / (2 ** 0.5 + 1e-4)] * 3, [1 / (2 ** 0.5 + 1e-4), 0.0, 0.0]],  # scores 1 and 3
    "whiten": [[(x - 1.5) / 5.25 ** 0.5 for x in (1.0, -2.0, 4.0)], [1.5 / 5.25 ** 0.5, 0.0, 0.0]],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_by_hand(name):
    """The definition itself: a discount, index or sign that is off by one changes these numbers."""
    found = FUNCTIONS[name](REWARDS, VALUES, MASK)
    assert found.tolist() == [pytest.approx(row, abs=1e-7) for row in BY_HAND[name]]


def test_leave_one_out_by_hand():
    """A baseline that contains the response's own return, or a stranger's, is biased or does nothing."""
    rewards = torch.tensor([[1.0, 1.0], [5.0, 9.0], [6.0, 0.0], [1.0, 2.0], [1.0, 0.0], [1.0, 0.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1], [1, 0], [1, 0]]).bool()
    close(leave_one_out(rewards, mask, 3), [[-3.5, -3.5], [1.0, 0.0], [2.5, 0.0], [2.0, 2.0], [-1.0, 0.0], [-1.0, 0.0]])
    close(leave_one_out(rewards, mask, 2), [[-3.0, -3.0], [3.0, 0.0], [3.0, 0.0], [-3.0, -3.0], [0.0, 0.0], [0.0, 0.0]])


def test_group_normalised_by_hand():
    """Groups that straddle prompts, or a deviation over the whole batch, compare answers to different questions."""
    scores = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 40.0], dtype=torch.float64)
    found = group_normalised(scores, torch.ones(6, 1, dtype=torch.bool), 3)
    deviation = 300 ** 0.5  # of 10, 10, 40 around 20, divided by 3 - 1
    wanted = [-1 / 1.0001, 0.0, 1 / 1.0001, -10 / (deviation + 1e-4), -10 / (deviation + 1e-4), 20 / (deviation + 1e-4)]
    close(found, [[x] for x in wanted])


def test_equal_scores_in_a_group_give_no_advantage():
    """A deviation of 0 must not turn agreement into NaN, nor rounding into a gradient."""
    mask = torch.ones(4, 2, dtype=torch.bool)
    assert torch.equal(group_normalised(torch.full((4,), 3.0), mask, 4), torch.zeros(4, 2))


def test_discount_counts_from_the_rewarded_step():
    """-1 in column 1 and +100 in column 8, seen from column 0: a discount counted from the end, or none, pays more."""
    rewards = torch.zeros(1, 10, dtype=torch.float64)
    rewards[0, 1], rewards[0, 8] = -1.0, 100.0
    gamma = 0.9
    mask = torch.ones(1, 10, dtype=torch.bool)
    assert reward_to_go(rewards, mask, gamma)[0, 0].item() == pytest.approx(gamma * -1 + gamma ** 8 * 100, rel=1e-12)
    assert full_return(rewards, mask, gamma)[0, 5].item() == pytest.approx(gamma * -1 + gamma ** 8 * 100, rel=1e-12)
    assert reward_to_go(rewards, mask, gamma)[0, 2:].tolist() == pytest.approx(
        [gamma ** (8 - t) * 100 if t <= 8 else 0.0 for t in range(2, 10)], rel=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.5, 0.0])
def test_gae_is_nothing_when_actions_do_not_matter_and_values_are_true(gamma, lam):
    """V read one position late gave +5 everywhere in a known implementation, where every advantage is 0."""
    per_step, length = [2.0, -1.0, 0.0, 5.0, 3.0], 5
    rewards = torch.tensor([per_step], dtype=torch.float64).expand(3, -1)
    values = torch.tensor([[sum(gamma ** (k - t) * per_step[k] for k in range(t, length)) for t in range(length)]],
                          dtype=torch.float64).expand(3, -1)
    assert gae(rewards, values, torch.ones(3, length, dtype=torch.bool), gamma, lam).abs().max() < 1e-12


def test_gae_runs_from_one_step_errors_to_reward_to_go_minus_value():
    """lam missing from the recursion, or in place of gamma, keeps the middle plausible and breaks the two ends."""
    assert torch.allclose(gae(REWARDS, VALUES, MASK, 0.9, 1.0), reward_to_go_minus_value(REWARDS, VALUES, MASK, 0.9))
    one_step = [[1 + 0.9 * 1.0 - 0.5, -2 + 0.9 * -1.0 - 1.0, 4 - -1.0], [3 - 2.0, 0.0, 0.0]]
    close(gae(REWARDS, VALUES, MASK, 0.9, 0.0), one_step)


def test_a_response_cut_by_length_is_terminal():
    """Bootstrapping from V past the cut would pay the policy for what it might have said, which nobody has scored."""
    rewards, values = torch.tensor([[0.0, 2.0, 7.0]]), torch.tensor([[1.0, 1.0, 9.0]])
    mask = torch.tensor([[True, True, False]])
    close(gae(rewards, values, mask, 1.0, 0.0), [[0.0, 1.0, 0.0]])
    close(gae(rewards, values, mask, 1.0, 1.0), [[1.0, 1.0, 0.0]])


@pytest.mark.parametrize("garbage", [float("nan"), 1e6, float("inf")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_beyond_the_mask_is_read(name, garbage):
    """KL of padding once leaked into the returns of a published implementation."""
    dirty = [torch.where(MASK, tensor, garbage) for tensor in (REWARDS, VALUES)]
    assert torch.equal(FUNCTIONS[name](*dirty, MASK), FUNCTIONS[name](REWARDS, VALUES, MASK))


@pytest.mark.parametrize("garbage", [float("nan"), 1e6, float("inf")])
@pytest.mark.parametrize("algorithm", LADDER)
def test_no_rung_reads_beyond_the_mask(algorithm, garbage):
    """The rungs join clean functions: the returns for the value head add V, which may be anything past the mask."""
    dirty = rollout(torch.where(MASK, REWARDS, garbage), torch.where(MASK, VALUES, garbage), scores=REWARDS.sum(1))
    for found, wanted in zip(advantages_and_returns(LADDER[algorithm], dirty, settings(algorithm)),
                             advantages_and_returns(LADDER[algorithm], rollout(), settings(algorithm))):
        assert torch.equal(found, wanted)
        assert torch.equal(found, torch.where(MASK, found, 0.0))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_more_padding_changes_no_advantage(name):
    """A statistic taken over columns, not over real tokens, depends on how long the longest neighbour is."""
    wider = [torch.nn.functional.pad(tensor, (0, 3)) for tensor in (REWARDS, VALUES, MASK)]
    found, wanted = FUNCTIONS[name](*wider), FUNCTIONS[name](REWARDS, VALUES, MASK)
    assert torch.allclose(found[:, :3], wanted, rtol=1e-12) and not found[:, 3:].any()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_advantage_changes_its_arguments(name):
    """Whitening or masking in place would change what the next epoch, or the log, reads."""
    given = [torch.where(MASK, REWARDS, 7.0), torch.where(MASK, VALUES, 7.0), MASK.clone()]
    before = [tensor.clone() for tensor in given]
    FUNCTIONS[name](*given)
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize("algorithm", LADDER)
def test_the_shortest_response_works(algorithm):
    """A squeeze or a std over one token turns one response of one token into NaN or into a wrong shape."""
    copies = 2 if LADDER[algorithm].grouped else 1
    one = rollout(*(tensor[1:, :1].repeat(copies, 1) for tensor in (REWARDS, VALUES, MASK)))
    advantages, returns = advantages_and_returns(LADDER[algorithm], one, settings(algorithm))
    assert advantages.shape == returns.shape == one.rewards.shape
    assert advantages.isfinite().all() and returns.isfinite().all()


def test_whitening_uses_the_real_tokens_of_the_whole_batch():
    """Padding in the statistics shrinks every advantage; statistics per row remove which response was better."""
    kept = whiten(REWARDS, MASK)[MASK]
    assert kept.mean().abs() < 1e-12 and kept.std(correction=0) == pytest.approx(1.0, abs=1e-7)
    better = torch.where(torch.arange(2)[:, None] == 1, 2 * REWARDS, REWARDS)
    assert whiten(better, MASK)[1, 0] > whiten(REWARDS, MASK)[1, 0] + 0.1
    assert whiten(better, MASK)[0, 0] < whiten(REWARDS, MASK)[0, 0]


def test_whitening_equal_advantages_gives_zero():
    """A deviation of 0 must not become NaN: every reply may have the same score."""
    same = torch.where(MASK, 3.0, 0.0)
    assert torch.equal(whiten(same, MASK), torch.zeros(2, 3))
    assert torch.equal(whiten(same[:1, :1], MASK[:1, :1]), torch.zeros(1, 1))


@pytest.mark.parametrize("algorithm", LADDER)
def test_whitening_is_asked_for_or_the_rungs_own_and_never_touches_returns(algorithm):
    """Whitened returns would teach the value head numbers whose unit changes with every batch."""
    found = {choice: advantages_and_returns(LADDER[algorithm], rollout(), settings(algorithm, whiten=choice))
             for choice in ("on", "off", "auto")}
    assert torch.equal(found["on"][0], whiten(found["off"][0], MASK))
    assert torch.equal(found["auto"][0], found["on" if algorithm in ("gae", "ppo") else "off"][0])
    learnt = torch.where(MASK, found["off"][0] + VALUES, 0.0)
    expected = learnt if LADDER[algorithm].learns_value else reward_to_go(rollout().rewards, MASK, settings(algorithm).gamma)
    for _, returns in found.values():
        assert torch.equal(returns, expected)


@pytest.mark.parametrize("algorithm, name", [
    ("reinforce", "full_return"), ("reward-to-go", "reward_to_go"), ("baseline", "reward_to_go_minus_value"),
    ("gae", "gae"), ("ppo", "gae"), ("rloo", "leave_one_out"), ("grpo", "group_normalised")])
def test_each_rung_names_its_own_advantage(algorithm, name):
    """A rung that passes lam for gamma, or a neighbour's function, would still train."""
    scores = torch.tensor([1.0, 3.0], dtype=torch.float64)
    config = settings(algorithm, whiten="off")
    close(advantages_and_returns(LADDER[algorithm], rollout(scores=scores), config)[0], BY_HAND[name])
