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
    if pooling == "mean":
        return weights.sum(dim=1) / _count_positions(logits, attention_mask).clamp(min=1)
    if pooling not in ("max", "last"):
        raise ValueError(f"pooling must be 'max', 'sum', 'mean' or 'last', got {pooling!r}")
    if logits.shape[1] == 0:  # no position: all weights are zero
        return weights.sum(dim=1)
    if pooling == "last":
        rows = torch.arange(logits.shape[0], device=logits.device)
        return weights[rows, _last_position(logits, attention_mask)]
    # max(dim), unlike amax, sends the gradient to one position, as SPLADE implementations do.
    return weights.max(dim=1).values


def _count_positions(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the number of attended positions of each sequence, (B, 1)."""
    is_attended = _is_attended(logits, attention_mask)
    return is_attended.sum(dim=1, keepdim=True)


def _last_position(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the last attended position of each sequence, (B,); 0 if there is none."""
    is_attended = _is_attended(logits, attention_mask)
    positions = torch.arange(is_attended.shape[1], device=logits.device)
    return torch.where(is_attended, positions, 0).amax(dim=1)


def _is_attended(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return attention_mask != 0
