"""Inputs for the tests of the ops."""

import torch
from torch import Tensor

import splade_fast as sf

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
POOLINGS = ["max", "sum"]
ACTIVATIONS = ["relu", "log1p_relu", "log1p_log1p_relu"]
MASKS = ["none", "right", "left", "holes", "empty_rows"]


def lattice(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Multiples of 1/2 between -1.5 and 1.5: logits are exact in every dtype, an argmax is certain.

    Ties are frequent, which tests that they go to the lowest position.
    """
    return (torch.randint(-3, 4, shape) / 2).to(device, dtype)


def attention_mask(kind: str, batch: int, length: int) -> Tensor | None:
    if kind == "none":
        return None
    lengths = torch.linspace(1, length, batch).long() if batch else torch.zeros(0).long()
    positions = torch.arange(length)
    if kind == "right":
        return positions < lengths[:, None]
    if kind == "left":
        return positions >= length - lengths[:, None]
    mask = torch.rand(batch, length) < 0.6
    if kind == "empty_rows":
        mask[::2] = False
    return mask


def instruction_sets_here() -> list[str]:
    """Those of the build that this machine runs, the least first."""
    info = sf.build_info()
    built = info["built"]["cpu_instruction_sets"].split()
    return built[: built.index(info["cpu_instruction_set"]) + 1]
