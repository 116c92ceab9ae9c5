"""Both scripts from end to end: what they write and print, and how they refuse bad input."""

import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data import splits
from minirlhf.data.prompts import prompts_of_step
from minirlhf.data.tokenizer import fingerprint, load_tokenizer
from minirlhf.model.loading import load_model, save_model
from minirlhf.rl.algorithms import ALGORITHMS, minibatch_loss
from minirlhf.rl.task import load_task
from minirlhf.run import terminal
from minirlhf.run.errors import UserError
from minirlhf.run.metrics import Metrics, rounded
from minirlhf.run.terminal import Progress, printable

import pytest
import tiny
import torch
from tiny import (
    as_flags,
    assert_same_weights,
    contents,
    ending,
    policy_config,
    refused,
    reward_config,
    rows,
)

# What every iteration logs, with any algorithm.
LOGGED = {
    "step",
    "samples",
    "score",
    "score_std",
    "kl",
    "kl_coef",
    "entropy",
    "total_reward",
    "approx_kl",
    "clip_fraction",
    "value_clip_fraction",
    "value_loss",
    "explained_variance",
    "return_mean",
    "return_std",
    "length",
    "eos_rate",
    "ratio",
    "grad_norm",
    "lr",
    "loss",
    "tokens",
}
# The durations that every iteration logs.
DURATIONS = {"tokens_per_second", "seconds_sample", "seconds_score", "seconds_update"}


