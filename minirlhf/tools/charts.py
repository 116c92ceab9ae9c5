"""Curves of one or several runs as SVG that goes straight into a page, and takes its colours from the page's style."""

import io
import re
from typing import NamedTuple

Points = list[tuple[float, float]]
COLOURS = tuple(f"#0000{n:02x}" for n in range(1, 9))  # placeholders: the page says what they are, in light and in dark
INK, GRID = "#0000fe", "#0000fd"
NOISY = 150  # more points than this are drawn thin, with their running mean over a fortieth of them on top


POLICY_PANELS = (  # figure, title, what to see in it
    ("gold", "Gold utility", "The truth, on which nobody trains. Marks: held-out prompts, sampled (full) and greedy (open)."),
    ("score", "Score", "What training sees. Where it rises and gold does not, the reward model is being fooled."),
    ("kl", "KL from the base model", "Nats per response: how far the policy went for its score."),
    ("length", "Response length", "Tokens, EOS included."),
    ("eos_rate", "Ended by EOS", "Share of responses; the others were cut."),
    ("entropy", "Entropy", "Nats per token: how much choice is left."),
    ("kl_coef", "KL coefficient", "Fixed, unless there is a KL target."),
    ("explained_variance", "Explained variance", "Of returns, by the value head; 1 is perfect."),
    ("clip_fraction", "Clipped ratios", "Share of tokens whose ratio left the clip range."),
    ("grad_norm", "Gradient norm", "Before clipping."),
    ("tokens_per_second", "Tokens per second", "Over whole iterations."),
)
REWARD_PANELS = (
    ("warmup loss", "Warm-up loss", "Nats per token, of the base language model."),
    ("reward loss", "Preference loss", "0.693 is a coin."),
    ("reward accuracy", "Accuracy in training", "On each batch's own pairs."),
    ("reward grad_norm", "Gradient norm", "Of the reward stage, before clipping."),
)


class Panel(NamedTuple):
    title: str
    explanation: str
    lines: list[tuple[int, Points]]  # (number of the run, points)
    sampled: list[tuple[int, Points]]  # held-out evaluations, as filled marks
    greedy: list[tuple[int, Points]]  # as open marks

    @property
    def constant(self) -> float | None:
        """The one value that everything on it has, if that is so."""
        values = {y for series in (self.lines, self.sampled, self.greedy) for _, points in series for _, y in points}
        return values.pop() if len(values) == 1 else None


def number(value: object) -> float | None:
    """A finite number of a file, or None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 else None


def panels(runs: list[list[dict]], is_policy: bool) -> list[Panel]:
    """Those for which at least one run has something to show. runs: the metrics rows of each."""
    made = []
    for key, title, explanation in POLICY_PANELS if is_policy else REWARD_PANELS:
        stage, _, name = key.rpartition(" ")
        series = [[(i, found) for i, rows in enumerate(runs) if (found := points(rows, wanted, stage))]
                  for wanted in (name, f"eval_sampled_{name}", f"eval_greedy_{name}")]
        if any(series):
            made.append(Panel(title, explanation, *series))
    return made


def points(rows: list[dict], key: str, stage: str) -> Points:
    found = [(number(row.get("step")), number(row.get(key))) for row in rows if row.get("stage", "") == stage]
    return [(x, y) for x, y in found if x is not None and y is not None]


def running_mean(points: Points) -> Points:
    """Each value's mean with the neighbours within half a window, fewer at the ends.

    >>> running_mean([(0, 1.0), (1, 3.0)])
    [(0, 2.0), (1, 2.0)]
    """
    reach, sums = max(1, len(points) // 80), [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    ends = [(max(0, i - reach), min(len(points), i + reach + 1)) for i in range(len(points))]
    return [(x, (sums[high] - sums[low]) / (high - low)) for (x, _), (low, high) in zip(points, ends)]


def load_pyplot():
    """matplotlib's figure class and settings, or None where it is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure, matplotlib.rc_context


def draw(panel: Panel, number: int, x_label: str, pyplot) -> str:
    """One panel as an <svg> element. number: of the panel on the page; its ids begin with it, for ids are the page's."""
    Figure, rc_context = pyplot
    style = {"svg.fonttype": "none", "svg.hashsalt": str(number), "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
             "ytick.color": INK, "axes.edgecolor": GRID, "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False,
             "font.size": 10, "text.parse_math": False}
    with rc_context(style):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(True, linewidth=0.6)
        axes.set_axisbelow(True)
        for run, points in panel.lines:
            colour, noisy = COLOURS[run % len(COLOURS)], len(points) > NOISY
            axes.plot(*zip(*points), color=colour, linewidth=0.6 if noisy else 1.6, alpha=0.35 if noisy else 1.0)
            if noisy:
                axes.plot(*zip(*running_mean(points)), color=colour, linewidth=1.6)
        for marks, fill in ((panel.sampled, None), (panel.greedy, "none")):
            for run, points in marks:
                colour = COLOURS[run % len(COLOURS)]
                axes.plot(*zip(*points), "o", color=colour, markersize=5.5, markerfacecolor=fill or colour)
        axes.set_xlabel(x_label)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="p{number}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>p{number}-", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    for n, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--run{n})")
    return svg.replace(INK, "currentColor").replace(GRID, "var(--line)")
