"""Timing in turns: every contender runs once a round, so that drift of the machine hits all."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

WARM_UPS = 2
# Short runs are warmed up for longer: CPython specialises what has run some times, and the first
# collection of garbage leaves cold caches.
WARM_UP_SECONDS = 0.2
MINIMUM_ROUNDS = 3
MINIMUM_SECONDS = 0.5  # a median of a few short rounds would be chance


@dataclass(frozen=True)
class Rounds:
    """Number of rounds, and the seconds after which no further one is started."""

    rounds: int
    seconds: float


QUICK = Rounds(MINIMUM_ROUNDS, 0.0)


def do_nothing() -> None:
    pass


@dataclass(frozen=True)
class Contender:
    run: Callable[[], object]
    before: Callable[[], None] = do_nothing  # untimed


class Clock(Protocol):
    """Clock whose marks are read after the round: an event read at once drains the CUDA queue."""

    def mark(self, run: Callable[[], object]) -> Any: ...
    def milliseconds(self, mark: Any) -> float: ...


class CpuClock:
    def mark(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def milliseconds(self, mark: float) -> float:
        return mark * 1e3


class CudaClock:
    """CUDA events around a run that starts with a cold L2."""

    # Writing this much takes ~0.1 ms: it evicts every L2 of today (<= 128 MiB) and keeps the GPU
    # busy while the host launches the first kernels of the run.
    FLUSHED_BYTES = 512 << 20

    def __init__(self) -> None:
        self._flushed = torch.empty(self.FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def mark(self, run: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        self._flushed.zero_()
        start.record()
        run()
        stop.record()
        return start, stop

    def milliseconds(self, mark: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        start, stop = mark
        stop.synchronize()
        return float(start.elapsed_time(stop))


@contextmanager
def garbage_collection_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_in_turns(
    contenders: Mapping[str, Contender], rounds: Rounds, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return the milliseconds of every run, by contender.

    There are more rounds than asked for if they take less than half a second, and fewer, but at
    least three, if the seconds run out. Each round starts with another contender, so that none
    always follows the same one.
    """
    names = list(contenders)
    clock: Clock = CudaClock() if device == "cuda" else CpuClock()
    times: dict[str, list[float]] = {name: [] for name in names}
    with garbage_collection_off():
        _warm_up(contenders, min(WARM_UP_SECONDS, rounds.seconds))
        started = time.perf_counter()
        for turn in itertools.count():
            passed = time.perf_counter() - started
            is_out_of_time = turn >= MINIMUM_ROUNDS and passed > rounds.seconds
            if is_out_of_time or (turn >= rounds.rounds and passed > MINIMUM_SECONDS):
                break
            first = turn % len(names)
            marks = {}
            for name in names[first:] + names[:first]:
                contenders[name].before()
                marks[name] = clock.mark(contenders[name].run)
            for name, mark in marks.items():
                times[name].append(clock.milliseconds(mark))
    return times


def _warm_up(contenders: Mapping[str, Contender], seconds: float) -> None:
    started = time.perf_counter()
    turn = 0
    while turn < WARM_UPS or time.perf_counter() - started < seconds:
        for contender in contenders.values():
            contender.before()
            contender.run()
        turn += 1


def median_times(
    runs: Mapping[str, Callable[[], object]],
    rounds: Rounds,
    before: Callable[[], None] = do_nothing,
) -> dict[str, float]:
    """Return the median milliseconds of every run, timed in turns on the CPU."""
    contenders = {name: Contender(run, before) for name, run in runs.items()}
    times = time_in_turns(contenders, rounds)
    return {name: statistics.median(values) for name, values in times.items()}


def fastest(candidates: Mapping[str, Callable[[], object]], seconds: float, device: str) -> str:
    """Return the name of the candidate with the lowest median of a few rounds."""
    contenders = {name: Contender(run) for name, run in candidates.items()}
    times = time_in_turns(contenders, Rounds(5, seconds), device)
    return min(times, key=lambda name: statistics.median(times[name]))
