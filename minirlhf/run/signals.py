"""Ctrl-C and kill: finish the step, save a checkpoint, print the command that resumes the run."""

import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from minirlhf.run.command_line import fail
from minirlhf.run.parallel import all_reduce_max, error_reported, is_main, process_count
from minirlhf.run.terminal import echo, shell_command

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """SIGINT, SIGTERM and SIGHUP end the process with status 128 + number.

    During training the process ends after the current step and its checkpoint, otherwise at once.
    It prints the command that resumes the run. A second SIGINT or SIGTERM ends it at once.
    The handlers belong to one process: a forked one gets the earlier handlers back.
    """

    def __init__(self, script: str):
        """script: the name to print in the resume command."""
        self.number = 0  # the signal that this process received
        self.agreed = 0  # the signal that all processes know of
        self.in_steps = False
        self.flags: list[str] = []  # that resume the run, once there is a folder
        # A user's own script may define the algorithm, so it must be the one that resumes.
        is_script = sys.argv[0].endswith(".py") and sys.modules["__main__"].__spec__ is None
        self.script = shell_command(sys.argv[:1]) if is_script else script
        self.earlier: dict[int, Any] = {}  # signal -> the handler before install()

    def install(self) -> None:
        """Handle the signals from now on."""
        self.earlier = install_handler(SIGNALS, self.receive)
        INSTALLED.add(self)

    def restore(self) -> None:
        """Undo install()."""
        restore_handlers(self.earlier)
        self.earlier = {}

    def receive(self, number: int, frame) -> None:
        """The signal handler."""
        self.number = number
        for each in self.earlier:  # a closed terminal sends SIGHUP twice: itself and by its shell
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)
        if not self.in_steps:
            self.leave()
        if is_main() and not error_reported():
            echo("\nstopping after this step is saved (again: stop at once)", stream=sys.stderr)

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
        if self.flags:
            message = f"stopped; resume with: {launcher} {self.script} {shell_command(self.flags)}"
        fail(message, 128 + (self.agreed or self.number))


INSTALLED: weakref.WeakSet[StopSignal] = weakref.WeakSet()


MASKS: list[set] = []  # the blocked signals before each fork in progress


def before_fork() -> None:
    """Block the signals: one for the child would meet this process's handler, and be lost."""
    MASKS.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, MASKS.pop())


def after_fork_in_child() -> None:
    for stop in INSTALLED:
        stop.restore()
    after_fork()


os.register_at_fork(before=before_fork, after_in_parent=after_fork,
                    after_in_child=after_fork_in_child)


def install_handler(numbers: Iterable[int], handler: Callable) -> dict[int, Any]:
    """Handle these signals. Returns the earlier handlers.

    A signal that the parent process ignores, as nohup does, stays ignored. Only the main thread
    can handle signals; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers
            if signal.getsignal(number) != signal.SIG_IGN}


def restore_handlers(earlier: dict[int, Any]) -> None:
    """Undo install_handler()."""
    for number, handler in earlier.items():
        signal.signal(number, handler or signal.SIG_DFL)