def raw_rows(path):
    """All metrics, with the wall-clock values."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- end to end ----------------------------------------------------------------------------------


def test_the_reward_script_writes_models_metrics_and_the_next_command(inputs, tmp_path, capsys):
    """Through main(config): two models, one row for each step, and one for the test."""
    result = train_reward.main(reward_config(inputs, tmp_path / "run"))
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock", "inputs"}
    assert names == {"base.pt", "reward.pt", "checkpoints", "config.json", "reward_metrics.jsonl"}
    assert [path.name for path in (tmp_path / "run" / "inputs").iterdir()] == ["bytes.tiktoken"]
    logged = raw_rows(tmp_path / "run" / "reward_metrics.jsonl")
    steps = [("sft", 3), ("reward", 4), ("test", 1)]
    assert [(row["stage"], row["step"]) for row in logged] == [
        (stage, step) for stage, count in steps for step in range(1, count + 1)
    ]
    for row in logged[:-1]:
        assert row.keys() >= {"loss", "grad_norm", "lr", "seconds"} and row["seconds"] > 0
    assert logged[-1]["accuracy"] == pytest.approx(result["accuracy"])
    output = capsys.readouterr().out
    assert "train: kept 28 of 28 pairs" in output
    assert f"python train_policy.py --reward-run {tmp_path / 'run'}" in output


def test_all_metrics_of_a_reward_model_are_printed():
    metrics = dict(accuracy=0.75, accuracy_low=0.7, accuracy_high=0.8, pairs=9, prompts=3)
    metrics |= dict(calibration_error=0.125, ceiling=0.875, gold_correlation=0.5)
    lines = train_reward.format_metrics(metrics | dict(probes={"twice": (0.25, 4)})).splitlines()
    assert lines == [
        "test accuracy 0.750 [0.700, 0.800] over 9 pairs of 3 prompts, calibration error 0.125",
        "a reward model equal to the gold utility would reach 0.875 on average, because the "
        "annotator makes errors",
        "correlation with gold utility 0.500",
        "probes: the best response is ranked above the same response with one defect",
        "  twice                 25.0%  of 4",
    ]


def test_the_first_preference_loss_in_the_log_is_ln_2(reward_run):
    """A new reward head gives every response the same score; any other loss is a bug."""
    logged = rows(reward_run / "reward_metrics.jsonl")
    first = next(row for row in logged if row["stage"] == "reward")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["accuracy"] == 0.5


def test_training_lowers_both_losses(reward_run):
    """On 40 pairs, both fine-tuning and the reward stage must learn easily."""
    logged = rows(reward_run / "reward_metrics.jsonl")
    for stage, factor in (("sft", 0.5), ("reward", 0.8)):
        losses = [row["loss"] for row in logged if row["stage"] == stage]
        assert losses[-1] < factor * losses[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_runs_and_logs_everything(
    algorithm, reward_run, tmp_path, monkeypatch, capsys
):
    """Two iterations through main(config).

    All metrics of the loss are logged, and the current kl_coef is used and logged.
    """
    computed = set()

    def recording_loss(*arguments):
        loss, metrics = minibatch_loss(*arguments)
        computed.update(metrics)
        return loss, metrics

    monkeypatch.setattr(train_policy, "minibatch_loss", recording_loss)
    config = policy_config(
        reward_run,
        tmp_path / "run",
        algorithm=algorithm,
        kl_target=0.01,
        kl_horizon=10,
        eval_every=2,
        temperature=0.9,
    )
    result = train_policy.main(config)
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == tiny.POLICY_FILES
    initial, *iterations = raw_rows(tmp_path / "run" / "policy_metrics.jsonl")
    assert initial["step"] == 0 and [row["step"] for row in iterations] == [1, 2]
    assert computed and len(iterations) == 2
    for row in iterations:
        assert row.keys() >= LOGGED | DURATIONS | computed
        assert all(value is not None and math.isfinite(value) for value in row.values())
        in_reward = row["kl_coef"] if ALGORITHMS[algorithm].kl_in_reward else 0.0
        assert row["total_reward"] == pytest.approx(row["score"] - in_reward * row["kl"], abs=1e-5)
        assert 1.0 <= row["length"] <= 5.0
        assert 0.0 <= row["eos_rate"] <= 1.0
        assert 0.0 < row["entropy"] < math.log(257)
    assert iterations[0]["kl_coef"] == config.kl_coef != iterations[1]["kl_coef"]
    assert abs(iterations[0]["kl"]) < 1e-6  # the policy starts as the reference
    assert iterations[1]["kl"] != 0.0
    for row in (initial, iterations[-1]):
        names = ("score", "gold", "kl", "length", "eos_rate", "win_rate", "win_low", "win_high")
        assert row.keys() >= {
            f"eval_{decoding}_{name}" for decoding in ("sampled", "greedy") for name in names
        }
    assert initial["eval_sampled_kl"] == initial["eval_greedy_kl"] == 0.0
    assert not any(key.startswith("eval") for key in iterations[0])
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["sampled_gold"] == pytest.approx(result["sampled_gold"])
    output = capsys.readouterr()
    assert output.err == "" and "\r" not in output.out and "iteration 2/2  score " in output.out
    assert (tmp_path / "run" / "samples.md").read_text() in output.out


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_with_a_learning_rate_of_0_ratios_stay_1_and_weights_stay_the_same(
    algorithm, reward_run, tmp_path
):
    """A ratio other than 1 means that the policy is not measured as the learner computes it."""
    train_policy.main(
        policy_config(
            reward_run,
            tmp_path / "run",
            algorithm=algorithm,
            lr=0.0,
            ppo_epochs=3,
            micro_batch_size=3,
            temperature=0.8,
            ent_coef=0.01,
        )
    )
    for row in rows(tmp_path / "run" / "policy_metrics.jsonl")[1:]:
        assert row["ratio"] == pytest.approx(1.0, abs=1e-6) and abs(row["approx_kl"]) < 1e-9
        assert row["clip_fraction"] == 0.0 and abs(row["kl"]) < 1e-6 and row["grad_norm"] > 0
    policy = tiny.weights(tmp_path / "run" / "policy.pt", "policy")
    base = tiny.weights(reward_run / "base.pt", "base")
    assert all(torch.equal(policy[name], base[name]) for name in base)


# ---- the stages of an iteration ------------------------------------------------------------------


def record_calls(monkeypatch, names, module=train_policy):
    """name -> [(arguments, result), ...] of these functions of the module, recorded from now."""
    calls = {name: [] for name in names}

    def wrap(name, function):
        def recording(*arguments):
            result = function(*arguments)
            calls[name].append((arguments, result))
            return result

        return recording

    for name in names:
        monkeypatch.setattr(module, name, wrap(name, getattr(module, name)))
    return calls


def test_each_stage_of_an_iteration_gets_the_result_of_the_one_before(
    reward_run, tmp_path, monkeypatch
):
    """The loop of train_policy.main, in two iterations.

    The policy's samples are scored and measured, their rewards give the advantages, and these
    update the policy.
    """
    stages = ("sample", "score", "measure", "token_rewards", "estimate_advantages", "update")
    calls = record_calls(monkeypatch, ("load_task", *stages, "describe"))
    config = policy_config(
        reward_run, tmp_path / "run", temperature=0.3, kl_target=0.01, kl_horizon=10
    )
    train_policy.main(config)
    (((config, *_), task),) = calls["load_task"]
    counts = {name: len(calls[name]) for name in (*stages, "describe")}
    assert counts == {name: 4 if name == "measure" else 2 for name in counts}
    logged = rows(tmp_path / "run" / "policy_metrics.jsonl")[1:]
    for step in range(config.iterations):
        (policy, prompts, settings, sampled_step), samples = calls["sample"][step]
        assert settings is task.sampling and sampled_step == step
        assert prompts == prompts_of_step(task.train, config.batch_size, 1, config.seed, step)
        assert samples.prompts == prompts.texts

        (reward, scored), scores = calls["score"][step]
        assert reward is task.reward and scored is samples
        of_policy, of_reference = calls["measure"][2 * step : 2 * step + 2]
        (model, measured, measure_config), (logprobs, values) = of_policy
        assert model is policy and measured is samples and measure_config is config
        (model, measured, measure_config), (ref_logprobs, _) = of_reference
        assert model is task.base and measured is samples and measure_config is config
        assert policy is not task.base

        kl_coef = logged[step]["kl_coef"]
        arguments, rewards = calls["token_rewards"][step]
        assert arguments[0] is scores
        assert arguments[1] is logprobs and arguments[2] is ref_logprobs
        assert arguments[3] is samples.response_mask
        assert arguments[4] == pytest.approx(kl_coef, rel=1e-6)  # logged with 7 digits

        (algorithm, rollout, estimate_config), estimated = calls["estimate_advantages"][step]
        assert algorithm is ALGORITHMS[config.algorithm] and estimate_config is config
        assert rollout.samples is samples and rollout.scores is scores
        assert rollout.logprobs is logprobs and rollout.ref_logprobs is ref_logprobs
        assert rollout.values is values and rollout.rewards is rewards
        assert rollout.kl_coef == arguments[4]

        arguments, metrics = calls["update"][step]
        learner, optimizer, updated, update_config, updated_step, length = arguments
        assert learner is policy and updated is estimated and update_config is config
        assert set(optimizer.param_groups[0]["params"]) <= set(policy.parameters())
        assert updated_step == step
        assert length == task.sampling.max_response_length == 5
        assert (estimated.advantages != 0).any()

        (described, ground_truth, gamma), description = calls["describe"][step]
        assert described is estimated and ground_truth is task.ground_truth
        assert gamma == config.gamma
        for key, value in (metrics | description).items():
            assert logged[step][key] == pytest.approx(value, rel=1e-6)
    first, second = (samples for _, samples in calls["sample"])
    assert first.prompts != second.prompts
    assert first.response_ids.shape[1] < 5  # so the length above is not that of the batch
    assert logged[0]["kl_coef"] != logged[1]["kl_coef"]


def test_the_smallest_minibatch_needs_a_row_for_each_process(reward_run, tmp_path, monkeypatch):
    """The check comes before any work."""
    checked = []

    def check(config, device, count, what):
        checked.append((count, what))
        raise UserError("too many processes")

    monkeypatch.setattr(train_policy, "check_processes", check)
    config = policy_config(reward_run, tmp_path / "run", batch_size=8, minibatch_size=3)
    with pytest.raises(UserError, match="too many"):
        train_policy.main(config)
    assert checked == [(2, "the smallest minibatch")]
    assert not (tmp_path / "run").exists()


def test_evaluations_during_training_use_held_out_prompts(reward_run):
    task = load_task(policy_config(reward_run, ""), None, torch.device("cpu"))
    part = [task.train.rows([row, row + 1]) for row in (0, 2, 4)]
    task = task._replace(train=part[0], heldout=part[1], test=part[2])
    config = policy_config(reward_run, "", eval_prompts=1)
    assert train_policy.make_evaluator(task, config).prompts == part[1].first(1)


def test_each_stage_of_the_reward_script_gets_its_own_data(inputs, tmp_path, monkeypatch):
    """Both models learn from the training data, which also sets the scale of the scores.

    The metrics are those of the test data.
    """
    letters = dict(data="abcd", heldout_data="efgh", test_data="ijkl")
    for name, prompts in letters.items():
        lines = [dict(prompt=f"{letter}:", chosen=" x", rejected=" y") for letter in prompts]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    stages = ("finetune", "learn_preferences", "normalize_scores", "evaluate_reward_model")
    calls = record_calls(monkeypatch, (*stages, "evaluate_probes"), train_reward)
    files = {name: (str(tmp_path / name),) for name in letters}
    train_reward.main(reward_config(inputs, tmp_path / "reward", **files))
    arguments = {name: made[0][0] for name, made in calls.items()}
    for stage, data in dict(zip(stages, ("data", "data", "data", "test_data"))).items():
        seen = arguments[stage][2 if stage == "normalize_scores" else 1]
        prompts = seen.ids if stage == "normalize_scores" else [group.prompt for group in seen]
        assert sorted(bytes(ids).decode() for ids in prompts) == [f"{x}:" for x in letters[data]]
    assert sorted(arguments["evaluate_probes"][1]) == [f"{x}:" for x in letters["test_data"]]


def test_phases_wait_for_the_gpu(reward_run, tmp_path, monkeypatch):
    """Its work is asynchronous: the time of one phase would be counted in the next one."""
    waits = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    train_policy.main(policy_config(reward_run, tmp_path / "run", iterations=1))
    phases = [key for key in raw_rows(tmp_path / "run/policy_metrics.jsonl")[1] if "seconds" in key]
    assert len(waits) == len([key for key in phases if key.startswith("seconds_")]) == 4


def test_smallest_of_everything(inputs, tmp_path):
    """One response of one token, one prompt to evaluate: standard errors of one number are null."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "{letter}", "chosen": "x", "rejected": "y"}}\n' for letter in "abc")
    )
    train_reward.main(
        reward_config(
            inputs,
            tmp_path / "reward",
            data=(str(path),),
            max_prompt_length=1,
            max_response_length=1,
            d_model=2,
            n_head=1,
            batch_size=1,
            sft_batch_size=1,
            sft_sequences=2,
            normalize_prompts=2,
            holdout=0.01,
        )
    )
    train_policy.main(
        policy_config(
            tmp_path / "reward",
            tmp_path / "run",
            batch_size=1,
            minibatch_size=1,
            eval_prompts=1,
            test_prompts=1,
            best_of_n=1,
            iterations=2,
        )
    )
    initial, *_, last = raw_rows(tmp_path / "run" / "policy_metrics.jsonl")
    assert initial["eval_sampled_score_se"] is None and last["length"] == last["tokens"] == 1.0
    text = (tmp_path / "run" / "result.json").read_text()
    result = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
    assert result["sampled_score_se"] is None


