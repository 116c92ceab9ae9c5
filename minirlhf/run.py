"""One run, one folder, one writer: made fresh or resumed, locked while a process lives, stopped by a signal between steps."""

import dataclasses
import fcntl
import hashlib
import json
import math
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import IO, NamedTuple

from minirlhf.checkpoint import write_atomically
from minirlhf.config import UserError, fail, read_config

SCHEDULE = ("iterations", "epochs")  # a resumed run may go on for longer than it was first told
FREE = ("out", "resume", "device", "tensorboard", "save_every", "keep_checkpoints")  # no figure depends on these


class Run(NamedTuple):
    folder: Path
    lock: IO  # held open: the lock ends with the process, however it ends


def open_run(config, name: str, facts: dict) -> Run:
    """The run folder, locked. A fresh one gets config.json (settings and facts); an existing one is refused unless resumed.

    name: what an unnamed folder under runs/ is called. facts: what else the folder should tell, e.g. hashes of the data.
    """
    folder = Path(config.out) if config.out else fresh_folder(name)
    if config.resume:
        stored = read_config(type(config), folder / "config.json")
        run = Run(folder, lock_folder(folder))
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if content != sealed(content["settings"], content.get("facts")):
            raise UserError(f"{folder / 'config.json'}: was changed or damaged since the run began; start a new run")
        check_same(config, stored, content["facts"], facts)
    else:
        # hidden files alone are what a process leaves that was killed before its config.json
        if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
            raise UserError(f"{folder}: exists already; add --resume to go on with it, or name another --out")
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(folder, lock_folder(folder))
    settings = dict(dataclasses.asdict(config), out=str(folder), resume=False)
    write_atomically(folder / "config.json", (json.dumps(sealed(settings, facts), indent=1) + "\n").encode())
    return run


def sealed(settings: dict, facts: dict) -> dict:
    """What config.json holds, with a checksum: one flipped digit of a learning rate would make it another run."""
    digest = hashlib.sha256(json.dumps([settings, facts]).encode()).hexdigest()
    return dict(settings=settings, facts=facts, sha256=digest)


def fresh_folder(name: str) -> Path:
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


class StopSignal:
    """SIGINT or SIGTERM asks the loop to stop after its step; a second one stops at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        self.number = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        print("\nstopping after this step (once more: at once)", file=sys.stderr)

    def leave(self, script: str, folder: Path) -> None:
        """After the state was saved: say how to go on, and exit as the signal asks (130 or 143)."""
        sys.exit(fail(f"stopped; go on with: python {script} --out {shlex.quote(str(folder))} --resume", 128 + self.number))


def check_finite(value: float, what: str, stage: str, step: int) -> None:
    """Raises UserError before a number that is not finite reaches the weights."""
    if not math.isfinite(value):
        raise UserError(f"{stage} step {step}: the {what} is {value}; the last checkpoint is good; try a smaller --lr")


def due(step: int, total: int, every: int) -> bool:
    """True on every `every`-th step and on the last."""
    return step % every == 0 or step == total


class Clock:
    """Seconds since a mark, and per phase of a step."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.phases: dict[str, float] = {}

    def phase(self, name: str) -> None:
        """What ran since the last call belongs to this phase."""
        now = time.perf_counter()
        self.phases[f"seconds_{name}"] = self.phases.get(f"seconds_{name}", 0.0) + now - self.last
        self.last = now

    def total(self) -> float:
        return time.perf_counter() - self.start
