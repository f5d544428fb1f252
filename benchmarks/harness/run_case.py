"""One case: correctness first, then times in turns and peak memory."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.harness.case import Case, Implementation, Workload
from benchmarks.harness.checks import check
from benchmarks.harness.extra_memory import peak_extra_bytes
from benchmarks.harness.results import EXTRA_MEMORY, FLOOR, TIME, Measurement
from benchmarks.harness.timing import Contender, Rounds, fastest, time_in_turns

CONTENDERS = ("ours", "eager", "compile", "peer")


@dataclass(frozen=True)
class Options:
    rounds: Rounds
    contenders: Sequence[str] = CONTENDERS
    has_others: bool = True  # contenders of one case alone
    has_memory: bool = True


def run_case(case: Case, options: Options) -> list[Measurement]:
    """Return error, times, peak memory and bounds; the error alone if the result is wrong."""
    workload = case.build()
    outcome = check(case, workload)
    measurement = partial(
        Measurement,
        study=case.op,
        part=case.direction,
        subject=f"{case.shape} {case.layout} fill {case.fill:.2f}",
        dtype=case.dtype_name,
        device=case.device,
        axis="active",
        # One digit: the share varies with the inputs, and cases are told apart by it.
        size=float(f"{outcome.active:.1g}"),
    )
    error = measurement(**outcome.as_error())
    if not outcome.is_correct:
        print(f"WRONG: {outcome.tensor} of {case.title}; not timed", flush=True)
        return [error]
    return [error, *_costs(case, workload, options, measurement)]


def _costs(
    case: Case, workload: Workload, options: Options, measurement: Any
) -> Iterator[Measurement]:
    names = [*options.contenders, *(case.others() if options.has_others else ())]
    implementations = _available(case, workload, names)
    contenders = {
        name: Contender(
            partial(workload.run_in_mode, implementation, case.direction), workload.clear_gradients
        )
        for name, implementation in implementations.items()
    }
    details = {name: case.detail(name, workload) for name in implementations}
    details[FLOOR] = fastest(workload.floors, options.rounds.seconds, case.device)
    contenders[FLOOR] = Contender(workload.floors[details[FLOOR]])
    # Outside: some runs are so short that switching the mode would be a part of them.
    with torch.set_grad_enabled(case.direction != "forward"):
        times = time_in_turns(contenders, options.rounds, case.device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        p25, _, p75 = statistics.quantiles(values, n=4)
        yield measurement(
            contender=name,
            quantity=TIME,
            value=medians[name],
            unit="ms",
            rounds=len(values),
            p25=p25,
            p75=p75,
            note=details[name],
        )
    bounds = {target.measure: target for target in case.targets}
    # An index that another library builds is no part of what a run needs.
    for name in [name for name in implementations if name in CONTENDERS and options.has_memory]:
        peak = peak_extra_bytes(case, name, implementations[name], workload) / 2**20
        bound = bounds.get("MiB peak extra memory") if name == "ours" else None
        yield measurement(
            contender=name,
            quantity=EXTRA_MEMORY,
            value=peak,
            unit="MiB",
            at_most=bound.bound if bound else None,
        )
    ratios = {"times the floor": medians["ours"] / medians[FLOOR]}
    for name, median in medians.items():
        ratios[f"times faster than {name}"] = median / medians["ours"]
    for name in [name for name in bounds if name in ratios]:
        yield measurement(quantity=name, value=ratios[name], **bounds[name].as_bound())


def _available(
    case: Case, workload: Workload, contenders: Sequence[str]
) -> dict[str, Implementation]:
    """Return the contenders that run at all; ours has to."""
    found = {}
    for name in contenders:
        try:
            implementation = case.implementation(name)
            workload.clear_gradients()
            workload.run(implementation, case.direction)
        # Compilers and other libraries fail in their own ways, none of which stops the others.
        except Exception as error:
            if name == "ours":
                raise
            reason = str(error).strip().splitlines() or [""]
            print(f"without {name}: {type(error).__name__}: {reason[0]}", flush=True)
        else:
            found[name] = implementation
    return found
