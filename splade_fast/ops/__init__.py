"""The public ops. Each module has the function, fake, autograd and autocast of one op."""

from splade_fast.ops.gather import gather_rows, scatter_rows_
from splade_fast.ops.head import splade_head, splade_head_topk
from splade_fast.ops.pool import splade_pool
from splade_fast.ops.prune import prune_topk
from splade_fast.ops.rng import Philox
from splade_fast.ops.sample import NegativeSamples, gumbel_max, sample_negatives
from splade_fast.ops.score import sparse_scores, sparse_search
from splade_fast.ops.sparse_rows import SparseRows

__all__ = [
    "NegativeSamples",
    "Philox",
    "SparseRows",
    "gather_rows",
    "gumbel_max",
    "prune_topk",
    "sample_negatives",
    "scatter_rows_",
    "sparse_scores",
    "sparse_search",
    "splade_head",
    "splade_head_topk",
    "splade_pool",
]
