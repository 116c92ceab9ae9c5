"""The second round in small: three arms from one base model, gone on with after a stop, compared on the same test pairs."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
from tiny import assert_same_weights, refused

from minirlhf.config import RewardConfig
from minirlhf.data import read_preferences, unique_prompts
from minirlhf.environment import sample_responses
from minirlhf.flags import read_config
from minirlhf.lab import second_round
from minirlhf.lab.second_round import ARMS, RoundConfig
from minirlhf.records import PreferencePair
from minirlhf.task import load_splits
from minirlhf.tools.trained import load_trained


def test_a_second_round_runs_stops_and_goes_on(policy_run, reward_run, tmp_path, capsys, monkeypatch):
    """Every arm: as many answers, a reward model trained on from the first, a policy from the same base model."""
    own_test_pairs, asked = second_round.own_test_pairs, []
    monkeypatch.setattr(second_round, "own_test_pairs", lambda first, prompts, config: (
        asked.extend(prompts) or own_test_pairs(first, prompts, config)))
    config = RoundConfig(run=str(policy_run), out=str(tmp_path / "two"), quick=True, labels=30, device="cpu")
    figures = second_round.main(config)
    assert list(figures) == ["round 1", *(f"30 {arm}" for arm in ARMS)]
    for arm in ARMS:
        name = arm.replace(" ", "-")
        assert_same_weights(tmp_path / "two" / f"reward-{name}" / "base.pt", reward_run / "base.pt", "base")
        assert len((tmp_path / "two" / f"{name}.jsonl").read_text().splitlines()) == 30
        settings = read_config(RewardConfig, tmp_path / "two" / f"reward-{name}" / "config.json")
        assert settings.data == tuple(str(tmp_path / "two" / file) for file in (f"{name}.jsonl", "replay.jsonl"))
    assert all(column["reward"]["prompts"] == 6 for column in figures.values())  # those of 20 that are held out
    assert {*asked} == {*unique_prompts(load_splits(read_config(RewardConfig, reward_run / "config.json")).test)}
    rewards = {column["files"][next(iter(column["files"]))] for column in figures.values()}
    assert len(rewards) == 4  # no two alike
    assert figures["round 1"]["reward"]["own_ceiling"] == figures["30 own pairs"]["reward"]["own_ceiling"]  # the same pairs
    table = (tmp_path / "two" / "second_round.md").read_text()
    assert "| probe: wrong letter |" in table and table.splitlines()[1] == "|---|" + "---|" * 4
    assert json.loads((tmp_path / "two" / "second_round.json").read_text()) == figures
    # stopped while it asked, and while it trained
    answers, whole = tmp_path / "two" / "own-pairs.jsonl", (tmp_path / "two" / "own-pairs.jsonl").read_bytes()
    answers.write_bytes(b"".join(whole.splitlines(keepends=True)[:11]))
    (tmp_path / "two" / "policy-own-pairs" / "result.json").unlink()
    capsys.readouterr()
    assert second_round.main(config) == figures and answers.read_bytes() == whole
    said = capsys.readouterr().out
    assert said.count(": finished before") == 5 and "policy-own-pairs\n" in said


def test_each_arm_asks_about_the_right_model(policy_run, tmp_path):
    """The control's pairs are the base model's samples; with the policy's own it would be no control."""
    first, config = load_trained(str(policy_run), torch.device("cpu")), RoundConfig(run=str(policy_run), labels=6)
    for arm, model in (("base pairs", first.base), ("own pairs", first.policy)):
        path = second_round.write_answers(first, arm, tmp_path / f"{arm}.jsonl", config)
        for row in map(json.loads, path.read_text().splitlines()):
            ids, rows = first.encoding.encode_ordinary(row["prompt"]), [2 * row["number"], 2 * row["number"] + 1]
            wanted = sample_responses(model, [row["prompt"]] * 2, [ids] * 2, first.sampling(0.0, 0, 0), "label", rows=rows)
            assert row["responses"] == wanted.responses


