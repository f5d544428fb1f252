"""Weights of teachers and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence


def check_weights(weights: Sequence[float] | None, count: int, of: str) -> list[float]:
    """Return a weight for each of several things; 1 by default.

    Args:
        weights: the weights.
        count: number of things.
        of: name of one of them, for a message.

    Raises:
        ValueError: there is not one weight for each, one is negative or not finite, or all are 0.
    """
    if weights is None:
        return [1.0] * count
    found = [float(weight) for weight in weights]
    if len(found) != count:
        raise ValueError(f"weights must be one per {of}, {count}, got {len(found)}")
    if not all(0 <= weight < math.inf for weight in found) or not any(found):
        raise ValueError(f"weights must be finite, at least 0 and not all 0, got {found}")
    return found
