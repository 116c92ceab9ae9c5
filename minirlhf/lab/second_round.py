"""What does a second round of labels add? `python -m minirlhf.lab.second_round --run runs/NAME`

    first round's policy -> pairs of its own samples, labelled by the task's annotator -> the reward model, trained on
        -> a policy, trained from the same base model with the same settings -> gold utility and the probe table

The control gets as many new labels, but on pairs of the base model's samples: what more of the old data would do. The new
policies start from the base model, not from the first policy: they see no more updates than that one did. Every piece is a
file or a run folder under --out, and what is finished there is used again: the experiment can be stopped and gone on with.
"""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import train_policy
import train_reward
from minirlhf.checkpoint import load_model, write_atomically
from minirlhf.config import DEVICES, RewardConfig, UserError, run_script
from minirlhf.data import encode_preferences, encode_prompts, unique_prompts
from minirlhf.device import pick_device
from minirlhf.environment import Prompts
from minirlhf.evaluate import evaluate_reward_model, probe_table
from minirlhf.flags import check_ranges, setting
from minirlhf.log import rounded
from minirlhf.records import PreferencePair
from minirlhf.seeding import derive_seed
from minirlhf.task import HELPDESK, Splits, file_hashes, load_splits
from minirlhf.tokenizer import fingerprint
from minirlhf.tools.label import LabelConfig, ask_program, fresh_pairs, training_prompts
from minirlhf.tools.labels import LabelFile
from minirlhf.tools.trained import Trained, identity, load_trained

ARMS = {"base pairs": "the base model's pairs", "own pairs": "the policy's own pairs",
        "unsure pairs": "the policy's own pairs, those on which the reward model is least sure"}
POLICY_FIGURES = ("sampled_gold", "sampled_gold_se", "sampled_kl", "sampled_score", "greedy_gold", "sampled_gap_closed")


@dataclasses.dataclass(frozen=True)
class RoundConfig:
    """A second round of labels, reward model and policy, against a control, with the task's annotator for a person."""

    run: str = setting("", "folder of the first round's policy")
    out: str = setting("runs/second-round", "folder of everything that this makes")
    labels: int = setting(4000, "new answers per arm; a person gives some hundreds an hour", 1)
    replay: int = setting(4, "pairs of the first round's data learnt again per new answer, lest the rest be forgotten", 0)
    epochs: int = setting(1, "passes of the reward model over its data", 1)
    lr: float = setting(5e-4, "peak Adam step of the reward model, half of the first round's", 0)
    test_pairs: int = setting(1000, "pairs of the first policy's samples on test prompts, for the accuracy on its own pairs", 1)
    seed: int = setting(0, "of the new pairs and their labels; training keeps the first round's seeds", 0)
    quick: bool = setting(False, "a few labels, steps and prompts: to see it run, not to learn from it")
    device: str = setting("auto", "auto takes cuda when there is one, else cpu", choices=DEVICES)


def main(config: RoundConfig) -> dict:
    """Run, or go on with, all arms; returns and writes the figures of each. Raises UserError."""
    check_ranges(config)
    if config.quick:
        config = dataclasses.replace(config, labels=min(config.labels, 40), test_pairs=min(config.test_pairs, 40))
    first, folder = load_trained(config.run, pick_device(config.device)), Path(config.out)
    if not hasattr(first.task, "preference_probability"):
        raise UserError(f"{config.run}: its task has no annotator (preference_probability); label by hand: minirlhf.tools.label")
    folder.mkdir(parents=True, exist_ok=True)
    splits = load_splits(first.reward_config)
    own_test = own_test_pairs(first, unique_prompts(splits.test), config)
    figures = {"round 1": judged(Path(first.config.reward_run), first.folder, first, splits, own_test)}
    replayed = write_replay(folder / "replay.jsonl", splits.train, config) if config.replay else None
    for arm in ARMS:
        name = arm.replace(" ", "-")
        answers = write_answers(first, arm, folder / f"{name}.jsonl", config)
        data = (str(answers), *([str(replayed)] if replayed else []))
        reward_run = finished(train_reward.main, second_reward(first, data, folder / f"reward-{name}", config), "reward.pt")
        policy = second_policy(first, reward_run, folder / f"policy-{name}", config)
        policy_run = finished(train_policy.main, policy, "result.json")
        figures[f"{config.labels} {arm}"] = judged(reward_run, policy_run, first, splits, own_test)
        write_atomically(folder / "second_round.json", (json.dumps(figures, indent=1) + "\n").encode())
    table = as_table(figures)
    write_atomically(folder / "second_round.md", table.encode())
    print(f"\n{table}\nsaved {folder / 'second_round.md'} and second_round.json")
    return figures


def own_test_pairs(first: Trained, prompts: list[str], config: RoundConfig) -> list[PreferencePair]:
    """Pairs of the first policy's samples on test prompts, each labelled once by the annotator."""
    ids, _ = encode_prompts(prompts, first.encoding, first.reward_config.max_prompt_length)
    # a judge's name makes the pairs come in batches; the answers are drawn here
    pairs = fresh_pairs(first, Prompts(prompts, ids), 0, LabelConfig(judge="annotator", seed=config.seed + 1))
    random_, found = random.Random(derive_seed(config.seed, "own test pairs")), []
    for _ in range(config.test_pairs):
        pair = next(pairs)
        a, b = pair.responses
        left = random_.random() < first.task.preference_probability(pair.prompt, a, b)
        found.append(PreferencePair(pair.prompt, *((a, b) if left else (b, a))))
    return found


