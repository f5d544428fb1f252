"""head in plain PyTorch: the decoder, then pooling, with all (B, L, V) logits in memory."""

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
    logit_scale: float | Tensor = 1.0,
) -> Tensor:
    """Compute splade_pool(logit_scale * (hidden @ weight.T + bias)).

    hidden is (B, L, D), or packed (T, D) with cu_seqlens.
    """
    logits = linear(hidden, weight, bias)
    logits = (logits * logit_scale).to(logits.dtype)
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
