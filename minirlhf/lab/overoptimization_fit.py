"""Curves, peaks and fits of `minirlhf.lab.overoptimization`: numbers in, numbers out."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minirlhf.evaluate import standard_error
from minirlhf.lab.common import read_rows
from minirlhf.seeding import derive_seed


class Curve(NamedTuple):
    """Points along one optimisation, d = sqrt(KL in nats) against gold gained over the base model and the proxy's score."""

    d: np.ndarray  # [M]
    gold: np.ndarray  # [M]
    proxy: np.ndarray  # [M]


class Peak(NamedTuple):
    """Where gold is highest, and what became of it; chosen on one half of the data and measured on the other."""

    d: float
    gold: float
    end: float  # gold at the end
    fall: float  # peak - end
    fall_se: float
    proxy_rise: float  # proxy at the end - proxy at the peak
    proxy_rise_se: float


class Fit(NamedTuple):
    alpha: float
    beta: float
    alpha_se: float
    beta_se: float
    r2: float


class Study(NamedTuple):
    judges: dict[str, dict]  # setting -> the reward model's test figures
    pool: dict[str, tuple[np.ndarray, np.ndarray]]  # setting -> (scores, gold gained), each [prompts, pool]
    policies: dict[tuple[str, float], Curve]  # (setting, kl_coef) -> a point per iteration

    @staticmethod
    def read(judges: dict[str, Path], policies: dict[tuple[str, float], Path], rows: dict[str, dict], pool: int) -> "Study":
        """From the folders of the runs and the pool's rows."""
        figures = {name: next(row for row in read_rows(folder / "reward_metrics.jsonl") if row["stage"] == "test")
                   for name, folder in judges.items()}
        chunks = [rows[f"pool {i}"] for i in range(sum(key.startswith("pool") for key in rows))]
        gold = np.array([chunk["gold"] for chunk in chunks]).reshape(-1, pool)
        scores = {name: np.array([chunk["scores"][name] for chunk in chunks]).reshape(-1, pool) for name in judges}
        curves, start = {}, float(np.mean(rows["start"]["gold"]))
        for key, folder in policies.items():
            kl, worth, proxy = (np.array([row[name] for row in read_rows(folder / "policy_metrics.jsonl") if row["step"]])
                                for name in ("kl", "gold", "score"))
            curves[key] = Curve(np.sqrt(np.maximum(kl, 0.0)), worth - start, proxy)
        return Study(figures, {name: (scores[name], gold - gold.mean()) for name in judges}, curves)


# ---- best of n -------------------------------------------------------------------------------------------------------

