"""Plots of results: times and peak memory of every contender, case by case."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results import Row, by_case

COLOURS = {
    "ours": "#1b7837",
    "eager": "#b2182b",
    "compile": "#ef8a62",
    "peer": "#762a83",
    "floor": "#999999",
}
BAR = 0.16


def draw(rows: Sequence[Row], path: Path) -> None:
    groups = by_case([row for row in rows if row.median_ms is not None])
    figure = Figure(figsize=(14, 1.5 + 0.85 * len(groups)), layout="constrained")
    times, memory = figure.subplots(1, 2, sharey=True)
    _bars(times, groups, "median_ms")
    _bars(memory, groups, "peak_extra_mib")
    times.set_xlabel("median time, ms")
    memory.set_xlabel("peak extra memory, MiB")
    times.set_yticks(range(len(groups)), [_label(case) for case in groups], fontsize=8)
    times.invert_yaxis()
    figure.legend(*times.get_legend_handles_labels(), loc="outside upper right", ncols=5)
    figure.suptitle(f"{rows[0].op} on {rows[0].gpu or rows[0].cpu}", x=0.01, ha="left")
    figure.savefig(path)


def _label(case: tuple[str, ...]) -> str:
    _, shape, fill, active, dtype, _, direction = case
    return f"{shape} {dtype}\n{direction}, {active}, {fill}"


def _bars(axes: Axes, groups: dict[tuple[str, ...], list[Row]], quantity: str) -> None:
    for offset, (contender, colour) in enumerate(COLOURS.items()):
        points = [
            (position + (offset - 2) * BAR, getattr(row, quantity))
            for position, rows in enumerate(groups.values())
            for row in rows
            if row.contender == contender and getattr(row, quantity) is not None
        ]
        if points:
            positions, values = zip(*points, strict=True)
            axes.barh(positions, values, height=BAR, color=colour, label=contender)
    axes.set_xscale("log")
    axes.grid(axis="x", which="major", alpha=0.3)
