"""How the demos show what a `RetrievalEvaluator` found."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

_SHOWN_AS = {
    "query_active_dims": "query entries",
    "document_active_dims": "doc entries",
    "index_mib": "index, MiB",
}


def quality_table(title: str, results: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each contender; what one of them has no figure of stays empty."""
    columns = list(dict.fromkeys(column for metrics in results.values() for column in metrics))
    table = Table("", *(_SHOWN_AS.get(column, column) for column in columns), title=title)
    for column in table.columns[:4]:
        column.no_wrap = True
    for name, metrics in results.items():
        table.add_row(name, *(_figure(metrics.get(column)) for column in columns))
    return table


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value <= 1 else f"{value:.1f}"
