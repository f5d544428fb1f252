"""ChunkFolder: encoded chunks of a corpus, which an interrupted run leaves for the next one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splade_fast._atomic_files import (
    finish_files,
    flush_folder,
    partial_folder,
    remove_folder,
)
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.claim_folder import claim_folder
from splade_fast.search.index import find_joined_parts


@dataclass
class ChunkFolder:
    """Folder beside an index for the chunks of its corpus.

    It holds a file for each finished chunk, the settings that all chunks share, and the index while
    it is joined.
    """

    path: Path

    @classmethod
    def beside(cls, index: str | os.PathLike[str]) -> ChunkFolder:
        """Return the folder of an index that does not exist yet."""
        return cls(partial_folder(index))

    @property
    def index(self) -> Path:
        """Folder that becomes the index."""
        return self.path / "index"

    def file(self, number: int) -> Path:
        """Return the file of a chunk."""
        return self.path / f"{number}.safetensors"

    @contextmanager
    def make(self) -> Iterator[None]:
        """Make the folder for the block, and remove it on an error unless a chunk is finished."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for unfinished in self.path.glob(".*.partial"):
                unfinished.unlink()
            yield
        except BaseException:
            if not self.has_finished():
                remove_folder(self.path)
            raise

    def claim(self, settings: dict[str, Any], *, should_keep: bool) -> None:
        """Store the settings of all chunks, or compare them with those of the chunks that exist.

        Args:
            settings: values of JSON by the name that a message gives them.
            should_keep: whether to keep the chunks that an earlier run has left.

        Raises:
            DataError: a chunk was made with other settings, or the file of settings is damaged.
        """
        claim_folder(self.path, settings, should_keep=should_keep, verb="encode")

    def find_finished(self, sizes: Sequence[int]) -> list[bool]:
        """Return whether each chunk is finished, and remove what can no longer be used.

        Args:
            sizes: number of texts of each chunk.
        """
        files = [self.file(number) for number in range(len(sizes))]
        joined = find_joined_parts(self.index, files)
        finished = [
            is_joined or _holds_rows(file, size)
            for is_joined, file, size in zip(joined, files, sizes, strict=True)
        ]
        if any(joined) and not all(finished):  # a chunk of another width would move all others
            remove_folder(self.index)
            finished = [_holds_rows(file, size) for file, size in zip(files, sizes, strict=True)]
        return finished

    def has_finished(self) -> bool:
        """Return whether the folder holds a finished chunk, joined or not."""
        is_any_chunk = any(path.stem.isdecimal() for path in self.path.glob("*.*"))
        return is_any_chunk or self.index.exists()

    def finish(self, index: Path) -> None:
        """Rename the folder of the index to `index`, and remove this folder."""
        finish_files(self.index)
        self.index.rename(index)
        flush_folder(index.parent)
        remove_folder(self.path)


def _holds_rows(file: Path, count: int) -> bool:
    """Return whether a file holds `count` whole rows."""
    try:
        return len(SparseRows.load(file)) == count
    except (FileNotFoundError, ValueError):
        return False
