"""Sums, means and rows over all ranks of torch.distributed, with gradients.

A loss that every rank computes from these is the loss of the joined batch, the same on every rank,
and once DistributedDataParallel has averaged the gradients, they are those of the joined batch.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    """How many ranks there are; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
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
    counts = _counts_of_ranks(x)
    first = sum(counts[: dist.get_rank()])
    rows: Tensor = _RowsOfRanks.apply(x, counts, first)
    return rows, first


def _total(x: Tensor) -> Tensor:
    # The ranks' strides may differ, and bytes are what is added up.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _counts_of_ranks(x: Tensor) -> list[int]:
    mine = torch.full((1,), len(x), dtype=torch.int64, device=x.device)
    counts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(counts, mine)
    return [int(count) for count in torch.cat(counts).tolist()]