def test_the_embedded_task_runs_with_its_own_files(tmp_path, monkeypatch):
    """Small parts of the default data, with its tokenizer and ground truth.

    Probes are longer than the context of this small model.
    """
    records = (tiny.ROOT / "data" / "helpdesk-test.jsonl").read_text().splitlines(keepends=True)
    for number, split in enumerate(("data", "heldout_data", "test_data")):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(records[number * 20 : number * 20 + 20]))
        monkeypatch.setitem(splits.HELPDESK_FILES, split, (str(path),))
    shared = dict(device="cpu", seed=1)
    result = train_reward.main(
        RewardConfig(
            out=str(tmp_path / "reward"),
            n_layer=1,
            n_head=1,
            d_model=8,
            max_response_length=32,
            sft_sequences=64,
            normalize_prompts=8,
            **shared,
        )
    )
    assert 0.7 < result["ceiling"] < 1.0
    assert len(result["probes"]) > 10
    assert result["probes"]["wrong action"][1] == 20
    metrics = train_policy.main(
        PolicyConfig(
            reward_run=str(tmp_path / "reward"),
            out=str(tmp_path / "policy"),
            iterations=1,
            batch_size=8,
            eval_prompts=4,
            test_prompts=4,
            best_of_n=0,
            **shared,
        )
    )
    assert 5.0 < metrics["best_gold"] <= 6.2 + 1e-9 and "greedy_gap_closed" in metrics


