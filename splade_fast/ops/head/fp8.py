"""Rounding to e4m3 with a scale per sequence and per row of the weight, as precision="fp8" does.

Scales are powers of two, so that dividing by them is exact: the one rounding is that to e4m3.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

_E4M3 = torch.float8_e4m3fn
_INF = float("inf")
# Its scale is the smallest normal float32.
_SMALLEST = 2.0**-118


def scales(largest: Tensor) -> Tensor:
    """The least power of two s with largest <= 448 s, in float32; NaN for what is not finite."""
    # 448 is 1.75 * 2**8: the exponent, one higher where the mantissa is above 1.75, minus 8.
    bits = largest.clamp(min=_SMALLEST).view(torch.int32)
    powers = ((((bits + 0x1FFFFF) >> 23) - 8) << 23).view(torch.float32)
    return torch.where(largest < _INF, powers, torch.nan)


def weight_scales(weight: Tensor) -> Tensor:
    """(V,) of a weight (V, D)."""
    return scales(_largest(weight))


def hidden_scales(
    hidden: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B,) of the positions of each sequence that count, and the same for each token.

    The latter is (B, 1) for hidden (B, L, D), and (T,) for packed hidden (T, D); anything for
    tokens of no sequence, which the values of cu_seqlens on a GPU may leave.
    """
    of_token = _largest(hidden)
    if cu_seqlens is None:
        if attention_mask is not None:
            of_token = torch.where(attention_mask, of_token, 0.0)
        of_sequence = scales(pad(of_token, (0, 1)).amax(1))
        return of_sequence, of_sequence[:, None]
    batch = cu_seqlens.shape[0] - 1
    tokens = torch.arange(hidden.shape[0], dtype=torch.int32, device=hidden.device)
    # batch for tokens before the first sequence and behind the last.
    sequence = (torch.searchsorted(cu_seqlens.contiguous(), tokens, right=True) - 1) % (batch + 1)
    largest = of_token.new_zeros(batch + 1).scatter_reduce_(0, sequence, of_token, "amax")
    of_every = scales(largest)
    return of_every[:batch], of_every[sequence]


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale in e4m3; the scale is one of each row of x."""
    wide = x.float() if x.dtype == torch.float16 else x
    return (wide * scale.reciprocal()[..., None].to(wide.dtype)).to(_E4M3)


def restored(quantised: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What was rounded, scaled back: exact in bfloat16 and float32."""
    return quantised.to(dtype) * scale[..., None].to(dtype)


def _largest(rows: Tensor) -> Tensor:
    """The largest absolute value of each row, in float32; inf where one is not finite."""
    if rows.shape[-1] == 0:
        return rows.new_zeros(rows.shape[:-1], dtype=torch.float32)
    largest = torch.maximum(rows.amax(-1), -rows.amin(-1))
    return largest.float().nan_to_num(nan=_INF, posinf=_INF)
