"""Plain PyTorch versions of every op: slow, readable, the baseline of tests and benchmarks."""

from splade_fast.reference.gather import gather_rows, scatter_rows_, update_cache_
from splade_fast.reference.head import splade_head
from splade_fast.reference.pool import splade_pool
from splade_fast.reference.prune import dense_rows, prune_rows, prune_topk
from splade_fast.reference.sample import gumbel_max, sample_kept, sample_negatives

__all__ = [
    "dense_rows",
    "gather_rows",
    "gumbel_max",
    "prune_rows",
    "prune_topk",
    "sample_kept",
    "sample_negatives",
    "scatter_rows_",
    "splade_head",
    "splade_pool",
    "update_cache_",
]
