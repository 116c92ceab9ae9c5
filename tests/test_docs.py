"""The pages agree with the source: links, names, quoted code, numbers, settings and commands.

The two languages of the walkthrough agree with each other, and GitHub can render every formula.
"""

import ast
import contextlib
import io
import json
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data import helpdesk
from minirlhf.rl.advantages import gae, group_normalized, leave_one_out
from minirlhf.rl.algorithms import ALGORITHMS
from minirlhf.rl.losses import ppo_loss, preference_loss

import pytest
import test_exact
import tiny
import torch
from test_readme import COMMANDS, PAGES, WALKS, commands_of

WALK, WALK_ZH = WALKS
LAB = "minirlhf/lab/README.md"
QUICK_START = "快速开始"  # a section of the Chinese page alone
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"!?\[([^\[\]]*)\]\(([^()\s]+)\)")
MATH = re.compile(r"\$`(.+?)`\$", re.S)
CODE = re.compile(r"`[^`]+`")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d*(?:,\d{3})*\.?\d+(?:e-?\d+)?%?")

PROGRAM = re.compile(r"^```python\n(import .*?)^```\n```text\n(.*?)^```$", re.M | re.S)

# Numbers of the walkthrough that are not in README.md.
# The table of metrics: runs of train_reward.py and train_policy.py with --seed 0, 1 and 2,
# one thread.
METRIC_RANGES = set(
    """+0.06 +0.16 +1.67 +1.71 +1.80 +1.85 +4.36 +4.71 -0.12 -0.28 0.0 0.00 0.002 0.003 0.0045
    0.010 0.0125 0.014 0.020 0.031 0.06 0.08 0.09 0.121 0.14 0.16 0.161 0.37 0.38 0.54 0.58
    0.62 0.74 0.92 1.04 100.0% 28% 33 35 36% 37 38 4.6% 5.2 5.6 5.9% 99.9%""".split()
)
SECTIONS = {str(number) for number in range(1, 17)}  # of the walkthrough
EXAMPLES = set("9 10 11 81 100 121 +4.2 -0.4".split())  # computed by the tests below
NOTES = set("2.1 2.2 2.3 2.4 3.1 3.2 3.3 4.1".split())  # sections of the Chinese notes

# LaTeX and AMS macros that GitHub renders; it rejects \operatorname and \newcommand.
MACROS = set(
    """pi theta tau rho gamma beta sigma lambda delta epsilon ell nabla partial log ln exp min
    mathrm mathbb mu text sum prod pm frac tfrac hat mid cdot dots left right qquad
    sim ge ne , ; | alpha gets""".split()
)

# One spelling per term, so that a search finds all places: (wrong, right), in prose, any case.
TERMS = [
    (r"rewards[- ]to[- ]go|reward to go", "reward-to-go"),
    (r"\blog ?prob", "log-prob"),
    ("hyper-param", "hyperparameter"),
    (r"\broll[- ]out", "rollout"),
    ("mini-batch", "minibatch"),
    ("micro ?batch", "micro-batch"),
    ("tokeniser", "tokenizer"),
    ("help-?desk", "help desk"),
    ("optimis", "optimize"),
    ("normalis", "normalize"),
    ("value-head", "value head"),
    ("over-optimi", "overoptimization"),
    ("剩余奖励|后续回报", "剩余回报"),
    ("基准", "基线"),
    ("回报模型|打分模型", "奖励模型"),
    ("对数机率", "对数概率"),
    ("值头部", "价值头"),
    ("奖励作弊", "奖励黑客"),
    ("抽样", "采样"),
    ("隐状态", "隐藏状态"),
    ("重要性比", "重要性采样"),
    ("基础模型|底座模型", "基座模型"),
]


def read(page: str) -> str:
    return (tiny.ROOT / page).read_text(encoding="utf-8")


def prose(text: str, code: bool = False) -> str:
    """The text without code blocks, formulas, link targets and numbers of headings.

    code: keep code spans.
    """
    text = MATH.sub(" ", re.sub(r"^ {4}.*|^## \d+\.", "", FENCE.sub("", text), flags=re.M))
    text = LINK.sub(lambda link: f" {link[1]} ", text)
    return text if code else CODE.sub(" ", text)


def links(page: str) -> list[tuple[str, str]]:
    """(text, target) of each link."""
    return LINK.findall(MATH.sub(" ", FENCE.sub("", read(page))))


