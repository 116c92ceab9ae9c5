"""The algorithms against exact expectations over all responses, in float64, to 1e-9 relative.

The gradients under test are those of `minibatch_loss` on rollouts that are computed as in training.
The expected gradients come from tests/exact.py: the gradient of the exact objective, or, if an
algorithm is biased, the exact mean of its own estimate.
"""

import copy
import functools
from typing import NamedTuple

from minirlhf.config import PolicyConfig
from minirlhf.model.generate import generate
from minirlhf.model.transformer import Transformer
from minirlhf.rl.advantages import full_return, gae, reward_to_go
from minirlhf.rl.algorithms import ALGORITHMS, estimate_advantages
from minirlhf.rl.losses import kl_k1, kl_k3
from minirlhf.rl.rollout import Rollout, sequence_kl
from minirlhf.run.optimizer import make_optimizer
from minirlhf.run.seeding import row_uniforms
from train_policy import update

import pytest
import torch
import torch.nn.functional as F
from exact import (
    PolicyTable,
    Table,
    TokenMDP,
    advantage_table,
    all_pairs,
    changed_copy,
    exact_kl,
    flat_weights,
    gradient,
    losses_by_group,
    make_mdp,
    make_rollout,
    objective,
    padded_samples,
    per_token,
    policy_gradient_surrogate,
    relative_error,
    response_logprobs,
    reward_table,
    tabulate,
    tiny_model,
    true_values,
    visit_probabilities,
    zero_values,
)
from tiny import make_samples
from torch import Tensor

KL_COEF = 0.3
TEMPERATURE = 2.0
EXACT = 1e-9  # relative error


class Case(NamedTuple):
    mdp: TokenMDP
    model: Transformer
    reference: Transformer
    scores: Tensor  # [N]
    policy: PolicyTable  # of model
    ref_policy: PolicyTable
    probabilities: Tensor  # [N] of each response under the policy, times 1 / prompts


@functools.lru_cache
def case(vocab: int = 4, limit: int = 3, width: int = 8) -> Case:
    """Two prompts of different lengths; scores, weights and values are random.

    With vocab 3 there are few enough responses for all pairs.
    """
    mdp = make_mdp(((1, 0, 1), (0,)), vocab, limit)
    model = tiny_model(1, vocab, width)
    reference = tiny_model(2, vocab, width).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(len(mdp.responses), dtype=torch.float64, generator=generator) + 0.5
    policy = tabulate(model, mdp, TEMPERATURE)
    ref_policy = tabulate(reference, mdp, TEMPERATURE)
    probabilities = response_logprobs(policy, mdp).detach().exp() / len(mdp.prompts)
    return Case(mdp, model, reference, scores, policy, ref_policy, probabilities)


def settings(algorithm: str, **changes) -> PolicyConfig:
    defaults = dict(
        whiten="off", vf_coef=0.0, gamma=1.0, lam=1.0, group_size=2, temperature=TEMPERATURE
    )
    return PolicyConfig(algorithm=algorithm, **(defaults | changes))


def rollout_of_all(c: Case, kl_coef: float) -> Rollout:
    """All N responses as one rollout."""
    samples = padded_samples(c.mdp)
    return make_rollout(c.model, c.reference, samples, c.scores, kl_coef, TEMPERATURE)


def expected_gradient(c: Case, config: PolicyConfig) -> Tensor:
    """E[gradient of the training loss] over all responses, or over all pairs if grouped."""
    algorithm = ALGORITHMS[config.algorithm]
    rows = torch.arange(len(c.scores))
    weights = c.probabilities
    group = 1
    if algorithm.grouped:
        pairs = all_pairs(c.mdp)
        rows = pairs.flatten()
        weights = c.probabilities[pairs].prod(1) * len(c.mdp.prompts)
        group = 2
    samples = padded_samples(c.mdp).rows(rows)
    rollout = make_rollout(
        c.model,
        c.reference,
        samples,
        c.scores[rows],
        KL_COEF,
        TEMPERATURE,
        kl_in_reward=algorithm.kl_in_reward,
    )
    losses = losses_by_group(c.model, rollout, config, c.mdp.limit, group)
    expected_loss = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    return gradient(expected_loss, c.model)


