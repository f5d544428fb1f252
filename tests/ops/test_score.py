import pytest
import torch

import splade_fast.ops.score as score_module
from splade_fast.ops.score import sparse_scores, sparse_search
from splade_fast.reference import score as reference
from splade_fast.sparse_rows import SparseRows


def whole_numbers(rows: int, cols: int, seed: int, dtype: torch.dtype) -> SparseRows:
    """Small whole numbers: products and sums are exact, and there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    return SparseRows.from_dense(torch.randint(-4, 3, (rows, cols), generator=generator).to(dtype))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles of queries and of documents, even in small tests."""
    monkeypatch.setattr(score_module, "_QUERY_TABLE_ELEMENTS", 60)
    monkeypatch.setattr(score_module, "_TILE_SCORES", 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dense_queries", [False, True])
@pytest.mark.parametrize(("num_queries", "num_docs"), [(5, 31), (1, 1), (0, 4), (4, 0), (0, 0)])
def test_scores_are_the_dense_product(num_queries, num_docs, dense_queries, dtype):
    queries = whole_numbers(num_queries, 20, 1, dtype)
    docs = whole_numbers(num_docs, 20, 2, dtype)
    expected = queries.to_dense().double() @ docs.to_dense().double().t()
    scores = sparse_scores(queries.to_dense() if dense_queries else queries, docs)
    assert scores.dtype == dtype
    assert torch.equal(scores.double(), expected)
    by_reference = reference.sparse_scores(queries.to_dense(), docs.indices, docs.values)
    assert torch.equal(by_reference.double(), expected)


@pytest.mark.parametrize("k", [1, 3, 10, 31, 100])
@pytest.mark.parametrize("dense_queries", [False, True])
def test_search_is_the_stable_sort_of_all_scores(k, dense_queries):
    queries = whole_numbers(5, 20, 3, torch.float32)
    docs = whole_numbers(31, 20, 4, torch.float32)
    all_scores = queries.to_dense() @ docs.to_dense().t()
    expected_ids = [
        sorted(range(31), key=lambda doc: (-row[doc], doc))[:k] for row in all_scores.tolist()
    ]
    scores, ids = sparse_search(queries.to_dense() if dense_queries else queries, docs, k)
    assert ids.tolist() == expected_ids
    assert torch.equal(scores, all_scores.gather(1, ids))
    by_reference = reference.sparse_search(queries.to_dense(), docs.indices, docs.values, k)
    assert torch.equal(by_reference[1], ids)


def test_search_fills_up_with_documents_that_share_nothing():
    queries = SparseRows.from_dense(torch.tensor([[0.0, 1.0, 0.0]]))
    docs = SparseRows.from_dense(torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 2, 0], [0, 0, 3]]))
    scores, ids = sparse_search(queries, docs, 3)
    assert ids.tolist() == [[2, 0, 1]]
    assert scores.tolist() == [[2.0, 0.0, 0.0]]


@pytest.mark.parametrize(("num_queries", "num_docs"), [(0, 3), (3, 0)])
def test_search_of_nothing(num_queries, num_docs):
    queries = whole_numbers(num_queries, 20, 5, torch.float32)
    scores, ids = sparse_search(queries, whole_numbers(num_docs, 20, 6, torch.float32), 5)
    assert scores.shape == ids.shape == (num_queries, num_docs)


def test_scores_of_a_vocabulary_of_nothing():
    assert sparse_scores(torch.ones(2, 0), SparseRows.from_dense(torch.ones(3, 0))).shape == (2, 3)


def test_scores_are_differentiable():
    queries = torch.rand(3, 8, dtype=torch.float64, requires_grad=True)
    dense = torch.rand(5, 8, dtype=torch.float64)
    docs = SparseRows.from_dense(dense, k=4)
    values = docs.values.clone().requires_grad_()

    def scores(queries, values):
        return sparse_scores(queries, SparseRows(docs.indices, values, docs.lengths, 8))

    assert torch.autograd.gradcheck(scores, (queries, values))


@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        (torch.ones(2, 5), ValueError, "docs.num_cols = 20 columns, got 5"),
        (torch.ones(20), ValueError, r"queries must be floating point \(queries, 20\)"),
        (torch.ones(2, 20, dtype=torch.int64), ValueError, "queries must be floating point"),
        ([[1.0] * 20], TypeError, "queries must be SparseRows or a tensor, got list"),
        (torch.ones(2, 20, device="meta"), ValueError, "queries must be on cpu .* got meta"),
    ],
)
def test_bad_queries_are_refused(queries, error, message):
    docs = whole_numbers(3, 20, 7, torch.float32)
    with pytest.raises(error, match=message):
        sparse_scores(queries, docs)


def test_other_bad_arguments_are_refused():
    docs = whole_numbers(3, 20, 8, torch.float32)
    with pytest.raises(TypeError, match="docs must be SparseRows, got Tensor"):
        sparse_scores(docs, docs.to_dense())
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        sparse_search(docs, docs, 0)
