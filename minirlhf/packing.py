"""Rows of text as the trunk computes them: each token once, and no padding."""

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """N tokens that stand for rows of text: no padding, and a beginning that successive rows share stands here once."""

    ids: Tensor  # [N]
    positions: Tensor  # [N] place of the token in its row
    rows: Tensor  # [B, C] which token is where in each row, rows moved to the left; 0 past their ends
    first: Tensor  # [N] where each token stands in rows, flattened
    read: Tensor | None  # [M] the tokens that are wanted; None: all N
    out: Tensor  # [B, T] which of those is where in the rows as they were given


def pack(ids: Tensor, attention_mask: Tensor, wanted: Tensor | None = None) -> Packed:
    """The tokens of ids [B, T] that have to be computed. A causal model gives a shared beginning the same hidden states in
    every row, so siblings (responses to one prompt) pay for their prompt together. Work and memory: a few [B, T] integers."""
    length, lengths = ids.shape[1], attention_mask.sum(1, keepdim=True)
    columns = int(lengths.max())
    columns += spare if (spare := -columns % 16) <= 8 else 0  # attention takes 16 at a time: a processor does 96 sooner than 95
    order, row = torch.arange(columns, device=ids.device), torch.arange(len(ids), device=ids.device)[:, None]
    padding = attention_mask.int().argmax(1, keepdim=True)  # left of the first real token
    real = order < lengths
    aligned = ids.gather(1, (order + padding) % length)
    same = torch.zeros_like(real)  # as in the row above, up to and with this column
    same[1:] = ((aligned[1:] == aligned[:-1]) & real[1:] & real[:-1]).cumprod(1).bool()
    own = real & ~same
    source = torch.where(same, 0, row).cummax(0).values  # the row in which the token stands that this one is like
    rows = torch.where(real, (own.flatten().cumsum(0) - 1).view_as(own).gather(0, source), 0)
    first = own.flatten().nonzero().squeeze(1)
    read, out = None, rows.gather(1, (torch.arange(length, device=ids.device) - padding) % columns)
    if wanted is not None:
        read, place = out[wanted].unique(return_inverse=True)  # a token that siblings share is wanted once
        out = torch.zeros_like(out).masked_scatter(wanted, place)
    return Packed(aligned.flatten()[first], first % columns, rows, first, read, out)
