"""Inner products of queries with sparse documents, and exact search by them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from splade_fast.sparse_rows import SparseRows

# Bounds on what a tile materialises: queries as a dense (V, queries) table, and their scores.
_QUERY_TABLE_ELEMENTS = 2**24
_TILE_SCORES = 2**22


def sparse_scores(queries: SparseRows | Tensor, docs: SparseRows) -> Tensor:
    """scores[q, n] = Σ_v queries[q, v] · docs[n, v], accumulated in fp32 (fp64 for fp64).

    Args:
        queries: SparseRows of Q rows, or dense (Q, V).
        docs: SparseRows of N rows over the same V columns.

    Returns:
        (Q, N) in the wider dtype of the two; differentiable in dense queries and in all values.

    Raises:
        TypeError, ValueError: queries and docs differ in their columns or devices.
    """
    _check_same_space(queries, docs)
    tiles = [_tile_scores(_query_table(tile), docs) for tile in _query_tiles(queries)]
    dtype = torch.promote_types(queries.dtype, docs.dtype)
    return torch.cat(tiles, dim=1).t().to(dtype)


@torch.no_grad()
def sparse_search(queries: SparseRows | Tensor, docs: SparseRows, k: int) -> tuple[Tensor, Tensor]:
    """The k documents with the highest `sparse_scores` for each query: exact, never (Q, N).

    Args:
        queries: SparseRows of Q rows, or dense (Q, V).
        docs: SparseRows of N rows over the same V columns.
        k: how many documents to return for each query; at most all N.

    Returns:
        scores (Q, min(k, N)), highest first, and document ids of the same shape, int64. Equal
        scores come by ascending id; documents that score 0 fill up the places. NaN ranks first.

    Raises:
        TypeError, ValueError: queries and docs differ in their columns or devices; k < 1.
    """
    _check_same_space(queries, docs)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    found = [_search_tile(_query_table(tile), docs, k) for tile in _query_tiles(queries)]
    dtype = torch.promote_types(queries.dtype, docs.dtype)
    return torch.cat([scores for scores, _ in found]).to(dtype), torch.cat(
        [ids for _, ids in found]
    )


def _search_tile(table: Tensor, docs: SparseRows, k: int) -> tuple[Tensor, Tensor]:
    """Best documents for the queries of one table, keeping only the k best while going on."""
    num_queries = table.shape[1]
    best_scores = table.new_empty(num_queries, 0)
    best_ids = torch.empty(num_queries, 0, dtype=torch.int64, device=table.device)
    tile_docs = max(k, _TILE_SCORES // max(num_queries, 1))
    for start in range(0, len(docs), tile_docs):
        scores = _tile_scores(table, docs[start : start + tile_docs]).t()
        ids = torch.arange(start, start + scores.shape[1], device=table.device)
        # Earlier documents stand before later ones, so position order is id order.
        candidate_scores = torch.cat([best_scores, scores], dim=1)
        candidate_ids = torch.cat([best_ids, ids.expand_as(scores)], dim=1)
        best_scores, positions = _stable_topk(candidate_scores, k)
        best_ids = candidate_ids.gather(1, positions)
    return best_scores, best_ids


def _stable_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order, equal ones by ascending position."""
    k = min(k, x.shape[1])
    values, positions = x.topk(k, dim=1)
    # topk chooses freely among entries equal to the smallest one taken. Where it had a choice,
    # and only there, sort the whole row.
    smallest = values[:, -1:]
    had_choice = (x == smallest).sum(1) > (values == smallest).sum(1)
    if had_choice.any():
        positions[had_choice] = x[had_choice].sort(dim=1, descending=True, stable=True)[1][:, :k]
    positions = positions.sort(dim=1)[0]
    values, order = x.gather(1, positions).sort(dim=1, descending=True, stable=True)
    return values, positions.gather(1, order)


def _tile_scores(table: Tensor, docs: SparseRows) -> Tensor:
    """(N, Q) scores from the (V, Q) query table: each document sums the table rows it names."""
    if len(docs) == 0 or docs.num_cols == 0:
        return table.new_zeros(len(docs), table.shape[1])
    _, columns, values = docs.coordinates()
    starts = docs.lengths.cumsum(0) - docs.lengths
    return embedding_bag(
        columns, table, starts, per_sample_weights=values.to(table.dtype), mode="sum"
    )


def _query_tiles(queries: SparseRows | Tensor) -> list[SparseRows | Tensor]:
    tile = max(1, _QUERY_TABLE_ELEMENTS // max(_num_cols(queries), 1))
    return [queries[start : start + tile] for start in range(0, max(len(queries), 1), tile)]


def _query_table(queries: SparseRows | Tensor) -> Tensor:
    """Queries as the (V, Q) table of fp32, or fp64, that documents gather from."""
    dense = queries.to_dense() if isinstance(queries, SparseRows) else queries
    return dense.t().contiguous().to(torch.promote_types(dense.dtype, torch.float32))


def _num_cols(queries: SparseRows | Tensor) -> int:
    return queries.num_cols if isinstance(queries, SparseRows) else queries.shape[1]


def _check_same_space(queries: SparseRows | Tensor, docs: SparseRows) -> None:
    if not isinstance(docs, SparseRows):
        raise TypeError(f"docs must be SparseRows, got {type(docs).__name__}")
    if not isinstance(queries, SparseRows | Tensor):
        raise TypeError(f"queries must be SparseRows or a tensor, got {type(queries).__name__}")
    if isinstance(queries, Tensor) and not (queries.dim() == 2 and queries.is_floating_point()):
        raise ValueError(
            f"queries must be floating point (queries, {docs.num_cols}), "
            f"got {queries.dtype} {tuple(queries.shape)}"
        )
    if _num_cols(queries) != docs.num_cols:
        raise ValueError(
            f"queries must have docs.num_cols = {docs.num_cols} columns, got {_num_cols(queries)}"
        )
    if queries.device != docs.device:
        raise ValueError(f"queries must be on {docs.device} as docs are, got {queries.device}")
