"""score in plain PyTorch: inner products of dense queries with padded sparse documents."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_scores(query_rows: Tensor, doc_indices: Tensor, doc_values: Tensor) -> Tensor:
    """Compute scores[q, n] = Σ_j query_rows[q, doc_indices[n, j]] · doc_values[n, j].

    Args:
        query_rows: (Q, V).
        doc_indices: (N, K) integer; unused slots hold -1.
        doc_values: (N, K).

    Returns:
        (Q, N).
    """
    used = doc_indices >= 0
    gathered = query_rows[:, doc_indices.clamp(min=0).long()]
    return torch.where(used, gathered * doc_values, 0).sum(-1)


def sparse_search(
    query_rows: Tensor, doc_indices: Tensor, doc_values: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return the k documents with the highest scores for each query; equal scores by ascending id.

    Returns:
        scores (Q, k) and document ids (Q, k) int64; fewer columns if there are fewer documents.
    """
    scores = sparse_scores(query_rows, doc_indices, doc_values)
    ranked, ids = scores.sort(dim=1, descending=True, stable=True)
    return ranked[:, :k], ids[:, :k]
