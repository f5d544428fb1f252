"""Rows rounded as the kernel does it, in plain PyTorch: int8 with a scale a row; or bfloat16."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from benchmarks.inputs.inputs import seeded
from benchmarks.inputs.trained import TrainedInputs

# Rounded to int8 but for the last; "centring" takes the mean of the tokens from them and puts its
# product with the weight back exactly; "rotation" is a random sign flip and a Hadamard transform.
REMEDIES = ("none", "centring", "rotation", "centring and rotation", "bfloat16")

_LEVELS = 127
_MAX_BLOCK = 1024


@dataclass(frozen=True)
class RoundedRows:
    rounded: Tensor  # (N, D)
    norm: Tensor  # (N,), before rounding
    residual: Tensor  # (N,), the norm of what rounding took away

    @property
    def norm_of_rounded(self) -> Tensor:
        norm: Tensor = vector_norm(self.rounded, dim=1)
        return norm


def rounded_inputs(inputs: TrainedInputs, remedy: str) -> tuple[RoundedRows, RoundedRows, Tensor]:
    """Tokens and weight, and what to add to their products for logits: (V,)."""
    tokens, weight, shift = inputs.tokens, inputs.weight, inputs.bias
    if "centring" in remedy:
        mean = tokens.mean(0)
        tokens, shift = tokens - mean, shift + weight @ mean
    if "rotation" in remedy:
        tokens, weight = rotated(tokens), rotated(weight)
    to_rounded = _to_bfloat16 if remedy == "bfloat16" else _to_int8
    return _rounded(tokens, to_rounded(tokens)), _rounded(weight, to_rounded(weight)), shift


def rotated(rows: Tensor) -> Tensor:
    """Every dot product stays; blocks as long as the power of two that divides the dimension."""
    dim = rows.shape[1]
    block = min(dim & -dim, _MAX_BLOCK)
    signs = torch.randint(0, 2, (dim,), generator=seeded("cpu")) * 2.0 - 1
    return ((rows * signs).reshape(-1, block) @ _hadamard(block).to(rows)).reshape(rows.shape)


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / math.sqrt(size)


def _to_int8(rows: Tensor) -> Tensor:
    scale = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny) / _LEVELS
    return (rows / scale).round() * scale


def _to_bfloat16(rows: Tensor) -> Tensor:
    return rows.bfloat16().to(rows.dtype)


def _rounded(rows: Tensor, rounded: Tensor) -> RoundedRows:
    return RoundedRows(rounded, vector_norm(rows, dim=1), vector_norm(rows - rounded, dim=1))
