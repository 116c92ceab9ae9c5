"""Compare the algorithms: gold utility against samples, over several seeds, at equal budgets.

`python -m minirlhf.lab.algorithms --help`

Seed s varies everything: the reward run is `train_reward.py --seed s` (base model, order of the
data, reward model), and each policy is `train_policy.py --seed s` with that reward run.
A finished run is not repeated, and a stopped run resumes. Runs of the two scripts with the same
settings in the same folders count too.
"""

import dataclasses
import json
from pathlib import Path

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.lab.common import (
    STYLES,
    Job,
    markdown_table,
    mean_spread,
    read_rows,
    reward_test_rows,
    run_jobs,
    run_lab,
    save_picture,
    train_subset,
)
from minirlhf.rl.algorithms import ALGORITHMS
from minirlhf.run.checkpoint import write_atomically
from minirlhf.run.command_line import check_ranges, setting
from minirlhf.run.errors import UserError, suggest

import numpy as np

POINTS = 12  # of a learning curve; each is a mean over an equal part of the iterations
COLUMNS = (("gold, sampled", "sampled_gold", "{:+.2f}"), ("gap", "sampled_gap_closed", "{:.0%}"),
           ("wins", "sampled_win_rate", "{:.1%}"), ("KL, nats", "sampled_kl", "{:.1f}"),
           ("gold, greedy", "greedy_gold", "{:+.2f}"), ("gap", "greedy_gap_closed", "{:.0%}"),
           ("wins", "greedy_win_rate", "{:.1%}"))
NOTES = """Test prompts; mean ± standard deviation over seeds. Gap: share of the gap from the base \
model to the best possible response. Wins: against the base model at the same decoding, by gold. \
Learns: seeds whose final sampled gold is more than 2 standard errors (over prompts) above the \
base model's. Peak: of the learning curve on training prompts."""


@dataclasses.dataclass(frozen=True)
class AlgorithmsConfig:
    """Compare the algorithms on the help desk: gold against samples, as a table and a picture."""

    runs: str = setting("runs/algorithms", "folder of all runs, algorithms.md and algorithms.png")
    seeds: int = setting(3, "seeds 0 to N - 1; fewer than three do not show the spread", 1)
    jobs: int = setting(1, "runs at a time, one thread each; as many as there are idle cores", 1)
    algorithms: str = setting(",".join(ALGORITHMS), "algorithms, separated by commas")
    iterations: int = setting(0, "iterations of each policy; 0: the default of the script", 0)
    quick: bool = setting(False, "tiny models and few samples: only shows that it runs")

    def check(self) -> None:
        check_ranges(self)
        for name in self.names():
            if name not in ALGORITHMS:
                raise UserError(f"--algorithms: {name!r} is not known{suggest(name, ALGORITHMS)}")
        if Path(self.runs).exists() and not Path(self.runs).is_dir():
            raise UserError(f"--runs {self.runs}: is a file; name a folder")

    def names(self) -> list[str]:
        return list(dict.fromkeys(self.algorithms.split(",")))


def plan(config: AlgorithmsConfig) -> tuple[list[Job], dict[str, list[Job]]]:
    """(the reward runs, the policy runs by algorithm), each list by seed."""
    folder = Path(config.runs)
    reward = RewardConfig()
    policy = PolicyConfig(best_of_n=0)
    if config.quick:
        folder.mkdir(parents=True, exist_ok=True)
        data = (train_subset(folder, 48),)
        reward = RewardConfig(data=data, heldout_data=data, test_data=data,
                              task="minirlhf.data.helpdesk", n_layer=1, d_model=32,
                              sft_sequences=512, normalize_prompts=16, max_response_length=24)
        policy = PolicyConfig(iterations=2, batch_size=8, minibatch_size=4, eval_prompts=4,
                              test_prompts=8, best_of_n=0)
    if config.iterations:
        policy = dataclasses.replace(policy, iterations=config.iterations)

    def reward_job(seed: int) -> Job:
        out = str(folder / f"reward-seed{seed}")
        return Job("train_reward.py", dataclasses.replace(reward, seed=seed, out=out))

    def policy_job(name: str, seed: int) -> Job:
        out = str(folder / f"{name}-seed{seed}")
        reward_run = rewards[seed].config.out
        settings = dataclasses.replace(policy, algorithm=name, seed=seed, reward_run=reward_run,
                                       out=out)
        return Job("train_policy.py", settings, reward_run)

    seeds = range(config.seeds)
    rewards = [reward_job(seed) for seed in seeds]
    return rewards, {name: [policy_job(name, seed) for seed in seeds] for name in config.names()}


