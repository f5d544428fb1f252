"""Tables of measurements: plain ones for the terminal, and Markdown."""

from collections.abc import Sequence

from benchmarks.harness.results import Measurement


def format_measurements(measurements: Sequence[Measurement]) -> str:
    return "\n".join(_line(measurement) for measurement in measurements)


def _line(measurement: Measurement) -> str:
    m = measurement
    size = "" if m.size is None else f"{m.axis} {m.size:,g}"
    quartiles = "" if m.p25 is None or m.p75 is None else f"({m.p25:.4g}..{m.p75:.4g})"
    return (
        f"  {m.subject:<36} {size:<18} {m.contender:<14} {m.quantity:<26} "
        f"{m.value:>10.4g} {m.unit:<6} {quartiles:<20} {m.verdict or m.note}"
    ).rstrip()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
