"""How far can a reward model be trusted? `python -m minirlhf.lab.overoptimization --help`

A small version of the study of Gao, Schulman and Hilton (2022, arXiv 2210.10760), with the exact
gold utility of the help desk: reward models of several sizes, trained on several numbers of
preferences; best of n by each of them, and PPO without a KL penalty for a long time; gold utility
and proxy score against sqrt(KL). All share one base model and one set of prompts.

    reward-NAME/   train_reward.py on the first groups of preferences; NAME is SIZE-GROUPS
    for-ppo-NAME/  the shared base model with that reward model, normalized on this base's samples
    ppo-NAME-kl-X/ train_policy.py --reward-run for-ppo-NAME --kl-coef X
    rows.jsonl     the pool for best of n: gold and every reward model's score of each response
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from minirlhf.config import TASK_AGAIN, PolicyConfig, RewardConfig
from minirlhf.data.prompts import Prompts
from minirlhf.data.splits import HELPDESK_FILES, file_hashes
from minirlhf.data.tokenizer import fingerprint
from minirlhf.lab.common import (
    Job,
    Rows,
    lab_folder,
    need_files,
    run_jobs,
    run_lab,
    save_picture,
    train_subset,
)
from minirlhf.lab.overoptimization_fit import Study
from minirlhf.lab.overoptimization_page import describe, draw_penalties, draw_scores
from minirlhf.model.loading import load_model, save_model
from minirlhf.rl.reward import Reward, score_responses
from minirlhf.rl.sampling import gold_utility, sample_responses
from minirlhf.rl.task import Task, load_task
from minirlhf.run.command_line import check_ranges, setting
from minirlhf.run.errors import UserError
from minirlhf.run.files import read_file, write_atomically
from minirlhf.run.folder import read_config
from minirlhf.run.terminal import Progress, echo
from train_reward import normalize_scores

import torch

LR = 3e-4  # of PPO; with the script's default, gold peaks within 6 iterations: too few points
CHUNK = 4  # prompts of the pool in one row of rows.jsonl
HELPDESK = "minirlhf.data.helpdesk"


class Scale(NamedTuple):
    """How large the study is."""

    sizes: tuple[str, ...]  # of reward models: LAYERSxWIDTH, smallest first
    groups: tuple[int, ...]  # training preferences, 4 responses and 6 pairs each; fewest first
    epochs: int  # of reward training: with few groups, one pass is too few steps
    sft_sequences: int  # each response of the largest number of groups once
    iterations: int  # of PPO
    batch_size: int
    kl_coefs: tuple[float, ...]  # tried with the weakest reward model, besides 0
    prompts: int  # test prompts of the pool
    pool: int  # responses to each


SCALES = {
    "full": Scale(("1x32", "2x128"), (512, 3072), 2, 12_288, 40, 128, (0.03, 0.1), 64, 256),
    "quick": Scale(("1x32",), (512,), 2, 2048, 40, 64, (0.1,), 32, 64),
    "tiny": Scale(("1x16",), (24,), 1, 64, 6, 8, (0.1,), 4, 8),
}


@dataclasses.dataclass(frozen=True)
class OveroptimizationConfig:
    """Gold and proxy against sqrt(KL), for best of n and PPO, with several reward models."""

    reward_run: str = setting(
        "", "folder of a finished run of train_reward.py: the shared base.pt, and one more "
            "reward.pt")
    task: str = setting("", TASK_AGAIN)
    out: str = setting("runs/overoptimization", "folder of all runs, overoptimization.md, pictures")
    scale: str = setting(
        "full", "full: under 40 minutes on 2 cores; quick: under 3 minutes; tiny: seconds, only "
                "shows that it runs", choices=tuple(SCALES))
    jobs: int = setting(1, "runs at a time, one thread each; as many as there are idle cores", 1)
    seed: int = setting(0, "every random choice is a function of it", 0)

    def check(self) -> None:
        check_ranges(self)
        if not self.reward_run:
            raise UserError("--reward-run is missing: name the folder of a finished run of "
                            "train_reward.py")
        folder = Path(self.reward_run)
        need_files(folder, ("config.json", "base.pt", "reward.pt"),
                   f"python train_reward.py --out {folder}")
        if read_config(RewardConfig, folder / "config.json").task not in ("auto", HELPDESK):
            raise UserError(f"{folder}: was not trained on the help desk, and only the help desk "
                            "has a known gold utility; name another reward run")


# ---- reward models -------------------------------------------------------------------------------


def reward_jobs(config: OveroptimizationConfig) -> dict[str, Job]:
    """Setting SIZE-GROUPS -> the run that trains its reward model.

    All runs of one size start from the same base model: that of --reward-run if it has this size,
    otherwise the one that the run with most groups fine-tunes.
    """
    out = Path(config.out)
    scale = SCALES[config.scale]
    given = read_config(RewardConfig, Path(config.reward_run) / "config.json")
    jobs = {}
    for size in scale.sizes:
        layers, width = map(int, size.split("x"))
        has_this_size = (given.n_layer, given.d_model) == (layers, width)
        largest = str(out / f"reward-{size}-{scale.groups[-1]}")
        base_run = config.reward_run if has_this_size else largest
        for groups in scale.groups:
            name = f"{size}-{groups}"
            trains_base = base_run == largest and groups == scale.groups[-1]
            settings = dataclasses.replace(
                given, data=(train_subset(out, groups),),
                heldout_data=given.heldout_data or HELPDESK_FILES["heldout_data"],
                test_data=given.test_data or HELPDESK_FILES["test_data"], task=HELPDESK,
                init="" if trains_base else str(Path(base_run) / "base.pt"), n_layer=layers,
                d_model=width, sft_sequences=scale.sft_sequences, epochs=scale.epochs,
                seed=config.seed, out=str(out / f"reward-{name}"), resume=False)
            waits_for = largest if base_run == largest and not trains_base else ""
            jobs[name] = Job("train_reward.py", settings, waits_for)
    return jobs


def reward_run_for_ppo(name: str, job: Job, task: Task, config: OveroptimizationConfig) -> str:
    """A folder for train_policy.py: the shared base model and prompts, this job's reward model."""
    folder = Path(config.out) / f"for-ppo-{name}"
    tokenizer = fingerprint(task.sampling.encoding)
    if not (folder / "reward.pt").exists():
        folder.mkdir(exist_ok=True)
        for file in ("base.pt", "config.json"):
            write_atomically(folder / file, read_file(Path(config.reward_run) / file))
        reward_model, _ = load_model(job.folder / "reward.pt", "reward", tokenizer)
        reward_model.score_shift.zero_()
        reward_model.score_scale.fill_(1.0)
        normalize_scores(reward_model, task.base, task.train.first(512), task.sampling)
        save_model(folder / "reward.pt", "reward", reward_model, dict(tokenizer=tokenizer))
    return str(folder)


