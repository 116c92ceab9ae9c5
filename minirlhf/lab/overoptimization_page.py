"""What `minirlhf.lab.overoptimization` found, as a page and as pictures."""

import math

import numpy as np

from minirlhf.lab.common import STYLES, markdown_table
from minirlhf.lab.overoptimization_fit import (
    Curve,
    Fit,
    Peak,
    Study,
    best_of_n_curves,
    best_of_n_peak,
    blocks,
    fit_best_of_n,
    fit_policy,
    matched_gain,
    policy_peak,
)

HEAD = """# How far a reward model can be trusted

Gold: the task's exact utility, gained over the base model. Proxy: the reward model's score, in standard deviations of the base
model's own. d = sqrt(KL from the base model, nats). Setting SIZE-GROUPS: layers x width of the reward model, and the groups of
four replies (six labelled pairs each) that it learnt from; `default` is the reward run itself. Peaks are chosen on one half of
the data and measured on the other; ± is one standard error. PPO here pays nothing for KL, with a constant step size."""


def fitted(fit: Fit) -> list[str]:
    return [f"{fit.alpha:.2f} ± {fit.alpha_se:.2f}", f"{fit.beta:.2f} ± {fit.beta_se:.2f}", f"{fit.r2:.3f}"]


def peak_cells(peak: Peak) -> list[str]:
    return [f"{peak.gold:+.2f} at {peak.d:.1f}", f"{peak.end:+.2f}", f"{peak.fall:.2f} ± {peak.fall_se:.2f}",
            f"{peak.proxy_rise:+.2f} ± {peak.proxy_rise_se:.2f}"]


def overoptimised(peak: Peak) -> bool:
    """Gold fell by more than two standard errors while the proxy rose by more than two."""
    return peak.fall > 2 * peak.fall_se and peak.proxy_rise > 2 * peak.proxy_rise_se


def describe(study: Study) -> str:
    """The page: judges, best of n, PPO, what the penalty does, and each of the paper's statements against these figures."""
    pools = {name: best_of_n_curves(*pool) for name, pool in study.pool.items()}
    peaks = {name: (best_of_n_peak(*pools[name]), policy_peak(study.policies[name, 0.0])) for name in pools}
    fits = {name: (fit_best_of_n(*pools[name][:2]), fit_policy(study.policies[name, 0.0])) for name in pools}
    judges = [[name, f"{row['accuracy']:.3f}", f"{row['ceiling']:.3f}", f"{row['gold_correlation']:.2f}"]
              for name, row in study.judges.items()]
    seen = ["gold at its peak, at d", "at the end", "fall", "proxy meanwhile", "alpha", "beta", "R^2"]
    parts = [HEAD, markdown_table(["reward model", "accuracy", "of at most", "correlation with gold"], judges)]
    for which, title in enumerate(("Best of n: R = d (alpha - beta d)", "PPO: R = d (alpha - beta log d)")):
        table = [[name, *peak_cells(peaks[name][which]), *fitted(fits[name][which])] for name in pools]
        parts += [f"## {title}", markdown_table(["reward model", *seen], table)]
    return "\n\n".join([*parts, *penalties(study), "## What was found", *findings(study, peaks, fits)]) + "\n"


def penalties(study: Study) -> list[str]:
    first = next(iter(study.pool))
    free, table = study.policies[first, 0.0], []
    for (name, kl_coef), curve in study.policies.items():
        if name == first:
            end, gain = blocks(curve, 5), matched_gain(curve, free) if kl_coef else None
            more = [f"{gain[key][0]:+.2f} ± {gain[key][1]:.2f}" for key in ("gold", "proxy")] if gain else ["", ""]
            table.append([f"{kl_coef:g}", f"{end.d[-1]:.1f}", f"{end.gold.max():+.2f}", f"{end.gold[-1]:+.2f}",
                          f"{end.proxy[-1]:+.2f}", *more])
    header = ["kl_coef", "d at the end", "best gold on the way", "gold at the end", "proxy at the end",
              "gold against no penalty at the same d", "proxy"]
    return [f"## The penalty, on {first}", markdown_table(header, table)]


