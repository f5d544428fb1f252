"""JSON vectors for Anserini, which indexes them with Lucene."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence

from splade_fast.export._documents import DocumentId, check_arguments, documents
from splade_fast.export._json_lines import (
    templates,
    token_names,
    write_texts_and_vectors,
)
from splade_fast.ops.sparse_rows import SparseRows


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
    """vector[token] = round(scale · weight), for Anserini's JsonVectorCollection.

    Impacts are whole numbers there: weights are multiplied in float64 and rounded to the nearest
    integer, halves to the even one, and entries that become 0 are left out. Anserini repeats a
    token as often as its impact says, separated by white space, and is told not to split further
    (`-impact -pretokenized`): a token with white space in it goes by `[#column]`.

    Args:
        rows: (N, V), weights above 0.
        path: a folder to write, with `documents.jsonl` in it; must not exist.
        ids: of the documents, unique; the rows' numbers without.
        id_to_token: names of the columns; their numbers without.
        texts: one for each row, stored as `contents`; not searched.
        scale: of the weights.
        empty: "keep", "skip" or "error" for documents without entries, after rounding. Anserini
            itself counts them and leaves them out.
        show_progress: draw a progress bar.

    Returns:
        How many documents were written.

    Raises:
        FileExistsError: path exists.
        TypeError, ValueError: an argument does not fit, or a weight is not finite and above 0.
    """
    check_arguments(rows, ids, empty, texts, "texts")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and above 0, got {scale}")
    names = token_names(id_to_token, rows.num_cols, lambda name: len(name.split()) == 1)
    fields = templates(names, "%d")
    chunks = documents(
        rows,
        ids,
        empty,
        extras=texts,
        extras_name="texts",
        scale=scale,
        positive=True,
        show_progress=show_progress,
    )
    return write_texts_and_vectors(path, chunks, fields, "contents")
