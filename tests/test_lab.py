"""The labs: their statistics against known values, and tiny runs that are stopped and resumed."""

import dataclasses
import doctest
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data import helpdesk
from minirlhf.lab import common, overoptimization, sweep, variance
from minirlhf.lab import overoptimization_page as results
from minirlhf.lab.ensemble import ensemble
from minirlhf.lab.variance_page import variance_ratio
from minirlhf.rl.reward import Reward, score_responses
from minirlhf.rl.sampling import gold_utility, sample_responses
from minirlhf.rl.task import load_task
from minirlhf.run.command_line import parse_flags
from minirlhf.run.errors import UserError

import numpy as np
import pytest
import tiny
import torch
from tiny import refused


@pytest.fixture(scope="module")
def helpdesk_runs(tmp_path_factory) -> Path:
    """A folder with a short reward run on the help desk and a policy run of two iterations."""
    folder = tmp_path_factory.mktemp("labs")
    config = sweep.SweepConfig(out=str(folder), seeds=1, quick=True, algorithms="reinforce")
    reward, policy = sweep.jobs_of(config, sweep.settings_of(config)[0], 0)
    train_reward.main(reward.config)
    train_policy.main(policy.config)
    return folder


# ---- common code ---------------------------------------------------------------------------------


def test_examples_of_the_common_code_are_true():
    assert tuple(doctest.testmod(common)) == (0, 3)  # failed, attempted


def test_flags_of_a_run_give_its_configuration(inputs, tmp_path):
    for config in (
        tiny.reward_config(inputs, tmp_path, seed=3),
        tiny.policy_config(tmp_path, "x", lr_decay=False, kl_target=6.0),
        RewardConfig(),
        PolicyConfig(tensorboard=True),
    ):
        assert type(config)(**parse_flags(type(config), common.flags_of(config))) == config


def test_stored_rows_are_not_computed_again(tmp_path):
    """Half a row, left by a kill, is computed again; results of other settings are refused."""
    path = tmp_path / "rows.jsonl"
    rows = common.Rows(path, dict(size=3))
    assert rows.get("a", lambda: dict(x=1)) == dict(key="a", x=1)
    rows.get("b", lambda: dict(x=2))
    complete = path.read_bytes()
    path.write_bytes(complete[:-4])  # killed while writing the last row
    rows = common.Rows(path, dict(size=3))
    assert rows.get("a", lambda: pytest.fail("computed again"))["x"] == 1
    rows.get("b", lambda: dict(x=2))
    assert path.read_bytes() == complete
    with pytest.raises(UserError, match=r"other settings or inputs \(size\); use another --out"):
        common.Rows(path, dict(size=4))


def test_runs_without_their_rows_are_refused(tmp_path):
    """Nothing says of which code they are: deleted rows would take old results for new ones."""
    run = tmp_path / "ppo-seed0"
    run.mkdir()
    (run / "config.json").touch()
    with pytest.raises(UserError, match="is missing, so nothing says of which code"):
        common.Rows(tmp_path / "runs.jsonl", dict(script="mine.py"))


def test_a_run_with_other_settings_is_refused(reward_run):
    config = common.read_config(RewardConfig, reward_run / "config.json")
    assert common.finished(common.Job("train_reward.py", config))
    with pytest.raises(UserError, match="--seed 0, not 1; use another folder"):
        common.finished(common.Job("train_reward.py", dataclasses.replace(config, seed=1)))


def test_a_run_stores_the_tokenizer_that_auto_stands_for(helpdesk_runs):
    config = sweep.SweepConfig(out=str(helpdesk_runs), seeds=1, quick=True, algorithms="reinforce")
    reward, policy = sweep.jobs_of(config, sweep.settings_of(config)[0], 0)
    assert reward.config.tokenizer == "auto"
    assert common.finished(reward)
    assert common.finished(policy)


def test_a_failed_run_is_reported_and_the_others_are_kept(inputs, tmp_path, monkeypatch):
    """A run that needs the failed one must not start."""
    monkeypatch.setenv("PYTHONPATH", tiny.environment()["PYTHONPATH"])
    good, bad = (
        common.Job("train_reward.py", tiny.reward_config(inputs, tmp_path / name, **changes))
        for name, changes in (("good", {}), ("bad", dict(tokenizer="no such file")))
    )
    dependent = common.Job(
        "train_policy.py", tiny.policy_config(bad.folder, tmp_path / "dependent"), bad.config.out
    )
    message = r"bad failed: .*no such file.*the other runs are kept"
    with pytest.raises(UserError, match=message):
        common.run_jobs([bad, dependent, good], 2, tmp_path / "logs")
    assert common.finished(good)
    assert not dependent.folder.exists()


