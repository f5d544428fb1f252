"""encode_corpus straight to the files of exports and to shards, without an index in between."""

import json
import shutil
from typing import get_args

import pytest

import splade_fast as sf
from splade_fast.encoders.token_names import name_tokens
from splade_fast.export.formats import FORMATS
from splade_fast.search import part_folder
from splade_fast.search.index import Index
from splade_fast.search.part_formats import PartFormat
from splade_fast.search.shards import Shards
from splade_fast.search.texts import DataError
from tests.search.corpora import (
    CHUNK,
    OPTIONS,
    LengthEncoder,
    assert_same_files,
    fail,
    make_texts,
    write_corpus,
)
from tests.search.part_files import assert_joined, contents
from tests.search.test_sparse_index import assert_same

COUNT = 20  # 4 parts, of 2, 2, 2 and 1 batches
BATCHES = 7
PARTS = 4
EXPORTS = [name for name in get_args(PartFormat) if name != "shards"]


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.tsv", make_texts(COUNT))


def encode(encoder, corpus, target, name="qdrant", **changes):
    options = OPTIONS | {"chunk_size": CHUNK, "file_format": name} | changes
    assert sf.encode_corpus(encoder, corpus, target, **options) == COUNT
    return encoder


def interrupt(corpus, target, at=4, name="qdrant"):
    """Let an encoding fail, by default after two parts."""
    with pytest.raises(OSError, match="disk full"):
        encode(LengthEncoder(fail(OSError("disk full"), at)), corpus, target, name)
    assert not target.exists()
    return target.parent / f".{target.name}.partial"


@pytest.mark.parametrize("name", EXPORTS)
def test_joined_files_are_those_of_the_index(tmp_path, corpus, name):
    encoder = LengthEncoder()
    encode(encoder, corpus, tmp_path / "index", "index")
    index = Index.load(tmp_path / "index")
    write, options = FORMATS[name].write, {"show_progress": False}
    if FORMATS[name].has_tokens:
        options["id_to_token"] = name_tokens(encoder.tokenizer)
    write(index.rows, tmp_path / "whole", index.ids, **options)
    encode(encoder, corpus, tmp_path / "parts", name)
    if texts := FORMATS[name].texts:
        given = FORMATS[name].store_texts(list(make_texts(COUNT).values()))
        assert given.keys() == {texts}
        write(index.rows, tmp_path / "with texts", index.ids, **options, **given)
        encode(encoder, corpus, tmp_path / "parts with texts", name, store_texts=True)
        assert_joined(tmp_path / "parts with texts", tmp_path / "with texts", name)
    assert len([*(tmp_path / "parts").glob("*-00000[0-9].*")]) % PARTS == 0
    assert_joined(tmp_path / "parts", tmp_path / "whole", name)
    assert not [*tmp_path.glob(".*")]


def test_shards_are_searched_as_one_index(tmp_path, corpus):
    encode(LengthEncoder(), corpus, tmp_path / "index", "index", k=5)
    encode(LengthEncoder(), corpus, tmp_path / "shards", "shards", k=5)
    index, shards = Index.load(tmp_path / "index"), Shards(tmp_path / "shards")
    assert repr(shards.index).startswith(f"ShardedIndex({PARTS} shards, {COUNT} documents")
    assert list(shards.ids) == index.ids
    assert shards.meta == index.meta
    queries = index.rows[:3]
    assert_same(shards.search(queries, 7), sf.sparse_search(queries, index.rows, 7))


@pytest.mark.parametrize("name", ["opensearch", "shards"])
def test_finished_parts_are_encoded_once(tmp_path, corpus, name):
    encode(LengthEncoder(), corpus, tmp_path / "expected", name)
    interrupt(corpus, tmp_path / "out", name=name)
    encoder = encode(LengthEncoder(), corpus, tmp_path / "out", name, resume=True)
    assert encoder.batches == BATCHES - 4
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("damage", ["cut", "missing", "note", "no note", "unfinished"])
def test_damaged_parts_are_encoded_again(tmp_path, corpus, damage):
    encode(LengthEncoder(), corpus, tmp_path / "expected")
    folder = interrupt(corpus, tmp_path / "out")
    part, note = folder / "parts" / "points-000001.jsonl", folder / "1.json"
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "missing":
        part.unlink()
    elif damage == "note":
        note.write_text('{"documents": 6, "files": ')
    else:
        note.unlink()
    if damage == "unfinished":
        shutil.copytree(folder / "parts", folder / ".1.abc.partial" / "part")
    encoder = encode(LengthEncoder(), corpus, tmp_path / "out", resume=True)
    assert encoder.batches == BATCHES - 2
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert not folder.exists()


def test_a_failure_before_the_first_part_leaves_nothing(tmp_path, corpus):
    interrupt(corpus, tmp_path / "out", at=1)
    assert list(tmp_path.iterdir()) == [corpus]


