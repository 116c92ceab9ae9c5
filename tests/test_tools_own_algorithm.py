"""The README's own algorithm and reward do what the README says: the code is taken from there, and run."""

import json
import re
import subprocess
import types

import pytest
import tiny
import torch
from tiny import as_flags, policy_config

from minirlhf.config import PolicyConfig
from minirlhf.ladder import LADDER, pick_rung
from minirlhf.losses import policy_gradient_loss
from minirlhf.rollout import Rollout


@pytest.fixture(scope="module")
def section():
    """The section's code and its command lines."""
    found = re.search(r"^## Bring your own algorithm\n(.*?)(?=^## |\Z)", (tiny.ROOT / "README.md").read_text(), re.M | re.S)
    assert found, "README.md has no section 'Bring your own algorithm'"
    (first, code), (second, commands) = re.findall(r"^```(\w*)\n(.*?)^```$", found[1], re.M | re.S)
    assert (first, second) == ("python", "")
    return code, commands.splitlines()


@pytest.fixture
def steps(section, monkeypatch):
    monkeypatch.setattr("minirlhf.ladder.LADDER", dict(LADDER))
    module = types.ModuleType("steps")
    exec(compile(section[0], "README.md", "exec"), module.__dict__)
    yield module


def test_every_command_line_of_the_section_runs(section, reward_run, tmp_path):
    """In a process of its own, in a reduced size; the run is logged, saved and readable like any other."""
    code, commands = section
    assert len(commands) == 2
    (tmp_path / "steps.py").write_text(code)
    for number, command in enumerate(commands):
        start, script, *flags = command.split()
        assert (start, script) == ("python", "steps.py")
        out = tmp_path / f"run{number}"
        small = as_flags(policy_config(reward_run, out))  # the last of two equal flags counts
        done = subprocess.run(tiny.python("steps.py", *small, *flags), cwd=tmp_path, env=tiny.environment(), text=True,
                              capture_output=True, timeout=240)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert "algorithm: steps" in done.stdout and ("reward: short_and_sorry" in done.stdout) == (number == 1)
        assert json.loads((out / "config.json").read_text())["settings"]["algorithm"] == "steps"
        assert (out / "policy.pt").exists() and len((out / "policy_metrics.jsonl").read_text().splitlines()) == 3
    (out / "policy.pt").unlink()
    done = subprocess.run(tiny.python("steps.py", "--out", out.name, "--resume"), cwd=tmp_path, env=tiny.environment(), text=True,
                          capture_output=True, timeout=240)
    assert done.returncode == 0 and (out / "policy.pt").exists(), done.stderr


def test_each_function_of_the_section_is_short(section):
    """Less than 15 lines each is the promise."""
    code = section[0]
    lengths = [len(body.rstrip().split("\n")) for body in re.findall(r"^def .*?(?=^\S)", code + "\n#", re.M | re.S)]
    assert len(lengths) == 2 and max(lengths) < 15


def test_the_reward_by_hand(steps):
    assert steps.short_and_sorry(["p", "p"], [" I am sorry.", " No no no no"]) == pytest.approx([1.85, -0.2])


def rollout_of(rewards, mask):
    blank = torch.zeros_like(rewards)
    return Rollout(blank, mask, blank, mask, blank, blank, blank, blank[:, 0], rewards)


def test_the_advantages_by_hand(steps):
    """Three responses of 3, 2 and 1 tokens; the third token of the first has nobody to be compared with."""
    rewards = torch.tensor([[1.0, 0.0, 2.0], [0.0, 4.0, 0.0], [6.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    assert pick_rung(PolicyConfig(algorithm="steps")).advantages is steps.minus_others_at_step
    found = steps.LADDER["steps"].advantages(rollout_of(rewards, mask), PolicyConfig())
    assert torch.allclose(found, torch.tensor([[3.0 - 5.0, 2.0 - 4.0, 2.0], [4.0 - 4.5, 4.0 - 2.0, 0.0], [6.0 - 3.5, 0.0, 0.0]]))
    poisoned = torch.where(mask, rewards, float("nan"))
    assert torch.equal(steps.minus_others_at_step(rollout_of(poisoned, mask), PolicyConfig()), found)


def test_the_mean_of_the_gradient_stays_what_it_was(steps):
    """The README says so: over all pairs of responses of a small policy, the expectation equals that of reward-to-go."""
    logits = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64, requires_grad=True)  # [step, stop or go on]
    outcomes = [((0,), 1.0), ((1, 0), -2.0), ((1, 1), 3.0)]  # the actions taken, and what the last of them is paid

    def expected_gradient(advantages):
        total = torch.zeros_like(logits)
        for first, paid in outcomes:
            for second, paid_too in outcomes:
                pair, mask = (first, second), torch.zeros(2, 2, dtype=torch.bool)
                rewards = torch.zeros(2, 2, dtype=torch.float64)
                for row, (actions, reward) in enumerate(((first, paid), (second, paid_too))):
                    mask[row, :len(actions)], rewards[row, len(actions) - 1] = True, reward
                likely = logits.log_softmax(1)
                logprobs = torch.stack([torch.stack([likely[t, actions[t]] if t < len(actions) else 0 * likely.sum()
                                                     for t in range(2)]) for actions in pair])
                probability = logprobs.sum().exp().detach()
                weights = advantages(rollout_of(rewards, mask), PolicyConfig())
                loss = policy_gradient_loss(logprobs, weights, mask, 4.0)
                total += probability * torch.autograd.grad(loss, logits)[0]
        return total

    ours, wanted = (expected_gradient(steps.LADDER[name].advantages) for name in ("steps", "reward-to-go"))
    assert wanted.abs().max() > 0.01 and torch.allclose(ours, wanted, rtol=1e-9, atol=1e-12)
