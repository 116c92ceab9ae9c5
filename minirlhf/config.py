"""All settings of the two scripts: each field is a flag, with its default and the reason for it."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from minirlhf.run.command_line import check_ranges, setting
from minirlhf.run.errors import UserError

DATA = Path(__file__).resolve().parent.parent / "data"
MAX_SIZE = 2**16  # of a batch, a text or a layer; more is a mistake and would fill the memory
DEVICES = ("auto", "cpu", "cuda", "mps")
SENSITIVITY = "(minirlhf/lab/SENSITIVITY.md)"
TASK_AGAIN = ("the reward run's --task, if it is a module of your own: code that only a file names "
              "is not run; none: without ground truth")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings of both scripts: where and how to run."""

    out: str = setting("", "run folder; empty: a new one under runs/")
    seed: int = setting(0, "every random choice is a function of it", 0)
    bf16: bool = setting(
        False, "round the operands of matrix products to bfloat16: faster if the hardware has it")
    compile: bool = setting(
        False, "torch.compile the blocks: a minute at the start, then faster steps on a GPU")
    shard: bool = setting(
        False, "with torchrun: split weights, gradients and optimizer state over processes (FSDP2)")
    device: str = setting("auto", "auto: cuda if there is one, otherwise cpu; the variable "
                                  "CUDA_VISIBLE_DEVICES=3 chooses a GPU", choices=DEVICES)
    deterministic: bool = setting(
        False, "only CUDA kernels with reproducible sums: exact resume there too, but slower")
    resume: bool = setting(False, "resume the run in --out")
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints to keep", 1)
    tensorboard: bool = setting(False, "also write event files, if tensorboard is installed")


@dataclasses.dataclass(frozen=True)
class RewardConfig(RunConfig):
    """Fine-tune a base language model, then train a reward model on preference pairs."""

    data: tuple[str, ...] = setting(
        (), "preference files to train on; empty: the embedded help desk")
    heldout_data: tuple[str, ...] = setting(
        (), "preference files for choosing settings; empty: the task's own, or --holdout of --data")
    test_data: tuple[str, ...] = setting(
        (), "preference files for final numbers; empty: the task's own, or the held-out pairs")
    holdout: float = setting(
        0.1, "fraction of the prompts of --data to hold out without --heldout-data", 0.01, 0.9)
    skip_bad_lines: bool = setting(
        False, "count and skip lines that cannot be read, instead of stopping")
    tokenizer: str = setting(
        "auto", "helpdesk (shipped), a .tiktoken file, a model's folder, or a tiktoken encoding's "
                "name (gpt2); auto: that of --init, or helpdesk")
    init: str = setting(
        "", "start from a base.pt, or the folder of a pretrained model (GPT-2, Llama 3, SmolLM2, "
            "Qwen 2.5 or 3), without supervised fine-tuning")
    sft_init: bool = setting(
        False, "fine-tune the model of --init too: GPT-2 has not learned to end a response")
    init_reward: str = setting(
        "", "start from this earlier reward.pt and the base.pt next to it, without supervised "
            "fine-tuning")
    n_layer: int = setting(
        2, "transformer blocks; two suffice to copy a color from prompt to response", 1, 1000)
    n_head: int = setting(4, "attention heads; must divide --d-model", 1, MAX_SIZE)
    d_model: int = setting(
        128, "width; with 0.5M parameters both scripts take minutes on two cores", 1, MAX_SIZE)
    max_prompt_length: int = setting(
        48, "tokens; longer prompts lose their beginning", 1, MAX_SIZE)
    max_response_length: int = setting(
        80, "tokens, EOS included; longer responses lose their end", 1, MAX_SIZE)
    sft_sequences: int = setting(
        12_288, "texts for supervised fine-tuning, an eighth of the task's; more help little", 0)
    sft_batch_size: int = setting(
        16, "texts in an optimizer step; small batches learn to copy earlier", 1, MAX_SIZE)
    sft_lr: float = setting(
        4e-3, "peak learning rate of supervised fine-tuning; best on the held-out prompts", 0, 1)
    epochs: int = setting(
        1, "passes over the preferences; a second one overfits (Stiennon et al. 2020). 0: only "
           "base.pt, for --algorithm dpo", 0)
    batch_size: int = setting(
        8, "prompts in an optimizer step, each with all its pairs (Ouyang et al. 2022); 16 learned "
           "less in the same time", 1, MAX_SIZE)
    lr: float = setting(1e-3, "peak learning rate of the reward model", 0, 1)
    centering: float = setting(
        0.0, "weight of (r_w + r_l)^2, which fixes the free constant; off: scores are normalized "
             "after training", 0)
    auxiliary_coef: float = setting(
        0.0, "weight of an auxiliary loss on the sum of per-token scores; 1 learns in fewer steps",
        0)
    weight_decay: float = setting(
        0.01, "of matrices; biases, norms and embeddings do not decay", 0, 1)
    max_grad_norm: float = setting(1.0, "clip the gradient norm here; logged before clipping", 0)
    micro_batch_size: int = setting(
        0, "prompts or texts in a forward pass; 0: the whole batch. Less memory, same gradient", 0,
        MAX_SIZE)
    normalize_prompts: int = setting(
        512, "base-model samples on which scores are scaled to mean 0, standard deviation 1", 2)
    task: str = setting(
        "auto", "module with the task's ground truth (gold, probes); auto: the help desk's if all "
                "prompts are of its form")
    save_every: int = setting(200, "steps between checkpoints", 1)

    # --preset NAME: flags override these; all other settings keep their defaults
    presets: ClassVar[dict[str, dict]] = {
        "helpdesk": {},  # the defaults were chosen on its held-out prompts
        # a pretrained model of --init on HH-RLHF, with --data; not tuned on the full data set
        "hh": dict(
            bf16=True,  # float32 products use only a fraction of a GPU
            # 95% of prompts and 97% of responses in 420 pairs fit
            max_prompt_length=256, max_response_length=128,
            holdout=0.02,  # enough, of tens of thousands of pairs
            skip_bad_lines=True,  # in some pairs the two dialogues share no beginning
            sft_init=True, sft_sequences=32_768, sft_lr=5e-5,
            lr=1e-5,  # similar to Stiennon et al. (2020), 1.5e-5
            batch_size=32,  # one pair per prompt
            micro_batch_size=8,  # 64 rows of 384 tokens would be too many
            save_every=500),  # a checkpoint with its optimizer has 1.6 GB for 135M parameters
        "debug": dict(  # every stage of both scripts in seconds
            data=(str(DATA / "helpdesk-validation.jsonl"),),
            n_layer=1, d_model=32, sft_sequences=512, normalize_prompts=32),
    }

    def check(self) -> None:
        """Raise UserError for the first setting that is wrong or contradicts another."""
        check_ranges(self)
        if self.d_model % self.n_head:
            raise UserError(f"--n-head {self.n_head} does not divide --d-model {self.d_model}; "
                            "choose a divisor")
        sizes = [vars(type(self)), *self.presets.values()]  # also those that were not asked for
        for name in ("n_layer", "n_head", "d_model"):
            value = getattr(self, name)
            if (self.init or self.init_reward) and value not in [x.get(name) for x in sizes]:
                raise UserError(f"--{name.replace('_', '-')} {value}: the sizes are those of "
                                "--init; leave it out")
        if self.init and self.init_reward:
            raise UserError("--init-reward uses the base.pt next to it; leave out --init")


