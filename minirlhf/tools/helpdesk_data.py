"""The help desk's data: the customers' prompts, the average agent's replies, and the files made of both.

`python -m minirlhf.tools.helpdesk_data [FOLDER]` rebuilds every file of the task.
"""

import gzip
import itertools
import json
import random
import sys
from pathlib import Path

from minirlhf.helpdesk import (
    COLOURS,
    ITEMS,
    PHRASES,
    PROBLEMS,
    REQUESTS,
    SLOTS,
    Context,
    as_reply,
    bradley_terry,
    expected,
    gold,
    parse_prompt,
    wordings,
)
from minirlhf.seeding import derive_seed
from minirlhf.tools.bpe import train_ranks, write_ranks

MAX_WORDS = 60  # no written reply is longer, so that none outgrows the models' context
GROUPS = {"train": 24000, "validation": 640, "test": 640}  # of four replies each

# How the average agent fills a slot: shares of the right sentence, a wrong one, the canned bad one, and none.
SHARES = {
    "opening": {"right": 32, "wrong": 0, "bad": 40, "none": 28},
    "remark": {"right": 32, "wrong": 15, "bad": 37, "none": 16},
    "action": {"right": 34, "wrong": 17, "bad": 37, "none": 12},
    "next step": {"right": 32, "wrong": 15, "bad": 37, "none": 16},
    "voucher": {"right": 50, "wrong": 50, "bad": 0, "none": 50},
    "goodbye": {"right": 32, "wrong": 0, "bad": 40, "none": 28},
}
REPEATS, SWAPS, WANDERS = 0.35, 0.15, 0.2  # shares of the replies


def split_contexts(seed: int = 2) -> dict[str, list[Context]]:
    """Every context in one of three parts, 8:1:1; no context is in two. A new seed deals them anew, for when the task has been
    changed after a look at the test prompts."""
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


def sample_about(context: Context, slot: str, care: float, rng: random.Random) -> str | None:
    """What an agent's sentence in a slot is about; None: no sentence. care, in [0, 1], shifts the shares."""
    right, shares = expected(context)[slot], SHARES[slot]
    weights = {**shares, "right": shares["right"] * (0.5 + 5 * care), "bad": shares["bad"] * (1.2 - 1.1 * care)}
    verdict = rng.choices(list(weights), list(weights.values()))[0]
    wrong = [about for about in PHRASES[slot] if about not in (right, "bad")]
    options = {"right": [right], "wrong": wrong, "bad": ["bad"], "none": []}[verdict]
    options = [about for about in options if about in PHRASES[slot]]  # a voucher is only ever right, or only ever wrong
    return rng.choice(options) if options else None


def sample_response(prompt: str, rng: random.Random) -> str:
    """A reply by an agent who takes little care on most days and much on a few: without those few, preferences would say
    nothing about what is missing from a reply that is nearly perfect, and that is where a policy ends."""
    context, care = parse_prompt(prompt), rng.random() ** 3
    abouts = {slot: sample_about(context, slot, care, rng) for slot in SLOTS}
    said = [rng.choice(PHRASES[slot][about]) for slot, about in abouts.items() if about]
    if said and rng.random() < REPEATS:  # the same again, perhaps in other words
        place = rng.randrange(len(said))
        said.insert(place + 1, rng.choice(wordings(said[place])))
    if len(said) > 1 and rng.random() < SWAPS:
        place = rng.randrange(len(said) - 1)
        said[place:place + 2] = reversed(said[place:place + 2])
    if rng.random() < WANDERS:
        said.insert(rng.randint(0, len(said)), rng.choice(PHRASES["filler"]["bad"]))
    response = as_reply(said)
    return response if 0 < len(response.split()) <= MAX_WORDS else sample_response(prompt, rng)


# ---- the files -------------------------------------------------------------------------------------------------------

def sample_group(prompt: str, rng: random.Random) -> dict:
    """Four different replies to a prompt, and all six pairs as [winner, loser], each judged once by the annotator."""
    responses = []
    while len(responses) < 4:
        response = sample_response(prompt, rng)
        if response not in responses:
            responses.append(response)
    worth = [gold(prompt, response) for response in responses]
    preferences = [[i, j] if rng.random() < bradley_terry(worth[i] - worth[j]) else [j, i]
                   for i, j in itertools.combinations(range(4), 2)]
    return {"prompt": prompt, "responses": responses, "preferences": preferences}


def sample_groups(split: str, seed: int = 0) -> list[dict]:
    """The rows of one file. Every prompt of the split comes once before one comes again."""
    rng = random.Random(derive_seed(seed, "groups", split))
    prompts = [prompt for context in SPLITS[split] for prompt in prompts_of(context)]
    rng.shuffle(prompts)
    return [sample_group(prompt, rng) for prompt in itertools.islice(itertools.cycle(prompts), GROUPS[split])]


def write_data(folder: str | Path) -> None:
    """Write the preference files and the tokenizer's ranks: the same bytes everywhere (the .gz: once unpacked)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = {split: sample_groups(split) for split in GROUPS}
    for split in ("validation", "test"):
        (folder / f"helpdesk-{split}.jsonl").write_bytes(json_lines(groups[split]))
    with open(folder / "helpdesk-train.jsonl.gz", "wb") as file:
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:  # no name and no date inside
            packed.write(json_lines(groups["train"]))
    texts = [text for row in groups["train"] for text in (row["prompt"], *row["responses"])]
    write_ranks(folder / "helpdesk.tiktoken", train_ranks(texts, 1022))


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


if __name__ == "__main__":
    write_data(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[2] / "data")
