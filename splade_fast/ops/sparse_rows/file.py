"""Files of SparseRows: safetensors with a JSON header."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from splade_fast._atomic_files import whole_file

_FORMAT = "splade_fast.SparseRows"
_FORMAT_VERSION = 1
_TENSORS = {"indices", "values", "lengths"}


def write_file(path: str | os.PathLike[str], tensors: dict[str, Tensor], num_cols: int) -> None:
    """Write a file, which replaces an existing one only when it is complete.

    Raises:
        OSError: the file system failed, for example because it is full.
    """
    header = {"format": _FORMAT, "version": _FORMAT_VERSION, "num_cols": num_cols}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(stored, temporary, metadata={"sparse_rows": json.dumps(header)})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of a file, mapped into memory, and num_cols.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("sparse_rows", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    num_cols = _parse_header(path, header)
    if set(tensors) != _TENSORS:
        raise ValueError(f"{path} must hold saved SparseRows, got tensors {sorted(tensors)}")
    return tensors, num_cols


def _parse_header(path: str | os.PathLike[str], header: str) -> int:
    """Return num_cols. Raise ValueError if the header has another format or version."""
    try:
        facts = json.loads(header)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise ValueError(f"{path} must hold saved SparseRows, got the header {header[:60]!r}")
    version, num_cols = facts.get("version"), facts.get("num_cols")
    if version != _FORMAT_VERSION:
        raise ValueError(f"{path} must have format version {_FORMAT_VERSION}, got {version}")
    if not isinstance(num_cols, int) or isinstance(num_cols, bool):
        raise ValueError(f"{path} is damaged: num_cols must be a whole number, got {num_cols!r}")
    return num_cols
