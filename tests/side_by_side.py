"""Programs of the tests of several processes. torchrun starts them.

    torchrun --standalone --nproc-per-node 2 tests/side_by_side.py RUNS.json
    torchrun --standalone --nproc-per-node 2 tests/side_by_side.py FLAGS

RUNS.json: [[script, settings, dtype], ...], the arguments of in_float64 for several trainings, one
after the other. In float64 all differences from one process are bugs.

FLAGS: of train_policy.py, with the algorithms of this module, which fail in one process.
"""

import json
import os
import signal
import sys
from pathlib import Path

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.rl.algorithms import ALGORITHMS, Algorithm, on_policy, use_full_return
from minirlhf.run import parallel
from minirlhf.run.command_line import run_script
from minirlhf.run.errors import UserError
from minirlhf.run.folder import with_tuples

import torch
from tiny import letters_right

SCRIPTS = dict(
    train_policy=(train_policy.main, PolicyConfig), train_reward=(train_reward.main, RewardConfig)
)


def in_float64(script: str, settings: dict, dtype: str = "float64") -> None:
    """Run a script in this process. dtype: of all weights and activations."""
    main, config_class = SCRIPTS[script]
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        main(config_class(**with_tuples(settings)))
    finally:
        torch.set_default_dtype(torch.float32)


# ---- reward functions ----------------------------------------------------------------------------


def rank_in_batch(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of the batch's responses that have a lower gold utility.

    So a score depends on all responses of the batch. Each call appends the process's rank and the
    number of responses to the file that the environment variable CALLS names.
    """
    if "CALLS" in os.environ:
        with open(os.environ["CALLS"], "a") as file:
            file.write(f"{os.environ['RANK']} {len(prompts)}\n")
    gold = letters_right(prompts, responses)
    return [sum(other < own for other in gold) / len(gold) for own in gold]


def fails_in_training(prompts: list[str], responses: list[str]) -> list[float]:
    """Raises for the 8 responses of an iteration, but not in the evaluation of the base model."""
    if len(prompts) == 8:
        raise ValueError("no idea")
    return [0.0] * len(prompts)


# ---- algorithms ----------------------------------------------------------------------------------


def fail_in_rank_1(rollout, config):
    if os.environ["RANK"] == "1":
        raise UserError("no idea")
    return use_full_return(rollout, config)


def fail_in_all(rollout, config):
    raise UserError("no idea")


def end_rank_1(rollout, config):
    """End a process without a message, as the system does if there is no memory left."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return use_full_return(rollout, config)


FAILING = {
    "fails-in-rank-1": Algorithm(fail_in_rank_1, on_policy),
    "fails-in-all": Algorithm(fail_in_all, on_policy),
    "rank-1-is-killed": Algorithm(end_rank_1, on_policy),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda file: None  # slow on a busy disk, and not tested here
    if sys.argv[1].startswith("--"):
        ALGORITHMS.update(FAILING)
        run_script(train_policy.main, PolicyConfig)
    else:
        parallel.init_processes()
        for run in json.loads(Path(sys.argv[1]).read_text()):
            in_float64(*run)
        parallel.finish_processes()
