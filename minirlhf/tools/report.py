"""One HTML page about runs: `python -m minirlhf.tools.report runs/NAME [runs/OTHER ...]`

It shows curves, final metrics, samples and settings. It is one file without scripts or downloads.
All texts of models and files are escaped, so that they cannot become markup.
"""

import errno
import json
from pathlib import Path
from typing import NamedTuple

from minirlhf.evaluation.policy import ROWS
from minirlhf.run.command_line import Parser, one_line_errors
from minirlhf.run.errors import UserError
from minirlhf.run.files import check_output, read_file, write_atomically
from minirlhf.run.terminal import echo
from minirlhf.tools.charts import draw, line_sample, make_panels, number
from minirlhf.tools.page import STYLE, sample_blocks, table, text

# (key, name on the page, format)
POLICY_METRICS = (
    ("gold", "gold", "{:+.2f}"), ("gold_se", "±", "{:.2f}"), ("score", "score", "{:+.2f}"),
    ("kl", "KL, nats", "{:.1f}"), ("length", "length", "{:.1f}"),
    ("eos_rate", "ended by EOS", "{:.1%}"), ("win_rate", "wins", "{:.1%}"),
    ("win_low", "from", "{:.1%}"), ("win_high", "to", "{:.1%}"),
    ("gap_closed", "gap closed", "{:.0%}"))
REWARD_METRICS = (
    ("accuracy", "accuracy", "{:.3f}"), ("accuracy_low", "from", "{:.3f}"),
    ("accuracy_high", "to", "{:.3f}"), ("ceiling", "ceiling", "{:.3f}"),
    ("gold_correlation", "correlation with gold", "{:.2f}"), ("loss", "loss", "{:.3f}"),
    ("calibration_error", "calibration error", "{:.3f}"), ("pairs", "pairs", "{:.0f}"))
FIRST_WORDS = "<!doctype html><html lang=en><head><!-- minirlhf -->"  # of every page


class RunFiles(NamedTuple):
    """The contents of a run folder. None of it is trusted."""

    name: str
    settings: dict
    facts: dict
    rows: list[dict]  # of metrics
    result: dict
    samples: str

    @property
    def is_policy(self) -> bool:
        return "algorithm" in self.settings


def read_run(folder: Path) -> RunFiles:
    """Read a finished or unfinished run. Raises UserError if the folder is not a run."""
    def read(name: str) -> str:
        try:
            return read_file(folder / name).decode(errors="replace")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL):
                raise  # it exists, but cannot be read
            return ""

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run, as its script printed it")
    config = parse_object(read("config.json"))
    settings = config.get("settings")
    facts = config.get("facts")
    if not isinstance(settings, dict):
        raise UserError(f"{folder / 'config.json'}: missing or damaged; is this a run folder?")
    name = "policy_metrics.jsonl" if "algorithm" in settings else "reward_metrics.jsonl"
    rows = [row for line in read(name).split("\n") if (row := parse_object(line))]
    return RunFiles(str(folder), settings, facts if isinstance(facts, dict) else {}, rows,
                    parse_object(read("result.json")), read("samples.md"))


def parse_object(text: str) -> dict:
    """The JSON object in a text, or {}: an unfinished run may have half a line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- curves --------------------------------------------------------------------------------------


def curves(runs: list[RunFiles]) -> str:
    """A chart for each metric that changes."""
    panels = make_panels([run.rows for run in runs], runs[0].is_policy)
    constants = ", ".join(f"{panel.title} {panel.constant:g}" for panel in panels
                          if panel.constant is not None)
    note = f"<p class=hint>Constant: {text(constants)}.</p>" if constants else ""
    panels = [panel for panel in panels if panel.constant is None]
    x_label = "iteration" if runs[0].is_policy else "step"
    if not panels:
        return f"<p>There are no curves yet.</p>{note}"
    charts = ""
    for panel in panels:
        caption = f"<b>{text(panel.title)}</b> {text(panel.explanation)}"
        charts += (f"<figure><figcaption>{caption}</figcaption>"
                   f"{draw(panel, [run.name for run in runs], x_label)}</figure>")
    return f"<div class=charts>{charts}</div>{note}"


# ---- tables --------------------------------------------------------------------------------------


def format_cells(metrics: dict, columns: tuple) -> list[str]:
    """One cell per column, empty if the metric is missing or not a number."""
    values = [(number(metrics.get(key)), form) for key, _, form in columns]
    return ["" if value is None else form.format(value) for value, form in values]


def evaluation(runs: list[RunFiles]) -> str:
    """The final metrics of all runs. Equal rows of a common base model are shown once."""
    columns = POLICY_METRICS if runs[0].is_policy else REWARD_METRICS
    body = []
    seen = []
    for run in runs:
        for name, metrics in final_rows(run):
            cells = format_cells(metrics, columns)
            if any(cells) and ([name, *cells] not in seen or name.startswith("policy")):
                seen.append([name, *cells])
                body.append([f"{run.name}: {name}" if len(runs) > 1 else name, *cells])
    used = [i for i in range(len(columns)) if any(row[i + 1] for row in body)]
    rows = [[row[0], *(row[i + 1] for i in used)] for row in body]
    shown = table(["", *(columns[i][1] for i in used)], rows)
    return (shown if body else "<p>There are no final metrics yet.</p>") + probes(runs)


def final_rows(run: RunFiles) -> list[tuple[str, dict]]:
    """(name, metrics) of each row of a run's final table."""
    if not run.is_policy:
        tests = [row for row in run.rows if row.get("stage") == "test"]
        return [("test pairs", tests[-1] if tests else {})]
    return [(name, {key: run.result.get(prefix + key) for key, *_ in POLICY_METRICS})
            for name, prefix in ROWS.items()]


