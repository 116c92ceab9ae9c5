"""How far can a reward model be trusted? `python -m minirlhf.lab.overoptimization --help`

The study of Gao, Schulman and Hilton (2022, arXiv 2210.10760) at a small scale, over several seeds,
with the exact gold utility of the help desk; and the ensembles of Coste et al. (2023, arXiv
2310.02743). Best of n and PPO optimize each reward model. Seed s varies everything.

    OUT/runs.jsonl             one line per finished run: its command and what the page needs
    OUT/overoptimization.md    tables, and each statement of the papers next to its measurement
    OUT/*.png                  gold and proxy against sqrt(KL), with error bars
    OUT/reward-KIND-seedS/     train_reward.py; KIND is LAYERSxWIDTH-GROUPS
    OUT/rewards/NAME-seedS.py  NAME as a reward function: a kind, or an ensemble of the weakest kind
    OUT/ppo-NAME-seedS/        train_policy.py --reward OUT/rewards/NAME-seedS.py:score

A run in runs.jsonl is not repeated, even if its folder is gone. A stopped run resumes. More seeds
can be added later to the same folder.
"""

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.splits import HELPDESK_FILES, load_function
from minirlhf.lab import common
from minirlhf.lab import overoptimization_page as page
from minirlhf.lab.common import Job
from minirlhf.lab.ensemble import AGGREGATES
from minirlhf.rl.reward import Reward, score_responses
from minirlhf.rl.sampling import gold_utility, sample_responses
from minirlhf.rl.task import load_task
from minirlhf.run.command_line import check_ranges, setting
from minirlhf.run.files import write_atomically
from minirlhf.run.terminal import echo

import numpy as np
import torch

LR = 3e-4  # of PPO; with the script's default, gold peaks within 6 iterations: too few points
MEMBERS = 3  # of an ensemble; member i of seed s is the reward run with seed s + 100 i
REWARD_FUNCTION = """from minirlhf.lab.ensemble import ensemble

score = ensemble({runs!r}, {aggregate!r}, {base_run!r})
"""


class Scale(NamedTuple):
    """How large the study is."""

    # LAYERSxWIDTH-GROUPS of the reward models, weakest first. A group has 4 responses and 6 pairs.
    # The second has more preferences than the first; the third is larger than the second, and its
    # base model is the one that all policies start from.
    kinds: tuple[str, str, str]
    sft_sequences: int
    iterations: int  # of PPO
    batch_size: int
    kl_coefs: tuple[float, ...]  # tried with the weakest reward model, besides 0
    prompts: int  # test prompts of best of n
    pool: int  # responses to each


SCALES = {
    "full": Scale(("1x32-512", "1x32-3072", "2x128-3072"), 12_288, 40, 128, (0.03, 0.1), 64, 256),
    "tiny": Scale(("1x16-24", "1x16-48", "1x32-48"), 64, 6, 8, (0.1,), 4, 8),
}


@dataclasses.dataclass(frozen=True)
class OveroptimizationConfig:
    """Gold and proxy against sqrt(KL), for best of n and PPO, with several reward models."""

    out: str = setting("runs/overoptimization", "folder of all runs, runs.jsonl, page, pictures")
    seeds: int = setting(3, "seeds 0 to N - 1; fewer than three do not show the spread", 1, 100)
    jobs: int = setting(0, "runs at a time, one thread each; 0: one per core", 0)
    scale: str = setting(
        "full", "full: half an hour on one core; tiny: only shows that it runs",
        choices=tuple(SCALES))

    def check(self) -> None:
        check_ranges(self)

    def folder(self, kind: str, seed: int) -> str:
        """Of a reward run."""
        return str(Path(self.out) / f"reward-{kind}-seed{seed}")


# ---- runs ----------------------------------------------------------------------------------------


def reward_functions(config: OveroptimizationConfig, seed: int) -> dict[str, str]:
    """Name -> FILE.py:score of each reward: three reward models, then the ensembles."""
    kinds = SCALES[config.scale].kinds
    members = [config.folder(kinds[0], seed + 100 * i) for i in range(MEMBERS)]
    rewards = {kind: ([config.folder(kind, seed)], "mean") for kind in kinds}
    rewards |= {f"{kinds[0]}-{aggregate}": (members, aggregate) for aggregate in AGGREGATES}
    folder = Path(config.out) / "rewards"
    folder.mkdir(exist_ok=True)
    functions = {}
    for name, (runs, aggregate) in rewards.items():
        path = folder / f"{name}-seed{seed}.py"
        source = REWARD_FUNCTION.format(runs=runs, aggregate=aggregate,
                                        base_run=config.folder(kinds[-1], seed))
        write_atomically(path, source.encode())
        functions[name] = f"{path}:score"
    return functions


