"""A finished policy run, loaded for use: its policy, and the base model, reward model and task that it came from."""

import hashlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import tiktoken
import torch

from minirlhf.checkpoint import load_model
from minirlhf.config import PolicyConfig, RewardConfig, UserError
from minirlhf.environment import Sampling
from minirlhf.flags import read_config
from minirlhf.model import Transformer
from minirlhf.task import load_task
from minirlhf.tokenizer import fingerprint, load_tokenizer


class Trained(NamedTuple):
    folder: Path
    config: PolicyConfig
    reward_config: RewardConfig
    encoding: tiktoken.Encoding
    task: ModuleType | None
    base: Transformer
    reward_model: Transformer
    policy: Transformer
    device: torch.device

    def sampling(self, temperature: float, max_response_length: int, seed: int) -> Sampling:
        """0 for either of the first two: as the policy was trained. Raises UserError for a length the model cannot hold."""
        length = max_response_length or self.config.max_response_length or self.reward_config.max_response_length
        most = self.policy.config.context - self.reward_config.max_prompt_length
        if length > most:
            raise UserError(f"--max-response-length {length}: beside a prompt the model's context holds at most {most}")
        return Sampling(self.encoding, length, temperature or self.config.temperature, seed)


def load_trained(run: str, device: torch.device) -> Trained:
    """Everything but the data. Raises UserError that names the file and the fix."""
    if not run:
        raise UserError("--run is missing: name the folder of a finished policy run, as train_policy.py printed it")
    folder = Path(run)
    config = read_config(PolicyConfig, folder / "config.json")
    reward_run = Path(config.reward_run)
    if not reward_run.is_dir():
        raise UserError(f"{folder / 'config.json'}: its reward run {reward_run} is not there; start this in the folder that "
                        "the policy was trained from")
    reward_config = read_config(RewardConfig, reward_run / "config.json")
    encoding = load_tokenizer(reward_config.tokenizer)
    models = [load_model(path, kind, fingerprint(encoding))[0].to(device).requires_grad_(False) for path, kind in (
        (reward_run / "base.pt", "base"), (reward_run / "reward.pt", "reward"), (folder / "policy.pt", "policy"))]
    return Trained(folder, config, reward_config, encoding, load_task(reward_config), *models, device)


def identity(trained: Trained) -> dict[str, str]:
    """By which answers about this policy know each other: its tokenizer and the reward model that it was trained against."""
    reward = (Path(trained.config.reward_run) / "reward.pt").read_bytes()
    return dict(tokenizer=fingerprint(trained.encoding)[:16], reward=hashlib.sha256(reward).hexdigest()[:16])
