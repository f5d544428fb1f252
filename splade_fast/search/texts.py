"""Corpora, queries and relevance judgements from TSV and JSONL files."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Qrels = dict[str, dict[str, int]]


class DataError(ValueError):
    """A file of texts or judgements that cannot be used; says which line and why."""


@dataclass
class Texts:
    """Texts with unique ids, in the order of their file."""

    ids: list[str]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.ids)


def read_texts(path: str | os.PathLike[str]) -> Texts:
    """Read a corpus or queries.

    A name ending in .jsonl holds one object per line with `text`, an id under `id` or `_id`, and
    optionally `title`, which goes before the text; any other file holds `id<TAB>text` lines. Either
    may be compressed, with .gz after its name.

    Raises:
        DataError: no such file, no texts in it, a malformed line or a repeated id.
    """
    found = Texts([], [])
    for text_id, text in checked_texts(path):
        found.ids.append(text_id)
        found.texts.append(text)
    return found


def checked_texts(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """(id, text) of what `read_texts` reads, one after the other; only the ids are kept.

    Raises:
        DataError: as there, on reaching the line; no texts, at the end.
    """
    seen: set[str] = set()
    for where, (text_id, text) in _parsed_texts(path):
        if text_id in seen:
            raise DataError(f"{where}: id {text_id!r} appears a second time")
        seen.add(text_id)
        yield text_id, text
    if not seen:
        raise DataError(f"{path} must hold at least one text, got none")


def each_text(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """As `checked_texts`, of a file whose ids have been checked before; nothing is kept."""
    return (parsed for _, parsed in _parsed_texts(path))


def read_qrels(path: str | os.PathLike[str]) -> Qrels:
    """Read judgements {query id: {document id: relevance}}.

    Lines hold `query document relevance` (BEIR, with or without its header) or
    `query 0 document relevance` (TREC), separated by white space.

    Raises:
        DataError: no such file, no judgements in it, a malformed line or a repeated pair.
    """
    qrels: Qrels = {}
    for where, judgement in parsed_lines(Path(path), _parse_qrels_line):
        if judgement is None:
            continue
        query, document, relevance = judgement
        if document in qrels.setdefault(query, {}):
            raise DataError(f"{where}: {query} {document} is judged a second time")
        qrels[query][document] = relevance
    if not qrels:
        raise DataError(f"{path} must hold at least one judgement, got none")
    return qrels


def parsed_lines(path: Path, parse: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """(file and line number, parsed line) for all lines that are not blank."""
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").rstrip("\r\n")
            if text.strip():
                yield where, parse(text)
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(f"{where}: {error}") from error


def is_json_lines(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name says that every line is a JSON object."""
    return os.fspath(path).lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def _parsed_texts(path: str | os.PathLike[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    parse = _parse_json_line if is_json_lines(path) else _parse_tsv_line
    return parsed_lines(Path(path), parse)


def _lines(path: Path) -> Iterator[bytes]:
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    compressed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} must be a whole gzip file: {error}") from error


def _parse_tsv_line(line: str) -> tuple[str, str]:
    text_id, tab, text = line.partition("\t")
    if not tab or not text_id:
        raise DataError(f"expected id<TAB>text, got {shortened(line)}")
    return text_id, text


def json_object(line: str) -> dict[str, Any]:
    """The object that a line holds.

    Raises:
        DataError: it holds something else.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise DataError(f"expected a JSON object, got {shortened(line)} ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object, got {shortened(line)}")
    return record


def _parse_json_line(line: str) -> tuple[str, str]:
    record = json_object(line)
    text_id = record.get("id", record.get("_id"))
    text = record.get("text")
    if not isinstance(text_id, str | int) or not isinstance(text, str):
        raise DataError(f"expected the keys id (or _id) and text, got {shortened(line)}")
    title = record.get("title")
    return str(text_id), f"{title} {text}" if title else text


def _parse_qrels_line(line: str) -> tuple[str, str, int] | None:
    fields = line.split()
    if fields == ["query-id", "corpus-id", "score"]:
        return None
    if len(fields) not in (3, 4):
        raise DataError(
            f"expected query document relevance or query 0 document relevance, "
            f"got {shortened(line)}"
        )
    try:
        return fields[0], fields[-2], int(fields[-1])
    except ValueError:
        raise DataError(f"expected a whole number as relevance, got {fields[-1]!r}") from None


def shortened(line: str, limit: int = 60) -> str:
    """The line, quoted, as a message shows it."""
    return repr(line if len(line) <= limit else line[:limit] + "…")
