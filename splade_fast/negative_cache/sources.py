"""Sources of negatives: the caches of one process, or the caches of all ranks joined to one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from splade_fast._distributed import Ranks, is_distributed, pad_rows
from splade_fast.negative_cache.features import Tables, Value
from splade_fast.negative_cache.matching import matches_any
from splade_fast.negative_cache.retrieval import (
    Draw,
    JoinedCache,
    Kept,
    TopK,
    Transform,
    all_scores,
    draw,
    draw_from_kept,
    draw_from_scores,
    draw_top_k,
    highest,
    keep_top_k,
    merge_draws,
    merge_groups,
    sort_by_slot,
)
from splade_fast.negative_cache.retrieval_fns import GumbelMaxRetrievalFn
from splade_fast.ops.sample import NegativeSamples

Groups = Sequence[Iterable[str]]  # of names of tables, see `matches_any`
Updates = dict[str, tuple[dict[str, Value], Tensor, Tensor]]

# Ranks may share a seed. Their queries get different numbers, and so different noise.
_QUERIES_PER_RANK = 1 << 20


class Source(Protocol):
    """Caches for the queries of one step. Slots are numbered over all caches."""

    total: int  # number of slots

    def draw(
        self,
        count: int,
        fn: GumbelMaxRetrievalFn,
        top_k: TopK | None,
        in_batch: Tensor | None,
    ) -> NegativeSamples:
        """Draw for each query from the slots and from in_batch, whose indices follow the slots."""

    def choose(
        self, fn: torch.nn.Module, top_k: TopK | None, in_batch: Tensor | None
    ) -> NegativeSamples:
        """Choose from all scores by `fn`. The result has no perturbed scores."""

    def highest(self, count: int, top_k: TopK | None) -> Kept:
        """Return the highest scores, or the highest of those that top_k keeps, descending."""

    def rows(self, slots: Tensor, *keys: str) -> Tables:
        """Return rows (B * n, ...) of the tables for slots (B, n), arbitrary for invalid slots."""

    def fail_together(self, action: str) -> AbstractContextManager[None]:
        """Raise on all processes that share the caches if the block raises on any."""

    def updates(self, slots: Tensor, fresh: Tables) -> Updates:
        """Return the (features, slots, mask) to store, by name of a cache of this process.

        Args:
            slots: slots (B, n); rows of slot -1 are not stored.
            fresh: rows (B * n, ...) of the tables of the embeddings.
        """


class LocalCaches:
    """Caches of this process."""

    def __init__(
        self,
        cache: JoinedCache,
        queries: Tensor,
        transform: Transform | None,
        items: Tables | None,
        groups: Groups,
    ) -> None:
        self._cache = cache
        self._scored = (queries, cache, transform, _exclude_mask(cache, items, groups))
        self.total = cache.size
        rank = torch.distributed.get_rank() if is_distributed() else 0
        self._first_query = rank * _QUERIES_PER_RANK

    def draw(
        self,
        count: int,
        fn: GumbelMaxRetrievalFn,
        top_k: TopK | None,
        in_batch: Tensor | None,
    ) -> NegativeSamples:
        rng = fn.rng_on(self._cache.device)
        settings = Draw(count, fn.inv_temp, rng, self._first_query)
        if top_k is None:
            found = draw(*self._scored, settings)
        else:
            found = draw_top_k(*self._scored, settings, top_k)
        found = _with_in_batch(found, in_batch, self.total, settings)
        rng.advance()
        return found

    def choose(
        self, fn: torch.nn.Module, top_k: TopK | None, in_batch: Tensor | None
    ) -> NegativeSamples:
        kept = keep_top_k(*self._scored, top_k) if top_k else all_scores(*self._scored)
        return choose_from(kept, fn, in_batch, self.total)

    def highest(self, count: int, top_k: TopK | None) -> Kept:
        return highest(keep_top_k(*self._scored, top_k or TopK(count, "exact")), count)

    def rows(self, slots: Tensor, *keys: str) -> Tables:
        return self._cache.gather(slots.flatten(), *keys)

    def fail_together(self, action: str) -> AbstractContextManager[None]:
        return nullcontext()

    def updates(self, slots: Tensor, fresh: Tables) -> Updates:
        return _updates(self._cache, slots.flatten(), fresh)


class ShardedCaches:
    """Caches of all ranks joined to one. The slots of rank r follow those of rank r - 1.

    Every rank scores the queries of all ranks against its own slots. The ranks exchange candidates,
    rows and fresh embeddings. All methods are collectives.
    """

    def __init__(
        self,
        ranks: Ranks,
        sizes: list[int],
        batches: list[int],
        cache: JoinedCache,
        queries: Tensor,
        transform: Transform | None,
        items: Tables | None,
        groups: Groups,
        rng_state: Tensor,
    ) -> None:
        self._ranks = ranks
        self._batches = batches
        self._most = max(batches)
        self._first_query = sum(batches[: ranks.rank])
        self._starts = [sum(sizes[:rank]) for rank in range(ranks.count)]
        self._rng_state = rng_state
        self.total = sum(sizes)
        cache.offset = self._starts[ranks.rank]
        self._cache = cache
        sent = {"": queries} | (items or {})
        gathered = ranks.all_gather(*(pad_rows(tensor, self._most) for tensor in sent.values()))
        whole = [self._drop_padding(tensor) for tensor in gathered]
        everyone = dict(zip(sent, whole, strict=True))
        all_queries = everyone.pop("")
        exclude_mask = _exclude_mask(cache, everyone if items is not None else None, groups)
        self._scored = (all_queries, cache, transform, exclude_mask)

    def draw(
        self,
        count: int,
        fn: GumbelMaxRetrievalFn,
        top_k: TopK | None,
        in_batch: Tensor | None,
    ) -> NegativeSamples:
        rng = fn.rng_on(self._cache.device)
        rng.state.copy_(self._rng_state)
        mine = Draw(count, fn.inv_temp, rng, self._first_query)
        if top_k is not None:
            found = draw_from_kept(self._keep(top_k), mine)
        else:
            with self.fail_together("score_transform"):
                candidates = draw(*self._scored, mine._replace(query_offset=0))
            parts = self._to_owners_of_queries(*candidates)
            found = merge_draws(NegativeSamples(*part) for part in parts)
        found = _with_in_batch(found, in_batch, self.total, mine)
        rng.advance()
        return found

    def choose(
        self, fn: torch.nn.Module, top_k: TopK | None, in_batch: Tensor | None
    ) -> NegativeSamples:
        """Choose a slot of every rank, then a rank by the logsumexp of its scores."""
        with self.fail_together("score_transform or retrieval_fn"):
            if top_k is None:
                kept = all_scores(*self._scored)
            else:
                share, more = divmod(top_k.k, self._ranks.count)
                k = share + (self._ranks.rank < more)
                kept = keep_top_k(*self._scored, top_k._replace(k=k))
            candidates = choose_from(kept, fn, None, self.total)
            if candidates.indices.shape[1] != 1:
                raise ValueError(
                    "retrieval_fn must choose one negative of a query if ranks share a cache, got "
                    f"{candidates.indices.shape[1]}"
                )
        parts = [NegativeSamples(*part) for part in self._to_owners_of_queries(*candidates)]
        with self.fail_together("retrieval_fn"):
            if in_batch is not None:
                slots = torch.arange(in_batch.shape[1], device=in_batch.device) + self.total
                others = Kept(in_batch, slots.expand_as(in_batch))
                parts.append(choose_from(others, fn, None, self.total))
            weights = torch.stack([part.logsumexp for part in parts], 1)
            chosen = fn(weights)[:, :1]
        return NegativeSamples(
            torch.cat([part.indices[:, :1] for part in parts], 1).gather(1, chosen),
            torch.cat([part.scores[:, :1] for part in parts], 1).gather(1, chosen),
            weights.logsumexp(1),
            weights.new_empty(len(weights), 0),
        )

    def highest(self, count: int, top_k: TopK | None) -> Kept:
        return highest(self._keep(top_k or TopK(count, "exact")), count)

    def rows(self, slots: Tensor, *keys: str) -> Tables:
        requested = self._gather_slots(slots)
        tables = self._cache.gather(requested.flatten() - self._cache.offset, *keys)
        shaped = [t.view(*requested.shape, *t.shape[1:]) for t in tables.values()]
        answers = self._ranks.all_to_all(*shaped)
        owner = self._find_rank(slots.flatten())
        places = torch.arange(slots.numel(), device=slots.device)
        return {name: answer[owner, places] for name, answer in zip(tables, answers, strict=True)}

    def fail_together(self, action: str) -> AbstractContextManager[None]:
        return self._ranks.fail_together(action)

    def updates(self, slots: Tensor, fresh: Tables) -> Updates:
        """Return the fresh embeddings of all ranks for the slots of this rank."""
        requested, count = self._gather_slots(slots), self._most * slots.shape[1]
        tables = self._ranks.all_gather(*(pad_rows(table, count) for table in fresh.values()))
        rows = {name: table.flatten(0, 1) for name, table in zip(fresh, tables, strict=True)}
        local = requested.flatten() - self._cache.offset
        return _updates(self._cache, local, rows)

    def _keep(self, top_k: TopK) -> Kept:
        """Return the scores that top_k keeps for the queries of this rank, from all slots."""
        with self.fail_together("score_transform"):
            candidates = keep_top_k(*self._scored, top_k, self.total)
        if top_k.method == "exact":
            missing = (0, min(top_k.k, self.total) - candidates.scores.shape[1])
            candidates = Kept(
                torch.nn.functional.pad(candidates.scores, missing, value=-torch.inf),
                torch.nn.functional.pad(candidates.slots, missing, value=-1),
            )
        parts = [Kept(*part) for part in self._to_owners_of_queries(*candidates)]
        if top_k.method == "grouped":
            return merge_groups(parts)
        kept = Kept(
            torch.cat([part.scores for part in parts], 1),
            torch.cat([part.slots for part in parts], 1),
        )
        return sort_by_slot(highest(kept, top_k.k))

    def _to_owners_of_queries(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Send rows (all queries, ...) to the ranks of the queries; return one part per rank."""
        by_rank = [
            torch.stack([pad_rows(part, self._most) for part in tensor.split(self._batches)])
            for tensor in tensors
        ]
        mine = self._batches[self._ranks.rank]
        received = [tensor[:, :mine] for tensor in self._ranks.all_to_all(*by_rank)]
        return list(zip(*(tensor.unbind() for tensor in received), strict=True))

    def _drop_padding(self, gathered: Tensor) -> Tensor:
        """Remove the padding of each rank: (ranks, most, ...) becomes (all queries, ...)."""
        parts = zip(gathered, self._batches, strict=True)
        return torch.cat([part[:batch] for part, batch in parts])

    def _gather_slots(self, slots: Tensor) -> Tensor:
        """Gather the slots (B, n) of all ranks as (ranks, most * n), padded with -1."""
        return self._ranks.all_gather(pad_rows(slots, self._most, -1).flatten())[0]

    def _find_rank(self, slots: Tensor) -> Tensor:
        """Return the rank that holds each slot, and any rank for invalid slots."""
        last = torch.tensor([*self._starts[1:], self.total], device=slots.device)
        return torch.searchsorted(last, slots, right=True).clamp(max=self._ranks.count - 1)


