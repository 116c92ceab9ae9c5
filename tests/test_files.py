"""Files that are not what they should be: pipes, devices, other formats, far too large."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.run.command_line import MAX_MESSAGE, fail
from minirlhf.run.errors import UserError
from minirlhf.run.files import open_regular, read_file, regular_only
from minirlhf.run.folder import MAX_CONFIG, read_config
from minirlhf.tools import chat, label, report

import pytest
import tiny
from tiny import as_flags, policy_config, refused, reward_config


@contextlib.contextmanager
def time_limit(seconds: int = 20):
    """Reading a pipe without a writer would wait forever."""

    def expired(*_):
        raise TimeoutError("still waiting")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# ---- pipes and devices ---------------------------------------------------------------------------

REWARD = (train_reward.main, RewardConfig)
POLICY = (train_policy.main, PolicyConfig)
CHAT = (chat.main, chat.ChatConfig)
LABEL = (label.main, label.LabelConfig)
# (file to replace by a pipe, program, its last flags)
PIPES = [
    ("inputs/pairs.jsonl", REWARD, []),
    ("inputs/bytes.tiktoken", REWARD, []),
    ("model.safetensors", REWARD, ["--init", "model.safetensors"]),
    ("reward/reward.pt", REWARD, ["--init-reward", "reward/reward.pt"]),
    ("reward/base.pt", REWARD, ["--init-reward", "reward/reward.pt"]),
    ("reward/config.json", POLICY, []),
    ("reward/base.pt", POLICY, []),
    ("reward/reward.pt", POLICY, []),
    ("prompts.jsonl", POLICY, ["--prompts", "prompts.jsonl"]),
    ("policy/config.json", POLICY, ["--out", "policy", "--resume", *tiny.MODULES]),
    ("policy/.lock", POLICY, ["--out", "policy", "--resume", *tiny.MODULES]),
    ("policy/policy_metrics.jsonl", POLICY, ["--out", "policy", "--resume", *tiny.MODULES]),
    ("policy/policy.pt", CHAT, []),
    ("policy/samples.md", CHAT, []),
    ("policy/labels.jsonl", LABEL, []),
    ("policy/.labels.jsonl.lock", LABEL, []),
]


def reward_flags(inputs, out) -> list[str]:
    """Of a reward run with the default sizes, which --init requires."""
    default = {name: getattr(RewardConfig, name) for name in ("n_layer", "n_head", "d_model")}
    return as_flags(reward_config(inputs, out, **default))


@pytest.fixture
def copies(inputs, reward_run, policy_run, tmp_path, monkeypatch):
    """Copies of the inputs and of both finished runs, to be damaged."""
    for name, folder in (("inputs", inputs), ("reward", reward_run), ("policy", policy_run)):
        shutil.copytree(folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path, program, flags", PIPES, ids=lambda x: x if type(x) is str else "")
def test_a_pipe_in_place_of_a_file_is_one_line(path, program, flags, copies, reward_run, capsys):
    """A pipe without a writer blocked every program, and a device may never end."""
    first_flags = {
        REWARD: reward_flags(copies / "inputs", "new"),
        POLICY: as_flags(policy_config("reward", "new")),
        CHAT: ["--run", "policy", "--prompt", "a 1:", *tiny.MODULES],
        LABEL: ["--run", "policy", "--judge", "tiny:preference_probability", "--count", "1"],
    }[program]
    if "policy" in flags:
        first_flags = as_flags(policy_config(reward_run, "new"))
    (copies / path).unlink(missing_ok=True)
    os.mkfifo(copies / path)
    with time_limit():
        message = refused(capsys, *program, [*first_flags, *flags])
    assert path in message
    assert "a pipe or a device, not a regular file" in message or "No such device" in message
    assert not (copies / "new").exists()


def test_a_pipe_among_the_checkpoints_is_skipped(copies, reward_run, capsys):
    newest = max((copies / "policy" / "checkpoints").iterdir())
    newest.unlink()
    os.mkfifo(newest)
    with time_limit():
        train_policy.main(policy_config(reward_run, copies / "policy", resume=True))
    output = capsys.readouterr().out
    assert f"warning: {newest}: a pipe or a device" in output
    assert "resuming after step 1" in output


def test_the_report_skips_what_is_not_a_file(copies):
    (copies / "policy" / "result.json").unlink()
    os.mkfifo(copies / "policy" / "result.json")
    with time_limit():
        assert report.read_run(copies / "policy").result == {}


def test_a_device_is_not_read(tmp_path):
    with time_limit(), pytest.raises(OSError, match="not a regular file"):
        read_file("/dev/zero")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with open(tmp_path / "new", "a", opener=regular_only) as file:
        file.write("text")
    assert read_file(tmp_path / "new") == b"text"
    assert (tmp_path / "new").stat().st_mode & 0o111 == 0


# ---- size and format -----------------------------------------------------------------------------


def test_a_configuration_that_is_too_large_is_not_read(tmp_path):
    """A file of the size of the memory broke the error handler as well."""
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(2**41)  # a sparse file: reading it would fail
    with pytest.raises(UserError, match=f"config.json: .*larger than {MAX_CONFIG} bytes"):
        read_config(RewardConfig, path)


def test_an_error_that_quotes_a_huge_value_stays_short(capsys):
    with pytest.raises(SystemExit):
        fail("x" * 10**7, 2)
    assert len(capsys.readouterr().err) < MAX_MESSAGE + 20


def test_a_file_in_place_of_the_run_folder_is_one_line(reward_run, tmp_path, capsys):
    """The first attempt of many: the path of reward.pt, as another program would expect."""
    flags = ["--reward-run", str(reward_run / "reward.pt"), "--out", str(tmp_path / "new")]
    message = refused(capsys, *POLICY, flags)
    assert f"Not a directory; is {reward_run / 'reward.pt'} a run folder?\n" in message


@pytest.mark.parametrize("name", ["model.safetensors", "base.pt"])
def test_a_git_lfs_pointer_in_place_of_a_model_is_named(name, inputs, tmp_path, capsys):
    """git clone of a model without git-lfs leaves a text file of three lines."""
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    flags = [*reward_flags(inputs, tmp_path / "new"), "--init", str(tmp_path)]
    message = refused(capsys, *REWARD, flags)
    assert f"{name}: this is a Git-LFS pointer" in message and "git lfs pull" in message


def test_samples_that_are_not_utf8_do_not_stop_the_chat(copies):
    (copies / "policy" / "samples.md").write_bytes(b"\xfa Human: \xff")
    config = chat.ChatConfig(run="policy", prompt="a 1:", task="tiny", device="cpu")
    assert len(chat.main(config)) == 1


# ---- files of another run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_runs(inputs, tmp_path_factory):
    """A reward run and a policy run, and two others that differ only by their seed."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(inputs, folder / "inputs")
    (folder / "prompts.jsonl").write_text('{"prompt": "a 1:"}\n{"prompt": "b 1:"}\n')
    with contextlib.chdir(folder):
        for seed, name in enumerate(("", "other-")):
            train_reward.main(reward_config(Path("inputs"), f"{name}reward", seed=seed))
            settings = dict(seed=seed, prompts="prompts.jsonl" if seed else "")
            train_policy.main(policy_config(Path("reward"), f"{name}policy", **settings))
    return folder


