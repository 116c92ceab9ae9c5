"""The page about runs: whole, harmless whatever the runs hold, and readable without matplotlib."""

import html.parser
import json
import re
import sys

import pytest
import tiny

import train_policy
from minirlhf.compare import fenced
from minirlhf.tools import report
from minirlhf.tools.charts import Panel, draw, load_pyplot, panels, running_mean
from minirlhf.tools.page import sample_blocks

EVIL = "<script>alert('1')</script> & \"quoted\" \x1b[31m\u202e ```"


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not nest."""

    VOID = {"meta", "input", "br", "img"}

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
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
    report.main([*map(str, folders), "--out", str(out)])
    return out.read_text()


def check_harmless(page):
    """Nothing is fetched, nothing runs, nothing but text came from the run."""
    reader = Reader(page)
    assert not {"script", "iframe", "object", "embed", "link", "img", "base", "form", "a"} & set(reader.tags)
    for tag, name, value in reader.attributes:
        assert not name.startswith("on") and name != "src" and (not name.endswith("href") or value.startswith("#")), (tag, name)
    assert not re.search(r"url\((?!#)|@import|javascript:|[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert "default-src 'none'" in page
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {*re.findall(r'href="#([^"]*)"', page), *re.findall(r"url\(#([^)]*)\)", page)} <= set(ids)  # to its own chart's
    return reader


def made_up_run(folder, **changes):
    """A policy run whose every text is hostile."""
    folder.mkdir()
    settings = dict(algorithm=EVIL, seed=0, **{EVIL: EVIL}) | changes.pop("settings", {})
    rows = [dict(step=n, score=n * 0.1, gold=n * 0.2, kl=float(n), kl_coef=0.025) for n in range(1, 6)]
    (folder / "config.json").write_text(json.dumps(dict(settings=settings, facts={EVIL: EVIL})))
    (folder / "policy_metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "sco')
    (folder / "samples.md").write_text(f"# Before and after\n\n## 1\n\n{fenced(EVIL)}\n\n**before** (score {EVIL})\n\n"
                                       f"{fenced(EVIL + ' b')}\n\n**after** (score +1.00)\n\n{fenced('## 2' + EVIL)}\n")
    (folder / "result.json").write_text(json.dumps({"sampled_gold": 1.25, "sampled_gold_se": None, "best_of_4_score": 2,
                                                    "sampled_kl": EVIL, "base_sampled_gold": -1.5, EVIL: EVIL}))
    return folder


def test_a_page_about_a_real_run_tells_all_of_it(policy_run, tmp_path):
    """Its closing figures as in result.json, its settings, its first sample, a curve for each figure that moved."""
    page = page_of(policy_run, out=tmp_path / "r.html")
    said = "\n".join(check_harmless(page).texts)
    result = json.loads((policy_run / "result.json").read_text())
    assert f"{result['sampled_gold']:+.2f}" in said and f"{result['base_greedy_score']:+.2f}" in said
    assert "minibatch_size" in said and "Before and after" in said and "reward.pt" in said
    first = sample_blocks((policy_run / "samples.md").read_text())[0]
    assert first[0].strip() in said and [caption.split()[0] for caption, _ in first[1]] == ["before", "after"]
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_a_page_about_a_reward_model_shows_its_probes(reward_run, tmp_path):
    page = page_of(reward_run, out=tmp_path / "r.html")
    reader = check_harmless(page)
    said = "\n".join(reader.texts)
    assert "wrong letter" in said and reader.tags.count("meter") == 2 and "Before and after" not in said
    shares = re.findall(r"(\d+)% <meter value=([\d.]+)>", page)
    assert len(shares) == 2 and all(abs(int(percent) - 100 * float(value)) <= 0.5 for percent, value in shares)
    test = json.loads((reward_run / "reward_metrics.jsonl").read_text().splitlines()[-1])
    assert f"{test['accuracy']:.3f}" in said


def test_several_runs_stand_side_by_side(reward_run, policy_run, tmp_path):
    """Settings that differ are on top, the base model they have in common is in the table once, each prompt comes once."""
    other = tmp_path / "other"
    train_policy.main(tiny.policy_config(reward_run, other, algorithm="reinforce", lr=1e-3))
    page = page_of(policy_run, other, out=tmp_path / "r.html")
    check_harmless(page)
    said = re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    top = said[said.index("<h2>Settings"):said.index("The same in every run")]
    assert set(re.findall(r"<th scope=row>(\w+)", top)) == {"algorithm", "lr", "out"}
    rows = re.findall(r"<th scope=row>([^<]*): (base, \w+|policy, \w+|best possible)<", said)
    assert [name for _, name in rows] == ["base, sampled", "base, greedy", "policy, sampled", "policy, greedy", "best possible",
                                          "policy, sampled", "policy, greedy"]
    prompts = re.findall(r"<pre class=prompt>(.*?)</pre>", said)
    assert len(prompts) == len(set(prompts)) == 4
    assert "var(--run0)" in page and "var(--run1)" in page


@pytest.mark.parametrize("with_matplotlib", [True, False])
def test_whatever_a_run_holds_stays_text(with_matplotlib, tmp_path, monkeypatch, capsys):
    """A sample with a <script> must be read, not run; a terminal's escapes must not reach it either."""
    if with_matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    runs = [made_up_run(tmp_path / name) for name in ("a", "<b onclick=x>")]
    page = page_of(*runs, out=tmp_path / "r.html")
    reader = check_harmless(page)
    said = "".join(reader.texts)
    assert said.count("<script>alert('1')</script>") >= 6 and "<b onclick=x>" in said and r"\x1b[31m\u202e" in said
    assert "+1.25" in said and ("pip install matplotlib" in page) != with_matplotlib
    assert ("svg" in reader.tags) == with_matplotlib and "The same throughout: KL coefficient 0.025" in said
    assert "\x1b" not in capsys.readouterr().out


