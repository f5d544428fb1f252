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
from splade_fast._distributed import is_shard
from splade_fast.ops.autograd import (
    argmax_dtype,
    empty_forward,
    needs_gradient,
    refuse_double_backward,
    refuse_forward_mode,
)
from splade_fast.ops.head.forward import HeadArguments, Outputs, forward
from splade_fast.ops.head.scale import scale_logits
from splade_fast.ops.head.screening import ALGORITHMS, MAX_DIM, SCREENED
from splade_fast.ops.pooling import (
    kernel_pooling,
    last_of_packed,
    last_of_padded,
    mean_of_sums,
)

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
    logit_scale: float | Tensor = 1.0,
    algorithm: str = "auto",
) -> Tensor:
    """Compute the vocabulary weights of sequences from hidden states, without storing logits.

    pooled[b, v] = max, sum or mean over l with attention_mask[b, l] ≠ 0, or the value at the last
    such l, of activation(logit_scale · (hidden[b, l] · weight[v] + bias[v]))

    Follows SPLADE (Formal et al., SIGIR 2021) with the max pooling of SPLADE v2 (2021); the product
    is fused into the pooling. Products are accumulated in float32 (float64 for float64). Ties of
    the maximum go to the lowest position, which alone gets the gradient. Gradients are bitwise
    deterministic. NaN at an attended position propagates to the output. Masked positions are not
    read. The scale multiplies hidden and bias, which are rounded to their dtype once more unless it
    is a power of two. Under autocast the product runs in the autocast dtype and the result is
    float32. On a GPU float32 products follow `torch.set_float32_matmul_precision`, as `torch.mm`
    does: where TF32 is permitted, each operand may lose a relative 2^-10.

    Args:
        hidden: (B, L, D), or packed (T, D) with cu_seqlens; float32, float64, bfloat16 or float16.
        weight: (V, D), weight of the decoder, in the dtype and on the device of hidden.
        bias: (V,), likewise, or None.
        attention_mask: (B, L), bool, int or float; positions with 0 are left out. None: all
            positions take part.
        cu_seqlens: (B + 1,) int32, the start of each sequence in packed hidden, then T.
        pooling: "max", "sum", "mean" or "last"; "last" computes logits of one position only.
        activation: "relu", "log1p_relu" (log(1 + relu)) or "log1p_log1p_relu".
        logit_scale: factor of the logits, a finite number, or a tensor of one, which gets its
            gradient. 1/16 keeps models with large logits, such as ModernBERT, from collapsing in
            training (Jang et al., arXiv:2606.18811).
        algorithm: "dense" computes all logits in full precision. "screened" first proves with int8
            products which logits cannot be positive or the maximum, and computes only the others
            (docs/screening.md): several times faster for a trained model, slower where most logits
            are positive. "auto" chooses the faster one on the CPU, where both give the same bits,
            and "dense" on a GPU. On a GPU "screened" needs Hopper and SPLADE_FAST_HOPPER=1, and
            rounds sums in another order.

    Returns:
        (B, V) in the dtype of hidden. A sequence whose positions are all masked gives zeros.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or, on the
            CPU, cu_seqlens does not rise from 0 to T (a RuntimeError in compiled code).
        RuntimeError: a second or a forward-mode derivative is requested.
        NotImplementedError: algorithm is "screened" and hidden has more than 65,536 dimensions, or
            is on a GPU and is not supported there.

    Example::

        >>> hidden = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> weight = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [3.0, 0.0]])
        >>> sf.splade_head(hidden, weight, activation="relu")
        tensor([[2., 0., 3.]])
    """
    check_floating("hidden", hidden)
    hidden, bias = scale_logits(hidden, bias, logit_scale)
    autocast = _autocast_dtype(hidden)
    source = weight
    if autocast is not None:
        check_floating("weight", weight)
        hidden, weight = hidden.to(autocast), weight.to(autocast)
        bias = bias.to(autocast) if bias is not None else None
    check_choice("pooling", pooling, POOLINGS)
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
    refuse_forward_mode("splade_head", hidden, weight, bias)
    if pooling == "last":
        hidden, mask = (
            last_of_padded(hidden, mask)
            if cu_seqlens is None
            else last_of_packed(hidden, cu_seqlens)
        )
        cu_seqlens = None
    is_mean = pooling == "mean"
    outputs: Outputs = torch.ops.splade_fast.head_forward(
        *HeadArguments(
            hidden=hidden,
            weight=weight,
            bias=bias,
            attention_mask=mask,
            cu_seqlens=cu_seqlens,
            pooling=kernel_pooling(pooling),
            activation=activation_code,
            save_for_backward=needs_gradient(hidden, weight, bias),
            # A mean is rounded once: its sum stays in float32.
            float_output=autocast is not None or is_mean,
            algorithm=algorithm_code,
            source=None if source is weight else source,
        )
    )
    if not is_mean:
        return outputs[0]
    mean = mean_of_sums(outputs[0], hidden.shape[-2], mask, cu_seqlens)
    return mean if autocast is not None else mean.to(hidden.dtype)


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """Return the dtype of the product under autocast; None without autocast and for float64."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or device == "meta":
        return None
    # Dynamo of torch 2.10 cannot trace this call; all devices that it compiles for have autocast.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _check_screened(hidden: Tensor) -> None:
    """Raise NotImplementedError if hidden has too many dimensions for int8 products."""
    if hidden.ndim and hidden.shape[-1] > MAX_DIM:
        raise NotImplementedError(
            f'algorithm="screened" takes at most {MAX_DIM} dimensions, got {hidden.shape[-1]}'
        )


def _check_decoder(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise if the decoder does not fit hidden."""
    if not torch.compiler.is_compiling() and is_shard(weight):
        raise ValueError(
            "weight must be whole, got a shard: FSDP2 gathers it in the forward of the module that "
            "fully_shard was applied to"
        )
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
    """Return the mask as bool. Raise if hidden, mask and cu_seqlens do not go together."""
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError(
                "attention_mask must be None with cu_seqlens: packed tokens have no padding"
            )
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


