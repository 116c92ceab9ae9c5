"""A pretrained model learns to write positively. `python -m minirlhf.lab.sentiment --help`

    python -m minirlhf.lab.sentiment --init smollm2

After the first experiment of Ziegler et al. (2019, arXiv 1909.08593): a known scorer replaces the
person who compares texts, so the result can be measured. The base model writes openings of texts
and four continuations of each. The ground truth u of a continuation is its sentiment, and a label
prefers a to b with probability sigmoid((u_a - u_b) / 0.25), as sentiment_task.py states.
The reward model learns from the labels alone, the policies (PPO) from the reward model alone. The
base model is not fine-tuned, and a response without EOS has no penalty.

    OUT/prompts.jsonl                   the openings
    OUT/pairs.jsonl, test_pairs.jsonl   six labeled pairs for each, the same for all seeds
    OUT/tokenizer/                      the model's tokenizer without its chat template
    OUT/reward-seedS/                   train_reward.py
    OUT/policy-klX-seedS/               train_policy.py --kl-coef X
    OUT/runs.jsonl                      one line per run: its command and what the page needs
    OUT/sentiment.md, sentiment.png     table and responses, training curves

A stopped study resumes. A seed whose runs are all in runs.jsonl is not repeated, even if their
folders are gone. More seeds can be added later to the same folder.
"""

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.chat_templates import read_chat_template
from minirlhf.data.preference_files import read_prompts, render_prompt
from minirlhf.data.prompts import encode_prompts
from minirlhf.data.tokenizer import fingerprint, load_tokenizer
from minirlhf.evaluation.policy import best_of_n, evaluate_decoding
from minirlhf.lab import common
from minirlhf.lab import sentiment_page as page
from minirlhf.lab import sentiment_task as truth
from minirlhf.lab.common import Job
from minirlhf.model import Transformer, loading
from minirlhf.rl.sampling import SamplingSettings, sample_responses
from minirlhf.rl.task import load_task
from minirlhf.run.command_line import check_ranges, setting
from minirlhf.run.device import pick_device
from minirlhf.run.errors import UserError
from minirlhf.run.files import read_file, write_atomically
from minirlhf.run.seeding import derive_seed
from minirlhf.run.terminal import echo

import tiktoken

MAX_PROMPT, MAX_RESPONSE = 16, 24  # tokens
RESPONSES = 4  # to each opening; all six pairs are labeled (Ouyang et al. 2022)


class Scale(NamedTuple):
    """How large the study is. The settings of training were chosen on seed 0."""

    prompts: int
    test_prompts: int  # of them
    reward_lr: float
    kl_coefs: tuple[float, float]
    iterations: int  # of PPO
    batch_size: int
    lr: float


FULL = Scale(1600, 128, 2e-4, (0.05, 0.15), 25, 64, 1e-4)
QUICK = Scale(40, 12, 1e-3, (0.05, 0.25), 2, 8, 1e-3)


@dataclasses.dataclass(frozen=True)
class SentimentConfig:
    """Positive sentiment from preferences: a pretrained model, a known ground truth, PPO."""

    init: str = setting("", "folder of a pretrained model, as in minirlhf/model/README.md")
    out: str = setting("runs/sentiment", "folder of all runs and results")
    prompts: str = setting("", "text file, an opening per line; empty: the model writes them")
    seeds: int = setting(3, "seeds 0 to N - 1; fewer than three do not show the spread", 1, 100)
    jobs: int = setting(0, "runs at a time, one thread each; 0: one per core", 0)
    bf16: bool = setting(
        True, "round the operands of matrix products to bfloat16; --no-bf16 for a processor that "
              "has no such products")
    quick: bool = setting(False, "few pairs and steps, without --init on a random model: only "
                                 "shows that it runs")

    @property
    def scale(self) -> Scale:
        return QUICK if self.quick else FULL

    def path(self, name: str) -> str:
        return str(Path(self.out) / name)


def check(config: SentimentConfig) -> None:
    """Raise UserError with the fix if a run is missing and cannot start."""
    if not config.quick and truth.scorer()[0] != "VADER":
        raise UserError("the ground truth needs VADER: pip install vaderSentiment")
    if config.init or not config.quick:
        start = RewardConfig(init=config.init)
        loading.start_files(start)  # UserError if there is no such file or folder
        if loading.pretrained_folder(start) is None:
            raise UserError(f"--init {config.init}: must name the folder of a pretrained model, as "
                            "in minirlhf/model/README.md")


# ---- data ----------------------------------------------------------------------------------------


