"""Comparison of every op with plain PyTorch on random inputs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import splade_fast as sf
from splade_fast import _library
from tests.fuzz.calls import CALLS, Call
from tests.fuzz.inputs import Draws
from tests.tolerances import assert_accurate

# Ops with rounded results. All others only move values or compute exact sums.
ROUNDED = {"pool", "head"}


def assert_same_as_plain_pytorch(name: str, draws: Draws) -> None:
    call = CALLS[name](draws)
    # With relu the sums of gradients are exact. The gradient of NaN is undefined.
    gradients = name in ROUNDED and call[2]["activation"] == "relu" and is_finite(call)
    ours = results(call, gradients)
    with mock.patch.object(_library, "has_kernels", return_value=False):
        plain = results(call, gradients)
        exact = results(in_float64(call), gradients) if name in ROUNDED else plain
    assert len(ours) == len(plain)
    for actual, baseline, truth in zip(ours, plain, exact, strict=True):
        if name in ROUNDED:
            assert_accurate(actual, truth, baseline)
        else:
            # Exact except the logsumexp of a sample, which may be near 0 while its terms are not.
            atol = 1e-6 if name == "sample" else 0.0
            torch.testing.assert_close(actual, baseline, rtol=1e-6, atol=atol, equal_nan=True)


def results(call: Call, with_gradients: bool) -> list[Tensor]:
    """Return the results of a call, then its gradients, without changing the given tensors."""
    function, arguments, options = pytree.tree_map_only(Tensor, _copy, call)
    options = {name: _fresh(value) for name, value in options.items()}
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    leaves = tensors if with_gradients else []
    for leaf in leaves:
        leaf.requires_grad_()
    returned = function(*arguments, **options)
    if returned is None:
        returned = arguments  # the call writes to some of them
    found = [dense(value) for value in pytree.tree_leaves(returned, is_leaf=_is_rows)]
    if not leaves:
        return found
    slope = torch.arange(found[0].numel(), dtype=torch.float64).view(found[0].shape) % 5 - 2
    gradients = torch.autograd.grad(found[0], leaves, slope.to(found[0].dtype))
    return [found[0].detach(), *gradients]


def is_finite(call: Call) -> bool:
    return all(bool(x.isfinite().all()) for x in call[1] if isinstance(x, Tensor))


def in_float64(call: Call) -> Call:
    return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, call)


def dense(value: Any) -> Tensor:
    return value.to_dense() if isinstance(value, sf.SparseRows) else value


def _is_rows(value: Any) -> bool:
    return isinstance(value, sf.SparseRows)


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides."""
    copied = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return copied.copy_(tensor) if not _overlaps(tensor) else tensor.detach()


def _overlaps(tensor: Tensor) -> bool:
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def _fresh(value: Any) -> Any:
    """Return a copy of a generator in its present state."""
    if not isinstance(value, sf.Philox):
        return value
    copied = sf.Philox(0, "cpu")
    copied.load_state_dict(value.state_dict())
    return copied