def shared_links(page: str) -> list[tuple[str, str]]:
    """The links of the text that both languages have."""
    return LINK.findall(MATH.sub(" ", FENCE.sub("", shared_text(page))))


def anchors(page: str) -> list[str]:
    """GitHub's anchors of the headings: lower case, no punctuation, a hyphen for each blank."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def shared_text(page: str) -> str:
    """The text that both languages have: the page without the Chinese quick start."""
    return re.sub(rf"^## {QUICK_START}\n.*?(?=^## )", "", read(page), flags=re.M | re.S)


def sections(page: str) -> list[str]:
    return re.split(r"^## ", shared_text(page), flags=re.M)


def target_of(page: str, target: str) -> tuple[Path, str]:
    file, _, anchor = target.partition("#")
    return ((tiny.ROOT / page).parent / file).resolve() if file else tiny.ROOT / page, anchor


def definitions(path: Path) -> dict[str, list[str]]:
    """Source lines of each function, class and setting defined in a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    blocks = {}

    def visit(body):
        for node in body:
            for name in defined_names(node):
                blocks[name] = lines[node.lineno - 1 : node.end_lineno]
            if isinstance(node, ast.ClassDef):
                visit(node.body)

    visit(ast.parse("\n".join(lines)).body)
    return blocks


def defined_names(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_file_and_a_heading(page):
    """Finds links to files that moved and to headings that changed."""
    for text, target in links(page):
        if not target.startswith("https://"):
            path, anchor = target_of(page, target)
            assert path.exists(), f"{page}: [{text}]({target}): no such file"
            assert not anchor or anchor in anchors(path.relative_to(tiny.ROOT)), (
                f"{page}: [{text}]({target}): no such heading"
            )


@pytest.mark.parametrize("page", PAGES)
def test_the_name_in_a_link_is_defined_in_the_file_it_leads_to(page):
    """Finds links like [`gae`](advantages.py) to functions that were renamed or moved."""
    for text, target in links(page):
        path, _ = target_of(page, target)
        if re.fullmatch(r"`\w+`", text):
            assert path.suffix == ".py" and text.strip("`") in definitions(path), (
                f"{page}: [{text}]({target}): not defined there"
            )
        elif re.fullmatch(r"`?[\w/]+\.\w+`?", text):
            assert (tiny.ROOT / text.strip("`")).resolve() == path, (
                f"{page}: [{text}]({target}): two different files"
            )


@pytest.mark.parametrize("page", WALKS)
def test_quoted_code_is_part_of_the_linked_function(page):
    """Each block of Python is a part of the function or class in the last link before it.

    Programs are run by test_programs_print_what_the_page_shows.
    """
    text = PROGRAM.sub("", read(page))
    count = 0
    for block in FENCE.finditer(text):
        if block[1] != "python":
            continue
        earlier = LINK.findall(text[: block.start()])
        name, target = [link for link in earlier if re.fullmatch(r"`\w+`", link[0])][-1]
        source = definitions(target_of(page, target)[0])[name.strip("`")]
        quoted = block[2].splitlines()
        count += 1
        windows = [
            source[start : start + len(quoted)] for start in range(len(source) - len(quoted) + 1)
        ]
        assert quoted in [textwrap.dedent("\n".join(window)).splitlines() for window in windows], (
            f"{page}: not a part of {name} in {target}:\n{block[2]}"
        )
        assert len(quoted) <= 8
    assert count > 15


@pytest.mark.parametrize("page", WALKS)
def test_the_differences_between_algorithms_are_lines_of_the_source(page):
    """Each line of a diff block occurs in the source."""
    changed = [
        line[1:].strip()
        for language, block in FENCE.findall(read(page))
        if language == "diff"
        for line in block.splitlines()
        if line[0] in "+-"
    ]
    names = ("advantages.py", "losses.py")
    source = "".join((tiny.ROOT / "minirlhf" / "rl" / name).read_text() for name in names)
    assert len(changed) > 15
    assert [line for line in changed if line not in source] == []


@pytest.mark.parametrize("page", WALKS)
def test_every_section_with_a_formula_has_code(page):
    """Formulas and code occur in the same sections."""
    for section in sections(page)[1:]:
        languages = [language for language, _ in FENCE.findall(section)]
        assert ("math" in languages) == ("python" in languages), section.splitlines()[0]


@pytest.mark.parametrize("page", WALKS)
def test_every_algorithm_is_explained_with_its_function(page):
    """Each algorithm of the README's table, and its function, occurs in the walkthrough."""
    linked = {text.strip("`") for text, _ in links(page)}
    table = re.findall(r"^\| `([\w-]+)` \|.*?\| \[`(\w+)`\]", read("README.md"), re.M)
    assert len(table) == 8
    assert [algorithm for algorithm, _ in table] == list(ALGORITHMS)
    for algorithm, function in table:
        assert f"`{algorithm}`" in read(page), f"{page}: nothing about {algorithm}"
        assert function in linked, f"{page}: no link to {function}"


def test_both_languages_have_the_same_formulas_code_links_and_numbers():
    """Finds a correction that was made in one language only."""

    def place(page: str, target: str) -> tuple:
        path, anchor = target_of(page, target)
        file = path.relative_to(tiny.ROOT).as_posix()
        names = [name for name in anchors(file) if name != QUICK_START] if anchor else []
        return file.replace(".zh.md", ".md"), anchor and names.index(anchor)

    assert QUICK_START in anchors(WALK_ZH)
    assert len(sections(WALK)) == len(sections(WALK_ZH))
    assert (links(WALK)[0][1], links(WALK_ZH)[0][1]) == ("README.zh.md", "README.md")
    for english, chinese in zip(sections(WALK), sections(WALK_ZH), strict=True):
        where = english.splitlines()[0]
        assert FENCE.findall(english) == FENCE.findall(chinese), where
        assert sorted(MATH.findall(english)) == sorted(MATH.findall(chinese)), where
        assert sorted(NUMBER.findall(prose(english))) == sorted(NUMBER.findall(prose(chinese))), (
            where
        )
    english, chinese = (
        [(text if "`" in text else "", place(page, target)) for text, target in shared_links(page)]
        for page in WALKS
    )
    assert english == chinese


@pytest.mark.parametrize("page", PAGES)
def test_github_can_render_every_formula(page):
    """GitHub renders no formula that touches a letter or a Chinese character.

    It also rejects unknown macros.
    """
    text = read(page)
    outside = FENCE.sub(lambda block: "\n" if block[1] != "math" else "\n\n", text)
    for formula in MATH.finditer(outside):
        before = outside[formula.start() - 1]
        after = outside[formula.end()]
        assert before.isspace() or before in "([", f"{page}: no blank before {formula[0]}"
        assert not after.isalnum(), f"{page}: a letter after {formula[0]}"
        assert "\n" not in formula[1], f"{page}: a line ends inside {formula[0]}"
    assert page not in WALKS or "$" not in MATH.sub("", outside), (
        f"{page}: a formula without backticks, in which Markdown interprets _ and *"
    )
    formulas = MATH.findall(outside) + [
        body for language, body in FENCE.findall(text) if language == "math"
    ]
    for formula in formulas:
        assert set(re.findall(r"\\([A-Za-z]+|.)", formula)) <= MACROS, formula
        assert formula.count("{") == formula.count("}"), formula
        assert formula.count(r"\left") == formula.count(r"\right"), formula
    cells = [
        formula
        for line in outside.splitlines()
        if line.startswith("|")
        for formula in MATH.findall(line)
    ]
    assert not [formula for formula in cells if "|" in formula], "a | ends the table cell"


@pytest.mark.parametrize("page", PAGES)
def test_terms_have_one_spelling(page):
    """Finds another spelling of a term in TERMS."""
    text = re.sub(r"[\w./-]+\.(?:md|py|jsonl?|tiktoken)\b", " ", prose(read(page)))
    for wrong, right in TERMS:
        match = re.search(wrong, text, re.I)
        assert not match, f"{page}: {match[0]!r} instead of {right!r}"


@pytest.mark.parametrize("page", WALKS)
def test_measured_numbers_are_those_of_the_other_pages(page):
    """Finds a number that was updated in another page only, and one that was not measured."""
    others = "\n".join(read(other) for other in PAGES if other not in WALKS)
    known = set(NUMBER.findall(prose(others, code=True)))
    text = re.sub(r"[(（](?:[^()（）]* )?(?:19|20)\d\d[)）]", "", prose(read(page)))
    numbers = {number for number in NUMBER.findall(text) if re.search(r"[-+.,%]|^\d\d+$", number)}
    settings = {
        str(default)
        for config in (PolicyConfig(), RewardConfig())
        for default in vars(config).values()
    }
    assert len(numbers) > 40
    exact = {f"{variance:.2f}" for variance in test_exact.variance_by_baseline().values()}
    known |= settings | exact | EXAMPLES | NOTES | SECTIONS | METRIC_RANGES
    assert numbers - known - {"2024"} == set()  # the year of the notes


def test_exact_variances_are_those_that_the_test_prints(capsys):
    """The three exact variances in the pages are those that tests/test_exact.py computes."""
    shown = SimpleNamespace(disabled=contextlib.nullcontext)
    test_exact.test_each_algorithm_has_less_variance_than_the_one_before(shown)
    printed = ast.literal_eval(capsys.readouterr().out.split(": ", 1)[1])
    assert set(printed) == {"reinforce", "reward-to-go", "baseline"}
    for page in ("tests/README.md", *WALKS):
        assert {f"{variance:.1f}" for variance in printed.values()} <= set(
            NUMBER.findall(prose(read(page)))
        ), page


@pytest.mark.parametrize("page", WALKS)
def test_exact_variances_by_baseline_are_in_the_walkthrough(page):
    """24.08, 20.82 and 20.32, in this order."""
    variance = test_exact.variance_by_baseline()
    names = ("value", "best for each term", "best for the sum")
    numbers = NUMBER.findall(prose(read(page)))
    first = numbers.index(f"{variance['value']:.2f}")
    assert numbers[first : first + 3] == [f"{variance[name]:.2f}" for name in names]


@pytest.mark.parametrize("page", WALKS)
def test_programs_print_what_the_page_shows(page):
    """Runs each program of the walkthrough, whose output is the next block."""
    programs = PROGRAM.findall(read(page))
    assert programs
    for program, expected in programs:
        assert len(program.splitlines()) <= 8
        output = io.StringIO()
        with contextlib.redirect_stdout(output), torch.random.fork_rng():
            exec(program, {})
        assert output.getvalue() == expected


@pytest.mark.parametrize("page", WALKS)
def test_the_preference_pair_of_the_introduction_is_in_the_data(page):
    """Its text is in the data, and its gold utilities are those of the task."""
    shown = next(
        json.loads(block)
        for language, block in FENCE.findall(shared_text(page))
        if language == "json"
    )
    path = tiny.ROOT / "data" / "helpdesk-validation.jsonl"
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    record = next(record for record in records if record["prompt"] == shown["prompt"])
    pair = [record["responses"].index(shown[name]) for name in ("chosen", "rejected")]
    assert pair in record["preferences"]
    for name in ("chosen", "rejected"):
        gold = f"{helpdesk.gold(shown['prompt'], shown[name], True):+.1f}"
        assert gold in NUMBER.findall(prose(read(page))), gold


@pytest.mark.parametrize("page", WALKS)
def test_answers_of_the_exercises(page):
    """Computes the numeric answers with the functions of the project."""
    answers = re.findall(
        r"^\d\. (.*?)(?=^\d\. |^</details>)", sections(page)[15].split("<details>")[1], re.M | re.S
    )
    assert len(answers) == 5
    shown = [re.findall(r"`([-\d., ]+)`(?!\$)", answer) for answer in answers]

    def text(*numbers, digits: int) -> str:
        return ", ".join(f"{number:.{digits}f}" for number in numbers)

    scores = torch.eye(3) - 1 / 3  # grad log pi of each action of the bandit
    bandit = []
    for baseline in (0.0, 10.0):
        grads = scores * (torch.tensor([9.0, 10.0, 11.0]) - baseline)[:, None]
        assert torch.allclose(grads.mean(0), torch.tensor([-1 / 3, 0.0, 1 / 3]), atol=1e-5)
        bandit.append(text(grads.var(0, correction=0).sum(), digits=2))
    assert torch.allclose(scores.square().sum(1), torch.tensor(2 / 3))

    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.6, 0.8]])
    gae_lists = [gae(rewards, values, mask, 1.0, lam)[0].tolist() for lam in (0.0, 0.5, 1.0)]
    gae_answers = [", ".join(f"{x:.2g}" for x in row) for row in gae_lists]

    ppo = []
    for advantage in (2.0, -2.0):
        for ratio in (1.5, 0.5):
            logprobs = torch.tensor([[ratio]]).log().requires_grad_()
            loss = ppo_loss(
                logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), mask[:, :1], 0.2, 1.0
            )
            loss.backward()
            assert bool(logprobs.grad) == ((ratio > 1) == (advantage < 0))
            ppo += [str(ratio), text(-loss, digits=1)]

    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])
    column = torch.ones(4, 1, dtype=torch.bool)
    groups = [
        text(*weights.flatten(), digits=2)
        for weights in (
            leave_one_out(returns[:, None], column, 4),
            group_normalized(returns, column, 4),
        )
    ]

    pairs = []
    for difference in (2.0, -2.0):
        difference = torch.tensor([difference])
        loss = preference_loss(difference + 5, torch.tensor([5.0]))
        pairs += [text(torch.sigmoid(difference).item(), digits=2), text(loss, digits=2)]
    assert shown == [bandit, gae_answers, ppo, groups, pairs]


