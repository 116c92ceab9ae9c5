"""Both scripts from end to end, what they log, what they print, and how they answer bad input."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import types

import pytest
import tiny
import torch
from tiny import as_flags, assert_same_weights, contents, policy_config, refused, reward_config, rows

import train_policy
import train_reward
from minirlhf import task
from minirlhf.config import PolicyConfig, RewardConfig, UserError
from minirlhf.ladder import LADDER, minibatch_loss
from minirlhf.log import Metrics, Progress, duration, printable, rounded

# What every iteration logs, whatever the rung; phases of an iteration are seconds_*.
LOGGED = {"step", "samples", "score", "score_std", "kl", "kl_coef", "entropy", "total_reward", "approx_kl", "clip_fraction",
          "value_clip_fraction", "value_loss", "explained_variance", "return_mean", "return_std", "length", "eos_rate", "ratio",
          "grad_norm", "lr", "loss", "tokens"}
CLOCK = {"tokens_per_second", "seconds_sample", "seconds_score", "seconds_update"}


def raw_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- end to end ------------------------------------------------------------------------------------------------------


def test_the_reward_script_leaves_what_it_promises(inputs, tmp_path, capsys):
    """Through main(config): two models, a row for each step and one for the test, and the next command."""
    result = train_reward.main(reward_config(inputs, tmp_path / "run"))
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == {"base.pt", "reward.pt", "checkpoints", "config.json", "reward_metrics.jsonl"}
    found = raw_rows(tmp_path / "run" / "reward_metrics.jsonl")
    wanted = [("warmup", 3), ("reward", 4), ("test", 1)]
    assert [(row["stage"], row["step"]) for row in found] == [(stage, step) for stage, n in wanted for step in range(1, n + 1)]
    for row in found[:-1]:
        assert row.keys() >= {"loss", "grad_norm", "lr", "seconds"} and row["seconds"] > 0
    assert found[-1]["accuracy"] == pytest.approx(result["accuracy"])
    said = capsys.readouterr().out
    assert "train: kept 28 of 28 pairs" in said and f"python train_policy.py --reward-run {tmp_path / 'run'}" in said


def test_the_first_preference_loss_in_the_log_is_ln_2(reward_run):
    """The first thing to look at in a log of a reward model: anything else is a fault before the first step."""
    first = next(row for row in rows(reward_run / "reward_metrics.jsonl") if row["stage"] == "reward")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["accuracy"] == 0.5


def test_training_lowers_both_losses(reward_run):
    """The warm-up learns the language, the reward stage the preferences: on 40 pairs both must be easy."""
    for stage, factor in (("warmup", 0.5), ("reward", 0.8)):
        losses = [row["loss"] for row in rows(reward_run / "reward_metrics.jsonl") if row["stage"] == stage]
        assert losses[-1] < factor * losses[0]


@pytest.mark.parametrize("algorithm", LADDER)
def test_each_rung_runs_and_logs_everything(algorithm, reward_run, tmp_path, monkeypatch, capsys):
    """Two iterations through main(config); every figure that the loss computes reaches the log, and the live kl_coef does."""
    computed = set()

    def listening(*arguments):
        loss, figures = minibatch_loss(*arguments)
        computed.update(figures)
        assert (arguments[-1] is None) == LADDER[algorithm].reuses_rollout  # else the pass that measured the rollout serves
        return loss, figures

    monkeypatch.setattr(train_policy, "minibatch_loss", listening)
    config = policy_config(reward_run, tmp_path / "run", algorithm=algorithm, kl_target=0.01, kl_horizon=10, eval_every=2,
                           temperature=0.9)
    result = train_policy.main(config)
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == {"policy.pt", "samples.md", "result.json", "checkpoints", "config.json", "policy_metrics.jsonl"}
    opening, *iterations = raw_rows(tmp_path / "run" / "policy_metrics.jsonl")
    assert opening["step"] == 0 and [row["step"] for row in iterations] == [1, 2]
    assert computed and len(iterations) == 2
    for row in iterations:
        assert row.keys() >= LOGGED | CLOCK | computed
        assert all(value is not None and math.isfinite(value) for value in row.values())
        in_reward = row["kl_coef"] if LADDER[algorithm].kl_in_reward else 0.0
        assert row["total_reward"] == pytest.approx(row["score"] - in_reward * row["kl"], abs=1e-5)
        assert 1.0 <= row["length"] <= 5.0 and 0.0 <= row["eos_rate"] <= 1.0 and 0.0 < row["entropy"] < math.log(257)
    assert iterations[0]["kl_coef"] == config.kl_coef != iterations[1]["kl_coef"]
    assert abs(iterations[0]["kl"]) < 1e-6 and iterations[1]["kl"] != 0.0  # the policy starts as the reference, and leaves it
    for row in (opening, iterations[-1]):
        figures = ("score", "gold", "kl", "length", "eos_rate", "win_rate", "win_low", "win_high")
        assert row.keys() >= {f"eval_{decoding}_{key}" for decoding in ("sampled", "greedy") for key in figures}
    assert opening["eval_sampled_kl"] == opening["eval_greedy_kl"] == 0.0
    assert not any(key.startswith("eval") for key in iterations[0])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["sampled_gold"] == pytest.approx(result["sampled_gold"])
    said = capsys.readouterr()
    assert said.err == "" and "\r" not in said.out and "iteration 2/2  score " in said.out
    assert (tmp_path / "run" / "samples.md").read_text() in said.out


@pytest.mark.parametrize("algorithm", LADDER)
def test_a_learning_rate_of_0_moves_nothing_through_every_epoch(algorithm, reward_run, tmp_path):
    """A ratio that is not 1 before the first step means that sampling and learning disagree about the policy."""
    train_policy.main(policy_config(reward_run, tmp_path / "run", algorithm=algorithm, lr=0.0, ppo_epochs=3, micro_batch_size=3,
                                    temperature=0.8, ent_coef=0.01))
    for row in rows(tmp_path / "run" / "policy_metrics.jsonl")[1:]:
        assert row["ratio"] == pytest.approx(1.0, abs=1e-6) and abs(row["approx_kl"]) < 1e-9
        assert row["clip_fraction"] == 0.0 and abs(row["kl"]) < 1e-6 and row["grad_norm"] > 0
    policy, base = tiny.weights(tmp_path / "run" / "policy.pt", "policy"), tiny.weights(reward_run / "base.pt", "base")
    assert all(torch.equal(policy[name], base[name]) for name in base)


def test_smallest_of_everything(inputs, tmp_path):
    """One response of one token an iteration, one prompt to judge on: standard errors of one number must not end the run."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f'{{"prompt": "{letter}", "chosen": "x", "rejected": "y"}}\n' for letter in "abc"))
    train_reward.main(reward_config(inputs, tmp_path / "reward", data=(str(path),), max_prompt_length=1, max_response_length=1,
                                    d_model=2, n_head=1, batch_size=1, warmup_batch_size=1, warmup_sequences=2,
                                    normalise_prompts=2, holdout=0.01))
    train_policy.main(policy_config(tmp_path / "reward", tmp_path / "run", batch_size=1, minibatch_size=1, eval_prompts=1,
                                    test_prompts=1, best_of_n=1, iterations=2))
    opening, *_, last = raw_rows(tmp_path / "run" / "policy_metrics.jsonl")
    assert opening["eval_sampled_score_se"] is None and last["length"] == last["tokens"] == 1.0
    result = json.loads((tmp_path / "run" / "result.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert result["sampled_score_se"] is None


def test_the_embedded_task_runs_with_its_own_files(tmp_path, monkeypatch):
    """The default data, tokenizer and truth, a little of each; probes are longer than such a small model can read."""
    records = (tiny.ROOT / "data" / "helpdesk-test.jsonl").read_text().splitlines(keepends=True)
    for number, split in enumerate(("train", "heldout", "test")):
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(records[number * 20:number * 20 + 20]))
        monkeypatch.setitem(task.HELPDESK, split, str(path))
    shared = dict(device="cpu", seed=1)
    result = train_reward.main(RewardConfig(out=str(tmp_path / "reward"), n_layer=1, n_head=1, d_model=8, max_response_length=32,
                                            warmup_sequences=64, normalise_prompts=8, **shared))
    assert 0.7 < result["ceiling"] < 1.0 and len(result["probes"]) > 10 and result["probes"]["wrong action"][1] == 20
    figures = train_policy.main(PolicyConfig(reward_run=str(tmp_path / "reward"), out=str(tmp_path / "policy"), iterations=1,
                                             batch_size=8, eval_prompts=4, test_prompts=4, best_of_n=0, **shared))
    assert 5.0 < figures["best_gold"] <= 6.2 + 1e-9 and "greedy_gap_closed" in figures


def test_other_data_needs_no_truth(inputs, tmp_path, capsys):
    """Without a task there is no gold: the judge is the reward model, and is called so."""
    train_reward.main(reward_config(inputs, tmp_path / "reward", task="none"))
    train_policy.main(policy_config(tmp_path / "reward", tmp_path / "run", best_of_n=2))
    said = capsys.readouterr().out
    assert "judged by score, that is by the model it was trained on" in said and "best possible" not in said
    assert not any("gold" in key for row in rows(tmp_path / "run" / "policy_metrics.jsonl") for key in row)


def test_the_warm_up_is_skipped_with_a_model_brought_along(inputs, reward_run, tmp_path, capsys):
    """--init takes a base.pt as it is; one whose context is too short for the lengths asked for is refused in one line."""
    train_reward.main(reward_config(inputs, tmp_path / "run", init=str(reward_run / "base.pt"), max_response_length=4))
    assert_same_weights(tmp_path / "run" / "base.pt", reward_run / "base.pt", "base")
    assert {row["stage"] for row in rows(tmp_path / "run" / "reward_metrics.jsonl")} == {"reward", "test"}
    flags = as_flags(reward_config(inputs, tmp_path / "long", init=str(reward_run / "base.pt"), max_response_length=6))
    assert "base.pt: its context of 11 tokens" in refused(capsys, train_reward.main, RewardConfig, flags)


def test_an_earlier_reward_model_is_gone_on_with(inputs, reward_run, tmp_path, capsys):
    """On its raw scale: normalised twice, its scores would be another unit, and its first loss that of another model.

    With a learning rate of 0 it comes out as it went in, and so does the base model, by which policies stay comparable.
    """
    earlier = str(reward_run / "reward.pt")
    train_reward.main(reward_config(inputs, tmp_path / "still", init_reward=earlier, lr=0.0, normalise_prompts=14))
    assert_same_weights(tmp_path / "still" / "base.pt", reward_run / "base.pt", "base")
    assert_same_weights(tmp_path / "still" / "reward.pt", reward_run / "reward.pt", "reward")
    train_reward.main(reward_config(inputs, tmp_path / "on", init_reward=earlier, epochs=2))
    found = [row for row in rows(tmp_path / "on" / "reward_metrics.jsonl") if row["stage"] != "test"]
    before = [row["loss"] for row in rows(reward_run / "reward_metrics.jsonl") if row["stage"] == "reward"]
    assert {row["stage"] for row in found} == {"reward"} and found[0]["loss"] < 0.9 * before[0]
    for name, words in (("base.pt", "holds a base model, not a reward model"), ("none.pt", "none.pt: No such file")):
        flags = as_flags(reward_config(inputs, tmp_path / "bad", init_reward=str(reward_run / name)))
        assert words in refused(capsys, train_reward.main, RewardConfig, flags) and not (tmp_path / "bad").exists()


# ---- a reward of one's own -------------------------------------------------------------------------------------------


def test_a_reward_function_takes_the_place_of_the_reward_model(reward_run, tmp_path, monkeypatch, capsys):
    """Given as an argument or by name; it sees the texts of prompts and responses, and its number is the score."""
    seen = []

    def score(prompts, responses):
        seen.append((prompts, responses))
        return tiny.letters_right(prompts, responses)

    train_policy.main(policy_config(reward_run, tmp_path / "argument", missing_eos_penalty=0.5), reward_function=score)
    assert "reward: score" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    train_policy.main(policy_config(reward_run, tmp_path / "name", missing_eos_penalty=0.5, reward="tiny:letters_right"))
    assert_same_weights(tmp_path / "argument" / "policy.pt", tmp_path / "name" / "policy.pt", "policy")
    prompts, responses = next((p, r) for p, r in seen if len(p) == 8)  # the first rollout
    row = rows(tmp_path / "name" / "policy_metrics.jsonl")[1]
    wanted = sum(tiny.letters_right(prompts, responses)) / 8 - 0.5 * (1 - row["eos_rate"])
    assert row["score"] == pytest.approx(wanted, abs=1e-5)
    assert all(prompt[0] in tiny.LETTERS and prompt.endswith(":") for prompt in prompts)


@pytest.mark.parametrize("reward", [
    lambda prompts, responses: torch.ones(len(responses), dtype=torch.float64), lambda prompts, responses: [1] * len(responses),
    functools.partial(lambda bonus, prompts, responses: [bonus] * len(responses), 2.0), type("Judge", (), {"__call__":
    lambda self, prompts, responses: tuple(map(float, map(len, responses)))})(),
], ids=["tensor", "ints", "partial", "object"])
def test_any_callable_that_gives_numbers_will_do(reward, reward_run, tmp_path):
    """A partial and an object have no __name__."""
    train_policy.main(policy_config(reward_run, tmp_path / "run", iterations=1), reward_function=reward)


def raising(prompts, responses):
    raise RuntimeError("first line\nsecond \x1b[31mline")


@pytest.mark.parametrize("reward, words", [
    (raising, r"raising raised RuntimeError: first line second \x1b[31mline"),
    (lambda prompts, responses: [0.0], "returned shape (1,); it must be (4,)"),
    (lambda prompts, responses: 0.0, "returned shape (); it must be (4,)"),
    (lambda prompts, responses: [[0.0]] * 4, "returned shape (4, 1); it must be (4,)"),
    (lambda prompts, responses: [0.0, float("nan"), 0.0, 0.0], "returned nan for response 1"),
    (lambda prompts, responses: [0.0, 0.0, float("-inf"), 0.0], "returned -inf for response 2"),
    (lambda prompts, responses: ["a"] * 4, "raised"),
    (lambda prompts, responses: None, "raised"),
    (lambda: [], "raised TypeError"),
])
def test_a_reward_function_that_fails_is_one_line(reward, words, reward_run, tmp_path, capsys):
    """NaN from a user's function would be in every weight one step later, and a traceback blames this program."""
    main = functools.partial(train_policy.main, reward_function=reward)
    message = refused(capsys, main, PolicyConfig, as_flags(policy_config(reward_run, tmp_path / "run")))
    assert words in message and "\x1b" not in message


@pytest.mark.parametrize("reward, words", [
    ("tiny", "write it as module:function"), ("tiny:", "write it as module:function"), ("tiny:nothing", "no such function"),
    ("tiny:LETTERS", "no such function"), ("nowhere:score", "cannot be imported (ModuleNotFoundError"),
    (":score", "cannot be imported"), ("broken:score", "cannot be imported (ZeroDivisionError"),
])
def test_a_reward_that_cannot_be_found_is_one_line(reward, words, reward_run, tmp_path, monkeypatch, capsys):
    """And it is looked for before any work."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken.py").write_text("1 / 0\n")
    flags = as_flags(policy_config(reward_run, tmp_path / "run", reward=reward))
    assert words in refused(capsys, train_policy.main, PolicyConfig, flags)
    assert not (tmp_path / "run").exists()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, words", [
    (None, "cannot be read (No such file"), (b"", "no usable record"), (b"\n\n", "no usable record"),
    (b"nonsense\n", ":1: the record is not strict JSON"),
    (b'{"prompt": "a", "chosen": "b"}\n', ':1: the key "rejected" is missing'), (b"\x1f\x8b\x08 torn", ":1: "),
    (b'{"prompt": "a:", "chosen": "b", "rejected": "b"}\n{"prompt": "b:", "chosen": "b", "rejected": "b"}\n', "no usable pair"),
    (b'{"prompt": "a:", "chosen": "b", "rejected": "c"}\n', "too few to hold some out"),
    (b'{"prompt": "\x1b[31m", "chosen": 3, "rejected": "c"}\n', ":1: the record is not strict JSON"),
])
def test_bad_data_is_one_line_and_nothing_is_made(content, words, inputs, tmp_path, capsys):
    """Found before the folder is made: the same command can be given again once the file is mended."""
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    flags = as_flags(reward_config(inputs, tmp_path / "run", data=(str(path),)))
    message = refused(capsys, train_reward.main, RewardConfig, flags)
    assert words in message and (str(path) in message or words in ("no usable pair", "too few to hold some out"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, words", [
    (dict(data=("{tmp}",)), "Is a directory"), (dict(tokenizer="{tmp}/none.tiktoken"), "No such file"),
    (dict(tokenizer="helpdesc"), "did you mean helpdesk"), (dict(init="{tmp}/base.pt"), "No such file"),
    (dict(init="{inputs}/pairs.jsonl"), "not a checkpoint"),
    (dict(init="{reward_run}/reward.pt"), "holds a reward model, not a base model"),
    (dict(init="{reward_run}/base.pt", tokenizer="helpdesk", max_prompt_length=4), "another tokenizer"),
    (dict(task="nowhere"), "--task nowhere: cannot be imported"), (dict(holdout=0.001), "--holdout 0.001 is below 0.01"),
])
def test_a_reward_run_on_what_is_not_there_is_one_line(changes, words, inputs, reward_run, tmp_path, capsys):
    """Named: the file or the flag, and what to do."""
    def fill(value):
        return value.format(tmp=tmp_path, inputs=inputs, reward_run=reward_run) if isinstance(value, str) else value

    changes = {name: tuple(map(fill, value)) if isinstance(value, tuple) else fill(value) for name, value in changes.items()}
    assert words in refused(capsys, train_reward.main, RewardConfig, as_flags(reward_config(inputs, tmp_path / "run", **changes)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage, words", [
    (lambda run: (run / "reward.pt").unlink(), "reward.pt: No such file or directory; is this the folder of a finished run?"),
    (lambda run: (run / "base.pt").unlink(), "base.pt: No such file"),
    (lambda run: (run / "config.json").unlink(), "config.json: no such file; is this a run folder?"),
    (lambda run: (run / "config.json").write_text("{"), "config.json: not a configuration"),
    (lambda run: (run / "reward.pt").write_bytes((run / "reward.pt").read_bytes()[:-1000]), "reward.pt: torn"),
    (lambda run: (run / "reward.pt").write_bytes((run / "base.pt").read_bytes()), "holds a base model, not a reward model"),
    (lambda run: (run / "base.pt").write_bytes(b"\x00" + (run / "base.pt").read_bytes()[1:]), "base.pt: damaged"),
])
def test_a_reward_run_that_is_not_whole_is_one_line(damage, words, inputs, reward_run, tmp_path, capsys):
    """A folder of an unfinished run, or one that a copy has torn."""
    run = tmp_path / "reward"
    run.mkdir()
    for name in ("config.json", "base.pt", "reward.pt"):
        (run / name).write_bytes((reward_run / name).read_bytes())
    damage(run)
    assert words in refused(capsys, train_policy.main, PolicyConfig, as_flags(policy_config(run, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--reward-run", "nowhere"], "nowhere/config.json: no such file"), ([], "no finished reward run under runs/"),
    (["--reward-run", "{reward_run}", "--prompts", "none.jsonl"], "none.jsonl: cannot be read"),
    (["--reward-run", "{reward_run}", "--max-response-length", "6"], "--max-response-length 6"),
])
def test_a_policy_run_on_what_is_not_there_is_one_line(flags, words, reward_run, tmp_path, monkeypatch, capsys):
    """Two lines from the README in the wrong order is the commonest mistake of all."""
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, train_policy.main, PolicyConfig, [flag.format(reward_run=reward_run) for flag in flags])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("main, config_class", [(train_reward.main, RewardConfig), (train_policy.main, PolicyConfig)])
def test_an_existing_folder_is_refused_and_untouched(main, config_class, inputs, reward_run, tmp_path, capsys):
    """A second run with the same --out must not cost the first one."""
    for name in ("run", "file"):
        out = tmp_path / name
        if name == "run":
            out.mkdir()
            (out / "thesis.txt").write_text("the only copy")
        else:
            out.write_text("the only copy")
        config = reward_config(inputs, out) if config_class is RewardConfig else policy_config(reward_run, out)
        assert f"{out}: exists already; add --resume" in refused(capsys, main, config_class, as_flags(config))
    assert contents(tmp_path) == {"run/thesis.txt": b"the only copy", "file": b"the only copy"}


def test_an_exploding_kl_stops_with_advice(reward_run, tmp_path, capsys):
    """A policy that has left the language gives scores that mean nothing; the last checkpoint is kept."""
    flags = as_flags(policy_config(reward_run, tmp_path / "run", iterations=9, lr=0.3, max_kl=0.5))
    message = refused(capsys, train_policy.main, PolicyConfig, flags)
    assert "--max-kl 0.5; raise --kl-coef or lower --lr" in message
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("stage, target", [("warmup", "language_model_loss"), ("reward", "pair_loss")])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(stage, target, inputs, tmp_path, monkeypatch, capsys):
    """Names stage and step; the last checkpoint is that of the step before."""
    real, calls = getattr(train_reward, target), []

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
    assert f"{stage} step 3: the loss is nan" in refused(capsys, train_reward.main, RewardConfig, flags)
    states = tiny.load_checkpoint(tmp_path / "run" / "checkpoints" / f"{stage}-00000002.pt", stage)[1]
    assert all(tensor.isfinite().all() for tensor in states["model"].values())
    assert [row["step"] for row in rows(tmp_path / "run" / "reward_metrics.jsonl") if row["stage"] == stage] == [1, 2]


@pytest.mark.parametrize("script, arguments, words", [
    ("train_reward.py", ["--data", "none.jsonl"], "error: none.jsonl:"),
    ("train_policy.py", ["--itarations", "3"], "error: unknown argument --itarations; did you mean --iterations?"),
])
def test_the_real_command_line_says_one_line(script, arguments, words, tmp_path):
    """What the shell sees: one line on stderr, status 2, nothing written."""
    process = subprocess.run([sys.executable, str(tiny.ROOT / script), *arguments], cwd=tmp_path, env=tiny.environment(),
                             text=True, capture_output=True)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith(words) and process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---- the terminal ----------------------------------------------------------------------------------------------------


HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m\r"


def test_no_control_sequence_of_data_or_model_reaches_the_terminal_or_a_file(inputs, tmp_path, capsys):
    """A prompt that clears the screen, retitles the window or turns the text around is shown, not obeyed."""
    pairs = [dict(prompt=f"{HOSTILE}{i}:", chosen=HOSTILE, rejected=f"{HOSTILE}\x1b[{i}m") for i in range(20)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train_reward.main(reward_config(inputs, tmp_path / "reward", data=(str(path),), task="none", max_prompt_length=40,
                                    max_response_length=30, warmup_sequences=320, epochs=2))
    train_policy.main(policy_config(tmp_path / "reward", tmp_path / "run"))
    output = capsys.readouterr()
    page = (tmp_path / "run" / "samples.md").read_text()
    for text in (output.out, output.err, page):
        assert not set(text) & set("\x1b\x07\x9b\u202e\r")
    assert r"\x1b]0;owned\x07\x1b[2J\u202e\x9b31m\r" in output.out and r"\x1b" in page.partition("**before**")[2]


@pytest.mark.parametrize("text, shown", [
    ("plain, \u00fc, \u65e5\u672c, \U0001f600", "plain, \u00fc, \u65e5\u672c, \U0001f600"),
    ("two\nlines", "two\nlines"), ("\x1b[31m", r"\x1b[31m"),
    ("\x00\x07\x7f\x9b", r"\x00\x07\x7f\x9b"), ("a\rb\tc", r"a\rb\tc"), ("\u202e\u2066\ufeff", r"\u202e\u2066\ufeff"),
    ("\ud800", r"\ud800"), ("\u2028\u2029", r"\u2028\u2029"), ("", ""),
])
def test_printable_shows_control_characters_and_leaves_the_rest(text, shown):
    """Every category of character that a terminal, or a reader, could be fooled by."""
    assert printable(text) == shown


class Terminal:
    def __init__(self, tty):
        self.tty, self.text = tty, ""

    def isatty(self):
        return self.tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def show_progress(monkeypatch, tty, text="loss 0.5", total=40):
    terminal = Terminal(tty)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(os, "get_terminal_size", lambda: os.terminal_size((30, 20)))
        progress = Progress("stage", total, plain_lines=4)
        for step in range(1, total + 1):
            progress.show(step, text)
    return terminal.text


def test_progress_is_plain_lines_where_there_is_no_terminal(monkeypatch):
    """A log file full of carriage returns cannot be read, and one of 10,000 lines is not."""
    lines = show_progress(monkeypatch, False).splitlines()
    assert [line.split()[1] for line in lines] == ["10/40", "20/40", "30/40", "40/40"]
    assert all("loss 0.5" in line and line.endswith(" left") for line in lines)


def test_progress_rewrites_one_line_on_a_terminal(monkeypatch):
    """A line as wide as the terminal, or wider, would wrap: then every step would add one."""
    text = show_progress(monkeypatch, True, "loss " + "0" * 100)
    assert text.count("\n") == 1 and text.endswith("\n")
    shown = text.rstrip("\n").split("\r")[1:]
    assert len(shown) == 40 and {len(line) for line in shown} == {29}


@pytest.mark.parametrize("seconds, text", [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.6, "1 h 00 min"),
                                           (7260, "2 h 01 min")])
def test_durations_are_rounded_into_the_next_unit(seconds, text):
    """Never "60 s", never "1 min 60 s"."""
    assert duration(seconds) == text


def test_metrics_are_json_whatever_the_figures(tmp_path):
    """NaN and Infinity are no JSON: a reader of the file stops at that line."""
    metrics = Metrics(tmp_path / "m.jsonl", None, tensorboard=False)
    metrics.write(dict(step=1, loss=1 / 3, inf=float("inf"), nan=float("nan"), name="\n\u00fc"))
    assert json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail) == dict(
        step=1, loss=0.3333333, inf=None, nan=None, name="\n\u00fc")
    assert rounded(dict(a=True, b=7)) == dict(a=True, b=7)


def test_a_row_that_does_not_fit_on_the_disk_is_an_error(tmp_path):
    """A short write returns without a word, and the next row would be glued to the torn one."""
    metrics = Metrics(tmp_path / "m.jsonl", None, tensorboard=False)

    class AlmostFull:
        name = str(tmp_path / "m.jsonl")
        write = staticmethod(lambda line: len(line) - 3)

    metrics.file = AlmostFull()
    with pytest.raises(OSError, match="No space left"):
        metrics.write(dict(step=1))


def test_tensorboard_shows_the_figures_of_the_metrics_file(reward_run, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_policy.main(policy_config(reward_run, tmp_path / "run", tensorboard=True, iterations=2))
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    found = events.EventAccumulator(str(file.parent))
    found.Reload()
    written = rows(tmp_path / "run" / "policy_metrics.jsonl")[1:]
    for name in ("score", "kl", "loss"):
        assert [(event.step, pytest.approx(event.value, rel=1e-6)) for event in found.Scalars(name)] == [
            (row["step"], row[name]) for row in written]


def test_a_missing_tensorboard_is_a_line_and_no_error(reward_run, tmp_path, monkeypatch, capsys):
    """It is optional: the metrics are in the jsonl file anyway."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train_policy.main(policy_config(reward_run, tmp_path / "run", tensorboard=True, iterations=1))
    assert "--tensorboard: not installed" in capsys.readouterr().out


def test_each_stage_has_a_tensorboard_curve_of_its_own(tmp_path, monkeypatch):
    """Warm-up and reward stage both count from 1: under one name their losses were drawn over each other."""
    told = []
    writer = types.SimpleNamespace(add_scalar=lambda *scalar: told.append(scalar))
    monkeypatch.setattr("minirlhf.log.summary_writer", lambda folder: writer)
    metrics = Metrics(tmp_path / "m.jsonl", None, tensorboard=True)
    for row in (dict(stage="warmup", step=1, loss=5.0), dict(stage="reward", step=1, loss=0.7), dict(step=2, score=1.0)):
        metrics.write(row)
    assert told == [("warmup/loss", 5.0, 1), ("reward/loss", 0.7, 1), ("score", 1.0, 2)]


def test_main_can_be_called_with_mistakes_caught(inputs, tmp_path):
    """For a program of one's own: main(config) raises UserError and does not exit."""
    with pytest.raises(UserError, match="no such file"):
        train_reward.main(reward_config(inputs, tmp_path / "none", resume=True))
    assert signal.getsignal(signal.SIGINT) is not None
