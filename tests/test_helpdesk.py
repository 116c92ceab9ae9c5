"""The help desk: gold utility by hand, best responses, probes, robustness, labels, data files."""

import gzip
import itertools
import json
import math
import random
import statistics
import time
from collections import Counter
from pathlib import Path

from minirlhf.data import helpdesk
from minirlhf.data.helpdesk import (
    COLORS,
    ITEMS,
    PHRASES,
    SLOTS,
    Context,
    best_response,
    gold,
    gold_parts,
    parse_prompt,
    preference_probability,
    probes,
    sentences,
)
from minirlhf.tools.helpdesk_data import (
    GROUPS,
    MAX_WORDS,
    SPLITS,
    prompts_of,
    sample_response,
    write_data,
)

import pytest

DATA = Path(__file__).parent.parent / "data"
ASKS_REFUND = prompts_of(Context("blue", "kettle", "broken", "refund"))[0]
ASKS_MANUAL = prompts_of(Context("red", "lamp", "gift", "manual"))[0]


def shipped(split: str) -> list[dict]:
    path = DATA / ("helpdesk-train.jsonl.gz" if split == "train" else f"helpdesk-{split}.jsonl")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.decode("utf-8").splitlines()]


@pytest.fixture(scope="module")
def samples() -> list[tuple[str, str, float]]:
    """2,000 (prompt, response, gold utility) of the average agent."""
    rng = random.Random(0)
    prompts = [rng.choice(prompts_of(rng.choice(SPLITS["train"]))) for _ in range(2000)]
    responses = [sample_response(prompt, rng) for prompt in prompts]
    return [
        (prompt, response, gold(prompt, response)) for prompt, response in zip(prompts, responses)
    ]


def say(slot: str, topic: str, number: int = 0) -> str:
    return PHRASES[slot][topic][number]


def utility_of(name: str) -> float:
    """The utility of one part of a response, for example "wrong action" or "repeat"."""
    special = {"repeat": helpdesk.REPEAT, "out of order": helpdesk.DISORDER}
    if name in special:
        return special[name]
    quality, _, slot = name.partition(" ")
    return helpdesk.UTILITY[slot][quality]


POLITE = say("opening", "polite")
RUDE = say("opening", "bad")
BYE = say("goodbye", "polite")
FILLER = say("filler", "bad")
VOUCHER = say("voucher", "faulty", 1)
REFUSAL = say("action", "bad")
# description of a response -> prompt, sentences of the response, names of the parts that count
BY_HAND = {
    "nothing": (ASKS_REFUND, [], []),
    "the best": (
        ASKS_REFUND,
        [
            POLITE,
            say("remark", "broken", 1),
            say("action", "refund", 0),
            say("next step", "refund", 1),
            VOUCHER,
            BYE,
        ],
        [
            "right opening",
            "right remark",
            "right action",
            "right next step",
            "right voucher",
            "right goodbye",
        ],
    ),
    "canned": (
        ASKS_REFUND,
        [RUDE, say("remark", "bad"), REFUSAL, say("next step", "bad"), say("goodbye", "bad")],
        ["bad opening", "bad remark", "bad action", "bad next step", "bad goodbye"],
    ),
    "of another problem": (
        ASKS_REFUND,
        [say("remark", "late"), say("action", "refund", 0)],
        ["wrong remark", "right action"],
    ),
    "the right action twice": (
        ASKS_REFUND,
        [say("action", "refund"), say("action", "refund", 1)],
        ["right action", "repeat"],
    ),
    "the right action and then a refusal": (
        ASKS_REFUND,
        [say("action", "refund"), REFUSAL],
        ["right action", "repeat", "bad action"],
    ),
    "a wrong action and then the right one": (
        ASKS_REFUND,
        [say("action", "repair"), say("action", "refund")],
        ["wrong action", "repeat"],
    ),
    "a goodbye before two earlier slots, and filler": (
        ASKS_REFUND,
        [BYE, FILLER, POLITE, say("next step", "refund")],
        [
            "right goodbye",
            "bad filler",
            "out of order",
            "right opening",
            "out of order",
            "right next step",
        ],
    ),
    "filler twice, which does not count as a repeat": (
        ASKS_REFUND,
        [FILLER, FILLER],
        ["bad filler", "bad filler"],
    ),
    "a voucher although the shop is not at fault": (
        ASKS_MANUAL,
        [say("remark", "gift", 0), VOUCHER],
        ["right remark", "wrong voucher"],
    ),
    "a response to a prompt that is not of the task": (
        "Who are you?",
        [say("action", "refund", 0), BYE],
        ["wrong action", "right goodbye"],
    ),
    "a voucher for an empty prompt": ("", [VOUCHER], ["wrong voucher"]),
}


