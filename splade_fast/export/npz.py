"""Writer of CSR matrices for scipy.sparse.load_npz."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from splade_fast._atomic_files import new_folder
from splade_fast.export._documents import Documents, check_arguments, iterate_documents
from splade_fast.export._ids import DocumentId
from splade_fast.ops.sparse_rows import SparseRows


def write_npz(
    rows: SparseRows,
    path: str | os.PathLike[str],
    ids: Sequence[DocumentId] | None = None,
    *,
    compressed: bool = False,
    empty: str = "keep",
    show_progress: bool = True,
) -> int:
    """Write `vectors.npz`, a `scipy.sparse.csr_array` for `load_npz`, and `ids.json`, a list.

    The function holds a part of the rows in memory, while `rows.to_scipy()` holds all.

    Args:
        rows: (N, V); 16-bit values become float32.
        path: folder to write; must not exist.
        ids: ids of the documents, unique; the row numbers by default.
        compressed: compress the arrays.
        empty: "keep", "skip" or "error" for rows without entries.
        show_progress: draw two progress bars, since the rows are read twice.

    Returns:
        Number of rows written.

    Raises:
        FileExistsError: `path` exists.
        TypeError: rows are not SparseRows.
        ValueError: an argument is invalid, or a weight is not finite.

    Example::

        >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.5], [2.5, 0.0]]))
        >>> sf.export.write_npz(rows, "npz", ["d1", "d2"])
        2
    """
    ids = check_arguments(rows, ids, empty)

    def chunks(description: str) -> Iterator[Documents]:
        return iterate_documents(
            rows, ids, empty, show_progress=show_progress, description=description
        )

    lengths = rows.lengths.cpu().numpy()
    if empty == "skip":
        lengths = lengths[lengths > 0]
    starts = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
    total = int(starts[-1])
    is_small = max(total, *rows.shape) <= np.iinfo(np.int32).max
    index_dtype = np.dtype(np.int32 if is_small else np.int64)
    value_dtype = np.dtype(np.float64 if rows.values.element_size() == 8 else np.float32)
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with new_folder(path) as folder:
        with zipfile.ZipFile(folder / "vectors.npz", "w", method) as archive:
            kept: list[DocumentId] = []
            arrays = _collect_ids(chunks("columns"), kept)
            _write_array(archive, "indices", index_dtype, (total,), arrays)
            data = (chunk.values for chunk in chunks("values"))
            _write_array(archive, "data", value_dtype, (total,), data)
            for name, array in {
                "indptr": starts.astype(index_dtype),
                "format": np.array(b"csr"),
                "shape": np.array([len(lengths), rows.num_cols]),
                "_is_array": np.array(True),
            }.items():
                _write_array(archive, name, array.dtype, array.shape, [array])
        (folder / "ids.json").write_text(json.dumps(kept), encoding="utf-8")
    return len(lengths)


def _collect_ids(chunks: Iterable[Documents], kept: list[DocumentId]) -> Iterator[np.ndarray]:
    """Yield the columns of the chunks and append their ids to `kept`."""
    for chunk in chunks:
        kept += chunk.ids
        yield chunk.columns


def _write_array(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    parts: Iterable[np.ndarray],
) -> None:
    """Write an array into an .npz file part by part."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.astype(dtype, copy=False).tobytes())
