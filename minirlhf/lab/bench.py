"""How fast is each part, compared with plain PyTorch, other libraries and the machine's limits?

`python -m minirlhf.lab.bench --help`

One row for each part: median time of interleaved rounds; tokens per second; the bound (the larger
of arithmetic / the measured speed of matrix products and bytes / the measured speed of copying);
which share of the bound is reached; peak extra memory. Then how time grows with batch, response
length and vocabulary.
"""

import contextlib
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from minirlhf.config import DEVICES
from minirlhf.lab import bench_cases as cases
from minirlhf.lab import bench_peers
from minirlhf.lab.bench_cases import SHAPES, Case, Shape
from minirlhf.lab.bench_machine import free_bytes, peak_bytes, seconds, speed_limits
from minirlhf.lab.common import markdown_table, run_lab
from minirlhf.run.command_line import check_ranges, setting
from minirlhf.run.device import pick_device
from minirlhf.run.errors import UserError
from minirlhf.run.terminal import Progress, echo

import torch

LONGEST = 20.0  # seconds: what is expected to take longer is skipped
GROWTH = dict(batch=[1, 4, 16, 64, 256, 1024], response=[32, 64, 128, 256, 512, 1024],
              vocabulary=[2048, 8192, 32768, 131072])


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Time each part, compared with plain PyTorch, other libraries and the machine's limits."""

    device: str = setting("auto", "auto: cuda if there is one, otherwise cpu", choices=DEVICES)
    shape: str = setting("S", "S: 4 layers of width 128, 2048 tokens; M: GPT-2 small; SmolLM2: the "
                              "one with 135M parameters; tiny: only shows that it runs",
                         choices=tuple(SHAPES))
    rounds: int = setting(7, "timed runs of each way, which take turns", 1)
    threads: int = setting(1, "of the CPU", 1)
    peers: bool = setting(False, "also time transformers, TRL and torchrl, if they are installed")
    only: str = setting("", "measure only parts whose name contains this, without growth tables")
    growth: bool = setting(True, "also one run each of growing batches, responses, vocabularies")
    quick: bool = setting(False, "one round of the tiny shape, two sizes of each kind")
    json: bool = setting(False, "one JSON object for each row, with every round, instead of tables")

    def check(self) -> None:
        check_ranges(self)


class Limits(NamedTuple):
    """Measured speeds of this device."""

    flops: float  # floating-point operations of matrix products per second
    bytes: float  # copied per second

    def bound(self, case: Case) -> float:
        """The least seconds that a case can take."""
        return max(case.flops / self.flops, case.bytes / self.bytes)


# ---- measuring -----------------------------------------------------------------------------------


def take_turns(case: Case, device: torch.device, rounds: int,
               limits: Limits) -> tuple[dict[str, list[float]], str]:
    """(seconds of each way in each round, what was skipped).

    The ways take turns, so that a slow phase of the machine affects all of them. The first turn of
    each way is a warm-up.
    """
    ways = {"ours": case.ours}
    skipped = ""
    expected = case.flops * case.plain_work / limits.flops
    if case.plain and expected > LONGEST:
        skipped = f"plain PyTorch skipped: a round would take over {expected:.0f} s"
    elif case.plain:
        ways["plain"] = case.plain
    ways |= case.peers
    times: dict[str, list[float]] = {name: [] for name in ways}
    repeat: dict[str, int] = {}

    def turn() -> None:
        for name, way in ways.items():
            if name == "plain" and len(times[name]) == 2 and times[name][0] > 2.0:
                continue  # two rounds of a slow plain way are enough
            taken = seconds(way, device, repeat.get(name, 1))
            if name in repeat:
                times[name].append(taken)
                continue
            if taken < 0.1:
                taken = seconds(way, device)  # without the costs of a first call
            repeat[name] = max(1, min(100, int(0.01 / taken)))  # short runs: many calls in a row

    if case.trainer is None:
        for _ in range(rounds + 1):
            turn()
        return times, skipped
    name, train = case.trainer
    of_trainer = []

    def between(taken: float) -> None:
        of_trainer.append(taken)
        turn()

    train(rounds + 1, between)
    return times | {name: of_trainer[1:]}, skipped


def measure(case: Case, device: torch.device, rounds: int, limits: Limits) -> dict:
    """One row of the table. A ratio is the median over rounds of another way's time / ours."""
    times, skipped = take_turns(case, device, rounds, limits)
    taken = statistics.median(times["ours"])
    ratios = {name: statistics.median(other / ours for other, ours in zip(others, times["ours"]))
              for name, others in times.items() if name != "ours"}
    ways = {"ours": case.ours} | case.peers
    peaks = {name: peak_bytes(way, device) / 2**20 for name, way in ways.items()}
    bound = limits.bound(case)
    return dict(part=case.name, seconds=taken, tokens_per_second=case.tokens / taken, bound=bound,
                reached=bound / taken, peak_mib=peaks["ours"], ratios=ratios, peaks_mib=peaks,
                skipped=skipped, rounds=times)