def write_answers(first: Trained, arm: str, path: Path, config: RoundConfig) -> Path:
    """The annotator's answers of one arm, gone on with where they stopped."""
    print(f"\n=== {config.labels} labels on {ARMS[arm]}: {path}")
    settings = LabelConfig(judge=f"{first.task.__name__}:preference_probability", count=config.labels, seed=config.seed,
                           pick="uncertain" if arm == "unsure pairs" else "next")
    asked = first._replace(policy=first.base) if arm == "base pairs" else first
    labels = LabelFile(path, identity(first), config.run)
    try:
        ask_program(first.task.preference_probability, labels,
                    fresh_pairs(asked, training_prompts(first), labels.next_number(), settings), settings)
        print(labels.summary())
    finally:
        labels.lock.close()
    return path


def first_data(first: Trained) -> dict[str, tuple[str, ...]]:
    """The files that the first round learnt from and was measured on."""
    old = first.reward_config
    if not old.data:
        return dict(data=(HELPDESK["train"],), heldout_data=(HELPDESK["heldout"],), test_data=(HELPDESK["test"],))
    return dict(data=old.data, heldout_data=old.heldout_data, test_data=old.test_data)


def write_replay(path: Path, pairs: list[PreferencePair], config: RoundConfig) -> Path:
    """A sample of the first round's data, the same for every arm: prompts at random with all their pairs."""
    groups = [list(group) for _, group in itertools.groupby(pairs, key=lambda pair: pair.prompt)]
    random.Random(derive_seed(config.seed, "replay")).shuffle(groups)
    lines, wanted = [], config.replay * config.labels
    while groups and len(lines) < wanted:
        lines += [json.dumps(dict(prompt=pair.prompt, chosen=pair.chosen, rejected=pair.rejected, margin=pair.margin,
                                  weight=pair.weight)) + "\n" for pair in groups.pop()]
    write_atomically(path, "".join(lines).encode())
    return path


def second_reward(first: Trained, data: tuple[str, ...], out: Path, config: RoundConfig) -> RewardConfig:
    changes = dict(first_data(first), data=data, init="", task=first.task.__name__,
                   init_reward=str(Path(first.config.reward_run) / "reward.pt"), out=str(out), epochs=config.epochs, lr=config.lr,
                   device=config.device)
    return dataclasses.replace(first.reward_config, **changes)


def second_policy(first: Trained, reward_run: Path, out: Path, config: RoundConfig):
    prompts = first.config.prompts or first_data(first)["data"][0]
    changes = dict(reward_run=str(reward_run), prompts=prompts, out=str(out), device=config.device, resume=False)
    if config.quick:
        changes |= dict(iterations=2, eval_prompts=16, test_prompts=16, best_of_n=0)
    return dataclasses.replace(first.config, **changes)


def finished(main, config, product: str) -> Path:
    """The run's folder, after running it or going on with it unless its last file is there."""
    folder = Path(config.out)
    print(f"\n=== {folder}" + (": finished before" if (folder / product).exists() else ""))
    if not (folder / product).exists():
        main(dataclasses.replace(config, resume=(folder / "config.json").exists()))
    return folder


def judged(reward_run: Path, policy_run: Path, first: Trained, splits: Splits, own_test: list[PreferencePair]) -> dict:
    """The figures of one column: what its reward model understands, and what its policy is worth."""
    model, _ = load_model(reward_run / "reward.pt", "reward", fingerprint(first.encoding))
    model.to(first.device)
    lengths, row = (first.reward_config.max_prompt_length, first.reward_config.max_response_length), {}
    for prefix, pairs in (("", splits.test), ("own_", own_test)):
        groups, _ = encode_preferences(pairs, first.encoding, *lengths)
        found = evaluate_reward_model(model, groups, first.encoding, first.task, first.device)
        row |= {prefix + key: value for key, value in found.items()}
    probes = {}
    if hasattr(first.task, "probes"):
        table = probe_table(model, unique_prompts(splits.test)[:256], first.encoding, first.task, *lengths, first.device)
        probes = {name: share for name, (share, _) in table.items()}
    result = json.loads((policy_run / "result.json").read_text(encoding="utf-8"))
    policy = {key: result[key] for key in POLICY_FIGURES if key in result}
    files = file_hashes([reward_run / "reward.pt", policy_run / "policy.pt"])
    return dict(reward=rounded(row), probes=rounded(probes), policy=policy, files=files)


def as_table(figures: dict[str, dict]) -> str:
    """Markdown: a column for each arm."""
    lines = ["| | " + " | ".join(figures) + " |", "|---|" + "---|" * len(figures)]

    def add(name: str, cell) -> None:
        lines.append(f"| {name} | " + " | ".join(cell(column) for column in figures.values()) + " |")

    def accuracy(prefix: str):
        return lambda c: (f"{c['reward'][prefix + 'accuracy']:.3f} [{c['reward'][prefix + 'accuracy_low']:.3f}, "
                          f"{c['reward'][prefix + 'accuracy_high']:.3f}]")

    add("accuracy on test pairs", accuracy(""))
    add("accuracy on the first policy's own pairs", accuracy("own_"))
    add("of which the truth would reach", lambda c: f"{c['reward']['own_ceiling']:.3f}")
    add("correlation of scores with gold, own pairs", lambda c: f"{c['reward']['own_gold_correlation']:.2f}")
    for name in next(iter(figures.values()))["probes"]:
        add(f"probe: {name}", lambda c, name=name: f"{c['probes'][name]:.0%}")
    add("policy: gold, sampled ± s.e.", lambda c: f"{c['policy']['sampled_gold']:+.2f} ± {c['policy']['sampled_gold_se']:.2f}")
    add("policy: gold, greedy", lambda c: f"{c['policy']['greedy_gold']:+.2f}")
    add("policy: KL, nats", lambda c: f"{c['policy']['sampled_kl']:.1f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main, RoundConfig)
