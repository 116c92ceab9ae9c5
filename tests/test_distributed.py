"""Several processes train the model that one would have trained: same seed, same batches, same weights."""

import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import time

import pytest
import torch
from side_by_side import in_float64
from tiny import ROOT, as_flags, environment, policy_config, python, reward_config, rows, weights

from minirlhf.checkpoint import load_checkpoint
from minirlhf.parallel import micro_batches, piece, share

# 16 responses over 3 processes are 5, 5 and 6; minibatches of 6, 6 and 4; and what has a state or a global mean is there.
POLICIES = dict(
    ppo=dict(algorithm="ppo", minibatch_size=6, micro_batch_size=2, ent_coef=0.01),
    rloo=dict(algorithm="rloo", micro_batch_size=3),
    grpo=dict(algorithm="grpo", minibatch_size=6),
    sharded=dict(algorithm="ppo", minibatch_size=6, micro_batch_size=1, shard=True),
)
# 14 prompts in batches of 4, 4, 4 and 2: of three processes one has no prompt in the last. 20 texts over 3 likewise.
REWARDS = dict(reward=dict(micro_batch_size=1, centering=0.1), sharded_reward=dict(micro_batch_size=1, shard=True))


def settings_of(name, inputs, reward_run, folder, **changes):
    """(script, settings) of one of the runs above, in folder/name."""
    if name in POLICIES:
        common = dict(iterations=5, batch_size=16, kl_target=0.05, kl_horizon=100, eval_every=2, temperature=0.9)
        config = policy_config(reward_run, folder / name, **{**common, **POLICIES[name], **changes})
    else:
        config = reward_config(inputs, folder / name, **{**dict(epochs=2, save_every=3), **REWARDS[name], **changes})
    return "train_policy" if name in POLICIES else "train_reward", dataclasses.asdict(config)


def torchrun(count, *arguments):
    """The command, on any free port. Its agent looks after the workers ten times a second."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *map(str, arguments))


def run(command, **options):
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def alone(inputs, reward_run, tmp_path_factory):
    """Every run in this one process, in float64."""
    folder = tmp_path_factory.mktemp("alone")
    for name in [*POLICIES, *REWARDS]:
        in_float64(*settings_of(name, inputs, reward_run, folder, shard=False))
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def together(request, inputs, reward_run, tmp_path_factory):
    """The same runs by two or three processes."""
    folder = tmp_path_factory.mktemp(f"together-{request.param}")
    runs = [settings_of(name, inputs, reward_run, folder) for name in [*POLICIES, *REWARDS]]
    (folder / "runs.json").write_text(json.dumps(runs))
    ended = run(torchrun(request.param, ROOT / "tests" / "side_by_side.py", folder / "runs.json"))
    assert ended.returncode == 0, ended.stderr
    return folder


def assert_close_weights(ours, theirs, kind, tolerance=1e-9):
    a, b = weights(ours, kind), weights(theirs, kind)
    assert a.keys() == b.keys() and {x.dtype for x in a.values()} == {torch.float64}
    assert {name: float((a[name] - b[name]).abs().max()) for name in a if (a[name] - b[name]).abs().max() > tolerance} == {}


def assert_close_rows(ours, theirs):
    a, b = rows(ours), rows(theirs)
    assert [row.keys() for row in a] == [row.keys() for row in b]
    for mine, other in zip(a, b):
        for key, value in mine.items():
            assert value == (pytest.approx(other[key], rel=1e-6, abs=1e-9) if isinstance(value, float) else other[key]), key


@pytest.mark.parametrize("name", POLICIES)
def test_the_policy_is_the_one_that_a_single_process_trains(name, alone, together):
    """Whitening, sibling baselines, the KL controller, denominators, the gradient and its norm are of the whole batch. A
    local mean of any of them trains another model, which looks as good (several well-known trainers have done so)."""
    assert_close_weights(together / name / "policy.pt", alone / name / "policy.pt", "policy")
    assert_close_rows(together / name / "policy_metrics.jsonl", alone / name / "policy_metrics.jsonl")
    assert (together / name / "samples.md").read_text() == (alone / name / "samples.md").read_text()


@pytest.mark.parametrize("name", REWARDS)
def test_the_reward_model_is_the_one_that_a_single_process_trains(name, alone, together):
    """Also where the last batch of an epoch leaves a process without a prompt."""
    for kind in ("base", "reward"):
        assert_close_weights(together / name / f"{kind}.pt", alone / name / f"{kind}.pt", kind)
    assert_close_rows(together / name / "reward_metrics.jsonl", alone / name / "reward_metrics.jsonl")


def test_a_run_of_several_processes_leaves_the_files_of_one(alone, together):
    """One writer: the same files, and in the checkpoints the same tensors, sharded or not."""
    for name in [*POLICIES, *REWARDS]:
        ours, theirs = ([path.relative_to(folder / name) for path in sorted((folder / name).rglob("*"))]
                        for folder in (together, alone))
        assert ours == theirs
        for path in (together / name / "checkpoints").iterdir():
            kind = path.name.partition("-")[0]
            mine, other = (load_checkpoint(folder / name / "checkpoints" / path.name, kind)[1]["optimizer"]
                           for folder in (together, alone))
            assert mine["param_groups"] == other["param_groups"] and mine["state"].keys() == other["state"].keys()
            for number, kept in other["state"].items():
                for key, value in kept.items():
                    assert torch.allclose(mine["state"][number][key], value, rtol=1e-6, atol=1e-9)
