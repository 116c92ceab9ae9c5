"""RLHF in one file: supervised fine-tuning, a reward model and policy-gradient algorithms.

Run `python -m minirlhf.plain` (about a minute on two CPU cores; --algorithm NAME, --seed N).
It contains the main algorithms of the project, without evaluation, checkpoints and optimizations:

    1. Supervised fine-tuning: a small transformer learns to write like the help desk in the data.
    2. Reward model: a copy of it learns which of two responses the annotator prefers.
    3. Policy training: another copy learns to give responses with high scores.

The tests compare the rest of the project with this file. In float64, with the same initial weights
and the same random numbers, both give the same numbers to 1e-9.

Shapes: B responses, prompts of at most P tokens, responses of at most R tokens, L tokens
in a sequence (P + R in a rollout), model width D, H heads, vocabulary size V. A mask is bool, True
on real tokens, False on padding.
"""

import argparse
import base64
import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# The only import from the project: the task. Its gold function gives the true utility.
from minirlhf.data import helpdesk

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

DATA = Path(__file__).resolve().parent.parent / "data"

# Settings of the policy training: smaller and faster than the defaults of config.py
ITERATIONS = 20
BATCH_SIZE = 64  # responses per iteration
GROUP_SIZE = 4  # responses to each prompt (rloo, grpo)
EPOCHS = 2  # passes over each rollout (ppo, grpo)
MINIBATCH_SIZE = 32  # responses per optimizer step (ppo, grpo)
LEARNING_RATE = 7e-4  # of the first iteration; falls linearly to 0
MAX_RESPONSE_LENGTH = 56  # tokens, EOS included
MISSING_EOS_PENALTY = 1.0  # subtracted from the score of a response without EOS
KL_COEF = 0.05  # penalty for each nat of KL from the reference model
GAMMA = 1.0  # discount
LAMBDA = 0.95  # of GAE
DPO_BETA = 0.5  # penalty for each nat of KL, in units of utility (dpo)
CLIP_RANGE = 0.2  # of the importance ratio, and of the change of a value
VALUE_COEF = 0.1  # weight of the value loss


# ---- Model ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block with LayerNorm before attention and before the MLP, as in GPT-2."""

    def __init__(self, d_model: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(d_model)
        self.attention_in = nn.Linear(d_model, 3 * d_model)
        self.attention_out = nn.Linear(d_model, d_model)
        self.ln_2 = nn.LayerNorm(d_model)
        self.mlp_in = nn.Linear(d_model, 4 * d_model)
        self.mlp_out = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]. Attention is softmax(Q K^T / sqrt(D / H)) V for each head.

        visible: bool [B, L, L], True where a query (row) may attend to a key (column).
        """
        qkv = self.attention_in(self.ln_1(x)).view(*x.shape[:2], 3, self.n_head, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, L, D / H]
        similarity = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        attention = similarity.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
        x = x + self.attention_out((attention @ value).transpose(1, 2).reshape(x.shape))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.ln_2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """A language model with a reward head and a value head.

    The text tokens have ids 0 to V - 2. EOS has id V - 1; it is an action like any other. PAD has
    id V; it has an embedding, but no probability.
    """

    def __init__(self, vocab_size: int, n_layer: int, n_head: int, d_model: int, context: int):
        super().__init__()
        self.eos, self.pad = vocab_size - 1, vocab_size
        self.wte = nn.Embedding((vocab_size // 64 + 1) * 64, d_model)  # with PAD and unused rows
        self.wpe = nn.Embedding(context, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(d_model)
        self.reward_head = nn.Linear(d_model, 1)
        self.value_head = nn.Linear(d_model, 1)
        self.register_buffer("score_shift", torch.zeros(()))
        self.register_buffer("score_scale", torch.ones(()))
        nn.init.normal_(self.wte.weight, std=0.1)
        nn.init.normal_(self.wpe.weight, std=0.02)
        for weight in (*self.reward_head.parameters(), *self.value_head.parameters()):
            nn.init.zeros_(weight)  # so the first preference loss is ln 2, and V starts at 0

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [B, L, D] of ids [B, L] with mask [B, L].

        Position ids count real tokens, so the states do not depend on the side of the padding.
        A padding token attends to itself, because a softmax over no keys is NaN. No real token
        attends to it.
        """
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        itself = torch.eye(ids.shape[1], dtype=torch.bool)
        visible = torch.ones_like(itself).tril() & (mask[:, None, :] | itself)
        x = self.wte(ids) + self.wpe(positions)
        for block in self.blocks:
            x = block(x, visible)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., V]. The LM head is tied to the token embeddings."""
        return hidden @ self.wte.weight[: self.pad].T


def token_logprobs(model: Transformer, states: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """log p(token | state), [B, L] and 0 on padding. states [B, L, D], tokens [B, L]."""
    logprobs = model.logits(states).log_softmax(-1)
    tokens = torch.where(mask, tokens, 0)  # PAD has no probability
    return logprobs.gather(2, tokens[:, :, None]).squeeze(2) * mask


# ---- Optimizer -----------------------------------------------------------------------------------


def make_optimizer(model: Transformer, weight_decay: float) -> AdamW:
    """AdamW. Only matrices have weight decay, except the embeddings.

    The value head has 10 times the learning rate of the other weights.
    """
    groups = []
    for name, weight in model.named_parameters():
        decay = 0.0 if weight.dim() < 2 or name.startswith(("wte", "wpe")) else weight_decay
        scale = 10.0 if name.startswith("value_head") else 1.0
        groups.append({"params": [weight], "weight_decay": decay, "scale": scale})
    return AdamW(groups, betas=(0.9, 0.95), eps=1e-5)


def step_optimizer(model: Transformer, optimizer: AdamW, loss: Tensor, lr: float) -> float:
    """One step, with the gradient clipped at norm 1. Returns the norm before clipping."""
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


# ---- Supervised fine-tuning and reward model -----------------------------------------------------


def next_token_loss(model: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of -log p(token | tokens before it) over all real tokens but the first, in nats.

    ids, mask [B, L], right-padded.
    """
    states = model(ids, mask)[:, :-1]
    is_target = mask[:, 1:]
    return -token_logprobs(model, states, ids[:, 1:], is_target).sum() / is_target.sum()


