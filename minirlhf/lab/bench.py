"""How fast each part is, beside plain PyTorch, other libraries and what the machine allows. `python -m minirlhf.lab.bench --help`

One row per part: median time of interleaved rounds, tokens per second, the physical bound (the larger of arithmetic over the
measured matrix-product ceiling and bytes over the measured copy ceiling), the share of it reached, peak extra memory.
Then how time per token grows with batch, response length and vocabulary.
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from minirlhf.advantages import gae
from minirlhf.config import PolicyConfig, UserError, fail, keep_freed_memory
from minirlhf.generate import generate
from minirlhf.kernels import discounted_returns, token_logprobs
from minirlhf.lab import bench_naive as naive
from minirlhf.ladder import LADDER, advantages_and_returns
from minirlhf.losses import preference_loss
from minirlhf.model import ModelConfig, Transformer, pick_device, sequence_scores
from minirlhf.optim import make_optimizer
from minirlhf.rollout import collect_rollout
from train_policy import update


class Shape(NamedTuple):
    config: ModelConfig
    batch: int
    prompt: int
    response: int


def shape(layers: int, heads: int, width: int, vocab: int, batch: int, prompt: int, response: int) -> Shape:
    return Shape(ModelConfig(vocab, vocab + -vocab % 64 + 64, layers, heads, width, prompt + response), batch, prompt, response)


SHAPES = {
    "tiny": shape(1, 2, 16, 300, 4, 4, 6),
    "S": shape(4, 4, 128, 2048, 64, 32, 64),
    "M": shape(12, 12, 768, 50257, 8, 32, 64),  # GPT-2 small
}


class Case(NamedTuple):
    name: str
    tokens: int  # handled by one run
    flops: float  # that any way of doing it needs; a multiply-add is two
    bytes: float  # that have to pass through memory once
    ours: Callable
    plain: Callable | None = None
    peer: Callable | None = None


# ---- measuring -------------------------------------------------------------------------------------------------------


def seconds(run: Callable, device: torch.device) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable, device: torch.device) -> float:
    """Highest memory during a run above that before it; on a processor by Linux's high-water mark, nan elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = status("VmRSS")
        run()
        return status("VmHWM") - before
    except OSError:
        return float("nan")


