"""Files of SparseRows joined into one, whose rows never are in memory together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from splade_fast.ops.sparse_rows import SparseRows

_ENTRIES_AT_A_TIME = 2**20
_HEADER_ALIGNMENT = 8


@dataclass
class _Contents:
    """What a file holds, as safetensors describes it."""

    metadata: dict[str, str]
    dtypes: dict[str, str]  # in the order of the tensors in the file
    count: int
    width: int

    @classmethod
    def of(cls, path: Path) -> _Contents:
        try:
            with safe_open(path, framework="pt") as file:
                dtypes = {name: file.get_slice(name).get_dtype() for name in _names(path)}
                count, width = file.get_slice("indices").get_shape()
                return cls(file.metadata(), dtypes, count, width)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _names(path: Path) -> list[str]:
    """The tensors of a sound file in its order, also of those that have no bytes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return [name for name in json.loads(file.read(size)) if name != "__metadata__"]


def join_files(parts: Sequence[Path], target: Path) -> None:
    """SparseRows.cat(all parts).save(target), to the byte; each part is deleted once it is copied.

    Args:
        parts: at least one file of `SparseRows.save`; all have the same num_cols and dtype.
        target: the file to write; must not exist.

    Raises:
        OSError: of the file system.
        ValueError: a part is damaged, or differs from the first one.
    """
    contents = [_Contents.of(part) for part in parts]
    first = contents[0]
    for part, other in zip(parts, contents, strict=True):
        if (other.metadata, other.dtypes) != (first.metadata, first.dtypes):
            raise ValueError(
                f"{part} must hold {first.metadata} {first.dtypes} as {parts[0]} does, "
                f"got {other.metadata} {other.dtypes}"
            )
    count = sum(one.count for one in contents)
    width = max(one.width for one in contents)
    with target.open("xb") as file:
        places = _write_header(file, first, count, width)
        for part in parts:
            for block in _blocks(SparseRows.load(part), width):
                for name, tensor in block.items():
                    file.seek(places[name])
                    places[name] += file.write(_bytes(tensor))
            part.unlink()


def _write_header(file: BinaryIO, like: _Contents, count: int, width: int) -> dict[str, int]:
    """The header as safetensors writes it; returns where the bytes of each tensor start."""
    shapes = {"indices": [count, width], "values": [count, width], "lengths": [count]}
    header: dict[str, object] = {"__metadata__": like.metadata}
    starts: dict[str, int] = {}
    end = 0
    for name, dtype in like.dtypes.items():
        starts[name] = end
        end += _size_of(dtype) * torch.Size(shapes[name]).numel()
        header[name] = {
            "dtype": dtype,
            "shape": shapes[name],
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    data = file.tell()
    file.truncate(data + end)
    return {name: data + start for name, start in starts.items()}


def _size_of(dtype: str) -> int:
    """Bytes of one number, of names such as F32 and BF16."""
    return int(dtype.lstrip("BFI")) // 8


def _blocks(rows: SparseRows, width: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of some rows after the other, padded to `width`."""
    none, no_values = rows.indices.new_empty(0, width), rows.values.new_empty(0, width)
    widest = SparseRows(none, no_values, rows.lengths[:0], rows.num_cols)
    rows_at_once = max(1, _ENTRIES_AT_A_TIME // max(width, 1))
    for start in range(0, len(rows), rows_at_once):
        block = SparseRows.cat([rows[start : start + rows_at_once], widest])
        yield {name: getattr(block, name) for name in ("indices", "values", "lengths")}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
