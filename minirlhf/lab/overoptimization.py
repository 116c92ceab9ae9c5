"""How far can a reward model be trusted? `python -m minirlhf.lab.overoptimization --help`

The study of Gao, Schulman and Hilton (2022, arXiv 2210.10760) in miniature, against the task's exact gold utility: reward
models of several sizes, learnt from several numbers of preferences; the best of n replies by each, and PPO without a KL
penalty pushed far; gold and proxy scores against sqrt(KL). One policy base and one set of prompts for all.

    reward-NAME/   train_reward.py on the first so many groups of the training preferences, SIZE-GROUPS
    arena-NAME/    the policy's base beside that reward model, its scores normalised on this base's samples
    ppo-NAME-kl-X/ train_policy.py --reward-run arena-NAME --kl-coef X
    rows.jsonl     the pool for best of n, chunk by chunk: gold and every reward model's score of each reply
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from minirlhf.checkpoint import load_model, save_model, write_atomically
from minirlhf.config import PolicyConfig, RewardConfig, UserError
from minirlhf.environment import Environment, Prompts, Samples, load_environment, model_scorer, sample_responses
from minirlhf.flags import check_ranges, read_config, setting
from minirlhf.lab.common import Job, Rows, need_files, run_jobs, run_lab, save_picture, train_subset
from minirlhf.lab.overoptimization_fit import Study
from minirlhf.lab.overoptimization_page import describe, draw_penalties, draw_scores
from minirlhf.log import Progress
from minirlhf.task import HELPDESK, file_hashes
from minirlhf.tokenizer import fingerprint
from train_reward import normalise_scores

LR = 3e-4  # of PPO: the script's own passes the peak of gold within half a dozen iterations, too few points to see it by


class Scale(NamedTuple):
    sizes: tuple[str, ...]  # LAYERSxWIDTH, smallest first
    groups: tuple[int, ...]  # of training preferences, four replies and six pairs each; fewest first
    epochs: int  # of reward training: with few groups one pass is too few steps to learn anything
    warmup_sequences: int  # read by a base model: each reply of the largest number of groups once
    iterations: int  # of PPO
    batch_size: int
    kl_coefs: tuple[float, ...]  # tried on the smallest setting, beside 0
    prompts: int  # test prompts of the pool
    pool: int  # replies to each


SCALES = {
    "full": Scale(("1x32", "2x128"), (512, 3072), 2, 12_288, 40, 128, (0.03, 0.1), 64, 256),
    "quick": Scale(("1x32",), (512,), 2, 2048, 40, 64, (0.1,), 32, 64),
    "tiny": Scale(("1x16",), (24,), 1, 64, 6, 8, (0.1,), 4, 8),
}


@dataclasses.dataclass(frozen=True)
class OveroptimizationConfig:
    """Gold and proxy scores against sqrt(KL), for best of n and for PPO, under reward models of several sizes and diets."""

    reward_run: str = setting("", "folder that train_reward.py made: everybody's base.pt, and one reward.pt more")
    out: str = setting("runs/overoptimization", "folder of all runs, overoptimization.md and the pictures")
    scale: str = setting("full", "full: under 40 minutes on 2 cores; quick: under 3; tiny: seconds, means nothing",
                         choices=tuple(SCALES))
    jobs: int = setting(1, "runs at a time, one thread each; as many as there are idle cores", 1)
    seed: int = setting(0, "every random choice derives from it", 0)

    def check(self) -> None:
        check_ranges(self)
        if not self.reward_run:
            raise UserError("--reward-run is missing: name the folder of a finished train_reward.py")
        need_files(Path(self.reward_run), ("config.json", "base.pt", "reward.pt"),
                   f"python train_reward.py --out {self.reward_run}")
        if read_config(RewardConfig, Path(self.reward_run) / "config.json").task not in ("auto", "minirlhf.helpdesk"):
            raise UserError(f"{self.reward_run}: is not about the embedded task, and only there is the truth known")


# ---- reward models ---------------------------------------------------------------------------------------------------

def reward_jobs(config: OveroptimizationConfig) -> dict[str, Job]:
    """Setting -> the run that trains its reward model. The one with most groups warms up a base model of its size, from which
    those with fewer start too; where the size is that of the reward run, all start from its base model."""
    out, scale, jobs = Path(config.out), SCALES[config.scale], {}
    theirs = read_config(RewardConfig, Path(config.reward_run) / "config.json")
    for size in scale.sizes:
        layers, width = map(int, size.split("x"))
        most = str(out / f"reward-{size}-{scale.groups[-1]}")
        known = config.reward_run if (theirs.n_layer, theirs.d_model) == (layers, width) else most
        for groups in scale.groups:
            name, first = f"{size}-{groups}", known == most and groups == scale.groups[-1]
            jobs[name] = Job("train_reward.py", dataclasses.replace(
                theirs, data=(train_subset(out, groups),), heldout_data=theirs.heldout_data or (HELPDESK["heldout"],),
                test_data=theirs.test_data or (HELPDESK["test"],), task="minirlhf.helpdesk",
                init="" if first else str(Path(known) / "base.pt"), n_layer=layers, d_model=width,
                warmup_sequences=scale.warmup_sequences, epochs=scale.epochs, seed=config.seed,
                out=str(out / f"reward-{name}"), resume=False), "" if first or known != most else most)
    return jobs


def make_arena(name: str, job: Job, world: Environment, config: OveroptimizationConfig) -> str:
    """A reward run's folder for train_policy.py: everybody's base and prompts, this setting's reward model."""
    folder, mark = Path(config.out) / f"arena-{name}", fingerprint(world.sampling.encoding)
    if not (folder / "reward.pt").exists():
        folder.mkdir(exist_ok=True)
        for file in ("base.pt", "config.json"):
            write_atomically(folder / file, (Path(config.reward_run) / file).read_bytes())
        reward_model, _ = load_model(job.folder / "reward.pt", "reward", mark)
        reward_model.score_shift.zero_()
        reward_model.score_scale.fill_(1.0)
        normalise_scores(reward_model, world.base, world.train.first(512), world.sampling)
        save_model(folder / "reward.pt", "reward", reward_model, dict(tokenizer=mark))
    return str(folder)


