"""Export to Parquet, read by pyarrow and pandas."""

import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from splade_fast import SparseRows, export
from splade_fast.export import parquet as parquet_writer
from tests.export.conftest import make_rows


def to_lists(rows):
    return [(columns.tolist(), values.tolist()) for columns, values in rows]


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, pa.float32()),
        (torch.float64, pa.float64()),
        (torch.bfloat16, pa.float32()),
        (torch.float16, pa.float32()),
    ],
)
def test_the_table_has_the_same_rows(tmp_path, ids, dtype, stored):
    rows = make_rows(dtype)
    texts = [f"text {number}" for number in range(len(rows))]
    count = export.write_parquet(rows, tmp_path / "out", ids, texts=texts, show_progress=False)
    assert count == len(rows)
    table = parquet.read_table(tmp_path / "out")
    assert [(field.name, field.type) for field in table.schema] == [
        ("id", pa.string()),
        ("indices", pa.list_(pa.int32())),
        ("values", pa.list_(stored)),
        ("text", pa.string()),
    ]
    assert table.schema.metadata[b"num_cols"] == str(rows.num_cols).encode()
    found = table.to_pydict()
    assert found["id"] == ids
    assert found["text"] == texts
    expected = rows.to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert list(zip(found["indices"], found["values"], strict=True)) == to_lists(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_and_parts_of_them_are_rows_again(tmp_path, dtype):
    rows = make_rows(dtype)
    export.write_parquet(rows, tmp_path / "out", show_progress=False)
    table = parquet.read_table(tmp_path / "out")
    assert export.parquet_rows(table).equal(rows)
    assert export.parquet_rows(table[7:20]).equal(rows[7:20])
    assert export.parquet_rows(pa.concat_tables([table[:3], table[9:]])).equal(
        SparseRows.cat([rows[:3], rows[9:]])
    )
    assert export.parquet_rows(table[:0]).equal(rows[:0])
    plain = table.replace_schema_metadata(None)
    assert export.parquet_rows(plain, num_cols=99).num_cols == 99
    cut = pa.table({"indices": [[0, 1]], "values": [[1.0]]})
    for wrong, num_cols, message in (
        (plain, None, "num_cols must be given for a table without it in its metadata"),
        (table.drop_columns("values"), None, "columns indices and values, got no values"),
        (
            pa.table({"indices": [[2]], "values": [[1.0]]}),
            2,
            "indices must be between 0 and 1",
        ),
        (cut, 2, "as many indices as values in each row"),
    ):
        with pytest.raises(ValueError, match=message):
            export.parquet_rows(wrong, num_cols)


def test_integers_are_stored_as_strings_and_rows_have_numbers(tmp_path):
    rows = SparseRows.from_dicts([{0: 1.5}, {}], num_cols=2)
    export.write_parquet(rows, tmp_path / "given", [17, "b"], show_progress=False)
    export.write_parquet(rows, tmp_path / "numbers", show_progress=False)
    assert pd.read_parquet(tmp_path / "given")["id"].tolist() == ["17", "b"]
    frame = pd.read_parquet(tmp_path / "numbers")
    assert frame["id"].tolist() == ["0", "1"]
    assert frame["values"][0].dtype == np.float32
    assert len(frame["values"][1]) == 0


def test_empty_rows_are_left_out(tmp_path, rows, ids, empty_rows):
    export.write_parquet(rows, tmp_path / "out", ids, empty="skip", show_progress=False)
    found = parquet.read_table(tmp_path / "out", columns=["id"])["id"].to_pylist()
    assert found == [id_ for row, id_ in enumerate(ids) if row not in empty_rows]


def test_row_groups_are_small(tmp_path, rows, monkeypatch):
    monkeypatch.setattr("splade_fast.export._documents._ENTRIES_AT_ONCE", 10 * rows.width)
    monkeypatch.setattr(parquet_writer, "_ENTRIES_OF_GROUP", int(rows.lengths[:20].sum()))
    export.write_parquet(rows, tmp_path / "out", show_progress=False)
    file = parquet.ParquetFile(tmp_path / "out" / "documents.parquet")
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert groups[0] == 20
    assert sum(groups) == len(rows)
    found = file.read(["indices", "values"]).to_pydict()
    assert list(zip(found["indices"], found["values"], strict=True)) == to_lists(rows)


def test_texts_are_strings(tmp_path):
    rows = SparseRows.from_dicts([{0: 1.0}, {1: 1.0}], num_cols=2)
    for texts, error, message in (
        (["a", 1], TypeError, "texts must be strings, got int in row 1"),
        (["a", "b\ud800"], ValueError, r"texts\[1\] must be text that UTF-8 can encode, got"),
    ):
        with pytest.raises(error, match=message):
            export.write_parquet(rows, tmp_path / "out", texts=texts, show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_pyarrow_is_named(tmp_path, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="Parquet files need pyarrow: pip install pyarrow"):
        export.write_parquet(rows, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
