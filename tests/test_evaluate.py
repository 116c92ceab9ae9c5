"""Evaluation: every reported metric has the meaning that its name states."""

import copy
import doctest
import math
import time
import tracemalloc
from types import SimpleNamespace

import train_reward
from minirlhf.config import RewardConfig
from minirlhf.data.batches import PreferenceGroup
from minirlhf.data.prompts import Prompts, encode_prompts, prompts_of_step, unique_prompts
from minirlhf.data.splits import load_splits
from minirlhf.data.tokenizer import fingerprint, load_tokenizer
from minirlhf.evaluation import policy, reward_model, statistics
from minirlhf.evaluation.policy import Evaluator, best_of_n, fenced, final_evaluation, summarize
from minirlhf.evaluation.reward_model import (
    calibration_error,
    evaluate_probes,
    evaluate_reward_model,
)
from minirlhf.evaluation.statistics import bootstrap_interval, share_interval, standard_error
from minirlhf.model.loading import load_model
from minirlhf.model.transformer import ModelConfig, Transformer, sequence_scores
from minirlhf.rl.reward import Reward, score_responses
from minirlhf.rl.sampling import SamplingSettings, gold_utility, sample_responses
from minirlhf.rl.task import load_task
from minirlhf.run.folder import read_config
from minirlhf.run.seeding import derive_seed

import numpy as np
import pytest
import tiny
import torch
from tiny import EOS, PAD, policy_config


@pytest.fixture(scope="module")
def task(reward_run):
    return load_task(policy_config(reward_run, ""), None, torch.device("cpu"))


@pytest.fixture(scope="module")
def encoding(inputs):
    return load_tokenizer(str(inputs / "bytes.tiktoken"))


@pytest.fixture
def score_by_last_letter(monkeypatch):
    """A reward model with known scores: the byte before EOS."""

    def scores(model, ids, mask):
        return torch.tensor([float(row[keep][-2]) for row, keep in zip(ids, mask)])

    monkeypatch.setattr(reward_model, "sequence_scores", scores)


def group(prompt, *pairs):
    """Responses of one letter each; pairs: (winner, loser) or (winner, loser, weight)."""
    letters = sorted({letter for pair in pairs for letter in pair[:2]})
    responses = tuple((*letter.encode(), EOS) for letter in letters)
    indices = tuple(
        (letters.index(winner), letters.index(loser), 0.0, *(weight or [1.0]))
        for winner, loser, *weight in pairs
    )
    return PreferenceGroup(tuple(prompt.encode()), responses, indices)


def fresh_model():
    """A model that gives every text the score 0."""
    return Transformer(
        ModelConfig(tiny.VOCAB, table_rows=320, n_layer=1, n_head=2, d_model=8, context=11)
    )


# ---- statistics ----------------------------------------------------------------------------------


def test_the_mean_is_weighted_and_inside_its_interval():
    """By hand: (0 * 1 + 1 * 3) / 4. If all values are equal, the interval has width 0."""
    mean, low, high = bootstrap_interval(np.array([0.0, 1.0]), np.array([1.0, 3.0]))
    assert mean == 0.75 and 0.0 <= low <= mean <= high <= 1.0
    assert bootstrap_interval(np.array([0.3, 0.3, 0.3])) == pytest.approx((0.3, 0.3, 0.3))
    assert bootstrap_interval(np.array([0.7])) == pytest.approx((0.7, 0.7, 0.7))


def test_interval_has_the_width_of_the_normal_interval_and_is_reproducible():
    """For 400 fair coins it has 1.96 standard errors on each side. A second call gives the same."""
    coins = np.arange(400) % 2
    mean, low, high = bootstrap_interval(coins)
    assert mean == 0.5
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400), rel=0.1)
    assert bootstrap_interval(coins) == (mean, low, high)


