"""The measurements of gpu.py. Each runs in its own process and returns rows."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import train_policy
import train_reward
from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.kernels import discounted_returns, token_logprobs
from minirlhf.kernels.logprob import HAS_TRITON
from minirlhf.lab import bench, bench_cases
from minirlhf.lab.bench import Limits
from minirlhf.lab.bench_cases import SHAPES, Case, Shape
from minirlhf.lab.bench_machine import speed_limits
from minirlhf.model import ModelConfig, Transformer
from minirlhf.run.checkpoint import load_checkpoint

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpt2_shape(batch: int, response: int) -> Shape:
    """GPT-2 small's sizes, and prompts of 64 tokens."""
    return bench_cases.shape(12, 12, 768, 50257, batch, 64, response)


class Row(NamedTuple):
    """One measurement."""

    name: str
    milliseconds: float | None = None
    megabytes: float | None = None  # peak beyond what was allocated before, MiB
    bound: float | None = None  # fraction of the speed limit that this machine measured
    ok: bool | None = None  # whether a check passes; None: nothing is checked
    note: str = ""


# ---- machine -------------------------------------------------------------------------------------


def machine(dry_run: bool) -> list[Row]:
    """The measured speed limits."""
    flops, bytes_per_second = speed_limits(DEVICE, dry_run)
    return [Row("matrix products", note=f"{flops / 1e12:.4g} TFLOP/s"),
            Row("copy", note=f"{bytes_per_second / 1e12:.4g} TB/s")]


# ---- kernels -------------------------------------------------------------------------------------


def kernels(dry_run: bool) -> list[Row]:
    """Triton against float64 references, then time and memory against plain PyTorch."""
    if not HAS_TRITON:
        return [Row("kernels", note="skipped: triton is not installed (pip install triton)")]
    rows = [check_logprobs(size, dtype) for size in logprob_shapes(dry_run) for dtype in dtypes()]
    rows += [check_returns(size) for size in ((5, 31), (7, 64), (3, 257))]
    return rows + time_kernels(dry_run)


def dtypes() -> tuple[torch.dtype, ...]:
    """Triton's interpreter multiplies bfloat16 incorrectly, so bfloat16 needs a GPU."""
    if DEVICE.type == "cpu":
        return torch.float32, torch.float16
    return torch.float32, torch.float16, torch.bfloat16


def logprob_shapes(dry_run: bool) -> list[tuple[int, int, int]]:
    """(N, D, V): ragged tiles, and GPT-2 small's width and vocabulary."""
    small = [(1, 1, 1), (7, 16, 5), (130, 70, 261)]
    return small if dry_run else [*small, (1031, 768, 50257)]


def head_inputs(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], targets [N]; logits have a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator)
    weight = 2 * torch.randn(v, d, generator=generator) / d**0.5
    targets = torch.randint(v, (n,), generator=generator)
    return (hidden.to(DEVICE, dtype).requires_grad_(), weight.to(DEVICE, dtype).requires_grad_(),
            targets.to(DEVICE))


def check_logprobs(shape: tuple[int, int, int], dtype: torch.dtype) -> Row:
    """Log-prob, entropy and both gradients against float64 on the same rounded inputs."""
    hidden, weight, targets = head_inputs(*shape, dtype)
    logp, entropy = token_logprobs(hidden, weight, targets, 0.7, entropy=True, impl="triton")
    gradients = torch.autograd.grad((logp * torch.linspace(-1, 1, len(logp), device=DEVICE)).sum()
                                    + 0.3 * entropy.sum(), (hidden, weight))
    h = hidden.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    log_p = (h @ w.T / 0.7).log_softmax(-1)
    exact_logp = log_p.gather(1, targets[:, None])[:, 0]
    exact_entropy = -(log_p.exp() * log_p).sum(-1)
    upstream = torch.linspace(-1, 1, len(logp), device=DEVICE, dtype=torch.float64)
    exact = torch.autograd.grad((exact_logp * upstream).sum() + 0.3 * exact_entropy.sum(), (h, w))
    error = float((logp - exact_logp).abs().max())
    gradient_error = max(relative_error(a, b) for a, b in zip(gradients, exact))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return Row(f"log-probs {list(shape)} {str(dtype)[6:]}",
               ok=error < 1e-4 and gradient_error < tolerance,
               note=f"log-prob error {error:.1e}, gradient error {gradient_error:.1e}")


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm().clamp(min=1e-30))


def check_returns(shape: tuple[int, int]) -> Row:
    """Discounted returns against a loop in float64; rewards beyond the mask are NaN."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(shape, generator=generator).to(DEVICE)
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator).to(DEVICE)
    mask = torch.arange(shape[1], device=DEVICE) < lengths
    exact = torch.where(mask, rewards, 0.0).double()
    for t in reversed(range(shape[1] - 1)):
        exact[:, t] += 0.99 * exact[:, t + 1]
    rewards = torch.where(mask, rewards, torch.nan)
    error = float((discounted_returns(rewards, mask, 0.99, impl="triton") - exact).abs().max())
    return Row(f"returns {list(shape)}", ok=error < 1e-4, note=f"error {error:.1e}")


def time_kernels(dry_run: bool) -> list[Row]:
    """The kernels of training at GPT-2 small's size, and the same in plain PyTorch."""
    limits = Limits(*speed_limits(DEVICE, dry_run))
    size = SHAPES["tiny"] if dry_run else gpt2_shape(32, 448)
    made = [bench_cases.logprob_case(backward, size, DEVICE, None) for backward in (False, True)]
    made.append(bench_cases.returns_case(*((64, 64) if dry_run else (8192, 1024)), DEVICE))
    return [time_case(case.name, case._replace(plain=None, peers={"plain PyTorch": case.plain}),
                      limits) for case in made]


