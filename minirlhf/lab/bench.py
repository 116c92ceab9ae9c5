"""How fast each part is, beside plain PyTorch, other libraries and what the machine allows. `python -m minirlhf.lab.bench --help`

One row per part: median time of interleaved rounds, tokens per second, the physical bound (the larger of arithmetic over the
measured matrix-product ceiling and bytes over the measured copy ceiling), the share of it reached, peak extra memory.
Then how time grows with batch, response length and vocabulary; on a GPU also the targets that were set for one.
"""

import contextlib
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator

import torch

from minirlhf.config import DEVICES, UserError
from minirlhf.device import pick_device
from minirlhf.flags import check_ranges, keep_freed_memory, setting
from minirlhf.lab import bench_cases as cases
from minirlhf.lab import bench_peers
from minirlhf.lab.bench_cases import SHAPES, Case, Shape, shape
from minirlhf.lab.bench_machine import allocator_as_delivered, ceilings, free_bytes, peak_bytes, seconds
from minirlhf.lab.common import markdown_table, run_lab
from minirlhf.log import Progress
from minirlhf.model import Transformer

PATIENCE = 20.0  # seconds that one run of a plain way, or of a size of the growth tables, may be expected to take


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Time every part of the project, beside plain PyTorch, other libraries and the bounds of this machine."""

    device: str = setting("auto", "auto takes cuda when there is one, else cpu", choices=DEVICES)
    shape: str = setting("S", "S: 4 layers of 128, 2048 words; M: GPT-2 small; tiny: a dry run", choices=tuple(SHAPES))
    rounds: int = setting(7, "timed runs of each way, which take turns", 1)
    threads: int = setting(1, "of the processor", 1)
    peers: bool = setting(False, "transformers, TRL and torchrl beside it, where they are installed")
    only: str = setting("", "measure the parts whose name holds this, without the growth tables")
    growth: bool = setting(True, "one run each of growing batches, responses and vocabularies")
    quick: bool = setting(False, "one round of the tiny shape, two sizes of each kind")
    json: bool = setting(False, "one object a line, every round in it, in place of tables")

    def check(self) -> None:
        check_ranges(self)


# ---- measuring -------------------------------------------------------------------------------------------------------


def take_turns(case: Case, device: torch.device, rounds: int, roof: tuple[float, float]) -> tuple[dict[str, list[float]], str]:
    """Seconds of each way in each round, and what was left out. The ways take turns, so that a noisy spell meets all."""
    runs, skipped = {"ours": case.ours}, ""
    if case.plain and case.flops * case.plain_work / roof[0] > PATIENCE:
        skipped = f"plain PyTorch left out: would take over {case.flops * case.plain_work / roof[0]:.0f} s a round"
    elif case.plain:
        runs["plain"] = case.plain
    runs |= case.peers
    times, repeat = {name: [] for name in runs}, {}

    def turn() -> None:
        for name, run in runs.items():
            if name == "plain" and len(times[name]) == 2 and times[name][0] > 2.0:
                continue  # it is no rival: two rounds say enough
            keep_freed_memory() if name in ("ours", "plain") else allocator_as_delivered()
            taken = seconds(run, device, repeat.get(name, 1))
            if name not in repeat:  # warming up; what is over in an instant is timed many times in a row
                taken = seconds(run, device) if taken < 0.1 else taken
                repeat[name] = max(1, min(100, int(0.01 / taken)))
            else:
                times[name].append(taken)

    if case.trainer is None:
        for _ in range(rounds + 1):
            turn()
    else:
        name, train = case.trainer
        theirs = []

        def between(taken: float) -> None:
            theirs.append(taken)
            turn()
            allocator_as_delivered()

        allocator_as_delivered()
        train(rounds + 1, between)
        times[name] = theirs[1:]
    return times, skipped


def measure(case: Case, device: torch.device, rounds: int, roof: tuple[float, float]) -> dict:
    """One row of the table. Ratios are medians over the rounds of another way's time over ours."""
    times, skipped = take_turns(case, device, rounds, roof)
    taken, bound = statistics.median(times["ours"]), max(case.flops / roof[0], case.bytes / roof[1])
    ratios = {name: statistics.median(other / ours for other, ours in zip(those, times["ours"]))
              for name, those in times.items() if name != "ours"}
    keep_freed_memory()
    peaks = {name: peak_bytes(run, device) / 2**20 for name, run in {"ours": case.ours, **case.peers}.items()}
    return dict(part=case.name, seconds=taken, tokens_per_second=case.tokens / taken, bound=bound, reached=bound / taken,
                peak_mib=peaks["ours"], ratios=ratios, peaks_mib=peaks, skipped=skipped, rounds=times)


def parts(s: Shape, device: torch.device, peers) -> Iterator[tuple[str, Callable[[], Case]]]:
    """(name, how to make it): made one after the other, so that only one holds memory."""
    model = Transformer(s.config).to(device).requires_grad_(True)
    for number, case in enumerate(cases.kernel_cases(s, device, None)):
        yield case.name, lambda number=number: cases.kernel_cases(s, device, peers)[number]
    for kind in ("fixed", "ragged", "geometric"):
        yield f"rollout, {kind}", functools.partial(cases.rollout_case, kind, model, s, device, peers)
    yield "reward-model step, ragged pairs", functools.partial(cases.reward_case, model, s, device, peers)
    yield "policy update", functools.partial(cases.update_case, model, s, device, peers)
    for algorithm in ("ppo", "rloo", "grpo"):
        yield f"{algorithm} iteration", functools.partial(cases.iteration_case, algorithm, model, s, device, peers)


