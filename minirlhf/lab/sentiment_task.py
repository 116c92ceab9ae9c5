"""The task of the sentiment lab: continue a text positively. Openings, and the ground truth.

The ground truth (--task) is the sentiment of the response: VADER's compound score (Hutto and
Gilbert 2014), from -1 to 1. `pip install vaderSentiment`. Without it, --quick uses a list of words.
"""

import functools
import itertools
import math
import random
import re
from collections.abc import Callable

from minirlhf.data.tokenizer import decode
from minirlhf.run.seeding import derive_seed

import tiktoken

FORMS = ("Write a short story about {}.", "Write a diary entry about {}.", "Write a review of {}.")
TOPICS = """a lighthouse/my first job/the dentist/a dog/a wedding/the war/an old car/a new school
the sea/a birthday/a hospital/a train journey/my neighbor/a restaurant/the winter/a lost key
a soccer match/my grandmother/a thief/a garden/the moon/a concert/an exam/a storm/a hotel
a doctor/the city/a painter/a broken window/a letter/a river/my brother/a farm/a film
a phone call/the market/a bridge/an island/a cook/the last day of summer"""
REQUESTS = [form.format(topic) for topic in re.split("[/\n]", TOPICS) for form in FORMS]
REQUEST, OPENING = 64, 13  # tokens at most: of a request, and of the answer to it
TEMPERATURE = 0.25  # of the labels: a difference of 0.25 is preferred with probability 0.73
GOOD = frozenset("good great happy love beautiful best kind fine thank thanks welcome".split())
BAD = frozenset("bad sad angry hate ugly worst wrong sorry problem broken late".split())


@functools.cache
def scorer() -> tuple[str, Callable[[str], float]]:
    """(name, function from a text to its sentiment)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        return "a list of words, because VADER is not installed", word_list_score
    analyzer = SentimentIntensityAnalyzer()
    return "VADER", lambda text: analyzer.polarity_scores(text)["compound"]


def word_list_score(text: str) -> float:
    """tanh of the number of good words minus the number of bad words."""
    return math.tanh(sum((word in GOOD) - (word in BAD) for word in words(text)))


def words(text: str) -> list[str]:
    """
    >>> words("It's GOOD, good!")
    ["it's", 'good', 'good']
    """
    return re.findall(r"[\w']+", text.lower())


def gold(prompt: str, response: str, finished: bool = True) -> float:
    """The sentiment of the response alone, -1 to 1."""
    return scorer()[1](response)


def preference_probability(prompt: str, a: str, b: str) -> float:
    """P(a is preferred to b) = sigmoid((u_a - u_b) / TEMPERATURE) (Bradley and Terry 1952)."""
    return 1 / (1 + math.exp((gold(prompt, b) - gold(prompt, a)) / TEMPERATURE))


def opening(answer: str, encoding: tiktoken.Encoding, seed: int) -> list[str]:
    """[its first 8 to 12 tokens, cut between words], or [] if they are not plain English."""
    ids = encoding.encode_ordinary(answer)
    ends = [end for end in range(8, min(OPENING, len(ids)))
            if encoding.decode_single_token_bytes(ids[end]).startswith(b" ")]
    text = decode(encoding, ids[:random.Random(seed).choice(ends)]) if ends else ""
    return [text] if re.fullmatch(r"[A-Z][A-Za-z ,.;'-]*", text) else []


def labeled(number: int, prompt: str, responses: list[str]) -> dict:
    """A record with all pairs of the responses. Labels are drawn once, a function of its number."""
    random_labels = random.Random(derive_seed(0, "labels", number))
    preferences = []
    for a, b in itertools.combinations(range(len(responses)), 2):
        prefers_a = preference_probability(prompt, responses[a], responses[b])
        preferences.append([a, b] if random_labels.random() < prefers_a else [b, a])
    return dict(prompt=prompt, responses=responses, preferences=preferences)
