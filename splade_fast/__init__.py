"""splade_fast: exact, fused kernels for learned sparse retrieval (SPLADE) in PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splade_fast import losses, reference
from splade_fast._library import build_info
from splade_fast._version import __version__
from splade_fast.modules import SpladeHead, SpladePool
from splade_fast.ops import (
    NegativeSamples,
    gather_rows,
    gumbel_max,
    prune_topk,
    sample_negatives,
    scatter_rows_,
    sparse_scores,
    sparse_search,
    splade_head,
    splade_head_topk,
    splade_pool,
)
from splade_fast.ops.rng import Philox
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.regularizers import (
    LinearSchedule,
    QuadraticSchedule,
    active_dims,
    anti_zero_loss,
    df_flops_loss,
    document_frequencies,
    flops_loss,
    l1_loss,
)

if TYPE_CHECKING:
    from splade_fast import export, negative_cache, recipe
    from splade_fast.encoders.bag_of_words import BagOfWordsQueryEncoder
    from splade_fast.encoders.splade import SpladeEncoder
    from splade_fast.encoders.term_weights import TermWeightEncoder
    from splade_fast.encoders.whole_weights import whole_weights
    from splade_fast.integrations.transformers import accelerate, restore
    from splade_fast.search.encode_corpus import encode_corpus
    from splade_fast.search.sparse_index import ShardedIndex, SparseIndex

# Most of these need transformers, whose import takes seconds: they are imported when first used.
_LAZY = {
    "BagOfWordsQueryEncoder": "encoders.bag_of_words",
    "ShardedIndex": "search.sparse_index",
    "SparseIndex": "search.sparse_index",
    "SpladeEncoder": "encoders.splade",
    "TermWeightEncoder": "encoders.term_weights",
    "accelerate": "integrations.transformers",
    "encode_corpus": "search.encode_corpus",
    "restore": "integrations.transformers",
    "whole_weights": "encoders.whole_weights",
}

__all__ = [
    "BagOfWordsQueryEncoder",
    "LinearSchedule",
    "NegativeSamples",
    "Philox",
    "QuadraticSchedule",
    "ShardedIndex",
    "SparseIndex",
    "SparseRows",
    "SpladeEncoder",
    "SpladeHead",
    "SpladePool",
    "TermWeightEncoder",
    "__version__",
    "accelerate",
    "active_dims",
    "anti_zero_loss",
    "build_info",
    "df_flops_loss",
    "document_frequencies",
    "encode_corpus",
    "export",
    "flops_loss",
    "gather_rows",
    "gumbel_max",
    "l1_loss",
    "losses",
    "negative_cache",
    "prune_topk",
    "recipe",
    "reference",
    "restore",
    "sample_negatives",
    "scatter_rows_",
    "sparse_scores",
    "sparse_search",
    "splade_head",
    "splade_head_topk",
    "splade_pool",
    "whole_weights",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"splade_fast.{_LAZY[name]}"), name)
    if name in ("export", "negative_cache", "recipe"):
        return import_module(f"splade_fast.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
