"""Evaluation of a policy: compared with the base model, with the same decoding method."""

import math
import re
from typing import NamedTuple

from minirlhf.data.prompts import Prompts
from minirlhf.evaluation.statistics import share_interval, standard_error
from minirlhf.model import Transformer
from minirlhf.rl.reward import score_responses
from minirlhf.rl.rollout import sequence_kl
from minirlhf.rl.sampling import gold_utility, sample_responses
from minirlhf.rl.task import Task
from minirlhf.run.terminal import printable

import numpy as np

DECODINGS = ("sampled", "greedy")  # the two decoding methods
BATCH = 128  # prompts at a time
BEST_OF = (1, 4, 16)  # rows of the final table


class EvalResult(NamedTuple):
    """One decoding method of one model on N prompts, one number for each."""

    responses: list[str]
    score: np.ndarray | None  # None without a reward model
    gold: np.ndarray | None  # None if the task does not know it
    # nats, summed over the response: KL from the base model at the temperature of evaluation,
    # before top-k and top-p
    kl: np.ndarray
    length: np.ndarray
    finished: np.ndarray

    @property
    def utility(self) -> np.ndarray | None:
        """What responses are compared by: gold if the task has it, otherwise the score."""
        return self.score if self.gold is None else self.gold


def row_batches(count: int) -> list[list[int]]:
    """The row numbers 0 to count - 1, at most BATCH at a time: more could fill the memory.

    >>> [len(rows) for rows in row_batches(300)]
    [128, 128, 44]
    """
    return [list(range(count))[start:start + BATCH] for start in range(0, count, BATCH)]


def evaluate_decoding(model: Transformer, task: Task, prompts: Prompts, greedy: bool,
                      purpose: str) -> EvalResult:
    """Answer the prompts in batches and measure every response."""
    responses, score, gold, kl, length, finished = [], [], [], [], [], []
    decoder = model.for_decoding()
    for rows in row_batches(len(prompts.texts)):
        samples = sample_responses(decoder, prompts.rows(rows), task.evaluation, purpose,
                                   rows=None if greedy else rows)
        responses += samples.responses
        if task.reward.source is not None:
            score += score_responses(task.reward, samples).tolist()
        gold += gold_utility(samples, task.ground_truth) or []
        kl += sequence_kl(model, task.base, samples, task.evaluation.temperature).tolist()
        length += samples.response_mask.sum(1).tolist()
        finished += samples.finished
    return EvalResult(responses, np.array(score) if score else None,
                      np.array(gold) if gold else None,
                      np.array(kl), np.array(length), np.array(finished))


def summarize(result: EvalResult, base: EvalResult) -> dict[str, float]:
    """Means over prompts, and the win rate against the base model with the same decoding."""
    row = dict(kl=result.kl.mean(), length=result.length.mean(), eos_rate=result.finished.mean())
    if result.score is not None:
        row |= dict(score=result.score.mean(), score_se=standard_error(result.score))
    if result.utility is not None:
        # Equal responses of two batches may have scores that differ by rounding.
        are_equal = np.array(result.responses) == np.array(base.responses)
        are_equal &= result.finished == base.finished
        is_tie = are_equal | (result.utility == base.utility)
        wins = np.where(is_tie, 0.5, result.utility > base.utility)
        row |= dict(zip(("win_rate", "win_low", "win_high"), share_interval(wins)))
    if result.gold is not None:
        row |= dict(gold=result.gold.mean(), gold_se=standard_error(result.gold))
    return {key: float(value) for key, value in row.items()}


class Evaluator:
    """Evaluates a policy on the same prompts again and again; the base model is sampled once."""

    def __init__(self, task: Task, prompts: Prompts, purpose: str):
        self.task = task
        self.prompts = prompts
        self.purpose = purpose
        self.base = self.evaluate(task.base)

    def evaluate(self, policy: Transformer) -> dict[str, EvalResult]:
        """One result for each decoding method."""
        return {decoding: evaluate_decoding(policy, self.task, self.prompts, decoding == "greedy",
                                            self.purpose)
                for decoding in DECODINGS}

    def metrics(self, results: dict[str, EvalResult]) -> dict[str, float]:
        """Both decoding methods in one row: {"sampled_gold": ..., "greedy_win_rate": ...}."""
        row: dict[str, float] = {}
        for decoding in DECODINGS:
            summary = summarize(results[decoding], self.base[decoding])
            row |= {f"{decoding}_{key}": value for key, value in summary.items()}
        return row


def best_of_n(task: Task, prompts: Prompts, counts: tuple[int, ...]) -> list[dict]:
    """The base model's best of n samples by score, for each n in counts, without any training.

    Its KL from the base model is at most log n - (n - 1) / n nats (Stiennon et al. 2020; proof that
    it is a bound: Beirami et al. 2024).
    """
    base = task.base.for_decoding()
    score_parts, gold_parts = [], []
    for rows in row_batches(len(prompts.texts)):
        samples = [sample_responses(base, prompts.rows(rows), task.evaluation, "best of n", number,
                                    rows)
                   for number in range(max(counts))]
        score_parts.append([score_responses(task.reward, each).tolist() for each in samples])
        gold_parts.append([gold_utility(each, task.ground_truth) or [] for each in samples])
    scores = np.concatenate(score_parts, axis=1)  # [max(counts), prompts]
    gold = np.concatenate(gold_parts, axis=1)
    table = []
    for n in counts:
        best = scores[:n].argmax(axis=0)
        row = dict(n=n, kl_bound=math.log(n) - (n - 1) / n,
                   score=float(scores[:n].max(axis=0).mean()))
        if gold.size:
            row["gold"] = float(gold[best, range(len(best))].mean())
        table.append(row)
    return table


