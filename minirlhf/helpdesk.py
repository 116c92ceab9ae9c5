"""The embedded task: a shop's help desk whose replies have a hidden, exact worth.

A prompt names an item, a problem and a request; a reply is made of sentences from six slots. `gold` reads any reply and
adds up what its sentences are worth for that prompt. No model ever sees it: an annotator who is sometimes mistaken
(`preference_probability`) turns it into preferences, and those are all the data there is. `sample_response` writes like the
average agent: one canned rude phrase per slot, used often, and several good ones, each used seldom, so that the most
likely reply is a bad one and only learning from preferences, not sharper sampling, makes replies good.

`python -m minirlhf.helpdesk [FOLDER]` rebuilds every file of the task; `--stats` measures the task instead.
"""

import argparse
import gzip
import itertools
import json
import math
import random
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from minirlhf.seeding import derive_seed

ITEMS = "kettle toaster lamp radio camera clock fan drill mixer scooter heater phone".split()
COLOURS = "red blue green black white yellow pink grey".split()

# problem -> (what the customer says, the requests that go with it); nobody is at fault in the last two
PROBLEMS = {
    "broken": (("My {x} arrived broken.", "The {x} came to me in pieces."), ("refund", "replace", "repair", "return")),
    "late": (("My {x} has not come yet.", "I am still waiting for my {x}."), ("refund", "replace", "track")),
    "scratched": (("My {x} is badly scratched.", "There are scratches all over my {x}."), ("refund", "replace", "return")),
    "dead": (("My {x} will not turn on.", "My {x} does not work."), ("refund", "replace", "repair", "manual")),
    "plug": (("My {x} came without a plug.", "The plug of my {x} is missing."), ("refund", "replace", "manual")),
    "noisy": (("My {x} is far too noisy.", "My {x} rattles all day long."), ("refund", "repair", "return")),
    "unwanted": (("I do not need my {x} after all.", "I have no use for my {x} now."), ("refund", "replace", "return")),
    "gift": (("I bought a {x} for my mother.", "The {x} is a birthday present."), ("track", "manual", "return")),
}
NO_FAULT = ("unwanted", "gift")
REQUESTS = {
    "refund": ("Can I have my money back?", "Please give me a refund."),
    "replace": ("Could I have a different one?", "Please exchange it."),
    "repair": ("Can you mend it?", "Please have it repaired."),
    "track": ("Where is it now?", "Please tell me when it will come."),
    "return": ("How can I send it back?", "Please take it back."),
    "manual": ("How do I set it up?", "Please send me the instructions."),
}
# slot -> what a sentence is about -> ways to say it; {x} is "it" or "your blue kettle". The first words of the good ways
# differ, so that at each slot the single most likely word is the canned bad one's.
PHRASES = {
    "opening": {
        "polite": ("Thank you for writing to us.", "Good day and welcome to our shop.", "Hello and thanks for your note."),
        "bad": ("What do you want now?",),
    },
    "remark": {
        "broken": ("I am sorry that {x} arrived broken.", "It is a shame that {x} arrived broken."),
        "late": ("I am sorry that {x} has not come yet.", "It is a shame that {x} has not come yet."),
        "scratched": ("I am sorry that {x} is scratched.", "It is a shame that {x} is scratched."),
        "dead": ("I am sorry that {x} does not work.", "It is a shame that {x} does not work."),
        "plug": ("I am sorry that {x} has no plug.", "It is a shame that {x} has no plug."),
        "noisy": ("I am sorry that {x} is so noisy.", "It is a shame that {x} is so noisy."),
        "unwanted": ("I see that you do not need {x}.", "It is no problem that you do not need {x}."),
        "gift": ("I hope that your mother enjoys {x}.", "It is lovely that {x} is a present."),
        "bad": ("You must have been careless.",),
    },
    "action": {
        "refund": ("I have refunded the full price of {x}.", "We are paying back your money for {x}."),
        "replace": ("I am posting you a new one for {x}.", "We will exchange {x} free of charge."),
        "repair": ("I have asked our workshop to mend {x}.", "We will repair {x} without charge."),
        "track": ("I have found {x} and it arrives tomorrow.", "We see that {x} is already in your town."),
        "return": ("I have sent you a label to return {x}.", "We will collect {x} from your door."),
        "manual": ("I have emailed you the instructions for {x}.", "We made a short film that explains {x}."),
        "bad": ("Nothing can be done about that.",),
    },
    "next step": {
        "refund": ("The money reaches your bank in two days.", "Please look at your bank account on Friday."),
        "replace": ("The new one arrives on Tuesday morning.", "Please hand the old one to the driver."),
        "repair": ("The repair is done within a week.", "Please keep the box for our mechanic."),
        "track": ("The driver rings you one hour before.", "Please use the tracking number in our email."),
        "return": ("The label goes on top of the parcel.", "Please close the box with strong tape."),
        "manual": ("The first page shows all the buttons.", "Please call me if any step is unclear."),
        "bad": ("You will simply have to wait.",),
    },
    "voucher": {"faulty": ("Here is a voucher worth ten euros.", "Your next delivery costs you nothing.")},
    "goodbye": {
        "polite": ("Have a wonderful week.", "Kind regards from all of us.", "Do ask if you need anything more."),
        "bad": ("Now leave me in peace.",),
    },
    "filler": {"bad": ("It rained here for most of the morning.", "Our office got new carpets last month.",
                       "People buy all sorts of things these days.")},
}
SLOTS = ("opening", "remark", "action", "next step", "voucher", "goodbye")  # the order of a good reply; filler has no place

