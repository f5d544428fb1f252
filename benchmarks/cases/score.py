"""sparse_scores and sparse_search of synthetic queries and documents.

Terms are drawn as really encoded texts have them: the term of rank r with probability
proportional to 1 / (r + 50), so that the most frequent one is in about a third of all documents
of 128 draws and most are rare; ranks are spread over the vocabulary at random. A term drawn twice
counts once, so rows are ragged. Weights are log1p of exponential numbers.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

import splade_fast
from benchmarks.case import Case, Implementation, Target, Workload
from benchmarks.inputs import seeded
from splade_fast import SparseRows

_RANK_OFFSET = 50.0
_ROWS_AT_ONCE = 1 << 15


class Formats:
    """The same queries and documents as the other libraries take them; made before any timing."""

    def __init__(self, queries: SparseRows, docs: SparseRows) -> None:
        self._queries, self._docs = queries, docs
        self.query_table = queries.to_dense().t().contiguous()
        _, self.columns, self.values = docs.coordinates()
        self.starts = docs.lengths.long().cumsum(0) - docs.lengths
        self._scipy: Callable[[], Any] | None = None

    def scipy_product(self) -> Any:
        """The fastest way scipy has to multiply the CSR matrices: chosen at the first call."""
        if self._scipy is None:
            queries, docs = self._queries.to_scipy(), self._docs.to_scipy()
            by_term = queries.T.tocsr()
            ways: list[Callable[[], Any]] = [
                lambda: (queries @ docs.T).toarray(),
                lambda: (docs @ by_term).toarray().T,
            ]
            self._scipy = min(ways, key=_seconds)
        return self._scipy()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _ours(queries: SparseRows, docs: SparseRows, formats: Formats, k: int | None) -> Tensor:
    if k is None:
        return splade_fast.sparse_scores(queries, docs)
    return splade_fast.sparse_search(queries, docs, k)[0]


def _torch(queries: SparseRows, docs: SparseRows, formats: Formats, k: int | None) -> Tensor:
    scores = embedding_bag_scores(formats)
    return scores if k is None else scores.topk(k, dim=1)[0]


def embedding_bag_scores(formats: Formats) -> Tensor:
    """embedding_bag over the entries: faster here than torch's sparse CSR and COO products."""
    return embedding_bag(
        formats.columns,
        formats.query_table,
        formats.starts,
        per_sample_weights=formats.values,
        mode="sum",
    ).t()


def _scipy(queries: SparseRows, docs: SparseRows, formats: Formats, k: int | None) -> Tensor:
    import numpy as np

    scores = formats.scipy_product()
    if k is not None:
        scores = -np.sort(-np.partition(scores, -k, axis=1)[:, -k:], axis=1)
    return torch.from_numpy(scores)


@dataclass(frozen=True, kw_only=True)
class ScoreCase(Case):
    op: ClassVar[str] = "score"
    ours: ClassVar[Implementation] = staticmethod(_ours)
    eager: ClassVar[Implementation] = staticmethod(_torch)

    queries: int
    docs: int
    k: int | None = None  # None: sparse_scores
    vocab: int = 30522
    query_terms: int = 30
    doc_terms: int = 128

    @property
    def shape(self) -> str:
        searched = "scores" if self.k is None else f"search k{self.k}"
        return f"{searched} Q{self.queries} N{self.docs} V{self.vocab}"

    @property
    def layout(self) -> str:
        return "sparse"

    @property
    def fill(self) -> float:
        """Used slots of the documents, in a sample."""
        sample = self.rows(min(self.docs, 4096), self.doc_terms, 1)
        return sample.lengths.sum().item() / sample.indices.numel()

    @property
    def targets(self) -> tuple[Target, ...]:
        if self.k is not None:
            return ()
        # Set for torch's sparse products; eager is embedding_bag, which is three times faster.
        return (Target("times faster than eager", 3), Target("times faster than peer", 10))

    def tiny(self) -> "ScoreCase":
        return replace(self, queries=3, docs=200, vocab=500, query_terms=5, doc_terms=20)

    def peer(self) -> Implementation:
        import scipy  # noqa: F401

        return _scipy

    def rows(self, count: int, draws: int, seed: int) -> SparseRows:
        generator = seeded("cpu").manual_seed(seed)
        ranks = torch.arange(self.vocab)
        through = (1 / (ranks + _RANK_OFFSET)).cumsum(0)
        terms = torch.randperm(self.vocab, generator=seeded("cpu")).int()
        indices = torch.empty(count, draws, dtype=torch.int32)
        for part in indices.split(_ROWS_AT_ONCE):
            drawn = torch.rand(part.shape, generator=generator) * through[-1]
            rank = torch.searchsorted(through, drawn).clamp_(max=self.vocab - 1)
            found = terms[rank].sort(dim=1)[0]
            found[:, 1:][found[:, 1:] == found[:, :-1]] = self.vocab
            part.copy_(found.sort(dim=1)[0])
        unused = indices == self.vocab
        indices[unused] = -1
        values = torch.empty(count, draws).exponential_(generator=generator).log1p_()
        values[unused] = 0
        lengths = draws - unused.sum(1, dtype=torch.int32)
        return SparseRows(indices, values.to(self.dtype), lengths, self.vocab).to(self.device)

    def build(self, *, floors: bool = True) -> Workload:
        queries = self.rows(self.queries, self.query_terms, 0)
        docs = self.rows(self.docs, self.doc_terms, 1)
        arguments = (queries, docs, Formats(queries, docs), self.k)
        return Workload(
            arguments=arguments,
            options={},
            leaves={},
            upstream=queries.values.new_empty(0),
            exact=lambda: {"output": self._exact(queries, docs)},
            floors=one_read(docs) if floors else {},
        )

    def _exact(self, queries: SparseRows, docs: SparseRows) -> Tensor:
        scores = self.exact(queries, docs)
        return scores if self.k is None else scores.topk(self.k, dim=1)[0]

    @staticmethod
    def exact(queries: SparseRows, docs: SparseRows) -> Tensor:
        """All scores by torch's sparse product in fp64, of some documents at a time."""
        table = queries.to_dense().double().t()
        parts = []
        for start in range(0, len(docs), _ROWS_AT_ONCE):
            part = docs[start : start + _ROWS_AT_ONCE].to(dtype=torch.float64)
            parts.append((part.to_torch_csr() @ table).t())
        return torch.cat(parts, dim=1)


def one_read(docs: SparseRows) -> dict[str, Callable[[], object]]:
    """One read of the documents."""
    indices, values = docs.indices.view(torch.int32), docs.values
    bits = values.view(torch.int32) if values.dtype == torch.float32 else values.view(torch.int16)
    return {
        "read by integer maximum": lambda: (indices.amax(), bits.amax()),
        "read by maximum": lambda: (indices.amax(), values.amax()),
        "read by sum": lambda: (indices.amax(), values.sum()),
    }


def cases(device: str, dtypes: Sequence[torch.dtype], *, quick: bool) -> list[ScoreCase]:
    base = ScoreCase(direction="forward", dtype=dtypes[0], device=device, queries=64, docs=131_072)
    if quick:
        return [base.tiny(), replace(base, k=10).tiny()]
    million = replace(base, docs=1_000_000, k=10)
    return [base, replace(base, k=100), replace(million, queries=1), million]
