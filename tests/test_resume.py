"""A run that was stopped, killed or extended goes on as if nothing had happened, bit for bit."""

import dataclasses
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from tiny import after_row, as_flags, assert_same_weights, contents, ending, policy_config, refused, reward_config, rows

import train_policy
import train_reward
from minirlhf import checkpoint
from minirlhf import run as run_module
from minirlhf.config import PolicyConfig, RewardConfig, UserError, run_script
from minirlhf.run import StopSignal

REWARD_ROWS, POLICY_ROWS = 7, 4  # of a whole run, the closing test row of the first and the opening one of the second apart


def reward_settings(inputs, out, **changes):
    return reward_config(inputs, out, **{**dict(save_every=2), **changes})


def policy_settings(reward_run, out, **changes):
    """Adaptive KL, evaluations, several epochs of minibatches: everything that has a state or draws random numbers."""
    settings = dict(iterations=POLICY_ROWS, kl_target=0.01, kl_horizon=20, eval_every=2, save_every=2, best_of_n=2)
    return policy_config(reward_run, out, **{**settings, **changes})


@pytest.fixture(scope="module")
def whole_reward_run(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "reward"
    train_reward.main(reward_settings(inputs, folder))
    return folder


@pytest.fixture(scope="module")
def whole_policy_run(reward_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "policy"
    train_policy.main(policy_settings(reward_run, folder))
    return folder


def assert_same_reward_run(folder, whole):
    assert_same_weights(folder / "base.pt", whole / "base.pt", "base")
    assert_same_weights(folder / "reward.pt", whole / "reward.pt", "reward")
    assert rows(folder / "reward_metrics.jsonl") == rows(whole / "reward_metrics.jsonl")


def assert_same_policy_run(folder, whole):
    assert_same_weights(folder / "policy.pt", whole / "policy.pt", "policy")
    assert rows(folder / "policy_metrics.jsonl") == rows(whole / "policy_metrics.jsonl")
    for name in ("samples.md", "result.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def begin_reward_run(inputs, folder, **changes):
    return ending(train_reward.main, RewardConfig, as_flags(reward_settings(inputs, folder, **changes)))


def begin_policy_run(reward_run, folder, **changes):
    return ending(train_policy.main, PolicyConfig, as_flags(policy_settings(reward_run, folder, **changes)))


def resume(main, config_class, folder, *more):
    return ending(main, config_class, ["--out", str(folder), "--resume", *more])


# ---- stopped ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, REWARD_ROWS + 1))
def test_a_reward_run_stopped_after_any_step_goes_on_bit_for_bit(step, inputs, whole_reward_run, tmp_path, monkeypatch, capsys):
    """Optimiser moments, data order or schedule left out of a checkpoint: the loss jumps a little, and nobody notices."""
    after_row(monkeypatch, step, tiny.write_and_signal(signal.SIGINT))
    assert begin_reward_run(inputs, tmp_path / "run") == 130
    output = capsys.readouterr()
    assert output.err.splitlines()[-1] == f"error: stopped; go on with: python train_reward.py --out {tmp_path / 'run'} --resume"
    assert len(rows(tmp_path / "run" / "reward_metrics.jsonl")) == step  # it stopped after its step
    assert resume(train_reward.main, RewardConfig, tmp_path / "run") == 0
    assert_same_reward_run(tmp_path / "run", whole_reward_run)


@pytest.mark.parametrize("step", range(1, POLICY_ROWS + 1))
def test_a_policy_run_stopped_after_any_step_goes_on_bit_for_bit(step, reward_run, whole_policy_run, tmp_path, monkeypatch,
                                                                 capsys):
    """The same for the policy: weights, moments, random numbers, prompt order, and the adaptive KL coefficient."""
    coefficients = [row["kl_coef"] for row in rows(whole_policy_run / "policy_metrics.jsonl")[1:]]
    assert len(set(coefficients)) == POLICY_ROWS  # else the test could not see it lost
    after_row(monkeypatch, step + 1, tiny.write_and_signal(signal.SIGTERM))
    assert begin_policy_run(reward_run, tmp_path / "run") == 143
    output = capsys.readouterr()
    assert output.err.splitlines()[-1] == f"error: stopped; go on with: python train_policy.py --out {tmp_path / 'run'} --resume"
    assert [row["step"] for row in rows(tmp_path / "run" / "policy_metrics.jsonl")] == list(range(step + 1))
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", whole_policy_run)


@pytest.mark.parametrize("algorithm", ["reinforce", "rloo", "grpo"])
def test_other_rungs_resume_too(algorithm, reward_run, tmp_path, monkeypatch):
    """Grouped prompts and rungs without minibatches take other paths through the loop."""
    assert begin_policy_run(reward_run, tmp_path / "whole", algorithm=algorithm, best_of_n=0) == 0
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert begin_policy_run(reward_run, tmp_path / "run", algorithm=algorithm, best_of_n=0) == 130
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", tmp_path / "whole")


def test_a_folder_with_blanks_is_quoted_in_the_command_that_resumes(reward_run, tmp_path, monkeypatch, capsys):
    """The command is there to be pasted."""
    folder = tmp_path / "my run's folder"
    after_row(monkeypatch, 2, tiny.write_and_signal())
    assert begin_policy_run(reward_run, folder) == 130
    command = capsys.readouterr().err.splitlines()[-1].partition("go on with: ")[2]
    assert shlex.split(command)[2:] == ["--out", str(folder), "--resume"]


def test_a_second_signal_stops_at_once():
    """After the first, the signals must have their old meaning, or a step that hangs can only be killed."""
    stop = StopSignal("train_policy.py")
    stop.stepping = True
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_comes_while_processes_agree_is_heeded_at_the_next_step(monkeypatch):
    """What they agree on was asked before it came; forgotten, it would leave a run that no second Ctrl-C ends in order."""
    stop, taken = StopSignal("train_policy.py"), []

    def interrupted(number):
        if taken == [0]:
            os.kill(os.getpid(), signal.SIGINT)
        return number

    monkeypatch.setattr(run_module, "agreed", interrupted)

    def train():
        for step in stop.steps(0, 5):
            taken.append(step)
            stop.now()

    with pytest.raises(SystemExit) as ended:
        train()
    assert ended.value.code == 130 and taken == [0, 1]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("script, where", [(train_policy, "closing_table"), (train_policy, "Referee"),
                                           (train_policy, "save_model"),
                                           (train_reward, "normalise_scores"), (train_reward, "evaluate_reward_model")])
def test_a_signal_between_the_stages_stops_at_once(script, where, number, status, inputs, reward_run, whole_reward_run,
                                                   whole_policy_run, tmp_path, monkeypatch, capsys):
    """The closing table takes minutes; everything it needs is saved, so nobody has to wait for it, or to lose by it."""
    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        pytest.fail("went on")

    begin, source, config_class = ((begin_policy_run, reward_run, PolicyConfig) if script is train_policy else
                                   (begin_reward_run, inputs, RewardConfig))
    with monkeypatch.context() as patch:
        patch.setattr(script, where, interrupted)
        assert begin(source, tmp_path / "run") == status
    wanted = f"error: stopped; go on with: python {script.__name__}.py --out {tmp_path / 'run'} --resume\n"
    assert capsys.readouterr().err == wanted
    assert resume(script.main, config_class, tmp_path / "run") == 0
    if script is train_policy:
        assert_same_policy_run(tmp_path / "run", whole_policy_run)
    else:
        assert_same_reward_run(tmp_path / "run", whole_reward_run)


def test_a_signal_while_the_data_is_read_leaves_nothing_behind(inputs, tmp_path, monkeypatch, capsys):
    """There is no folder yet in which to go on."""
    monkeypatch.setattr(train_reward, "load_splits", lambda config: os.kill(os.getpid(), signal.SIGINT))
    assert begin_reward_run(inputs, tmp_path / "run") == 130
    assert capsys.readouterr().err == "error: stopped; nothing was begun\n" and not (tmp_path / "run").exists()


def test_a_signal_during_an_evaluation_lets_the_step_end(reward_run, whole_policy_run, tmp_path, monkeypatch, capsys):
    """An evaluation within the loop belongs to its step: its row is written, its checkpoint saved."""
    judge = train_policy.Referee.judge

    def interrupted(referee, policy):
        os.kill(os.getpid(), signal.SIGINT)
        return judge(referee, policy)

    with monkeypatch.context() as patch:
        patch.setattr(train_policy.Referee, "judge", interrupted)
        assert begin_policy_run(reward_run, tmp_path / "run") == 130
    assert "stopping after this step" in capsys.readouterr().err
    assert [row["step"] for row in rows(tmp_path / "run" / "policy_metrics.jsonl")] == [0, 1, 2]
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", whole_policy_run)


SLOW_REWARD = '''
import time
from tiny import letters_right

calls = []

def score(prompts, responses):
    """Hangs at its third call, the first of the training: the base model is judged before."""
    calls.append(1)
    if len(calls) == 3:
        print("hanging", flush=True)
        time.sleep(600)
    return letters_right(prompts, responses)
'''


def test_a_second_ctrl_c_stops_a_step_that_hangs(reward_run, tmp_path):
    """A reward function that waits for a server for ever must not need kill -9."""
    (tmp_path / "slow.py").write_text(SLOW_REWARD)
    flags = as_flags(policy_settings(reward_run, "run", reward="slow:score"))
    process = subprocess.Popen([sys.executable, str(tiny.ROOT / "train_policy.py"), *flags], cwd=tmp_path, env=tiny.environment(),
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert any(line == "hanging\n" for line in process.stdout), process.stderr.read()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() + process.stderr.readline() == "\nstopping after this step (once more: at once)\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
    process.stdout.close()
    process.stderr.close()


# ---- killed ----------------------------------------------------------------------------------------------------------


def killed(main, config_class, arguments):
    """True if the run died; run_script and the run itself must let such a death pass."""
    try:
        run_script(main, config_class, arguments)
    except tiny.Killed:
        return True
    return False


@pytest.mark.parametrize("row", range(1, REWARD_ROWS + 2))
def test_a_reward_run_killed_within_any_step_goes_on_bit_for_bit(row, inputs, whole_reward_run, tmp_path, monkeypatch):
    """The steps after the last checkpoint are done again: their rows, the torn one among them, must not stay."""
    after_row(monkeypatch, row, tiny.tear_and_die)
    assert killed(train_reward.main, RewardConfig, as_flags(reward_settings(inputs, tmp_path / "run")))
    assert resume(train_reward.main, RewardConfig, tmp_path / "run") == 0
    assert_same_reward_run(tmp_path / "run", whole_reward_run)


@pytest.mark.parametrize("row", range(1, POLICY_ROWS + 2))
def test_a_policy_run_killed_within_any_step_goes_on_bit_for_bit(row, reward_run, whole_policy_run, tmp_path, monkeypatch):
    """Before the first checkpoint too: then the run begins again, and its first row must not be there twice."""
    after_row(monkeypatch, row, tiny.tear_and_die)
    assert killed(train_policy.main, PolicyConfig, as_flags(policy_settings(reward_run, tmp_path / "run")))
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", whole_policy_run)


def test_a_run_killed_before_its_config_file_begins_again(reward_run, whole_policy_run, tmp_path):
    """A folder with a lock in it and nothing else could be neither resumed nor begun."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.json.partial").write_bytes(b'{"settings')
    assert begin_policy_run(reward_run, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", whole_policy_run)


def test_resuming_a_finished_run_changes_nothing(inputs, reward_run, whole_reward_run, whole_policy_run, tmp_path):
    """A job queue that restarts everything must not add rows to what is done."""
    assert begin_reward_run(inputs, tmp_path / "reward") == begin_policy_run(reward_run, tmp_path / "policy") == 0
    for _ in range(2):
        assert resume(train_reward.main, RewardConfig, tmp_path / "reward") == 0
        assert resume(train_policy.main, PolicyConfig, tmp_path / "policy") == 0
    assert_same_reward_run(tmp_path / "reward", whole_reward_run)
    assert_same_policy_run(tmp_path / "policy", whole_policy_run)


INTERRUPTING = '''
import os, signal
from tiny import letters_right

def score(prompts, responses):
    """Dies in the third iteration, is told to stop in the third of its second life, then lives on."""
    with open("calls", "a") as file:
        file.write("x")
    calls = os.path.getsize("calls")
    if calls == 9:
        os._exit(9)
    if calls == 12:
        os.kill(os.getpid(), signal.SIGTERM)
    return letters_right(prompts, responses)
'''


def test_real_processes_that_die_and_are_told_to_stop_go_on_bit_for_bit(reward_run, tmp_path, monkeypatch):
    """The lock of a dead process must not hold, and the status and the command that the shell sees must be right."""
    (tmp_path / "interrupting.py").write_text(INTERRUPTING)
    flags = as_flags(policy_settings(reward_run, "run", reward="interrupting:score", save_every=1, eval_every=1))

    def python(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=tiny.environment(), text=True, capture_output=True)

    script = str(tiny.ROOT / "train_policy.py")
    first = python(script, *flags)
    assert first.returncode == 9, first.stderr
    second = python(script, "--out", "run", "--resume")
    assert second.returncode == 143, second.stderr
    assert second.stderr.splitlines() == ["", "stopping after this step (once more: at once)",
                                          f"error: stopped; go on with: python {script} --out run --resume"]  # from here
    third = python(script, *shlex.split(second.stderr.splitlines()[-1].partition("train_policy.py ")[2]))
    assert (third.returncode, third.stderr) == (0, "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert begin_policy_run(reward_run, "whole", reward="interrupting:score", save_every=1, eval_every=1) == 0
    assert_same_policy_run(tmp_path / "run", tmp_path / "whole")


# ---- damaged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda content: content[:-7], lambda content: content[:100], lambda content: b"",
                                    lambda content: content[:900] + b"\xff" + content[901:]])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(damage, reward_run, whole_policy_run, tmp_path, monkeypatch,
                                                                  capsys):
    """Named, passed over, and the steps since the older one done again: the end is the same."""
    after_row(monkeypatch, 4, tiny.write_and_signal())
    assert begin_policy_run(reward_run, tmp_path / "run", save_every=1) == 130
    newest = tmp_path / "run" / "checkpoints" / "policy-00000003.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    capsys.readouterr()
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run", "--save-every", "2") == 0
    said = capsys.readouterr().out
    assert f"warning: {newest}: " in said and "iteration 3/4" in said and "iteration 2/4" not in said
    assert_same_policy_run(tmp_path / "run", whole_policy_run)


def test_with_no_checkpoint_left_a_run_begins_again(reward_run, whole_policy_run, tmp_path, monkeypatch):
    """All checkpoints torn: the same run from its first step, into the same folder."""
    after_row(monkeypatch, 4, tiny.write_and_signal())
    assert begin_policy_run(reward_run, tmp_path / "run") == 130
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"torn")
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert_same_policy_run(tmp_path / "run", whole_policy_run)


@pytest.mark.parametrize("damage", [
    *(lambda content, line=line: line + content for line in (
        b"\n", b"{\n", b'"text"\n', b"[1]\n", b"\xff\xfe\n", b'{"stage": "policy"\n', b"[" * 50_000 + b"\n")),
    lambda content: content.replace(b'"score": ', b'"score": 1', 1),
    lambda content: content.replace(b'"step": 2', b'"step": 3', 1),
    lambda content: content[content.index(b"\n") + 1:], lambda content: b"",
], ids=range(11))
def test_damaged_metrics_are_set_aside_and_the_run_goes_on(damage, reward_run, whole_policy_run, tmp_path, monkeypatch, capsys):
    """A flipped digit is a figure that nobody measured, and a reader of the metrics must meet no torn row and no row twice."""
    after_row(monkeypatch, 4, tiny.write_and_signal())
    assert begin_policy_run(reward_run, tmp_path / "run") == 130
    path = tmp_path / "run" / "policy_metrics.jsonl"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    capsys.readouterr()
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert f"warning: {path}: damaged, and set aside" in capsys.readouterr().out
    aside = path.with_name("policy_metrics.jsonl.damaged")
    assert aside.read_bytes() == damaged and rows(path) == rows(whole_policy_run / path.name)[4:]
    assert_same_weights(tmp_path / "run" / "policy.pt", whole_policy_run / "policy.pt", "policy")


@pytest.mark.parametrize("rest", [b"", b"{", b'{"step": 4}\n', b"\xff" * 5000 + b"\n\n"], ids=range(4))
def test_what_stands_after_the_rows_of_the_checkpoint_is_dropped(rest, reward_run, whole_policy_run, tmp_path, monkeypatch,
                                                                 capsys):
    """A crash leaves rows of steps that are done again, the last of them perhaps torn: no damage, and no word about it."""
    after_row(monkeypatch, 4, tiny.write_and_signal())
    assert begin_policy_run(reward_run, tmp_path / "run") == 130
    path = tmp_path / "run" / "policy_metrics.jsonl"
    path.write_bytes(path.read_bytes() + rest)
    capsys.readouterr()
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert "damaged" not in capsys.readouterr().out
    assert_same_policy_run(tmp_path / "run", whole_policy_run)


def test_a_checkpoint_of_another_run_is_named_and_passed_over(reward_run, whole_policy_run, tmp_path, monkeypatch, capsys):
    """Copied by hand from a run of another seed, it is whole, fits, and would make two halves of two runs one."""
    assert begin_policy_run(reward_run, tmp_path / "other", seed=1) == 0
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert begin_policy_run(reward_run, tmp_path / "run") == 130
    foreign = tmp_path / "run" / "checkpoints" / "policy-00000004.pt"
    foreign.write_bytes((tmp_path / "other" / "checkpoints" / foreign.name).read_bytes())
    capsys.readouterr()
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    assert f"warning: {foreign}: belongs to a run with other settings or data" in capsys.readouterr().out
    assert_same_policy_run(tmp_path / "run", whole_policy_run)


def test_a_warm_up_done_again_is_followed_by_the_reward_stage_again(inputs, whole_reward_run, tmp_path, monkeypatch, capsys):
    """Every checkpoint after its first step torn, those of the next stage whole: its rows would stand before the warm-up's."""
    after_row(monkeypatch, 6, tiny.write_and_signal())
    assert begin_reward_run(inputs, tmp_path / "run", save_every=1, keep_checkpoints=9) == 130
    for step in (2, 3):
        path = tmp_path / "run" / "checkpoints" / f"warmup-{step:08d}.pt"
        path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "run" / "base.pt").write_bytes(b"torn")
    capsys.readouterr()
    assert resume(train_reward.main, RewardConfig, tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert said.count("warning: ") == 2 and "going on after step 1\n" in said
    assert_same_reward_run(tmp_path / "run", whole_reward_run)


@pytest.mark.parametrize("name", ["base.pt", "reward.pt"])
def test_damaged_models_are_made_again_from_the_checkpoints(name, inputs, whole_reward_run, tmp_path, capsys):
    """The policy's script names the file and says to train again: training again must be the matter of a moment."""
    shutil.copytree(whole_reward_run, tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:-50])
    flags = as_flags(policy_settings(tmp_path / "run", tmp_path / "policy"))
    assert str(path) in refused(capsys, train_policy.main, PolicyConfig, flags)
    assert resume(train_reward.main, RewardConfig, tmp_path / "run") == 0
    assert_same_reward_run(tmp_path / "run", whole_reward_run)


def test_the_policy_does_not_learn_from_a_reward_run_whose_settings_were_changed(whole_reward_run, tmp_path, capsys):
    """One digit of the seed, and its held-out prompts are others: some of them were trained on."""
    shutil.copytree(whole_reward_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    flags = as_flags(policy_settings(tmp_path / "run", tmp_path / "policy"))
    assert "config.json: was changed or damaged" in refused(capsys, train_policy.main, PolicyConfig, flags)


def test_a_checkpoint_that_does_not_fit_is_one_line(reward_run, tmp_path, monkeypatch, capsys):
    """Made by hand for this very run, it has a right checksum and too few tensors."""
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert begin_policy_run(reward_run, tmp_path / "run") == 130
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    meta, states = checkpoint.load_checkpoint(path, "policy")
    for broken in ({}, dict(states, model={}), dict(states, optimizer={}), dict(states, optimizer=3)):
        checkpoint.save_checkpoint(path, "policy", meta, broken)
        assert "does not fit" in refused(capsys, train_policy.main, PolicyConfig, ["--out", str(tmp_path / "run"), "--resume"])


def test_a_file_name_in_the_run_folder_cannot_reach_the_terminal(reward_run, tmp_path, monkeypatch, capsys):
    """A warning names files that somebody else may have put there."""
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert begin_policy_run(reward_run, tmp_path / "run") == 130
    (tmp_path / "run" / "checkpoints" / "policy-x\x1b[2J.pt").write_bytes(b"")
    capsys.readouterr()
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0
    output = capsys.readouterr()
    assert "policy-x\\x1b[2J.pt: torn" in output.out and "\x1b" not in output.out + output.err


@pytest.mark.parametrize("number", [2, 4, 6])
def test_a_full_disk_stops_in_one_line_with_the_checkpoint_before_it_intact(number, reward_run, whole_policy_run, tmp_path,
                                                                           monkeypatch, capsys):
    """The number-th file that is written does not fit; when there is room again, the run goes on."""
    written, fsync = [], os.fsync

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
    assert_same_policy_run(tmp_path / "run", whole_policy_run)


# ---- extended, or changed --------------------------------------------------------------------------------------------


def test_a_finished_run_can_be_extended_and_says_that_the_schedule_is_new(reward_run, whole_policy_run, tmp_path, capsys):
    """The learning rate of its first steps was that of a shorter run, so it is not the run of so many iterations."""
    assert begin_policy_run(reward_run, tmp_path / "run", iterations=2) == 0
    before = rows(tmp_path / "run" / "policy_metrics.jsonl")
    capsys.readouterr()
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run", "--iterations", str(POLICY_ROWS)) == 0
    assert f"new schedule: iterations 2 -> {POLICY_ROWS}" in capsys.readouterr().out
    after = rows(tmp_path / "run" / "policy_metrics.jsonl")
    assert after[:3] == before and [row["step"] for row in after] == [0, 1, 2, 3, 4]
    assert after[3]["lr"] == rows(whole_policy_run / "policy_metrics.jsonl")[3]["lr"]
    capsys.readouterr()
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run") == 0  # the extension is what the run now is
    assert "new schedule" not in capsys.readouterr().out and rows(tmp_path / "run" / "policy_metrics.jsonl") == after


def test_a_reward_run_can_be_extended(inputs, tmp_path, capsys):
    """By epochs: the second pass goes on from the end of the first."""
    assert begin_reward_run(inputs, tmp_path / "run") == 0
    before = rows(tmp_path / "run" / "reward_metrics.jsonl")[:-1]
    capsys.readouterr()
    assert resume(train_reward.main, RewardConfig, tmp_path / "run", "--epochs", "2") == 0
    assert "new schedule: epochs 1 -> 2" in capsys.readouterr().out
    after = rows(tmp_path / "run" / "reward_metrics.jsonl")
    assert after[:len(before)] == before and [row["stage"] for row in after].count("reward") == 8


@pytest.mark.parametrize("flags", [["--lr", "0.02"], ["--seed", "1"], ["--algorithm", "gae"], ["--batch-size", "4"],
                                   ["--micro-batch-size", "3"], ["--prompts", "x"], ["--no-lr-decay"]])
def test_a_changed_setting_is_refused(flags, whole_policy_run, capsys):
    """A run half at one learning rate and half at another is a figure that nobody can repeat."""
    before = contents(whole_policy_run)
    message = refused(capsys, train_policy.main, PolicyConfig, ["--out", str(whole_policy_run), "--resume", *flags])
    assert flags[0].strip("-").replace("-", "_").removeprefix("no_") in message or flags[0] == "--prompts"
    assert contents(whole_policy_run) == before


def test_settings_that_change_no_figure_may_change(reward_run, whole_policy_run, tmp_path, monkeypatch):
    """How often to save is nobody's result."""
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert begin_policy_run(reward_run, tmp_path / "run") == 130
    flags = ["--save-every", "1", "--keep-checkpoints", "1", "--device", "cpu" if torch.cuda.is_available() else "auto"]
    assert resume(train_policy.main, PolicyConfig, tmp_path / "run", *flags) == 0
    assert_same_policy_run(tmp_path / "run", whole_policy_run)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_changed_inputs_are_refused(inputs, reward_run, tmp_path, monkeypatch, capsys):
    """Prompts, data or reward model replaced under a stopped run: it would go on as another run, without a word."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a 1:"}\n{"prompt": "b 1:"}\n')
    tiny.write_inputs(tmp_path)
    assert begin_reward_run(tmp_path, tmp_path / "reward") == 0
    after_row(monkeypatch, 2, tiny.write_and_signal())
    assert begin_policy_run(tmp_path / "reward", tmp_path / "run", prompts=str(prompts)) == 130
    arguments = ["--out", str(tmp_path / "run"), "--resume"]
    for path in (prompts, tmp_path / "pairs.jsonl", tmp_path / "reward" / "reward.pt"):
        content = path.read_bytes()
        if path.name == "reward.pt":  # a whole one, of another seed
            assert begin_reward_run(tmp_path, tmp_path / "other", seed=1) == 0
            path.write_bytes((tmp_path / "other" / "reward.pt").read_bytes())
        else:
            path.write_bytes(content + content.splitlines(keepends=True)[0])
        assert "changed" in refused(capsys, train_policy.main, PolicyConfig, arguments), path
        path.write_bytes(content)
    assert ending(train_policy.main, PolicyConfig, arguments) == 0


def test_a_changed_initial_model_is_refused(inputs, reward_run, whole_reward_run, tmp_path, capsys):
    """base.pt of another run under the same name: the reward model would go on, beside a base model it does not come from."""
    init = tmp_path / "base.pt"
    init.write_bytes((reward_run / "base.pt").read_bytes())
    assert begin_reward_run(inputs, tmp_path / "run", init=str(init)) == 0
    init.write_bytes((whole_reward_run / "base.pt").read_bytes())
    arguments = ["--out", str(tmp_path / "run"), "--resume"]
    assert "changed" in refused(capsys, train_reward.main, RewardConfig, arguments)


def test_a_run_goes_on_with_the_reward_model_it_began_with(inputs, reward_run, whole_policy_run, tmp_path, monkeypatch):
    """With no --reward-run the newest one is taken; on resuming, a newer one may be there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(reward_run)
    after_row(monkeypatch, 3, tiny.write_and_signal())
    assert begin_policy_run("", "run") == 130
    assert begin_reward_run(inputs, "runs/second") == 0
    assert resume(train_policy.main, PolicyConfig, "run") == 0
    assert_same_policy_run(tmp_path / "run", whole_policy_run)


@pytest.mark.parametrize("name", ["whole_reward_run", "whole_policy_run"])
def test_a_damaged_config_file_is_never_a_wrong_resume(name, request, tmp_path, capsys):
    """One flipped digit of the learning rate is another run; any flip must be refused, or be no change at all."""
    whole = request.getfixturevalue(name)
    main, config_class = ((train_reward.main, RewardConfig) if "reward" in name else (train_policy.main, PolicyConfig))
    path = whole / "config.json"
    content, before = path.read_bytes(), contents(whole)
    try:
        for old, new in ((b'"seed": 0', b'"seed": 1'), (b'"lr": 0.01', b'"lr": 0.03'), (b'"facts"', b'"fact_"'),
                         (b'"settings"', b'"settingz"'), (b'"max_grad_norm"', b'"max_grad_norn"'), (b"{", b"[")):
            assert old in content
            path.write_bytes(content.replace(old, new, 1))
            assert "config.json" in refused(capsys, main, config_class, ["--out", str(whole), "--resume"])
    finally:
        path.write_bytes(content)
    assert contents(whole) == before


# ---- one writer ------------------------------------------------------------------------------------------------------


def test_a_second_process_on_one_folder_is_refused(reward_run, whole_policy_run, tmp_path, capsys):
    """Two writers of one metrics file and one set of checkpoints leave neither run whole."""
    seen = []

    def score(prompts, responses):
        if not seen:  # while the run is in its first rollout
            seen.append(refused(capsys, train_policy.main, PolicyConfig, ["--out", str(tmp_path / "run"), "--resume"]))
            seen.append(refused(capsys, train_policy.main, PolicyConfig, as_flags(policy_settings(reward_run, tmp_path / "run"))))
        return tiny.letters_right(prompts, responses)

    train_policy.main(policy_settings(reward_run, tmp_path / "run"), reward_function=score)
    assert "another process is running there" in seen[0] and "exists already" in seen[1]
    assert [row["step"] for row in rows(tmp_path / "run" / "policy_metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_two_beginners_in_one_empty_folder_are_told_apart(tmp_path):
    """Both find it empty; only one of them may have it."""
    first = run_module.lock_folder(tmp_path)
    with pytest.raises(UserError, match="another process"):
        run_module.open_run(PolicyConfig(out=str(tmp_path)), "name", {})
    first.close()
    run_module.open_run(PolicyConfig(out=str(tmp_path)), "name", {}).lock.close()


def test_settings_in_the_folder_are_those_of_the_run(whole_policy_run, reward_run):
    """config.json holds the whole configuration, so that the folder alone says what was done."""
    stored = json.loads((whole_policy_run / "config.json").read_text())
    wanted = dataclasses.asdict(policy_settings(reward_run, whole_policy_run))
    assert stored["settings"] == wanted
    assert {name.rpartition("/")[2] for name in stored["facts"]["data"]} >= {"pairs.jsonl", "base.pt", "reward.pt"}
