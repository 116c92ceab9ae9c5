"""The algorithm against the truth: every response enumerated, every expectation a finite sum, float64, 1e-9 relative.

The gradients under test are those of `minibatch_loss` on rollouts of `collect_rollout`: the functions that training
calls. The wanted ones come from tests/exact.py: the exact objective, differentiated, or where a rung is biased, its own
exact value.
"""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from exact import (
    Policy,
    Table,
    World,
    advantage_table,
    all_pairs,
    every_response,
    every_rollout,
    gradient,
    log_probabilities,
    look_up,
    losses_by_group,
    no_values,
    objective,
    padded,
    per_token,
    policy_gradient_surrogate,
    relative_error,
    reward_table,
    sequence_divergence,
    tiny_model,
    true_values,
    visits,
)
from torch import Tensor

from minirlhf.advantages import full_return, gae, reward_to_go
from minirlhf.config import PolicyConfig
from minirlhf.generate import generate
from minirlhf.ladder import LADDER, advantages_and_returns
from minirlhf.losses import kl_k1, kl_k3
from minirlhf.model import Transformer
from minirlhf.optim import make_optimizer
from minirlhf.rollout import collect_rollout, sequence_kl
from minirlhf.seeding import row_uniforms
from train_policy import update

KL_COEF, TEMPERATURE, EXACT = 0.3, 2.0, 1e-9


class Case(NamedTuple):
    world: World
    model: Transformer
    reference: Transformer
    scores: Tensor  # [N]
    policy: Policy  # what model says, exactly
    ref_policy: Policy
    probabilities: Tensor  # [N] of each response under the policy, times 1 / prompts


