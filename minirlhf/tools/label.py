"""Compare pairs of a policy's samples by hand. `python -m minirlhf.tools.label --run runs/NAME`

    two samples per prompt -> one key -> one line in labels.jsonl
    -> train_reward.py --init-reward ... --data labels.jsonl
"""

import dataclasses
import math
import random
import shutil
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

from minirlhf.config import DEVICES, RewardConfig
from minirlhf.data.chat_templates import read_chat_template
from minirlhf.data.preference_files import read_prompts
from minirlhf.data.prompts import (
    Prompts,
    encode_prompts,
    prompts_of_step,
    unique_prompts,
    without_marks,
)
from minirlhf.data.splits import HELPDESK_FILES, file_facts, load_function
from minirlhf.rl.reward import Reward, score_responses
from minirlhf.rl.sampling import sample_responses
from minirlhf.run.command_line import check_ranges, flag, run_script, setting
from minirlhf.run.device import pick_device
from minirlhf.run.errors import UserError, call_users_function
from minirlhf.run.seeding import derive_seed
from minirlhf.run.terminal import Progress, echo, shell_command
from minirlhf.tools.labels import PREFERENCES, LabelFile, Pair
from minirlhf.tools.terminal import (
    can_redraw,
    is_interactive,
    raw_keys,
    read_key,
    side_by_side,
    wrap,
)
from minirlhf.tools.trained import Trained, check_facts, identity, load_trained, training_splits

KEYS = {"left": "left", "a": "left", "1": "left", "right": "right", "d": "right", "2": "right",
        "t": "tie", "=": "tie", "s": "skip", "u": "undo", "q": "quit", "": "quit", "\x04": "quit"}
