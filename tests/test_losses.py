"""Losses: values by hand, exact gradients, extreme inputs, padding, micro-batches."""

import dataclasses
import math
from types import SimpleNamespace

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.batches import PreferenceGroup
from minirlhf.data.tokenizer import load_tokenizer, table_rows
from minirlhf.evaluation.reward_model import evaluate_reward_model
from minirlhf.model.transformer import ModelConfig, Transformer
from minirlhf.rl.algorithms import (
    ALGORITHMS,
    estimate_advantages,
    explained_variance,
    minibatch_loss,
)
from minirlhf.rl.losses import (
    kl_k1,
    kl_k2,
    kl_k3,
    masked_mean,
    policy_gradient_loss,
    ppo_loss,
    preference_loss,
    value_loss,
)
from minirlhf.rl.rollout import Rollout, token_rewards
from train_policy import update
from train_reward import finetune, pair_loss

import pytest
import torch
from exact import (
    changed_copy,
    flat_weights,
    gradient,
    make_mdp,
    make_rollout,
    padded_samples,
    relative_error,
    tiny_model,
)
from tiny import random_model
from torch import Tensor


def numbers(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- the preference loss -------------------------------------------------------------------------


def test_first_preference_loss_is_exactly_ln_2():
    """Reward heads start at 0, so another value means wrong scores, signs or weights."""
    loss = preference_loss(torch.zeros(5), torch.zeros(5))
    assert loss.item() == torch.log(torch.tensor(2.0)).item()
    ties = preference_loss(torch.zeros(2), torch.zeros(2), weight=torch.tensor([0.5, 0.5]))
    assert ties.item() == pytest.approx(math.log(2))


def test_preference_loss_by_hand():
    """Catches a loss with the two responses exchanged, and wrong margins, weights or centering."""
    chosen = numbers(1.0, 0.5)
    rejected = numbers(-0.5, 1.5)
    first = math.log(1 + math.exp(-1.5))
    second = math.log(1 + math.exp(1.0))
    plain = preference_loss(chosen, rejected)
    assert plain.item() == pytest.approx((first + second) / 2)
    weighted = preference_loss(chosen, rejected, weight=numbers(3.0, 1.0))
    assert weighted.item() == pytest.approx((3 * first + second) / 4)
    first_with_margin = math.log(1 + math.exp(-(1.5 - 0.25)))
    second_with_margin = math.log(1 + math.exp(1.0 + 2.0))
    with_margin = preference_loss(chosen, rejected, margin=numbers(0.25, 2.0))
    assert with_margin.item() == pytest.approx((first_with_margin + second_with_margin) / 2)
    centered = preference_loss(chosen, rejected, centering=0.1)
    assert centered.item() == pytest.approx((first + 0.1 * 0.5**2 + second + 0.1 * 2.0**2) / 2)
    everything = preference_loss(chosen, rejected, numbers(0.25, 2.0), 0.1, numbers(3.0, 1.0))
    expected = (3 * (first_with_margin + 0.025) + second_with_margin + 0.4) / 4
    assert everything.item() == pytest.approx(expected)


@pytest.mark.parametrize("difference", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preference_loss_is_finite_for_any_difference(difference, dtype):
    """Catches log(sigmoid(x)) computed in two steps, which is infinite at -100."""
    chosen = torch.tensor([-difference, difference], dtype=dtype).requires_grad_()
    loss = preference_loss(chosen, torch.zeros(2, dtype=dtype))
    loss.backward()
    assert loss.item() == pytest.approx(difference / 2, rel=1e-2)
    assert chosen.grad.tolist() == pytest.approx([-0.5, 0.0], abs=1e-6)


def test_preference_loss_is_computed_in_float32_or_better():
    """A bfloat16 loss would lose a difference of 0.01 between two scores of 3."""
    chosen = torch.tensor([3.015625], dtype=torch.bfloat16)
    rejected = torch.tensor([3.0], dtype=torch.bfloat16)
    loss = preference_loss(chosen, rejected)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.015625)), rel=1e-6)


