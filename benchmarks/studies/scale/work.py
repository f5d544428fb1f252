"""One size of a study: it is measured in a process of its own, where nothing is left of others."""

import multiprocessing
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.harness.case import Case
from benchmarks.harness.checks import check
from benchmarks.harness.memory import peak_extra_here
from benchmarks.harness.timing import Contender, nothing, time_in_turns
from benchmarks.studies.scale.findings import EXTRA_MEMORY, TIME, Quantity


class WrongError(RuntimeError):
    """What was computed is wrong, and so not worth a time."""


@dataclass(frozen=True)
class Rounds:
    """How often a time is taken."""

    rounds: int
    seconds: float


class Work(ABC):
    """Small and picklable: tensors are made where it is measured."""

    @abstractmethod
    def measure(self, rounds: Rounds) -> list[Quantity]:
        """In a fresh process.

        Raises:
            WrongError: the result is wrong.
        """


@dataclass(frozen=True)
class CaseWork(Work):
    """A contender on a case of the benchmarks."""

    case: Case
    contender: str = "ours"

    def measure(self, rounds: Rounds) -> list[Quantity]:
        case = self.case
        implementation = case.implementation(self.contender)
        workload = case.build(floors=False)
        peak = peak_extra_here(case, self.contender, workload)
        found = [
            timed(
                partial(workload.run, implementation, case.direction),
                rounds,
                before=workload.clear_gradients,
            ),
            mebibytes(EXTRA_MEMORY, peak),
        ]
        if self.contender == "ours" and not (outcome := check(case, workload)).correct:
            raise WrongError(f"{outcome.tensor} of {case.title}: error {outcome.error:.2e}")
        return found


def measured_alone(work: Work, rounds: Rounds) -> list[Quantity]:
    """`work.measure` in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, type(work).__module__])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_measured, work, rounds, torch.get_num_threads()).result()


def _measured(work: Work, rounds: Rounds, threads: int) -> list[Quantity]:
    torch.set_num_threads(threads)
    return work.measure(rounds)


def timed(
    run: Callable[[], object], rounds: Rounds, *, before: Callable[[], None] = nothing
) -> Quantity:
    """Median milliseconds of a run."""
    times = time_in_turns(
        {"run": Contender(run, before)}, rounds=rounds.rounds, seconds=rounds.seconds, device="cpu"
    )
    return median_of(times["run"])


def median_of(milliseconds: Sequence[float]) -> Quantity:
    p25, p50, p75 = statistics.quantiles(milliseconds, n=4)
    return Quantity(quantity=TIME, value=p50, unit="ms", rounds=len(milliseconds), p25=p25, p75=p75)


def per_second(name: str, count: int, time: Quantity) -> Quantity:
    return Quantity(quantity=name, value=count / time.value * 1e3, unit="1/s", rounds=time.rounds)


def mebibytes(name: str, count: int) -> Quantity:
    return Quantity(quantity=name, value=count / 2**20, unit="MiB")