def _forward(*arguments: Any) -> Outputs:
    return forward(HeadArguments(*arguments))


def _fake_forward(*arguments: Any) -> Outputs:
    call = HeadArguments(*arguments)
    if call.cu_seqlens is not None:
        batch, position_dtype = call.cu_seqlens.shape[0] - 1, torch.int32
    else:
        batch, position_dtype = call.hidden.shape[0], argmax_dtype(call.hidden.shape[1])
    dtype = call.hidden.dtype
    if call.float_output and dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32
    has_saved = call.save_for_backward and call.pooling == MAX
    vocabulary = call.weight.shape[0]
    return empty_forward(call.hidden, batch, vocabulary, dtype, position_dtype, has_saved)


def _fake_gradients(
    hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty(weight.shape[:1] if needs_bias else (0,)),
    )


def _fake_backward_max(
    grad: Tensor, max_logits: Tensor, argmax: Tensor, hidden: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, *others[-3:])


def _fake_backward_sum(
    grad: Tensor, hidden: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, *others[-3:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    call = HeadArguments(*inputs)
    ctx.set_materialize_grads(False)
    ctx.pooling, ctx.activation = call.pooling, call.activation
    if call.pooling == MAX:
        _, max_logits, argmax = output
        ctx.save_for_backward(max_logits, argmax, call.hidden, call.weight, call.cu_seqlens)
    else:
        ctx.save_for_backward(
            call.hidden, call.weight, call.bias, call.attention_mask, call.cu_seqlens
        )


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    no_gradients = (None,) * len(HeadArguments._fields)
    if grad is None:
        return no_gradients
    needs = ctx.needs_input_grad[:3]  # hidden, weight, bias
    ops = torch.ops.splade_fast
    backward = ops.head_backward_max if ctx.pooling == MAX else ops.head_backward_sum
    gradients = backward(grad, *ctx.saved_tensors, ctx.activation, *needs)
    given = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return (*given, *no_gradients[3:])


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
