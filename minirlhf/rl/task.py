"""Everything a policy run is given: prompts, reward, base model, and the ground truth if known."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.batches import PreferenceGroup, describe_counts, encode_preferences
from minirlhf.data.chat_templates import read_chat_template
from minirlhf.data.preference_files import read_prompts, read_records
from minirlhf.data.prompts import Prompts, encode_prompts, unique_prompts, warn_of_shared_prompts
from minirlhf.data.splits import Splits, file_facts, load_function, load_ground_truth, load_splits
from minirlhf.data.tokenizer import fingerprint, load_tokenizer
from minirlhf.model import Transformer
from minirlhf.model.loading import load_model
from minirlhf.rl.reward import Reward
from minirlhf.rl.sampling import SamplingSettings
from minirlhf.run.errors import UserError
from minirlhf.run.files import read_file
from minirlhf.run.folder import check_inputs, read_run, run_id, trusted_module
from minirlhf.run.terminal import echo

import tiktoken
import torch


class Task(NamedTuple):
    """Does not change while the policy trains."""

    name: str
    facts: dict[str, str]  # recorded in the run folder: all files read
    base: Transformer  # the reference model; the policy starts as a copy of it
    sampling: SamplingSettings  # of training
    evaluation: SamplingSettings
    reward: Reward
    ground_truth: ModuleType | None
    train: Prompts
    pairs: list[PreferenceGroup]  # what dpo learns from; empty for the other algorithms
    heldout: Prompts  # for choices
    test: Prompts  # for the final table


def load_task(config: PolicyConfig, reward_function: Callable | None,
              device: torch.device) -> Task:
    """The task that a reward run's folder describes. Raises UserError that names file and fix."""
    folder = Path(config.reward_run)
    reward_config, reward_facts = read_run(RewardConfig, folder / "config.json")
    encoding = load_tokenizer(reward_config.tokenizer)
    task = trusted_module(reward_config.task, config.task, "--task", folder / "config.json")
    splits = reward_splits(reward_config, folder)
    facts = splits.facts | dict(tokenizer=f"{fingerprint(encoding)}  {reward_config.tokenizer}")
    check_inputs(reward_facts, reward_facts | facts, f"the reward run {folder}")
    run = run_id(vars(reward_config), reward_facts)
    facts["reward run"] = f"{run}  {folder}"
    ground_truth = load_ground_truth(task, splits)
    base, _ = load_model(folder / "base.pt", "base", fingerprint(encoding), run)
    response_length = config.max_response_length or reward_config.max_response_length
    check_context(base, reward_config.max_prompt_length, response_length)
    reward = load_reward(config, reward_config, reward_function, fingerprint(encoding), run)
    pairs = load_pairs(config, reward_config, splits, encoding)
    for model in (base, reward.source):
        if isinstance(model, Transformer):
            model.to(device).requires_grad_(False)
            model.bf16 = config.bf16
    inputs = {"base model": [folder / "base.pt"], "pairs": [*map(Path, config.data)]}
    if isinstance(reward.source, Transformer):
        reward.source.freeze_matrices()
        inputs["reward model"] = [folder / "reward.pt"]
    texts = unique_prompts(splits.train)
    if config.prompts:
        texts = read_prompts(config.prompts,
                             template=read_chat_template(reward_config.tokenizer))
        inputs["prompts"] = [Path(config.prompts)]
    train, heldout, test = (
        encode_prompts(prompts, encoding, reward_config.max_prompt_length)
        for prompts in (texts, unique_prompts(splits.heldout), unique_prompts(splits.test)))
    warn_of_shared_prompts([group.prompt for group in pairs] or train.ids, heldout.ids, test.ids)
    return Task(
        name=ground_truth.__name__.split(".")[-1] if ground_truth else "data",
        facts=facts | file_facts(inputs),
        base=base,
        sampling=SamplingSettings(encoding, response_length, config.temperature, config.seed),
        evaluation=SamplingSettings(encoding, response_length,
                                    config.eval_temperature or config.temperature, config.seed,
                                    config.eval_top_k, config.eval_top_p),
        reward=reward,
        ground_truth=ground_truth,
        train=train, pairs=pairs, heldout=heldout, test=test)


