"""Shared by the labs: runs of the two scripts as processes, result files, tables, pictures."""

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

from minirlhf.config import PolicyConfig, RewardConfig
from minirlhf.data.splits import HELPDESK_FILES
from minirlhf.run.command_line import flag, run_script
from minirlhf.run.errors import UserError
from minirlhf.run.files import read_file, write_atomically
from minirlhf.run.folder import NO_EFFECT, read_config
from minirlhf.run.metrics import rounded
from minirlhf.run.signals import install_handler, restore_handlers
from minirlhf.run.terminal import Progress, echo, shell_command

ROOT = Path(__file__).resolve().parents[2]

# (color, line, marker). Colors are safe for color-blind readers (seven of Okabe and Ito 2008, gray
# and wine); lines and markers also differ, for print without color.
STYLES = (("#000000", "-", "o"), ("#E69F00", "--", "s"), ("#56B4E9", "-.", "^"),
          ("#009E73", ":", "D"), ("#D55E00", "-", "v"), ("#0072B2", "--", "P"),
          ("#CC79A7", "-.", "X"), ("#999999", "-", "*"), ("#882255", "--", "<"))


def run_lab(main: Callable, config_class) -> None:
    """run_script with another line after Ctrl-C. Finished results are on disk."""
    run_script(main, config_class, interrupted="stopped; run the same command again to resume")


