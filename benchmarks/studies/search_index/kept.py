"""Indexes of contenders that stay in a folder, since some take minutes to build."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.studies.search_index.contenders import (
    build_bmp,
    build_inverted_index,
    build_seismic,
)
from splade_fast import SparseIndex, SparseRows


def _build_ours(docs: SparseRows, path: Path) -> None:
    SparseIndex.build(docs, path=path, show_progress=False)


BUILDS: dict[str, Callable[[SparseRows, Path], None]] = {
    "ours": _build_ours,
    "bmp": build_bmp,
    "seismic": build_seismic,
    "inverted index": build_inverted_index,
}


@dataclass(frozen=True)
class KeptIndexes:
    """Folder of indexes, each with a note of the CPU seconds that its build took."""

    folder: Path

    def find(self, contender: str, docs: SparseRows, *, should_build: bool = False) -> Path:
        """Return the index of some documents, which is built if it is missing.

        Args:
            should_build: build it again.

        Raises:
            ImportError: the contender is not installed.
        """
        path = self.folder / f"{contender.replace(' ', '_')}-{len(docs)}"
        if should_build or not self._note(path).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._note(path).unlink(missing_ok=True)
            start = time.process_time()
            BUILDS[contender](docs, path)
            self._note(path).write_text(json.dumps(time.process_time() - start))
        return path

    def build_seconds(self, path: Path) -> float:
        """Return the CPU seconds of the build of an index, with that of its file."""
        return float(json.loads(self._note(path).read_text()))

    @staticmethod
    def _note(path: Path) -> Path:
        return path.with_name(path.name + ".seconds")
