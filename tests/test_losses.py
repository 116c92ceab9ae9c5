"""Losses: hand-computed numbers, exact gradients at one state, extreme inputs, padding, cutting into micro-batches."""

import copy
import dataclasses
import math

import pytest
import torch
from exact import every_response, every_rollout, gradient, relative_error, tiny_model
from torch import Tensor

from minirlhf.config import PolicyConfig
from minirlhf.data import PreferenceGroup
from minirlhf.evaluate import evaluate_reward_model
from minirlhf.ladder import LADDER, advantages_and_returns, explained_variance, minibatch_loss
from minirlhf.losses import kl_k1, kl_k2, kl_k3, masked_mean, policy_gradient_loss, ppo_loss, preference_loss, value_loss
from minirlhf.model import ModelConfig, Transformer
from minirlhf.rollout import Rollout
from minirlhf.tokenizer import load_tokenizer, table_rows
from train_policy import update


def numbers(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The preference loss


def test_first_preference_loss_is_exactly_ln_2():
    """Reward heads start at 0: any other first loss means that scores, signs or weights are not what they seem."""
    assert preference_loss(torch.zeros(5), torch.zeros(5)).item() == torch.log(torch.tensor(2.0)).item()
    ties = preference_loss(torch.zeros(2), torch.zeros(2), weight=torch.tensor([0.5, 0.5]))
    assert ties.item() == pytest.approx(math.log(2))


def test_preference_loss_by_hand():
    """The winner's score minus the loser's: reversed, the reward model learns to prefer what people rejected."""
    chosen, rejected = numbers(1.0, 0.5), numbers(-0.5, 1.5)
    first, second = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.0))
    assert preference_loss(chosen, rejected).item() == pytest.approx((first + second) / 2)
    assert preference_loss(chosen, rejected, weight=numbers(3.0, 1.0)).item() == pytest.approx((3 * first + second) / 4)
    with_margin = math.log(1 + math.exp(-(1.5 - 0.25))), math.log(1 + math.exp(1.0 + 2.0))
    assert preference_loss(chosen, rejected, margin=numbers(0.25, 2.0)).item() == pytest.approx(sum(with_margin) / 2)
    centred = first + 0.1 * 0.5 ** 2, second + 0.1 * 2.0 ** 2
    assert preference_loss(chosen, rejected, centering=0.1).item() == pytest.approx(sum(centred) / 2)
    everything = preference_loss(chosen, rejected, numbers(0.25, 2.0), 0.1, numbers(3.0, 1.0)).item()
    assert everything == pytest.approx((3 * (with_margin[0] + 0.025) + with_margin[1] + 0.4) / 4)


