"""Order of documents in which neighbours are alike."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize, pad
from tqdm.auto import tqdm

from splade_fast._atomic_files import name_in_errors
from splade_fast._tensor_files import map_bytes
from splade_fast.ops.sparse_rows import SparseRows

_DIMS = 32  # of the points that stand for the rows
_MAX_COLS = 2**16  # further columns share the directions of the first ones
_SAMPLED_ROWS = 4096  # from which the directions are learned
_LEAF_ROWS = 8  # halving goes on while a part has more rows
_GROUP_ROWS = 256  # are scored together, in any order
_POWER_STEPS = 4
# Bounds of the memory for a part of the rows.
_ENTRIES_AT_ONCE = 2**20
_PART_ROWS = 2**17


def order_by_similarity(
    rows: SparseRows, *, scratch: Path | None = None, progress: tqdm | None = None
) -> Tensor:
    """Return the numbers of all rows, (N,) int32, in an order in which neighbours are alike.

    Rows are projected to the directions in which a sample of them is largest, its first singular
    vectors. All rows are then halved along the direction in which they vary most, and the halves
    again, until the parts are small.

    Args:
        rows: (N, V).
        scratch: folder for a temporary file of 128 bytes for a row, which are otherwise in memory.
        progress: bar that is advanced by the number of rows.
    """
    order = torch.arange(len(rows), dtype=torch.int32)
    if len(rows) <= _GROUP_ROWS or rows.width == 0:
        if progress is not None:
            progress.update(len(rows))
        return order
    points = _project(rows, scratch, progress)
    _order_part(points, order)
    return order


def _order_part(points: Tensor, rows: Tensor) -> None:
    """Order the numbers of some rows, in place."""
    if len(rows) > _PART_ROWS:
        first = _halve(points, rows)
        _order_part(points, rows[:first])
        _order_part(points, rows[first:])
    elif len(rows) > _LEAF_ROWS:
        rows.copy_(rows[_order_points(points[rows])])


def _halve(points: Tensor, rows: Tensor) -> int:
    """Put the first half of some rows before the others, and return its number of rows.

    Direction and halves are those of `_order_points`, but that the direction comes from a sample
    and the first half is a number of whole parts.
    """
    sample = points[rows[:: math.ceil(len(rows) / _PART_ROWS)]]
    direction = _main_direction(sample.unsqueeze(0))[0]
    keys = torch.cat([points[part] @ direction for part in rows.split(_PART_ROWS)]).flatten()
    keys.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    first = math.ceil(len(rows) / 2 / _PART_ROWS) * _PART_ROWS
    limit = float(np.partition(keys.numpy(), first)[first])
    is_first = keys < limit
    equal = (keys == limit).nonzero().flatten()
    is_first[equal[: first - int(is_first.sum())]] = True
    rows.copy_(torch.cat([rows[is_first], rows[~is_first]]))
    return first


def _order_points(points: Tensor) -> Tensor:
    """Return an order of points (n, dims) in which neighbours are near."""
    count = len(points)
    levels = math.ceil(math.log2(count / _LEAF_ROWS))
    # All parts of a level have the same size. Points that fill them up are ordered last.
    points = pad(points, (0, 0, 0, -count % 2**levels))
    order = torch.arange(len(points))
    for level in range(levels):
        parts = points.view(2**level, -1, points.shape[1])
        keys = (parts @ _main_direction(parts)).view(-1)
        keys[order >= count] = math.inf
        sorted_places = keys.view(len(parts), -1).argsort(dim=1, stable=True)
        starts = torch.arange(0, len(points), parts.shape[1]).unsqueeze(1)
        places = (sorted_places + starts).view(-1)
        points, order = points[places], order[places]
    return order[order < count]  # NaN is ordered after the points that fill up


def _project(rows: SparseRows, scratch: Path | None, progress: tqdm | None) -> Tensor:
    """Return a point for each row, (N, at most _DIMS)."""
    largest = rows.values.max()
    directions = _main_directions(rows, largest)
    points = _new_points(len(rows), directions.shape[1], scratch)
    rows_at_once = max(1, _ENTRIES_AT_ONCE // rows.width)
    for start in range(0, len(rows), rows_at_once):
        part = rows[start : start + rows_at_once]
        points[start : start + len(part)] = embedding_bag(
            part.indices.remainder(len(directions)),  # unused slots have value 0
            directions,
            per_sample_weights=(part.values / largest).float(),
            mode="sum",
        )
        if progress is not None:
            progress.update(len(part))
    return points


def _new_points(count: int, dims: int, scratch: Path | None) -> Tensor:
    """Return memory for points, in a file without a name if there is a folder for it."""
    if scratch is None:
        return torch.empty(count, dims)
    with name_in_errors(scratch), tempfile.TemporaryFile(dir=scratch) as file:
        return (
            map_bytes(file, count * dims * torch.float32.itemsize)
            .view(torch.float32)
            .view(count, dims)
        )


def _main_directions(rows: SparseRows, largest: Tensor) -> Tensor:
    """Return about the first singular vectors of a sample of rows, (at most _MAX_COLS, dims)."""
    sampled = min(_SAMPLED_ROWS, max(_LEAF_ROWS, 2 * _ENTRIES_AT_ONCE // rows.width))
    sample = rows[:: math.ceil(len(rows) / sampled)]
    numbers, columns, values = sample.coordinates()
    num_cols = min(rows.num_cols, _MAX_COLS)
    matrix = torch.sparse_coo_tensor(
        torch.stack([numbers, columns % num_cols]),
        (values / largest).float(),
        (len(sample), num_cols),
        check_invariants=False,
    ).coalesce()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(num_cols, min(_DIMS, num_cols), generator=generator)
    for _ in range(2):
        directions = torch.linalg.qr(matrix.t() @ (matrix @ directions)).Q
    return directions


def _main_direction(parts: Tensor) -> Tensor:
    """Return the direction (parts, dims, 1) in which the points of each part vary most."""
    centred = parts - parts.mean(dim=1, keepdim=True)
    direction = centred[:, :1].transpose(1, 2) + 1e-3
    for _ in range(_POWER_STEPS):
        direction = normalize(centred.transpose(1, 2) @ (centred @ direction), dim=1)
    return direction
