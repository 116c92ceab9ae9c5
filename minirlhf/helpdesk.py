"""The embedded task: a shop's help desk whose replies have a hidden, exact worth.

A prompt names an item, a problem and a request; a reply is made of sentences from six slots. `gold` reads any reply and
adds up what its sentences are worth for that prompt. No model ever sees it: an annotator who is sometimes mistaken
(`preference_probability`) turns it into preferences, and those are all the data there is. The average agent who wrote the
replies (`tools/helpdesk_data.py`) says one canned bad phrase per slot often, and several good ones seldom each. The most likely
reply is therefore a bad one, and only learning from preferences, not sharper sampling, makes replies good.
"""

import math
import random
import re
from collections.abc import Iterable
from typing import NamedTuple

from minirlhf.seeding import derive_seed

ITEMS = "kettle toaster lamp radio camera clock fan drill mixer heater".split()
COLOURS = "red blue green black white yellow".split()

# problem -> (what the customer says, the requests that go with it); nobody is at fault in the last four. Customer and agent
# use the same word for the same thing, so that one skill, finding in the prompt the word just read, checks every slot.
PROBLEMS = {
    "broken": (("My {x} arrived broken.", "The {x} you sent me is broken."), ("refund", "exchange", "repair", "return")),
    "late": (("My {x} is very late.", "The {x} I ordered is late."), ("refund", "exchange", "tracking")),
    "leaking": (("My {x} is leaking.", "There is something leaking from my {x}."), ("refund", "exchange", "repair")),
    "wrong": (("You sent me the wrong {x}.", "The {x} that came is the wrong one."), ("refund", "exchange", "return")),
    "spare": (("My {x} is spare.", "I have a spare {x} now."), ("refund", "exchange", "return")),
    "gift": (("My {x} was a gift.", "I got the {x} as a gift."), ("exchange", "tracking", "return", "manual")),
    "small": (("My {x} is too small for us.", "I chose a {x} that is too small."), ("refund", "exchange", "return")),
    "double": (("I ordered the {x} double.", "By mistake my order of the {x} is double."), ("refund", "tracking", "return")),
}
NO_FAULT = ("spare", "gift", "small", "double")
REQUESTS = {
    "refund": ("Can I have a refund?", "Please send me a refund."),
    "exchange": ("Can I have an exchange?", "Please arrange an exchange."),
    "repair": ("Can I have a repair?", "Please arrange a repair."),
    "tracking": ("Can I have the tracking number?", "Please send me the tracking link."),
    "return": ("Can I have a return label?", "Please arrange a return."),
    "manual": ("Can I have the manual?", "Please send me the manual."),
}
# slot -> what a sentence is about -> ways to say it. The good ways begin with
# different words, so that the likeliest next word at each slot is that of the canned bad phrase.
PHRASES = {
    "opening": {
        "polite": ("Thank you for writing to us.", "Hello and welcome to our shop.", "Good day, thanks for your note."),
        "bad": ("What do you want now?",),
    },
    "remark": {
        "broken": ("I am sorry it is broken.", "What a shame that it came broken."),
        "late": ("I am sorry it is late.", "What a shame that it comes late."),
        "leaking": ("I am sorry it is leaking.", "What a shame that it is leaking."),
        "wrong": ("I am sorry it is wrong.", "What a shame that it came wrong."),
        "spare": ("I see it is spare.", "No problem that it is spare."),
        "gift": ("I see it is a gift.", "No problem that it was a gift."),
        "small": ("I see it is small.", "No problem that it is too small."),
        "double": ("I see it is double.", "No problem that it came double."),
        "bad": ("You must have been careless.",),
    },
    "action": {
        "refund": ("I have made the refund for it.", "We will send the refund for it."),
        "exchange": ("I have booked the exchange for it.", "We will handle the exchange for it."),
        "repair": ("I have booked the repair for it.", "We will handle the repair for it."),
        "tracking": ("I have found the tracking for it.", "We will send the tracking for it."),
        "return": ("I have booked the return for it.", "We will handle the return for it."),
        "manual": ("I have found the manual for it.", "We will send the manual for it."),
        "bad": ("Nothing can be done about that.",),
    },
    "next step": {
        "refund": ("The refund takes two days.", "Please look out for the refund on Friday."),
        "exchange": ("The exchange takes four days.", "Please keep the box for the exchange."),
        "repair": ("The repair takes one week.", "Please keep the box for the repair."),
        "tracking": ("The tracking shows every stop.", "Please look at the tracking tonight."),
        "return": ("The return takes three days.", "Please keep the box for the return."),
        "manual": ("The manual has many pictures.", "Please look at the manual online."),
        "bad": ("You will simply have to wait.",),
    },
    "voucher": {"faulty": ("Here is a voucher worth ten euros.", "Your next delivery costs you nothing.")},
    "goodbye": {
        "polite": ("Have a wonderful week.", "Kind regards from all of us.", "Do ask if you need anything more."),
        "bad": ("Now leave me in peace.",),
    },
    "filler": {
        "bad": ("It rained heavily all morning.", "Our canteen got new carpets in May.", "People buy the strangest things."),
    },
}
SLOTS = ("opening", "remark", "action", "next step", "voucher", "goodbye")  # in the order of a good reply

