"""Collectives over ranks for tensors of any dtype, on gloo and NCCL."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of a group. Every call is a collective: all ranks make it, with equal shapes.

    Tensors travel as bytes, since backends lack some dtypes, and through the memory that the
    backend works on: gloo's in the host's, NCCL's on this process's GPU.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "torch.distributed must be initialised (init_process_group) for caches that are "
                "spread over ranks"
            )
        self._group = group
        self.rank = dist.get_rank(group)
        self.count = dist.get_world_size(group)

    def all_gather(self, *tensors: Tensor) -> list[Tensor]:
        """(ranks, ...) for each tensor."""

        def collect(mine: Tensor) -> Tensor:
            parts = [torch.empty_like(mine) for _ in range(self.count)]
            dist.all_gather(parts, mine, group=self._group)
            return torch.stack(parts)

        return self._as_bytes(tensors, 0, collect)

    def all_to_all(self, *tensors: Tensor) -> list[Tensor]:
        """Row r of a (ranks, ...) tensor goes to rank r; row r of the result came from it."""

        def exchange(mine: Tensor) -> Tensor:
            theirs = torch.empty_like(mine)
            dist.all_to_all_single(theirs, mine, group=self._group)
            return theirs

        return self._as_bytes(tensors, 1, exchange)

    def _as_bytes(
        self, tensors: Sequence[Tensor], rank_dims: int, run: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """One collective for all tensors, the bytes of each behind those of the last."""
        flat = [_bytes(tensor, rank_dims) for tensor in tensors]
        packed = torch.cat(flat, -1)
        device = packed.device
        received = run(packed.to(self._device(device)).contiguous()).to(device)
        parts = received.split([part.shape[-1] for part in flat], -1)
        return [
            part.contiguous()
            .view(-1)
            .view(tensor.dtype)
            .reshape(self.count, *tensor.shape[rank_dims:])
            for part, tensor in zip(parts, tensors, strict=True)
        ]

    def _device(self, device: torch.device) -> torch.device:
        backend = dist.get_backend(self._group)
        if backend == "nccl":
            return device if device.type == "cuda" else torch.device("cuda")
        return torch.device("cpu") if backend == "gloo" else device


def _bytes(tensor: Tensor, rank_dims: int) -> Tensor:
    """(bytes,), or (ranks, bytes)."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return (
        flat.view(tensor.shape[0], -1)
        if rank_dims and flat.numel()
        else (flat.new_empty(tensor.shape[0], 0) if rank_dims else flat)
    )


def padded(tensor: Tensor, count: int, value: float = 0) -> Tensor:
    """The first dimension filled up to `count`."""
    more = tensor.new_full((count - len(tensor), *tensor.shape[1:]), value)
    return torch.cat([tensor, more])
