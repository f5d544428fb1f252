"""The study of search_index on tiny inputs."""

import pytest
import torch

from benchmarks.harness.timing import QUICK
from benchmarks.studies import search_index
from benchmarks.studies.search_index import contenders, kept
from splade_fast import SparseRows


@pytest.fixture
def corpus(monkeypatch, tmp_path):
    def refuse(*_):
        raise ImportError("it is not installed", name="bmp")

    monkeypatch.setitem(kept.BUILDS, "bmp", refuse)
    monkeypatch.setitem(kept.BUILDS, "seismic", refuse)
    monkeypatch.setattr(search_index, "SIZES", (100, 200, 300))
    generator = torch.Generator().manual_seed(0)
    docs = torch.relu(torch.rand(300, 40, generator=generator) - 0.7)
    rows = SparseRows.from_dense(docs)
    return search_index.Corpus("tiny", rows[:4], rows, kept.KeptIndexes(tmp_path / "kept"))


def test_prepared_indexes_are_kept(corpus, monkeypatch):
    assert search_index.prepare(corpus, 0, QUICK) == []
    files = {path.name for path in corpus.kept.folder.iterdir() if path.suffix != ".seconds"}
    assert files == {"ours-100", "ours-200", "ours-300", "inverted_index-300"}
    monkeypatch.setattr(kept, "BUILDS", {})
    assert corpus.find("ours").stat().st_size > 0


def test_exact_contenders_find_every_document(corpus):
    found = search_index.one_query(corpus, 10, QUICK)
    recalls = {m.contender: m.value for m in found if m.quantity == "recall"}
    assert recalls == {"ours": 1, "accumulators": 1, "scan": 1, "inverted index": 1}
    assert all(m.value > 0 for m in found)


def test_all_parts_are_measured(corpus):
    for measure in (search_index.two_cores, search_index.batch):
        assert {m.contender for m in measure(corpus, 10, QUICK)} == {"ours", "scan"}
    built = search_index.build(corpus, 0, QUICK)
    assert {m.contender for m in built} == {"ours", "inverted index"}
    assert all(m.value > 0 for m in built)
    grown = search_index.growth(corpus, 10, QUICK)
    assert [m.size for m in grown] == [100, 200, 300, None]
    assert grown[-1].quantity == "exponent"


def test_seismic_takes_the_quickest_settings_that_reach_a_recall():
    recalls = {query_cut: query_cut / 20 for query_cut, _ in contenders.SEISMIC_SETTINGS}
    found = contenders.tuned_seismic_searches(
        lambda query_cut, heap_factor, query, k: [query_cut],
        lambda search: recalls[search(None, 1)[0]],
        (0.3, 0.6),
    )
    assert {name: search(None, 1) for name, search in found.items()} == {
        "seismic 0.3": [8],
        "seismic 0.6": [12],
    }


def test_largest_entries(corpus):
    expected = SparseRows.from_dense(corpus.docs.to_dense(), k=5)
    assert search_index.largest_entries(corpus.docs, 5).equal(expected)
