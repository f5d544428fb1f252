"""Handlers: the loss of a step, and the update of the caches that follows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from splade_fast._distributed import Ranks, pad_rows
from splade_fast.negative_cache.features import Tables, Value, chosen
from splade_fast.negative_cache.losses import AbstractCacheClassificationLoss, CacheLossReturn
from splade_fast.negative_cache.negative_cache import CacheManager, NegativeCache

Features = Mapping[str, Value]

_ONLY = "cache"


class _Handler(nn.Module):
    """Caches, a loss over them, and a step of both."""

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
        writer: tuple[Any, int] | None,
        return_topk: int,
        hard_negatives: Value | None = None,
        hard_features: Features | None = None,
    ) -> Any:
        caches = self._caches_on(query_embeddings.device)
        options: dict[str, Any] = {"return_topk": return_topk} if return_topk else {}
        if hard_negatives is not None:
            options |= {"hard_negatives": hard_negatives, "hard_features": hard_features}
        if isinstance(self.cache_loss, AbstractCacheClassificationLoss):
            options["pos_features"] = pos_features
        ranks = Ranks(self.process_group) if self.use_cross_replica else None
        with nullcontext() if ranks is None else ranks.fail_together("the loss over the cache"):
            result: CacheLossReturn = self.cache_loss(
                doc_network=item_network,
                query_embeddings=query_embeddings,
                pos_doc_embeddings=pos_item_embeddings,
                cache=caches,
                **options,
            )
        if writer is not None:
            summary_writer, step = writer
            loss, staleness = _mean(result.interpretable_loss), _mean(result.staleness)
            summary_writer.add_scalar("cache/interpretable_prediction_loss", loss, step)
            summary_writer.add_scalar("cache/staleness", staleness, step)
        for name, cache in caches.items():
            self._update(name, cache, new_items[name], result, ranks)
        return (result.training_loss, result.topk_features) if return_topk else result.training_loss

    def _caches_on(self, device: torch.device) -> dict[str, NegativeCache]:
        """The caches by name, moved to the device of the queries for good."""
        caches: dict[str, Any] = dict(self.caches.items())
        if not all(cache.is_on(device) for cache in caches.values()):
            self.to(device)
        return caches

    def _new_items(
        self, name: str, embeddings: Value, argument: str, features: Features
    ) -> dict[str, Value]:
        """What a cache stores of new items; `argument` is what the caller knows features by."""
        specs = self.cache_managers[name].specs
        others = chosen(argument, features, (key for key in specs if key != self.embedding_key))
        return {key: embeddings if key == self.embedding_key else others[key] for key in specs}

    @torch.no_grad()
    def _update(
        self,
        name: str,
        cache: NegativeCache,
        items: Features,
        result: CacheLossReturn,
        ranks: Ranks | None,
    ) -> None:
        data, indices, mask = (
            None if of_all is None else of_all[name]
            for of_all in (
                result.updated_item_data,
                result.updated_item_indices,
                result.updated_item_mask,
            )
        )
        items_mask = None
        if ranks is not None:
            items, items_mask, data, indices, mask = _of_all_ranks(
                ranks, cache, items, data, indices, mask
            )
        self.cache_managers[name].update_cache(
            cache,
            new_items=items,
            new_items_mask=items_mask,
            updated_item_data=data,
            updated_item_indices=indices,
            updated_item_mask=mask,
        )


class CacheLossHandler(_Handler):
    """A cache, the loss over it, and its update.

    A module: `.to()` and `state_dict()` take the cache and the generator of the noise along. On the
    first call it moves to the device of the queries.

    Args:
        cache_manager: makes and updates the cache.
        cache_loss: `CacheClassificationLoss` or any callable of that form.
        embedding_key: the feature that holds the embeddings.
        data_keys: the features that the document network takes.
        use_cross_replica: the ranks' caches are replicas: what any rank adds or refreshes, all do,
            in the order of the ranks. Batches may differ in size.
        process_group: of the replicas; None: all ranks.
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
        return self.cache_managers[_ONLY]

    @property
    def cache(self) -> NegativeCache:
        cache = self.caches[_ONLY]
        assert isinstance(cache, NegativeCache)
        return cache

    def update_cache_and_compute_loss(
        self,
        item_network: Any,
        query_embeddings: Value,
        pos_item_embeddings: Value,
        features: Features,
        writer: tuple[Any, int] | None = None,
        return_topk: int = 0,
        *,
        hard_negatives: Value | None = None,
        hard_features: Features | None = None,
    ) -> Any:
        """The loss of the cache as it is; then drawn items are refreshed and the positives added.

        Args:
            item_network: features by name, (B * m, ...), -> (B * m, D) embeddings.
            query_embeddings: (B, D).
            pos_item_embeddings: (B, D), the positive of each query.
            features: (B, ...) for all data keys, what the positives' embeddings are made of.
            writer: (SummaryWriter, step), which gets `cache/interpretable_prediction_loss` and
                `cache/staleness`.
            return_topk: return also the features of so many documents of the highest scores.
            hard_negatives: (N, D), further candidates of every query, which are not cached.
            hard_features: (N, ...), their features; needed for losses with `exclude`.

        Returns:
            The training loss; with return_topk, (loss, a dict of features for each query).
        """
        return self._step(
            item_network,
            query_embeddings,
            pos_item_embeddings,
            {_ONLY: self._new_items(_ONLY, pos_item_embeddings, "features", features)},
            features,
            writer,
            return_topk,
            hard_negatives,
            hard_features,
        )


