"""Code that only a file names is not run: a run folder may come from another person."""

import doctest
import shutil
import sys
from pathlib import Path

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.run import folder
from minirlhf.run.folder import is_users_module
from minirlhf.tools import chat, label, report

import pytest
import tiny
from tiny import as_flags, policy_config, refused, reward_config, rows

EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
from tiny import *
"""


@pytest.fixture(scope="module")
def evil_runs(inputs, tmp_path_factory):
    """A folder with a reward and a policy run whose settings name the module "evil"."""
    folder = tmp_path_factory.mktemp("evil")
    (folder / "evil.py").write_text("from tiny import *\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", ["", *sys.path])
        settings = dict(sft_sequences=480, epochs=3, task="evil")
        train_reward.main(reward_config(inputs, "reward", **settings))
        reward = "evil:letters_right"
        train_policy.main(policy_config(Path("reward"), "policy", task="evil", reward=reward))
    sys.modules.pop("evil")
    return folder


@pytest.fixture
def strangers_runs(evil_runs, tmp_path, monkeypatch):
    """Copies of the two runs next to a module that leaves a mark if it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    shutil.copytree(evil_runs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "mark")))
    yield tmp_path
    sys.modules.pop("evil", None)


CHAT = ["--run", "policy", "--prompt", "b 3:", "--device", "cpu"]
NEW = as_flags(policy_config(Path("reward"), "new", task=""))


@pytest.mark.parametrize(
    "main, config_class, flags, file, advice",
    [
        (train_reward.main, RewardConfig, ["--out", "reward", "--resume"], "reward", "--task evil"),
        (train_policy.main, PolicyConfig, ["--out", "policy", "--resume"], "policy", "--"),
        (train_policy.main, PolicyConfig, NEW, "reward", "--task evil"),
        (chat.main, chat.ChatConfig, CHAT, "reward", "--task evil"),
        (
            chat.main,
            chat.ChatConfig,
            [*CHAT, "--task", "none"],
            "policy",
            "--reward evil:letters_right",
        ),
    ],
    ids=["resume-reward", "resume-policy", "policy", "chat", "chat-reward"],
)
def test_a_module_that_only_a_file_names_is_not_imported(
    main, config_class, flags, file, advice, strangers_runs, capsys
):
    line = refused(capsys, main, config_class, flags)
    assert line.startswith(f"error: {file}/config.json: names the module evil")
    assert f"if you trust its code, add {advice}" in line
    assert not (strangers_runs / "mark").exists()


def test_the_report_and_labels_import_nothing(strangers_runs, capsys):
    report.main(["reward"])
    report.main(["policy"])
    flags = ["--run", "policy", "--judge", "tiny:preference_probability", "--count", "1"]
    assert tiny.ending(label.main, label.LabelConfig, flags) == 0
    assert not (strangers_runs / "mark").exists()


def test_the_command_line_may_name_the_module_or_do_without_it(strangers_runs):
    policy = policy_config(Path("reward"), "without", task="none")
    train_policy.main(policy)
    assert not (strangers_runs / "mark").exists()
    assert "gold" not in rows(strangers_runs / "without" / "policy_metrics.jsonl")[-1]
    flags = [*CHAT, "--task", "evil", "--reward", "evil:letters_right"]
    assert tiny.ending(chat.main, chat.ChatConfig, flags) == 0
    assert (strangers_runs / "mark").exists()


@pytest.mark.parametrize(
    "name, is_theirs",
    [
        ("minirlhf.data.helpdesk", False),
        ("minirlhf.data.helpdesk:gold", False),
        ("minirlhf", True),
        ("minirlhfx.task", True),
        ("minirlhf.task.py", True),  # a file in the working directory
        ("minirlhf.x/../../task.py:f", True),
        ("./minirlhf.py", True),
    ],
)
def test_only_modules_of_the_package_are_trusted(name, is_theirs):
    assert is_users_module(name) == is_theirs


def test_examples_are_true():
    assert doctest.testmod(folder).failed == 0


def test_the_next_command_names_the_module_and_is_quoted(inputs, tmp_path, capsys):
    train_reward.main(reward_config(inputs, tmp_path / "my run"))
    expected = f"python train_policy.py --reward-run '{tmp_path}/my run' --task tiny\n"
    assert capsys.readouterr().out.endswith(f"next: {expected}")


def test_the_modules_belong_to_the_settings_of_a_run(reward_run, tmp_path, capsys):
    """A run must not get another task when it is resumed."""
    out = str(tmp_path / "run")
    train_policy.main(policy_config(reward_run, out))
    flags = ["--out", out, "--resume", "--task", "test_trust"]
    line = refused(capsys, train_policy.main, PolicyConfig, flags)
    assert "--resume with task = 'test_trust'" in line
    assert "name 'tiny', or start a new run" in line  # without the flag it would ask for it
