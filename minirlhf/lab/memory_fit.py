"""Which pretrained models fit on one GPU, with --preset hh, at which micro-batch size.

Computed, not measured: parameter counts are exact, the bytes that a block keeps for the backward
pass are counted with a few tokens on the CPU, and the rest follows from shapes.
"""

import functools

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.lab.common import markdown_table
from minirlhf.model import ModelConfig, Transformer
from minirlhf.model.packing import pack
from minirlhf.model.transformer import Block, attend_packed, rope_rotation

import torch
from torch import nn

GIB = 2**30
CARDS = (16, 24, 48, 80)  # GiB
USABLE = 0.9  # of a card; the rest is for CUDA itself and for gaps between tensors


def llama(layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocab: int,
          **form) -> ModelConfig:
    """A tied model of Llama's form; the table has rows for PAD."""
    form = dict(rope_base=1e5, biases="none") | form
    return ModelConfig(vocab, -(-(vocab + 1) // 64) * 64, layers, heads, width, 8192, kv_heads,
                       d_mlp=mlp, swiglu=True, rms_norm=True, **form)


MODELS = {
    "SmolLM2-135M": llama(30, 576, 9, 3, 1536, 49152),
    "SmolLM2-360M": llama(32, 960, 15, 5, 2560, 49152),
    "Qwen2.5-0.5B": llama(24, 896, 14, 2, 4864, 151936, biases="qkv"),
    "Qwen3-0.6B": llama(28, 1024, 16, 8, 3072, 151936, d_head=128, qk_norm=True),
    "Llama-3.2-1B": llama(16, 2048, 32, 8, 8192, 128256)}


def parameters(config: ModelConfig) -> tuple[int, int]:
    """(all, those of the blocks' matrices)."""
    with torch.device("meta"):
        model = Transformer(config)
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    matrices = sum(p.numel() for layer in layers for p in layer.parameters())
    return sum(p.numel() for p in model.parameters()), matrices


@functools.cache
def kept_bytes(config: ModelConfig, bf16: bool) -> float:
    """Bytes that one block keeps for the backward pass, for each token.

    Counted by autograd's hooks for saved tensors, as the difference of 16 and 8 tokens.
    """
    with torch.device("meta"):
        block = Block(config)
    block.to_empty(device="cpu")  # the values do not matter
    totals = []
    for count in (8, 16):
        saved = {}

        def keep(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x  # a reference, so that no address is reused
            return x

        ids = torch.arange(count)[None]
        packed = pack(ids, torch.ones_like(ids, dtype=torch.bool))
        x = torch.zeros(count, config.d_model, requires_grad=True)
        rotation = rope_rotation(config, packed.positions, x.dtype) if config.rope_base else None
        attend = functools.partial(attend_packed, packed, config.n_head, None, 0)
        with (torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
              torch.autocast("cpu", torch.bfloat16, enabled=bf16)):
            block(x, rotation, attend)
        totals.append(sum(x.untyped_storage().nbytes() for x in saved.values()))
    return (totals[1] - totals[0]) / 8


def peak(config: ModelConfig, bf16: bool, micro_batch_size: int) -> float:
    """Bytes at the peak of an iteration of ppo with --preset hh, all texts at full length.

    Weights, gradients and Adam's two moments are float32. With bf16, the matrices of the reference
    and of the reward model have 2 bytes, autocast keeps a rounded copy of the policy's matrices and
    table, and sampling uses a copy of the whole policy. A pass without gradients needs two thirds
    of what one block keeps, for all rows at once.
    """
    policy = PolicyConfig(**PolicyConfig.presets["hh"])
    reward = RewardConfig(**RewardConfig.presets["hh"])
    length = reward.max_prompt_length + reward.max_response_length
    count, matrices = parameters(config)
    table = config.table_rows * config.d_model
    size = 2 if bf16 else 4
    frozen = 2 * (4 * count - (2 * matrices if bf16 else 0))
    always = 4 * count + 8 * count + frozen
    tokens = micro_batch_size * length
    layer = kept_bytes(config, bf16) * tokens
    transient = 2 / 3 * kept_bytes(config, bf16) * policy.batch_size
    rounded = 2 * (matrices + table) if bf16 else 0
    # the LM head's gradient of the table is another tensor of its size
    update = 4 * count + 4 * table + rounded + (config.n_layer + 1) * layer
    row = 2 * config.n_layer * config.kv_heads * config.head_width * length * size  # of the cache
    decoder = 2 * count if bf16 else 0
    sample = decoder + policy.batch_size * row + reward.max_prompt_length * transient
    return always + max(update, sample, length * transient)


def largest_micro_batch(config: ModelConfig, bf16: bool, capacity: float) -> int:
    """The largest power of 2, at most the minibatch size of 64, that fits; 0 if none does."""
    sizes = [2**n for n in range(7)]
    return max([size for size in sizes if peak(config, bf16, size) <= capacity], default=0)


def fit_table() -> str:
    """Rows: models and precision; columns: cards."""
    rows = []
    for name, config in MODELS.items():
        for bf16 in (False, True):
            fits = [largest_micro_batch(config, bf16, USABLE * card * GIB) for card in CARDS]
            rows.append([name, "--bf16" if bf16 else "float32",
                         f"{peak(config, bf16, 1) / GIB:.1f}", *(str(n or "-") for n in fits)])
    return markdown_table(["model", "products", "GiB at micro-batch 1",
                           *(f"{card} GiB" for card in CARDS)], rows)