def test_a_lab_names_the_command_that_creates_missing_files(capsys, tmp_path):
    lab = variance.main, variance.VarianceConfig
    assert "--reward-run is missing" in refused(capsys, *lab, [])
    line = refused(capsys, *lab, ["--reward-run", str(tmp_path / "none")])
    assert f"create it with: python train_reward.py --out {tmp_path / 'none'}" in line


def test_ctrl_c_stops_the_runs_and_prints_one_line(inputs, tmp_path, capsys, monkeypatch):
    """The run must save its state, so that it can be resumed."""
    monkeypatch.setenv("PYTHONPATH", tiny.environment()["PYTHONPATH"])
    monkeypatch.setattr(common.sys, "argv", ["lab"])
    job = common.Job(
        "train_reward.py", tiny.reward_config(inputs, tmp_path / "run", epochs=100_000)
    )
    processes = []

    def interrupted(seconds):
        if (tmp_path / "run" / "reward_metrics.jsonl").exists():
            raise KeyboardInterrupt

    start = common.start
    monkeypatch.setattr(common, "start", lambda *a: processes.append(start(*a)) or processes[0])
    monkeypatch.setattr(common.time, "sleep", interrupted)
    with pytest.raises(SystemExit, match="130"):
        common.run_lab(
            lambda config: common.run_jobs([job], 1, tmp_path / "logs"), sweep.SweepConfig
        )
    assert capsys.readouterr().err == "error: stopped; run the same command again to resume\n"
    assert processes[0].returncode == 128 + signal.SIGTERM
    assert "--resume" in common.last_line(tmp_path / "logs" / "run.txt")


# ---- the sweep -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_runs_what_is_missing_and_resumes_what_was_stopped(helpdesk_runs, capsys):
    """The same table after a run lost its end; rows of finished runs outlive their folders."""
    config = sweep.SweepConfig(
        out=str(helpdesk_runs), seeds=1, jobs=2, quick=True, algorithms="reinforce,rloo"
    )
    finished_before = (helpdesk_runs / "reinforce-seed0" / "result.json").stat().st_mtime_ns
    stored = helpdesk_runs / "runs.jsonl"
    without_rows = common.as_line(dict(about=dict(script="train_policy.py", quick=True, task={})))
    stored.write_bytes(without_rows)
    page = sweep.main(config)
    assert "`rloo`" in page
    assert (helpdesk_runs / "table.md").read_text() == page
    rows = common.read_rows(helpdesk_runs / "runs.jsonl")[1:]
    assert [row["key"] for row in rows] == ["reinforce-seed0", "rloo-seed0"]
    assert [point["samples"] for point in rows[0]["curve"]] == [0, 16]
    assert "--algorithm rloo" in rows[1]["command"]
    stored.write_bytes(without_rows)
    (helpdesk_runs / "rloo-seed0" / "result.json").unlink()  # as if stopped before the end
    sweep.main(config)
    again = common.read_rows(helpdesk_runs / "runs.jsonl")[1:]
    assert [without_times(row) for row in again] == [without_times(row) for row in rows]
    path = helpdesk_runs / "reinforce-seed0" / "result.json"
    assert path.stat().st_mtime_ns == finished_before
    shutil.rmtree(helpdesk_runs / "rloo-seed0")
    page = sweep.main(config)
    assert not (helpdesk_runs / "rloo-seed0").exists()
    with pytest.raises(UserError, match="'gould' .* is not a metric of these runs; did you mean"):
        sweep.main(dataclasses.replace(config, x="sampled_kl", y="gould"))
    with pytest.raises(UserError, match="other settings or inputs"):
        sweep.main(dataclasses.replace(config, quick=False))


COMPARISON, SENSITIVITY = (
    (tiny.ROOT / "minirlhf" / "lab" / name).read_text()
    for name in ("COMPARISON.md", "SENSITIVITY.md")
)
COMMAND = re.compile(r"^python -m minirlhf.lab.sweep (.*)$", re.M)


