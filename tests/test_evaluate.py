"""The figures that a run reports are those that their names promise."""

import math

import numpy as np
import pytest
import tiny
import torch
from tiny import EOS, PAD, policy_config, rows

import train_reward
from minirlhf import evaluate
from minirlhf.checkpoint import load_model
from minirlhf.compare import Referee, best_of_n, closing_table, fenced, summarise
from minirlhf.config import RewardConfig
from minirlhf.data import PreferenceGroup, encode_prompts
from minirlhf.environment import (
    Prompts,
    Sampling,
    load_environment,
    model_scorer,
    next_prompts,
    sample_responses,
    unfinished,
)
from minirlhf.evaluate import calibration_error, evaluate_reward_model, interval, probe_table, standard_error
from minirlhf.flags import read_config
from minirlhf.model import ModelConfig, Transformer, sequence_scores
from minirlhf.task import load_splits
from minirlhf.tokenizer import fingerprint, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(reward_run):
    return load_environment(policy_config(reward_run, ""), None, CPU)


@pytest.fixture(scope="module")
def encoding(inputs):
    return load_tokenizer(str(inputs / "bytes.tiktoken"))


@pytest.fixture
def score_by_last_letter(monkeypatch):
    """A reward model whose opinion is known: the byte before EOS."""
    def scores(model, ids, mask):
        return torch.tensor([float(row[keep][-2]) for row, keep in zip(ids, mask)])
    monkeypatch.setattr(evaluate, "sequence_scores", scores)


def group(prompt, *pairs):
    """Responses of one letter each; pairs: (winner, loser) or (winner, loser, weight)."""
    letters = sorted({letter for pair in pairs for letter in pair[:2]})
    return PreferenceGroup(tuple(prompt.encode()), tuple((*letter.encode(), EOS) for letter in letters),
                           tuple((letters.index(w), letters.index(l), 0.0, *(weight or [1.0])) for w, l, *weight in pairs))


def fresh_model():
    """One that scores everything 0."""
    return Transformer(ModelConfig(tiny.VOCAB, table_rows=320, n_layer=1, n_head=2, d_model=8, context=11))


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_interval_is_the_weighted_mean_between_its_bounds():
    """Hand-computed: (0 * 1 + 1 * 3) / 4; and where all values agree there is nothing to be unsure of."""
    mean, low, high = interval(np.array([0.0, 1.0]), np.array([1.0, 3.0]))
    assert mean == 0.75 and 0.0 <= low <= mean <= high <= 1.0
    assert interval(np.array([0.3, 0.3, 0.3])) == pytest.approx((0.3, 0.3, 0.3))
    assert interval(np.array([0.7])) == pytest.approx((0.7, 0.7, 0.7))


def test_interval_has_the_width_of_the_normal_one_and_is_the_same_every_time():
    """1.96 standard errors on each side for 400 fair coins; no generator is shared with anything else."""
    coins = np.arange(400) % 2
    mean, low, high = interval(coins)
    assert mean == 0.5 and high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400), rel=0.1)
    assert interval(coins) == (mean, low, high)


def test_interval_resamples_prompts_and_not_pairs():
    """Ten pairs of one prompt are one observation: counted as ten, the interval is too narrow by a factor of three."""
    few = interval(np.array([0.0, 1.0, 1.0, 0.0]), np.full(4, 10.0))
    assert (few[1], few[2]) == (0.0, 1.0)


def test_standard_error_by_hand():
    """Deviation with n - 1, over the root of n; of a single number it is unknown, not zero."""
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(math.sqrt(2.0) / math.sqrt(2))
    assert standard_error(np.array([5.0])) == float("inf")


def test_calibration_error_by_hand():
    """Confidence 0.75 and right three times in four is perfect; always right is 0.25 off; half right is 0.25 off."""
    gap = math.log(3.0)  # sigmoid: 0.75
    assert calibration_error(np.full(4, gap), np.array([1.0, 1.0, 1.0, 0.0])) == pytest.approx(0.0)
    assert calibration_error(np.full(4, -gap), np.array([1.0, 1.0, 1.0, 0.0])) == pytest.approx(0.0)
    assert calibration_error(np.full(4, gap), np.ones(4)) == pytest.approx(0.25)
    assert calibration_error(np.full(4, gap), np.array([1.0, 1.0, 0.0, 0.0])) == pytest.approx(0.25)
    sure = np.array([gap, gap, 20.0, 20.0])  # two bins, of which one is 0.25 off
    assert calibration_error(sure, np.array([1.0, 1.0, 1.0, 1.0])) == pytest.approx(0.125)
    assert calibration_error(np.full(3, 1e4), np.ones(3)) == pytest.approx(0.0)