@pytest.fixture
def two_runs(made_runs, tmp_path, monkeypatch):
    """Copies of them, to be mixed, in the current folder."""
    shutil.copytree(made_runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


JUDGE = ["--judge", "tiny:preference_probability", "--count", "2"]
CHAT_FLAGS = ["--run", "policy", "--prompt", "b 3:", *tiny.MODULES]
FROM_EARLIER = as_flags(
    reward_config(Path("inputs"), "new", init_reward="reward/reward.pt", tokenizer="auto")
)
NEW_POLICY = as_flags(policy_config(Path("reward"), "new"))


@pytest.mark.parametrize(
    "names",
    ["reward/base.pt", "reward/reward.pt", "reward/base.pt reward/reward.pt", "policy/policy.pt"],
)
def test_models_of_another_run_are_refused(names, two_runs, capsys):
    """They have the right sizes and a valid checksum, so nothing else would notice."""
    for name in names.split():
        shutil.copy(f"other-{name}", name)
    programs = [(*CHAT, CHAT_FLAGS), (*LABEL, ["--run", "policy", *JUDGE])]
    programs += [(*POLICY, NEW_POLICY)] if "reward" in names else []
    for program in programs:
        message = refused(capsys, *program)
        assert message.startswith(f"error: {names.split()[0]}: was not written by the run that")
    if names in ("reward/base.pt", "reward/reward.pt"):  # both together are a valid start
        message = refused(capsys, *REWARD, FROM_EARLIER)
        assert (
            "reward/base.pt: not the base model from which reward/reward.pt was trained" in message
        )
    assert not Path("new").exists()


def test_a_reward_model_that_was_trained_again_is_not_shown_with_an_older_policy(two_runs, capsys):
    """The files of the reward run agree with each other, but not with the policy run."""
    shutil.rmtree("reward")
    train_reward.main(reward_config(Path("inputs"), "reward", lr=1e-3))
    for program in ((*CHAT, CHAT_FLAGS), (*LABEL, ["--run", "policy", *JUDGE])):
        message = refused(capsys, *program)
        assert "reward/base.pt: not the file with which the policy run policy started" in message


@pytest.mark.parametrize("name, run", [("inputs/pairs.jsonl", ""), ("prompts.jsonl", "other-")])
def test_prompts_that_changed_after_training_are_not_labeled(name, run, two_runs, capsys):
    """The answers would belong to prompts that the policy never saw."""
    with open(name, "a") as file:
        file.write('{"prompt": "d 9:", "chosen": " dd", "rejected": " x"}\n')
    message = refused(capsys, *LABEL, ["--run", f"{run}policy", *JUDGE])
    assert f"{name}: not the file with which the policy run {run}policy started" in message
