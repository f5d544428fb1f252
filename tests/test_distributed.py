"""Tests of gathered rows and means over several processes, with their gradients."""

import pytest
import torch
from torch import Tensor

from splade_fast._distributed import (
    OtherRankError,
    Ranks,
    fail_together,
    gather_rows_of_ranks,
    mean_over_ranks,
    sum_over_ranks,
)
from tests.ranks import run_ranks

COUNTS = [2, 0, 3]


def make_rows(rank: int) -> Tensor:
    torch.manual_seed(rank)
    return torch.randn(COUNTS[rank], 4, 5, dtype=torch.float64).transpose(1, 2).requires_grad_()


def rows_and_means(rank: int, count: int) -> None:
    mine = make_rows(rank)
    everyone = torch.cat([make_rows(other).detach() for other in range(count)])
    rows, first = gather_rows_of_ranks(mine)
    assert torch.equal(rows, everyone)
    assert first == sum(COUNTS[:rank])
    # Each rank has its own weights, and the gradient includes those of all ranks.
    weights = [torch.rand(everyone.shape, dtype=torch.float64) for _ in range(count)]
    (rows * weights[rank]).sum().backward()
    expected = sum(weights)[first : first + COUNTS[rank]]
    torch.testing.assert_close(mine.grad, expected)

    mine = make_rows(rank)
    mean_over_ranks(mine).backward()
    torch.testing.assert_close(mean_over_ranks(mine), everyone.mean())
    torch.testing.assert_close(mine.grad, torch.full_like(mine, count / everyone.numel()))
    alone = mean_over_ranks(mine, across_ranks=False)
    assert alone == (mine.mean() if mine.numel() else 0)
    ones = torch.ones(300 + rank, dtype=torch.bfloat16)
    assert mean_over_ranks(ones) == 1
    assert mean_over_ranks(ones[:0]) == 0

    x = torch.ones(1, requires_grad=True)
    for function in (sum_over_ranks, lambda x: gather_rows_of_ranks(x)[0]):
        (once,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            once.sum().backward()


def fail_on(ranks: set[int]) -> None:
    """Raise ValueError on some of the ranks, without waiting for the others."""
    if Ranks().rank in ranks:
        raise ValueError(f"rank {Ranks().rank} says why")


def errors_are_shared(rank: int, count: int) -> None:
    failing = {1, count - 1}
    for raise_once in (False, True):
        reporting = {1} if raise_once else failing
        error = ValueError if rank in reporting else OtherRankError
        message = (
            f"^rank {rank} says why$" if rank in reporting else "^trying failed on rank 1; see"
        )
        with pytest.raises(error, match=message):  # noqa: SIM117
            with fail_together("trying", raise_once=raise_once):
                fail_on(failing)
    with fail_together("trying"):  # the group still works
        fail_on(set())


def all_checks(rank: int, count: int) -> None:
    rows_and_means(rank, count)
    errors_are_shared(rank, count)


@pytest.mark.parametrize("count", [2, 3])
def test_over_ranks(count, tmp_path):
    run_ranks(count, all_checks, tmp_path)


def test_one_rank():
    x = torch.randn(3, 2)
    assert gather_rows_of_ranks(x) == (x, 0)
    assert mean_over_ranks(x) == x.sum() / 6
    with pytest.raises(ValueError, match="^rank 0 says why$"), fail_together("trying"):
        raise ValueError("rank 0 says why")
