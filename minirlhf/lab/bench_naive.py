"""The benchmark's plain PyTorch: the same work, written in the most direct way."""

from minirlhf.model import Transformer

import torch
import torch.nn.functional as F
from torch import Tensor


def uses_bf16(device: torch.device) -> bool:
    """Whether all code is measured with bfloat16 products: on a GPU."""
    return device.type == "cuda"


def autocast(device: torch.device) -> torch.autocast:
    """The precision of the code that is not this project's; the same as Transformer.autocast()."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device))


# ---- parts ---------------------------------------------------------------------------------------


def padded_forward(model: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, T, D] hidden states of every column, padding included, with a dense attention mask."""
    batch, length = ids.shape
    square = torch.ones(length, length, dtype=torch.bool, device=ids.device)
    is_visible = square.tril() & mask[:, None, :]
    is_visible = (is_visible | torch.eye(length, dtype=torch.bool, device=ids.device))[:, None]
    x = model.wte(ids) + model.wpe((mask.cumsum(1) - 1).clamp(min=0))
    for block in model.blocks:
        qkv = block.attention_in(block.ln_1(x)).view(batch, length, 3, model.config.n_head, -1)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=is_visible)
        x = x + block.attention_out(attended.transpose(1, 2).reshape(x.shape))
        x = x + block.mlp_out(F.gelu(block.mlp_in(block.ln_2(x)), approximate="tanh"))
    return model.ln_f(x)


@torch.no_grad()
def sample_without_cache(model: Transformer, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """[B, length] responses; each token needs a forward pass over the whole text so far."""
    start = ids.shape[1]
    for _ in range(length):
        logits = padded_forward(model, ids, mask)[:, -1] @ model.lm_weight.T
        ids = torch.cat([ids, torch.multinomial(logits.float().softmax(-1), 1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids[:, start:]


def full_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N] log-probs from all logits [N, V] at once."""
    log_pi = (hidden @ weight.T).float().log_softmax(-1)
    return log_pi.gather(1, targets[:, None]).squeeze(1)


def response_logprobs(model: Transformer, prompt_ids: Tensor, prompt_mask: Tensor,
                      response_ids: Tensor) -> Tensor:
    """[B, R] log-probs of responses of full length."""
    ids = torch.cat([prompt_ids, response_ids], dim=1)
    mask = torch.cat([prompt_mask, torch.ones_like(response_ids, dtype=torch.bool)], dim=1)
    hidden = padded_forward(model, ids, mask)[:, prompt_ids.shape[1] - 1:-1]
    logprobs = full_logprobs(hidden.flatten(0, 1), model.lm_weight, response_ids.flatten())
    return logprobs.view(response_ids.shape)


def gae_loop(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """[B, R] advantages, one column at a time from the last, as in TRL's PPOTrainer."""
    columns = []
    advantage = 0.0
    for t in range(rewards.shape[1] - 1, -1, -1):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        columns.append(advantage)
    return torch.stack(columns[::-1], dim=1)


# ---- optimizer steps -----------------------------------------------------------------------------


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def reward_step(model: Transformer, optimizer: torch.optim.Optimizer, ids: Tensor,
                mask: Tensor) -> None:
    """One step on pairs: chosen responses in the first half of the rows, rejected in the second."""
    with autocast(ids.device):
        hidden = padded_forward(model, ids, mask)
    last = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
    chosen, rejected = model.reward_head(last).float().squeeze(-1).chunk(2)
    step(model, optimizer, -F.logsigmoid(chosen - rejected).mean())


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def policy_step(policy: Transformer, optimizer: torch.optim.Optimizer, ids: Tensor, mask: Tensor,
                response: Tensor, old: Tensor, advantages: Tensor) -> None:
    """One step of PPO without a value function."""
    with autocast(ids.device):
        logprobs = response_logprobs(policy, ids, mask, response)
        loss = policy_loss(logprobs, old, advantages)
    step(policy, optimizer, loss)


def ppo_iteration(policy: Transformer, reference: Transformer, optimizer: torch.optim.Optimizer,
                  ids: Tensor, mask: Tensor, length: int, epochs: int) -> None:
    """Sample, measure with policy and reference, compute advantages, take clipped steps."""
    with torch.no_grad(), autocast(ids.device):
        response = sample_without_cache(policy, ids, mask, length)
        old = response_logprobs(policy, ids, mask, response)
        ref = response_logprobs(reference, ids, mask, response)
        advantages = gae_loop(-0.05 * (old - ref), torch.zeros_like(old), 1.0, 0.95) + 1.0
    for _ in range(epochs):
        policy_step(policy, optimizer, ids, mask, response, old, advantages)
