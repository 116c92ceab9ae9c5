"""A resumed run ends bit-identical to one that was never stopped, killed or damaged.

Also: which changes of settings and inputs are refused when a run is resumed.
"""

import dataclasses
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.splits import in_this_checkout
from minirlhf.rl.task import pick_reward_run
from minirlhf.run import checkpoint, signals
from minirlhf.run.command_line import run_script
from minirlhf.run.errors import UserError
from minirlhf.run.files import lock_file
from minirlhf.run.folder import open_folder, read_config
from minirlhf.run.run import environment
from minirlhf.run.signals import StopSignal

import pytest
import tiny
import torch
from tiny import (
    after_row,
    as_flags,
    assert_same_weights,
    contents,
    ending,
    policy_config,
    refused,
    reward_config,
    rows,
)

REWARD_STEPS = 7  # of both stages; the metrics file has one more row, of the final test
POLICY_STEPS = 4  # the metrics file has one more row, of step 0


def reward_settings(inputs, out, **changes):
    return reward_config(inputs, out, **{**dict(save_every=2), **changes})


def policy_settings(reward_run, out, **changes):
    """Everything that has a state or draws random numbers is on.

    That is: adaptive KL, evaluations, several epochs of minibatches.
    """
    settings = dict(
        iterations=POLICY_STEPS,
        kl_target=0.01,
        kl_horizon=20,
        eval_every=2,
        save_every=2,
        best_of_n=2,
    )
    return policy_config(reward_run, out, **{**settings, **changes})


