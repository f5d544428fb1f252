"""Reading SparseRows for an export: some rows at a time, without padding, beside their ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from splade_fast.ops.sparse_rows import SparseRows

_ENTRIES_AT_ONCE = 2**18
_EMPTY = ("keep", "skip", "error")
DocumentId = str | int


@dataclass
class Documents:
    """Consecutive documents: `columns` and `values` hold the entries of one after the other."""

    ids: list[DocumentId]
    extras: list[Any]  # one for each document; None without any
    lengths: np.ndarray  # (documents,) int64
    columns: np.ndarray  # (entries,) int32
    values: np.ndarray  # (entries,) float32 or float64

    def __len__(self) -> int:
        return len(self.ids)

    def bounds(self) -> list[int]:
        """Where each document's entries start, and the total."""
        return [0, *np.cumsum(self.lengths).tolist()]


def check_arguments(
    rows: SparseRows,
    ids: Sequence[DocumentId] | None,
    empty: str,
    extras: Iterable[Any] | None = None,
    extras_name: str = "payloads",
) -> None:
    """What can be told before the first row is read.

    Raises:
        TypeError, ValueError: rows are none, ids or extras are not one a row, `empty` is unknown,
            or it is "error" and there is an empty row.
    """
    if not isinstance(rows, SparseRows):
        raise TypeError(f"rows must be SparseRows, got {type(rows).__name__}")
    for name, given in (("ids", ids), (extras_name, extras)):
        if isinstance(given, Sized) and len(given) != len(rows):
            raise ValueError(f"{name} must be one a row, {len(rows)}, got {len(given)}")
    if empty not in _EMPTY:
        raise ValueError(f"empty must be one of {', '.join(map(repr, _EMPTY))}, got {empty!r}")
    if empty == "error" and not bool(rows.lengths.all()):
        raise _empty_row(int((rows.lengths == 0).nonzero()[0]))


def documents(
    rows: SparseRows,
    ids: Sequence[DocumentId] | None,
    empty: str,
    *,
    extras: Iterable[Any] | None = None,
    extras_name: str = "payloads",
    scale: float | None = None,
    positive: bool = False,
    show_progress: bool = True,
    description: str | None = None,
) -> Iterator[Documents]:
    """All rows in order, as many at a time as have 2¹⁸ slots; memory does not grow with them.

    Args:
        rows: the vectors.
        ids: of the rows; their numbers as strings without.
        empty: "keep", "skip" or "error" for rows without entries.
        extras: one of anything for each row.
        extras_name: for messages.
        scale: multiply by it and round to the nearest integer (halves to even), and drop what
            is 0 then.
        positive: all values have to be above 0.
        show_progress: draw a progress bar.
        description: of the bar.

    Raises:
        ValueError: naming a row with an unfit value, or extras end early or late.
    """
    remaining = None if extras is None else iter(extras)
    at_once = max(1, _ENTRIES_AT_ONCE // max(rows.width, 1))
    with tqdm(total=len(rows), unit="doc", desc=description, disable=not show_progress) as bar:
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once].to("cpu")
            count = len(part)
            numbers = range(start, start + count)
            chunk = Documents(
                ids=[str(n) for n in numbers] if ids is None else list(ids[start : start + count]),
                extras=[None] * count if remaining is None else list(islice(remaining, count)),
                **_entries(part),
            )
            if len(chunk.extras) != count:
                got = start + len(chunk.extras)
                raise ValueError(f"{extras_name} must be one a row, {len(rows)}, got {got}")
            _check_values(chunk, start, positive)
            if scale is not None:
                _quantise(chunk, scale, start)
            if empty != "keep":
                _drop_empty(chunk, start, empty)
            yield chunk
            bar.update(count)
    if remaining is not None and list(islice(remaining, 1)):
        raise ValueError(f"{extras_name} must be one a row, {len(rows)}, got more")


def _entries(part: SparseRows) -> dict[str, np.ndarray]:
    used = part.indices >= 0
    values = part.values.detach()[used]
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()  # numpy has no bfloat16
    return {
        "lengths": part.lengths.long().numpy(),
        "columns": part.indices[used].numpy(),
        "values": values.numpy(),
    }


def _check_values(chunk: Documents, start: int, positive: bool) -> None:
    fits = np.isfinite(chunk.values)
    if positive:
        fits &= chunk.values > 0
    if not fits.all():
        entry = int(np.argmin(fits))
        row = start + int(np.searchsorted(np.cumsum(chunk.lengths), entry, side="right"))
        expected = "finite and above 0" if positive else "finite"
        raise ValueError(
            f"rows must have values that are {expected} for this format, "
            f"got {chunk.values[entry]} in row {row}"
        )


def _quantise(chunk: Documents, scale: float, start: int) -> None:
    rounded = np.rint(chunk.values.astype(np.float64) * scale)
    if rounded.size and rounded.max() > np.iinfo(np.int32).max:
        raise ValueError(
            f"scale must keep weights below 2**31, got {scale} for {chunk.values.max()}"
        )
    kept = rounded > 0
    owners = np.repeat(np.arange(len(chunk)), chunk.lengths)
    chunk.lengths = np.bincount(owners[kept], minlength=len(chunk))
    chunk.columns = chunk.columns[kept]
    chunk.values = rounded[kept].astype(np.int64)


def _empty_row(row: int) -> ValueError:
    return ValueError(f'rows must not be empty with empty="error", got an empty row {row}')


def _drop_empty(chunk: Documents, start: int, empty: str) -> None:
    kept = chunk.lengths > 0
    if kept.all():
        return
    if empty == "error":  # by rounding: the others were found before
        raise _empty_row(start + int(np.argmin(kept)))
    chunk.ids = [id_ for id_, keep in zip(chunk.ids, kept, strict=True) if keep]
    chunk.extras = [extra for extra, keep in zip(chunk.extras, kept, strict=True) if keep]
    chunk.lengths = chunk.lengths[kept]
