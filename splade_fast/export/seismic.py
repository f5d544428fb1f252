"""JSON lines for Seismic (the package pyseismic-lsr)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from splade_fast.export._documents import DocumentId, check_arguments, documents
from splade_fast.export._json_lines import (
    number_format,
    templates,
    token_names,
    write_texts_and_vectors,
)
from splade_fast.ops.sparse_rows import SparseRows


def write_seismic(
    rows: SparseRows,
    path: str | os.PathLike[str],
    ids: Sequence[DocumentId] | None = None,
    *,
    id_to_token: Sequence[str] | Mapping[int, str] | None = None,
    texts: Iterable[str] | None = None,
    empty: str = "keep",
    show_progress: bool = True,
) -> int:
    """Lines {"id", "content", "vector": {token: weight}} for `SeismicIndex.build`.

    Seismic (Bruch et al., SIGIR 2024) keeps weights in 16 bits. The strings of its queries hold
    at most 30 characters.

    Args:
        rows: (N, V), weights above 0.
        path: a folder to write, with `documents.jsonl` in it; must not exist.
        ids: of the documents, unique; the rows' numbers without.
        id_to_token: names of the columns; their numbers without.
        texts: one for each row, stored as `content`; not searched.
        empty: "keep", "skip" or "error" for documents without entries. Seismic takes them, and
            never finds them.
        show_progress: draw a progress bar.

    Returns:
        How many documents were written.

    Raises:
        FileExistsError: path exists.
        TypeError, ValueError: an argument does not fit, or a weight is not finite and above 0.
    """
    check_arguments(rows, ids, empty, texts, "texts")
    fields = templates(token_names(id_to_token, rows.num_cols), number_format(rows))
    chunks = documents(
        rows,
        ids,
        empty,
        extras=texts,
        extras_name="texts",
        positive=True,
        show_progress=show_progress,
    )
    return write_texts_and_vectors(path, chunks, fields, "content")
