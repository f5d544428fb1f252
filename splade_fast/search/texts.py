"""Readers of corpora and queries in TSV, JSONL and Parquet files."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from splade_fast._checks import check_unicode
from splade_fast.search.lines import (
    START,
    DataError,
    LineFile,
    Place,
    check_ids,
    is_json_lines,
    parse_id,
    parse_json_object,
    quote_start,
)
from splade_fast.search.parquet_rows import ParquetRows, is_parquet
from splade_fast.search.qrels import Qrels, read_qrels
from splade_fast.search.source_files import list_files

__all__ = [
    "DataError",
    "Qrels",
    "TextFile",
    "Texts",
    "find_texts",
    "iterate_checked_texts",
    "read_qrels",
    "read_texts",
]

# Names of keys and columns in the files of BEIR, Tevatron, Anserini and others, best first.
_ID_NAMES = (
    *("id", "_id", "docid", "docno", "doc_id", "document_id", "pid", "passage_id", "corpus_id"),
    *("query_id", "qid"),
)
_TEXT_NAMES = ("text", "contents", "content", "query", "question", "passage", "document")
_PARTS = {
    **dict.fromkeys(_ID_NAMES, "id"),
    **dict.fromkeys(_TEXT_NAMES, "text"),
    "title": "title",
    # Columns of judgements and of training data, which are no texts.
    **dict.fromkeys(("score", "relevance", "label", "positive", "negative"), "other"),
}


@dataclass
class Texts:
    """Texts and their unique ids, in the order of their file.

    Raises:
        TypeError: an id is not a str.
        ValueError: there is not one text for each id, or an id is repeated.
    """

    ids: list[str]
    texts: list[str]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.ids):
            raise ValueError(f"texts must be one per id, {len(self.ids)}, got {len(self.texts)}")
        check_ids("ids", self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def read_texts(path: str | os.PathLike[str]) -> Texts:
    """Read a corpus or queries.

    A file of JSON lines holds one object per line, with

    - an id, text or an integer, under `id`, `_id`, `docid`, `docno`, `doc_id`, `document_id`,
      `pid`, `passage_id`, `corpus_id`, `query_id` or `qid`;
    - a text under `text`, `contents`, `content`, `query`, `question`, `passage` or `document`;
    - optionally `title`, which is put before the text. It is not put before `contents`, which
      holds all that Anserini indexes.

    Where an object has several of these keys, the first one counts. Any other file holds
    `id<TAB>text` lines. Its first line is a header if its fields name an id and a text so, as in
    `id<TAB>text<TAB>title`; it then tells the order of the columns, of which unknown ones are
    ignored. Blanks around an id do not belong to it.

    A file is one of JSON lines if its name ends in .jsonl or .ndjson, or if its first line is a
    JSON object. A file whose name ends in .gz is decompressed. A file whose name ends in .parquet
    has columns of these names. A pipe is read as a file is. A folder stands for its files and those
    of the folders in it, in the order of their names, without names that start with a dot or an
    underscore.

    Args:
        path: file or folder, local or a URL of fsspec or pyarrow such as s3://bucket/corpus.

    Raises:
        DataError: a file cannot be read, there are no texts, a line is malformed, or an id is
            repeated.
        ImportError: no installed package reads Parquet, or knows the scheme of the URL.
    """
    found = Texts([], [])
    for located in iterate_checked_texts(path):
        found.ids.append(located.id)
        found.texts.append(located.text)
    return found


class LocatedText(NamedTuple):
    """Text with its id, and where it stands."""

    file: str
    place: Place
    id: str
    text: str


def iterate_checked_texts(path: str | os.PathLike[str]) -> Iterator[LocatedText]:
    """Yield each text of `read_texts`, keeping the ids alone in memory.

    Raises:
        DataError, ImportError: see `read_texts`; raised on reaching the line.
    """
    seen: set[str] = set()
    for name in list_files(path):
        with closing(TextFile(name)) as file:
            for place, location, (text_id, text) in file.read():
                if text_id in seen:
                    raise DataError(f"{location}: id {text_id!r} appears a second time")
                seen.add(text_id)
                yield LocatedText(name, place, text_id, text)
    if not seen:
        raise DataError(f"{path} must hold at least one text, got none")


def find_texts(path: str | os.PathLike[str], ids: Collection[str]) -> dict[str, str]:
    """Return the texts with some ids, reading until all are found.

    Raises:
        DataError, ImportError: see `read_texts`; or an id is missing.
    """
    missing = set(ids)
    found: dict[str, str] = {}
    for name in list_files(path) if missing else []:
        with closing(TextFile(name)) as file:
            for _, _, (text_id, text) in file.read():
                if text_id in missing:
                    missing.remove(text_id)
                    found[text_id] = text
                if not missing:
                    return found
    if missing:
        raise DataError(f"{path} must hold all documents of the index, got no {min(missing)!r}")
    return found


class TextFile:
    """File of texts in a format of `read_texts`, which is read from any place on.

    Raises:
        DataError, ImportError, OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._parser: _TextParser | None = None
        self._rows = _open_rows(path) if is_parquet(path) else None
        self._lines = LineFile(path) if self._rows is None else None

    def close(self) -> None:
        """Close the file."""
        for source in (self._rows, self._lines):
            if source is not None:
                source.close()

    def read(self, start: Place = START) -> Iterator[tuple[Place, str, tuple[str, str]]]:
        """Yield (place, file and number of the line or row, (id, text)) for each text.

        Args:
            start: place of a text, from which on the file is read.

        Raises:
            DataError: a line is malformed; raised on reaching it.
        """
        if self._rows is not None:
            yield from self._rows.parse(_parse_row, start)
            return
        assert self._lines is not None
        if start == START:
            self._parser = _TextParser(self._path)
        elif self._parser is None:
            next(self.read())  # the first lines tell the format
        assert self._parser is not None
        for place, location, parsed in self._lines.parse(self._parser, start):
            if parsed is not None:
                yield place, location, parsed


