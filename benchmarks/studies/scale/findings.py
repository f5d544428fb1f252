"""What the studies find, a number a row."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.machine import Machine

TIME, EXTRA_MEMORY = "time", "extra memory"


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One number about one size; a median where there are several rounds."""

    quantity: str
    value: float
    unit: str
    rounds: int = 1
    p25: float | None = None
    p75: float | None = None


@dataclass(frozen=True, kw_only=True)
class Size:
    """What was measured."""

    study: str
    variant: str
    axis: str  # what grows, e.g. "documents"
    size: int


@dataclass(frozen=True, kw_only=True)
class Finding(Quantity, Size):
    """A number, and what it is of."""

    @property
    def curve(self) -> tuple[str, str, str]:
        """What a power law is fitted through."""
        return self.study, self.variant, self.quantity


@dataclass(frozen=True, kw_only=True)
class Fact(Machine, Finding):
    """A finding, and where it was made."""

    @property
    def group(self) -> tuple[str, str, int]:
        """What a new run replaces."""
        return self.study, self.variant, self.size


def in_order(fact: Fact) -> tuple[str, str, int, str]:
    return *fact.group, fact.quantity


def format_findings(findings: Sequence[Finding]) -> str:
    return "\n".join(
        f"{f.study:<11} {f.variant:<22} {f.size:>10,} {f.axis:<10} {f.quantity:<18} "
        f"{f.value:>12.5g} {f.unit}"
        for f in findings
    )
