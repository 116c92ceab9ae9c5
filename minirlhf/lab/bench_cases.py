"""What bench.py measures: each part of the project at one shape, with the arithmetic and the bytes that it cannot do without."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.advantages import gae
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data import PreferenceGroup
from minirlhf.generate import generate
from minirlhf.kernels import discounted_returns, token_logprobs
from minirlhf.lab import bench_naive as naive
from minirlhf.lab.bench_naive import half
from minirlhf.ladder import LADDER, advantages_and_returns
from minirlhf.model import ModelConfig, Transformer, sequence_scores
from minirlhf.optim import make_optimizer, step_optimizer
from minirlhf.rollout import collect_rollout
from minirlhf.seeding import row_uniforms
from train_policy import learners_pass, update
from train_reward import pair_loss

EOS, PAD = 0, 1  # EOS is the first token, so that a uniform of 0 draws it


class Shape(NamedTuple):
    config: ModelConfig
    batch: int
    prompt: int
    response: int


def shape(layers: int, heads: int, width: int, vocab: int, batch: int, prompt: int, response: int) -> Shape:
    return Shape(ModelConfig(vocab, vocab + -vocab % 64 + 64, layers, heads, width, prompt + response), batch, prompt, response)


SHAPES = {
    "tiny": shape(1, 2, 16, 300, 4, 4, 6),
    "S": shape(4, 4, 128, 2048, 64, 32, 64),
    "M": shape(12, 12, 768, 50257, 8, 32, 64),  # GPT-2 small
}


class Case(NamedTuple):
    name: str
    tokens: int  # handled by one run
    flops: float  # that any way of doing it needs; a multiply-add is two
    bytes: float  # that have to pass through memory once
    ours: Callable
    plain: Callable | None = None
    plain_work: float = 1.0  # the plain way's arithmetic in units of flops
    peers: dict[str, Callable] = {}
    trainer: Callable | None = None  # (rounds, between) of another library: it runs the rounds, and we take our turn between


def number_bytes(device: torch.device) -> int:
    return 2 if device.type == "cuda" else 4


def kernel_cases(s: Shape, device: torch.device, peers) -> list[Case]:
    """Log-probs of batch x (prompt + response) tokens; returns and GAE of 8 batch x 16 response (512 x 1024 in S) and 64 x 64."""
    tokens, width, vocab, size = s.batch * (s.prompt + s.response), s.config.d_model, s.config.vocab_size, number_bytes(device)
    dtype = torch.bfloat16 if size == 2 else torch.float32
    hidden = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(vocab, width, device=device, dtype=dtype) / width**0.5
    targets, upstream = torch.randint(vocab, (tokens,), device=device), torch.randn(tokens, device=device)

    def both(logprobs):
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        return lambda: torch.autograd.grad(logprobs(h, w, targets), (h, w), upstream)

    product, touched = 2.0 * tokens * width * vocab, float(size * (tokens + vocab) * width)
    theirs = peers.logprobs() if peers else {}
    ways = {name: (lambda way=way: way(hidden, weight, targets)) for name, way in theirs.items()}
    return [
        Case("token_logprobs forward", tokens, product, touched, lambda: token_logprobs(hidden, weight, targets),
             lambda: naive.whole_logprobs(hidden, weight, targets), peers=ways),
        Case("token_logprobs forward and backward", tokens, 3 * product, 2 * touched, both(token_logprobs),
             both(naive.whole_logprobs), peers={name: both(way) for name, way in theirs.items()}),
        *scan_cases(8 * s.batch, 16 * s.response, device, peers), *scan_cases(64, 64, device, peers),
    ]


def scan_cases(rows: int, columns: int, device: torch.device, peers) -> list[Case]:
    """The two sums over time; the plain way is the loop of TRL's PPOTrainer."""
    rewards, values = torch.randn(2, rows, columns, device=device)
    mask, zeros, size = torch.ones_like(rewards, dtype=torch.bool), torch.zeros_like(values), rewards.numel()
    return [
        Case(f"discounted_returns {rows} x {columns}", size, 0, 9.0 * size, lambda: discounted_returns(rewards, mask, 0.95),
             lambda: naive.gae_by_loop(rewards, zeros, 0.95, 1.0)),
        Case(f"gae {rows} x {columns}", size, 0, 13.0 * size, lambda: gae(rewards, values, mask, 1.0, 0.95),
             lambda: naive.gae_by_loop(rewards, values, 1.0, 0.95), peers=peers.gae(rewards, values) if peers else {}),
    ]


