"""The ladder's estimates of the advantage: the weight on grad log pi(a_t | s_t). All [B, R], 0 outside the mask.

    rewards [B, R]: per token, in units of the score.  values [B, R]: V(s_t), before action a_t.
    mask [B, R]: a prefix of ones, EOS included.  scores [B]: one per response.
"""

import torch
from torch import Tensor

from minirlhf.kernels import discounted_returns


def full_return(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """R(tau) = sum_t gamma^t r_t, the same weight for every action of the trajectory.

    Unbiased for the gradient of E[R(tau)] (Williams 1992), at any gamma.
    """
    return discounted_returns(rewards, mask, gamma)[:, :1] * mask


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = sum_{t' >= t} gamma^(t' - t) r_t': an action cannot change the rewards before it.

    Unbiased at gamma = 1, and as a rule of less variance than the full return. At gamma < 1 the true gradient of E[R(tau)] has a
    factor gamma^t in front, which is left out here, as everywhere in practice: biased.
    """
    return discounted_returns(rewards, mask, gamma)


def reward_to_go_minus_value(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t - V(s_t): how much better than expected from here. Any function of the state leaves the mean unchanged."""
    return torch.where(mask, reward_to_go(rewards, mask, gamma) - values, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates: Q(s_t, a_t) - V(s_t), with bias traded for variance.

    A_t = sum_l (gamma lam)^l delta_{t+l},  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)   (Schulman et al. 2016, eq. 16)
    V past the last sampled token is 0: a response is over when it ends or is cut, and nothing is bootstrapped, because
    what is never written earns nothing; a cut one's score has the missing-EOS penalty subtracted.
    lam = 1 is reward-to-go minus V.
    """
    values = torch.where(mask, values, 0.0)
    delta = rewards - values  # beyond the mask the scan reads none of it
    delta[:, :-1].add_(values[:, 1:], alpha=gamma)
    return discounted_returns(delta, mask, gamma * lam)


def leave_one_out(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """RLOO: total return, undiscounted, minus the mean of its siblings' (Ahmadian et al. 2024); siblings are consecutive rows.

    A baseline without a value network: the siblings know nothing of this response, so the estimate stays unbiased.
    """
    total = torch.where(mask, rewards, 0.0).sum(1)
    groups = total.view(-1, group_size)
    siblings = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - siblings).view(-1, 1) * mask


def group_normalised(scores: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """GRPO: (score - mean) / deviation within the group (Shao et al. 2024). Biased: the deviation reweights
    prompts and depends on the action (the own score in the mean only scales all weights alike). Equal scores give 0."""
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1) * mask


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the real tokens of the whole rollout; all-equal advantages give 0, not NaN."""
    kept = advantages[mask]
    deviation = kept.std(correction=0)
    return torch.where(mask, (advantages - kept.mean()) / (deviation + 1e-8), 0.0)
