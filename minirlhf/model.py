"""The transformer: one trunk, three heads. Pre-LayerNorm, learned positions, GELU, tied LM head, as in GPT-2.

    hidden = model(ids, attention_mask)        the trunk, [B, T, D]
    hidden @ model.lm_weight.T                 the language model (softmax over the text vocabulary and EOS)
    model.reward_head(hidden)                  the reward model reads the last real token
    model.value_head(hidden)                   V(s_t) reads the token before action a_t
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.packing import Packed, pack


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes; a checkpoint carries them."""

    vocab_size: int  # rows of the softmax: the text vocabulary and EOS
    table_rows: int  # rows of the embedding table: PAD too, rounded up so that matrix kernels meet no ragged edge
    n_layer: int
    n_head: int
    d_model: int
    context: int  # longest sequence, prompt and response together


class KVCache:
    """What the decoder keeps of B rows of text: keys and values, kv [2, B, H, columns, D / H] of each layer.

    Columns 0 .. P - 1 belong to the prompts, each from column 0 on; every token after them takes the next column in all
    rows. Attention does not ask for order (positions are in the keys), only `bias` for what is there: 0, or -inf. It reads all
    columns, in use or not: products in batch take three times as long on a slice of them. So room comes a quarter at a time, and
    to each layer when its turn comes: what was copied just before is read from the processor's cache.
    """

    def __init__(self, model: "Transformer", attention_mask: Tensor):
        """Room for prompts of this mask [B, P], which a forward pass fills."""
        config, weight, (batch, columns) = model.config, model.wte.weight, attention_mask.shape
        shape = (2, batch, config.n_head, room := columns + columns // 4 + 1, config.d_model // config.n_head)
        self.kv = [weight.new_zeros(shape) for _ in range(config.n_layer)]  # -inf does not hide a nan
        self.lengths, self.columns = attention_mask.sum(1), columns  # real tokens in each row; columns in use
        padding = torch.arange(room, device=weight.device) >= self.lengths[:, None]
        self.bias = weight.new_zeros(batch, config.n_head, 1, room).masked_fill_(padding[:, None, None], float("-inf"))

    def add_column(self) -> None:
        """Room for one more token in every row."""
        self.lengths += 1
        self.columns += 1
        if self.columns > self.bias.shape[3]:
            self.bias = F.pad(self.bias, (0, self.columns // 4 + 1), value=float("-inf"))
        self.bias[..., self.columns - 1] = 0.0

    def fill_column(self, layer: int, newest: Tensor) -> Tensor:
        """What the newest token of each row has for the others to read, [2, B, H, D / H], joins the rest, which is returned."""
        kv = self.kv[layer]
        if room := self.bias.shape[3] - kv.shape[3]:
            kv = self.kv[layer] = torch.cat([kv, kv.new_zeros(*kv.shape[:3], room, kv.shape[4])], dim=3)
        kv[:, :, :, self.columns - 1] = newest
        return kv

    def keep_rows(self, keep: Tensor) -> Tensor:
        """Drop the rows that the bool [B] does not keep. Rows from the end move into the gaps, so that little is copied.
        Returns which old row each new one is."""
        count = int(keep.sum())
        gaps, movers = (~keep[:count]).nonzero().squeeze(1), count + keep[count:].nonzero().squeeze(1)
        old = torch.arange(count, device=keep.device).index_copy_(0, gaps, movers)
        for layer, kv in enumerate(self.kv):
            kv[:, gaps, :, : self.columns] = kv[:, movers, :, : self.columns]
            self.kv[layer] = kv[:, :count]
        self.bias, self.lengths = self.bias[old], self.lengths[old]
        return old


class _TiedTable(torch.autograd.Function):
    """ids [N], table [V, D] -> the rows that the trunk begins with, [N, D], and the table for the head. As one node for both
    ends it answers with one gradient of the table's size, a third of GPT-2 small's: it adds the rows' to the head's, in place.
    Autograd by itself makes one for each end, and adds them when all other gradients are there."""

    @staticmethod
    def forward(ctx, ids, table):
        ctx.save_for_backward(ids)
        return F.embedding(ids, table), table.detach()  # no view of it, of which FSDP would warn

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows, grad_table):
        return None, grad_table.index_add_(0, *ctx.saved_tensors, grad_rows)  # the head's, or zeros where there was none


class Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.d_model
        self.ln_1 = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU(approximate="tanh")
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor], read: Tensor | None = None) -> Tensor:
        """x [N, D], one row per token; attend maps their queries, keys and values [N, 3 D] to what each token read [N, D].
        read [M]: go on with these tokens alone."""
        mixed = attend(self.before(x))
        if read is not None:
            x, mixed = F.embedding(read, x), F.embedding(read, mixed)
        return self.after(x, mixed)

    def before(self, x: Tensor) -> Tensor:
        return self.attention_in(self.ln_1(x))

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.attention_out(mixed)
        return x + self.mlp_out(self.gelu(self.mlp_in(self.ln_2(x))))


