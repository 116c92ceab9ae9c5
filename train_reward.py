"""Warm up a base language model, then learn a reward model from preference pairs. `python train_reward.py --help`

    data -> encode -> [1] base.pt: next-token loss on every text -> [2] reward.pt: preference loss on every pair
         -> [3] scores normalised on the base model's own samples -> [4] what it learnt, on prompts it never saw
"""

import copy
import functools
import math

import torch

from minirlhf.checkpoint import newest_checkpoint, restore, save_model, save_step
from minirlhf.config import RewardConfig, run_script
from minirlhf.data import collate_preferences, describe_counts, encode_preferences, epoch_batches, pad_right, unique_prompts
from minirlhf.device import mixed_precision, pick_device, prepare_training
from minirlhf.environment import Sampling, encoded, model_scorer, sample_responses
from minirlhf.evaluate import evaluate_reward_model, probe_table
from minirlhf.kernels import token_logprobs
from minirlhf.log import Metrics, Progress
from minirlhf.losses import preference_loss
from minirlhf.model import in_full_precision, last_token_scores
from minirlhf.optim import make_optimizer, step_optimizer, trapezoid
from minirlhf.parallel import is_main, micro_batches, summed, whole
from minirlhf.run import Clock, StopSignal, batch_kept, check_finite, check_processes, due, open_run
from minirlhf.start import base_file, earlier_reward_model, starting_model
from minirlhf.task import file_hashes, load_splits, load_task
from minirlhf.tokenizer import fingerprint, load_tokenizer, pad_id


def language_model_loss(model, ids, mask):
    """Mean -log p(next token) in nats over every real token after the first, prompt and response alike: the reply has to
    copy from the prompt, and a model that has learnt to predict prompts has learnt to read them."""
    (hidden, table), targets = model(ids[:, :-1], mask[:, :-1], with_table=True), mask[:, 1:]
    return -token_logprobs(hidden[targets], table, ids[:, 1:][targets], vocab_size=model.config.vocab_size).mean()


def pair_loss(model, groups, pad, config, total_weight):
    """This micro-batch's share of a batch whose pairs weigh total_weight: (what to differentiate, figures to log).

    The score is the last token's, and the logged loss is its preference loss alone. Beside it every token gives a verdict of
    its own through the value head, and their sum is held to the same preferences: a slip in the third word then has a short
    way to the loss, and what the words are worth adds up. Only training hears of the verdicts.
    """
    batch = collate_preferences(groups, pad, model.wte.weight.device)
    hidden = model(batch.ids, batch.attention_mask)  # each response is read once, however many pairs it stands in
    scores = last_token_scores(model, hidden, batch.attention_mask)
    verdicts = torch.where(batch.attention_mask, in_full_precision(model.value_head, hidden), 0.0).sum(1)
    share = batch.weight.sum() / total_weight

    def loss_of(x, centering):
        return share * preference_loss(x[batch.chosen], x[batch.rejected], batch.margin, centering, batch.weight)

    chosen, rejected = scores[batch.chosen], scores[batch.rejected]
    right = torch.where(chosen == rejected, 0.5, (chosen > rejected).float())
    loss = loss_of(scores, config.centering)
    figures = dict(loss=loss.detach(), accuracy=(right * batch.weight).sum() / total_weight)
    return (loss + config.verdict_coef * loss_of(verdicts, 0.0) if config.verdict_coef else loss), figures


