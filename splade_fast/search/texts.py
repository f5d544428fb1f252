"""Readers of corpora, queries and relevance judgements in TSV and JSONL files."""

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
    """Error in a file of texts or judgements; the message names the line and the reason."""


@dataclass
class Texts:
    """Texts and their unique ids, in the order of their file."""

    ids: list[str]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.ids)


def read_texts(path: str | os.PathLike[str]) -> Texts:
    """Read a corpus or queries.

    A .jsonl or .ndjson file holds one object per line with `text`, an id under `id` or `_id`, and
    optionally `title`, which is put before the text. Any other file holds `id<TAB>text` lines.
    A file whose name ends in .gz is decompressed.

    Raises:
        DataError: the file is missing or has no texts, a line is malformed, or an id is repeated.
    """
    found = Texts([], [])
    for text_id, text in iterate_checked_texts(path):
        found.ids.append(text_id)
        found.texts.append(text)
    return found


def iterate_checked_texts(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """Yield (id, text) for each text of `read_texts`, keeping the ids alone in memory.

    Raises:
        DataError: see `read_texts`; raised on reaching the line.
    """
    seen: set[str] = set()
    for location, (text_id, text) in _parse_texts(path):
        if text_id in seen:
            raise DataError(f"{location}: id {text_id!r} appears a second time")
        seen.add(text_id)
        yield text_id, text
    if not seen:
        raise DataError(f"{path} must hold at least one text, got none")


def iterate_texts(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """Yield (id, text) as `iterate_checked_texts` does, without a check for repeated ids."""
    return (parsed for _, parsed in _parse_texts(path))


def read_qrels(path: str | os.PathLike[str]) -> Qrels:
    """Read judgements as {query id: {document id: relevance}}.

    Lines hold `query document relevance` (BEIR, with or without its header) or
    `query 0 document relevance` (TREC), separated by white space.

    Raises:
        DataError: the file is missing or has no judgements, a line is malformed, or a pair is
            repeated.
    """
    qrels: Qrels = {}
    for location, judgement in parse_lines(Path(path), _parse_qrels_line):
        if judgement is None:  # the header
            continue
        query, document, relevance = judgement
        if document in qrels.setdefault(query, {}):
            raise DataError(f"{location}: {query} {document} is judged a second time")
        qrels[query][document] = relevance
    if not qrels:
        raise DataError(f"{path} must hold at least one judgement, got none")
    return qrels


def parse_lines(path: Path, parse: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """Yield (file and line number, parsed line) for each line that is not blank."""
    for number, line in enumerate(_read_lines(path), start=1):
        location = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").rstrip("\r\n")
            if text.strip():
                yield location, parse(text)
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(f"{location}: {error}") from error


def is_json_lines(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's name ends in .jsonl or .ndjson, or in one of these and .gz."""
    return os.fspath(path).lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def _parse_texts(path: str | os.PathLike[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    parse = _parse_json_line if is_json_lines(path) else _parse_tsv_line
    return parse_lines(Path(path), parse)


def _read_lines(path: Path) -> Iterator[bytes]:
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
        raise DataError(f"expected id<TAB>text, got {quote_start(line)}")
    return text_id, text


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


def _parse_json_line(line: str) -> tuple[str, str]:
    record = parse_json_object(line)
    text_id = record.get("id", record.get("_id"))
    text = record.get("text")
    if not isinstance(text_id, str | int) or not isinstance(text, str):
        raise DataError(f"expected the keys id (or _id) and text, got {quote_start(line)}")
    title = record.get("title")
    return str(text_id), f"{title} {text}" if title else text


def _parse_qrels_line(line: str) -> tuple[str, str, int] | None:
    fields = line.split()
    if fields == ["query-id", "corpus-id", "score"]:
        return None
    if len(fields) not in (3, 4):
        raise DataError(
            f"expected query document relevance or query 0 document relevance, "
            f"got {quote_start(line)}"
        )
    try:
        return fields[0], fields[-2], int(fields[-1])
    except ValueError:
        raise DataError(f"expected a whole number as relevance, got {fields[-1]!r}") from None


def quote_start(line: str, limit: int = 60) -> str:
    """Return the start of a line in quotes, for a message."""
    return repr(line if len(line) <= limit else line[:limit] + "…")
