"""A world so small that all its responses can be listed: exact gradients, in float64.

One prompt; tokens 0 .. V - 2, and EOS = V - 1. A response ends with EOS or has `limit` tokens.
A state is the response so far. A policy is a table of logits [S, V], one row for each of the S
states, so a gradient has D = S V entries. An expectation is a sum over all N responses.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from minirlhf.rl.rollout import Rollout, token_rewards
from minirlhf.rl.sampling import Samples
from minirlhf.run.seeding import generator

import torch
from torch import Tensor


class World(NamedTuple):
    """All N responses. R = limit; [N, R] tensors are padded on the right with EOS."""

    vocab: int  # tokens, EOS included
    response_ids: Tensor  # [N, R]
    mask: Tensor  # [N, R] bool: 1 on every token, EOS included
    states: Tensor  # [N, R] the number of the state before each token
    state_count: int


def make_world(vocab: int = 4, limit: int = 4) -> World:
    """List the responses: those that end with EOS, then those that are cut at `limit` tokens.

    The default has 121 responses of 1 to 4 tokens and 40 states.
    States are numbered by length, then in the order of their tokens.
    """
    eos = vocab - 1
    prefixes = [prefix for n in range(limit) for prefix in itertools.product(range(eos), repeat=n)]
    number = {prefix: index for index, prefix in enumerate(prefixes)}
    responses = [(*prefix, eos) for prefix in prefixes]
    responses += itertools.product(range(eos), repeat=limit)
    response_ids = [list(r) + [eos] * (limit - len(r)) for r in responses]
    states = [[number.get(r[:t], 0) for t in range(limit)] for r in responses]
    lengths = torch.tensor([len(r) for r in responses])
    mask = torch.arange(limit) < lengths[:, None]
    states_tensor = torch.where(mask, torch.tensor(states), 0)
    return World(vocab, torch.tensor(response_ids), mask, states_tensor, len(prefixes))


# ---- random policies and scores ------------------------------------------------------------------


def random_logits(world: World, seed: int, *purpose: object) -> Tensor:
    """[S, V] standard normal logits, a function of the seed and the purpose."""
    shape = (world.state_count, world.vocab)
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed, *purpose))


def random_scores(world: World, seed: int) -> Tensor:
    """[N] a standard normal number for each response, plus half its length minus 1.

    As in practice, the score depends on the length.
    """
    noise = torch.randn(len(world.mask), dtype=torch.float64, generator=generator(seed, "scores"))
    return noise + 0.5 * world.mask.sum(1) - 1.0


def move(world: World, logits: Tensor, seed: int, kl: float, purpose: str = "direction") -> Tensor:
    """logits plus a multiple of a random direction, so that KL(result || logits) = kl nats.

    Far along a direction, the policy is deterministic, and its KL has a limit. If the limit is
    below kl, the next direction of the seed is used. Raises ValueError after 100 directions.
    """
    directions = (random_logits(world, seed, purpose, attempt) for attempt in range(100))
    far = 100.0
    direction = next((d for d in directions if response_kl(world, logits + far * d, logits) > kl),
                     None)
    if direction is None:
        raise ValueError(f"no policy has a KL of {kl} nats")
    low, high = 0.0, far
    for _ in range(100):
        middle = (low + high) / 2
        if response_kl(world, logits + middle * direction, logits) < kl:
            low = middle
        else:
            high = middle
    return logits + high * direction


# ---- log-probs and divergences, differentiable in the logits -------------------------------------


def token_logprobs(world: World, logits: Tensor) -> Tensor:
    """[N, R] log pi(a_t | s_t), 0 beyond the mask."""
    logprobs = logits.log_softmax(-1)[world.states, world.response_ids]
    return torch.where(world.mask, logprobs, 0.0)


def probabilities(world: World, logits: Tensor) -> Tensor:
    """[N] the probability of each whole response; they sum to 1."""
    return token_logprobs(world, logits).sum(1).exp()


def visits(world: World, logits: Tensor) -> Tensor:
    """[S] the probability that a response passes through each state, no gradient."""
    p = probabilities(world, logits).detach()
    mask = world.mask
    return p.new_zeros(world.state_count).index_add(
        0, world.states[mask], p[:, None].expand(mask.shape)[mask])


def response_kl(world: World, logits: Tensor, other: Tensor) -> Tensor:
    """KL(pi || other) of whole responses, in nats."""
    log_ratio = (token_logprobs(world, logits) - token_logprobs(world, other)).sum(1)
    return (probabilities(world, logits) * log_ratio).sum()


def state_kl(world: World, logits: Tensor, other: Tensor, reverse: bool = True) -> Tensor:
    """sum_s d(s) KL(pi(. | s) || other(. | s)), with d(s), the visits of pi, held constant.

    Its value is that of response_kl, its gradient is not: it ignores that the policy changes which
    states occur. reverse=False is KL(other(. | s) || pi(. | s)).
    """
    log_pi = logits.log_softmax(-1)
    log_other = other.log_softmax(-1)
    first, second = (log_pi, log_other) if reverse else (log_other, log_pi)
    return (visits(world, logits)[:, None] * first.exp() * (first - second)).sum()


def gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """[D] the gradient of function(logits) at these logits.

    The exact policy gradient is gradient(lambda x: (probabilities(world, x) * scores).sum(), x),
    that of the KL is gradient(lambda x: response_kl(world, x, ref), x).
    """
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0].flatten()


def optimum(world: World, ref: Tensor, scores: Tensor, kl_coef: float) -> Tensor:
    """[N] pi*, proportional to ref exp(score / kl_coef): it maximizes E[score] - kl_coef KL."""
    return (token_logprobs(world, ref).sum(1) + scores / kl_coef).softmax(0)


def logits_of(world: World, p: Tensor) -> Tensor:
    """[S, V] the policy whose responses have the probabilities p [N]."""
    mask = world.mask
    sums = p.new_zeros(world.state_count, world.vocab)
    where = (world.states[mask], world.response_ids[mask])
    return sums.index_put(where, p[:, None].expand(mask.shape)[mask], accumulate=True).log()


# ---- rollouts of listed responses, and the expectation of a loss ---------------------------------


@functools.cache
def list_batches(count: int, size: int) -> tuple[Tensor, Tensor]:
    """All batches of `size` responses out of `count`, without order.

    Returns row numbers [M, size], and how many orders each batch has [M].
    """
    batches = list(itertools.combinations_with_replacement(range(count), size))
    orders = [math.factorial(size) / math.prod(map(math.factorial, Counter(batch).values()))
              for batch in batches]
    return torch.tensor(batches), torch.tensor(orders, dtype=torch.float64)


def make_rollout(world: World, logits: Tensor, ref: Tensor, scores: Tensor, rows: Tensor,
                 kl_coef: float = 0.0) -> Rollout:
    """The rollout of these responses [B], as training computes it, sampled from `logits`.

    kl_coef: of the KL penalty in the rewards, and of the penalty in the loss if there is one.
    Values are 0. The rows keep their order, so a group is `group_size` consecutive rows.
    """
    ids, mask = world.response_ids[rows], world.mask[rows]
    finished = ((ids == world.vocab - 1) & mask).any(1).tolist()
    texts = [""] * len(rows)
    prompt = torch.zeros(len(rows), 1, dtype=torch.long)
    samples = Samples(texts, texts, finished, prompt, prompt == 0, ids, mask)
    logprobs = token_logprobs(world, logits).detach()[rows]
    ref_logprobs = token_logprobs(world, ref).detach()[rows]
    rewards = token_rewards(scores[rows], logprobs, ref_logprobs, mask, kl_coef)
    return Rollout(samples, logprobs, ref_logprobs, torch.zeros_like(logprobs), scores[rows],
                   rewards, kl_coef)


def batch_gradients(world: World, logits: Tensor, rows: Tensor,
                    loss: Callable[[Tensor], Tensor]) -> Tensor:
    """[M, D] the gradient of each of M batches of B responses.

    rows: [M, B]. loss: from the log-probs [M B, R] of all batches to the sum of their losses. The
    loss of a batch must depend on its own log-probs only.
    """
    logprobs = token_logprobs(world, logits).detach()[rows.flatten()].requires_grad_()
    weights = torch.autograd.grad(loss(logprobs), logprobs)[0]
    mask, states = world.mask[rows.flatten()], world.states[rows.flatten()]
    weights = torch.where(mask, weights, 0.0)
    pi = logits.detach().softmax(-1)
    one_hot = torch.eye(world.vocab, dtype=torch.float64)[world.response_ids[rows.flatten()]]
    parts = weights[..., None] * (one_hot - pi[states])  # grad log pi(a | s) = 1[a] - pi(. | s)
    batch = torch.arange(len(rows)).repeat_interleave(rows.shape[1])[:, None].expand(mask.shape)
    total = parts.new_zeros(len(rows), world.state_count, world.vocab)
    total.index_put_((batch, states), parts, accumulate=True)
    return total.flatten(1)
