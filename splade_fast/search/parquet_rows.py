"""ParquetRows: rows of a Parquet file from any place on."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from itertools import accumulate
from typing import Any, TypeVar

from splade_fast.search.lines import START, DataError, Place
from splade_fast.search.source_files import file_name, open_file

T = TypeVar("T")

_ROWS_AT_A_TIME = 1024


def is_parquet(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's name ends in .parquet."""
    return file_name(path).endswith(".parquet")


class ParquetRows:
    """Rows of a Parquet file, which is read from any place on.

    Args:
        path: file, local or a URL.
        columns: names of columns to read, where the file has them.

    Raises:
        DataError: there is no such file, or it is no whole Parquet file.
        ImportError: pyarrow is not installed.
        OSError: the file may not be read.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Collection[str]) -> None:
        try:
            from pyarrow import ArrowInvalid
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ImportError(f"{path} needs pyarrow to be read: {error}") from error
        self._path = path
        self._source = open_file(path)
        try:
            self._file = ParquetFile(self._source)
        except ArrowInvalid as error:
            raise DataError(f"{path} must be a whole Parquet file: {error}") from error
        self.names: list[str] = self._file.schema_arrow.names
        self.columns = [name for name in self.names if name in columns]
        groups = range(self._file.num_row_groups)
        counts = [self._file.metadata.row_group(group).num_rows for group in groups]
        self._group_starts = list(accumulate(counts, initial=0))
        self._group, self._batch_start = -1, 0
        self._batch: Any = None
        self._batches: Iterator[Any] = iter(())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._source.close()

    def parse(
        self, parse: Callable[[dict[str, Any]], T], start: Place = START
    ) -> Iterator[tuple[Place, str, T]]:
        """Yield (place, file and number of the row, parsed row) for each row.

        Args:
            parse: function of a row as {column: value}, which raises ValueError for a bad one.
            start: place of a row, from which on the file is read.

        Raises:
            DataError: a row is bad, or the file is damaged.
        """
        row = start.number
        while row < self._group_starts[-1]:
            location = f"{self._path}, row {row + 1}"
            try:
                for record in self._batch_from(row).to_pylist():
                    location = f"{self._path}, row {row + 1}"
                    yield Place(0, row), location, parse(record)
                    row += 1
            except (OSError, ValueError) as error:  # of pyarrow, or of the row
                raise DataError(f"{location}: {error}") from error

    def _batch_from(self, row: int) -> Any:
        """Return the rows of a batch from the given one on; rows that follow are found quickly."""
        group = bisect_right(self._group_starts, row) - 1
        if group != self._group or row < self._batch_start:
            self._group, self._batch_start = group, self._group_starts[group]
            self._batches = self._file.iter_batches(
                _ROWS_AT_A_TIME, row_groups=[group], columns=self.columns
            )
            self._batch = next(self._batches)
        while row >= self._batch_start + len(self._batch):
            self._batch_start += len(self._batch)
            self._batch = next(self._batches)
        return self._batch.slice(row - self._batch_start)