def _open_rows(path: str | os.PathLike[str]) -> ParquetRows:
    rows = ParquetRows(path, _PARTS)
    if not all(any(name in rows.columns for name in names) for names in (_ID_NAMES, _TEXT_NAMES)):
        rows.close()
        raise DataError(
            f"{path} must have columns for an id ({', '.join(_ID_NAMES)}) and a text "
            f"({', '.join(_TEXT_NAMES)}), got {', '.join(rows.names)}"
        )
    return rows


class _TextParser:
    """Function that returns (id, text) of a line, or None for a header.

    The name of the file or its first line tells the format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._parse: Callable[[str], tuple[str, str]] | None = None
        if is_json_lines(path):
            self._parse = _parse_json_line

    def __call__(self, line: str) -> tuple[str, str] | None:
        if self._parse is None:
            header = _parse_header(line)
            if header is not None:
                self._parse = partial(_parse_columns, header)
                return None
            self._parse = _parse_json_line if _is_json_object(line) else _parse_tsv_line
        return self._parse(line)


def _is_json_object(line: str) -> bool:
    try:
        return line.startswith("{") and bool(parse_json_object(line))
    except DataError:
        return False


def _parse_header(line: str) -> tuple[str | None, ...] | None:
    """Return the part that each column holds, or None for a line that is no header.

    Raises:
        DataError: the first or all columns have known names, which are not those of texts.
    """
    fields = line.split("\t") if "\t" in line else line.split()
    parts = tuple(_PARTS.get(field.strip().lower().replace("-", "_")) for field in fields)
    is_all_known = len(parts) > 1 and None not in parts
    has_texts = parts.count("id") == parts.count("text") == 1 and parts.count("title") <= 1
    if has_texts and "other" not in parts and (is_all_known or "\t" in line):
        return parts
    if is_all_known or ("\t" in line and parts[0] == "id"):
        raise DataError(
            f"expected the columns id, text ({', '.join(_TEXT_NAMES)}) and perhaps title, "
            f"got {quote_start(line)}"
        )
    return None


def _parse_columns(parts: Sequence[str | None], line: str) -> tuple[str, str]:
    # Only a text in the last column may hold tabs.
    fields = line.split("\t", len(parts) - 1 if parts[-1] == "text" else -1)
    if len(fields) != len(parts):
        raise DataError(f"expected {len(parts)} columns, as in the header, got {len(fields)}")
    values = dict(zip(parts, fields, strict=True))
    return parse_id(values["id"]), _join(values.get("title"), values["text"])


def _parse_tsv_line(line: str) -> tuple[str, str]:
    text_id, tab, text = line.partition("\t")
    if not tab:
        raise DataError(f"expected id<TAB>text, got {quote_start(line)}")
    return parse_id(text_id), text


def _parse_json_line(line: str) -> tuple[str, str]:
    return parse_text_record(parse_json_object(line), quote_start(line))


def _parse_row(record: Mapping[str, Any]) -> tuple[str, str]:
    return parse_text_record(record, quote_start(str(record)))


def parse_text_record(record: Mapping[str, Any], quoted: str) -> tuple[str, str]:
    """Return id and text of an object with the keys that `read_texts` knows.

    Args:
        record: the object.
        quoted: the object as a message shows it.

    Raises:
        DataError: a key is missing, or its value is of another type.
        ValueError: a text holds a lone surrogate.
    """
    id_name, text_name = (_find_key(record, names) for names in (_ID_NAMES, _TEXT_NAMES))
    if id_name is None or text_name is None:
        raise DataError(
            f"expected an id ({', '.join(_ID_NAMES)}) and a text ({', '.join(_TEXT_NAMES)}), "
            f"got {quoted}"
        )
    text_id = parse_id(record[id_name])
    parts = {name: record.get(name) for name in (text_name, "title")}
    for name, value in parts.items():
        if value is not None:
            if not isinstance(value, str):
                raise DataError(f"expected text under the key {name}, got {quoted}")
            check_unicode(name, value)
    title = None if text_name == "contents" else parts["title"]
    return text_id, _join(title, record[text_name])


def _find_key(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of the names whose value is not null."""
    return next((name for name in names if record.get(name) is not None), None)


def _join(title: str | None, text: str) -> str:
    return f"{title} {text}" if title else text
