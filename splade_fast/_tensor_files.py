"""Files of tensors in the format of safetensors: written in one piece, or mapped and then filled.

`safetensors.torch.save_file` writes to a file of its own, which stays behind if the program is
killed, and needs all tensors in memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

Shape = tuple[torch.dtype, Sequence[int]]

# Names of dtypes in the header, in the order in which a file has its tensors.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}
_HEADER_ALIGNMENT = 8


def write_header(
    file: BinaryIO, shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None
) -> tuple[dict[str, int], int]:
    """Write the header that safetensors writes.

    Args:
        file: a file, which is written from its beginning.
        shapes: dtype and shape of each tensor.
        metadata: texts that the header holds; with more than one, their order is that given.

    Returns:
        Offset of each tensor's bytes, in the order of the file, and the size of the whole file.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(shapes, key=lambda name: (_RANKS[shapes[name][0]], name)):
        dtype, shape = shapes[name]
        starts[name] = end
        end += math.prod(shape) * dtype.itemsize
        offsets = [starts[name], end]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    data = file.tell()
    return {name: data + start for name, start in starts.items()}, data + end


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the bytes that `safetensors.torch.save_file` writes, to the file `path` itself."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    with path.open("wb") as file:
        starts, _ = write_header(file, shapes, metadata)
        for name in starts:
            file.write(bytes_of(stored[name]))


def map_tensors(
    path: Path, shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Write a file of tensors that are 0, and return them mapped, so that writes change the file.

    Raises:
        OSError: the disk has no room for the file.
    """
    with path.open("w+b") as file:
        starts, size = write_header(file, shapes, metadata)
        file.flush()
        content = map_bytes(file, size)
    return {
        name: content[starts[name] : starts[name] + math.prod(shape) * dtype.itemsize]
        .view(dtype)
        .view(tuple(shape))
        for name, (dtype, shape) in shapes.items()
    }


def map_bytes(file: BinaryIO, size: int) -> Tensor:
    """Return the first `size` bytes of a file, mapped as uint8, so that writes change the file.

    Raises:
        OSError: the disk has no room for so many bytes.
    """
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    # Takes the room now. A write to a mapped file for which the disk has none ends the program.
    disk = os.fstatvfs(file.fileno())
    if size > disk.f_bavail * disk.f_frsize:  # without filling the disk first
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)
    return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(size,)))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
