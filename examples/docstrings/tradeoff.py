"""Quality and size of an index as functions of the number of entries kept of each document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from splade_fast.ops.sparse_rows import SparseRows

KEPT = (16, 32, 64, 128, 256, None)

_BLOCK = 256  # number of documents that are made dense at a time


@dataclass
class TradeOff:
    """Size and quality of an index with at most `kept` entries a document; None keeps all."""

    kept: int | None
    mib: float
    mrr: float

    @property
    def label(self) -> str:
        return "all" if self.kept is None else str(self.kept)


def prune(rows: SparseRows, k: int | None) -> SparseRows:
    """Return the k largest entries of each row; None keeps all."""
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)] or [rows]
    return SparseRows.cat([SparseRows.from_dense(block.to_dense(), k) for block in blocks])


def trade_offs(documents: SparseRows, measure_mrr: Callable[[SparseRows], float]) -> list[TradeOff]:
    """Return the trade-off at every number of entries in KEPT.

    Args:
        documents: the unpruned vectors.
        measure_mrr: returns the MRR@10 of a search in the given documents.
    """
    found = []
    for kept in KEPT:
        rows = prune(documents, kept)
        found.append(TradeOff(kept, rows.nbytes / 2**20, measure_mrr(rows)))
    return found


def plot(found: list[TradeOff], path: Path) -> None:
    """Plot MRR@10 over index size to a file; the suffix of path sets the format."""
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
