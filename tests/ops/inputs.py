"""Inputs for the tests of the ops."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
POOLINGS = ["max", "sum"]  # of the kernels
ALL_POOLINGS = [*POOLINGS, "mean", "last"]
ACTIVATIONS = ["relu", "log1p_relu", "log1p_log1p_relu"]
MASKS = ["none", "right", "left", "holes", "empty_rows"]
# inductor compiles C++, which takes seconds; aot_eager traces the same graph and runs it eagerly.
COMPILED_POOLINGS = [("max", "inductor"), ("sum", "aot_eager")]


def lattice(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random multiples of 1/2 between -1.5 and 1.5, whose products are exact in every dtype.

    Ties of the maximum are frequent.
    """
    return (torch.randint(-3, 4, shape) / 2).to(device, dtype)


def attention_mask(kind: str, batch: int, length: int) -> Tensor | None:
    """Return a mask (batch, length) of one of the kinds in MASKS."""
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
