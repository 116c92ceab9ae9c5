"""A policy against the base model it came from, at the same decoding: sharpening is not alignment."""

import math
from typing import NamedTuple

import numpy as np

from minirlhf.environment import Environment, Prompts, sample_responses
from minirlhf.evaluate import interval, standard_error
from minirlhf.log import printable
from minirlhf.model import Transformer
from minirlhf.rollout import sequence_kl

DECODINGS = ("sampled", "greedy")  # at the temperature of training, and the most likely token at each step


class Judged(NamedTuple):
    """One decoding of one model on the evaluation prompts, a figure per prompt."""

    responses: list[str]
    score: np.ndarray
    gold: np.ndarray | None
    kl: np.ndarray  # nats, over the full vocabulary, summed over the response
    length: np.ndarray
    finished: np.ndarray

    @property
    def worth(self) -> np.ndarray:
        """By which responses are compared: gold where the task has it, else the score."""
        return self.score if self.gold is None else self.gold


def judge(model: Transformer, world: Environment, prompts: Prompts, greedy: bool, purpose: str) -> Judged:
    """Answer the prompts in batches and measure everything that is measured per response."""
    parts: list[tuple] = []
    for start in range(0, len(prompts.texts), 128):
        some = range(start, min(start + 128, len(prompts.texts)))
        samples = sample_responses(model, *prompts.rows(some), world.sampling, purpose, rows=None if greedy else list(some))
        divergence = sequence_kl(model, world.base, samples[3:], world.sampling.temperature)
        parts.append((samples.responses, world.scorer(samples).tolist(), samples.gold(world.task) or [],
                      divergence.tolist(), samples.response_mask.sum(1).tolist(), samples.finished))
    responses, *figures = ([x for part in column for x in part] for column in zip(*parts))
    score, gold, kl, length, finished = map(np.array, figures)
    return Judged(responses, score, gold if len(gold) else None, kl, length, finished)


def summarise(judged: Judged, base: Judged) -> dict:
    """The figures of one row of the table; base: the base model at the same decoding, on the same prompts."""
    wins = np.where(judged.worth == base.worth, 0.5, judged.worth > base.worth)
    win_rate, low, high = interval(wins)
    row = dict(score=judged.score.mean(), score_se=standard_error(judged.score), kl=judged.kl.mean(),
               length=judged.length.mean(), eos_rate=judged.finished.mean(), win_rate=win_rate, win_low=low, win_high=high)
    if judged.gold is not None:
        row |= dict(gold=judged.gold.mean(), gold_se=standard_error(judged.gold))
    return {key: float(value) for key, value in row.items()}


def best_of_n(world: Environment, prompts: Prompts, counts: tuple[int, ...]) -> list[dict]:
    """The base model's best of n samples by score, for each n: what search alone reaches, without training.

    Its KL from the base model is at most log n - (n - 1) / n nats (Stiennon et al. 2020; a bound: Beirami et al. 2024).
    """
    rows = list(range(len(prompts.texts)))
    draws = [sample_responses(world.base, prompts.texts, prompts.ids, world.sampling, "best of n", draw, rows)
             for draw in range(max(counts))]
    scores = np.array([world.scorer(samples).tolist() for samples in draws])  # [n, prompts]
    gold = np.array([samples.gold(world.task) or [] for samples in draws])
    table = []
    for n in counts:
        best = scores[:n].argmax(axis=0)
        row = dict(n=n, kl_bound=math.log(n) - (n - 1) / n, score=float(scores[:n].max(axis=0).mean()))
        if gold.size:
            row["gold"] = float(gold[best, rows].mean())
        table.append(row)
    return table


class Referee:
    """Judges a policy on the held-out prompts again and again; what the base model says there is sampled once."""

    def __init__(self, world: Environment, prompts: Prompts, purpose: str):
        self.world, self.prompts, self.purpose = world, prompts, purpose
        self.base = {decoding: judge(world.base, world, prompts, decoding == "greedy", purpose) for decoding in DECODINGS}

    def judge(self, policy: Transformer) -> dict[str, Judged]:
        return {decoding: judge(policy, self.world, self.prompts, decoding == "greedy", self.purpose) for decoding in DECODINGS}

    def figures(self, judged: dict[str, Judged]) -> dict[str, float]:
        """{"sampled_gold": ..., "greedy_win_rate": ...}: both decodings in one flat row."""
        return {f"{decoding}_{key}": value for decoding in DECODINGS
                for key, value in summarise(judged[decoding], self.base[decoding]).items()}


