"""One page about one or several runs: `python -m minirlhf.tools.report runs/NAME [runs/OTHER ...]`

Curves, closing figures, the same prompts before and after, settings. One HTML file that loads nothing from anywhere and
runs no script, in light and dark, for narrow and wide windows. What a model or a file says is text in it, never markup.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from minirlhf.checkpoint import write_atomically
from minirlhf.flags import UserError, fail
from minirlhf.tools.charts import COLOURS, Panel, draw, load_pyplot, number, panels
from minirlhf.tools.page import STYLE, sample_blocks, table, text

FIGURES = (("gold", "gold", "{:+.2f}"), ("gold_se", "±", "{:.2f}"), ("score", "score", "{:+.2f}"), ("kl", "KL, nats", "{:.1f}"),
           ("length", "length", "{:.1f}"), ("eos_rate", "ended", "{:.1%}"), ("win_rate", "wins", "{:.1%}"),
           ("win_low", "from", "{:.1%}"), ("win_high", "to", "{:.1%}"), ("gap_closed", "gap closed", "{:.0%}"))
REWARD_FIGURES = (("accuracy", "accuracy", "{:.3f}"), ("accuracy_low", "from", "{:.3f}"), ("accuracy_high", "to", "{:.3f}"),
                  ("ceiling", "the truth reaches", "{:.3f}"), ("gold_correlation", "correlation with gold", "{:.2f}"),
                  ("loss", "loss", "{:.3f}"), ("calibration_error", "calibration error", "{:.3f}"), ("pairs", "pairs", "{:.0f}"))


class RunFiles(NamedTuple):
    """What a run folder holds for a reader; all of it untrusted."""

    name: str
    settings: dict
    facts: dict
    rows: list[dict]
    result: dict
    samples: str

    @property
    def is_policy(self) -> bool:
        return "algorithm" in self.settings


def read_run(folder: Path) -> RunFiles:
    """A finished run or one under way. Raises UserError for what is no run folder."""
    def read(name: str) -> str:
        try:
            return (folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run, as its script printed it")
    config = parsed(read("config.json"))
    if not isinstance(config.get("settings"), dict):
        raise UserError(f"{folder / 'config.json'}: missing or damaged; is this a run folder?")
    facts = config.get("facts")
    name = "policy_metrics.jsonl" if "algorithm" in config["settings"] else "reward_metrics.jsonl"
    rows = [row for line in read(name).split("\n") if (row := parsed(line))]
    return RunFiles(str(folder), config["settings"], facts if isinstance(facts, dict) else {}, rows, parsed(read("result.json")),
                    read("samples.md"))


def parsed(text: str) -> dict:
    """The JSON object that text holds, or an empty one: a run under way may have half a line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- curves ----------------------------------------------------------------------------------------------------------


def curves(runs: list[RunFiles]) -> str:
    found, pyplot, x_label = panels([run.rows for run in runs], runs[0].is_policy), load_pyplot(), x_of(runs[0])
    still = [panel for panel in found if panel.constant is not None]
    found = [panel for panel in found if panel.constant is None]
    same = ", ".join(f"{panel.title} {panel.constant:g}" for panel in still)
    note = f"<p class=hint>The same throughout: {text(same)}.</p>" if same else ""
    if not found:
        return f"<p>There is no curve yet.</p>{note}"
    if pyplot is None:
        hint = "<p class=hint>For curves in place of this table: <code>pip install matplotlib</code></p>"
        return hint + curve_table(found, runs, x_label) + note
    figures = (f"<figure><figcaption><b>{text(panel.title)}</b> {text(panel.explanation)}</figcaption>"
               f"{draw(panel, n, x_label, pyplot)}</figure>" for n, panel in enumerate(found))
    return f"<div class=charts>{''.join(figures)}</div>{note}"


def x_of(run: RunFiles) -> str:
    return "iteration" if run.is_policy else "step"


