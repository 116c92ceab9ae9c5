"""What bench.py measures beside the project's own code: the same work in plain PyTorch, and by other libraries."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.model import Transformer


def padded_trunk(model: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, T, D] the trunk as one writes it first: every column of every row, padding too, under a dense mask."""
    batch, length = ids.shape
    visible = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril() & mask[:, None, :]
    visible = (visible | torch.eye(length, dtype=torch.bool, device=ids.device))[:, None]
    x = model.wte(ids) + model.wpe((mask.cumsum(1) - 1).clamp(min=0))
    for block in model.blocks:
        qkv = block.attention_in(block.ln_1(x)).view(batch, length, 3, model.config.n_head, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, attn_mask=visible)
        x = x + block.attention_out(mixed.transpose(1, 2).reshape(x.shape))
        x = x + block.mlp_out(F.gelu(block.mlp_in(block.ln_2(x)), approximate="tanh"))
    return model.ln_f(x)


@torch.no_grad()
def rollout_without_cache(model: Transformer, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """[B, length] each token from a pass over the whole text so far, drawn by torch.multinomial."""
    start = ids.shape[1]
    for _ in range(length):
        logits = padded_trunk(model, ids, mask)[:, -1] @ model.lm_weight.T
        ids = torch.cat([ids, torch.multinomial(logits.float().softmax(-1), 1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids[:, start:]


def whole_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N] log-probs by way of all logits at once."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def padded_logprobs(model: Transformer, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor) -> Tensor:
    """[B, R] log-probs of responses of full length."""
    mask = torch.cat([prompt_mask, torch.ones_like(response_ids, dtype=torch.bool)], dim=1)
    hidden = padded_trunk(model, torch.cat([prompt_ids, response_ids], dim=1), mask)[:, prompt_ids.shape[1] - 1:-1]
    return whole_logprobs(hidden.flatten(0, 1), model.lm_weight, response_ids.flatten()).view(response_ids.shape)


def gae_by_loop(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """[B, R] the recurrence of generalised advantages, a column at a time from the last, as trainers write it."""
    columns, carry = [], torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        after = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        carry = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * carry
        columns.append(carry)
    return torch.stack(columns[::-1], dim=1)


def naive_iteration(policy: Transformer, reference: Transformer, optimizer: torch.optim.Optimizer, ids: Tensor, mask: Tensor,
                    length: int, epochs: int) -> None:
    """One PPO iteration with all of the above: sample, measure under both models, GAE, clipped steps."""
    response = rollout_without_cache(policy, ids, mask, length)
    with torch.no_grad():
        old, ref = (padded_logprobs(model, ids, mask, response) for model in (policy, reference))
        advantages = gae_by_loop(-0.05 * (old - ref), torch.zeros_like(old), 1.0, 0.95) + 1.0
    for _ in range(epochs):
        ratio = (padded_logprobs(policy, ids, mask, response) - old).exp()
        (-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def available(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def peer_rollout(model: Transformer, ids: Tensor, mask: Tensor, length: int):
    """() -> transformers' generate on a GPT-2 of the same shape, random weights; None if it is not installed."""
    if not available("transformers"):
        return None
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    c = model.config
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.d_model, vocab_size=c.vocab_size,
                                        n_positions=c.context, bos_token_id=0, eos_token_id=0)).to(ids.device).eval()
    theirs.generation_config.eos_token_id = None  # nobody ends early
    how = GenerationConfig(max_new_tokens=length, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=1)

    @torch.inference_mode()
    def run():
        return theirs.generate(ids, attention_mask=mask.long(), generation_config=how)

    return run


def peer_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor):
    """() -> TRL's selective log-softmax on all logits; None if it is not installed."""
    if not available("trl"):
        return None
    from trl.trainer.utils import selective_log_softmax

    return lambda: selective_log_softmax((hidden @ weight.T)[None], targets[None])[0]


def peer_gae(rewards: Tensor, values: Tensor):
    """() -> torchrl's vectorised GAE; None if it is not installed."""
    if not available("torchrl"):
        return None
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    done = torch.zeros_like(rewards, dtype=torch.bool)[..., None]
    done[:, -1] = True
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)[..., None]
    return lambda: vec_generalized_advantage_estimate(1.0, 0.95, values[..., None], after, rewards[..., None], done, done)