def rewards_of(c: Case) -> Table:
    return reward_table(c.policy, c.ref_policy, c.mdp, c.scores, KL_COEF)


def true_gradient(c: Case, gamma: float = 1.0) -> Tensor:
    return gradient(objective(c.policy, c.mdp, rewards_of(c), gamma), c.model)


# ---- gradients -----------------------------------------------------------------------------------

UNBIASED = ["reinforce", "reward-to-go", "baseline", "gae", "ppo", "rloo"]


@pytest.mark.parametrize("algorithm", UNBIASED)
def test_expected_loss_gradient_is_the_gradient_of_score_minus_kl(algorithm):
    """Catches a wrong sign, index, mask, EOS or denominator anywhere from rollout to loss."""
    c = case(3 if algorithm == "rloo" else 4)
    actual = -c.mdp.limit * expected_gradient(c, settings(algorithm))
    assert relative_error(actual, true_gradient(c)) < EXACT


@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_discounted_full_return_is_unbiased_for_the_discounted_objective(gamma):
    """Catches undiscounted KL terms and a discount that counts from the end."""
    c = case()
    actual = -c.mdp.limit * expected_gradient(c, settings("reinforce", gamma=gamma))
    assert relative_error(actual, true_gradient(c, gamma)) < EXACT


@pytest.mark.parametrize(
    "algorithm, gamma, lam, with_values",
    [
        ("reward-to-go", 0.8, 1.0, False),
        ("baseline", 0.8, 1.0, True),
        ("gae", 1.0, 0.9, True),
        ("gae", 0.8, 0.5, True),
        ("gae", 1.0, 0.0, True),
        ("ppo", 1.0, 0.9, True),
    ],
)
def test_biased_algorithms_equal_their_own_exact_values(algorithm, gamma, lam, with_values):
    """The intended bias (no factor gamma^t, or lam < 1) is the only bias."""
    c = case()
    values = c.policy.values if with_values else zero_values(c.policy)
    advantages = advantage_table(c.policy, c.mdp, rewards_of(c), values, gamma, lam)
    expected = gradient(policy_gradient_surrogate(c.policy, c.mdp, advantages), c.model)
    actual = -c.mdp.limit * expected_gradient(c, settings(algorithm, gamma=gamma, lam=lam))
    assert relative_error(actual, expected) < EXACT
    assert relative_error(actual, true_gradient(c, gamma)) > 1e-2


def test_grpo_equals_its_own_exact_value():
    """The gradient of the k3 term is that of KL(ref || pi) at visited states.

    Catches a KL term in the reward and a term with the wrong sign.
    """
    c = case(3)
    prompts = len(c.mdp.prompts)
    logprobs = response_logprobs(c.policy, c.mdp)
    expected = 0.0
    for i, own in enumerate(c.scores.tolist()):
        weight = 0.0
        for j, other in enumerate(c.scores.tolist()):
            if c.mdp.prompt_of[j] != c.mdp.prompt_of[i]:
                continue
            mean = (own + other) / 2
            deviation = ((own - mean) ** 2 + (other - mean) ** 2) ** 0.5  # of a sample of 2
            advantage = (own - mean) / (deviation + 1e-4)
            weight += c.probabilities[j].item() * prompts * advantage
        expected = expected + logprobs[i].exp() / prompts * weight
    for state, probability in visit_probabilities(c.policy, c.mdp).items():
        logp = c.policy.logprobs[state]
        ref_logp = c.ref_policy.logprobs[state]
        expected = expected - KL_COEF * probability * (ref_logp.exp() * (ref_logp - logp)).sum()
    actual = -c.mdp.limit * expected_gradient(c, settings("grpo"))
    assert relative_error(actual, gradient(expected, c.model)) < EXACT


