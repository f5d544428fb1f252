"""Transforms of scores that the fused kernels support."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """Multiplies scores by a factor.

    Unlike a lambda, a Scale can be pickled, and the losses compute scores and draw in one pass.

    Example::

        >>> sf.negative_cache.Scale(2.0)(torch.tensor([1.0, 3.0]))
        tensor([2., 6.])

    Args:
        factor: factor of the scores.
    """

    factor: float

    def __call__(self, scores: Tensor) -> Tensor:
        return scores * self.factor
