"""score: inner products of queries with sparse documents, and exact search by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from splade_fast import _library
from splade_fast._checks import check_count
from splade_fast.ops.autograd import accumulation_dtype, refuse_double_backward
from splade_fast.ops.sparse_rows import SparseRows

# Where search goes by tiles, not on the CPU: queries at a time, and the scores of a tile.
_QUERIES_AT_ONCE = 1024
_TILE_SCORES = 2**24


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
    check_same_space(queries, docs)
    if _library.has_kernels(docs.device):
        scores: Tensor = torch.ops.splade_fast.sparse_scores(*op_tensors(queries, docs))
        return scores
    dtype = torch.promote_types(queries.dtype, docs.dtype)
    return plain_scores(queries, docs).to(dtype)


@torch.no_grad()
def sparse_search(queries: SparseRows | Tensor, docs: SparseRows, k: int) -> tuple[Tensor, Tensor]:
    """The k documents with the highest `sparse_scores` for each query: exact, never (Q, N).

    On the CPU, documents are read once for every 64 queries, front to back, which suits
    memory-mapped ones (`SparseRows.load`). For queries on a GPU, documents may also stay in host
    memory; they are copied tile by tile, without blocking if they are pinned.

    Args:
        queries: SparseRows of Q rows, or dense (Q, V).
        docs: SparseRows of N rows over the same V columns.
        k: how many documents to return for each query; at most all N.

    Returns:
        scores (Q, min(k, N)), highest first, and document ids of the same shape, int64. Equal
        scores come by ascending id; documents that score 0 fill up the places. NaN ranks first.
        Ranked before the scores are rounded to their dtype.

    Raises:
        TypeError, ValueError: queries and docs differ in their columns or devices; k is no
            integer of at least 1.
        RuntimeError: on the CPU, a length or a used index is out of its range.
    """
    check_same_space(queries, docs, docs_on_host=True)
    k = check_count("k", k, 1)
    if _library.has_kernels(queries.device):
        result: tuple[Tensor, Tensor] = torch.ops.splade_fast.sparse_search(
            *op_tensors(queries, docs), k
        )
        return result
    return _search_by_tiles(queries, docs, k)


def op_tensors(queries: SparseRows | Tensor, docs: SparseRows) -> tuple[Any, ...]:
    """The arguments that all ops here share."""
    ours = (
        (queries.indices, queries.values, queries.lengths)
        if isinstance(queries, SparseRows)
        else (None, queries, None)
    )
    return *ours, docs.indices, docs.values, docs.lengths, docs.num_cols


def _from_tensors(
    indices: Tensor | None, values: Tensor, lengths: Tensor | None, num_cols: int
) -> Any:
    """The inverse of `op_tensors` for one side."""
    if indices is None or lengths is None:
        return values
    return SparseRows(indices, values, lengths, num_cols)


def _search_by_tiles(
    queries: SparseRows | Tensor, docs: SparseRows, k: int
) -> tuple[Tensor, Tensor]:
    """Search by the scores of tiles of documents, keeping only the k best while going on.

    Nothing waits for a GPU. Documents may be in host memory, also where queries are not: a tile is
    copied when its turn comes, without blocking if it is pinned.
    """
    dtype = torch.promote_types(queries.dtype, docs.dtype)
    found = [
        _search_at_once(queries[start : start + _QUERIES_AT_ONCE], docs, k)
        for start in range(0, max(len(queries), 1), _QUERIES_AT_ONCE)
    ]
    return torch.cat([scores for scores, _ in found]).to(dtype), torch.cat(
        [ids for _, ids in found]
    )


def _search_at_once(
    queries: SparseRows | Tensor, docs: SparseRows, k: int
) -> tuple[Tensor, Tensor]:
    device = queries.device
    has_kernels = _library.has_kernels(device)
    acc = accumulation_dtype(torch.promote_types(queries.dtype, docs.dtype))
    queries = queries.to(dtype=acc)  # so that scores are ranked before they are rounded
    best_scores = torch.empty(len(queries), 0, dtype=acc, device=device)
    best_ids = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    tile_docs = max(k, _TILE_SCORES // max(len(queries), 1))
    for start in range(0, len(docs), tile_docs):
        tile = docs[start : start + tile_docs].to(device, non_blocking=True)
        if has_kernels:
            scores = torch.ops.splade_fast.sparse_scores(*op_tensors(queries, tile))
        else:
            scores = plain_scores(queries, tile)
        ids = torch.arange(start, start + len(tile), device=device).expand_as(scores)
        best_scores, best_ids = _best(
            torch.cat([best_scores, scores], dim=1), torch.cat([best_ids, ids], dim=1), k
        )
    return best_scores, best_ids


def _best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order, equal ones by ascending id, NaN first.

    Of equal scores the one with the lower id has to stand first.
    """
    k = min(k, scores.shape[1])
    if scores.dtype == torch.float64 or k == scores.shape[1]:
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return scores[:, :k], ids.gather(1, order)[:, :k]
    # topk chooses freely among equal entries, so it gets none: integers in the order of the scores
    # with the positions, reversed, in the lower half.
    top = torch.iinfo(torch.int32).max
    bits = torch.where(scores == 0, 0, scores).view(torch.int32)
    keys = torch.where(scores.isnan(), top, torch.where(bits < 0, bits ^ top, bits))
    positions = torch.arange(scores.shape[1], device=scores.device)
    words = (keys.long() << 32) | (top - positions)
    taken = top - (words.topk(k, dim=1)[0] & top)
    return scores.gather(1, taken), ids.gather(1, taken)


