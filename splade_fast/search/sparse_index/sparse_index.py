"""SparseIndex: documents sorted by terms, with bounds of the scores of neighbouring documents."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from splade_fast import _library
from splade_fast._checks import check_count
from splade_fast._tensor_files import Shape
from splade_fast.ops.score import check_same_space
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.ops.sparse_rows.file import FileKind, mapped_file, read_file, write_file
from splade_fast.search.sparse_index.allowed import to_mask
from splade_fast.search.sparse_index.order import order_by_similarity

# Tensors in the order in which the ops take and return them, see csrc/cpu/index/index.h.
_TENSORS = (
    "term_start",
    "step",
    "group",
    "start",
    "maximum",
    "document",
    "value",
    "id",
)
_FILE = FileKind(
    "a saved SparseIndex", "sparse_index", "splade_fast.SparseIndex", 1, frozenset(_TENSORS)
)

_ALGORITHMS = {"auto": 0, "blocks": 1, "accumulators": 2}  # with the same results
_MAX_COLS = 2**24  # as in csrc/cpu/index/build.cpp
_GROUP_BLOCKS = 32  # as in csrc/cpu/simd/index.h
_ROWS_AT_ONCE = 2**14  # bounds the memory of a check
_SECONDS_WITHOUT_BAR = 1.0


class SparseIndex:
    """Index of N documents for exact searches on the CPU.

    `search` returns what `sparse_search` returns, to the bit, and reads only the documents whose
    scores may be among the k highest. Values must be finite and at least 0, as those of SPLADE are.
    `build` and `load` make an index.

    Example::

        >>> docs = sf.SparseRows.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        >>> sf.SparseIndex.build(docs, show_progress=False).search(torch.tensor([[3.0, 1.0]]), k=1)
        (tensor([[3.]]), tensor([[1]]))
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)

    @classmethod
    def build(
        cls,
        rows: SparseRows,
        *,
        path: str | os.PathLike[str] | None = None,
        show_progress: bool = True,
    ) -> SparseIndex:
        """Build an index in memory, or in a file if it may be larger than memory.

        Rows and index may both be mapped from files. A build then needs about 40 bytes of memory
        for a document, 128 bytes for a column and 200 MB. The index has the same bytes either way.

        Args:
            rows: SparseRows of N documents on the CPU, with at most 2**24 columns. They are read
                several times, and are not needed afterwards.
            path: file to write, which is then mapped into memory. It replaces an existing one when
                it is complete. The folder also holds 128 bytes for a document until then. None: the
                index is held in memory, with 128 bytes for a document while it is built.
            show_progress: draw a progress bar, unless the build takes less than a second.

        Raises:
            TypeError, ValueError: `rows` are not SparseRows on the CPU.
            OSError: the file system failed, for example because it is full.
            RuntimeError: a value is negative, infinite or NaN, a row has a wrong length or columns
                that do not ascend, there are too many columns, or splade_fast has no compiled
                kernels.

        Example::

            >>> docs = sf.SparseRows.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
            >>> sf.SparseIndex.build(docs, show_progress=False)
            SparseIndex(2 documents, num_cols=2, dtype=torch.float32)
        """
        if not isinstance(rows, SparseRows):
            raise TypeError(f"rows must be SparseRows, got {type(rows).__name__}")
        if rows.device.type != "cpu":
            raise ValueError(f"rows must be on the CPU, got {rows.device}")
        _require_kernels()
        with (
            torch.no_grad(),
            tqdm(
                total=len(rows),
                unit="document",
                desc="building the index",
                delay=_SECONDS_WITHOUT_BAR,
                disable=not show_progress,
            ) as progress,
        ):
            scratch = None if path is None else Path(path).parent
            order = order_by_similarity(rows, scratch=scratch, progress=progress)
            work = _Build(rows, order)
            if path is None:
                tensors = {
                    name: torch.empty(shape, dtype=dtype)
                    for name, (dtype, shape) in work.shapes.items()
                }
                work.fill(tensors)
                return cls([tensors[name] for name in _TENSORS])
            with mapped_file(path, work.shapes, rows.num_cols, _FILE) as tensors:
                work.fill(tensors)
            return cls.load(path, should_check=False)

    @torch.no_grad()
    def search(
        self,
        queries: SparseRows | Tensor,
        k: int,
        *,
        min_score: float | None = None,
        allowed: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the k documents with the highest `sparse_scores` for each query.

        The result is that of `sparse_search`, among the documents that `min_score` and `allowed`
        leave. Queries are searched by several threads, each by one thread.

        Args:
            queries: SparseRows of Q rows, or dense (Q, V), finite and at least 0. Columns that no
                document uses add nothing.
            k: number of documents for each query; all N if k ≥ N.
            min_score: least score of a document, before it is rounded to the output dtype; None
                for no limit.
            allowed: documents that may be found: a mask (N,) of bool, or ids in any order.

        Returns:
            scores (Q, min(k, N)), highest first, and ids of documents (Q, min(k, N)) int64. Equal
            scores are ordered by ascending id. Documents that score 0 fill the remaining places.
            Where min_score and allowed leave fewer documents than places, the last places have
            score -inf and id -1.

        Raises:
            TypeError, ValueError: queries have other columns than the documents or are not on the
                CPU, k is not an integer ≥ 1, or min_score or allowed is not as described.
            RuntimeError: a query has a negative, infinite or NaN value, or a column out of range.

        Example::

            >>> docs = sf.SparseRows.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
            >>> index = sf.SparseIndex.build(docs, show_progress=False)
            >>> index.search(torch.tensor([[3.0, 1.0]]), k=2, min_score=2.5)
            (tensor([[3., -inf]]), tensor([[ 1, -1]]))
        """
        return self._search(queries, k, min_score, allowed, "auto")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; an existing file is replaced only by a complete one.

        Raises:
            OSError: the file system failed.

        Example::

            >>> docs = sf.SparseRows.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
            >>> sf.SparseIndex.build(docs, show_progress=False).save("docs.index")
            >>> len(sf.SparseIndex.load("docs.index"))
            2
        """
        write_file(path, dict(zip(_TENSORS, self._tensors, strict=True)), self.num_cols, _FILE)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, should_check: bool = True) -> SparseIndex:
        """Read a file that `save` wrote, map it into memory, and check its contents.

        The file may be larger than memory. It may be replaced by `save`, but must not be
        overwritten in place.

        Args:
            path: path of the file.
            should_check: check all numbers, which reads the whole file. False: trust the file,
                which must be as `save` wrote it. A search in a damaged one may find the wrong
                documents, but reads nothing outside it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not complete, not consistent or not of this format.
            RuntimeError: splade_fast has no compiled kernels.
        """
        _require_kernels()
        tensors, num_cols = read_file(path, _FILE)
        index = cls([tensors[name] for name in _TENSORS])
        try:
            torch.ops.splade_fast.index_check(index._tensors, should_check)
        except RuntimeError as error:
            message = str(error).partition("\n")[0]
            raise ValueError(f"{path} is damaged: {message}") from error
        if num_cols != index.num_cols:
            raise ValueError(
                f"{path} is damaged: num_cols must be {index.num_cols}, got {num_cols}"
            )
        return index

    @property
    def num_cols(self) -> int:
        """Number of columns, V."""
        return len(self._tensors[_TENSORS.index("step")])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self._tensors[_TENSORS.index("value")].dtype

    def __len__(self) -> int:
        return len(self._tensors[_TENSORS.index("id")])

    def __repr__(self) -> str:
        return f"SparseIndex({len(self)} documents, num_cols={self.num_cols}, dtype={self.dtype})"

    def _search(
        self,
        queries: SparseRows | Tensor,
        k: int,
        min_score: float | None,
        allowed: Tensor | Sequence[int] | None,
        algorithm: str,
    ) -> tuple[Tensor, Tensor]:
        self._check_queries(queries)
        k = check_count("k", k, 1)
        least = -math.inf if min_score is None else float(min_score)
        if math.isnan(least):
            raise ValueError("min_score must be a number, got nan")
        operands = (
            (queries.indices, queries.values, queries.lengths)
            if isinstance(queries, SparseRows)
            else (None, queries, None)
        )
        allowed_mask = None if allowed is None else to_mask(allowed, len(self))
        result: tuple[Tensor, Tensor] = torch.ops.splade_fast.index_search(
            *operands, self._tensors, k, least, allowed_mask, _ALGORITHMS[algorithm]
        )
        return result

    def _check_queries(self, queries: SparseRows | Tensor) -> None:
        no_rows = torch.empty(0, 1, dtype=torch.int32)
        documents = SparseRows(no_rows, no_rows.to(self.dtype), no_rows[:, 0], self.num_cols)
        check_same_space(queries, documents, docs_name="index")


