"""Sampling responses: prefill, then one token a step, with a key-value cache. Rows that finished leave the batch."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from minirlhf.model import KVCache, Transformer, last_tokens


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """[B, V] with -inf outside the top_k most likely tokens and outside the smallest set that holds probability top_p.

    For evaluation: what is cut off changes the distribution, so training samples from the whole of it.
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability  # mass of the tokens that are likelier: the first always stays
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter_(-1, index, ordered)
    return logits


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """[B] tokens by inverse CDF: the first whose cumulative probability exceeds the row's uniform [B] in [0, 1)."""
    logits = logits.float() if temperature == 1.0 else logits.float() / temperature
    cdf = logits.softmax(-1).cumsum(-1)
    target = uniforms[:, None] * cdf[:, -1:]  # below the last even when rounded: a float32 u is at most 1 - 2^-24
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


@contextlib.contextmanager
def weights_packed(model: Transformer, rows: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within, a model on a processor, neither compiled nor rounded, multiplies by copies of its matrices, laid out for few
    tokens at a time, about `rows`, and takes GELU in less time. Yields hidden [B, D] -> logits [B, V]."""
    weight = model.wte.weight
    usable = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    usable &= weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    usable &= not any("before" in vars(block) for block in model.blocks)  # a compiler cannot read the copies
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear | nn.GELU) and usable]
    try:
        for layer in layers:  # hides the method of the class
            vars(layer)["forward"] = gelu_by_sigmoid if isinstance(layer, nn.GELU) else packed(layer.weight, layer.bias, rows)
        yield packed(model.lm_weight, None, rows) if usable else lambda hidden: hidden @ model.lm_weight.T
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # not all have one where memory ran out


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """GELU by tanh, x (1 + tanh z) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3), as x sigmoid(2 z). Has no gradient."""
    scale = (8 / math.pi) ** 0.5
    return (x * x).mul_(0.044715 * scale).add_(scale).mul_(x).sigmoid_().mul_(x)


def packed(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + bias by a copy of W. Few rows take as long as it takes to read W: in oneDNN's own order that goes about twice
    as fast (8 rows: layers of GPT-2 small 1.8 times, its head 2.7 times), and repays the copy within a few tokens. Less than a
    megabyte, which comes out of the processor's cache, is read up to a quarter faster turned round."""
    if weight.numel() < 2**18:
        turned = weight.detach().T.contiguous()
        return lambda x: x @ turned if bias is None else torch.addmm(bias, x, turned)
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")


def generate(model: Transformer, prompt_ids: Tensor, prompt_mask: Tensor, max_response_length: int, eos: int, pad: int,
             uniforms: Tensor | None = None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             ) -> tuple[Tensor, Tensor]:
    """Responses [B, R] and response_mask [B, R], R <= max_response_length the longest of them; pad after EOS.

    prompt_ids, prompt_mask: [B, P], left-padded. uniforms: [B, max_response_length] in [0, 1), column t for action t;
    None decodes greedily. The mask is 1 on every sampled token including EOS. A row without EOS was cut by length.
    """
    if top_k < 0 or not 0.0 < top_p <= 1.0 or temperature <= 0.0 or max_response_length < 1:
        raise ValueError(f"top_k {top_k} must be >= 0, top_p {top_p} in (0, 1], {temperature=} and {max_response_length=} > 0")
    batch, device = len(prompt_ids), prompt_ids.device
    response = torch.full((batch, max_response_length), pad, device=device)
    rows = torch.arange(batch, device=device)  # which row of the result each row of the running batch is
    with torch.inference_mode(), weights_packed(model, batch) as logits_of:  # no_grad, and views cost less
        cache = KVCache(model, prompt_mask)
        hidden = model(prompt_ids, prompt_mask, cache, wanted=last_tokens(prompt_mask))[:, -1]
        for t in range(max_response_length):
            logits = logits_of(hidden)
            if uniforms is None:
                token = logits.argmax(-1)
            else:
                token = sample_tokens(filter_logits(logits, top_k, top_p), uniforms[rows, t], temperature)
            response[rows, t] = token
            running = token != eos
            left = int(running.sum())
            if left == 0 or t + 1 == max_response_length:
                break
            if left < len(rows):
                kept = cache.keep_rows(running)
                rows, token = rows[kept], token[kept]
            hidden = model.decode(token, cache)
    ends = (response[:, : t + 1] == eos).int()
    return response[:, : t + 1], ends.cumsum(1) - ends == 0  # no EOS before it
