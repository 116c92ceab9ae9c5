"""The transformer: one trunk, three heads. Pre-LayerNorm, learned positions, GELU, tied LM head, as in GPT-2.

    hidden = model(ids, attention_mask)        the trunk, [B, T, D]
    hidden @ model.lm_weight.T                 the language model (softmax over the text vocabulary and EOS)
    model.reward_head(hidden)                  the reward model reads the last real token
    model.value_head(hidden)                   V(s_t) reads the token before action a_t
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.config import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: int  # rows of the softmax: the text vocabulary and EOS
    table_rows: int  # rows of the embedding table: PAD too, rounded up so that matrix kernels meet no ragged edge
    n_layer: int
    n_head: int
    d_model: int
    context: int  # longest sequence, prompt and response together


class KVCache:
    """Keys and values of the tokens read so far, allocated once: [L, B, H, context, D / H]."""

    def __init__(self, model: "Transformer", batch: int, context: int):
        config, weight = model.config, model.wte.weight
        shape = (config.n_layer, batch, config.n_head, context, config.d_model // config.n_head)
        self.keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, Q, D / H] after the tokens before; returns all keys and values up to and with these."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length:end] = keys
        self.values[layer, :, :, self.length:end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop every row of the batch but these."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.d_model
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, bias: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (part.view(batch, length, self.n_head, -1).transpose(1, 2)
                             for part in self.attention_in(self.ln_1(x)).split(width, dim=2))
        if cache is not None:
            key, value = cache.append(layer, key, value)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.ln_2(x)), approximate="tanh"))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.table_rows, config.d_model)
        self.wpe = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model)
        self.reward_head = nn.Linear(config.d_model, 1)
        self.value_head = nn.Linear(config.d_model, 1)
        # score = (reward_head - shift) / scale: set after training so that the base policy's samples have mean 0, deviation 1
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
        branches = math.sqrt(2 * self.config.n_layer)
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
                scale = branches if name.endswith("_out.weight") else 1.0
                weight.normal_(0.0, weight.shape[1] ** -0.5 / scale, generator=generator)

    @property
    def lm_weight(self) -> Tensor:
        """[V, D] the LM head, tied to the embedding. PAD and the rounding rows are left out: no softmax contains them."""
        return self.wte.weight[: self.config.vocab_size]

    def forward(self, ids: Tensor, attention_mask: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states [B, T, D] of ids [B, T], exact under left and right padding.

        attention_mask: bool [B, S], S = tokens in the cache + T, 1 on real tokens. Position ids count real tokens,
        so that a sequence has the same hidden states wherever its padding is. Those at padding are meaningless.
        """
        length, seen = ids.shape[1], attention_mask.shape[1]
        if seen > self.config.context and cache is None:
            raise ValueError(f"ids {tuple(ids.shape)}: longer than the context of {self.config.context}")
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, seen - length:]
        order = torch.arange(seen, device=ids.device)
        causal = order[seen - length:, None] >= order[None, :]  # [T, S]
        itself = order[seen - length:, None] == order[None, :]  # padding sees itself: a softmax over nothing is NaN
        visible = (causal & attention_mask[:, None, :] | itself)[:, None]  # [B, 1, T, S]
        bias = torch.zeros(visible.shape, dtype=self.wte.weight.dtype, device=ids.device).masked_fill_(~visible, float("-inf"))
        x = self.wte(ids) + self.wpe(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, bias, cache, layer)
        if cache is not None:
            cache.length += length
        return self.ln_f(x)


def last_token_scores(model: Transformer, hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """[B] the reward head's normalised score, read from hidden [B, T, D] at the last real token, whatever the padding."""
    order = torch.arange(hidden.shape[1], device=hidden.device)
    last = (attention_mask * order).argmax(dim=1)
    raw = model.reward_head(hidden[torch.arange(len(hidden), device=hidden.device), last]).squeeze(-1)
    return (raw.to(torch.promote_types(raw.dtype, torch.float32)) - model.score_shift) / model.score_scale


def sequence_scores(model: Transformer, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B] the reward model's normalised score of each sequence of ids [B, T]."""
    return last_token_scores(model, model(ids, attention_mask), attention_mask)


def pick_device(name: str) -> torch.device:
    """The device that --device names. Raises UserError when this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())[name]
    if not there:
        raise UserError(f"--device {name}: this machine has none that torch can use; leave the flag out, or --device cpu")
    return torch.device(name)
