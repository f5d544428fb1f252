"""The study of search_index on tiny inputs."""

import torch

from benchmarks.harness.timing import QUICK
from benchmarks.studies import search_index
from splade_fast import SparseRows


def tiny_corpus() -> search_index.Corpus:
    generator = torch.Generator().manual_seed(0)
    docs = torch.relu(torch.rand(300, 40, generator=generator) - 0.7)
    return search_index.Corpus(SparseRows.from_dense(docs[:4]), SparseRows.from_dense(docs))


def test_exact_contenders_find_every_document(monkeypatch) -> None:
    monkeypatch.setattr(search_index, "_bmp_search", lambda docs: {})
    monkeypatch.setattr(search_index, "_seismic_searches", lambda docs: {})
    found = search_index.one_query(tiny_corpus(), 10, QUICK)
    assert [m.contender for m in found if m.quantity == "recall"] == ["ours", "scan"]
    assert all(m.value == 1 for m in found if m.quantity == "recall")
    assert all(m.value > 0 for m in found)


def test_batch_and_build_are_measured() -> None:
    corpus = tiny_corpus()
    assert {m.contender for m in search_index.batch(corpus, 10, QUICK)} == {"ours", "scan"}
    assert all(m.value > 0 for m in search_index.build(corpus, 0, QUICK))
