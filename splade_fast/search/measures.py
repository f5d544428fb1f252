"""Measures of retrieval by the names of ir_measures, per query and as means."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from subprocess import SubprocessError
from typing import Any

from splade_fast.search.qrels import Qrels, plain_qrels

Run = dict[str, dict[str, float]]

DEFAULT_MEASURES = ("MRR@10", "nDCG@10", "Recall@100")
# Usual names of measures, and those of ir_measures.
_ALIASES = {"MRR": "RR", "Recall": "R", "MAP": "AP", "Precision": "P"}
_DEPTH_WITHOUT_CUTOFF = 1000  # as trec_eval's


class Measures:
    """Measures that ir_measures computes, such as nDCG@10, AP or P(rel=2)@5.

    MRR, Recall, MAP and Precision are other names of RR, R, AP and P.

    Args:
        names: their names; by default MRR@10, nDCG@10 and Recall@100.

    Raises:
        ValueError: ir_measures knows no such measure or cannot compute it, or a name is repeated.

    Example::

        >>> from splade_fast.search.measures import Measures
        >>> measures = Measures(["MRR@10", "P@1"])
        >>> measures.means({"q1": {"d2": 1}}, {"q1": {"d1": 3.0, "d2": 3.0}})
        {'MRR@10': 0.5, 'P@1': 0.0}
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self._by_name = {name: _parse(name) for name in names or DEFAULT_MEASURES}
        if names and len(self._by_name) < len(names):
            raise ValueError(f"measures must be named once each, got {', '.join(names)}")
        self._measures = list(dict.fromkeys(self._by_name.values()))

    @property
    def names(self) -> list[str]:
        """Names as they were given."""
        return list(self._by_name)

    @property
    def depth(self) -> int:
        """Number of hits of a query that the measures need."""
        cutoffs = [measure.params.get("cutoff") for measure in self._measures]
        return max(_DEPTH_WITHOUT_CUTOFF if cutoff is None else cutoff for cutoff in cutoffs)

    def means(self, qrels: Qrels, run: Run) -> dict[str, float]:
        """Return each measure over all judged queries; see `evaluate_run`."""
        import ir_measures

        with _errors_of_other_programs():
            found = ir_measures.calc_aggregate(self._measures, *_number_ids(qrels, run))
        return {name: float(found[measure]) for name, measure in self._by_name.items()}

    def per_query(self, qrels: Qrels, run: Run) -> dict[str, dict[str, float]]:
        """Return {measure: {query id: value}} for all judged queries."""
        import ir_measures

        query_ids = list(qrels)
        values: dict[Any, dict[str, float]] = {
            measure: dict.fromkeys(query_ids, float(measure.DEFAULT)) for measure in self._measures
        }
        with _errors_of_other_programs():
            for metric in ir_measures.iter_calc(self._measures, *_number_ids(qrels, run)):
                values[metric.measure][query_ids[int(metric.query_id)]] = float(metric.value)
        return {name: values[measure] for name, measure in self._by_name.items()}


@contextmanager
def _errors_of_other_programs() -> Iterator[None]:
    """Raise ValueError where a program fails that ir_measures runs, as for ERR."""
    try:
        yield
    except SubprocessError as error:
        raise ValueError(f"measures must be computable, got {error}") from error


def _number_ids(qrels: Qrels, run: Run) -> tuple[Qrels, Run]:
    """Return plain judgements, and a run of different scores, with numbers in place of ids.

    Some programs behind the measures take only numbers of queries, and read ids up to a blank.
    Queries without hits are left out of the run, since some measures would divide by 0.
    """
    judgements = plain_qrels(qrels)
    numbers = {query_id: str(number) for number, query_id in enumerate(judgements)}
    judged_ids = (doc_id for judged in judgements.values() for doc_id in judged)
    hit_ids = (doc_id for hits in run.values() for doc_id in hits)
    documents: dict[str, str] = {}
    for doc_id in chain(judged_ids, hit_ids):
        documents.setdefault(doc_id, str(len(documents)))
    numbered_qrels = {
        numbers[query_id]: {documents[doc_id]: relevance for doc_id, relevance in judged.items()}
        for query_id, judged in judgements.items()
    }
    numbered_run = {
        numbers[query_id]: {
            documents[doc_id]: rank
            for doc_id, rank in _replace_scores_by_ranks(query_id, hits).items()
        }
        for query_id, hits in run.items()
        if hits and query_id in numbers
    }
    return numbered_qrels, numbered_run


def _parse(name: str) -> Any:
    import ir_measures  # here, since the benchmarks on another machine do without

    kind = name.partition("@")[0]
    known = _ALIASES.get(kind, kind) + name[len(kind) :]
    try:
        measure = ir_measures.parse_measure(known)
        measure.validate_params()
        ir_measures.evaluator([measure], {"q": {"d": 1}})
    except Exception as error:  # of any class: the name is parsed as an expression of Python
        raise ValueError(
            f"measures must be names of ir_measures, such as nDCG@10 or AP, got {name!r} ({error})"
        ) from error
    return measure


def _replace_scores_by_ranks(query_id: str, hits: dict[str, float]) -> dict[str, float]:
    """Return different scores in the same order: n, n - 1, …, 1.

    The libraries behind the measures order equal scores by id, some up and some down, and compare
    scores in float32.
    """
    if any(math.isnan(score) for score in hits.values()):
        raise ValueError(f"run[{query_id!r}] must have scores that are numbers, got NaN")
    best_first = sorted(hits, key=hits.__getitem__, reverse=True)  # stable
    return {doc_id: float(len(hits) - rank) for rank, doc_id in enumerate(best_first)}