# The first sentence of a slot earns or costs this; the best reply is worth 6.9, or 6.1 where nobody is at fault.
WORTH = {
    "opening": {"right": 0.8, "bad": -0.8},
    "remark": {"right": 1.0, "wrong": -0.8, "bad": -0.9},
    "action": {"right": 1.6, "wrong": -0.7, "bad": -0.8},
    "next step": {"right": 0.9, "wrong": -0.6, "bad": -0.7},
    "voucher": {"right": 0.8, "wrong": -0.8},
    "goodbye": {"right": 0.8, "bad": -0.8},
    "filler": {"bad": -0.8},
}
NAMED = {"right": 0.5, "wrong": -1.0}  # a remark or an action that names the customer's item, or another one
REPEAT = -0.8  # a second sentence of a slot: it can cost, but it earns nothing
DISORDER = -0.8  # a sentence that comes after one of a later slot
UNREADABLE = -0.03  # per character of a sentence that is no known phrase: nonsense must not come at a flat price
UNFINISHED = -1.0  # the reply was cut by the length limit

TAU = 0.7  # gold utility; a difference of TAU is preferred 73% of the time
MAX_WORDS = 60  # no written reply is longer, so that none outgrows the models' context
SIZES = {"train": 8000, "validation": 640, "test": 640}  # groups of four replies

# How the average agent fills a slot: relative shares, for an agent of average care.
SHARES = {
    "opening": {"right": 30, "bad": 42, "none": 28},
    "remark": {"right": 30, "wrong": 16, "bad": 38, "none": 16},
    "action": {"right": 32, "wrong": 18, "bad": 38, "none": 12},
    "next step": {"right": 30, "wrong": 16, "bad": 38, "none": 16},
    "voucher": {"right": 32, "wrong": 32, "none": 68},
    "goodbye": {"right": 30, "bad": 42, "none": 28},
}
NAMES_ITEM, NAMES_WRONG, REPEATS, WANDERS, SWAPS = 0.75, 0.3, 0.22, 0.25, 0.15  # shares of phrases or of replies


class Context(NamedTuple):
    """What a prompt says; None where it cannot be read."""

    colour: str | None
    item: str | None
    problem: str | None
    request: str | None


_THING = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(ITEMS)})")
_MENTION = re.compile(rf"\byour ({'|'.join(COLOURS)}) ({'|'.join(ITEMS)})\b")
_PROBLEM_OF = {line: problem for problem, (lines, _) in PROBLEMS.items() for line in lines}
_REQUEST_OF = {line: request for request, lines in REQUESTS.items() for line in lines}
_MEANING = {phrase.replace("{x}", "it"): (slot, about)
            for slot, topics in PHRASES.items() for about, phrases in topics.items() for phrase in phrases}


# ---- reading ---------------------------------------------------------------------------------------------------------

def sentences(text: str) -> list[str]:
    """Split after . ? or !; any run of white space counts as one blank.

    >>> sentences(" Hello there.  Now what? never mind")
    ['Hello there.', 'Now what?', 'never mind']
    """
    return [sentence for sentence in re.split(r"(?<=[.?!]) ", " ".join(text.split())) if sentence]


