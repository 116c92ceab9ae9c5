"""The transformer: one trunk and three heads.

ModelConfig describes its form: by default that of GPT-2 (Radford et al. 2019), with LayerNorm,
learned positions and GELU. Llama's form (Touvron et al. 2023) has RMSNorm, rotary positions,
SwiGLU, and key-value heads that several query heads share.

    hidden = model(ids, attention_mask)        the trunk, [B, T, D]
    hidden @ model.lm_weight.T                 logits of the language model
    model.reward_head(hidden)                  the reward model: used on the last token
    model.value_head(hidden)                   V(s_t): used on the token before action a_t
"""

import copy
import dataclasses
import functools
import math
import typing
from collections.abc import Callable

from minirlhf.model.cache import KVCache
from minirlhf.model.packing import Packed, pack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]  # cosines and sines of angles, [N, 1, d / 2]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and form; every checkpoint stores them. The defaults are GPT-2's form."""

    vocab_size: int  # classes of the softmax: the text vocabulary and EOS
    table_rows: int  # rows of the embedding table: also PAD, rounded up to a multiple of 64
    n_layer: int
    n_head: int
    d_model: int
    context: int  # longest sequence, prompt and response together
    n_kv_head: int = 0  # heads of keys and values; each serves n_head / n_kv_head; 0: n_head
    d_head: int = 0  # width of a head; 0: d_model / n_head
    d_mlp: int = 0  # width inside the MLP; 0: 4 d_model
    swiglu: bool = False  # the MLP is SwiGLU (Shazeer 2020), not GELU
    rms_norm: bool = False  # RMSNorm (Zhang and Sennrich 2019), not LayerNorm
    norm_eps: float = 1e-5
    rope_base: float = 0.0  # of rotary positions (Su et al. 2021); 0: learned positions
    # Llama 3.1's longer context: factor, low and high frequency factor, original context
    rope_scaling: tuple[float, ...] = ()
    biases: str = "all"  # which matrices of a block have a bias: "all", "qkv" or "none"
    qk_norm: bool = False  # RMSNorm on each query and key (Qwen 3)
    tied: bool = True  # the LM head is the embedding table

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        return self.d_head or self.d_model // self.n_head

    def check(self) -> None:
        """Raise ValueError for a field of another type or size, or sizes that do not agree."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind: typing.Any = typing.get_origin(field.type) or field.type
            numbers = {tuple: value, str: ()}.get(kind, [value])
            lowest = 1 if field.default is dataclasses.MISSING else 0
            is_kind = isinstance(value, (int, float) if kind is float else kind)
            is_kind = is_kind and isinstance(value, bool) == (kind is bool)  # True is also an int
            if not is_kind or not all(lowest <= number < 2**31 for number in numbers):
                raise ValueError(f"{field.name} is {value!r:.80}")
        is_divided = self.d_head or self.d_model % self.n_head == 0
        is_odd = self.rope_base > 0 and self.head_width % 2
        is_too_wide = max(self.n_head * self.head_width, self.d_model, self.d_mlp) > 2**24
        if not is_divided or self.n_head % self.kv_heads or is_odd or is_too_wide:
            raise ValueError(f"{self.n_head} heads of width {self.head_width} do not fit "
                             f"{self.kv_heads} key-value heads and a width of {self.d_model}")
        if self.vocab_size > self.table_rows:
            raise ValueError("the vocabulary is larger than the token table")
        if self.n_layer > 1000 or len(self.rope_scaling) not in (0, 4):
            raise ValueError("there is no such model")

    def norm(self, width: int) -> nn.Module:
        """A new normalization layer."""
        return (nn.RMSNorm if self.rms_norm else nn.LayerNorm)(width, eps=self.norm_eps)


class Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x)).

    H query heads, K key heads and K value heads of width d: the rows of attention_in, in this
    order. The rows of mlp_in are gate and input of SwiGLU, F each, or the input of GELU.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        inner = c.d_mlp or 4 * c.d_model
        attention_width = c.n_head * c.head_width
        qkv_width = attention_width + 2 * c.kv_heads * c.head_width
        has_bias = c.biases == "all"
        self.ln_1 = c.norm(c.d_model)
        self.attention_in = nn.Linear(c.d_model, qkv_width, bias=c.biases != "none")
        if c.qk_norm:
            self.ln_q = c.norm(c.head_width)
            self.ln_k = c.norm(c.head_width)
        self.attention_out = nn.Linear(attention_width, c.d_model, bias=has_bias)
        self.ln_2 = c.norm(c.d_model)
        self.mlp_in = nn.Linear(c.d_model, 2 * inner if c.swiglu else inner, bias=has_bias)
        self.mlp_out = nn.Linear(inner, c.d_model, bias=has_bias)

    def forward(self, x: Tensor, rotation: Rotation | None,
                attend: Callable[[Tensor], Tensor]) -> Tensor:
        """x [N, D], one row per token.

        rotation: of rope_rotation, or None.
        attend: from queries, keys and values [N, H + 2 K, d] to the attention output [N, H d].
        """
        return self.block_output(x, attend(self.attention_input(x, rotation)))

    def attention_input(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """[N, H + 2 K, d] queries, keys and values; queries and keys contain their position."""
        c = self.config
        qkv = self.attention_in(self.ln_1(x)).unflatten(-1, (-1, c.head_width))
        if rotation is None:
            return qkv
        to_rotate, values = qkv.split([c.n_head + c.kv_heads, c.kv_heads], dim=1)
        if c.qk_norm:
            queries, keys = to_rotate.to(x.dtype).split([c.n_head, c.kv_heads], dim=1)
            to_rotate = torch.cat([self.ln_q(queries), self.ln_k(keys)], dim=1)
        return torch.cat([rotate(to_rotate, rotation).to(values.dtype), values], dim=1)

    def block_output(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [N, D] after this block, given the attention output [N, H d]."""
        x = x + self.attention_out(attended)
        inner = self.mlp_in(self.ln_2(x))
        if not self.config.swiglu:
            return x + self.mlp_out(F.gelu(inner, approximate="tanh"))
        gate, inner = inner.chunk(2, dim=-1)
        return x + self.mlp_out(F.silu(gate) * inner)


