"""Handlers: compute the loss of a step, then update the caches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from splade_fast._distributed import Ranks, pad_rows
from splade_fast.negative_cache.features import Tables, Value, select
from splade_fast.negative_cache.losses import AbstractCacheClassificationLoss, CacheLossReturn
from splade_fast.negative_cache.negative_cache import CacheManager, NegativeCache

Features = Mapping[str, Value]

# Caches of several ranks: copies of one, parts of one, or a separate one for each rank.
SHARINGS = ("replicas", "shards", "own")

_ONLY = "cache"  # name of the cache of a CacheLossHandler


class _Handler(nn.Module):
    """Named caches, and a loss over all of them."""

    def __init__(
        self,
        cache_managers: Mapping[str, CacheManager],
        cache_loss: Any,
        embedding_key: str,
        data_keys: Iterable[str],
        use_cross_replica: bool,
        process_group: Any,
    ) -> None:
        super().__init__()
        self.cache_managers = dict(cache_managers)
        self.cache_loss = cache_loss
        self.embedding_key = embedding_key
        self.data_keys = tuple(data_keys)
        self.use_cross_replica = use_cross_replica
        self.process_group = process_group
        self.caches = nn.ModuleDict(
            {name: manager.init_cache() for name, manager in self.cache_managers.items()}
        )

    def _step(
        self,
        item_network: Any,
        query_embeddings: Value,
        pos_item_embeddings: Value,
        new_items: Mapping[str, Features],
        pos_features: Features | None,
        return_topk: int,
        hard_negatives: Value | None = None,
        hard_features: Features | None = None,
    ) -> CacheLossReturn:
        """Return the loss of the caches as they are, then update them.

        Args:
            new_items: by name of a cache, (N, ...) for each of its features.
        """
        self.to(query_embeddings.device)
        caches: dict[str, Any] = dict(self.caches.items())
        options: dict[str, Any] = {"return_topk": return_topk} if return_topk else {}
        if hard_negatives is not None:
            options |= {"hard_negatives": hard_negatives, "hard_features": hard_features}
        if isinstance(self.cache_loss, AbstractCacheClassificationLoss):
            options["pos_features"] = pos_features
        ranks = Ranks(self.process_group) if self.use_cross_replica else None
        with nullcontext() if ranks is None else ranks.fail_together("the step of the cache"):
            result: CacheLossReturn = self.cache_loss(
                doc_network=item_network,
                query_embeddings=query_embeddings,
                pos_doc_embeddings=pos_item_embeddings,
                cache=caches,
                **options,
            )
            updates = {
                name: _Rows.of_step(caches[name], name, items, result)
                for name, items in new_items.items()
            }
        for name, rows in updates.items():
            rows = rows if ranks is None else rows.gathered(ranks)
            rows.write(self.cache_managers[name], caches[name])
        return result

    def _new_items(
        self, name: str, embeddings: Value, argument: str, features: Features
    ) -> dict[str, Value]:
        """Return the features that a cache stores of new items.

        Args:
            name: name of the cache.
            embeddings: (N, D).
            argument: name of the argument that holds the other features, for messages.
            features: (N, ...) by name.
        """
        specs = self.cache_managers[name].specs
        others = select(argument, features, (key for key in specs if key != self.embedding_key))
        return {key: embeddings if key == self.embedding_key else others[key] for key in specs}


class CacheLossHandler(_Handler):
    """A cache, the loss over it, and its update.

    The handler is a module: `.to()` and `state_dict()` include the cache and the generator of the
    noise. Each step moves it to the device of the queries.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> specs = {
        ...     "id": nc.FixedLenFeature([], torch.int64),
        ...     "embedding": nc.FixedLenFeature([8], torch.float32),
        ... }
        >>> keys = {"embedding_key": "embedding", "data_keys": ("id",)}
        >>> manager = nc.CacheManager(specs, cache_size=100)
        >>> handler = nc.CacheLossHandler(manager, nc.CacheClassificationLoss(**keys), **keys)
        >>> table = torch.nn.Embedding(50, 8)
        >>> network = lambda features: table(features["id"])
        >>> for ids in torch.arange(50).split(10):
        ...     result = handler.step(network, torch.rand(10, 8), table(ids), {"id": ids})
        >>> result.training_loss.requires_grad, handler.cache.valid.sum()
        (True, tensor(50))

    Args:
        cache_manager: makes and updates the cache.
        cache_loss: `CacheClassificationLoss` or any callable of that form.
        embedding_key: the feature that holds the embeddings.
        data_keys: the features that the document network takes.
        use_cross_replica: keep replicas of one cache on all ranks: every rank adds and refreshes
            the items of all ranks, in the order of the ranks. Batches may differ in size.
        process_group: the ranks of the replicas; None: all.
    """

    def __init__(
        self,
        cache_manager: CacheManager,
        cache_loss: Any,
        embedding_key: str,
        data_keys: Iterable[str],
        use_cross_replica: bool = False,
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            {_ONLY: cache_manager},
            cache_loss,
            embedding_key,
            data_keys,
            use_cross_replica,
            process_group,
        )

    @property
    def cache_manager(self) -> CacheManager:
        """Manager of the cache."""
        return self.cache_managers[_ONLY]

    @property
    def cache(self) -> NegativeCache:
        """The cache."""
        cache = self.caches[_ONLY]
        assert isinstance(cache, NegativeCache)
        return cache

    def step(
        self,
        item_network: Any,
        query_embeddings: Value,
        pos_item_embeddings: Value,
        features: Features,
        return_topk: int = 0,
        *,
        hard_negatives: Value | None = None,
        hard_features: Features | None = None,
    ) -> CacheLossReturn:
        """Compute the loss over the cache, then refresh the drawn items and add the positives.

        Args:
            item_network: maps features by name, (B * m, ...), to embeddings (B * m, D).
            query_embeddings: (B, D).
            pos_item_embeddings: (B, D), the positive of each query.
            features: (B, ...) by name, the data keys of the positives.
            return_topk: number of documents with the highest scores whose features to return.
            hard_negatives: (N, D), further candidates of every query, which are not cached.
            hard_features: (N, ...) by name, their features; needed for losses with `exclude`.

        Returns:
            All results of the loss.

        Raises:
            TypeError, ValueError, KeyError: the arguments do not fit each other or the cache, which
                is left unchanged.
        """
        return self._step(
            item_network,
            query_embeddings,
            pos_item_embeddings,
            {_ONLY: self._new_items(_ONLY, pos_item_embeddings, "features", features)},
            features,
            return_topk,
            hard_negatives,
            hard_features,
        )

    def update_cache_and_compute_loss(
        self,
        item_network: Any,
        query_embeddings: Value,
        pos_item_embeddings: Value,
        features: Features,
        writer: tuple[Any, int] | None = None,
        return_topk: int = 0,
    ) -> Any:
        """Run `step` with the signature of the known packages.

        Args:
            writer: (SummaryWriter, global step), for `cache/interpretable_prediction_loss` and
                `cache/staleness`.
            others: see `step`.

        Returns:
            The training loss; with return_topk, (loss, list of dicts of features).
        """
        result = self.step(
            item_network, query_embeddings, pos_item_embeddings, features, return_topk
        )
        return _write_and_unpack(result, writer, return_topk)


class MultiCacheLossHandler(_Handler):
    """Several caches that count as one collection, e.g. one for each source of documents.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> specs = {"embedding": nc.FixedLenFeature([8], torch.float32)}
        >>> managers = {"web": nc.CacheManager(specs, 100), "books": nc.CacheManager(specs, 20)}
        >>> loss = nc.CacheClassificationLoss("embedding", ())
        >>> handler = nc.MultiCacheLossHandler(managers, loss, "embedding", ())
        >>> {name: cache.size for name, cache in handler.cache.items()}
        {'web': 100, 'books': 20}

    Args:
        cache_managers: by name of a cache.
        others: see `CacheLossHandler`.
    """

    def __init__(
        self,
        cache_managers: Mapping[str, CacheManager],
        cache_loss: Any,
        embedding_key: str,
        data_keys: Iterable[str],
        use_cross_replica: bool = False,
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            cache_managers, cache_loss, embedding_key, data_keys, use_cross_replica, process_group
        )

    @property
    def cache(self) -> dict[str, NegativeCache]:
        """The caches by name."""
        caches: dict[str, Any] = dict(self.caches.items())
        return caches

    def step(
        self,
        item_network: Any,
        query_embeddings: Value,
        pos_item_embeddings: Value,
        new_item_embeddings: Mapping[str, Value],
        new_item_features: Mapping[str, Features],
        return_topk: int = 0,
        *,
        features: Features | None = None,
    ) -> CacheLossReturn:
        """Compute the loss over all caches, then refresh the drawn items and add new items.

        Args:
            new_item_embeddings: by name of a cache, (N, D).
            new_item_features: by name of a cache, (N, ...) for all data keys.
            features: (B, ...) by name, features of the positives; needed for losses with `exclude`.
            others: see `CacheLossHandler.step`.

        Returns:
            All results of the loss.
        """
        select("new_item_embeddings", new_item_embeddings, self.cache_managers)
        select("new_item_features", new_item_features, self.cache_managers)
        new_items = {
            name: self._new_items(
                name,
                new_item_embeddings[name],
                f"new_item_features[{name!r}]",
                new_item_features[name],
            )
            for name in self.cache_managers
        }
        return self._step(
            item_network, query_embeddings, pos_item_embeddings, new_items, features, return_topk
        )

    def update_cache_and_compute_loss(
        self,
        item_network: Any,
        query_embeddings: Value,
        pos_item_embeddings: Value,
        new_item_embeddings: Mapping[str, Value],
        new_item_features: Mapping[str, Features],
        writer: tuple[Any, int] | None = None,
        return_topk: int = 0,
        *,
        features: Features | None = None,
    ) -> Any:
        """Run `step` with the signature of the known packages.

        See `CacheLossHandler.update_cache_and_compute_loss` for `writer` and the returned values.
        """
        result = self.step(
            item_network,
            query_embeddings,
            pos_item_embeddings,
            new_item_embeddings,
            new_item_features,
            return_topk,
            features=features,
        )
        return _write_and_unpack(result, writer, return_topk)


def _write_and_unpack(
    result: CacheLossReturn, writer: tuple[Any, int] | None, return_topk: int
) -> Any:
    if writer is not None:
        summary_writer, step = writer
        for name, values in (
            ("cache/interpretable_prediction_loss", result.interpretable_loss),
            ("cache/staleness", result.staleness),
        ):
            mean = float(values.mean() if isinstance(values, Tensor) else values)
            summary_writer.add_scalar(name, mean, step)
    return (result.training_loss, result.topk_features) if return_topk else result.training_loss


class _Rows(NamedTuple):
    """Rows that a step writes to a cache, by name of a table of the cache."""

    new: Tables  # (N, ...)
    new_mask: Tensor | None  # (N,) bool; None: all are added
    refreshed: Tables  # (M, ...)
    refreshed_keys: tuple[str, ...]  # the features of these tables
    refreshed_mask: Tensor  # (M,) bool
    slots: Tensor  # (M,) int64

    @classmethod
    def of_step(
        cls, cache: NegativeCache, name: str, items: Features, result: CacheLossReturn
    ) -> _Rows:
        """Cast, pad and prune new and refreshed items as the cache stores them.

        Raises:
            TypeError, ValueError: the items do not fit the cache.
        """
        data, slots, mask = (
            None if by_cache is None else by_cache[name]
            for by_cache in (
                result.updated_item_data,
                result.updated_item_indices,
                result.updated_item_mask,
            )
        )
        data = data or {}
        slots = torch.empty(0, dtype=torch.int64) if slots is None else slots
        mask = torch.ones_like(slots, dtype=torch.bool) if mask is None else mask
        return cls(
            new=cache.data.rows("new_items", items, cache.device),
            new_mask=None,
            refreshed=cache.data.rows("updated_item_data", data, cache.device),
            refreshed_keys=tuple(data),
            refreshed_mask=mask.to(cache.device),
            slots=slots.to(cache.device),
        )

    def gathered(self, ranks: Ranks) -> _Rows:
        """Return the rows of all ranks, in the order of the ranks; masks leave out the padding.

        Raises:
            RuntimeError: the ranks refresh different features.
        """
        new_mask = self.slots.new_ones(len(next(iter(self.new.values()))), dtype=torch.bool)
        mine = [len(new_mask), len(self.slots), len(self.refreshed)]
        (sizes,) = ranks.all_gather(torch.tensor(mine))
        if not bool((sizes[:, 2] == len(self.refreshed)).all()):
            raise RuntimeError("all ranks must refresh the same features")
        most_new, most_refreshed, _ = sizes.amax(0).tolist()
        *new, new_mask = _gather_rows(ranks, [*self.new.values(), new_mask], most_new)
        *refreshed, mask, slots = _gather_rows(
            ranks, [*self.refreshed.values(), self.refreshed_mask, self.slots], most_refreshed
        )
        return _Rows(
            new=dict(zip(self.new, new, strict=True)),
            new_mask=new_mask,
            refreshed=dict(zip(self.refreshed, refreshed, strict=True)),
            refreshed_keys=self.refreshed_keys,
            refreshed_mask=mask,
            slots=slots,
        )

    @torch.no_grad()
    def write(self, manager: CacheManager, cache: NegativeCache) -> None:
        """Update the cache with these rows."""
        manager.update_cache(
            cache,
            new_items=cache.data.values_of(self.new, *cache.data),
            new_items_mask=self.new_mask,
            updated_item_data=cache.data.values_of(self.refreshed, *self.refreshed_keys),
            updated_item_indices=self.slots,
            updated_item_mask=self.refreshed_mask,
        )


def _gather_rows(ranks: Ranks, tables: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return (ranks * count, ...) for each table, where zeros fill up the rows of each rank."""
    gathered = ranks.all_gather(*(pad_rows(table, count) for table in tables))
    return [table.flatten(0, 1) for table in gathered]
