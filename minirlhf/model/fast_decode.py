"""Faster decoding on CPU: weight matrices in oneDNN's own order."""

import contextlib
from collections.abc import Iterator

from minirlhf.model.transformer import Transformer

import torch
from torch import Tensor, nn

SMALLEST = 2**18  # elements of a matrix; smaller ones stay in the processor's cache anyway


@contextlib.contextmanager
def fast_linear_layers(model: Transformer, rows: int) -> Iterator[nn.Module]:
    """Within this context the model's linear layers use reordered copies of their weights.

    Yields the LM head, from hidden [B, D] to logits [B, V]. No gradients.
    rows: about how many tokens are decoded at a time.

    Few rows take as long as reading the weights, and oneDNN reads its own order about twice as
    fast: at GPT-2 small's size, sampling 8 responses of 48 tokens takes 0.6 of the time.
    """
    lm_head = LMHead(model)
    layers: list[nn.Linear | LMHead] = [lm_head]
    layers += [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    chosen = [layer for layer in layers if layer.weight.numel() >= SMALLEST]
    if not is_supported(model):
        chosen = []
    try:
        for layer in chosen:  # an instance attribute hides the method of the class
            vars(layer)["forward"] = reordered(layer.weight, layer.bias, rows)
        yield lm_head
    finally:
        for layer in chosen:
            vars(layer).pop("forward", None)


class LMHead(nn.Module):
    """hidden [B, D] -> logits [B, V]."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.weight = model.lm_weight.detach()
        self.bias = None

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


def is_supported(model: Transformer) -> bool:
    """float32 on a CPU with oneDNN, not compiled and without autocast."""
    weight = model.wte.weight
    has_onednn = (torch.backends.mkldnn.is_available()
                  and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    is_compiled = any("attention_input" in vars(block) for block in model.blocks)
    return (has_onednn and is_plain and not is_compiled
            and not torch.is_autocast_enabled("cpu"))


def reordered(weight: Tensor, bias: Tensor | None, rows: int):
    """x -> x W^T + bias, with a copy of W in oneDNN's order."""
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")
