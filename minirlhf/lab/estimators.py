"""Estimators of the policy gradient against the exact gradient, in a world of listed responses.

`python -m minirlhf.lab.estimators --help`

A row is a loss, as a function of the log-probs, the rollout and the batch size. Its expected
gradient is a sum over all responses (or over all batches of B responses), without sampling. It is
compared with the exact gradient that the row claims to estimate.

Worlds. Rows without B or K: single responses of 3 tokens and EOS, at most 4 tokens: 121 responses,
40 states. Rows with B or K: batches of B responses to one prompt, of 2 tokens and EOS, at most 3
tokens: 15 responses, 7 states. Policies are tables of logits with KL(pi || ref) = 0.3 nats. Scores:
a normal number plus half the length, shifted to mean 0 under pi. The stated world has seed 0. Other
worlds: median [range] of the error over seeds 1 to 12 of policy, reference and scores.
Off-policy: responses come from old, and KL is KL(old || pi); the gradient is that of pi.

Columns. g: the gradient of one response, or the mean over a batch; a sum over tokens, not divided
by R. G: the exact gradient that the row claims. Error: |E g - G| / |G|. Projection: E g . G /
|G|^2. Variance: the trace of the covariance of g, times B, in units of |G|^2. Rows with * claim a
direction only: error sqrt(1 - cosine^2), variance after rescaling to projection 1.
Algorithms: lam = 0.95, gamma = 1, no whitening, V is half the true value, kl_coef = 0.5.
Two prompts: the scores of the second are 4 times as large.
Equations: rho = pi / old, sg = no gradient, s = score, T = length, A = the score.
"""

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from minirlhf.config import PolicyConfig
from minirlhf.lab import small_world
from minirlhf.lab.common import lab_folder, markdown_table, run_lab
from minirlhf.lab.small_world import World, probabilities, response_kl, state_kl
from minirlhf.rl.advantages import group_normalized, leave_one_out, reward_to_go, whiten
from minirlhf.rl.algorithms import ALGORITHMS, estimate_advantages
from minirlhf.rl.losses import kl_k1, kl_k2, kl_k3, policy_gradient_loss, ppo_loss, preference_loss
from minirlhf.rl.rollout import Rollout
from minirlhf.run.command_line import check_ranges, setting
from minirlhf.run.files import write_atomically
from minirlhf.run.terminal import Progress, echo
from minirlhf.tools.charts import Panel, draw
from minirlhf.tools.page import STYLE

import torch
from torch import Tensor

KL_COEF = 0.5  # of the objective E[score] - kl_coef KL
REF_KL = 0.3  # KL(pi || ref) of every policy, nats
DISTANCES = (0.0, 0.01, 0.1)  # KL(old || pi), nats: 0 is on-policy
SEEDS = range(1, 13)  # of the random worlds; the stated world has seed 0
LAM = 0.95


# ---- problems, and what is claimed ---------------------------------------------------------------


class Problem(NamedTuple):
    """One prompt: a policy, where its responses come from, the reference and the scores."""

    world: World
    pi: Tensor  # [S, V] logits of the policy that is differentiated
    old: Tensor  # [S, V] of the policy that sampled
    ref: Tensor  # [S, V]
    scores: Tensor  # [N]


LARGE = small_world.make_world(vocab=4, limit=4)
SMALL = small_world.make_world(vocab=3, limit=3)


@functools.cache
def make_problem(large: bool, seed: int, distance: float = 0.0, scale: float = 1.0) -> Problem:
    """A function of the seed. distance: KL(old || pi), nats. scale: of the scores."""
    world = LARGE if large else SMALL
    ref = small_world.random_logits(world, seed, "reference")
    pi = small_world.move(world, ref, seed, REF_KL)
    old = small_world.move(world, pi, seed, distance, "old") if distance else pi
    scores = small_world.random_scores(world, seed)
    scores = scale * (scores - (probabilities(world, pi) * scores).sum())
    return Problem(world, pi, old, ref, scores)


