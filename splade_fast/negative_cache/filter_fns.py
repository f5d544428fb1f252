"""Functions that say which new items to add to a cache."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping

from torch import Tensor

from splade_fast.negative_cache.features import Value
from splade_fast.negative_cache.matching import matches
from splade_fast.negative_cache.negative_cache import NegativeCache


class CacheFilterFn(metaclass=abc.ABCMeta):
    """new_items_mask of `CacheManager.update_cache`, from the cache and the items."""

    @abc.abstractmethod
    def __call__(self, cache: NegativeCache, new_items: Mapping[str, Value]) -> Tensor:
        """(N,) bool: which items to add."""


class IsInCacheFilterFn(CacheFilterFn):
    """Adds the items that no slot of the cache equals in all of some features, bit for bit.

    Args:
        keys: the features compared.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = tuple(keys)

    def __call__(self, cache: NegativeCache, new_items: Mapping[str, Value]) -> Tensor:
        items = cache.data.rows(
            "new_items", {key: new_items[key] for key in self.keys}, cache.device
        )
        found = matches(items, cache.data.tables(self.keys))
        return ~(found & cache.valid).any(1)
