"""prune in plain PyTorch: dense rows (B, V) -> the entries to keep."""

import torch
from torch import Tensor


def prune_rows(
    x: Tensor,
    k: int | None = None,
    threshold: float | None = None,
    max_ratio: float | None = None,
    mass: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of each row that pass every criterion given: indices, values, lengths.

    `SparseRows.from_dense` says what the criteria mean. threshold=None: every entry is a candidate.
    """
    columns = torch.arange(x.shape[1], dtype=torch.int32, device=x.device).expand_as(x)
    # "not at most" instead of "greater": keeps NaN, which must not vanish silently.
    above = torch.ones_like(x, dtype=torch.bool) if threshold is None else ~(x <= threshold)
    return keep_largest(*_compact(above, columns, x), k, max_ratio, mass)


def prune_topk(x: Tensor, k: int) -> Tensor:
    """All but the k largest of a row set to 0; of equal entries the lowest columns count first."""
    _, order = x.detach().sort(dim=1, descending=True, stable=True)
    keep = torch.zeros_like(x, dtype=torch.bool).scatter(1, order[:, :k], True)
    return x.masked_fill(~keep, 0)


def dense_rows(indices: Tensor, values: Tensor, lengths: Tensor, num_cols: int) -> Tensor:
    """Padded rows (B, K) as (B, num_cols), zero elsewhere."""
    dense = values.new_zeros(values.shape[0], num_cols)
    if indices.numel() == 0 or num_cols == 0:
        return dense
    # Unused slots write their row's last entry again, empty rows a 0 to their first column.
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
    """Of rows that are sparse already, keep what passes the criteria that rank entries."""
    if values.shape[1] == 0 or (k is None and max_ratio is None and mass is None):
        return indices, values, lengths
    return _compact(_are_largest(values, lengths, k, max_ratio, mass), indices, values)


def _compact(keep: Tensor, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the kept entries of each row to its front, in order; the new width is the largest."""
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
    """(B, K) bool: the used slots that pass every criterion; ties go to the lowest slot."""
    slots = torch.arange(values.shape[1], device=values.device)
    used = slots < lengths.unsqueeze(1)
    padded = values.detach().masked_fill(~used, -torch.inf)
    # Stable and descending: of equal values the lowest slot comes first, NaN before everything.
    largest, order = padded.sort(dim=1, descending=True, stable=True)
    keep = used.clone()  # in ranks from here on; used slots are also the first ranks
    if k is not None:
        keep &= slots < k
    if max_ratio is not None:
        keep &= ~(largest < max_ratio * largest[:, :1])
    if mass is not None:
        ranked = largest.masked_fill(~used, 0).double()
        through = ranked.cumsum(1)
        keep &= ~(through - ranked >= mass * through[:, -1:])
    return torch.zeros_like(keep).scatter_(1, order, keep)
