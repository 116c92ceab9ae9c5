"""Curves, peaks and fits of `minirlhf.lab.overoptimization`: numbers in, numbers out."""

import math
from pathlib import Path
from typing import NamedTuple

from minirlhf.evaluation.statistics import standard_error
from minirlhf.lab.common import read_rows, reward_test_rows
from minirlhf.run.seeding import derive_seed

import numpy as np


class Curve(NamedTuple):
    """M points along one optimization."""

    d: np.ndarray  # [M] sqrt(KL from the base model in nats)
    gold: np.ndarray  # [M] gold utility gained over the base model
    proxy: np.ndarray  # [M] score of the reward model


class Peak(NamedTuple):
    """Where gold is highest, and what follows.

    The place is chosen on one half of the data and measured on the other.
    """

    d: float
    gold: float
    end: float  # gold at the end
    fall: float  # peak - end
    fall_se: float
    proxy_rise: float  # proxy at the end - proxy at the peak
    proxy_rise_se: float


class Fit(NamedTuple):
    """A least-squares fit with standard errors."""

    alpha: float
    beta: float
    alpha_se: float
    beta_se: float
    r2: float


class Study(NamedTuple):
    """All measurements. A setting is SIZE-GROUPS of a reward model, or "default"."""

    reward_metrics: dict[str, dict]  # setting -> metrics of its reward model on test pairs
    pool: dict[str, tuple[np.ndarray, np.ndarray]]  # setting -> (scores, gold) [prompts, pool]
    policies: dict[tuple[str, float], Curve]  # (setting, kl_coef) -> a point for each iteration

    @staticmethod
    def read(reward_folders: dict[str, Path], policy_folders: dict[tuple[str, float], Path],
             rows: dict[str, dict], pool: int) -> "Study":
        """The study from the folders of the runs and the rows of the pool.

        pool: responses to each prompt.
        """
        metrics = {name: reward_test_rows(folder)[0] for name, folder in reward_folders.items()}
        chunks = [rows[f"pool {i}"] for i in range(sum(key.startswith("pool") for key in rows))]
        gold = np.array([chunk["gold"] for chunk in chunks]).reshape(-1, pool)
        gained = gold - gold.mean()
        pools = {}
        for name in reward_folders:
            scores = np.array([chunk["scores"][name] for chunk in chunks]).reshape(-1, pool)
            pools[name] = (scores, gained)
        start = float(np.mean(rows["start"]["gold"]))
        curves = {key: read_curve(folder, start) for key, folder in policy_folders.items()}
        return Study(metrics, pools, curves)


def read_curve(folder: Path, start: float) -> Curve:
    """The curve of a policy run. start: gold utility of the base model."""
    rows = [row for row in read_rows(folder / "policy_metrics.jsonl") if row["step"]]
    kl, gold, proxy = (np.array([row[key] for row in rows]) for key in ("kl", "gold", "score"))
    return Curve(np.sqrt(np.maximum(kl, 0.0)), gold - start, proxy)


# ---- best of n -----------------------------------------------------------------------------------


