"""A task's own functions, which task the data belongs to, and prompts that two splits share."""

import json
import math
import shutil
import sys
import types

import train_policy
import train_reward
from minirlhf.config import DATA, PolicyConfig, RewardConfig
from minirlhf.data import splits
from minirlhf.data.splits import load_ground_truth, load_splits
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.run.errors import UserError

import numpy as np
import pytest
import tiny
import torch
from tiny import as_flags, policy_config, refused, reward_config

FUNCTIONS = ("gold", "best_response", "probes", "preference_probability")


def make_task(monkeypatch, **changes):
    """The tiny task as a module "own" with some functions replaced; a function None is left out."""
    functions = {name: getattr(tiny, name) for name in FUNCTIONS} | changes
    module = types.ModuleType("own")
    vars(module).update({name: value for name, value in functions.items() if value})
    monkeypatch.setitem(tiny.sys.modules, "own", module)


def fail(*arguments):
    raise KeyError("no such\nkey")


# ---- the functions of a task ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, function, words",
    [
        ("gold", fail, "raised KeyError: 'no such\\nkey'"),
        ("gold", lambda *arguments: sys.exit(0), "raised SystemExit: 0"),
        ("gold", lambda prompt, response: 1.0, "raised TypeError: "),
        ("gold", lambda prompt, response, *, finished=True: 1.0, "raised TypeError: "),
        ("gold", lambda *arguments: None, "returned None for '"),
        ("gold", lambda *arguments: math.nan, "returned nan"),
        ("gold", lambda *arguments: [1.0, 2.0], "returned [1.0, 2.0]"),
        ("gold", lambda *arguments: torch.ones(3), "returned tensor([1., 1., 1.])"),
        ("gold", lambda *arguments: "1.0", "returned '1.0'"),
        ("gold", 3, "raised TypeError: 'int' object is not callable"),
        ("best_response", fail, "raised KeyError"),
        ("best_response", lambda prompt: None, "returned None"),
        ("best_response", lambda prompt: [" a"], "returned [' a']"),
        ("probes", fail, "raised KeyError"),
        ("probes", lambda prompt: None, "returned None"),
        ("probes", lambda prompt: [" a"], "returned [' a']"),
        ("probes", lambda prompt: {"defect": None}, "returned {'defect': None}"),
        ("preference_probability", fail, "raised KeyError"),
        ("preference_probability", lambda *arguments: None, "returned None"),
        ("preference_probability", lambda *arguments: math.nan, "returned nan"),
        ("preference_probability", lambda *arguments: 1.5, "returned 1.5"),
    ],
)
def test_a_function_that_fails_is_one_line_before_training(
    name, function, words, inputs, tmp_path, monkeypatch, capsys
):
    """Some are called for the first time after hours of training."""
    make_task(monkeypatch, **{name: function})
    flags = as_flags(reward_config(inputs, tmp_path / "run", task="own"))
    message = refused(capsys, train_reward.main, RewardConfig, flags)
    assert message.startswith(f"error: {name}() of --task own {words}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_fails_later_is_one_line_too(
    name, reward_run, inputs, tmp_path, monkeypatch, capsys
):
    """It may know only some prompts. Both scripts name it."""
    calls = []

    def function(*arguments):
        calls.append(arguments)
        return getattr(tiny, name)(*arguments) if len(calls) < 2 else None

    make_task(monkeypatch, **{name: function})
    flags = as_flags(reward_config(inputs, tmp_path / "reward", task="own"))
    message = refused(capsys, train_reward.main, RewardConfig, flags)
    assert message.startswith(f"error: {name}() of --task own returned None for ")
    if name in ("gold", "best_response"):
        make_task(monkeypatch)
        train_reward.main(reward_config(inputs, tmp_path / "ready", task="own"))
        make_task(monkeypatch, **{name: function})
        calls.clear()
        flags = as_flags(policy_config(tmp_path / "ready", tmp_path / "policy", task="own"))
        message = refused(capsys, train_policy.main, PolicyConfig, flags)
        assert f"{name}() of --task own returned None for " in message


def test_gold_always_gets_three_arguments(inputs, tmp_path, monkeypatch):
    """The signature of minirlhf/data/splits.py; finished is false only if a response was cut."""
    seen = []

    def gold(prompt, response, finished):
        seen.append((response, finished))
        return tiny.gold(prompt, response, finished)

    make_task(monkeypatch, gold=gold)
    config = reward_config(inputs, tmp_path / "reward", task="own", max_response_length=3)
    train_reward.main(config)
    # two letters after a blank and EOS are 4 tokens; the first call is the trial before training
    assert all(finished == (len(response) < 3) for response, finished in seen[1:])
    assert {finished for _, finished in seen[1:]} == {True, False}
    seen.clear()
    result = train_policy.main(policy_config(tmp_path / "reward", tmp_path / "policy", task="own"))
    assert {finished for _, finished in seen} == {True, False}
    assert result["best_gold"] == 2.0


