"""Regularisers and schedules equal their formulas in float64."""

import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import splade_fast as sf
from splade_fast import regularizers
from tests.ops.inputs import DTYPES
from tests.ranks import run_ranks
from tests.tolerances import assert_accurate


def sparse(rows=6, columns=50, dtype=torch.float64):
    """Return pooled vectors with zeros and negative entries."""
    x = torch.randn(rows, columns, dtype=torch.float64)
    return (x * (torch.rand(rows, columns) < 0.4)).to(dtype)


def flops(x):
    return (x.abs().sum(0) / len(x)).square().sum()


def masked_flops(x):
    kept = x[(x != 0).sum(1) > 20]
    return (kept.abs().sum(0) / len(x)).square().sum()


FREQUENCIES = torch.tensor([0, 1e-4, 0.05, 0.1, 0.3, 1.0]).repeat(9)[:50]


def df_flops(x):
    weights = [
        0.0 if f == 0 else 1 / (1 + (f ** math.log(2, 0.1) - 1) ** 10)
        for f in FREQUENCIES.double().tolist()
    ]
    return (torch.tensor(weights, dtype=x.dtype) * x.abs().mean(0)).square().sum()


LOSSES = {
    "flops": (sf.flops_loss, flops),
    "masked_flops": (lambda x: sf.flops_loss(x, threshold=20), masked_flops),
    "df_flops": (lambda x: sf.df_flops_loss(x, FREQUENCIES), df_flops),
    "l1": (sf.l1_loss, lambda x: x.abs().sum(1).mean()),
    "anti_zero": (sf.anti_zero_loss, lambda x: (1 / (x.abs().sum(1) + 1e-2) ** 2).mean()),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient(name, dtype, device):
    loss, formula = LOSSES[name]
    x = sparse(dtype=dtype).to(device)

    def value_and_gradient(function, leaf):
        value = function(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    truth = value_and_gradient(formula, x.double().cpu().requires_grad_())
    plain = value_and_gradient(formula, x.cpu().clone().requires_grad_())
    ours = value_and_gradient(loss, x.clone().requires_grad_())
    for actual, exact, baseline in zip(ours, truth, plain, strict=True):
        assert_accurate(actual.cpu().to(baseline.dtype), exact, baseline)


@pytest.mark.parametrize("name", LOSSES)
def test_second_order(name):
    loss, _ = LOSSES[name]
    # Not at 0, where the absolute value has no derivative.
    x = (torch.rand(4, 50, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_and_zero_rows(name):
    loss, _ = LOSSES[name]
    assert loss(torch.zeros(0, 50)).item() == 0
    zero = torch.zeros(3, 50, requires_grad=True)
    value = loss(zero)
    assert value.item() == (pytest.approx(1e4) if name == "anti_zero" else 0)
    value.backward()
    assert zero.grad.isfinite().all()


def gradient_over_ranks(rank: int, count: int) -> None:
    """Assert that each rank gets the gradient of the joined batch from DistributedDataParallel."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(4, 50).double()
    inputs = torch.randn(7, 4, dtype=torch.float64)
    parts = inputs.tensor_split([2]) if count == 2 else inputs.tensor_split([2, 2])
    for loss, formula in LOSSES.values():
        joined = formula(encoder(inputs).relu())
        (expected,) = torch.autograd.grad(joined, encoder.weight)
        encoder.zero_grad()
        parallel = DistributedDataParallel(encoder)  # must live until the gradients are computed
        value = loss(parallel(parts[rank]).relu())
        value.backward()
        torch.testing.assert_close(value.detach(), joined.detach())
        torch.testing.assert_close(encoder.weight.grad, expected)


@pytest.mark.parametrize("count", [2, 3])
def test_over_ranks(count, tmp_path):
    """Ranks have batches of different sizes, one of them empty."""
    run_ranks(count, gradient_over_ranks, tmp_path)


def test_threshold_spares_sparse_rows():
    x = torch.zeros(2, 50)
    x[0, :20] = 1
    x[1, :21] = 1
    x.requires_grad_()
    sf.flops_loss(x, threshold=20).backward()
    assert x.grad[0].count_nonzero() == 0
    assert x.grad[1].count_nonzero() == 21


def test_weights_of_document_frequencies():
    """The weight is 1/2 at alpha, near 0 far below and near 1 far above."""
    weights = regularizers._frequency_weights(torch.tensor([0, 0.01, 0.1, 0.5, 1.0]), 0.1, 10.0)
    assert weights[2].item() == pytest.approx(0.5)
    assert weights[0] == 0
    assert weights[1] < 1e-3
    assert weights[3] > 0.99
    assert weights[4] == 1


def test_document_frequencies_and_active_dims():
    x = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 0.0]])
    assert sf.document_frequencies(x).tolist() == [0.0, 1.0, 0.5]
    assert sf.active_dims(x).tolist() == [2, 1]


def test_schedules():
    assert [sf.QuadraticSchedule(8.0, 4)(step) for step in range(6)] == [0, 0.5, 2, 4.5, 8, 8]
    assert [sf.LinearSchedule(8.0, 4)(step) for step in range(6)] == [0, 2, 4, 6, 8, 8]
    assert sf.QuadraticSchedule(3.0, 0)(0) == 3
    assert sf.LinearSchedule(3.0, 0)(0) == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sf.flops_loss([1.0]), TypeError, "pooled must be a tensor, got list"),
        (lambda: sf.flops_loss(torch.ones(3)), ValueError, r"\(batch, vocabulary\), got \(3,\)"),
        (lambda: sf.l1_loss(torch.ones(2, 3).long()), TypeError, "pooled must be one of float32"),
        (
            lambda: sf.flops_loss(torch.ones(2, 3), threshold=-1),
            ValueError,
            "threshold must be at least 0, got -1",
        ),
        (
            lambda: sf.df_flops_loss(torch.ones(2, 3), torch.ones(2)),
            ValueError,
            r"document_frequencies must be \(vocabulary,\) = \(3,\), got \(2,\)",
        ),
        (
            lambda: sf.df_flops_loss(torch.ones(2, 3), torch.ones(3), alpha=1.0),
            ValueError,
            "alpha must be between 0 and 1, got 1.0",
        ),
        (
            lambda: sf.df_flops_loss(torch.ones(2, 3), torch.ones(3), beta=0),
            ValueError,
            "beta must be greater than 0, got 0",
        ),
        (
            lambda: sf.anti_zero_loss(torch.ones(2, 3), epsilon=0),
            ValueError,
            "epsilon must be greater than 0, got 0",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