def test_without_matplotlib_the_table_has_first_and_last_values(policy_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = page_of(policy_run, out=tmp_path / "r.html")
    rows = [json.loads(line) for line in (policy_run / "policy_metrics.jsonl").read_text().splitlines()]
    assert f"1: {rows[1]['score']:.4g}" in said and f"2: {rows[2]['score']:.4g}" in said and "<svg" not in said


def test_a_table_of_many_values_ends_with_the_last():
    run = report.RunFiles("r", dict(algorithm="ppo"), {}, [], {}, "")
    said = report.curve_table([Panel("T", "", [(0, [(x, 2.0 * x) for x in range(30)])], [], [])], [run], "step")
    assert "0: 0 " in said and "28: 56   29: 58<" in said and 10 < said.count(": ") < 20


def test_a_run_under_way_has_a_page_too(tmp_path):
    """Neither samples nor figures nor a whole last row, and values of the wrong type."""
    folder = made_up_run(tmp_path / "run")
    for name in ("samples.md", "result.json"):
        (folder / name).unlink()
    rows = '{"step": 1, "score": "high", "kl": null, "gold": [1]}\n[]\n{"step": true}\n{"ste'
    (folder / "policy_metrics.jsonl").write_text(rows)
    said = "".join(check_harmless(page_of(folder, out=tmp_path / "r.html")).texts)
    assert "No closing figures yet." in said and "No samples yet." in said and "There is no curve yet." in said
    (folder / "policy_metrics.jsonl").unlink()
    check_harmless(page_of(folder, out=tmp_path / "r.html"))


def test_curves_hold_the_values_of_the_log():
    rows = [dict(step=0, eval_sampled_gold=1.0, eval_greedy_gold=2.0), dict(step=1, gold=3.0), dict(step=2, gold=float("nan"))]
    (panel,) = panels([[], rows], True)
    assert panel == Panel(panel.title, panel.explanation, [(1, [(1.0, 3.0)])], [(1, [(0.0, 1.0)])], [(1, [(0.0, 2.0)])])
    rewards = panels([[dict(stage="warmup", step=1, loss=2.0), dict(stage="reward", step=1, loss=0.7)]], False)
    assert [(p.title, p.lines[0][1]) for p in rewards] == [("Warm-up loss", [(1, 2.0)]), ("Preference loss", [(1, 0.7)])]


def test_a_sample_may_hold_a_fence_of_its_own():
    """Code in a response ends at the fence that began it, which is longer, and not at the first."""
    said = "one\n```\n**after** (no caption)\n````x"
    page = f"## 1\n\n{fenced('p')}\n\n**before** (score 1)\n\n{fenced(said)}\n\n**after**\n\n{fenced('b')}\n"
    assert sample_blocks(page) == [("p", [("before (score 1)", said), ("after", "b")])]


def test_marks_of_greedy_decoding_are_open():
    pytest.importorskip("matplotlib")
    full, opened = (draw(Panel("t", "e", [], *marks), 0, "step", load_pyplot())
                    for marks in (([(0, [(1, 1)])], []), ([], [(0, [(1, 1)])])))
    assert "fill: var(--run0)" in full and "fill: var(--run0)" not in opened and "stroke: var(--run0)" in opened


def test_a_running_mean_keeps_length_and_mean_of_a_line():
    points = [(x, 2.0 * x) for x in range(400)]
    smooth = running_mean(points)
    assert [x for x, _ in smooth] == list(range(400)) and smooth[200] == points[200] and 0 < smooth[0][1] < 10


def test_each_chart_takes_its_colours_from_the_page():
    """Hard-coded black on a dark page is invisible."""
    pytest.importorskip("matplotlib")
    svg = draw(Panel("t", "e", [(0, [(0, 1), (1, 2)]), (9, [(0, 2), (1, 1)])], [(0, [(1, 1)])], []), 3, "step", load_pyplot())
    assert svg.startswith("<svg") and all(name in svg for name in ("currentColor", "var(--run0)", "var(--run1)", "var(--line)"))
    assert not re.search(r"#(?!p3-)[0-9a-f]{6}\b", svg) and "http" not in re.sub(r'xmlns\S*="[^"]*"', "", svg)


@pytest.mark.parametrize("arguments, words", [
    (["{tmp}/none"], "none: no such folder"), (["{tmp}"], "config.json: missing or damaged; is this a run folder?"),
    (["{run}", "{reward_run}"], "make a page of each kind"), (["{run}", "--out", "{tmp}/no/r.html"], "No such file or directory"),
])
def test_bad_input_is_one_line(arguments, words, policy_run, reward_run, tmp_path, capsys):
    fill = dict(tmp=tmp_path, run=policy_run, reward_run=reward_run)
    with pytest.raises(SystemExit) as stop:
        report.main([text.format(**fill) for text in arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and words in said