def success(q: Problem, logits: Tensor) -> Tensor:
    """The probability of a score above 0."""
    return probabilities(q.world, logits)[q.scores > 0].sum()


# The loss whose gradient with respect to the logits x is the exact gradient.
CLAIMS: dict[str, Callable[[Problem, Tensor], Tensor]] = {
    "score": lambda q, x: -(probabilities(q.world, x) * q.scores).sum(),
    "objective": lambda q, x: CLAIMS["score"](q, x) + KL_COEF * response_kl(q.world, x, q.ref),
    "KL": lambda q, x: response_kl(q.world, x, q.ref),
    "KL per state": lambda q, x: state_kl(q.world, x, q.ref),
    "KL(ref, pi) per state": lambda q, x: state_kl(q.world, x, q.ref, reverse=False),
    "success": lambda q, x: -success(q, x),
    "arcsine": lambda q, x: -2 * success(q, x).sqrt().asin(),
}
Loss = Callable[[Tensor, Rollout, int], Tensor]  # (log-probs, rollout, B): sum over responses


class Estimator(NamedTuple):
    """One row."""

    loss: Loss
    claims: str  # a key of CLAIMS
    equation: str  # sg: no gradient; rho: pi / old; s: score
    source: str  # who uses it
    batch: int = 0  # B; 0: single responses, in the large world
    rescaled: bool = False  # claims a direction only
    prompts: int = 1
    sampler: Callable[[Tensor], Tensor] | None = None  # from the logits of pi to those that sample


# ---- losses --------------------------------------------------------------------------------------


def of_algorithm(name: str) -> Loss:
    """A row of ALGORITHMS, with the advantages that training uses."""
    def loss(logprobs: Tensor, r: Rollout, batch: int) -> Tensor:
        config = PolicyConfig(algorithm=name, whiten="off", gamma=1.0, lam=LAM, group_size=batch)
        r = estimate_advantages(ALGORITHMS[name], r, config)
        return ALGORITHMS[name].loss(logprobs, r, config, 1.0)
    return loss


def in_reward(kl: Callable) -> Loss:
    """A KL estimate as a negative reward, with reward-to-go."""
    return lambda logprobs, r, batch: policy_gradient_loss(
        logprobs, -reward_to_go(kl(r.logprobs, r.ref_logprobs), r.mask, 1.0), r.mask, 1.0)


def in_loss(kl: Callable, ratio: Callable = torch.zeros_like) -> Loss:
    """A KL estimate in the loss. ratio: the log of a factor, from log pi - log old."""
    return lambda logprobs, r, batch: (
        ratio(logprobs - r.logprobs).exp() * kl(logprobs, r.ref_logprobs)).sum()


def of_response(log_ratio: Tensor) -> Tensor:
    return log_ratio.sum(1, keepdim=True)


def policy_gradient(advantages: Callable, divisor: Callable, ratio: Callable) -> Loss:
    """ratio(log pi - log old, mask), detached, times advantages / divisor, times log pi."""
    def loss(logprobs: Tensor, r: Rollout, batch: int) -> Tensor:
        weight = ratio(torch.where(r.mask, logprobs.detach() - r.logprobs, 0.0), r.mask)
        weight = weight * advantages(r, batch) / divisor(r, batch)
        return policy_gradient_loss(logprobs, weight, r.mask, 1.0)
    return loss


def clipped(low: float, high: float, advantages: Callable, divisor: Callable) -> Loss:
    """ppo_loss, with another clip range for positive advantages (DAPO)."""
    def loss(logprobs: Tensor, r: Rollout, batch: int) -> Tensor:
        a = advantages(r, batch) / divisor(r, batch)
        positive = ppo_loss(logprobs, r.logprobs, a.clamp(min=0), r.mask, high, 1.0)
        return positive + ppo_loss(logprobs, r.logprobs, a.clamp(max=0), r.mask, low, 1.0)
    return loss


def score(r: Rollout, batch: int) -> Tensor:
    return r.scores[:, None] * r.mask


