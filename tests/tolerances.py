"""The one tolerance policy of all tests.

An op's error against a float64 reference is at most twice the error of plain PyTorch in the same
dtype, plus a rounding floor: a few units in the last place of the largest value, since plain
PyTorch may be exact by luck.
"""

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR_ULPS = 4.0


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; places where both are the same inf or both NaN agree."""
    actual = actual.double().cpu()
    truth = truth.cpu()
    assert actual.shape == truth.shape, (actual.shape, truth.shape)
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    difference = (actual - truth).abs().masked_fill(same, 0)
    return difference.max().item() if difference.numel() else 0.0


def assert_accurate(actual: Tensor, truth: Tensor, baseline: Tensor) -> None:
    """actual is as close to the float64 truth as the policy asks of plain PyTorch in its dtype."""
    assert actual.dtype == baseline.dtype, (actual.dtype, baseline.dtype)
    finite = truth[truth.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    floor = FLOOR_ULPS * torch.finfo(actual.dtype).eps * scale
    tolerance = FACTOR * error(baseline, truth) + floor
    assert error(actual, truth) <= tolerance, (error(actual, truth), tolerance)


def assert_accurate_gradients(
    actual: dict[str, Tensor], truth: dict[str, Tensor], baseline: dict[str, Tensor]
) -> None:
    """The policy for the gradients of a whole model, {parameter: gradient}, taken as one vector.

    Some parameters, such as the bias of a key, have the gradient 0 but for rounding: alone they
    would compare noise with noise.
    """
    assert actual.keys() == baseline.keys() == truth.keys()
    assert_accurate(
        *(torch.cat([g.flatten() for g in x.values()]) for x in (actual, truth, baseline))
    )
