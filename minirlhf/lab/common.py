"""What the labs share: runs of the two scripts in processes of their own, rows that outlive a stop, tables, pictures."""

import contextlib
import dataclasses
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from minirlhf.checkpoint import write_atomically
from minirlhf.config import PolicyConfig, RewardConfig, UserError, run_script
from minirlhf.flags import fail, flag, read_config
from minirlhf.log import Progress, rounded
from minirlhf.run import FREE
from minirlhf.task import HELPDESK

ROOT = Path(__file__).resolve().parents[2]

# Black and white apart by line and marker as well as by lightness (colours: Okabe and Ito 2008, safe for the colour-blind).
STYLES = (("#000000", "-", "o"), ("#E69F00", "--", "s"), ("#56B4E9", "-.", "^"), ("#009E73", ":", "D"),
          ("#D55E00", "-", "v"), ("#0072B2", "--", "P"), ("#CC79A7", "-.", "X"))


def run_lab(main: Callable, config_class) -> None:
    """run_script, and for a Ctrl-C one line and status 130: what is finished is on the disk."""
    try:
        run_script(main, config_class)
    except KeyboardInterrupt:
        sys.exit(fail("stopped; the same command goes on from here", 130))


# ---- runs of the scripts ---------------------------------------------------------------------------------------------

class Job(NamedTuple):
    """One run of train_reward.py or train_policy.py, in config.out; started when the run folder that it needs is finished."""

    script: str
    config: RewardConfig | PolicyConfig
    needs: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.config.out)


def flags_of(config) -> list[str]:
    """The shortest command line that says the same as a configuration."""
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            flags.append(flag(field.name) if value else flag("no_" + field.name))
        else:
            flags += [flag(field.name), *([str(value)] if not isinstance(value, tuple) else value)]
    return flags


def finished(job: Job) -> bool:
    """Whether the run has ended as it should. Raises UserError where the folder holds a run with other settings."""
    if not (job.folder / "config.json").exists():
        return False
    stored = read_config(type(job.config), job.folder / "config.json")
    for field in dataclasses.fields(job.config):
        old, new = getattr(stored, field.name), getattr(job.config, field.name)
        if old != new and field.name not in FREE:
            raise UserError(f"{job.folder}: holds a run with {flag(field.name)} {old}, not {new}; "
                            "name another folder, or delete it")
    if isinstance(job.config, PolicyConfig):
        return (job.folder / "result.json").exists()
    return any(row["stage"] == "test" for row in read_rows(job.folder / "reward_metrics.jsonl"))


def run_jobs(jobs: Sequence[Job], at_once: int, logs: Path) -> None:
    """Run what is not finished yet, so many at once, one thread each; a stopped run goes on where its checkpoint is.

    What the scripts print goes to logs/NAME.txt. Raises UserError, once all others are through, if a run failed; after a
    Ctrl-C every run saves its state first.
    """
    waiting, running, failed = [job for job in jobs if not finished(job)], {}, {}
    logs.mkdir(parents=True, exist_ok=True)
    progress, total = Progress("run", len(jobs), len(jobs) - len(waiting), plain_lines=len(jobs)), len(jobs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            unready = {str(job.folder) for job in [*waiting, *running.values()]} | set(failed)
            for job in [job for job in waiting if job.needs not in unready][: at_once - len(running)]:
                waiting.remove(job)
                running[start(job, logs)] = job
            if not running:
                break  # what still waits needs a run that failed
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                if process.returncode or not finished(job):
                    failed[str(job.folder)] = f"{job.folder} failed: {last_line(logs / f'{job.folder.name}.txt')}"
                progress.show(total - len(waiting) - len(running),
                              f"{job.folder.name} {'failed' if str(job.folder) in failed else 'done'} ")
    except KeyboardInterrupt:
        for process in running:
            process.send_signal(signal.SIGINT)  # each saves its state and ends
        for process in running:
            process.wait()
        raise
    if failed:
        raise UserError(f"{'; '.join(failed.values())}; the other runs are kept, and the same command goes on from here")


def start(job: Job, logs: Path) -> subprocess.Popen:
    """The script as a process, in a group of its own: a Ctrl-C reaches it once, through run_jobs."""
    resume = ["--resume"] if (job.folder / "config.json").exists() else []
    command = [sys.executable, str(ROOT / job.script), *flags_of(job.config), *resume]
    one_thread = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with open(logs / f"{job.folder.name}.txt", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **one_thread},
                                process_group=0)


def last_line(path: Path) -> str:
    return (path.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def train_subset(folder: Path, groups: int) -> str:
    """The first groups of the embedded task's training preferences as a file of their own in the folder; its path."""
    path = folder / f"preferences-{groups}.jsonl"
    if not path.exists():
        with gzip.open(HELPDESK["train"], "rb") as file:
            write_atomically(path, b"".join(itertools.islice(file, groups)))
    return str(path)


def need_files(folder: Path, names: Sequence[str], command: str) -> None:
    """Raises UserError that says which command makes what the folder lacks."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: has no {' and no '.join(missing)}; make it with: {command}")


# ---- rows, tables, pictures ------------------------------------------------------------------------------------------

def read_rows(path: Path) -> list[dict]:
    """The whole rows of a jsonl file; what a crash tore is passed over."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def as_line(row: dict) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


class Rows:
    """Finished rows of a lab, by key: a lab that was stopped computes only what is not there yet."""

    def __init__(self, path: Path, about: dict):
        """about: what the rows depend on (settings, checksums of inputs). Raises UserError if the file has other rows."""
        about, path.parent.mkdir(parents=True, exist_ok=True)
        found = read_rows(path)
        about = json.loads(json.dumps(about))
        if found and found[0].get("about") != about:
            raise UserError(f"{path}: holds rows of other settings or inputs; name another --out, or delete it")
        self.rows = {row["key"]: row for row in found if "key" in row}
        whole = found or [dict(about=about)]
        write_atomically(path, b"".join(map(as_line, whole)))  # without what a crash tore
        self.file = open(path, "ab", buffering=0)

    def get(self, key: str, compute: Callable[[], dict]) -> dict:
        """The row of this key, computed and written down if it is not there yet."""
        if key not in self.rows:
            row = rounded(dict(key=key, **compute()))
            self.file.write(as_line(row))
            self.rows[key] = row
        return self.rows[key]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    >>> print(markdown_table(["n", "gold"], [["1", "+0.5"]]))
    | n | gold |
    |---|---|
    | 1 | +0.5 |
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def mean_spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation over seeds.

    >>> mean_spread([1.0, 2.0, 3.0], "{:+.1f}"), mean_spread([0.5], "{:.0%}")
    ('+2.0 ± 1.0', '50%')
    """
    mean = sum(values) / len(values)
    if len(values) == 1:
        return form.format(mean)
    deviation = (sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5
    return f"{form.format(mean)} ± {form.replace('+', '').format(deviation)}"


def save_picture(path: Path, draw: Callable, **subplots) -> None:
    """draw(axes) on a matplotlib figure of plt.subplots(**subplots), saved at path; one line instead where there is none."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed; `pip install matplotlib`, and the same command draws it at once")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(**subplots)
    draw(axes)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    print(f"saved {path}")
