"""score equals the formula in plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import splade_fast.ops.score as score_module
from splade_fast.ops.score import sparse_scores, sparse_search
from splade_fast.ops.sparse_rows import SparseRows
from splade_fast.reference import score as reference
from tests.ops.inputs import DTYPES
from tests.tolerances import assert_accurate


def whole_numbers(rows: int, cols: int, seed: int, dtype: torch.dtype) -> SparseRows:
    """Return rows of small whole numbers, with exact products and sums and many ties."""
    generator = torch.Generator().manual_seed(seed)
    return SparseRows.from_dense(torch.randint(-4, 3, (rows, cols), generator=generator).to(dtype))


def ragged_rows(
    rows: int, cols: int, width: int, dtype: torch.dtype, device: torch.device
) -> SparseRows:
    """Return random values of either sign at random columns, with every third row empty."""
    dense = torch.rand(rows, cols)
    kept = torch.randint(0, width + 1, (rows, 1))
    kept[::3] = 0
    dense *= dense.argsort(dim=1, descending=True).argsort(dim=1) < kept
    found = SparseRows.from_dense(dense)
    values = torch.where(found.indices >= 0, torch.randn(found.values.shape), 0)
    return SparseRows(found.indices, values, found.lengths, cols).to(device, dtype)


def stable_order(scores: Tensor, k: int) -> Tensor:
    return scores.sort(dim=1, descending=True, stable=True)[1][:, :k]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Make the tiles small, so that there are several of queries and of documents."""
    monkeypatch.setattr(score_module, "_TILE_QUERIES", 3)
    monkeypatch.setattr(score_module, "_TILE_SCORES", 12)


@pytest.fixture(params=[True, False], ids=["kernels", "plain"])
def kernels(request, monkeypatch) -> bool:
    if not request.param:
        monkeypatch.setattr(score_module._library, "has_kernels", lambda device: False)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense_queries", [False, True])
@pytest.mark.parametrize(("num_queries", "num_docs"), [(5, 31), (1, 1), (0, 4), (4, 0), (0, 0)])
def test_scores_are_the_dense_product(kernels, num_queries, num_docs, dense_queries, dtype):
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
def test_search_is_the_stable_sort_of_all_scores(kernels, k, dense_queries):
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


def test_search_fills_up_with_documents_that_share_nothing(kernels):
    queries = SparseRows.from_dense(torch.tensor([[0.0, 1.0, 0.0]]))
    docs = SparseRows.from_dense(torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 2, 0], [0, 0, 3]]))
    scores, ids = sparse_search(queries, docs, 3)
    assert ids.tolist() == [[2, 0, 1]]
    assert scores.tolist() == [[2.0, 0.0, 0.0]]


@pytest.mark.parametrize(("num_queries", "num_docs"), [(0, 3), (3, 0)])
def test_search_of_nothing(kernels, num_queries, num_docs):
    queries = whole_numbers(num_queries, 20, 5, torch.float32)
    scores, ids = sparse_search(queries, whole_numbers(num_docs, 20, 6, torch.float32), 5)
    assert scores.shape == ids.shape == (num_queries, num_docs)


def test_scores_of_a_vocabulary_of_nothing(kernels):
    assert sparse_scores(torch.ones(2, 0), SparseRows.from_dense(torch.ones(3, 0))).shape == (2, 3)


