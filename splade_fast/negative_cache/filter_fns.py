"""Functions that choose the new items to add to a cache."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping

from torch import Tensor

from splade_fast.negative_cache.features import Value
from splade_fast.negative_cache.matching import matches
from splade_fast.negative_cache.negative_cache import NegativeCache


class CacheFilterFn(metaclass=abc.ABCMeta):
    """Computes `new_items_mask` of `CacheManager.update_cache` from the cache and the items."""

    @abc.abstractmethod
    def __call__(self, cache: NegativeCache, new_items: Mapping[str, Value]) -> Tensor:
        """Return (N,) bool, True for the items to add."""


class IsInCacheFilterFn(CacheFilterFn):
    """Adds the items that are not in the cache.

    An item equals a stored one if all features in `keys` are equal bit for bit.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> cache = nc.NegativeCache({"id": torch.tensor([7, 8])}, age=torch.zeros(2))
        >>> nc.IsInCacheFilterFn(["id"])(cache, {"id": torch.tensor([8, 9])})
        tensor([False,  True])

    Args:
        keys: names of the features to compare.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = tuple(keys)

    def __call__(self, cache: NegativeCache, new_items: Mapping[str, Value]) -> Tensor:
        items = cache.data.rows(
            "new_items", {key: new_items[key] for key in self.keys}, cache.device
        )
        match_mask = matches(items, cache.data.tables(self.keys))
        return ~(match_mask & cache.valid).any(1)
