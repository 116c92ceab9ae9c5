"""The gradient of each rung over many batches: how long, how noisy, how biased. `python -m minirlhf.lab.variance --help`

All rungs see the same batches, so that their variances are compared in pairs. What is measured is the gradient of the loss
that training takes (`advantages_and_returns`, `minibatch_loss`, on-policy) without whitening, which would hide the units.
V is a model of its own, fitted on other samples. Four settings: the base model or a policy on its way, times the reward
model's score on the last token or the true worth of each sentence as it ends.
"""

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minirlhf.advantages import full_return, reward_to_go
from minirlhf.checkpoint import load_model, save_model, write_atomically
from minirlhf.config import PolicyConfig, UserError
from minirlhf.environment import Environment, Samples, load_environment, next_prompts, sample_responses
from minirlhf.flags import check_ranges, setting
from minirlhf.lab.common import Rows, need_files, run_lab, save_picture
from minirlhf.lab.variance_page import describe, draw_values, draw_variances
from minirlhf.ladder import LADDER, Rung, advantages_and_returns, explained_variance, minibatch_loss
from minirlhf.log import Progress
from minirlhf.losses import value_loss
from minirlhf.model import Transformer
from minirlhf.optim import make_optimizer, step_optimizer, trapezoid
from minirlhf.rollout import Rollout, collect_rollout, evaluate_actions, token_rewards
from minirlhf.seeding import derive_seed
from minirlhf.task import file_hashes
from minirlhf.tokenizer import decode, fingerprint


@dataclasses.dataclass(frozen=True)
class VarianceConfig:
    """The gradient of each rung over many independent batches: norm, bias, variance, signal to noise, with 95% intervals."""

    reward_run: str = setting("", "folder that train_reward.py made: base.pt and reward.pt")
    policy_run: str = setting("", "folder of a policy on its way (train_policy.py --iterations 20); empty: the base model alone")
    out: str = setting("runs/variance", "folder of variance.md, rows.jsonl and the pictures")
    batches: int = setting(64, "independent batches over which variances are taken", 3)
    reference_batches: int = setting(128, "other batches, whose mean gradient stands for the true one", 3)
    value_batches: int = setting(96, "other batches still, on which V is fitted", 1)
    batch_size: int = setting(64, "responses per batch", 1)
    group_size: int = setting(4, "responses per prompt, for rloo and grpo; the other rungs see the same batches", 2)
    kl_coef: float = setting(PolicyConfig.kl_coef, "as in training", 0)
    lam: float = setting(PolicyConfig.lam, "as in training", 0, 1)
    value_lr: float = setting(1e-3, "peak Adam step of the fit of V; that of the reward model", 0)
    seed: int = setting(0, "of prompts and samples", 0)

    def check(self) -> None:
        check_ranges(self)
        if not self.reward_run:
            raise UserError("--reward-run is missing: name the folder of a finished train_reward.py")
        if self.batch_size % self.group_size:
            raise UserError(f"--batch-size {self.batch_size} is not a multiple of --group-size {self.group_size}")
        folder = Path(self.reward_run)
        need_files(folder, ("config.json", "base.pt", "reward.pt"), f"python train_reward.py --out {folder}")
        if self.policy_run:
            need_files(Path(self.policy_run), ("config.json", "policy.pt"),
                       f"python train_policy.py --reward-run {folder} --iterations 20 --out {self.policy_run}")
            facts = json.loads((Path(self.policy_run) / "config.json").read_text(encoding="utf-8"))["facts"]
            if not set(file_hashes([folder / "base.pt"]).values()) <= set(facts["data"].values()):
                raise UserError(f"{self.policy_run}: was not trained from {folder / 'base.pt'}; name the reward run that it was")

    def policy_config(self) -> PolicyConfig:
        return PolicyConfig(reward_run=self.reward_run, batch_size=self.batch_size, group_size=self.group_size, seed=self.seed,
                            kl_coef=self.kl_coef, lam=self.lam, vf_coef=0.0, ent_coef=0.0, whiten="off")


# ---- batches ---------------------------------------------------------------------------------------------------------

def dense_rewards(samples: Samples, world: Environment) -> Tensor:
    """[B, R] the change of gold utility with each sentence, at the token that ends it; the rest at the last token.

    Sums to the gold utility of the response, exactly up to rounding: the same task, paid by the piece.
    """
    rewards = torch.zeros(samples.response_mask.shape, dtype=torch.float64)
    for row, (prompt, worth) in enumerate(zip(samples.prompts, samples.gold(world.task), strict=True)):
        ids = samples.response_ids[row][samples.response_mask[row]].tolist()
        paid = 0.0
        for t in range(len(ids) - 1):
            text = decode(world.sampling.encoding, ids[: t + 1])
            if text.endswith((".", "?", "!")):
                rewards[row, t] = world.task.gold(prompt, text) - paid
                paid += rewards[row, t].item()
        rewards[row, len(ids) - 1] = worth - paid
    return rewards.float()