def time_case(name: str, case: Case, limits: Limits) -> Row:
    """The median of three calls, beside other ways if the case has them."""
    result = bench.measure(case, DEVICE, 3, limits)
    notes = [f"{result['tokens_per_second'] / 1000:.0f} thousand tokens/s"]
    notes += [f"{other}: {ratio:.2f} times as long, {result['peaks_mib'][other]:.0f} MiB"
              for other, ratio in result["ratios"].items()]
    return Row(name, 1000 * result["seconds"], result["peak_mib"], result["reached"],
               note="; ".join(notes))


# ---- decoding and one update ---------------------------------------------------------------------


class Variant(NamedTuple):
    """How to compute."""

    name: str
    bf16: bool = False
    compile: bool = False


VARIANTS = (Variant("float32"), Variant("bf16", bf16=True),
            Variant("bf16, compiled", bf16=True, compile=True))


def one_row(name: str, variant: Variant, measure_row: Callable[[Variant], Row]) -> Row:
    """The row of a variant, or one that says why this device cannot give it."""
    name = f"{name}, {variant.name}"
    has_bf16 = DEVICE.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if variant.bf16 and not has_bf16:
        return Row(name, note="skipped: this GPU has no bfloat16 arithmetic")
    try:
        return measure_row(variant)
    except torch.OutOfMemoryError:
        return Row(name, note="skipped: this GPU has too little memory")


def make_model(variant: Variant, config: ModelConfig) -> Transformer:
    """A random model. A tiny one is not compiled: that takes too long for a dry run."""
    model = Transformer(config).to(DEVICE)
    model.bf16 = variant.bf16
    if variant.compile and config.d_model > SHAPES["tiny"].config.d_model:
        model.compile_blocks()
    return model


def decode(dry_run: bool) -> list[Row]:
    """Sampling without EOS: 256 prompts of 64 tokens, 192 new tokens each."""
    limits = Limits(*speed_limits(DEVICE, dry_run))
    size = SHAPES["tiny"] if dry_run else gpt2_shape(256, 192)

    def measure_row(variant: Variant) -> Row:
        model = make_model(variant, size.config).requires_grad_(False)
        case = bench_cases.rollout_case("fixed", model, size, DEVICE, None, plain=False)
        return time_case(f"decode, {variant.name}", case, limits)

    return [one_row("decode", variant, measure_row) for variant in VARIANTS]


def update(dry_run: bool) -> list[Row]:
    """One PPO step on 32 responses of 448 tokens to prompts of 64."""
    limits = Limits(*speed_limits(DEVICE, dry_run))
    size = SHAPES["tiny"] if dry_run else gpt2_shape(32, 448)

    def measure_row(variant: Variant) -> Row:
        case = bench_cases.update_case(make_model(variant, size.config), size, DEVICE, None)
        return time_case(f"update, {variant.name}", case._replace(plain=None), limits)

    return [one_row("update", variant, measure_row) for variant in VARIANTS]


# ---- the scripts ---------------------------------------------------------------------------------


def reward_settings(folder: Path) -> RewardConfig:
    """The debug preset in a folder."""
    return RewardConfig(**RewardConfig.presets["debug"], out=str(folder / "reward"))


def policy_settings(folder: Path) -> PolicyConfig:
    return PolicyConfig(**PolicyConfig.presets["debug"], out=str(folder / "policy"),
                        reward_run=str(folder / "reward"))


def time_script(script: Callable, config, name: str) -> tuple[Row, dict]:
    """A row with the seconds of a run, and what its main returned."""
    start = time.perf_counter()
    metrics = script(config)
    elapsed = time.perf_counter() - start
    return Row(f"{script.__module__}.py, {name}", 1000 * elapsed), metrics


def resume(dry_run: bool) -> list[Row]:
    """A --deterministic run that is extended after half of its steps, against one in one piece.

    Without --lr-decay, the first steps of both are equal.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_reward.main(reward_settings(folder))
        whole = dataclasses.replace(policy_settings(folder), deterministic=True, lr_decay=False)
        half = dataclasses.replace(whole, iterations=whole.iterations // 2,
                                   out=str(folder / "half"))
        train_policy.main(whole)
        train_policy.main(half)
        train_policy.main(dataclasses.replace(half, iterations=whole.iterations, resume=True))
        one_piece, resumed = (load_checkpoint(Path(config.out) / "policy.pt", "policy")[1]["model"]
                              for config in (whole, half))
    different = [key for key in one_piece if not torch.equal(one_piece[key], resumed[key])]
    return [Row("deterministic resume", ok=not different,
                note=f"{len(different)} of {len(one_piece)} tensors differ")]


def task(dry_run: bool) -> list[Row]:
    """The default reward run, then ten iterations of the default policy run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reward = RewardConfig(out=str(folder / "reward"))
        policy = PolicyConfig(out=str(folder / "policy"), reward_run=str(folder / "reward"),
                              iterations=10)
        if dry_run:
            reward = reward_settings(folder)
            policy = policy_settings(folder)
        reward_row, _ = time_script(train_reward.main, reward, "default task")
        policy_row, metrics = time_script(train_policy.main, policy, "ten iterations")
    gain = metrics["sampled_gold"] - metrics["base_sampled_gold"]
    gold = Row("gold after ten iterations", ok=dry_run or gain > 0,
               note=f"{gain:+.2f} above the base model")
    return [reward_row, policy_row, gold]


MEASUREMENTS: dict[str, Callable[[bool], list[Row]]] = {
    "machine": machine, "kernels": kernels, "decode": decode, "update": update,
    "resume": resume, "task": task}
