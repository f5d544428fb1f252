"""sparse_scores and sparse_search on synthetic and on really encoded queries and documents.

Synthetic terms are drawn as encoded texts have them: the term of rank r with probability
proportional to 1 / (r + 50), so that the most frequent one is in about a third of all documents
of 128 draws and most are rare; ranks are spread over the vocabulary at random. A term drawn twice
counts once, so rows are ragged. Weights are log1p of exponential numbers.

Encoded queries are really encoded summaries, and documents are drawn from the statistics of really
encoded ones (benchmarks.inputs.encoded_rows).

Eager is torch's embedding_bag over the entries. The peer is the scipy product, which for search
finds the same k best. "torch sparse" is the fastest of torch's own sparse products. For search
there is also Seismic, an approximate index (the extra bench-seismic), with its recall.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

import splade_fast
from benchmarks.harness.case import Case, Implementation, Target, UnavailableError, Workload
from benchmarks.inputs.batches import seeded
from benchmarks.inputs.encoded_rows import encoded_sample, resampled
from examples.docstrings.checkpoint import CheckpointError
from splade_fast import SparseRows

_RANK_OFFSET = 50.0
_ROWS_AT_ONCE = 1 << 15
# The 10 heaviest terms of a query; the index has Seismic's defaults.
_SEISMIC_SEARCH = {"query_cut": 10, "heap_factor": 0.7}


class Formats:
    """Queries and documents as the other libraries take them, made before any timing."""

    def __init__(self, queries: SparseRows, docs: SparseRows, case: "ScoreCase") -> None:
        self.queries, self.docs, self._case = queries, docs, case
        self.query_table = queries.to_dense().t().contiguous()
        _, self.columns, self.values = docs.coordinates()
        self.starts = docs.lengths.long().cumsum(0) - docs.lengths

    @functools.cached_property
    def scipy_product(self) -> "Fastest":
        queries, docs = self.queries.to_scipy(), self.docs.to_scipy()
        by_term = queries.T.tocsr()
        return Fastest(
            {
                "queries x documents": lambda: (queries @ docs.T).toarray(),
                "documents x queries": lambda: (docs @ by_term).toarray().T,
            }
        )

    @functools.cached_property
    def torch_product(self) -> "Fastest":
        """Fastest sparse product, with the 32-bit indices of torch's fastest kernels."""
        docs, queries = _csr(self.docs), _csr(self.queries)
        return Fastest(
            {
                "documents CSR x queries dense": lambda: (docs @ self.query_table).t(),
                "queries dense x documents CSC": lambda: self.query_table.t() @ docs.t(),
                "documents CSR x queries CSR": lambda: (docs @ queries.t()).to_dense().t(),
            }
        )

    @functools.cached_property
    def seismic_queries(self) -> tuple[Any, list[Any], list[Any]]:
        """Numbers, terms and values of the queries, as Seismic takes them."""
        import numpy as np
        import seismic

        text = seismic.get_seismic_string()
        entries = self.queries.to(dtype=torch.float32).to_dicts()
        return (
            np.array([str(q) for q in range(len(entries))], dtype=text),
            [np.array([str(column) for column in row], dtype=text) for row in entries],
            [np.array(list(row.values()), dtype=np.float32) for row in entries],
        )

    def seismic_search(self, k: int) -> list[list[tuple[str, float, str]]]:
        """Return the hits (query, score, document) of each query, with the queries in any order."""
        index = _seismic_index(self._case.documents_alone())
        found: list[list[tuple[str, float, str]]] = index.batch_search(
            *self.seismic_queries, k=k, num_threads=torch.get_num_threads(), **_SEISMIC_SEARCH
        )
        return found


class Fastest:
    """Fastest of several functions that do not fail, found at the first call."""

    def __init__(self, ways: Mapping[str, Callable[[], Any]]) -> None:
        self._ways = ways
        self.name = ""

    def __call__(self) -> Any:
        if not self.name:
            self.name = min(self._ways, key=self._seconds)
        return self._ways[self.name]()

    def _seconds(self, name: str) -> float:
        start = time.perf_counter()
        try:
            self._ways[name]()
        except (RuntimeError, NotImplementedError):
            return float("inf")
        return time.perf_counter() - start


def _csr(rows: SparseRows) -> Tensor:
    csr = rows.to_torch_csr()
    starts, columns = csr.crow_indices().int(), csr.col_indices().int()
    return torch.sparse_csr_tensor(starts, columns, csr.values(), csr.shape)


def _ours(queries: SparseRows, docs: SparseRows, formats: Formats, k: int | None) -> Tensor:
    if k is None:
        return splade_fast.sparse_scores(queries, docs)
    return splade_fast.sparse_search(queries, docs, k)[0]


def _eager(queries: SparseRows, docs: SparseRows, formats: Formats, k: int | None) -> Tensor:
    scores = embedding_bag_scores(formats)
    return scores if k is None else scores.topk(k, dim=1)[0]


def embedding_bag_scores(formats: Formats) -> Tensor:
    """Return scores by embedding_bag, which is faster here than torch's sparse products."""
    return embedding_bag(
        formats.columns,
        formats.query_table,
        formats.starts,
        per_sample_weights=formats.values,
        mode="sum",
    ).t()


def _torch_sparse(queries: SparseRows, docs: SparseRows, formats: Formats, k: int | None) -> Tensor:
    scores: Tensor = formats.torch_product()
    return scores if k is None else scores.topk(k, dim=1)[0]


def _scipy(queries: SparseRows, docs: SparseRows, formats: Formats, k: int | None) -> Tensor:
    import numpy as np

    scores = formats.scipy_product()
    if k is not None:
        scores = np.take_along_axis(scores, _scipy_best(scores, k), axis=1)
    return torch.from_numpy(scores)


