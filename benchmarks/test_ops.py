"""The small cases of every op under pytest-benchmark: pytest benchmarks/test_ops.py.

`--benchmark-autosave` and `--benchmark-compare` compare one commit with the next.
"""

from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import cases
from benchmarks.harness.case import Case

OPS = ("gather", "head", "pool", "prune", "sample", "score")
CASES = [case for op in OPS for case in cases.load(op, "cpu", [torch.float32], quick=True)]


@pytest.mark.parametrize("case", CASES, ids=[case.title.replace(" ", "-") for case in CASES])
def test_ours(case: Case, benchmark: BenchmarkFixture) -> None:
    workload = case.build(floors=False)
    ours = partial(workload.run, case.implementation("ours"), case.direction)
    benchmark.pedantic(ours, setup=workload.clear_gradients, rounds=5, warmup_rounds=1)
