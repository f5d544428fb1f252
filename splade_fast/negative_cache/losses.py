"""Cross entropy against a cache of documents, estimated by a few fresh negatives for each query.

Lindgren, Reddi, Guo, Kumar: Efficient Training of Retrieval Models using Negative Cache, NeurIPS
2021. Several negatives are drawn without replacement and have importance weights: Kool, van Hoof,
Welling: Stochastic Beams and Where to Find Them, ICML 2019.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from splade_fast._checks import check_choice, check_count
from splade_fast._distributed import Ranks
from splade_fast.negative_cache.features import Tables, Value, as_dense, select
from splade_fast.negative_cache.matching import matches_any
from splade_fast.negative_cache.negative_cache import CacheData, NegativeCache
from splade_fast.negative_cache.retrieval import JoinedCache, TopK, Transform, tile_scores
from splade_fast.negative_cache.retrieval_fns import GumbelMaxRetrievalFn
from splade_fast.negative_cache.sources import (
    Groups,
    LocalCaches,
    ShardedCaches,
    Source,
    Updates,
    exchange_sizes,
)
from splade_fast.ops.autograd import accumulation_dtype
from splade_fast.ops.sample import TOP_K_METHODS, NegativeSamples

Features = Mapping[str, Value]
DocNetwork = Callable[[dict[str, Value]], Value]
Reducer = Callable[[Tensor], Tensor]


class CacheLossReturn(NamedTuple):
    """Results of a loss over a cache.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> data = {"embedding": torch.eye(3)}
        >>> cache = nc.NegativeCache(data, age=torch.zeros(3))
        >>> loss = nc.CacheClassificationLoss("embedding", ("embedding",))
        >>> query, positive = torch.ones(1, 3), torch.full((1, 3), 2.0)
        >>> result = loss(lambda drawn: drawn["embedding"], query, positive, {"cache": cache})
        >>> result.interpretable_loss, result.staleness
        (tensor(0.0200), tensor(0.))

    Attributes:
        training_loss: scalar, or (B,) without a reducer. The expectation of its gradient is the
            gradient of the cross entropy.
        interpretable_loss: cross entropy over the cached embeddings, without gradient.
        updated_item_data: fresh embeddings (M, ...) of the drawn items, as features by name, for
            each cache by name. M may exceed B.
        updated_item_indices: slots (M,) of these items, by name of a cache.
        updated_item_mask: (M,) bool, True for the items to store, by name of a cache.
        staleness: |cached - fresh|² / |fresh|² of the drawn embeddings.
        topk_features: features by name of the documents with the highest scores, for each query.
    """

    training_loss: Tensor
    interpretable_loss: Tensor
    updated_item_data: Any
    updated_item_indices: Any
    updated_item_mask: Any
    staleness: Tensor
    topk_features: list[dict[str, Value]] | None = None


class HardNegatives(NamedTuple):
    """Further documents that are candidates of every query of a batch."""

    embeddings: Tensor  # (N, D)
    features: Features | None  # (N, ...); needed for `exclude`


class _Refreshed(NamedTuple):
    """Results of encoding the drawn documents again, without gradient."""

    staleness: Tensor  # (B,)
    updates: Updates
    topk_features: list[dict[str, Value]] | None


class CacheLoss(metaclass=abc.ABCMeta):
    """Interface of the losses. The handlers accept any callable with this signature."""

    @abc.abstractmethod
    def __call__(
        self,
        doc_network: DocNetwork,
        query_embeddings: Tensor,
        pos_doc_embeddings: Tensor,
        cache: Mapping[str, NegativeCache],
        return_topk: int = 0,
    ) -> CacheLossReturn: ...


class AbstractCacheClassificationLoss(nn.Module, metaclass=abc.ABCMeta):
    """Base of the losses over the caches of one process and over the caches of all ranks."""

    retrieval_fn: nn.Module

    def __init__(
        self,
        embedding_key: str,
        data_keys: Iterable[str],
        score_transform: Transform | None = None,
        top_k: int | None = None,
        reducer: Reducer | None = torch.mean,
        *,
        num_negatives: int = 1,
        in_batch: bool = False,
        exclude: str | Sequence[str] | None = None,
        exclude_any: str | Sequence[str] | None = None,
        top_k_method: str = "grouped",
        count_empty_slots: bool = False,
        retrieval_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """
        Args:
            embedding_key: name of the cached feature that holds the embeddings.
            data_keys: names of the cached features that the document network takes.
            score_transform: elementwise function of the scores q · d. With `Scale` the loss
                computes scores and draws in one pass. With any other callable it reads the cache by
                tiles. The draws are the same.
            top_k: number of cached documents in each query's softmax, at least 1; None: all.
            reducer: function that reduces the (B,) results; None: the results stay (B,).
            num_negatives: m, number of negatives drawn without replacement, at least 1. Weights
                make the expected gradient that of the full cross entropy for every m.
            in_batch: whether the other positives of this process's batch join the softmax and can
                be drawn.
            exclude: names of one or several features, e.g. an id. A document is left out if all of
                these features equal those of the query's positive, bit for bit.
            exclude_any: names of features, e.g. an id of the query. A document is left out as well
                if one of these features equals that of the query's positive.
            top_k_method: "grouped" keeps the highest score of each of top_k contiguous groups of
                slots; "exact" keeps the top_k highest scores.
            count_empty_slots: whether slots without an item count as documents of zeros.
            retrieval_fn: function from scores (B, N) to indices (B, m); None:
                `GumbelMaxRetrievalFn()`. Any other function needs the scores of the whole cache
                in memory.

        Raises:
            TypeError, ValueError: a count is no integer of at least 1, or top_k_method is unknown.
        """
        super().__init__()
        check_choice("top_k_method", top_k_method, TOP_K_METHODS)
        self.embedding_key = embedding_key
        self.data_keys = tuple(data_keys)
        self.score_transform = score_transform
        self.top_k = None if top_k is None else check_count("top_k", top_k, 1)
        self.reducer = reducer
        self.num_negatives = check_count("num_negatives", num_negatives, 1)
        self.in_batch = in_batch
        self.exclude = _names(exclude)
        self.exclude_any = _names(exclude_any)
        self.top_k_method = top_k_method
        self.count_empty_slots = count_empty_slots
        setattr(self, "retrieval_fn", retrieval_fn or GumbelMaxRetrievalFn())  # noqa: B010

    def __setattr__(self, name: str, value: Any) -> None:
        """Wrap a callable `retrieval_fn`, named `_retrieval_fn` in the published packages."""
        if name in ("retrieval_fn", "_retrieval_fn"):
            name = "retrieval_fn"
            value = value if isinstance(value, nn.Module) else _Function(value)
        super().__setattr__(name, value)

    @property
    def _retrieval_fn(self) -> nn.Module:
        return self.retrieval_fn

    @abc.abstractmethod
    def _source(
        self,
        cache: Mapping[str, NegativeCache],
        queries: Tensor,
        positives: Tensor,
        features: Features | None,
        hard: HardNegatives | None,
        return_topk: int,
    ) -> tuple[Source, Tables | None, Tables | None]:
        """Return the source of negatives, and `exclude` tables of positives and hard negatives."""

    def forward(
        self,
        doc_network: DocNetwork,
        query_embeddings: Value,
        pos_doc_embeddings: Value,
        cache: Mapping[str, NegativeCache],
        return_topk: int = 0,
        *,
        pos_features: Features | None = None,
        hard_negatives: Value | None = None,
        hard_features: Features | None = None,
    ) -> CacheLossReturn:
        """Compute training_loss = (1 - p) Σ_j w_j (s_j - s_pos), p = softmax([s_pos, S])[0].

        A single negative has the weight 1.

        Args:
            doc_network: function from features by name, (B * m, ...), to embeddings (B * m, D),
                called once.
            query_embeddings: queries (B, D).
            pos_doc_embeddings: positive of each query, (B, D).
            cache: caches by name. Several caches form one, in the order of their names.
            return_topk: number of documents with the highest scores to return the features of.
                With top_k, 1 returns the drawn documents instead.
            pos_features: features of the positives by name, (B, ...); required by `exclude`. The
                network encodes them in place of missing negatives.
            hard_negatives: further candidates (N, D) of every query of this process's batch.
            hard_features: features of hard_negatives by name, (N, ...); required by `exclude`.

        Returns:
            The results. The loss of a query without any candidate is 0.

        Raises:
            TypeError, ValueError, KeyError: the arguments do not fit each other or the caches.
        """
        queries, positives = as_dense(query_embeddings), as_dense(pos_doc_embeddings)
        hard = None
        if hard_negatives is not None:
            hard = HardNegatives(as_dense(hard_negatives), hard_features)
        source, items, hard_items = self._source(
            cache, queries.detach(), positives.detach(), pos_features, hard, return_topk
        )
        groups = self._exclude_groups(next(iter(cache.values())).data)
        candidates = self._candidates(positives, hard)
        with torch.no_grad():
            with source.fail_together("score_transform"):
                candidate_scores = self._candidate_scores(
                    queries, candidates, items, hard_items, groups
                )
            found, weights = self._draw(source, candidate_scores)
            drawn = found.indices[:, : weights.shape[1]]
        schema = next(iter(cache.values())).data
        fresh, refreshed = self._encode_drawn(
            source, schema, drawn, doc_network, pos_features, queries.shape[1], return_topk
        )
        negatives = fresh
        if candidates is not None and len(candidates):
            rows = (drawn - source.total).flatten()
            negatives = torch.where((rows >= 0).unsqueeze(1), candidates[rows.clamp(min=0)], fresh)
        training, interpretable = self._losses(queries, positives, negatives, found, weights)
        updates = refreshed.updates
        return CacheLossReturn(
            training_loss=self._reduce(training),
            interpretable_loss=self._reduce(interpretable),
            updated_item_data={name: data for name, (data, _, _) in updates.items()},
            updated_item_indices={name: indices for name, (_, indices, _) in updates.items()},
            updated_item_mask={name: mask for name, (_, _, mask) in updates.items()},
            staleness=self._reduce(refreshed.staleness),
            topk_features=refreshed.topk_features,
        )

    def _encode_drawn(
        self,
        source: Source,
        schema: CacheData,
        drawn: Tensor,
        doc_network: DocNetwork,
        pos_features: Features | None,
        dim: int,
        return_topk: int,
    ) -> tuple[Tensor, _Refreshed]:
        """Encode the drawn documents again, to embeddings (B * m, dim) and their results."""
        with torch.no_grad():
            cached_mask = (drawn >= 0) & (drawn < source.total)
            slots = torch.where(cached_mask, drawn, -1)
            rows = source.rows(slots, *self.data_keys, self.embedding_key)
            stale = schema.join_rows(rows, self.embedding_key)[self.embedding_key]
        with source.fail_together("doc_network"):
            with torch.no_grad():
                data = self._network_input(schema, rows, cached_mask, pos_features)
            fresh = as_dense(doc_network(dict(data)))
            name = "the output of doc_network"
            if fresh.shape != (expected := (slots.numel(), dim)):
                raise ValueError(f"{name} must be {expected}, got {tuple(fresh.shape)}")
            tables = schema.rows(name, {self.embedding_key: fresh}, slots.device)
        with torch.no_grad():
            moved = _staleness(as_dense(stale), fresh).view(cached_mask.shape)
            return fresh, _Refreshed(
                staleness=_masked_mean(moved, cached_mask),
                updates=source.updates(slots, tables),
                topk_features=self._topk_features(source, schema, data, return_topk),
            )

    def _losses(
        self,
        queries: Tensor,
        positives: Tensor,
        negatives: Tensor,
        found: NegativeSamples,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the training loss and the cross entropy, (B,) each; negatives are (B * m, D)."""
        count = weights.shape[1]
        positive_scores = self._score(queries, positives)
        repeated = queries.repeat_interleave(count, 0)
        negative_scores = self._score(repeated, negatives).view(-1, count)
        # log p = -softplus(logsumexp(S) - s_pos) neither underflows nor overflows.
        gap = found.logsumexp - positive_scores.detach()
        differences = negative_scores - positive_scores.unsqueeze(1)
        drawn_mask = found.indices[:, :count] >= 0
        training = torch.sigmoid(gap) * torch.where(drawn_mask, weights * differences, 0).sum(1)
        return training, nn.functional.softplus(gap)

    def _score(self, queries: Tensor, documents: Tensor) -> Tensor:
        acc = accumulation_dtype(torch.promote_types(queries.dtype, documents.dtype))
        scores = (queries.to(acc) * documents.to(acc)).sum(1)
        return scores if self.score_transform is None else self.score_transform(scores)

    def _reduce(self, values: Tensor) -> Tensor:
        return values if self.reducer is None else self.reducer(values)

    def _top_k(self) -> TopK | None:
        return None if self.top_k is None else TopK(self.top_k, self.top_k_method)

    def _draw(self, source: Source, in_batch: Tensor | None) -> tuple[NegativeSamples, Tensor]:
        """Draw the negatives of each query, and return them with their weights (B, m)."""
        fn, wanted = self.retrieval_fn, self.num_negatives
        if not isinstance(fn, GumbelMaxRetrievalFn):
            found = source.choose(fn, self._top_k(), in_batch)
            drawn_mask = (found.indices >= 0).to(found.scores.dtype)
            return found, drawn_mask / drawn_mask.sum(1, keepdim=True).clamp(min=1)
        # One more document is drawn, because its perturbed score is the threshold of the weights.
        found = source.draw(wanted + (wanted > 1), fn, self._top_k(), in_batch)
        if wanted == 1:
            return found, torch.ones_like(found.scores)
        return found, _weights(found, fn.inv_temp)

    def _candidates(self, positives: Tensor, hard: HardNegatives | None) -> Tensor | None:
        """Return the candidates of the batch: positives with `in_batch`, then hard negatives."""
        if hard is None:
            return positives if self.in_batch else None
        return torch.cat([positives, hard.embeddings]) if self.in_batch else hard.embeddings

    def _candidate_scores(
        self,
        queries: Tensor,
        candidates: Tensor | None,
        items: Tables | None,
        hard_items: Tables | None,
        groups: Groups,
    ) -> Tensor | None:
        """Return scores (B, candidates), -inf where a candidate is excluded."""
        if candidates is None:
            return None
        scores = tile_scores(queries, candidates, self.score_transform)
        positive_mask = torch.zeros_like(scores, dtype=torch.bool)
        if self.in_batch:
            positive_mask.fill_diagonal_(True)
        if items is not None:
            parts = [items] if self.in_batch else []
            if hard_items is not None:
                parts.append(hard_items)
            candidate_items = {name: torch.cat([part[name] for part in parts]) for name in items}
            positive_mask |= matches_any(groups, items, candidate_items)
        return scores.masked_fill(positive_mask, -torch.inf)

    def _network_input(
        self, schema: CacheData, rows: Tables, cached_mask: Tensor, pos_features: Features | None
    ) -> dict[str, Value]:
        """Return the features of the drawn documents, or of the positive outside `cached_mask`."""
        tables = self._tables(schema, rows)
        if pos_features is not None:
            own = schema.rows(
                "pos_features",
                select("pos_features", pos_features, self.data_keys),
                cached_mask.device,
            )
            count = cached_mask.shape[1]
            is_cached = cached_mask.flatten()
            for name, table in tables.items():
                mine = own[name].repeat_interleave(count, 0)
                shape = (-1,) + (1,) * (table.ndim - 1)
                tables[name] = torch.where(is_cached.view(shape), table, mine)
        return schema.join_rows(tables, *self.data_keys)

    def _tables(self, schema: CacheData, rows: Tables) -> Tables:
        return {name: rows[name] for name in schema.tables(self.data_keys)}

    def _topk_features(
        self,
        source: Source,
        schema: CacheData,
        drawn: dict[str, Value],
        count: int,
    ) -> list[dict[str, Value]] | None:
        if count < 1:
            return None
        if self.top_k is not None:
            if count == 1:
                return [drawn]
            count = min(count, self.top_k)
        slots = source.highest(min(count, source.total), self._top_k()).slots
        rows = self._tables(schema, source.rows(slots, *self.data_keys))
        per_query = slots.shape[1]
        return [
            schema.join_rows(
                {name: table[start : start + per_query] for name, table in rows.items()},
                *self.data_keys,
            )
            for start in range(0, slots.numel(), max(per_query, 1))
        ]

    @property
    def _exclude_keys(self) -> tuple[str, ...]:
        """Names of all features that exclude a document."""
        return tuple(dict.fromkeys((*self.exclude, *self.exclude_any)))

    def _exclude_groups(self, schema: CacheData) -> Groups:
        """Return the names of the tables of `exclude`, and of each feature of `exclude_any`."""
        keys = [self.exclude] if self.exclude else []
        keys += [(name,) for name in self.exclude_any]
        return [tuple(schema.tables(group)) for group in keys]

    def _positive_items(
        self, schema: CacheData, pos_features: Features | None, batch: int, device: torch.device
    ) -> Tables | None:
        """Return the `exclude` tables of the positives."""
        if not self._exclude_keys:
            return None
        return self._exclude_tables("pos_features", pos_features, schema, batch, device)

    def _hard_items(
        self, schema: CacheData, hard: HardNegatives | None, queries: Tensor
    ) -> Tables | None:
        """Check hard negatives, and return their `exclude` tables."""
        if hard is None:
            return None
        shape = tuple(hard.embeddings.shape)
        if len(shape) != 2 or shape[1] != queries.shape[1]:
            raise ValueError(
                f"hard_negatives must be (documents, {queries.shape[1]}) as the queries, "
                f"got {shape}"
            )
        if not self._exclude_keys:
            return None
        return self._exclude_tables(
            "hard_features", hard.features, schema, shape[0], queries.device
        )

    def _exclude_tables(
        self,
        name: str,
        features: Features | None,
        schema: CacheData,
        count: int,
        device: torch.device,
    ) -> Tables:
        """Return the tables of the excluding features for `count` documents."""
        keys = self._exclude_keys
        if features is None:
            raise ValueError(f"{name} must hold {', '.join(keys)} for exclude, got None")
        items = schema.rows(name, select(name, features, keys), device)
        counts = {len(table) for table in items.values()}
        if counts != {count}:
            raise ValueError(f"{name} must be ({count}, ...), got {sorted(counts)} items")
        return items

    def _join_caches(
        self, cache: Mapping[str, NegativeCache], queries: Tensor, positives: Tensor
    ) -> JoinedCache:
        """Check the arguments, and return the caches joined to one."""
        if not cache:
            raise ValueError("cache must hold at least one cache, got none")
        if queries.ndim != 2 or positives.shape != queries.shape:
            raise ValueError(
                "query_embeddings and pos_doc_embeddings must be (queries, dim) both, got "
                f"{tuple(queries.shape)} and {tuple(positives.shape)}"
            )
        for name, one in cache.items():
            for key in (self.embedding_key, *self.data_keys, *self._exclude_keys):
                if key not in one.data:
                    raise KeyError(f"cache[{name!r}] must have {key!r}, got {sorted(one.data)}")
            if one.device != queries.device:
                raise ValueError(
                    f"cache[{name!r}] must be on the device of query_embeddings, "
                    f"{queries.device}, got {one.device}"
                )
        joined = JoinedCache(cache, self.embedding_key, count_empty_slots=self.count_empty_slots)
        for dim in joined.dims():
            if queries.shape[1] != dim:
                raise ValueError(
                    f"query_embeddings must be (queries, {dim}) as the cached embeddings, "
                    f"got {tuple(queries.shape)}"
                )
        return joined


