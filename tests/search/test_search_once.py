"""Documents that are searched once are indexed where that takes less time than a scan."""

import pytest
import torch

import splade_fast as sf
from splade_fast.search import search_once as module
from splade_fast.search.search_once import pays_to_build, search_once

DENSE = torch.arange(60.0).view(12, 5) % 7
ROWS = sf.SparseRows.from_dense(DENSE)


def test_the_rule_weighs_a_build_against_a_scan():
    assert pays_to_build(9000, 100_000)
    assert not pays_to_build(600, 10_000_000)
    assert not pays_to_build(1_000_000, 10_000)


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_both_ways_find_the_same(monkeypatch, pays, value):
    monkeypatch.setattr(module, "pays_to_build", lambda queries, documents: pays)
    queries = sf.SparseRows.from_dense(DENSE[:3])
    queries.values[0, 0] = value
    found, expected = search_once(queries, ROWS, 4), sf.sparse_search(queries, ROWS, 4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_an_index_is_built_where_it_pays(monkeypatch):
    built = []
    monkeypatch.setattr(module, "pays_to_build", lambda queries, documents: True)
    monkeypatch.setattr(module.SparseIndex, "build", lambda rows, **_: built.append(len(rows)))
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'search'"):
        search_once(ROWS, ROWS, 4)
    assert built == [12]
