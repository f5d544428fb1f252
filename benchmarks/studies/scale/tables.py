"""Tables of the studies in Markdown: a row for each size, a column for each quantity."""

from collections.abc import Sequence

from benchmarks.harness.tables import markdown_table
from benchmarks.studies.scale.findings import Fact


def study_tables(facts: Sequence[Fact]) -> dict[str, str]:
    """By study."""
    studies = dict.fromkeys(fact.study for fact in facts)
    return {name: _table([fact for fact in facts if fact.study == name]) for name in studies}


def _table(facts: Sequence[Fact]) -> str:
    columns = {fact.quantity: fact.unit for fact in facts}
    found = {(fact.variant, fact.size, fact.quantity): fact.value for fact in facts}
    lines = [
        (
            variant,
            f"{size:,}",
            *(_number(found.get((variant, size, quantity))) for quantity in columns),
        )
        for variant, size in dict.fromkeys((fact.variant, fact.size) for fact in facts)
    ]
    header = ("variant", facts[0].axis, *(f"{name}, {unit}" for name, unit in columns.items()))
    return markdown_table(header, lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
