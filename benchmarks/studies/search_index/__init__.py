"""Latency of SparseIndex beside the scan and other indexes, on 500,000 really encoded passages.

The passages are those of documentation packages of Debian, with all entries of their vectors or
with the 128 largest; queries are titles of sections.

prepare: build the indexes of all contenders, which later measurements load.

one query: median and 99th percentile of the time of a query alone on one core, and the share of
its k best documents that a contender finds. `bmp` is safe over 8-bit impacts, `pyseismic-lsr` is
approximate and tuned to two recalls, "accumulators" is the second algorithm of SparseIndex for all
queries, and the inverted index is scipy's product of sparse matrices.

two cores: the same for a query that two threads share.

batch: time of 64 queries together, with one thread and with two.

build: documents a second of CPU time, and bytes of the index.

growth: time of a query alone, for five numbers of documents, and the exponent of their power law.

`bmp` and `pyseismic-lsr` take part where they can be imported; both may be in a folder that
PYTHONPATH names. Each measurement but "prepare" takes less than two minutes.
"""

from __future__ import annotations

import functools
import os
import statistics
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
from benchmarks.inputs.encoded_documentation import encoded_documentation, encoded_folder
from benchmarks.studies.scale.power_law import power_law
from benchmarks.studies.search_index.contenders import (
    Search,
    bmp_search,
    inverted_index_search,
    seismic_search,
    tuned_seismic_searches,
)
from benchmarks.studies.search_index.kept import KeptIndexes
from examples.docstrings.checkpoint import CheckpointError
from splade_fast import SparseIndex, SparseRows, sparse_scores, sparse_search

KS = (10, 100, 1000)
ENTRIES = {"all entries": None, "128 entries": 128}
BATCH = 64
QUERIES = 100  # searched alone; a scan of each takes a seventh of a second
SIZES = (31_250, 62_500, 125_000, 250_000, 500_000)
RECALLS = (0.95, 0.99)
_TUNING_QUERIES = 30
_ROWS_AT_ONCE = 2**14


@dataclass(frozen=True, eq=False)
class Corpus:
    name: str
    queries: SparseRows
    docs: SparseRows
    kept: KeptIndexes

    @property
    def subject(self) -> str:
        return f"N {len(self.docs)}, {self.name}"

    def first(self, count: int) -> SparseRows:
        return self.docs[: min(count, len(self.docs))]

    def find(self, contender: str, docs: SparseRows | None = None) -> Path:
        return self.kept.find(contender, self.docs if docs is None else docs)


def measurements(rounds: Rounds) -> Mapping[str, Callable[[], list[Measurement]]]:
    found: dict[str, Callable[[], list[Measurement]]] = {}
    for name in ENTRIES:
        found[f"prepare, {name}"] = partial(_measure, prepare, name, 0, rounds)
        for measure in (one_query, two_cores, batch):
            part = measure.__name__.replace("_", " ")
            for k in KS:
                found[f"{part}, k {k}, {name}"] = partial(_measure, measure, name, k, rounds)
        found[f"build, {name}"] = partial(_measure, build, name, 0, rounds)
        found[f"growth, {name}"] = partial(_measure, growth, name, 10, rounds)
    return found


def prepare(corpus: Corpus, _: int, __: Rounds) -> list[Measurement]:
    """Build all indexes that are missing."""
    for contender in ("ours", "bmp", "seismic", "inverted index"):
        with _only_if_installed(), _threads(1):
            for size in SIZES if contender in ("ours", "bmp") else SIZES[-1:]:
                corpus.find(contender, corpus.first(size))
    return []


def one_query(corpus: Corpus, k: int, rounds: Rounds) -> list[Measurement]:
    """Time each query alone on one core, contenders in turns."""
    with _threads(1):  # also where a library starts its own threads
        return _one_query(corpus, k, rounds)


def _one_query(corpus: Corpus, k: int, rounds: Rounds) -> list[Measurement]:
    index = _index(corpus)
    searches: dict[str, Search] = {"ours": _ids_of(index)}
    if k == KS[0]:
        searches["scan"] = _scan_of(corpus)  # takes as long for every k
    with _only_if_installed():
        searches["bmp"] = bmp_search(corpus.find("bmp"))
    with _only_if_installed():
        found = partial(recall, corpus, k, count=_TUNING_QUERIES)
        seismic = seismic_search(corpus.find("seismic"))
        searches.update(tuned_seismic_searches(seismic, found, RECALLS))
    searches["inverted index"] = inverted_index_search(corpus.find("inverted index"))
    # Last, since it reads what ours has read.
    searches["accumulators"] = lambda query, k: _ids(
        index._search(query, k, None, None, "accumulators")
    )
    times = _time_queries(corpus.queries, searches, k, rounds)
    place: dict[str, Any] = {"part": "one query", "subject": corpus.subject, "axis": "k", "size": k}
    recalls = [
        Measurement(
            study="search_index",
            contender=name,
            quantity="recall",
            value=recall(corpus, k, search, _TUNING_QUERIES if name == "scan" else None),
            **place,
        )
        for name, search in searches.items()
    ]
    return _medians(times, has_tail=True, **place) + recalls


