"""SparseRows: a batch of sparse vectors as padded rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from splade_fast._checks import check_count, check_tensor
from splade_fast.ops.prune import dense_rows, prune_rows
from splade_fast.ops.sparse_rows.checks import check_contents, check_layout
from splade_fast.ops.sparse_rows.columns import TokenNames, name_columns
from splade_fast.ops.sparse_rows.conversions import (
    entries_from_dicts,
    entries_from_scipy,
    entries_from_torch_csr,
    pad_entries,
)
from splade_fast.ops.sparse_rows.file import read_file, write_file

if TYPE_CHECKING:
    from scipy.sparse import csr_array


class SparseRows:
    """B sparse vectors over V columns, stored as padded rows of K slots.

    Row b has the value values[b, j] at column indices[b, j], for j below lengths[b].

    Args:
        indices: (B, K) int32, ascending within a row; unused slots at the end of a row hold -1.
        values: (B, K) floating point; unused slots hold 0.
        lengths: (B,) int32, number of used slots of each row.
        num_cols: V, the size of the vocabulary, at most 2^31 - 2.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape or device. The contents of the
            tensors are not checked, as that would wait for a GPU; see `check_contents`.

    Example::

        >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]]))
        >>> rows
        SparseRows(2 rows, num_cols=3, width=2, dtype=torch.float32, device=cpu)
        >>> rows.indices
        tensor([[ 1,  2],
                [ 0, -1]], dtype=torch.int32)
    """

    __slots__ = ("indices", "lengths", "num_cols", "values")

    def __init__(self, indices: Tensor, values: Tensor, lengths: Tensor, num_cols: int) -> None:
        num_cols = check_count("num_cols", num_cols, 0)
        check_layout(indices, values, lengths, num_cols)
        self.indices = indices
        self.values = values
        self.lengths = lengths
        self.num_cols = num_cols

    @classmethod
    def from_dense(
        cls,
        x: Tensor,
        k: int | None = None,
        *,
        threshold: float = 0.0,
        max_ratio: float | None = None,
        mass: float | None = None,
    ) -> SparseRows:
        """Keep the entries of each row that are above a threshold, optionally only the largest.

        All criteria apply to the entries above `threshold`, and an entry has to meet all criteria
        that are given. Of equal entries the one in the lowest column counts as the larger. NaN is
        kept and counts as the largest.

        Args:
            x: (B, V) floating point.
            k: largest number of entries of a row.
            threshold: entries have to be greater than this; at least 0.
            max_ratio: in [0, 1]; entries have to be at least `max_ratio` times the row's maximum.
            mass: in [0, 1]; keep the fewest largest entries whose sum reaches `mass` times the
                row's sum (alpha-mass pruning, Bruch et al., SIGIR 2024). Sums are in float64, from
                the largest entry to the smallest.

        Returns:
            SparseRows of B rows over V columns, differentiable: the gradient of the values goes to
            the kept entries of x. The width is the longest length, except on a GPU with k and
            without `mass`: there it is min(k, V), which is known without waiting for the GPU. On a
            GPU only such calls support `torch.compile(fullgraph=True)`.

        Raises:
            TypeError, ValueError: x is not a floating-point matrix, or a criterion is out of range.

        Example::

            >>> x = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]])
            >>> sf.SparseRows.from_dense(x, k=1).to_dicts()
            [{1: 3.0}, {0: 2.0}]
        """
        check_tensor("x", x)
        if x.dim() != 2:
            raise ValueError(f"x must be (rows, columns), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}")
        k = None if k is None else check_count("k", k, 0)
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        for name, ratio in (("max_ratio", max_ratio), ("mass", mass)):
            if ratio is not None and not 0 <= ratio <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {ratio}")
        return cls(*prune_rows(x, k, threshold, max_ratio, mass), x.shape[1])

    @classmethod
    def from_torch_csr(cls, matrix: Tensor) -> SparseRows:
        """Convert a `torch.sparse_csr` tensor; explicit zeros stay entries.

        Args:
            matrix: (B, V) floating point, on any device.

        Raises:
            TypeError, ValueError: matrix has another layout, dtype or number of dimensions, or its
                columns do not ascend within a row.

        Example::

            >>> matrix = torch.tensor([[0.0, 3.0, 1.0]]).to_sparse_csr()
            >>> sf.SparseRows.from_torch_csr(matrix).to_dicts()
            [{1: 3.0, 2: 1.0}]
        """
        rows = cls(*pad_entries(entries_from_torch_csr(matrix)), matrix.shape[1])
        rows.check_contents()
        return rows

    @classmethod
    def from_scipy(cls, matrix: Any, *, dtype: torch.dtype | None = None) -> SparseRows:
        """Convert a SciPy matrix; explicit zeros stay entries, repeated entries are summed.

        Args:
            matrix: (B, V), a scipy.sparse array or matrix of any format.
            dtype: dtype of the values. None: that of `matrix`, which must be float32 or float64.

        Raises:
            TypeError: matrix is not of scipy.sparse, or its dtype or `dtype` is not floating point.
            ValueError: matrix does not have two dimensions.
            ImportError: SciPy is not installed.

        Example::

            >>> from scipy.sparse import csr_array
            >>> sf.SparseRows.from_scipy(csr_array([[0.0, 3.0, 1.0]])).to_dicts()
            [{1: 3.0, 2: 1.0}]
        """
        return cls(*pad_entries(entries_from_scipy(matrix, dtype)), matrix.shape[1])

    @classmethod
    def from_dicts(
        cls,
        dicts: Iterable[Mapping[Any, float]],
        num_cols: int,
        token_to_id: Mapping[Any, int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> SparseRows:
        """Convert one dict {column: value} per row, in any order of columns; zeros stay entries.

        Args:
            dicts: the rows, as `to_dicts` returns them. Columns are integers, also those of NumPy,
                or their decimal text, which JSON makes of them.
            num_cols: V.
            token_to_id: column of each token, e.g. `tokenizer.get_vocab()`, for dicts
                {token: value}. The token `[#c]` stands for column c, if no token has that name.
            dtype: dtype of the values.

        Raises:
            TypeError: the rows are not a list of dicts, or a value is not a number.
            ValueError: a token has no column, a column is not an integer in [0, num_cols), or two
                tokens have the same column. The message names the row.

        Example::

            >>> sf.SparseRows.from_dicts([{"dog": 3.0}, {}], 2, {"cat": 0, "dog": 1}).to_dense()
            tensor([[0., 3.],
                    [0., 0.]])
        """
        num_cols = check_count("num_cols", num_cols, 0)
        return cls(*pad_entries(entries_from_dicts(dicts, num_cols, token_to_id, dtype)), num_cols)

    @classmethod
    def cat(cls, parts: Sequence[SparseRows]) -> SparseRows:
        """Concatenate the rows of `parts`; narrower parts are padded to the widest.

        Raises:
            ValueError: `parts` is empty, or its members differ in `num_cols`, dtype or device.

        Example::

            >>> row = sf.SparseRows.from_dense(torch.tensor([[0.0, 3.0, 1.0]]))
            >>> len(sf.SparseRows.cat([row, row]))
            2
        """
        if not parts:
            raise ValueError("parts must hold at least one SparseRows, got none")
        first = parts[0]
        for position, part in enumerate(parts):
            for name in ("num_cols", "dtype", "device"):
                expected, got = getattr(first, name), getattr(part, name)
                if got != expected:
                    raise ValueError(
                        f"parts[{position}].{name} must be {expected} as in parts[0], got {got}"
                    )
        width = max(part.width for part in parts)
        return cls(
            torch.cat([_widen(part.indices, width, -1) for part in parts]),
            torch.cat([_widen(part.values, width, 0) for part in parts]),
            torch.cat([part.lengths for part in parts]),
            first.num_cols,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (B, V) of the dense matrix."""
        return len(self), self.num_cols

    @property
    def width(self) -> int:
        """Number of slots of every row, K."""
        return self.indices.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the three tensors."""
        return self.indices.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Size of the three tensors in bytes."""
        return self.indices.nbytes + self.values.nbytes + self.lengths.nbytes

    def __len__(self) -> int:
        return self.indices.shape[0]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield columns and values of each row without padding; waits for a GPU once."""
        for row, length in enumerate(self.lengths.tolist()):
            yield self.indices[row, :length], self.values[row, :length]

    def __repr__(self) -> str:
        return (
            f"SparseRows({len(self)} rows, num_cols={self.num_cols}, width={self.width}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    def __getitem__(self, rows: slice | Tensor | Sequence[int] | Sequence[bool]) -> SparseRows:
        """Return the rows of a slice, of integers (also repeated) or of a mask.

        Raises:
            IndexError: a row does not exist.
            TypeError: rows are one integer, a tuple, or no integers.
            ValueError: rows have two dimensions, or are a mask of another length.
        """
        if isinstance(rows, Integral):  # also NumPy's
            raise TypeError(
                f"rows must be a slice, an integer tensor or a bool tensor, got the int {rows}; "
                "for one row write rows[i : i + 1]"
            )
        if not isinstance(rows, slice):
            rows = self._row_index(rows)
        return SparseRows(self.indices[rows], self.values[rows], self.lengths[rows], self.num_cols)

    def _row_index(self, rows: Tensor | Sequence[int] | Sequence[bool]) -> Tensor:
        # rows[i, j] passes a tuple, which means a row and a column elsewhere.
        if isinstance(rows, tuple) or not isinstance(rows, Tensor | np.ndarray | Sequence):
            raise TypeError(f"rows must be a slice, list or tensor, got {type(rows).__name__}")
        index = torch.as_tensor(rows, device=self.device)
        if index.dim() != 1:
            raise ValueError(f"rows must have one dimension, got shape {tuple(index.shape)}")
        if index.dtype == torch.bool:
            if len(index) != len(self):
                raise ValueError(
                    f"a mask must have one bool per row, {len(self)}, got {len(index)}"
                )
            return index
        if index.numel() and (index.is_floating_point() or index.is_complex()):
            raise TypeError(f"rows must be integers or a mask, got {index.dtype}")
        return index.long()  # torch takes uint8 for a mask, and an empty list for floating point

    def equal(self, other: SparseRows) -> bool:
        """Return whether both hold the same vectors in the same dtype.

        Padding is ignored. As in `torch.equal`, NaN differs from NaN.

        Example::

            >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 3.0, 1.0]]))
            >>> rows.equal(sf.SparseRows.from_dense(rows.to_dense()))
            True
        """
        return (
            self.num_cols == other.num_cols
            and self.dtype == other.dtype
            and torch.equal(self.lengths, other.lengths)
            and all(
                torch.equal(mine, theirs)
                for mine, theirs in zip(self.coordinates(), other.coordinates(), strict=True)
            )
        )

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows (nnz,) int64, columns (nnz,) int64 and values (nnz,), row by row.

        Example::

            >>> sf.SparseRows.from_dense(torch.tensor([[0.0, 3.0], [1.0, 0.0]])).coordinates()
            (tensor([0, 1]), tensor([1, 0]), tensor([3., 1.]))
        """
        rows, slots = (self.indices >= 0).nonzero(as_tuple=True)
        return rows, self.indices[rows, slots].long(), self.values[rows, slots]

    def to_dense(self) -> Tensor:
        """Return a dense (B, V) tensor, differentiable in `values`.

        Example::

            >>> sf.SparseRows.from_dicts([{1: 3.0}], num_cols=3).to_dense()
            tensor([[0., 3., 0.]])
        """
        return dense_rows(self.indices, self.values, self.lengths, self.num_cols)

    def to_torch_csr(self) -> Tensor:
        """Return a `torch.sparse_csr` tensor (B, V) with int64 indices.

        Example::

            >>> rows = sf.SparseRows.from_dicts([{1: 3.0}], num_cols=3)
            >>> rows.to_torch_csr().crow_indices()
            tensor([0, 1])
        """
        _, columns, values = self.coordinates()
        return torch.sparse_csr_tensor(
            self._row_starts(), columns, values, self.shape, check_invariants=False
        )

    def to_scipy(self) -> csr_array:
        """Return a `scipy.sparse.csr_array` (B, V); 16-bit values become float32.

        Raises:
            ImportError: SciPy is not installed.

        Example::

            >>> sf.SparseRows.from_dicts([{1: 3.0}], num_cols=3).to_scipy().nnz
            1
        """
        from scipy.sparse import csr_array

        _, columns, values = self.coordinates()
        values = values.detach().cpu()
        if values.dtype not in (torch.float32, torch.float64):
            values = values.float()  # SciPy supports no other floating-point dtypes
        arrays = (values.numpy(), columns.cpu().numpy(), self._row_starts().cpu().numpy())
        return csr_array(arrays, shape=self.shape)

    def to_dicts(self, id_to_token: TokenNames | None = None) -> list[dict[Any, float]]:
        """Return one dict {column: value} per row, by ascending column.

        Args:
            id_to_token: name of each column, for dicts {token: value}. A column without a name is
                called `[#column]`, as where a model pads its vocabulary beyond the tokenizer's.

        Raises:
            TypeError: `id_to_token` has a name that is neither a string nor None, or maps from
                something else than columns.
            ValueError: two columns have the same name.

        Example::

            >>> rows = sf.SparseRows.from_dense(torch.tensor([[0.0, 3.0]]))
            >>> rows.to_dicts(), rows.to_dicts(["cat", "dog"]), rows.to_dicts(["cat"])
            ([{1: 3.0}], [{'dog': 3.0}], [{'[#1]': 3.0}])
        """
        names = None if id_to_token is None else name_columns(id_to_token, self.num_cols)
        all_indices, all_values = self.indices.tolist(), self.values.tolist()
        return [
            {
                column if names is None else names[column]: value
                for column, value in zip(indices[:length], values[:length], strict=True)
            }
            for indices, values, length in zip(
                all_indices, all_values, self.lengths.tolist(), strict=True
            )
        ]

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> SparseRows:
        """Return the rows on another device or with values in another floating-point dtype.

        Example::

            >>> sf.SparseRows.from_dicts([{1: 3.0}], num_cols=3).to(dtype=torch.float16).dtype
            torch.float16
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return SparseRows(
            self.indices.to(device, non_blocking=non_blocking),
            self.values.to(device, dtype or self.dtype, non_blocking=non_blocking),
            self.lengths.to(device, non_blocking=non_blocking),
            self.num_cols,
        )

    def pin_memory(self) -> SparseRows:
        """Return the rows in page-locked memory, for copies to a GPU that do not block."""
        return SparseRows(
            self.indices.pin_memory(),
            self.values.pin_memory(),
            self.lengths.pin_memory(),
            self.num_cols,
        )

    def check_contents(self) -> None:
        """Check every entry, which the constructor does not; waits for a GPU.

        Raises:
            ValueError: a row has a wrong length, order, range or padding. The message names the
                first such row.
        """
        check_contents(self.indices, self.values, self.lengths, self.num_cols)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; an existing file is replaced only by a complete one.

        Example::

            >>> rows = sf.SparseRows.from_dicts([{1: 3.0}], num_cols=3)
            >>> rows.save("rows.safetensors")
            >>> sf.SparseRows.load("rows.safetensors").equal(rows)
            True
        """
        tensors = {"indices": self.indices, "values": self.values, "lengths": self.lengths}
        write_file(path, tensors, self.num_cols)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        mmap: bool = True,
        should_check: bool = True,
    ) -> SparseRows:
        """Read a file that `save` wrote, and check its contents.

        Args:
            path: path of the file.
            device: device of the rows.
            mmap: whether rows on the CPU are mapped from the file, so that they may be larger than
                memory: the system reads and drops pages as needed. Writes to the tensors do not
                reach the file. The file may be replaced by `save`, but must not be overwritten in
                place. False: the rows are read into memory.
            should_check: check the numbers of all rows. False: trust the file, which must be as
                `save` wrote it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not complete, not consistent or not of this format.
        """
        tensors, num_cols = read_file(path)
        try:
            rows = cls(**tensors, num_cols=num_cols)
            if should_check:
                rows.check_contents()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        on_device = rows.to(device)
        if mmap or on_device.indices.data_ptr() != rows.indices.data_ptr():
            return on_device
        return cls(rows.indices.clone(), rows.values.clone(), rows.lengths.clone(), rows.num_cols)

    def _row_starts(self) -> Tensor:
        """Return the start of each row in `coordinates`, then their number, (B + 1,) int64."""
        return torch.nn.functional.pad(self.lengths.long().cumsum(0), (1, 0))


def _widen(tensor: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)
