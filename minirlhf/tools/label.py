"""Let a person compare samples of a policy. `python -m minirlhf.tools.label --run runs/NAME`

    two samples per prompt -> one key -> a line in labels.jsonl -> train_reward.py --init-reward ... --data labels.jsonl
"""

import dataclasses
import math
import random
import shlex
import shutil
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

from minirlhf.config import DEVICES, RewardConfig, UserError, run_script
from minirlhf.data import encode_prompts, unique_prompts
from minirlhf.device import pick_device
from minirlhf.environment import Prompts, model_scorer, next_prompts, sample_responses
from minirlhf.flags import check_ranges, flag, setting
from minirlhf.log import Progress
from minirlhf.records import read_prompts
from minirlhf.seeding import derive_seed
from minirlhf.task import HELPDESK, load_function, load_splits
from minirlhf.tools.labels import LabelFile, Pair
from minirlhf.tools.terminal import at_terminal, can_redraw, raw_keys, read_key, side_by_side, wrap
from minirlhf.tools.trained import Trained, identity, load_trained

KEYS = {"left": "left", "a": "left", "1": "left", "right": "right", "d": "right", "2": "right", "t": "tie", "=": "tie",
        "s": "skip", "u": "undo", "q": "quit", "": "quit", "\x04": "quit"}
HELP = "   ".join(part.replace(" ", "\u00a0") for part in (  # no line breaks between a key and what it does
    "1/a/← left is better", "2/d/→ right is better", "t tie", "s skip", "u undo", "q quit"))
