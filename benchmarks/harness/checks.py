"""Correctness before speed: a wrong contender is not worth timing."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.case import Case, Implementation, Workload

# The policy of the tests: the error against fp64 is at most this many times the error of plain
# PyTorch in the same dtype, plus a rounding floor.
TIMES_EAGER = 2.0
FLOOR_IN_EPSILONS = 1.0
# Two positions whose logits differ by less than their rounding may each be taken as the maximum,
# and the gradient goes to another token. That happens for about this many epsilons of the
# pairs, and at least for one; one pair among n moves a gradient by sqrt(2 / n).
TIES_IN_EPSILONS = 32.0


@dataclass(frozen=True)
class Check:
    is_correct: bool
    tensor: str  # tensor with the largest error relative to its tolerance
    error: float
    tolerance: float
    active: float  # share of positive pooled entries

    def as_error(self) -> dict[str, Any]:
        """Return the arguments of a Measurement of the error."""
        return {
            "quantity": "relative error",
            "value": self.error,
            "at_most": self.tolerance,
            "note": self.tensor,
        }


def check(case: Case, workload: Workload) -> Check:
    exact = workload.exact()
    ours = _errors(case, workload, case.implementation("ours"), exact)
    try:
        eager = _errors(case, workload, case.implementation("eager"), exact)
    except torch.OutOfMemoryError:
        eager = dict.fromkeys(exact, 0.0)
    active_pairs = int((exact["output"] > 0).sum())
    tolerances = {
        name: TIMES_EAGER * (eager[name] if math.isfinite(eager[name]) else 0.0)
        + _rounding_floor(name, case.dtype, active_pairs)
        for name in exact
    }
    worst = max(ours, key=lambda name: ours[name] / tolerances[name])
    return Check(
        is_correct=all(ours[name] <= tolerances[name] for name in exact),
        tensor=worst,
        error=ours[worst],
        tolerance=tolerances[worst],
        active=active_pairs / max(1, exact["output"].numel()),
    )


def _rounding_floor(name: str, dtype: torch.dtype, active_pairs: int) -> float:
    floor = FLOOR_IN_EPSILONS * torch.finfo(dtype).eps
    if name == "output" or active_pairs == 0:
        return floor
    ties = 1 + TIES_IN_EPSILONS * torch.finfo(torch.float32).eps * active_pairs
    return floor + math.sqrt(2 * ties / active_pairs)


def _errors(
    case: Case, workload: Workload, implementation: Implementation, exact: dict[str, Tensor]
) -> dict[str, float]:
    workload.clear_gradients()
    output = workload.run(implementation, case.direction)
    found = {"output": output, **workload.gradients()}
    errors = {name: relative_error(found[name], exact[name]) for name in exact}
    workload.clear_gradients()
    return errors


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return ‖found - exact‖ / ‖exact‖ in fp64; infinity for NaN or another shape."""
    if found.shape != exact.shape:
        return math.inf
    difference = norm = 0.0
    pieces = 1 << 24
    for mine, truth in zip(
        found.flatten().split(pieces), exact.flatten().split(pieces), strict=True
    ):
        difference += (mine.double() - truth).square().sum().item()
        norm += truth.square().sum().item()
    error = math.sqrt(difference / norm) if norm else math.sqrt(difference)
    return error if math.isfinite(error) else math.inf