class Transformer(nn.Module):
    """Token and position embeddings, blocks, a last LayerNorm, and the heads that read what comes out."""

    score_shift: Tensor  # score = (reward_head - shift) / scale: set after training so that the base policy's samples have
    score_scale: Tensor  # mean 0, deviation 1

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.table_rows, config.d_model)
        self.wpe = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model)
        self.reward_head = nn.Linear(config.d_model, 1)
        self.value_head = nn.Linear(config.d_model, 1)
        self.register_buffer("score_shift", torch.zeros(()))
        self.register_buffer("score_scale", torch.ones(()))
        self.initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Random weights: matrices of deviation 1 / sqrt(fan-in), which keeps activations near 1 at any width (GPT-2's 0.02
        is that for a width of about 2,000, and trains a narrow model slowly); residual branches less by their number.

        Token embeddings of deviation 0.1, with which small models learn to copy sooner. The reward and value heads start
        at 0, so that the first preference loss is ln 2 and the first values are 0.
        """
        for name, weight in self.named_parameters():
            if name.endswith("bias") or name.startswith(("reward_head", "value_head")):
                weight.zero_()
            elif "ln_" in name:
                weight.fill_(1.0)
            elif name == "wte.weight":
                weight.normal_(0.0, 0.1, generator=generator)
            elif name == "wpe.weight":
                weight.normal_(0.0, 0.02, generator=generator)
            else:
                scale = (2 * self.config.n_layer) ** 0.5 if name.endswith("_out.weight") else 1.0
                weight.normal_(0.0, weight.shape[1] ** -0.5 / scale, generator=generator)

    def compile_blocks(self) -> None:
        """Compile what is the same in training and decoding: all of a block but attention. The count of tokens stays free."""
        for block in self.blocks:
            for part in (Block.before, Block.after):  # as attributes of the block, of which a deep copy gets its own
                setattr(block, part.__name__, functools.partial(torch.compile(part, dynamic=True), block))

    @property
    def lm_weight(self) -> Tensor:
        """[V, D] the LM head, tied to the embedding. PAD and the rounding rows are left out: no softmax contains them."""
        return self.wte.weight[: self.config.vocab_size]

    def forward(self, ids: Tensor, attention_mask: Tensor, cache: KVCache | None = None, wanted: Tensor | None = None,
                with_table: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states [B, T, D] of ids [B, T], exact under left and right padding; fills a cache made for this mask.

        attention_mask: bool [B, T], 1 on real tokens, which lie together in each row. Position ids count real tokens, so
        that a sequence has the same hidden states wherever its padding is. Those at padding are meaningless. Only real
        tokens are computed, and what rows in succession have in common only once.
        wanted: bool [B, T], the real tokens whose states are going to be read, at least one; None is all of them. The last
        block, after whose attention no token reads another, leaves out the rest, whose states are meaningless then.
        with_table: return wte.weight too, for a head that is differentiated: both ends then share one gradient. To be used
        once, and by what makes a fresh gradient, as token_logprobs does: the embedding's is added to it in place.
        """
        if ids.shape[1] > self.config.context:
            raise ValueError(f"ids {tuple(ids.shape)}: longer than the context of {self.config.context}")
        layout = pack(ids, attention_mask, wanted)
        rows, table = _TiedTable.apply(layout.ids, self.wte.weight)
        x = rows + self.wpe(layout.positions)
        for layer, block in enumerate(self.blocks):
            attend = functools.partial(attend_packed, layout, self.config.n_head, cache, layer)
            x = block(x, attend, layout.read if layer + 1 == self.config.n_layer else None)
        hidden = F.embedding(layout.out, self.ln_f(x))
        return (hidden, table) if with_table else hidden

    def decode(self, token: Tensor, cache: KVCache) -> Tensor:
        """Hidden states [B, D] of one more token [B] in each row of the cache."""
        x = self.wte(token) + self.wpe(cache.lengths)
        cache.add_column()
        for layer, block in enumerate(self.blocks):
            x = block(x, functools.partial(attend_cached, cache, layer))
        return self.ln_f(x)


def attend_packed(layout: Packed, n_head: int, cache: KVCache | None, layer: int, qkv: Tensor) -> Tensor:
    """[N, D] what each packed token reads in its row. Padding is to the right there, where no real token looks."""
    batch, columns = layout.rows.shape
    qkv = F.embedding(layout.rows, qkv).view(batch, columns, 3, n_head, -1)
    queries, keys, values = (part.transpose(1, 2) for part in qkv.unbind(2))
    if cache is not None:
        for which, part in enumerate((keys, values)):
            cache.kv[layer][which, :, :, :columns] = part[:, :, : cache.kv[layer].shape[3]]
    mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return F.embedding(layout.first, mixed.transpose(1, 2).reshape(batch * columns, -1))


def attend_cached(cache: KVCache, layer: int, qkv: Tensor) -> Tensor:
    """[B, D] what the newest token of each row reads in the cache. With one query a row, two products in batch are faster
    than attention kernels, which are made for many."""
    _, batch, n_head, _, size = cache.kv[layer].shape
    qkv = qkv.view(batch, 3, n_head, size).transpose(0, 1)
    keys, values = cache.fill_column(layer, qkv[1:]).view(2, batch * n_head, -1, size)
    scores = torch.baddbmm(cache.bias.flatten(0, 1), qkv[0].reshape(-1, 1, size), keys.transpose(1, 2), alpha=size ** -0.5)
    return torch.bmm(scores.softmax(-1), values).view(batch, -1)


def in_full_precision(head: nn.Linear, hidden: Tensor) -> Tensor:
    """[...] a scalar head on hidden [..., D], whatever autocast says: scores and values are compared in small differences."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden).squeeze(-1)


def last_tokens(attention_mask: Tensor) -> Tensor:
    """Bool [B, T]: true on the last real token of each row (there is one), whatever the padding."""
    order = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return order == (attention_mask * order).argmax(dim=1, keepdim=True)


def last_token_scores(model: Transformer, hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """[B] the reward head's normalised score, read from hidden [B, T, D] at the last real token."""
    raw = in_full_precision(model.reward_head, hidden[last_tokens(attention_mask)])
    return (raw.to(torch.promote_types(raw.dtype, torch.float32)) - model.score_shift) / model.score_scale


def sequence_scores(model: Transformer, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B] the reward model's normalised score of each sequence of ids [B, T]."""
    return last_token_scores(model, model(ids, attention_mask, wanted=last_tokens(attention_mask)), attention_mask)
