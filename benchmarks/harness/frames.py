"""Data frames of rows, for tables and plots."""

from collections.abc import Iterator

import pandas as pd


def groups_without_bounds(
    frame: pd.DataFrame, names: list[str]
) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """Yield the groups in which some row has no bound: others are verdicts alone."""
    for key, rows in frame.groupby(names, sort=False):
        if rows[["at_most", "at_least"]].isna().all(axis=1).any():
            yield key, rows


def label_inputs(rows: pd.DataFrame) -> list[str]:
    """Return axis and size of each row, e.g. "documents 1,000"."""
    return [
        f"{axis} {size:,g}" if axis else ""
        for axis, size in zip(rows.axis, rows["size"], strict=True)
    ]
