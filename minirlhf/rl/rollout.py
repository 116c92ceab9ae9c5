"""A rollout: sampled responses with their log-probs, values, scores and per-token rewards."""

from typing import NamedTuple

from minirlhf.config import PolicyConfig
from minirlhf.kernels import token_logprobs
from minirlhf.model import Transformer
from minirlhf.model.transformer import apply_head
from minirlhf.rl.losses import kl_k1
from minirlhf.rl.sampling import Samples
from minirlhf.run.parallel import by_rows, unsharded

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY = torch.empty(0)


class Rollout(NamedTuple):
    """B responses of at most R tokens. Column t of every [B, R] tensor belongs to action a_t.

    All [B, R] tensors are 0 beyond the response mask.
    """

    samples: Samples
    logprobs: Tensor  # [B, R] log pi(a_t | s_t) of the policy that sampled, in nats
    ref_logprobs: Tensor  # [B, R] the same for the frozen reference model
    values: Tensor  # [B, R] V(s_t), before action a_t
    scores: Tensor  # [B] score of each response, minus the penalty for a missing EOS
    rewards: Tensor  # [B, R] KL penalty per token, plus the score on the last token
    kl_coef: float  # the KL coefficient of this iteration
    advantages: Tensor = EMPTY  # [B, R] set by estimate_advantages
    returns: Tensor = EMPTY  # [B, R] targets of V, set by estimate_advantages

    @property
    def mask(self) -> Tensor:
        """[B, R] bool: a prefix of ones in each row, EOS included."""
        return self.samples.response_mask

    def rows(self, index: Tensor) -> "Rollout":
        """The responses with these row numbers."""
        samples = self.samples.rows(index)
        index = index.to(self.rewards.device)
        return Rollout(samples, self.logprobs[index], self.ref_logprobs[index],
                       self.values[index], self.scores[index], self.rewards[index], self.kl_coef,
                       self.advantages[index], self.returns[index])


def action_states(model: Transformer, samples: Samples) -> Tensor:
    """[N, D] the hidden state from which each of the N sampled tokens was drawn, row by row.

    For a_t it is the state in column P - 1 + t, one before the token itself.
    """
    # The last token predicts nothing, so it is not an input.
    ids = torch.cat([samples.prompt_ids, samples.response_ids[:, :-1]], dim=1)
    mask = torch.cat([samples.prompt_mask, samples.response_mask[:, :-1]], dim=1)
    predicts_action = F.pad(samples.response_mask, (samples.prompt_ids.shape[1] - 1, 0))
    return model(ids, mask)[predicts_action]


def evaluate_actions(model: Transformer, samples: Samples, temperature: float,
                     entropy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """log pi(a_t | s_t), V(s_t), and the entropy of pi(. | s_t) in nats; [B, R], 0 beyond the mask.

    One forward pass, differentiable. The temperature divides the logits, as in sampling.
    The entropy is 0 unless requested.
    """
    mask = samples.response_mask
    states = action_states(model, samples)
    # the whole LM head: the gradient of a slice would need another tensor of its size
    result = token_logprobs(states, model.lm_table, samples.response_ids[mask], temperature,
                            entropy, vocab_size=model.config.vocab_size)
    logprobs, entropies = result if entropy else (result, torch.zeros_like(result))
    values = apply_head(model.value_head, states).to(logprobs.dtype)
    zeros = logprobs.new_zeros(mask.shape)
    return (zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, values),
            zeros.masked_scatter(mask, entropies))


@by_rows
@torch.no_grad()
def measure(model: Transformer, samples: Samples, config: PolicyConfig) -> tuple[Tensor, Tensor]:
    """log pi(a_t | s_t) and V(s_t) of sampled responses, [B, R] each.

    Uses the same forward pass as the update, not the one with the key-value cache. So at the first
    update the importance ratio is 1 except for rounding.
    """
    model = unsharded(model)
    logprobs, values = [], []
    rows = torch.arange(len(samples.prompts))
    for micro_batch in rows.split(config.micro_batch_size or len(rows)):
        with model.autocast():
            batch_logprobs, batch_values, _ = evaluate_actions(model, samples.rows(micro_batch),
                                                               config.temperature)
        logprobs.append(batch_logprobs)
        values.append(batch_values)
    return torch.cat(logprobs), torch.cat(values)


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor,
                  kl_coef: float) -> Tensor:
    """[B, R] r_t = -kl_coef (log pi - log pi_ref), plus the score on the last token.

    (Ziegler et al. 2019, eq. 2.) The score belongs to the whole response, so it is added once, when
    the response is complete; reward-to-go passes it back to earlier actions.
    The sum over a response is score - kl_coef * (sum of KL terms). Nothing is clamped.
    """
    column = torch.arange(mask.shape[1], device=mask.device)
    is_last = column == mask.sum(1, keepdim=True) - 1
    penalty = torch.where(mask, -kl_coef * kl_k1(logprobs, ref_logprobs), 0.0)
    return penalty + torch.where(is_last, scores[:, None], 0.0)


def adapt_kl_coef(kl_coef: float, kl: float, config: PolicyConfig) -> float:
    """The KL coefficient of the next iteration.

    With --kl-target it rises if the KL is above the target, and falls if it is below.

    A proportional controller with its relative error clipped to +-0.2 (Ziegler et al. 2019,
    section 2.2). kl: mean over responses of the KL summed over tokens, nats.
    """
    if not config.kl_target:
        return kl_coef
    error = min(max(kl / config.kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * config.batch_size / config.kl_horizon)


@torch.no_grad()
def sequence_kl(model: Transformer, reference: Transformer, samples: Samples, temperature: float,
                chunk: int = 4096) -> Tensor:
    """[B] sum over visited states of KL(pi(. | s_t) || pi_ref(. | s_t)), in nats.

    The sum of log pi - log pi_ref over the sampled tokens (k1 in losses.py) has the same expected
    value but more noise, because it does not use the whole distributions.
    chunk: states at a time, because their logits are large.
    """
    mask = samples.response_mask
    with model.autocast():
        states = action_states(model, samples)
        ref_states = action_states(reference, samples)
    divergences = []
    for state, ref_state in zip(states.split(chunk), ref_states.split(chunk)):
        log_pi = log_softmax(state @ model.lm_weight.T, temperature)
        log_ref = log_softmax(ref_state @ reference.lm_weight.T, temperature)
        divergences.append((log_pi.exp() * (log_pi - log_ref)).sum(-1))
    divergence = torch.cat(divergences)
    return divergence.new_zeros(mask.shape).masked_scatter(mask, divergence).sum(1)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probs over the last dimension, in float32 or better."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(exact).div(temperature).log_softmax(-1)
