"""Compare algorithms and settings over several seeds. `python -m minirlhf.lab.sweep --help`

    python -m minirlhf.lab.sweep --algorithms ppo,rloo --seeds 5 --set kl_coef=0.01,0.025,0.05

Every combination of an algorithm and of the values after --set is a setting. Seed s varies
everything: the reward run is `train_reward.py --seed s` (base model, order of the data, reward
model), and each policy is `train_policy.py --seed s` with that reward run.

    OUT/runs.jsonl   one line per finished run: settings, command, final metrics, held-out curve
    OUT/table.md     mean and 95% interval over seeds of each setting
    OUT/Y-X.png      metric Y against X with error bars; other axes need no new runs
    OUT/reward-*/, OUT/ALGORITHM-*/  the run folders

A run in runs.jsonl is not repeated, even if its folder is gone. A stopped run resumes. More seeds,
values or algorithms can be added later to the same folder.
"""

import dataclasses
import functools
import itertools
import json
import os
import shlex
import typing
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.lab.common import (
    STYLES,
    Job,
    Rows,
    flags_of,
    markdown_table,
    mean_interval,
    read_rows,
    run_jobs,
    run_lab,
    save_picture,
    train_subset,
)
from minirlhf.rl.algorithms import ALGORITHMS
from minirlhf.run.checkpoint import write_atomically
from minirlhf.run.command_line import check_ranges, setting
from minirlhf.run.errors import UserError, suggest

OWN_FIELDS = ("algorithm", "out", "resume", "reward_run", "seed")  # the sweep sets these
ONE_TASK = ("data", "heldout_data", "test_data", "task", "tokenizer")  # one value per sweep
CURVES = ("samples", "seconds")  # as --x: the held-out curve, not the final value
COLUMNS = (("gold, sampled", "sampled_gold", "{:+.2f}"), ("wins", "sampled_win_rate", "{:.1%}"),
           ("score", "sampled_score", "{:+.2f}"), ("KL, nats", "sampled_kl", "{:.1f}"),
           ("gold, greedy", "greedy_gold", "{:+.2f}"), ("length", "sampled_length", "{:.0f}"),
           ("seconds", "seconds", "{:.0f}"))
NOTES = """Test prompts. Mean ± half of the 95% interval over seeds (Student's t). Wins: against \
the base model at the same decoding, by gold utility or, without one, by score. Seconds: training \
without evaluation, one thread."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Compare algorithms and settings over several seeds: a table and a plot with error bars."""

    out: str = setting("runs/sweep", "folder of all runs, runs.jsonl, table.md and plots")
    algorithms: str = setting("ppo", "algorithms, separated by commas")
    seeds: int = setting(3, "seeds 0 to N - 1; fewer than three do not show the spread", 1)
    set: tuple[str, ...] = setting(
        (), "KEY=VALUE,VALUE of train_policy.py, such as kl_coef=0.01,0.05; reward.KEY for "
            "train_reward.py; ALGORITHM:KEY for one algorithm only; one value: no comparison")
    script: str = setting(
        "train_policy.py", "or a file of your own that adds rows to ALGORITHMS and calls its main")
    jobs: int = setting(0, "runs at a time, one thread each; 0: one per core", 0)
    x: str = setting("samples", "samples, seconds (curves), a swept setting, or any metric")
    y: str = setting("sampled_gold", "any metric of result.json")
    best: str = setting(
        "", "show only each algorithm's best setting by the mean of this metric, such as "
            "heldout_sampled_gold")
    quick: bool = setting(False, "tiny models and few samples: only shows that it runs")

    def check(self) -> None:
        check_ranges(self)
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise UserError(f"--out {self.out}: is a file; name a folder")
        if not Path(self.script).is_file() and self.script != "train_policy.py":
            raise UserError(f"--script {self.script}: no such file")
        for name in self.algorithms.split(","):
            if name not in ALGORITHMS and self.script == "train_policy.py":
                raise UserError(f"--algorithms: {name!r} is not known{suggest(name, ALGORITHMS)}; "
                                "an algorithm of your own needs --script")


