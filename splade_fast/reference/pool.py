"""pool in plain PyTorch: the formula as it is written."""

import torch
from torch import Tensor


def activate(logits: Tensor, activation: str) -> Tensor:
    """Apply relu, log(1 + relu) or log(1 + log(1 + relu)) to each element."""
    weights = torch.relu(logits)
    if activation == "relu":
        return weights
    if activation == "log1p_relu":
        return torch.log1p(weights)
    if activation == "log1p_log1p_relu":
        return torch.log1p(torch.log1p(weights))
    raise ValueError(
        f"activation must be 'relu', 'log1p_relu' or 'log1p_log1p_relu', got {activation!r}"
    )


def splade_pool(
    logits: Tensor,
    attention_mask: Tensor | None = None,
    *,
    pooling: str = "max",
    activation: str = "log1p_relu",
) -> Tensor:
    """Compute `splade_fast.splade_pool`: (B, L, V) logits -> (B, V)."""
    weights = activate(logits, activation)
    if attention_mask is not None:
        weights = weights.masked_fill((attention_mask == 0).unsqueeze(-1), 0)
    if pooling == "sum":
        return weights.sum(dim=1)
    if pooling != "max":
        raise ValueError(f"pooling must be 'max' or 'sum', got {pooling!r}")
    if logits.shape[1] == 0:  # no position: all weights are zero
        return weights.sum(dim=1)
    # max(dim), unlike amax, sends the gradient to one position, as SPLADE implementations do.
    return weights.max(dim=1).values
