"""Basis in which the first few dimensions of hidden states and weight rows carry most of a logit.

Hidden states are multiplied by P and rows of the weight by Q, with P·Qᵀ = 1, which leaves their
products unchanged. The pair is the balanced one, as in balanced truncation of linear systems: the
second moments of both are the same diagonal matrix, with descending entries. This minimises the
product of the norms of the remaining dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BASIS_DIM = 1024  # eigenvectors of larger matrices take too long

_PADDING = 64  # the dimensions of int8 rows are a multiple of this
_ADDED_TOKENS = 512  # hidden states that are added to the moments at once
_CHUNK = 16384  # rows of the weight that are converted at once
# Eigenvalues below this share of the largest are raised, which bounds the condition number of P.
_FLOOR = 1e-4
_LENGTH = 4  # norm of P·h over the sum of the norms of h and of the mean
_MAX_ERROR = 2.0**-10  # of P·Qᵀ


@dataclass(frozen=True)
class Basis:
    """Arguments that head_prepare and head_forward_screened take in addition to the mean."""

    matrices: Tensor  # (2, D, padded D), P and Q
    order: Tensor  # (V,) int32, rows of the weight from the most to the least active
    error: float  # ‖P·Qᵀ - 1‖


class Moments:
    """Running first and second moments of hidden states.

    Hidden states of short texts are kept until there are enough for a product.
    """

    def __init__(self, dim: int) -> None:
        self.tokens = 0
        self._kept: list[Tensor] = []
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """Add hidden states (N, D) float32."""
        self.tokens += tokens.shape[0]
        if tokens.shape[0] >= _ADDED_TOKENS:
            self._add_up(tokens)
            return
        self._kept.append(tokens.clone())  # the caller may change its own
        if sum(map(len, self._kept)) >= _ADDED_TOKENS:
            self._add_kept()

    def _add_kept(self) -> None:
        if self._kept:
            tokens, self._kept = torch.cat(self._kept), []
            self._add_up(tokens)

    def _add_up(self, tokens: Tensor) -> None:
        # Not in place: inference tensors must not be written outside of inference_mode.
        self._sum = self._sum + tokens.sum(0)
        self._products = self._products + tokens.T @ tokens

    @property
    def mean(self) -> Tensor:
        """Mean (D,)."""
        self._add_kept()
        return self._sum / self.tokens

    @property
    def covariance(self) -> Tensor:
        """Covariance matrix (D, D)."""
        self._add_kept()
        return self._products / self.tokens - self.mean.outer(self.mean)


def balanced_basis(moments: Moments, weight: Tensor, bias: Tensor | None) -> Basis | None:
    """Return the basis for hidden states and a weight, or None if they are empty or not finite."""
    if moments.tokens == 0 or weight.numel() == 0:
        return None
    entries, activity = _entry_moments(weight, bias, moments.mean.float())
    hidden = moments.covariance
    if not (entries.isfinite().all() and hidden.isfinite().all()):
        return None
    root, inverse_root = _roots(hidden)
    squares, vectors = torch.linalg.eigh(root @ entries @ root)
    squares, vectors = squares.flip(0), vectors.flip(1)
    scale = squares.clamp_min(_FLOOR**2 * squares[0]) ** 0.25
    matrices = torch.stack([inverse_root @ vectors * scale, root @ vectors / scale])
    matrices = _rotate_stages(torch.nn.functional.pad(matrices, (0, -len(squares) % _PADDING)))
    # Rounding errors are relative to ‖h‖ + ‖mean‖, so ‖P·h‖ must not be smaller for any h.
    deviation = hidden.trace().clamp_min(0).sqrt()
    length = (matrices[0].T @ hidden @ matrices[0]).trace().sqrt()
    factor = _LENGTH * (deviation + moments.mean.norm()) / length
    matrices = torch.stack([matrices[0] * factor, matrices[1] / factor]).float()
    error = matrices[0].double() @ matrices[1].double().T - torch.eye(len(squares))
    if not (size := error.norm().item()) <= _MAX_ERROR:  # also refuses NaN
        return None
    return Basis(matrices, activity.argsort(descending=True).int(), size)


def _entry_moments(weight: Tensor, bias: Tensor | None, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return second moments (D, D) of the rows, and logits (V,) of the mean over row norms."""
    moments = torch.zeros(2 * (weight.shape[1],), dtype=torch.float64)
    activity = []
    for first in range(0, weight.shape[0], _CHUNK):
        rows = weight[first : first + _CHUNK].float()
        moments += rows.T @ rows
        logits = rows @ mean
        if bias is not None:
            logits += bias[first : first + _CHUNK]
        activity.append(logits / rows.norm(dim=1))
    return moments / weight.shape[0], torch.cat(activity)


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of moments (D, D), and its inverse."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp_min(_FLOOR * values[-1]).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T


def _rotate_stages(matrices: Tensor) -> Tensor:
    """Rotate the dimensions of each stage at random: one int8 scale then suits all of them."""
    padded_dim = matrices.shape[-1]
    generator = torch.Generator().manual_seed(0)
    ends = [padded_dim // 4, padded_dim // 2, padded_dim]
    return torch.cat(
        [
            part @ _rotation(part.shape[-1], generator)
            for part in matrices.tensor_split(ends[:-1], dim=-1)
        ],
        dim=-1,
    )


def _rotation(dim: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix (dim, dim)."""
    random = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    rotation: Tensor = torch.linalg.qr(random)[0]
    return rotation
