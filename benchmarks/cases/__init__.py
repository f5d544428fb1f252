"""Cases: one module per op with `cases(device, dtypes, quick)`, found by its name."""

import importlib
import pkgutil
from collections.abc import Sequence
from typing import cast

import torch

from benchmarks.harness.case import Case


def names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def load(name: str, device: str, dtypes: Sequence[torch.dtype], *, quick: bool) -> list[Case]:
    module = importlib.import_module(f"{__name__}.{name}")
    return cast(list[Case], module.cases(device, dtypes, quick=quick))
