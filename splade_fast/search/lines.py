"""Lines of UTF-8 files, plain or gzipped, and the JSON objects and ids in them."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from splade_fast._checks import check_unicode
from splade_fast.search.source_files import DataError as DataError
from splade_fast.search.source_files import file_name, open_file

T = TypeVar("T")

_BYTE_ORDER_MARK = "\ufeff"
_GZIP_MAGIC = b"\x1f\x8b"
_BAD_IN_IDS = "\t\n\r\0"  # they would end a field, a line or a C string


class DataWarning(UserWarning):
    """Warning of data that is used as it is, but is rarely meant so."""


class Place(NamedTuple):
    """Place of a line or row in a file.

    Args:
        offset: number of bytes before it, decompressed; 0 for a row.
        number: number of lines or rows before it.
    """

    offset: int = 0
    number: int = 0


START = Place()


class LineFile:
    """Lines of a UTF-8 file, plain or gzipped, which is read from any place on.

    A file whose name ends in .gz is decompressed. Lines end in a line feed, with or without a
    carriage return, or in carriage returns where the file has no line feed. A byte-order mark at
    the start of a line, as joined files have it, is not part of the line.

    Args:
        path: a file, local or a URL, or a pipe or device, which is read once.

    Raises:
        DataError: there is no such file.
        OSError: the file may not be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._source = open_file(path)
        is_compressed = file_name(path).endswith(".gz")
        self._file = gzip.GzipFile(fileobj=self._source) if is_compressed else self._source
        self._is_new = True
        self._has_line_feed = True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._source.close()

    def parse(
        self, parse: Callable[[str], T], start: Place = START
    ) -> Iterator[tuple[Place, str, T]]:
        """Yield (place, file and line number, parsed line) for each line that is not blank.

        Args:
            parse: function of a line without its end, which raises ValueError for a malformed line.
            start: place of a line, from which on the file is read.

        Raises:
            DataError: the file is not UTF-8, or a line is malformed.
        """
        for place, line in self._read(start):
            location = f"{self._path}, line {place.number + 1}"
            try:
                text = line.decode("utf-8").rstrip("\r\n").removeprefix(_BYTE_ORDER_MARK)
                if text.strip():
                    yield place, location, parse(text)
            except ValueError as error:
                raise DataError(f"{location}: {error}") from error

    def _read(self, start: Place) -> Iterator[tuple[Place, bytes]]:
        if self._is_new and start != START:
            next(self._read(START))  # the first line tells how lines end
        try:
            if not self._is_new:  # a pipe cannot seek
                self._file.seek(start.offset)
            first = self._file.readline()
            if self._is_new:
                _check_start(self._path, first)
                self._has_line_feed = first.endswith(b"\n")
                self._is_new = False
            lines = chain([first], self._file) if self._has_line_feed else first.split(b"\r")
            offset = start.offset
            for number, line in enumerate(lines, start=start.number):
                yield Place(offset, number), line
                offset += len(line) + (not self._has_line_feed)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self._path} must be a whole gzip file: {error}") from error


def parse_lines(path: str | os.PathLike[str], parse: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """Yield (file and line number, parsed line) for each line of a `LineFile` that is not blank.

    Args:
        path: see `LineFile`.
        parse: see `LineFile.parse`.

    Raises:
        DataError, OSError: see `LineFile` and `LineFile.parse`.
    """
    with closing(LineFile(path)) as file:
        for _, location, parsed in file.parse(parse):
            yield location, parsed


def is_json_lines(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's name ends in .jsonl or .ndjson, or in one of these and .gz."""
    return file_name(path).removesuffix(".gz").endswith((".jsonl", ".ndjson"))


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


def _check_start(path: str | os.PathLike[str], start: bytes) -> None:
    """Check that a file does not start as files of another encoding or format do."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start[:2]:
        raise DataError(f"{path} must be UTF-8, got UTF-16 or UTF-32")
    if start.startswith(_GZIP_MAGIC):
        raise DataError(f"{path} must have a name that ends in .gz, since it is compressed")
