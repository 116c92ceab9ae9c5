"""The class Run: folder, signals, checkpoints, metrics, progress and times of a training run."""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from minirlhf.run.checkpoint import newest_checkpoint, restore, save_step
from minirlhf.run.errors import UserError
from minirlhf.run.files import read_file, write_atomically
from minirlhf.run.folder import module_flags, open_folder, refuse_existing
from minirlhf.run.metrics import Metrics
from minirlhf.run.parallel import is_main, process_count
from minirlhf.run.signals import StopSignal
from minirlhf.run.terminal import Progress, echo

import torch


class Run:
    """A run of one or more stages; each stage is a loop over steps.

        with Run(config, "train_policy.py") as run:
            run.open("name", facts, {"policy": 60})
            state = run.resume("policy", model, optimizer)
            for step in run.steps():
                ...
                run.log(row, "text")
                run.save(model, optimizer, state)
    """

    def __init__(self, config, script: str):
        """script: named in the command that resumes the run."""
        self.config = config
        self.stop = StopSignal(script)
        self.batch: dict | None = None  # written to disk if a UserError ends the step
        self.lock: IO | None = None  # of the run folder, in the main process

    def __enter__(self) -> "Run":
        if is_main() and self.config.out and not self.config.resume:
            refuse_existing(Path(self.config.out))  # before data is read
        self.stop.install()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.stop.restore()
        if self.lock:
            self.lock.close()
        if self.batch is not None and isinstance(error, UserError):
            raise self._save_bad_batch(self.batch, error) from None

    def open(self, name: str, facts: dict, stages: dict[str, int]) -> None:
        """Create or resume the run folder. Raises UserError.

        name: of a new folder.  facts: about the input, recorded in config.json.
        stages: {name: number of steps}, in order.
        """
        self.folder, self.lock, self.id = open_folder(self.config, name, facts)
        self.stop.flags = ["--out", str(self.folder), "--resume", *module_flags(self.config)]
        self.stages = stages
        self.checkpoints: dict[str, tuple[dict, dict]] = {}
        for stage, total in stages.items():
            checkpoint = newest_checkpoint(self.folder / "checkpoints", stage, self.id)
            if checkpoint:
                self.checkpoints[stage] = checkpoint
            if total and (not checkpoint or checkpoint[0].get("step", 0) < total):
                break  # this stage is not finished, so no later one has started
        newest = [{}, *(meta for meta, _ in self.checkpoints.values())][-1]
        path = self.folder / f"{list(stages)[-1]}_metrics.jsonl"
        self.metrics = Metrics(path, newest.get("metrics"), self.config.tensorboard)
        self.environment = environment(self.config.device) + users_files(self.config)
        saved_with = newest.get("environment", self.environment)
        if saved_with != self.environment:
            echo(f"warning: saved with {saved_with}, resumed with {self.environment}: "
                 "results may differ")

    def resume(self, stage: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
               label: str = "", plain_lines: int = 10) -> dict:
        """Begin a stage, from its newest checkpoint if there is one.

        Returns what save() stored: the state, and step, run and metrics; {} without a checkpoint.
        label: name on the progress line.
        plain_lines: about how many lines to print if the output is not a terminal.
        """
        checkpoint = self.checkpoints.pop(stage, None)
        self.stage = stage
        self.total = self.stages[stage]
        self.done = restore(checkpoint, model, optimizer)
        if self.total and self.done == self.total:
            echo(f"all steps of {stage} were done already")
        self.progress = Progress(label or stage, self.total, self.done, plain_lines)
        return checkpoint[0] if checkpoint else {}

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that remain; the first step of a stage is 0.

        After Ctrl-C the process ends when the step is complete.
        """
        self.progress.start_clock()
        for step in self.stop.steps(self.done, self.total):
            self.step = step
            self.phases: dict[str, float] = {}
            self.start = self.last = time.perf_counter()
            yield step
            self.batch = None

    def timed(self, phase: str) -> None:
        """Add the time since the last call, or since the step began, to this phase."""
        if torch.cuda.is_initialized():  # its work is asynchronous
            torch.cuda.synchronize()
        now = time.perf_counter()
        key = f"seconds_{phase}"
        self.phases[key] = self.phases.get(key, 0.0) + now - self.last
        self.last = now

    def due(self, every: int) -> bool:
        """True in every `every`-th step and in the last one."""
        return (self.step + 1) % every == 0 or self.step + 1 == self.total

    def log(self, row: dict, text: str) -> None:
        """Write one row of metrics and update the progress line."""
        seconds = time.perf_counter() - self.start
        times = self.phases or dict(seconds=seconds)
        if "tokens" in row:
            times = times | dict(tokens_per_second=row["tokens"] / seconds)
        stage = dict(stage=self.stage) if len(self.stages) > 1 else {}
        self.metrics.write(stage | dict(step=self.step + 1) | row | times)
        self.progress.show(self.step + 1, text)

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Save a checkpoint if one is due, or if a signal asks the run to stop.

        Every process must call this in every step, because they agree on whether to stop.
        """
        if not (self.stop.requested() or self.due(self.config.save_every)):
            return
        meta = state | dict(step=self.step + 1, run=self.id, metrics=self.metrics.mark(),
                            environment=self.environment)
        states = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
        folder = self.folder / "checkpoints"
        save_step(folder, self.stage, meta, states, self.config.keep_checkpoints)

    def _save_bad_batch(self, batch: dict, error: UserError) -> UserError:
        """Write the batch to bad-batch-*.json; return the error with stage, step and path added."""
        path = self.folder / f"bad-batch-{self.stage}-{self.step + 1}.json"
        content = json.dumps(flatten(batch), default=as_lists)
        write_atomically(path, content.encode())
        return UserError(f"{self.stage} step {self.step + 1}: {error}; the batch is in {path}; "
                         "the last checkpoint is not affected")


def environment(device: str) -> str:
    """What sums in another order, and so changes the last digits of results."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    chip = torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability()
    return (f"torch {torch.__version__}, {torch.get_num_threads()} threads, {process_count()} "
            f"processes, {chip}")


def users_files(config) -> str:
    """Name and hash of each file with the user's code: a corrected one may resume the run."""
    names = [word.partition(":")[0] for word in module_flags(config)[1::2]]
    paths = [Path(getattr(sys.modules.get(name), "__file__", None) or name) for name in names]
    return "".join(f", {path.name} {hashlib.sha256(read_file(path)).hexdigest()[:8]}"
                   for path in paths if path.is_file())


def flatten(batch: dict) -> dict:
    """The fields of nested NamedTuples in one dict."""
    flat: dict = {}
    for key, value in batch.items():
        flat |= flatten(value._asdict()) if hasattr(value, "_asdict") else {key: value}
    return flat


def as_lists(x):
    """Tensors and iterators as lists, for JSON."""
    return x.tolist() if hasattr(x, "tolist") else list(x)