def test_other_data_needs_no_ground_truth(inputs, tmp_path, capsys):
    """Without a gold utility, responses are compared by their score, and the table says so."""
    train_reward.main(reward_config(inputs, tmp_path / "reward", task="none"))
    train_policy.main(policy_config(tmp_path / "reward", tmp_path / "run", task="", best_of_n=2))
    output = capsys.readouterr().out
    assert "by score (the task has no gold utility)" in output
    assert "best possible" not in output
    head = next(line for line in output.splitlines() if "win_low" in line)
    assert head.split()[:3] == ["score", "kl", "kl_bound"]  # no empty column
    assert "the test pairs are the held-out pairs again: there is no --test-data" in output
    logged = rows(tmp_path / "run" / "policy_metrics.jsonl")
    assert not any("gold" in key for row in logged for key in row)


def test_fine_tuning_is_skipped_with_a_base_model_from_a_file(inputs, reward_run, tmp_path, capsys):
    """--init uses a base.pt as it is; one with too short a context is refused in one line."""
    train_reward.main(
        reward_config(
            inputs, tmp_path / "run", init=str(reward_run / "base.pt"), max_response_length=4
        )
    )
    assert_same_weights(tmp_path / "run" / "base.pt", reward_run / "base.pt", "base")
    assert {row["stage"] for row in rows(tmp_path / "run" / "reward_metrics.jsonl")} == {
        "reward",
        "test",
    }
    flags = as_flags(
        reward_config(
            inputs, tmp_path / "long", init=str(reward_run / "base.pt"), max_response_length=6
        )
    )
    assert "base.pt: its context of 11 tokens" in refused(
        capsys, train_reward.main, RewardConfig, flags
    )


def test_training_continues_from_an_earlier_reward_model(inputs, reward_run, tmp_path, capsys):
    """Training continues on its scale before normalization.

    If scores were normalized twice, they would have another unit, and the first loss would be that
    of another model. With a learning rate of 0 the reward model and the base model do not change.
    """
    earlier = str(reward_run / "reward.pt")
    train_reward.main(
        reward_config(inputs, tmp_path / "still", init_reward=earlier, lr=0.0, normalize_prompts=14)
    )
    assert_same_weights(tmp_path / "still" / "base.pt", reward_run / "base.pt", "base")
    assert_same_weights(tmp_path / "still" / "reward.pt", reward_run / "reward.pt", "reward")
    train_reward.main(reward_config(inputs, tmp_path / "more", init_reward=earlier, epochs=2))
    logged = [
        row for row in rows(tmp_path / "more" / "reward_metrics.jsonl") if row["stage"] != "test"
    ]
    losses = [
        row["loss"] for row in rows(reward_run / "reward_metrics.jsonl") if row["stage"] == "reward"
    ]
    assert {row["stage"] for row in logged} == {"reward"} and logged[0]["loss"] < 0.9 * losses[0]
    for name, words in (
        ("base.pt", "contains a base model, not a reward model"),
        ("none.pt", "none.pt: No such file"),
    ):
        flags = as_flags(
            reward_config(inputs, tmp_path / "bad", init_reward=str(reward_run / name))
        )
        assert words in refused(capsys, train_reward.main, RewardConfig, flags)
        assert not (tmp_path / "bad").exists()


# ---- a reward function of the user ---------------------------------------------------------------


def test_a_reward_function_replaces_the_reward_model(reward_run, tmp_path, monkeypatch, capsys):
    """It is given as an argument or by name.

    It gets the texts of prompts and responses; its number is the score.
    """
    calls = []

    def score(prompts, responses):
        calls.append((prompts, responses))
        return tiny.letters_right(prompts, responses)

    train_policy.main(
        policy_config(reward_run, tmp_path / "argument", missing_eos_penalty=0.5),
        reward_function=score,
    )
    assert "reward: score" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    train_policy.main(
        policy_config(
            reward_run, tmp_path / "name", missing_eos_penalty=0.5, reward="tiny:letters_right"
        )
    )
    assert_same_weights(
        tmp_path / "argument" / "policy.pt", tmp_path / "name" / "policy.pt", "policy"
    )
    prompts, responses = next((p, r) for p, r in calls if len(p) == 8)  # the first rollout
    row = rows(tmp_path / "name" / "policy_metrics.jsonl")[1]
    expected = sum(tiny.letters_right(prompts, responses)) / 8 - 0.5 * (1 - row["eos_rate"])
    assert row["score"] == pytest.approx(expected, abs=1e-5)
    assert all(prompt[0] in tiny.LETTERS and prompt.endswith(":") for prompt in prompts)


@pytest.mark.parametrize(
    "reward",
    [
        lambda prompts, responses: torch.ones(len(responses), dtype=torch.float64),
        lambda prompts, responses: [1] * len(responses),
        functools.partial(lambda bonus, prompts, responses: [bonus] * len(responses), 2.0),
        type(
            "LengthReward",
            (),
            {"__call__": lambda self, prompts, responses: tuple(map(float, map(len, responses)))},
        )(),
    ],
    ids=["tensor", "ints", "partial", "object"],
)
def test_any_callable_that_returns_numbers_can_be_the_reward(reward, reward_run, tmp_path):
    """A partial and an object have no __name__, but they work."""
    train_policy.main(
        policy_config(reward_run, tmp_path / "run", iterations=1), reward_function=reward
    )


def raising(prompts, responses):
    raise RuntimeError("first line\nsecond \x1b[31mline")


def exiting(prompts, responses):
    """As the main() of another program does."""
    sys.exit(0)