def closing_table(world: Environment, policy: Transformer, best_of: int) -> tuple[dict, str, str]:
    """(figures, the table as text, samples.md) on the test prompts: base and policy, sampled and greedy, best of n beside."""
    referee = Referee(world, world.test, "test")
    judged = referee.judge(policy)
    figures = {f"base_{key}": value for key, value in referee.figures(referee.base).items()} | referee.figures(judged)
    best, task = None, world.task
    if task and hasattr(task, "gold") and hasattr(task, "best_response"):
        best = float(np.mean([task.gold(prompt, task.best_response(prompt)) for prompt in world.test.texts]))
        figures["best_gold"] = best
        for decoding in DECODINGS:
            base = figures[f"base_{decoding}_gold"]
            figures[f"{decoding}_gap_closed"] = (figures[f"{decoding}_gold"] - base) / (best - base)
    rows = [text_row(f"{name}, {decoding}", {k.removeprefix(prefix): v for k, v in figures.items() if k.startswith(prefix)})
            for name, mark in (("base", "base_"), ("policy", "")) for decoding in DECODINGS for prefix in [f"{mark}{decoding}_"]]
    for row in best_of_n(world, world.test.first(best_of), (1, 4, 16)) if best_of else []:
        figures |= {f"best_of_{row['n']}_{key}": value for key, value in row.items() if key != "n"}
        rows.append(text_row(f"base, best of {row['n']}", row))
    if best is not None:
        rows.append(text_row("best possible", dict(gold=best)))
    by = "gold utility" if referee.base["sampled"].gold is not None else "score, that is by the model it was trained on"
    head = f"{len(world.test.texts)} test prompts; wins against the base model at the same decoding, judged by {by}\n"
    table = head + text_row("", {key: key for key, _ in COLUMNS}) + "\n" + "\n".join(rows)
    for decoding in DECODINGS:
        if f"{decoding}_gap_closed" in figures:
            table += f"\nshare of the gap from base to best possible closed, {decoding}: {figures[f'{decoding}_gap_closed']:.0%}"
    return figures, table, samples_page(world.test.texts, referee.base["sampled"], judged["sampled"])


COLUMNS = (("gold", "{:+.2f}"), ("gold_se", "{:.2f}"), ("score", "{:+.2f}"), ("kl", "{:.1f}"), ("kl_bound", "{:.1f}"),
           ("length", "{:.1f}"), ("eos_rate", "{:.1%}"), ("win_rate", "{:.1%}"), ("win_low", "{:.1%}"), ("win_high", "{:.1%}"))


def text_row(name: str, row: dict) -> str:
    cells = [row.get(key, "") for key, _ in COLUMNS]
    return f"{name:<18}" + "".join(f"{x if isinstance(x, str) else form.format(x):>10}" for x, (_, form) in zip(cells, COLUMNS))


def samples_page(prompts: list[str], before: Judged, after: Judged, count: int = 8) -> str:
    """Markdown: what the base model and the policy said to the same prompts, with the same random numbers."""
    parts = ["# Before and after\n"]
    for i in range(min(count, len(prompts))):
        parts.append(f"## {i + 1}\n\n{fenced(prompts[i])}\n")
        for name, judged in (("before", before), ("after", after)):
            gold = "" if judged.gold is None else f", gold {judged.gold[i]:+.1f}"
            parts.append(f"**{name}** (score {judged.score[i]:+.2f}{gold})\n\n{fenced(judged.responses[i].strip())}\n")
    return "\n".join(parts)


def fenced(text: str) -> str:
    """A code fence longer than any in the text, so that no text of a model's can end it."""
    text = printable(text)
    ticks = "```"
    while ticks in text:
        ticks += "`"
    return f"{ticks}text\n{text}\n{ticks}"
