"""Memory and time of one policy iteration by count of GPUs, computed; `--check` measures small shapes on this machine's CPU.

    python -m minirlhf.lab.memory [--tflops 100] [--hbm 2000] [--link 100] [--check]

All is float32, for the batch sizes of --preset hh-gpt2, with every prompt and response of full length. Nothing in the table is
measured: times follow from the assumed speeds, which are printed. P stands for the bytes of one copy of the weights.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from minirlhf import parallel
from minirlhf.config import PolicyConfig, RewardConfig, UserError
from minirlhf.device import prepare_training
from minirlhf.flags import check_ranges, setting
from minirlhf.lab.common import ROOT, markdown_table, run_lab
from minirlhf.ladder import LADDER, advantages_and_returns
from minirlhf.model import ModelConfig, Transformer
from minirlhf.optim import make_optimizer
from minirlhf.rollout import collect_rollout
from train_policy import update

GIB = 2**30
GPT2 = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Memory and time of one policy iteration, computed for GPT-2's four sizes."""

    tflops: float = setting(100.0, "assumed: 10^12 operations a second that a GPU sustains in matrix products", 1e-6)
    hbm: float = setting(2000.0, "assumed: GB/s at which it reads its own memory (weights and cache, while decoding)", 1e-6)
    link: float = setting(100.0, "assumed: GB/s that each GPU sends to the others", 1e-6)
    check: bool = setting(False, "measure small shapes on this CPU, with 1 and 2 processes, beside what is computed")


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
        context = max(self.prompt + self.response, 1024 if self.vocab == 50257 else 0)
        return ModelConfig(self.vocab, -(-(self.vocab + 1) // 64) * 64, self.layers, self.heads, self.width, context)

    def parameters(self) -> tuple[int, int]:
        """(all, those of one block)."""
        block = 12 * self.width**2 + 13 * self.width
        outside = (self.sizes.table_rows + self.sizes.context + 4) * self.width + 2  # tables, last norm, two heads
        return self.layers * block + outside, block


def hh_gpt2(size: str) -> Work:
    policy = dataclasses.replace(PolicyConfig(), **PolicyConfig.presets["hh-gpt2"])
    reward = dataclasses.replace(RewardConfig(), **RewardConfig.presets["hh-gpt2"])
    return Work(*GPT2[size], 50257, reward.max_prompt_length, reward.max_response_length, policy.batch_size,
                policy.minibatch_size, policy.micro_batch_size, policy.ppo_epochs)


# ---- what is computed ------------------------------------------------------------------------------------------------


def memory(w: Work, count: int, shard: bool) -> dict[str, float]:
    """Bytes on one of `count` GPUs, part by part, and the peak of an iteration.

    A forward pass that will be differentiated keeps 17 D floats per token and layer: the block's input, two norms' results,
    queries, keys and values (3 D), what attention read and its rearranged copy, the second residual, and twice 4 D in the MLP.
    One that will not holds about 11 D at a time, in one layer. All rows of a process are prefilled and scored together.
    """
    p, block = (4 * n for n in w.parameters())
    outside, parts = p - w.layers * block, count if shard else 1
    rows = -(-w.batch // count)
    some = min(w.micro or w.minibatch, -(-w.minibatch // count)) * (w.prompt + w.response)
    part = dict(weights=p / parts, gradients=p / parts, adam=2 * p / parts, frozen=2 * p)
    # sharded: whole during the update are the tables with their gradients, and of blocks the one at work, the next one, the
    # gradients of the one at work, and what lies ready to be gathered and summed; while sampling, a copy of all
    part["whole"] = 2 * outside + 6 * block if shard and count > 1 else 0
    part["activations"] = 4 * some * w.width * (17 * w.layers + 4)
    part["backward"] = 4 * some * w.width * 12  # gradients in one block: of the residual stream, and of twice 4 D in its MLP
    part["head"] = 4 * w.sizes.table_rows * w.width  # the tied table's gradient, begun by the head; sharded, its copy to send
    part["cache"] = 4 * 2 * w.layers * w.width * (w.prompt + w.response) * rows
    passing = 4 * 11 * w.width * rows * (w.prompt + w.response)
    replicas = count > 1 and not shard  # their gradients lie in the buckets of the exchange, for as long as the run lasts
    kept = part["weights"] + part["adam"] + part["frozen"] + (part["gradients"] if replicas else 0)
    copy = p if shard and count > 1 else 0
    # of a single micro-batch gradients grow while activations go; of several they are there already
    both = (0 if replicas else part["gradients"], part["activations"] + part["backward"] + part["head"])
    several = w.micro and -(-w.minibatch // count) > w.micro
    part["update"] = kept + (sum(both) if several else max(both)) + part["whole"]
    part["sample"] = kept + copy + part["cache"] + 4 * 11 * w.width * rows * w.prompt
    part["score"] = kept + copy + passing
    part["peak"] = max(part["update"], part["sample"], part["score"])
    return part


def moved(w: Work, count: int, shard: bool) -> float:
    """Bytes that each GPU sends in an iteration: a ring all-reduce of n bytes sends 2 n (count - 1) / count, a ring all-gather
    or reduce-scatter half of that. Sharded, each micro-batch gathers twice and scatters once; sampling and scoring gather."""
    p, steps = 4 * w.parameters()[0], w.epochs * -(-w.batch // w.minibatch)
    if not shard:
        return 2 * p * steps * (count - 1) / count
    most = -(-w.minibatch // count)
    return (3 * steps * -(-most // (w.micro or most)) + 2) * p * (count - 1) / count


def flops(w: Work, count: int) -> dict[str, float]:
    """Per GPU and iteration, by phase; a multiply-add is two. Forward 2 per weight and token, backward 4; attention 2 T^2 D a
    layer and row under the causal mask; the head only where tokens were sampled, and there once more in the backward pass. The
    last layer goes on, after its attention, with the tokens alone whose states are read: those sampled, or the last."""
    rows, length = -(-w.batch // count), w.prompt + w.response
    body = 2 * 12 * w.width**2 * w.layers
    head = 2 * w.vocab * w.width

    def forward(tokens: int, read: int) -> float:
        return rows * (body * tokens - 18 * w.width**2 * (tokens - read) + 2 * tokens**2 * w.width * w.layers)

    return dict(prefill=forward(w.prompt, 1), decode=rows * w.response * (body + head),
                score=2 * forward(length, w.response) + forward(length, 1) + 2 * rows * w.response * head,
                update=w.epochs * (3 * forward(length, w.response) + 4 * rows * w.response * head))


def seconds(w: Work, count: int, shard: bool, config: MemoryConfig) -> dict[str, float]:
    """By phase. A decoding step takes as long as its arithmetic or as reading weights and cache, whichever is longer."""
    rate, done, p = config.tflops * 1e12, flops(w, count), 4 * w.parameters()[0]
    read = w.response * (p + memory(w, count, shard)["cache"] * 0.75) / (config.hbm * 1e9)
    row = dict(sample=done["prefill"] / rate + max(done["decode"] / rate, read), score=done["score"] / rate,
               update=done["update"] / rate, exchange=moved(w, count, shard) / (config.link * 1e9))
    return row | dict(total=sum(row.values()))


def table(config: MemoryConfig) -> str:
    rows = []
    for size in GPT2:
        w = hh_gpt2(size)
        for count, shard in [(1, False)] + [(n, s) for n in (2, 4, 8) for s in (False, True)]:
            m, t = memory(w, count, shard), seconds(w, count, shard, config)
            gib = [f"{m[key] / GIB:.1f}" for key in ("weights", "gradients", "adam", "frozen", "activations", "cache", "peak")]
            rows.append([size, f"{count}{' --shard' if shard else ''}", *gib, f"{moved(w, count, shard) / 1e9:.1f}",
                         f"{t['total']:.1f}", f"{t['exchange'] / t['total']:.0%}"])
    return markdown_table(["GPT-2", "GPUs", "weights", "gradients", "Adam", "reference + reward", "activations", "cache",
                           "peak, GiB", "GB sent", "seconds", "of it sending"], rows)


# ---- what is measured ------------------------------------------------------------------------------------------------

CHECKS = {"3 x 512": Work(3, 8, 512, 4000, 48, 80, 8, 8, 8, 1), "6 x 256": Work(6, 8, 256, 4000, 48, 80, 16, 16, 0, 1)}


def peak_of(run) -> tuple[float, float]:
    """(bytes at the peak of resident memory while run() lasts, seconds); Linux alone can start that figure anew."""
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    run()
    taken = time.perf_counter() - start
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024, taken


def prepared(w: Work, shard: bool):
    """A function that does the update of one iteration, on random weights and tokens."""
    config = dataclasses.replace(PolicyConfig(), batch_size=w.batch, minibatch_size=w.minibatch, micro_batch_size=w.micro,
                                 ppo_epochs=w.epochs, shard=shard)
    policy, base, reward = (Transformer(w.sizes, seed) for seed in range(3))
    for frozen in (base, reward):
        frozen.requires_grad_(False)
    learner = prepare_training(policy, config, torch.device("cpu"), ["value_head"])
    optimizer = make_optimizer(policy, 1e-4)
    generator = torch.Generator().manual_seed(0)
    prompts, responses = (torch.randint(w.vocab, (w.batch, n), generator=generator) for n in (w.prompt, w.response))
    sampled = [x for ids in (prompts, responses) for x in (ids, torch.ones_like(ids, dtype=torch.bool))]
    rollout = collect_rollout(parallel.whole(policy), base, *sampled, torch.randn(w.batch, generator=generator), 0.1, 1.0, 8)
    rung = LADDER["ppo"]
    advantages, returns = advantages_and_returns(rung, rollout, config)

    def step(beside=(base, reward)):  # they lie in memory during an update, as in a run
        return update(learner, optimizer, rung, rollout, advantages, returns, config, 0.1, 1e-4, w.response, 0)

    return step


def measure(w: Work, shard: bool) -> dict[str, float]:
    """In a process of its own, or several: one update, once Adam has its state; bytes beyond those before the model."""
    parallel.start()
    prepared(Work(1, 1, 32, 100, 4, 4, 8, 8, 0, 1), shard)()  # the code itself comes into memory when it first runs
    empty, _ = peak_of(lambda: None)
    step = prepared(w, shard)
    step()
    peak, taken = peak_of(step)
    a = torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    rate = 20 * 2 * 1024**3 / (time.perf_counter() - start)
    return dict(bytes=peak - empty, seconds=taken, rate=rate)


def check() -> str:
    """Raises UserError with the last words of a process that failed."""
    rows, environment = [], {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, w in CHECKS.items():
        for count, shard in ((1, False), (2, False), (2, True)):
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                command = [sys.executable, *launch, "--module" if launch else "-m", "minirlhf.lab.memory", "measure", name]
                command += [str(int(shard)), str(out)]
                try:
                    subprocess.run(command, check=True, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
                except subprocess.CalledProcessError as error:
                    raise UserError(f"a measured process failed: {error.stderr.decode()[-300:]}") from None
                found = json.loads(out.read_text())
            wanted, rate = memory(w, count, shard)["update"], found["rate"]
            expected = flops(w, count)["update"] / rate
            rows.append([name, f"{count}{' --shard' if shard else ''}", f"{wanted / 2**20:.0f}", f"{found['bytes'] / 2**20:.0f}",
                         f"{wanted / found['bytes'] - 1:+.0%}", f"{expected:.1f}", f"{found['seconds']:.1f}",
                         f"{expected / found['seconds'] - 1:+.0%}"])
    return markdown_table(["layers x width", "processes", "computed, MiB", "measured", "error", "computed, s", "measured",
                           "error"], rows)


def main(config: MemoryConfig) -> None:
    check_ranges(config)
    if config.check:
        print("One update, one thread a process, times at the rate of a 1024^3 matrix product measured in the same process:\n")
        print(check())
        return
    print(f"Computed, not measured: float32, --preset hh-gpt2, {config.tflops:g} TFLOP/s in matrix products, {config.hbm:g} GB/s "
          f"of memory, {config.link:g} GB/s to the other GPUs, none of it overlapping.\n")
    print(table(config))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        _, _, name, shard, out = sys.argv
        torch.set_num_threads(1)
        found = measure(CHECKS[name], shard == "1")
        if int(os.environ.get("RANK", 0)) == 0:
            Path(out).write_text(json.dumps(found))
        parallel.stop()
    else:
        run_lab(main, MemoryConfig)
