"""Iteration over SparseRows for an export: some rows at a time, without padding, with their ids."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from splade_fast.export._ids import DocumentId, plain_ids
from splade_fast.ops.sparse_rows import SparseRows

_ENTRIES_AT_ONCE = 2**18
_EMPTY = ("keep", "skip", "error")
_FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True)
class WeightRange:
    """Finite weights that a format holds, of which a store would lose or refuse others.

    Args:
        description: words for a message.
        above: number that all weights exceed.
        most: largest absolute value.
    """

    description: str
    above: float = -math.inf
    most: float = math.inf

    def holds(self, values: np.ndarray) -> np.ndarray:
        """Return whether the range holds each value."""
        held_mask: np.ndarray = np.isfinite(values)
        held_mask &= values > self.above
        held_mask &= np.abs(values) <= self.most
        return held_mask


FINITE = WeightRange("finite")
POSITIVE = WeightRange("finite and above 0", above=0.0)
FLOAT32 = WeightRange("finite as float32 numbers (up to 3.4e+38)", most=float(_FLOAT32.max))
# Lucene refuses features that are no normal numbers.
POSITIVE_NORMAL_FLOAT32 = WeightRange(
    "finite and above 0 as normal float32 numbers (1.2e-38 to 3.4e+38)",
    above=float(np.nextafter(_FLOAT32.tiny, np.float32(0))),
    most=float(_FLOAT32.max),
)
LUCENE_QUERY = WeightRange(
    "above 0 and at most 64 in a query, as normal float32 numbers,",
    above=POSITIVE_NORMAL_FLOAT32.above,
    most=64.0,
)
POSITIVE_FLOAT16 = WeightRange(
    "finite and above 0 as float16 numbers (up to 65504)",
    above=0.0,
    most=float(np.finfo(np.float16).max),
)


@dataclass
class Documents:
    """Consecutive documents, whose entries are concatenated.

    Args:
        rows: row numbers of the documents.
        ids: ids of the documents.
        extras: a value for each document, such as its text; None for each if there are none.
        lengths: (documents,) int64, number of entries of each document.
        columns: (entries,) int32.
        values: (entries,) float32 or float64, or int64 once quantised.
    """

    rows: list[int]
    ids: list[DocumentId]
    extras: list[Any]
    lengths: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def bounds(self) -> list[int]:
        """Return the position of each document's first entry, and the number of entries."""
        return [0, *np.cumsum(self.lengths).tolist()]


def check_arguments(
    rows: SparseRows,
    ids: Iterable[DocumentId] | None,
    empty: str,
    extras: Iterable[Any] | None = None,
    extras_name: str = "payloads",
    **id_rules: Any,
) -> list[DocumentId] | None:
    """Check the arguments of an export before a row is read, and return its ids.

    Args:
        rows, ids, empty, extras, extras_name: see `iterate_documents`.
        id_rules: the arguments of `plain_ids`.

    Raises:
        TypeError: rows are not SparseRows, an id is neither a string nor an integer, or the extras
            are one string or mapping.
        ValueError: the format cannot hold an id, there is not one id or extra for each row, `empty`
            is unknown, or `empty` is "error" and a row has no entries.
    """
    if not isinstance(rows, SparseRows):
        raise TypeError(f"rows must be SparseRows, got {type(rows).__name__}")
    if isinstance(extras, str | bytes | Mapping):
        raise TypeError(f"{extras_name} must be a list, one per row, got {type(extras).__name__}")
    if isinstance(extras, Sized) and len(extras) != len(rows):
        raise ValueError(f"{extras_name} must be one per row, {len(rows)}, got {len(extras)}")
    if empty not in _EMPTY:
        raise ValueError(f"empty must be one of {', '.join(map(repr, _EMPTY))}, got {empty!r}")
    if empty == "error" and not bool(rows.lengths.all()):
        raise _empty_row_error(int((rows.lengths == 0).nonzero()[0]))
    return None if ids is None else plain_ids(ids, len(rows), **id_rules)


