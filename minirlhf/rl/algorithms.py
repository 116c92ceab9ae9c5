"""The algorithms: which advantage and which loss each --algorithm uses.

The same loop serves all of them. Each is a row of a table, so two neighbors can be compared.
"""

import math
import reprlib
from collections.abc import Callable
from typing import NamedTuple

from minirlhf.config import PolicyConfig
from minirlhf.model import Transformer
from minirlhf.rl.advantages import (
    centered,
    full_return,
    gae,
    group_normalized,
    in_float64,
    leave_one_out,
    preference_weights,
    reward_to_go,
    reward_to_go_minus_value,
    whiten,
)
from minirlhf.rl.losses import kl_k1, kl_k3, policy_gradient_loss, ppo_loss, value_loss
from minirlhf.rl.rollout import Rollout, evaluate_actions
from minirlhf.run.errors import UserError, call_users_function, suggest

import torch
from torch import Tensor


class Algorithm(NamedTuple):
    """One row of the table."""

    advantages: Callable[[Rollout, PolicyConfig], Tensor]  # [B, R]
    loss: Callable[[Tensor, Rollout, PolicyConfig, float], Tensor]  # of the new log-probs
    learns_value: bool = False  # trains the value head
    reuses_rollout: bool = False  # several epochs of minibatches; otherwise one optimizer step
    whitens: bool = False  # whitens advantages, unless --whiten says otherwise
    grouped: bool = False  # several responses to each prompt, in consecutive rows
    in_pairs: bool = False  # two of them, whatever --group-size
    kl_in_reward: bool = True  # otherwise the loss contains the KL penalty, or the log-ratios


# ---- advantages ----------------------------------------------------------------------------------


def use_full_return(rollout: Rollout, config: PolicyConfig) -> Tensor:
    return full_return(rollout.rewards, rollout.mask, config.gamma)


def use_reward_to_go(rollout: Rollout, config: PolicyConfig) -> Tensor:
    return reward_to_go(rollout.rewards, rollout.mask, config.gamma)


def use_baseline(rollout: Rollout, config: PolicyConfig) -> Tensor:
    return reward_to_go_minus_value(rollout.rewards, rollout.values, rollout.mask, config.gamma)


def use_gae(rollout: Rollout, config: PolicyConfig) -> Tensor:
    return gae(rollout.rewards, rollout.values, rollout.mask, config.gamma, config.lam)


def use_leave_one_out(rollout: Rollout, config: PolicyConfig) -> Tensor:
    return leave_one_out(rollout.rewards, rollout.mask, config.group_size)


def use_group_normalized(rollout: Rollout, config: PolicyConfig) -> Tensor:
    return group_normalized(rollout.scores, rollout.mask, config.group_size)


def use_preference_weights(rollout: Rollout, config: PolicyConfig) -> Tensor:
    log_ratios = kl_k1(rollout.logprobs, rollout.ref_logprobs)
    return preference_weights(rollout.scores, log_ratios, rollout.mask, config.dpo_beta)


# ---- losses --------------------------------------------------------------------------------------


def on_policy(logprobs: Tensor, rollout: Rollout, config: PolicyConfig,
              denominator: float) -> Tensor:
    return policy_gradient_loss(logprobs, rollout.advantages, rollout.mask, denominator)


def clipped(logprobs: Tensor, rollout: Rollout, config: PolicyConfig, denominator: float) -> Tensor:
    return ppo_loss(logprobs, rollout.logprobs, rollout.advantages, rollout.mask,
                    config.clip_range, denominator)


def clipped_with_kl(logprobs: Tensor, rollout: Rollout, config: PolicyConfig,
                    denominator: float) -> Tensor:
    penalty = kl_k3(logprobs[rollout.mask], rollout.ref_logprobs[rollout.mask]).sum() / denominator
    return clipped(logprobs, rollout, config, denominator) + rollout.kl_coef * penalty


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
    "online-dpo": Algorithm(use_preference_weights, on_policy, grouped=True, in_pairs=True,
                            kl_in_reward=False),
}