def two_cores(corpus: Corpus, k: int, rounds: Rounds) -> list[Measurement]:
    """Time each query alone with two threads."""
    searches = {"ours": _ids_of(_index(corpus))}
    if k == KS[0]:
        searches["scan"] = _scan_of(corpus)
    with _threads(2):
        times = _time_queries(corpus.queries, searches, k, rounds)
    place = {"part": "one query, two cores", "subject": corpus.subject, "axis": "k", "size": k}
    return _medians(times, has_tail=True, **place)


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
    """Time one build of ours, and report how long the others took and how large all are."""
    rows = int(corpus.docs.lengths.sum()) * (4 + corpus.docs.values.element_size())
    found = []
    for contender in ("ours", "bmp", "seismic", "inverted index"):
        with _only_if_installed(), _threads(1):
            path = corpus.kept.find(contender, corpus.docs, should_build=contender == "ours")
            seconds = corpus.kept.build_seconds(path)
            size = path.stat().st_size
            measured = partial(
                Measurement,
                study="search_index",
                part="build",
                subject=corpus.subject,
                contender=contender,
            )
            found += [
                measured(quantity="documents/s", value=len(corpus.docs) / seconds),
                measured(quantity="size", value=size / 2**20, unit="MiB"),
                measured(quantity="bytes for each byte of the entries", value=size / rows),
            ]
    return found


def growth(corpus: Corpus, k: int, rounds: Rounds) -> list[Measurement]:
    """Time each query alone in the first documents of the corpus, for five numbers of them."""
    subject = f"{corpus.name}, k {k}"
    found: list[Measurement] = []
    for limit in SIZES:
        docs = corpus.first(limit)
        index = SparseIndex.load(corpus.find("ours", docs), should_check=False)
        searches = {"ours": _ids_of(index)}
        with _only_if_installed():
            searches["bmp"] = bmp_search(corpus.find("bmp", docs))
        with _threads(1):
            times = _time_queries(corpus.queries, searches, k, rounds)
        found += _medians(times, part="growth", subject=subject, axis="documents", size=len(docs))
    for contender in {measured.contender: None for measured in found}:
        own = [measured for measured in found if measured.contender == contender]
        law = power_law([one.size for one in own if one.size], [one.value for one in own])
        found.append(
            Measurement(
                study="search_index",
                part="growth",
                subject=subject,
                contender=contender,
                quantity="exponent",
                value=law.exponent,
                note=f"standard error {law.standard_error:.2f}",
            )
        )
    return found


def _time_queries(
    queries: SparseRows, searches: Mapping[str, Search], k: int, rounds: Rounds
) -> dict[str, list[float]]:
    """Return the milliseconds of each query alone, by contender."""
    for name, search in searches.items():
        # The first search of a term waits for its pages. A scan touches all pages each time.
        for number in range(len(queries) if name != "scan" else 0):
            search(queries[number : number + 1], k)
    turns = {name: Turns(queries, search, k) for name, search in searches.items()}
    contenders = {name: Contender(turn.run, turn.move_on) for name, turn in turns.items()}
    return time_in_turns(contenders, Rounds(max(rounds.rounds, len(queries)), rounds.seconds))


def _medians(
    times: Mapping[str, Sequence[float]], *, has_tail: bool = False, **place: Any
) -> list[Measurement]:
    """Return the median milliseconds of each contender, and the 99th percentile if asked for."""
    found = []
    for name, milliseconds in times.items():
        measured = partial(
            Measurement,
            study="search_index",
            contender=name,
            unit="ms",
            rounds=len(milliseconds),
            **place,
        )
        found.append(measured(quantity=TIME, value=statistics.median(milliseconds)))
        if has_tail:
            slowest = statistics.quantiles(milliseconds, n=100)[-1]
            found.append(measured(quantity="99th percentile", value=slowest))
    return found


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
    """Let torch use some threads; with one, hold all libraries to one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    cores = os.sched_getaffinity(0)
    if count == 1:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(before)


@contextmanager
def _only_if_installed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        print(f"without {error.name}: {error}", flush=True)


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
    folder = encoded_folder() / name.replace(" ", "_")
    k = ENTRIES[name]
    if k is not None:
        path = folder / "vectors.safetensors"
        if not path.exists():
            folder.mkdir(exist_ok=True)
            largest_entries(docs, k).save(path)
        docs = SparseRows.load(path, should_check=False)
    return Corpus(name, queries[:QUERIES], docs, KeptIndexes(folder))


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


# The index of a corpus serves several measurements.
@functools.lru_cache(maxsize=1)
def _index(corpus: Corpus) -> SparseIndex:
    return SparseIndex.load(corpus.find("ours"), should_check=False)


def _scan_of(corpus: Corpus) -> Search:
    return lambda query, k: _ids(sparse_search(query, corpus.docs, k))


def _ids_of(index: SparseIndex) -> Search:
    return lambda query, k: _ids(index.search(query, k))


def _ids(result: tuple[Tensor, Tensor]) -> list[int]:
    ids: list[int] = result[1][0].tolist()
    return ids
