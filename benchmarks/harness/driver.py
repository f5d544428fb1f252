"""One case from correctness to rows."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.harness.case import Case, Implementation, Target, Workload
from benchmarks.harness.checks import Check, check
from benchmarks.harness.machine import Machine
from benchmarks.harness.memory import peak_extra_bytes
from benchmarks.harness.results import Row
from benchmarks.harness.timing import Contender, fastest, time_in_turns

CONTENDERS = ("ours", "eager", "compile", "peer")


@dataclass(frozen=True)
class Options:
    rounds: int
    seconds: float
    contenders: tuple[str, ...] = CONTENDERS
    others: bool = True  # those of a case alone
    memory: bool = True


def run_case(case: Case, options: Options, machine: Machine) -> list[Row]:
    """Rows of all contenders and the floor; only the one of ours, untimed, if ours is wrong."""
    workload = case.build()
    outcome = check(case, workload)
    if not outcome.correct:
        print(f"WRONG: {outcome.tensor} of {case.title}; not timed", flush=True)
        return [_row(case, machine, outcome, "ours")]
    names = [*options.contenders, *(case.others() if options.others else ())]
    implementations = _available(case, workload, names)
    contenders = {
        name: Contender(
            partial(workload.run_in_mode, implementation, case.direction), workload.clear_gradients
        )
        for name, implementation in implementations.items()
    }
    details = {name: case.detail(name, workload) for name in implementations}
    details["floor"] = fastest(workload.floors, device=case.device)
    contenders["floor"] = Contender(workload.floors[details["floor"]])
    # Outside: some runs are so short that switching the mode would be a part of them.
    with torch.set_grad_enabled(case.direction != "forward"):
        times = time_in_turns(
            contenders, rounds=options.rounds, seconds=options.seconds, device=case.device
        )
    # An index that another library builds is no part of what a run needs.
    measured = {name: found for name, found in implementations.items() if name in CONTENDERS}
    peaks = _peaks(case, workload, measured) if options.memory else {}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        dataclasses.replace(
            _row(case, machine, outcome, name),
            detail=details[name],
            rounds=len(values),
            median_ms=medians[name],
            p25_ms=statistics.quantiles(values, n=4)[0],
            p75_ms=statistics.quantiles(values, n=4)[2],
            times_ours=medians[name] / medians["ours"],
            share_of_floor=medians["floor"] / medians[name],
            peak_extra_mib=peaks.get(name),
            verdict=_verdict(case.targets, medians, peaks) if name == "ours" else "",
        )
        for name, values in times.items()
    ]


def _available(
    case: Case, workload: Workload, contenders: Sequence[str]
) -> dict[str, Implementation]:
    """The contenders that run at all; ours has to."""
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


def _peaks(
    case: Case, workload: Workload, implementations: dict[str, Implementation]
) -> dict[str, float]:
    return {
        name: peak_extra_bytes(case, name, implementation, workload) / 2**20
        for name, implementation in implementations.items()
    }


def _verdict(targets: Sequence[Target], medians: dict[str, float], peaks: dict[str, float]) -> str:
    measured = {"times the floor": medians["ours"] / medians["floor"]}
    for other, median in medians.items():
        measured[f"times faster than {other}"] = median / medians["ours"]
    if "ours" in peaks:
        measured["MiB peak extra memory"] = peaks["ours"]
    return "; ".join(
        target.verdict(measured[target.measure]) for target in targets if target.measure in measured
    )


def _row(case: Case, machine: Machine, outcome: Check, contender: str) -> Row:
    return Row(
        op=case.op,
        shape=case.shape,
        layout=case.layout,
        fill=case.fill,
        active=outcome.active,
        dtype=case.dtype_name,
        device=case.device,
        direction=case.direction,
        contender=contender,
        detail=outcome.tensor,
        correct=outcome.correct,
        error=outcome.error,
        tolerance=outcome.tolerance,
        rounds=0,
        median_ms=None,
        p25_ms=None,
        p75_ms=None,
        times_ours=None,
        share_of_floor=None,
        peak_extra_mib=None,
        verdict="",
        **vars(machine),
    )
