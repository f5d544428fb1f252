"""Poolings that the kernels lack, as those that they have: last -> max, mean -> sum.

The last token is chosen before the kernel runs, so only its logits are computed. A mean is a sum
divided by the number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splade_fast._checks import POOLINGS

_OF_KERNELS = {"max": "max", "sum": "sum", "mean": "sum", "last": "max"}


def kernel_pooling(pooling: str) -> int:
    """Return the number of the pooling that the kernels compute for a pooling."""
    return POOLINGS[_OF_KERNELS[pooling]]


def last_of_padded(states: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the last attended position of each sequence, and a mask of sequences that have one.

    Args:
        states: (B, L, D).
        attention_mask: (B, L) bool, or None.

    Returns:
        States (B, 1, D), or (B, 0, D) without positions, and a mask (B, 1) bool or None.
    """
    if attention_mask is None or states.shape[1] == 0:
        return states[:, -1:], None
    positions = torch.arange(1, states.shape[1] + 1, device=states.device)
    last = (positions * attention_mask).amax(1)  # 0 where no position is attended
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows, (last - 1).clamp(min=0)][:, None], (last > 0)[:, None]


def last_of_packed(states: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last token of each packed sequence, and a mask of sequences that have one.

    Args:
        states: (T, D).
        cu_seqlens: (B + 1,) int32.

    Returns:
        States (B, 1, D), or (B, 0, D) without tokens, and a mask as wide.
    """
    has_tokens = (cu_seqlens.diff() > 0)[:, None]
    if states.shape[0] == 0:
        return states.expand(has_tokens.shape[0], -1, -1), has_tokens[:, :0]
    return states[(cu_seqlens[1:].long() - 1).clamp(min=0)][:, None], has_tokens


def mean_of_sums(
    sums: Tensor, length: int, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Return the sums divided by the numbers of their tokens; 0 where there are none.

    Args:
        sums: (B, V).
        length: number of positions of every sequence without mask and cu_seqlens.
        attention_mask: (B, L) bool, or None.
        cu_seqlens: (B + 1,) int32, or None.
    """
    if cu_seqlens is not None:
        counts = cu_seqlens.diff()
    elif attention_mask is not None:
        counts = attention_mask.sum(1)
    else:
        return sums / max(length, 1)
    return sums / counts.clamp(min=1)[:, None]
