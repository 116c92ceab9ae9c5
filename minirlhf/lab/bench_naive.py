"""What bench.py measures beside the project's own code: the same work as one writes it first in PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.device import mixed_precision
from minirlhf.model import Transformer


def half(device: torch.device) -> torch.autocast:
    """bfloat16 products on a GPU, float32 elsewhere: what everything is measured in, whoever wrote it."""
    return mixed_precision(device, device.type == "cuda")


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
    """[B, R] the recurrence of generalised advantages, a column at a time from the last, as TRL's PPOTrainer has it."""
    columns, carry = [], 0.0
    for t in range(rewards.shape[1] - 1, -1, -1):
        after = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        carry = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * carry
        columns.append(carry)
    return torch.stack(columns[::-1], dim=1)


def reward_step(model: Transformer, optimizer: torch.optim.Optimizer, ids: Tensor, mask: Tensor) -> None:
    """One step on pairs, chosen responses in the first half of the rows and rejected ones in the second."""
    with half(ids.device):
        hidden = padded_trunk(model, ids, mask)
    last = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
    chosen, rejected = model.reward_head(last).float().squeeze(-1).chunk(2)
    step(model, optimizer, -F.logsigmoid(chosen - rejected).mean())


def step(model: Transformer, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def naive_iteration(policy: Transformer, reference: Transformer, optimizer: torch.optim.Optimizer, ids: Tensor, mask: Tensor,
                    length: int, epochs: int) -> None:
    """One PPO iteration with all of the above: sample, measure under both models, GAE, clipped steps."""
    with torch.no_grad(), half(ids.device):
        response = rollout_without_cache(policy, ids, mask, length)
        old, ref = (padded_logprobs(model, ids, mask, response) for model in (policy, reference))
        advantages = gae_by_loop(-0.05 * (old - ref), torch.zeros_like(old), 1.0, 0.95) + 1.0
    for _ in range(epochs):
        update_once(policy, optimizer, ids, mask, response, old, advantages)


def update_once(policy: Transformer, optimizer: torch.optim.Optimizer, ids: Tensor, mask: Tensor, response: Tensor, old: Tensor,
                advantages: Tensor) -> None:
    with half(ids.device):
        loss = policy_loss(padded_logprobs(policy, ids, mask, response), old, advantages)
    step(policy, optimizer, loss)
