"""What does a second round of labels add? `python -m minirlhf.lab.second_round --run runs/NAME`

    samples of the first round's policy -> pairs, labeled by the task's annotator -> the reward
    model, trained further -> a new policy, with the same base model and settings as the first
    -> gold utility and probes

The control gets equally many new labels, but on pairs of the base model's samples: the effect of
more data of the old kind. The new policies start from the base model, not from the first policy,
so they get no more updates than the first. All results are files and run folders under --out.
Finished ones are kept, so the experiment can be stopped and resumed.
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import train_policy
import train_reward
from minirlhf.config import DEVICES, TASK_AGAIN, PolicyConfig, RewardConfig
from minirlhf.data.batches import encode_preferences
from minirlhf.data.preference_files import PreferencePair
from minirlhf.data.prompts import encode_prompts, unique_prompts
from minirlhf.data.splits import HELPDESK_FILES, Splits, file_hash
from minirlhf.data.tokenizer import fingerprint
from minirlhf.evaluation.reward_model import evaluate_probes, evaluate_reward_model
from minirlhf.lab.common import lab_folder, markdown_table
from minirlhf.model.loading import load_model
from minirlhf.run.command_line import check_ranges, run_script, setting
from minirlhf.run.device import pick_device
from minirlhf.run.errors import UserError
from minirlhf.run.files import read_file, write_atomically
from minirlhf.run.metrics import rounded
from minirlhf.run.seeding import derive_seed
from minirlhf.run.terminal import echo
from minirlhf.tools.label import LabelConfig, ask_program, fresh_pairs, training_prompts
from minirlhf.tools.labels import LabelFile
from minirlhf.tools.trained import Trained, identity, load_trained, training_splits

ARMS = {"base pairs": "the base model's pairs", "own pairs": "the policy's own pairs",
        "unsure pairs": "the policy's own pairs on which the reward model is least sure"}
POLICY_METRICS = ("sampled_gold", "sampled_gold_se", "sampled_kl", "sampled_score", "greedy_gold",
                  "sampled_gap_closed")


@dataclasses.dataclass(frozen=True)
class RoundConfig:
    """A second round of labels by the task's annotator, reward model and policy, with a control."""

    run: str = setting("", "folder of the first round's policy")
    task: str = setting("", TASK_AGAIN)
    out: str = setting("runs/second-round", "folder of all results")
    labels: int = setting(
        4000, "new labels in each arm; a person gives a few hundred in an hour", 1)
    replay: int = setting(
        4, "pairs of the first round's data for each new label, so that the reward model does not "
           "forget them", 0)
    epochs: int = setting(1, "passes of the reward model over its data", 1)
    lr: float = setting(
        5e-4, "peak learning rate of the reward model, half of the first round's", 0)
    test_pairs: int = setting(
        1000, "pairs of the first policy's samples on test prompts, to measure accuracy on", 1)
    seed: int = setting(0, "of new pairs and labels; training keeps the first round's seeds", 0)
    quick: bool = setting(False, "few labels, steps and prompts: only shows that it runs")
    device: str = setting("auto", "auto: cuda if there is one, otherwise cpu", choices=DEVICES)


def main(config: RoundConfig) -> dict:
    """Run or resume all arms; writes and returns the metrics of each. Raises UserError."""
    check_ranges(config)
    if config.quick:
        config = dataclasses.replace(config, labels=min(config.labels, 40),
                                     test_pairs=min(config.test_pairs, 40))
    first = load_trained(config.run, pick_device(config.device), config.task)
    if not hasattr(first.ground_truth, "preference_probability"):
        raise UserError(f"{config.run}: its task has no annotator (preference_probability); "
                        "label by hand: python -m minirlhf.tools.label")
    folder = lab_folder(config.out)
    splits = training_splits(first)
    own_test = own_test_pairs(first, unique_prompts(splits.test), config)
    first_reward_run = Path(first.config.reward_run)
    results = {"round 1": evaluate(first_reward_run, first.folder, first, splits, own_test)}
    replay = []
    if config.replay:
        replay = [str(write_replay(folder / "replay.jsonl", splits.train, config))]
    for arm in ARMS:
        name = arm.replace(" ", "-")
        labels = write_labels(first, arm, folder / f"{name}.jsonl", config)
        reward = second_reward(first, (str(labels), *replay), folder / f"reward-{name}", config)
        reward_run = run_once(train_reward.main, reward, "reward.pt")
        policy = second_policy(first, reward_run, folder / f"policy-{name}", config)
        policy_run = run_once(train_policy.main, policy, "result.json")
        results[f"{config.labels} {arm}"] = evaluate(reward_run, policy_run, first, splits,
                                                     own_test)
        content = json.dumps(results, indent=1) + "\n"
        write_atomically(folder / "second_round.json", content.encode())
    table = as_table(results)
    write_atomically(folder / "second_round.md", table.encode())
    echo(f"\n{table}\nsaved {folder / 'second_round.md'} and second_round.json")
    return results


