"""Measure the gradient of each algorithm over many batches: its norm, its bias, its variance.

`python -m minirlhf.lab.variance --help`

All algorithms use the same batches, so that their variances can be compared in pairs. Measured is
the gradient of the training loss (`estimate_advantages`, `minibatch_loss`), on-policy and without
whitening, which would change the units. V is a separate model, fitted on other samples.
Four settings: the base model or a half-trained policy, times two rewards: the reward model's score
on the last token, or the change of gold utility at the end of each sentence.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from minirlhf.config import TASK_AGAIN, PolicyConfig
from minirlhf.data.prompts import prompts_of_step
from minirlhf.data.splits import file_hash
from minirlhf.data.tokenizer import decode, fingerprint
from minirlhf.lab.common import Rows, lab_folder, need_files, run_lab, save_picture
from minirlhf.lab.variance_page import describe, draw_values, draw_variances
from minirlhf.model import Transformer
from minirlhf.model.loading import load_model, save_model
from minirlhf.rl.advantages import reward_to_go
from minirlhf.rl.algorithms import (
    ALGORITHMS,
    estimate_advantages,
    explained_variance,
    minibatch_loss,
)
from minirlhf.rl.losses import value_loss
from minirlhf.rl.reward import score_responses
from minirlhf.rl.rollout import Rollout, evaluate_actions, measure, token_rewards
from minirlhf.rl.sampling import Samples, gold_utility, sample_responses
from minirlhf.rl.task import Task, load_task
from minirlhf.run.checkpoint import read_seal
from minirlhf.run.command_line import check_ranges, setting
from minirlhf.run.errors import UserError
from minirlhf.run.files import read_file, write_atomically
from minirlhf.run.optimizer import make_optimizer, step_optimizer, warmup_then_decay
from minirlhf.run.seeding import derive_seed
from minirlhf.run.terminal import Progress, echo, shell_command

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class VarianceConfig:
    """Norm, bias, variance and signal-to-noise ratio of each algorithm's gradient."""

    reward_run: str = setting("", "folder of a finished run of train_reward.py")
    task: str = setting("", TASK_AGAIN)
    policy_run: str = setting(
        "", "folder of a half-trained policy (train_policy.py --iterations 20); empty: the base "
            "model only")
    out: str = setting("runs/variance", "folder of variance.md, rows.jsonl and the pictures")
    batches: int = setting(64, "independent batches to measure variances on", 3)
    reference_batches: int = setting(
        128, "other batches, whose mean gradient is used as the true one", 3)
    value_batches: int = setting(96, "further batches, on which V is fitted", 1)
    batch_size: int = setting(64, "responses in a batch", 1)
    group_size: int = setting(
        4, "responses to each prompt, for rloo and grpo; all algorithms use the same batches", 2)
    kl_coef: float = setting(PolicyConfig.kl_coef, "as in training", 0)
    lam: float = setting(PolicyConfig.lam, "as in training", 0, 1)
    value_lr: float = setting(1e-3, "peak learning rate of V; that of the reward model", 0)
    seed: int = setting(0, "of prompts and samples", 0)

    def check(self) -> None:
        check_ranges(self)
        if not self.reward_run:
            raise UserError("--reward-run is missing: name the folder of a finished run of "
                            "train_reward.py")
        if self.batch_size % self.group_size:
            raise UserError(f"--batch-size {self.batch_size} is not a multiple of "
                            f"--group-size {self.group_size}")
        folder = Path(self.reward_run)
        need_files(folder, ("config.json", "base.pt", "reward.pt"),
                   f"python train_reward.py {shell_command(['--out', str(folder)])}")
        if self.policy_run:
            policy_folder = Path(self.policy_run)
            need_files(policy_folder, ("config.json", "policy.pt"),
                       "python train_policy.py --iterations 20 " + shell_command(
                           ["--reward-run", str(folder), "--out", str(policy_folder)]))
            text = read_file(policy_folder / "config.json")
            seal = read_seal(folder / "base.pt")
            if seal not in str(json.loads(text)["facts"]):
                raise UserError(f"{policy_folder}: was not trained from {folder / 'base.pt'}; "
                                "name the reward run that it was trained from")

    def policy_config(self) -> PolicyConfig:
        return PolicyConfig(reward_run=self.reward_run, task=self.task, batch_size=self.batch_size,
                            group_size=self.group_size, kl_coef=self.kl_coef, lam=self.lam,
                            vf_coef=0.0, ent_coef=0.0, whiten="off", seed=self.seed)


# ---- batches -------------------------------------------------------------------------------------


def dense_rewards(samples: Samples, task: Task) -> Tensor:
    """[B, R] the change of gold utility at each sentence's last token; the rest at the last token.

    The sum over a response is its gold utility, up to rounding: the same task, rewarded earlier.
    """
    rewards = torch.zeros(samples.response_mask.shape, dtype=torch.float64)
    gold = gold_utility(samples, task.ground_truth)
    for row, (prompt, utility) in enumerate(zip(samples.prompts, gold)):
        ids = samples.response_ids[row][samples.response_mask[row]].tolist()
        paid = 0.0
        for t in range(len(ids) - 1):
            text = decode(task.sampling.encoding, ids[: t + 1])
            if text.endswith((".", "?", "!")):
                rewards[row, t] = task.ground_truth.gold(prompt, text, True) - paid
                paid += rewards[row, t].item()
        rewards[row, len(ids) - 1] = utility - paid
    return rewards.float()