# ---- the reward model ------------------------------------------------------------------------------------------------


def test_a_model_without_an_opinion_is_half_right(encoding):
    """Ties counted as right make an untrained reward model look perfect; as wrong, like an adversary."""
    groups = [group("a", ("x", "y")), group("b", ("y", "x"), ("z", "x"))]
    result = evaluate_reward_model(fresh_model(), groups, encoding, None, CPU)
    assert result["accuracy"] == 0.5 and result["loss"] == pytest.approx(math.log(2)) and result["calibration_error"] == 0.0
    assert (result["pairs"], result["prompts"]) == (3, 2)
    assert "ceiling" not in result and "gold_correlation" not in result


def test_accuracy_weighs_pairs_and_keeps_groups_apart(encoding, score_by_last_letter):
    """Hand-computed: right, wrong and right with weights 1, 1 and 0.5: 1.5 / 2.5."""
    groups = [group("a", ("y", "x"), ("x", "z")), group("b", ("y", "x", 0.5))]
    assert evaluate_reward_model(fresh_model(), groups, encoding, None, CPU)["accuracy"] == pytest.approx(0.6)
    many = [group("a", ("y", "x"))] * 130 + [group("b", ("x", "y"))] * 10  # more than one batch of groups
    assert evaluate_reward_model(fresh_model(), many, encoding, None, CPU)["accuracy"] == pytest.approx(130 / 140)


def test_loss_and_confidence_are_in_the_units_of_training(encoding, score_by_last_letter):
    """Scores are normalised after training; the preference loss and the calibration are those of the raw differences."""
    model = fresh_model()
    model.score_scale.fill_(3.0)
    result = evaluate_reward_model(model, [group("a", ("y", "x"))], encoding, None, CPU)
    assert result["loss"] == pytest.approx(math.log1p(math.exp(-3.0)))
    assert result["calibration_error"] == pytest.approx(1 - 1 / (1 + math.exp(-3.0)))


def test_ceiling_and_correlation_come_from_the_truth(encoding, score_by_last_letter):
    """The accuracy of an annotator who always picks the likelier of the two, and how scores go with gold."""
    result = evaluate_reward_model(fresh_model(), [group("b 1:", ("b", "c")), group("c 1:", ("c", "d"))], encoding, tiny, CPU)
    wanted = [tiny.preference_probability("b 1:", "b", "c"), tiny.preference_probability("c 1:", "c", "d")]
    assert result["ceiling"] == pytest.approx(np.mean([max(p, 1 - p) for p in wanted]))
    gold = [tiny.gold("b 1:", "b"), tiny.gold("b 1:", "c"), tiny.gold("c 1:", "c"), tiny.gold("c 1:", "d")]
    assert result["gold_correlation"] == pytest.approx(np.corrcoef([98, 99, 99, 100], gold)[0, 1])


def test_probe_table_counts_the_defects_that_are_seen(encoding, score_by_last_letter):
    """The best reply to "b 3:" is " bb": by last letter it beats neither " b" (a tie is not seen) nor " zz"."""
    table = probe_table(fresh_model(), ["b 3:", "c 3:"], encoding, tiny, 6, 5, CPU)
    assert table == {"once": (0.0, 2), "wrong letter": (0.0, 2)}

    class Shouting:
        best_response = staticmethod(lambda prompt: " z")
        probes = staticmethod(lambda prompt: {"quiet": " a", "loud": " zz"} if prompt == "b 3:" else {"quiet": " b"})

    assert probe_table(fresh_model(), ["b 3:", "c 3:"], encoding, Shouting, 6, 5, CPU) == {"loud": (0.0, 1), "quiet": (1.0, 2)}


def test_probes_longer_than_the_model_can_read_are_cut(encoding):
    """The lengths are settings; a probe beyond them crashed the run at its very end."""
    class Wordy:
        best_response = staticmethod(lambda prompt: prompt[0] * 20)
        probes = staticmethod(lambda prompt: {"at the end": prompt[0] * 19 + "x"})

    assert probe_table(fresh_model(), ["b 3:" * 10, "c 3:"], encoding, Wordy, 6, 5, CPU) == {"at the end": (0.0, 2)}


