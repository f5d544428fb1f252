"""Measures by name, as means and per query, compared with plain computations."""

import math
import shutil
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
    def fail(*_):
        raise CalledProcessError(25, "gdeval")

    measures = Measures(["AP"])
    monkeypatch.setattr(ir_measures, "calc_aggregate", fail)
    monkeypatch.setattr(ir_measures, "iter_calc", fail)
    for compute in (measures.means, measures.per_query):
        with pytest.raises(ValueError, match="measures must be computable, got .*25"):
            compute(QRELS, RUN)


ODD_QRELS = {"no relevant": {"a b": 0}, "no hits": {"a b": 1}, "7 ü": {"a b": 2, "c": 0}}
ODD_RUN = {"no relevant": {"a b": 1.0}, "no hits": {}, "7 ü": {"c": 2.0, "a b": 1.0}, "other": {}}


@pytest.mark.parametrize(
    "name", ["AP", "nDCG@10", "Judged@10", "Bpref", "SetF", "infAP", "Rprec", "Compat(p=0.8)"]
)
def test_means_are_those_of_the_values_for_odd_ids_and_queries(name):
    measures = Measures([name])
    values = measures.per_query(ODD_QRELS, ODD_RUN)[name]
    assert list(values) == list(ODD_QRELS)
    assert measures.means(ODD_QRELS, ODD_RUN)[name] == pytest.approx(sum(values.values()) / 3)
    assert values["no hits"] == 0


def test_a_program_that_takes_numbers_alone_gets_numbers():
    """gdeval, which ir_measures runs by perl, stops at ids with letters."""
    if shutil.which("perl") is None:
        with pytest.raises(ValueError, match="perl"):
            Measures(["ERR@10"])
        return
    values = Measures(["ERR@10"]).per_query(ODD_QRELS, ODD_RUN)["ERR@10"]
    expected = (2**2 - 1) / 16 / 2  # satisfied at rank 2, with grades up to 4
    assert values == {"no relevant": 0, "no hits": 0, "7 ü": pytest.approx(expected, abs=1e-5)}
