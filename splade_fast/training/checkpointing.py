"""Checkpoints of a training run: whole or not there, and free of pickles.

A folder `checkpoint-<step>` holds the encoder as its `save_pretrained` writes it (a separate query
encoder in `query/`), and beside it

- `training_state.safetensors`: what the encoders' own files do not hold, the negative cache first;
- `optimizer.safetensors`: the states of optimizer, schedule and loss scaler;
- `rank-<rank>-of-<ranks>.safetensors`: random number generators and buffers of each process;
- `trainer_state.json`: the step, the log and the like, as transformers writes it;
- `checkpoint.json`: the size of every file. It is written last, then the folder gets its name.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from splade_fast._atomic_files import finish_files, flush_folder
from splade_fast._distributed import world_size
from splade_fast.negative_cache.negative_cache import NegativeCache

MODEL_FILE = "training_state.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
QUERY_FOLDER = "query"
_MANIFEST = "checkpoint.json"
_FORMAT_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+)\.(partial|replaced|deleted)")
_TREE = "tree"  # key of the metadata


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read; says which and why."""


def rank_file(rank: int, ranks: int) -> str:
    """The name of the file of one process."""
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


@contextmanager
def new_checkpoint(folder: Path, *, writer: bool, device: torch.device) -> Iterator[Path]:
    """A temporary folder that all processes write to, which becomes `folder` after the block.

    Args:
        folder: `checkpoint-<step>` inside the output directory, on a file system that all share.
        writer: this process makes the folder and gives it its name.
        device: for messages between processes.

    Raises:
        CheckpointError: any process could not write; on all of them. Nothing is left of the folder,
            and the checkpoints before it are as they were. An error of another kind is raised as it
            is where it happened, and as a CheckpointError in the other processes.
    """
    partial = _leftover(folder, "partial")

    def make() -> None:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def finish() -> None:
        if writer:
            _write_manifest(partial)
            finish_files(partial)
            _put_in_place(partial, folder)

    problem: Exception | None = None
    try:
        _on_all_ranks(make, folder, device)
        try:
            yield partial
        except Exception as error:
            problem = error
        _on_all_ranks(lambda: _raise_if(problem), folder, device)
        _on_all_ranks(finish, folder, device)
    except Exception:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints of a run, the earliest first."""
    steps = {
        int(match[1]): path
        for path in (Path(output_dir).iterdir() if Path(output_dir).is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and _missing(path) is None
    }
    return [steps[step] for step in sorted(steps)]


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step; None where there is none."""
    return next(reversed(checkpoints(output_dir)), None)


def remove_leftovers(output_dir: str | os.PathLike[str]) -> None:
    """Clear away what a killed run was writing or deleting."""
    for path in Path(output_dir).glob(".checkpoint-*"):
        if (match := _LEFTOVER.fullmatch(path.name)) is None:
            continue
        whole = path.with_name(match[1])
        if match[2] == "replaced" and not whole.exists():  # killed just before the new one came
            path.rename(whole)
        else:
            shutil.rmtree(path)


def delete_checkpoints(output_dir: str | os.PathLike[str]) -> None:
    """Delete all checkpoints of a run, complete or not."""
    remove_leftovers(output_dir)
    for path in Path(output_dir).iterdir():
        if _NAME.fullmatch(path.name):
            shutil.rmtree(path)


def keep_checkpoints(output_dir: str | os.PathLike[str], limit: int | None, best: Any) -> None:
    """Delete the earliest checkpoints so that at most `limit` remain; never the last, nor `best`.

    Args:
        output_dir: of the run.
        limit: None or 0: keep all.
        best: path of the best checkpoint, or None.
    """
    found = checkpoints(output_dir)
    if not limit:
        return
    kept = {found[-1], *([Path(best)] if best is not None else [])} if found else set()
    surplus = [path for path in found if path.resolve() not in {p.resolve() for p in kept}]
    for path in surplus[: max(0, len(found) - max(limit, len(kept)))]:
        deleted = _leftover(path, "deleted")
        path.rename(deleted)  # so that no half of it ever has its name
        shutil.rmtree(deleted, ignore_errors=True)


def check_checkpoint(folder: str | os.PathLike[str], ranks: int) -> None:
    """Raise CheckpointError unless the folder is complete and was written by as many processes."""
    path = Path(folder)
    if (problem := _missing(path)) is not None:
        raise CheckpointError(f"cannot read the checkpoint {path}: {problem}")
    if not (path / OPTIMIZER_FILE).is_file():
        raise CheckpointError(f"{path} must hold the state of a training run, got the model alone")
    if not (path / rank_file(0, ranks)).is_file():
        written = sorted(file.stem for file in path.glob("rank-*"))
        raise CheckpointError(
            f"the checkpoint {path} must be resumed by as many processes as wrote it, "
            f"{int(written[0].rpartition('-')[2]) if written else 'none'}, got {ranks}"
        )


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings and None to one file.

    Raises:
        TypeError: there is something else in it.
    """
    tensors: dict[str, Tensor] = {}
    described = json.dumps(_described(tree, "", tensors))
    save_file(tensors, path, {_TREE: described})


def load_tree(path: Path) -> Any:
    """What `save_tree` wrote; tensors on the CPU.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with opened(path) as file:
        tree = (file.metadata() or {}).get(_TREE)
        if tree is None:
            raise CheckpointError(f"{path} must hold a state written by splade_fast")
        try:
            return _restored(json.loads(tree), file.get_tensor)
        except (ValueError, TypeError, RecursionError, SafetensorError) as error:
            raise CheckpointError(f"the state in {path} is damaged: {error}") from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def save_model_state(model: Any, folder: Path, own: set[str]) -> None:
    """Write the tensors of `model` that change and that the encoders' files do not hold already.

    Args:
        model: a TrainingModel, whose encoders have been saved to the folder.
        folder: of the checkpoint.
        own: names of tensors that every process writes itself.
    """
    tensors = {}
    for name, tensor in _distinct(model).items():
        if name in own or _is_constant(tensor):
            continue
        value = tensor.detach().cpu().contiguous()
        held = _held_tensor(model, name, folder)
        if held is None or held.dtype != value.dtype or not torch.equal(held, value):
            tensors[name] = value
    save_file(tensors, folder / MODEL_FILE, {"format": "pt"})


