"""Measures of runs, compared with a plain computation, and the rules for what counts."""

import math
import random

import numpy as np
import pytest
import torch

import splade_fast as sf
from splade_fast.search.evaluation import (
    evaluate_run,
    evaluate_vectors,
    make_run,
    select_judged,
    select_qrels,
)
from splade_fast.search.lines import DataError, DataWarning
from splade_fast.search.texts import Texts


def plain_measures(qrels, rankings):
    """Return the means over all judged queries from the ids of their hits, best first."""
    sums = {"MRR@10": 0.0, "nDCG@10": 0.0, "Recall@100": 0.0}
    for query, judged in qrels.items():
        gains = [max(judged.get(doc, 0), 0) for doc in rankings.get(query, [])]
        relevant = sum(gain > 0 for gain in judged.values())
        if not relevant:
            continue
        first = next((rank for rank, gain in enumerate(gains[:10], 1) if gain), math.inf)
        ideal = sorted((max(gain, 0) for gain in judged.values()), reverse=True)
        dcg, best = (
            sum(gain / math.log2(rank + 1) for rank, gain in enumerate(row[:10], 1))
            for row in (gains, ideal)
        )
        sums["MRR@10"] += 1 / first
        sums["nDCG@10"] += dcg / best
        sums["Recall@100"] += sum(gain > 0 for gain in gains[:100]) / relevant
    return {name: pytest.approx(total / len(qrels), abs=1e-9) for name, total in sums.items()}


def draw_rows(draw, count, most):
    """Rows over 6 columns with whole numbers, of which few differ."""
    return torch.tensor([[float(draw.randint(0, most)) for _ in range(6)] for _ in range(count)])


@pytest.mark.filterwarnings("ignore::splade_fast.search.lines.DataWarning")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ignore_identical_ids", [False, True])
def test_measures_agree_with_a_plain_computation_on_ties(seed, ignore_identical_ids):
    draw = random.Random(seed)
    queries, documents = draw_rows(draw, 8, 1), draw_rows(draw, 300, 2)
    doc_ids = [f"d{i}" for i in draw.sample(range(10_000), 300)]
    query_ids = draw.sample(doc_ids, 8)
    qrels = {
        query: {doc: draw.randint(-1, 3) for doc in [*draw.sample(doc_ids, 40), query, "gone"]}
        for query in query_ids
    }
    scores = queries @ documents.T
    assert len(scores.unique()) < 15  # of 2400
    rankings = {
        query: [
            doc_ids[i]
            for i in sorted(range(300), key=lambda i, row=row: (-row[i], i))
            if row[i] > 0 and not (ignore_identical_ids and doc_ids[i] == query)
        ]
        for query, row in zip(query_ids, scores.tolist(), strict=True)
    }
    measured = evaluate_vectors(
        qrels,
        query_ids,
        sf.SparseRows.from_dense(queries),
        doc_ids,
        sf.SparseRows.from_dense(documents),
        ignore_identical_ids=ignore_identical_ids,
    )
    assert measured == plain_measures(qrels, rankings)


def test_scores_that_differ_in_float64_alone_are_no_ties():
    run = {"q": {f"d{i}": 1.0 + i * 2**-40 for i in range(12)}}
    for relevant in run["q"]:
        qrels = {"q": {relevant: 1}}
        assert evaluate_run(qrels, run) == plain_measures(
            qrels, {"q": [f"d{i}" for i in reversed(range(12))]}
        )


