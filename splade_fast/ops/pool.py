"""pool: logits (B, L, V) -> pooled (B, V), without a second tensor as large as the logits."""

from typing import Any

import torch
from torch import Tensor

from splade_fast import _library, reference
from splade_fast._checks import (
    ACTIVATIONS,
    POOLINGS,
    check_choice,
    check_floating,
    check_mask,
)
from splade_fast.ops.autograd import (
    argmax_dtype,
    empty_forward,
    needs_gradient,
    refuse_double_backward,
    refuse_forward_mode,
)
from splade_fast.ops.pooling import kernel_pooling, last_of_padded, mean_of_sums

MAX = POOLINGS["max"]


def splade_pool(
    logits: Tensor,
    attention_mask: Tensor | None = None,
    *,
    pooling: str = "max",
    activation: str = "log1p_relu",
) -> Tensor:
    """Pool the logits of each sequence into one weight per vocabulary entry.

    pooled[b, v] = max, sum or mean over l with attention_mask[b, l] ≠ 0, or the value at the last
    such l, of activation(logits[b, l, v])

    Follows SPLADE (Formal et al., SIGIR 2021) with the max pooling of SPLADE v2 (2021). Sums are
    accumulated in float32 (float64 for float64). Ties of the maximum go to the lowest position,
    which alone gets the gradient. NaN at an attended position propagates to the output. Masked
    positions are not read.

    Args:
        logits: (B, L, V), float32, float64, bfloat16 or float16, with any strides.
        attention_mask: (B, L), bool, int or float; positions with 0 are left out. None: all
            positions take part.
        pooling: "max", "sum", "mean" or "last".
        activation: "relu", "log1p_relu" (log(1 + relu)) or "log1p_log1p_relu".

    Returns:
        (B, V) in the dtype of logits, also under autocast. A sequence whose positions are all
        masked gives zeros.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: a second or a forward-mode derivative is requested.

    Example::

        >>> logits = torch.tensor([[[2.0, -1.0], [0.5, 3.0]]])
        >>> sf.splade_pool(logits, activation="relu")
        tensor([[2., 3.]])
    """
    check_floating("logits", logits)
    if logits.ndim != 3:
        raise ValueError(f"logits must be (batch, length, vocabulary), got {tuple(logits.shape)}")
    check_choice("pooling", pooling, POOLINGS)
    activation_code = check_choice("activation", activation, ACTIVATIONS)
    mask = None
    if attention_mask is not None:
        mask = check_mask(attention_mask, logits.shape[0], logits.shape[1], "logits", logits)
    if not _library.has_kernels(logits.device):
        return reference.splade_pool(logits, mask, pooling=pooling, activation=activation)
    refuse_forward_mode("splade_pool", logits)
    dtype = logits.dtype
    if pooling == "last":
        logits, mask = last_of_padded(logits, mask)
    if pooling == "mean" and activation == "relu" and dtype == torch.float16:
        logits = logits.float()  # the sum of large logits may exceed the range of float16
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.splade_fast.pool_forward(
        logits, mask, kernel_pooling(pooling), activation_code, needs_gradient(logits)
    )
    if pooling != "mean":
        return outputs[0]
    return mean_of_sums(outputs[0], logits.shape[1], mask, None).to(dtype)


def _fake_forward(
    logits: Tensor, attention_mask: Tensor | None, pooling: int, activation: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, vocabulary = logits.shape
    saved = save and pooling == MAX
    return empty_forward(logits, batch, vocabulary, logits.dtype, argmax_dtype(length), saved)


def _fake_backward_max(
    grad: Tensor, max_logits: Tensor, argmax: Tensor, length: int, activation: int
) -> Tensor:
    return grad.new_empty(grad.shape[0], length, grad.shape[1])


def _fake_backward_sum(
    grad: Tensor, logits: Tensor, attention_mask: Tensor | None, activation: int
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    logits, attention_mask, ctx.pooling, ctx.activation, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.length = logits.shape[1]
    if ctx.pooling == MAX:
        ctx.save_for_backward(output[1], output[2])
    else:
        ctx.save_for_backward(logits, attention_mask)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    if ctx.pooling == MAX:
        max_logits, argmax = ctx.saved_tensors
        grad_logits = torch.ops.splade_fast.pool_backward_max(
            grad, max_logits, argmax, ctx.length, ctx.activation
        )
    else:
        logits, attention_mask = ctx.saved_tensors
        grad_logits = torch.ops.splade_fast.pool_backward_sum(
            grad, logits, attention_mask, ctx.activation
        )
    return grad_logits, None, None, None, None


if _library.is_cpu_library_loaded():
    torch.library.register_fake("splade_fast::pool_forward", _fake_forward)
    torch.library.register_fake("splade_fast::pool_backward_max", _fake_backward_max)
    torch.library.register_fake("splade_fast::pool_backward_sum", _fake_backward_sum)
    torch.library.register_autograd(
        "splade_fast::pool_forward", _backward, setup_context=_setup_context
    )
    refuse_double_backward("pool_backward_max")
    refuse_double_backward("pool_backward_sum")