# The first sentence of a slot earns or costs this; the best reply is worth 6.2, or 5.2 where nobody is at fault.
WORTH = {
    "opening": {"right": 0.8, "bad": -0.6},
    "remark": {"right": 1.0, "wrong": -1.0, "bad": -0.6},
    "action": {"right": 1.6, "wrong": -1.0, "bad": -0.6},
    "next step": {"right": 1.0, "wrong": -0.8, "bad": -0.6},
    "voucher": {"right": 1.0, "wrong": -1.2},
    "goodbye": {"right": 0.8, "bad": -0.6},
    "filler": {"bad": -0.8},
}
REPEAT = -1.2  # a second sentence of a slot: it can cost, but it earns nothing
DISORDER = -0.8  # a sentence that comes after one of a later slot
UNREADABLE = -0.03  # per character of a sentence that is none of ours: nonsense must not come at a flat price
UNFINISHED = -1.0  # the reply was cut by the length limit

TAU = 0.5  # gold utility; a difference of TAU is preferred 73% of the time


class Context(NamedTuple):
    """What a prompt says; None where it cannot be read."""

    colour: str | None
    item: str | None
    problem: str | None
    request: str | None


_THING = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(ITEMS)})\b")
_PROBLEM_OF = {line: problem for problem, (lines, _) in PROBLEMS.items() for line in lines}
_REQUEST_OF = {line: request for request, lines in REQUESTS.items() for line in lines}
_MEANING = {phrase: (slot, about) for slot, topics in PHRASES.items() for about, phrases in topics.items() for phrase in phrases}


# ---- reading ---------------------------------------------------------------------------------------------------------

def sentences(text: str) -> list[str]:
    """Split after . ? or !; any run of white space counts as one blank.

    >>> sentences(" Hello there.  Now what? never mind")
    ['Hello there.', 'Now what?', 'never mind']
    """
    return [sentence for sentence in re.split(r"(?<=[.?!]) ", " ".join(text.split())) if sentence]


def parse_prompt(prompt: str) -> Context:
    """The colour, item, problem and request of the customer's message.

    >>> parse_prompt("Customer: My blue kettle arrived broken. Please send me a refund.\\nAgent:")
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

    >>> prompt = "Customer: My blue kettle arrived broken. Please send me a refund.\\nAgent:"
    >>> gold_parts(prompt, " What do you want now? We will send the refund for it. The repair takes one week. Bye.")
    [('bad opening', -0.6), ('right action', 1.6), ('wrong next step', -0.8), ('unreadable', -0.12)]
    """
    context, parts, seen = parse_prompt(prompt), [], set()
    wanted = expected(context)
    for sentence in sentences(response):
        slot, about = _MEANING.get(sentence, (None, None))
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
        if slot in SLOTS:
            seen.add(slot)
    return parts if finished else parts + [("unfinished", UNFINISHED)]


