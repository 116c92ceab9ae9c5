"""Rollouts: log-probs, values, scores and rewards of the right action, whatever the padding."""

import copy
import math

from minirlhf.config import PolicyConfig
from minirlhf.model.generate import generate
from minirlhf.model.transformer import ModelConfig, Transformer
from minirlhf.rl.algorithms import (
    ALGORITHMS,
    estimate_advantages,
    explained_variance,
    minibatch_loss,
)
from minirlhf.rl.reward import Reward, score, score_responses
from minirlhf.rl.rollout import (
    Rollout,
    adapt_kl_coef,
    evaluate_actions,
    measure,
    sequence_kl,
    token_rewards,
)
from minirlhf.rl.sampling import Samples
from minirlhf.run import parallel
from minirlhf.run.seeding import row_uniforms
from train_policy import describe, update

import pytest
import torch
from exact import gradient, make_mdp, make_rollout, padded_samples, per_token, tabulate, tiny_model
from tiny import make_samples
from torch import Tensor

MDP = make_mdp(((1, 2, 0), (2,)))
COUNT = 80  # responses in MDP
TEMPERATURE = 1.7
FIELDS = ("logprobs", "ref_logprobs", "values", "rewards")  # [B, R] of a rollout


def numbers(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_scores() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, dtype=torch.float64, generator=generator)


def rollout_of_all(kl_coef: float = 0.3, extra: int = 0, model_seed: int = 1) -> Rollout:
    """All responses as one rollout."""
    model = tiny_model(model_seed)
    samples = padded_samples(MDP, extra)
    return make_rollout(model, tiny_model(2), samples, random_scores(), kl_coef, TEMPERATURE)


def tensors_of(rollout: Rollout) -> list[Tensor]:
    return [x for x in (*rollout, *rollout.samples) if isinstance(x, Tensor)]


def first_columns(samples: Samples, columns: int) -> Samples:
    """The samples with only the first tokens of each response."""
    return samples._replace(
        response_ids=samples.response_ids[:, :columns],
        response_mask=samples.response_mask[:, :columns],
    )


# ---- log-probs and values ------------------------------------------------------------------------


@pytest.mark.parametrize("model_seed", [1, 3])
def test_each_column_belongs_to_its_own_action(model_seed):
    """Catches log-probs or values that are one position early or late."""
    model = tiny_model(model_seed)
    policy = tabulate(model, MDP, TEMPERATURE)
    ref_policy = tabulate(tiny_model(2), MDP, TEMPERATURE)
    rollout = rollout_of_all(model_seed=model_seed)
    _, _, entropy = evaluate_actions(model, padded_samples(MDP), TEMPERATURE, entropy=True)

    def exact_entropy(state, action):
        logp = policy.logprobs[state]
        return -(logp.exp() * logp).sum()

    for actual, function in (
        (rollout.logprobs, lambda state, action: policy.logprobs[state][action]),
        (rollout.ref_logprobs, lambda state, action: ref_policy.logprobs[state][action]),
        (rollout.values, lambda state, action: policy.values[state]),
        (entropy, exact_entropy),
    ):
        assert torch.allclose(actual, per_token(MDP, function), rtol=1e-10, atol=1e-12)


def test_all_fields_are_zero_beyond_the_mask():
    """Log-probs of padding would add KL terms."""
    rollout = rollout_of_all(extra=2)
    for name in FIELDS:
        assert not getattr(rollout, name)[~rollout.mask].any(), name


@pytest.mark.parametrize("size", [0, 1, 3, 7, COUNT, COUNT + 1])
def test_measure_equals_evaluate_actions_for_every_micro_batch_size(size):
    """Micro-batches save memory only: rows keep their values and their order."""
    model = tiny_model(1)
    samples = padded_samples(MDP)
    config = PolicyConfig(temperature=TEMPERATURE, micro_batch_size=size)
    measured = measure(model, samples, config)
    for actual, expected in zip(measured, evaluate_actions(model, samples, TEMPERATURE)):
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)
        assert not actual.requires_grad


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_rollout_does_not_depend_on_batching_or_order(size):
    """Log-probs of a row must not depend on the other rows: minibatches are shuffled."""
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    samples = padded_samples(MDP).rows(order)
    scores = random_scores()[order]
    model, reference = tiny_model(1), tiny_model(2)
    shuffled = make_rollout(model, reference, samples, scores, 0.3, TEMPERATURE, size)
    for actual, expected in zip(tensors_of(shuffled), tensors_of(rollout_of_all())):
        expected = expected[order] if len(expected) else expected
        assert torch.allclose(actual.double(), expected.double(), rtol=1e-10, atol=1e-12)


