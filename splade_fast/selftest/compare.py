"""Errors and times of all ops beside plain PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from splade_fast._library import has_kernels
from splade_fast.selftest.cases import Case, Draw, Tensors, all_cases

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The error may be this many times that of plain PyTorch in the same dtype, plus this many rounding
# units of the dtype, since plain PyTorch may be exact by luck.
_TIMES_PLAIN = 2.0
_ROUNDING_UNITS = 4.0
_RUNS = 5
_SECONDS = 0.1  # for the runs of one contender


@dataclass(frozen=True)
class Outcome:
    """Result of one case.

    Args:
        op: name of the op.
        dtype: name of the dtype, such as "bfloat16".
        error: ‖found - exact‖ / ‖exact‖, where plain PyTorch computes `exact` in float64.
        tolerance: the largest error that is allowed; 0 where results have to be equal to the bit.
        milliseconds: median time of the op.
        times_plain: time of plain PyTorch over the op's.
        failure: the reason if the op raised an error, otherwise empty.
        left_out: the reason if this machine or dtype has no such op, otherwise empty.
    """

    op: str
    dtype: str
    error: float = 0.0
    tolerance: float = 0.0
    milliseconds: float = 0.0
    times_plain: float = 0.0
    failure: str = ""
    left_out: str = ""

    @property
    def is_passed(self) -> bool:
        return not self.failure and self.error <= self.tolerance

    @property
    def line(self) -> str:
        """The result in one line."""
        start = f"{self.op:30} {self.dtype:9}"
        if self.failure or self.left_out:
            return f"{start} {'WRONG: ' + self.failure if self.failure else self.left_out}"
        return (
            f"{start} error {self.error:7.1e} of {self.tolerance:7.1e} "
            f"{self.milliseconds:9.2f} ms {self.times_plain:7.1f} x plain PyTorch"
            f"{'' if self.is_passed else '  WRONG'}"
        )


def run_selftest(device: torch.device | str = "cpu") -> Iterator[Outcome]:
    """Compare every op in every dtype with plain PyTorch, and time both.

    Args:
        device: "cpu" or a CUDA device.

    Yields:
        An Outcome for each op and dtype.

    Raises:
        ImportError: the device has no compiled kernels.

    Example::

        >>> from splade_fast.selftest import run_selftest
        >>> next(run_selftest("cpu")).is_passed
        True
    """
    device = torch.device(device)
    if not has_kernels(device):
        raise ImportError(f"splade_fast has no kernels for {device}; see splade_fast.build_info()")
    for case in all_cases():
        for dtype in DTYPES:
            yield _outcome(case, dtype, device)


def _outcome(case: Case, dtype: torch.dtype, device: torch.device) -> Outcome:
    name = str(dtype).removeprefix("torch.")
    inputs = case.make(Draw(dtype, device, torch.Generator(device).manual_seed(0)))
    try:
        found = case.ours(inputs)
    except NotImplementedError as reason:
        return Outcome(case.op, name, left_out=str(reason))
    except Exception as failure:  # whatever it is, the report has to name it
        return Outcome(case.op, name, failure=f"{type(failure).__name__}: {failure}")
    plain = case.plain(inputs)
    if case.is_exact:
        error, tolerance = _relative_error(found, plain), 0.0
    else:
        exact = case.plain(_in_float64(inputs))
        error = _relative_error(found, exact)
        rounding = _ROUNDING_UNITS * torch.finfo(dtype).eps
        tolerance = _TIMES_PLAIN * _relative_error(plain, exact) + rounding
    ours_ms = _milliseconds(case.ours, inputs, device)
    plain_ms = _milliseconds(case.plain, inputs, device)
    return Outcome(case.op, name, error, tolerance, ours_ms, plain_ms / ours_ms)


def _in_float64(inputs: Tensors) -> Tensors:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def _relative_error(found: Tensor, exact: Tensor) -> float:
    """Return ‖found - exact‖ / ‖exact‖; infinity for another shape, and where one alone is NaN."""
    if found.shape != exact.shape:
        return float("inf")
    found, exact = found.double(), exact.double()
    is_same = (found == exact) | (found.isnan() & exact.isnan())
    difference = (found - exact).masked_fill(is_same, 0).norm().item()
    norm = exact[exact.isfinite()].norm().item()
    error = difference / norm if norm else difference
    return error if error == error else float("inf")


def _milliseconds(
    function: Callable[[Tensors], Tensor], inputs: Tensors, device: torch.device
) -> float:
    """Return the median time of a few runs; the caller has run the function once."""
    times: list[float] = []
    while len(times) < _RUNS and sum(times) < _SECONDS:
        _wait_for(device)
        start = time.perf_counter()
        function(inputs)
        _wait_for(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
