"""The second round: three arms from one base model, resumable, compared on the same test pairs."""

import dataclasses
import json
from pathlib import Path

from minirlhf.config import RewardConfig
from minirlhf.data.preference_files import PreferencePair, read_preferences
from minirlhf.data.prompts import Prompts, unique_prompts
from minirlhf.data.splits import load_splits
from minirlhf.lab import second_round
from minirlhf.lab.second_round import ARMS, RoundConfig
from minirlhf.rl.sampling import sample_responses
from minirlhf.run.folder import read_config
from minirlhf.tools.trained import load_trained

import pytest
import tiny
import torch
from tiny import assert_same_weights, refused


@pytest.fixture
def first(policy_run):
    return load_trained(str(policy_run), torch.device("cpu"), "tiny")


def test_a_second_round_runs_and_resumes(policy_run, reward_run, tmp_path, capsys, monkeypatch):
    """Each arm gets equally many labels and starts from the first round's models.

    Stopped while labeling and while training, it ends with the same results.
    """
    own_test_pairs = second_round.own_test_pairs
    prompts_used = []

    def recording(first, prompts, config):
        prompts_used.extend(prompts)
        return own_test_pairs(first, prompts, config)

    monkeypatch.setattr(second_round, "own_test_pairs", recording)
    out = tmp_path / "two"
    config = RoundConfig(
        task="tiny", run=str(policy_run), out=str(out), quick=True, labels=30, device="cpu"
    )
    results = second_round.main(config)
    assert list(results) == ["round 1", *(f"30 {arm}" for arm in ARMS)]
    for arm in ARMS:
        name = arm.replace(" ", "-")
        assert_same_weights(out / f"reward-{name}" / "base.pt", reward_run / "base.pt", "base")
        assert len((out / f"{name}.jsonl").read_text().splitlines()) == 30
        settings = read_config(RewardConfig, out / f"reward-{name}" / "config.json")
        assert settings.data == tuple(str(out / file) for file in (f"{name}.jsonl", "replay.jsonl"))
    # of 20 prompts, 6 are held out
    assert all(column["reward"]["prompts"] == 6 for column in results.values())
    reward_config = read_config(RewardConfig, reward_run / "config.json")
    assert set(prompts_used) == set(unique_prompts(load_splits(reward_config).test))
    reward_models = {next(iter(column["files"].values())) for column in results.values()}
    assert len(reward_models) == 4  # all differ
    ceilings = {column["reward"]["own_ceiling"] for column in results.values()}
    assert len(ceilings) == 1  # the same pairs
    table = (out / "second_round.md").read_text()
    assert "| probe: wrong letter |" in table
    assert table.splitlines()[1] == "|---|" + "---|" * 4
    assert json.loads((out / "second_round.json").read_text()) == results
    # as if stopped while labeling, and while training
    labels = out / "own-pairs.jsonl"
    content = labels.read_bytes()
    labels.write_bytes(b"".join(content.splitlines(keepends=True)[:11]))
    (out / "policy-own-pairs" / "result.json").unlink()
    capsys.readouterr()
    assert second_round.main(config) == results
    assert labels.read_bytes() == content
    output = capsys.readouterr().out
    assert output.count(": already finished") == 5
    assert "policy-own-pairs\n" in output


def test_each_arm_samples_from_the_right_model(first, policy_run, tmp_path):
    """The control must use the base model's samples, not the policy's."""
    config = RoundConfig(task="tiny", run=str(policy_run), labels=6)
    for arm, model in (("base pairs", first.base), ("own pairs", first.policy)):
        path = second_round.write_labels(first, arm, tmp_path / f"{arm}.jsonl", config)
        for row in map(json.loads, path.read_text().splitlines()):
            ids = tuple(first.encoding.encode_ordinary(row["prompt"]))
            numbers = [2 * row["number"], 2 * row["number"] + 1]
            expected = sample_responses(
                model,
                Prompts([row["prompt"]] * 2, [ids] * 2),
                first.sampling(0.0, 0, 0),
                "label",
                rows=numbers,
            )
            assert row["responses"] == expected.responses


