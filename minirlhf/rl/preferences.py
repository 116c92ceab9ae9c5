"""One optimizer step's gradient on preference pairs, the same for the reward model and for DPO."""

import math
from collections.abc import Callable, Sequence

from minirlhf.data.batches import PreferenceBatch, PreferenceGroup
from minirlhf.rl.losses import preference_loss
from minirlhf.run.errors import check_finite
from minirlhf.run.parallel import all_reduce_sum, micro_batches

import torch
from torch import Tensor


def accumulate_gradient(learner, groups: list[PreferenceGroup], micro_batch_size: int,
                        loss_of: Callable[[Sequence[PreferenceGroup], float], tuple[Tensor, dict]],
                        ) -> dict[str, float]:
    """Backward passes over a batch of groups, in micro-batches. Returns its metrics.

    loss_of: from (some of the groups, the weight of all pairs of the batch) to (their share of the
    loss, their shares of the metrics). So micro-batches add up to the batch.
    """
    total_weight = sum(weight for group in groups for *_, weight in group.pairs)
    sums: dict[str, Tensor] = {}
    for micro_batch in micro_batches(groups, micro_batch_size, learner):
        # A process without a pair makes a pass too, because the others wait; loss / inf = 0.
        divisor = total_weight if micro_batch else math.inf
        with learner.autocast():
            loss, metrics = loss_of(micro_batch or groups[:1], divisor)
        loss.backward()
        sums = {key: value + sums.get(key, 0.0) for key, value in metrics.items()}
    row = {key: all_reduce_sum(value).item() for key, value in sums.items()}
    check_finite(row["loss"], "loss")
    return row


def batch_preference_loss(scores: Tensor, batch: PreferenceBatch, total_weight: float,
                          centering: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of a micro-batch whose N sequences have these scores [N].

    The preference loss of its pairs, times their share of total_weight. A tie is half correct.
    """
    chosen = scores[batch.chosen]
    rejected = scores[batch.rejected]
    share = batch.weight.sum() / total_weight
    loss = share * preference_loss(chosen, rejected, batch.margin, centering, batch.weight)
    correct = torch.where(chosen == rejected, 0.5, (chosen > rejected).float())
    accuracy = (correct * batch.weight).sum() / total_weight
    return loss, dict(loss=loss.detach(), accuracy=accuracy)
