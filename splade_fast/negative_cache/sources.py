"""Where negatives come from: the caches of this process, or those of all ranks as one."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from splade_fast._distributed import Ranks, is_distributed, pad_rows
from splade_fast.negative_cache.features import Tables, Value
from splade_fast.negative_cache.matching import matches
from splade_fast.negative_cache.retrieval import (
    Draw,
    JoinedCache,
    Kept,
    TopK,
    Transform,
    all_scores,
    by_slot,
    draw,
    draw_from_kept,
    draw_from_scores,
    draw_top_k,
    highest,
    keep_top_k,
    merge_draws,
    merge_groups,
)
from splade_fast.negative_cache.retrieval_fns import GumbelMaxRetrievalFn
from splade_fast.ops.sample import NegativeSamples

Updates = dict[str, tuple[dict[str, Value], Tensor, Tensor]]

# Numbers of queries on different ranks that share a seed must differ.
_QUERIES_OF_A_RANK = 1 << 20


class Source(Protocol):
    """Caches as the losses see them, for the queries of one step. Slots count over all caches."""

    total: int  # slots

    def draw(
        self,
        count: int,
        fn: GumbelMaxRetrievalFn,
        top_k: TopK | None,
        in_batch: Tensor | None,
    ) -> NegativeSamples:
        """Draws of the queries from the slots and, numbered behind them, the in-batch scores."""

    def choose(
        self, fn: torch.nn.Module, top_k: TopK | None, in_batch: Tensor | None
    ) -> NegativeSamples:
        """What another function chooses from all scores; perturbed has no elements."""

    def highest(self, count: int, top_k: TopK | None) -> Kept:
        """The highest of the scores that count, descending."""

    def rows(self, slots: Tensor, *keys: str) -> Tables:
        """Rows of tables, (B * n, ...) for slots (B, n); those of slots outside mean nothing."""

    def fail_together(self, action: str) -> AbstractContextManager[None]:
        """Raise on all processes that share the caches if the block raises on any."""

    def updates(self, slots: Tensor, fresh: Tables) -> Updates:
        """By name of a cache of this process: what to store, where, and which of it.

        Args:
            slots: (B, n), where -1 is not stored.
            fresh: (B * n, ...) rows of the tables of the embeddings.
        """


class LocalCaches:
    """The caches of this process alone."""

    def __init__(
        self,
        cache: JoinedCache,
        queries: Tensor,
        transform: Transform | None,
        items: Tables | None,
    ) -> None:
        self._cache = cache
        self._scored = (queries, cache, transform, _excluded(cache, items))
        self.total = cache.size
        rank = torch.distributed.get_rank() if is_distributed() else 0
        self._first_query = rank * _QUERIES_OF_A_RANK

    def draw(
        self,
        count: int,
        fn: GumbelMaxRetrievalFn,
        top_k: TopK | None,
        in_batch: Tensor | None,
    ) -> NegativeSamples:
        rng = fn.rng_on(self._cache.device)
        how = Draw(count, fn.inv_temp, rng, self._first_query)
        found = draw_top_k(*self._scored, how, top_k) if top_k else draw(*self._scored, how)
        found = _with_in_batch(found, in_batch, self.total, how)
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
    """The caches of all ranks as one: rank r has the slots behind those of rank r - 1.

    Every rank scores the queries of all ranks with its own slots; candidates, rows and refreshed
    embeddings travel. All methods are collectives.
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
        whole = [self._unpadded(tensor) for tensor in gathered]
        everyone = dict(zip(sent, whole, strict=True))
        all_queries = everyone.pop("")
        excluded = _excluded(cache, everyone if items is not None else None)
        self._scored = (all_queries, cache, transform, excluded)

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
                of_all = draw(*self._scored, mine._replace(query_offset=0))
            parts = self._to_owners_of_queries(*of_all)
            found = merge_draws(NegativeSamples(*part) for part in parts)
        found = _with_in_batch(found, in_batch, self.total, mine)
        rng.advance()
        return found

    def choose(
        self, fn: torch.nn.Module, top_k: TopK | None, in_batch: Tensor | None
    ) -> NegativeSamples:
        """First a slot of every rank, then a rank by the logsumexp of its scores."""
        with self.fail_together("score_transform or retrieval_fn"):
            if top_k is None:
                kept = all_scores(*self._scored)
            else:
                share, more = divmod(top_k.k, self._ranks.count)
                k = share + (self._ranks.rank < more)
                kept = keep_top_k(*self._scored, top_k._replace(k=k))
            of_all = choose_from(kept, fn, None, self.total)
            if of_all.indices.shape[1] != 1:
                raise ValueError(
                    "retrieval_fn must choose one negative of a query over ranks, got "
                    f"{of_all.indices.shape[1]}"
                )
        parts = [NegativeSamples(*part) for part in self._to_owners_of_queries(*of_all)]
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
        asked = self._asked(slots)
        tables = self._cache.gather(asked.flatten() - self._cache.offset, *keys)
        shaped = [t.view(*asked.shape, *t.shape[1:]) for t in tables.values()]
        answers = self._ranks.all_to_all(*shaped)
        owner = self._owner(slots.flatten())
        places = torch.arange(slots.numel(), device=slots.device)
        return {name: answer[owner, places] for name, answer in zip(tables, answers, strict=True)}

    def fail_together(self, action: str) -> AbstractContextManager[None]:
        return self._ranks.fail_together(action)

    def updates(self, slots: Tensor, fresh: Tables) -> Updates:
        """Every rank stores what any rank has refreshed of its slots."""
        asked, count = self._asked(slots), self._most * slots.shape[1]
        tables = self._ranks.all_gather(*(pad_rows(table, count) for table in fresh.values()))
        rows = {name: table.flatten(0, 1) for name, table in zip(fresh, tables, strict=True)}
        local = asked.flatten() - self._cache.offset
        return _updates(self._cache, local, rows)

    def _keep(self, top_k: TopK) -> Kept:
        """The scores that count of the queries of this rank, from the slots of all."""
        with self.fail_together("score_transform"):
            of_all = keep_top_k(*self._scored, top_k, self.total)
        if top_k.method == "exact":
            missing = (0, min(top_k.k, self.total) - of_all.scores.shape[1])
            of_all = Kept(
                torch.nn.functional.pad(of_all.scores, missing, value=-torch.inf),
                torch.nn.functional.pad(of_all.slots, missing, value=-1),
            )
        parts = [Kept(*part) for part in self._to_owners_of_queries(*of_all)]
        if top_k.method == "grouped":
            return merge_groups(parts)
        together = Kept(
            torch.cat([part.scores for part in parts], 1),
            torch.cat([part.slots for part in parts], 1),
        )
        return by_slot(highest(together, top_k.k))

    def _to_owners_of_queries(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """From (all queries, ...) to the queries of this rank, a part from every rank."""
        by_rank = [
            torch.stack([pad_rows(part, self._most) for part in tensor.split(self._batches)])
            for tensor in tensors
        ]
        mine = self._batches[self._ranks.rank]
        received = [tensor[:, :mine] for tensor in self._ranks.all_to_all(*by_rank)]
        return list(zip(*(tensor.unbind() for tensor in received), strict=True))

    def _unpadded(self, gathered: Tensor) -> Tensor:
        """(all queries, ...) from (ranks, most, ...)."""
        parts = zip(gathered, self._batches, strict=True)
        return torch.cat([part[:batch] for part, batch in parts])

    def _asked(self, slots: Tensor) -> Tensor:
        """What all ranks ask for, (ranks, most * n) from (B, n); -1 behind small batches."""
        return self._ranks.all_gather(pad_rows(slots, self._most, -1).flatten())[0]

    def _owner(self, slots: Tensor) -> Tensor:
        """The rank that has a slot; any rank for those outside."""
        last = torch.tensor([*self._starts[1:], self.total], device=slots.device)
        return torch.searchsorted(last, slots, right=True).clamp(max=self._ranks.count - 1)


def exchange_sizes(
    ranks: Ranks, slots: int, batch: int, settings: str, rng_state: Tensor
) -> tuple[list[int], list[int], Tensor]:
    """Tell all ranks how many slots and queries each rank has.

    Args:
        slots: of this rank.
        batch: queries of this rank.
        settings: text that must be the same on all ranks.
        rng_state: (2,) int64.

    Returns:
        The slots of each rank, the queries of each rank, and the rng_state of the first rank.

    Raises:
        RuntimeError: the settings differ.
    """
    digest = int.from_bytes(hashlib.sha256(settings.encode()).digest()[:7], "big")
    mine = torch.tensor([slots, batch, digest], dtype=torch.int64)
    (all_ranks,) = ranks.all_gather(torch.cat([mine, rng_state.cpu()]))
    sizes, batches, digests = all_ranks[:, :3].t().tolist()
    if different := [rank for rank, other in enumerate(digests) if other != digests[0]]:
        raise RuntimeError(
            "the embeddings, the caches' features and the options of the loss must be the same on "
            f"all ranks, got others on rank {different[0]} than on rank 0; here {settings}"
        )
    return sizes, batches, all_ranks[0, 3:]


def choose_from(
    kept: Kept, fn: torch.nn.Module, in_batch: Tensor | None, first_in_batch: int
) -> NegativeSamples:
    """What a function (B, N) -> (B, m) chooses of the scores that count, and the in-batch ones."""
    scores, slots = kept
    if in_batch is not None:
        behind = torch.arange(in_batch.shape[1], device=slots.device) + first_in_batch
        scores = torch.cat([scores, in_batch], 1)
        slots = torch.cat([slots, behind.expand_as(in_batch)], 1)
    chosen = fn(scores)
    if chosen.ndim != 2 or len(chosen) != len(scores):
        raise ValueError(
            f"retrieval_fn must return ({len(scores)}, negatives) indices, "
            f"got {tuple(chosen.shape)}"
        )
    chosen = chosen.to(scores.device)
    of_chosen = scores.gather(1, chosen.clamp(min=0))
    missing = (chosen < 0) | (of_chosen == -torch.inf)
    return NegativeSamples(
        slots.gather(1, chosen.clamp(min=0)).masked_fill(missing, -1),
        of_chosen,
        scores.logsumexp(1),
        scores.new_empty(len(scores), 0),
    )


def _with_in_batch(
    found: NegativeSamples, in_batch: Tensor | None, first: int, how: Draw
) -> NegativeSamples:
    if in_batch is None:
        return found
    return merge_draws([found, draw_from_scores(in_batch, first, how)])


def _excluded(cache: JoinedCache, items: Tables | None) -> Tensor | None:
    """(B, C) bool: which slots hold the item of a query."""
    if items is None:
        return None
    parts = []
    for one in cache.caches:
        tables = one.data.tables()
        parts.append(matches(items, {name: tables[name] for name in items}))
    return torch.cat(parts, 1)


def _updates(cache: JoinedCache, slots: Tensor, fresh: Tables) -> Updates:
    """Slots (N,) of the caches, -1 or outside: not stored."""
    updates: Updates = {}
    for name, one, start in zip(cache.names, cache.caches, cache.starts, strict=False):
        local = slots - start
        key = cache.embedding_key
        inside = (local >= 0) & (local < one.size)
        updates[name] = (one.data.values_of(fresh, key), local, inside)
    return updates
