"""SparseRows: a batch of sparse vectors, one padded row each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from splade_fast._atomic_files import whole_file
from splade_fast._checks import check_count
from splade_fast.ops.prune import dense_rows, prune_rows

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_FORMAT = "splade_fast.SparseRows"
_FORMAT_VERSION = 1
_MAX_COLS = 2**31 - 2  # as the ops take
_CHECKED_ENTRIES = 2**20  # at a time: what checking needs beside the rows themselves


class SparseRows:
    """B sparse vectors over V columns: row b has the value values[b, j] at column indices[b, j].

    Args:
        indices: (B, K) int32, ascending within a row; the unused slots at its end hold -1.
        values: (B, K) floating point; unused slots hold 0.
        lengths: (B,) int32, how many slots of each row are used.
        num_cols: V, the size of the vocabulary, at most 2^31 - 2.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape or device. What the tensors
            contain is trusted here, because looking would stall a GPU; see `check_contents`.
    """

    __slots__ = ("indices", "lengths", "num_cols", "values")

    def __init__(self, indices: Tensor, values: Tensor, lengths: Tensor, num_cols: int) -> None:
        _check_layout(indices, values, lengths, num_cols)
        self.indices = indices
        self.values = values
        self.lengths = lengths
        self.num_cols = int(num_cols)

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
        """Keep the entries of each row that are above `threshold`, optionally only the largest.

        Every criterion looks at the entries above `threshold`, and an entry has to pass all that
        are given. Of equal entries the one in the lowest column counts as the larger. NaN is
        never above or below anything, so it is kept, and ranks as the largest.

        Args:
            x: (B, V) floating point.
            k: keep at most the k largest of a row.
            threshold: entries have to be greater than this; at least 0.
            max_ratio: in [0, 1]; keep entries of at least `max_ratio` times the row's maximum.
            mass: in [0, 1]; keep the fewest largest entries whose sum reaches `mass` times the
                row's sum (alpha-mass pruning, Bruch et al., SIGIR 2024); sums are in float64,
                from the largest entry to the smallest.

        Returns:
            SparseRows of B rows and `num_cols` V; K is the longest row's length. On a GPU K is
            min(k, V), so that nothing waits for it; without k, what is above the threshold is
            counted first, and with `mass` K is the longest row's length as well, which takes
            `torch.compile(fullgraph=True)` from both. The values are differentiable: their
            gradient goes to the kept entries of x.

        Raises:
            TypeError, ValueError: x is no floating-point matrix, or a criterion is out of range.
        """
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

        indices, values, lengths = prune_rows(x, k, threshold, max_ratio, mass)
        return cls(indices, values, lengths, x.shape[1])

    @classmethod
    def from_torch_csr(cls, matrix: Tensor) -> SparseRows:
        """The same matrix from a `torch.sparse_csr` tensor; stored zeros stay entries.

        Args:
            matrix: (B, V) floating point, on any device.

        Raises:
            TypeError, ValueError: matrix has another layout, dtype or number of dimensions, or its
                columns do not ascend within a row.
        """
        if not isinstance(matrix, Tensor):
            raise TypeError(f"matrix must be a tensor, got {type(matrix).__name__}")
        if matrix.layout != torch.sparse_csr or matrix.dim() != 2:
            raise ValueError(
                "matrix must be a matrix of layout torch.sparse_csr (see Tensor.to_sparse_csr), "
                f"got {matrix.layout} {tuple(matrix.shape)}"
            )
        if not matrix.is_floating_point():
            raise TypeError(f"matrix must be floating point, got {matrix.dtype}")
        lengths = matrix.crow_indices().diff()
        rows = cls._from_entries(lengths, matrix.col_indices(), matrix.values(), matrix.shape[1])
        rows.check_contents()
        return rows

    @classmethod
    def from_scipy(cls, matrix: Any, *, dtype: torch.dtype | None = None) -> SparseRows:
        """The same matrix from scipy; stored zeros stay entries, repeated ones are added up.

        Args:
            matrix: (B, V), a scipy.sparse array or matrix of any format.
            dtype: of the values; by default that of `matrix`, which then has to be float32 or
                float64.

        Raises:
            TypeError: matrix is nothing of scipy.sparse; its dtype, or `dtype`, is not floating
                point.
            ValueError: matrix has not two dimensions.
            ImportError: scipy is not installed.
        """
        from scipy.sparse import csr_array, issparse

        if not issparse(matrix):
            raise TypeError(f"matrix must be of scipy.sparse, got {type(matrix).__name__}")
        if matrix.ndim != 2:
            raise ValueError(f"matrix must have two dimensions, got shape {matrix.shape}")
        csr = csr_array(matrix, copy=True)
        csr.sum_duplicates()  # and sorts
        values = torch.from_numpy(csr.data).to(dtype)
        if not values.is_floating_point():
            name = (
                "matrix must be floating point without dtype"
                if dtype is None
                else ("dtype must be floating point")
            )
            raise TypeError(f"{name}, got {values.dtype}")
        lengths = torch.from_numpy(csr.indptr).diff()
        return cls._from_entries(lengths, torch.from_numpy(csr.indices), values, csr.shape[1])

    @classmethod
    def from_dicts(
        cls,
        dicts: Iterable[Mapping[Any, float]],
        num_cols: int,
        token_to_id: Mapping[Any, int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> SparseRows:
        """One row per dict {column: value}, in any order of columns; zeros stay entries.

        Args:
            dicts: the rows, as `to_dicts` gives them.
            num_cols: V.
            token_to_id: the columns of tokens, e.g. `tokenizer.get_vocab()`, where the dicts read
                {token: value}.
            dtype: of the values.

        Raises:
            ValueError: naming the row with a token that has no column, a column that is no integer
                in [0, num_cols), or two tokens of one column.
        """
        lengths: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        for row, entries in enumerate(dicts):
            by_column = _by_column(row, entries, num_cols, token_to_id)
            lengths.append(len(by_column))
            for column, value in sorted(by_column.items()):
                columns.append(column)
                values.append(value)
        return cls._from_entries(
            torch.tensor(lengths, dtype=torch.int64),
            torch.tensor(columns, dtype=torch.int64),
            torch.tensor(values, dtype=dtype),
            num_cols,
        )

    @classmethod
    def _from_entries(
        cls, lengths: Tensor, columns: Tensor, values: Tensor, num_cols: int
    ) -> SparseRows:
        """The inverse of `coordinates`: lengths (B,), columns and values (nnz,), row by row."""
        lengths = lengths.long()
        width = int(lengths.max()) if len(lengths) else 0
        rows = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
        starts = lengths.cumsum(0) - lengths
        slots = torch.arange(len(values), device=values.device) - starts[rows]
        indices = columns.new_full((len(lengths), width), -1, dtype=torch.int32)
        padded = values.new_zeros(len(lengths), width)
        return cls(
            indices.index_put((rows, slots), columns.int()),
            padded.index_put((rows, slots), values),
            lengths.int(),
            num_cols,
        )

    @classmethod
    def cat(cls, parts: Sequence[SparseRows]) -> SparseRows:
        """All rows of `parts`, in order; narrower parts are padded to the widest.

        Raises:
            ValueError: `parts` is empty, or they differ in `num_cols`, dtype or device.
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
        """(B, V), that of the dense matrix."""
        return len(self), self.num_cols

    @property
    def width(self) -> int:
        """K, the number of slots of every row."""
        return self.indices.shape[1]

    @property
    def device(self) -> torch.device:
        """The device all three tensors live on."""
        return self.indices.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors together."""
        return self.indices.nbytes + self.values.nbytes + self.lengths.nbytes

    def __len__(self) -> int:
        return self.indices.shape[0]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Columns and values of one row after the other, without padding; waits for a GPU once."""
        for row, length in enumerate(self.lengths.tolist()):
            yield self.indices[row, :length], self.values[row, :length]

    def __repr__(self) -> str:
        return (
            f"SparseRows({len(self)} rows, num_cols={self.num_cols}, width={self.width}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    def __getitem__(self, rows: slice | Tensor | Sequence[int] | Sequence[bool]) -> SparseRows:
        """The rows of a slice, an integer tensor (any order, repeats allowed) or a bool tensor."""
        if isinstance(rows, int):
            raise TypeError(
                f"rows must be a slice, an integer tensor or a bool tensor, got the int {rows}; "
                "for one row write rows[i : i + 1]"
            )
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self.device)
            if rows.numel() == 0 and rows.dtype != torch.bool:
                rows = rows.long()  # an empty list arrives as floating point
            if rows.dim() != 1:
                raise ValueError(f"rows must have one dimension, got shape {tuple(rows.shape)}")
        return SparseRows(self.indices[rows], self.values[rows], self.lengths[rows], self.num_cols)

    def equal(self, other: SparseRows) -> bool:
        """Whether both hold exactly the same vectors in the same dtype.

        Padding does not count; as in `torch.equal`, NaN differs from NaN.
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
        """Row numbers (nnz,) int64, columns (nnz,) int64 and values (nnz,), row by row."""
        rows, slots = (self.indices >= 0).nonzero(as_tuple=True)
        return rows, self.indices[rows, slots].long(), self.values[rows, slots]

    def to_dense(self) -> Tensor:
        """(B, num_cols) with zeros everywhere else; differentiable in `values`."""
        return dense_rows(self.indices, self.values, self.lengths, self.num_cols)

    def to_torch_csr(self) -> Tensor:
        """The same matrix as a `torch.sparse_csr` tensor (B, num_cols) with int64 indices."""
        _, columns, values = self.coordinates()
        return torch.sparse_csr_tensor(
            self._row_starts(), columns, values, (len(self), self.num_cols), check_invariants=False
        )

    def to_scipy(self) -> csr_array:
        """The same matrix as a `scipy.sparse.csr_array`; 16-bit values become float32.

        Raises:
            ImportError: scipy is not installed.
        """
        from scipy.sparse import csr_array

        _, columns, values = self.coordinates()
        values = values.detach().cpu()
        if values.dtype not in (torch.float32, torch.float64):
            values = values.float()  # scipy has no others
        arrays = (values.numpy(), columns.cpu().numpy(), self._row_starts().cpu().numpy())
        return csr_array(arrays, shape=(len(self), self.num_cols))

    def to_dicts(
        self, id_to_token: Sequence[str] | Mapping[int, str] | None = None
    ) -> list[dict[Any, float]]:
        """One dict {column: value} per row, by ascending column.

        Args:
            id_to_token: names the columns, so that the dicts read {token: value}.
        """
        all_indices, all_values = self.indices.tolist(), self.values.tolist()
        return [
            {
                column if id_to_token is None else id_to_token[column]: value
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
        """The same rows on `device`, with values in the floating-point `dtype`."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return SparseRows(
            self.indices.to(device, non_blocking=non_blocking),
            self.values.to(device, dtype or self.dtype, non_blocking=non_blocking),
            self.lengths.to(device, non_blocking=non_blocking),
            self.num_cols,
        )

    def pin_memory(self) -> SparseRows:
        """The same rows in page-locked memory, for copies to a GPU that do not block."""
        return SparseRows(
            self.indices.pin_memory(),
            self.values.pin_memory(),
            self.lengths.pin_memory(),
            self.num_cols,
        )

    def check_contents(self) -> None:
        """Look at every entry, which the constructor does not; waits for a GPU.

        Raises:
            ValueError: naming the first row whose length, order, range or padding is wrong.
        """
        rows_at_once = max(1, _CHECKED_ENTRIES // max(self.width, 1))
        for start in range(0, len(self), rows_at_once):
            self[start : start + rows_at_once]._check_rows(start)

    def _check_rows(self, first_row: int) -> None:
        slots = torch.arange(self.width, device=self.device)
        used = slots < self.lengths.unsqueeze(1)
        indices = self.indices
        ascending = torch.ones_like(used)
        ascending[:, 1:] = indices[:, 1:] > indices[:, :-1]
        rules = {
            f"lengths must be between 0 and {self.width}": (
                ((self.lengths < 0) | (self.lengths > self.width)).unsqueeze(1)
            ),
            f"indices must be between 0 and {self.num_cols - 1} where used": (
                used & ((indices < 0) | (indices >= self.num_cols))
            ),
            "indices must ascend within a row": used & ~ascending,
            "indices must be -1 where unused": ~used & (indices != -1),
            "values must be 0 where unused": ~used & (self.values != 0),
        }
        for rule, bad in rules.items():
            if bad.any():
                row = int(bad.any(1).nonzero()[0])
                raise ValueError(
                    f"{rule}, got in row {first_row + row} the length {int(self.lengths[row])}, "
                    f"indices {_shortened(self.indices[row])} "
                    f"and values {_shortened(self.values[row])}"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; an existing file is replaced only by a complete one."""
        header = {"format": _FORMAT, "version": _FORMAT_VERSION, "num_cols": self.num_cols}
        tensors = {
            name: getattr(self, name).detach().cpu().contiguous()
            for name in ("indices", "values", "lengths")
        }
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={"sparse_rows": json.dumps(header)})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        mmap: bool = True,
    ) -> SparseRows:
        """Read what `save` wrote, and check all of it.

        Args:
            path: the file.
            device: where the rows go.
            mmap: on the CPU, leave the rows in the file and map it into memory: the system reads
                and drops its pages as needed, so an index may be larger than memory. What is
                written to the tensors does not reach the file, which `save` replaces but nothing
                may overwrite in place. False: read all into memory.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a complete, consistent file of this format.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get("sparse_rows", "")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        num_cols = _num_cols_of(path, header)
        if set(tensors) != {"indices", "values", "lengths"}:
            raise ValueError(f"{path} must hold saved SparseRows, got tensors {sorted(tensors)}")
        try:
            rows = cls(**tensors, num_cols=num_cols)
            rows.check_contents()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        on_device = rows.to(device)
        if mmap or on_device.indices.data_ptr() != rows.indices.data_ptr():
            return on_device
        return cls(rows.indices.clone(), rows.values.clone(), rows.lengths.clone(), rows.num_cols)

    def _row_starts(self) -> Tensor:
        """(B + 1,) int64: where each row starts in `coordinates`, and the total."""
        return torch.nn.functional.pad(self.lengths.long().cumsum(0), (1, 0))


def _num_cols_of(path: str | os.PathLike[str], header: str) -> int:
    """What the header of a file says.

    Raises:
        ValueError: it is none of this format and version.
    """
    try:
        facts = json.loads(header)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise ValueError(f"{path} must hold saved SparseRows, got the header {header[:60]!r}")
    version, num_cols = facts.get("version"), facts.get("num_cols")
    if version != _FORMAT_VERSION:
        raise ValueError(f"{path} must have format version {_FORMAT_VERSION}, got {version}")
    if not isinstance(num_cols, int) or isinstance(num_cols, bool):
        raise ValueError(f"{path} is damaged: num_cols must be a whole number, got {num_cols!r}")
    return num_cols


def _by_column(
    row: int, entries: Mapping[Any, float], num_cols: int, token_to_id: Mapping[Any, int] | None
) -> dict[int, float]:
    found: dict[int, float] = {}
    for name, value in entries.items():
        column = name if token_to_id is None else token_to_id.get(name)
        if column is None:
            raise ValueError(f"dicts[{row}] must name tokens of token_to_id, got {name!r}")
        if not isinstance(column, int) or not 0 <= column < num_cols:
            raise ValueError(
                f"dicts[{row}] must have columns from 0 to {num_cols - 1}, got {column!r}"
            )
        if column in found:
            raise ValueError(f"dicts[{row}] must have one value a column, got two for {column}")
        found[column] = value
    return found


def _check_layout(indices: Tensor, values: Tensor, lengths: Tensor, num_cols: int) -> None:
    if indices.dtype != torch.int32:
        raise TypeError(f"indices must be int32, got {indices.dtype}")
    if lengths.dtype != torch.int32:
        raise TypeError(f"lengths must be int32, got {lengths.dtype}")
    if not values.is_floating_point():
        raise TypeError(f"values must be floating point, got {values.dtype}")
    if indices.dim() != 2:
        raise ValueError(f"indices must be (rows, slots), got shape {tuple(indices.shape)}")
    if values.shape != indices.shape:
        raise ValueError(
            f"values must have the shape of indices {tuple(indices.shape)}, "
            f"got {tuple(values.shape)}"
        )
    if lengths.shape != indices.shape[:1]:
        raise ValueError(
            f"lengths must be (rows,) = ({indices.shape[0]},), got {tuple(lengths.shape)}"
        )
    for name, tensor in (("values", values), ("lengths", lengths)):
        if tensor.device != indices.device:
            raise ValueError(
                f"{name} must be on {indices.device} as indices are, got {tensor.device}"
            )
    if not 0 <= num_cols <= _MAX_COLS:
        raise ValueError(
            "num_cols must be at least 0 and at most 2^31 - 2, as columns are int32, "
            f"got {num_cols}"
        )


def _widen(tensor: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)


def _shortened(row: Tensor, limit: int = 8) -> str:
    shown = ", ".join(str(entry) for entry in row[:limit].tolist())
    return f"[{shown}, …]" if len(row) > limit else f"[{shown}]"
