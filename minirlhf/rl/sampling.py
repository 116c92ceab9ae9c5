"""Sampling: prompts in, responses out."""

from types import ModuleType
from typing import NamedTuple

from minirlhf.data.batches import pad_left
from minirlhf.data.prompts import Prompts
from minirlhf.data.tokenizer import decode, pad_id
from minirlhf.model import Transformer
from minirlhf.model.generate import generate
from minirlhf.run.errors import UserError
from minirlhf.run.parallel import all_gather_rows, local_rows, unsharded
from minirlhf.run.seeding import row_uniforms

import tiktoken
import torch
from torch import Tensor


class SamplingSettings(NamedTuple):
    """What sampling depends on besides the model and the prompts."""

    encoding: tiktoken.Encoding
    max_response_length: int  # tokens, EOS included
    temperature: float
    seed: int
    top_k: int = 0  # of evaluation only: the most likely tokens, 0 for all
    top_p: float = 1.0  # of evaluation only: the nucleus of this probability


class Samples(NamedTuple):
    """B responses, as texts and as ids."""

    prompts: list[str]
    responses: list[str]
    finished: list[bool]  # ended by EOS, not cut by length
    prompt_ids: Tensor  # [B, P] left-padded
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, R] right-padded; EOS where the policy chose to stop
    response_mask: Tensor  # [B, R] bool: 1 on every sampled token, EOS included

    def rows(self, index: Tensor) -> "Samples":
        """The samples with these row numbers."""
        chosen = index.tolist()
        index = index.to(self.response_ids.device)
        return Samples([self.prompts[i] for i in chosen], [self.responses[i] for i in chosen],
                       [self.finished[i] for i in chosen], self.prompt_ids[index],
                       self.prompt_mask[index], self.response_ids[index], self.response_mask[index])


def sample(policy: Transformer, prompts: Prompts, settings: SamplingSettings, step: int) -> Samples:
    """One response to each prompt of iteration `step`; each process samples its share of them."""
    rows = list(local_rows(range(len(prompts.texts))))
    model = unsharded(policy).for_decoding()
    samples = sample_responses(model, prompts.rows(rows), settings, "rollout", step, rows)
    return all_gather_rows(samples)


def sample_responses(model: Transformer, prompts: Prompts, settings: SamplingSettings,
                     purpose: str = "", step: int = 0, rows: list[int] | None = None) -> Samples:
    """One response to each prompt, in this process.

    rows: the row number of each response in the whole batch; its random numbers are a function of
    (seed, purpose, step, row). None means greedy decoding.
    Raises UserError if the model's logits are not finite.
    """
    encoding = settings.encoding
    length = settings.max_response_length
    device = model.wte.weight.device
    ids, mask = (tensor.to(device) for tensor in pad_left(prompts.ids, pad_id(encoding)))
    uniforms = None
    if rows is not None:
        uniforms = row_uniforms(settings.seed, purpose, step, rows, length).to(device)
    response_ids, response_mask = generate(model, ids, mask, length, encoding.eot_token,
                                           pad_id(encoding), uniforms, settings.temperature,
                                           settings.top_k, settings.top_p)
    if (response_ids[response_mask] >= model.config.vocab_size).any():  # drawn from NaN
        raise UserError("the model's logits are not finite; try a smaller learning rate")
    finished = ((response_ids == encoding.eot_token) & response_mask).any(1).tolist()
    texts = [decode(encoding, row[is_real].tolist())
             for row, is_real in zip(response_ids.cpu(), response_mask.cpu())]
    return Samples(prompts.texts, texts, finished, ids, mask, response_ids, response_mask)


def gold_utility(samples: Samples, ground_truth: ModuleType | None) -> list[float] | None:
    """The gold utility of each response, or None if the task's ground truth is not known."""
    if ground_truth is None or not hasattr(ground_truth, "gold"):
        return None
    rows = zip(samples.prompts, samples.responses, samples.finished)
    return [ground_truth.gold(*row) for row in rows]


def all_ids(samples: Samples) -> tuple[Tensor, Tensor]:
    """ids [B, P + R] and mask [B, P + R] of prompt and response together."""
    ids = torch.cat([samples.prompt_ids, samples.response_ids], dim=1)
    mask = torch.cat([samples.prompt_mask, samples.response_mask], dim=1)
    return ids, mask
