"""Scores of queries against joined caches, and draws from the scores.

Scores are computed by tiles, so that all (B, C) scores are never in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from splade_fast.negative_cache.features import Tables, Value
from splade_fast.negative_cache.negative_cache import NegativeCache
from splade_fast.negative_cache.transforms import Scale
from splade_fast.ops.autograd import accumulation_dtype
from splade_fast.ops.rng import Philox
from splade_fast.ops.sample import NegativeSamples, sample_negatives, sample_scores
from splade_fast.ops.score import sparse_scores
from splade_fast.ops.sparse_rows import SparseRows

Transform = Callable[[Tensor], Tensor]

_TILE_SCORES = 1 << 19  # number of scores in a tile


class Draw(NamedTuple):
    """Settings of a draw."""

    draws: int  # number of draws for each query
    inv_temp: float
    rng: Philox  # the caller advances the generator
    query_offset: int = 0


class TopK(NamedTuple):
    """Number of scores kept for each query, and method of choosing them, "exact" or "grouped"."""

    k: int
    method: str


class Kept(NamedTuple):
    """Kept scores in ascending order of their slots, padded with scores -inf and slots -1."""

    scores: Tensor  # (B, k)
    slots: Tensor  # (B, k) int64


class JoinedCache:
    """Caches concatenated in the order of their names.

    Args:
        caches: caches by name.
        embedding_key: name of the feature that holds the embeddings.
        count_empty_slots: whether slots without an item count as documents.
        offset: position of the first slot among the slots of all shards.
    """

    def __init__(
        self,
        caches: Mapping[str, NegativeCache],
        embedding_key: str,
        *,
        count_empty_slots: bool = False,
        offset: int = 0,
    ) -> None:
        self.names = sorted(caches)
        self.caches = [caches[name] for name in self.names]
        self.starts = [0]
        for cache in self.caches:
            self.starts.append(self.starts[-1] + cache.size)
        self.size = self.starts[-1]
        self.offset = offset
        self.embedding_key = embedding_key
        self._count_empty_slots = count_empty_slots

    @property
    def device(self) -> torch.device:
        return self.caches[0].device

    def dims(self) -> list[int]:
        """Return the number of columns of the embeddings of each cache."""
        embeddings = [cache.data[self.embedding_key] for cache in self.caches]
        return [
            one.num_cols if isinstance(one, SparseRows) else one[:1].numel() for one in embeddings
        ]

    def pieces(self, most: int | None = None) -> Iterator[tuple[int, Value, Tensor | None]]:
        """Yield (first slot, embeddings on the device, valid) for pieces of at most `most` slots.

        Without `most`, embeddings on the device are one piece for each cache. Pinned embeddings
        are always split into tiles.
        """
        for start, cache in zip(self.starts, self.caches, strict=False):
            embeddings = cache.data[self.embedding_key]
            step = most or cache.size
            if embeddings.device != cache.device:
                step = min(step, _TILE_SCORES >> 4)
            for first in range(0, cache.size, max(step, 1)):
                rows = slice(first, min(first + step, cache.size))
                valid = None if self._count_empty_slots else cache.valid[rows]
                yield start + first, embeddings[rows].to(cache.device, non_blocking=True), valid

    def gather(self, slots: Tensor, *keys: str) -> Tables:
        """Return rows (N, ...) of the tables for slots (N,), arbitrary for invalid slots."""
        rows: Tables = {}
        for start, cache in zip(self.starts, self.caches, strict=False):
            inside_mask = (slots >= start) & (slots < start + cache.size)
            found = cache.gather((slots - start).clamp(0, cache.size - 1), *keys)
            if not rows:
                rows = found
                continue
            for name, table in found.items():
                shape = (-1,) + (1,) * (table.ndim - 1)
                rows[name] = torch.where(inside_mask.view(shape), table, rows[name])
        return rows


def tile_scores(queries: Tensor, embeddings: Value, transform: Transform | None) -> Tensor:
    """Return the scores transform(q · e), (B, T), in the accumulation dtype."""
    acc = accumulation_dtype(torch.promote_types(queries.dtype, embeddings.dtype))
    if isinstance(embeddings, SparseRows):
        scores = sparse_scores(queries.to(dtype=acc), embeddings)
    else:
        with torch.autocast(embeddings.device.type, enabled=False):
            scores = queries.to(acc) @ embeddings.to(acc).t()
    return scores if transform is None else transform(scores)


def score_tiles(
    queries: Tensor, cache: JoinedCache, transform: Transform | None, exclude: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first slot, scores (B, T)) of each tile; scores of masked slots are -inf."""
    most = max(1, _TILE_SCORES // max(1, len(queries)))
    for start, embeddings, valid in cache.pieces(most):
        scores = tile_scores(queries, embeddings, transform)
        if valid is not None:
            scores = scores.masked_fill(~valid, -torch.inf)
        if exclude is not None:
            scores = scores.masked_fill(exclude[:, start : start + len(embeddings)], -torch.inf)
        yield start, scores


def all_scores(
    queries: Tensor, cache: JoinedCache, transform: Transform | None, exclude: Tensor | None
) -> Kept:
    """Return the scores of all slots, (B, C)."""
    tiles = [scores for _, scores in score_tiles(queries, cache, transform, exclude)]
    scores = torch.cat(tiles, 1)
    slots = torch.arange(cache.size, device=scores.device) + cache.offset
    return Kept(scores, slots.expand_as(scores))


def draw(
    queries: Tensor,
    cache: JoinedCache,
    transform: Transform | None,
    exclude: Tensor | None,
    settings: Draw,
) -> NegativeSamples:
    """Draw from all slots of a cache. Indices are positions among the slots of all shards.

    If the transform is a scale or None, one pass computes the scores and draws. Otherwise the
    scores are drawn from tile by tile, with the same noise.
    """
    parts = []
    scale = _find_scale(transform)
    if scale is not None:
        for start, embeddings, valid in cache.pieces():
            excluded = None if exclude is None else exclude[:, start : start + len(embeddings)]
            found = sample_negatives(
                queries,
                embeddings,
                num_samples=settings.draws,
                scale=scale,
                inv_temp=settings.inv_temp,
                valid=valid,
                exclude=excluded,
                rng=settings.rng.clone(),
                slot_offset=cache.offset + start,
                query_offset=settings.query_offset,
            )
            parts.append(_add_offset(found, cache.offset + start))
    else:
        for start, scores in score_tiles(queries, cache, transform, exclude):
            parts.append(draw_from_scores(scores, cache.offset + start, settings))
    return merge_draws(parts)


def draw_top_k(
    queries: Tensor,
    cache: JoinedCache,
    transform: Transform | None,
    exclude: Tensor | None,
    settings: Draw,
    top_k: TopK,
) -> NegativeSamples:
    """Draw from the kept scores, in one pass for a single cache on the device."""
    scale = _find_scale(transform)
    pieces = list(cache.pieces())
    if scale is None or len(pieces) > 1:
        return draw_from_kept(keep_top_k(queries, cache, transform, exclude, top_k), settings)
    ((_, embeddings, valid),) = pieces
    return sample_negatives(
        queries,
        embeddings,
        num_samples=settings.draws,
        scale=scale,
        inv_temp=settings.inv_temp,
        top_k=top_k.k,
        top_k_method=top_k.method,
        valid=valid,
        exclude=exclude,
        rng=settings.rng.clone(),
        query_offset=settings.query_offset,
    )


def _find_scale(transform: Transform | None) -> float | None:
    """Return the factor of a transform that only scales, or None for other transforms."""
    if transform is None:
        return 1.0
    return transform.factor if isinstance(transform, Scale) else None


def draw_from_scores(scores: Tensor, slot_offset: int, settings: Draw) -> NegativeSamples:
    """Draw from scores (B, T) of slots that start at slot_offset; indices include the offset."""
    found = sample_scores(
        scores,
        None,
        settings.rng,
        num_samples=settings.draws,
        inv_temp=settings.inv_temp,
        slot_offset=slot_offset,
        query_offset=settings.query_offset,
    )
    return _add_offset(found, slot_offset)


def draw_from_kept(kept: Kept, settings: Draw) -> NegativeSamples:
    """Draw from kept scores, with the noise of their slots."""
    return sample_scores(
        kept.scores,
        kept.slots.clamp(min=0),
        settings.rng,
        num_samples=settings.draws,
        inv_temp=settings.inv_temp,
        query_offset=settings.query_offset,
    )


def merge_draws(parts: Iterable[NegativeSamples]) -> NegativeSamples:
    """Merge the draws from several parts, given in the order of their slots."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    count = parts[0].perturbed.shape[1]
    perturbed = torch.cat([part.perturbed for part in parts], 1)
    ranked, order = perturbed.sort(dim=1, descending=True, stable=True)
    order = order[:, :count]
    return NegativeSamples(
        torch.cat([part.indices for part in parts], 1).gather(1, order),
        torch.cat([part.scores for part in parts], 1).gather(1, order),
        torch.stack([part.logsumexp for part in parts]).logsumexp(0),
        ranked[:, :count],
    )


def keep_top_k(
    queries: Tensor,
    cache: JoinedCache,
    transform: Transform | None,
    exclude: Tensor | None,
    top_k: TopK,
    total: int | None = None,
) -> Kept:
    """Keep the highest score of every group, or the k highest scores of all.

    Slots are positions among the slots of all shards.

    Args:
        total: number of slots of all shards, for groups over all shards; None: groups over the
            slots of this cache.
    """
    tiles = score_tiles(queries, cache, transform, exclude)
    if top_k.method == "exact":
        kept = None
        for start, scores in tiles:
            slots = torch.arange(scores.shape[1], device=scores.device) + cache.offset + start
            new = Kept(scores, slots.expand_as(scores))
            kept = highest(new if kept is None else _concatenate(kept, new), top_k.k)
        assert kept is not None
        return sort_by_slot(kept)
    groups = _Groups(cache.size if total is None else total, top_k.k)
    offset = 0 if total is None else cache.offset
    best: Kept | None = None
    for start, scores in tiles:
        if best is None:
            empty = scores.new_full((len(scores), groups.count), -torch.inf)
            best = Kept(empty, torch.full_like(empty, -1, dtype=torch.int64))
        first = offset + start
        last = first + scores.shape[1]
        group = groups.find(first)
        while first < last:
            stop = min(groups.start(group + 1), last)
            piece = scores[:, first - offset - start : stop - offset - start]
            value, place = piece.max(1)
            _keep_better(best, group, value, place + first - offset + cache.offset)
            first, group = stop, group + 1
    assert best is not None
    return best


def highest(kept: Kept, count: int) -> Kept:
    """Return the `count` highest scores of each query, descending.

    NaN comes before all numbers. Equal scores are in the order of their slots.
    """
    scores, order = kept.scores.sort(dim=1, descending=True, stable=True)
    order = order[:, :count]
    return Kept(scores[:, :count], kept.slots.gather(1, order))


def sort_by_slot(kept: Kept) -> Kept:
    """Return the scores in ascending order of their slots."""
    slots, order = kept.slots.sort(dim=1)
    return Kept(kept.scores.gather(1, order), slots)


def merge_groups(parts: Iterable[Kept]) -> Kept:
    """Merge the maxima of groups of several shards, given in the order of their slots."""
    best: Kept | None = None
    for part in parts:
        if best is None:
            best = Kept(part.scores.clone(), part.slots.clone())
            continue
        better_mask = _better_mask(part.scores, best.scores)
        best = Kept(
            torch.where(better_mask, part.scores, best.scores),
            torch.where(better_mask, part.slots, best.slots),
        )
    assert best is not None
    return best


def _keep_better(best: Kept, group: int, value: Tensor, slot: Tensor) -> None:
    better_mask = _better_mask(value, best.scores[:, group])
    best.scores[:, group] = torch.where(better_mask, value, best.scores[:, group])
    best.slots[:, group] = torch.where(better_mask, slot, best.slots[:, group])


def _better_mask(new: Tensor, old: Tensor) -> Tensor:
    """Return True where a new score is greater than the old one, or is NaN and the old is not."""
    return (new > old) | (new.isnan() & ~old.isnan())


class _Groups:
    """Contiguous groups of slots. The first `slots % count` groups have one slot more."""

    def __init__(self, slots: int, count: int) -> None:
        self.count = min(count, slots)
        self._size, self._longer = divmod(slots, self.count)

    def start(self, group: int) -> int:
        return group * self._size + min(group, self._longer)

    def find(self, slot: int) -> int:
        in_longer = self._longer * (self._size + 1)
        if slot < in_longer:
            return slot // (self._size + 1)
        return self._longer + (slot - in_longer) // self._size


def _concatenate(left: Kept, right: Kept) -> Kept:
    return Kept(torch.cat([left.scores, right.scores], 1), torch.cat([left.slots, right.slots], 1))


def _add_offset(found: NegativeSamples, first: int) -> NegativeSamples:
    """Add the position of the first slot to the indices, except to -1."""
    return found._replace(indices=torch.where(found.indices < 0, -1, found.indices + first))