def parse_prompt(prompt: str) -> Context:
    """The colour, item, problem and request of the customer's message.

    >>> parse_prompt("Customer: My blue kettle arrived broken. Please give me a refund.\\nAgent:")
    Context(colour='blue', item='kettle', problem='broken', request='refund')
    """
    message = prompt.rpartition("Customer:")[2].partition("Agent:")[0]
    thing = _THING.search(message)
    said = sentences(_THING.sub("{x}", message, count=1))
    problem = next((_PROBLEM_OF[line] for line in said if line in _PROBLEM_OF), None)
    request = next((_REQUEST_OF[line] for line in said if line in _REQUEST_OF), None)
    return Context(thing and thing[1], thing and thing[2], problem, request)


def expected(context: Context) -> dict[str, str | None]:
    """What the sentence of each slot should be about."""
    voucher = None if context.problem is None or context.problem in NO_FAULT else "faulty"
    return {"opening": "polite", "remark": context.problem, "action": context.request, "next step": context.request,
            "voucher": voucher, "goodbye": "polite"}


def gold_parts(prompt: str, response: str, finished: bool = True) -> list[tuple[str, float]]:
    """Everything that counts in a reply, in reading order, as (name, worth).

    >>> prompt = "Customer: My blue kettle arrived broken. Please give me a refund.\\nAgent:"
    >>> gold_parts(prompt, " What do you want now? We are paying back your money for your red kettle. Bye.")
    [('bad opening', -0.8), ('right action', 1.6), ('wrong item', -1.0), ('unreadable', -0.12)]
    """
    context, parts, seen = parse_prompt(prompt), [], set()
    wanted = expected(context)
    for sentence in sentences(response):
        mention = _MENTION.search(sentence)
        slot, about = _MEANING.get(_MENTION.sub("it", sentence, count=1), (None, None))
        if slot is None:
            parts.append(("unreadable", UNREADABLE * len(sentence)))
            continue
        verdict = "bad" if about == "bad" else "right" if about == wanted.get(slot) else "wrong"
        first = slot not in seen
        if slot in SLOTS and not first:
            parts.append(("repeat", REPEAT))
        if slot in SLOTS and any(SLOTS.index(slot) < SLOTS.index(earlier) for earlier in seen):
            parts.append(("out of order", DISORDER))
        if first or WORTH[slot][verdict] < 0:
            parts.append((f"{verdict} {slot}", WORTH[slot][verdict]))
        if mention and (mention[1], mention[2]) != (context.colour, context.item):
            parts.append(("wrong item", NAMED["wrong"]))
        elif mention and first and slot in ("remark", "action"):
            parts.append(("right item", NAMED["right"]))
        if slot in SLOTS:
            seen.add(slot)
    return parts if finished else parts + [("unfinished", UNFINISHED)]


def gold(prompt: str, response: str, finished: bool = True) -> float:
    """The hidden utility of any text as a reply to any prompt; never raises. finished: False if cut by length."""
    return math.fsum(worth for _, worth in gold_parts(prompt, response, finished))


# ---- the best reply, and the best reply with one defect --------------------------------------------------------------

def best_sentences(context: Context) -> dict[str, str]:
    """slot -> the sentence that the best reply has there, in order."""
    thing = f"your {context.colour} {context.item}"
    return {slot: PHRASES[slot][about][0].replace("{x}", thing)
            for slot, about in expected(context).items() if about in PHRASES[slot]}


def as_reply(parts) -> str:
    return " " + " ".join(parts)


def best_response(prompt: str) -> str:
    """A reply that no other beats by gold. The prompt must be one of the task's."""
    return as_reply(best_sentences(parse_prompt(prompt)).values())