class _Build:
    """Build of an index, whose shapes are known before its tensors are made.

    Args:
        rows: documents.
        order: order of the documents in the index, (N,) int32.
    """

    def __init__(self, rows: SparseRows, order: Tensor) -> None:
        values = rows.values.detach()
        self._rows = (rows.indices, values, rows.lengths, rows.num_cols, order)
        term_start, self._posting_start, step = torch.ops.splade_fast.index_count(*self._rows)
        self._counted = {"term_start": term_start, "step": step}
        entries, postings = int(term_start[-1]), int(self._posting_start[-1])
        self.shapes: dict[str, Shape] = {
            "term_start": (torch.int64, (rows.num_cols + 1,)),
            "step": (torch.float64, (rows.num_cols,)),
            "group": (torch.int32, (entries,)),
            "start": (torch.int64, (entries + 1,)),
            "maximum": (torch.uint8, (entries, _GROUP_BLOCKS)),
            "document": (torch.uint8, (postings,)),
            "value": (values.dtype, (postings,)),
            "id": (torch.int32, (len(rows),)),
        }

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors of these shapes."""
        for name, counted in self._counted.items():
            tensors[name].copy_(counted)
        torch.ops.splade_fast.index_fill(
            *self._rows, self._posting_start, [tensors[name] for name in _TENSORS]
        )


def can_index(rows: SparseRows) -> bool:
    """Return whether `SparseIndex` takes rows, as documents or as queries."""
    if rows.device.type != "cpu" or rows.num_cols > _MAX_COLS:
        return False
    parts = rows.values.detach().split(_ROWS_AT_ONCE)
    return all(bool(((part >= 0) & part.isfinite()).all()) for part in parts)


def _require_kernels() -> None:
    if not _library.is_cpu_library_loaded():
        reason = _library.build_info()["cpu"]["why_not"]
        raise RuntimeError(f"SparseIndex needs the compiled kernels of splade_fast: {reason}")