# ---- the scale of the scores -----------------------------------------------------------------------------------------


def test_base_samples_score_mean_0_and_deviation_1_and_the_constants_travel(reward_run, world):
    """kl_coef is a price in standard deviations of score: in raw units it would mean something else in every run."""
    config = read_config(RewardConfig, reward_run / "config.json")
    prompts = list(dict.fromkeys(pair.prompt for pair in load_splits(config).train))
    assert len(prompts) == config.normalise_prompts
    ids, _ = encode_prompts(prompts, world.sampling.encoding, config.max_prompt_length)
    samples = sample_responses(world.base, prompts, ids, world.sampling, "normalise", 0, list(range(len(prompts))))
    scores = world.scorer(samples) + unfinished(samples)  # as loaded from reward.pt, without the penalty of 1
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-4) and scores.std().item() == pytest.approx(1.0, abs=1e-4)
    stored = tiny.weights(reward_run / "reward.pt", "reward")
    assert stored["score_scale"] != 1.0 and stored["score_shift"] != 0.0


def test_normalising_again_changes_nothing_but_the_constants(world):
    """Only shift and scale may move; a scale of 0 (scores that are all equal) must not divide by zero."""
    model, sampling = fresh_model(), Sampling(world.sampling.encoding, 3, 1.0, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_reward.normalise_scores(model, world.base, world.train, sampling)
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])] == ["score_scale"]
    assert model.score_scale > 0


def test_the_text_scored_ends_with_eos_exactly_where_the_policy_said_so(world, reward_run):
    """Scored without its EOS, a finished reply is one that the reward model never saw; with one added, a cut reply is."""
    texts, ids = world.train
    samples = sample_responses(world.base, texts * 2, ids * 2, world.sampling._replace(max_response_length=3), "test", 0,
                               list(range(2 * len(texts))))
    assert 0 < sum(samples.finished) < len(samples.finished)
    model, _ = load_model(reward_run / "reward.pt", "reward", fingerprint(world.sampling.encoding))
    scores = model_scorer(model, 0.5)(samples)
    for i, finished in enumerate(samples.finished):
        prompt, response = samples.prompt_ids[i][samples.prompt_mask[i]], samples.response_ids[i][samples.response_mask[i]]
        sequence = torch.cat([prompt, response]).tolist()
        assert (sequence[-1] == EOS) == finished and PAD not in sequence and EOS not in sequence[:-1]
        ids = torch.tensor([sequence])
        alone = sequence_scores(model, ids, torch.ones_like(ids, dtype=torch.bool))[0] - (0.0 if finished else 0.5)
        torch.testing.assert_close(scores[i], alone, rtol=0, atol=1e-5)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_every_prompt_comes_once_before_one_comes_again():
    """Drawn at random each time, a third of the prompts is missing from a pass and another third comes twice."""
    prompts = Prompts([f"p{i}" for i in range(10)], [[i] for i in range(10)])
    seen = [text for step in range(5) for text in next_prompts(prompts, 4, 1, 0, step).texts]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(prompts.texts) and seen[:10] != seen[10:]
    assert next_prompts(prompts, 4, 1, 0, 3) == next_prompts(prompts, 4, 1, 0, 3) != next_prompts(prompts, 4, 1, 1, 3)


def test_siblings_stand_in_consecutive_rows():
    """The group baselines view rows as groups: rows in another order subtract the mean of other prompts' scores."""
    prompts = Prompts([f"p{i}" for i in range(3)], [[i] for i in range(3)])
    drawn = next_prompts(prompts, 5, 2, 0, 1)
    assert len(drawn.texts) == 10 and drawn.texts[::2] == drawn.texts[1::2]
    assert drawn.texts == [f"p{ids[0]}" for ids in drawn.ids]


# ---- policy against base ---------------------------------------------------------------------------------------------


def test_the_base_model_against_itself_wins_half_and_has_no_kl(world):
    """Judged with the same random numbers it says the same; any other figure is a fault of the judge."""
    referee = Referee(world, world.heldout, "evaluate")
    figures = referee.figures(referee.judge(world.base))
    for decoding in ("sampled", "greedy"):
        assert figures[f"{decoding}_win_rate"] == figures[f"{decoding}_win_low"] == figures[f"{decoding}_win_high"] == 0.5
        assert figures[f"{decoding}_kl"] == 0.0
    assert referee.judge(world.base)["sampled"].responses == referee.base["sampled"].responses
    assert referee.base["sampled"].responses != referee.base["greedy"].responses


