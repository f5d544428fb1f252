"""A cache of items and their embeddings, and the manager that updates them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from splade_fast._checks import check_count
from splade_fast.negative_cache.features import (
    Feature,
    FixedLenFeature,
    SparseFeature,
    Tables,
    Value,
    join_tables,
    sparse_tables,
    table_names,
    to_stored,
)
from splade_fast.ops.gather import gather_rows, update_cache_
from splade_fast.ops.sparse_rows import SparseRows

__all__ = ["CacheData", "CacheManager", "FixedLenFeature", "NegativeCache", "SparseFeature"]

STORAGES = ("device", "pinned")


class CacheData(nn.Module, MutableMapping[str, Value]):
    """Features of C items, stored as buffers: maps names to (C, ...) tensors or SparseRows."""

    def __init__(
        self,
        data: Mapping[str, Value],
        storage: str = "device",
        defaults: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
        self.storage = storage
        self._defaults = dict(defaults or {})
        self._num_cols: dict[str, int | None] = {}
        for key, value in data.items():
            self[key] = value

    def __getitem__(self, key: str) -> Value:
        tables: Any = self._buffers
        return join_tables(key, tables, self._num_cols[key])

    def __setitem__(self, key: str, value: Value) -> None:
        """Register a value as buffers, without a copy."""
        if not isinstance(key, str) or not key or "." in key:
            raise ValueError(f"keys must be strings without dots, got {key!r}")
        if key in self._num_cols:
            del self[key]
        # register_buffer refuses names of methods of a module, such as "type".
        if isinstance(value, SparseRows):
            self._num_cols[key] = value.num_cols
            self._buffers.update(sparse_tables(key, value))
        else:
            self._num_cols[key] = None
            self._buffers[key] = value.detach()

    def __delitem__(self, key: str) -> None:
        for name in table_names(key, self._num_cols.pop(key)):
            del self._buffers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._num_cols)

    def __len__(self) -> int:
        return len(self._num_cols)

    # An empty mapping is false, but a module must always be true.
    def __bool__(self) -> bool:
        return True

    __hash__ = nn.Module.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def device(self) -> torch.device | None:
        """Device of all tables; None if there are no tables or they stay in host memory."""
        if self.storage == "device":
            for table in self._buffers.values():
                return None if table is None else table.device
        return None

    def tables(self, keys: Iterable[str] | None = None) -> Tables:
        """Return the tables of the features `keys`; None: of all features."""
        tables: Any = self._buffers
        if keys is None:
            return dict(tables)
        return {
            name: tables[name] for key in keys for name in table_names(key, self._num_cols[key])
        }

    def join_rows(self, tables: Mapping[str, Tensor], *keys: str) -> dict[str, Value]:
        """Join rows of tables to the features `keys`."""
        return {key: join_tables(key, tables, self._num_cols[key]) for key in keys}

    def rows(self, name: str, items: Mapping[str, Value], device: torch.device) -> Tables:
        """Cast, pad and prune items to rows of the tables of their features.

        Args:
            name: name of the argument that holds the items, for error messages.
            items: features of the items by name, (N, ...).
            device: device of the rows.

        Raises:
            TypeError, ValueError: the items do not fit the features.
        """
        tables: Tables = {}
        counts = {}
        for key, value in items.items():
            rows = to_stored(f"{name}[{key!r}]", value, self[key], device, self._defaults.get(key))
            tables.update(sparse_tables(key, rows) if isinstance(rows, SparseRows) else {key: rows})
            counts[key] = len(rows)
        if len(set(counts.values())) > 1:
            raise ValueError(f"{name} must have equally many items for every key, got {counts}")
        return tables

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CacheData:
        if self.storage == "device":
            super()._apply(fn, recurse)
            return self
        for name, table in self.tables().items():
            moved = fn(table.new_empty(0))
            table = table.to(moved.dtype)
            if moved.is_cuda and not table.is_pinned():
                table = table.pin_memory()
            self._buffers[name] = table
        return self


class NegativeCache(nn.Module):
    """Cache of C slots: the features and ages of items, and a mask of the slots in use.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> cache = nc.NegativeCache({"id": torch.tensor([7, 8])}, age=torch.zeros(2))
        >>> cache.size, cache.data["id"]
        (2, tensor([7, 8]))

    Args:
        data: features by name, (C, ...) tensors or SparseRows of C rows.
        age: (C,) int32, number of steps since an item was added or refreshed.
        valid: (C,) bool, False for slots without an item; None: all slots hold an item.
        storage: "device", or "pinned" to keep the features in host memory, which a GPU reads and
            writes in place. The memory is page-locked once the module moves to a GPU.
        defaults: values that pad items smaller than a row, by name of a feature; 0 for others.
    """

    data: CacheData
    age: Tensor
    valid: Tensor

    def __init__(
        self,
        data: Mapping[str, Value],
        age: Tensor | Any,
        valid: Tensor | None = None,
        *,
        storage: str = "device",
        defaults: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.data = CacheData(data, storage, defaults)
        age = torch.as_tensor(age, dtype=torch.int32).contiguous()
        if valid is None:
            tables = self.data.tables().values()
            count = len(next(iter(tables))) if tables else len(age)
            valid = torch.ones(count, dtype=torch.bool, device=age.device)
        self.register_buffer("age", age)
        self.register_buffer("valid", valid.contiguous())

    @property
    def size(self) -> int:
        """Number of slots, C."""
        return len(self.valid)

    @property
    def device(self) -> torch.device:
        """Device of draws and updates. Pinned features stay in host memory."""
        return self.data.device or self.age.device

    def gather(self, slots: Tensor, *keys: str) -> Tables:
        """Return rows of the tables of some features, (N, ...) on the cache's device.

        Args:
            slots: (N,) int64.
            keys: names of the features.
        """
        return gather_rows(self.data.tables(keys), slots)


class CacheManager:
    """Creates and updates caches. New items replace the oldest or the least recently used ones.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> manager = nc.CacheManager({"id": nc.FixedLenFeature([], torch.int64)}, cache_size=3)
        >>> cache = manager.update_cache(
        ...     manager.init_cache(), new_items={"id": torch.tensor([7, 8])}
        ... )
        >>> cache.data["id"], cache.age, cache.valid
        (tensor([7, 8, 0]), tensor([0, 0, 1], dtype=torch.int32), tensor([ True,  True, False]))

    Args:
        specs: specs of the features by name.
        cache_size: number of slots, C.
        use_lru: whether a refreshed item counts as new, so that the least recently used items are
            replaced first.
        storage: memory of the features, see `NegativeCache`.
    """

    def __init__(
        self,
        specs: Mapping[str, Feature],
        cache_size: int,
        use_lru: bool = True,
        *,
        storage: str = "device",
    ) -> None:
        self.specs = specs
        self.cache_size = check_count("cache_size", cache_size, 1)
        self.use_lru = use_lru
        self.storage = storage

    def init_cache(self) -> NegativeCache:
        """Return a cache of zeros in which no slot is valid."""
        count = self.cache_size
        data: dict[str, Value] = {}
        for key, spec in self.specs.items():
            tables = {key + suffix: table for suffix, table in spec.zeros(count).items()}
            num_cols = spec.num_cols if isinstance(spec, SparseFeature) else None
            data[key] = join_tables(key, tables, num_cols)
        defaults = {
            key: spec.default_value
            for key, spec in self.specs.items()
            if isinstance(spec, FixedLenFeature) and spec.default_value is not None
        }
        return NegativeCache(
            data,
            torch.zeros(count, dtype=torch.int32),
            torch.zeros(count, dtype=torch.bool),
            storage=self.storage,
            defaults=defaults,
        )

    def update_cache(
        self,
        cache: NegativeCache,
        *,
        new_items: Mapping[str, Value] | None = None,
        new_items_mask: Tensor | None = None,
        updated_item_data: Mapping[str, Value] | None = None,
        updated_item_indices: Tensor | None = None,
        updated_item_mask: Tensor | None = None,
    ) -> NegativeCache:
        """Refresh some items, replace the oldest by new ones, and add one to all other ages.

        The m-th unmasked new item takes the m-th oldest slot. Among slots of equal age the lowest
        slot is the oldest. New items get age 0, and with `use_lru` refreshed items as well.

        Args:
            cache: cache that is updated in place. It does not change if an error is raised.
            new_items: (N, ...) for every feature of the cache. Items smaller than the shape of
                the spec are padded, and sparse features are pruned.
            new_items_mask: (N,) bool, False for items that are not added; None: all are added.
            updated_item_data: (M, ...) for some features.
            updated_item_indices: (M,) slots. The last item for a slot is written.
            updated_item_mask: (M,) bool, False for items that are not written.

        Returns:
            The cache.

        Raises:
            TypeError, ValueError: an argument does not fit the cache; there are more new items
                than slots.
            RuntimeError: a slot is out of range, see `scatter_rows_`.
        """
        data, age, valid, device = cache.data, cache.age, cache.valid, cache.device
        if age.shape != valid.shape:
            raise ValueError(f"cache.age must be {tuple(valid.shape)}, got {tuple(age.shape)}")
        new: Tables | None = None
        new_mask: Tensor | None = None
        if new_items is not None:
            if new_items.keys() != data.keys():
                raise ValueError(
                    f"new_items must have the keys of the cache, {sorted(data)}, "
                    f"got {sorted(new_items)}"
                )
            new = data.rows("new_items", new_items, device)
            count, slots = _count(new), age.shape[0]
            if new_items_mask is not None:
                new_mask = _mask_on("new_items_mask", new_items_mask, count, device)
            if count > slots and (new_mask is None or int(new_mask.sum()) > slots):
                raise ValueError(
                    f"new_items must be at most the {slots} slots of the cache, got {count}"
                )
        refreshed: Tables | None = None
        refreshed_mask: Tensor | None = None
        if updated_item_indices is not None:
            refreshed = self._refreshed_rows(
                data, updated_item_data or {}, updated_item_indices, device
            )
            if updated_item_mask is not None:
                refreshed_mask = _mask_on(
                    "updated_item_mask", updated_item_mask, updated_item_indices.shape[0], device
                )
            updated_item_indices = updated_item_indices.to(device, torch.int64)
        elif updated_item_data:
            raise ValueError("updated_item_indices must be given with updated_item_data, got None")
        update_cache_(
            data.tables(),
            age,
            valid,
            new_rows=new,
            new_mask=new_mask,
            refreshed_rows=refreshed,
            refreshed_slots=updated_item_indices,
            refreshed_mask=refreshed_mask,
            use_lru=self.use_lru,
        )
        return cache

    def _refreshed_rows(
        self,
        cache: CacheData,
        data: Mapping[str, Value],
        indices: Tensor,
        device: torch.device,
    ) -> Tables:
        if not data.keys() <= cache.keys():
            raise ValueError(
                f"updated_item_data must have keys of the cache, {sorted(cache)}, "
                f"got {sorted(data)}"
            )
        rows = cache.rows("updated_item_data", data, device)
        if indices.ndim != 1 or (rows and indices.shape[0] != _count(rows)):
            raise ValueError(
                f"updated_item_indices must be ({_count(rows)},) as updated_item_data, "
                f"got {tuple(indices.shape)}"
            )
        return rows


def _count(rows: Tables) -> int:
    return next(iter(rows.values())).shape[0] if rows else 0


def _mask_on(name: str, mask: Tensor, count: int, device: torch.device) -> Tensor:
    if mask.shape != (count,):
        raise ValueError(f"{name} must be ({count},), got {tuple(mask.shape)}")
    return mask.to(device, torch.bool)