def test_the_utilities_are_those_of_the_published_results():
    """With another number, all results would be those of another task."""
    table = {
        f"{quality} {slot}": value
        for slot, of_quality in helpdesk.UTILITY.items()
        for quality, value in of_quality.items()
    }
    assert table == {
        "right opening": 0.8,
        "bad opening": -0.6,
        "right remark": 1.0,
        "wrong remark": -1.0,
        "bad remark": -0.6,
        "right action": 1.6,
        "wrong action": -1.0,
        "bad action": -0.6,
        "right next step": 1.0,
        "wrong next step": -0.8,
        "bad next step": -0.6,
        "right voucher": 1.0,
        "wrong voucher": -1.2,
        "right goodbye": 0.8,
        "bad goodbye": -0.6,
        "bad filler": -0.8,
    }
    assert (helpdesk.REPEAT, helpdesk.DISORDER) == (-1.2, -0.8)
    assert (helpdesk.UNREADABLE, helpdesk.UNFINISHED, helpdesk.TAU) == (-0.03, -1.0, 0.5)


@pytest.mark.parametrize("prompt, lines, names", BY_HAND.values(), ids=BY_HAND)
def test_gold_is_the_sum_of_the_parts_counted_by_hand(prompt, lines, names):
    """Fails if a part is missed, counted twice or given a wrong utility."""
    response = " " + " ".join(lines)
    expected = [utility_of(name) for name in names]
    assert gold_parts(prompt, response) == list(zip(names, expected))
    assert gold_parts(prompt, "\n ".join(lines).replace(" ", "  ")) == gold_parts(prompt, response)
    assert gold(prompt, response) == pytest.approx(sum(expected))
    unfinished = gold(prompt, response, finished=False)
    assert unfinished == pytest.approx(sum(expected) + helpdesk.UNFINISHED)


def test_unknown_sentences_cost_by_the_character():
    """A sentence that only resembles a phrase must not count as this phrase."""
    text = POLITE.replace(".", "!") + " your blue kettle your blue kettle " + BYE.lower()
    cost = helpdesk.UNREADABLE * (len(text) - 1)  # the blank between its two sentences is free
    assert gold(ASKS_REFUND, text + " " + BYE) == pytest.approx(cost + utility_of("right goodbye"))


def test_every_prompt_is_parsed_as_the_context_it_was_made_from():
    """Fails if two problems share a phrase, because gold would then reward the wrong response."""
    contexts = [context for split in SPLITS.values() for context in split]
    prompts = [(prompt, context) for context in contexts for prompt in prompts_of(context)]
    assert all(parse_prompt(prompt) == context for prompt, context in prompts)
    assert len({prompt for prompt, _ in prompts}) == 4 * len(contexts)


def test_every_phrase_is_one_sentence_with_one_meaning():
    """A phrase with two meanings, or one that is split in two, would get a wrong utility."""
    phrases = [
        phrase for topics in PHRASES.values() for phrases in topics.values() for phrase in phrases
    ]
    assert len(set(phrases)) == len(phrases) == len(helpdesk._MEANING)
    for phrase in phrases:
        assert sentences(phrase) == [phrase]


def test_no_sample_beats_the_best_response(samples):
    """The share of the gap that training closes is measured against the best response."""
    assert all(utility <= gold(prompt, best_response(prompt)) for prompt, _, utility in samples)
    for context in SPLITS["test"]:
        best = sum(helpdesk.UTILITY[slot]["right"] for slot in SLOTS)
        if context.problem in helpdesk.NO_FAULT:
            best -= helpdesk.UTILITY["voucher"]["right"]
        for prompt in prompts_of(context):
            assert gold(prompt, best_response(prompt)) == pytest.approx(best)