def status(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def ceilings(device: torch.device, quick: bool) -> tuple[float, float]:
    """(matrix-product FLOP/s, copied bytes/s) of this device, the best of five."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (256 if quick else 1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn((2**20 if quick else 2**24), device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ b, device) for _ in range(5))
    copying = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * size**3 / product, 2 * source.numel() * 4 / copying


def measure(case: Case, device: torch.device, rounds: int, roof: tuple[float, float]) -> dict:
    """One row of the table; ours, plain and peer take turns, so that a noisy spell meets all of them."""
    runs = {name: run for name in ("ours", "plain", "peer") if (run := getattr(case, name))}
    times = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run, device)
            times[name] += [taken] if turn else []  # the first round warms up
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    bound = max(case.flops / roof[0], case.bytes / roof[1])
    ratio = {f"times_{name}": statistics.median(t / o for t, o in zip(taken, times["ours"]))
             for name, taken in times.items() if name != "ours"}
    return dict(part=case.name, seconds=medians["ours"], tokens_per_second=case.tokens / medians["ours"], bound=bound,
                reached=bound / medians["ours"], peak_mib=peak_bytes(case.ours, device) / 2**20, **ratio, rounds=times)


# ---- what is measured ------------------------------------------------------------------------------------------------


def kernel_cases(s: Shape, device: torch.device, peers: bool) -> list[Case]:
    tokens, width, vocab = s.batch * s.response, s.config.d_model, s.config.vocab_size
    hidden, weight = torch.randn(tokens, width, device=device), torch.randn(vocab, width, device=device) / width**0.5
    targets, upstream = torch.randint(vocab, (tokens,), device=device), torch.randn(tokens, device=device)
    rewards, values = torch.randn(2, 8 * s.batch, 16 * s.response, device=device)
    mask, size = torch.ones_like(rewards, dtype=torch.bool), rewards.numel()

    def both(logprobs):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs(h, w, targets).backward(upstream)

    def trl(h, w, y):
        return naive.peer_logprobs(h, w, y)()

    product, touched = 2.0 * tokens * width * vocab, 4.0 * (tokens + vocab) * width
    peer = peers and naive.available("trl")
    return [
        Case("token_logprobs forward", tokens, product, touched, lambda: token_logprobs(hidden, weight, targets),
             lambda: naive.whole_logprobs(hidden, weight, targets),
             naive.peer_logprobs(hidden, weight, targets) if peer else None),
        Case("token_logprobs and gradients", tokens, 3 * product, 2 * touched, lambda: both(token_logprobs),
             lambda: both(naive.whole_logprobs), (lambda: both(trl)) if peer else None),
        Case("discounted_returns", size, 0, 9.0 * size, lambda: discounted_returns(rewards, mask, 0.95)),
        Case("gae", size, 0, 13.0 * size, lambda: gae(rewards, values, mask, 1.0, 0.95),
             lambda: naive.gae_by_loop(rewards, values, 1.0, 0.95), naive.peer_gae(rewards, values) if peers else None),
    ]


def trunk_flops(config: ModelConfig, tokens: int, length: int) -> float:
    """Of a forward pass over texts of this mean length: 24 D^2 a layer and token, and 2 D length of causal attention."""
    return tokens * config.n_layer * (24 * config.d_model**2 + 2 * config.d_model * length)


def rollout_case(model: Transformer, s: Shape, device: torch.device, peers: bool, plain: bool = True) -> Case:
    c, ids, uniforms = model.config, prompts(s, device), torch.rand(s.batch, s.response, device=device)
    mask, length = torch.ones_like(ids, dtype=torch.bool), s.prompt + s.response
    weights = sum(p.numel() for p in model.blocks.parameters()) + c.vocab_size * c.d_model
    cache = 2 * c.n_layer * c.d_model * s.batch * (s.prompt + s.response / 2)
    return Case("rollout", s.batch * s.response,
                trunk_flops(c, s.batch * length, length) + 2.0 * s.batch * s.response * c.d_model * c.vocab_size,
                4.0 * s.response * (weights + cache),
                lambda: generate(model, ids, mask, s.response, -1, 0, uniforms),  # -1: nobody ends early
                (lambda: naive.rollout_without_cache(model, ids, mask, s.response)) if plain else None,
                naive.peer_rollout(model, ids, mask, s.response) if peers else None)


def reward_case(model: Transformer, s: Shape, device: torch.device) -> Case:
    """Forward and backward over groups of four responses to one prompt, of lengths from a quarter of the longest up."""
    groups, length = max(1, s.batch // 4), s.prompt + s.response
    ids = torch.cat([prompts(s, device)[:groups].repeat_interleave(4, 0),
                     torch.randint(s.config.vocab_size, (4 * groups, s.response), device=device)], dim=1)
    ends = s.prompt + torch.randint(max(1, s.response // 4), s.response + 1, (4 * groups,), device=device)
    mask = torch.arange(length, device=device) < ends[:, None]
    tokens = groups * s.prompt + int((ends - s.prompt).sum())

    def step(scores):
        one, other = scores.view(groups, 4)[:, :2].flatten(), scores.view(groups, 4)[:, 2:].flatten()
        preference_loss(one, other).backward()
        model.zero_grad(set_to_none=True)

    def padded():
        last = naive.padded_trunk(model, ids, mask)[torch.arange(len(ids), device=device), ends - 1]
        return model.reward_head(last).squeeze(-1)

    weights = 12.0 * sum(p.numel() for p in model.blocks.parameters())
    return Case("reward step", tokens, 3 * trunk_flops(s.config, tokens, length), weights,
                lambda: step(sequence_scores(model, ids, mask)), lambda: step(padded()))


def iteration_case(algorithm: str, model: Transformer, s: Shape, device: torch.device, plain: bool = True) -> Case:
    """Sample, measure under policy and reference, advantages, update; rewards are random, so nothing else is timed."""
    rung, epochs = LADDER[algorithm], 4 if algorithm == "ppo" else 1
    config = PolicyConfig(algorithm=algorithm, batch_size=s.batch, minibatch_size=s.batch, ppo_epochs=epochs)
    policy, reference = copy.deepcopy(model).requires_grad_(True), model
    optimizer, ids = make_optimizer(policy, 1e-5), prompts(s, device)
    ids = ids[: s.batch // 4].repeat_interleave(4, 0) if rung.grouped else ids
    mask, uniforms, scores = torch.ones_like(ids, dtype=torch.bool), torch.rand(s.batch, s.response), torch.randn(s.batch)

    def iteration():
        sampled = generate(policy, ids, mask, s.response, -1, 0, uniforms.to(device))
        rollout = collect_rollout(policy, reference, ids, mask, *sampled, scores.to(device), 0.05, 1.0, 0)
        weights = advantages_and_returns(rung, rollout, config)
        update(policy, optimizer, rung, rollout, *weights, config, 0.05, 1e-5, s.response, 0)

    tokens, length = s.batch * s.response, s.prompt + s.response
    forward = trunk_flops(s.config, s.batch * length, length) + 2.0 * tokens * s.config.d_model * s.config.vocab_size
    sampling = rollout_case(policy, s, device, False, False)
    return Case(f"{algorithm} iteration", tokens, (3 + 3 * epochs) * forward, sampling.bytes, iteration,
                (lambda: naive.naive_iteration(policy, reference, optimizer, ids, mask, s.response, epochs)) if plain else None)


def prompts(s: Shape, device: torch.device) -> torch.Tensor:
    return torch.randint(1, s.config.vocab_size, (s.batch, s.prompt), device=device)


def growth(s: Shape, device: torch.device, roof: tuple[float, float], quick: bool) -> list[dict]:
    """One round each of rollout and log-probs as one size grows and the others stay; a size that took 20 s is the last."""
    rows = []
    sizes = dict(batch=[1, 4, 16, 64, 256, 1024], response=[32, 64, 128, 256, 512, 1024],
                 vocabulary=[2048, 8192, 32768, 131072])
    for what, values in sizes.items():
        for value in values[:2] if quick else values:
            c, batch, response = s.config, s.batch, s.response
            batch, response = (value if what == "batch" else min(batch, 16)), (value if what == "response" else response)
            vocab = value if what == "vocabulary" else c.vocab_size
            grown = shape(c.n_layer, c.n_head, c.d_model, vocab, batch, s.prompt, response)
            model = Transformer(grown.config).to(device)
            cases = rollout_case(model, grown, device, False, False), kernel_cases(grown, device, False)[1]
            for case in cases:
                row = measure(case._replace(plain=None), device, 1, roof)
                rows.append(dict(row, part=f"{case.name}, {what} {value}"))
            if rows[-2]["seconds"] > 20:
                break
    return rows


# ---- saying it -------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    lines = ["| part | ms | tokens/s | bound, ms | reached | plain PyTorch | peer | peak MiB |", "|---" * 8 + "|"]
    for row in rows:
        plain, peer = (f"{row[key]:.2f}x" if key in row else "" for key in ("times_plain", "times_peer"))
        lines.append(f"| {row['part']} | {row['seconds'] * 1e3:.2f} | {row['tokens_per_second']:,.0f} | "
                     f"{row['bound'] * 1e3:.2f} | {row['reached']:.0%} | {plain} | {peer} | {row['peak_mib']:.0f} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--shape", default="S", choices=SHAPES, help="S: 4 layers of 128; M: GPT-2 small; tiny: a dry run")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--peers", action="store_true", help="transformers, TRL and torchrl beside it, where they are installed")
    parser.add_argument("--quick", action="store_true", help="one round, tiny shape, two sizes of each kind")
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true", help="one object a line, every round in it")
    args = parser.parse_args(arguments)
    device, s = pick_device(args.device), SHAPES["tiny" if args.quick else args.shape]
    keep_freed_memory()  # as both scripts do
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    roof, model, rounds = ceilings(device, args.quick), Transformer(s.config).to(device), 1 if args.quick else args.rounds
    cases = kernel_cases(s, device, args.peers) + [rollout_case(model, s, device, args.peers), reward_case(model, s, device)]
    cases += [iteration_case(algorithm, model, s, device) for algorithm in ("ppo", "rloo", "grpo")]
    rows = [measure(case, device, rounds, roof) for case in cases]
    grown = growth(s, device, roof, args.quick) if args.growth else []
    if args.json:
        print("\n".join(json.dumps(dict(row, device=str(device), threads=args.threads)) for row in rows + grown))
        return rows + grown
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"processor, {args.threads} thread(s)"
    print(f"{name}: {roof[0] / 1e9:.0f} GFLOP/s in matrix products, {roof[1] / 1e9:.1f} GB/s copied. Medians of {rounds} "
          f"rounds; 2.00x under another way means that it takes twice our time.\n\n{table(rows)}\n")
    print(table(grown) if grown else "")
    if device.type != "cuda":
        print("\nnot yet measured on a GPU: run this with --device cuda where there is one")
    return rows + grown


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(fail(str(error), 2))
