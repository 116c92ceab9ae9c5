"""Compare algorithms and settings over several seeds. `python -m minirlhf.lab.sweep --help`

    python -m minirlhf.lab.sweep --algorithms ppo,rloo --seeds 5 --set kl_coef=0.01,0.025,0.05

Every combination of an algorithm and of the values after --set is a setting. Seed s varies
everything: the reward run is `train_reward.py --seed s` (base model, order of the data, reward
model), and each policy is `train_policy.py --seed s` with that reward run.

    OUT/runs.jsonl   one line per finished run: settings, command, final metrics, held-out curve
    OUT/table.md     mean and 95% interval over seeds of each setting
    OUT/Y-X.png      metric Y against X with error bars; other axes need no new runs
    OUT/Y-each.png   with --one-at-a-time: Y against each setting, one panel per setting
    OUT/reward-*/, OUT/ALGORITHM-*/  the run folders

A run in runs.jsonl is not repeated, even if its folder is gone. A stopped run resumes. More seeds,
values or algorithms can be added later to the same folder.
"""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.splits import file_hash
from minirlhf.lab.common import (
    STYLES,
    Job,
    Rows,
    command_of,
    lab_folder,
    markdown_table,
    mean_interval,
    read_rows,
    run_jobs,
    run_lab,
    save_picture,
    script_environment,
    train_subset,
)
from minirlhf.rl.algorithms import ALGORITHMS, pick_algorithm
from minirlhf.run.command_line import check_ranges, flag, parse_flags, setting
from minirlhf.run.errors import UserError, suggest
from minirlhf.run.files import read_file, write_atomically
from minirlhf.run.folder import is_users_module
from minirlhf.run.terminal import echo

OWN_FIELDS = ("algorithm", "out", "resume", "reward_run", "seed")  # the sweep sets these
ONE_TASK = ("data", "heldout_data", "test_data", "task", "tokenizer")  # one value per sweep
CURVES = ("samples", "seconds")  # as --x: the held-out curve, not the final value
COLUMNS = (("gold, sampled", "sampled_gold", "{:+.2f}"), ("wins", "sampled_win_rate", "{:.1%}"),
           ("score", "sampled_score", "{:+.2f}"), ("KL, nats", "sampled_kl", "{:.1f}"),
           ("gold, greedy", "greedy_gold", "{:+.2f}"), ("length", "sampled_length", "{:.0f}"),
           ("seconds", "seconds", "{:.0f}"))
NOTES = """Test prompts. Mean ± half of the 95% interval over seeds (Student's t). Wins: against \
the base model at the same decoding, by gold utility or, without one, by score. Seconds: training \
without evaluation, one thread. The last column is paired over seeds."""
QUICK = "a quick run: no number means anything"


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Compare algorithms and settings over several seeds: a table and a plot with error bars."""

    out: str = setting("runs/sweep", "folder of all runs, runs.jsonl, table.md and plots")
    algorithms: str = setting("ppo", "algorithms, separated by commas")
    seeds: int = setting(3, "seeds 0 to N - 1; fewer than three do not show the spread", 1, 1000)
    set: tuple[str, ...] = setting(
        (), "KEY=VALUE,VALUE of train_policy.py, such as kl_coef=0.01,0.05; reward.KEY for "
            "train_reward.py; ALGORITHM:KEY for one algorithm only; one value: no comparison")
    script: str = setting(
        "train_policy.py", "or a file of your own that adds rows to ALGORITHMS and calls its main")
    one_at_a_time: bool = setting(
        False, "vary one setting at a time, the others at their defaults; otherwise all "
               "combinations")
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
        known = [*ALGORITHMS, "dpo"]
        for name in algorithm_names(self):
            if name not in known and self.script == "train_policy.py":
                raise UserError(f"--algorithms: {name!r} is not known{suggest(name, known)}; "
                                "an algorithm of your own needs --script")


class Setting(NamedTuple):
    """One combination of an algorithm and values."""

    algorithm: str
    policy: dict[str, Any]  # without defaults, so that equal settings share their runs
    reward: dict[str, Any]
    varied: dict[str, Any]  # those of several values, for labels and axes

    @property
    def label(self) -> str:
        return " ".join([self.algorithm, *(f"{key}={self.varied[key]}" for key in self.varied)])


# ---- settings ------------------------------------------------------------------------------------


def algorithm_names(config: SweepConfig) -> list[str]:
    names = [name.strip() for name in config.algorithms.split(",")]
    return list(dict.fromkeys(filter(None, names)))


def read_values(text: str) -> tuple[str, str, list]:
    """(algorithm or "", key, values) of one --set. Raises UserError."""
    target, equals, values = text.partition("=")
    algorithm, _, key = target.rpartition(":")
    config_class = RewardConfig if key.startswith("reward.") else PolicyConfig
    field = key.removeprefix("reward.")
    names = [field.name for field in dataclasses.fields(config_class)]
    if not equals or not values:
        raise UserError(f"--set {text}: write KEY=VALUE or KEY=VALUE,VALUE")
    if field in OWN_FIELDS:
        raise UserError(f"--set {text}: the sweep sets {field!r} itself; see --algorithms, --seeds")
    if field not in names:
        raise UserError(f"--set {text}: {field!r} is not a setting{suggest(field, names)}")
    converted = [convert(config_class, field, value) for value in values.split(",")]
    if len(set(converted)) < len(converted):
        raise UserError(f"--set {text}: has a value twice; give each value once")
    return algorithm, key, converted


def convert(config_class, field: str, value: str) -> Any:
    """The value of one setting, read as the script's flag. Raises UserError."""
    words = {"true": flag(field), "false": flag(f"no_{field}")}
    word = words.get(value.lower(), f"{flag(field)}={value}")
    return parse_flags(config_class, [word])[field]


