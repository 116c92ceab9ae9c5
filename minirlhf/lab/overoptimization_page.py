"""The results of `minirlhf.lab.overoptimization` as a page and as pictures."""

import math

from minirlhf.lab.common import STYLES, markdown_table
from minirlhf.lab.overoptimization_fit import (
    Fit,
    Peak,
    Study,
    best_of_n_curves,
    best_of_n_peak,
    block_means,
    fit_best_of_n,
    fit_policy,
    gain_at_same_kl,
    policy_peak,
)

import numpy as np

HEAD = """# How far a reward model can be trusted

- Gold: the exact utility of the task, gained over the base model.
- Proxy: the reward model's score, in standard deviations of the base model's own scores.
- d = sqrt(KL from the base model, nats).
- Setting SIZE-GROUPS: layers x width of the reward model, and the number of groups (four \
responses, six labeled pairs each) that it was trained on. `default` is the reward run itself.
- Peaks are chosen on one half of the data and measured on the other; ± is one standard error.
- PPO has no KL penalty and a constant learning rate here."""
PEAK_COLUMNS = ["gold at its peak, at d", "at the end", "fall", "proxy meanwhile", "alpha", "beta",
                "R^2"]
METHODS = ("best of n", "PPO")
FORMS = ("d (alpha - beta d)", "d (alpha - beta log d)")
AXIS_LABELS = ("gold gained over the base model",
               "proxy score\n(standard deviations of the base model's)")
D_LABEL = "d = sqrt(KL from the base model), sqrt(nats)"

Peaks = dict[str, tuple[Peak, Peak]]  # setting -> of best of n, of PPO
Fits = dict[str, tuple[Fit, Fit]]