def test_documents_that_share_nothing_with_the_query_are_no_hits():
    documents = sf.SparseRows.from_dense(torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]]))
    queries = sf.SparseRows.from_dense(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    found = sf.sparse_search(queries, documents, 3)
    run = make_run(["q1", "q2"], ["d1", "d2", "d3"], *found)
    assert run == {"q1": {"d2": 2.0, "d3": 1.0}, "q2": {}}
    assert list(run["q1"]) == ["d2", "d3"]


def test_a_collapsed_model_scores_0_and_warns():
    none = sf.SparseRows.from_dense(torch.zeros(3, 4))
    ids = ["a", "b", "c"]
    with pytest.warns(DataWarning) as warned:
        found = evaluate_vectors({"a": {"a": 1}, "b": {"c": 1}}, ids[:2], none[:2], ids, none)
    assert found == {"MRR@10": 0.0, "nDCG@10": 0.0, "Recall@100": 0.0}
    [warning] = warned
    assert str(warning.message) == (
        "2 of 2 queries and 3 of 3 documents have empty vectors, which match nothing"
    )


def test_scores_of_nan_do_not_count():
    scores = torch.tensor([[math.nan, 2.0], [1.0, 0.0]])
    with pytest.warns(DataWarning, match="1 of 2 queries have scores that are NaN"):
        run = make_run(["q1", "q2"], ["d1", "d2"], scores, torch.tensor([[0, 1], [1, 0]]))
    assert run == {"q1": {"d2": 2.0}, "q2": {"d2": 1.0}}


def test_the_document_of_the_query_leaves_as_many_hits_as_asked():
    """Rank 101 of equal documents becomes rank 100 without the query's own document."""
    rows = sf.SparseRows.from_dense(torch.ones(150, 2))
    ids = [f"d{i}" for i in range(150)]
    qrels = {"d0": {"d100": 1}, "d120": {"d100": 1}}
    queries = rows[:2]

    def recall(ignore_identical_ids):
        return evaluate_vectors(
            qrels, list(qrels), queries, ids, rows, ignore_identical_ids=ignore_identical_ids
        )["Recall@100"]

    assert recall(False) == 0
    assert recall(True) == 0.5  # d0 is before d100, d120 is not


def test_queries_without_judgements_and_judgements_without_queries_do_not_count():
    queries = Texts(["q1", "q2"], ["fox", "dog"])
    qrels = {"q1": {"d1": 1, "gone": 1}, "q9": {"d1": 1}}
    with pytest.warns(DataWarning, match="1 of 2 judged queries are not among the queries"):
        assert select_judged(queries, qrels) == Texts(["q1"], ["fox"])
    with pytest.warns(DataWarning, match="1 of 2 judged documents are not in the corpus"):
        assert select_qrels(qrels, ["q1"], ["d1", "d2"]) == {"q1": qrels["q1"]}
    one = sf.SparseRows.from_dense(torch.ones(1, 1))
    assert evaluate_vectors(qrels, ["q1"], one, ["d1"], one)["Recall@100"] == 0.5
    with pytest.raises(DataError, match="qrels must judge at least one of the queries, got 'q9'"):
        select_judged(queries, {"q9": {"d1": 1}})


def test_numbers_of_numpy_are_numbers():
    qrels = {np.str_("q1"): {np.str_("d1"): np.int64(1), "d2": np.int8(0)}}
    run = {"q1": {"d2": np.float32(2.0), "d1": np.float32(1.0)}}
    assert evaluate_run(qrels, run)["MRR@10"] == 0.5
    one = sf.SparseRows.from_dense(torch.ones(2, 2))
    ids = np.array(["q1", "q2"])
    assert evaluate_vectors(qrels, ids[:1], one[:1], np.array(["d2", "d1"]), one)["MRR@10"] == 0.5
    [judged] = select_judged(Texts(["q1"], ["fox"]), qrels).ids
    assert judged == "q1"


def test_queries_without_hits_or_relevant_documents_count_as_0():
    qrels = {"q1": {"d1": 1}, "q2": {"d1": 1}, "q3": {"d1": 0}, "q4": {"d1": -1}, "q5": {}}
    run = {"q1": {"d1": 1.0}, "q3": {"d1": 1.0}, "q4": {"d1": 1.0}, "q9": {"d1": 1.0}}
    assert evaluate_run(qrels, run) == dict.fromkeys(("MRR@10", "nDCG@10", "Recall@100"), 0.2)


@pytest.mark.parametrize(
    ("qrels", "error", "message"),
    [
        ({}, DataError, "qrels must judge at least one query, got none"),
        ({1: {"d1": 1}}, TypeError, "qrels must have ids that are str, got 1"),
        ({"q1": {1: 1}}, TypeError, r"qrels\['q1'\] must have ids that are str, got 1"),
        ({"q1": {"d1"}}, TypeError, r"qrels\['q1'\] must map document ids to .*, got set"),
        ({"q1": {"d1": 0.5}}, TypeError, r"qrels\['q1'\]\['d1'\] must be an integer, got float"),
        ({"q1": {"d1": 10**6}}, ValueError, "must have at most 6 digits, got 1000000"),
    ],
)
def test_judgements_that_are_none_are_refused(qrels, error, message):
    with pytest.raises(error, match=message):
        evaluate_run(qrels, {"q1": {"d1": 1.0}})
    with pytest.raises(error, match=message):
        select_judged(Texts(["q1"], ["fox"]), qrels)


def test_scores_of_nan_are_refused():
    with pytest.raises(ValueError, match=r"run\['q1'\] must have scores that are numbers, got NaN"):
        evaluate_run({"q1": {"d1": 1}}, {"q1": {"d1": 1.0, "d2": math.nan}})


@pytest.mark.parametrize(
    ("query_ids", "doc_ids", "error", "message"),
    [
        (["q1"], ["d1", "d2", "d3"], ValueError, "doc_ids must be one per vector, 2, got 3"),
        (["q1"], ["d1"], ValueError, "doc_ids must be one per vector, 2, got 1"),
        (["q1", "q2"], ["d1", "d2"], ValueError, "query_ids must be one per vector, 1, got 2"),
        (["q1"], ["d1", "d1"], ValueError, "doc_ids must be unique, got 'd1' twice"),
        (["q1"], ["d1", 2], TypeError, r"doc_ids\[1\] must be a str, got int"),
        (["q2"], ["d1", "d2"], DataError, "qrels must judge all queries, got no judgement of 'q2'"),
    ],
)
def test_ids_that_do_not_fit_the_vectors_are_refused(query_ids, doc_ids, error, message):
    rows = sf.SparseRows.from_dense(torch.ones(2, 2))
    with pytest.raises(error, match=message):
        evaluate_vectors({"q1": {"d1": 1}}, query_ids, rows[:1], doc_ids, rows)


def test_texts_have_unique_ids():
    with pytest.raises(ValueError, match="ids must be unique, got 'q1' twice"):
        Texts(["q1", "q1"], ["fox", "dog"])
    with pytest.raises(TypeError, match=r"ids\[0\] must be a str, got int"):
        Texts([1], ["fox"])
    with pytest.raises(ValueError, match="texts must be one per id, 1, got 2"):
        Texts(["q1"], ["fox", "dog"])
