"""pytest-benchmark cases of ours alone, to compare one commit with the next."""

from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.case import Case, Direction
from benchmarks.cases.head import HeadCase
from benchmarks.cases.pool import PoolCase

DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")
DTYPES = (torch.float32, torch.bfloat16)


def cases() -> list[Case]:
    return [
        case
        for direction in DIRECTIONS
        for dtype in DTYPES
        for case in (
            PoolCase(
                direction=direction, dtype=dtype, device="cpu", batch=4, length=64, vocab=30522
            ),
            HeadCase(
                direction=direction,
                dtype=dtype,
                device="cpu",
                batch=4,
                length=64,
                dim=128,
                vocab=30522,
            ),
        )
    ]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.title.replace(" ", "-"))
def test_ours(case: Case, benchmark: BenchmarkFixture) -> None:
    workload = case.build(floors=False)
    ours = partial(workload.run, case.implementation("ours"), case.direction)
    benchmark.pedantic(ours, setup=workload.clear_gradients, rounds=15, warmup_rounds=2)
