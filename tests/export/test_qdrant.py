"""Export to Qdrant, read back by its client in memory."""

import json
import sys
import uuid

import numpy as np
import pytest
import torch
from qdrant_client import QdrantClient, models

from splade_fast import SparseRows, export
from tests.export.conftest import NUM_COLS, make_rows


@pytest.fixture
def client():
    return QdrantClient(":memory:")


def stored(client, name, vector_name="splade"):
    records, _ = client.scroll(name, limit=1000, with_vectors=True)
    return {record.payload["id"]: (record, record.vector[vector_name]) for record in records}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_points_come_back_and_are_found(client, ids, dtype):
    rows = make_rows(dtype)
    payloads = ({"title": f"t{number}"} for number in range(len(rows)))
    export.upload_to_qdrant(
        client, "documents", rows, ids, payloads=payloads, batch_size=7, show_progress=False
    )
    found = stored(client, "documents")
    assert set(found) == set(ids)
    for number, (id_, weights) in enumerate(zip(ids, rows.to_dicts(), strict=True)):
        record, vector = found[id_]
        assert record.payload == {"id": id_, "title": f"t{number}"}
        assert record.id == export.qdrant_id(id_)
        # Qdrant keeps float32.
        back = SparseRows.from_dicts(
            [dict(zip(vector.indices, vector.values, strict=True))], NUM_COLS, dtype=torch.float32
        )
        expected = SparseRows.from_dicts([weights], NUM_COLS, dtype=torch.float32)
        assert back.equal(expected)
    scores = rows[5:6].to_dense().double() @ rows.to_dense().double().t()
    [query] = rows[5:6].to_dicts()
    hits = client.query_points(
        "documents",
        query=models.SparseVector(indices=list(query), values=list(query.values())),
        using="splade",
        limit=5,
    ).points
    best = scores[0].sort(descending=True)[0][:5].tolist()
    assert [hit.score for hit in hits] == pytest.approx(best, rel=1e-6)


def test_uploading_again_replaces_and_skipping_leaves_out(client, rows, ids, empty_rows):
    options = {"vector_name": "terms", "show_progress": False}
    export.upload_to_qdrant(client, "documents", rows, ids, empty="skip", **options)
    assert set(stored(client, "documents", "terms")) == {
        id_ for number, id_ in enumerate(ids) if number not in empty_rows
    }
    export.upload_to_qdrant(client, "documents", rows, ids, **options)
    assert client.count("documents").count == len(rows)


def test_lines_are_the_points(tmp_path, rows, ids):
    payloads = [{"text": f'"{number}" %s'} for number in range(len(rows))]
    options = {"payloads": payloads, "vector_name": 'a "name" %', "show_progress": False}
    assert export.write_qdrant(rows, tmp_path / "out", ids, **options) == len(rows)
    lines = (tmp_path / "out" / "points.jsonl").read_text(encoding="utf-8").splitlines()
    read = [models.PointStruct(**json.loads(line)) for line in lines]
    points = list(export.qdrant_points(rows, ids, **options))
    assert len(read) == len(points)
    for one, other in zip(read, points, strict=True):
        assert (one.id, one.payload) == (other.id, other.payload)
        mine, theirs = one.vector['a "name" %'], other.vector['a "name" %']
        assert mine.indices == theirs.indices
        assert torch.equal(torch.tensor(mine.values), torch.tensor(theirs.values))


def test_points_are_made_while_they_are_consumed(rows):
    consumed = []
    payloads = (consumed.append(number) or {} for number in range(len(rows)))
    points = export.qdrant_points(rows, payloads=payloads, show_progress=False)
    assert consumed == []
    assert next(points).id == 0


@pytest.mark.parametrize("number", [0, 17, 2**64 - 1])
def test_whole_numbers_and_uuids_stay(number):
    assert export.qdrant_id(number) == number
    assert export.qdrant_id(str(number)) == number
    text = "123e4567-e89b-12d3-a456-426614174000"
    assert export.qdrant_id(text) == text


def test_other_texts_become_uuids_of_their_own():
    texts = ["d1", "017", "-1", "", "1.5", "٣", "狐", str(2**64), "9" * 9999]
    found = [export.qdrant_id(text) for text in texts]
    assert len(set(found)) == len(texts)
    assert all(str(uuid.UUID(id_)) == id_ for id_ in found)
    assert export.qdrant_id("d1") == "0d6226ff-31c7-5210-955e-fa79b20e54eb"  # fixed for all time


@pytest.mark.parametrize(
    ("one", "other", "stored"),
    [
        (17, "17", "17"),
        (
            "123e4567-e89b-12d3-a456-426614174000",
            "{123E4567E89B12D3A456426614174000}",
            "'123e4567-e89b-12d3-a456-426614174000'",
        ),
        ("d1", "0d6226ff-31c7-5210-955e-fa79b20e54eb", "'0d6226ff-31c7-5210-955e-fa79b20e54eb'"),
    ],
)
def test_documents_of_one_point_are_refused(client, tmp_path, one, other, stored):
    rows = SparseRows.from_dense(torch.ones(3, 2))
    message = f"ids must be unique, got {one!r} in row 0 and {other!r} in row 2, .* as {stored}$"
    with pytest.raises(ValueError, match=message):
        export.write_qdrant(rows, tmp_path / "out", [one, "b", other], show_progress=False)
    with pytest.raises(ValueError, match=message):
        export.upload_to_qdrant(client, "documents", rows, [one, "b", other])
    assert list(tmp_path.iterdir()) == []
    assert not client.collection_exists("documents")


def test_ids_of_other_types_are_refused_as_points():
    assert export.qdrant_id(np.int64(17)) == 17
    for id_ in (True, 1.0, None):
        with pytest.raises(TypeError, match="ids must be strings or integers, got "):
            export.qdrant_id(id_)


@pytest.mark.parametrize("number", [-1, 2**64])
def test_numbers_out_of_range_are_refused(number):
    with pytest.raises(ValueError, match=f"ids must be between 0 and .*, got {number}"):
        export.qdrant_id(number)


def test_bad_arguments_are_refused_before_anything_is_sent(client, rows):
    for options, message in [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"ids": ["a"]}, "ids must be one per row, 40, got 1"),
        ({"empty": "error"}, "got an empty row 0"),
        ({"payloads": [{}] * 39 + [{"x": float("nan")}]}, r"payloads\[39\] must hold"),
    ]:
        with pytest.raises(ValueError, match=message):
            export.upload_to_qdrant(client, "documents", rows, **options)
    with pytest.raises(TypeError, match="vector_name must be a str, got int"):
        export.upload_to_qdrant(client, "documents", rows, vector_name=5)
    assert not client.collection_exists("documents")


def test_a_missing_client_is_named(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(ImportError, match=r"pip install splade_fast\[qdrant\]"):
        export.qdrant_points(rows)
