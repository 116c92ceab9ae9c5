"""One optimiser, one schedule, one guarded step, for every stage of training."""

import math

import torch
from torch import nn

from minirlhf.flags import UserError
from minirlhf.parallel import whole_tensor


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.0, value_lr_scale: float = 1.0) -> torch.optim.AdamW:
    """AdamW with eps 1e-5 (Huang et al. 2024, detail 4). Decay on matrices only: gains, biases and embeddings have no reason
    to shrink. The value head takes steps of value_lr_scale times lr."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        decay = weight_decay if p.dim() == 2 and not name.startswith(("wte", "wpe")) else 0.0
        scale = value_lr_scale if name.startswith("value_head") else 1.0
        groups.setdefault((decay, scale), []).append(p)
    listed = [dict(params=params, weight_decay=decay, lr_scale=scale) for (decay, scale), params in groups.items()]
    return torch.optim.AdamW(listed, lr=lr, betas=(0.9, 0.95), eps=1e-5, fused=True)


def trapezoid(step: int, total: int, rise: float = 0.05) -> float:
    """Share of the peak learning rate at a step (from 0): up over the first `rise` of the steps, then linearly to 0."""
    return min((step + 1) / max(1.0, rise * total), (total - step) / total)


def step_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float, which: str = "") -> float:
    """Clip the accumulated gradient, take one step, clear it. Returns the norm before clipping.

    Raises UserError, before any weight has changed, when the norm is not finite; which: how it calls the gradient.
    """
    norm = float(whole_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)))
    if not math.isfinite(norm):
        raise UserError(f"the gradient{which} is not finite (norm {norm}); try a smaller --lr")
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
