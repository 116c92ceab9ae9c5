"""Run under torchrun: several trainings one after the other, in float64, where a difference is a fault and not rounding.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/side_by_side.py RUNS.json

RUNS.json: [[script, settings, dtype], ...], as `in_float64` takes them.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import train_policy
import train_reward
from minirlhf import parallel
from minirlhf.config import PolicyConfig, RewardConfig

SCRIPTS = dict(train_policy=(train_policy.main, PolicyConfig), train_reward=(train_reward.main, RewardConfig))


def in_float64(script: str, settings: dict, dtype: str = "float64") -> None:
    main, config_class = SCRIPTS[script]
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        main(config_class(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}))
    finally:
        torch.set_default_dtype(torch.float32)


def fails_in_one(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward function that raises in the process of rank 1 alone."""
    if os.environ["RANK"] == "1":
        raise ValueError("no idea")
    return [0.0] * len(prompts)


def fails_in_all(prompts: list[str], responses: list[str]) -> list[float]:
    raise ValueError("no idea")


def kills_one(prompts: list[str], responses: list[str]) -> list[float]:
    """A process that ends without a word, as when the system runs out of memory."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(prompts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda file: None  # most of the time on a busy disk, and nobody pulls the plug here
    parallel.start()
    for run in json.loads(Path(sys.argv[1]).read_text()):
        in_float64(*run)
    parallel.stop()
