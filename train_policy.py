"""Train a language model as a policy against a reward model. `python train_policy.py --help`

    prompts -> [1] responses -> [2] scores, log-probs, per-token rewards -> [3] advantages -> [4] one or more optimiser
    steps -> [5] a row of metrics, an evaluation now and then, a checkpoint -> again.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from minirlhf.checkpoint import newest_checkpoint, restore, save_model, save_step, write_atomically
from minirlhf.compare import Referee, closing_table
from minirlhf.config import PolicyConfig, UserError, run_script
from minirlhf.device import mixed_precision, pick_device, prepare_training
from minirlhf.environment import Environment, Samples, load_environment, newest_reward_run, next_prompts, sample_responses
from minirlhf.ladder import Rung, advantages_and_returns, explained_variance, minibatch_loss, pick_rung
from minirlhf.log import Metrics, Progress, rounded
from minirlhf.losses import kl_k1, masked_mean
from minirlhf.model import Transformer
from minirlhf.optim import make_optimizer, step_optimizer
from minirlhf.parallel import gathered, is_main, micro_batches, processes, share, summed, whole
from minirlhf.rollout import Rollout, adapt_kl_coef, collect_rollout, evaluate_actions
from minirlhf.run import Clock, StopSignal, batch_kept, check_finite, check_processes, due, open_run
from minirlhf.seeding import generator
from minirlhf.tokenizer import fingerprint


def main(config: PolicyConfig, reward_function: Callable | None = None) -> dict:
    """Train and save policy.pt; returns the closing table. reward_function(prompts, responses) -> one number each
    takes the reward model's place. Raises UserError."""
    config.check()
    rung, device, stop = pick_rung(config), pick_device(config.device, config.deterministic), StopSignal("train_policy.py")
    check_processes(config, device, min(map(len, minibatches(config, rung, 0, config.batch_size))), "the smallest minibatch")
    if not config.reward_run:  # named in config.json, so that a resumed run does not take up a newer one
        config = dataclasses.replace(config, reward_run=str(newest_reward_run(Path("runs"))))
    world = load_environment(config, reward_function, device)
    run = open_run(config, f"{config.algorithm}-{world.name}-seed{config.seed}", world.facts)
    stop.folder = run.folder
    print(f"run folder: {run.folder}   device: {device}   algorithm: {config.algorithm}   reward: {world.reward_name}")

    # The policy starts as a copy of the base model, which stays behind as the frozen reference.
    policy = copy.deepcopy(world.base).requires_grad_(True)
    learner = prepare_training(policy, config, device, ["value_head"] if rung.learns_value else [])
    optimizer = make_optimizer(policy, config.lr, value_lr_scale=config.value_lr_scale)
    found = newest_checkpoint(run.folder / "checkpoints", "policy", run.id)
    done, meta = restore(found, policy, optimizer), found[0] if found else {}
    kl_coef = meta.get("kl_coef", config.kl_coef)
    metrics = Metrics(run.folder / "policy_metrics.jsonl", meta.get("metrics"), config.tensorboard)
    referee = Referee(world, world.heldout.first(config.eval_prompts), "evaluate") if is_main() else None
    if done == 0 and referee:
        metrics.write(dict(step=0, samples=0, **evaluation(referee, referee.base)))
    progress = Progress("iteration", config.iterations, done, plain_lines=config.iterations)
    copies = config.group_size if rung.grouped else 1

    for step in stop.steps(done, config.iterations):
        clock = Clock()
        lr = config.lr * (1.0 - step / config.iterations) if config.lr_decay else config.lr

        # 1. Sample: prompts in, responses out.
        rows = share(list(range(config.batch_size)))  # all of them, where no other process takes its part
        prompts = next_prompts(world.train, config.batch_size // copies, copies, config.seed, step).rows(rows)
        with mixed_precision(device, config.bf16):
            samples = sample_responses(whole(policy), *prompts, world.sampling, "rollout", step, rows)
        clock.phase("sample")

        # 2. Score each response; what it cost in KL, and what each token earned.
        with batch_kept(run.folder, "policy", step + 1, samples._asdict()), mixed_precision(device, config.bf16):
            scores = world.scorer(samples)
            measured = learners_pass(learner, config, rung, samples[3:])
            rollout = collect_rollout(whole(policy), world.base, *samples[3:], scores, kl_coef if rung.kl_in_reward else 0.0,
                                      config.temperature, config.micro_batch_size, measured)
        samples, rollout = gathered(samples), gathered(rollout)
        clock.phase("score")

        # 3. How much better than expected was each action?
        advantages, returns = advantages_and_returns(rung, rollout, config)

        # 4. Make the better ones likelier.
        batch = samples._asdict() | rollout._asdict()
        batch |= dict(advantages=advantages, minibatches=minibatches(config, rung, step, config.batch_size))
        with batch_kept(run.folder, "policy", step + 1, batch):
            figures = update(learner, optimizer, rung, rollout, advantages, returns, config, kl_coef, lr,
                             world.sampling.max_response_length, step, measured)
        clock.phase("update")

        # 5. Tell, judge, save.
        row = describe_rollout(rollout, samples, returns, world) | figures | dict(kl_coef=kl_coef, lr=lr)
        if config.kl_target:
            kl_coef = adapt_kl_coef(kl_coef, row["kl"], config.kl_target, config.kl_horizon, config.batch_size)
        if due(step + 1, config.iterations, config.eval_every):
            actor = whole(policy)  # every process takes part
            row |= evaluation(referee, referee.judge(actor)) if referee else {}
            del actor  # where the policy is sharded, a copy as large as the model
            clock.phase("evaluate")
        metrics.write(dict(step=step + 1, samples=(step + 1) * config.batch_size, **row, **clock.phases,
                           tokens_per_second=row["tokens"] / clock.total()))
        gold = f"  gold {row['gold']:+.2f}" if "gold" in row else ""
        progress.show(step + 1, f"score {row['score']:+.2f}{gold}  kl {row['kl']:.1f}  length {row['length']:.0f}")
        if row["kl"] > config.max_kl:
            raise UserError(f"iteration {step + 1}: KL of {row['kl']:.0f} nats passed --max-kl {config.max_kl:g}; raise "
                            "--kl-coef or lower --lr (or raise --max-kl to watch the policy leave the language)")
        if stop.now() or due(step + 1, config.iterations, config.save_every):
            meta = dict(run=run.id, metrics=metrics.mark(), kl_coef=kl_coef)
            states = dict(model=policy.state_dict(), optimizer=optimizer.state_dict())
            save_step(run.folder / "checkpoints", "policy", step + 1, meta, states, config.keep_checkpoints)
    actor = whole(policy)  # every process takes part
    return finish(world, actor, config, run.folder) if is_main() else {}


def minibatches(config: PolicyConfig, rung: Rung, step: int, count: int) -> Iterator[Tensor]:
    """The rows of each optimiser step on a rollout of count responses: all at once, or, where the rung reuses the rollout,
    several epochs of shuffled minibatches."""
    epochs, size = (config.ppo_epochs, config.minibatch_size) if rung.reuses_rollout else (1, count)
    for epoch in range(epochs):
        order = torch.arange(count)
        if size < count:
            order = torch.randperm(count, generator=generator(config.seed, "minibatches", step, epoch))
        for minibatch in order.split(size):
            yield minibatch.sort().values  # siblings side by side share the work on their prompt


def learners_pass(learner: Transformer, config: PolicyConfig, rung: Rung,
                  sampled: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
    """evaluate_actions with its graph, where what was sampled serves for one step in one piece: the pass that measures it is
    then the learner's too. None where the weights will have moved, or the rows or the model are cut."""
    cut = 0 < config.micro_batch_size < len(sampled[0]) or processes() > 1 or config.shard
    once = not cut and len(list(minibatches(config, rung, 0, len(sampled[0])))) == 1
    return evaluate_actions(learner, *sampled, config.temperature, entropy=True) if once else None


def update(policy: Transformer, optimizer: torch.optim.Optimizer, rung: Rung, rollout: Rollout, advantages: Tensor,
           returns: Tensor, config: PolicyConfig, kl_coef: float, lr: float, max_response_length: int, step: int,
           measured: tuple[Tensor, Tensor, Tensor] | None = None) -> dict:
    """One optimiser step on the whole rollout, or, where the rung reuses it, one per minibatch for several epochs.

    The gradient of a minibatch is the same however it is cut, into micro-batches or over processes. measured: from
    learners_pass. Returns means over all tokens used.
    """
    check_finite(float(rollout.scores.sum()), "sum of the scores")
    for name in ("logprobs", "ref_logprobs", "values"):
        check_finite(float(masked_mean(getattr(rollout, name), rollout.response_mask)), f"mean of the {name}")
    lengths = rollout.response_mask.sum(1).cpu()
    sums: dict[str, Tensor] = {}
    tokens_used, norms, losses = 0, [], []
    for number, minibatch in enumerate(minibatches(config, rung, step, len(lengths)), start=1):
        tokens, denominator = int(lengths[minibatch].sum()), len(minibatch) * max_response_length
        total = torch.zeros((), device=advantages.device)  # summed there: reading a figure would make the device wait
        for rows in micro_batches(minibatch.to(advantages.device), config.micro_batch_size, policy):
            with mixed_precision(advantages.device, config.bf16):
                loss, figures = minibatch_loss(policy, rung, rollout.rows(rows), advantages[rows], returns[rows], config,
                                               kl_coef, denominator, tokens, measured)
            loss.backward()
            total = total + loss.detach()
            sums = {key: value.detach() + sums.get(key, 0.0) for key, value in figures.items()}
        losses.append(summed(total).item())
        check_finite(losses[-1], f"loss of minibatch {number}")
        norms.append(step_optimizer(policy, optimizer, lr, config.max_grad_norm, f" of minibatch {number}"))
        tokens_used += tokens
    return {key: summed(value).item() / tokens_used for key, value in sums.items()} | dict(
        loss=sum(losses) / len(losses), grad_norm=sum(norms) / len(norms),
        explained_variance=explained_variance(rollout.values, returns, rollout.response_mask))


def describe_rollout(rollout: Rollout, samples: Samples, returns: Tensor, world: Environment) -> dict:
    """What the policy did this time, before the update. kl and total_reward are means over responses of sums over tokens."""
    mask = rollout.response_mask
    kl = torch.where(mask, kl_k1(rollout.logprobs, rollout.ref_logprobs), 0.0).sum(1)
    row: dict[str, Tensor | float] = dict(
        score=rollout.scores.mean(), score_std=rollout.scores.std(correction=0), kl=kl.mean(),
        total_reward=torch.where(mask, rollout.rewards, 0.0).sum(1).mean(), return_mean=masked_mean(returns, mask),
        return_std=returns[mask].std(correction=0), length=mask.sum(1).float().mean(), tokens=mask.sum(),
        eos_rate=sum(samples.finished) / len(samples.finished))
    if gold := samples.gold(world.task):
        row["gold"] = sum(gold) / len(gold)
    return {key: float(value) for key, value in row.items()}


def evaluation(referee: Referee, judged: dict) -> dict:
    """The held-out figures of one evaluation, for the metrics row; the gist of them on the terminal."""
    figures = referee.figures(judged)
    for decoding in judged:
        gold = f"gold {figures[decoding + '_gold']:+.2f}  " if f"{decoding}_gold" in figures else ""
        print(f"  held-out, {decoding}: {gold}score {figures[decoding + '_score']:+.2f}  kl {figures[decoding + '_kl']:.1f}  "
              f"wins {figures[decoding + '_win_rate']:.0%} "
              f"[{figures[decoding + '_win_low']:.0%}, {figures[decoding + '_win_high']:.0%}]")
    return {f"eval_{key}": value for key, value in figures.items()}


def finish(world: Environment, policy: Transformer, config: PolicyConfig, folder: Path) -> dict:
    """Save policy.pt, then the closing table on the test prompts and eight samples of before and after."""
    save_model(folder / "policy.pt", "policy", policy, dict(tokenizer=fingerprint(world.sampling.encoding)))
    figures, table, page = closing_table(world._replace(test=world.test.first(config.test_prompts)), policy, config.best_of_n)
    write_atomically(folder / "samples.md", page.encode())
    write_atomically(folder / "result.json", (json.dumps(rounded(figures), indent=1) + "\n").encode())
    print(f"\n{page}\n{table}\nsaved {folder / 'policy.pt'}, samples.md, result.json and policy_metrics.jsonl beside it")
    return figures


if __name__ == "__main__":
    run_script(main, PolicyConfig)