def curve_table(found: list[Panel], runs: list[RunFiles], x_label: str) -> str:
    """About a dozen values of every curve."""
    body = []
    for panel in found:
        for run, series in panel.lines:
            some = series[::max(1, len(series) // 11)]
            some += series[-1:] if some[-1] != series[-1] else []
            body.append([f"{panel.title}, {runs[run].name}" if len(runs) > 1 else panel.title,
                         "   ".join(f"{x:g}: {y:.4g}" for x, y in some)])
    return table(["", f"{x_label}: value"], body)


# ---- tables ----------------------------------------------------------------------------------------------------------


def cells(figures: dict, columns: tuple) -> list[str]:
    return ["" if (value := number(figures.get(key))) is None else form.format(value) for key, _, form in columns]


def evaluation(runs: list[RunFiles]) -> str:
    """The closing figures of every run; rows that an earlier one has already, such as those of a common base model, once."""
    columns, body, seen = FIGURES if runs[0].is_policy else REWARD_FIGURES, [], []
    for run in runs:
        for name, figures in closing_rows(run):
            row = [name, *cells(figures, columns)]
            if any(row[1:]) and (row not in seen or name.startswith("policy")):
                seen.append(row)
                body.append([f"{run.name}: {name}" if len(runs) > 1 else name, *row[1:]])
    used = [i for i in range(1, len(columns) + 1) if any(row[i] for row in body)]
    shown = table(["", *(columns[i - 1][1] for i in used)], [[row[0], *(row[i] for i in used)] for row in body])
    return (shown if body else "<p>No closing figures yet.</p>") + probes(runs)


def closing_rows(run: RunFiles) -> list[tuple[str, dict]]:
    """(name, figures) of each row of a run's closing table."""
    if not run.is_policy:
        return [("held-out pairs", next((row for row in reversed(run.rows) if row.get("stage") == "test"), {}))]
    rows = []
    for name, mark in (("base", "base_"), ("policy", "")):
        for decoding in ("sampled", "greedy"):
            prefix = f"{mark}{decoding}_"
            figures = {key.removeprefix(prefix): value for key, value in run.result.items() if key.startswith(prefix)}
            rows.append((f"{name}, {decoding}", figures))
    for n in sorted(int(found[1]) for key in run.result if (found := re.fullmatch(r"best_of_(\d{1,6})_score", key))):
        rows.append((f"base, best of {n}", {key: run.result.get(f"best_of_{n}_{key}") for key in ("gold", "score")}))
    return [*rows, ("best possible", dict(gold=run.result.get("best_gold")))]


def probes(runs: list[RunFiles]) -> str:
    """How often a reward model ranks the best response above the same with one defect, as bars."""
    tables = [figures.get("probes") for run in runs if not run.is_policy for _, figures in closing_rows(run)]
    tables = [found if isinstance(found, dict) else {} for found in tables]
    body = ""
    for name in sorted({name for found in tables for name in found}):
        shares = [number(found[name][0]) if isinstance(found.get(name), list) and found[name] else None for found in tables]
        bars = (f"{share:.0%} <meter value={share:.3f}></meter>" if share is not None else "" for share in shares)
        body += f"<tr><th scope=row>{text(name)}</th>" + "".join(f"<td>{bar}</td>" for bar in bars) + "</tr>"
    head = "".join(f"<th scope=col>{text(run.name)}</th>" for run in runs)
    return ("<h3>Share of prompts on which the best response ranks above the same with one defect</h3>"
            f"<div class=wide><table><tr><th></th>{head}</tr>{body}</table></div>") if body else ""


def settings(runs: list[RunFiles]) -> str:
    """All settings, those that differ between the runs first; and the files that were read."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    body = [[name, *(json.dumps(run.settings[name]) if name in run.settings else "" for run in runs)] for name in names]
    differing, same = ([row for row in body if (len(set(row[1:])) > 1) is differs] for differs in (True, False))
    head = ["", *(run.name for run in runs)]
    shown = f"{table(head, differing)}<details>" if differing else "<details open>"
    inputs = "".join(f"<h3>{text(run.name)}</h3><pre>{text(json.dumps(run.facts, indent=1))}</pre>" for run in runs)
    return (f"{shown}<summary>The same in every run</summary>{table(head, same)}</details>"
            f"<details><summary>Files read, with their SHA-256</summary>{inputs}</details>")


# ---- samples ---------------------------------------------------------------------------------------------------------


def samples(runs: list[RunFiles]) -> str:
    """Per prompt: what the base model said, and what each policy says."""
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for run in runs:
        for prompt, said in sample_blocks(run.samples):
            for caption, response in said:
                name = f"{run.name}, {caption}" if len(runs) > 1 and caption.startswith("after") else caption
                card = (name, response)
                if card not in by_prompt.setdefault(prompt, []):
                    by_prompt[prompt].append(card)
    cards = ""
    for prompt, said in by_prompt.items():
        answers = "".join(f"<div><h4>{text(caption)}</h4><pre>{text(response)}</pre></div>" for caption, response in said)
        cards += f"<article><pre class=prompt>{text(prompt.strip())}</pre><div class=answers>{answers}</div></article>"
    return cards or "<p>No samples yet.</p>"


# ---- the page --------------------------------------------------------------------------------------------------------


def headline(run: RunFiles) -> str:
    """A run in one line."""
    columns = FIGURES if run.is_policy else REWARD_FIGURES
    figures = dict(closing_rows(run))["policy, sampled" if run.is_policy else "held-out pairs"]
    found = [(name, cell) for (_, name, _), cell in zip(columns, cells(figures, columns)) if cell]
    shown = [f"{name} {cell}" for name, cell in found if name not in ("from", "to")]
    about = [str(run.settings["algorithm"])] if run.is_policy else []
    return " · ".join(about + (shown or [f"under way, {len(run.rows)} rows of metrics"])).replace(" · ±", " ±")


def as_page(runs: list[RunFiles]) -> str:
    """The whole HTML of runs of one kind."""
    legend = "".join(f"<li><i style='background:var(--run{i % len(COLOURS)})'></i> <b>{text(run.name)}</b> "
                     f"{text(headline(run))}</li>" for i, run in enumerate(runs))
    sections = [("Curves", curves(runs)), ("At the end", evaluation(runs))]
    sections += [("Before and after", samples(runs))] if runs[0].is_policy else []
    sections += [("Settings", settings(runs))]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is fetched, nothing runs
    return (f'<!doctype html><html lang=en><head><meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{policy}">'
            "<meta name=viewport content='width=device-width, initial-scale=1'>"
            f"<title>{text(', '.join(run.name for run in runs))}</title><style>{STYLE}</style></head>"
            f"<body><header><h1>{'Policy' if runs[0].is_policy else 'Reward model'} {'runs' if len(runs) > 1 else 'run'}</h1>"
            f"<ul class=runs>{legend}</ul></header><main>{body}</main></body></html>\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minirlhf.tools.report", description="One HTML page about some runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="run folders, all of policies or all of reward models")
    parser.add_argument("--out", type=Path, help="the page; by default report.html in the first folder")
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(folder) for folder in options.runs]
        if len({run.is_policy for run in runs}) > 1:
            raise UserError("these are runs of policies and of reward models; make a page of each kind")
        out = options.out or options.runs[0] / "report.html"
        write_atomically(out, as_page(runs).encode())
    except UserError as error:
        sys.exit(fail(str(error), 2))
    except OSError as error:
        sys.exit(fail(f"{error.filename}: {error.strerror}; name another --out", 2))
    print(f"saved {out}")


if __name__ == "__main__":
    main()
