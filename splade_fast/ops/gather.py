"""gather: rows of several tables, read and written in one launch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from splade_fast import _library, reference
from splade_fast._checks import check_device, check_tensor
from splade_fast.ops.autograd import has_tangent


def gather_rows(tables: Mapping[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
    """Read rows of several tables in one launch: rows[name][i] = tables[name][indices[i]].

    Not differentiable: tables store values.

    Args:
        tables: (C, ...) each, of any dtype and row shape, all with the same C. Tables are on the
            device of the indices. With indices on a GPU they may also be in pinned host memory,
            which the GPU reads in place; they stay alive until it has. A CUDA graph does not keep
            them.
        indices: (N,) int64 or int32, between 0 and C - 1.

    Returns:
        A new tensor (N, ...) for each table, on the device of the indices.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device, or a table requires
            a gradient while gradients are recorded.
        RuntimeError: an index is out of range. On a GPU the kernel stops with a device-side
            assertion, as PyTorch's indexing does, and the next call that waits for the GPU raises.

    Example::

        >>> tables = {"id": torch.tensor([7, 8, 9]), "age": torch.tensor([0, 1, 2])}
        >>> sf.gather_rows(tables, torch.tensor([2, 0]))
        {'id': tensor([9, 7]), 'age': tensor([2, 0])}
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
    """Write rows of several tables in one launch: tables[name][indices[i]] = rows[name][i].

    Either all tables are written or none. Where an index repeats, the row with the highest i
    remains. Rows are stored as values, without their gradients.

    Args:
        tables: (C, ...) each, as in `gather_rows`. Rows are contiguous, and tables do not share
            memory. With indices on a GPU, a pinned table changes only when the kernel runs:
            synchronise before reading it.
        indices: (N,) int64 or int32, between 0 and C - 1 where the mask is True.
        rows: (N, ...) for each table, with its dtype and row shape, on the device of the indices.
        mask: (N,) bool; rows with False are not written, and their index may have any value. None:
            all rows are written.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device, or a table requires
            a gradient while gradients are recorded.
        RuntimeError: an index is out of range; nothing was written. On a GPU see `gather_rows`.

    Example::

        >>> tables = {"id": torch.tensor([7, 8, 9])}
        >>> sf.scatter_rows_(tables, torch.tensor([2, 0]), {"id": torch.tensor([5, 6])})
        >>> tables["id"]
        tensor([6, 8, 5])
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
    _mark_modified(values)


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
    """Refresh rows of a cache, replace its oldest rows and age all others, in one launch.

    1. tables[name][refreshed_slots[i]] = refreshed_rows[name][i], with age -1 if `use_lru`.
    2. The m-th unmasked new row replaces the row of the m-th largest age, with age -1. Of equal
       ages the lowest slot is replaced first.
    3. age += 1.

    Either all of this happens or nothing. `negative_cache.CacheManager` checks its arguments in
    Python; callers of this function rely on the checks that the op makes before it writes.

    Args:
        tables: (C, ...) each, as in `scatter_rows_`.
        age: (C,) int32, contiguous. All tensors are on its device, except pinned tables.
        valid: (C,) bool, contiguous; becomes True where a new row is written.
        new_rows: (N, ...) for each table, without gradients; at most C unmasked rows. None: no
            new rows.
        new_mask: (N,) bool; rows with False are not added. None: all rows are added.
        refreshed_rows: (M, ...) for some of the tables, without gradients.
        refreshed_slots: (M,) int64; where a slot repeats, the last row remains. None: no row is
            refreshed.
        refreshed_mask: (M,) bool; rows with False are not written, and their slot may have any
            value. None: all rows are written.
        use_lru: whether refreshed rows become as young as new ones.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape or device, or a slot is out of range;
            see `scatter_rows_`.
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
        tables = {**refreshed_rows, **tables}  # the op takes the refreshed tables first
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
    _mark_modified([*written, age, valid])


def _mark_modified(tables: list[Tensor]) -> None:
    """Let autograd notice that a table which a backward has saved was modified."""
    if not is_compiling():
        increment_version(tables)


def _check_tables(tables: Mapping[str, Tensor], indices: Tensor) -> tuple[list[str], list[Tensor]]:
    """Return the names and the tables. Raise if they or the indices do not go together."""
    check_tensor("indices", indices)
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be int64 or int32, got {indices.dtype}")
    if indices.ndim != 1:
        raise ValueError(f"indices must be (count,), got {tuple(indices.shape)}")
    count: int | torch.SymInt | None = None
    for name, table in tables.items():
        label = f"tables[{name!r}]"
        check_tensor(label, table)
        if (table.requires_grad and torch.is_grad_enabled()) or has_tangent(table):
            raise ValueError(
                f"{label} must not require a gradient, as gathering has none: detach the table"
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


def _fake_gather(tables: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
    return [
        table.new_empty((indices.shape[0], *table.shape[1:]), device=indices.device)
        for table in tables
    ]


def _fake_in_place(*arguments: object) -> None:
    return None


if _library.is_cpu_library_loaded():
    torch.library.register_fake("splade_fast::gather_rows", _fake_gather)
    torch.library.register_fake("splade_fast::scatter_rows_", _fake_in_place)
    torch.library.register_fake("splade_fast::update_cache_", _fake_in_place)
    _UPDATE_CACHE = torch.ops.splade_fast.update_cache_.default
