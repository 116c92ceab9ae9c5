"""The project and plain.py give the same numbers, to 1e-9 in float64.

Both start from the same weights and use the same random numbers. Only the functions real_... call
the project.
"""

import copy
import json
from types import SimpleNamespace

import train_policy
import train_reward
from minirlhf import plain
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.batches import PreferenceGroup, collate_preferences, pad_left, pad_right
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.model.generate import generate
from minirlhf.rl.algorithms import ALGORITHMS, estimate_advantages
from minirlhf.rl.dpo import dpo_loss
from minirlhf.rl.reward import Reward, score_responses
from minirlhf.rl.rollout import Rollout, evaluate_actions, measure, token_rewards
from minirlhf.run.device import prepare_training
from minirlhf.run.optimizer import make_optimizer, step_optimizer, warmup_then_decay

import pytest
import torch
from tiny import ROOT, make_samples, random_model

CPU = torch.device("cpu")
VOCAB, EOS, PAD = 11, 10, 11  # of tiny.random_model
LIMIT = 8  # maximum response length
GROUP = 2
ITERATIONS = 3
CONFIG = dict(
    iterations=ITERATIONS,
    group_size=GROUP,
    batch_size=12,
    minibatch_size=6,
    ppo_epochs=2,
    lr=0.02,
    kl_coef=0.1,
    dpo_beta=0.3,
    gamma=0.9,
    lam=0.8,
    clip_range=0.1,
    value_clip_range=0.1,
    vf_coef=0.3,
    missing_eos_penalty=0.7,
)


# ---- the project ---------------------------------------------------------------------------------


def real_model(seed):
    """Random weights in every parameter; scores with a shift and a scale."""
    model = random_model(seed, VOCAB).double()
    model.score_shift.fill_(0.3)
    model.score_scale.fill_(1.7)
    return model


def real_prepare(model, heads):
    return prepare_training(model.requires_grad_(True), RewardConfig(), CPU, heads)


def real_sample(model, prompt_ids, prompt_mask, uniforms):
    """Response ids and mask [B, R], R the longest response."""
    return generate(model, prompt_ids, prompt_mask, uniforms.shape[1], EOS, PAD, uniforms)


def real_measure(model, prompt_ids, prompt_mask, response_ids, response_mask):
    samples = make_samples(prompt_ids, prompt_mask, response_ids, response_mask)
    logprobs, values, _ = evaluate_actions(model, samples, 1.0)
    return logprobs, values


def real_score(reward_model, samples, penalty):
    is_eos = (samples.response_ids == EOS) & samples.response_mask
    samples = samples._replace(finished=is_eos.any(1).tolist())
    return score_responses(Reward("", reward_model, penalty), samples)


def real_supervised(model, batches, heads, peak, loss_of):
    """Losses and weights after each step; loss_of(model, batch)."""
    real_prepare(model, heads)
    optimizer = make_optimizer(model, peak, weight_decay=0.01)
    steps = []
    for step, batch in enumerate(batches):
        loss = loss_of(model, batch)
        loss.backward()
        norm = step_optimizer(model, optimizer, peak * warmup_then_decay(step, len(batches)), 1.0)
        steps.append((loss.item(), norm, copy.deepcopy(model.state_dict())))
    return steps


def real_fine_tuning(model, batches, peak):
    def loss_of(model, batch):
        return train_reward.language_model_loss(model, *batch)

    return real_supervised(model, batches, [], peak, loss_of)


def real_groups(batch):
    return [
        PreferenceGroup(prompt, responses, tuple((w, l, 0.0, weight) for w, l, weight in pairs))
        for prompt, responses, pairs in batch
    ]


def real_reward_training(model, batches, peak):
    """batches: lists of groups (prompt, responses, pairs (better, worse, weight))."""
    config = RewardConfig()

    def loss_of(model, batch):
        groups = real_groups(batch)
        total = sum(weight for *_, pairs in batch for *_, weight in pairs)
        return train_reward.pair_loss(model, groups, PAD, config, total)[0]

    return real_supervised(model, batches, ["reward_head"], peak, loss_of)


def real_dpo(model, reference, batches, peak):
    config = PolicyConfig(algorithm="dpo", dpo_beta=plain.DPO_BETA)

    def loss_of(model, batch):
        groups = real_groups(batch)
        total = sum(weight for group in groups for *_, weight in group.pairs)
        return dpo_loss(model, reference, groups, PAD, config, total)[0]

    return real_supervised(model, batches, [], peak, loss_of)


