"""The help desk: gold by hand, the best reply, its defects, robust reading, honest labels, files that rebuild."""

import gzip
import itertools
import json
import math
import random
import statistics
import time
from collections import Counter
from pathlib import Path

import pytest

from minirlhf import helpdesk
from minirlhf.helpdesk import (
    COLOURS,
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
from minirlhf.tools.helpdesk_data import GROUPS, MAX_WORDS, SPLITS, prompts_of, sample_prompt, sample_response, write_data

DATA = Path(__file__).parent.parent / "data"
BROKEN, OTHER = Context("blue", "kettle", "broken", "refund"), "repair"
GIFT = Context("red", "lamp", "gift", "manual")
ASKS_REFUND, ASKS_MANUAL = prompts_of(BROKEN)[0], prompts_of(GIFT)[0]


def shipped(split: str) -> list[dict]:
    path = DATA / ("helpdesk-train.jsonl.gz" if split == "train" else f"helpdesk-{split}.jsonl")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.decode("utf-8").splitlines()]


@pytest.fixture(scope="module")
def samples() -> list[tuple[str, str, float]]:
    """2,000 (prompt, response, gold) by the average agent."""
    rng = random.Random(0)
    prompts = [sample_prompt(rng) for _ in range(500) for _ in range(4)]
    responses = [sample_response(prompt, rng) for prompt in prompts]
    return [(prompt, response, gold(prompt, response)) for prompt, response in zip(prompts, responses)]


def say(slot: str, about: str, way: int = 0) -> str:
    return PHRASES[slot][about][way]


def worth_of(name: str) -> float:
    """The worth that the tables give to one part of a reply, e.g. "wrong action" or "repeat"."""
    verdict, _, slot = name.partition(" ")
    special = {"repeat": helpdesk.REPEAT, "out of order": helpdesk.DISORDER}
    return special[name] if name in special else helpdesk.WORTH[slot][verdict]


POLITE, RUDE, BYE = say("opening", "polite"), say("opening", "bad"), say("goodbye", "polite")
FILLER, VOUCHER, REFUSAL = say("filler", "bad"), say("voucher", "faulty", 1), say("action", "bad")
BY_HAND = {  # what the reply is -> prompt, its sentences, and by name what counts in it
    "nothing": (ASKS_REFUND, [], []),
    "the best": (ASKS_REFUND, [POLITE, say("remark", "broken", 1), say("action", "refund", 0),
                               say("next step", "refund", 1), VOUCHER, BYE],
                 ["right opening", "right remark", "right action", "right next step", "right voucher", "right goodbye"]),
    "canned": (ASKS_REFUND, [RUDE, say("remark", "bad"), REFUSAL, say("next step", "bad"), say("goodbye", "bad")],
               ["bad opening", "bad remark", "bad action", "bad next step", "bad goodbye"]),
    "of another problem": (
        ASKS_REFUND, [say("remark", "late"), say("action", "refund", 0)],
        ["wrong remark", "right action"]),
    "the right action twice: the second earns nothing": (
        ASKS_REFUND, [say("action", "refund"), say("action", "refund", 1)], ["right action", "repeat"]),
    "the right action and a refusal, which costs on top of the repeat": (
        ASKS_REFUND, [say("action", "refund"), REFUSAL], ["right action", "repeat", "bad action"]),
    "a wrong action, and the right one too late": (
        ASKS_REFUND, [say("action", OTHER), say("action", "refund")], ["wrong action", "repeat"]),
    "a goodbye before two that should come first; filler has no place": (
        ASKS_REFUND, [BYE, FILLER, POLITE, say("next step", "refund")],
        ["right goodbye", "bad filler", "out of order", "right opening", "out of order", "right next step"]),
    "filler twice, which is no repeat": (ASKS_REFUND, [FILLER, FILLER], ["bad filler", "bad filler"]),
    "a voucher where nobody is at fault": (
        ASKS_MANUAL, [say("remark", "gift", 0), VOUCHER], ["right remark", "wrong voucher"]),
    "an answer to nothing that can be read": (
        "Who are you?", [say("action", "refund", 0), BYE], ["wrong action", "right goodbye"]),
    "a voucher for nobody": ("", [VOUCHER], ["wrong voucher"]),
}


