"""A program in a pseudo-terminal and a process of its own: press keys, read the screen, wait."""

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
    """main(*arguments) in a forked process, because importing torch again would take seconds."""

    def __init__(self, main, *arguments, columns=80):
        self.screen = ""
        self.status = None
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            # pytest and earlier runs have installed other handlers
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdin = open(0)
            sys.stdout = open(1, "w")
            sys.stderr = open(2, "w")
            try:
                main(*arguments)
                status = 0
            except SystemExit as error:
                status = error.code
            except BaseException as error:  # the forked process must never return to pytest
                print("Traceback:", repr(error))
                status = 99
            sys.stdout.flush()
            os._exit(status)
        self.resize(columns)

    def resize(self, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read(self, until, seconds=30.0):
        """Wait for a text. Returns everything since the screen was last cleared."""
        end = time.monotonic() + seconds
        while until not in self.screen.rpartition(CLEAR)[2]:
            left = end - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], self.screen[-2000:]
            try:
                self.screen += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # the process has ended
                pytest.fail(f"ended without {until!r}: {self.screen[-2000:]}")
        return self.screen.rpartition(CLEAR)[2].replace("\r\n", "\n")

    def press(self, keys, until):
        self.screen = ""
        os.write(self.fd, keys.encode())
        return self.read(until)

    def modes(self):
        return termios.tcgetattr(self.fd)[3] & (termios.ICANON | termios.ECHO)

    def end(self, seconds=30.0):
        """Wait for the process to end. Returns (status, output, terminal modes are as before).

        status: the exit status, or minus the number of the signal that ended the process.
        """
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
        """End the process if it still runs."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.fd)
