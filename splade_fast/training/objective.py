"""Objective: the training loss of a batch of vectors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from splade_fast._distributed import world_size
from splade_fast.encoders.text_ids import text_ids
from splade_fast.losses import (
    in_batch_loss,
    kl_distillation_loss,
    margin_mse_loss,
    pairwise_loss,
    pointwise_loss,
)
from splade_fast.negative_cache.losses import CacheLossReturn
from splade_fast.ops.autograd import accumulation_dtype
from splade_fast.regularizers import active_dims
from splade_fast.training.document_cache import DocumentCacheHandler, Network
from splade_fast.training.objective_arguments import ObjectiveArguments
from splade_fast.training.sparsity import Sparsity

__all__ = ["Objective", "ObjectiveArguments"]

logger = logging.getLogger(__name__)

# Required labels by loss; other losses take none.
_LABELS = {
    "pointwise": "(batch,), the relevance of each pair",
    "margin_mse": "(batch, documents), the teacher's scores",
    "kl": "(batch, documents), the teacher's scores",
}
_SEVERAL_DOCUMENTS = ("pairwise", "margin_mse", "kl")
_AMONG_THE_BATCH = ("in_batch", "negative_cache")  # the second in evaluation mode
_WITH_COPIES = ("pairwise", *_AMONG_THE_BATCH)  # of the positive among the negatives


class Objective(nn.Module):
    """Compute relevance loss + regulariser of the queries + regulariser of the documents.

    The relevance loss is the weighted sum of the losses of the arguments.

    Under torch.distributed the loss is the loss of the joined batch of all ranks; see
    `splade_fast.losses`.

    With the loss negative_cache, `handler` holds the cache, and a training step updates it. In
    evaluation mode the cache does not change, and the loss is in_batch.

    Args:
        arguments: arguments of the objective.
        vocab_size: size V of the vocabulary.
        tokenizer: tokenizer of the documents, whose outputs a cache stores.
        seed: seed of the draws from the cache.
        has_pooling_mask: whether the tokenized documents have a pooling_mask, as echoed ones have.

    Raises:
        ValueError: arguments contradict each other.

    Example::

        >>> from splade_fast.training import Objective, ObjectiveArguments
        >>> objective = Objective(ObjectiveArguments(loss="in_batch"), vocab_size=3)
        >>> result = objective(queries=torch.eye(3), documents=torch.eye(3))
        >>> result["metrics"]["document_active_dims"]
        tensor(1.)
    """

    def __init__(
        self,
        arguments: ObjectiveArguments,
        vocab_size: int,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        has_pooling_mask: bool = False,
    ) -> None:
        super().__init__()
        arguments.check_objective()
        self.arguments = arguments
        self._terms = arguments.loss_terms()
        self._has_warned = False
        self.handler: DocumentCacheHandler | None = None
        if "negative_cache" in self._terms:
            if tokenizer is None:
                raise ValueError("tokenizer must be given for the loss negative_cache, got None")
            self.handler = DocumentCacheHandler(
                arguments, tokenizer, vocab_size, seed, has_pooling_mask
            )
        self.query_sparsity = Sparsity(arguments, "query", vocab_size)
        self.document_sparsity = Sparsity(arguments, "document", vocab_size)

    def forward(
        self,
        queries: Tensor,
        documents: Tensor,
        labels: Tensor | None = None,
        *,
        step: int = 0,
        network: Network | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        query_inputs: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Return the loss and its metrics.

        Args:
            queries: (B, V).
            documents: (m · B, V); row j · B + i is document j of query i, document 0 is relevant.
            labels: (B,) relevance for pointwise, (B, m) scores for margin_mse and kl.
            step: step of the schedules.
            network: function from tokenized documents to vectors; required by a cache.
            inputs: tokenized documents of the batch by name; required by a cache. With them,
                in_batch and pairwise do not take copies of a query's positive for negatives.
            query_inputs: tokenized queries of the batch by name. With them, in_batch and
                negative_cache do not take the positives of a query's copies for negatives.

        Returns:
            {"loss": scalar, "metrics": {name: detached scalar}}. The metrics relevance_loss,
            query_regularizer and document_regularizer add up to the loss; query_active_dims and
            document_active_dims are means over the batch of this rank. Several losses add
            their values before weighting as kl_loss, margin_mse_loss and so on. With a cache,
            relevance_loss has the gradient of the cross entropy, whose value is
            cache/interpretable_prediction_loss, and cache/staleness is the staleness of the drawn
            documents.

        Raises:
            ValueError: the batch does not fit the loss.
        """
        count = self.check_batch(len(queries), len(documents), labels, inputs)
        exact = accumulation_dtype(torch.promote_types(queries.dtype, documents.dtype))
        queries, documents = queries.to(exact), documents.to(exact)
        cache_step: CacheLossReturn | None = None
        if self.handler is not None and self.training:
            if network is None or inputs is None:
                raise ValueError("network and inputs must be given for the loss negative_cache")
            cache_step = self.handler.step_batch(network, queries, documents, inputs, query_inputs)
        # Scores of many terms need more precision than autocast would give them.
        with torch.autocast(queries.device.type, enabled=False):
            losses = self._losses(queries, documents, labels, count, inputs, query_inputs)
            if cache_step is not None:
                losses["negative_cache"] = cache_step.training_loss
            relevance = torch.stack([self._terms[name] * losses[name] for name in losses]).sum()
            query_penalty = self.query_sparsity(queries, step)
            document_penalty = self.document_sparsity(documents, step)
        metrics = {
            "relevance_loss": relevance,
            "query_regularizer": query_penalty,
            "document_regularizer": document_penalty,
            "query_active_dims": active_dims(queries).float().mean(),
            "document_active_dims": active_dims(documents).float().mean(),
        }
        if len(losses) > 1:
            metrics |= {f"{name}_loss": loss for name, loss in losses.items()}
        if cache_step is not None:
            metrics["cache/interpretable_prediction_loss"] = cache_step.interpretable_loss
            metrics["cache/staleness"] = cache_step.staleness
        return {
            "loss": relevance + query_penalty + document_penalty,
            "metrics": {name: value.detach() for name, value in metrics.items()},
        }

    def check_batch(
        self,
        queries: int,
        documents: int,
        labels: Tensor | None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> int:
        """Return the number m of documents of each query, and check the batch.

        Args:
            queries: number of queries.
            documents: number of documents.
            labels: as in `forward`.
            inputs: as in `forward`.

        Raises:
            ValueError: the numbers, the labels or the inputs do not fit the loss.
        """
        if queries < 1 or documents < 1 or documents % queries:
            raise ValueError(
                f"documents must be a multiple of the queries, got {documents} and {queries}"
            )
        count = documents // queries
        if "pointwise" in self._terms and count != 1:
            raise ValueError(f"documents must be one for each query for pointwise, got {count}")
        several = [name for name in _SEVERAL_DOCUMENTS if name in self._terms]
        if several and count < 2:
            raise ValueError(
                f"documents must be at least 2 for each query for {several[0]}, got {count}"
            )
        if self.handler is not None and self.training and inputs is not None:
            self.handler.check_inputs(inputs)
        labelled = [name for name in _LABELS if name in self._terms]
        if not labelled and labels is not None:
            raise ValueError(
                f"labels must be None for the loss {self.arguments.loss}, which takes document 0 "
                f"of a query as relevant, got {tuple(labels.shape)}"
            )
        if labelled:
            name = labelled[0]
            shape = (queries,) if name == "pointwise" else (queries, count)
            if labels is None or tuple(labels.shape) != shape:
                got = "None" if labels is None else str(tuple(labels.shape))
                raise ValueError(f"labels must be {_LABELS[name]}, {shape} for {name}, got {got}")
        return count

    def _losses(
        self,
        queries: Tensor,
        documents: Tensor,
        labels: Tensor | None,
        count: int,
        inputs: Mapping[str, Tensor] | None,
        query_inputs: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Return the value of each loss but that of a cache in training mode."""
        names = [name for name in self._terms if not (name == "negative_cache" and self.training)]
        ids = query_ids = None
        if inputs is not None and any(name in _WITH_COPIES for name in names):
            ids = text_ids(inputs)
        if query_inputs is not None and any(name in _AMONG_THE_BATCH for name in names):
            query_ids = text_ids(query_inputs)
        batch, temperature = len(queries), self.arguments.temperature
        losses: dict[str, Tensor] = {}
        if any(name in self._terms for name in (*_SEVERAL_DOCUMENTS, "pointwise")):
            scores = torch.einsum("bv,mbv->bm", queries, documents.view(count, batch, -1))
        for name in names:
            if name in _AMONG_THE_BATCH:
                self._warn_without_negatives(len(documents))
                losses[name] = in_batch_loss(
                    queries,
                    documents[:batch],
                    documents[batch:] if count > 1 else None,
                    document_ids=ids,
                    query_ids=query_ids,
                    temperature=temperature,
                    hardness=self.arguments.hardness,
                )
            elif name == "pairwise":
                losses[name] = pairwise_loss(scores[:, :1], _without_copies(scores[:, 1:], ids))
            elif name == "pointwise":
                assert labels is not None
                losses[name] = pointwise_loss(scores[:, 0], labels, check_labels=not labels.is_cuda)
            elif name == "margin_mse":
                assert labels is not None
                losses[name] = margin_mse_loss(
                    scores[:, :1], scores[:, 1:], labels[:, :1], labels[:, 1:]
                )
            else:
                assert labels is not None
                losses[name] = kl_distillation_loss(scores, labels, temperature=temperature)
        return losses

    def _warn_without_negatives(self, documents: int) -> None:
        """Log once that a training batch of one document has no negatives."""
        if documents > 1 or not self.training or self._has_warned or world_size() > 1:
            return
        self._has_warned = True
        logger.warning(
            "a batch of one query without hard negatives has a relevance_loss of 0: %s takes the "
            "other documents of a batch as negatives",
            self.arguments.loss,
        )


def _without_copies(negative: Tensor, ids: Tensor | None) -> Tensor:
    """Return the scores (B, m - 1) of negatives, -inf for copies of the positive: a loss of 0.

    Args:
        negative: (B, m - 1), scores of the documents 1 to m - 1 of each query.
        ids: (m · B, w), equal rows for copies of a document. None: all documents differ.
    """
    if ids is None:
        return negative
    batch, others = negative.shape
    copy_mask = (ids[batch:].view(others, batch, -1) == ids[:batch]).all(-1)
    return negative.masked_fill(copy_mask.t(), -torch.inf)
