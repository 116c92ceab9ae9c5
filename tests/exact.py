"""The truth, by brute force: a policy so small that every response can be listed, with its exact probability.

A state is (prompt number, tokens of the response so far). Tokens are 0 .. V - 2 and EOS = V - 1; a response ends with
EOS or has `limit` tokens. Everything here is float64, reads one state at a time without padding or cache, and shares no
line with the code under test but the forward pass of the network.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.config import PolicyConfig
from minirlhf.ladder import Rung, advantages_and_returns, minibatch_loss
from minirlhf.model import ModelConfig, Transformer
from minirlhf.rollout import Rollout, collect_rollout

State = tuple[int, tuple[int, ...]]
Table = dict[State, Tensor]  # something of every state that can be reached


def tiny_model(seed: int, vocab: int = 4, width: int = 8) -> Transformer:
    """A float64 policy far from uniform, with a value head that says something arbitrary of every state."""
    model = Transformer(ModelConfig(vocab, table_rows=8, n_layer=1, n_head=2, d_model=width, context=16)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, width ** -0.5, generator=generator)
            if "ln_" in name and name.endswith("weight"):
                weight += 1.0
    return model


class World(NamedTuple):
    """Every response to every prompt. N = all responses of the first prompt, then all of the second, and so on."""

    prompts: tuple[tuple[int, ...], ...]
    vocab: int
    limit: int  # tokens, EOS included
    which: list[int]  # [N] the number of the prompt
    responses: list[tuple[int, ...]]  # [N]

    @property
    def eos(self) -> int:
        return self.vocab - 1

    def steps(self, row: int) -> Iterator[tuple[State, int]]:
        """(state, action) of each token of a response."""
        for t, action in enumerate(self.responses[row]):
            yield (self.which[row], self.responses[row][:t]), action

    def terminal(self, state: State, action: int) -> bool:
        return action == self.eos or len(state[1]) + 1 == self.limit


def every_response(prompts: tuple[tuple[int, ...], ...], vocab: int = 4, limit: int = 3) -> World:
    words, eos = range(vocab - 1), vocab - 1
    finished = [(*body, eos) for n in range(limit) for body in itertools.product(words, repeat=n)]
    responses = finished + list(itertools.product(words, repeat=limit))
    which = [number for number in range(len(prompts)) for _ in responses]
    return World(prompts, vocab, limit, which, responses * len(prompts))


class Policy(NamedTuple):
    """What a model says of every state that can be reached, differentiable."""

    logprobs: Table  # [V]
    values: Table  # scalars


def look_up(model: Transformer, world: World, temperature: float) -> Policy:
    logprobs, values = {}, {}
    for state in dict.fromkeys(state for row in range(len(world.responses)) for state, _ in world.steps(row)):
        ids = torch.tensor([[*world.prompts[state[0]], *state[1]]])
        hidden = model(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1]
        logits = model.wte.weight[: world.vocab] @ hidden / temperature
        logprobs[state] = logits - logits.exp().sum().log()
        values[state] = (model.value_head.weight[0] * hidden).sum() + model.value_head.bias[0]
    return Policy(logprobs, values)


def log_probabilities(policy: Policy, world: World) -> Tensor:
    """[N] log-probability of each whole response."""
    return torch.stack([sum(policy.logprobs[state][action] for state, action in world.steps(row))
                        for row in range(len(world.responses))])


def reward_table(policy: Policy, reference: Policy, world: World, scores: Tensor, kl_coef: float) -> Table:
    """r(s, a), [V]: minus the KL term, and the score where the response ends. Differentiable in the policy."""
    score_of = {(world.which[row], response): scores[row] for row, response in enumerate(world.responses)}
    table = {}
    for state, logprobs in policy.logprobs.items():
        paid = [score_of[state[0], (*state[1], action)] if world.terminal(state, action) else 0.0
                for action in range(world.vocab)]
        table[state] = torch.tensor(paid, dtype=torch.float64) - kl_coef * (logprobs - reference.logprobs[state])
    return table


def objective(policy: Policy, world: World, rewards: Table, gamma: float = 1.0) -> Tensor:
    """E[sum_t gamma^t r_t], mean over prompts: the number that training is to raise."""
    totals = torch.stack([sum(gamma ** t * rewards[state][action] for t, (state, action) in enumerate(world.steps(row)))
                          for row in range(len(world.responses))])
    return (log_probabilities(policy, world).exp() * totals).sum() / len(world.prompts)


def advantage_table(policy: Policy, world: World, rewards: Table, values: Table,
                    gamma: float, lam: float) -> Table:
    """E[A_t | s_t = s, a_t = a], [V], of generalised advantage estimates, by backward induction; no gradient.

    With values of 0 and lam = 1 it is Q(s, a).
    """
    table = {}
    for state in sorted(policy.logprobs, key=lambda state: -len(state[1])):
        later = torch.zeros(world.vocab, dtype=torch.float64)
        for action in range(world.vocab):
            if not world.terminal(state, action):
                after = (state[0], (*state[1], action))
                carried = (policy.logprobs[after].exp() * table[after]).sum()
                later[action] = (gamma * values[after] + gamma * lam * carried).detach()
        table[state] = rewards[state].detach() + later - values[state].detach()
    return table


def no_values(policy: Policy) -> Table:
    return {state: torch.zeros((), dtype=torch.float64) for state in policy.logprobs}


def true_values(policy: Policy, world: World, rewards: Table, gamma: float) -> Table:
    """V(s), the expected discounted reward from each state on."""
    q = advantage_table(policy, world, rewards, no_values(policy), gamma, lam=1.0)
    return {state: (logprobs.exp() * q[state]).sum().detach() for state, logprobs in policy.logprobs.items()}


def visits(policy: Policy, world: World) -> Table:
    """Probability that a response passes through each state; the prompts are equally likely. No gradient."""
    table = {}
    for number, tokens in sorted(policy.logprobs, key=lambda state: len(state[1])):
        before = (number, tokens[:-1])
        table[number, tokens] = (table[before] * policy.logprobs[before][tokens[-1]].exp().detach() if tokens
                                 else torch.tensor(1.0 / len(world.prompts), dtype=torch.float64))
    return table


def policy_gradient_surrogate(policy: Policy, world: World, advantages: Table) -> Tensor:
    """sum_s d(s) sum_a pi(a | s) A(s, a), d and A held fixed: its gradient is E[sum_t A_t grad log pi(a_t | s_t)]."""
    share = visits(policy, world)
    return sum(share[state] * (logprobs.exp() * advantages[state].detach()).sum()
               for state, logprobs in policy.logprobs.items())


def sequence_divergence(policy: Policy, other: Policy, world: World) -> Tensor:
    """KL(pi || other) of whole responses, mean over prompts, nats: over all responses, not state by state."""
    ours, theirs = log_probabilities(policy, world), log_probabilities(other, world)
    return (ours.exp() * (ours - theirs)).sum() / len(world.prompts)


# From here on: the code under test, called exactly as training calls it.


def padded(world: World, extra: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prompt ids and mask [N, P] left-padded, response ids and mask [N, limit + extra] right-padded."""
    width, pad = max(map(len, world.prompts)), world.vocab
    prompts = [[pad] * (width - len(world.prompts[n])) + list(world.prompts[n]) for n in world.which]
    lengths = torch.tensor([len(world.prompts[n]) for n in world.which])
    responses = [list(response) + [pad] * (world.limit + extra - len(response)) for response in world.responses]
    taken = torch.tensor([len(response) for response in world.responses])
    return (torch.tensor(prompts), torch.arange(width) >= width - lengths[:, None],
            torch.tensor(responses), torch.arange(world.limit + extra) < taken[:, None])


