"""Reading of weights: an error where they are damaged, missing, of other shapes, or hold code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

_NAMES_IN_MESSAGE = 8
# Errors by which json, torch, safetensors and the file system report files that end too early.
_READ_ERRORS = (EOFError, OSError, RuntimeError, SafetensorError, ValueError)


@contextmanager
def readable_weights(name_or_path: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Raise ValueError if the block reads a damaged file, or a pickle that holds more than tensors.

    The error replaces those of torch and safetensors, which do not name the file, or explain how to
    switch the check off.

    Args:
        name_or_path: the folder or hub name from which the block reads.
        folder: local folder with the files of weights.
    """
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f"{name_or_path} must hold weights alone, got a pickle that is damaged or runs code"
        ) from error
    except _READ_ERRORS as error:
        for file in sorted(Path(folder).iterdir()):
            if (damage := _find_damage(file)) is not None:
                raise ValueError(f"{file} is damaged: {damage}") from error
        raise


def read_weights(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file by name.

    Raises:
        ValueError: the file is damaged, or is a pickle that holds more than tensors.
    """
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} must hold weights alone, got a pickle that is damaged or runs code"
        ) from error
    except _READ_ERRORS as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return tensors


def check_all_loaded(
    name_or_path: str, info: dict[str, Any], loaded_later: Sequence[str] = ()
) -> None:
    """Check that a checkpoint held all weights on which the vectors depend.

    Tied weights are stored once. The encoders do not use a pooling layer.

    Args:
        name_or_path: the checkpoint.
        info: `output_loading_info` of transformers' `from_pretrained`.
        loaded_later: names of modules whose weights come from another folder.

    Raises:
        ValueError: weights are missing or have other shapes than config.json says.
    """

    def is_needed(name: str) -> bool:
        parts = name.split(".")
        return "pooler" not in parts and not set(parts) & set(loaded_later)

    missing = [f"{name} is missing" for name in sorted(info["missing_keys"]) if is_needed(name)]
    mismatched = [
        f"{name} is {tuple(found)} instead of {tuple(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
        if is_needed(name)
    ]
    faults = missing + mismatched
    if faults:
        more = len(faults) - _NAMES_IN_MESSAGE
        shown = faults[:_NAMES_IN_MESSAGE] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(
            f"{name_or_path} must hold all weights of which its vectors are made, but "
            + ", ".join(shown)
        )


def _find_damage(file: Path) -> str | None:
    """Return the reason why a file of weights cannot be read; None if it can, or is another."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix == ".bin" and "_model" in file.name:
            torch.load(file, map_location="cpu", weights_only=True)
        elif file.name.endswith(".index.json"):
            json.loads(file.read_text(encoding="utf-8"))
    except Exception as error:
        return str(error) or type(error).__name__
    return None