@pytest.mark.parametrize("at_a_time", [1, 7, 2000, 10**6])
def test_interval_needs_little_memory_and_has_the_same_draws_in_any_parts(at_a_time, monkeypatch):
    """All draws at once took 12 GiB for 385,000 prompts, at the end of a run."""
    values = np.random.default_rng(0).random(501)
    weights = np.random.default_rng(1).random(501) + 0.5
    draws = np.random.default_rng(derive_seed(0, "bootstrap")).integers(501, size=(2000, 501))
    means = (values * weights)[draws].sum(1) / weights[draws].sum(1)
    monkeypatch.setattr(statistics, "CHUNK", 501 * at_a_time)
    tracemalloc.start()
    interval = bootstrap_interval(values, weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert interval[1:] == tuple(np.quantile(means, (0.025, 0.975)))
    assert peak < 200_000 + 40 * 501 * at_a_time


def test_interval_resamples_prompts_and_not_pairs():
    """If ten pairs of a prompt counted as ten observations, the interval would be too narrow."""
    _, low, high = bootstrap_interval(np.array([0.0, 1.0, 1.0, 0.0]), np.full(4, 10.0))
    assert (low, high) == (0.0, 1.0)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_of_none_or_all_has_an_interval_with_a_width(value):
    """One prompt of one proves little. 0.5407^6 = 0.025. Other intervals stay the same."""
    for count, bound in ((1, 0.025), (6, 0.5407), (1000, 0.9963)):
        mean, low, high = share_interval(np.full(count, value), np.ones(count))
        expected = (1.0, bound, 1.0) if value else (0.0, 0.0, 1 - bound)
        assert (mean, low, high) == pytest.approx(expected, abs=1e-4)
    mixed = np.array([value, 0.5, value])
    assert share_interval(mixed) == bootstrap_interval(mixed)


def test_standard_error_by_hand():
    """Standard deviation with n - 1, divided by sqrt(n). For one number it is infinite, not 0."""
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(math.sqrt(2.0) / math.sqrt(2))
    assert standard_error(np.array([5.0])) == float("inf")


def test_calibration_error_by_hand():
    """With confidence 0.75, an accuracy of 3/4 has no error, and 1 or 1/2 have the error 0.25."""
    gap = math.log(3.0)  # sigmoid: 0.75
    assert calibration_error(
        np.full(4, gap), np.array([1.0, 1.0, 1.0, 0.0]), np.ones(4)
    ) == pytest.approx(0.0)
    assert calibration_error(
        np.full(4, -gap), np.array([1.0, 1.0, 1.0, 0.0]), np.ones(4)
    ) == pytest.approx(0.0)
    assert calibration_error(np.full(4, gap), np.ones(4), np.ones(4)) == pytest.approx(0.25)
    assert calibration_error(
        np.full(4, gap), np.array([1.0, 1.0, 0.0, 0.0]), np.ones(4)
    ) == pytest.approx(0.25)
    sure = np.array([gap, gap, 20.0, 20.0])  # two bins, one of them with an error of 0.25
    assert calibration_error(sure, np.array([1.0, 1.0, 1.0, 1.0]), np.ones(4)) == pytest.approx(
        0.125
    )
    assert calibration_error(np.full(3, 1e4), np.ones(3), np.ones(3)) == pytest.approx(0.0)


# ---- the reward model ----------------------------------------------------------------------------


def test_a_prompt_counts_once_in_any_number_of_groups(score_by_last_letter, encoding):
    """Pairs of a prompt may be anywhere in a file. Counted twice, the interval is too narrow.

    In the correlation, a response counts once in any number of groups.
    """
    apart = [group("a", ("y", "x")), group("b", ("x", "y")), group("a", ("x", "z"), ("z", "x"))]
    together = [group("a", ("y", "x"), ("x", "z"), ("z", "x")), group("b", ("x", "y"))]
    truth = SimpleNamespace(gold=lambda prompt, response, finished: response == "x")
    results = [
        evaluate_reward_model(fresh_model(), groups, encoding, truth)
        for groups in (apart, together)
    ]
    assert results[0] == pytest.approx(results[1])
    assert results[0]["prompts"] == 2
    assert results[0]["accuracy"] == pytest.approx(2 / 4)


def test_calibration_and_ceiling_use_the_weights_of_the_pairs(score_by_last_letter, encoding):
    """A pair of weight 3 counts like three pairs, as it does in the accuracy."""

    class Truth:
        @staticmethod
        def preference_probability(prompt, a, b):
            return 0.9 if "y" in (a, b) else 0.6

    weighted = [group("a", ("y", "x", 3.0), ("x", "z", 1.0))]
    repeated = [group("a", ("y", "x"), ("y", "x"), ("y", "x"), ("x", "z"))]
    a, b = (
        evaluate_reward_model(fresh_model(), groups, encoding, Truth)
        for groups in (weighted, repeated)
    )
    for key in ("accuracy", "loss", "calibration_error", "ceiling"):
        assert a[key] == pytest.approx(b[key]), key
    assert a["ceiling"] == pytest.approx((3 * 0.9 + 0.6) / 4)


def test_equal_scores_give_accuracy_one_half(encoding):
    """If ties counted as correct, an untrained reward model would have accuracy 1."""
    groups = [group("a", ("x", "y")), group("b", ("y", "x"), ("z", "x"))]
    result = evaluate_reward_model(fresh_model(), groups, encoding, None)
    assert result["accuracy"] == 0.5
    assert result["loss"] == pytest.approx(math.log(2))
    assert result["calibration_error"] == 0.0
    assert (result["pairs"], result["prompts"]) == (3, 2)
    assert "ceiling" not in result
    assert "gold_correlation" not in result


def test_accuracy_weights_pairs_and_keeps_groups_apart(encoding, score_by_last_letter):
    """By hand: correct, wrong and correct with weights 1, 1 and 0.5 give 1.5 / 2.5."""
    groups = [group("a", ("y", "x"), ("x", "z")), group("b", ("y", "x", 0.5))]
    result = evaluate_reward_model(fresh_model(), groups, encoding, None)
    assert result["accuracy"] == pytest.approx(0.6)
    # more than one batch of groups
    groups = [group("a", ("y", "x"))] * 130 + [group("b", ("x", "y"))] * 10
    result = evaluate_reward_model(fresh_model(), groups, encoding, None)
    assert result["accuracy"] == pytest.approx(130 / 140)


def test_loss_and_confidence_use_raw_scores(encoding, score_by_last_letter):
    """Training optimizes raw scores, so a normalized score would give another loss."""
    model = fresh_model()
    model.score_scale.fill_(3.0)
    result = evaluate_reward_model(model, [group("a", ("y", "x"))], encoding, None)
    assert result["loss"] == pytest.approx(math.log1p(math.exp(-3.0)))
    assert result["calibration_error"] == pytest.approx(1 - 1 / (1 + math.exp(-3.0)))


def test_ceiling_and_correlation_come_from_the_ground_truth(
    encoding, monkeypatch, score_by_last_letter
):
    """The ceiling is the accuracy of always choosing the more probable response of a pair."""
    groups = [group("b 1:", ("b", "c")), group("c 1:", ("c", "d"))]
    result = evaluate_reward_model(fresh_model(), groups, encoding, tiny)
    probabilities = [
        tiny.preference_probability("b 1:", "b", "c"),
        tiny.preference_probability("c 1:", "c", "d"),
    ]
    assert result["ceiling"] == pytest.approx(np.mean([max(p, 1 - p) for p in probabilities]))
    gold = [
        tiny.gold("b 1:", "b"),
        tiny.gold("b 1:", "c"),
        tiny.gold("c 1:", "c"),
        tiny.gold("c 1:", "d"),
    ]
    expected = pytest.approx(np.corrcoef([98, 99, 99, 100], gold)[0, 1])
    assert result["gold_correlation"] == expected
    scores = reward_model.sequence_scores
    monkeypatch.setattr(reward_model, "sequence_scores", lambda *batch: 0.001 * scores(*batch))
    truth = SimpleNamespace(gold=lambda *response: 0.001 * tiny.gold(*response))
    result = evaluate_reward_model(fresh_model(), groups, encoding, truth)
    assert result["gold_correlation"] == expected  # no difference is too small


def test_equal_scores_or_gold_have_no_correlation(encoding, monkeypatch, score_by_last_letter):
    """Their deviation is 0, so the formula would divide by 0."""
    groups = [group("b 1:", ("b", "c")), group("c 1:", ("c", "d"))]
    monkeypatch.setattr(tiny, "gold", lambda *arguments: 1.5)
    assert evaluate_reward_model(fresh_model(), groups, encoding, tiny)["gold_correlation"] == 0.0
    monkeypatch.undo()
    assert evaluate_reward_model(fresh_model(), groups, encoding, tiny)["gold_correlation"] == 0.0


def test_probes_count_the_detected_defects(encoding, score_by_last_letter):
    """By last letter the best response " bb" beats neither " b" (a tie is a miss) nor " zz"."""
    texts = ["b 3:", "c 3:"]
    shares = evaluate_probes(fresh_model(), texts, encoding, tiny, 6, 5)
    assert shares == {"once": (0.0, 2), "wrong letter": (0.0, 2)}

    class OtherTruth:
        best_response = staticmethod(lambda prompt: " z")
        probes = staticmethod(
            lambda prompt: {"low": " a", "high": " zz"} if prompt == "b 3:" else {"low": " b"}
        )

    shares = evaluate_probes(fresh_model(), texts, encoding, OtherTruth, 6, 5)
    assert shares == {"high": (0.0, 1), "low": (1.0, 2)}


def test_probes_longer_than_the_maximum_are_cut(encoding):
    """Without the cut, a long probe would stop the run at its end."""

    class LongTruth:
        best_response = staticmethod(lambda prompt: prompt[0] * 20)
        probes = staticmethod(lambda prompt: {"at the end": prompt[0] * 19 + "x"})

    shares = evaluate_probes(fresh_model(), ["b 3:" * 10, "c 3:"], encoding, LongTruth, 6, 5)
    assert shares == {"at the end": (0.0, 2)}


# ---- the scale of the scores ---------------------------------------------------------------------


def test_scores_of_base_samples_have_mean_0_and_deviation_1_after_loading(reward_run, task):
    """kl_coef is a price in standard deviations of the score, so reward.pt must store its scale."""
    config = read_config(RewardConfig, reward_run / "config.json")
    texts = unique_prompts(load_splits(config).train)
    assert len(texts) == config.normalize_prompts
    prompts = encode_prompts(texts, task.sampling.encoding, config.max_prompt_length)
    rows = list(range(len(texts)))
    samples = sample_responses(
        task.base, prompts, task.sampling, train_reward.NORMALIZATION, 0, rows
    )
    scores = score_responses(task.reward._replace(missing_eos_penalty=0.0), samples)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1.0, abs=1e-4)
    stored = tiny.weights(reward_run / "reward.pt", "reward")
    assert stored["score_scale"] != 1.0
    assert stored["score_shift"] != 0.0


