"""Compute memory and time of one policy iteration on 1 to 8 GPUs, and which models fit on one.

    python -m minirlhf.lab.memory [--tflops 100] [--hbm 2000] [--link 100] [--check]

Everything is in float32, with the batch sizes of --preset hh and prompts and responses of
full length. Nothing in the table is measured: times follow from the assumed speeds, which are
printed. --check measures small shapes on this machine's CPU.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.lab.bench_cases import make_samples, ppo_rollout
from minirlhf.lab.bench_machine import kilobytes
from minirlhf.lab.common import ROOT, markdown_table, run_lab
from minirlhf.lab.memory_fit import USABLE, fit_table
from minirlhf.model import ModelConfig, Transformer
from minirlhf.run.command_line import check_ranges, setting
from minirlhf.run.device import prepare_training
from minirlhf.run.errors import UserError
from minirlhf.run.optimizer import make_optimizer
from minirlhf.run.parallel import finish_processes, init_processes, is_main
from minirlhf.run.terminal import echo
from train_policy import update

import torch

GIB = 2**30
FLOAT = 4  # bytes
GPT2 = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280),
        "xl": (48, 25, 1600)}  # layers, heads, width
GPT2_VOCAB = 50257


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Compute the memory and time of one policy iteration, for GPT-2's four sizes."""

    tflops: float = setting(
        100.0, "assumed: 10^12 operations per second of a GPU's matrix products", 1e-6)
    hbm: float = setting(
        2000.0, "assumed: GB/s at which a GPU reads its memory (weights and cache, in decoding)",
        1e-6)
    link: float = setting(100.0, "assumed: GB/s that each GPU sends to the others", 1e-6)
    check: bool = setting(
        False, "measure small shapes on this CPU, with 1 and 2 processes, and compare")


