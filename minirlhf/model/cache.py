"""The key-value cache of the decoder."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of B sequences: kv [2, B, K, P + R, d] for each layer.

    Columns 0 .. P - 1 hold the prompts, each starting at column 0. Every later token takes the
    next column in all rows. Attention ignores the order of columns (positions are part of the
    keys), so only `bias` says which columns count: 0, or -inf.
    All columns are always read: batched products on a slice of them would be slower.
    """

    def __init__(self, config, attention_mask: Tensor, new_tokens: int, dtype: torch.dtype):
        """Space for prompts with this mask [B, P], filled by a forward pass, and for new tokens."""
        batch, self.columns = attention_mask.shape  # columns in use
        device = attention_mask.device
        room = self.columns + new_tokens
        shape = (2, batch, config.kv_heads, room, config.head_width)
        # zeros: a bias of -inf does not remove a NaN of uninitialized memory
        self.kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.lengths = attention_mask.sum(1)  # real tokens of each row
        is_empty = torch.arange(room, device=device) >= self.lengths[:, None]
        bias = torch.zeros(batch, config.kv_heads, 1, room, dtype=dtype, device=device)
        self.bias = bias.masked_fill_(is_empty[:, None, None], float("-inf"))

    def fill(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the prompts' keys and values [B, K, C, d]; C is the longest prompt."""
        columns = keys.shape[2]
        self.kv[layer][0, :, :, :columns] = keys
        self.kv[layer][1, :, :, :columns] = values

    def add_column(self) -> None:
        """Make one more column visible, for the next token of every row."""
        self.lengths += 1
        self.bias[..., self.columns] = 0.0
        self.columns += 1

    def append(self, layer: int, newest: Tensor) -> Tensor:
        """Store the newest token's keys and values [2, B, K, d]; return the layer's cache."""
        self.kv[layer][:, :, :, self.columns - 1] = newest
        return self.kv[layer]

    def keep_rows(self, keep: Tensor) -> Tensor:
        """Keep only the rows where the bool [B] is true. Returns the old index of each new row.

        Rows from the end move into the gaps, so that little is copied.
        """
        count = int(keep.sum())
        gaps = (~keep[:count]).nonzero().squeeze(1)
        moved = count + keep[count:].nonzero().squeeze(1)
        old = torch.arange(count, device=keep.device).index_copy_(0, gaps, moved)
        for layer, kv in enumerate(self.kv):
            kv[:, gaps, :, : self.columns] = kv[:, moved, :, : self.columns]
            self.kv[layer] = kv[:, :count]
        self.bias = self.bias[old]
        self.lengths = self.lengths[old]
        return old