@pytest.mark.parametrize(
    "reward, words",
    [
        (raising, r"raising raised RuntimeError: first line second \x1b[31mline"),
        (exiting, "exiting raised SystemExit: 0"),
        (lambda prompts, responses: [0.0], "returned shape (1,); it must be (4,)"),
        (lambda prompts, responses: 0.0, "returned shape (); it must be (4,)"),
        (lambda prompts, responses: [[0.0]] * 4, "returned shape (4, 1); it must be (4,)"),
        (lambda prompts, responses: [0.0, float("nan"), 0.0, 0.0], "returned nan for response 1"),
        (lambda prompts, responses: [0.0, 0.0, float("-inf"), 0.0], "returned -inf for response 2"),
        (lambda prompts, responses: ["a"] * 4, "returned ['a', 'a', 'a', 'a']; it must return one"),
        (lambda prompts, responses: None, "returned None; it must return one number for each"),
        (lambda prompts, responses: [None] * 4, "returned [None, None, None, None]; it must"),
        (lambda prompts, responses: {"a": 1.0}, "returned {'a': 1.0}; it must return one number"),
        (lambda: [], "raised TypeError"),
    ],
)
def test_a_reward_function_that_fails_is_one_line(reward, words, reward_run, tmp_path, capsys):
    """A NaN would be in every weight one step later; a traceback would not name the function."""
    main = functools.partial(train_policy.main, reward_function=reward)
    message = refused(
        capsys, main, PolicyConfig, as_flags(policy_config(reward_run, tmp_path / "run"))
    )
    assert words in message and "\x1b" not in message


@pytest.mark.parametrize(
    "reward, words",
    [
        ("tiny", "write module:function"),
        ("tiny:", "write module:function"),
        ("tiny:nothing", "no such function"),
        ("tiny:LETTERS", "no such function"),
        ("nowhere:score", "No module named 'nowhere'; start in the folder of the module, or write"),
        ("needs.py:score", "No module named 'nowhere' (needs.py:1)\n"),
        (":score", "its import raised"),
        ("broken:score", "its import raised ZeroDivisionError"),
        ("ends.py:score", "its import raised SystemExit: 0"),
    ],
)
def test_a_reward_that_cannot_be_found_is_one_line(
    reward, words, reward_run, tmp_path, monkeypatch, capsys
):
    """The function is looked up before any work; no folder is created."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "ends.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "needs.py").write_text("import nowhere\n")
    monkeypatch.chdir(tmp_path)
    flags = as_flags(policy_config(reward_run, tmp_path / "run", reward=reward))
    modules = set(sys.modules)
    assert words in refused(capsys, train_policy.main, PolicyConfig, flags)
    assert not (tmp_path / "run").exists()
    assert not {"broken", "ends", "needs", "nowhere"} & (set(sys.modules) - modules)


OWN_FILE = """
from __future__ import annotations

import dataclasses
import multiprocessing
import pickle


@dataclasses.dataclass
class Length:
    weight: float = 1.0

    def of(self, response: str) -> float:
        return self.weight * len(response)


def score(prompts, responses):
    length = pickle.loads(pickle.dumps(Length(2.0)))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(length.of, responses)
"""


@pytest.mark.parametrize("name", ["own.py", "json.py"])
def test_the_file_of_a_reward_function_is_a_whole_module(name, tmp_path, monkeypatch):
    """Dataclasses and pickle look for it in sys.modules, without replacing Python's own."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(OWN_FILE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for weight in (2.0, 3.0):  # a second run in the same Python session reads the file again
        assert splits.load_function(f"{name}:score", "--reward")(["a", "a"], ["", "bcd"]) == [
            0,
            3 * weight,
        ]
        Path(name).write_text(OWN_FILE.replace("Length(2.0)", "Length(3.0)"))
    assert sys.modules["json"] is json
    assert sys.modules.pop("own" if name == "own.py" else "json_").__file__ == os.path.abspath(name)