class Setting(NamedTuple):
    """One combination of an algorithm and values."""

    algorithm: str
    policy: dict[str, Any]
    reward: dict[str, Any]
    varied: dict[str, Any]  # those of several values, for labels

    @property
    def label(self) -> str:
        return " ".join([self.algorithm, *(f"{key}={self.varied[key]}" for key in self.varied)])


# ---- settings ------------------------------------------------------------------------------------


def read_values(text: str) -> tuple[str, str, list]:
    """(algorithm or "", key, values) of one --set. Raises UserError."""
    target, equals, values = text.partition("=")
    algorithm, _, key = target.rpartition(":")
    config_class = RewardConfig if key.startswith("reward.") else PolicyConfig
    field = key.removeprefix("reward.")
    types = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    if not equals or not values:
        raise UserError(f"--set {text}: write KEY=VALUE or KEY=VALUE,VALUE")
    if field not in names or field in OWN_FIELDS:
        raise UserError(f"--set {text}: {field!r} is not a setting{suggest(field, names)}")
    return algorithm, key, [convert(types[field], value, text) for value in values.split(",")]


def convert(kind: Any, value: str, text: str) -> Any:
    """The value of one setting. Raises UserError."""
    if typing.get_origin(kind) is tuple:
        return (value,)
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise UserError(f"--set {text}: {value!r} must be true or false")
        return value.lower() == "true"
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"--set {text}: {value!r} is not of type {kind.__name__}") from None


def settings_of(config: SweepConfig) -> list[Setting]:
    """All combinations, in the order of the command line. Raises UserError."""
    grid = [read_values(text) for text in config.set]
    settings = []
    for name in dict.fromkeys(config.algorithms.split(",")):
        mine = {key: values for algorithm, key, values in grid if algorithm in ("", name)}
        for key, values in mine.items():
            if len(values) > 1 and key.removeprefix("reward.") in ONE_TASK:
                raise UserError(f"--set {key}: runs of different tasks are not comparable; "
                                "use one value, and another --out for the other task")
        for values in itertools.product(*mine.values()):
            chosen = dict(zip(mine, values))
            reward = {key.removeprefix("reward."): value for key, value in chosen.items()
                      if key.startswith("reward.")}
            policy = {key: value for key, value in chosen.items() if not key.startswith("reward.")}
            varied = {key: value for key, value in chosen.items() if len(mine[key]) > 1}
            settings.append(Setting(name, policy, reward, varied))
    return settings


def folder_name(start: str, changes: dict[str, Any], seed: int) -> str:
    """
    >>> folder_name("ppo", {"kl_coef": 0.05, "task": "my.task"}, 1)
    'ppo-kl_coef=0.05-task=my.task-seed1'
    """
    parts = [f"{key}={value}".replace("/", "_") for key, value in changes.items()]
    return "-".join([start, *parts, f"seed{seed}"])


# ---- runs ----------------------------------------------------------------------------------------


def jobs_of(config: SweepConfig, chosen: Setting, seed: int) -> tuple[Job, Job]:
    """(the reward run, the policy run)."""
    folder = Path(config.out)
    reward, policy = RewardConfig(), PolicyConfig(best_of_n=0)
    if config.quick:
        folder.mkdir(parents=True, exist_ok=True)
        data = (train_subset(folder, 48),)
        reward = RewardConfig(data=data, heldout_data=data, test_data=data,
                              task="minirlhf.data.helpdesk", n_layer=1, d_model=32,
                              sft_sequences=512, normalize_prompts=16, max_response_length=24)
        policy = PolicyConfig(iterations=2, batch_size=8, minibatch_size=4, eval_prompts=4,
                              test_prompts=8, best_of_n=0)
    reward_out = str(folder / folder_name("reward", chosen.reward, seed))
    policy_out = str(folder / folder_name(chosen.algorithm, chosen.policy | chosen.reward, seed))
    reward = dataclasses.replace(reward, **chosen.reward, seed=seed, out=reward_out)
    policy = dataclasses.replace(policy, **chosen.policy, algorithm=chosen.algorithm, seed=seed,
                                 reward_run=reward_out, out=policy_out)
    script = config.script
    if script != "train_policy.py":
        script = str(Path(script).resolve())
    return Job("train_reward.py", reward), Job(script, policy, reward_out)


