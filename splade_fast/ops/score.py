"""score: inner products of queries with sparse documents, and exact search by them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from splade_fast import _library
from splade_fast._checks import check_count
from splade_fast.ops.autograd import (
    accumulation_dtype,
    refuse_double_backward,
    refuse_forward_mode,
)
from splade_fast.ops.sparse_rows import SparseRows

# Sizes of the tiles of `_search_by_tiles`: queries, and scores.
_TILE_QUERIES = 1024
_TILE_SCORES = 2**24


def sparse_scores(queries: SparseRows | Tensor, docs: SparseRows) -> Tensor:
    """Compute the inner product of each query with each document.

    scores[q, n] = Σ_v queries[q, v] · docs[n, v], accumulated in float32 (float64 for float64)

    The sum runs over the columns of docs[n] in ascending order. A score does not depend on the
    other queries and documents or on the number of threads.

    Args:
        queries: SparseRows of Q rows, or dense (Q, V).
        docs: SparseRows of N rows over the same V columns.

    Returns:
        (Q, N) in the wider dtype of the two; differentiable once in the values of both.

    Raises:
        TypeError, ValueError: queries and docs differ in their columns or devices.
        RuntimeError: a length or a used index is out of range (checked on the CPU), or a second or
            forward-mode derivative is requested.

    Example::

        >>> docs = sf.SparseRows.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        >>> sf.sparse_scores(torch.tensor([[3.0, 1.0]]), docs)
        tensor([[2., 3.]])
    """
    check_same_space(queries, docs)
    if _library.has_kernels(docs.device):
        operands = ScoreOperands.build(queries, docs)
        refuse_forward_mode("sparse_scores", operands.query_values, operands.doc_values)
        scores: Tensor = torch.ops.splade_fast.sparse_scores(*operands)
        return scores
    dtype = torch.promote_types(queries.dtype, docs.dtype)
    return plain_scores(queries, docs).to(dtype)


@torch.no_grad()
def sparse_search(queries: SparseRows | Tensor, docs: SparseRows, k: int) -> tuple[Tensor, Tensor]:
    """Return the k documents with the highest `sparse_scores` for each query.

    The search is exact and never holds all (Q, N) scores. On the CPU, documents are read front to
    back once for every 64 queries, which suits memory-mapped documents (`SparseRows.load`). With
    queries on a GPU, documents may stay in host memory: they are copied tile by tile, without
    blocking if they are pinned.

    Args:
        queries: SparseRows of Q rows, or dense (Q, V).
        docs: SparseRows of N rows over the same V columns.
        k: number of documents for each query; all N if k ≥ N.

    Returns:
        scores (Q, min(k, N)), highest first, and ids of documents (Q, min(k, N)) int64. Equal
        scores are ordered by ascending id. Documents that score 0 fill the remaining places. NaN
        ranks first. Documents are ranked before their scores are rounded to the output dtype.

    Raises:
        TypeError, ValueError: queries and docs differ in their columns or devices, or k is not an
            integer ≥ 1.
        RuntimeError: a length or a used index is out of range (checked on the CPU).

    Example::

        >>> docs = sf.SparseRows.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        >>> sf.sparse_search(torch.tensor([[3.0, 1.0]]), docs, k=1)
        (tensor([[3.]]), tensor([[1]]))
    """
    check_same_space(queries, docs, is_host_allowed=True)
    k = check_count("k", k, 1)
    if _library.has_kernels(queries.device):
        result: tuple[Tensor, Tensor] = torch.ops.splade_fast.sparse_search(
            *ScoreOperands.build(queries, docs), k
        )
        return result
    return _search_by_tiles(queries, docs, k)


class ScoreOperands(NamedTuple):
    """Arguments that the ops on queries and sparse documents share, in the order of the schemas."""

    query_indices: Tensor | None
    query_values: Tensor
    query_lengths: Tensor | None
    doc_indices: Tensor
    doc_values: Tensor
    doc_lengths: Tensor
    num_cols: int

    @classmethod
    def build(cls, queries: SparseRows | Tensor, docs: SparseRows) -> ScoreOperands:
        """Return the arguments for queries and documents."""
        doc_arguments = (docs.indices, docs.values, docs.lengths, docs.num_cols)
        if isinstance(queries, SparseRows):
            return cls(queries.indices, queries.values, queries.lengths, *doc_arguments)
        return cls(None, queries, None, *doc_arguments)

    @property
    def queries(self) -> SparseRows | Tensor:
        """Queries as they were passed to `build`."""
        if self.query_indices is None or self.query_lengths is None:
            return self.query_values
        return SparseRows(self.query_indices, self.query_values, self.query_lengths, self.num_cols)

    @property
    def docs(self) -> SparseRows:
        """Documents as they were passed to `build`."""
        return SparseRows(self.doc_indices, self.doc_values, self.doc_lengths, self.num_cols)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the scores."""
        return torch.promote_types(self.query_values.dtype, self.doc_values.dtype)


