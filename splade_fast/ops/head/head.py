"""head: hidden states (B, L, D) or packed (T, D) -> pooled (B, V); the logits never exist."""

from typing import Any

import torch
from torch import Tensor

from splade_fast import _library, reference
from splade_fast._checks import (
    ACTIVATIONS,
    POOLINGS,
    check_choice,
    check_cu_seqlens,
    check_floating,
    check_like,
    check_mask,
)
from splade_fast.ops.autograd import (
    argmax_dtype,
    empty_forward,
    needs_gradient,
    refuse_double_backward,
)
from splade_fast.ops.head.forward import HeadCall, Outputs, forward
from splade_fast.ops.head.screening import ALGORITHMS, MAX_DIM, SCREENED

MAX = POOLINGS["max"]


def splade_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    pooling: str = "max",
    activation: str = "log1p_relu",
    algorithm: str = "auto",
) -> Tensor:
    """pooled[b, v] = max or sum over counted l of activation(hidden[b, l] · weight[v] + bias[v]).

    Follows SPLADE (Formal et al., SIGIR 2021; max pooling: SPLADE v2, 2021), with the product fused
    into the pooling. Accumulates in float32 (float64 for float64). Ties of the maximum go to the
    lowest position, which alone gets the gradient. Gradients are bitwise deterministic. NaN at a
    counted position shows in the output; positions that do not count are not read. Under autocast
    the product runs in the autocast dtype and the result is float32, as with log1p there. On a GPU
    float32 products follow torch's setting (torch.set_float32_matmul_precision) as torch.mm does:
    where TF32 is permitted, each operand may lose a relative 2^-10.

    Args:
        hidden: (B, L, D), or packed (T, D) with cu_seqlens; float32, float64, bfloat16 or float16.
        weight: (V, D), the decoder's weight; dtype and device of hidden.
        bias: (V,) or None; likewise.
        attention_mask: (B, L), bool, int or float; nonzero = counts. None: all count.
        cu_seqlens: (B + 1,) int32, starts of the sequences in packed hidden, ending with T.
        pooling: "max" or "sum".
        activation: "relu", "log1p_relu" (log(1 + relu)) or "log1p_log1p_relu".
        algorithm: how it is computed. "dense" multiplies everything in full precision. "screened"
            proves in int8 which logits cannot be positive or the maximum, and multiplies the others
            alone (docs/screening.md): several times faster for a trained model, slower where most
            logits are positive. "auto" finds out which is faster on the CPU, where the result is
            the same to the bit, and is "dense" on a GPU, where "screened" is for Hopper with
            SPLADE_FAST_HOPPER=1 and sums are rounded in another order.

    Returns:
        (B, V) in the dtype of hidden; a sequence without counted positions is all zero.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; on the CPU
            also cu_seqlens that do not rise from 0 to T (a RuntimeError where it is compiled).
        RuntimeError: a gradient of the gradient is asked for.
        NotImplementedError: "screened" for more than 65,536 dimensions; on a GPU also unless it is
            Hopper and was asked for, for sums, for float32 and float64, and for dimensions that
            are no multiple of 8.
    """
    check_floating("hidden", hidden)
    autocast = _autocast_dtype(hidden)
    source = weight
    if autocast is not None:
        check_floating("weight", weight)
        hidden, weight = hidden.to(autocast), weight.to(autocast)
        bias = bias.to(autocast) if bias is not None else None
    pooling_code = check_choice("pooling", pooling, POOLINGS)
    activation_code = check_choice("activation", activation, ACTIVATIONS)
    algorithm_code = check_choice("algorithm", algorithm, ALGORITHMS)
    _check_decoder(hidden, weight, bias)
    if algorithm_code == SCREENED:
        _check_screened(hidden)
    mask = check_sequences(hidden, attention_mask, cu_seqlens)
    if not _library.has_kernels(hidden.device):
        pooled = reference.splade_head(
            hidden,
            weight,
            bias,
            mask,
            cu_seqlens=cu_seqlens,
            pooling=pooling,
            activation=activation,
        )
        return pooled if autocast is None else pooled.float()
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.splade_fast.head_forward(
        hidden,
        weight,
        bias,
        mask,
        cu_seqlens,
        pooling_code,
        activation_code,
        needs_gradient(hidden, weight, bias),
        autocast is not None,
        algorithm_code,
        None if source is weight else source,
    )
    return outputs[0]


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """The dtype in which autocast wants the product; float64 is left alone, as in a Linear."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or device == "meta":
        return None
    # Dynamo of torch 2.10 cannot trace the question, and all that it compiles for has autocast.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _check_screened(hidden: Tensor) -> None:
    if hidden.ndim and hidden.shape[-1] > MAX_DIM:
        raise NotImplementedError(
            f'algorithm="screened" takes at most {MAX_DIM} dimensions, got {hidden.shape[-1]}'
        )


def _check_decoder(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The decoder fits hidden."""
    check_floating("weight", weight)
    check_like("weight", weight, "hidden", hidden)
    if weight.ndim != 2 or hidden.ndim == 0 or weight.shape[1] != hidden.shape[-1]:
        dim = hidden.shape[-1] if hidden.ndim else "?"
        raise ValueError(
            f"weight must be (vocabulary, dim) with dim = {dim} as in hidden, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_floating("bias", bias)
        check_like("bias", bias, "hidden", hidden)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"bias must be (vocabulary,) = ({weight.shape[0]},), got {tuple(bias.shape)}"
            )