@pytest.mark.parametrize("number", [1, True, np.float32(1.5), np.array(1.5), torch.tensor(1.5)])
def test_gold_may_be_a_number_of_any_type(number, inputs, monkeypatch):
    make_task(monkeypatch, gold=lambda *arguments: number)
    data = load_splits(reward_config(inputs, "run"))
    assert load_ground_truth("own", data).gold("a 1:", " aa", True) == number


@pytest.mark.parametrize("missing", FUNCTIONS)
def test_each_function_of_a_task_is_optional(missing, inputs, tmp_path, monkeypatch):
    make_task(monkeypatch, **{missing: None})
    result = train_reward.main(reward_config(inputs, tmp_path / "reward", task="own"))
    assert ("probes" in result) == (missing not in ("probes", "best_response"))
    assert ("ceiling" in result) == (missing != "preference_probability")
    result = train_policy.main(policy_config(tmp_path / "reward", tmp_path / "policy", task="own"))
    assert ("sampled_gold" in result) == (missing != "gold")
    assert ("best_gold" in result) == (missing not in ("gold", "best_response"))


# ---- which task the data belongs to --------------------------------------------------------------


def test_the_help_desk_is_known_by_its_prompts(inputs, tmp_path, monkeypatch):
    """A file of the user in data/ is another task, and the help desk's file is one anywhere."""
    shutil.copy(inputs / "pairs.jsonl", tmp_path / "mine.jsonl")
    shutil.copy(DATA / "helpdesk-test.jsonl", tmp_path / "copy.jsonl")
    monkeypatch.setattr(splits, "DATA", tmp_path)
    lines = (DATA / "helpdesk-test.jsonl").read_text().splitlines(keepends=True)[:5]
    (tmp_path / "mixed.jsonl").write_text(
        "".join(lines) + '{"prompt": "Customer: Hi.\\nAgent:", '
        '"responses": ["a", "b"], "preferences": [[0, 1]]}\n'
    )
    tasks = {}
    for name in ("mine", "copy", "mixed"):
        data = load_splits(RewardConfig(data=(str(tmp_path / f"{name}.jsonl"),)))
        tasks[name] = load_ground_truth("auto", data)
    assert tasks["mine"] is None and tasks["mixed"] is None
    assert tasks["copy"].__name__ == "minirlhf.data.helpdesk"
    shipped = load_ground_truth("auto", load_splits(RewardConfig()))
    assert shipped.__name__ == "minirlhf.data.helpdesk"
    mine, copy = str(tmp_path / "mine.jsonl"), str(tmp_path / "copy.jsonl")
    data = load_splits(RewardConfig(data=(copy,), test_data=(mine,)))
    assert load_ground_truth("auto", data) is None


def test_the_task_of_auto_is_recorded(inputs, tmp_path):
    """So that programs that do not read the data know it."""
    train_reward.main(reward_config(inputs, tmp_path / "run", task="auto"))
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["task"] == "none"
    config = reward_config(inputs, tmp_path / "run", task="auto", resume=True)
    train_reward.main(config)  # the flag may be repeated


# ---- prompts of two splits -----------------------------------------------------------------------


def test_prompts_that_are_trained_on_and_evaluated_are_reported(
    inputs, reward_run, tmp_path, capsys
):
    """An accuracy of 1.000 on the training pairs says nothing about other prompts."""
    lines = (inputs / "pairs.jsonl").read_text().splitlines(keepends=True)  # two pairs of a prompt
    (tmp_path / "some.jsonl").write_text("".join(lines[:6]) + lines[0].replace("a 0:", "a 99:"))
    same, some = str(inputs / "pairs.jsonl"), str(tmp_path / "some.jsonl")

    def warnings(**settings):
        config = reward_config(inputs, "", **settings)
        train_reward.encode_splits(load_splits(config), load_tokenizer(config.tokenizer), config)
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith("warning")]

    first, second = warnings(heldout_data=(same,), test_data=(some,))
    assert first.startswith("warning: 20 of 20 held-out prompts are also trained on")
    assert second.startswith("warning: 3 of 4 test prompts are also trained on")
    assert warnings() == []
    first, second = warnings(max_prompt_length=1)  # all end with the same token
    assert first.startswith("warning: 1 of 1 held-out prompts are also trained on (compared after")
    config = policy_config(reward_run, tmp_path / "run", prompts=same, iterations=1)
    train_policy.main(config)
    assert "warning: 6 of 6 test prompts are also trained on" in capsys.readouterr().out
    train_policy.main(policy_config(reward_run, tmp_path / "other", iterations=1))
    assert "warning" not in capsys.readouterr().out


def test_a_module_that_cannot_be_imported_names_the_flag():
    with pytest.raises(UserError, match="--task no_such_module: its import raised"):
        load_ground_truth("no_such_module")