class Work(NamedTuple):
    """One iteration of ppo: sizes of the model and of the batch."""

    layers: int
    heads: int
    width: int
    vocab: int
    prompt: int
    response: int
    batch: int
    minibatch: int
    micro: int  # 0: the whole minibatch
    epochs: int

    @property
    def sizes(self) -> ModelConfig:
        length = self.prompt + self.response
        context = max(length, 1024) if self.vocab == GPT2_VOCAB else length
        table_rows = -(-(self.vocab + 1) // 64) * 64
        return ModelConfig(self.vocab, table_rows, self.layers, self.heads, self.width, context)

    def parameters(self) -> tuple[int, int]:
        """(all, those of one block)."""
        block = 12 * self.width**2 + 13 * self.width
        # embeddings, the final LayerNorm and two heads
        others = (self.sizes.table_rows + self.sizes.context + 4) * self.width + 2
        return self.layers * block + others, block


def hh_gpt2(size: str) -> Work:
    policy = dataclasses.replace(PolicyConfig(), **PolicyConfig.presets["hh"])
    reward = dataclasses.replace(RewardConfig(), **RewardConfig.presets["hh"])
    return Work(*GPT2[size], GPT2_VOCAB, reward.max_prompt_length, reward.max_response_length,
                policy.batch_size, policy.minibatch_size, policy.micro_batch_size,
                policy.ppo_epochs)


# ---- computed ------------------------------------------------------------------------------------


def memory(w: Work, count: int, shard: bool) -> dict[str, float]:
    """Bytes on one of `count` GPUs: each part, each phase, and the peak of an iteration.

    A forward pass with gradients keeps 17 D floats for each token and layer: the block's input,
    the results of two LayerNorms, queries, keys and values (3 D), the attention output and its
    transposed copy, the second residual, and 2 x 4 D in the MLP. A pass without gradients needs
    about 11 D at a time, in one layer. A process samples and scores all its rows together.
    """
    model, block = (FLOAT * n for n in w.parameters())
    outside_blocks = model - w.layers * block
    is_sharded = shard and count > 1
    parts = count if is_sharded else 1
    length = w.prompt + w.response
    rows = -(-w.batch // count)
    minibatch_rows = -(-w.minibatch // count)
    tokens = min(w.micro or w.minibatch, minibatch_rows) * length  # of a micro-batch
    row = FLOAT * w.width  # one vector
    part = dict(
        weights=model / parts, gradients=model / parts, adam=2 * model / parts, frozen=2 * model,
        # Sharded: full embeddings with their gradients; of the blocks, the current one, the next
        # one, the current gradients, and the buffers of all-gather and reduce-scatter.
        unsharded=2 * outside_blocks + 6 * block if is_sharded else 0,
        activations=tokens * row * (17 * w.layers + 4),
        backward=tokens * row * 12,  # gradients in one block: the residual, and 2 x 4 D in the MLP
        head=w.sizes.table_rows * row,  # a gradient of the embedding table
        cache=2 * w.layers * row * length * rows)
    # DistributedDataParallel keeps all gradients during the whole run, in the exchange's buckets.
    keeps_gradients = count > 1 and not shard
    kept = part["weights"] + part["adam"] + part["frozen"]
    kept += part["gradients"] if keeps_gradients else 0
    gradients = 0 if keeps_gradients else part["gradients"]
    # The LM head's gradient of the table exists from the start of the backward pass, that of the
    # embedding at its end, when the activations are gone.
    start = part["activations"] + part["backward"] + part["head"]
    end = gradients + part["head"]
    has_micro_batches = w.micro and minibatch_rows > w.micro
    needed = gradients + start if has_micro_batches else max(start, end)
    part["update"] = kept + needed + part["unsharded"]
    copy = model if is_sharded else 0  # unsharded, for sampling and scoring
    part["sample"] = kept + copy + part["cache"] + 11 * row * rows * w.prompt
    part["score"] = kept + copy + 11 * row * rows * length
    part["peak"] = max(part["update"], part["sample"], part["score"])
    return part


def sent_bytes(w: Work, count: int, shard: bool) -> float:
    """Bytes that each GPU sends in an iteration.

    A ring all-reduce of n bytes sends 2 n (count - 1) / count, a ring all-gather or reduce-scatter
    half of that. Sharded, each micro-batch gathers twice and scatters once; sampling and scoring
    gather once each.
    """
    steps = w.epochs * -(-w.batch // w.minibatch)
    if shard:
        rows = -(-w.minibatch // count)
        transfers = 3 * steps * -(-rows // (w.micro or rows)) + 2
    else:
        transfers = 2 * steps
    return transfers * FLOAT * w.parameters()[0] * (count - 1) / count


def flops(w: Work, count: int) -> dict[str, float]:
    """Operations of each GPU in an iteration, by phase; a multiply-add is two.

    Forward 2 for each weight and token, backward 4; causal attention 2 T^2 D for each layer and
    row; the LM head only on sampled tokens, where the backward pass computes the logits again.
    """
    rows = -(-w.batch // count)
    length = w.prompt + w.response
    body = 2 * 12 * w.width**2 * w.layers
    head = 2 * w.vocab * w.width

    def forward(tokens: int) -> float:
        return rows * (body * tokens + 2 * tokens**2 * w.width * w.layers)

    sampled = rows * w.response
    return dict(prefill=forward(w.prompt), decode=sampled * (body + head),
                score=3 * forward(length) + 2 * sampled * head,  # policy, reference, reward model
                update=w.epochs * (3 * forward(length) + 4 * sampled * head))


def seconds(w: Work, count: int, shard: bool, config: MemoryConfig) -> dict[str, float]:
    """Seconds by phase.

    Decoding takes the time of its arithmetic, or of reading weights and cache if that is longer.
    """
    rate = config.tflops * 1e12
    work = flops(w, count)
    read = w.response * (FLOAT * w.parameters()[0] + memory(w, count, shard)["cache"])
    row = dict(sample=work["prefill"] / rate + max(work["decode"] / rate, read / config.hbm / 1e9),
               score=work["score"] / rate, update=work["update"] / rate,
               exchange=sent_bytes(w, count, shard) / (config.link * 1e9))
    return row | dict(total=sum(row.values()))


def table(config: MemoryConfig) -> str:
    columns = ("weights", "gradients", "adam", "frozen", "activations", "cache", "peak")
    rows = []
    for size in GPT2:
        w = hh_gpt2(size)
        for count, shard in [(1, False)] + [(n, s) for n in (2, 4, 8) for s in (False, True)]:
            part = memory(w, count, shard)
            time_of = seconds(w, count, shard, config)
            rows.append([size, f"{count}{' --shard' if shard else ''}",
                         *(f"{part[column] / GIB:.1f}" for column in columns),
                         f"{sent_bytes(w, count, shard) / 1e9:.1f}", f"{time_of['total']:.1f}",
                         f"{time_of['exchange'] / time_of['total']:.0%}"])
    return markdown_table(["GPT-2", "GPUs", "weights", "gradients", "Adam", "reference + reward",
                           "activations", "cache", "peak, GiB", "GB sent", "seconds",
                           "of it sending"], rows)


# ---- measured ------------------------------------------------------------------------------------

CHECKS = {"3 x 512": Work(3, 8, 512, 4000, 48, 80, 8, 8, 8, 1),
          "6 x 256": Work(6, 8, 256, 4000, 48, 80, 16, 16, 0, 1)}


def peak_of(run: Callable) -> tuple[float, float]:
    """(peak of resident memory during run() in bytes, seconds); only on Linux."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.perf_counter()
    run()
    taken = time.perf_counter() - start
    return kilobytes("/proc/self/status", "VmHWM") * 1024, taken


def prepare_update(w: Work, shard: bool) -> tuple[Callable, list[Transformer]]:
    """(function that does one update on random weights and tokens, reference and reward model).

    The second is not used, but occupies memory as in a run.
    """
    config = PolicyConfig(batch_size=w.batch, minibatch_size=w.minibatch, micro_batch_size=w.micro,
                          ppo_epochs=w.epochs, lr=1e-4, lr_decay=False, kl_coef=0.1, shard=shard)
    policy, reference, reward_model = (Transformer(w.sizes, seed) for seed in range(3))
    reference.requires_grad_(False)
    reward_model.requires_grad_(False)
    learner = prepare_training(policy, config, torch.device("cpu"), ["lm_head", "value_head"])
    optimizer = make_optimizer(policy, config.lr)
    generator = torch.Generator().manual_seed(0)
    prompts, responses = (torch.randint(w.vocab, (w.batch, n), generator=generator)
                          for n in (w.prompt, w.response))
    samples = make_samples(prompts, torch.ones_like(prompts, dtype=torch.bool),
                           responses, torch.ones_like(responses, dtype=torch.bool))
    rollout = ppo_rollout(policy, samples, dataclasses.replace(config, micro_batch_size=8))
    return (lambda: update(learner, optimizer, rollout, config, 0, w.response),
            [reference, reward_model])


def measure_update(w: Work, shard: bool) -> dict[str, float]:
    """One update, in one of one or more processes; bytes beyond those before the model exists.

    rate: operations per second of a matrix product, measured in the same process.
    """
    init_processes()
    run, _ = prepare_update(Work(1, 1, 32, 100, 4, 4, 8, 8, 0, 1), shard)
    run()  # loads the code into memory
    before, _ = peak_of(lambda: None)
    run, others = prepare_update(w, shard)
    run()  # creates the optimizer's state
    peak, taken = peak_of(run)
    a = torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    rate = 20 * 2 * 1024**3 / (time.perf_counter() - start)
    return dict(bytes=peak - before, seconds=taken, rate=rate)


def run_measurement(name: str, count: int, shard: bool) -> dict[str, float]:
    """measure_update in `count` new processes with one thread each. Raises UserError."""
    command = [sys.executable, "-m"]
    if count > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
                    "--module"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command += ["minirlhf.lab.memory", "measure", name, str(int(shard)), str(out)]
        try:
            subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.PIPE,
                           env=os.environ | dict(OMP_NUM_THREADS="1"))
        except subprocess.CalledProcessError as error:
            end = error.stderr.decode()[-300:]
            raise UserError(f"a measuring process failed: {end}") from None
        return json.loads(out.read_text())


def check() -> str:
    """A table that compares computed with measured values. Raises UserError."""
    rows = []
    for name, w in CHECKS.items():
        for count, shard in ((1, False), (2, False), (2, True)):
            measured = run_measurement(name, count, shard)
            computed_bytes = memory(w, count, shard)["update"]
            computed_seconds = flops(w, count)["update"] / measured["rate"]
            rows.append([name, f"{count}{' --shard' if shard else ''}",
                         f"{computed_bytes / 2**20:.0f}", f"{measured['bytes'] / 2**20:.0f}",
                         f"{computed_bytes / measured['bytes'] - 1:+.0%}",
                         f"{computed_seconds:.1f}", f"{measured['seconds']:.1f}",
                         f"{computed_seconds / measured['seconds'] - 1:+.0%}"])
    return markdown_table(["layers x width", "processes", "computed, MiB", "measured", "error",
                           "computed, s", "measured", "error"], rows)


def main(config: MemoryConfig) -> None:
    """Print the table, or with --check the comparison. Raises UserError."""
    check_ranges(config)
    if config.check:
        echo("One update, one thread in each process. Computed times assume the speed of a "
             "1024^3 matrix product, measured in the same process.\n")
        echo(check())
        return
    echo(f"Computed, not measured: float32, --preset hh, {config.tflops:g} TFLOP/s in "
         f"matrix products, {config.hbm:g} GB/s of memory, {config.link:g} GB/s to the other "
         "GPUs, no overlap.\n")
    echo(table(config))
    echo(f"\nThe largest --micro-batch-size of --preset hh on one GPU, if {USABLE:.0%} of its "
         "memory are usable; -: it does not fit.\n")
    echo(fit_table())


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        _, _, name, shard, out = sys.argv
        torch.set_num_threads(1)
        result = measure_update(CHECKS[name], shard == "1")
        if is_main():
            Path(out).write_text(json.dumps(result))
        finish_processes()
    else:
        run_lab(main, MemoryConfig)