@pytest.mark.parametrize("difference", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preference_loss_is_finite_for_any_difference(difference, dtype):
    """log(sigmoid(x)) written out is infinite at 100 (a well-known implementation's reward models died of it)."""
    chosen = torch.tensor([-difference, difference], dtype=dtype).requires_grad_()
    loss = preference_loss(chosen, torch.zeros(2, dtype=dtype))
    loss.backward()
    assert loss.item() == pytest.approx(difference / 2, rel=1e-2)
    assert chosen.grad.tolist() == pytest.approx([-0.5, 0.0], abs=1e-6)


def test_preference_loss_is_computed_in_float32_or_better():
    """In bfloat16 a difference of 0.01 between two scores of 3 is rounded away, and ln 2 to 0.6914."""
    chosen, rejected = torch.tensor([3.015625], dtype=torch.bfloat16), torch.tensor([3.0], dtype=torch.bfloat16)
    assert preference_loss(chosen, rejected).dtype == torch.float32
    assert preference_loss(chosen, rejected).item() == pytest.approx(math.log(1 + math.exp(-0.015625)), rel=1e-6)


def test_preference_loss_ignores_a_constant_added_to_both_scores():
    """Only differences are observed: a loss that sees the level learns the level."""
    chosen, rejected = numbers(1.0, -2.0, 0.3), numbers(0.5, 1.0, 0.3)
    lifted = chosen + 7.0, rejected + 7.0
    assert preference_loss(*lifted).item() == pytest.approx(preference_loss(chosen, rejected).item(), rel=1e-12)
    assert preference_loss(*lifted, centering=0.01) > preference_loss(chosen, rejected, centering=0.01)


def test_a_tie_counts_one_half_in_accuracy():
    """Ties counted as right (or wrong) make a reward model that says nothing perfect (or worthless)."""
    encoding = load_tokenizer("helpdesk")
    config = ModelConfig(encoding.n_vocab, table_rows(encoding), n_layer=1, n_head=1, d_model=4, context=16)
    model = Transformer(config)  # all scores are 0
    pairs = ((0, 1, 0.0, 1.0), (1, 2, 0.0, 0.5), (2, 1, 0.0, 0.5))
    group = PreferenceGroup(prompt=(1, 2), responses=((3,), (4, 5), (6,)), pairs=pairs)
    found = evaluate_reward_model(model, [group, group], encoding, None, torch.device("cpu"))
    assert found["accuracy"] == 0.5 and found["loss"] == pytest.approx(math.log(2)) and found["pairs"] == 6


# The policy's losses


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages and mask, [2, 2]."""
    return (numbers([-1.0, -2.0], [-0.5, -3.0]), numbers([-1.0, -1.5], [-1.0, -3.0]), numbers([2.0, -1.0], [3.0, 5.0]),
            torch.tensor([[True, True], [True, False]]))


LOGPROBS, OLD, ADVANTAGES, MASK = batch()


def test_policy_gradient_loss_by_hand():
    """Minus, or training unlearns; a constant denominator, or long responses weigh less."""
    logprobs = LOGPROBS.clone().requires_grad_()
    loss = policy_gradient_loss(logprobs, ADVANTAGES, MASK, 8.0)
    loss.backward()
    assert loss.item() == pytest.approx(-(-2.0 + 2.0 - 1.5) / 8)
    assert logprobs.grad.tolist() == [[-2.0 / 8, 1.0 / 8], [-3.0 / 8, 0.0]]


def test_ppo_loss_by_hand():
    """The pessimistic side of the clip: taking the other lets the ratio run away exactly where it should stop."""
    ratio = numbers(1.5, 1.5, 0.5, 0.5, 1.1, 1.1)
    advantage = numbers(1.0, -1.0, 1.0, -1.0, 2.0, -2.0)
    logprobs = ratio.log()[None].requires_grad_()
    loss = ppo_loss(logprobs, numbers([0.0] * 6), advantage[None], torch.ones(1, 6, dtype=torch.bool), 0.2, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8 + 2.2 - 2.2) / 2)
    assert logprobs.grad[0].tolist() == pytest.approx([0.0, 0.75, -0.25, 0.0, -1.1, 1.1])


def test_ppo_gradient_at_ratio_one_is_the_policy_gradient():
    """A ratio of the wrong way up, or one through which the old policy is differentiated, has another gradient at 1."""
    gradients = []
    for loss in (lambda lp: ppo_loss(lp, LOGPROBS, ADVANTAGES, MASK, 0.2, 8.0),
                 lambda lp: policy_gradient_loss(lp, ADVANTAGES, MASK, 8.0)):
        logprobs = LOGPROBS.clone().requires_grad_()
        loss(logprobs).backward()
        gradients.append(logprobs.grad)
    assert torch.equal(*gradients)


def test_value_loss_by_hand():
    """The larger of clipped and unclipped error, so that clipping never makes a wrong value look right."""
    values, old = numbers([1.0, 2.0], [0.0, 9.0]), numbers([0.0, 2.5], [0.0, 0.0])
    returns = numbers([3.0, 0.0], [0.1, 0.0])
    for clip_range, squares in ((0.0, 2.0 ** 2 + 2.0 ** 2), (0.5, 2.5 ** 2 + 2.0 ** 2), (0.2, 2.8 ** 2 + 2.3 ** 2)):
        found = value_loss(values, old, returns, MASK, clip_range, 4.0).item()
        assert found == pytest.approx(0.5 * (squares + 0.1 ** 2) / 4)


def test_masked_mean_by_hand():
    """A mean over padding too shrinks with the longest response of the batch (entropy 2.0 once logged as 0.0)."""
    assert masked_mean(numbers([1.0, 2.0], [6.0, 100.0]), MASK).item() == pytest.approx(3.0)
    assert masked_mean(numbers([1.0, 2.0], [6.0, math.nan]), MASK).item() == pytest.approx(3.0)


LOSSES = {  # as functions of all that is [B, R] and of the mask
    "policy_gradient_loss": lambda lp, old, adv, m: policy_gradient_loss(lp, adv, m, 8.0),
    "ppo_loss": lambda lp, old, adv, m: ppo_loss(lp, old, adv, m, 0.2, 8.0),
    "value_loss": lambda lp, old, adv, m: value_loss(lp, old, adv, m, 0.0, 4.0),
    "clipped value_loss": lambda lp, old, adv, m: value_loss(lp, old, adv, m, 0.2, 4.0),
    "masked_mean": lambda lp, old, adv, m: masked_mean(lp * 1.0, m),
}


@pytest.mark.parametrize("garbage", [math.nan, 1e6, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_beyond_the_mask_reaches_a_loss_or_its_gradient(name, garbage):
    """torch.where hides a NaN from the loss and not from the gradient: 0 times NaN is NaN on the way back."""
    clean, found = (LOGPROBS, OLD, ADVANTAGES), []
    for arguments in (clean, [torch.where(MASK, tensor, garbage) for tensor in clean]):
        first = arguments[0].clone().requires_grad_()
        loss = LOSSES[name](first, *arguments[1:], MASK)
        loss.backward()
        found.append((loss.item(), first.grad.tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_changes_its_arguments(name):
    """An in-place clamp or mask would change what the next epoch reads."""
    given = batch()
    LOSSES[name](*given)
    assert all(map(torch.equal, given, batch()))


# KL estimates


def test_kl_estimates_by_hand():
    """k1 is log pi - log pi_ref: reversed, the penalty pays the policy for leaving the reference."""
    logprobs, ref_logprobs = numbers(-1.0, -2.0), numbers(-1.5, -1.0)
    assert kl_k1(logprobs, ref_logprobs).tolist() == pytest.approx([0.5, -1.0])
    assert kl_k2(logprobs, ref_logprobs).tolist() == pytest.approx([0.125, 0.5])
    assert kl_k3(logprobs, ref_logprobs).tolist() == pytest.approx([math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1])


def test_kl_k3_is_accurate_where_the_policies_agree():
    """exp(x) - 1 - x in float32 is noise, at times negative, near 0, which is where training starts."""
    found = kl_k3(torch.tensor([1e-3]), torch.tensor([0.0])).item()
    assert found == pytest.approx(0.5e-6, rel=1e-2)


def test_kl_estimates_at_one_state_have_the_gradients_they_are_said_to_have():
    """As a loss over samples k1 has no gradient on average, k2 that of KL(pi || ref), k3 that of KL(ref || pi)."""
    logits, other = numbers(0.3, -1.0, 0.8, 0.0, 1.2).requires_grad_(), numbers(-0.5, 0.4, 1.0, 0.2, -1.0)
    logp, ref = logits.log_softmax(0), other.log_softmax(0)

    def expected_gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    sampled = logp.exp().detach()  # the sampling is not differentiated
    forward = expected_gradient((logp.exp() * (logp - ref)).sum())
    backward = expected_gradient((ref.exp() * (ref - logp)).sum())
    assert expected_gradient((sampled * kl_k1(logp, ref)).sum()).abs().max() < 1e-12
    assert relative_error(expected_gradient((sampled * kl_k2(logp, ref)).sum()), forward) < 1e-9
    assert relative_error(expected_gradient((sampled * kl_k3(logp, ref)).sum()), backward) < 1e-9
    assert relative_error(forward, backward) > 0.1


# The loss of a minibatch


def settings(algorithm: str, **changes) -> PolicyConfig:
    base = dict(group_size=2, gamma=0.9, lam=0.8, ent_coef=0.1, temperature=1.3)
    return PolicyConfig(algorithm=algorithm, **(base | changes))


def moved(model: Transformer) -> Transformer:
    """A policy some updates later: its importance ratios are not 1."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(7))
    return model


def sample(extra: int = 0) -> tuple[Transformer, Rollout]:
    """A policy, and 8 responses of length 1 to 3 to two prompts as another policy said them."""
    world = every_response(((1, 2, 0), (2,)))
    rows = torch.tensor([0, 1, 7, 30, 40, 42, 52, 79])
    some = world._replace(which=[world.which[row] for row in rows], responses=[world.responses[row] for row in rows])
    scores = numbers(1.0, -0.5, 2.0, 0.3, 0.0, 1.5, -1.0, 0.7)
    model = tiny_model(1)
    rollout = every_rollout(model, tiny_model(2), some, scores, 0.1, temperature=1.3, extra=extra)
    return moved(model), rollout


def measure(model: Transformer, rollout: Rollout, advantages: Tensor, returns: Tensor, config: PolicyConfig,
            size: int) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and figures of the rollout as one minibatch, cut into micro-batches of `size`."""
    rung, tokens, total, sums = LADDER[config.algorithm], int(rollout.response_mask.sum()), 0.0, {}
    for rows in torch.arange(len(rollout.scores)).split(size):
        loss, figures = minibatch_loss(model, rung, rollout.rows(rows), advantages[rows], returns[rows], config, 0.1,
                                       len(rollout.scores) * 3, tokens)
        total, sums = total + loss, {key: sums.get(key, 0.0) + float(value) for key, value in figures.items()}
    return total.item(), gradient(total, model), sums


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("algorithm", LADDER)
def test_the_gradient_does_not_depend_on_the_micro_batch_size(algorithm, size):
    """A mean per micro-batch, averaged, weighs tokens of short micro-batches more (three well-known trainers did)."""
    model, rollout = sample()
    config = settings(algorithm)
    both = advantages_and_returns(LADDER[algorithm], rollout, config)
    loss, found, figures = measure(model, rollout, *both, config, size)
    whole_loss, wanted, whole_figures = measure(model, rollout, *both, config, 8)
    assert loss == pytest.approx(whole_loss, rel=1e-10)
    assert relative_error(found, wanted) < 1e-10
    assert figures == pytest.approx(whole_figures, rel=1e-10)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("algorithm", LADDER)
def test_the_update_does_not_depend_on_the_micro_batch_size(algorithm, size):
    """The loop's part of the same: denominators of the whole minibatch, gradients summed, one step a minibatch."""
    after, figures = [], []
    for micro_batch_size in (0, size):
        model, rollout = sample()
        config = settings(algorithm, micro_batch_size=micro_batch_size, minibatch_size=5, max_grad_norm=0.0)
        both = advantages_and_returns(LADDER[algorithm], rollout, config)
        figures.append(update(model, torch.optim.SGD(model.parameters()), LADDER[algorithm], rollout, *both, config,
                              kl_coef=0.1, lr=0.1, max_response_length=3, step=0))
        after.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert relative_error(after[1], after[0]) < 1e-10
    assert figures[1] == pytest.approx(figures[0], rel=1e-8)


@pytest.mark.parametrize("garbage", [math.nan, 1e6, math.inf, -math.inf])
@pytest.mark.parametrize("algorithm", LADDER)
def test_nothing_beyond_the_mask_reaches_the_minibatch(algorithm, garbage):
    """Neither loss nor gradient nor a logged figure may depend on what lies past the last token, be it NaN."""
    model, rollout = sample()
    config, mask = settings(algorithm), rollout.response_mask
    advantages, returns = advantages_and_returns(LADDER[algorithm], rollout, config)
    filled = {name: torch.where(mask, getattr(rollout, name), garbage)
              for name in ("logprobs", "ref_logprobs", "values", "rewards")}
    dirty = rollout._replace(**filled, response_ids=torch.where(mask, rollout.response_ids, 1))
    dirty_both = [torch.where(mask, tensor, garbage) for tensor in (advantages, returns)]
    loss, found, figures = measure(model, dirty, *dirty_both, config, 3)
    clean_loss, wanted, clean_figures = measure(model, rollout, advantages, returns, config, 3)
    assert (loss, figures) == (clean_loss, clean_figures)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("algorithm", LADDER)
def test_more_padding_changes_no_loss_gradient_or_figure(algorithm):
    """Dividing by columns made an entropy of 2.0 read 0.0 when one response in the batch was long."""
    results = []
    for extra in (0, 4):
        model, rollout = sample(extra)
        config = settings(algorithm)
        results.append(measure(model, rollout, *advantages_and_returns(LADDER[algorithm], rollout, config), config, 8))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-10)
    assert relative_error(results[1][1], results[0][1]) < 1e-10
    assert results[1][2] == pytest.approx(results[0][2], rel=1e-10)


