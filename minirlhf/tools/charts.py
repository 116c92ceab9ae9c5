"""Curves of one or several runs as SVG inside a page, in the colors of the page's style sheet."""

import io
import re
from typing import NamedTuple

Points = list[tuple[float, float]]
COLORS = tuple(f"#0000{n:02x}" for n in range(1, 9))  # replaced by the page's colors of runs
INK = "#0000fe"  # replaced by the page's text color
GRID = "#0000fd"
NOISY = 150  # a curve of more points is drawn thin, with its running mean over it

POLICY_PANELS = (  # metric, title, explanation
    ("gold", "Gold utility", "The ground truth, which training does not use. Marks: held-out "
                             "prompts, sampled (filled) and greedy (open)."),
    ("score", "Score", "The objective of training. If it rises and gold does not, the policy "
                       "exploits errors of the reward model."),
    ("kl", "KL from the base model", "Nats per response."),
    ("length", "Response length", "Tokens, EOS included."),
    ("eos_rate", "Ended by EOS", "Share of responses; the others were cut by length."),
    ("entropy", "Entropy", "Nats per token."),
    ("kl_coef", "KL coefficient", "Constant without a KL target."),
    ("explained_variance", "Explained variance", "Of returns, by the value head; 1 is perfect."),
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
        values = {y for series in (self.lines, self.sampled, self.greedy)
                  for _, points in series for _, y in points}
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
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    means = []
    for i, (x, _) in enumerate(points):
        low = max(0, i - reach)
        high = min(len(points), i + reach + 1)
        means.append((x, (sums[high] - sums[low]) / (high - low)))
    return means


def load_pyplot():
    """matplotlib's Figure and rc_context, or None if it is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure, matplotlib.rc_context


def draw(panel: Panel, number: int, x_label: str, pyplot) -> str:
    """One panel as an <svg> element.

    number: the panel's number on the page; ids start with it, because they must differ.
    """
    Figure, rc_context = pyplot
    style = {"svg.fonttype": "none", "svg.hashsalt": str(number), "text.color": INK,
             "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
             "axes.edgecolor": GRID, "grid.color": GRID, "axes.spines.top": False,
             "axes.spines.right": False, "font.size": 10, "text.parse_math": False}
    with rc_context(style):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        draw_points(panel, figure.add_subplot(), x_label)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="p{number}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>p{number}-", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    for run, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--run{run})")
    return svg.replace(INK, "currentColor").replace(GRID, "var(--line)")


def draw_points(panel: Panel, axes, x_label: str) -> None:
    """Draw the curves and marks of a panel."""
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label)
    for run, points in panel.lines:
        color = COLORS[run % len(COLORS)]
        if len(points) > NOISY:
            axes.plot(*zip(*points), color=color, linewidth=0.6, alpha=0.35)
            points = running_mean(points)
        axes.plot(*zip(*points), color=color, linewidth=1.6)
    for marks, fill in ((panel.sampled, None), (panel.greedy, "none")):
        for run, points in marks:
            color = COLORS[run % len(COLORS)]
            axes.plot(*zip(*points), "o", color=color, markersize=5.5,
                      markerfacecolor=fill or color)
