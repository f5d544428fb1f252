"""Shards: damaged folders are refused."""

import json
import re

import pytest
import torch

import splade_fast as sf
from splade_fast.search.index import Index, IndexMeta
from splade_fast.search.shards import Shards, describe_shards, write_shard
from tests.export.conftest import make_rows


@pytest.fixture
def folder(tmp_path):
    rows, folder = make_rows(), tmp_path / "shards"
    folder.mkdir()
    for number, start in enumerate((0, 20)):
        ids = [f"d{n}" for n in range(start, start + 20)]
        assert write_shard(rows[start : start + 20], tmp_path / "part", ids) == 20
        for file in (tmp_path / "part").iterdir():
            file.rename(folder / f"{file.stem}-{number:06}{file.suffix}")
        (tmp_path / "part").rmdir()
    describe_shards(folder, IndexMeta("model", 8, None), [20, 20])
    return folder


def test_documents_are_found_by_their_ids(folder):
    shards, rows = Shards(folder), make_rows()
    scores, numbers = shards.search(rows[25:26], 1)
    found, expected = sf.sparse_search(rows[25:26], rows, 1)
    assert (scores.tolist(), numbers.tolist()) == (found.tolist(), expected.tolist())
    assert shards.ids[int(numbers)] == f"d{int(numbers)}"
    assert len(shards.ids) == 40


def test_ids_are_read_when_they_are_needed(folder):
    (folder / "ids-000000.json").unlink()
    shards = Shards(folder)
    assert shards.ids[20] == "d20"
    with pytest.raises(FileNotFoundError, match="ids-000000.json"):
        shards.ids[19]


def change(folder, **values):
    file = folder / "shards.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "shards.json").unlink(), FileNotFoundError, "no shards at"),
        (lambda f: (f / "shards.json").write_text("{"), ValueError, "shards.json is damaged"),
        (lambda f: (f / "shards.json").write_text("[]"), ValueError, "shards.json is damaged"),
        (lambda f: change(f, format_version=2), ValueError, "format version 1, got 2"),
        (lambda f: change(f, documents=["x"]), ValueError, "documents cannot be"),
        (lambda f: change(f, documents=[]), ValueError, "damaged: shards must hold at least one"),
        (lambda f: change(f, encoding=None), ValueError, "encoding cannot be None"),
        (lambda f: change(f, encoding={"model": 1}), ValueError, "model cannot be 1"),
        (lambda f: change(f, documents=[20, 19]), ValueError, "must have 19 documents, got 20"),
        (lambda f: (f / "shard-000001.safetensors").unlink(), FileNotFoundError, "shard-000001"),
        (
            lambda f: (f / "shard-000001.safetensors").write_bytes(b"x"),
            ValueError,
            "shard-000001.safetensors is not a safetensors file",
        ),
        (
            lambda f: sf.SparseIndex.build(make_rows(torch.float64)[:20]).save(
                f / "shard-000001.safetensors"
            ),
            ValueError,
            "is damaged: shards.1..dtype must be",
        ),
    ],
)
def test_damaged_folders(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        Shards(folder)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '["d1"]'])
def test_damaged_ids(folder, content):
    (folder / "ids-000001.json").write_text(content)
    shards = Shards(folder)
    assert shards.ids[0] == "d0"
    with pytest.raises(ValueError, match=r"ids-000001.json is damaged: "):
        shards.ids[20]


def test_shards_are_no_index(folder):
    message = f"no index at {re.escape(str(folder))}: the folder holds shards"
    with pytest.raises(FileNotFoundError, match=message):
        Index.load(folder)
