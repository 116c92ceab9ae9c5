"""What the policy acts in: prompts to answer, a scorer that judges answers, the base model, and the truth where it is known."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import tiktoken
import torch
from torch import Tensor

from minirlhf.checkpoint import load_model
from minirlhf.config import PolicyConfig, RewardConfig, UserError
from minirlhf.data import encode_prompts, pad_left, unique_prompts
from minirlhf.flags import read_config
from minirlhf.generate import generate
from minirlhf.model import Transformer, sequence_scores
from minirlhf.records import read_prompts
from minirlhf.seeding import generator, row_uniforms
from minirlhf.task import file_hashes, load_function, load_splits, load_task
from minirlhf.tokenizer import decode, fingerprint, load_tokenizer, pad_id


class Sampling(NamedTuple):
    """What sampling depends on besides the model and the prompts."""

    encoding: tiktoken.Encoding
    max_response_length: int
    temperature: float
    seed: int


class Samples(NamedTuple):
    """Responses to prompts, as ids and as text."""

    prompts: list[str]
    responses: list[str]
    finished: list[bool]  # ended by EOS, not cut by length
    prompt_ids: Tensor  # [B, P] left-padded
    prompt_mask: Tensor  # [B, P]
    response_ids: Tensor  # [B, R] right-padded
    response_mask: Tensor  # [B, R]

    def gold(self, task: ModuleType | None) -> list[float] | None:
        """Gold utility of each response where the task knows it."""
        each = zip(self.prompts, self.responses, self.finished)
        return [task.gold(*one) for one in each] if task and hasattr(task, "gold") else None


def sample_responses(model: Transformer, prompts: list[str], prompt_ids: list[list[int]], sampling: Sampling,
                     purpose: str = "", step: int = 0, rows: list[int] | None = None) -> Samples:
    """One response per prompt: greedily, or where rows numbers the responses, with random numbers that derive from
    (seed, purpose, step, row)."""
    encoding, limit, temperature, seed = sampling
    device, pad = model.wte.weight.device, pad_id(encoding)
    ids, mask = (tensor.to(device) for tensor in pad_left(prompt_ids, pad))
    uniforms = None if rows is None else row_uniforms(seed, purpose, step, rows, limit).to(device)
    response, response_mask = generate(model, ids, mask, limit, encoding.eot_token, pad, uniforms, temperature)
    finished = ((response == encoding.eot_token) & response_mask).any(1).tolist()
    texts = [decode(encoding, row[keep].tolist()) for row, keep in zip(response.cpu(), response_mask.cpu())]
    return Samples(prompts, texts, finished, ids, mask, response, response_mask)


Scorer = Callable[[Samples], Tensor]  # [B] scores, float32, on the samples' device


class Prompts(NamedTuple):
    """The same prompts as text and as ids."""

    texts: list[str]
    ids: list[list[int]]

    def rows(self, chosen: Sequence[int]) -> "Prompts":
        return Prompts([self.texts[i] for i in chosen], [self.ids[i] for i in chosen])

    def first(self, count: int) -> "Prompts":
        return Prompts(self.texts[:count], self.ids[:count])


def encoded(texts: list[str], encoding: tiktoken.Encoding, max_prompt_length: int) -> Prompts:
    """The prompts with their ids, of which the last max_prompt_length are kept."""
    return Prompts(texts, encode_prompts(texts, encoding, max_prompt_length)[0])


class Environment(NamedTuple):
    """All that a policy run is given; nothing in it changes while the policy learns."""

    name: str
    facts: dict  # what the run folder should tell: the reward run and the hashes of every file read
    base: Transformer  # the policy's start and its frozen reference
    sampling: Sampling
    scorer: Scorer
    reward_name: str
    task: ModuleType | None
    train: Prompts
    heldout: Prompts  # for choices
    test: Prompts  # for the closing table


def load_environment(config: PolicyConfig, reward_function: Callable | None, device: torch.device) -> Environment:
    """Everything that a policy run reads from a reward run's folder. Raises UserError that names the file and the fix."""
    folder = Path(config.reward_run)
    reward_config = read_config(RewardConfig, folder / "config.json")
    encoding, task = load_tokenizer(reward_config.tokenizer), load_task(reward_config)
    splits = load_splits(reward_config)
    base, _ = load_model(folder / "base.pt", "base", fingerprint(encoding))
    base.to(device).requires_grad_(False)
    length = config.max_response_length or reward_config.max_response_length
    if reward_config.max_prompt_length + length > base.config.context:
        raise UserError(f"--max-response-length {length}: with prompts of up to {reward_config.max_prompt_length} tokens the "
                        f"model's context of {base.config.context} is too short; "
                        f"at most {base.config.context - reward_config.max_prompt_length}")
    function = reward_function or (load_function(config.reward, "--reward") if config.reward else None)
    if function:
        reward_name = getattr(function, "__name__", type(function).__name__)  # a callable object has no name of its own
        scorer, inputs = function_scorer(function, reward_name, config.missing_eos_penalty, device), []
    else:
        reward_model, _ = load_model(folder / "reward.pt", "reward", fingerprint(encoding))
        reward_model.to(device).requires_grad_(False)
        scorer, reward_name = model_scorer(reward_model, config.missing_eos_penalty), str(folder / "reward.pt")
        inputs = [folder / "reward.pt"]
    train = read_prompts(config.prompts) if config.prompts else unique_prompts(splits.train)
    name = task.__name__.split(".")[-1] if task else "data"
    inputs += [folder / "base.pt"] + ([Path(config.prompts)] if config.prompts else [])
    return Environment(name, dict(reward_run=str(folder), data=splits.hashes | file_hashes(inputs)), base,
                       Sampling(encoding, length, config.temperature, config.seed), scorer, reward_name, task,
                       *(encoded(texts, encoding, reward_config.max_prompt_length)
                         for texts in (train, unique_prompts(splits.heldout), unique_prompts(splits.test))))


