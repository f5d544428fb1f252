"""Plots of the studies, each beside the CSV: survivors, the sweep, and the stages of encoding."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.plots import COLOURS, save
from benchmarks.studies.screening.emulation import REMEDIES
from benchmarks.studies.screening.encode import ALGORITHMS as PROFILED
from benchmarks.studies.screening.encode import STAGES
from benchmarks.studies.screening.facts import Fact
from benchmarks.studies.screening.sweep import ALGORITHMS

_LINES = {"dense": COLOURS["dense"], "screened": COLOURS["ours"], "auto": "black"}
_STYLES = {"dense": "-", "screened": "-", "auto": ":"}
_PAIRS = {"compared pairs": COLOURS["torch sparse"], "surviving pairs": COLOURS["eager"]}
_STAGE_COLOURS = ("#999999", "#2166ac", COLOURS["ours"], COLOURS["torch sparse"])


def draw(facts: Sequence[Fact], path: Path) -> None:
    drawings: dict[str, Callable[[Sequence[Fact]], Figure]] = {
        "survivors": _survivors,
        "sweep": _sweep,
        "encode": _encode,
    }
    for study, drawing in drawings.items():
        chosen = [fact for fact in facts if fact.study == study]
        if chosen:
            figure = drawing(chosen)
            figure.suptitle(f"screened head, {study}, on {chosen[0].cpu}", x=0.01, ha="left")
            name = path.name.replace("screening", f"screening-{study}", 1)
            save(figure, path.with_name(name).with_suffix(".svg"))


def _survivors(facts: Sequence[Fact]) -> Figure:
    panels = (
        ("mean bound", "mean bound of a logit", REMEDIES),
        ("candidate entries per document", "candidate entries per document", REMEDIES),
        (
            "surviving pairs per document",
            "pairs of token and entry per document",
            (*REMEDIES, "kernel"),
        ),
    )
    models = sorted({(fact.dim, fact.model) for fact in facts})
    figure = Figure(figsize=(14, 2 + 1.6 * len(models)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    height = 0.8 / (len(REMEDIES) + 1)
    for panel, (quantity, title, variants) in zip(axes, panels, strict=True):
        for offset, variant in enumerate(variants):
            places = [place + (offset - len(REMEDIES) / 2) * height for place in range(len(models))]
            values = [
                _only(facts, variant=variant, quantity=quantity, model=model) for _, model in models
            ]
            bars = panel.barh(places, values, height=height, label=variant)
            panel.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        panel.set_xscale("log")
        panel.margins(x=0.15)
        panel.set_xlabel(title)
    axes[0].set_yticks(
        range(len(models)), [f"D = {dim}\n{model}" for dim, model in models], fontsize=8
    )
    axes[0].invert_yaxis()
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside upper right", ncols=6)
    return figure


def _only(facts: Sequence[Fact], **wanted: str) -> float:
    found = [
        fact.value
        for fact in facts
        if all(getattr(fact, name) == value for name, value in wanted.items())
    ]
    (value,) = found
    return value


def _sweep(facts: Sequence[Fact]) -> Figure:
    """A column for each model and dtype: times above, what survives below."""
    groups = sorted({(fact.dtype != "float32", fact.dim, fact.dtype, fact.model) for fact in facts})
    columns = len({dim for _, dim, _, _ in groups})
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(5 * columns, 6 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, sharex=True)
    for place, (_, dim, dtype, model) in enumerate(groups):
        row, column = divmod(place, columns)
        chosen = [fact for fact in facts if (fact.dtype, fact.model) == (dtype, model)]
        times, pairs = axes[2 * row, column], axes[2 * row + 1, column]
        for name in ALGORITHMS:
            _line(times, chosen, name, "median", _LINES[name], _STYLES[name], name)
        for quantity, colour in _PAIRS.items():
            _line(pairs, chosen, "screened", quantity, colour, "-", quantity)
        for crossover in (fact.value for fact in chosen if fact.quantity == "crossover"):
            times.axvline(crossover, color="#999999", linestyle="--")
            times.annotate(
                f" {crossover:.1f} %", (crossover, 0.02), xycoords=("data", "axes fraction")
            )
        times.set_title(f"D = {dim}, {dtype}: {model}", fontsize=9)
        times.set_ylabel("median time, ms")
        pairs.set_ylabel("% of all pairs")
        pairs.set_xlabel("active entries, %")
        times.legend(fontsize=8)
        pairs.legend(fontsize=8)
    return figure


def _line(
    axes: Axes,
    facts: Sequence[Fact],
    variant: str,
    quantity: str,
    colour: str,
    style: str,
    label: str,
) -> None:
    points = sorted(
        (100 * fact.active, fact.value)
        for fact in facts
        if (fact.variant, fact.quantity) == (variant, quantity) and fact.active is not None
    )
    axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker=".", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(which="major", alpha=0.3)


def _encode(facts: Sequence[Fact]) -> Figure:
    figure = Figure(figsize=(10, 2.5), layout="constrained")
    axes = figure.subplots()
    for row, variant in enumerate(PROFILED):
        left = 0.0
        for stage, colour in zip(STAGES, _STAGE_COLOURS, strict=True):
            width = _only(facts, variant=variant, quantity=stage)
            label = stage if row == 0 else None
            bar = axes.barh([row], [width], left=left, color=colour, label=label)
            axes.bar_label(bar, [f"{width:.1f}"], label_type="center", color="white", fontsize=8)
            left += width
    axes.set_yticks(range(len(PROFILED)), list(PROFILED))
    axes.invert_yaxis()
    axes.set_xlabel(f"median time of {facts[0].model}, ms")
    figure.legend(loc="outside upper right", ncols=len(STAGES))
    return figure