def test_figures_by_hand():
    """Sums over real tokens, one by one: a figure that is wrong misleads every reader of a log."""
    model, rollout = sample()
    config = settings("ppo", clip_range=0.15, value_clip_range=0.3)
    advantages, returns = advantages_and_returns(LADDER["ppo"], rollout, config)
    _, _, figures = measure(model, rollout, advantages, returns, config, 8)
    wanted = dict.fromkeys(figures, 0.0)
    for row in range(8):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        for t in range(int(rollout.response_mask[row].sum())):
            ids = torch.tensor([[*prompt, *rollout.response_ids[row, :t].tolist()]])
            hidden = model(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1]
            logp = (model.lm_weight @ hidden / 1.3).log_softmax(0)
            ratio = (logp[rollout.response_ids[row, t]] - rollout.logprobs[row, t]).exp().item()
            value = model.value_head(hidden).item()
            wanted["entropy"] += -(logp.exp() * logp).sum().item()
            wanted["approx_kl"] += ratio - 1 - math.log(ratio)
            wanted["ratio"] += ratio
            wanted["clip_fraction"] += abs(ratio - 1) > 0.15
            wanted["value_clip_fraction"] += abs(value - float(rollout.values[row, t])) > 0.3
            wanted["value_loss"] += 0.5 * (value - float(returns[row, t])) ** 2
    tokens = int(rollout.response_mask.sum())
    assert 0 < wanted["clip_fraction"] < tokens and 0 < wanted["value_clip_fraction"] < tokens
    assert figures == pytest.approx(wanted, rel=1e-9)


