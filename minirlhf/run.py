"""One run, one folder, one writer: made fresh or resumed, locked while a process lives, stopped by a signal between steps."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

import torch

from minirlhf.checkpoint import write_atomically
from minirlhf.flags import UserError, digest, fail, read_config, sealed
from minirlhf.parallel import agreed, from_main, is_main, leave, processes, rank, told

SCHEDULE = ("iterations", "epochs")  # a resumed run may go on for longer than it was first told
FREE = ("out", "resume", "device", "tensorboard", "save_every", "keep_checkpoints", "max_kl", "shard")  # change no figure


class Run(NamedTuple):
    folder: Path
    lock: IO | None  # the main process holds it open: it ends with the process, however that ends
    id: str  # of what the run computes, wherever it lies and however long it goes on; its checkpoints carry it


def open_run(config, name: str, facts: dict) -> Run:
    """The run folder, locked. A fresh one gets config.json (settings and facts); an existing one is refused unless resumed.

    name: what an unnamed folder under runs/ is called. facts: what else the folder should tell, e.g. hashes of the data.
    """
    folder, lock = claim_folder(config, name, facts) if is_main() else (None, None)
    folder = from_main(folder)
    settings = dict(dataclasses.asdict(config), out=str(folder), resume=False)
    if is_main():
        write_atomically(folder / "config.json", (json.dumps(sealed(settings, facts), indent=1) + "\n").encode())
    return Run(folder, lock, digest([{k: v for k, v in settings.items() if k not in FREE + SCHEDULE}, facts]))


def claim_folder(config, name: str, facts: dict) -> tuple[Path, IO]:
    """An empty folder, or the one of a run that may go on; and its lock."""
    folder = Path(config.out) if config.out else fresh_folder(name)
    if config.resume:
        stored = read_config(type(config), folder / "config.json")
        lock = lock_folder(folder)
        check_same(config, stored, json.loads((folder / "config.json").read_text(encoding="utf-8"))["facts"], facts)
        for partial in folder.rglob(".*.partial"):  # of a write that was killed
            partial.unlink()
    else:
        # hidden files alone are what a process leaves that was killed before its config.json
        if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
            raise UserError(f"{folder}: exists already; add --resume to go on with it, or name another --out")
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    return folder, lock


def fresh_folder(name: str) -> Path:
    """The first of runs/NAME-1, runs/NAME-2, ... that is not taken."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-")
    taken = {path.name for path in Path("runs").glob("*")}
    number = next(n for n in range(1, len(taken) + 2) if f"{name}-{n}" not in taken)
    return Path("runs") / f"{name}-{number}"


def lock_folder(folder: Path) -> IO:
    lock = open(folder / ".lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{folder}: another process is running there; wait for it, or name another --out") from None
    return lock


def check_same(config, stored, stored_facts: dict, facts: dict) -> None:
    """A resumed run must be the run that was stopped: UserError for any setting or data that would change its figures."""
    for field in dataclasses.fields(config):
        old, new = getattr(stored, field.name), getattr(config, field.name)
        if old == new or field.name in FREE:
            continue
        if field.name in SCHEDULE and new > old:
            print(f"new schedule: {field.name} {old} -> {new}; from here on the run differs from one of {old}")
        else:
            raise UserError(f"--resume with {field.name} = {new!r}, but the run has {old!r}; leave the flag out, or start anew")
    if stored_facts != json.loads(json.dumps(facts)):
        raise UserError("--resume: the input files have changed since the run began; start a new run")


def check_processes(config, device: torch.device, rows: int, what: str) -> None:
    """Raises UserError where there are more processes than devices to run on, or than rows to share out."""
    here, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), processes()
    devices = dict(cuda=torch.cuda.device_count(), mps=1).get(device.type, here)
    if config.shard and not torch.distributed.is_initialized():
        raise UserError("--shard: needs processes to split the model over; start with torchrun, or add --no-shard")
    if count > 1 and here > devices:
        raise UserError(f"{here} processes for {devices} of device {device}; --nproc-per-node {devices}, or add --device cpu")
    if count > rows:
        raise UserError(f"{count} processes cannot share {rows} rows, {what}; start {rows} at most (--nproc-per-node {rows})")


class StopSignal:
    """SIGINT or SIGTERM ends the process with status 130 or 143 and the command that resumes: at once where nothing would be
    lost by it, after the step and its checkpoint where steps are taken. A second one always stops at once."""

    def __init__(self, script: str):
        self.number, self.stepping = 0, False
        self.stopping = 0  # the number on which all processes have agreed
        by_name = sys.argv[0].endswith(".py") and sys.modules["__main__"].__spec__ is None  # neither pytest nor python -m
        self.script = shlex.quote(sys.argv[0]) if by_name else script  # a user's own may bring the algorithm
        self.folder: Path | None = None  # the run's, as soon as it has one
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        """The signal handler."""
        self.number = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if not self.stepping:
            self.leave()
        if is_main() and not told():
            print("\nstopping after this step (once more: at once)", file=sys.stderr)

    def now(self) -> bool:
        """Whether to save and end with this step; every process asks, and all get the same answer."""
        self.stopping = agreed(self.number)  # a signal that comes meanwhile is in number, for the next time
        return self.stopping > 0

    def steps(self, done: int, total: int) -> Iterator[int]:
        """range(done, total). The body of the loop saves its state when now() says so; then the process ends."""
        self.stepping = True
        for step in range(done, total):
            yield step
            if self.stopping:
                self.leave()
        self.stepping = False
        if self.number:  # it came when no step was left to end
            self.leave()

    def leave(self) -> NoReturn:
        launcher = f"torchrun --standalone --nproc-per-node {processes()}" if processes() > 1 else "python"
        command = f"{launcher} {self.script} --out {shlex.quote(str(self.folder))} --resume"
        leave(fail(f"stopped; go on with: {command}" if self.folder else "stopped; nothing was begun",
                   128 + (self.stopping or self.number)))


def check_finite(value: float, what: str) -> None:
    """Raises UserError before a number that is not finite reaches the weights."""
    if not math.isfinite(value):
        raise UserError(f"the {what} is {value}")


@contextlib.contextmanager
def batch_kept(folder: Path, stage: str, step: int, batch):
    """What is wrong with a batch is told with stage and step, and the batch (of tensors, tuples, texts) goes to a file."""
    try:
        yield
    except UserError as error:
        path = folder / f"bad-batch-{stage}-{step}{f'-process-{rank()}' if rank() else ''}.json"
        content = json.dumps(batch, default=lambda x: x.tolist() if hasattr(x, "tolist") else list(x))
        write_atomically(path, content.encode())
        raise UserError(f"{stage} step {step}: {error}; study {path}; the last checkpoint is good") from None


def due(step: int, total: int, every: int) -> bool:
    """True on every `every`-th step and on the last."""
    return step % every == 0 or step == total


class Clock:
    """Seconds since a mark, and per phase of a step."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.phases: dict[str, float] = {}

    def phase(self, name: str) -> None:
        """What ran since the last call belongs to this phase."""
        now = time.perf_counter()
        self.phases[f"seconds_{name}"] = self.phases.get(f"seconds_{name}", 0.0) + now - self.last
        self.last = now

    def total(self) -> float:
        return time.perf_counter() - self.start
