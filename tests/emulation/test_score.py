"""score on the emulated GPU, compared with the CPU."""

import torch

from tests.emulation.inputs import assert_same, small_integers, sparse_rows
from tests.ops.inputs import DTYPES


def test_is_that_of_the_cpu(emulator, draw):
    """Return sparse or dense queries."""
    columns, queries = draw.choice([1, 10, 200]), draw.choice([0, 1, 5, 33, 64, 70])
    documents = sparse_rows(
        draw, draw.choice([0, 1, 31, 33, 100]), columns, draw.choice([0, 1, 7, 40])
    )
    rows = sparse_rows(draw, queries, columns, draw.choice([0, 1, 30]))
    if draw.random() < 0.5:
        dense = small_integers(queries, columns, dtype=draw.choice(DTYPES))
        rows = None, dense * (torch.rand(dense.shape) < 0.3), None
    arguments = *rows, *documents, columns
    assert_same(
        emulator.ops.sparse_scores(*arguments), torch.ops.splade_fast.sparse_scores(*arguments)
    )


def test_columns_that_come_twice_are_added_in_their_order(emulator, draw):
    columns, width = draw.choice([1, 5, 40, 1000]), draw.choice([2, 33, 100])
    queries = (
        torch.randint(0, columns, (5, width)).int(),
        torch.randn(5, width) * 10.0 ** torch.randint(-6, 6, (5, width)),
        torch.tensor([0, 1, 2, width - 1, width]).int(),
    )
    documents = (
        torch.arange(columns).int().expand(2, columns).contiguous(),
        torch.eye(columns)[torch.randint(0, columns, (2,))],  # each score is one element of a table
        torch.full((2,), columns).int(),
    )
    arguments = *queries, *documents, columns
    assert_same(
        emulator.ops.sparse_scores(*arguments), torch.ops.splade_fast.sparse_scores(*arguments)
    )


def test_disorder_comes_to_an_end(emulator, draw):
    """Check that no thread diverges, waits for ever or crashes with any indices and lengths."""
    columns, rows, width = draw.choice([1, 64, 200]), 20, 7
    disordered = (
        torch.randint(-3, columns + 3, (rows, width)).int(),
        torch.randn(rows, width),
        torch.randint(-3, width + 5, (rows,)).int(),
    )
    scores = emulator.ops.sparse_scores(*disordered, *disordered, columns)
    assert scores.shape == (rows, rows)
