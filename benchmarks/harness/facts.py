"""Findings of the studies become facts: a finding, and where and when it was made."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.harness.machine import Machine
from benchmarks.harness.results import read_csv, write_csv


class Grouped(Protocol):
    @property
    def group(self) -> Any:
        """What a new run of a study replaces."""


AnyFact = TypeVar("AnyFact")
GroupedFact = TypeVar("GroupedFact", bound=Grouped)


def recorded(findings: Sequence[Any], fact: type[AnyFact], machine: Machine) -> list[AnyFact]:
    """The findings as facts of that class, made on this machine."""
    return [fact(**asdict(finding), **asdict(machine)) for finding in findings]


def merged(
    old: Sequence[GroupedFact], new: Sequence[GroupedFact], order: Callable[[GroupedFact], Any]
) -> list[GroupedFact]:
    """The new facts instead of the old ones of their groups."""
    replaced = {fact.group for fact in new}
    return sorted([*(fact for fact in old if fact.group not in replaced), *new], key=order)


def merge_into_csv(
    new: Sequence[GroupedFact],
    fact: type[GroupedFact],
    path: Path,
    order: Callable[[GroupedFact], Any],
) -> None:
    """Write the facts of a run beside those that it does not replace."""
    old = read_csv(fact, path) if path.exists() else []
    write_csv(merged(old, new, order), fact, path)
