"""Parts of an HTML page: escaped text, tables, samples and the style sheet."""

import html
import json
import re

from minirlhf.run.terminal import printable


def text(value: object) -> str:
    """Any value as escaped text: never markup."""
    return html.escape(printable(value if isinstance(value, str) else json.dumps(value)))


def table(head: list[str], body: list[list[str]]) -> str:
    """An HTML table. The first cell of each row is its name."""
    rows = ["".join(f"<th scope=col>{text(cell)}</th>" for cell in head)]
    for name, *cells in body:
        row = "".join(f"<td>{text(cell)}</td>" for cell in cells)
        rows.append(f"<th scope=row>{text(name)}</th>{row}")
    content = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class=wide><table>{content}</table></div>"


def sample_blocks(page: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(prompt, [(caption, response), ...])] of a samples.md. Skips what it cannot read."""
    blocks: list[tuple[str, list[tuple[str, str]]]] = []
    fence = ""  # the code fence that is open
    caption = ""
    inside: list[str] = []
    for line in page.split("\n"):
        if fence:
            if line != fence:
                inside.append(line)
                continue
            if caption and blocks:
                blocks[-1][1].append((caption, "\n".join(inside)))
            elif not caption:
                blocks.append(("\n".join(inside), []))
            fence = ""
        elif opened := re.fullmatch(r"(`{3,})text", line):
            fence = opened[1]
            inside = []
        elif line.startswith("## "):
            caption = ""
        elif bold := re.fullmatch(r"\*\*(before|after)\*\*(.*)", line):
            caption = bold[1] + bold[2]
    return blocks


# One column on a phone, a grid in a wide window; light or dark as the reader's system says.
STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2128; --soft: #57606a;
  --line: #d8dee4; --card: #f6f8fa; --run0: #0b62c4; --run1: #c2410c; --run2: #15803d;
  --run3: #9333ea; --run4: #b91c5c; --run5: #0e7490; --run6: #854d0e; --run7: #475569; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --ink: #e4e8ee; --soft: #9aa5b1;
  --line: #39424e; --card: #1a2028; --run0: #6cb2ff; --run1: #fb9a5b; --run2: #5fd38a;
  --run3: #c9a1ff; --run4: #ff8fb8; --run5: #56d4e8; --run6: #e0b354; --run7: #a9b6c6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: clamp(0.75rem, 3vw, 2.5rem);
  background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 0.75rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0.5rem; }
h4 { font-size: 0.8rem; margin: 0 0 0.25rem; color: var(--soft); }
ul.runs { list-style: none; margin: 0; padding: 0; }
ul.runs li { margin: 0.25rem 0; overflow-wrap: anywhere; }
ul.runs b { margin-right: 0.75rem; }
ul.runs svg { vertical-align: middle; }
p.hint { color: var(--soft); }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; padding: 0.75rem; border: 1px solid var(--line); border-radius: 0.5rem;
  background: var(--card); display: flex; flex-direction: column;
  justify-content: space-between; }
figure svg { width: 100%; height: auto; margin-top: 0.5rem; }
figure svg text { font-family: system-ui, sans-serif; }
figcaption { font-size: 0.85rem; color: var(--soft); }
figcaption b { color: var(--ink); display: block; font-size: 0.95rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.75rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: pre; }
tr > :first-child { text-align: left; padding-left: 0; }
th[scope=row] { font-weight: 500; }
th[scope=col] { color: var(--soft); font-weight: 500; }
@media (max-width: 40rem) {  /* on a phone, long row names would leave no room for the numbers */
  tr > :first-child { white-space: normal; overflow-wrap: anywhere; min-width: 7rem;
    max-width: 9rem; }
  th, td { padding: 0.3rem 0.4rem; } }
meter { width: 6rem; vertical-align: middle; }
article { margin: 0 0 1rem; padding: 0.75rem; border: 1px solid var(--line);
  border-radius: 0.5rem; background: var(--card); }
pre { margin: 0; font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.prompt { padding-bottom: 0.6rem; margin-bottom: 0.6rem; border-bottom: 1px solid var(--line);
  font-weight: 500; }
.answers { display: grid; gap: 0.75rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--soft); }
details pre { font: 0.8rem/1.4 ui-monospace, monospace; }
"""
