"""Relevance losses on scores of queries and documents.

If torch.distributed has several ranks, all ranks have to call a loss together. Each rank gets the
loss of the joined batch. Its gradient, averaged over ranks by DistributedDataParallel, is the
gradient for the joined batch. With `across_ranks=False` each rank gets the loss of its own batch.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from splade_fast._checks import check_floating, check_tensor
from splade_fast._distributed import gather_rows_of_ranks, mean_over_ranks

__all__ = [
    "in_batch_loss",
    "kl_distillation_loss",
    "margin_mse_loss",
    "pairwise_loss",
    "pointwise_loss",
]


def pointwise_loss(
    scores: Tensor, labels: Tensor, *, check_labels: bool = True, across_ranks: bool = True
) -> Tensor:
    """Compute the binary cross-entropy of the relevance of single pairs.

    mean_i BCE(σ(scores_i), labels_i)

    Args:
        scores: (B,), one score per (query, document) pair.
        labels: (B,), from 0 (irrelevant) to 1 (relevant), of any dtype.
        check_labels: whether to check the range of the labels, which waits for a GPU.
        across_ranks: whether the mean is over the pairs of all ranks.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: scores are not floating point, shapes differ, or a label is out of
            range.

    Example::

        >>> scores, labels = torch.tensor([0.0, 0.0]), torch.tensor([1, 0])
        >>> sf.losses.pointwise_loss(scores, labels)
        tensor(0.6931)
    """
    check_floating("scores", scores)
    _check_shape("labels", labels, scores)
    if check_labels:
        outside = labels[~((labels >= 0) & (labels <= 1))]  # NaN as well
        if len(outside):
            raise ValueError(f"labels must be between 0 and 1, got {outside[0].item()}")
    values = functional.binary_cross_entropy_with_logits(
        scores, labels.to(scores.dtype), reduction="none"
    )
    return mean_over_ranks(values, across_ranks)


def in_batch_loss(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None = None,
    *,
    document_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    temperature: float = 1.0,
    hardness: float = 0.0,
    across_ranks: bool = True,
) -> Tensor:
    """Compute the cross-entropy of each query's document among all documents of the batch.

    mean_i -log softmax_j(queries_i · d_j / temperature + hardness · h_ij)[i], where h_ij is the
    score queries_i · d_j of a negative, without a gradient, and 0 for the query's document

    A hardness above 0 gives negatives with high scores more weight, as in Lan et al., "LLaVE:
    Large Language and Vision Embedding Models with Hardness-Weighted Contrastive Learning" (2025).

    With `document_ids` the softmax of query i leaves out the other copies of its document, which
    are no negatives: with n copies of one document the loss could not fall below log(n). With
    `query_ids` it leaves out the documents of other copies of the query, which are relevant too.

    Args:
        queries: (B, V), pooled vectors.
        documents: (B, V), pooled vectors; document i is relevant for query i.
        negatives: (N, V), hard negatives, with which every query is compared too.
        document_ids: (B + N,) or (B + N, w) integers, whose rows are equal for copies of the same
            document, first of documents, then of negatives. None: all documents differ.
        query_ids: (B,) or (B, w) integers, whose rows are equal for copies of the same query. None:
            all queries differ.
        temperature: divisor of the scores.
        hardness: factor of the scores of negatives that are added to their logits, at least 0.
        across_ranks: whether queries are compared with the documents and hard negatives of all
            ranks.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, temperature is not positive,
            or hardness is negative.

    Example::

        >>> queries = documents = 20 * torch.eye(3)
        >>> sf.losses.in_batch_loss(queries, documents, temperature=100.0)
        tensor(0.0360)
    """
    check_floating("queries", queries)
    if queries.ndim != 2:
        raise ValueError(f"queries must be (batch, vocabulary), got {tuple(queries.shape)}")
    _check_shape("documents", documents, queries)
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    if not 0 <= hardness < math.inf:
        raise ValueError(f"hardness must be at least 0 and finite, got {hardness}")
    if negatives is not None:
        check_tensor("negatives", negatives)
        if negatives.ndim != 2 or negatives.shape[1] != documents.shape[1]:
            raise ValueError(
                f"negatives must be (negatives, vocabulary) with vocabulary = "
                f"{documents.shape[1]}, got {tuple(negatives.shape)}"
            )
        documents = torch.cat([documents, negatives])
    candidate_ids: list[Tensor] = []  # (B + N, w) each; equal ones are no negatives
    if document_ids is not None:
        _check_ids("document_ids", document_ids, len(documents))
        candidate_ids.append(document_ids)
    if query_ids is not None:
        _check_ids("query_ids", query_ids, len(queries))
        candidate_ids.append(_owners(query_ids, len(documents)))
    first = 0  # row of the first own document among the documents of all ranks
    if across_ranks:
        documents, first = gather_rows_of_ranks(documents)
    similarities = queries @ documents.T
    scores = similarities / temperature
    if hardness:
        weights = hardness * similarities.detach()
        weights.diagonal(first).zero_()  # of the query's own document
        scores = scores + weights
    for ids in candidate_ids:
        all_ids = gather_rows_of_ranks(ids)[0] if across_ranks else ids
        relevant_mask = _equal_rows(ids[: len(queries)], all_ids)
        relevant_mask.diagonal(first).fill_(False)  # the document itself
        scores = scores.masked_fill(relevant_mask, -torch.inf)
    relevant = torch.arange(first, first + len(queries), device=scores.device)
    return mean_over_ranks(
        functional.cross_entropy(scores, relevant, reduction="none"), across_ranks
    )


def pairwise_loss(positive: Tensor, negative: Tensor, *, across_ranks: bool = True) -> Tensor:
    """Compute the RankNet loss of relevant and irrelevant documents.

    mean log(1 + exp(negative - positive))

    Follows Burges et al., "Learning to Rank using Gradient Descent" (ICML 2005).

    Args:
        positive: (B,) or (B, 1), scores of the relevant documents.
        negative: (B,) or (B, m), scores of the irrelevant documents.
        across_ranks: whether the mean is over the pairs of all ranks.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: scores are not floating point, or their shapes do not go together.

    Example::

        >>> sf.losses.pairwise_loss(torch.tensor([2.0]), torch.tensor([2.0]))
        tensor(0.6931)
    """
    return mean_over_ranks(functional.softplus(-_margins(positive, negative)), across_ranks)


def margin_mse_loss(
    positive: Tensor,
    negative: Tensor,
    teacher_positive: Tensor,
    teacher_negative: Tensor,
    *,
    across_ranks: bool = True,
) -> Tensor:
    """Compute the squared error of the margins between relevant and irrelevant documents.

    mean ((positive - negative) - (teacher_positive - teacher_negative))²

    Follows Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture
    Knowledge Distillation" (2020).

    Args:
        positive: (B,) or (B, 1), the student's scores of the relevant documents.
        negative: (B,) or (B, m), the student's scores of the irrelevant documents.
        teacher_positive, teacher_negative: the teacher's scores, of the same shapes.
        across_ranks: whether the mean is over the pairs of all ranks.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: scores are not floating point, or their shapes do not go together.

    Example::

        >>> student, teacher = torch.tensor([[3.0], [1.0]]), torch.tensor([[5.0], [1.0]])
        >>> sf.losses.margin_mse_loss(*student, *teacher)
        tensor(4.)
    """
    student = _margins(positive, negative)
    _check_shape("teacher_positive", teacher_positive, positive)
    _check_shape("teacher_negative", teacher_negative, negative)
    teacher = _margins(teacher_positive, teacher_negative).to(student.dtype)
    return mean_over_ranks((student - teacher).square(), across_ranks)


def kl_distillation_loss(
    scores: Tensor, teacher: Tensor, *, temperature: float = 1.0, across_ranks: bool = True
) -> Tensor:
    """Compute the KL divergence of the student's from the teacher's distribution over documents.

    T² mean_i KL(softmax(teacher_i / T) ‖ softmax(scores_i / T)), with the temperature T

    The factor T² keeps the size of the gradient, as in Hinton et al., "Distilling the Knowledge in
    a Neural Network" (2015).

    Args:
        scores: (B, m), the student's scores of m documents for each query.
        teacher: (B, m), the teacher's scores.
        temperature: T.
        across_ranks: whether the mean is over the queries of all ranks.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: scores are not a floating-point matrix, shapes differ, or temperature
            is not positive.

    Example::

        >>> scores, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[9.0, -9.0]])
        >>> sf.losses.kl_distillation_loss(scores, teacher)
        tensor(0.6931)
    """
    check_floating("scores", scores)
    if scores.ndim != 2:
        raise ValueError(f"scores must be (batch, documents), got {tuple(scores.shape)}")
    _check_shape("teacher", teacher, scores)
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    student = functional.log_softmax(scores / temperature, dim=1)
    target = functional.log_softmax(teacher.to(scores.dtype) / temperature, dim=1)
    divergence = functional.kl_div(student, target, reduction="none", log_target=True).sum(1)
    return mean_over_ranks(divergence, across_ranks) * temperature**2


def _owners(query_ids: Tensor, documents: int) -> Tensor:
    """Return (documents, w + 1): the id of each document's query, and 1 for hard negatives."""
    ids = query_ids.unsqueeze(1) if query_ids.ndim == 1 else query_ids
    owned = functional.pad(ids, (0, 1))
    negatives = ids.new_zeros(documents - len(ids), ids.shape[1])
    return torch.cat([owned, functional.pad(negatives, (0, 1), value=1)])


