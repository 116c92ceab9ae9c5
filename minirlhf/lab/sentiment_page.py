"""The sentiment lab's measures of responses, its page and its picture."""

from minirlhf.evaluation.policy import EvalResult, fenced
from minirlhf.lab.common import STYLES, markdown_table, mean_interval
from minirlhf.lab.sentiment_task import words
from minirlhf.lab.sweep import show
from minirlhf.run.terminal import shell_command

SHOWN = 20  # test prompts whose responses are printed
COLUMNS = (("ground truth", "gold", "{:+.2f}"), ("score", "score", "{:+.2f}"),
           ("KL, nats", "kl", "{:.1f}"), ("length", "length", "{:.1f}"),
           ("distinct words", "distinct_share", "{:.0%}"),
           ("a word 3 times in a row", "repeats", "{:.1%}"))
CURVES = (("gold", "ground truth (-1 to 1)"), ("score", "score (standard deviations)"),
          ("kl", "KL (nats)"), ("length", "length (tokens)"))


def distinct_words(text: str) -> int:
    return len(set(words(text)))


def repeats(text: str) -> bool:
    """Whether a word occurs three times in a row."""
    found = words(text)
    return any(a == b == c for a, b, c in zip(found, found[1:], found[2:]))


def describe(result: EvalResult) -> dict:
    """Means over the test prompts, and the first responses."""
    texts = result.responses
    means = {key: float(getattr(result, key).mean()) for key in ("gold", "score", "kl", "length")}
    return means | dict(distinct=sum(map(distinct_words, texts)) / len(texts),
                        repeats=sum(map(repeats, texts)) / len(texts),
                        responses=texts[:SHOWN], golds=result.gold[:SHOWN].tolist())


def result_table(base: list[dict], policies: dict[str, list[dict]]) -> str:
    """Base model, best of n, policies: means over seeds with 95% intervals.

    base: a line of runs.jsonl for each seed.  policies: the same, by name.
    """
    lines = {"base model": base}
    for of_seeds in zip(*(row["best_of_n"] for row in base)):
        lines[f"base model, best of {of_seeds[0]['n']}"] = [
            row | dict(kl=row["kl_bound"]) for row in of_seeds]
    lines |= policies
    cells = []
    for name, rows in lines.items():
        if "distinct" in rows[0]:
            rows = [row | dict(distinct_share=row["distinct"] / before["distinct"])
                    for row, before in zip(rows, base)]
        cells.append([name, *(show([row[key] for row in rows], form) if key in rows[0] else ""
                              for _, key, form in COLUMNS)])
    return markdown_table(["", *(title for title, _, _ in COLUMNS)], cells)


def write_page(flags: list[str], about: str, base: list[dict],
               policies: dict[str, list[dict]]) -> str:
    """sentiment.md: the commands, the table, and the responses of seed 0 before and after."""
    models = {"before": base[0]} | {f"after, {name}": rows[0] for name, rows in policies.items()}
    commands = ["python -m minirlhf.lab.sentiment " + shell_command(flags),
                *(row["command"] for row in models.values())]
    accuracy, ceiling = (show([row[key] for row in base], "{:.3f}")
                         for key in ("accuracy", "ceiling"))
    parts = ["The study, and the runs of seed 0:\n\n```", *commands, "```\n",
             f"# Positive sentiment\n\nGround truth: {about} Mean over {len(base)} seeds ± half of "
             "the 95% interval (Student's t), on test prompts. Distinct words: of a response, as a "
             "share of the base model's. The KL of best of n is an upper bound.\n",
             result_table(base, policies),
             f"\nReward model on test pairs: accuracy {accuracy}; the ground truth itself would "
             f"reach {ceiling}.\n\n# Before and after\n\nIn brackets: ground truth."]
    for i, prompt in enumerate(base[0]["prompts"]):
        parts.append(f"\n## {i + 1}\n\n{fenced(prompt)}")
        parts += [f"\n**{name}** ({row['golds'][i]:+.2f})\n\n{fenced(row['responses'][i])}"
                  for name, row in models.items()]
    return "\n".join(parts) + "\n"


def draw(axes, policies: dict[str, list[dict]]) -> None:
    """Metrics of each iteration's responses: means over seeds with 95% intervals."""
    for axis, (key, title) in zip(axes.flat, CURVES):
        for (name, rows), (color, line, _) in zip(policies.items(), STYLES):
            points = [mean_interval(values) for values in zip(*(row["curves"][key]
                                                                for row in rows))]
            x = range(1, len(points) + 1)
            axis.plot(x, [mean for mean, _ in points], line, color=color, label=name)
            axis.fill_between(x, [mean - half for mean, half in points],
                              [mean + half for mean, half in points], color=color, alpha=0.2)
        axis.set(xlabel="iteration", ylabel=title)
    axes.flat[0].legend()
