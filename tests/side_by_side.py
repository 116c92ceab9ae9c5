"""Run under torchrun: several trainings one after the other, in float64, where a difference is a fault and not rounding.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/side_by_side.py RUNS.json

RUNS.json: [[script, settings], ...], as `in_float64` takes them.
"""

import json
import os
import sys
from pathlib import Path

import torch

import train_policy
import train_reward
from minirlhf import parallel
from minirlhf.config import PolicyConfig, RewardConfig

SCRIPTS = dict(train_policy=(train_policy.main, PolicyConfig), train_reward=(train_reward.main, RewardConfig))


def in_float64(script: str, settings: dict) -> None:
    main, config_class = SCRIPTS[script]
    torch.set_default_dtype(torch.float64)
    try:
        main(config_class(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}))
    finally:
        torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda file: None  # most of the time on a busy disk, and nobody pulls the plug here
    parallel.start()
    for script, settings in json.loads(Path(sys.argv[1]).read_text()):
        in_float64(script, settings)
    parallel.stop()