def plain_scores(queries: SparseRows | Tensor, docs: SparseRows) -> Tensor:
    """(Q, N) in the accumulation dtype: each document sums the rows of the table it names."""
    acc = accumulation_dtype(torch.promote_types(queries.dtype, docs.dtype))
    table = _query_table(queries, acc)
    if len(docs) == 0 or table.numel() == 0:
        return table.new_zeros(table.shape[1], len(docs))
    _, columns, values = docs.coordinates()
    starts = docs.lengths.cumsum(0) - docs.lengths
    scores = embedding_bag(
        columns, table, starts, per_sample_weights=values.to(table.dtype), mode="sum"
    )
    return scores.t()


def _query_table(queries: SparseRows | Tensor, dtype: torch.dtype) -> Tensor:
    """Queries as the (V, Q) table that documents gather from."""
    dense = queries.to_dense() if isinstance(queries, SparseRows) else queries
    return dense.t().contiguous().to(dtype)


def _num_cols(queries: SparseRows | Tensor) -> int:
    return queries.num_cols if isinstance(queries, SparseRows) else queries.shape[1]


def check_same_space(
    queries: SparseRows | Tensor,
    docs: SparseRows,
    *,
    docs_name: str = "docs",
    docs_on_host: bool = False,
) -> None:
    """Both are what they should be, over the same columns and on the same device."""
    if not isinstance(docs, SparseRows):
        raise TypeError(f"{docs_name} must be SparseRows, got {type(docs).__name__}")
    if not isinstance(queries, SparseRows | Tensor):
        raise TypeError(f"queries must be SparseRows or a tensor, got {type(queries).__name__}")
    if isinstance(queries, Tensor) and not (queries.dim() == 2 and queries.is_floating_point()):
        raise ValueError(
            f"queries must be floating point (queries, {docs.num_cols}), "
            f"got {queries.dtype} {tuple(queries.shape)}"
        )
    if _num_cols(queries) != docs.num_cols:
        raise ValueError(
            f"queries must have {docs_name}.num_cols = {docs.num_cols} columns, "
            f"got {_num_cols(queries)}"
        )
    if docs_on_host and docs.device.type == "cpu" and queries.device.type == "cuda":
        return
    if queries.device != docs.device:
        raise ValueError(
            f"queries must be on {docs.device} as {docs_name} are, got {queries.device}"
        )


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


def _sparse_search_cuda(
    query_indices: Tensor | None,
    query_values: Tensor,
    query_lengths: Tensor | None,
    doc_indices: Tensor,
    doc_values: Tensor,
    doc_lengths: Tensor,
    num_cols: int,
    k: int,
) -> tuple[Tensor, Tensor]:
    queries = _from_tensors(query_indices, query_values, query_lengths, num_cols)
    return _search_by_tiles(queries, SparseRows(doc_indices, doc_values, doc_lengths, num_cols), k)


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
    queries = _from_tensors(query_indices, query_values, query_lengths, num_cols)
    by_doc = grad.t().to(acc).contiguous()
    return (
        _query_gradient(by_doc, queries, docs) if needs_query else query_values.new_empty(0),
        _doc_gradient(by_doc, queries, docs) if needs_doc else doc_values.new_empty(0),
    )


def _doc_gradient(by_doc: Tensor, queries: SparseRows | Tensor, docs: SparseRows) -> Tensor:
    """Of docs.values, from the (N, Q) gradient of the scores in the accumulation dtype."""
    gradient = torch.zeros_like(docs.values)
    rows, columns, _ = docs.coordinates()
    if len(rows) > 0 and len(queries) > 0:
        # The dot product of a table row with a row of the gradient, for each entry.
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            by_doc,
            _query_table(queries, by_doc.dtype),
            columns,
            docs.lengths.long().cumsum(0) - docs.lengths,
            rows,
            0,
        )
        gradient[docs.indices >= 0] = dots.to(gradient.dtype)
    return gradient


def _query_gradient(by_doc: Tensor, queries: SparseRows | Tensor, docs: SparseRows) -> Tensor:
    """Of queries, or their values, from the (N, Q) gradient of the scores, likewise."""
    table = by_doc.new_zeros(docs.num_cols, len(queries))
    rows, columns, entries = docs.coordinates()
    if table.numel() > 0 and len(rows) > 0:
        order = columns.argsort(stable=True)
        counts = torch.bincount(columns, minlength=docs.num_cols)
        table = embedding_bag(
            rows[order],
            by_doc,
            counts.cumsum(0) - counts,
            per_sample_weights=entries[order].to(by_doc.dtype),
            mode="sum",
        )
    dense = table.t().to(queries.dtype)
    if not isinstance(queries, SparseRows):
        return dense.contiguous()
    gradient = torch.zeros_like(queries.values)
    rows, slots = (queries.indices >= 0).nonzero(as_tuple=True)
    gradient[rows, slots] = dense[rows, queries.indices[rows, slots].long()]
    return gradient


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
    torch.library.impl("splade_fast::sparse_search", "CUDA", _sparse_search_cuda)
    torch.library.register_autograd(
        "splade_fast::sparse_scores", _backward, setup_context=_setup_context
    )
    refuse_double_backward("sparse_scores_backward")