@pytest.mark.parametrize("command", COMMAND.findall(COMPARISON + SENSITIVITY))
def test_a_published_table_is_drawn_again_from_its_runs(command, tmp_path, monkeypatch, capsys):
    """Nothing runs. The numbers of the page are those of the table."""
    config = sweep.SweepConfig(**parse_flags(sweep.SweepConfig, shlex.split(command)))
    published = tiny.ROOT / config.out
    shutil.copy(published / "runs.jsonl", tmp_path)
    (tmp_path / ".lab").touch()
    monkeypatch.setattr(sweep, "run_jobs", lambda *arguments: pytest.fail("a run is missing"))
    table = sweep.main(dataclasses.replace(config, out=str(tmp_path)))
    if config.best:
        return
    assert table == (published / "table.md").read_text()
    if config.one_at_a_time:
        return
    # The second column: iterations in the table at equal seconds, else the learning rate.
    second = r"\d\d" if "equal_seconds" in config.out else r"\de-\d"
    rows = re.findall(rf"^\| `(\S+)` \| {second} \|(.*)$", COMPARISON, re.M)
    assert len(rows) == len(table.splitlines()) - 4
    for name, cells in rows:
        (line,) = (line for line in table.splitlines() if line.startswith(f"| `{name}` "))
        for cell in cells.split("|")[:3]:
            assert cell in line, f"{name}: {cell}"


def test_the_differences_of_the_sensitivity_page_are_those_of_its_runs():
    rows = common.read_rows(tiny.ROOT / "data/studies/sensitivity/runs.jsonl")[1:]
    runs = {(json.dumps(row["settings"]), row["seed"]): row["metrics"] for row in rows}
    name = ""
    cells = re.findall(r"^\| (`\w+`)? ?\| ([\d.e-]+) \| (.*) \| (.*) \|$", SENSITIVITY, re.M)
    assert len(cells) == 10
    for setting, value, *expected in cells:
        name = setting.strip("`") or name
        kind = type(getattr(PolicyConfig(), name))
        key = json.dumps({name: kind(value)})
        actual = []
        for metric, form in (("sampled_gold", "{:+.2f}"), ("sampled_kl", "{:+.1f}")):
            differences = [runs[key, seed][metric] - runs["{}", seed][metric] for seed in range(3)]
            actual.append(sweep.show(differences, form))
        assert actual == expected, (name, value)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_twice_has_the_same_table(tmp_path):
    check_a_sweep_that_is_stopped_twice(tmp_path, ["--algorithms", "reinforce,dpo", "--seeds", "2"])


def check_a_sweep_that_is_stopped_twice(tmp_path: Path, flags: list[str]) -> None:
    """The same rows and the same table, except for times, as a sweep that is not stopped."""
    command = [sys.executable, "-m", "minirlhf.lab.sweep", "--quick", *flags, "--out"]
    run = dict(env=tiny.environment(), stdout=subprocess.DEVNULL)
    subprocess.run([*command, tmp_path / "whole"], check=True, **run)
    for stage in ("reward_metrics.jsonl", "policy_metrics.jsonl"):
        process = subprocess.Popen([*command, tmp_path / "stopped"], **run)
        while not list((tmp_path / "stopped").glob(f"*/{stage}")):
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        assert process.wait() == 130
    subprocess.run([*command, tmp_path / "stopped"], check=True, **run)
    tables, rows = [], []
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        table = (folder / "table.md").read_text().splitlines()
        tables.append([line.rsplit("|", 2)[0] for line in table])  # without the column of seconds
        of_runs = common.read_rows(folder / "runs.jsonl")[1:]
        of_runs.sort(key=lambda row: row["key"])  # runs at the same time end in any order
        rows.append([without_times(row) | dict(command="") for row in of_runs])
    assert tables[0] == tables[1]
    assert rows[0] == rows[1]


def without_times(row: dict) -> dict:
    metrics = {key: value for key, value in row["metrics"].items() if "seconds" not in key}
    curve = [point | dict(seconds=0.0) for point in row["curve"]]
    return row | dict(metrics=metrics, curve=curve)


