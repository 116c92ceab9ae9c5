"""Evaluation of a reward model: on unseen preferences, and on the ground truth if it is known."""

from types import ModuleType

import numpy as np
import tiktoken
import torch

from minirlhf.data.batches import PreferenceGroup, pad_right
from minirlhf.data.prompts import Prompts
from minirlhf.data.tokenizer import decode, pad_id
from minirlhf.evaluation.statistics import bootstrap_interval
from minirlhf.model import Transformer
from minirlhf.model.transformer import sequence_scores


@torch.no_grad()
def group_scores(model: Transformer, groups: list[PreferenceGroup], pad: int) -> list[np.ndarray]:
    """The normalized score of every response of every group."""
    device = model.wte.weight.device
    scores = []
    for start in range(0, len(groups), 8):  # larger batches need more memory and save no time
        batch = groups[start:start + 8]
        texts = [group.prompt + response for group in batch for response in group.responses]
        ids, mask = pad_right(texts, pad)
        flat = sequence_scores(model, ids.to(device), mask.to(device)).double().cpu().numpy()
        ends = np.cumsum([len(group.responses) for group in batch])
        scores += np.split(flat, ends[:-1])
    return scores


def evaluate_reward_model(model: Transformer, groups: list[PreferenceGroup],
                          encoding: tiktoken.Encoding, ground_truth: ModuleType | None) -> dict:
    """Metrics on test pairs: accuracy (a tie counts one half) with its interval, calibration.

    With a ground truth also its correlation with the scores, and the ceiling: the accuracy that the
    ground truth itself reaches on the annotator's labels.
    """
    scores = group_scores(model, groups, pad_id(encoding))
    scale = model.score_scale.item()  # the loss is stated on the raw scale
    gaps, weights, correct, accuracies = [], [], [], []
    for group, of_group in zip(groups, scores):
        gap = np.array([of_group[w] - of_group[l] for w, l, _, _ in group.pairs]) * scale
        weight = np.array([weight for *_, weight in group.pairs])
        is_correct = np.where(gap == 0, 0.5, gap > 0)
        gaps.append(gap)
        weights.append(weight)
        correct.append(is_correct)
        accuracies.append(np.average(is_correct, weights=weight) if weight.sum() else 0.5)
    group_weights = np.array([weight.sum() for weight in weights])
    accuracy, low, high = bootstrap_interval(np.array(accuracies), group_weights)
    flat_gaps = np.concatenate(gaps)
    losses = np.logaddexp(0, -flat_gaps)
    result = dict(accuracy=accuracy, accuracy_low=low, accuracy_high=high,
                  pairs=len(flat_gaps), prompts=len(groups),
                  loss=float(np.average(losses, weights=np.concatenate(weights))),
                  calibration_error=calibration_error(flat_gaps, np.concatenate(correct)))
    return result | compare_to_ground_truth(groups, scores, encoding, ground_truth)


def compare_to_ground_truth(groups: list[PreferenceGroup], scores: list[np.ndarray],
                            encoding: tiktoken.Encoding, ground_truth: ModuleType | None) -> dict:
    """gold_correlation and ceiling, where the ground truth has the functions for them."""
    if ground_truth is None:
        return {}
    texts = []
    for group in groups:
        responses = [decode(encoding, response) for response in group.responses]
        texts.append((decode(encoding, group.prompt), responses))
    metrics = {}
    if hasattr(ground_truth, "gold"):
        gold = [ground_truth.gold(prompt, response)
                for prompt, responses in texts for response in responses]
        flat = np.concatenate(scores)
        varies = np.ptp(flat) > 0 and np.ptp(gold) > 0
        metrics["gold_correlation"] = float(np.corrcoef(flat, gold)[0, 1]) if varies else 0.0
    if hasattr(ground_truth, "preference_probability"):
        probabilities = np.array([
            ground_truth.preference_probability(prompt, responses[w], responses[l])
            for (prompt, responses), group in zip(texts, groups) for w, l, _, _ in group.pairs])
        metrics["ceiling"] = float(np.maximum(probabilities, 1 - probabilities).mean())
    return metrics


def calibration_error(gaps: np.ndarray, correct: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: the mean over bins of |confidence - accuracy| (Guo et al. 2017).

    gaps: raw score differences; confidence is sigmoid(|gap|).
    """
    confidence = 1 / (1 + np.exp(-np.abs(gaps)))
    bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    total = 0.0
    for b in range(bins):
        inside = bin_of == b
        if inside.any():
            error = abs(confidence[inside].mean() - correct[inside].mean())
            total += error * inside.mean()
    return float(total)


def evaluate_probes(model: Transformer, prompts: Prompts, encoding: tiktoken.Encoding,
                    ground_truth: ModuleType, max_response_length: int,
                    ) -> dict[str, tuple[float, int]]:
    """defect -> (share, number of prompts).

    The share counts the prompts on which the best response has a higher score than the same
    response with the defect. A defect that the maximum lengths cut off counts as not detected.
    """
    groups, defects = [], []
    for prompt, prompt_ids in zip(prompts.texts, prompts.ids):
        probes = ground_truth.probes(prompt)
        texts = [ground_truth.best_response(prompt), *probes.values()]
        encoded = [(*encoding.encode_ordinary(text), encoding.eot_token) for text in texts]
        responses = tuple(ids[:max_response_length] for ids in encoded)
        groups.append(PreferenceGroup(prompt_ids, responses, ()))
        defects.append(list(probes))
    detected: dict[str, list[bool]] = {}
    for names, scores in zip(defects, group_scores(model, groups, pad_id(encoding))):
        for name, score in zip(names, scores[1:]):
            detected.setdefault(name, []).append(bool(scores[0] > score))
    return {name: (float(np.mean(hits)), len(hits)) for name, hits in sorted(detected.items())}
