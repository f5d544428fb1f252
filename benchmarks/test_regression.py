"""pytest-benchmark cases of ours, to compare one commit with the next: see regression.py.

Each round first times the floor of the case, so that a saved run holds how many floors ours took: a
busy or another machine changes both.
"""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases.gather import GatherCase
from benchmarks.cases.head import HeadCase
from benchmarks.cases.pool import PoolCase
from benchmarks.cases.prune import PruneCase
from benchmarks.cases.sample import SampleCase
from benchmarks.cases.score import ScoreCase
from benchmarks.harness.case import Case
from benchmarks.harness.timing import CpuClock, fastest
from benchmarks.regression import FLOORS

DTYPES = (torch.float32, torch.bfloat16)
TEXTS: dict[str, Any] = {"batch": 4, "length": 64, "vocab": 30522}
ROUNDS = 31


def cases() -> list[Case]:
    found: list[Case] = []
    for dtype in DTYPES:
        forward: dict[str, Any] = {"direction": "forward", "dtype": dtype, "device": "cpu"}
        for options in (forward, {**forward, "direction": "forward+backward"}):
            found += [PoolCase(**options, **TEXTS), HeadCase(**options, **TEXTS, dim=128)]
        prune = PruneCase(**forward, batch=64, vocab=30522, k=256, positive=0.02)
        found += [prune, dataclasses.replace(prune, dense=True)]
        found += [ScoreCase(**forward, queries=64, docs=8192, k=k) for k in (None, 10)]
        found += [SampleCase(**forward, sparse=sparse, slots=8192) for sparse in (False, True)]
        gather = GatherCase(**forward, action="read", rows=1024, slots=8192)
        found += [gather, dataclasses.replace(gather, action="write")]
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.title.replace(" ", "-"))
def test_ours(case: Case, benchmark: BenchmarkFixture) -> None:
    workload = case.build()
    ours = partial(workload.run, case.implementation("ours"), case.direction)
    floor = workload.floors[fastest(workload.floors, device="cpu")]
    clock = CpuClock()
    floors: list[float] = []

    def before() -> None:
        workload.clear_gradients()
        floors.append(clock.milliseconds(clock.mark(floor)))

    benchmark.pedantic(ours, setup=before, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.stats is not None:  # None with --benchmark-disable
        # The best of many rounds varies less from run to run than their median.
        benchmark.extra_info[FLOORS] = 1e3 * benchmark.stats.stats.min / min(floors)
