"""Files of tensors over columns, such as SparseRows: safetensors with a JSON header."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from splade_fast._atomic_files import whole_file
from splade_fast._tensor_files import Shape, map_tensors, write_tensors


@dataclass(frozen=True)
class FileKind:
    """Kind of a file: its name, version and tensors.

    Args:
        content: content of such a file, as error messages name it.
        header: name of the JSON text in the metadata.
        format: name of the format in the header.
        version: version of the format.
        tensors: names of the tensors.
    """

    content: str
    header: str
    format: str
    version: int
    tensors: frozenset[str]


ROWS = FileKind(
    "saved SparseRows",
    "sparse_rows",
    "splade_fast.SparseRows",
    1,
    frozenset({"indices", "values", "lengths"}),
)


def write_file(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    num_cols: int,
    kind: FileKind = ROWS,
) -> None:
    """Write a file, which replaces an existing one only when it is complete.

    Raises:
        OSError: the file system failed, for example because it is full.
    """
    with whole_file(path) as temporary:
        write_tensors(temporary, tensors, _metadata(num_cols, kind))


@contextmanager
def mapped_file(
    path: str | os.PathLike[str], shapes: Mapping[str, Shape], num_cols: int, kind: FileKind
) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a new file, mapped and all 0, which appears at the end of the block.

    It has the bytes that `write_file` writes for what the tensors then hold.

    Args:
        shapes: dtype and shape of each tensor.

    Raises:
        OSError: the file system failed, for example because it is full.
    """
    with whole_file(path) as temporary:
        yield map_tensors(temporary, shapes, _metadata(num_cols, kind))


def _metadata(num_cols: int, kind: FileKind) -> dict[str, str]:
    header = {"format": kind.format, "version": kind.version, "num_cols": num_cols}
    return {kind.header: json.dumps(header)}


def read_file(path: str | os.PathLike[str], kind: FileKind = ROWS) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of a file, mapped into memory, and num_cols.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(kind.header, "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    num_cols = _parse_header(path, header, kind)
    if set(tensors) != kind.tensors:
        raise ValueError(f"{path} must hold {kind.content}, got tensors {sorted(tensors)}")
    return tensors, num_cols


def _parse_header(path: str | os.PathLike[str], header: str, kind: FileKind) -> int:
    """Return num_cols. Raise ValueError if the header has another format or version."""
    try:
        facts = json.loads(header)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != kind.format:
        raise ValueError(f"{path} must hold {kind.content}, got the header {header[:60]!r}")
    version, num_cols = facts.get("version"), facts.get("num_cols")
    if version != kind.version:
        raise ValueError(f"{path} must have format version {kind.version}, got {version}")
    if not isinstance(num_cols, int) or isinstance(num_cols, bool):
        raise ValueError(f"{path} is damaged: num_cols must be a whole number, got {num_cols!r}")
    return num_cols
