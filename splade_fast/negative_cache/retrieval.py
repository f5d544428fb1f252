"""Scores of queries and joined caches, and draws from them, by tiles: (B, C) never exists."""

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

_TILE_SCORES = 1 << 19  # scores of a tile


class Draw(NamedTuple):
    """Settings of a draw."""

    draws: int  # of each query
    inv_temp: float
    rng: Philox  # is not advanced here
    query_offset: int = 0


class TopK(NamedTuple):
    """Number and choice of the scores that count: "exact" or "grouped", see the losses."""

    k: int
    method: str


class Kept(NamedTuple):
    """Scores that count, and their slots, ascending; -inf and -1 fill up rows with fewer."""

    scores: Tensor  # (B, k)
    slots: Tensor  # (B, k) int64


class JoinedCache:
    """Caches concatenated in the order of their names.

    Args:
        caches: by name.
        embedding_key: the feature that queries are scored against.
        count_empty_slots: count slots without an item like all others.
        offset: number of the first slot among those of all shards.
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
        """Yield (first slot, embeddings on the device, valid) of at most `most` slots each.

        Pinned embeddings always come by tiles; others come whole where `most` is None.
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
        """Return rows of tables, (N, ...) for slots (N,); rows of slots outside are arbitrary."""
        rows: Tables = {}
        for start, cache in zip(self.starts, self.caches, strict=False):
            inside = (slots >= start) & (slots < start + cache.size)
            found = cache.gather((slots - start).clamp(0, cache.size - 1), *keys)
            if not rows:
                rows = found
                continue
            for name, table in found.items():
                shape = (-1,) + (1,) * (table.ndim - 1)
                rows[name] = torch.where(inside.view(shape), table, rows[name])
        return rows


def tile_scores(queries: Tensor, embeddings: Value, transform: Transform | None) -> Tensor:
    """Return transform(q · e), (B, T), in the accumulation dtype."""
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
    """Yield (first slot, scores (B, T)) of all tiles; -inf for slots that do not count."""
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
    """Return the scores of all slots, (B, C), for functions that need them."""
    tiles = [scores for _, scores in score_tiles(queries, cache, transform, exclude)]
    scores = torch.cat(tiles, 1)
    slots = torch.arange(cache.size, device=scores.device) + cache.offset
    return Kept(scores, slots.expand_as(scores))


def draw(
    queries: Tensor,
    cache: JoinedCache,
    transform: Transform | None,
    exclude: Tensor | None,
    how: Draw,
) -> NegativeSamples:
    """Draw from all slots of a cache; indices count from the first slot of all shards.

    Without a transform other than a scale, one pass computes the scores and draws. Otherwise the
    draw goes by tiles, with the same noise.
    """
    parts = []
    scale = _find_scale(transform)
    if scale is not None:
        for start, embeddings, valid in cache.pieces():
            excluded = None if exclude is None else exclude[:, start : start + len(embeddings)]
            found = sample_negatives(
                queries,
                embeddings,
                num_samples=how.draws,
                scale=scale,
                inv_temp=how.inv_temp,
                valid=valid,
                exclude=excluded,
                rng=how.rng.clone(),
                slot_offset=cache.offset + start,
                query_offset=how.query_offset,
            )
            parts.append(_add_offset(found, cache.offset + start))
    else:
        for start, scores in score_tiles(queries, cache, transform, exclude):
            parts.append(draw_from_scores(scores, cache.offset + start, how))
    return merge_draws(parts)


def draw_top_k(
    queries: Tensor,
    cache: JoinedCache,
    transform: Transform | None,
    exclude: Tensor | None,
    how: Draw,
    top_k: TopK,
) -> NegativeSamples:
    """Draw from the scores that count, in one pass for a single cache on the device."""
    scale = _find_scale(transform)
    pieces = list(cache.pieces())
    if scale is None or len(pieces) > 1:
        return draw_from_kept(keep_top_k(queries, cache, transform, exclude, top_k), how)
    ((_, embeddings, valid),) = pieces
    return sample_negatives(
        queries,
        embeddings,
        num_samples=how.draws,
        scale=scale,
        inv_temp=how.inv_temp,
        top_k=top_k.k,
        top_k_method=top_k.method,
        valid=valid,
        exclude=exclude,
        rng=how.rng.clone(),
        query_offset=how.query_offset,
    )


def _find_scale(transform: Transform | None) -> float | None:
    """Return the factor of a transform that only scales, else None."""
    if transform is None:
        return 1.0
    return transform.factor if isinstance(transform, Scale) else None


def draw_from_scores(scores: Tensor, slot_offset: int, how: Draw) -> NegativeSamples:
    """Draw from scores (B, T) of the slots from slot_offset on; indices include the offset."""
    found = sample_scores(
        scores,
        None,
        how.rng,
        num_samples=how.draws,
        inv_temp=how.inv_temp,
        slot_offset=slot_offset,
        query_offset=how.query_offset,
    )
    return _add_offset(found, slot_offset)


def draw_from_kept(kept: Kept, how: Draw) -> NegativeSamples:
    """Draw from the scores that count, with the noise of their slots."""
    return sample_scores(
        kept.scores,
        kept.slots.clamp(min=0),
        how.rng,
        num_samples=how.draws,
        inv_temp=how.inv_temp,
        query_offset=how.query_offset,
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
    """Return the scores that count: the highest of every group, or the highest of all.

    Args:
        total: number of slots of all shards, for groups over all shards; None: groups over the
            slots of this cache. Slots count from the first slot of all shards.
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
    """Return the highest scores of each query, descending; NaN first, equal scores by slot."""
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
        better = _better(part.scores, best.scores)
        best = Kept(
            torch.where(better, part.scores, best.scores),
            torch.where(better, part.slots, best.slots),
        )
    assert best is not None
    return best


def _keep_better(best: Kept, group: int, value: Tensor, slot: Tensor) -> None:
    better = _better(value, best.scores[:, group])
    best.scores[:, group] = torch.where(better, value, best.scores[:, group])
    best.slots[:, group] = torch.where(better, slot, best.slots[:, group])


def _better(new: Tensor, old: Tensor) -> Tensor:
    """Return where new scores replace old ones: greater ones, and NaN over numbers."""
    return (new > old) | (new.isnan() & ~old.isnan())


class _Groups:
    """Contiguous groups of slots; the first groups have one slot more where sizes are uneven."""

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
    """Add the number of the first slot to the indices; -1 stays."""
    return found._replace(indices=torch.where(found.indices < 0, -1, found.indices + first))