def check_sequences(
    hidden: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """How hidden is cut into sequences is clear and whole; the mask comes back as bool."""
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask must be None with cu_seqlens: packed tokens all count")
        if hidden.ndim != 2:
            raise ValueError(
                f"hidden must be packed (tokens, dim) with cu_seqlens, got {tuple(hidden.shape)}"
            )
        check_cu_seqlens(cu_seqlens, hidden.shape[0], "hidden", hidden)
        return None
    if hidden.ndim != 3:
        raise ValueError(
            "hidden must be (batch, length, dim), or (tokens, dim) with cu_seqlens, "
            f"got {tuple(hidden.shape)}"
        )
    if attention_mask is None:
        return None
    return check_mask(attention_mask, hidden.shape[0], hidden.shape[1], "hidden", hidden)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    pooling: int,
    activation: int,
    save: bool,
    float_output: bool,
    algorithm: int,
    source: Tensor | None,
) -> Outputs:
    call = HeadCall(
        *(hidden, weight, bias, attention_mask, cu_seqlens),
        *(pooling, activation, save, float_output),
    )
    return forward(call, algorithm, weight if source is None else source)


def _fake_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    pooling: int,
    activation: int,
    save: bool,
    float_output: bool,
    algorithm: int,
    source: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens is not None:
        batch, position_dtype = cu_seqlens.shape[0] - 1, torch.int32
    else:
        batch, position_dtype = hidden.shape[0], argmax_dtype(hidden.shape[1])
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if float_output and half else hidden.dtype
    saved = save and pooling == MAX
    return empty_forward(hidden, batch, weight.shape[0], dtype, position_dtype, saved)


def _empty_gradients(
    hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty(weight.shape[:1] if needs[2] else (0,)),
    )


def _fake_backward_max(
    grad: Tensor,
    max_logits: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor | None,
    activation: int,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hidden, weight, needs)  # type: ignore[arg-type]


def _fake_backward_sum(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: int,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hidden, weight, needs)  # type: ignore[arg-type]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, bias, attention_mask, cu_seqlens, ctx.pooling, ctx.activation, *_ = inputs
    ctx.set_materialize_grads(False)
    if ctx.pooling == MAX:
        ctx.save_for_backward(output[1], output[2], hidden, weight, cu_seqlens)
    else:
        ctx.save_for_backward(hidden, weight, bias, attention_mask, cu_seqlens)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    needs = ctx.needs_input_grad[:3]
    if ctx.pooling == MAX:
        gradients = torch.ops.splade_fast.head_backward_max(
            grad, *ctx.saved_tensors, ctx.activation, *needs
        )
    else:
        gradients = torch.ops.splade_fast.head_backward_sum(
            grad, *ctx.saved_tensors, ctx.activation, *needs
        )
    given = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return (*given, *(None,) * 8)


if _library.is_cpu_library_loaded():
    for backend in ("CPU", "CUDA"):
        torch.library.impl("splade_fast::head_forward", backend, _forward)
    torch.library.register_fake("splade_fast::head_forward", _fake_forward)
    torch.library.register_fake("splade_fast::head_backward_max", _fake_backward_max)
    torch.library.register_fake("splade_fast::head_backward_sum", _fake_backward_sum)
    torch.library.register_autograd(
        "splade_fast::head_forward", _backward, setup_context=_setup_context
    )
    refuse_double_backward("head_backward_max")
    refuse_double_backward("head_backward_sum")