def real_collate(batch):
    """ids, mask, chosen, rejected, weight of the same groups."""
    groups = real_groups(batch)
    ids, mask, chosen, rejected, _, weight = collate_preferences(groups, PAD)
    return ids, mask, chosen, rejected, weight


def real_minibatches(name, step):
    config = PolicyConfig(algorithm=name, **CONFIG)
    return list(train_policy.minibatches(config, step))


def real_training(name, policy, reference, reward_model, draws):
    """A record of each iteration."""
    config = PolicyConfig(algorithm=name, **CONFIG)
    algorithm = ALGORITHMS[name]
    records = []
    real_prepare(policy, ["value_head"] if algorithm.learns_value else [])
    optimizer = make_optimizer(policy, config.lr, value_lr_scale=10.0)
    for step, (prompt_ids, prompt_mask, uniforms, _) in enumerate(draws):
        response_ids, response_mask = real_sample(policy, prompt_ids, prompt_mask, uniforms)
        samples = make_samples(prompt_ids, prompt_mask, response_ids.clone(), response_mask.clone())
        scores = real_score(reward_model, samples, config.missing_eos_penalty)
        logprobs, values = measure(policy, samples, config)
        ref_logprobs, _ = measure(reference, samples, config)
        kl_coef = config.kl_coef if algorithm.kl_in_reward else 0.0
        rewards = token_rewards(scores, logprobs, ref_logprobs, samples.response_mask, kl_coef)
        rollout = Rollout(samples, logprobs, ref_logprobs, values, scores, rewards, config.kl_coef)
        rollout = estimate_advantages(algorithm, rollout, config)
        metrics = train_policy.update(policy, optimizer, rollout, config, step, LIMIT)
        weights = copy.deepcopy(policy.state_dict())
        records.append(SimpleNamespace(rollout=rollout, metrics=metrics, weights=weights))
    return records


# ---- plain.py ------------------------------------------------------------------------------------


def plain_model(real):
    """The plain model with the same weights."""
    model = plain.Transformer(VOCAB, n_layer=2, n_head=2, d_model=16, context=24).double()
    model.load_state_dict(real.state_dict())
    return model


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name, value in dict(
        GROUP_SIZE=GROUP,
        MAX_RESPONSE_LENGTH=LIMIT,
        MISSING_EOS_PENALTY=CONFIG["missing_eos_penalty"],
        KL_COEF=CONFIG["kl_coef"],
        DPO_BETA=CONFIG["dpo_beta"],
        GAMMA=CONFIG["gamma"],
        LAMBDA=CONFIG["lam"],
        CLIP_RANGE=CONFIG["clip_range"],
        VALUE_COEF=CONFIG["vf_coef"],
        LEARNING_RATE=CONFIG["lr"],
    ).items():
        assert hasattr(plain, name)
        monkeypatch.setattr(plain, name, value)


def plain_supervised(monkeypatch, model, batches, loss_function, peak):
    """Losses, gradient norms and weights after each step."""
    steps = []
    step_optimizer = plain.step_optimizer

    def recording_step(model, optimizer, loss, lr):
        norm = step_optimizer(model, optimizer, loss, lr)
        steps.append((loss.item(), norm, copy.deepcopy(model.state_dict())))
        return norm

    monkeypatch.setattr(plain, "step_optimizer", recording_step)
    plain.train(model, batches, loss_function, peak)
    return steps


def plain_training(monkeypatch, name, policy, reference, reward_model, draws):
    """A record of each iteration."""
    records = []
    update = plain.update

    def recording_update(
        policy, optimizer, algorithm, rollout, advantages, returns, minibatches, lr
    ):
        steps = update(policy, optimizer, algorithm, rollout, advantages, returns, minibatches, lr)
        records.append(
            SimpleNamespace(
                rollout=rollout,
                advantages=advantages,
                returns=returns,
                steps=steps,
                weights=copy.deepcopy(policy.state_dict()),
            )
        )
        return steps

    monkeypatch.setattr(plain, "update", recording_update)
    monkeypatch.setattr(plain, "mean_gold", lambda ids, encoding: 0.0)
    plain.train_policy(policy, reference, reward_model, plain.ALGORITHMS[name], draws, None)
    return records


# ---- comparison and inputs -----------------------------------------------------------------------


def same(ours, theirs, what):
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    assert ours.dtype == theirs.dtype, what
    torch.testing.assert_close(
        ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda message: f"{what}: {message}"
    )


def same_weights(ours, theirs, when):
    assert ours.keys() == theirs.keys()
    for name in ours:
        same(ours[name], theirs[name], f"{name} {when}")