def iterate_documents(
    rows: SparseRows,
    ids: Sequence[DocumentId] | None,
    empty: str,
    *,
    extras: Iterable[Any] | None = None,
    extras_name: str = "payloads",
    scale: float | None = None,
    weights: WeightRange = FINITE,
    show_progress: bool = True,
    description: str | None = None,
) -> Iterator[Documents]:
    """Yield all rows in order, as many at a time as have about 2¹⁸ slots.

    Args:
        rows: (N, V).
        ids: N ids; the row numbers as strings by default.
        empty: "keep", "skip" or "error" for rows without entries.
        extras: a value for each row.
        extras_name: name of the extras in messages.
        scale: factor by which values are multiplied before they are rounded to the nearest
            integer, halves to even; entries that become 0 are dropped. None leaves values as they
            are.
        weights: values that the format holds.
        show_progress: draw a progress bar.
        description: text before the progress bar.

    Raises:
        ValueError: a value is invalid, or there is not one extra for each row.
    """
    remaining = None if extras is None else iter(extras)
    at_once = max(1, _ENTRIES_AT_ONCE // max(rows.width, 1))
    with tqdm(total=len(rows), unit="doc", desc=description, disable=not show_progress) as bar:
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once].to("cpu")
            count = len(part)
            numbers = range(start, start + count)
            chunk = Documents(
                rows=list(numbers),
                ids=[str(n) for n in numbers] if ids is None else list(ids[start : start + count]),
                extras=[None] * count if remaining is None else list(islice(remaining, count)),
                **_entries(part),
            )
            if len(chunk.extras) != count:
                got = start + len(chunk.extras)
                raise ValueError(f"{extras_name} must be one per row, {len(rows)}, got {got}")
            _check_values(chunk, start, weights)
            if scale is not None:
                _quantise(chunk, scale, start)
            if empty != "keep":
                _drop_empty(chunk, start, empty)
            yield chunk
            bar.update(count)
    if remaining is not None and list(islice(remaining, 1)):
        raise ValueError(f"{extras_name} must be one per row, {len(rows)}, got more")


def _entries(part: SparseRows) -> dict[str, np.ndarray]:
    entry_mask = part.indices >= 0
    values = part.values.detach()[entry_mask]
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()  # numpy has no bfloat16
    return {
        "lengths": part.lengths.long().numpy(),
        "columns": part.indices[entry_mask].numpy(),
        "values": values.numpy(),
    }


def _check_values(chunk: Documents, start: int, weights: WeightRange) -> None:
    valid_mask = weights.holds(chunk.values)
    if not valid_mask.all():
        entry = int(np.argmin(valid_mask))
        row = start + int(np.searchsorted(np.cumsum(chunk.lengths), entry, side="right"))
        raise ValueError(
            f"rows must have values that are {weights.description} for this format, "
            f"got {chunk.values[entry]} in row {row}"
        )


def _quantise(chunk: Documents, scale: float, start: int) -> None:
    rounded = np.rint(chunk.values.astype(np.float64) * scale)
    rows = np.repeat(np.arange(len(chunk)), chunk.lengths)
    sums = np.bincount(rows, rounded, minlength=len(chunk))
    if sums.size and sums.max() > np.iinfo(np.int32).max:
        raise ValueError(
            f"scale must keep the sum of a document's impacts below 2**31, got {scale} "
            f"for {sums.max():.9g} in row {start + int(sums.argmax())}"
        )
    kept_mask = rounded > 0
    chunk.lengths = np.bincount(rows[kept_mask], minlength=len(chunk))
    chunk.columns = chunk.columns[kept_mask]
    chunk.values = rounded[kept_mask].astype(np.int64)


def _empty_row_error(row: int) -> ValueError:
    return ValueError(f'rows must not be empty with empty="error", got an empty row {row}')


def _drop_empty(chunk: Documents, start: int, empty: str) -> None:
    kept_mask = chunk.lengths > 0
    if kept_mask.all():
        return
    if empty == "error":  # emptied by rounding; check_arguments has found all others
        raise _empty_row_error(start + int(np.argmin(kept_mask)))
    chunk.rows = list(compress(chunk.rows, kept_mask))
    chunk.ids = list(compress(chunk.ids, kept_mask))
    chunk.extras = list(compress(chunk.extras, kept_mask))
    chunk.lengths = chunk.lengths[kept_mask]
