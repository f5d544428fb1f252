"""gather: rows of several tables, read and written in one launch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from splade_fast import _library, reference
from splade_fast._checks import check_device, check_tensor


def gather_rows(tables: Mapping[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
    """rows[name][i] = tables[name][indices[i]], of all tables in one launch.

    Nothing is differentiable here: tables are a store of values.

    Args:
        tables: (C, ...) each, of any dtype and row shape, with the same C; on the device of the
            indices, or, with indices on a GPU, in pinned host memory, which the GPU then reads in
            place. Pinned tables have to outlive the work that reads them.
        indices: (N,) int64 or int32, between 0 and C - 1.

    Returns:
        For each table (N, ...), a new tensor on the device of the indices.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device, or a table requires
            a gradient while gradients are recorded.
        RuntimeError: an index is out of range. On a GPU, where looking would mean waiting, the
            kernel stops by a device-side assertion, as PyTorch's indexing does: the next call that
            waits for the GPU raises.
    """
    names, values = _check_tables(tables, indices)
    if not _library.has_kernels(indices.device):
        return reference.gather_rows(dict(zip(names, values, strict=True)), indices)
    gathered = torch.ops.splade_fast.gather_rows(values, indices.long())
    return dict(zip(names, gathered, strict=True))


def scatter_rows_(
    tables: Mapping[str, Tensor],
    indices: Tensor,
    rows: Mapping[str, Tensor],
    *,
    mask: Tensor | None = None,
) -> None:
    """tables[name][indices[i]] = rows[name][i] for i = 0 … N - 1, in all tables or in none.

    Of several rows for the same place the last one stays. Rows are stored as values: what is
    written has no gradient.

    Args:
        tables: (C, ...) each, as in `gather_rows`; each row in one piece, and no memory in two
            tables. On a GPU a pinned table changes when the kernel runs: wait for it before
            looking.
        indices: (N,) int64 or int32, between 0 and C - 1 where the mask is true.
        rows: (N, ...) for each table, on the device of the indices, with its dtype and row shape.
        mask: (N,) bool; rows where it is false are not written, and their index may be anything.
            None: all are written.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device, or a table requires
            a gradient while gradients are recorded.
        RuntimeError: an index is out of range; nothing was written. On a GPU the next call that
            waits for it raises, see `gather_rows`.
    """
    names, values = _check_tables(tables, indices)
    if set(rows) != set(names):
        raise ValueError(f"rows must have the names of tables, {sorted(names)}, got {sorted(rows)}")
    sources = [rows[name].detach() for name in names]
    for name, table, source in zip(names, values, sources, strict=True):
        label = f"rows[{name!r}]"
        if source.dtype != table.dtype:
            raise TypeError(
                f"{label} must have the dtype of its table, {table.dtype}, got {source.dtype}"
            )
        expected = (indices.shape[0], *table.shape[1:])
        if source.shape != expected:
            raise ValueError(f"{label} must be {tuple(expected)}, got {tuple(source.shape)}")
        check_device(label, source, "indices", indices)
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if mask.shape != indices.shape:
            raise ValueError(f"mask must be {tuple(indices.shape)}, got {tuple(mask.shape)}")
        check_device("mask", mask, "indices", indices)
    if not _library.has_kernels(indices.device):
        with torch.no_grad():
            reference.scatter_rows_(
                dict(zip(names, values, strict=True)),
                indices,
                dict(zip(names, sources, strict=True)),
                mask,
            )
        return
    torch.ops.splade_fast.scatter_rows_(values, indices.long(), sources, mask)
    _count_change(values)


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
    """A step of a cache in one call: refresh, replace the oldest, age += 1; all of it or nothing.

    First tables[name][refreshed_slots[i]] = refreshed_rows[name][i], with age -1 if `use_lru`. Then
    the m-th new row that is not masked takes the m-th oldest slot, of equal ages the lowest first,
    with age -1. Then every age grows by one.

    Arguments are `negative_cache.CacheManager`'s, whose Python checks them in the words of its
    callers; here the op does, before it writes.

    Args:
        tables: (C, ...) each, as in `scatter_rows_`.
        age: (C,) int32, contiguous; with the other tensors on its device, but pinned tables.
        valid: (C,) bool, contiguous: becomes true for new rows.
        new_rows: (N, ...) for each table without a gradient, N at most C; None: none.
        new_mask: (N,) bool; rows where it is false are not added. None: all are.
        refreshed_rows: (M, ...) for some tables, without a gradient.
        refreshed_slots: (M,) int64, of several for one slot the last counts; None: none.
        refreshed_mask: (M,) bool; rows where it is false are not written, and their slot may be
            anything. None: all are.
        use_lru: refreshed rows become as young as new ones.

    Raises:
        RuntimeError: an argument does not fit, or a slot is out of range; see `scatter_rows_`.
    """
    if not _library.has_kernels(age.device):
        reference.update_cache_(
            tables,
            age,
            valid,
            new_rows=new_rows,
            new_mask=new_mask,
            refreshed_rows=refreshed_rows,
            refreshed_slots=refreshed_slots,
            refreshed_mask=refreshed_mask,
            use_lru=use_lru,
        )
        return
    if refreshed_rows:
        tables = {**refreshed_rows, **tables}  # in the order of the op: the refreshed ones first
    written = list(tables.values())
    _UPDATE_CACHE(
        written,
        age,
        valid,
        [] if new_rows is None else [new_rows[name] for name in tables],
        new_mask,
        [] if refreshed_rows is None else list(refreshed_rows.values()),
        refreshed_slots,
        refreshed_mask,
        use_lru,
    )
    _count_change([*written, age, valid])


def _count_change(tables: list[Tensor]) -> None:
    """What a backward has saved of a table must not be used as if it had not changed."""
    if not is_compiling():
        increment_version(tables)


def _check_tables(tables: Mapping[str, Tensor], indices: Tensor) -> tuple[list[str], list[Tensor]]:
    check_tensor("indices", indices)
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be int64 or int32, got {indices.dtype}")
    if indices.ndim != 1:
        raise ValueError(f"indices must be (count,), got {tuple(indices.shape)}")
    count: int | torch.SymInt | None = None
    for name, table in tables.items():
        label = f"tables[{name!r}]"
        check_tensor(label, table)
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{label} must not require a gradient: gathering has none; detach the table"
            )
        if table.ndim < 1:
            raise ValueError(f"{label} must be (rows, ...), got a scalar")
        if count is None:
            count = table.shape[0]
        if table.shape[0] != count:
            raise ValueError(f"{label} must have {count} rows, got {table.shape[0]}")
        pinned = indices.is_cuda and table.device.type == "cpu" and table.is_pinned()
        if not pinned:
            check_device(label, table, "indices", indices)
    return list(tables), list(tables.values())


def _gather_fake(tables: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    return [
        table.new_empty((indices.shape[0], *table.shape[1:]), device=indices.device)
        for table in tables
    ]


def _scatter_fake(
    tables: Sequence[Tensor], indices: Tensor, rows: Sequence[Tensor], mask: Tensor | None
) -> None:
    return None


def _update_fake(
    tables: Sequence[Tensor],
    age: Tensor,
    valid: Tensor,
    new_rows: Sequence[Tensor],
    new_mask: Tensor | None,
    refreshed_rows: Sequence[Tensor],
    refreshed_slots: Tensor | None,
    refreshed_mask: Tensor | None,
    use_lru: bool,
) -> None:
    return None


if _library.cpu_library_loaded():
    torch.library.register_fake("splade_fast::gather_rows", _gather_fake)
    torch.library.register_fake("splade_fast::scatter_rows_", _scatter_fake)
    torch.library.register_fake("splade_fast::update_cache_", _update_fake)
    _UPDATE_CACHE = torch.ops.splade_fast.update_cache_.default