def test_settings_of_a_sweep_are_all_combinations():
    config = sweep.SweepConfig(
        algorithms="ppo,rloo",
        set=("lr=1e-3", "kl_coef=0.01,0.05", "ppo:ppo_epochs=1,3", "reward.epochs=2"),
    )
    settings = sweep.settings_of(config)
    assert [chosen.label for chosen in settings] == [
        "ppo kl_coef=0.01 ppo_epochs=1",
        "ppo kl_coef=0.01 ppo_epochs=3",
        "ppo kl_coef=0.05 ppo_epochs=1",
        "ppo kl_coef=0.05 ppo_epochs=3",
        "rloo kl_coef=0.01",
        "rloo kl_coef=0.05",
    ]
    assert settings[1].policy == dict(lr=1e-3, kl_coef=0.01, ppo_epochs=3)
    assert settings[1].reward == dict(epochs=2)
    reward, policy = sweep.jobs_of(config, settings[1], 3)
    assert reward.config.epochs == 2
    assert (policy.config.ppo_epochs, policy.config.seed, policy.needs) == (3, 3, reward.config.out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--algorithms", "rlo"], "did you mean rloo"),
        (["--set", "kl_coeff=0.1"], "'kl_coeff' is not a setting; did you mean kl_coef"),
        (["--set", "kl_coef"], "write KEY=VALUE"),
        (["--set", "kl_coef=low"], "--kl-coef: invalid float value: 'low'"),
        (["--set", "seed=1,2"], "the sweep sets 'seed' itself; see --algorithms, --seeds"),
        (["--set", "poo:kl_coef=1"], "'poo' is not one of --algorithms; did you mean ppo?"),
        (["--set", "kl_coef=0.1,0.1"], "has a value twice"),
        (["--set", "kl_coef=-1,0.1"], "--set kl_coef=-1.0: --kl-coef must be"),
        (["--algorithms", "rloo", "--set", "group_size=3"], "is not a multiple of --group-size 3"),
        (["--x", "kl_coef"], "add --set kl_coef=VALUE,VALUE"),
        (["--set", "kl_coef=0.1", "kl_coef=0.2"], "given twice; write all values as kl_coef=VALUE"),
        (["--set", "reward.task=a,b"], "runs of different tasks are not comparable"),
        (["--script", "none.py"], "no such file"),
        (["--out", "README.md"], "is a file"),
    ],
)
def test_a_wrong_sweep_is_refused(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    assert message in refused(capsys, sweep.main, sweep.SweepConfig, arguments)


def test_settings_that_vary_one_at_a_time_share_the_runs_of_the_defaults():
    config = sweep.SweepConfig(
        set=("kl_coef=0.025,0.05", "lam=0.95,1", "iterations=4"), one_at_a_time=True
    )
    settings = sweep.settings_of(config)
    assert [chosen.label for chosen in settings] == [
        "ppo kl_coef=0.025",
        "ppo kl_coef=0.05",
        "ppo lam=0.95",
        "ppo lam=1.0",
    ]
    folders = [sweep.jobs_of(config, chosen, 0)[1].config.out for chosen in settings]
    assert folders[0] == folders[2]  # the defaults
    assert len(set(folders)) == 3


def some_results() -> list[sweep.Result]:
    """Two settings of ppo and one of rloo, two seeds each."""
    results = []
    for algorithm, kl_coef, gold in (("ppo", 0.1, 1.0), ("ppo", 0.3, 3.0), ("rloo", None, 2.0)):
        varied = dict(kl_coef=kl_coef) if kl_coef else {}
        rows = [
            dict(
                metrics=dict(sampled_gold=gold + seed, sampled_kl=4.0),
                curve=[dict(samples=n, sampled_gold=n * gold + seed) for n in (0, 10)],
            )
            for seed in (0, 2)
        ]
        results.append(sweep.Result(sweep.Setting(algorithm, varied, {}, varied), rows))
    return results


def test_points_of_a_plot_are_means_over_seeds_with_intervals():
    half = 12.706  # of the mean of x and x + 2: Student's t with one degree of freedom
    curves = sweep.points(some_results(), "samples", "sampled_gold")
    assert curves["ppo kl_coef=0.3"] == [(0, 0, 1.0, half), (10, 0, 31.0, half)]
    final = sweep.points(some_results(), "sampled_kl", "sampled_gold")
    assert final["rloo"] == [(4.0, 0.0, 3.0, half)]
    swept = sweep.points(some_results(), "kl_coef", "sampled_gold")
    assert swept == {
        "ppo": [(0.1, 0.0, 2.0, half), (0.3, 0.0, 4.0, half)],
        "rloo": [(None, 0.0, 3.0, half)],  # a horizontal line
    }
    assert sweep.panels(some_results(), "sampled_gold") == {"kl_coef": dict(ppo=swept["ppo"])}
    with pytest.raises(UserError, match="not evaluated during training"):
        sweep.points(some_results(), "samples", "best_gold")


def test_the_table_has_differences_from_the_first_setting_paired_over_seeds():
    """Gold 1 and 3 against 3 and 5: the difference is 2 on both seeds, so its interval is 0."""
    first, second, third = sweep.result_table(some_results(), "sampled_gold").splitlines()[2:]
    assert first.endswith("|  |")
    assert second.endswith("| +2.00 ± 0.00 |")
    assert third.endswith("| +1.00 ± 0.00 |")


SCRIPT = """import train_policy
from minirlhf.config import PolicyConfig
from minirlhf.run.command_line import run_script

{line}
"""
CALL = "run_script(train_policy.main, PolicyConfig)"


def test_a_script_in_another_folder_runs_and_is_known_by_its_content(tmp_path, monkeypatch):
    """It need not be next to the two scripts. Results of an edited one are not mixed in."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    config = sweep.SweepConfig(script="mine.py")
    path.write_text(SCRIPT.format(line=CALL))
    version = sweep.script_version(config)
    assert re.fullmatch(r"mine.py [0-9a-f]{16}", version)
    assert sweep.script_version(sweep.SweepConfig()) == "train_policy.py"
    path.write_text(SCRIPT.format(line=CALL + "  # edited"))
    assert sweep.script_version(config) != version
    job = common.Job(str(path), PolicyConfig(algorithm="mine"))
    assert common.command_of(job) == "python mine.py --algorithm mine"


@pytest.mark.parametrize(
    "line, message",
    [
        ("1 / 0", "--script mine.py fails at mine.py:5: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "--script mine.py fails: exit status 3"),
        ("", "prints nothing with --help; its last line must be run_script("),
        (CALL, "--script mine.py: --algorithm 'rlo' is not known; did you mean rloo?"),
    ],
)
def test_a_script_that_cannot_run_is_refused_before_any_training(
    line, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SCRIPT.format(line=line))
    flags = ["--script", "mine.py", "--out", "out", "--quick", "--algorithms", "ppo,rlo"]
    assert message in refused(capsys, sweep.main, sweep.SweepConfig, flags)
    assert not list((tmp_path / "out").glob("reward-*"))


def test_only_the_best_setting_of_each_algorithm_is_kept():
    best = sweep.keep_best(some_results(), "sampled_gold")
    assert [result.setting.label for result in best] == ["ppo kl_coef=0.3", "rloo"]


def test_examples_of_the_sweep_are_true():
    assert tuple(doctest.testmod(sweep)) == (0, 2)


# ---- the variance lab ----------------------------------------------------------------------------


def test_metrics_of_gradients_with_known_mean_and_noise():
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(50)
    mean[0] = 3.0
    shift = torch.zeros(50)
    shift[0] = -0.6
    shift[1] = 1.5

    def draw(count, center):  # variance: the trace, 50 x 4
        return center + 2.0 * torch.randn(count, 50, generator=generator)

    for center, bias, cosine in (
        (mean, 0.0, 1.0),
        (mean + shift, 0.29, 2.4 / (2.4**2 + 1.5**2) ** 0.5),
    ):
        row = variance.gradient_metrics(draw(400, center), draw(400, mean))
        assert np.mean(row["deviations"]) == pytest.approx(200.0, rel=0.05)
        expected = dict(bias=bias, cosine=cosine, signal_to_noise=float(center @ center) / 200)
        for name, true in expected.items():
            estimate, low, high = row[name]
            assert low < true <= high and low < estimate <= high, (name, row[name])
            assert high - low < 0.3, (name, row[name])


def test_a_ratio_of_variances_resamples_both_together():
    """Resampled separately, the interval of this exact ratio would not be a point."""
    noise = np.exp(np.random.default_rng(0).normal(size=60))
    assert variance_ratio(2 * noise, noise) == pytest.approx((2.0, 2.0, 2.0))


def test_dense_rewards_are_paid_where_sentences_end_and_sum_to_gold(helpdesk_runs):
    task = load_task(
        PolicyConfig(reward_run=str(helpdesk_runs / "reward-seed0")), None, torch.device("cpu")
    )
    samples = sample_responses(
        task.base, task.test.first(6), task.sampling, "test", 0, rows=list(range(6))
    )
    encoding = task.sampling.encoding
    best = task.ground_truth.best_response(task.test.texts[0])
    ids = [*encoding.encode_ordinary(best), encoding.eot_token]
    width = max(len(ids), samples.response_ids.shape[1])
    pad = torch.nn.functional.pad
    samples = samples._replace(
        responses=[best, *samples.responses[1:]],
        finished=[True, *samples.finished[1:]],
        response_ids=pad(samples.response_ids, (0, width - samples.response_ids.shape[1])),
        response_mask=pad(samples.response_mask, (0, width - samples.response_mask.shape[1])),
    )
    samples.response_ids[0, : len(ids)] = torch.tensor(ids)
    samples.response_mask[0] = torch.arange(width) < len(ids)
    rewards = variance.dense_rewards(samples, task)
    gold = torch.tensor(gold_utility(samples, task.ground_truth))
    torch.testing.assert_close(rewards.sum(1), gold, rtol=0, atol=1e-5)
    assert not rewards[~samples.response_mask].any()
    paid = rewards[0].nonzero().squeeze(1).tolist()
    parts = [utility for _, utility in helpdesk.gold_parts(task.test.texts[0], best)]
    assert [encoding.decode([ids[t]])[-1] for t in paid] == ["."] * len(parts)
    torch.testing.assert_close(rewards[0][paid], torch.tensor(parts), rtol=0, atol=1e-5)


def test_the_variance_lab_resumes_where_it_was_stopped(
    helpdesk_runs, tmp_path, capsys, monkeypatch
):
    """Half a row is measured again with the same result; complete rows are not."""
    settings = {
        "--reward-run": str(helpdesk_runs / "reward-seed0"),
        "--policy-run": str(helpdesk_runs / "reinforce-seed0"),
        "--batches": "3",
        "--reference-batches": "3",
        "--value-batches": "1",
        "--batch-size": "4",
        "--out": str(tmp_path),
    }
    flags = list(itertools.chain(*settings.items()))
    assert tiny.ending(variance.main, variance.VarianceConfig, flags) == 0
    rows = {row["key"]: row for row in common.read_rows(tmp_path / "rows.jsonl")[1:]}
    assert len(rows) == 2 * 2 * len(variance.ALGORITHMS)
    # at the base model, where only the last token is rewarded
    full, to_go = (
        {**rows[f"base, score: {name}"], "key": ""} for name in ("reinforce", "reward-to-go")
    )
    assert full == to_go
    assert (
        rows["base, dense: reinforce"]["deviations"]
        != rows["base, dense: reward-to-go"]["deviations"]
    )
    lines = (tmp_path / "rows.jsonl").read_bytes().splitlines(True)
    page = (tmp_path / "variance.md").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:50])
    assert tiny.ending(variance.main, variance.VarianceConfig, flags) == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == b"".join(lines)
    assert (tmp_path / "variance.md").read_bytes() == page
    monkeypatch.setattr(variance, "collect", lambda *a: pytest.fail("sampled again"))
    assert tiny.ending(variance.main, variance.VarianceConfig, flags) == 0
    assert "contains results of other settings" in refused(
        capsys, variance.main, variance.VarianceConfig, [*flags, "--seed", "1"]
    )


def test_the_variance_lab_refuses_a_policy_of_another_base_model(helpdesk_runs, tmp_path, capsys):
    shutil.copytree(helpdesk_runs / "reinforce-seed0", tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    del config["facts"]["base model 1"]
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config))
    flags = ["--reward-run", str(helpdesk_runs / "reward-seed0")]
    flags += ["--policy-run", str(tmp_path / "policy")]
    assert "was not trained from" in refused(capsys, variance.main, variance.VarianceConfig, flags)


# ---- the overoptimization lab --------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 7))
def test_the_best_of_n_estimate_is_the_mean_over_all_subsets_of_n(n):
    random = np.random.default_rng(n)
    scores, gold = random.normal(size=(2, 6))
    subsets = [list(subset) for subset in itertools.combinations(range(6), n)]
    expected = np.mean([gold[max(subset, key=lambda i: scores[i])] for subset in subsets])
    estimate = gold[scores.argsort()] @ results.best_of_n_weights(6, n)
    assert estimate == pytest.approx(expected, abs=1e-12)


def test_best_of_n_curves_start_at_the_mean_of_the_pool_and_end_at_its_best():
    random = np.random.default_rng(0)
    scores, gold = random.normal(size=(2, 5, 16))
    d, golds, proxies = results.best_of_n_curve(scores, gold)
    assert (d[0], golds[0]) == pytest.approx((0.0, 0.0))
    assert d[-1] == pytest.approx((np.log(16) - 15 / 16) ** 0.5)
    assert proxies[-1] == pytest.approx(scores.max(1).mean())
    best = gold[range(5), scores.argmax(1)].mean()
    assert golds[-1] == pytest.approx(best - gold.mean())


def test_a_policy_curve_has_means_over_blocks_of_iterations():
    line = dict(kl=[-1.0, *[4.0] * 38, 14.0], gold=[*[1.0] * 39, 3.0], score=range(40))
    d, gold, proxy = results.policy_curve(line, base_gold=0.5)
    assert d.tolist() == [1.5**0.5, *[2.0] * 18, 3.0]
    assert gold.tolist() == [*[0.5] * 19, 1.5]
    assert proxy.tolist() == [0.5 + 2 * block for block in range(20)]


@pytest.mark.parametrize("method", ("best of n", "PPO"))
def test_a_fit_recovers_the_coefficients_of_its_points(method):
    d = np.linspace(0.0, 6.0, 40)
    slowdown = np.log(d.clip(1e-9)) if method == "PPO" else d
    gold = d * (2.0 - 0.5 * slowdown)
    assert results.fit(d, gold, method) == pytest.approx((2.0, 0.5, 1.0))
    noise = 0.1 * np.random.default_rng(0).normal(size=40)
    alpha, beta, r2 = results.fit(d, gold + noise, method)
    assert (alpha, beta) == pytest.approx((2.0, 0.5), abs=0.1)
    assert 0.9 < r2 < 1


def test_the_place_of_a_peak_is_chosen_by_the_other_seeds():
    d = np.arange(1.0, 4.0)
    golds = np.array([[0.0, 9.0, 1.0], [2.0, 0.0, 1.0], [3.0, 0.0, 1.0]])
    curves = np.array([[d, gold, 2 * d] for gold in golds])
    measured = results.measure(curves, "PPO")
    # the others' means: [2.5, 0, 1], [1.5, 4.5, 1] and [1, 4.5, 1]
    assert measured["peak of gold"].tolist() == [0.0, 0.0, 0.0]
    assert measured["at d"].tolist() == [1.0, 2.0, 2.0]
    assert measured["fall of gold"].tolist() == [-1.0, -1.0, -1.0]
    assert measured["rise of proxy"].tolist() == [4.0, 2.0, 2.0]
    assert results.measure(curves[:1], "PPO")["peak of gold"].tolist() == [9.0]


def test_curves_are_compared_at_the_same_kl():
    slow = np.linspace(0.0, 2.0, 40)
    fast = np.linspace(3.0, 0.0, 400)  # in any order
    short = np.linspace(0.0, 1.0, 400)
    curves = np.array([[slow, slow**2 + 0.5, slow]] * 2)
    others = np.array([[fast, fast**2, fast], [short, short**2, short + slow.max()]])
    assert results.gain_at_same_kl(curves, others, 1) == pytest.approx([0.5, 0.5], abs=1e-3)
    assert results.gain_at_same_kl(curves, others, 2) == pytest.approx([0.0, -2.0], abs=1e-3)


def test_curves_are_drawn_at_the_d_that_every_seed_has():
    slow = np.linspace(0.5, 2.0, 400)
    fast = np.linspace(3.0, 0.0, 400)  # in any order
    drawn = results.at_equal_d(np.array([[d, d**2, -d] for d in (slow, fast)]))
    assert drawn.shape == (2, 3, results.DRAWN)
    for d, gold, proxy in drawn:
        np.testing.assert_allclose(d, np.linspace(0.5, 2.0, results.DRAWN))
        np.testing.assert_allclose(gold, d**2, atol=1e-3)
        np.testing.assert_allclose(proxy, -d)


def test_agreement_needs_an_interval_on_one_side_of_zero():
    far, near = np.array([1.0, 1.1, 0.9]), np.array([1.0, -0.5, 0.1])
    assert [results.agreement(far, sign) for sign in (1, 0, -1)] == [
        "agrees",
        "disagrees",
        "disagrees",
    ]
    assert [results.agreement(near, sign) for sign in (1, 0)] == [
        "is undecided",
        "does not contradict it",
    ]
    assert results.agreement(-far, -1) == "agrees"
    assert "one seed" in results.agreement(far[:1], 1)


def test_an_ensemble_is_the_mean_or_the_minimum_of_normalized_scores(reward_run, mixed_run):
    runs = [str(reward_run), str(mixed_run)]
    task = load_task(PolicyConfig(reward_run=runs[0], task="none"), None, torch.device("cpu"))
    rows = list(range(len(task.train.texts)))
    samples = sample_responses(task.base, task.train, task.sampling, "ensemble", 0, rows)
    texts = samples.prompts, samples.responses
    first, second = (ensemble([run], "mean", runs[0])(*texts) for run in runs)
    assert (first.mean(), first.std()) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert (second.mean(), second.std()) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert not np.allclose(first, second)
    mean, minimum = (ensemble(runs, how, runs[0])(*texts) for how in ("mean", "min"))
    np.testing.assert_allclose(mean, (first + second) / 2, atol=1e-9)
    np.testing.assert_array_equal(minimum, np.where(first < second, first, second))
    # the scores of ids, where sampled ids are those that the tokenizer gives to the text
    encode = task.sampling.encoding.encode_ordinary
    sampled = [ids[real].tolist() for ids, real in zip(samples.response_ids, samples.response_mask)]
    same = [i for i in rows if sampled[i][:-1] == encode(samples.responses[i])]
    own = score_responses(Reward("", task.reward.source, 0.0), samples).numpy()
    assert len(same) > 3
    assert np.corrcoef(own[same], first[same])[0, 1] == pytest.approx(1.0)


def write_lines(folder: Path, alpha: float, beta: float) -> overoptimization.OveroptimizationConfig:
    """A folder with runs.jsonl of three seeds whose coefficients are alpha, alpha + 1, alpha + 2.

    There are no runs.
    """
    config = overoptimization.OveroptimizationConfig(str(common.lab_folder(str(folder))))
    about = dict(scale=overoptimization.SCALES["full"]._asdict())
    rows = common.Rows(folder / "runs.jsonl", about)
    d = np.linspace(0.5, 4.0, 20)
    for seed in range(3):
        jobs = overoptimization.reward_jobs(config, seed)
        policies = overoptimization.policy_jobs(config, seed)
        metrics = dict(accuracy=0.7 + 0.1 * seed, ceiling=0.9, gold_correlation=0.5)
        gold = d * (alpha + seed - beta * np.log(d)) - 7.0
        run = dict(kl=(d**2).tolist(), gold=gold.tolist(), score=d.tolist())
        curve = [d.tolist(), (d * (alpha + seed - beta * d)).tolist(), d.tolist()]
        curves = dict.fromkeys(overoptimization.reward_functions(config, seed), curve)
        for job in jobs:
            rows.get(job.folder.name, lambda metrics=metrics: metrics)
        for job in policies:
            rows.get(job.folder.name, lambda run=run: run)
        rows.get(f"best-of-n-seed{seed}", lambda curves=curves: dict(gold=-7.0, curves=curves))
    return config


def test_the_page_of_an_overoptimization_study_needs_no_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "start", lambda *_: pytest.fail("a recorded run was repeated"))
    config = write_lines(tmp_path / "study", alpha=2.0, beta=1.5)
    page = overoptimization.main(config)
    assert "| 1x32-512 | 0.800 ± 0.248 | 0.900 ± 0.000 | 0.50 ± 0.00 |" in page
    fits = [line for line in page.splitlines() if line.endswith("| 1.000 ± 0.000 |")]
    assert len(fits) == 5 + 7  # best of n, PPO
    assert all("| 3.00 ± 2.48 | 1.50 ± 0.00 |" in line for line in fits)
    assert "| 1x32-512-kl-0.1: the penalty does not change gold at the same d | " in page
    assert overoptimization.main(config) == page
    fewer = dataclasses.replace(config, seeds=2)
    assert "| 1x32-512 | 0.750 ± 0.635 |" in overoptimization.main(fewer)
    flags = ["--out", config.out, "--scale", "tiny"]
    line = refused(capsys, overoptimization.main, overoptimization.OveroptimizationConfig, flags)
    assert "contains results of other settings" in line


def test_the_published_overoptimization_page_is_drawn_again_from_its_runs(tmp_path, monkeypatch):
    """All intervals that the lab's page quotes are on it."""
    published = tiny.ROOT / "data/studies/overoptimization"
    monkeypatch.chdir(tmp_path)
    config = overoptimization.OveroptimizationConfig("data/studies/overoptimization")
    shutil.copy(published / "runs.jsonl", common.lab_folder(config.out))
    page = overoptimization.main(config)
    assert page == (published / "overoptimization.md").read_text()
    text = (tiny.ROOT / "minirlhf/lab/README.md").read_text()
    (section,) = re.findall(r"^## Reward model overoptimization$(.*?)^## ", text, re.M | re.S)
    quoted = re.findall(r"[\d.]+ ±\s[\d.]+\d", section)
    assert len(quoted) > 9
    assert [pair for pair in quoted if " ".join(pair.split()) not in page] == []


@pytest.mark.slow
def test_the_overoptimization_lab_resumes_where_it_was_stopped(tmp_path, monkeypatch):
    config = overoptimization.OveroptimizationConfig(str(tmp_path), 1, 2, "tiny")
    page = overoptimization.main(config)
    assert "| 1x16-24-min |" in page
    path = tmp_path / "runs.jsonl"
    complete = path.read_bytes()
    path.write_bytes(complete[: complete.index(b'"best-of-n-seed0"') - 40])  # killed while writing
    shutil.rmtree(tmp_path / "ppo-1x16-24-seed0")  # a run in runs.jsonl is not repeated
    monkeypatch.setattr(common, "start", lambda *_: pytest.fail("a finished run was repeated"))
    assert overoptimization.main(config) == page
    assert path.read_bytes() == complete
