"""Curves of one or several runs as SVG inside a page, in the colors of the page's style sheet.

Each run has a color, a dash pattern and a shape of marks, so that the curves also differ in gray.
"""

import math
from functools import partial
from typing import NamedTuple

from minirlhf.tools.page import text

Points = list[tuple[float, float]]
WIDTH = 340  # of a chart; this and all coordinates are in the SVG's own units
TOP, BOTTOM, RIGHT = 8, 158, 320  # of the area with the curves
NOISY = 150  # a curve of more points is drawn thin, with its running mean over it
COLORS = 8  # --run0 to --run7 in the style sheet
DASHES = ("none", "7 3", "2 2", "9 3 2 3")
SHAPES = ("m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "m-4-4h8v8h-8z", "m0-5 5 9h-10z",
          "m0-6 5 6-5 6-5-6z", "m0 5 5-9h-10z")  # circle, square, triangle, diamond, triangle

POLICY_PANELS = (  # metric, title, explanation
    ("gold", "Gold utility", "The ground truth, which training does not use. Large marks: "
                             "held-out prompts, sampled (filled) and greedy (open)."),
    ("score", "Score", "The objective of training. If it rises and gold does not, the policy "
                       "exploits errors of the reward model."),
    ("kl", "KL from the base model", "Nats per response."),
    ("length", "Response length", "Tokens, EOS included."),
    ("eos_rate", "Ended by EOS", "Share of responses; the others were cut by length."),
    ("entropy", "Entropy", "Nats per token."),
    ("kl_coef", "KL coefficient", "Constant without a KL target."),
    ("explained_variance", "Explained variance", "Of the returns received, by the value head. "
                                                 "Even the true V stays below 1."),
    ("clip_fraction", "Clipped ratios", "Share of tokens whose ratio is outside the clip range."),
    ("grad_norm", "Gradient norm", "Before clipping."),
    ("tokens_per_second", "Tokens per second", "Of whole iterations."),
)
REWARD_PANELS = (  # stage and metric, title, explanation
    ("sft loss", "Fine-tuning loss", "Nats per token, of the base language model."),
    ("reward loss", "Preference loss", "0.693 is guessing."),
    ("reward accuracy", "Training accuracy", "On each batch's pairs."),
    ("reward grad_norm", "Gradient norm", "Of the reward model, before clipping."),
)


class Panel(NamedTuple):
    """One chart."""

    title: str
    explanation: str
    lines: list[tuple[int, Points]]  # (index of the run, points)
    sampled: list[tuple[int, Points]]  # held-out evaluations, drawn as filled marks
    greedy: list[tuple[int, Points]]  # drawn as open marks

    @property
    def constant(self) -> float | None:
        """The value of all points, or None if they differ."""
        values = {y for _, points in self.lines + self.sampled + self.greedy for _, y in points}
        return values.pop() if len(values) == 1 else None


