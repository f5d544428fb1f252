"""Rows of the results: one number each, kept as CSV. Cases and studies share the columns."""

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import Machine

RESULTS = Path(__file__).parents[1] / "results"
TIME, EXTRA_MEMORY, FLOOR = "time", "extra memory", "floor"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number: the input and the contender that it belongs to, and the bounds it has to keep."""

    study: str  # a case or a study
    part: str = ""  # "forward", or the part of a study
    subject: str = ""  # shape and layout of the input, or the model
    dtype: str = "float32"
    device: str = "cpu"
    contender: str = "ours"
    axis: str = ""  # the quantity of the input that varies, e.g. "documents"
    size: float | None = None  # on that axis
    quantity: str
    value: float  # the median, where there are several rounds
    unit: str = ""
    rounds: int = 1
    p25: float | None = None
    p75: float | None = None
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """Columns that a new measurement of the same quantity has in common with an old one."""
        names = (
            *("study", "part", "subject", "dtype", "device"),
            *("contender", "axis", "size", "quantity"),
        )
        return tuple(_to_text(getattr(self, name)) for name in names)

    @property
    def is_within_bounds(self) -> bool:
        is_low_enough = self.at_most is None or self.value <= self.at_most
        return is_low_enough and (self.at_least is None or self.value >= self.at_least)

    @property
    def verdict(self) -> str:
        """Bounds and whether they are met; empty without bounds."""
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        found = [f"{relation} {bound:g}" for relation, bound in bounds if bound is not None]
        outcome = "met" if self.is_within_bounds else "missed"
        return f"{', '.join(found)}: {outcome}" if found else ""


@dataclass(frozen=True, kw_only=True)
class Row(Machine, Measurement):
    """A measurement, and the machine, versions and commit that it was made with."""


def to_rows(measurements: Sequence[Measurement], machine: Machine) -> list[Row]:
    return [Row(**vars(measurement), **vars(machine)) for measurement in measurements]


def update_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows in place of the old ones with the same keys, and the others behind them."""
    merged = {row.key: row for row in read_csv(path)} if path.exists() else {}
    merged.update({row.key: row for row in rows})
    write_csv(list(merged.values()), path)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_TYPES)
        writer.writerows([_to_text(getattr(row, name)) for name in _TYPES] for row in rows)
    temporary.replace(path)


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [
            Row(**{name: _from_text(text, _TYPES[name]) for name, text in line.items()})
            for line in csv.DictReader(file)
        ]


_TYPES: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Row)}


def _to_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.6g}"
    return str(value)


def _from_text(text: str, kind: Any) -> Any:
    if kind in (str, int, float):
        return kind(text)
    return float(text) if text else None