@functools.lru_cache
def case(vocab: int = 4, limit: int = 3, width: int = 8) -> Case:
    """Two prompts of different lengths; scores, weights, values are arbitrary. At vocab 3 all pairs are affordable."""
    world = every_response(((1, 0, 1), (0,)), vocab, limit)
    model, reference = tiny_model(1, vocab, width), tiny_model(2, vocab, width).requires_grad_(False)
    scores = torch.randn(len(world.responses), dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    policy = look_up(model, world, TEMPERATURE)
    probabilities = log_probabilities(policy, world).detach().exp() / len(world.prompts)
    return Case(world, model, reference, scores, policy, look_up(reference, world, TEMPERATURE), probabilities)


def settings(algorithm: str, **changes) -> PolicyConfig:
    plain = dict(whiten="off", vf_coef=0.0, gamma=1.0, lam=1.0, group_size=2, temperature=TEMPERATURE)
    return PolicyConfig(algorithm=algorithm, **(plain | changes))


def expected_gradient(c: Case, config: PolicyConfig) -> Tensor:
    """E[gradient of the training loss] over every response, or every pair of siblings where the rung is grouped."""
    rung = LADDER[config.algorithm]
    rollout = every_rollout(c.model, c.reference, c.world, c.scores, KL_COEF if rung.kl_in_reward else 0.0, TEMPERATURE)
    weights, group = c.probabilities, 1
    if rung.grouped:
        pairs, group = all_pairs(c.world), 2
        rollout = rollout.rows(pairs.flatten())
        weights = c.probabilities[pairs].prod(1) * len(c.world.prompts)
    losses = losses_by_group(c.model, rung, rollout, config, KL_COEF, c.world.limit, group)
    return gradient(sum(weight * loss for weight, loss in zip(weights, losses, strict=True)), c.model)


def rewards_of(c: Case) -> Table:
    return reward_table(c.policy, c.ref_policy, c.world, c.scores, KL_COEF)


def true_gradient(c: Case, gamma: float = 1.0) -> Tensor:
    return gradient(objective(c.policy, c.world, rewards_of(c), gamma), c.model)


UNBIASED = ["reinforce", "reward-to-go", "baseline", "gae", "ppo", "rloo"]


@pytest.mark.parametrize("algorithm", UNBIASED)
def test_expected_loss_gradient_is_the_gradient_of_score_minus_kl(algorithm):
    """A wrong sign, index, mask, EOS or denominator between rollout and loss still trains, towards something else."""
    c = case(3 if algorithm == "rloo" else 4)
    found = -c.world.limit * expected_gradient(c, settings(algorithm))
    assert relative_error(found, true_gradient(c)) < EXACT


@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_discounted_full_return_is_unbiased_for_the_discounted_objective(gamma):
    """KL terms left undiscounted, or a discount counted from the end, make the full return wrong at gamma < 1 only."""
    found = -case().world.limit * expected_gradient(case(), settings("reinforce", gamma=gamma))
    assert relative_error(found, true_gradient(case(), gamma)) < EXACT


@pytest.mark.parametrize("algorithm, gamma, lam, with_values", [
    ("reward-to-go", 0.8, 1.0, False), ("baseline", 0.8, 1.0, True), ("gae", 1.0, 0.9, True), ("gae", 0.8, 0.5, True),
    ("gae", 1.0, 0.0, True), ("ppo", 1.0, 0.9, True)])
def test_biased_rungs_equal_their_own_exact_values(algorithm, gamma, lam, with_values):
    """Bias that is meant (no factor gamma^t in reward-to-go, V trusted at lam < 1) would hide bias that is not."""
    c, rewards = case(), rewards_of(case())
    values = c.policy.values if with_values else no_values(c.policy)
    advantages = advantage_table(c.policy, c.world, rewards, values, gamma, lam)
    wanted = gradient(policy_gradient_surrogate(c.policy, c.world, advantages), c.model)
    found = -c.world.limit * expected_gradient(c, settings(algorithm, gamma=gamma, lam=lam))
    assert relative_error(found, wanted) < EXACT
    assert relative_error(found, true_gradient(c, gamma)) > 1e-2


def test_grpo_equals_its_own_exact_value():
    """The k3 term differentiates to KL(ref || pi) at visited states; in the reward, or of the other sign, not."""
    c = case(3)
    probabilities = log_probabilities(c.policy, c.world)
    wanted = 0.0
    for i, own in enumerate(c.scores.tolist()):
        siblings = [j for j in range(len(c.scores)) if c.world.which[j] == c.world.which[i]]
        weight = 0.0
        for j in siblings:
            mean, other = (own + c.scores[j].item()) / 2, c.scores[j].item()
            deviation = ((own - mean) ** 2 + (other - mean) ** 2) ** 0.5  # of a sample of 2
            weight += c.probabilities[j].item() * len(c.world.prompts) * (own - mean) / (deviation + 1e-4)
        wanted = wanted + probabilities[i].exp() / len(c.world.prompts) * weight
    for state, share in visits(c.policy, c.world).items():
        ours, theirs = c.policy.logprobs[state], c.ref_policy.logprobs[state]
        wanted = wanted - KL_COEF * share * (theirs.exp() * (theirs - ours)).sum()
    found = -c.world.limit * expected_gradient(c, settings("grpo"))
    assert relative_error(found, gradient(wanted, c.model)) < EXACT


@pytest.mark.parametrize("clip_range", [0.2, 0.05])
def test_ppo_off_policy_equals_its_own_exact_value(clip_range):
    """Clipping the wrong side, or by the wrong advantage, shows only once the policy has moved from the rollout's."""
    c, config = case(), settings("ppo", clip_range=clip_range, lam=0.9)
    moved = copy.deepcopy(c.model)
    with torch.no_grad():
        for weight in moved.parameters():
            weight += 0.05 * torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    new, rewards = look_up(moved, c.world, TEMPERATURE), rewards_of(c)
    wanted, held = torch.zeros(()), dict(above=0, below=0, free=0)
    for row, probability in enumerate(c.probabilities):
        steps = list(c.world.steps(row))
        values = [c.policy.values[state] for state, _ in steps] + [torch.zeros(())]
        deltas = [rewards[s][a] + values[t + 1] - values[t] for t, (s, a) in enumerate(steps)]
        for t, (state, action) in enumerate(steps):
            advantage = sum(config.lam ** k * delta for k, delta in enumerate(deltas[t:])).item()
            ratio = (new.logprobs[state][action] - c.policy.logprobs[state][action]).exp().item()
            side = ("above" if advantage > 0 and ratio > 1 + clip_range else
                    "below" if advantage < 0 and ratio < 1 - clip_range else "free")
            held[side] += 1
            if side == "free":
                wanted = wanted + probability * advantage * ratio * new.logprobs[state][action]
    assert min(held.values()) >= 5, held
    rollout = every_rollout(c.model, c.reference, c.world, c.scores, KL_COEF, TEMPERATURE)
    losses = losses_by_group(moved, LADDER["ppo"], rollout, config, KL_COEF, c.world.limit)
    found = -c.world.limit * gradient(sum(p * loss for p, loss in zip(c.probabilities, losses)), moved)
    assert relative_error(found, gradient(wanted, moved)) < EXACT


def test_entropy_bonus_raises_the_entropy_of_visited_states():
    """A bonus of the wrong sign narrows the policy, and one over padding rewards short responses."""
    c = case()
    without, with_bonus = (expected_gradient(c, settings("reinforce", ent_coef=weight)) for weight in (0.0, 0.5))
    entropy = sum(share * -(c.policy.logprobs[state].exp() * c.policy.logprobs[state]).sum()
                  for state, share in visits(c.policy, c.world).items())
    assert relative_error(c.world.limit * (without - with_bonus), 0.5 * gradient(entropy, c.model)) < EXACT


def one_step(c: Case, rows: Tensor, config: PolicyConfig) -> Tensor:
    """What `update` adds to the weights with SGD and a learning rate of 1, for one batch as `generate` returns it."""
    model, sampled = copy.deepcopy(c.model), [tensor[rows] for tensor in padded(c.world)]
    longest = int(sampled[3].sum(1).max())
    sampled[2:] = [tensor[:, :longest] for tensor in sampled[2:]]
    rung = LADDER[config.algorithm]
    rollout = collect_rollout(model, c.reference, *sampled, c.scores[rows], KL_COEF, TEMPERATURE, 0)
    before = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    advantages, returns = advantages_and_returns(rung, rollout, config)
    update(model, torch.optim.SGD(model.parameters()), rung, rollout, advantages, returns, config, KL_COEF, lr=1.0,
           max_response_length=c.world.limit, step=0)
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]) - before


