"""The cases of the benchmark: each part of the project at one shape, and the least work for it."""

import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.batches import PreferenceGroup, pad_right
from minirlhf.kernels import discounted_returns, token_logprobs
from minirlhf.lab import bench_naive as naive
from minirlhf.model import ModelConfig, Transformer
from minirlhf.model.generate import generate
from minirlhf.rl.advantages import gae
from minirlhf.rl.algorithms import ALGORITHMS, estimate_advantages
from minirlhf.rl.reward import Reward, score
from minirlhf.rl.rollout import Rollout, measure, token_rewards
from minirlhf.rl.sampling import Samples
from minirlhf.run.optimizer import make_optimizer, step_optimizer
from minirlhf.run.seeding import row_uniforms
from train_policy import update
from train_reward import pair_loss

import torch
from torch import Tensor

EOS = 0  # the first token, so that a uniform of 0 samples it
PAD = 1
LR = 3e-6


class Shape(NamedTuple):
    """Sizes of the model and of the batch."""

    config: ModelConfig
    batch: int  # responses
    prompt: int  # tokens
    response: int  # tokens
    pairs: int = 32  # of a step of the reward model


def table_rows(vocab: int) -> int:
    return vocab + -vocab % 64 + 64


def shape(layers: int, heads: int, width: int, vocab: int, batch: int, prompt: int,
          response: int) -> Shape:
    config = ModelConfig(vocab, table_rows(vocab), layers, heads, width, prompt + response)
    return Shape(config, batch, prompt, response)


SHAPES = {
    "tiny": shape(1, 2, 16, 300, 4, 4, 6),
    "S": shape(4, 4, 128, 2048, 64, 32, 64),
    "M": shape(12, 12, 768, 50257, 8, 32, 64),  # GPT-2 small
    # SmolLM2-135M, with random weights
    "SmolLM2": Shape(
        ModelConfig(49152, 49216, 30, 9, 576, 96, n_kv_head=3, d_mlp=1536, swiglu=True,
                    rms_norm=True, rope_base=100000.0, biases="none"),
        8, 32, 64, pairs=8),
}


class Case(NamedTuple):
    """One row of the table: the same work in several ways."""

    name: str
    tokens: int  # in one run
    flops: float  # that any way needs; a multiply-add is two
    bytes: float  # that must pass through memory once
    ours: Callable
    plain: Callable | None = None
    plain_work: float = 1.0  # arithmetic of the plain way, as a multiple of flops
    peers: dict[str, Callable] = {}
    # (name, train): train(rounds, between) of another library calls between(seconds) after each
    # of its steps
    trainer: tuple[str, Callable] | None = None


# ---- inputs --------------------------------------------------------------------------------------


def make_model(config: ModelConfig, device: torch.device) -> Transformer:
    model = Transformer(config).to(device)
    model.bf16 = naive.uses_bf16(device)
    return model


def number_bytes(device: torch.device) -> int:
    return 2 if device.type == "cuda" else 4


