"""All seven algorithms, several seeds, equal sample budgets: gold against samples. `python -m minirlhf.lab.ladder --help`

Seed s varies everything: the reward run is train_reward.py --seed s (base model, data order, reward model), and each policy
is train_policy.py --seed s upon it. A finished run is not repeated, one that was stopped goes on, and a run that anybody made
with the same settings in the same folder counts.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from minirlhf.checkpoint import write_atomically
from minirlhf.config import PolicyConfig, RewardConfig, UserError
from minirlhf.flags import check_ranges, nearest, setting
from minirlhf.lab.common import STYLES, Job, markdown_table, mean_spread, read_rows, run_jobs, run_lab, save_picture, train_subset
from minirlhf.ladder import LADDER

POINTS = 12  # of a learning curve: each the mean over this share of a run's iterations


@dataclasses.dataclass(frozen=True)
class LadderConfig:
    """All seven algorithms, several seeds, equal sample budgets: gold against samples, as a table and a picture."""

    runs: str = setting("runs/ladder", "folder of all runs, of ladder.md and of ladder.png")
    seeds: int = setting(3, "seeds 0 to N - 1; fewer than three say nothing about spread", 1)
    jobs: int = setting(1, "runs at a time, one thread each; as many as there are idle cores", 1)
    algorithms: str = setting(",".join(LADDER), "rungs, separated by commas")
    iterations: int = setting(0, "rounds per policy; 0: the script's own default", 0)
    quick: bool = setting(False, "tiny models and a handful of samples: shows that it runs, and nothing else")

    def check(self) -> None:
        check_ranges(self)
        for name in self.names():
            if name not in LADDER:
                raise UserError(f"--algorithms: {name!r} is not known{nearest(name, LADDER)}")
        if Path(self.runs).exists() and not Path(self.runs).is_dir():
            raise UserError(f"--runs {self.runs}: is a file; name a folder")

    def names(self) -> list[str]:
        return list(dict.fromkeys(self.algorithms.split(",")))


def plan(config: LadderConfig) -> tuple[list[Job], dict[str, list[Job]]]:
    """(the reward runs, the policy runs by algorithm), each list by seed."""
    folder = Path(config.runs)
    reward, policy = RewardConfig(), PolicyConfig(best_of_n=0)
    if config.quick:
        folder.mkdir(parents=True, exist_ok=True)
        data = (train_subset(folder, 48),)
        reward = RewardConfig(data=data, heldout_data=data, test_data=data, task="minirlhf.helpdesk", n_layer=1, d_model=32,
                              warmup_sequences=512, normalise_prompts=16, max_response_length=24)
        policy = PolicyConfig(best_of_n=0, iterations=2, batch_size=8, minibatch_size=4, eval_prompts=4, test_prompts=8)
    if config.iterations:
        policy = dataclasses.replace(policy, iterations=config.iterations)
    rewards = [Job("train_reward.py", dataclasses.replace(reward, seed=seed, out=str(folder / f"reward-seed{seed}")))
               for seed in range(config.seeds)]
    policies = {name: [Job("train_policy.py", dataclasses.replace(policy, algorithm=name, seed=seed, reward_run=run.config.out,
                                                                  out=str(folder / f"{name}-seed{seed}")), run.config.out)
                       for seed, run in enumerate(rewards)]
                for name in config.names()}
    return rewards, policies


def learning_curve(folder: Path, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """(samples drawn so far, mean gold of the replies drawn since the point before), from a policy run's own rollouts."""
    rows = [row for row in read_rows(folder / "policy_metrics.jsonl") if row["step"] > 0]
    parts = np.array_split(np.arange(len(rows)), min(points, len(rows)))
    gold, samples = (np.array([row[key] for row in rows]) for key in ("gold", "samples"))
    return np.array([samples[part].mean() for part in parts]), np.array([gold[part].mean() for part in parts])


def closing_row(folder: Path) -> dict:
    """A policy run's figures on the test prompts, and what its learning curve peaked at."""
    row = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    samples, gold = learning_curve(folder)
    error = (row["sampled_gold_se"] ** 2 + row["base_sampled_gold_se"] ** 2) ** 0.5
    rise = (row["sampled_gold"] - row["base_sampled_gold"]) / error
    return row | dict(rise=rise, peak=gold.max(), peak_samples=samples[gold.argmax()], last=gold[-1])