def test_expected_optimiser_step_is_along_the_policy_gradient():
    """Dividing by the tokens sampled, or by the longest response of the batch, is biased: length goes with reward."""
    c, config = case(3, 2), settings("reinforce", max_grad_norm=0.0, micro_batch_size=1)
    pairs = all_pairs(c.world)
    weights = c.probabilities[pairs].prod(1) * len(c.world.prompts)
    steps = torch.stack([one_step(c, pair, config) for pair in pairs])
    assert relative_error(c.world.limit * weights @ steps, true_gradient(c)) < EXACT
    lengths = torch.tensor([len(response) for response in c.world.responses])[pairs].sum(1)
    by_tokens, wanted = (weights / lengths) @ steps, true_gradient(c)
    scale = (by_tokens @ wanted) / (by_tokens @ by_tokens)
    assert relative_error(scale * by_tokens, wanted) > 0.02  # this case can tell, whatever the learning rate


def test_variance_falls_along_the_ladder_when_every_step_is_rewarded(capsys):
    """An estimator whose mean is right and whose variance is not the textbook's has a baseline in the wrong place."""
    c = case()
    generator = torch.Generator().manual_seed(5)
    rewards = {state: 1.0 + torch.randn(c.world.vocab, dtype=torch.float64, generator=generator)
               for state in c.policy.logprobs}
    values = true_values(c.policy, c.world, rewards, gamma=1.0)
    rollout = every_rollout(c.model, c.reference, c.world, c.scores, 0.0, TEMPERATURE)
    rollout = rollout._replace(rewards=per_token(c.world, lambda state, action: rewards[state][action]),
                               values=per_token(c.world, lambda state, action: values[state]))
    wanted, variance = gradient(objective(c.policy, c.world, rewards), c.model), {}
    for algorithm in ("reinforce", "reward-to-go", "baseline"):
        losses = losses_by_group(c.model, LADDER[algorithm], rollout, settings(algorithm), 0.0, c.world.limit)
        each = torch.stack([-c.world.limit * gradient(loss, c.model) for loss in losses])
        mean = c.probabilities @ each
        assert relative_error(mean, wanted) < EXACT
        variance[algorithm] = float(c.probabilities @ (each - mean).square().sum(1))
    with capsys.disabled():
        print("\nexact variance of the gradient of one response:", {name: round(v, 4) for name, v in variance.items()})
    assert variance["reinforce"] > 1.2 * variance["reward-to-go"] > 1.2 * 1.2 * variance["baseline"]


def test_full_return_is_reward_to_go_when_the_only_reward_is_terminal():
    """With one reward at the end and no KL there is no past to forget: a difference would be an index error."""
    c = case()
    rollout = every_rollout(c.model, c.reference, c.world, c.scores, 0.0, TEMPERATURE)
    whole, rest = (f(rollout.rewards, rollout.response_mask, 1.0) for f in (full_return, reward_to_go))
    assert torch.equal(whole, rest)
    assert torch.equal(whole, torch.where(rollout.response_mask, c.scores[:, None], 0.0))


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_advantages_under_the_true_value_average_to_nothing_at_every_state(gamma, lam):
    """V read one position late makes every action look good or bad (a known implementation: +5 everywhere)."""
    c, rewards = case(), rewards_of(case())
    values = true_values(c.policy, c.world, rewards, gamma)
    rollout = every_rollout(c.model, c.reference, c.world, c.scores, KL_COEF, TEMPERATURE)
    true_v = per_token(c.world, lambda state, action: values[state])
    advantages = gae(rollout.rewards, true_v, rollout.response_mask, gamma, lam)
    sums = dict.fromkeys(values, 0.0)
    for row, probability in enumerate(c.probabilities.tolist()):
        for t, (state, _) in enumerate(c.world.steps(row)):
            sums[state] += probability * advantages[row, t].item()
    assert advantages.abs().max() > 0.5
    assert max(map(abs, sums.values())) < 1e-12