@pytest.mark.parametrize("page", WALKS)
def test_the_table_of_settings_has_the_defaults(page):
    """Each row of the table of settings: the name and its default."""
    defaults = vars(PolicyConfig())
    rows = re.findall(r"^\| `(\w+)` \| `([\w.-]+)` \|", read(page), re.M)
    assert len(rows) == 11
    for name, default in rows:
        assert defaults[name] == type(defaults[name])(default), name


@pytest.mark.parametrize("page", WALKS)
def test_the_table_of_metrics_names_logged_metrics(page):
    """Each metric in the table is computed in train_policy.py or minibatch_loss."""
    files = ("train_policy.py", "minirlhf/rl/algorithms.py")
    source = "".join((tiny.ROOT / name).read_text() for name in files)
    tables = re.findall(r"^\| `(\w+)` \| [^`]", sections(page)[14], re.M)
    assert len(tables) >= 12
    for name in tables:
        assert f"{name}=" in source or f'["{name}"]' in source, name


@pytest.mark.parametrize("page", WALKS)
def test_values_of_settings_are_the_defaults(page):
    """Checks `lam` = 0.95 and [`gamma`](config.py) = 1 in the text against the defaults."""
    defaults = vars(RewardConfig()) | vars(PolicyConfig())
    stated = re.findall(r"`(\w+)`\s+= ([\d.]*\d)", prose(read(page), code=True))
    assert len(stated) >= 5
    for name, value in stated:
        assert defaults[name] == float(value), f"{page}: {name} = {value}"