class Batch(NamedTuple):
    """The same responses with two rewards."""

    score: Rollout  # the reward model's score, on the last token
    dense: Rollout  # gold utility, sentence by sentence


def collect(policy: Transformer, task: Task, purpose: str, count: int,
            config: PolicyConfig) -> list[Batch]:
    """Independent batches of the policy's responses, a function of the seed and the purpose."""
    batches = []
    progress = Progress(f"sampling, {purpose}", count, plain_lines=2)
    rows = list(range(config.batch_size))
    seed = derive_seed(config.seed, purpose)
    for step in range(count):
        prompts = prompts_of_step(task.train, config.batch_size // config.group_size,
                                  config.group_size, seed, step)
        samples = sample_responses(policy, prompts, task.sampling, purpose, step, rows)
        mask = samples.response_mask
        scores = score_responses(task.reward, samples)
        logprobs, values = measure(policy, samples, config)
        ref_logprobs, _ = measure(task.base, samples, config)
        rewards = token_rewards(scores, logprobs, ref_logprobs, mask, config.kl_coef)
        rollout = Rollout(samples, logprobs, ref_logprobs, values, scores, rewards, config.kl_coef)
        gold = dense_rewards(samples, task)
        penalty = token_rewards(0 * scores, logprobs, ref_logprobs, mask, config.kl_coef)
        dense = rollout._replace(scores=gold.sum(1), rewards=gold + penalty)
        batches.append(Batch(rollout, dense))
        progress.show(step + 1, "")
    return batches


def fit_value(start: Transformer, rollouts: list[Rollout], config: VarianceConfig) -> Transformer:
    """A copy of `start` whose value head predicts reward-to-go: two passes over the rollouts."""
    model = copy.deepcopy(start).requires_grad_(True)
    optimizer = make_optimizer(model, config.value_lr)
    total = 2 * len(rollouts)
    progress = Progress("fitting V", total, plain_lines=2)
    for step in range(total):
        r = rollouts[step % len(rollouts)]
        _, values, _ = evaluate_actions(model, r.samples, 1.0)
        returns = reward_to_go(r.rewards, r.mask, 1.0)
        loss = value_loss(values, values, returns, r.mask, 0.0, int(r.mask.sum()))
        loss.backward()
        lr = config.value_lr * warmup_then_decay(step, total)
        step_optimizer(model, optimizer, lr, 1.0)
        progress.show(step + 1, f"loss {loss.item():.3f}")
    return model.requires_grad_(False)


@torch.no_grad()
def with_values(model: Transformer, rollout: Rollout) -> Rollout:
    """The rollout with the values of another model."""
    _, values, _ = evaluate_actions(model, rollout.samples, 1.0)
    return rollout._replace(values=values)


# ---- gradients -----------------------------------------------------------------------------------


def gradient(policy: Transformer, rollout: Rollout, config: PolicyConfig,
             max_response_length: int) -> Tensor:
    """[D] the gradient of config.algorithm's loss on one batch; of the language model's weights."""
    weights = [weight for name, weight in policy.named_parameters()
               if not name.startswith(("value_head", "reward_head"))]
    rollout = estimate_advantages(ALGORITHMS[config.algorithm], rollout, config)
    denominator = len(rollout.scores) * max_response_length
    loss, _ = minibatch_loss(policy, rollout, config, denominator, int(rollout.mask.sum()))
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])


def gradient_metrics(gradients: Tensor, reference: Tensor, resamples: int = 1000) -> dict:
    """Metrics of N gradients [N, D], compared with R gradients [R, D] of an unbiased algorithm.

    signal |E g|^2 and bias |E g - E g_ref|^2 / |E g_ref|^2 are means over pairs of different
    batches, because the square of a mean would count noise as signal. Variance is the trace of the
    covariance. Intervals: bootstrap over batches, of both lists.
    """
    products = (gradients @ gradients.T).double().numpy()
    cross_products = (gradients @ reference.T).double().numpy()
    ref_products = (reference @ reference.T).double().numpy()
    random = np.random.default_rng(derive_seed(0, "bootstrap"))
    n = len(gradients)
    r = len(reference)
    # how often each draw uses each batch; the first draw is the original sample
    w = np.vstack([np.ones(n), random.multinomial(n, np.full(n, 1 / n), resamples)])
    v = np.vstack([np.ones(r), random.multinomial(r, np.full(r, 1 / r), resamples)])

    signal = mean_over_pairs(w, products)
    ref_signal = mean_over_pairs(v, ref_products)
    cross = ((w @ cross_products) * v).sum(1) / (n * r)
    variance = w @ np.diag(products) / n - signal
    draws_of = dict(
        signal_to_noise=signal / variance,
        bias=(signal - 2 * cross + ref_signal) / ref_signal,
        cosine=np.clip(cross / np.sqrt(np.maximum(signal * ref_signal, 1e-12)), -1, 1))
    row = {name: [float(draws[0]), *np.nanquantile(draws[1:], (0.025, 0.975)).tolist()]
           for name, draws in draws_of.items()}
    deviations = (gradients - gradients.mean(0)).double().pow(2).sum(1) * n / (n - 1)
    return row | dict(norm=float(gradients.norm(dim=1).mean()),
                      deviations=[float(f"{x:.7g}") for x in deviations])