def test_online_dpo_has_the_gradient_of_the_dpo_loss_of_its_pairs():
    """The exact mean of -log sigmoid(beta d) over all pairs, whose distribution is held constant.

    Catches a swapped pair, a factor of 2 and a weight for ties.
    """
    c = case(3)
    scores = c.scores.round(decimals=0)  # so that some pairs of different responses are ties
    c = c._replace(scores=scores)
    log_ratio = response_logprobs(c.policy, c.mdp) - response_logprobs(c.ref_policy, c.mdp).detach()
    expected = torch.zeros(())
    ties = 0
    for i, j in all_pairs(c.mdp).tolist():
        weight = c.probabilities[i] * c.probabilities[j] * len(c.mdp.prompts)
        ties += i != j and bool(scores[i] == scores[j])
        if scores[i] > scores[j]:  # (i, j) and (j, i) are both pairs
            d = log_ratio[i] - log_ratio[j]
            expected = expected - 2 * weight * F.logsigmoid(0.7 * d)
    actual = 2 * c.mdp.limit * expected_gradient(c, settings("online-dpo", dpo_beta=0.7))
    assert ties > 5
    assert relative_error(actual, gradient(expected, c.model)) < EXACT


@pytest.mark.parametrize("clip_range", [0.2, 0.05])
def test_ppo_off_policy_equals_its_own_exact_value(clip_range):
    """Catches clipping on the wrong side or by the wrong advantage.

    Such errors have no effect until the policy differs from the one that sampled.
    """
    c = case()
    config = settings("ppo", clip_range=clip_range, lam=0.9)
    changed = changed_copy(c.model, seed=4)
    new = tabulate(changed, c.mdp, TEMPERATURE)
    rewards = rewards_of(c)
    expected = torch.zeros(())
    counts = dict(above=0, below=0, free=0)
    for row, probability in enumerate(c.probabilities):
        steps = list(c.mdp.steps(row))
        values = [c.policy.values[state] for state, _ in steps] + [torch.zeros(())]
        deltas = [rewards[s][a] + values[t + 1] - values[t] for t, (s, a) in enumerate(steps)]
        for t, (state, action) in enumerate(steps):
            advantage = sum(config.lam**k * delta for k, delta in enumerate(deltas[t:])).item()
            ratio = (new.logprobs[state][action] - c.policy.logprobs[state][action]).exp().item()
            if advantage > 0 and ratio > 1 + clip_range:
                counts["above"] += 1
            elif advantage < 0 and ratio < 1 - clip_range:
                counts["below"] += 1
            else:
                counts["free"] += 1
                expected = expected + probability * advantage * ratio * new.logprobs[state][action]
    assert min(counts.values()) >= 5, counts
    losses = losses_by_group(changed, rollout_of_all(c, KL_COEF), config, c.mdp.limit)
    expected_loss = sum(p * loss for p, loss in zip(c.probabilities, losses))
    actual = -c.mdp.limit * gradient(expected_loss, changed)
    assert relative_error(actual, gradient(expected, changed)) < EXACT


def test_entropy_bonus_raises_the_entropy_of_visited_states():
    """Catches a bonus with the wrong sign and a bonus over padding."""
    c = case()
    without = expected_gradient(c, settings("reinforce", ent_coef=0.0))
    with_bonus = expected_gradient(c, settings("reinforce", ent_coef=0.5))
    entropy = 0.0
    for state, probability in visit_probabilities(c.policy, c.mdp).items():
        logp = c.policy.logprobs[state]
        entropy = entropy - probability * (logp.exp() * logp).sum()
    actual = c.mdp.limit * (without - with_bonus)
    assert relative_error(actual, 0.5 * gradient(entropy, c.model)) < EXACT


# ---- the optimizer step --------------------------------------------------------------------------