def test_rows_of_a_rollout_are_the_rows_of_all_its_fields():
    """Catches a field that rows() leaves out or takes from other rows."""
    config = PolicyConfig(algorithm="gae")
    rollout = estimate_advantages(ALGORITHMS["gae"], rollout_of_all(), config)
    texts = [f"response {row}" for row in range(COUNT)]
    finished = [row % 2 == 0 for row in range(COUNT)]
    samples = rollout.samples._replace(responses=texts, finished=finished)
    rollout = rollout._replace(samples=samples)
    index = torch.tensor([3, 3, 1])
    rows = rollout.rows(index)
    assert rows.samples.responses == ["response 3", "response 3", "response 1"]
    assert rows.samples.finished == [False, False, False]
    assert rows.kl_coef == rollout.kl_coef
    for actual, expected in zip(tensors_of(rows), tensors_of(rollout)):
        assert torch.equal(actual, expected[index])


def test_the_temperature_divides_the_logits_of_policy_and_reference():
    """A reference at temperature 1 would add a KL penalty for the temperature itself."""
    model = tiny_model(1)
    samples = padded_samples(MDP)
    rollout = make_rollout(model, model, samples, random_scores(), 0.3, TEMPERATURE, 0)
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    other = make_rollout(model, model, samples, random_scores(), 0.3, 1.0, 0)
    assert (rollout.logprobs - other.logprobs)[rollout.mask].abs().min() > 1e-6


def test_training_and_evaluation_mode_give_the_same_log_probs():
    """Dropout in the policy would change the first importance ratio."""
    model = tiny_model(1)
    samples = padded_samples(MDP)
    in_training = evaluate_actions(model.train(), samples, 1.0, True)
    in_evaluation = evaluate_actions(model.eval(), samples, 1.0, True)
    assert all(map(torch.equal, in_training, in_evaluation))


def test_a_rollout_has_no_gradient():
    """Rewards and baselines are constants of the loss."""
    assert not any(tensor.requires_grad for tensor in tensors_of(rollout_of_all()))


def test_measuring_does_not_change_its_arguments():
    """The samples are logged later, so no function may write into them."""
    samples = padded_samples(MDP)
    scores = random_scores()
    given = [*samples, scores]
    copies = copy.deepcopy(given)
    rollout = make_rollout(tiny_model(1), tiny_model(2), samples, scores, 0.3, TEMPERATURE)
    for actual, expected in zip(given, copies):
        assert torch.equal(actual, expected) if isinstance(actual, Tensor) else actual == expected
    copies = [tensor.clone() for tensor in tensors_of(rollout)]
    token_rewards(scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, 0.3)
    sequence_kl(tiny_model(1), tiny_model(2), samples, TEMPERATURE)
    rollout = estimate_advantages(ALGORITHMS["ppo"], rollout, PolicyConfig())
    rollout.rows(torch.tensor([3, 3, 1]))
    rollout = rollout._replace(advantages=torch.empty(0), returns=torch.empty(0))
    assert all(map(torch.equal, copies, tensors_of(rollout)))


# ---- rewards -------------------------------------------------------------------------------------