def pick_algorithm(config: PolicyConfig) -> Algorithm | None:
    """The row of --algorithm, None for dpo. Users can add rows to ALGORITHMS. Raises UserError."""
    if "dpo" in ALGORITHMS:
        raise UserError("ALGORITHMS['dpo']: dpo has a loop of its own; choose another name")
    if config.algorithm == "dpo":
        return None
    if config.algorithm not in ALGORITHMS:
        known = suggest(config.algorithm, [*ALGORITHMS, "dpo"])
        raise UserError(f"--algorithm {config.algorithm!r} is not known{known}")
    algorithm = ALGORITHMS[config.algorithm]
    if not isinstance(algorithm, Algorithm):
        raise UserError(f"ALGORITHMS[{config.algorithm!r}] is {reprlib.repr(algorithm)}; "
                        "it must be an Algorithm(advantages, loss)")
    size = responses_per_prompt(algorithm, config)
    if config.batch_size % size:
        raise UserError(f"--batch-size {config.batch_size} is not a multiple of "
                        + ("2" if algorithm.in_pairs else f"--group-size {size}"))
    return algorithm


def responses_per_prompt(algorithm: Algorithm, config: PolicyConfig) -> int:
    """How many consecutive rows of a rollout answer the same prompt."""
    if not algorithm.grouped:
        return 1
    return 2 if algorithm.in_pairs else config.group_size


def estimate_advantages(algorithm: Algorithm, rollout: Rollout, config: PolicyConfig) -> Rollout:
    """The rollout with its fields `advantages` and `returns`, [B, R] each.

    `returns` holds the regression targets of V: advantage + value, before whitening. If no value is
    learned, it is the reward-to-go, which is only logged.
    """
    advantages = call_row(algorithm.advantages, rollout.mask.shape, rollout, config)
    if algorithm.learns_value:
        returns = torch.where(rollout.mask, advantages + rollout.values, 0.0)
    else:
        returns = reward_to_go(rollout.rewards, rollout.mask, config.gamma)
    if config.whiten == "on" or (config.whiten == "auto" and algorithm.whitens):
        advantages = whiten(advantages, rollout.mask)
    return rollout._replace(advantages=advantages, returns=returns)


def minibatch_loss(policy: Transformer, rollout: Rollout, config: PolicyConfig, denominator: float,
                   tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss of this micro-batch, metrics summed over its tokens).

    denominator: (sequences of the whole minibatch) x (maximum response length).
    tokens: real tokens of the whole minibatch; the value loss is a mean over them.
    So the losses of the micro-batches add up to the loss of the minibatch.
    """
    algorithm = ALGORITHMS[config.algorithm]
    mask = rollout.mask
    logprobs, values, entropy = evaluate_actions(policy, rollout.samples, config.temperature,
                                                 entropy=True)
    loss = call_row(algorithm.loss, (), logprobs, rollout, config, denominator)
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
            approx_kl=(torch.expm1(log_ratio) - log_ratio).sum(),  # k3 of KL(pi_old || pi)
            ratio=torch.where(mask, ratio, 0.0).sum(),
            clip_fraction=((ratio - 1.0).abs() > config.clip_range).sum(),
            value_clip_fraction=(mask & (value_change > value_limit)).sum(),
            # without clipping
            value_loss=0.5 * torch.where(mask, (values - rollout.returns) ** 2, 0.0).sum(),
        )
    return loss, metrics


def call_row(function: Callable, shape: tuple[int, ...], *arguments) -> Tensor:
    """What a function of the table returns; if it is a user's own, checked. Raises UserError.

    shape: [B, R] of advantages, or () of a loss, which must be differentiable.
    """
    if getattr(function, "__module__", "").startswith("minirlhf."):
        return function(*arguments)
    name = f"the algorithm's function {getattr(function, '__name__', repr(function))}"
    result = call_users_function(name, function, *arguments)
    is_loss = shape == ()
    what = f"a {type(result).__name__}"
    if isinstance(result, Tensor):
        what = f"a tensor of shape {tuple(result.shape)} and {result.dtype}"
        what += " with a gradient" * (result.requires_grad and not is_loss)
        is_valid = result.is_floating_point() and result.requires_grad == is_loss
        if is_valid and result.shape == shape:
            return result
    expected = ("one number that is differentiable in the log-probs" if is_loss else
                f"one floating-point number for each token, shape {tuple(shape)}, without gradient")
    raise UserError(f"{name} returned {what}; it must return {expected}")


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var[G - V] / Var[G] over real tokens: 0 for a constant V, 1 if V equals every return.

    With sampled returns, even the true V stays below 1, because V does not know later tokens.
    """
    variance = centered(returns[mask]).var(correction=0)
    if not variance > 0:  # zero or NaN
        return 0.0
    errors = in_float64(returns[mask]) - values[mask]
    return float(1.0 - centered(errors).var(correction=0) / variance)
