"""Rows and column names that are hard to export."""

import pytest
import torch

from splade_fast import SparseRows

# Dots, white space, special characters of JSON and printf, other scripts, and a missing name.
NAMES = ["fox", "e.g", ".", "a b", '"quoted"', "50%", "%s", "##ing", "über", "狐", "\\n", None]
NUM_COLS = len(NAMES)


def make_rows(dtype: torch.dtype = torch.float32, count: int = 40) -> SparseRows:
    """Return rows of 0 to NUM_COLS entries; the first, the last and some others are empty."""
    torch.manual_seed(0)
    x = (torch.randn(count, NUM_COLS, dtype=torch.float64) * 2).to(dtype).relu()
    x[::13] = 0
    x[-1] = 0
    x[5] = torch.rand(NUM_COLS).to(dtype) + 0.5
    return SparseRows.from_dense(x)


@pytest.fixture
def rows() -> SparseRows:
    return make_rows()


@pytest.fixture
def ids(rows: SparseRows) -> list[str]:
    return [f'document-"{number}"' for number in range(len(rows))]


@pytest.fixture
def empty_rows(rows: SparseRows) -> list[int]:
    found = (rows.lengths == 0).nonzero().flatten().tolist()
    assert len(found) > 2
    return found