HELP = ("1/a/← left is better", "2/d/→ right is better", "t tie", "s skip", "u undo", "q quit")
CHUNK = 128  # responses to sample at a time if a program answers
MAX_SKIPPED = 200  # stop after this many consecutive prompts without a usable pair


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Compare samples of a finished policy run, one key each; save the answers as preferences."""

    run: str = setting("", "folder of a finished policy run")
    out: str = setting(
        "", "file of answers, continued if it exists; empty: labels.jsonl in the run folder")
    pick: str = setting(
        "next", "uncertain: of --candidates pairs per prompt, show the pair whose reward-model "
                "probability is closest to 1/2",
        choices=("next", "uncertain"))
    candidates: int = setting(8, "pairs sampled per prompt for --pick uncertain", 1)
    count: int = setting(
        0, "stop when the file has this many answers, skipped ones included; 0: continue until q",
        0)
    judge: str = setting(
        "", "let a program answer: module:function(prompt, a, b) -> probability that a is better, "
            "or None to skip the pair")
    temperature: float = setting(0.0, "of sampling; 0: as in training", 0)
    max_response_length: int = setting(0, "tokens, EOS included; 0: as in training", 0)
    seed: int = setting(0, "every random choice is a function of it", 0)
    device: str = setting("auto", "auto: cuda if there is one, otherwise cpu", choices=DEVICES)


def main(config: LabelConfig) -> dict:
    """Collect answers; returns the number of answers of each kind. Raises UserError."""
    check_ranges(config)
    function = load_function(config.judge, "--judge") if config.judge else None
    if function and not config.count:
        raise UserError("--judge needs --count: the number of answers to write")
    if not function and not is_interactive():
        raise UserError("labeling needs a terminal; start this program in one "
                        "(over ssh: ssh -t), or let a program answer with --judge")
    trained = load_trained(config.run, pick_device(config.device), task="none")
    path = Path(config.out) if config.out else trained.folder / "labels.jsonl"
    labels = LabelFile(path, identity(trained), config.run)
    if labels.repaired:
        echo(f"{path}: the last answer was incomplete and has been removed; "
             "its pair will be shown again")
    pairs = fresh_pairs(trained, training_prompts(trained), labels.next_number(), config)
    try:
        if function:
            ask_program(function, labels, pairs, config)
        else:
            ask_person(labels, pairs, config)
    except KeyboardInterrupt:  # the same as q
        pass
    finally:  # also if the disk is full
        echo(f"\n{path}: {labels.summary()}")
    if labels.rows:
        echo(f"\nto train on these answers:\n  {next_command(trained, path)}")
    return {answer: sum(row["answer"] == answer for row in labels.rows) for answer in PREFERENCES}


# ---- which pairs to compare ----------------------------------------------------------------------


def training_prompts(trained: Trained) -> Prompts:
    """The prompts that the policy was trained on. Raises UserError if a file has changed."""
    path = trained.config.prompts
    if path:
        check_facts(trained.facts, file_facts({"prompts": [path]}), trained.folder)
        texts = read_prompts(path,
                             template=read_chat_template(trained.reward_config.tokenizer))
    else:
        texts = unique_prompts(training_splits(trained).train)
    prompts = encode_prompts(texts, trained.encoding, trained.reward_config.max_prompt_length)
    return prompts._replace(texts=texts)  # with the marks of special tokens: training needs them


def fresh_pairs(trained: Trained, prompts: Prompts, number: int,
                config: LabelConfig) -> Iterator[Pair]:
    """Yield pairs of samples, starting with this number. A pair depends on seed and number only.

    Skips prompts for which all sampled pairs are useless for training.
    Raises UserError if there are MAX_SKIPPED such prompts in a row.
    """
    copies = 2 * (config.candidates if config.pick == "uncertain" else 1)
    count = max(1, CHUNK // copies) if config.judge else 1  # prompts at a time
    sampling = trained.sampling(config.temperature, config.max_response_length, config.seed)
    reward = Reward("reward model", trained.reward_model, missing_eos_penalty=0.0)
    scale = float(trained.reward_model.score_scale)
    skipped = 0
    while True:
        steps = [prompts_of_step(prompts, 1, copies, config.seed, step)
                 for step in range(number, number + count)]
        chunk = Prompts([text for step in steps for text in step.texts],
                        [ids for step in steps for ids in step.ids])
        rows = list(range(number * copies, (number + count) * copies))
        samples = sample_responses(trained.policy, chunk, sampling, "label", rows=rows)
        raw_scores = (score_responses(reward, samples).double() * scale).tolist()
        for start in range(0, len(rows), copies):
            pairs = []
            for i in range(start, start + copies, 2):
                responses = samples.responses[i:i + 2]
                if is_usable(*responses):
                    probability = sigmoid(raw_scores[i] - raw_scores[i + 1])
                    pairs.append(Pair(number, samples.prompts[i], responses, probability))
            skipped = 0 if pairs else skipped + 1
            if skipped == MAX_SKIPPED:
                raise UserError(f"for {skipped} prompts in a row, the policy's samples were equal "
                                "or empty; raise --temperature")
            if pairs:
                yield min(pairs, key=lambda pair: abs(pair.probability - 0.5))
            number += 1


def is_usable(a: str, b: str) -> bool:
    """Whether training can use this pair: different, not blank, and without NUL characters."""
    return a.strip() != b.strip() and all(text.strip() and "\0" not in text for text in (a, b))


def sigmoid(x: float) -> float:
    return 0.5 + 0.5 * math.tanh(x / 2)  # cannot overflow


# ---- answers -------------------------------------------------------------------------------------


def ask_program(function: Callable, labels: LabelFile, pairs: Iterator[Pair],
                config: LabelConfig) -> None:
    """Draw each answer with the probability that the function returns. Raises UserError."""
    progress = Progress("answer", config.count, len(labels.rows))
    name = f"--judge {config.judge}"
    while len(labels.rows) < config.count:
        pair = next(pairs)
        prompt = without_marks(pair.prompt)
        probability = call_users_function(name, function, prompt, *pair.responses)
        if not call_users_function(name, is_answer, probability):
            raise UserError(f"{name} returned {probability!r}; "
                            "it must be a probability, or None to skip the pair")
        drawn = random.Random(derive_seed(config.seed, "judge", pair.number)).random()
        if probability is None:
            labels.add(pair, "skip")
        else:
            labels.add(pair, "left" if drawn < probability else "right")
        progress.show(len(labels.rows), "")


def is_answer(probability) -> bool:
    return probability is None or bool(0.0 <= probability <= 1.0)


def ask_person(labels: LabelFile, pairs: Iterator[Pair], config: LabelConfig) -> None:
    """Show a pair and read a key, until q or --count.

    Raises OSError if an answer could not be written.
    """
    fd = sys.stdin.fileno()
    todo: list[Pair] = []  # pairs to show before new ones, the next one at the end
    note = ""
    with raw_keys(fd):
        while not config.count or len(labels.rows) < config.count:
            todo = todo or [next(pairs)]
            termios.tcflush(fd, termios.TCIFLUSH)  # drop keys pressed before the pair is shown
            show(todo[-1], labels, note)
            action = KEYS.get(read_key(fd).lower(), "")
            note = ""
            if action == "quit":
                return
            if action == "undo":
                pair = labels.undo()
                todo += [pair] if pair else []
                note = "undone" if pair else "there is nothing to undo"
            elif action:
                labels.add(todo.pop(), action)
            else:
                note = "unknown key"


def show(pair: Pair, labels: LabelFile, note: str) -> None:
    """Print one screen at the terminal's current width."""
    width = shutil.get_terminal_size().columns
    clear = "\x1b[H\x1b[2J" if can_redraw() else ""
    left, right = (response.strip() for response in pair.responses)
    # no line break inside an entry
    keys = "   ".join(entry.replace(" ", "\u00a0") for entry in HELP)
    prompt = without_marks(pair.prompt).strip("\n")
    lines = [*wrap(labels.summary(), width), "─" * width, *wrap(prompt, width), ""]
    lines += [*side_by_side(("1 left", left), ("2 right", right), width), "", *wrap(keys, width)]
    lines += [note] if note else []
    sys.stdout.write(clear + "\n".join(lines) + "\n")
    sys.stdout.flush()


def next_command(trained: Trained, path: Path) -> str:
    """The command that trains the reward model on these answers, with the run's task settings."""
    earlier = trained.reward_config
    default = RewardConfig()
    earlier_model = str(Path(trained.config.reward_run) / "reward.pt")
    words = ["python", "train_reward.py", "--init-reward", earlier_model, "--data", str(path)]
    for name in ("tokenizer", "max_prompt_length", "max_response_length"):
        value = getattr(earlier, name)
        if value != getattr(default, name):
            words += [flag(name), str(value)]
    for name in ("heldout_data", "test_data"):
        files = getattr(earlier, name) or (() if earlier.data else HELPDESK_FILES[name])
        words += [flag(name), *files] if files else []
    words += ["--task", earlier.task] if earlier.task != "none" else []
    return shell_command(words)


if __name__ == "__main__":
    run_script(main, LabelConfig)
