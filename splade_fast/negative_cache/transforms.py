"""Transforms of scores that keep the fused way of drawing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """factor * scores. Unlike a lambda it can be pickled, and scoring and drawing stay one pass."""

    factor: float

    def __call__(self, scores: Tensor) -> Tensor:
        return scores * self.factor