def per_token(world: World, number_of: Callable[[State, int], Tensor]) -> Tensor:
    """[N, limit] what number_of says of each state and action, 0 past the end of the response; no gradient."""
    table = torch.zeros(len(world.responses), world.limit, dtype=torch.float64)
    for row in range(len(world.responses)):
        for t, (state, action) in enumerate(world.steps(row)):
            table[row, t] = number_of(state, action).detach()
    return table


def every_rollout(model: Transformer, reference: Transformer, world: World, scores: Tensor, kl_coef: float,
                  temperature: float = 1.0, extra: int = 0) -> Rollout:
    """All N responses as one rollout, in ragged chunks of 7."""
    return collect_rollout(model, reference, *padded(world, extra), scores, kl_coef, temperature, 7)


def all_pairs(world: World) -> Tensor:
    """[number of pairs, 2] rows of every ordered pair of responses to one prompt: groups of two siblings."""
    rows = range(len(world.responses))
    return torch.tensor([(i, j) for i in rows for j in rows if world.which[i] == world.which[j]])


def losses_by_group(model: Transformer, rung: Rung, rollout: Rollout, config: PolicyConfig, kl_coef: float, limit: int,
                    group: int = 1) -> Iterator[Tensor]:
    """The training loss of each run of `group` consecutive rows, as a minibatch of its own, with its graph."""
    advantages, returns = advantages_and_returns(rung, rollout, config)
    for rows in torch.arange(len(rollout.scores)).split(group):
        tokens = int(rollout.response_mask[rows].sum())
        yield minibatch_loss(model, rung, rollout.rows(rows), advantages[rows], returns[rows], config, kl_coef,
                             group * limit, tokens)[0]


def gradient(scalar: Tensor, model: Transformer) -> Tensor:
    """d scalar / d theta, all parameters in one vector."""
    weights = list(model.parameters())
    parts = torch.autograd.grad(scalar, weights, allow_unused=True, retain_graph=True)
    return torch.cat([torch.zeros_like(w).flatten() if g is None else g.flatten() for w, g in zip(weights, parts)])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
