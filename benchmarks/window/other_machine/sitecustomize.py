"""Refuse to import what a machine with a GPU may lack.

Python runs this file if its folder is on PYTHONPATH.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from typing import Any

MISSING = frozenset({"ir_measures", "expecttest", "bm25s", "datasets", "splade_fast._C"})


class _Refuse(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _Refuse())
