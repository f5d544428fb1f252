"""Hits of a search: the documents that share a term with the query."""

from __future__ import annotations

import warnings

import torch.distributed as dist
from torch import Tensor

from splade_fast._distributed import is_distributed
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.lines import DataWarning

Hit = tuple[int, float]


def list_hits(scores: Tensor, found: Tensor) -> list[list[Hit]]:
    """Return the hits of each query as pairs (document number, score), best first.

    `sparse_search` fills the places behind the last hit with documents that score 0. They and
    documents whose score is NaN are left out.

    Args:
        scores: (Q, k), the scores that `sparse_search` returns.
        found: (Q, k), document numbers.

    Example::

        >>> from splade_fast.search.hits import list_hits
        >>> list_hits(torch.tensor([[2.0, 0.0]]), torch.tensor([[7, 3]]))
        [[(7, 2.0)]]
    """
    count = int(scores.isnan().any(1).sum())
    if count:
        warn_of_data(
            f"{count} of {len(scores)} queries have scores that are NaN, which do not count"
        )
    return [
        [(document, score) for document, score in zip(row, row_scores, strict=True) if score > 0]
        for row, row_scores in zip(found.tolist(), scores.tolist(), strict=True)
    ]


def warn_of_empty_vectors(queries: SparseRows, documents: SparseRows | None = None) -> None:
    """Warn of vectors without entries, which match nothing."""
    parts = [
        f"{count} of {len(rows)} {name}"
        for name, rows in (("queries", queries), ("documents", documents))
        if rows is not None and (count := count_empty_vectors(rows))
    ]
    if parts:
        warn_of_data(f"{' and '.join(parts)} have empty vectors, which match nothing")


def count_empty_vectors(rows: SparseRows) -> int:
    """Return the number of rows without entries."""
    return int((rows.lengths == 0).sum())


def warn_of_data(message: str) -> None:
    """Warn of data once for all ranks."""
    if not is_distributed() or dist.get_rank() == 0:
        warnings.warn(message, DataWarning, stacklevel=3)