def lab_folder(name: str) -> Path:
    """The folder of a lab's results, created if needed.

    Raises UserError if it has other files: a lab replaces its own pages and pictures.
    """
    folder = Path(name)
    mark = folder / ".lab"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise UserError(f"{folder}: contains files that are not a lab's; use a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return folder


# ---- runs of the scripts -------------------------------------------------------------------------


class Job(NamedTuple):
    """One run of train_reward.py or train_policy.py, in the folder config.out."""

    script: str
    config: RewardConfig | PolicyConfig
    needs: str = ""  # a run folder that must be finished first

    @property
    def folder(self) -> Path:
        return Path(self.config.out)


def flags_of(config) -> list[str]:
    """The shortest command line that gives this configuration."""
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            flags.append(flag(field.name) if value else flag("no_" + field.name))
        elif isinstance(value, tuple):
            flags += [flag(field.name), *value]
        else:
            flags += [flag(field.name), str(value)]
    return flags


def command_of(job: Job) -> str:
    """The command of a run as one would type it in the project's folder."""
    script = os.path.relpath(job.script) if Path(job.script).is_absolute() else job.script
    flags = [flag.removeprefix(f"{ROOT}/") for flag in flags_of(job.config)]
    return shell_command(["python", script, *flags])


def finished(job: Job) -> bool:
    """Whether the run is complete. Raises UserError if its folder has a run with other settings."""
    if not (job.folder / "config.json").exists():
        return False
    stored = read_config(type(job.config), job.folder / "config.json")
    for field in dataclasses.fields(job.config):
        old = getattr(stored, field.name)
        new = getattr(job.config, field.name)
        is_replaced = field.name in ("tokenizer", "task") and new == "auto"  # by what it stands for
        if old != new and not is_replaced and field.name not in NO_EFFECT:
            raise UserError(f"{job.folder}: contains a run with {flag(field.name)} {old}, "
                            f"not {new}; use another folder, or delete it")
    if isinstance(job.config, PolicyConfig):
        return (job.folder / "result.json").exists()
    return bool(reward_test_rows(job.folder))


def reward_test_rows(folder: Path) -> list[dict]:
    """The metrics of a reward run on its test pairs: one row, or none if it is not finished."""
    return [row for row in read_rows(folder / "reward_metrics.jsonl") if row["stage"] == "test"]


def run_jobs(jobs: Sequence[Job], at_once: int, logs: Path,
             record: Callable[[Job], object] = lambda job: None) -> None:
    """Run the jobs that are not finished, at most `at_once` at a time, with one thread each.

    record: called with each job as soon as it is finished, also if it was so before.
    A stopped run resumes from its checkpoint. The output goes to logs/NAME.txt.
    If a run fails, the others still finish; then UserError is raised.
    After Ctrl-C every run saves its state first.
    """
    waiting = [job for job in jobs if not finished(job)]
    for job in jobs:
        if job not in waiting:
            record(job)
    running: dict[subprocess.Popen, Job] = {}
    failed: dict[str, str] = {}  # folder -> message
    logs.mkdir(parents=True, exist_ok=True)
    progress = Progress("run", len(jobs), len(jobs) - len(waiting), plain_lines=len(jobs))
    earlier = install_handler((signal.SIGTERM, signal.SIGHUP), signal.default_int_handler)
    try:
        while waiting or running:
            for job in ready(waiting, list(running.values()), failed)[:at_once - len(running)]:
                waiting.remove(job)
                running[start(job, logs)] = job
            if not running:
                break  # the remaining jobs need a run that failed
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                result = "done"
                if process.returncode or not finished(job):
                    failed[str(job.folder)] = last_line(logs / f"{job.folder.name}.txt")
                    result = f"failed: {failed[str(job.folder)]}"
                else:
                    record(job)
                done = len(jobs) - len(waiting) - len(running)
                progress.show(done, f"{job.folder.name} {result}")
    except KeyboardInterrupt:
        for process in running:
            process.terminate()  # it saves its state and exits
        for process in running:
            process.wait()
        raise
    finally:
        restore_handlers(earlier)
    raise_if_failed(failed)


def raise_if_failed(failed: dict[str, str]) -> None:
    """Raise UserError with each message once. failed: folder -> message."""
    reasons: dict[str, list[str]] = {}
    for folder, reason in failed.items():
        reasons.setdefault(reason, []).append(folder)
    texts = [f"{', '.join(folders)} failed: {reason}" for reason, folders in reasons.items()]
    if texts:
        raise UserError(f"{'; '.join(texts)}; the other runs are kept; "
                        "run the same command again to resume")


def ready(waiting: list[Job], running: list[Job], failed: dict[str, str]) -> list[Job]:
    """The waiting jobs whose needed run is finished."""
    unfinished = {str(job.folder) for job in waiting + running} | set(failed)
    return [job for job in waiting if job.needs not in unfinished]


def start(job: Job, logs: Path) -> subprocess.Popen:
    """Start the script. It gets its own process group, so that only run_jobs sends it Ctrl-C."""
    resume = ["--resume"] if (job.folder / "config.json").exists() else []
    command = [sys.executable, str(ROOT / job.script), *flags_of(job.config), *resume]
    environment = script_environment() | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with open(logs / f"{job.folder.name}.txt", "ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                env=environment, process_group=0)


def script_environment() -> dict[str, str]:
    """For a script that is in another folder: it can import the two scripts and minirlhf."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, paths)))


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "no output"


def train_subset(folder: Path, groups: int) -> str:
    """The path of a file in the folder with the first groups of the help desk's training data."""
    path = folder / f"preferences-{groups}.jsonl"
    if not path.exists():
        with gzip.open(HELPDESK_FILES["data"][0], "rb") as file:
            write_atomically(path, b"".join(itertools.islice(file, groups)))
    return str(path)


def need_files(folder: Path, names: Sequence[str], command: str) -> None:
    """Raise UserError with the command that creates the files that the folder lacks."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: has no {', no '.join(missing)}; create it with: {command}")


# ---- result files, tables, pictures --------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    """The complete rows of a jsonl file. Half a row, left by a crash, is skipped."""
    rows = []
    for line in read_file(path).splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def as_line(row: dict) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


class Rows:
    """Results of a lab in a jsonl file, by key. A lab that was stopped computes only the others."""

    def __init__(self, path: Path, about: dict):
        """about: what the results depend on: settings, and checksums of inputs.

        Raises UserError if the file has results that depend on something else.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        about = json.loads(json.dumps(about))
        stored = read_rows(path)
        if not stored and any(path.parent.glob("*/config.json")):
            raise UserError(f"{path}: is missing, so nothing says of which code and settings the "
                            "runs in its folder are; use another --out")
        stored = stored or [dict(about=about)]
        old = stored[0].get("about", {})
        if changed := [key for key in old | about if old.get(key) != about.get(key)]:
            raise UserError(f"{path}: contains results of other settings or inputs "
                            f"({', '.join(changed)}); use another --out")
        self.rows = {row["key"]: row for row in stored if "key" in row}
        write_atomically(path, b"".join(map(as_line, stored)))  # without half a row
        self.file = open(path, "ab", buffering=0)

    def get(self, key: str, compute: Callable[[], dict]) -> dict:
        """The result of this key; computed and appended to the file if it is new."""
        if key not in self.rows:
            row = rounded(dict(key=key) | compute())
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


# 97.5% quantiles of Student's t with 1, 2, 3, ... degrees of freedom
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
             2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of its 95% interval) over seeds, which are assumed to be normally distributed.

    >>> mean_interval([1.0, 2.0, 3.0])
    (2.0, 2.4843382083229595)
    >>> mean_interval([5.0])
    (5.0, 0.0)
    """
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return mean, 0.0
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = STUDENT_T[count - 2] if count - 2 < len(STUDENT_T) else 2.0
    return mean, quantile * (variance / count) ** 0.5


def save_picture(path: Path, draw: Callable, size: tuple[float, float], rows: int = 1,
                 columns: int = 1, title: str = "") -> None:
    """Call draw(axes) on a matplotlib figure and save it. Without matplotlib print one line.

    size: width and height in inches.
    """
    try:
        import matplotlib
    except ImportError:
        echo(f"no {path.name}: matplotlib is not installed; `pip install matplotlib`, then run "
             "the same command again; finished runs are kept")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(nrows=rows, ncols=columns, figsize=size, layout="constrained")
    draw(axes)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    echo(f"saved {path}")
