"""Index folders: arguments of other types, and files that are damaged or of something else."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import splade_fast as sf
from splade_fast.cli import app
from splade_fast.search.fingerprint import Fingerprint
from splade_fast.search.index import Index, IndexMeta
from tests.search.corpora import LengthEncoder, assert_same_files, make_texts, write_corpus

FINGERPRINT = Fingerprint("float32", "weights", "vocabulary", "settings")


@pytest.fixture
def rows():
    return sf.SparseRows.from_dense(torch.rand(3, 20))


@pytest.fixture
def index(rows, tmp_path):
    meta = IndexMeta(
        "model", 16, 5, fingerprint=FINGERPRINT, query_model="q", query_fingerprint=FINGERPRINT
    )
    Index(rows, ["a", "b", "c"], meta).save(tmp_path / "index")
    return tmp_path / "index"


def test_all_settings_are_read_as_written(index):
    meta = Index.load(index).meta
    assert meta.fingerprint == meta.query_fingerprint == FINGERPRINT
    assert (meta.model, meta.max_length, meta.k, meta.query_model) == ("model", 16, 5, "q")


def test_paths_and_numbers_of_numpy(rows, tmp_path):
    plain = Index(rows, ["a", "b", "c"], IndexMeta("m", 16, 5, query_model="q"))
    plain.save(str(tmp_path / "plain"))
    meta = IndexMeta(Path("m"), np.int64(16), np.uint8(5), query_model=Path("q"))
    Index(rows, np.array(["a", "b", "c"]), meta).save(tmp_path / "other")
    assert_same_files(tmp_path / "other", tmp_path / "plain")


def test_encode_corpus_takes_numbers_of_numpy(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.tsv", make_texts(20))
    numbers = {"k": 8, "batch_size": 4, "max_length": 16, "chunk_size": 6}
    for name, kind in (("plain", int), ("other", np.int16)):
        options = {option: kind(number) for option, number in numbers.items()}
        model = tmp_path if kind is np.int16 else str(tmp_path)
        index = tmp_path / name if kind is np.int16 else str(tmp_path / name)
        sf.encode_corpus(
            LengthEncoder(), corpus, index, model=model, show_progress=False, **options
        )
    assert_same_files(tmp_path / "other", tmp_path / "plain")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("m", 16.0, None), TypeError, "max_length must be an integer, got float"),
        (("m", 0, None), ValueError, "max_length must be at least 1, got 0"),
        (("m", 16, 0), ValueError, "k must be at least 1, got 0"),
        ((5, 16, None), TypeError, "int"),
    ],
)
def test_settings_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        IndexMeta(*arguments)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (["a", "b"], ValueError, "ids must be one per row, 3, got 2"),
        (["a", "b", "a"], ValueError, "ids must be unique, got 'a' twice"),
        (["a", 2, "c"], TypeError, r"ids\[1\] must be a str, got int"),
    ],
)
def test_ids_that_no_load_would_take_are_not_saved(rows, tmp_path, ids, error, message):
    with pytest.raises(error, match=message):
        Index(rows, ids, IndexMeta("m", 16, None)).save(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"model": 5},
        {"max_length": 0},
        {"k": "5"},
        {"query_model": 5},
        {"fingerprint": "x"},
        {"query_fingerprint": asdict(FINGERPRINT) | {"weights": None}},
        {"unknown": 1},
    ],
)
def test_damaged_settings(index, change):
    content = json.loads((index / "meta.json").read_text())
    (index / "meta.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=re.escape(f"{index / 'meta.json'} is damaged: ")):
        Index.load(index)


def write_other_tensors(path):
    save_file({"weight": torch.ones(2)}, path)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeros": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "other tensors": write_other_tensors,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_vectors(index, damage):
    """One error names the file, from Python and from every command that reads an index."""
    path = index / "vectors.safetensors"
    DAMAGES[damage](path)
    for load in (sf.SparseRows.load, lambda path: Index.load(path.parent)):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load(path)
    folder = index.parent
    (folder / "queries.tsv").write_text("q\tfox\n")
    (folder / "qrels.tsv").write_text("q\ta\t1\n")
    for command in (
        ["search", index, "fox"],
        [
            *("evaluate", "--index", index),
            *("--queries", folder / "queries.tsv", "--qrels", folder / "qrels.tsv"),
        ],
        ["export", index, folder / "out", "--format", "npz"],
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in command])
        assert result.exit_code == 2, result.output
        [message] = result.stderr.splitlines()
        assert message.startswith(f"Error: {path} ")


def test_an_index_is_no_model(index):
    message = re.escape(f"the checkpoint must be a model, got the index {index}")
    for kind in (sf.SpladeEncoder, sf.TermWeightEncoder, sf.BagOfWordsQueryEncoder):
        with pytest.raises(ValueError, match=message):
            kind.from_pretrained(index)
    for name in ("model", "query_model"):
        options = {"model": "m", name: index}
        with pytest.raises(ValueError, match=f"^{name} must be a model, got the index"):
            sf.encode_corpus(LengthEncoder(), "corpus.tsv", index.parent / "new", **options)