def test_preference_loss_ignores_a_constant_added_to_both_scores():
    """Only differences are observed; centering alone depends on the constant."""
    chosen = numbers(1.0, -2.0, 0.3)
    rejected = numbers(0.5, 1.0, 0.3)
    shifted = (chosen + 7.0, rejected + 7.0)
    plain = preference_loss(chosen, rejected).item()
    assert preference_loss(*shifted).item() == pytest.approx(plain, rel=1e-12)
    centered = preference_loss(chosen, rejected, centering=0.01)
    assert preference_loss(*shifted, centering=0.01) > centered


def test_a_tie_counts_one_half_in_accuracy():
    """A model whose scores are all equal has accuracy 0.5, not 0 or 1."""
    encoding = load_tokenizer("helpdesk")
    rows = table_rows(encoding)
    config = ModelConfig(encoding.n_vocab, rows, n_layer=1, n_head=1, d_model=4, context=16)
    model = Transformer(config)  # all scores are 0
    pairs = ((0, 1, 0.0, 1.0), (1, 2, 0.0, 0.5), (2, 1, 0.0, 0.5))
    group = PreferenceGroup(prompt=(1, 2), responses=((3,), (4, 5), (6,)), pairs=pairs)
    metrics = evaluate_reward_model(model, [group, group], encoding, None)
    assert metrics["accuracy"] == 0.5
    assert metrics["loss"] == pytest.approx(math.log(2))
    assert metrics["pairs"] == 6


