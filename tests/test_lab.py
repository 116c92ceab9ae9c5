"""The labs: their statistics against what is known, their runs on something tiny, stopped and gone on with."""

import dataclasses
import doctest
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import refused

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig, UserError
from minirlhf.environment import Prompts, load_environment, sample_responses
from minirlhf.flags import given_flags
from minirlhf.lab import common, ladder, overoptimization, variance
from minirlhf.lab import overoptimization_fit as fits
from minirlhf.lab.overoptimization_page import neighbours
from minirlhf.lab.variance_page import variance_ratio


@pytest.fixture(scope="module")
def help_desk(tmp_path_factory) -> Path:
    """A reward run on the help desk that has learnt next to nothing, and a policy run of two iterations beside it."""
    folder = tmp_path_factory.mktemp("labs")
    (reward,), policies = ladder.plan(ladder.LadderConfig(runs=str(folder), seeds=1, quick=True))
    train_reward.main(reward.config)
    train_policy.main(policies["reinforce"][0].config)
    return folder


# ---- what they share -------------------------------------------------------------------------------------------------

def test_the_examples_of_the_shared_pieces_are_true():
    assert tuple(doctest.testmod(common)) == (0, 2)  # failed, attempted


def test_the_flags_of_a_run_say_the_same_as_its_configuration(inputs, tmp_path):
    for config in (tiny.reward_config(inputs, tmp_path, seed=3), tiny.policy_config(tmp_path, "x", lr_decay=False, kl_target=6.0),
                   RewardConfig(), PolicyConfig(tensorboard=True)):
        assert type(config)(**given_flags(type(config), common.flags_of(config))) == config


def test_rows_that_are_there_are_not_computed_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = common.Rows(path, dict(size=3))
    assert rows.get("a", lambda: dict(x=1)) == dict(key="a", x=1)
    rows.get("b", lambda: dict(x=2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])  # killed while it wrote the last row
    rows = common.Rows(path, dict(size=3))
    assert rows.get("a", lambda: pytest.fail("computed again"))["x"] == 1
    rows.get("b", lambda: dict(x=2))
    assert path.read_bytes() == whole
    with pytest.raises(UserError, match="other settings or inputs"):
        common.Rows(path, dict(size=4))


def test_a_run_with_other_settings_is_not_taken_for_this_one(reward_run):
    config = common.read_config(RewardConfig, reward_run / "config.json")
    assert common.finished(common.Job("train_reward.py", config))
    with pytest.raises(UserError, match="--seed 0, not 1; name another folder"):
        common.finished(common.Job("train_reward.py", dataclasses.replace(config, seed=1)))


