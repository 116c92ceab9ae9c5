"""The HTML page about runs: complete, safe for any content, and with correct curves."""

import html.parser
import json
import math
import random
import re
import xml.etree.ElementTree

import train_policy
from minirlhf.evaluation.policy import fenced
from minirlhf.tools import report
from minirlhf.tools.charts import Panel, draw, make_panels, running_mean, ticks
from minirlhf.tools.page import sample_blocks

import pytest
import tiny

EVIL = "<script>alert('1')</script> & \"quoted\" \x1b[31m\u202e ```"


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not nest."""

    VOID = {"meta", "input", "br", "img"}

    def __init__(self, page):
        super().__init__()
        self.open = []
        self.tags = []
        self.attributes = []
        self.texts = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page_of(*folders, out):
    report.main([*map(str, folders), "--out", str(out), "--force"])
    return out.read_text()


def check_safe(page):
    """The page downloads nothing, runs nothing, and has no markup from the run."""
    reader = Reader(page)
    forbidden = {"script", "iframe", "object", "embed", "link", "img", "base", "form", "a"}
    assert not forbidden & set(reader.tags)
    for tag, name, value in reader.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name != "src", (tag, name)
        assert not name.endswith("href") or value.startswith("#"), (tag, name)
    assert not re.search(r"url\((?!#)|@import|javascript:|[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert "default-src 'none'" in page
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {*re.findall(r'href="#([^"]*)"', page), *re.findall(r"url\(#([^)]*)\)", page)}
    assert used <= set(ids)
    return reader


def hostile_run(folder):
    """A policy run in which every text is an attack."""
    folder.mkdir()
    settings = {"algorithm": EVIL, "seed": 0, EVIL: EVIL}
    rows = [
        dict(step=n, score=n * 0.1, gold=n * 0.2, kl=float(n), kl_coef=0.025) for n in range(1, 6)
    ]
    (folder / "config.json").write_text(json.dumps(dict(settings=settings, facts={EVIL: EVIL})))
    (folder / "policy_metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "sco'
    )
    (folder / "samples.md").write_text(
        f"# Before and after\n\n## 1\n\n{fenced(EVIL)}\n\n**before** (score {EVIL})\n\n"
        f"{fenced(EVIL + ' b')}\n\n**after** (score +1.00)\n\n{fenced('## 2' + EVIL)}\n"
    )
    (folder / "result.json").write_text(
        json.dumps(
            {
                "sampled_gold": 1.25,
                "sampled_gold_se": None,
                "best_of_4_score": 2,
                "sampled_kl": EVIL,
                "base_sampled_gold": -1.5,
                EVIL: EVIL,
            }
        )
    )
    return folder


def test_a_page_about_a_real_run_is_complete(policy_run, tmp_path):
    """It has the final metrics of result.json, the settings, the input files and the samples."""
    page = page_of(policy_run, out=tmp_path / "r.html")
    content = "\n".join(check_safe(page).texts)
    result = json.loads((policy_run / "result.json").read_text())
    assert f"{result['sampled_gold']:+.2f}" in content
    assert f"{result['base_greedy_score']:+.2f}" in content
    assert "minibatch_size" in content
    assert "Before and after" in content
    assert "reward.pt" in content
    prompt, responses = sample_blocks((policy_run / "samples.md").read_text())[0]
    assert prompt.strip() in content
    assert [caption.split()[0] for caption, _ in responses] == ["before", "after"]
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_a_page_about_a_reward_model_shows_its_probes(reward_run, tmp_path):
    page = page_of(reward_run, out=tmp_path / "r.html")
    reader = check_safe(page)
    content = "\n".join(reader.texts)
    assert "wrong letter" in content
    assert reader.tags.count("meter") == 2
    assert "Before and after" not in content
    shares = re.findall(r"(\d+)% <meter value=([\d.]+)>", page)
    assert len(shares) == 2
    assert all(abs(int(percent) - 100 * float(value)) <= 0.5 for percent, value in shares)
    test = json.loads((reward_run / "reward_metrics.jsonl").read_text().splitlines()[-1])
    assert f"{test['accuracy']:.3f}" in content


def test_a_page_about_two_runs_compares_them(reward_run, policy_run, tmp_path):
    """Settings that differ come first; the common base model and each prompt are shown once."""
    other = tmp_path / "other"
    train_policy.main(tiny.policy_config(reward_run, other, algorithm="reinforce", lr=1e-3))
    page = page_of(policy_run, other, out=tmp_path / "r.html")
    check_safe(page)
    content = re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    top = content[content.index("<h2>Settings") : content.index("Equal in all runs")]
    assert set(re.findall(r"<th scope=row>(\w+)", top)) == {"algorithm", "lr", "out"}
    rows = re.findall(r"<th scope=row>([^<]*): (base, \w+|policy, \w+|best possible)<", content)
    assert [name for _, name in rows] == [
        "base, sampled",
        "base, greedy",
        "policy, sampled",
        "policy, greedy",
        "best possible",
        "policy, sampled",
        "policy, greedy",
    ]
    prompts = re.findall(r"<pre class=prompt>(.*?)</pre>", content)
    assert len(prompts) == len(set(prompts)) == 4
    assert "var(--run0)" in page
    assert "var(--run1)" in page


def test_all_contents_of_a_run_are_escaped(tmp_path, capsys):
    """A <script> in a sample must not run, and escape sequences must not reach the terminal."""
    runs = [hostile_run(tmp_path / name) for name in ("a", "<b onclick=x>")]
    page = page_of(*runs, out=tmp_path / "r.html")
    reader = check_safe(page)
    content = "".join(reader.texts)
    assert content.count("<script>alert('1')</script>") >= 6
    assert "<b onclick=x>" in content
    assert r"\x1b[31m\u202e" in content
    assert "+1.25" in content
    assert "svg" in reader.tags
    assert "://" not in page
    assert "Constant: KL coefficient 0.025" in content
    assert "\x1b" not in capsys.readouterr().out


def test_an_unfinished_run_has_a_page(tmp_path):
    """It has no samples, no final metrics, half a last row, and values of the wrong type."""
    folder = hostile_run(tmp_path / "run")
    for name in ("samples.md", "result.json"):
        (folder / name).unlink()
    rows = '{"step": 1, "score": "high", "kl": null, "gold": [1]}\n[]\n{"step": true}\n{"ste'
    (folder / "policy_metrics.jsonl").write_text(rows)
    content = "".join(check_safe(page_of(folder, out=tmp_path / "r.html")).texts)
    assert "There are no final metrics yet." in content
    assert "There are no samples yet." in content
    assert "There are no curves yet." in content
    (folder / "policy_metrics.jsonl").unlink()
    check_safe(page_of(folder, out=tmp_path / "r.html"))


def test_curves_have_the_values_of_the_metrics_file():
    rows = [
        dict(step=0, eval_sampled_gold=1.0, eval_greedy_gold=2.0),
        dict(step=1, gold=3.0),
        dict(step=2, gold=float("nan")),
    ]
    (panel,) = make_panels([[], rows], is_policy=True)
    assert panel.lines == [(1, [(1.0, 3.0)])]
    assert panel.sampled == [(1, [(0.0, 1.0)])]
    assert panel.greedy == [(1, [(0.0, 2.0)])]
    rows = [dict(stage="sft", step=1, loss=2.0), dict(stage="reward", step=1, loss=0.7)]
    panels = make_panels([rows], is_policy=False)
    assert [(panel.title, panel.lines[0][1]) for panel in panels] == [
        ("Fine-tuning loss", [(1, 2.0)]),
        ("Preference loss", [(1, 0.7)]),
    ]


def test_a_sample_may_contain_a_code_fence():
    """A response ends at a fence as long as the opening one, not at a shorter one inside it."""
    response = "one\n```\n**after** (no caption)\n````x"
    page = (
        f"## 1\n\n{fenced('p')}\n\n**before** (score 1)\n\n{fenced(response)}\n\n"
        f"**after**\n\n{fenced('b')}\n"
    )
    assert sample_blocks(page) == [("p", [("before (score 1)", response), ("after", "b")])]


def elements(svg, tag):
    """The attributes and texts of all elements of a kind. Fails unless the SVG is an XML text."""
    return [
        dict(element.attrib, text=element.text)
        for element in xml.etree.ElementTree.fromstring(svg).iter(tag)
    ]


def check_coordinates(svg):
    """All points, marks and texts are inside the drawing."""
    width, height = map(int, re.search(r"viewBox='0 0 (\d+) (\d+)'", svg).groups())
    assert not re.search(r"\b(nan|inf)\b", svg)
    places = [place for line in elements(svg, "polyline") for place in line["points"].split()]
    places += re.findall(r"translate\(([^)]*)\)", svg)
    places += [f"{text['x']},{text['y']}" for text in elements(svg, "text")]
    for place in places:
        x, y = map(float, place.split(","))
        assert 0 <= x <= width
        assert 0 <= y <= height


def test_points_of_a_curve_are_at_the_right_coordinates():
    """The ticks are 0 to 4 and 0 to 10. The area is 22 <= x <= 320 and 158 >= y >= 8."""
    line = [(0, 0.0), (1, 5.0), (2, 10.0), (4, 2.0)]
    svg = draw(Panel("T", "", [(0, line)], [(0, [(3, 8.0)])], []), ["a"], "step")
    (curve,) = elements(svg, "polyline")
    assert curve["points"] == "22.0,158.0 96.5,83.0 171.0,8.0 320.0,128.0"
    marks = [path["transform"] for path in elements(svg, "path") if "transform" in path]
    assert marks == ["translate(320.0,128.0) scale(0.5)", "translate(245.5,38.0) scale(0.8)"]
    assert [text["text"] for text in elements(svg, "text")] == [
        *("0", "1", "2", "3", "4"),
        *("0", "2", "4", "6", "8", "10"),
        "step",
    ]
    texts = {text["text"]: (text["x"], text["y"]) for text in elements(svg, "text")}
    assert texts["1"] == ("96.5", "172.0")
    assert texts["10"] == ("15.0", "11.5")
    assert texts["step"] == ("171.0", "186.0")
    assert elements(svg, "title")[0]["text"] == "T"


def test_marks_of_greedy_decoding_are_open():
    marks = [(1, [(1, 1)])]
    (filled,) = elements(draw(Panel("t", "e", [], marks, []), ["a"], "step"), "path")[1:]
    (opened,) = elements(draw(Panel("t", "e", [], [], marks), ["a"], "step"), "path")[1:]
    assert filled["fill"] == "currentColor"
    assert opened["fill"] == "none"
    assert filled["d"] == opened["d"]
    assert "var(--run1)" in opened["style"]


def test_runs_differ_in_gray():
    """Twenty runs have different pairs of dashes and marks."""
    lines = [(run, [(0, 0), (1, run)]) for run in range(20)]
    svg = draw(Panel("t", "e", lines, [], []), ["a"], "step")
    dashes = [line["stroke-dasharray"] for line in elements(svg, "polyline")]
    shapes = [path["d"] for path in elements(svg, "path")[1:]]
    assert len(set(zip(dashes, shapes, strict=True))) == 20


def test_the_legend_names_the_runs_of_a_panel_as_text():
    """A name is never markup, and a long name keeps its end. A single run needs no legend."""
    names = ["x" * 60 + "end", "absent", EVIL[:39]]
    lines = [(0, [(0, 1), (1, 2)]), (2, [(0, 2), (1, 1)])]
    svg = draw(Panel("<b>", "e", lines, [], []), names, "step")
    texts = [text["text"] for text in elements(svg, "text")]
    assert texts[-2:] == ["x" * 47 + "end", EVIL[:39]]
    assert elements(svg, "title")[0]["text"] == "<b>"
    assert not {"script", "b"} & set(Reader(svg).tags)
    check_coordinates(svg)
    svg = draw(Panel("t", "e", lines[:1], [], []), names[:1], "step")
    assert elements(svg, "text")[-1]["text"] == "step"


@pytest.mark.parametrize(
    "values",
    [
        [3.0, 3.0, 3.0],
        [0.0],
        [-7.25],
        [None, 1.0, float("nan"), 2.0, float("inf"), None],
        [1e299, -1e299, 0.0],
        [5e-324, 0.0, 1e-310],
        [1e-9, 2e-9],
        [1e9, 1e9 + 0.25],
        [1e17, 1e17 + 64],
        [(-1.0) ** n * 9e299 for n in range(400)],
    ],
    ids=lambda values: str(values[:5]),
)
def test_unusual_values_are_drawn(values):
    rows = [dict(step=step, gold=value) for step, value in enumerate(values)]
    (panel,) = make_panels([rows], is_policy=True)
    svg = draw(panel, ["a", "b"], "step")
    check_coordinates(svg)
    finite = [value for value in values if value is not None and math.isfinite(value)]
    line = elements(svg, "polyline")[0]["points"].split()
    assert len(line) == len(finite)


def test_ticks_are_round_and_cover_the_data():
    """Also of numbers between 1e-290 and 1e290, and of intervals that are small on their scale."""
    assert ticks(0, 60) == [0, 20, 40, 60]
    assert ticks(-0.3, 0.6) == [-0.4, -0.2, 0.0, 0.2, 0.4, 0.6]
    assert ticks(1234.5, 1234.6) == [1234.5, 1234.52, 1234.54, 1234.56, 1234.58, 1234.6]
    assert ticks(0, 0) == [0.0, 0.2]
    rng = random.Random(0)
    for _ in range(2000):
        scale = 10.0 ** rng.uniform(-290, 290)
        low = rng.uniform(-1, 1) * scale
        high = low + scale * 10.0 ** rng.uniform(-7, 1)
        values = ticks(low, high)
        step = values[1] - values[0]
        assert 3 <= len(values) <= 7
        assert values[0] - 1e-6 * step <= low < high <= values[-1] + 1e-6 * step
        labels = [f"{value:.10g}" for value in values]
        assert [float(label) for label in labels] == values
        assert len(set(labels)) == len(values)
        assert f"{step:.0e}"[0] in "125"


def test_a_running_mean_of_a_straight_line_is_the_line():
    """The ends of the line are excepted, and the length stays the same."""
    points = [(x, 2.0 * x) for x in range(400)]
    smooth = running_mean(points)
    assert [x for x, _ in smooth] == list(range(400))
    assert smooth[200] == points[200]
    assert 0 < smooth[0][1] < 10


def test_charts_use_the_colors_of_the_page():
    """Fixed black would be invisible on a dark page."""
    lines = [(0, [(0, 1), (1, 2)]), (9, [(0, 2), (1, 1)])]
    svg = draw(Panel("t", "e", lines, [(0, [(1, 1)])], []), ["a"], "step")
    for color in ("currentColor", "var(--run0)", "var(--run1)", "var(--line)"):
        assert color in svg
    assert "#" not in svg
    assert {text.get("fill") for text in elements(svg, "text")} == {None}
    assert elements(svg, "svg")[0]["fill"] == "currentColor"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["{tmp}/none"], "none: no such folder"),
        (["{tmp}"], "config.json: missing or damaged; is this a run folder?"),
        (["{run}", "{reward_run}"], "make one page for each kind"),
        (["{run}", "--out", "{tmp}/no/r.html"], "No such file or directory"),
    ],
)
def test_bad_input_gives_one_error_line(arguments, words, policy_run, reward_run, tmp_path, capsys):
    fill = dict(tmp=tmp_path, run=policy_run, reward_run=reward_run)
    with pytest.raises(SystemExit) as stop:
        report.main([text.format(**fill) for text in arguments])
    output = capsys.readouterr().err
    assert stop.value.code == 2
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert words in output
