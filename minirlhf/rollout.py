"""Prompts in, an immutable Rollout out: what the policy said, how likely it was, what it was worth."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.kernels import token_logprobs
from minirlhf.losses import kl_k1
from minirlhf.model import Transformer, in_full_precision


class Rollout(NamedTuple):
    """B responses of at most R tokens. Column t of every [B, R] tensor belongs to action a_t; all but the
    ids are 0 past the mask."""

    prompt_ids: Tensor  # [B, P] left-padded
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, R] right-padded; EOS where the policy chose to stop
    response_mask: Tensor  # [B, R] bool, a prefix of ones, EOS included
    logprobs: Tensor  # [B, R] log pi(a_t | s_t) when sampled, nats
    ref_logprobs: Tensor  # [B, R] the same under the frozen reference
    values: Tensor  # [B, R] V(s_t), before a_t
    scores: Tensor  # [B] the reward model's scalar, missing-EOS penalty subtracted
    rewards: Tensor  # [B, R] per token: -kl_coef * KL term, and the score on the last token

    def rows(self, index: Tensor) -> "Rollout":
        """The responses with these row numbers."""
        return Rollout(*(tensor[index] for tensor in self))


def action_states(model: Transformer, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor,
                  response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D] what each sampled token was drawn from, row by row: for a_t the state at trunk position P - 1 + t, before it;
    and the table [rows, D] that makes logits of it."""
    ids = torch.cat([prompt_ids, response_ids[:, :-1]], dim=1)  # the last action is nobody's state
    mask = torch.cat([prompt_mask, response_mask[:, :-1]], dim=1)
    drawn_from = F.pad(response_mask, (prompt_ids.shape[1] - 1, 0))
    hidden, table = model(ids, mask, wanted=drawn_from, with_table=True)
    return hidden[drawn_from], table


def evaluate_actions(model: Transformer, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor,
                     response_mask: Tensor, temperature: float, entropy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """log pi(a_t | s_t), V(s_t) and the entropy of pi(. | s_t), each [B, R] and 0 past the mask, from one pass of the trunk.

    The temperature divides the logits as it does in sampling. Entropy in nats; zeros unless asked for. Differentiable.
    """
    states, table = action_states(model, prompt_ids, prompt_mask, response_ids, response_mask)
    logprob = token_logprobs(states, table, response_ids[response_mask], temperature, entropy, vocab_size=model.config.vocab_size)
    logprob, token_entropy = logprob if entropy else (logprob, torch.zeros_like(logprob))
    value = in_full_precision(model.value_head, states).to(logprob.dtype)
    blank = logprob.new_zeros(response_mask.shape)
    return tuple(blank.masked_scatter(response_mask, x) for x in (logprob, value, token_entropy))


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """[B, R] r_t = -kl_coef (log pi - log pi_ref), plus the score on the last sampled token (Ziegler et al. 2019).

    The score judges the whole response, so it is paid once, when the response is complete: for an action in the middle
    reward-to-go hands it back. Summed over the mask: score - kl_coef * (sum of the KL terms). Nothing is clamped.
    """
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True) - 1
    return torch.where(mask, -kl_coef * kl_k1(logprobs, ref_logprobs), 0.0) + torch.where(last, scores[:, None], 0.0)


@torch.no_grad()
def collect_rollout(policy: Transformer, ref_model: Transformer, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor,
                    response_mask: Tensor, scores: Tensor, kl_coef: float, temperature: float, micro_batch_size: int,
                    measured: tuple[Tensor, Tensor, Tensor] | None = None) -> Rollout:
    """Measure sampled responses under policy and reference, and turn scores [B] into per-token rewards.

    The log-probabilities come from the same code path as the learner's, not from the decoding cache: at the first update
    the importance ratio is then 1 but for rounding. measured: evaluate_actions of all rows, if the learner did it.
    """
    sampled = (prompt_ids, prompt_mask, response_ids, response_mask)
    parts, size = [], len(scores) if measured else micro_batch_size or len(scores)
    for some in zip(prompt_ids.split(size), prompt_mask.split(size), response_ids.split(size), response_mask.split(size)):
        logprobs, values, _ = measured or evaluate_actions(policy, *some, temperature)
        ref_logprobs, _, _ = evaluate_actions(ref_model, *some, temperature)
        parts.append((logprobs, ref_logprobs, values))
    logprobs, ref_logprobs, values = (torch.cat(column) for column in zip(*parts))
    rewards = token_rewards(scores, logprobs, ref_logprobs, response_mask, kl_coef)
    return Rollout(*sampled, logprobs, ref_logprobs, values, scores, rewards)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, horizon: int, responses: int) -> float:
    """Ziegler et al. 2019, section 2.2: a proportional controller in log space, error clipped to +-0.2."""
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * responses / horizon)


@torch.no_grad()
def sequence_kl(model: Transformer, ref_model: Transformer, rollout_inputs: tuple[Tensor, Tensor, Tensor, Tensor],
                temperature: float, chunk: int = 4096) -> Tensor:
    """[B] sum over visited states of KL(pi(. | s_t) || pi_ref(. | s_t)) over the full vocabulary, nats.

    Same mean as the sampled k1 summed over tokens, less noise. chunk rows of the vocabulary table at a time.
    """
    response_mask = rollout_inputs[3]
    states = [action_states(m, *rollout_inputs)[0] for m in (model, ref_model)]
    kls = []
    for ours, theirs in zip(states[0].split(chunk), states[1].split(chunk)):
        exact = torch.promote_types(ours.dtype, torch.float32)
        log_pi = (ours @ model.lm_weight.T).to(exact).div(temperature).log_softmax(-1)
        log_ref = (theirs @ ref_model.lm_weight.T).to(exact).div(temperature).log_softmax(-1)
        kls.append((log_pi.exp() * (log_pi - log_ref)).sum(-1))
    per_token = torch.zeros(response_mask.shape, device=response_mask.device, dtype=kls[0].dtype)
    return per_token.masked_scatter(response_mask, torch.cat(kls)).sum(1)