def parts(s: Shape, device: torch.device, peers) -> Iterator[tuple[str, Callable[[], Case]]]:
    """(name, function that makes the case): made one after the other, to need less memory."""
    partial = functools.partial
    model = cases.make_model(s.config, device)
    yield "token_logprobs forward", partial(cases.logprob_case, False, s, device, peers)
    yield "token_logprobs forward and backward", partial(cases.logprob_case, True, s, device, peers)
    for rows, columns in ((8 * s.batch, 16 * s.response), (64, 64)):
        yield (f"discounted_returns {rows} x {columns}",
               partial(cases.returns_case, rows, columns, device))
        yield f"gae {rows} x {columns}", partial(cases.gae_case, rows, columns, device, peers)
    for kind in ("fixed", "ragged", "geometric"):
        yield f"rollout, {kind}", partial(cases.rollout_case, kind, model, s, device, peers)
    yield "reward-model step, ragged pairs", partial(cases.reward_case, model, s, device, peers)
    yield "policy update", partial(cases.update_case, model, s, device, peers)
    for name in ("ppo", "rloo", "grpo"):
        yield f"{name} iteration", partial(cases.iteration_case, name, model, s, device, peers)


def growth(s: Shape, device: torch.device, limits: Limits, quick: bool) -> list[dict]:
    """One run each of rollout and log-probs while one size grows; skips what does not fit."""
    rows = []
    c = s.config
    for kind, values in GROWTH.items():
        for value in values[:2] if quick else values:
            name = f"{kind} {value}"
            vocab = value if kind == "vocabulary" else c.vocab_size
            response = value if kind == "response" else s.response
            config = dataclasses.replace(c, vocab_size=vocab, table_rows=cases.table_rows(vocab),
                                         context=s.prompt + response)
            batch = value if kind == "batch" else min(s.batch, 16)
            grown = Shape(config, batch, s.prompt, response)
            per_row = 8 * grown.config.vocab_size + 8 * c.n_layer * c.d_model * grown.config.context
            needed = 4.0 * grown.batch * per_row + 16.0 * grown.config.table_rows * c.d_model
            if needed > free_bytes(device):
                rows.append(dict(part=name, skipped=f"skipped: needs {needed / 2**30:.0f} GiB, "
                                                    "more than is free"))
                continue
            model = cases.make_model(grown.config, device)
            decoding = cases.rollout_case("fixed", model, grown, device, None, False)
            if 3 * limits.bound(decoding) > LONGEST:
                rows.append(dict(part=name, skipped="skipped: would take too long"))
                continue
            for case in (decoding, cases.logprob_case(True, grown, device, None)):
                row = measure(case._replace(plain=None), device, 1, limits)
                rows.append(row | dict(part=f"{case.name}, {name}"))
    return rows


# ---- output --------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if "seconds" not in row:
            lines.append([row["part"], *[""] * 6, row["skipped"]])
            continue
        notes = []
        for name, ratio in row["ratios"].items():
            peak = row["peaks_mib"].get(name)
            memory = f" ({peak:.0f} MiB)" if peak is not None else ""
            if name != "plain":
                notes.append(f"{name} {ratio:.2f}x{memory}")
        notes += [row["skipped"]] if row["skipped"] else []
        plain = f"{row['ratios']['plain']:.2f}x" if "plain" in row["ratios"] else ""
        lines.append([row["part"], f"{row['seconds'] * 1e3:.2f}",
                      f"{row['tokens_per_second']:,.0f}", f"{row['bound'] * 1e3:.2f}",
                      f"{row['reached']:.0%}", f"{row['peak_mib']:.0f}", plain, "; ".join(notes)])
    return markdown_table(["part", "ms", "tokens/s", "bound, ms", "reached", "peak MiB",
                           "plain PyTorch", "others"], lines)


def print_json(row: dict, device: torch.device, threads: int, limits: Limits) -> None:
    where = dict(device=str(device), threads=threads, flops_per_second=limits.flops,
                 bytes_per_second=limits.bytes)
    echo(json.dumps(row | where))


def main(config: BenchConfig) -> list[dict]:
    """Measure and print the rows; returns them. Raises UserError."""
    config.check()
    device = pick_device(config.device)
    s = SHAPES["tiny" if config.quick else config.shape]
    rounds = 1 if config.quick else config.rounds
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    limits = Limits(*speed_limits(device, config.quick))
    chosen = [part for part in parts(s, device, bench_peers if config.peers else None)
              if config.only in part[0]]
    if not chosen:
        raise UserError(f"--only {config.only!r}: no part has such a name; "
                        "leave the flag out to measure all parts")
    rows = []
    progress = Progress("part", len(chosen), plain_lines=len(chosen))
    for number, (name, make) in enumerate(chosen, start=1):
        with contextlib.redirect_stdout(sys.stderr):  # only results go to stdout
            case = make()
            if s.config.rope_base:  # plain PyTorch is written for GPT-2's form only
                case = case._replace(plain=None)
            rows.append(measure(case, device, rounds, limits))
            progress.show(number, name)
        if config.json:
            print_json(rows[-1], device, config.threads, limits)
    more = growth(s, device, limits, config.quick) if config.growth and not config.only else []
    if config.json:
        for row in more:
            print_json(row, device, config.threads, limits)
        return rows + more
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if is_gpu else f"CPU, {config.threads} thread(s)"
    echo(f"{name}: {limits.flops / 1e9:.0f} GFLOP/s in matrix products, "
         f"{limits.bytes / 1e9:.1f} GB/s copied. Medians of {rounds} rounds; 2.00x in another "
         f"way's column: it takes twice our time.\n\n{table(rows)}\n")
    echo(table(more) if more else "")
    if not is_gpu:
        echo("\nnot yet measured on a GPU: use --device cuda on a machine with one")
    return rows + more


if __name__ == "__main__":
    run_lab(main, BenchConfig)
