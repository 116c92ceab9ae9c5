"""The code of minirlhf/rl/EXTENDING.md, a user's own algorithm, works as the page describes it."""

import dataclasses
import json
import re
import subprocess
import types

import train_policy
from minirlhf.config import PolicyConfig
from minirlhf.lab import conformance
from minirlhf.rl.algorithms import ALGORITHMS, Algorithm, on_policy, pick_algorithm
from minirlhf.rl.losses import policy_gradient_loss
from minirlhf.rl.rollout import Rollout
from minirlhf.run.errors import UserError

import pytest
import tiny
import torch
from tiny import as_flags, policy_config, refused

TEXT = (tiny.ROOT / "minirlhf" / "rl" / "EXTENDING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page():
    """The code of the page, and its command lines."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
    code, loss = (block for language, block in blocks if language)
    before, main, after = code.partition("if __name__")  # the page says where the loss goes
    return before + loss + main + after, "".join(b for name, b in blocks if not name).splitlines()


@pytest.fixture
def steps(page, monkeypatch):
    """The page's code as a module; its new algorithm is removed after the test."""
    monkeypatch.setattr("minirlhf.rl.algorithms.ALGORITHMS", dict(ALGORITHMS))
    module = types.ModuleType("steps")
    exec(compile(page[0], "EXTENDING.md", "exec"), module.__dict__)
    yield module


def run_steps(folder, *flags):
    return subprocess.run(
        tiny.python("steps.py", *flags),
        cwd=folder,
        env=tiny.environment(),
        text=True,
        capture_output=True,
        timeout=240,
    )


@pytest.mark.slow
def test_all_commands_of_the_section_run(page, reward_run, tmp_path):
    """Each runs in its own process on a tiny task; its run folder is like any other's."""
    code, commands = page
    commands = [command for command in commands if command.startswith("python steps")]
    assert len(commands) == 2
    (tmp_path / "steps.py").write_text(code)
    for number, command in enumerate(commands):
        start, script, *flags = command.split()
        assert (start, script) == ("python", "steps.py")
        out = tmp_path / f"run{number}"
        small = as_flags(policy_config(reward_run, out))  # the last of two equal flags counts
        done = run_steps(tmp_path, *small, *flags)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert "algorithm: steps" in done.stdout
        assert ("reward: short_and_sorry" in done.stdout) == (number == 1)
        assert json.loads((out / "config.json").read_text())["settings"]["algorithm"] == "steps"
        assert (out / "policy.pt").exists()
        assert len((out / "policy_metrics.jsonl").read_text().splitlines()) == 3
    (out / "policy.pt").unlink()
    modules = [*tiny.MODULES, "--reward", "steps:short_and_sorry"]
    done = run_steps(tmp_path, "--out", out.name, "--resume", *modules)
    assert done.returncode == 0 and (out / "policy.pt").exists(), done.stderr


def test_each_function_of_the_section_has_less_than_15_lines(page):
    functions = re.findall(r"^def .*?(?=^\S)", page[0] + "\n#", re.M | re.S)
    lengths = [len(function.rstrip().split("\n")) for function in functions]
    assert len(lengths) == 4
    assert max(lengths) < 15


def test_the_reward_equals_values_by_hand(steps):
    rewards = steps.short_and_sorry(["p", "p"], [" I am sorry.", " No no no no"])
    assert rewards == pytest.approx([1.85, -0.2])


@pytest.mark.parametrize("row", [Algorithm, Rollout])
def test_the_page_lists_the_fields(row):
    table = TEXT.partition(f"| field of [`{row.__name__}`]")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == list(row._fields)


def test_the_loss_has_the_claimed_gradient(page, steps, tmp_path, monkeypatch, capsys):
    """The page's command, in this process."""
    (tmp_path / "steps.py").write_text(page[0])
    monkeypatch.chdir(tmp_path)
    start = "python -m minirlhf.lab.conformance "
    (command,) = [command for command in page[1] if command.startswith(start)]
    assert conformance.main(command.split()[3:]) == 0
    output = capsys.readouterr().out
    assert "holds on-policy" in output and "swapped" not in output


def rollout_of(rewards, mask):
    zeros = torch.zeros_like(rewards)
    ids = torch.zeros_like(mask, dtype=torch.long)
    samples = tiny.make_samples(ids[:, :1], mask[:, :1], ids, mask)
    return Rollout(samples, zeros, zeros, zeros, zeros[:, 0], rewards, kl_coef=0.0)


def test_the_advantages_equal_values_by_hand(steps):
    """Two groups of three responses. In the first no other response has a third token."""
    rewards = torch.tensor(
        [[1.0, 0.0, 2.0], [0.0, 4.0, 0.0], [6.0, 0.0, 0.0]]
        + [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
    )
    lengths = torch.tensor([3, 2, 1, 3, 3, 1])
    mask = torch.arange(3) < lengths[:, None]
    config = PolicyConfig(algorithm="steps", batch_size=6, group_size=3)
    assert pick_algorithm(config).advantages is steps.minus_others_at_step
    advantages = steps.ALGORITHMS["steps"].advantages(rollout_of(rewards, mask), config)
    by_hand = [[3.0 - 5.0, 2.0 - 4.0, 2.0], [4.0 - 4.5, 4.0 - 2.0, 0.0], [6.0 - 3.5, 0.0, 0.0]]
    by_hand += [[1.0 - 1.0, 1.0, 1.0], [0.0 - 1.5, -1.0, -1.0], [2.0 - 0.5, 0.0, 0.0]]
    assert torch.allclose(advantages, torch.tensor(by_hand))
    poisoned = torch.where(mask, rewards, float("nan"))
    again = steps.minus_others_at_step(rollout_of(poisoned, mask), config)
    assert torch.equal(again, advantages)


def test_the_expected_gradient_equals_that_of_reward_to_go(steps):
    """The page claims it. All pairs of responses of a small policy are enumerated."""
    # [step, action]; action 0 stops
    logits = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64, requires_grad=True)
    # (actions, reward of the last one)
    outcomes = [((0,), 1.0), ((1, 0), -2.0), ((1, 1), 3.0)]

    def logprobs_of(actions):
        logprobs = logits.log_softmax(1)
        missing = [0 * logprobs.sum()] * (2 - len(actions))
        return torch.stack([logprobs[t, action] for t, action in enumerate(actions)] + missing)

    def gradient_of(pair, advantages):
        """The gradient for a batch of two responses, times its probability."""
        mask = torch.zeros(2, 2, dtype=torch.bool)
        rewards = torch.zeros(2, 2, dtype=torch.float64)
        for row, (actions, reward) in enumerate(pair):
            mask[row, : len(actions)] = True
            rewards[row, len(actions) - 1] = reward
        logprobs = torch.stack([logprobs_of(actions) for actions, _ in pair])
        weights = advantages(rollout_of(rewards, mask), PolicyConfig(group_size=2))
        loss = policy_gradient_loss(logprobs, weights, mask, 4.0)
        probability = logprobs.sum().exp().detach()
        return probability * torch.autograd.grad(loss, logits)[0]

    def expected_gradient(name):
        advantages = steps.ALGORITHMS[name].advantages
        pairs = [(first, second) for first in outcomes for second in outcomes]
        return sum(gradient_of(pair, advantages) for pair in pairs)

    actual = expected_gradient("steps")
    expected = expected_gradient("reward-to-go")
    assert expected.abs().max() > 0.01
    assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-12)


