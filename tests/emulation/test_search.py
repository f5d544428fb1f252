"""search on the emulated GPU, compared with the CPU to the bit."""

import pytest
import torch

from tests.emulation.inputs import INF, NAN, assert_same, small_integers, sparse_rows
from tests.ops.inputs import DTYPES


@pytest.fixture
def queries(draw, columns):
    """Return sparse or dense queries of a block or more."""
    count = draw.choice([1, 2, 5, 33, 64, 70])
    if draw.random() < 0.5:
        return sparse_rows(draw, count, columns, draw.choice([0, 1, 30]))
    dense = small_integers(count, columns, dtype=draw.choice(DTYPES))
    return None, dense * (torch.rand(dense.shape) < 0.3), None


@pytest.fixture
def columns(draw):
    return draw.choice([1, 10, 200])


def assert_finds_the_same(emulator, *arguments):
    found = emulator.ops.sparse_search(*arguments)
    for one, other in zip(found, torch.ops.splade_fast.sparse_search(*arguments), strict=True):
        assert one.dtype == other.dtype
        assert_same(one, other)


def test_is_that_of_the_cpu(emulator, draw, columns, queries):
    """Search in several waves, with many ties."""
    count, width = draw.choice([1, 31, 33, 100, 300, 1000]), draw.choice([0, 1, 7, 140])
    documents = sparse_rows(draw, count, columns, width)
    if draw.random() < 0.3:
        documents[1][draw.randrange(count), :1] = draw.choice([INF, -INF, NAN])
    k = draw.choice([1, 2, 10, 100, count, 2 * count])
    assert_finds_the_same(emulator, *queries, *documents, columns, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lists_that_fill_up(emulator, draw, dtype):
    """Let every document beat those before it, so that each wave fills the lists."""
    count, k = 1000, draw.choice([1, 5, 40, 700])
    values = torch.arange(count, dtype=dtype)[:, None] // draw.choice([1, 7])
    zeros, ones = torch.zeros(count, 1, dtype=torch.int32), torch.ones(count, dtype=torch.int32)
    queries = None, torch.tensor([[1.0], [-1.0], [0.0]], dtype=dtype), None
    assert_finds_the_same(emulator, *queries, zeros, values, ones, 1, k)


@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 4100), (torch.float64, 2400)])
def test_more_than_shared_memory_holds(emulator, draw, dtype, k):
    """Select and sort in global memory."""
    values = torch.randn(4500, 1, dtype=dtype)
    values[torch.rand(4500, 1) < draw.choice([0.0, 0.5])] = 1
    zeros, ones = torch.zeros(4500, 1, dtype=torch.int32), torch.ones(4500, dtype=torch.int32)
    queries = None, torch.ones(1, 1, dtype=dtype), None
    assert_finds_the_same(emulator, *queries, zeros, values, ones, 1, k)


def test_nothing(emulator, draw, columns, queries):
    no_documents = sparse_rows(draw, 0, columns, 3)
    assert_finds_the_same(emulator, *queries, *no_documents, columns, 5)
    no_queries = sparse_rows(draw, 0, columns, 3)
    documents = sparse_rows(draw, 9, columns, 3)
    assert_finds_the_same(emulator, *no_queries, *documents, columns, 5)


def test_documents_in_host_memory(emulator, draw, columns, queries):
    """Copy documents in tiles; their tensors need not be contiguous."""
    indices, values, lengths = sparse_rows(draw, draw.choice([1, 100, 400]), columns, 9)
    documents = indices.t().contiguous().t(), values, lengths
    emulator.pin(values, is_work_running=False)
    try:
        assert_finds_the_same(emulator, *queries, *documents, columns, draw.choice([1, 10, 500]))
    finally:
        emulator.pin(None, is_work_running=False)


def test_disorder_comes_to_an_end(emulator, draw):
    """Check that no thread diverges, waits for ever or crashes with any indices and lengths."""
    columns, rows, width = draw.choice([1, 64, 200]), 12, 7
    disordered = (
        torch.randint(-3, columns + 3, (rows, width)).int(),
        torch.randn(rows, width),
        torch.randint(-3, width + 5, (rows,)).int(),
    )
    scores, ids = emulator.ops.sparse_search(*disordered, *disordered, columns, 9)
    assert scores.shape == ids.shape == (rows, 9)
    assert ((ids >= 0) & (ids < rows)).all()