def probes(prompt: str) -> dict[str, str]:
    """The best reply with exactly one defect, by the name of the defect: a test of what a reward model has understood.

    Which wrong colour, problem and so on is drawn by a generator seeded with the prompt.
    """
    context, rng = parse_prompt(prompt), random.Random(derive_seed(0, "probes", prompt))
    best, wanted = best_sentences(context), expected(context)

    def instead(slot: str, sentence: str) -> str:
        return as_reply({**best, slot: sentence}.values())

    def without(slot: str) -> str:
        return as_reply(sentence for place, sentence in best.items() if place != slot)

    def wrong(slot: str) -> str:
        about = rng.choice([about for about in PHRASES[slot] if about not in (wanted[slot], "bad")])
        return instead(slot, PHRASES[slot][about][0].replace("{x}", f"your {context.colour} {context.item}"))

    colour = rng.choice([colour for colour in COLOURS if colour != context.colour])
    item = rng.choice([item for item in ITEMS if item != context.item])
    again = PHRASES["action"][context.request][1].replace("{x}", "it")
    filler = rng.choice(PHRASES["filler"]["bad"])
    swapped = {slot: best[slot] for slot in ("opening", "remark", "next step", "action", "voucher", "goodbye") if slot in best}
    defects = {
        "rude opening": instead("opening", PHRASES["opening"]["bad"][0]), "no opening": without("opening"),
        "wrong problem": wrong("remark"), "blame": instead("remark", PHRASES["remark"]["bad"][0]),
        "no apology": without("remark"),
        "wrong action": wrong("action"), "refusal": instead("action", PHRASES["action"]["bad"][0]),
        "no action": without("action"),
        "wrong colour": instead("action", best["action"].replace(context.colour, colour)),
        "wrong item": instead("action", best["action"].replace(context.item, item)),
        "wrong next step": wrong("next step"), "put off": instead("next step", PHRASES["next step"]["bad"][0]),
        "no next step": without("next step"),
        "rude ending": instead("goodbye", PHRASES["goodbye"]["bad"][0]), "no goodbye": without("goodbye"),
        "filler": instead("action", f"{best['action']} {filler}"),
        "repeat": instead("action", f"{best['action']} {again}"),
        "out of order": as_reply(swapped.values()),
    }
    if "voucher" in best:
        return {**defects, "no voucher": without("voucher")}
    return {**defects, "needless voucher": instead("next step", f"{best['next step']} {PHRASES['voucher']['faulty'][0]}")}


# ---- the annotator and the average agent -----------------------------------------------------------------------------

def preference_probability(prompt: str, a: str, b: str) -> float:
    """P(a is preferred to b) = sigmoid((gold(a) - gold(b)) / TAU)   (Bradley and Terry 1952)."""
    return 0.5 + 0.5 * math.tanh((gold(prompt, a) - gold(prompt, b)) / (2 * TAU))  # tanh cannot overflow


def split_contexts(seed: int = 0) -> dict[str, list[Context]]:
    """Every context in one of three parts, 8:1:1; no context is in two."""
    contexts = [Context(colour, item, problem, request) for colour, item in itertools.product(COLOURS, ITEMS)
                for problem, (_, requests) in PROBLEMS.items() for request in requests]
    random.Random(derive_seed(seed, "contexts")).shuffle(contexts)
    tenth = len(contexts) // 10
    return {"train": contexts[2 * tenth:], "validation": contexts[:tenth], "test": contexts[tenth:2 * tenth]}


SPLITS = split_contexts()


def prompts_of(context: Context) -> list[str]:
    """The ways a customer can say it."""
    thing = f"{context.colour} {context.item}"
    return [f"Customer: {problem.replace('{x}', thing)} {request}\nAgent:"
            for problem, request in itertools.product(PROBLEMS[context.problem][0], REQUESTS[context.request])]


def sample_prompt(rng: random.Random, split: str = "train") -> str:
    return rng.choice(prompts_of(rng.choice(SPLITS[split])))


def sample_phrase(context: Context, slot: str, about: str, rng: random.Random) -> str:
    """One way to say it, naming the customer's item, another item, or none."""
    colour, item, wrong = context.colour, context.item, rng.random() < NAMES_WRONG
    if wrong and rng.random() < 0.5:
        colour = rng.choice(COLOURS)
    elif wrong:
        item = rng.choice(ITEMS)
    thing = f"your {colour} {item}" if rng.random() < NAMES_ITEM else "it"
    return rng.choice(PHRASES[slot][about]).replace("{x}", thing)


def sample_about(context: Context, slot: str, care: float, rng: random.Random) -> str | None:
    """What the average agent says in a slot: the right thing, a wrong one, the canned bad one, or None for nothing."""
    right = expected(context)[slot]
    factor = {"right": 0.6 + 0.8 * care, "bad": 1.4 - 0.8 * care}
    shares = {verdict: share * factor.get(verdict, 1.0) for verdict, share in SHARES[slot].items()}
    verdict = rng.choices(list(shares), list(shares.values()))[0]
    wrong = [about for about in PHRASES[slot] if about not in (right, "bad")]
    choices = {"right": [right], "wrong": wrong, "bad": ["bad"], "none": []}[verdict]
    return rng.choice(choices) if choices and choices[0] in PHRASES[slot] else None


