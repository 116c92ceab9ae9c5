"""Sampling responses with a key-value cache. Finished rows leave the batch."""

from minirlhf.model.cache import KVCache
from minirlhf.model.fast_decode import fast_linear_layers
from minirlhf.model.transformer import Transformer

import torch
from torch import Tensor

COMPACT_EVERY = dict(cuda=16)  # tokens between removals of finished rows; elsewhere 1



def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """[B, V] with -inf outside the top_k tokens and outside the nucleus of probability top_p.

    The nucleus is the smallest set of tokens whose total probability reaches top_p, after top_k.
    logits: already divided by the temperature. Of equal logits top_k keeps some.
    For evaluation only: it changes the distribution, and training needs the original one.
    """
    if top_k:
        top = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter_(-1, top.indices, top.values)
    if top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        mass_before = probability.cumsum(-1) - probability  # 0 for the first, which always stays
        ordered = ordered.masked_fill(mass_before >= top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter_(-1, index, ordered)
    return logits


def sample_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """[B] tokens by inverse CDF.

    The token is the first whose cumulative probability exceeds the row's uniform [B] in [0, 1).
    """
    # On CUDA a float32 cumsum need not be monotone, and a token of probability 0 could be drawn.
    exact = torch.float64 if logits.is_cuda else torch.float32
    cdf = logits.float().softmax(-1).cumsum(-1, dtype=exact)
    target = uniforms[:, None] * cdf[:, -1:]  # less than the last, because u <= 1 - 2^-24
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


def generate(model: Transformer, prompt_ids: Tensor, prompt_mask: Tensor, max_response_length: int,
             eos: int, pad: int, uniforms: Tensor | None = None, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Responses [B, R] and response_mask [B, R]; R is the length of the longest response.

    prompt_ids, prompt_mask: [B, P], left-padded.
    uniforms: [B, max_response_length] in [0, 1), column t for action t; None decodes greedily.
    The mask is 1 on every sampled token, EOS included; ids after EOS are pad.
    A row without EOS was cut by length.
    """
    if top_k < 0 or not 0.0 < top_p <= 1.0 or temperature <= 0.0 or max_response_length < 1:
        raise ValueError(f"need top_k >= 0, 0 < top_p <= 1, temperature > 0 and "
                         f"max_response_length >= 1, got {top_k}, {top_p}, {temperature} and "
                         f"{max_response_length}")
    batch = len(prompt_ids)
    device = prompt_ids.device
    # Counting unfinished rows waits for the device, so a GPU does it only every few tokens.
    compact_every = COMPACT_EVERY.get(device.type, 1)
    response = torch.full((batch, max_response_length), pad, device=device)
    rows = torch.arange(batch, device=device)  # rows of the response that are still computed
    is_running = torch.ones(batch, dtype=torch.bool, device=device)
    with torch.inference_mode(), fast_linear_layers(model, batch) as lm_head:
        cache = KVCache(model.config, prompt_mask, max_response_length, model.wte.weight.dtype)
        hidden = model(prompt_ids, prompt_mask, cache)[:, -1]
        for t in range(max_response_length):
            logits = lm_head(hidden)
            if uniforms is None:
                token = logits.argmax(-1)
            else:
                logits = filter_logits(logits.float() / temperature, top_k, top_p)
                token = sample_tokens(logits, uniforms[rows, t])
            response[rows, t] = token
            is_running &= token != eos
            if t + 1 == max_response_length:
                break
            if (t + 1) % compact_every == 0:
                running = int(is_running.sum())
                if running == 0:
                    break
                if running < len(rows):
                    old_rows = cache.keep_rows(is_running)
                    rows = rows[old_rows]
                    token = token[old_rows]
                    is_running = is_running[old_rows]
            hidden = model.decode(token, cache)
    is_eos = (response == eos).int()
    mask = is_eos.cumsum(1) - is_eos == 0  # no EOS before this token
    longest = int(mask.sum(1).max())
    return response.masked_fill(~mask, pad)[:, :longest], mask[:, :longest]
