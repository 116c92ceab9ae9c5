"""How good is a reward model? Against preferences it never saw, and against the truth where somebody knows it."""

import math
from types import ModuleType

import numpy as np
import tiktoken
import torch

from minirlhf.data import PreferenceGroup, encode_prompts, pad_right
from minirlhf.model import Transformer, sequence_scores
from minirlhf.seeding import derive_seed
from minirlhf.tokenizer import decode, pad_id


def interval(values: np.ndarray, weights: np.ndarray | None = None, resamples: int = 2000) -> tuple[float, float, float]:
    """(mean, low, high): weighted mean and its 95% bootstrap interval, resampling whole units (prompts).

    values: [n] one figure per prompt; weights: [n] how many pairs it stands for. Pairs of one prompt are not independent.
    """
    values = np.asarray(values, float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, float)
    draws = np.random.default_rng(derive_seed(0, "bootstrap")).integers(len(values), size=(resamples, len(values)))
    means = (values * weights)[draws].sum(1) / weights[draws].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float((values * weights).sum() / weights.sum()), float(low), float(high)


def standard_error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("inf")


@torch.no_grad()
def group_scores(model: Transformer, groups: list[PreferenceGroup], pad: int, device: torch.device) -> list[np.ndarray]:
    """The normalised score of every response of every group."""
    scores = []
    for start in range(0, len(groups), 8):  # of probes, 150 texts: as fast as more at once, and a sixth of the memory
        chunk = groups[start:start + 8]
        ids, mask = pad_right([group.prompt + response for group in chunk for response in group.responses], pad)
        flat = sequence_scores(model, ids.to(device), mask.to(device)).double().cpu().numpy()
        scores += np.split(flat, np.cumsum([len(group.responses) for group in chunk])[:-1])
    return scores


def evaluate_reward_model(model: Transformer, groups: list[PreferenceGroup], encoding: tiktoken.Encoding,
                          task: ModuleType | None, device: torch.device) -> dict:
    """Accuracy (ties count one half) with its interval, calibration, and, where the task knows the truth, the accuracy
    that the truth itself would reach (the ceiling) and the correlation of scores with gold."""
    scores = group_scores(model, groups, pad_id(encoding), device)
    gaps = [np.array([s[w] - s[l] for w, l, _, _ in g.pairs]) * model.score_scale.item() for g, s in zip(groups, scores)]
    weights = [np.array([weight for *_, weight in g.pairs]) for g in groups]
    right = [np.where(gap == 0, 0.5, gap > 0) for gap in gaps]
    per_group = np.array([np.average(r, weights=w) if w.sum() else 0.5 for r, w in zip(right, weights)])
    accuracy, low, high = interval(per_group, np.array([w.sum() for w in weights]))
    result = dict(accuracy=accuracy, accuracy_low=low, accuracy_high=high, pairs=sum(map(len, gaps)), prompts=len(groups),
                  loss=float(np.average(np.logaddexp(0, -np.concatenate(gaps)), weights=np.concatenate(weights))),
                  calibration_error=calibration_error(np.concatenate(gaps), np.concatenate(right)))
    if task and hasattr(task, "gold"):
        texts = [(decode(encoding, g.prompt), [decode(encoding, r) for r in g.responses]) for g in groups]
        gold = [task.gold(prompt, response) for prompt, responses in texts for response in responses]
        flat = np.concatenate(scores)
        result["gold_correlation"] = float(np.corrcoef(flat, gold)[0, 1]) if np.ptp(flat) > 0 and np.ptp(gold) > 0 else 0.0
    if task and hasattr(task, "preference_probability"):
        sure = [task.preference_probability(prompt, responses[w], responses[l])
                for (prompt, responses), g in zip(texts, groups) for w, l, _, _ in g.pairs]
        result["ceiling"] = float(np.mean([max(p, 1 - p) for p in sure]))
    return result


def calibration_error(gaps: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: |stated confidence - accuracy|, averaged over bins of confidence (Guo et al. 2017)."""
    confidence = 1 / (1 + np.exp(-np.abs(gaps)))
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return float(sum(abs(confidence[which == b].mean() - right[which == b].mean()) * np.mean(which == b)
                     for b in range(bins) if (which == b).any()))


def probe_table(model: Transformer, prompts: list[str], encoding: tiktoken.Encoding, task: ModuleType,
                max_prompt_length: int, max_response_length: int, device: torch.device) -> dict[str, tuple[float, int]]:
    """Per defect: the share of prompts on which the best response scores above the same with that one defect, and of how
    many. A defect beyond the maximum lengths cannot be seen, and counts as missed."""
    groups, defects = [], []
    for prompt, prompt_ids in zip(prompts, encode_prompts(prompts, encoding, max_prompt_length)[0]):
        probes = task.probes(prompt)
        texts = [task.best_response(prompt), *probes.values()]
        responses = tuple((*encoding.encode_ordinary(text), encoding.eot_token)[:max_response_length] for text in texts)
        groups.append(PreferenceGroup(tuple(prompt_ids), responses, ()))
        defects.append(list(probes))
    found: dict[str, list[bool]] = {}
    for names, scores in zip(defects, group_scores(model, groups, pad_id(encoding), device)):
        for name, score in zip(names, scores[1:]):
            found.setdefault(name, []).append(bool(scores[0] > score))
    return {name: (float(np.mean(hits)), len(hits)) for name, hits in sorted(found.items())}
