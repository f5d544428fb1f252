"""What the studies find, a number a row."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.machine import Machine

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


def recorded(findings: Sequence[Finding], machine: Machine) -> list[Fact]:
    return [Fact(**asdict(finding), **asdict(machine)) for finding in findings]


def merged(old: Sequence[Fact], new: Sequence[Fact]) -> list[Fact]:
    """The new facts instead of the old ones of their groups, by study, variant and size."""
    replaced = {fact.group for fact in new}
    kept = [fact for fact in old if fact.group not in replaced]
    return sorted([*kept, *new], key=lambda fact: (*fact.group, fact.quantity))


def format_findings(findings: Sequence[Finding]) -> str:
    return "\n".join(
        f"{f.study:<11} {f.variant:<22} {f.size:>10,} {f.axis:<10} {f.quantity:<18} "
        f"{f.value:>12.5g} {f.unit}"
        for f in findings
    )