@pytest.mark.parametrize("size", [0, 1, 3])
def test_fine_tuning_averages_over_all_tokens_of_the_batch(size):
    """By hand: -log p of every token but the first, whatever the micro-batches."""
    model = random_model().double().requires_grad_(True)
    texts = [(1, 2, 3, 10), (4, 10), (5, 6, 10), (7, 8, 9, 1, 2, 10)]
    groups = [PreferenceGroup(text[:1], (text[1:],), ()) for text in texts]
    terms = []
    for text in texts:
        ids = torch.tensor([text])
        hidden = model(ids, torch.ones_like(ids, dtype=torch.bool))[0, :-1]
        logprobs = (hidden @ model.lm_weight.T).log_softmax(-1)
        terms.append(-logprobs.gather(1, ids[0, 1:, None]))
    expected = torch.cat(terms).mean().item()
    logged = []
    run = SimpleNamespace(
        resume=lambda *arguments: None,
        steps=lambda: range(1),
        total=1,
        log=lambda row, text: logged.append(row),
        save=lambda *arguments: None,
    )
    finetune(model, groups, 11, RewardConfig(sft_batch_size=4, micro_batch_size=size), run)
    assert logged[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_reward_models_loss_is_the_weighted_sum_over_pairs():
    """Each pair by hand: last-token scores, margins and weights; the auxiliary loss is separate."""
    model = random_model().double()
    prompt, pad, total = (1, 2), 11, 4.0
    responses = ((3, 10), (4, 5, 10), (6,))
    pairs = ((0, 1, 0.5, 1.0), (2, 1, 0.0, 0.25))
    scores, sums = [], []
    for response in responses:
        ids = torch.tensor([prompt + response])
        hidden = model(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        raw = hidden[-1] @ model.reward_head.weight[0] + model.reward_head.bias
        scores.append((raw - model.score_shift) / model.score_scale)
        sums.append((hidden @ model.value_head.weight[0] + model.value_head.bias).sum())

    def by_hand(values, centering):
        parts = []
        for winner, loser, margin, weight in pairs:
            difference = values[winner] - values[loser] - margin
            center = centering * (values[winner] + values[loser]) ** 2
            parts.append(weight * (math.log1p(math.exp(-difference)) + center))
        return float(sum(parts)) / total

    group = PreferenceGroup(prompt, responses, pairs)
    for auxiliary in (0.0, 0.3):
        config = RewardConfig(centering=0.1, auxiliary_coef=auxiliary)
        loss, metrics = pair_loss(model, [group], pad, config, total)
        textbook = by_hand(scores, 0.1)
        expected = textbook + auxiliary * by_hand(sums, 0.0)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert metrics["loss"].item() == pytest.approx(textbook, abs=1e-12)
        correct = sum(
            weight for winner, loser, _, weight in pairs if scores[winner] > scores[loser]
        )
        assert metrics["accuracy"].item() == correct / total
    assert correct % 1.0 == 0.25  # the pair with this weight is in the right order


# ---- the policy's losses -------------------------------------------------------------------------


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages and mask, [2, 2]."""
    return (
        numbers([-1.0, -2.0], [-0.5, -3.0]),
        numbers([-1.0, -1.5], [-1.0, -3.0]),
        numbers([2.0, -1.0], [3.0, 5.0]),
        torch.tensor([[True, True], [True, False]]),
    )


LOGPROBS, OLD, ADVANTAGES, MASK = batch()


def test_policy_gradient_loss_by_hand():
    """Catches a wrong sign and a denominator that depends on the sampled lengths."""
    logprobs = LOGPROBS.clone().requires_grad_()
    loss = policy_gradient_loss(logprobs, ADVANTAGES, MASK, 8.0)
    loss.backward()
    assert loss.item() == pytest.approx(-(-2.0 + 2.0 - 1.5) / 8)
    assert logprobs.grad.tolist() == [[-2.0 / 8, 1.0 / 8], [-3.0 / 8, 0.0]]


def test_ppo_loss_by_hand():
    """Catches the maximum instead of the minimum of the clipped and the unclipped term."""
    ratio = numbers(1.5, 1.5, 0.5, 0.5, 1.1, 1.1)
    advantages = numbers([1.0, -1.0, 1.0, -1.0, 2.0, -2.0])
    old_logprobs = numbers([0.0] * 6)
    mask = torch.ones(1, 6, dtype=torch.bool)
    logprobs = ratio.log()[None].requires_grad_()
    loss = ppo_loss(logprobs, old_logprobs, advantages, mask, 0.2, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8 + 2.2 - 2.2) / 2)
    assert logprobs.grad[0].tolist() == pytest.approx([0.0, 0.75, -0.25, 0.0, -1.1, 1.1])


def test_ppo_gradient_at_ratio_one_is_the_policy_gradient():
    """Catches the inverse ratio and a ratio that differentiates the old policy."""
    gradients = []
    for loss in (
        lambda lp: ppo_loss(lp, LOGPROBS, ADVANTAGES, MASK, 0.2, 8.0),
        lambda lp: policy_gradient_loss(lp, ADVANTAGES, MASK, 8.0),
    ):
        logprobs = LOGPROBS.clone().requires_grad_()
        loss(logprobs).backward()
        gradients.append(logprobs.grad)
    assert torch.equal(*gradients)


def test_value_loss_by_hand():
    """The loss takes the larger of the clipped and the unclipped error."""
    values = numbers([1.0, 2.0], [0.0, 9.0])
    old_values = numbers([0.0, 2.5], [0.0, 0.0])
    returns = numbers([3.0, 0.0], [0.1, 0.0])
    for clip_range, squares in (
        (0.0, 2.0**2 + 2.0**2),
        (0.5, 2.5**2 + 2.0**2),
        (0.2, 2.8**2 + 2.3**2),
    ):
        loss = value_loss(values, old_values, returns, MASK, clip_range, 4.0).item()
        assert loss == pytest.approx(0.5 * (squares + 0.1**2) / 4)


def test_masked_mean_by_hand():
    """Catches a mean that includes padding, even if the padding is NaN."""
    assert masked_mean(numbers([1.0, 2.0], [6.0, 100.0]), MASK).item() == pytest.approx(3.0)
    assert masked_mean(numbers([1.0, 2.0], [6.0, math.nan]), MASK).item() == pytest.approx(3.0)


LOSSES = {  # functions of log-probs, old log-probs, advantages and mask
    "policy_gradient_loss": lambda lp, old, adv, m: policy_gradient_loss(lp, adv, m, 8.0),
    "ppo_loss": lambda lp, old, adv, m: ppo_loss(lp, old, adv, m, 0.2, 8.0),
    "value_loss": lambda lp, old, adv, m: value_loss(lp, old, adv, m, 0.0, 4.0),
    "clipped value_loss": lambda lp, old, adv, m: value_loss(lp, old, adv, m, 0.2, 4.0),
    "masked_mean": lambda lp, old, adv, m: masked_mean(lp * 1.0, m),
}


@pytest.mark.parametrize("padding", [math.nan, 1e6, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_padding_affects_no_loss_and_no_gradient(name, padding):
    """torch.where hides a NaN from the loss only: in the gradient, 0 times NaN is NaN."""
    clean = (LOGPROBS, OLD, ADVANTAGES)
    dirty = [torch.where(MASK, tensor, padding) for tensor in clean]
    results = []
    for logprobs, old, advantages in (clean, dirty):
        logprobs = logprobs.clone().requires_grad_()
        loss = LOSSES[name](logprobs, old, advantages, MASK)
        loss.backward()
        results.append((loss.item(), logprobs.grad.tolist()))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_changes_its_arguments(name):
    """A change in place would affect the next epoch."""
    given = batch()
    LOSSES[name](*given)
    assert all(map(torch.equal, given, batch()))


# ---- KL estimates --------------------------------------------------------------------------------


def test_kl_estimates_by_hand():
    """k1 is log pi - log pi_ref; with the other sign the policy is paid for leaving pi_ref."""
    logprobs = numbers(-1.0, -2.0)
    ref_logprobs = numbers(-1.5, -1.0)
    assert kl_k1(logprobs, ref_logprobs).tolist() == pytest.approx([0.5, -1.0])
    assert kl_k2(logprobs, ref_logprobs).tolist() == pytest.approx([0.125, 0.5])
    k3 = kl_k3(logprobs, ref_logprobs).tolist()
    assert k3 == pytest.approx([math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1])


def test_kl_k3_is_accurate_near_zero():
    """exp(x) - 1 - x in float32 is noise near 0, where training starts."""
    k3 = kl_k3(torch.tensor([1e-3]), torch.tensor([0.0])).item()
    assert k3 == pytest.approx(0.5e-6, rel=1e-2)


def test_kl_estimates_at_one_state_have_their_documented_gradients():
    """Expected gradients as a loss: k1 none, k2 that of KL(pi || ref), k3 that of KL(ref || pi)."""
    logits = numbers(0.3, -1.0, 0.8, 0.0, 1.2).requires_grad_()
    logp = logits.log_softmax(0)
    ref = numbers(-0.5, 0.4, 1.0, 0.2, -1.0).log_softmax(0)

    def gradient_of(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    probability = logp.exp().detach()  # sampling is not differentiated
    kl = gradient_of((logp.exp() * (logp - ref)).sum())
    reverse_kl = gradient_of((ref.exp() * (ref - logp)).sum())
    assert gradient_of((probability * kl_k1(logp, ref)).sum()).abs().max() < 1e-12
    assert relative_error(gradient_of((probability * kl_k2(logp, ref)).sum()), kl) < 1e-9
    assert relative_error(gradient_of((probability * kl_k3(logp, ref)).sum()), reverse_kl) < 1e-9
    assert relative_error(kl, reverse_kl) > 0.1


# ---- the loss of a minibatch ---------------------------------------------------------------------

LIMIT = 3  # maximum response length


def settings(algorithm: str, **changes) -> PolicyConfig:
    defaults = dict(batch_size=8, group_size=2, gamma=0.9, lam=0.8, ent_coef=0.1, temperature=1.3)
    return PolicyConfig(algorithm=algorithm, **(defaults | changes))


def make_example(config: PolicyConfig, extra: int = 0) -> tuple[Transformer, Rollout]:
    """A policy, and 8 responses of 1 to 3 tokens to two prompts, sampled by another policy.

    The rollout has its advantages and returns.
    """
    rows = torch.tensor([0, 1, 7, 30, 40, 42, 52, 79])
    samples = padded_samples(make_mdp(((1, 2, 0), (2,))), extra).rows(rows)
    scores = numbers(1.0, -0.5, 2.0, 0.3, 0.0, 1.5, -1.0, 0.7)
    model = tiny_model(1)
    rollout = make_rollout(model, tiny_model(2), samples, scores, 0.1, temperature=1.3)
    rollout = estimate_advantages(ALGORITHMS[config.algorithm], rollout, config)
    return changed_copy(model, seed=7), rollout


def loss_in_micro_batches(
    model: Transformer, rollout: Rollout, config: PolicyConfig, size: int
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and metrics of one minibatch that is split into micro-batches of `size`."""
    tokens = int(rollout.mask.sum())
    count = len(rollout.scores)
    total = 0.0
    sums = {}
    for rows in torch.arange(count).split(size):
        loss, metrics = minibatch_loss(model, rollout.rows(rows), config, count * LIMIT, tokens)
        total = total + loss
        sums = {key: sums.get(key, 0.0) + float(value) for key, value in metrics.items()}
    return total.item(), gradient(total, model), sums


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_new_tensors_are_on_the_device_of_the_arguments(algorithm):
    """Otherwise the first run on a GPU would fail."""
    config = settings(algorithm)
    model, rollout = make_example(config)
    with torch.device("meta"):  # a tensor that is made without a device would be there
        rewards = token_rewards(
            rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, 0.1
        )
        rollout = estimate_advantages(
            ALGORITHMS[algorithm], rollout._replace(rewards=rewards), config
        )
        loss, _ = minibatch_loss(model, rollout, config, 8 * LIMIT, 8.0)
    assert loss.isfinite()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_gradient_does_not_depend_on_the_micro_batch_size(algorithm, size):
    """A mean of micro-batch means gives tokens of short micro-batches a larger weight."""
    config = settings(algorithm)
    model, rollout = make_example(config)
    loss, grad, metrics = loss_in_micro_batches(model, rollout, config, size)
    full_loss, full_grad, full_metrics = loss_in_micro_batches(model, rollout, config, 8)
    assert loss == pytest.approx(full_loss, rel=1e-10)
    assert relative_error(grad, full_grad) < 1e-10
    assert metrics == pytest.approx(full_metrics, rel=1e-10)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_update_does_not_depend_on_the_micro_batch_size(algorithm, size):
    """The update divides by the whole minibatch and takes one step for each minibatch."""
    weights = []
    metrics = []
    for micro_batch_size in (0, size):
        config = settings(
            algorithm,
            micro_batch_size=micro_batch_size,
            minibatch_size=5,
            max_grad_norm=0.0,
            lr=0.1,
            lr_decay=False,
        )
        model, rollout = make_example(config)
        metrics.append(
            update(model, torch.optim.SGD(model.parameters()), rollout, config, 0, LIMIT)
        )
        weights.append(flat_weights(model))
    assert relative_error(weights[1], weights[0]) < 1e-10
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-8)


@pytest.mark.parametrize("padding", [math.nan, 1e6, math.inf, -math.inf])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_padding_affects_no_loss_gradient_or_metric(algorithm, padding):
    """Values after the last token have no effect, not even NaN."""
    config = settings(algorithm)
    model, rollout = make_example(config)
    mask = rollout.mask
    filled = {}
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        filled[name] = torch.where(mask, getattr(rollout, name), padding)
    response_ids = torch.where(mask, rollout.samples.response_ids, 1)
    samples = rollout.samples._replace(response_ids=response_ids)
    dirty = rollout._replace(samples=samples, **filled)
    loss, grad, metrics = loss_in_micro_batches(model, dirty, config, 3)
    clean_loss, clean_grad, clean_metrics = loss_in_micro_batches(model, rollout, config, 3)
    assert (loss, metrics) == (clean_loss, clean_metrics)
    assert torch.equal(grad, clean_grad)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_padding_changes_no_loss_gradient_or_metric(algorithm):
    """Catches division by the number of columns: one long response would change all metrics."""
    config = settings(algorithm)
    results = [loss_in_micro_batches(*make_example(config, extra), config, 8) for extra in (0, 4)]
    (loss, grad, metrics), (wide_loss, wide_grad, wide_metrics) = results
    assert wide_loss == pytest.approx(loss, rel=1e-10)
    assert relative_error(wide_grad, grad) < 1e-10
    assert wide_metrics == pytest.approx(metrics, rel=1e-10)


def test_metrics_by_hand():
    """Each metric equals a sum over real tokens that are computed one at a time."""
    config = settings("ppo", clip_range=0.15, value_clip_range=0.3)
    model, rollout = make_example(config)
    _, _, metrics = loss_in_micro_batches(model, rollout, config, 8)
    expected = dict.fromkeys(metrics, 0.0)
    samples = rollout.samples
    for row in range(8):
        prompt = samples.prompt_ids[row][samples.prompt_mask[row]].tolist()
        response = samples.response_ids[row][samples.response_mask[row]].tolist()
        for t, action in enumerate(response):
            ids = torch.tensor([[*prompt, *response[:t]]])
            hidden = model(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1]
            logp = (model.lm_weight @ hidden / 1.3).log_softmax(0)
            ratio = (logp[action] - rollout.logprobs[row, t]).exp().item()
            value = model.value_head(hidden).item()
            value_change = abs(value - float(rollout.values[row, t]))
            expected["entropy"] += -(logp.exp() * logp).sum().item()
            expected["approx_kl"] += ratio - 1 - math.log(ratio)
            expected["ratio"] += ratio
            expected["clip_fraction"] += abs(ratio - 1) > 0.15
            expected["value_clip_fraction"] += value_change > 0.3
            expected["value_loss"] += 0.5 * (value - float(rollout.returns[row, t])) ** 2
    tokens = int(rollout.mask.sum())
    assert 0 < expected["clip_fraction"] < tokens
    assert 0 < expected["value_clip_fraction"] < tokens
    assert metrics == pytest.approx(expected, rel=1e-9)


def test_the_parts_of_the_loss_add_up():
    """Catches a wrong weight or sign of the value loss and of the entropy bonus."""
    config = settings("ppo", vf_coef=0.0, ent_coef=0.0)
    model, rollout = make_example(config)
    tokens = int(rollout.mask.sum())
    policy_part, _, _ = loss_in_micro_batches(model, rollout, config, 8)
    with_value = dataclasses.replace(config, vf_coef=0.7, value_clip_range=0.0)
    loss, _, metrics = loss_in_micro_batches(model, rollout, with_value, 8)
    assert loss - policy_part == pytest.approx(0.7 * metrics["value_loss"] / tokens)
    with_entropy = dataclasses.replace(config, ent_coef=0.3)
    loss, _, metrics = loss_in_micro_batches(model, rollout, with_entropy, 8)
    assert loss - policy_part == pytest.approx(-0.3 * metrics["entropy"] / (8 * LIMIT))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_minibatch_of_one_token_works(algorithm):
    """B = 1 and R = 1: catches a wrong squeeze, standard deviation or slice."""
    config = settings(algorithm)
    model, example = make_example(config)
    copies = config.group_size if ALGORITHMS[algorithm].grouped else 1
    samples = example.samples.rows(torch.zeros(copies, dtype=torch.long))
    samples = samples._replace(
        response_ids=samples.response_ids[:, :1], response_mask=samples.response_mask[:, :1]
    )
    scores = example.scores[:1].repeat(copies)
    rollout = make_rollout(tiny_model(1), tiny_model(2), samples, scores, 0.1, temperature=1.3)
    rollout = estimate_advantages(ALGORITHMS[algorithm], rollout, config)
    loss, grad, _ = loss_in_micro_batches(model, rollout, config, 1)
    assert rollout.rewards.shape == (copies, 1)
    assert math.isfinite(loss) and grad.isfinite().all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_minibatch_does_not_change_its_arguments(algorithm):
    """The same rollout is used in several epochs, so the loss must not write into it."""
    config = settings(algorithm)
    model, rollout = make_example(config)

    def tensors() -> list[Tensor]:
        given = [*rollout, *rollout.samples, *model.state_dict().values()]
        return [x for x in given if isinstance(x, Tensor)]

    copies = [tensor.clone() for tensor in tensors()]
    loss, _ = minibatch_loss(model, rollout, config, 24, 17)
    loss.backward()
    assert all(map(torch.equal, copies, tensors()))


def test_explained_variance_by_hand():
    """1 for perfect values, 0 for a constant, negative for harmful ones; padding has no effect."""
    returns = numbers([1.0, 2.0], [6.0, 50.0])
    constant = numbers([4.0, 4.0], [4.0, 0.0])
    partial = numbers([0.0, 2.0], [4.0, 9.0])
    assert explained_variance(returns, returns, MASK) == 1.0
    assert explained_variance(constant, returns, MASK) == pytest.approx(0.0)
    assert explained_variance(partial, returns, MASK) == pytest.approx(1 - (2 / 3) / (14 / 3))
    equal_returns = numbers([2.0, 2.0], [2.0, 0.0])
    assert explained_variance(returns, equal_returns, MASK) == 0.0  # no variance to explain
    assert explained_variance(returns, torch.where(MASK, returns, math.nan), MASK) == 1.0
