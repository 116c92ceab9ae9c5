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
from minirlhf.lab.bench_cases import make_samples
from minirlhf.lab.bench_machine import peak_bytes, seconds, speed_limits
from minirlhf.model import ModelConfig, Transformer
from minirlhf.model.generate import generate
from minirlhf.rl.algorithms import ALGORITHMS, estimate_advantages
from minirlhf.rl.rollout import Rollout, measure, token_rewards
from minirlhf.run.checkpoint import load_checkpoint
from minirlhf.run.optimizer import make_optimizer

import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPT2_SMALL = ModelConfig(50257, 50304, n_layer=12, n_head=12, d_model=768, context=1024)
TINY = ModelConfig(300, 320, n_layer=1, n_head=2, d_model=16, context=64)


class Row(NamedTuple):
    """One measurement."""

    name: str
    milliseconds: float | None = None
    megabytes: float | None = None  # peak beyond what was allocated before, MiB
    bound: float | None = None  # fraction of the speed limit that this machine measured
    ok: bool | None = None  # whether a check passes; None: nothing is checked
    note: str = ""


def timed(run: Callable) -> tuple[float, float]:
    """(milliseconds, MiB) of a call: the median of five after one warm-up call; its peak memory."""
    run()
    times = sorted(seconds(run, DEVICE) for _ in range(5))
    return 1000 * times[2], peak_bytes(run, DEVICE) / 2**20


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
    flops, bytes_per_second = speed_limits(DEVICE, dry_run)
    rows = [check_logprobs(shape, dtype) for shape in logprob_shapes(dry_run) for dtype in dtypes()]
    rows += [check_returns(shape) for shape in ((5, 31), (7, 64), (3, 257))]
    rows += time_logprobs(dry_run, flops)
    rows += time_returns(dry_run, bytes_per_second)
    return rows


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


def time_logprobs(dry_run: bool, flops: float) -> list[Row]:
    """Forward and backward of the head, fused and with full logits. Bound: 8 N D V operations."""
    n, d, v = (64, 32, 256) if dry_run else (16384, 768, 50257)
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    hidden, weight, targets = head_inputs(n, d, v, dtype)

    def fused() -> None:
        token_logprobs(hidden, weight, targets, impl="triton").sum().backward()

    def plain() -> None:
        F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum").backward()

    rows = []
    for name, run, products in (("Triton", fused, 4), ("plain PyTorch", plain, 3)):
        milliseconds, megabytes = timed(run)
        bound = products * 2.0 * n * d * v / flops / (milliseconds / 1000)
        rows.append(Row(f"log-probs forward and backward, {name}", milliseconds, megabytes, bound,
                        note=f"N {n}, D {d}, V {v}, {products} matrix products"))
    with torch.no_grad():
        milliseconds, megabytes = timed(
            lambda: token_logprobs(hidden, weight, targets, impl="triton"))
    rows.append(Row("log-probs forward, Triton", milliseconds, megabytes,
                    2.0 * n * d * v / flops / (milliseconds / 1000), note=f"N {n}, D {d}, V {v}"))
    return rows


def time_returns(dry_run: bool, bytes_per_second: float) -> list[Row]:
    """The scan alone: it reads rewards and mask and writes returns, 9 bytes per element."""
    shape = (64, 64) if dry_run else (8192, 1024)
    rewards = torch.randn(shape, device=DEVICE)
    mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    rows = []
    for impl in ("triton", "torch"):
        milliseconds, megabytes = timed(
            lambda impl=impl: discounted_returns(rewards, mask, 0.99, impl=impl))
        bound = 9.0 * rewards.numel() / bytes_per_second / (milliseconds / 1000)
        rows.append(Row(f"returns {list(shape)}, {impl}", milliseconds, megabytes, bound))
    return rows


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


