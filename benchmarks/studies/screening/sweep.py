"""Time against the share of active entries, and where the dense product becomes the faster one.

The bias of all entries is shifted together until the share is as wanted. "auto" is asked on every
call, its worst case: left alone, it asks no more than once in 2**n calls after n declines in a row.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch

import splade_fast
from benchmarks.harness.timing import Contender, time_in_turns
from benchmarks.inputs.trained import TrainedInputs, bias_for_share, largest_logits
from benchmarks.studies.screening.facts import Finding
from benchmarks.studies.screening.kernel import screened
from splade_fast.ops.head.screening import find_screening_state

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
MAX_OVERHEAD = 5.0  # % of the dense product, where auto declines
ALGORITHMS = ("dense", "screened", "auto")


def study(
    inputs: TrainedInputs, dtype: torch.dtype, shares: Sequence[float], rounds: int, seconds: float
) -> list[Finding]:
    base = base_finding("sweep", inputs, dtype)
    found: list[Finding] = []
    ratios: list[tuple[float, float]] = []
    for shifted in with_shares(inputs, shares):
        point = measured(shifted.to(dtype), base, rounds, seconds)
        times = {f.variant: f.value for f in point if f.quantity == "median"}
        assert point[0].active is not None
        ratios.append((point[0].active, times["screened"] / times["dense"]))
        found += point
    crossover = crossing(ratios)
    if crossover is not None:
        found.append(
            dataclasses.replace(
                base, variant="screened", quantity="crossover", value=100 * crossover, unit="%"
            )
        )
    return found


def base_finding(study: str, inputs: TrainedInputs, dtype: torch.dtype) -> Finding:
    """To be filled in."""
    return Finding(
        study=study,
        model=inputs.model,
        dim=inputs.dim,
        dtype=str(dtype).removeprefix("torch."),
        variant="",
        quantity="",
        value=0.0,
        unit="",
    )


def with_shares(inputs: TrainedInputs, shares: Sequence[float]) -> Iterator[TrainedInputs]:
    """With another bias for each share of active entries."""
    pooled = largest_logits(inputs.hidden, inputs.mask, inputs.weight) + inputs.bias
    for share in shares:
        yield dataclasses.replace(inputs, bias=inputs.bias + bias_for_share(pooled, share))


def measured(inputs: TrainedInputs, base: Finding, rounds: int, seconds: float) -> list[Finding]:
    """Median times, what survives, and whether auto declines: then, at which cost.

    Raises:
        AssertionError: screened and dense differ.
    """
    report = screened(inputs)
    head = partial(splade_fast.splade_head, inputs.hidden, inputs.weight, inputs.bias, inputs.mask)
    if not torch.equal(report.pooled, head(algorithm="dense")):
        raise AssertionError(f"screened differs from dense: {inputs.model} {inputs.weight.dtype}")
    state = find_screening_state(inputs.weight, inputs.weight.dtype)
    contenders = {
        # Forget the trials of earlier calls, so that auto tries again.
        name: Contender(partial(head, algorithm=name), partial(state.record_trial, False))
        for name in ALGORITHMS
    }
    samples = time_in_turns(contenders, rounds=rounds, seconds=seconds, device="cpu")
    times = {name: statistics.median(values) for name, values in samples.items()}
    state.record_trial(False)
    head(algorithm="auto")
    declined = not state.should_try()

    active = (report.pooled > 0).float().mean().item()
    finding = partial(dataclasses.replace, base, active=active)
    all_pairs = len(inputs.tokens) * len(inputs.weight)
    found = [
        finding(variant=name, quantity="median", value=times[name], unit="ms")
        for name in ALGORITHMS
    ]
    for quantity, pairs in (("compared pairs", report.compared), ("surviving pairs", report.pairs)):
        value = 100 * pairs / all_pairs
        found.append(finding(variant="screened", quantity=quantity, value=value, unit="%"))
    found.append(finding(variant="auto", quantity="declines", value=float(declined), unit=""))
    if declined:
        found.append(
            finding(
                variant="auto",
                quantity="overhead over dense",
                value=100 * (times["auto"] / times["dense"] - 1),
                unit="%",
                at_most=MAX_OVERHEAD,
            )
        )
    return found


def crossing(ratios: Sequence[tuple[float, float]]) -> float | None:
    """Where times over those of dense first reach 1, on straight lines in logarithms."""
    for (before, lower), (after, upper) in pairwise(ratios):
        if lower < 1 <= upper:
            part = math.log(1 / lower) / math.log(upper / lower)
            return float(before * (after / before) ** part)
    return None