def exchange_sizes(
    ranks: Ranks, slots: int, batch: int, settings: str, rng_state: Tensor
) -> tuple[list[int], list[int], Tensor]:
    """Exchange the numbers of slots and queries of all ranks.

    Args:
        slots: number of slots of this rank.
        batch: number of queries of this rank.
        settings: text that must be the same on all ranks.
        rng_state: (2,) int64, state of the generator of this rank.

    Returns:
        The number of slots of each rank, the number of queries of each rank, and the rng_state of
        the first rank.

    Raises:
        RuntimeError: the settings differ between ranks.
    """
    digest = int.from_bytes(hashlib.sha256(settings.encode()).digest()[:7], "big")
    mine = torch.tensor([slots, batch, digest], dtype=torch.int64)
    (all_ranks,) = ranks.all_gather(torch.cat([mine, rng_state.cpu()]))
    sizes, batches, digests = all_ranks[:, :3].t().tolist()
    if different := [rank for rank, other in enumerate(digests) if other != digests[0]]:
        raise RuntimeError(
            "the embeddings, the caches' features and the options of the loss must be the same on "
            f"all ranks, but rank {different[0]} differs from rank 0; got here {settings}"
        )
    return sizes, batches, all_ranks[0, 3:]


def choose_from(
    kept: Kept, fn: torch.nn.Module, in_batch: Tensor | None, first_in_batch: int
) -> NegativeSamples:
    """Choose from kept scores and in_batch by a function from (B, N) to (B, m)."""
    scores, slots = kept
    if in_batch is not None:
        in_batch_slots = torch.arange(in_batch.shape[1], device=slots.device) + first_in_batch
        scores = torch.cat([scores, in_batch], 1)
        slots = torch.cat([slots, in_batch_slots.expand_as(in_batch)], 1)
    chosen = fn(scores)
    if chosen.ndim != 2 or len(chosen) != len(scores):
        raise ValueError(
            f"retrieval_fn must return ({len(scores)}, negatives) indices, "
            f"got {tuple(chosen.shape)}"
        )
    chosen = chosen.to(scores.device)
    chosen_scores = scores.gather(1, chosen.clamp(min=0))
    missing_mask = (chosen < 0) | (chosen_scores == -torch.inf)
    return NegativeSamples(
        slots.gather(1, chosen.clamp(min=0)).masked_fill(missing_mask, -1),
        chosen_scores,
        scores.logsumexp(1),
        scores.new_empty(len(scores), 0),
    )


def _with_in_batch(
    found: NegativeSamples, in_batch: Tensor | None, first: int, settings: Draw
) -> NegativeSamples:
    if in_batch is None:
        return found
    return merge_draws([found, draw_from_scores(in_batch, first, settings)])


def _exclude_mask(cache: JoinedCache, items: Tables | None, groups: Groups) -> Tensor | None:
    """Return (B, C) bool, True where a slot equals the query's positive in a group of tables."""
    if items is None:
        return None
    parts = []
    for one in cache.caches:
        parts.append(matches_any(groups, items, one.data.tables()))
    return torch.cat(parts, 1)


def _updates(cache: JoinedCache, slots: Tensor, fresh: Tables) -> Updates:
    """Return the updates of slots (N,). Slots outside the caches are masked out."""
    updates: Updates = {}
    for name, one, start in zip(cache.names, cache.caches, cache.starts, strict=False):
        local = slots - start
        key = cache.embedding_key
        inside_mask = (local >= 0) & (local < one.size)
        updates[name] = (one.data.join_rows(fresh, key), local, inside_mask)
    return updates
