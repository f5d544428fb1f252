"""Plots beside the numbers, where matplotlib is installed: measuring needs none."""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path


def draw_if_possible(plots: str, rows: Sequence[object], path: Path) -> None:
    """`draw(rows, path)` of the module of that name, which may import matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return
    importlib.import_module(plots).draw(rows, path)