def reward_jobs(config: OveroptimizationConfig, seed: int) -> list[Job]:
    """The first run takes longest. All policies start from its base model."""
    scale = SCALES[config.scale]
    runs = [(kind, seed) for kind in reversed(scale.kinds)]
    runs += [(scale.kinds[0], seed + 100 * i) for i in range(1, MEMBERS)]
    jobs = []
    for kind, run_seed in runs:
        layers, width, groups = map(int, re.findall(r"\d+", kind))
        jobs.append(Job("train_reward.py", RewardConfig(
            data=(common.train_subset(Path(config.out), groups),), task="minirlhf.data.helpdesk",
            heldout_data=HELPDESK_FILES["heldout_data"], test_data=HELPDESK_FILES["test_data"],
            n_layer=layers, d_model=width, sft_sequences=scale.sft_sequences,
            epochs=2,  # with few groups, one pass is too few steps
            seed=run_seed, out=config.folder(kind, run_seed))))
    return jobs


def policy_jobs(config: OveroptimizationConfig, seed: int) -> list[Job]:
    """PPO: every reward without a KL penalty, the weakest one also with penalties."""
    scale = SCALES[config.scale]
    functions = reward_functions(config, seed)
    runs = [(name, name, 0.0) for name in functions]
    runs += [(f"{scale.kinds[0]}-kl-{kl_coef:g}", scale.kinds[0], kl_coef)
             for kl_coef in scale.kl_coefs]
    return [Job("train_policy.py", PolicyConfig(
        reward_run=config.folder(scale.kinds[-1], seed), reward=functions[reward], seed=seed,
        iterations=scale.iterations, batch_size=scale.batch_size,
        minibatch_size=scale.batch_size // 2, lr=LR, lr_decay=False, kl_coef=kl_coef, max_kl=1e6,
        eval_every=scale.iterations, eval_prompts=16, test_prompts=16, best_of_n=0,
        out=str(Path(config.out) / f"ppo-{name}-seed{seed}"))) for name, reward, kl_coef in runs]


def describe_run(job: Job) -> dict:
    """The line of a run in runs.jsonl. A policy run: metrics of each iteration's responses."""
    line: dict = dict(command=common.command_of(job))
    if isinstance(job.config, RewardConfig):
        metrics = common.reward_test_rows(job.folder)[0]
        return line | {name: metrics[name] for name in page.REWARD_COLUMNS}
    rows = [row for row in common.read_rows(job.folder / "policy_metrics.jsonl") if row["step"]]
    return line | {name: [row[name] for row in rows] for name in ("kl", "gold", "score")}


def sample_pool(config: OveroptimizationConfig, seed: int) -> dict:
    """Best of n for every reward, from one pool of base-model samples.

    "gold" is the base model's on training prompts, from which the gold gained by PPO is counted.
    """
    scale = SCALES[config.scale]
    settings = PolicyConfig(reward_run=config.folder(scale.kinds[-1], seed), seed=seed)
    task = load_task(settings, None, torch.device("cpu"))
    prompts = task.train.first(16 * scale.prompts)
    base = sample_responses(task.base, prompts, task.sampling, "start", 0,
                            list(range(len(prompts.texts))))
    pools = []
    for number in range(scale.prompts):
        copies = task.test.rows([number] * scale.pool)
        pools.append(sample_responses(task.base, copies, task.sampling, "pool", number,
                                      list(range(scale.pool))))
    gold = np.array([gold_utility(pool, task.ground_truth) for pool in pools])
    curves = {}
    for name, function in reward_functions(config, seed).items():
        echo(f"best of n, seed {seed}: {name}")
        reward = Reward(name, load_function(function, "--reward"), settings.missing_eos_penalty)
        scores = np.stack([score_responses(reward, pool).numpy() for pool in pools])
        curves[name] = page.best_of_n_curve(scores, gold).tolist()
    return dict(gold=float(np.mean(gold_utility(base, task.ground_truth))), curves=curves)


def run_study(config: OveroptimizationConfig) -> dict[str, dict]:
    """Run what is missing; returns the lines of runs.jsonl by key. Raises UserError."""
    about = dict(scale=SCALES[config.scale]._asdict())
    rows = common.Rows(Path(config.out) / "runs.jsonl", about)
    rewards, policies = [], []
    for seed in range(config.seeds):
        of_seed = reward_jobs(config, seed), policy_jobs(config, seed)
        names = {job.folder.name for jobs in of_seed for job in jobs} | {f"best-of-n-seed{seed}"}
        if missing := names - rows.rows.keys():
            rewards += of_seed[0]
            policies += [job for job in of_seed[1] if job.folder.name in missing]
    for jobs in filter(None, (rewards, policies)):
        common.run_jobs(jobs, config.jobs or os.cpu_count() or 1, Path(config.out) / "logs",
                        lambda job: rows.get(job.folder.name, lambda: describe_run(job)))
    for seed in range(config.seeds):
        rows.get(f"best-of-n-seed{seed}", functools.partial(sample_pool, config, seed))
    return rows.rows


def main(config: OveroptimizationConfig) -> str:
    """Run what is missing, write page and pictures; returns the page. Raises UserError."""
    config.check()
    torch.set_num_threads(1)  # so that sums do not depend on the machine
    out = common.lab_folder(config.out)
    study = page.read_study(run_study(config), SCALES[config.scale].kinds, config.seeds)
    return page.write_page(study, out)


if __name__ == "__main__":
    common.run_lab(main, OveroptimizationConfig)
