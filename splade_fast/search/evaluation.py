"""Retrieval quality of a run, by ir_measures."""

from __future__ import annotations

from collections.abc import Sequence

import ir_measures
from torch import Tensor

from splade_fast.search.texts import Qrels

_SHOWN_AS = {"RR@10": "MRR@10", "nDCG@10": "nDCG@10", "R@100": "Recall@100"}

Run = dict[str, dict[str, float]]


def run_of(query_ids: Sequence[str], doc_ids: Sequence[str], scores: Tensor, hits: Tensor) -> Run:
    """The result of `sparse_search` as {query id: {document id: score}}.

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
    """MRR@10, nDCG@10 and Recall@100, each the mean over the judged queries.

    A judged query without any hit counts as 0.
    """
    measures = [ir_measures.parse_measure(name) for name in _SHOWN_AS]
    results = ir_measures.calc_aggregate(measures, qrels, run)
    return {_SHOWN_AS[str(measure)]: float(results[measure]) for measure in measures}