def trunk_flops(config: ModelConfig, tokens: int, length: int, read: int) -> float:
    """Of a forward pass over texts of this mean length: 24 D^2 a layer and token, and 2 D length of causal attention. Where
    only `read` tokens' states are read, the others need no more than 6 D^2 in the last layer, their keys, values and queries."""
    whole = tokens * config.n_layer * (24 * config.d_model**2 + 2 * config.d_model * length)
    return whole - 18 * config.d_model**2 * (tokens - read)


def pass_flops(config: ModelConfig, tokens: int, length: int, sampled: int) -> float:
    """Of a forward pass that asks for the logits of the tokens sampled."""
    return trunk_flops(config, tokens, length, sampled) + 2.0 * sampled * config.d_model * config.vocab_size


def prompts(s: Shape, device: torch.device, ragged: bool = False) -> tuple[Tensor, Tensor]:
    """Random ids and mask [B, P]; ragged: left-padded, a quarter to all of P long."""
    ids = torch.randint(2, s.config.vocab_size, (s.batch, s.prompt), device=device)
    lengths = torch.randint(max(1, s.prompt // 4), s.prompt + 1, (s.batch, 1), device=device)
    mask = torch.arange(s.prompt, device=device) >= s.prompt - lengths if ragged else torch.ones_like(ids, dtype=torch.bool)
    return ids.masked_fill(~mask, PAD), mask


def geometric_lengths(s: Shape) -> Tensor:
    """[B] response lengths of mean 20 / 64 of the longest, memoryless as those of a model that ends at any token alike."""
    lengths = torch.distributions.Geometric(64 / 20 / s.response).sample((s.batch,)).long() + 1
    return lengths.clamp(max=s.response)


def ending_after(lengths: Tensor, response: int) -> Tensor:
    """[B, R] uniforms with which row b draws EOS as token lengths[b], and, as EOS is unlikely, not before."""
    uniforms = 0.2 + 0.8 * torch.rand(len(lengths), response)
    uniforms[torch.arange(len(lengths)), lengths - 1] = 0.0
    return uniforms


def rollout_case(kind: str, model: Transformer, s: Shape, device: torch.device, peers, plain: bool = True) -> Case:
    """kind: fixed, ragged (left-padded prompts) or geometric (rows end at their own lengths)."""
    c, (ids, mask) = model.config, prompts(s, device, kind == "ragged")
    lengths = geometric_lengths(s) if kind == "geometric" else torch.full((s.batch,), s.response)
    eos = EOS if kind == "geometric" else -1  # -1: nobody ends early
    uniforms = ending_after(lengths, s.response).to(device)
    tokens, steps, size = int(lengths.sum()), int(lengths.max()), number_bytes(device)
    real = int(mask.sum()) + tokens
    weights = sum(p.numel() for p in model.blocks.parameters()) + c.vocab_size * c.d_model
    cache = 2 * c.n_layer * c.d_model * tokens * (s.prompt + tokens / s.batch / 2)

    def ours():
        with half(device):
            return generate(model, ids, mask, s.response, eos, PAD, uniforms)

    def first():
        with half(device):
            naive.rollout_without_cache(model, ids, mask, s.response)

    return Case(f"rollout, {kind}", tokens, pass_flops(c, real, real / s.batch, tokens),
                float(size) * (steps * weights + cache), ours, first if plain else None, s.response / 2,
                peers.rollout(model, ids, mask, s.response, lengths if eos == EOS else None) if peers else {})


def reward_case(model: Transformer, s: Shape, device: torch.device, peers, pairs: int = 32) -> Case:
    """One optimiser step of the reward model on pairs, of lengths from a quarter of the longest up."""
    longest = s.prompt + s.response
    lengths = torch.randint(max(2, longest // 4), longest + 1, (2 * pairs,)).tolist()
    texts = [tuple(torch.randint(2, s.config.vocab_size, (length,)).tolist()) for length in lengths]
    groups = [PreferenceGroup((), (texts[i], texts[pairs + i]), ((0, 1, 0.0, 1.0),)) for i in range(pairs)]
    learner, first, config = copy.deepcopy(model), copy.deepcopy(model), RewardConfig()
    optimizer, first_optimizer = make_optimizer(learner, 1e-4), make_optimizer(first, 1e-4)
    ids = torch.tensor([[*text, *[PAD] * (longest - len(text))] for text in texts], device=device)
    mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]

    def ours():
        with half(device):
            loss, figures = pair_loss(learner, groups, PAD, config, float(pairs))
        loss.backward()
        step_optimizer(learner, optimizer, 1e-4, 1.0)
        return {name: figure.item() for name, figure in figures.items()}

    def plain():
        naive.reward_step(first, first_optimizer, ids, mask)

    weights = 4.0 * 7 * sum(p.numel() for p in model.parameters())  # AdamW reads four numbers a weight and writes three
    flops = 3 * trunk_flops(s.config, sum(lengths), longest * 5 // 8, sum(lengths))
    return Case("reward-model step, ragged pairs", sum(lengths), flops, weights, ours, plain,
                trainer=peers.reward_trainer(model, texts, device) if peers else None)


def rl_config(algorithm: str, s: Shape, epochs: int, device: torch.device) -> PolicyConfig:
    return PolicyConfig(algorithm=algorithm, batch_size=s.batch, minibatch_size=s.batch, ppo_epochs=epochs,
                        bf16=device.type == "cuda", kl_coef=0.05)


def distinct(token_ids: list[list[int]]) -> list[float]:
    """A reward that costs nothing: the share of a response's tokens that differ."""
    return [len(set(tokens)) / len(tokens) for tokens in token_ids]


def iteration_case(algorithm: str, model: Transformer, s: Shape, device: torch.device, peers) -> Case:
    """Sample, score (ppo: by a reward model; else by `distinct`), measure under policy and reference, advantages, update."""
    rung, epochs = LADDER[algorithm], 4 if algorithm == "ppo" else 1
    config, (ids, mask) = rl_config(algorithm, s, epochs, device), prompts(s, device)
    if rung.grouped:
        ids = ids[: s.batch // config.group_size].repeat_interleave(config.group_size, 0)
    policy, first = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, first_optimizer, turn = make_optimizer(policy, 3e-6), make_optimizer(first, 3e-6), iter(range(10**9))

    def ours():
        with half(device), torch.no_grad():
            uniforms = row_uniforms(0, "bench", next(turn), list(range(s.batch)), s.response).to(device)
            response, response_mask = generate(policy, ids, mask, s.response, EOS, PAD, uniforms)
            if algorithm == "ppo":
                whole = torch.cat([ids, response], 1), torch.cat([mask, response_mask], 1)
                scores = sequence_scores(model, *whole)
            else:
                scores = torch.tensor(distinct(response.tolist()), device=device)
            sampled = ids, mask, response, response_mask
        with half(device):
            measured = learners_pass(policy, config, rung, sampled)
            kl_coef = config.kl_coef if rung.kl_in_reward else 0.0
            rollout = collect_rollout(policy, model, *sampled, scores, kl_coef, 1.0, 0, measured)
        weights = advantages_and_returns(rung, rollout, config)
        return update(policy, optimizer, rung, rollout, *weights, config, config.kl_coef, 3e-6, s.response, 0, measured)

    tokens, length = s.batch * s.response, s.prompt + s.response
    real = tokens + s.batch * s.prompt // (config.group_size if rung.grouped else 1)
    forward = pass_flops(s.config, real, length, tokens)
    # sampling, reference, forward and backward; where a rollout serves more than once, the policy; the reward model
    passes = 2 + 3 * epochs + (epochs > 1) + (algorithm == "ppo")
    sampling = rollout_case("fixed", model, s, device, None, False)
    return Case(f"{algorithm} iteration", tokens, passes * forward, sampling.bytes, ours,
                lambda: naive.naive_iteration(first, model, first_optimizer, ids, mask, s.response, epochs),
                (s.response / 2 + passes) / passes,
                trainer=peers.rl_trainer(algorithm, model, ids, s.response, device) if peers else None)


def update_case(model: Transformer, s: Shape, device: torch.device, peers) -> Case:
    """One optimiser step of PPO on a rollout: train_policy.update, metrics and all."""
    policy, (ids, mask) = copy.deepcopy(model), prompts(s, device)
    config, optimizer = rl_config("ppo", s, 1, device), make_optimizer(policy, 3e-6)
    response = torch.randint(2, s.config.vocab_size, (s.batch, s.response), device=device)
    with half(device):
        rollout = collect_rollout(policy, model, ids, mask, response, torch.ones_like(response, dtype=torch.bool),
                                  torch.randn(s.batch, device=device), 0.05, 1.0, 0)
    advantages, returns = advantages_and_returns(LADDER["ppo"], rollout, config)
    tokens, length = s.batch * (s.prompt + s.response), s.prompt + s.response
    forward = pass_flops(s.config, tokens, length, s.batch * s.response)
    weights = 28.0 * sum(p.numel() for p in policy.parameters())
    what = policy, optimizer, LADDER["ppo"], rollout, advantages, returns, config, 0.05, 3e-6, s.response, 0
    return Case(f"policy update, {s.batch} x {length} tokens", tokens, 3 * forward, weights, lambda: update(*what),
                lambda: naive.update_once(policy, optimizer, ids, mask, response, rollout.logprobs, advantages),
                peers=peers.policy_update(model, ids, response, rollout.logprobs, advantages) if peers else {})
