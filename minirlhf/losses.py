"""Every loss of the project, as small pure functions. They return sums with explicit denominators, so that the gradient
is the same however a minibatch is cut into micro-batches. What is masked is set to 0 before it is used, not after: the
gradient of where(mask, x * nan, 0) is nan."""

import torch
import torch.nn.functional as F
from torch import Tensor


def preference_loss(chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None,
                    centering: float = 0.0, weight: Tensor | None = None) -> Tensor:
    """-log sigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2, a weighted mean over pairs (Bradley and Terry 1952).

    chosen_scores, rejected_scores, margin, weight: [M]. Computed in float32 or better.

    >>> preference_loss(torch.zeros(3), torch.zeros(3)).item() == torch.log(torch.tensor(2.0)).item()
    True
    """
    chosen, rejected = (s.to(torch.promote_types(s.dtype, torch.float32)) for s in (chosen_scores, rejected_scores))
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -F.logsigmoid(difference) + centering * (chosen + rejected) ** 2
    return loss.mean() if weight is None else (weight * loss).sum() / weight.sum()


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor, denominator: float) -> Tensor:
    """-(1 / denominator) sum_t A_t log pi(a_t | s_t): its gradient is the policy gradient (Williams 1992).

    logprobs, advantages, mask: [B, R]. The denominator is fixed before sampling, (sequences) x (maximum response
    length): dividing by the tokens that happened to be sampled would be biased, since length goes with reward.
    """
    return -(torch.where(mask, logprobs, 0.0) * torch.where(mask, advantages, 0.0)).sum() / denominator


def ppo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float,
             denominator: float) -> Tensor:
    """-(1 / denominator) sum_t min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = pi / pi_old   (Schulman et al. 2017, eq. 7)

    At rho = 1 its gradient is that of policy_gradient_loss. Past the clip, a token that has moved far enough in the
    direction of its advantage moves no further: the rollout may be used again.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    advantages = torch.where(mask, advantages, 0.0)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum() / denominator


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float,
               denominator: float) -> Tensor:
    """(1 / denominator) sum_t 1/2 max((V - G)^2, (V_clipped - G)^2): V moves at most clip_range per rollout; 0: unclipped.

    The denominator is the number of real tokens of the whole minibatch. (Huang et al. 2024, detail 9.)
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    squared = (values - returns) ** 2
    if clip_range:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        squared = torch.maximum(squared, (clipped - returns) ** 2)
    return 0.5 * squared.sum() / denominator


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref per sampled token, nats: unbiased for KL(pi || ref), may be negative (Schulman 2020)."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """1/2 (log pi - log pi_ref)^2: biased as a number, but as a loss its gradient is that of KL(pi || ref)."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """pi_ref / pi - 1 - log(pi_ref / pi): unbiased and never negative; as a loss its gradient is that of KL(ref || pi)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the mask; unchanged by any amount of padding."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()