@pytest.mark.parametrize("place", ["function", "import"])
def test_a_signal_during_the_users_code_stops_the_run(place, reward_run, tmp_path, capsys):
    """The exit that it causes is not an error of the user's function."""
    signal_itself = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n"
    content = signal_itself if place == "import" else "import os, signal\n"
    content += "def score(prompts, responses):\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    (tmp_path / "own.py").write_text(content)
    reward = f"{tmp_path / 'own.py'}:score"
    flags = as_flags(policy_config(reward_run, tmp_path / "run", reward=reward))
    assert ending(train_policy.main, PolicyConfig, flags) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.startswith("error: stopped; ")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "cannot be read (No such file"),
        (b"", "no usable record"),
        (b"\n\n", "no usable record"),
        (b"nonsense\n", ":1: the record is not strict JSON"),
        (b'{"prompt": "a", "chosen": "b"}\n', ':1: the key "rejected" is missing'),
        (b"\x1f\x8b\x08 torn", ":1: after this line"),
        (
            b'{"prompt": "a:", "chosen": "b", "rejected": "b"}\n'
            b'{"prompt": "b:", "chosen": "b", "rejected": "b"}\n'
            b'{"prompt": "c:", "chosen": "b", "rejected": "b"}\n',
            "no usable pair",
        ),
        (b'{"prompt": "a:", "chosen": "b", "rejected": "c"}\n', "because some are held out"),
        (
            b'{"prompt": "\x1b[31m", "chosen": 3, "rejected": "c"}\n',
            ":1: the record is not strict JSON",
        ),
    ],
)
def test_bad_data_is_one_line_and_creates_no_folder(content, words, inputs, tmp_path, capsys):
    """So the same command works once the file is fixed."""
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    flags = as_flags(reward_config(inputs, tmp_path / "run", data=(str(path),)))
    message = refused(capsys, train_reward.main, RewardConfig, flags)
    assert words in message
    assert str(path) in message or words in ("no usable pair", "because some are held out")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(data=("{tmp}",)), "Is a directory"),
        (dict(tokenizer="{tmp}/none.tiktoken"), "No such file"),
        (dict(tokenizer="helpdesc"), "did you mean helpdesk"),
        (dict(init="{tmp}/base.pt"), "no such file or folder"),
        (dict(init="{inputs}/pairs.jsonl"), "not a checkpoint"),
        (dict(init="{reward_run}/reward.pt"), "contains a reward model, not a base model"),
        (
            dict(init="{reward_run}/base.pt", tokenizer="helpdesk", max_prompt_length=4),
            "another tokenizer",
        ),
        (dict(task="nowhere"), "--task nowhere: its import raised"),
        (dict(holdout=0.001), "--holdout must be from 0.01 to 0.9, not 0.001"),
    ],
)
def test_a_reward_run_with_missing_or_wrong_inputs_is_one_line(
    changes, words, inputs, reward_run, tmp_path, capsys
):
    """The line names the file or the flag, and what to do; no folder is created."""

    def fill(value):
        if isinstance(value, tuple):
            return tuple(map(fill, value))
        if isinstance(value, str):
            return value.format(tmp=tmp_path, inputs=inputs, reward_run=reward_run)
        return value

    changes = {name: fill(value) for name, value in changes.items()}
    flags = as_flags(reward_config(inputs, tmp_path / "run", **changes))
    assert words in refused(capsys, train_reward.main, RewardConfig, flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda run: (run / "reward.pt").unlink(),
            "reward.pt: No such file or directory; is this the folder of a finished run?",
        ),
        (lambda run: (run / "base.pt").unlink(), "base.pt: No such file"),
        (lambda run: (run / "config.json").unlink(), "config.json: No such file or directory; is "),
        (lambda run: (run / "config.json").write_text("{"), "config.json: not a configuration"),
        (
            lambda run: (run / "reward.pt").write_bytes((run / "reward.pt").read_bytes()[:-1000]),
            "reward.pt: incomplete",
        ),
        (
            lambda run: (run / "reward.pt").write_bytes((run / "base.pt").read_bytes()),
            "contains a base model, not a reward model",
        ),
        (
            lambda run: (run / "base.pt").write_bytes(b"\x00" + (run / "base.pt").read_bytes()[1:]),
            "base.pt: damaged",
        ),
    ],
)
def test_an_incomplete_or_damaged_reward_run_is_one_line(
    damage, words, inputs, reward_run, tmp_path, capsys
):
    """The run is not finished, or its files were damaged when they were copied."""
    run = tmp_path / "reward"
    run.mkdir()
    for name in ("config.json", "base.pt", "reward.pt"):
        (run / name).write_bytes((reward_run / name).read_bytes())
    damage(run)
    assert words in refused(
        capsys, train_policy.main, PolicyConfig, as_flags(policy_config(run, tmp_path / "run"))
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--reward-run", "nowhere"], "nowhere/config.json: No such file"),
        ([], "no finished reward run under runs/"),
        (["--prompts", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--max-response-length", "6"], "--max-response-length 6"),
    ],
)
def test_a_policy_run_with_missing_or_wrong_inputs_is_one_line(
    flags, words, reward_run, tmp_path, monkeypatch, capsys
):
    """A common mistake is to run the two commands of the README in the wrong order."""
    monkeypatch.chdir(tmp_path)
    if flags and flags[0] != "--reward-run":
        flags = [*flags, "--reward-run", str(reward_run), *tiny.MODULES]
    assert words in refused(capsys, train_policy.main, PolicyConfig, flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "main, config_class", [(train_reward.main, RewardConfig), (train_policy.main, PolicyConfig)]
)
def test_an_existing_folder_is_refused_and_untouched(main, config_class, inputs, tmp_path, capsys):
    """A second run with the same --out must not overwrite the first one.

    It is refused before data is read, which can take minutes: the data does not exist.
    """
    for name in ("run", "file"):
        out = tmp_path / name
        if name == "run":
            out.mkdir()
            (out / "thesis.txt").write_text("the only copy")
        else:
            out.write_text("the only copy")
        if config_class is RewardConfig:
            config = reward_config(inputs, out, data=("absent.jsonl",))
        else:
            config = policy_config("absent", out)
        message = refused(capsys, main, config_class, as_flags(config))
        assert f"{out}: already exists; add --resume" in message
    assert contents(tmp_path) == {"run/thesis.txt": b"the only copy", "file": b"the only copy"}


def test_the_other_kind_of_folder_is_named(reward_run, policy_run, tmp_path, capsys):
    """The internals of a configuration, or the advice to start anew, would not help."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2"}')
    policy = "is a run of train_policy.py; name one of train_reward.py"
    reward = "is a run of train_reward.py; name one of train_policy.py"
    for config_class, flag, folder, words in (
        (PolicyConfig, "--reward-run", policy_run, policy),
        (PolicyConfig, "--out", reward_run, reward),
        (RewardConfig, "--out", policy_run, policy),
        (PolicyConfig, "--reward-run", model, "not that of a run; name a run"),
    ):
        main = train_policy.main if config_class is PolicyConfig else train_reward.main
        flags = [flag, str(folder)] + (["--resume"] if flag == "--out" else [])
        message = refused(capsys, main, config_class, flags)
        assert message.startswith(f"error: {folder}") and words in message


def test_a_large_kl_after_the_last_iteration_is_a_warning(reward_run, tmp_path, capsys):
    """The check of the loop measures each rollout before its update."""
    train_policy.main(policy_config(reward_run, tmp_path / "run", iterations=1, lr=0.3, max_kl=0.5))
    assert "warning: the KL exceeds --max-kl 0.5: try a lower --lr" in capsys.readouterr().out


def test_an_exploding_kl_stops_with_advice(reward_run, tmp_path, capsys):
    """Scores mean nothing for a policy that no longer writes language; a checkpoint is kept."""
    flags = as_flags(policy_config(reward_run, tmp_path / "run", iterations=9, lr=0.3, max_kl=0.5))
    message = refused(capsys, train_policy.main, PolicyConfig, flags)
    assert "--max-kl 0.5; raise --kl-coef or lower --lr" in message
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("stage, target", [("sft", "language_model_loss"), ("reward", "pair_loss")])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(
    stage, target, inputs, tmp_path, monkeypatch, capsys
):
    """The message names stage and step; the last checkpoint is that of the step before."""
    real = getattr(train_reward, target)
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        result = real(*arguments)
        if len(calls) != 3:
            return result
        if stage == "reward":
            return result[0] * math.nan, dict(result[1], loss=result[1]["loss"] * math.nan)
        return result * math.nan

    monkeypatch.setattr(train_reward, target, failing)
    flags = as_flags(reward_config(inputs, tmp_path / "run", save_every=1))
    message = refused(capsys, train_reward.main, RewardConfig, flags)
    assert f"{stage} step 3: the loss is nan" in message
    path = tmp_path / "run" / "checkpoints" / f"{stage}-00000002.pt"
    _, states = tiny.load_checkpoint(path, stage)
    assert all(tensor.isfinite().all() for tensor in states["model"].values())
    logged = rows(tmp_path / "run" / "reward_metrics.jsonl")
    assert [row["step"] for row in logged if row["stage"] == stage] == [1, 2]


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        ("train_reward.py", ["--data", "none.jsonl"], "error: none.jsonl:"),
        (
            "train_policy.py",
            ["--itarations", "3"],
            "error: unknown argument --itarations; did you mean --iterations?",
        ),
    ],
)
def test_the_real_command_line_prints_one_error_line(script, arguments, words, tmp_path):
    """One line on stderr, exit status 2, and no file."""
    process = subprocess.run(
        [sys.executable, str(tiny.ROOT / script), *arguments],
        cwd=tmp_path,
        env=tiny.environment(),
        text=True,
        capture_output=True,
    )
    assert process.returncode == 2 and process.stdout in ("", "reading the data\n")
    assert process.stderr.startswith(words) and process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---- the terminal --------------------------------------------------------------------------------


HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m\r"


def test_control_sequences_of_data_and_model_are_escaped(inputs, tmp_path, capsys):
    """A prompt could clear the screen, change the window title or reverse the text.

    Neither the terminal nor samples.md gets such a sequence.
    """
    pairs = [
        dict(prompt=f"{HOSTILE}{i}:", chosen=HOSTILE, rejected=f"{HOSTILE}\x1b[{i}m")
        for i in range(20)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train_reward.main(
        reward_config(
            inputs,
            tmp_path / "reward",
            data=(str(path),),
            task="none",
            max_prompt_length=40,
            max_response_length=30,
            sft_sequences=320,
            epochs=2,
        )
    )
    train_policy.main(policy_config(tmp_path / "reward", tmp_path / "run", task=""))
    output = capsys.readouterr()
    page = (tmp_path / "run" / "samples.md").read_text()
    for text in (output.out, output.err, page):
        assert not set(text) & set("\x1b\x07\x9b\u202e\r")
    assert (
        r"\x1b]0;owned\x07\x1b[2J\u202e\x9b31m\r" in output.out
        and r"\x1b" in page.partition("**before**")[2]
    )


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain, \u00fc, \u65e5\u672c, \U0001f600", "plain, \u00fc, \u65e5\u672c, \U0001f600"),
        ("two\nlines", "two\nlines"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x00\x07\x7f\x9b", r"\x00\x07\x7f\x9b"),
        ("a\rb\tc", r"a\rb\tc"),
        ("\u202e\u2066\ufeff", r"\u202e\u2066\ufeff"),
        ("\ud800", r"\ud800"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("", ""),
    ],
)
def test_printable_escapes_control_characters_and_keeps_all_others(text, shown):
    """Every category of characters that can change what a terminal shows is escaped."""
    assert printable(text) == shown


class FakeTerminal:
    def __init__(self, tty):
        self.tty = tty
        self.text = ""

    def isatty(self):
        return self.tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def show_progress(monkeypatch, tty, text="loss 0.5", total=40):
    terminal = FakeTerminal(tty)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((30, 20)))
        progress = Progress("stage", total, plain_lines=4)
        for step in range(1, total + 1):
            progress.show(step, text)
    return terminal.text


def test_progress_is_a_few_plain_lines_without_a_terminal(monkeypatch):
    """A log file with carriage returns, or with 10,000 lines, is hard to read."""
    lines = show_progress(monkeypatch, False).splitlines()
    assert [line.split()[1] for line in lines] == ["10/40", "20/40", "30/40", "40/40"]
    assert all("loss 0.5" in line and line.endswith(" left") for line in lines)


def test_slow_steps_show_their_progress_every_minute(monkeypatch):
    """Four of 40 lines can be hours apart."""
    seconds = itertools.count(step=25.0)
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    lines = show_progress(monkeypatch, False).splitlines()
    assert [line.split()[1] for line in lines[:6]] == [f"{n}/40" for n in (3, 6, 9, 10, 13, 16)]


def test_progress_rewrites_one_line_on_a_terminal(monkeypatch):
    """A line as wide as the terminal would wrap, and every step would add a line."""
    text = show_progress(monkeypatch, True, "loss " + "0" * 100)
    assert text.count("\n") == 1 and text.endswith("\n")
    shown = text.rstrip("\n").split("\r")[1:]
    assert len(shown) == 40 and {len(line) for line in shown} == {29}


def test_metrics_are_valid_json_for_any_number(tmp_path):
    """NaN and Infinity are not JSON; a strict parser would stop at that line."""
    metrics = Metrics(tmp_path / "m.jsonl", None, tensorboard=False)
    metrics.write(dict(step=1, loss=1 / 3, inf=float("inf"), nan=float("nan"), name="\n\u00fc"))
    assert json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail) == dict(
        step=1, loss=0.3333333, inf=None, nan=None, name="\n\u00fc"
    )
    assert rounded(dict(a=True, b=7)) == dict(a=True, b=7)


def test_a_row_that_does_not_fit_on_the_disk_is_an_error(tmp_path):
    """A short write raises nothing by itself; the next row would follow on the same line."""
    metrics = Metrics(tmp_path / "m.jsonl", None, tensorboard=False)

    class AlmostFull:
        name = str(tmp_path / "m.jsonl")
        write = staticmethod(lambda line: len(line) - 3)

    metrics.file = AlmostFull()
    with pytest.raises(OSError, match="No space left"):
        metrics.write(dict(step=1))


def test_tensorboard_shows_the_numbers_of_the_metrics_file(reward_run, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_policy.main(policy_config(reward_run, tmp_path / "run", tensorboard=True, iterations=2))
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    accumulator = events.EventAccumulator(str(file.parent))
    accumulator.Reload()
    logged = rows(tmp_path / "run" / "policy_metrics.jsonl")[1:]
    for name in ("score", "kl", "loss"):
        shown = [
            (event.step, pytest.approx(event.value, rel=1e-6))
            for event in accumulator.Scalars(name)
        ]
        assert shown == [(row["step"], row[name]) for row in logged]


def test_a_missing_tensorboard_is_a_hint_and_not_an_error(
    reward_run, tmp_path, monkeypatch, capsys
):
    """It is optional: the jsonl file has the same metrics."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train_policy.main(policy_config(reward_run, tmp_path / "run", tensorboard=True, iterations=1))
    assert "--tensorboard: not installed" in capsys.readouterr().out


def test_each_stage_has_a_tensorboard_curve_of_its_own(tmp_path, monkeypatch):
    """Both stages of train_reward.py count from 1; under one name their curves would overlap."""
    scalars = []
    writer = types.SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar))
    monkeypatch.setattr("minirlhf.run.metrics.summary_writer", lambda folder: writer)
    metrics = Metrics(tmp_path / "m.jsonl", None, tensorboard=True)
    for row in (
        dict(stage="sft", step=1, loss=5.0),
        dict(stage="reward", step=1, loss=0.7),
        dict(step=2, score=1.0),
    ):
        metrics.write(row)
    assert scalars == [("sft/loss", 5.0, 1), ("reward/loss", 0.7, 1), ("score", 1.0, 2)]