# ---- policies and the pool -----------------------------------------------------------------------


def policy_jobs(reward_runs: dict[str, str], config: OveroptimizationConfig,
                ) -> dict[tuple[str, float], Job]:
    """(setting, kl_coef) -> a run of PPO.

    Every setting without a KL penalty; the first, weakest reward model with several penalties too.
    """
    scale = SCALES[config.scale]
    weakest = next(iter(reward_runs))
    runs = [(name, 0.0) for name in reward_runs]
    runs += [(weakest, kl_coef) for kl_coef in scale.kl_coefs]
    jobs = {}
    for name, kl_coef in runs:
        settings = PolicyConfig(
            reward_run=reward_runs[name], task=config.task, algorithm="ppo",
            iterations=scale.iterations, batch_size=scale.batch_size,
            minibatch_size=scale.batch_size // 2, lr=LR,
            lr_decay=False, kl_coef=kl_coef, max_kl=1e9, eval_every=scale.iterations,
            eval_prompts=16, test_prompts=16, best_of_n=0, seed=config.seed,
            out=str(Path(config.out) / f"ppo-{name}-kl-{kl_coef:g}"))
        jobs[name, kl_coef] = Job("train_policy.py", settings)
    return jobs


def score_samples(prompts: Prompts, count: int, purpose: str, step: int, task: Task,
                  rewards: dict[str, Reward]) -> dict:
    """Gold and each setting's scores of `count` base-model samples for each prompt, as lists."""
    total = len(prompts.texts) * count
    gold = []
    scores = {name: [] for name in rewards}
    for start in range(0, total, 256):
        rows = list(range(start, min(start + 256, total)))
        batch = prompts.rows([row // count for row in rows])
        samples = sample_responses(task.base, batch, task.sampling, purpose, step, rows)
        gold += [round(x, 4) for x in gold_utility(samples, task.ground_truth)]
        for name, reward in rewards.items():
            scores[name] += [round(x, 5) for x in score_responses(reward, samples).tolist()]
    return dict(gold=gold, scores=scores)


def fill_pool(task: Task, reward_runs: dict[str, str], rows: Rows,
              config: OveroptimizationConfig) -> None:
    """Rows "pool 0", "pool 1", ... of four test prompts each.

    Row "start": the base model on training prompts, from which the gold gained by PPO is counted.
    """
    scale = SCALES[config.scale]
    tokenizer = fingerprint(task.sampling.encoding)
    rewards = {}
    for name, folder in reward_runs.items():
        model, _ = load_model(Path(folder) / "reward.pt", "reward", tokenizer)
        rewards[name] = Reward(name, model, PolicyConfig.missing_eos_penalty)
    rows.get("start", lambda: score_samples(task.train.first(16 * scale.prompts), 1, "start", 0,
                                            task, rewards))

    def compute(chunk: int) -> dict:
        end = min(CHUNK * (chunk + 1), len(task.test.texts))
        prompts = task.test.rows(range(CHUNK * chunk, end))
        return score_samples(prompts, scale.pool, "pool", chunk, task, rewards)

    chunks = range(scale.prompts // CHUNK)
    progress = Progress("pool", len(chunks), sum(f"pool {chunk}" in rows.rows for chunk in chunks))
    for chunk in chunks:
        rows.get(f"pool {chunk}", lambda chunk=chunk: compute(chunk))
        progress.show(chunk + 1, "")


def main(config: OveroptimizationConfig) -> str:
    """Run what is missing, write overoptimization.md and the pictures; returns the page.

    Raises UserError.
    """
    config.check()
    torch.set_num_threads(1)  # small tensors gain little from more, and other runs need the cores
    out = lab_folder(config.out)
    scale = SCALES[config.scale]
    inputs = file_hashes(Path(config.reward_run) / name for name in ("base.pt", "reward.pt"))
    about = dict(scale=scale._asdict(), seed=config.seed, inputs=list(inputs.values()))
    rows = Rows(out / "rows.jsonl", about)
    settings = PolicyConfig(reward_run=config.reward_run, task=config.task, seed=config.seed)
    task = load_task(settings, None, torch.device("cpu"))

    rewards = reward_jobs(config)
    run_jobs(list(rewards.values()), config.jobs, out / "logs")
    reward_runs = {name: reward_run_for_ppo(name, job, task, config)
                   for name, job in rewards.items()}
    reward_runs["default"] = config.reward_run
    policies = policy_jobs(reward_runs, config)
    run_jobs(list(policies.values()), config.jobs, out / "logs")
    fill_pool(task, reward_runs, rows, config)

    reward_folders = {name: job.folder for name, job in rewards.items()}
    reward_folders["default"] = Path(config.reward_run)
    policy_folders = {key: job.folder for key, job in policies.items()}
    study = Study.read(reward_folders, policy_folders, rows.rows, scale.pool)
    page = describe(study)
    write_atomically(out / "overoptimization.md", page.encode())
    echo(f"\n{page}\nsaved {out / 'overoptimization.md'}")
    save_picture(out / "overoptimization.png", lambda axes: draw_scores(axes, study), (10, 7),
                 rows=2, columns=2)
    save_picture(out / "penalty.png", lambda axes: draw_penalties(axes, study), (10, 3.8),
                 columns=2)
    return page


if __name__ == "__main__":
    run_lab(main, OveroptimizationConfig)
