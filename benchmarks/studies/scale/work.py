"""One size of a part: measured in a process of its own, where nothing is left of others."""

import multiprocessing
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.harness.case import Case
from benchmarks.harness.checks import check
from benchmarks.harness.extra_memory import peak_extra_here
from benchmarks.harness.results import EXTRA_MEMORY, TIME, Measurement
from benchmarks.harness.timing import Contender, Rounds, do_nothing, time_in_turns

quantity = partial(Measurement, study="scale")


class WrongError(RuntimeError):
    """The result is wrong, and so not worth a time."""


class Work(ABC):
    """Work whose cost is measured. Small and picklable: tensors are made where it is measured."""

    contender: str = "ours"

    @abstractmethod
    def measure(self, rounds: Rounds) -> list[Measurement]:
        """Measure in this process, which has to be a fresh one.

        Raises:
            WrongError: the result is wrong.
        """


Works = list[tuple[str, Work]]  # by subject


@dataclass(frozen=True)
class CaseWork(Work):
    """A contender on a case of the benchmarks."""

    case: Case
    contender: str = "ours"

    def measure(self, rounds: Rounds) -> list[Measurement]:
        case = self.case
        implementation = case.implementation(self.contender)
        workload = case.build(floors=False)
        peak = peak_extra_here(case, self.contender, workload)
        run = partial(workload.run, implementation, case.direction)
        found = [
            measure_time(run, rounds, before=workload.clear_gradients),
            mebibytes(EXTRA_MEMORY, peak),
        ]
        if self.contender == "ours" and not (outcome := check(case, workload)).is_correct:
            raise WrongError(f"{outcome.tensor} of {case.title}: error {outcome.error:.2e}")
        return found


def measure_alone(work: Work, rounds: Rounds) -> list[Measurement]:
    """Run `work.measure` in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, type(work).__module__])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_measure, work, rounds, torch.get_num_threads()).result()


def _measure(work: Work, rounds: Rounds, threads: int) -> list[Measurement]:
    torch.set_num_threads(threads)
    return work.measure(rounds)


def measure_time(
    run: Callable[[], object], rounds: Rounds, *, before: Callable[[], None] = do_nothing
) -> Measurement:
    """Return the median milliseconds of a run."""
    times = time_in_turns({"run": Contender(run, before)}, rounds)["run"]
    p25, p50, p75 = statistics.quantiles(times, n=4)
    return quantity(quantity=TIME, value=p50, unit="ms", rounds=len(times), p25=p25, p75=p75)


def per_second(name: str, count: int, time: Measurement) -> Measurement:
    rate = count / time.value * 1e3
    return quantity(quantity=name, value=rate, unit="1/s", rounds=time.rounds)


def mebibytes(name: str, count: int) -> Measurement:
    return quantity(quantity=name, value=count / 2**20, unit="MiB")