@torch.no_grad()
def load_model_state(model: Any, folder: Path, own: set[str]) -> None:
    """Read what `save_model_state` wrote and what it left to the encoders' files, in place.

    Raises:
        CheckpointError: a file cannot be read, or tensors are missing or of another shape.
    """
    with opened(folder / MODEL_FILE) as file:
        stored = set(file.keys())
        for name, tensor in _distinct(model).items():
            if _is_constant(tensor):
                continue
            if name in stored:
                copy_into(tensor, file.get_tensor(name), name, folder)
            elif name not in own:
                copy_into(tensor, _held_tensor(model, name, folder), name, folder)


@torch.no_grad()
def copy_into(tensor: Tensor, stored: Tensor | None, name: str, folder: Path) -> None:
    """Give a tensor of the model the values of a checkpoint.

    Raises:
        CheckpointError: they are not there, or of another shape or dtype.
    """
    if stored is None:
        raise CheckpointError(f"the checkpoint {folder} must hold {name}")
    if stored.shape != tensor.shape or stored.dtype != tensor.dtype:
        raise CheckpointError(
            f"{name} of the checkpoint {folder} must be {tuple(tensor.shape)} {tensor.dtype} as in "
            f"the model, got {tuple(stored.shape)} {stored.dtype}"
        )
    tensor.copy_(stored)


def own_tensors(model: nn.Module, replicated: bool) -> set[str]:
    """Names of the tensors that may differ between the processes of one run.

    Args:
        model: a TrainingModel.
        replicated: all processes hold the same caches.
    """
    names = set(_distinct(model)) - {name for name, _ in model.named_parameters()}
    caches = [name for name, part in model.named_modules() if isinstance(part, NegativeCache)]
    if replicated:
        names = {name for name in names if not any(name.startswith(f"{c}.") for c in caches)}
    return names


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of all generators of this process: Python's, numpy's, torch's, the device's."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of `random_state`."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def _leftover(folder: Path, why: str) -> Path:
    return folder.with_name(f".{folder.name}.{why}")


def _put_in_place(partial: Path, folder: Path) -> None:
    replaced = _leftover(folder, "replaced")
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    flush_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format_version": _FORMAT_VERSION, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _missing(folder: Path) -> str | None:
    """What keeps a folder from being a complete checkpoint; None if nothing does."""
    if not folder.is_dir():
        return "no such folder"
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {_MANIFEST}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{_MANIFEST} is damaged ({error})"
    if not isinstance(manifest, dict) or manifest.get("format_version") != _FORMAT_VERSION:
        return f"{_MANIFEST} must have format version {_FORMAT_VERSION}"
    files = manifest.get("files")
    if not isinstance(files, dict):
        return f"{_MANIFEST} is damaged (it lists no files)"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} must have {size} bytes, got {path.stat().st_size}"
    return None


def _on_all_ranks(action: Callable[[], None], folder: Path, device: torch.device) -> None:
    """Run the action, wait for the other processes, and fail on all if it failed on one."""
    problem: Exception | None = None
    try:
        action()
    except Exception as error:
        problem = error
    failures = torch.tensor(float(problem is not None), device=device)
    if world_size() > 1:
        dist.all_reduce(failures)
    if problem is not None and not isinstance(problem, OSError | SafetensorError):
        raise problem
    if failures.item() > 0:
        reason = problem or "another process could not write its part"
        raise CheckpointError(
            f"cannot write {folder}: {reason}; earlier checkpoints are as they were"
        ) from problem


def _raise_if(problem: Exception | None) -> None:
    if problem is not None:
        raise problem


def _described(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """As JSON, with the names of tensors in the place of tensors."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        items = [[key, _described(item, f"{path}.{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_described(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"the state at {path} must be tensors and plain values, got {type(value)}")


def _restored(described: Any, tensor: Callable[[str], Tensor]) -> Any:
    if not isinstance(described, dict):
        return described
    [(kind, content)] = described.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {key: _restored(value, tensor) for key, value in content}
    items = [_restored(value, tensor) for value in content]
    return items if kind == "list" else tuple(items)


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state, tied ones under their first name."""
    seen, distinct = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = (tensor.data_ptr(), tensor.shape, tensor.dtype) if tensor.numel() else name
        if place not in seen:
            seen.add(place)
            distinct[name] = tensor
    return distinct


def _is_constant(tensor: Tensor) -> bool:
    """Weights that are not trained, such as those below adapters; a run starts with them."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _held_tensor(model: Any, name: str, folder: Path) -> Tensor | None:
    """The tensor of an encoder as transformers wrote it, where it kept the name; else None."""
    for path, module in model.named_children():
        if not name.startswith(f"{path}.") or module not in (model.encoder, model.query_encoder):
            continue
        file = (folder if module is model.encoder else folder / QUERY_FOLDER) / "model.safetensors"
        key = name.removeprefix(f"{path}.").removeprefix("model.")
        if file.is_file():
            with opened(file) as tensors:
                return tensors.get_tensor(key) if key in set(tensors.keys()) else None
    return None
