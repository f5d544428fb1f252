"""The basis in which the first few dimensions of hidden states and entries tell most of a logit.

Hidden states are multiplied by P and the decoder's rows by Q, with P·Qᵀ = 1, so that every product
stays what it is. Of all such pairs this is the balanced one (as in balanced truncation of linear
systems): both have the same second moments along it, on the diagonal and descending, which makes
the product of the norms of the dimensions that are left as small as it gets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BASIS_DIM = 1024  # the eigenvectors of larger moments take too long

_PADDING = 64  # int8 rows have a multiple of so many dimensions
_CHUNK = 16384  # rows of the weight that are converted at a time
# Of the largest eigenvalue: smaller ones are raised, and the condition of P with them kept in hand.
_FLOOR = 1e-4
_LENGTH = 4  # of P·h, in those of h and of the mean
_MAX_ERROR = 2.0**-10


@dataclass(frozen=True)
class Basis:
    """What head_prepare and head_forward_screened take beside the mean."""

    matrices: Tensor  # (2, D, padded D), P and Q
    order: Tensor  # (V,) int32, the entries from the least to the most active
    error: float  # ‖P·Qᵀ - 1‖


class Moments:
    """Of the hidden states of one weight's calls."""

    def __init__(self, dim: int) -> None:
        self.tokens = 0
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """More of them, (N, D) float32."""
        self.tokens += tokens.shape[0]
        # Not in place: those of a call under inference_mode may not be written to outside of it.
        self._sum = self._sum + tokens.sum(0)
        self._products = self._products + tokens.T @ tokens

    @property
    def mean(self) -> Tensor:
        return self._sum / self.tokens

    @property
    def around_mean(self) -> Tensor:
        """(D, D), the second moments."""
        return self._products / self.tokens - self.mean.outer(self.mean)


def balanced_basis(moments: Moments, weight: Tensor, bias: Tensor | None) -> Basis | None:
    """The basis for these hidden states and this weight; None where they have none to speak of."""
    if moments.tokens == 0 or weight.numel() == 0:
        return None
    entries, activity = _of_entries(weight, bias, moments.mean.float())
    hidden = moments.around_mean
    if not (entries.isfinite().all() and hidden.isfinite().all()):
        return None
    root, inverse_root = _roots(hidden)
    squares, vectors = torch.linalg.eigh(root @ entries @ root)
    squares, vectors = squares.flip(0), vectors.flip(1)
    scale = squares.clamp_min(_FLOOR**2 * squares[0]) ** 0.25
    matrices = torch.stack([inverse_root @ vectors * scale, root @ vectors / scale])
    matrices = _spread(torch.nn.functional.pad(matrices, (0, -len(squares) % _PADDING)))
    # Errors of rounding are relative to ‖h‖ + ‖mean‖: the length of P·h shall not be less, of any.
    spread = hidden.trace().clamp_min(0).sqrt()
    length = (matrices[0].T @ hidden @ matrices[0]).trace().sqrt()
    factor = _LENGTH * (spread + moments.mean.norm()) / length
    matrices = torch.stack([matrices[0] * factor, matrices[1] / factor]).float()
    error = matrices[0].double() @ matrices[1].double().T - torch.eye(len(squares))
    if not (size := error.norm().item()) <= _MAX_ERROR:  # nor NaN
        return None
    return Basis(matrices, activity.argsort().int(), size)


def _of_entries(weight: Tensor, bias: Tensor | None, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments of the decoder's rows, (D, D), and the logits of the mean per length, (V,)."""
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
    """The symmetric square root, and its inverse."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp_min(_FLOOR * values[-1]).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T


def _spread(matrices: Tensor) -> Tensor:
    """Rotated within each stage: no dimension stands out, and one scale a row fits all of them."""
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
    random = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    rotation: Tensor = torch.linalg.qr(random)[0]
    return rotation
