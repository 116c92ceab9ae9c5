"""The algorithms: which advantage and which loss each --algorithm uses.

The same loop serves all of them. Each is a row of a table, so two neighbors can be compared.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.config import PolicyConfig
from minirlhf.model import Transformer
from minirlhf.rl.advantages import (
    full_return,
    gae,
    group_normalized,
    leave_one_out,
    reward_to_go,
    reward_to_go_minus_value,
    whiten,
)
from minirlhf.rl.losses import kl_k3, policy_gradient_loss, ppo_loss, value_loss
from minirlhf.rl.rollout import Rollout, evaluate_actions
from minirlhf.run.errors import UserError, suggest


class Algorithm(NamedTuple):
    """One row of the table."""

    advantages: Callable[[Rollout, PolicyConfig], Tensor]  # [B, R]
    loss: Callable[[Tensor, Rollout, PolicyConfig, float], Tensor]  # of the new log-probs
    learns_value: bool = False  # trains the value head
    reuses_rollout: bool = False  # several epochs of minibatches; otherwise one optimizer step
    whitens: bool = False  # whitens advantages, unless --whiten says otherwise
    grouped: bool = False  # several responses to each prompt, in consecutive rows
    kl_in_reward: bool = True  # otherwise the KL penalty is a term of the loss


# ---- advantages ----------------------------------------------------------------------------------


def use_full_return(r: Rollout, config: PolicyConfig) -> Tensor:
    return full_return(r.rewards, r.mask, config.gamma)


def use_reward_to_go(r: Rollout, config: PolicyConfig) -> Tensor:
    return reward_to_go(r.rewards, r.mask, config.gamma)


def use_baseline(r: Rollout, config: PolicyConfig) -> Tensor:
    return reward_to_go_minus_value(r.rewards, r.values, r.mask, config.gamma)


def use_gae(r: Rollout, config: PolicyConfig) -> Tensor:
    return gae(r.rewards, r.values, r.mask, config.gamma, config.lam)


def use_leave_one_out(r: Rollout, config: PolicyConfig) -> Tensor:
    return leave_one_out(r.rewards, r.mask, config.group_size)


def use_group_normalized(r: Rollout, config: PolicyConfig) -> Tensor:
    return group_normalized(r.scores, r.mask, config.group_size)


# ---- losses --------------------------------------------------------------------------------------


def on_policy(logprobs: Tensor, r: Rollout, config: PolicyConfig, denominator: float) -> Tensor:
    return policy_gradient_loss(logprobs, r.advantages, r.mask, denominator)


def clipped(logprobs: Tensor, r: Rollout, config: PolicyConfig, denominator: float) -> Tensor:
    return ppo_loss(logprobs, r.logprobs, r.advantages, r.mask, config.clip_range, denominator)


def clipped_with_kl(logprobs: Tensor, r: Rollout, config: PolicyConfig,
                    denominator: float) -> Tensor:
    penalty = kl_k3(logprobs[r.mask], r.ref_logprobs[r.mask]).sum() / denominator
    return clipped(logprobs, r, config, denominator) + r.kl_coef * penalty


# ---- the table -----------------------------------------------------------------------------------

ALGORITHMS: dict[str, Algorithm] = {
    "reinforce": Algorithm(use_full_return, on_policy),
    "reward-to-go": Algorithm(use_reward_to_go, on_policy),
    "baseline": Algorithm(use_baseline, on_policy, learns_value=True),
    "gae": Algorithm(use_gae, on_policy, learns_value=True, whitens=True),
    "ppo": Algorithm(use_gae, clipped, learns_value=True, whitens=True, reuses_rollout=True),
    "rloo": Algorithm(use_leave_one_out, on_policy, grouped=True),
    "grpo": Algorithm(use_group_normalized, clipped_with_kl, grouped=True, reuses_rollout=True,
                      kl_in_reward=False),
}


def pick_algorithm(config: PolicyConfig) -> Algorithm:
    """The row of --algorithm; users can add rows to ALGORITHMS. Raises UserError."""
    if config.algorithm not in ALGORITHMS:
        known = suggest(config.algorithm, ALGORITHMS)
        raise UserError(f"--algorithm {config.algorithm!r} is not known{known}")
    algorithm = ALGORITHMS[config.algorithm]
    if algorithm.grouped and config.batch_size % config.group_size:
        raise UserError(f"--batch-size {config.batch_size} is not a multiple of "
                        f"--group-size {config.group_size}")
    return algorithm


def estimate_advantages(algorithm: Algorithm, rollout: Rollout, config: PolicyConfig) -> Rollout:
    """The rollout with advantages and returns, [B, R] each.

    Returns are the targets of V: advantage + value, before whitening. Without a value head they
    are reward-to-go, which is only logged.
    """
    advantages = algorithm.advantages(rollout, config)
    if algorithm.learns_value:
        returns = torch.where(rollout.mask, advantages + rollout.values, 0.0)
    else:
        returns = reward_to_go(rollout.rewards, rollout.mask, config.gamma)
    if config.whiten == "on" or (config.whiten == "auto" and algorithm.whitens):
        advantages = whiten(advantages, rollout.mask)
    return rollout._replace(advantages=advantages, returns=returns)


def minibatch_loss(policy: Transformer, rollout: Rollout, config: PolicyConfig, denominator: float,
                   tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(the micro-batch's part of the loss, sums over its tokens of metrics).

    denominator: (sequences of the whole minibatch) x (maximum response length).
    tokens: real tokens of the whole minibatch; the value loss is a mean over them.
    So the losses of the micro-batches add up to the loss of the minibatch.
    """
    algorithm = ALGORITHMS[config.algorithm]
    mask = rollout.mask
    logprobs, values, entropy = evaluate_actions(policy, rollout.samples, config.temperature,
                                                 entropy=True)
    loss = algorithm.loss(logprobs, rollout, config, denominator)
    if config.ent_coef:
        loss = loss - config.ent_coef * entropy.sum() / denominator
    if algorithm.learns_value:
        loss = loss + config.vf_coef * value_loss(values, rollout.values, rollout.returns, mask,
                                                  config.value_clip_range, tokens)
    with torch.no_grad():
        log_ratio = torch.where(mask, logprobs - rollout.logprobs, 0.0)
        ratio = log_ratio.exp()
        value_change = (values - rollout.values).abs()
        value_limit = config.value_clip_range or math.inf
        metrics = dict(
            entropy=entropy.sum(),
            approx_kl=(torch.expm1(log_ratio) - log_ratio).sum(),
            ratio=torch.where(mask, ratio, 0.0).sum(),
            clip_fraction=((ratio - 1.0).abs() > config.clip_range).sum(),
            value_clip_fraction=(mask & (value_change > value_limit)).sum(),
            value_loss=0.5 * torch.where(mask, (values - rollout.returns) ** 2, 0.0).sum(),
        )
    return loss, metrics


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var[G - V] / Var[G] over real tokens: 1 for a perfect V, 0 for a constant."""
    variance = returns[mask].var(correction=0)
    if variance == 0:
        return 0.0
    return float(1.0 - (returns - values)[mask].var(correction=0) / variance)