def one_step(c: Case, rows: Tensor, config: PolicyConfig) -> Tensor:
    """The change of the weights by `update` with SGD and learning rate 1.

    The batch has the shape that `generate` returns: its columns end with the longest response.
    """
    model = copy.deepcopy(c.model)
    samples = padded_samples(c.mdp).rows(rows)
    longest = int(samples.response_mask.sum(1).max())
    samples = samples._replace(
        response_ids=samples.response_ids[:, :longest],
        response_mask=samples.response_mask[:, :longest],
    )
    rollout = make_rollout(model, c.reference, samples, c.scores[rows], KL_COEF, TEMPERATURE, 0)
    rollout = estimate_advantages(ALGORITHMS[config.algorithm], rollout, config)
    old_weights = flat_weights(model)
    update(model, torch.optim.SGD(model.parameters()), rollout, config, 0, c.mdp.limit)
    return flat_weights(model) - old_weights


def test_expected_optimizer_step_is_along_the_policy_gradient():
    """Dividing by the sampled tokens, or by the longest response of the batch, is biased."""
    c = case(3, 2)
    config = settings(
        "reinforce", max_grad_norm=0.0, batch_size=2, micro_batch_size=1, lr=1.0, lr_decay=False
    )
    pairs = all_pairs(c.mdp)
    weights = c.probabilities[pairs].prod(1) * len(c.mdp.prompts)
    steps = torch.stack([one_step(c, pair, config) for pair in pairs])
    expected = true_gradient(c)
    assert relative_error(c.mdp.limit * weights @ steps, expected) < EXACT
    # This case detects the bias: division by tokens gives another direction.
    lengths = torch.tensor([len(response) for response in c.mdp.responses])[pairs].sum(1)
    by_tokens = (weights / lengths) @ steps
    scale = (by_tokens @ expected) / (by_tokens @ by_tokens)
    assert relative_error(scale * by_tokens, expected) > 0.02


# ---- variance and advantages ---------------------------------------------------------------------


def random_rewards(c: Case) -> Table:
    """A reward for each token, 1 plus noise."""
    generator = torch.Generator().manual_seed(5)
    rewards = {}
    for state in c.policy.logprobs:
        noise = torch.randn(c.mdp.vocab, dtype=torch.float64, generator=generator)
        rewards[state] = 1.0 + noise
    return rewards


def test_each_algorithm_has_less_variance_than_the_one_before(capsys):
    """With a reward for each token, reward-to-go and then the baseline reduce the variance.

    An estimate with the right mean and a larger variance has its baseline in the wrong place.
    """
    c = case()
    rewards = random_rewards(c)
    values = true_values(c.policy, c.mdp, rewards, gamma=1.0)
    rollout = rollout_of_all(c, kl_coef=0.0)._replace(
        rewards=per_token(c.mdp, lambda state, action: rewards[state][action]),
        values=per_token(c.mdp, lambda state, action: values[state]),
    )
    expected = gradient(objective(c.policy, c.mdp, rewards), c.model)
    variance = {}
    for algorithm in ("reinforce", "reward-to-go", "baseline"):
        losses = losses_by_group(c.model, rollout, settings(algorithm), c.mdp.limit)
        gradients = torch.stack([-c.mdp.limit * gradient(loss, c.model) for loss in losses])
        mean = c.probabilities @ gradients
        assert relative_error(mean, expected) < EXACT
        variance[algorithm] = float(c.probabilities @ (gradients - mean).square().sum(1))
    with capsys.disabled():
        rounded = {name: round(v, 4) for name, v in variance.items()}
        print("\nexact variance of the gradient of one response:", rounded)
    assert variance["reinforce"] > 1.2 * variance["reward-to-go"]
    assert variance["reward-to-go"] > 1.2 * variance["baseline"]


