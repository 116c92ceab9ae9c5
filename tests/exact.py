"""Exact values for a policy so small that all its responses can be listed.

A state is (prompt number, tokens of the response so far). Tokens are 0 .. V - 2, and EOS = V - 1.
A response ends with EOS or has `limit` tokens. All numbers are float64. Each state is computed
alone, without padding or cache. Apart from the transformer's forward pass, the exact values use no
code of the project.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from minirlhf.config import PolicyConfig
from minirlhf.model.transformer import ModelConfig, Transformer
from minirlhf.rl.algorithms import ALGORITHMS, estimate_advantages, minibatch_loss
from minirlhf.rl.rollout import Rollout, measure, token_rewards
from minirlhf.rl.sampling import Samples

import torch
from tiny import make_samples
from torch import Tensor

State = tuple[int, tuple[int, ...]]
Table = dict[State, Tensor]  # one entry for each reachable state


def tiny_model(seed: int, vocab: int = 4, width: int = 8) -> Transformer:
    """A float64 policy, far from uniform, whose value head is random."""
    config = ModelConfig(vocab, table_rows=8, n_layer=1, n_head=2, d_model=width, context=16)
    model = Transformer(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, width**-0.5, generator=generator)
            if "ln_" in name and name.endswith("weight"):
                weight += 1.0
    return model


class TokenMDP(NamedTuple):
    """The Markov decision process of a small vocabulary: all N responses to all prompts.

    The responses to the first prompt come first, then those to the second, and so on.
    """

    prompts: tuple[tuple[int, ...], ...]
    vocab: int
    limit: int  # tokens, EOS included
    prompt_of: list[int]  # [N] the number of the prompt
    responses: list[tuple[int, ...]]  # [N]

    @property
    def eos(self) -> int:
        return self.vocab - 1

    def steps(self, row: int) -> Iterator[tuple[State, int]]:
        """(state, action) of each token of a response."""
        for t, action in enumerate(self.responses[row]):
            yield (self.prompt_of[row], self.responses[row][:t]), action

    def is_terminal(self, state: State, action: int) -> bool:
        return action == self.eos or len(state[1]) + 1 == self.limit


def make_mdp(prompts: tuple[tuple[int, ...], ...], vocab: int = 4, limit: int = 3) -> TokenMDP:
    """List all responses to these prompts."""
    words = range(vocab - 1)
    eos = vocab - 1
    finished = [(*body, eos) for n in range(limit) for body in itertools.product(words, repeat=n)]
    responses = finished + list(itertools.product(words, repeat=limit))
    prompt_of = [number for number in range(len(prompts)) for _ in responses]
    return TokenMDP(prompts, vocab, limit, prompt_of, responses * len(prompts))


class PolicyTable(NamedTuple):
    """A model's log-probs and values in all reachable states, differentiable."""

    logprobs: Table  # [V]
    values: Table  # scalars


def tabulate(model: Transformer, mdp: TokenMDP, temperature: float) -> PolicyTable:
    """Compute each state alone: one unpadded sequence per forward pass."""
    states = dict.fromkeys(
        state for row in range(len(mdp.responses)) for state, _ in mdp.steps(row)
    )
    logprobs = {}
    values = {}
    for state in states:
        ids = torch.tensor([[*mdp.prompts[state[0]], *state[1]]])
        hidden = model(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1]
        logits = model.wte.weight[: mdp.vocab] @ hidden / temperature
        logprobs[state] = logits - logits.exp().sum().log()
        values[state] = (model.value_head.weight[0] * hidden).sum() + model.value_head.bias[0]
    return PolicyTable(logprobs, values)


def response_logprobs(policy: PolicyTable, mdp: TokenMDP) -> Tensor:
    """[N] log-probability of each whole response."""
    rows = range(len(mdp.responses))
    sums = [sum(policy.logprobs[state][action] for state, action in mdp.steps(row)) for row in rows]
    return torch.stack(sums)


