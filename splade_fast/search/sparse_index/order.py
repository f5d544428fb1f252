"""Order of documents in which neighbours are alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize, pad
from tqdm.auto import tqdm

from splade_fast.ops.sparse_rows import SparseRows

_DIMS = 32  # of the points that stand for the rows
_MAX_COLS = 2**16  # further columns share the directions of the first ones
_SAMPLED_ROWS = 4096  # from which the directions are learned
_ROWS_AT_ONCE = 2**15  # bounds the memory that their entries need
_LEAF_ROWS = 8  # halving goes on while a part has more rows
_GROUP_ROWS = 256  # are scored together, in any order
_POWER_STEPS = 4


def order_by_similarity(rows: SparseRows, progress: tqdm | None = None) -> Tensor:
    """Return the numbers of all rows, (N,) int32, in an order in which neighbours are alike.

    Rows are projected to the directions in which a sample of them is largest, its first singular
    vectors. All rows are then halved along the direction in which they vary most, and the halves
    again, until the parts are small.

    Args:
        rows: (N, V).
        progress: bar that is advanced by the number of rows.
    """
    if len(rows) <= _GROUP_ROWS or rows.width == 0:
        if progress is not None:
            progress.update(len(rows))
        return torch.arange(len(rows), dtype=torch.int32)
    points = _project(rows, progress)
    levels = math.ceil(math.log2(len(rows) / _LEAF_ROWS))
    # All parts of a level have the same size. Points that fill them up are ordered last.
    points = pad(points, (0, 0, 0, -len(rows) % 2**levels))
    order = torch.arange(len(points))
    for level in range(levels):
        parts = points.view(2**level, -1, points.shape[1])
        keys = (parts @ _main_direction(parts)).view(-1)
        keys[order >= len(rows)] = math.inf
        sorted_places = keys.view(len(parts), -1).argsort(dim=1, stable=True)
        starts = torch.arange(0, len(points), parts.shape[1]).unsqueeze(1)
        places = (sorted_places + starts).view(-1)
        points, order = points[places], order[places]
    return order[order < len(rows)].int()  # NaN is ordered after the points that fill up


def _project(rows: SparseRows, progress: tqdm | None) -> Tensor:
    """Return a point for each row, (N, at most _DIMS)."""
    largest = rows.values.max()
    directions = _main_directions(rows, largest)
    points = torch.empty(len(rows), directions.shape[1])
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        points[start : start + len(part)] = embedding_bag(
            part.indices.remainder(len(directions)),  # unused slots have value 0
            directions,
            per_sample_weights=(part.values / largest).float(),
            mode="sum",
        )
        if progress is not None:
            progress.update(len(part))
    return points


def _main_directions(rows: SparseRows, largest: Tensor) -> Tensor:
    """Return about the first singular vectors of a sample of rows, (at most _MAX_COLS, dims)."""
    sample = rows[:: math.ceil(len(rows) / _SAMPLED_ROWS)]
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
