"""Plot of results: a panel for each part and quantity, curves against a size or bars."""

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.harness.frames import groups_without_bounds, label_inputs

_COLOURS = {
    "ours": "#1b7837",
    "dense": "#7fbf7b",
    "eager": "#b2182b",
    "compile": "#ef8a62",
    "peer": "#762a83",
    "torch sparse": "#e08214",
    "seismic": "#2166ac",
    "floor": "#999999",
}
_OTHERS = ("#2166ac", "#e08214", "#d6604d", "#5aae61", "#9970ab", "#4d4d4d", "#bf812d", "#35978f")
_MIN_SIZES = 3  # of a curve


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Draw the quantities that have a unit, ratios and verdicts apart."""
    groups = groups_without_bounds(frame, ["study", "part", "quantity"])
    panels = [rows for _, rows in groups if rows.unit.iloc[0] not in ("", "times")]
    heights = [_height(rows) for rows in panels]
    figure = Figure(figsize=(10, sum(heights) + 1))
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    figure.subplots_adjust(hspace=1.2 * len(panels) / sum(heights))
    for axes, rows in zip(all_axes, panels, strict=True):
        first = rows.iloc[0]
        (_draw_curves if _has_curves(rows) else _draw_bars)(axes, rows)
        title = ", ".join(filter(None, (first.part, first.quantity)))
        axes.set_title(title, fontsize=9, loc="left")
        axes.grid(which="major", alpha=0.3)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    first = frame.iloc[0]
    all_axes[0].set_title(f"{first.study} on {first.gpu or first.cpu}", fontsize=9, loc="right")
    # The same plot is the same file: no date, and no names by chance.
    with matplotlib.rc_context({"svg.hashsalt": "splade_fast"}):
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def _has_curves(rows: pd.DataFrame) -> bool:
    curves = rows.groupby(["subject", "dtype", "contender"])["size"]
    return bool((curves.nunique() >= _MIN_SIZES).any())


def _height(rows: pd.DataFrame) -> float:
    bars = rows.groupby(["subject", "dtype", "size"], dropna=False).ngroups
    return 3.5 if _has_curves(rows) else 1 + 0.5 * bars


def _draw_curves(axes: Any, rows: pd.DataFrame) -> None:
    labels = rows.subject + " " + rows.dtype + " " + rows.contender
    table = rows.assign(label=labels).pivot_table(
        index="size", columns="label", values="value", sort=False
    )
    table.sort_index().plot(ax=axes, marker="o", markersize=3, loglog=True)
    axes.set(xlabel=rows.axis.iloc[0], ylabel=rows.unit.iloc[0])


def _draw_bars(axes: Any, rows: pd.DataFrame) -> None:
    labels = rows.subject + "\n" + rows.dtype + " " + label_inputs(rows)
    table = rows.assign(label=labels).pivot_table(
        index="label", columns="contender", values="value", sort=False
    )
    others = iter(_OTHERS * 2)
    colours = [_COLOURS.get(name) or next(others) for name in table.columns]
    table.plot.barh(ax=axes, logx=True, color=colours, fontsize=7, width=0.8)
    axes.invert_yaxis()
    axes.set(xlabel=rows.unit.iloc[0], ylabel="")
