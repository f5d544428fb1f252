"""SparseRows: a batch of sparse vectors, their conversions and files."""

from splade_fast.ops.sparse_rows.sparse_rows import SparseRows

__all__ = ["SparseRows"]
