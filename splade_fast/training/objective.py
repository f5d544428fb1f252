"""Objective: the training loss of a batch of vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from splade_fast.losses import (
    in_batch_loss,
    kl_distillation_loss,
    margin_mse_loss,
    pairwise_loss,
    pointwise_loss,
)
from splade_fast.ops._autograd import accumulation_dtype
from splade_fast.regularizers import active_dims
from splade_fast.training.objective_arguments import ObjectiveArguments
from splade_fast.training.sparsity import Sparsity

__all__ = ["Objective", "ObjectiveArguments"]

# What `labels` must be, by loss; losses that are not here take none.
_LABELS = {
    "pointwise": "(batch,), the relevance of each pair",
    "margin_mse": "(batch, documents), the teacher's scores",
    "kl": "(batch, documents), the teacher's scores",
}
_SEVERAL_DOCUMENTS = ("pairwise", "margin_mse", "kl")


class Objective(nn.Module):
    """relevance loss + regulariser of the queries + regulariser of the documents.

    Under torch.distributed the loss is that of the joined batch of all ranks, see
    `splade_fast.losses`.

    Args:
        arguments: what is trained for.
        vocab_size: V.
    """

    def __init__(self, arguments: ObjectiveArguments, vocab_size: int) -> None:
        super().__init__()
        arguments.check_objective()
        self.arguments = arguments
        self.query_sparsity = Sparsity(arguments, "query", vocab_size)
        self.document_sparsity = Sparsity(arguments, "document", vocab_size)

    def forward(
        self, queries: Tensor, documents: Tensor, labels: Tensor | None = None, *, step: int = 0
    ) -> dict[str, Any]:
        """The loss and its parts.

        Args:
            queries: (B, V).
            documents: (m * B, V), row j * B + i is document j of query i; document 0 is relevant.
            labels: (B,) relevance for pointwise, (B, m) scores for margin_mse and kl.
            step: of the schedules.

        Returns:
            {"loss": scalar, "metrics": {name: detached scalar}}.

        Raises:
            ValueError: the batch does not fit the loss.
        """
        count = self.check_batch(len(queries), len(documents), labels)
        # Scores of many terms need more precision than autocast would give them.
        with torch.autocast(queries.device.type, enabled=False):
            exact = accumulation_dtype(torch.promote_types(queries.dtype, documents.dtype))
            queries, documents = queries.to(exact), documents.to(exact)
            relevance = self._relevance(queries, documents, labels, count)
            query_penalty = self.query_sparsity(queries, step)
            document_penalty = self.document_sparsity(documents, step)
        metrics = {
            "relevance_loss": relevance,
            "query_regularizer": query_penalty,
            "document_regularizer": document_penalty,
            "query_active_dims": active_dims(queries).float().mean(),
            "document_active_dims": active_dims(documents).float().mean(),
        }
        return {
            "loss": relevance + query_penalty + document_penalty,
            "metrics": {name: value.detach() for name, value in metrics.items()},
        }

    def check_batch(self, queries: int, documents: int, labels: Tensor | None) -> int:
        """m, how many documents each query has.

        Raises:
            ValueError: the numbers or the labels do not fit the loss.
        """
        loss = self.arguments.loss
        if queries < 1 or documents < 1 or documents % queries:
            raise ValueError(
                f"documents must be a multiple of the queries, got {documents} and {queries}"
            )
        count = documents // queries
        if loss == "pointwise" and count != 1:
            raise ValueError(f"documents must be one for each query for {loss}, got {count}")
        if loss in _SEVERAL_DOCUMENTS and count < 2:
            raise ValueError(f"documents must be at least 2 for each query for {loss}, got {count}")
        expected = _LABELS.get(loss)
        if expected is None and labels is not None:
            raise ValueError(
                f"labels must be None for the loss {loss}, which takes document 0 of a query as "
                f"relevant, got {tuple(labels.shape)}"
            )
        if expected is not None:
            shape = (queries,) if loss == "pointwise" else (queries, count)
            if labels is None or tuple(labels.shape) != shape:
                got = "None" if labels is None else str(tuple(labels.shape))
                raise ValueError(f"labels must be {expected}, {shape} for {loss}, got {got}")
        return count

    def _relevance(
        self, queries: Tensor, documents: Tensor, labels: Tensor | None, count: int
    ) -> Tensor:
        temperature = self.arguments.temperature
        batch = len(queries)
        if self.arguments.loss == "in_batch":
            positives, negatives = documents[:batch], documents[batch:] if count > 1 else None
            return in_batch_loss(queries, positives, negatives, temperature=temperature)
        scores = torch.einsum("bv,mbv->bm", queries, documents.view(count, batch, -1))
        if labels is None:
            return pairwise_loss(scores[:, :1], scores[:, 1:])
        if self.arguments.loss == "pointwise":
            return pointwise_loss(scores[:, 0], labels, check_labels=not labels.is_cuda)
        if self.arguments.loss == "margin_mse":
            return margin_mse_loss(scores[:, :1], scores[:, 1:], labels[:, :1], labels[:, 1:])
        return kl_distillation_loss(scores, labels, temperature=temperature)
