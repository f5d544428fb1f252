"""gather in plain PyTorch: rows of several tables, read and written."""

from collections.abc import Mapping

import torch
from torch import Tensor

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def gather_rows(tables: Mapping[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
    """Return rows[name][i] = tables[name][indices[i]], on the device of the indices."""
    _check_range(tables, indices)
    return {
        name: _bits(table)[indices.to(table.device)].to(indices.device).view(table.dtype)
        for name, table in tables.items()
    }


def scatter_rows_(
    tables: Mapping[str, Tensor],
    indices: Tensor,
    rows: Mapping[str, Tensor],
    mask: Tensor | None = None,
) -> None:
    """Set tables[name][indices[i]] = rows[name][i] where the mask is True, in the order of i."""
    written = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
    _check_range(tables, indices[written])
    for name, table in tables.items():
        order = torch.arange(len(indices), device=indices.device)
        places, order = indices[written], order[written]
        last = order.new_full((len(table),), -1).scatter_reduce(0, places, order, "amax")
        kept = order[last[places] == order]
        _bits(table)[indices[kept].to(table.device)] = _bits(rows[name])[kept].to(table.device)


def update_cache_(
    tables: Mapping[str, Tensor],
    age: Tensor,
    valid: Tensor,
    *,
    new_rows: Mapping[str, Tensor] | None = None,
    new_mask: Tensor | None = None,
    refreshed_rows: Mapping[str, Tensor] | None = None,
    refreshed_slots: Tensor | None = None,
    refreshed_mask: Tensor | None = None,
    use_lru: bool = True,
) -> None:
    """Compute `splade_fast.ops.gather.update_cache_`."""
    new, fresh = (
        {name: rows.clone() for name, rows in (given or {}).items()}
        for given in (new_rows, refreshed_rows)
    )
    added = torch.ones(len(next(iter(new.values()))) if new else 0, device=age.device).bool()
    if new_mask is not None:
        added = new_mask
    count = int(added.sum())
    if count > len(age):
        raise RuntimeError(f"new_rows must be at most the {len(age)} slots, got {count}")
    if refreshed_slots is not None:
        mask = torch.ones_like(refreshed_slots).bool() if refreshed_mask is None else refreshed_mask
        _check_range({"age": age}, refreshed_slots[mask])
        scatter_rows_({name: tables[name] for name in fresh}, refreshed_slots, fresh, mask)
        if use_lru:
            age[refreshed_slots[mask]] = -1
    slots = torch.zeros(len(added), dtype=torch.int64, device=age.device)
    slots[added] = age.sort(descending=True, stable=True)[1][:count]
    scatter_rows_({name: tables[name] for name in new}, slots, new, added)
    age[slots[added]] = -1
    valid[slots[added]] = True
    age += 1


def _bits(tensor: Tensor) -> Tensor:
    """View the memory in a dtype that PyTorch can index, which some unsigned dtypes are not."""
    return tensor.view(_SIGNED.get(tensor.dtype, tensor.dtype))


def _check_range(tables: Mapping[str, Tensor], indices: Tensor) -> None:
    """Raise RuntimeError if an index is not a row of every table."""
    for table in tables.values():
        outside = indices[(indices < 0) | (indices >= len(table))]
        if len(outside):
            raise RuntimeError(
                f"indices must be between 0 and {len(table) - 1}, the last row of the tables, "
                f"got {int(outside[0])}"
            )