@pytest.fixture
def first(policy_run):
    return load_trained(str(policy_run), torch.device("cpu"))


def test_the_first_policys_own_pairs_are_labelled_as_often_as_the_annotator_would(first, policy_run, monkeypatch):
    """Drawn, and not merely the likelier: else the accuracy on them would be about another annotator."""
    prompts = unique_prompts(load_splits(first.reward_config).test)
    config, found = RoundConfig(run=str(policy_run), test_pairs=60), {}
    for probability in (0.0, 0.5, 1.0):
        monkeypatch.setattr(tiny, "preference_probability", lambda prompt, a, b, p=probability: p)
        found[probability] = second_round.own_test_pairs(first, prompts, config)
    assert len(found[1.0]) == 60 and {pair.prompt for pair in found[1.0]} <= set(prompts)
    assert [(pair.rejected, pair.chosen) for pair in found[0.0]] == [(pair.chosen, pair.rejected) for pair in found[1.0]]
    assert 15 < sum(half == sure for half, sure in zip(found[0.5], found[1.0])) < 45


def test_replay_takes_whole_prompts_at_random_and_keeps_what_their_pairs_say(tmp_path):
    pairs = [PreferencePair(f"p{i // 3}", f"c{i}", f"r{i}", margin=i / 10, weight=0.5) for i in range(90)]
    chosen = {}
    for seed in (0, 1):
        second_round.write_replay(tmp_path / "r.jsonl", pairs, RoundConfig(labels=10, replay=4, seed=seed))
        chosen[seed] = read_preferences(str(tmp_path / "r.jsonl"))
        assert len(chosen[seed]) == 42 and set(chosen[seed]) < set(pairs) and len({pair.prompt for pair in chosen[seed]}) == 14
    assert {pair.prompt for pair in chosen[0]} not in ({f"p{i}" for i in range(16, 30)}, {pair.prompt for pair in chosen[1]})


def test_what_the_second_round_trains_is_the_first_with_these_changes_alone(first, policy_run):
    """The reward model goes on from the first one's; the policy starts anew, against the new reward model."""
    config = RoundConfig(run=str(policy_run), lr=0.25, epochs=5)
    reward = second_round.second_reward(first, ("own.jsonl", "replay.jsonl"), Path("r"), config)
    old = dataclasses.asdict(first.reward_config)
    changed = {name: value for name, value in dataclasses.asdict(reward).items() if value != old[name]}
    earlier = str(Path(first.config.reward_run) / "reward.pt")
    assert changed == dict(data=("own.jsonl", "replay.jsonl"), init_reward=earlier, out="r", lr=0.25, epochs=5, device="auto")
    first = first._replace(config=dataclasses.replace(first.config, prompts="prompts.txt"))
    policy = second_round.second_policy(first, Path("r"), Path("p"), config)
    old = dataclasses.asdict(first.config)
    changed = {name: value for name, value in dataclasses.asdict(policy).items() if value != old[name]}
    assert changed == dict(reward_run="r", out="p", device="auto")


@pytest.mark.parametrize("flags, words", [
    ([], "--run is missing"), (["--run", "{tmp}"], "config.json: no such file"),
    (["--run", "{run}", "--labels", "0"], "--labels 0 is below 1"),
])
def test_bad_input_is_one_line(flags, words, policy_run, tmp_path, capsys):
    flags = [text.format(tmp=tmp_path, run=policy_run) for text in flags] + ["--out", str(tmp_path / "x")]
    assert words in refused(capsys, second_round.main, RoundConfig, flags) and not (tmp_path / "x").exists()


def test_a_task_without_an_annotator_is_refused(policy_run, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(tiny, "preference_probability")
    flags = ["--run", str(policy_run), "--out", str(tmp_path / "x")]
    assert "no annotator (preference_probability)" in refused(capsys, second_round.main, RoundConfig, flags)