def draw_counts(pool: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... pool."""
    counts = {n for power in range(20) for n in (2**power, 3 * 2**power // 2) if n <= pool}
    return sorted(counts | {pool})


def best_of_n_weights(pool: int, n: int) -> np.ndarray:
    """[pool] probability that the best of n draws is the i-th lowest: C(i - 1, n - 1) / C(pool, n).

    Draws are without replacement. With these weights one pool gives an unbiased estimate for
    every n (Nakano et al. 2021, section 3.3).
    """
    def log_choose(a: int, b: int) -> float:
        return math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)

    weights = np.zeros(pool)
    for i in range(n, pool + 1):
        weights[i - 1] = math.exp(log_choose(i - 1, n - 1) - log_choose(pool, n))
    return weights


def best_of_n_curves(scores: np.ndarray, gold: np.ndarray,
                     ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(d [M], gold [prompts, M], proxy [prompts, M]) of the best of n by score, for M values of n.

    scores, gold: [prompts, pool]. The KL is log n - (n - 1) / n, an upper bound.
    """
    pool = scores.shape[1]
    counts = draw_counts(pool)
    weights = np.stack([best_of_n_weights(pool, n) for n in counts], axis=1)
    order = scores.argsort(axis=1, kind="stable")
    d = np.sqrt([math.log(n) - (n - 1) / n for n in counts])
    return (d, np.take_along_axis(gold, order, 1) @ weights,
            np.take_along_axis(scores, order, 1) @ weights)


def best_of_n_peak(d: np.ndarray, gold: np.ndarray, proxy: np.ndarray) -> Peak:
    """The n with the highest gold on every second prompt, measured on the other prompts."""
    at = int(gold[::2].mean(0).argmax())
    gold = gold[1::2]
    proxy = proxy[1::2]
    fall = gold[:, at] - gold[:, -1]
    rise = proxy[:, -1] - proxy[:, at]
    return Peak(d[at], gold[:, at].mean(), gold[:, -1].mean(), fall.mean(), standard_error(fall),
                rise.mean(), standard_error(rise))


# ---- policies ------------------------------------------------------------------------------------


def split_blocks(curve: Curve, size: int) -> list[np.ndarray]:
    """The indices of blocks of consecutive iterations."""
    return np.array_split(np.arange(len(curve.d)), max(2, len(curve.d) // size))


def block_means(curve: Curve, size: int) -> Curve:
    """Means over blocks of consecutive iterations."""
    parts = split_blocks(curve, size)
    return Curve(*(np.array([column[part].mean() for part in parts]) for column in curve))


def policy_peak(curve: Curve, size: int = 4) -> Peak:
    """The block of iterations with the highest gold, compared with the last block.

    Every second iteration of a block is used to choose it, the others to measure it. The noise of
    one iteration is estimated from differences of consecutive ones, in which the trend of the run
    nearly cancels.
    """
    parts = split_blocks(curve, size)
    peak = parts[int(np.argmax([curve.gold[part[::2]].mean() for part in parts]))]
    end = parts[-1]
    measured = peak[1::2]

    def gap(column: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
        """(the difference of the means of two blocks, its standard error)."""
        noise = math.sqrt((np.diff(column) ** 2).mean() / 2)
        difference = column[a].mean() - column[b].mean()
        return difference, noise * math.sqrt(1 / len(a) + 1 / len(b))

    return Peak(curve.d[peak].mean(), curve.gold[measured].mean(), curve.gold[end].mean(),
                *gap(curve.gold, measured, end), *gap(curve.proxy, end, measured))


def gain_at_same_kl(curve: Curve, other: Curve, size: int = 2) -> dict[str, tuple[float, float]]:
    """"gold" and "proxy": (mean, standard error over blocks) of curve - other at the same KL.

    Only where both have points; {} if fewer than two blocks are there.
    """
    curve = block_means(curve, size)
    other = block_means(other, size)
    order = np.argsort(other.d)
    shared = (curve.d >= other.d.min()) & (curve.d <= other.d.max())
    if shared.sum() < 2:
        return {}
    gains = {}
    for name in ("gold", "proxy"):
        at_same_kl = np.interp(curve.d[shared], other.d[order], getattr(other, name)[order])
        gap = getattr(curve, name)[shared] - at_same_kl
        gains[name] = (float(gap.mean()), standard_error(gap))
    return gains


# ---- fits ----------------------------------------------------------------------------------------


def fit(d: np.ndarray, gold: np.ndarray, logarithm: bool) -> Fit:
    """Least squares for R = d (alpha - beta d), or R = d (alpha - beta log d); d > 0."""
    features = np.stack([d, -d * (np.log(d) if logarithm else d)], axis=1)
    coefficients, *_ = np.linalg.lstsq(features, gold, rcond=None)
    residuals = gold - features @ coefficients
    squared = residuals @ residuals
    covariance = np.linalg.pinv(features.T @ features) * squared / max(1, len(d) - 2)
    total = max(1e-12, ((gold - gold.mean()) ** 2).sum())
    return Fit(*coefficients, *np.sqrt(np.diag(covariance)), r2=1.0 - squared / total)


def fit_best_of_n(d: np.ndarray, gold: np.ndarray, resamples: int = 200) -> Fit:
    """The fit to the mean over prompts of gold [prompts, M].

    All points come from one pool, so the standard errors are estimated by resampling prompts.
    """
    positive = d > 0
    random = np.random.default_rng(derive_seed(0, "bootstrap"))

    def fit_to(prompts) -> Fit:
        return fit(d[positive], gold[prompts].mean(0)[positive], False)

    draws = [fit_to(random.integers(len(gold), size=len(gold))) for _ in range(resamples)]
    alpha_se = float(np.std([draw.alpha for draw in draws], ddof=1))
    beta_se = float(np.std([draw.beta for draw in draws], ddof=1))
    return fit_to(slice(None))._replace(alpha_se=alpha_se, beta_se=beta_se)


def fit_policy(curve: Curve) -> Fit:
    """The fit to every iteration with a KL of at least a quarter nat; NaN if there are too few."""
    far = curve.d >= 0.5
    if far.sum() <= 2:
        return Fit(math.nan, math.nan, math.nan, math.nan, math.nan)
    return fit(curve.d[far], curve.gold[far], True)
