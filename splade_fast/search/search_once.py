"""Search of documents that are searched once: by a scan, or by an index where building it pays."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from splade_fast import _library
from splade_fast.ops.score import sparse_search
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.sparse_index.sparse_index import SparseIndex, can_index

# Function of queries, documents and k that returns what `sparse_search` returns.
Search = Callable[[SparseRows, SparseRows, int], tuple[Tensor, Tensor]]

# `study search_index` measures both numbers, see docs/search.md.
_MIN_QUERIES = 8000  # as many queries take the time of a build longer by a scan
_MIN_DOCUMENTS = 100_000  # fewer are scanned nearly as fast as an index finds the best of them


def search_once(queries: SparseRows, documents: SparseRows, k: int) -> tuple[Tensor, Tensor]:
    """Return what `sparse_search` returns, by an index where building it takes less time.

    Args:
        queries: (Q, V).
        documents: (N, V).
        k: number of documents for each query.
    """
    if (
        pays_to_build(len(queries), len(documents))
        and _library.is_cpu_library_loaded()
        and can_index(queries)
        and can_index(documents)
    ):
        return SparseIndex.build(documents, show_progress=False).search(queries, k)
    return sparse_search(queries, documents, k)


def pays_to_build(num_queries: int, num_documents: int) -> bool:
    """Return whether building an index and searching it takes less time than a scan."""
    return num_queries >= _MIN_QUERIES and num_documents >= _MIN_DOCUMENTS
