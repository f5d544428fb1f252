"""Sparsity regularisers of pooled vectors, and schedules of their weight."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from splade_fast._checks import check_floating
from splade_fast._distributed import mean_over_ranks, sum_over_ranks, world_size


def flops_loss(
    pooled: Tensor, *, threshold: int | None = None, across_ranks: bool = True
) -> Tensor:
    """Σ_v (mean_b |pooled[b, v]|)², an estimate of the multiplications of a sparse dot product.

    Follows Paria et al., "Minimizing FLOPs to Learn Efficient Sparse Representations" (ICLR 2020).
    With a threshold, the ℓ0-masked variant of Shen et al., "Exploring ℓ0 Sparsification for
    Inference-free Sparse Retrievers" (SIGIR 2025): rows that are sparse enough are left alone.

    Args:
        pooled: (B, V), floating point.
        threshold: rows with at most so many entries that are not zero count as zero rows; None: all
            rows count as they are.
        across_ranks: the mean is over the batches of all ranks of torch.distributed, where there
            are several; its gradient, averaged by DistributedDataParallel, is that of the joined
            batch.

    Returns:
        A scalar in the dtype of pooled.

    Raises:
        TypeError, ValueError: pooled is no floating-point matrix, or threshold is negative.
    """
    _check_pooled(pooled)
    if threshold is not None:
        if threshold < 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        dense_rows = active_dims(pooled) > threshold
        pooled = pooled * dense_rows[:, None]
    return _mean_of_columns(pooled, across_ranks).square().sum()


def df_flops_loss(
    pooled: Tensor,
    document_frequencies: Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 10.0,
    across_ranks: bool = True,
) -> Tensor:
    """Σ_v (w_v mean_b |pooled[b, v]|)² with w_v = 1 / (1 + (f_v^(log_α 2) - 1)^β).

    Terms of many documents weigh about 1, those of few about 0. Follows DF-FLOPS (Porco et al.,
    "An Alternative to FLOPS Regularization to Effectively Productionize SPLADE-Doc", SIGIR 2025).

    Args:
        pooled: (B, V), floating point.
        document_frequencies: (V,), f: the share of documents, from 0 to 1, in which a term is
            active, as last estimated; see `document_frequencies`. Takes no gradient.
        alpha: between 0 and 1: the frequency that weighs 1/2.
        beta: how steep the weight is there.
        across_ranks: as in flops_loss.

    Returns:
        A scalar in the dtype of pooled.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, or is out of range.
    """
    _check_pooled(pooled)
    check_floating("document_frequencies", document_frequencies)
    if tuple(document_frequencies.shape) != (pooled.shape[1],):
        raise ValueError(
            f"document_frequencies must be (vocabulary,) = ({pooled.shape[1]},), "
            f"got {tuple(document_frequencies.shape)}"
        )
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    if not beta > 0:
        raise ValueError(f"beta must be greater than 0, got {beta}")
    weights = _frequency_weights(document_frequencies.detach(), alpha, beta).to(pooled.dtype)
    return (weights * _mean_of_columns(pooled, across_ranks)).square().sum()


def _frequency_weights(frequencies: Tensor, alpha: float, beta: float) -> Tensor:
    # In float64: f ** (log_α 2) of a rare term is large, and its power to β larger still.
    distance = frequencies.double().clamp(0, 1).pow(math.log(2, alpha)) - 1
    return (1 + distance.pow(beta)).reciprocal()


def document_frequencies(pooled: Tensor) -> Tensor:
    """f_v = share of rows with pooled[b, v] ≠ 0.

    Args:
        pooled: (B, V).

    Returns:
        (V,) float32, without gradient.
    """
    return (pooled.detach() != 0).float().mean(0)


def l1_loss(pooled: Tensor, *, across_ranks: bool = True) -> Tensor:
    """mean_b Σ_v |pooled[b, v]|.

    Args:
        pooled: (B, V), floating point.
        across_ranks: as in flops_loss.

    Returns:
        A scalar in the dtype of pooled; 0 for no rows.

    Raises:
        TypeError, ValueError: pooled is no floating-point matrix.
    """
    _check_pooled(pooled)
    return mean_over_ranks(_absolute_sums(pooled, 1), across_ranks)


def anti_zero_loss(pooled: Tensor, *, epsilon: float = 1e-2, across_ranks: bool = True) -> Tensor:
    """mean_b 1 / (Σ_v |pooled[b, v]| + ε)²: what keeps regularised vectors from vanishing.

    A row that is all zero has no gradient (the activation has none there); this acts before.

    Args:
        pooled: (B, V), floating point.
        epsilon: bounds the loss of an empty row by 1 / ε².
        across_ranks: as in flops_loss.

    Returns:
        A scalar in the dtype of pooled; 0 for no rows.

    Raises:
        TypeError, ValueError: pooled is no floating-point matrix, or epsilon is not positive.
    """
    _check_pooled(pooled)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be greater than 0, got {epsilon}")
    return mean_over_ranks((_absolute_sums(pooled, 1) + epsilon).pow(-2), across_ranks)


def active_dims(pooled: Tensor) -> Tensor:
    """How many entries of each row are not zero.

    Args:
        pooled: (B, V).

    Returns:
        (B,) int64.
    """
    return torch.count_nonzero(pooled.detach(), dim=1)


@dataclass(frozen=True)
class _Schedule:
    weight: float
    steps: int
    _power: ClassVar[int]

    def __call__(self, step: int) -> float:
        progress = min(1.0, step / self.steps) if self.steps > 0 else 1.0
        return self.weight * float(progress**self._power)


class QuadraticSchedule(_Schedule):
    """weight(step) = weight · min(1, step / steps)², as SPLADE raises its regularisation.

    Args:
        weight: the final weight.
        steps: how many steps it takes; 0: at once.
    """

    _power = 2


class LinearSchedule(_Schedule):
    """weight(step) = weight · min(1, step / steps).

    Args:
        weight: the final weight.
        steps: how many steps it takes; 0: at once.
    """

    _power = 1


def _absolute_sums(pooled: Tensor, dim: int) -> Tensor:
    """Σ |pooled| in one pass, without the absolute values in memory."""
    sums: Tensor = torch.linalg.vector_norm(pooled, 1, dim=dim)
    return sums


def _mean_of_columns(pooled: Tensor, across_ranks: bool) -> Tensor:
    """(V,) mean of |pooled| over rows."""
    sums = _absolute_sums(pooled, 0)
    if not across_ranks or world_size() == 1:
        return sums / max(1, len(pooled))
    # A scalar of more precision than the sums: bfloat16 cannot count.
    rows = torch.full((), float(len(pooled)), device=sums.device)
    return sum_over_ranks(sums) / sum_over_ranks(rows).clamp(min=1)


def _check_pooled(pooled: Tensor) -> None:
    check_floating("pooled", pooled)
    if pooled.ndim != 2:
        raise ValueError(f"pooled must be (batch, vocabulary), got {tuple(pooled.shape)}")