def test_each_probe_has_one_defect_that_costs_at_least_tau():
    """A probe with two defects, or with a small one, would not show what a model understands."""
    seen = Counter()
    for prompt in itertools.chain.from_iterable(map(prompts_of, SPLITS["test"])):
        best = best_response(prompt)
        responses = probes(prompt)
        assert len({best, *responses.values()}) == len(responses) + 1
        assert responses == probes(prompt)
        for defect, response in responses.items():
            assert gold(prompt, response) <= gold(prompt, best) - helpdesk.TAU, (defect, response)
            lost = Counter(sentences(best)) - Counter(sentences(response))
            gained = Counter(sentences(response)) - Counter(sentences(best))
            assert lost.total() <= 1 and gained.total() <= 1, (defect, response)
            # only this defect leaves every sentence as it is
            assert (defect == "out of order") == (not lost and not gained)
        seen.update(responses.keys())
    assert seen["no voucher"] + seen["needless voucher"] == seen["filler"] > seen["no voucher"] > 0
    assert {"wrong problem", "wrong action", "wrong next step", "repeat"} <= set(seen)


def junk(rng: random.Random) -> str:
    """Any characters, also lone surrogates, mixed with parts of the task's text."""
    pieces = [
        "Customer:",
        "\nAgent:",
        "your blue",
        "kettle",
        "{x}",
        "it",
        ". ",
        "?",
        "\x00",
        "\x1b[2J",
        "\u2028",
        " " * 9,
    ]
    letters = "".join(
        chr(rng.choice((rng.randrange(0x80), rng.randrange(0x110000))))
        for _ in range(rng.randrange(30))
    )
    parts = rng.choices(pieces, k=rng.randrange(4)) + [
        letters,
        "w" * rng.randrange(200),
        rng.choice(list(helpdesk._MEANING)),
    ]
    rng.shuffle(parts)
    return rng.choice(("", " ")).join(parts)


def test_gold_accepts_any_text():
    """A policy can generate any text, and an exception in gold would end its run."""
    rng = random.Random(1)
    for _ in range(10_000):
        prompt = rng.choice((ASKS_REFUND, junk(rng)))
        response = junk(rng)
        utility = gold(prompt, response, rng.random() < 0.5)
        assert math.isfinite(utility)
        assert utility < 10
        assert 0.0 <= preference_probability(prompt, response, junk(rng)) <= 1.0


@pytest.mark.parametrize(
    "unit",
    ["a", ".", " ", ". ", "your ", "your blue ", "red lamp", "Customer:", "\n", "your red lamp. "],
)
def test_gold_takes_time_linear_in_the_length(unit):
    """A regular expression that backtracks would take hours for a policy that repeats one word."""
    text = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    assert math.isfinite(gold(text, text))
    assert preference_probability(ASKS_REFUND, text, best_response(ASKS_REFUND)) < 1e-3
    assert time.perf_counter() - start < 20


def test_nonsense_costs_by_its_length():
    """With a constant price per sentence, a policy could repeat one word at no further cost."""
    best = best_response(ASKS_REFUND)
    utilities = [gold(ASKS_REFUND, best + " account" * n) for n in range(1, 9)]
    steps = [b - a for a, b in zip(utilities, utilities[1:])]
    assert utilities[0] < gold(ASKS_REFUND, best)
    assert steps == pytest.approx([len(" account") * helpdesk.UNREADABLE] * 7)
    assert gold(ASKS_REFUND, " " + "account" * 99) < -10  # words without blanks cost the same


def test_contexts_are_split_8_1_1_and_no_context_is_in_two_splits():
    """If a context were in train and test, test metrics would measure memorization."""
    train, validation, test = (set(SPLITS[split]) for split in ("train", "validation", "test"))
    everything = train | validation | test
    kinds = {(context.problem, context.request) for context in everything}
    assert everything == {
        Context(color, item, *kind) for color in COLORS for item in ITEMS for kind in kinds
    }
    assert len(train) + len(validation) + len(test) == len(everything)
    assert len(validation) == len(test) == len(everything) // 10
    for split in SPLITS:
        contexts = {parse_prompt(record["prompt"]) for record in shipped(split)}
        assert contexts <= set(SPLITS[split])
        # every split has every problem and every request
        assert {context.problem for context in contexts} == {problem for problem, _ in kinds}
        assert {context.request for context in contexts} == {request for _, request in kinds}