def settings_of(config: SweepConfig) -> list[Setting]:
    """All settings, in the order of the command line. Raises UserError."""
    grid = [read_values(text) for text in config.set]
    check_targets(config, [(algorithm, key) for algorithm, key, _ in grid])
    is_swept = any(key == config.x and len(values) > 1 for _, key, values in grid)
    if config.x in vars(PolicyConfig()) and not is_swept:
        raise UserError(f"--x {config.x}: has one value; add --set {config.x}=VALUE,VALUE")
    settings = []
    for name in algorithm_names(config):
        mine = {key: values for algorithm, key, values in grid if algorithm in ("", name)}
        several = [key for key, values in mine.items() if len(values) > 1]
        for key in several:
            if key.removeprefix("reward.") in ONE_TASK:
                raise UserError(f"--set {key}: runs of different tasks are not comparable; "
                                "use one value, and another --out for the other task")
        fixed = {key: values for key, values in mine.items() if key not in several}
        choices = [mine]
        if config.one_at_a_time:
            choices = [fixed | {key: mine[key]} for key in several]
        for choice in choices:
            for values in itertools.product(*choice.values()):
                settings.append(make_setting(config, name, dict(zip(choice, values)), several))
    return settings


def check_targets(config: SweepConfig, targets: list[tuple[str, str]]) -> None:
    """Raise UserError for a --set of an unknown algorithm, or two of the same setting."""
    names = algorithm_names(config)
    for algorithm, key in targets:
        if algorithm and algorithm not in names:
            raise UserError(f"--set {algorithm}:{key}: {algorithm!r} is not one of --algorithms"
                            f"{suggest(algorithm, names)}")
        if targets.count((algorithm, key)) > 1:
            raise UserError(f"--set {key}: given twice; write all values as {key}=VALUE,VALUE")


def base_configs(config: SweepConfig) -> tuple[RewardConfig, PolicyConfig]:
    """What --set changes: the defaults of the two scripts, without best of n."""
    if not config.quick:
        return RewardConfig(), PolicyConfig(best_of_n=0)
    folder = lab_folder(config.out)
    data = (train_subset(folder, 48),)
    reward = RewardConfig(data=data, heldout_data=data, test_data=data,
                          task="minirlhf.data.helpdesk", n_layer=1, d_model=32, sft_sequences=512,
                          normalize_prompts=16, max_response_length=24)
    policy = PolicyConfig(iterations=2, batch_size=8, minibatch_size=4, eval_prompts=4,
                          test_prompts=8, best_of_n=0)
    return reward, policy


