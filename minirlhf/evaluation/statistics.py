"""Means with their uncertainty."""

import math

from minirlhf.run.seeding import derive_seed

import numpy as np

CHUNK = 2**20  # values to draw at a time: limits the memory


def bootstrap_interval(values: np.ndarray, weights: np.ndarray | None = None,
                       resamples: int = 2000) -> tuple[float, float, float]:
    """(mean, low, high): weighted mean with its 95% bootstrap interval.

    values: [n] one number per prompt; weights: [n], for example its number of pairs.
    Whole prompts are resampled, because pairs of one prompt are not independent.
    """
    values = np.asarray(values, float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, float)
    random = np.random.default_rng(derive_seed(0, "bootstrap"))
    means: list[float] = []
    at_a_time = max(1, CHUNK // len(values))
    while len(means) < resamples:
        count = min(at_a_time, resamples - len(means))
        draws = random.integers(len(values), size=(count, len(values)))
        means += ((values * weights)[draws].sum(1) / weights[draws].sum(1)).tolist()
    low, high = np.quantile(means, (0.025, 0.975))
    return float((values * weights).sum() / weights.sum()), float(low), float(high)


def share_interval(values: np.ndarray, weights: np.ndarray | None = None,
                   ) -> tuple[float, float, float]:
    """bootstrap_interval of values from 0 to 1; with a width also if all are 0 or all are 1.

    Then every bootstrap sample is the same. The exact interval of n successes in n is from
    0.025^(1/n) to 1 (Clopper and Pearson 1934).
    """
    mean, low, high = bootstrap_interval(values, weights)
    bound = 0.025 ** (1 / len(values))
    if mean == 0:
        high = 1 - bound
    if mean == 1:
        low = bound
    return mean, low, high


def standard_error(values: np.ndarray) -> float:
    """Of the mean; infinite for one value."""
    if len(values) < 2:
        return float("inf")
    deviations = values - values[0]  # so that equal values give exactly 0
    return float(np.std(deviations, ddof=1) / math.sqrt(len(values)))
