"""Studies: questions that take more than one case.

A study is a module or package with `measurements(rounds)`: functions that measure, by names whose
first word is the part of the study. A new one is found by its name.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import cast

from benchmarks.harness.results import Measurement
from benchmarks.harness.timing import Rounds

Measure = Callable[[], list[Measurement]]
ROUNDS = 9


def names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def load(name: str, rounds: Rounds) -> Mapping[str, Measure]:
    return cast(Mapping[str, Measure], _module(name).measurements(rounds))


def device(name: str) -> str:
    """Return the device of a study: "cpu", or `DEVICE` of its module."""
    return str(getattr(_module(name), "DEVICE", "cpu"))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