class Batch(NamedTuple):
    score: Rollout  # paid by the reward model, on the last token
    dense: Rollout  # the same responses, paid by gold, sentence by sentence


def collect(policy: Transformer, world: Environment, purpose: str, count: int, config: PolicyConfig) -> list[Batch]:
    """Independent batches of the policy's responses; which, depends on the seed and the purpose."""
    batches, progress = [], Progress(f"sampling, {purpose}", count, plain_lines=2)
    for step in range(count):
        prompts = next_prompts(world.train, config.batch_size // config.group_size, config.group_size,
                               derive_seed(config.seed, purpose), step)
        samples = sample_responses(policy, *prompts, world.sampling, purpose, step, rows=list(range(config.batch_size)))
        rollout = collect_rollout(policy, world.base, *samples[3:], world.scorer(samples), config.kl_coef, config.temperature, 0)
        worth = dense_rewards(samples, world)
        penalty = token_rewards(0 * rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.response_mask, config.kl_coef)
        batches.append(Batch(rollout, rollout._replace(rewards=worth + penalty, scores=worth.sum(1))))
        progress.show(step + 1, "")
    return batches


def fit_value(start: Transformer, rollouts: list[Rollout], config: VarianceConfig) -> Transformer:
    """A model whose value head says the expected reward-to-go: regression on these rollouts, two passes, from start's weights."""
    model, total = copy.deepcopy(start).requires_grad_(True), 2 * len(rollouts)
    optimizer, progress = make_optimizer(model, config.value_lr), Progress("fitting V", total, plain_lines=2)
    for step in range(total):
        r = rollouts[step % len(rollouts)]
        values, returns = evaluate_actions(model, *r[:4], 1.0)[1], reward_to_go(r.rewards, r.response_mask, 1.0)
        loss = value_loss(values, values, returns, r.response_mask, 0.0, int(r.response_mask.sum()))
        loss.backward()
        step_optimizer(model, optimizer, config.value_lr * trapezoid(step, total), 1.0)
        progress.show(step + 1, f"loss {loss.item():.3f}")
    return model.requires_grad_(False)


@torch.no_grad()
def with_values(model: Transformer, rollout: Rollout) -> Rollout:
    return rollout._replace(values=evaluate_actions(model, *rollout[:4], 1.0)[1])


# ---- gradients -------------------------------------------------------------------------------------------------------

def gradient(policy: Transformer, rung: Rung, rollout: Rollout, config: PolicyConfig, max_response_length: int) -> Tensor:
    """[D] the gradient of the rung's loss on one batch, with respect to the language model's parameters."""
    parameters = [p for name, p in policy.named_parameters() if not name.startswith(("value_head", "reward_head"))]
    loss, _ = minibatch_loss(policy, rung, rollout, *advantages_and_returns(rung, rollout, config), config, config.kl_coef,
                             len(rollout.scores) * max_response_length, int(rollout.response_mask.sum()))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def figures_of(ours: Tensor, reference: Tensor, resamples: int = 1000) -> dict:
    """What N gradients [N, D] of a rung say, beside R gradients [R, D] of an unbiased rung on other batches.

    signal |E g|^2 and bias |E g - E g_ref|^2 are means over pairs of different batches (the square of a mean would count
    noise as signal); variance is the trace of the covariance. Intervals: bootstrap over batches, in both lists.
    """
    gram, cross, other = (x.double().numpy() for x in (ours @ ours.T, ours @ reference.T, reference @ reference.T))
    random = np.random.default_rng(derive_seed(0, "bootstrap"))
    n, r = len(ours), len(reference)
    w = np.vstack([np.ones(n), random.multinomial(n, np.full(n, 1 / n), resamples)])
    v = np.vstack([np.ones(r), random.multinomial(r, np.full(r, 1 / r), resamples)])

    def pairs(weights, products):  # the mean over pairs of two different batches; nan where all draws are of one
        square = weights**2
        count = weights.sum(1) ** 2 - square.sum(1)
        return (((weights @ products) * weights).sum(1) - square @ np.diag(products)) / np.where(count, count, np.nan)

    signal, true, along = pairs(w, gram), pairs(v, other), ((w @ cross) * v).sum(1) / (n * r)
    variance = w @ np.diag(gram) / n - signal
    named = dict(signal_to_noise=signal / variance, bias=(signal - 2 * along + true) / true,
                 cosine=np.clip(along / np.sqrt(np.maximum(signal * true, 1e-12)), -1, 1))
    row = {name: [float(draws[0]), *np.nanquantile(draws[1:], (0.025, 0.975)).tolist()] for name, draws in named.items()}
    deviations = (ours - ours.mean(0)).double().pow(2).sum(1) * n / (n - 1)
    return row | dict(norm=float(ours.norm(dim=1).mean()), deviations=[float(f"{x:.7g}") for x in deviations])