class CacheClassificationLoss(AbstractCacheClassificationLoss):
    """Cross entropy against the caches of this process.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> data = {"id": torch.arange(3), "embedding": torch.eye(3)}
        >>> cache = nc.NegativeCache(data, age=torch.zeros(3))
        >>> network = torch.nn.Embedding(3, 3)
        >>> loss = nc.CacheClassificationLoss("embedding", ("id",), score_transform=nc.Scale(20.0))
        >>> query, positive = torch.rand(2, 3), torch.rand(2, 3)
        >>> result = loss(lambda drawn: network(drawn["id"]), query, positive, {"cache": cache})
        >>> result.training_loss.backward()

    See `CacheLossHandler` for a loss that also updates its cache.
    """

    def _source(
        self,
        cache: Mapping[str, NegativeCache],
        queries: Tensor,
        positives: Tensor,
        features: Features | None,
        hard: HardNegatives | None,
        return_topk: int,
    ) -> tuple[Source, Tables | None, Tables | None]:
        joined = self._join_caches(cache, queries, positives)
        schema = joined.caches[0].data
        items = self._positive_items(schema, features, len(queries), queries.device)
        hard_items = self._hard_items(schema, hard, queries)
        with torch.no_grad():
            groups = self._exclude_groups(schema)
            source = LocalCaches(joined, queries, self.score_transform, items, groups)
        return source, items, hard_items


