"""What the autograd registrations of the ops share."""

import torch
from torch import Tensor

from splade_fast import _library


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a forward has to save anything for a backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def argmax_dtype(length: int | torch.SymInt) -> torch.dtype:
    """The smallest integer type that holds positions 0 … length - 1."""
    if length <= 256:
        return torch.uint8
    return torch.int16 if length <= 32768 else torch.int32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_forward(
    like: Tensor,
    batch: int | torch.SymInt,
    vocabulary: int | torch.SymInt,
    pooled_dtype: torch.dtype,
    position_dtype: torch.dtype,
    saved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of a forward without their values: pooled, max_logits, argmax."""
    shape = (batch, vocabulary)
    saved_shape = shape if saved else (0,)
    return (
        like.new_empty(shape, dtype=pooled_dtype),
        like.new_empty(saved_shape, dtype=accumulation_dtype(like.dtype)),
        like.new_empty(saved_shape, dtype=position_dtype),
    )


def refuse_double_backward(op: str) -> None:
    """Register a backward for a backward op that says clearly that there is none."""

    def backward(ctx: object, *grads: object) -> None:
        raise RuntimeError(
            f"{op} is differentiable once: its gradient has no gradient of its own. "
            "Use splade_fast.reference for double backward."
        )

    if _library.cpu_library_loaded():
        torch.library.register_autograd(f"splade_fast::{op}", backward)
