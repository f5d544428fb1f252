"""Power laws through measurements: value = prefactor * size ** exponent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.studies.scale.findings import Finding

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
    """A row of the CSV of exponents."""

    study: str
    variant: str
    quantity: str
    axis: str
    sizes: int
    smallest: int
    largest: int
    prefactor: float
    exponent: float
    standard_error: float
    unit: str


def power_law(sizes: Sequence[float], values: Sequence[float]) -> PowerLaw:
    """Least squares on the logarithms; the error is that of the slope from the residuals.

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


def law_of(findings: Sequence[Finding]) -> PowerLaw:
    """Through the findings of one curve."""
    return power_law([f.size for f in findings], [positive(f) for f in findings])


def positive(finding: Finding) -> float:
    """Its value; memory is counted in pages, and may not grow by one: then it is one."""
    return max(finding.value, _PAGE) if finding.unit == "MiB" else finding.value


def curves(findings: Sequence[Finding]) -> dict[tuple[str, str, str], list[Finding]]:
    """The findings by study, variant and quantity, by ascending size."""
    found: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in sorted(findings, key=lambda finding: finding.size):
        found.setdefault(finding.curve, []).append(finding)
    return dict(sorted(found.items()))


def exponents(findings: Sequence[Finding]) -> list[Exponent]:
    """Of every curve of enough sizes; rates are times upside down and have none of their own."""
    found = []
    for (study, variant, quantity), points in curves(findings).items():
        if len(points) < MIN_SIZES or points[0].unit == "1/s":
            continue
        law = law_of(points)
        found.append(
            Exponent(
                study=study,
                variant=variant,
                quantity=quantity,
                axis=points[0].axis,
                sizes=len(points),
                smallest=points[0].size,
                largest=points[-1].size,
                **vars(law),
                unit=points[0].unit,
            )
        )
    return found


def format_exponents(found: Sequence[Exponent]) -> str:
    return "\n".join(
        f"{e.study:<11} {e.variant:<22} {e.quantity:<18} ~ {e.axis} ** "
        f"{e.exponent:.3f} +- {e.standard_error:.3f}"
        for e in found
    )