@pytest.fixture(scope="module")
def uninterrupted_reward_run(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "reward"
    train_reward.main(reward_settings(inputs, folder))
    return folder


@pytest.fixture(scope="module")
def uninterrupted_policy_run(reward_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "policy"
    train_policy.main(policy_settings(reward_run, folder))
    return folder


def assert_same_reward_run(folder, expected):
    assert_same_weights(folder / "base.pt", expected / "base.pt", "base")
    assert_same_weights(folder / "reward.pt", expected / "reward.pt", "reward")
    assert rows(folder / "reward_metrics.jsonl") == rows(expected / "reward_metrics.jsonl")


def assert_same_policy_run(folder, expected):
    assert_same_weights(folder / "policy.pt", expected / "policy.pt", "policy")
    assert rows(folder / "policy_metrics.jsonl") == rows(expected / "policy_metrics.jsonl")
    for name in ("samples.md", "result.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()


def start_reward_run(inputs, folder, **changes):
    """The exit status of a new run."""
    flags = as_flags(reward_settings(inputs, folder, **changes))
    return ending(train_reward.main, RewardConfig, flags)


def start_policy_run(reward_run, folder, **changes):
    """The exit status of a new run."""
    flags = as_flags(policy_settings(reward_run, folder, **changes))
    return ending(train_policy.main, PolicyConfig, flags)


def resume(main, config_class, folder, *more):
    return ending(main, config_class, ["--out", str(folder), "--resume", *tiny.MODULES, *more])


# ---- stopped -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, REWARD_STEPS + 1))
def test_a_reward_run_stopped_after_any_step_resumes_exactly(
    step, inputs, uninterrupted_reward_run, tmp_path, monkeypatch, capsys
):
    """Optimizer moments, data order and schedule are restored.

    Without one of them the loss would jump only a little.
    """
    after_row(monkeypatch, step, tiny.write_and_signal(signal.SIGINT))
    assert start_reward_run(inputs, tmp_path / "run") == 130
    command = f"python train_reward.py --out {tmp_path / 'run'} --resume --task tiny"
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line == f"error: stopped; resume with: {command}"
    assert len(rows(tmp_path / "run" / "reward_metrics.jsonl")) == step  # it completed its step
    assert resume(train_reward.main, RewardConfig, tmp_path / "run") == 0
    assert_same_reward_run(tmp_path / "run", uninterrupted_reward_run)


@pytest.mark.parametrize("step", range(1, POLICY_STEPS + 1))
def test_a_policy_run_stopped_after_any_step_resumes_exactly(
    step, reward_run, uninterrupted_policy_run, tmp_path, monkeypatch, capsys
):
    """Weights, moments, random numbers, prompt order and adaptive KL coefficient are restored."""
    logged = rows(uninterrupted_policy_run / "policy_metrics.jsonl")[1:]
    coefficients = [row["kl_coef"] for row in logged]
    assert len(set(coefficients)) == POLICY_STEPS  # otherwise the test could not detect its loss
    after_row(monkeypatch, step + 1, tiny.write_and_signal(signal.SIGTERM))
    assert start_policy_run(reward_run, tmp_path / "run") == 143
    command = f"python train_policy.py --out {tmp_path / 'run'} --resume --task tiny"
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line == f"error: stopped; resume with: {command}"
    steps = [row["step"] for row in rows(tmp_path / "run" / "policy_metrics.jsonl")]
    assert steps == list(range(step + 1))
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


def test_a_model_of_another_form_resumes_exactly(
    inputs, reward_run, mixed_run, tmp_path, monkeypatch
):
    """With key-value heads, RoPE and an untied LM head; in the reward run it gets no gradient."""
    changes = dict(init=str(mixed_run / "base.pt"), sft_init=True)
    assert start_reward_run(inputs, tmp_path / "reward", **changes) == 0
    after_row(monkeypatch, 5, tiny.write_and_signal())
    assert start_reward_run(inputs, tmp_path / "stopped", **changes) == 130
    assert resume(train_reward.main, RewardConfig, tmp_path / "stopped") == 0
    assert_same_reward_run(tmp_path / "stopped", tmp_path / "reward")
    assert start_policy_run(mixed_run, tmp_path / "policy") == 0
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert start_policy_run(mixed_run, tmp_path / "run") == 130
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", tmp_path / "policy")


@pytest.mark.parametrize("algorithm", ["reinforce", "rloo", "grpo", "dpo", "online-dpo"])
def test_other_algorithms_resume_exactly(algorithm, reward_run, tmp_path, monkeypatch):
    """Grouped prompts and algorithms without minibatches take other paths; dpo has another loop."""
    changes = dict(algorithm=algorithm, best_of_n=0)
    assert start_policy_run(reward_run, tmp_path / "uninterrupted", **changes) == 0
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert start_policy_run(reward_run, tmp_path / "run", **changes) == 130
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", tmp_path / "uninterrupted")


def test_a_folder_with_spaces_is_quoted_in_the_resume_command(
    reward_run, tmp_path, monkeypatch, capsys
):
    """Users paste the command into a shell."""
    folder = tmp_path / "my run's folder"
    after_row(monkeypatch, 2, tiny.write_and_signal())
    assert start_policy_run(reward_run, folder) == 130
    command = capsys.readouterr().err.splitlines()[-1].partition("resume with: ")[2]
    assert shlex.split(command)[2:] == ["--out", str(folder), "--resume", *tiny.MODULES]


def test_a_second_signal_stops_at_once():
    """The first signal restores the default handlers, so a second one ends a step that hangs."""
    stop = StopSignal("train_policy.py")
    stop.install()
    stop.in_steps = True
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_during_the_agreement_of_processes_counts_at_the_next_step(monkeypatch):
    """The number that the processes exchange was read before the signal arrived.

    If the signal were lost, the run would continue, and a second Ctrl-C would end it without a
    checkpoint.
    """
    stop = StopSignal("train_policy.py")
    stop.install()
    steps = []

    def interrupted(number):
        if steps == [0]:
            os.kill(os.getpid(), signal.SIGINT)
        return number

    monkeypatch.setattr(signals, "all_reduce_max", interrupted)

    def train():
        for step in stop.steps(0, 5):
            steps.append(step)
            stop.requested()

    with pytest.raises(SystemExit) as ended:
        train()
    assert ended.value.code == 130 and steps == [0, 1]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "script, where",
    [
        (train_policy, "final_evaluation"),
        (train_policy, "Evaluator"),
        (train_policy, "save_model"),
        (train_reward, "normalize_scores"),
        (train_reward, "evaluate_reward_model"),
    ],
)
def test_a_signal_between_the_stages_stops_at_once(
    script,
    where,
    number,
    status,
    inputs,
    reward_run,
    uninterrupted_reward_run,
    uninterrupted_policy_run,
    tmp_path,
    monkeypatch,
    capsys,
):
    """The final table takes minutes, but all of its inputs are saved.

    So a signal ends the process without waiting for it, and no result is lost.
    """

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        pytest.fail("the process did not end")

    if script is train_policy:
        start, source, config_class = start_policy_run, reward_run, PolicyConfig
    else:
        start, source, config_class = start_reward_run, inputs, RewardConfig
    with monkeypatch.context() as patch:
        patch.setattr(script, where, interrupted)
        assert start(source, tmp_path / "run") == status
    command = f"python {script.__name__}.py --out {tmp_path / 'run'} --resume --task tiny"
    assert capsys.readouterr().err == f"error: stopped; resume with: {command}\n"
    assert resume(script.main, config_class, tmp_path / "run") == 0
    if script is train_policy:
        assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)
    else:
        assert_same_reward_run(tmp_path / "run", uninterrupted_reward_run)


def test_a_signal_while_the_data_is_read_creates_no_folder(inputs, tmp_path, monkeypatch, capsys):
    """At that time there is no run folder that could be resumed."""
    monkeypatch.setattr(
        train_reward, "load_splits", lambda config: os.kill(os.getpid(), signal.SIGINT)
    )
    assert start_reward_run(inputs, tmp_path / "run") == 130
    assert capsys.readouterr().err == "error: stopped; nothing was started\n"
    assert not (tmp_path / "run").exists()


def test_a_signal_during_an_evaluation_lets_the_step_end(
    reward_run, uninterrupted_policy_run, tmp_path, monkeypatch, capsys
):
    """An evaluation within the loop belongs to its step: its row and its checkpoint are written."""
    evaluate = train_policy.evaluate

    def interrupted(evaluator, policy):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(evaluator, policy)

    with monkeypatch.context() as patch:
        patch.setattr(train_policy, "evaluate", interrupted)
        assert start_policy_run(reward_run, tmp_path / "run") == 130
    assert "stopping after this step" in capsys.readouterr().err
    assert [row["step"] for row in rows(tmp_path / "run" / "policy_metrics.jsonl")] == [0, 1, 2]
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


SLOW_REWARD = '''
import time
from tiny import letters_right

calls = []

def score(prompts, responses):
    """Hangs in its third call, the first of training: the base model is evaluated before."""
    calls.append(1)
    if len(calls) == 3:
        print("hanging", flush=True)
        time.sleep(600)
    return letters_right(prompts, responses)
'''


def test_a_second_ctrl_c_stops_a_step_that_hangs(reward_run, tmp_path):
    """A reward function that waits for a server forever can be stopped without kill -9."""
    (tmp_path / "slow.py").write_text(SLOW_REWARD)
    flags = as_flags(policy_settings(reward_run, "run", reward="slow:score"))
    process = subprocess.Popen(
        [sys.executable, str(tiny.ROOT / "train_policy.py"), *flags],
        cwd=tmp_path,
        env=tiny.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert any(line == "hanging\n" for line in process.stdout), process.stderr.read()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline() == "stopping after this step is saved (again: stop at once)\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
    process.stdout.close()
    process.stderr.close()


# ---- killed --------------------------------------------------------------------------------------


def killed(main, config_class, arguments):
    """True if the run ended by Killed; neither run_script nor the run may catch it."""
    try:
        run_script(main, config_class, arguments)
    except tiny.Killed:
        return True
    return False


@pytest.mark.parametrize("row", range(1, REWARD_STEPS + 2))
def test_a_reward_run_killed_within_any_step_resumes_exactly(
    row, inputs, uninterrupted_reward_run, tmp_path, monkeypatch
):
    """The steps after the last checkpoint are repeated.

    Their old rows, one of which is incomplete, must not stay in the metrics file.
    """
    after_row(monkeypatch, row, tiny.tear_and_die)
    assert killed(
        train_reward.main, RewardConfig, as_flags(reward_settings(inputs, tmp_path / "run"))
    )
    assert resume(train_reward.main, RewardConfig, tmp_path / "run") == 0
    assert_same_reward_run(tmp_path / "run", uninterrupted_reward_run)


@pytest.mark.parametrize("row", range(1, POLICY_STEPS + 2))
def test_a_policy_run_killed_within_any_step_resumes_exactly(
    row, reward_run, uninterrupted_policy_run, tmp_path, monkeypatch
):
    """Before the first checkpoint the run starts again, and its first row is there only once."""
    after_row(monkeypatch, row, tiny.tear_and_die)
    assert killed(
        train_policy.main, PolicyConfig, as_flags(policy_settings(reward_run, tmp_path / "run"))
    )
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


def test_a_run_killed_before_its_config_file_can_be_started_again(
    reward_run, uninterrupted_policy_run, tmp_path
):
    """A folder with only a lock counts as new; otherwise it could be neither resumed nor used."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.json.partial").write_bytes(b'{"settings')
    assert start_policy_run(reward_run, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


def test_resuming_a_finished_run_changes_nothing(
    inputs, reward_run, uninterrupted_reward_run, uninterrupted_policy_run, tmp_path
):
    """A job queue that restarts every job must not add rows to finished runs."""
    assert start_reward_run(inputs, tmp_path / "reward") == 0
    assert start_policy_run(reward_run, tmp_path / "policy") == 0
    for _ in range(2):
        assert resume(train_reward.main, RewardConfig, tmp_path / "reward") == 0
        assert resume(train_policy.main, PolicyConfig, tmp_path / "policy") == 0
    assert_same_reward_run(tmp_path / "reward", uninterrupted_reward_run)
    assert_same_policy_run(tmp_path / "policy", uninterrupted_policy_run)


INTERRUPTING = '''
import os, signal
from tiny import letters_right

def score(prompts, responses):
    """Ends the process in the third iteration, then sends SIGTERM in the third after that."""
    with open("calls", "a") as file:
        file.write("x")
    calls = os.path.getsize("calls")
    if calls == 9:
        os._exit(9)
    if calls == 12:
        os.kill(os.getpid(), signal.SIGTERM)
    return letters_right(prompts, responses)
'''


def test_real_processes_that_are_killed_and_stopped_resume_exactly(
    reward_run, tmp_path, monkeypatch
):
    """The lock ends with its process; the exit status and the printed command are right."""
    (tmp_path / "interrupting.py").write_text(INTERRUPTING)
    flags = as_flags(
        policy_settings(reward_run, "run", reward="interrupting:score", save_every=1, eval_every=1)
    )

    def python(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=tiny.environment(),
            text=True,
            capture_output=True,
        )

    script = str(tiny.ROOT / "train_policy.py")
    first = python(script, *flags)
    assert first.returncode == 9, first.stderr
    modules = ["--task", "tiny", "--reward", "interrupting:score"]
    second = python(script, "--out", "run", "--resume", *modules)
    assert second.returncode == 143, second.stderr
    assert second.stderr.splitlines() == [
        "",
        "stopping after this step is saved (again: stop at once)",
        f"error: stopped; resume with: python {script} --out run --resume {' '.join(modules)}",
    ]
    flags = shlex.split(second.stderr.splitlines()[-1].partition("train_policy.py ")[2])
    third = python(script, *flags)
    assert (third.returncode, third.stderr) == (0, "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    status = start_policy_run(
        reward_run, "uninterrupted", reward="interrupting:score", save_every=1, eval_every=1
    )
    assert status == 0
    assert_same_policy_run(tmp_path / "run", tmp_path / "uninterrupted")


# ---- damaged -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-7],
        lambda content: content[:100],
        lambda content: b"",
        lambda content: content[:900] + b"\xff" + content[901:],
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    damage, reward_run, uninterrupted_policy_run, tmp_path, monkeypatch, capsys
):
    """It is skipped with a warning, and the steps since the older one are repeated."""
    after_row(monkeypatch, 4, tiny.write_and_signal())
    assert start_policy_run(reward_run, tmp_path / "run", save_every=1) == 130
    newest = tmp_path / "run" / "checkpoints" / "policy-00000003.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    capsys.readouterr()
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run", "--save-every", "2") == 0
    output = capsys.readouterr().out
    assert f"warning: {newest}: " in output
    assert "iteration 3/4" in output and "iteration 2/4" not in output
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


def test_a_run_without_an_intact_checkpoint_starts_again(
    reward_run, uninterrupted_policy_run, tmp_path, monkeypatch
):
    """If all checkpoints are incomplete, the run is repeated from its first step in its folder."""
    after_row(monkeypatch, 4, tiny.write_and_signal())
    assert start_policy_run(reward_run, tmp_path / "run") == 130
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"incomplete")
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


@pytest.mark.parametrize(
    "damage",
    [
        *(
            lambda content, line=line: line + content
            for line in (
                b"\n",
                b"{\n",
                b'"text"\n',
                b"[1]\n",
                b"\xff\xfe\n",
                b'{"stage": "policy"\n',
                b"[" * 50_000 + b"\n",
            )
        ),
        lambda content: content.replace(b'"score": ', b'"score": 1', 1),
        lambda content: content.replace(b'"step": 2', b'"step": 3', 1),
        lambda content: content[content.index(b"\n") + 1 :],
        lambda content: b"",
    ],
    ids=range(11),
)
def test_damaged_metrics_are_renamed_and_the_run_resumes(
    damage, reward_run, uninterrupted_policy_run, tmp_path, monkeypatch, capsys
):
    """A flipped digit would be a value that was not measured.

    The metrics file never holds an incomplete row, or a row twice.
    """
    after_row(monkeypatch, 4, tiny.write_and_signal())
    assert start_policy_run(reward_run, tmp_path / "run") == 130
    path = tmp_path / "run" / "policy_metrics.jsonl"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    capsys.readouterr()
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    (aside,) = path.parent.glob("policy_metrics.jsonl.*.damaged")
    assert f"warning: {path}: damaged; renamed to {aside.name}" in capsys.readouterr().out
    assert aside.read_bytes() == damaged
    assert rows(path) == rows(uninterrupted_policy_run / path.name)[4:]
    assert_same_weights(
        tmp_path / "run" / "policy.pt", uninterrupted_policy_run / "policy.pt", "policy"
    )


@pytest.mark.parametrize(
    "rest", [b"", b"{", b'{"step": 4}\n', b"\xff" * 5000 + b"\n\n"], ids=range(4)
)
def test_metrics_rows_after_the_checkpoint_are_dropped(
    rest, reward_run, uninterrupted_policy_run, tmp_path, monkeypatch, capsys
):
    """A crash leaves rows of steps that are repeated; the last row may be incomplete.

    That is no damage, so there is no warning.
    """
    after_row(monkeypatch, 4, tiny.write_and_signal())
    assert start_policy_run(reward_run, tmp_path / "run") == 130
    path = tmp_path / "run" / "policy_metrics.jsonl"
    path.write_bytes(path.read_bytes() + rest)
    capsys.readouterr()
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert "damaged" not in capsys.readouterr().out
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


def test_a_checkpoint_of_another_run_is_skipped_with_a_warning(
    reward_run, uninterrupted_policy_run, tmp_path, monkeypatch, capsys
):
    """A checkpoint copied from a run with another seed is intact and fits the model.

    Resuming from it would join two halves of two runs.
    """
    assert start_policy_run(reward_run, tmp_path / "other", seed=1) == 0
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert start_policy_run(reward_run, tmp_path / "run") == 130
    foreign = tmp_path / "run" / "checkpoints" / "policy-00000004.pt"
    foreign.write_bytes((tmp_path / "other" / "checkpoints" / foreign.name).read_bytes())
    capsys.readouterr()
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    warning = f"warning: {foreign}: belongs to a run with other settings or data"
    assert warning in capsys.readouterr().out
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


def test_repeated_fine_tuning_is_followed_by_a_new_reward_stage(
    inputs, uninterrupted_reward_run, tmp_path, monkeypatch, capsys
):
    """Fine-tuning has an intact checkpoint of its first step only; the reward stage has later ones.

    If the reward stage were resumed from its own checkpoints, its rows would come before those of
    fine-tuning.
    """
    after_row(monkeypatch, 6, tiny.write_and_signal())
    assert start_reward_run(inputs, tmp_path / "run", save_every=1, keep_checkpoints=9) == 130
    for step in (2, 3):
        path = tmp_path / "run" / "checkpoints" / f"sft-{step:08d}.pt"
        path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "run" / "base.pt").write_bytes(b"incomplete")
    capsys.readouterr()
    assert resume(train_reward.main, RewardConfig, tmp_path / "run") == 0
    output = capsys.readouterr().out
    assert output.count("warning: ") == 2 and "resuming after step 1\n" in output
    assert_same_reward_run(tmp_path / "run", uninterrupted_reward_run)


@pytest.mark.parametrize("name", ["base.pt", "reward.pt"])
def test_damaged_models_are_restored_from_the_checkpoints(
    name, inputs, uninterrupted_reward_run, tmp_path, capsys
):
    """The policy script names the damaged file; resuming the reward run writes it again."""
    shutil.copytree(uninterrupted_reward_run, tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:-50])
    flags = as_flags(policy_settings(tmp_path / "run", tmp_path / "policy"))
    assert str(path) in refused(capsys, train_policy.main, PolicyConfig, flags)
    assert resume(train_reward.main, RewardConfig, tmp_path / "run") == 0
    assert_same_reward_run(tmp_path / "run", uninterrupted_reward_run)


def test_a_policy_run_refuses_a_reward_run_whose_settings_were_changed(
    uninterrupted_reward_run, tmp_path, capsys
):
    """Another seed holds out other prompts: the reward model was trained on some of them."""
    shutil.copytree(uninterrupted_reward_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    flags = as_flags(policy_settings(tmp_path / "run", tmp_path / "policy"))
    assert "config.json: was changed or damaged" in refused(
        capsys, train_policy.main, PolicyConfig, flags
    )


def with_moments(states: dict, **changes) -> dict:
    """The states with other optimizer moments of the first parameter."""
    optimizer = states["optimizer"]
    first = min(optimizer["state"])
    moments = {**optimizer["state"], first: {**optimizer["state"][first], **changes}}
    return dict(states, optimizer=dict(optimizer, state=moments))


def test_the_optimizers_settings_do_not_come_from_the_checkpoint(
    reward_run, uninterrupted_policy_run, tmp_path, monkeypatch
):
    """A wrong type there would fail in the middle of a step."""
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert start_policy_run(reward_run, tmp_path / "run") == 130
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    meta, states = checkpoint.load_checkpoint(path, "policy")
    for group in states["optimizer"]["param_groups"]:
        group.update(betas="x", weight_decay=9.0, lr_scale=None)
    checkpoint.save_checkpoint(path, "policy", meta, states)
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


@pytest.mark.parametrize(
    "change",
    [
        dict(step=float("inf")),
        dict(step="2"),
        dict(step=-1),
        dict(step=True),
        dict(step=None),
        dict(kl_coef="x"),
        dict(kl_coef=float("nan")),
        dict(metrics=[1]),
        dict(metrics=["1", "digest"]),
        dict(metrics=3),
    ],
)
def test_a_checkpoint_with_an_invalid_state_is_skipped_with_a_warning(
    change, reward_run, uninterrupted_policy_run, tmp_path, capsys
):
    """Its checksum is valid, so somebody made it; the one before it serves."""
    shutil.copytree(uninterrupted_policy_run, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    meta, states = checkpoint.load_checkpoint(newest, "policy")
    checkpoint.save_checkpoint(newest, "policy", {**meta, **change}, states)
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert f"warning: {newest}: its step or its state is not valid" in capsys.readouterr().out
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


@pytest.mark.parametrize("error", [tiny.Killed, UserError])
def test_a_reward_run_that_ends_in_its_evaluation_loses_nothing(
    error, inputs, uninterrupted_reward_run, tmp_path, monkeypatch
):
    """reward.pt was saved after the evaluation, so an error there lost hours of training."""

    def failing(*arguments):
        raise error("gold() failed")

    with monkeypatch.context() as patch:
        patch.setattr(train_reward, "evaluate_reward_model", failing)
        with pytest.raises(error):
            train_reward.main(reward_settings(inputs, tmp_path / "run"))
    saved = uninterrupted_reward_run / "reward.pt"
    assert_same_weights(tmp_path / "run" / "reward.pt", saved, "reward")
    assert resume(train_reward.main, RewardConfig, tmp_path / "run") == 0
    assert_same_reward_run(tmp_path / "run", uninterrupted_reward_run)


def test_a_checkpoint_that_does_not_fit_is_one_line(reward_run, tmp_path, monkeypatch, capsys):
    """Such a file was made by hand: it names this run, has a valid checksum, and lacks tensors."""
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert start_policy_run(reward_run, tmp_path / "run") == 130
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    meta, states = checkpoint.load_checkpoint(path, "policy")
    for broken in (
        {},
        dict(states, model={}),
        dict(states, optimizer={}),
        dict(states, optimizer=3),
        with_moments(states, exp_avg=torch.zeros(3)),
        with_moments(states, exp_avg_sq=torch.zeros(())),
        with_moments(states, step=torch.zeros(2)),
        with_moments(states, exp_avg=[0.0]),
    ):
        checkpoint.save_checkpoint(path, "policy", meta, broken)
        assert "does not fit" in refused(
            capsys,
            train_policy.main,
            PolicyConfig,
            ["--out", str(tmp_path / "run"), "--resume", *tiny.MODULES],
        )


def test_a_file_name_in_the_run_folder_cannot_reach_the_terminal(
    reward_run, tmp_path, monkeypatch, capsys
):
    """Names of files may come from another person: control characters are escaped."""
    run = tmp_path / "run\x1b[2J"
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert start_policy_run(reward_run, run) == 130
    output = capsys.readouterr()
    assert "run folder: " in output.out and "run\\x1b[2J" in output.out
    assert "run\\x1b[2J' --resume" in output.err
    assert "\x1b" not in output.out + output.err
    newest = max((run / "checkpoints").iterdir())
    newest.write_bytes(b"")
    assert resume(train_policy.main, PolicyConfig, run) == 0
    output = capsys.readouterr()
    assert f"run\\x1b[2J/checkpoints/{newest.name}: incomplete" in output.out
    assert "\x1b" not in output.out + output.err


@pytest.mark.parametrize("number", [2, 4, 6])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before_it(
    number, reward_run, uninterrupted_policy_run, tmp_path, monkeypatch, capsys
):
    """The number-th file to be written does not fit; once there is room, the run can be resumed."""
    fsync = os.fsync
    written = []

    def fill(file):
        written.append(file)
        if len(written) >= 2 * number:  # a file, then its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fill)
    flags = as_flags(policy_settings(reward_run, tmp_path / "run", save_every=1))
    message = refused(capsys, train_policy.main, PolicyConfig, flags)
    assert "No space left on device" in message
    monkeypatch.setattr(os, "fsync", fsync)
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


# ---- extended, or changed ------------------------------------------------------------------------


def test_a_finished_run_can_be_extended_and_reports_the_new_schedule(
    reward_run, uninterrupted_policy_run, tmp_path, capsys
):
    """Its first steps had the learning rates of a shorter run, so its results differ.

    From then on the new number of iterations is the run's own.
    """
    assert start_policy_run(reward_run, tmp_path / "run", iterations=2) == 0
    before = rows(tmp_path / "run" / "policy_metrics.jsonl")
    capsys.readouterr()
    flags = ["--iterations", str(POLICY_STEPS)]
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run", *flags) == 0
    assert f"new schedule: iterations 2 -> {POLICY_STEPS}" in capsys.readouterr().out
    after = rows(tmp_path / "run" / "policy_metrics.jsonl")
    assert after[:3] == before and [row["step"] for row in after] == [0, 1, 2, 3, 4]
    assert after[3]["lr"] == rows(uninterrupted_policy_run / "policy_metrics.jsonl")[3]["lr"]
    capsys.readouterr()
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert "new schedule" not in capsys.readouterr().out
    assert rows(tmp_path / "run" / "policy_metrics.jsonl") == after


def test_a_reward_run_can_be_extended(inputs, tmp_path, capsys):
    """More --epochs: the second pass starts where the first ended."""
    assert start_reward_run(inputs, tmp_path / "run") == 0
    before = rows(tmp_path / "run" / "reward_metrics.jsonl")[:-1]
    capsys.readouterr()
    assert resume(train_reward.main, RewardConfig, tmp_path / "run", "--epochs", "2") == 0
    assert "new schedule: epochs 1 -> 2" in capsys.readouterr().out
    after = rows(tmp_path / "run" / "reward_metrics.jsonl")
    assert after[: len(before)] == before and [row["stage"] for row in after].count("reward") == 8


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr", "0.02"],
        ["--seed", "1"],
        ["--algorithm", "gae"],
        ["--batch-size", "4"],
        ["--micro-batch-size", "3"],
        ["--prompts", "x"],
        ["--no-lr-decay"],
    ],
)
def test_a_changed_setting_is_refused(flags, uninterrupted_policy_run, capsys):
    """A run with two learning rates could not be repeated; the folder stays as it was."""
    before = contents(uninterrupted_policy_run)
    arguments = ["--out", str(uninterrupted_policy_run), "--resume", *tiny.MODULES, *flags]
    message = refused(capsys, train_policy.main, PolicyConfig, arguments)
    name = flags[0].strip("-").replace("-", "_").removeprefix("no_")
    assert name in message or flags[0] == "--prompts"
    assert contents(uninterrupted_policy_run) == before


def test_settings_that_affect_no_result_may_change(
    reward_run, uninterrupted_policy_run, tmp_path, monkeypatch
):
    """For example, how often a checkpoint is saved."""
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert start_policy_run(reward_run, tmp_path / "run") == 130
    flags = [
        "--save-every",
        "1",
        "--keep-checkpoints",
        "1",
        "--device",
        "cpu" if torch.cuda.is_available() else "auto",
    ]
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run", *flags) == 0
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def change(path):
    """Another content of the same kind: of a model, a tokenizer or a file of records."""
    if path.suffix == ".pt":
        kind = "reward" if path.stem == "reward" else "base"
        meta, states = checkpoint.load_checkpoint(path, kind)
        states["model"]["wte.weight"][0, 0] += 1
        checkpoint.save_checkpoint(path, kind, meta, states)
    elif path.suffix == ".tiktoken":
        first, second, *rest = path.read_text().splitlines()
        lines = [second.split()[0] + " 0", first.split()[0] + " 1", *rest]
        path.write_text("\n".join(lines))
    else:
        content = path.read_bytes()
        path.write_bytes(content + content.splitlines(keepends=True)[0])


def assert_refused_if_changed(path, capsys, *script):
    content = path.read_bytes()
    change(path)
    message = refused(capsys, *script)
    assert message.startswith(f"error: {path}: ") and "changed" in message
    path.write_bytes(content)


def test_changed_inputs_are_refused(tmp_path, monkeypatch, capsys):
    """If one of its files is replaced, the rest of the run would be another run."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a 1:"}\n{"prompt": "b 1:"}\n')
    tiny.write_inputs(tmp_path)
    reward = tmp_path / "reward"
    assert start_reward_run(tmp_path, reward) == 0
    after_row(monkeypatch, 2, tiny.write_and_signal())
    assert start_policy_run(reward, tmp_path / "run", prompts=str(prompts)) == 130
    script = (
        train_policy.main,
        PolicyConfig,
        ["--out", str(tmp_path / "run"), "--resume", *tiny.MODULES],
    )
    data = tmp_path / "pairs.jsonl", tmp_path / "bytes.tiktoken"
    for path in (prompts, *data, reward / "reward.pt", reward / "base.pt"):
        assert_refused_if_changed(path, capsys, *script)
    assert ending(*script) == 0


@pytest.mark.parametrize("name", ["init", "init_reward"])
def test_changed_inputs_of_a_reward_run_are_refused(
    name, reward_run, tmp_path, monkeypatch, capsys
):
    """Also the files of the model that it started from, and the tokenizer."""
    tiny.write_inputs(tmp_path)
    shutil.copytree(reward_run, tmp_path / "first")
    start = tmp_path / "first" / ("base.pt" if name == "init" else "reward.pt")
    after_row(monkeypatch, 2, tiny.write_and_signal())
    assert start_reward_run(tmp_path, tmp_path / "run", **{name: str(start)}) == 130
    script = (
        train_reward.main,
        RewardConfig,
        ["--out", str(tmp_path / "run"), "--resume", *tiny.MODULES],
    )
    for path in (tmp_path / "pairs.jsonl", start, tmp_path / "first" / "base.pt"):
        assert_refused_if_changed(path, capsys, *script)
    (tmp_path / "more.jsonl").write_text('{"prompt": "a 9:", "chosen": "aa", "rejected": "b"}\n')
    message = refused(
        capsys, *script[:2], [*script[2], "--test-data", str(tmp_path / "more.jsonl")]
    )
    assert "more.jsonl: not the file" in message
    assert ending(*script) == 0


def test_a_changed_tokenizer_of_a_reward_run_is_refused(tmp_path, monkeypatch, capsys):
    """The texts would get other ids from the stop on."""
    tiny.write_inputs(tmp_path)
    after_row(monkeypatch, 2, tiny.write_and_signal())
    assert start_reward_run(tmp_path, tmp_path / "run") == 130
    script = (
        train_reward.main,
        RewardConfig,
        ["--out", str(tmp_path / "run"), "--resume", *tiny.MODULES],
    )
    assert_refused_if_changed(tmp_path / "bytes.tiktoken", capsys, *script)
    assert ending(*script) == 0


def test_a_policy_run_refuses_files_that_changed_after_the_reward_run(tmp_path, capsys):
    """Otherwise test prompts could be among those that the reward model was trained on."""
    tiny.write_inputs(tmp_path)
    assert start_reward_run(tmp_path, tmp_path / "reward") == 0
    flags = as_flags(policy_settings(tmp_path / "reward", tmp_path / "run"))
    for name in ("pairs.jsonl", "bytes.tiktoken"):
        assert_refused_if_changed(tmp_path / name, capsys, train_policy.main, PolicyConfig, flags)
    assert not (tmp_path / "run").exists()


def test_a_reward_run_resumes_with_moved_files(
    uninterrupted_reward_run, tmp_path, monkeypatch, capsys
):
    """A file is known by its content: it may get another name, and so may the run folder."""
    tiny.write_inputs(tmp_path)
    after_row(monkeypatch, 5, tiny.write_and_signal())
    assert start_reward_run(tmp_path, tmp_path / "runs" / "reward") == 130
    (tmp_path / "runs").rename(tmp_path / "archive")
    (tmp_path / "pairs.jsonl").rename(tmp_path / "renamed.jsonl")
    (tmp_path / "bytes.tiktoken").rename(tmp_path / "renamed.tiktoken")
    flags = ["--data", str(tmp_path / "renamed.jsonl")]
    flags += ["--tokenizer", str(tmp_path / "renamed.tiktoken")]
    folder = tmp_path / "archive" / "reward"
    assert resume(train_reward.main, RewardConfig, folder, *flags) == 0
    assert "resuming after step" in capsys.readouterr().out
    assert_same_reward_run(folder, uninterrupted_reward_run)
    assert resume(train_reward.main, RewardConfig, folder) == 0  # the new names are recorded


@pytest.mark.parametrize("flags", [[], ["--reward-run", "./archive/reward"]])
def test_a_policy_run_resumes_in_a_renamed_folder_of_runs(
    flags, reward_run, uninterrupted_policy_run, tmp_path, monkeypatch, capsys
):
    """The reward run has moved too, and lies next to the policy run as before."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reward_run, "runs/reward")
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert start_policy_run("runs/reward", "runs/policy") == 130
    os.rename("runs", "archive")
    assert resume(train_policy.main, PolicyConfig, "archive/policy", *flags) == 0
    assert "resuming after step" in capsys.readouterr().out
    assert_same_policy_run(tmp_path / "archive" / "policy", uninterrupted_policy_run)
    assert_refused_if_changed(
        tmp_path / "archive" / "reward" / "reward.pt",
        capsys,
        train_policy.main,
        PolicyConfig,
        ["--out", str(tmp_path / "archive/policy"), "--resume", *tiny.MODULES]
        + ["--reward-run", str(tmp_path / "archive/reward")],
    )


def test_another_reward_run_with_the_same_base_model_is_refused(
    reward_run, tmp_path, monkeypatch, capsys
):
    """With a reward function only base.pt is read, but the settings count too: here the test task.

    The same folder under another name is accepted.
    """
    shutil.copytree(reward_run, tmp_path / "copy")
    after_row(monkeypatch, 2, tiny.write_and_signal())
    reward = dict(reward="tiny:letters_right")
    assert start_policy_run(reward_run, tmp_path / "run", **reward) == 130
    stored = read_config(RewardConfig, reward_run / "config.json")
    sizes = {name: getattr(RewardConfig, name) for name in ("n_layer", "n_head", "d_model")}
    start = dict(init=str(reward_run / "base.pt"), **sizes)
    other = dataclasses.replace(stored, max_prompt_length=5, **start)
    train_reward.main(dataclasses.replace(other, out=str(tmp_path / "other")))
    flags = ["--out", str(tmp_path / "run"), "--resume", *tiny.MODULES]
    flags += ["--reward", "tiny:letters_right", "--reward-run", str(tmp_path / "other")]
    assert "other: not the file" in refused(capsys, train_policy.main, PolicyConfig, flags)
    flags[-1] = str(tmp_path / "copy")
    assert ending(train_policy.main, PolicyConfig, flags) == 0


def test_a_users_module_may_move(reward_run, uninterrupted_policy_run, tmp_path, monkeypatch):
    """It must be named again, and then its folder does not matter, but its name does."""
    shutil.copy(tiny.__file__, tmp_path / "mine.py")
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert start_policy_run(reward_run, tmp_path / "run", task=str(tmp_path / "mine.py")) == 130
    (tmp_path / "moved").mkdir()
    (tmp_path / "mine.py").rename(tmp_path / "moved" / "mine.py")
    flags = ["--out", str(tmp_path / "run"), "--resume", "--task"]
    assert ending(train_policy.main, PolicyConfig, [*flags, "tiny"]) == 2
    file = str(tmp_path / "moved" / "mine.py")
    assert ending(train_policy.main, PolicyConfig, [*flags, file]) == 0
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


def test_changed_code_of_the_user_is_reported(reward_run, tmp_path, monkeypatch, capsys):
    """A corrected function may resume a run, so this is no error."""
    code = tmp_path / "mine.py"
    shutil.copy(tiny.__file__, code)
    after_row(monkeypatch, 3, tiny.write_and_signal())
    reward = f"{code}:letters_right"
    assert start_policy_run(reward_run, tmp_path / "run", reward=reward) == 130
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    for name, warnings in (("same", 0), ("run", 1)):
        capsys.readouterr()
        flags = "--reward", reward
        assert resume(train_policy.main, PolicyConfig, tmp_path / name, *flags) == 0
        lines = [line for line in capsys.readouterr().out.split("\n") if "warning" in line]
        assert len(lines) == warnings
        assert all(line.count("mine.py ") == 2 for line in lines)
        code.write_bytes(code.read_bytes() + b"\n")


def test_shipped_files_are_found_after_the_checkout_has_moved(tmp_path):
    """A run of --preset debug records their paths."""
    path = "/old/checkout/data/helpdesk-validation.jsonl"
    assert in_this_checkout(path) == str(tiny.ROOT / "data" / "helpdesk-validation.jsonl")
    for other in ("/old/checkout/data/mine.jsonl", "/old/helpdesk-validation.jsonl"):
        assert in_this_checkout(other) == other


def test_another_torch_or_number_of_threads_is_reported(
    reward_run, uninterrupted_policy_run, tmp_path, monkeypatch, capsys
):
    """Sums in another order have other last digits, so the result may differ."""
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert start_policy_run(reward_run, tmp_path / "run") == 130
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    version = torch.__version__
    monkeypatch.setattr(torch, "__version__", "9.9")
    torch.set_num_threads(2)
    capsys.readouterr()
    try:
        assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    finally:
        torch.set_num_threads(1)
    (warning,) = [line for line in capsys.readouterr().out.split("\n") if "warning" in line]
    assert f"saved with torch {version}, 1 threads" in warning
    assert "resumed with torch 9.9, 2 threads" in warning
    monkeypatch.setattr(torch, "__version__", version)
    assert resume(train_policy.main, PolicyConfig, tmp_path / "same") == 0
    assert "warning" not in capsys.readouterr().out
    assert_same_policy_run(tmp_path / "same", uninterrupted_policy_run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert environment("auto").endswith(", A GPU")
    assert environment("cpu").endswith(f", {torch.backends.cpu.get_cpu_capability()}")


def test_a_preset_cannot_change_a_resumed_run(uninterrupted_policy_run, capsys):
    """It was ignored, although its settings are others than those of the run."""
    before = contents(uninterrupted_policy_run)
    arguments = ["--out", str(uninterrupted_policy_run), "--resume", "--preset", "debug"]
    assert "no --preset" in refused(capsys, train_policy.main, PolicyConfig, arguments)
    assert contents(uninterrupted_policy_run) == before


def test_the_newest_reward_run_is_the_one_that_ended_last(inputs, tmp_path, monkeypatch):
    """A copy of an older run has new files, but the time that the run recorded."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished reward run under runs/"):
        pick_reward_run(PolicyConfig())
    for name in ("z-first", "second"):
        assert start_reward_run(inputs, f"runs/{name}") == 0
    for name in ("z-copy", "a-copy"):
        shutil.copytree("runs/z-first", f"runs/{name}", copy_function=shutil.copyfile)
    shutil.copytree("runs/second", "runs/unfinished")
    path = tmp_path / "runs" / "unfinished" / "reward_metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert str(pick_reward_run(PolicyConfig())) == "runs/second"