def _equal_rows(some: Tensor, others: Tensor) -> Tensor:
    """Return (M, N) bool, whether row m of `some` equals row n of `others`.

    Args:
        some: (M,) or (M, w).
        others: (N,) or (N, w).
    """
    equal_mask = some.unsqueeze(1) == others.unsqueeze(0)
    return equal_mask if some.ndim == 1 else equal_mask.all(-1)


def _check_ids(name: str, ids: Tensor, count: int) -> None:
    """Raise if ids are not integers, (count,) or (count, any)."""
    check_tensor(name, ids)
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if ids.ndim not in (1, 2) or len(ids) != count:
        raise ValueError(f"{name} must be ({count},) or ({count}, any), got {tuple(ids.shape)}")


def _margins(positive: Tensor, negative: Tensor) -> Tensor:
    """Return positive - negative. Raise if they do not go together."""
    check_floating("positive", positive)
    check_floating("negative", negative)
    if positive.ndim == 1 and negative.ndim == 2:
        positive = positive[:, None]
    has_same_rank = positive.ndim == negative.ndim and positive.ndim in (1, 2)
    if not has_same_rank or len(positive) != len(negative) or positive.shape[1:] not in ((), (1,)):
        raise ValueError(
            "positive and negative must be (batch,) or (batch, 1) and (batch,) or (batch, "
            f"negatives), got {tuple(positive.shape)} and {tuple(negative.shape)}"
        )
    return positive - negative


def _check_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise if a tensor does not have the shape of another one."""
    check_tensor(name, tensor)
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must be {tuple(like.shape)}, got {tuple(tensor.shape)}")
