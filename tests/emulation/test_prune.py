"""prune on the emulated GPU, compared with the CPU."""

import torch

from tests.emulation.inputs import INF, assert_same, with_specials, with_strides, with_ties
from tests.ops.inputs import DTYPES


def test_is_that_of_the_cpu(emulator, draw):
    rows, columns = draw.choice([1, 2, 4]), draw.choice([1, 5, 33, 512, 5000, 9000, 20000])
    x = with_specials(draw, with_ties(draw, torch.randn(rows, columns))).to(draw.choice(DTYPES))
    if draw.random() < 0.3:
        x = x * (torch.rand(x.shape) < 0.05)
    if draw.random() < 0.2:
        x = x.sort().values  # each entry is above the threshold so far
    k = draw.choice([None, 0, 1, 3, 64, 1000, columns, 2 * columns])
    threshold = draw.choice([None, 0.0, 0.5, -0.7, INF, -INF])
    arguments = with_strides(draw, x), k, threshold, draw.choice([None, None, 0.0, 0.3, 1.0]), None
    values, indices, lengths = emulator.ops.prune_rows(*arguments)
    expected_values, expected_indices, expected_lengths = torch.ops.splade_fast.prune_rows(
        *arguments
    )
    width = expected_values.shape[1]
    assert_same(lengths, expected_lengths)
    assert_same(values[:, :width], expected_values)
    assert_same(indices[:, :width], expected_indices)
    assert (values[:, width:] == 0).all()
    assert (indices[:, width:] == -1).all()