# ---- the final table -----------------------------------------------------------------------------


def final_evaluation(task: Task, policy: Transformer, best_of: int) -> tuple[dict, str, str]:
    """(metrics, the table as text, samples.md) on the test prompts.

    best_of: the number of prompts for the best-of-n rows, 0 for none.
    """
    evaluator = Evaluator(task, task.test, "test")
    results = evaluator.evaluate(policy)
    base_row = evaluator.metrics(evaluator.base)
    metrics = {f"base_{key}": value for key, value in base_row.items()}
    metrics |= evaluator.metrics(results)
    metrics |= gap_closed(task, metrics)
    if best_of and task.reward.source is not None:
        for row in best_of_n(task, task.test.first(best_of), BEST_OF):
            metrics |= {f"best_of_{row['n']}_{key}": row[key] for key in row if key != "n"}
    table = format_table(metrics, len(task.test.texts))
    if "best_of_1_score" in metrics and best_of < len(task.test.texts):
        table += f"\nbest of n: on the first {best_of} of these prompts"
    page = samples_page(task.test.texts, evaluator.base["sampled"], results["sampled"])
    return metrics, table, page


def gap_closed(task: Task, metrics: dict) -> dict:
    """best_gold, and the share of the gap from base to best possible that the policy closes."""
    truth = task.ground_truth
    if truth is None or not (hasattr(truth, "gold") and hasattr(truth, "best_response")):
        return {}
    best = float(np.mean([truth.gold(prompt, truth.best_response(prompt), True)
                          for prompt in task.test.texts]))
    row = dict(best_gold=best)
    for decoding in DECODINGS:
        base = metrics[f"base_{decoding}_gold"]
        gain = metrics[f"{decoding}_gold"] - base
        if best > base:  # otherwise there is no gap
            row[f"{decoding}_gap_closed"] = gain / (best - base)
    return row


COLUMNS = (("gold", "{:+.2f}"), ("gold_se", "{:.2f}"), ("score", "{:+.2f}"), ("kl", "{:.1f}"),
           ("kl_bound", "{:.1f}"), ("length", "{:.1f}"), ("eos_rate", "{:.1%}"),
           ("win_rate", "{:.1%}"), ("win_low", "{:.1%}"), ("win_high", "{:.1%}"))
# row of the table -> what the names of its metrics begin with
ROWS = {**{f"base, {decoding}": f"base_{decoding}_" for decoding in DECODINGS},
        **{f"policy, {decoding}": f"{decoding}_" for decoding in DECODINGS},
        **{f"base, best of {n}": f"best_of_{n}_" for n in BEST_OF},
        "best possible": "best_"}


def format_table(metrics: dict, prompts: int) -> str:
    """The final table as text."""
    columns = [(key, form) for key, form in COLUMNS
               if any(prefix + key in metrics for prefix in ROWS.values())]
    table = {"": [key for key, _ in columns]}
    for name, prefix in ROWS.items():
        table[name] = [form.format(metrics[prefix + key]) if prefix + key in metrics else ""
                       for key, form in columns]
    lines = [f"{name:<18}" + "".join(f"{cell:>10}" for cell in cells)
             for name, cells in table.items() if any(cells)]
    for decoding in DECODINGS:
        if f"{decoding}_gap_closed" in metrics:
            closed = metrics[f"{decoding}_gap_closed"]
            lines.append(f"gap from base to best possible closed, {decoding}: {closed:.0%}")
    by = "gold utility" if "sampled_gold" in metrics else "score (the task has no gold utility)"
    wins = "no reward model and no gold utility, so nothing to compare responses by"
    if "sampled_win_rate" in metrics:
        wins = f"wins against the base model at the same decoding, by {by}"
    head = f"{prompts} test prompts; {wins}"
    return "\n".join([head, *lines])


def samples_page(prompts: list[str], before: EvalResult, after: EvalResult, count: int = 8) -> str:
    """Markdown: responses of base model and policy to the same prompts, from the same uniforms."""
    parts = ["# Before and after\n"]
    for i in range(min(count, len(prompts))):
        parts.append(f"## {i + 1}\n\n{fenced(prompts[i])}\n")
        for name, result in (("before", before), ("after", after)):
            numbers = [] if result.score is None else [f"score {result.score[i]:+.2f}"]
            numbers += [] if result.gold is None else [f"gold {result.gold[i]:+.1f}"]
            shown = f" ({', '.join(numbers)})" if numbers else ""
            response = fenced(result.responses[i].strip())
            parts.append(f"**{name}**{shown}\n\n{response}\n")
    return "\n".join(parts)


def fenced(text: str) -> str:
    """The text in a code fence longer than any in it, so that it cannot end the fence."""
    text = printable(text)
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"
