"""Parts of an HTML page: escaped text, tables, samples and the style sheet."""

import html
import json
import re
from pathlib import Path

from minirlhf.run.terminal import printable

STYLE = Path(__file__).with_name("page.css").read_text()


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
