"""Quality and size of an index against the number of entries kept of each document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from splade_fast.ops.sparse_rows import SparseRows

KEPT = (16, 32, 64, 128, 256, None)

_BLOCK = 256  # documents that are dense at a time


@dataclass
class TradeOff:
    """An index with at most `kept` entries a document (None: all), its size and its quality."""

    kept: int | None
    mib: float
    mrr: float

    @property
    def label(self) -> str:
        return "all" if self.kept is None else str(self.kept)


def pruned(rows: SparseRows, k: int | None) -> SparseRows:
    """The k largest entries of each row."""
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)] or [rows]
    return SparseRows.cat([SparseRows.from_dense(block.to_dense(), k) for block in blocks])


def trade_offs(documents: SparseRows, mrr_of: Callable[[SparseRows], float]) -> list[TradeOff]:
    """One for every number in KEPT.

    Args:
        documents: the unpruned vectors.
        mrr_of: MRR@10 of searching in such documents.
    """
    found = []
    for kept in KEPT:
        rows = pruned(documents, kept)
        found.append(TradeOff(kept, rows.nbytes / 2**20, mrr_of(rows)))
    return found


def plot(found: list[TradeOff], path: Path) -> None:
    """MRR@10 over index size, as a picture in the format of the path's suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([point.mib for point in found], [point.mrr for point in found], marker="o")
    for point in found:
        axes.annotate(
            f"k = {point.label}",
            (point.mib, point.mrr),
            xytext=(4, -12),
            textcoords="offset points",
        )
    axes.set(xscale="log", xlabel="index size, MiB", ylabel="MRR@10")
    axes.grid(visible=True, which="both", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
