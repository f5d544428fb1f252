"""Behaviour that all formats share: errors, chunks of rows, complete folders or none."""

import json

import numpy as np
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
WRITERS = {
    **WITH_TOKENS,
    "npz": export.write_npz,
    "parquet": export.write_parquet,
    "qdrant": export.write_qdrant,
}
POSITIVE = ("anserini", "elasticsearch", "opensearch", "seismic")
WITH_PAYLOADS = ("elasticsearch", "opensearch", "qdrant")
WITH_TEXTS = ("anserini", "parquet", "seismic")


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


@pytest.mark.parametrize(
    ("names", "value", "message"),
    [
        (("elasticsearch", "opensearch"), 1e-38, "above 0 as normal float32 .* got 1e-38 in row 5"),
        (
            ("elasticsearch", "opensearch"),
            1e39,
            "above 0 as normal float32 .* got 1e\\+39 in row 5",
        ),
        (("seismic",), 65505.0, "as float16 numbers .* got 65505.0 in row 5"),
        (("qdrant",), 1e39, "finite as float32 numbers .* got 1e\\+39 in row 5"),
        (("qdrant",), -1e39, "finite as float32 numbers .* got -1e\\+39 in row 5"),
        (("anserini",), 1e39, r"sum of a document's impacts below 2\*\*31, got 100.0 .* in row 5"),
    ],
)
def test_weights_have_to_fit_the_numbers_of_the_store(names, value, message, tmp_path):
    rows = make_rows(torch.float64)
    for name in names:
        with pytest.raises(ValueError, match=message):
            WRITERS[name](with_value(rows, 5, value), tmp_path / "out", show_progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("elasticsearch", 2.0**-126),
        ("opensearch", 3.4028234663852886e38),
        ("seismic", 65504.0),
        ("seismic", 1e-40),
        ("qdrant", -3.4028234663852886e38),
        ("bm25s", 1e300),
        ("npz", -5e-324),
        ("parquet", -5e-324),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_and_smallest_weights_are_written(name, value, dtype, tmp_path):
    if dtype == torch.float32 and name in ("bm25s", "npz", "parquet"):
        value = 3.4e38
    rows = with_value(make_rows(dtype), 5, value)
    assert WRITERS[name](rows, tmp_path / "out", show_progress=False) == len(rows)


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
    if write.name == "parquet":  # compresses the ids
        return
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


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (["a", "", "c"], ValueError, "not be empty, got '' in row 1"),
        (["a", "b", "a"], ValueError, "unique, got 'a' in row 0 and 'a' in row 2"),
        ([17, "b", "17"], ValueError, "unique, got 17 in row 0 and '17' in row 2"),
        (["a", "b\ud800", "c"], ValueError, r"UTF-8 can encode, got 'b\\ud800' in row 1"),
        (["a", None, "c"], TypeError, "strings or integers, got NoneType in row 1"),
        ([1, 2, True], TypeError, "strings or integers, got bool in row 2"),
        ([1, 2, 3.0], TypeError, "strings or integers, got float in row 2"),
        ("abc", TypeError, "a list of ids, got str"),
    ],
)
def test_ids_that_no_format_holds_are_refused(write, ids, error, message, tmp_path):
    with pytest.raises(error, match=f"ids must .*{message}"):
        write(SparseRows.from_dense(torch.ones(3, 2)), ids)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "id_", "message"),
    [
        ("anserini", "a b", "no white space for this format, got 'a b'"),
        ("anserini", "a\t", r"no white space for this format, got 'a\\t'"),
        ("anserini", "ü" * 16384, "at most 32766 bytes for this format, got 32768 bytes"),
        ("elasticsearch", "ü" * 257, "at most 512 bytes for this format, got 514 bytes"),
        ("opensearch", "x" * 513, "at most 512 bytes for this format, got 513 bytes"),
        ("qdrant", -1, "between 0 and .*, got -1"),
    ],
)
def test_ids_that_a_format_cannot_hold_are_refused(name, id_, message, tmp_path):
    rows = SparseRows.from_dense(torch.ones(3, 2))
    with pytest.raises(ValueError, match=f"ids must .*{message}.* in row 2"):
        WRITERS[name](rows, tmp_path / "out", [7, "b", id_], show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_ids_of_numpy_are_written_as_those_of_python(write, tmp_path):
    rows = SparseRows.from_dense(torch.ones(2, 2))
    write(rows, [17, 5])
    (tmp_path / "out").rename(tmp_path / "plain")
    write(rows, np.array([17, 5]))
    found, plain = files(tmp_path / "out"), files(tmp_path / "plain")
    assert found.keys() == plain.keys()
    for name in found.keys() - {"vectors.npz"}:  # a zip file contains the time
        assert found[name] == plain[name]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (float("nan"), ValueError, "hold what JSON can represent, got .*nan"),
        (np.float32("inf"), ValueError, "hold what JSON can represent, got .*inf"),
        (
            {"deep": [1, {"er": np.array([0.5, np.nan])}]},
            ValueError,
            "hold what JSON can represent",
        ),
        ({float("nan"): 1}, ValueError, "hold what JSON can represent"),
        ({1: "a", "1": "b"}, TypeError, "have strings as keys, got 1"),
        ([{"deep": {True: 1}}], TypeError, "have strings as keys, got True"),
        ({1, 2}, ValueError, "hold what JSON can represent, got .*set is not a JSON type"),
        ("a\ud800", ValueError, "be text that UTF-8 can encode"),
        ({"a\udfff": 1}, ValueError, "be text that UTF-8 can encode"),
    ],
)
@pytest.mark.parametrize("name", WITH_PAYLOADS)
def test_payloads_that_are_no_json_are_refused(name, value, error, message, tmp_path):
    rows = SparseRows.from_dense(torch.ones(3, 2))
    payloads = [{}, {}, {"x": value}]
    with pytest.raises(error, match=rf"payloads\[2\] must {message}"):
        WRITERS[name](rows, tmp_path / "out", payloads=iter(payloads), show_progress=False)
    with pytest.raises(TypeError, match="payloads must be mappings, got list in row 1"):
        WRITERS[name](rows, tmp_path / "out", payloads=[{}, [1], {}], show_progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WITH_PAYLOADS)
