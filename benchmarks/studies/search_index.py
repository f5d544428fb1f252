"""Latency of SparseIndex beside the scan and other indexes, on really encoded docstrings.

one query: median and 99th percentile of the time of a query alone, and the share of its k best
documents that a contender finds.

batch: time of 64 queries together.

build: time of a build, and bytes of the index for each byte of its entries.

All run on one thread. `bmp` (safe, over 8-bit impacts) and `pyseismic-lsr` (approximate) take part
where they can be imported; both may be in a folder that PYTHONPATH names.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.case import UnavailableError
from benchmarks.harness.results import TIME, Measurement
from benchmarks.harness.timing import Contender, Rounds, time_in_turns
from benchmarks.inputs.encoded_rows import encoded_sample
from examples.docstrings.checkpoint import CheckpointError
from splade_fast import SparseIndex, SparseRows, sparse_scores, sparse_search

KS = (10, 100, 1000)
BATCH = 64
QUERIES = 600
BMP_BLOCK = 8
# Seismic's settings at two recalls: number of the heaviest terms of a query, and heap factor.
SEISMIC = {"seismic": (10, 0.7), "seismic, careful": (40, 1.0)}

Search = Callable[[SparseRows, int], list[int]]


@dataclass(frozen=True)
class Corpus:
    queries: SparseRows
    docs: SparseRows

    @property
    def subject(self) -> str:
        return f"N {len(self.docs)}, Q {len(self.queries)}"


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    return {
        **{f"one query, k {k}": partial(_on_docstrings, one_query, k, rounds) for k in KS},
        **{f"batch, k {k}": partial(_on_docstrings, batch, k, rounds) for k in KS},
        "build": partial(_on_docstrings, build, 0, rounds),
    }


def one_query(corpus: Corpus, k: int, rounds: Rounds) -> list[Measurement]:
    """Time each query alone, contenders in turns."""
    searches = _searches(corpus)
    turns = {name: Turns(corpus.queries, search, k) for name, search in searches.items()}
    contenders = {name: Contender(turn.run, turn.move_on) for name, turn in turns.items()}
    with _one_thread():
        times = time_in_turns(
            contenders, Rounds(max(rounds.rounds, len(corpus.queries)), rounds.seconds)
        )
        recalls = {name: _recall(corpus, search, k) for name, search in searches.items()}
    found = []
    for name, milliseconds in times.items():
        measured = partial(
            Measurement,
            study="search_index",
            part="one query",
            subject=corpus.subject,
            contender=name,
            axis="k",
            size=k,
        )
        slowest = statistics.quantiles(milliseconds, n=100)[-1]
        found += [
            measured(quantity=TIME, value=statistics.median(milliseconds), unit="ms"),
            measured(quantity="99th percentile", value=slowest, unit="ms"),
            measured(quantity="recall", value=recalls[name]),
        ]
    return found


def batch(corpus: Corpus, k: int, rounds: Rounds) -> list[Measurement]:
    """Time a batch of queries."""
    queries, index = corpus.queries[:BATCH], SparseIndex.build(corpus.docs, show_progress=False)
    contenders = {
        "ours": Contender(lambda: index.search(queries, k)),
        "scan": Contender(lambda: sparse_search(queries, corpus.docs, k)),
    }
    with _one_thread():
        times = time_in_turns(contenders, rounds)
    return [
        Measurement(
            study="search_index",
            part="batch",
            subject=f"N {len(corpus.docs)}, Q {len(queries)}",
            contender=name,
            axis="k",
            size=k,
            quantity=TIME,
            value=statistics.median(milliseconds),
            unit="ms",
            rounds=len(milliseconds),
        )
        for name, milliseconds in times.items()
    ]


def build(corpus: Corpus, _: int, __: Rounds) -> list[Measurement]:
    """Time one build, and compare the size of the file with that of the rows' entries."""
    with _one_thread(), tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        index = SparseIndex.build(corpus.docs, show_progress=False)
        seconds = time.perf_counter() - start
        path = Path(folder) / "index"
        index.save(path)
        size = path.stat().st_size
    entries = int(corpus.docs.lengths.sum()) * (4 + corpus.docs.values.element_size())
    measured = partial(
        Measurement, study="search_index", part="build", subject=f"N {len(corpus.docs)}"
    )
    return [
        measured(quantity="documents/s", value=len(corpus.docs) / seconds),
        measured(quantity="bytes for each byte of the entries", value=size / entries),
    ]


