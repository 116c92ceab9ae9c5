"""The help desk's data: prompts of customers, responses of an average agent, and the files of both.

`python -m minirlhf.tools.helpdesk_data FOLDER` writes all files of the task again.
"""

import gzip
import io
import itertools
import json
import random
from pathlib import Path

from minirlhf.config import DATA
from minirlhf.data.helpdesk import (
    COLORS,
    ITEMS,
    PHRASES,
    PROBLEMS,
    REQUESTS,
    SLOTS,
    Context,
    as_response,
    bradley_terry,
    expected,
    gold,
    parse_prompt,
    wordings,
)
from minirlhf.run.command_line import Parser, one_line_errors
from minirlhf.run.files import check_output, write_atomically
from minirlhf.run.seeding import derive_seed
from minirlhf.tools.bpe import train_ranks, write_ranks

MAX_WORDS = 60  # of a response, so that all of them fit into the models' context
FILES = ("helpdesk-train.jsonl.gz", "helpdesk-validation.jsonl", "helpdesk-test.jsonl",
         "helpdesk.tiktoken")
GROUPS = {"train": 24000, "validation": 640, "test": 640}  # of four responses each

# How the average agent fills a slot: relative frequencies of the right topic, a wrong topic, the
# canned bad phrase, and no sentence.
SHARES = {
    "opening": {"right": 32, "wrong": 0, "bad": 40, "none": 28},
    "remark": {"right": 32, "wrong": 15, "bad": 37, "none": 16},
    "action": {"right": 34, "wrong": 17, "bad": 37, "none": 12},
    "next step": {"right": 32, "wrong": 15, "bad": 37, "none": 16},
    "voucher": {"right": 50, "wrong": 50, "bad": 0, "none": 50},
    "goodbye": {"right": 32, "wrong": 0, "bad": 40, "none": 28},
}
# Shares of the responses with each defect.
REPEATS = 0.35
SWAPS = 0.15
FILLERS = 0.2


# ---- prompts -------------------------------------------------------------------------------------


def split_contexts(seed: int = 2) -> dict[str, list[Context]]:
    """All contexts in three disjoint parts, 8:1:1.

    Use a new seed if the task was changed after a look at the test prompts.
    """
    contexts = [Context(color, item, problem, request)
                for color, item in itertools.product(COLORS, ITEMS)
                for problem, (_, requests) in PROBLEMS.items() for request in requests]
    random.Random(derive_seed(seed, "contexts")).shuffle(contexts)
    tenth = len(contexts) // 10
    return {"train": contexts[2 * tenth:], "validation": contexts[:tenth],
            "test": contexts[tenth:2 * tenth]}


SPLITS = split_contexts()


def prompts_of(context: Context) -> list[str]:
    """All wordings of a context."""
    thing = f"{context.color} {context.item}"
    wordings_of_problem, _ = PROBLEMS[context.problem]
    return [f"Customer: {problem.replace('{x}', thing)} {request}\nAgent:"
            for problem, request in itertools.product(wordings_of_problem,
                                                      REQUESTS[context.request])]


# ---- responses -----------------------------------------------------------------------------------


def sample_topic(context: Context, slot: str, care: float, rng: random.Random) -> str | None:
    """The topic of the agent's sentence in a slot, None for no sentence.

    care: in [0, 1]; more care makes the right topic more frequent and the bad phrase less.
    """
    right = expected(context)[slot]
    weights = dict(SHARES[slot])
    weights["right"] *= 0.5 + 5 * care
    weights["bad"] *= 1.2 - 1.1 * care
    quality = rng.choices(list(weights), list(weights.values()))[0]
    wrong = [topic for topic in PHRASES[slot] if topic not in (right, "bad")]
    topics = {"right": [right], "wrong": wrong, "bad": ["bad"], "none": []}[quality]
    # the voucher has one topic, which is either the right or the wrong one
    topics = [topic for topic in topics if topic in PHRASES[slot]]
    return rng.choice(topics) if topics else None


def sample_response(prompt: str, rng: random.Random) -> str:
    """A response of an agent who usually takes little care and sometimes much.

    The careful ones are needed: without them, preferences contain no information about what is
    missing in nearly perfect responses, which a trained policy produces.
    """
    context = parse_prompt(prompt)
    care = rng.random() ** 3
    topics = {slot: sample_topic(context, slot, care, rng) for slot in SLOTS}
    lines = [rng.choice(PHRASES[slot][topic]) for slot, topic in topics.items() if topic]
    if lines and rng.random() < REPEATS:  # the same meaning again, perhaps in other words
        place = rng.randrange(len(lines))
        lines.insert(place + 1, rng.choice(wordings(lines[place])))
    if len(lines) > 1 and rng.random() < SWAPS:
        place = rng.randrange(len(lines) - 1)
        lines[place:place + 2] = reversed(lines[place:place + 2])
    if rng.random() < FILLERS:
        lines.insert(rng.randint(0, len(lines)), rng.choice(PHRASES["filler"]["bad"]))
    response = as_response(lines)
    is_usable = 0 < len(response.split()) <= MAX_WORDS
    return response if is_usable else sample_response(prompt, rng)


# ---- files ---------------------------------------------------------------------------------------


def sample_group(prompt: str, rng: random.Random) -> dict:
    """Four different responses, and all six pairs as [winner, loser], each labeled once."""
    responses: list[str] = []
    while len(responses) < 4:
        response = sample_response(prompt, rng)
        if response not in responses:
            responses.append(response)
    utility = [gold(prompt, response) for response in responses]
    preferences = []
    for i, j in itertools.combinations(range(4), 2):
        prefers_i = rng.random() < bradley_terry(utility[i] - utility[j])
        preferences.append([i, j] if prefers_i else [j, i])
    return {"prompt": prompt, "responses": responses, "preferences": preferences}


def sample_groups(split: str, seed: int = 0) -> list[dict]:
    """The records of one file. Each prompt of the split occurs once before one occurs again."""
    rng = random.Random(derive_seed(seed, "groups", split))
    prompts = [prompt for context in SPLITS[split] for prompt in prompts_of(context)]
    rng.shuffle(prompts)
    return [sample_group(prompt, rng)
            for prompt in itertools.islice(itertools.cycle(prompts), GROUPS[split])]


def write_data(folder: str | Path) -> None:
    """Write the preference files and the tokenizer's ranks.

    The bytes are the same on every platform; of the .gz file, the unpacked bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = {split: sample_groups(split) for split in GROUPS}
    for split in ("validation", "test"):
        write_atomically(folder / f"helpdesk-{split}.jsonl", json_lines(groups[split]))
    buffer = io.BytesIO()
    # without file name and date, which would make the bytes differ
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as packed:
        packed.write(json_lines(groups["train"]))
    write_atomically(folder / "helpdesk-train.jsonl.gz", buffer.getvalue())
    texts = [text for group in groups["train"] for text in (group["prompt"], *group["responses"])]
    write_ranks(folder / "helpdesk.tiktoken", train_ranks(texts, 1022))


def json_lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def main(arguments: list[str] | None = None) -> None:
    """Write the files. A user's error is one line and exit status 2."""
    parser = Parser(prog="python -m minirlhf.tools.helpdesk_data",
                    description="Write the help desk's data again.")
    parser.add_argument("folder", type=Path, nargs="?", default=DATA,
                        help=f"default: {DATA}")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    with one_line_errors():
        options = parser.parse_args(arguments)
        for name in FILES:
            check_output(options.folder / name, options.force)
        write_data(options.folder)


if __name__ == "__main__":
    main()
