"""Plot of the studies, one below the other: time and memory against size, with power laws."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.harness.plots import save
from benchmarks.studies.scale.findings import EXTRA_MEMORY, TIME, Fact
from benchmarks.studies.scale.power_law import MIN_SIZES, curves, law_of, positive

_COLOURS = ("#1b7837", "#b2182b", "#2166ac", "#e08214", "#762a83", "#999999")


def draw(facts: Sequence[Fact], path: Path) -> None:
    studies = list(dict.fromkeys(fact.study for fact in facts))
    figure = Figure(figsize=(14, 1 + 3.5 * len(studies)), layout="constrained")
    axes = figure.subplots(len(studies), 2, squeeze=False)
    for study, (times, memory) in zip(studies, axes, strict=True):
        chosen = [fact for fact in facts if fact.study == study]
        _panel(times, chosen, (TIME,))
        others = {f.quantity for f in chosen if f.unit == "MiB"} - {EXTRA_MEMORY}
        _panel(memory, chosen, (EXTRA_MEMORY, *sorted(others)))
        times.set_ylabel(f"{study}: median time, ms")
        memory.set_ylabel("memory, MiB")
        for panel in (times, memory):
            panel.set_xlabel(chosen[0].axis)
    title = f"growth with size on {facts[0].cpu}, {facts[0].threads} threads; exponents fitted"
    figure.suptitle(title, x=0.01, ha="left")
    save(figure, path)


def _panel(axes: Axes, facts: Sequence[Fact], quantities: Sequence[str]) -> None:
    found = curves([fact for fact in facts if fact.quantity in quantities])
    variants = list(dict.fromkeys(variant for _, variant, _ in found))
    for (_, variant, quantity), points in found.items():
        colour = _COLOURS[variants.index(variant) % len(_COLOURS)]
        marker = "o^s"[quantities.index(quantity) % 3]
        sizes, values = [p.size for p in points], [positive(p) for p in points]
        label = variant if len(quantities) == 1 else f"{variant}: {quantity}"
        if len(points) >= MIN_SIZES:
            law = law_of(points)
            axes.plot(sizes, [law.at(size) for size in sizes], ":", color=colour, linewidth=1)
            label += f" ({law.exponent:.2f} ± {law.standard_error:.2f})"
        axes.plot(sizes, values, marker, color=colour, markersize=4, label=label)
    sizes = sorted({fact.size for fact in facts})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
