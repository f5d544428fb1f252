"""Acceleration of sentence-transformers' SparseEncoder by one line in an existing script.

    model = accelerate(SparseEncoder("…"))

The model encodes and trains with the same results and saves the same files, in less time.
"""

try:
    import sentence_transformers as _installed  # noqa: F401
except ImportError as error:
    raise ImportError(
        "splade_fast.integrations.sentence_transformers needs sentence-transformers >= 5.4; "
        "install splade_fast[sentence-transformers]"
    ) from error

from splade_fast.integrations.sentence_transformers.accelerate import accelerate, restore
from splade_fast.integrations.sentence_transformers.callback import NegativeCacheCallback
from splade_fast.integrations.sentence_transformers.negative_cache_loss import NegativeCacheLoss

__all__ = ["NegativeCacheCallback", "NegativeCacheLoss", "accelerate", "restore"]
