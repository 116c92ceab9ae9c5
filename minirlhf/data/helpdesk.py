"""The embedded task: a shop's help desk, whose responses have a hidden, exact utility.

A prompt names an item, a problem and a request. A response consists of sentences from six slots.
`gold` adds up the utility of the sentences of any response to a prompt. It is never used in
training: an annotator who sometimes makes mistakes (`preference_probability`) turns it into
preferences, and these are all the data there is.

The author of the responses (`tools/helpdesk_data.py`) uses one fixed bad phrase for each slot
often, and several good phrases rarely. So the most likely response is a bad one, and good responses
need learning from preferences: sampling at a lower temperature does not help.
"""

import math
import random
import re
from collections.abc import Iterable
from typing import NamedTuple

from minirlhf.run.seeding import derive_seed

ITEMS = "kettle toaster lamp radio camera clock fan drill mixer heater".split()
COLORS = "red blue green black white yellow".split()

# problem -> (what the customer says, possible requests). In the last four the shop is not at fault.
# Customer and agent use the same word for the same thing. So one skill, finding in the prompt the
# word just read, checks every slot.
PROBLEMS = {
    "broken": (("My {x} arrived broken.", "The {x} you sent me is broken."),
               ("refund", "exchange", "repair", "return")),
    "late": (("My {x} is very late.", "The {x} I ordered is late."),
             ("refund", "exchange", "tracking")),
    "leaking": (("My {x} is leaking.", "There is something leaking from my {x}."),
                ("refund", "exchange", "repair")),
    "wrong": (("You sent me the wrong {x}.", "The {x} that came is the wrong one."),
              ("refund", "exchange", "return")),
    "spare": (("My {x} is spare.", "I have a spare {x} now."), ("refund", "exchange", "return")),
    "gift": (("My {x} was a gift.", "I got the {x} as a gift."),
             ("exchange", "tracking", "return", "manual")),
    "small": (("My {x} is too small for us.", "I chose a {x} that is too small."),
              ("refund", "exchange", "return")),
    "double": (("I ordered the {x} double.", "By mistake my order of the {x} is double."),
               ("refund", "tracking", "return")),
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
# slot -> topic of a sentence -> its phrases. The good phrases start with different words, so the
# most likely next word at each slot is that of the fixed bad phrase.
PHRASES = {
    "opening": {
        "polite": ("Thank you for writing to us.", "Hello and welcome to our shop.",
                   "Good day, thanks for your note."),
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
    "voucher": {
        "faulty": ("Here is a voucher worth ten euros.", "Your next delivery costs you nothing."),
    },
    "goodbye": {
        "polite": ("Have a wonderful week.", "Kind regards from all of us.",
                   "Do ask if you need anything more."),
        "bad": ("Now leave me in peace.",),
    },
    "filler": {
        "bad": ("It rained heavily all morning.", "Our canteen got new carpets in May.",
                "People buy the strangest things."),
    },
}
SLOTS = ("opening", "remark", "action", "next step", "voucher", "goodbye")  # in the right order

# Utility of the first sentence of a slot. The best response has 6.2, or 5.2 if the shop is not at
# fault.
UTILITY = {
    "opening": {"right": 0.8, "bad": -0.6},
    "remark": {"right": 1.0, "wrong": -1.0, "bad": -0.6},
    "action": {"right": 1.6, "wrong": -1.0, "bad": -0.6},
    "next step": {"right": 1.0, "wrong": -0.8, "bad": -0.6},
    "voucher": {"right": 1.0, "wrong": -1.2},
    "goodbye": {"right": 0.8, "bad": -0.6},
    "filler": {"bad": -0.8},
}
REPEAT = -1.2  # another sentence of the same slot; a right one adds nothing else
DISORDER = -0.8  # a sentence after one of a later slot
UNREADABLE = -0.03  # per character of any other sentence: longer nonsense costs more
UNFINISHED = -1.0  # the response was cut by the length limit

TAU = 0.5  # in units of gold; a difference of TAU is preferred 73% of the time


class Context(NamedTuple):
    """What a prompt states; None where it cannot be parsed."""

    color: str | None
    item: str | None
    problem: str | None
    request: str | None


_THING = re.compile(rf"({'|'.join(COLORS)}) ({'|'.join(ITEMS)})\b")
_PROBLEM_OF = {line: problem for problem, (lines, _) in PROBLEMS.items() for line in lines}
_REQUEST_OF = {line: request for request, lines in REQUESTS.items() for line in lines}
_MEANING = {phrase: (slot, topic) for slot, topics in PHRASES.items()
            for topic, phrases in topics.items() for phrase in phrases}


# ---- utility -------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """Split after . ? or !; white space counts as one space.

    >>> sentences(" Hello there.  Now what? never mind")
    ['Hello there.', 'Now what?', 'never mind']
    """
    parts = re.split(r"(?<=[.?!]) ", " ".join(text.split()))
    return [sentence for sentence in parts if sentence]


def parse_prompt(prompt: str) -> Context:
    """The color, item, problem and request of the customer's message.

    >>> parse_prompt("Customer: My blue kettle arrived broken. Please send me a refund.\\nAgent:")
    Context(color='blue', item='kettle', problem='broken', request='refund')
    """
    message = prompt.rpartition("Customer:")[2].partition("Agent:")[0]
    thing = _THING.search(message)
    lines = sentences(_THING.sub("{x}", message, count=1))
    problem = next((_PROBLEM_OF[line] for line in lines if line in _PROBLEM_OF), None)
    request = next((_REQUEST_OF[line] for line in lines if line in _REQUEST_OF), None)
    return Context(thing and thing[1], thing and thing[2], problem, request)


def expected(context: Context) -> dict[str, str | None]:
    """slot -> the topic that its sentence should have."""
    is_faulty = context.problem is not None and context.problem not in NO_FAULT
    return {"opening": "polite", "remark": context.problem, "action": context.request,
            "next step": context.request, "voucher": "faulty" if is_faulty else None,
            "goodbye": "polite"}


def gold_parts(prompt: str, response: str, finished: bool = True) -> list[tuple[str, float]]:
    """Everything that counts in a response, in order, as (name, utility).

    >>> prompt = "Customer: My blue kettle arrived broken. Please send me a refund.\\nAgent:"
    >>> gold_parts(prompt, " What do you want now? We will send the refund for it. Bye.")
    [('bad opening', -0.6), ('right action', 1.6), ('unreadable', -0.12)]
    """
    right_topics = expected(parse_prompt(prompt))
    parts: list[tuple[str, float]] = []
    seen: set[str] = set()
    for sentence in sentences(response):
        slot, topic = _MEANING.get(sentence, (None, None))
        if slot is None:
            parts.append(("unreadable", UNREADABLE * len(sentence)))
            continue
        quality = "right" if topic == right_topics.get(slot) else "wrong"
        if topic == "bad":
            quality = "bad"
        is_first = slot not in seen
        if slot in SLOTS:
            if not is_first:
                parts.append(("repeat", REPEAT))
            if any(SLOTS.index(slot) < SLOTS.index(earlier) for earlier in seen):
                parts.append(("out of order", DISORDER))
            seen.add(slot)
        if is_first or UTILITY[slot][quality] < 0:
            parts.append((f"{quality} {slot}", UTILITY[slot][quality]))
    return parts if finished else parts + [("unfinished", UNFINISHED)]


def gold(prompt: str, response: str, finished: bool = True) -> float:
    """The hidden utility of any text as a response to any prompt; never raises.

    finished: False if the response was cut by length.
    """
    return math.fsum(utility for _, utility in gold_parts(prompt, response, finished))


def wordings(sentence: str) -> tuple[str, ...]:
    """All phrases with the meaning of a sentence of the task."""
    slot, topic = _MEANING[sentence]
    return PHRASES[slot][topic]


# ---- the best response, and the best response with one defect ------------------------------------


def as_response(lines: Iterable[str]) -> str:
    """Sentences joined; "" is left out. Prompts end without a space, so this starts with one."""
    return "".join(f" {sentence}" for sentence in lines if sentence)


def best_sentences(context: Context) -> dict[str, str]:
    """slot -> the sentence of the best response, in order; "" if it has none there."""
    return {slot: PHRASES[slot].get(topic, [""])[0] for slot, topic in expected(context).items()}


def best_response(prompt: str) -> str:
    """A response with the highest possible gold utility."""
    return as_response(best_sentences(parse_prompt(prompt)).values())


def probes(prompt: str) -> dict[str, str]:
    """defect -> the best response with exactly this defect: does a reward model score it lower?

    The wrong problem, action and so on are random, seeded by the prompt. The prompt must be one of
    the task.
    """
    context = parse_prompt(prompt)
    random_choice = random.Random(derive_seed(0, "probes", prompt)).choice
    best = best_sentences(context)
    topics = expected(context)

    def say(slot: str, topic: str) -> str:
        return PHRASES[slot][topic][0]

    def wrong(slot: str) -> str:
        others = [topic for topic in PHRASES[slot] if topic not in (topics[slot], "bad")]
        return say(slot, random_choice(others))

    action = best["action"]
    voucher = "no voucher" if best["voucher"] else "needless voucher"
    changes = {
        "rude opening": {"opening": say("opening", "bad")},
        "no opening": {"opening": ""},
        "wrong problem": {"remark": wrong("remark")},
        "blame": {"remark": say("remark", "bad")},
        "no apology": {"remark": ""},
        "wrong action": {"action": wrong("action")},
        "refusal": {"action": say("action", "bad")},
        "no action": {"action": ""},
        "wrong next step": {"next step": wrong("next step")},
        "put off": {"next step": say("next step", "bad")},
        "no next step": {"next step": ""},
        voucher: {"voucher": "" if best["voucher"] else say("voucher", "faulty")},
        "rude ending": {"goodbye": say("goodbye", "bad")},
        "no goodbye": {"goodbye": ""},
        "filler": {"action": f"{action} {random_choice(PHRASES['filler']['bad'])}"},
        "repeat": {"action": f"{action} {PHRASES['action'][topics['action']][1]}"},
        "out of order": {"action": best["next step"], "next step": action},
    }
    return {defect: as_response({**best, **change}.values()) for defect, change in changes.items()}


# ---- the annotator -------------------------------------------------------------------------------


def bradley_terry(gap: float) -> float:
    """P(the first is preferred) = sigmoid(gap / TAU), gap in units of gold.

    (Bradley and Terry 1952.)
    """
    # equal to 1 / (1 + exp(-gap / TAU)), but cannot overflow
    return 0.5 + 0.5 * math.tanh(gap / (2 * TAU))


def preference_probability(prompt: str, a: str, b: str) -> float:
    """P(the annotator prefers response a to response b)."""
    return bradley_terry(gold(prompt, a) - gold(prompt, b))
