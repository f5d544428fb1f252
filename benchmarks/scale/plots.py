"""Plot of the studies: time above and memory below, against size, with the fitted power laws."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plots import save
from benchmarks.scale.findings import EXTRA_MEMORY, TIME, Fact
from benchmarks.scale.power_law import MIN_SIZES, curves, law_of, positive

_COLOURS = ("#1b7837", "#b2182b", "#2166ac", "#e08214", "#762a83", "#999999")


def draw(facts: Sequence[Fact], path: Path) -> None:
    studies = list(dict.fromkeys(fact.study for fact in facts))
    figure = Figure(figsize=(4.5 * len(studies), 8), layout="constrained")
    axes = figure.subplots(2, len(studies), squeeze=False)
    for study, (times, memory) in zip(studies, axes.T, strict=True):
        chosen = [fact for fact in facts if fact.study == study]
        _panel(times, chosen, (TIME,), "ms")
        others = {f.quantity for f in chosen if f.unit == "MiB"} - {EXTRA_MEMORY}
        _panel(memory, chosen, (EXTRA_MEMORY, *sorted(others)), "MiB")
        times.set_title(study)
        memory.set_xlabel(chosen[0].axis)
    axes[0, 0].set_ylabel("median time, ms")
    axes[1, 0].set_ylabel("memory, MiB")
    title = f"growth with size on {facts[0].cpu}, {facts[0].threads} threads; exponents fitted"
    figure.suptitle(title, x=0.01, ha="left")
    save(figure, path)


def _panel(axes: Axes, facts: Sequence[Fact], quantities: Sequence[str], unit: str) -> None:
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
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=6)