def test_a_run_that_fails_is_named_and_the_others_are_kept(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", tiny.environment()["PYTHONPATH"])
    good, bad = (common.Job("train_reward.py", tiny.reward_config(inputs, tmp_path / name, **changes))
                 for name, changes in (("good", {}), ("bad", dict(tokenizer="no such file"))))
    after = common.Job("train_policy.py", tiny.policy_config(bad.folder, tmp_path / "after"), bad.config.out)
    with pytest.raises(UserError, match=r"bad failed: error: .*no such file.*the other runs are kept"):
        common.run_jobs([bad, after, good], 2, tmp_path / "logs")
    assert common.finished(good) and not after.folder.exists()


def test_a_lab_names_the_command_that_makes_what_a_folder_lacks(capsys, tmp_path):
    for main, config_class in ((variance.main, variance.VarianceConfig),
                               (overoptimization.main, overoptimization.OveroptimizationConfig)):
        assert "--reward-run is missing" in refused(capsys, main, config_class, [])
        line = refused(capsys, main, config_class, ["--reward-run", str(tmp_path / "none")])
        assert f"make it with: python train_reward.py --out {tmp_path / 'none'}" in line


def test_a_ctrl_c_stops_the_runs_and_ends_in_one_line(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", tiny.environment()["PYTHONPATH"])
    monkeypatch.setattr(common.sys, "argv", ["lab"])
    job = common.Job("train_reward.py", tiny.reward_config(inputs, tmp_path / "run", epochs=100_000))
    processes = []

    def interrupted(seconds):
        if (tmp_path / "run" / "reward_metrics.jsonl").exists():
            raise KeyboardInterrupt

    start = common.start
    monkeypatch.setattr(common, "start", lambda *a: processes.append(start(*a)) or processes[0])
    monkeypatch.setattr(common.time, "sleep", interrupted)
    with pytest.raises(SystemExit, match="130"):
        common.run_lab(lambda config: common.run_jobs([job], 1, tmp_path / "logs"), ladder.LadderConfig)
    assert capsys.readouterr().err == "error: stopped; the same command goes on from here\n"
    assert processes[0].returncode == 130 and "--resume" in common.last_line(tmp_path / "logs" / "run.txt")


# ---- the ladder ------------------------------------------------------------------------------------------------------

def test_the_ladder_runs_what_is_missing_and_goes_on_with_what_was_stopped(help_desk, capsys):
    config = ladder.LadderConfig(runs=str(help_desk), seeds=1, jobs=2, quick=True, algorithms="reinforce,rloo")
    untouched = (help_desk / "reinforce-seed0" / "result.json").stat().st_mtime_ns
    page = ladder.main(config)
    assert "`rloo`" in page and "2 algorithms, 1 seeds, 16 samples each" in page
    result = help_desk / "rloo-seed0" / "result.json"
    content = result.read_bytes()
    result.unlink()  # as if stopped before its end
    assert ladder.main(config) == page
    assert result.read_bytes() == content
    assert (help_desk / "reinforce-seed0" / "result.json").stat().st_mtime_ns == untouched
    assert "did you mean rloo" in refused(capsys, ladder.main, ladder.LadderConfig, ["--algorithms", "rlo"])
    assert "is a file" in refused(capsys, ladder.main, ladder.LadderConfig, ["--runs", str(help_desk / "ladder.md")])


def test_a_learning_curve_is_means_over_equal_parts_of_the_run(tmp_path):
    rows = [dict(step=0, samples=0, eval_sampled_gold=9.0)] + [dict(step=i, samples=10 * i, gold=float(i)) for i in range(1, 7)]
    (tmp_path / "policy_metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples, gold = ladder.learning_curve(tmp_path, points=3)
    assert gold.tolist() == [1.5, 3.5, 5.5] and samples.tolist() == [15.0, 35.0, 55.0]


# ---- the variance lab ------------------------------------------------------------------------------------------------

def test_figures_of_gradients_whose_mean_and_noise_are_known():
    generator = torch.Generator().manual_seed(0)
    mean, shift = torch.zeros(50), torch.zeros(50)
    mean[0], shift[0], shift[1] = 3.0, -0.6, 1.5

    def draw(count, centre):  # variance: the trace, 50 x 4
        return centre + 2.0 * torch.randn(count, 50, generator=generator)

    for centre, bias, cosine in ((mean, 0.0, 1.0), (mean + shift, 0.29, 2.4 / (2.4**2 + 1.5**2) ** 0.5)):
        row = variance.figures_of(draw(400, centre), draw(400, mean))
        assert np.mean(row["deviations"]) == pytest.approx(200.0, rel=0.05)
        for name, true in dict(bias=bias, cosine=cosine, signal_to_noise=float(centre @ centre) / 200).items():
            middle, low, high = row[name]
            assert low < true <= high and low < middle <= high and high - low < 0.3, (name, row[name])


def test_a_ratio_of_variances_is_taken_in_pairs():
    noise = np.exp(np.random.default_rng(0).normal(size=60))
    assert variance_ratio(2 * noise, noise) == pytest.approx((2.0, 2.0, 2.0))


def test_dense_rewards_pay_each_sentence_where_it_ends_and_add_up_to_gold(help_desk):
    world = load_environment(PolicyConfig(reward_run=str(help_desk / "reward-seed0")), None, torch.device("cpu"))
    prompts = Prompts(world.test.texts[:6], world.test.ids[:6])
    samples = sample_responses(world.base, *prompts, world.sampling, "test", 0, rows=list(range(6)))
    encoding, best = world.sampling.encoding, world.task.best_response(world.test.texts[0])
    ids = [*encoding.encode_ordinary(best), encoding.eot_token]
    width = max(len(ids), samples.response_ids.shape[1])
    pad = torch.nn.functional.pad
    samples = samples._replace(responses=[best, *samples.responses[1:]], finished=[True, *samples.finished[1:]],
                               response_ids=pad(samples.response_ids, (0, width - samples.response_ids.shape[1])),
                               response_mask=pad(samples.response_mask, (0, width - samples.response_mask.shape[1])))
    samples.response_ids[0, : len(ids)], samples.response_mask[0] = torch.tensor(ids), torch.arange(width) < len(ids)
    rewards = variance.dense_rewards(samples, world)
    torch.testing.assert_close(rewards.sum(1), torch.tensor(samples.gold(world.task)), rtol=0, atol=1e-5)
    assert not rewards[~samples.response_mask].any()
    paid = rewards[0].nonzero().squeeze(1).tolist()
    parts = [worth for _, worth in world.task.gold_parts(world.test.texts[0], best)]
    assert [encoding.decode([ids[t]])[-1] for t in paid] == ["."] * len(parts)
    torch.testing.assert_close(rewards[0][paid], torch.tensor(parts), rtol=0, atol=1e-5)


def test_the_variance_lab_runs_and_goes_on_where_it_was_stopped(help_desk, tmp_path, capsys, monkeypatch):
    flags = ["--reward-run", str(help_desk / "reward-seed0"), "--policy-run", str(help_desk / "reinforce-seed0"),
             "--batches", "3", "--reference-batches", "3", "--value-batches", "1", "--batch-size", "4", "--out", str(tmp_path)]
    assert tiny.ending(variance.main, variance.VarianceConfig, flags) == 0
    rows = {row["key"]: row for row in common.read_rows(tmp_path / "rows.jsonl")[1:]}
    assert len(rows) == 2 * 2 * 7
    same, other = ({**rows[f"base, score: {rung}"], "key": ""} for rung in ("reinforce", "reward-to-go"))
    assert same == other  # at the base model, where nothing is paid before the end
    assert rows["base, dense: reinforce"]["deviations"] != rows["base, dense: reward-to-go"]["deviations"]
    lines, page = (tmp_path / "rows.jsonl").read_bytes().splitlines(True), (tmp_path / "variance.md").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:50])
    assert tiny.ending(variance.main, variance.VarianceConfig, flags) == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == b"".join(lines) and (tmp_path / "variance.md").read_bytes() == page
    monkeypatch.setattr(variance, "collect", lambda *a: pytest.fail("sampled again"))
    assert tiny.ending(variance.main, variance.VarianceConfig, flags) == 0
    assert "holds rows of other settings" in refused(capsys, variance.main, variance.VarianceConfig, [*flags, "--seed", "1"])


def test_the_variance_lab_refuses_a_policy_of_another_base_model(help_desk, tmp_path, capsys):
    shutil.copytree(help_desk / "reinforce-seed0", tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    config["facts"]["data"] = {}
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config))
    flags = ["--reward-run", str(help_desk / "reward-seed0"), "--policy-run", str(tmp_path / "policy")]
    assert "was not trained from" in refused(capsys, variance.main, variance.VarianceConfig, flags)