def newest_reward_run(runs: Path) -> Path:
    finished = sorted(runs.glob("*/reward.pt"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise UserError(f"no finished reward run under {runs}/; run train_reward.py first, or name one with --reward-run")
    return finished[-1].parent


def model_scorer(reward_model: Transformer, missing_eos_penalty: float) -> Scorer:
    """The reward model's score; the penalty is subtracted for replies cut by length, which it was trained on rarely if at all."""
    @torch.no_grad()
    def scorer(samples: Samples) -> Tensor:
        ids = torch.cat([samples.prompt_ids, samples.response_ids], dim=1)
        mask = torch.cat([samples.prompt_mask, samples.response_mask], dim=1)
        return sequence_scores(reward_model, ids, mask) - missing_eos_penalty * unfinished(samples)
    return scorer


def function_scorer(function: Callable, name: str, missing_eos_penalty: float, device: torch.device) -> Scorer:
    """A reward of the user's own: function(prompts, responses) -> one finite number per response."""
    def scorer(samples: Samples) -> Tensor:
        try:
            scores = torch.as_tensor(function(list(samples.prompts), list(samples.responses)), dtype=torch.float32)
        except Exception as error:  # whatever the user's function raises is the user's to mend
            raise UserError(f"the reward function {name} raised {type(error).__name__}: {error}") from None
        wanted = (len(samples.prompts),)
        if scores.shape != wanted:
            raise UserError(f"the reward function {name} returned shape {tuple(scores.shape)}; it must be {wanted}")
        if not scores.isfinite().all():
            worst = int((~scores.isfinite()).nonzero()[0])
            raise UserError(f"the reward function {name} returned {scores[worst]} for response {worst}: "
                            f"{samples.responses[worst][:60]!r}")
        return scores.to(device) - missing_eos_penalty * unfinished(samples)
    return scorer


def unfinished(samples: Samples) -> Tensor:
    """[B] 1.0 for every response that was cut by length."""
    return 1.0 - torch.tensor(samples.finished, dtype=torch.float32, device=samples.response_ids.device)


def next_prompts(prompts: Prompts, count: int, copies: int, seed: int, step: int) -> Prompts:
    """The prompts of iteration `step` (from 0): a window of count over an endless sequence of shuffled passes, each prompt
    `copies` times in consecutive rows. A function of the step alone."""
    n, chosen = len(prompts.texts), list[int]()
    for position in range(step * count, (step + 1) * count):
        if not chosen or position % n == 0:
            order = torch.randperm(n, generator=generator(seed, "prompts", position // n)).tolist()
        chosen += [order[position % n]] * copies
    return prompts.rows(chosen)
