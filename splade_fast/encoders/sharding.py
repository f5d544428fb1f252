"""Modules that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded, and their shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from splade_fast._distributed import is_distributed


def is_sharded(module: nn.Module) -> bool:
    """Return whether `fully_shard` was applied to the module or to one inside."""
    if not is_distributed():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def reshard(module: nn.Module) -> None:
    """Free the whole weights that FSDP2 left gathered in the module and in those inside."""
    if not is_distributed():
        return
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def run_sharded(module: nn.Module, method: str) -> None:
    """Have FSDP2 gather the weights of a module for a method of it as for its forward."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    if method not in module.__dict__:
        register_fsdp_forward_method(module, method)  # does nothing for other modules


def gather(shard: Tensor, *, is_kept: bool) -> Tensor | None:
    """Return the whole tensor of a shard in host memory, or None on ranks that do not keep it.

    All ranks must call it.
    """
    tensor: Tensor = shard.detach().full_tensor()  # type: ignore[attr-defined]
    return tensor.cpu() if is_kept else None


@torch.no_grad()
def copy_into_shard(shard: Tensor, whole: Tensor) -> None:
    """Copy the part of this rank of a whole tensor into a shard."""
    local: Tensor = shard.to_local()  # type: ignore[attr-defined]
    local.copy_(shard_like(whole, shard).to_local())  # type: ignore[attr-defined]


def shard_like(whole: Tensor, shard: Tensor) -> Tensor:
    """Return the part of this rank of a whole tensor, cut as a shard is.

    Every rank has the whole tensor, so nothing is sent.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(shard, DTensor)
    mesh, placements = shard.device_mesh, shard.placements
    return distribute_tensor(whole.to(shard.device), mesh, placements, src_data_rank=None)
