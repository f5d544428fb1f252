"""Tolerance policy of all tests.

The error of an op against a float64 reference is at most twice the error of plain PyTorch in the
same dtype, plus a few units in the last place of the largest value, as plain PyTorch may be exact
by luck.
"""

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR_ULPS = 4.0


def error(actual: Tensor, truth: Tensor) -> float:
    """Return the largest absolute difference, where equal infinities and NaN do not differ."""
    actual = actual.double().cpu()
    truth = truth.cpu()
    assert actual.shape == truth.shape, (actual.shape, truth.shape)
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    difference = (actual - truth).abs().masked_fill(same, 0)
    return difference.max().item() if difference.numel() else 0.0


def assert_accurate(actual: Tensor, truth: Tensor, baseline: Tensor) -> None:
    """Assert that the error of actual is within the policy, given plain PyTorch as baseline."""
    assert actual.dtype == baseline.dtype, (actual.dtype, baseline.dtype)
    finite = truth[truth.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    floor = FLOOR_ULPS * torch.finfo(actual.dtype).eps * scale
    tolerance = FACTOR * error(baseline, truth) + floor
    assert error(actual, truth) <= tolerance, (error(actual, truth), tolerance)


def assert_accurate_gradients(
    actual: dict[str, Tensor], truth: dict[str, Tensor], baseline: dict[str, Tensor]
) -> None:
    """Assert the policy for the gradients {parameter: gradient} of a model, as one vector.

    The exact gradient of some parameters is 0, such as the bias of a key: compared alone they
    would be rounding errors only.
    """
    assert actual.keys() == baseline.keys() == truth.keys()
    assert_accurate(
        *(torch.cat([g.flatten() for g in x.values()]) for x in (actual, truth, baseline))
    )