def write_data(config: SentimentConfig) -> None:
    """prompts.jsonl, test_pairs.jsonl and pairs.jsonl, each once. Raises UserError."""
    prompts, test, train = (Path(config.path(name)) for name in
                            ("prompts.jsonl", "test_pairs.jsonl", "pairs.jsonl"))
    if train.exists():  # the last one
        return
    if config.init:
        write_plain_tokenizer(config)
    start = reward_job(config, 0).config
    encoding = load_tokenizer(loading.tokenizer_name(start))
    base = loading.initial_base_model(start, encoding).to(pick_device("auto"))
    base.bf16 = config.bf16
    if not prompts.exists():
        texts = list(dict.fromkeys(find_prompts(config, base, encoding)))
        random.Random(derive_seed(0, "prompts")).shuffle(texts)
        if len(texts) < 2 * config.scale.test_prompts:
            raise UserError(f"only {len(texts)} different openings; give at least "
                            f"{2 * config.scale.test_prompts} with --prompts FILE")
        write_records(prompts, [dict(prompt=text) for text in texts[:config.scale.prompts]])
    texts = read_prompts(str(prompts), template=read_chat_template(start.tokenizer))
    answers = sample(base, encoding, [text for text in texts for _ in range(RESPONSES)], "pairs",
                     (MAX_PROMPT, MAX_RESPONSE))
    pairs = [truth.labeled(number, text, answers[RESPONSES * number:][:RESPONSES])
             for number, text in enumerate(texts)]
    write_records(test, pairs[:config.scale.test_prompts])
    write_records(train, pairs[config.scale.test_prompts:])


def write_records(path: Path, records: list[dict]) -> None:
    write_atomically(path, b"".join(map(common.as_line, records)))
    echo(f"saved {path}")


def write_plain_tokenizer(config: SentimentConfig) -> None:
    """OUT/tokenizer: without a chat template, a prompt is the beginning of a text."""
    source = loading.pretrained_folder(RewardConfig(init=config.init))
    folder = Path(config.path("tokenizer"))
    folder.mkdir(exist_ok=True)
    for path in source.glob("*.json"):
        shutil.copy(path, folder)
    path = folder / "tokenizer_config.json"
    options = json.loads(read_file(path)) if path.exists() else {}
    options.pop("chat_template", None)
    write_atomically(path, json.dumps(options).encode())