def test_parts_of_another_format_are_not_continued(tmp_path, corpus):
    interrupt(corpus, tmp_path / "out")
    with pytest.raises(DataError, match="the format of the chunks in .*, qdrant, got parquet"):
        encode(LengthEncoder(), corpus, tmp_path / "out", "parquet", resume=True)
    with pytest.raises(DataError, match="the format of the chunks in .*, qdrant, got index"):
        encode(LengthEncoder(), corpus, tmp_path / "out", "index", resume=True)
    encode(LengthEncoder(), corpus, tmp_path / "expected", "index")
    encode(LengthEncoder(), corpus, tmp_path / "out", "index")  # starts again
    assert_same_files(tmp_path / "out", tmp_path / "expected")


def test_a_call_that_fails_early_leaves_the_parts_of_another_format(tmp_path, corpus):
    folder = interrupt(corpus, tmp_path / "out", name="index")
    before = sorted(folder.iterdir())
    assert len(before) == 3
    (tmp_path / "bad.tsv").write_text("d1\tfox\nd1\tdog\n")
    with pytest.raises(DataError, match="d1"):
        encode(LengthEncoder(), tmp_path / "bad.tsv", tmp_path / "out")
    assert sorted(folder.iterdir()) == before


def test_ids_are_checked_before_anything_is_encoded(tmp_path):
    texts = make_texts(COUNT) | {"x" * 513: "fox"}
    corpus, encoder = write_corpus(tmp_path / "corpus.tsv", texts), LengthEncoder()
    with pytest.raises(ValueError, match="ids must have at most 512 bytes .* in row 20"):
        encode(encoder, corpus, tmp_path / "out", "opensearch")
    assert encoder.batches == 0
    assert list(tmp_path.iterdir()) == [corpus]


def test_ids_that_two_parts_store_as_the_same_are_refused(tmp_path):
    same = "0d6226ff-31c7-5210-955e-fa79b20e54eb"
    texts = {same: "fox", **make_texts(COUNT), same.upper(): "dog"}
    corpus = write_corpus(tmp_path / "corpus.tsv", texts)
    with pytest.raises(ValueError, match="ids must be unique, got .* both stored as"):
        encode(LengthEncoder(), corpus, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [corpus]


def test_weights_that_a_format_cannot_hold_are_named(tmp_path, corpus):
    class Negative(LengthEncoder):
        def sparse_rows(self, inputs, k):
            rows = super().sparse_rows(inputs, k)
            rows.values[:] *= -1 if self.batches > 2 else 1
            return rows

    for name, message in (
        ("seismic", "finite and above 0 .* in row 0, counted from row 6 on"),
        ("shards", "finite and at least 0, .* counted from row 6 on"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(Negative(), corpus, tmp_path / name, name)
        encode(LengthEncoder(), corpus, tmp_path / name, name)


def test_targets_that_cannot_be_written(tmp_path, corpus, monkeypatch):
    with pytest.raises(NotADirectoryError, match="corpus.tsv"):
        encode(LengthEncoder(), corpus, corpus / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there must not exist yet"):
        encode(LengthEncoder(), corpus, tmp_path / "there")

    def lose_parts(batch):
        if batch == 4:
            shutil.rmtree(tmp_path / ".out.partial" / "parts")

    with pytest.raises(FileNotFoundError, match="parts must be on a file system that all machines"):
        encode(LengthEncoder(lose_parts), corpus, tmp_path / "out")

    def write_elsewhere(self, written, number):
        return {"points-000000.jsonl": 7}

    monkeypatch.setattr(part_folder.PartWriter, "_move", write_elsewhere)
    with pytest.raises(OSError, match="file system that all machines share, got no part 0"):
        encode(LengthEncoder(), corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "bm25s"}, "file_format must be one of 'anserini', .*, 'shards', got 'bm25s'"),
        ({"scale": 10.0}, "scale must be given for anserini alone, got 10.0 for qdrant"),
        ({"name": "anserini", "scale": 0.0}, "scale must be finite and above 0, got 0.0"),
        ({"name": "shards", "empty": "skip"}, "another file_format than 'shards'"),
        ({"name": "index", "empty": "skip"}, "another file_format than 'index'"),
        ({"name": "index", "store_texts": True}, "another file_format than 'index'"),
        ({"name": "npz", "store_texts": True}, "store_texts must be False for npz"),
        ({"name": "shards", "store_texts": True}, "store_texts must be False for shards"),
    ],
)
def test_options_that_a_format_does_not_have(tmp_path, corpus, changes, message):
    with pytest.raises(ValueError, match=message):
        encode(LengthEncoder(), corpus, tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == [corpus]


def test_options_reach_the_parts(tmp_path, corpus):
    encode(LengthEncoder(), corpus, tmp_path / "out", "anserini", scale=10, empty="skip")
    lines = (tmp_path / "out" / "documents-000003.jsonl").read_text().splitlines()
    documents = {line["id"]: line["vector"] for line in map(json.loads, lines)}
    assert {text_id: set(vector.values()) for text_id, vector in documents.items()} == {
        text_id: {10 * len(text)} for text_id, text in list(make_texts(COUNT).items())[18:]
    }
