"""SparseIndex that an index folder keeps beside its vectors."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from splade_fast import _library
from splade_fast._atomic_files import whole_file
from splade_fast.ops.score import sparse_search
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.hits import warn_of_data
from splade_fast.search.index import VECTORS, Index
from splade_fast.search.sparse_index.sparse_index import SparseIndex, can_index

_SEARCH = "search.safetensors"
# Size, time and digest of the vectors and of the index, as they were when the index was written.
_STAMPS = "search.json"
_BYTES_AT_A_TIME = 2**22


class KeptIndex:
    """Index folder whose first search builds a SparseIndex, which later ones use.

    It is built again where the vectors have changed. One process builds, and others wait for it.

    Args:
        folder: an index folder. Its vectors are checked, unless that was done at an earlier search.

    Raises:
        FileNotFoundError, ValueError: see `Index.load`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        is_checked = self._is_unchanged()
        self._loaded_state = _state_or_none(self._folder / VECTORS)
        self.index = Index.load(folder, should_check=not is_checked)

    def search(
        self, queries: SparseRows, k: int, *, show_progress: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return what `sparse_search` returns for the rows of the index.

        Vectors of which `SparseIndex` has no bounds are scanned, as are all where the folder cannot
        be written; a warning tells the reason.

        Args:
            queries: (Q, V).
            k: number of documents for each query.
            show_progress: draw a progress bar while the index is built.
        """
        kept = None
        if _library.is_cpu_library_loaded() and can_index(queries) and self._holds_loaded_vectors():
            kept = self._find()
            if kept is None:
                kept = self._build(show_progress)
        if kept is None:
            return sparse_search(queries, self.index.rows, k)
        return kept.search(queries, k)

    def _find(self) -> SparseIndex | None:
        """Return the index of the vectors as they are, or None."""
        if not (self._is_unchanged() or self._has_same_contents()):
            return None
        try:
            return SparseIndex.load(self._path, should_check=False)
        except (OSError, ValueError):
            return None

    def _build(self, show_progress: bool) -> SparseIndex | None:
        if not can_index(self.index.rows):
            warn_of_data(
                f"{self._folder} is scanned: SparseIndex takes values that are finite and at least "
                "0, in at most 2**24 columns"
            )
            return None
        built = None
        try:
            with self._lock():
                # The process that had the lock before may have built it.
                if (found := self._find()) is not None:
                    return found
                self._remove_leftovers()
                # Opened before the build, which a folder that cannot be written need not wait for.
                with whole_file(self._stamps_path) as temporary:
                    self._stamps_path.unlink(missing_ok=True)
                    built = SparseIndex.build(
                        self.index.rows, path=self._path, show_progress=show_progress
                    )
                    stamps = self._take_stamps() if self._holds_loaded_vectors() else {}
                    temporary.write_text(json.dumps(stamps), encoding="utf-8")
        except OSError as error:
            effect = "is scanned" if built is None else "builds its search index each time"
            warn_of_data(f"{self._folder} {effect}, since it cannot be written: {error}")
        return built

    @property
    def _path(self) -> Path:
        return self._folder / _SEARCH

    @property
    def _stamps_path(self) -> Path:
        return self._folder / _STAMPS

    def _read_stamps(self) -> dict[str, Any]:
        try:
            stamps = json.loads(self._stamps_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return stamps if isinstance(stamps, dict) else {}

    def _take_stamps(self) -> dict[str, Any]:
        paths = (self._folder / VECTORS, self._path)
        return {path.name: {**_state(path), "sha256": _digest(path)} for path in paths}

    def _is_unchanged(self) -> bool:
        """Return whether both files have the sizes and times that they were stamped with."""
        stamps = self._read_stamps()
        return all(
            (state := _state_or_none(path)) is not None
            and isinstance(stamp := stamps.get(path.name), dict)
            and state.items() <= stamp.items()
            for path in (self._folder / VECTORS, self._path)
        )

    def _holds_loaded_vectors(self) -> bool:
        """Return whether nobody has replaced the vectors since they were loaded."""
        return self._loaded_state == _state_or_none(self._folder / VECTORS)

    def _has_same_contents(self) -> bool:
        """Return whether both files have the contents that were stamped, as in a copied folder.

        They are then stamped again, if possible.
        """
        stamps = self._read_stamps()
        if not stamps or not self._path.is_file():
            return False
        found = self._take_stamps()
        for name, stamp in found.items():
            known = stamps.get(name)
            if not isinstance(known, dict) or known.get("sha256") != stamp["sha256"]:
                return False
        with suppress(OSError), whole_file(self._stamps_path) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")
        return True

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Keep other processes from building, where the file system has locks of folders."""
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _remove_leftovers(self) -> None:
        """Remove what a process that was killed has left; none other writes now."""
        for name in (_SEARCH, _STAMPS):
            for unfinished in self._folder.glob(f".{name}.*.partial"):
                unfinished.unlink(missing_ok=True)


def _state(path: Path) -> dict[str, int]:
    state = path.stat()
    return {"bytes": state.st_size, "modified_ns": state.st_mtime_ns}


def _state_or_none(path: Path) -> dict[str, int] | None:
    return _state(path) if path.is_file() else None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_BYTES_AT_A_TIME):
            digest.update(part)
    return digest.hexdigest()
