"""The study of encoding by workers of Ray, with the plain process in their place."""

import pytest

from benchmarks.harness.timing import QUICK
from benchmarks.studies import ray_encode
from benchmarks.studies.ray_encode import Contender
from tests.search.corpora import LengthEncoder, make_texts, write_corpus

CONTENDERS = {"one": Contender("process", 1), "other": Contender("process", 1)}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_encode, "_CHUNK", 5)
    return write_corpus(tmp_path / "corpus.tsv", make_texts(20))


def test_each_contender_has_a_start_and_a_rate(corpus):
    found = ray_encode.compare(LengthEncoder(), corpus, CONTENDERS, QUICK)
    assert [(row.contender, row.quantity) for row in found] == [
        (name, quantity) for name in CONTENDERS for quantity in ("start", "documents/s")
    ]
    assert all(row.value > 0 for row in found if row.quantity == "documents/s")


def test_start_and_rate_come_from_the_times_of_the_chunks(corpus):
    pieces, _ = ray_encode.list_pieces(corpus, 5)
    # Two workers begin after 3 seconds, and each takes 2 seconds for a chunk.
    start, rate = ray_encode._start_and_rate([5.0, 5.0, 7.0, 7.0], pieces, 2)
    assert (start, rate) == (3.0, 5.0)


def test_parquet_files_are_written_in_turns(corpus):
    found = ray_encode.compare_parquet(LengthEncoder(), corpus, CONTENDERS, QUICK)
    assert [row.contender for row in found] == ["one", "other"]
    assert len(list(corpus.parent.glob("parquet */documents-000003.parquet"))) == 6
