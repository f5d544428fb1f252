"""BEIR folders and data sets of that layout."""

import datasets
import pytest

from splade_fast.search.lines import DataError
from splade_fast.search.retrieval_data import read_all_retrieval_data, read_retrieval_data
from splade_fast.search.texts import Texts
from tests.search.beir import QRELS, TRAIN_QRELS, write_beir, write_data_set

TEXTS = Texts(["d1", "d2", "d3"], ["A fox quick and brown", "the lazy dog", "an old tree"])


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_beir_folder(tmp_path, suffix):
    folder = write_beir(tmp_path / "scifact", suffix=suffix)
    data = read_retrieval_data(folder)
    assert data.name == "scifact"
    assert data.queries == Texts(["q1", "q2"], ["fox", "old dog"])
    assert data.corpus == TEXTS
    assert data.qrels == QRELS
    train = read_retrieval_data(f"{folder}:train")
    assert (train.name, train.qrels) == ("scifact:train", TRAIN_QRELS)
    with pytest.raises(DataError, match="must be one of test, train, got 'dev'"):
        read_retrieval_data(f"{folder}:dev")


def test_the_only_split_counts(tmp_path):
    folder = write_beir(tmp_path / "set")
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "dev.tsv")
    with pytest.raises(DataError, match="one split, test or a named one .*, got dev, train"):
        read_retrieval_data(folder)
    (folder / "qrels" / "train.tsv").unlink()
    assert read_retrieval_data(folder).qrels == QRELS


def test_a_set_of_mteb(tmp_path):
    splits = {"corpus": ["corpus"], "queries": ["queries"], "default": ["test", "train"]}
    folder = write_data_set(tmp_path / "scifact", judgements="default", splits=splits)
    data = read_retrieval_data(folder)
    assert (data.name, data.corpus, data.qrels) == ("scifact", TEXTS, QRELS)
    assert read_retrieval_data(f"{folder}:train").qrels == TRAIN_QRELS


def test_a_set_of_nanobeir(tmp_path):
    """The judgements have no scores, and all configurations the same split."""
    splits = {key: ["train"] for key in ("corpus", "queries", "qrels")}
    folder = write_data_set(tmp_path / "NanoSciFact", judgements="qrels", splits=splits)
    data = read_retrieval_data(folder)
    assert (data.corpus, data.qrels) == (TEXTS, {"q1": {"d1": 1}, "q2": {"d2": 1}})


def test_sets_as_splits(tmp_path):
    splits = {key: ["NanoNQ", "NanoFiQA"] for key in ("corpus", "queries", "qrels")}
    folder = write_data_set(tmp_path / "NanoBEIR", judgements="qrels", splits=splits)
    sources = [f"{folder}:NanoNQ", f"{folder}:NanoFiQA"]
    found = read_all_retrieval_data(sources)
    assert list(found) == ["NanoBEIR:NanoNQ", "NanoBEIR:NanoFiQA"]
    assert found["NanoBEIR:NanoFiQA"].qrels == TRAIN_QRELS
    with pytest.raises(DataError, match="queries of .* must have one split, test or a named one"):
        read_retrieval_data(folder)


def test_other_data_sets_are_refused(tmp_path):
    datasets.Dataset.from_list([{"a": 1}]).to_parquet(tmp_path / "pairs" / "train.parquet")
    with pytest.raises(DataError, match="must have the configurations corpus, queries and qrels"):
        read_retrieval_data(tmp_path / "pairs")
    with pytest.raises(DataError, match="missing must be a BEIR folder or a data set on the hub"):
        read_retrieval_data(tmp_path / "missing")
    folder = write_beir(tmp_path / "set")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(DataError, match="must hold queries.jsonl beside corpus.jsonl, got none"):
        read_retrieval_data(folder)


def test_names_of_several_sources(tmp_path):
    a, b = write_beir(tmp_path / "a" / "set"), write_beir(tmp_path / "b" / "set")
    assert list(read_all_retrieval_data([str(a), str(b)])) == [str(a), str(b)]
    with pytest.raises(DataError, match="each source must be given once"):
        read_all_retrieval_data([str(a), str(a)])
