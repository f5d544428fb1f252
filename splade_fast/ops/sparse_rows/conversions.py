"""Entries of sparse matrices in other formats: torch.sparse_csr, scipy.sparse and dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splade_fast.ops.sparse_rows.columns import column_number, number_in_name


class Entries(NamedTuple):
    """Entries of a matrix with B rows and nnz entries, row by row."""

    lengths: Tensor  # (B,), number of entries of each row
    columns: Tensor  # (nnz,)
    values: Tensor  # (nnz,)


def pad_entries(entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices (B, K), values (B, K) and lengths (B,) of SparseRows."""
    lengths, columns, values = entries.lengths.long(), entries.columns, entries.values
    width = int(lengths.max()) if len(lengths) else 0
    rows = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    starts = lengths.cumsum(0) - lengths
    slots = torch.arange(len(values), device=values.device) - starts[rows]
    shape = (len(lengths), width)
    return (
        columns.new_full(shape, -1, dtype=torch.int32).index_put((rows, slots), columns.int()),
        values.new_zeros(shape).index_put((rows, slots), values),
        lengths.int(),
    )


def entries_from_torch_csr(matrix: Tensor) -> Entries:
    """Return the entries of a `torch.sparse_csr` matrix. Raise if it is something else."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix must be a tensor, got {type(matrix).__name__}")
    if matrix.layout != torch.sparse_csr or matrix.dim() != 2:
        raise ValueError(
            "matrix must be a matrix of layout torch.sparse_csr (see Tensor.to_sparse_csr), "
            f"got {matrix.layout} {tuple(matrix.shape)}"
        )
    if not matrix.is_floating_point():
        raise TypeError(f"matrix must be floating point, got {matrix.dtype}")
    return Entries(matrix.crow_indices().diff(), matrix.col_indices(), matrix.values())


def entries_from_scipy(matrix: Any, dtype: torch.dtype | None) -> Entries:
    """Return the entries of a scipy.sparse matrix. Raise if it is something else."""
    from scipy.sparse import csr_array, issparse

    if not issparse(matrix):
        raise TypeError(f"matrix must be of scipy.sparse, got {type(matrix).__name__}")
    if matrix.ndim != 2:
        raise ValueError(f"matrix must have two dimensions, got shape {matrix.shape}")
    csr = csr_array(matrix, copy=True)
    csr.sum_duplicates()  # also sorts the columns
    values = torch.from_numpy(csr.data).to(dtype)
    if not values.is_floating_point():
        name = "matrix" if dtype is None else "dtype"
        condition = " without dtype" if dtype is None else ""
        raise TypeError(f"{name} must be floating point{condition}, got {values.dtype}")
    return Entries(torch.from_numpy(csr.indptr).diff(), torch.from_numpy(csr.indices), values)


def entries_from_dicts(
    dicts: Iterable[Mapping[Any, float]],
    num_cols: int,
    token_to_id: Mapping[Any, int] | None,
    dtype: torch.dtype,
) -> Entries:
    """Return the entries of dicts {column: value} or {token: value}, sorted by column."""
    if isinstance(dicts, Mapping):
        raise TypeError(f"dicts must be a list of dicts, got one {type(dicts).__name__}")
    lengths: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for row, weights in enumerate(dicts):
        by_column = _weights_by_column(row, weights, num_cols, token_to_id)
        lengths.append(len(by_column))
        for column in sorted(by_column):
            columns.append(column)
            values.append(by_column[column])
    return Entries(
        torch.tensor(lengths, dtype=torch.int64),
        torch.tensor(columns, dtype=torch.int64),
        torch.tensor(values, dtype=dtype),
    )


def _weights_by_column(
    row: int, weights: Mapping[Any, float], num_cols: int, token_to_id: Mapping[Any, int] | None
) -> dict[int, float]:
    """Return {column: value} for a row. Raise for a bad or repeated column or no number."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"dicts[{row}] must be a dict, got {type(weights).__name__}")
    by_column: dict[int, float] = {}
    for name, value in weights.items():
        key = name if token_to_id is None else token_to_id.get(name, number_in_name(name))
        if key is None:
            raise ValueError(f"dicts[{row}] must name tokens of token_to_id, got {name!r}")
        column = column_number(key)
        if column is None or not 0 <= column < num_cols:
            raise ValueError(
                f"dicts[{row}] must have columns from 0 to {num_cols - 1}, got {key!r}"
            )
        if column in by_column:
            raise ValueError(f"dicts[{row}] must have one value a column, got two for {column}")
        if not _is_number(value):
            got = type(value).__name__
            raise TypeError(f"dicts[{row}] must have numbers as values, got {got} for {name!r}")
        by_column[column] = value
    return by_column


def _is_number(value: Any) -> bool:
    """Return whether a value is a number of Python or NumPy, or a tensor of one."""
    return isinstance(value, float | Real) or (isinstance(value, Tensor) and value.dim() == 0)
