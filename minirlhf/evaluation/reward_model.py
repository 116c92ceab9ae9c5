"""Evaluation of a reward model: on unseen preferences, and on the ground truth if it is known."""

from types import ModuleType

from minirlhf.data.batches import PreferenceGroup, pad_right
from minirlhf.data.prompts import encode_prompts
from minirlhf.data.tokenizer import Ids, decode, pad_id
from minirlhf.evaluation.statistics import share_interval
from minirlhf.model import Transformer
from minirlhf.model.transformer import sequence_scores

import numpy as np
import tiktoken
import torch


@torch.no_grad()
def group_scores(model: Transformer, groups: list[PreferenceGroup], pad: int) -> list[np.ndarray]:
    """The normalized score of every response of every group."""
    device = model.wte.weight.device
    scores = []
    for start in range(0, len(groups), 8):  # larger batches need more memory and save no time
        batch = groups[start:start + 8]
        texts = [group.prompt + response for group in batch for response in group.responses]
        ids, mask = pad_right(texts, pad)
        flat = sequence_scores(model, ids.to(device), mask.to(device)).cpu().double().numpy()
        ends = np.cumsum([len(group.responses) for group in batch])
        scores += np.split(flat, ends[:-1])
    return scores


def evaluate_reward_model(model: Transformer, groups: list[PreferenceGroup],
                          encoding: tiktoken.Encoding, ground_truth: ModuleType | None) -> dict:
    """Metrics on test pairs: accuracy (a tie counts one half) with its interval, calibration.

    With a ground truth also its correlation with the scores, and the ceiling: the accuracy of the
    ground truth itself, in expectation over the annotator's errors.
    """
    scores = group_scores(model, groups, pad_id(encoding))
    numbers: dict[Ids, int] = {}  # a prompt may have several groups, but counts once
    rows = [(of_group[winner] - of_group[loser], weight,
             numbers.setdefault(group.prompt, len(numbers)))
            for group, of_group in zip(groups, scores) for winner, loser, _, weight in group.pairs]
    differences, weights, number_of_pair = map(np.array, zip(*rows))
    gaps = model.score_scale.item() * differences  # the loss is stated on the raw scale
    is_correct = np.where(gaps == 0, 0.5, gaps > 0)
    prompt_weights = np.bincount(number_of_pair, weights)
    prompt_accuracies = np.bincount(number_of_pair, weights * is_correct) / prompt_weights
    accuracy, low, high = share_interval(prompt_accuracies, prompt_weights)
    result = dict(accuracy=accuracy, accuracy_low=low, accuracy_high=high,
                  pairs=len(gaps), prompts=len(numbers),
                  loss=float(np.average(np.logaddexp(0, -gaps), weights=weights)),
                  calibration_error=calibration_error(gaps, is_correct, weights))
    return result | compare_to_ground_truth(groups, scores, encoding, ground_truth)


def compare_to_ground_truth(groups: list[PreferenceGroup], scores: list[np.ndarray],
                            encoding: tiktoken.Encoding, ground_truth: ModuleType | None) -> dict:
    """gold_correlation and ceiling, where the ground truth has the functions for them."""
    if ground_truth is None:
        return {}
    texts = [(decode(encoding, group.prompt), [decode(encoding, ids) for ids in group.responses])
             for group in groups]
    metrics = {}
    eos = encoding.eot_token
    if hasattr(ground_truth, "gold"):
        # A response of several groups of its prompt counts once.
        points = {(group.prompt, ids): (score, ground_truth.gold(prompt, response, ids[-1] == eos))
                  for (prompt, responses), group, of_group in zip(texts, groups, scores)
                  for response, ids, score in zip(responses, group.responses, of_group)}
        flat, gold = np.array([*points.values()], float).T
        varies = np.ptp(flat) > 0 and np.ptp(gold) > 0
        metrics["gold_correlation"] = float(np.corrcoef(flat, gold)[0, 1]) if varies else 0.0
    if hasattr(ground_truth, "preference_probability"):
        pairs = [(ground_truth.preference_probability(prompt, responses[w], responses[l]), weight)
                 for (prompt, responses), group in zip(texts, groups)
                 for w, l, _, weight in group.pairs]
        probability, weights = np.array(pairs).T
        best = np.maximum(probability, 1 - probability)
        metrics["ceiling"] = float(np.average(best, weights=weights))
    return metrics


def calibration_error(gaps: np.ndarray, correct: np.ndarray, weights: np.ndarray,
                      bins: int = 10) -> float:
    """Expected calibration error: the mean over bins of |confidence - accuracy| (Guo et al. 2017).

    gaps: raw score differences; confidence is sigmoid(|gap|).  weights: of the pairs.
    """
    confidence = 1 / (1 + np.exp(-np.abs(gaps)))
    bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    errors = np.bincount(bin_of, weights * (confidence - correct))
    return float(np.abs(errors).sum() / weights.sum())


def evaluate_probes(model: Transformer, texts: list[str], encoding: tiktoken.Encoding,
                    ground_truth: ModuleType | None, max_prompt_length: int,
                    max_response_length: int) -> dict[str, tuple[float, int]]:
    """defect -> (share, number of prompts). texts: the prompts.

    {} if the ground truth has no probes or no best responses.

    The share counts the prompts on which the best response has a higher score than the same
    response with the defect. A defect that the maximum lengths cut off counts as not detected.
    """
    if ground_truth is None or not vars(ground_truth).keys() >= {"probes", "best_response"}:
        return {}
    prompts = encode_prompts(texts, encoding, max_prompt_length)
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
