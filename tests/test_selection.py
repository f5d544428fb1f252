"""Pairs of parameters, against all that there are."""

from itertools import combinations, product

import pytest

from tests.selection import covering_rows, pairwise


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 3, 2, 5), (1, 6, 1), (7,), (3, 0, 2)])
def test_covers_every_pair(sizes):
    rows = covering_rows(sizes)
    for i, j in combinations(range(len(sizes)), 2):
        if all(sizes):
            expected = set(product(range(sizes[i]), range(sizes[j])))
            assert {(row[i], row[j]) for row in rows} == expected
    assert len(rows) == len(set(rows))


def test_takes_few_rows():
    assert len(covering_rows((4, 4, 3, 2))) <= 20  # of 96; 16 is the least possible


@pytest.mark.parametrize("is_whole", [False, True])
def test_whole_product_on_demand(monkeypatch, is_whole):
    monkeypatch.setenv("TEST_ALL", "1" if is_whole else "")
    mark = pairwise(a=range(3), b="xyz", c=[pytest.param(0, id="zero"), pytest.param(1)])
    names, params = mark.args
    assert names == ("a", "b", "c")
    assert len(params) == 18 if is_whole else len(params) < 18
    assert params[0].values == (0, "x", 0)
    assert params[0].id == "0-x-zero"