def findings(study: Study, peaks: dict[str, tuple[Peak, Peak]], fits: dict[str, tuple[Fit, Fit]]) -> list[str]:
    """Sentences that the figures decide, each of the paper's statements against what was measured here."""
    names, ways = list(peaks), ("best of n", "PPO")
    first, own = names[0], names[:-1]  # the last is the reward run's own, of another training
    overdone = [sum(overoptimised(pair[i]) for pair in peaks.values()) for i in (0, 1)]
    r2 = [[fits[name][i].r2 for name in names] for i in (0, 1)]
    searched = max(best_of_n_curves(*study.pool[first])[0])
    went = max(study.policies[name, 0.0].d.max() for name in names)
    alphas, error = [fits[name][1].alpha for name in own], max(fits[name][1].alpha_se for name in own)
    lines = ["Over-optimisation, gold falling by more than two standard errors below its peak while the proxy rises by more than "
             f"two: best of n in {overdone[0]} of {len(names)} settings, PPO in {overdone[1]}. With the weakest reward model, "
             f"{first}, under PPO: {'yes' if overoptimised(peaks[first][1]) else 'no'}.",
             f"Best of n reaches d = {searched:.1f} with the whole pool, PPO {went:.1f}: {agree(went > 2 * searched)} that "
             "reinforcement learning spends far more KL."]
    cheaper = 0
    for name in names:
        d, gold, _ = best_of_n_curves(*study.pool[name])
        cheaper += np.interp(peaks[name][1].d, d, gold.mean(0)) > peaks[name][1].gold
    lines.append(f"At the KL of PPO's peak best of n has gained more gold in {cheaper} of {len(names)} settings: "
                 f"{agree(cheaper == len(names))} that it pays less KL for the same optimisation.")
    for i, form in enumerate(("d (alpha - beta d)", "d (alpha - beta log d)")):
        lines.append(f"R = {form} fits {ways[i]} with R^2 from {span(r2[i])}: {agree(min(r2[i]) > 0.9)}, if above 0.9 is to fit.")
    lines.append(f"PPO's alpha goes from {span(alphas)}, with standard errors of up to {error:.2f}: "
                 f"{agree(np.ptp(alphas) < 4 * error)} that it is the same for all reward models.")
    for key, what in enumerate(("A larger reward model", "More preferences")):
        pairs = neighbours(own, key)
        better = [sum(peaks[b][i].gold > peaks[a][i].gold for a, b in pairs) for i in (0, 1)]
        if pairs:
            lines.append(f"{what}: the peak of gold is higher in {better[0]} of {len(pairs)} neighbouring pairs by best of n, in "
                         f"{better[1]} by PPO: {agree(sum(better) == 2 * len(pairs))} that it is better every time.")
    free = study.policies[first, 0.0]
    gains = {kl_coef: matched_gain(curve, free) for (_, kl_coef), curve in study.policies.items() if kl_coef}
    gold, proxy = ([f"{kl_coef:g}" for kl_coef, gain in gains.items() if gain and gain[key][0] > 2 * gain[key][1]]
                   for key in ("gold", "proxy"))
    lines.append("At the same KL, a penalty lifts gold by more than two standard errors for "
                 f"{len(gold)} of {len(gains)} coefficients{' (' + ', '.join(gold) + ')' if gold else ''}, and the proxy for "
                 f"{len(proxy)}: {agree(not gold)} that a penalty does not move the frontier of gold, and "
                 f"{agree(len(proxy) == len(gains))} that it moves that of the proxy. (One run each, and neighbouring blocks of "
                 "a run hang together, so these errors are too small.)")
    return ["\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))]


def agree(yes: bool) -> str:
    return "agrees with the paper" if yes else "disagrees with the paper"


def span(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if np.isfinite(values).all() else "too few points to tell"


def neighbours(names: list[str], key: int) -> list[tuple[str, str]]:
    """Pairs of settings that differ in size (key 0) or groups (key 1) alone, the smaller first; settings are in rising order."""
    parts = [tuple(name.split("-")) for name in names]
    return [("-".join(a), "-".join(b)) for i, a in enumerate(parts) for b in parts[i + 1:]
            if a[1 - key] == b[1 - key] and not any(c[1 - key] == a[1 - key] for c in parts[i + 1: parts.index(b)])]


# ---- pictures --------------------------------------------------------------------------------------------------------

def draw_scores(axes, study: Study) -> None:
    """Gold above, proxy below; best of n to the left, PPO to the right; thin lines: the fits."""
    for number, (name, pool) in enumerate(study.pool.items()):
        colour, line, marker = STYLES[number % len(STYLES)]
        look = dict(color=colour, linestyle=line, marker=marker, markersize=4, linewidth=1.2)
        d, gold, proxy = best_of_n_curves(*pool)
        policy = blocks(study.policies[name, 0.0], 2)
        axes[0][0].plot(d, gold.mean(0), label=name, **look)
        axes[1][0].plot(d, proxy.mean(0), label=name, **look)
        axes[0][1].plot(policy.d, policy.gold, label=name, **look)
        axes[1][1].plot(policy.d, policy.proxy, label=name, **look)
        fits = fit_best_of_n(d, gold), fit_policy(study.policies[name, 0.0])
        for axis, x, fit in zip(axes[0], (d[1:], policy.d), fits, strict=True):
            grid = np.linspace(max(0.05, x.min()), x.max(), 100)
            if not math.isnan(fit.alpha):
                shape = np.log(grid) if axis is axes[0][1] else grid
                axis.plot(grid, grid * (fit.alpha - fit.beta * shape), color=colour, linewidth=0.6)
    for row, label in enumerate(("gold gained over the base model", "proxy score (deviations of the base's)")):
        axes[row][0].set_ylabel(label)
    for column, title in enumerate(("best of n", "PPO without a KL penalty")):
        axes[0][column].set_title(title, fontsize=10)
        axes[1][column].set_xlabel("d = sqrt(KL from the base model), sqrt(nats)")
    tidy([axis for row in axes for axis in row])
    beside(axes[0][1], "reward model")


def draw_penalties(axes, study: Study) -> None:
    """Gold and proxy against d for the weakest reward model, a line per kl_coef."""
    first = next(iter(study.pool))
    runs = {kl_coef: curve for (name, kl_coef), curve in study.policies.items() if name == first}
    for number, (kl_coef, curve) in enumerate(runs.items()):
        colour, line, marker = STYLES[number % len(STYLES)]
        points: Curve = blocks(curve, 2)
        for axis, y in ((axes[0], points.gold), (axes[1], points.proxy)):
            axis.plot(points.d, y, color=colour, linestyle=line, marker=marker, markersize=4, linewidth=1.2, label=f"{kl_coef:g}")
    for axis, label in zip(axes, ("gold gained over the base model", "proxy score (deviations of the base's)"), strict=True):
        axis.set_xlabel("d = sqrt(KL from the base model), sqrt(nats)")
        axis.set_ylabel(label)
        axis.set_xlim(0, 2 * max([curve.d.max() for kl_coef, curve in runs.items() if kl_coef], default=1.0))
    tidy(axes)
    beside(axes[1], f"kl_coef, {first}")


def tidy(axes) -> None:
    for axis in axes:
        axis.axhline(0, color="0.7", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)


def beside(axis, title: str) -> None:
    axis.legend(frameon=False, fontsize=8, title=title, title_fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
