"""Export to Anserini and Seismic: JSON lines {id, text, vector}."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from splade_fast import SparseRows, export
from tests.export.conftest import NAMES, NUM_COLS, make_rows

# A column without a name is named by its number; for Anserini, also one with white space.
SEISMIC_NAMES = [*NAMES[:-1], f"[#{NUM_COLS - 1}]"]
ANSERINI_NAMES = [name.replace("a b", "[#3]") for name in SEISMIC_NAMES]


def read_lines(folder):
    assert [path.name for path in folder.iterdir()] == ["documents.jsonl"]
    text = (folder / "documents.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def by_name(rows, names):
    return [{names[column]: value for column, value in row.items()} for row in rows.to_dicts()]


@pytest.mark.parametrize("scale", [100, 1, 0.25, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_anserini_reads_whole_impacts(tmp_path, ids, dtype, scale):
    rows = make_rows(dtype)
    texts = [f'text\n"{number}"' for number in range(len(rows))]
    count = export.write_anserini(
        rows,
        tmp_path / "out",
        ids,
        id_to_token=NAMES,
        texts=texts,
        scale=scale,
        show_progress=False,
    )
    found = read_lines(tmp_path / "out")
    assert count == len(found) == len(rows)
    assert [line["id"] for line in found] == ids
    assert [line["contents"] for line in found] == texts
    for line, weights in zip(found, by_name(rows, ANSERINI_NAMES), strict=True):
        impacts = {token: round(weight * scale) for token, weight in weights.items()}
        assert line["vector"] == {token: n for token, n in impacts.items() if n > 0}
        assert all(type(impact) is int for impact in line["vector"].values())


def test_anserini_splits_its_pseudo_document_into_the_same_impacts(tmp_path):
    """JsonVectorCollection repeats each token, and the pretokenized analyzer splits at spaces."""
    rows = make_rows()
    export.write_anserini(rows, tmp_path / "out", id_to_token=NAMES, show_progress=False)
    for line in read_lines(tmp_path / "out"):
        document = "".join((token + " ") * impact for token, impact in line["vector"].items())
        assert Counter(document.split()) == line["vector"]


@pytest.mark.parametrize("scale", [1, 100])
def test_anserini_rounds_halves_to_even_and_drops_zeros(tmp_path, scale):
    halves = torch.tensor([[0.5, 1.5, 2.5, 3.5, 0.49, 0.51]], dtype=torch.float64)
    rows = SparseRows.from_dense(halves / scale)
    export.write_anserini(rows, tmp_path / "out", scale=scale, show_progress=False)
    assert read_lines(tmp_path / "out")[0]["vector"] == {"1": 2, "2": 2, "3": 4, "5": 1}


def test_documents_that_rounding_empties_are_empty(tmp_path):
    rows = SparseRows.from_dense(torch.tensor([[1.0, 0.0], [0.001, 0.0], [0.0, 2.0]]))
    options = {"show_progress": False}
    assert export.write_anserini(rows, tmp_path / "kept", **options) == 3
    assert read_lines(tmp_path / "kept")[1]["vector"] == {}
    assert export.write_anserini(rows, tmp_path / "skipped", empty="skip", **options) == 2
    assert [line["id"] for line in read_lines(tmp_path / "skipped")] == ["0", "2"]
    with pytest.raises(ValueError, match="got an empty row 1"):
        export.write_anserini(rows, tmp_path / "none", empty="error", **options)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("scale", [0, -1, math.nan, math.inf, 1e30])
def test_anserini_scales_have_to_fit(tmp_path, rows, scale):
    with pytest.raises(ValueError, match="scale must"):
        export.write_anserini(rows, tmp_path / "out", scale=scale, show_progress=False)
    assert not (tmp_path / "out").exists()


def test_impacts_of_a_document_add_up_to_less_than_lucene_counts(tmp_path):
    rows = SparseRows.from_dicts([{0: 1.0}, {0: 1.5e7, 1: 1.5e7}], num_cols=2)
    message = "scale must keep the sum of a document's impacts .*, got 100.0 for 3e\\+09 in row 1"
    with pytest.raises(ValueError, match=message):
        export.write_anserini(rows, tmp_path / "out", show_progress=False)
    assert export.write_anserini(rows, tmp_path / "out", scale=50, show_progress=False) == 2


@pytest.mark.parametrize("scale", [True, "100", None])
def test_anserini_scales_are_numbers(tmp_path, rows, scale):
    with pytest.raises(TypeError, match="scale must be a number, got"):
        export.write_anserini(rows, tmp_path / "out", scale=scale, show_progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_seismic_lines_hold_the_weights_to_the_bit(tmp_path, ids, dtype):
    rows = make_rows(dtype)
    export.write_seismic(rows, tmp_path / "out", ids, id_to_token=NAMES, show_progress=False)
    found = read_lines(tmp_path / "out")
    assert [line["id"] for line in found] == ids
    vectors = [line["vector"] for line in found]
    columns = {name: column for column, name in enumerate(SEISMIC_NAMES)}
    assert SparseRows.from_dicts(vectors, NUM_COLS, columns, dtype=dtype).equal(rows)
    written = torch.float64 if dtype == torch.float64 else torch.float32
    assert SparseRows.from_dicts(vectors, NUM_COLS, columns, dtype=written).equal(rows.to(written))


def test_seismic_finds_what_was_written(tmp_path, ids):
    seismic = pytest.importorskip("seismic")
    rows = make_rows()
    export.write_seismic(rows, tmp_path / "out", ids, id_to_token=NAMES, show_progress=False)
    index = seismic.SeismicIndex.build(str(tmp_path / "out" / "documents.jsonl"), num_threads=1)
    assert index.len == len(rows)
    scores = rows.to_dense() @ rows.to_dense().t()
    string = seismic.get_seismic_string()
    for row, weights in enumerate(by_name(rows, SEISMIC_NAMES)):
        if not weights:
            continue
        hits = index.search(
            "query",
            np.array(list(weights), dtype=string),
            np.array(list(weights.values()), dtype=np.float32),
            k=5,
            query_cut=NUM_COLS,
            heap_factor=0.0,  # exact search
        )
        best = scores[row].sort(descending=True)[0][:5].tolist()
        assert len(hits) == 5
        for (_, score, id_), expected in zip(hits, best, strict=True):
            assert score == pytest.approx(expected, rel=2e-3)  # Seismic keeps 16 bits of a weight
            assert score == pytest.approx(scores[row, ids.index(id_)].item(), rel=2e-3)
