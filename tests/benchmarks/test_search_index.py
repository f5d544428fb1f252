"""The study of search_index on tiny inputs."""

import pytest
import torch

from benchmarks.harness.timing import QUICK
from benchmarks.studies import search_index
from benchmarks.studies.search_index import contenders
from splade_fast import SparseRows


@pytest.fixture
def corpus(monkeypatch):
    monkeypatch.setattr(search_index, "_bmp", lambda docs: {})
    monkeypatch.setattr(search_index, "_seismic", lambda corpus: None)
    generator = torch.Generator().manual_seed(0)
    docs = torch.relu(torch.rand(300, 40, generator=generator) - 0.7)
    rows = SparseRows.from_dense(docs)
    return search_index.Corpus("tiny", rows[:4], rows)


def test_exact_contenders_find_every_document(corpus):
    found = search_index.one_query(corpus, 10, QUICK)
    recalls = {m.contender: m.value for m in found if m.quantity == "recall"}
    assert recalls == {"ours": 1, "scan": 1, "inverted index": 1}
    assert all(m.value > 0 for m in found)


def test_batch_build_and_growth_are_measured(corpus, monkeypatch):
    assert {m.contender for m in search_index.batch(corpus, 10, QUICK)} == {"ours", "scan"}
    assert all(m.value > 0 for m in search_index.build(corpus, 0, QUICK))
    monkeypatch.setattr(search_index, "SIZES", (100, 200))
    assert [m.size for m in search_index.growth(corpus, 10, QUICK)] == [100, 200]


def test_seismic_takes_the_quickest_settings_that_reach_a_recall():
    recalls = {query_cut: query_cut / 20 for query_cut, _ in contenders.SEISMIC_SETTINGS}
    found = contenders.tuned_seismic_searches(
        lambda query_cut, heap_factor, query, k: [query_cut],
        lambda search: recalls[search(None, 1)[0]],
        (0.3, 0.6),
    )
    assert {name: search(None, 1) for name, search in found.items()} == {
        "seismic 0.3": [6],
        "seismic 0.6": [12],
    }


def test_largest_entries(corpus):
    expected = SparseRows.from_dense(corpus.docs.to_dense(), k=5)
    assert search_index.largest_entries(corpus.docs, 5).equal(expected)
