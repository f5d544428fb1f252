"""Helpers that the autograd registrations of the ops share."""

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from splade_fast import _library


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether a forward has to save tensors for a backward."""
    return torch.is_grad_enabled() and any(
        tensor is not None and (tensor.requires_grad or _is_mapped(tensor)) for tensor in tensors
    )


def _is_mapped(tensor: Tensor) -> bool:
    """Return whether torch.func.vmap has wrapped a tensor, which hides its requires_grad."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def argmax_dtype(length: int | torch.SymInt) -> torch.dtype:
    """Return the smallest integer dtype that holds the positions 0 to length - 1."""
    if length <= 256:
        return torch.uint8
    return torch.int16 if length <= 32768 else torch.int32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over values of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_forward(
    like: Tensor,
    batch: int | torch.SymInt,
    vocabulary: int | torch.SymInt,
    pooled_dtype: torch.dtype,
    position_dtype: torch.dtype,
    saved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of a forward, uninitialised: pooled, max_logits, argmax."""
    shape = (batch, vocabulary)
    saved_shape = shape if saved else (0,)
    return (
        like.new_empty(shape, dtype=pooled_dtype),
        like.new_empty(saved_shape, dtype=accumulation_dtype(like.dtype)),
        like.new_empty(saved_shape, dtype=position_dtype),
    )


def refuse_forward_mode(function: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError for dual tensors, whose tangents the ops would drop.

    Tensors of torch.func.grad are refused too: torch's error would not name the function.

    Args:
        function: name of the public function.
        tensors: its differentiable arguments.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if any(has_tangent(tensor) for tensor in given):
        raise RuntimeError(
            f"{function} has no forward-mode derivative, which torch.func.jvp or forward_ad asks "
            "for. Use splade_fast.reference for it."
        )
    if not torch.compiler.is_compiling() and any(
        torch._C._functorch.is_gradtrackingtensor(tensor) for tensor in given
    ):
        raise RuntimeError(
            f"{function} has no derivative under torch.func.grad, vjp and jacrev. Use "
            "torch.autograd.grad or splade_fast.reference for it."
        )


def has_tangent(tensor: Tensor) -> bool:
    """Return whether a tensor carries the tangent of a forward-mode derivative."""
    return unpack_dual(tensor).tangent is not None


def refuse_double_backward(op: str) -> None:
    """Register a backward of a backward op that raises a RuntimeError with a clear message."""

    def backward(ctx: object, *grads: object) -> None:
        raise RuntimeError(
            f"{op} is differentiable once: its gradient has no gradient of its own. "
            "Use splade_fast.reference for double backward."
        )

    if _library.is_cpu_library_loaded():
        torch.library.register_autograd(f"splade_fast::{op}", backward)