def make_setting(config: SweepConfig, algorithm: str, chosen: dict[str, Any],
                 several: list[str]) -> Setting:
    reward, policy = base_configs(config)
    changes: dict[str, dict] = {"policy": {}, "reward": {}}
    for key, value in chosen.items():
        kind, field = ("reward", key[7:]) if key.startswith("reward.") else ("policy", key)
        if value != getattr(reward if kind == "reward" else policy, field):
            changes[kind][field] = value
    varied = {key: chosen[key] for key in chosen if key in several}
    try:
        dataclasses.replace(reward, **changes["reward"]).check()
        policy = dataclasses.replace(policy, **changes["policy"], algorithm=algorithm)
        policy.check()
        if algorithm in ALGORITHMS:
            pick_algorithm(policy)
    except UserError as error:
        values = " ".join(f"{key}={value}" for key, value in chosen.items())
        raise UserError(f"--set {values}: {error}") from None
    return Setting(algorithm, changes["policy"], changes["reward"], varied)


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
    folder = lab_folder(config.out)
    reward, policy = base_configs(config)
    reward_out = str(folder / folder_name("reward", chosen.reward, seed))
    policy_out = str(folder / folder_name(chosen.algorithm, chosen.policy | chosen.reward, seed))
    reward = dataclasses.replace(reward, **chosen.reward, seed=seed, out=reward_out)
    users_task = reward.task if is_users_module(reward.task) else ""
    policy = dataclasses.replace(policy, **chosen.policy, algorithm=chosen.algorithm, seed=seed,
                                 task=users_task, reward_run=reward_out, out=policy_out)
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
    final = json.loads(read_file(path))
    return dict(algorithm=chosen.algorithm, settings=chosen.policy | chosen.reward,
                seed=job.config.seed, command=command_of(job), curve=curve,
                metrics=final | heldout | dict(samples=samples, seconds=seconds))


class Result(NamedTuple):
    """A setting and its lines of runs.jsonl, by seed."""

    setting: Setting
    rows: list[dict]

    def values(self, name: str) -> list[float]:
        """A final metric of each seed. Raises UserError."""
        metrics = self.rows[0]["metrics"]
        if name not in metrics:
            raise UserError(f"{name!r} (--x, --y or --best) is not a metric of these runs"
                            f"{suggest(name, metrics)}")
        return [row["metrics"][name] for row in self.rows]


