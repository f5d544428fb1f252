"""ChunkFolder: encoded chunks of a corpus, which an interrupted run leaves for the next one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from splade_fast._atomic_files import finish_files, remove_folder
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.index import find_joined_parts
from splade_fast.search.work_folder import INDEX, WorkFolder


class ChunkFolder(WorkFolder):
    """Folder beside an index for the chunks of its corpus.

    It holds a file for each finished chunk, the settings that all chunks share, and the index while
    it is joined.
    """

    verb = "encode"

    @property
    def index(self) -> Path:
        """Folder that becomes the index."""
        return self.path / INDEX

    def file(self, number: int) -> Path:
        """Return the file of a chunk."""
        return self.path / f"{number}.safetensors"

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

    def finish(self, index: Path) -> None:
        """Rename the folder of the index to `index`, and remove this folder."""
        finish_files(self.index)
        self.rename(self.index, index)


def _holds_rows(file: Path, count: int) -> bool:
    """Return whether a file holds `count` whole rows."""
    try:
        return len(SparseRows.load(file)) == count
    except (FileNotFoundError, ValueError):
        return False
