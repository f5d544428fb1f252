"""Checkpoints of sharded caches: one file for each rank, read by any number of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from splade_fast._atomic_files import whole_file
from splade_fast._distributed import Ranks, is_distributed
from splade_fast._tensor_files import write_tensors
from splade_fast.negative_cache.negative_cache import NegativeCache

_NAME = "shard-{rank:05d}-of-{count:05d}.safetensors"


def save_sharded(
    module: nn.Module,
    folder: str | os.PathLike[str],
    process_group: Any = None,
    *,
    replicated: bool = False,
) -> None:
    """Write the state of this rank's module. All ranks must call this with the same folder.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> manager = nc.CacheManager({"id": nc.FixedLenFeature([], torch.int64)}, cache_size=3)
        >>> nc.save_sharded(manager.init_cache(), "checkpoint")

    Args:
        module: module whose state is saved, e.g. a `CacheLossHandler`.
        folder: folder of the checkpoint; created if it does not exist.
        process_group: group of the ranks; None: all ranks.
        replicated: whether all ranks have the same state. The first rank then writes the only
            shard.

    Raises:
        ValueError: the folder holds shards of another number of ranks.
    """
    rank, count = _rank_and_count(process_group)
    if replicated:
        if rank > 0:
            return
        count = 1
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = _NAME.format(rank=rank, count=count)
    suffix = name.removeprefix(f"shard-{rank:05d}")
    others = sorted(p.name for p in folder.glob("shard-*") if not p.name.endswith(suffix))
    if others:
        raise ValueError(f"folder must hold no checkpoint of other ranks, got {others[0]}")
    with whole_file(folder / name) as temporary:
        write_tensors(temporary, module.state_dict())


def load_sharded(
    module: nn.Module,
    folder: str | os.PathLike[str],
    process_group: Any = None,
    *,
    replicated: bool = False,
) -> None:
    """Read a checkpoint of `save_sharded`, written by any number of ranks, into a module.

    The slots of all shards, in the order of the ranks, are divided among the present ranks: rank 0
    takes as many of the first slots as its module has, and so on. All other tensors, such as the
    state of the generator, come from the first shard.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> manager = nc.CacheManager({"id": nc.FixedLenFeature([], torch.int64)}, cache_size=3)
        >>> nc.save_sharded(manager.init_cache(), "checkpoint")
        >>> nc.load_sharded(manager.init_cache(), "checkpoint")

    Args:
        module: module whose state is replaced in place.
        folder: folder given to `save_sharded`.
        process_group: group of the ranks; None: all ranks.
        replicated: whether every rank has all slots.

    Raises:
        FileNotFoundError: shards are missing.
        ValueError: the shards have another number of slots than the ranks, or other features.
    """
    paths = _shards(Path(folder))
    shards = [safe_open(path, framework="pt") for path in paths]
    state = module.state_dict()
    caches = [name for name, part in module.named_modules() if isinstance(part, NegativeCache)]
    loaded: dict[str, Tensor] = {}
    for key, tensor in state.items():
        cache = next((name for name in caches if key.startswith(f"{name}." if name else "")), None)
        for path, shard in zip(paths, shards, strict=True):
            if key not in set(shard.keys()):
                raise ValueError(f"{path} must hold {key}")
        if cache is None:
            loaded[key] = shards[0].get_tensor(key)
            continue
        first, total = (0, len(tensor)) if replicated else _slots_before(len(tensor), process_group)
        loaded[key] = _slice(key, shards, first, len(tensor), total)
        if loaded[key].shape != tensor.shape:
            raise ValueError(f"{key} must be {tuple(tensor.shape)}, got {tuple(loaded[key].shape)}")
    module.load_state_dict(loaded)


def _rank_and_count(process_group: Any) -> tuple[int, int]:
    if not is_distributed():
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def _shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("shard-*-of-*.safetensors"))
    count = int(found[0].stem.rpartition("-")[2]) if found else 1
    paths = [folder / _NAME.format(rank=rank, count=count) for rank in range(count)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
    return paths


def _slots_before(mine: int, process_group: Any) -> tuple[int, int]:
    """Return the number of slots of the ranks before this one, and of all ranks."""
    rank, count = _rank_and_count(process_group)
    if count == 1:
        return 0, mine
    (sizes,) = Ranks(process_group).all_gather(torch.tensor([mine]))
    return int(sizes[:rank].sum()), int(sizes.sum())


def _slice(key: str, shards: list[Any], first: int, count: int, total: int) -> Tensor:
    """Return rows [first, first + count) of a table that all shards together hold.

    Raises:
        ValueError: the shards do not have `total` rows.
    """
    parts, start = [], 0
    for shard in shards:
        rows = shard.get_slice(key)
        size = rows.get_shape()[0]
        low, high = max(first - start, 0), min(first + count - start, size)
        if low < high:
            parts.append(rows[low:high])
        start += size
    if start != total:
        raise ValueError(f"the shards must have {total} slots, as the caches do, got {start}")
    return torch.cat(parts)
