"""Training data in files of lines: .tsv with and without a header, and .jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from splade_fast.search.texts import DataError, is_json_lines, json_object, parsed_lines
from splade_fast.training.data.columns import Columns, Layout, Lookups, layout_of, part_of

LINE_FILES = (".tsv", ".txt", ".jsonl", ".ndjson")  # also followed by .gz

Rows = Iterator[tuple[str, dict[str, Any]]]  # the place of each row, and the row


def layout_and_rows(path: Path, columns: Columns | None, ids: Lookups) -> tuple[Layout, Rows]:
    """The layout of a file, decided by its first line, and its rows.

    Args:
        path: one of LINE_FILES.
        columns: as in load_training_data.
        ids: which parts are ids.

    Raises:
        DataError: no such file, no rows in it, an unknown layout; the rows raise it for a malformed
            line.
    """
    if is_json_lines(path):
        return _json_rows(path, columns, ids)
    return _tsv_rows(path, columns, ids)


def _json_rows(path: Path, columns: Columns | None, ids: Lookups) -> tuple[Layout, Rows]:
    if columns is not None and not isinstance(columns, Mapping):
        raise DataError(f"columns must be {{key: part}} for {path}, got a list")
    lines = parsed_lines(path, json_object)
    where, first = _first(lines, path)
    layout = _layout(where, list(first), columns, ids)
    return layout, chain([(where, first)], lines)


def _tsv_rows(path: Path, columns: Columns | None, ids: Lookups) -> tuple[Layout, Rows]:
    lines = parsed_lines(path, lambda line: line.split("\t"))
    where, fields = _first(lines, path)
    if _is_header(fields, columns, ids):
        names = fields
        renamed = columns if isinstance(columns, Mapping) else None
        first = _first(lines, path)
    else:
        names = [f"column {number}" for number in range(1, len(fields) + 1)]
        renamed = dict(zip(names, _parts_of(where, fields, columns, ids), strict=True))
        first = where, fields
    layout = _layout(where, names, renamed, ids)
    return layout, ((place, _named(place, names, row)) for place, row in chain([first], lines))


def _is_header(fields: list[str], columns: Columns | None, ids: Lookups) -> bool:
    if columns is not None:
        return isinstance(columns, Mapping)
    return all(part_of(field, ids) is not None for field in fields)


def _parts_of(where: str, fields: list[str], columns: Columns | None, ids: Lookups) -> list[str]:
    """What the fields of a line hold, in a file without a header."""
    if columns is not None:
        if len(columns) != len(fields):
            raise DataError(f"{where}: expected {len(columns)} columns, got {len(fields)}")
        return list(columns)
    if len(fields) == 2:
        return ["query", "document"]
    if len(fields) == 3:
        # Ids are numbers as well: of them the third one is the negative's.
        labelled = ids.documents is None and _is_number(fields[2])
        return ["query", "document", "label" if labelled else "negatives"]
    raise DataError(
        f"{where}: expected query<TAB>document, query<TAB>positive<TAB>negative or "
        f"query<TAB>document<TAB>label (others: see columns=), got {len(fields)} columns"
    )


def _layout(
    where: str, names: list[str], renamed: Mapping[str, str] | None, ids: Lookups
) -> Layout:
    try:
        return layout_of(names, renamed=renamed, ids=ids)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _first(lines: Iterator[tuple[str, Any]], path: Path) -> tuple[str, Any]:
    first = next(lines, None)
    if first is None:
        raise DataError(f"{path} must hold at least one example, got none")
    return first


def _named(where: str, names: list[str], fields: list[str]) -> dict[str, Any]:
    if len(fields) != len(names):
        raise DataError(
            f"{where}: expected {len(names)} columns, as in the first line, got {len(fields)}"
        )
    return dict(zip(names, fields, strict=True))


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
