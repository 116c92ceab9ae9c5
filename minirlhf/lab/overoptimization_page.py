"""The results of `minirlhf.lab.overoptimization`: curves, fits, the page and the pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minirlhf.lab.common import markdown_table, mean_interval, save_picture
from minirlhf.lab.sweep import draw, show
from minirlhf.run.files import write_atomically
from minirlhf.run.terminal import echo

import numpy as np

POINTS = 20  # of a PPO run: means over blocks of iterations
DRAWN = 12  # points of a PPO curve in a picture
HEAD = """# How far a reward model can be trusted

Mean ± half of the 95% interval over seeds (Student's t). Gold: the exact utility, gained over the
base model. Proxy: the score that is optimized, in standard deviations of the base model's scores.
d = sqrt(KL from the base model, nats). Reward model LAYERSxWIDTH-GROUPS was trained on so many
groups, each with six labeled pairs; -mean and -min: an ensemble of three. -kl-X: with a KL penalty.
The other seeds decide where a seed's peak is, so noise does not raise it.
"""
FORMS = {"best of n": "d (alpha - beta d)", "PPO": "d (alpha - beta log d)"}
REWARD_COLUMNS = dict(accuracy="{:.3f}", ceiling="{:.3f}", gold_correlation="{:.2f}")
PEAK, END, FALL = "peak of gold", "gold at the end", "fall of gold"
COLUMNS = {PEAK: "{:+.2f}", "at d": "{:.2f}", END: "{:+.2f}", "end d": "{:.2f}",
           FALL: "{:+.2f}", "rise of proxy": "{:+.2f}",
           "alpha": "{:.2f}", "beta": "{:.2f}", "R^2": "{:.3f}"}
SIGNS = {1: "> 0", 0: "0", -1: "< 0"}
AXES = ("d = sqrt(KL from the base model), sqrt(nats)", "gold gained over the base model",
        "proxy score\n(standard deviations of the base model's)")


class Study(NamedTuple):
    """All measurements. A curve is [seeds, 3, M]: d, gold and proxy at M points."""

    metrics: dict[str, list[dict]]  # reward model -> metrics on test pairs, one for each seed
    curves: dict[str, dict[str, np.ndarray]]  # "best of n" or "PPO" -> name -> curve


def read_study(rows: dict[str, dict], kinds: Sequence[str], seeds: int) -> Study:
    """The study from the lines of runs.jsonl. kinds: of reward models."""
    def lines(name: str) -> list[dict]:
        return [rows[f"{name}-seed{seed}"] for seed in range(seeds)]

    pools = lines("best-of-n")
    best_of_n = {name: np.array([pool["curves"][name] for pool in pools])
                 for name in pools[0]["curves"]}
    ppo = {}
    for key in rows:
        if key.startswith("ppo-") and key.endswith("-seed0"):
            name = key.removesuffix("-seed0")
            ppo[name.removeprefix("ppo-")] = np.array(
                [policy_curve(line, pool["gold"]) for line, pool in zip(lines(name), pools)])
    return Study({kind: lines(f"reward-{kind}") for kind in kinds},
                 {"best of n": best_of_n, "PPO": ppo})


# ---- curves --------------------------------------------------------------------------------------


def best_of_n_curve(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """[3, M] d, gold and proxy of the best of n by score, for n = 1, 2, 3, 4, 6, 8, 12, ... pool.

    scores, gold: [prompts, pool]. Gold is gained over the pool's mean. d is the root of
    log n - (n - 1) / n, an upper bound of the KL.
    """
    pool = scores.shape[1]
    counts = sorted({n for power in range(20) for n in (2**power, 3 * 2**power // 2) if n <= pool})
    weights = np.stack([best_of_n_weights(pool, n) for n in counts], axis=1)
    order = scores.argsort(axis=1, kind="stable")
    best_gold, proxy = (np.take_along_axis(x, order, 1).mean(0) @ weights for x in (gold, scores))
    d = np.sqrt([math.log(n) - (n - 1) / n for n in counts])
    return np.stack([d, best_gold - gold.mean(), proxy])


def best_of_n_weights(pool: int, n: int) -> np.ndarray:
    """[pool] probability that the best of n draws is the i-th lowest: C(i - 1, n - 1) / C(pool, n).

    Draws are without replacement. With these weights one pool gives an unbiased estimate for
    every n (Nakano et al. 2021, section 3.3).
    """
    return np.array([math.comb(i, n - 1) / math.comb(pool, n) for i in range(pool)])


def policy_curve(line: dict, base_gold: float) -> np.ndarray:
    """[3, M] d, gold and proxy of a PPO run. base_gold: gold utility of the base model."""
    iterations = np.array([line["kl"], line["gold"], line["score"]])
    blocks = np.array_split(iterations, min(POINTS, iterations.shape[1]), axis=1)
    kl, gold, proxy = np.stack([block.mean(1) for block in blocks], axis=1)
    return np.stack([np.sqrt(np.maximum(kl, 0.0)), gold - base_gold, proxy])


def measure(curves: np.ndarray, method: str) -> dict[str, np.ndarray]:
    """A name in COLUMNS -> [seeds]. curves: [seeds, 3, M].

    A seed's peak is where the mean gold of the other seeds is highest. (A single seed chooses
    itself.)
    """
    rows = []
    for seed, (d, gold, proxy) in enumerate(curves):
        others = np.delete(curves, seed, axis=0) if len(curves) > 1 else curves
        at = others[:, 1].mean(0).argmax()
        rows.append([gold[at], d[at], gold[-1], d[-1], gold[at] - gold[-1], proxy[-1] - proxy[at],
                     *fit(d, gold, method)])
    return dict(zip(COLUMNS, np.array(rows).T))


def fit(d: np.ndarray, gold: np.ndarray, method: str) -> tuple[float, float, float]:
    """(alpha, beta, R^2) of FORMS[method] by least squares over the points with d > 0."""
    gold = gold[d > 0]
    d = d[d > 0]
    features = np.stack([d, -d * (np.log(d) if method == "PPO" else d)], axis=1)
    coefficients, *_ = np.linalg.lstsq(features, gold, rcond=None)
    residuals = gold - features @ coefficients
    total = max(1e-12, ((gold - gold.mean()) ** 2).sum())
    return *coefficients, 1.0 - residuals @ residuals / total


def gain_at_same_kl(curves: np.ndarray, others: np.ndarray, which: int) -> np.ndarray:
    """[seeds] mean of gold (which = 1) or proxy (2) of curves - that of others at the same d.

    Over the points whose d the other curve reaches.
    """
    gains = []
    for curve, other in zip(curves, others):
        d, *_ = points = curve[:, curve[0] <= other[0].max()]
        order = other[0].argsort()
        gains.append((points[which] - np.interp(d, other[0][order], other[which][order])).mean())
    return np.array(gains)


def at_equal_d(curves: np.ndarray) -> np.ndarray:
    """[seeds, 3, DRAWN] the curves at evenly spaced d, between the d that every seed has.

    curves: [seeds, 3, M]. At one iteration seeds differ in d, and a mean over them would have
    error bars in both directions.
    """
    d = np.linspace(curves[:, 0].min(1).max(), curves[:, 0].max(1).min(), DRAWN)
    return np.array([[np.interp(d, *seed[[0, row]][:, seed[0].argsort()]) for row in range(3)]
                     for seed in curves])


# ---- the page ------------------------------------------------------------------------------------


def write_page(study: Study, folder: Path) -> str:
    """Write overoptimization.md and the pictures; returns the page."""
    page = describe(study)
    write_atomically(folder / "overoptimization.md", page.encode())
    echo(f"\n{page}\nsaved {folder / 'overoptimization.md'}")
    best_of_n, ppo = study.curves.values()
    weakest = next(iter(study.metrics))
    without = {name: ppo[name] for name in best_of_n}
    penalties = {name: ppo[name] for name in ppo if name not in best_of_n or name == weakest}
    save_picture(folder / "overoptimization.png", lambda axes: draw_columns(
        axes, {"best of n": best_of_n, "PPO": without}), (10, 7), rows=2, columns=2)
    save_picture(folder / "penalty.png", lambda axes: draw_columns(axes, {"PPO": penalties}),
                 (5.5, 7), rows=2)
    return page


def describe(study: Study) -> str:
    """The page: reward models, best of n, PPO, and the papers' statements."""
    table = [[name, *(show([row[key] for row in rows], form)
                      for key, form in REWARD_COLUMNS.items())]
             for name, rows in study.metrics.items()]
    parts = [HEAD, markdown_table(["on test pairs", *REWARD_COLUMNS], table)]
    measured = {method: {name: measure(curves, method) for name, curves in named.items()}
                for method, named in study.curves.items()}
    for method, named in measured.items():
        table = [[name, *(show(values[key].tolist(), form) for key, form in COLUMNS.items())]
                 for name, values in named.items()]
        parts += [f"\n## {method}: gold = {FORMS[method]}\n",
                  markdown_table(["reward", *COLUMNS], table)]
    table = [[claim, show(values.tolist(), "{:+.2f}"), SIGNS[sign], agreement(values, sign)]
             for claim, values, sign in claims(study, measured)]
    header = ["statement", "measured", "stated", "this study"]
    parts += ["\n## Statements of Gao et al. (2022); of Coste et al. (2023) on -mean and -min\n",
              markdown_table(header, table)]
    return "\n".join(parts) + "\n"


