"""Ctrl-C and kill: finish the step, save a checkpoint, print the command that resumes the run."""

import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from minirlhf.run.command_line import fail
from minirlhf.run.parallel import (
    all_reduce_max,
    error_reported,
    exit_process,
    is_main,
    process_count,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """SIGINT and SIGTERM end the process with status 130 or 143 and print the resume command.

    During training the process ends after the current step and its checkpoint, otherwise at once.
    A second signal always ends it at once.
    """

    def __init__(self, script: str):
        """script: the name to print in the resume command."""
        self.number = 0  # the signal that this process received
        self.agreed = 0  # the signal that all processes know of
        self.in_steps = False
        self.folder: Path | None = None  # the run folder, once there is one
        # A user's own script may define the algorithm, so it must be the one that resumes.
        is_script = sys.argv[0].endswith(".py") and sys.modules["__main__"].__spec__ is None
        self.script = shlex.quote(sys.argv[0]) if is_script else script
        for number in SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        """The signal handler."""
        self.number = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self.in_steps:
            self.leave()
        if is_main() and not error_reported():
            print("\nstopping after this step (again: stop at once)", file=sys.stderr)

    def requested(self) -> bool:
        """Whether to save and stop after this step. All processes call this and agree."""
        self.agreed = all_reduce_max(self.number)  # a signal that arrives later counts next time
        return self.agreed > 0

    def steps(self, done: int, total: int) -> Iterator[int]:
        """range(done, total). The loop body calls requested(); if it is true, the process ends."""
        self.in_steps = True
        for step in range(done, total):
            yield step
            if self.agreed:
                self.leave()
        self.in_steps = False
        if self.number:  # the signal arrived after the last call of requested()
            self.leave()

    def leave(self) -> NoReturn:
        """Print the command that resumes the run, and exit."""
        launcher = "python"
        if process_count() > 1:
            launcher = f"torchrun --standalone --nproc-per-node {process_count()}"
        message = "stopped; nothing was started"
        if self.folder:
            folder = shlex.quote(str(self.folder))
            message = f"stopped; resume with: {launcher} {self.script} --out {folder} --resume"
        exit_process(fail(message, 128 + (self.agreed or self.number)))
