"""Measure everything on one GPU in six minutes: `python -m minirlhf.lab.gpu --out DIR`

Each part runs in its own process with a time limit, so a failure does not stop the other parts.
The results are DIR/gpu.json and DIR/gpu.md: device, versions, date, one row per measurement, and
the last lines of every part that failed. --dry-run uses reduced sizes and also runs on a CPU, with
the kernels in Triton's interpreter.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from minirlhf.kernels.logprob import HAS_TRITON
from minirlhf.lab.common import ROOT, lab_folder, markdown_table, read_rows, run_lab
from minirlhf.lab.gpu_parts import MEASUREMENTS, Row
from minirlhf.run.command_line import check_ranges, setting
from minirlhf.run.errors import UserError, suggest
from minirlhf.run.files import write_atomically
from minirlhf.run.metrics import rounded
from minirlhf.run.terminal import echo, printable

import torch

TOTAL_SECONDS = 360
DRY_RUN_FACTOR = 10  # a dry run may take longer: an interpreter runs the kernels
LAST_LINES = 15  # of a failed part's output, in the results
# part -> seconds it may take; in this order
LIMITS = {"machine": 20, "kernels": 60, "decode": 60, "update": 60, "resume": 50, "tests": 80,
          "task": 120}


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """Run tests, kernels, decoding, updates, resume and both scripts on one GPU."""

    out: str = setting("", "folder for gpu.json, gpu.md and the output of each part")
    parts: str = setting(",".join(LIMITS), "which parts to run, separated by commas")
    dry_run: bool = setting(False, "reduced sizes; also runs without a GPU, to test this script")
    measure: str = setting("", "internal: run one part in this process")

    def check(self) -> None:
        """Raise UserError for the first setting that is wrong."""
        check_ranges(self)
        if not self.out:
            raise UserError("--out is missing: name a folder for the results")
        unknown = [part for part in self.parts.split(",") if part not in LIMITS]
        if unknown:
            raise UserError(f"--parts: {unknown[0]!r} is not known{suggest(unknown[0], LIMITS)}")


def main(config: GpuConfig) -> dict:
    """Run all parts and write the results; returns the content of gpu.json.

    Raises UserError, after all other parts, if a part failed.
    """
    config.check()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.measure:
        write_rows(Path(config.out), config.measure, MEASUREMENTS[config.measure](config.dry_run))
        return {}
    folder = Path(config.out)
    if (folder / "gpu.json").exists():
        raise UserError(f"{folder / 'gpu.json'}: already exists; use another --out")
    if device.type == "cpu" and not config.dry_run:
        raise UserError("no GPU: torch finds no CUDA device; add --dry-run to test this script")
    lab_folder(config.out)
    results = dict(about=describe_machine(device, config.dry_run), parts={})
    deadline = time.monotonic() + TOTAL_SECONDS * (DRY_RUN_FACTOR if config.dry_run else 1)
    for part in config.parts.split(","):
        results["parts"][part] = run_part(part, folder, config.dry_run, deadline)
        echo(describe_part(part, results["parts"][part]))
        write_atomically(folder / "gpu.json", (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(folder / "gpu.md", page(results).encode())
    echo(f"saved {folder / 'gpu.json'} and gpu.md")
    failed = [part for part, result in results["parts"].items() if not is_ok(result)]
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; {folder / 'gpu.md'} has their last lines")
    return results


def describe_machine(device: torch.device, dry_run: bool) -> dict:
    """Device, versions and date."""
    about = dict(device="CPU", python=platform.python_version(), torch=torch.__version__,
                 date=time.strftime("%Y-%m-%d"), dry_run=dry_run, triton=None)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= dict(device=properties.name, cuda=torch.version.cuda,
                      memory_gib=round(properties.total_memory / 2**30, 1),
                      compute_capability=f"{properties.major}.{properties.minor}",
                      bfloat16=torch.cuda.is_bf16_supported(including_emulation=False))
    if HAS_TRITON:
        import triton

        about["triton"] = triton.__version__
    return about


# ---- parts ---------------------------------------------------------------------------------------


def command_of(part: str, folder: Path, dry_run: bool) -> list[str]:
    """The command of a part: a measurement of gpu_parts.py, or pytest."""
    if part == "tests":
        return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
                "tests"]
    flags = ["--dry-run"] if dry_run else []
    return [sys.executable, "-m", "minirlhf.lab.gpu", "--out", str(folder), "--measure", part,
            *flags]


def run_part(part: str, folder: Path, dry_run: bool, deadline: float) -> dict:
    """Run one part in its own process: status, seconds, rows, and its last lines if it failed."""
    limit = LIMITS[part] * (DRY_RUN_FACTOR if dry_run else 1)
    limit = min(limit, deadline - time.monotonic())
    if limit < 1:
        return dict(status="skipped: no time left", seconds=0.0, rows=[], last_lines=[])
    log = folder / f"{part}.txt"
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(command_of(part, folder, dry_run), cwd=ROOT, stdout=output,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   process_group=0, env=part_environment())
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            stop_group(process)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last_lines = [] if status == "ok" else [printable(line) for line in lines[-LAST_LINES:]]
    return dict(status=status, seconds=round(time.monotonic() - start, 1),
                rows=read_rows(folder / f"{part}.jsonl"), last_lines=last_lines)


def part_environment() -> dict[str, str]:
    """The project is importable; without a GPU, Triton uses its interpreter."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | dict(PYTHONPATH=path)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    return environment


def stop_group(process: subprocess.Popen) -> None:
    """End a process and everything that it started."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass
    process.wait()


def write_rows(folder: Path, part: str, rows: list[Row]) -> None:
    """The rows of a measurement, for the parent process."""
    lines = [json.dumps(rounded(row._asdict())) + "\n" for row in rows]
    write_atomically(folder / f"{part}.jsonl", "".join(lines).encode())


# ---- results -------------------------------------------------------------------------------------


def is_ok(result: dict) -> bool:
    """Whether a part ended normally and all its checks pass."""
    return result["status"] == "ok" and all(row["ok"] is not False for row in result["rows"])


def describe_part(part: str, result: dict) -> str:
    """One line for the terminal."""
    failed = sum(row["ok"] is False for row in result["rows"])
    checks = f", {failed} of {len(result['rows'])} rows failed" if failed else ""
    last = f": {result['last_lines'][-1]}" if result["last_lines"] else ""
    return f"{part}: {result['status']}{checks}, {result['seconds']:.0f} s{last}"


def page(results: dict) -> str:
    """gpu.md."""
    about = results["about"]
    lines = [f"# {about['device']}, {about['date']}", "",
             ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    rows = [row for part in results["parts"].values() for row in part["rows"]]
    cells = [[row["name"], cell(row["milliseconds"]), cell(row["megabytes"]),
              cell(row["bound"]), row["note"], {True: "yes", False: "NO", None: ""}[row["ok"]]]
             for row in rows]
    lines += [markdown_table(["measurement", "ms", "MiB", "of its bound", "note", "check passes"],
                             cells), ""]
    for part, result in results["parts"].items():
        lines.append(f"{part}: {result['status']}, {result['seconds']:.0f} s")
        if result["last_lines"]:
            lines += ["", "```text", *result["last_lines"], "```"]
        lines.append("")
    return "\n".join(lines)


def cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    run_lab(main, GpuConfig)
