"""Random batches like those of training: ragged lengths, a chosen share of active entries."""

import torch
from torch import Tensor

SEED = 20260


def seeded(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(SEED)


def ragged_lengths(batch: int, length: int, fill: float) -> Tensor:
    """Return (B,) int64 lengths, spread evenly around `fill * length`, in random order."""
    if fill == 1:
        return torch.full((batch,), length)
    mean = fill * length
    half_width = min(length - mean, mean - 1)
    lengths = torch.linspace(mean - half_width, mean + half_width, batch).round().long()
    return lengths[torch.randperm(batch, generator=seeded("cpu"))]


def right_padding(lengths: Tensor, length: int, device: str) -> Tensor:
    """Return the attention_mask (B, L) int64 that a tokenizer gives for these lengths."""
    return (torch.arange(length) < lengths[:, None]).long().to(device)


def shift_for_active_share(pooled: Tensor, share: float | None) -> float:
    """Return the addend of the logits that makes this share of pooled entries positive; None: 0.

    Args:
        pooled: maxima over the positions of a sample of raw logits, of any shape.
        share: share of positive entries.
    """
    if share is None:
        return 0.0
    flat = pooled.float().flatten()
    return -torch.quantile(flat[: 1 << 20], 1 - share).item()
