"""All losses, as small pure functions.

The policy and value losses are sums divided by an explicit denominator, so that the gradient does
not depend on how a minibatch is split into micro-batches. Values beyond the mask are set to 0
before they are used, because the gradient of where(mask, x * nan, 0) is NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def preference_loss(chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None,
                    centering: float = 0.0, weight: Tensor | None = None) -> Tensor:
    """-log sigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2, a weighted mean over pairs.

    (Bradley and Terry 1952.) chosen_scores, rejected_scores, margin, weight: [M].
    Computed in float32 or better.

    >>> loss = preference_loss(torch.zeros(3), torch.zeros(3))
    >>> loss.item() == torch.log(torch.tensor(2.0)).item()
    True
    """
    exact = torch.promote_types(chosen_scores.dtype, torch.float32)
    chosen = chosen_scores.to(exact)
    rejected = rejected_scores.to(exact)
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    loss = -F.logsigmoid(difference) + centering * (chosen + rejected) ** 2
    return loss.mean() if weight is None else (weight * loss).sum() / weight.sum()


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor,
                         denominator: float) -> Tensor:
    """-(1 / denominator) sum_t A_t log pi(a_t | s_t): its gradient is the policy gradient.

    (Williams 1992.) logprobs, advantages, mask: [B, R].
    The denominator is fixed before sampling: (sequences) x (maximum response length). Dividing by
    the number of sampled tokens would be biased, because it depends on the actions.
    """
    weighted = torch.where(mask, logprobs, 0.0) * torch.where(mask, advantages, 0.0)
    return -weighted.sum() / denominator


def ppo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
             clip_range: float, denominator: float) -> Tensor:
    """-(1 / denominator) sum_t min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = pi / pi_old.

    (Schulman et al. 2017, eq. 7.) At rho = 1 the gradient is that of policy_gradient_loss. A token
    that has moved far enough in the direction of its advantage gets no more gradient, so the
    rollout can be used for several steps.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    advantages = torch.where(mask, advantages, 0.0)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum() / denominator


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
               clip_range: float, denominator: float) -> Tensor:
    """(1 / denominator) sum_t 1/2 max((V - G)^2, (V_clipped - G)^2).

    V_clipped moves at most clip_range from the old value; 0 means no clipping.
    (Huang et al. 2024, detail 9.) denominator: the real tokens of the whole minibatch.
    """
    values = torch.where(mask, values, 0.0)
    old_values = torch.where(mask, old_values, 0.0)
    returns = torch.where(mask, returns, 0.0)
    squared = (values - returns) ** 2
    if clip_range:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        squared = torch.maximum(squared, (clipped - returns) ** 2)
    return 0.5 * squared.sum() / denominator


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref of the sampled token, nats.

    Unbiased for KL(pi || ref); may be negative (Schulman 2020).
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """1/2 (log pi - log pi_ref)^2.

    Biased as an estimate, but as a loss its expected gradient at a state is that of KL(pi || ref).
    The sum over states ignores that the policy changes which states occur.
    """
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """pi_ref / pi - 1 - log(pi_ref / pi).

    Unbiased for KL(pi || ref) and never negative; as a loss its expected gradient at a state is
    that of KL(ref || pi).
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the mask; any amount of padding gives the same result."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()
