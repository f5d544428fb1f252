"""What the studies find, a number a row."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Finding:
    study: str
    model: str
    dim: int
    dtype: str
    variant: str  # a remedy, an algorithm, a stage, a contender
    quantity: str
    value: float
    unit: str
    active: float | None = None  # share of positive pooled entries
    at_most: float | None = None  # targets
    at_least: float | None = None

    @property
    def verdict(self) -> str:
        verdicts = []
        if self.at_most is not None:
            outcome = "met" if self.value <= self.at_most else "missed"
            verdicts.append(f"<= {self.at_most:g}: {outcome}")
        if self.at_least is not None:
            outcome = "met" if self.value >= self.at_least else "missed"
            verdicts.append(f">= {self.at_least:g}: {outcome}")
        return "; ".join(verdicts)


@dataclass(frozen=True, kw_only=True)
class Fact(Machine, Finding):
    """A finding, and where it was made."""

    @property
    def group(self) -> tuple[str, ...]:
        """What a new run of a study replaces."""
        return self.study, self.model, self.dtype


def in_order(fact: Fact) -> tuple[str, int, bool]:
    return fact.study, fact.dim, fact.dtype != "float32"


def format_findings(findings: Sequence[Finding]) -> str:
    return "\n".join(_line(finding) for finding in findings)


def _line(finding: Finding) -> str:
    share = "" if finding.active is None else f"{finding.active:.2%} active"
    return (
        f"{finding.study:<9} {finding.model:<24} {finding.dim:>4} {finding.dtype:<8} {share:>14}  "
        f"{finding.variant:<22} {finding.quantity:<34} {finding.value:>12.5g} {finding.unit}  "
        f"{finding.verdict}"
    ).rstrip()
