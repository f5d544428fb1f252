"""Checks of the tensors of SparseRows."""

import torch
from torch import Tensor

from splade_fast._checks import check_tensor

_MAX_COLS = 2**31 - 2  # limit of the ops
_ENTRIES_AT_ONCE = 2**20  # bounds the memory that checking needs


def check_layout(indices: Tensor, values: Tensor, lengths: Tensor, num_cols: int) -> None:
    """Raise if types, dtypes, shapes or devices are not those of sparse rows."""
    for name, tensor in (("indices", indices), ("values", values), ("lengths", lengths)):
        check_tensor(name, tensor)
    if indices.dtype != torch.int32:
        raise TypeError(f"indices must be int32, got {indices.dtype}")
    if lengths.dtype != torch.int32:
        raise TypeError(f"lengths must be int32, got {lengths.dtype}")
    if not values.is_floating_point():
        raise TypeError(f"values must be floating point, got {values.dtype}")
    if indices.dim() != 2:
        raise ValueError(f"indices must be (rows, slots), got shape {tuple(indices.shape)}")
    if values.shape != indices.shape:
        raise ValueError(
            f"values must have the shape of indices {tuple(indices.shape)}, "
            f"got {tuple(values.shape)}"
        )
    if lengths.shape != indices.shape[:1]:
        raise ValueError(
            f"lengths must be (rows,) = ({indices.shape[0]},), got {tuple(lengths.shape)}"
        )
    for name, tensor in (("values", values), ("lengths", lengths)):
        if tensor.device != indices.device:
            raise ValueError(
                f"{name} must be on {indices.device} as indices are, got {tensor.device}"
            )
    if not 0 <= num_cols <= _MAX_COLS:
        raise ValueError(
            "num_cols must be at least 0 and at most 2^31 - 2, as columns are int32, "
            f"got {num_cols}"
        )


def check_contents(indices: Tensor, values: Tensor, lengths: Tensor, num_cols: int) -> None:
    """Raise ValueError for the first row whose length, order, range or padding is wrong."""
    rows_at_once = max(1, _ENTRIES_AT_ONCE // max(indices.shape[1], 1))
    for start in range(0, len(indices), rows_at_once):
        block = slice(start, start + rows_at_once)
        _check_block(indices[block], values[block], lengths[block], num_cols, start)


def _check_block(
    indices: Tensor, values: Tensor, lengths: Tensor, num_cols: int, first_row: int
) -> None:
    width = indices.shape[1]
    used = torch.arange(width, device=indices.device) < lengths.unsqueeze(1)
    ascending = torch.ones_like(used)
    ascending[:, 1:] = indices[:, 1:] > indices[:, :-1]
    violations = {
        f"lengths must be between 0 and {width}": (
            ((lengths < 0) | (lengths > width)).unsqueeze(1)
        ),
        f"indices must be between 0 and {num_cols - 1} where used": (
            used & ((indices < 0) | (indices >= num_cols))
        ),
        "indices must ascend within a row": used & ~ascending,
        "indices must be -1 where unused": ~used & (indices != -1),
        "values must be 0 where unused": ~used & (values != 0),
    }
    for rule, violation_mask in violations.items():
        if violation_mask.any():
            row = int(violation_mask.any(1).nonzero()[0])
            raise ValueError(
                f"{rule}, got in row {first_row + row} the length {int(lengths[row])}, "
                f"indices {_shorten(indices[row])} and values {_shorten(values[row])}"
            )


def _shorten(row: Tensor, limit: int = 8) -> str:
    """Return the first entries of a row as text."""
    shown = ", ".join(str(entry) for entry in row[:limit].tolist())
    return f"[{shown}, …]" if len(row) > limit else f"[{shown}]"