@pytest.mark.parametrize("page", WALKS)
def test_commands_are_in_another_page_or_run_existing_tests(page):
    """The commands of the other pages are run by test_readme.py."""
    pytests = 0
    for command in commands_of(read(page)):
        if command not in COMMANDS:
            words = re.fullmatch(r"pytest (tests/\w+\.py)(?: -k (\w+))?", command)
            assert words, f"{page}: {command}: not a command of another page"
            pytests += 1
            tests = [name for name in definitions(tiny.ROOT / words[1]) if name.startswith("test_")]
            assert any((words[2] or "") in name for name in tests), (
                f"{page}: {command}: no such test"
            )
    assert pytests


def test_the_front_page_is_short():
    """At most 200 lines and 2,200 words: details belong to the page of a package."""
    text = read("README.md")
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 2200


def test_the_results_of_the_front_page_are_those_of_the_lab():
    """Finds a result that was updated in one page only."""
    rows = re.findall(r"^\| `[\w-]+` \| [+-]\d.*$", read("README.md"), re.M)
    assert [row.split("`")[1] for row in rows] == [*ALGORITHMS, "dpo"]
    lab = read(LAB)
    assert [row for row in rows if row not in lab] == []


def test_results_state_their_version():
    """Each section of the lab's page with a table or a picture names a version or a date."""
    sections = re.split(r"^## ", read(LAB), flags=re.M)[1:]
    assert len(sections) >= 8
    for section in sections:
        assert not re.search(r"^(\||!)", section, re.M) or re.search(
            r"[Vv]ersion\s\d|^As of ", section, re.M
        ), section.splitlines()[0]


def test_the_cited_version_is_the_newest():
    (cited,) = re.findall(r"version = \{([\d.]+)\}", read("README.md"))
    assert re.findall(r"^- \*\*([\d.]+)\*\*", read("minirlhf/CHANGES.md"), re.M)[0] == cited