class Turns:
    """Search of one query after another."""

    def __init__(self, queries: SparseRows, search: Search, k: int) -> None:
        self._queries = [queries[q : q + 1] for q in range(len(queries))]
        self._search, self._k, self._next = search, k, -1

    def move_on(self) -> None:
        self._next = (self._next + 1) % len(self._queries)

    def run(self) -> None:
        self._search(self._queries[self._next], self._k)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on_docstrings(
    measure: Callable[[Corpus, int, Rounds], list[Measurement]], k: int, rounds: Rounds
) -> list[Measurement]:
    return measure(_docstrings(), k, rounds)


@functools.cache
def _docstrings() -> Corpus:
    try:
        return Corpus(*encoded_sample(None, limit=None, num_queries=QUERIES))
    except CheckpointError as error:
        raise UnavailableError(str(error)) from error


def _recall(corpus: Corpus, search: Search, k: int) -> float:
    """Return the share of the k best of all queries that was found; equal scores are equal."""
    hits = 0
    for q in range(len(corpus.queries)):
        query = corpus.queries[q : q + 1]
        least = sparse_search(query, corpus.docs, k)[0][0, -1]
        found: Tensor = torch.tensor(sorted(set(search(query, k))), dtype=torch.int64)
        scores = sparse_scores(query, corpus.docs[found])
        hits += int((scores >= least * (1 - 1e-6)).sum())
    return hits / (min(k, len(corpus.docs)) * len(corpus.queries))


def _searches(corpus: Corpus) -> dict[str, Search]:
    index = SparseIndex.build(corpus.docs, show_progress=False)
    searches: dict[str, Search] = {
        "ours": lambda query, k: _ids(index.search(query, k)),
        "scan": lambda query, k: _ids(sparse_search(query, corpus.docs, k)),
    }
    for make in (_bmp_search, _seismic_searches):
        try:
            searches.update(make(corpus.docs))
        except ImportError as error:
            print(f"without {error.name}: {error}", flush=True)
    return searches


def _ids(result: tuple[Tensor, Tensor]) -> list[int]:
    ids: list[int] = result[1][0].tolist()
    return ids


def _bmp_search(docs: SparseRows) -> dict[str, Search]:
    from bmp import Indexer, Searcher

    # The searcher reads the whole file, which may then be removed.
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "bmp")
        indexer = Indexer(path, bsize=BMP_BLOCK, compress_range=False)
        largest = float(docs.values.max())
        for number, row in enumerate(docs.to_dicts()):
            impacts = {str(c): round(value / largest * 255) for c, value in row.items()}
            indexer.add_document(str(number), {c: i for c, i in impacts.items() if i > 0})
        indexer.finish()
        searcher = Searcher(path)

    def search(query: SparseRows, k: int) -> list[int]:
        [terms] = query.to_dicts()
        ids, _ = searcher.search(
            {str(column): value for column, value in terms.items()}, k=k, alpha=1.0, beta=1.0
        )
        return [int(number) for number in ids]

    return {"bmp": search}


def _seismic_searches(docs: SparseRows) -> dict[str, Search]:
    import numpy as np
    import seismic

    matrix = docs.to_scipy()
    dataset = seismic.SeismicDataset(dim=docs.num_cols)
    dataset.add_documents_by_id(
        [str(number) for number in range(len(docs))],
        matrix.indices.astype("int64"),
        matrix.data,
        matrix.indptr.astype("int64"),
    )
    index = seismic.SeismicIndex.build_from_dataset(dataset, num_threads=1)
    text = seismic.get_seismic_string()

    def search(query: SparseRows, k: int, query_cut: int, heap_factor: float) -> list[int]:
        [terms] = query.to_dicts()
        hits: list[Any] = index.search(
            "query",
            np.array([str(column) for column in terms], dtype=text),
            np.array(list(terms.values()), dtype=np.float32),
            k=k,
            query_cut=query_cut,
            heap_factor=heap_factor,
        )
        return [int(document) for _, _, document in hits]

    return {
        name: partial(search, query_cut=cut, heap_factor=factor)
        for name, (cut, factor) in SEISMIC.items()
    }
