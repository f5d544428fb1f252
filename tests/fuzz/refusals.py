"""Calls of the C++ entry points with invalid arguments."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fuzz.calls import CALLS
from tests.fuzz.inputs import Draws

INTEGERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 1000, 2**40, 2**62, 2**63 - 1)
FLOATS = (0.0, -1.0, 0.5, 1e308, float("inf"), float("-inf"), float("nan"))
WRITTEN_IN_PYTHON = {"splade_fast::head_forward", "splade_fast::sparse_scores_backward"}
MUTATIONS = (
    *("none", "dtype", "entry", "entry", "entry", "longer"),
    *("shorter", "flat", "more", "turned", "wide"),
)
ENTRIES = (-(2**31), -1, 0, 1, 7, 2**31 - 1)


class _Recorder(TorchDispatchMode):
    """Record of the calls of the ops, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any]]] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        if function.namespace == "splade_fast":
            self.calls.append((function, list(arguments)))
        return function(*arguments, **(options or {}))


def call_with_arguments_that_do_not_fit(name: str, draws: Draws) -> None:
    function, arguments, options = CALLS[name](draws)
    calls = recorded(function, arguments, options)
    if not calls:
        return  # nothing to compute
    op, given_arguments = draws.choice(calls)
    changed = list(given_arguments)
    for _ in range(draws.integer(1, 2)):
        place = draws.integer(0, len(changed) - 1)
        changed[place] = mutated(draws, changed[place])
    with suppress(RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        op(*changed)


def recorded(function: Any, arguments: Any, options: Any) -> list[tuple[Any, list[Any]]]:
    with _Recorder() as recorder:
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        replaced = iter(leaves)
        arguments = [
            next(replaced) if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in arguments
        ]
        result = function(*arguments, **options)
        if isinstance(result, Tensor) and result.requires_grad:
            result.sum().backward()
    calls = [call for call in recorder.calls if call[0].name() not in WRITTEN_IN_PYTHON]
    for op, given_arguments in recorder.calls:
        if op.name() == "splade_fast::head_forward":
            calls += _heads(given_arguments)
    return calls


def _heads(given_arguments: list[Any]) -> list[tuple[Any, list[Any]]]:
    """Call the C++ ops that head_forward calls."""
    ops = torch.ops.splade_fast
    calls = [(ops.head_forward_dense.default, [*given_arguments[:9], False])]
    hidden, weight = given_arguments[:2]
    mean = torch.zeros(hidden.shape[-1])
    calls.append((ops.head_prepare.default, [weight, mean]))
    prepared = ops.head_prepare(weight, mean)
    calls.append((ops.head_prepare_into.default, [weight, mean, None, None, 0.0, *prepared]))
    screened = [*given_arguments[:9], mean, *prepared, None, None, False]
    return [*calls, (ops.head_forward_screened.default, screened)]


def mutated(draws: Draws, value: Any) -> Any:
    if isinstance(value, Tensor):
        return _mutated_tensor(draws, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draws.choice(INTEGERS)
    if isinstance(value, float):
        return draws.choice(FLOATS)
    if isinstance(value, list):
        changed = list(value)
        if changed and draws.boolean():
            place = draws.integer(0, len(changed) - 1)
            changed[place] = mutated(draws, changed[place])
            return changed
        return changed[1:] if draws.boolean() else changed * 2
    return draws.choice((None, 0, 1.0, torch.zeros(2, 3), torch.ones(4, dtype=torch.bool)))


def _mutated_tensor(draws: Draws, tensor: Tensor) -> Tensor | None:
    kind = draws.choice(MUTATIONS)
    if kind == "none":
        return None
    if kind == "dtype":
        return tensor.to(draws.choice((torch.float32, torch.int32, torch.int64, torch.bool)))
    if kind == "flat":
        return tensor.flatten()
    if kind == "more":
        return tensor.unsqueeze(draws.integer(0, tensor.ndim))
    if kind == "wide":
        return tensor[:1].expand(tensor.shape) if tensor.ndim and len(tensor) else tensor
    if kind == "turned":
        return tensor.transpose(0, -1) if tensor.ndim else tensor
    if tensor.numel() == 0:
        return tensor.new_zeros((draws.integer(0, 3),) * max(tensor.ndim, 1))
    if kind == "entry":
        changed = tensor.detach().clone(memory_format=torch.contiguous_format)
        place = draws.integer(0, tensor.numel() - 1)
        entries = FLOATS if tensor.is_floating_point() else ENTRIES
        entry = torch.tensor(draws.choice(entries)).to(tensor.dtype)
        changed.view(-1)[place] = entry
        return changed
    dim = draws.integer(0, tensor.ndim - 1) if tensor.ndim else 0
    if tensor.ndim == 0:
        return tensor
    if kind == "longer":
        return torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
    return tensor.narrow(dim, 0, tensor.shape[dim] - 1)
