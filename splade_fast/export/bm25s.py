"""Writer of bm25s index folders with learned weights in place of BM25 scores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from splade_fast._atomic_files import new_folder
from splade_fast.export._documents import Documents, check_arguments, iterate_documents
from splade_fast.export._ids import DocumentId
from splade_fast.export._json_lines import name_columns
from splade_fast.ops.sparse_rows import SparseRows


def write_bm25s(
    rows: SparseRows,
    path: str | os.PathLike[str],
    ids: Sequence[DocumentId] | None = None,
    *,
    id_to_token: Sequence[str] | Mapping[int, str] | None = None,
    empty: str = "keep",
    show_progress: bool = True,
) -> int:
    """Write a folder for `bm25s.BM25.load` whose scores are the weights.

    bm25s adds up the scores of a query's tokens. It answers queries that are bags of words, as
    from a `BagOfWordsQueryEncoder` with weights of 1, but no weighted queries.

    Args:
        rows: (N, V); 16-bit values become float32.
        path: folder to write; must not exist. Its file `ids.json` lists the ids by bm25s's document
            number.
        ids: ids of the documents, unique; the row numbers by default.
        id_to_token: names of the columns; the column numbers by default.
        empty: "keep", "skip" or "error" for documents without entries. bm25s accepts them.
        show_progress: draw two progress bars, since the rows are read twice.

    Returns:
        Number of documents written.

    Raises:
        FileExistsError: `path` exists.
        TypeError: rows are not SparseRows.
        ValueError: an argument is invalid, or a weight is not finite.

    Example::

        >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5], [2.5, 0.0]]))
        >>> sf.export.write_bm25s(rows, "bm25s", ["d1", "d2"], id_to_token=["fox", "dog"])
        2
    """
    ids = check_arguments(rows, ids, empty)
    names = name_columns(id_to_token, rows.num_cols)

    def chunks(description: str) -> Iterator[Documents]:
        return iterate_documents(
            rows, ids, empty, show_progress=show_progress, description=description
        )

    value_dtype = "float64" if rows.values.element_size() == 8 else "float32"
    with new_folder(path) as folder:
        counts = np.zeros(rows.num_cols, dtype=np.int64)
        kept: list[DocumentId] = []
        for chunk in chunks("count"):
            counts += np.bincount(chunk.columns, minlength=rows.num_cols)
            kept += chunk.ids
        starts = np.concatenate([[0], counts.cumsum()])
        _write_postings(folder, chunks("write"), starts, value_dtype)
        np.save(folder / "indptr.csc.index.npy", starts)
        files = {
            "vocab.index.json": {name: column for column, name in enumerate(names)},
            "params.index.json": _parameters(len(kept), value_dtype),
            "ids.json": kept,
        }
        for name, content in files.items():
            text = json.dumps(content, ensure_ascii=False)
            (folder / name).write_text(text, encoding="utf-8")
    return len(kept)


def _write_postings(
    folder: Path, chunks: Iterator[Documents], starts: np.ndarray, value_dtype: str
) -> None:
    """Write the documents and weights of each term into memory-mapped files."""
    total = int(starts[-1])
    numbers = _new_array(folder / "indices.csc.index.npy", "int32", total)
    scores = _new_array(folder / "data.csc.index.npy", value_dtype, total)
    next_slots = starts[:-1].copy()  # position of each term's next document
    first = 0
    for chunk in chunks:
        doc_numbers = np.repeat(np.arange(first, first + len(chunk)), chunk.lengths)
        by_term = np.argsort(chunk.columns, kind="stable")
        columns = chunk.columns[by_term]
        terms, begins, counts = np.unique(columns, return_index=True, return_counts=True)
        slots = next_slots[columns] + np.arange(len(columns)) - np.repeat(begins, counts)
        numbers[slots] = doc_numbers[by_term]
        scores[slots] = chunk.values[by_term]
        next_slots[terms] += counts
        first += len(chunk)


def _new_array(path: Path, dtype: str, size: int) -> np.ndarray:
    if size == 0:  # an empty file cannot be mapped
        np.save(path, np.empty(0, dtype))
        return np.empty(0, dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=(size,))


def _parameters(count: int, value_dtype: str) -> dict[str, object]:
    """Return the parameters that bm25s needs to load the scores; those of BM25 are not used."""
    return {
        "method": "lucene",
        "dtype": value_dtype,
        "int_dtype": "int32",
        "num_docs": count,
        "backend": "numpy",
    }
