"""Rows of the results, one per case and contender, and how rows are kept as CSV."""

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.harness.machine import Machine

AnyRow = TypeVar("AnyRow")  # a dataclass of texts, numbers and truth values


@dataclass(frozen=True)
class Measured:
    op: str
    shape: str
    layout: str
    fill: float
    active: float  # share of positive pooled entries, measured
    dtype: str
    device: str
    direction: str
    contender: str
    detail: str  # which way reached the floor
    correct: bool  # ours against the fp64 reference
    error: float
    tolerance: float
    rounds: int
    median_ms: float | None
    p25_ms: float | None
    p75_ms: float | None
    times_ours: float | None  # median over the median of ours
    share_of_floor: float | None  # median of the floor over this median
    peak_extra_mib: float | None
    verdict: str


@dataclass(frozen=True)
class Row(Machine, Measured):
    """What was measured, and where."""

    @property
    def case(self) -> tuple[str, ...]:
        return (
            self.op,
            self.shape,
            f"fill {self.fill:.2f} {self.layout}",
            f"{self.active:.1%} active",
            self.dtype,
            self.device,
            self.direction,
        )


def by_case(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    return groups


def write_csv(rows: Sequence[AnyRow], kind: type[AnyRow], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(_types(kind)))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _text(value) for name, value in vars(row).items()})
    temporary.replace(path)


def read_csv(kind: type[AnyRow], path: Path) -> list[AnyRow]:
    types = _types(kind)
    with path.open(newline="") as file:
        return [
            kind(**{name: _value(types[name], text) for name, text in line.items()})
            for line in csv.DictReader(file)
        ]


def _types(kind: Any) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(kind)}


def _text(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _value(kind: Any, text: str) -> Any:
    if kind is bool:
        return text == "True"
    if kind in (str, int, float):
        return kind(text)
    return float(text) if text else None
