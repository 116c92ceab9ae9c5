"""The ladder: which advantage and which loss each --algorithm names. One loop serves all; read two neighbours as a diff."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.advantages import full_return, gae, group_normalised, leave_one_out, reward_to_go, reward_to_go_minus_value, whiten
from minirlhf.config import PolicyConfig, UserError
from minirlhf.flags import nearest
from minirlhf.losses import kl_k3, policy_gradient_loss, ppo_loss, value_loss
from minirlhf.model import Transformer
from minirlhf.rollout import Rollout, evaluate_actions


class Rung(NamedTuple):
    """One row of the ladder. What two neighbours do not share is the lesson."""

    advantages: Callable[[Rollout, PolicyConfig], Tensor]  # [B, R]
    loss: Callable[[Tensor, Rollout, Tensor, PolicyConfig, float, float], Tensor]  # of the new log-probs
    learns_value: bool = False  # trains the value head
    reuses_rollout: bool = False  # several epochs of minibatches; without it, one step on the whole rollout
    whitens: bool = False  # advantages to mean 0, deviation 1, unless --whiten says otherwise
    grouped: bool = False  # several responses per prompt, consecutive rows
    kl_in_reward: bool = True  # else the KL penalty is a term of the loss


def on_policy(logprobs: Tensor, r: Rollout, advantages: Tensor, c: PolicyConfig, kl_coef: float, denominator: float) -> Tensor:
    return policy_gradient_loss(logprobs, advantages, r.response_mask, denominator)


def clipped(logprobs: Tensor, r: Rollout, advantages: Tensor, c: PolicyConfig, kl_coef: float, denominator: float) -> Tensor:
    return ppo_loss(logprobs, r.logprobs, advantages, r.response_mask, c.clip_range, denominator)


def clipped_with_kl(logprobs: Tensor, r: Rollout, advantages: Tensor, c: PolicyConfig, kl_coef: float,
                    denominator: float) -> Tensor:
    penalty = kl_k3(logprobs[r.response_mask], r.ref_logprobs[r.response_mask]).sum() / denominator
    return clipped(logprobs, r, advantages, c, kl_coef, denominator) + kl_coef * penalty


LADDER: dict[str, Rung] = {
    "reinforce": Rung(lambda r, c: full_return(r.rewards, r.response_mask, c.gamma), on_policy),
    "reward-to-go": Rung(lambda r, c: reward_to_go(r.rewards, r.response_mask, c.gamma), on_policy),
    "baseline": Rung(lambda r, c: reward_to_go_minus_value(r.rewards, r.values, r.response_mask, c.gamma), on_policy,
                     learns_value=True),
    "gae": Rung(lambda r, c: gae(r.rewards, r.values, r.response_mask, c.gamma, c.lam), on_policy,
                learns_value=True, whitens=True),
    "ppo": Rung(lambda r, c: gae(r.rewards, r.values, r.response_mask, c.gamma, c.lam), clipped,
                learns_value=True, whitens=True, reuses_rollout=True),
    "rloo": Rung(lambda r, c: leave_one_out(r.rewards, r.response_mask, c.group_size), on_policy, grouped=True),
    "grpo": Rung(lambda r, c: group_normalised(r.scores, r.response_mask, c.group_size), clipped_with_kl,
                 grouped=True, reuses_rollout=True, kl_in_reward=False),
}


def pick_rung(config: PolicyConfig) -> Rung:
    """The row that --algorithm names; whoever adds one to LADDER can name it. Raises UserError."""
    if config.algorithm not in LADDER:
        raise UserError(f"--algorithm {config.algorithm!r} is not known{nearest(config.algorithm, LADDER)}")
    rung = LADDER[config.algorithm]
    if rung.grouped and config.batch_size % config.group_size:
        raise UserError(f"--batch-size {config.batch_size} is not a multiple of --group-size {config.group_size}")
    return rung


def advantages_and_returns(rung: Rung, rollout: Rollout, config: PolicyConfig) -> tuple[Tensor, Tensor]:
    """([B, R], [B, R]): the weight on each action's log-probability, and what the value head should have said.

    Returns are advantage + value, taken before whitening; where no value is learnt, reward-to-go, to look at.
    """
    advantages = rung.advantages(rollout, config)
    if rung.learns_value:
        returns = torch.where(rollout.response_mask, advantages + rollout.values, 0.0)
    else:
        returns = reward_to_go(rollout.rewards, rollout.response_mask, config.gamma)
    if config.whiten == "on" or (config.whiten == "auto" and rung.whitens):
        advantages = whiten(advantages, rollout.response_mask)
    return advantages, returns


def minibatch_loss(policy: Transformer, rung: Rung, rollout: Rollout, advantages: Tensor, returns: Tensor,
                   config: PolicyConfig, kl_coef: float, denominator: float, tokens: float,
                   measured: tuple[Tensor, Tensor, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """This (micro-)batch's share of the loss, and sums over its tokens of what is worth watching.

    denominator: (sequences of the whole minibatch) x (maximum response length), fixed before sampling.
    tokens: number of real tokens of the whole minibatch, over which the value loss is a mean. The losses of the
    micro-batches of a minibatch therefore add up to the loss of the minibatch, however it is cut.
    measured: evaluate_actions of these rows with its graph, where the learner has done it.
    """
    mask = rollout.response_mask
    logprobs, values, entropy = measured or evaluate_actions(policy, *rollout[:4], config.temperature, entropy=True)
    loss = rung.loss(logprobs, rollout, advantages, config, kl_coef, denominator)
    if config.ent_coef:
        loss = loss - config.ent_coef * entropy.sum() / denominator
    if rung.learns_value:
        loss = loss + config.vf_coef * value_loss(values, rollout.values, returns, mask, config.value_clip_range, tokens)
    with torch.no_grad():
        log_ratio = torch.where(mask, logprobs - rollout.logprobs, 0.0)
        ratio = log_ratio.exp()
        figures = dict(
            entropy=entropy.sum(),
            approx_kl=(torch.expm1(log_ratio) - log_ratio).sum(),
            ratio=torch.where(mask, ratio, 0.0).sum(),
            clip_fraction=((ratio - 1.0).abs() > config.clip_range).sum(),
            value_clip_fraction=(mask & ((values - rollout.values).abs() > (config.value_clip_range or math.inf))).sum(),
            value_loss=0.5 * torch.where(mask, (values - returns) ** 2, 0.0).sum(),
        )
    return loss, figures


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var[G - V] / Var[G] over real tokens: 1 is a perfect value head, 0 one no better than a constant."""
    spread = returns[mask].var(correction=0)
    return float(1.0 - (returns - values)[mask].var(correction=0) / spread) if spread > 0 else 0.0
