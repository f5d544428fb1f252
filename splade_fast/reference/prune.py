"""prune in plain PyTorch: dense rows (B, V) -> their entries that pass given criteria."""

import torch
from torch import Tensor


def prune_rows(
    x: Tensor,
    k: int | None = None,
    threshold: float | None = None,
    max_ratio: float | None = None,
    mass: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the entries that pass every given criterion: indices, values, lengths.

    `SparseRows.from_dense` defines the criteria. threshold=None keeps entries of any value.
    """
    columns = torch.arange(x.shape[1], dtype=torch.int32, device=x.device).expand_as(x)
    # ~(x <= threshold) instead of x > threshold keeps NaN, which must not vanish silently.
    above = torch.ones_like(x, dtype=torch.bool) if threshold is None else ~(x <= threshold)
    return keep_largest(*_compact(above, columns, x), k, max_ratio, mass)


def prune_topk(x: Tensor, k: int) -> Tensor:
    """Set all but the k largest entries of each row to 0; ties go to the lowest column."""
    _, order = x.detach().sort(dim=1, descending=True, stable=True)
    keep = torch.zeros_like(x, dtype=torch.bool).scatter(1, order[:, :k], True)
    return x.masked_fill(~keep, 0)


def dense_rows(indices: Tensor, values: Tensor, lengths: Tensor, num_cols: int) -> Tensor:
    """Return padded rows (B, K) as a dense (B, num_cols) tensor."""
    dense = values.new_zeros(values.shape[0], num_cols)
    if indices.numel() == 0 or num_cols == 0:
        return dense
    # Unused slots repeat the last entry of their row; those of empty rows write 0 to column 0.
    last = (lengths.long() - 1).clamp(min=0).unsqueeze(1)
    used = indices >= 0
    columns = torch.where(used, indices, indices.gather(1, last)).clamp(min=0)
    entries = torch.where(used, values, values.gather(1, last).detach())
    return dense.scatter(1, columns.long(), entries)


def keep_largest(
    indices: Tensor,
    values: Tensor,
    lengths: Tensor,
    k: int | None = None,
    max_ratio: float | None = None,
    mass: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the entries of padded rows that pass the criteria which rank entries."""
    if values.shape[1] == 0 or (k is None and max_ratio is None and mass is None):
        return indices, values, lengths
    return _compact(_are_largest(values, lengths, k, max_ratio, mass), indices, values)


def _compact(keep: Tensor, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the kept entries to the front of their rows and cut the width to the longest row."""
    lengths = keep.sum(1, dtype=torch.int32)
    width = int(lengths.max()) if len(lengths) else 0
    rows, slots = keep.nonzero(as_tuple=True)
    starts = lengths.cumsum(0) - lengths
    targets = torch.arange(len(rows), device=keep.device) - starts[rows]
    shape = (keep.shape[0], width)
    return (
        indices.new_full(shape, -1).index_put((rows, targets), indices[rows, slots]),
        values.new_zeros(shape).index_put((rows, targets), values[rows, slots]),
        lengths,
    )


def _are_largest(
    values: Tensor, lengths: Tensor, k: int | None, max_ratio: float | None, mass: float | None
) -> Tensor:
    """Return a (B, K) mask of the used slots that pass every criterion; ties go to the lowest."""
    slots = torch.arange(values.shape[1], device=values.device)
    used = slots < lengths.unsqueeze(1)
    padded = values.detach().masked_fill(~used, -torch.inf)
    # The sort is stable: of equal values the lowest slot comes first. NaN comes before all others.
    largest, order = padded.sort(dim=1, descending=True, stable=True)
    keep = used.clone()  # by rank from here on: used slots have the first ranks
    if k is not None:
        keep &= slots < k
    if max_ratio is not None:
        keep &= ~(largest < max_ratio * largest[:, :1])
    if mass is not None:
        ranked = largest.masked_fill(~used, 0).double()
        running_sum = ranked.cumsum(1)
        keep &= ~(running_sum - ranked >= mass * running_sum[:, -1:])
    return torch.zeros_like(keep).scatter_(1, order, keep)
