"""The masked-LM decoder followed by pooling, with all (B, L, V) logits in memory."""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear

from splade_fast.reference.pool import splade_pool


def splade_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    pooling: str = "max",
    activation: str = "log1p_relu",
    precision: str | None = None,
) -> Tensor:
    """splade_pool(hidden @ weight.T + bias): (B, L, D) or packed (T, D) hidden states -> (B, V).

    precision="fp8": the value is that of hidden and weight rounded to e4m3, the gradient as if they
    were not, at the position and the value of the rounded maximum.
    """
    logits = linear(hidden, weight, bias)
    pool = partial(
        _pool_sequences,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        pooling=pooling,
        activation=activation,
    )
    if precision is None:
        return pool(logits)
    rounded_hidden = round_sequences(hidden, attention_mask, cu_seqlens)
    rounded_logits = linear(rounded_hidden, round_to_e4m3(weight, 1), bias).detach()
    if pooling == "max":
        return pool(_with_gradient_of(logits, rounded_logits))
    return _with_gradient_of(pool(logits), pool(rounded_logits))


def _pool_sequences(
    logits: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    pooling: str,
    activation: str,
) -> Tensor:
    if cu_seqlens is None:
        return splade_pool(logits, attention_mask, pooling=pooling, activation=activation)
    bounds = cu_seqlens.tolist()
    if len(bounds) == 1:
        return logits[:0]
    return torch.cat(
        [
            splade_pool(logits[None, start:stop], pooling=pooling, activation=activation)
            for start, stop in pairwise(bounds)
        ]
    )


def round_to_e4m3(x: Tensor, dims: int | tuple[int, ...], counts: Tensor | None = None) -> Tensor:
    """x in steps of e4m3 times a scale: the least power of two with max |x| over dims <= 448 scale.

    Only what counts (True in counts, None: all) takes part in the maximum. All is NaN where that is
    not finite.
    """
    size = x.detach().double().abs()
    if counts is not None:
        size = size.where(counts, 0)
    largest = size.amax(dims, keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448))).clamp(min=2.0**-126)
    scale = scale.where(largest.isfinite(), torch.nan)
    return (x.detach().double() / scale).to(torch.float8_e4m3fn).double().mul(scale).to(x.dtype)


def round_sequences(
    hidden: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """round_to_e4m3 with a scale of each sequence, of its positions that count."""
    if cu_seqlens is None:
        counts = None if attention_mask is None else (attention_mask != 0)[..., None]
        return round_to_e4m3(hidden, (1, 2), counts) if hidden.numel() else hidden
    lengths = cu_seqlens.diff().tolist()
    return torch.cat(
        [hidden[:0], *(round_to_e4m3(x, (0, 1)) for x in hidden.split(lengths) if len(x))]
    )


def _with_gradient_of(x: Tensor, value: Tensor) -> Tensor:
    """The value, with the gradient that x has."""
    return value + (x - x.detach())
