"""Sparsity regularisers of pooled vectors, and schedules of their weights."""

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
    """Compute the FLOPS regulariser, which estimates the cost of a sparse dot product.

    Σ_v (mean_b |pooled[b, v]|)²

    Follows Paria et al., "Minimizing FLOPs to Learn Efficient Sparse Representations" (ICLR 2020).
    A threshold gives the ℓ0-masked variant of Shen et al., "Exploring ℓ0 Sparsification for
    Inference-free Sparse Retrievers" (SIGIR 2025), which does not regularise sparse rows.

    Args:
        pooled: (B, V), floating point.
        threshold: rows with at most this number of active dims are replaced by zeros. None: all
            rows are regularised.
        across_ranks: whether the mean is over the batches of all ranks of torch.distributed. The
            gradient, averaged over ranks by DistributedDataParallel, is then the gradient for the
            joined batch.

    Returns:
        A scalar in the dtype of pooled.

    Raises:
        TypeError, ValueError: pooled is not a floating-point matrix, or threshold is negative.

    Example::

        >>> pooled = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
        >>> sf.flops_loss(pooled)
        tensor(4.2500)
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
    """Compute the FLOPS regulariser with weights that grow with document frequency.

    Σ_v (w_v mean_b |pooled[b, v]|)² with w_v = 1 / (1 + (f_v^(log_α 2) - 1)^β)

    Terms that are active in many documents have a weight near 1, rare terms a weight near 0.
    Follows DF-FLOPS (Porco et al., "An Alternative to FLOPS Regularization to Effectively
    Productionize SPLADE-Doc", SIGIR 2025).

    Args:
        pooled: (B, V), floating point.
        document_frequencies: (V,), f, the share of documents, from 0 to 1, in which each term is
            active; see `document_frequencies`. It gets no gradient.
        alpha: α between 0 and 1, the frequency whose weight is 1/2.
        beta: β > 0, the steepness of the weight at α.
        across_ranks: as in `flops_loss`.

    Returns:
        A scalar in the dtype of pooled.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, or is out of range.

    Example::

        >>> pooled = torch.tensor([[3.0, 1.0], [3.0, 0.0]])
        >>> sf.df_flops_loss(pooled, sf.document_frequencies(pooled))
        tensor(9.2500)
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
    """Return the weights w of `df_flops_loss`."""
    # float64, since the powers of the frequency of a rare term are very large.
    distance = frequencies.double().clamp(0, 1).pow(math.log(2, alpha)) - 1
    return (1 + distance.pow(beta)).reciprocal()


def document_frequencies(pooled: Tensor) -> Tensor:
    """Return the share of documents in which each term is active.

    f_v = mean_b [pooled[b, v] ≠ 0]

    Args:
        pooled: (B, V).

    Returns:
        (V,) float32, without gradient.

    Example::

        >>> sf.document_frequencies(torch.tensor([[3.0, 1.0], [3.0, 0.0]]))
        tensor([1.0000, 0.5000])
    """
    return (pooled.detach() != 0).float().mean(0)


def l1_loss(pooled: Tensor, *, across_ranks: bool = True) -> Tensor:
    """Compute the mean ℓ1 norm of the rows.

    mean_b Σ_v |pooled[b, v]|

    Args:
        pooled: (B, V), floating point.
        across_ranks: as in `flops_loss`.

    Returns:
        A scalar in the dtype of pooled; 0 without rows.

    Raises:
        TypeError, ValueError: pooled is not a floating-point matrix.

    Example::

        >>> sf.l1_loss(torch.tensor([[3.0, 1.0], [3.0, 0.0]]))
        tensor(3.5000)
    """
    _check_pooled(pooled)
    return mean_over_ranks(_absolute_sums(pooled, 1), across_ranks)


def anti_zero_loss(pooled: Tensor, *, epsilon: float = 1e-2, across_ranks: bool = True) -> Tensor:
    """Compute a penalty of rows near zero, which keeps regularised vectors from vanishing.

    mean_b 1 / (Σ_v |pooled[b, v]| + ε)²

    The penalty acts before a row is zero: then the activation has no gradient any more.

    Args:
        pooled: (B, V), floating point.
        epsilon: ε; the penalty of a zero row is 1 / ε².
        across_ranks: as in `flops_loss`.

    Returns:
        A scalar in the dtype of pooled; 0 without rows.

    Raises:
        TypeError, ValueError: pooled is not a floating-point matrix, or epsilon is not positive.

    Example::

        >>> sf.anti_zero_loss(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), epsilon=1.0)
        tensor(0.5200)
    """
    _check_pooled(pooled)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be greater than 0, got {epsilon}")
    return mean_over_ranks((_absolute_sums(pooled, 1) + epsilon).pow(-2), across_ranks)


def active_dims(pooled: Tensor) -> Tensor:
    """Return the number of nonzero entries of each row.

    Args:
        pooled: (B, V).

    Returns:
        (B,) int64, without gradient.

    Example::

        >>> sf.active_dims(torch.tensor([[3.0, 1.0], [3.0, 0.0]]))
        tensor([2, 1])
    """
    return torch.count_nonzero(pooled.detach(), dim=1)


@dataclass(frozen=True)
class _Schedule:
    """Schedule that raises a weight with a power of the step."""

    weight: float
    steps: int
    _power: ClassVar[int]

    def __call__(self, step: int) -> float:
        progress = min(1.0, step / self.steps) if self.steps > 0 else 1.0
        return self.weight * float(progress**self._power)


class QuadraticSchedule(_Schedule):
    """Schedule weight(step) = weight · min(1, step / steps)², as in SPLADE.

    Args:
        weight: final weight.
        steps: number of steps until the final weight; with 0 the weight is constant.

    Example::

        >>> schedule = sf.QuadraticSchedule(weight=0.1, steps=100)
        >>> schedule(50), schedule(200)
        (0.025, 0.1)
    """

    _power = 2


class LinearSchedule(_Schedule):
    """Schedule weight(step) = weight · min(1, step / steps).

    Args:
        weight: final weight.
        steps: number of steps until the final weight; with 0 the weight is constant.

    Example::

        >>> schedule = sf.LinearSchedule(weight=0.1, steps=100)
        >>> schedule(50), schedule(200)
        (0.05, 0.1)
    """

    _power = 1


def _absolute_sums(pooled: Tensor, dim: int) -> Tensor:
    """Return Σ |pooled| over a dimension, without a tensor of absolute values."""
    sums: Tensor = torch.linalg.vector_norm(pooled, 1, dim=dim)
    return sums


def _mean_of_columns(pooled: Tensor, across_ranks: bool) -> Tensor:
    """Return the mean of |pooled| over rows, (V,)."""
    sums = _absolute_sums(pooled, 0)
    if not across_ranks or world_size() == 1:
        return sums / max(1, len(pooled))
    # float32, as bfloat16 cannot represent large counts.
    rows = torch.full((), float(len(pooled)), device=sums.device)
    return sum_over_ranks(sums) / sum_over_ranks(rows).clamp(min=1)


def _check_pooled(pooled: Tensor) -> None:
    """Raise if pooled is not a floating-point matrix."""
    check_floating("pooled", pooled)
    if pooled.ndim != 2:
        raise ValueError(f"pooled must be (batch, vocabulary), got {tuple(pooled.shape)}")
