"""Files: read with care, replaced completely or not at all, locked, not written through links."""

import contextlib
import errno
import fcntl
import math
import os
import secrets
import stat
import weakref
from gzip import GzipFile
from io import BufferedReader
from pathlib import Path
from typing import IO

from minirlhf.run.errors import UserError
from minirlhf.run.terminal import echo

# first bytes -> what the file is, and what to do
FOREIGN_FORMATS = {
    b"version https://git-lfs": "a Git-LFS pointer; fetch the content with: git lfs pull",
    b"PAR1": "a parquet file; convert it to JSON lines",
    b"\xff\xfe": "UTF-16 or UTF-32 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
    b"\x28\xb5\x2f\xfd": "compressed; decompress it with: zstd -d",
    b"\xfd7zXZ\0": "compressed; decompress it with: xz -d",
    b"BZh91AY&SY": "compressed; decompress it with: bzip2 -d",
}
# A file system that lacks locks, or cannot sync a folder, answers with one of these.
UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK,
               errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}
LOCKS: weakref.WeakSet[IO] = weakref.WeakSet()  # all open ones; one that nobody holds is closed


def regular_only(name: str, flags: int) -> int:
    """An opener for open(): a pipe or a device could block forever, or never end."""
    descriptor = os.open(name, flags | os.O_NONBLOCK, 0o666)  # does not wait for a writer
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # open() itself refuses a folder
        os.close(descriptor)
        raise OSError(errno.EINVAL, "a pipe or a device, not a regular file; save it as one", name)
    return descriptor


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises OSError, and UserError for a format that this program does not read.
    """
    file = open(path, "rb", opener=regular_only)
    refuse_formats(file, path, FOREIGN_FORMATS)
    return file


def refuse_formats(file: BufferedReader | GzipFile, path: str | Path,
                   formats: dict[bytes, str]) -> None:
    """Close the file and raise UserError if it starts like one of the formats."""
    first = file.peek(32)[:32].lstrip()
    for start, problem in formats.items():
        if first.startswith(start):
            file.close()
            raise UserError(f"{path}: this is {problem}")


def read_file(path: str | Path, limit: float = math.inf) -> bytes:
    """The content of a regular file. Raises OSError, also if it has more than `limit` bytes."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
        return file.read()


# ---- writing and locking -------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at path. A crash at any time leaves the old content or the new one."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:  # x: a new file, not an existing one or a link's target
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:  # includes the exit that a signal causes
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # not the partial file, which the user did not name
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the folder's list of names to the disk, if its file system can do this."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def refuse_link(path: Path) -> None:
    """Raise UserError for a symbolic link: its target is not a file of this run."""
    if path.is_symlink():
        raise UserError(f"{path}: is a symbolic link, and its target would be changed; "
                        "replace it with a copy of the file")


def check_output(path: Path, force: bool) -> None:
    """Raise UserError if a tool would replace a file, and --force is not given."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    if os.path.lexists(path) and not force:
        raise UserError(f"{path}: already exists; name another file, or add --force to replace it")


def lock_file(path: Path, busy: str) -> IO:
    """Create the file and lock it until it is closed or the process ends.

    Raises UserError(busy) if another process has the lock. On a file system without locks,
    continues with a warning.
    """
    refuse_link(path)
    lock = open(path, "a", opener=regular_only)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            lock.close()
            raise UserError(busy) from None
        if error.errno not in UNSUPPORTED:
            raise
        echo(f"warning: {path.parent}: this file system has no locks; "
             "start no second process there")
    LOCKS.add(lock)
    return lock


def close_locks() -> None:
    """Close the inherited locks in a forked process, which may run longer than this one."""
    for lock in LOCKS:
        lock.close()


os.register_at_fork(after_in_child=close_locks)