def reward_splits(config: RewardConfig, folder: Path) -> Splits:
    """The pairs of the reward run in this folder. Raises UserError, also if a file has moved."""
    try:
        return load_splits(config)
    except UserError as error:
        moved = f"; if it has moved, put a copy or a link into {folder / 'inputs'}"
        is_missing = isinstance(error.__cause__, FileNotFoundError)
        raise UserError(f"{error}{moved if is_missing else ''}") from None


def check_context(base: Transformer, prompt_length: int, response_length: int) -> None:
    """Raise UserError if prompt and response may exceed the model's context."""
    context = base.config.context
    if prompt_length + response_length > context:
        raise UserError(f"--max-response-length {response_length}: with prompts of up to "
                        f"{prompt_length} tokens the model's context of {context} is too short; "
                        f"the maximum is {context - prompt_length}")


def load_pairs(config: PolicyConfig, reward_config: RewardConfig, splits: Splits,
               encoding: tiktoken.Encoding) -> list[PreferenceGroup]:
    """The pairs that dpo learns from: those of --data, or the reward run's. Raises UserError."""
    if config.algorithm != "dpo":
        if config.data:
            raise UserError("--data: only --algorithm dpo learns from pairs; leave it out, or name "
                            "prompts with --prompts")
        return []
    if config.prompts:
        raise UserError("--prompts: dpo learns from pairs; leave it out, or name pairs with --data")
    pairs = splits.train
    if config.data:
        pairs, _ = read_records(config.data, reward_config.skip_bad_lines,
                                read_chat_template(reward_config.tokenizer))
    groups, counts = encode_preferences(pairs, encoding, reward_config.max_prompt_length,
                                        reward_config.max_response_length)
    echo(f"pairs: {describe_counts(counts)}")
    return groups


def load_reward(config: PolicyConfig, reward_config: RewardConfig, reward_function: Callable | None,
                tokenizer: str, run: str) -> Reward:
    """The user's function, or the run's reward model.

    tokenizer, run: the fingerprint and the id of the reward run, which the model must have.
    Raises UserError, also if there is neither, except for dpo.
    """
    function = reward_function
    if function is None and config.reward:
        function = load_function(config.reward, "--reward")
    if function is not None:
        if config.algorithm == "dpo":
            raise UserError("--algorithm dpo learns from preference pairs, not from a reward "
                            "function; leave out --reward, or use online-dpo")
        name = getattr(function, "__name__", type(function).__name__)
        return Reward(name, function, config.missing_eos_penalty)
    path = Path(config.reward_run) / "reward.pt"
    if not reward_config.epochs:
        if config.algorithm == "dpo":
            return Reward("none", None, config.missing_eos_penalty)
        raise UserError(f"{path.parent}: has no reward model (--epochs 0), which only --algorithm "
                        "dpo can do without; resume it with --epochs 1, or use --reward")
    model, _ = load_model(path, "reward", tokenizer, run)
    return Reward(str(path), model, config.missing_eos_penalty)


def pick_reward_run(config: PolicyConfig) -> Path:
    """The folder of --reward-run, or the newest reward run. Raises UserError if there is none."""
    if config.reward_run:
        return Path(config.reward_run)
    finished = {}  # as recorded: a copy of a run is not newer than the run
    for path in Path("runs").glob("*/reward_metrics.jsonl"):
        if time := re.search(rb'"finished": (\d+)', read_file(path)):
            finished[path.parent] = int(time[1])
    if not finished:
        raise UserError("no finished reward run under runs/; run train_reward.py first, "
                        "or name one with --reward-run")
    return max(finished, key=finished.__getitem__)
