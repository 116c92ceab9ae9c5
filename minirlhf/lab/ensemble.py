"""Several reward models as one reward function, for `train_policy.py --reward FILE.py:score`.

FILE.py, for example:

    from minirlhf.lab.ensemble import ensemble
    score = ensemble(["runs/A", "runs/B", "runs/C"], "min", base_run="runs/A")
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from minirlhf.config import PolicyConfig
from minirlhf.data.batches import PreferenceGroup
from minirlhf.data.prompts import encode_prompt
from minirlhf.data.tokenizer import fingerprint, pad_id
from minirlhf.evaluation.reward_model import group_scores
from minirlhf.model.loading import load_model
from minirlhf.rl.sampling import sample_responses
from minirlhf.rl.task import load_task

import numpy as np
import torch

# Coste et al. (2023, arXiv 2310.02743): mean and worst-case optimization
AGGREGATES = dict(mean=np.mean, min=np.min)


def ensemble(reward_runs: Sequence[str], aggregate: str, base_run: str,
             normalize_prompts: int = 512) -> Callable:
    """A function (prompts, responses) -> [B] mean or min of the models' normalized scores.

    aggregate: a name in AGGREGATES.
    base_run: the reward run whose base model becomes the policy. On its samples every model has
    mean 0 and standard deviation 1, so models of other sizes and other base models are comparable.
    The models read texts: a response has the ids that the tokenizer gives it.
    Raises UserError.
    """
    settings = PolicyConfig(reward_run=base_run, task="none")  # needs no ground truth
    task = load_task(settings, None, torch.device("cpu"))
    encoding = task.sampling.encoding
    length = task.sampling.max_response_length
    models = [load_model(Path(run) / "reward.pt", "reward", fingerprint(encoding))[0]
              for run in reward_runs]
    prompt_length = min(model.config.context for model in models) - length

    def scores(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """[models, B] before normalization."""
        groups = []
        for prompt, response in zip(prompts, responses):
            ids = (*encoding.encode_ordinary(response), encoding.eot_token)[:length]
            groups.append(PreferenceGroup(encode_prompt(encoding, prompt, prompt_length)[0],
                                          (ids,), ()))
        return np.stack([np.concatenate(group_scores(model, groups, pad_id(encoding)))
                         for model in models])

    first = task.train.first(normalize_prompts)
    samples = sample_responses(task.base, first, task.sampling, "ensemble", 0,
                               list(range(len(first.texts))))
    base_scores = scores(samples.prompts, samples.responses)
    mean = base_scores.mean(1, keepdims=True)
    deviation = base_scores.std(1, keepdims=True)
    deviation[deviation == 0] = 1.0

    def score(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        return AGGREGATES[aggregate]((scores(prompts, responses) - mean) / deviation, axis=0)
    return score
