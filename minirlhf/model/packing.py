"""A batch without padding, in which shared prefixes are computed once."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packed(NamedTuple):
    """N tokens of B sequences, without padding.

    A prefix that consecutive sequences share is stored once: a causal model gives it the same
    hidden states in all of them. So responses to one prompt compute the prompt together.
    """

    ids: Tensor  # [N]
    positions: Tensor  # [N] position of the token in its sequence
    # [B, C] which of the N tokens each position holds; C is the longest sequence, all sequences
    # start in column 0, and positions after the end of a sequence hold 0
    rows: Tensor
    first: Tensor  # [N] where each token first occurs in rows.flatten()
    back: Tensor  # [B, T] as rows, in the original layout; arbitrary at padding

    def unpack(self, x: Tensor) -> Tensor:
        """[B, T, D] in the original layout, from one row per token [N, D]."""
        return F.embedding(self.back, x)


def pack(ids: Tensor, attention_mask: Tensor) -> Packed:
    """Pack ids [B, T] with a mask whose ones are contiguous in each row.

    Costs a few integer operations on [B, T].
    """
    width = ids.shape[1]
    lengths = attention_mask.sum(1, keepdim=True)
    columns = int(lengths.max())
    column = torch.arange(columns, device=ids.device)
    row = torch.arange(len(ids), device=ids.device)[:, None]
    padding = attention_mask.int().argmax(1, keepdim=True)  # columns before the first real token
    is_real = column < lengths
    aligned = ids.gather(1, (column + padding) % width)  # the modulo only affects padding

    # A token is repeated if the sequence equals the one above up to and including this column.
    equal = (aligned[1:] == aligned[:-1]) & is_real[1:] & is_real[:-1]
    repeated = torch.zeros_like(is_real)
    repeated[1:] = equal.cumprod(1).bool()
    is_own = is_real & ~repeated
    # A repeated token is stored in the nearest row above that does not repeat it. With 0 at
    # repeated tokens and the row number elsewhere, that row is a running maximum.
    source = torch.where(repeated, 0, row).cummax(0).values

    number = (is_own.flatten().cumsum(0) - 1).view_as(is_own)  # of each stored token
    rows = torch.where(is_real, number.gather(0, source), 0)
    first = is_own.flatten().nonzero().squeeze(1)
    positions = first % columns  # sequences start in column 0
    back = rows.gather(1, (torch.arange(width, device=ids.device) - padding) % columns)
    return Packed(aligned.flatten()[first], positions, rows, first, back)
