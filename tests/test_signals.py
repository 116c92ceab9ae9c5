"""Signal handlers belong to one process and to one call of main, and imports end without noise."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import train_policy
import train_reward
from minirlhf.config import PolicyConfig
from minirlhf.lab import common
from minirlhf.run.signals import SIGNALS, StopSignal

import pytest
import tiny
from tiny import after_row, as_flags, policy_config, reward_config, rows, write_and_signal


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def is_ours(handler) -> bool:
    return isinstance(getattr(handler, "__self__", None), StopSignal)


# ---- one call of main ----------------------------------------------------------------------------


def test_main_handles_signals_and_then_restores_the_handlers(reward_run, tmp_path):
    """Afterwards Ctrl-C stops the user's notebook, not a run that has ended."""
    seen = []

    def reward(prompts, responses):
        seen.extend(handlers())
        return [0.0] * len(prompts)

    before = handlers()
    train_policy.main(policy_config(reward_run, tmp_path / "run"), reward)
    assert seen and all(map(is_ours, seen))
    assert handlers() == before


def test_handlers_are_restored_if_main_fails_or_is_stopped(reward_run, tmp_path, monkeypatch):
    before = handlers()
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr(train_policy, "describe", lambda *_: 1 / 0)
        train_policy.main(policy_config(reward_run, tmp_path / "fails"))
    assert handlers() == before
    monkeypatch.undo()
    after_row(monkeypatch, 2, write_and_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        train_policy.main(policy_config(reward_run, tmp_path / "stops"))
    assert handlers() == before


def test_main_runs_in_a_thread(inputs, tmp_path):
    """Only the main thread can handle signals, so a server could not start a run in another one."""
    failures = []

    def target():
        try:
            train_reward.main(reward_config(inputs, tmp_path / "run"))
        except BaseException as error:
            failures.append(error)

    before = handlers()
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert failures == [] and (tmp_path / "run" / "reward.pt").exists()
    assert handlers() == before


def test_a_signal_that_is_ignored_stays_ignored():
    """The command nohup relies on it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal("train_policy.py")
        stop.install()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert is_ours(signal.getsignal(signal.SIGINT))
        stop.restore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_closed_terminal_lets_the_step_end(reward_run, tmp_path, monkeypatch, capsys):
    """The shell and the terminal both send SIGHUP; the second one must not end the process."""

    def hang_up_twice(metrics, row):
        metrics.write(row)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)

    after_row(monkeypatch, 2, hang_up_twice)
    flags = as_flags(policy_config(reward_run, tmp_path / "run", iterations=4, save_every=10))
    assert tiny.ending(train_policy.main, PolicyConfig, flags) == 128 + signal.SIGHUP
    assert "resume with" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "policy-00000001.pt"
    ]


def test_the_lab_restores_its_handlers(inputs, tmp_path):
    before = handlers()
    job = common.Job("train_reward.py", reward_config(inputs, tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "start", lambda job, logs: subprocess.Popen(["false"]))
        (tmp_path / "run.txt").write_text("no")
        with pytest.raises(common.UserError):
            common.run_jobs([job], 1, tmp_path)
    assert handlers() == before


# ---- processes that a reward function starts -----------------------------------------------------

# A process of its own: a fork of pytest, which has threads after other tests, could hang.
FORKING = """
import multiprocessing, os, signal, sys, time
from minirlhf.run.signals import SIGNALS
import tiny, train_policy

FORK = multiprocessing.get_context("fork")


def handlers():
    return [str(signal.getsignal(number)) for number in SIGNALS]


def handlers_and_length(text):
    return handlers(), len(text)


def pool(prompts, responses):
    with FORK.Pool(2) as pool:
        results = pool.map(handlers_and_length, responses)
    assert all(names == before for names, _ in results)
    return [length for _, length in results]


def child(prompts, responses):
    for number, delay in [*((number, 0.05) for number in SIGNALS), *[(signal.SIGTERM, 0)] * 10]:
        process = FORK.Process(target=time.sleep, args=(60,))
        process.start()
        time.sleep(delay)
        os.kill(process.pid, number)
        process.join(5)
        # Ctrl-C is an exception in Python
        assert process.exitcode == (1 if number == signal.SIGINT else -number), (number, delay)
    return [0.0] * len(prompts)


before = handlers()
config = tiny.policy_config(sys.argv[2], sys.argv[3])
train_policy.main(config, globals()[sys.argv[1]])
"""


@pytest.mark.parametrize("reward", ["pool", "child"])
def test_a_reward_function_may_fork(reward, reward_run, tmp_path):
    """Pool.terminate sends SIGTERM. A child that ignored it would let the run hang."""
    done = subprocess.run(
        tiny.python("-c", FORKING, reward, str(reward_run), str(tmp_path / "run")),
        env=tiny.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "run" / "policy_metrics.jsonl")) == 3
    assert (tmp_path / "run" / "policy.pt").exists()
    assert "stop" not in done.stdout + done.stderr.replace("KeyboardInterrupt", "")
    assert done.stdout.count("run folder") == 1


# ---- imports -------------------------------------------------------------------------------------

COMMANDS = [
    ["train_policy.py", "--reward-run", "none"],
    ["-m", "minirlhf.tools.chat", "--run", "none"],
]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
@pytest.mark.parametrize("command", COMMANDS, ids=["script", "module"])
def test_ctrl_c_during_the_imports_ends_without_a_traceback(command):
    """They take two seconds, and then users often notice a wrong flag."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=tiny.ROOT,
        env=tiny.environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and err == ""


def test_importing_the_project_changes_no_handler():
    """It does only in the project's own programs."""
    code = "import signal, minirlhf; print(signal.getsignal(2) == signal.default_int_handler)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