def make_model(variant: Variant, dry_run: bool) -> Transformer:
    """A random model of GPT-2 small's shape."""
    model = Transformer(TINY if dry_run else GPT2_SMALL).to(DEVICE)
    model.bf16 = variant.bf16
    if variant.compile and not dry_run:
        model.compile_blocks()
    return model


def random_samples(config: ModelConfig, batch: int, prompt: int, response: int):
    """Samples of full length with random tokens."""
    ids = torch.randint(config.vocab_size - 1, (batch, prompt + response), device=DEVICE)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return make_samples(ids[:, :prompt], mask[:, :prompt], ids[:, prompt:], mask[:, prompt:])


def decode(dry_run: bool) -> list[Row]:
    """Sampling without EOS: 256 prompts of 64 tokens, 192 new tokens each."""
    return [one_row("decode", variant, lambda variant: decode_with(variant, dry_run))
            for variant in VARIANTS]


def decode_with(variant: Variant, dry_run: bool) -> Row:
    """One row of decode(), as training samples."""
    batch, prompt, response = (4, 6, 5) if dry_run else (256, 64, 192)
    model = make_model(variant, dry_run).requires_grad_(False)
    samples = random_samples(model.config, batch, prompt, response)
    uniforms = torch.rand(batch, response, device=DEVICE)

    def run() -> None:
        # an EOS outside of the vocabulary is never sampled
        generate(model.for_decoding(), samples.prompt_ids, samples.prompt_mask, response,
                 model.config.table_rows, model.config.vocab_size, uniforms)

    run()
    milliseconds = 1000 * seconds(run, DEVICE)
    megabytes = peak_bytes(run, DEVICE) / 2**20
    rate = batch * response / milliseconds
    return Row(f"decode, {variant.name}", milliseconds, megabytes,
               note=f"{rate:.0f} thousand tokens/s, batch {batch}")


def update(dry_run: bool) -> list[Row]:
    """One PPO step on 64 responses of 448 tokens to prompts of 64: as training updates."""
    flops, _ = speed_limits(DEVICE, dry_run)
    return [one_row("update", variant, lambda variant: update_with(variant, flops, dry_run))
            for variant in VARIANTS]


def update_with(variant: Variant, flops: float, dry_run: bool) -> Row:
    """One row of update()."""
    batch, prompt, response = (4, 6, 5) if dry_run else (64, 64, 448)
    config = PolicyConfig(batch_size=batch, minibatch_size=batch, ppo_epochs=1, lr=1e-6,
                          micro_batch_size=0 if dry_run else 32)
    model = make_model(variant, dry_run)
    samples = random_samples(model.config, batch, prompt, response)
    logprobs, values = measure(model, samples, config)
    scores = torch.randn(batch, device=DEVICE)
    rewards = token_rewards(scores, logprobs, logprobs, samples.response_mask, 0.05)
    rollout = Rollout(samples, logprobs, logprobs, values, scores, rewards, 0.05)
    rollout = estimate_advantages(ALGORITHMS["ppo"], rollout, config)
    optimizer = make_optimizer(model, config.lr)

    def run() -> None:
        train_policy.update(model, optimizer, rollout, config, 0, response)

    milliseconds, megabytes = timed(run)
    tokens = batch * (prompt + response)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    are_finite = all(parameter.isfinite().all() for parameter in model.parameters())
    return Row(f"update, {variant.name}", milliseconds, megabytes,
               6.0 * parameters * tokens / flops / (milliseconds / 1000), are_finite,
               f"{tokens / milliseconds:.0f} thousand tokens/s")


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


def debug(dry_run: bool) -> list[Row]:
    """Both scripts with the debug preset."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reward, _ = time_script(train_reward.main, reward_settings(folder), "debug preset")
        policy, _ = time_script(train_policy.main, policy_settings(folder), "debug preset")
    return [reward, policy]


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
    "machine": machine, "kernels": kernels, "decode": decode, "update": update, "debug": debug,
    "resume": resume, "task": task}
