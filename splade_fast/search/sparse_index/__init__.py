"""SparseIndex: exact search on the CPU that does not read every document."""

from splade_fast.search.sparse_index.sharded_index import ShardedIndex
from splade_fast.search.sparse_index.sparse_index import SparseIndex

__all__ = ["ShardedIndex", "SparseIndex"]