def test_the_parts_of_the_loss_add_up():
    """A value loss, bonus or penalty added with the wrong weight or sign is invisible in the policy's part."""
    model, rollout = sample()
    config = settings("ppo", vf_coef=0.0, ent_coef=0.0)
    both = advantages_and_returns(LADDER["ppo"], rollout, config)
    tokens = int(rollout.response_mask.sum())
    policy_part = measure(model, rollout, *both, config, 8)[0]
    config_with_value = dataclasses.replace(config, vf_coef=0.7, value_clip_range=0.0)
    with_value, _, figures = measure(model, rollout, *both, config_with_value, 8)
    assert with_value - policy_part == pytest.approx(0.7 * figures["value_loss"] / tokens)
    with_entropy, _, figures = measure(model, rollout, *both, dataclasses.replace(config, ent_coef=0.3), 8)
    assert with_entropy - policy_part == pytest.approx(-0.3 * figures["entropy"] / (8 * 3))


@pytest.mark.parametrize("algorithm", LADDER)
def test_a_minibatch_of_one_token_works(algorithm):
    """B = 1 and R = 1 is where a squeeze, a std or a slice of the response goes wrong."""
    model, rollout = sample()
    prompt_ids, prompt_mask, *of_actions = rollout.rows(torch.tensor([0, 0] if LADDER[algorithm].grouped else [0]))
    one = Rollout(prompt_ids, prompt_mask, *(x if x.dim() == 1 else x[:, :1] for x in of_actions))
    config = settings(algorithm)
    loss, found, _ = measure(model, one, *advantages_and_returns(LADDER[algorithm], one, config), config, 1)
    assert math.isfinite(loss) and found.isfinite().all()