def random_prompts(s: Shape, device: torch.device, ragged: bool = False) -> tuple[Tensor, Tensor]:
    """Random ids and mask [B, P]. ragged: left-padded, with lengths from a quarter of P to P."""
    ids = torch.randint(2, s.config.vocab_size, (s.batch, s.prompt), device=device)
    lengths = torch.full((s.batch, 1), s.prompt, device=device)
    if ragged:
        shortest = max(1, s.prompt // 4)
        lengths = torch.randint(shortest, s.prompt + 1, (s.batch, 1), device=device)
    mask = torch.arange(s.prompt, device=device) >= s.prompt - lengths
    return ids.masked_fill(~mask, PAD), mask


def geometric_lengths(s: Shape) -> Tensor:
    """[B] lengths of responses that end at each token with the same probability.

    Their mean is about 20 / 64 of the longest.
    """
    distribution = torch.distributions.Geometric(64 / 20 / s.response)
    return (distribution.sample((s.batch,)).long() + 1).clamp(max=s.response)


def uniforms_for(lengths: Tensor, response: int) -> Tensor:
    """[B, R] uniforms with which row b samples EOS as its token number lengths[b].

    It does not sample EOS earlier, because EOS is unlikely and the other uniforms are large.
    """
    uniforms = 0.2 + 0.8 * torch.rand(len(lengths), response)
    uniforms[torch.arange(len(lengths)), lengths - 1] = 0.0
    return uniforms


def make_samples(prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor,
                 response_mask: Tensor) -> Samples:
    """Samples without texts."""
    texts = [""] * len(prompt_ids)
    return Samples(texts, texts, [True] * len(prompt_ids), prompt_ids, prompt_mask, response_ids,
                   response_mask)


def ppo_rollout(policy: Transformer, samples: Samples, config: PolicyConfig) -> Rollout:
    """A rollout with random scores and PPO's advantages; the policy is its own reference."""
    logprobs, values = measure(policy, samples, config)
    scores = torch.randn(len(samples.prompt_ids), device=logprobs.device)
    rewards = token_rewards(scores, logprobs, logprobs, samples.response_mask, config.kl_coef)
    rollout = Rollout(samples, logprobs, logprobs, values, scores, rewards, config.kl_coef)
    return estimate_advantages(ALGORITHMS["ppo"], rollout, config)


# ---- the least work ------------------------------------------------------------------------------


def forward_flops(config: ModelConfig, tokens: int, length: int, needed: int) -> float:
    """Of the hidden states of `tokens` tokens in sequences of this mean length.

    For each layer and token 2 for each weight of its matrices (24 D^2 in GPT-2's form), and
    2 H d length for causal attention. If the states of only `needed` tokens are used, the others
    need only queries, keys and values in the last layer.
    """
    c = config
    attention_width = c.n_head * c.head_width
    qkv = c.d_model * (attention_width + 2 * c.kv_heads * c.head_width)
    rest = c.d_model * (attention_width + (3 if c.swiglu else 2) * (c.d_mlp or 4 * c.d_model))
    per_token = c.n_layer * (2 * (qkv + rest) + 2 * attention_width * length)
    return tokens * per_token - 2 * rest * (tokens - needed)


def logit_flops(config: ModelConfig, tokens: int, length: int, needed: int) -> float:
    """forward_flops, and the logits of the needed tokens."""
    head = 2.0 * needed * config.d_model * config.vocab_size
    return forward_flops(config, tokens, length, needed) + head


def optimizer_bytes(model: Transformer) -> float:
    """Of one AdamW step: it reads four numbers for each weight and writes three."""
    return 4.0 * 7 * sum(p.numel() for p in model.parameters())


# ---- kernels -------------------------------------------------------------------------------------


def logprob_case(backward: bool, s: Shape, device: torch.device, peers) -> Case:
    """Log-probs of batch x (prompt + response) tokens, with or without gradients."""
    tokens = s.batch * (s.prompt + s.response)
    width = s.config.d_model
    vocab = s.config.vocab_size
    size = number_bytes(device)
    dtype = torch.bfloat16 if size == 2 else torch.float32
    hidden = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(vocab, width, device=device, dtype=dtype) / width**0.5
    targets = torch.randint(vocab, (tokens,), device=device)
    upstream = torch.randn(tokens, device=device)

    def run_of(logprobs: Callable) -> Callable:
        if not backward:
            return lambda: logprobs(hidden, weight, targets)
        inputs = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
        return lambda: torch.autograd.grad(logprobs(*inputs, targets), inputs, upstream)

    name = "token_logprobs forward" + (" and backward" if backward else "")
    flops = 2.0 * tokens * width * vocab * (3 if backward else 1)
    touched = float(size * (tokens + vocab) * width) * (2 if backward else 1)
    others = peers.logprobs() if peers else {}
    return Case(name, tokens, flops, touched, run_of(token_logprobs), run_of(naive.full_logprobs),
                peers={library: run_of(logprobs) for library, logprobs in others.items()})


def returns_case(rows: int, columns: int, device: torch.device) -> Case:
    """Discounted returns; the plain way is a loop over columns."""
    rewards = torch.randn(rows, columns, device=device)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    zeros = torch.zeros_like(rewards)
    size = rewards.numel()
    return Case(f"discounted_returns {rows} x {columns}", size, 0, 9.0 * size,
                lambda: discounted_returns(rewards, mask, 0.95),
                lambda: naive.gae_loop(rewards, zeros, 0.95, 1.0))


def gae_case(rows: int, columns: int, device: torch.device, peers) -> Case:
    rewards, values = torch.randn(2, rows, columns, device=device)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    size = rewards.numel()
    return Case(f"gae {rows} x {columns}", size, 0, 13.0 * size,
                lambda: gae(rewards, values, mask, 1.0, 0.95),
                lambda: naive.gae_loop(rewards, values, 1.0, 0.95),
                peers=peers.gae(rewards, values) if peers else {})


# ---- parts of training ---------------------------------------------------------------------------


def rollout_case(kind: str, model: Transformer, s: Shape, device: torch.device, peers,
                 plain: bool = True) -> Case:
    """kind: fixed, ragged (left-padded prompts) or geometric (rows end at different lengths)."""
    config = model.config
    ids, mask = random_prompts(s, device, kind == "ragged")
    is_geometric = kind == "geometric"
    lengths = geometric_lengths(s) if is_geometric else torch.full((s.batch,), s.response)
    eos = EOS if is_geometric else -1  # -1: no row ends early
    uniforms = uniforms_for(lengths, s.response).to(device)

    def ours():
        return generate(model.for_decoding(), ids, mask, s.response, eos, PAD, uniforms)

    def without_cache():
        with naive.autocast(device):
            naive.sample_without_cache(model, ids, mask, s.response)

    sampled = int(lengths.sum())
    tokens = int(mask.sum()) + sampled
    steps = int(lengths.max())
    weights = sum(p.numel() for p in model.blocks.parameters())
    weights += config.vocab_size * config.d_model
    cache = 2 * config.n_layer * config.kv_heads * config.head_width
    cache *= sampled * (s.prompt + sampled / s.batch / 2)
    ends = lengths if is_geometric else None
    return Case(f"rollout, {kind}", sampled,
                logit_flops(config, tokens, tokens / s.batch, sampled),
                float(number_bytes(device)) * (steps * weights + cache), ours,
                without_cache if plain else None, s.response / 2,
                peers.rollout(model, ids, mask, s.response, ends) if peers else {})


def reward_case(model: Transformer, s: Shape, device: torch.device, peers) -> Case:
    """One optimizer step of the reward model; texts of a quarter of the context to all of it."""
    pairs = s.pairs
    longest = s.prompt + s.response
    lengths = torch.randint(max(2, longest // 4), longest + 1, (2 * pairs,)).tolist()
    texts = [tuple(torch.randint(2, s.config.vocab_size, (length,)).tolist())
             for length in lengths]
    groups = [PreferenceGroup((), (texts[i], texts[pairs + i]), ((0, 1, 0.0, 1.0),))
              for i in range(pairs)]
    config = RewardConfig()
    learner = copy.deepcopy(model)
    optimizer = make_optimizer(learner, 1e-4)
    plain_model = copy.deepcopy(model)
    plain_optimizer = make_optimizer(plain_model, 1e-4)
    ids, mask = (x.to(device) for x in pad_right(texts, PAD))

    def ours():
        with learner.autocast():
            loss, metrics = pair_loss(learner, groups, PAD, config, float(pairs))
        loss.backward()
        metrics = {name: value.item() for name, value in metrics.items()}
        step_optimizer(learner, optimizer, 1e-4, 1.0)
        return metrics

    tokens = sum(lengths)
    return Case("reward-model step, ragged pairs", tokens,
                3 * forward_flops(s.config, tokens, longest * 5 // 8, tokens),
                optimizer_bytes(model), ours,
                lambda: naive.reward_step(plain_model, plain_optimizer, ids, mask),
                trainer=peers.reward_trainer(model, texts, device) if peers else None)


def policy_config(algorithm: str, s: Shape, epochs: int) -> PolicyConfig:
    return PolicyConfig(algorithm=algorithm, batch_size=s.batch, minibatch_size=s.batch,
                        ppo_epochs=epochs, lr=LR, lr_decay=False, kl_coef=0.05)


def distinct_share(token_ids: list[list[int]]) -> list[float]:
    """A reward that takes no time: the share of a response's tokens that are distinct."""
    return [len(set(tokens)) / len(tokens) for tokens in token_ids]


def iteration_case(name: str, model: Transformer, s: Shape, device: torch.device, peers) -> Case:
    """One iteration of train_policy.py, without logging.

    name: the algorithm. ppo is scored by a reward model, the others by distinct_share.
    """
    algorithm = ALGORITHMS[name]
    epochs = 4 if name == "ppo" else 1
    config = policy_config(name, s, epochs)
    ids, mask = random_prompts(s, device)
    copies = config.group_size if algorithm.grouped else 1
    ids = ids[: s.batch // copies].repeat_interleave(copies, 0)
    policy = copy.deepcopy(model)
    optimizer = make_optimizer(policy, LR)
    plain_policy = copy.deepcopy(model)
    plain_optimizer = make_optimizer(plain_policy, LR)
    reward = Reward("bench", model, 0.0)
    steps = itertools.count()

    def ours():
        uniforms = row_uniforms(0, "bench", next(steps), list(range(s.batch)), s.response)
        response_ids, response_mask = generate(policy.for_decoding(), ids, mask, s.response, EOS,
                                               PAD, uniforms.to(device))
        samples = make_samples(ids, mask, response_ids, response_mask)
        if name == "ppo":
            scores = score(reward, samples)
        else:
            scores = torch.tensor(distinct_share(response_ids.tolist()), device=device)
        logprobs, values = measure(policy, samples, config)
        ref_logprobs, _ = measure(model, samples, config)
        kl_coef = config.kl_coef if algorithm.kl_in_reward else 0.0
        rewards = token_rewards(scores, logprobs, ref_logprobs, response_mask, kl_coef)
        rollout = Rollout(samples, logprobs, ref_logprobs, values, scores, rewards, config.kl_coef)
        rollout = estimate_advantages(algorithm, rollout, config)
        return update(policy, optimizer, rollout, config, 0, s.response)

    sampled = s.batch * s.response
    tokens = sampled + s.batch * s.prompt // copies
    # Sampling, reference, forward and backward; the old log-probs, which the forward pass of a
    # single optimizer step could give too; the reward model.
    passes = 2 + 3 * epochs + (epochs > 1) + (name == "ppo")
    return Case(f"{name} iteration", sampled,
                passes * logit_flops(s.config, tokens, s.prompt + s.response, sampled),
                rollout_case("fixed", model, s, device, None, False).bytes, ours,
                lambda: naive.ppo_iteration(plain_policy, model, plain_optimizer, ids, mask,
                                            s.response, epochs),
                (s.response / 2 + passes) / passes,
                trainer=peers.rl_trainer(name, model, ids, s.response, device) if peers else None)


def update_case(model: Transformer, s: Shape, device: torch.device, peers) -> Case:
    """One optimizer step of PPO on a rollout: train_policy.update, with its metrics."""
    policy = copy.deepcopy(model)
    optimizer = make_optimizer(policy, LR)
    config = policy_config("ppo", s, 1)
    ids, mask = random_prompts(s, device)
    response = torch.randint(2, s.config.vocab_size, (s.batch, s.response), device=device)
    samples = make_samples(ids, mask, response, torch.ones_like(response, dtype=torch.bool))
    rollout = ppo_rollout(policy, samples, config)
    logprobs, advantages = rollout.logprobs, rollout.advantages
    length = s.prompt + s.response
    tokens = s.batch * length
    flops = 3 * logit_flops(s.config, tokens, length, s.batch * s.response)
    others = peers.policy_update(model, ids, response, logprobs, advantages) if peers else {}
    return Case(
        f"policy update, {s.batch} x {length} tokens", tokens, flops, optimizer_bytes(policy),
        lambda: update(policy, optimizer, rollout, config, 0, s.response),
        lambda: naive.policy_step(policy, optimizer, ids, mask, response, logprobs, advantages),
        peers=others)