def _scipy_best(scores: Any, k: int) -> Any:
    """Return the k best documents of each query, best first."""
    import numpy as np

    best = np.argpartition(scores, -k, axis=1)[:, -k:]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
    return np.take_along_axis(best, order, axis=1)


def _seismic(queries: SparseRows, docs: SparseRows, formats: Formats, k: int) -> Tensor:
    return torch.tensor([score for hits in formats.seismic_search(k) for _, score, _ in hits])


def _recall(formats: Formats, found: Mapping[int, Sequence[int]], k: int) -> float:
    """Return the share of the k best of all queries that was found; equal scores are equal."""
    least = splade_fast.sparse_search(formats.queries, formats.docs, k)[0][:, -1]
    hits = 0
    for query, ids in found.items():
        documents = formats.docs[torch.tensor(sorted(set(ids)), dtype=torch.int64)]
        scores = splade_fast.sparse_scores(formats.queries[query : query + 1], documents)
        hits += int((scores >= least[query] * (1 - 1e-6)).sum().clamp(max=k))
    return hits / (k * len(formats.queries))


@dataclass(frozen=True, kw_only=True)
class ScoreCase(Case):
    op: ClassVar[str] = "score"
    ours: ClassVar[Implementation] = staticmethod(_ours)
    eager: ClassVar[Implementation] = staticmethod(_eager)

    queries: int
    docs: int
    k: int | None = None  # None: sparse_scores
    encoded: bool = False  # else synthetic
    vocab: int = 30522
    query_terms: int = 30
    doc_terms: int = 128

    @property
    def shape(self) -> str:
        searched = "scores" if self.k is None else f"search k{self.k}"
        made = " encoded" if self.encoded else ""
        return f"{searched} Q{self.queries} N{self.docs} V{self.vocab}{made}"

    @property
    def layout(self) -> str:
        return "sparse"

    @property
    def fill(self) -> float:
        """Share of used slots in a sample of the documents."""
        sample = _documents(self.documents_alone())[:4096]
        return sample.lengths.sum().item() / sample.indices.numel()

    @property
    def targets(self) -> tuple[Target, ...]:
        if self.k is not None:
            return ()
        return (Target("times faster than torch sparse", 3), Target("times faster than peer", 10))

    def tiny(self) -> "ScoreCase":
        return replace(
            self, queries=3, docs=200, vocab=500, query_terms=5, doc_terms=20, encoded=False
        )

    def documents_alone(self) -> "ScoreCase":
        """Return a case that is the same for all cases with these documents."""
        return replace(self, queries=0, query_terms=0, k=None)

    def peer(self) -> Implementation:
        import scipy  # noqa: F401

        return _scipy

    def others(self) -> Mapping[str, Callable[[], Implementation]]:
        sparse = {"torch sparse": lambda: _torch_sparse}
        return {**sparse, "seismic": _available_seismic} if self.encoded else sparse

    def detail(self, contender: str, workload: Workload) -> str:
        formats: Formats = workload.arguments[2]
        if contender == "torch sparse":
            return formats.torch_product.name
        if self.k is None:
            return ""
        if contender == "peer":
            best = _scipy_best(formats.scipy_product(), self.k)
            return f"recall {_recall(formats, dict(enumerate(best.tolist())), self.k):.3f}"
        if contender == "seismic":
            found = {
                int(hits[0][0]): [int(document) for _, _, document in hits]
                for hits in formats.seismic_search(self.k)
                if hits
            }
            return f"recall {_recall(formats, found, self.k):.3f}"
        return ""

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
        docs = _documents(self.documents_alone())
        if self.encoded:
            queries = _sample(self.doc_terms)[0][: self.queries].to(self.device, self.dtype)
        else:
            queries = self.rows(self.queries, self.query_terms, 0)
        arguments = (queries, docs, Formats(queries, docs, self), self.k)
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
        """Return all scores by torch's sparse product in fp64, some documents at a time."""
        table = queries.to_dense().double().t()
        parts = []
        for start in range(0, len(docs), _ROWS_AT_ONCE):
            part = docs[start : start + _ROWS_AT_ONCE].to(dtype=torch.float64)
            parts.append((part.to_torch_csr() @ table).t())
        return torch.cat(parts, dim=1)


def _sample(k: int) -> tuple[SparseRows, SparseRows]:
    try:
        return encoded_sample(k)
    except CheckpointError as error:
        raise UnavailableError(str(error)) from error


# Making a million documents, and an index of them, takes longer than searching.
@functools.lru_cache(maxsize=1)
def _documents(case: ScoreCase) -> SparseRows:
    if not case.encoded:
        return case.rows(case.docs, case.doc_terms, 1)
    docs = resampled(_sample(case.doc_terms)[1], case.docs, 1)
    return docs.to(case.device, case.dtype)


@functools.lru_cache(maxsize=1)
def _seismic_index(case: ScoreCase) -> Any:
    import seismic

    docs = _documents(case).to("cpu", torch.float32).to_scipy()
    dataset = seismic.SeismicDataset(dim=case.vocab)
    dataset.add_documents_by_id(
        [str(document) for document in range(case.docs)],
        docs.indices.astype("int64"),
        docs.data,
        docs.indptr.astype("int64"),
    )
    return seismic.SeismicIndex.build_from_dataset(dataset, num_threads=torch.get_num_threads())


def _available_seismic() -> Implementation:
    import seismic  # noqa: F401

    return _seismic


def one_read(docs: SparseRows) -> dict[str, Callable[[], object]]:
    """Return functions that read the documents once."""
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
    million = replace(base, docs=1_000_000, k=10, encoded=True)
    return [base, replace(base, k=100), replace(million, queries=1), million]