class Transformer(nn.Module):
    """Token embeddings, blocks, a final norm, and three heads."""

    # score = (reward_head - shift) / scale: set after training so that samples of the base model
    # have mean 0 and standard deviation 1
    score_shift: Tensor
    score_scale: Tensor
    bf16 = False  # whether autocast() uses bfloat16; the weights stay float32

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.table_rows, config.d_model)
        if not config.rope_base:
            self.wpe = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = config.norm(config.d_model)
        if not config.tied:
            self.lm_head = nn.Linear(config.d_model, config.table_rows, bias=False)
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

    def freeze_matrices(self) -> None:
        """No gradients; with bf16, store the matrices of the blocks as autocast() rounds them.

        So the model takes less memory and gives the same results under autocast().
        """
        self.requires_grad_(False)
        for layer in self.blocks.modules():
            if self.bf16 and isinstance(layer, nn.Linear):
                layer.to(torch.bfloat16)

    def compile_blocks(self) -> None:
        """Compile every block except attention, for any number of tokens."""
        for block in self.blocks:
            for part in (Block.attention_input, Block.block_output):
                # hides the method on this instance; a deep copy also copies the block in the
                # partial, so it uses its own weights
                compiled = functools.partial(torch.compile(part, dynamic=True), block)
                setattr(block, part.__name__, compiled)

    @property
    def lm_table(self) -> Tensor:
        """The LM head with all its rows: those of lm_weight, PAD, and unused rows."""
        return self.wte.weight if self.config.tied else self.lm_head.weight

    @property
    def lm_weight(self) -> Tensor:
        """[V, D] the LM head, without PAD and the rows after it."""
        return self.lm_table[: self.config.vocab_size]

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
        x, rotation = self.embed(packed.ids, packed.positions)
        for layer, block in enumerate(self.blocks):
            attend = functools.partial(attend_packed, packed, self.config.n_head, cache, layer)
            x = block(x, rotation, attend)
        return packed.unpack(self.ln_f(x))

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Rotation | None]:
        """(the first block's input [N, D], the rotation of queries and keys) of ids [N]."""
        x = self.wte(ids)
        if self.config.rope_base:
            return x, rope_rotation(self.config, positions, x.dtype)
        return x + self.wpe(positions), None

    def decode(self, token: Tensor, cache: KVCache) -> Tensor:
        """Hidden states [B, D] of one more token [B] in each row of the cache."""
        x, rotation = self.embed(token, cache.lengths)  # position: the number of tokens before it
        cache.add_column()  # from here on cache.lengths includes this token
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, functools.partial(attend_cached, cache, layer))
        return self.ln_f(x)


# ---- rotary positions ----------------------------------------------------------------------------


def rope_rotation(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """Cosines and sines of the angles by which RoPE turns tokens at positions [N].

    angle = position * base^(-2 i / d) for the pair i of a head (Su et al. 2021, eq. 15).
    Llama 3.1 divides low frequencies by a factor, so that distant tokens turn no further than in
    the original context. Frequencies with `low` to `high` turns in that context change gradually.
    """
    exact = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, config.head_width, 2, device=positions.device).to(exact)
    frequency = 1.0 / config.rope_base ** (exponent / config.head_width)
    if config.rope_scaling:
        factor, low, high, original_context = config.rope_scaling
        turns = original_context * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequency = frequency * (kept + (1.0 - kept) / factor)
    angle = positions[:, None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x [N, heads, d], with each pair (x_i, x_{i + d / 2}) turned by its angle."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


# ---- attention -----------------------------------------------------------------------------------


def attend_packed(packed: Packed, n_head: int, cache: KVCache | None, layer: int,
                  qkv: Tensor) -> Tensor:
    """[N, H d] attention of packed tokens, computed in the padded layout packed.rows [B, C]."""
    batch, columns = packed.rows.shape
    _, heads, size = qkv.shape
    kv_heads = (heads - n_head) // 2
    # F.embedding(index, x) is x[index], with a faster backward pass
    qkv = F.embedding(packed.rows, qkv.flatten(1)).view(batch, columns, heads, size)
    queries, keys, values = qkv.transpose(1, 2).split([n_head, kv_heads, kv_heads], dim=1)
    if cache is not None:
        cache.fill(layer, keys, values)
    # padding comes after the real tokens, so the causal mask also hides it
    attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True,
                                              enable_gqa=kv_heads < n_head)
    attended = attended.transpose(1, 2).reshape(batch * columns, -1)
    return F.embedding(packed.first, attended)  # one row per token again


def attend_cached(cache: KVCache, layer: int, qkv: Tensor) -> Tensor:
    """[B, H d] attention of each row's newest token over the cache.

    Two batched products are faster than the attention kernels for one query per row. The H / K
    query heads that share a key head are the rows of one product.
    """
    _, batch, kv_heads, _, size = cache.kv[layer].shape
    queries, newest = qkv.split([qkv.shape[1] - 2 * kv_heads, 2 * kv_heads], dim=1)
    queries = queries.reshape(batch * kv_heads, -1, size)
    newest = newest.unflatten(1, (2, kv_heads)).transpose(0, 1)
    keys, values = cache.append(layer, newest).view(2, batch * kv_heads, -1, size)
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
