"""The transformer: one trunk and three heads.

Pre-LayerNorm, learned positions, GELU, tied LM head, as in GPT-2 (Radford et al. 2019).

    hidden = model(ids, attention_mask)        the trunk, [B, T, D]
    hidden @ model.lm_weight.T                 logits of the language model
    model.reward_head(hidden)                  the reward model: used on the last token
    model.value_head(hidden)                   V(s_t): used on the token before action a_t
"""

import copy
import dataclasses
import functools
from collections.abc import Callable

from minirlhf.model.cache import KVCache
from minirlhf.model.packing import Packed, pack

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes; every checkpoint stores them."""

    vocab_size: int  # classes of the softmax: the text vocabulary and EOS
    table_rows: int  # rows of the embedding table: also PAD, rounded up to a multiple of 64
    n_layer: int
    n_head: int
    d_model: int
    context: int  # longest sequence, prompt and response together


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

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """x [N, D], one row per token.

        attend: from queries, keys and values [N, 3 D] to the attention output [N, D].
        """
        return self.block_output(x, attend(self.attention_input(x)))

    def attention_input(self, x: Tensor) -> Tensor:
        return self.attention_in(self.ln_1(x))

    def block_output(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attention_out(attended)
        return x + self.mlp_out(self.gelu(self.mlp_in(self.ln_2(x))))


class Transformer(nn.Module):
    """Token and position embeddings, blocks, a final LayerNorm, and three heads."""

    # score = (reward_head - shift) / scale: set after training so that samples of the base model
    # have mean 0 and standard deviation 1
    score_shift: Tensor
    score_scale: Tensor
    bf16 = False  # whether autocast() uses bfloat16; the weights stay float32

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
        self.initialize(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Random weights.

        Matrices: standard deviation 1 / sqrt(fan-in), which keeps activations near 1 at any width.
        GPT-2's 0.02 is 1 / sqrt(2500), and narrow models train slowly with it.
        Outputs of residual branches are divided by sqrt(2 * layers), as in GPT-2.
        Position embeddings: 0.02, as in GPT-2.
        Token embeddings: 0.1, because small models then learn to copy earlier.
        Reward and value heads: 0, so that the first preference loss is ln 2 and V starts at 0.
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
                branches = 2 * self.config.n_layer if name.endswith("_out.weight") else 1
                std = weight.shape[1] ** -0.5 / branches ** 0.5
                weight.normal_(0.0, std, generator=generator)

    def autocast(self) -> torch.autocast:
        """A context in which matrix products round their operands to bfloat16, if self.bf16 is set.

        Sums outside of products stay in float32. Use a new context for each forward pass: a context
        keeps the rounded weights, which would be old after an optimizer step.
        """
        return torch.autocast(self.wte.weight.device.type, torch.bfloat16, enabled=self.bf16)

    def for_decoding(self) -> "Transformer":
        """The model itself; with bf16 a copy in bfloat16, which casts no weight for each token."""
        if not self.bf16:
            return self
        return copy.deepcopy(self).to(torch.bfloat16).requires_grad_(False)

    def compile_blocks(self) -> None:
        """Compile every block except attention, for any number of tokens."""
        for block in self.blocks:
            for part in (Block.attention_input, Block.block_output):
                # hides the method on this instance; a deep copy also copies the block in the
                # partial, so it uses its own weights
                compiled = functools.partial(torch.compile(part, dynamic=True), block)
                setattr(block, part.__name__, compiled)

    @property
    def lm_weight(self) -> Tensor:
        """[V, D] the LM head, tied to the embedding; without PAD and the rows after it."""
        return self.wte.weight[: self.config.vocab_size]

    def forward(self, ids: Tensor, attention_mask: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states [B, T, D] of ids [B, T], exact under left and right padding.

        attention_mask: bool [B, T], 1 on real tokens, which are contiguous in each row. Positions
        count real tokens, so a sequence has the same hidden states under any padding.
        The states at padding are meaningless.
        cache: made for this mask; the pass fills it.
        """
        if ids.shape[1] > self.config.context:
            raise ValueError(f"ids {tuple(ids.shape)} exceed the context of {self.config.context}")
        packed = pack(ids, attention_mask)
        x = self.wte(packed.ids) + self.wpe(packed.positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, functools.partial(attend_packed, packed, self.config.n_head, cache, layer))
        return packed.unpack(self.ln_f(x))

    def decode(self, token: Tensor, cache: KVCache) -> Tensor:
        """Hidden states [B, D] of one more token [B] in each row of the cache."""
        x = self.wte(token) + self.wpe(cache.lengths)  # position: the number of tokens before it
        cache.add_column()  # from here on cache.lengths includes this token
        for layer, block in enumerate(self.blocks):
            x = block(x, functools.partial(attend_cached, cache, layer))
        return self.ln_f(x)


# ---- attention -----------------------------------------------------------------------------------


def attend_packed(packed: Packed, n_head: int, cache: KVCache | None, layer: int,
                  qkv: Tensor) -> Tensor:
    """[N, D] attention of packed tokens, computed in the padded layout packed.rows [B, C]."""
    batch, columns = packed.rows.shape
    # F.embedding(index, x) is x[index], with a faster backward pass
    qkv = F.embedding(packed.rows, qkv).view(batch, columns, 3, n_head, -1)
    queries, keys, values = (part.transpose(1, 2) for part in qkv.unbind(2))
    if cache is not None:
        cache.fill(layer, keys, values)
    # padding comes after the real tokens, so the causal mask also hides it
    attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    attended = attended.transpose(1, 2).reshape(batch * columns, -1)
    return F.embedding(packed.first, attended)  # one row per token again


def attend_cached(cache: KVCache, layer: int, qkv: Tensor) -> Tensor:
    """[B, D] attention of each row's newest token over the cache.

    For one query per row, two batched products are faster than the attention kernels.
    """
    _, batch, n_head, _, size = cache.kv[layer].shape
    qkv = qkv.view(batch, 3, n_head, size).transpose(0, 1)
    queries = qkv[0].reshape(-1, 1, size)
    keys, values = cache.append(layer, qkv[1:]).view(2, batch * n_head, -1, size)
    bias = cache.bias.flatten(0, 1)
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=size ** -0.5)
    return torch.bmm(scores.softmax(-1), values).view(batch, -1)


# ---- heads ---------------------------------------------------------------------------------------


def apply_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    """[...] a scalar head on hidden [..., D], without autocast: small differences matter."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden).squeeze(-1)


def is_last_token(attention_mask: Tensor) -> Tensor:
    """Bool [B, T]: true on the last real token of each row, under any padding."""
    column = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return column == (attention_mask * column).argmax(dim=1, keepdim=True)


def last_token_scores(model: Transformer, hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """[B] normalized scores: the reward head on hidden [B, T, D] at the last real token."""
    raw = apply_head(model.reward_head, hidden[is_last_token(attention_mask)])
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    return (raw - model.score_shift) / model.score_scale


def sequence_scores(model: Transformer, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B] the reward model's normalized score of each sequence of ids [B, T]."""
    return last_token_scores(model, model(ids, attention_mask), attention_mask)
