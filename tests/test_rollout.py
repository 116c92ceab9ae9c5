"""Rollouts: which log-prob, value and reward belongs to which action, and what padding and batching may not do."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from exact import every_response, every_rollout, gradient, look_up, padded, per_token, tiny_model
from torch import Tensor

from minirlhf.config import PolicyConfig
from minirlhf.environment import Samples, function_scorer, model_scorer
from minirlhf.generate import generate
from minirlhf.ladder import LADDER, advantages_and_returns, minibatch_loss
from minirlhf.model import ModelConfig, Transformer
from minirlhf.rollout import Rollout, adapt_kl_coef, collect_rollout, evaluate_actions, sequence_kl, token_rewards
from minirlhf.seeding import row_uniforms
from train_policy import describe_rollout, learners_pass, update

WORLD = every_response(((1, 2, 0), (2,)))
TEMPERATURE = 1.7


def numbers(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scores_for(count: int) -> Tensor:
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def whole_rollout(kl_coef: float = 0.3, extra: int = 0, model_seed: int = 1) -> Rollout:
    return every_rollout(tiny_model(model_seed), tiny_model(2), WORLD, scores_for(80), kl_coef, TEMPERATURE, extra)


# What is measured


@pytest.mark.parametrize("model_seed", [1, 3])
def test_each_column_belongs_to_its_own_action(model_seed):
    """Log-probs or values read one position early or late: the commonest error of all, and left padding invites it."""
    model, reference = tiny_model(model_seed), tiny_model(2)
    policy, ref_policy = look_up(model, WORLD, TEMPERATURE), look_up(reference, WORLD, TEMPERATURE)
    rollout = whole_rollout(model_seed=model_seed)
    entropy = evaluate_actions(model, *padded(WORLD), TEMPERATURE, entropy=True)[2]
    for found, number_of in (
            (rollout.logprobs, lambda state, action: policy.logprobs[state][action]),
            (rollout.ref_logprobs, lambda state, action: ref_policy.logprobs[state][action]),
            (rollout.values, lambda state, action: policy.values[state]),
            (entropy, lambda state, action: -(policy.logprobs[state].exp() * policy.logprobs[state]).sum())):
        assert torch.allclose(found, per_token(WORLD, number_of), rtol=1e-10, atol=1e-12)


def test_what_is_measured_is_zero_past_the_mask():
    """Log-probs of PAD, left in, become a KL term that nobody caused."""
    rollout = whole_rollout(extra=2)
    for name in ("logprobs", "ref_logprobs", "values", "rewards"):
        assert not getattr(rollout, name)[~rollout.response_mask].any(), name


@pytest.mark.parametrize("size", [0, 1, 3])
def test_measuring_does_not_depend_on_batching_or_order(size):
    """A row's log-probs must not know its neighbours: batches are cut and shuffled between sampling and learning."""
    scores, (model, reference) = scores_for(80), (tiny_model(1), tiny_model(2))
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    some = [tensor[order] for tensor in padded(WORLD)]
    shuffled = collect_rollout(model, reference, *some, scores[order], 0.3, TEMPERATURE, size)
    for found, wanted in zip(shuffled, whole_rollout()):
        assert torch.allclose(found.double(), wanted[order].double(), rtol=1e-10, atol=1e-12)


def test_temperature_divides_the_logits_of_policy_and_reference_alike():
    """A reference read at temperature 1 puts a KL penalty on the temperature itself."""
    model = tiny_model(1)
    rollout = collect_rollout(model, model, *padded(WORLD), scores_for(80), 0.3, TEMPERATURE, 0)
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    other = collect_rollout(model, model, *padded(WORLD), scores_for(80), 0.3, 1.0, 0)
    assert (rollout.logprobs - other.logprobs)[rollout.response_mask].abs().min() > 1e-6


def test_training_and_evaluation_mode_give_the_same_log_probs():
    """Dropout in the policy would make the first importance ratio noise."""
    model = tiny_model(1)
    assert all(map(torch.equal, evaluate_actions(model.train(), *padded(WORLD), 1.0, True),
                   evaluate_actions(model.eval(), *padded(WORLD), 1.0, True)))


def test_a_rollout_carries_no_graph():
    """A reward or baseline that can be differentiated lets the gradient flow through the target."""
    assert not any(tensor.requires_grad for tensor in whole_rollout())


def test_collecting_changes_nothing_that_it_is_given():
    """The prompts and responses of a rollout are kept: whoever masks them in place corrupts the text that is logged."""
    given = (*padded(WORLD), scores_for(80))
    before = [tensor.clone() for tensor in given]
    rollout = collect_rollout(tiny_model(1), tiny_model(2), *given, 0.3, TEMPERATURE, 7)
    assert all(map(torch.equal, before, given))
    before = [tensor.clone() for tensor in rollout]
    token_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.response_mask, 0.3)
    sequence_kl(tiny_model(1), tiny_model(2), rollout[:4], TEMPERATURE)
    rollout.rows(torch.tensor([3, 3, 1]))
    assert all(map(torch.equal, before, rollout))


