"""Random inputs of the ops: any shape, dtype and strides; values whose sums are exact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

import splade_fast as sf
from tests.ops.inputs import ACTIVATIONS, DTYPES, POOLINGS

T = TypeVar("T")

LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")
SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0)


class Draws(ABC):
    """Source of values that a fuzzer chooses."""

    @abstractmethod
    def integer(self, low: int, high: int) -> int:
        """Return an integer from low to high."""

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def boolean(self) -> bool:
        return self.choice((False, True))

    def dtype(self) -> torch.dtype:
        return self.choice(DTYPES)

    def values(self, shape: Sequence[int], dtype: torch.dtype, special: bool = False) -> Tensor:
        """Return multiples of 1/2 between -1.5 and 1.5, with special also inf and NaN."""
        generator = self.generator()
        values = torch.randint(-3, 4, tuple(shape), generator=generator) / 2
        if special and self.boolean() and values.numel():
            for _ in range(self.integer(1, 3)):
                place = int(torch.randint(values.numel(), (), generator=generator))
                values.view(-1)[place] = self.choice(SPECIAL)
        return self.layout(values.to(dtype))

    def mask(self, *shape: int) -> Tensor:
        return self.layout(torch.rand(shape, generator=self.generator()) < self.choice((0, 0.5, 1)))

    def layout(self, tensor: Tensor) -> Tensor:
        """Return the tensor with other strides; "expanded" makes its rows equal."""
        layout = self.choice(LAYOUTS)
        if tensor.ndim == 0 or layout == "contiguous":
            return tensor
        if layout == "transposed":
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "strided":
            wide = tensor.repeat_interleave(2, dim=-1)
            return wide[..., ::2]
        if layout == "offset":
            flat = torch.cat([tensor.new_zeros(1), tensor.flatten()])
            return flat[1:].view(tensor.shape)
        return tensor[:1].expand(tensor.shape) if len(tensor) else tensor

    def sparse_rows(
        self, rows: int, num_cols: int, dtype: torch.dtype, special: bool = False
    ) -> sf.SparseRows:
        dense = self.values((rows, num_cols), dtype, special)
        found = sf.SparseRows.from_dense(dense)
        return sf.SparseRows(
            self.layout_of_rows(found.indices), found.values, found.lengths, num_cols
        )

    def layout_of_rows(self, tensor: Tensor) -> Tensor:
        """Return the tensor with other strides, but contiguous rows."""
        return tensor.t().contiguous().t() if self.boolean() else tensor

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.integer(0, 2**31))

    def pooling(self) -> dict[str, Any]:
        return {"pooling": self.choice(POOLINGS), "activation": self.choice(ACTIVATIONS)}

    def bounds(self, sequences: int, tokens: int) -> Tensor:
        """Return cu_seqlens for a number of sequences, some of them empty."""
        if sequences == 0:
            return torch.zeros(1, dtype=torch.int32)
        inner = torch.randint(0, tokens + 1, (sequences - 1,), generator=self.generator())
        ends = (torch.zeros(1).long(), inner.sort()[0], torch.tensor([tokens]))
        return torch.cat(ends).int()


class DrawsOfHypothesis(Draws):
    """Source of values that hypothesis chooses and shrinks."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))


class DrawsOfBytes(Draws):
    """Source of values that a byte string encodes; after its end all values are the lowest."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._place = 0

    def integer(self, low: int, high: int) -> int:
        options = high - low + 1
        end = self._place + (options - 1).bit_length() // 8 + 1
        taken, self._place = self._content[self._place : end], end
        return low + int.from_bytes(taken, "little") % options