@functools.cache
def variance_by_baseline() -> dict[str, float]:
    """Exact variance of the gradient of one response, with a random reward for each token.

    With the baselines: none; V(s); the mean of G_t weighted by |grad log pi|^2, which minimizes
    the variance of one term of the sum over t; and the b(s) that minimizes that of the whole sum.
    """
    c = case()
    rewards = random_rewards(c)
    values = true_values(c.policy, c.mdp, rewards, gamma=1.0)
    states = {state: number for number, state in enumerate(values)}
    scores = {
        (state, action): gradient(c.policy.logprobs[state][action], c.model)
        for state in states
        for action in range(c.mdp.vocab)
    }
    rows = range(len(c.scores))
    without = torch.zeros(len(rows), len(flat_weights(c.model)), dtype=torch.float64)
    # The estimate of a response is its row of `without`, minus sum_s b(s) times its row of `slope`.
    slope = torch.zeros(len(rows), len(states), without.shape[1], dtype=torch.float64)
    weight = torch.zeros(len(states), dtype=torch.float64)
    weighted_return = torch.zeros(len(states), dtype=torch.float64)
    for row in rows:
        steps = list(c.mdp.steps(row))
        for t, (state, action) in enumerate(steps):
            to_go = sum(rewards[later][chosen] for later, chosen in steps[t:])
            without[row] += scores[state, action] * to_go
            slope[row, states[state]] = scores[state, action]
            squared = c.probabilities[row] * scores[state, action].square().sum()
            weight[states[state]] += squared
            weighted_return[states[state]] += squared * to_go
    moments = torch.einsum("n,nsd,nud->su", c.probabilities, slope, slope)
    cross = torch.einsum("n,nsd,nd->s", c.probabilities, slope, without)
    baselines = {
        "none": torch.zeros(len(states), dtype=torch.float64),
        "value": torch.stack([values[state] for state in states]),
        "best for each term": weighted_return / weight,
        "best for the sum": torch.linalg.solve(moments, cross),
    }
    expected = gradient(objective(c.policy, c.mdp, rewards), c.model)
    variance = {}
    for name, baseline in baselines.items():
        gradients = without - torch.einsum("nsd,s->nd", slope, baseline)
        mean = c.probabilities @ gradients
        assert relative_error(mean, expected) < EXACT
        variance[name] = float(c.probabilities @ (gradients - mean).square().sum(1))
    return variance


def test_the_best_baseline_of_a_term_is_not_that_of_the_sum():
    """The terms of one response are correlated, so each baseline affects the other terms too."""
    variance = variance_by_baseline()
    assert variance["none"] > 8 * variance["value"]
    assert variance["value"] > 1.1 * variance["best for each term"]
    assert variance["best for each term"] > 1.01 * variance["best for the sum"]


def test_full_return_is_reward_to_go_if_the_only_reward_is_terminal():
    """With one reward at the end and no KL there are no earlier rewards to leave out."""
    c = case()
    rollout = rollout_of_all(c, kl_coef=0.0)
    full = full_return(rollout.rewards, rollout.mask, 1.0)
    assert torch.equal(full, reward_to_go(rollout.rewards, rollout.mask, 1.0))
    assert torch.equal(full, torch.where(rollout.mask, c.scores[:, None], 0.0))


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_advantages_under_the_true_value_have_mean_zero_in_every_state(gamma, lam):
    """Catches V at the wrong position, which makes all actions look good or all look bad."""
    c = case()
    values = true_values(c.policy, c.mdp, rewards_of(c), gamma)
    rollout = rollout_of_all(c, KL_COEF)
    true_v = per_token(c.mdp, lambda state, action: values[state])
    advantages = gae(rollout.rewards, true_v, rollout.mask, gamma, lam)
    sums = dict.fromkeys(values, 0.0)
    for row, probability in enumerate(c.probabilities.tolist()):
        for t, (state, _) in enumerate(c.mdp.steps(row)):
            sums[state] += probability * advantages[row, t].item()
    assert advantages.abs().max() > 0.5
    assert max(map(abs, sums.values())) < 1e-12


# ---- KL ------------------------------------------------------------------------------------------


def test_sampled_kl_estimates_have_the_exact_kl_as_their_mean():
    """Catches k1 with the wrong sign and estimates clamped at 0 per token."""
    c = case()
    expected = exact_kl(c.policy, c.ref_policy, c.mdp).item()
    rollout = rollout_of_all(c, KL_COEF)
    for estimate in (kl_k1, kl_k3):
        kl = torch.where(rollout.mask, estimate(rollout.logprobs, rollout.ref_logprobs), 0.0)
        assert float(c.probabilities @ kl.sum(1)) == pytest.approx(expected, rel=EXACT)
    visited = sequence_kl(c.model, c.reference, rollout.samples, TEMPERATURE, chunk=5)
    assert float(c.probabilities @ visited.double()) == pytest.approx(expected, rel=1e-5)


