"""Train a language model as a policy against a reward model. `python train_policy.py --help`

Each iteration: sample responses -> score them, compute per-token rewards -> estimate advantages
-> update the policy -> log, evaluate, save.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from types import ModuleType

from minirlhf.config import PolicyConfig
from minirlhf.data.prompts import Prompts, prompts_of_step
from minirlhf.data.tokenizer import fingerprint
from minirlhf.evaluation.policy import DECODINGS, EvalResult, Evaluator, final_evaluation
from minirlhf.model import Transformer
from minirlhf.model.loading import save_model
from minirlhf.rl.advantages import centered, reward_to_go
from minirlhf.rl.algorithms import (
    ALGORITHMS,
    Algorithm,
    estimate_advantages,
    explained_variance,
    minibatch_loss,
    pick_algorithm,
    responses_per_prompt,
)
from minirlhf.rl.dpo import train_dpo
from minirlhf.rl.losses import kl_k1, masked_mean
from minirlhf.rl.reward import score
from minirlhf.rl.rollout import Rollout, adapt_kl_coef, measure, token_rewards
from minirlhf.rl.sampling import gold_utility, sample
from minirlhf.rl.task import Task, load_task, pick_reward_run
from minirlhf.run.command_line import run_script
from minirlhf.run.device import check_processes, pick_device, prepare_training
from minirlhf.run.errors import UserError, check_finite
from minirlhf.run.files import write_atomically
from minirlhf.run.metrics import rounded
from minirlhf.run.optimizer import make_optimizer, step_optimizer
from minirlhf.run.parallel import all_reduce_sum, is_main, micro_batches, unsharded
from minirlhf.run.run import Run
from minirlhf.run.seeding import generator
from minirlhf.run.terminal import echo

import torch
from torch import Tensor


def main(config: PolicyConfig, reward_function: Callable | None = None) -> dict:
    """Train and save policy.pt; returns the metrics of the final table. Raises UserError.

    reward_function: (prompts, responses) -> one number each, instead of the reward model.
    """
    config.check()
    algorithm = pick_algorithm(config)
    device = pick_device(config.device, config.deterministic, config.bf16)
    smallest = min(map(len, minibatches(config, 0))) if algorithm else config.minibatch_size
    check_processes(config, device, smallest, "the smallest minibatch")
    with Run(config, "train_policy.py") as run:
        # store the choice, so that a resumed run uses the same one
        reward_run = str(pick_reward_run(config))
        run.config = config = dataclasses.replace(config, reward_run=reward_run)
        task = load_task(config, reward_function, device)
        name = f"{config.algorithm}-{task.name}-seed{config.seed}"
        run.open(name, task.facts, {"policy": config.iterations})
        echo(f"run folder: {run.folder}   device: {device}   algorithm: {config.algorithm}   "
             f"reward: {task.reward.name}")

        reference = task.base
        policy = copy.deepcopy(reference).requires_grad_(True)
        reference.freeze_matrices()
        learns_value = algorithm is not None and algorithm.learns_value
        heads = ["lm_head", "value_head"] if learns_value else ["lm_head"]
        # the policy, or its DistributedDataParallel wrapper (several processes without --shard)
        learner = prepare_training(policy, config, device, heads)
        optimizer = make_optimizer(policy, config.lr, value_lr_scale=config.value_lr_scale)
        state = run.resume("policy", policy, optimizer, label="iteration",
                           plain_lines=config.iterations)
        kl_coef = state.get("kl_coef", config.kl_coef)
        evaluator = make_evaluator(task, config)
        if evaluator and not run.done:
            base_row = evaluation_row(evaluator, evaluator.base)
            run.metrics.write(dict(step=0, samples=0) | base_row)

        if algorithm is None:  # dpo has no rollouts, and so a loop of its own
            train_dpo(run, policy, learner, optimizer, task, lambda: evaluate(evaluator, policy))
            return finish(task, policy, run)

        for step in run.steps():
            # 1. Sample a response to each prompt.
            prompts = next_prompts(task.train, algorithm, config, step)
            samples = sample(policy, prompts, task.sampling, step)
            run.timed("sample")

            # 2. Score the responses and compute per-token rewards:
            #    the KL penalty, plus the score on the last token.
            run.batch = dict(samples=samples)  # saved to disk if a UserError ends this step
            scores = score(task.reward, samples)
            logprobs, values = measure(policy, samples, config)
            ref_logprobs, _ = measure(reference, samples, config)
            reward_kl_coef = kl_coef if algorithm.kl_in_reward else 0.0
            rewards = token_rewards(scores, logprobs, ref_logprobs, samples.response_mask,
                                    reward_kl_coef)
            rollout = Rollout(samples, logprobs, ref_logprobs, values, scores, rewards, kl_coef)
            run.timed("score")

            # 3. Estimate the advantage of each action.
            rollout = estimate_advantages(algorithm, rollout, config)

            # 4. Update the policy: one optimizer step, or one per minibatch for several epochs.
            run.batch |= dict(rollout=rollout, minibatches=list(minibatches(config, step)))
            metrics = update(learner, optimizer, rollout, config, step,
                             task.sampling.max_response_length)
            run.batch = None
            run.timed("update")

            # 5. Log, evaluate, save.
            metrics |= describe(rollout, task.ground_truth, config.gamma)
            metrics |= dict(samples=(step + 1) * config.batch_size, kl_coef=kl_coef)
            kl_coef = adapt_kl_coef(kl_coef, metrics["kl"], config)
            if run.due(config.eval_every):
                metrics |= evaluate(evaluator, policy)
                run.timed("evaluate")
            run.log(metrics, progress_text(metrics))
            check_kl(metrics["kl"], config, step)
            run.save(policy, optimizer, dict(kl_coef=kl_coef))
        return finish(task, policy, run)


# ---- sampling and updating -----------------------------------------------------------------------


def next_prompts(prompts: Prompts, algorithm: Algorithm, config: PolicyConfig,
                 step: int) -> Prompts:
    """The prompts of one iteration; grouped algorithms get each prompt several times."""
    copies = responses_per_prompt(algorithm, config)
    return prompts_of_step(prompts, config.batch_size // copies, copies, config.seed, step)


def minibatches(config: PolicyConfig, step: int) -> Iterator[Tensor]:
    """The row numbers of each optimizer step on a rollout.

    All rows at once, or, if the algorithm reuses its rollout, epochs of shuffled minibatches.
    """
    count = config.batch_size
    reuses_rollout = ALGORITHMS[config.algorithm].reuses_rollout
    epochs = config.ppo_epochs if reuses_rollout else 1
    size = config.minibatch_size if reuses_rollout else count
    for epoch in range(epochs):
        order = torch.arange(count)
        if size < count:
            shuffle = generator(config.seed, "minibatches", step, epoch)
            order = torch.randperm(count, generator=shuffle)
        for minibatch in order.split(size):
            yield minibatch.sort().values  # rows with the same prompt side by side: see packing.py


def update(policy: Transformer, optimizer: torch.optim.Optimizer, rollout: Rollout,
           config: PolicyConfig, step: int, max_response_length: int) -> dict:
    """All optimizer steps on one rollout.

    Returns metrics: means over all tokens used, and loss and gradient norm as means over the
    optimizer steps. The gradient of a minibatch does not depend on how it is split into
    micro-batches or over processes.
    """
    check_rollout(rollout)
    lr = config.lr * (1.0 - step / config.iterations) if config.lr_decay else config.lr
    device = rollout.rewards.device
    lengths = rollout.mask.sum(1).cpu()
    sums: dict[str, Tensor] = {}
    losses, norms = [], []
    tokens_used = 0
    for number, minibatch in enumerate(minibatches(config, step), start=1):
        tokens = int(lengths[minibatch].sum())
        denominator = len(minibatch) * max_response_length
        total = torch.zeros((), device=device)  # stays on the device: .item() would wait for it
        for rows in micro_batches(minibatch, config.micro_batch_size, policy):
            with policy.autocast():
                loss, metrics = minibatch_loss(policy, rollout.rows(rows), config, denominator,
                                               tokens)
            loss.backward()
            total = total + loss.detach()
            sums = {key: value + sums.get(key, 0.0) for key, value in metrics.items()}
        losses.append(all_reduce_sum(total).item())
        check_finite(losses[-1], f"loss of minibatch {number}")
        norms.append(step_optimizer(policy, optimizer, lr, config.max_grad_norm,
                                    f" of minibatch {number}"))
        tokens_used += tokens
    means = {key: all_reduce_sum(value).item() / tokens_used for key, value in sums.items()}
    return means | dict(loss=sum(losses) / len(losses), grad_norm=sum(norms) / len(norms), lr=lr)


def check_rollout(rollout: Rollout) -> None:
    """Raise UserError if scores, log-probs, values or advantages are not finite."""
    check_finite(float(rollout.scores.sum()), "sum of the scores")
    for name in ("logprobs", "ref_logprobs", "values", "advantages"):
        mean = masked_mean(getattr(rollout, name), rollout.mask)
        check_finite(float(mean), f"mean of the {name}")


# ---- logging and evaluation ----------------------------------------------------------------------


def describe(rollout: Rollout, ground_truth: ModuleType | None, gamma: float) -> dict[str, float]:
    """Metrics of a rollout. kl and total_reward: sums over tokens, means over responses.

    explained_variance is that of the rewards actually received, for every algorithm. The targets
    of V contain V itself if lam < 1, so agreeing with them proves little.
    """
    mask = rollout.mask
    received = reward_to_go(rollout.rewards, mask, gamma)
    kl = torch.where(mask, kl_k1(rollout.logprobs, rollout.ref_logprobs), 0.0).sum(1)
    finished = rollout.samples.finished
    row: dict[str, Tensor | float] = dict(
        score=rollout.scores.mean(),
        score_std=centered(rollout.scores).std(correction=0),
        kl=kl.mean(),
        total_reward=torch.where(mask, rollout.rewards, 0.0).sum(1).mean(),
        return_mean=masked_mean(rollout.returns, mask),
        return_std=centered(rollout.returns[mask]).std(correction=0),
        explained_variance=explained_variance(rollout.values, received, mask),
        length=mask.sum(1).float().mean(),
        tokens=mask.sum(),
        eos_rate=sum(finished) / len(finished))
    if gold := gold_utility(rollout.samples, ground_truth):
        row["gold"] = sum(gold) / len(gold)
    return {key: float(value) for key, value in row.items()}


def progress_text(metrics: dict) -> str:
    gold = f"  gold {metrics['gold']:+.2f}" if "gold" in metrics else ""
    return (f"score {metrics['score']:+.2f}{gold}  kl {metrics['kl']:.1f}  "
            f"length {metrics['length']:.0f}")


def check_kl(kl: float, config: PolicyConfig, step: int) -> None:
    """Raise UserError if the policy is too far from the reference to be useful."""
    if kl > config.max_kl:
        raise UserError(f"iteration {step + 1}: the KL of {kl:.0f} nats exceeds --max-kl "
                        f"{config.max_kl:g}; raise --kl-coef or lower --lr "
                        "(or raise --max-kl to continue anyway)")


def make_evaluator(task: Task, config: PolicyConfig) -> Evaluator | None:
    """An evaluator in the main process. In the others None; they wait."""
    if not is_main():
        return None
    return Evaluator(task, task.heldout.first(config.eval_prompts), "evaluate")


def evaluate(evaluator: Evaluator | None, policy: Transformer) -> dict:
    """Metrics on the held-out prompts. Every process must call this."""
    full_policy = unsharded(policy)
    return evaluation_row(evaluator, evaluator.evaluate(full_policy)) if evaluator else {}


def evaluation_row(evaluator: Evaluator, results: dict[str, EvalResult]) -> dict:
    """An evaluation's metrics with the prefix eval_; prints the most important ones."""
    metrics = evaluator.metrics(results)
    for decoding in DECODINGS:
        names = [name for name in ("gold", "score", "kl", "win_rate")
                 if f"{decoding}_{name}" in metrics]
        text = "  ".join(f"{name} {metrics[f'{decoding}_{name}']:.2f}" for name in names)
        echo(f"  held-out, {decoding}: {text}")
    return {f"eval_{key}": value for key, value in metrics.items()}


def finish(task: Task, policy: Transformer, run: Run) -> dict:
    """Save policy.pt, samples.md and result.json; print the final table on the test prompts.

    Every process must call this. Returns the metrics of the table; {} if not the main process.
    """
    policy = unsharded(policy)
    if not is_main():
        return {}
    facts = dict(tokenizer=fingerprint(task.sampling.encoding), run=run.id)
    save_model(run.folder / "policy.pt", "policy", policy, facts)
    task = task._replace(test=task.test.first(run.config.test_prompts))
    metrics, table, page = final_evaluation(task, policy, run.config.best_of_n)
    write_atomically(run.folder / "samples.md", page.encode())
    result = json.dumps(rounded(metrics), indent=1) + "\n"
    write_atomically(run.folder / "result.json", result.encode())
    echo(f"\n{page}\n{table}\n"
         f"saved {run.folder / 'policy.pt'}, samples.md, result.json and policy_metrics.jsonl")
    if metrics["sampled_kl"] > run.config.max_kl:
        echo(f"warning: the KL exceeds --max-kl {run.config.max_kl:g}: try a lower --lr")
    return metrics


if __name__ == "__main__":
    run_script(main, PolicyConfig)
