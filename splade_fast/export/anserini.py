"""Writer of JSON vectors for Anserini, which indexes them with Lucene."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from splade_fast.export._documents import (
    POSITIVE,
    check_arguments,
    iterate_documents,
)
from splade_fast.export._ids import DocumentId
from splade_fast.export._json_lines import (
    make_templates,
    name_columns,
    write_texts_and_vectors,
)
from splade_fast.ops.sparse_rows import SparseRows

# Lucene indexes an id as one term.
ID_RULES: dict[str, Any] = {"max_bytes": 32766, "allows_white_space": False}


def write_anserini(
    rows: SparseRows,
    path: str | os.PathLike[str],
    ids: Sequence[DocumentId] | None = None,
    *,
    id_to_token: Sequence[str] | Mapping[int, str] | None = None,
    texts: Iterable[str] | None = None,
    scale: float = 100.0,
    empty: str = "keep",
    show_progress: bool = True,
) -> int:
    """Write vector[token] = round(scale · weight) for Anserini's JsonVectorCollection.

    Anserini's impacts are integers: weights are multiplied in float64 and rounded to the nearest
    integer, halves to even, and entries that become 0 are left out. Index the folder with
    `-impact -pretokenized`: Anserini then splits at white space alone, so a token that contains
    white space is named `[#column]`.

    Args:
        rows: (N, V), weights above 0.
        path: folder to write, with a file `documents.jsonl`; must not exist.
        ids: ids of the documents, unique, without white space, which ends an id in the TREC runs
            that Anserini writes, and of at most 32,766 bytes, as Lucene's terms; the row numbers
            by default.
        id_to_token: names of the columns; the column numbers by default.
        texts: a text for each row, stored as `contents` but not searched.
        scale: factor of the weights.
        empty: "keep", "skip" or "error" for documents without entries after rounding. Anserini
            itself counts them and leaves them out.
        show_progress: draw a progress bar.

    Returns:
        Number of documents written.

    Raises:
        FileExistsError: `path` exists.
        TypeError: rows are not SparseRows.
        ValueError: an argument is invalid, a weight is not finite and above 0, or the impacts of a
            document add up to 2³¹ or more.

    Example::

        >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5], [2.5, 0.0]]))
        >>> sf.export.write_anserini(rows, "anserini", ["d1", "d2"], id_to_token=["fox", "dog"])
        2
        >>> open("anserini/documents.jsonl").readline()
        '{"id":"d1","contents":"","vector":{"dog":150}}\\n'
    """
    ids = check_arguments(rows, ids, empty, texts, "texts", **ID_RULES)
    scale = check_scale(scale)
    names = name_columns(id_to_token, rows.num_cols, lambda name: len(name.split()) == 1)
    fields = make_templates(names, "%d")
    chunks = iterate_documents(
        rows,
        ids,
        empty,
        extras=texts,
        extras_name="texts",
        scale=scale,
        weights=POSITIVE,
        show_progress=show_progress,
    )
    return write_texts_and_vectors(path, chunks, fields, "contents")


def check_scale(scale: float) -> float:
    """Return the factor of the weights. Raise an error if it is not finite and above 0."""
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and above 0, got {scale}")
    return float(scale)