def test_a_resumed_run_keeps_its_reward_model(
    inputs, reward_run, uninterrupted_policy_run, tmp_path, monkeypatch
):
    """Without --reward-run a new run uses the newest reward run; later there may be a newer one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(reward_run)
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert start_policy_run("", "run") == 130
    assert start_reward_run(inputs, "runs/second") == 0
    assert resume(train_policy.main, PolicyConfig, "run") == 0
    assert_same_policy_run(tmp_path / "run", uninterrupted_policy_run)


@pytest.mark.parametrize("name", ["uninterrupted_reward_run", "uninterrupted_policy_run"])
def test_a_damaged_config_file_is_refused(name, request, tmp_path, capsys):
    """With another digit in the learning rate it would be another run."""
    folder = request.getfixturevalue(name)
    if "reward" in name:
        main, config_class = train_reward.main, RewardConfig
    else:
        main, config_class = train_policy.main, PolicyConfig
    path = folder / "config.json"
    content = path.read_bytes()
    before = contents(folder)
    arguments = ["--out", str(folder), "--resume", *tiny.MODULES]
    try:
        for old, new in (
            (b'"seed": 0', b'"seed": 1'),
            (b'"lr": 0.01', b'"lr": 0.03'),
            (b'"facts"', b'"fact_"'),
            (b'"settings"', b'"settingz"'),
            (b'"max_grad_norm"', b'"max_grad_norn"'),
            (b"{", b"["),
        ):
            assert old in content
            path.write_bytes(content.replace(old, new, 1))
            assert "config.json" in refused(capsys, main, config_class, arguments)
    finally:
        path.write_bytes(content)
    assert contents(folder) == before


# ---- one writer ----------------------------------------------------------------------------------


def test_a_second_process_on_one_folder_is_refused(reward_run, tmp_path):
    """Two processes that write the same metrics and checkpoints would damage both runs."""
    config = policy_settings(reward_run, tmp_path / "run")
    messages = []

    def score(prompts, responses):
        if not messages:  # while the run is in its first rollout
            for resume in (True, False):
                with pytest.raises(UserError) as error:
                    train_policy.main(dataclasses.replace(config, resume=resume), score)
                messages.append(str(error.value))
        return tiny.letters_right(prompts, responses)

    train_policy.main(config, reward_function=score)
    assert "another process is running there" in messages[0]
    assert "already exists" in messages[1]
    steps = [row["step"] for row in rows(tmp_path / "run" / "policy_metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4]


def test_only_one_of_two_new_runs_gets_an_empty_folder(tmp_path):
    """Both processes find it empty; the lock decides."""
    config = PolicyConfig(out=str(tmp_path))
    first = lock_file(tmp_path / ".lock", "another process")
    with pytest.raises(UserError, match="another process"):
        open_folder(config, "name", {})
    first.close()
    open_folder(config, "name", {})[1].close()


def test_the_settings_in_the_folder_are_those_of_the_run(uninterrupted_policy_run, reward_run):
    """config.json holds the whole configuration, so the folder describes its run completely."""
    stored = json.loads((uninterrupted_policy_run / "config.json").read_text())
    expected = dataclasses.asdict(policy_settings(reward_run, uninterrupted_policy_run))
    assert stored["settings"] == json.loads(json.dumps(expected))  # lists for tuples
    assert {name: fact.rpartition("/")[2] for name, fact in stored["facts"].items()} == {
        "data 1": "pairs.jsonl",
        "tokenizer": "bytes.tiktoken",
        "base model 1": "base.pt",
        "reward model 1": "reward.pt",
        "reward run": "reward",
    }
