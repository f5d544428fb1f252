"""Random inputs: ties, infinities and NaN, strides, masks, sparse rows."""

from random import Random

import torch
from torch import Tensor

from tests.ops.inputs import DTYPES

INF, NAN = torch.inf, torch.nan


def with_ties(draw: Random, x: Tensor) -> Tensor:
    return (x * 2).round() / 2 if draw.random() < 0.5 else x


def with_specials(draw: Random, x: Tensor, share: float = 0.05) -> Tensor:
    """Replace some elements by infinities, NaN and zeros of both signs."""
    if draw.random() < 0.6:
        return x
    specials = torch.tensor([INF, -INF, NAN, 0.0, -0.0], dtype=x.dtype)
    return torch.where(torch.rand(x.shape) < share, specials[torch.randint(5, x.shape)], x)


def with_strides(draw: Random, x: Tensor) -> Tensor:
    """Return the same elements elsewhere: in wider rows, transposed, or one element further."""
    kind = draw.choice(["as is", "as is", "wider", "transposed", "further"])
    if kind == "further":  # an address that is no multiple of 16 bytes
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if kind == "wider":
        wide = x.new_empty(*x.shape[:-1], x.shape[-1] + draw.choice([1, 2, 8]))
        return wide[..., : x.shape[-1]].copy_(x)
    return x.transpose(0, -1).contiguous().transpose(0, -1) if kind == "transposed" else x


def small_integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return values whose products and sums are exact in every order."""
    return torch.randint(-2, 3, shape).to(dtype)


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


SparseTensors = tuple[Tensor, Tensor, Tensor]


def sparse_rows(draw: Random, rows: int, columns: int, width: int) -> SparseTensors:
    """Return indices, values and lengths of rows of different lengths, with some infinities."""
    indices = torch.full((rows, width), -1, dtype=torch.int32)
    values = torch.zeros(rows, width, dtype=draw.choice(DTYPES))
    lengths = torch.zeros(rows, dtype=torch.int32)
    for row in range(rows):
        length = draw.randint(0, min(width, columns))
        lengths[row] = length
        indices[row, :length] = torch.randperm(columns)[:length].sort().values.int()
        values[row, :length] = torch.randint(-3, 4, (length,)).to(values.dtype)
        if length and draw.random() < 0.1:
            values[row, 0] = INF
    return indices, values, lengths


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Assert that all values are equal, NaN included."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
