"""Vectors in Parquet files, which data frames and data sets of any kind read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from splade_fast._atomic_files import new_folder
from splade_fast.export._documents import Documents, check_arguments, iterate_documents
from splade_fast.export._ids import DocumentId
from splade_fast.export._json_lines import check_text
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.ops.sparse_rows.conversions import Entries, pad_entries

if TYPE_CHECKING:
    import pyarrow as pa

_ENTRIES_OF_GROUP = 2**20  # readers hold a row group in memory


def write_parquet(
    rows: SparseRows,
    path: str | os.PathLike[str],
    ids: Sequence[DocumentId] | None = None,
    *,
    texts: Iterable[str] | None = None,
    empty: str = "keep",
    show_progress: bool = True,
) -> int:
    """Write `documents.parquet` with the columns id, indices and values.

    Args:
        rows: (N, V); 16-bit values become float32.
        path: folder to write; must not exist.
        ids: ids of the documents, unique; the row numbers by default. The column holds strings.
        texts: a text for each row, stored in a further column `text`.
        empty: "keep", "skip" or "error" for rows without entries.
        show_progress: draw a progress bar.

    Returns:
        Number of documents written.

    Raises:
        FileExistsError: `path` exists.
        ImportError: pyarrow is not installed.
        TypeError: rows are not SparseRows, or a text is not a str.
        ValueError: an argument is invalid, or a weight is not finite.

    Example::

        >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5], [2.5, 0.0]]))
        >>> sf.export.write_parquet(rows, "parquet", ["d1", "d2"])
        2
        >>> from pyarrow import parquet
        >>> parquet.read_table("parquet").to_pylist()[0]
        {'id': 'd1', 'indices': [1], 'values': [1.5]}
    """
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise ImportError(f"Parquet files need pyarrow: pip install pyarrow ({error})") from error

    ids = check_arguments(rows, ids, empty, texts, "texts")
    values = pa.float64() if rows.values.element_size() == 8 else pa.float32()
    fields = [("id", pa.string()), ("indices", pa.list_(pa.int32())), ("values", pa.list_(values))]
    if texts is not None:
        fields.append(("text", pa.string()))
    schema = pa.schema(fields, metadata={"num_cols": str(rows.num_cols)})
    chunks = iterate_documents(
        rows, ids, empty, extras=texts, extras_name="texts", show_progress=show_progress
    )
    count = 0
    with (
        new_folder(path) as folder,
        # A dictionary pays for columns of few values alone.
        ParquetWriter(folder / "documents.parquet", schema, use_dictionary=False) as file,
    ):
        for table in _tables(chunks, schema):
            file.write_table(table, row_group_size=max(1, len(table)))
            count += len(table)
    return count


def parquet_rows(table: pa.Table, num_cols: int | None = None) -> SparseRows:
    """Return the rows of a table, such as a batch of ray.data, that `write_parquet` has written.

    Args:
        table: table of pyarrow with the columns indices and values.
        num_cols: number of columns, V; by default that in the metadata of the table.

    Raises:
        ValueError: the table lacks a column or the number of columns, or it does not hold rows.

    Example::

        >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5], [2.5, 0.0]]))
        >>> _ = sf.export.write_parquet(rows, "vectors")
        >>> from pyarrow import parquet
        >>> sf.export.parquet_rows(parquet.read_table("vectors")).equal(rows)
        True
    """
    for name in ("indices", "values"):
        if name not in table.column_names:
            raise ValueError(f"table must have the columns indices and values, got no {name}")
    if num_cols is None:
        stored = (table.schema.metadata or {}).get(b"num_cols")
        if stored is None:
            raise ValueError("num_cols must be given for a table without it in its metadata")
        num_cols = int(stored)
    columns, values = (table[name].combine_chunks() for name in ("indices", "values"))
    lengths = _to_tensor(columns.value_lengths())
    if not torch.equal(lengths, _to_tensor(values.value_lengths())):
        raise ValueError("table must have as many indices as values in each row")
    entries = Entries(lengths, _to_tensor(columns.flatten()), _to_tensor(values.flatten()))
    rows = SparseRows(*pad_entries(entries), num_cols)
    rows.check_contents()
    return rows


def _to_tensor(array: pa.Array) -> torch.Tensor:
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())


def _tables(chunks: Iterable[Documents], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the rows of each row group."""
    import pyarrow as pa

    batches: list[pa.RecordBatch] = []
    entries = 0
    for chunk in chunks:
        batches.append(_to_batch(chunk, schema))
        entries += len(chunk.values)
        if entries >= _ENTRIES_OF_GROUP:
            yield pa.Table.from_batches(batches, schema)
            batches, entries = [], 0
    if batches:
        yield pa.Table.from_batches(batches, schema)


def _to_batch(chunk: Documents, schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    bounds = np.asarray(chunk.bounds(), dtype=np.int32)
    columns: dict[str, Any] = {
        "id": [str(id_) for id_ in chunk.ids],
        "indices": pa.ListArray.from_arrays(bounds, chunk.columns),
        "values": pa.ListArray.from_arrays(bounds, chunk.values),
    }
    if "text" in schema.names:
        for row, text in zip(chunk.rows, chunk.extras, strict=True):
            check_text(text, row)
        columns["text"] = chunk.extras
    return pa.RecordBatch.from_pydict(columns, schema)
