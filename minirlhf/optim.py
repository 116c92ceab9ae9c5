"""One optimiser, one schedule, one guarded step, for every stage of training."""

import math

import torch
from torch import nn

from minirlhf.config import UserError
from minirlhf.parallel import sum_gradients, whole_tensor


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW with eps 1e-5 (Huang et al. 2024, detail 4). Decay on matrices only: gains, biases and embeddings
    have no reason to shrink."""
    embeddings = ("wte", "wpe")
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and not name.startswith(embeddings)]
    others = [p for name, p in named if p.dim() != 2 or name.startswith(embeddings)]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-5, fused=True)


def trapezoid(step: int, total: int, rise: float = 0.05) -> float:
    """Share of the peak learning rate at a step (from 0): up over the first `rise` of the steps, then linearly to 0."""
    return min((step + 1) / max(1.0, rise * total), (total - step) / total)


def step_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float, which: str = "") -> float:
    """Sum the accumulated gradient over the processes, clip it, take one step, clear it. Returns the norm before clipping.

    Raises UserError, before any weight has changed, when the norm is not finite; which: how it calls the gradient.
    """
    sum_gradients(model)
    norm = float(whole_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)))
    if not math.isfinite(norm):
        raise UserError(f"the gradient{which} is not finite (norm {norm}); try a smaller --lr")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