@pytest.mark.parametrize("algorithm", LADDER)
def test_a_minibatch_changes_nothing_that_it_is_given(algorithm):
    """The same rollout serves several epochs: whoever writes into it changes what the next one learns."""
    model, rollout = sample()
    config = settings(algorithm)
    both = advantages_and_returns(LADDER[algorithm], rollout, config)
    before = [tensor.clone() for tensor in (*rollout, *both, *model.state_dict().values())]
    minibatch_loss(model, LADDER[algorithm], rollout, *both, config, 0.1, 24, 17)[0].backward()
    assert all(map(torch.equal, before, (*rollout, *both, *model.state_dict().values())))


def test_explained_variance_by_hand():
    """1 for perfect values, 0 for a constant, negative for harmful ones; padding counts for nothing."""
    returns = numbers([1.0, 2.0], [6.0, 50.0])
    assert explained_variance(returns, returns, MASK) == 1.0
    assert explained_variance(numbers([4.0, 4.0], [4.0, 0.0]), returns, MASK) == pytest.approx(0.0)
    assert explained_variance(numbers([0.0, 2.0], [4.0, 9.0]), returns, MASK) == pytest.approx(1 - (2 / 3) / (14 / 3))
    assert explained_variance(returns, numbers([2.0, 2.0], [2.0, 0.0]), MASK) == 0.0  # nothing to explain
    assert explained_variance(returns, torch.where(MASK, returns, math.nan), MASK) == 1.0
