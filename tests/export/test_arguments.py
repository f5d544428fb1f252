"""Behaviour that all formats share: errors, chunks of rows, complete folders or none."""

import pytest
import torch

from splade_fast import SparseRows, export
from splade_fast.export import _documents
from tests.export.conftest import NAMES, NUM_COLS, make_rows

WITH_TOKENS = {
    "anserini": export.write_anserini,
    "bm25s": export.write_bm25s,
    "elasticsearch": export.write_elasticsearch,
    "opensearch": export.write_opensearch,
    "seismic": export.write_seismic,
}
WRITERS = {**WITH_TOKENS, "npz": export.write_npz, "qdrant": export.write_qdrant}
POSITIVE = ("anserini", "elasticsearch", "opensearch", "seismic")
WITH_PAYLOADS = ("elasticsearch", "opensearch", "qdrant")
WITH_TEXTS = ("anserini", "seismic")


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    def call(rows, ids=None, **options):
        options = {"show_progress": False, **options}
        return WRITERS[request.param](rows, tmp_path / "out", ids, **options)

    call.name = request.param
    return call


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_value(rows, row, value):
    values = rows.values.clone()
    values[row, 0] = value
    return SparseRows(rows.indices, values, rows.lengths, rows.num_cols)


def test_bad_arguments_leave_nothing_behind(write, rows, ids, tmp_path):
    for arguments, error, message in [
        ({"rows": rows.to_dense()}, TypeError, "rows must be SparseRows, got Tensor"),
        ({"ids": ids[1:]}, ValueError, "ids must be one per row, 40, got 39"),
        ({"empty": "drop"}, ValueError, "empty must be one of 'keep', 'skip', 'error', got 'drop'"),
        ({"empty": "error"}, ValueError, "rows must not be empty .* got an empty row 0"),
        ({"rows": with_value(rows, 5, float("nan"))}, ValueError, "finite.* got nan in row 5"),
        ({"rows": with_value(rows, 7, float("inf"))}, ValueError, "finite.* got inf in row 7"),
    ]:
        with pytest.raises(error, match=message):
            write(**{"rows": rows, "ids": ids, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_stay(write, rows, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out must not exist yet"):
        write(rows)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("value", [0.0, -1.0])
@pytest.mark.parametrize("name", POSITIVE)
def test_weights_have_to_be_positive_where_the_format_says_so(name, value, rows, tmp_path):
    with pytest.raises(ValueError, match=f"finite and above 0 .* got {value} in row 5"):
        WRITERS[name](with_value(rows, 5, value), tmp_path / "out", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_pieces_of_any_size_give_the_same_files(write, rows, ids, tmp_path, monkeypatch):
    assert write(rows, ids) == len(rows)
    whole = files(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    for entries in (1, 3 * rows.width, 7 * rows.width):
        monkeypatch.setattr(_documents, "_ENTRIES_AT_ONCE", entries)
        write(rows, ids)
        pieces = files(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / f"pieces{entries}")
        if write.name == "npz":  # a zip file contains the time
            continue
        assert pieces == whole


def test_mapped_rows_give_the_same_files(write, rows, ids, tmp_path):
    rows.save(tmp_path / "rows.safetensors")
    write(SparseRows.load(tmp_path / "rows.safetensors"), ids)
    names = sorted(files(tmp_path / "out"))
    (tmp_path / "out").rename(tmp_path / "mapped")
    write(rows, ids)
    for name in names:
        if not name.endswith(".npz"):
            mapped = (tmp_path / "mapped" / name).read_bytes()
            assert mapped == (tmp_path / "out" / name).read_bytes()


def test_no_rows_and_no_entries(write, tmp_path):
    assert write(SparseRows.from_dense(torch.zeros(0, NUM_COLS))) == 0
    (tmp_path / "out").rename(tmp_path / "none")
    nothing = SparseRows.from_dense(torch.zeros(3, NUM_COLS))
    assert write(nothing) == 3
    (tmp_path / "out").rename(tmp_path / "kept")
    assert write(nothing, empty="skip") == 0


def test_skipped_rows_are_not_written(write, rows, ids, empty_rows, tmp_path):
    assert write(rows, ids, empty="skip") == len(rows) - len(empty_rows)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    listed = b"".join(content for name, content in files(tmp_path / "out").items())
    assert names
    for number, id_ in enumerate(ids):
        written = id_.replace('"', '\\"').encode() in listed
        assert written == (number not in empty_rows)


@pytest.mark.parametrize("name", [*WITH_PAYLOADS, *WITH_TEXTS])
def test_extras_are_one_a_row(name, rows, tmp_path):
    option = "payloads" if name in WITH_PAYLOADS else "texts"
    one = {"title": "x"} if name in WITH_PAYLOADS else "x"
    for extras, got in [
        ([one] * 39, "39"),
        ((one for _ in range(39)), "39"),
        ((one for _ in range(41)), "more"),
    ]:
        with pytest.raises(ValueError, match=f"{option} must be one per row, 40, got {got}"):
            WRITERS[name](rows, tmp_path / "out", show_progress=False, **{option: extras})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_names_have_to_differ(name, rows, tmp_path):
    with pytest.raises(ValueError, match="id_to_token must name every column differently, got 'x'"):
        WRITERS[name](rows, tmp_path / "out", id_to_token=["x"] * NUM_COLS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_names_from_a_mapping_and_too_few_of_them(name, rows, tmp_path):
    as_list, as_mapping = tmp_path / "list", tmp_path / "mapping"
    write = WRITERS[name]
    write(rows, as_list, id_to_token=NAMES[:-2], show_progress=False)
    mapping = {column: token for column, token in enumerate(NAMES[:-2]) if token is not None}
    write(rows, as_mapping, id_to_token=mapping, show_progress=False)
    assert files(as_list) == files(as_mapping)
    text = b"".join(files(as_list).values()).decode(errors="replace")
    assert f"[#{NUM_COLS - 1}]" in text
    assert f"[#{NUM_COLS - 2}]" in text


def test_a_progress_bar_is_drawn_on_request(write, capfd):
    write(make_rows(), show_progress=True)
    assert "40/40" in capfd.readouterr().err