def _search_by_tiles(
    queries: SparseRows | Tensor, docs: SparseRows, k: int
) -> tuple[Tensor, Tensor]:
    """Search without kernels: by the scores of one tile of documents at a time.

    Documents may be in host memory while queries are on a GPU: each tile is copied when it is
    needed, without blocking if it is pinned.
    """
    dtype = torch.promote_types(queries.dtype, docs.dtype)
    scores, ids = zip(
        *(
            _search_query_tile(queries[start : start + _TILE_QUERIES], docs, k)
            for start in range(0, max(len(queries), 1), _TILE_QUERIES)
        ),
        strict=True,
    )
    return torch.cat(scores).to(dtype), torch.cat(ids)


def _search_query_tile(
    queries: SparseRows | Tensor, docs: SparseRows, k: int
) -> tuple[Tensor, Tensor]:
    device = queries.device
    acc = accumulation_dtype(torch.promote_types(queries.dtype, docs.dtype))
    queries = queries.to(dtype=acc)  # documents are ranked before their scores are rounded
    best_scores = torch.empty(len(queries), 0, dtype=acc, device=device)
    best_ids = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    tile_docs = max(k, _TILE_SCORES // max(len(queries), 1))
    for start in range(0, len(docs), tile_docs):
        tile = docs[start : start + tile_docs].to(device, non_blocking=True)
        scores = plain_scores(queries, tile)
        ids = torch.arange(start, start + len(tile), device=device).expand_as(scores)
        best_scores, best_ids = _best(
            torch.cat([best_scores, scores], dim=1), torch.cat([best_ids, ids], dim=1), k
        )
    return best_scores, best_ids


def _best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest scores of each row in descending order with their ids, NaN first.

    Of equal scores the first in the row comes first, which must be the one with the lower id.
    """
    k = min(k, scores.shape[1])
    if scores.dtype == torch.float64 or k == scores.shape[1]:
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return scores[:, :k], ids.gather(1, order)[:, :k]
    # topk orders equal entries arbitrarily. These 64-bit keys are distinct: the upper half orders
    # as the float32 scores do, and the lower half is the reversed position.
    top = torch.iinfo(torch.int32).max
    bits = torch.where(scores == 0, 0, scores).view(torch.int32)
    ordered = torch.where(scores.isnan(), top, torch.where(bits < 0, bits ^ top, bits))
    positions = torch.arange(scores.shape[1], device=scores.device)
    keys = (ordered.long() << 32) | (top - positions)
    best = top - (keys.topk(k, dim=1)[0] & top)
    return scores.gather(1, best), ids.gather(1, best)


def plain_scores(queries: SparseRows | Tensor, docs: SparseRows) -> Tensor:
    """Return scores (Q, N) in the accumulation dtype, computed by PyTorch's embedding_bag."""
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
    """Return queries as a (V, Q) table, from which documents gather rows."""
    dense = queries.to_dense() if isinstance(queries, SparseRows) else queries
    return dense.t().contiguous().to(dtype)


def check_same_space(
    queries: SparseRows | Tensor,
    docs: SparseRows,
    *,
    docs_name: str = "docs",
    is_host_allowed: bool = False,
) -> None:
    """Raise if queries and documents differ in their columns or devices."""
    if not isinstance(docs, SparseRows):
        raise TypeError(f"{docs_name} must be SparseRows, got {type(docs).__name__}")
    if not isinstance(queries, SparseRows | Tensor):
        raise TypeError(f"queries must be SparseRows or a tensor, got {type(queries).__name__}")
    if isinstance(queries, Tensor) and not (queries.dim() == 2 and queries.is_floating_point()):
        raise ValueError(
            f"queries must be floating point (queries, {docs.num_cols}), "
            f"got {queries.dtype} {tuple(queries.shape)}"
        )
    num_cols = queries.shape[1]
    if num_cols != docs.num_cols:
        raise ValueError(
            f"queries must have {docs_name}.num_cols = {docs.num_cols} columns, got {num_cols}"
        )
    if is_host_allowed and docs.device.type == "cpu" and queries.device.type == "cuda":
        return
    if queries.device != docs.device:
        raise ValueError(
            f"queries must be on {docs.device} as {docs_name} are, got {queries.device}"
        )


def _fake_scores(*arguments: Any) -> Tensor:
    operands = ScoreOperands(*arguments)
    shape = (operands.query_values.shape[0], operands.doc_values.shape[0])
    return operands.query_values.new_empty(shape, dtype=operands.dtype)


def _fake_search(*arguments: Any) -> tuple[Tensor, Tensor]:
    operands, k = ScoreOperands(*arguments[:-1]), arguments[-1]
    values = operands.query_values
    shape = (values.shape[0], torch.sym_min(k, operands.doc_values.shape[0]))
    return values.new_empty(shape, dtype=operands.dtype), values.new_empty(shape, dtype=torch.int64)


def _fake_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    operands, (needs_query, needs_doc) = ScoreOperands(*arguments[:-2]), arguments[-2:]
    query_values, doc_values = operands.query_values, operands.doc_values
    return (
        query_values.new_empty(query_values.shape if needs_query else (0,)),
        doc_values.new_empty(doc_values.shape if needs_doc else (0,)),
    )


def _sparse_scores_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients of query_values and doc_values, with sums in a fixed order.

    d docs[n, j] = Σ_q grad[q, n] · queries[q, docs.indices[n, j]]
    d queries[q, v] = Σ_n grad[q, n] · docs[n, v], where queries have an entry
    """
    operands, (needs_query, needs_doc) = ScoreOperands(*arguments[:-2]), arguments[-2:]
    queries, docs = operands.queries, operands.docs
    doc_grad = grad.t().to(accumulation_dtype(operands.dtype)).contiguous()
    no_query_gradient, no_doc_gradient = (
        values.new_empty(0) for values in (operands.query_values, operands.doc_values)
    )
    return (
        _query_gradient(doc_grad, queries, docs) if needs_query else no_query_gradient,
        _doc_gradient(doc_grad, queries, docs) if needs_doc else no_doc_gradient,
    )


def _doc_gradient(doc_grad: Tensor, queries: SparseRows | Tensor, docs: SparseRows) -> Tensor:
    """Return the gradient of docs.values for the (N, Q) gradient of the transposed scores."""
    gradient = torch.zeros_like(docs.values)
    rows, columns, _ = docs.coordinates()
    if len(rows) > 0 and len(queries) > 0:
        # The gradient of an entry is the dot product of a table row and a row of doc_grad, which is
        # how embedding_bag differentiates its weights.
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            doc_grad,
            _query_table(queries, doc_grad.dtype),
            columns,
            docs.lengths.long().cumsum(0) - docs.lengths,
            rows,
            0,
        )
        gradient[docs.indices >= 0] = dots.to(gradient.dtype)
    return gradient


def _query_gradient(doc_grad: Tensor, queries: SparseRows | Tensor, docs: SparseRows) -> Tensor:
    """Return the gradient of the values of queries, likewise."""
    table = doc_grad.new_zeros(docs.num_cols, len(queries))
    rows, columns, entries = docs.coordinates()
    if table.numel() > 0 and len(rows) > 0:
        order = columns.argsort(stable=True)
        column_sizes = torch.bincount(columns, minlength=docs.num_cols)
        table = embedding_bag(
            rows[order],
            doc_grad,
            column_sizes.cumsum(0) - column_sizes,
            per_sample_weights=entries[order].to(doc_grad.dtype),
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


if _library.is_cpu_library_loaded():
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
