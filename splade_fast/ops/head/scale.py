"""Factor of the logits, applied to the arguments of the head: s (h · w + b) = (s h) · w + s b."""

from __future__ import annotations

import math
from numbers import Real

from torch import Tensor

from splade_fast._checks import check_device, check_floating


def scale_logits(
    hidden: Tensor, bias: Tensor | None, logit_scale: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return hidden and bias by which the head computes the logits times logit_scale.

    Raises:
        TypeError, ValueError: logit_scale is not a finite number or a tensor of one.
    """
    check_logit_scale(logit_scale, hidden)
    if not isinstance(logit_scale, Tensor):
        if logit_scale == 1:
            return hidden, bias
        return hidden * logit_scale, None if bias is None else bias * logit_scale
    if bias is not None:
        check_floating("bias", bias)
        check_device("bias", bias, "hidden", hidden)
    # A scale of a wider dtype is not rounded to that of the states.
    scale = logit_scale.reshape(1)
    scaled = None if bias is None else (bias * scale).to(bias.dtype)
    return (hidden * scale).to(hidden.dtype), scaled


def check_logit_scale(logit_scale: object, hidden: Tensor | None = None) -> None:
    """Raise unless the scale is a finite number or a tensor of one on the device of hidden."""
    if isinstance(logit_scale, Tensor):
        check_floating("logit_scale", logit_scale)
        if logit_scale.numel() != 1:
            raise ValueError(
                f"logit_scale must be a tensor of one number, got {tuple(logit_scale.shape)}"
            )
        if hidden is not None:
            check_device("logit_scale", logit_scale, "hidden", hidden)
    elif isinstance(logit_scale, bool) or not isinstance(logit_scale, Real):
        raise TypeError(
            f"logit_scale must be a number or a tensor, got {type(logit_scale).__name__}"
        )
    elif not abs(float(logit_scale)) < math.inf:  # torch.compile traces no math.isfinite
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
