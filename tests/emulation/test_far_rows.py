"""Rows so far apart that an offset of 32 bits would be wrong, in files without content."""

import pytest
import torch

from tests.emulation.inputs import assert_same

STRIDE = 2**31 + 16  # elements


@pytest.fixture
def far_rows(tmp_path):
    """Return rows that are STRIDE elements apart. Only their own pages take memory."""

    def make(name, rows):
        size = (len(rows) - 1) * STRIDE + rows.shape[1]
        path = str(tmp_path / name)
        file = torch.from_file(path, shared=True, size=size, dtype=rows.dtype)
        return file.as_strided(rows.shape, (STRIDE, 1)).copy_(rows)

    return make


def test_pool(emulator, far_rows):
    logits = torch.randn(3, 40).bfloat16()
    arguments = None, 0, 0, True
    found = emulator.ops.pool_forward(far_rows("logits", logits)[None], *arguments)
    expected = torch.ops.splade_fast.pool_forward(logits[None], *arguments)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_prune(emulator, far_rows):
    x, arguments = torch.randn(3, 40).bfloat16(), (5, None, None, None)
    found = emulator.ops.prune_rows(far_rows("x", x), *arguments)
    expected = torch.ops.splade_fast.prune_rows(x, *arguments)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_sample(emulator, far_rows):
    scores, state = torch.randn(3, 40).bfloat16(), torch.tensor([1, 2])
    arguments = state, 2, 1.0, None, 0, 0
    found = emulator.ops.sample_scores(far_rows("scores", scores), *arguments)
    expected = torch.ops.splade_fast.sample_scores(scores, *arguments)
    assert_same(found[0], expected[0])
    assert_same(found[3], expected[3])


def test_gather_and_scatter(emulator, far_rows):
    rows, indices = torch.randint(0, 100, (3, 20)).byte(), torch.tensor([2, 0])
    table = far_rows("table", rows)
    assert_same(emulator.ops.gather_rows([table], indices)[0], rows[indices])
    new = torch.randint(0, 100, (2, 20)).byte()
    emulator.ops.scatter_rows_([table], indices, [new], None)
    assert_same(table, rows.index_copy(0, indices, new))