def test_main_raises_user_error_instead_of_exiting(inputs, tmp_path):
    """A program of the user can call main(config) and catch the error."""
    with pytest.raises(UserError, match="No such file"):
        train_reward.main(reward_config(inputs, tmp_path / "none", resume=True))
    assert signal.getsignal(signal.SIGINT) is not None


def test_the_folder_is_unlocked_when_main_returns(reward_run, tmp_path):
    """A run can be resumed in the same process, for example in a notebook."""
    config = policy_config(reward_run, tmp_path / "run", iterations=1, lr_decay=False)
    train_policy.main(config)
    train_policy.main(dataclasses.replace(config, iterations=2, resume=True))
    assert len(rows(tmp_path / "run" / "policy_metrics.jsonl")) == 3


def test_the_time_left_does_not_include_the_evaluation_before_the_first_step(monkeypatch, capsys):
    """Otherwise the first estimates would be too long by that time for every step."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    progress = terminal.Progress("step", 10)
    now[0] = 1000.0
    progress.start_clock()
    now[0] = 1001.0
    progress.show(1, "")
    assert "0:00:09 left" in capsys.readouterr().out


def test_any_number_of_steps_has_a_time_left(monkeypatch, capsys):
    """Settings may be as large as int64; a duration of Python may not."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    progress = terminal.Progress("step", 2**63 - 1, plain_lines=2**63 - 1)
    now[0] = 1.0
    progress.show(1, "")
    assert "days" in capsys.readouterr().out