def script_version(config: SweepConfig) -> str:
    """Name and hash of --script, after it has run with --help. Raises UserError if it fails."""
    if config.script == "train_policy.py":
        return config.script
    path = Path(config.script).resolve()
    done = subprocess.run([sys.executable, str(path), "--help"], env=script_environment(),
                          capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        places = re.findall(r'File "(.*)", line (\d+)', done.stderr)
        place = f" at {Path(places[-1][0]).name}:{places[-1][1]}" if places else ""
        raise UserError(f"--script {config.script} fails{place}: {reason}")
    if not done.stdout:
        raise UserError(f"--script {config.script} prints nothing with --help; its last line must "
                        "be run_script(train_policy.main, PolicyConfig)")
    for name in set(algorithm_names(config)) - {*ALGORITHMS, "dpo"}:
        # An algorithm is looked up before the reward run, which does not exist.
        command = [sys.executable, str(path), "--algorithm", name, "--reward-run", os.devnull]
        done = subprocess.run(command, env=script_environment(), capture_output=True, text=True)
        reason = (done.stderr.strip().splitlines() or [""])[-1].removeprefix("error: ")
        if "--algorithm" in reason:
            raise UserError(f"--script {config.script}: {reason}")
    return f"{path.name} {file_hash(path)[:16]}"


def run_sweep(config: SweepConfig, settings: list[Setting]) -> list[Result]:
    """Run what is missing. Raises UserError."""
    folder = lab_folder(config.out)
    fixed = dict(item.partition("=")[::2] for item in config.set if "," not in item)
    about = dict(script=script_version(config), quick=config.quick,
                 task={key: fixed[key] for key in fixed if key.startswith("reward.")})
    rows = Rows(folder / "runs.jsonl", about)
    jobs = [[jobs_of(config, chosen, seed) for seed in range(config.seeds)] for chosen in settings]
    missing = {policy.folder.name: (reward, policy, chosen)
               for chosen, pairs in zip(settings, jobs) for reward, policy in pairs
               if policy.folder.name not in rows.rows}

    def record(job: Job) -> None:
        if job.folder.name in missing:
            chosen = missing[job.folder.name][2]
            rows.get(job.folder.name, lambda: describe_run(job, chosen))

    if missing:
        rewards = {reward.folder: reward for reward, _, _ in missing.values()}
        policies = [policy for _, policy, _ in missing.values()]
        # by seed: an algorithm that fails does so after the first reward run
        in_order = sorted([*rewards.values(), *policies], key=lambda job: job.config.seed)
        run_jobs(in_order, config.jobs or os.cpu_count() or 1, folder / "logs", record)
    return [Result(chosen, [rows.rows[policy.folder.name] for _, policy in pairs])
            for chosen, pairs in zip(settings, jobs)]


# ---- table and plot ------------------------------------------------------------------------------


def keep_best(results: list[Result], name: str) -> list[Result]:
    """The setting of each algorithm with the highest mean of a metric."""
    best: dict[str, Result] = {}
    for result in results:
        algorithm = result.setting.algorithm
        mean = mean_interval(result.values(name))[0]
        if algorithm not in best or mean > mean_interval(best[algorithm].values(name))[0]:
            best[algorithm] = result
    return list(best.values())


def result_table(results: list[Result], y: str) -> str:
    """The last column has the differences from the first setting in the metric y."""
    columns = [column for column in COLUMNS if column[1] in results[0].rows[0]["metrics"]]
    first = results[0].values(y)
    table = []
    for result in results:
        cells = [show(result.values(key), form) for _, key, form in columns]
        difference = show([a - b for a, b in zip(result.values(y), first)], "{:+.2f}")
        table.append([f"`{result.setting.label}`", str(len(result.rows)), *cells,
                      "" if result is results[0] else difference])
    titles = [title for title, _, _ in columns]
    last = f"{y} minus `{results[0].setting.label}`"
    return markdown_table(["setting", "seeds", *titles, last], table)


def show(values: list[float], form: str) -> str:
    """
    >>> show([1.0, 2.0, 3.0], "{:+.1f}"), show([0.5], "{:.0%}")
    ('+2.0 ± 2.5', '50%')
    """
    mean, half = mean_interval(values)
    text = form.format(mean)
    return text if len(values) == 1 else f"{text} ± {form.replace('+', '').format(half)}"


# mean x (None: a horizontal line), half of its interval, mean y, half of its interval
Line = list[tuple[float | None, float, float, float]]


def points(results: list[Result], x: str, y: str) -> dict[str, Line]:
    """The lines of a plot, by label. Raises UserError.

    x in CURVES: one line per setting, one point per evaluation on the held-out prompts.
    x a varied setting: one line per combination of the others, one point per value of a number.
        A setting in which x does not vary has one point without an x, for a horizontal line.
    Otherwise: one point per setting, at the end of training, on the test prompts.
    """
    lines: dict[str, Line] = {}
    is_setting = any(x in result.setting.varied for result in results)
    for result in results:
        label = result.setting.label
        if x in CURVES:
            lines[label] = curve(result, x, y)
        elif not is_setting:
            lines[label] = [(*mean_interval(result.values(x)), *mean_interval(result.values(y)))]
        elif x in result.setting.varied:
            value = result.setting.varied[x]
            line = lines.setdefault(label.replace(f" {x}={value}", ""), [])
            line.append((value, 0.0, *mean_interval(result.values(y))))
        else:
            lines[label] = [(None, 0.0, *mean_interval(result.values(y)))]
    return {label: sorted(line, key=lambda point: point[0]) for label, line in lines.items()}


def curve(result: Result, x: str, y: str) -> Line:
    """A point for each evaluation during training. Raises UserError."""
    known = result.rows[0]["curve"][-1]
    if y not in known:
        raise UserError(f"--y {y!r} is not evaluated during training{suggest(y, known)}")
    line = []
    for evaluation in zip(*(row["curve"] for row in result.rows)):
        xs, ys = ([point[name] for point in evaluation] for name in (x, y))
        line.append((*mean_interval(xs), *mean_interval(ys)))
    return line


def panels(results: list[Result], y: str) -> dict[str, dict[str, Line]]:
    """The lines of one panel for each varied setting."""
    names = dict.fromkeys(key for result in results for key in result.setting.varied)
    return {name: points([result for result in results if name in result.setting.varied], name, y)
            for name in names}


def draw(axes, lines: dict[str, Line], x: str, y: str, legend: bool = True) -> None:
    """Error bars: 95% intervals over seeds."""
    shown = []
    for (label, line), (color, dash, marker) in zip(lines.items(), itertools.cycle(STYLES)):
        xs, x_bars, ys, y_bars = zip(*line)
        has_no_samples = x == "samples" and not any(xs)  # dpo: where its training ends
        if has_no_samples or xs[0] is None:
            axes.axhspan(ys[-1] - y_bars[-1], ys[-1] + y_bars[-1], color=color, alpha=0.15)
            label += " (no samples)" * has_no_samples
            shown.append(axes.axhline(ys[-1], label=label, color=color, linestyle=dash))
            continue
        shown.append(axes.errorbar(
            xs, ys, yerr=y_bars, xerr=x_bars if any(x_bars) else None, label=label, color=color,
            linestyle=dash, marker=marker, markersize=5, linewidth=1.4, capsize=2, elinewidth=0.8))
    axes.set_xlabel(AXES.get(x, x))
    axes.set_ylabel(AXES.get(y, y))
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(handles=shown, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5),
                    fontsize=8)


