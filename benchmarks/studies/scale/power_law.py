"""Power laws through measurements: value = prefactor * size ** exponent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.harness.results import Measurement

MIN_SIZES = 3  # a line through two has no error
_PAGE = 2.0**-8  # MiB


@dataclass(frozen=True)
class PowerLaw:
    prefactor: float
    exponent: float
    standard_error: float  # of the exponent

    def at(self, size: float) -> float:
        return float(self.prefactor * size**self.exponent)


@dataclass(frozen=True)
class Exponent:
    """Power law of one curve."""

    curve: tuple[str, str, str, str]  # part, subject, contender, quantity
    axis: str
    sizes: int
    law: PowerLaw


def power_law(sizes: Sequence[float], values: Sequence[float]) -> PowerLaw:
    """Fit by least squares on the logarithms; the residuals give the error of the slope.

    Raises:
        ValueError: fewer than three sizes, or a number that has no logarithm.
    """
    if len(sizes) < MIN_SIZES:
        raise ValueError(f"sizes must be at least {MIN_SIZES}, got {len(sizes)}")
    if min(*sizes, *values) <= 0:
        raise ValueError(f"sizes and values must be positive, got {sizes} and {values}")
    line, covariance = np.polyfit(np.log(sizes), np.log(values), 1, cov=True)
    slope, intercept = (float(coefficient) for coefficient in line)
    # Rounding leaves a variance of nothing now and then below it.
    return PowerLaw(math.exp(intercept), slope, math.sqrt(max(0.0, float(covariance[0, 0]))))


def exponents(measurements: Sequence[Measurement]) -> list[Exponent]:
    """Fit every curve of enough sizes, but for rates: a rate is a time upside down."""
    curves: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    axes = {}
    for m in measurements:
        if m.size is not None and m.unit != "1/s":
            curve = (m.part, m.subject, m.contender, m.quantity)
            # Memory is counted in pages, and may not grow by one: then it is one.
            value = max(m.value, _PAGE) if m.unit == "MiB" else m.value
            curves.setdefault(curve, []).append((m.size, value))
            axes[curve] = m.axis
    return [
        Exponent(curve, axes[curve], len(points), power_law(*zip(*points, strict=True)))
        for curve, points in sorted(curves.items())
        if len(points) >= MIN_SIZES
    ]