class DistributedCacheClassificationLoss(AbstractCacheClassificationLoss):
    """Cross entropy against the caches of all ranks, as shards of one cache.

    All ranks must call the loss. The batches and the caches of the ranks may differ in size. An
    error on one rank, including errors of the network, score_transform or retrieval_fn, raises on
    all ranks. The draws equal those of one process that has all queries and all caches, in the
    order of the ranks, and the generator of the first rank. Each rank receives the fresh embeddings
    of its slots.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> keys = {"embedding_key": "embedding", "data_keys": ("id",)}
        >>> loss = nc.DistributedCacheClassificationLoss(**keys, num_negatives=2)
        >>> loss.num_negatives
        2

    Args:
        process_group: group of the ranks; None: all ranks.

    See `CacheClassificationLoss` for the other arguments.
    """

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def _source(
        self,
        cache: Mapping[str, NegativeCache],
        queries: Tensor,
        positives: Tensor,
        features: Features | None,
        hard: HardNegatives | None,
        return_topk: int,
    ) -> tuple[Source, Tables | None, Tables | None]:
        ranks = Ranks(self.process_group)
        with ranks.fail_together("checking the arguments of the loss"):
            if self.top_k is not None and self.top_k < ranks.count:
                raise ValueError(
                    f"top_k must be at least the number of ranks, {ranks.count}, got {self.top_k}"
                )
            joined = self._join_caches(cache, queries, positives)
            schema = joined.caches[0].data
            items = self._positive_items(schema, features, len(queries), queries.device)
            hard_items = self._hard_items(schema, hard, queries)
        fn = self.retrieval_fn
        state = fn.rng.state if isinstance(fn, GumbelMaxRetrievalFn) else torch.zeros(2).long()
        settings = self._settings(schema, queries, return_topk)
        sizes, batches, state = exchange_sizes(ranks, joined.size, len(queries), settings, state)
        with torch.no_grad():
            source = ShardedCaches(
                ranks,
                sizes,
                batches,
                joined,
                queries,
                self.score_transform,
                items,
                self._exclude_groups(schema),
                state,
            )
        return source, items, hard_items

    def _settings(self, schema: CacheData, queries: Tensor, return_topk: int) -> str:
        tables = {
            name: (tuple(table.shape[1:]), str(table.dtype))
            for name, table in sorted(schema.tables().items())
        }
        options = (
            self.embedding_key,
            self.data_keys,
            self.top_k,
            self.top_k_method,
            self.num_negatives,
            self.exclude,
            self.exclude_any,
            return_topk,
            type(self.retrieval_fn).__name__,
        )
        return f"{queries.dtype} {tuple(queries.shape[1:])} {tables} {options}"


