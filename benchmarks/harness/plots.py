"""Plots of results: times and peak memory of every contender, case by case."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.results import Row, by_case

COLOURS = {
    "ours": "#1b7837",
    "dense": "#7fbf7b",
    "eager": "#b2182b",
    "compile": "#ef8a62",
    "peer": "#762a83",
    "torch sparse": "#e08214",
    "seismic": "#2166ac",
    "floor": "#999999",
}
GROUP = 0.8  # of the space between two cases


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
    figure.legend(*times.get_legend_handles_labels(), loc="outside upper right", ncols=len(COLOURS))
    figure.suptitle(f"{rows[0].op} on {rows[0].gpu or rows[0].cpu}", x=0.01, ha="left")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """The same plot is the same file: no date, and no names by chance."""
    with matplotlib.rc_context({"svg.hashsalt": "splade_fast"}):
        figure.savefig(path, metadata={"Date": None})


def _label(case: tuple[str, ...]) -> str:
    _, shape, fill, active, dtype, _, direction = case
    return f"{shape} {dtype}\n{direction}, {active}, {fill}"


def _bars(axes: Axes, groups: dict[tuple[str, ...], list[Row]], quantity: str) -> None:
    present = {row.contender for rows in groups.values() for row in rows}
    colours = {name: colour for name, colour in COLOURS.items() if name in present}
    height = GROUP / max(1, len(colours))
    for offset, (contender, colour) in enumerate(colours.items()):
        points = [
            (position + (offset - (len(colours) - 1) / 2) * height, getattr(row, quantity))
            for position, rows in enumerate(groups.values())
            for row in rows
            if row.contender == contender and getattr(row, quantity) is not None
        ]
        if points:
            positions, values = zip(*points, strict=True)
            axes.barh(positions, values, height=height, color=colour, label=contender)
    axes.set_xscale("log")
    axes.grid(axis="x", which="major", alpha=0.3)
