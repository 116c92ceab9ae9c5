"""Estimates of the advantage: the weight on grad log pi(a_t | s_t). All [B, R], 0 beyond the mask.

    rewards [B, R]: per token, in units of the score.  values [B, R]: V(s_t), before action a_t.
    mask [B, R]: a prefix of ones, EOS included.  scores [B]: one for each response.
"""

from minirlhf.kernels import discounted_returns

import torch
from torch import Tensor


def full_return(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """R(tau) = sum_t gamma^t r_t, the same weight for every action of the trajectory.

    Unbiased for the gradient of E[R(tau)] at any gamma (Williams 1992).
    """
    return discounted_returns(rewards, mask, gamma)[:, :1] * mask


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = sum_{t' >= t} gamma^(t' - t) r_t': an action cannot change earlier rewards.

    Unbiased at gamma = 1, usually with less variance than the full return. At gamma < 1 the true
    gradient of E[R(tau)] has a factor gamma^t, which is left out here as in practice: biased.
    """
    return discounted_returns(rewards, mask, gamma)


def reward_to_go_minus_value(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t - V(s_t): better or worse than expected. A function of the state adds no bias."""
    return torch.where(mask, reward_to_go(rewards, mask, gamma) - values, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimation: Q(s_t, a_t) - V(s_t), trading bias for variance.

    A_t = sum_l (gamma lam)^l delta_{t+l},  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
    (Schulman et al. 2016, eq. 16.) lam = 1 is reward-to-go minus V.
    V after the last token is 0, whether the response ended or was cut: tokens that are never
    sampled have no reward. A cut response has the missing-EOS penalty in its score.
    """
    values = torch.where(mask, values, 0.0)
    delta = rewards - values
    delta[:, :-1].add_(values[:, 1:], alpha=gamma)
    return discounted_returns(delta, mask, gamma * lam)


def leave_one_out(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """RLOO: the undiscounted return minus the mean return of the other responses to the prompt.

    (Ahmadian et al. 2024.) Responses of a group are consecutive rows. The baseline does not depend
    on the response itself, so the estimate is unbiased, and no value network is needed.
    """
    total = torch.where(mask, rewards, 0.0).sum(1)
    groups = total.view(-1, group_size)
    groups = groups - groups[:, :1]  # so that equal returns give exact zeros at any size
    mean_of_others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - mean_of_others).view(-1, 1) * mask


def group_normalized(scores: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """GRPO: (score - mean) / (standard deviation + 1e-4) within the group (Shao et al. 2024).

    Biased: the standard deviation reweights prompts and depends on the action. (The mean includes
    the response itself. With K responses, that only scales all weights by (K - 1) / K.)
    Equal scores give exactly 0.
    """
    groups = scores.view(-1, group_size)
    # 1e-4: equal responses can have scores that differ by rounding, and must not get full weight
    return standardized(groups, correction=1, floor=1e-4).view(-1, 1) * mask


def preference_weights(scores: Tensor, log_ratios: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Online DPO: beta sigmoid(-beta d) for the response with the higher score, and minus that for
    the other one (Guo et al. 2024).

    Rows 2i and 2i + 1 answer the same prompt. log_ratios [B, R]: log pi -
    log pi_ref of each token, in nats. d: their sum over the better response minus that over the
    worse one. The weights are minus the derivatives of -log sigmoid(beta d) with respect to the
    log-probs, so the policy gradient with them is that of the DPO loss. A tie gives 0.
    """
    pairs = scores.view(-1, 2)
    better = (pairs - pairs.flip(1)).sign()  # +1, -1, or 0 for both
    sums = torch.where(mask, log_ratios, 0.0).sum(1).view(-1, 2)
    d = better * (sums - sums.flip(1))  # the same number for both
    return (better * beta * torch.sigmoid(-beta * d)).view(-1, 1) * mask


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over all tokens of the rollout.

    Equal advantages give exactly 0.
    """
    kept = standardized(advantages[mask], correction=0)
    return torch.zeros_like(advantages).masked_scatter(mask, kept)


def standardized(x: Tensor, correction: int, floor: float = 0.0) -> Tensor:
    """(x - mean) / (deviation + floor) over the last dimension; exactly 0 if all x are equal.

    correction: 1 divides the squares by their number minus 1, 0 by their number.
    """
    deviations = centered(x)
    std = deviations.std(-1, keepdim=True, correction=correction)
    return torch.where(std == 0, 0.0, deviations / (std + floor)).to(x.dtype)


def centered(x: Tensor) -> Tensor:
    """x - mean over the last dimension, float64; exactly 0 if all x are equal.

    The mean of equal float32 numbers is rounded, so another number is subtracted first. In float64
    the squares of neither large nor small float32 numbers leave the range.
    """
    x = in_float64(x)
    x = x - x[..., :1]
    return x - x.mean(-1, keepdim=True)


def in_float64(x: Tensor) -> Tensor:
    """x in float64, but unchanged on Apple's GPUs, which do not have it."""
    return x if x.device.type == "mps" else x.double()
