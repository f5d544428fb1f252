"""whole_weights: the whole weights of a module that FSDP2 has sharded, to save them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import nn

from splade_fast._atomic_files import whole_folder
from splade_fast._distributed import is_shard
from splade_fast.encoders.sharding import gather, reshard


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[bool]:
    """Put whole weights in host memory in the place of sharded ones, on the first rank.

    All ranks must enter the block with a sharded module, and none may call it inside. A module that
    `fully_shard` has not sharded stays as it is, on all ranks. The `save_pretrained` of encoders
    needs no such block.

    Args:
        module: a module, sharded by `torch.distributed.fsdp.fully_shard` or not.

    Yields:
        Whether this rank has the whole weights.

    Example::

        >>> encoder = sf.SpladeEncoder.from_pretrained("CHECKPOINT")
        >>> with sf.whole_weights(encoder.model) as has_weights:
        ...     if has_weights:
        ...         encoder.model.save_pretrained("saved")
    """
    reshard(module)
    places = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None and is_shard(parameter)
    ]
    is_kept = not places or dist.get_rank() == 0
    shards = {id(shard): shard for _, _, shard in places}  # tied weights are gathered once
    try:
        whole = {key: _gather_parameter(shard, is_kept) for key, shard in shards.items()}
        for part, name, shard in places:
            part._parameters[name] = whole[id(shard)] if is_kept else shard
        yield is_kept
    finally:
        for part, name, shard in places:
            part._parameters[name] = shard


def save_whole(
    module: nn.Module, path: str | os.PathLike[str], write_files: Callable[[Path], None]
) -> None:
    """Write a folder with the whole weights of a module, complete or not at all.

    All ranks must call it with a sharded module, and the first one writes.

    Args:
        module: see `whole_weights`.
        path: the folder; existing files of the same names are replaced.
        write_files: function that writes the files into a folder.
    """
    with whole_weights(module) as has_weights:
        if has_weights:
            with whole_folder(path) as folder:
                write_files(folder)


def _gather_parameter(shard: nn.Parameter, is_kept: bool) -> nn.Parameter | None:
    tensor = gather(shard, is_kept=is_kept)
    return None if tensor is None else nn.Parameter(tensor, requires_grad=shard.requires_grad)