def agreement(values: np.ndarray, sign: int) -> str:
    """Whether values over seeds agree with a statement: they are > 0 (sign 1), < 0 (-1) or 0."""
    mean, half = mean_interval(values.tolist())
    if len(values) == 1:
        return "has one seed, no interval"
    if abs(mean) <= half:
        return "is undecided" if sign else "does not contradict it"
    return "agrees" if sign * mean > 0 else "disagrees"


def claims(study: Study, measured: dict) -> list[tuple[str, np.ndarray, int]]:
    """(statement, what it is about for each seed, its stated sign)."""
    weakest, more, larger = study.metrics
    best_of_n, ppo = study.curves.values()
    rows = []
    for method, named in measured.items():
        r2 = np.min([values["R^2"] for values in named.values()], axis=0)
        rows += [(f"{method}, {weakest}: gold falls", named[weakest][FALL], 1),
                 (f"{method}, {weakest}: meanwhile the proxy rises",
                  named[weakest]["rise of proxy"], 1),
                 (f"{method}: {FORMS[method]} fits; lowest R^2 - 0.9", r2 - 0.9, 1),
                 (f"{method}: more preferences, higher peak", gap(named, more, weakest, PEAK), 1),
                 (f"{method}: larger reward model, higher peak", gap(named, larger, more, PEAK), 1)]
        for name in [name for name in best_of_n if name not in study.metrics]:
            rows += [(f"{method}, {name}: less fall than one", gap(named, name, weakest, FALL), -1),
                     (f"{method}, {name}: higher end than one", gap(named, name, weakest, END), 1)]
    fits = measured["PPO"]
    rows += [("PPO: larger reward model, same alpha", gap(fits, larger, more, "alpha"), 0),
             ("PPO: larger reward model, smaller beta", gap(fits, larger, more, "beta"), -1)]
    for name in study.metrics:
        ends = [named[name]["end d"] for named in measured.values()]
        rows += [(f"{name}: PPO moves farther than best of n", ends[1] - ends[0], 1),
                 (f"{name}: best of n has more gold at the same d",
                  gain_at_same_kl(best_of_n[name], ppo[name], 1), 1)]
    for name in [name for name in ppo if name not in best_of_n]:
        gold, proxy = (gain_at_same_kl(ppo[name], ppo[weakest], which) for which in (1, 2))
        rows += [(f"{name}: the penalty does not change gold at the same d", gold, 0),
                 (f"{name}: the penalty raises the proxy at the same d", proxy, 1)]
    return rows


def gap(named: dict, name: str, other: str, key: str) -> np.ndarray:
    return named[name][key] - named[other][key]


def draw_columns(axes, columns: dict[str, dict[str, np.ndarray]]) -> None:
    """Gold above, proxy below; against d. columns: title -> name -> curves."""
    for column, (title, named) in zip(np.reshape(axes, (2, -1)).T, columns.items()):
        if title == "PPO":
            named = {name: at_equal_d(curves) for name, curves in named.items()}
        for which, axis in enumerate(column, start=1):
            lines = {name: [(*mean_interval(x.tolist()), *mean_interval(y.tolist()))
                            for x, y in zip(curves[:, 0].T, curves[:, which].T)]
                     for name, curves in named.items()}
            draw(axis, lines, AXES[0], AXES[which], legend=which == 1 and title == "PPO")
            axis.set_title(f"{title}: mean and 95% interval over seeds at equal d", fontsize=9,
                           loc="left")