# Rewards


def test_rewards_by_hand():
    """The score one token late, on finished rows only, or spread over all, is what several implementations pay."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    logprobs = numbers([-1.0, -2.0, -3.0], [-1.0, -0.5, 0.0], [-4.0, 0.0, 0.0])
    ref_logprobs = numbers([-2.0, -1.0, -3.0], [-1.5, -1.5, 0.0], [-3.0, 0.0, 0.0])
    found = token_rewards(numbers(10.0, 20.0, 30.0), logprobs, ref_logprobs, mask, 0.1)
    wanted = [[-0.1, 0.1, 10.0], [-0.05, 19.9, 0.0], [30.1, 0.0, 0.0]]
    assert found.tolist() == [pytest.approx(row) for row in wanted]


def test_rewards_sum_to_the_score_minus_the_kl_terms():
    """Finished, cut and one-token responses alike: nothing is paid twice, to padding, or not at all."""
    rollout = whole_rollout(extra=1)
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)
    assert torch.allclose(rollout.rewards.sum(1), rollout.scores - 0.3 * kl, rtol=1e-12)
    free = whole_rollout(kl_coef=0.0, extra=1)
    last = free.response_mask.sum(1) - 1
    assert torch.equal(free.rewards.nonzero()[:, 1], last)
    assert torch.equal(free.rewards[torch.arange(80), last], free.scores)
    assert set(last.tolist()) == {0, 1, 2} and (free.response_ids[:, 2] < WORLD.eos).any()  # of length 1, and cut ones


@pytest.mark.parametrize("garbage", [math.nan, 1e6, math.inf, -math.inf])
def test_rewards_read_nothing_beyond_the_mask(garbage):
    """Log-probs of padding leaked into the KL penalty of a published implementation."""
    r = whole_rollout()
    dirty = [torch.where(r.response_mask, x, garbage) for x in (r.logprobs, r.ref_logprobs)]
    assert torch.equal(token_rewards(r.scores, *dirty, r.response_mask, 0.3), r.rewards)


def test_a_response_cut_by_length_pays_the_stated_penalty():
    """The reward model has seen unfinished text rarely if at all: unpenalised, rambling to the limit is free."""
    finished, responses = [True, False, True], ["a", "b", ""]
    ids, mask = torch.tensor([[1, 2], [1, 2], [1, 2]]), torch.ones(3, 2, dtype=torch.bool)
    samples = Samples(["p"] * 3, responses, finished, ids, mask, ids, mask)
    by_function = function_scorer(lambda prompts, replies: [5.0, 6.0, 7.0], "567", 1.5, torch.device("cpu"))(samples)
    assert by_function.tolist() == [5.0, 4.5, 7.0]
    model = tiny_model(1)
    gap = (model_scorer(model, 0.0)(samples) - model_scorer(model, 1.5)(samples)).tolist()
    assert gap == pytest.approx([0.0, 1.5, 0.0], abs=1e-6)


def test_adaptive_kl_coefficient_by_hand():
    """An error that is not clipped, or a step that does not count responses, makes the controller oscillate."""
    assert adapt_kl_coef(0.1, kl=6.6, target=6.0, horizon=1000, responses=100) == pytest.approx(0.1 * 1.01)
    assert adapt_kl_coef(0.1, kl=60.0, target=6.0, horizon=1000, responses=100) == pytest.approx(0.1 * 1.02)
    assert adapt_kl_coef(0.1, kl=0.0, target=6.0, horizon=1000, responses=100) == pytest.approx(0.1 * 0.98)
    assert adapt_kl_coef(0.1, kl=6.0, target=6.0, horizon=1000, responses=100) == 0.1


def test_visited_state_kl_by_hand():
    """The full-vocabulary KL must be that of pi from ref, at the sampling temperature, over the states visited."""
    model, reference = tiny_model(1), tiny_model(2)
    policy, ref_policy = look_up(model, WORLD, TEMPERATURE), look_up(reference, WORLD, TEMPERATURE)
    at = {state: (ours.exp() * (ours - ref_policy.logprobs[state])).sum().item()
          for state, ours in policy.logprobs.items()}
    wanted = [sum(at[state] for state, _ in WORLD.steps(row)) for row in range(80)]
    for extra, chunk in ((0, 4096), (2, 7)):
        found = sequence_kl(model, reference, padded(WORLD, extra), TEMPERATURE, chunk)
        assert found.tolist() == pytest.approx(wanted, rel=1e-4)
    assert sequence_kl(model, model, padded(WORLD), TEMPERATURE).abs().max() < 1e-6


# Stopping


def sampled(model: Transformer, count: int = 40, limit: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    prompt_ids, prompt_mask = (tensor[[0, 79] * (count // 2)] for tensor in padded(WORLD)[:2])
    uniforms = row_uniforms(0, "test", 0, list(range(count)), limit)
    return prompt_ids, prompt_mask, *generate(model, prompt_ids, prompt_mask, limit, WORLD.eos, WORLD.vocab, uniforms)


def test_eos_is_an_action_that_counts():
    """A mask that leaves EOS out (pad equal to eos does it too) means that the policy never learns to stop."""
    _, _, response, mask = sampled(tiny_model(3))
    stopped = (response == WORLD.eos).any(1)
    assert 5 < stopped.sum() < 40
    for row, real in zip(response, mask):
        length = int(real.sum())
        assert real.tolist() == [True] * length + [False] * (len(row) - length)
        assert WORLD.eos not in row[: length - 1] and set(row[length:].tolist()) <= {WORLD.vocab}
        assert row[length - 1] == WORLD.eos or length == len(row)


@pytest.mark.parametrize("algorithm", LADDER)
def test_the_decision_to_stop_is_learned(algorithm):
    """Rewarded for stopping at once, the policy must stop more often: the gradient at EOS must not be masked away."""
    model, config = tiny_model(1), PolicyConfig(algorithm=algorithm, whiten="off", group_size=2, lam=1.0)
    rows = torch.tensor([0, 3])  # EOS at once, and a response that goes on
    assert WORLD.responses[0] == (WORLD.eos,)
    tensors = [tensor[rows] for tensor in padded(WORLD)]
    scores, rung = numbers(50.0, -50.0), LADDER[algorithm]
    rollout = collect_rollout(model, model, *tensors, scores, 0.0, 1.0, 0)
    advantages, returns = advantages_and_returns(rung, rollout, config)
    loss, _ = minibatch_loss(model, rung, rollout.rows(rows[:1]), advantages[:1], returns[:1], config, 0.0, 3.0, 1.0)
    policy = look_up(model, WORLD, 1.0)
    at_stop = gradient(policy.logprobs[0, ()][WORLD.eos], model)
    assert float(gradient(loss, model) @ at_stop) < -1e-3  # a step down the loss raises log pi(EOS)
    assert int(rollout.response_mask[0].sum()) == 1


# The first update, and the log


@pytest.mark.parametrize("algorithm", LADDER)
def test_with_learning_rate_zero_the_policy_and_its_ratio_stay(algorithm):
    """Old log-probs from another code path than the learner's: the ratio differs from 1 before anything was learned."""
    config = ModelConfig(WORLD.vocab, table_rows=8, n_layer=2, n_head=2, d_model=16, context=16)
    model = Transformer(config, seed=0)  # float32, as in training
    settings = PolicyConfig(algorithm=algorithm, ppo_epochs=3, minibatch_size=32, micro_batch_size=5, group_size=4)
    rollout = collect_rollout(model, copy.deepcopy(model), *padded(WORLD), scores_for(80).float(), 0.1, 1.0, 7)
    assert (rollout.logprobs - rollout.ref_logprobs).abs().max() < 1e-6  # initial KL
    assert not rollout.values.any()  # the value head starts at 0
    figures = update(model, torch.optim.SGD(model.parameters()), LADDER[algorithm], rollout,
                     *advantages_and_returns(LADDER[algorithm], rollout, settings), settings, 0.1, 0.0, 3, step=0)
    assert figures["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert figures["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert figures["clip_fraction"] == figures["value_clip_fraction"] == 0.0
    assert figures["grad_norm"] > 0.0


ONCE = dict(batch_size=80, minibatch_size=80, ppo_epochs=1, group_size=4, temperature=TEMPERATURE)


@pytest.mark.parametrize("algorithm", LADDER)
def test_the_measuring_pass_is_the_learners_own_where_the_rollout_serves_once(algorithm):
    """One pass of the policy less, and nothing else: neither what is measured nor what the step does to any weight."""
    rung, config, sampled = LADDER[algorithm], PolicyConfig(algorithm=algorithm, **ONCE), padded(WORLD)
    found = []
    for shared in (False, True):
        model, passes = tiny_model(3), []
        model.register_forward_hook(lambda *_, passes=passes: passes.append(None))
        measured = learners_pass(model, config, rung, sampled) if shared else None
        rollout = collect_rollout(model, tiny_model(2), *sampled, scores_for(80), 0.3, TEMPERATURE, 0, measured)
        assert not any(tensor.requires_grad for tensor in rollout)
        figures = update(model, torch.optim.SGD(model.parameters()), rung, rollout,
                         *advantages_and_returns(rung, rollout, config), config, 0.1, 1.0, WORLD.limit, 0, measured)
        found.append([*rollout, *model.parameters(), *map(torch.tensor, figures.values())])
        assert len(passes) == 2 - shared
    assert all(torch.equal(a, b) for a, b in zip(*found))
    reused = [dict(ppo_epochs=2), dict(minibatch_size=40)] if rung.reuses_rollout else []
    for changes in [dict(micro_batch_size=79), dict(shard=True), *reused]:  # a graph serves once, for all its rows together
        assert learners_pass(model, PolicyConfig(**ONCE | dict(algorithm=algorithm) | changes), rung, sampled) is None


def log_row(rollout: Rollout, algorithm: str) -> dict:
    """All that a metrics row says of a rollout and its update."""
    config = PolicyConfig(algorithm=algorithm, group_size=2, temperature=TEMPERATURE, minibatch_size=32)
    model, rung = tiny_model(3), LADDER[algorithm]
    advantages, returns = advantages_and_returns(rung, rollout, config)
    samples = Samples([], [], [len(r) % 2 == 0 for r in WORLD.responses], *rollout[:4])
    row = describe_rollout(rollout, samples, returns, SimpleNamespace(task=None))
    optimizer = torch.optim.SGD(model.parameters())
    return row | update(model, optimizer, rung, rollout, advantages, returns, config, 0.1, 0.01, WORLD.limit, step=0)


@pytest.mark.parametrize("algorithm", LADDER)
def test_more_padding_changes_no_logged_figure(algorithm):
    """An entropy of 2.0 was once logged as 0.0, because one response in the batch was long."""
    narrow, wide = (log_row(whole_rollout(extra=extra), algorithm) for extra in (0, 4))
    assert wide == pytest.approx(narrow, rel=1e-9, abs=1e-12)
    assert len(narrow) > 15 and all(map(math.isfinite, narrow.values()))


@pytest.mark.parametrize("garbage", [math.nan, 1e6, math.inf])
def test_no_logged_figure_reads_beyond_the_mask(garbage):
    """A figure that sums over padding is right until the day padding is not 0."""
    rollout = whole_rollout()
    dirty = {name: torch.where(rollout.response_mask, getattr(rollout, name), garbage)
             for name in ("logprobs", "ref_logprobs", "values", "rewards")}
    assert log_row(rollout._replace(**dirty), "ppo") == log_row(rollout, "ppo")


def test_the_description_of_a_rollout_by_hand():
    """kl is summed over tokens and averaged over responses: a mean over tokens hides the drift of long responses."""
    rollout = whole_rollout().rows(torch.tensor([0, 5]))
    returns = 2.0 * rollout.response_mask.double()
    returns[1, 0] = 5.0
    row = describe_rollout(rollout, Samples([], [], [True, False], *rollout[:4]), returns, SimpleNamespace(task=None))
    n = rollout.response_mask.sum(1).tolist()
    assert n[0] == 1 < n[1]
    kl = [float((rollout.logprobs - rollout.ref_logprobs)[i, : n[i]].sum()) for i in range(2)]
    first, second = rollout.scores.tolist()
    spread = [2.0] * (sum(n) - 1) + [5.0]
    mean = sum(spread) / len(spread)
    wanted = dict(score=(first + second) / 2, score_std=abs(first - second) / 2, kl=sum(kl) / 2,
                  total_reward=(first + second - 0.3 * sum(kl)) / 2, return_mean=mean,
                  return_std=(sum((x - mean) ** 2 for x in spread) / len(spread)) ** 0.5,
                  length=sum(n) / 2, tokens=sum(n), eos_rate=0.5)
    assert row == pytest.approx(wanted, rel=1e-9)


def test_one_response_of_one_token_works():
    """B = 1 and R = 1: the response without its last token is empty, and a squeeze too many drops the batch."""
    model, reference = tiny_model(1), tiny_model(2)
    tensors = [tensor[:1] for tensor in padded(WORLD)[:2]] + [tensor[:1, :1] for tensor in padded(WORLD)[2:]]
    rollout = collect_rollout(model, reference, *tensors, numbers(2.0), 0.3, TEMPERATURE, 0)
    policy, ref_policy = look_up(model, WORLD, TEMPERATURE), look_up(reference, WORLD, TEMPERATURE)
    kl = (policy.logprobs[0, ()] - ref_policy.logprobs[0, ()])[WORLD.eos].item()
    assert rollout.rewards.tolist() == [[pytest.approx(2.0 - 0.3 * kl)]]
    assert sequence_kl(model, reference, tensors, TEMPERATURE).shape == (1,)
    assert [len(x) for x in generate(model, *tensors[:2], 1, WORLD.eos, WORLD.vocab, torch.tensor([[0.5]]))] == [1, 1]
