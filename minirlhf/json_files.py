"""JSON objects out of a file that may be torn or hostile: one per line, or in one array, plain or as .gz."""

import functools
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from typing import TextIO

from minirlhf.flags import UserError

MAX_RECORD = 16 * 2**20  # characters; bounds the memory that one hostile line can take, 1000 times a long dialogue
CHUNK = 2**16  # characters read at a time
NOT_BLANK = re.compile(r"\S")


class BadRecord(Exception):
    """One record of a file, or what is left of the file, cannot be used."""


def read_objects(path: str) -> Iterator[tuple[int, dict | BadRecord]]:
    """(line number, object) of each record; in place of an object that cannot be had, what is wrong, as a BadRecord.

    What follows a place where the file breaks off (a torn .gz, an array with a syntax error) is one BadRecord.
    Raises UserError for a file that cannot be opened.
    """
    line, open_text = 0, gzip.open if str(path).endswith(".gz") else open
    try:
        # surrogateescape: a byte that is no UTF-8 spoils the record it stands in and no other
        with open_text(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            for line, source in _sources(file):
                yield line, _parse(source)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield line, BadRecord(f"after this line the file is damaged or cut short ({error}); fetch it again")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _sources(file: TextIO) -> Iterator[tuple[int, str]]:
    """(line number, JSON text) of each record. Never holds more than one record and the chunk being read."""
    begun = False
    for line, source in enumerate(iter(functools.partial(file.readline, MAX_RECORD + 1), ""), start=1):
        if source == "\n":  # a file may hold millions
            continue
        text = source.lstrip()
        if not begun and text.startswith("["):
            yield from _array_items(file, line, text)
            return
        if text:
            begun = True
            yield line, source
        while source and not source.endswith("\n"):  # the rest of an over-long line
            source = file.readline(CHUNK)


def _array_items(file: TextIO, line: int, text: str) -> Iterator[tuple[int, str]]:
    """(line number, JSON text) of each item of the array that begins with `text`; then `file` holds the rest.

    Text that does not parse may only lack its end, so it is doubled until it does, or is as long as a record may be,
    or the file ends. What still does not parse is handed on as the last item, for `_parse` to say what is wrong.
    """
    find_end = json.JSONDecoder().raw_decode
    start, separator = 1, ","
    while separator == ",":
        position, start = start, _skip_blanks(text, start)
        line += text.count("\n", position, start)
        try:
            end = find_end(text, start)[1]
            after = _skip_blanks(text, end)
            separator = text[after]  # IndexError: not read yet
        except (ValueError, IndexError, RecursionError) as error:
            length = len(text) - start
            more = file.read(max(0, min(max(CHUNK, length), MAX_RECORD + 1 - length)))
            if more:
                text, start = text[start:] + more, 0
                continue
            yield line, text[start:]
            if isinstance(error, IndexError):
                raise EOFError("the array does not end") from None
            return
        yield line, text[start:end if separator in ",]" else after + 1]
        line += text.count("\n", start, after)
        start = after + 1
    rest = text[start:] + file.read(CHUNK)
    if separator == "]" and rest.strip():
        yield line, rest


def _skip_blanks(text: str, start: int) -> int:
    found = NOT_BLANK.search(text, start)
    return found.start() if found else len(text)


def _parse(source: str) -> dict | BadRecord:
    """One JSON object, read strictly: no repeated keys, no NaN."""
    if len(source) > MAX_RECORD:
        return BadRecord(f"the record is longer than {MAX_RECORD} characters; split or drop it")
    try:
        record = STRICT_JSON.decode(source)
    except RecursionError:
        return BadRecord("the record is nested too deeply; flatten it")
    except ValueError as error:  # bad syntax, or an integer of thousands of digits
        reason = str(error).replace("line 1 ", "")  # within the record; its line in the file is named already
        return BadRecord(f"the record is not strict JSON ({reason}); mend it (a compressed file must be named .gz)")
    if not isinstance(record, dict):
        return BadRecord(f"the record is a JSON {type(record).__name__}, not an object; write {{\"prompt\": ...}}")
    return record


def unique_keys(items: list[tuple[str, object]]) -> dict:
    """json's object_pairs_hook that keeps nobody from noticing a key that comes twice. Raises ValueError."""
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("an object holds one key twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