def score(model: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    """Score [B] of each text [B, L]: (reward head at the last real token - shift) / scale."""
    last = (mask * torch.arange(ids.shape[1])).argmax(1)
    hidden = model(ids, mask)[torch.arange(len(ids)), last]
    return (model.reward_head(hidden).squeeze(1) - model.score_shift) / model.score_scale


def preference_loss(scores: Tensor, chosen: Tensor, rejected: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of -log sigmoid(r_w - r_l) over M pairs of N texts (Bradley and Terry 1952).

    It is the negative log-likelihood of the model P(w is preferred to l) = sigmoid(r_w - r_l).
    scores [N]; chosen and rejected [M], indices of texts; weight [M].
    """
    return -(weight * F.logsigmoid(scores[chosen] - scores[rejected])).sum() / weight.sum()


def reward_loss(model: Transformer, ids: Tensor, mask: Tensor, *pairs: Tensor) -> Tensor:
    """The preference loss of the scores of N texts, ids and mask [N, L]."""
    return preference_loss(score(model, ids, mask), *pairs)


def response_logprobs(model: Transformer, ids: Tensor, mask: Tensor, is_response: Tensor) -> Tensor:
    """log p(response | prompt) [N]. is_response: bool [N, L], True on response tokens and EOS."""
    states = model(ids, mask)[:, :-1]
    return token_logprobs(model, states, ids[:, 1:], is_response[:, 1:]).sum(1)


def dpo_loss(policy: Transformer, ids: Tensor, mask: Tensor, is_response: Tensor,
             ref_logprobs: Tensor, *pairs: Tensor) -> Tensor:
    """The preference loss of u = beta (log pi(y | x) - log pi_ref(y | x)) (Rafailov et al. 2023).

    The policy itself takes the place of a reward model, and no response is sampled. ref_logprobs
    [N]: response_logprobs of the reference model. The function main has no stage for DPO; `python
    train_policy.py --algorithm dpo` trains with this loss.
    """
    logprobs = response_logprobs(policy, ids, mask, is_response)
    return preference_loss(DPO_BETA * (logprobs - ref_logprobs), *pairs)


def train(model: Transformer, batches: list[tuple], loss_function: Callable, peak: float) -> None:
    """One optimizer step for each batch; a batch is a tuple of arguments of the loss function.

    The learning rate rises to its peak over 5% of the steps, then falls linearly to 0.
    """
    optimizer = make_optimizer(model, weight_decay=0.01)
    total = len(batches)
    for step, batch in enumerate(batches):
        loss = loss_function(model, *batch)
        lr = peak * min((step + 1) / max(1.0, 0.05 * total), (total - step) / total)
        step_optimizer(model, optimizer, loss, lr)
        if (step + 1) % 100 == 0:
            print(f"{loss_function.__name__} at step {step + 1} of {total}: {loss.item():.3f}")


def normalize_scores(reward_model: Transformer, ids: Tensor, mask: Tensor) -> None:
    """Set shift and scale so that the scores of these texts have mean 0 and standard deviation 1.

    ids, mask [B, L], samples of the base model. KL_COEF then means the same for any reward model.
    """
    scores = score(reward_model, ids, mask).detach()
    reward_model.score_shift = scores.mean()
    reward_model.score_scale = scores.std()


# ---- Rollout -------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """B responses to B prompts. Column t of each [B, R] tensor belongs to action a_t."""

    ids: Tensor  # [B, P + R] left-padded prompt, right-padded response
    ids_mask: Tensor  # [B, P + R]
    mask: Tensor  # [B, R] the part of the response: True on every action, EOS included
    logprobs: Tensor  # [B, R] log pi(a_t | s_t) of the policy that sampled
    ref_logprobs: Tensor  # [B, R] the same of the reference model
    values: Tensor  # [B, R] V(s_t), before action a_t
    scores: Tensor  # [B]
    rewards: Tensor  # [B, R]


@torch.no_grad()
def sample(policy: Transformer, ids: Tensor, mask: Tensor, uniforms: Tensor) -> tuple:
    """Sample a response to each prompt [B, P]. Returns ids and mask of prompt and response.

    Both are [B, P + R]. uniforms: float32 [B, R] in [0, 1). An action is the first token whose
    cumulative probability exceeds its random number. After EOS there is only padding. A response
    without EOS was cut at R.
    """
    running = torch.ones(len(ids), dtype=torch.bool)
    for uniform in uniforms.T:
        logits = policy.logits(policy(ids, mask)[:, -1])
        cdf = logits.float().softmax(-1).cumsum(-1)  # [B, V]; cdf[:, -1] is 1 except for rounding
        action = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1)
        action = torch.where(running, action, policy.pad)
        ids = torch.cat([ids, action[:, None]], dim=1)
        mask = torch.cat([mask, running[:, None]], dim=1)
        running = running & (action != policy.eos)
    return ids, mask


def measure(model: Transformer, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(a_t | s_t) and V(s_t), [B, R] and 0 on padding. ids, mask [B, P + R].

    The state s_t is all tokens before a_t. The hidden state of s_t is that of its last token, one
    position to the left of a_t.
    """
    states = model(ids, mask)[:, -MAX_RESPONSE_LENGTH - 1 : -1]
    mask = mask[:, -MAX_RESPONSE_LENGTH:]
    logprobs = token_logprobs(model, states, ids[:, -MAX_RESPONSE_LENGTH:], mask)
    return logprobs, model.value_head(states).squeeze(2) * mask


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef kl_t, plus the score at the last action (Ziegler et al. 2019), [B, R].

    scores [B]; kl [B, R] is log pi(a_t | s_t) - log pi_ref(a_t | s_t). The mean of kl_t over
    actions sampled from pi is the KL from the reference model at state s_t.
    """
    rewards = -kl_coef * kl * mask
    rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores
    return rewards


# ---- Advantages: how much better was each action than expected? All [B, R], 0 on padding ---------


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, from the last action to the first."""
    returns = rewards * mask
    for t in reversed(range(rewards.shape[1] - 1)):
        returns[:, t] += gamma * returns[:, t + 1]
    return returns


def full_return(rollout: Rollout) -> Tensor:
    """G_0, the return of the whole response, for each action (REINFORCE, Williams 1992)."""
    return reward_to_go(rollout)[:, :1] * rollout.mask


def reward_to_go(rollout: Rollout) -> Tensor:
    """G_t, without the rewards before a_t, which a_t cannot change (Williams 1992)."""
    return discounted_returns(rollout.rewards, rollout.mask, GAMMA)


def reward_to_go_minus_value(rollout: Rollout) -> Tensor:
    """G_t - V(s_t). A baseline lowers the variance and keeps the mean (Williams 1992)."""
    return reward_to_go(rollout) - rollout.values


def gae(rollout: Rollout) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, equation 16).

    A_t = sum_l (gamma lambda)^l delta_{t+l},  delta_t = r_t + gamma V(s_{t+1}) - V(s_t).
    The value after the last action is 0.
    """
    deltas = rollout.rewards + GAMMA * F.pad(rollout.values[:, 1:], (0, 1)) - rollout.values
    return discounted_returns(deltas, rollout.mask, GAMMA * LAMBDA)


def leave_one_out(rollout: Rollout) -> Tensor:
    """RLOO: the total reward minus the mean total reward of the other responses to the prompt.

    The responses to one prompt are GROUP_SIZE consecutive rows (Ahmadian et al. 2024).
    """
    totals = rollout.rewards.sum(1).view(-1, GROUP_SIZE)
    others = (totals.sum(1, keepdim=True) - totals) / (GROUP_SIZE - 1)
    return (totals - others).view(-1, 1) * rollout.mask


def group_normalized(rollout: Rollout) -> Tensor:
    """GRPO: (score - mean) / (deviation + 1e-4) over a prompt's responses (Shao et al. 2024).

    deviation: the standard deviation. Equal scores give 0.
    """
    return standardized(rollout.scores.view(-1, GROUP_SIZE), 1, 1e-4).view(-1, 1) * rollout.mask


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over the real tokens."""
    return torch.zeros_like(advantages).masked_scatter(mask, standardized(advantages[mask], 0))


def standardized(x: Tensor, correction: int, floor: float = 0.0) -> Tensor:
    """(x - mean) / (deviation + floor) over the last dimension; 0 if all x are equal."""
    x = x - x[..., :1]  # so that equal numbers have a deviation of exactly 0
    std = x.std(-1, keepdim=True, correction=correction)
    return torch.where(std == 0, 0.0, (x - x.mean(-1, keepdim=True)) / (std + floor))


# ---- Losses of each action: all tensors [B, R] ---------------------------------------------------


def policy_gradient_loss(logprobs: Tensor, batch: Rollout, advantages: Tensor) -> Tensor:
    """-A_t log pi(a_t | s_t). Its gradient is the policy gradient (Williams 1992)."""
    return -advantages * logprobs


def ppo_loss(logprobs: Tensor, batch: Rollout, advantages: Tensor) -> Tensor:
    """-min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) (Schulman et al. 2017, equation 7).

    rho_t = pi(a_t | s_t) / pi_old(a_t | s_t) is the importance ratio.
    """
    ratio = (logprobs - batch.logprobs).exp()
    clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def grpo_loss(logprobs: Tensor, batch: Rollout, advantages: Tensor) -> Tensor:
    """The PPO loss plus KL_COEF k3 (Shao et al. 2024, equations 3 and 4).

    k3 = pi_ref / pi - 1 - log(pi_ref / pi) is an estimate of the KL from the reference model.
    """
    log_ratio = batch.ref_logprobs - logprobs
    k3 = log_ratio.exp() - 1 - log_ratio
    return ppo_loss(logprobs, batch, advantages) + KL_COEF * k3


def value_loss(values: Tensor, batch: Rollout, returns: Tensor) -> Tensor:
    """1/2 max((V - G_t)^2, (V_clipped - G_t)^2), as in the released code of PPO.

    V_clipped is V, moved at most CLIP_RANGE away from the value at sampling time.
    """
    clipped = batch.values + (values - batch.values).clamp(-CLIP_RANGE, CLIP_RANGE)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


# ---- Algorithms ----------------------------------------------------------------------------------


class Algorithm(NamedTuple):
    """An advantage, a loss, and what else differs."""

    advantages: Callable[[Rollout], Tensor]
    loss: Callable[[Tensor, Rollout, Tensor], Tensor]
    learns_value: bool = False  # trains the value head
    whitens: bool = False  # whitens the advantages
    reuses_rollout: bool = False  # several epochs of minibatches, not one step on the whole rollout
    grouped: bool = False  # several responses to each prompt
    kl_in_reward: bool = True  # the KL penalty is part of the reward, not of the loss


ALGORITHMS = {
    "reinforce": Algorithm(full_return, policy_gradient_loss),
    "reward-to-go": Algorithm(reward_to_go, policy_gradient_loss),
    "baseline": Algorithm(reward_to_go_minus_value, policy_gradient_loss, learns_value=True),
    "gae": Algorithm(gae, policy_gradient_loss, learns_value=True, whitens=True),
    "ppo": Algorithm(gae, ppo_loss, learns_value=True, whitens=True, reuses_rollout=True),
    "rloo": Algorithm(leave_one_out, policy_gradient_loss, grouped=True),
    "grpo": Algorithm(group_normalized, grpo_loss, reuses_rollout=True, grouped=True,
                      kl_in_reward=False),
}


# ---- Policy training -----------------------------------------------------------------------------


def update(policy: Transformer, optimizer: AdamW, algorithm: Algorithm, rollout: Rollout,
           advantages: Tensor, returns: Tensor, minibatches: list[Tensor], lr: float) -> list:
    """One optimizer step for each minibatch of indices. Returns each loss and gradient norm.

    The policy loss is a mean over all B x R positions, padding included. A mean over real tokens
    would bias the gradient, because their number depends on the actions. The value loss is a mean
    over real tokens.
    """
    steps = []
    for indices in minibatches:
        batch = Rollout(*(tensor[indices] for tensor in rollout))
        logprobs, values = measure(policy, batch.ids, batch.ids_mask)
        loss = (algorithm.loss(logprobs, batch, advantages[indices]) * batch.mask).mean()
        if algorithm.learns_value:
            squared = value_loss(values, batch, returns[indices]) * batch.mask
            loss = loss + VALUE_COEF * squared.sum() / batch.mask.sum()
        steps.append((loss.item(), step_optimizer(policy, optimizer, loss, lr)))
    return steps


def train_policy(policy: Transformer, reference: Transformer, reward_model: Transformer,
                 algorithm: Algorithm, draws: list[tuple], encoding: tiktoken.Encoding) -> None:
    """Train the policy. draws: the random choices of each iteration, from the function draw."""
    optimizer = make_optimizer(policy, weight_decay=0.0)
    for step, (prompt_ids, prompt_mask, uniforms, minibatches) in enumerate(draws):
        # 1. Sample a response to each prompt.
        ids, ids_mask = sample(policy, prompt_ids, prompt_mask, uniforms)

        # 2. Score the responses and compute per-token rewards.
        with torch.no_grad():
            finished = (ids[:, -MAX_RESPONSE_LENGTH:] == policy.eos).any(1)
            scores = score(reward_model, ids, ids_mask) - MISSING_EOS_PENALTY * ~finished
            logprobs, values = measure(policy, ids, ids_mask)
            ref_logprobs, _ = measure(reference, ids, ids_mask)
        mask = ids_mask[:, -MAX_RESPONSE_LENGTH:]
        kl = logprobs - ref_logprobs
        rewards = token_rewards(scores, kl, mask, KL_COEF if algorithm.kl_in_reward else 0.0)
        rollout = Rollout(ids, ids_mask, mask, logprobs, ref_logprobs, values, scores, rewards)

        # 3. Estimate the advantage of each action.
        advantages = algorithm.advantages(rollout)
        returns = advantages + values  # the targets of the value head, if the algorithm trains it
        if algorithm.whitens:
            advantages = whiten(advantages, mask)

        # 4. Update the policy.
        lr = LEARNING_RATE * (1 - step / len(draws))
        update(policy, optimizer, algorithm, rollout, advantages, returns, minibatches, lr)

        # 5. Log.
        print(f"iteration {step + 1:2}: score {scores.mean():+.2f}  kl {kl.sum(1).mean():.2f}  "
              f"gold utility {mean_gold(ids, encoding):+.2f}")


# ---- Text ----------------------------------------------------------------------------------------


def load_encoding() -> tiktoken.Encoding:
    """The help-desk tokenizer: byte-pair encoding, and EOS as the id after the text tokens."""
    lines = (DATA / "helpdesk.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    eos = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("helpdesk", pat_str=pattern, mergeable_ranks=ranks, special_tokens=eos)


def pad(sequences: list[list[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L] of B sequences, padded on the "left" or "right".

    The sequences must not contain pad_id.
    """
    rows = [torch.tensor(sequence) for sequence in sequences]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    return ids, ids != pad_id


def mean_gold(ids: Tensor, encoding: tiktoken.Encoding) -> float:
    """Mean true utility of responses to prompts, ids [B, P + R]. Training never sees it."""
    total = 0.0
    for row in ids.tolist():
        text = encoding.decode([i for i in row if i < encoding.eot_token])  # without EOS and PAD
        prompt, _, response = text.partition("Agent:")  # a prompt ends with "Agent:"
        total += helpdesk.gold(prompt, response, encoding.eot_token in row)
    return total / len(ids)


def preference_batch(records: list[dict], encoding: tiktoken.Encoding) -> tuple[Tensor, ...]:
    """The arguments of reward_loss: all texts and all preferences of these records."""
    texts: list[list[int]] = []
    pairs: list[list[int]] = []
    for record in records:
        pairs += [[len(texts) + index for index in pair] for pair in record["preferences"]]
        prompt = encoding.encode_ordinary(record["prompt"])
        for response in record["responses"]:
            texts.append(prompt + encoding.encode_ordinary(response) + [encoding.eot_token])
    chosen, rejected = torch.tensor(pairs).T
    return *pad(texts, encoding.n_vocab, "right"), chosen, rejected, torch.ones(len(pairs))


def draw(prompt_ids: Tensor, prompt_mask: Tensor, algorithm: Algorithm) -> tuple:
    """The random choices of one iteration: prompts, uniforms [B, R], indices of each minibatch."""
    copies = GROUP_SIZE if algorithm.grouped else 1
    chosen = torch.randperm(len(prompt_ids))[: BATCH_SIZE // copies].repeat_interleave(copies)
    uniforms = torch.rand(BATCH_SIZE, MAX_RESPONSE_LENGTH)
    epochs, size = (EPOCHS, MINIBATCH_SIZE) if algorithm.reuses_rollout else (1, BATCH_SIZE)
    order = torch.cat([torch.randperm(BATCH_SIZE) for _ in range(epochs)])
    return prompt_ids[chosen], prompt_mask[chosen], uniforms, order.split(size)


# ---- All stages ----------------------------------------------------------------------------------


def main(algorithm: Algorithm, seed: int) -> None:
    """Supervised fine-tuning, reward model, policy training."""
    torch.manual_seed(seed)
    encoding = load_encoding()
    with gzip.open(DATA / "helpdesk-train.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(next(file)) for _ in range(3000)]
    batches = [preference_batch(records[i : i + 4], encoding) for i in range(0, len(records), 4)]

    # Supervised fine-tuning: the base model learns to predict prompts and responses.
    base = Transformer(encoding.n_vocab, n_layer=2, n_head=4, d_model=64, context=96)
    train(base, [batch[:2] for batch in batches[:500]], next_token_loss, peak=4e-3)

    # Reward model: a copy of the base model learns to give preferred responses higher scores.
    reward_model = copy.deepcopy(base)
    train(reward_model, batches, reward_loss, peak=1e-3)
    prompts = [encoding.encode_ordinary(record["prompt"]) for record in records]
    prompt_ids, prompt_mask = pad(prompts, base.pad, "left")
    uniforms = torch.rand(128, MAX_RESPONSE_LENGTH)
    normalize_scores(reward_model, *sample(base, prompt_ids[:128], prompt_mask[:128], uniforms))

    # Policy training: another copy learns. The base model itself is the reference model.
    draws = [draw(prompt_ids, prompt_mask, algorithm) for _ in range(ITERATIONS)]
    train_policy(copy.deepcopy(base), base, reward_model, algorithm, draws, encoding)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="RLHF in one file.")
    parser.add_argument("--algorithm", choices=list(ALGORITHMS), default="ppo")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    main(ALGORITHMS[flags.algorithm], flags.seed)
