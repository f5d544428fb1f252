"""A streaming cache of negatives for training retrieval models.

Lindgren, Reddi, Guo, Kumar: Efficient Training of Retrieval Models using Negative Cache, NeurIPS
2021. Modules and names are those of the published packages. Code written for those packages runs
after a change of the import prefix.
"""

from splade_fast.negative_cache.checkpoint import load_sharded, save_sharded
from splade_fast.negative_cache.features import FixedLenFeature, SparseFeature
from splade_fast.negative_cache.filter_fns import IsInCacheFilterFn
from splade_fast.negative_cache.handlers import CacheLossHandler, MultiCacheLossHandler
from splade_fast.negative_cache.losses import (
    CacheClassificationLoss,
    CacheLossReturn,
    DistributedCacheClassificationLoss,
)
from splade_fast.negative_cache.negative_cache import CacheManager, NegativeCache
from splade_fast.negative_cache.retrieval_fns import GumbelMaxRetrievalFn, MaxScoreRetrievalFn
from splade_fast.negative_cache.transforms import Scale

__all__ = [
    "CacheClassificationLoss",
    "CacheLossHandler",
    "CacheLossReturn",
    "CacheManager",
    "DistributedCacheClassificationLoss",
    "FixedLenFeature",
    "GumbelMaxRetrievalFn",
    "IsInCacheFilterFn",
    "MaxScoreRetrievalFn",
    "MultiCacheLossHandler",
    "NegativeCache",
    "Scale",
    "SparseFeature",
    "load_sharded",
    "save_sharded",
]