class MultiCacheLossHandler(_Handler):
    """Several caches that count as one collection, e.g. one for each source of documents.

    Args:
        cache_managers: by name of a cache.
        others: as `CacheLossHandler`.
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
        """By name."""
        caches: dict[str, Any] = dict(self.caches.items())
        return caches

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
        """As `CacheLossHandler.update_cache_and_compute_loss`, with new items for every cache.

        Args:
            new_item_embeddings: by name of a cache, (N, D).
            new_item_features: by name of a cache, (N, ...) for all data keys.
            features: (B, ...), those of the positives; needed for losses with `exclude`.
            others: as there.
        """
        chosen("new_item_embeddings", new_item_embeddings, self.cache_managers)
        chosen("new_item_features", new_item_features, self.cache_managers)
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
            item_network,
            query_embeddings,
            pos_item_embeddings,
            new_items,
            features,
            writer,
            return_topk,
        )


def _mean(values: Any) -> float:
    return float(values.mean()) if isinstance(values, Tensor) else float(values)


def _of_all_ranks(
    ranks: Ranks,
    cache: NegativeCache,
    items: Features,
    data: Features | None,
    indices: Tensor | None,
    mask: Tensor | None,
) -> tuple[Features, Tensor, Features, Tensor, Tensor]:
    """What all ranks add and refresh, in the order of the ranks, with masks of what is real.

    Raises:
        TypeError, ValueError: the arguments do not fit, on the rank that has them.
        RuntimeError: on all others.
    """
    device = cache.device
    error: Exception | None = None
    new: Tables = {}
    fresh: Tables = {}
    try:
        new = cache.data.rows("new_items", items, device)
        fresh = cache.data.rows("updated_item_data", data or {}, device)
    except (TypeError, ValueError) as problem:
        error = problem
    places = torch.empty(0).long() if indices is None else indices
    written = torch.ones_like(places, dtype=torch.bool) if mask is None else mask
    added = len(next(iter(new.values()))) if new else 0
    mine = torch.tensor([error is None, added, len(places), len(fresh)])
    (sizes,) = ranks.all_gather(mine)
    if error is not None:
        raise error
    if not bool(sizes[:, 0].all()):
        raise RuntimeError("the arguments of a cache's update are wrong on another rank")
    if not bool((sizes[:, 3] == len(fresh)).all()):
        raise RuntimeError("all ranks must refresh the same features")
    new = {**new, "": torch.ones(added, dtype=torch.bool, device=device)}
    fresh = {**fresh, "": written.to(device), " ": places.to(device)}
    new = _gathered(ranks, new, int(sizes[:, 1].max()))
    fresh = _gathered(ranks, fresh, int(sizes[:, 2].max()))
    return (
        cache.data.values_of(new, *items),
        new[""],
        cache.data.values_of(fresh, *(data or {})),
        fresh[" "],
        fresh[""],
    )


def _gathered(ranks: Ranks, rows: Tables, most: int) -> Tables:
    gathered = ranks.all_gather(*(pad_rows(table, most) for table in rows.values()))
    return {name: table.flatten(0, 1) for name, table in zip(rows, gathered, strict=True)}
