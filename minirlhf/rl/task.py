"""Everything a policy run is given: prompts, reward, base model, and the ground truth if known."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.chat_templates import read_chat_template
from minirlhf.data.preference_files import read_prompts
from minirlhf.data.prompts import Prompts, encode_prompts, unique_prompts
from minirlhf.data.splits import file_hashes, load_function, load_ground_truth, load_splits
from minirlhf.data.tokenizer import fingerprint, load_tokenizer
from minirlhf.model import Transformer
from minirlhf.model.loading import load_model
from minirlhf.rl.reward import Reward
from minirlhf.rl.sampling import SamplingSettings
from minirlhf.run.errors import UserError
from minirlhf.run.folder import read_config

import torch


class Task(NamedTuple):
    """Does not change while the policy trains."""

    name: str
    facts: dict  # recorded in the run folder: the reward run and the hashes of all files read
    base: Transformer  # the reference model; the policy starts as a copy of it
    sampling: SamplingSettings  # of training
    evaluation: SamplingSettings
    reward: Reward
    ground_truth: ModuleType | None
    train: Prompts
    heldout: Prompts  # for choices
    test: Prompts  # for the final table


def load_task(config: PolicyConfig, reward_function: Callable | None,
              device: torch.device) -> Task:
    """The task that a reward run's folder describes. Raises UserError that names file and fix."""
    folder = Path(config.reward_run)
    reward_config = read_config(RewardConfig, folder / "config.json")
    encoding = load_tokenizer(reward_config.tokenizer)
    ground_truth = load_ground_truth(reward_config)
    splits = load_splits(reward_config)
    base, _ = load_model(folder / "base.pt", "base", fingerprint(encoding))
    response_length = config.max_response_length or reward_config.max_response_length
    check_context(base, reward_config.max_prompt_length, response_length)
    reward, inputs = load_reward(config, reward_function, fingerprint(encoding))
    for model in (base, reward.source):
        if isinstance(model, Transformer):
            model.to(device).requires_grad_(False)
            model.bf16 = config.bf16
    if isinstance(reward.source, Transformer):
        reward.source.freeze_matrices()
    inputs.append(folder / "base.pt")
    texts = unique_prompts(splits.train)
    if config.prompts:
        texts = read_prompts(config.prompts,
                             template=read_chat_template(reward_config.tokenizer))
        inputs.append(Path(config.prompts))
    length = reward_config.max_prompt_length
    return Task(
        name=ground_truth.__name__.split(".")[-1] if ground_truth else "data",
        facts=dict(reward_run=str(folder), data=splits.hashes | file_hashes(inputs)),
        base=base,
        sampling=SamplingSettings(encoding, response_length, config.temperature, config.seed),
        evaluation=SamplingSettings(encoding, response_length,
                                    config.eval_temperature or config.temperature, config.seed,
                                    config.eval_top_k, config.eval_top_p),
        reward=reward,
        ground_truth=ground_truth,
        train=encode_prompts(texts, encoding, length),
        heldout=encode_prompts(unique_prompts(splits.heldout), encoding, length),
        test=encode_prompts(unique_prompts(splits.test), encoding, length))


def check_context(base: Transformer, prompt_length: int, response_length: int) -> None:
    """Raise UserError if prompt and response may exceed the model's context."""
    context = base.config.context
    if prompt_length + response_length > context:
        raise UserError(f"--max-response-length {response_length}: with prompts of up to "
                        f"{prompt_length} tokens the model's context of {context} is too short; "
                        f"the maximum is {context - prompt_length}")


def load_reward(config: PolicyConfig, reward_function: Callable | None,
                tokenizer: str) -> tuple[Reward, list[Path]]:
    """(the reward, the files it depends on): the user's function, or the run's reward model."""
    function = reward_function
    if function is None and config.reward:
        function = load_function(config.reward, "--reward")
    if function is not None:
        name = getattr(function, "__name__", type(function).__name__)
        return Reward(name, function, config.missing_eos_penalty), []
    path = Path(config.reward_run) / "reward.pt"
    model, _ = load_model(path, "reward", tokenizer)
    return Reward(str(path), model, config.missing_eos_penalty), [path]


def newest_reward_run(runs: Path) -> Path:
    """The folder of the newest finished reward run. Raises UserError if there is none."""
    finished = sorted(runs.glob("*/reward.pt"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise UserError(f"no finished reward run under {runs}/; run train_reward.py first, "
                        "or name one with --reward-run")
    return finished[-1].parent