def scores_only(rollout, config):
    return rollout.scores


def whole_numbers(rollout, config):
    return rollout.mask.long()


def raising(rollout, config):
    return {}["a"]


def differentiable(rollout, config):
    return rollout.values.clone().requires_grad_()


def not_finite(rollout, config):
    return torch.where(rollout.mask, float("nan"), rollout.values)


def right(rollout, config):
    return rollout.rewards


def detached(logprobs, rollout, config, denominator):
    return logprobs.sum().detach()


def vector(logprobs, rollout, config, denominator):
    return logprobs.sum(1)


@pytest.mark.parametrize(
    "row, words",
    [
        (Algorithm(scores_only, on_policy), "scores_only returned a tensor of shape (8,)"),
        (Algorithm(whole_numbers, on_policy), "torch.int64; it must return one floating-point"),
        (Algorithm(raising, on_policy), "raising raised KeyError: "),
        (Algorithm(raising, on_policy), "(test_tools_own_algorithm.py:"),
        (Algorithm(differentiable, on_policy), "with a gradient; it must"),
        (Algorithm(lambda rollout, config: None, on_policy), "<lambda> returned a NoneType"),
        (Algorithm(not_finite, on_policy), "mean of the advantages is nan"),
        (Algorithm(detached, right), "function detached raised TypeError"),
        (
            Algorithm(right, detached),
            "detached returned a tensor of shape () and torch.float32; it",
        ),
        (Algorithm(right, vector), "must return one number that is differentiable"),
        (right, "must be an Algorithm(advantages, loss)"),
    ],
)
def test_a_wrong_row_is_refused_in_one_line(row, words, reward_run, tmp_path, monkeypatch, capsys):
    """[B] advantages would train without an error if B equals R, each with another's score."""
    monkeypatch.setitem(ALGORITHMS, "wrong", row)
    config = dataclasses.replace(policy_config(reward_run, tmp_path / "run"), algorithm="wrong")
    assert words in refused(capsys, train_policy.main, PolicyConfig, as_flags(config))


def test_a_row_named_dpo_is_refused(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "dpo", ALGORITHMS["ppo"])
    with pytest.raises(UserError, match="choose another name"):
        pick_algorithm(PolicyConfig())