def mean_over_pairs(weights: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Weighted mean of products over pairs of two different batches; NaN if there is no pair."""
    square = weights**2
    count = weights.sum(1) ** 2 - square.sum(1)
    total = ((weights @ products) * weights).sum(1) - square @ np.diag(products)
    return total / np.where(count, count, np.nan)


# ---- the lab -------------------------------------------------------------------------------------


def measure_policy(name: str, policy: Transformer, task: Task, reward_model: Transformer,
                   rows: Rows, config: VarianceConfig) -> None:
    """All results of one policy: both rewards, every algorithm. Samples only if one is missing."""
    settings = config.policy_config()
    if all(f"{name}, {reward}: {algorithm}" in rows.rows
           for reward in Batch._fields for algorithm in ALGORITHMS):
        return
    policy.requires_grad_(True)
    counts = dict(measured=config.batches, reference=config.reference_batches,
                  value=config.value_batches)
    batches = {purpose: collect(policy, task, f"{name}, {purpose}", count, settings)
               for purpose, count in counts.items()}
    tokenizer = fingerprint(task.sampling.encoding)
    for reward in Batch._fields:
        rollouts = {purpose: [getattr(batch, reward) for batch in of_purpose]
                    for purpose, of_purpose in batches.items()}
        path = Path(config.out) / f"value-{name}-{reward}.pt"
        if not path.exists():
            value = fit_value(reward_model, rollouts["value"], config)
            save_model(path, "value", value, dict(tokenizer=tokenizer))
        value, _ = load_model(path, "value", tokenizer)
        measured = [with_values(value, r) for r in rollouts["measured"]]
        reference = [with_values(value, r) for r in rollouts["reference"]]
        length = task.sampling.max_response_length
        measure_algorithms(f"{name}, {reward}", policy, measured, reference, length, rows, settings)


def measure_algorithms(name: str, policy: Transformer, measured: list[Rollout],
                       reference: list[Rollout], max_response_length: int, rows: Rows,
                       settings: PolicyConfig) -> None:
    """The result of every algorithm on the same batches."""
    def gradients(algorithm: str, rollouts: list[Rollout]) -> Tensor:
        config = dataclasses.replace(settings, algorithm=algorithm)
        return torch.stack([gradient(policy, r, config, max_response_length) for r in rollouts])

    explained = float(np.mean([
        explained_variance(r.values, reward_to_go(r.rewards, r.mask, 1.0), r.mask)
        for r in measured]))
    true = gradients("baseline", reference)

    def compute(algorithm: str) -> dict:
        return dict(explained=explained) | gradient_metrics(gradients(algorithm, measured), true)

    progress = Progress(name, len(ALGORITHMS), plain_lines=len(ALGORITHMS))
    for number, algorithm in enumerate(ALGORITHMS, start=1):
        rows.get(f"{name}: {algorithm}", lambda a=algorithm: compute(a))
        progress.show(number, algorithm)


def main(config: VarianceConfig) -> str:
    """Measure what is missing, write variance.md and the pictures; returns the page.

    Raises UserError.
    """
    config.check()
    out = lab_folder(config.out)
    task = load_task(config.policy_config(), None, torch.device("cpu"))
    tokenizer = fingerprint(task.sampling.encoding)
    inputs = [Path(config.reward_run) / name for name in ("base.pt", "reward.pt")]
    reward_model, _ = load_model(inputs[1], "reward", tokenizer)
    policies = {"base": task.base}
    if config.policy_run:
        inputs.append(Path(config.policy_run) / "policy.pt")
        policies["half-trained"], _ = load_model(inputs[-1], "policy", tokenizer)
    folders = ("reward_run", "policy_run", "out")  # may be moved; the contents of the inputs count
    about = {key: value for key, value in vars(config).items() if key not in folders}
    about["inputs"] = [file_hash(path) for path in inputs]
    rows = Rows(out / "rows.jsonl", about)
    for name, policy in policies.items():
        measure_policy(name, policy, task, reward_model, rows, config)
    names = [f"{name}, {reward}" for name in policies for reward in Batch._fields]
    page = describe(names, rows.rows, vars(config))
    write_atomically(out / "variance.md", page.encode())
    echo(f"\n{page}\nsaved {out / 'variance.md'}")
    save_picture(out / "variance.png", lambda axes: draw_variances(axes, names, rows.rows),
                 (9, 4.2), columns=2)
    value, _ = load_model(out / "value-base-score.pt", "value", tokenizer)
    save_picture(out / "values.png", lambda axes: draw_values(axes, task, value), (8, 5.5), rows=2)
    return page


if __name__ == "__main__":
    run_lab(main, VarianceConfig)