def reward_table(
    policy: PolicyTable, reference: PolicyTable, mdp: TokenMDP, scores: Tensor, kl_coef: float
) -> Table:
    """r(s, a), [V]: minus the KL term, plus the score if the response ends.

    Differentiable in the policy.
    """
    score_of = {}
    for row, response in enumerate(mdp.responses):
        score_of[mdp.prompt_of[row], response] = scores[row]
    table = {}
    for state, logprobs in policy.logprobs.items():
        final_scores = torch.zeros(mdp.vocab, dtype=torch.float64)
        for action in range(mdp.vocab):
            if mdp.is_terminal(state, action):
                final_scores[action] = score_of[state[0], (*state[1], action)]
        table[state] = final_scores - kl_coef * (logprobs - reference.logprobs[state])
    return table


def objective(policy: PolicyTable, mdp: TokenMDP, rewards: Table, gamma: float = 1.0) -> Tensor:
    """E[sum_t gamma^t r_t], mean over prompts: the number that training maximizes."""
    totals = []
    for row in range(len(mdp.responses)):
        steps = enumerate(mdp.steps(row))
        totals.append(sum(gamma**t * rewards[state][action] for t, (state, action) in steps))
    probabilities = response_logprobs(policy, mdp).exp()
    return (probabilities * torch.stack(totals)).sum() / len(mdp.prompts)


def advantage_table(
    policy: PolicyTable, mdp: TokenMDP, rewards: Table, values: Table, gamma: float, lam: float
) -> Table:
    """E[A_t | s_t = s, a_t = a], [V], of generalized advantage estimates, by backward induction.

    No gradient. With values of 0 and lam = 1 it is Q(s, a).
    """
    table = {}
    for state in sorted(policy.logprobs, key=lambda state: -len(state[1])):
        later = torch.zeros(mdp.vocab, dtype=torch.float64)
        for action in range(mdp.vocab):
            if not mdp.is_terminal(state, action):
                next_state = (state[0], (*state[1], action))
                expected = (policy.logprobs[next_state].exp() * table[next_state]).sum()
                later[action] = (gamma * values[next_state] + gamma * lam * expected).detach()
        table[state] = rewards[state].detach() + later - values[state].detach()
    return table


def zero_values(policy: PolicyTable) -> Table:
    return {state: torch.zeros((), dtype=torch.float64) for state in policy.logprobs}


def true_values(policy: PolicyTable, mdp: TokenMDP, rewards: Table, gamma: float) -> Table:
    """V(s), the expected discounted reward from each state on."""
    q = advantage_table(policy, mdp, rewards, zero_values(policy), gamma, lam=1.0)
    values = {}
    for state, logprobs in policy.logprobs.items():
        values[state] = (logprobs.exp() * q[state]).sum().detach()
    return values


def visit_probabilities(policy: PolicyTable, mdp: TokenMDP) -> Table:
    """Probability that a response passes through each state; all prompts are equally likely.

    No gradient.
    """
    table = {}
    for number, tokens in sorted(policy.logprobs, key=lambda state: len(state[1])):
        if tokens:
            previous = (number, tokens[:-1])
            action_probability = policy.logprobs[previous][tokens[-1]].exp().detach()
            table[number, tokens] = table[previous] * action_probability
        else:
            table[number, tokens] = torch.tensor(1.0 / len(mdp.prompts), dtype=torch.float64)
    return table


def policy_gradient_surrogate(policy: PolicyTable, mdp: TokenMDP, advantages: Table) -> Tensor:
    """sum_s d(s) sum_a pi(a | s) A(s, a), with d and A constant.

    Its gradient is E[sum_t A_t grad log pi(a_t | s_t)].
    """
    probability = visit_probabilities(policy, mdp)
    return sum(
        probability[state] * (logprobs.exp() * advantages[state].detach()).sum()
        for state, logprobs in policy.logprobs.items()
    )


