"""Plain PyTorch versions of every op: slow, readable, the yardstick of tests and benchmarks."""

from splade_fast.reference.head import splade_head
from splade_fast.reference.pool import splade_pool
from splade_fast.reference.prune import dense_rows, prune_rows, prune_topk

__all__ = ["dense_rows", "prune_rows", "prune_topk", "splade_head", "splade_pool"]
