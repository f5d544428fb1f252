"""Searches of other libraries, each a function of one query that returns the ids of its hits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from splade_fast import SparseRows

Search = Callable[[SparseRows, int], list[int]]
SeismicSearch = Callable[[int, float, SparseRows, int], list[int]]  # settings, query, k

_BMP_BLOCK = 8
_ROWS_AT_ONCE = 2**14
# Candidates of Seismic's settings, quickest first: number of the heaviest terms of a query that
# choose blocks, and heap factor, by which the score of the worst hit is multiplied before a block's
# estimate is compared with it.
SEISMIC_SETTINGS = (
    (4, 1.0),
    (4, 0.9),
    (8, 0.9),
    (8, 0.8),
    (8, 0.7),
    (12, 0.7),
    (20, 0.7),
    (20, 0.5),
    (40, 0.4),
    (100, 0.3),
)


def build_bmp(docs: SparseRows, path: Path) -> None:
    """Write the index of `bmp`, block-max pruning, whose impacts have 8 bits."""
    from bmp import Indexer

    indexer = Indexer(str(path), bsize=_BMP_BLOCK, compress_range=False)
    largest = float(docs.values.max())
    for number in range(len(docs)):
        [row] = docs[number : number + 1].to_dicts()
        impacts = {str(c): round(value / largest * 255) for c, value in row.items()}
        indexer.add_document(str(number), {c: i for c, i in impacts.items() if i > 0})
    indexer.finish()


def bmp_search(path: Path) -> Search:
    """Return the search of `bmp`, safe over its impacts."""
    from bmp import Searcher

    searcher = Searcher(str(path))

    def search(query: SparseRows, k: int) -> list[int]:
        [terms] = query.to_dicts()
        ids, _ = searcher.search(
            {str(column): value for column, value in terms.items()}, k=k, alpha=1.0, beta=1.0
        )
        return [int(number) for number in ids]

    return search


_SEISMIC_ENDING = ".index.seismic"  # which Seismic adds to a name


def build_seismic(docs: SparseRows, path: Path) -> None:
    """Write the index of `pyseismic-lsr`."""
    import seismic

    dataset = seismic.SeismicDataset(dim=docs.num_cols)
    for start in range(0, len(docs), _ROWS_AT_ONCE):
        matrix = docs[start : start + _ROWS_AT_ONCE].to_scipy()
        dataset.add_documents_by_id(
            [str(start + number) for number in range(matrix.shape[0])],
            matrix.indices.astype("int64"),
            matrix.data,
            matrix.indptr.astype("int64"),
        )
    index = seismic.SeismicIndex.build_from_dataset(dataset, num_threads=1)
    index.save(str(path))
    path.with_name(path.name + _SEISMIC_ENDING).rename(path)


def seismic_search(path: Path) -> SeismicSearch:
    """Return the approximate search of `pyseismic-lsr`, which takes two settings more."""
    import seismic

    index = seismic.SeismicIndex.load(str(path))
    text = seismic.get_seismic_string()

    def search(query_cut: int, heap_factor: float, query: SparseRows, k: int) -> list[int]:
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

    return search


def tuned_seismic_searches(
    search: SeismicSearch,
    recall: Callable[[Search], float],
    targets: tuple[float, ...],
) -> dict[str, Search]:
    """Return Seismic with its quickest settings that reach each recall.

    Args:
        search: result of `seismic_search`.
        recall: function of a search that returns its recall on a sample of the queries.
        targets: recalls, lowest first.
    """
    found: dict[str, Search] = {}
    reached = 0.0
    settings = iter(SEISMIC_SETTINGS)
    tuned = partial(search, *SEISMIC_SETTINGS[0])
    for target in targets:
        while reached < target and (setting := next(settings, None)) is not None:
            tuned = partial(search, *setting)
            reached = recall(tuned)
        found[f"seismic {target}"] = tuned
    return found


def build_inverted_index(docs: SparseRows, path: Path) -> None:
    """Write the transposed matrix of the documents."""
    parts = (docs[i : i + _ROWS_AT_ONCE] for i in range(0, len(docs), _ROWS_AT_ONCE))
    matrix = scipy.sparse.vstack([part.to_scipy() for part in parts], format="csr")
    with path.open("wb") as file:
        scipy.sparse.save_npz(file, matrix.T.tocsr(), compressed=False)


def inverted_index_search(path: Path) -> Search:
    """Return a plain search term at a time: scipy's product of sparse matrices in C++."""
    with path.open("rb") as file:
        postings = scipy.sparse.load_npz(file)

    def search(query: SparseRows, k: int) -> list[int]:
        scores = query.to_scipy() @ postings
        count = min(k, scores.nnz)
        if count == 0:
            return []
        best = np.argpartition(-scores.data, count - 1)[:count]
        ids: list[int] = scores.indices[best].tolist()
        return ids

    return search