class _Function(nn.Module):
    """Module that calls a plain function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, scores: Tensor) -> Tensor:
        return self.function(scores)


def _names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _staleness(cached: Tensor, fresh: Tensor) -> Tensor:
    """Return |cached - fresh|² / |fresh|², (N,), and 0 where cached equals fresh."""
    fresh = fresh.to(torch.promote_types(fresh.dtype, torch.float32))
    moved = (cached.to(fresh.dtype) - fresh).square().sum(1)
    return torch.where(moved == 0, 0, moved / fresh.square().sum(1))


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the entries (B, m) of each row where the mask is True, (B,)."""
    return torch.where(mask, values, 0).sum(1) / mask.sum(1).clamp(min=1)


def _weights(found: NegativeSamples, inv_temp: float) -> Tensor:
    """Return w_j = softmax(S)_j / P(j is drawn | threshold).

    With these weights E Σ_j w_j f_j = E_softmax(S) f.

    The threshold is the perturbed score of the additional last draw. If there was no document left
    for that draw, all documents were drawn, and the weights are their probabilities.
    """
    scores = found.scores[:, :-1]
    above = inv_temp * scores - found.perturbed[:, -1:]
    # log(1 - exp(-exp(x))) is x where exp(x) is small.
    log_drawn = torch.where(above < -15, above, torch.log(-torch.expm1(-torch.exp(above))))
    weights = torch.exp(scores - found.logsumexp.unsqueeze(1) - log_drawn)
    return torch.where(found.indices[:, :-1] >= 0, weights, 0)
