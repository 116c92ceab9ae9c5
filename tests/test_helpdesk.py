"""The help desk: gold by hand, the best reply, its defects, robust reading, honest labels, files that rebuild."""

import gzip
import itertools
import json
import math
import random
import re
import statistics
import time
from collections import Counter
from pathlib import Path

import pytest

from minirlhf import helpdesk
from minirlhf.helpdesk import (
    COLOURS, ITEMS, PHRASES, PROBLEMS, REQUESTS, SLOTS, SPLITS, Context, best_response, gold, gold_parts, parse_prompt,
    preference_probability, probes, prompts_of, sample_prompt, sample_response, sentences,
)

DATA = Path(__file__).parent.parent / "data"
BROKEN = "Customer: My blue kettle arrived broken. Can I have my money back?\nAgent:"
GIFT = "Customer: I bought a red lamp for my mother. How do I set it up?\nAgent:"


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


BY_HAND = [  # prompt, response, worth term by term
    (BROKEN, "", []),
    (BROKEN, " Thank you for writing to us. I am sorry that your blue kettle arrived broken. I have refunded the full price "
             "of your blue kettle. The money reaches your bank in two days. Here is a voucher worth ten euros. Have a "
             "wonderful week.", [0.8, 1.0, 0.5, 1.6, 0.5, 0.9, 0.8, 0.8]),
    (BROKEN, " What do you want now? You must have been careless. Nothing can be done about that. You will simply have to "
             "wait. Now leave me in peace.", [-0.8, -0.9, -0.8, -0.7, -0.8]),
    # the right action for the wrong lamp, and a remark on another problem that names nothing
    (BROKEN, " It is a shame that it has no plug. We are paying back your money for your blue lamp.", [-0.8, 1.6, -1.0]),
    # a second action costs as a repeat and earns nothing, not even for the item that it names
    (BROKEN, " I have refunded the full price of it. We are paying back your money for your blue kettle.", [1.6, -0.8]),
    # but a second sentence that is bad costs twice
    (BROKEN, " I have refunded the full price of it. Nothing can be done about that.", [1.6, -0.8, -0.8]),
    # the goodbye comes too early for both that follow; filler has no place in the order and is no repeat
    (BROKEN, " Have a wonderful week. It rained heavily all morning. Thank you for writing to us. Please look at your bank "
             "account on Friday.", [0.8, -0.8, -0.8, 0.8, -0.8, 0.9]),
    (BROKEN, " It rained heavily all morning. It rained heavily all morning.", [-0.8, -0.8]),
    # nobody is at fault: no voucher; the remark names the red lamp with another colour
    (GIFT, " I hope that your mother enjoys your grey lamp. Your next delivery costs you nothing.", [1.0, -1.0, -0.8]),
    # 11 and 26 characters of nonsense; a mention in it neither earns nor costs
    (GIFT, " Hello hello your blue kettle blue kettle. We made a short film that explains it.", [-0.03 * 41, 1.6]),
    ("Who are you?", " I have refunded the full price of your blue kettle. Have a wonderful week.", [-0.7, -1.0, 0.8]),
    ("", "Here is a voucher worth ten euros.", [-0.8]),
]


@pytest.mark.parametrize("prompt, response, worth", BY_HAND)
def test_gold_equals_the_sum_worked_out_by_hand(prompt, response, worth):
    assert [part for _, part in gold_parts(prompt, response)] == pytest.approx(worth)
    assert gold(prompt, response) == pytest.approx(sum(worth))
    assert gold(prompt, response, finished=False) == pytest.approx(sum(worth) - 1.0)


def test_every_prompt_is_read_as_the_context_it_was_made_from():
    """A phrase that two problems share, or a mention that is cut wrong, would pay for the wrong reply."""
    contexts = [context for split in SPLITS.values() for context in split]
    assert all(parse_prompt(prompt) == context for context in contexts for prompt in prompts_of(context))
    assert len({prompt for context in contexts for prompt in prompts_of(context)}) == 4 * len(contexts)


def test_every_phrase_is_one_sentence_with_one_meaning():
    """A phrase that means two things, or that splits in two when read back, is never scored as it was meant."""
    said = [(phrase, slot) for slot, topics in PHRASES.items() for phrases in topics.values() for phrase in phrases]
    assert len({phrase for phrase, _ in said}) == len(said) == len(helpdesk._MEANING)
    assert all(sentences(phrase) == [phrase] for phrase, _ in said)
    assert all(("{x}" in phrase) == (slot in ("remark", "action")) or phrase in
               (PHRASES["remark"]["bad"] + PHRASES["action"]["bad"]) for phrase, slot in said)