def sample_response(prompt: str, rng: random.Random) -> str:
    """A reply by an agent who on some days takes more care than on others."""
    context, care = parse_prompt(prompt), rng.random()
    said = [(slot, about) for slot in SLOTS if (about := sample_about(context, slot, care, rng))]
    said = [(slot, sample_phrase(context, slot, about, rng)) for slot, about in said]
    if said and rng.random() < REPEATS:
        place = rng.randrange(len(said))
        slot, sentence = said[place]
        if rng.random() < 0.6:
            sentence = sample_phrase(context, slot, rng.choice(list(PHRASES[slot])), rng)
        said.insert(place + 1, (slot, sentence))
    if len(said) > 1 and rng.random() < SWAPS:
        place = rng.randrange(len(said) - 1)
        said[place:place + 2] = reversed(said[place:place + 2])
    if rng.random() < WANDERS:
        said.insert(rng.randint(0, len(said)), ("filler", rng.choice(PHRASES["filler"]["bad"])))
    response = as_reply(sentence for _, sentence in said)
    return response if said and len(response.split()) <= MAX_WORDS else sample_response(prompt, rng)


# ---- the files -------------------------------------------------------------------------------------------------------

def sample_group(split: str, number: int) -> dict:
    """One prompt, four different replies, and all six pairs as [winner, loser], each judged once by the annotator."""
    rng = random.Random(derive_seed(0, "group", split, number))
    prompt, responses = sample_prompt(rng, split), []
    while len(responses) < 4:
        response = sample_response(prompt, rng)
        if response not in responses:
            responses.append(response)
    preferences = [[i, j] if rng.random() < preference_probability(prompt, responses[i], responses[j]) else [j, i]
                   for i, j in itertools.combinations(range(4), 2)]
    return {"prompt": prompt, "responses": responses, "preferences": preferences}


def write_data(folder: str | Path) -> None:
    """Write the preference files and the tokenizer's ranks: the same bytes everywhere (the .gz: once unpacked)."""
    from minirlhf.tools.bpe import fill_table, train_ranks, write_ranks  # a tool: not needed to train

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = {split: [sample_group(split, number) for number in range(size)] for split, size in SIZES.items()}
    for split, rows in groups.items():
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if split != "train":
            (folder / f"helpdesk-{split}.jsonl").write_bytes(text)
            continue
        with open(folder / "helpdesk-train.jsonl.gz", "wb") as file:
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:  # no name, no date inside
                packed.write(text)
    texts = (text for row in groups["train"] for text in [row["prompt"], *row["responses"]])
    write_ranks(folder / "helpdesk.tiktoken", fill_table(train_ranks(texts, 1022)))


def statistics_of(n: int = 4000) -> dict[str, float]:
    """What the task looks like, over n training prompts: printed by --stats and bounded by the tests."""
    groups = [sample_group("train", number) for number in range(n // 4)]
    worths = [[gold(row["prompt"], response) for response in row["responses"]] for row in groups]
    flat = [worth for group in worths for worth in group]
    words = [len(response.split()) for row in groups for response in row["responses"]]
    best = [best_response(row["prompt"]) for row in groups]
    certain = [0.5 + 0.5 * math.tanh(abs(a - b) / (2 * TAU)) for group in worths for a, b in itertools.combinations(group, 2)]
    return {"gold, mean": statistics.mean(flat), "gold, deviation": statistics.stdev(flat),
            "gold, best": statistics.mean(gold(row["prompt"], reply) for row, reply in zip(groups, best)),
            "accuracy of a perfect annotator": statistics.mean(certain),
            "correlation of gold and length": statistics.correlation(flat, words), "words, mean": statistics.mean(words),
            "words, best": statistics.mean(len(reply.split()) for reply in best)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rebuild the files of the help desk, or measure it.")
    parser.add_argument("folder", nargs="?", default=Path(__file__).parent.parent / "data")
    parser.add_argument("--stats", action="store_true")
    options = parser.parse_args(arguments)
    if not options.stats:
        return write_data(options.folder)
    for name, value in statistics_of().items():
        print(f"{value:8.3f}  {name}")


if __name__ == "__main__":
    main()