def describe(study: Study) -> str:
    """The page: reward models, best of n, PPO, the KL penalty, and the paper's statements."""
    peaks = {}
    fits = {}
    for name, pool in study.pool.items():
        d, gold, proxy = best_of_n_curves(*pool)
        curve = study.policies[name, 0.0]
        peaks[name] = (best_of_n_peak(d, gold, proxy), policy_peak(curve))
        fits[name] = (fit_best_of_n(d, gold), fit_policy(curve))
    reward_models = [[name, f"{row['accuracy']:.3f}", f"{row['ceiling']:.3f}",
                      f"{row['gold_correlation']:.2f}"]
                     for name, row in study.reward_metrics.items()]
    header = ["reward model", "accuracy", "ceiling", "correlation with gold"]
    parts = [HEAD, markdown_table(header, reward_models)]
    for i, title in enumerate(("Best of n", "PPO")):
        table = [[name, *peak_cells(peaks[name][i]), *fit_cells(fits[name][i])] for name in peaks]
        parts += [f"## {title}: R = {FORMS[i]}",
                  markdown_table(["reward model", *PEAK_COLUMNS], table)]
    weakest = next(iter(study.pool))
    lines = findings(study, peaks, fits)
    return "\n\n".join([
        *parts, f"## The KL penalty, with {weakest}", penalty_table(study), "## Findings",
        "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))]) + "\n"


def peak_cells(peak: Peak) -> list[str]:
    return [f"{peak.gold:+.2f} at {peak.d:.1f}", f"{peak.end:+.2f}",
            f"{peak.fall:.2f} ± {peak.fall_se:.2f}",
            f"{peak.proxy_rise:+.2f} ± {peak.proxy_rise_se:.2f}"]


def fit_cells(fit: Fit) -> list[str]:
    return [f"{fit.alpha:.2f} ± {fit.alpha_se:.2f}", f"{fit.beta:.2f} ± {fit.beta_se:.2f}",
            f"{fit.r2:.3f}"]


def penalty_table(study: Study) -> str:
    """The runs with the weakest reward model, one line for each kl_coef."""
    weakest = next(iter(study.pool))
    without_penalty = study.policies[weakest, 0.0]
    table = []
    for (name, kl_coef), curve in study.policies.items():
        if name != weakest:
            continue
        blocks = block_means(curve, 5)
        gain = gain_at_same_kl(curve, without_penalty) if kl_coef else {}
        gains = [f"{mean:+.2f} ± {error:.2f}" for mean, error in gain.values()] or ["", ""]
        table.append([f"{kl_coef:g}", f"{blocks.d[-1]:.1f}", f"{blocks.gold.max():+.2f}",
                      f"{blocks.gold[-1]:+.2f}", f"{blocks.proxy[-1]:+.2f}", *gains])
    return markdown_table(["kl_coef", "d at the end", "highest gold", "gold at the end",
                           "proxy at the end", "gold minus that without penalty at the same d",
                           "proxy"], table)


# ---- findings ------------------------------------------------------------------------------------


def findings(study: Study, peaks: Peaks, fits: Fits) -> list[str]:
    """Sentences that compare each of the paper's statements with the measurements."""
    trained_here = [name for name in peaks if name != "default"]
    lines = [overoptimization_finding(peaks), *kl_findings(study, peaks)]
    for i, (method, form) in enumerate(zip(METHODS, FORMS)):
        r2 = [pair[i].r2 for pair in fits.values()]
        lines.append(f"R = {form} fits {method} with R^2 from {span(r2)}: "
                     f"{agreement(min(r2) > 0.9)}, if a fit means R^2 > 0.9.")
    alphas = [fits[name][1].alpha for name in trained_here]
    error = max(fits[name][1].alpha_se for name in trained_here)
    lines.append(f"PPO's alpha is {span(alphas)}, with standard errors of up to {error:.2f}: "
                 f"{agreement(np.ptp(alphas) < 4 * error)} that it is the same for all reward "
                 "models.")
    for key, change in enumerate(("A larger reward model", "More preferences")):
        pairs = neighbors(trained_here, key)
        if pairs:
            better = [sum(peaks[b][i].gold > peaks[a][i].gold for a, b in pairs) for i in (0, 1)]
            lines.append(
                f"{change}: the peak of gold is higher in {better[0]} of {len(pairs)} neighboring "
                f"pairs with best of n, in {better[1]} with PPO: "
                f"{agreement(sum(better) == 2 * len(pairs))} that it is always better.")
    return [*lines, penalty_finding(study)]


def is_overoptimized(peak: Peak) -> bool:
    """Gold fell by more than two standard errors while the proxy rose by more than two."""
    return peak.fall > 2 * peak.fall_se and peak.proxy_rise > 2 * peak.proxy_rise_se


def overoptimization_finding(peaks: Peaks) -> str:
    counts = [sum(is_overoptimized(pair[i]) for pair in peaks.values()) for i in (0, 1)]
    weakest = next(iter(peaks))
    answer = "yes" if is_overoptimized(peaks[weakest][1]) else "no"
    return ("Overoptimization means here that gold falls by more than two standard errors below "
            "its peak while the proxy rises by more than two. It occurs with best of n in "
            f"{counts[0]} of {len(peaks)} settings, with PPO in {counts[1]}. With the weakest "
            f"reward model, {weakest}, and PPO: {answer}.")


def kl_findings(study: Study, peaks: Peaks) -> list[str]:
    """How much KL the two methods use, and how much gold they gain for it."""
    best_of_n_d = max(best_of_n_curves(*next(iter(study.pool.values())))[0])
    ppo_d = max(study.policies[name, 0.0].d.max() for name in peaks)
    cheaper = 0
    for name, (_, peak) in peaks.items():
        d, gold, _ = best_of_n_curves(*study.pool[name])
        cheaper += np.interp(peak.d, d, gold.mean(0)) > peak.gold
    return [
        f"Best of n reaches d = {best_of_n_d:.1f} with the whole pool, PPO {ppo_d:.1f}: "
        f"{agreement(ppo_d > 2 * best_of_n_d)} that reinforcement learning uses far more KL.",
        f"At the KL of PPO's peak, best of n has gained more gold in {cheaper} of {len(peaks)} "
        f"settings: {agreement(cheaper == len(peaks))} that it needs less KL for the same "
        "optimization."]


def penalty_finding(study: Study) -> str:
    weakest = next(iter(study.pool))
    without_penalty = study.policies[weakest, 0.0]
    gains = {kl_coef: gain_at_same_kl(curve, without_penalty)
             for (_, kl_coef), curve in study.policies.items() if kl_coef}
    raised = {}
    for key in ("gold", "proxy"):
        raised[key] = [f"{kl_coef:g}" for kl_coef, gain in gains.items()
                       if gain and gain[key][0] > 2 * gain[key][1]]
    names = f" ({', '.join(raised['gold'])})" if raised["gold"] else ""
    return ("At the same KL, a penalty raises gold by more than two standard errors for "
            f"{len(raised['gold'])} of {len(gains)} coefficients{names}, and the proxy for "
            f"{len(raised['proxy'])}: {agreement(not raised['gold'])} that a penalty does not "
            "change gold as a function of KL, and "
            f"{agreement(len(raised['proxy']) == len(gains))} that it raises the proxy. (One run "
            "each; consecutive blocks of a run are correlated, so these standard errors are too "
            "small.)")


def agreement(agrees: bool) -> str:
    return "agrees with the paper" if agrees else "disagrees with the paper"


def span(values: list[float]) -> str:
    if not np.isfinite(values).all():
        return "(too few points)"
    return f"{min(values):.2f} to {max(values):.2f}"


def neighbors(names: list[str], key: int) -> list[tuple[str, str]]:
    """Pairs of settings that differ by one step of size (key 0) or groups (key 1), smaller first.

    names: SIZE-GROUPS in increasing order.
    """
    pairs = []
    newest = {}  # the other half of the name -> the last setting with it
    for name in names:
        same = name.split("-")[1 - key]
        if same in newest:
            pairs.append((newest[same], name))
        newest[same] = name
    return sorted(pairs, key=lambda pair: names.index(pair[0]))


# ---- pictures ------------------------------------------------------------------------------------


def draw_scores(axes, study: Study) -> None:
    """Gold above, proxy below; best of n on the left, PPO on the right; thin lines: the fits."""
    for number, (name, pool) in enumerate(study.pool.items()):
        color, line, marker = STYLES[number % len(STYLES)]
        d, gold, proxy = best_of_n_curves(*pool)
        curve = study.policies[name, 0.0]
        policy = block_means(curve, 2)
        columns = ((d, gold.mean(0), proxy.mean(0)), policy)
        for column, (x, *ys) in enumerate(columns):
            for row, y in enumerate(ys):
                axes[row][column].plot(x, y, label=name, color=color, linestyle=line,
                                       marker=marker, markersize=4, linewidth=1.2)
        draw_fit(axes[0][0], fit_best_of_n(d, gold), d[1:], False, color)
        draw_fit(axes[0][1], fit_policy(curve), policy.d, True, color)
    for row, label in enumerate(AXIS_LABELS):
        axes[row][0].set_ylabel(label)
    for column, title in enumerate(("best of n", "PPO without a KL penalty")):
        axes[0][column].set_title(title, fontsize=10)
        axes[1][column].set_xlabel(D_LABEL)
    hide_frame([axis for row in axes for axis in row])
    legend_beside(axes[0][1], "reward model")


def draw_fit(axis, fit: Fit, x: np.ndarray, logarithm: bool, color: str) -> None:
    if not math.isnan(fit.alpha):
        grid = np.linspace(max(0.05, x.min()), x.max(), 100)
        decline = fit.beta * (np.log(grid) if logarithm else grid)
        axis.plot(grid, grid * (fit.alpha - decline), color=color, linewidth=0.6)


def draw_penalties(axes, study: Study) -> None:
    """Gold and proxy against d with the weakest reward model, one line for each kl_coef."""
    weakest = next(iter(study.pool))
    runs = {kl_coef: curve for (name, kl_coef), curve in study.policies.items() if name == weakest}
    for number, (kl_coef, curve) in enumerate(runs.items()):
        color, line, marker = STYLES[number % len(STYLES)]
        points = block_means(curve, 2)
        for axis, y in zip(axes, (points.gold, points.proxy)):
            axis.plot(points.d, y, color=color, linestyle=line, marker=marker, markersize=4,
                      linewidth=1.2, label=f"{kl_coef:g}")
    most_d = max([curve.d.max() for kl_coef, curve in runs.items() if kl_coef], default=1.0)
    for axis, label in zip(axes, AXIS_LABELS):
        axis.set_xlabel(D_LABEL)
        axis.set_ylabel(label)
        axis.set_xlim(0, 2 * most_d)
    hide_frame(axes)
    legend_beside(axes[1], f"kl_coef, {weakest}")


def hide_frame(axes) -> None:
    for axis in axes:
        axis.axhline(0, color="0.7", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)


def legend_beside(axis, title: str) -> None:
    axis.legend(frameon=False, fontsize=8, title=title, title_fontsize=8, loc="center left",
                bbox_to_anchor=(1.0, 0.5))
