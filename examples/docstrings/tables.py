"""Tables of the quality of retrieval."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

_COLUMN_TITLES = {
    "query_active_dims": "query entries",
    "document_active_dims": "doc entries",
    "index_mib": "index, MiB",
}


def quality_table(title: str, results: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table with a row for each contender and a column for each metric.

    A cell is empty where a contender lacks the metric.

    Args:
        title: title of the table.
        results: {contender: {metric: value}}, as a `RetrievalEvaluator` returns the inner one.
    """
    columns = list(dict.fromkeys(column for metrics in results.values() for column in metrics))
    table = Table("", *(_COLUMN_TITLES.get(column, column) for column in columns), title=title)
    for column in table.columns[:4]:
        column.no_wrap = True
    for name, metrics in results.items():
        table.add_row(name, *(_format(metrics.get(column)) for column in columns))
    return table


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value <= 1 else f"{value:.1f}"
