"""The settings of the two scripts: each field is a flag, with its default, the reason for it, and what is allowed."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from minirlhf.flags import UserError, check_ranges, setting
from minirlhf.flags import run_script as run_script  # with "as": this page offers it too

DATA = Path(__file__).resolve().parent.parent / "data"
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What both scripts take: where and how to run, whatever is learnt."""

    out: str = setting("", "run folder; empty: a fresh one under runs/")
    seed: int = setting(0, "every random choice derives from it", 0)
    bf16: bool = setting(False, "round the operands of matrix products to bfloat16: twice as fast or more on a GPU")
    compile: bool = setting(False, "torch.compile the blocks: a minute at the start, faster steps on a GPU")
    shard: bool = setting(False, "under torchrun: split weights, gradients and Adam's state over the processes (FSDP2)")
    device: str = setting("auto", "auto takes cuda when there is one, else cpu", choices=DEVICES)
    deterministic: bool = setting(False, "no CUDA kernel whose sums vary: resumes bit for bit there too, more slowly")
    resume: bool = setting(False, "go on with the run in --out")
    keep_checkpoints: int = setting(2, "so many of the newest are kept while the run lasts", 1)
    tensorboard: bool = setting(False, "write event files too, if tensorboard is installed")


@dataclasses.dataclass(frozen=True)
class RewardConfig(RunConfig):
    """Warm up a base language model (or take --init), then learn a reward model from preference pairs."""

    data: tuple[str, ...] = setting((), "preference files to learn from; empty: the embedded help desk")
    heldout_data: tuple[str, ...] = setting((), "preference files to choose on; empty: the task's own, or --holdout of --data")
    test_data: tuple[str, ...] = setting((), "preference files to report on; empty: the task's own, or the held-out pairs")
    holdout: float = setting(0.1, "share of the prompts of --data held out when no file is named for it", 0.01, 0.9)
    skip_bad_lines: bool = setting(False, "count and skip lines that cannot be read, instead of stopping")
    tokenizer: str = setting("helpdesk", "the shipped ranks, a .tiktoken file, or any tiktoken encoding by name (gpt2)")
    init: str = setting("", "start from a base.pt, or GPT-2's model.safetensors or pytorch_model.bin, and skip the warm-up")
    warmup_init: bool = setting(False, "warm that one up too: GPT-2 has yet to learn where a reply ends")
    init_reward: str = setting("", "go on from this earlier reward.pt, with the base.pt beside it; skips the warm-up")
    n_layer: int = setting(2, "transformer blocks; two are enough to copy a colour from prompt to reply", 1)
    n_head: int = setting(4, "attention heads; must divide --d-model", 1)
    d_model: int = setting(128, "width; at 0.5M parameters both scripts take minutes on two cores", 1)
    max_prompt_length: int = setting(48, "tokens; longer prompts lose their beginning", 1)
    max_response_length: int = setting(80, "tokens, EOS included; longer responses lose their end", 1)
    warmup_sequences: int = setting(12_288, "texts the base model reads, an eighth of the task's; more make it little better", 0)
    warmup_batch_size: int = setting(16, "texts per step; small batches learn to copy sooner", 1)
    warmup_lr: float = setting(4e-3, "peak Adam step of the warm-up; found on the validation prompts", 0)
    epochs: int = setting(1, "passes over the preferences; a second one overfits (Stiennon et al. 2020)", 1)
    batch_size: int = setting(8, "prompts per step, each with all its pairs (Ouyang et al. 2022); 16 learnt less in as long", 1)
    lr: float = setting(1e-3, "peak Adam step of the reward model", 0)
    centering: float = setting(0.0, "weight of (r_w + r_l)^2, which pins the free constant; off: scores are normalised later", 0)
    verdict_coef: float = setting(1.0, "weight of the same loss on the sum of every token's verdict; halves the steps needed", 0)
    weight_decay: float = setting(0.01, "of the matrices, not of the biases, gains or embeddings", 0)
    max_grad_norm: float = setting(1.0, "gradient norm is clipped here; logged before clipping", 0)
    micro_batch_size: int = setting(0, "prompts or texts per forward pass; 0: the whole batch. Less memory, the same gradient", 0)
    normalise_prompts: int = setting(512, "base-policy samples over which scores are made mean 0, deviation 1", 2)
    task: str = setting("auto", "module that knows the truth of the task (gold, probes); auto: the help desk's for its files")
    save_every: int = setting(200, "steps between checkpoints", 1)

    presets: ClassVar[dict[str, dict]] = {  # --preset NAME: what lies under the flags; what it does not name keeps its default
        "helpdesk": {},  # the defaults were found on its validation prompts
        "hh-gpt2": dict(  # GPT-2 small on HH-RLHF, with --init and --data; nobody has searched these on the full set yet
            tokenizer="gpt2",
            n_layer=12, n_head=12, d_model=768,  # the same shape without --init; random weights want --warmup-lr 6e-4
            max_prompt_length=256, max_response_length=128,  # whole: 95% of prompts, 97% of replies in 420 of its pairs
            holdout=0.02,  # of tens of thousands of pairs that is plenty
            skip_bad_lines=True,  # in some pairs the two dialogues share no beginning
            warmup_init=True, warmup_sequences=32_768, warmup_lr=5e-5,  # some of its texts, in small steps
            lr=1e-5,  # of the order of Stiennon et al. (2020), 1.5e-5
            batch_size=32, micro_batch_size=8,  # HH has one pair a prompt, and 64 rows of 384 tokens are too many at a time
            verdict_coef=0.0,  # found to help where responses are short and alike; not known for dialogue
            save_every=500),  # a checkpoint with its optimiser is 1.5 GB
        "debug": dict(  # both scripts in seconds, every stage of them
            data=(str(DATA / "helpdesk-validation.jsonl"),),
            n_layer=1, d_model=32, warmup_sequences=512, normalise_prompts=32),
    }

    def check(self) -> None:
        """Raises UserError for the first setting that is wrong, or that contradicts another."""
        check_ranges(self)
        if self.d_model % self.n_head:
            raise UserError(f"--n-head {self.n_head} does not divide --d-model {self.d_model}; try --n-head 4")
        if self.init and self.init_reward:
            raise UserError("--init-reward brings the base.pt beside it; leave out --init")