def describe_run(job: Job, chosen: Setting) -> dict:
    """One line of runs.jsonl. Raises UserError if the run left no metrics."""
    path = job.folder / "result.json"
    rows = read_rows(job.folder / "policy_metrics.jsonl")
    evaluations = [row for row in rows if any(key.startswith("eval_") for key in row)]
    if not path.exists() or not evaluations:
        raise UserError(f"{job.folder}: has no result.json or no evaluation in "
                        "policy_metrics.jsonl; delete the folder and run the sweep again")
    seconds = 0.0
    samples = 0
    curve = []
    for row in rows:
        times = {key: value for key, value in row.items() if key.startswith("seconds")}
        seconds += sum(times.values()) - times.get("seconds_evaluate", 0.0)
        samples = row.get("samples", samples)
        if row in evaluations:
            metrics = {key.removeprefix("eval_"): value for key, value in row.items()
                       if key.startswith("eval_")}
            curve.append(dict(samples=samples, seconds=seconds) | metrics)
    heldout = {f"heldout_{key}": value for key, value in curve[-1].items()}
    final = json.loads(path.read_text(encoding="utf-8"))
    command = shlex.join(["python", Path(job.script).name, *flags_of(job.config)])
    return dict(algorithm=chosen.algorithm, settings=chosen.policy | chosen.reward,
                seed=job.config.seed, command=command, curve=curve,
                metrics=final | heldout | dict(samples=samples, seconds=seconds))


def run_sweep(config: SweepConfig, settings: list[Setting]) -> dict[str, list[dict]]:
    """The results of each setting, by seed; runs what is missing. Raises UserError."""
    folder = Path(config.out)
    fixed = dict(item.partition("=")[::2] for item in config.set if "," not in item)
    about = dict(script=Path(config.script).name, quick=config.quick,
                 task={key: fixed[key] for key in fixed if key.startswith("reward.")})
    rows = Rows(folder / "runs.jsonl", about)
    jobs = {}
    for chosen, seed in itertools.product(settings, range(config.seeds)):
        reward, policy = jobs_of(config, chosen, seed)
        jobs[policy.folder.name] = (reward, policy, chosen)
    missing = [pair for name, pair in jobs.items() if name not in rows.rows]
    if missing:
        rewards = {reward.folder: reward for reward, _, _ in missing}
        policies = [policy for _, policy, _ in missing]
        run_jobs([*rewards.values(), *policies], config.jobs or os.cpu_count() or 1,
                 folder / "logs")
    results: dict[str, list[dict]] = {}
    for name, (_, policy, chosen) in jobs.items():
        row = rows.get(name, functools.partial(describe_run, policy, chosen))
        results.setdefault(chosen.label, []).append(row)
    return results


# ---- table and plot ------------------------------------------------------------------------------


def metric(row: dict, name: str) -> float:
    """A final metric of a run. Raises UserError."""
    if name not in row["metrics"]:
        raise UserError(f"{name!r} is not a metric of these runs{suggest(name, row['metrics'])}")
    return row["metrics"][name]


def keep_best(results: dict[str, list[dict]], name: str) -> dict[str, list[dict]]:
    """The setting of each algorithm with the highest mean of a metric."""
    means = {label: mean_interval([metric(row, name) for row in rows])[0]
             for label, rows in results.items()}
    best: dict[str, str] = {}
    for label, rows in results.items():
        algorithm = rows[0]["algorithm"]
        if algorithm not in best or means[label] > means[best[algorithm]]:
            best[algorithm] = label
    return {label: results[label] for label in best.values()}


def result_table(results: dict[str, list[dict]]) -> str:
    first = next(iter(results.values()))[0]["metrics"]
    columns = [column for column in COLUMNS if column[1] in first]
    table = []
    for label, rows in results.items():
        cells = [show([metric(row, key) for row in rows], form) for _, key, form in columns]
        table.append([f"`{label}`", str(len(rows)), *cells])
    return markdown_table(["setting", "seeds", *(title for title, _, _ in columns)], table)