def test_rewards_by_hand():
    """Catches a score that is one token late, or paid on finished rows only, or on each token."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    logprobs = numbers([-1.0, -2.0, -3.0], [-1.0, -0.5, 0.0], [-4.0, 0.0, 0.0])
    ref_logprobs = numbers([-2.0, -1.0, -3.0], [-1.5, -1.5, 0.0], [-3.0, 0.0, 0.0])
    rewards = token_rewards(numbers(10.0, 20.0, 30.0), logprobs, ref_logprobs, mask, 0.1)
    expected = [[-0.1, 0.1, 10.0], [-0.05, 19.9, 0.0], [30.1, 0.0, 0.0]]
    assert rewards.tolist() == [pytest.approx(row) for row in expected]


def test_rewards_sum_to_the_score_minus_the_kl_terms():
    """Holds for finished responses, cut responses and responses of one token."""
    rollout = rollout_of_all(extra=1)
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)
    assert torch.allclose(rollout.rewards.sum(1), rollout.scores - 0.3 * kl, rtol=1e-12)
    without_kl = rollout_of_all(kl_coef=0.0, extra=1)
    last = without_kl.mask.sum(1) - 1
    assert torch.equal(without_kl.rewards.nonzero()[:, 1], last)
    assert torch.equal(without_kl.rewards[torch.arange(COUNT), last], without_kl.scores)
    assert set(last.tolist()) == {0, 1, 2}
    assert (without_kl.samples.response_ids[:, 2] < MDP.eos).any()  # some responses are cut


@pytest.mark.parametrize("padding", [math.nan, 1e6, math.inf, -math.inf])
def test_padding_affects_no_reward(padding):
    """Log-probs after the last token have no effect, not even NaN."""
    r = rollout_of_all()
    dirty = [torch.where(r.mask, x, padding) for x in (r.logprobs, r.ref_logprobs)]
    assert torch.equal(token_rewards(r.scores, *dirty, r.mask, 0.3), r.rewards)


def three_samples() -> Samples:
    """Three responses of two tokens; the second one is not finished."""
    ids = torch.tensor([[1, 2], [1, 2], [1, 2]])
    mask = torch.ones(3, 2, dtype=torch.bool)
    return Samples(["p"] * 3, ["a", "b", ""], [True, False, True], ids, mask, ids, mask)


def test_a_response_cut_by_length_has_the_penalty_in_its_score():
    """Without the penalty, responses that never end would cost nothing."""
    samples = three_samples()
    function = Reward("constant", lambda prompts, responses: [5.0, 6.0, 7.0], 1.5)
    assert score_responses(function, samples).tolist() == [5.0, 4.5, 7.0]
    model = tiny_model(1)
    free = score_responses(Reward("model", model, 0.0), samples)
    penalized = score_responses(Reward("model", model, 1.5), samples)
    assert (free - penalized).tolist() == pytest.approx([0.0, 1.5, 0.0], abs=1e-6)


def test_a_reward_function_is_called_once_without_gradients_or_autocast():
    """score() passes all rows together, so that a function may compare responses."""
    calls = []

    def function(prompts, responses):
        calls.append((prompts, responses))
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        return torch.linspace(0.0, 1.0, 3) * torch.ones((), requires_grad=True)

    samples = three_samples()
    scores = score(Reward("function", function, 0.5), samples)
    assert calls == [(samples.prompts, samples.responses)]
    assert scores.tolist() == [0.0, 0.0, 1.0]
    assert scores.dtype == torch.float32 and not scores.requires_grad


def test_score_gives_the_scores_of_the_reward_model():
    """On one process score() equals score_responses()."""
    reward = Reward("model", tiny_model(1).float(), 0.5)
    scores = score(reward, three_samples())
    assert torch.equal(scores, score_responses(reward, three_samples()))
    assert not scores.requires_grad


# ---- rows on one process and on several ----------------------------------------------------------


def test_all_gather_rows_returns_the_batch_on_one_process():
    """A tensor, a tuple and a NamedTuple stay the same objects."""
    samples = three_samples()
    for batch in (samples.prompt_ids, (samples.prompt_ids, samples.prompt_mask), samples):
        assert parallel.all_gather_rows(batch) is batch


def test_by_rows_calls_the_function_once_on_one_process():
    """The function gets the batch and all other arguments unchanged."""
    calls = []

    def function(model, batch, factor):
        calls.append((model, batch, factor))
        return batch.response_ids * factor

    samples = three_samples()
    result = parallel.by_rows(function)("model", samples, 3)
    assert calls == [("model", samples, 3)]
    assert torch.equal(result, 3 * samples.response_ids)


@pytest.mark.parametrize("count", [2, 3])
def test_by_rows_gives_each_process_its_own_rows(count, monkeypatch):
    """The shares of all processes, in order, are the rows of the batch."""
    samples = three_samples()._replace(response_ids=torch.arange(6).view(3, 2))
    shares = []
    monkeypatch.setattr(parallel, "process_count", lambda: count)
    monkeypatch.setattr(parallel, "all_gather_rows", lambda rows: rows)
    for rank in range(count):
        monkeypatch.setattr(parallel, "process_rank", lambda rank=rank: rank)
        shares.append(parallel.by_rows(lambda model, batch: batch)(None, samples))
    assert [text for share in shares for text in share.responses] == samples.responses
    together = torch.cat([share.response_ids for share in shares])
    assert torch.equal(together, samples.response_ids)


# ---- KL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl, factor", [(6.6, 1.01), (60.0, 1.02), (0.0, 0.98), (6.0, 1.0)])
def test_adaptive_kl_coefficient_by_hand(kl, factor):
    """The error is clipped to +-0.2, and the step is proportional to the responses."""
    config = PolicyConfig(kl_target=6.0, kl_horizon=1000, batch_size=100)
    assert adapt_kl_coef(0.1, kl, config) == pytest.approx(0.1 * factor)
    assert adapt_kl_coef(0.1, 6.0, config) == 0.1
    assert adapt_kl_coef(0.1, kl, PolicyConfig(kl_target=0.0)) == 0.1


def test_sequence_kl_by_hand():
    """It is the KL of pi from pi_ref at the sampling temperature, over the visited states."""
    model, reference = tiny_model(1), tiny_model(2)
    policy = tabulate(model, MDP, TEMPERATURE)
    ref_policy = tabulate(reference, MDP, TEMPERATURE)
    kl_of = {}
    for state, logp in policy.logprobs.items():
        kl_of[state] = (logp.exp() * (logp - ref_policy.logprobs[state])).sum().item()
    expected = [sum(kl_of[state] for state, _ in MDP.steps(row)) for row in range(COUNT)]
    for extra, chunk in ((0, 4096), (2, 7)):
        kl = sequence_kl(model, reference, padded_samples(MDP, extra), TEMPERATURE, chunk)
        assert kl.tolist() == pytest.approx(expected, rel=1e-4)
    assert sequence_kl(model, model, padded_samples(MDP), TEMPERATURE).abs().max() < 1e-6


# ---- the end of a response -----------------------------------------------------------------------


def test_eos_is_an_action_inside_the_mask():
    """A mask without EOS would never train the decision to stop."""
    limit = 6
    rows = [0, 79] * 20  # one of each prompt
    prompts = padded_samples(MDP).rows(torch.tensor(rows))
    uniforms = row_uniforms(0, "test", 0, list(range(40)), limit)
    response_ids, response_mask = generate(
        tiny_model(3), prompts.prompt_ids, prompts.prompt_mask, limit, MDP.eos, MDP.vocab, uniforms
    )
    finished = (response_ids == MDP.eos).any(1)
    assert 5 < finished.sum() < 40
    for ids, mask in zip(response_ids, response_mask):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (len(ids) - length)
        assert MDP.eos not in ids[: length - 1]
        assert set(ids[length:].tolist()) <= {MDP.vocab}
        assert ids[length - 1] == MDP.eos or length == len(ids)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_decision_to_stop_is_learned(algorithm):
    """If stopping at once has the higher reward, a step raises log pi(EOS)."""
    model = tiny_model(1)
    config = PolicyConfig(algorithm=algorithm, whiten="off", group_size=2, lam=1.0)
    assert MDP.responses[0] == (MDP.eos,)
    samples = padded_samples(MDP).rows(torch.tensor([0, 3]))  # EOS at once, and a longer response
    rollout = make_rollout(model, model, samples, numbers(50.0, -50.0), 0.0, 1.0, 0)
    rollout = estimate_advantages(ALGORITHMS[algorithm], rollout, config)
    loss, _ = minibatch_loss(model, rollout.rows(torch.tensor([0])), config, 3.0, 1.0)
    policy = tabulate(model, MDP, 1.0)
    eos_gradient = gradient(policy.logprobs[0, ()][MDP.eos], model)
    assert float(gradient(loss, model) @ eos_gradient) < -1e-3
    assert int(rollout.mask[0].sum()) == 1


# ---- the first update, and the log ---------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_at_learning_rate_zero_the_ratio_is_one(algorithm):
    """Catches old log-probs that are computed in another way than those of the update."""
    config = ModelConfig(MDP.vocab, table_rows=8, n_layer=2, n_head=2, d_model=16, context=16)
    model = Transformer(config, seed=0)  # float32, as in training
    settings = PolicyConfig(
        algorithm=algorithm,
        lr=0.0,
        batch_size=COUNT,
        ppo_epochs=3,
        minibatch_size=32,
        micro_batch_size=5,
        group_size=4,
    )
    scores = random_scores().float()
    rollout = make_rollout(model, copy.deepcopy(model), padded_samples(MDP), scores, 0.1)
    assert (rollout.logprobs - rollout.ref_logprobs).abs().max() < 1e-6
    assert not rollout.values.any()  # the value head starts at 0
    rollout = estimate_advantages(ALGORITHMS[algorithm], rollout, settings)
    metrics = update(model, torch.optim.SGD(model.parameters()), rollout, settings, 0, MDP.limit)
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["clip_fraction"] == metrics["value_clip_fraction"] == 0.0
    assert metrics["grad_norm"] > 0.0


def log_row(rollout: Rollout, algorithm: str) -> dict:
    """All metrics of a rollout and its update."""
    config = PolicyConfig(
        algorithm=algorithm,
        lr=0.01,
        lr_decay=False,
        batch_size=COUNT,
        group_size=2,
        temperature=TEMPERATURE,
        minibatch_size=32,
    )
    model = tiny_model(3)
    finished = [len(response) % 2 == 0 for response in MDP.responses]
    rollout = rollout._replace(samples=rollout.samples._replace(finished=finished), kl_coef=0.1)
    rollout = estimate_advantages(ALGORITHMS[algorithm], rollout, config)
    row = describe(rollout, None, gamma=0.9)
    optimizer = torch.optim.SGD(model.parameters())
    return row | update(model, optimizer, rollout, config, 0, MDP.limit)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_padding_changes_no_metric(algorithm):
    """Catches means over columns, which depend on the longest response of the batch."""
    narrow = log_row(rollout_of_all(extra=0), algorithm)
    wide = log_row(rollout_of_all(extra=4), algorithm)
    assert wide == pytest.approx(narrow, rel=1e-9, abs=1e-12)
    assert len(narrow) > 15 and all(map(math.isfinite, narrow.values()))


@pytest.mark.parametrize("padding", [math.nan, 1e6, math.inf])
def test_padding_affects_no_metric(padding):
    """Values after the last token have no effect, not even NaN."""
    rollout = rollout_of_all()
    dirty = {}
    for name in FIELDS:
        dirty[name] = torch.where(rollout.mask, getattr(rollout, name), padding)
    assert log_row(rollout._replace(**dirty), "ppo") == log_row(rollout, "ppo")


def test_equal_scores_and_returns_have_a_deviation_of_exactly_0():
    """In float32 the mean of equal numbers is rounded, and the deviation was 0.00098."""
    rollout = rollout_of_all()
    returns = torch.where(rollout.mask, 12345.6, 0.0).float()
    scores = torch.full_like(rollout.scores, 12345.6, dtype=torch.float32)
    row = describe(rollout._replace(scores=scores, returns=returns), None, gamma=1.0)
    assert row["score_std"] == row["return_std"] == 0.0


def test_describe_by_hand():
    """kl is summed over tokens and averaged over responses, not averaged over tokens."""
    model, reference = tiny_model(1), tiny_model(2)
    rows = torch.tensor([0, 5])
    samples = padded_samples(MDP).rows(rows)._replace(finished=[True, False])
    rollout = make_rollout(model, reference, samples, random_scores()[rows], 0.3, TEMPERATURE)
    returns = 2.0 * rollout.mask.double()
    returns[1, 0] = 5.0
    rollout = rollout._replace(returns=returns, values=torch.where(rollout.mask, 1.0, 0.0))
    row = describe(rollout, None, gamma=1.0)
    lengths = rollout.mask.sum(1).tolist()
    assert lengths[0] == 1 < lengths[1]
    log_ratio = rollout.logprobs - rollout.ref_logprobs
    kl = [float(log_ratio[i, : lengths[i]].sum()) for i in range(2)]
    first, second = rollout.scores.tolist()
    all_returns = [2.0] * (sum(lengths) - 1) + [5.0]
    mean = sum(all_returns) / len(all_returns)
    variance = sum((x - mean) ** 2 for x in all_returns) / len(all_returns)
    expected = dict(
        score=(first + second) / 2,
        score_std=abs(first - second) / 2,
        kl=sum(kl) / 2,
        total_reward=(first + second - 0.3 * sum(kl)) / 2,
        return_mean=mean,
        return_std=variance**0.5,
        explained_variance=0.0,  # V is constant
        length=sum(lengths) / 2,
        tokens=sum(lengths),
        eos_rate=0.5,
    )
    assert row == pytest.approx(expected, rel=1e-9, abs=1e-12)


def rollout_with(rewards: Tensor, values: Tensor, lam: float, gamma: float) -> Rollout:
    """A rollout of full responses with these rewards and values [B, R], advantages of gae."""
    mask = torch.ones(rewards.shape, dtype=torch.bool)
    tokens = torch.zeros(rewards.shape, dtype=torch.long)
    samples = make_samples(tokens[:, :1], mask[:, :1], tokens, mask)
    zeros = torch.zeros_like(rewards)
    rollout = Rollout(samples, zeros, zeros, values, rewards.sum(1), rewards, 0.0)
    config = PolicyConfig(algorithm="gae", whiten="off", lam=lam, gamma=gamma)
    return estimate_advantages(ALGORITHMS["gae"], rollout, config)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_explained_variance_by_hand_is_that_of_discounted_rewards(lam):
    """G is (0.5, 1) and (1.5, 3), G - V is (-0.5, 0) and (0.5, 1): 1 - 0.3125 / 0.875."""
    rewards = numbers([0.0, 1.0], [0.0, 3.0])
    values = numbers([1.0, 1.0], [1.0, 2.0])
    row = describe(rollout_with(rewards, values, lam, gamma=0.5), None, gamma=0.5)
    assert row["explained_variance"] == pytest.approx(1 - 0.3125 / 0.875)


def test_a_useless_value_explains_nothing_although_it_predicts_its_own_targets():
    """V is a ramp over the tokens, and the score does not depend on the prompt or the token.

    With lam = 0 the target of V is V at the next token, so V predicts nearly all of its variance.
    """
    rewards = torch.zeros(64, 40, dtype=torch.float64)
    scores = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[:, -1] = 0.1 * scores
    values = torch.arange(40.0, dtype=torch.float64).expand(64, 40) / 10
    rollout = rollout_with(rewards, values, lam=0.0, gamma=1.0)
    inner = rollout.mask.clone()
    inner[:, -1] = False
    assert explained_variance(values, rollout.returns, inner) > 0.99
    assert describe(rollout, None, gamma=1.0)["explained_variance"] < 0


def test_the_true_value_explains_less_than_all_of_the_variance():
    """Two equally likely last tokens with the scores 0 and 1: V is 0.5 before, G is 0 or 1."""
    rewards = numbers([0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0])  # two prompts
    values = numbers([0.5, 0.5], [0.5, 0.5], [2.5, 2.5], [2.5, 2.5])
    row = describe(rollout_with(rewards, values, lam=0.95, gamma=1.0), None, gamma=1.0)
    assert row["explained_variance"] == pytest.approx(1 - 0.25 / 1.25)


def test_one_response_of_one_token_works():
    """B = 1 and R = 1: the response without its last token is empty."""
    model, reference = tiny_model(1), tiny_model(2)
    samples = first_columns(padded_samples(MDP).rows(torch.tensor([0])), 1)
    rollout = make_rollout(model, reference, samples, numbers(2.0), 0.3, TEMPERATURE, 0)
    policy = tabulate(model, MDP, TEMPERATURE)
    ref_policy = tabulate(reference, MDP, TEMPERATURE)
    kl = (policy.logprobs[0, ()] - ref_policy.logprobs[0, ()])[MDP.eos].item()
    assert rollout.rewards.tolist() == [[pytest.approx(2.0 - 0.3 * kl)]]
    assert sequence_kl(model, reference, samples, TEMPERATURE).shape == (1,)
    prompt = (samples.prompt_ids, samples.prompt_mask)
    response_ids, response_mask = generate(
        model, *prompt, 1, MDP.eos, MDP.vocab, torch.tensor([[0.5]])
    )
    assert response_ids.shape == response_mask.shape == (1, 1)
