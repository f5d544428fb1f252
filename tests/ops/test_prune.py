"""prune equals plain PyTorch to the bit in every combination of criteria."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import splade_fast as sf
from splade_fast import reference
from splade_fast.ops.prune import dense_rows, prune_rows
from tests.ops.inputs import DTYPES
from tests.selection import pairwise

CRITERIA = {
    "k": (None, 0, 1, 7, 40, 1000),
    "threshold": (0.0, 0.7),
    "max_ratio": (None, 0.0, 0.3, 1.0),
    "mass": (None, 0.0, 0.45, 1.0),
}
NAN, INF = torch.nan, torch.inf


def trimmed(rows: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows without the slots that no row uses, which must be padding."""
    indices, values, lengths = rows
    width = int(lengths.max()) if len(lengths) else 0
    assert (indices[:, width:] == -1).all()
    assert (values[:, width:] == 0).all()
    return indices[:, :width], values[:, :width], lengths


def compare_rows(x: Tensor, k=None, threshold=0.0, max_ratio=None, mass=None) -> None:
    ours = prune_rows(x, k, threshold, max_ratio, mass)
    expected = reference.prune_rows(x, k, threshold, max_ratio, mass)
    if x.device.type == "cpu":
        assert ours[0].shape == expected[0].shape
    sf.SparseRows(*ours, x.shape[1]).check_contents()
    for actual, exact in zip(trimmed(ours), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=0, atol=0, equal_nan=True)


def compare_topk(x: Tensor, k: int) -> None:
    ours = sf.prune_topk(x, k)
    torch.testing.assert_close(ours, reference.prune_topk(x, k), rtol=0, atol=0, equal_nan=True)