def test_rebuilt_files_equal_the_shipped_ones(tmp_path):
    """If data/ and its generator differed, published results would belong to an unknown task."""
    write_data(tmp_path)
    names = [
        "helpdesk-test.jsonl",
        "helpdesk-train.jsonl.gz",
        "helpdesk-validation.jsonl",
        "helpdesk.tiktoken",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        rebuilt = (tmp_path / name).read_bytes()
        original = (DATA / name).read_bytes()
        if name.endswith(".gz"):
            # the header contains no name, no date and no platform
            assert rebuilt[3:10] == original[3:10] == b"\x00" * 5 + b"\x02\xff"
            # builds of zlib compress differently, so compare the content
            rebuilt = gzip.decompress(rebuilt)
            original = gzip.decompress(original)
        assert rebuilt == original, name
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 5_000_000


@pytest.mark.parametrize("split, groups", GROUPS.items())
def test_files_contain_groups_of_four_with_labels_of_the_annotator(split, groups):
    """The ceiling is computed from preference_probability, so the labels must follow it."""
    records = shipped(split)
    agreements = []
    ceiling = []
    assert len(records) == groups
    for record in records[:1500]:
        assert list(record) == ["prompt", "responses", "preferences"]
        responses = record["responses"]
        assert len(set(responses)) == 4
        assert all(text.startswith(" ") and not text.endswith(" ") for text in responses)
        assert max(len(text.split()) for text in responses) <= MAX_WORDS
        pairs = sorted(tuple(sorted(pair)) for pair in record["preferences"])
        assert pairs == list(itertools.combinations(range(4), 2))
        for winner, loser in record["preferences"]:
            p = preference_probability(record["prompt"], responses[winner], responses[loser])
            agreements.append(0.5 if p == 0.5 else p > 0.5)
            ceiling.append(max(p, 1 - p))
    assert statistics.mean(agreements) == pytest.approx(statistics.mean(ceiling), abs=0.015)
    assert 0.86 < statistics.mean(ceiling) < 0.94


def test_annotator_follows_bradley_terry():
    best = best_response(ASKS_REFUND)
    worse = probes(ASKS_REFUND)["no goodbye"]
    gap = helpdesk.UTILITY["goodbye"]["right"]
    expected = 1 / (1 + math.exp(-gap / helpdesk.TAU))
    assert preference_probability(ASKS_REFUND, best, worse) == pytest.approx(expected)
    assert preference_probability(ASKS_REFUND, best, best) == 0.5
    assert preference_probability(ASKS_REFUND, "x" * 10**6, best) == 0.0  # exp would overflow


def test_average_response_is_far_below_the_best_response(samples):
    """If average or long responses were good, length alone would look like learning."""
    utilities = [utility for _, _, utility in samples]
    words = [len(response.split()) for _, response, _ in samples]
    assert -1.0 < statistics.mean(utilities) < 0.5
    assert 2.0 < statistics.stdev(utilities) < 3.0
    assert abs(statistics.correlation(utilities, words)) < 0.4
    best = [(prompt, best_response(prompt)) for prompt, _, _ in samples]
    assert 5.5 < statistics.mean(gold(prompt, response) for prompt, response in best) < 7.2
    best_words = [len(response.split()) for _, response in best]
    assert 25 <= min(best_words) <= max(best_words) <= 50


def test_good_and_bad_of_every_slot_are_both_common(samples):
    """A reward model learns only frequent contrasts, and a policy explores only what it samples."""
    counts = Counter(
        name
        for prompt, response, _ in samples
        for name in {name for name, _ in gold_parts(prompt, response)}
    )
    share = {name: count / len(samples) for name, count in counts.items()}
    for slot in SLOTS:
        assert 0.15 < share[f"right {slot}"] < 0.46
    for name in ("bad opening", "bad remark", "bad action", "bad next step", "bad goodbye"):
        assert 0.28 < share[name] < 0.45
    for name in (
        "wrong remark",
        "wrong action",
        "wrong next step",
        "bad filler",
        "repeat",
        "out of order",
    ):
        assert share[name] > 0.12, name
    assert share["wrong voucher"] > 0.03 and "unreadable" not in share


def test_most_frequent_phrase_of_every_slot_is_the_bad_one():
    """If a good phrase were the most likely one, greedy decoding alone would look like learning."""
    counts = {slot: Counter() for slot in SLOTS}
    for record in shipped("validation"):
        for sentence in itertools.chain.from_iterable(map(sentences, record["responses"])):
            slot, _ = helpdesk._MEANING[sentence]
            if slot in counts:
                counts[slot][sentence] += 1
    for slot in set(SLOTS) - {"voucher"}:  # the voucher has no bad phrase
        first_words = Counter()
        for phrase, count in counts[slot].items():
            first_words[phrase.split()[0]] += count
        canned = say(slot, "bad")
        assert len(PHRASES[slot]["bad"]) == 1
        assert counts[slot].most_common(1)[0][0] == canned
        assert first_words.most_common(1)[0][0] == canned.split()[0]
