"""Lines of UTF-8 files, plain or gzipped, and the JSON objects and ids in them."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from splade_fast._checks import check_unicode

T = TypeVar("T")

_BYTE_ORDER_MARK = "\ufeff"
_GZIP_MAGIC = b"\x1f\x8b"
_BAD_IN_IDS = "\t\n\r\0"  # they would end a field, a line or a C string


class DataError(ValueError):
    """Error in a file of texts or judgements; the message names the line and the reason."""


class DataWarning(UserWarning):
    """Warning of data that is used as it is, but is rarely meant so."""


def parse_lines(path: Path, parse: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """Yield (file and line number, parsed line) for each line that is not blank.

    A file whose name ends in .gz is decompressed. Lines end in a line feed, with or without a
    carriage return, or in carriage returns where the file has no line feed. A byte-order mark at
    the start of a line, as joined files have it, is not part of the line.

    Args:
        path: a file, pipe or device; it is read once.
        parse: function of a line without its end, which raises ValueError for a malformed line.

    Raises:
        DataError: there is no such file, it is not UTF-8, or a line is malformed.
        OSError: the file may not be read.
    """
    for number, line in enumerate(_read_lines(path), start=1):
        location = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").rstrip("\r\n").removeprefix(_BYTE_ORDER_MARK)
            if text.strip():
                yield location, parse(text)
        except ValueError as error:
            raise DataError(f"{location}: {error}") from error


def check_readable(path: str | os.PathLike[str]) -> None:
    """Check that a path is a file, pipe or device.

    Raises:
        DataError: there is none, or it is a folder.
        OSError: the file system refuses to tell.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"no such file: {path}") from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{path} must be a file, got a folder")


def check_rereadable(path: str | os.PathLike[str]) -> None:
    """Check that a path is a file that can be read several times.

    Raises:
        DataError, OSError: see `check_readable`, or it is a pipe or device.
    """
    check_readable(path)
    if not Path(path).is_file():
        raise DataError(
            f"{path} must be a file, since it is read several times, got a pipe or device"
        )


def is_json_lines(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's name ends in .jsonl or .ndjson, or in one of these and .gz."""
    return os.fspath(path).lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def parse_json_object(line: str) -> dict[str, Any]:
    """Return the JSON object that a line holds.

    Raises:
        DataError: the line is not a JSON object.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested too deep
        raise DataError(f"expected a JSON object, got {quote_start(line)} ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object, got {quote_start(line)}")
    return record


def parse_id(value: Any) -> str:
    """Return an id as text, without the blanks around it, which runs and judgements lose.

    Args:
        value: text, or an integer of a JSON file.

    Raises:
        DataError: the value has another type, is blank or holds a tab, a line end or NUL.
        ValueError: the value holds a lone surrogate.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"expected text or a whole number as id, got {value!r}")
    found = str(value)
    if not found.strip() or any(character in found for character in _BAD_IN_IDS):
        raise DataError(
            f"expected an id that is not blank and holds no tab, line end or NUL, "
            f"got {quote_start(found)}"
        )
    check_unicode("the id", found)
    return found.strip(" ")


def check_ids(name: str, ids: Iterable[str]) -> None:
    """Check that ids are texts, each another one.

    Raises:
        TypeError: an id is not a str.
        ValueError: an id is repeated.
    """
    seen: set[str] = set()
    for position, found in enumerate(ids):
        if not isinstance(found, str):
            raise TypeError(f"{name}[{position}] must be a str, got {type(found).__name__}")
        if found in seen:
            raise ValueError(f"{name} must be unique, got {found!r} twice")
        seen.add(found)


def quote_start(line: str, limit: int = 60) -> str:
    """Return the start of a line in quotes, for a message."""
    return repr(line if len(line) <= limit else line[:limit] + "…")


def _read_lines(path: Path) -> Iterator[bytes]:
    check_readable(path)
    is_compressed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path) if is_compressed else path.open("rb") as file:
            first = file.readline()
            _check_start(path, first)
            has_line_feed = first.endswith(b"\n")
            yield from [first] if has_line_feed else first.split(b"\r")
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} must be a whole gzip file: {error}") from error


def _check_start(path: Path, start: bytes) -> None:
    """Check that a file does not start as files of another encoding or format do."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start[:2]:
        raise DataError(f"{path} must be UTF-8, got UTF-16 or UTF-32")
    if start.startswith(_GZIP_MAGIC):
        raise DataError(f"{path} must have a name that ends in .gz, since it is compressed")