def batch_reader(lengths, batch_size, seed):
    """(steps per epoch, step -> indices): the batch is a function of the step alone, so a resumed run needs no position."""
    per_epoch = -(-len(lengths) // batch_size)
    epoch = functools.lru_cache(maxsize=1)(lambda number: epoch_batches(lengths, batch_size, seed, number))
    return per_epoch, lambda step: epoch(step // per_epoch)[step % per_epoch]


def train_stage(stage, model, heads, total, peak_lr, batch, backward, run, config, metrics, stop, found):
    """`total` optimiser steps, less those of the checkpoint found; backward(learner, batch(step)) adds up the gradient of
    one batch in the trunk and in these heads, and returns its figures, loss first."""
    learner = prepare_training(model, config, model.wte.weight.device, heads)
    optimizer = make_optimizer(model, peak_lr, config.weight_decay)
    done = restore(found, model, optimizer)
    progress = Progress(stage, total, done)
    for step in stop.steps(done, total):
        clock = Clock()
        lr, items = peak_lr * trapezoid(step, total), batch(step)
        with batch_kept(run.folder, stage, step + 1, items):
            figures = backward(learner, items)
            check_finite(figures["loss"], "loss")
            grad_norm = step_optimizer(model, optimizer, lr, config.max_grad_norm)
        metrics.write(dict(stage=stage, step=step + 1, **figures, grad_norm=grad_norm, lr=lr, seconds=clock.total()))
        progress.show(step + 1, f"loss {figures['loss']:.3f}")
        if stop.now() or due(step + 1, total, config.save_every):
            states = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
            meta = dict(run=run.id, metrics=metrics.mark())
            save_step(run.folder / "checkpoints", stage, step + 1, meta, states, config.keep_checkpoints)


def warmup_steps(config):
    """None for a base model brought along, unless --warmup-init asks for them."""
    brought = base_file(config) and not (config.init and config.warmup_init)
    return 0 if brought else -(-config.warmup_sequences // config.warmup_batch_size)


def warm_up(model, groups, run, config, pad, metrics, stop, found):
    """Stage 1: the base language model, "the average agent": every text, good and bad, as often as it comes."""
    texts = [group.prompt + response for group in groups for response in group.responses]
    _, batch = batch_reader([len(text) for text in texts], config.warmup_batch_size, config.seed)
    device = model.wte.weight.device

    def backward(learner, chosen):
        targets, total = sum(len(text) - 1 for text in chosen), torch.zeros((), device=device)
        for some in micro_batches(chosen, config.micro_batch_size, learner):
            ids, mask = (tensor.to(device) for tensor in pad_right(some or chosen[:1], pad))
            weight = sum(len(text) - 1 for text in some) / targets  # none for a process that no text is left for
            with mixed_precision(device, config.bf16):
                loss = weight * language_model_loss(learner, ids, mask)
            loss.backward()
            total += loss.detach()
        return dict(loss=summed(total).item())

    train_stage("warmup", model, [], warmup_steps(config), config.warmup_lr, lambda step: [texts[i] for i in batch(step)],
                backward, run, config, metrics, stop, found)


def learn_preferences(model, groups, run, config, pad, metrics, stop, found):
    """Stage 2: the reward model."""
    lengths = [max(map(len, group.responses)) for group in groups]
    per_epoch, batch = batch_reader(lengths, config.batch_size, config.seed)
    heads = ["reward_head", "value_head"] if config.verdict_coef else ["reward_head"]

    def backward(learner, chosen):
        total_weight = sum(weight for group in chosen for *_, weight in group.pairs)
        sums = dict(loss=0.0, accuracy=0.0)
        for some in micro_batches(chosen, config.micro_batch_size, learner):
            weight = total_weight if some else math.inf  # no pairs are left for this process: a pass that weighs nothing
            with mixed_precision(model.wte.weight.device, config.bf16):
                loss, figures = pair_loss(learner, some or chosen[:1], pad, config, weight)
            loss.backward()
            sums = {key: sums[key] + figures[key] for key in sums}
        return {key: summed(value).item() for key, value in sums.items()}

    train_stage("reward", model, heads, per_epoch * config.epochs, config.lr, lambda step: [groups[i] for i in batch(step)],
                backward, run, config, metrics, stop, found)


@torch.no_grad()
def normalise_scores(reward_model, base, prompts, sampling):
    """Stage 3: shift and scale scores so that the base model's own samples have mean 0 and deviation 1: the free constant
    of a preference loss is pinned, and kl_coef means the same whatever the reward model's temper."""
    scores = []
    for start in range(0, len(prompts.texts), 128):
        rows = list(range(start, min(start + 128, len(prompts.texts))))
        samples = sample_responses(base, *prompts.rows(rows), sampling, "normalise", 0, rows)
        scores.append(model_scorer(reward_model, 0.0)(samples))
    scores = torch.cat(scores)
    reward_model.score_shift.copy_(scores.mean())
    reward_model.score_scale.copy_(scores.std().clamp(min=1e-6))


def main(config: RewardConfig) -> dict:
    """Train and save base.pt and reward.pt; returns the test figures. Raises UserError."""
    config.check()
    device, stop = pick_device(config.device, config.deterministic), StopSignal("train_reward.py")
    check_processes(config, device, config.batch_size, "the prompts of --batch-size")
    encoding, task, splits = load_tokenizer(config.tokenizer), load_task(config), load_splits(config)
    pad = pad_id(encoding)
    groups = {}
    for name in ("train", "heldout", "test"):
        groups[name], counts = encode_preferences(getattr(splits, name), encoding, config.max_prompt_length,
                                                  config.max_response_length)
        print(f"{name}: {describe_counts(counts)}")
    if splits.bad_lines:
        print(f"skipped {splits.bad_lines} bad lines")

    base, earlier = starting_model(config, encoding).to(device), earlier_reward_model(config, encoding)
    inputs = splits.hashes | file_hashes(filter(None, [base_file(config), config.init_reward]))

    run = open_run(config, f"reward-{task.__name__.split('.')[-1] if task else 'data'}-seed{config.seed}", inputs)
    print(f"run folder: {run.folder}   device: {device}")
    base_path, facts = run.folder / "base.pt", dict(tokenizer=fingerprint(encoding))
    stop.folder = run.folder
    warmed, learnt = (newest_checkpoint(run.folder / "checkpoints", stage, run.id) for stage in ("warmup", "reward"))
    if (warmed[0]["step"] if warmed else 0) < warmup_steps(config):
        learnt = None  # its rows would stand before those of the warm-up that is done again
    latest = learnt or warmed
    metrics = Metrics(run.folder / "reward_metrics.jsonl", latest and latest[0].get("metrics"), config.tensorboard)

    # 1. The base language model: warmed up here, or brought along.
    if warmup_steps(config):
        print("warming up the base language model on the task's own text")
        warm_up(base, groups["train"], run, config, pad, metrics, stop, warmed)
    base = whole(base)
    if is_main():
        save_model(base_path, "base", base, facts)
    print(f"saved {base_path}")

    # 2. The reward model starts from the base model with a reward head of 0, or from an earlier reward model.
    reward_model = copy.deepcopy(base) if earlier is None else earlier.to(device)
    learn_preferences(reward_model, groups["train"], run, config, pad, metrics, stop, learnt)
    reward_model = whole(reward_model)
    if not is_main():
        return {}

    # 3. Scores in units of the base policy's own spread.
    prompts = encoded(unique_prompts(splits.train)[: config.normalise_prompts], encoding, config.max_prompt_length)
    normalise_scores(reward_model, base, prompts, Sampling(encoding, config.max_response_length, 1.0, config.seed))

    # 4. What it learnt.
    result = evaluate_reward_model(reward_model, groups["test"], encoding, task, device)
    if task and hasattr(task, "probes"):
        result["probes"] = probe_table(reward_model, unique_prompts(splits.test)[:256], encoding, task,
                                       config.max_prompt_length, config.max_response_length, device)
    save_model(run.folder / "reward.pt", "reward", reward_model, facts)
    metrics.write(dict(stage="test", step=1, **result))
    print(describe_reward_model(result))
    print(f"saved {run.folder / 'reward.pt'}; next: python train_policy.py --reward-run {run.folder}")
    return result


def describe_reward_model(result: dict) -> str:
    """The test figures, for the terminal."""
    lines = [f"held-out accuracy {result['accuracy']:.3f} [{result['accuracy_low']:.3f}, {result['accuracy_high']:.3f}] over "
             f"{result['pairs']} pairs of {result['prompts']} prompts, calibration error {result['calibration_error']:.3f}"]
    if "ceiling" in result:
        lines.append(f"a perfect annotator would reach {result['ceiling']:.3f}; correlation of scores with gold utility "
                     f"{result['gold_correlation']:.3f}")
    if "probes" in result:
        lines.append("the best response ranked above the same with one defect:")
        lines += [f"  {name:<20} {share:6.1%}  of {count}" for name, (share, count) in result["probes"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, RewardConfig)