@pytest.mark.parametrize("prompt, said, names", BY_HAND.values(), ids=BY_HAND)
def test_gold_is_the_sum_of_what_a_reader_finds(prompt, said, names):
    response, expected = " " + " ".join(said), [worth_of(name) for name in names]
    assert gold_parts(prompt, response) == list(zip(names, expected))
    assert gold_parts(prompt, "\n ".join(said).replace(" ", "  ")) == gold_parts(prompt, response)
    assert gold(prompt, response) == pytest.approx(sum(expected))
    assert gold(prompt, response, finished=False) == pytest.approx(sum(expected) + helpdesk.UNFINISHED)


def test_words_that_are_no_known_phrase_cost_by_the_character():
    """A near miss must not pass for the phrase, and an item named in nonsense is not named."""
    text = POLITE.replace(".", "!") + " your blue kettle your blue kettle " + BYE.lower()
    cost = helpdesk.UNREADABLE * (len(text) - 1)  # two sentences: the blank between them is in neither
    assert gold(ASKS_REFUND, text + " " + BYE) == pytest.approx(cost + worth_of("right goodbye"))


def test_every_prompt_is_read_as_the_context_it_was_made_from():
    """A phrase that two problems share, or a mention that is cut wrong, would pay for the wrong reply."""
    contexts = [context for split in SPLITS.values() for context in split]
    assert all(parse_prompt(prompt) == context for context in contexts for prompt in prompts_of(context))
    assert len({prompt for context in contexts for prompt in prompts_of(context)}) == 4 * len(contexts)


def test_every_phrase_is_one_sentence_with_one_meaning():
    """A phrase that means two things, or that splits in two when read back, is never scored as it was meant."""
    said = [(phrase, slot, about) for slot, topics in PHRASES.items() for about, phrases in topics.items() for phrase in phrases]
    assert len({phrase for phrase, *_ in said}) == len(said) == len(helpdesk._MEANING)
    for phrase, *_ in said:
        assert sentences(phrase) == [phrase]


def test_no_sample_and_no_defect_beats_the_best_reply(samples):
    """If some reply beat the 'best' one, the share of the gap that training closes would mean nothing."""
    assert all(worth <= gold(prompt, best_response(prompt)) for prompt, _, worth in samples)
    for context in SPLITS["test"]:
        best = sum(helpdesk.WORTH[slot]["right"] for slot in SLOTS)
        best -= helpdesk.WORTH["voucher"]["right"] if context.problem in helpdesk.NO_FAULT else 0.0
        assert all(gold(prompt, best_response(prompt)) == pytest.approx(best) for prompt in prompts_of(context))


def test_each_probe_has_one_defect_that_costs_more_than_the_annotators_noise():
    """A probe that is no worse than the best reply, or has two defects, says nothing about what a model understood."""
    seen = Counter()
    for prompt in itertools.chain.from_iterable(map(prompts_of, SPLITS["test"])):
        best, found = best_response(prompt), probes(prompt)
        assert len({best, *found.values()}) == len(found) + 1
        assert found == probes(prompt)
        for defect, response in found.items():
            assert gold(prompt, response) <= gold(prompt, best) - helpdesk.TAU, (defect, response)
            lost = Counter(sentences(best)) - Counter(sentences(response))
            gained = Counter(sentences(response)) - Counter(sentences(best))
            assert lost.total() <= 1 and gained.total() <= 1, (defect, response)  # swapping two changes no sentence
            assert (defect == "out of order") == (not lost and not gained)
        seen.update(found.keys())
    assert seen["no voucher"] + seen["needless voucher"] == seen["filler"] > seen["no voucher"] > 0
    assert {"wrong problem", "wrong action", "wrong next step", "repeat"} <= set(seen)


