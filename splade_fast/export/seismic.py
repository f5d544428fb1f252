"""Writer of JSON lines for Seismic (the package pyseismic-lsr)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from splade_fast.export._documents import (
    POSITIVE_FLOAT16,
    check_arguments,
    iterate_documents,
)
from splade_fast.export._ids import DocumentId
from splade_fast.export._json_lines import (
    make_templates,
    name_columns,
    number_format,
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
    """Write lines {"id", "content", "vector": {token: weight}} for `SeismicIndex.build`.

    Seismic (Bruch et al., SIGIR 2024) keeps weights in 16 bits. Tokens of its queries have at most
    30 characters.

    Args:
        rows: (N, V), weights above 0 and at most 65,504.
        path: folder to write, with a file `documents.jsonl`; must not exist.
        ids: ids of the documents, unique; the row numbers by default.
        id_to_token: names of the columns; the column numbers by default.
        texts: a text for each row, stored as `content` but not searched.
        empty: "keep", "skip" or "error" for documents without entries. Seismic accepts them, but
            never returns them.
        show_progress: draw a progress bar.

    Returns:
        Number of documents written.

    Raises:
        FileExistsError: `path` exists.
        TypeError: rows are not SparseRows.
        ValueError: an argument is invalid, or a weight is out of this range.

    Example::

        >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5], [2.5, 0.0]]))
        >>> sf.export.write_seismic(rows, "seismic", ["d1", "d2"], id_to_token=["fox", "dog"])
        2
        >>> open("seismic/documents.jsonl").readline()
        '{"id":"d1","content":"","vector":{"dog":1.5}}\\n'
    """
    ids = check_arguments(rows, ids, empty, texts, "texts")
    fields = make_templates(name_columns(id_to_token, rows.num_cols), number_format(rows))
    chunks = iterate_documents(
        rows,
        ids,
        empty,
        extras=texts,
        extras_name="texts",
        weights=POSITIVE_FLOAT16,
        show_progress=show_progress,
    )
    return write_texts_and_vectors(path, chunks, fields, "content")
