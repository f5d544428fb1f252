"""Choose the product of the head's forward: dense or screened."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from splade_fast.ops.head import screening_hopper
from splade_fast.ops.head.screening import (
    DENSE,
    SCREENED,
    find_screening_state,
    should_consider_screening,
)

Outputs = tuple[Tensor, Tensor, Tensor]  # pooled, max_logits, argmax


class HeadArguments(NamedTuple):
    """Arguments of the op head_forward, in the order of its schema."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    pooling: int
    activation: int
    save_for_backward: bool
    float_output: bool
    algorithm: int
    source: Tensor | None  # the tensor that weight was cast from, if it was

    @property
    def for_product(self) -> tuple[object, ...]:
        """First arguments of head_forward_dense and head_forward_screened."""
        return self[: self._fields.index("algorithm")]

    @property
    def weight_source(self) -> Tensor:
        """Tensor by which the prepared weight is found: it outlives casts."""
        return self.weight if self.source is None else self.source

    @property
    def is_cuda(self) -> bool:
        """Whether the product runs on a GPU."""
        return self.hidden.device.type == "cuda"


def forward(arguments: HeadArguments) -> Outputs:
    """Compute the screened product if it is requested or expected to be faster, else the dense."""
    is_forced = arguments.algorithm == SCREENED
    if is_forced and arguments.is_cuda:
        return _forward_on_hopper(arguments)
    if is_forced or (
        arguments.algorithm != DENSE
        and should_consider_screening(
            arguments.hidden, arguments.attention_mask, arguments.save_for_backward
        )
    ):
        outputs = _forward_screened(arguments, is_forced)
        if outputs is not None:
            return outputs
    dense: Outputs = torch.ops.splade_fast.head_forward_dense(
        *arguments.for_product, arguments.is_cuda and is_tf32_permitted()
    )
    return dense


def _forward_screened(arguments: HeadArguments, is_forced: bool) -> Outputs | None:
    """Compute the screened product on the CPU, or return None where it would be slower."""
    state = find_screening_state(arguments.weight_source, arguments.weight.dtype)
    if not is_forced and not state.should_try():
        state.record_skip(
            arguments.weight_source,
            arguments.hidden,
            arguments.attention_mask,
            arguments.save_for_backward,
        )
        return None
    with state.prepare(
        arguments.weight,
        arguments.weight_source,
        arguments.bias,
        arguments.hidden,
        arguments.attention_mask,
        arguments.save_for_backward,
    ) as prepared:
        *outputs, report = torch.ops.splade_fast.head_forward_screened(
            *arguments.for_product, *prepared.arguments, not is_forced
        )
    is_declined, _, _, percent_of_product = report.tolist()
    state.record_product(percent_of_product)
    if not is_forced:
        state.record_trial(bool(is_declined))
    pooled, max_logits, argmax = outputs
    return None if is_declined else (pooled, max_logits, argmax)


def _forward_on_hopper(arguments: HeadArguments) -> Outputs:
    """Compute the screened product; the kernels go on to the dense one where too much survives."""
    screening_hopper.check_supported(arguments.hidden, arguments.pooling)
    hidden, weight, source = arguments.hidden, arguments.weight, arguments.weight_source
    if hidden.numel() == 0 or weight.numel() == 0:
        empty: Outputs = torch.ops.splade_fast.head_forward_dense(*arguments.for_product)
        return empty
    state = find_screening_state(source, weight.dtype)
    prepared = screening_hopper.prepare(state, weight, source, hidden, arguments.attention_mask)
    pooled, max_logits, argmax, _ = torch.ops.splade_fast.head_forward_screened(
        *arguments.for_product, *prepared.arguments, False
    )
    return pooled, max_logits, argmax


def is_tf32_permitted() -> bool:
    """Return whether torch's settings permit TF32 in float32 products on CUDA.

    torch has several such settings; fp32_precision reflects all of them.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
