"""export_parts: an index folder to numbered files, or to shards."""

import pytest
import torch

import splade_fast as sf
from splade_fast.export import export_parts as module
from splade_fast.export.export_index import export_index
from splade_fast.export.export_parts import export_parts
from splade_fast.search.index import Index, IndexMeta
from splade_fast.search.lines import DataError
from splade_fast.search.shards import Shards
from tests.export.conftest import NUM_COLS, make_rows
from tests.search.part_files import assert_joined, contents
from tests.search.test_encoded_parts import EXPORTS
from tests.search.test_sparse_index import assert_same
from tests.tiny_models import masked_lm_configs, save_checkpoint

SIZE = 7  # 6 parts of 40 documents


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(masked_lm_configs()["bert"], tmp_path_factory.mktemp("bert"))


@pytest.fixture
def index(rows, model, tmp_path):
    ids = [f"d{number}" for number in range(len(rows))]
    Index(rows, ids, IndexMeta(str(model), 256, None)).save(tmp_path / "index")
    return tmp_path / "index"


def export(index, name="qdrant", out="out", **options):
    options = {"part_size": SIZE, "show_progress": False} | options
    return export_parts(index, index.parent / out, name, **options)


def interrupt(index, monkeypatch, count=3):
    """Let an export fail after some parts."""
    read, done = module.RangeReader.read, []

    def fail(self, wanted):
        if len(done) == count:
            raise OSError("disk full")
        done.append(wanted)
        return read(self, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(module.RangeReader, "read", fail)
        with pytest.raises(OSError, match="disk full"):
            export(index)
    return index.parent / ".out.partial"


@pytest.mark.parametrize("empty", ["keep", "skip"])
@pytest.mark.parametrize("name", EXPORTS)
def test_joined_files_are_those_of_a_whole_export(index, rows, name, empty, empty_rows):
    count = export_index(Index.load(index), index.parent / "whole", name, empty=empty)
    assert export(index, name, empty=empty) == count
    assert count == len(rows) - (len(empty_rows) if empty == "skip" else 0)
    assert_joined(index.parent / "out", index.parent / "whole", name)


def test_shards_are_searched_as_one_index(index, rows):
    assert export(index, "shards") == len(rows)
    shards = Shards(index.parent / "out")
    assert shards.ids[:] == Index.load(index).ids
    assert shards.ids[-1] == "d39"
    with pytest.raises(IndexError):
        shards.ids[40]
    assert shards.meta == Index.load(index).meta
    assert shards.num_cols == NUM_COLS
    queries = rows[3:9]
    assert_same(shards.search(queries, 10), sf.sparse_search(queries, rows, 10))


def test_an_index_without_documents(model, tmp_path):
    no_rows = sf.SparseRows.from_dense(torch.zeros(0, NUM_COLS))
    Index(no_rows, [], IndexMeta(str(model), 256, None)).save(tmp_path / "index")
    assert export(tmp_path / "index", "opensearch") == 0
    assert sorted(contents(tmp_path / "out")) == ["bulk-000000.ndjson", "mapping.json"]
    assert export(tmp_path / "index", "shards", "shards") == 0
    scores, _ = Shards(tmp_path / "shards").search(make_rows()[:2], 3)
    assert scores.shape == (2, 0)


def test_finished_parts_are_written_once(index, monkeypatch):
    export(index, out="expected")
    interrupt(index, monkeypatch)
    read, numbers = module.RangeReader.read, []

    def note(self, wanted):
        numbers.append(wanted.number)
        return read(self, wanted)

    monkeypatch.setattr(module.RangeReader, "read", note)
    export(index, resume=True)
    assert numbers == [3, 4, 5]
    assert contents(index.parent / "out") == contents(index.parent / "expected")


def test_parts_of_another_index_or_size_are_not_continued(index, rows, monkeypatch):
    interrupt(index, monkeypatch)
    with pytest.raises(DataError, match="the number of documents of a file of .*, 7, got 8"):
        export(index, resume=True, part_size=8)
    with pytest.raises(DataError, match="the empty of the chunks in .*, keep, got skip"):
        export(index, resume=True, empty="skip")
    rows.to(dtype=torch.float64).save(index / "vectors.safetensors")
    with pytest.raises(DataError, match="the size of the vectors of .* got"):
        export(index, resume=True)
    assert export(index) == len(rows)


def test_damaged_vectors_are_not_written(index, rows):
    indices = rows.indices.clone()
    indices[9, :2] = NUM_COLS
    damaged = sf.SparseRows(indices, rows.values, rows.lengths, rows.num_cols)
    damaged.save(index / "vectors.safetensors")
    with pytest.raises(ValueError, match="is damaged: .*, counted from row 7 on"):
        export(index)
    assert len(list((index.parent / ".out.partial" / "parts").iterdir())) == 1


def test_vectors_that_are_replaced_meanwhile(index, rows, monkeypatch):
    load = Index.load

    def load_and_replace(path, **options):
        loaded = load(path, **options)
        rows[:30].save(index / "vectors.safetensors")
        return loaded

    monkeypatch.setattr(Index, "load", load_and_replace)
    with pytest.raises(ValueError, match="must keep its 40 rows, got another file"):
        export(index)
    assert not list(index.parent.glob("*out*"))


def test_an_empty_document_is_an_error_on_request(index):
    Index(make_rows()[1:], [str(n) for n in range(39)], Index.load(index).meta).save(
        index.parent / "later"
    )
    with pytest.raises(ValueError, match="got an empty row 5, counted from row 7 on"):
        export(index.parent / "later", empty="error")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part_size": 0}, "part_size must be at least 1, got 0"),
        ({"name": "bm25s"}, "file_format must be one of .*, got 'bm25s'"),
        ({"model": "x"}, "model must not be given for qdrant"),
        ({"name": "shards", "model": "x"}, "model must not be given for shards"),
        ({"engine": "spark"}, "engine must be 'process', 'ray' or a RayEngine, got 'spark'"),
    ],
)
def test_bad_arguments(index, options, message):
    with pytest.raises(ValueError, match=message):
        export(index, **options)
    assert list(index.parent.iterdir()) == [index]


def test_existing_folders_stay(index):
    with pytest.raises(FileExistsError, match="must not exist yet"):
        export(index, out="index")