def minus_mean(r: Rollout, batch: int) -> Tensor:
    groups = r.scores.view(-1, batch)
    return (groups - groups.mean(1, keepdim=True)).view(-1, 1) * r.mask


def minus_others(r: Rollout, batch: int) -> Tensor:
    return leave_one_out(r.rewards, r.mask, batch)


def normalized(r: Rollout, batch: int) -> Tensor:
    return group_normalized(r.scores, r.mask, batch)


def normalized_success(r: Rollout, batch: int) -> Tensor:
    return group_normalized((r.scores > 0).double(), r.mask, batch)


def whitened(r: Rollout, batch: int) -> Tensor:
    pairs = zip(score(r, batch).split(batch), r.mask.split(batch))
    return torch.cat([whiten(advantages, mask) for advantages, mask in pairs])


def constant(r: Rollout, batch: int) -> Tensor:
    return torch.ones(1)


def own_length(r: Rollout, batch: int) -> Tensor:
    return r.mask.sum(1, keepdim=True)


def batch_tokens(r: Rollout, batch: int) -> Tensor:
    """Tokens of the batch per response."""
    return (own_length(r, batch).view(-1, batch).sum(1) / batch).repeat_interleave(batch)[:, None]


def no_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return torch.ones(1)


def token(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return log_ratio.exp()


def whole(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return of_response(log_ratio).exp()


def geometric_mean(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return (of_response(log_ratio) / mask.sum(1, keepdim=True)).exp()


def capped(ratio: Callable, limit: float) -> Callable:
    return lambda log_ratio, mask: ratio(log_ratio, mask).clamp(max=limit)


def top_k(logits: Tensor) -> Tensor:
    return torch.where(logits >= logits.topk(3).values[:, -1:], logits, -torch.inf)


def top_p(logits: Tensor) -> Tensor:
    """The most likely tokens, until their probability reaches 0.9."""
    p, order = logits.softmax(-1).sort(descending=True)
    return torch.where((p.cumsum(-1) - p < 0.9).gather(1, order.argsort(1)), logits, -torch.inf)


# ---- the rows ------------------------------------------------------------------------------------

TRL = "TRL 1.16.0 grpo_trainer.py"
OPEN = "OpenRLHF models/utils.py@02a2605"
BOOK = "rlhf-book policy_gradients/loss.py@0c2ba9c"
SCRATCH = "reasoning-from-scratch ch07"
NANO = "nanochat chat_rl.py@030de3a"
GRPO = f"GRPO (Shao et al. 2024); {TRL}:3153; {BOOK} GRPOLoss"
TIS = "sg[min(rho, c)] A log pi"


def kl(loss: Loss, equation: str, source: str, claims: str = "KL") -> Estimator:
    return Estimator(loss, claims, equation, source)


def row(equation: str, source: str, advantages: Callable = score, divisor: Callable = constant,
        ratio: Callable = no_ratio, **settings) -> Estimator:
    """A row of policy_gradient. settings: other fields of Estimator."""
    rescaled = advantages in (normalized, normalized_success, whitened) or divisor is not constant
    loss = policy_gradient(advantages, divisor, ratio)
    return Estimator(loss, settings.pop("claims", "score"), equation, source, rescaled=rescaled,
                     **settings)


FAMILIES: dict[str, dict[str, Estimator]] = {
    "Algorithms of this project": {
        name: Estimator(of_algorithm(name), "objective", "ALGORITHMS", f"--algorithm {name}",
                        2 if algorithm.grouped else 0, name in ("grpo", "online-dpo"))
        for name, algorithm in ALGORITHMS.items()},
    "KL penalty": {
        "k1 in the reward": kl(in_reward(kl_k1), "r_t = -k1_t", f"Ziegler et al. 2019; {OPEN}"),
        "k1 in the loss": kl(in_loss(kl_k1), "k1_t", f"{SCRATCH} 7_5_plus_kl.py@5182d71"),
        "k2 in the loss": kl(in_loss(kl_k2), "k2_t", f"{OPEN} k2; verl k2, k3+"),
        "k2 in the loss, per state": kl(in_loss(kl_k2), "k2_t", "-", "KL per state"),
        "token ratio x k3 in the loss": kl(in_loss(kl_k3, torch.clone), "rho_t k3_t",
                                           f"{TRL}:3104 (default if beta > 0); DeepSeek-V3.2"),
        "detached ratio x k2 in the loss": kl(in_loss(kl_k2, torch.detach), "sg[rho_t] k2_t",
                                              "OpenRLHF pull request 1309"),
        "k3 in the loss": kl(in_loss(kl_k3), "k3_t",
                             f"GRPO (Shao et al. 2024); {TRL}:3100; {OPEN} k3; grpo here"),
        "k3 in the loss, per state": kl(in_loss(kl_k3), "k3_t", "-", "KL(ref, pi) per state"),
        "k2 in the reward": kl(in_reward(kl_k2), "r_t = -k2_t", "minRLHF ppo_trainer.py@0c18928"),
        "k3 in the reward": kl(in_reward(kl_k3), "r_t = -k3_t", "-"),
        "whole ratio x k1 in the loss": kl(in_loss(kl_k1, of_response), "(prod rho) k1",
                                           f"{SCRATCH} deepseek_v32_style.py@5144af5"),
        "whole ratio x k3 in the loss": kl(in_loss(kl_k3, of_response), "(prod rho) k3", "-"),
        "-k1 in the reward": kl(in_reward(lambda lp, ref: kl_k1(ref, lp)), "r_t = k1_t",
                                f"{BOOK} kl1"),
        "k3 of the inverse in the loss": kl(in_loss(lambda lp, ref: kl_k3(ref, lp)),
                                            "exp(k1_t) - 1 - k1_t", f"{BOOK} kl3")},
    "Denominators": {
        "constant, B = 4": row("A / (B R)", f"Dr. GRPO (Liu et al. 2025); {TRL}:3163; here",
                               batch=4),
        **{f"tokens of the batch, B = {n}": row(
            "A / sum_i T_i", f"DAPO (Yu et al. 2025); {TRL}:3168; {NANO}", divisor=batch_tokens,
            batch=n) for n in (1, 2, 3, 4)},
        **{f"own length, B = {n}": row("A / (B T_i)", GRPO, divisor=own_length, batch=n)
           for n in (1, 4)}},
    "Group baselines": {
        "mean of the others, K = 4": row(
            "s_i - mean_{j!=i} s_j", "RLOO (Ahmadian et al. 2024); here", minus_others, batch=4),
        **{f"own mean, K = {n}": row("s_i - mean_j s_j", f"Dr. GRPO; {TRL}:2786; {NANO}",
                                     minus_mean, batch=n) for n in (2, 3, 4)},
        **{f"own mean / deviation, K = {n}": row("(s_i - mean) / std", "grpo here", normalized,
                                                 batch=n) for n in (2, 3, 4)},
        "own mean / deviation, K = 4, two prompts": row(
            "(s_i - mean) / std", "grpo here", normalized, batch=4, prompts=2),
        "own mean / deviation / own length, K = 4": row(
            "(s_i - mean) / (std T_i)", GRPO, normalized, own_length, batch=4),
        "DAPO, K = 4": Estimator(
            clipped(0.2, 0.28, normalized, batch_tokens), "score", "clipped (.8, 1.28) / sum_i T_i",
            f"Yu et al. 2025; {TRL}:3168; {BOOK} DAPOLoss", 4, True),
        **{f"binary scores / deviation, K = {n}, two prompts": row(
            "([s_i > 0] - mean) / std", "grpo here", normalized_success, batch=n, prompts=2,
            claims="success") for n in (2, 3, 4)},
        "binary scores / deviation, K = 4, arcsine": row(
            "([s_i > 0] - mean) / std", "grpo here", normalized_success, batch=4, prompts=2,
            claims="arcsine")},
    "Importance ratios": {
        "none": row("A log pi", "-"),
        "token": row("rho_t A", "-", ratio=token),
        "token, clipped at 0.2": Estimator(
            clipped(0.2, 0.2, score, constant), "score", "min(rho A, clip(rho, .8, 1.2) A)",
            "PPO (Schulman et al. 2017); here"),
        "token, clipped at 0.2 and 0.28": Estimator(
            clipped(0.2, 0.28, score, constant), "score", "min(rho A, clip(rho, .8, 1.28) A)",
            f"DAPO (Yu et al. 2025); {TRL}:3113"),
        "token, truncated at 1.28": row(TIS, f"CISPO (MiniMax 2025); {TRL}:3109; {BOOK} CISPOLoss",
                                        ratio=capped(token, 1.28)),
        **{f"token, truncated at {c}": row(TIS, f"TIS (Yao et al. 2025); {TRL}:2680",
                                           ratio=capped(token, c)) for c in (2, 8)},
        "tokens up to t": row("prod_{l<=t} rho_l A", "-", ratio=lambda d, mask: d.cumsum(1).exp()),
        "whole response": row("(prod rho) A", "-", ratio=whole),
        **{f"whole response, truncated at {c}": row(TIS, f"{TRL}:2680 sequence_truncate",
                                                    ratio=capped(whole, c)) for c in (1, 2, 8)},
        "geometric mean": row("(prod rho)^(1/T) A", f"GSPO (Zheng et al. 2025); {TRL}:3085",
                              divisor=own_length, ratio=geometric_mean),
        "geometric mean x length": row("T (prod rho)^(1/T) A", f"{TRL}:3085 with loss_type dapo",
                                       ratio=geometric_mean)},
    "The sampler differs from the loss": {
        "temperature 0.6": row("a ~ pi^(1/.6)", "rlhf-book configs/grpo.yaml@04ba0e6",
                               sampler=lambda x: x / 0.6),
        "top-k 3 of 4": row("a ~ top 3 of pi", f"{NANO} (k = 50)", sampler=top_k),
        "top-p 0.9": row("a ~ nucleus of pi", "-", sampler=top_p)},
    "Whitening over the batch": {
        f"whitened, B = {n}": row("(A - mean) / std", "REINFORCE++ (Hu 2025); gae and ppo here",
                                  whitened, batch=n) for n in (2, 3, 4)},
}


# ---- one row -------------------------------------------------------------------------------------


def half_true_values(q: Problem, kl_coef: float) -> Tensor:
    """[S] half of V(s), the expected sum of later rewards, under the policy that sampled."""
    everything = torch.arange(len(q.scores))
    r = small_world.make_rollout(q.world, q.old, q.ref, q.scores, everything, kl_coef)
    weighted = probabilities(q.world, q.old)[:, None] * reward_to_go(r.rewards, r.mask, 1.0)
    sums = weighted.new_zeros(q.world.state_count)
    sums = sums.index_add(0, q.world.states[r.mask], weighted[r.mask])
    return sums / small_world.visits(q.world, q.old) / 2


def expected_gradient(estimator: Estimator, q: Problem) -> tuple[Tensor, Tensor]:
    """The mean [D] of the gradient of one batch, and the mean of its squared norm."""
    batch = max(estimator.batch, 1)
    sampler = estimator.sampler(q.pi) if estimator.sampler else q.old
    rows, orders = small_world.list_batches(len(q.scores), batch)
    weights = probabilities(q.world, sampler)[rows].prod(1) * orders
    rows, weights = rows[weights > 0], weights[weights > 0]
    kl_coef = KL_COEF if estimator.claims == "objective" else 0.0
    r = small_world.make_rollout(q.world, sampler, q.ref, q.scores, rows.flatten(), kl_coef)
    if kl_coef:
        values = half_true_values(q, kl_coef)[q.world.states[rows.flatten()]]
        r = r._replace(values=torch.where(r.mask, values, 0.0))

    def loss(logprobs: Tensor) -> Tensor:
        return estimator.loss(logprobs, r, batch) / batch

    gradients = small_world.batch_gradients(q.world, q.pi, rows, loss)
    return weights @ gradients, weights @ gradients.square().sum(1)


def compare(estimator: Estimator, seed: int, distance: float) -> dict:
    """Error, cosine, projection and variance, as in CONVENTIONS. Prompts are equally likely."""
    problems = [make_problem(not estimator.batch, seed + 100 * prompt, distance, 4.0**prompt)
                for prompt in range(estimator.prompts)]
    means, squares = zip(*(expected_gradient(estimator, q) for q in problems))
    exact = torch.cat([small_world.gradient(functools.partial(CLAIMS[estimator.claims], q), q.pi)
                       for q in problems]) / len(problems)
    mean = torch.cat(means) / len(problems)
    size = float(exact @ exact)
    norm = float(mean.norm())
    projection = float(mean @ exact) / size
    cosine = projection * size**0.5 / norm if norm > 1e-12 else None
    error = float((mean - exact).norm()) / size**0.5
    variance = (float(sum(squares)) / len(problems) - norm**2) * max(estimator.batch, 1) / size
    if estimator.rescaled:
        error = float((mean / projection - exact).norm()) / size**0.5 * abs(cosine)
        variance = variance / projection**2
    return dict(error=error, cosine=cosine, projection=projection, variance=variance)


def measure(estimator: Estimator) -> dict:
    """The comparison at each distance: in the stated world, and the errors in the others."""
    result = dict(equation=estimator.equation, source=estimator.source, claims=estimator.claims,
                  rescaled=estimator.rescaled, batch=estimator.batch)
    for distance in (0.0,) if estimator.sampler else DISTANCES:
        result[f"KL {distance:g}"] = compare(estimator, 0, distance) | dict(
            others=[compare(estimator, seed, distance)["error"] for seed in SEEDS])
    return result


# ---- other facts ---------------------------------------------------------------------------------


def dpo_rows(q: Problem) -> list[list[str]]:
    """The norm of the gradient of DPO's population loss, and the objective, of several policies.

    Pairs of seen responses are drawn from the reference, and labeled by Bradley-Terry on scores.
    """
    log_ref = small_world.token_logprobs(q.world, q.ref).sum(1)
    best = small_world.optimum(q.world, q.ref, q.scores, KL_COEF)
    half = torch.arange(len(best)) % 2 == 0

    def describe(name: str, p: Tensor, seen: Tensor) -> list[str]:
        i, j = torch.cartesian_prod(*[seen.nonzero()[:, 0]] * 2).T
        weight = (log_ref[i] + log_ref[j]).exp() * torch.sigmoid(q.scores[i] - q.scores[j])

        def loss(logits: Tensor) -> Tensor:
            reward = KL_COEF * (small_world.token_logprobs(q.world, logits).sum(1) - log_ref)
            return preference_loss(reward[i], reward[j], weight=weight)

        norm = small_world.gradient(loss, small_world.logits_of(q.world, p)).norm()
        objective = p @ (q.scores - KL_COEF * (p.log() - log_ref))
        return [name, f"{norm:.0e}", f"{objective:.3f}"]

    rows = [describe("all pairs seen, pi*", best, half | True),
            describe("all pairs seen, the reference", log_ref.exp(), half | True)]
    for mass in (0.05, 0.5, 0.95):
        p = torch.where(half, mass * best / best[half].sum(),
                        (1 - mass) * log_ref.exp() / log_ref.exp()[~half].sum())
        rows.append(describe(f"half of the responses seen, {mass:.0%} of pi on them", p, half))
    return rows


def best_of_n_kl(p: Tensor, scores: Tensor, n: int) -> float:
    """The exact KL from p of the best of n samples. Scores must differ from each other."""
    p = p[scores.argsort()]
    below_or_equal = p.cumsum(0)
    best = below_or_equal**n - (below_or_equal - p).clamp(min=0) ** n
    return float(torch.xlogy(best, best / p).sum())


PLACEMENTS = ("k1 in the reward", "k2 in the loss", "k3 in the loss", "k1 in the loss",
              "k2 in the reward", "k3 in the reward", "-k1 in the reward")
KL_COEFS = (0.25, 0.5, 1.0)


def rest_point(name: str, q: Problem, kl_coef: float, limit: int = 4000) -> dict:
    """Where training from the reference comes to rest, if it does.

    At rest the norm of the expected gradient is below 1e-6, and that of the natural gradient (the
    gradient divided by d(s) pi(a | s), which does not vanish at a deterministic policy) below 1e-3.
    Steps follow the natural gradient, at most 0.5 in each logit. This changes the path, but not
    which policies are at rest. A policy 20 nats from the optimum has left.
    """
    logits = q.ref
    best = small_world.optimum(q.world, q.ref, q.scores, kl_coef)
    for step in range(limit + 1):
        here = q._replace(pi=logits, old=logits)
        kl_gradient, _ = expected_gradient(FAMILIES["KL penalty"][name], here)
        score_loss = functools.partial(CLAIMS["score"], here)
        total = small_world.gradient(score_loss, logits) + kl_coef * kl_gradient
        visited = small_world.visits(q.world, logits)[:, None] * logits.softmax(-1)
        natural = total.view_as(logits) / visited
        log_p = small_world.token_logprobs(q.world, logits).sum(1)
        kl_from_optimum = float((best * (best.log() - log_p)).sum())
        converged = bool(total.norm() < 1e-6 and natural.norm() < 1e-3)
        if converged or kl_from_optimum > 20:
            break
        logits = logits - (0.2 / kl_coef / (1 + step / 100) * natural).clamp(-0.5, 0.5)
    kl = float(response_kl(q.world, logits, q.ref))
    objective = float(log_p.exp() @ q.scores) - kl_coef * kl
    return dict(converged=converged, steps=step, kl_coef=kl_coef, objective=objective, kl=kl,
                kl_from_optimum=kl_from_optimum)


# ---- the lab -------------------------------------------------------------------------------------


def cell(x: float | None) -> str:
    """Three digits; 0 for what is only rounding."""
    return "-" if x is None else "0" if abs(x) < 1e-9 else f"{x:.3g}"


def spread(errors: list[float]) -> str:
    return f"{cell(statistics.median(errors))} [{cell(min(errors))}, {cell(max(errors))}]"


def table(rows: dict[str, dict]) -> str:
    """One family: the stated world at each distance, and the errors in the other worlds."""
    header = ["row", "equation", "claims", "error", "cosine", "projection", "variance"]
    for distance in DISTANCES[1:]:
        header += [f"KL {distance:g}: error", "variance"]
    header += ["other worlds", f"KL {DISTANCES[-1]:g}", "who"]
    lines = []
    for name, result in rows.items():
        here = [result.get(f"KL {distance:g}") for distance in DISTANCES]
        line = [name + " *" * result["rescaled"], f"`{result['equation']}`", result["claims"]]
        line += [cell(here[0][key]) for key in ("error", "cosine", "projection", "variance")]
        for other in here[1:]:
            line += [cell(other[key]) for key in ("error", "variance")] if other else ["-", "-"]
        line += [spread(other["others"]) if other else "-" for other in (here[0], here[-1])]
        lines.append([*line, result["source"]])
    return markdown_table(header, lines)


def rest_table(points: list[dict]) -> str:
    """KL(pi* || pi) at rest, one line for each placement and world."""
    lines = []
    for point in points[:: len(KL_COEFS)]:
        same = [p for p in points if (p["name"], p["seed"]) == (point["name"], point["seed"])]
        cells = [f"{p['kl_from_optimum']:.3f}, {p['objective']:.3f}" if p["converged"] else
                 f"does not converge ({p['steps']} steps)" for p in same]
        lines.append([point["name"], str(point["seed"]), *cells])
    return markdown_table(["placement", "world", *(f"kl_coef {c:g}" for c in KL_COEFS)], lines)


CURVES = ("none", "token", "token, clipped at 0.2", "token, truncated at 1.28", "tokens up to t",
          "whole response, truncated at 1", "geometric mean", "whole response")


def picture() -> str:
    """The error of each importance ratio against KL(old || pi), as a file of SVG."""
    lines = [[(kl, compare(FAMILIES["Importance ratios"][name], 0, kl)["error"])
              for kl in (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)] for name in CURVES]
    panel = Panel("Error of the expected gradient, by importance ratio", "",
                  list(enumerate(lines)), [], [])
    svg = draw(panel, list(CURVES), "error of the expected gradient; KL(old || pi), nats")
    style = f"<style>{STYLE} svg {{ color: var(--ink); font-family: sans-serif; }}</style>"
    svg = svg.replace("<svg ", "<svg xmlns='http://www.w3.org/2000/svg' ", 1)
    return svg.replace("<title>", f"{style}<title>", 1)


@dataclasses.dataclass(frozen=True)
class EstimatorsConfig:
    """Compare estimators of the policy gradient with the exact gradient, in a tiny world."""

    out: str = setting("runs/estimators", "folder of estimators.md, .json and .svg")
    fixed_points: bool = setting(False, "also find where training comes to rest")


def all_rows() -> dict[str, dict[str, dict]]:
    """The results of all families."""
    progress = Progress("row", sum(map(len, FAMILIES.values())), plain_lines=5)
    results: dict[str, dict] = {family: {} for family in FAMILIES}
    for family, rows in FAMILIES.items():
        for name in rows:
            results[family][name] = measure(rows[name])
            progress.show(sum(map(len, results.values())), name)
    return results


def all_rest_points() -> list[dict]:
    """Each placement in three worlds at three coefficients."""
    points: list[dict] = []
    jobs = [(name, seed, c) for name in PLACEMENTS for seed in range(3) for c in KL_COEFS]
    progress = Progress("rest point", len(jobs), plain_lines=5)
    for name, seed, c in jobs:
        points.append(dict(name=name, seed=seed) | rest_point(name, make_problem(True, seed), c))
        progress.show(len(points), name)
    return points


def main(config: EstimatorsConfig) -> str:
    """Compute all rows and write the three files; returns the page. Raises UserError."""
    check_ranges(config)
    out = lab_folder(config.out)
    results = all_rows()
    q = make_problem(True, 0)
    best_of = [[str(n), f"{best_of_n_kl(probabilities(q.world, q.ref), q.scores, n):.4f}",
                f"{math.log(n) - (n - 1) / n:.4f}"] for n in (2, 4, 16, 64)]
    dpo = dpo_rows(q)
    parts = [__doc__, *(f"## {family}\n\n{table(rows)}" for family, rows in results.items()),
             "## DPO", markdown_table(["policy", "norm of the gradient", "objective"], dpo),
             "## Best of n: KL from the reference",
             markdown_table(["n", "exact", "log n - (n - 1) / n"], best_of)]
    points = all_rest_points() if config.fixed_points else []
    if points:
        parts += ["## Where training comes to rest: KL(pi* || pi), objective", rest_table(points)]
    page = "\n\n".join(parts)
    worlds = [dict(large=large, distance=kl) | {key: value.tolist() for key, value in
              make_problem(large, 0, kl)._asdict().items() if isinstance(value, Tensor)}
              for large in (True, False) for kl in DISTANCES]
    data = dict(about=__doc__, worlds=worlds, rows=results, dpo=dpo, best_of_n=best_of,
                rest_points=points)
    write_atomically(out / "estimators.json", json.dumps(data, indent=1).encode())
    write_atomically(out / "estimators.md", page.encode())
    write_atomically(out / "estimators.svg", picture().encode())
    echo(f"{page}\n\nsaved {out}/estimators.md, estimators.json and estimators.svg")
    return page


if __name__ == "__main__":
    run_lab(main, EstimatorsConfig)
