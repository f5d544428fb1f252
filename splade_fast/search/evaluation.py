"""Retrieval quality of a run or of encoded queries and documents, measured by ir_measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import ir_measures
from torch import Tensor

from splade_fast.ops.score import sparse_search
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.search.texts import DataError, Qrels, Texts

_DISPLAY_NAMES = {"RR@10": "MRR@10", "nDCG@10": "nDCG@10", "R@100": "Recall@100"}
_HITS = 100  # the largest cutoff of the measures

Run = dict[str, dict[str, float]]


def select_judged(queries: Texts, qrels: Qrels) -> Texts:
    """Return the queries that have judgements.

    Raises:
        DataError: nothing is judged, or a judged query is not among the queries.
    """
    if not qrels:
        raise DataError("qrels must judge at least one query, got none")
    check_judged_ids("queries", queries.ids, qrels)
    judged = [pair for pair in zip(queries.ids, queries.texts, strict=True) if pair[0] in qrels]
    return Texts([query_id for query_id, _ in judged], [text for _, text in judged])


def check_judged_ids(name: str, ids: Sequence[str], judged_ids: Iterable[str]) -> None:
    """Check that all judged ids are among `ids`.

    Args:
        name: "queries" or "corpus", for the message.
        ids: ids of the queries or of the documents.
        judged_ids: ids in the judgements.

    Raises:
        DataError: an id is missing.
    """
    missing = set(judged_ids) - set(ids)
    if missing:
        raise DataError(f"qrels must judge ids of the {name} alone, got {min(missing)!r}")


def make_run(query_ids: Sequence[str], doc_ids: Sequence[str], scores: Tensor, hits: Tensor) -> Run:
    """Return the result of `sparse_search` as {query id: {document id: score}}.

    Args:
        query_ids: Q ids.
        doc_ids: N ids.
        scores: (Q, k).
        hits: (Q, k), document numbers.
    """
    return {
        query_id: {doc_ids[hit]: score for hit, score in zip(row_hits, row_scores, strict=True)}
        for query_id, row_hits, row_scores in zip(
            query_ids, hits.tolist(), scores.tolist(), strict=True
        )
    }


def evaluate_run(qrels: Qrels, run: Run) -> dict[str, float]:
    """Return MRR@10, nDCG@10 and Recall@100, each the mean over the judged queries.

    A judged query without hits counts as 0.
    """
    measures = [ir_measures.parse_measure(name) for name in _DISPLAY_NAMES]
    results = ir_measures.calc_aggregate(measures, qrels, run)
    return {_DISPLAY_NAMES[str(measure)]: float(results[measure]) for measure in measures}


def evaluate_vectors(
    qrels: Qrels,
    query_ids: Sequence[str],
    queries: SparseRows,
    doc_ids: Sequence[str],
    documents: SparseRows,
) -> dict[str, float]:
    """Search the documents for each query exactly, and return the measures of `evaluate_run`.

    Args:
        qrels: {query id: {document id: relevance}}.
        query_ids: Q ids.
        queries: (Q, V).
        doc_ids: N ids.
        documents: (N, V).
    """
    scores, hits = sparse_search(queries, documents, min(_HITS, len(documents)))
    return evaluate_run(qrels, make_run(query_ids, doc_ids, scores, hits))
