"""Mask of the documents that a search may find."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_mask(allowed: Tensor | Sequence[int], count: int) -> Tensor:
    """Return a mask (count,) of the documents that may be found.

    Args:
        allowed: such a mask, or ids in any order.
        count: number of documents.

    Raises:
        TypeError, ValueError: `allowed` is neither.
    """
    chosen = torch.as_tensor(allowed, device="cpu")
    if chosen.dtype == torch.bool:
        if chosen.shape != (count,):
            raise ValueError(f"allowed must be a mask ({count},), got shape {tuple(chosen.shape)}")
        return chosen.contiguous()
    if chosen.numel() == 0:
        return torch.zeros(count, dtype=torch.bool)
    if chosen.dim() != 1 or chosen.is_floating_point() or chosen.is_complex():
        raise TypeError(
            f"allowed must be a mask of bool or a list of ids, got {chosen.dtype} "
            f"{tuple(chosen.shape)}"
        )
    lowest, highest = int(chosen.min()), int(chosen.max())
    if lowest < 0 or highest >= count:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"allowed must hold ids from 0 to {count - 1}, got {wrong}")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[chosen.long()] = True
    return mask