# ---- the lab ---------------------------------------------------------------------------------------------------------

def measure(name: str, policy: Transformer, world: Environment, reward_model: Transformer, rows: Rows,
            config: VarianceConfig) -> None:
    """All rows of one policy: both rewards, every rung. Nothing is sampled when all are there already."""
    settings = config.policy_config()
    if all(f"{name}, {reward}: {rung}" in rows.rows for reward in Batch._fields for rung in LADDER):
        return
    policy.requires_grad_(True)
    sets = [collect(policy, world, f"{name}, {purpose}", count, settings) for purpose, count in (
        ("measured", config.batches), ("reference", config.reference_batches), ("value", config.value_batches))]
    for reward in Batch._fields:
        measured, reference, fitting = ([getattr(batch, reward) for batch in some] for some in sets)
        path = Path(config.out) / f"value-{name}-{reward}.pt"
        if not path.exists():
            value = fit_value(reward_model, fitting, config)
            save_model(path, "value", value, dict(tokenizer=fingerprint(world.sampling.encoding)))
        value, _ = load_model(path, "value", fingerprint(world.sampling.encoding))
        measured, reference = ([with_values(value, r) for r in some] for some in (measured, reference))
        if policy is world.base and reward == "score":
            check_same_weights(measured)
        measure_rungs(f"{name}, {reward}", policy, measured, reference, world.sampling.max_response_length, rows, settings)


def check_same_weights(rollouts: list[Rollout]) -> None:
    """At the base model every KL term is log 1 = 0 and the score is paid at the end: all that is earned is still to come, at
    every token, so the full return and the reward-to-go are the same numbers."""
    for r in rollouts:
        whole, to_go = (weight(r.rewards, r.response_mask, 1.0) for weight in (full_return, reward_to_go))
        if not torch.equal(whole, to_go):
            raise AssertionError("full return and reward-to-go differ at the base model, where nothing is paid before the end")


def measure_rungs(name: str, policy: Transformer, measured: list[Rollout], reference: list[Rollout], max_response_length: int,
                  rows: Rows, settings: PolicyConfig) -> None:
    def gradients(rung: str, rollouts: list[Rollout]) -> Tensor:
        return torch.stack([gradient(policy, LADDER[rung], r, settings, max_response_length) for r in rollouts])

    def row_of(rung: str) -> dict:
        return dict(explained=explained, **figures_of(gradients(rung, measured), true))

    explained = float(np.mean([explained_variance(r.values, reward_to_go(r.rewards, r.response_mask, 1.0), r.response_mask)
                               for r in measured]))
    true = gradients("baseline", reference)
    progress = Progress(name, len(LADDER), plain_lines=len(LADDER))
    for number, rung in enumerate(LADDER):
        rows.get(f"{name}: {rung}", functools.partial(row_of, rung))
        progress.show(number + 1, rung)


def main(config: VarianceConfig) -> str:
    """Measure what is missing; write variance.md, variance.png and values.png; return the page. Raises UserError."""
    config.check()
    settings = config.policy_config()
    world = load_environment(settings, None, torch.device("cpu"))
    mark = fingerprint(world.sampling.encoding)
    reward_model, _ = load_model(Path(config.reward_run) / "reward.pt", "reward", mark)
    policies, inputs = {"base": world.base}, [Path(config.reward_run) / name for name in ("base.pt", "reward.pt")]
    if config.policy_run:
        inputs.append(Path(config.policy_run) / "policy.pt")
        policies["half-trained"], _ = load_model(inputs[-1], "policy", mark)
    about = dict({k: v for k, v in vars(config).items() if k not in ("reward_run", "policy_run", "out")},
                 inputs=list(file_hashes(inputs).values()))  # wherever they lie
    rows = Rows(Path(config.out) / "rows.jsonl", about)
    for name, policy in policies.items():
        measure(name, policy, world, reward_model, rows, config)
    names = [f"{name}, {reward}" for name in policies for reward in Batch._fields]
    page = describe(names, rows.rows, vars(config))
    write_atomically(Path(config.out) / "variance.md", page.encode())
    print(f"\n{page}\nsaved {Path(config.out) / 'variance.md'}")
    save_picture(Path(config.out) / "variance.png", lambda axes: draw_variances(axes, names, rows.rows), ncols=2,
                 figsize=(9, 4.2), layout="constrained")
    value, _ = load_model(Path(config.out) / "value-base-score.pt", "value", mark)
    save_picture(Path(config.out) / "values.png", lambda axes: draw_values(axes, world, value), nrows=2, figsize=(8, 5.5),
                 layout="constrained")
    return page


if __name__ == "__main__":
    run_lab(main, VarianceConfig)
