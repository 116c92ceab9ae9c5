"""Fine-tune a base language model, then train a reward model on preference pairs.

`python train_reward.py --help`

    1. base.pt: supervised fine-tuning, next-token loss on texts of the data
    2. reward.pt: preference loss on every pair
    3. scores are normalized on the base model's own samples
    4. evaluation on prompts that were never trained on
"""

import copy
import dataclasses
import time
from collections.abc import Sequence

from minirlhf.config import RewardConfig
from minirlhf.data.batches import (
    PreferenceGroup,
    batch_schedule,
    collate_preferences,
    describe_counts,
    encode_preferences,
    pad_right,
)
from minirlhf.data.prompts import Prompts, encode_prompts, unique_prompts, warn_of_shared_prompts
from minirlhf.data.splits import Splits, file_facts, load_ground_truth, load_splits
from minirlhf.data.tokenizer import fingerprint, load_tokenizer, pad_id
from minirlhf.evaluation.reward_model import evaluate_probes, evaluate_reward_model
from minirlhf.kernels import token_logprobs
from minirlhf.model import Transformer
from minirlhf.model.loading import (
    earlier_reward_model,
    initial_base_model,
    save_model,
    start_files,
    tokenizer_name,
)
from minirlhf.model.transformer import apply_head, last_token_scores
from minirlhf.rl.advantages import centered, in_float64
from minirlhf.rl.preferences import accumulate_gradient, batch_preference_loss
from minirlhf.rl.reward import Reward, score_responses
from minirlhf.rl.sampling import SamplingSettings, sample_responses
from minirlhf.run.checkpoint import read_seal
from minirlhf.run.command_line import run_script
from minirlhf.run.device import check_processes, pick_device, prepare_training
from minirlhf.run.errors import UserError, check_finite
from minirlhf.run.folder import module_flags
from minirlhf.run.optimizer import make_optimizer, step_optimizer, warmup_then_decay
from minirlhf.run.parallel import all_reduce_sum, is_main, micro_batches, unsharded
from minirlhf.run.run import Run
from minirlhf.run.terminal import echo, shell_command

import tiktoken
import torch
from torch import Tensor

# The random numbers are derived from this word; another spelling would change the samples.
NORMALIZATION = "normalise"


def main(config: RewardConfig) -> dict:
    """Train and save base.pt and reward.pt; returns the test metrics. Raises UserError."""
    config.check()
    device = pick_device(config.device, config.deterministic, config.bf16)
    check_processes(config, device, config.batch_size, "the prompts of --batch-size")
    config = dataclasses.replace(config, tokenizer=tokenizer_name(config))
    with Run(config, "train_reward.py") as run:
        echo("reading the data")
        encoding = load_tokenizer(config.tokenizer)
        splits = load_splits(config)
        ground_truth = load_ground_truth(config.task, splits)
        task_name = ground_truth.__name__ if ground_truth else "none"
        if config.task == "auto":  # store the choice for programs that do not read the data
            run.config = config = dataclasses.replace(config, task=task_name)
        train, test = encode_splits(splits, encoding, config)
        normalization_texts = unique_prompts(splits.train)[: config.normalize_prompts]
        if len(normalization_texts) < 2:
            raise UserError("the training data has only one prompt; give at least 2, because "
                            "scores are normalized on responses to several prompts")
        base = initial_base_model(config, encoding).to(device)
        earlier = earlier_reward_model(config, encoding)
        meta = dict(tokenizer=fingerprint(encoding))
        facts = splits.facts | file_facts({"initial model": start_files(config)})
        facts["tokenizer"] = f"{meta['tokenizer']}  {config.tokenizer}"
        stages = {"sft": sft_steps(config), "reward": reward_steps(train, config)}
        name = task_name.split(".")[-1] if ground_truth else "data"
        run.open(f"reward-{name}-seed{config.seed}", facts, stages)
        meta["run"] = run.id
        echo(f"run folder: {run.folder}   device: {device}")

        # 1. The base language model: fine-tuned here, or taken from a file.
        base.bf16 = config.bf16
        if sft_steps(config):
            finetune(base, train, pad_id(encoding), config, run)
        base = unsharded(base)
        if is_main():
            save_model(run.folder / "base.pt", "base", base, meta)
        echo(f"saved {run.folder / 'base.pt'}")

        flags = shell_command(["--reward-run", str(run.folder), *module_flags(config)])
        if not config.epochs:
            echo("no reward model, because of --epochs 0; next: python train_policy.py "
                 f"--algorithm dpo {flags}")
            return {}

        # 2. The reward model starts from the base model, or from an earlier reward model.
        reward_model = copy.deepcopy(base) if earlier is None else earlier.to(device)
        reward_model.bf16 = config.bf16
        learn_preferences(reward_model, train, pad_id(encoding), config, run)
        reward_model = unsharded(reward_model)
        if not is_main():
            return {}

        # 3. Normalize the scores: samples of the base model get mean 0, standard deviation 1.
        settings = SamplingSettings(encoding, config.max_response_length, 1.0, config.seed)
        prompts = encode_prompts(normalization_texts, encoding, config.max_prompt_length)
        normalize_scores(reward_model, base, prompts, settings)

        path = run.folder / "reward.pt"
        meta["base"] = read_seal(run.folder / "base.pt")
        save_model(path, "reward", reward_model, meta)  # an error in the evaluation loses nothing

        # 4. Evaluation.
        metrics = evaluate_reward_model(reward_model, test, encoding, ground_truth)
        probes = evaluate_probes(reward_model, unique_prompts(splits.test)[:256], encoding,
                                 ground_truth, config.max_prompt_length,
                                 config.max_response_length)
        metrics |= dict(probes=probes) if probes else {}
        run.metrics.write(dict(stage="test", step=1, finished=time.time_ns()) | metrics)
        echo(format_metrics(metrics))
        echo(f"saved {path}; next: python train_policy.py {flags}")
        return metrics


