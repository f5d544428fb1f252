"""sample on the emulated GPU: draws equal to the CPU to the bit, logsumexp by the policy."""

import pytest
import torch

from tests.emulation.inputs import (
    NAN,
    assert_same,
    small_integers,
    sparse_rows,
    with_specials,
    with_strides,
    with_ties,
)
from tests.ops.inputs import DTYPES
from tests.tolerances import assert_accurate


def double(argument):
    is_floating = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.double() if is_floating else argument


def compare(emulator, name, arguments):
    expected = getattr(torch.ops.splade_fast, name)(*arguments)
    found = getattr(emulator.ops, name)(*arguments)
    truth = getattr(torch.ops.splade_fast, name)(*map(double, arguments))
    for i in (0, 1, 3):  # scores, perturbed, indices
        assert_same(found[i], expected[i])
    assert_accurate(found[2], truth[2], expected[2])


@pytest.fixture
def sizes(draw):
    return draw.choice([1, 2, 5]), draw.choice([1, 3, 50, 4096, 4097, 5000, 9000])


@pytest.fixture
def state(draw):
    return torch.tensor([draw.randrange(-(2**62), 2**62), draw.randrange(2**62)])


@pytest.fixture
def drawing(draw, sizes, state):
    """Arguments after the vectors: state, num_samples, …, query_offset."""
    queries, slots = sizes
    valid = [
        None,
        torch.rand(slots) < 0.7,
        torch.rand(queries, slots) < 0.5,
        torch.zeros(slots) > 0,
    ]
    exclude = [
        None,
        torch.rand(queries, slots) < 0.3,
        torch.randint(-3, slots + 3, (queries, 4)),
        torch.randint(0, slots, (queries, 0)),
    ]
    return (
        state,
        draw.choice([1, 1, 2, 5, 20]),
        draw.choice([1.0, 0.5, -2.0]),  # scale
        draw.choice([1.0, 0.0, 2.5, 1e-3]),  # inverse temperature
        draw.choice([None, None, 1, 2, 7, 100, 2000, slots + 1]),  # top_k
        draw.random() < 0.5,  # exact
        draw.choice(valid),
        draw.choice(exclude),
        draw.choice([0, 1, 2, 3, 2**34 - slots]),
        draw.choice([0, 7, 2**32 - queries]),
    )


def test_scores(emulator, draw, sizes, drawing):
    state, num_samples, _, temperature, _, _, valid, _, slot_offset, query_offset = drawing
    scores = with_ties(draw, torch.randn(sizes) * 3).to(draw.choice(DTYPES))
    scores = with_strides(draw, with_specials(draw, scores, share=1e-3))
    arguments = scores, state, num_samples, temperature, valid, slot_offset, query_offset
    compare(emulator, "sample_scores", arguments)


def test_dense(emulator, draw, sizes, drawing):
    queries, slots = sizes
    dim = draw.choice([0, 1, 8])
    vectors = small_integers(queries, dim, dtype=draw.choice(DTYPES))
    cache = small_integers(slots, dim, dtype=draw.choice(DTYPES))
    if dim and draw.random() < 0.2:
        cache[draw.randrange(slots)] = NAN
    compare(emulator, "sample_dense", (vectors, cache, *drawing))


def test_sparse(emulator, draw, sizes, drawing):
    queries, slots = sizes
    columns = 50
    rows = sparse_rows(draw, queries, columns, 10)
    cache = sparse_rows(draw, slots, columns, 6)
    compare(emulator, "sample_sparse", (*rows, *cache, columns, *drawing))
