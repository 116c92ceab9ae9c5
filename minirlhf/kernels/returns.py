"""Discounted sums of rewards: one reverse linear recurrence, as a handful of small matrix products."""

import functools

import torch
import torch.nn.functional as F

from minirlhf.kernels.logprob import describe, require, use_triton

BLOCK = 32  # columns per block: of 16, 32, 64 and 128 the fastest on CPU from 64 x 64 to 2048 x 256


def discounted_returns(rewards, mask, gamma, impl="auto"):
    """Sum of the discounted rewards from each step to the end of its row.

    x_t = m_t (r_t + gamma x_{t+1}), so that x_t = sum_{k >= t} gamma^(k-t) r_k over the mask

    rewards [B, R] floating point; mask [B, R], 0/1 or bool, a prefix of ones in each row; gamma in [0, 1].
    Returns [B, R] in the units of the rewards, 0 outside the mask, whose rewards are never read (NaN does no harm);
    float64 for float64 rewards, float32 for all others. A target, not a function to differentiate: no gradient flows.

    impl: as in token_logprobs. Raises ValueError that names the argument if a shape, dtype, device or value is wrong,
    or if rewards require grad (on CUDA a mask that is no prefix stops the device asynchronously).

    >>> import torch
    >>> discounted_returns(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1, 1, 0]]), 0.5)
    tensor([[2., 2., 0.]])
    """
    valid = _check(rewards, mask, gamma)
    scan = _scan
    if use_triton(impl, rewards, rewards.dtype):
        from minirlhf.kernels.returns_triton import scan
    return scan(rewards, valid, gamma)


def _check(rewards, mask, gamma):
    """Raise ValueError for a bad argument; return the mask as bool."""
    if rewards.ndim != 2 or rewards.numel() == 0 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be a non-empty floating-point [B, R], got {describe(rewards)}")
    if rewards.requires_grad:
        raise ValueError(f"rewards {describe(rewards)} require grad, but returns are targets: pass rewards.detach()")
    if mask.shape != rewards.shape or mask.device != rewards.device:
        raise ValueError(f"mask must be {list(rewards.shape)} on {rewards.device}, got {describe(mask)}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    valid = mask.bool()
    is_prefix = valid == mask
    is_prefix[:, 1:] &= valid[:, 1:] <= valid[:, :-1]
    require(is_prefix, f"mask must be a prefix of ones followed by zeros in every row, got {describe(mask)}")
    return valid


def _scan(rewards, valid, gamma):
    """The recurrence in blocks: inside one a product with a triangle of powers, then the carry from the block after it.

    With rewards 0 beyond the mask the coefficient is gamma everywhere, and the recurrence is x = rewards @ L with
    L[s, t] = gamma^(s-t) for s >= t: R^2 products a row. Blocks of K columns need only K R.
    """
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    batch, length = rewards.shape
    triangle, to_next_block = _powers(float(gamma), dtype, rewards.device)
    x = torch.where(valid, rewards, 0).to(dtype)
    x = F.pad(x, (0, -length % BLOCK)) if length % BLOCK else x  # pad copies
    x = (x.reshape(-1, BLOCK) @ triangle).view(batch, -1, BLOCK)
    for b in range(x.shape[1] - 2, -1, -1):
        x[:, b].addcmul_(x[:, b + 1, :1], to_next_block)
    return x.view(batch, -1)[:, :length]


@functools.lru_cache(maxsize=16)
def _powers(gamma, dtype, device):
    """gamma^(s-t) for s >= t, else 0, at [s, t] of [K, K], and gamma^(K-t), [K]; computed in float64, once a gamma."""
    t = torch.arange(BLOCK, dtype=torch.float64)
    triangle = torch.tril(gamma ** (t[:, None] - t).clamp(min=0))
    return triangle.to(device, dtype), (gamma ** (BLOCK - t)).to(device, dtype)
