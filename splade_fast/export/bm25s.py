"""An index folder of bm25s, with learned weights for BM25's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from splade_fast._atomic_files import new_folder
from splade_fast.export._documents import DocumentId, Documents, check_arguments, documents
from splade_fast.export._json_lines import token_names
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
    """A folder for `bm25s.BM25.load`: its matrix of scores by term, with the weights for scores.

    bm25s adds up the scores of a query's tokens, as often as each occurs. So it answers queries
    that are a bag of words (`BagOfWordsQueryEncoder` with weights of 1), not weighted ones.

    Args:
        rows: (N, V); 16-bit values become float32.
        path: a folder to write; must not exist. `ids.json` in it lists the documents' ids,
            to which bm25s's numbers point.
        ids: of the documents; the rows' numbers without.
        id_to_token: names of the columns; their numbers without.
        empty: "keep", "skip" or "error" for documents without entries. bm25s takes them.
        show_progress: draw a progress bar; the rows are read twice.

    Returns:
        How many documents were written.

    Raises:
        FileExistsError: path exists.
        TypeError, ValueError: an argument does not fit, or a weight is not finite.
    """
    check_arguments(rows, ids, empty)
    names = token_names(id_to_token, rows.num_cols)

    def chunks(description: str) -> Iterator[Documents]:
        return documents(rows, ids, empty, show_progress=show_progress, description=description)

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
    """Documents and weights of each term, through memory maps: they may be larger than memory."""
    total = int(starts[-1])
    numbers = _new_array(folder / "indices.csc.index.npy", "int32", total)
    scores = _new_array(folder / "data.csc.index.npy", value_dtype, total)
    free = starts[:-1].copy()  # where each term's next document goes
    first = 0
    for chunk in chunks:
        owners = np.repeat(np.arange(first, first + len(chunk)), chunk.lengths)
        by_term = np.argsort(chunk.columns, kind="stable")
        columns = chunk.columns[by_term]
        terms, begins, counts = np.unique(columns, return_index=True, return_counts=True)
        slots = free[columns] + np.arange(len(columns)) - np.repeat(begins, counts)
        numbers[slots] = owners[by_term]
        scores[slots] = chunk.values[by_term]
        free[terms] += counts
        first += len(chunk)


def _new_array(path: Path, dtype: str, size: int) -> np.ndarray:
    if size == 0:  # which cannot be mapped
        np.save(path, np.empty(0, dtype))
        return np.empty(0, dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=(size,))


def _parameters(count: int, value_dtype: str) -> dict[str, object]:
    """Those of BM25 are not used: the scores are computed already."""
    return {
        "method": "lucene",
        "dtype": value_dtype,
        "int_dtype": "int32",
        "num_docs": count,
        "backend": "numpy",
    }
