"""The public ops. Each module holds all of one op's Python: function, fake, autograd, autocast."""

from splade_fast.ops.gather import gather_rows, scatter_rows_
from splade_fast.ops.head import splade_head
from splade_fast.ops.head_topk import splade_head_topk
from splade_fast.ops.pool import splade_pool
from splade_fast.ops.prune import prune_topk
from splade_fast.ops.score import sparse_scores, sparse_search

__all__ = [
    "gather_rows",
    "prune_topk",
    "scatter_rows_",
    "sparse_scores",
    "sparse_search",
    "splade_head",
    "splade_head_topk",
    "splade_pool",
]
