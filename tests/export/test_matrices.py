"""Export to scipy's .npz and to bm25s."""

import json

import bm25s
import numpy as np
import pytest
import scipy.sparse
import torch

from splade_fast import SparseRows, export
from tests.export.conftest import NAMES, NUM_COLS, make_rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scipy_loads_the_same_matrix(tmp_path, ids, dtype, compressed):
    rows = make_rows(dtype)
    export.write_npz(rows, tmp_path / "out", ids, compressed=compressed, show_progress=False)
    loaded = scipy.sparse.load_npz(tmp_path / "out" / "vectors.npz")
    expected = rows.to_scipy()
    assert isinstance(loaded, scipy.sparse.csr_array)
    assert loaded.dtype == expected.dtype
    assert loaded.indices.dtype == loaded.indptr.dtype == np.int32
    loaded.check_format(full_check=True)
    for name in ("data", "indices", "indptr", "shape"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(expected, name))
    assert json.loads((tmp_path / "out" / "ids.json").read_text()) == ids
    back = rows.dtype if rows.dtype == torch.float64 else torch.float32
    assert SparseRows.from_scipy(loaded).equal(rows.to(back))


def test_scipy_loads_what_was_not_skipped(tmp_path, rows, ids, empty_rows):
    export.write_npz(rows, tmp_path / "out", ids, empty="skip", show_progress=False)
    loaded = scipy.sparse.load_npz(tmp_path / "out" / "vectors.npz")
    kept = [row for row in range(len(rows)) if row not in empty_rows]
    assert SparseRows.from_scipy(loaded).equal(rows[kept])
    assert json.loads((tmp_path / "out" / "ids.json").read_text()) == [ids[row] for row in kept]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (3, 5)])
def test_matrices_without_entries(tmp_path, shape):
    rows = SparseRows.from_dense(torch.zeros(shape))
    export.write_npz(rows, tmp_path / "npz", show_progress=False)
    loaded = scipy.sparse.load_npz(tmp_path / "npz" / "vectors.npz")
    assert loaded.shape == shape
    assert loaded.nnz == 0
    export.write_bm25s(rows, tmp_path / "bm25s", show_progress=False)
    assert bm25s.BM25.load(tmp_path / "bm25s").scores["num_docs"] == shape[0]


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bm25s_scores_are_sums_of_the_weights(tmp_path, ids, dtype, mapped):
    rows = make_rows(dtype)
    export.write_bm25s(rows, tmp_path / "out", ids, id_to_token=NAMES, show_progress=False)
    index = bm25s.BM25.load(tmp_path / "out", mmap=mapped)
    dense = rows.to_dense().to(torch.float64 if dtype == torch.float64 else torch.float32)
    for columns in ([0], [1, 2, 7], [0, 0, 5], list(range(NUM_COLS - 1))):
        scores = index.get_scores([NAMES[column] for column in columns])
        expected = dense[:, columns].double().sum(1)
        torch.testing.assert_close(torch.from_numpy(scores).double(), expected, rtol=1e-6, atol=0)
    hits, scores = index.retrieve([["fox", "##ing"]], k=3, show_progress=False)
    listed = json.loads((tmp_path / "out" / "ids.json").read_text())
    for hit, score in zip(hits[0], scores[0], strict=True):
        assert score == pytest.approx(dense[ids.index(listed[hit]), [0, 7]].sum().item())


def test_bm25s_numbers_what_was_not_skipped(tmp_path, rows, ids, empty_rows):
    export.write_bm25s(
        rows, tmp_path / "out", ids, id_to_token=NAMES, empty="skip", show_progress=False
    )
    index = bm25s.BM25.load(tmp_path / "out")
    kept = [row for row in range(len(rows)) if row not in empty_rows]
    assert json.loads((tmp_path / "out" / "ids.json").read_text()) == [ids[row] for row in kept]
    np.testing.assert_allclose(index.get_scores(["fox"]), rows.to_dense()[kept, 0].numpy())
