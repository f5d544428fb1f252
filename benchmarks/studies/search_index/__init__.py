"""Latency of SparseIndex beside the scan and other indexes, on 500,000 really encoded passages.

The passages are those of documentation packages of Debian, with all entries of their vectors or
with the 128 largest; queries are titles of sections.

one query: median and 99th percentile of the time of a query alone on one thread, and the share of
its k best documents that a contender finds. `bmp` is safe over 8-bit impacts, `pyseismic-lsr` is
approximate and tuned to two recalls, and the inverted index is scipy's product of sparse matrices.

batch: time of 64 queries together, with one thread and with two.

build: time of a build, and bytes of the index for each byte of its rows.

growth: time of a query alone, for five numbers of documents.

`bmp` and `pyseismic-lsr` take part where they can be imported; both may be in a folder that
PYTHONPATH names.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from benchmarks.inputs.documentation import DocumentationError
from benchmarks.inputs.encoded_documentation import encoded_documentation
from benchmarks.studies.search_index.contenders import (
    Search,
    SeismicSearch,
    bmp_search,
    inverted_index_search,
    seismic_search,
    tuned_seismic_searches,
)
from examples.docstrings.checkpoint import CheckpointError
from splade_fast import SparseIndex, SparseRows, sparse_scores, sparse_search

KS = (10, 100, 1000)
ENTRIES = {"all entries": None, "128 entries": 128}
BATCH = 64
QUERIES = 100  # searched alone; a scan of each takes a third of a second
SIZES = (31_250, 62_500, 125_000, 250_000, 500_000)
RECALLS = (0.95, 0.99)
_TUNING_QUERIES = 30
_ROWS_AT_ONCE = 2**14


@dataclass(frozen=True, eq=False)
class Corpus:
    name: str
    queries: SparseRows
    docs: SparseRows

    @property
    def subject(self) -> str:
        return f"N {len(self.docs)}, {self.name}"


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    found: dict[str, Callable[[], list[Measurement]]] = {}
    for name in ENTRIES:
        for k in KS:
            found[f"one query, {name}, k {k}"] = partial(_measure, one_query, name, k, rounds)
        for k in KS:
            found[f"batch, {name}, k {k}"] = partial(_measure, batch, name, k, rounds)
        found[f"build, {name}"] = partial(_measure, build, name, 0, rounds)
        found[f"growth, {name}"] = partial(_measure, growth, name, 10, rounds)
    return found


def one_query(corpus: Corpus, k: int, rounds: Rounds) -> list[Measurement]:
    """Time each query alone, contenders in turns."""
    searches = dict(_searches(corpus))
    if k != KS[0]:
        del searches["scan"]  # takes as long for every k
    searches.update(_tuned_searches(corpus, k))
    turns = {name: Turns(corpus.queries, search, k) for name, search in searches.items()}
    contenders = {name: Contender(turn.run, turn.move_on) for name, turn in turns.items()}
    with _threads(1):
        times = time_in_turns(
            contenders, Rounds(max(rounds.rounds, len(corpus.queries)), rounds.seconds)
        )
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
            measured(
                quantity=TIME,
                value=statistics.median(milliseconds),
                unit="ms",
                rounds=len(milliseconds),
            ),
            measured(quantity="99th percentile", value=slowest, unit="ms"),
            measured(quantity="recall", value=recall(corpus, k, searches[name])),
        ]
    return found


def batch(corpus: Corpus, k: int, rounds: Rounds) -> list[Measurement]:
    """Time a batch of queries with one thread and with two."""
    queries, index = corpus.queries[:BATCH], _index(corpus)
    contenders = {
        "ours": Contender(lambda: index.search(queries, k)),
        "scan": Contender(lambda: sparse_search(queries, corpus.docs, k)),
    }
    found = []
    for threads in (1, 2):
        with _threads(threads):
            times = time_in_turns(contenders, rounds)
        part = f"batch of {len(queries)}, {threads} threads"
        found += _medians(times, part=part, subject=corpus.subject, axis="k", size=k)
    return found


def build(corpus: Corpus, _: int, __: Rounds) -> list[Measurement]:
    """Time one build, and compare the size of the file with that of the rows."""
    with _threads(1), tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        index = SparseIndex.build(corpus.docs, show_progress=False)
        seconds = time.perf_counter() - start
        path = Path(folder) / "index"
        index.save(path)
        size = path.stat().st_size
    entries = int(corpus.docs.lengths.sum()) * (4 + corpus.docs.values.element_size())
    measured = partial(Measurement, study="search_index", part="build", subject=corpus.subject)
    return [
        measured(quantity="documents/s", value=len(corpus.docs) / seconds),
        measured(quantity="bytes for each byte of the rows", value=size / corpus.docs.nbytes),
        measured(quantity="bytes for each byte of the entries", value=size / entries),
    ]


def growth(corpus: Corpus, k: int, rounds: Rounds) -> list[Measurement]:
    """Time each query alone in the first documents of the corpus, for five numbers of them."""
    found = []
    for limit in SIZES:
        part = Corpus(corpus.name, corpus.queries, corpus.docs[: min(limit, len(corpus.docs))])
        index = SparseIndex.build(part.docs, show_progress=False)
        searches: dict[str, Search] = {"ours": _ids_of(index)}
        searches.update(_bmp(part.docs))
        turns = {name: Turns(part.queries, search, k) for name, search in searches.items()}
        contenders = {name: Contender(turn.run, turn.move_on) for name, turn in turns.items()}
        with _threads(1):
            times = time_in_turns(
                contenders, Rounds(max(rounds.rounds, len(part.queries)), rounds.seconds)
            )
        subject, size = f"{corpus.name}, k {k}", len(part.docs)
        found += _medians(times, part="growth", subject=subject, axis="documents", size=size)
    return found


def _medians(times: Mapping[str, Sequence[float]], **place: Any) -> list[Measurement]:
    """Return the median milliseconds of each contender, at a place of the study."""
    return [
        Measurement(
            study="search_index",
            contender=name,
            quantity=TIME,
            value=statistics.median(milliseconds),
            unit="ms",
            rounds=len(milliseconds),
            **place,
        )
        for name, milliseconds in times.items()
    ]


def recall(corpus: Corpus, k: int, search: Search, count: int | None = None) -> float:
    """Return the share of the k best that a search finds; equal scores are equal."""
    hits = places = 0
    for q in range(len(corpus.queries))[:count]:
        query = corpus.queries[q : q + 1]
        scores, _ = _index(corpus).search(query, k)
        least, possible = scores[0, -1], int((scores > 0).sum())
        found: Tensor = torch.tensor(sorted(set(search(query, k))), dtype=torch.int64)
        found_scores = sparse_scores(query, corpus.docs[found])
        enough = (found_scores >= least * (1 - 1e-6)) & (found_scores > 0)
        hits += min(int(enough.sum()), possible)
        places += possible
    return hits / max(places, 1)


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
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(
    measure: Callable[[Corpus, int, Rounds], list[Measurement]], name: str, k: int, rounds: Rounds
) -> list[Measurement]:
    return measure(_corpus(name), k, rounds)


@functools.cache
def _corpus(name: str) -> Corpus:
    try:
        queries, docs = encoded_documentation()
    except (CheckpointError, DocumentationError) as error:
        raise UnavailableError(str(error)) from error
    k = ENTRIES[name]
    return Corpus(name, queries[:QUERIES], docs if k is None else largest_entries(docs, k))


def largest_entries(rows: SparseRows, k: int) -> SparseRows:
    """Return rows of their k largest entries."""
    indices, values = [], []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        # Unused slots have the value 0, and stay behind the others.
        places = part.values.topk(min(k, rows.width)).indices.sort().values
        indices.append(part.indices.gather(1, places))
        values.append(part.values.gather(1, places))
    lengths = rows.lengths.clamp(max=k)
    return SparseRows(torch.cat(indices), torch.cat(values), lengths, rows.num_cols)


# Indexes of a corpus serve several measurements.
@functools.lru_cache(maxsize=1)
def _index(corpus: Corpus) -> SparseIndex:
    return SparseIndex.build(corpus.docs, show_progress=False)


@functools.lru_cache(maxsize=1)
def _searches(corpus: Corpus) -> Mapping[str, Search]:
    return {
        "ours": _ids_of(_index(corpus)),
        "scan": lambda query, k: _ids(sparse_search(query, corpus.docs, k)),
        "inverted index": inverted_index_search(corpus.docs),
        **_bmp(corpus.docs),
    }


@functools.lru_cache(maxsize=1)
def _seismic(corpus: Corpus) -> SeismicSearch | None:
    try:
        return seismic_search(corpus.docs)
    except ImportError as error:
        print(f"without {error.name}: {error}", flush=True)
        return None


def _tuned_searches(corpus: Corpus, k: int) -> Mapping[str, Search]:
    search = _seismic(corpus)
    if search is None:
        return {}
    return tuned_seismic_searches(
        search, partial(recall, corpus, k, count=_TUNING_QUERIES), RECALLS
    )


def _bmp(docs: SparseRows) -> Mapping[str, Search]:
    try:
        return {"bmp": bmp_search(docs)}
    except ImportError as error:
        print(f"without {error.name}: {error}", flush=True)
        return {}


def _ids_of(index: SparseIndex) -> Search:
    return lambda query, k: _ids(index.search(query, k))


def _ids(result: tuple[Tensor, Tensor]) -> list[int]:
    ids: list[int] = result[1][0].tolist()
    return ids
