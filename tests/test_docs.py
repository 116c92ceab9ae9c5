"""The pages say what the source says: links, names, quoted lines, figures and settings are held to it; so is one language to the
other, and each formula to what GitHub can draw."""

import ast
import contextlib
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_exact
import tiny
from test_readme import commands_of

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.ladder import LADDER

WALK, WALK_ZH = "minirlhf/README.md", "minirlhf/README.zh.md"
WALKS, PAGES = (WALK, WALK_ZH), ("README.md", "data/README.md", WALK, WALK_ZH)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"!?\[([^\[\]]*)\]\(([^()\s]+)\)")
MATH = re.compile(r"\$`(.+?)`\$", re.S)
CODE = re.compile(r"`[^`]+`")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d*(?:,\d{3})*\.?\d+(?:e-?\d+)?%?")

# LaTeX and AMS macros that MathJax has and GitHub lets through; \operatorname and \newcommand it does not.
MACROS = set("""pi theta tau rho gamma beta sigma lambda delta epsilon ell nabla partial log ln exp min mathrm mathbb text
    sum prod pm frac tfrac hat mid cdot dots left right qquad sim ge ne , ; |""".split())

# What is written otherwise somewhere would be looked for in vain: (wrong, right), in prose, whatever the case.
TERMS = [(r"rewards[- ]to[- ]go|reward to go", "reward-to-go"), (r"\blog ?prob", "log-prob"), ("hyper-param", "hyperparameter"),
         (r"\broll[- ]out", "rollout"), ("mini-batch", "minibatch"), ("micro ?batch", "micro-batch"), ("tokeniser", "tokenizer"),
         ("help-?desk", "help desk"), ("optimizer", "optimiser"), ("normaliz", "normalise"), ("value-head", "value head"),
         ("over-?optimiz|overoptimi", "over-optimisation"), ("剩余奖励|后续回报", "剩余回报"), ("基准", "基线"),
         ("回报模型|打分模型", "奖励模型"), ("对数机率", "对数概率"), ("值头部", "价值头"), ("重要性比率", "重要性比")]


def read(page: str) -> str:
    return (tiny.ROOT / page).read_text(encoding="utf-8")


def prose(text: str, code: bool = False) -> str:
    """Without code blocks, formulas, link targets, numbers of headings and (unless code is wanted) code spans."""
    text = MATH.sub(" ", re.sub(r"^ {4}.*|^## \d+\.", "", FENCE.sub("", text), flags=re.M))
    text = LINK.sub(lambda link: f" {link[1]} ", text)
    return text if code else CODE.sub(" ", text)


def links(page: str) -> list[tuple[str, str]]:
    return LINK.findall(MATH.sub(" ", FENCE.sub("", read(page))))