def probes(runs: list[RunFiles]) -> str:
    """Bars: how often each reward model ranks the best response above one with a defect."""
    tables = [metrics.get("probes") for run in runs if not run.is_policy
              for _, metrics in final_rows(run)]
    tables = [probe_table if isinstance(probe_table, dict) else {} for probe_table in tables]
    body = ""
    for name in sorted({name for probe_table in tables for name in probe_table}):
        body += f"<tr><th scope=row>{text(name)}</th>"
        for probe_table in tables:
            entry = probe_table.get(name)
            share = number(entry[0]) if isinstance(entry, list) and entry else None
            bar = "" if share is None else f"{share:.0%} <meter value={share:.3f}></meter>"
            body += f"<td>{bar}</td>"
        body += "</tr>"
    head = "".join(f"<th scope=col>{text(run.name)}</th>" for run in runs)
    title = "Share of prompts for which the best response ranks above the same with one defect"
    return (f"<h3>{title}</h3><div class=wide><table><tr><th></th>{head}</tr>{body}</table></div>"
            if body else "")


def settings(runs: list[RunFiles]) -> str:
    """All settings, first those that differ between the runs; and the hashes of the input files."""
    body = []
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [json.dumps(run.settings[name]) if name in run.settings else "" for run in runs]
        body.append([name, *values])
    differing = [row for row in body if len(set(row[1:])) > 1]
    equal = [row for row in body if len(set(row[1:])) == 1]
    head = ["", *(run.name for run in runs)]
    shown = f"{table(head, differing)}<details>" if differing else "<details open>"
    inputs = "".join(f"<h3>{text(run.name)}</h3><pre>{text(json.dumps(run.facts, indent=1))}</pre>"
                     for run in runs)
    return (f"{shown}<summary>Equal in all runs</summary>{table(head, equal)}</details>"
            f"<details><summary>Input files and their SHA-256</summary>{inputs}</details>")


# ---- samples -------------------------------------------------------------------------------------


def samples(runs: list[RunFiles]) -> str:
    """For each prompt: the response of the base model and of each policy."""
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        for prompt, responses in sample_blocks(run.samples):
            for caption, response in responses:
                if len(runs) > 1 and caption.startswith("after"):
                    caption = f"{run.name}, {caption}"
                cards = by_prompt.setdefault(prompt, [])
                if (caption, response) not in cards:
                    cards.append((caption, response))
    page = ""
    for prompt, cards in by_prompt.items():
        answers = "".join(f"<div><h4>{text(caption)}</h4><pre>{text(response)}</pre></div>"
                          for caption, response in cards)
        page += (f"<article><pre class=prompt>{text(prompt.strip())}</pre>"
                 f"<div class=answers>{answers}</div></article>")
    return page or "<p>There are no samples yet.</p>"


# ---- the page ------------------------------------------------------------------------------------


def headline(run: RunFiles) -> str:
    """The most important final metrics of a run in one line."""
    columns = POLICY_METRICS if run.is_policy else REWARD_METRICS
    metrics = dict(final_rows(run))["policy, sampled" if run.is_policy else "test pairs"]
    parts = [f"{name} {cell}" for (_, name, _), cell in zip(columns, format_cells(metrics, columns))
             if cell and name not in ("from", "to")]
    parts = parts or [f"unfinished, {len(run.rows)} rows of metrics"]
    if run.is_policy:
        parts = [str(run.settings["algorithm"]), *parts]
    return " · ".join(parts).replace(" · ±", " ±")


def make_page(runs: list[RunFiles]) -> str:
    """The HTML of runs of one kind."""
    legend = ""
    for i, run in enumerate(runs):
        legend += f"<li>{line_sample(i)} <b>{text(run.name)}</b> {text(headline(run))}</li>"
    is_policy = runs[0].is_policy
    sections = [("Curves", curves(runs)), ("Final metrics", evaluation(runs))]
    sections += [("Before and after", samples(runs))] if is_policy else []
    sections += [("Settings", settings(runs))]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    kind = f"{'Policy' if is_policy else 'Reward model'} {'runs' if len(runs) > 1 else 'run'}"
    names = text(", ".join(run.name for run in runs))
    # forbids all downloads and scripts
    security = "default-src 'none'; style-src 'unsafe-inline'"
    return (f"{FIRST_WORDS}<meta charset=utf-8>"
            f'<meta http-equiv=Content-Security-Policy content="{security}">'
            f"<meta name=viewport content='width=device-width, initial-scale=1'>"
            f"<title>{names}</title><style>{STYLE}</style></head>"
            f"<body><header><h1>{kind}</h1><ul class=runs>{legend}</ul></header>"
            f"<main>{body}</main></body></html>\n")


def is_page(path: Path) -> bool:
    """Whether the file is an earlier page of this program, which a new one may replace."""
    return path.is_file() and path.read_bytes().startswith(FIRST_WORDS.encode())


def main(arguments: list[str] | None = None) -> None:
    """Write the page. A user's error is one line and exit status 2."""
    parser = Parser(prog="python -m minirlhf.tools.report",
                    description="Write one HTML page about some runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR",
                        help="run folders: only policies, or only reward models")
    parser.add_argument("--out", type=Path,
                        help="the page; default: report.html in the first folder")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    with one_line_errors():
        options = parser.parse_args(arguments)
        runs = [read_run(folder) for folder in options.runs]
        if len({run.is_policy for run in runs}) > 1:
            raise UserError("these are runs of policies and of reward models; "
                            "make one page for each kind")
        out = options.out or options.runs[0] / "report.html"
        check_output(out, options.force or not options.out and is_page(out))
        write_atomically(out, make_page(runs).encode())
        echo(f"saved {out}")


if __name__ == "__main__":
    main()