# ---- policies and the pool -------------------------------------------------------------------------------------------

def policy_jobs(arenas: dict[str, str], config: OveroptimizationConfig) -> dict[tuple[str, float], Job]:
    """(setting, kl_coef) -> PPO's run: no penalty for every setting, several penalties for the first, the weakest."""
    scale, jobs = SCALES[config.scale], {}
    wanted = [(name, 0.0) for name in arenas] + [(next(iter(arenas)), kl_coef) for kl_coef in scale.kl_coefs]
    for name, kl_coef in wanted:
        jobs[name, kl_coef] = Job("train_policy.py", PolicyConfig(
            reward_run=arenas[name], algorithm="ppo", kl_coef=kl_coef, iterations=scale.iterations, batch_size=scale.batch_size,
            minibatch_size=scale.batch_size // 2, lr=LR, lr_decay=False, max_kl=1e9, eval_every=scale.iterations,
            eval_prompts=16, test_prompts=16, best_of_n=0, seed=config.seed,
            out=str(Path(config.out) / f"ppo-{name}-kl-{kl_coef:g}")))
    return jobs


@torch.no_grad()
def judge_replies(prompts: Prompts, count: int, purpose: str, step: int, world: Environment, scorers: dict) -> dict:
    """gold and, by setting, scores of `count` samples of the base model for each prompt: lists, prompt by prompt."""
    texts, ids = ([x for x in column for _ in range(count)] for column in prompts)
    gold, scores = [], {name: [] for name in scorers}
    for start in range(0, len(texts), 256):
        some = slice(start, start + 256)
        samples: Samples = sample_responses(world.base, texts[some], ids[some], world.sampling, purpose, step,
                                            list(range(len(texts)))[some])
        gold += [round(x, 4) for x in samples.gold(world.task)]
        for name, scorer in scorers.items():
            scores[name] += [round(x, 5) for x in scorer(samples).tolist()]
    return dict(gold=gold, scores=scores)


def fill_pool(world: Environment, arenas: dict[str, str], rows: Rows, config: OveroptimizationConfig) -> None:
    """Rows "pool 0", "pool 1", ... of four test prompts each, and "start": what the base model is worth on training prompts."""
    scale, mark = SCALES[config.scale], fingerprint(world.sampling.encoding)
    scorers = {name: model_scorer(load_model(Path(arena) / "reward.pt", "reward", mark)[0].requires_grad_(False),
                                  PolicyConfig.missing_eos_penalty) for name, arena in arenas.items()}
    some = Prompts(world.train.texts[: 16 * scale.prompts], world.train.ids[: 16 * scale.prompts])
    rows.get("start", lambda: judge_replies(some, 1, "start", 0, world, scorers))
    chunks = range(scale.prompts // 4)
    progress = Progress("pool", len(chunks), sum(f"pool {chunk}" in rows.rows for chunk in chunks))
    for chunk in chunks:
        prompts = Prompts(*(column[4 * chunk: 4 * chunk + 4] for column in world.test))
        rows.get(f"pool {chunk}", lambda p=prompts, c=chunk: judge_replies(p, scale.pool, "pool", c, world, scorers))
        progress.show(chunk + 1, "")


def main(config: OveroptimizationConfig) -> str:
    """Run what is missing; write overoptimization.md and the pictures; return the page. Raises UserError."""
    config.check()
    torch.set_num_threads(1)  # small tensors gain little from more, and the processes beside this one want their cores
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    about = dict(scale=SCALES[config.scale]._asdict(), seed=config.seed,
                 inputs=list(file_hashes(Path(config.reward_run) / name for name in ("base.pt", "reward.pt")).values()))
    rows = Rows(out / "rows.jsonl", about)
    world = load_environment(PolicyConfig(reward_run=config.reward_run, seed=config.seed), None, torch.device("cpu"))
    rewards = reward_jobs(config)
    run_jobs(list(rewards.values()), config.jobs, out / "logs")
    arenas = {name: make_arena(name, job, world, config) for name, job in rewards.items()} | {"default": config.reward_run}
    policies = policy_jobs(arenas, config)
    run_jobs(list(policies.values()), config.jobs, out / "logs")
    fill_pool(world, arenas, rows, config)
    judges = {name: Path(config.reward_run) if name == "default" else rewards[name].folder for name in arenas}
    study = Study.read(judges, {key: job.folder for key, job in policies.items()}, rows.rows, SCALES[config.scale].pool)
    page = describe(study)
    write_atomically(out / "overoptimization.md", page.encode())
    print(f"\n{page}\nsaved {out / 'overoptimization.md'}")
    save_picture(out / "overoptimization.png", lambda axes: draw_scores(axes, study), nrows=2, ncols=2, figsize=(10, 7),
                 layout="constrained")
    save_picture(out / "penalty.png", lambda axes: draw_penalties(axes, study), ncols=2, figsize=(10, 3.8), layout="constrained")
    return page


if __name__ == "__main__":
    run_lab(main, OveroptimizationConfig)
