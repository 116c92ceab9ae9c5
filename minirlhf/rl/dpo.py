"""Direct preference optimization (DPO): a policy learns from pairs, without a reward model.

(Rafailov et al. 2023.) Pairs, batches and loss are those of the reward model. But the utility of a
response does not come from a reward head. It is computed from the policy's own log-probs:

    u(x, y) = beta (log pi(y | x) - log pi_ref(y | x))
"""

from collections.abc import Callable, Sequence

from minirlhf.config import PolicyConfig
from minirlhf.data.batches import (
    PreferenceBatch,
    PreferenceGroup,
    batch_schedule,
    collate_preferences,
)
from minirlhf.data.tokenizer import pad_id
from minirlhf.kernels import token_logprobs
from minirlhf.model import Transformer
from minirlhf.rl.preferences import accumulate_gradient, batch_preference_loss
from minirlhf.rl.task import Task
from minirlhf.run.optimizer import step_optimizer, warmup_then_decay
from minirlhf.run.run import Run

import torch
from torch import Tensor


def train_dpo(run: Run, policy: Transformer, learner, optimizer: torch.optim.Optimizer, task: Task,
              evaluate: Callable[[], dict]) -> None:
    """The loop of `--algorithm dpo`: nothing is sampled or scored, except in evaluations.

    An iteration has batch_size prompts with all their pairs, and an optimizer step minibatch_size.
    """
    config = run.config
    pad = pad_id(task.sampling.encoding)
    batch_of = batch_schedule([max(map(len, group.responses)) for group in task.pairs],
                              config.minibatch_size, config.seed)
    steps = -(-config.batch_size // config.minibatch_size)  # optimizer steps in an iteration
    for iteration in run.steps():
        rows = []
        for step in range(iteration * steps, (iteration + 1) * steps):
            batch = [task.pairs[i] for i in batch_of(step)]
            run.batch = dict(groups=batch)  # saved to disk if a UserError ends this step
            row = accumulate_gradient(
                learner, batch, config.micro_batch_size,
                lambda groups, total: dpo_loss(learner, task.base, groups, pad, config, total))
            fraction = warmup_then_decay(step, run.total * steps) if config.lr_decay else 1.0
            row["lr"] = config.lr * fraction
            row["grad_norm"] = step_optimizer(policy, optimizer, row["lr"], config.max_grad_norm)
            rows.append(row)
        metrics = {key: sum(row[key] for row in rows) / steps for key in rows[0]}
        run.timed("update")
        if run.due(config.eval_every):
            metrics |= evaluate()
            run.timed("evaluate")
        run.log(metrics, f"loss {metrics['loss']:.3f}  accuracy {metrics['accuracy']:.0%}")
        run.save(policy, optimizer, {})


def dpo_loss(policy: Transformer, reference: Transformer, groups: Sequence[PreferenceGroup],
             pad: int, config: PolicyConfig, total_weight: float,
             ) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of a micro-batch: -log sigmoid(u_w - u_l), a weighted mean over pairs.

    (Rafailov et al. 2023, eq. 7.) total_weight: of all pairs of the batch, so that micro-batches
    add up.
    """
    batch = collate_preferences(list(groups), pad, reference.wte.weight.device)
    prompt_lengths = torch.tensor([len(group.prompt) for group in groups for _ in group.responses])
    logprobs = response_logprobs(policy, batch, prompt_lengths, config.temperature)
    with torch.no_grad():
        ref_logprobs = response_logprobs(reference, batch, prompt_lengths, config.temperature)
    return batch_preference_loss(config.dpo_beta * (logprobs - ref_logprobs), batch, total_weight)


def response_logprobs(model: Transformer, batch: PreferenceBatch, prompt_lengths: Tensor,
                      temperature: float) -> Tensor:
    """[N] log pi(y | x) in nats: the sum over the tokens of the response, EOS included."""
    hidden = model(batch.ids[:, :-1], batch.attention_mask[:, :-1])
    in_response = torch.arange(1, batch.ids.shape[1]) >= prompt_lengths[:, None]
    is_action = batch.attention_mask[:, 1:] & in_response.to(hidden.device)
    logprobs = token_logprobs(hidden[is_action], model.lm_table, batch.ids[:, 1:][is_action],
                              temperature, vocab_size=model.config.vocab_size)
    return logprobs.new_zeros(is_action.shape).masked_scatter(is_action, logprobs).sum(1)
