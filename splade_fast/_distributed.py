"""What the ranks of torch.distributed compute together.

`Ranks` moves tensors of any dtype, without gradients. Sums, means and rows over all ranks have
gradients: a loss that every rank computes from these is the loss of the joined batch, the same on
every rank, and once DistributedDataParallel has averaged the gradients, they are those of the
joined batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    """How many ranks there are; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class OtherRankError(RuntimeError):
    """What all ranks do together has failed on another one, which has the reason."""


class Ranks:
    """The processes of a group. Every call is a collective: all ranks make it, with equal shapes.

    Tensors travel as bytes, since backends lack some dtypes, and through the memory that the
    backend works on: gloo's in the host's, NCCL's on this process's GPU.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "torch.distributed must be initialised (init_process_group) for what is "
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

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """What fails on one rank fails on all, here, and none waits for one that has left.

        Args:
            what: is done inside, for the message.

        Raises:
            Exception: the error inside, on the rank that has it.
            OtherRankError: on all others.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as problem:
            error = problem
        (failed,) = self.all_gather(torch.tensor(error is not None))
        if error is not None:
            raise error
        if bool(failed.any()):
            raise OtherRankError(f"{what} failed on rank {int(failed.int().argmax())}, see there")

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


def together(what: str, group: dist.ProcessGroup | None = None) -> AbstractContextManager[None]:
    """`Ranks.together` of the group; without torch.distributed nothing but what is inside."""
    return Ranks(group).together(what) if world_size() > 1 else nullcontext()


@contextmanager
def ranks_of_torchrun() -> Iterator[int]:
    """The processes that `torchrun` has started are the ranks of a gloo group inside.

    Yields:
        This process's rank; 0 without torchrun.

    Raises:
        ValueError: the environment has the WORLD_SIZE of torchrun, but lacks the rest.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


class _SumOverRanks(torch.autograd.Function):
    """Every rank's result depends on every rank's input, so gradients are summed up as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _total(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _total(grads[0])


class _RowsOfRanks(torch.autograd.Function):
    """Every rank's result holds every rank's rows: their gradients are summed up over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], first: int) -> Tensor:
        ctx.mine = slice(first, first + len(x))
        (parts,) = Ranks().all_gather(padded(x, max(counts)))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _total(grads[0])[ctx.mine], None, None


def sum_over_ranks(x: Tensor) -> Tensor:
    """Σ over ranks of x, on every rank.

    Args:
        x: any shape, the same on all ranks.
    """
    total: Tensor = _SumOverRanks.apply(x) if world_size() > 1 else x
    return total


def mean_over_ranks(values: Tensor, across_ranks: bool = True) -> Tensor:
    """The mean of the entries of all ranks' values, on every rank.

    Args:
        values: any shape; the ranks may have different numbers of entries.
        across_ranks: false: of this rank's alone.

    Returns:
        A scalar; 0 where there are no entries.
    """
    if not across_ranks or world_size() == 1:
        return values.sum() / max(1, values.numel())
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    # Numbers that bfloat16 could not count.
    sums = sum_over_ranks(torch.stack([total, torch.full_like(total, values.numel())]))
    return (sums[0] / sums[1].clamp(min=1)).to(values.dtype)


def gather_rows_of_ranks(x: Tensor) -> tuple[Tensor, int]:
    """The rows of all ranks, on every rank, in the order of the ranks.

    Args:
        x: (N, ...), N may differ between ranks (learning the numbers waits for a GPU), the other
            dimensions not.

    Returns:
        (Σ N, ...), x itself where there is one rank; and which of them is the first row of x.
    """
    if world_size() == 1:
        return x, 0
    ranks = Ranks()
    (gathered,) = ranks.all_gather(torch.tensor(len(x)))
    counts = [int(count) for count in gathered.tolist()]
    first = sum(counts[: ranks.rank])
    rows: Tensor = _RowsOfRanks.apply(x, counts, first)
    return rows, first


def padded(tensor: Tensor, count: int, value: float = 0) -> Tensor:
    """The first dimension filled up to `count`."""
    more = tensor.new_full((count - len(tensor), *tensor.shape[1:]), value)
    return torch.cat([tensor, more])


def _total(x: Tensor) -> Tensor:
    # The ranks' strides may differ, and bytes are what is added up.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _bytes(tensor: Tensor, rank_dims: int) -> Tensor:
    """(bytes,), or (ranks, bytes)."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return flat.view(len(tensor), flat.numel() // len(tensor)) if rank_dims else flat
