"""The second round in small: three arms from one base model, gone on with after a stop, compared on the same test pairs."""

import json

import pytest
import tiny
import torch
from tiny import assert_same_weights, refused

from minirlhf.environment import sample_responses
from minirlhf.lab import second_round
from minirlhf.lab.second_round import ARMS, RoundConfig
from minirlhf.tools.trained import load_trained


def test_a_second_round_runs_stops_and_goes_on(policy_run, reward_run, tmp_path, capsys):
    """Every arm: as many answers, a reward model trained on from the first, a policy from the same base model."""
    config = RoundConfig(run=str(policy_run), out=str(tmp_path / "two"), quick=True, labels=30, device="cpu")
    figures = second_round.main(config)
    assert list(figures) == ["round 1", *(f"30 {arm}" for arm in ARMS)]
    for arm in ARMS:
        name = arm.replace(" ", "-")
        assert_same_weights(tmp_path / "two" / f"reward-{name}" / "base.pt", reward_run / "base.pt", "base")
        assert len((tmp_path / "two" / f"{name}.jsonl").read_text().splitlines()) == 30
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
