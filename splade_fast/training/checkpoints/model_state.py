"""Tensors of a training model that the files of its encoders lack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from splade_fast._distributed import is_shard
from splade_fast.encoders.sharding import copy_into_shard
from splade_fast.negative_cache.negative_cache import NegativeCache
from splade_fast.search.models import QUERY_FOLDER
from splade_fast.training.checkpoints.folders import CheckpointError
from splade_fast.training.checkpoints.trees import open_safetensors

if TYPE_CHECKING:
    from splade_fast.training.model import TrainingModel

MODEL_FILE = "training_state.safetensors"


def save_model_state(model: TrainingModel, folder: Path, rank_tensors: set[str]) -> None:
    """Write the tensors that training changes and that the encoders' files lack.

    Args:
        model: a model whose encoders have been saved to the folder.
        folder: folder of the checkpoint.
        rank_tensors: names of tensors that every process writes to its own file.
    """
    tensors = {}
    for name, tensor in _changing_tensors(model):
        if name not in rank_tensors:
            value = tensor.detach().cpu().contiguous()
            saved = _load_encoder_tensor(model, name, folder)
            if saved is None or saved.dtype != value.dtype or not torch.equal(saved, value):
                tensors[name] = value
    save_file(tensors, folder / MODEL_FILE, {"format": "pt"})


@torch.no_grad()
def load_model_state(model: TrainingModel, folder: Path, rank_tensors: set[str]) -> None:
    """Read the tensors of `save_model_state` and of the encoders' files into the model.

    Args:
        model: the model to change.
        folder: folder of the checkpoint.
        rank_tensors: names of tensors that every process reads from its own file.

    Raises:
        CheckpointError: a file cannot be read, or a tensor is missing or has another shape.
    """
    with open_safetensors(folder / MODEL_FILE) as file:
        names = set(file.keys())
        for name, tensor in _changing_tensors(model):
            if name in names:
                copy_into(tensor, file.get_tensor(name), name, folder)
            elif name not in rank_tensors:
                copy_into(tensor, _load_encoder_tensor(model, name, folder), name, folder)


@torch.no_grad()
def copy_into(tensor: Tensor, saved: Tensor | None, name: str, folder: Path) -> None:
    """Copy a tensor of a checkpoint into a tensor of the model.

    Raises:
        CheckpointError: the checkpoint lacks the tensor, or it has another shape or dtype.
    """
    if saved is None:
        raise CheckpointError(f"the checkpoint {folder} must hold {name}")
    if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
        raise CheckpointError(
            f"{name} of the checkpoint {folder} must be {tuple(tensor.shape)} {tensor.dtype} as in "
            f"the model, got {tuple(saved.shape)} {saved.dtype}"
        )
    if is_shard(tensor):
        copy_into_shard(tensor, saved)
    else:
        tensor.copy_(saved)


def find_rank_tensors(model: TrainingModel, *, are_caches_equal: bool) -> set[str]:
    """Return the names of the tensors that may differ between the processes of a run.

    Args:
        model: the model.
        are_caches_equal: whether all processes hold the same caches.
    """
    tensors = _distinct_tensors(model)
    names = {name for name, tensor in tensors.items() if not isinstance(tensor, nn.Parameter)}
    if are_caches_equal:
        caches = [name for name, part in model.named_modules() if isinstance(part, NegativeCache)]
        names = {name for name in names if not any(name.startswith(f"{c}.") for c in caches)}
    return names


def changing_shards(model: nn.Module) -> dict[str, Tensor]:
    """Return the sharded weights that training changes, by name."""
    return {name: tensor for name, tensor in _changing_tensors(model) if is_shard(tensor)}


def _changing_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over all tensors but frozen weights, such as those that adapters are added to."""
    for name, tensor in _distinct_tensors(model).items():
        if not isinstance(tensor, nn.Parameter) or tensor.requires_grad:
            yield name, tensor


def _distinct_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state, each tied one only under its first name."""
    seen, distinct = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        identity: object = name
        if is_shard(tensor):
            identity = id(tensor)
        elif tensor.numel():
            identity = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if identity not in seen:
            seen.add(identity)
            distinct[name] = tensor
    return distinct


def _load_encoder_tensor(model: TrainingModel, name: str, folder: Path) -> Tensor | None:
    """Return a tensor of an encoder from the file of transformers, or None if it is not there."""
    for path, module in model.named_children():
        if not name.startswith(f"{path}.") or module not in (model.encoder, model.query_encoder):
            continue
        file = (folder if module is model.encoder else folder / QUERY_FOLDER) / "model.safetensors"
        key = name.removeprefix(f"{path}.").removeprefix("model.")
        if file.is_file():
            with open_safetensors(file) as tensors:
                tensor: Tensor | None = None
                if key in set(tensors.keys()):
                    tensor = tensors.get_tensor(key)
                return tensor
    return None
