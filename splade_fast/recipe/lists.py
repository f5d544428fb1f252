"""TextList: a query and the documents that teachers score for it, read from lines of a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splade_fast.search.lines import is_json_lines, parse_json_object, parse_lines
from splade_fast.search.texts import DataError
from splade_fast.training.data.layout import (
    NUMBERS,
    TextLookups,
    find_id_name,
    infer_parts,
    join_names,
)
from splade_fast.training.data.lines import Rows, read_layout_and_rows
from splade_fast.training.data.rows import parse_texts


@dataclass(frozen=True)
class TextList:
    """Query and its documents, with their ids where the source has them.

    Args:
        query: text of the query.
        documents: texts of at least two documents; the first is the positive where there is one.
        query_id: id of the query.
        document_ids: ids of the documents.
        has_texts: whether the source holds the texts, and not ids alone.
    """

    query: str
    documents: list[str]
    query_id: Any = None
    document_ids: list[Any] | None = None
    has_texts: bool = True


def iterate_lists(
    path: str | os.PathLike[str],
    queries: Mapping[str, str] | None = None,
    corpus: Mapping[str, str] | None = None,
) -> Iterator[TextList]:
    """Yield the lists of a file.

    A line holds a query and documents, or a query, a positive and negatives, under the names that
    `load_training_data` knows. Scores and other columns are ignored. `queries` and `corpus` give
    the texts where the file holds ids alone.

    Args:
        path: a file of JSON lines, or a .tsv file of triples.
        queries: {id: text} of the queries.
        corpus: {id: text} of the documents.

    Raises:
        DataError: the file is missing, a line is malformed or lists fewer than two documents, or
            an id is unknown; raised on reaching the line.
    """
    reader: _Reader | None = None
    if is_json_lines(path):
        rows: Rows = parse_lines(Path(path), parse_json_object)
    else:
        # Without the texts of the queries, a line of three fields holds texts.
        lookups = TextLookups() if queries is None else TextLookups(queries, corpus)
        layout, rows = read_layout_and_rows(Path(path), None, lookups)
        reader = _Reader.make(layout.parts, [], lookups)
    is_empty = True
    for place, record in rows:
        is_empty = False
        try:
            if reader is None:
                reader = _Reader.infer(list(record), queries, corpus)
            found = reader.read(record)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error
        yield found
    if is_empty:
        raise DataError(f"{path} must hold at least one list, got none")


@dataclass(frozen=True)
class _Reader:
    """Columns of a query and its documents.

    Args:
        query: column of the query.
        documents: columns of the documents, the positive first.
        query_id: column of the query's id.
        document_ids: columns of the documents' ids, likewise.
        lookups: texts of the columns that hold ids.
    """

    query: str
    documents: dict[str, tuple[str, ...]]
    query_id: str | None
    document_ids: dict[str, tuple[str, ...]]
    lookups: TextLookups

    @classmethod
    def infer(
        cls,
        names: Sequence[str],
        queries: Mapping[str, str] | None,
        corpus: Mapping[str, str] | None,
    ) -> _Reader:
        """Infer the columns, and look texts up only where the file has none."""
        parts = infer_parts(names, renamed=None, lookups=TextLookups())
        lookups = TextLookups(
            queries if "query" not in parts else None,
            corpus if parts.keys().isdisjoint(("documents", "document", "negatives")) else None,
        )
        return cls.make(infer_parts(names, renamed=None, lookups=lookups), names, lookups)

    @classmethod
    def make(
        cls, parts: Mapping[str, tuple[str, ...]], names: Sequence[str], lookups: TextLookups
    ) -> _Reader:
        """Choose the columns of the texts and ids.

        Args:
            parts: columns of each part.
            names: all columns, among which those of ids may be.
            lookups: texts of the parts that are ids.
        """
        texts = {part: columns for part, columns in parts.items() if part not in NUMBERS}
        if texts.keys() not in ({"query", "documents"}, {"query", "document", "negatives"}):
            raise DataError(
                "expected query and documents, or query, document and negatives (or synonyms), "
                f"got {join_names(names or texts)}"
            )
        ids: dict[str, tuple[str, ...]] = {}
        for part, columns in texts.items():
            id_name = find_id_name(part, names)
            if lookups.for_part(part) is not None:
                ids[part] = columns
            elif id_name is not None:
                ids[part] = (id_name,)
        documents = sorted(texts.keys() - {"query"})  # document before negatives
        return cls(
            texts["query"][0],
            {part: texts[part] for part in documents},
            ids.get("query", (None,))[0],
            {part: ids[part] for part in documents if part in ids},
            lookups,
        )

    def read(self, record: Mapping[str, Any]) -> TextList:
        """Return the list of a line."""
        wanted = [self.query, *(name for names in self.documents.values() for name in names)]
        missing = [name for name in wanted if name not in record]
        if missing:
            raise DataError(
                f"expected the columns of the first line, {join_names(missing)} is missing"
            )
        query = parse_texts([record[self.query]], "query", self.lookups.queries)[0]
        texts, ids = [], []
        for part, names in self.documents.items():
            found = parse_texts([record[n] for n in names], part, self.lookups.documents)
            texts += found[:1] if part == "document" else found  # of several positives the first
            own = [
                i for name in self.document_ids.get(part, ()) for i in _flatten(record.get(name))
            ]
            ids += own[:1] if part == "document" else own
        if len(texts) < 2:
            raise DataError(f"expected at least 2 documents, got {len(texts)}")
        return TextList(
            query,
            texts,
            None if self.query_id is None else record.get(self.query_id),
            ids if len(ids) == len(texts) else None,
            self.lookups == TextLookups(),
        )


def _flatten(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