def draw_counts(pool: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... pool."""
    return sorted({n for power in range(20) for n in (2**power, 3 * 2**power // 2) if n <= pool} | {pool})


def best_of_n_weights(pool: int, n: int) -> np.ndarray:
    """[pool] the chance that the best of n drawn without replacement is the i-th from below: C(i - 1, n - 1) / C(pool, n).

    With these weights one pool gives an unbiased estimate for every n (Nakano et al. 2021, section 3.3).
    """
    def log_choose(a, b):
        return math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)
    return np.array([math.exp(log_choose(i - 1, n - 1) - log_choose(pool, n)) if i >= n else 0.0 for i in range(1, pool + 1)])


def best_of_n_curves(scores: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(d [M], gold [prompts, M], proxy [prompts, M]) of the best of n by score; KL = log n - (n - 1) / n, a bound."""
    counts = draw_counts(scores.shape[1])
    weights = np.stack([best_of_n_weights(scores.shape[1], n) for n in counts], axis=1)
    order = scores.argsort(axis=1, kind="stable")
    d = np.sqrt([math.log(n) - (n - 1) / n for n in counts])
    return d, np.take_along_axis(gold, order, 1) @ weights, np.take_along_axis(scores, order, 1) @ weights


def best_of_n_peak(d: np.ndarray, gold: np.ndarray, proxy: np.ndarray) -> Peak:
    choose, measure = gold[::2], slice(1, None, 2)
    at = int(choose.mean(0).argmax())
    fall, rise = gold[measure, at] - gold[measure, -1], proxy[measure, -1] - proxy[measure, at]
    return Peak(d[at], gold[measure, at].mean(), gold[measure, -1].mean(), fall.mean(), standard_error(fall), rise.mean(),
                standard_error(rise))


# ---- policies --------------------------------------------------------------------------------------------------------

def blocks(curve: Curve, size: int) -> Curve:
    """Means over blocks of successive iterations."""
    parts = np.array_split(np.arange(len(curve.d)), max(2, len(curve.d) // size))
    return Curve(*(np.array([column[part].mean() for part in parts]) for column in curve))


def policy_peak(curve: Curve, size: int = 4) -> Peak:
    """The block of iterations where gold is highest, by every second of them, measured on the others, against the last block.

    The noise of one iteration is taken from the differences of successive ones, in which the drift of a run nearly cancels.
    """
    parts = np.array_split(np.arange(len(curve.d)), max(2, len(curve.d) // size))
    at, end = parts[int(np.argmax([curve.gold[part[::2]].mean() for part in parts]))], parts[-1]
    measured = at[1::2]

    def gap(column, a, b):
        noise = math.sqrt((np.diff(column) ** 2).mean() / 2)
        return column[a].mean() - column[b].mean(), noise * math.sqrt(1 / len(a) + 1 / len(b))

    return Peak(curve.d[at].mean(), curve.gold[measured].mean(), curve.gold[end].mean(), *gap(curve.gold, measured, end),
                *gap(curve.proxy, end, measured))


def matched_gain(ours: Curve, theirs: Curve, size: int = 2) -> dict[str, tuple[float, float]] | None:
    """"gold" and "proxy": (mean, standard error over blocks) of ours minus theirs at the same KL, where theirs has been."""
    ours, theirs = blocks(ours, size), blocks(theirs, size)
    order = np.argsort(theirs.d)
    there = (ours.d >= theirs.d.min()) & (ours.d <= theirs.d.max())
    if there.sum() < 2:
        return None
    gaps = {name: getattr(ours, name)[there] - np.interp(ours.d[there], theirs.d[order], getattr(theirs, name)[order])
            for name in ("gold", "proxy")}
    return {name: (float(gap.mean()), standard_error(gap)) for name, gap in gaps.items()}


# ---- fits ------------------------------------------------------------------------------------------------------------

def fit(d: np.ndarray, gold: np.ndarray, logarithm: bool) -> Fit:
    """Least squares for R = d (alpha - beta d), or with logarithm R = d (alpha - beta log d); d > 0."""
    features = np.stack([d, -d * (np.log(d) if logarithm else d)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(features, gold, rcond=None)
    rest = gold - features @ (alpha, beta)
    cov = np.linalg.pinv(features.T @ features) * (rest @ rest) / max(1, len(d) - 2)
    return Fit(alpha, beta, *np.sqrt(np.diag(cov)), 1.0 - (rest @ rest) / max(1e-12, ((gold - gold.mean()) ** 2).sum()))


def fit_best_of_n(d: np.ndarray, gold: np.ndarray, resamples: int = 200) -> Fit:
    """The fit to the mean over prompts. All points come from one pool, so the errors are from resampling prompts."""
    some = d > 0
    random = np.random.default_rng(derive_seed(0, "bootstrap"))
    draws = [fit(d[some], gold[random.integers(len(gold), size=len(gold))].mean(0)[some], False) for _ in range(resamples)]
    errors = (float(np.std([draw[i] for draw in draws], ddof=1)) for i in (0, 1))
    return fit(d[some], gold.mean(0)[some], False)._replace(**dict(zip(("alpha_se", "beta_se"), errors, strict=True)))


def fit_policy(curve: Curve) -> Fit:
    """The fit to every iteration's own figures that lies at least a quarter nat from the base model."""
    some = curve.d >= 0.5
    return fit(curve.d[some], curve.gold[some], True) if some.sum() > 2 else Fit(*[math.nan] * 5)
