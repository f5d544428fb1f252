"""Joining of files of SparseRows without holding all rows in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from splade_fast._atomic_files import name_in_errors, whole_file
from splade_fast._tensor_files import DTYPES, bytes_of, write_header
from splade_fast.ops.sparse_rows import SparseRows

_ENTRIES_AT_A_TIME = 2**20


@dataclass
class _Contents:
    """Metadata of a file, and dtypes and shape of its tensors.

    Args:
        metadata: metadata of safetensors.
        dtypes: safetensors' name of each tensor's dtype.
        count: number of rows.
        width: number of slots of a row.
    """

    metadata: dict[str, str]
    dtypes: dict[str, str]
    count: int
    width: int

    @classmethod
    def read(cls, path: Path) -> _Contents:
        """Read the contents of a file, or those that were noted before it was deleted."""
        note = _note(path)
        try:
            if note.exists():
                return cls(**json.loads(note.read_text(encoding="utf-8")))
            with safe_open(path, framework="pt") as file:
                dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
                count, width = file.get_slice("indices").get_shape()
                return cls(file.metadata(), dtypes, count, width)
        except (SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def row_bytes(self, name: str, width: int) -> int:
        """Return the bytes of a tensor's row that has `width` slots."""
        return DTYPES[self.dtypes[name]].itemsize * (1 if name == "lengths" else width)

    def note(self, path: Path) -> None:
        """Write a file beside `path` that says what the file held."""
        with whole_file(_note(path)) as temporary:
            temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")


def _note(path: Path) -> Path:
    return path.with_suffix(".joined")


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def find_joined(parts: Sequence[Path], target: Path) -> list[bool]:
    """Return whether an interrupted `join_files` has copied each part."""
    if target.exists():
        return [True] * len(parts)
    return [_unfinished(target).exists() and _note(part).exists() for part in parts]


def join_files(parts: Sequence[Path], target: Path) -> None:
    """Write the same bytes as `SparseRows.cat(all parts).save(target)`.

    A call with the same arguments goes on where an interrupted one has stopped.

    Args:
        parts: at least one file of `SparseRows.save`, of equal num_cols and dtype. Each file is
            deleted once it is copied.
        target: the file to write; must not exist.

    Raises:
        FileExistsError: `target` exists.
        OSError: the file system failed.
        ValueError: a part is damaged, or its num_cols or dtype differs from the first one's.
    """
    if target.exists():
        raise FileExistsError(f"{target} must not exist yet")
    unfinished = _unfinished(target)
    joined = find_joined(parts, target)
    for part, is_joined in zip(parts, joined, strict=True):
        if not is_joined:
            _note(part).unlink(missing_ok=True)  # of a joined file that is gone
    contents = [_Contents.read(part) for part in parts]
    first = contents[0]
    for part, other in zip(parts, contents, strict=True):
        if (other.metadata, other.dtypes) != (first.metadata, first.dtypes):
            raise ValueError(
                f"{part} must hold {first.metadata} {first.dtypes} as {parts[0]} does, "
                f"got {other.metadata} {other.dtypes}"
            )
    count = sum(one.count for one in contents)
    width = max(one.width for one in contents)
    with (
        name_in_errors(target),
        unfinished.open("r+b" if unfinished.exists() else "xb") as file,
    ):
        starts = _write_header(file, first, count, width)
        for part, own, is_joined in zip(parts, contents, joined, strict=True):
            if not is_joined:
                _copy(part, file, starts, width)
                own.note(part)
            part.unlink(missing_ok=True)
            starts = {
                name: start + own.count * own.row_bytes(name, width)
                for name, start in starts.items()
            }
    unfinished.rename(target)
    for part in parts:
        _note(part).unlink()


def _copy(part: Path, file: BinaryIO, starts: Mapping[str, int], width: int) -> None:
    """Write the tensors of a part from the given places on, and flush them to disk."""
    offsets = dict(starts)
    for block in _blocks(SparseRows.load(part), width):
        for name, tensor in block.items():
            file.seek(offsets[name])
            offsets[name] += file.write(bytes_of(tensor.contiguous()))
    file.flush()
    os.fsync(file.fileno())


def _write_header(file: BinaryIO, like: _Contents, count: int, width: int) -> dict[str, int]:
    """Write the header as safetensors does, and return the offset of each tensor's bytes."""
    shapes = {"indices": (count, width), "values": (count, width), "lengths": (count,)}
    starts, size = write_header(
        file,
        {name: (DTYPES[dtype], shapes[name]) for name, dtype in like.dtypes.items()},
        like.metadata,
    )
    file.truncate(size)
    return starts


def _blocks(rows: SparseRows, width: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of consecutive blocks of rows, padded to `width`."""
    indices, values = rows.indices.new_empty(0, width), rows.values.new_empty(0, width)
    no_rows = SparseRows(indices, values, rows.lengths[:0], rows.num_cols)  # cat pads to its width
    rows_at_once = max(1, _ENTRIES_AT_A_TIME // max(width, 1))
    for start in range(0, len(rows), rows_at_once):
        block = SparseRows.cat([rows[start : start + rows_at_once], no_rows])
        yield {name: getattr(block, name) for name in ("indices", "values", "lengths")}