def anchors(page: str) -> list[str]:
    """The names that GitHub gives to headings: small letters, no punctuation, a hyphen for each blank."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def sections(page: str) -> list[str]:
    return re.split(r"^## ", read(page), flags=re.M)


def target_of(page: str, target: str) -> tuple[Path, str]:
    file, _, anchor = target.partition("#")
    return ((tiny.ROOT / page).parent / file).resolve() if file else tiny.ROOT / page, anchor


def definitions(path: Path) -> dict[str, list[str]]:
    """Source lines of each function, class and setting defined in a file."""
    lines, found = path.read_text(encoding="utf-8").splitlines(), {}

    def visit(body):
        for node in body:
            names = ([node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else
                     [target.id for target in node.targets if isinstance(target, ast.Name)] if isinstance(node, ast.Assign) else
                     [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else [])
            found.update({name: lines[node.lineno - 1:node.end_lineno] for name in names})
            if isinstance(node, ast.ClassDef):
                visit(node.body)

    visit(ast.parse("\n".join(lines)).body)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_file_and_a_heading(page):
    """A file that moved or a heading that was reworded leaves a link that nobody clicks until a reader does."""
    for text, target in links(page):
        if not target.startswith("https://"):
            path, anchor = target_of(page, target)
            assert path.exists(), f"{page}: [{text}]({target}): no such file"
            assert not anchor or anchor in anchors(path.relative_to(tiny.ROOT)), f"{page}: [{text}]({target}): no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_the_name_in_a_link_is_defined_in_the_file_it_leads_to(page):
    """[`gae`](advantages.py): a function that was renamed, or moved to another file."""
    for text, target in links(page):
        path, _ = target_of(page, target)
        if re.fullmatch(r"`\w+`", text):
            assert path.suffix == ".py" and text.strip("`") in definitions(path), f"{page}: [{text}]({target}): not defined there"
        elif re.fullmatch(r"`?[\w/]+\.\w+`?", text):
            assert (tiny.ROOT / text.strip("`")).resolve() == path, f"{page}: [{text}]({target}): two different files"


@pytest.mark.parametrize("page", WALKS)
def test_quoted_code_stands_in_the_function_it_is_quoted_from(page):
    """Each block of Python is quoted, line by line, from the name in the last link before it."""
    text, count = read(page), 0
    for block in FENCE.finditer(text):
        if block[1] != "python":
            continue
        name, target = [found for found in LINK.findall(text[:block.start()]) if re.fullmatch(r"`\w+`", found[0])][-1]
        source = definitions(target_of(page, target)[0])[name.strip("`")]
        quoted, count = block[2].splitlines(), count + 1
        windows = [source[start:start + len(quoted)] for start in range(len(source) - len(quoted) + 1)]
        assert quoted in [textwrap.dedent("\n".join(window)).splitlines() for window in windows], \
            f"{page}: not a part of {name} in {target} any more:\n{block[2]}"
        assert len(quoted) <= 8
    assert count > 15


@pytest.mark.parametrize("page", WALKS)
def test_no_section_has_a_formula_without_its_code(page):
    for section in sections(page)[1:]:
        languages = [language for language, _ in FENCE.findall(section)]
        assert ("math" in languages) == ("python" in languages), section.splitlines()[0]


@pytest.mark.parametrize("page", WALKS)
def test_every_rung_is_explained_with_the_functions_that_are_it(page):
    """A row added to the README's table of the ladder, or a function in it renamed, and not told here."""
    linked = {text.strip("`") for text, _ in links(page)}
    table = re.findall(r"^\| `([\w-]+)` \|.*?\| \[`(\w+)`\]", read("README.md"), re.M)
    assert len(table) == 7
    for rung, function in table:
        assert rung in LADDER and f"`{rung}`" in read(page), f"{page}: nothing about {rung}"
        assert function in linked, f"{page}: no link to {function}"


def test_both_languages_have_the_same_formulas_code_links_and_figures():
    """A correction made in one language alone."""
    def place(page: str, target: str) -> tuple:
        path, anchor = target_of(page, target)
        file = path.relative_to(tiny.ROOT).as_posix()
        return file.replace(".zh.md", ".md"), anchor and anchors(file).index(anchor)

    assert len(sections(WALK)) == len(sections(WALK_ZH))
    assert (links(WALK)[0][1], links(WALK_ZH)[0][1]) == ("README.zh.md", "README.md")
    for english, chinese in zip(sections(WALK), sections(WALK_ZH), strict=True):
        where = english.splitlines()[0]
        assert FENCE.findall(english) == FENCE.findall(chinese), where
        assert sorted(MATH.findall(english)) == sorted(MATH.findall(chinese)), where
        assert sorted(NUMBER.findall(prose(english))) == sorted(NUMBER.findall(prose(chinese))), where
    theirs = [[(text if "`" in text else "", place(page, target)) for text, target in links(page)] for page in WALKS]
    assert theirs[0] == theirs[1]


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_such_as_github_draws(page):
    """It draws no formula that touches a letter (nor, before it, a Chinese character), and stops at a macro that it lacks."""
    text = read(page)
    outside = FENCE.sub(lambda block: "\n" if block[1] != "math" else "\n\n", text)
    for found in MATH.finditer(outside):
        before, after = outside[found.start() - 1], outside[found.end()]
        assert before.isspace() or before in "([", f"{page}: no blank before {found[0]}"
        assert not after.isalnum(), f"{page}: a letter behind {found[0]}"
        assert "\n" not in found[1], f"{page}: a line ends inside {found[0]}"
    assert page not in WALKS or "$" not in MATH.sub("", outside), "a formula without backticks, whose _ and * are Markdown's"
    formulas = MATH.findall(outside) + [body for language, body in FENCE.findall(text) if language == "math"]
    for formula in formulas:
        assert set(re.findall(r"\\([A-Za-z]+|.)", formula)) <= MACROS, formula
        assert formula.count("{") == formula.count("}") and formula.count(r"\left") == formula.count(r"\right"), formula
    cells = [formula for line in outside.splitlines() if line.startswith("|") for formula in MATH.findall(line)]
    assert not [formula for formula in cells if "|" in formula], "a | in it ends the cell"