def test_training_data_with_one_prompt_is_an_error_before_training(inputs, tmp_path, capsys):
    """The standard deviation of one score is NaN, and scores would be divided by it."""
    path = tmp_path / "pairs.jsonl"
    pairs = inputs / "pairs.jsonl"
    path.write_text(pairs.read_text().splitlines()[0])
    files = dict(data=(str(path),), heldout_data=(str(pairs),))
    config = reward_config(inputs, tmp_path / "run", **files)
    error = tiny.refused(capsys, train_reward.main, RewardConfig, tiny.as_flags(config))
    assert "only one prompt" in error and not (tmp_path / "run").exists()


def test_a_model_that_is_not_finite_is_not_saved(tmp_path):
    """A later run would start from NaN weights without an error."""
    model = tiny.random_model()
    model.blocks[1].mlp_in.weight[3, 2] = math.nan
    with pytest.raises(
        UserError, match="not saved, because model blocks.1.mlp_in.weight is not finite"
    ):
        save_model(tmp_path / "policy.pt", "policy", model, {})
    assert not (tmp_path / "policy.pt").exists()


def test_a_model_whose_logits_overflow_is_one_line(inputs, reward_run, tmp_path, capsys):
    """Its weights are finite, so the file is valid. Sampling drew an id outside of the softmax."""
    shutil.copytree(reward_run, tmp_path / "reward")
    tokenizer = fingerprint(load_tokenizer(str(inputs / "bytes.tiktoken")))
    path = tmp_path / "reward" / "base.pt"
    model, meta = load_model(path, "base", tokenizer)
    with torch.no_grad():
        model.ln_f.weight.fill_(1e38)
        model.wte.weight.mul_(1e10)
    save_model(path, "base", model, meta)
    settings = dict(reward="tiny:letters_right")  # reward.pt does not belong to this base model
    flags = as_flags(policy_config(tmp_path / "reward", tmp_path / "run", **settings))
    message = refused(capsys, train_policy.main, PolicyConfig, flags)
    assert "the model's logits are not finite; try a smaller learning rate" in message