def test_the_full_return_is_told_from_the_reward_to_go_where_they_differ(help_desk):
    mask = torch.ones(2, 3, dtype=torch.bool)
    late, early = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -2.0]]), torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.0, -2.0]])
    blank = torch.zeros(2, 3)
    rollout = variance.Rollout(blank, mask, blank, mask, blank, blank, blank, blank[:, 0], late)
    variance.check_same_weights([rollout])
    with pytest.raises(AssertionError, match="nothing is paid before the end"):
        variance.check_same_weights([rollout, rollout._replace(rewards=early)])


# ---- the over-optimisation lab ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", range(1, 7))
def test_the_best_of_n_estimate_is_the_mean_over_every_choice_of_n_from_the_pool(n):
    random = np.random.default_rng(n)
    scores, gold = random.normal(size=6), random.normal(size=6)
    choices = [list(choice) for choice in itertools.combinations(range(6), n)]
    wanted = np.mean([gold[max(choice, key=lambda i: scores[i])] for choice in choices])
    assert gold[scores.argsort()] @ fits.best_of_n_weights(6, n) == pytest.approx(wanted, abs=1e-12)


def test_best_of_n_curves_begin_at_the_pools_mean_and_end_at_its_best():
    random = np.random.default_rng(0)
    scores, gold = random.normal(size=(5, 16)), random.normal(size=(5, 16))
    d, golds, proxies = fits.best_of_n_curves(scores, gold)
    assert d[0] == 0.0 and d[-1] == pytest.approx((np.log(16) - 15 / 16) ** 0.5)
    np.testing.assert_allclose(golds[:, 0], gold.mean(1))
    np.testing.assert_allclose(proxies[:, -1], scores.max(1))
    np.testing.assert_allclose(golds[:, -1], gold[range(5), scores.argmax(1)])