def gold(prompt: str, response: str, finished: bool = True) -> float:
    """The hidden utility of any text as a reply to any prompt; never raises. finished: False if cut by length."""
    return math.fsum(worth for _, worth in gold_parts(prompt, response, finished))


def wordings(sentence: str) -> tuple[str, ...]:
    """The ways to say what a sentence of the task says."""
    slot, about = _MEANING[sentence]
    return PHRASES[slot][about]


# ---- the best reply, and the best reply with one defect --------------------------------------------------------------

def as_reply(said: Iterable[str]) -> str:
    """Sentences joined as a response: it begins with a blank, since the prompt ends without one. "" is nothing said."""
    return "".join(f" {sentence}" for sentence in said if sentence)


def best_sentences(context: Context) -> dict[str, str]:
    """slot -> the sentence that the best reply has there, in order; "" where it says nothing."""
    return {slot: PHRASES[slot].get(about, [""])[0]
            for slot, about in expected(context).items()}


def best_response(prompt: str) -> str:
    """A reply that no other beats by gold."""
    return as_reply(best_sentences(parse_prompt(prompt)).values())


def probes(prompt: str) -> dict[str, str]:
    """The best reply with exactly one defect, by the name of the defect: tests of what a reward model has understood.

    The wrong problem, action and so on are drawn by a generator that the prompt seeds. The prompt must be the task's.
    """
    context, rng = parse_prompt(prompt), random.Random(derive_seed(0, "probes", prompt))
    best, wanted = best_sentences(context), expected(context)

    def say(slot: str, about: str) -> str:
        return PHRASES[slot][about][0]

    def another(options: Iterable[str], mine: str | None) -> str:
        return rng.choice([option for option in options if option not in (mine, "bad")])

    action = best["action"]
    changes = {
        "rude opening": {"opening": say("opening", "bad")}, "no opening": {"opening": ""},
        "wrong problem": {"remark": say("remark", another(PHRASES["remark"], wanted["remark"]))},
        "blame": {"remark": say("remark", "bad")}, "no apology": {"remark": ""},
        "wrong action": {"action": say("action", another(PHRASES["action"], wanted["action"]))},
        "refusal": {"action": say("action", "bad")}, "no action": {"action": ""},
        "wrong next step": {"next step": say("next step", another(PHRASES["next step"], wanted["next step"]))},
        "put off": {"next step": say("next step", "bad")}, "no next step": {"next step": ""},
        "no voucher" if best["voucher"] else "needless voucher":
            {"voucher": "" if best["voucher"] else say("voucher", "faulty")},
        "rude ending": {"goodbye": say("goodbye", "bad")}, "no goodbye": {"goodbye": ""},
        "filler": {"action": f"{action} {rng.choice(PHRASES['filler']['bad'])}"},
        "repeat": {"action": f"{action} {PHRASES['action'][wanted['action']][1]}"},
        "out of order": {"action": best["next step"], "next step": action},
    }
    return {defect: as_reply({**best, **change}.values()) for defect, change in changes.items()}


# ---- the annotator ---------------------------------------------------------------------------------------------------

def bradley_terry(gap: float) -> float:
    """P(the first is preferred) = sigmoid(gap / TAU), gap in units of gold   (Bradley and Terry 1952)."""
    return 0.5 + 0.5 * math.tanh(gap / (2 * TAU))  # the same as 1 / (1 + exp(-gap / TAU)), but cannot overflow


def preference_probability(prompt: str, a: str, b: str) -> float:
    """P(the annotator prefers response a to response b)."""
    return bradley_terry(gold(prompt, a) - gold(prompt, b))