# ---- data ----------------------------------------------------------------------------------------


def encode_splits(splits: Splits, encoding: tiktoken.Encoding, config: RewardConfig,
                  ) -> tuple[list[PreferenceGroup], list[PreferenceGroup]]:
    """(train, test) as groups; prints what was kept, dropped and cut of all three splits."""
    groups = {}
    for name in ("train", "heldout", "test"):
        groups[name], counts = encode_preferences(
            getattr(splits, name), encoding, config.max_prompt_length, config.max_response_length)
        echo(f"{name}: {describe_counts(counts)}")
    if splits.test is splits.heldout:
        echo("the test pairs are the held-out pairs again: there is no --test-data")
    warn_of_shared_prompts(*([group.prompt for group in split] for split in groups.values()))
    if splits.bad_lines:
        echo(f"skipped {splits.bad_lines} bad lines")
    return groups["train"], groups["test"]


# ---- 1. supervised fine-tuning -------------------------------------------------------------------


def finetune(model: Transformer, groups: list[PreferenceGroup], pad: int, config: RewardConfig,
             run: Run) -> None:
    """Supervised fine-tuning on texts of the data, good and bad: --sft-sequences of them.

    A text is a prompt and a response. The model learns to write like an average author of the data.
    """
    texts = [group.prompt + response for group in groups for response in group.responses]
    echo("supervised fine-tuning of the base language model: "
         f"{config.sft_sequences / len(texts):.3g} passes over {len(texts):,} texts")
    device = model.wte.weight.device
    learner = prepare_training(model, config, device, heads=["lm_head"])
    optimizer = make_optimizer(model, config.sft_lr, config.weight_decay)
    run.resume("sft", model, optimizer)
    batch_of = batch_schedule(list(map(len, texts)), config.sft_batch_size, config.seed)

    for step in run.steps():
        batch = [texts[i] for i in batch_of(step)]
        run.batch = dict(texts=batch)  # saved to disk if a UserError ends this step
        targets = sum(len(text) - 1 for text in batch)
        total = torch.zeros((), device=device)
        for micro_batch in micro_batches(batch, config.micro_batch_size, learner):
            # A process without a text makes a pass of weight 0, because the others wait for it.
            ids, mask = (x.to(device) for x in pad_right(micro_batch or batch[:1], pad))
            weight = sum(len(text) - 1 for text in micro_batch) / targets
            with learner.autocast():
                loss = weight * language_model_loss(learner, ids, mask)
            loss.backward()
            total += loss.detach()
        row = dict(loss=all_reduce_sum(total).item())
        check_finite(row["loss"], "loss")
        lr = config.sft_lr * warmup_then_decay(step, run.total)
        grad_norm = step_optimizer(model, optimizer, lr, config.max_grad_norm)
        run.log(row | dict(grad_norm=grad_norm, lr=lr), f"loss {row['loss']:.3f}")
        run.save(model, optimizer, {})


