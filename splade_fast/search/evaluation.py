"""Retrieval quality of a run or of encoded queries and documents, measured by ir_measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.hits import list_hits, warn_of_data, warn_of_empty_vectors
from splade_fast.search.lines import DataError, check_ids
from splade_fast.search.measures import Measures, Run
from splade_fast.search.qrels import Qrels, plain_qrels
from splade_fast.search.search_once import Search, search_once
from splade_fast.search.texts import Texts

__all__ = [
    "Run",
    "evaluate_run",
    "evaluate_vectors",
    "make_run",
    "search_judged",
    "select_judged",
    "select_qrels",
]


def select_judged(queries: Texts, qrels: Qrels) -> Texts:
    """Return the queries that have judgements, and warn of judgements without a query.

    Raises:
        DataError, TypeError: see `plain_qrels`; or no judged query is among the queries.
    """
    qrels = plain_qrels(qrels)
    judged = [pair for pair in zip(queries.ids, queries.texts, strict=True) if pair[0] in qrels]
    if not judged:
        raise DataError(f"qrels must judge at least one of the queries, got {min(qrels)!r}")
    missing = len(qrels) - len(judged)
    if missing:
        warn_of_data(f"{missing} of {len(qrels)} judged queries are not among the queries")
    return Texts([query_id for query_id, _ in judged], [text for _, text in judged])


def select_qrels(qrels: Qrels, query_ids: Sequence[str], doc_ids: Iterable[str]) -> Qrels:
    """Return the judgements of some queries, and warn of judged documents that do not exist.

    Such documents stay in the judgements and count as not retrieved, as in trec_eval.

    Args:
        qrels: judgements {query id: {document id: relevance}}.
        query_ids: ids of judged queries.
        doc_ids: ids of all documents.

    Raises:
        DataError: a query is not judged.
    """
    selected = _judgements_of(query_ids, qrels)
    judged = {doc_id for row in selected.values() for doc_id in row}
    missing = len(judged.difference(doc_ids))
    if missing:
        warn_of_data(
            f"{missing} of {len(judged)} judged documents are not in the corpus, and count as not "
            "retrieved"
        )
    return selected


def make_run(
    query_ids: Sequence[str],
    doc_ids: Sequence[str],
    scores: Tensor,
    hits: Tensor,
    *,
    ignore_identical_ids: bool = False,
) -> Run:
    """Return the result of `sparse_search` as {query id: {document id: score}}, best first.

    Documents that score 0 are no hits, and are left out.

    Args:
        query_ids: Q ids.
        doc_ids: N ids.
        scores: (Q, k).
        hits: (Q, k), document numbers.
        ignore_identical_ids: whether to leave out the document that has the id of the query.
    """
    return {
        query_id: {
            doc_ids[document]: score
            for document, score in found
            if not (ignore_identical_ids and doc_ids[document] == query_id)
        }
        for query_id, found in zip(query_ids, list_hits(scores, hits), strict=True)
    }


def evaluate_run(qrels: Qrels, run: Run, measures: Sequence[str] | None = None) -> dict[str, float]:
    """Return MRR@10, nDCG@10 and Recall@100, or other measures, over the judged queries.

    A judged query without hits counts as 0. All measures rank by descending score, and hits of
    equal score in the order of the run, which in `make_run` is that of `sparse_search`: by
    ascending document number.

    Args:
        qrels: {query id: {document id: relevance}}.
        run: {query id: {document id: score}}.
        measures: names of measures; see `Measures`.

    Raises:
        DataError, TypeError: see `plain_qrels`.
        ValueError: a score is NaN, or there is no such measure.

    Example::

        >>> from splade_fast.search.evaluation import evaluate_run
        >>> evaluate_run({"q1": {"d2": 1}}, {"q1": {"d1": 3.0, "d2": 3.0}})["MRR@10"]
        0.5
    """
    return Measures(measures).means(qrels, run)


def evaluate_vectors(
    qrels: Qrels,
    query_ids: Sequence[str],
    queries: SparseRows,
    doc_ids: Sequence[str],
    documents: SparseRows,
    *,
    ignore_identical_ids: bool = False,
    measures: Sequence[str] | None = None,
) -> dict[str, float]:
    """Search the documents for each query exactly, and return the measures of `evaluate_run`.

    Vectors without entries match nothing; a warning tells their number.

    Args:
        qrels: {query id: {document id: relevance}}; those of other queries are left out.
        query_ids: Q ids of judged queries.
        queries: (Q, V).
        doc_ids: N ids.
        documents: (N, V).
        ignore_identical_ids: whether the document that has the id of the query is not searched, as
            in BEIR, where some queries (ArguAna, Quora) are documents themselves.
        measures: names of measures; see `Measures`.

    Raises:
        TypeError: see `evaluate_run`; or an id is not a str.
        ValueError: see `evaluate_run`; or an id is repeated, there is not one for each vector, or a
            query is not judged.

    Example::

        >>> from splade_fast.search.evaluation import evaluate_vectors
        >>> rows = sf.SparseRows.from_dense(torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
        >>> qrels = {"a": {"b": 1}, "b": {"a": 1}}
        >>> ids = ["a", "b"]
        >>> evaluate_vectors(qrels, ids, rows, ids, rows)["MRR@10"]
        0.75
        >>> evaluate_vectors(qrels, ids, rows, ids, rows, ignore_identical_ids=True)["MRR@10"]
        1.0
    """
    chosen = Measures(measures)
    _check_vectors(query_ids, queries, doc_ids, documents)
    judgements = _judgements_of(query_ids, qrels)
    run = search_judged(
        query_ids,
        queries,
        doc_ids,
        documents,
        depth=chosen.depth,
        ignore_identical_ids=ignore_identical_ids,
    )
    return chosen.means(judgements, run)


def search_judged(
    query_ids: Sequence[str],
    queries: SparseRows,
    doc_ids: Sequence[str],
    documents: SparseRows,
    *,
    depth: int,
    ignore_identical_ids: bool = False,
    search: Search = search_once,
) -> Run:
    """Search the documents for each query exactly, and return the hits as `make_run` does.

    Vectors without entries match nothing; a warning tells their number.

    Args:
        query_ids: Q ids.
        queries: (Q, V).
        doc_ids: N ids.
        documents: (N, V).
        depth: number of hits of each query.
        ignore_identical_ids: see `evaluate_vectors`.
        search: exact search. The default builds a `SparseIndex` where that takes less time than to
            scan all documents.

    Raises:
        TypeError: an id is not a str.
        ValueError: an id is repeated, or there is not one for each vector.
    """
    _check_vectors(query_ids, queries, doc_ids, documents)
    warn_of_empty_vectors(queries, documents)
    # One hit more, since that of the query itself is left out.
    scores, hits = search(queries, documents, depth + int(ignore_identical_ids))
    return make_run(query_ids, doc_ids, scores, hits, ignore_identical_ids=ignore_identical_ids)


def _check_vectors(
    query_ids: Sequence[str], queries: SparseRows, doc_ids: Sequence[str], documents: SparseRows
) -> None:
    """Raise an error unless there is a different id for each vector."""
    for name, ids, rows in (("query_ids", query_ids, queries), ("doc_ids", doc_ids, documents)):
        check_ids(name, ids)
        if len(ids) != len(rows):
            raise ValueError(f"{name} must be one per vector, {len(rows)}, got {len(ids)}")


def _judgements_of(query_ids: Sequence[str], qrels: Qrels) -> Qrels:
    for query_id in query_ids:
        if query_id not in qrels:
            raise DataError(f"qrels must judge all queries, got no judgement of {query_id!r}")
    return {query_id: qrels[query_id] for query_id in query_ids}
