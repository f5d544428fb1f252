"""Check that kernels have no races, and that mistakes which make some are found."""

from contextlib import suppress

import pytest
import torch

from tests.emulation import sanitized, test_head, test_prune
from tests.emulation.cases import begin
from tests.emulation.library import SANITIZER

# Every kernel in the first case or two. make emulate-races runs all tests of this folder.
TESTS = [
    "test_gather.py::test_update",
    "test_head.py::test_fused_is_that_of_the_cpu",
    "test_head.py::test_matches_reference",
    "test_head_screened.py::test_weight_that_has_changed",
    "test_pool.py::test_maximum_is_that_of_the_cpu",
    "test_prune.py",
    "test_races.py",
    "test_sample.py::test_sparse",
    "test_search.py::test_is_that_of_the_cpu",
]


@pytest.mark.skipif(bool(SANITIZER), reason="starts the sanitizer itself")
def test_races():
    sanitized.skip_unless_possible()
    result = sanitized.run(
        "thread", *(f"tests/emulation/{test}" for test in TESTS), EMULATION_CASES="1"
    )
    assert result.returncode == 0


def search(monkeypatch, emulator, draw):
    queries, columns = torch.randn(2, 30), torch.arange(30, dtype=torch.int32).repeat(300, 1)
    documents = columns, torch.randn(300, 30), torch.full((300,), 30).int()
    emulator.ops.sparse_search(None, queries, None, *documents, 30, 200)


def insert_into_cache(monkeypatch, emulator, draw):
    """Insert more items than a block has threads."""
    age, valid = torch.zeros(2000).int(), torch.zeros(2000).bool()
    emulator.ops.update_cache_(
        [torch.zeros(2000, 1)], age, valid, [torch.ones(1100, 1)], None, [], None, None, False
    )


def scatter_twice_to_each_row(monkeypatch, emulator, draw):
    indices = torch.arange(40) % 20
    emulator.ops.scatter_rows_([torch.zeros(20, 3)], indices, [torch.randn(40, 3)], None)


CHECKS = {
    "sort_without_barrier": search,
    "sums_without_barrier": insert_into_cache,
    "prune_without_barrier": lambda patch, *given: test_prune.test_is_that_of_the_cpu(*given),
    "head_backward_without_warp_barrier": test_head.test_matches_reference,
    "scatter_by_several_blocks": scatter_twice_to_each_row,
    "head_with_early_release": test_head.test_fused_is_that_of_the_cpu,
    "head_without_last_wait": test_head.test_fused_is_that_of_the_cpu,
}
CASES = 20


@pytest.mark.parametrize("name", CHECKS)
def test_race_is_found(monkeypatch, reports, emulator, name):
    monkeypatch.setenv("SPLADE_FAST_HOPPER", "1")
    report = ""
    with emulator.mistake(name):
        for case in range(CASES):
            with suppress(AssertionError, RuntimeError):  # the mistake may show in results too
                CHECKS[name](monkeypatch, emulator, begin(emulator, case))
            report = reports.take()
            if report:
                break
    assert "WARNING: ThreadSanitizer: data race" in report