def sft_steps(config: RewardConfig) -> int:
    """Steps of supervised fine-tuning; 0 with --init-reward, or with --init without --sft-init."""
    if config.init_reward or (config.init and not config.sft_init):
        return 0
    return -(-config.sft_sequences // config.sft_batch_size)


def language_model_loss(model: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of -log p(next token) in nats over every token but the first. ids, mask: [B, T].

    Prompts count too: the response copies words of the prompt, and a model that predicts prompts
    has useful features of them.
    """
    hidden = model(ids[:, :-1], mask[:, :-1])
    is_target = mask[:, 1:]
    logprobs = token_logprobs(hidden[is_target], model.lm_table, ids[:, 1:][is_target],
                              vocab_size=model.config.vocab_size)
    return -logprobs.mean()


# ---- 2. the reward model -------------------------------------------------------------------------


def learn_preferences(model: Transformer, groups: list[PreferenceGroup], pad: int,
                      config: RewardConfig, run: Run) -> None:
    """Train the reward model: the preference loss on every pair."""
    device = model.wte.weight.device
    heads = ["reward_head", "value_head"] if config.auxiliary_coef else ["reward_head"]
    learner = prepare_training(model, config, device, heads)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    run.resume("reward", model, optimizer)
    lengths = [max(map(len, group.responses)) for group in groups]
    batch_of = batch_schedule(lengths, config.batch_size, config.seed)

    for step in run.steps():
        batch = [groups[i] for i in batch_of(step)]
        run.batch = dict(groups=batch)  # saved to disk if a UserError ends this step
        row = accumulate_gradient(
            learner, batch, config.micro_batch_size,
            lambda groups, total: pair_loss(learner, groups, pad, config, total))
        lr = config.lr * warmup_then_decay(step, run.total)
        grad_norm = step_optimizer(model, optimizer, lr, config.max_grad_norm)
        run.log(row | dict(grad_norm=grad_norm, lr=lr), f"loss {row['loss']:.3f}")
        run.save(model, optimizer, {})


def reward_steps(groups: list[PreferenceGroup], config: RewardConfig) -> int:
    """Optimizer steps of the reward model."""
    return -(-len(groups) // config.batch_size) * config.epochs


def pair_loss(model: Transformer, groups: Sequence[PreferenceGroup], pad: int, config: RewardConfig,
              total_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss to differentiate, metrics to log) of a micro-batch.

    total_weight: of all pairs of the batch, so that micro-batches add up.

    The score is the reward head on the last token, and the logged loss is its preference loss.
    The auxiliary loss, off by default, is the same loss on another score: the value head on every
    token, summed. A wrong word then gets a direct gradient. This second score is used in training
    only.
    """
    batch = collate_preferences(list(groups), pad, model.wte.weight.device)
    hidden = model(batch.ids, batch.attention_mask)  # each response once, in any number of pairs
    scores = last_token_scores(model, hidden, batch.attention_mask)
    loss, metrics = batch_preference_loss(scores, batch, total_weight, config.centering)
    if config.auxiliary_coef:
        token_scores = apply_head(model.value_head, hidden)
        sums = torch.where(batch.attention_mask, token_scores, 0.0).sum(1)
        auxiliary, _ = batch_preference_loss(sums, batch, total_weight)
        loss = loss + config.auxiliary_coef * auxiliary
    return loss, metrics


# ---- 3. normalization ----------------------------------------------------------------------------


@torch.no_grad()
def normalize_scores(reward_model: Transformer, base: Transformer, prompts: Prompts,
                     settings: SamplingSettings) -> None:
    """Set shift and scale so that samples of the base model have mean 0, standard deviation 1.

    The preference loss does not change if a constant is added to all scores; this fixes the
    constant. It also gives kl_coef the same meaning for every reward model.
    """
    reward = Reward("normalize", reward_model, missing_eos_penalty=0.0)
    parts = []
    for start in range(0, len(prompts.texts), 128):
        rows = list(range(start, min(start + 128, len(prompts.texts))))
        samples = sample_responses(base, prompts.rows(rows), settings, NORMALIZATION, 0, rows)
        parts.append(score_responses(reward, samples))
    scores = torch.cat(parts)
    reward_model.score_shift.copy_(in_float64(scores).mean())  # exact if all scores are equal
    scale = centered(scores).std().float()
    reward_model.score_scale.copy_(torch.where(scale > 0, scale, 1.0))


# ---- 4. evaluation -------------------------------------------------------------------------------


def format_metrics(metrics: dict) -> str:
    """The test metrics as text."""
    lines = [f"test accuracy {metrics['accuracy']:.3f} "
             f"[{metrics['accuracy_low']:.3f}, {metrics['accuracy_high']:.3f}] over "
             f"{metrics['pairs']} pairs of {metrics['prompts']} prompts, "
             f"calibration error {metrics['calibration_error']:.3f}"]
    if "ceiling" in metrics:
        lines.append("a reward model equal to the gold utility would reach "
                     f"{metrics['ceiling']:.3f} on average, because the annotator makes errors")
    if "gold_correlation" in metrics:
        lines.append(f"correlation with gold utility {metrics['gold_correlation']:.3f}")
    if "probes" in metrics:
        lines.append("probes: the best response is ranked above the same response with one defect")
        lines += [f"  {name:<20} {share:6.1%}  of {count}"
                  for name, (share, count) in metrics["probes"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, RewardConfig)