def test_the_policys_own_pairs_are_labeled_with_the_annotators_probability(
    first, policy_run, monkeypatch
):
    """Labels are drawn. The more probable label each time would be another annotator."""
    prompts = unique_prompts(load_splits(first.reward_config).test)
    config = RoundConfig(task="tiny", run=str(policy_run), test_pairs=60)
    labeled = {}
    for probability in (0.0, 0.5, 1.0):
        monkeypatch.setattr(tiny, "preference_probability", lambda prompt, a, b, p=probability: p)
        labeled[probability] = second_round.own_test_pairs(first, prompts, config)
    assert len(labeled[1.0]) == 60
    assert {pair.prompt for pair in labeled[1.0]} <= set(prompts)
    assert [(pair.rejected, pair.chosen) for pair in labeled[0.0]] == [
        (pair.chosen, pair.rejected) for pair in labeled[1.0]
    ]
    assert 15 < sum(half == sure for half, sure in zip(labeled[0.5], labeled[1.0])) < 45


def test_replay_uses_random_prompts_with_all_their_pairs_unchanged(tmp_path):
    pairs = [
        PreferencePair(f"p{i // 3}", f"c{i}", f"r{i}", margin=i / 10, weight=0.5) for i in range(90)
    ]
    chosen = {}
    for seed in (0, 1):
        config = RoundConfig(task="tiny", labels=10, replay=4, seed=seed)
        second_round.write_replay(tmp_path / "r.jsonl", pairs, config)
        replayed = read_preferences(str(tmp_path / "r.jsonl"))
        assert len(replayed) == 42
        assert set(replayed) < set(pairs)
        chosen[seed] = {pair.prompt for pair in replayed}
        assert len(chosen[seed]) == 14
    assert chosen[0] not in ({f"p{i}" for i in range(16, 30)}, chosen[1])


def test_settings_of_the_second_round_differ_from_the_first_only_as_stated(first, policy_run):
    """The reward model starts from the first one; the policy starts from the base model again."""
    config = RoundConfig(task="tiny", run=str(policy_run), lr=0.25, epochs=5)
    reward = second_round.second_reward(first, ("own.jsonl", "replay.jsonl"), Path("r"), config)
    assert changes(first.reward_config, reward) == dict(
        data=("own.jsonl", "replay.jsonl"),
        init_reward=str(Path(first.config.reward_run) / "reward.pt"),
        out="r",
        lr=0.25,
        epochs=5,
        device="auto",
        # the model's own, so the flags keep their defaults
        n_layer=RewardConfig.n_layer,
        n_head=RewardConfig.n_head,
        d_model=RewardConfig.d_model,
    )
    first = first._replace(config=dataclasses.replace(first.config, prompts="prompts.txt"))
    policy = second_round.second_policy(first, Path("r"), Path("p"), config)
    assert changes(first.config, policy) == dict(reward_run="r", out="p", device="auto")


def changes(old, new) -> dict:
    """The settings of `new` that differ from `old`."""
    old = dataclasses.asdict(old)
    return {name: value for name, value in dataclasses.asdict(new).items() if value != old[name]}


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--run is missing"),
        (["--run", "{tmp}"], "config.json: No such file"),
        (["--run", "{run}", "--labels", "0"], "--labels must be from 1 to"),
    ],
)
def test_bad_input_is_one_line(flags, message, policy_run, tmp_path, capsys):
    flags = [text.format(tmp=tmp_path, run=policy_run) for text in flags]
    flags += ["--out", str(tmp_path / "x")]
    assert message in refused(capsys, second_round.main, RoundConfig, flags)
    assert not (tmp_path / "x").exists()


def test_a_task_without_an_annotator_is_refused(policy_run, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(tiny, "preference_probability")
    flags = ["--run", str(policy_run), "--out", str(tmp_path / "x"), *tiny.MODULES]
    line = refused(capsys, second_round.main, RoundConfig, flags)
    assert "no annotator (preference_probability)" in line
