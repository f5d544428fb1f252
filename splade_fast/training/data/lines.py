"""Training data in files of lines: .tsv with or without a header, and .jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from splade_fast.search.lines import DataError, is_json_lines, parse_json_object, parse_lines
from splade_fast.training.data.layout import (
    Columns,
    Layout,
    TextLookups,
    infer_layout,
    infer_named_part,
)

LINE_FILES = (".tsv", ".txt", ".jsonl", ".ndjson")  # also followed by .gz

Rows = Iterator[tuple[str, dict[str, Any]]]  # (place, row)


def read_layout_and_rows(
    path: Path, columns: Columns | None, lookups: TextLookups
) -> tuple[Layout, Rows]:
    """Return the layout of a file, which its first line decides, and its rows.

    Args:
        path: one of LINE_FILES.
        columns: as in load_training_data.
        lookups: texts of the parts that are ids.

    Returns:
        The layout, and an iterator over (place, row) that raises DataError at a malformed line.

    Raises:
        DataError: the file is missing or empty, or its layout is unknown.
    """
    if is_json_lines(path):
        return _read_json_lines(path, columns, lookups)
    return _read_tsv(path, columns, lookups)


def _read_json_lines(
    path: Path, columns: Columns | None, lookups: TextLookups
) -> tuple[Layout, Rows]:
    if columns is not None and not isinstance(columns, Mapping):
        raise DataError(f"columns must be {{key: part}} for {path}, got a list")
    lines = parse_lines(path, parse_json_object)
    place, first = _read_first(lines, path)
    layout = _infer_layout(place, list(first), columns, lookups)
    return layout, chain([(place, first)], lines)


def _read_tsv(path: Path, columns: Columns | None, lookups: TextLookups) -> tuple[Layout, Rows]:
    lines = parse_lines(path, lambda line: line.split("\t"))
    place, fields = _read_first(lines, path)
    is_header = _is_header(fields, columns)
    first = _read_first(lines, path) if is_header else (place, fields)
    if is_header and (columns is None or isinstance(columns, Mapping)):
        names, renamed = fields, columns
    else:  # columns tell the parts, also in place of a header
        names = [f"column {number}" for number in range(1, len(fields) + 1)]
        renamed = dict(zip(names, _infer_parts(place, fields, columns, lookups), strict=True))
    layout = _infer_layout(place, names, renamed, lookups)
    return layout, (
        (where, _name_fields(where, names, row)) for where, row in chain([first], lines)
    )


def _is_header(fields: list[str], columns: Columns | None) -> bool:
    """Return whether the first line names columns: all of them, or a query and a document."""
    if isinstance(columns, Mapping):
        return True
    parts = [infer_named_part(field) for field in fields]
    has_pair = "query" in parts and not {"document", "documents"}.isdisjoint(parts)
    return None not in parts or has_pair


def _infer_parts(
    place: str, fields: list[str], columns: Columns | None, lookups: TextLookups
) -> list[str]:
    """Infer the parts of a line in a file without a header."""
    if columns is not None:
        if len(columns) != len(fields):
            raise DataError(f"{place}: expected {len(columns)} columns, got {len(fields)}")
        return list(columns)
    if len(fields) == 2:
        return ["query", "document"]
    if len(fields) == 3:
        # Ids may be numbers too; a third id belongs to a negative.
        is_label = lookups.documents is None and _is_number(fields[2])
        return ["query", "document", "label" if is_label else "negatives"]
    raise DataError(
        f"{place}: expected query<TAB>document, query<TAB>positive<TAB>negative or "
        f"query<TAB>document<TAB>label (others: see columns=), got {len(fields)} columns"
    )


def _infer_layout(
    place: str, names: list[str], renamed: Mapping[str, str] | None, lookups: TextLookups
) -> Layout:
    try:
        return infer_layout(names, renamed=renamed, lookups=lookups)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def _read_first(lines: Iterator[tuple[str, Any]], path: Path) -> tuple[str, Any]:
    first = next(lines, None)
    if first is None:
        raise DataError(f"{path} must hold at least one example, got none")
    return first


def _name_fields(place: str, names: list[str], fields: list[str]) -> dict[str, Any]:
    if len(fields) != len(names):
        raise DataError(
            f"{place}: expected {len(names)} columns, as in the first line, got {len(fields)}"
        )
    return dict(zip(names, fields, strict=True))


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