def test_sampled_kl_estimates_have_the_exact_kl_as_their_mean():
    """With the sign of k1 reversed the penalty pays for divergence; clamped at 0 per token it charges for noise."""
    c = case()
    wanted = sequence_divergence(c.policy, c.ref_policy, c.world).item()
    rollout = every_rollout(c.model, c.reference, c.world, c.scores, KL_COEF, TEMPERATURE)
    for estimate in (kl_k1, kl_k3):
        per_token = torch.where(rollout.response_mask, estimate(rollout.logprobs, rollout.ref_logprobs), 0.0)
        assert float(c.probabilities @ per_token.sum(1)) == pytest.approx(wanted, rel=EXACT)
    visited = sequence_kl(c.model, c.reference, rollout[:4], TEMPERATURE, chunk=5)
    assert float(c.probabilities @ visited.double()) == pytest.approx(wanted, rel=1e-5)


def test_kl_penalty_lowers_the_reward_on_average_and_is_not_clamped():
    """A penalty on the wrong side of the reward pays the policy for leaving the language."""
    c = case()
    rollout = every_rollout(c.model, c.reference, c.world, c.scores, KL_COEF, TEMPERATURE)
    cost = KL_COEF * sequence_divergence(c.policy, c.ref_policy, c.world).item()
    assert cost > 0.1
    assert float(c.probabilities @ (rollout.rewards.sum(1) - c.scores)) == pytest.approx(-cost, rel=EXACT)
    middle = rollout.rewards[:, :-1][rollout.response_mask[:, 1:]]  # tokens that are not the last of their response
    assert (middle > 0.05).any() and (middle < -0.05).any()


def train(c: Case, config: PolicyConfig) -> Transformer:
    """Sample, score, measure, update, as the training script does, on the enumerable task."""
    policy, rung = copy.deepcopy(c.reference).requires_grad_(True), LADDER[config.algorithm]
    optimizer = make_optimizer(policy, config.lr)
    prompt_ids, prompt_mask, every, _ = padded(c.world)
    copies = config.group_size if rung.grouped else 1
    number = torch.arange(config.batch_size) // copies % len(c.world.prompts)
    first = number * (len(every) // len(c.world.prompts))  # a row that has this prompt
    prompt_ids, prompt_mask = prompt_ids[first], prompt_mask[first]
    for step in range(config.iterations):
        uniforms = row_uniforms(config.seed, "rollout", step, list(range(config.batch_size)), c.world.limit)
        response, mask = generate(policy, prompt_ids, prompt_mask, c.world.limit, c.world.eos, c.world.vocab, uniforms,
                                  config.temperature)
        said = F.pad(response, (0, c.world.limit - response.shape[1]), value=c.world.vocab)
        matches = (said[:, None] == every).all(2) & (torch.tensor(c.world.which) == number[:, None])
        assert (matches.sum(1) == 1).all()
        scores = c.scores[matches.int().argmax(1)]
        rollout = collect_rollout(policy, c.reference, prompt_ids, prompt_mask, response, mask, scores, config.kl_coef,
                                  config.temperature, 0)
        advantages, returns = advantages_and_returns(rung, rollout, config)
        lr = config.lr * (1.0 - step / config.iterations)
        update(policy, optimizer, rung, rollout, advantages, returns, config, config.kl_coef, lr, c.world.limit, step)
    return policy


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_reaches_the_known_optimum(algorithm, seed):
    """A right gradient in a wrong loop does not end at pi* ~ pi_ref exp(score / kl_coef), known in closed form."""
    c = case(3, 2, width=32)
    config = settings(algorithm, seed=seed, kl_coef=0.5, iterations=80 if algorithm == "rloo" else 40, batch_size=128,
                      minibatch_size=64, lr=0.01, vf_coef=0.5, lam=0.95)
    start = log_probabilities(c.ref_policy, c.world)
    best = (start + c.scores / config.kl_coef).view(len(c.world.prompts), -1).log_softmax(1).flatten()
    final = log_probabilities(look_up(train(c, config), c.world, config.temperature), c.world).detach()
    before, after = (float((p.exp() * (p - best)).sum()) / len(c.world.prompts) for p in (start, final))
    assert before > 0.7
    assert after < 0.04
