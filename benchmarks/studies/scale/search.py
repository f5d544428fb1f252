"""Exact search of synthetic SPLADE rows, those of the score cases, in a memory-mapped file."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import splade_fast
from benchmarks.cases.score import ScoreCase
from benchmarks.harness.checks import FLOOR_IN_EPSILONS, TIMES_EAGER, relative_error
from benchmarks.harness.memory import peak_growth
from benchmarks.harness.results import EXTRA_MEMORY, Measurement
from benchmarks.harness.timing import Rounds
from benchmarks.studies.scale.work import (
    Work,
    Works,
    WrongError,
    measure_time,
    mebibytes,
    per_second,
    quantity,
)
from splade_fast import SparseRows
from splade_fast.search.join_files import join_files

DOCUMENTS = (312_500, 625_000, 1_250_000, 2_500_000, 5_000_000)
QUERIES = {"1 query": 1, "64 queries": 64}
ROWS, LOAD = "rows", "load and check"

SYNTHETIC = ScoreCase(direction="forward", dtype=torch.float32, device="cpu", queries=0, docs=0)
_ROWS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class SearchWork(Work):
    path: Path  # file of the rows
    queries: int
    k: int = 10

    def measure(self, rounds: Rounds) -> list[Measurement]:
        queries = SYNTHETIC.rows(self.queries, SYNTHETIC.query_terms, 0)
        start = time.perf_counter()
        docs = SparseRows.load(self.path)  # every page of it is then in memory
        load = quantity(quantity=LOAD, value=(time.perf_counter() - start) * 1e3, unit="ms")

        def search() -> Tensor:
            return splade_fast.sparse_search(queries, docs, self.k)[0]

        splade_fast.sparse_search(queries, docs[:_ROWS_AT_ONCE], self.k)  # threads do not count
        peak = peak_growth(search)
        found = measure_time(search, rounds)
        self._check(queries, docs, search())
        return [
            found,
            per_second("queries/s", self.queries, found),
            mebibytes(EXTRA_MEMORY, peak),
            mebibytes(ROWS, docs.nbytes),
            load,
        ]

    def _check(self, queries: SparseRows, docs: SparseRows, scores: Tensor) -> None:
        exact = self._best_scores(queries, docs, torch.float64)
        plain = self._best_scores(queries, docs, torch.float32)
        allowed = TIMES_EAGER * relative_error(plain, exact)
        allowed += FLOOR_IN_EPSILONS * torch.finfo(scores.dtype).eps
        if (error := relative_error(scores, exact)) > allowed:
            raise WrongError(f"search of {len(docs)} documents: error {error:.2e} > {allowed:.2e}")

    def _best_scores(self, queries: SparseRows, docs: SparseRows, dtype: torch.dtype) -> Tensor:
        """Return the k best scores by torch's sparse product of some documents at a time."""
        table = queries.to_dense().to(dtype).t()
        best = table.new_empty(len(queries), 0)
        for start in range(0, len(docs), _ROWS_AT_ONCE):
            part = docs[start : start + _ROWS_AT_ONCE].to(dtype=dtype)
            scores = torch.cat([best, (part.to_torch_csr() @ table).t()], dim=1)
            best = scores.topk(min(self.k, scores.shape[1]), dim=1)[0]
        return best


def _parts(count: int) -> Iterator[SparseRows]:
    """Yield the first `count` of the same endless rows, some at a time."""
    for seed, start in enumerate(range(0, count, _ROWS_AT_ONCE), start=1):
        yield SYNTHETIC.rows(min(_ROWS_AT_ONCE, count - start), SYNTHETIC.doc_terms, seed)


def search_documents(documents: int, folder: Path) -> Works:
    parts = []
    for number, rows in enumerate(_parts(documents)):
        parts.append(folder / f"{number}.safetensors")
        rows.save(parts[-1])
    path = folder / "rows.safetensors"
    join_files(parts, path)
    return [(title, SearchWork(path, queries)) for title, queries in QUERIES.items()]
