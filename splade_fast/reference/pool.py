"""Log-saturation pooling of given logits, as the formula reads."""

import torch
from torch import Tensor


def activate(logits: Tensor, activation: str) -> Tensor:
    """The saturation of SPLADE, element by element: relu, log(1 + relu), log(1 + log(1 + relu))."""
    weights = torch.relu(logits)
    if activation == "relu":
        return weights
    if activation == "log1p_relu":
        return torch.log1p(weights)
    if activation == "log1p_log1p_relu":
        return torch.log1p(torch.log1p(weights))
    raise ValueError(f"unknown activation {activation!r}")


def splade_pool(
    logits: Tensor,
    attention_mask: Tensor | None = None,
    *,
    pooling: str = "max",
    activation: str = "log1p_relu",
) -> Tensor:
    """max or sum over the counted positions l of activation(logits[b, l, v]) -> (B, V)."""
    weights = activate(logits, activation)
    if attention_mask is not None:
        weights = weights.masked_fill((attention_mask == 0).unsqueeze(-1), 0)
    if pooling == "sum":
        return weights.sum(dim=1)
    if pooling != "max":
        raise ValueError(f"unknown pooling {pooling!r}")
    if logits.shape[1] == 0:  # the maximum of nothing is a vector without terms
        return weights.sum(dim=1)
    # max(dim) and not amax: the gradient goes to one position, as in every SPLADE implementation.
    return weights.max(dim=1).values
