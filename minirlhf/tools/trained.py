"""A finished policy run, loaded for use: its policy, base model, reward model and ground truth."""

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.splits import Splits, file_facts, file_hash, load_ground_truth
from minirlhf.data.tokenizer import fingerprint, load_tokenizer
from minirlhf.model import Transformer
from minirlhf.model.loading import load_model
from minirlhf.rl.sampling import SamplingSettings
from minirlhf.rl.task import reward_splits
from minirlhf.run.errors import UserError
from minirlhf.run.folder import check_inputs, read_run, run_id, trusted_module

import tiktoken
import torch


class Trained(NamedTuple):
    """The settings and models of a finished policy run."""

    folder: Path
    config: PolicyConfig
    facts: dict[str, str]  # the files that the policy was trained with
    reward_config: RewardConfig
    encoding: tiktoken.Encoding
    ground_truth: ModuleType | None  # the module of the reward run's --task
    base: Transformer
    reward_model: Transformer
    policy: Transformer
    device: torch.device

    def sampling(self, temperature: float, max_response_length: int, seed: int) -> SamplingSettings:
        """Settings for sampling; a temperature or length of 0 means the one used in training.

        Raises UserError if the model's context cannot hold the length.
        """
        own_length = self.config.max_response_length or self.reward_config.max_response_length
        length = max_response_length or own_length
        limit = self.policy.config.context - self.reward_config.max_prompt_length
        if length > limit:
            raise UserError(f"--max-response-length {length} is too large; next to a prompt, "
                            f"the model's context holds at most {limit} tokens")
        return SamplingSettings(self.encoding, length, temperature or self.config.temperature, seed)


def load_trained(run: str, device: torch.device, task: str) -> Trained:
    """Load everything except the data. Raises UserError that names the file and the fix.

    task: the program's --task; "none": without the ground truth.
    """
    if not run:
        raise UserError("--run is missing: name the folder of a finished policy run, "
                        "as train_policy.py printed it")
    folder = Path(run)
    config, facts = read_run(PolicyConfig, folder / "config.json")
    reward_run = Path(config.reward_run)
    if not reward_run.is_dir():
        raise UserError(f"{folder / 'config.json'}: its reward run {reward_run} does not exist "
                        "here; start this program in the folder where the policy was trained")
    reward_config, reward_facts = read_run(RewardConfig, reward_run / "config.json")
    name = trusted_module(reward_config.task, task, "--task", reward_run / "config.json")
    encoding = load_tokenizer(reward_config.tokenizer)
    reward_id = run_id(vars(reward_config), reward_facts)
    models = []
    for kind, made_in, run_of_model in (("base", reward_run, reward_id),
                                        ("reward", reward_run, reward_id),
                                        ("policy", folder, run_id(vars(config), facts))):
        path = made_in / f"{kind}.pt"
        model, _ = load_model(path, kind, fingerprint(encoding), run_of_model)
        models.append(model.to(device).requires_grad_(False))
        check_facts(facts, file_facts({f"{kind} model": [path]}), folder)
    ground_truth = load_ground_truth(name)
    return Trained(folder, config, facts, reward_config, encoding, ground_truth, *models, device)


def check_facts(facts: dict[str, str], current: dict[str, str], folder: Path) -> None:
    """Raise UserError if a file is not the one that the policy was trained with.

    facts: of the policy run, which may have used fewer files.  current: of the files now.
    """
    used = {name: fact for name, fact in current.items() if name in facts}
    check_inputs(facts, facts | used, f"the policy run {folder}")


def training_splits(trained: Trained) -> Splits:
    """The pairs of the reward run. Raises UserError if their files have changed."""
    splits = reward_splits(trained.reward_config, Path(trained.config.reward_run))
    check_facts(trained.facts, splits.facts, trained.folder)
    return splits


def identity(trained: Trained) -> dict[str, str]:
    """Hashes of the tokenizer and the reward model of this policy, stored with every answer."""
    return dict(tokenizer=fingerprint(trained.encoding)[:16],
                reward=file_hash(Path(trained.config.reward_run) / "reward.pt")[:16])