# ---- labels --------------------------------------------------------------------------------------


def own_test_pairs(first: Trained, texts: list[str], config: RoundConfig) -> list[PreferencePair]:
    """Pairs of the first policy's samples on these prompts, each labeled once by the annotator."""
    prompts = encode_prompts(texts, first.encoding, first.reward_config.max_prompt_length)
    prompts = prompts._replace(texts=texts)  # with the marks of special tokens
    # a name of a function makes fresh_pairs sample in batches; the labels are drawn below
    settings = LabelConfig(judge="annotator", seed=config.seed + 1)
    pairs = fresh_pairs(first, prompts, 0, settings)
    draws = random.Random(derive_seed(config.seed, "own test pairs"))
    labeled = []
    for pair in itertools.islice(pairs, config.test_pairs):
        left, right = pair.responses
        probability = first.ground_truth.preference_probability(pair.prompt, left, right)
        if draws.random() < probability:
            labeled.append(PreferencePair(pair.prompt, left, right))
        else:
            labeled.append(PreferencePair(pair.prompt, right, left))
    return labeled


def write_labels(first: Trained, arm: str, path: Path, config: RoundConfig) -> Path:
    """The annotator's labels of one arm, added to those that the file has."""
    echo(f"\n=== {config.labels} labels on {ARMS[arm]}: {path}")
    annotator = first.ground_truth.preference_probability
    settings = LabelConfig(judge=f"{first.reward_config.task}:preference_probability",
                           count=config.labels, seed=config.seed,
                           pick="uncertain" if arm == "unsure pairs" else "next")
    sampled = first._replace(policy=first.base) if arm == "base pairs" else first
    labels = LabelFile(path, identity(first), config.run)
    try:
        pairs = fresh_pairs(sampled, training_prompts(first), labels.next_number(), settings)
        ask_program(annotator, labels, pairs, settings)
        echo(labels.summary())
    finally:
        labels.lock.close()
    return path


def write_replay(path: Path, pairs: list[PreferencePair], config: RoundConfig) -> Path:
    """Random prompts of the first round with all their pairs, the same for every arm."""
    groups = [list(group) for _, group in itertools.groupby(pairs, key=lambda pair: pair.prompt)]
    random.Random(derive_seed(config.seed, "replay")).shuffle(groups)
    lines: list[str] = []
    while groups and len(lines) < config.replay * config.labels:
        lines += [json.dumps(dict(prompt=pair.prompt, chosen=pair.chosen, rejected=pair.rejected,
                                  margin=pair.margin, weight=pair.weight)) + "\n"
                  for pair in groups.pop()]
    write_atomically(path, "".join(lines).encode())
    return path


# ---- runs ----------------------------------------------------------------------------------------


def first_data(first: Trained) -> dict[str, tuple[str, ...]]:
    """The data files of the first round."""
    old = first.reward_config
    if old.data:
        return dict(data=old.data, heldout_data=old.heldout_data, test_data=old.test_data)
    return HELPDESK_FILES


def second_reward(first: Trained, data: tuple[str, ...], out: Path,
                  config: RoundConfig) -> RewardConfig:
    """The first round's settings, but starting from its reward model, on these data files."""
    earlier = Path(first.config.reward_run) / "reward.pt"
    files = first_data(first) | dict(data=data)
    # the sizes are those of the earlier model
    sizes = {name: getattr(RewardConfig, name) for name in ("n_layer", "n_head", "d_model")}
    return dataclasses.replace(first.reward_config, **files, **sizes, init="",
                               init_reward=str(earlier), out=str(out),
                               task=config.task or first.reward_config.task,
                               epochs=config.epochs, lr=config.lr, device=config.device)