def plot_title(config: SweepConfig) -> str:
    prompts = "held-out" if config.x in CURVES and not config.one_at_a_time else "test"
    spread = f"mean and 95% interval (Student's t) over {config.seeds} seeds"
    if config.seeds == 1:
        spread = "one seed"
    return f"{prompts} prompts, {spread}" + f"; {QUICK}" * config.quick


def draw_panels(all_axes, each: dict[str, dict[str, Line]], y: str) -> None:
    """Panels side by side, with one scale of y; the legend is in the last one."""
    all_axes = list(getattr(all_axes, "flat", [all_axes]))
    for axes, (name, lines) in zip(all_axes, each.items()):
        if axes is not all_axes[0]:
            axes.sharey(all_axes[0])
        draw(axes, lines, name, y, legend=axes is all_axes[-1])
        ticks = sorted({point[0] for line in lines.values() for point in line})
        if min(ticks) > 0:
            axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
        if axes is not all_axes[0]:
            axes.set_ylabel("")
            axes.tick_params(labelleft=False)


AXES = {
    "samples": "samples from the policy (responses)",
    "seconds": "training time (seconds, one thread)",
    "sampled_gold": "gold utility of sampled responses (mean)",
    "greedy_gold": "gold utility of greedy responses (mean)",
    "sampled_score": "score of sampled responses (mean)",
    "sampled_kl": "KL from the base model (nats per response)",
    "kl_coef": "KL coefficient (score units per nat)",
    "lr": "learning rate",
    "ppo_epochs": "passes over each rollout",
    "clip_range": "clip range of the ratio",
    "lam": "lambda of GAE",
}


def main(config: SweepConfig) -> str:
    """Run what is missing; write the table and the plot; returns the table. Raises UserError."""
    config.check()
    results = run_sweep(config, settings_of(config))
    if config.best:
        results = keep_best(results, config.best)
    folder = lab_folder(config.out)
    page = f"{result_table(results, config.y)}\n\n{NOTES}\n" + f"\n{QUICK}\n" * config.quick
    write_atomically(folder / "table.md", page.encode())
    echo(f"\n{page}\nsaved {folder / 'table.md'} and {folder / 'runs.jsonl'}")
    title = plot_title(config)
    if config.one_at_a_time:
        each = panels(results, config.y)
        save_picture(folder / f"{config.y}-each.png",
                     lambda axes: draw_panels(axes, each, config.y),
                     (2.6 * len(each) + 1.5, 3.0), columns=len(each), title=title)
    else:
        lines = points(results, config.x, config.y)
        save_picture(folder / f"{config.y}-{config.x}.png",
                     lambda axes: draw(axes, lines, config.x, config.y), (7.2, 4.2), title=title)
    return page


if __name__ == "__main__":
    run_lab(main, SweepConfig)