def learning_curve(folder: Path, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """(samples so far, gold) of a policy run's own rollouts, each point a mean over iterations."""
    rows = [row for row in read_rows(folder / "policy_metrics.jsonl") if row["step"] > 0]
    parts = np.array_split(np.arange(len(rows)), min(points, len(rows)))
    samples = np.array([row["samples"] for row in rows])
    gold = np.array([row["gold"] for row in rows])
    return (np.array([samples[part].mean() for part in parts]),
            np.array([gold[part].mean() for part in parts]))


def final_metrics(folder: Path) -> dict:
    """A policy run's metrics on the test prompts, and the peak of its learning curve."""
    row = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    samples, gold = learning_curve(folder)
    error = (row["sampled_gold_se"] ** 2 + row["base_sampled_gold_se"] ** 2) ** 0.5
    rise = (row["sampled_gold"] - row["base_sampled_gold"]) / error
    return row | dict(rise=rise, peak=gold.max(), peak_samples=samples[gold.argmax()])


def algorithm_table(policies: dict[str, list[Job]]) -> str:
    table = []
    for name, jobs in policies.items():
        rows = [final_metrics(job.folder) for job in jobs]
        cells = [mean_spread([row[key] for row in rows], form) for _, key, form in COLUMNS]
        learned = sum(row["rise"] > 2 for row in rows)
        peak = np.mean([row["peak"] for row in rows])
        samples = np.mean([row["peak_samples"] for row in rows])
        table.append([f"`{name}`", *cells, f"{learned} of {len(rows)}",
                      f"{peak:+.2f} at {samples:,.0f}"])
    titles = [title for title, _, _ in COLUMNS]
    return markdown_table(["`--algorithm`", *titles, "learns", "peak of gold, at samples"], table)


def reward_table(rewards: list[Job], policies: dict[str, list[Job]]) -> str:
    """The reward model of each seed, and the base model, whose metrics any policy run has."""
    of_any_algorithm = next(iter(policies.values()))
    table = []
    for seed, (job, policy) in enumerate(zip(rewards, of_any_algorithm)):
        row = reward_test_rows(job.folder)[0]
        result = final_metrics(policy.folder)
        probe, (share, _) = min(row["probes"].items(), key=lambda item: item[1][0])
        interval = f"[{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]"
        table.append([str(seed), f"{row['accuracy']:.3f} {interval}", f"{row['ceiling']:.3f}",
                      f"{row['gold_correlation']:.3f}", f"{share:.0%} ({probe})",
                      f"{result['base_sampled_gold']:+.2f}", f"{result['base_greedy_gold']:+.2f}",
                      f"{result['best_gold']:+.2f}"])
    return markdown_table(["seed", "accuracy", "ceiling", "correlation with gold", "worst probe",
                           "base gold, sampled", "greedy", "best possible"], table)


def draw(axes, policies: dict[str, list[Job]]) -> None:
    """Gold against samples: the mean over seeds as a line, lowest to highest as a band."""
    results = [final_metrics(job.folder) for job in next(iter(policies.values()))]
    for name, jobs in policies.items():
        # a reader's own algorithm may be the eighth
        color, line, marker = STYLES[list(ALGORITHMS).index(name) % len(STYLES)]
        curves = [learning_curve(job.folder) for job in jobs]
        samples = curves[0][0]
        gold = np.array([gold for _, gold in curves])
        axes.plot(samples, gold.mean(0), color=color, linestyle=line, marker=marker, markersize=5,
                  linewidth=1.6, label=name)
        if len(jobs) > 1:
            axes.fill_between(samples, gold.min(0), gold.max(0), color=color, alpha=0.12,
                              linewidth=0)
    for key, text in (("best_gold", "best possible"), ("base_sampled_gold", "base model")):
        level = np.mean([row[key] for row in results])
        axes.axhline(level, color="0.4", linewidth=0.8)
        axes.annotate(text, (0.99, level), xycoords=("axes fraction", "data"), xytext=(0, 3),
                      textcoords="offset points", ha="right", fontsize=8, color="0.3")
    axes.set_xlabel("samples from the policy (responses)")
    axes.set_ylabel("gold utility of the sampled responses (mean)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)


def main(config: AlgorithmsConfig) -> str:
    """Run what is missing, write algorithms.md and algorithms.png; returns the page.

    Raises UserError.
    """
    config.check()
    folder = Path(config.runs)
    rewards, policies = plan(config)
    jobs = [job for of_algorithm in policies.values() for job in of_algorithm]
    run_jobs([*rewards, *jobs], config.jobs, folder / "logs")
    settings = jobs[0].config
    budget = settings.iterations * settings.batch_size
    page = (f"# {len(policies)} algorithms, {config.seeds} seeds, {budget:,} samples each\n\n"
            f"{algorithm_table(policies)}\n\n{NOTES}\n\n{reward_table(rewards, policies)}\n")
    write_atomically(folder / "algorithms.md", page.encode())
    print(f"\n{page}\nsaved {folder / 'algorithms.md'}")
    save_picture(folder / "algorithms.png", lambda axes: draw(axes, policies), (7.2, 4.2))
    return page


if __name__ == "__main__":
    run_lab(main, AlgorithmsConfig)
