"""Measures by name, as means and per query, compared with plain computations."""

import math
from subprocess import CalledProcessError

import ir_measures
import pytest

from splade_fast.search.evaluation import evaluate_run
from splade_fast.search.measures import Measures

QRELS = {"q1": {"a": 2, "b": 1, "c": 0}, "q2": {"b": 1}, "q3": {"a": 1}}
RUN = {"q1": {"c": 3.0, "b": 2.0, "a": 2.0}, "q2": {"b": 1.0}}  # q3 has no hits
VALUES = {
    "MRR@10": (1 / 2, 1.0, 0.0),
    "RR@1": (0.0, 1.0, 0.0),
    "nDCG@2": ((1 / math.log2(3)) / (2 + 1 / math.log2(3)), 1.0, 0.0),
    "P@2": (1 / 2, 1 / 2, 0.0),
    "P(rel=2)@3": (1 / 3, 0.0, 0.0),
    "Recall@2": (1 / 2, 1.0, 0.0),
    "MAP": ((1 / 2 + 2 / 3) / 2, 1.0, 0.0),
    "Success@1": (0.0, 1.0, 0.0),
}


def test_values_of_each_query_and_their_means():
    measures = Measures(list(VALUES))
    per_query = measures.per_query(QRELS, RUN)
    assert list(per_query) == list(VALUES)
    for name, values in VALUES.items():
        assert per_query[name] == pytest.approx(dict(zip(QRELS, values, strict=True))), name
    expected = {name: pytest.approx(sum(values) / 3) for name, values in VALUES.items()}
    assert measures.means(QRELS, RUN) == expected
    assert evaluate_run(QRELS, RUN, ["MAP"]) == {"MAP": expected["MAP"]}


@pytest.mark.parametrize(
    ("names", "depth"),
    [(None, 100), (["P@3", "R@7"], 7), (["P@3", "AP"], 1000), (["R@2000"], 2000)],
)
def test_depth_is_the_largest_cutoff(names, depth):
    assert Measures(names).depth == depth


@pytest.mark.parametrize("name", ["foo", "nDCG@", "R@-1", "BPM", "__import__('os')", "nDCG@10 AP"])
def test_unknown_measures(name):
    with pytest.raises(ValueError, match="measures must be names of ir_measures, such as nDCG@10"):
        Measures([name])


def test_repeated_measures():
    with pytest.raises(ValueError, match="measures must be named once each, got AP, AP"):
        Measures(["AP", "AP"])
    assert Measures(["AP", "MAP"]).means(QRELS, RUN)["AP"] == pytest.approx((7 / 12 + 1) / 3)


def test_a_program_that_fails_is_bad_input(monkeypatch):
    """ir_measures computes ERR by a program that takes no ids with letters."""

    def fail(*_):
        raise CalledProcessError(25, "gdeval")

    measures = Measures(["AP"])
    monkeypatch.setattr(ir_measures, "calc_aggregate", fail)
    monkeypatch.setattr(ir_measures, "iter_calc", fail)
    for compute in (measures.means, measures.per_query):
        with pytest.raises(ValueError, match="measures must be computable for these ids, got .*25"):
            compute(QRELS, RUN)