def find_prompts(config: SentimentConfig, base: Transformer,
                 encoding: tiktoken.Encoding) -> Iterable[str]:
    """Openings: of --prompts, or how the model begins to write about the topics.

    Its samples without a prompt are often code or markup. So it answers requests, in its chat
    template. Those of --quick are the requests, because a random model cannot write.
    """
    if config.prompts:
        lines = read_file(config.prompts).decode(errors="replace").splitlines()
        return filter(None, map(str.strip, lines))
    if config.quick:
        return truth.REQUESTS
    template = read_chat_template(config.init)
    texts = [render_prompt(request, template) for request in truth.REQUESTS]
    found: dict[str, None] = {}
    for step in range(4 * config.scale.prompts // len(texts)):  # a fourth must be usable
        answers = sample(base, encoding, texts, f"openings {step}", (truth.REQUEST, truth.OPENING))
        for number, answer in enumerate(answers):
            found |= dict.fromkeys(truth.opening(answer, encoding, derive_seed(0, step, number)))
        echo(f"openings: {len(found)}, needed: {config.scale.prompts}")
        if len(found) >= config.scale.prompts:
            break
    return found


def sample(base: Transformer, encoding: tiktoken.Encoding, texts: list[str], purpose: str,
           lengths: tuple[int, int]) -> list[str]:
    """One response to each prompt. lengths: at most, of prompt and response, in tokens."""
    prompts = encode_prompts(texts, encoding, lengths[0])
    settings = SamplingSettings(encoding, lengths[1], 1.0, 0)  # seed 0 for all seeds of the study
    responses = []
    for start in range(0, len(texts), 64):
        rows = list(range(start, min(start + 64, len(texts))))
        samples = sample_responses(base, prompts.rows(rows), settings, purpose, 0, rows)
        responses += [text.replace("\0", " ") for text in samples.responses]  # no data has a NUL
    return responses


# ---- runs ----------------------------------------------------------------------------------------


def reward_job(config: SentimentConfig, seed: int) -> Job:
    start: dict = dict(n_layer=1, d_model=32)
    if config.init:
        start = dict(init=config.init, tokenizer=config.path("tokenizer"))
    return Job("train_reward.py", RewardConfig(
        data=(config.path("pairs.jsonl"),), test_data=(config.path("test_pairs.jsonl"),),
        holdout=0.05, task="minirlhf.lab.sentiment_task", sft_sequences=0,
        lr=config.scale.reward_lr, max_prompt_length=MAX_PROMPT, max_response_length=MAX_RESPONSE,
        normalize_prompts=128, save_every=50, keep_checkpoints=1, bf16=config.bf16, seed=seed,
        out=config.path(f"reward-seed{seed}"), **start))


def policy_job(config: SentimentConfig, kl_coef: float, seed: int) -> Job:
    scale = config.scale
    reward_run = config.path(f"reward-seed{seed}")
    return Job("train_policy.py", PolicyConfig(
        reward_run=reward_run, kl_coef=kl_coef, seed=seed, iterations=scale.iterations,
        batch_size=scale.batch_size, ppo_epochs=1, minibatch_size=scale.batch_size // 4,
        lr=scale.lr, missing_eos_penalty=0.0, max_kl=1e6, eval_every=scale.iterations,
        eval_prompts=16, test_prompts=16, best_of_n=0, keep_checkpoints=1, bf16=config.bf16,
        out=config.path(f"policy-kl{kl_coef:g}-seed{seed}")), reward_run)


def measure(job: Job) -> dict:
    """A line of runs.jsonl.

    Of a reward run: the reward model on test pairs, the base model and its best of n. Of a policy
    run: the policy, and the metrics of each iteration's responses.
    """
    device = pick_device("auto")
    config = job.config if job.needs else PolicyConfig(
        reward_run=job.config.out, seed=job.config.seed, missing_eos_penalty=0.0,
        bf16=job.config.bf16)
    task = load_task(config, None, device)
    if job.needs:
        model, _ = loading.load_model(job.folder / "policy.pt", "policy",
                                      fingerprint(task.sampling.encoding))
        model.bf16 = config.bf16
        rows = common.read_rows(job.folder / "policy_metrics.jsonl")
        more = dict(curves={key: [row[key] for row in rows if row["step"]]
                            for key, _ in page.CURVES})
    else:
        model = task.base
        metrics = common.reward_test_rows(job.folder)[0]
        more = {key: metrics[key] for key in ("accuracy", "ceiling", "gold_correlation")}
        more |= dict(prompts=task.test.texts[:page.SHOWN],
                     best_of_n=best_of_n(task, task.test, (2, 4, 8)))
    result = evaluate_decoding(model.to(device), task, task.test, False, "study")
    echo(f"measured {job.folder.name}")
    return dict(command=common.command_of(job)) | page.describe(result) | more


def scorer_name(config: SentimentConfig) -> str:
    return truth.scorer()[0] if config.quick else "VADER"  # drawing again needs no scorer


def run_study(config: SentimentConfig) -> dict[str, dict]:
    """Run and measure what is missing; returns the lines of runs.jsonl by key. Raises UserError."""
    path = Path(config.path("runs.jsonl"))
    finished = {row.get("key") for row in common.read_rows(path)}
    jobs: list[Job] = []
    for seed in range(config.seeds):
        of_seed = [reward_job(config, seed),
                   *(policy_job(config, kl_coef, seed) for kl_coef in config.scale.kl_coefs)]
        if any(job.folder.name not in finished for job in of_seed):
            jobs += of_seed
    if jobs:
        check(config)
    about = [config.init, config.prompts, config.scale, config.bf16, scorer_name(config)]
    rows = common.Rows(path, dict(settings=about))
    if jobs:
        write_data(config)
        common.run_jobs(jobs, config.jobs or os.cpu_count() or 1, Path(config.path("logs")),
                        lambda job: rows.get(job.folder.name, lambda: measure(job)))
    return rows.rows


def main(config: SentimentConfig) -> str:
    """Run what is missing, write page and picture; returns the page. Raises UserError."""
    check_ranges(config)
    out = common.lab_folder(config.out)
    rows = run_study(config)
    seeds = range(config.seeds)
    base = [rows[f"reward-seed{seed}"] for seed in seeds]
    policies = {f"--kl-coef {kl_coef:g}": [rows[f"policy-kl{kl_coef:g}-seed{seed}"]
                                           for seed in seeds] for kl_coef in config.scale.kl_coefs}
    about = scorer_name(config) + "." + " A quick run: no number means anything." * config.quick
    text = page.write_page(common.flags_of(config), about, base, policies)
    write_atomically(out / "sentiment.md", text.encode())
    echo(f"\n{page.result_table(base, policies)}\nsaved {out / 'sentiment.md'}")
    title = f"responses of each iteration, mean and 95% interval over {config.seeds} seeds"
    common.save_picture(out / "sentiment.png", lambda axes: page.draw(axes, policies), (9, 6), 2, 2,
                        title)
    return text


if __name__ == "__main__":
    common.run_lab(main, SentimentConfig)