@dataclasses.dataclass(frozen=True)
class PolicyConfig(RunConfig):
    """Train a language model as a policy against a reward model, or a user-defined function."""

    reward_run: str = setting(
        "", "folder of a run of train_reward.py; empty: the newest finished one under runs/")
    task: str = setting("", TASK_AGAIN)
    prompts: str = setting("", "file of prompts; empty: the prompts of the reward run's data")
    algorithm: str = setting(
        "ppo", "reinforce, reward-to-go, baseline, gae, ppo, rloo, grpo, online-dpo, dpo, or your "
               "own")
    data: tuple[str, ...] = setting(
        (), "preference files that dpo learns from; empty: the reward run's")
    dpo_beta: float = setting(
        0.5, "price of a nat of KL in units of utility (dpo, online-dpo); at 0.1 dpo left the "
             "base model's language", 1e-6)
    reward: str = setting(
        "", "instead of the reward model: module:function or path/to/file.py:function, called with "
        "(prompts, responses); it returns the scores")
    iterations: int = setting(
        60, "iterations of sample, score, update; the gold utility is flat by then", 1)
    batch_size: int = setting(
        128, "responses sampled in each iteration (dpo: prompts with all their pairs)", 1, MAX_SIZE)
    group_size: int = setting(4, "responses to each prompt (rloo, grpo)", 2, MAX_SIZE)
    ppo_epochs: int = setting(
        2, "passes over each rollout (ppo, grpo); with 4, ppo moves 1.7 nats farther for no sure "
           f"gain {SENSITIVITY}", 1)
    minibatch_size: int = setting(
        64, "responses (dpo: prompts) in an optimizer step (ppo, grpo, dpo); the other algorithms "
            "take one step per rollout", 1, MAX_SIZE)
    micro_batch_size: int = setting(
        0, "responses (dpo: prompts) in a forward pass; 0: the whole minibatch. Less memory, same "
           "gradient", 0, MAX_SIZE)
    lr: float = setting(
        5e-4, "learning rate; half of it costs ppo 0.2 gold, twice has no sure gain "
              f"{SENSITIVITY}, and is too much for grpo (minirlhf/lab/COMPARISON.md)", 0, 1)
    lr_decay: bool = setting(True, "linear to 0 over the run (Huang et al. 2024, detail 7)")
    kl_coef: float = setting(
        0.025, "KL penalty per nat, in standard deviations of the score; half or twice of it moves "
               f"ppo's KL by a nat, and gold hardly {SENSITIVITY}", 0)
    kl_target: float = setting(
        0.0, "adapt kl_coef to keep the KL near this many nats; 0: kl_coef is constant", 0)
    kl_horizon: int = setting(
        10_000, "responses over which kl_coef adapts (Ziegler et al. 2019)", 1)
    gamma: float = setting(
        1.0, "discount; none, because responses are short and the score counts for every token",
        0, 1)
    lam: float = setting(
        0.95, "GAE: 1 no bias, 0 least variance (Schulman et al. 2016); 0.9 costs ppo 1.2 gold, "
              f"and 1 nothing measurable {SENSITIVITY}", 0, 1)
    clip_range: float = setting(
        0.2, "of the importance ratio, around 1 (Schulman et al. 2017); 0.1 and 0.4 give ppo as "
             f"much gold {SENSITIVITY}", 0)
    value_clip_range: float = setting(
        0.2, "no gradient improves V beyond this distance from its old value; 0: no clipping", 0)
    vf_coef: float = setting(0.1, "weight of the value loss (Ziegler et al. 2019)", 0)
    value_lr_scale: float = setting(
        10.0, "learning rate of the value head, as a multiple of --lr: it starts at 0", 0)
    ent_coef: float = setting(
        0.0, "entropy bonus per nat and token; off: the KL penalty already keeps entropy up", 0)
    whiten: str = setting(
        "auto", "scale advantages to mean 0, standard deviation 1 over the rollout; auto: the "
                "algorithm's choice", choices=("auto", "on", "off"))
    temperature: float = setting(1.0, "of sampling, for both policy and reference", 1e-3)
    missing_eos_penalty: float = setting(
        1.0, "subtracted from the score of a response that was cut by length", 0)
    max_response_length: int = setting(
        0, "tokens, EOS included; 0: the reward run's", 0, MAX_SIZE)
    max_grad_norm: float = setting(1.0, "clip the gradient norm here; logged before clipping", 0)
    max_kl: float = setting(
        200.0, "stop if the KL exceeds this many nats: the policy no longer writes language", 0)
    eval_every: int = setting(20, "iterations between evaluations on the held-out prompts", 1)
    eval_prompts: int = setting(256, "held-out prompts in an evaluation", 1)
    eval_temperature: float = setting(
        0.0, "of sampling in evaluations and the final table; 0: --temperature", 0)
    eval_top_k: int = setting(
        0, "in evaluations, sample from this many most likely tokens; 0: from all", 0)
    eval_top_p: float = setting(
        1.0, "in evaluations, sample from the smallest set of tokens of this probability", 1e-3, 1)
    test_prompts: int = setting(512, "test prompts of the final table, if there are as many", 1)
    best_of_n: int = setting(128, "test prompts of the best-of-n rows; 0: no such rows", 0)
    save_every: int = setting(10, "iterations between checkpoints", 1)

    presets: ClassVar[dict[str, dict]] = {
        "helpdesk": {},
        "hh": dict(
            iterations=200,
            lr=1e-5,  # that of Huang et al. (2024) for GPT-2 small
            bf16=True,
            kl_coef=0.05,  # a common choice for PPO on dialogue (TRL's default)
            micro_batch_size=16,  # rows of up to 384 tokens with their activations
            # sampling takes seconds here, not milliseconds
            eval_prompts=128, test_prompts=256, best_of_n=32,
            save_every=25),
        "debug": dict(
            iterations=4, batch_size=16, minibatch_size=8, eval_every=2, eval_prompts=16,
            test_prompts=16, best_of_n=4),
    }

    def check(self) -> None:
        """Raise UserError for the first setting that is wrong or contradicts another."""
        check_ranges(self)
        if self.kl_target and not self.kl_coef:
            raise UserError("--kl-target scales --kl-coef up or down, and 0 stays 0; "
                            "leave out --kl-coef 0, or the target")
        if self.kl_target and self.kl_horizon < self.batch_size:
            raise UserError(f"--kl-horizon {self.kl_horizon} is smaller than --batch-size "
                            f"{self.batch_size}, so the KL coefficient could change its sign; "
                            f"use at least {self.batch_size}")