def test_kl_penalty_lowers_the_mean_reward_and_is_not_clamped():
    """Catches a penalty with the wrong sign, which pays the policy for leaving the reference."""
    c = case()
    rollout = rollout_of_all(c, KL_COEF)
    cost = KL_COEF * exact_kl(c.policy, c.ref_policy, c.mdp).item()
    assert cost > 0.1
    mean_difference = float(c.probabilities @ (rollout.rewards.sum(1) - c.scores))
    assert mean_difference == pytest.approx(-cost, rel=EXACT)
    not_last = rollout.rewards[:, :-1][rollout.mask[:, 1:]]
    assert (not_last > 0.05).any() and (not_last < -0.05).any()


# ---- the training loop ---------------------------------------------------------------------------


def train(c: Case, config: PolicyConfig) -> Transformer:
    """Sample, score, measure and update, as train_policy.py does."""
    policy = copy.deepcopy(c.reference).requires_grad_(True)
    optimizer = make_optimizer(policy, config.lr)
    algorithm = ALGORITHMS[config.algorithm]
    listed = padded_samples(c.mdp)
    copies = config.group_size if algorithm.grouped else 1
    number = torch.arange(config.batch_size) // copies % len(c.mdp.prompts)
    first = number * (len(c.scores) // len(c.mdp.prompts))  # a row with this prompt
    prompt_ids = listed.prompt_ids[first]
    prompt_mask = listed.prompt_mask[first]
    rows = list(range(config.batch_size))
    for step in range(config.iterations):
        uniforms = row_uniforms(config.seed, "rollout", step, rows, c.mdp.limit)
        response_ids, response_mask = generate(
            policy,
            prompt_ids,
            prompt_mask,
            c.mdp.limit,
            c.mdp.eos,
            c.mdp.vocab,
            uniforms,
            config.temperature,
        )
        missing = c.mdp.limit - response_ids.shape[1]
        full = F.pad(response_ids, (0, missing), value=c.mdp.vocab)
        same_response = (full[:, None] == listed.response_ids).all(2)
        same_prompt = torch.tensor(c.mdp.prompt_of) == number[:, None]
        matches = same_response & same_prompt
        assert (matches.sum(1) == 1).all()
        scores = c.scores[matches.int().argmax(1)]
        samples = make_samples(prompt_ids, prompt_mask, response_ids, response_mask)
        rollout = make_rollout(
            policy, c.reference, samples, scores, config.kl_coef, config.temperature, 0
        )
        rollout = estimate_advantages(algorithm, rollout, config)
        update(policy, optimizer, rollout, config, step, c.mdp.limit)
    return policy


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_reaches_the_known_optimum(algorithm, seed):
    """The optimum is pi* ~ pi_ref exp(score / kl_coef). A wrong loop does not reach it."""
    c = case(3, 2, width=32)
    config = settings(
        algorithm,
        seed=seed,
        kl_coef=0.5,
        iterations=80 if algorithm == "rloo" else 40,
        batch_size=128,
        minibatch_size=64,
        lr=0.01,
        vf_coef=0.5,
        lam=0.95,
    )
    initial = response_logprobs(c.ref_policy, c.mdp)
    unnormalized = (initial + c.scores / config.kl_coef).view(len(c.mdp.prompts), -1)
    optimum = unnormalized.log_softmax(1).flatten()
    trained = tabulate(train(c, config), c.mdp, config.temperature)
    final = response_logprobs(trained, c.mdp).detach()

    def distance(logprobs: Tensor) -> float:
        return float((logprobs.exp() * (logprobs - optimum)).sum()) / len(c.mdp.prompts)

    assert distance(initial) > 0.7
    assert distance(final) < 0.04