def few_values(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return rows with many ties, one of them without positive entries."""
    x = torch.randint(-4, 9, (rows, columns)) / 4
    x[rows // 2] = -1
    return x.to(device, dtype)


@pairwise(dtype=DTYPES, values=["few", "many"], **CRITERIA)
def test_combinations_of_criteria(device, dtype, values, k, threshold, max_ratio, mass):
    x = few_values(5, 150, dtype, device)
    if values == "many":
        x = torch.randn(5, 150).to(device, dtype)
    compare_rows(x, k, threshold, max_ratio, mass)


def density(x: Tensor, kind: str) -> Tensor:
    """Return x, -x without positive entries, or x with 2 % of its entries."""
    if kind == "sparse":
        return x.masked_fill(torch.rand(x.shape, device=x.device) > 0.02, 0)
    return -x if kind == "negative" else x


@pairwise(
    dtype=DTYPES,
    columns=[1, 2, 15, 16, 17, 63, 64, 65, 2047, 2113, 5000, 30522],
    kind=["dense", "sparse", "negative"],
    k=[None, 0, 1, 5, 256, "columns", 9999],
)
def test_widths(device, dtype, columns, kind, k):
    """Fewer and more candidates than the buffer holds; the ends of vectors and steps."""
    x = density(torch.rand(2, columns).to(device, dtype), kind)
    k = columns if k == "columns" else k
    compare_rows(x, k)
    compare_topk(x, columns if k is None else k)


@pairwise(
    dtype=DTYPES,
    kind=["dense", "sparse"],
    criteria=[(), (100,), (300_000,), (1000, 0.25, 0.5, 0.9)],
)
def test_a_million_columns(device, dtype, kind, criteria):
    x = density(torch.rand(1, 1_000_000).to(device, dtype), kind)
    compare_rows(x, *criteria)
    if criteria == (100,):
        compare_topk(x, 100)


def random_row(candidates: int, columns: int, order: str, dtype: torch.dtype) -> Tensor:
    """Return a row (1, columns) with a number of positive entries at random columns."""
    values = torch.arange(1, candidates + 1) if order == "rising" else torch.ones(candidates)
    if order == "ties":
        values = torch.randint(1, 4, (candidates,))
    x = torch.randint(-2, 1, (columns,)).to(dtype)
    x[torch.randperm(columns)[:candidates].sort()[0]] = values.to(dtype)
    return x[None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["equal", "ties", "rising"])
def test_the_buffer_of_candidates_is_full_or_overflows(device, dtype, order):
    """Test with about as many candidates as a buffer holds, and many times as many.

    A buffer has max(2 k, 512) + 64 places on the CPU, of which up to 64 stay free; on CUDA it has
    2,730 places in float64 and 4,096 in the other dtypes.
    """
    for room in (512, 576) if device.type == "cpu" else (2730, 4096):
        for candidates in (room - 64, room - 1, room, room + 1, 20 * room):
            x = random_row(candidates, candidates + 1000, order, dtype).to(device)
            for k in (1, 255, 256, 257, candidates - 1, candidates):
                compare_rows(x, k)
            compare_rows(x, 256, 0.0, 0.5)
            compare_topk(x, 256)
            compare_topk(-x, 256)


@pytest.mark.parametrize("order", ["equal", "rising", "falling", "equal then larger"])
def test_dense_rows_in_order(device, order):
    columns = 20_000
    x = torch.ones(2, columns)
    if order != "equal":
        x = torch.linspace(1, 2, columns).expand(2, -1).clone()
    if order == "falling":
        x = x.flip(1)
    if order == "equal then larger":
        x[:, : columns // 2] = 1
    for k in (1, 300, 12_000, columns - 1):
        compare_rows(x.to(device), k)
        compare_topk(x.to(device), k)
        compare_topk(-x.to(device), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_rows_do_not_depend_on_threads(dtype):
    """Check rows that threads share: there are fewer rows than threads."""
    x = torch.randint(-50, 50, (2, 1_200_000)).to(dtype)
    x[1] = torch.where(torch.rand(1_200_000) < 1e-3, NAN, x[1])
    criteria = [(None, 0.0, None, None), (300, None, None, None), (900_000, 0.0, None, None)]
    criteria += [(5000, 3.0, 0.9, None), (5000, 0.0, 0.1, 0.5)]
    expected = [reference.prune_rows(x, *given) for given in criteria]
    expected_topk = reference.prune_topk(x, 300)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            for given, wanted in zip(criteria, expected, strict=True):
                for ours, exact in zip(prune_rows(x, *given), wanted, strict=True):
                    torch.testing.assert_close(ours, exact, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(
                sf.prune_topk(x, 300), expected_topk, rtol=0, atol=0, equal_nan=True
            )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf(device, dtype):
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.0])
    x = special[torch.randint(8, (6, 5000))]
    x[0] = NAN
    x[1] = INF
    x[2, 17:] = -INF
    x[3] = x[3].nan_to_num(3, INF, -INF)
    x[4] = torch.where(torch.rand(5000) < 0.001, x[4], 0.5)
    x[5] = torch.where(torch.rand(5000) < 0.9, torch.copysign(torch.tensor(NAN), x[5]), x[5])
    x = x.to(device, dtype)
    for criteria in itertools.product((None, 3, 700, 4990), (0.0, INF), (None, 0.0, 0.5)):
        compare_rows(x, *criteria)
        compare_rows(x, *criteria, 0.5)
    compare_rows(x, mass=0.0)
    for k in (1, 3, 2000, 4990, 4999):
        compare_topk(x, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_threshold_is_rounded_as_pytorch_does(device, dtype):
    x = torch.tensor([[0.1, 0.3, 1 / 3, 0.7, 65504.0]]).to(device, dtype)
    for threshold in (0.1, 0.3, 1 / 3, 0.7, 1e-50, 65519.0, 1e39):
        compare_rows(x, None, threshold)
        compare_rows(x, 2, threshold, min(threshold, 1.0))


def test_smallest_numbers_and_zeros(device):
    tiny = torch.finfo(torch.float32).smallest_normal
    x = torch.tensor([[0.0, -0.0, tiny / 4, -tiny / 4, tiny, 0.0]], device=device)
    for k in range(7):
        compare_rows(x, k)
        compare_topk(x, k)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
def test_empty_shapes(device, shape):
    x = torch.ones(shape, device=device)
    for criteria in itertools.product((None, 0, 2), (0.0, 3.0), (None, 0.5), (None, 0.5)):
        compare_rows(x, *criteria)
    for k in (0, 1, 3):
        compare_topk(x, k)


def test_strides(device):
    base = torch.randn(8, 300, device=device)
    for x in (base[:, 3:290], base[::2], base[:, ::3], base.t(), base[:1].expand(4, -1)):
        compare_rows(x, 9)
        compare_rows(x, None, 0.1, 0.2, 0.9)
        compare_topk(x, 9)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_row(data):
    width = st.sampled_from([16, 32, 64])
    floats = st.floats(width=data.draw(width), allow_nan=True)
    rows = data.draw(st.integers(1, 3))
    columns = data.draw(st.integers(0, 90))
    entries = data.draw(
        st.lists(floats, min_size=rows * columns, max_size=rows * columns).map(torch.tensor)
    )
    x = entries.reshape(rows, columns).to(data.draw(st.sampled_from(DTYPES)))
    ratio = st.none() | st.floats(0, 1)
    k = data.draw(st.none() | st.integers(0, 95))
    compare_rows(x, k, data.draw(st.floats(0, 10)), data.draw(ratio), data.draw(ratio))
    compare_topk(x, k or 1)


def test_gradient_goes_to_kept_entries(device):
    x = torch.tensor([[3.0, 0.0, -1.0, 0.0, 3.0, 2.0]], device=device, requires_grad=True)
    weight = torch.arange(1.0, 7.0, device=device)
    (sf.prune_topk(x, 4) * weight).sum().backward()
    assert x.grad.tolist() == [[1, 2, 0, 0, 5, 6]]  # also to the first 0, which is kept
    x.grad = None
    rows = sf.SparseRows.from_dense(x, 2)
    (rows.to_dense() * weight).sum().backward()
    assert x.grad.tolist() == [[1, 0, 0, 0, 5, 0]]


@pytest.mark.parametrize("mass", [None, 0.8])
def test_gradcheck(device, mass):
    x = torch.randn(3, 9, dtype=torch.float64, device=device, requires_grad=True)

    def values(x):
        return prune_rows(x, 3, 0.0, 0.1, mass)[1] ** 2

    for function in (values, lambda x: sf.prune_topk(x, 4) ** 2):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_gradient_is_that_of_the_reference(device):
    x = few_values(4, 200, torch.float32, device).requires_grad_()
    for criteria in ((None, 0.0, None, None), (5, 0.2, 0.3, 0.9)):
        expected = reference.prune_rows(x, *criteria)[1]
        values = prune_rows(x, *criteria)[1][:, : expected.shape[1]]
        grad = torch.randn_like(expected)
        (ours,) = torch.autograd.grad(values, x, grad)
        assert torch.equal(ours, torch.autograd.grad(expected, x, grad)[0])


@pytest.mark.parametrize(
    "criteria", [(3, None, None, None), (None, 0.0, None, None), (3, 0.1, 0.2, None)]
)
def test_opcheck(device, criteria):
    x = torch.randn(3, 40, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.splade_fast.prune_rows.default, (x, *criteria))


def test_compiles_in_one_graph(device):
    """The first batch is compiled with static shapes, the second with a dynamic batch size."""

    def loss(x):
        return sf.prune_topk(x * 2, 5).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for rows in (2, 3):
        x = torch.randn(rows, 70, device=device, requires_grad=True)
        (expected,) = torch.autograd.grad(loss(x), x)
        (actual,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(actual, expected)


def test_meta():
    pruned = sf.prune_topk(torch.empty(2, 50, device="meta", dtype=torch.bfloat16), 3)
    assert pruned.shape == (2, 50)
    assert pruned.device.type == "meta"
    assert pruned.dtype == torch.bfloat16


def test_all_of_a_row_is_a_copy(device):
    x = torch.randn(2, 5, device=device)
    pruned = sf.prune_topk(x, 5)
    assert torch.equal(pruned, x)
    assert pruned.data_ptr() != x.data_ptr()


def test_bad_arguments(device):
    x = torch.randn(2, 5, device=device)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        sf.prune_topk([[1.0]], 1)
    with pytest.raises(TypeError, match="x must be one of float32.*got torch.int64"):
        sf.prune_topk(torch.ones(2, 5, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"x must be \(rows, columns\), got \(5,\)"):
        sf.prune_topk(x[0], 1)
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        sf.prune_topk(x, -1)
    for k, name in ((2.0, "float"), (None, "NoneType"), (True, "bool")):
        with pytest.raises(TypeError, match=f"k must be an integer, got {name}"):
            sf.prune_topk(x, k)


def test_the_op_checks_for_cpp_callers(device):
    op = torch.ops.splade_fast.prune_rows
    x = torch.randn(2, 5, device=device)
    for arguments, message in (
        ((x[0], 1, 0.0, None, None), "x must have 2 dimensions, got 1"),
        ((x.int(), 1, 0.0, None, None), "x must be float32"),
        ((x, -1, 0.0, None, None), "k must be at least 0, got -1"),
        ((x, 1, NAN, None, None), "threshold must not be NaN"),
        ((x, 1, 0.0, 1.5, None), "max_ratio must be between 0 and 1, got 1.5"),
        ((x, 1, 0.0, None, -0.5), "mass must be between 0 and 1, got -0.5"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


INDICES = [[0, 3, -1], [-1, -1, -1], [2, -1, -1], [0, 1, 4]]
VALUES = [[-0.0, 2, 0], [0, 0, 0], [NAN, 0, 0], [INF, 1, -3]]
DENSE = [[-0.0, 0, 0, 2, 0], [0.0] * 5, [0, 0, NAN, 0, 0], [INF, 1, 0, 0, -3]]


def padded_rows(device, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.tensor(INDICES, dtype=torch.int32, device=device),
        torch.tensor(VALUES, dtype=dtype, device=device),
        torch.tensor([2, 0, 1, 3], dtype=torch.int32, device=device),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [dense_rows, reference.dense_rows])
def test_dense_rows(device, function, dtype):
    expected = torch.tensor(DENSE, dtype=dtype, device=device)
    indices, values, lengths = padded_rows(device, dtype)
    dense = function(indices, values, lengths, 5)
    torch.testing.assert_close(dense, expected, rtol=0, atol=0, equal_nan=True)
    assert dense[0, 0].signbit()
    apart = (indices.t().contiguous().t(), values.repeat(1, 2)[:, :3], lengths.repeat(2)[:4])
    torch.testing.assert_close(function(*apart, 5), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", [dense_rows, reference.dense_rows])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_dense_rows_of_nothing(device, function, shape):
    indices = torch.full(shape, -1, dtype=torch.int32, device=device)
    values = torch.zeros(shape, device=device, requires_grad=True)
    lengths = torch.zeros(shape[0], dtype=torch.int32, device=device)
    for columns in (0, 4):
        dense = function(indices, values, lengths, columns)
        assert torch.equal(dense, torch.zeros(shape[0], columns, device=device))
    (grad,) = torch.autograd.grad(dense.sum() + values.sum(), values)
    assert grad.shape == shape


@pytest.mark.parametrize("function", [dense_rows, reference.dense_rows])
def test_dense_rows_differentiates(device, function):
    indices, _, lengths = padded_rows(device)
    values = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)

    def squares(values):
        return function(indices, values.masked_fill(indices < 0, 0), lengths, 5) ** 2

    assert torch.autograd.gradcheck(squares, values)
    assert torch.autograd.gradgradcheck(squares, values)


def test_dense_rows_opcheck():
    indices, values, lengths = padded_rows("cpu")
    values = values.nan_to_num().requires_grad_()
    torch.library.opcheck(torch.ops.splade_fast.dense_rows.default, (values, indices, lengths, 5))


def test_dense_rows_checks_for_cpp_callers():
    op = torch.ops.splade_fast.dense_rows
    indices, values, lengths = padded_rows("cpu")
    outside, long = indices.clone(), lengths.clone()
    outside[3, 1], long[2] = 5, 4
    for arguments, message in (
        ((values, outside, lengths, 5), "indices must be between 0 and 4 where used, got 5 in row"),
        ((values, indices, lengths, 4), "indices must be between 0 and 3 where used, got 4 in row"),
        ((values, indices, -lengths, 5), "lengths must be between 0 and 3, got -2 in row 0"),
        ((values, indices, long, 5), "lengths must be between 0 and 3, got 4 in row 2"),
        ((values, indices.long(), lengths, 5), "indices must be int32"),
        ((values, indices[:, :2], lengths, 5), "indices must .* have the shape of values"),
        ((values, indices, lengths[:2], 5), r"lengths must be int32 \(4,\)"),
        ((values.int(), indices, lengths, 5), "values must be a matrix of float32"),
        ((values, indices, lengths, -1), "num_cols must be a size"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
