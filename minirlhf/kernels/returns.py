"""Discounted returns: one reverse linear recurrence, computed as a few small matrix products."""

import functools

from minirlhf.kernels.logprob import describe, require, use_triton

import torch
import torch.nn.functional as F

BLOCK = 32  # columns; of 16, 32, 64 and 128 the fastest on CPU from 64 x 64 to 2048 x 256


def discounted_returns(rewards, mask, gamma, impl="auto"):
    """Sum of the discounted rewards from each step to the end of its row.

    x_t = m_t (r_t + gamma x_{t+1}), so that x_t = sum_{k >= t} gamma^(k-t) r_k over the mask

    rewards [B, R] floating point; mask [B, R], 0/1 or bool, a prefix of ones in each row; gamma in
    [0, 1].
    Returns [B, R] in the units of the rewards, 0 outside the mask, where rewards may be NaN.
    float64 for float64 rewards, otherwise float32. No gradient flows: returns are targets.

    impl: as in token_logprobs.
    Raises ValueError that names the argument if a shape, dtype, device or value is wrong, or if
    rewards require grad. On CUDA a mask that is not a prefix stops the device later.

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
        raise ValueError("rewards must be a non-empty floating-point [B, R], "
                         f"got {describe(rewards)}")
    if rewards.requires_grad:
        raise ValueError(f"rewards {describe(rewards)} require grad, but returns are targets: "
                         "pass rewards.detach()")
    if mask.shape != rewards.shape or mask.device != rewards.device:
        raise ValueError(f"mask must be {list(rewards.shape)} on {rewards.device}, "
                         f"got {describe(mask)}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    valid = mask.bool()
    is_prefix = valid == mask
    is_prefix[:, 1:] &= valid[:, 1:] <= valid[:, :-1]
    require(is_prefix, "mask must be a prefix of ones followed by zeros in every row, "
                       f"got {describe(mask)}")
    return valid


def _scan(rewards, valid, gamma):
    """The recurrence in blocks of columns.

    One matrix product inside each block; then, from right to left, the discounted first return of
    the next block is added.

    With rewards 0 beyond the mask, x = rewards @ L with L[s, t] = gamma^(s-t) for s >= t. That
    costs R^2 products per row; blocks of K columns cost only K R.
    """
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    batch, length = rewards.shape
    triangle, to_next_block = _powers(float(gamma), dtype, rewards.device)
    x = torch.where(valid, rewards, 0).to(dtype)
    if length % BLOCK:  # pad copies, so only if necessary
        x = F.pad(x, (0, -length % BLOCK))
    x = (x.reshape(-1, BLOCK) @ triangle).view(batch, -1, BLOCK)
    for b in range(x.shape[1] - 2, -1, -1):
        x[:, b].addcmul_(x[:, b + 1, :1], to_next_block)
    return x.view(batch, -1)[:, :length]


@functools.lru_cache(maxsize=16)
def _powers(gamma, dtype, device):
    """(gamma^(s-t) for s >= t, else 0, at [s, t] of [K, K]; gamma^(K-t), [K])."""
    t = torch.arange(BLOCK, dtype=torch.float64)
    triangle = torch.tril(gamma ** (t[:, None] - t).clamp(min=0))
    return triangle.to(device, dtype), (gamma ** (BLOCK - t)).to(device, dtype)
