"""Features of cached items: their specs, and the tables that store them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from splade_fast.ops.sparse_rows import SparseRows

Tables = dict[str, Tensor]
Value = Tensor | SparseRows
_Any = TypeVar("_Any")

# A sparse feature has three tables, named by its key and these suffixes.
_SPARSE = (":indices", ":values", ":lengths")


def select(name: str, values: Mapping[str, _Any], keys: Iterable[str]) -> dict[str, _Any]:
    """Return the values of these keys.

    Args:
        name: name of the argument, for error messages.

    Raises:
        KeyError: a key is missing.
    """
    keys = tuple(keys)
    for key in keys:
        if key not in values:
            raise KeyError(f"{name} must have {key!r}, got {sorted(values)}")
    return {key: values[key] for key in keys}


@dataclass(frozen=True)
class FixedLenFeature:
    """A dense feature: one tensor of a fixed shape for each item.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> spec = nc.FixedLenFeature([4], torch.int32, default_value=-1)
        >>> nc.CacheManager({"ids": spec}, cache_size=10).init_cache().data["ids"].shape
        torch.Size([10, 4])

    Args:
        shape: shape of one item, e.g. [512], or [] for a number.
        dtype: any dtype of torch.
        default_value: value that pads items smaller than `shape`; None: 0.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    default_value: float | None = None

    def zeros(self, count: int) -> Tables:
        """Return tables of `count` empty items, keyed by the suffix of their names."""
        return {"": torch.zeros([count, *self.shape], dtype=self.dtype)}


@dataclass(frozen=True)
class SparseFeature:
    """A sparse feature: the k largest positive entries of a vector for each item.

    Example::

        >>> from splade_fast import negative_cache as nc
        >>> spec = nc.SparseFeature(num_cols=30_522, k=256)
        >>> nc.CacheManager({"terms": spec}, cache_size=10).init_cache().data["terms"].shape
        (10, 30522)

    Args:
        num_cols: length of the vectors, V.
        k: number of entries stored of a vector. A vector with at most k positive entries is stored
            completely.
        dtype: dtype of the values.
    """

    num_cols: int
    k: int
    dtype: torch.dtype = torch.float32

    def zeros(self, count: int) -> Tables:
        """Return tables of `count` empty items, keyed by the suffix of their names."""
        tables = (
            torch.full((count, self.k), -1, dtype=torch.int32),
            torch.zeros((count, self.k), dtype=self.dtype),
            torch.zeros(count, dtype=torch.int32),
        )
        return dict(zip(_SPARSE, tables, strict=True))


Feature = FixedLenFeature | SparseFeature


def sparse_tables(key: str, rows: SparseRows) -> Tables:
    """Return the tables of a sparse feature."""
    tensors = (rows.indices, rows.values, rows.lengths)
    return {key + suffix: tensor for suffix, tensor in zip(_SPARSE, tensors, strict=True)}


def join_tables(key: str, tables: Mapping[str, Tensor], num_cols: int | None) -> Value:
    """Return a feature from its tables.

    Args:
        num_cols: V of a sparse feature; None for a dense feature.
    """
    if num_cols is None:
        return tables[key]
    indices, values, lengths = (tables[key + suffix] for suffix in _SPARSE)
    return SparseRows(indices, values, lengths, num_cols)


def table_names(key: str, num_cols: int | None) -> tuple[str, ...]:
    """Return the names of the tables of a feature."""
    return (key,) if num_cols is None else tuple(key + suffix for suffix in _SPARSE)


def as_dense(value: Value) -> Tensor:
    """Return a feature as a dense tensor (N, ...). The conversion is differentiable."""
    return value.to_dense() if isinstance(value, SparseRows) else value


def _is_storable(value: object, like: Tensor, device: torch.device) -> TypeGuard[Tensor]:
    """Return whether rows can be stored in the table `like` as they are."""
    return (
        isinstance(value, Tensor)
        and value.dtype is like.dtype
        and value.shape[1:] == like.shape[1:]
        and value.ndim == like.ndim
        and value.device == device
        and not value.requires_grad
    )


def to_stored(
    name: str,
    value: Value,
    like: Value,
    device: torch.device,
    default_value: float | None = None,
) -> Value:
    """Cast, pad or prune items to the rows of a cache.

    Args:
        name: name of the argument, for error messages.
        value: (N, ...) items, or SparseRows.
        like: the feature in the cache.
        device: device of the result.
        default_value: value that pads dense items; None: 0.

    Raises:
        TypeError, ValueError: the items do not fit.
    """
    if isinstance(like, SparseRows):
        return _to_sparse_rows(name, value, like, device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    value = value.detach()
    shape = like.shape[1:]
    fits = value.ndim == like.ndim and all(
        mine <= theirs for mine, theirs in zip(value.shape[1:], shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must be (items, {_describe(shape)}), got {tuple(value.shape)}")
    value = value.to(device=device, dtype=like.dtype)
    if value.shape[1:] == shape:
        return value
    padded = value.new_full((len(value), *shape), default_value or 0)
    padded[tuple(slice(size) for size in value.shape)] = value
    return padded


def _to_sparse_rows(name: str, value: Value, like: SparseRows, device: torch.device) -> SparseRows:
    if isinstance(value, Tensor):
        if value.ndim != 2 or value.shape[1] != like.num_cols:
            raise ValueError(f"{name} must be (items, {like.num_cols}), got {tuple(value.shape)}")
        value = SparseRows.from_dense(value.detach().to(like.dtype), like.width)
    if value.num_cols != like.num_cols:
        raise ValueError(f"{name} must have num_cols {like.num_cols}, got {value.num_cols}")
    if value.width > like.width:
        value = SparseRows.from_dense(value.to_dense().detach(), like.width)
    pairs = (
        (value.indices, like.indices),
        (value.values, like.values),
        (value.lengths, like.lengths),
    )
    if all(_is_storable(rows, table, device) for rows, table in pairs):
        return value
    value = value.to(device)
    missing = (0, like.width - value.width)
    return SparseRows(
        torch.nn.functional.pad(value.indices, missing, value=-1),
        torch.nn.functional.pad(value.values.detach().to(like.dtype), missing),
        value.lengths,
        like.num_cols,
    )


def _describe(shape: Sequence[int]) -> str:
    return ", ".join(f"up to {size}" for size in shape) or "no more dimensions"
