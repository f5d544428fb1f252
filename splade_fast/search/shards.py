"""Folder of SparseIndexes that each hold some documents of a corpus and are searched as one."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import overload

from torch import Tensor

from splade_fast._atomic_files import new_folder
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.index import SHARDS, IndexMeta, parse_meta
from splade_fast.search.part_folder import part_name
from splade_fast.search.sparse_index import ShardedIndex, SparseIndex
from splade_fast.search.sparse_index.sparse_index import can_index

_FORMAT_VERSION = 1
_INDEX, _IDS = "shard.safetensors", "ids.json"


def is_shard_folder(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds shards."""
    return (Path(folder) / SHARDS).is_file()


def write_shard(
    rows: SparseRows,
    path: str | os.PathLike[str],
    ids: Sequence[str],
    *,
    show_progress: bool = True,
) -> int:
    """Write a folder with a SparseIndex of some documents and their ids.

    Args:
        rows: (N, V).
        path: the folder; must not exist.
        ids: N ids.
        show_progress: draw a progress bar.

    Returns:
        Number of documents, N.

    Raises:
        FileExistsError: `path` exists.
        ValueError: `SparseIndex` does not take the rows.
    """
    if not can_index(rows):
        raise ValueError(
            "rows must have values that are finite and at least 0, in at most 2**24 columns, to be "
            "searched in shards"
        )
    with new_folder(path) as folder:
        SparseIndex.build(rows, path=folder / _INDEX, show_progress=show_progress)
        (folder / _IDS).write_text(json.dumps(list(ids)), encoding="utf-8")
    return len(rows)


def describe_shards(folder: Path, meta: IndexMeta, sizes: Sequence[int]) -> None:
    """Write the file that describes all shards of a folder.

    Args:
        folder: the folder.
        meta: settings of the encoding.
        sizes: number of documents of each shard.
    """
    content = {
        "format_version": _FORMAT_VERSION,
        "documents": list(sizes),
        "encoding": asdict(meta),
    }
    (folder / SHARDS).write_text(json.dumps(content), encoding="utf-8")


class Shards:
    """Documents of a folder of shards: their index, their ids, and the settings of the encoding.

    Args:
        path: folder that `encode_corpus` or `export_parts` has written with the format "shards".
        should_check: check all numbers of all shards, which reads all files.

    Raises:
        FileNotFoundError: there are no shards at `path`, or one is missing.
        ValueError: a file is damaged, or the files do not fit together.

    Example::

        >>> from splade_fast.search.shards import Shards
        >>> encoder = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
        >>> with open("pets.tsv", "w") as file:
        ...     _ = file.write("d1\\tquick fox\\nd2\\tlazy dog\\n")
        >>> options = {"model": "CHECKPOINT", "file_format": "shards"}
        >>> _ = sf.encode_corpus(encoder, "pets.tsv", "pets", **options)
        >>> shards = Shards("pets")
        >>> scores, numbers = shards.index.search(encoder.encode("dog"), k=1)
        >>> shards.ids[int(numbers[0, 0])]
        'd2'
    """

    def __init__(self, path: str | os.PathLike[str], *, should_check: bool = True) -> None:
        folder = Path(path)
        if not is_shard_folder(folder):
            raise FileNotFoundError(f"no shards at {path}: {SHARDS} is missing")
        sizes, self.meta = _read_description(folder / SHARDS)
        indexes = []
        for number, size in enumerate(sizes):
            file = folder / part_name(_INDEX, number)
            index = SparseIndex.load(file, should_check=should_check)
            if len(index) != size:
                raise ValueError(f"{file} must have {size} documents, got {len(index)}")
            indexes.append(index)
        try:
            self.index = ShardedIndex(indexes)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        files = [folder / part_name(_IDS, number) for number in range(len(sizes))]
        self.ids: Sequence[str] = _Ids(files, sizes)

    @property
    def num_cols(self) -> int:
        """Number of columns, V."""
        return self.index.num_cols

    def search(self, queries: SparseRows, k: int) -> tuple[Tensor, Tensor]:
        """Return what `SparseIndex.search` returns for all documents."""
        return self.index.search(queries, k)


class _Ids(Sequence[str]):
    """Ids of all documents, of which a file is read once one of its ids is asked for."""

    def __init__(self, files: Sequence[Path], sizes: Sequence[int]) -> None:
        self._files = [_IdFile(file, size) for file, size in zip(files, sizes, strict=True)]
        self._starts = list(accumulate(sizes, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, number: int) -> str: ...

    @overload
    def __getitem__(self, number: slice) -> list[str]: ...

    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        place = range(len(self))[number]
        shard = bisect_right(self._starts, place) - 1
        return self._files[shard].ids[place - self._starts[shard]]


class _IdFile:
    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count

    @cached_property
    def ids(self) -> list[str]:
        try:
            ids = json.loads(self._path.read_text(encoding="utf-8"))
            if not isinstance(ids, list) or not all(isinstance(id_, str) for id_ in ids):
                raise ValueError("expected a list of ids")
            if len(ids) != self._count:
                raise ValueError(f"expected {self._count} ids, got {len(ids)}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._path} is damaged: {error}") from error
        return ids


def _read_description(file: Path) -> tuple[list[int], IndexMeta]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, sizes, meta = (
            content[name] for name in ("format_version", "documents", "encoding")
        )
        if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
            raise TypeError(f"documents cannot be {sizes!r}")
        if not isinstance(meta, dict):
            raise TypeError(f"encoding cannot be {meta!r}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if version != _FORMAT_VERSION:
        raise ValueError(f"{file} must have format version {_FORMAT_VERSION}, got {version}")
    return sizes, parse_meta(file, meta)
