"""Tables: of one case, from its rows, and any in Markdown."""

from collections.abc import Sequence

from benchmarks.harness.results import Row

HEADER = ("contender", "median ms", "quartiles", "x ours", "floor share", "extra MiB")


def format_case(rows: Sequence[Row]) -> str:
    first = rows[0]
    outcome = "correct" if first.correct else "WRONG, not timed"
    lines = [
        " | ".join(first.case),
        f"  {outcome}: error {first.error:.2e}, tolerance {first.tolerance:.2e}",
        _line(HEADER),
    ]
    lines += [_line(_cells(row)) for row in rows if row.median_ms is not None]
    lines += [
        f"  target {verdict}" for row in rows for verdict in row.verdict.split("; ") if verdict
    ]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row.contender} ({row.detail})" if row.detail else row.contender,
        _number(row.median_ms, ".3f"),
        f"{_number(row.p25_ms, '.3f')}..{_number(row.p75_ms, '.3f')}",
        _number(row.times_ours, ".2f"),
        _number(row.share_of_floor, ".0%"),
        _number(row.peak_extra_mib, ".1f"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    name, *numbers = cells
    return f"  {name:<34}" + "".join(f"{number:>20}" for number in numbers)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
