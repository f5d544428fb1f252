"""score: inner products of queries with sparse documents, and exact search by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from splade_fast import _library
from splade_fast.ops._autograd import accumulation_dtype, refuse_double_backward
from splade_fast.sparse_rows import SparseRows

# Where there is no kernel of search: bounds on what a tile materialises, queries as a dense
# (V, queries) table, and their scores.
_QUERY_TABLE_ELEMENTS = 2**24
_TILE_SCORES = 2**22


def sparse_scores(queries: SparseRows | Tensor, docs: SparseRows) -> Tensor:
    """scores[q, n] = Σ_v queries[q, v] · docs[n, v], accumulated in fp32 (fp64 for fp64).

    The sum runs over the columns that docs[n] names, in ascending order; a column that a query
    lacks counts as 0 there. A score does not depend on the other queries and documents or on the
    number of threads.

    Args:
        queries: SparseRows of Q rows, or dense (Q, V).
        docs: SparseRows of N rows over the same V columns.

    Returns:
        (Q, N) in the wider dtype of the two; differentiable once in dense queries and in all
        values.

    Raises:
        TypeError, ValueError: queries and docs differ in their columns or devices.
        RuntimeError: on the CPU, a length or a used index is out of its range.
    """
    _check_same_space(queries, docs)
    if _library.has_kernels(docs.device):
        scores: Tensor = torch.ops.splade_fast.sparse_scores(*_tensors(queries, docs))
        return scores
    tiles = [_tile_scores(_query_table(tile), docs) for tile in _query_tiles(queries)]
    dtype = torch.promote_types(queries.dtype, docs.dtype)
    return torch.cat(tiles, dim=1).t().to(dtype)


@torch.no_grad()
def sparse_search(queries: SparseRows | Tensor, docs: SparseRows, k: int) -> tuple[Tensor, Tensor]:
    """The k documents with the highest `sparse_scores` for each query: exact, never (Q, N).

    Documents are read once for every 64 queries, front to back, which suits memory-mapped ones
    (`SparseRows.load`).

    Args:
        queries: SparseRows of Q rows, or dense (Q, V).
        docs: SparseRows of N rows over the same V columns.
        k: how many documents to return for each query; at most all N.

    Returns:
        scores (Q, min(k, N)), highest first, and document ids of the same shape, int64. Equal
        scores come by ascending id; documents that score 0 fill up the places. NaN ranks first.
        Ranked before the scores are rounded to their dtype.

    Raises:
        TypeError, ValueError: queries and docs differ in their columns or devices; k < 1.
        RuntimeError: on the CPU, a length or a used index is out of its range.
    """
    _check_same_space(queries, docs)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if _library.has_kernels(docs.device) and docs.device.type != "cuda":
        result: tuple[Tensor, Tensor] = torch.ops.splade_fast.sparse_search(
            *_tensors(queries, docs), k
        )
        return result
    found = [_search_tile(_query_table(tile), docs, k) for tile in _query_tiles(queries)]
    dtype = torch.promote_types(queries.dtype, docs.dtype)
    return torch.cat([scores for scores, _ in found]).to(dtype), torch.cat(
        [ids for _, ids in found]
    )


def _tensors(queries: SparseRows | Tensor, docs: SparseRows) -> tuple[Any, ...]:
    """The arguments that all ops here share."""
    ours = (
        (queries.indices, queries.values, queries.lengths)
        if isinstance(queries, SparseRows)
        else (None, queries, None)
    )
    return *ours, docs.indices, docs.values, docs.lengths, docs.num_cols


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
    had_choice |= x.isnan().any(1)  # NaN equals nothing
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


def _fake_scores(
    query_indices: Tensor | None,
    query_values: Tensor,
    query_lengths: Tensor | None,
    doc_indices: Tensor,
    doc_values: Tensor,
    doc_lengths: Tensor,
    num_cols: int,
) -> Tensor:
    dtype = torch.promote_types(query_values.dtype, doc_values.dtype)
    return query_values.new_empty((query_values.shape[0], doc_values.shape[0]), dtype=dtype)


def _fake_search(*tensors: Any) -> tuple[Tensor, Tensor]:
    *inputs, k = tensors
    query_values, doc_values = inputs[1], inputs[4]
    dtype = torch.promote_types(query_values.dtype, doc_values.dtype)
    shape = (query_values.shape[0], torch.sym_min(k, doc_values.shape[0]))
    return query_values.new_empty(shape, dtype=dtype), query_values.new_empty(
        shape, dtype=torch.int64
    )


def _fake_backward(grad: Tensor, *tensors: Any) -> tuple[Tensor, Tensor]:
    *inputs, needs_query, needs_doc = tensors
    query_values, doc_values = inputs[1], inputs[4]
    return (
        query_values.new_empty(query_values.shape if needs_query else (0,)),
        doc_values.new_empty(doc_values.shape if needs_doc else (0,)),
    )


def _sparse_scores_backward(
    grad: Tensor,
    query_indices: Tensor | None,
    query_values: Tensor,
    query_lengths: Tensor | None,
    doc_indices: Tensor,
    doc_values: Tensor,
    doc_lengths: Tensor,
    num_cols: int,
    needs_query: bool,
    needs_doc: bool,
) -> tuple[Tensor, Tensor]:
    """Of both values, on either device, in sums whose order is fixed.

    d docs[n, j] = Σ_q grad[q, n] · queries[q, docs.indices[n, j]], and
    d queries[q, v] = Σ_n grad[q, n] · docs[n, v], taken where queries have an entry.
    """
    acc = accumulation_dtype(torch.promote_types(query_values.dtype, doc_values.dtype))
    docs = SparseRows(doc_indices, doc_values, doc_lengths, num_cols)
    doc_rows, doc_columns, doc_entries = docs.coordinates()
    by_doc = grad.t().to(acc).contiguous()
    grad_query, grad_doc = query_values.new_empty(0), doc_values.new_empty(0)
    if needs_doc:
        queries: SparseRows | Tensor = query_values
        if query_indices is not None and query_lengths is not None:
            queries = SparseRows(query_indices, query_values, query_lengths, num_cols)
        grad_doc = torch.zeros_like(doc_values)
        if len(doc_rows) > 0 and len(query_values) > 0:
            # The dot product of a table row with a row of the gradient, for each entry.
            dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                by_doc,
                _query_table(queries).to(acc),
                doc_columns,
                doc_lengths.long().cumsum(0) - doc_lengths,
                doc_rows,
                0,
            )
            grad_doc[doc_indices >= 0] = dots.to(grad_doc.dtype)
    if needs_query:
        table = by_doc.new_zeros(num_cols, len(query_values))
        if table.numel() > 0 and len(doc_rows) > 0:
            order = doc_columns.argsort(stable=True)
            counts = torch.bincount(doc_columns, minlength=num_cols)
            table = embedding_bag(
                doc_rows[order],
                by_doc,
                counts.cumsum(0) - counts,
                per_sample_weights=doc_entries[order].to(acc),
                mode="sum",
            )
        dense = table.t().to(query_values.dtype)
        if query_indices is None:
            grad_query = dense.contiguous()
        else:
            grad_query = torch.zeros_like(query_values)
            rows, slots = (query_indices >= 0).nonzero(as_tuple=True)
            grad_query[rows, slots] = dense[rows, query_indices[rows, slots].long()]
    return grad_query, grad_doc


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_cols = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_query, needs_doc = ctx.needs_input_grad[1], ctx.needs_input_grad[4]
    grad_query, grad_doc = torch.ops.splade_fast.sparse_scores_backward(
        grad, *ctx.saved_tensors, ctx.num_cols, needs_query, needs_doc
    )
    return (
        None,
        grad_query if needs_query else None,
        None,
        None,
        grad_doc if needs_doc else None,
        None,
        None,
    )


if _library.cpu_library_loaded():
    torch.library.register_fake("splade_fast::sparse_scores", _fake_scores)
    torch.library.register_fake("splade_fast::sparse_search", _fake_search)
    torch.library.register_fake("splade_fast::sparse_scores_backward", _fake_backward)
    torch.library.impl(
        "splade_fast::sparse_scores_backward", ("CPU", "CUDA"), _sparse_scores_backward
    )
    torch.library.register_autograd(
        "splade_fast::sparse_scores", _backward, setup_context=_setup_context
    )
    refuse_double_backward("sparse_scores_backward")
