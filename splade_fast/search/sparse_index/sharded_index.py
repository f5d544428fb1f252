"""ShardedIndex: several SparseIndexes, which are searched as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from splade_fast._checks import check_count
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.sparse_index.allowed import to_mask
from splade_fast.search.sparse_index.sparse_index import SparseIndex


class ShardedIndex:
    """Index of the N documents of several `SparseIndex`, one shard after the other.

    `search` returns what one index of all documents returns, to the bit. The id of a document is
    its id in its shard plus the number of documents in the shards before.

    Args:
        shards: at least one index, all with the same columns and dtype.

    Raises:
        TypeError: a shard is not a SparseIndex.
        ValueError: there are none, or they differ in columns or dtype.

    Example::

        >>> docs = sf.SparseRows.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0], [2.0, 0.0]]))
        >>> parts = [docs[:1], docs[1:]]
        >>> shards = [sf.SparseIndex.build(part, show_progress=False) for part in parts]
        >>> sf.ShardedIndex(shards).search(torch.tensor([[3.0, 1.0]]), k=2)
        (tensor([[6., 3.]]), tensor([[2, 1]]))
    """

    def __init__(self, shards: Sequence[SparseIndex]) -> None:
        self._shards = list(shards)
        if not self._shards:
            raise ValueError("shards must hold at least one SparseIndex, got none")
        for number, shard in enumerate(self._shards):
            if not isinstance(shard, SparseIndex):
                raise TypeError(f"shards must be SparseIndexes, got {type(shard).__name__}")
            for name in ("num_cols", "dtype"):
                expected, got = getattr(self._shards[0], name), getattr(shard, name)
                if got != expected:
                    raise ValueError(
                        f"shards[{number}].{name} must be {expected} as in shards[0], got {got}"
                    )
        self._starts = list(accumulate(map(len, self._shards), initial=0))

    @torch.no_grad()
    def search(
        self,
        queries: SparseRows | Tensor,
        k: int,
        *,
        min_score: float | None = None,
        allowed: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the k documents with the highest scores for each query, as `SparseIndex.search`.

        Shards are searched one after the other. Where k documents of earlier shards score higher
        for all queries, a shard is searched for better ones alone.

        Args:
            queries: SparseRows of Q rows, or dense (Q, V), finite and at least 0.
            k: number of documents for each query; all N if k ≥ N.
            min_score: least score of a document, before it is rounded; None for no limit.
            allowed: documents that may be found: a mask (N,) of bool, or ids in any order.

        Returns:
            scores (Q, min(k, N)) and ids (Q, min(k, N)) int64, see `SparseIndex.search`.

        Raises:
            TypeError, ValueError, RuntimeError: see `SparseIndex.search`.

        Example::

            >>> docs = sf.SparseRows.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
            >>> shard = sf.SparseIndex.build(docs, show_progress=False)
            >>> sf.ShardedIndex([shard, shard]).search(torch.tensor([[3.0, 0.0]]), k=2)
            (tensor([[3., 3.]]), tensor([[1, 3]]))
        """
        k = check_count("k", k, 1)
        mask = None if allowed is None else to_mask(allowed, len(self))
        least = -math.inf if min_score is None else float(min_score)
        # Documents are ranked before their scores are rounded, so scores of 16 bits would not do.
        exact, dtype = self._with_exact_scores(queries)
        best: tuple[Tensor, Tensor] | None = None
        for shard, start in zip(self._shards, self._starts, strict=False):
            part = None if mask is None else mask[start : start + len(shard)]
            scores, ids = shard.search(exact, k, min_score=least, allowed=part)
            ids += start * (ids >= 0)
            best = (scores, ids) if best is None else _merge(best, (scores, ids), k)
            if best[0].numel() and best[0].shape[1] == k:
                least = max(least, float(best[0][:, -1].min()))
        assert best is not None
        return best[0].to(dtype), best[1]

    def _with_exact_scores(
        self, queries: SparseRows | Tensor
    ) -> tuple[SparseRows | Tensor, torch.dtype]:
        """Return queries whose scores are not rounded to 16 bits, and the dtype of the result."""
        if not isinstance(queries, SparseRows | Tensor):
            return queries, self.dtype  # the first shard names the error
        dtype = torch.promote_types(queries.dtype, self.dtype)
        if queries.dtype.is_floating_point and dtype.itemsize == 2:
            return queries.to(dtype=torch.float32), dtype
        return queries, dtype

    @property
    def num_cols(self) -> int:
        """Number of columns, V."""
        return self._shards[0].num_cols

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self._shards[0].dtype

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        return (
            f"ShardedIndex({len(self._shards)} shards, {len(self)} documents, "
            f"num_cols={self.num_cols}, dtype={self.dtype})"
        )


def _merge(
    best: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """Return the k best of both; of equal scores those of `best`, which have lower ids."""
    scores, ids = (torch.cat(pair, dim=1) for pair in zip(best, found, strict=True))
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], ids.gather(1, order)[:, :k]