@pytest.mark.parametrize("page", PAGES)
def test_terms_are_spelt_the_same_everywhere(page):
    for wrong, right in TERMS:
        found = re.search(wrong, re.sub(r"[\w./-]+\.(?:md|py|jsonl?|tiktoken)\b", " ", prose(read(page))), re.I)
        assert not found, f"{page}: {found[0]!r} where the others say {right!r}"


@pytest.mark.parametrize("page", WALKS)
def test_measured_figures_are_those_of_the_readme(page):
    """A figure that a lab measured again and the README tells anew, or one that nobody measured."""
    known = set(NUMBER.findall(prose(read("README.md"), code=True)))
    text = re.sub(r"\((?:[^()]* )?(?:19|20)\d\d\)", "", prose(read(page)))
    figures = {number for number in NUMBER.findall(text) if re.search(r"[-+.,%]|^\d\d+$", number)}
    settings = {str(default) for config in (PolicyConfig(), RewardConfig()) for default in vars(config).values()}
    assert len(figures) > 40
    assert figures - known - settings - {"2024"} == set()  # the year of the notes


def test_exact_variances_are_those_that_the_test_prints(capsys):
    shown = SimpleNamespace(disabled=contextlib.nullcontext)
    test_exact.test_variance_falls_along_the_ladder_when_every_step_is_rewarded(shown)
    printed = ast.literal_eval(capsys.readouterr().out.split(": ", 1)[1])
    assert set(printed) == {"reinforce", "reward-to-go", "baseline"}
    for page in ("README.md", *WALKS):
        assert {f"{variance:.1f}" for variance in printed.values()} <= set(NUMBER.findall(prose(read(page)))), page


@pytest.mark.parametrize("page", WALKS)
def test_settings_are_told_with_their_defaults(page):
    """`lam` = 0.95, or [`gamma`](config.py) = 1"""
    defaults = vars(RewardConfig()) | vars(PolicyConfig())
    found = re.findall(r"`(\w+)` +(?:\]\(config.py\) )?= ([\d.]*\d)", prose(read(page), code=True))
    assert len(found) >= 5
    for name, value in found:
        assert defaults[name] == float(value), f"{page}: {name} = {value}"


@pytest.mark.parametrize("page", WALKS)
def test_commands_are_those_of_the_readme_or_name_tests_that_are_there(page):
    """Those of the README are run by its own test."""
    known, pytests = commands_of(read("README.md")), 0
    for command in commands_of(read(page)):
        if command not in known:
            words = re.fullmatch(r"pytest (tests/\w+\.py)(?: -k (\w+))?", command)
            assert words, f"{page}: {command}: not a command of the README"
            pytests += 1
            tests = [name for name in definitions(tiny.ROOT / words[1]) if name.startswith("test_")]
            assert any((words[2] or "") in name for name in tests), f"{page}: {command}: no such test"
    assert pytests