def growth(s: Shape, device: torch.device, roof: tuple[float, float], quick: bool) -> list[dict]:
    """One run each of rollout and log-probs as one size grows and the others stay; what would not fit is named, not run."""
    rows = []
    sizes = dict(batch=[1, 4, 16, 64, 256, 1024], response=[32, 64, 128, 256, 512, 1024],
                 vocabulary=[2048, 8192, 32768, 131072])
    for what, values in sizes.items():
        for value in values[:2] if quick else values:
            c = s.config
            grown = shape(c.n_layer, c.n_head, c.d_model, value if what == "vocabulary" else c.vocab_size,
                          value if what == "batch" else min(s.batch, 16), s.prompt, value if what == "response" else s.response)
            name = f"{what} {value}"
            need = 4.0 * grown.batch * (8 * grown.config.vocab_size + 8 * c.n_layer * c.d_model * grown.config.context)
            if need + 16.0 * grown.config.table_rows * c.d_model > free_bytes(device):
                rows.append(dict(part=name, skipped=f"left out: needs {need / 2**30:.0f} GiB, which are not free"))
                continue
            decoding = cases.rollout_case("fixed", Transformer(grown.config).to(device), grown, device, None, False)
            if 3 * max(decoding.flops / roof[0], decoding.bytes / roof[1]) > PATIENCE:
                rows.append(dict(part=name, skipped="left out: would take too long"))
                continue
            for case in (decoding, cases.kernel_cases(grown, device, None)[1]):
                row = measure(case._replace(plain=None), device, 1, roof)
                rows.append(dict(row, part=f"{case.name}, {name}"))
    return rows


def targets(device: torch.device, roof: tuple[float, float], s: Shape, batch: int) -> list[dict]:
    """What was asked of one GPU, and what it reached: log-probs of 16384 tokens, GAE of 8192 x 1024, decoding and updating."""
    kernels = s._replace(batch=8 * batch // (s.prompt + s.response) * 8)
    model = Transformer(s.config).to(device).requires_grad_(True)
    wanted = [  # (case, figure, what it should be, whether less is better)
        (lambda: cases.kernel_cases(kernels, device, None)[1], "seconds", 0.010, True),
        (lambda: cases.kernel_cases(kernels, device, None)[1], "peak_mib", 381, True),
        (lambda: cases.scan_cases(32 * batch, 4 * batch, device, None)[1], "reached", 0.75, False),
        (lambda: cases.rollout_case("fixed", model, s._replace(batch=batch), device, None, False), "tokens_per_second", 170e3,
         False),
        (lambda: cases.update_case(model, s._replace(batch=batch // 4), device, None), "reached", 0.40, False)]
    rows = []
    for make, figure, target, less in wanted:
        row = measure(make()._replace(plain=None), device, 3, roof)
        met = row[figure] <= target if less else row[figure] >= target
        rows.append(dict(row, target=f"{figure} {target:g}: {'met' if met else 'missed'}, {row[figure]:.3g}"))
    return rows


# ---- saying it -------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if "seconds" not in row:
            lines.append([row["part"], *[""] * 6, row["skipped"]])
            continue
        others = [f"{name} {ratio:.2f}x" + (f" ({row['peaks_mib'][name]:.0f} MiB)" if name in row["peaks_mib"] else "")
                  for name, ratio in row["ratios"].items() if name != "plain"]
        others += filter(None, [row["skipped"], row.get("target", "")])
        plain = f"{row['ratios']['plain']:.2f}x" if "plain" in row["ratios"] else ""
        lines.append([row["part"], f"{row['seconds'] * 1e3:.2f}", f"{row['tokens_per_second']:,.0f}",
                      f"{row['bound'] * 1e3:.2f}", f"{row['reached']:.0%}", f"{row['peak_mib']:.0f}", plain, "; ".join(others)])
    header = ["part", "ms", "tokens/s", "bound, ms", "reached", "peak MiB", "plain PyTorch", "others, targets"]
    return markdown_table(header, lines)


def main(config: BenchConfig) -> list[dict]:
    config.check()
    device, s = pick_device(config.device), SHAPES["tiny" if config.quick else config.shape]
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    roof, rounds, rows = ceilings(device, config.quick), 1 if config.quick else config.rounds, []
    where = dict(device=str(device), threads=config.threads, flops_per_second=roof[0], bytes_per_second=roof[1])
    wanted = [part for part in parts(s, device, bench_peers if config.peers else None) if config.only in part[0]]
    if not wanted:
        raise UserError(f"--only {config.only!r}: no part has such a name; without the flag all are measured")
    said = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # figures alone go to stdout
        progress = Progress("part", len(wanted), plain_lines=len(wanted))
        for number, (name, make) in enumerate(wanted, start=1):
            rows.append(measure(make(), device, rounds, roof))
            if config.json:
                print(json.dumps(dict(rows[-1], **where)), file=said, flush=True)
            progress.show(number, name)
    more = growth(s, device, roof, config.quick) if config.growth and not config.only else []
    if device.type == "cuda" and not config.only:
        more += targets(device, roof, shape(12, 12, 768, 50257, 1, 64, 448), 256)
    if config.json:
        print("".join(json.dumps(dict(row, **where)) + "\n" for row in more), end="")
        return rows + more
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"processor, {config.threads} thread(s)"
    print(f"{name}: {roof[0] / 1e9:.0f} GFLOP/s in matrix products, {roof[1] / 1e9:.1f} GB/s copied. Medians of {rounds} "
          f"rounds; 2.00x under another way means that it takes twice our time.\n\n{table(rows)}\n")
    print(table(more) if more else "")
    if device.type != "cuda":
        print("\nnot yet measured on a GPU: run this with --device cuda where there is one")
    return rows + more


if __name__ == "__main__":
    run_lab(main, BenchConfig)
