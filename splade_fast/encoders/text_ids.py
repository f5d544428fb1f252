"""Ids of tokenized texts, by which the copies of one text are found."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

WORDS = 4  # of 64 bits


def text_ids(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return (N, 4) int64, equal for texts of equal tokens and, but for 2^-180, for no others.

    Each number is a random linear combination of the tokens modulo 2^64, the same on all ranks.
    It does not depend on the padding or on the device, and computing it does not wait for a GPU.

    Args:
        inputs: tokenized texts, `input_ids` (N, L) and `attention_mask` (N, L), without which
            there is no padding.
    """
    tokens = inputs["input_ids"].long()
    mask = inputs.get("attention_mask", torch.ones_like(tokens)) != 0
    generator = torch.Generator().manual_seed(0)
    # Rows of factors are drawn in order, so a text has the same ones at any padded length.
    factors = torch.randint(-(2**63), 2**63 - 1, (tokens.shape[1], WORDS), generator=generator).to(
        tokens.device
    )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    terms = torch.where(mask, tokens + 1, 0)  # padding adds nothing, and the token 0 does
    return torch.stack([(factors[positions, w] * terms).sum(1) for w in range(WORDS)], 1)
