"""Collectives over the ranks of torch.distributed: exchange, sums and errors.

`Ranks` moves tensors of any dtype, without gradients. `sum_over_ranks`, `mean_over_ranks` and
`gather_rows_of_ranks` are differentiable: a loss computed from their results is the loss of the
joined batch and has the same value on every rank. Once DistributedDataParallel has averaged the
gradients, they are the gradients of the joined batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_distributed() -> bool:
    """Return whether torch.distributed is initialised."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of ranks, 1 without torch.distributed."""
    return dist.get_world_size() if is_distributed() else 1


def is_shard(tensor: Tensor) -> bool:
    """Return whether a tensor is sharded, such as a weight that FSDP2 has not gathered."""
    if not is_distributed():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


class OtherRankError(RuntimeError):
    """Error on a rank whose own part succeeded, while the same action failed on another rank."""


class Ranks:
    """The processes of a group.

    Every method is a collective: all ranks must call it, with tensors of equal shapes. Tensors
    travel as bytes, since backends lack some dtypes, and through the memory that the backend works
    on: host memory for gloo, the GPU of this process for NCCL.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not is_distributed():
            raise RuntimeError(
                "torch.distributed must be initialised (init_process_group) for computations "
                "over several ranks"
            )
        self._group = group
        self.rank = dist.get_rank(group)
        self.count = dist.get_world_size(group)

    def all_gather(self, *tensors: Tensor) -> list[Tensor]:
        """Gather each tensor of all ranks into a tensor (ranks, ...)."""

        def collect(mine: Tensor) -> Tensor:
            parts = [torch.empty_like(mine) for _ in range(self.count)]
            dist.all_gather(parts, mine, group=self._group)
            return torch.stack(parts)

        return self._exchange_bytes(tensors, 0, collect)

    def all_to_all(self, *tensors: Tensor) -> list[Tensor]:
        """Send row r of each (ranks, ...) tensor to rank r; row r of a result comes from rank r."""

        def exchange(mine: Tensor) -> Tensor:
            theirs = torch.empty_like(mine)
            dist.all_to_all_single(theirs, mine, group=self._group)
            return theirs

        return self._exchange_bytes(tensors, 1, exchange)

    @contextmanager
    def fail_together(self, action: str, *, raise_once: bool = False) -> Iterator[None]:
        """Raise on all ranks if the block raises on any rank; see the function `fail_together`."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        (has_failed,) = self.all_gather(torch.tensor(error is not None))
        if not bool(has_failed.any()):
            return
        first = int(has_failed.int().argmax())
        if error is not None and (self.rank == first or not raise_once):
            raise error
        raise OtherRankError(f"{action} failed on rank {first}; see the error of that rank")

    def _exchange_bytes(
        self, tensors: Sequence[Tensor], rank_dims: int, run: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Run one collective on the concatenated bytes of all tensors."""
        flat = [_bytes(tensor, rank_dims) for tensor in tensors]
        packed = torch.cat(flat, -1)
        device = packed.device
        received = run(packed.to(self._backend_device(device)).contiguous()).to(device)
        parts = received.split([part.shape[-1] for part in flat], -1)
        return [
            part.contiguous()
            .view(-1)
            .view(tensor.dtype)
            .reshape(self.count, *tensor.shape[rank_dims:])
            for part, tensor in zip(parts, tensors, strict=True)
        ]

    def _backend_device(self, device: torch.device) -> torch.device:
        backend = dist.get_backend(self._group)
        if backend == "nccl":
            return device if device.type == "cuda" else torch.device("cuda")
        return torch.device("cpu") if backend == "gloo" else device


def fail_together(
    action: str, group: dist.ProcessGroup | None = None, *, raise_once: bool = False
) -> AbstractContextManager[None]:
    """Raise on all ranks if the block raises on any, so that no rank waits for one that has left.

    All ranks must enter the block. Its end is a collective. Without torch.distributed, or with one
    rank, errors pass through as they are::

        with fail_together("loading the model"):
            model = load()

    Args:
        action: description of the block for the error message, e.g. "loading the model".
        group: group of the ranks; None: all ranks.
        raise_once: whether only the first failing rank raises the error of the block, for programs
            that print the error. By default every failing rank raises its own error.

    Raises:
        Exception: the error of the block, on a rank where it failed.
        OtherRankError: on all other ranks.
    """
    if world_size() == 1:
        return nullcontext()
    return Ranks(group).fail_together(action, raise_once=raise_once)


# torch.distributed.nn.functional has both functions, but torch 2.13 deprecates that module in
# favour of a private one, and warns at every call.
class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks. Every result depends on every input, so gradients are also summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduce(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _all_reduce(grads[0])


class _GatherRows(torch.autograd.Function):
    """Gathering of rows. Every rank has every row, so gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], first: int) -> Tensor:
        ctx.own_rows = slice(first, first + len(x))
        (parts,) = Ranks().all_gather(pad_rows(x, max(counts)))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _all_reduce(grads[0])[ctx.own_rows], None, None


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of x over all ranks, on every rank.

    Args:
        x: tensor of any shape, the same on all ranks.
    """
    total: Tensor = _SumOverRanks.apply(x) if world_size() > 1 else x
    return total


def mean_over_ranks(values: Tensor, across_ranks: bool = True) -> Tensor:
    """Return the mean of the entries of all ranks' values, on every rank.

    Args:
        values: tensor of any shape; the ranks may have different numbers of entries.
        across_ranks: whether to include the other ranks; False: mean of this rank's entries.

    Returns:
        Scalar mean, 0 if there are no entries.
    """
    if not across_ranks or world_size() == 1:
        return values.sum() / max(1, values.numel())
    # bfloat16 cannot hold large counts.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    sums = sum_over_ranks(torch.stack([total, torch.full_like(total, values.numel())]))
    return (sums[0] / sums[1].clamp(min=1)).to(values.dtype)


def gather_rows_of_ranks(x: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all ranks in the order of the ranks, on every rank.

    Args:
        x: rows (N, ...). N may differ between ranks, but the other dimensions may not. The exchange
            of the numbers N synchronises with a GPU.

    Returns:
        The rows (Σ N, ...), and the position of the first row of x among them. With one rank, x
        itself is returned.
    """
    if world_size() == 1:
        return x, 0
    ranks = Ranks()
    (gathered,) = ranks.all_gather(torch.tensor(len(x)))
    counts = [int(count) for count in gathered.tolist()]
    first = sum(counts[: ranks.rank])
    rows: Tensor = _GatherRows.apply(x, counts, first)
    return rows, first


def pad_rows(tensor: Tensor, count: int, value: float = 0) -> Tensor:
    """Append rows filled with `value` until there are `count` rows."""
    padding = tensor.new_full((count - len(tensor), *tensor.shape[1:]), value)
    return torch.cat([tensor, padding])


def _all_reduce(x: Tensor) -> Tensor:
    # all_reduce adds memory buffers without regard to strides, which may differ between ranks.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _bytes(tensor: Tensor, rank_dims: int) -> Tensor:
    """View a tensor as uint8, (bytes,) or (ranks, bytes)."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return flat.view(len(tensor), flat.numel() // len(tensor)) if rank_dims else flat