def algorithm_table(policies: dict[str, list[Job]]) -> str:
    columns = (("sampled_gold", "{:+.2f}"), ("sampled_gap_closed", "{:.0%}"), ("sampled_win_rate", "{:.1%}"),
               ("sampled_kl", "{:.1f}"), ("greedy_gold", "{:+.2f}"), ("greedy_gap_closed", "{:.0%}"),
               ("greedy_win_rate", "{:.1%}"))
    table = []
    for name, jobs in policies.items():
        rows = [closing_row(job.folder) for job in jobs]
        cells = [mean_spread([row[key] for row in rows], form) for key, form in columns]
        learnt = sum(row["rise"] > 2 for row in rows)
        peak = f"{np.mean([row['peak'] for row in rows]):+.2f} at {np.mean([row['peak_samples'] for row in rows]):,.0f}"
        table.append([f"`{name}`", *cells, f"{learnt} of {len(rows)}", peak])
    header = ["`--algorithm`", "gold, sampled", "gap", "wins", "KL, nats", "gold, greedy", "gap", "wins", "learns",
              "peak of gold, at samples"]
    return markdown_table(header, table)


def reward_table(rewards: list[Job], policies: dict[str, list[Job]]) -> str:
    table = []
    for seed, job in enumerate(rewards):
        row = next(row for row in read_rows(job.folder / "reward_metrics.jsonl") if row["stage"] == "test")
        probe, (share, _) = min(row["probes"].items(), key=lambda item: item[1][0])
        result = closing_row(next(iter(policies.values()))[seed].folder)
        table.append([str(seed), f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]",
                      f"{row['ceiling']:.3f}", f"{row['gold_correlation']:.3f}", f"{share:.0%} ({probe})",
                      f"{result['base_sampled_gold']:+.2f}", f"{result['base_greedy_gold']:+.2f}", f"{result['best_gold']:+.2f}"])
    return markdown_table(["seed", "accuracy", "ceiling", "correlation with gold", "worst probe", "base gold, sampled", "greedy",
                           "best possible"], table)


def draw(axes, policies: dict[str, list[Job]]) -> None:
    """Gold against samples: a line per algorithm, the mean over seeds, and a band from the lowest seed to the highest."""
    jobs = next(iter(policies.values()))
    results = [closing_row(job.folder) for job in jobs]
    for name, jobs in policies.items():
        colour, line, marker = STYLES[list(LADDER).index(name) % len(STYLES)]  # of the reader's own rungs, an eighth
        curves = [learning_curve(job.folder) for job in jobs]
        samples, gold = curves[0][0], np.array([gold for _, gold in curves])
        axes.plot(samples, gold.mean(0), color=colour, linestyle=line, marker=marker, markersize=5, linewidth=1.6, label=name)
        if len(jobs) > 1:
            axes.fill_between(samples, gold.min(0), gold.max(0), color=colour, alpha=0.12, linewidth=0)
    for key, text in (("best_gold", "best possible"), ("base_sampled_gold", "base model")):
        level = np.mean([row[key] for row in results])
        axes.axhline(level, color="0.4", linewidth=0.8)
        axes.annotate(text, (0.99, level), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                      ha="right", fontsize=8, color="0.3")
    axes.set_xlabel("samples drawn from the policy (replies)")
    axes.set_ylabel("gold utility of the sampled replies (mean)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)


def main(config: LadderConfig) -> str:
    """Run what is missing, write ladder.md and ladder.png, and return the table. Raises UserError."""
    config.check()
    rewards, policies = plan(config)
    run_jobs([*rewards, *(job for jobs in policies.values() for job in jobs)], config.jobs, Path(config.runs) / "logs")
    settings = policies[config.names()[0]][0].config
    budget = settings.iterations * settings.batch_size
    page = (f"# The ladder: {len(policies)} algorithms, {config.seeds} seeds, {budget:,} samples each\n\n"
            f"{algorithm_table(policies)}\n\n"
            "Test prompts; mean ± standard deviation over seeds. Gap: share of the way from the base model to the best possible "
            "reply. Wins: against the base model at the same decoding, by gold. Learns: seeds on which sampled gold ends more "
            "than 2 standard errors (over prompts) above the base model's. Peak: of the learning curve on training prompts.\n\n"
            f"{reward_table(rewards, policies)}\n")
    write_atomically(Path(config.runs) / "ladder.md", page.encode())
    print(f"\n{page}\nsaved {Path(config.runs) / 'ladder.md'}")
    save_picture(Path(config.runs) / "ladder.png", lambda axes: draw(axes, policies), figsize=(7.2, 4.2))
    return page


if __name__ == "__main__":
    run_lab(main, LadderConfig)
