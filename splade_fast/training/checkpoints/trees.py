"""Nested containers of tensors and plain values in one safetensors file, without pickles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from splade_fast.training.checkpoints.folders import CheckpointError

_TREE = "tree"  # key of the metadata that holds the structure


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings and None to one file.

    Raises:
        TypeError: the tree holds something else.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_replace_tensors(tree, "", tensors))
    save_file(tensors, path, {_TREE: structure})


def load_tree(path: Path) -> Any:
    """Return the tree in a file that `save_tree` wrote, with tensors on the CPU.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with open_safetensors(path) as file:
        structure = (file.metadata() or {}).get(_TREE)
        if structure is None:
            raise CheckpointError(f"{path} must hold a state written by splade_fast")
        try:
            return _restore_tensors(json.loads(structure), file.get_tensor)
        except (ValueError, TypeError, RecursionError, SafetensorError) as error:
            raise CheckpointError(f"the state in {path} is damaged: {error}") from error


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _replace_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return the value as JSON with names in place of tensors, and add the tensors to `tensors`."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        items = [
            [key, _replace_tensors(item, f"{path}.{key}", tensors)] for key, item in value.items()
        ]
        return {"dict": items}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {
            kind: [
                _replace_tensors(item, f"{path}.{position}", tensors)
                for position, item in enumerate(value)
            ]
        }
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"the state at {path} must be tensors and plain values, got {type(value)}")


def _restore_tensors(structure: Any, get_tensor: Callable[[str], Tensor]) -> Any:
    if not isinstance(structure, dict):
        return structure
    [(kind, content)] = structure.items()
    if kind == "tensor":
        return get_tensor(content)
    if kind == "dict":
        return {key: _restore_tensors(value, get_tensor) for key, value in content}
    items = [_restore_tensors(value, get_tensor) for value in content]
    return items if kind == "list" else tuple(items)
