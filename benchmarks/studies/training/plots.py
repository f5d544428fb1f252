"""Plot of the study: the losses of both, on each other, and what a step costs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.harness.plots import COLOURS, save
from benchmarks.studies.training.facts import LOSS, PEAK, SECONDS, Fact
from examples.docstrings.training_cost import CONTENDERS

_COLOURS = {"splade_fast": COLOURS["ours"], "pytorch": COLOURS["eager"]}
_STYLES = {"splade_fast": "-", "pytorch": ":"}
_WIDTHS = {"splade_fast": 1.5, "pytorch": 3.0}


def draw(facts: Sequence[Fact], path: Path) -> None:
    losses = sorted({fact.loss for fact in facts}, reverse=True)
    figure = Figure(figsize=(12, 3.2 * len(losses)), layout="constrained")
    axes = figure.subplots(len(losses), 3, squeeze=False, width_ratios=(2, 1, 1))
    for row, loss in zip(axes, losses, strict=True):
        chosen = [fact for fact in facts if fact.loss == loss]
        for contender in CONTENDERS:
            curve = [
                (f.step, f.value)
                for f in chosen
                if f.contender == contender and f.quantity == LOSS and f.step
            ]
            row[0].plot(
                *zip(*curve, strict=True),
                _STYLES[contender],
                color=_COLOURS[contender],
                linewidth=_WIDTHS[contender],
                label=contender,
            )
            for axis, quantity in ((row[1], SECONDS), (row[2], PEAK)):
                value = next(
                    f.value for f in chosen if (f.contender, f.quantity) == (contender, quantity)
                )
                axis.bar([contender], [value], color=_COLOURS[contender])
        row[0].set(xlabel="step", ylabel="loss, nats", title=loss)
        row[0].legend()
        row[1].set(ylabel="seconds per step")
        row[2].set(ylabel="peak MiB above the model")
    figure.suptitle(f"training on {facts[0].cpu}, {facts[0].threads} threads", x=0.01, ha="left")
    save(figure, path.with_suffix(".svg"))
