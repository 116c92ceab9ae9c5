"""The optimizer, the learning-rate schedule, and one checked optimizer step."""

import math

from minirlhf.run.errors import UserError
from minirlhf.run.parallel import full_tensor

import torch
from torch import nn


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.0,
                   value_lr_scale: float = 1.0) -> torch.optim.AdamW:
    """AdamW with eps 1e-5 (Huang et al. 2024, detail 4).

    Only matrices decay: shrinking norms, biases and embeddings has no justification.
    The value head's learning rate is value_lr_scale * lr.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and not name.startswith(("wte", "wpe"))
        decay = weight_decay if is_matrix else 0.0
        scale = value_lr_scale if name.startswith("value_head") else 1.0
        groups.setdefault((decay, scale), []).append(parameter)
    options = [dict(params=parameters, weight_decay=decay, lr_scale=scale)
               for (decay, scale), parameters in groups.items()]
    return torch.optim.AdamW(options, lr=lr, betas=(0.9, 0.95), eps=1e-5, fused=True)


def warmup_then_decay(step: int, total: int, warmup: float = 0.05) -> float:
    """Learning rate as a fraction of its peak: linear warmup, then linear decay to 0.

    step: from 0.  warmup: fraction of the steps.
    """
    return min((step + 1) / max(1.0, warmup * total), (total - step) / total)


def step_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float,
                   max_grad_norm: float, name: str = "") -> float:
    """Clip the accumulated gradient, take one step, clear the gradient.

    Returns the gradient norm before clipping. Raises UserError if it is not finite, before any
    weight changes. name: which gradient this is, for that message.
    """
    limit = max_grad_norm or math.inf
    norm = float(full_tensor(nn.utils.clip_grad_norm_(model.parameters(), limit)))
    if not math.isfinite(norm):
        raise UserError(f"the gradient{name} is not finite (norm {norm}); "
                        "try a smaller learning rate")
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