def test_payloads_of_numpy_are_written_as_numbers(name, tmp_path):
    rows = SparseRows.from_dense(torch.ones(1, 2))
    payload = {"page": np.int64(3), "part": np.float32(0.5), "tags": np.array([1, 2])}
    WRITERS[name](rows, tmp_path / "out", payloads=[payload], show_progress=False)
    file = "points.jsonl" if name == "qdrant" else "bulk.ndjson"
    *_, line = (tmp_path / "out" / file).read_text().splitlines()
    written = json.loads(line)
    found = written["payload"] if name == "qdrant" else written
    assert {key: found[key] for key in payload} == {"page": 3, "part": 0.5, "tags": [1, 2]}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (float("nan"), TypeError, "texts must be strings, got float in row 1"),
        ("a\ud800", ValueError, r"texts\[1\] must be text that UTF-8 can encode"),
    ],
)
@pytest.mark.parametrize("name", WITH_TEXTS)
def test_texts_that_are_no_text_are_refused(name, text, error, message, tmp_path):
    rows = SparseRows.from_dense(torch.ones(2, 2))
    with pytest.raises(error, match=message):
        WRITERS[name](rows, tmp_path / "out", texts=["x", text], show_progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WITH_TEXTS)
@pytest.mark.parametrize("texts", ["ab", {"a": "x", "b": "y"}])
def test_texts_are_a_list(name, texts, tmp_path):
    rows = SparseRows.from_dense(torch.ones(2, 2))
    with pytest.raises(TypeError, match="texts must be a list, one per row, got (str|dict)"):
        WRITERS[name](rows, tmp_path / "out", texts=texts, show_progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_names_that_utf8_cannot_encode_are_replaced(name, tmp_path):
    rows = SparseRows.from_dense(torch.ones(1, 2))
    write = WRITERS[name]
    write(rows, tmp_path / "out", id_to_token=["fox", "a\ud800"], show_progress=False)
    assert b"[#1]" in b"".join(files(tmp_path / "out").values())


def test_a_progress_bar_is_drawn_on_request(write, capfd):
    write(make_rows(), show_progress=True)
    assert "40/40" in capfd.readouterr().err
