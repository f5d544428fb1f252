"""What the study of training finds, a number a row."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.machine import Machine
from examples.docstrings.training_cost import StepCost, loss_difference

LEAST_SPEED_UP, LEAST_SAVING = 3.0, 4.0  # the targets
SECONDS, PEAK, LARGEST, LOSS = "seconds per step", "peak", "largest batch", "loss"
RATIO, DIFFERENCE = "plain PyTorch over ours", "largest difference"


@dataclass(frozen=True, kw_only=True)
class Finding:
    loss: str
    contender: str
    quantity: str
    step: int  # of a loss; 0 of the others
    value: float
    unit: str
    at_least: float | None = None  # a target

    @property
    def verdict(self) -> str:
        if self.at_least is None:
            return ""
        return f">= {self.at_least:g}: {'met' if self.value >= self.at_least else 'missed'}"


@dataclass(frozen=True, kw_only=True)
class Fact(Machine, Finding):
    """A finding, and where it was made."""


def findings_of(
    loss: str, costs: Mapping[str, StepCost], batches: Mapping[str, int], limit_mib: float
) -> list[Finding]:
    """The rows of one loss.

    Args:
        loss: of the trainings.
        costs: by contender, "splade_fast" and "pytorch".
        batches: the largest within limit_mib, by contender.
        limit_mib: the memory.
    """
    ours, plain = costs["splade_fast"], costs["pytorch"]
    found = []
    for contender, cost in costs.items():
        seconds = statistics.quantiles(cost.seconds, n=4)
        rows = [
            (SECONDS, cost.median_seconds, "s"),
            (f"{SECONDS}, first quartile", seconds[0], "s"),
            (f"{SECONDS}, third quartile", seconds[2], "s"),
            (PEAK, cost.peak_mib, "MiB above the model"),
        ]
        if contender in batches:
            rows.append((f"{LARGEST} in {limit_mib / 1024:g} GiB", batches[contender], "pairs"))
        found += [
            Finding(loss=loss, contender=contender, quantity=q, step=0, value=v, unit=u)
            for q, v, u in rows
        ]
        found += [
            Finding(loss=loss, contender=contender, quantity=LOSS, step=step, value=v, unit="nats")
            for step, v in enumerate(cost.losses, start=1)
        ]
    for quantity, value, unit, least in (
        (SECONDS, plain.median_seconds / ours.median_seconds, "times", LEAST_SPEED_UP),
        (PEAK, plain.peak_mib / ours.peak_mib, "times", LEAST_SAVING),
    ):
        found.append(
            Finding(
                loss=loss,
                contender=RATIO,
                quantity=quantity,
                step=0,
                value=value,
                unit=unit,
                at_least=least,
            )
        )
    found.append(
        Finding(
            loss=loss,
            contender=DIFFERENCE,
            quantity=LOSS,
            step=0,
            value=loss_difference(costs),
            unit="nats",
        )
    )
    return found


def format_findings(findings: Sequence[Finding]) -> str:
    """A line for each but the losses of single steps."""
    return "\n".join(
        f"{f.loss:<15} {f.contender:<24} {f.quantity:<34} {f.value:>12.5g} {f.unit}  "
        f"{f.verdict}".rstrip()
        for f in findings
        if not f.step
    )
