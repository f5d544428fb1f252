"""Utilities of the negative cache."""

from __future__ import annotations

import torch
from torch import Tensor

from splade_fast._distributed import Ranks


def approximate_top_k_with_indices(negative_scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the highest score of each of k contiguous groups of columns, and its column.

    Args:
        negative_scores: scores (B, N).
        k: number of groups, at least 1, reduced to N if greater. If k does not divide N, the first
            N % k groups have one column more than the others.

    Returns:
        Scores (B, k) and columns (B, k) int64. The first column of equal scores is returned.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    groups = negative_scores.tensor_split(min(k, negative_scores.shape[1]), 1)
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + group.shape[1])
    best = [group.max(1) for group in groups]
    indices = [places + start for (_, places), start in zip(best, starts, strict=False)]
    return torch.stack([scores for scores, _ in best], 1), torch.stack(indices, 1)


def cross_replica_concat(
    tensor: Tensor, group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """Return the rows of all ranks, (ranks * N, ...), in the order of the ranks, without gradient.

    Args:
        tensor: (N, ...), of the same shape on all ranks.
        group: group of the ranks; None: all ranks.
    """
    (gathered,) = Ranks(group).all_gather(tensor)
    return gathered.flatten(0, 1)
