"""Reader that turns the rows of a source into examples, and can be hashed for cached results."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splade_fast.search.source_files import check_rereadable
from splade_fast.search.texts import DataError, read_texts
from splade_fast.training.data.layout import Columns, Layout, TextLookups, infer_layout
from splade_fast.training.data.rows import convert_row


@dataclass(frozen=True)
class FileVersion:
    """Path of a file, with values that change with its content.

    `datasets` hashes them, so that it does not reuse a result of an older content.
    """

    path: str
    size: int
    modified: int

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> FileVersion:
        """Return the version of a file.

        Raises:
            DataError: there is no such file, or it is a folder or a pipe.
        """
        check_rereadable(path)
        status = Path(path).stat()
        return cls(os.fspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=2)  # the queries and the corpus, once for all epochs
def _read_lookup(file: FileVersion) -> Mapping[str, str]:
    texts = read_texts(file.path)
    return dict(zip(texts.ids, texts.texts, strict=True))


@dataclass(frozen=True)
class ExampleReader:
    """Options of load_training_data that decide how a row becomes an example."""

    columns: Columns | None
    queries: FileVersion | None
    corpus: FileVersion | None
    negatives_per_query: int | None

    @property
    def lookups(self) -> TextLookups:
        """Texts of the source's ids."""
        return TextLookups(
            None if self.queries is None else _read_lookup(self.queries),
            None if self.corpus is None else _read_lookup(self.corpus),
        )

    def infer_layout(self, names: Iterable[str]) -> Layout:
        """Infer the layout of a source whose columns have names.

        Raises:
            DataError: the layout is unknown, or the reader's columns are a list.
        """
        if self.columns is not None and not isinstance(self.columns, Mapping):
            raise DataError("columns must be {name: part} for a source whose columns have names")
        return infer_layout(names, renamed=self.columns, lookups=self.lookups)

    def convert(self, record: Mapping[str, Any], layout: Layout, place: str) -> dict[str, Any]:
        """Return the example of a row.

        Args:
            record: the row.
            layout: layout of the source.
            place: file and line of the row, for messages.

        Raises:
            DataError: the row is malformed or has too few negatives.
        """
        try:
            row = convert_row(record, layout, self.lookups)
            self._check_negatives(row)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error
        return row

    def _check_negatives(self, row: dict[str, Any]) -> None:
        required = self.negatives_per_query
        if required is None:
            return
        found = len(row["documents"]) - 1 if "documents" in row else len(row.get("negatives", []))
        if found < required:
            raise DataError(f"expected at least {required} negatives, got {found}")