def exact_kl(policy: PolicyTable, other: PolicyTable, mdp: TokenMDP) -> Tensor:
    """KL(pi || other) of whole responses in nats, mean over prompts.

    A sum over all responses, not a sum over states.
    """
    logp = response_logprobs(policy, mdp)
    other_logp = response_logprobs(other, mdp)
    return (logp.exp() * (logp - other_logp)).sum() / len(mdp.prompts)


# ---- the code under test, called as in training --------------------------------------------------


def padded_samples(mdp: TokenMDP, extra: int = 0) -> Samples:
    """All N responses. Prompts are left-padded; responses are right-padded to limit + extra."""
    pad = mdp.vocab
    width = max(map(len, mdp.prompts))
    columns = mdp.limit + extra
    prompts = [mdp.prompts[number] for number in mdp.prompt_of]
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    response_lengths = torch.tensor([len(response) for response in mdp.responses])
    return make_samples(
        torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]),
        torch.arange(width) >= width - prompt_lengths[:, None],
        torch.tensor(
            [[*response] + [pad] * (columns - len(response)) for response in mdp.responses]
        ),
        torch.arange(columns) < response_lengths[:, None],
    )


def per_token(mdp: TokenMDP, function: Callable[[State, int], Tensor]) -> Tensor:
    """[N, limit] function(state, action) of each token, 0 after the end of the response.

    No gradient.
    """
    table = torch.zeros(len(mdp.responses), mdp.limit, dtype=torch.float64)
    for row in range(len(mdp.responses)):
        for t, (state, action) in enumerate(mdp.steps(row)):
            table[row, t] = function(state, action).detach()
    return table


def make_rollout(
    model: Transformer,
    reference: Transformer,
    samples: Samples,
    scores: Tensor,
    kl_coef: float,
    temperature: float = 1.0,
    micro_batch_size: int = 7,
    kl_in_reward: bool = True,
) -> Rollout:
    """The rollout of these samples, as train_policy.py computes it."""
    config = PolicyConfig(temperature=temperature, micro_batch_size=micro_batch_size)
    logprobs, values = measure(model, samples, config)
    ref_logprobs, _ = measure(reference, samples, config)
    reward_kl_coef = kl_coef if kl_in_reward else 0.0
    rewards = token_rewards(scores, logprobs, ref_logprobs, samples.response_mask, reward_kl_coef)
    return Rollout(samples, logprobs, ref_logprobs, values, scores, rewards, kl_coef)


def all_pairs(mdp: TokenMDP) -> Tensor:
    """[number of pairs, 2] row numbers of all ordered pairs of responses to one prompt."""
    rows = range(len(mdp.responses))
    same_prompt = [(i, j) for i in rows for j in rows if mdp.prompt_of[i] == mdp.prompt_of[j]]
    return torch.tensor(same_prompt)


def losses_by_group(
    model: Transformer, rollout: Rollout, config: PolicyConfig, limit: int, group: int = 1
) -> Iterator[Tensor]:
    """The training loss of each group of consecutive rows as its own minibatch, differentiable."""
    rollout = estimate_advantages(ALGORITHMS[config.algorithm], rollout, config)
    for rows in torch.arange(len(rollout.scores)).split(group):
        tokens = int(rollout.mask[rows].sum())
        yield minibatch_loss(model, rollout.rows(rows), config, group * limit, tokens)[0]


def gradient(scalar: Tensor, model: Transformer) -> Tensor:
    """d scalar / d theta, all parameters in one vector."""
    weights = list(model.parameters())
    parts = torch.autograd.grad(scalar, weights, allow_unused=True, retain_graph=True)
    full = [torch.zeros_like(w) if part is None else part for w, part in zip(weights, parts)]
    return torch.cat([part.flatten() for part in full])


def flat_weights(model: Transformer) -> Tensor:
    """All parameters in one vector, without gradient."""
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def changed_copy(model: Transformer, seed: int) -> Transformer:
    """A copy with noise of 0.05 on all weights: its importance ratios are not 1."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in copied.parameters():
            generator = torch.Generator().manual_seed(seed)
            weight += 0.05 * torch.randn(weight.shape, dtype=weight.dtype, generator=generator)
    return copied


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
