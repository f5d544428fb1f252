"""Handlers that compute the loss of a step and then update the caches."""

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

# Caches of several ranks are copies of one cache, parts of one, or separate for each rank.
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
        """Compute the loss over the caches, then update them.

        Args:
            new_items: new items by name of a cache, (N, ...) for each of its features.
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
                name: _Rows.from_step(caches[name], name, items, result)
                for name, items in new_items.items()
            }
        for name, rows in updates.items():
            rows = rows if ranks is None else rows.gather(ranks)
            rows.write(self.cache_managers[name], caches[name])
        return result

    def _new_items(
        self, name: str, embeddings: Value, argument: str, features: Features
    ) -> dict[str, Value]:
        """Return the features that a cache stores of new items.

        Args:
            name: name of the cache.
            embeddings: embeddings (N, D) of the items.
            argument: name of the argument that holds the other features, for error messages.
            features: other features by name, (N, ...).
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
        cache_manager: manager that creates and updates the cache.
        cache_loss: a `CacheClassificationLoss`, or a callable with the same signature.
        embedding_key: name of the feature that holds the embeddings.
        data_keys: names of the features that the document network takes.
        use_cross_replica: whether all ranks keep replicas of one cache. Every rank then adds and
            refreshes the items of all ranks, in the order of the ranks. Batches may differ in size.
        process_group: group of the ranks with replicas; None: all ranks.
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
            item_network: function from features by name, (B * m, ...), to embeddings (B * m, D).
            query_embeddings: queries (B, D).
            pos_item_embeddings: positive of each query, (B, D).
            features: features of the positives by name, (B, ...), one for each of the data keys.
            return_topk: number of documents with the highest scores whose features to return.
            hard_negatives: further candidates of every query, (N, D). They are not cached.
            hard_features: features of the hard negatives by name, (N, ...); required by losses with
                `exclude`.

        Returns:
            Results of the loss.

        Raises:
            TypeError, ValueError, KeyError: the arguments do not fit each other or the cache. The
                cache has not changed then.
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
        """Run `step` with the signature of the published packages.

        Args:
            writer: (SummaryWriter, global step). The scalars `cache/interpretable_prediction_loss`
                and `cache/staleness` are written; None: nothing is written.

        See `step` for the other arguments.

        Returns:
            The training loss, or (training loss, list of dicts of features) with return_topk.
        """
        result = self.step(
            item_network, query_embeddings, pos_item_embeddings, features, return_topk
        )
        return _write_and_unpack(result, writer, return_topk)


class MultiCacheLossHandler(_Handler):
    """Several caches that form one collection, e.g. one cache for each source of documents.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> specs = {"embedding": nc.FixedLenFeature([8], torch.float32)}
        >>> managers = {"web": nc.CacheManager(specs, 100), "books": nc.CacheManager(specs, 20)}
        >>> loss = nc.CacheClassificationLoss("embedding", ())
        >>> handler = nc.MultiCacheLossHandler(managers, loss, "embedding", ())
        >>> {name: cache.size for name, cache in handler.cache.items()}
        {'web': 100, 'books': 20}

    Args:
        cache_managers: managers by the names of their caches.

    See `CacheLossHandler` for the other arguments.
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
            new_item_embeddings: embeddings (N, D) by name of a cache.
            new_item_features: features by name of a cache, (N, ...) for each of the data keys.
            features: features of the positives by name, (B, ...); required by losses with
                `exclude`.

        See `CacheLossHandler.step` for the other arguments.

        Returns:
            Results of the loss.
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
        """Run `step` with the signature of the published packages.

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
    """Rows that a step writes to the tables of a cache."""

    new: Tables  # (N, ...)
    new_mask: Tensor | None  # (N,) bool; None: all rows are added
    refreshed: Tables  # (M, ...)
    refreshed_keys: tuple[str, ...]  # features of the tables in `refreshed`
    refreshed_mask: Tensor  # (M,) bool
    slots: Tensor  # (M,) int64

    @classmethod
    def from_step(
        cls, cache: NegativeCache, name: str, items: Features, result: CacheLossReturn
    ) -> _Rows:
        """Cast, pad and prune new and refreshed items to rows of the cache's tables.

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

    def gather(self, ranks: Ranks) -> _Rows:
        """Gather the rows of all ranks, in the order of the ranks; the masks are False for padding.

        Raises:
            RuntimeError: the ranks refresh different features.
        """
        new_mask = self.slots.new_ones(len(next(iter(self.new.values()))), dtype=torch.bool)
        mine = [len(new_mask), len(self.slots), len(self.refreshed)]
        (sizes,) = ranks.all_gather(torch.tensor(mine))
        if not bool((sizes[:, 2] == len(self.refreshed)).all()):
            raise RuntimeError(
                "all ranks must refresh the same features, got numbers of tables "
                f"{sizes[:, 2].tolist()}"
            )
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
            new_items=cache.data.join_rows(self.new, *cache.data),
            new_items_mask=self.new_mask,
            updated_item_data=cache.data.join_rows(self.refreshed, *self.refreshed_keys),
            updated_item_indices=self.slots,
            updated_item_mask=self.refreshed_mask,
        )


def _gather_rows(ranks: Ranks, tables: Sequence[Tensor], count: int) -> list[Tensor]:
    """Gather (ranks * count, ...) of each table; zeros pad the rows of each rank to `count`."""
    gathered = ranks.all_gather(*(pad_rows(table, count) for table in tables))
    return [table.flatten(0, 1) for table in gathered]
