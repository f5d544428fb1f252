"""Gain of the ops in training: the same trainer with the ops and with plain PyTorch.

The demo's checkpoint is trained on real docstrings, each contender in a process of its own, with
the negative cache (sparse for splade_fast, dense for pytorch) and with in-batch negatives alone.
"""

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from transformers import AutoTokenizer

from benchmarks.harness.results import Measurement
from benchmarks.harness.timing import Rounds
from benchmarks.inputs.trained_states import fetched
from examples.docstrings.checkpoint import DEMO
from examples.docstrings.corpus import docstring_pairs
from examples.docstrings.training import split_pairs
from examples.docstrings.training_cost import (
    CONTENDERS,
    Setting,
    StepCost,
    batch_within,
    long_pairs,
    loss_difference,
    step_cost,
)

LOSSES = ("negative_cache", "in_batch")
STEPS = 20
LEAST_SPEED_UP, LEAST_SAVING = 3.0, 4.0
_MEMORY_MIB = 4096  # of the largest batch


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    """Return a measurement for each loss; their rounds are the steps of a training."""
    return {loss: partial(_measure, loss) for loss in LOSSES}


def _measure(loss: str) -> list[Measurement]:
    model = str(fetched(DEMO))
    pairs = split_pairs(docstring_pairs()).training
    pairs = long_pairs(pairs, AutoTokenizer.from_pretrained(model))
    costs, batches = {}, {}
    for contender in CONTENDERS:
        setting = Setting(contender, loss, steps=STEPS, threads=torch.get_num_threads())
        costs[contender] = step_cost(setting, model, pairs)
        batches[contender] = batch_within(_MEMORY_MIB, setting, costs[contender], model, pairs)
    return to_measurements(loss, costs, batches, _MEMORY_MIB)


def to_measurements(
    loss: str, costs: Mapping[str, StepCost], batches: Mapping[str, int], limit_mib: float
) -> list[Measurement]:
    """Return the measurements of one loss.

    Args:
        loss: loss of the trainings.
        costs: costs by contender, "splade_fast" and "pytorch".
        batches: the largest batch within limit_mib, by contender.
        limit_mib: memory in MiB.
    """
    measurement = partial(Measurement, study="training", part=loss)
    found = []
    for contender, cost in costs.items():
        p25, _, p75 = statistics.quantiles(cost.seconds, n=4)
        own = partial(measurement, contender=contender)
        found += [
            own(
                quantity="time per step",
                value=cost.median_seconds,
                unit="s",
                rounds=len(cost.seconds),
                p25=p25,
                p75=p75,
            ),
            own(quantity="peak memory", value=cost.peak_mib, unit="MiB"),
            own(
                quantity=f"largest batch in {limit_mib / 1024:g} GiB",
                value=batches[contender],
                unit="pairs",
            ),
        ]
        found += [
            own(axis="step", size=step, quantity="loss", value=value, unit="nats")
            for step, value in enumerate(cost.losses, start=1)
        ]
    ours, plain = costs["splade_fast"], costs["pytorch"]
    of_ours = partial(measurement, contender="splade_fast")
    return [
        *found,
        of_ours(
            quantity="times faster",
            value=plain.median_seconds / ours.median_seconds,
            unit="times",
            at_least=LEAST_SPEED_UP,
        ),
        of_ours(
            quantity="times smaller",
            value=plain.peak_mib / ours.peak_mib,
            unit="times",
            at_least=LEAST_SAVING,
        ),
        of_ours(quantity="largest difference of a loss", value=loss_difference(costs), unit="nats"),
    ]