def second_policy(first: Trained, reward_run: Path, out: Path,
                  config: RoundConfig) -> PolicyConfig:
    """The first round's settings, with the new reward model and the same prompts."""
    prompts = first.config.prompts or first_data(first)["data"][0]
    policy = dataclasses.replace(first.config, reward_run=str(reward_run), prompts=prompts,
                                 task=config.task, reward="", out=str(out), device=config.device,
                                 resume=False)
    if config.quick:
        policy = dataclasses.replace(policy, iterations=2, eval_prompts=16, test_prompts=16,
                                     best_of_n=0)
    return policy


def run_once(main: Callable, config: RewardConfig | PolicyConfig, last_file: str) -> Path:
    """The run's folder; runs or resumes it unless its last file exists."""
    folder = Path(config.out)
    is_finished = (folder / last_file).exists()
    echo(f"\n=== {folder}" + (": already finished" if is_finished else ""))
    if not is_finished:
        main(dataclasses.replace(config, resume=(folder / "config.json").exists()))
    return folder


# ---- results -------------------------------------------------------------------------------------


def evaluate(reward_run: Path, policy_run: Path, first: Trained, splits: Splits,
             own_test: list[PreferencePair]) -> dict:
    """The metrics of one column: of its reward model, and of its policy."""
    model, _ = load_model(reward_run / "reward.pt", "reward", fingerprint(first.encoding))
    model.to(first.device)
    prompt_length = first.reward_config.max_prompt_length
    response_length = first.reward_config.max_response_length
    reward = {}
    for prefix, pairs in (("", splits.test), ("own_", own_test)):
        groups, _ = encode_preferences(pairs, first.encoding, prompt_length, response_length)
        metrics = evaluate_reward_model(model, groups, first.encoding, first.ground_truth)
        reward |= {prefix + key: value for key, value in metrics.items()}
    shares = evaluate_probes(model, unique_prompts(splits.test)[:256], first.encoding,
                             first.ground_truth, prompt_length, response_length)
    probes = {name: share for name, (share, _) in shares.items()}
    result = json.loads(read_file(policy_run / "result.json"))
    policy = {key: result[key] for key in POLICY_METRICS if key in result}
    files = {str(path): file_hash(path)
             for path in (reward_run / "reward.pt", policy_run / "policy.pt")}
    return dict(reward=rounded(reward), probes=rounded(probes), policy=policy, files=files)


def as_table(results: dict[str, dict]) -> str:
    """Markdown: a column for each arm."""
    columns = list(results.values())
    lines = []

    def add(name: str, cell: Callable[[dict], str]) -> None:
        lines.append([name, *map(cell, columns)])

    def accuracy(prefix: str) -> Callable[[dict], str]:
        mean, low, high = (f"{prefix}accuracy{end}" for end in ("", "_low", "_high"))
        return lambda c: (f"{c['reward'][mean]:.3f} [{c['reward'][low]:.3f}, "
                          f"{c['reward'][high]:.3f}]")

    add("accuracy on test pairs", accuracy(""))
    add("accuracy on the first policy's own pairs", accuracy("own_"))
    add("ceiling of accuracy on own pairs", lambda c: f"{c['reward']['own_ceiling']:.3f}")
    add("correlation of scores with gold, own pairs",
        lambda c: f"{c['reward']['own_gold_correlation']:.2f}")
    for probe in columns[0]["probes"]:
        add(f"probe: {probe}", lambda c, probe=probe: f"{c['probes'][probe]:.0%}")
    add("policy: gold, sampled ± s.e.",
        lambda c: f"{c['policy']['sampled_gold']:+.2f} ± {c['policy']['sampled_gold_se']:.2f}")
    add("policy: gold, greedy", lambda c: f"{c['policy']['greedy_gold']:+.2f}")
    add("policy: KL, nats", lambda c: f"{c['policy']['sampled_kl']:.1f}")
    return markdown_table(["", *results], lines) + "\n"


if __name__ == "__main__":
    run_script(main, RoundConfig)