def test_wins_are_judged_by_gold_where_there_is_one_and_by_score_elsewhere(world):
    """And each figure is the mean of its column."""
    referee = Referee(world, world.heldout, "evaluate")
    base = referee.base["sampled"]
    count = len(base.responses)
    better = base._replace(gold=base.gold + 1.0, score=base.score - 1.0)
    row = summarise(better, base)
    assert row["win_rate"] == 1.0 and row["gold"] == pytest.approx(base.gold.mean() + 1)
    assert row["gold_se"] == pytest.approx(base.gold.std(ddof=1) / math.sqrt(count))
    assert summarise(better._replace(gold=None), base._replace(gold=None))["win_rate"] == 0.0
    half = base._replace(gold=base.gold + np.arange(count) % 2)
    assert summarise(half, base)["win_rate"] == pytest.approx((0.5 * -(-count // 2) + count // 2) / count)
    assert row["eos_rate"] == pytest.approx(np.mean(base.finished)) and row["length"] == pytest.approx(np.mean(base.length))


def test_gold_is_that_of_the_text_and_of_its_ending(world):
    """A reply cut by length is judged as cut."""
    samples = sample_responses(world.base, *world.heldout, world.sampling._replace(max_response_length=2), "test", 0,
                               list(range(len(world.heldout.texts))))
    wanted = [tiny.gold(p, r, f) for p, r, f in zip(world.heldout.texts, samples.responses, samples.finished)]
    assert samples.gold(tiny) == wanted and samples.gold(None) is None and not all(samples.finished)


def test_best_of_n_rises_with_n_and_its_kl_bound_is_known(world):
    """log n - (n - 1) / n nats: 0 for one sample, 0.636 for four."""
    one, four, sixteen = best_of_n(world, world.heldout, (1, 4, 16))
    assert one["score"] < four["score"] < sixteen["score"]
    assert (one["kl_bound"], four["kl_bound"]) == (0.0, pytest.approx(0.6362944, abs=1e-6))
    alone = world.scorer(sample_responses(world.base, *world.heldout, world.sampling, "best of n", 0,
                                          list(range(len(world.heldout.texts)))))
    assert one["score"] == pytest.approx(alone.mean().item(), abs=1e-5)


def test_the_closing_table_measures_the_share_of_the_gap_that_was_closed(world):
    """0 for the base model itself, against the best reply there is; the table shows base and policy at both decodings."""
    figures, table, page = closing_table(world, world.base, 3)
    assert figures["sampled_gap_closed"] == figures["greedy_gap_closed"] == 0.0 and figures["best_gold"] == 2.0
    for name in ("base, sampled", "base, greedy", "policy, sampled", "policy, greedy", "base, best of 16", "best possible"):
        assert f"\n{name} " in table
    assert "judged by gold utility" in table and page.count("**before**") == page.count("**after**") == len(world.test.texts[:8])
    blind, table, _ = closing_table(world._replace(task=None), world.base, 0)
    assert "by the model it was trained on" in table and not any("gold" in key or "best" in key for key in blind)


def test_no_text_of_a_model_ends_the_fence_around_it():
    """Else a reply writes headings, links or HTML into samples.md."""
    for text in ("plain", "```", "a\n````\n# heading", "`" * 9, "\x1b[2J\u202e"):
        page = fenced(text)
        first, *inside, last = page.split("\n")
        assert first == last + "text" and not any(line.startswith(last) for line in inside)
        assert "\x1b" not in page and "\u202e" not in page


def test_reported_figures_are_those_of_the_run(reward_run):
    """The last row of a reward run says what it learnt: better than chance on pairs it never saw, with its interval."""
    last = rows(reward_run / "reward_metrics.jsonl")[-1]
    assert last["stage"] == "test" and 0.5 < last["accuracy_low"] <= last["accuracy"] <= last["accuracy_high"] <= 1.0
    assert set(last["probes"]) == {"once", "wrong letter"} and 0.5 < last["ceiling"] < 1.0 and -1 <= last["gold_correlation"] <= 1
