"""The results of `minirlhf.lab.variance` as a page and as pictures."""

from minirlhf.data.tokenizer import decode
from minirlhf.evaluation.statistics import bootstrap_interval
from minirlhf.lab.common import STYLES, markdown_table
from minirlhf.model import Transformer
from minirlhf.rl.algorithms import ALGORITHMS
from minirlhf.rl.reward import score_responses
from minirlhf.rl.rollout import evaluate_actions
from minirlhf.rl.sampling import gold_utility, sample_responses
from minirlhf.rl.task import Task
from minirlhf.run.terminal import printable

import numpy as np
import torch

PAIRS = (("reinforce", "reward-to-go"), ("reward-to-go", "baseline"), ("reinforce", "baseline"),
         ("baseline", "gae"), ("reinforce", "rloo"), ("rloo", "baseline"))
HEAD = """# The variance of the gradient

{batches} batches of {batch_size} responses ({group_size} to each prompt), the same for every \
algorithm; on-policy, without whitening. The true gradient is the mean gradient of `baseline` over \
{reference_batches} other batches. `ppo` equals `gae` here, because the importance ratio is 1 \
before the first step.

- Norm: of the gradient of one batch.
- Variance: the trace of the covariance.
- Signal to noise: |mean|^2 / variance of one batch.
- Bias: |mean - true|^2 / |true|^2, an unbiased estimate, which can be below 0.
- `grpo` has other units, so only its signal to noise and its cosine can be compared.
- 95% intervals: bootstrap over batches. Ratios resample both algorithms together.
- "score": the reward is the reward model's score on the last token. "dense": the reward is the \
change of gold utility at the end of each sentence. Both include the KL terms, which are 0 at the \
base model."""

Interval = tuple[float, float, float]  # estimate, low, high


def variance_ratio(above: list[float], below: list[float]) -> Interval:
    """Ratio of two variances, from squared deviations on the same batches, resampled together."""
    denominators = np.array(below)
    return bootstrap_interval(np.array(above) / denominators, denominators)


def format_interval(interval: Interval, form: str) -> str:
    estimate, low, high = (form.format(x) for x in interval)
    return f"{estimate} [{low}, {high}]"


def describe(names: list[str], rows: dict[str, dict], settings: dict) -> str:
    """The page: for each setting (policy, reward) a table of algorithms and one of ratios."""
    parts = [HEAD.format(**settings)]
    for name in names:
        results = {algorithm: rows[f"{name}: {algorithm}"] for algorithm in ALGORITHMS}
        table = []
        for algorithm, row in results.items():
            variance = bootstrap_interval(np.array(row["deviations"]))
            table.append([f"`{algorithm}`", f"{row['norm']:.3g}",
                          format_interval(variance, "{:.3g}"),
                          format_interval(row["signal_to_noise"], "{:.3g}"),
                          format_interval(row["bias"], "{:+.3f}"),
                          format_interval(row["cosine"], "{:.3f}")])
        ratios = []
        for a, b in PAIRS:
            ratio = variance_ratio(results[a]["deviations"], results[b]["deviations"])
            ratios.append([f"`{a}` / `{b}`", format_interval(ratio, "{:.3f}")])
        explained = results["baseline"]["explained"]
        parts += [f"## {name}", f"V explains {explained:.0%} of the variance of reward-to-go.",
                  markdown_table(["algorithm", "norm", "variance", "signal to noise", "bias",
                                  "cosine with the true gradient"], table),
                  markdown_table(["variances on the same batches", "ratio"], ratios)]
    return "\n\n".join(parts) + "\n"


def draw_variances(axes, names: list[str], rows: dict[str, dict]) -> None:
    """Left: variance of each gradient. Right: signal to noise. One marker for each setting."""
    floors = 0.0, 1e-3  # of a logarithmic axis: a noisy signal-to-noise ratio may be negative
    labels = ("variance of a batch's gradient (log)", "signal to noise, |mean|² / variance (log)")
    for side, axis in enumerate(axes):
        for number, name in enumerate(names):
            color, _, marker = STYLES[(0, 4, 2, 5)[number]]
            for place, algorithm in enumerate(ALGORITHMS):
                row = rows[f"{name}: {algorithm}"]
                interval = row["signal_to_noise"]
                if side == 0:
                    interval = bootstrap_interval(np.array(row["deviations"]))
                estimate, low, high = (max(x, floors[side]) for x in interval)
                error = [[max(0, estimate - low)], [max(0, high - estimate)]]
                y = place + 0.16 * (number - (len(names) - 1) / 2)
                axis.errorbar(estimate, y, xerr=error, color=color, marker=marker, markersize=5,
                              capsize=2, linewidth=1, linestyle="none",
                              label=name if place == 0 else None)
        axis.set_xscale("log")
        axis.set_xlabel(labels[side])
        axis.set_yticks(range(len(ALGORITHMS)),
                        ALGORITHMS if side == 0 else [""] * len(ALGORITHMS))
        axis.invert_yaxis()
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


@torch.no_grad()
def draw_values(axes, task: Task, value: Transformer, draws: int = 64) -> None:
    """V(s_t) before each token, of the base model's best and worst response to a test prompt."""
    prompts = task.test.rows([0] * draws)
    samples = sample_responses(task.base, prompts, task.sampling, "values", 0, list(range(draws)))
    gold = gold_utility(samples, task.ground_truth)
    scores = score_responses(task.reward, samples).tolist()
    mean_score = float(np.mean(scores))
    _, values, _ = evaluate_actions(value, samples, task.sampling.temperature)
    rows = dict(good=int(np.argmax(gold)), bad=int(np.argmin(gold)))
    heights = [mean_score]
    for row in rows.values():
        heights += [scores[row], *values[row][samples.response_mask[row]].tolist()]
    for axis, (name, row) in zip(axes, rows.items()):
        ids = samples.response_ids[row][samples.response_mask[row]].tolist()
        tokens = [printable(decode(task.sampling.encoding, [token]).strip()) or "(end)"
                  for token in ids]
        axis.plot(range(len(ids)), values[row, : len(ids)], marker="o", markersize=3,
                  color=STYLES[0 if name == "good" else 4][0])
        for height, text in ((mean_score, "mean score of the\nbase model's responses"),
                             (scores[row], "score of this response")):
            axis.axhline(height, color="0.6", linewidth=0.8, linestyle="--")
            axis.annotate(text, (1.0, height), xycoords=("axes fraction", "data"), xytext=(2, 0),
                          textcoords="offset points", fontsize=7, va="center")
        axis.set_ylim(min(heights) - 0.3, max(heights) + 0.3)
        axis.set_xticks(range(len(ids)), tokens, rotation=90, fontsize=6)
        first_line = prompts.texts[0].splitlines()[0]
        axis.set_title(f"a {name} response (gold {gold[row]:+.1f}) to: {first_line}", fontsize=8,
                       loc="left")
        axis.set_ylabel("V(s): expected score", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("next token of each state", fontsize=8)