@dataclasses.dataclass(frozen=True)
class PolicyConfig(RunConfig):
    """Train a language model as a policy against a reward model (or any function of prompt and response)."""

    reward_run: str = setting("", "folder that train_reward.py made; empty: the newest finished one under runs/")
    prompts: str = setting("", "file of prompts; empty: the prompts of the reward run's data")
    algorithm: str = setting("ppo", "rung of the ladder: reinforce, reward-to-go, baseline, gae, ppo, rloo, grpo, or your own")
    reward: str = setting("", "module:function(prompts, responses) -> scores, in place of the reward model")
    iterations: int = setting(60, "rounds of sample, score, update; the gold utility is flat by then", 1)
    batch_size: int = setting(128, "responses sampled per iteration", 1)
    group_size: int = setting(4, "responses per prompt where siblings are the baseline (rloo, grpo)", 2)
    ppo_epochs: int = setting(2, "passes over each rollout (ppo, grpo); four were unstable at this size", 1)
    minibatch_size: int = setting(64, "responses per optimiser step (ppo, grpo); the other rungs take one step a rollout", 1)
    micro_batch_size: int = setting(0, "responses per forward pass; 0: the whole minibatch. Less memory, the same gradient", 0)
    lr: float = setting(5e-4, "Adam step; larger ones blew up", 0)
    lr_decay: bool = setting(True, "linear to 0 over the run (Huang et al. 2024, detail 7)")
    kl_coef: float = setting(0.025, "price of a nat of divergence from the base model, in standard deviations of the score", 0)
    kl_target: float = setting(0.0, "adapt kl_coef to hold the KL at this many nats; 0: keep it fixed", 0)
    kl_horizon: int = setting(10_000, "responses over which the adaptive coefficient moves (Ziegler et al. 2019)", 1)
    gamma: float = setting(1.0, "no discount: a reply is short, and its score counts in full for every token", 0, 1)
    lam: float = setting(0.95, "GAE's mix of bias and variance (Schulman et al. 2016)", 0, 1)
    clip_range: float = setting(0.2, "of the importance ratio (Schulman et al. 2017)", 0)
    value_clip_range: float = setting(0.2, "of the value's move per rollout; 0: no clipping", 0)
    vf_coef: float = setting(0.1, "weight of the value loss (Ziegler et al. 2019)", 0)
    value_lr_scale: float = setting(10.0, "the value head's step in units of --lr: it starts at 0, and has a run to grow in", 0)
    ent_coef: float = setting(0.0, "entropy bonus in nats per token; off: the KL penalty already keeps breadth", 0)
    whiten: str = setting("auto", "advantages to mean 0, deviation 1 over the rollout; auto: the rung's own choice",
                          choices=("auto", "on", "off"))
    temperature: float = setting(1.0, "of sampling, in policy and reference alike", 1e-3)
    missing_eos_penalty: float = setting(1.0, "taken from the score of a reply cut by length; it never ended", 0)
    max_response_length: int = setting(0, "tokens, EOS included; 0: the reward run's", 0)
    max_grad_norm: float = setting(1.0, "gradient norm is clipped here; logged before clipping", 0)
    max_kl: float = setting(200.0, "stop when the KL passes so many nats: the policy has left the language", 0)
    eval_every: int = setting(20, "iterations between evaluations on the validation prompts", 1)
    eval_prompts: int = setting(256, "validation prompts per evaluation", 1)
    test_prompts: int = setting(512, "test prompts of the closing table, if there are as many; fewer say little", 1)
    best_of_n: int = setting(128, "test prompts of the best-of-n rows; 0: leave them out", 0)
    save_every: int = setting(10, "iterations between checkpoints", 1)

    presets: ClassVar[dict[str, dict]] = {
        "helpdesk": {},
        "hh-gpt2": dict(
            iterations=200, lr=1e-5,  # that of Huang et al. (2024) for this model
            kl_coef=0.05,  # a common choice for PPO on dialogue (it is TRL's default)
            micro_batch_size=16,  # rows of up to 384 tokens, with their activations
            eval_prompts=128, test_prompts=256, best_of_n=32,  # replies take seconds here, not milliseconds
            save_every=25),
        "debug": dict(
            iterations=4, batch_size=16, minibatch_size=8, eval_every=2, eval_prompts=16, test_prompts=16, best_of_n=4),
    }

    def check(self) -> None:
        """Raises UserError for the first setting that is wrong, or that contradicts another."""
        check_ranges(self)
        if self.kl_target and not self.kl_coef:
            raise UserError("--kl-target adapts --kl-coef by factors, and 0 stays 0; leave out --kl-coef 0, or the target")
