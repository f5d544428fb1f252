"""splade_fast: exact, fused kernels for learned sparse retrieval (SPLADE) in PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splade_fast import reference
from splade_fast._library import build_info
from splade_fast._version import __version__
from splade_fast.ops import (
    prune_topk,
    sparse_scores,
    sparse_search,
    splade_head,
    splade_head_topk,
    splade_pool,
)
from splade_fast.sparse_rows import SparseRows

if TYPE_CHECKING:
    from splade_fast.bag_of_words import BagOfWordsQueryEncoder
    from splade_fast.model import SpladeEncoder
    from splade_fast.term_weights import TermWeightEncoder

# They bring transformers along, which users of the ops alone should not wait for.
_ENCODERS = {
    "BagOfWordsQueryEncoder": "bag_of_words",
    "SpladeEncoder": "model",
    "TermWeightEncoder": "term_weights",
}

__all__ = [
    "BagOfWordsQueryEncoder",
    "SparseRows",
    "SpladeEncoder",
    "TermWeightEncoder",
    "__version__",
    "build_info",
    "prune_topk",
    "reference",
    "sparse_scores",
    "sparse_search",
    "splade_head",
    "splade_head_topk",
    "splade_pool",
]


def __getattr__(name: str) -> Any:
    if name in _ENCODERS:
        return getattr(import_module(f"splade_fast.{_ENCODERS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