def junk(rng: random.Random) -> str:
    """Any characters, lone surrogates too, mixed with pieces of the task's own text."""
    pieces = ["Customer:", "\nAgent:", "your blue", "kettle", "{x}", "it", ". ", "?", "\x00", "\x1b[2J", "\u2028", " " * 9]
    letters = "".join(chr(rng.choice((rng.randrange(0x80), rng.randrange(0x110000)))) for _ in range(rng.randrange(30)))
    parts = rng.choices(pieces, k=rng.randrange(4)) + [letters, "w" * rng.randrange(200), rng.choice(list(helpdesk._MEANING))]
    rng.shuffle(parts)
    return rng.choice(("", " ")).join(parts)


def test_gold_reads_any_text():
    """A policy writes what it likes; a scorer that raises on a control character stops the run hours later."""
    rng = random.Random(1)
    for _ in range(10_000):
        prompt, response = rng.choice((ASKS_REFUND, junk(rng))), junk(rng)
        worth = gold(prompt, response, rng.random() < 0.5)
        assert math.isfinite(worth) and worth < 10
        assert 0.0 <= preference_probability(prompt, response, junk(rng)) <= 1.0


@pytest.mark.parametrize("unit", ["a", ".", " ", ". ", "your ", "your blue ", "red lamp", "Customer:", "\n", "your red lamp. "])
def test_reading_takes_time_linear_in_the_length(unit):
    """A regular expression that backtracks would take hours on a policy that has learnt to repeat one word."""
    text, start = unit * (1_000_000 // len(unit)), time.perf_counter()
    assert math.isfinite(gold(text, text))
    assert preference_probability(ASKS_REFUND, text, best_response(ASKS_REFUND)) < 1e-3
    assert time.perf_counter() - start < 20


def test_nonsense_costs_by_its_length():
    """At a flat price per sentence, a policy ends as one endless 'account account account'."""
    worths = [gold(ASKS_REFUND, best_response(ASKS_REFUND) + " account" * n) for n in range(1, 9)]
    steps = [b - a for a, b in zip(worths, worths[1:])]
    assert worths[0] < gold(ASKS_REFUND, best_response(ASKS_REFUND))
    assert steps == pytest.approx([len(" account") * helpdesk.UNREADABLE] * 7)
    assert gold(ASKS_REFUND, " " + "account" * 99) < -10  # nor may words without blanks between them come cheaper


def test_contexts_are_split_8_1_1_and_no_context_is_in_two_parts():
    """A context in both train and test turns a held-out figure into one of memory."""
    train, validation, test = (set(SPLITS[split]) for split in ("train", "validation", "test"))
    everything = train | validation | test
    kinds = {(context.problem, context.request) for context in everything}
    assert everything == {Context(colour, item, *kind) for colour in COLOURS for item in ITEMS for kind in kinds}
    assert len(train) + len(validation) + len(test) == len(everything)
    assert len(validation) == len(test) == len(everything) // 10
    for split in SPLITS:
        contexts = {parse_prompt(row["prompt"]) for row in shipped(split)}
        assert contexts <= set(SPLITS[split])  # and every problem and request can be learnt, chosen on and reported on:
        assert {context.problem for context in contexts} == {problem for problem, _ in kinds}
        assert {context.request for context in contexts} == {request for _, request in kinds}


def test_rebuilt_files_equal_the_shipped_ones(tmp_path):
    """If the generator and data/ drift apart, nobody can tell which task a published figure belongs to."""
    write_data(tmp_path)
    names = ["helpdesk-test.jsonl", "helpdesk-train.jsonl.gz", "helpdesk-validation.jsonl", "helpdesk.tiktoken"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        rebuilt, original = (tmp_path / name).read_bytes(), (DATA / name).read_bytes()
        if name.endswith(".gz"):  # zlib builds compress differently: what counts is what comes out
            assert rebuilt[3:10] == original[3:10] == b"\x00" * 5 + b"\x02\xff"  # no name, no date, no platform
            rebuilt, original = gzip.decompress(rebuilt), gzip.decompress(original)
        assert rebuilt == original, name
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 5_000_000


@pytest.mark.parametrize("split, groups", GROUPS.items())
def test_files_hold_groups_of_four_with_all_pairs_labelled_as_the_annotator_would(split, groups):
    """Labels drawn from another law than the one that the ceiling is computed from make the ceiling a lie."""
    rows, agreements, ceiling = shipped(split), [], []
    assert len(rows) == groups
    for row in rows[:1500]:
        assert list(row) == ["prompt", "responses", "preferences"]
        assert len(set(row["responses"])) == 4
        assert all(text.startswith(" ") and not text.endswith(" ") for text in row["responses"])
        assert max(len(text.split()) for text in row["responses"]) <= MAX_WORDS
        pairs = sorted(tuple(sorted(pair)) for pair in row["preferences"])
        assert pairs == list(itertools.combinations(range(4), 2))
        for winner, loser in row["preferences"]:
            p = preference_probability(row["prompt"], row["responses"][winner], row["responses"][loser])
            agreements.append(0.5 if p == 0.5 else p > 0.5)
            ceiling.append(max(p, 1 - p))
    assert statistics.mean(agreements) == pytest.approx(statistics.mean(ceiling), abs=0.015)
    assert 0.86 < statistics.mean(ceiling) < 0.94


def test_annotator_follows_bradley_terry():
    best, rude = best_response(ASKS_REFUND), probes(ASKS_REFUND)["no goodbye"]
    gap = helpdesk.WORTH["goodbye"]["right"]
    assert preference_probability(ASKS_REFUND, best, rude) == pytest.approx(1 / (1 + math.exp(-gap / helpdesk.TAU)))
    assert preference_probability(ASKS_REFUND, best, best) == 0.5
    assert preference_probability(ASKS_REFUND, "x" * 10**6, best) == 0.0  # exp would overflow


def test_average_agent_leaves_most_of_the_gap_to_training(samples):
    """A task whose average reply is good, or whose long replies are the good ones, shows sharpening or padding as learning."""
    worths = [worth for _, _, worth in samples]
    words = [len(response.split()) for _, response, _ in samples]
    best = [best_response(prompt) for prompt, _, _ in samples]
    assert -1.0 < statistics.mean(worths) < 0.5
    assert 2.0 < statistics.stdev(worths) < 3.0
    assert abs(statistics.correlation(worths, words)) < 0.4
    assert 5.5 < statistics.mean(gold(prompt, reply) for (prompt, _, _), reply in zip(samples, best)) < 7.2
    assert 25 <= min(len(reply.split()) for reply in best) <= max(len(reply.split()) for reply in best) <= 50


def test_good_and_bad_of_every_slot_are_both_common(samples):
    """A reward model learns only the contrasts it sees often, and a policy finds only what it already does now and then."""
    found = Counter(name for prompt, response, _ in samples for name in {name for name, _ in gold_parts(prompt, response)})
    share = {name: count / len(samples) for name, count in found.items()}
    for slot in SLOTS:
        assert 0.15 < share[f"right {slot}"] < 0.46
    for name in ("bad opening", "bad remark", "bad action", "bad next step", "bad goodbye"):
        assert 0.28 < share[name] < 0.45
    for name in ("wrong remark", "wrong action", "wrong next step", "bad filler", "repeat", "out of order"):
        assert share[name] > 0.12, name
    assert share["wrong voucher"] > 0.03 and "unreadable" not in share


def test_most_frequent_phrase_of_every_slot_is_the_bad_one():
    """Where a good phrase is the most likely one, greedy decoding alone looks like alignment."""
    counts = {slot: Counter() for slot in SLOTS}
    for row in shipped("validation"):
        for sentence in itertools.chain.from_iterable(map(sentences, row["responses"])):
            slot, _ = helpdesk._MEANING[sentence]
            if slot in counts:
                counts[slot][sentence] += 1
    for slot in set(SLOTS) - {"voucher"}:  # there is no bad way to say a voucher, only a wrong time
        first_words = Counter()
        for phrase, count in counts[slot].items():
            first_words[phrase.split()[0]] += count
        canned = say(slot, "bad")
        assert len(PHRASES[slot]["bad"]) == 1
        assert counts[slot].most_common(1)[0][0] == canned
        assert first_words.most_common(1)[0][0] == canned.split()[0]
