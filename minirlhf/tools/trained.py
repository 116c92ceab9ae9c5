"""A finished policy run, loaded for use: its policy, base model, reward model and ground truth."""

import dataclasses
import hashlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.splits import load_ground_truth
from minirlhf.data.tokenizer import fingerprint, load_tokenizer
from minirlhf.model import Transformer
from minirlhf.model.loading import load_model
from minirlhf.rl.sampling import SamplingSettings
from minirlhf.rl.task import moved_reward_run
from minirlhf.run.errors import UserError
from minirlhf.run.files import read_file
from minirlhf.run.folder import read_config, trusted_module

import tiktoken
import torch


class Trained(NamedTuple):
    """The settings and models of a finished policy run."""

    folder: Path
    config: PolicyConfig
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
    config = read_config(PolicyConfig, folder / "config.json")
    reward_run = moved_reward_run(folder, config.reward_run)
    config = dataclasses.replace(config, reward_run=str(reward_run))
    if not reward_run.is_dir():
        raise UserError(f"{folder / 'config.json'}: its reward run {reward_run} does not exist "
                        "here; start this program in the folder where the policy was trained")
    reward_config = read_config(RewardConfig, reward_run / "config.json")
    name = trusted_module(reward_config.task, task, "--task", reward_run / "config.json")
    encoding = load_tokenizer(reward_config.tokenizer)
    files = (("base", reward_run / "base.pt"), ("reward", reward_run / "reward.pt"),
             ("policy", folder / "policy.pt"))
    models = []
    for kind, path in files:
        model, _ = load_model(path, kind, fingerprint(encoding))
        models.append(model.to(device).requires_grad_(False))
    ground_truth = load_ground_truth(name)
    return Trained(folder, config, reward_config, encoding, ground_truth, *models, device)


def identity(trained: Trained) -> dict[str, str]:
    """Hashes of the tokenizer and the reward model of this policy, stored with every answer."""
    reward = read_file(Path(trained.config.reward_run) / "reward.pt")
    return dict(tokenizer=fingerprint(trained.encoding)[:16],
                reward=hashlib.sha256(reward).hexdigest()[:16])
