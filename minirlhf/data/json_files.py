"""JSON objects from a file that may be damaged or malicious.

One object per line, or in one array; plain or as .gz.
"""

import functools
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import TextIO

from minirlhf.run.errors import KINDS, UserError
from minirlhf.run.files import FOREIGN_FORMATS, open_regular, refuse_formats

MAX_RECORD = 16 * 2**20  # characters: 1000 times a long dialogue; limits the memory of one line
CHUNK = 2**16  # characters to read at a time
MAX_BLANK_LINES = 10**6  # in a row; more are a damaged file, or a few compressed kilobytes
GZIP = b"\x1f\x8b"  # first bytes
# first bytes -> what the file is, and what to do
NOT_TEXT = FOREIGN_FORMATS | {GZIP: "compressed twice; decompress it with: gzip -d",
                              b"PK\3\4": "a zip archive; unpack it with: unzip"}
NOT_JSON = NOT_TEXT | {b"<": "HTML or XML, perhaps an error page; download the file itself"}
NOT_BLANK = re.compile(r"\S")


class BadRecord(Exception):
    """A record of a file, or the rest of the file, is unusable."""


def read_objects(path: str) -> Iterator[tuple[int, dict | BadRecord]]:
    """(line number, object) of each record, or (line number, BadRecord) that says what is wrong.

    Everything after damage (an incomplete .gz, an array with a syntax error) is one BadRecord.
    Raises UserError for a file that cannot be opened.
    """
    if str(path).lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        raise UserError(f"{path}: this is a table; convert it to JSON lines, as in data/README.md")
    line = 1
    try:
        with open_text(path, NOT_JSON) as file:
            for line, source in _sources(file):
                yield line, _parse(source)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield line, BadRecord(f"after this line the file is damaged or incomplete ({error}); "
                              "download it again")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def open_text(path: str, formats: dict[bytes, str] = NOT_TEXT) -> TextIO:
    """Open a text file, plain or as .gz. Raises OSError, or UserError for one of the formats."""
    file = open_regular(path)
    content = gzip.open(file) if file.peek(2).startswith(GZIP) else file
    refuse_formats(content, path, formats)
    if b"\0" in content.peek(32)[:32]:
        content.close()
        raise UserError(f"{path}: this is binary data, or UTF-16 or UTF-32 text without a byte "
                        "order mark; convert it to JSON lines in UTF-8")
    # surrogateescape: an invalid byte makes only its own record bad
    return io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape")


def _sources(file: TextIO) -> Iterator[tuple[int, str]]:
    """(line number, JSON text) of each record. Holds at most one record and one chunk."""
    is_first = True
    blank = 0  # lines since the last record
    lines = iter(functools.partial(file.readline, MAX_RECORD + 1), "")
    for line, source in enumerate(lines, start=1):
        text = source.lstrip()
        blank = 0 if text else blank + 1
        if blank > MAX_BLANK_LINES:
            raise EOFError(f"more than {MAX_BLANK_LINES} blank lines")
        if is_first and text.startswith("["):
            yield from _array_items(file, line, text)
            return
        if text or len(source) > MAX_RECORD:
            is_first = False
            yield line, source
        while source and not source.endswith("\n"):  # the rest of a line that is too long
            source = file.readline(CHUNK)


def _array_items(file: TextIO, line: int, text: str) -> Iterator[tuple[int, str]]:
    """(line number, JSON text) of each item of the array that starts with `text`.

    Text that does not parse may be incomplete. So as much again is read, until the text parses, has
    the maximum length of a record, or the file ends. The last item may be invalid; `_parse` reports
    it.
    """
    find_end = json.JSONDecoder().raw_decode
    start = 1
    separator = ","
    while separator == ",":
        first = _skip_blanks(text, start)
        try:
            end = find_end(text, first)[1]
            after = _skip_blanks(text, end)
            separator = text[after]  # IndexError: not read yet
        except (ValueError, IndexError, RecursionError) as error:
            length = len(text) - start  # blanks count, or a file of blanks would be read to its end
            more = file.read(max(0, min(max(CHUNK, length), MAX_RECORD + 1 - length)))
            if more:
                text = text[start:] + more
                start = 0
                continue
            line += text.count("\n", start, first)
            yield line, text[first if length <= MAX_RECORD else start:]
            if isinstance(error, IndexError):
                raise EOFError("the array does not end") from None
            return
        line += text.count("\n", start, first)
        yield line, text[first:end if separator in ",]" else after + 1]
        line += text.count("\n", first, after)
        start = after + 1
    rest = text[start:] + file.read(CHUNK)
    if separator == "]" and rest.strip():
        yield line, rest


def _skip_blanks(text: str, start: int) -> int:
    match = NOT_BLANK.search(text, start)
    return match.start() if match else len(text)


def _parse(source: str) -> dict | BadRecord:
    """One JSON object, read strictly: no repeated keys, no NaN."""
    if len(source) > MAX_RECORD:
        return BadRecord(f"the record is longer than {MAX_RECORD} characters; split or drop it")
    try:
        record = STRICT_JSON.decode(source)
    except RecursionError:
        return BadRecord("the record is nested too deeply; flatten it")
    except ValueError as error:  # bad syntax, or an integer of thousands of digits
        reason = str(error).replace("line 1 ", "")  # of the record; the message names the line
        return BadRecord(f"the record is not strict JSON ({reason}); write one record per line")
    if not isinstance(record, dict):
        return BadRecord(f"the record is {KINDS[type(record)]}, not an object; "
                         'write {"prompt": ...}')
    return record


def check_text(value: object, key: str) -> str:
    """The value, if it is a valid text. Raises BadRecord that names the key."""
    if not isinstance(value, str):
        raise BadRecord(f'"{key}" is {KINDS[type(value)]}, but must be a string; '
                        "fix the record")
    try:
        value.encode()
    except UnicodeEncodeError:  # an invalid byte, or an escape like \ud800
        raise BadRecord(f'"{key}" is not valid UTF-8; '
                        "convert the file, or fix the record") from None
    if "\0" in value:
        raise BadRecord(f'"{key}" contains a NUL character; remove it')
    return value


def unique_keys(items: list[tuple[str, object]]) -> dict:
    """An object_pairs_hook for json that raises ValueError for a repeated key."""
    keys = dict(items)
    if len(keys) < len(items):
        raise ValueError("an object has one key twice")
    return keys


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