@pytest.mark.parametrize("logarithm", (False, True))
def test_a_fit_finds_the_coefficients_that_made_the_points(logarithm):
    d = np.linspace(0.3, 6.0, 40)
    noise = 0.1 * np.random.default_rng(0).normal(size=40)
    exact = d * (2.0 - 0.5 * (np.log(d) if logarithm else d))
    found = fits.fit(d, exact, logarithm)
    assert (found.alpha, found.beta, found.r2) == pytest.approx((2.0, 0.5, 1.0))
    found = fits.fit(d, exact + noise, logarithm)
    assert abs(found.alpha - 2.0) < 3 * found.alpha_se < 0.2 and abs(found.beta - 0.5) < 3 * found.beta_se < 0.1 and found.r2 < 1


def test_a_peak_is_found_and_a_fall_measured():
    time, noise = np.arange(100), 0.1 * np.random.default_rng(0).normal(size=100)
    peak = fits.policy_peak(fits.Curve(time / 10.0, 2.0 - ((time - 44.5) / 30.0) ** 2 + noise, time / 50.0))
    assert peak.gold == pytest.approx(2.0, abs=0.1) and peak.d == pytest.approx(4.45, abs=0.5)
    assert peak.fall == pytest.approx(3.12, abs=0.25) and 0.06 < peak.fall_se < 0.15  # 0.1, of means of 2 and of 4
    assert peak.proxy_rise == pytest.approx(1.04, abs=0.1)
    gold = np.tile([[0.0, 1.0, 4.0, 2.0], [9.0, 1.0, 3.0, 2.0]], (4, 1))  # every second prompt chooses, the others are measured
    peak = fits.best_of_n_peak(np.arange(4.0), gold, np.tile(np.arange(4.0), (8, 1)))
    assert (peak.d, peak.gold, peak.fall, peak.proxy_rise) == (2.0, 3.0, 1.0, 1.0)


def test_curves_are_compared_at_the_same_divergence():
    slow, fast = np.linspace(0.0, 2.0, 40), np.linspace(0.0, 4.0, 60)
    gain = fits.matched_gain(fits.Curve(slow, slow**2 + 0.5, slow), fits.Curve(fast, fast**2, fast))
    assert gain["gold"][0] == pytest.approx(0.5, abs=0.05) and gain["proxy"][0] == pytest.approx(0.0, abs=1e-9)


def test_neighbours_differ_in_one_thing_alone():
    names = ["1x8-10", "1x8-20", "1x8-30", "2x8-10", "2x8-20", "2x8-30"]
    assert neighbours(names, 0) == [("1x8-10", "2x8-10"), ("1x8-20", "2x8-20"), ("1x8-30", "2x8-30")]
    assert neighbours(names, 1) == [("1x8-10", "1x8-20"), ("1x8-20", "1x8-30"), ("2x8-10", "2x8-20"), ("2x8-20", "2x8-30")]


@pytest.mark.slow
def test_the_overoptimisation_lab_runs_and_goes_on_where_it_was_stopped(help_desk, tmp_path, monkeypatch):
    config = overoptimization.OveroptimizationConfig(str(help_desk / "reward-seed0"), str(tmp_path), scale="tiny", jobs=2)
    page = overoptimization.main(config)
    assert "| 1x16-24 |" in page and "| default |" in page
    whole = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(whole[:-9])  # killed while it wrote the pool
    monkeypatch.setattr(common, "start", lambda *a: pytest.fail("a finished run was started again"))
    assert overoptimization.main(config) == page
    assert (tmp_path / "rows.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_ppo_without_a_penalty_raises_the_proxy(tmp_path):
    data = (common.train_subset(tmp_path, 600),)
    train_reward.main(RewardConfig(data=data, heldout_data=data, test_data=data, task="minirlhf.helpdesk", n_layer=1, d_model=64,
                                   warmup_sequences=4096, out=str(tmp_path / "reward")))
    config = overoptimization.OveroptimizationConfig(str(tmp_path / "reward"), str(tmp_path / "lab"), scale="quick", jobs=2)
    overoptimization.main(config)
    rows = [row for row in common.read_rows(tmp_path / "lab" / "ppo-1x32-512-kl-0" / "policy_metrics.jsonl") if row["step"]]
    early, late = ([row["score"] for row in some] for some in (rows[:5], rows[-5:]))
    assert np.mean(late) > np.mean(early) + 2 * np.hypot(np.std(early), np.std(late)) / 5**0.5
