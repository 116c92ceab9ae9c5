"""Opening a file that a user names or that lies in a run folder. It may be anything."""

import errno
import math
import os
import stat
from io import BufferedReader
from pathlib import Path

from minirlhf.run.errors import UserError

# first bytes -> what the file is, and what to do; FILE stands for its path
FOREIGN_FORMATS = {
    b"version https://git-lfs": "a Git-LFS pointer, which only names the content; "
                                "fetch the content with: git lfs pull",
    b"PAR1": "a parquet file; convert it with: python -c \"import pandas; pandas.read_parquet("
             "'FILE').to_json('FILE.jsonl', orient='records', lines=True)\"",
    b"\xff\xfe": "UTF-16 text; convert it with: iconv -f UTF-16 -t UTF-8 FILE > new.jsonl",
    b"\xfe\xff": "UTF-16 text; convert it with: iconv -f UTF-16 -t UTF-8 FILE > new.jsonl",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it with: zstd -d FILE",
    b"\xfd7zXZ\0": "compressed with xz; decompress it with: xz -d FILE",
    b"BZh91AY&SY": "compressed with bzip2; decompress it with: bzip2 -d FILE",
}


def regular_only(name: str, flags: int) -> int:
    """An opener for open(): a pipe or a device could block forever, or never end."""
    descriptor = os.open(name, flags | os.O_NONBLOCK, 0o666)  # does not wait for a writer
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # open() itself refuses a folder
        os.close(descriptor)
        raise OSError(errno.EINVAL, "a pipe or a device, not a regular file", name)
    return descriptor


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises OSError, and UserError for a format that this program does not read.
    """
    file = open(path, "rb", opener=regular_only)
    first = file.peek(32)
    for start, problem in FOREIGN_FORMATS.items():
        if first.startswith(start):
            file.close()
            raise UserError(f"{path}: this is {problem.replace('FILE', str(path))}")
    return file


def read_file(path: str | Path, limit: float = math.inf) -> bytes:
    """The content of a regular file. Raises OSError, also if it has more than `limit` bytes."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
        return file.read()