def show(values: list[float], form: str) -> str:
    """
    >>> show([1.0, 2.0, 3.0], "{:+.1f}"), show([0.5], "{:.0%}")
    ('+2.0 ± 2.5', '50%')
    """
    mean, half = mean_interval(values)
    text = form.format(mean)
    return text if len(values) == 1 else f"{text} ± {form.replace('+', '').format(half)}"


def points(results: dict[str, list[dict]], x: str, y: str) -> dict[str, list[tuple]]:
    """(mean x, half interval, mean y, half interval) of each point of each line.

    x in CURVES: one line per setting, one point per evaluation on the held-out prompts.
    x a swept setting: one line per combination of the others, one point per value of a number.
    Otherwise: one point per setting, at the end of training, on the test prompts.
    """
    lines: dict[str, list[tuple]] = {}
    setting_name = x.removeprefix("reward.")
    is_setting = any(setting_name in rows[0]["settings"] for rows in results.values())
    for label, rows in results.items():
        value = rows[0]["settings"].get(setting_name)
        if x in CURVES:
            if y not in rows[0]["curve"][-1]:
                raise UserError(f"--y {y!r} is not evaluated during training"
                                f"{suggest(y, rows[0]['curve'][-1])}")
            for evaluation in zip(*(row["curve"] for row in rows)):
                xs, ys = ([point[name] for point in evaluation] for name in (x, y))
                lines.setdefault(label, []).append((*mean_interval(xs), *mean_interval(ys)))
        elif is_setting and value is None:
            continue  # this algorithm does not have the setting
        elif is_setting:
            rest = label.replace(f" {x}={value}", "")
            ys = [metric(row, y) for row in rows]
            lines.setdefault(rest, []).append((value, 0.0, *mean_interval(ys)))
        else:
            xs, ys = ([metric(row, name) for row in rows] for name in (x, y))
            lines[label] = [(*mean_interval(xs), *mean_interval(ys))]
    return {label: sorted(line) for label, line in lines.items()}


def draw(axes, lines: dict[str, list[tuple]], x: str, y: str) -> None:
    """Error bars: 95% intervals over seeds."""
    for (label, line), (color, dash, marker) in zip(lines.items(), itertools.cycle(STYLES)):
        xs, x_bars, ys, y_bars = zip(*line)
        axes.errorbar(xs, ys, yerr=y_bars, xerr=x_bars if any(x_bars) else None, label=label,
                      color=color, linestyle=dash, marker=marker, markersize=5, linewidth=1.4,
                      capsize=2, elinewidth=0.8)
    axes.set_xlabel(AXES.get(x, x))
    axes.set_ylabel(AXES.get(y, y))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("mean and 95% interval over seeds", fontsize=9, loc="left")


AXES = {
    "samples": "samples from the policy (responses)",
    "seconds": "training time (seconds, one thread)",
    "sampled_gold": "gold utility of sampled responses (mean)",
    "greedy_gold": "gold utility of greedy responses (mean)",
    "sampled_score": "score of sampled responses (mean)",
    "sampled_kl": "KL from the base model (nats per response)",
    "kl_coef": "KL coefficient (score units per nat)",
    "lr": "learning rate",
}


def main(config: SweepConfig) -> str:
    """Run what is missing; write the table and the plot; returns the table. Raises UserError."""
    config.check()
    results = run_sweep(config, settings_of(config))
    if config.best:
        results = keep_best(results, config.best)
    lines = points(results, config.x, config.y)  # before the table: an unknown metric ends here
    folder = Path(config.out)
    page = f"{result_table(results)}\n\n{NOTES}\n"
    write_atomically(folder / "table.md", page.encode())
    print(f"\n{page}\nsaved {folder / 'table.md'} and {folder / 'runs.jsonl'}")
    save_picture(folder / f"{config.y}-{config.x}.png",
                 lambda axes: draw(axes, lines, config.x, config.y), (7.2, 4.2))
    return page


if __name__ == "__main__":
    run_lab(main, SweepConfig)