def test_gradcheck(kernels, device):
    docs = ragged_rows(7, 8, 5, torch.float64, device)
    rows = ragged_rows(5, 8, 4, torch.float64, device)
    dense = torch.randn(3, 8, dtype=torch.float64, device=device, requires_grad=True)
    values = docs.values.clone().requires_grad_()
    entries = rows.values.clone().requires_grad_()

    def with_values(rows, values):
        # The gradient of padding is zero, so gradcheck must not vary it.
        values = torch.where(rows.indices >= 0, values, 0)
        return SparseRows(rows.indices, values, rows.lengths, 8)

    assert torch.autograd.gradcheck(
        lambda queries, values: sparse_scores(queries, with_values(docs, values)), (dense, values)
    )
    assert torch.autograd.gradcheck(
        lambda entries, values: sparse_scores(
            with_values(rows, entries), with_values(docs, values)
        ),
        (entries, values),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse_queries", [False, True])
def test_gradients_match_reference(device, dtype, sparse_queries):
    queries = ragged_rows(70, 40, 9, dtype, device)
    docs = ragged_rows(130, 40, 12, dtype, device)
    grad = torch.randn(70, 130).to(device, dtype)

    def gradients(scores, dtype):
        query_values = queries.values.detach().clone().to(dtype).requires_grad_()
        doc_values = docs.values.detach().clone().to(dtype).requires_grad_()
        rows = SparseRows(queries.indices, query_values, queries.lengths, 40)
        dense = rows.to_dense()
        dense.retain_grad()
        of_docs = SparseRows(docs.indices, doc_values, docs.lengths, 40)
        found = scores(rows if sparse_queries else dense, dense, of_docs)
        found.backward(grad.to(dtype))
        return found.detach(), query_values.grad, doc_values.grad

    def ours(queries, _, docs):
        return sparse_scores(queries, docs)

    def plain(_, dense, docs):
        return reference.sparse_scores(dense, docs.indices, docs.values)

    for actual, truth, baseline in zip(
        gradients(ours, dtype),
        gradients(plain, torch.float64),
        gradients(plain, dtype),
        strict=True,
    ):
        assert_accurate(actual, truth, baseline)


def test_gradients_of_nothing(device):
    for num_queries, num_docs in [(0, 3), (3, 0), (0, 0)]:
        queries = torch.randn(num_queries, 8, device=device, requires_grad=True)
        docs = ragged_rows(num_docs, 8, 3, torch.float32, device)
        docs.values.requires_grad_()
        sparse_scores(queries, docs).sum().backward()
        assert queries.grad.count_nonzero() == 0
        assert docs.values.grad.count_nonzero() == 0


def test_double_backward_is_refused(device):
    queries = torch.randn(3, 8, device=device, requires_grad=True)
    docs = ragged_rows(5, 8, 3, torch.float32, device)
    docs.values.requires_grad_()
    scores = sparse_scores(queries, docs)
    (grad,) = torch.autograd.grad(scores.square().sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


@pytest.mark.parametrize("doc_dtype", DTYPES)
@pytest.mark.parametrize("query_dtype", DTYPES)
@pytest.mark.parametrize("dense_queries", [False, True])
def test_every_pair_of_dtypes(device, query_dtype, doc_dtype, dense_queries):
    """There are several blocks of queries, and several tiles and tasks of documents."""
    queries = ragged_rows(70, 300, 20, query_dtype, device)
    docs = ragged_rows(1100, 300, 40, doc_dtype, device)
    dense = queries.to_dense()
    dtype = torch.promote_types(query_dtype, doc_dtype)
    scores = sparse_scores(dense if dense_queries else queries, docs)
    baseline = torch.stack(
        [
            reference.sparse_scores(dense[q : q + 1].to(dtype), docs.indices, docs.values)[0]
            for q in range(70)
        ]
    )
    truth = dense.double() @ docs.to_dense().double().t()
    assert_accurate(scores, truth.cpu(), baseline)
    found, ids = sparse_search(dense if dense_queries else queries, docs, 17)
    assert found.dtype == dtype
    assert torch.equal(found, scores.gather(1, ids))


@pytest.mark.parametrize("num_queries", [1, 15, 16, 17, 63, 64, 65, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_search_ranks_the_very_scores(device, num_queries, dtype):
    queries = ragged_rows(num_queries, 200, 12, dtype, device)
    docs = ragged_rows(2500, 200, 10, dtype, device)
    scores = sparse_scores(queries, docs)
    for k in (1, 10, 700, 2500, 3000):
        found, ids = sparse_search(queries, docs, k)
        assert torch.equal(ids, stable_order(scores, k))
        assert torch.equal(found, scores.gather(1, ids))


@pytest.mark.parametrize("k", [1, 7, 300, 5000])
def test_ties_come_by_ascending_id(kernels, device, k, monkeypatch):
    """There are far more equal scores than places, across all tiles and tasks."""
    monkeypatch.setattr(score_module, "_TILE_SCORES", 2**14)
    dense = torch.zeros(5000, 3)
    dense[::7, 0] = 1
    dense[::5, 1] = 1
    docs = SparseRows.from_dense(dense).to(device)
    queries = torch.tensor([[1.0, 0, 0], [1, 1, 0], [-1, 0, 0], [0, 0, 0]], device=device)
    scores = queries.cpu() @ dense.t()
    found, ids = sparse_search(queries, docs, k)
    assert torch.equal(ids.cpu(), stable_order(scores, k))
    assert torch.equal(found.cpu(), scores.gather(1, ids.cpu()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense_queries", [False, True])
def test_nan_and_inf(kernels, device, dtype, dense_queries):
    """Check that inf in a document times 0 in a query is NaN, and that padding has no effect."""
    inf, nan = torch.inf, torch.nan
    indices = torch.tensor([[0, 1, 2], [0, 1, -1], [1, -1, -1], [2, 3, -1], [0, -1, -1]])
    values = torch.tensor([[1, 2, 3], [inf, 1, 0], [-inf, 0, 0], [1, nan, 0], [2, 0, 0]])
    lengths = torch.tensor([3, 2, 1, 2, 1], dtype=torch.int32)
    docs = SparseRows(indices.int(), values.to(dtype), lengths, 5).to(device)
    dense = torch.tensor(
        [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, inf, 0, 0], [nan, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    ).to(device, dtype)
    # Rows with inf, NaN and both, also as sparse rows.
    queries = dense if dense_queries else SparseRows.from_dense(dense)
    expected = reference.sparse_scores(dense, docs.indices, docs.values)
    scores = sparse_scores(queries, docs)
    torch.testing.assert_close(scores, expected, rtol=0, atol=0, equal_nan=True)
    found, ids = sparse_search(queries, docs, 5)
    assert torch.equal(ids, stable_order(expected, 5))
    torch.testing.assert_close(found, expected.gather(1, ids), rtol=0, atol=0, equal_nan=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("pinned", [False, True])
def test_documents_may_stay_in_host_memory(pinned):
    queries = whole_numbers(5, 20, 3, torch.float32)
    docs = whole_numbers(31, 20, 4, torch.float32)
    expected = sparse_search(queries, docs, 9)
    found = sparse_search(queries.to("cuda"), docs.pin_memory() if pinned else docs, 9)
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual.cpu(), wanted)


def test_one_column(kernels, device):
    docs = SparseRows.from_dense(torch.tensor([[2.0], [0.0], [3.0]])).to(device)
    queries = SparseRows.from_dense(torch.tensor([[1.0], [0.0]])).to(device)
    assert sparse_scores(queries, docs).tolist() == [[2, 0, 3], [0, 0, 0]]
    assert sparse_search(queries, docs, 2)[1].tolist() == [[2, 0], [0, 1]]


def test_results_do_not_depend_on_threads_or_company():
    queries = ragged_rows(70, 500, 20, torch.float32, torch.device("cpu"))
    docs = ragged_rows(5000, 500, 30, torch.float32, torch.device("cpu"))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((sparse_scores(queries, docs), *sparse_search(queries, docs, 100)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    scores = results[0][0]
    some = torch.tensor([69, 3, 11])
    assert torch.equal(sparse_scores(queries[some], docs[7:90]), scores[some, 7:90])
    assert torch.equal(sparse_scores(queries.to_dense(), docs), scores)


def test_strides(device):
    """Tensors are not contiguous."""
    queries = ragged_rows(6, 50, 9, torch.float32, device)
    docs = ragged_rows(40, 50, 9, torch.float32, device)
    apart = SparseRows(
        docs.indices.t().contiguous().t(),
        torch.stack([docs.values] * 2, dim=-1)[..., 0],
        torch.stack([docs.lengths] * 2, dim=-1)[:, 0],
        50,
    )
    expected = sparse_scores(queries, docs)
    assert torch.equal(sparse_scores(queries, apart), expected)
    assert torch.equal(sparse_scores(queries.to_dense().t().contiguous().t(), docs), expected)
    assert torch.equal(sparse_scores(queries[::2], docs[1::3]), expected[::2, 1::3])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_rows(data):
    """Values are whole numbers, whose sums are exact in any order."""
    num_cols = data.draw(st.integers(1, 40), label="num_cols")

    def rows(label, most):
        entry = st.dictionaries(st.integers(0, num_cols - 1), st.integers(-3, 3), max_size=40)
        found = data.draw(st.lists(entry, max_size=most), label=label)
        width = max(map(len, found), default=0)
        indices = torch.full((len(found), width), -1, dtype=torch.int32)
        values = torch.zeros(len(found), width)
        for row, entries in enumerate(found):
            for slot, column in enumerate(sorted(entries)):
                indices[row, slot], values[row, slot] = column, entries[column]
        lengths = torch.tensor([len(entries) for entries in found], dtype=torch.int32)
        result = SparseRows(indices, values, lengths, num_cols)
        result.check_contents()
        return result

    queries, docs = rows("queries", 20), rows("docs", 50)
    k = data.draw(st.integers(1, 60), label="k")
    dense = queries.to_dense()
    given_queries = dense if data.draw(st.booleans(), label="dense") else queries
    assert torch.equal(
        sparse_scores(given_queries, docs),
        reference.sparse_scores(dense, docs.indices, docs.values),
    )
    found = sparse_search(given_queries, docs, k)
    expected = reference.sparse_search(dense, docs.indices, docs.values, k)
    assert all(map(torch.equal, found, expected))


def op_arguments(queries: SparseRows | Tensor, docs: SparseRows) -> tuple:
    return tuple(score_module.ScoreOperands.build(queries, docs))


def test_opcheck(device):
    docs = ragged_rows(5, 8, 3, torch.float32, device)
    docs.values.requires_grad_()
    queries = ragged_rows(4, 8, 3, torch.float32, device)
    queries.values.requires_grad_()
    dense = torch.randn(3, 8, device=device, requires_grad=True)
    for arguments in (op_arguments(queries, docs), op_arguments(dense, docs)):
        torch.library.opcheck(torch.ops.splade_fast.sparse_scores.default, arguments)
        detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        grad = torch.randn(arguments[1].shape[0], 5, device=device)
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.splade_fast.sparse_scores_backward.default, (grad, *detached, *needs)
            )
        torch.library.opcheck(torch.ops.splade_fast.sparse_search.default, (*detached, 3))


def test_compiles_in_one_graph(device):
    """The first batch is compiled with static shapes, the second with dynamic sizes."""

    def loss(queries, indices, values, lengths):
        return sparse_scores(queries * 2, SparseRows(indices, values, lengths, 8)).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for num_docs in (5, 6):
        docs = ragged_rows(num_docs, 8, 3, torch.float32, device)
        values = docs.values.clone().requires_grad_()
        queries = torch.randn(num_docs - 2, 8, device=device, requires_grad=True)
        arguments = (queries, docs.indices, values, docs.lengths)
        expected = torch.autograd.grad(loss(*arguments), (queries, values))
        actual = torch.autograd.grad(compiled(*arguments), (queries, values))
        torch.testing.assert_close(actual, expected)


def test_meta():
    queries = torch.empty(2, 8, device="meta", dtype=torch.bfloat16)
    docs = SparseRows(
        torch.empty(5, 3, device="meta", dtype=torch.int32),
        torch.empty(5, 3, device="meta", dtype=torch.float16),
        torch.empty(5, device="meta", dtype=torch.int32),
        8,
    )
    scores = sparse_scores(queries, docs)
    assert scores.shape == (2, 5)
    assert scores.dtype == torch.float32
    found, ids = sparse_search(queries, docs, 9)
    assert found.shape == ids.shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("indices", 8, "indices must be between 0 and 7 where used.* in row 1"),
        ("indices", -1, "indices must be between 0 and 7 where used.* in row 1"),
        ("indices", -(2**31), "indices must be between 0 and 7 where used.* in row 1"),
        ("lengths", 4, "lengths must be between 0 and 3, got 4 in row 1"),
        ("lengths", -1, "lengths must be between 0 and 3, got -1 in row 1"),
    ],
)
@pytest.mark.parametrize("side", ["query", "doc"])
def test_contents_outside_are_refused(side, name, entry, message):
    good = SparseRows.from_dense(torch.eye(8)[:5, :] + torch.eye(8)[1:6, :] + torch.eye(8)[2:7])
    bad = SparseRows(good.indices.clone(), good.values, good.lengths.clone(), 8)
    tensor = getattr(bad, name)
    tensor[(1, 1) if name == "indices" else 1] = entry
    queries, docs = (bad, good) if side == "query" else (good, bad)
    with pytest.raises(RuntimeError, match=f"{side}_{message}"):
        sparse_scores(queries, docs)
    with pytest.raises(RuntimeError, match=f"{side}_{message}"):
        sparse_search(queries, docs, 2)


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
