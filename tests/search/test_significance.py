"""Paired tests between runs, and the files of values per query."""

import itertools
import math
import random

import pytest
from scipy import special

from splade_fast.search.lines import DataError
from splade_fast.search.significance import compare_runs, read_per_query, write_per_query


def draw_runs(count, seed=0):
    draw = random.Random(seed)
    ids = [f"q{number}" for number in range(count)]
    return [{"AP": {query_id: draw.random() + bonus for query_id in ids}} for bonus in (0.2, 0)]


def differences_of(runs):
    return [runs[0]["AP"][query_id] - runs[1]["AP"][query_id] for query_id in runs[0]["AP"]]


def test_students_paired_test():
    runs = draw_runs(12)
    differences = differences_of(runs)
    mean = sum(differences) / 12
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 11)
    t = mean / (deviation / math.sqrt(12))
    tail = special.betainc(11 / 2, 1 / 2, 11 / (11 + t * t))  # both tails of Student's t
    [found] = compare_runs(*runs)
    assert found.p_value == pytest.approx(tail)
    assert found.difference == pytest.approx(mean)
    assert (found.measure, found.queries) == ("AP", 12)
    assert found.mean - found.other_mean == pytest.approx(mean)


def test_permutations_are_all_signs_where_there_are_few():
    runs = draw_runs(8)
    differences = differences_of(runs)
    sums = [
        sum(sign * d for sign, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=8)
    ]
    own = sum(differences)
    share = sum(abs(total) >= abs(own) - 1e-12 for total in sums) / len(sums)
    assert compare_runs(*runs, test="permutation")[0].p_value == pytest.approx(share)


def test_wilcoxons_test_of_ranks():
    """All of six differences have one sign: 2 of 2⁶ orders are as extreme."""
    better = {"AP": {f"q{n}": 0.5 + n / 10 for n in range(6)}}
    worse = {"AP": {f"q{n}": 0.4 + n / 20 for n in range(6)}}
    assert compare_runs(better, worse, test="wilcoxon")[0].p_value == pytest.approx(2 / 64)


@pytest.mark.parametrize("test", ["t", "wilcoxon", "permutation"])
def test_equal_runs_do_not_differ(test):
    run = draw_runs(5)[0]
    [found] = compare_runs(run, run, test=test)
    assert (found.difference, found.p_value) == (0, 1)


def test_a_constant_difference_is_certain():
    better = {"AP": {"a": 0.3, "b": 0.5}}
    worse = {"AP": {"a": 0.2, "b": 0.4}}
    assert compare_runs(better, worse)[0].p_value == 0


def test_runs_that_cannot_be_compared():
    run, other = draw_runs(3)
    with pytest.raises(DataError, match="both runs must have a measure in common, got AP and P@1"):
        compare_runs(run, {"P@1": {}})
    del other["AP"]["q2"]
    with pytest.raises(DataError, match="same queries for AP, got 3 and 2, with 'q2' in one"):
        compare_runs(run, other)
    with pytest.raises(DataError, match="at least 2 queries to be compared, got 1"):
        compare_runs({"AP": {"a": 1.0}}, {"AP": {"a": 0.5}})
    with pytest.raises(ValueError, match="test must be one of t, wilcoxon, permutation, got 'z'"):
        compare_runs(run, run, test="z")


def test_files_hold_the_values(tmp_path):
    runs = {"scifact": draw_runs(3)[0], "nq: test": {"P@1": {"a b": 1 / 3}, "AP": {"a b": 0.0}}}
    write_per_query(tmp_path / "values.tsv", runs)
    lines = (tmp_path / "values.tsv").read_text().splitlines()
    assert lines[0] == "data\tquery_id\tmeasure\tvalue"
    assert lines[-2] == f"nq: test\ta b\tP@1\t{1 / 3!r}"
    assert read_per_query(tmp_path / "values.tsv") == runs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must begin with the line 'data.*got nothing"),
        ("a\tb\tc\t1\n", "must begin with the line 'data"),
        ("data\tquery_id\tmeasure\tvalue\na\tb\t1\n", "line 2: expected data, query_id, measure"),
        ("data\tquery_id\tmeasure\tvalue\na\tb\tc\tx\n", "line 2: could not convert"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    (tmp_path / "values.tsv").write_text(content)
    with pytest.raises(DataError, match=message):
        read_per_query(tmp_path / "values.tsv")