def test_no_sample_and_no_defect_beats_the_best_reply(samples):
    """If some reply beat the 'best' one, the share of the gap that training closes would mean nothing."""
    assert all(worth <= gold(prompt, best_response(prompt)) for prompt, _, worth in samples)
    worths = {round(gold(prompt, best_response(prompt)), 9) for prompt, _, _ in samples}
    assert worths == {6.9, 6.1}
    no_fault = [prompt for prompt, _, _ in samples if parse_prompt(prompt).problem in helpdesk.NO_FAULT]
    assert all(gold(prompt, best_response(prompt)) == pytest.approx(6.1) for prompt in no_fault)


def test_each_probe_costs_what_its_one_defect_is_worth():
    """A probe that is no worse than the best reply, or has two defects, says nothing about what a model understood."""
    costs = {
        "rude opening": 1.6, "no opening": 0.8, "wrong problem": 1.8, "blame": 2.4, "no apology": 1.5, "wrong action": 2.3,
        "refusal": 2.9, "no action": 2.1, "wrong colour": 1.5, "wrong item": 1.5, "wrong next step": 1.5, "put off": 1.6,
        "no next step": 0.9, "no voucher": 0.8, "needless voucher": 0.8, "rude ending": 1.6, "no goodbye": 0.8, "filler": 0.8,
        "repeat": 0.8, "out of order": 0.8,
    }
    seen = Counter()
    for context in SPLITS["test"] + SPLITS["validation"]:
        for prompt in prompts_of(context)[:2]:
            best, found = best_response(prompt), probes(prompt)
            assert len({best, *found.values()}) == len(found) + 1
            assert found == probes(prompt)
            for defect, response in found.items():
                assert gold(prompt, response) == pytest.approx(gold(prompt, best) - costs[defect]), (defect, response)
            seen.update(found.keys())
    assert set(seen) == set(costs)
    assert seen["no voucher"] + seen["needless voucher"] == seen["filler"] > seen["no voucher"] > 0


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
        prompt, response = rng.choice((BROKEN, junk(rng))), junk(rng)
        worth = gold(prompt, response, rng.random() < 0.5)
        assert math.isfinite(worth) and worth <= 6.9
        assert 0.0 <= preference_probability(prompt, response, junk(rng)) <= 1.0


