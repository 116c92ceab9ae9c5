"""What `minirlhf.lab.variance` found, as a page and as pictures."""

import numpy as np
import torch

from minirlhf.environment import Environment, Prompts, sample_responses
from minirlhf.evaluate import interval
from minirlhf.lab.common import STYLES, markdown_table
from minirlhf.ladder import LADDER
from minirlhf.log import printable
from minirlhf.model import Transformer
from minirlhf.rollout import evaluate_actions
from minirlhf.tokenizer import decode

PAIRS = (("reinforce", "reward-to-go"), ("reward-to-go", "baseline"), ("reinforce", "baseline"), ("baseline", "gae"),
         ("reinforce", "rloo"), ("rloo", "baseline"))
HEAD = """# The variance of the gradient

{batches} batches of {batch_size} replies ({group_size} per prompt), the same for every rung; on-policy, without whitening. The
true gradient is the mean of `baseline` over {reference_batches} other batches. `ppo` is `gae` here: before the first step its
ratio is 1. Norm: of one batch's gradient. Variance: trace of the covariance. Signal to noise: |mean|^2 / variance of one batch.
Bias: |mean - true|^2 as a share of |true|^2, noise taken off, so that it can come out below 0. `grpo` has units of its own, so
for it only signal to noise and cosine compare. 95% intervals, bootstrap over batches; ratios resample both rungs in pairs.
Settings: "score" is the reward model's score on the last token, "dense" the change of gold with each sentence."""


def variance_ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """(ratio of two variances, low, high) from the squared deviations of two rungs on the same batches, resampled in pairs."""
    above, below = np.array(above), np.array(below)
    return interval(above / below, below)


def show(triple, form: str) -> str:
    return f"{form.format(triple[0])} [{form.format(triple[1])}, {form.format(triple[2])}]"


def describe(names: list[str], rows: dict[str, dict], settings: dict) -> str:
    """The page: a table of rungs and one of paired ratios for each setting (policy, reward)."""
    parts = [HEAD.format(**settings)]
    for name in names:
        found = {rung: rows[f"{name}: {rung}"] for rung in LADDER}
        table = [[f"`{rung}`", f"{row['norm']:.3g}", show(interval(np.array(row["deviations"])), "{:.3g}"),
                  show(row["signal_to_noise"], "{:.3g}"), show(row["bias"], "{:+.3f}"), show(row["cosine"], "{:.3f}")]
                 for rung, row in found.items()]
        spread = {rung: row["deviations"] for rung, row in found.items()}
        ratios = [[f"`{a}` / `{b}`", show(variance_ratio(spread[a], spread[b]), "{:.3f}")] for a, b in PAIRS]
        parts += [f"## {name}", f"V explains {found['baseline']['explained']:.0%} of the variance of reward-to-go.",
                  markdown_table(["rung", "norm", "variance", "signal to noise", "bias", "cosine with the true gradient"], table),
                  markdown_table(["variances on the same batches", "ratio"], ratios)]
    return "\n\n".join(parts) + "\n"


def draw_variances(axes, names: list[str], rows: dict[str, dict]) -> None:
    """Left: the variance of each rung's gradient. Right: signal to noise. A marker per setting, 95% intervals."""
    labels = ("variance of a batch's gradient (log)", "signal to noise, |mean|² / variance (log)")
    for side, axis in enumerate(axes):
        for number, name in enumerate(names):
            colour, _, marker = STYLES[(0, 4, 2, 5)[number]]
            for place, rung in enumerate(LADDER):
                row = rows[f"{name}: {rung}"]
                mean, low, high = interval(np.array(row["deviations"])) if side == 0 else row["signal_to_noise"]
                floor = 1e-9  # of a logarithmic axis: a noisy estimate of a ratio may be negative
                mean, low, high = max(mean, floor), max(low, floor), max(high, floor)
                y, error = place + 0.16 * (number - (len(names) - 1) / 2), [[max(0, mean - low)], [max(0, high - mean)]]
                axis.errorbar(mean, y, xerr=error, color=colour, marker=marker, markersize=5, capsize=2, linewidth=1,
                              linestyle="none", label=name if place == 0 else None)
        axis.set_xscale("log")
        axis.set_xlabel(labels[side])
        axis.set_yticks(range(len(LADDER)), LADDER if side == 0 else [""] * len(LADDER))
        axis.invert_yaxis()
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


@torch.no_grad()
def draw_values(axes, world: Environment, value: Transformer, draws: int = 64) -> None:
    """V(s_t) before each token of the best and of the worst, by gold, of the base model's replies to one test prompt."""
    prompts = Prompts([world.test.texts[0]] * draws, [world.test.ids[0]] * draws)
    samples = sample_responses(world.base, *prompts, world.sampling, "values", 0, rows=list(range(draws)))
    worth, scores = samples.gold(world.task), world.scorer(samples).tolist()
    values = evaluate_actions(value, *samples[3:], world.sampling.temperature)[1]
    picks = dict(good=int(np.argmax(worth)), bad=int(np.argmin(worth)))
    shown = [values[row][samples.response_mask[row]] for row in picks.values()]
    levels = [float(x) for part in shown for x in part] + [scores[row] for row in picks.values()]
    for axis, (name, row) in zip(axes, picks.items(), strict=True):
        ids = samples.response_ids[row][samples.response_mask[row]].tolist()
        tokens = [printable(decode(world.sampling.encoding, [token]).strip()) or "(end)" for token in ids]
        axis.plot(range(len(ids)), values[row, : len(ids)], color=STYLES[0 if name == "good" else 4][0], marker="o", markersize=3)
        average = float(np.mean(scores))
        for level, text in ((average, "mean score of the\nbase model's replies"), (scores[row], "score of this reply")):
            axis.axhline(level, color="0.6", linewidth=0.8, linestyle="--")
            axis.annotate(text, (1.0, level), xycoords=("axes fraction", "data"), xytext=(2, 0), textcoords="offset points",
                          fontsize=7, va="center")
        axis.set_ylim(min(levels) - 0.3, max(levels) + 0.3)
        axis.set_xticks(range(len(ids)), tokens, rotation=90, fontsize=6)
        title = f"a {name} reply (gold {worth[row]:+.1f}) to: {world.test.texts[0].splitlines()[0]}"
        axis.set_title(title, fontsize=8, loc="left")
        axis.set_ylabel("V(s): expected score", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("the token that is said next, at each state", fontsize=8)