def number(value: object) -> float | None:
    """A finite number from a file, or None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def make_panels(runs: list[list[dict]], is_policy: bool) -> list[Panel]:
    """All panels for which some run has a point. runs: the metrics rows of each."""
    panels = []
    for key, title, explanation in POLICY_PANELS if is_policy else REWARD_PANELS:
        stage, _, metric = key.rpartition(" ")
        series = []
        for name in (metric, f"eval_sampled_{metric}", f"eval_greedy_{metric}"):
            points = [(run, points_of(rows, name, stage)) for run, rows in enumerate(runs)]
            series.append([(run, some) for run, some in points if some])
        if any(series):
            panels.append(Panel(title, explanation, *series))
    return panels


def points_of(rows: list[dict], key: str, stage: str) -> Points:
    """(step, value) of each row of this stage that has both."""
    points = [(number(row.get("step")), number(row.get(key)))
              for row in rows if row.get("stage", "") == stage]
    return [(x, y) for x, y in points if x is not None and y is not None]


def running_mean(points: Points) -> Points:
    """The mean over a window of about a fortieth of the points around each, shorter at the ends.

    >>> running_mean([(0, 1.0), (1, 3.0)])
    [(0, 2.0), (1, 2.0)]
    """
    reach = max(1, len(points) // 80)
    means = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        means.append((x, sum(window) / len(window)))
    return means


def ticks(low: float, high: float) -> list[float]:
    """At most seven multiples of 1, 2 or 5 times a power of ten. They cover low to high.

    >>> ticks(0.13, 0.52)
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    >>> ticks(7, 7)
    [6.0, 8.0]
    """
    size = max(-low, high)
    size = size if size > 1e-300 else 1.0
    # labels of ten digits could not show a smaller spread
    spread = high - low if high - low > 1e-8 * size else size
    exponent = math.floor(math.log10(spread / 5))
    factor = next((n for n in (1, 2, 5) if n * 10.0**exponent >= spread / 5), 10)
    step = float(f"{factor}e{exponent}")
    first = math.floor(low / step + 1e-9)  # because 0.3 / 0.1 is less than 3
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [float(f"{n * factor}e{exponent}") for n in range(first, last + 1)]


def place(axis: list[float], start: float, end: float, value: float) -> float:
    """The coordinate of a value. start, end: the coordinates of the first and the last tick."""
    return start + (value - axis[0]) / (axis[-1] - axis[0]) * (end - start)


def draw(panel: Panel, names: list[str], x_label: str) -> str:
    """One panel as an <svg> element. names: of all runs of the page; several get a legend."""
    series = panel.lines + panel.sampled + panel.greedy
    xs, ys = zip(*(point for _, points in series for point in points))
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    left = 10 + 6 * max(len(f"{value:.10g}") for value in y_ticks)  # a digit is about 6 wide
    x = partial(place, x_ticks, left, RIGHT)
    y = partial(place, y_ticks, BOTTOM, TOP)
    grid = "".join(f"M{x(value):.1f},{TOP}V{BOTTOM}" for value in x_ticks)
    grid += "".join(f"M{left},{y(value):.1f}H{RIGHT}" for value in y_ticks)
    body = f"<path d='{grid}' style='stroke:var(--line)' stroke-width='0.6'/>"
    body += "".join(write(x(v), BOTTOM + 14, f"{v:.10g}", "middle") for v in x_ticks)
    body += "".join(write(left - 7, y(v) + 3.5, f"{v:.10g}", "end") for v in y_ticks)
    body += write((left + RIGHT) / 2, BOTTOM + 28, x_label, "middle")
    for run, points in panel.lines:
        places = [(x(a), y(b)) for a, b in points]
        if len(places) > NOISY:
            body += polyline(run, places, "stroke-width='0.6' opacity='0.35'")
            places = running_mean(places)
        body += curve(run, places)
    for marks, fill in ((panel.sampled, "currentColor"), (panel.greedy, "none")):
        for run, points in marks:
            body += "".join(mark(run, x(a), y(b), 0.8, fill) for a, b in points)
    height = BOTTOM + 40  # the middle of the next line of the legend
    for run in sorted({run for run, _ in series}) if len(names) > 1 else ():
        body += curve(run, [(6, height), (38, height)]) + write(46, height + 4, names[run][-50:])
        height += 16
    return (f"<svg viewBox='0 0 {WIDTH} {height - 4}' font-size='10' role='img' "
            f"fill='currentColor'><title>{text(panel.title)}</title>{body}</svg>")


def write(x: float, y: float, content: str, anchor: str = "start") -> str:
    """A text at a coordinate. anchor: the part of the text that is there."""
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{text(content)}</text>"


def curve(run: int, places: Points) -> str:
    """A line through coordinates, with the run's dashes, and a small mark at its end."""
    style = f"stroke-width='1.6' stroke-dasharray='{DASHES[run % len(DASHES)]}'"
    return polyline(run, places, style) + mark(run, *places[-1], 0.5, "currentColor")


def polyline(run: int, places: Points, style: str) -> str:
    """A line through coordinates."""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return in_color(run, f"<polyline points='{points}' fill='none' {style}")


def mark(run: int, x: float, y: float, size: float, fill: str) -> str:
    """The run's shape around a coordinate."""
    style = f"transform='translate({x:.1f},{y:.1f}) scale({size})' fill='{fill}'"
    return in_color(run, f"<path d='{SHAPES[run % len(SHAPES)]}' {style}")


def in_color(run: int, element: str) -> str:
    """An unfinished element with the run's color, closed."""
    return f"{element} stroke='currentColor' style='color:var(--run{run % COLORS})'/>"


def line_sample(run: int) -> str:
    """A piece of the run's line as an <svg> element, for a list of runs."""
    return f"<svg width='40' height='12' aria-hidden='true'>{curve(run, [(0, 6), (34, 6)])}</svg>"