ROWS = 128  # responses sampled at a time when a program judges
DULL = 200  # prompts in a row on which the policy says one thing only, after which there is nothing to ask


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Compare samples of a finished policy run, one key each, and keep the answers as preferences to learn from."""

    run: str = setting("", "folder of a finished policy run")
    out: str = setting("", "file of the answers, gone on with if it exists; empty: labels.jsonl in the run folder")
    pick: str = setting("next", "uncertain: of --candidates pairs per prompt, the one on which the reward model is least sure",
                        choices=("next", "uncertain"))
    candidates: int = setting(8, "pairs sampled per prompt for --pick uncertain", 1)
    count: int = setting(0, "stop when the file holds so many answers, skipped ones included; 0: go on until q", 0)
    judge: str = setting("", "module:function(prompt, a, b) -> probability that a is better, None to skip; in a person's place")
    temperature: float = setting(0.0, "of sampling; 0: the run's own", 0)
    max_response_length: int = setting(0, "tokens, EOS included; 0: the run's own", 0)
    seed: int = setting(0, "every random choice derives from it", 0)
    device: str = setting("auto", "auto takes cuda when there is one, else cpu", choices=DEVICES)


def main(config: LabelConfig) -> dict:
    """Ask until there is an end; returns the answers by kind. Raises UserError."""
    check_ranges(config)
    judge = load_function(config.judge, "--judge") if config.judge else None
    if judge and not config.count:
        raise UserError("--judge needs --count: a program does not get tired")
    if not judge and not at_terminal():
        raise UserError("labelling takes a terminal, and this is not one; run it in one (over ssh: ssh -t), or name a --judge")
    trained = load_trained(config.run, pick_device(config.device))
    path = Path(config.out) if config.out else trained.folder / "labels.jsonl"
    labels = LabelFile(path, identity(trained), config.run)
    if labels.mended:
        print(f"{path}: the last answer was cut short when the program ended; that pair comes again")
    pairs = fresh_pairs(trained, training_prompts(trained), labels.next_number(), config)
    try:
        if judge:
            ask_program(judge, labels, pairs, config)
        else:
            ask_person(labels, pairs, config)
    except KeyboardInterrupt:  # as good as q
        pass
    finally:  # also when the disk is full
        print(f"\n{path}: {labels.summary()}")
    if labels.rows:
        print(f"\nto learn from them:\n  {next_command(trained, path)}")
    return {answer: sum(row["answer"] == answer for row in labels.rows) for answer in ("left", "right", "tie", "skip")}


def training_prompts(trained: Trained) -> Prompts:
    """The prompts that the policy was trained on."""
    named = trained.config.prompts
    texts = read_prompts(named) if named else unique_prompts(load_splits(trained.reward_config).train)
    return Prompts(texts, encode_prompts(texts, trained.encoding, trained.reward_config.max_prompt_length)[0])


def fresh_pairs(trained: Trained, prompts: Prompts, number: int, config: LabelConfig) -> Iterator[Pair]:
    """Pairs that can be learnt from, from this number on, sampled when asked for; each a function of seed and number alone.
    Raises UserError when the policy keeps saying the same."""
    each = 2 * (config.candidates if config.pick == "uncertain" else 1)
    at_once, dull = max(1, ROWS // each) if config.judge else 1, 0
    sampling = trained.sampling(config.temperature, config.max_response_length, config.seed)
    scorer, scale = model_scorer(trained.reward_model, 0.0), float(trained.reward_model.score_scale)
    while True:
        chosen = [next_prompts(prompts, 1, each, config.seed, n) for n in range(number, number + at_once)]
        some = Prompts(*([x for part in column for x in part] for column in zip(*chosen)))
        rows = list(range(number * each, (number + at_once) * each))
        samples = sample_responses(trained.policy, *some, sampling, "label", rows=rows)
        scores = (scorer(samples).double() * scale).tolist()
        for start in range(0, len(scores), each):
            pairs = [Pair(number, samples.prompts[i], samples.responses[i:i + 2], sigmoid(scores[i] - scores[i + 1]))
                     for i in range(start, start + each, 2) if askable(*samples.responses[i:i + 2])]
            dull = 0 if pairs else dull + 1
            if dull == DULL:
                raise UserError(f"on {DULL} prompts in a row the policy said the same twice, or nothing; raise --temperature")
            if pairs:
                yield min(pairs, key=lambda pair: abs(pair.probability - 0.5))
            number += 1


def askable(a: str, b: str) -> bool:
    """Whether training takes a preference between these: it drops blank and equal responses, and refuses a NUL character."""
    return a.strip() != b.strip() and all(text.strip() and "\0" not in text for text in (a, b))


def sigmoid(x: float) -> float:
    return 0.5 + 0.5 * math.tanh(x / 2)  # cannot overflow


def ask_program(judge: Callable, labels: LabelFile, pairs: Iterator[Pair], config: LabelConfig) -> None:
    """Draw each answer with the probability that the judge states."""
    progress = Progress("answer", config.count, len(labels.rows))
    while len(labels.rows) < config.count:
        pair = next(pairs)
        try:
            probability = judge(pair.prompt, *pair.responses)
            valid = probability is None or 0.0 <= probability <= 1.0
        except Exception as error:  # whatever the user's function raises is the user's to mend
            raise UserError(f"--judge {config.judge} raised {type(error).__name__}: {error}") from None
        if not valid:
            raise UserError(f"--judge {config.judge} returned {probability!r}; it must be a probability, or None to skip")
        drawn = random.Random(derive_seed(config.seed, "judge", pair.number)).random()
        labels.add(pair, "skip" if probability is None else "left" if drawn < probability else "right")
        progress.show(len(labels.rows), "")


def ask_person(labels: LabelFile, pairs: Iterator[Pair], config: LabelConfig) -> None:
    """Show a pair, take a key, until q or --count. Raises OSError when an answer could not be written."""
    fd, todo, note = sys.stdin.fileno(), [], ""  # todo: pairs to show before fresh ones, the next at the end
    waiting, shown = False, 0  # waiting: no screen is being written; shown: the width of the last one

    def resize(*_) -> None:
        nonlocal waiting, shown
        while waiting and shown != shutil.get_terminal_size().columns:
            waiting = False
            shown = show(todo[-1], labels, note)
            waiting = True

    before = signal.signal(signal.SIGWINCH, resize)
    try:
        with raw_keys(fd):
            while not config.count or len(labels.rows) < config.count:
                todo = todo or [next(pairs)]
                termios.tcflush(fd, termios.TCIFLUSH)  # a key pressed before the pair was there is no answer to it
                shown = show(todo[-1], labels, note)
                waiting = True
                resize()  # in case that it happened before waiting was true
                action, note = KEYS.get(read_key(fd).lower(), ""), ""
                waiting = False
                if action == "quit":
                    return
                if action == "undo":
                    taken = labels.undo()
                    todo, note = [*todo, taken] if taken else todo, "taken back" if taken else "there is nothing to take back"
                elif action:
                    labels.add(todo.pop(), action)
                else:
                    note = "that key means nothing here"
    finally:
        signal.signal(signal.SIGWINCH, before)


def show(pair: Pair, labels: LabelFile, note: str) -> int:
    """One screen, as wide as the terminal is now; returns that width."""
    columns = shutil.get_terminal_size().columns
    clear = "\x1b[H\x1b[2J" if can_redraw() else ""
    status = wrap(labels.summary(), columns) + ["─" * columns]
    body = side_by_side(("1 left", pair.responses[0].strip()), ("2 right", pair.responses[1].strip()), columns)
    lines = [*status, *wrap(pair.prompt.strip("\n"), columns), "", *body, "", *wrap(HELP, columns), *([note] if note else [])]
    sys.stdout.write(clear + "\n".join(lines) + "\n")
    sys.stdout.flush()
    return columns


def next_command(trained: Trained, path: Path) -> str:
    """The command that trains the reward model on: the settings without which it would be about other data stay the same."""
    old, new = trained.reward_config, RewardConfig()
    flags = ["--init-reward", str(Path(trained.config.reward_run) / "reward.pt"), "--data", str(path)]
    for name in ("tokenizer", "max_prompt_length", "max_response_length"):
        if getattr(old, name) != getattr(new, name):
            flags += [flag(name), str(getattr(old, name))]
    heldout = old.heldout_data or (() if old.data else (HELPDESK["heldout"],))
    test = old.test_data or (() if old.data else (HELPDESK["test"],))
    for name, files in (("heldout_data", heldout), ("test_data", test)):
        flags += [flag(name), *files] if files else []
    task = "minirlhf.helpdesk" if old.task == "auto" and not old.data else old.task
    return shlex.join(["python", "train_reward.py", *flags, *(["--task", task] if task not in ("auto", "none") else [])])


if __name__ == "__main__":
    run_script(main, LabelConfig)