@pytest.mark.parametrize("unit", ["a", ".", " ", ". ", "your ", "your blue ", "red lamp", "Customer:", "\n", "your red lamp. "])
def test_reading_takes_time_linear_in_the_length(unit):
    """A regular expression that backtracks would take hours on a policy that has learnt to repeat one word."""
    text, start = unit * (1_000_000 // len(unit)), time.perf_counter()
    assert math.isfinite(gold(text, text))
    assert preference_probability(BROKEN, text, best_response(BROKEN)) < 1e-3
    assert time.perf_counter() - start < 20


def test_nonsense_costs_by_its_length():
    """At a flat price per sentence, a policy ends as one endless 'account account account'."""
    worths = [gold(BROKEN, best_response(BROKEN) + " account" * n) for n in range(1, 9)]
    steps = [b - a for a, b in zip(worths, worths[1:])]
    assert worths[0] < gold(BROKEN, best_response(BROKEN)) and steps == pytest.approx([-0.24] * 7)
    assert gold(BROKEN, " " + "account" * 99) < -15  # nor may words without blanks between them come cheaper


def test_contexts_are_split_8_1_1_and_no_context_is_in_two_parts():
    """A context in both train and test turns a held-out figure into one of memory."""
    train, validation, test = (set(SPLITS[split]) for split in ("train", "validation", "test"))
    everything = {Context(colour, item, problem, request) for colour in COLOURS for item in ITEMS
                  for problem, (_, requests) in PROBLEMS.items() for request in requests}
    assert train | validation | test == everything
    assert len(train) + len(validation) + len(test) == len(everything)
    assert len(validation) == len(test) == len(everything) // 10
    for split in SPLITS:
        contexts = {parse_prompt(row["prompt"]) for row in shipped(split)}
        assert contexts <= set(SPLITS[split])  # and every problem and request can be learnt, chosen on and reported on:
        assert {(c.problem, c.request) for c in contexts} == {(c.problem, c.request) for c in everything}


def test_rebuilt_files_equal_the_shipped_ones(tmp_path):
    """If the generator and data/ drift apart, nobody can tell which task a published figure belongs to."""
    helpdesk.write_data(tmp_path)
    names = ["helpdesk-test.jsonl", "helpdesk-train.jsonl.gz", "helpdesk-validation.jsonl", "helpdesk.tiktoken"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        rebuilt, original = (tmp_path / name).read_bytes(), (DATA / name).read_bytes()
        if name.endswith(".gz"):  # zlib builds compress differently: what counts is what comes out
            assert rebuilt[3:10] == original[3:10] == b"\x00" * 5 + b"\x02\xff"  # no name, no date, no platform
            rebuilt, original = gzip.decompress(rebuilt), gzip.decompress(original)
        assert rebuilt == original, name
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 5_000_000


@pytest.mark.parametrize("split, groups", [("train", 8000), ("validation", 640), ("test", 640)])
def test_files_hold_groups_of_four_with_all_pairs_labelled_as_the_annotator_would(split, groups):
    """Labels drawn from another law than the one that the ceiling is computed from make the ceiling a lie."""
    rows, agreements, ceiling = shipped(split), [], []
    assert len(rows) == groups
    for row in rows[:1500]:
        assert list(row) == ["prompt", "responses", "preferences"]
        assert len(set(row["responses"])) == 4
        assert all(text.startswith(" ") and not text.endswith(" ") for text in row["responses"])
        assert max(len(text.split()) for text in row["responses"]) <= helpdesk.MAX_WORDS
        pairs = sorted(tuple(sorted(pair)) for pair in row["preferences"])
        assert pairs == list(itertools.combinations(range(4), 2))
        for winner, loser in row["preferences"]:
            p = preference_probability(row["prompt"], row["responses"][winner], row["responses"][loser])
            agreements.append(0.5 if p == 0.5 else p > 0.5)
            ceiling.append(max(p, 1 - p))
    assert statistics.mean(agreements) == pytest.approx(statistics.mean(ceiling), abs=0.015)
    assert 0.86 < statistics.mean(ceiling) < 0.92


def test_annotator_follows_bradley_terry():
    best, rude = best_response(BROKEN), probes(BROKEN)["no goodbye"]
    assert preference_probability(BROKEN, best, rude) == pytest.approx(1 / (1 + math.exp(-0.8 / 0.7)))
    assert preference_probability(BROKEN, best, best) == 0.5
    assert preference_probability(BROKEN, "x" * 10**6, best) == 0.0  # exp would overflow


def test_average_agent_leaves_most_of_the_gap_to_training(samples):
    """A task whose average reply is good, or whose long replies are the good ones, shows sharpening or padding as learning."""
    worths = [worth for _, _, worth in samples]
    words = [len(response.split()) for _, response, _ in samples]
    best = [best_response(prompt) for prompt, _, _ in samples]
    assert -1.0 < statistics.mean(worths) < 0.0
    assert 1.5 < statistics.stdev(worths) < 2.5
    assert abs(statistics.correlation(worths, words)) < 0.4
    assert 6.4 < statistics.mean(gold(prompt, reply) for (prompt, _, _), reply in zip(samples, best)) < 7.0
    assert 35 <= min(len(reply.split()) for reply in best) <= max(len(reply.split()) for reply in best) <= 50


def test_good_and_bad_of_every_slot_are_both_common(samples):
    """A reward model learns only the contrasts it sees often, and a policy finds only what it already does now and then."""
    found = Counter(name for prompt, response, _ in samples for name in {name for name, _ in gold_parts(prompt, response)})
    share = {name: count / len(samples) for name, count in found.items()}
    for slot in SLOTS:
        assert 0.18 < share[f"right {slot}"] < 0.38
    for name in ("bad opening", "bad remark", "bad action", "bad next step", "bad goodbye"):
        assert 0.35 < share[name] < 0.45
    for name in ("wrong remark", "wrong action", "wrong next step", "wrong item", "bad filler", "repeat", "out of order"):
        assert share[name] > 0.12, name
    assert share["wrong voucher"] > 0.03 and "unreadable" not in share


def test_most_frequent_phrase_of_every_slot_is_the_bad_one():
    """Where a good phrase is the most likely one, greedy decoding alone looks like alignment."""
    counts = {slot: Counter() for slot in SLOTS}
    for row in shipped("validation"):
        for sentence in itertools.chain.from_iterable(map(sentences, row["responses"])):
            plain = re.sub(rf"your ({'|'.join(COLOURS)}) ({'|'.join(ITEMS)})", "it", sentence)
            slot, _ = helpdesk._MEANING[plain]
            if slot in counts:
                counts[slot][plain] += 1
    for slot in set(SLOTS) - {"voucher"}:  # there is no bad way to say a voucher, only a wrong time
        first_words = Counter()
        for phrase, count in counts[slot].items():
            first_words[phrase.split()[0]] += count
        (canned,) = PHRASES[slot]["bad"]
        assert counts[slot].most_common(1)[0][0] == canned
        assert first_words.most_common(1)[0][0] == canned.split()[0]
