"""A program in a real pseudo-terminal, in a process of its own: what it shows, keys for it, and how it ends."""

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time

import pytest

CLEAR = "\x1b[H\x1b[2J"


class Terminal:
    """main(*arguments) in a forked process, which need not import torch again."""

    def __init__(self, main, *arguments, columns=80):
        self.screen, self.status = "", None
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest and earlier runs have their own
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
            try:
                main(*arguments)
                status = 0
            except SystemExit as error:
                status = error.code
            except BaseException as error:  # a forked child must never go back into pytest
                print("Traceback:", repr(error))
                status = 99
            sys.stdout.flush()
            os._exit(status)
        self.resize(columns)

    def resize(self, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read(self, until, seconds=30.0):
        """Wait for a text; returns everything since the last screen was cleared."""
        end = time.monotonic() + seconds
        while until not in self.screen.rpartition(CLEAR)[2]:
            assert time.monotonic() < end and select.select([self.fd], [], [], end - time.monotonic())[0], self.screen[-2000:]
            try:
                self.screen += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # the other side is gone
                pytest.fail(f"ended without {until!r}: {self.screen[-2000:]}")
        return self.screen.rpartition(CLEAR)[2].replace("\r\n", "\n")

    def press(self, keys, until):
        self.screen = ""
        os.write(self.fd, keys.encode())
        return self.read(until)

    def modes(self):
        return termios.tcgetattr(self.fd)[3] & (termios.ICANON | termios.ECHO)

    def end(self, seconds=30.0):
        """Wait for the process to end: (exit status, or minus the signal's number; all it said; is the terminal as before?)."""
        stop = time.monotonic() + seconds
        while self.status is None:
            assert time.monotonic() < stop, self.screen[-2000:]
            if select.select([self.fd], [], [], 0.05)[0]:
                try:
                    self.screen += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:
                    pass
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.status = os.waitstatus_to_exitcode(status)
        modes = self.modes()
        os.close(self.fd)
        assert "Traceback" not in self.screen
        return self.status, self.screen, modes == termios.ICANON | termios.ECHO

    def abandon(self):
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.fd)