def ragged(seed, count, shortest=1, longest=5):
    """Random sequences of text tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, EOS, (length,), generator=generator).tolist() for length in lengths]


def uniforms(seed, count):
    return torch.rand(count, LIMIT, generator=torch.Generator().manual_seed(seed))


def preference_batches(count):
    """Ragged groups with 2 to 4 responses, some without EOS; pairs have different weights."""
    batches = []
    for number in range(count):
        groups = []
        for prompt in ragged(number, 3):
            responses = ragged(100 * number + len(groups), 2 + len(groups), 1, 7)
            responses = [
                tuple(response) + (EOS,) * (i != 1) for i, response in enumerate(responses)
            ]
            pairs = [
                (i + 1, i, [1.0, 0.25, 2.0][(i + number) % 3]) for i in range(len(responses) - 1)
            ]
            groups.append((tuple(prompt), tuple(responses), pairs))
        batches.append(groups)
    return batches


# ---- tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_and_scores_are_equal_under_padding(side):
    real = real_model(1)
    sequences = ragged(0, 7, 1, 9)
    ids, mask = plain.pad(sequences, PAD, side)
    real_ids, real_mask = (pad_left if side == "left" else pad_right)(sequences, PAD)
    assert torch.equal(ids, real_ids) and torch.equal(mask, real_mask) and not mask.all()
    model = plain_model(real)
    same(model(ids, mask)[mask].detach(), real(ids, mask)[mask], "hidden states")
    empty = torch.zeros(len(ids), 0, dtype=torch.long)
    same(
        plain.score(model, ids, mask).detach(),
        real_score(real, make_samples(ids, mask, empty, empty.bool()), 0.0),
        "scores",
    )


def test_samples_log_probs_and_values_are_equal():
    real = real_model(2)
    model = plain_model(real)
    prompt_ids, prompt_mask = plain.pad(ragged(3, 40), PAD, "left")
    u = uniforms(4, 40)
    ids, mask = plain.sample(model, prompt_ids, prompt_mask, u)
    response_ids, response_mask = real_sample(real, prompt_ids, prompt_mask, u)
    length = prompt_ids.shape[1]
    assert response_ids.shape[1] == LIMIT
    assert torch.equal(ids, torch.cat([prompt_ids, response_ids], 1))
    assert torch.equal(mask, torch.cat([prompt_mask, response_mask], 1))
    lengths = set(mask[:, length:].sum(1).tolist())
    assert len(lengths) > 3 and LIMIT in lengths
    expected = real_measure(
        real, prompt_ids, prompt_mask, response_ids.clone(), response_mask.clone()
    )
    for name, ours, theirs in zip(
        ("log-probs", "values"), plain.measure(model, ids, mask), expected
    ):
        same(ours.detach(), theirs, name)


def test_a_new_model_gives_the_score_and_the_value_zero():
    """So the first preference loss is ln 2, as in the project."""
    model = plain.Transformer(VOCAB, n_layer=1, n_head=1, d_model=4, context=3)
    ids = torch.tensor([[1, 2, EOS]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert plain.score(model, ids, mask).tolist() == [0.0]
    assert model.value_head(model(ids, mask)).squeeze().tolist() == [0.0, 0.0, 0.0]


def test_supervised_fine_tuning_is_equal_after_each_step(monkeypatch):
    real = real_model(5)
    batches = [plain.pad(ragged(seed, 6, 2, 9), PAD, "right") for seed in range(5)]
    ours = plain_supervised(monkeypatch, plain_model(real), batches, plain.next_token_loss, 0.01)
    theirs = real_fine_tuning(real, batches, 0.01)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        same(a[:2], b[:2], f"loss and gradient norm of step {step}")
        same_weights(a[2], b[2], f"after step {step}")


def test_reward_model_training_is_equal_after_each_step(monkeypatch):
    real = real_model(6)
    batches = preference_batches(5)
    inputs = [real_collate(batch) for batch in batches]
    assert all(not mask.all() and len(weight.unique()) > 1 for _, mask, _, _, weight in inputs)
    ours = plain_supervised(monkeypatch, plain_model(real), inputs, plain.reward_loss, 0.01)
    theirs = real_reward_training(real, batches, 0.01)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        same(a[:2], b[:2], f"loss and gradient norm of step {step}")
        same_weights(a[2], b[2], f"after step {step}")


def test_dpo_is_equal_after_each_step(monkeypatch):
    real, reference = real_model(7), real_model(8)
    batches = preference_batches(5)
    inputs = []
    for batch in batches:
        ids, mask, *pairs = real_collate(batch)
        lengths = torch.tensor([len(prompt) for prompt, responses, _ in batch for _ in responses])
        is_response = mask & (torch.arange(ids.shape[1]) >= lengths[:, None])
        with torch.no_grad():
            ref_logprobs = plain.response_logprobs(plain_model(reference), ids, mask, is_response)
        inputs.append((ids, mask, is_response, ref_logprobs, *pairs))
    ours = plain_supervised(monkeypatch, plain_model(real), inputs, plain.dpo_loss, 0.01)
    theirs = real_dpo(real, reference, batches, 0.01)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        same(a[:2], b[:2], f"loss and gradient norm of step {step}")
        same_weights(a[2], b[2], f"after step {step}")


@pytest.mark.parametrize("name", list(plain.ALGORITHMS))
def test_policy_training_is_equal_after_each_iteration(monkeypatch, name):
    real_policy, real_reference, real_reward = real_model(11), real_model(12), real_model(13)
    real_policy.load_state_dict(
        {
            key: 0.7 * weight + 0.3 * real_reference.state_dict()[key]
            for key, weight in real_policy.state_dict().items()
        }
    )
    models = [plain_model(model) for model in (real_policy, real_reference, real_reward)]
    draws = []
    for step in range(ITERATIONS):
        copies = GROUP if plain.ALGORITHMS[name].grouped else 1
        prompts = [
            prompt
            for prompt in ragged(20 + step, CONFIG["batch_size"] // copies)
            for _ in range(copies)
        ]
        draws.append(
            (
                *plain.pad(prompts, PAD, "left"),
                uniforms(30 + step, CONFIG["batch_size"]),
                real_minibatches(name, step),
            )
        )
    assert len(draws[0][3]) == (4 if plain.ALGORITHMS[name].reuses_rollout else 1)

    ours = plain_training(monkeypatch, name, *models, draws)
    theirs = real_training(name, real_policy, real_reference, real_reward, draws)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        when = f"in iteration {step}"
        response_ids, mask, length = (
            b.rollout.samples.response_ids,
            b.rollout.mask,
            b.rollout.mask.shape[1],
        )
        finished = ((response_ids == EOS) & mask).any(1)
        assert finished.any() and not finished.all() and not mask.all() and not draws[step][1].all()
        assert torch.equal(a.rollout.ids[:, -LIMIT:][:, :length], response_ids), when
        assert torch.equal(a.rollout.mask[:, :length], mask), when
        same(a.rollout.scores, b.rollout.scores, f"scores {when}")
        pairs = dict(
            logprobs=b.rollout.logprobs,
            ref_logprobs=b.rollout.ref_logprobs,
            values=b.rollout.values,
            rewards=b.rollout.rewards,
        )
        pairs = {key: (getattr(a.rollout, key), theirs) for key, theirs in pairs.items()}
        pairs["advantages"] = a.advantages, b.rollout.advantages
        if plain.ALGORITHMS[name].learns_value:
            pairs["returns"] = a.returns, b.rollout.returns
        for key, (x, y) in pairs.items():
            same(x[:, :length], y, f"{key} {when}")
            assert not (x * ~a.rollout.mask).any(), f"{key} on padding {when}"
            assert y.unique().numel() > 2
        losses, norms = zip(*a.steps)
        same(sum(losses) / len(losses), b.metrics["loss"], f"loss {when}")
        same(sum(norms) / len(norms), b.metrics["grad_norm"], f"gradient norm {when}")
        same_weights(a.weights, b.weights, when)
    if plain.ALGORITHMS[name].reuses_rollout:
        assert all(b.metrics["clip_fraction"] > 0 for b in theirs)
    if name == "ppo":
        assert all(b.metrics["value_clip_fraction"] > 0 for b in theirs)


def test_the_two_tables_have_the_same_algorithms_and_flags():
    assert list(plain.ALGORITHMS) == [name for name in ALGORITHMS if name != "online-dpo"]
    for name, algorithm in plain.ALGORITHMS.items():
        for flag in algorithm._fields[2:]:
            assert getattr(algorithm, flag) == getattr(ALGORITHMS[name], flag), (name, flag)


def test_the_two_tokenizers_are_equal():
    ours = plain.load_encoding()
    theirs = load_tokenizer("helpdesk")
    assert (ours.eot_token, ours.n_vocab) == (theirs.eot_token, theirs.n_vocab)
    lines = (ROOT / "data" / "helpdesk-validation.jsonl").read_text().splitlines()[:50]
    for text in [text for line in lines for text in json.loads(line)["responses"]] + [
        "Don't  pay 12 €!\n\n x"
    ]:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