def test_normalization_changes_only_shift_and_scale(task):
    """Weights must not change, and equal scores must not give a scale of 0."""
    model = fresh_model()
    sampling = SamplingSettings(task.sampling.encoding, 3, 1.0, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_reward.normalize_scores(model, task.base, task.train, sampling)
    changed = [
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    ]
    assert changed == []
    assert model.score_scale == 1.0
    with torch.no_grad():
        model.reward_head.weight.normal_(std=1e-20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_reward.normalize_scores(model, task.base, task.train, sampling)
    changed = [
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    ]
    assert changed == ["score_shift", "score_scale"]
    assert 0 < model.score_scale < 1e-18  # scores that differ little keep their differences


def test_equal_scores_are_normalized_to_exactly_0(task):
    """The mean of equal numbers is rounded, and divided by a rounded deviation it was near 1."""
    sampling = SamplingSettings(task.sampling.encoding, 3, 1.0, 0)
    samples = sample_responses(task.base, task.train.first(2), sampling)
    for value in (0.1, 1.3, 3.7, 5.3, 7.77, 99.9, 12345.6):
        model = fresh_model()
        with torch.no_grad():
            model.reward_head.bias.fill_(value)
        train_reward.normalize_scores(model, task.base, task.train, sampling)
        assert score_responses(Reward("constant", model, 0.0), samples).tolist() == [0.0, 0.0]


def test_a_scored_text_ends_with_eos_only_if_the_policy_sampled_it(task, reward_run):
    """A finished response without its EOS, or a cut one with an EOS, would get another score."""
    rows = list(range(2 * len(task.train.texts)))
    samples = sample_responses(
        task.base,
        Prompts(task.train.texts * 2, task.train.ids * 2),
        task.sampling._replace(max_response_length=3),
        "test",
        0,
        rows,
    )
    assert 0 < sum(samples.finished) < len(samples.finished)
    model, _ = load_model(reward_run / "reward.pt", "reward", fingerprint(task.sampling.encoding))
    scores = score_responses(Reward("reward model", model, missing_eos_penalty=0.5), samples)
    for row, finished in enumerate(samples.finished):
        prompt = samples.prompt_ids[row][samples.prompt_mask[row]]
        response = samples.response_ids[row][samples.response_mask[row]]
        sequence = torch.cat([prompt, response]).tolist()
        assert (sequence[-1] == EOS) == finished
        assert PAD not in sequence
        assert EOS not in sequence[:-1]
        ids = torch.tensor([sequence])
        expected = sequence_scores(model, ids, torch.ones_like(ids, dtype=torch.bool))[0]
        if not finished:
            expected -= 0.5
        torch.testing.assert_close(scores[row], expected, rtol=0, atol=1e-5)


# ---- prompts -------------------------------------------------------------------------------------


def test_every_prompt_occurs_once_before_any_is_repeated():
    """Independent random draws would miss a third of the prompts in each pass."""
    prompts = Prompts([f"p{i}" for i in range(10)], [(i,) for i in range(10)])
    seen = [text for step in range(5) for text in prompts_of_step(prompts, 4, 1, 0, step).texts]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(prompts.texts)
    assert seen[:10] != seen[10:]
    chosen = prompts_of_step(prompts, 4, 1, 0, 3)
    assert chosen == prompts_of_step(prompts, 4, 1, 0, 3)
    assert chosen != prompts_of_step(prompts, 4, 1, 1, 3)


def test_copies_of_a_prompt_are_in_consecutive_rows():
    """Group baselines take consecutive rows as groups; another order would mix prompts."""
    prompts = Prompts([f"p{i}" for i in range(3)], [(i,) for i in range(3)])
    chosen = prompts_of_step(prompts, 5, 2, 0, 1)
    assert len(chosen.texts) == 10
    assert chosen.texts[::2] == chosen.texts[1::2]
    assert chosen.texts == [f"p{ids[0]}" for ids in chosen.ids]


# ---- the policy compared with the base model -----------------------------------------------------


def test_the_base_model_against_itself_wins_half_and_has_no_kl(task):
    """With the same random numbers it generates the same responses, so all of them are ties."""
    evaluator = Evaluator(task, task.heldout, "evaluate")
    results = evaluator.evaluate(task.base)
    metrics = evaluator.metrics(results)
    for decoding in ("sampled", "greedy"):
        for key in ("win_rate", "win_low", "win_high"):
            assert metrics[f"{decoding}_{key}"] == 0.5
        assert metrics[f"{decoding}_kl"] == 0.0
    assert results["sampled"].responses == evaluator.base["sampled"].responses
    assert evaluator.base["sampled"].responses != evaluator.base["greedy"].responses


def test_the_kl_of_an_evaluation_is_that_of_the_policy_from_the_base_model(task):
    """At the temperature of evaluation, which need not be that of training."""
    task = task._replace(evaluation=task.evaluation._replace(temperature=0.7))
    policy = copy.deepcopy(task.base)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    rows = list(range(len(task.heldout.texts)))
    samples = sample_responses(
        policy.for_decoding(), task.heldout, task.evaluation, "evaluate", rows=rows
    )
    expected = []
    for row in rows:
        logprobs = response_log_softmax(policy, samples, row, 0.7)
        difference = logprobs - response_log_softmax(task.base, samples, row, 0.7)
        expected.append((logprobs.exp() * difference).sum().item())
    kl = Evaluator(task, task.heldout, "evaluate").evaluate(policy)["sampled"].kl
    np.testing.assert_allclose(kl, expected, atol=1e-4)
    assert kl.max() > 0.01


def response_log_softmax(model, samples, row, temperature):
    """[tokens, V] log pi(. | s_t), from all logits of one sequence without padding."""
    prompt = samples.prompt_ids[row][samples.prompt_mask[row]]
    response = samples.response_ids[row][samples.response_mask[row]]
    ids = torch.cat([prompt, response])[None]
    hidden = model(ids, torch.ones_like(ids, dtype=torch.bool))[0, len(prompt) - 1 : -1]
    return (hidden @ model.lm_weight.T / temperature).log_softmax(-1)


def test_wins_compare_gold_utility_if_it_is_known_and_the_score_otherwise(task):
    """The win rate compares utilities; the other metrics are means over all responses."""
    evaluator = Evaluator(task, task.heldout, "evaluate")
    base = evaluator.base["sampled"]
    count = len(base.responses)
    others = [f"{text}!" for text in base.responses]
    better = base._replace(responses=others, gold=base.gold + 1.0, score=base.score - 1.0)
    row = summarize(better, base)
    assert row["win_rate"] == 1.0
    assert row["gold"] == pytest.approx(base.gold.mean() + 1)
    assert row["gold_se"] == pytest.approx(base.gold.std(ddof=1) / math.sqrt(count))
    assert row["eos_rate"] == pytest.approx(np.mean(base.finished))
    assert summarize(base._replace(finished=np.zeros(count)), base)["eos_rate"] == 0.0
    assert row["length"] == pytest.approx(np.mean(base.length))
    assert summarize(better._replace(gold=None), base._replace(gold=None))["win_rate"] == 0.0
    half = base._replace(responses=others, gold=base.gold + np.arange(count) % 2)
    expected = (0.5 * -(-count // 2) + count // 2) / count
    assert summarize(half, base)["win_rate"] == pytest.approx(expected)


def test_equal_responses_are_a_tie_whatever_the_rounding_of_their_scores(task):
    """The score of a text differs in the last digits between batches of other shapes."""
    base = Evaluator(task, task.heldout, "evaluate").base["sampled"]._replace(gold=None)
    rounded = base._replace(score=base.score + 1e-7)
    assert summarize(rounded, base)["win_rate"] == 0.5
    assert summarize(rounded._replace(finished=~base.finished), base)["win_rate"] == 1.0


def test_gold_utility_depends_on_text_and_ending(task):
    """The ground truth must know which responses were cut by length."""
    rows = list(range(len(task.heldout.texts)))
    sampling = task.sampling._replace(max_response_length=2)
    samples = sample_responses(task.base, task.heldout, sampling, "test", 0, rows)
    expected = [
        tiny.gold(prompt, response, finished)
        for prompt, response, finished in zip(
            task.heldout.texts, samples.responses, samples.finished
        )
    ]
    assert gold_utility(samples, tiny) == expected
    assert gold_utility(samples, None) is None
    assert not all(samples.finished)


def test_best_of_n_improves_with_n_and_has_the_known_kl_bound(task):
    """The bound is log n - (n - 1) / n nats: 0 for one sample, 0.636 for four."""
    one, two, four, sixteen = best_of_n(task, task.heldout, (1, 2, 4, 16))
    assert one["score"] < four["score"] < sixteen["score"]
    assert one["kl_bound"] == 0.0
    assert two["kl_bound"] == pytest.approx(0.1931472, abs=1e-6)
    assert four["kl_bound"] == pytest.approx(0.6362944, abs=1e-6)
    rows = list(range(len(task.heldout.texts)))
    samples = sample_responses(task.base, task.heldout, task.sampling, "best of n", 0, rows)
    expected = score_responses(task.reward, samples).mean().item()
    assert one["score"] == pytest.approx(expected, abs=1e-5)


def test_best_of_n_samples_few_prompts_at_a_time(task, monkeypatch):
    """All at once could fill the memory at the end of a run; the samples are the same."""
    assert doctest.testmod(policy).failed == 0
    expected = best_of_n(task, task.train, (1, 4))
    counts = []

    def recording(model, prompts, *arguments):
        counts.append(len(prompts.texts))
        return sample_responses(model, prompts, *arguments)

    monkeypatch.setattr(policy, "BATCH", 4)
    monkeypatch.setattr(policy, "sample_responses", recording)
    for row, other in zip(expected, best_of_n(task, task.train, (1, 4))):
        assert row == pytest.approx(other, abs=1e-5)
    assert max(counts) == 4 and sum(counts) == 4 * len(task.train.texts)


def test_the_final_table_shows_the_share_of_the_gap_that_is_closed(task):
    """The share is 0 for the base model. The table shows both models at both decodings."""
    metrics, table, page = final_evaluation(task, task.base, 3)
    assert metrics["sampled_gap_closed"] == metrics["greedy_gap_closed"] == 0.0
    assert metrics["best_gold"] == 2.0
    for row in best_of_n(task, task.test.first(3), (1, 4, 16)):
        for key in ("score", "gold", "kl_bound"):
            assert metrics[f"best_of_{row['n']}_{key}"] == row[key]
    base = Evaluator(task, task.test, "test").base["sampled"]
    assert metrics["sampled_score"] == pytest.approx(base.score.mean())
    for name in (
        "base, sampled",
        "base, greedy",
        "policy, sampled",
        "policy, greedy",
        "base, best of 16",
        "best possible",
    ):
        assert f"\n{name} " in table
    (line,) = (line for line in table.splitlines() if line.startswith("policy, sampled"))
    shown = [f"{metrics[f'sampled_{key}']:+.2f}" for key in ("gold", "score")]
    assert shown[0] in line.split() and shown[1] in line.split()
    assert "wins against the base model at the same decoding, by gold utility" in table
    assert table.endswith("best of n: on the first 3 of these prompts")
    assert page.count("**before**") == page.count("**after**") == len(task.test.texts[:8])
    metrics, table, _ = final_evaluation(task._replace(ground_truth=None), task.base, 0)
    assert "by score (the task has no gold utility)" in table and "best of n" not in table
    assert not any("gold" in key or "best" in key for key in metrics)


def test_final_numbers_are_those_of_the_test_prompts(task, monkeypatch):
    """Neither the prompts of training nor those on which settings were chosen."""
    part = [task.train.rows([row, row + 1]) for row in (0, 2, 4)]
    task = task._replace(train=part[0], heldout=part[1], test=part[2])
    assert len({text for prompts in part for text in prompts.texts}) == 6
    answered = []

    def recording(model, prompts, *arguments, **keywords):
        answered.extend(prompts.texts)
        return sample_responses(model, prompts, *arguments, **keywords)

    monkeypatch.setattr(policy, "sample_responses", recording)
    metrics, _, page = final_evaluation(task, task.base, 2)
    assert set(answered) == set(task.test.texts)
    assert len(answered) == 2 * (2 * 2 + 16)  # both decodings of two models, and best of 16
    best = [tiny.gold(text, tiny.best_response(text), True) for text in task.test.texts]
    assert metrics["best_gold"] == np.mean(best)
    assert all(text in page for text in task.test.texts)


def test_no_text_can_end_the_code_fence_around_it():
    """Otherwise a response could write headings, links or HTML into samples.md."""
    for text in ("plain", "```", "a\n````\n# heading", "`" * 9, "\x1b[2J\u202e"):
        page = fenced(text)
        first, *inside, last = page.split("\n")
        assert first == last + "text"
        assert not any(line.startswith(last) for line in inside)
        assert "\x1b" not in page
        assert "\u202e" not in page
    start = time.process_time()
    assert len(fenced("`" * 200_000)) == 600_008  # takes linear time
    assert time.process_time() - start < 2


def test_the_last_row_of_a_reward_run_has_its_test_metrics(reward_run):
    """The accuracy on unseen pairs is better than chance and inside its interval."""
    last = tiny.rows(reward_run / "reward_metrics.jsonl")[-1]
    assert last["stage"] == "test"
    assert 0.5 < last["accuracy_low"] <= last["accuracy"] <= last["accuracy_high"] <= 1.0
    assert set(last["probes"]) == {"once", "wrong letter"}
    assert 0.5 < last["ceiling"] < 1.0
    assert -1 <= last["gold_correlation"] <= 1


def test_a_base_model_that_is_the_best_possible_has_no_gap():
    truth = SimpleNamespace(gold=lambda *_: 1.0, best_response=lambda prompt: "")
    task = SimpleNamespace(ground_truth=truth, test=SimpleNamespace(texts=["a", "b"]))
    metrics = {
        f"{name}{decoding}_gold": 1.0 for name in ("", "base_") for decoding in policy.DECODINGS
    }
    assert policy.gap_closed(task, metrics) == dict(best_gold=1.0)
