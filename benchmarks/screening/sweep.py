"""Time against the share of active entries, and where the dense product becomes the faster one.

The bias of all entries is shifted together until the share is as wanted. "auto" is asked on every
call, its worst case: left alone, it asks no more than once in 2**n calls after n declines in a row.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch

import splade_fast
from benchmarks.screening.facts import Finding
from benchmarks.screening.kernel import screened
from benchmarks.timing import Contender, time_in_turns
from benchmarks.trained import TrainedInputs, bias_for_share, largest_logits
from splade_fast.ops._screening import decoder_of

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
MAX_OVERHEAD = 5.0  # % of the dense product, where auto declines
ALGORITHMS = ("dense", "screened", "auto")


def study(
    inputs: TrainedInputs, dtype: torch.dtype, shares: Sequence[float], rounds: int, seconds: float
) -> list[Finding]:
    pooled = largest_logits(inputs.hidden, inputs.mask, inputs.weight) + inputs.bias
    base = Finding(
        study="sweep",
        model=inputs.model,
        dim=inputs.dim,
        dtype=str(dtype).removeprefix("torch."),
        variant="",
        quantity="",
        value=0.0,
        unit="",
    )
    found: list[Finding] = []
    ratios: list[tuple[float, float]] = []
    for share in shares:
        bias = inputs.bias + bias_for_share(pooled, share)
        shifted = dataclasses.replace(inputs, bias=bias).to(dtype)
        times, declined, point = _point(shifted, base, rounds, seconds)
        if declined:
            overhead = 100 * (times["auto"] / times["dense"] - 1)
            point.append(
                dataclasses.replace(
                    point[-1],
                    variant="auto",
                    quantity="overhead over dense",
                    value=overhead,
                    unit="%",
                    at_most=MAX_OVERHEAD,
                )
            )
        found += point
        assert point[0].active is not None
        ratios.append((point[0].active, times["screened"] / times["dense"]))
    crossover = crossing(ratios)
    if crossover is not None:
        found.append(
            dataclasses.replace(
                base, variant="screened", quantity="crossover", value=100 * crossover, unit="%"
            )
        )
    return found


def _point(
    inputs: TrainedInputs, base: Finding, rounds: int, seconds: float
) -> tuple[dict[str, float], bool, list[Finding]]:
    """Median times, whether auto declined, and these and the survivors as findings."""
    report = screened(inputs)
    head = partial(splade_fast.splade_head, inputs.hidden, inputs.weight, inputs.bias, inputs.mask)
    if not torch.equal(report.pooled, head(algorithm="dense")):
        raise AssertionError(f"screened differs from dense: {inputs.model} {inputs.weight.dtype}")
    decoder = decoder_of(inputs.weight, inputs.weight.dtype)
    contenders = {
        # What it remembers of earlier calls is forgotten: it asks again.
        name: Contender(partial(head, algorithm=name), partial(decoder.record, False))
        for name in ALGORITHMS
    }
    samples = time_in_turns(contenders, rounds=rounds, seconds=seconds, device="cpu")
    times = {name: statistics.median(values) for name, values in samples.items()}
    decoder.record(False)
    head(algorithm="auto")
    declined = not decoder.asks()
    all_pairs = len(inputs.tokens) * len(inputs.weight)
    at = dataclasses.replace(base, active=(report.pooled > 0).float().mean().item())
    shares = {
        "compared": report.compared / all_pairs,
        "surviving": report.pairs / all_pairs,
    }
    found = [
        dataclasses.replace(at, variant=name, quantity="median", value=times[name], unit="ms")
        for name in ALGORITHMS
    ]
    found += [
        dataclasses.replace(
            at, variant="screened", quantity=f"{name} pairs", value=100 * share, unit="%"
        )
        for name, share in shares.items()
    ]
    found.append(
        dataclasses.replace(at, variant="auto", quantity="declines", value=float(declined), unit="")
    )
    return times, declined, found


def crossing(ratios: Sequence[tuple[float, float]]) -> float | None:
    """Where times over those of dense first reach 1, on straight lines in logarithms."""
    for (before, lower), (after, upper) in pairwise(ratios):
        if lower < 1 <= upper:
            part = math.log(1 / lower) / math.log(upper / lower)
            return float(before * (after / before) ** part)
    return None
